"""From a step back to its text and forth, against the original files, numpy and brute force;
ready token files, the mix, and builds that are killed."""

import csv
import functools
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (PATIENCE_S, ages_of, children_of, columns, contents_of, data_config, end_of,
                      index_of, manifest_of, official_order, refusal, wait_until, write_jsonl)

import data
import train
from corpus.bpe import train_bpe
from corpus.funnel import Funnel
from corpus.rules import RULES, filter_documents
from corpus.storage import DOCUMENT_INDEX, hash_of_id, stored_documents
from corpus.tokenizer import Tokenizer
from corpus.trace import RunData, held_out_of
from data import Batches, TokenShards, build_data
from scaling.ranks import batch_hash
from support.text import counted, harmless

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
T, B, SEED, STEPS = 32, 8, 6198, 120
ODD_IDS = ["a b/ü…\t'\"\\n?", "日本\n語", "--doc=x", "{0}%s", "-"]


# ---- Helpers -------------------------------------------------------------------------------------

def words(dice, n):
    return " ".join("".join(dice.choices("aeionrst", k=dice.randint(1, 6))) for _ in range(n))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer.json of 512 ids."""
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_bpe([words(random.Random(0), 3000)], 512).save(file)
    return str(file)


def pretend_run(run, config, last_step, batch_size=B):
    """What train.py leaves of a run on `config`'s data, without the training; the data's folder."""
    folder = build_data(config)
    run.mkdir()
    settings = {**asdict(config), "max_seq_len": T, "batch_size": batch_size}
    (run / "config.json").write_text(json.dumps(settings))
    shutil.copy(folder / "manifest.json", run)
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": last_step}) + "\n")
    return folder


def official_instances(n, step):
    epoch, position = divmod(step - 1, n // B)
    return official_order(n, SEED, epoch)[position * B:(position + 1) * B].tolist()


# ---- A run ---------------------------------------------------------------------------------------

def write_sources(root):
    """Three sources that their rules edit: web (shown 2.5 times), code (0.4) and notes (once)."""
    dice = random.Random(3)
    menu = [words(dice, 6) + "." for _ in range(5)]  # lines that many documents share
    extras = [lambda: words(dice, 4), lambda: f"Ask {words(dice, 1)}@mail.example.org, please.",
              lambda: dice.choice(menu), lambda: "Call 555-123-4567 or 10.0.0.7."]

    def page():
        lines = [words(dice, dice.randint(2, 9)) + "." for _ in range(dice.randint(1, 5))]
        return "\n".join(dice.sample(lines + [dice.choice(extras)()], len(lines) + 1))
    for i in range(4):
        write_jsonl(root / "web" / "ab"[i % 2] / f"part-{i}.jsonl{'.gz' * (i % 2)}",
                    [{"id": f"web{i}-{j}", "text": page()} for j in range(10)])
    for i in range(40):
        file = root / "code" / f"lib{i % 3}" / f"m{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        header = f"# Copyright {words(dice, 3)}\n# all rights\n\n" if i % 3 else ""
        file.write_bytes(f"{header}def f{i}():\r\n    return '{words(dice, 9)}'\n".encode())
    notes = [{"id": name, "text": f" \n{words(dice, 9)} e\u0301 \n"} for name in ODD_IDS]
    notes += [{"id": "twin", "text": f"the {n} twin {words(dice, 9)}"} for n in ("one", "two")]
    notes += [{"id": i, "text": page()} for i in range(40)]
    notes += [{"id": f"tail{i}", "text": "end"} for i in range(12)]
    write_jsonl(root / "notes.jsonl", notes)
    return {"web": {"path": str(root / "web"), "rules": "c4_punctuation pii paragraph",
                    "weight": 2.5},
            "code": {"path": str(root / "code"), "rules": "code_header", "weight": 0.4},
            "notes": {"path": str(root / "notes.jsonl"), "rules": "pii"}}


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_config):
    """RunData of a run of several epochs over those sources, in many small files and blocks."""
    root = tmp_path_factory.mktemp("traced")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "write_shards", functools.partial(data.write_shards, shard_tokens=700))
        patch.setattr("corpus.storage.BLOCK_BYTES", 2000)
        patch.setattr("corpus.storage.FILE_BYTES", 2000)
        train.main([str(tiny_config(
            root / "run", sources=write_sources(root), data_dir=str(root / "data"), workers=1,
            eval_share=0.05, max_steps=STEPS, eval_every_steps=0, save_every_steps=0))])
    return RunData(root / "run")


# ---- The round trip ------------------------------------------------------------------------------

def rebuilt(found, step):
    """The tokens of a step, from the clean documents' text alone."""
    tokens = torch.full((B, T), -1)
    for span in found.trace(step):
        ids = found.tokenizer.encode(span.document["text"].strip())
        ids.append(found.tokenizer.eos_token_id)
        tokens[span.sequence, slice(*span.tokens)] = torch.tensor(ids[slice(*span.document_tokens)])
    return tokens


