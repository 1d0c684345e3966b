"""What a mistyped command line or config probably means: the nearest name, the right command."""

import difflib
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from support.files import UserError, here
from support.other_words import OURS, VALUES, names_here, saying_about
from support.slips import ROOT, command, verbs

SIZES = {"k": 10**3, "m": 10**6, "b": 10**9}  # what people write behind a number


# ---- Keys ----------------------------------------------------------------------------------------

def unknown_key(key, known, place):
    """The UserError for a key that no schema of this command has. place: begins its message."""
    word = plain_key(key)
    saying = saying_of_unknown(word, known)
    if saying:
        return UserError(f"{place}{key}: {saying}")
    # 1. The same word, our name for another house's word, or a slip of the hand in either
    ours = names_here(word)
    near = [own for own in (word, *ours) if own in known] or alike(word, known, 0.85)
    if not near and not ours:
        for other in alike(word, " ".join(OURS.values()).split(), 0.85):
            ours = names_here(other)
            near = [own for own in ours if own in known]
    # 2. A key of another command
    if not near:
        if command_of(word):
            return unused_key(key, place)
        for own in ours:
            owner = command_of(own)
            if owner:
                return UserError(f"{place}{key}: called {own} here, a key of {owner}, which "
                                 f"{command_and_verb()} does not use")
        near = alike(word, known, 0.7)
    hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
    return UserError(f"{place}{key}: unknown key; {hint}")


def plain_key(key):
    """A key as a schema would spell it."""
    return key.lower().replace("-", "_")


def saying_of_unknown(word, known):
    """What to write instead of a word that is no key but has a meaning; "" if none is known."""
    saying = "" if word in known else saying_about(word, command())
    if saying:
        return saying
    if word[:3] == "no_" and word[3:] in known:
        return f"write --{word[3:]}=false"
    if word in verbs():
        file, _ = verbs()[word]
        return f"a verb, which has no hyphens: python {file} {word} ..."
    return ""


def alike(word, names, cutoff):
    """[the name that is most like a word], or [] if none is as like as `cutoff`, 0 to 1."""
    return difflib.get_close_matches(word, names, n=1, cutoff=cutoff)


def unused_key(key, place):
    """The UserError for a key that another command has."""
    word = plain_key(key)
    saying = saying_about(word, command())
    if saying:
        return UserError(f"{place}{key}: {saying}")
    owner = command_of(word)
    file = place.partition(":")[0]  # of a config; "--" for an option
    other = owner
    if command() == "-m experiments":
        other = f"{command()} --extra=--{word}=VALUE, which gives it to every run"
    elif file.endswith((".py", ".json")):
        other = f"{owner} {file}"
    return UserError(f"{place}{key}: a key of {owner}, which {command_and_verb()} does not use; "
                     f"leave it out, or run python {other}")


def command_and_verb():
    """The command as it is named in a message, with its verb, such as data.py trace."""
    words = [command()]
    if words[0].startswith("-m"):
        words.insert(0, "python")
    if sys.argv[1:] and sys.argv[1].isalpha():
        words.append(sys.argv[1])
    return " ".join(words)


def command_of(key):
    """The command whose configuration has this key; None if none has."""
    file = file_of(key)
    is_own = file in ("adapt.py", "eval.py", None)
    return file if is_own else "train.py"


def file_of(key):
    """The file of our code whose configuration has this key; None if none has."""
    field = rf"^    {re.escape(key)}: (.*\bsetting\(|Literal\[)"
    for path in (*sorted(ROOT.glob("*.py")), ROOT / "scaling/plan.py"):
        if re.search(field, path.read_text(), re.M):
            return path.name
    return None


def example_of(field, value):
    """What to write instead of a value that has not the field's type; "" if nothing is better."""
    kind = field.type
    written = VALUES.get(str(value).lower())  # such as true for yes
    if kind is int and type(value) is float and value.is_integer():  # such as 1e6
        return f"; write {int(value)}"
    if kind is bool:
        return f"; write --{field.name}={written}" if written else "; write True or False"
    if written in get_args(kind):
        return f"; write {written}"
    if get_origin(kind) is Literal:  # who adds a choice to the code needs its place
        return f"; {file_of(field.name)} lists the choices"
    if kind in (int, float):
        return f"; write {mended_number(str(value)[:40], field)}"
    if kind is str and not isinstance(value, (list, dict)):
        text = value
        if field.name == "tokenizer" and type(value) is int:
            text = f"bpe:{value}"
        elif value in (None, False):
            text = ""
        return f'; write {field.name} = "{text}"'
    if str(kind).startswith("dict[str, str"):
        is_path = type(value) is str and not set(value) & set("'\"{}\n")
        path = value if is_path else "PATH"
        return f"; such as --{field.name}=\"{{'mine': '{path}'}}\""
    return ""


def mended_number(text, field):
    """The number that a text means: 1.5e-3 for 1,5e-3; 16384 for 16,384; 2000 for 2k."""
    plain = re.sub("[−–—]", "-", text.strip(" ,;'\""))
    if field.type is float and plain.count(",") == 1:
        return plain.replace(",", ".") + ", with a point"
    if "," in plain:
        return plain.replace(",", "") + ", without commas"
    size = SIZES.get(plain[-1:].lower())
    if size and is_number(plain[:-1]):
        return f"{float(plain[:-1]) * size:.0f}"
    if is_number(plain) and (field.type is float or plain.isdecimal()):
        return plain
    kind = "a whole number" if field.type is int else "a number"
    example = field.metadata.get("default", field.default)
    return f"{kind}, such as {example}"


