"""How far an evaluation has come: a bar on a terminal, a line now and then elsewhere.

The bar and the lines are on stderr, so that the tables on stdout can be used by other programs.
"""

import sys

from scaling.ranks import rank
from support.bars import Watch, bar, time_left


class Progress:
    """What is being measured, and since when."""

    def __init__(self):
        self.begin("")

    def begin(self, title, has_line=False):
        """has_line: whether there was a line about what came before it in the same list."""
        self.title = title
        self.watch = Watch()
        self.watch.has_line = has_line

    def line_is_due(self):
        return rank() == 0 and self.watch.is_due()

    def say(self, text, left=""):
        """Print a line about what is being measured, with the seconds since it began."""
        title = f"{self.title}: " if self.title else ""
        self.watch.say(f"{title}{text}, {self.watch.seconds():.0f} s{left}")


progress = Progress()


def titled(items):
    """Yields each of some domains or tasks, and says when one of them is done, if a line is due.

    The first field of an item is its name. The lines of all items are as far apart as those of one.
    """
    items = list(items)
    progress.begin("")
    for i, item in enumerate(items, 1):
        progress.begin(f"evaluating {item[0]}", progress.watch.has_line)
        yield item
        if not sys.stderr.isatty() and progress.line_is_due():
            progress.say(f"done, {i} of {len(items)}")
    progress.begin("")


def watched(items, unit):
    """Yields the items of a list, and shows how many are done."""
    if not progress.title:
        progress.begin("")
    if sys.stderr.isatty():
        yield from bar(items, progress.title, unit=unit, hidden=rank() > 0)
        return
    watch = Watch()  # a title may have several lists
    for i, item in enumerate(items, 1):
        yield item
        if progress.line_is_due():
            progress.say(f"{unit} {i:,} of {len(items):,}",
                         time_left(watch.seconds(), i, len(items)))