def original(source, provenance):
    """The document as it is in its own file, on its own line."""
    name, _, line = provenance.rpartition(":")
    file = Path(source["path"]) if name == "notes.jsonl" else Path(source["path"]) / name
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if file.suffix == ".py":
        return {"id": f"{name}:1", "text": content.decode()}
    return json.loads(content.split(b"\n")[int(line) - 1])


def check_document(document, source):
    """The clean document is its original after the source's filters, less some paragraphs."""
    entry = original(source, document["metadata"]["provenance"])
    raw = {"id": str(entry["id"]), "text": entry["text"], "metadata": {"provenance": ""}}
    rules = [rule for rule in source["rules"] if rule in RULES]
    [filtered] = filter_documents([raw], rules, Funnel(), {})
    edits = dict(document["metadata"].get("edited_by", {}))
    gone = edits.pop("paragraph", 0)
    lines, rest = document["text"].split("\n"), iter(filtered["text"].split("\n"))
    assert document["id"] == raw["id"] and edits == filtered["metadata"].get("edited_by", {})
    assert all(line in rest for line in lines)  # in this order
    assert len(lines) == filtered["text"].count("\n") + 1 - gone
    return set(document["metadata"].get("edited_by", {}))


def test_a_step_is_the_text_of_the_files_that_trace_names(found, tmp_path):
    """50 random steps of some epochs: text -> tokens -> batch -> hash, and text <- file:line."""
    logged = {row["step"]: row for row in map(json.loads, open(found.run / "metrics.jsonl"))
              if row["kind"] == "train"}
    shards, sources = TokenShards(found.folder, T), manifest_of(found.folder)["sources"]
    batches, edited = Batches(shards, B, SEED, tmp_path), []
    assert len(logged) == STEPS > 2 * batches.steps_per_epoch and len(shards.files) > 8
    assert len(shards) % B and shards.tail_tokens
    for step in random.Random(1).sample(sorted(logged), 50):
        tokens, spans = rebuilt(found, step), list(found.trace(step))
        assert torch.equal(tokens, batches(step)["tokens"])
        assert logged[step]["batch_hash"] == batch_hash(tokens)
        assert [span.instance for span in spans if span.tokens[0] == 0] == official_instances(
            len(shards), step)
        documents = [span.document for span in spans]
        edits = [check_document(document, sources[document["source"]]) for document in documents]
        edited += [rules for rules in [set().union(*edits)] if rules]
    assert len(edited) >= 10
    assert set().union(*edited) == {"c4_punctuation", "pii", "paragraph", "code_header"}


# ---- find and trace ------------------------------------------------------------------------------

def key_of(document):
    return document["source"], document["metadata"]["provenance"]


@pytest.fixture(scope="module")
def shown(found):
    """{(source, provenance): {(step, sequence)}} of the run, by tracing every step."""
    shown = defaultdict(set)
    for step in range(1, STEPS + 1):
        for span in found.trace(step):
            shown[key_of(span.document)].add((step, span.sequence))
    return shown


def test_find_says_what_tracing_every_step_says(found, shown, call):
    """Each clean document, over epochs' ends: those in a file's tail or cut from the mix nowhere.

    Copies in the files: web has 2 or 3 of each, code none or one; the twins' hash counts twice.
    """
    copies = Counter(int(i) for shard in manifest_of(found.folder)["shards"]
                     for i in index_of(found.folder, shard)["id"])
    kinds, numbers = defaultdict(list), defaultdict(set)
    for document in (document for source in ("web", "code", "notes")
                     for document in stored_documents(found.folder, source)):
        numbers[document["source"]].add(copies[hash_of_id(document["id"])])
        places = {key_of(other): instances for other, instances in found.find(document["id"])}
        steps = found.steps_of(places.get(key_of(document), []), STEPS)
        assert {step[:2] for step in steps} == shown.get(key_of(document), set())
        assert len(steps) == len({step[:2] for step in steps})
        for step, sequence, instance in steps:
            assert official_instances(len(found.shards), step)[sequence] == instance
        kinds["cut out" if key_of(document) not in places else "shown" if steps else
              "in a tail"].append(document["id"])
    assert numbers == {"web": {2, 3}, "code": {0, 1}, "notes": {1, 2}}
    assert len(kinds["shown"]) > 60 and len(kinds["cut out"]) > 10 and kinds["in a tail"]
    assert call(data, "find", found.run, f"--doc={kinds['cut out'][0]}").stdout.startswith(
        "the mix has 0 documents")


@pytest.mark.parametrize("name, lines", [
    *([name, [line]] for line, name in enumerate(ODD_IDS, 1)), ("twin", [6, 7])])
def test_odd_ids_and_two_documents_with_one_id_are_found(found, call, shown, name, lines):
    """What find prints, step by step."""
    answers, expected = list(found.find(name)), ""
    for (document, instances), line in zip(answers, lines, strict=True):
        steps, key = found.steps_of(instances, STEPS), ("notes", f"notes.jsonl:{line}")
        assert key_of(document) == key and {step[:2] for step in steps} == shown[key]
        expected += f"{name}  ({', '.join(key)})\n"
        expected += f"  in {counted(len(steps), 'sequence')} of steps 1 to {STEPS}\n"
        expected += "".join(f"  step {s}, sequence {q}, instance {i}\n" for s, q, i in steps)
    expected = f"the mix has {counted(len(lines), 'document')} with the id {name}\n{expected}"
    assert call(data, "find", found.run, f"--doc={name}").stdout == expected


