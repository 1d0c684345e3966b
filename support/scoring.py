"""Speed only: many requests in few forward passes, shared by all ranks.

The scores are those of `eval.score_request`, which takes one request at a time; a test compares
the two. A reader who skips this file loses nothing of the recipe. Three things save time:
- `length_batches` puts rows of similar length together, so that little is padding;
- `own_batches` gives each rank its share of the batches;
- `score_requests` computes what the choices of a question have in common only once, and no padding.
"""

from typing import NamedTuple

import torch

from scaling.ranks import rank, reduce_sum, world_size
from support.branches import Segment, branching, tree_of
from support.progress import watched


# ---- Batches -------------------------------------------------------------------------------------

def length_batches(rows, batch_tokens, length):
    """[[row, ...], ...]: the rows sorted by `length(row)`, longest first, and cut into batches.

    Each batch holds at most `batch_tokens` tokens when padded to its first row, or a single row.
    """
    rows = sorted(rows, key=length, reverse=True)
    batches = []
    begin = 0
    while begin < len(rows):
        count = max(1, batch_tokens // length(rows[begin]))
        batches.append(rows[begin:begin + count])
        begin += count
    return batches


def own_batches(batches):
    """Yields (batch, counts): this rank's share, batches rank, rank + world_size, ...

    All ranks get the same number of batches, because a sharded forward needs every rank. A rank
    that is one short repeats the last batch with counts=False: its results are thrown away.
    """
    own = []
    for first in range(0, len(batches), world_size()):  # batches first, first + 1, ... run together
        index = first + rank()
        if index < len(batches):
            own.append((batches[index], True))
        else:
            own.append((batches[-1], False))
    yield from watched(own, "batch")


def padded(lists, value):
    """(B, T) int64 tensor of lists of ids, filled up with `value` on the right; T is at least 1."""
    longest = max(1, *map(len, lists))
    rows = []
    for ids in lists:
        padding = [value] * (longest - len(ids))
        rows.append(ids + padding)
    return torch.tensor(rows)


# ---- Requests that share their beginning ---------------------------------------------------------

class Row(NamedTuple):
    """Requests with a common beginning, which the model reads once."""

    shared: tuple  # the ids that they begin with
    branches: list  # (index of the request, Encoded)

    def own_length(self, branch):
        """Tokens that the model reads of a branch; the last id of a request is only predicted."""
        _, request = branch
        return len(request.ids) - 1 - len(self.shared)


@torch.no_grad()
def score_requests(model, groups, batch_tokens=2048):
    """(N, 2) float64: log-probability of each continuation in nats, and how many of its ids are
    the likeliest ones.

    groups: lists of Encoded, such as the choices of a question; N counts the requests of all
    groups, in order. Equal requests of a group are scored once, so that they tie exactly. The ranks
    share the work, and every rank returns all scores.
    """
    rows, first_equal = rows_of(groups)
    scores = torch.zeros(len(first_equal), 2, dtype=torch.float64)
    with branching(model):
        for batch, counts in own_batches(row_batches(rows, batch_tokens)):
            indices, found = score_rows(model, batch)
            if counts:
                scores.index_add_(0, indices, found)  # a request's score is the sum over its ids
    scores = reduce_sum(scores)  # the requests of other ranks were 0 here
    return scores[torch.tensor(first_equal, dtype=torch.int64)]


def rows_of(groups):
    """(rows, first_equal) of groups of Encoded: [Row], and for each request the index of the first
    one of its group that equals it. Groups that begin alike share a row.
    """
    rows = {}  # {shared: Row}; most unconditional requests share the context "Answer:"
    first_equal = []
    for group in groups:
        distinct = {}
        for request in group:
            key = (*request.ids, request.scored)
            index, _ = distinct.setdefault(key, (len(first_equal), request))
            first_equal.append(index)
        # what has no id to score is 0, and is not computed
        branches = [branch for branch in distinct.values() if branch[1].scored]
        length = shared_length([request.ids[:-1] for _, request in branches])
        for index, request in branches:
            shared = tuple(request.ids[:length])
            rows.setdefault(shared, Row(shared, [])).branches.append((index, request))
    return list(rows.values()), first_equal


def shared_length(inputs):
    """How many ids all the lists in `inputs` begin with."""
    for i, ids in enumerate(zip(*inputs, strict=False)):
        if len(set(ids)) > 1:
            return i
    return min(map(len, inputs), default=0)


def row_batches(rows, batch_tokens):
    """[[Row, ...], ...]: batches of at most `batch_tokens` tokens, or of a single branch.

    A Row that does not fit is cut; each part reads the shared ids itself. Neighbours have similar
    lengths, so that attention has little padding.
    """
    for row in rows:
        row.branches.sort(key=row.own_length, reverse=True)
    longest_first = sorted(rows, reverse=True,
                           key=lambda row: (len(row.shared), row.own_length(row.branches[0])))
    batches = []
    room = -1
    for row in longest_first:
        part = None  # of this row, in the last batch
        for branch in row.branches:
            length = row.own_length(branch)
            if room < length + (0 if part else len(row.shared)):
                batches.append([])
                room = batch_tokens
                part = None
            if part is None:
                part = Row(row.shared, [])
                batches[-1].append(part)
                room -= len(row.shared)
            part.branches.append(branch)
            room -= length
    return batches


def score_rows(model, rows):
    """(indices, scores) of a batch of Rows: int64 (M,) and float64 (M, 2), for M scored ids.

    indices: the request that an id belongs to. scores: log-probability of the id in nats, and 1 if
    it is the likeliest id, else 0.
    """
    device = model.wte.weight.device
    tokens, positions, scored, segments = lay_out(rows)
    columns, targets, indices = scored.unbind(dim=1)
    cells = torch.stack((torch.zeros_like(columns), columns), dim=1)
    scores = model(tokens.to(device),
                   targets=targets.to(device),
                   attn_mask=tree_of(segments, device, model.stream_dtype),
                   positions=positions.to(device),
                   positions_wanted=cells.to(device))  # the head is computed there alone
    return indices, scores.cpu().double()


def lay_out(rows):
    """(tokens, positions, scored, segments) of a batch of Rows, one after another without padding.

    A row is shared, branch 1, branch 2, ...; each branch has the positions that it would have
    without the others. tokens and positions are int64 (1, T). scored is int64 (M, 3): column of the
    logits, the target id, index of the request.
    """
    tokens = []
    positions = []
    scored = []
    segments = []
    for shared, branches in rows:
        start = len(tokens)
        n = len(shared)
        if n:
            segments.append(Segment(start, n))
        tokens += shared
        positions += range(n)
        for index, request in branches:
            begin = len(tokens)
            own = request.ids[n:-1]
            tokens += own
            positions += range(n, n + len(own))
            if own:
                segments.append(Segment(begin, len(own), start, n))
            # The column of ids[i] predicts ids[i + 1].
            first = len(request.ids) - 1 - request.scored
            columns = [*range(start + first, start + n),
                       *range(begin + max(0, first - n), len(tokens))]
            scored += zip(columns, request.ids[first + 1:], [index] * len(columns), strict=True)
    return (torch.tensor([tokens], dtype=torch.int64),
            torch.tensor([positions], dtype=torch.int64),
            torch.tensor(scored, dtype=torch.int64).view(-1, 3),
            segments)
