"""The one config loader: defaults < config files, left to right < --key=value.

A config file is flat assignments of plain values, `lr = 3e-3  # why`, and nothing else: it is
parsed, never run. A run's saved `config.json` serves as a config file too. Which keys exist, their
types, their defaults and the sentences of --help stand in frozen dataclasses that the modules own.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import sys
import typing
from pathlib import Path

from support.files import UserError

HOUSE = Path(__file__).resolve().parent.parent

PARTS = ("corpus", "scaling", "support")
ROOMS = ("model.py", "data.py", "eval.py", "train.py", "adapt.py", "scaling/plan.py")


def setting(default, help):
    """A field of a config dataclass: its default, and the sentence that --help prints."""
    if isinstance(default, dict | list):  # a fresh copy for each instance
        return dataclasses.field(default_factory=lambda: type(default)(default),
                                 metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def load_config(argv, *schemas):
    """Read `argv`, config files and --key=value words, into one frozen instance of each schema.

    Raises UserError for an unknown key (with the nearest name), a wrong type or a missing file.
    --help prints every field with its type, default and sentence, and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(*schemas))
        sys.exit(0)
    fields = {field.name: field for schema in schemas for field in dataclasses.fields(schema)}
    assert len(fields) == sum(len(dataclasses.fields(s)) for s in schemas), "a key in two schemas"
    values = {}
    for word in argv:
        if not word.startswith("-"):
            values.update(read_config_file(Path(word), fields))
    for word in argv:
        if word.startswith("-"):
            values.update(read_option(word, fields))
    return tuple(schema(**{field.name: values[field.name] for field in dataclasses.fields(schema)
                           if field.name in values}) for schema in schemas)


def read_config_file(path, fields):
    """The values that a config file, or a run's saved config.json, gives to `fields`."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file; those that come along lie in configs/")
    if path.suffix == ".json":
        try:
            saved = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: not valid JSON of an object ({error})") from None
        return {key: checked(fields[key], value, f"{path}: ") for key, value in saved.items()
                if key in fields}
    values, known = {}, None
    for line, key, value in read_assignments(path):
        if key in fields:
            values[key] = checked(fields[key], value, f"{path}:{line}: ")
            continue
        known = known or house_keys()  # read once, and only where a key of another room comes
        if key not in known:  # one file serves every command: another room's key is fine
            raise unknown_key(key, known, f"{path}:{line}: ")
    return values


def read_assignments(path):
    """(line, key, value) of every assignment; anything but `key = literal` is an error."""
    try:
        statements = ast.parse(path.read_text(), str(path)).body
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error})") from None
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        try:
            [target] = statement.targets
            yield statement.lineno, target.id, ast.literal_eval(statement.value)
        except (AttributeError, ValueError, TypeError):
            raise UserError(f"{path}:{statement.lineno}: a config file holds only lines of the "
                            "form `key = value`, with a plain value") from None


def read_option(word, fields):
    """One --key=value word of the command line; --flag alone means true."""
    key, equals, text = word.removeprefix("--").partition("=")
    if not word.startswith("--"):
        raise UserError(f"{word}: an option is written --key=value")
    if key not in fields:
        if key in house_keys():
            raise UserError(f"--{key}: this command does not use {key}; --help lists its keys")
        raise unknown_key(key, fields, "--")
    kind = fields[key].type
    if not equals and kind in (int, float, str):
        raise UserError(f"--{key}: {key} needs a value, --{key}=...")
    return {key: checked(fields[key], parse(kind, text if equals else "true"), "--")}


def parse(kind, text):
    """`text` read as `kind`, or left as it is where it does not read so: `checked` then says it."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
        if typing.get_origin(kind) is dict:
            return ast.literal_eval(text)
    except (KeyError, ValueError, SyntaxError, TypeError):
        return text
    return text.lower() if typing.get_origin(kind) is typing.Literal else text


def checked(field, value, place):
    """`value` if it has the field's type; an int is accepted for a float. Raises UserError."""
    kind = field.type
    if kind is float and type(value) is int:
        return float(value)
    if typing.get_origin(kind) is typing.Literal:
        value = str(value).lower() if type(value) is bool else value  # compile = True
        if value in typing.get_args(kind):
            return value
        wanted = "one of " + ", ".join(map(str, typing.get_args(kind)))
    elif typing.get_origin(kind) is dict and type(value) is dict:
        _, wanted = typing.get_args(kind)
        if all(type(key) is str and isinstance(entry, wanted) for key, entry in value.items()):
            return value
        wanted = f"names, each with a {getattr(wanted, '__name__', wanted)}"
    elif type(value) is kind:
        return value
    else:
        wanted = f"{type_name(kind)}, not {type(value).__name__}"
    raise UserError(f"{place}{field.name}={value}: {field.name} takes {wanted}")


def unknown_key(key, known, place):
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists the keys"
    return UserError(f"{place}{key}: unknown key{hint}")


def house_keys():
    """Every key of every room's config class, read from the sources without importing them."""
    rooms = [HOUSE / room for room in ROOMS if (HOUSE / room).is_file()]
    classes = [node for room in rooms for node in ast.parse(room.read_text()).body
               if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    return {item.target.id for node in classes for item in node.body
            if isinstance(item, ast.AnnAssign)}


def sentences(schema):
    """{field: the sentence under it} of a dataclass, read from its source."""
    body = ast.parse(inspect.getsource(schema)).body[0].body
    return {field.target.id: " ".join(text.value.value.split())
            for field, text in itertools.pairwise(body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}


def type_name(kind):
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return (typing.get_origin(kind) or kind).__name__


def help_text(*schemas):
    lines = [(sys.modules["__main__"].__doc__ or "").strip()]
    for schema in schemas:
        about = sentences(schema)
        lines += ["", f"{schema.__name__}: {inspect.getdoc(schema)}"]
        for field in dataclasses.fields(schema):
            default = (field.default if field.default is not dataclasses.MISSING
                       else field.default_factory())
            lines += [f"  --{field.name}={default}  ({type_name(field.type)})",
                      f"      {field.metadata.get('help') or about[field.name]}"]
    return "\n".join(lines)


def flat(*configs):
    """{key: value} of several configs, as config.json holds it."""
    return {key: value for config in configs for key, value in dataclasses.asdict(config).items()}
