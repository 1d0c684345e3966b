"""A tuned run: its base, the file of DPO's reference, and what is printed."""

import hashlib
import json
from pathlib import Path

import numpy as np

from configs import read_assignments
from corpus.lineage import data_of_run
from corpus.storage import held_out_files
from data import DataConfig
from support.files import UserError, read_json
from support.records import domains_table, tasks_table
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
    given = [word for word in argv if word.removeprefix("--").partition("=")[0] in derived]
    if given:
        raise UserError(f"{' '.join(given)}: here it follows from --epochs and --warmup_share; set "
                        "those, such as --epochs=0.1")
    for word in argv:
        if not word.endswith(".py") or not Path(word).is_file():
            continue
        for line, key, _ in read_assignments(Path(word)):
            if key in derived:
                print(f"{word}:{line}: {key} is not used; epochs and warmup_share set it")


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
