"""Slips of a command line that show before any setting is read, and slips in the text of a value.

Each is a UserError that holds the command or the option as it must be typed.
"""

import difflib
import os
import re
import shlex
import sys
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from support.files import UserError
from support.other_words import VERBS

ROOT = Path(__file__).resolve().parent.parent  # the repository
FREE = ("prompt", "text", "doc", "content_scorer")  # keys whose value may be any text, also "none"
NONE = ("none", "null", "nil", "false", "no", "off", "[]")  # what people type for an empty value
EMPTY = {  # {a key whose value may be empty: what that means}
    "eval_data": "nothing is held out", "start_from": "new weights", "token_files": "the sources "
    "are read", "prompts": "prompt is used", "subdomain": "a domain is one number", "resume": "no "
    "run is continued", "show": "no documents are shown", "html": "no page is written",
    "only": "all", "extra": "no more options"}


def command():
    """The command that runs, such as train.py or, for a package, -m experiments."""
    file = Path(sys.argv[0])
    return f"-m {file.parent.name}" if file.name == "__main__.py" else file.name


@lru_cache
def verbs():
    """{verb: (file, what stands behind the verb)}, as the docstrings of the main files have it."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        form = r"^    python (\w+\.py) ([a-z]+) (\S.*?)(?:  |$)"
        for file, verb, rest in re.findall(form, path.read_text(encoding="utf-8"), re.M):
            found.setdefault(verb, (file, rest))
    return found


def check_words(words):
    """UserError for a slip in the words of a command line; returns them."""
    if (ROOT / command()).is_file():
        check_verb(words)
    for word, after in pairwise([*words, ""]):
        check_spaces(word, after, words)
    return words


def check_verb(words):
    """UserError for a verb that is another file's, is not ours but means one, or comes too late."""
    bare = [word for word in words if not word.startswith("-")]
    word = bare[0] if bare else ""
    is_path = os.path.exists(word) or (ROOT / f"configs/{word}.py").is_file()
    if is_path or not word.isalpha():
        return
    verb = meant_verb(word)
    if not verb or (command(), verb) == ("data.py", "show"):  # its --show is another thing
        return
    rest = list(words)
    rest.remove(word)
    if verb == "--resume":
        file = command()
        rest = rest or ["RUN"]
        behind = shlex.join([f"--resume={rest[0]}", *rest[1:]])
    elif verb in verbs():
        file, form = verbs()[verb]
        is_in_place = words[0] == word or file == "eval.py"
        if (file, verb) == (command(), word) and is_in_place:
            return
        behind = f"{verb} {shlex.join(rest) or form}"
    else:  # a file
        is_tuning = (command(), verb) == ("adapt.py", "train")
        file = command() if is_tuning else f"{verb}.py"
        behind = shlex.join(rest) or "--help"
    raise UserError(f"{word}: {file} does this; write python {file} {behind}")


def meant_verb(word):
    """Our verb for a word, or the stem of the file that does it, or --resume; "" if none is."""
    word = word.lower()
    verb = VERBS.get(word, word)
    if verb == "--resume" or (ROOT / f"{verb}.py").is_file():
        return verb
    near = difflib.get_close_matches(verb, verbs(), n=1, cutoff=0.8)
    return near[0] if near else ""


def check_spaces(word, after, words):
    """UserError for an option with a space beside its =."""
    key, equals, value = word.partition("=")
    if not key.startswith("--") or value:
        return
    if not equals and after.startswith("="):
        behind = words[words.index(word) + 2:]
        value = after[1:] or "".join(behind[:1])
    elif equals and re.match(r"[^-/]", after) and not os.path.exists(after):
        is_word = after in verbs() or "/" in after or after.endswith((".py", ".json"))
        value = "" if is_word else after
    if value:
        option = shlex.quote(f"{key}={value}")
        raise UserError(f"{word} {after}: no space may stand beside the =; write {option}")


def checked_text(text, place):
    """The text of an option; "~/" is the home directory. place: "--key: ".

    UserError for quotes that the shell has left, for "None", and for no data_dir.
    """
    key = place.strip("-: ")
    if key in FREE:
        return text
    if re.fullmatch(r"(['\"]).*\1", text, re.DOTALL):
        raise UserError(f"--{key}={text}: leave out the inner quotes; write --{key}={text[1:-1]}")
    is_none = text.lower() in NONE
    if is_none and key in EMPTY:
        raise UserError(f"--{key}={text}: for none, leave the value empty; write --{key}= "
                        f"({EMPTY[key]})")
    if is_none or (key == "data_dir" and not text):
        raise UserError(f"--{key}={text}: a name is needed; leave --{key} out, or write "
                        f"--{key}=NAME")
    return os.path.expanduser(text) if text.startswith("~/") else text
