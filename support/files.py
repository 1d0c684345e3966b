"""Text, JSON, digests, writes that survive a crash, and one-line messages for a user's mistake."""

import errno
import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path


class UserError(ValueError):
    """A mistake that the user can mend; the message names the value, its place and the remedy."""


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


# ---- Text and JSON from a user -------------------------------------------------------------------
# Every text that a user gives is read by `decoded`, and every JSON by `parsed_json`. json.loads on
# bytes would guess the encoding, line by line, and read UTF-16 as other letters without an error.

# The first bytes of what is not UTF-8. The mark of UTF-32 begins with that of UTF-16.
SIGNATURES = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2",
    b"PK\x03\x04": "a zip archive", b"PAR1": "Parquet", b"ARROW1": "Arrow", b"%PDF": "PDF"}

MOST_LEVELS = 200  # of lists and objects in each other: code that walks through them is recursive


def read_bytes(path):
    """A file's content; UserError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except PermissionError:  # the file may be good: nobody is to take it for a damaged one
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


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
            return content.decode("utf-8-sig")
        begin = 0
    except UnicodeDecodeError as error:
        found = encoding_at(content, error)
        begin = error.start
    file, _, line = place.rpartition(":")
    line = int(line) + content.count(b"\n", 0, begin)
    remedy = "convert the file to UTF-8"
    if found.startswith("UTF"):
        remedy += f", such as by: iconv -f {found[:6]} -t UTF-8 OLD > NEW"
    raise UserError(f"{file}:{line}: not UTF-8 but {found}; {remedy}")


def other_encoding(head):
    """The name of the UTF-16 or UTF-32 that a text begins with; None if it seems to be UTF-8."""
    for mark, name in SIGNATURES.items():
        if name.startswith("UTF") and head.startswith(mark):
            return name
    # without a mark: in UTF-16 every other byte of a Western text is 0, and only every other one
    fewer, more = sorted((head[0::2].count(0), head[1::2].count(0)))
    if more > max(1, len(head) / 6) and fewer < more / 4:
        return "UTF-16 without a byte-order mark"
    return None


def encoding_at(content, error):
    """What bytes seem to be that a UnicodeDecodeError has shown not to be UTF-8."""
    for mark, name in SIGNATURES.items():
        if content.startswith(mark):
            return name
    byte = content[error.start:error.start + 1]
    return (f"another encoding (byte {byte[0]:#04x} at byte {error.start}; in Windows-1252 it is "
            f"{byte.decode('cp1252', 'replace')})")


def parsed_json(content, place, remedy="correct or delete the line"):
    """The value of JSON in UTF-8 bytes; place: file:line of the first byte.

    Raises UserError for what json.loads would let pass: a key that an object holds twice, of which
    it would drop one, and lists in lists without end.
    """
    text = decoded(content, place).rstrip("\r\n")
    file, _, line = place.rpartition(":")
    brackets = text.count("[") + text.count("{")
    try:
        value = json.loads(text, object_pairs_hook=object_of)
        if brackets > MOST_LEVELS and is_too_deep(value):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{place}: lists or objects in each other, over {MOST_LEVELS} levels; "
                        f"{remedy}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{int(line) + error.lineno - 1}: not JSON ({error.msg}, "
                        f"character {error.colno}); {remedy}") from None
    except ValueError as error:  # a key that is there twice, a number of 5,000 digits
        raise UserError(f"{place}: not JSON that can be read ({error}); {remedy}") from None
    return value


def object_of(pairs):
    """A JSON object as a dict; ValueError for a key that it holds twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {keys.most_common(1)[0][0]!r} is there twice")
    return value


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


def json_type(value):
    """What JSON calls the type of a value, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false",
             type(None): "null"}
    return names.get(type(value), "a number")


# ---- Writing -----------------------------------------------------------------------------------

def write_json(path, value):
    """Write a JSON file so that a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    fsync(temporary)  # first the content, then the name
    temporary.replace(path)


def fsync(path):
    """Wait until a file's content, or the list of a directory's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- A command -----------------------------------------------------------------------------------

def quiet_while_importing():
    """Let Ctrl-C end a command of ours at once and without a traceback while torch is imported.

    run_main brings Python's own handler back. Nothing is changed for others who import our files.
    """
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    is_ours = Path(file).resolve().parent == Path(__file__).resolve().parent.parent
    if is_ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


quiet_since_import = quiet_while_importing()

# What to do first when memory runs out; docs/scale.md has the rest.
LESS_MEMORY = {"train": "halve --micro_batch_size, or --activation_checkpointing=whole_layer",
               "adapt": "halve --micro_batch_size (chat, generate: --answer_batch)",
               "eval": "halve --eval_batch_tokens", "data": "use fewer --workers"}


def run_main(main):
    """Run main(argv) and exit with the code that it returns (None is 0).

    A user's mistake, a full disk or a lack of memory ends in one line and exit code 1. A bug keeps
    its traceback. Text that cannot be printed fails nothing: see Output.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    is_run = getattr(main, "takes_ranks", False)  # train.py and adapt.py (scaling/ranks.py)
    stdout = Output(sys.stdout)
    with redirect_stdout(stdout), redirect_stderr(Output(sys.stderr)):
        code = exit_code(main) if is_run or is_alone() else NOT_ALONE
        sys.stdout.flush()
        sys.stderr.flush()
    if stdout.error and not is_run and not code:  # a run is in its files, a table only here
        code = f"error: stdout cannot be written ({stdout.error})"
    sys.exit(code)


def exit_code(main):
    """What main(argv) returns, or the one line about an error that is not a bug."""
    try:
        return main(sys.argv[1:])
    except UserError as error:
        return f"error: {error}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the clearing up
        return 130  # 128 + SIGINT, as shells have it
    except (MemoryError, OSError, RuntimeError) as error:
        line = about_machine(error)
        if not line:
            raise
        return f"error: {line}"


def about_machine(error):
    """One line about an error whose cause is the machine or the user's rights; else None."""
    text = str(error)
    name = type(error).__name__  # torch.OutOfMemoryError; torch is not imported here
    number = getattr(error, "errno", None)
    is_memory = isinstance(error, MemoryError) or "OutOfMemory" in name or number == errno.ENOMEM
    if is_memory or "can't allocate memory" in text:
        remedy = LESS_MEMORY.get(Path(sys.argv[0]).stem, "use a smaller batch")
        amount = re.search(r"llocate (\d[\w.]* ?\w+)", text)
        return f"out of memory{f' (asked for {amount[1]})' if amount else ''}; {remedy}"
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
    """Yields the rows (dicts) of a run's log. A line that a crash cut short is skipped."""
    log = Path(run) / name
    if not log.is_file():
        return
    for line in log.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
            is_complete = row["kind"] and row["step"] >= 0
        except (ValueError, KeyError, TypeError):
            continue
        if is_complete:
            yield row
