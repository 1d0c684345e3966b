"""What a mistyped command line or config probably means: the nearest name, the right command."""

import difflib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import get_args

from support.files import UserError, here, log_rows
from support.other_words import OURS, VALUES, names_here, saying_about
from support.slips import ROOT, command, verbs

NAMED_RUNS = 8  # of a folder, in a message
SIZES = {"k": 10**3, "m": 10**6, "b": 10**9}  # what people write behind a number


def unknown_key(key, known, place):
    """The UserError for a key that no schema of this command has. place: begins its message."""
    word = key.lower().replace("-", "_")
    ours = names_here(word)
    near = [own for own in (word, *ours) if own in known]
    saying = None if word in known else saying_about(word, command())
    if word[:3] == "no_" and word[3:] in known:
        saying = saying or f"write --{word[3:]}=false"
    elif word in verbs() and not saying:
        saying = f"a verb, which has no hyphens: python {verbs()[word][0]} {word} ..."
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
    file = place.partition(":")[0]  # of a config; "--" for an option
    other = f"{owner} {file}" if file.endswith((".py", ".json")) else owner
    if command() == "-m experiments":
        other = f"{command()} --extra=--{word}=VALUE, which gives it to every run"
    saying = saying_about(word, command()) or (
        f"a key of {owner}, which {command_and_verb()} does not use; leave it out, or run python "
        f"{other}")
    return UserError(f"{place}{key}: {saying}")


def command_and_verb():
    """The same with the word that chooses what it does, such as data.py trace."""
    verb = sys.argv[1] if sys.argv[1:] and sys.argv[1].isalpha() else ""
    return f"{'python ' * command().startswith('-m')}{command()} {verb}".rstrip()


def command_of(key):
    """The command whose configuration has this key; None if none has."""
    for path in (*sorted(ROOT.glob("*.py")), ROOT / "scaling/plan.py"):
        if re.search(rf"^    {re.escape(key)}: (.*\bsetting\(|Literal\[)", path.read_text(), re.M):
            return path.name if path.name in ("adapt.py", "eval.py") else "train.py"
    return None


def example_of(field, value):
    """What to write instead of a value that has not the field's type; "" if nothing is better."""
    kind = field.type
    written = VALUES.get(str(value).lower())
    if kind is int and type(value) is float and value.is_integer():  # such as 1e6
        return f"; write {int(value)}"
    if kind is bool:
        return f"; write --{field.name}={written}" if written else "; write True or False"
    if written in get_args(kind):
        return f"; write {written}"
    if kind in (int, float):
        return f"; write {mended_number(str(value)[:40], field)}"
    if kind is str and not isinstance(value, (list, dict)):
        is_size = field.name == "tokenizer" and type(value) is int
        text = f"bpe:{value}" if is_size else "" if value in (None, False) else value
        return f'; write {field.name} = "{text}"'
    if str(kind).startswith("dict[str, str"):
        is_path = type(value) is str and not set(value) & set("'\"{}\n")
        path = value if is_path else "PATH"
        return f"; such as --{field.name}=\"{{'mine': '{path}'}}\""
    return ""


def mended_number(text, field):
    """The number that a text means: 1.5e-3 for 1,5e-3; 16384 for 16,384; 2000 for 2k."""
    plain = text.strip(" ,;'\"").translate(dict.fromkeys(map(ord, "−–—"), "-"))
    if field.type is float and plain.count(",") == 1:
        return plain.replace(",", ".") + ", with a point"
    if "," in plain:
        return plain.replace(",", "") + ", without commas"
    size = SIZES.get(plain[-1:].lower())
    if size and is_number(plain[:-1]):
        return f"{float(plain[:-1]) * size:.0f}"
    if is_number(plain) and (field.type is float or plain.isdecimal()):
        return plain
    whole = " whole" * (field.type is int)
    return f"a{whole} number, such as {field.metadata.get('default', field.default)}"


