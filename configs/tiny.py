"""A real OLMo in minutes on a laptop's CPU, offline: 5.3M parameters, on Python's own text."""

# the model: OLMo's shape, small; heads of 64 are what CPU attention does best
d_model = 256
n_layers = 4
n_heads = 4
mlp_hidden_size = 704  # near 8/3 d_model, as in OLMo-7B
max_seq_len = 256
vocab_size = 4096
embedding_size = 4096
weight_tying = False
eos_token_id = 4095
pad_token_id = 4094

# the data: topics, docstrings and code of the running Python, each with rules of Dolma's
data_dir = "datasets/stdlib"
sources = {
    "reference": {"path": "stdlib", "rules": "gopher pii document"},
    "docstrings": {"path": "stdlib", "rules": "gopher_repetition pii document"},  # short ones stay
    "code": {"path": "stdlib", "rules": "code document"}}
tokenizer = "bpe:4096"  # trained on them at first use, in seconds

# the run
run_dir = "runs/tiny"
batch_size = 16  # 4,096 tokens
max_steps = 600  # 2.5M tokens, two thirds of an epoch
lr = 3e-3  # ten times OLMo-7B's: small models like it
min_lr = 3e-4  # a tenth of the peak, as OLMo
warmup_steps = 100
schedule = "linear"
eval_every_steps = 200
save_every_steps = 200
watts = 20.0  # a guess for two busy cores
