"""A real OLMo in minutes on a laptop's CPU, offline: 5.3M parameters, Python's own text."""

# the model: OLMo's shape, small
d_model = 256
n_layers = 4
n_heads = 4  # of 64 dimensions each, which a CPU multiplies fast
mlp_hidden_size = 704  # near 8/3 d_model, as in OLMo-7B
max_seq_len = 256
weight_tying = False

# the data: text that every Python carries, each source with some of Dolma's rules
data_dir = "datasets/stdlib"
sources = {
    "reference": {"path": "stdlib", "rules": "gopher pii document"},
    "docstrings": {"path": "stdlib", "rules": "gopher_repetition pii document"},  # they are short
    "code": {"path": "stdlib", "rules": "code document"}}
tokenizer = "bpe:4096"  # trained on this text at first use, in seconds

# the run
run_dir = "runs/tiny"
batch_size = 16  # 4,096 tokens
max_steps = 600  # 2.5M tokens, two thirds of an epoch
lr = 3e-3  # ten times OLMo-7B's: a small model learns best with a large one
min_lr = 3e-4  # a tenth of the peak, as in OLMo
warmup_steps = 100
schedule = "linear"
eval_every_steps = 200
save_every_steps = 200
watts = 20.0  # a guess for two busy cores
