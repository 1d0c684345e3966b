"""data.py and its parts against numpy, hashlib, gzip and lists kept in memory."""

import errno
import functools
import gzip
import hashlib
import inspect
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
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (ages_of, contents_of, data_config, index_of, kept_documents, manifest_of,
                      official_order, refusal, write_jsonl)

import corpus.storage as storage
import data
from corpus.bpe import tokenizer_spec, train_bpe
from corpus.documents import is_held_out, read_documents
from corpus.funnel import Funnel
from corpus.stages import STAGE_FILES, Workers, building_code
from corpus.storage import (DocumentWriter, ShardWriter, token_dtype)
from corpus.tokenizer import EOS, PAD, PII_MARKERS, SPACE_RUNS, Tokenizer
from data import Batches, DataConfig, TokenShards, build_data, write_shards
from support.files import UserError, file_sha256
from support.lock import Lock

ROOT = Path(data.__file__).resolve().parent
SOURCES = ("reference", "docstrings", "code")


# ---- Helpers --------------------------------------------------------------------------------

def write_corpus(path, n=60, seed=0):
    """`n` documents of 1 to 30 words with distinct texts, ids doc-0, doc-1, ..."""
    dice = random.Random(seed)
    words = ["the", "model", "reads", "tokens", "42", "naïve", "(x)", "runs,", "def", "  ", "\n"]
    return write_jsonl(path, [
        {"id": f"doc-{i}", "text": f"{i} " + " ".join(dice.choices(words, k=dice.randint(1, 30)))}
        for i in range(n)])


def small_config(folder, **changes):
    """A build of folder/corpus.jsonl, which is written if it is not there; a tenth is held out."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    return data_config(folder, **{"sources": {"main": str(corpus)}, "eval_share": 0.1} | changes)


def held_out_of(folder, source="main"):
    lines = (folder / "held_out" / f"{source}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def stages_of(data_dir):
    """The kinds of the finished stages; a data_dir holds built folders and three more entries."""
    left = [file.name for file in data_dir.iterdir() if not (file / "manifest.json").is_file()]
    assert sorted(left) == [".lock", "inputs.json", "stages"]
    names = sorted(file.name for file in (data_dir / "stages").iterdir())
    assert all(re.fullmatch(r".*-[0-9a-f]{12}", name) for name in names), names
    return [name[:-13] for name in names]


# ---- Documents ------------------------------------------------------------------------------

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


def test_folder_is_read_sorted_and_deep_without_other_kinds_and_dolmas_attributes(tmp_path):
    """A text file is one document, its line ends unchanged; attributes lie next to documents."""
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x.txt").write_bytes("deuxième\r\nligne\n".encode())
    (tmp_path / "c.txt").write_text("third")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "first"}])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write_jsonl(tmp_path / "attributes" / "0.jsonl", [{"text": "fourth"}])
    places = [("a.jsonl:1", "first"), ("attributes/0.jsonl:1", "fourth"),
              ("b/deep/x.txt:1", "deuxième\r\nligne\n"), ("c.txt:1", "third")]
    attributes = {}
    for _ in range(2):
        counts = Counter()
        assert list(read_documents(tmp_path, "web", counts)) == [
            {"id": name, "text": text, "source": "web", "metadata": {"provenance": name}}
            for name, text in places]
        assert {what: n for what, n in (+counts).items() if "CR LF" not in what} == {
            "files not read: .png (first picture.png)": 1} | attributes
        attributes = {"files not read: Dolma's attributes (first attributes/0.jsonl)": 1}
        (tmp_path / "documents").mkdir(exist_ok=True)  # now it is Dolma's layout
        places = [place for place in places if place[1] != "fourth"]


def test_source_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "data.csv").write_text("[]")
    for name in ("data.csv", "nowhere"):
        assert name in refusal(list, read_documents(tmp_path / name, "web"))
    assert "docstrings" in refusal(list, read_documents("stdlib", "books"))


@pytest.mark.parametrize("line, key", [
    (b'{"text": "cut', ""), (b"plain words", ""), (b'["text"]', "list"), (b"3", "number"),
    (b'{"text": 5}', "text is a number"), (b'{"text": null}', "text is null"),
    (b'{"id": "no", "body": "x"}', "keys are id, body"), (b'{"text": "x", "id": [1]}', "id is a"),
    (b'{"text": "\\ud800', ""), (b'{"text": "caf\xe9"}', "UTF-8"), (b"[" * 100_000, "")],
    ids=["cut", "words", "list", "number", "int text", "null text", "no text", "list id",
         "cut escape", "not UTF-8", "deep nesting"])
def test_bad_line_is_refused_with_file_and_line(tmp_path, line, key):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    message = refusal(list, read_documents(file, "web"))
    assert message.startswith(f"{file}:3: ") and key in message


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


def test_lone_surrogates_are_repaired_and_counted_and_stop_no_build(tmp_path):
    """A proper pair is one character; U+FEFF at the start of a text is text, not a mark."""
    (tmp_path / "in.jsonl").write_text(
        '{"text": "a\\ud83dx\\ude00"}\n{"text": "\\ufeff\\ud83d\\ude00"}\n'
        '{"id": "a\\ud83d", "text": "b\\udfff", "metadata": {"url": "\\ud800"}}\n')
    source = {"path": str(tmp_path / "in.jsonl"), "rules": "url"}
    config = small_config(tmp_path, sources={"main": source}, tokenizer="bpe:284", eval_share=0.0)
    folder = build_data(config)
    texts = [row["text"] for row in kept_documents(folder)]
    assert texts == ["a\ufffdx\ufffd", "\ufeff😀", "b\ufffd"]
    notes = manifest_of(folder)["sources"]["main"]["notes"]
    assert notes == {"texts with lone surrogates repaired": 2}


# ---- The held-out split ---------------------------------------------------------------------

def in_share(name, share):
    """The first 64 bits of SHA-256 as a fraction of 1."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 2**64 < share


