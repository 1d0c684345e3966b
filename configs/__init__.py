"""The one config loader: defaults < config files, left to right < --key=value.

A config file holds flat assignments of plain values, `lr = 3e-3  # why`, and nothing else. It is
parsed and never run. A run's saved config.json can be used as a config file too. The keys are the
fields of frozen dataclasses, the schemas; each is defined in the module that uses it. One more
key, adds_to, names the file that a variant adds to, so that it is not used without it.
"""

import dataclasses
import inspect
import math
import os
import sys
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Literal, get_args, get_origin

from support.config_text import literal, read_assignments
from support.files import UserError, read_json
from support.hints import (check_base, example_of, missing_value, no_config_file, unknown_key,
                           unused_key)
from support.slips import ROOT as ROOT, checked_text, command


def setting(default, help, least=None):
    """A field of a schema: its default, the sentence that --help prints, the smallest value."""
    metadata = {"help": help, "least": least}
    if isinstance(default, dict | list):  # each instance gets its own copy
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(argv, *schemas, other=(), siblings=(), base=()):
    """Read a command line, config files and options, into a tuple: an instance per schema.

    A later file overrides an earlier one, and an option overrides every file. Config files may
    also hold the keys of `other` and `siblings`, schemas of other commands; the keys of `siblings`
    may be options too, so that the command line of train.py also fits data.py, which says what it
    does not use. base: {key: value} under all files. --help prints every key and exits.
    Raises UserError for an unknown key, a wrong type, a missing file or code in a file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(schemas))
        sys.exit(0)
    fields = fields_of(schemas)
    known = fields_of(other) | fields_of(siblings) | fields
    files = [Path(word) for word in argv if not word.startswith("-")]

    options = {}
    for word, following in zip_longest(argv, argv[1:]):
        if word.startswith("-"):
            key, value = read_option(word, following, fields_of(siblings) | fields, known)
            options[key] = value
    unused = [f"--{key}" for key in options if key not in fields and key not in base]
    if unused and not files:
        raise unused_key(unused[0].removeprefix("--"), "--")

    values = dict(base)
    for number, path in enumerate(files):
        values |= read_config_file(path, known, files[:number])
    values |= options  # after all files: the place of an option among the words does not matter
    configs = []
    for schema in schemas:
        own = {name: values[name] for name in fields_of([schema]) if name in values}
        configs.append(schema(**own))  # a schema may check its values in __post_init__
    if unused:
        print(f"{command()} does not use {', '.join(unused)}")
    return tuple(configs)


def fields_of(schemas):
    """Returns {key: dataclass field} of all schemas. A key must belong to one schema only."""
    fields = {}
    for schema in schemas:
        for field in dataclasses.fields(schema):
            assert field.name not in fields, f"{field.name}: a key of two schemas"
            fields[field.name] = field
    return fields


# ---- Config files --------------------------------------------------------------------------------

def read_config_file(path, known, before):
    """Returns {key: value} of what a config file sets; before: the config files to its left."""
    if not os.path.isfile(path):  # unlike path.is_file(), it takes names of any length
        raise no_config_file(path, known)
    if path.suffix == ".json":
        return read_saved_config(path, known)
    values = {}
    for line, key, value in read_assignments(path):
        place = f"{path}:{line}: "
        if key == "adds_to":
            check_base(path, value, before, place)
        elif key in known:
            values[key] = checked(known[key], value, place)
        else:
            raise unknown_key(key, known, place)
    return values


def read_saved_config(path, known):
    """The same for a run's config.json. It may be of another version: unknown keys are ignored."""
    saved = read_json(path)
    if "model_type" in saved or not saved.keys() & known.keys():
        raise UserError(f"{path}: not the settings of a run; name a config file or RUN/config.json")
    if "run_dir" in known and "method" in saved.keys() - known.keys():
        raise unused_key("method", f"{path}: ")  # a tuning is no run of train.py
    return {key: checked(known[key], value, f"{path}: ")
            for key, value in saved.items() if key in known}


# ---- Options -------------------------------------------------------------------------------------

def read_option(word, following, fields, known):
    """Returns (key, value) of a --key=value word; --key alone sets a flag to true."""
    if not word.startswith("--"):
        raise UserError(f"{word}: an option has the form --key=value: -{word}")
    key, equals, text = word[2:].partition("=")
    if key not in fields:
        raise unused_key(key, "--") if key in known else unknown_key(key, fields, "--")
    kind = fields[key].type
    if not equals:
        is_flag = kind is bool or get_origin(kind) is Literal and "true" in get_args(kind)
        if not is_flag or str(following).lower() in ("true", "false"):
            raise missing_value(fields[key], following)
        text = "true"
    return key, checked(fields[key], parse(text, kind, f"--{key}: "), "--")


def parse(text, kind, place):
    """Returns the text as a value of `kind`, or unchanged: then checked() reports it."""
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if get_origin(kind) is Literal:
        return text.lower()
    if kind is str:
        return checked_text(text, place)
    readers = [int, float] if kind in (int, float) else [partial(literal, place=place)]
    for reader in readers:
        try:
            return reader(text)
        except UserError:  # a dict that holds a key twice
            raise
        except ValueError:
            continue
    return text


# ---- Checks --------------------------------------------------------------------------------------

def checked(field, value, place):
    """Returns the value if it has the field's type. `place` begins the error's message."""
    kind = field.type
    if kind is float and type(value) is int and abs(value) < 10**300:  # lr = 1
        value = float(value)
    if get_origin(kind) is Literal and type(value) is bool:  # compile = True
        value = str(value).lower()
    place += f"{field.name}={shown(value)}: {field.name} "
    if not has_type(value, kind):
        given = shown(value) if get_origin(kind) is Literal else type(value).__name__
        raise UserError(f"{place}takes {type_name(kind)}, not {given}{example_of(field, value)}")
    if kind is int and abs(value) >= 2**63 or kind is float and not math.isfinite(value):
        raise UserError(f"{place}must be a finite number of 64 bits")
    least = field.metadata["least"]
    if least is not None and value < least:
        raise UserError(f"{place}must be at least {least}")
    return value


def shown(value):
    """A value in one short line, for messages."""
    if type(value) is int and abs(value) >= 10**60:
        return "a very large number"  # Python refuses to print one of over 4,300 digits
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


def has_type(value, kind):
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is dict:
        _, entry_kind = get_args(kind)
        return type(value) is dict and all(type(key) is str and isinstance(entry, entry_kind)
                                           for key, entry in value.items())
    return type(value) is kind  # not isinstance: in Python True is an int


def type_name(kind):
    """The type as messages and --help show it: int, linear|cosine, dict[str, float]."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    return str(kind) if get_origin(kind) is dict else kind.__name__


# ---- Output --------------------------------------------------------------------------------------

def help_text(schemas):
    """The command's docstring, then every key with its default, type and sentence."""
    lines = [(sys.modules["__main__"].__doc__ or "").strip()]
    for schema in schemas:
        lines += ["", f"{schema.__name__}: {inspect.getdoc(schema)}"]
        default = schema()
        for field in dataclasses.fields(schema):
            value = getattr(default, field.name)
            lines.append(f"  --{field.name}={value}  ({type_name(field.type)})")
            lines.append(f"      {field.metadata['help']}")
    return "\n".join(lines)


def flat(*configs):
    """Returns {key: value} of several configs, as config.json holds it."""
    merged = {}
    for config in configs:
        merged.update(dataclasses.asdict(config))
    return merged
