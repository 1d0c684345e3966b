"""JSON, digests, writes that survive a crash, and a user's mistake in one line."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: its message names the value, its place and the remedy."""


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """The JSON object in a file; UserError names the file that holds none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def write_json(path, value):
    """Write a JSON file; a crash leaves the old one or the new one, never half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    fsync(aside)
    aside.replace(path)


def fsync(path):
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def run_main(main):
    """Run `main(argv)`; a user's mistake or a full disk is one line, a bug keeps its traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # of `... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sys.exit(f"error: {error}; make room, then run the same command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            sys.exit(f"error: {error}; it must be a file that you may read and write")
        raise


def log_rows(run, name="metrics.jsonl"):
    """The rows of a run's log; one that a crash has torn is left out."""
    log = Path(run) / name
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)
            if row["kind"] and row["step"] >= 0:
                yield row
        except (ValueError, KeyError, TypeError):
            continue