def test_text_is_found_in_the_documents_that_hold_it_alone(found, call):
    """In one of two documents with the same id; an e-mail that was masked in none."""
    out = call(data, "find", found.run, "--text=the two twin").stdout
    assert "notes.jsonl:7)" in out and "notes.jsonl:6)" not in out
    assert "1 clean document with 'the two twin'" in out
    out = call(data, "find", found.run, "--text=@mail.example").stdout
    assert out == "0 clean documents with '@mail.example'\n"
    out = call(data, "find", found.run, "--text=e\u0301", "--limit=3").stdout
    assert "5 clean documents with 'e\u0301'; the first 3 are shown" in out
    assert len(re.findall(f" sequences? of steps 1 to {STEPS}", out)) == 3


def test_text_is_found_in_the_sequences_that_hold_it(tmp_path, tokenizer):
    """Each of 400 numbered words where it is and nowhere else; one may be in two sequences."""
    text = " ".join(f"<{i}é>" for i in range(400))
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": "long", "text": f"  {text}"}])
    config = data_config(tmp_path, tokenizer=tokenizer, sources={"a": corpus})
    folder = pretend_run(tmp_path / "run", config, 1, batch_size=1)
    found, shards = RunData(tmp_path / "run"), TokenShards(folder, T)
    tokens = Tokenizer.load(folder / "tokenizer.json")
    rows = [tokens.decode(shards[i].tolist()) for i in range(len(shards))]
    for i in range(0, 390, 7):
        [(_, instances)] = found.find("long", f"<{i}é>")
        inside = [row for row, content in enumerate(rows) if f"<{i}é>" in content]
        assert instances == inside if inside else len(instances) == 2
    assert [instances for _, instances in found.find("long", "absent")] == [[]]


def test_two_ids_with_one_hash_are_told_apart(tmp_path, tokenizer, monkeypatch):
    for module in ("data", "corpus.trace"):
        monkeypatch.setattr(f"{module}.hash_of_id", lambda name: 7)
    corpus = write_jsonl(tmp_path / "a.jsonl", [
        {"id": name, "text": f"{name} words " * 90} for name in ("x", "y")])
    config = data_config(tmp_path, tokenizer=tokenizer, sources={"a": corpus})
    pretend_run(tmp_path / "run", config, 1)
    [(document, _)] = RunData(tmp_path / "run").find("y")
    assert document["id"] == "y"


