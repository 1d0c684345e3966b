"""What a mistyped command line or config probably means: the nearest name, the right command."""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import get_args

from support.files import UserError, here, log_rows
from support.other_words import OURS, VALUES, names_here, saying_about

NAMED_RUNS = 8  # of a folder, in a message
ROOT = Path(__file__).resolve().parent.parent  # the repository


def unknown_key(key, known, place):
    """The UserError for a key that no schema of this command has. place: begins its message."""
    word = key.lower().replace("-", "_")
    ours = names_here(word)
    near = [own for own in (word, *ours) if own in known]
    saying = None if word in known else saying_about(word, command())
    near = near or difflib.get_close_matches(word, known, n=1, cutoff=0.85)  # a slip of the hand
    if not near and not ours and not saying:  # the same in another house's word
        theirs = " ".join(OURS.values()).split()
        for other in difflib.get_close_matches(word, theirs, n=1, cutoff=0.85):
            ours = names_here(other)
            near = [own for own in ours if own in known]
    if not saying and not near:
        if command_of(word):
            return unused_key(key, place)
        for own in ours:
            if command_of(own):
                return UserError(f"{place}{key}: called {own} here, a key of {command_of(own)}, "
                                 f"which {command_and_verb()} does not use")
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
    return UserError(f"{place}{key}: {saying or f'unknown key; {hint}'}")


def unused_key(key, place):
    """The UserError for a key that another command has."""
    word = key.lower().replace("-", "_")
    owner = command_of(word)
    saying = saying_about(word, command()) or (
        f"a key of {owner}, which {command_and_verb()} does not use; leave it out, or run python "
        f"{owner}")
    return UserError(f"{place}{key}: {saying}")


def command():
    """The command that runs, such as train.py."""
    return Path(sys.argv[0]).name


def command_and_verb():
    """The same with the word that chooses what it does, such as data.py trace."""
    verb = sys.argv[1] if sys.argv[1:] and sys.argv[1].isalpha() else ""
    return f"{command()} {verb}".rstrip()


def command_of(key):
    """The command whose configuration has this key; None if none has."""
    for path in (*sorted(ROOT.glob("*.py")), ROOT / "scaling/plan.py"):
        if re.search(rf"^    {re.escape(key)}: (.*\bsetting\(|Literal\[)", path.read_text(), re.M):
            return path.name if path.name in ("adapt.py", "eval.py") else "train.py"
    return None


def example_of(field, value):
    """What to write instead of a value that has not the field's type; "" if nothing is better."""
    kind = field.type
    if kind is int and type(value) is float and value.is_integer():  # such as 1e6
        return f"; write {int(value)}"
    if kind is bool:
        return "; write True or False"
    written = VALUES.get(str(value).lower())
    if written in get_args(kind):
        return f"; write {written}"
    if kind in (int, float) and "," in str(value):
        return f"; write {mended_number(str(value), kind)}"
    if str(kind).startswith("dict[str, str"):
        is_path = type(value) is str and not set(value) & set("'\"{}\n")
        path = value if is_path else "PATH"
        return f"; such as --{field.name}=\"{{'mine': '{path}'}}\""
    return ""


def mended_number(text, kind):
    """A number that was written with commas: 1.5e-3 for 1,5e-3; 16384 for 16,384."""
    if kind is float and text.count(",") == 1:
        return text.replace(",", ".") + ", with a point"
    return text.replace(",", "") + ", without commas"


def missing_value(field, word):
    """The UserError for an option without its value; word: what follows it, or None."""
    if not word or word.startswith("-") and not is_number(word):
        word = "VALUE"
    meaning = field.metadata["help"].removesuffix(".")
    return UserError(f"--{field.name}: the value is missing; write --{field.name}={word} "
                     f"({meaning})")


