"""OLMo-7B-SFT: the paper's recipe (section 4.3) on Tulu 2's mix. Card: allenai/OLMo-7B-SFT."""

# what is tuned, and on what
method = "sft"
start_from = "runs/olmo_7b_anneal"  # or a Hugging Face directory of OLMo-7B
train_data = "tulu/train.jsonl"  # allenai/tulu-v2-sft-mixture-olmo-2048
eval_data = "tulu/eval.jsonl"  # a share of it that was put aside
faulty = "skip"

# the run: card; Open Instruct, olmo_7b_sft.yaml
run_dir = "runs/olmo_7b_sft"
dtype = "bfloat16"
epochs = 3
batch_size = 128  # chats
micro_batch_size = 1  # packed rows of 2,048 tokens
activation_checkpointing = "whole_layer"
lr = 2e-6
min_lr = 0.0
warmup_share = 0.03
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
