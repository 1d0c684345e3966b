"""Around a tuning: its base, the log-probabilities of answers, the reference's file, printing."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from configs import read_assignments
from corpus.lineage import data_of_run
from corpus.storage import held_out_files
from data import DataConfig
from model import sequence_log_probs
from scaling.ranks import rank, reduce_sum
from scaling.sharding import evaluating
from support.files import UserError, read_json
from support.records import domains_table, tasks_table
from support.scoring import length_batches, own_batches
from support.talk import harmless


# ---- The base ------------------------------------------------------------------------------------

def check_not_base(run, base):
    """UserError if run_dir is the run that is tuned, which --overwrite would delete."""
    if run.resolve() in (base.home.resolve(), base.weights.resolve()):
        raise UserError(f"run_dir={run}: it is the run that is tuned; choose another --run_dir")


def held_out_of_base(base):
    """{source: file} of the text that the base's pretraining held out; {} for others' models."""
    if not (base.home / "manifest.json").is_file():
        return {}
    return held_out_files(data_of_run(base.home, DataConfig(**base.settings)))


def refuse_derived(argv, derived):
    """UserError for a key of `derived` on the command line; a config file may name it, unused."""
    # 1. the command line
    given = [word for word in argv if word.removeprefix("--").partition("=")[0] in derived]
    if given:
        raise UserError(f"{' '.join(given)}: here it follows from --epochs and --warmup_share; set "
                        "those, such as --epochs=0.1")
    # 2. config files, which other commands may share
    for word in argv:
        if not word.endswith(".py") or not Path(word).is_file():
            continue
        for line, key, _ in read_assignments(Path(word)):
            if key in derived:
                print(f"{word}:{line}: {key} is not used; epochs and warmup_share set it")


# ---- Answers -------------------------------------------------------------------------------------

def completion_log_probs(model, sequences, batch_tokens):
    """Float64 (N, 2): log-probability in nats of each Example's trained tokens, and their number.

    The ranks share the forwards; every rank gets all rows.
    """
    found = torch.zeros(len(sequences), 2, dtype=torch.float64)
    numbers = range(len(sequences))
    batches = length_batches(numbers, batch_tokens, lambda i: len(sequences[i].ids))
    own = own_batches(batches)
    disable = True if rank() > 0 else None  # None: silent too where there is no terminal
    with evaluating(model):
        for numbers, counts in tqdm(own, unit="batch", leave=False, disable=disable):
            examples = [sequences[i] for i in numbers]
            log_probs = log_probs_of_batch(model, examples)
            if counts:
                found[numbers] = log_probs
    return reduce_sum(found)


def log_probs_of_batch(model, examples):
    """The rows of `completion_log_probs` for some Examples, in one forward."""
    ids = [torch.from_numpy(example.ids).long() for example in examples]
    trained = [torch.from_numpy(example.trained) for example in examples]
    # causal attention never sees the padding on the right, so no mask is needed
    ids = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    trained = pad_sequence(trained, batch_first=True, padding_value=False)
    # a target is the next id; the first id, EOS in place of BOS, is never trained
    targets = ids.roll(-1, dims=1)
    loss_mask = trained.roll(-1, dims=1)
    device = model.wte.weight.device
    token_losses = model(ids.to(device), targets=targets.to(device))
    log_probs, counts = sequence_log_probs(token_losses, loss_mask.to(device))
    return torch.stack([log_probs, counts], dim=1).cpu().double()


def held_out_prompts(sequences, max_seq_len, at_most):
    """Up to `at_most` different prompts, as ids, from all over a set of Examples."""
    prompts = []
    for example in sequences:
        if example.prompt < max_seq_len:  # or no token of an answer would fit
            prompts.append(tuple(example.ids[:example.prompt].tolist()))
    prompts = list(dict.fromkeys(prompts))
    if not prompts or not at_most:
        return []
    return prompts[::math.ceil(len(prompts) / at_most)]


def mean_and_error(sums, counts):
    """Returns (mean, error): total of sums / total of counts, (N,) each, and its standard error.

    The N examples were drawn, not their tokens, so the error is that of a ratio of two totals.
    """
    n = len(sums)
    total = counts.sum().item()
    mean = sums.sum().item() / total
    residuals = sums - mean * counts
    squares = residuals.square().sum().item()
    variance = squares * n / max(1, n - 1)
    return mean, math.sqrt(variance) / total


# ---- The reference's file ------------------------------------------------------------------------

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


# ---- What is printed -----------------------------------------------------------------------------

def print_set(key, path, kind, sequences, examples, counts):
    """A line on a set that was read: its size, what of it is trained, what was cut or dropped."""
    tokens = sum(len(sequence.ids) for sequence in sequences)
    trained = sum(int(sequence.trained.sum()) for sequence in sequences)
    line = (f"{key}={path}: {examples:,} {kind} of {tokens:,} tokens, {trained / tokens:.0%} of "
            "them in answers")
    for what, count in counts.items():
        if count:
            line += f"; {count:,} {what}"
    print(line)


def print_run(run, base, adapt_config, config, micro_batch_size):
    kind, rows = "chats", "packed rows"
    if adapt_config.method == "dpo":
        kind, rows = "pairs", "pairs"
    print(f"run: {run}, {adapt_config.method} of {base.weights}, {config.max_steps:,} steps of "
          f"{config.batch_size} {kind}, {micro_batch_size} {rows} at a time")


def print_results(run, step, results):
    if results["sums"]:
        print(f"\nheld-out text after step {step}:\n{domains_table(results['sums'])}")
    if results["tasks"]:
        print(tasks_table(results["tasks"]))
    for text in results.get("samples", []):
        print(f"\n{harmless(text)}")
    print(f"\nnext:\n  python adapt.py chat {run}")
    if (run / "manifest.json").is_file():  # it says which text was held out
        print(f"  python eval.py {run}")
