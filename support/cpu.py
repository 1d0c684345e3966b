"""A CPU's fast attention and head for training, put on the network from outside. They compute what
model.py computes, up to rounding; nothing of the recipe is here.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import at_least_float32, head_logits
from support.packing import NO_TARGET, dense_mask

# ---- Attention -----------------------------------------------------------------------------------

PLAIN_AT_MOST = 512  # tokens: the scores of longer sequences would take too much memory
QUERY_BLOCK = 128  # queries a product; a block needs the keys up to its own end only


def use_fast_attention(model):
    """Let every block train with attention in plain matrix products, and predict with SDPA.

    A compiled training step takes 0.8 times as long (python -m tests.bench cpu). Call this before
    the blocks are compiled.
    """
    for block in model.blocks:
        block.attn.attend = fast_attention
    model.packed_mask = packed_mask


def packed_mask(seen_until):
    """What fast_attention takes as the mask of packed rows (support/packing.py)."""
    return seen_until if seen_until.shape[1] <= PLAIN_AT_MOST else dense_mask(seen_until)


def fast_attention(q, k, v, attn_mask=None, is_causal=False):
    """As F.scaled_dot_product_attention: y (B, H, T, K) of q, k and v (B, H, S, K).

    attn_mask may also be seen_until, int32 (B, T), as in `plain_attention`.
    """
    if attn_mask is not None and attn_mask.dtype == torch.int32:
        return plain_attention(q, k, v, attn_mask)
    T = q.shape[2]
    # SDPA's backward is the slow part: without gradients SDPA takes half the time of the products.
    trains = q.requires_grad
    causal = is_causal and attn_mask is None and T == k.shape[2]
    if trains and causal and T <= PLAIN_AT_MOST:
        return plain_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)


def plain_attention(q, k, v, seen_until=None):
    """Causal attention of q on k and v, (B, H, T, K) each, in matrix products.

    seen_until: int32 (B, T), the place from which on no query attends to a key; None hides none.
    Computed inside the compiled block it costs nothing, while a bool mask (B, 1, T, T) is read.

    On a CPU, SDPA multiplies in small tiles; products of 128 queries with all keys that they may
    see are faster, and skip almost half of the scores. In bfloat16 the scores are rounded to it
    before the softmax, which SDPA does not do.
    """
    B, H, T, K = q.shape
    q = (q / K ** 0.5).reshape(B * H, T, K)  # once, so that no block copies it again
    k = k.reshape(B * H, T, K)
    v = v.reshape(B * H, T, K)
    if seen_until is not None:
        seen_until = seen_until.repeat_interleave(H, dim=0)  # (B H, T)
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        seen = None if seen_until is None else seen_until[:, :end]
        parts.append(QueryBlock.apply(q[:, start:end], k[:, :end], v[:, :end], seen))
    return torch.cat(parts, dim=1).view(B, H, T, K)


class QueryBlock(torch.autograd.Function):
    """softmax(q k') v of scaled queries (N, T, K), the last T of the keys' S positions.

    seen_until: int32 (N, S) or None, as in `plain_attention`.

    Element-wise passes over the scores (N, T, S) take longer than their products. So the division
    by the softmax's sum comes after the product with v, where K numbers a row stand for S, and the
    backward reads the weights instead of computing exponentials again.

    # subtle: torch.bmm, because with `@` the compiler keeps the scores instead of the weights, and
    # computes the exponentials in the backward after all: a step takes 1.05 times as long
    """

    @staticmethod
    def forward(ctx, q, k, v, seen_until):
        T = q.shape[1]
        S = k.shape[1]
        scores = at_least_float32(torch.bmm(q, k.transpose(1, 2)))
        keys = torch.arange(S, dtype=torch.int32, device=q.device)  # int64 compares at half speed
        queries = keys[S - T:, None]
        hidden = keys > queries
        if seen_until is not None:
            hidden = hidden | (queries >= seen_until.unsqueeze(1))
        scores = scores.masked_fill(hidden, -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp().to(q.dtype)
        total = at_least_float32(weights).sum(-1, keepdim=True)
        ctx.save_for_backward(q, k, v, weights, total)
        return (torch.bmm(weights, v) / total).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, weights, total = ctx.saved_tensors
        dweights = at_least_float32(torch.bmm(dy, v.transpose(1, 2)))
        # subtle: this mean is also dy . y, which takes fewer sums; but then the rounding of y does
        # not cancel where a query sees few keys
        mean = (weights * dweights).sum(-1, keepdim=True) / total
        dscores = (weights * (dweights - mean) / total).to(q.dtype)
        dv = torch.bmm(weights.transpose(1, 2), (dy / total).to(q.dtype))
        dk = torch.bmm(dscores.transpose(1, 2), q)
        return torch.bmm(dscores, k), dk, dv, None


# ---- The head ------------------------------------------------------------------------------------

def fast_token_losses(x, head_weight, targets):
    """model.token_losses whose compiled step takes 0.94 times as long with 50,304 ids."""
    logits = head_logits(x, head_weight).flatten(0, 1)
    targets = targets.flatten()
    is_none = targets == NO_TARGET
    losses = CrossEntropy.apply(logits, targets.masked_fill(is_none, 0))
    return losses.masked_fill(is_none, 0).view(x.shape[:2])


class CrossEntropy(torch.autograd.Function):
    """-ln softmax(logits)[target], float32 (N,), of logits (N, V) and int64 targets (N,).

    The compiler's own backward compares each of the V ids with the target, twice. Here the
    softmax's gradient is p everywhere, and the target's place is then written once more: p - 1.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        targets = targets.unsqueeze(1)
        wide = at_least_float32(logits)
        log_total = wide.logsumexp(-1, keepdim=True)
        losses = log_total - wide.gather(1, targets)
        ctx.save_for_backward(logits, targets, log_total, losses)
        return losses.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlosses):
        logits, targets, log_total, losses = ctx.saved_tensors
        dlosses = dlosses.unsqueeze(1)
        p = (at_least_float32(logits) - log_total).exp()
        dlogits = (p * dlosses).to(logits.dtype)
        at_target = torch.expm1(-losses) * dlosses
        return dlogits.scatter(1, targets, at_target.to(logits.dtype)), None


HEAD_TOKENS = 256  # the head is computed for a multiple of so many: few numbers are compiled


def only_of_targets(token_losses):
    """model.token_losses that computes no logits where the target is NO_TARGET: the loss is 0.

    Two thirds of the tokens of the embedded chats are questions, which are not trained.
    """
    def losses_of_targets(x, head_weight, targets):
        are_none = (targets == NO_TARGET).flatten()
        wanted = max(1, len(are_none) - int(are_none.sum()))
        wanted += -wanted % HEAD_TOKENS
        if wanted >= len(are_none):
            return token_losses(x, head_weight, targets)
        places = are_none.argsort(stable=True)[:wanted]  # the targets, and then some without one
        chosen = token_losses(x.flatten(0, 1).index_select(0, places).unsqueeze(0), head_weight,
                              targets.flatten()[places].unsqueeze(0))
        losses = chosen.new_zeros(len(are_none)).index_copy(0, places, chosen.flatten())
        return losses.view_as(targets)
    return losses_of_targets
