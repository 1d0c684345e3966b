"""The run directory: one process group at a time writes it; a run in it is new or continues.

    config.json  tokenizer.json  manifest.json      what the run is made of
    metrics.jsonl  eval.jsonl  report.html          what was measured
    step000500/                                     checkpoints (scaling/checkpoint.py)
    .lock                                           held by the process that trains there
"""

import os
import shutil
import socket
from pathlib import Path

from configs import flat
from scaling.checkpoint import Unreadable, newest_step, step_directories, step_of, verify_step
from scaling.ranks import gather, rank
from support.files import UserError, log_rows, read_json, write_json
from support.lock import Lock

# Keys that say what to do this time, not what the run is. They are not saved.
NOT_SAVED = {"resume", "overwrite", "accept_changes", "stop_after_minutes", "tensorboard", "verify"}

# Keys that may change when a run continues: they do not change what is learned from a batch. The
# keys of EvalConfig and all *_every_steps and keep_* are free as well.
MAY_CHANGE = {"run_dir", "max_steps", "device", "dtype", "compile", "micro_batch_size", "workers",
              "shard", "activation_checkpointing", "reduce_every_micro_batch", "not_finite",
              "save_every_minutes", "watts", "pue", "kg_co2_per_kwh"}

MEASURED = ("eval.jsonl", "report.html")  # what eval.py writes about a run
NEW_STATE = {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}

# After a node dies, a network disk may hold its lock for a minute or two; torchrun's restart waits.
RESTART_PATIENCE_S = 150


# ---- Holding it ----------------------------------------------------------------------------------

def lock_directory(run):
    """On rank 0: make the run directory and lock it; UserError if another process trains there."""
    patience = RESTART_PATIENCE_S if "TORCHELASTIC_RUN_ID" in os.environ else 0
    try:
        run.mkdir(parents=True, exist_ok=True)
        return Lock(run / ".lock", patience)
    except OSError as error:
        raise UserError(f"run_dir={run}: cannot be made or locked ({error})") from None


def check_shared(run, lock_text):
    """UserError if a rank sees another directory under this name, such as its node's own disk."""
    # subtle: rank 0 must not open the lock file again, because closing it would unlock it
    lock = run / ".lock"
    is_shared = rank() == 0 or (lock.is_file() and lock.read_text() == lock_text)
    hosts = gather("" if is_shared else socket.gethostname())
    strangers = sorted(set(hosts) - {""})
    if strangers:
        raise UserError(f"run_dir={run} is another directory on {', '.join(strangers)}; name one "
                        "on a disk that all nodes share")


# ---- New, or continued ---------------------------------------------------------------------------

def find_start(config, settings, fingerprint, free_keys):
    """On rank 0: returns (step directory to load or None, state after it) for the run of `config`.

    That is the newest undamaged step of the run. For a new run it is the step that start_from
    names, or nothing. settings: every key of the run; fingerprint: what identifies its data;
    free_keys: keys that may change besides MAY_CHANGE. Raises UserError that names each key, or
    part of the data, that differs from the saved run.
    """
    run = Path(config.run_dir)
    if config.overwrite:
        overwrite(run, config.start_from)
    for leftover in run.glob("step*.tmp"):  # a crash cut it off while it was written
        shutil.rmtree(leftover)
    if not step_directories(run):
        for name in MEASURED:  # they belong to a run that was here before
            (run / name).unlink(missing_ok=True)
        return start_new(config, fingerprint)
    try:
        step, saved = newest_step(run, config.verify == "sha256")
    except Unreadable:
        raise
    except UserError as error:
        raise UserError(f"{error}; --overwrite starts the run again from step 1") from None
    check_settings(run, saved, settings, config, free_keys)
    check_data(run, saved, fingerprint, config)
    set_aside(run, step)
    return step, continued_state(saved, fingerprint)


