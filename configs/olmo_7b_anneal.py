"""The end of OLMo-7B: the learning rate falls to almost nothing over the last 1,000 steps.

    torchrun ... train.py configs/olmo_7b.py configs/olmo_7b_anneal.py [--start_from=RUN/step556000]

This file names what differs from olmo_7b.py. The anneal starts from step 556,000 of that run, with
its weights, optimiser and place in the data; its last step is the released OLMo-7B. Source of the
settings: allenai/OLMo, configs/mcli/v1_5-mix-medium-mitch-ish.yaml at commit 87a8b702.
"""

run_dir = "runs/olmo_7b_anneal"
start_from = "runs/olmo_7b/step556000"
max_steps = 557_000  # the first step is 556,001
lr = 2.3e-5
min_lr = 2.3e-8  # alpha_f 0.001
warmup_steps = 556_000  # t_warmup: over before the first step, so only the decay is left
decay_steps = 557_000  # t_max
grad_clip_warmup_steps = 0  # the rule for early steps plays no part here
eval_every_steps = 100  # as in that commit
save_every_steps = 500  # as in that commit
