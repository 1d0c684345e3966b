"""JSON, digests, writes that survive a crash, and the rows of a log."""

import base64
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

from support.text import UserError, json_type, parsed_json, read_bytes


def file_sha256(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """Returns the JSON object in a file as a dict; UserError if the file holds anything else."""
    value = parsed_json(read_bytes(path), f"{path}:1", "restore the file")
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {json_type(value)}, not a JSON object")
    return value


def to_json(value, indent=None):
    """A value as JSON text. JSON has no NaN and no Infinity: null stands in for them.

    It has no bytes either, which a row of a table may hold: base64 stands in for those.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=base64_of)
    except ValueError:
        return json.dumps(without_nan(value), indent=indent, allow_nan=False, default=base64_of)


def base64_of(content):
    return base64.b64encode(content).decode()


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path, value):
    """Write a JSON file so that a crash leaves the old file or the new one, never a part."""
    replace_file(path, (to_json(value, indent=1) + "\n").encode())


def write_rows(path, rows):
    """Write JSON lines in the same way."""
    replace_file(path, "".join(to_json(row) + "\n" for row in rows).encode())


def replace_file(path, content):
    """Give a file this content, bytes, so that a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with named_in_errors(path):
            temporary.write_bytes(content)
            fsync(temporary)  # first the content, then the name
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def named_in_errors(path):
    """Around code that writes a file: an error names it, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(path):
    """Wait until a file's content, or the list of a directory's files, is on the disk.

    Some network disks cannot do it for a directory. Nothing is wrong with what was written there,
    so the work goes on.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (error.errno in CANNOT_SYNC and os.path.isdir(path)):
            raise
    finally:
        os.close(handle)


CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM)


def fsync_all(folder):
    """The same for a folder and everything in it."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def link_or_copy(file, target):
    """Give a file a second name for the same bytes, or copy it where the disk has no such links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
        fsync(target)


def free_name(path):
    """The path `path` if nothing has that name, else the first of path-2, path-3, ..."""
    name = str(path)
    number = 1
    while os.path.lexists(name):
        number += 1
        name = f"{path}-{number}"
    return Path(name)


def here(path):
    """Returns " (in FOLDER)", where a relative path was looked for; "" for an absolute path."""
    return "" if Path(path).is_absolute() else f" (in {Path.cwd()})"


def near_file(path):
    """Returns "did you mean FILE?" of a name that is alike, beside a path that leads nowhere."""
    path = Path(path)
    names = [file.name for file in path.parent.glob("[!.]*")]
    for name in difflib.get_close_matches(path.name, names, n=1, cutoff=0.75):
        return f"did you mean {path.with_name(name)}?"
    return ""


def disk_remedy(error):
    """What a user can do about a write that failed; error: an OSError, or its message."""
    if re.search("(out of|allocate) memory", str(error)):
        return ("memory, not the disk, has run out: end other programs; data that is being built "
                "takes less with --workers=1")
    if is_full(error):
        return "free some space, then run the same command again"
    return "see that the disk is there and may be written, then run the same command again"


def is_full(error):
    """True for the error of a disk, a quota or a file system that has no room; see disk_remedy."""
    # "unexpected pos": torch.save noticed that not all was written, and says no more
    full = ("No space left", "quota exceeded", "File too large", "unexpected pos")
    return any(words in str(error) for words in full)


# ---- A log ---------------------------------------------------------------------------------------

def log_rows(run, name="metrics.jsonl"):
    """Yields the rows (dicts) of a run's log, each with its kind (text) and step (int).

    A line that is no such row is skipped, such as one that a crash cut short.
    """
    rows, _ = read_log(run, name)
    yield from rows


def read_log(run, name):
    """Returns (rows, skipped): the rows of a run's log, and how many of its lines are none."""
    log = Path(run) / name
    rows = []
    skipped = 0
    if not log.is_file():
        return rows, skipped
    for line in log.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            is_row = isinstance(row["kind"], str) and type(row["step"]) is int and row["step"] >= 0
        except (ValueError, KeyError, TypeError, RecursionError):
            is_row = False
        if is_row:
            rows.append(row)
        elif line.strip():
            skipped += 1
    return rows, skipped


def rows_until(rows, step):
    """The rows of a log that stand when a run goes on after `step`."""
    return [row for row in rows if row["step"] <= step and row["kind"] != "end"]