def missing_value(field, word):
    """The UserError for an option without its value; word: what follows it, or None."""
    option = f"--{field.name}"
    if not word and option in sys.argv[:-1]:  # a verb's options are read without its other words
        following = sys.argv[sys.argv.index(option) + 1]
        word = "" if os.path.exists(following) else following
    if not word or word.startswith("-") and not is_number(word):
        word = "VALUE"
    form = shlex.quote(f"{option}={word}")
    meaning = field.metadata["help"].removesuffix(".")
    return UserError(f"{option}: the value is missing; write {form} ({meaning})")


def is_number(word):
    """True for -1 and -1e-3, and False for another option."""
    try:
        float(word)
    except ValueError:
        return False
    return True


# ---- Config files --------------------------------------------------------------------------------

def no_config_file(path, fields):
    """The UserError for a word of the command line that is no config file."""
    key, equals, value = str(path).lstrip("-–—").partition("=")
    if key in fields:
        value = value if equals else "VALUE"
        return UserError(f"{path}: no such config file; an option begins with two hyphens: "
                         f"--{key}={value}")
    if os.path.isfile(path / "config.json"):
        return named_run(path)
    if os.path.exists(path):
        kind = "a directory" if os.path.isdir(path) else "a pipe or a device"
        return UserError(f"{path}: {kind}, not a config file; configs/ holds those that come with "
                         "nanOLMo")
    return UserError(f"{path}: no such config file{here(path)}; {nearest_path(path)}")


def named_run(run):
    """The UserError for a run that was named in the place of a config file."""
    saved = run / "config.json"
    is_tuned = '"method"' in saved.read_text(encoding="utf-8", errors="replace")
    maker = "adapt.py" if is_tuned else "train.py"
    also = {"adapt.py": f", --start_from={run} tunes its model",
            "data.py": f", python data.py --resume={run} prints the table of its data"}
    return UserError(f"{run}: a directory, not a config file; {saved} holds its settings, and "
                     f"python {maker} --resume={run} continues the run{also.get(command(), '')}")


def shipped(word):
    """A word of the command line; for configs/tiny.py, from any directory, the path of ours."""
    is_ours = word.startswith("configs/") and not os.path.exists(word)
    file = ROOT / word
    return str(file) if is_ours and os.path.isfile(file) else word


def nearest_path(path):
    """Which file or folder beside a missing path, or which config of ours, has a similar name."""
    beside = {}
    for file in (ROOT / "configs").glob("[!_.]*"):
        beside[file.name] = file
        beside[f"configs{file.name}"] = file  # a shell takes the \\ out of configs\\tiny.py
    for file in path.parent.glob("[!_.]*"):
        beside[file.name] = file
    wanted = path.name.rpartition("\\")[2]
    if f"{wanted}.py" in beside:
        near = [f"{wanted}.py"]
    else:
        near = difflib.get_close_matches(wanted, beside, n=1)
    if not near:
        return "configs/ holds those that come with nanOLMo"
    return f"did you mean {from_here(beside[near[0]])}?"


def from_here(file):
    """A file's path as seen from the working directory, if it lies in it."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def check_base(path, base, before, place):
    """UserError unless the config file that `path` adds to, or a saved config, stands before it."""
    if any(file.name == base or file.suffix == ".json" for file in before):
        return
    file = path.parent / str(base)
    ours = ROOT / "configs" / str(base)
    if ours.is_file() and not file.is_file():
        file = from_here(ours)
    words = sys.argv[1:]
    later = [word for word in words if Path(word).name == base]
    if command() == "adapt.py" and not value_in(file, "method"):
        run = value_in(path, "run_dir") or "RUN"
        tunings = [word for word in words if Path(word).stem.endswith(("_sft", "_dpo"))]
        config = tunings[0] if tunings else "configs/tiny_sft.py"
        saying = ("this file is one for train.py; a tuning names the run that it made: python "
                  f"adapt.py {config} --start_from={run}")
    elif later:
        words.remove(later[0])
        words.insert(words.index(str(path)), later[0])
        saying = f"that file comes first: python {command()} {shlex.join(words)}"
    elif not file.is_file():
        saying = f"there is no such file; {nearest_path(file)}"
    else:
        saying = f"this file adds to that one; name both: {file} {path}"
    raise UserError(f"{place}adds_to={base}: {saying}")


def value_in(file, key):
    """The text that a config file gives to a key; "" without one, or without the file."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    found = re.search(rf"""^{key}\s*=\s*["'](.+?)["']""", text, re.M)
    return found[1] if found else ""


def not_a_config(path):
    """What a file holds that was named in the place of a config file, and its option; else ""."""
    if path.suffix in (".py", ".json", "") or command() not in ("train.py", "data.py", "adapt.py"):
        return ""
    if path.suffix in (".yaml", ".yml", ".toml", ".ini", ".cfg"):
        return "not a config file; ours are .py files of lines `key = value`"
    option = f"--sources=\"{{'mine': '{path}'}}\""
    example = "configs/tiny.py"
    if command() == "adapt.py":
        option, example = f"--train_data={path}", "configs/tiny_sft.py"
    words = [option if word == str(path) else word for word in sys.argv[1:]]
    if not any(word.endswith(".py") for word in words):  # no config file
        place = words.index(option) if option in words else 0
        words.insert(place, example)
    line = " ".join(words)
    return f"not a config file; write python {command()} {line}"
