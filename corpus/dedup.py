"""Deduplication and decontamination: text that an earlier document or an evaluation set holds."""

import hashlib
import math
from collections import Counter
from functools import lru_cache
from itertools import compress

import numpy as np

from corpus.documents import as_document, parse, read_records, warn
from corpus.inputs import input_digests
from corpus.rules import DEDUPLICATIONS, Drop, keep_parts
from corpus.source_files import is_there
from corpus.words import count_words, has_more_than_marks
from support.files import UserError, here


# ---- Deduplication -------------------------------------------------------------------------------

def copies_marked(batches, config, source):
    """Yield (documents, copies, funnel) of batches (documents, keys, funnel), in their order.

    The levels are those that the source's rules name. Says how much memory Bloom filters take
    before it reads anything, and afterwards if one was too small.
    """
    levels = [level for level in source.rules if level in DEDUPLICATIONS]
    seen = {level: DigestSet() for level in levels}
    if config.bloom_items:
        seen = bloom_filters(levels, config, source)
    for documents, keys, funnel in batches:
        yield documents, find_copies(keys, seen), funnel
    if config.bloom_items:
        for level, items in seen.items():
            if items.count > config.bloom_items:
                warn(f"{source.name}: the {level} filter took {items.count:,} items; its rate of "
                     f"false positives is now {items.fp_rate():.2g}; raise bloom_items")


def bloom_filters(levels, config, source):
    """{level: an empty filter}; UserError if they do not fit into memory."""
    megabytes = BloomFilter.bits_for(config.bloom_items, config.bloom_fp_rate) / 8e6
    print(f"data: {source.name}: {len(levels)} Bloom filters of {megabytes:,.1f} MB each, for "
          f"{config.bloom_items:,} items at a false-positive rate of {config.bloom_fp_rate:g}")
    try:
        return {level: BloomFilter(config.bloom_items, config.bloom_fp_rate) for level in levels}
    except (MemoryError, OverflowError):
        raise UserError(f"bloom_items={config.bloom_items}: filters of {megabytes:,.0f} MB do not "
                        "fit into memory; lower it or raise bloom_fp_rate") from None


# Deduplication has three steps. Workers compute the digests of a batch (keys_of), the main process
# alone knows which of them came before (find_copies), and workers take the copies out
# (without_copies). So the main process handles 16 bytes for each text.

def keys_of(documents, rules):
    """A dict for each document: what the levels among the rules compare, as digests; b"": nothing.

    "url" and "document" have one digest, "paragraph" a list of them, one for each line.
    """
    keys = []
    for document in documents:
        url = document["metadata"].get("url")
        of_document = {}
        if "url" in rules:
            of_document["url"] = digest_of(str(url)) if url else b""
        if "document" in rules:
            of_document["document"] = digest_of(document["text"])
        if "paragraph" in rules:
            of_document["paragraph"] = [digest_of(line) if line.strip() else b""
                                        for line in document["text"].split("\n")]
        keys.append(of_document)
    return keys


def find_copies(keys, seen):
    """What of each document came before: "url" or "document", or whether each of its lines did.

    `seen` holds a filter (DigestSet or BloomFilter) for each level. None: nothing came before.

    # DIFFERS FROM OLMo: only documents that passed the rules are seen here. The toolkit's filters
    have seen all documents when the rules drop some, so that the one copy left may be lost too.
    """
    copies = [None] * len(keys)
    left = range(len(keys))  # documents that are no copies so far
    # the cheapest level first; in Dolma it also drops the most
    for level in ("url", "document"):
        if level in seen:
            compared = [i for i in left if keys[i][level]]
            is_old = seen[level].add_all([keys[i][level] for i in compared])
            for i in compress(compared, is_old):
                copies[i] = level
            left = [i for i in left if not copies[i]]
    # last and finest: boilerplate such as menus, which other documents have too
    if "paragraph" in seen:
        digests = [digest for i in left for digest in keys[i]["paragraph"] if digest]
        is_old = iter(seen["paragraph"].add_all(digests))
        for i in left:
            copies[i] = [next(is_old) if digest else False for digest in keys[i]["paragraph"]]
    return copies


