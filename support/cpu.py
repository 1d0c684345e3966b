"""A CPU's fast attention for training, put on the network from outside. It computes what model.py
computes, up to rounding; nothing of the recipe is here.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import at_least_float32

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
    B, H, T, K = q.shape
    q = (q / K ** 0.5).reshape(B * H, T, K)  # once, so that no block copies it again
    k = k.reshape(B * H, T, K)
    v = v.reshape(B * H, T, K)
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        parts.append(QueryBlock.apply(q[:, start:end], k[:, :end], v[:, :end]))
    return torch.cat(parts, dim=1).view(B, H, T, K)


class QueryBlock(torch.autograd.Function):
    """softmax(q k') v of scaled queries (N, T, K), the last T of the keys' S positions.

    Element-wise passes over the scores (N, T, S) take longer than their products. So the division
    by the softmax's sum comes after the product with v, where K numbers a row stand for S, and the
    backward reads the weights instead of computing exponentials again.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        T = q.shape[1]
        S = k.shape[1]
        scores = at_least_float32(q @ k.transpose(1, 2))
        keys = torch.arange(S, dtype=torch.int32, device=q.device)  # int64 compares at half speed
        scores = scores.masked_fill(keys > keys[S - T:, None], -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp().to(q.dtype)
        total = at_least_float32(weights).sum(-1, keepdim=True)
        ctx.save_for_backward(q, k, v, weights, total)
        return (weights @ v / total).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, weights, total = ctx.saved_tensors
        dweights = at_least_float32(dy @ v.transpose(1, 2))
        # subtle: this mean is also dy . y, which takes fewer sums; but then the rounding of y does
        # not cancel where a query sees few keys
        mean = (weights * dweights).sum(-1, keepdim=True) / total
        dscores = (weights * (dweights - mean) / total).to(q.dtype)
        dv = weights.transpose(1, 2) @ (dy / total).to(q.dtype)
        return dscores @ k, dscores.transpose(1, 2) @ q, dv
