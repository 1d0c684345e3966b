"""What the rules are made of: the page that a rule looks at, its verdicts, and common steps."""

import itertools
import math
import re
from collections import defaultdict
from functools import cached_property, lru_cache, wraps
from typing import NamedTuple

import numpy as np
import regex

from corpus.tokenizer import PATTERN


class Drop(NamedTuple):
    """A rule's verdict: the document is dropped."""
    why: str
    mark: str = ""  # the part of the text that shows the reason


class Edit(NamedTuple):
    """A rule's verdict: the document is kept with this text."""
    text: str
    why: str
    marks: tuple  # the parts that were taken out


class Page:
    """A document as the rules see it; a value that several rules need is computed once."""

    def __init__(self, document, scorers):
        self.document = document
        self.text = document["text"]
        self.scorers = scorers  # {"language": text -> 0..1, "content": sentence -> 0..1 or None}

    @cached_property
    def words(self):
        return self.text.split()

    @cached_property
    def word_lengths(self):
        """Characters of each word, int64 (n,)."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def word_ids(self):
        """The ids of the words, as `numbered` gives them."""
        return numbered(self.words)

    @cached_property
    def lines(self):
        """The lines that are not blank.

        # DIFFERS FROM OLMo: Dolma's code counts blank lines too; its web text (CCNet's) has none.
        """
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def pieces(self):
        """The pieces that the tokenizer's pattern cuts: tokens before any merge."""
        return regex.findall(PATTERN, self.text)


def drop_outside(what, least, most=math.inf):
    """Decorator: turns a measurement into a rule that drops documents outside [least, most]."""
    def rule_of(measure):
        @wraps(measure)
        def rule(page):
            value = measure(page)
            if least <= value <= most:
                return None
            shown = value if isinstance(value, int) else f"{value:.3g}"
            return Drop(f"{what}: {shown}, not {least:g} to {most:g}")
        return rule
    return rule_of


def ratio(part, total):
    """part / total; 0 for an empty total."""
    return part / total if total else 0.0


def keep_parts(parts, keep, joint, why):
    """The Edit that keeps the parts whose flag in `keep` is true; None if that is all of them."""
    if all(keep):
        return None
    removed = tuple(part for part, kept in zip(parts, keep, strict=True) if not kept)
    text = joint.join(itertools.compress(parts, keep))
    return Edit(text, f"{len(removed)} {why}", removed)


def numbered(strings):
    """Returns (ids, kinds): int64 (n,), equal strings have equal ids, from 0 to kinds - 1."""
    id_of = defaultdict(itertools.count().__next__)
    ids = np.fromiter(map(id_of.__getitem__, strings), np.int64, len(strings))
    return ids, len(id_of)


NOT_ASCII = re.compile(r"[^\x00-\x7f]+")


def count_characters(text, kind):
    """Returns (ASCII, all): how many characters `kind` names, such as str.isalpha."""
    # the ASCII ones in two calls for the whole text, as one call for each takes 20 times as long
    found = len(text.encode("ascii", "ignore").translate(None, ascii_without(kind)))
    others = "" if text.isascii() else "".join(NOT_ASCII.findall(text))
    return found, found + sum(map(kind, others))


@lru_cache
def ascii_without(kind):
    """The ASCII characters, as bytes, that `kind` does not name."""
    return bytes(code for code in range(128) if not kind(chr(code)))
