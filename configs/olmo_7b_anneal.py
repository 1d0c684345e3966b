"""The end of OLMo-7B: the learning rate falls to almost nothing over the last 1,000 steps.

    torchrun ... train.py configs/olmo_7b.py configs/olmo_7b_anneal.py [--start_from=RUN/step556000]

It starts from step 556,000 with its weights, optimiser and place in the data. Its last step is the
released OLMo-7B. Source, "start": allenai/OLMo, configs/mcli/v1_5-mix-medium-mitch-ish.yaml at
commit 87a8b702.
"""

adds_to = "olmo_7b.py"  # this file names what differs from it

run_dir = "runs/olmo_7b_anneal"
start_from = "runs/olmo_7b_tail/step556000"  # start:37
max_steps = 557_000  # released; start:44 ran one more step, at the smallest rate
lr = 2.3e-5  # start:40; where the tail ends, 2.254e-5, to two digits
min_lr = 2.3e-8  # start:43: alpha_f 0.001
warmup_steps = 556_000  # start:41, t_warmup: over before the first step, so only the decay is left
decay_steps = 557_000  # start:42, t_max
eval_every_steps = 100  # start:35
save_every_steps = 500  # start:36
