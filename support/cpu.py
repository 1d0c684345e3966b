"""A CPU's fast paths, put on the network from outside: attention for training, packed weights for
generation. Both compute what model.py computes, up to rounding; nothing of the recipe is here.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, at_least_float32, causal_mask, linear
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
    T = q.shape[2]
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = at_least_float32(q[:, :, start:end] @ k[:, :, :end].transpose(-2, -1))
        hidden = ~causal_mask(start, end - start, q.device)
        if seen_until is not None:
            queries = torch.arange(start, end, dtype=torch.int32, device=q.device).unsqueeze(1)
            hidden = hidden | (queries >= seen_until[:, None, None, :end])
        scores = (scores / q.shape[-1] ** 0.5).masked_fill(hidden, -math.inf)
        parts.append(scores.softmax(-1).to(q.dtype) @ v[:, :, :end])
    return torch.cat(parts, dim=2)


# ---- The head ------------------------------------------------------------------------------------

HEAD_TOKENS = 256  # the head is computed for a multiple of so many: few numbers are compiled


def only_of_targets(token_losses):
    """model.token_losses that computes no logits where the target is NO_TARGET: the loss is 0.

    Two thirds of the tokens of the embedded chats are questions, which are not trained.
    """
    def losses_of_targets(x, head_weight, targets):
        are_none = (targets == NO_TARGET).flatten()
        wanted = len(are_none) - int(are_none.sum())
        wanted += -wanted % HEAD_TOKENS
        if wanted >= len(are_none):
            return token_losses(x, head_weight, targets)
        places = are_none.argsort(stable=True)[:wanted]  # the targets, and then some without one
        chosen = token_losses(x.flatten(0, 1).index_select(0, places).unsqueeze(0), head_weight,
                              targets.flatten()[places].unsqueeze(0))
        losses = chosen.new_zeros(len(are_none)).index_copy(0, places, chosen.flatten())
        return losses.view_as(targets)
    return losses_of_targets


# ---- Generation ----------------------------------------------------------------------------------

PACKED_AT_MOST = 2**29  # weights: a second copy of a larger model costs more than it gains
PACK_FIRST = 256  # tokens of a forward that is worth packing before it


@contextmanager
def packed_weights(model):
    """Generate fast within this block: `with packed_weights(model): generate(model, ...)`.

    On a CPU, each projection gets a second copy of its weight in the order in which oneDNN reads
    it: products of few rows are then 1.3 to 3 times as fast (python -m tests.bench generate). A
    first forward of few tokens runs without, so that the first token comes as soon. Forwards
    without gradients run in inference mode, also on a GPU. A sharded model is left alone. The
    weights must not change within the block; at its end the copies are gone.
    """
    if is_sharded(model):
        yield
        return
    can_pack = is_packable(model)
    plain_forward = model.forward
    forwards = 0

    def forward(tokens, *args, **kwargs):
        nonlocal forwards, can_pack
        if torch.is_grad_enabled():
            return plain_forward(tokens, *args, **kwargs)
        forwards += 1
        if can_pack and (forwards > 1 or tokens.numel() >= PACK_FIRST):
            pack(model, len(tokens))
            can_pack = False
        with torch.inference_mode():  # 1.07 times as fast at batch 1
            return plain_forward(tokens, *args, **kwargs)

    before = model.__dict__.get("forward")  # a wrapper that somebody else has put on, or None
    model.forward = forward
    try:
        yield
    finally:
        unpack(model)
        del model.forward
        if before is not None:
            model.forward = before


def is_sharded(model):
    """Whether FSDP has put tensors of its own in place of the parameters."""
    return not all(type(parameter) is nn.Parameter for parameter in model.parameters())


def is_packable(model):
    """Whether the model lies on a CPU, is small enough, and oneDNN multiplies in its dtype."""
    if model.wte.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if sum(parameter.numel() for parameter in model.parameters()) > PACKED_AT_MOST:
        return False
    dtype = model.stream_dtype
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def pack(model, batch_size):
    """Put forwards with reordered weights on the projections and on the head, tied or not."""
    dtype = model.stream_dtype
    for module in model.blocks.modules():
        # a subclass with a forward of its own computes something else, and is left alone
        if isinstance(module, Linear) and type(module).forward is Linear.forward:
            module.forward = packed_product(module.weight, dtype, batch_size)
    model.head_product = packed_product(model.head_weight(), dtype, batch_size)


def packed_product(weight, dtype, batch_size):
    """model.linear with a reordered copy of `weight`; where gradients are on, model.linear."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), batch_size)

    def product(x, weight=weight):
        if torch.is_grad_enabled():
            return linear(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product


def unpack(model):
    """Take off what `pack` put on: the forwards of the classes show again."""
    for module in model.blocks.modules():
        if isinstance(module, Linear) and type(module).forward is Linear.forward:
            module.__dict__.pop("forward", None)
    model.head_product = linear
