"""The model of tiny_sft.py learns preferences: the right docstring before a wrong, a cut or a
shuffled one."""

# what is tuned, and on what
method = "dpo"
start_from = "runs/tiny_sft"
train_data = "stdlib"  # questions, each with a right and a wrong answer
eval_data = "stdlib"  # the same, about the modules that pretraining held out
beta = 0.1  # as in the paper

# the optimiser and the batch
epochs = 3  # as in the paper
batch_size = 32  # pairs, as in the paper
lr = 1e-4  # a small model needs a far larger one than the paper's 5e-7
min_lr = 0.0
warmup_share = 0.1
weight_decay = 0.0
grad_clip = 0.0  # no clipping
beta2 = 0.999  # PyTorch's default, which Open Instruct keeps
eps = 1e-8  # PyTorch's default too

# the run
run_dir = "runs/tiny_dpo"
eval_every_steps = 0  # before the first step and after the last one only
save_every_steps = 200
max_new_tokens = 100
watts = 20.0  # a guess for two busy cores
