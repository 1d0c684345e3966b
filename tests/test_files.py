"""Files as they lie on the hubs: packed or plain, lines or a list, at every door; what is cut off,
damaged or too large stops with its place. Tables are in test_tables.py."""

import errno
import gzip
import json
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from importlib.util import find_spec

import pytest
from conftest import (PATIENCE_S, ROOT, data_config, kept_documents, manifest_of, refusal,
                      write_jsonl)

import adapt
import eval as evaluation
from corpus import json_lists, lines
from corpus.dedup import evaluation_texts
from corpus.documents import as_document, parse, read_documents, read_records
from corpus.inputs import input_digests, is_same_text
from corpus.source_files import input_files
from data import build_data
from support.answers import read_prompts
from support.files import file_sha256, replace_file
from support.rows import read_set
from support.suites import read_suites
from support.text import BYTE_ORDER_MARK

needs_zstandard = pytest.mark.skipif(not find_spec("zstandard"), reason="needs zstandard")


def zstd(content):
    import zstandard
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


PACKERS = {".gz": gzip.compress, ".zst": zstd}
# Every form in which a file of JSON may lie; test_tables.py has those of tables.
FORMS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "list.json", "pretty.json",
         "list.json.gz", "list.json.zst", "objects.json", "list.jsonl"]
if not find_spec("zstandard"):
    FORMS = [name for name in FORMS if not name.endswith(".zst")]