def without_copies(documents, copies, funnel):
    """Yield the documents without what came before (find_copies); the first copy is kept.

    "url" drops a document whose URL came before, "document" one whose text came before, "paragraph"
    takes out lines that came before, in this document or an earlier one (Dolma's three stages).
    """
    for document, copy in zip(documents, copies, strict=True):
        if copy == "url":
            url = document["metadata"]["url"]
            funnel.drop("url", document, Drop(f"an earlier document has {url}"))
        elif copy == "document":
            funnel.drop("document", document, Drop("an earlier document has the same text"))
        elif copy and any(copy):
            keep = [not is_old for is_old in copy]
            edit = keep_parts(document["text"].split("\n"), keep, "\n", "paragraphs seen before")
            if edit.text.strip():
                yield funnel.edit("paragraph", document, edit)
            else:
                funnel.drop("paragraph", document, Drop("all of it was seen before"))
        else:
            yield document


def digest_of(text):
    """16 bytes that stand for `text`; two texts have the same ones with probability 2 ** -128."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class DigestSet:
    """The exact filter: a set of digests, about 100 bytes an item."""

    def __init__(self):
        self.digests = set()

    def add_all(self, digests):
        """Add digests, one after another; returns for each whether it was there before."""
        is_old = []
        for digest in digests:
            is_old.append(digest in self.digests)
            self.digests.add(digest)
        return is_old


BLOOM_CHUNK = 2**13  # digests: the arrays of a chunk take about 1.8 kB for each


class BloomFilter:
    """Bloom's filter: a set in a fixed number of bits, as Dolma uses it for the web.

    An item sets `hashes` of the `bits`. An item whose bits are all set seems to be an old one: an
    old item is never taken for new, a new one is taken for old with probability p. After n items
    each bit is set with probability 1 - (1 - 1 / bits) ** (hashes * n), so

        p = (1 - (1 - 1 / bits) ** (hashes * n)) ** hashes

    which is least when half of the bits are set. Then p = 2 ** -hashes, and

        bits = -n ln(p) / ln(2)^2       p = 1e-6 (Dolma's for the web): 28.8 bits an item
        hashes = bits / n * ln(2)                                       20 hashes
    """

    def __init__(self, items, fp_rate):
        self.bits = self.bits_for(items, fp_rate)
        self.hashes = max(1, round(self.bits / items * math.log(2)))
        self.table = bytearray(-(-self.bits // 8))  # rounded up to bytes
        self.count = 0  # distinct items added, as far as the filter can tell

    @staticmethod
    def bits_for(items, fp_rate):
        """The bits that hold `items` items at a false-positive rate of `fp_rate`."""
        return math.ceil(-items * math.log(fp_rate) / math.log(2) ** 2)

    def positions(self, digests):
        """The bits of each item, uint64 (n, hashes).

        Two hashes make all of them (Kirsch and Mitzenmacher, 2006).
        """
        halves = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
        bits = np.uint64(self.bits)
        first = halves[:, :1] % bits
        step = (halves[:, 1:] | np.uint64(1)) % bits  # not 0, which would make them all one bit
        # subtle: taken modulo `bits` before, so that the products stay far below 2**64
        return (first + step * np.arange(self.hashes, dtype=np.uint64)) % bits

    def add_all(self, digests):
        """Add digests, one after another; returns for each whether it seems to be an old one."""
        is_old = []
        for begin in range(0, len(digests), BLOOM_CHUNK):
            is_old += self.add_chunk(digests[begin:begin + BLOOM_CHUNK])
        return is_old

    def add_chunk(self, digests):
        """add_all at once: an item is old if each of its bits was set before, or by an earlier one.

        In a loop over items and bits it would take three times as long.
        """
        table = np.frombuffer(self.table, np.uint8)
        positions = self.positions(digests)
        is_free = (table[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 0
        items, _ = is_free.nonzero()  # the item of each bit that is not set, in order
        bits, first, same = np.unique(positions[is_free], return_index=True, return_inverse=True)
        is_old = np.ones(len(digests), bool)
        is_old[items[items[first][same] == items]] = False  # the first that sets one of its bits
        np.bitwise_or.at(table, bits >> 3, np.uint8(1) << (bits & 7).astype(np.uint8))
        self.count += len(digests) - int(is_old.sum())
        return is_old.tolist()

    def fp_rate(self):
        """The formula's false-positive rate for the items added so far."""
        return (1 - (1 - 1 / self.bits) ** (self.hashes * self.count)) ** self.hashes


# ---- Decontamination -----------------------------------------------------------------------------
# A model that has read its test knows the answers. Paloma's rule (arXiv 2312.10523, section 3.1):
# a document with a paragraph of an evaluation set is dropped; code is exempt.

def decontaminate(documents, paragraphs, funnel):
    """Yield the documents that hold none of the evaluation `paragraphs`."""
    for document in documents:
        found = find_paragraph(document["text"], paragraphs)
        if found is None:
            yield document
        else:
            name, paragraph = found
            verdict = Drop(f"holds a paragraph of {name}", paragraph)
            funnel.drop(f"decontaminate:{name}", document, verdict)


def find_paragraph(text, paragraphs):
    """(name of the set, paragraph) of the first evaluation paragraph in a text, or None."""
    if not paragraphs:
        return None
    for line in text.split("\n"):
        # DIFFERS FROM OLMo: spaces at the ends of a line do not hide it
        paragraph = line.strip()
        if len(paragraph) < LEAST_WORDS:  # as many words have at least as many characters
            continue
        name = paragraphs.get(digest_of(paragraph))
        if name:
            return name, paragraph
    return None


LEAST_WORDS = 13  # of an evaluation paragraph; shorter ones occur by chance


@lru_cache(maxsize=2)  # code has no sets; filled before the workers are forked, which then share it
def evaluation_paragraphs(sets):
    """{digest: name of its set} of the paragraphs that no document may hold.

    A paragraph is a line without the spaces at its ends. Matching is exact: the same words in
    another Unicode form are another paragraph.
    """
    paragraphs = {}  # digests, as an evaluation suite can have millions of paragraphs
    for name, path, _ in sets:
        before = len(paragraphs)
        for text in evaluation_texts(path):
            for line in text.split("\n"):
                paragraph = line.strip()
                if is_searched_for(paragraph):
                    paragraphs.setdefault(digest_of(paragraph), name)
        if len(paragraphs) == before:
            warn(f"decontaminate: {name}: {path}: adds no line that is searched for; such a line "
                 f"has {LEAST_WORDS} words or more")
    return paragraphs


def evaluation_sets(config, source):
    """((name, path, digests of its files), ...) of the sets that a source must not hold."""
    for name, path in config.decontaminate.items():
        if not is_there(path):
            raise UserError(f"decontaminate: {name}: {path}: no such file or folder"
                            f"{here(path)}; put it there or leave it out")
    if "code_extension" in source.rules:  # code is exempt (Dolma, Paloma)
        return ()
    return tuple((name, path, tuple(input_digests(path, config.data_dir)))
                 for name, path in config.decontaminate.items())


def evaluation_texts(path):
    """Yield the texts of an evaluation set: documents, text files, or a task's request files.

    A request gives its prompt with the answer, and each string in its raw `doc`.
    """
    for record in read_records(path):
        entry = parse(record)
        if isinstance(entry, dict) and isinstance(entry.get("request"), dict):
            request = entry["request"]
            yield str(request.get("context", "")) + str(request.get("continuation", ""))
            yield from strings_in(entry.get("doc"))
        else:
            yield as_document(record, "", Counter())["text"]


def strings_in(value):
    """Yield every string in a JSON value, keys aside."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from strings_in(part)


def is_searched_for(paragraph):
    """Whether an evaluation paragraph counts: 13 words or more, and not marks alone."""
    return count_words(paragraph, LEAST_WORDS) == LEAST_WORDS and has_more_than_marks(paragraph)


@lru_cache
def searchable_lines(files):
    """Returns (searched, total): the distinct lines of `files` that decontamination searches for,
    and all distinct lines."""
    lines = set()
    for file in files:
        for text in evaluation_texts(file):
            lines.update(line.strip() for line in text.split("\n"))
    lines.discard("")
    return sum(map(is_searched_for, lines)), len(lines)
