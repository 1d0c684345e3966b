"""Speed only: many requests in few forward passes, shared by all ranks.

The scores are those of `eval.score_request`, which takes one request at a time; a test compares
the two. A reader who skips this file loses nothing of the recipe. Three things save time:
- `length_batches` puts rows of similar length together, so that little is padding;
- `own_batches` gives each rank its share of the batches;
- `score_requests` computes what the choices of a question have in common only once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import at_least_float32
from scaling.ranks import rank, reduce_sum, world_size
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
    """One row of a batch: ids that several requests begin with, then what is different in each."""

    shared: list  # ids
    branches: list  # (index of the request, Encoded)

    def length(self):
        """Tokens that the model reads, at least 1; the last id of a request is only predicted."""
        length = len(self.shared)
        for _, request in self.branches:
            length += len(request.ids) - 1 - len(self.shared)
        return max(1, length)


def rows_of(group, max_seq_len):
    """The Rows of one question's [(index, Encoded), ...], none longer than max_seq_len."""
    inputs = [request.ids[:-1] for _, request in group]
    shared = shared_length(inputs)
    rows = []
    for index, request in group:
        own_length = len(request.ids) - 1 - shared
        if not rows or rows[-1].length() + own_length > max_seq_len:
            rows.append(Row(request.ids[:shared], []))  # the first row, or the last one is full
        rows[-1].branches.append((index, request))
    return rows


def shared_length(inputs):
    """How many ids all the lists in `inputs` begin with."""
    for i, ids in enumerate(zip(*inputs, strict=False)):
        if len(set(ids)) > 1:
            return i
    return min(map(len, inputs), default=0)


@torch.no_grad()
def score_requests(model, groups, batch_tokens=2048):
    """(N, 2) float64: log-probability of each continuation in nats, and how many of its ids are
    the likeliest ones.

    groups: lists of Encoded, such as the choices of a question; N counts the requests of all
    groups, in order. Equal requests of a group are scored once, so that they tie exactly. The ranks
    share the work, and every rank returns all scores.
    """
    rows = []
    first_equal = []  # for each request, the index of the first one of its group that equals it
    for group in groups:
        distinct = {}
        for request in group:
            key = (*request.ids, request.scored)
            index, _ = distinct.setdefault(key, (len(first_equal), request))
            first_equal.append(index)
        rows += rows_of(list(distinct.values()), model.config.max_seq_len)

    scores = torch.zeros(len(first_equal), 2, dtype=torch.float64)
    batches = length_batches(rows, batch_tokens, Row.length)
    for batch, counts in own_batches(batches):
        indices, found = score_rows(model, batch)
        if counts:
            scores.index_add_(0, indices, found)  # a request's score is the sum over its ids
    scores = reduce_sum(scores)  # the requests of other ranks were 0 here
    return scores[torch.tensor(first_equal, dtype=torch.int64)]


def score_rows(model, rows):
    """(indices, scores) of a batch of Rows: int64 (M,) and float64 (M, 2), for M scored ids.

    indices: the request that an id belongs to. scores: log-probability of the id in nats, and 1 if
    it is the likeliest id, else 0.
    """
    device = model.wte.weight.device
    tokens, positions, branch_of, scored = lay_out(rows, model.config.pad_token_id)
    cells, targets, indices = scored.split((2, 1, 1), dim=1)
    # A token sees the shared beginning (branch 0) and its own branch, up to itself.
    sees = branch_of[:, None] == branch_of[..., None]  # (B, T, T)
    sees |= branch_of[:, None] == 0
    sees = sees.tril()[:, None]  # (B, 1, T, T), for all heads
    logits = model(tokens.to(device),
                   attn_mask=sees.to(device),
                   positions=positions.to(device),
                   positions_wanted=cells.to(device))  # the head is computed there alone
    logits = at_least_float32(logits)  # (M, V)
    targets = targets[:, 0].to(device)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    likeliest = logits.argmax(-1) == targets
    scores = torch.stack((log_probs, likeliest), dim=1)
    return indices[:, 0], scores.cpu().double()


def lay_out(rows, pad_token_id):
    """(tokens, positions, branch_of, scored) of a batch of Rows.

    A row is [shared, branch 1, branch 2, ...]; each branch has the positions that it would have
    without the others. tokens, positions and branch_of (0: shared, -1: padding) are int64 (B, T).
    scored is int64 (M, 4): row and column of the logits, the target id, index of the request.
    """
    tokens = []
    positions = []
    branch_of = []
    scored = []
    for r, row in enumerate(rows):
        shared = len(row.shared)
        tokens.append(list(row.shared))
        positions.append(list(range(shared)))
        branch_of.append([0] * shared)
        for branch, (index, request) in enumerate(row.branches, 1):
            own = request.ids[shared:-1]
            begin = len(tokens[r])
            tokens[r] += own
            positions[r] += range(shared, shared + len(own))
            branch_of[r] += [branch] * len(own)
            # The column of ids[i] predicts ids[i + 1].
            columns = [*range(shared), *range(begin, len(tokens[r]))]
            first = len(columns) - request.scored
            for i in range(first, len(columns)):
                scored.append((r, columns[i], request.ids[i + 1], index))
    return (padded(tokens, pad_token_id),
            padded(positions, 0),
            padded(branch_of, -1),
            torch.tensor(scored, dtype=torch.int64).view(-1, 4))
