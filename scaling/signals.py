"""Signals: Ctrl-C, SIGTERM and a deadline end a run after a step, never inside one."""

import math
import os
import signal
import time

from tqdm import tqdm

from scaling.ranks import world_size


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

    def __enter__(self):
        self.number = 0
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
        if number == signal.SIGALRM:
            tqdm.write("stop_after_minutes: stopping after this step")
        elif world_size() == 1:
            tqdm.write("stopping after this step; a second Ctrl-C stops at once")
            self.restore()

    def reason(self):
        """The signal to leave by, or 0. A rank whose launcher was killed leaves too."""
        is_orphan = world_size() > 1 and os.getppid() != self.parent
        return self.number or (signal.SIGTERM if is_orphan else 0)

    def restore(self):
        """Let signals act again as they did before."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)

    def __exit__(self, *error):
        self.restore()
