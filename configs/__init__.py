"""The one config loader: defaults < config files, left to right < --key=value.

A config file holds flat assignments of plain values, `lr = 3e-3  # why`, and nothing else. It is
parsed and never run, so that a config from a stranger is harmless. A run's saved config.json can
be used as a config file too. The keys are the fields of frozen dataclasses, the schemas; each is
defined in the module that uses it.
"""

import ast
import dataclasses
import difflib
import inspect
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

from support.files import UserError, read_json, read_text

ROOT = Path(__file__).resolve().parent.parent  # the repository


def setting(default, help):
    """A field of a schema: its default and the sentence that --help prints."""
    metadata = {"help": help}
    if isinstance(default, dict | list):  # each instance gets its own copy
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def load_config(argv, *schemas, other=()):
    """Read the words of a command line, config files and options, into one instance per schema.

    A later file overrides an earlier one, and an option overrides every file. `other` are schemas
    of other commands: a config file may hold their keys without a use here.
    Returns the instances as a tuple. --help prints every key and exits.
    Raises UserError for an unknown key, a wrong type, a missing file or code in a file.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(schemas))
        sys.exit(0)
    fields = fields_of(schemas)
    known = set(fields) | set(fields_of(other))

    values = {}
    for word in argv:
        if not word.startswith("-"):
            values.update(read_config_file(Path(word), fields, known))
    for word in argv:  # after all files: the place of an option among the words does not matter
        if word.startswith("-"):
            key, value = read_option(word, fields, known)
            values[key] = value

    configs = []
    for schema in schemas:
        own = {name: values[name] for name in fields_of([schema]) if name in values}
        configs.append(schema(**own))  # a schema may check its values in __post_init__
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

def read_config_file(path, fields, known):
    """Returns {key: value} for the keys of `fields` that a config file or a config.json sets."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file; configs/ holds those that come with nanOLMo")
    if path.suffix == ".json":
        return read_saved_config(path, fields)
    values = {}
    for line, key, value in read_assignments(path):
        place = f"{path}:{line}: "
        if key in fields:
            values[key] = checked(fields[key], value, place)
        elif key not in known:
            raise unknown_key(key, known, place)
    return values


def read_saved_config(path, fields):
    """The same for a run's config.json. It may be of another version: unknown keys are ignored."""
    values = {}
    for key, value in read_json(path).items():
        if key in fields:
            values[key] = checked(fields[key], value, f"{path}: ")
    return values


def read_assignments(path):
    """Yields (line number, key, value) of each assignment in a config file.

    The file is parsed, and each value must be a literal; any other code is a UserError.
    """
    text = read_text(path)
    try:
        statements = ast.parse(text, str(path)).body
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # NUL bytes, a deep expression
        raise UserError(f"{path}: not a config file ({error})") from None
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        try:
            [target] = statement.targets
            value = ast.literal_eval(statement.value)  # numbers, strings, dicts: never a call
            yield statement.lineno, target.id, value
        except (AttributeError, ValueError, TypeError, RecursionError):
            raise UserError(f"{path}:{statement.lineno}: a config file holds only lines of the "
                            "form `key = value`, and the value must be a literal") from None


# ---- Options -------------------------------------------------------------------------------------

def read_option(word, fields, known):
    """Returns (key, value) of a --key=value word; --key alone sets a flag to true."""
    if not word.startswith("--"):
        raise UserError(f"{word}: options have the form --key=value")
    key, equals, text = word[2:].partition("=")
    if key not in fields and key in known:
        raise UserError(f"--{key}: this command does not use {key}; --help lists the keys it uses")
    if key not in fields:
        raise unknown_key(key, fields, "--")
    kind = fields[key].type
    if not equals:
        if kind in (int, float, str):
            raise UserError(f"--{key}: the value is missing; write --{key}=VALUE")
        text = "true"
    return key, checked(fields[key], parse(text, kind), "--")


def parse(text, kind):
    """Returns the text as a value of `kind`, or unchanged: then checked() reports it."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if get_origin(kind) is dict:
            return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text
    if get_origin(kind) is Literal:
        return text.lower()
    return text


# ---- Checks --------------------------------------------------------------------------------------

def checked(field, value, place):
    """Returns the value if it has the field's type. `place` begins the error's message."""
    kind = field.type
    if kind is float and type(value) is int:  # lr = 1
        return float(value)
    if get_origin(kind) is Literal and type(value) is bool:  # compile = True
        value = str(value).lower()
    if has_type(value, kind):
        return value
    given = value if get_origin(kind) is Literal else type(value).__name__
    raise UserError(f"{place}{field.name}={value}: {field.name} takes {type_name(kind)}, "
                    f"not {given}")


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
    if get_origin(kind) is dict:
        return str(kind)
    return kind.__name__


def unknown_key(key, known, place):
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
    return UserError(f"{place}{key}: unknown key; {hint}")


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