HELD_OUT = next(f"doc-{i}" for i in range(99) if in_share(f"doc-{i}", 0.1))


def test_groups_are_on_one_side_of_the_build_which_their_hash_decides(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", [
        {"id": f"doc-{i}", "text": f"words and more words {i}", "metadata": {"split_group": i % 40}}
        for i in range(400)])
    folder = build_data(small_config(tmp_path, eval_share=0.3))
    training, held_out = (Counter(row["metadata"]["split_group"] for row in rows)
                          for rows in (kept_documents(folder), held_out_of(folder)))
    assert training and held_out == {i: 10 for i in range(40) if in_share(str(i), 0.3)}
    assert training + held_out == dict.fromkeys(range(40), 10)


def test_merges_are_never_learned_from_held_out_documents(tmp_path):
    names = [f"doc-{i}" for i in range(60)]
    held_out = [name for name in names if in_share(name, 0.2)]
    assert held_out
    write_jsonl(tmp_path / "corpus.jsonl", [
        {"id": name, "text": "zqzq " * 500 if name in held_out else "some common words here"}
        for name in names])
    folder = build_data(small_config(tmp_path, tokenizer="bpe:290", eval_share=0.2))
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == 6 and not any("z" in part for pair in merges for part in pair)


# ---- The embedded corpus --------------------------------------------------------------------

@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """What configs/tiny.py reads, built with a smaller tokenizer: the folder, its documents, and
    those that it read."""
    home = tmp_path_factory.mktemp("embedded")
    data.main([str(ROOT / "configs" / "tiny.py"), f"--data_dir={home}", "--workers=2",
               "--tokenizer=bpe:600"])
    [folder] = [file.parent for file in home.glob("*/manifest.json")]
    return SimpleNamespace(
        folder=folder, rows=kept_documents(folder),
        held_out={source: held_out_of(folder, source) for source in SOURCES},
        library={source: list(read_documents("stdlib", source)) for source in SOURCES})


