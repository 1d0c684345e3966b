"""Dolma's rules: which documents, and which parts of them, are kept out of training.

A rule is a function of a Page. It returns None (nothing to do), a Drop (the document is dropped) or
an Edit (the document is kept with another text). Most rules measure one number, and
`@drop_outside` names its limits. The limits come from:

    C4      arXiv 1910.10683, section 2.2
    Gopher  arXiv 2112.11446, appendix A.1: quality filters, and table A1 on repetition
    Dolma   arXiv 2402.00159, and the configs and taggers of its toolkit (v1.5 and v1.6)

To add a rule, write its function and name it in RULES; a source then takes it by that name
(corpus/sources.py). A name that begins with gopher or code joins that rule set by itself.
"""

import itertools
import math
import re
from collections import Counter
from functools import cached_property, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from corpus.tokenizer import PATTERN
from corpus.words import count_words


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
    def lines(self):
        """The lines that are not blank.

        # DIFFERS FROM OLMo: Dolma's code counts blank lines too; its web text (CCNet's) has none.
        """
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def pieces(self):
        """The pieces that the tokenizer's pattern cuts: tokens before any merge."""
        return regex.findall(PATTERN, self.text)


def filter_documents(documents, rules, funnel, scorers):
    """Yield the documents that pass every rule, in order; the funnel counts drops and edits."""
    for document in documents:
        page = Page(document, scorers)
        for rule in rules:
            verdict = RULES[rule](page)
            if isinstance(verdict, Edit) and not verdict.text.strip():
                verdict = Drop(f"{verdict.why}, and nothing is left")
            if isinstance(verdict, Drop):
                funnel.drop(rule, page.document, verdict)
                break
            if isinstance(verdict, Edit):
                edited = funnel.edit(rule, page.document, verdict)
                page = Page(edited, scorers)  # the next rules see the edited text
        else:  # no rule dropped it
            yield page.document


# ---- What rules are made of ----------------------------------------------------------------------

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
    id_of = {}
    ids = np.array([id_of.setdefault(string, len(id_of)) for string in strings], np.int64)
    return ids, len(id_of)


# ---- Language ------------------------------------------------------------------------------------

def empty(page):
    """Drops a document without text (Dolma v1.6: min_text_length 1). Every source has this rule."""
    return None if page.text.strip() else Drop("no text")


FUNCTION_WORDS = frozenset(
    "the be to of and that have with a in is it for on as are was this by at or from an not can "
    "if you which will has but all we they".split())


def english_score(text):
    """A stand-in for Dolma's FastText model: ASCII letters / letters * how common the words are.

    In English prose every third word is a function word; one in five scores 1, one in ten 0.5.
    """
    words = text.lower().split()
    common = ratio(sum(word in FUNCTION_WORDS for word in words), len(words))
    latin = 1.0
    if not text.isascii():
        letters = "".join(filter(str.isalpha, text))
        latin = ratio(sum(map(str.isascii, letters)), len(letters))
    return latin * min(1.0, 5 * common)


# Put your own models here. Each returns a score from 0 to 1: how English a text is, and how hateful
# or obscene a sentence is. "none" means that nothing is scored.
LANGUAGE_SCORERS = {"stand-in": english_score}

CONTENT_SCORERS = {"none": None}


@drop_outside("Score as English", 0.5)
def language(page):
    """Score as English, at least 0.5 (Dolma, for all sources but code)."""
    return page.scorers["language"](page.text)


# ---- C4's rules ----------------------------------------------------------------------------------

LINES = re.compile(r"[^\n]*\n|[^\n]+")  # each with the newline that ends it


def c4_punctuation(page):
    """Takes out lines that do not end in . ? ! or " (C4; the only C4 rule in Dolma's web text).

    Blank lines have no end mark either, so that paragraphs then follow one another.
    """
    lines = LINES.findall(page.text)
    ends = (".", "?", "!", '"')
    keep = [line.rstrip().endswith(ends) for line in lines]
    return keep_parts(lines, keep, "", "lines without an end mark")


def c4_short_lines(page):
    """Takes out lines of fewer than 3 words, blank ones too (Dolma's C4 tagger)."""
    lines = LINES.findall(page.text)
    keep = [len(line.split()) >= 3 for line in lines]
    return keep_parts(lines, keep, "", "lines of fewer than 3 words")


def c4_document(page):
    """Drops a document with a brace, lorem ipsum or javascript (C4).

    # DIFFERS FROM OLMo: the toolkit's tagger has C4's list of bad words too; no list comes with
    this code. Dolma's web text was not filtered by either.
    """
    found = regex.search(r"(?i)\{|lorem ipsum|javascript", page.text)
    return Drop(f"holds {found[0]!r}", found[0]) if found else None


# ---- Code ----------------------------------------------------------------------------------------

DATA_EXTENSIONS = {"asm", "csv", "json", "svg"}

HEADER = regex.compile(  # comments in many languages; # also begins directives of C and Rust
    r"(?s)\A(?:\s*+(?:(?:#(?!include|define|undef|if|el|end|pragma|import|!?\[)|//|--|;|%)[^\n]*+"
    r"|/\*(?:(?!\*/).)*+\*/[ \t\r]*)(?:\n|\Z))++")


