"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere.

`bar` is for work whose amount is known, `stage` for work that can only be named. A bar begins its
line again with a CR. In a file it would stand before the next message, and no program would find a
line that begins with `error:`. All of it is on stderr, so that what is printed on stdout can be
used by other programs, and comes from rank 0 alone.
"""

import os
import sys
import threading
import time
from contextlib import contextmanager
from functools import lru_cache

from tqdm import tqdm

# So long a bar or a stage lasts before its first line, a stage on a terminal half as long. With 0
# each has a line at once.
FIRST_S = 2
SECONDS = 30  # between two lines after that, of whatever they tell


def is_silent():
    """True on all ranks but rank 0. torch is not imported for it."""
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_available() and dist.is_initialized() and dist.get_rank())


# ---- An amount of work ---------------------------------------------------------------------------

def bar(items=None, desc="", total=None, unit="it", hidden=False):
    """A bar of the items that are taken from it, or of what is added to it by update().

    unit: "B" shows bytes. It is gone at its end.
    """
    if total is None and items is not None:
        total = len(items)
    hidden = hidden or is_silent()
    if hidden or sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, unit_scale=unit == "B", leave=False,
                    disable=hidden)
    return Lines(items, desc, total, unit)


class Lines:
    """The same where stderr is no terminal: a line after FIRST_S, then one each SECONDS."""

    last_line = 0.0  # the time.monotonic() of the last line of any bar or stage

    def __init__(self, items, desc, total, unit):
        self.items = items
        self.desc = desc
        self.total = total
        self.unit = unit
        self.done = 0
        self.has_line = False
        self.began = time.monotonic()

    def __iter__(self):
        for item in self.items:
            yield item
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, n=1):
        self.done += n
        if not self.is_due():
            return
        done, total, unit = self.done, self.total, self.unit
        if unit == "B":
            done, total, unit = done // 10**6, total // 10**6, "MB"
        seconds = time.monotonic() - self.began
        left = seconds * (self.total - self.done) / self.done if self.done else 0
        left = f", about {left:.0f} s left" if left >= 1 else ""
        self.say(f"{self.desc}: {done:,} of {total:,} {unit}, {seconds:.0f} s{left}")

    def is_due(self):
        """Whether it is time for a line: its first one, or its next after SECONDS without any."""
        now = time.monotonic()
        if not self.has_line:
            return now - self.began >= FIRST_S
        return now - Lines.last_line >= SECONDS

    def say(self, text):
        self.has_line = True
        Lines.last_line = time.monotonic()
        sys.stderr.write(f"{text}\n")  # at once: other threads print too
        sys.stderr.flush()


# ---- A stage -------------------------------------------------------------------------------------

@contextmanager
def stage(what):
    """Around work that may last: on a terminal its name and its seconds, elsewhere a line.

        with stage("saving step000500"):

    Work that is done within a second, or within FIRST_S elsewhere, is not mentioned.
    """
    if is_silent():
        yield
        return
    take_lock()
    ended = threading.Event()
    shown = Stage(what)
    if FIRST_S == 0:
        shown.show()
    thread = threading.Thread(target=shown.keep_showing, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shown.hide(for_ever=True)


def staged(what, function, *arguments):
    """What function(*arguments) returns, with a stage around the call."""
    with stage(what):
        return function(*arguments)


class Stage:
    """The display of one stage."""

    on_terminal = []  # the stages whose line is to be seen there now

    def __init__(self, what):
        self.what = what
        self.bar = None  # on a terminal, a bar without an amount
        self.lines = Lines(None, what, None, "")

    def keep_showing(self, ended):
        """In a thread: the seconds go on while the main thread works, or waits for a compiler."""
        is_terminal = sys.stderr.isatty()
        wait = FIRST_S / 2 if is_terminal else FIRST_S
        while not ended.wait(wait or 1):
            wait = 1
            if is_terminal or self.lines.is_due():
                self.show()

    def show(self):
        text = f"{self.what}, {time.monotonic() - self.lines.began:.0f} s"
        if not sys.stderr.isatty():
            self.lines.say(text if self.lines.has_line else self.what)
            return
        with tqdm.get_lock():
            if self.bar is None:
                self.bar = tqdm(total=0, desc=text, bar_format="{desc}", leave=False)
            self.bar.set_description_str(text)
            if self not in self.on_terminal:
                self.on_terminal.append(self)

    def hide(self, for_ever=False):
        with tqdm.get_lock():
            if self in self.on_terminal:
                self.on_terminal.remove(self)
                self.bar.clear()
            if self.bar is not None and for_ever:
                self.bar.close()


def hide_stages():
    """Clear the lines of stages, so that what is printed next has a line of its own."""
    for each in list(Stage.on_terminal):
        each.hide()


@lru_cache
def take_lock():
    """Give tqdm a lock that a fork waits for: its child would inherit what a thread holds."""
    lock = threading.RLock()
    tqdm.set_lock(lock)
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release,
                        after_in_child=lock.release)


def end_bars():
    """End the bars that work left on the terminal, so that the next line is a line of its own."""
    for each in list(getattr(tqdm, "_instances", ())):
        each.close()