def test_held_out_docstrings_are_in_no_training_document_and_leaked_ones_are_dropped(embedded):
    """In any of the three sources, with any spacing, as they were read and as they are clean.

    NUL keeps documents apart; bytes, as a str with one wide character is slower to search.
    """
    def squeeze(text):
        return " ".join(text.split())
    training = {d["text"] for source in SOURCES for d in embedded.library[source]
                if not is_held_out(d, 0.05)} | {row["text"] for row in embedded.rows}
    squeezed = "\0".join(map(squeeze, training)).encode()
    docstrings = [d["text"].split("\n\n", 1)[1] for d in embedded.held_out["docstrings"]]
    assert len(docstrings) > 100 and all(text.strip() for text in docstrings)
    assert [text for text in docstrings if squeeze(text).encode() in squeezed] == []
    chosen = {d["id"] for d in embedded.library["docstrings"] if is_held_out(d, 0.05)}
    kept = {d["id"] for d in embedded.held_out["docstrings"]}
    leaked = manifest_of(embedded.folder)["sources"]["docstrings"]["by_rule"]["leaked"]["dropped"]
    assert kept < chosen and 0 < leaked <= len(chosen - kept)
    assert not chosen & {row["id"] for row in embedded.rows}


def test_docstrings_and_code_of_a_module_are_on_one_side(embedded):
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


def test_embedded_ids_are_unique_and_provenance_leads_to_library_text(embedded):
    """file:line below the library's folder; a docstring's line is that of its def or class.

    Neither tests nor installed packages are in it.
    """
    root = Path(os.__file__).parent
    for document in embedded.library["docstrings"][::97]:
        file, line = document["metadata"]["provenance"].rsplit(":", 1)
        heading = document["text"].split("\n")[0]
        name = heading.split("(")[0].split()[-1].rsplit(".", 1)[-1]
        if not heading.startswith("module "):
            assert name in (root / file).read_text(errors="replace").splitlines()[int(line) - 1]
    assert (root / "site-packages").is_dir() or (root / "dist-packages").is_dir()
    for source, documents in embedded.library.items():
        assert len({document["id"] for document in documents}) == len(documents) > 50
        assert all(d["source"] == source and d["id"].startswith(f"{source}/") for d in documents)
        parts = {part for d in documents for part in d["metadata"]["provenance"].split("/")}
        assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages",
                            "__pycache__"}


# ---- Clean documents and shards -------------------------------------------------------------


def check_shards(folder, shards, documents, ids):
    """The shards hold these ids, no document in two of them; their indexes lead to the texts."""
    seen = 0
    for shard in shards:
        tokens = np.fromfile(folder / shard["file"], "<u2").tolist()
        index = index_of(folder, shard)
        assert (shard["tokens"], shard["documents"]) == (len(tokens), len(index))
        assert [*index["start"], len(tokens)] == [0, *index["end"]]
        for entry in index:
            assert tokens[entry["start"]:entry["end"]] == ids[seen]
            name = documents[seen]["id"].encode()
            assert int(entry["id"]) == int(hashlib.blake2b(name, digest_size=8).hexdigest(), 16)
            file = f"documents/{shard['source']}-{entry['file']:05d}.jsonl.gz"
            with open(folder / file, "rb") as compressed:
                compressed.seek(entry["block"])
                line = gzip.open(compressed).readlines()[entry["line"]]
            assert json.loads(line) == documents[seen]
            seen += 1
    assert seen == len(documents)
    packed, room = 0, 0  # first fit in order: the fewest shards that keep the order
    for size in map(len, ids):
        packed, room = (packed, room - size) if size <= room else (packed + 1, 50 - size)
    assert len(shards) == packed