def pack(file, content):
    """Write bytes as the file's name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(PACKERS.get(file.suffix, bytes)(content))
    return str(file)


def write_form(file, rows):
    """Write rows in the form of the name: list..., pretty..., objects..., or an object a line."""
    if file.name.startswith("list"):
        content = json.dumps(rows)
    elif file.name.startswith("pretty"):
        content = json.dumps(rows, indent=2)
    elif file.name.startswith("objects"):
        content = "\n\n".join(json.dumps(row, indent="\t") for row in rows)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    return pack(file, content.encode())


def texts_at(path, counts=None, **options):
    """[(provenance, text)] of a source."""
    documents = [as_document(record, "main", Counter())
                 for record in read_records(path, "main", counts, **options)]
    return [(each["metadata"]["provenance"], each["text"]) for each in documents]


# ---- The same documents in every form ------------------------------------------------------------

def test_every_form_gives_the_same_clean_documents_and_tokens(tmp_path, tokenizer):
    """1,000 documents of an id, an address and odd text; byte for byte, provenance aside."""
    dice = random.Random(0)
    words = [*"the quick brown fox".split(), 'q"uote', "back\\slash", "[{", "}]", "wörter", "日本",
             "\r\n", "\u2028", "\ufeff", "\U0001f600", "me@example.com"]
    rows = [{"id": f"n{i}", "text": " ".join(dice.choices(words, k=dice.randint(1, 40))),
             "metadata": {"url": f"u{i % 990}", "list": [{"a": "]"}, None]}, "other": [i]}
            for i in range(1000)]
    found = {}
    for name in FORMS:
        path = write_form(tmp_path / name, rows)
        folder = build_data(data_config(
            tmp_path, sources={"main": {"path": path, "rules": "pii url document"}},
            tokenizer=str(tokenizer), eval_share=0.1))
        documents = kept_documents(folder)
        assert {each["metadata"].pop("provenance").split(":")[0] for each in documents} == {name}
        [shard] = manifest_of(folder)["shards"]
        found[name] = (documents, (folder / shard["file"]).read_bytes())
    assert 700 < len(found["a.jsonl"][0]) < 990
    assert [name for name in FORMS if found[name] != found["a.jsonl"]] == []


def asked(i):
    return [{"role": "user", "content": f"{i}?"}]


def chat(i, answer):
    return [*asked(i), {"role": "assistant", "content": answer}]


def read_chats(path, method="sft"):
    return [row for _, row in read_set(path, adapt.AdaptConfig(method=method), False, 0.1,
                                       Counter())]


def read_suite(path):
    [suite] = read_suites(evaluation.EvalConfig(suite=path), dict)
    for folder in suite.domains.values():
        return [document["text"] for document in read_documents(folder, "main")]
    return suite.tasks[0].questions


DOORS = {  # door: (rows, what reads them)
    "chats": ([{"messages": chat(i, "yes")} for i in range(5)], read_chats),
    "preferences": ([{"chosen": chat(i, "yes"), "rejected": chat(i, "no")} for i in range(5)],
                    lambda path: read_chats(path, "dpo")),
    "prompts": ([{"prompt": f"{i}?"} for i in range(5)],
                lambda path: list(read_prompts(path, Counter()))[1:]),
    "contamination": ([{"text": f"text {i}"} for i in range(5)],
                      lambda path: list(evaluation_texts(path))),
    "held-out text": ([{"text": f"text {i}"} for i in range(5)], read_suite),
    "requests": (None, read_suite)}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_reads_every_form(tmp_path, door, request_file):
    rows, read = DOORS[door]
    rows = rows or [json.loads(line) for line in request_file.open()]
    found = {name: read(write_form(tmp_path / name, rows)) for name in FORMS}
    assert len(found["a.jsonl"]) > 1
    assert [name for name in FORMS if found[name] != found["a.jsonl"]] == []


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["list.json",
                                  pytest.param("a.jsonl.zst", marks=needs_zstandard)])
def test_every_door_stops_where_a_file_is_cut_off_and_gives_no_advice_of_another(
        tmp_path, door, name, request_file):
    """Only sources have the key --allow_truncated."""
    rows, read = DOORS[door]
    file = tmp_path / name
    write_form(file, rows or [json.loads(line) for line in request_file.open()])
    file.write_bytes(file.read_bytes()[:-9])
    message = refusal(read, str(file))
    assert message.startswith(f"{file}: c") and "fetch it again" in message
    assert "allow_truncated" not in message
    config = data_config(tmp_path, sources={"main": str(file)})
    assert "--allow_truncated=true" in refusal(build_data, config)


# ---- zstd and gzip -------------------------------------------------------------------------------

DICE = random.Random(0)
LINES = [json.dumps({"text": DICE.randbytes(200).hex()}) + "\n" for i in range(1200)]
CONTENT = "".join(LINES).encode()


@needs_zstandard
@pytest.mark.parametrize("cut", [0, 1, 3000])
def test_frames_one_after_another_are_one_file(tmp_path, cut):
    """Of pzstd and of cat; with empty ones, and with those that hold no text, in any place."""
    skipped = b"\x5a\x2a\x4d\x18" + (2000).to_bytes(4, "little") + b"{" * 2000
    parts = [b"", CONTENT[:cut], b"", CONTENT[cut:]]
    frames = b"".join(skipped + PACKERS[".zst"](part) for part in parts)
    (tmp_path / "a.jsonl.zst").write_bytes(frames + skipped)
    found = texts_at(tmp_path / "a.jsonl.zst")
    assert found == [(f"a.jsonl.zst:{i}", json.loads(line)["text"])
                     for i, line in enumerate(LINES, 1)]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "list.json", "list.json.gz", "objects.json",
                                  pytest.param("a.jsonl.zst", marks=needs_zstandard),
                                  pytest.param("list.json.zst", marks=needs_zstandard)])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_file_that_is_cut_off_stops_or_is_read_as_far_as_it_goes(tmp_path, capsys, name, share):
    file = tmp_path / name
    write_form(file, [json.loads(line) for line in LINES])
    content = file.read_bytes()
    file.write_bytes(content[:int(share * len(content)) - 99])
    assert refusal(texts_at, file).startswith(f"{file}: c")
    counts = Counter()
    found = texts_at(file, counts, allow_truncated=True)
    assert [text for _, text in found] == [json.loads(line)["text"] for line in LINES[:len(found)]]
    # packed text is lost by blocks: those of zstd have 128 KiB
    assert len(LINES) * share - 320 < len(found) < len(LINES) * (share + 0.1)
    assert counts == {"files cut off": 1} and str(file) in capsys.readouterr().err


@needs_zstandard
def test_zst_that_ends_anywhere_in_a_frame_is_cut_off_and_between_frames_it_is_not(tmp_path):
    """zstandard's stream_reader takes every one of them for complete."""
    file = tmp_path / "a.jsonl.zst"
    frame = PACKERS[".zst"](b'{"text": "x"}\n')
    for end in range(4, 2 * len(frame)):
        file.write_bytes((2 * frame)[:end])
        if end == len(frame):
            assert len(texts_at(file)) == 1
        else:
            assert refusal(texts_at, file).startswith(f"{file}: corrupt or cut off after line ")


