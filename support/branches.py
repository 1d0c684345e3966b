"""Attention and head for requests that share their beginning. Speed only: support/scoring.py.

A row is a beginning and the branches that continue it. The tokens of a batch of rows lie one after
another without padding, so projections read real tokens alone. A token sees the beginning of its
row and its own branch, up to itself.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import at_least_float32, head_logits, rope_table

CHUNK = 2**20  # logits computed at a time: 4 MB of float32 stay in a core's cache
PADDING = 1.1  # attention scores that a Bucket computes, times those that count; and
SPARE = 2**13  # as many more, which take as long as one more call


class Segment(NamedTuple):
    """Consecutive tokens of a batch that see themselves, causally, and all of a beginning."""

    begin: int  # its first column
    length: int
    before: int = 0  # the first column of the beginning
    before_length: int = 0  # 0: there is none


@dataclass
class Bucket:
    """Segments of similar lengths, whose attention is one call."""

    queries: torch.Tensor  # (N, L) int64: the columns of each segment, padded on the right
    keys: torch.Tensor  # (N, S + L) int64: the columns of its beginning and its own
    mask: torch.Tensor | None  # (1, N, L, S + L): 0 where a query may look, else -inf; None: causal


@dataclass
class Tree:
    """Which of the T tokens of a batch see which: the attn_mask of `tree_attention`."""

    buckets: list
    place: torch.Tensor  # (T,) int64: where each column lies among the queries of all buckets


# ---- The layout of a batch -----------------------------------------------------------------------

def tree_of(segments, device, dtype):
    """The Tree of Segments that fill the columns 0 to T - 1; dtype: that of the queries."""
    buckets = []
    columns = []  # of the queries that are no padding
    cells = []  # their numbers among all queries
    count = 0
    for part in similar(segments):
        begin, length, before, before_length = torch.tensor(part)[..., None].unbind(1)  # (N, 1)
        own, is_own = columns_of(begin, length)
        beginning, is_beginning = columns_of(before, before_length)
        mask = None
        if beginning.numel():
            mask = mask_of(is_beginning, own.shape[1], dtype).to(device)
        keys = torch.cat((beginning, own), dim=1)
        buckets.append(Bucket(own.to(device), keys.to(device), mask))
        columns.append(own[is_own])
        cells.append(is_own.flatten().nonzero()[:, 0] + count)
        count += own.numel()
    columns = torch.cat(columns)
    place = torch.empty_like(columns)
    place[columns] = torch.cat(cells)
    return Tree(buckets, place.to(device))


def mask_of(is_beginning, L, dtype):
    """The mask (1, N, L, S + L) of segments of L tokens with beginnings: bool (N, S)."""
    N = len(is_beginning)
    later = torch.ones(L, L, dtype=torch.bool).triu(1)
    hidden = torch.cat((~is_beginning[:, None].expand(N, L, -1), later.expand(N, L, L)), dim=2)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)[None]


def columns_of(begin, length):
    """(columns, is_real) of segments: int64 and bool, (N, longest)."""
    offsets = torch.arange(length.max())
    is_real = offsets < length
    return (begin + offsets).where(is_real, 0), is_real  # padding reads column 0, and is dropped


def similar(segments):
    """Yields lists of Segments that waste little of the attention's work on padding."""
    part = []
    needed = 0
    L = 0  # the longest of the part; its first Segment has the longest beginning
    for segment in sorted(segments, key=lambda segment: (-segment.before_length, -segment.length)):
        own = scores_in(1, segment.before_length, segment.length)
        L = max(L, segment.length)
        if part and (scores_in(len(part) + 1, part[0].before_length, L)
                     > PADDING * (needed + own) + SPARE):
            yield part
            part = []
            needed = 0
            L = segment.length
        part.append(segment)
        needed += own
    yield part


def scores_in(N, S, L):
    """How many scores a Bucket has: of N Segments of L tokens each, after S of a beginning."""
    return N * L * (S + L if S else (L + 1) // 2)


# ---- What the model computes ---------------------------------------------------------------------

def tree_attention(q, k, v, tree, is_causal=False):
    """As F.scaled_dot_product_attention with a Tree for its mask: (1, H, T, K) each."""
    def pick(x, columns):
        return x.index_select(1, columns.flatten()).unflatten(1, columns.shape)

    q = q[0]
    k = k[0]
    v = v[0].contiguous()  # else each pick would copy all of it
    parts = []  # (H, N L, K) each
    for bucket in tree.buckets:
        y = F.scaled_dot_product_attention(
            pick(q, bucket.queries), pick(k, bucket.keys), pick(v, bucket.keys), bucket.mask,
            is_causal=bucket.mask is None)  # (H, N, L, K)
        parts.append(y.flatten(1, 2))
    return torch.cat(parts, dim=1).index_select(1, tree.place)[None]


def rotate(x, cos, sin):
    """As model.apply_rope, in fewer passes over the memory; for forwards without gradients."""
    full = at_least_float32(x)
    first, second = full.chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=full.dtype, device=x.device)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=turned_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=turned_second).addcmul_(first, sin)
    return turned.to(x.dtype)


def turns_alike(attention, head_dim):
    """Whether `rotate` computes what an Attention's own does: a fork may turn differently."""
    device = attention.att_proj.weight.device
    x = torch.arange(2.0 * head_dim, device=device).view(1, 1, 2, head_dim)
    cos, sin = rope_table(torch.tensor([1, 2], device=device), head_dim, 10000.0)
    own = attention.rotate(x, cos, sin)
    return cos.shape == (2, head_dim // 2) and torch.allclose(rotate(x, cos, sin), own)


def scores_of(x, head_weight, targets, product):
    """float32 (M, 2) of a stream x (M, D): ln p of each target, and whether it is the likeliest."""
    step = max(1, CHUNK // len(head_weight))
    parts = []
    for begin in range(0, len(x), step):
        logits = at_least_float32(head_logits(x[begin:begin + step], head_weight, product))
        wanted = targets[begin:begin + step, None]
        log_probs = logits.log_softmax(-1).gather(1, wanted)
        parts.append(torch.cat((log_probs, are_likeliest(logits, wanted)), dim=1))
    return torch.cat(parts)


def are_likeliest(logits, targets):
    """bool (M, 1): whether targets (M, 1) are the argmax of logits (M, V)."""
    if logits.device.type != "cpu":
        return logits.argmax(-1, keepdim=True) == targets
    # A CPU finds the maximum in a tenth of the time of its place. Only of several equal logits,
    # common in bfloat16, the place tells which is the first.
    likeliest = logits.gather(1, targets) == logits.amax(-1, keepdim=True)
    rows = likeliest[:, 0].nonzero()[:, 0]
    likeliest[rows] = logits[rows].argmax(-1, keepdim=True) == targets[rows]
    return likeliest


@contextmanager
def branching(model):
    """Within this block the model takes a Tree as attn_mask and returns `scores_of` its targets."""
    before = [(block.attn.rotate, block.attn.attend) for block in model.blocks]
    token_losses = model.token_losses
    for block in model.blocks:
        if turns_alike(block.attn, model.config.head_dim):
            block.attn.rotate = rotate
        block.attn.attend = tree_attention
    model.token_losses = lambda *words: scores_of(*words, model.head_product)
    try:
        yield
    finally:
        for block, functions in zip(model.blocks, before, strict=True):
            block.attn.rotate, block.attn.attend = functions
        model.token_losses = token_losses
