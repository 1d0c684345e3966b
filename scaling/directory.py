"""The run directory: whose it is, who holds it, what describes the run in it.

    config.json  tokenizer.json  manifest.json      what the run is made of
    metrics.jsonl  eval.jsonl  report.html          what was measured
    best.json                                       which step is the best, with keep_best
    step000500/                                     checkpoints (scaling/checkpoint.py)
    fork.json                                       the run and step that this one is a fork of
    .lock                                           held by the process that trains there
"""

import os
import re
import shutil
import socket
from pathlib import Path

from configs import ROOT, flat
from corpus.storage import tokenizer_digest
from scaling.checkpoint import no_step, run_of, step_directories, step_of
from scaling.ranks import gather, rank
from support.files import UserError, here, log_rows, read_json, replace_file, write_json
from support.lock import Lock
from support.run_hints import runs_below

# Keys that say what to do this time, not what the run is. They are not saved.
NOT_SAVED = {"resume", "overwrite", "accept_changes", "stop_after_minutes", "tensorboard", "wandb",
             "verify"}

MEASURED = ("eval.jsonl", "report.html")  # what eval.py writes about a run
# All names in its directory that a run writes, replaces or deletes.
NAMES = re.compile(r"(config|tokenizer|manifest|fork|best)\.json|manifest-\w+\.json|metrics\.jsonl|"
                   r"starts\.jsonl|eval\.jsonl|report\.html|reference-\w+\.json|tensorboard|wandb|"
                   r"(damaged-|unread-)?step\d+|step\d+\.tmp")

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


# ---- Whose it is ---------------------------------------------------------------------------------

def check_directory(run_dir, overwrite=False):
    """UserError for a run_dir that is no place for a run: empty, somebody else's, or all work.

    A run replaces and deletes files by their names; those that are there must be a run's.
    """
    run = Path(run_dir)
    if run_dir == "":
        raise UserError("run_dir is empty; name a directory for the run, such as runs/tiny")
    if run.is_file():
        raise UserError(f"run_dir={run}: a file; name a directory for the run")
    if (run / "state.json").is_file():
        raise UserError(f"run_dir={run}: a step of the run {run.parent}; name another "
                        "directory")
    found = names_of_run(run)
    others = other_names(run)
    if others and not found:
        raise UserError(f"run_dir={run}{here(run)}: holds {', '.join(others[:5])}, and no run; "
                        "name a directory for the run alone, such as runs/NAME")
    if found and not is_run(run):
        raise UserError(f"run_dir={run}{here(run)}: holds {', '.join(found[:5])}, and no run of "
                        "ours; a run would replace them; choose another --run_dir")
    places = (Path.cwd(), ROOT, Path.home().resolve())
    holds_work = any(place.is_relative_to(run.resolve()) for place in places)
    if holds_work and (overwrite or not found):
        raise UserError(f"run_dir={run}: is or holds the working directory, the code or your home; "
                        "name a directory for the run alone, such as runs/tiny")


def is_run(run):
    """True if a run of ours is there: its config.json says so or, where that is lost, its steps."""
    if (run / "config.json").is_file():
        return "run_dir" in read_json(run / "config.json")
    return any((step / "state.json").is_file() for step in step_directories(run))


def has_steps(path):
    """Whether `path` is a run, whose model is in its steps; UserError if it has saved none."""
    steps = step_directories(path)
    if not steps and is_run(path):
        raise no_step(path)
    return bool(steps)


def names_of_run(run):
    """The names in a directory that a run writes, replaces or deletes."""
    if not run.is_dir():
        return []
    return sorted(path.name for path in run.iterdir() if NAMES.fullmatch(path.name))


def other_names(run):
    """The names in a directory that are not a run's, nor those of a batch system's logs."""
    if not run.is_dir():
        return []
    names = [path.name for path in run.iterdir() if path.suffix not in (".log", ".out", ".err")]
    return sorted(name for name in names if not (NAMES.fullmatch(name) or name[0] == "."))


def forked_from(config):
    """What the run of `config` is a fork of: --resume=OLD --run_dir=NEW; None if of nothing."""
    if not config.resume or Path(config.resume).resolve() == Path(config.run_dir).resolve():
        return None
    return Path(config.resume)


