"""A GPU's fast path for packed rows, put on the network from outside: attention that skips what
other documents hold. It computes what a dense mask does, up to rounding.
"""

import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def use_flex_attention(model):
    """Let packed rows go through flex attention, a kernel that torch.compile makes of their mask.

    SDPA with a dense mask computes all scores, and reads T x T booleans. Call this before the
    blocks are compiled: without a compiler flex attention is slow.
    """
    for block in model.blocks:
        block.attn.attend = flex_or_sdpa
    model.packed_mask = block_mask


def flex_or_sdpa(q, k, v, attn_mask=None, is_causal=False):
    """As F.scaled_dot_product_attention; attn_mask may also be a BlockMask."""
    if isinstance(attn_mask, BlockMask):
        return flex_attention(q, k, v, block_mask=attn_mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal)


def block_mask(seen_until):
    """The mask of packed rows by blocks of 128 x 128 tokens, made on the GPU; nobody waits for it.

    seen_until: int32 (B, T), as support/packing.py has it.
    """
    B, T = seen_until.shape

    def sees(row, head, query, key):
        return (key <= query) & (query < seen_until[row, key])
    return create_block_mask(sees, B, None, T, T, device=seen_until.device)