WORD_OR_MARKS = re.compile(r"\w+|[^\w\s]+")


def code_extension(page):
    """Drops files of data rather than code, by their extension (Dolma, on The Stack).

    # DIFFERS FROM OLMo: of Dolma's rules for code, RedPajama's are here. StarCoder's are not (XML
    templates, HTML with little visible text, share of comments), nor is the search for secrets:
    they need parsers that Python lacks (pygments, BeautifulSoup, detect-secrets).
    """
    metadata = page.document["metadata"]
    path = Path(str(metadata.get("path", page.document["id"])))
    extension = str(metadata.get("ext", path.suffix)).lower().lstrip(".")
    return Drop(f"a .{extension} file") if extension in DATA_EXTENSIONS else None


def code_header(page):
    """Takes out the comment at the head of a file if it holds a copyright (RedPajama, Dolma).

    # DIFFERS FROM OLMo: the toolkit takes out the first /* */ comment wherever it is, and leading
    lines of # // -- whether or not they hold a copyright, #include and #! among them; it counts
    their characters without the newlines, and so leaves the end of the last line.
    """
    header = HEADER.match(page.text)
    if not header or "copyright" not in header[0].lower():
        return None
    return Edit(page.text[header.end():], "its copyright header", (header[0],))


@drop_outside("Mean characters of a line", 0, 100)
def code_mean_line(page):
    """Mean length of a line, at most 100 characters (Dolma, on The Stack)."""
    lengths = [len(line) for line in page.text.splitlines()]
    return sum(lengths) / len(lengths)


@drop_outside("Characters of the longest line", 0, 1000)
def code_longest_line(page):
    """Longest line, at most 1,000 characters (Dolma, on The Stack)."""
    return max(map(len, page.text.splitlines()))


@drop_outside("Letters and digits / characters", 0.25)
def code_alphanumeric(page):
    """Letters and digits, at least 25 % of the characters (Dolma, on The Stack)."""
    return ratio(sum(map(str.isalnum, page.text)), len(page.text))


@drop_outside("Letters / tokens", 1.5)
def code_letters(page):
    """Letters per token, at least 1.5 (Dolma, on The Stack); words and runs of marks are tokens."""
    tokens = len(WORD_OR_MARKS.findall(page.text)) + 1  # the toolkit counts the gaps around them
    return sum(map(str.isalpha, page.text)) / tokens


# ---- Gopher's rules ------------------------------------------------------------------------------

STOP_WORDS = frozenset("the be to of and that have with".split())

ELLIPSIS = "\u2026"


@drop_outside("Number of words", 50, 100_000)
def gopher_word_count(page):
    """Words, that is text between spaces: 50 to 100,000 (Gopher)."""
    return len(page.words)


@drop_outside("Median characters of a word", 3, 10)
def gopher_word_length(page):
    """Median length of a word, 3 to 10 characters (Dolma's code; the papers say mean)."""
    return np.median(page.word_lengths) if page.words else 0


@drop_outside("Words with # or \u2026 / words", 0, 0.1)
def gopher_symbols(page):
    """Words with # or an ellipsis, at most 10 % (Gopher)."""
    return ratio(sum("#" in word or ELLIPSIS in word for word in page.words), len(page.words))


@drop_outside("Words with a letter / words", 0.8)
def gopher_alphabetic(page):
    """Words with a letter, at least 80 % (Gopher)."""
    # subtle: isalpha of the complete word is only the fast way to find most of them
    with_letter = sum(word.isalpha() or any(map(str.isalpha, word)) for word in page.words)
    return ratio(with_letter, len(page.words))


@drop_outside("Occurrences of the, be, to, of, and, that, have, with", 2)
def gopher_stop_words(page):
    """Occurrences of eight common words, at least 2 (Gopher; Dolma counts "the the" as two)."""
    return sum(word in STOP_WORDS for word in page.words)


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
    for n, part, first in ngram_ratios(page.words, page.word_lengths):
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


def ngram_ratios(words, lengths):
    """Yield (n, ratio, first) for n from 2 to 10, until no n-gram occurs twice.

    2 to 4: all characters of the most frequent n-gram / characters of all words.
    5 to 10: characters of n-grams that occur again / characters of all n-grams.
    `first` is where the most frequent n-gram begins. `lengths` has the words' characters.

    # DIFFERS FROM OLMo: an n-gram that occurs once is no repetition, however long its words are;
    and these rules work: Dolma's configs misspell the first kind, so that it never fires there.
    """
    word_ids, kinds = numbered(words)
    ids = word_ids  # of the n-gram that begins at each word
    characters = lengths
    for n in range(2, min(10, len(words)) + 1):
        # an n-gram is an (n-1)-gram and one more word
        pairs = ids[:-1] * kinds + word_ids[n - 1:]
        characters = characters[:-1] + lengths[n - 1:]
        # subtle: np.unique numbers the pairs from 0 again, so that the products never overflow
        _, ids, counts = np.unique(pairs, return_inverse=True, return_counts=True)
        occurrences = counts[ids]
        first = int(occurrences.argmax())
        if occurrences[first] == 1:
            return
        if n in TOP_NGRAM_LIMITS:
            part = occurrences[first] * characters[first] / lengths.sum()
        else:
            part = characters[occurrences > 1].sum() / characters.sum()
        yield n, float(part), first


