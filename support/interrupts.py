"""The first and the last seconds of a command: Ctrl-C, SIGTERM, "starting ...", a fast end.

Imported before everything else, because the import of torch takes seconds.
"""

import atexit
import os
import signal
import sys
import threading

COMMANDS = ("train.py", "data.py", "eval.py", "adapt.py", "model.py", "experiments/__main__.py")


def is_command():
    """True in a command of ours, and not for others who import us."""
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    file = os.path.realpath(program)
    house = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    return file in [os.path.join(house, command) for command in COMMANDS]


IS_COMMAND = is_command()  # now: a program that imports us may run a command of ours later


def quiet_while_importing():
    """Let Ctrl-C end a command of ours at once and without a traceback while torch is imported.

    hear_ctrl_c brings Python's own handler back. Nothing is changed for others who import us, such
    as a script beside ours: they never call hear_ctrl_c, and catch KeyboardInterrupt themselves.
    """
    if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


quiet_while_importing()


def say_starting():
    """A word on the terminal, as torch takes seconds to import; clear_starting() takes it away."""
    if is_at_terminal():
        print("starting ...", end="", file=sys.stderr, flush=True)


def clear_starting():
    if is_at_terminal():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def is_at_terminal():
    """Whether this is a command of ours (of several ranks rank 0) whose stderr is a terminal."""
    if not IS_COMMAND or os.environ.get("RANK", "0") != "0":
        return False
    return sys.stderr is not None and sys.stderr.isatty()  # None: the shell has closed it


say_starting()

exit_codes = []  # empty, until the command has done its work


def end_fast():
    """Let Python end a command without taking torch apart, which would take 1 to 3 s in silence.

    atexit calls first what was registered last; so this comes last, when all else is cleaned up.
    """
    def leave():
        if exit_codes:
            for stream in (sys.stdout, sys.stderr):
                if stream:  # else the shell has closed it
                    stream.flush()
            os._exit(exit_codes[-1])
    if IS_COMMAND:
        atexit.register(leave)


end_fast()


def hear_ctrl_c():
    """From here on Ctrl-C raises KeyboardInterrupt, and SIGTERM SystemExit; neither is lost.

    # subtle: in a callback of os.fork or in a destructor Python can only print an exception and go
    # on. A signal that falls there comes again a moment later.
    Returns a function that ends this.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.unraisablehook
    process = os.getpid()
    again = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
    end = hear_sigterm(process)

    def hook(ignored):
        if ignored.exc_type not in again:
            before(ignored)
        elif os.getpid() == process:  # its workers end with it
            if end:
                signal.signal(signal.SIGTERM, end)
            threading.Timer(0.1, os.kill, (process, again[ignored.exc_type])).start()
    sys.unraisablehook = hook

    def stop_hearing():
        sys.unraisablehook = before
        if end:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return stop_hearing


def hear_sigterm(process):
    """From here on SIGTERM ends this process as sys.exit does: what is half-written is cleared up.

    Not one rank of several: it may wait for the others where Python handles no signal. Returns the
    handler, or None.
    """
    is_ours = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_ours or (os.environ.get("WORLD_SIZE") or "1") != "1":
        return None

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one acts at once
        if os.getpid() != process:  # a child of ours, which has nothing to clear up
            os.kill(os.getpid(), number)
        sys.exit(128 + number)
    signal.signal(signal.SIGTERM, end)
    return end


def end_at_ctrl_c(code):
    """From here on Ctrl-C ends a command of ours at once, with its exit code.

    Its work is done and saved. In the functions that torch runs while Python shuts down,
    KeyboardInterrupt would be a traceback.
    """
    exit_codes.append(code)
    if IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(code))
