"""What every command does around its main(): one line for an error, output that never fails."""

from support.interrupts import clear_starting, end_at_ctrl_c, hear_ctrl_c  # first

import errno
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout

from support.bars import end_bars, hide_bars
from support.files import disk_remedy, is_full
from support.hints import shipped
from support.memory import about_memory, is_lack_of_memory
from support.slips import check_words
from support.text import BOLD_GREEN, PLAIN, REVERSE, UserError, harmless


def run_main(main):
    """Run main(argv) and exit with the code that it returns (None is 0).

    A user's mistake, a full disk or a lack of memory ends in one line and exit code 1. A bug keeps
    its traceback. Text that cannot be printed fails nothing: see Output.
    """
    stop_hearing = hear_ctrl_c()
    clear_starting()
    is_run = getattr(main, "takes_ranks", False)  # train.py and adapt.py (scaling/ranks.py)
    sys.stdin = sys.stdin or open(os.devnull)  # None: the shell has closed it (<&-)
    stdout = Output(sys.stdout, (BOLD_GREEN, REVERSE, PLAIN), warns=is_run, before=hide_bars)
    with redirect_stdout(stdout), redirect_stderr(Output(sys.stderr, ("\r", "\033[A"))):  # bars
        code = exit_code(main) if is_run or is_alone() else NOT_ALONE
        sys.stdout.flush()
        sys.stderr.flush()
    stop_hearing()
    if stdout.error and not is_run:  # a run is in its files, a table only here
        lost = f"stdout cannot be written ({stdout.error})"
        code = f"{code}; {lost}" if isinstance(code, str) else code or f"error: {lost}"
    if getattr(main, "had_group", False):
        leave(code)
    end_at_ctrl_c(int(isinstance(code, str)) or code or 0)
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
        return main(list(map(shipped, check_words(sys.argv[1:]))))
    except UserError as error:
        end_bars()
        return f"error: {harmless(str(error))}"
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends the clearing up
        say_stopped(stop)
        return 130  # 128 + SIGINT, as shells have it
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:  # see hear_sigterm in support/interrupts.py
            raise
        say_stopped(stop)
        return stop.code
    except (MemoryError, OSError, RuntimeError, UnicodeEncodeError) as error:
        end_bars()
        line = about_machine(error)
        if not line:
            raise
        return f"error: {harmless(line)}"


def say_stopped(stop):
    """Print the notes that the interrupted code has added to a signal's exception, or a line."""
    end_bars()
    notes = getattr(stop, "__notes__", ["stopped; to go on, run the same command again"])
    begin = "\r" if sys.stderr.isatty() else ""  # over the terminal's "^C"
    print(begin + "\n".join(notes), file=sys.stderr)


def about_machine(error):
    """One line about an error whose cause is the machine, the user's rights or text; else None."""
    number = getattr(error, "errno", None)
    if is_lack_of_memory(error):
        return about_memory(error)
    if isinstance(error, UnicodeEncodeError):
        part = error.object[max(0, error.start - 20):error.end + 20]
        return f"{part!r} is not all text: bytes that are not UTF-8, or half a surrogate pair"
    if is_full(error):
        return f"{error}; {disk_remedy(error)}"
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

    A character that the terminal lacks, or would obey, is printed as an escape; `codes` are the
    sequences that are ours and that it is to obey. After an error of the disk or of
    the pipe (`... | head`) all that follows is dropped; `error` keeps it, unless it was the pipe's.
    """

    def __init__(self, stream, codes=(), warns=True, before=lambda: None):
        self.before = before  # called before anything is printed
        self.codes = codes
        self.warns = warns  # at once of an error, which run_main otherwise says at the end
        self.stream = stream or open(os.devnull, "w")  # None: the shell has closed it (>&-)
        self.error = None
        if hasattr(self.stream, "reconfigure"):
            # a line at once, also into a file: the log of a batch system shows how far a run is
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def write(self, text):
        self.before()
        self.attempt(self.stream.write, harmless(text, self.codes))
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
            if self.error and self.warns:
                print(f"warning: {self.stream.name} cannot be written ({error})", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self.stream, name)