def test_vocabulary_above_65536_goes_through_the_complete_build(tmp_path):
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
def test_id_beyond_the_vocabulary_is_refused_and_never_wraps(monkeypatch, vocab_size, char):
    """In uint16, 70,000 would become 4,464 and 65,536 would become 0, without a word."""
    tokenizer = SimpleNamespace(vocab_size=vocab_size, eos_token_id=0,
                                encode_text=lambda text: np.array(list(map(ord, text))))
    monkeypatch.setattr(data, "tokenizer_at", lambda path: tokenizer)

    def encoded(*texts):
        rows = [json.dumps({"id": "x", "text": text}) for text in texts]
        monkeypatch.setattr(data, "read_block", lambda *place: rows)
        return data.encode_block((0, 0), "", "main", "")[0]
    with pytest.raises(AssertionError, match=str(ord(char))):
        encoded("A", char, "B")
    ids = encoded(chr(vocab_size - 1))
    assert ids.dtype == np.uint16 and ids.tolist() == [vocab_size - 1, 0]


# ---- Building -------------------------------------------------------------------------------

@pytest.mark.parametrize("block_bytes", [1, 400, 100_000])
def test_a_build_holds_what_its_manifest_says(tmp_path, monkeypatch, block_bytes):
    """Shards of at most 50 tokens; clean documents in blocks of one, of several, of all."""
    monkeypatch.setattr("corpus.storage.BLOCK_BYTES", block_bytes)
    monkeypatch.setattr("corpus.storage.FILE_BYTES", block_bytes)
    monkeypatch.setattr(data, "write_shards", functools.partial(write_shards, shard_tokens=50))
    tokenizer, dice = train_bpe(["some words of one text or another " * 9], 300), random.Random(0)
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = ["".join(dice.choices("jqxz", k=dice.randint(1, 29))) for _ in range(100)]
    texts[0] = texts[40] = "jqxz" * 50
    texts[50:50] = ["  padded \n", f"a forged {EOS} boundary", "é\u2028\r\né"]
    records = [{"id": f"doc-{i}", "text": text, "metadata": {"n": i}}
               for i, text in enumerate(texts)]
    sources = {"main": write_jsonl(tmp_path / "1.jsonl", records),
               "two": write_corpus(tmp_path / "2.jsonl", 30, 1)}
    folder = build_data(small_config(tmp_path, sources=sources,
                                     tokenizer=str(tmp_path / "tokenizer.json")))
    manifest = manifest_of(folder)
    assert (manifest["vocab_size"], manifest["dtype"]) == (300, "uint16")
    assert (manifest["eos_token_id"], manifest["pad_token_id"]) == (299, 298)
    assert TokenShards(folder, 8).eos_token_id == 299

    def sha256(name):
        return hashlib.sha256((folder / name).read_bytes()).hexdigest()
    shards = [[shard["file"], sha256(shard["file"])] for shard in manifest["shards"]]
    held_out = [sha256(f"held_out/{source}.jsonl") for source in sources]
    identity = json.dumps([sha256("tokenizer.json"), shards, held_out])
    assert manifest["sha256"] == hashlib.sha256(identity.encode()).hexdigest()
    assert [shard["sha256"] for shard in manifest["shards"]] == [digest for _, digest in shards]
    sizes = [shard["tokens"] for shard in manifest["shards"]]
    assert 50 in sizes and max(sizes) > 50
    assert list(manifest["sources"]) == list(sources)
    for source, counts in manifest["sources"].items():
        mine = [shard for shard in manifest["shards"] if shard["source"] == source]
        assert [shard["file"] for shard in mine] == [f"{source}-{i:05d}.bin"
                                                     for i in range(len(mine))]
        assert counts["tokens"] == counts["mix_tokens"] == sum(s["tokens"] for s in mine)
        documents = list(read_documents(sources[source], source))
        held_out = [d for d in documents if in_share(d["id"], 0.1)]
        training = [d for d in documents if not in_share(d["id"], 0.1)]
        assert held_out and held_out_of(folder, source) == held_out
        for kind, chosen in (("", training), ("held-out ", held_out)):
            assert counts[kind + "documents"] == len(chosen)
            assert counts[kind + "bytes"] == sum(len(d["text"].encode()) for d in chosen)
        assert counts["documents in"] == len(documents)
        assert counts["bytes in"] == counts["bytes"] + counts["held-out bytes"]
        ids = [[*tokenizer.encode(d["text"].strip()), 299] for d in training]
        check_shards(folder, mine, training, ids)
        files = sorted((folder / "documents").glob(f"{source}-*"))
        assert [file.name for file in files] == [f"{source}-{i:05d}.jsonl.gz"
                                                 for i in range(len(files))]
        lines = b"".join(gzip.decompress(file.read_bytes()) for file in files).splitlines()
        assert list(map(json.loads, lines)) == training
        assert (len(files) == len(training)) == (block_bytes == 1)
        assert (len(files) == 1) == (block_bytes > 400)


