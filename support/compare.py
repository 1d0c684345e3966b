"""An export is compared with transformers' own model: both must compute the same logits."""

import importlib.util

import torch

from support.files import UserError
from support.memory import is_lack_of_memory

LOGITS_MAY_DIFFER = 1e-4  # of the largest; rounding makes 1e-6 to 1e-5 in float32


@torch.no_grad()
def compare_with_transformers(model, directory, out):
    """UserError if transformers computes other logits from `directory`; False if it is not there.

    A changed forward without a parameter of its own (QK-norm, a norm behind the attention) writes
    the same tensors as OLMo 1.0: only the logits show it.
    """
    hf = load_in_transformers(directory)
    if hf is None:
        return False
    config = model.config
    stream = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, min(64, config.max_seq_len)), generator=stream)
    theirs = hf(tokens).logits
    # in float32 on the CPU, whatever the model trains in
    weights = {name: p.detach().cpu().float() for name, p in model.named_parameters()}
    compute_dtype, model.compute_dtype = model.compute_dtype, None
    try:
        ours = torch.func.functional_call(model, weights, (tokens,))
    finally:
        model.compute_dtype = compute_dtype
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference < LOGITS_MAY_DIFFER:
        raise UserError(f"{out}: not written: transformers' OLMo computes other logits from these "
                        f"weights (by {difference:.2g} of the largest); a network whose forward "
                        "differs from OLMo 1.0's cannot be exported")
    return True


def load_in_transformers(directory):
    """transformers' model of a directory; None if it is not installed, or older than OLMo.

    UserError if it is installed and broken, as many a pair of versions is.
    """
    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        import transformers
        if not hasattr(transformers, "OlmoForCausalLM"):  # older than OLMo
            return None
        transformers.logging.disable_progress_bar()
        # Float32, as config.json says. transformers 5 maps the file: a 7B needs no 28 GB more.
        return transformers.OlmoForCausalLM.from_pretrained(directory, attn_implementation="eager")
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError("transformers, with which an export is compared, is installed and does not "
                        f"work ({lines[-1]}); repair it, or uninstall it to export without the "
                        "comparison") from None
