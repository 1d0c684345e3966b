"""Continued pretraining: begin with somebody's weights, and learn from your own text.

    python train.py configs/continue.py --start_from=DIRECTORY --sources="{'mine': 'documents'}"

Shape and tokenizer are those of the directory. Its weights have settled at a small learning rate.
The rate rises again, to a tenth of the peak with which they were trained: a higher one learns more
of the new text and forgets more of the old (arXiv 2308.04014; 2403.08763 also shows some of the old
text again). Then it falls to almost nothing, as at the end of OLMo-7B. Set --lr for other weights.

Sources, in allenai/OLMo, with the line after the colon. "tail" and "anneal" are the last two parts
of OLMo-7B: see olmo_7b_tail.py and olmo_7b_anneal.py. "tune" is a run that began with OLMo-7B's
weights and a new optimiser: configs/mitchish-instruct.yaml at commit 321c4994. "stage 2" is how
OLMo 2 went on with other text: configs/official-1124/OLMo2-7B-stage2-seed42.yaml at v0.6.0.
"""

fresh_optimizer = True  # tune: configs/mcli/mitchish-instruct.yml:93, --reset_optimizer_state

# the data: put your files into this folder, or name another
data_dir = "datasets/continued"
sources = {"mine": "documents"}

# the run
run_dir = "runs/continued"
batch_size = 16  # ours, for one small machine; tune:74: 128, stage 2:82: 1024
max_steps = 1000  # anneal: from 556,000 to 557,000
lr = 4e-5  # a tenth of OLMo-1B's peak, 4e-4; tail: 3e-5, a tenth of OLMo-7B's
min_lr = 4e-8  # anneal, tune:55: alpha_f 0.001; stage 2:59: 0
warmup_steps = 100  # tune:54; arXiv 2308.04014: its length matters little
schedule = "linear"  # anneal, tune:53, stage 2:57
weight_decay = 0.1  # anneal, stage 2:47: as before
eval_every_steps = 100  # anneal; the first evaluation comes before step 1
save_every_steps = 500  # anneal
