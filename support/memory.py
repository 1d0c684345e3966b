"""Out of memory: one line that says where it was, and the first remedy that is left there."""

import errno
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from support.text import UserError

# What CUDA, its libraries and C++ say; torch raises it as a RuntimeError
WORDS = ("out of memory", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc",
         "ALLOC_FAILED", "can't start new thread")
WEIGHTS = ("the weights take 4 bytes a parameter: choose a smaller model, or a machine with more "
           "memory")

# {the command's file: what to do where `remedied` names no option}
OTHER_REMEDIES = {
    "train": "weights, gradients and optimiser take 16 bytes a parameter: choose a smaller model, "
             "or share them over GPUs: torchrun --nproc_per_node=N; docs/scale.md has more",
    "eval": WEIGHTS, "model": WEIGHTS, "data": "try fewer --workers"}
OTHER_REMEDIES["adapt"] = OTHER_REMEDIES["train"]


class Half(NamedTuple):
    """A remedy: half the value of an option, as long as that is at least `least`."""

    key: str
    value: int
    least: int = 1
    note: str = ""

    def words(self, share):
        """Returns "--KEY=VALUE", or None if no value is left.

        share: what one tensor alone asked for / all memory; above 1, one half is not enough.
        """
        value = self.value
        is_enough = False
        while value > self.least and not is_enough:
            value = max(self.least, value // 2)
            is_enough = share * value <= self.value
        return f"--{self.key}={value}{self.note}" if is_enough else None


@contextmanager
def remedied(where, *remedies):
    """Around work: a lack of memory is a UserError with the first remedy that is left.

    where: such as "in an evaluation". remedies: each a text, a Half or None.
    """
    try:
        yield
    except Exception as error:
        if not is_lack_of_memory(error):
            raise
        raise UserError(about_memory(error, where, remedies)) from None


def is_lack_of_memory(error):
    """True for the errors of Python, numpy, torch, CUDA and the system."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's; torch is not imported here
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def about_memory(error, where="", remedies=()):
    """One line about a lack of memory. where, remedies: see `remedied`."""
    text = str(error)
    amount = re.search(r"llocate (\d[\d.]* (?:bytes|[KMGTP]i?B))", text)
    share = bytes_of(amount[1]) / whole_memory(text) if amount else 0
    options = []
    for each in remedies:
        words = each.words(share) if isinstance(each, Half) else each
        if words:
            options.append(words)
    if options:
        remedy = f"try {options[0]}"
    elif share > 1:
        remedy = "the whole memory is less than that; choose a smaller model, batch or context"
    else:
        remedy = OTHER_REMEDIES.get(Path(sys.argv[0]).stem, "use a machine with more memory")
    asked = ""
    if "new thread" in text:
        asked = f" ({text}: the system gives no more memory, or no more threads)"
    if amount:
        in_bytes = amount[1].endswith(" bytes")  # as torch says it on a CPU
        asked = f"{bytes_of(amount[1]) / 2**20:,.0f} MiB" if in_bytes else amount[1]
        asked = f" (asked for {asked})"
    place = f" {where}" if where else ""
    return f"out of memory{place}{asked}; {remedy}"


def bytes_of(amount):
    """The bytes of an amount in torch's words: "80 bytes" on a CPU, "2.00 GiB" on a GPU."""
    number, _, unit = amount.partition(" ")
    return float(number) * 1024 ** ("KMGTP".find(unit[:1]) + 1)


def whole_memory(text):
    """The bytes of a GPU, as torch's message names them, or of this machine."""
    capacity = re.search(r"total capacity of (\d[\d.]* [KMGTP]i?B)", text)
    if capacity:
        return bytes_of(capacity[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