@needs_zstandard
@pytest.mark.parametrize("position", [5, 9, 2000, -3, None])
def test_damaged_zst_is_never_other_text(tmp_path, position):
    """Also where other bytes come after the frame."""
    content = bytearray(PACKERS[".zst"](CONTENT))
    if position is None:
        content += b"text"
    else:
        content[position] ^= 255
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    message = refusal(texts_at, tmp_path / "a.jsonl.zst")
    assert message.startswith(f"{tmp_path}/a.jsonl.zst: ")


@needs_zstandard
def test_a_window_above_zstds_default_limit_is_read(tmp_path):
    """As of Reddit's dumps, zstd --long=31. The header: 256 MiB, no size; one block as it is."""
    text = b'{"text": "x"}\n'
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([18 << 3]) + block)
    assert texts_at(tmp_path / "a.jsonl.zst") == [("a.jsonl.zst:1", "x")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "list.json.gz", "a.txt.gz",
                                  *(pytest.param(f"{each}.zst", marks=needs_zstandard) for each in
                                    ("a.jsonl", "list.json", "a.txt"))])
def test_a_bomb_stops_at_its_place_without_its_memory(tmp_path, monkeypatch, name):
    """A document of 32 MiB where 1 is allowed, or of 256 in zstd, which gives 16 at a time."""
    monkeypatch.setattr(lines, "MOST_BYTES", 2**20)
    monkeypatch.setattr(json_lists, "MOST_BYTES", 2**20)
    size, most = (2**28, 2**27) if name.endswith(".zst") else (2**25, 2**23)
    begin = {"a.jsonl": b'{"text": "fine"}\n{"text": "', "list.json": b'[{"text": "fine"},\n"'}
    content = begin.get(name.rpartition(".")[0], b"") + b"x" * size
    pack(tmp_path / name, content)
    del content
    tracemalloc.start()
    message = refusal(texts_at, tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = 1 if name.startswith("a.txt") else 2
    assert message.startswith(f"{tmp_path / name}:{line}: ") and "1,048,576 bytes" in message
    assert peak < most


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.zst", b'{"text": "x"}\n', ["plain text", "rename it to a.jsonl"]),
    ("a.json.zst", b'\xef\xbb\xbf [{"text": "x"}]', ["plain text", "rename it to a.json"]),
    ("a.jsonl.zst", gzip.compress(b"{}"), ["gzip", "rename it to a.jsonl.gz"]),
    ("a.jsonl", b"\x28\xb5\x2f\xfd\0", ["zstd", "rename it to a.jsonl.zst"]),
    ("a.txt.zst", b"words", ["plain text", "rename it to a.txt"]),
    ("a.txt.zst", b"<html>", ["not zstd", "again"]), ("a.jsonl.zst", b"", ["0 bytes", "again"]),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}")), ["gzip", "convert"]),
    ("a.json", b"PK\x03\x04", ["a zip archive"])])
def test_what_lies_under_the_name_of_another_packer_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    message = refusal(texts_at, tmp_path)
    assert message.startswith(f"{tmp_path / name}: ") and all(word in message for word in words)


def test_zstandard_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\0")
    message = refusal(texts_at, tmp_path)
    assert message == (f"{tmp_path / 'a.jsonl.zst'}: needs the package zstandard: "
                       "pip install -U zstandard")


@pytest.mark.parametrize("name", ["a.txt.gz", pytest.param("a.txt.zst", marks=needs_zstandard)])
def test_a_packed_text_is_cut_at_its_separator(tmp_path, monkeypatch, name):
    monkeypatch.setattr(lines, "HEAD_BYTES", 10)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 10)
    parts = [f"{DICE.randbytes(90).hex()}\n" for _ in range(300)]
    pack(tmp_path / name, BYTE_ORDER_MARK + "<|end|>".join(parts).encode())
    found = texts_at(tmp_path / name, separator="<|end|>")
    assert found == [(f"{name}:{i}", part) for i, part in enumerate(parts, 1)]


