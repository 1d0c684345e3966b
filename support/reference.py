"""DPO's reference: the log-probabilities of all answers, computed once and kept in a file."""

import hashlib
import json
from functools import partial

import numpy as np

from scaling.ranks import on_rank0
from support.rows import sequences_of
from support.files import UserError, read_json, write_json
from support.held_out import completion_log_probs
from support.models import fill_weights
from support.progress import progress


def reference_log_probs(run, base, model, sets, method, batch_tokens):
    """The reference's log-probabilities of chosen and rejected answers: float64 (N, 2) per set.

    For SFT, which has no reference, None per set. They are computed once and written to a file of
    the run, from which a resumed run reads them. UserError if a number is missing there. The
    model of a new run must hold the base's weights.
    """
    if method == "sft":
        return [None] * len(sets)
    # The reference never changes, so two numbers per pair are all that we need from it. They are
    # computed before the first step, and no second model has to stay in memory.
    file = reference_file(run.path, run.state["data"], model.compute_dtype)
    if not on_rank0(file.is_file):
        if run.checkpoint:  # a resumed run whose file is gone; a new run's model is the base
            fill_weights(model, base)
        tables = [answer_log_probs(model, pairs, batch_tokens).tolist() for pairs in sets]
        on_rank0(partial(write_json, file, {"log_probs": tables}))
    return read_reference(file, [len(pairs) for pairs in sets])


def answer_log_probs(model, pairs, batch_tokens):
    """Float64 (N, 2): the log-probabilities of the chosen and the rejected answer of each Pair."""
    progress.begin("answers of the reference")
    found = completion_log_probs(model, sequences_of(pairs), batch_tokens)
    progress.begin("")
    log_probs, _ = found.T
    return log_probs.view(2, len(pairs)).T


# ---- The file ------------------------------------------------------------------------------------

def reference_file(run, fingerprint, dtype):
    """Where the reference's log-probabilities lie; the name depends on weights, data and dtype."""
    key = json.dumps([fingerprint["base_sha256"], fingerprint["data_sha256"], str(dtype)])
    return run / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def read_reference(file, sizes):
    """The tables of the file, float64 (N, 2) each; UserError unless they have these sizes."""
    tables = []
    for rows in read_json(file).get("log_probs", []):
        tables.append(np.array(rows, np.float64).reshape(-1, 2))
    complete = [len(table) for table in tables] == list(sizes)
    # subtle: a pair that was never computed must stop the run, not train towards a made-up number
    if not complete or not np.isfinite(np.concatenate(tables)).all():
        raise UserError(f"{file}: log_probs does not hold finite numbers for {sum(sizes):,} pairs; "
                        "delete the file, and they are computed again")
    return tables
