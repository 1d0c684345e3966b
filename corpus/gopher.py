"""Gopher's rules: the form of a text, and how much of it is said again.

From arXiv 2112.11446, appendix A.1: quality filters, and table A1 on repetition. The limits are
those of Dolma's configs.
"""

from collections import Counter
from itertools import filterfalse

import numpy as np

from corpus.pages import Drop, drop_outside, ratio

STOP_WORDS = frozenset("the be to of and that have with".split())

ELLIPSIS = "\u2026"


@drop_outside("Number of words", 50, 100_000)
def gopher_word_count(page):
    """Words, that is text between spaces: 50 to 100,000 (Gopher)."""
    return len(page.words)


@drop_outside("Median characters of a word", 3, 10)
def gopher_word_length(page):
    """Median length of a word, 3 to 10 characters (Dolma's code; the papers say mean)."""
    lengths = np.sort(page.word_lengths)
    if not len(lengths):
        return 0
    middle = len(lengths) // 2
    return (lengths[middle] + lengths[-1 - middle]) / 2  # the same one, if their number is odd


@drop_outside("Words with # or \u2026 / words", 0, 0.1)
def gopher_symbols(page):
    """Words with # or an ellipsis, at most 10 % (Gopher)."""
    if "#" not in page.text and ELLIPSIS not in page.text:
        return 0  # of most pages: one look at the text is faster than one at each word
    return ratio(sum("#" in word or ELLIPSIS in word for word in page.words), len(page.words))


@drop_outside("Words with a letter / words", 0.8)
def gopher_alphabetic(page):
    """Words with a letter, at least 80 % (Gopher)."""
    # isalpha of the complete word is only the fast way to find most of them
    others = list(filterfalse(str.isalpha, page.words))
    without_letter = sum(not any(map(str.isalpha, word)) for word in others)
    return ratio(len(page.words) - without_letter, len(page.words))


@drop_outside("Occurrences of the, be, to, of, and, that, have, with", 2)
def gopher_stop_words(page):
    """Occurrences of eight common words, at least 2 (Gopher; Dolma counts "the the" as two)."""
    return sum(map(STOP_WORDS.__contains__, page.words))


@drop_outside("Lines that begin with * or - / lines", 0, 0.9)
def gopher_bullets(page):
    """Lines that begin with a bullet, at most 90 % (Gopher)."""
    return ratio(sum(line.startswith(("*", "-")) for line in page.lines), len(page.lines))


@drop_outside("Lines that end with \u2026 / lines", 0, 0.3)
def gopher_ellipsis(page):
    """Lines that end with an ellipsis, at most 30 % (Gopher)."""
    return ratio(sum(line.endswith(ELLIPSIS) for line in page.lines), len(page.lines))


# Gopher's table A1, except that its limit for the characters in repeated lines is 0.2, not 0.3.
REPEATED_LINES_LIMIT = 0.3

TOP_NGRAM_LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}

REPEATED_NGRAM_LIMITS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher_repetition(page):
    """Drops documents with too much text in lines or n-grams that occur again (Gopher, table A1).

    Language models repeat themselves more after training on such text.
    """
    verdict = repeated_lines(page)
    if verdict is None:
        verdict = repeated_ngrams(page)
    return verdict


def repeated_lines(page):
    """The Drop for repeated lines, counted all their times, by number and by characters."""
    repeated = {line: n for line, n in Counter(page.lines).items() if n > 1}
    worst = max(repeated, key=repeated.get, default="")
    part = ratio(sum(repeated.values()), len(page.lines))
    if part > REPEATED_LINES_LIMIT:
        return Drop(f"{part:.2f} of the lines occur more than once, over 0.3", worst)
    characters = sum(len(line) * n for line, n in repeated.items())
    part = ratio(characters, page.word_lengths.sum())  # spaces do not count as characters
    if part > REPEATED_LINES_LIMIT:
        return Drop(f"{part:.2f} of the characters in repeated lines, over 0.3", worst)
    return None


def repeated_ngrams(page):
    """The Drop for the smallest n whose repeated n-grams hold too many characters."""
    for n, part, first in ngram_ratios(page.word_ids, page.word_lengths):
        if n in TOP_NGRAM_LIMITS:
            limit = TOP_NGRAM_LIMITS[n]
            what = f"the most frequent {n}-gram holds"
        else:
            limit = REPEATED_NGRAM_LIMITS[n]
            what = f"repeated {n}-grams hold"
        if part > limit:
            example = " ".join(page.words[first:first + n])
            return Drop(f"{what} {part:.2f} of the characters, over {limit}", example)
    return None


def ngram_ratios(numbered_words, lengths):
    """Yield (n, ratio, first) for n from 2 to 10, until no n-gram occurs twice.

    2 to 4: all characters of the most frequent n-gram / characters of all words.
    5 to 10: characters of n-grams that occur again / characters of all n-grams.
    `first` is where the most frequent n-gram begins. `lengths` has the words' characters.

    # DIFFERS FROM OLMo: an n-gram that occurs once is no repetition, however long its words are;
    and these rules work: Dolma's configs misspell the first kind, so that it never fires there.
    """
    word_ids, kinds = numbered_words
    ends = np.concatenate(([0], lengths.cumsum()))  # characters before each word
    # where n-grams begin that may occur again, and their ids: those whose (n-1)-gram did
    places = np.arange(len(word_ids))
    ids = word_ids
    for n in range(2, min(10, len(word_ids)) + 1):
        if len(places) and places[-1] + n > len(word_ids):  # the last one lacks a word
            places = places[:-1]
            ids = ids[:-1]
        # an n-gram is an (n-1)-gram and one more word
        ids, counts = grouped(ids * kinds + word_ids[places + n - 1])
        occurrences = counts[ids]
        is_again = occurrences > 1
        if not is_again.any():
            return
        best = occurrences.argmax()
        first = places[best]
        if n in TOP_NGRAM_LIMITS:
            part = occurrences[best] * (ends[first + n] - ends[first]) / ends[-1]
        else:
            characters = ends[n:] - ends[:-n]
            part = characters[places[is_again]].sum() / characters.sum()
        yield n, float(part), int(first)
        places = places[is_again]
        ids = ids[is_again]


def grouped(values):
    """Returns (ids, counts): equal values have equal ids, from 0; how often each id occurs.

    np.unique does the same, in about twice the time.
    """
    order = values.argsort()
    in_order = values[order]
    is_new = in_order[1:] != in_order[:-1]
    ids = np.zeros(len(values), np.int64)
    ids[order[1:]] = is_new.cumsum()
    return ids, np.bincount(ids)
