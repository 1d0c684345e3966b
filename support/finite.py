"""Numbers that are none: a NaN in the weights or the logits is an error with its place."""

import math

import torch

from support.files import UserError

REMEDY = "the training diverged, or the file is damaged: take an earlier step"


def check_weights(tensors, place):
    """UserError for {name: tensor} with a NaN or an infinite value, of the model at `place`."""
    for name, tensor in tensors.items():
        if not tensor.numel():  # a rank may store no row of a sharded tensor
            continue
        extremes = torch.stack(tensor.detach().aminmax())  # one pass; a NaN is both
        if not extremes.isfinite().all():
            raise UserError(f"{place}: {name} holds a NaN or an infinite weight; {REMEDY}")


def check_logits(logits, new_ids):
    """UserError for a row of logits (B, V) that is not finite, after `new_ids` generated ids.

    argmax takes the first NaN for the largest: such a model would say id 0 for ever.
    """
    if math.isfinite(logits.sum().item()):  # a sum of finite ones is; one pass without a copy
        return
    is_finite = logits.isfinite().all(-1)
    if not is_finite.all():
        row = is_finite.tolist().index(False)
        raise UserError(f"prompt {row + 1} of {len(logits)}, token {new_ids + 1} of its answer: "
                        f"logits that are not finite; {REMEDY}")
