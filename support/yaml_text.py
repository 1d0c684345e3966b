"""The YAML that official OLMo writes, read without a package: mappings, lists and plain values.

Values stay texts, as who asks for one knows its type. What YAML has besides (anchors, tags, blocks
of text) is an error with its line, and nothing is guessed.
"""

import re
from collections import deque
from typing import NamedTuple

from support.text import UserError, read_text

MOST_LEVELS = 50  # a config of OLMo has five
MOST_FOLDED = 200  # lines of one value, which PyYAML folds at 80 characters
KEY = re.compile(r"""(?:"([^"]*)"|'([^']*)'|([^\s"'\[{&*!|>%@#-][^#"']*?)):(?:\s+(.*))?$""")
COMMENT = re.compile(r"\s#.*$")
QUOTED = re.compile(r"""(?:"[^"\\]*"|'(?:[^']|'')*')(?:\s+#.*)?$""")


class Line(NamedTuple):
    """A line that is neither empty nor a comment."""

    place: str  # file:line
    indent: int
    text: str


def read_yaml(path):
    """The mapping in a YAML file: dicts and lists of texts, with "true", "false" and None."""
    lines = deque()
    for number, text in enumerate(read_text(path).splitlines(), 1):
        content = text.strip()
        if "\t" in text[:len(text) - len(text.lstrip())]:
            raise UserError(f"{path}:{number}: begins with a tab, which YAML forbids; use spaces")
        if content and not content.startswith("#") and content != "---":
            lines.append(Line(f"{path}:{number}", len(text) - len(text.lstrip(" ")), content))
    if not lines:
        return {}
    value = block(lines, lines[0].indent, 0)
    if lines:
        raise fault(lines[0])
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a list and no keys")
    return value


def block(lines, indent, level):
    """Take the mapping or the list whose lines begin at `indent` off the front of `lines`."""
    if level > MOST_LEVELS:
        raise UserError(f"{lines[0].place}: over {MOST_LEVELS} levels in each other")
    if is_item(lines[0]):
        return items(lines, indent, level)
    found = {}
    while lines and lines[0].indent == indent and not is_item(lines[0]):
        line = lines.popleft()
        match = KEY.match(line.text)
        if not match:
            raise fault(line)
        key = next(group for group in match.groups()[:3] if group is not None)
        if key in found:
            raise UserError(f"{line.place}: {key} is there twice; delete one of the lines")
        rest = without_comment(match[4] or "")
        if rest:
            found[key] = value_of(whole_text(rest, lines, indent), line)
        else:
            found[key] = nested(lines, indent, level)
    return found


def nested(lines, indent, level):
    """The value of a key without one on its line: the lines below, or None."""
    if not lines:
        return None
    if lines[0].indent > indent or lines[0].indent == indent and is_item(lines[0]):
        return block(lines, lines[0].indent, level + 1)
    return None


def items(lines, indent, level):
    """Take the list whose lines begin with a dash at `indent` off the front of `lines`."""
    found = []
    while lines and lines[0].indent == indent and is_item(lines[0]):
        line = lines.popleft()
        rest = line.text[1:].lstrip()
        if not rest or KEY.match(rest) or rest.startswith("- "):
            if rest:  # a mapping or a list that begins on the line of its dash
                deeper = indent + len(line.text) - len(rest)
                lines.appendleft(Line(line.place, deeper, rest))
            found.append(nested(lines, indent + 1, level))
        else:
            rest = whole_text(without_comment(rest), lines, indent)
            found.append(value_of(rest, line))
    return found


def is_item(line):
    return line.text == "-" or line.text.startswith("- ")


def whole_text(text, lines, indent):
    """A value with the rest of it, which PyYAML writes on deeper lines if the text is wide."""
    first = len(lines)
    while lines and lines[0].indent > indent:
        if first - len(lines) > MOST_FOLDED:
            raise UserError(f"{lines[0].place}: a value of over {MOST_FOLDED} lines; shorten it")
        is_open = text[0] in "\"'" and not QUOTED.match(text)
        if not is_open and KEY.match(lines[0].text):
            raise fault(lines[0])
        text += " " + lines.popleft().text
    return text


def without_comment(text):
    return text if QUOTED.match(text) and text[-1] in "\"'" else COMMENT.sub("", text).rstrip()


def value_of(text, line):
    """A value that stands on one line: a text, a list in brackets, "true", "false" or None."""
    if text == "{}":
        return {}
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1].strip()
        parts = inner.split(",") if inner else []
        return [value_of(part.strip(), line) for part in parts]
    if text[0] in "\"'":
        if not QUOTED.match(text) or text[-1] != text[0]:
            raise fault(line)
        return text[1:-1].replace("''", "'") if text[0] == "'" else text[1:-1]
    if text[0] in "[{&*!|>%@":
        raise fault(line)
    if text.lower() in ("true", "false"):
        return text.lower()
    return None if text.lower() in ("null", "~") else text


def fault(line):
    return UserError(f"{line.place}: {line.text[:60]!r} is not YAML as OLMo writes it (key: value, "
                     "or - value)")
