"""OLMo-7B-Instruct: the paper's recipe (section 4.3) on UltraFeedback. Card: OLMo-7B-Instruct."""

# what is tuned, and on what
method = "dpo"
start_from = "runs/olmo_7b_sft"
train_data = "ultrafeedback/train_prefs.jsonl"  # allenai/ultrafeedback_binarized_cleaned
eval_data = "ultrafeedback/test_prefs.jsonl"
faulty = "skip"  # some of its pairs are the same answer twice
beta = 0.1

# the run: card; as Tulu 2's
run_dir = "runs/olmo_7b_dpo"
dtype = "bfloat16"
epochs = 3
batch_size = 32  # pairs
micro_batch_size = 1
activation_checkpointing = "whole_layer"
lr = 5e-7
min_lr = 0.0
warmup_share = 0.1
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0
beta1 = 0.9
beta2 = 0.999  # AdamW as PyTorch has it
eps = 1e-8
suite = "mmlu"
chat = True
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 500
max_new_tokens = 512
watts = 400.0  # of an A100 where its meter cannot be read
