"""OLMo-7B-SFT: OLMo-7B learns to answer, on the Tulu 2 mix. Paper, section 4.3.

Sources: the model card of allenai/OLMo-7B-SFT; Open Instruct, olmo_7b_sft.yaml.
"""

# what is tuned, and on what
method = "sft"
start_from = "runs/olmo_7b_anneal"  # or a Hugging Face directory of OLMo-7B
train_data = "tulu/train.jsonl"  # allenai/tulu-v2-sft-mixture-olmo-2048
eval_data = "tulu/eval.jsonl"  # a part of the mix that you set aside
faulty = "skip"

# the optimiser and the batch: model card
epochs = 3
batch_size = 128  # chats
lr = 2e-6
min_lr = 0.0
warmup_share = 0.03
weight_decay = 0.0
grad_clip = 0.0  # no clipping
beta2 = 0.999  # PyTorch's default, which Open Instruct keeps
eps = 1e-8  # PyTorch's default too

# the run
run_dir = "runs/olmo_7b_sft"
dtype = "bfloat16"
micro_batch_size = 1  # packed rows of 2,048 tokens
activation_checkpointing = "whole_layer"
suite = "mmlu"
chat = True  # MMLU's questions in the chat format
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 500
max_new_tokens = 512
watts = 400.0  # of an A100, used where its power meter cannot be read