def is_number(word):
    """True for -1 and -1e-3, and False for another option."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def no_config_file(path, fields):
    """The UserError for a word of the command line that is no config file."""
    key, equals, value = str(path).lstrip("-–—").partition("=")
    if equals and key in fields:
        return UserError(f"{path}: no such config file; an option begins with two hyphens: "
                         f"--{key}={value}")
    if os.path.isfile(path / "config.json"):
        return UserError(f"{path}: a directory, not a config file; {path}/config.json holds its "
                         f"settings, and train.py --resume={path} continues a run")
    if os.path.exists(path):
        kind = "a directory" if os.path.isdir(path) else "a pipe or a device"
        return UserError(f"{path}: {kind}, not a config file; configs/ holds those that come with "
                         "nanOLMo")
    return UserError(f"{path}: no such config file{here(path)}; {nearest_path(path)}")


def shipped(word):
    """A word of the command line; for configs/tiny.py, from any directory, the path of ours."""
    is_ours = word.startswith("configs/") and not os.path.exists(word)
    file = ROOT / word
    return str(file) if is_ours and os.path.isfile(file) else word


def nearest_path(path):
    """Which file or folder beside a missing path, or which config of ours, has a similar name."""
    beside = {}
    for folder in (ROOT / "configs", path.parent):
        beside |= {file.name: file for file in folder.glob("[!_.]*")}
    without_ending = [name for name in beside if name == f"{path.name}.py"]
    for name in without_ending + difflib.get_close_matches(path.name, beside, n=1):
        return f"did you mean {from_here(beside[name])}?"
    return "configs/ holds those that come with nanOLMo"


def from_here(file):
    """A file's path as seen from the working directory, if it lies in it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def check_base(path, base, before, place):
    """UserError unless the config file that `path` adds to, or a saved config, stands before it."""
    if not any(file.name == base or file.suffix == ".json" for file in before):
        file = path.parent / str(base)
        if not file.is_file() and (ROOT / "configs" / str(base)).is_file():  # one of ours
            file = from_here(ROOT / "configs" / str(base))
        raise UserError(f"{place}adds_to={base}: this file adds to that one; name both: "
                        f"{file} {path}")


def run_remedy(path):
    """What to do about a run that is not there: which are beside it, or how the first is made."""
    beside = sorted(file.parent.name for file in path.parent.glob("*/config.json"))
    if not beside:
        return ("python train.py configs/tiny.py makes runs/tiny, and then python adapt.py "
                "configs/tiny_sft.py makes runs/tiny_sft")
    near = difflib.get_close_matches(path.name, beside, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}? If it has moved, name where it is now"
    listed = ", ".join(beside[:NAMED_RUNS]) + ", ..." * (len(beside) > NAMED_RUNS)
    return f"{path.parent} has {listed}; if it has moved, name where it is now"


def file_remedy(file):
    """What a file is that was named in the place of a run, and what to name."""
    if file.suffix != ".py":
        return f"a file; name its directory, {file.parent}"
    lines = file.read_text(encoding="utf-8", errors="replace")
    made = re.search(r"""^run_dir\s*=\s*["'](.+?)["']""", lines, re.M)
    return f"a config file, not a run; name the run that it made{f', {made[1]}' if made else ''}"


def command_of_run(run):
    """": COMMAND" of the last start of a run; "" where it is not known."""
    commands = [row.get("command") for row in log_rows(run, "starts.jsonl")]
    return f": {commands[-1]}" if commands else ""


def hub_remedy(path):
    """What to do about a directory that is not there, if its name looks like one on the hub, or
    has a ~; else "".
    """
    if path.parts[:1] == ("~",):
        return f"the shell has left the ~ as it is: write $HOME{str(path)[1:]}"
    is_own = path.is_absolute() or path.parts[0] == "runs" or path.parent.exists()
    if is_own or len(path.parts) != 2:
        return ""
    return (f"if it is a model of Hugging Face's hub, download it first: hf download {path} "
            f"--local-dir {path.name}, and then name {path.name}")
