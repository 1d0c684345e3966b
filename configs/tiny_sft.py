"""The base model of tiny.py learns to answer: chats made of Python's docstrings."""

# what is tuned, and on what
method = "sft"
start_from = "runs/tiny"
train_data = "stdlib"  # questions about functions, classes and modules; docstrings are the answers
eval_data = "stdlib"  # the same, about the modules that pretraining held out

# the optimiser and the batch
epochs = 3  # as in the paper
batch_size = 32  # chats
lr = 2e-4  # a small model needs a far larger one than the paper's 2e-6
min_lr = 0.0
warmup_share = 0.03
weight_decay = 0.0
grad_clip = 0.0  # no clipping
beta2 = 0.999  # PyTorch's default, which Open Instruct keeps
eps = 1e-8  # PyTorch's default too

# the run
run_dir = "runs/tiny_sft"
eval_every_steps = 0  # before the first step and after the last one only
save_every_steps = 200
max_new_tokens = 100
watts = 20.0  # a guess for two busy cores
