"""What a path that is no run probably means: the nearest run, or the commands that make it."""

import difflib
import os
import shlex
from pathlib import Path

from support.files import UserError, log_rows
from support.hints import value_in
from support.slips import ROOT

NAMED_RUNS = 8  # of a folder, in a message


# ---- No run is there -----------------------------------------------------------------------------

def run_remedy(path):
    """What to do about a run that is not there: which is meant, and the commands that make it."""
    folders = [path.parent]
    if not path.is_absolute():
        folders.insert(0, Path("runs"))
    beside = {}
    for folder in folders:
        beside |= {run.name: run for run in runs_in(folder)}
    made = how_made(path.name)
    for near in difflib.get_close_matches(path.name, beside, n=1):
        meant = f"did you mean {beside[near]}?"
        if made and near != path.name:
            return f"{meant} {made}"
        return f"{meant} If it has moved, name where it is now"
    if made:
        return made
    if not beside:
        return how_made("tiny")
    return f"{path.parent} has {listed(sorted(beside))}; if it has moved, name where it is now"


def runs_in(folder):
    """The runs in a folder, each a Path."""
    return [file.parent for file in Path(folder).glob("*/config.json")]


def how_made(name):
    """The commands that make the run of this name, if a config of ours does; else ""."""
    makers = {}
    for file in sorted((ROOT / "configs").glob("[!_]*.py")):
        run = value_in(file, "run_dir")
        makers[Path(run).name] = (run, file)
    commands = []
    run = ""
    while name in makers:  # from the run itself back to what it starts from
        made, file = makers.pop(name)
        run = run or made
        program = "adapt.py" if value_in(file, "method") else "train.py"
        commands.insert(0, f"python {program} configs/{file.name}")
        start = value_in(file, "start_from")  # such as runs/tiny
        name = "" if os.path.exists(start) else Path(start).name
    return f"{' && '.join(commands)} makes {run}" if commands else ""


def hub_remedy(path):
    """What to do about a directory that is not there, if its name looks like one on the hub, or
    has a ~; else "".
    """
    if path.parts[:1] == ("~",):
        return f"the shell has left the ~ as it is: write $HOME{str(path)[1:]}"
    is_own = (path.is_absolute() or path.parts[0] == "runs" or path.parent.exists()
              or (Path("runs") / path.name).exists())
    if is_own or len(path.parts) != 2:
        return ""
    return (f"if it is a model of Hugging Face's hub, download it first: hf download {path} "
            f"--local-dir {path.name}, and then name {path.name}")


# ---- Something else is there ---------------------------------------------------------------------

def runs_below(path):
    """A sentence that names the runs in the folder `path`; "" if there is none, or it is a run."""
    runs = sorted(map(str, runs_in(path)))
    if not runs or (Path(path) / "config.json").is_file():
        return ""
    return f"{path}: no model here, only in folders below it; name one: {listed(runs)}"


def listed(names):
    """Some names in one line."""
    more = ", ..." if len(names) > NAMED_RUNS else ""
    return ", ".join(names[:NAMED_RUNS]) + more


def file_remedy(file):
    """What a file is that was named in the place of a run, and what to name."""
    if file.suffix != ".py":
        return f"a file; name its directory, {file.parent}"
    made = value_in(file, "run_dir")
    which = f", {made}" if made else ""
    return f"a config file, not a run; name the run that it made{which}"


def not_one_run(verb, words):
    """The UserError for a verb that takes one run, and was given these words."""
    key = {"evaluate": "suite", "sample": "prompt", "trace": "step", "find": "text"}.get(verb)
    second = "".join(words[1:2])
    if key and second and not os.path.exists(second) and "/" not in second:
        value = second.removeprefix(f"{key}=")
        option = shlex.quote(f"--{key}={value}")
        return UserError(f"{second}: not a run; an option has the form {option}")
    several = ""
    if len(words) > 1:
        several = f"; for several, python eval.py report {' '.join(words)}"
    return UserError(f"{verb}: name one run, such as runs/tiny{several}; --help shows the form")


# ---- A run that has no step ----------------------------------------------------------------------

def command_of_run(run):
    """": COMMAND" of the last start of a run; "" where it is not known."""
    commands = [row.get("command") for row in log_rows(run, "starts.jsonl")]
    return f": {commands[-1]}" if commands else ""
