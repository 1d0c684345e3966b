"""The rules that filter documents: Gopher, C4, code, language, content, personal information."""

import difflib
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
from support.files import UserError


class Source(NamedTuple):
    """One entry of `sources`, its recipes spelled out as rules in the order of RULES."""
    name: str
    path: str
    rules: tuple = ()
    weight: float = 1.0


def parse_source(name, entry):
    """One entry of `sources`, a path or a dict, as a Source."""
    entry = {"path": entry} if isinstance(entry, str) else dict(entry)
    if not regex.fullmatch(r"[\w.-]+", name):
        raise UserError(f"sources: {name!r} cannot name files; use letters, digits, . _ -")
    for key in entry:
        if key not in ("path", "rules", "weight"):
            raise UserError(f"sources: {name} has {key!r}; it takes path, rules and weight")
    path, rules, weight = (entry.get(key, default) for key, default in
                           (("path", None), ("rules", ""), ("weight", 1.0)))
    if not isinstance(path, str) or not isinstance(rules, str):
        raise UserError(f"sources: {name} needs a path, and its rules are words in one string")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e6:
        raise UserError(f"sources: {name} has weight {weight!r}; a number above 0 is wanted")
    return Source(name, path, spelled_out(rules, name), float(weight))


def spelled_out(words, source):
    """The rules that `words` name, each once, in the order in which they run; "empty" is always."""
    chosen = {"empty"}
    for word in words.replace(",", " ").split():
        if word not in (*RECIPES, *RULES, *DEDUPLICATIONS):
            known = [*RECIPES, *RULES, *DEDUPLICATIONS]
            near = difflib.get_close_matches(word, known, n=1)
            raise UserError(f"sources: {source} has the rule {word!r}; " + (
                f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)))
        chosen |= set(spelled_out(RECIPES[word], source)) if word in RECIPES else {word}
    return tuple(rule for rule in (*RULES, *DEDUPLICATIONS) if rule in chosen)


class Drop(NamedTuple):
    """A rule's verdict: the document goes."""
    why: str
    mark: str = ""  # the part of its text that shows it


class Edit(NamedTuple):
    """A rule's verdict: the document stays with this text."""
    text: str
    why: str
    marks: tuple  # what was taken out


def within(what, least, most=math.inf):
    """Makes a rule of a measure: documents with a value outside of least to most go."""
    def rule_of(measure):
        @wraps(measure)
        def rule(page):
            value = measure(page)
            shown = value if isinstance(value, int) else f"{value:.3g}"
            return None if least <= value <= most else Drop(
                f"{what}: {shown}, not {least:g} to {most:g}")
        return rule
    return rule_of


class Page:
    """A document as the rules look at it; what several of them measure is computed once."""

    def __init__(self, document, scorers):
        self.document, self.text, self.scorers = document, document["text"], scorers

    @cached_property
    def words(self):
        return self.text.split()

    @cached_property
    def lines(self):
        """Its lines with text.

        # DIFFERS FROM OLMo: Dolma's code counts blank lines too; its web text (CCNet's) has none.
        """
        return [line for line in self.text.split("\n") if line.strip()]

    @cached_property
    def pieces(self):
        """What the tokenizer's pattern cuts: tokens before any merge, whatever the tokenizer."""
        return regex.findall(PATTERN, self.text)

    @cached_property
    def word_lengths(self):
        return np.fromiter(map(len, self.words), np.int64, len(self.words))


def filter_documents(documents, rules, funnel, scorers):
    """Yield the documents that pass every rule, in order; the funnel takes in all the others."""
    for document in documents:
        page = Page(document, scorers)
        for rule in rules:
            verdict = RULES[rule](page)
            if isinstance(verdict, Edit) and not verdict.text.strip():
                verdict = Drop(f"{verdict.why}, and nothing else in it")
            if isinstance(verdict, Drop):
                funnel.drop(rule, page.document, verdict)
                break
            if isinstance(verdict, Edit):
                page = Page(funnel.edit(rule, page.document, verdict), scorers)
        else:
            yield page.document


