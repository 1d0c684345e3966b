"""Signals: Ctrl-C, SIGTERM and a deadline end a run after a step, never inside one."""

import math
import os
import signal
import sys
import threading
import time

from tqdm import tqdm

from scaling.ranks import world_size


STOPPED_AT_ONCE = ("stopped at once; the same command goes on from the newest checkpoint, or "
                   "begins again where there is none")


class StopSignal:
    """While open, remembers the first Ctrl-C, SIGTERM or alarm in `number`.

    Without torchrun a second signal acts at once. With it, a second one is ignored: the launcher
    repeats what the terminal has sent already, and kills after 30 s what is still running.
    deadline: the time.monotonic() at which an alarm rings; infinity is never.
    """

    def __init__(self, deadline=math.inf):
        self.deadline = deadline
        self.number = 0
        self.handlers_before = {}
        self.parent = os.getppid()
        self.shield = None

    def __enter__(self):
        self.number = 0
        self.shield = Shield()  # until the first step is done, which may compile
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self.handlers_before[number] = signal.signal(number, self.receive)
        if self.deadline < math.inf:
            # at least a millisecond: setitimer takes 0 as "no alarm"
            seconds = max(0.001, self.deadline - time.monotonic())
            signal.setitimer(signal.ITIMER_REAL, seconds)
        return self

    def receive(self, number, frame):
        """The handler of all three signals."""
        if self.number and (self.number != signal.SIGALRM or world_size() > 1):
            return  # an alarm may still be followed by a Ctrl-C that is in more of a hurry
        self.number = number
        if self.shield and number != signal.SIGALRM:
            return  # the shield has said it, and acts on a second one
        if number == signal.SIGALRM:
            tqdm.write("stop_after_minutes: stopping after this step")
        elif world_size() == 1:
            tqdm.write(f"stopping after this step{second(number)}")
            self.restore()

    def reason(self):
        """The signal to leave by, or 0: asked after each step.

        A rank whose launcher was killed leaves too.
        """
        self.end_shield()
        is_orphan = world_size() > 1 and os.getppid() != self.parent
        return self.number or (signal.SIGTERM if is_orphan else 0)

    def end_shield(self):
        """The first step is done: its compiler's processes have ended."""
        if self.shield:
            self.shield.end()
            self.shield = None
            if self.number in Shield.BLOCKED and world_size() == 1:
                self.restore()  # a second one acts at once

    def restore(self):
        """Let signals act again as they did before."""
        self.end_shield()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self.restore()


def second(number):
    """What another signal of this number does to a single process, in words."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return f"; a second {name} stops at once"


class Shield:
    """Around a step that may compile: a signal is answered at once, and not by the compiler.

    While g++ runs, Python handles no signal, perhaps for a minute. So a thread that reads the
    numbers of signals from a pipe says what will happen. And a signal that reached g++, as Ctrl-C
    in a terminal does, would leave a broken library in torch's cache: processes that are started
    now inherit that the signals are blocked. A second signal ends a single process at once.
    """

    BLOCKED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.write_end)
        # subtle: first the thread and then the block, which it would inherit: a signal needs a
        # thread that takes it
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, self.BLOCKED)

    def answer(self):
        """In the thread: say that a signal was heard, until `end` closes the pipe."""
        heard = 0
        while number := int.from_bytes(os.read(self.read_end, 1), "big"):
            if number not in self.BLOCKED or heard and world_size() > 1:
                continue
            if heard:
                tqdm.write(STOPPED_AT_ONCE)
                sys.stdout.flush()
                os._exit(128 + number)  # the compiler's processes end by themselves
            heard = number
            what = "compiling; " if "torch._inductor.compile_fx" in sys.modules else ""
            more = "" if world_size() > 1 else second(number)
            tqdm.write(f"{what}stops after this step{more}")
            sys.stdout.flush()

    def end(self):
        """Back to signals that the main thread handles."""
        signal.set_wakeup_fd(self.wakeup_before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.BLOCKED)
        os.close(self.write_end)
        self.thread.join()
        os.close(self.read_end)