# ---- Lists and objects over several lines --------------------------------------------------------

@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize("content, places", [
    ('[{"text": "a"}, {"text": "b"},{"text": "c"}]', "1 1.2 1.3"),
    ('\n [\n{"text": "a"},\n{"text": "b"}\n,{"text": "c"} \n]\n\n', "3 4 5"),
    ('\ufeff[{\r\n"text"\r\n:"a"}\r\n,{"text": "b"}\r\n]\r\n', "1 4"),
    ('{"text": "a"}\n\n{"text": "b"}', "1 3"), ('\ufeff{"text": "a"}\r\n{"text": "b"}\r\n', "1 2"),
    ('{\n"text": "a"\n}\n{\n"text": "b"}{"text": "c"}', "1 4 5"), ('{"text": "a"}', "1"),
    ('{"n": [{\n}],\n"text": "a"}', "1"), ("[]", ""), ("[\n]", ""), ("", ""), (" \n", "")])
def test_json_is_read_as_its_first_character_says(tmp_path, name, content, places):
    pack(tmp_path / name, content.encode())
    assert texts_at(tmp_path / name) == [
        (f"{name}:{place}", text) for place, text in zip(places.split(), "abc", strict=False)]


def test_values_are_cut_as_json_reads_them(tmp_path, monkeypatch):
    """Random values with brackets, quotes and escapes in their strings, read a few bytes at a time;
    the oracle is json.loads of the whole file."""
    dice = random.Random(0)
    def value(depth):
        kind = dice.randrange(3 if depth < 4 else 1)
        if kind == 0:
            return dice.choice([1, -2.5e9, None, True, "", "".join(
                dice.choices('a"\\[]{},: \n\u00e9\u2028\U0001f600', k=dice.randint(0, 9)))])
        if kind == 1:
            return [value(depth + 1) for _ in range(dice.randint(0, 3))]
        return {f"{i}{dice.choice(QUOTES)}": value(depth + 1) for i in range(dice.randint(0, 3))}
    monkeypatch.setattr(lines, "HEAD_BYTES", 30)
    for chunk in (1, 2, 3, 7, 50, 2**20):
        monkeypatch.setattr(lines, "CHUNK_BYTES", chunk)
        values = [value(0) for _ in range(200)]
        indent = dice.choice([None, 0, 1, "\t"])
        content = json.dumps(values, indent=indent, ensure_ascii=dice.random() < 0.5)
        pack(tmp_path / "a.json", content.encode())
        assert [parse(each) for each in read_records(tmp_path / "a.json")] == values
        objects = [{"a": each} for each in values]
        content = "".join(json.dumps(each, indent=1) + dice.choice(["", "\n"]) for each in objects)
        pack(tmp_path / "a.json", content.encode())
        assert [parse(each) for each in read_records(tmp_path / "a.json")] == objects


QUOTES = ['"', "\\", "]", "}", ""]