def halved_late(n):
    time.sleep(0.02 * (n % 3 == 0))
    return n / 2


@pytest.mark.parametrize("workers, together, most", [(1, 1, 1), (1, 4, 1), (2, 1, 6), (2, 4, 24)])
def test_workers_answer_in_order_and_run_a_few_items_ahead(workers, together, most):
    """Also where one map takes the results of another, which runs as far ahead of it."""
    given, ahead = itertools.count(), []
    with Workers(workers) as running:
        halves = running.map(halved_late, given, together)
        quarters = running.map(halved_late, halves, together)
        for i, quarter in enumerate(itertools.islice(quarters, 30)):
            assert quarter == i / 4
            ahead.append(int(repr(given)[6:-1]) - i)
    assert max(ahead) <= most * 2
    with Workers(workers) as running:
        assert list(running.map(halved_late, range(7), together)) == [i / 2 for i in range(7)]


def test_a_message_to_a_worker_holds_no_more_than_one_large_block(tmp_path, monkeypatch):
    """A document may have 1 GiB, and eight of them would have eight."""
    monkeypatch.setattr("corpus.storage.BLOCK_BYTES", 10)
    sizes, pack = [], storage.pack
    monkeypatch.setattr("corpus.storage.pack", lambda blocks: sizes.append(
        [*map(len, blocks)]) or pack(blocks))
    given = [10, 10, 500, 600, *[10] * 9]
    lines = [b"x" * (n - 1) + b"\n" for n in given]
    [source] = DataConfig(sources={"main": {"path": "stdlib", "rules": ""}}).parse_sources()
    storage.store_documents(tmp_path, [(lines, [], Funnel())], Workers(1), source, Funnel())
    assert sizes == [[10, 10, 500], [600], [10] * 8, [10]]


@pytest.mark.parametrize("broken, error, stages", [
    (DocumentWriter, OSError(errno.ENOSPC, "No space left on device"), []),
    (ShardWriter, KeyboardInterrupt(), ["clean-main", "tokenizer"])])
