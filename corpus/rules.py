"""Dolma's rules: which documents, and which parts of them, are kept out of training.

A rule is a function of a Page. It returns None (nothing to do), a Drop (the document is dropped) or
an Edit (the document is kept with another text); corpus/pages.py has these. Most rules measure one
number, and `@drop_outside` names its limits. Gopher's rules are in corpus/gopher.py. The limits:

    C4      arXiv 1910.10683, section 2.2
    Gopher  arXiv 2112.11446, appendix A.1: quality filters, and table A1 on repetition
    Dolma   arXiv 2402.00159, and the configs and taggers of its toolkit (v1.5 and v1.6)

To add a rule, write its function and name it in RULES; a source then takes it by that name
(corpus/sources.py). A name that begins with gopher or code joins that rule set by itself.
"""

import re
from pathlib import Path

import numpy as np
import regex

from corpus.gopher import (gopher_alphabetic, gopher_bullets, gopher_ellipsis, gopher_repetition,
                           gopher_stop_words, gopher_symbols, gopher_word_count,
                           gopher_word_length)
from corpus.pages import (Drop, Edit, Page, count_characters, drop_outside, keep_parts, numbered,
                          ratio)
from corpus.words import count_words


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
    common = ratio(sum(map(FUNCTION_WORDS.__contains__, words)), len(words))
    latin = 1.0 if text.isascii() else ratio(*count_characters(text, str.isalpha))
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
    text = page.text.lower()
    if "{" not in text and "lorem" not in text and "java" not in text:
        return None  # of most pages, and told ten times as fast; no other letters stand for these
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
    _, found = count_characters(page.text, str.isalnum)
    return ratio(found, len(page.text))


@drop_outside("Letters / tokens", 1.5)
def code_letters(page):
    """Letters per token, at least 1.5 (Dolma, on The Stack); words and runs of marks are tokens."""
    tokens = len(WORD_OR_MARKS.findall(page.text)) + 1  # the toolkit counts the gaps around them
    _, found = count_characters(page.text, str.isalpha)
    return found / tokens


# ---- Other rules of Dolma ------------------------------------------------------------------------

LONGEST_PERIOD = 13
REPETITIONS = 100


def repeated_tokens(page):
    """Drops a document in which up to 13 tokens come 100 times in a row (Dolma v1.6).

    Such text makes the loss jump during training.

    # DIFFERS FROM OLMo: tokens are the pieces that the tokenizer's pattern cuts, before any merge,
    because a bpe:N tokenizer is trained later, on the clean documents.
    """
    if not may_repeat_tokens(page):
        return None
    # 100 times a pattern: 99 periods of tokens, each equal to the one a period before it
    found = repeated_pattern(numbered(page.pieces)[0], REPETITIONS - 1)
    if found is None:
        return None
    begin, period = found
    pattern = "".join(page.pieces[begin:begin + period])
    return Drop(f"{pattern!r} {REPETITIONS} times in a row or more", pattern)


def may_repeat_tokens(page):
    """Whether repeated_tokens has to look at all: words tell, and cutting into tokens is slow.

    100 times a pattern of tokens is a run within one word, or of spaces, or it holds 99 times a
    pattern of complete words. Those are not more than its tokens, as no token has parts of two.
    """
    if page.word_lengths.max(initial=0) >= REPETITIONS or SPACE_RUN.search(page.text):
        return True
    if any(mark in page.text for mark in SEPARATORS):
        return True
    ids, _ = page.word_ids
    if not len(ids) or np.bincount(ids).max() < REPETITIONS - 1:
        return False
    return repeated_pattern(ids, REPETITIONS - 2) is not None


SPACE_RUN = re.compile(rf"\s{{{REPETITIONS}}}")

SEPARATORS = "\x1c\x1d\x1e\x1f"  # spaces for str.split, and marks for the tokenizer's pattern


def repeated_pattern(ids, times):
    """Returns (begin, period) of the shortest pattern of up to 13 ids that is followed by itself
    `times` times; None if there is none."""
    for period in range(1, min(LONGEST_PERIOD, len(ids) // times) + 1):
        same = ids[period:] == ids[:-period]
        if same.sum() < times * period:  # far cheaper than the search for runs
            continue
        edges = np.flatnonzero(np.concatenate(([True], ~same, [True])))
        runs = np.diff(edges) - 1  # lengths of the runs of True between the edges
        if runs.max() >= times * period:
            return edges[runs.argmax()], period
    return None


@drop_outside("Unicode words", 25)
def min_words(page):
    """Words of any script as Unicode cuts them, at least 25 (Dolma, on books and Wikipedia)."""
    return count_words(page.text, 25)


# a newline, or text up to the mark before a space; one search a sentence, not one a character
SENTENCES = re.compile(r"\n|(?:[^\n.!?]++|[.!?](?!\s))++[.!?]?+|[.!?]")


def content(page):
    """Takes out sentences that score 0.4 or more as hateful or obscene (Dolma)."""
    score = page.scorers["content"]
    if score is None:  # the funnel's table says that nothing was scored
        return None
    sentences = SENTENCES.findall(page.text)
    keep = [not sentence.strip() or score(sentence.strip()) < 0.4 for sentence in sentences]
    return keep_parts(sentences, keep, "", "sentences score 0.4 or more")


# Letters of e-mail addresses: Latin, Greek, Cyrillic. Not all: scripts without spaces would take in
# the words around an address.
LETTERS = "0-9A-Za-z_\u00c0-\u052f"

# Each after what every match holds, which a search finds five times as fast because it looks for
# certain characters first: most texts have no such part. Compiled with re, which is several times
# as fast as regex here.
PII = {
    "|||EMAIL_ADDRESS|||": (re.compile("@"), re.compile(
        rf"(?<![{LETTERS}.+-])[{LETTERS}.+-]++@[{LETTERS}-]+(?:\.[{LETTERS}-]+)+")),
    "|||PHONE_NUMBER|||": (re.compile(
        r"[0-9]{3}\)?[-. ]*[0-9]{3}[-. ]?[0-9]{4}"), re.compile(
        r"(?<![^\s(])(?:\(\d{3}\)|\d{3})[-. ]*\d{3}[-. ]?\d{4}(?!\w|[-.]\d)", re.ASCII)),
    "|||IP_ADDRESS|||": (re.compile(
        r"[0-9]\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]"), re.compile(
        r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|[01]?\d?\d)\.){3}"
        r"(?:25[0-5]|2[0-4]\d|[01]?\d?\d)(?!\w|\.\d)", re.ASCII))}


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
        for marker, (hint, pattern) in PII.items():
            if hint.search(text):
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
