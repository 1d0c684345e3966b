"""How far an evaluation has come: a bar on a terminal, a line now and then elsewhere.

The bar and the lines are on stderr, so that the tables on stdout can be used by other programs.
"""

import sys
import time

from scaling.ranks import rank
from support.bars import Lines, bar


class Progress:
    """What is being measured, and since when."""

    def __init__(self):
        self.begin("")

    def begin(self, title):
        self.title = title
        self.lines = Lines(None, title, None, "")

    def line_is_due(self):
        return rank() == 0 and self.lines.is_due()

    def say(self, text, left=""):
        """Print a line about what is being measured, with the seconds since it began."""
        title = f"{self.title}: " if self.title else ""
        seconds = time.monotonic() - self.lines.began
        self.lines.say(f"{title}{text}, {seconds:.0f} s{left}")


progress = Progress()


def titled(items):
    """Yields each of some domains or tasks, and says when one of them is done.

    The first field of an item is its name. One that took no time has no line.
    """
    items = list(items)
    for i, item in enumerate(items, 1):
        progress.begin(item[0])
        yield item
        if not sys.stderr.isatty() and (progress.lines.has_line or progress.line_is_due()):
            progress.say(f"measured, {i} of {len(items)}")
    progress.begin("")


def watched(items, unit):
    """Yields the items of a list, and shows how many are done."""
    if not progress.title:
        progress.begin("")
    if sys.stderr.isatty():
        yield from bar(items, progress.title, unit=unit, hidden=rank() > 0)
        return
    began = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        if progress.line_is_due():
            seconds = (time.monotonic() - began) / i * (len(items) - i)
            left = f", about {seconds:.0f} s left" if seconds >= 1 else ""
            progress.say(f"{unit} {i:,} of {len(items):,}", left)
