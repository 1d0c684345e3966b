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
from functools import lru_cache, partial

from tqdm import tqdm

from support.memory import Half, remedied

# How long a bar or a stage lasts before its first line; on a terminal, a stage half as long. With 0
# each has a line at once.
FIRST_S = 2
SECONDS = 30  # from any line to the next one of a bar or stage that has had its first


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


class Watch:
    """How long something has lasted, and whether it is time for a line where there is no terminal.

    The first line comes after FIRST_S, the next ones SECONDS after the last line of any Watch.
    """

    last_line = 0.0  # the time.monotonic() of that line

    def __init__(self):
        self.has_line = False
        self.began = time.monotonic()

    def seconds(self):
        return time.monotonic() - self.began

    def is_due(self):
        if not self.has_line:
            return self.seconds() >= FIRST_S
        return time.monotonic() - Watch.last_line >= SECONDS

    def say(self, text):
        self.has_line = True
        Watch.last_line = time.monotonic()
        sys.stderr.write(f"{text}\n")  # one call: other threads print too
        sys.stderr.flush()


class Lines(Watch):
    """A bar where stderr is no terminal."""

    def __init__(self, items, desc, total, unit):
        super().__init__()
        self.items = items
        self.desc = desc
        self.total = total
        self.unit = unit
        self.done = 0

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
        left = time_left(self.seconds(), self.done, self.total)
        self.say(f"{self.desc}: {done:,} of {total:,} {unit}, {self.seconds():.0f} s{left}")


def time_left(seconds, done, total):
    """", about 9 s left" at the pace until now; "" under a second."""
    left = seconds * (total - done) / done if done else 0
    return f", about {left:.0f} s left" if left >= 1 else ""


# ---- A stage -------------------------------------------------------------------------------------

@contextmanager
def stage(what):
    """Around work that may last: on a terminal its name and its seconds, elsewhere a line.

        with stage("saving step 500"):

    Work that is done within a second, or within FIRST_S elsewhere, is not mentioned.
    """
    if is_silent():
        yield
        return
    take_lock()
    ended = threading.Event()
    shown = Stage(what)
    Stage.lasting.append(shown)
    if FIRST_S == 0:
        shown.show()
    thread = threading.Thread(target=shown.keep_showing, args=(ended,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        Stage.lasting.remove(shown)
        shown.clear()


def staged(what, function, *arguments):
    """What function(*arguments) returns, with a stage around the call."""
    with stage(what):
        return function(*arguments)


def prepared(build_data, config):
    """The folder that build_data returns; a stage around the call."""
    less = [Half("workers", config.workers or os.cpu_count())]
    if config.bloom_items == 0:  # sets of digests, which are exact
        less.append("--bloom_items=N, with N for the count of texts: a Bloom filter takes less "
                    "memory than exact sets (docs/data.md)")
    with (noted("stopped while preparing the data: finished stages are kept, and the same command "
                "continues"), remedied("while the data was prepared", *less)):
        return staged("preparing the data", build_data, config)


@contextmanager
def noted(text):
    """Around work: where Ctrl-C or SIGTERM ends it, run_main prints this text."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:  # SystemExit: of SIGTERM
        stop.add_note(text)
        raise


class Stage(Watch):
    """The display of one stage; nothing is seen of it while another one lasts inside it."""

    lasting = []  # the stages of this moment, the innermost last

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.bar = None  # on a terminal, a bar without an amount

    def keep_showing(self, ended):
        """In a thread: the seconds go on while the main thread works, or waits for a compiler."""
        wait = FIRST_S / 2 if sys.stderr.isatty() else FIRST_S
        while not ended.wait(wait):
            self.show()
            wait = 1

    def show(self):
        text = f"{self.what}, {self.seconds():.0f} s"
        with tqdm.get_lock():
            if Stage.lasting[-1] is not self:
                self.clear()
            elif not sys.stderr.isatty():
                if self.is_due():
                    self.say(text if self.has_line else self.what)
            elif self.bar is None:
                self.bar = tqdm(total=0, desc=text, bar_format="{desc}", leave=False)
            else:
                self.bar.set_description_str(text)

    def clear(self):
        if self.bar is not None:
            self.bar.clear()  # subtle: close() alone leaves the cursor where the text ended
            self.bar.close()
            self.bar = None


@lru_cache
def take_lock():
    """Give tqdm a lock that a fork waits for: its child would inherit what a thread holds."""
    lock = threading.RLock()
    tqdm.set_lock(lock)
    # subtle: release itself, as Ctrl-C at the begin of a function of ours would leave it locked
    os.register_at_fork(before=partial(hold, lock), after_in_parent=lock.release,
                        after_in_child=lock.release)


def hold(lock):
    """Acquire an RLock before a fork, also where Ctrl-C falls into the wait for it.

    The fork follows in any case, and after it a release. The KeyboardInterrupt is only deferred:
    see hear_ctrl_c in support/interrupts.py.
    """
    try:
        lock.acquire()
    except KeyboardInterrupt:
        if not lock._is_owned():  # as threading.Condition asks it
            lock.acquire()
        raise


# ---- Other output --------------------------------------------------------------------------------

def bars_now():
    """The bars of this moment, a list. The thread of a stage adds bars and ends them."""
    if not getattr(tqdm, "_instances", ()):
        return []
    with tqdm.get_lock():  # nobody adds a bar while they are listed
        return list(tqdm._instances)


def hide_bars():
    """Clear the lines of all bars, so that what is printed next has a line of its own.

    Each bar is drawn again when it goes on.
    """
    for each in bars_now():
        each.clear()


def end_bars():
    """End the bars that work left on the terminal, so that the next line is a line of its own."""
    for each in bars_now():
        each.close()
