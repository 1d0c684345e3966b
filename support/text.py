"""Text and JSON from a user: UTF-8 alone, and a UserError for anything else.

Every text that a user gives is read by `decoded`, and every JSON by `parsed_json`. json.loads on
bytes would guess the encoding line by line, and read UTF-16 as other letters without an error.
"""

import json
import re
from collections import Counter
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend; the message names the value, its place and the remedy."""


# The first bytes of what is not UTF-8. The mark of UTF-32 begins with that of UTF-16.
SIGNATURES = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF": "PDF"}

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8: Windows writes it; it is no text
LFS_POINTER = b"version https://git-lfs"

MOST_LEVELS = 200  # of lists and objects in each other: code that walks through them is recursive


def read_bytes(path):
    """A file's content; UserError if it cannot be read."""
    try:
        refuse_pointer(path)
        return Path(path).read_bytes()
    except PermissionError:  # a file without read permission is not damaged
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def refuse_pointer(path):
    """UserError for the few lines that stand for a file which Git LFS has not fetched yet."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{path}: a Git LFS pointer, and not the file; fetch it: git lfs pull")


def read_text(path):
    """The text in a UTF-8 file."""
    return decoded(read_bytes(path), f"{path}:1")


def decoded(content, place):
    """The text of bytes in UTF-8, without a byte-order mark; place: file:line of the first byte.

    Raises UserError with the line and what the bytes seem to be.
    """
    found = other_encoding(content[:1000])
    try:
        if not found:
            return content.decode().removeprefix("\ufeff")
        begin = 0
    except UnicodeDecodeError as error:
        found = encoding_at(content, error)
        begin = error.start
    remedy = "convert the file to UTF-8"
    if found.startswith("UTF"):
        remedy += f", such as by: iconv -f {found.split()[0]} -t UTF-8 OLD > NEW"
    elif found.startswith("another"):
        remedy += ", if it is Windows-1252 by: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
    place = lines_after(place, content.count(b"\n", 0, begin))
    raise UserError(f"{place}: not UTF-8 but {found}; {remedy}")


def lines_after(place, lines):
    """The place so many lines after file:line, or after file:line.K, the Kth value of a line."""
    file, _, line = place.rpartition(":")
    return f"{file}:{int(line.partition('.')[0]) + lines}" if lines else place


def other_encoding(head):
    """The name of the UTF-16 or UTF-32 that a text begins with; None if it seems to be UTF-8."""
    if b"\0" not in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None  # soon, as every line of JSON comes here
    name = signature_of(head)
    if name and name.startswith("UTF"):
        return name
    # without a mark: in UTF-16 every other byte of a Western text is 0, and only every other one
    even = head[0::2].count(0)
    odd = head[1::2].count(0)
    if max(even, odd) > max(1, len(head) / 6) and min(even, odd) < max(even, odd) / 4:
        return ("UTF-16LE" if odd > even else "UTF-16BE") + " without a byte-order mark"
    return None


def signature_of(head):
    """The name in SIGNATURES of what begins with these bytes; None if they are none of them."""
    return next((name for mark, name in SIGNATURES.items() if head.startswith(mark)), None)


def encoding_at(content, error):
    """What bytes seem to be that a UnicodeDecodeError has shown not to be UTF-8."""
    name = signature_of(content)
    if name:
        return name
    byte = content[error.start:error.start + 1]
    return (f"another encoding (byte {byte[0]:#04x} at byte {error.start}; in Windows-1252 it is "
            f"{byte.decode('cp1252', 'replace')})")


def parsed_json(content, place, remedy="correct or delete it"):
    """The value of JSON in UTF-8 bytes; place: file:line of the first byte.

    Raises UserError for what json.loads would let pass: a key that an object holds twice, of which
    it would drop one, and lists in lists without end.
    """
    text = decoded(content, place).rstrip("\r\n")
    try:
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > MOST_LEVELS and is_too_deep(value):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{place}: lists or objects in each other, over {MOST_LEVELS} levels; "
                        f"{remedy}") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\r" in text:
            raise UserError(f"{place}: its lines end with CR alone; convert the file: "
                            "tr '\\r' '\\n' < OLD > NEW") from None
        raise UserError(f"{lines_after(place, error.lineno - 1)}: not JSON ({error.msg}, character "
                        f"{error.colno}); {remedy}") from None
    except ValueError as error:  # a key that is there twice, a number of 5,000 digits
        reason = str(error).partition(";")[0]
        raise UserError(f"{place}: not JSON that can be read ({reason}); {remedy}") from None
    return value


def object_of(pairs):
    """A JSON object as a dict; ValueError for a key that it holds twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} is there twice")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=object_of)  # json.loads would make one for each line


def is_too_deep(value):
    """Whether lists and objects lie in each other over more than MOST_LEVELS levels."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        inner = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        if not inner:
            return False
        level = inner
    return True


LIKE_ANOTHER = re.compile(r"(?i)[-+.e\d]+|true|false|null|none|nan")  # texts


def shown(value):
    """A JSON value as it stands in its file, for messages; a string like a number is called one."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text if len(text) <= 60 else text[:57] + "..."
    is_like = isinstance(value, str) and LIKE_ANOTHER.fullmatch(value)
    return f"{text} (a string)" if is_like else text


def json_type(value):
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false",
             type(None): "null", bytes: "bytes"}
    return names.get(type(value), "a number")


# ---- Showing it ----------------------------------------------------------------------------------

def counted(count, noun):
    """Such as "1 line" and "2,000 lines"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def noted(count, what):
    """Such as "2 files cut off" and "1 file cut off"; `what` begins with the plural."""
    if count == 1:
        what = re.sub(r"^((?:\w+ )?\w+?)s\b", r"\1", what)
    return f"{count:,} {what}"


BOLD_GREEN, REVERSE, PLAIN = "\033[1;32m", "\033[7m", "\033[0m"
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"  # all but tab and newline


def harmless(text, ours=()):
    """`text` with escapes such as \\x1b for the control characters that a terminal would obey.

    Documents, answers and file names may hold them. ours: sequences that we print ourselves.
    """
    codes = "|".join([*map(re.escape, ours), CONTROL])
    return re.sub(codes, lambda code: code[0] if code[0] in ours else repr(code[0])[1:-1], text)
