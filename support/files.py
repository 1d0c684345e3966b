"""JSON, digests, writes that survive a crash, and one-line messages for a user's mistake."""

from support.interrupts import hear_ctrl_c  # first: from here on Ctrl-C is quiet

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
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


def write_rows(path, rows):
    """Write JSON lines in the same way."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(to_json(row) + "\n" for row in rows))
    fsync(temporary)
    temporary.replace(path)


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


def here(path):
    """Where a relative path was looked for, to stand behind it in a message; "" for others."""
    return "" if Path(path).is_absolute() else f" (in {Path.cwd()})"


def disk_remedy(error):
    """What a user can do about a write that failed; error: an OSError, or its message."""
    text = str(error)
    full = ("No space left", "quota exceeded", "File too large")
    if any(words in text for words in full):
        return "free some space, then run the same command again"
    return "see that the disk is there and may be written, then run the same command again"


# ---- A command -----------------------------------------------------------------------------------

# What to do first when memory runs out; docs/scale.md has the rest.
LESS_MEMORY = {
    "train": "try --activation_checkpointing=one_in_two, then half the --micro_batch_size; in an "
             "evaluation, half the --eval_batch_tokens",
    "adapt": "try --activation_checkpointing=one_in_two, then half the --micro_batch_size; for "
             "generate, half the --answer_batch",
    "eval": "try half the --eval_batch_tokens", "data": "try fewer --workers"}


def run_main(main):
    """Run main(argv) and exit with the code that it returns (None is 0).

    A user's mistake, a full disk or a lack of memory ends in one line and exit code 1. A bug keeps
    its traceback. Text that cannot be printed fails nothing: see Output.
    """
    stop_hearing = hear_ctrl_c()
    is_run = getattr(main, "takes_ranks", False)  # train.py and adapt.py (scaling/ranks.py)
    sys.stdin = sys.stdin or open(os.devnull)  # None: the shell has closed it (<&-)
    stdout = Output(sys.stdout)
    with redirect_stdout(stdout), redirect_stderr(Output(sys.stderr)):
        code = exit_code(main) if is_run or is_alone() else NOT_ALONE
        sys.stdout.flush()
        sys.stderr.flush()
    stop_hearing()
    if stdout.error and not is_run and not code:  # a run is in its files, a table only here
        code = f"error: stdout cannot be written ({stdout.error})"
    if getattr(main, "had_group", False):
        leave(code)
    sys.exit(code)


def leave(code):
    """Exit as sys.exit does, but at once, for one rank of several.

    # subtle: a thread of gloo may hold a tensor of the last collective for a moment longer. If it
    # lets go of it while Python shuts down, torch aborts the process (pytorch/pytorch#179291): on a
    # loaded machine, a rank that had finished ended with SIGABRT.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def exit_code(main):
    """What main(argv) returns, or the one line about an error that is not a bug."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the clearing up
        return 130  # 128 + SIGINT, as shells have it
    except (MemoryError, OSError, RuntimeError, UnicodeEncodeError) as error:
        line = about_machine(error)
        if not line:
            raise
        return f"error: {line}"


def about_machine(error):
    """One line about an error whose cause is the machine, the user's rights or text; else None."""
    text = str(error)
    name = type(error).__name__  # torch.OutOfMemoryError; torch is not imported here
    number = getattr(error, "errno", None)
    is_memory = isinstance(error, MemoryError) or "OutOfMemory" in name or number == errno.ENOMEM
    if is_memory or "can't allocate memory" in text:
        remedy = LESS_MEMORY.get(Path(sys.argv[0]).stem, "try a smaller batch")
        amount = re.search(r"llocate (\d[\w.]* ?\w+)", text)
        return f"out of memory{f' (asked for {amount[1]})' if amount else ''}; {remedy}"
    if isinstance(error, UnicodeEncodeError):
        part = error.object[max(0, error.start - 20):error.end + 20]
        return f"{part!r} is not all text: bytes that are not UTF-8, or half a surrogate pair"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}; make room, then run the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
        return f"{error}; it must be a file that you may read and write"
    return None


NOT_ALONE = "error: this command is one process; start it with python, not with torchrun"


def is_alone():
    """False for one of several processes that torchrun started."""
    by_torchrun = bool(os.environ.get("TORCHELASTIC_RUN_ID"))
    return not by_torchrun or os.environ.get("WORLD_SIZE", "1") == "1"


class Output:
    """stdout or stderr that never fails: what cannot be printed is lost, and the work goes on.

    A character that the terminal lacks is printed as an escape. After an error of the disk or of
    the pipe (`... | head`) all that follows is dropped; `error` keeps it, unless it was the pipe's.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # None: the shell has closed it (>&-)
        self.error = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            function(*arguments)
        except BlockingIOError:
            pass  # a terminal that is slow for a moment: this text is lost
        except OSError as error:
            # what follows, and what is still in the buffers, is sent where it does not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if not isinstance(error, BrokenPipeError):
                self.error = error
                print(f"warning: {self.stream.name} cannot be written ({error})", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self.stream, name)


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