@pytest.mark.parametrize("content, place, word", [
    ('[{"text": "a"},\n{"text": "b"}', ": cut off on line 2", "again"),
    ('[{"text": "a"},\n', ": cut off on line 2", "again"), ("[", ": cut off", "again"),
    ('[{"text": "a"},\n{"text": "b', ": cut off in the value that begins on line 2", "again"),
    ('[{"text": "a"},\n\n{"text": ["b"', ": cut off in the value that begins on line 3", "again"),
    ('{\n"text": "a"\n}\n{\n"text": ', ": cut off in the value that begins on line 4", "again"),
    ('[{"text": "a"},\n]', ":2: ", "comma before the end"),
    ('[{"text": "a"}\n{"text": "b"}]', ":2: ", "no comma"),
    ('[{"text": "a"}]\n[{"text": "b"}]{', ":1: ", "holds a list"),
    ('[\n{"text": "a"}]\n[{"text": "b"}]', ":3: ", "more after the end"),
    ('[{"text": "a"}] x', ":1: ", "more after the end"),
    ('[{"text": "a"}, {"text": "b"} {"text": "c"}]', ":1.2: ", "no comma"),
    ('[{"text": "a"}, {"text": "b"]]', ":1.2: ", "] closes"),
    ('[{"text": "a"}, {"text": "b"\n}, {\n"text": \n["c"}]', ":4: ", "} closes"),
    ('[{"text": "a"},\n{"text": ["b"}]}]', ":2: ", "} closes"),
    ("[" * 10**6, ":1: ", "200 levels"), ('[{"text": "a"},\n, {}]', ":2: ", "not JSON"),
    ('[\n{"text": "a",\n"x": tru}]', ":3: ", "character 6"), ("[\n1, 2]", ":2: ", "a number"),
    ('[{"text": "a"}, {"text": null}]', ":1.2: ", "text is null"),
    ('[{"text": "a"}, {"text": 5}]', ":1.2: ", "text is a number"),
    ('[{"text": "a"}, ["x"]]', ":1.2: ", "a list"), ("nothing", ":1: ", "not JSON"),
    ('{"version": 1, "data": [{"x": 1}]}', ":1: ", "jq -c '.data[]'"),
    ('[{"text": "a", "text": "b"}]', ":1: ", "there twice"), ('[\n"x\ny"]', ":2: ", "control")])
def test_a_fault_in_json_is_named_with_its_line(tmp_path, content, place, word):
    file = tmp_path / "a.json"
    file.write_text(content)
    message = refusal(texts_at, file)
    assert message.startswith(f"{file}{place}") and word in message, message


