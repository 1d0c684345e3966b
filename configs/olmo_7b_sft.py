"""OLMo-7B-SFT: OLMo-7B learns to answer, on the Tulu 2 mix. Paper, section 4.3 and appendix B.

Sources: "paper" is its appendix B, and so says the model card of allenai/OLMo-7B-SFT; "yaml" is
configs/train_configs/sft/olmo_7b_sft.yaml in allenai/open-instruct at commit 84a9c55d, with the
line after the colon; "code" is open_instruct/finetune.py there at commit ecf0c508.
"""

# what is tuned, and on what
method = "sft"
start_from = "runs/olmo_7b_anneal"  # or a Hugging Face directory of OLMo-7B
train_data = "tulu/train.jsonl"  # yaml:6: allenai/tulu-v2-sft-mixture-olmo-2048
eval_data = "tulu/eval.jsonl"  # ours: a part of the mix that you set aside
faulty = "skip"  # ours

# the optimiser and the batch
epochs = 3  # paper; yaml:15
batch_size = 128  # chats; yaml:9, 10: 1 on each of 8 GPUs x 16
lr = 2e-6  # paper; yaml:11
min_lr = 0.0  # yaml:12: linear, to 0
warmup_share = 0.03  # paper; yaml:13
weight_decay = 0.0  # paper; yaml:14
# DIFFERS FROM OLMo: Open Instruct's script clips at 1.0, as accelerate reads DeepSpeed's "auto" so
grad_clip = 0.0  # paper: no clipping
beta2 = 0.999  # code:656: PyTorch's default
eps = 1e-8  # code:656: PyTorch's default

# the run
run_dir = "runs/olmo_7b_sft"
dtype = "bfloat16"  # scripts/finetune_with_accelerate.sh:13
micro_batch_size = 1  # ours: packed rows of 2,048 tokens
activation_checkpointing = "whole_layer"  # ours
suite = "mmlu"  # paper, section 4.3
chat = True  # MMLU's questions in the chat format
eval_batch_tokens = 8192  # ours, like what follows
eval_every_steps = 1000
save_every_steps = 500
max_new_tokens = 512
watts = 400.0  # of an A100, used where its power meter cannot be read
