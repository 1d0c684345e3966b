"""What a run goes on from: its own newest step, another run's, or nothing.

    python train.py CONFIG                          a new run, or run_dir's newest step
    python train.py --resume=RUN                    RUN's newest step
    python train.py --resume=OLD --run_dir=NEW      a fork: NEW's newest step, at first OLD's
    python train.py CONFIG --start_from=RUN/step... an anneal: that step, with a schedule of its own
    python train.py CONFIG --start_from=DIRECTORY   a new run with its weights (scaling/begin.py)

With which data, scaling/run_data.py decides.
"""

import shutil
from pathlib import Path

from corpus.stages import written_aside
from corpus.storage import tokenizer_digest
from scaling.begin import is_whole_official, takes_step
from scaling.checkpoint import (Unreadable, run_of, step_at, step_directories, step_of,
                                verify_step)
from scaling.directory import MEASURED, forked_from, overwrite
from scaling.run_data import check_start_from
from scaling.same_run import (check_data, check_digest, check_model_keys, check_settings,
                              check_tokenizer, differing)
from scaling.starts import say_changed_network
from support.files import (UserError, link_or_copy, log_rows, read_json, rows_until, write_json,
                           write_rows)
from support.models import open_base
from support.official_state import read_progress
from support.text import counted

NEW_STATE = {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}


def find_start(config, settings, fingerprint, free_keys):
    """On rank 0: returns (step directory to load or None, state after it) for the run of `config`.

    That is the newest undamaged step of the run; for a new fork, a copy of the other run's; for
    another new run the step that start_from names, or nothing. settings: every key of the run;
    fingerprint: what identifies its data; free_keys: keys that may change besides MAY_CHANGE.
    Raises UserError that names each key, or part of the data, that differs from the saved run.
    """
    run = Path(config.run_dir)
    if config.overwrite:
        overwrite(run, config.start_from)
    for leftover in run.glob("step*.tmp"):  # a crash cut it off while it was written
        shutil.rmtree(leftover)
    is_begun = bool(step_directories(run))
    if not is_begun:
        for name in (*MEASURED, "tokenizer.json"):  # of a run that was here and saved no step
            (run / name).unlink(missing_ok=True)
    home = run if is_begun else forked_from(config)
    if home is None:
        return start_new(config, fingerprint)
    try:
        step, saved = step_at(home, config.verify == "sha256")
    except Unreadable:
        raise
    except UserError as error:
        remedy = "; --overwrite starts the run again from step 1" if is_begun else ""
        raise UserError(f"{error}{remedy}") from None
    check_settings(home, saved, settings, config, free_keys)
    check_data(home, saved, fingerprint, config)
    check_max_steps(config.max_steps, home, saved["step"])
    if is_begun:
        set_aside(run, step)
    else:
        step = begin_fork(run, run_of(home), step)
    return step, continued_state(saved, fingerprint, energy_of_log(run, saved["step"]))


def check_max_steps(max_steps, home, step):
    """UserError for a last step that lies behind the run."""
    if max_steps < step:
        older = [path for path in step_directories(run_of(home)) if step_of(path) < max_steps]
        earlier = f", or begin a fork at {older[-1]}: --resume={older[-1]}" if older else ""
        raise UserError(f"max_steps={max_steps}: {home} is at step {step} already; raise it (in "
                        f"adapt.py: --epochs){earlier}" + " --run_dir=NEW" * bool(earlier))


