"""Which chats share a row, and how attention keeps them apart.

Speed only: packed rows have the loss of separate ones.
"""

import torch

from model import causal_mask

NO_TARGET = -100  # in place of a target that is not trained: F.cross_entropy gives it the loss 0


# ---- Which chats share a row --------------------------------------------------------------------

def best_fit(lengths, room):
    """Pack examples of these lengths into bins of `room` tokens; returns their indices, bin by bin.

    Best fit decreasing, as TRL packs: the longest example first, each into the fullest bin that
    still has room for it. No example is split.
    """
    bins = []  # the indices in each bin
    free = []  # the tokens left in each bin
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for i in longest_first:
        fitting = [b for b, left in enumerate(free) if left >= lengths[i]]
        if not fitting:
            fitting = [len(bins)]  # a new bin
            bins.append([])
            free.append(room)
        fullest = min(fitting, key=lambda b: free[b])
        bins[fullest].append(i)
        free[fullest] -= lengths[i]
    return bins


def packed_length(group):
    """How many tokens a group takes in a row: a chat by itself, or the two sides of a Pair."""
    shared = shared_prompt(group)
    return shared + sum(len(example.ids) - shared for example in group)


def shared_prompt(group):
    """How many ids the Examples of a group have in common: those of a Pair's prompt, but its last.

    The last id has two targets, one in each answer, so each side has its own.
    """
    return group[0].prompt - 1 if len(group) > 1 else 0


# ---- Who attends to whom -------------------------------------------------------------------------

def packed_mask(model, seen_until):
    """The attn_mask of packed rows in the form that the model's attention computes fastest.

    seen_until: int32 (B, T), the place from which on no token of the row attends to this one.
    """
    form = getattr(model, "packed_mask", dense_mask)
    return form(seen_until)


def dense_mask(seen_until):
    """Bool (B, 1, T, T): True where a query may look."""
    T = seen_until.shape[1]
    queries = torch.arange(T, device=seen_until.device).unsqueeze(1)
    mask = causal_mask(0, T, seen_until.device) & (queries < seen_until.unsqueeze(1))
    return mask.unsqueeze(1)  # the same for all heads