def test_build_that_dies_leaves_finished_stages_alone_and_the_next_succeeds(
        tmp_path, monkeypatch, broken, error, stages):
    config, added, add = small_config(tmp_path), [], broken.add
    monkeypatch.setattr("corpus.storage.BLOCK_BYTES", 1)

    def add_until_it_breaks(self, *arguments):
        if len(added) == 20:
            raise error
        added.append(arguments)
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(broken, "add", add_until_it_breaks)
        with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as caught:
            build_data(config)
    assert isinstance(error, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert len(added) == 20 and stages_of(tmp_path / "built") == stages
    folder = build_data(config)
    clean = build_data(small_config(tmp_path, data_dir=str(tmp_path / "clean")))
    assert contents_of(folder) == contents_of(clean)


def test_leftovers_of_a_killed_build_are_cleared_and_do_not_enter_the_next(tmp_path):
    """A kill -9 leaves folders under their other names; those of other settings go as well."""
    config = small_config(tmp_path)
    folder = build_data(config)
    expected, stages = contents_of(folder), list((tmp_path / "built" / "stages").iterdir())
    for path in (folder, *stages):
        (path / "main-00007.bin").write_bytes(b"left over")
        path.rename(path.with_name(path.name + ".tmp"))
    (tmp_path / "built" / "0123456789ab.tmp").mkdir()
    folder.mkdir()
    (folder / "main-00007.bin").write_bytes(b"without a manifest")
    assert contents_of(build_data(config)) == expected
    assert stages_of(tmp_path / "built") == ["clean-main", "tokenizer", "tokens-main"]


def test_a_build_that_waits_for_another_uses_what_that_one_built(tmp_path, monkeypatch):
    class SlowLock(Lock):
        def __init__(self, *arguments, **options):
            if not built:
                built.append(None)
                built[0] = ages_of([build_data(config) / "manifest.json"])  # the other process
            super().__init__(*arguments, **options)
    config, built = small_config(tmp_path), []
    monkeypatch.setattr("corpus.stages.Lock", SlowLock)
    assert ages_of([build_data(config) / "manifest.json"]) == built[0]


def test_what_is_built_serves_until_what_it_is_made_of_changes(tmp_path, monkeypatch):
    """A trained tokenizer is made of all the sources, one in a file of none."""
    data_dir, tokenizer = tmp_path / "built", tmp_path / "tokenizer.json"
    train_bpe(["some words"], 285).save(tokenizer)
    two = {"sources": small_config(tmp_path).sources | {
        "two": write_corpus(tmp_path / "2.jsonl", seed=2)}}

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
    monkeypatch.setattr("corpus.stages.building_code",
                        lambda stage: "another" if stage == "tokens" else building_code(stage))
    assert stages_made() == ["tokenizer", "tokens-main"]
    monkeypatch.setattr("corpus.stages.building_code", lambda stage: "another")
    assert stages_made() == ["clean-main", "tokenizer", "tokens-main"]


@pytest.mark.parametrize("file, edit, stages", [
    *((f"corpus/{part}.py", "x = 1", ["clean"]) for part in ("rules", "dedup", "stdlib")),
    ("corpus/manifest.py", "x = 1", ["mix"]), ("corpus/trace.py", "x = 1", []),
    ("corpus/token_files.py", "x = 1", ["token files"]), ("model.py", "x = 1", []),
    ("corpus/storage.py", "x = 1", ["clean", "mix", "token files", "tokens"]),
    ("data.py", "x = 1", ["clean", "mix", "tokens"]), ("data.py", "# a comment", []),
    ("data.py", "class Batches:\n    pass", []), ("support/files.py", "x = 1", []),
    ("support/text.py", "x = 1", ["clean"])])
def test_stages_are_keyed_by_the_code_that_builds_them(tmp_path, monkeypatch, file, edit, stages):
    before = {stage: building_code(stage) for stage in STAGE_FILES}
    for part in ("corpus", "support"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / file, "a") as code:
        code.write(f"\n{edit}\n")
    monkeypatch.setattr("corpus.stages.ROOT", tmp_path)
    after = {stage: building_code.__wrapped__(stage) for stage in STAGE_FILES}
    assert sorted(stage for stage in STAGE_FILES if before[stage] != after[stage]) == stages


def test_changed_input_makes_another_folder(tmp_path):
    """The order of the sources is part of it: it decides which instance is where."""
    here = tmp_path / "in"
    corpus = Path(write_corpus(here / "deep" / "corpus.jsonl", 20))
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(["some words"], 285).save(tokenizer)

    def build(*names):
        return build_data(small_config(tmp_path, sources=dict.fromkeys(names, str(here)),
                                       tokenizer=str(tokenizer)))
    folders = [build("a"), build("b"), build("a", "b"), build("b", "a")]
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    folders.append(build("a"))
    corpus.write_text(corpus.read_text().replace("one more", "two more"))  # of the same size
    os.utime(corpus, ns=(0, corpus.stat().st_mtime_ns + 1))
    folders.append(build("a"))
    (here / "b.txt").write_text("a new document")
    folders.append(build("a"))
    train_bpe(["some words"], 286).save(tokenizer)
    folders.append(build("a"))
    assert len(set(folders)) == 8 and manifest_of(folders[-1])["vocab_size"] == 286


def test_a_copy_of_the_input_builds_nothing_again(tmp_path, monkeypatch):
    """A file's time may change; a folder that has moved is linked again. Each file is read once."""
    here, read = tmp_path / "in", []
    write_corpus(here / "deep" / "corpus.jsonl", 20)
    monkeypatch.setattr("corpus.inputs.file_sha256", lambda file: read.append(file) or
                        file_sha256(file))

    def build(path):
        read.clear()
        folder = build_data(small_config(tmp_path, sources={"main": str(path)}))
        return folder, ages_of((tmp_path / "built" / "stages").iterdir()), len(read)
    first = build(here)
    assert first[2] == 1 and build(here) == (*first[:2], 0)
    for file in here.rglob("*.jsonl"):
        os.utime(file, (1, 1))
    assert build(here) == first
    (tmp_path / "built" / "inputs.json").write_text('{"torn": [')
    assert build(here) == first
    folder, stages, _ = build(here.rename(tmp_path / "moved"))
    assert stages == first[1] and folder != first[0]
    moved = manifest_of(folder)
    assert moved["sha256"] == manifest_of(first[0])["sha256"]
    assert moved["sources"]["main"]["path"] == str(tmp_path / "moved")


@pytest.mark.parametrize("content", ["", '{"text": " "}\n', "junk\n",
                                     f'{{"id": "{HELD_OUT}", "text": "all held out"}}\n'])
def test_source_without_training_text_is_refused_by_name(tmp_path, content):
    (tmp_path / "without.jsonl").write_text(content)
    without = {"without": str(tmp_path / "without.jsonl")}
    for sources, stages in [(without, []),
                            (small_config(tmp_path).sources | without, ["clean-main"])]:
        config = small_config(tmp_path, sources=sources, tokenizer="bpe:284")
        assert "sources: without: " in refusal(build_data, config)
        assert stages_of(tmp_path / "built") == stages


def test_data_dir_or_tokenizer_that_is_none_is_refused_by_name(tmp_path):
    (tmp_path / "other").write_text("no tokenizer")
    for key, value in [("data_dir", tmp_path / "other"), ("tokenizer", tmp_path / "other"),
                       ("tokenizer", tmp_path / "absent"), ("tokenizer", "bpe:many")]:
        assert str(value) in refusal(build_data, small_config(tmp_path, **{key: str(value)}))


@pytest.mark.skipif(not find_spec("olmo_eval"), reason="needs ai2-olmo-eval")
def test_olmo_is_the_real_tokenizer(tmp_path):
    manifest = manifest_of(build_data(small_config(tmp_path, tokenizer="olmo")))
    ids = [manifest[key] for key in ("eos_token_id", "pad_token_id", "vocab_size")]
    assert ids == [50279, 1, 50280]


# ---- Instances, order and batches -----------------------------------------------------------

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


def test_order_is_official_olmos_and_the_recorded_one():
    """Recorded with numpy 2.4.6: it promises no stable stream, and old runs depend on this one."""
    for n, seed, epoch in [(1, 0, 0), (10, 6198, 0), (1000, 6198, 3), (4097, 1, 1)]:
        order = data.instance_order(n, seed, epoch)
        assert order.dtype == np.uint32
        assert order.tolist() == official_order(n, seed, epoch).tolist()
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
        ours = official_order(N, 7, epoch)[(s - 1) * G:s * G].tolist()
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


class NoShards(list):
    seq_len = 10**6


def test_batch_that_does_not_fit_the_ranks_or_the_corpus_is_refused(shards, tmp_path):
    """With the nearest batch that divides, or how many sequences there are."""
    for batch_size, world_size, nearest in [(12, 5, 10), (12, 7, 14), (12, 16, 16), (3, 8, 8),
                                            (14, 4, 12)]:
        message = refusal(Batches(shards, batch_size, 7, tmp_path), 1, 0, world_size)
        assert re.search(rf"batch_size={batch_size}\b.*\b{world_size} ranks.*\b{nearest}$", message)
    n = len(shards)
    message = refusal(Batches, shards, n + 1, 7, tmp_path)
    assert f"batch_size={n + 1}:" in message and f" {n} " in message
    assert "lower batch_size" in message
    assert Batches(shards, n, 7, tmp_path).steps_per_epoch == 1
    assert "lower max_seq_len" in refusal(Batches, NoShards(), 4, 7, tmp_path)


def test_orders_are_written_once_each_in_a_file_of_its_own_and_mapped(
        built, shards, tmp_path, monkeypatch):
    for seq_len, seed, epoch in [(8, 7, 0), (8, 7, 1), (8, 8, 0), (16, 7, 0)]:
        other = TokenShards(built, seq_len)
        order = Batches(other, 12, seed, tmp_path).order(epoch)
        assert isinstance(order, np.memmap)
        assert order.tolist() == official_order(len(other), seed, epoch).tolist()
    file, order = tmp_path / f"order-n{len(shards)}-seed7-epoch0.bin", official_order(
        len(shards), 7, 0).tolist()
    assert len(list(tmp_path.iterdir())) == 5 and np.fromfile(file, np.uint32).tolist() == order
    with monkeypatch.context() as patch:
        patch.setattr(data, "instance_order", None)  # a call would fail
        assert Batches(shards, 12, 7, tmp_path).order(0).tolist() == order
    file.write_bytes(file.read_bytes()[:-4])  # a cut one is written again
    assert Batches(shards, 12, 7, tmp_path).order(0).tolist() == order


def test_fingerprint_follows_the_data_its_order_and_its_cut(tmp_path):
    """The other data are the same documents in reverse order: as many tokens and instances."""
    corpus = Path(write_corpus(tmp_path / "corpus.jsonl"))
    folder = build_data(small_config(tmp_path))
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[::-1]))
    other = build_data(small_config(tmp_path))

    def fingerprint(folder=folder, seq_len=8, batch_size=12, seed=7):
        return Batches(TokenShards(folder, seq_len), batch_size, seed, tmp_path).fingerprint()
    ours, n = fingerprint(), len(TokenShards(folder, 8))
    assert ours == fingerprint() == json.loads(json.dumps(ours))
    assert len(TokenShards(other, 8)) == ours["instances"] == n
    assert ours["order_sha256"] == hashlib.sha256(official_order(n, 7, 0)).hexdigest()
    for change in ({"folder": other}, {"seed": 8}, {"batch_size": 6}, {"seq_len": 16}):
        assert fingerprint(**change) != ours