def share(part, whole):
    return part / whole if whole else 0.0


def keep(parts, stays, joint, why):
    """The Edit that keeps the `parts` of a text that are to stay; None if all of them are."""
    gone = tuple(part for part, stay in zip(parts, stays, strict=True) if not stay)
    kept = joint.join(itertools.compress(parts, stays))
    return Edit(kept, f"{len(gone)} {why}", gone) if gone else None


def empty(page):
    """Nothing but space: Dolma v1.6's min_text_length of 1."""
    return None if page.text.strip() else Drop("no text")


FUNCTION_WORDS = frozenset(
    "the be to of and that have with a in is it for on as are was this by at or from an not can "
    "if you which will has but all we they".split())


def english_score(text):
    """A stand-in for FastText: the ASCII share of the letters, less where common words are rare.

    English prose has a function word in three; one in ten makes 0.5, one in five makes 1.
    """
    words = text.lower().split()
    common = share(sum(word in FUNCTION_WORDS for word in words), len(words))
    letters = "".join(filter(str.isalpha, text)) if not text.isascii() else "a"
    return share(sum(map(str.isascii, letters)), len(letters)) * min(1.0, 5 * common)

# put your own model here: text -> score of English, sentence -> score of hate or filth, 0 to 1
LANGUAGE_SCORERS = {"stand-in": english_score}

CONTENT_SCORERS = {"none": None}


@within("Score as English (Dolma: of all sources but code)", 0.5)
def language(page):
    return page.scorers["language"](page.text)


SENTENCE_ENDS = re.compile(r"(?<=[.!?])(?=\s)|(?=\n)|(?<=\n)")


def content(page):
    """Sentences that score 0.4 or more as hate or filth are taken out (Dolma)."""
    score = page.scorers["content"]
    if score is None:  # the table says so
        return None
    sentences = SENTENCE_ENDS.split(page.text)
    stays = [not sentence.strip() or score(sentence.strip()) < 0.4 for sentence in sentences]
    return keep(sentences, stays, "", "sentences score 0.4 or more")


def c4_punctuation(page):
    """Lines that do not end in . ? ! or " are taken out."""
    lines = page.text.split("\n")
    stays = [not line.strip() or line.rstrip().endswith((".", "?", "!", '"')) for line in lines]
    return keep(lines, stays, "\n", "lines without an end mark")


def c4_short_lines(page):
    """Lines of fewer than 3 words are taken out."""
    lines = page.text.split("\n")
    return keep(lines, [len(line.split()) not in (1, 2) for line in lines], "\n",
                "lines of fewer than 3 words")


def c4_document(page):
    """A brace, lorem ipsum or javascript; C4's list of bad words is not carried here."""
    found = regex.search(r"(?i)\{|lorem ipsum|javascript", page.text)
    return Drop(f"holds {found[0]!r}", found[0]) if found else None


STOP_WORDS = frozenset("the be to of and that have with".split())


@within("Number of words", 50, 100_000)
def gopher_word_count(page):
    return len(page.words)


@within("Median length of a word (Dolma's code; the paper says mean)", 3, 10)
def gopher_word_length(page):
    return np.median(page.word_lengths) if page.words else 0


@within("Share of words with # or \u2026", 0, 0.1)
def gopher_symbols(page):
    return share(sum("#" in word or "\u2026" in word for word in page.words), len(page.words))


@within("Share of words with a letter", 0.8)
def gopher_alphabetic(page):
    letters = sum(word.isalpha() or any(map(str.isalpha, word)) for word in page.words)
    return share(letters, len(page.words))


@within("Occurrences of the, be, to, of, and, that, have, with", 2)
def gopher_stop_words(page):
    return sum(word in STOP_WORDS for word in page.words)


@within("Share of lines that begin with * or -", 0, 0.9)
def gopher_bullets(page):
    return share(sum(line.startswith(("*", "-")) for line in page.lines), len(page.lines))


@within("Share of lines that end with \u2026", 0, 0.3)
def gopher_ellipsis(page):
    return share(sum(line.endswith("\u2026") for line in page.lines), len(page.lines))


