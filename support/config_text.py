"""The text of a config file: parsed and never run, so that a config from a stranger is harmless.

What Python itself would let pass without a word is an error here: a key that is set twice, in a
file or in a dict.
"""

import ast

from support.hints import not_a_config
from support.text import UserError, read_text

FORM = "a config file holds only lines of the form `key = value`, and the value must be a literal"


def read_assignments(path):
    """Yields (line number, key, value) of each assignment in a config file.

    Each value must be a literal; any other code, and a key that is set twice, is a UserError.
    """
    if other := not_a_config(path):
        raise UserError(f"{path}: {other}")
    lines = {}
    for statement in parsed(read_text(path), path).body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # the docstring
        place = f"{path}:{statement.lineno}: "
        try:
            [target] = statement.targets
            key = target.id
            value = literal(statement.value, place)
        except UserError:
            raise
        except (AttributeError, ValueError):
            raise UserError(place + FORM) from None
        if key in lines:
            raise UserError(f"{place}{key} is set twice; delete this line or line {lines[key]}")
        lines[key] = statement.lineno
        yield statement.lineno, key, value


def parsed(text, path):
    """The syntax tree of a config file."""
    try:
        return ast.parse(text, str(path))
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno or 1}: {error.msg}; {FORM}") from None
    except (ValueError, MemoryError, RecursionError) as error:  # NUL bytes; 10,000 brackets
        reason = str(error) or "too many brackets in each other"
        raise UserError(f"{path}: Python cannot parse it ({reason}); {FORM}") from None


def literal(node, place):
    """The value of a syntax tree, or of text, that consists of numbers, strings, lists and dicts.

    Raises ValueError for anything else, such as a call, and UserError for a key that a dict holds
    twice; place: begins its message.
    """
    try:
        if isinstance(node, str):
            node = ast.parse(node.strip(), mode="eval").body
        value = ast.literal_eval(node)
    except (TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"no literal ({error})") from None
    if keys := twice(node):
        raise UserError(f"{place}the key {keys[0]} is there twice; delete one")
    return value


def twice(node):
    """The keys that a dict in a syntax tree holds twice; Python would keep the last alone."""
    found = []
    for each in ast.walk(node):
        keys = [ast.unparse(key) for key in getattr(each, "keys", []) if key]
        found += [key for key in keys if keys.count(key) > 1]
    return found
