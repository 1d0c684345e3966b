"""OLMo-1B-SFT learns preferences: olmo_7b_dpo.py with the settings of a 1B model.

    torchrun ... adapt.py configs/olmo_7b_dpo.py configs/olmo_1b_dpo.py

The paper tunes no 1B model. Batch, epochs and beta are the same in the model card of
hamishivi/OLMo-1B-0724; the learning rate is that of OLMo-7B.
"""

adds_to = "olmo_7b_dpo.py"  # this file names what differs from it

start_from = "runs/olmo_1b_sft"
run_dir = "runs/olmo_1b_dpo"
micro_batch_size = 4  # ours
activation_checkpointing = "none"  # ours
