"""How far a long piece of work has come: a bar on a terminal, a line now and then elsewhere.

A bar begins its line anew with a CR. In a file it would stand before the next message, and no
program would find a line that begins with `error:`. Both are on stderr, so that what is printed on
stdout can be used by other programs.
"""

import sys
import time

from tqdm import tqdm

SECONDS = 10  # between two lines


def bar(items=None, desc="", total=None, unit="it", hidden=False):
    """A bar of the items that are taken from it, or of what is added to it by update().

    unit: "B" shows bytes. It is gone at its end.
    """
    if total is None and items is not None:
        total = len(items)
    if hidden or sys.stderr.isatty():
        return tqdm(items, desc, total, unit=unit, unit_scale=unit == "B", leave=False,
                    disable=hidden)
    return Lines(items, desc, total, unit)


class Lines:
    """The same where stderr is no terminal: a line each SECONDS."""

    def __init__(self, items, desc, total, unit):
        self.items = items
        self.desc = desc
        self.total = total
        self.unit = unit
        self.done = 0
        self.began = self.last_line = time.monotonic()

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
        now = time.monotonic()
        if now - self.last_line >= SECONDS:
            self.last_line = now
            done, total, unit = self.done, self.total, self.unit
            if unit == "B":
                done, total, unit = done // 10**6, total // 10**6, "MB"
            print(f"{self.desc}: {done:,} of {total:,} {unit}, {now - self.began:.0f} s",
                  file=sys.stderr, flush=True)


def end_bars():
    """End the bars that work left on the terminal, so that the next line is a line of its own."""
    for each in list(getattr(tqdm, "_instances", ())):
        each.close()
