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
from tqdm import tqdm

from model import at_least_float32
from scaling.ranks import rank, reduce_sum, world_size


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
    """[(batch, counts), ...]: this rank's share, batches rank, rank + world_size, ...

    All ranks get the same number of batches, because a sharded forward needs every rank. A rank
    that is one short repeats the last batch with counts=False: its results are thrown away.
    """
    rounds = -(-len(batches) // world_size())  # rounded up
    own = []
    for i in range(rounds):
        index = rank() + i * world_size()
        counts = index < len(batches)
        own.append((batches[index if counts else -1], counts))
    return own


# ---- Requests that share their beginning ---------------------------------------------------------

class Row(NamedTuple):
    """One row of a batch: ids that several requests begin with, then what is different in each."""

    shared: list  # ids
    branches: list  # (index of the request, Encoded)

    def length(self):
        """In tokens; the last id of a request is predicted and never read."""
        own = [len(request.ids) - 1 - len(self.shared) for _, request in self.branches]
        return max(1, len(self.shared) + sum(own))


def rows_of(group, max_seq_len):
    """The Rows of one question's [(index, Encoded), ...], none longer than max_seq_len."""
    inputs = [request.ids[:-1] for _, request in group]
    length = shared_length(inputs)
    rows = []
    for index, request in group:
        more = len(request.ids) - 1 - length
        if not rows or rows[-1].length() + more > max_seq_len:
            rows.append(Row(inputs[0][:length], []))
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
    batches = own_batches(length_batches(rows, batch_tokens, Row.length))
    for batch, counts in tqdm(batches, leave=False, unit="batch", disable=rank() > 0 or None):
        indices, found = score_rows(model, batch)
        if counts:
            scores.index_add_(0, indices, found)
    scores = reduce_sum(scores)  # the requests of other ranks were 0 here
    return scores[torch.tensor(first_equal, dtype=torch.int64)]


def score_rows(model, rows):
    """(indices, scores) of a batch of Rows: int64 (M,) and float64 (M, 2), for M scored ids.

    indices: the request that an id belongs to. scores: log-probability of the id in nats, and 1 if
    it is the likeliest, else 0.
    """
    device = model.wte.weight.device
    tokens, positions, branch_of, scored = lay_out(rows, model.config.pad_token_id)
    # A token sees the shared beginning (branch 0) and its own branch, up to itself.
    sees = branch_of[:, None] == branch_of[..., None]  # (B, T, T)
    sees |= branch_of[:, None] == 0
    logits = model(tokens.to(device), attn_mask=sees.tril()[:, None].to(device),
                   positions=positions.to(device), positions_wanted=scored[:, :2].to(device))
    logits = at_least_float32(logits)  # (M, V)
    targets = scored[:, 2].to(device)
    log_probs = -F.cross_entropy(logits, targets, reduction="none")
    likeliest = logits.argmax(-1) == targets
    return scored[:, 3], torch.stack((log_probs, likeliest), dim=1).cpu().double()


def lay_out(rows, pad_token_id):
    """(tokens, positions, branch_of, scored) of a batch of Rows, the longest first.

    A row is [shared, branch 1, branch 2, ...]. Each branch has the positions that it would have
    without the others. tokens, positions and branch_of (0: shared, -1: padding) are int64 (B, T).
    scored is int64 (M, 4): row and column of the logits, the target id, index of the request.
    """
    shape = (len(rows), rows[0].length())
    tokens = torch.full(shape, pad_token_id)
    positions = torch.zeros(shape, dtype=torch.int64)
    branch_of = torch.full(shape, -1)
    scored = []
    for r, row in enumerate(rows):
        shared = len(row.shared)
        tokens[r, :shared] = torch.tensor(row.shared)
        positions[r, :shared] = torch.arange(shared)
        branch_of[r, :shared] = 0
        end = shared
        for b, (index, request) in enumerate(row.branches, 1):
            own = request.ids[shared:-1]
            begin = end
            end = begin + len(own)
            tokens[r, begin:end] = torch.tensor(own)
            positions[r, begin:end] = torch.arange(shared, shared + len(own))
            branch_of[r, begin:end] = b
            for i in range(len(request.ids) - request.scored, len(request.ids)):
                # subtle: ids[i] is predicted by the column of ids[i - 1], which may be shared
                column = i - 1 if i <= shared else begin + i - 1 - shared
                scored.append((r, column, request.ids[i], index))
    return tokens, positions, branch_of, torch.tensor(scored, dtype=torch.int64).view(-1, 4)
