"""Training of a new tokenizer by byte-pair encoding (BPE).

BPE begins with the 256 bytes and adds, again and again, the pair of neighbouring tokens that occurs
most often as a token of its own (arXiv 1508.07909). Pairs do not cross the borders of the pieces
that the tokenizer's pattern cuts.
"""

import heapq
import unicodedata
from collections import Counter

import numpy as np
import regex

from corpus.storage import stored_documents
from corpus.tokenizer import (EOS, PAD, PATTERN, PII_MARKERS, SPACE_RUNS, Tokenizer,
                              byte_characters)
from support.bars import bar
from support.files import UserError

BPE_SAMPLE_CHARS = 3_000_000  # of each source, to learn the merges from

WALL = -1  # a cell that no pair takes in: around the words, and where a merge left a gap


def sample_texts(clean):
    """Yield the first BPE_SAMPLE_CHARS characters of the clean texts of each source."""
    for source, folder in clean.items():
        room = BPE_SAMPLE_CHARS  # for each source: the largest would crowd out the others' words
        for document in stored_documents(folder, source):
            if not room:
                break
            text = document["text"][:room]  # a document may be longer than the sample
            room -= len(text)
            yield text


def train_bpe(texts, vocab_size):
    """Learn a Tokenizer of `vocab_size` ids: 256 bytes, merges, 23 runs of spaces, 5 added tokens.

    The pair that occurs most often is merged first; ties go to the smaller pair of ids, so that the
    result depends only on the texts, in any order. Raises UserError if they are too short for it.
    """
    added = [*SPACE_RUNS, *PII_MARKERS, PAD, EOS]
    n_merges = vocab_size - 256 - len(added)
    if n_merges < 0:
        raise UserError(f"tokenizer=bpe:{vocab_size}: needs at least {256 + len(added)} ids")

    # count the distinct pieces: merges never cross the border of a piece
    pieces = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
    for run in SPACE_RUNS:  # these are tokens already
        pieces.pop(run, None)

    merges = learn_merges(pieces, n_merges)
    if len(merges) < n_merges:
        possible = 256 + len(merges) + len(added)
        raise UserError(f"tokenizer=bpe:{vocab_size}: the sources hold only enough text for "
                        f"{possible} ids; lower it to bpe:{possible} or add text")
    return Tokenizer(tokenizer_spec(merges, added))


def learn_merges(words, n_merges):
    """The merges [(left id, right id)], best first, of {word: count}; merge i makes id 256 + i.

    The same as the textbook's loop (count all pairs, join the most frequent one everywhere), but a
    merge visits only the places of its pair. A place, not a word: text without spaces (Chinese,
    DNA) is one long word, and to spell it anew for each merge would take hours.
    """
    row = PairRow(words)
    merges = []
    with bar(None, "learning merges", n_merges, "merges") as shown:
        while len(merges) < n_merges:
            pair = row.most_frequent_pair()
            if pair is None:
                break
            row.join(pair, 256 + len(merges))
            merges.append(pair)
            shown.update()
    return merges


class PairRow:
    """All words in one row of cells, an id each, and the places of every pair of neighbours.

        cell     0  1  2  3  4  5  6  7           the words ab and abab
        ids      |  a  b  |  a  b  a  b  |        | is a wall
        places   {(a, b): [1, 4, 6], (b, a): [5]}

    A merge writes its new id into the left cell of each place, makes a wall of the right one, and
    links the left cell to the next one that is alive. A pair gets all of its places at the merge
    that makes the younger of its ids, and can only lose some of them later.
    """

    def __init__(self, words):
        spellings = [word.encode() for word in words]
        # byte 0 stands for the walls until the ids are wider than a byte
        self.ids = np.frombuffer(b"\0".join([b"", *spellings, b""]), np.uint8).astype(np.int32)
        lengths = np.array([len(spelling) for spelling in spellings], np.int64)
        walls = np.concatenate(([0], np.cumsum(lengths + 1)))
        self.ids[walls] = WALL
        # how often the word of each cell occurs, and the cells to the left and right
        self.counts = np.repeat([0, *words.values()], [1, *(lengths + 1)])
        self.before = np.arange(len(self.ids), dtype=np.int32) - 1
        self.after = np.arange(len(self.ids), dtype=np.int32) + 1
        self.after[-1] = len(self.ids) - 1
        self.places = {}  # pair -> the cells of its left ids, in order
        self.heap = []  # (-count, pair): the least one is the most frequent pair
        self.add_pairs(np.arange(len(self.ids), dtype=np.int32))

    def add_pairs(self, cells):
        """Note the pairs that begin at `cells`; all places of such a pair are among them."""
        left = self.ids[cells]
        right = self.ids[self.after[cells]]
        inside = (left != WALL) & (right != WALL)
        cells = cells[inside]
        pairs = left[inside].astype(np.int64) << 32 | right[inside]
        # subtle: stable, so that the cells of a pair stay in the order of the row
        order = np.argsort(pairs, kind="stable")
        cells = cells[order]
        pairs, begins = np.unique(pairs[order], return_index=True)
        ends = np.append(begins, len(cells))[1:]
        for pair, begin, end in zip(pairs.tolist(), begins, ends, strict=True):
            pair = (pair >> 32, pair & 0xFFFFFFFF)
            self.places[pair] = cells[begin:end]
            heapq.heappush(self.heap, (-int(self.counts[cells[begin:end]].sum()), pair))

    def most_frequent_pair(self):
        """The pair that occurs most often, the smaller one of two; None if no pair is left."""
        while self.heap:
            count, pair = heapq.heappop(self.heap)
            # merges since then may have taken places of this pair: count what is left
            cells = self.places[pair]
            left, right = pair
            is_there = (self.ids[cells] == left) & (self.ids[self.after[cells]] == right)
            cells = self.places[pair] = cells[is_there]
            now = -int(self.counts[cells].sum())
            if now == count:
                return pair
            if now:
                heapq.heappush(self.heap, (now, pair))
        return None

    def join(self, pair, new_id):
        """Write `new_id` for each `pair`, from left to right."""
        left = self.places.pop(pair)
        if pair[0] == pair[1]:
            left = self.without_overlaps(left)
        right = self.after[left]
        self.ids[left] = new_id
        self.ids[right] = WALL
        beyond = self.after[right]
        self.after[left] = beyond
        self.before[beyond] = left
        # each pair that is new has the new id on one side
        self.add_pairs(np.unique(np.concatenate((self.before[left], left))))

    def without_overlaps(self, cells):
        """Every second cell of those that follow one another: aaa holds one aa, aaaa two."""
        index = np.arange(len(cells))
        is_first = np.concatenate(([True], self.after[cells[:-1]] != cells[1:]))
        first = np.maximum.accumulate(np.where(is_first, index, 0))
        return cells[(index - first) % 2 == 0]


def tokenizer_spec(merges, added):
    """The content of a Hugging Face tokenizer.json with these merges and added tokens."""
    characters = byte_characters()
    names = [characters[byte] for byte in range(256)]
    pairs = []
    for left, right in merges:
        pairs.append([names[left], names[right]])
        names.append(names[left] + names[right])
    added_tokens = []
    for i, token in enumerate(added):
        special = token in (EOS, PAD)
        added_tokens.append({
            "id": len(names) + i, "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": not special, "special": special})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False,
                  "vocab": {name: rank for rank, name in enumerate(names)},
                  "merges": pairs},
    }
