"""OLMo-1B learns to answer: olmo_7b_sft.py with the settings of a 1B model.

    torchrun ... adapt.py configs/olmo_7b_sft.py configs/olmo_1b_sft.py

This file names what differs from olmo_7b_sft.py. The paper tunes no 1B model; the settings are
those of the model card of hamishivi/OLMo-1B-0724-SFT-hf.
"""

start_from = "runs/olmo_1b"  # or a Hugging Face directory of OLMo-1B
run_dir = "runs/olmo_1b_sft"
epochs = 5
lr = 1e-5
micro_batch_size = 4
activation_checkpointing = "none"