def overwrite(run, start_from):
    """Delete the run, unless that would delete more than the user means."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise UserError("--overwrite with --max-restarts would delete the run at each restart; "
                        "leave out one of them")
    if start_from and Path(start_from).resolve().parent == run.resolve():
        raise UserError(f"--overwrite would delete {start_from}, which start_from names; choose "
                        "another --run_dir")
    clear(run)


def clear(run):
    """Delete what a run writes, and nothing else that may lie in its directory."""
    folders = [*step_directories(run)]
    for pattern in ("step*.tmp", "damaged-step*", "unread-step*", "tensorboard"):
        folders += run.glob(pattern)
    for folder in folders:
        shutil.rmtree(folder)
    for file in run.glob("reference-*.json"):
        file.unlink()
    for name in ("config.json", "tokenizer.json", "manifest.json", "metrics.jsonl", *MEASURED):
        (run / name).unlink(missing_ok=True)


def start_new(config, fingerprint):
    """Returns (step directory or None, state) of a run that has no step yet."""
    if not config.start_from:
        return None, dict(NEW_STATE)
    start = Path(config.start_from)
    saved = verify_step(start, config.verify == "sha256")
    check_data(start, saved, fingerprint, config)
    return start, {**NEW_STATE, "step": saved["step"], "tokens": saved["tokens"]}


def continued_state(saved, fingerprint):
    """The state of a run that goes on from `saved`."""
    state = {key: saved.get(key, new) for key, new in NEW_STATE.items()}
    earlier_data = list(saved.get("earlier_data", []))
    before = saved["data"]["data_sha256"]
    if before != fingerprint["data_sha256"]:
        earlier_data.append(before)  # for eval.py: what the run was trained on until here
    return {**state, "earlier_data": earlier_data, "config": saved["config"]}


def check_settings(place, saved, settings, config, free_keys):
    """UserError for settings that differ from a saved run's; a printed line with accept_changes."""
    before = saved["config"]
    changes = [f"{key}: {before[key]} there, {value} now" for key, value in settings.items()
               if key in before and before[key] != value and not may_change(key, free_keys)]
    accept(changes, config, f"{place}: continues with changes: ", f"{place}: holds another run",
           "choose another --run_dir, or use --overwrite or --accept_changes")


def may_change(key, free_keys):
    """True if a run may continue with another value of this key."""
    by_pattern = key.endswith("_every_steps") or key.startswith("keep_")
    return by_pattern or key in MAY_CHANGE or key in free_keys


def check_data(place, saved, fingerprint, config):
    """UserError for data that differs from a saved run's; a printed line with accept_changes."""
    changes = [f"{key}: {saved['data'].get(key)} there, {value} now"
               for key, value in fingerprint.items() if saved["data"].get(key) != value]
    accept(changes, config, f"{place}: continues with changed data: ",
           f"{place}: its data has changed",
           "restore the data, or use --overwrite or --accept_changes")


def accept(changes, config, accepted, refused, remedy):
    """Print the changes with --accept_changes; else UserError if there are any."""
    if changes and config.accept_changes:
        print(accepted + "; ".join(changes))
    elif changes:
        raise UserError(f"{refused} ({'; '.join(changes)}); {remedy}")


def set_aside(run, step):
    """Rename the steps after `step`, which were passed over: the run will save them again."""
    for path in step_directories(run):
        if step_of(path) > step_of(step):
            aside = run / f"unread-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path}: kept as {aside.name}, because the run takes these steps again")


def lacks_evaluation(run, step):
    """True if the log reaches `step` but has no evaluation of it: the run stopped between saving
    and evaluating.
    """
    rows = list(log_rows(run))
    last = max((row["step"] for row in rows), default=0)
    is_evaluated = any(row["kind"] == "eval" and row["step"] == step for row in rows)
    return 0 < step <= last and not is_evaluated


# ---- Describing it -------------------------------------------------------------------------------

def describe(run, settings, folder, **facts):
    """On rank 0: write config.json, tokenizer.json and manifest.json into the run directory.

    folder: holds the data's tokenizer and manifest, or is a Hugging Face directory without a
    manifest. facts: what else manifest.json is to say.
    """
    write_json(run / "config.json", settings)
    shutil.copyfile(folder / "tokenizer.json", run / "tokenizer.json")
    if (folder / "manifest.json").is_file():
        write_json(run / "manifest.json", {**read_json(folder / "manifest.json"), **facts})


def saved_settings(*configs):
    """{key: value} of all that describes the run, as config.json saves it."""
    return {key: value for key, value in flat(*configs).items() if key not in NOT_SAVED}


def resumed_argv(argv, file, is_tuned):
    """argv with the config of the run that --resume names; UserError if `file` did not make it."""
    for word in reversed(argv):  # the last one counts, as for every option
        if word.startswith("--resume="):
            run = Path(word.removeprefix("--resume="))
            saved = run / "config.json"
            if not saved.is_file():
                raise UserError(f"--resume={run}: no run there; python {file} CONFIG starts one")
            if ("method" in read_json(saved)) != is_tuned:
                other = "train.py" if is_tuned else "adapt.py"
                raise UserError(f"--resume={run}: {other} made this run; use python {other} {word}")
            return [str(saved), f"--run_dir={run}", *argv]
    return argv
