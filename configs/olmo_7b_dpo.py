"""OLMo-7B-Instruct: OLMo-7B-SFT learns preferences, on UltraFeedback. Paper, section 4.3.

Sources: "paper" is its appendix B, and so says the model card of allenai/OLMo-7B-Instruct; its
settings are those of Tulu 2. "yaml" is configs/train_configs/dpo/olmo_7b_17_inst.yaml in
allenai/open-instruct at commit 6e31d541, with the line after the colon; it tunes a later OLMo with
the same settings and a longer context. "code" is open_instruct/dpo_tune.py at commit ecf0c508.
"""

# what is tuned, and on what
method = "dpo"
start_from = "runs/olmo_7b_sft"
train_data = "ultrafeedback/train_prefs.jsonl"  # yaml:5: allenai/ultrafeedback_binarized_cleaned
eval_data = "ultrafeedback/test_prefs.jsonl"
faulty = "skip"  # ours: in some of its pairs both answers are the same
beta = 0.1  # paper; yaml:12; code:239

# the optimiser and the batch
epochs = 3  # paper; yaml:16
batch_size = 32  # pairs; yaml:9, 10: 1 on each of 8 GPUs x 4
lr = 5e-7  # paper; yaml:11
min_lr = 0.0  # yaml:13: linear, to 0
warmup_share = 0.1  # paper; yaml:14
weight_decay = 0.0  # paper; yaml:15
grad_clip = 0.0  # paper: no clipping; see olmo_7b_sft.py
beta2 = 0.999  # code:633: PyTorch's default
eps = 1e-8  # code:633: PyTorch's default

# the run
run_dir = "runs/olmo_7b_dpo"
dtype = "bfloat16"  # scripts/dpo_train_with_accelerate.sh:11
micro_batch_size = 1  # ours: packed rows of 2,048 or 4,096 tokens; the same script, line 5: a pair
activation_checkpointing = "whole_layer"  # yaml:7: gradient_checkpointing
suite = "mmlu"  # paper, section 4.3
chat = True  # MMLU's questions in the chat format
eval_batch_tokens = 8192  # ours, like what follows
eval_every_steps = 1000
save_every_steps = 500
max_new_tokens = 512
watts = 400.0  # of an A100, used where its power meter cannot be read
