"""After configs/tiny_sft.py: prefer a docstring to another, to it cut off, to it in disorder."""

# what is tuned, and on what
method = "dpo"
start_from = "runs/tiny_sft"
train_data = "stdlib"  # questions, each with a right answer and a wrong one
eval_data = "stdlib"  # the same of the modules that pretraining held out

# the run
run_dir = "runs/tiny_dpo"
beta = 0.1  # as the paper
epochs = 3  # as the paper
batch_size = 32  # pairs, as the paper
lr = 1e-4  # a small model likes far more than the paper's 5e-7
min_lr = 0.0
warmup_share = 0.1
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0
beta2 = 0.999  # AdamW as PyTorch has it, as Open Instruct
eps = 1e-8
eval_every_steps = 0  # before the first step and after the last
save_every_steps = 200
max_new_tokens = 100
watts = 20.0  # a guess for two busy cores
