"""A CPU's fast attention for training, put on the network from outside. It computes what model.py
computes, up to rounding; nothing of the recipe is here.
"""

import math

import torch
import torch.nn.functional as F

from model import at_least_float32, causal_mask

PLAIN_AT_MOST = 512  # tokens: the scores of longer sequences would take too much memory
QUERY_BLOCK = 128  # queries a product; a block needs the keys up to its own end only


def use_fast_attention(model):
    """Let every block train with attention in plain matrix products, and predict with SDPA.

    A compiled training step takes 0.8 times as long (python -m tests.bench cpu). Call this before
    the blocks are compiled.
    """
    for block in model.blocks:
        block.attn.attend = fast_attention


def fast_attention(q, k, v, attn_mask=None, is_causal=False):
    """As F.scaled_dot_product_attention: y (B, H, T, K) of q, k and v (B, H, S, K)."""
    T = q.shape[2]
    # SDPA's backward is the slow part: without gradients SDPA takes half the time of the products.
    trains = q.requires_grad
    causal = is_causal and attn_mask is None and T == k.shape[2]
    if trains and causal and T <= PLAIN_AT_MOST:
        return plain_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)


def plain_attention(q, k, v):
    """Causal attention of q on k and v, (B, H, T, K) each, in matrix products.

    On a CPU, SDPA multiplies in small tiles; products of 128 queries with all keys that they may
    see are faster, and skip almost half of the scores. In bfloat16 the scores are rounded to it
    before the softmax, which SDPA does not do.
    """
    T = q.shape[2]
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = at_least_float32(q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1))
        hidden = ~causal_mask(start, end - start, q.device)
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
        parts.append(scores.softmax(-1).to(q.dtype) @ v[:, :, :end])
    return torch.cat(parts, dim=2)