def check_overwrite(run, start_from):
    """UserError if --overwrite would delete more than the user means."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0):
        raise UserError("--overwrite with --max-restarts would delete the run at each restart; "
                        "leave out one of them")
    start = Path(start_from).resolve()
    is_ours = start.parent == run.resolve() and NAMES.fullmatch(start.name)
    if start_from and (is_ours or start == run.resolve()):
        raise UserError(f"--overwrite would delete {start_from}, which start_from names; choose "
                        "another --run_dir")


def overwrite(run, start_from):
    """Delete what a run writes, and nothing else that may lie in its directory."""
    check_overwrite(run, start_from)
    for name in names_of_run(run):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def lacks_evaluation(run, step):
    """True if the run has saved `step`, and was stopped before the evaluation of it was logged."""
    is_saved = step in map(step_of, step_directories(run))
    return is_saved and not any(row["kind"] == "eval" and row["step"] == step
                                for row in log_rows(run))


# ---- Describing it -------------------------------------------------------------------------------

def describe(run, settings, folder, **facts):
    """On rank 0: write config.json, tokenizer.json and manifest.json into the run directory.

    folder: holds the data's tokenizer and manifest, or is a Hugging Face directory without a
    manifest. facts: what else manifest.json is to say. Older steps need the tokenizer and the
    manifest of their time: the one is never replaced by another, the other gets another name.
    """
    write_json(run / "config.json", settings)
    keep_tokenizer(folder / "tokenizer.json", run / "tokenizer.json")
    if not (folder / "manifest.json").is_file():
        return
    manifest = {**read_json(folder / "manifest.json"), **facts}
    file = run / "manifest.json"
    before = read_json(file)["sha256"] if file.is_file() else manifest["sha256"]
    if before != manifest["sha256"]:
        file.replace(run / f"manifest-{before[:12]}.json")
    write_json(file, manifest)


def note_data_dir(run, settings):
    """Keep in a finished run's config.json where its data is now; other commands look there."""
    file = run / "config.json"
    saved = read_json(file)
    before = saved.get("data_dir")
    now = settings.get("data_dir", before)  # a tuning of weights from elsewhere has none
    if now != before:
        write_json(file, {**saved, "data_dir": now})
        print(f"{file}: data_dir={now} is noted (before: {before})")


def keep_tokenizer(new, kept):
    """Copy the file `new` to `kept`; UserError if another tokenizer is there."""
    if kept.is_file():
        if tokenizer_digest(kept) != tokenizer_digest(new):
            raise UserError(f"{kept}: is another tokenizer than {new}, and what was trained here "
                            "needs it; choose another --run_dir")
        return
    replace_file(kept, new.read_bytes())


def saved_settings(*configs):
    """{key: value} of all that describes the run, as config.json saves it."""
    return {key: value for key, value in flat(*configs).items() if key not in NOT_SAVED}


def resumed_argv(argv, file, example, is_tuned):
    """argv with the config of the run that --resume names; UserError if `file` did not make it.

    With --resume=OLD --run_dir=NEW, a fork, it is NEW's config once NEW has a step. A command line
    without a config is an error that names an example.
    """
    resume = last_value(argv, "--resume=")
    if resume is None:
        if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
            raise UserError(f"name a config file (python {file} {example}) or --resume=RUN")
        return argv
    home = run_of(resume)
    saved = home / "config.json"
    if not saved.is_file() or not is_run(home):
        raise UserError(runs_below(home) or f"--resume={resume}{here(home)}: no run there; python "
                        f"{file} CONFIG starts one")
    if ("method" in read_json(saved)) != is_tuned:
        other = "train.py" if is_tuned else "adapt.py"
        raise UserError(f"--resume={resume}: {other} made this run; use python {other} "
                        f"--resume={resume}")
    run_dir = last_value(argv, "--run_dir=")
    is_fork = run_dir is not None and Path(run_dir).resolve() != Path(resume).resolve()
    begins_again = bool({"--overwrite", "--overwrite=true"} & set(map(str.lower, argv)))
    if is_fork and step_directories(run_dir) and not begins_again:
        check_is_fork(Path(run_dir), Path(resume))
        saved = Path(run_dir) / "config.json"
    elif not (is_fork or begins_again or step_directories(home)) and any(log_rows(home)):
        raise UserError(f"--resume={resume}: holds no step; python {file} {saved} "
                        f"--run_dir={home} begins the run again at step 1")
    elif not is_fork and home != Path(resume):
        raise UserError(f"--resume={resume}: is a step; --resume={home} continues the run from its "
                        f"newest one, --resume={resume} --run_dir=NEW begins a fork")
    return [str(saved), f"--run_dir={home}", *argv]


def last_value(argv, option):
    """The value of an option that starts with `option`; the last one counts. None without it."""
    values = [word.removeprefix(option) for word in argv if word.startswith(option)]
    return values[-1] if values else None


def check_is_fork(run, origin):
    """UserError unless the run, which has steps, began as a fork of `origin`, a run or its step."""
    home = run_of(origin)
    other = f"choose another --run_dir, or continue it: --resume={run}"
    if not (run / "fork.json").is_file():
        raise UserError(f"run_dir={run}: holds a run that is no fork of {home}; {other}")
    fork = read_json(run / "fork.json")
    if fork["of"] != str(home.resolve()):
        raise UserError(f"run_dir={run}: holds a fork of {fork['of']}, not of {home}; {other}")
    if home != origin and fork["step"] != step_of(origin):
        raise UserError(f"run_dir={run}: holds a fork of step {fork['step']} of {home}, not of its "
                        f"step {step_of(origin)}; {other}")