def test_a_faulty_value_of_a_list_is_left_out_and_counted_like_a_line(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('[{"text": "words"},\n{"text": nul},\n{"txt": "x"}, {}, {"text": "words"}]')
    folder = build_data(data_config(tmp_path, sources={"main": str(file)}, tokenizer="bpe:284"))
    counts = manifest_of(folder)["sources"]["main"]
    assert counts["bad lines"] == 3
    assert counts["bad_reasons"] == {"not JSON": 1, "no key text": 2}
    err = capsys.readouterr().err
    assert f"{file}:2: not JSON" in err and f"{file}:3: no key text" in err


# ---- .json in folders ----------------------------------------------------------------------------

ROWS = '[{"text": "a"}, {"text": "b"}]'
ONE_OBJECT = "files not read: .json of at most one object (first {}); to read one, name it".format
BESIDE = "files not read: .json beside text or code (first {}); to read one, name it".format
CARD = "files not read: README, license or changelog beside data (first {})".format


@pytest.mark.parametrize("files, texts, counts", [
    ({"a.json": ROWS}, "ab", {}), ({"a.json": ROWS, "b.jsonl": '{"text": "c"}\n'}, "abc", {}),
    ({"a.json": '{"text": "a"}\n{"text": "b"}'}, "ab", {}),
    ({"a.json": ROWS, "b.json": '{\n"text": "c"}\n{"text": "d"}'}, "abcd", {}),
    ({"a.json": "\ufeff" + ROWS, "README.md": "r"}, "ab", {CARD("README.md"): 1}),
    ({"a.jsonl": '{"text": "a"}', "LICENSE.txt": "l"}, "a", {CARD("LICENSE.txt"): 1}),
    ({"a.json": '{"x": 1}', "README.md": "r"}, "r", {ONE_OBJECT("a.json"): 1}),
    ({"a.jsonl": '{"text": "a"}', "README.md": "r", "x.py": "p"}, "rap", {}),
    ({"a.json": ROWS, "dataset_info.json": '{\n "x": 1}\n', "tokenizer.json": '{"x": [{}]}',
      "b.json": "[1, 2]", "c.json": "// no JSON {", "d.json": "[]",
      "e.json": '{ // "x\n "y": 1}', "f.json": '{\n // "x\n "y": 1}'}, "ab",
     {ONE_OBJECT("b.json"): 6, "files not read: .json of one object (first tokenizer.json); if x "
      "holds the rows: jq -c '.x[]' OLD > NEW.jsonl": 1}),
    ({"a.json": ROWS, "b.json": '{"messages": [{}]}'}, "ab", {ONE_OBJECT("b.json"): 1}),
    ({"a.json": ROWS, "b.json": ""}, "ab", {"files not read: empty (first b.json)": 1}),
    ({"package.json": ROWS, "deep/x.py": "p", "deep/y.json": "[{"}, "p",
     {BESIDE("deep/y.json"): 2}),
    ({"package.json": ROWS, "y.json.gz": '{"text": "c"}', "x.txt": "t"}, "tc",
     {BESIDE("package.json"): 1})])
def test_a_json_file_of_a_folder_is_read_if_it_is_data(tmp_path, files, texts, counts):
    """A file of one object configures something; beside code, so may a list."""
    for name, content in files.items():
        pack(tmp_path / "in" / name, content.encode())
    found = Counter()
    assert "".join(text for _, text in texts_at(tmp_path / "in", found)) == texts
    assert +found == counts


@pytest.mark.parametrize("content, word", [
    (("[" + ROWS).encode("utf-16"), "UTF-16"), (b'[{"text": "a"}', "cut off"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b'{"text": "cut off\n{"text": "b"}\n', "1: not JSON"),
    (gzip.compress(b"[]"), "rename")])
def test_a_damaged_json_file_of_a_folder_is_an_error_and_not_left_out(tmp_path, content, word):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    (tmp_path / "b.json").write_bytes(content)
    message = refusal(texts_at, tmp_path)
    assert message.startswith(f"{tmp_path / 'b.json'}:") and word in message


def test_a_list_in_the_one_object_of_a_file_is_told_at_once(tmp_path):
    pack(tmp_path / "in" / "a.json", b'{"version": "2", "data": [{"text": "a"}]}')
    assert "if data holds the rows: jq -c '.data[]' OLD > NEW.jsonl" in refusal(
        texts_at, tmp_path / "in")


def test_one_object_that_is_too_long_for_a_configuration_is_read(tmp_path, monkeypatch):
    """It may be a first line of several, and is not held to find out."""
    pack(tmp_path / "a.json", b'{"text": "%s"}' % (b"x" * 5000))
    assert "at most one object" in refusal(texts_at, tmp_path)
    monkeypatch.setattr(lines, "HEAD_BYTES", 100)
    monkeypatch.setattr(lines, "CHUNK_BYTES", 100)
    monkeypatch.setattr(json_lists, "MOST_OF_SETTINGS", 1000)
    assert len(texts_at(tmp_path)) == 1


def test_old_data_is_of_the_same_text_though_more_files_of_its_folder_are_read_now(tmp_path):
    """Its run goes on; a file that is gone or has changed is another text."""
    home = tmp_path / "in"
    write_jsonl(home / "b.jsonl", [{"text": "x"}])
    known = [list(entry) for entry in input_digests(home, tmp_path)]
    (home / "README.md").write_text("a card")  # was read beside b.jsonl
    known.insert(0, ["README.md", file_sha256(home / "README.md")])
    for name in ("a.json", "c.json", "d.json"):
        pack(home / name, ROWS.encode())
    assert is_same_text(home, known, tmp_path)
    all_known = [list(entry) for entry in input_digests(home, tmp_path)]
    assert len(all_known) == 4 and is_same_text(home, all_known, tmp_path)
    (home / "d.json").unlink()
    assert not is_same_text(home, all_known, tmp_path) and is_same_text(home, known, tmp_path)
    for name in ("train.parquet", "test.parquet"):  # new data would not be built of these
        pack(home / name, b"PAR1")
    assert is_same_text(home, known, tmp_path)
    (home / "test.parquet").unlink()
    write_jsonl(home / "b.jsonl", [{"text": "y"}])
    assert not is_same_text(home, known, tmp_path)


def test_one_object_is_a_document_if_it_is_named(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{\n "text": "a",\n "metadata": {"x": [1]}\n}\n')
    assert texts_at(file) == [("a.json:1", "a")]
    assert "at most one object" in refusal(input_files, tmp_path, Counter())


# ---- The key of the text -------------------------------------------------------------------------

@pytest.mark.parametrize("row, text_key, word", [
    ({"content": "x", "url": "u"}, "text", "did you mean content? "),
    ({"url": "u", "body": "x"}, "content", "did you mean body? "),
    ({"contents": "x", "text": "y"}, "content", "did you mean contents? "),
    ({"Text": "x"}, "text", "did you mean Text? "), ({"texte": 5, "n": "x"}, "text", "KEY"),
    ({"text": "x"}, "raw", "did you mean text? "), ({"body": None, "text": 1}, "body", "is null")])
def test_a_missing_key_of_the_text_is_guessed(tmp_path, row, text_key, word):
    file = write_jsonl(tmp_path / "a.jsonl", [row] * 3)
    source = {"path": file, "text": text_key}
    message = refusal(build_data, data_config(tmp_path, sources={"main": source}))
    assert f"{file}:1: " in message and word in message
    found = word.removeprefix("did you mean ").rstrip("? ")
    if found != word:
        source["text"] = found
        build_data(data_config(tmp_path, sources={"main": source}, tokenizer="bpe:284"))


def test_no_key_can_be_named_where_there_is_no_source(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"content": "x", "request": None}])
    for read in (lambda path: list(evaluation_texts(path)), lambda path: list(
            read_documents(path, "main"))):
        assert "sources" not in refusal(read, file)
    file = write_jsonl(tmp_path / "a.jsonl", [{"content": "x"}])
    message = refusal(lambda path: list(read_documents(path, "main")), file)
    assert "did you mean content? rename it to text" in message and "sources" not in message