def begin_fork(run, home, step):
    """Give the new run `run` a copy of a step of the run `home`, and of what belongs to it.

    The log and eval.jsonl are copied up to that step, so that curves and tables begin where the
    training began. Nothing is written in `home`. The step comes last: until it is there, the
    fork has not begun, and the same command begins it again. Returns the copy of the step.
    """
    last = step_of(step)
    for pattern in ("config.json", "tokenizer.json", "manifest*.json", "reference-*.json"):
        for file in home.glob(pattern):
            shutil.copyfile(file, run / file.name)
    for name in ("metrics.jsonl", "eval.jsonl"):
        kept = rows_until(log_rows(home, name), last)
        if kept:
            write_rows(run / name, kept)
    write_json(run / "fork.json", {"of": str(home.resolve()), "step": last})
    say_changed_network(home)
    begun = run / step.name
    with written_aside(begun) as aside:
        for file in step.iterdir():
            link_or_copy(file, aside / file.name)
    print(f"{run}: a fork of {home}, from its step {last} on; {home} stays as it is")
    return begun


def start_new(config, fingerprint):
    """Returns (step directory or None, state) of a run that has no step yet."""
    lost = len(list(log_rows(config.run_dir)))
    if lost:
        print(f"{config.run_dir}: holds no step, so the run begins again; dropped: "
              f"{counted(lost, 'row')} of its metrics.jsonl; starts.jsonl keeps its earlier starts")
    if not config.start_from:
        return None, dict(NEW_STATE)
    start = Path(config.start_from)
    if takes_step(config):
        check_start_from(start, config.max_steps)
        saved = verify_step(start, config.verify == "sha256")
        check_model_keys(saved, start)
        check_data(start, saved, fingerprint, config)
        say_changed_network(run_of(start))
        return start, {**NEW_STATE, "step": saved["step"], "tokens": saved["tokens"],
                       "data_changes": data_changes(saved, fingerprint)}
    base, state = start_with_weights(config, fingerprint)
    if config.fresh_optimizer or not is_whole_official(start):
        return base, state
    progress = read_progress(start)
    began = {**state["began"], "official_step": progress.step}
    return base, {**state, "step": progress.step, "tokens": progress.tokens, "began": began}


def start_with_weights(config, fingerprint):
    """Returns (the Base whose weights the run takes, the state of its step 0)."""
    base = open_base(config.start_from, config.verify)
    file = base.home / "tokenizer.json"
    if base.kind == "run":
        check_tokenizer(file, read_json(base.weights / "state.json")["data"], fingerprint)
    elif file.is_file():
        check_digest(file, tokenizer_digest(file), fingerprint["tokenizer_sha256"])
    began = {"weights": str(base.weights.resolve()), "sha256": base.digest}
    return base, {**NEW_STATE, "began": began}


def energy_of_log(run, step):
    """The most kWh that the log names up to a step: with what came after that step was saved.

    That is an evaluation, which the row "end" counts.
    """
    amounts = [row.get("kwh") for row in log_rows(run) if row["step"] <= step]
    return max((amount for amount in amounts if type(amount) in (int, float)), default=0.0)


def continued_state(saved, fingerprint, kwh):
    """The state of a run that goes on from `saved`; kwh: the energy of its log."""
    state = {key: saved.get(key, new) for key, new in NEW_STATE.items()}
    state["kwh"] = max(state["kwh"], kwh)
    if "began" in saved:
        state["began"] = saved["began"]
    earlier_data = list(saved.get("earlier_data", []))
    before = saved["data"]["data_sha256"]
    if before != fingerprint["data_sha256"]:
        earlier_data.append(before)  # for eval.py: what the run was trained on until here
    return {**state, "earlier_data": earlier_data, "config": saved["config"],
            "data_changes": data_changes(saved, fingerprint)}


def data_changes(saved, fingerprint):
    """For data.py trace: [{until_step, and the fingerprint until then}] of data that changed."""
    changes = list(saved.get("data_changes", []))
    if differing(saved, fingerprint):
        changes.append({"until_step": saved["step"], **saved["data"]})
    return changes


def set_aside(run, step):
    """Rename the steps after `step`, which were passed over: the run will save them again."""
    for path in step_directories(run):
        if step_of(path) > step_of(step):
            aside = run / f"unread-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            print(f"{path}: kept as {aside.name}, because the run takes these steps again")