def test_find_is_fast_in_a_million_instances(tmp_path, tokenizer):
    """Two sparse files with 600,000 documents: in seconds, and what arithmetic says."""
    names, n, per_epoch, dice = ["x0", "x1", "x2"], 500_000, 125_000, np.random.default_rng(0)
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"id": name, "text": name} for name in names])
    config = data_config(tmp_path, tokenizer=tokenizer, sources={"a": corpus})
    folder, shards, places = build_data(config), [], {name: [] for name in names}
    size = n * T + 5
    for number in range(2):
        path = folder / f"big-{number}.bin"
        path.touch()
        os.truncate(path, 2 * size)
        cuts = np.unique(np.r_[0, dice.integers(1, size, 300_000), size])
        index = np.zeros(len(cuts) - 1, DOCUMENT_INDEX)
        index["start"], index["end"] = cuts[:-1], cuts[1:]
        index["id"] = dice.integers(0, 2**63, len(index))
        for line, name in enumerate(names):
            row = int(dice.integers(len(index)))
            index["id"][row], index["line"][row] = hash_of_id(name), line
            last = min((cuts[row + 1] - 1) // T, n - 1)
            places[name] += [number * n + i for i in range(cuts[row] // T, last + 1)]
        index.tofile(path.with_suffix(".index"))
        shards.append({"file": path.name, "tokens": size, "source": "a"})
    (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"shards": shards}))
    pretend_run(tmp_path / "run", config, 2 * per_epoch + 9)
    began = time.process_time()  # of this process alone: the machine may have other work
    found = RunData(tmp_path / "run")
    answers = {name: list(found.find(name)) for name in names}
    steps = {name: found.steps_of(instances, found.steps_done())
             for name, [(_, instances)] in answers.items()}
    spans = list(found.trace(2 * per_epoch))
    assert time.process_time() - began < 5
    assert [span.instance for span in spans if span.tokens[0] == 0] == official_instances(
        2 * n, 2 * per_epoch)
    for name, [(document, instances)] in answers.items():
        assert document["text"] == name and instances == places[name]
        expected = [(epoch * per_epoch + int(position) // B + 1, int(position) % B, i)
                    for epoch in range(3) for i in instances
                    for position in np.flatnonzero(official_order(2 * n, SEED, epoch) == i)]
        assert steps[name] == sorted(step for step in expected if step[0] <= 2 * per_epoch + 9)


# ---- Ready token files ---------------------------------------------------------------------------

SIZES = (1000, 77, 30, 640, 1201)  # 30 makes no instance, 640 leaves no tail
N = 31 + 2 + 0 + 20 + 37


def write_token_files(folder, sidecars=True):
    """(instances, [(start, end, id)] of each file): raw uint16 .npy files, a list, csv sidecars."""
    dice, instances, documents = np.random.default_rng(5), [], []
    for number, size in enumerate(SIZES):
        tokens = dice.integers(0, 512, size).astype("<u2")
        tokens.tofile(folder / f"part-{number}.npy")
        instances.append(tokens[:size // T * T].reshape(-1, T))
        cuts = [0, *sorted(set(dice.integers(1, size, size // 23).tolist())), size]
        documents.append([(start, end, f"d{number}, \"{i}\"") for i, (start, end) in enumerate(
            zip(cuts, cuts[1:], strict=False))])
        if sidecars:
            with gzip.open(folder / f"part-{number}.csv.gz", "wt", newline="") as file:
                csv.writer(file).writerows((*row, f"raw-{number}.jsonl.gz", i + 1)
                                           for i, row in enumerate(documents[-1]))
    (folder / "list.txt").write_text(f"# the order counts\n\npart-0.npy\n  {folder}/part-1.npy \n"
                                     "part-2.npy\n#part-4.npy\npart-3.npy\npart-4.npy\n\n")
    return np.concatenate(instances).astype(np.int64), documents


def list_config(folder, tokenizer):
    return data_config(folder, tokenizer=tokenizer, token_files=str(folder / "list.txt"))


def test_sidecars_name_the_documents_of_token_files(tmp_path, tokenizer):
    """trace and find against an owner of every single token, over two epochs."""
    _, documents = write_token_files(tmp_path)
    pretend_run(tmp_path / "run", list_config(tmp_path, tokenizer), 22)
    found, shown, owners = RunData(tmp_path / "run"), defaultdict(set), []
    for rows, size in zip(documents, SIZES, strict=True):
        owner = [(name, t - start) for start, end, name in rows for t in range(start, end)]
        owners += [owner[i:i + T] for i in range(0, size - T + 1, T)]
    for step in range(1, 23):
        spans = defaultdict(list)
        for span in found.trace(step):
            assert span.tokens[0] == len(spans[span.sequence])
            spans[span.sequence] += [(span.document["id"], t) for t in range(*span.document_tokens)]
            shown[span.document["id"]].add((step, span.sequence))
        assert [spans[i] for i in range(B)] == [owners[i] for i in official_instances(N, step)]
    for number, rows in enumerate(documents):
        for line, (_, _, name) in enumerate(rows, 1):
            [(document, instances)] = found.find(name)
            assert {step[:2] for step in found.steps_of(instances, 22)} == shown[name]
            assert document["metadata"]["provenance"] == f"raw-{number}.jsonl.gz:{line}"
    assert not all(shown.values())  # some in a tail


def test_trace_says_where_there_is_no_sidecar(tmp_path, tokenizer, call):
    write_token_files(tmp_path, sidecars=False)
    pretend_run(tmp_path / "run", list_config(tmp_path, tokenizer), 11)
    out = call(data, "trace", tmp_path / "run", "--step=11").stdout
    for sequence, i in enumerate(official_instances(N, 11)):
        file = int(np.searchsorted([31, 33, 33, 53, 90], i, side="right"))
        part = out.split(f"\nsequence {sequence}, instance {i}\n")[1].split("\nsequence")[0]
        assert part.startswith(f"  tokens 0-{T - 1}: ") and f"part-{file}.csv.gz" in part


@pytest.mark.parametrize("name, damage", [
    ("part-3.npy", Path.unlink),
    ("part-3.npy", lambda path: np.save(path, np.zeros(99, "<u2"))),
    ("part-3.npy", lambda path: path.write_bytes(b"\1\0\1")),
    ("part-3.npy", lambda path: path.write_bytes(b"")),
    ("part-3.npy", lambda path: np.full(99, 512, "<u2").tofile(path)),
    ("list.txt", lambda path: path.write_text("# none\n\n")), ("list.txt", Path.unlink)])
def test_token_files_that_are_none_are_refused_by_name(tmp_path, tokenizer, name, damage):
    write_token_files(tmp_path)
    damage(tmp_path / name)
    assert str(tmp_path / name) in refusal(build_data, list_config(tmp_path, tokenizer))


def test_a_token_file_replaced_by_another_makes_other_data(tmp_path, tokenizer):
    write_token_files(tmp_path)
    folder = build_data(list_config(tmp_path, tokenizer))
    tokens = np.fromfile(tmp_path / "part-0.npy", "<u2")
    tokens[::-1].tofile(tmp_path / "part-0.npy")
    other = build_data(list_config(tmp_path, tokenizer))
    assert other != folder and manifest_of(other)["sha256"] != manifest_of(folder)["sha256"]


def test_a_run_trains_on_token_files_as_official_olmo_cuts_and_orders_them(
        tmp_path, tokenizer, tiny_config, call):
    """Each file by itself, its tail dropped; PCG64 of seed + epoch; over the ends of two epochs.

    There is no held-out text then.
    """
    instances, _ = write_token_files(tmp_path)
    file = tiny_config(tmp_path / "run", token_files=str(tmp_path / "list.txt"), max_steps=24,
                       tokenizer=tokenizer, data_dir=str(tmp_path / "data"), eval_every_steps=2)
    done = call(train, file)
    assert done.returncode == 0, done.stderr
    assert len(instances) == N and N // B == 11
    assert columns(tmp_path / "run", "batch_hash") == [
        (batch_hash(torch.from_numpy(instances[official_instances(N, step)])),)
        for step in range(1, 25)]
    out = call(data, "trace", tmp_path / "run", "--step=24").stdout
    assert out.startswith("step 24, epoch 2\n")


# ---- The mix -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mix(tmp_path_factory, tokenizer):
    """Makes a DataConfig of three sources with these weights; their stages are built but once."""
    root, dice = tmp_path_factory.mktemp("mix"), random.Random(8)
    paths = [write_jsonl(root / f"{name}.jsonl", [
        {"id": f"{name}{i}", "text": words(dice, dice.randint(1, 60))} for i in range(n)])
        for name, n in (("a", 120), ("b", 45), ("c", 9))]

    def config(weights, names="abc", **changes):
        sources = {name: {"path": path, "weight": weight}
                   for name, path, weight in zip(names, paths, weights, strict=False)}
        return data_config(root, tokenizer=tokenizer, sources=sources, **changes)
    return config


def check_mix(config):
    """Each source has its target of tokens within a document; a part, those of least hashes."""
    folder, realised = build_data(config), {}
    tokenizer, manifest = Tokenizer.load(config.tokenizer), manifest_of(folder)
    TokenShards(folder, T)  # the sizes of the files are as the manifest says
    for name, source in config.sources.items():
        lengths = {hash_of_id(document["id"]): len(tokenizer.encode(document["text"])) + 1
                   for document in stored_documents(folder, name)}
        total, longest = sum(lengths.values()), max(lengths.values())
        times = source["weight"] * (config.mix_tokens / total if config.mix_tokens else 1)
        copies = Counter(int(i) for shard in manifest["shards"] if shard["source"] == name
                         for i in index_of(folder, shard)["id"])
        realised[name] = sum(np.fromfile(folder / shard["file"], "<u2").size
                             for shard in manifest["shards"] if shard["source"] == name)
        assert realised[name] == sum(lengths[i] * n for i, n in copies.items())
        assert abs(realised[name] - times * total) <= longest
        drawn = [copies[i] for i in sorted(lengths)]  # by hash: it knows nothing of their lengths
        assert drawn == sorted(drawn, reverse=True)
        assert int(times + 1e-9) <= drawn[-1] and drawn[0] <= np.ceil(times - 1e-9)
    for name, tokens in realised.items():
        source = manifest["sources"][name]
        assert (source["mix_tokens"], source["share"]) == (tokens, tokens / sum(realised.values()))
    return [tokens / sum(realised.values()) for tokens in realised.values()]


@pytest.mark.parametrize("seed", range(6))
def test_sources_get_their_targets_within_one_document(mix, seed):
    """Weights as repetitions, at first integers, and as shares of mix_tokens."""
    dice = np.random.default_rng(seed)
    check_mix(mix(dice.uniform(0.1, 3.3, 3).round(3).tolist() if seed else (1, 2, 3)))
    a, b = dice.uniform(0.2, 0.4, 2).round(3).tolist()
    check_mix(mix((a, b, 1 - a - b), mix_tokens=4000 + 700 * seed, max_repeats=30))


def test_a_source_named_like_the_part_of_another_keeps_its_tokens(mix):
    check_mix(mix((0.5, 1), names=("a", "a-part")))


def test_the_table_prints_the_realised_shares(mix, call):
    config = mix((1, 2.5, 0.4))
    out = call(data, f"--data_dir={config.data_dir}", f"--sources={config.sources}",
               f"--tokenizer={config.tokenizer}", "--eval_share=0").stdout
    [row] = [line for line in out.splitlines() if "share of the mix" in line]
    assert row.split()[-3:] == [f"{share:.2%}" for share in check_mix(config)]


@pytest.mark.parametrize("weights, changes, said", [
    ((0.3, 0.3, 0.4), {"mix_tokens": 4000, "max_repeats": 2}, " c holds "),
    ((0.3, 0.3, 0.3), {"mix_tokens": 4000}, "not to 0.9"),
    ((1, 1, 1), {"mix_tokens": 4000}, "not to 3"),
    ((0.0001,), {"names": ["tiny"]}, "tiny")])  # no document is left
def test_a_mix_that_cannot_be_is_refused(mix, weights, changes, said):
    assert said in refusal(lambda: build_data(mix(weights, **changes)))


# ---- Kills ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def big(tmp_path_factory, tokenizer, start):
    """(starts a build in a data_dir, its files when nothing disturbs it, its seconds)."""
    root, dice = tmp_path_factory.mktemp("big"), random.Random(4)
    stock = [words(dice, dice.randint(3, 30)) + "." for _ in range(6000)]
    sources = {name: {"weight": weight, "rules": "gopher repeated_tokens pii document paragraph",
                      "path": write_jsonl(root / f"{name}.jsonl", [
                          {"id": f"{name}{i}", "text": "\n".join(dice.choices(stock, k=20))
                           + " the of"} for i in range(800)])}
               for name, weight in (("a", 1), ("b", 1.5))}

    def build(folder):
        return start("data.py", f"--sources={sources}", f"--data_dir={folder}", "--workers=2",
                     f"--tokenizer={tokenizer}", "--eval_share=0.1")
    began = time.monotonic()
    with build(root / "data") as process:
        code, _, stderr = end_of(process)
    assert code == 0, stderr
    return build, contents(root / "data"), time.monotonic() - began


def contents(data_dir):
    """{name: bytes} of the one built folder, after a look that nothing half-made is there."""
    assert not list(data_dir.rglob("*.tmp"))
    [folder] = [path.parent for path in data_dir.glob("*/manifest.json")]
    found = contents_of(folder)
    assert {"manifest.json", "a-00000.bin", "b-00000.index"} <= found.keys()
    assert {"documents", "dropped", "held_out"} <= {name.split("/")[0] for name in found}
    return folder.name, found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stages_of(data_dir):
    return ages_of(path for path in (data_dir / "stages").glob("*") if path.suffix != ".tmp")


def check_kill(big, data_dir, is_time):
    """Kill a build when `is_time`; the same command makes the same files of what is there.

    Returns the stages that were finished by then, and the workers of the killed process.
    """
    build, expected, _ = big
    with build(data_dir) as process:
        while process.poll() is None and not is_time(process.pid):
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that no worker begins unseen
        workers = children_of(process.pid) if process.poll() is None else []
        process.kill()
    try:
        wait_until(lambda: not any(map(is_alive, workers)))  # they do not outlive their parent
    finally:
        for pid in filter(is_alive, workers):
            os.kill(pid, signal.SIGKILL)
    before = stages_of(data_dir)
    with build(data_dir) as process:
        code, _, stderr = end_of(process)
    assert code == 0, stderr
    assert contents(data_dir) == expected
    assert stages_of(data_dir).items() >= before.items()  # none was made again
    return before, workers


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs /proc")
@pytest.mark.parametrize("moment", ["after a stage", *(
    pytest.param(moment, marks=pytest.mark.slow) for moment in (0.2, 0.5, 0.8))])
def test_a_killed_build_is_completed(big, tmp_path, moment):
    """Killed when its first stage is finished and workers are at the next, or at any moment."""
    if moment == "after a stage":
        before, workers = check_kill(big, tmp_path, lambda pid: children_of(pid) and any(
            path.name.startswith("clean-a") for path in stages_of(tmp_path)))
        assert before and workers
    else:
        deadline = time.monotonic() + big[2] * (moment + 0.2 * random.random())
        check_kill(big, tmp_path, lambda pid: time.monotonic() >= deadline)


def test_workers_start_as_python_3_14_starts_them():
    """Its default on Linux is forkserver, whose workers are no children of this process."""
    code = ("import multiprocessing, corpus.stages; "
            "multiprocessing.set_start_method('forkserver'); "
            "print(list(corpus.stages.Workers(2).map(abs, [-1, 2])))")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent, text=True,
                          capture_output=True, timeout=PATIENCE_S)
    assert done.stdout == "[1, 2]\n", done.stderr


# ---- The commands --------------------------------------------------------------------------------

def sequences_in(out):
    """{sequence: (instance, its lines)} of what trace printed."""
    parts = [part.split("\n", 1) for part in out.split("\nsequence ")[1:]]
    return {int(head.split(",")[0]): (int(head.rpartition(" ")[2]), body) for head, body in parts}


def test_a_run_or_a_step_that_is_not_there_is_named_with_what_is(found, call, refused):
    run = found.run
    refused(call(data, "trace", f"{run}x", "--step=1"), f"{run}x", f"did you mean {run}?")
    refused(call(data, "trace", run, "--step=0"), "--step=0", f"{run} is at step {STEPS}")
    refused(call(data, "trace", run, "--rank=3", "--world_size=3"), "--rank=3")
    later = call(data, "trace", run, f"--step={STEPS + 1}").stdout
    assert f"(not seen: the run is at step {STEPS} of {STEPS})" in later.splitlines()[0]


@pytest.mark.parametrize("chars", [0, 9])
def test_trace_prints_the_step_its_documents_and_their_text(found, call, chars):
    """A step of a later epoch; all of its tokens, first to last, with where they came from."""
    out = call(data, "trace", found.run, "--step=60", f"--chars={chars}").stdout
    n, rows = len(found.shards), Batches(found.shards, B, SEED, found.folder)(60)["tokens"]
    assert out.startswith(f"step 60, epoch {59 // (n // B)}\n\nsequence 0, instance ")
    shown, expected = sequences_in(out), defaultdict(str)
    assert [i for i, _ in shown.values()] == official_instances(n, 60)
    for span in found.trace(60):
        text = found.tokenizer.decode(rows[span.sequence, slice(*span.tokens)].tolist())
        (source, place), (begin, end) = key_of(span.document), span.document_tokens
        edits = span.document["metadata"].get("edited_by", {})
        lines = [f"  tokens {span.tokens[0]}-{span.tokens[1] - 1}: {span.document['id']}  "
                 f"({source}, {place}, its tokens {begin}-{end - 1}"
                 + "".join(f", {rule} cut {n}" for rule, n in edits.items()) + ")",
                 *(f"    | {line}" for line in text[:chars or None].splitlines())]
        if chars and len(text) > chars:
            lines.append(f"    ... {len(text) - chars} more characters")
        expected[span.sequence] += "".join(f"{line}\n" for line in lines)
    assert {i: body.rstrip("\n") for i, (_, body) in shown.items()} == {
        i: body.rstrip("\n") for i, body in expected.items()}
    assert " cut " in out and ("more characters" in out) == bool(chars)


class Page(HTMLParser):
    """A page as a browser reads it: its tags, its documents, and the text without any tag."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.keys = set(), set()
        self.documents = []  # [{classes, about, text, eos}]
        self.inside = None
        self.feed(file.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        classes = (dict(attributes).get("class") or "").split()
        self.tags.add(tag)
        self.keys |= {key for key, _ in attributes}
        if "doc" in classes:
            self.documents.append({"classes": classes, "about": "", "text": "", "eos": 0})
        if self.documents and tag == "div":
            self.inside = classes[0]
        if self.documents and "eos" in classes:
            self.documents[-1]["eos"] += 1

    def handle_endtag(self, tag):
        self.inside = None if tag == "div" else self.inside

    def handle_data(self, content):
        if self.inside in ("about", "text"):
            self.documents[-1][self.inside] += content


def test_the_page_has_the_tokens_of_the_step_and_their_documents(found, call, tmp_path):
    """All of them, a part of a document after another, with the borders where documents begin."""
    file, eos = tmp_path / "batch.html", found.tokenizer.eos_token_id
    for step in range(60, 80):
        call(data, "trace", found.run, f"--step={step}", "--chars=1", f"--html={file}")
        spans, colours = found.trace(step), defaultdict(list)
        for span, shown in zip(spans, Page(file).documents, strict=True):
            ids = found.shards[span.instance][slice(*span.tokens)].tolist()
            source, place = key_of(span.document)
            assert shown["text"] == harmless(found.tokenizer.decode(ids))
            assert shown["eos"] == ids.count(eos)
            assert shown["about"].startswith(f"{span.document['id']}{source} {place}tokens ")
            assert ("begins" in shown["classes"]) == (span.document_tokens[0] == 0)
            assert ("cut here" in shown["about"]) == (ids[-1] != eos)
            colours[span.sequence].append("b" in shown["classes"])
        assert all(part == [bool(i % 2) for i in range(len(part))] for part in colours.values())
    spans = found.trace(60)
    own = call(data, "trace", found.run, "--step=60", "--rank=1", "--world_size=4",
               f"--html={file}")
    assert own.stdout == f"wrote {file}\n" and len(Page(file).documents) == sum(
        span.sequence % 4 == 1 for span in spans)


HOSTILE = ["</div><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<|endoftext|>",
           "&lt;b&gt;&#60;i&#62;", "<!-- <style> --> ]]> <svg/onload=alert(1)>",
           "\x00\x07\x1b[2J\u202e\x7f", "😀 日本 e\u0301 \r\n\ttab"]


def test_no_text_of_a_document_is_markup_of_the_page(tmp_path, tokenizer, call):
    """Nor its id: a browser sees our own tags alone, and a forged end of a document is text."""
    write_jsonl(tmp_path / "t.jsonl", [
        {"id": f"{i} {text}", "text": f"{text} {words(random.Random(i), 9)} {text}"}
        for i, text in enumerate(HOSTILE)])
    config = data_config(tmp_path, tokenizer=tokenizer, eval_share=0.0, sources={
        "t": {"path": str(tmp_path / "t.jsonl"), "rules": ""}})
    tokens = sum(shard["tokens"] for shard in manifest_of(build_data(config))["shards"])
    pretend_run(tmp_path / "run", config, 1, batch_size=tokens // T)
    file = tmp_path / "batch.html"
    call(data, "trace", tmp_path / "run", "--step=1", f"--html={file}")
    page = Page(file)
    assert len(page.documents) >= len(HOSTILE)
    assert page.tags == set("html meta title style h1 h2 p span div b br i".split())
    assert page.keys == {"lang", "charset", "http-equiv", "content", "name", "class", "style",
                         "aria-hidden"}
    found = RunData(tmp_path / "run")
    for span, shown in zip(found.trace(1), page.documents, strict=True):
        ids = found.shards[span.instance][slice(*span.tokens)].tolist()
        assert shown["text"] == harmless(found.tokenizer.decode(ids))
        assert shown["about"].startswith(harmless(span.document["id"]))
        assert shown["eos"] == ids.count(found.tokenizer.eos_token_id)


def test_a_page_says_what_it_leaves_out_and_where_it_cannot_be(found, call, refused, tmp_path,
                                                               monkeypatch):
    file = tmp_path / "batch.html"
    monkeypatch.setattr("corpus.trace_page.MOST_TOKENS", 3 * T)
    call(data, "trace", found.run, "--step=2", f"--html={file}")
    assert f"first 3 sequences of {B};" in file.read_text()
    assert len(Page(file).documents) == sum(span.sequence < 3 for span in found.trace(2))
    for name in (tmp_path / "metrics.jsonl", tmp_path / "none" / "batch.html"):
        refused(call(data, "trace", found.run, f"--html={name}"), "--html", name.name)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.html"]


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2), (3, 4), (-1, 4)])
def test_rank_selects_its_own_sequences(found, call, rank, world_size):
    everything = sequences_in(call(data, "trace", found.run, "--step=5").stdout)
    own = call(data, "trace", found.run, "--step=5", f"--rank={rank}", f"--world_size={world_size}")
    expected = range(B) if rank < 0 else range(rank, B, world_size)
    assert sequences_in(own.stdout + "\n").keys() == set(expected) <= everything.keys()


def test_a_step_not_seen_is_said_to_be_so(found, call):
    epoch = STEPS // (len(found.shards) // B)
    assert "not seen" not in call(data, "trace", found.run, f"--step={STEPS}").stdout
    assert call(data, "trace", found.run, f"--step={STEPS + 1}").stdout.startswith(
        f"step {STEPS + 1}, epoch {epoch} (not seen: the run is at step {STEPS} of {STEPS})\n")


@pytest.mark.parametrize("command, said", [
    ("trace --step=0", "step=0"), ("trace --step=-3", "step=-3"), ("trace --rank=-2", "rank=-2"),
    ("trace --rank=2 --world_size=2", "rank=2"), ("trace --world_size=-1", "world_size=-1"),
    ("trace --steps=1", "did you mean step"), ("find", "--doc"), ("find --doc=a --text=b", "--doc"),
    ("trace --workers=2", "which data.py trace does not use"), ("trace runs/other", "one run")])
def test_bad_words_are_refused_in_one_line(found, call, refused, command, said):
    verb, *words = command.split()
    refused(call(data, verb, found.run, *words), said)


@pytest.fixture
def small(tmp_path, tokenizer):
    """(run, config, corpus) of 20 documents that all have the same length, to be damaged."""
    records = [{"id": f"x{i}", "text": "some words " * 20} for i in range(20)]
    corpus = Path(write_jsonl(tmp_path / "a.jsonl", records))
    config = data_config(tmp_path, tokenizer=tokenizer, sources={"a": str(corpus)})
    pretend_run(tmp_path / "run", config, 1)
    return tmp_path / "run", config, corpus


def test_a_run_or_data_that_is_gone_is_refused_in_one_line(small, call, refused):
    """The raw source is not needed; a file of the data, all of it, the run itself are."""
    run, config, corpus = small
    corpus.unlink()
    assert call(data, "trace", run).returncode == 0
    [file] = Path(config.data_dir).glob("*/a-00000.bin")
    file.unlink()
    refused(call(data, "trace", run), file)
    shutil.rmtree(config.data_dir)
    refused(call(data, "trace", run), config.data_dir, f"python data.py {run}")
    (run / "manifest.json").unlink()
    refused(call(data, "trace", run), run, "no run")
    refused(call(data, "find", run, "--doc=x"), run, "no run")


def test_data_that_has_moved_is_found_where_data_dir_says(small, call, refused, tmp_path):
    run, config, _ = small
    words = [["trace", run], ["find", run, "--doc=x1"]]
    before = [call(data, *each).stdout for each in words]
    moved = shutil.move(config.data_dir, tmp_path / "moved")
    for each in words:
        refused(call(data, *each), config.data_dir, "--data_dir=")
    assert [call(data, *each, f"--data_dir={moved}").stdout for each in words] == before
    refused(call(data, *words[0], f"--data_dir={tmp_path}/no"), f"{tmp_path}/no: does not hold")
    assert all(file.is_file() for file in held_out_of(Path(run), moved).values())


def test_data_that_has_changed_is_refused_in_one_line(small, call, refused):
    """A source rewritten in its place, of the same size and age, and the data built again."""
    run, config, corpus = small
    age = corpus.stat().st_mtime_ns
    corpus.write_text(corpus.read_text().replace("words", "sword"))
    os.utime(corpus, ns=(age, age))
    shutil.rmtree(config.data_dir)
    build_data(config)
    refused(call(data, "trace", run), config.data_dir, run)


def test_data_built_again_by_other_code_serves_its_run(small, call, monkeypatch):
    """Its folder has another name then, and the same tokens."""
    run, config, _ = small
    before = call(data, "trace", run).stdout
    shutil.rmtree(config.data_dir)
    monkeypatch.setattr("corpus.stages.building_code", lambda stage: "edited")
    build_data(config)
    assert call(data, "trace", run).stdout == before


@pytest.mark.parametrize("row", ['{"kind": "tra', None])
def test_a_log_that_was_cut_or_not_begun_stops_no_trace(small, call, row):
    """train.py drops such a row when it goes on; a kill may come before the first one."""
    log = small[0] / "metrics.jsonl"
    log.write_text(log.read_text() + row) if row else log.unlink()
    out = call(data, "trace", small[0]).stdout
    assert out.startswith("step 1, epoch 0" + ("\n" if row else " (not seen: the run is at step 0"))