# ---- Other rules of Dolma ------------------------------------------------------------------------

LONGEST_PERIOD = 13
REPETITIONS = 100


def repeated_tokens(page):
    """Drops a document in which up to 13 tokens come 100 times in a row (Dolma v1.6).

    Such text makes the loss jump during training.

    # DIFFERS FROM OLMo: tokens are the pieces that the tokenizer's pattern cuts, before any merge,
    because a bpe:N tokenizer is trained later, on the clean documents.
    """
    ids, _ = numbered(page.pieces)
    for period in range(1, min(LONGEST_PERIOD, len(ids) // REPETITIONS) + 1):
        # 100 times a pattern: 99 periods of tokens, each equal to the one a period before it
        needed = (REPETITIONS - 1) * period
        same = ids[period:] == ids[:-period]
        if same.sum() < needed:  # far cheaper than the search for runs
            continue
        edges = np.flatnonzero(np.concatenate(([True], ~same, [True])))
        runs = np.diff(edges) - 1  # lengths of the runs of True between the edges
        begin = edges[runs.argmax()]
        if runs.max() >= needed:
            pattern = "".join(page.pieces[begin:begin + period])
            return Drop(f"{pattern!r} {REPETITIONS} times in a row or more", pattern)
    return None


@drop_outside("Unicode words", 25)
def min_words(page):
    """Words of any script as Unicode cuts them, at least 25 (Dolma, on books and Wikipedia)."""
    return count_words(page.text, 25)


SENTENCE_ENDS = re.compile(r"(?<=[.!?])(?=\s)|(?=\n)|(?<=\n)")


def content(page):
    """Takes out sentences that score 0.4 or more as hateful or obscene (Dolma)."""
    score = page.scorers["content"]
    if score is None:  # the funnel's table says that nothing was scored
        return None
    sentences = SENTENCE_ENDS.split(page.text)
    keep = [not sentence.strip() or score(sentence.strip()) < 0.4 for sentence in sentences]
    return keep_parts(sentences, keep, "", "sentences score 0.4 or more")


# Letters of e-mail addresses: Latin, Greek, Cyrillic. Not all: scripts without spaces would take in
# the words around an address.
LETTERS = "0-9A-Za-z_\u00c0-\u052f"

PII = {  # compiled with re, which is several times as fast as regex here
    "|||EMAIL_ADDRESS|||": re.compile(
        rf"(?<![{LETTERS}.+-])[{LETTERS}.+-]++@[{LETTERS}-]+(?:\.[{LETTERS}-]+)+"),
    "|||PHONE_NUMBER|||": re.compile(r"(?<![^\s(])(?:\(\d{3}\)|\d{3})[-. ]*\d{3}[-. ]?\d{4}"
                                     r"(?!\w|[-.]\d)", re.ASCII),
    "|||IP_ADDRESS|||": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|[01]?\d?\d)\.){3}"
                                   r"(?:25[0-5]|2[0-4]\d|[01]?\d?\d)(?!\w|\.\d)", re.ASCII)}


def pii(page):
    """Masks up to 5 e-mail addresses, US phone numbers and IPv4 addresses; more drop (Dolma).

    # DIFFERS FROM OLMo: its patterns miss an address at the end of the text and a phone number at
    the start of a line, take in the marks around one, and mask parts of longer numbers; these begin
    and end where the address or number does. Its e-mail addresses may hold any character but @ and
    spaces, ours what LETTERS names.
    """
    text = page.text
    before = None
    found = []
    while text != before:  # a mask may set the next number free: 10.0.0.1(555) 123-4567
        before = text
        for marker, pattern in PII.items():
            found += pattern.findall(text)
            text = pattern.sub(f" {marker} ", text)
    if len(found) > 5:
        return Drop(f"{len(found)} pieces of personal information, over 5", found[0])
    return Edit(text, f"{len(found)} masked", tuple(found)) if found else None


# ---- The table of rules --------------------------------------------------------------------------

# In the order in which they run: cheap rules first, personal information last, on what is kept.
RULES = {function.__name__: function for function in (
    empty, language, c4_punctuation, c4_short_lines, c4_document, code_extension, code_header,
    code_mean_line, code_longest_line, code_alphanumeric, code_letters, gopher_word_count,
    gopher_word_length, gopher_symbols, gopher_alphabetic, gopher_stop_words, gopher_bullets,
    gopher_ellipsis, gopher_repetition, repeated_tokens, min_words, content, pii)}

# These compare a document with earlier ones, so they run last, in one process: corpus/dedup.py.
DEDUPLICATIONS = ("url", "document", "paragraph")