# ---- Byte-order marks and line ends --------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "list.json", "a.txt", "a.txt.gz",
                                  *(pytest.param(f"{each}.zst", marks=needs_zstandard) for each in
                                    ("a.jsonl", "list.json", "a.txt"))])
def test_a_mark_is_no_text_and_line_ends_of_a_text_are_kept(tmp_path, name):
    """Those of a file of JSON are no text; those in its strings are kept, as in Dolma."""
    text = "one\r\ntwo\rthree\n\ufeff"
    content = {"a.txt": text, "a.jsonl": f"{json.dumps({'text': text})}\r\n\r\n" * 2,
               "list.json": json.dumps([{"text": text}] * 2, indent=1).replace("\n", "\r\n")}
    form = name.removesuffix(".gz").removesuffix(".zst")
    pack(tmp_path / name, BYTE_ORDER_MARK + content[form].encode())
    counts = Counter()
    found = [each["text"] for each in read_documents(tmp_path / name, "main", counts)]
    assert found == [text] * (1 if form == "a.txt" else 2)
    assert any("CR LF" in what for what in +counts) == (form == "a.txt")


# ---- Memory --------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["list.json", pytest.param("a.jsonl.zst", marks=needs_zstandard),
                                  pytest.param("list.json.zst", marks=needs_zstandard)])
def test_a_file_of_400_mb_is_streamed(tmp_path, name):
    """Read by a process of its own, whose peak does not depend on the size."""
    file = tmp_path / name
    text = random.Random(0).randbytes(1000).hex()
    rows = "".join(f'{json.dumps({"id": str(i), "text": f"{i} {text}"})},\n' for i in range(9999))
    is_list = name.startswith("list")
    with open(file, "wb") as out:
        writer = out
        if name.endswith(".zst"):
            import zstandard
            writer = zstandard.ZstdCompressor().stream_writer(out)
        writer.write(b"[" * is_list)
        for _ in range(20):
            writer.write((rows if is_list else rows.replace("},\n", "}\n")).encode())
        writer.write(b"{}]" * is_list)
        if writer is not out:
            writer.close()
    # ru_maxrss would begin with the memory of the process that started this one
    code = ("import re, sys\nfrom corpus.documents import read_records, parse\n"
            "print(sum(len(str(parse(each))) for each in read_records(sys.argv[1])) // 10**6,"
            " int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)")
    result = subprocess.run([sys.executable, "-c", code, str(file)], cwd=ROOT, text=True,
                            capture_output=True, timeout=PATIENCE_S)
    size, peak = map(int, result.stdout.split())
    assert size > 390 and peak < 150, result.stderr


def test_a_file_on_a_full_disk_is_named_and_its_old_content_stays(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    replace_file(file, b"old")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("support.files.fsync", full)
    with pytest.raises(OSError, match="No space.*config.json"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