TOP_NGRAM_LIMITS = {2: 0.20, 3: 0.18, 4: 0.16}

REPEATED_NGRAM_LIMITS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher_repetition(page):
    """Lines or n-grams that come again and again."""
    repeated = {line: n for line, n in Counter(page.lines).items() if n > 1}
    worst = max(repeated, key=repeated.get, default="")
    part = share(sum(repeated.values()), len(page.lines))
    if part > 0.3:
        return Drop(f"{part:.2f} of the lines occur more than once, over 0.3", worst)
    part = share(sum(len(line) * n for line, n in repeated.items()), page.word_lengths.sum())
    if part > 0.3:
        return Drop(f"{part:.2f} of the characters in repeated lines, over 0.3", worst)
    for n, part, first in ngram_shares(page.words, page.word_lengths):
        if n in TOP_NGRAM_LIMITS and part > TOP_NGRAM_LIMITS[n]:
            return Drop(f"the top {n}-gram holds {part:.2f} of the characters, over "
                        f"{TOP_NGRAM_LIMITS[n]}", " ".join(page.words[first:first + n]))
        if n in REPEATED_NGRAM_LIMITS and part > REPEATED_NGRAM_LIMITS[n]:
            return Drop(f"repeated {n}-grams hold {part:.2f} of the characters, over "
                        f"{REPEATED_NGRAM_LIMITS[n]}", " ".join(page.words[first:first + n]))
    return None


def ngram_shares(words, lengths):
    """(n, share, first) for n from 2 to 10, until no n-gram occurs twice; `first` is where the
    most frequent one begins.

    n to 4: the characters of the most frequent n-gram, the first of equals, over all words';
    from 5: the characters of n-grams that occur again over those of all n-grams of that n.
    # DIFFERS FROM OLMo: an n-gram that occurs once is no repetition, however long its words are;
    and these rules work: Dolma's configs misspell the first kind, so that it never fires there.
    """
    ids, kinds = numbered(words)
    codes, characters = ids, lengths
    for n in range(2, min(10, len(words)) + 1):
        # an n-gram is an (n-1)-gram and a word; np.unique numbers them anew, so codes stay small
        _, codes, counts = np.unique(codes[:-1] * kinds + ids[n - 1:], return_inverse=True,
                                     return_counts=True)
        characters = characters[:-1] + lengths[n - 1:]
        occurrences = counts[codes]
        first = int(occurrences.argmax())
        if occurrences[first] == 1:
            return
        if n in TOP_NGRAM_LIMITS:
            part = occurrences[first] * characters[first] / lengths.sum()
        else:
            part = characters[occurrences > 1].sum() / characters.sum()
        yield n, float(part), first


def numbered(strings):
    """(ids, kinds): equal strings get the same id, int64, of 0 to kinds - 1."""
    number = {}
    ids = np.array([number.setdefault(string, len(number)) for string in strings], np.int64)
    return ids, len(number)


def repeated_tokens(page):
    """A pattern of up to 13 tokens 100 times in a row (Dolma v1.6).

    # DIFFERS FROM OLMo: tokens are the pieces that the tokenizer's pattern cuts, before any merge,
    for a bpe:N tokenizer is trained only on what is clean.
    """
    ids, _ = numbered(page.pieces)
    for period in range(1, min(13, len(ids) // 100) + 1):
        same = ids[period:] == ids[:-period]
        if same.sum() < 99 * period:
            continue
        edges = np.flatnonzero(np.concatenate(([True], ~same, [True])))
        runs = np.diff(edges) - 1
        begin = edges[runs.argmax()]
        if runs.max() >= 99 * period:
            pattern = "".join(page.pieces[begin:begin + period])
            return Drop(f"{pattern!r} 100 times in a row or more", pattern)
    return None


PII = {  # in re: several times as fast here as regex
    "|||EMAIL_ADDRESS|||": re.compile(r"(?<![\w.+-])[\w.+-]++@[\w-]+(?:\.[\w-]+)+", re.ASCII),
    "|||PHONE_NUMBER|||": re.compile(r"(?<![^\s(])(?:\(\d{3}\)|\d{3})[-. ]*\d{3}[-. ]?\d{4}"
                                     r"(?!\w|[-.]\d)", re.ASCII),
    "|||IP_ADDRESS|||": re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}"
                                   r"(?:25[0-5]|2[0-4]\d|1?\d?\d)(?!\w|\.\d)", re.ASCII)}


