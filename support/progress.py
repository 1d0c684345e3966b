"""How far an evaluation has come: a bar on a terminal, a line now and then elsewhere.

The bar and the lines are on stderr, so that the tables on stdout can be used by other programs.
"""

import sys
import time

from tqdm import tqdm

from scaling.ranks import rank
from support.bars import SECONDS, bar


class Progress:
    """What is being measured, and when the last line about it was printed."""

    def __init__(self):
        self.title = ""
        self.began = self.last_line = time.monotonic()

    def begin(self, title):
        self.title = title
        self.began = time.monotonic()

    def line_is_due(self):
        return rank() == 0 and time.monotonic() - self.last_line >= SECONDS

    def say(self, text):
        """Print a line about what is being measured, with the seconds since it began."""
        self.last_line = time.monotonic()
        title = f"{self.title}: " if self.title else ""
        tqdm.write(f"{title}{text}, {self.last_line - self.began:.0f} s", file=sys.stderr)


progress = Progress()


def titled(items):
    """Yields each of some domains or tasks, and says when one of them is done.

    The first field of an item is its name. One that took no time has no line.
    """
    items = list(items)
    progress.last_line = time.monotonic()
    for i, item in enumerate(items, 1):
        progress.begin(item[0])
        yield item
        has_lines = progress.last_line > progress.began
        if not sys.stderr.isatty() and (has_lines or progress.line_is_due()):
            progress.say(f"measured, {i} of {len(items)}")
    progress.begin("")


def watched(items, unit):
    """Yields the items of a list, and shows how many are done."""
    if not progress.title:
        progress.begin("")
    if sys.stderr.isatty():
        yield from bar(items, progress.title, unit=unit, hidden=rank() > 0)
        return
    for i, item in enumerate(items, 1):
        yield item
        if progress.line_is_due():
            progress.say(f"{unit} {i:,} of {len(items):,}")