def missing_value(field, word):
    """The UserError for an option without its value; word: what follows it, or None."""
    option = f"--{field.name}"
    if not word and option in sys.argv[:-1]:  # a verb's options are read without its other words
        word = sys.argv[sys.argv.index(option) + 1]
        word = "" if os.path.exists(word) else word
    if not word or word.startswith("-") and not is_number(word):
        word = "VALUE"
    meaning = field.metadata["help"].removesuffix(".")
    return UserError(f"{option}: the value is missing; write {shlex.quote(f'{option}={word}')} "
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
    if key in fields:
        return UserError(f"{path}: no such config file; an option begins with two hyphens: "
                         f"--{key}={value if equals else 'VALUE'}")
    saved = path / "config.json"
    if os.path.isfile(saved):
        is_tuned = '"method"' in saved.read_text(encoding="utf-8", errors="replace")
        maker = "adapt.py" if is_tuned else "train.py"
        tunes = f", --start_from={path} tunes its model" * (command() == "adapt.py")
        return UserError(f"{path}: a directory, not a config file; {saved} holds its settings, and "
                         f"python {maker} --resume={path} continues the run{tunes}")
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
    wanted = path.name.rpartition("\\")[2]
    for folder in (ROOT / "configs", path.parent):
        beside |= {file.name: file for file in folder.glob("[!_.]*")}
    for file in (ROOT / "configs").glob("[!_.]*"):
        beside[f"configs{file.name}"] = file  # a shell takes the \\ out of configs\\tiny.py
    without_ending = [name for name in beside if name == f"{wanted}.py"]
    for name in without_ending + difflib.get_close_matches(wanted, beside, n=1):
        return f"did you mean {from_here(beside[name])}?"
    return "configs/ holds those that come with nanOLMo"


def from_here(file):
    """A file's path as seen from the working directory, if it lies in it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def check_base(path, base, before, place):
    """UserError unless the config file that `path` adds to, or a saved config, stands before it."""
    if any(file.name == base or file.suffix == ".json" for file in before):
        return
    file = path.parent / str(base)
    if not file.is_file() and (ROOT / "configs" / str(base)).is_file():  # one of ours
        file = from_here(ROOT / "configs" / str(base))
    words = sys.argv[1:]
    later = [word for word in words if Path(word).name == base]
    saying = f"this file adds to that one; name both: {file} {path}"
    if command() == "adapt.py" and not value_in(file, "method"):
        run = value_in(path, "run_dir") or "RUN"
        config = next((word for word in words if Path(word).stem.endswith(("_sft", "_dpo"))),
                      "configs/tiny_sft.py")
        saying = (f"this file is one for train.py; a tuning names the run that it made: python "
                  f"adapt.py {config} --start_from={run}")
    elif later:
        words.remove(later[0])
        words.insert(words.index(str(path)), later[0])
        saying = f"that file comes first: python {command()} {shlex.join(words)}"
    raise UserError(f"{place}adds_to={base}: {saying}")


def value_in(file, key):
    """The text that a config file gives to a key; "" without one, or without the file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(rf"""^{key}\s*=\s*["'](.+?)["']""", text, re.M)
    return found[1] if found else ""


def run_remedy(path):
    """What to do about a run that is not there: which is meant, and the commands that make it."""
    beside = {}
    for folder in ([] if path.is_absolute() else [Path("runs")]) + [path.parent]:
        beside |= {file.parent.name: file.parent for file in folder.glob("*/config.json")}
    near = difflib.get_close_matches(path.name, beside, n=1)
    made = how_made(path.name)
    if near and made and near[0] != path.name:
        return f"did you mean {beside[near[0]]}? {made}"
    if near:
        return f"did you mean {beside[near[0]]}? If it has moved, name where it is now"
    if made or not beside:
        return made or how_made("tiny")
    return f"{path.parent} has {listed(sorted(beside))}; if it has moved, name where it is now"


def how_made(name):
    """The commands that make the run of this name, if a config of ours does; else ""."""
    makers = {}
    for file in sorted((ROOT / "configs").glob("[!_]*.py")):
        run = value_in(file, "run_dir")
        makers[Path(run).name] = (run, file)
    commands = []
    while name in makers:
        made, file = makers.pop(name)
        start = value_in(file, "start_from")
        program = "adapt.py" if value_in(file, "method") else "train.py"
        commands.insert(0, (f"python {program} configs/{file.name}", made))
        name = "" if os.path.exists(start) else Path(start).name  # such as runs/tiny
    line = " && ".join(line for line, _ in commands)
    return f"{line} makes {commands[-1][1]}" if commands else ""


def listed(names):
    """Some names in one line."""
    return ", ".join(names[:NAMED_RUNS]) + ", ..." * (len(names) > NAMED_RUNS)


def runs_below(path):
    """A sentence that names the runs in the folder `path`; "" if there is none, or it is a run."""
    runs = sorted(str(file.parent) for file in Path(path).glob("*/config.json"))
    if not runs or (Path(path) / "config.json").is_file():
        return ""
    return f"{path}: no model here, but in folders of it; name one: {listed(runs)}"


def not_one_run(verb, words):
    """The UserError for a verb that takes one run, and was given these words."""
    key = {"evaluate": "suite", "sample": "prompt", "trace": "step", "find": "text"}.get(verb)
    if key and len(words) > 1 and not os.path.exists(words[1]) and "/" not in words[1]:
        option = shlex.quote(f"--{key}={words[1].removeprefix(f'{key}=')}")
        return UserError(f"{words[1]}: not a run; an option has the form {option}")
    several = f"; for several, python eval.py report {' '.join(words)}" * (len(words) > 1)
    return UserError(f"{verb}: name one run, such as runs/tiny{several}; --help shows the form")


def file_remedy(file):
    """What a file is that was named in the place of a run, and what to name."""
    if file.suffix != ".py":
        return f"a file; name its directory, {file.parent}"
    made = value_in(file, "run_dir")
    return f"a config file, not a run; name the run that it made{f', {made}' if made else ''}"


def not_a_config(path):
    """What a file holds that was named in the place of a config file, and its option; else ""."""
    if path.suffix in (".py", ".json", "") or command() not in ("train.py", "data.py", "adapt.py"):
        return ""
    option = f"--sources=\"{{'mine': '{path}'}}\""
    example = "configs/tiny.py"
    if command() == "adapt.py":
        option, example = f"--train_data={path}", "configs/tiny_sft.py"
    words = [option if word == str(path) else word for word in sys.argv[1:]]
    if not any(word.endswith(".py") for word in words):
        words.insert(words.index(option) if option in words else 0, example)
    return f"not a config file; write python {command()} {' '.join(words)}"


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
    is_own = (path.is_absolute() or path.parts[0] == "runs" or path.parent.exists()
              or (Path("runs") / path.name).exists())
    if is_own or len(path.parts) != 2:
        return ""
    return (f"if it is a model of Hugging Face's hub, download it first: hf download {path} "
            f"--local-dir {path.name}, and then name {path.name}")