# ---- The lock -------------------------------------------------------------------------------

HOLD = """
import sys
from support.lock import Lock
lock = Lock(sys.argv[1])
print(lock.text, flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_holds_a_lock_and_a_kill_frees_it(tmp_path):
    """The holder is another process, as a POSIX lock never shuts out its own."""
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE,
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
    monkeypatch.setattr("support.lock.fcntl.lockf", no_locks)
    with Lock(tmp_path / ".lock") as lock:
        assert lock.text and str(tmp_path / ".lock") in capsys.readouterr().out


# ---- The command line -----------------------------------------------------------------------

@pytest.mark.parametrize("word, message", [("--eval_shar=0.1", "did you mean eval_share"),
                                           ("--sources={'main': 'no/such'}", "no/such")])
def test_mistake_gives_one_line_and_writes_nothing(call, refused, tmp_path, word, message):
    refused(call(data, f"--data_dir={tmp_path}", word), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key, value", [
    *(("eval_share", share) for share in (-0.1, 1.01, float("nan"))),
    *((key, -1) for key in ("seed", "workers", "mix_tokens", "bloom_items")),
    *(("bloom_fp_rate", rate) for rate in (0.0, 1.0)),
    *(("max_repeats", most) for most in (0.0, float("nan"), float("inf"))),
    *(("language_scorer", name) for name in ("none", "os:system")),
    ("content_scorer", "stand-in"), ("sources", {})])
def test_setting_that_makes_no_sense_is_refused(key, value):
    assert f"{key}={value}:" in refusal(DataConfig, **{key: value})


@pytest.mark.parametrize("name", ["../../outside", "a/b", ""])
def test_source_that_cannot_name_files_is_refused(name):
    assert repr(name) in refusal(DataConfig, sources={name: "corpus.jsonl"})
