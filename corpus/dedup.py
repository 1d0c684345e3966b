"""Deduplication and decontamination: what was seen before, what an evaluation set holds."""

import hashlib
import math
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from corpus.documents import checked_document, parse, read_records
from corpus.rules import WORD, Drop, keep_parts
from corpus.stages import input_ages
from support.files import UserError


class DigestSet:
    """The exact filter: a set of 16-byte digests, about 100 bytes an item."""

    def __init__(self):
        self.digests = set()

    def add(self, item):
        """Take in `item`, a str; returns whether it was there before."""
        digest = digest_of(item)
        if digest in self.digests:
            return True
        self.digests.add(digest)
        return False


class BloomFilter:
    """Bloom's filter: never forgets an item, takes a new one for an old one at a chosen rate.

    With n items, `bits` = -n ln(p) / ln(2)^2 and `hashes` = bits / n ln(2) keep the rate at p.
    """

    def __init__(self, items, fp_rate):
        self.bits = self.bits_for(items, fp_rate)
        self.hashes = max(1, round(self.bits / items * math.log(2)))
        self.table, self.count = bytearray(-(-self.bits // 8)), 0

    @staticmethod
    def bits_for(items, fp_rate):
        return math.ceil(-items * math.log(fp_rate) / math.log(2) ** 2)

    def positions(self, item):
        digest = digest_of(item)  # two halves make all the hashes (Kirsch and Mitzenmacher)
        first, step = int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big") | 1
        return [(first + i * step) % self.bits for i in range(self.hashes)]

    def add(self, item):
        """Take in `item`, a str; returns whether it seems to have been there before."""
        table, old = self.table, True
        for position in self.positions(item):
            if not table[position >> 3] >> (position & 7) & 1:
                table[position >> 3] |= 1 << (position & 7)
                old = False
        self.count += not old
        return old

    def fp_rate(self):
        """The rate that the formula gives for the items taken in so far."""
        return (1 - (1 - 1 / self.bits) ** (self.hashes * self.count)) ** self.hashes


def digest_of(item):
    return hashlib.blake2b(item.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def deduplicate(documents, seen, funnel):
    """Yield the documents without what came before: url, whole text, paragraph; the first stays.

    `seen` maps each level that is wanted to its filter. A paragraph is a line; a copy of one, in
    the same document or an earlier one, is taken out; a document of nothing else is dropped.
    """
    for document in documents:
        url = document["metadata"].get("url")
        if "url" in seen and url and seen["url"].add(str(url)):
            funnel.drop("url", document, Drop(f"an earlier document has {url}"))
            continue
        if "document" in seen and seen["document"].add(document["text"]):
            funnel.drop("document", document, Drop("an earlier document has the same text"))
            continue
        if "paragraph" in seen:
            paragraphs = document["text"].split("\n")
            stays = [not (text.strip() and seen["paragraph"].add(text)) for text in paragraphs]
            edit = keep_parts(paragraphs, stays, "\n", "paragraphs seen before")
            if edit and not edit.text.strip():
                funnel.drop("paragraph", document, Drop("all of it was seen before"))
                continue
            if edit:
                document = funnel.edit("paragraph", document, edit)
        yield document


def evaluation_texts(path):
    """The texts of an evaluation set: documents, plain text, or a task's request file.

    Of a request that is the rendered prompt with its answer, and each text in the raw `doc`.
    """
    for record in read_records(path, "", Counter()):
        entry = parse(record)
        if isinstance(entry, dict) and isinstance(entry.get("request"), dict):
            yield "".join(str(entry["request"].get(part, ""))
                          for part in ("context", "continuation"))
            yield from strings_in(entry.get("doc"))
        else:
            yield checked_document(entry, "", record, Counter())["text"]


def strings_in(value):
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def evaluation_sets(config, source):
    """((name, path, age), ...) of what a source must not hold; code is exempt (Dolma, Paloma)."""
    for name, path in config.decontaminate.items():
        if not Path(path).exists():
            raise UserError(f"decontaminate: {name}: {path}: no such file or folder")
    return () if "code_extension" in source.rules else tuple(
        (name, path, tuple(input_ages(path))) for name, path in config.decontaminate.items())


@lru_cache(maxsize=1)  # workers that are forked inherit it
def evaluation_paragraphs(sets):
    """{digest: name of its set} of each paragraph that no document may hold (Paloma, sec. 3.1).

    A paragraph is a line without the spaces at its ends. Matching is exact: another Unicode form is
    another paragraph.
    """
    paragraphs = {}
    for name, path, _ in sets:
        for text in evaluation_texts(path):
            for paragraph in map(str.strip, text.split("\n")):
                if is_searched_for(paragraph):
                    paragraphs.setdefault(digest_of(paragraph), name)
    return paragraphs


def is_searched_for(paragraph):
    """Whether an evaluation paragraph counts: from 13 words on, and with a letter or digit."""
    return len(WORD.findall(paragraph)) >= 13 and bool(re.search("[A-Za-z0-9]", paragraph))


@lru_cache
def searchable_lines(files):
    """(how many different lines of files decontamination searches for, how many there are)."""
    lines = {line.strip() for file in files for text in evaluation_texts(file)
             for line in text.split("\n")} - {""}
    return sum(map(is_searched_for, lines)), len(lines)


def decontaminate(documents, paragraphs, funnel):
    """Yield the documents that hold none of the evaluation `paragraphs`; one hit drops them."""
    for document in documents:
        # DIFFERS FROM OLMo: spaces at the ends of a line do not hide it
        for paragraph in map(str.strip, document["text"].split("\n") if paragraphs else ()):
            name = len(paragraph) >= 13 and paragraphs.get(digest_of(paragraph))
            if name:
                funnel.drop(f"decontaminate:{name}", document,
                            Drop(f"holds a paragraph of {name}", paragraph))
                break
        else:
            yield document
