"""OLMo-1B learns to answer: olmo_7b_sft.py with the settings of a 1B model.

    torchrun ... adapt.py configs/olmo_7b_sft.py configs/olmo_1b_sft.py

The paper tunes no 1B model. "card" is the model card of hamishivi/OLMo-1B-0724-SFT-hf.
"""

adds_to = "olmo_7b_sft.py"  # this file names what differs from it

start_from = "runs/olmo_1b"  # or a Hugging Face directory of OLMo-1B
run_dir = "runs/olmo_1b_sft"
epochs = 5  # card
lr = 1e-5  # card
micro_batch_size = 4  # ours
activation_checkpointing = "none"  # ours