def pii(page):
    """E-mail addresses, US phone numbers, IPv4 addresses: up to 5 are masked, more drop (Dolma).

    # DIFFERS FROM OLMo: its patterns miss an address at the end of the text, take in the marks
    around one, and mask parts of longer numbers; these end where the thing ends.
    """
    text, before, found = page.text, None, []
    while text != before:  # masking one may bare another beside it
        before = text
        for marker, pattern in PII.items():
            found += pattern.findall(text)
            text = pattern.sub(f" {marker} ", text)
    if len(found) > 5:
        return Drop(f"{len(found)} pieces of personal information, over 5", found[0])
    return Edit(text, f"{len(found)} masked", tuple(found)) if found else None


DATA_EXTENSIONS = {"asm", "csv", "json", "svg"}

HEADER = regex.compile(  # comments of many languages; # also begins C's and Rust's directives
    r"(?s)\A(?:\s*+(?:(?:#(?!include|define|undef|if|el|end|pragma|import|!?\[)|//|--|;|%)[^\n]*+"
    r"|/\*(?:(?!\*/).)*+\*/[ \t\r]*)(?:\n|\Z))++")


def code_extension(page):
    """A file of data rather than code, by metadata.ext, or the end of metadata.path or the id."""
    metadata = page.document["metadata"]
    suffix = Path(str(metadata.get("path", page.document["id"]))).suffix
    extension = str(metadata.get("ext", suffix)).lower().lstrip(".")
    return Drop(f"a .{extension} file") if extension in DATA_EXTENSIONS else None


def code_header(page):
    """A comment with a copyright at the head of the file is taken out."""
    header = HEADER.match(page.text)
    if not header or "copyright" not in header[0].lower():
        return None
    return Edit(page.text[header.end():], "its copyright header", (header[0],))


@within("Characters of a line, on average", 0, 100)
def code_mean_line(page):
    lengths = [len(line) for line in page.text.split("\n")]
    return sum(lengths) / len(lengths)


@within("Characters of the longest line", 0, 1000)
def code_longest_line(page):
    return max(map(len, page.text.split("\n")))


@within("Share of letters and digits", 0.25)
def code_alphanumeric(page):
    return share(sum(map(str.isalnum, page.text)), len(page.text))


@within("Letters a token, tokens being pieces as in repeated_tokens", 1.5)
def code_letters(page):
    return share(sum(map(str.isalpha, page.text)), len(page.pieces))


WORD = re.compile(r"\w+|[^\w\s]")  # near Unicode's word segments; apostrophes and CJK differ


@within("Word segments (Dolma: of books and wiki)", 25)
def min_words(page):
    return len(WORD.findall(page.text))


RULES = {function.__name__: function for function in (  # in the order in which they run
    empty, language, c4_punctuation, c4_short_lines, c4_document, code_extension, code_header,
    code_mean_line, code_longest_line, code_alphanumeric, code_letters, gopher_word_count,
    gopher_word_length, gopher_symbols, gopher_alphabetic, gopher_stop_words, gopher_bullets,
    gopher_ellipsis, gopher_repetition, repeated_tokens, min_words, content, pii)}

DEDUPLICATIONS = ("url", "document", "paragraph")

RECIPES = {
    "gopher": " ".join(rule for rule in RULES if rule.startswith("gopher")),
    "c4": "c4_punctuation c4_short_lines c4_document",
    "code": " ".join(rule for rule in RULES if rule.startswith("code")),
    # Dolma's choice for its sources
    "web": "language c4_punctuation gopher repeated_tokens content pii url document paragraph",
    "books": "language min_words",
    "wiki": "language min_words",
}
