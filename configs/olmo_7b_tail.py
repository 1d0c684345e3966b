"""OLMo-7B from step 501,001 to 556,000: the learning rate, constant since 476,837, sinks again.

    torchrun ... train.py configs/olmo_7b.py configs/olmo_7b_tail.py [--start_from=RUN/step501000]

It starts from step 501,000 with its weights, optimiser and place in the data. Source, "start":
allenai/OLMo, configs/mcli/v1_5-mix-medium-mitch-ish.yaml at commit 148ca062.
"""

adds_to = "olmo_7b.py"  # this file names what differs from it

run_dir = "runs/olmo_7b_tail"
start_from = "runs/olmo_7b/step501000"
max_steps = 556_000  # where the anneal begins; 2.46T tokens
lr = 3e-5  # start:36
min_lr = 3e-6  # alpha_f 0.1, as before
warmup_steps = 501_000  # start:37, t_warmup: over before the first step, so only the decay is left
decay_steps = 700_000  # start:38, t_max; the run never got there: it ends at 2.25e-5
