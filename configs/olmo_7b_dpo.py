"""OLMo-7B-Instruct: OLMo-7B-SFT learns preferences, on UltraFeedback. Paper, section 4.3.

Source: the model card of allenai/OLMo-7B-Instruct; its settings are those of Tulu 2.
"""

# what is tuned, and on what
method = "dpo"
start_from = "runs/olmo_7b_sft"
train_data = "ultrafeedback/train_prefs.jsonl"  # allenai/ultrafeedback_binarized_cleaned
eval_data = "ultrafeedback/test_prefs.jsonl"
faulty = "skip"  # in some of its pairs both answers are the same
beta = 0.1

# the optimiser and the batch: model card
epochs = 3
batch_size = 32  # pairs
lr = 5e-7
min_lr = 0.0
warmup_share = 0.1
weight_decay = 0.0
grad_clip = 0.0  # no clipping
beta2 = 0.999  # PyTorch's default, which Open Instruct keeps
eps = 1e-8  # PyTorch's default too

# the run
run_dir = "runs/olmo_7b_dpo"
dtype = "bfloat16"
micro_batch_size = 1
activation_checkpointing = "whole_layer"
suite = "mmlu"
chat = True  # MMLU's questions in the chat format
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 500
max_new_tokens = 512
watts = 400.0  # of an A100, used where its power meter cannot be read
