"""JSON, digests, locks, writes that survive a crash, and one-line messages for a user's mistake."""

import errno
import fcntl
import hashlib
import json
import math
import os
import socket
import sys
import time
import uuid
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend; the message names the value, its place and the remedy."""


def file_sha256(path):
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path):
    """Returns the JSON object in a file as a dict; UserError if the file holds anything else."""
    try:
        value = json.loads(path.read_text())
    except PermissionError:  # the file may be good: nobody is to take it for a damaged one
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def to_json(value, indent=None):
    """A value as JSON text. JSON has no NaN and no Infinity: null stands in for them."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value), indent=indent, allow_nan=False)


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
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(to_json(value, indent=1) + "\n")
    fsync(temporary)  # first the content, then the name
    temporary.replace(path)


def fsync(path):
    """Wait until a file's content, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """A lock file that one process holds at a time.

    `with Lock(path):` holds it for a block; `lock = Lock(path)` until lock.release() or until the
    process ends, however it ends: a killed process leaves no lock behind.

    patience: seconds to wait for another process; after them UserError names that process.
    on_wait(holder): called once when this process has to wait; holder is the other one's `text`.
    text: what this process wrote into the file. It is unique, so that a rank on another node can
    read the file and tell whether it sees the same directory.

    A disk without locks (some network file systems) is reported, and the work goes on.
    """

    def __init__(self, path, patience=math.inf, on_wait=None):
        self.text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
        # subtle: closing any handle on this file unlocks it, so a holder must not open it again
        self.file = open(path, "a+")  # "a+": the holder's text must survive that others open it
        try:
            self.wait(patience, on_wait)
        except OSError:
            print(f"{path}: its disk has no locks; make sure that only one process works there")
        except BaseException:
            self.file.close()
            raise
        self.file.truncate(0)
        self.file.write(self.text)
        self.file.flush()
        os.fsync(self.file.fileno())

    def wait(self, patience, on_wait):
        """Try to lock the file until it works; UserError when `patience` seconds have passed."""
        deadline = time.monotonic() + patience
        while True:
            try:
                # subtle: lockf takes a POSIX lock, which forked workers do not inherit; a worker
                # that outlives its parent would keep a flock
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self.file.seek(0)
                holder = self.file.read() or "it left no name"
            if time.monotonic() >= deadline:
                folder = Path(self.file.name).parent
                raise UserError(f"{folder}: another process works there ({holder}); wait until it "
                                "ends, or choose another directory")
            if on_wait:
                on_wait(holder)
                on_wait = None
            time.sleep(0.1)

    def release(self):
        """Let the next process have the lock."""
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.release()


def run_main(main):
    """Run main(argv) and exit with the code that it returns (None is 0).

    A user's mistake or a full disk ends in one line and exit code 1. A bug keeps its traceback.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as shells have it
    except BrokenPipeError:  # the reader of our output has left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sys.exit(f"error: {error}; make room, then run the same command again")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
            sys.exit(f"error: {error}; it must be a file that you may read and write")
        raise


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
