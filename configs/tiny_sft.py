"""From the base model of configs/tiny.py to one that answers: chats made of Python's docstrings."""

# what is tuned, and on what
method = "sft"
start_from = "runs/tiny"
train_data = "stdlib"  # questions about functions, classes and modules: their docstrings
eval_data = "stdlib"  # the same of the modules that pretraining held out

# the run
run_dir = "runs/tiny_sft"
epochs = 3  # as the paper
batch_size = 32  # chats
lr = 2e-4  # a small model likes far more than the paper's 2e-6
min_lr = 0.0
warmup_share = 0.03
schedule = "linear"
weight_decay = 0.0
grad_clip = 0.0
beta2 = 0.999  # AdamW as PyTorch has it, as Open Instruct
eps = 1e-8
eval_every_steps = 0  # before the first step and after the last
save_every_steps = 200
max_new_tokens = 100
watts = 20.0  # a guess for two busy cores
