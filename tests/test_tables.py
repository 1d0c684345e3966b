"""Tables: Parquet, Arrow files and folders of datasets.save_to_disk, read at every door like JSON.

The same rows as JSON lines are the oracle. What is written here is what pyarrow, pandas and
datasets write; a table with a fault is refused with its file, its row or column, and the remedy.
"""

import decimal
import gzip
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import POINTER, ROOT, data_config, kept_documents, refusal, say, write_jsonl
from tqdm import tqdm

import adapt
import data
from corpus import tables
from corpus.documents import as_document, read_documents, read_records
from corpus.inputs import input_digests
from corpus.source_files import input_files, is_there, name_in
from data import build_data
from support.answers import generate_answers, read_prompts
from support.files import to_json
from support.rows import read_set
from support.suites import suite_at

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
TEXTS = [f"Document {i} tells of the {word}, in words that are all its own: {'ä' * (i % 7)}{i * i}."
         for i in range(250) for word in ("sea", "hill", "wood", "town")]
ROWS = [{"id": f"d{i}", "text": text, "metadata": {"url": f"https://x.org/{i}", "n": i}}
        for i, text in enumerate(TEXTS)]


def table_of(rows, **columns):
    """A table of rows, with the types of some columns."""
    table = pa.Table.from_pylist(rows)
    for name, kind in columns.items():
        column = table[name].cast(kind)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def write_parquet(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else table_of(rows)
    parquet.write_table(table, path, **options)
    return path


def write_stream(path, rows, batch=100):
    """An Arrow file as `datasets` writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else table_of(rows)
    with pa.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, batch)
    return path


def save_to_disk(folder, rows, shards=2, **state):
    """A folder as Dataset.save_to_disk of datasets 5.2 writes it, compared once with its own."""
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    per_shard = -(-len(rows) // shards)
    for i, name in enumerate(names):
        write_stream(folder / name, rows[i * per_shard:(i + 1) * per_shard])
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "78c9b91b01b6",
             "_format_columns": None, "_format_kwargs": {}, "_format_type": None,
             "_output_all_columns": False, "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text('{\n  "citation": "",\n  "features": {}\n}')
    return folder


def rows_in(path):
    """[(row number, row)] of a table."""
    return list(tables.read_table(Path(path), None, tqdm(disable=True)))


def build(folder, path, **changes):
    source = {"path": str(path), **changes.pop("source", {})}
    return build_data(data_config(folder, sources={"main": source}, tokenizer="bpe:300", **changes))


# ---- The same rows in every form ----------------------------------------------------------------

def write_in_every_form(folder):
    """{form: path} of ROWS."""
    lines = write_jsonl(folder / "lines.jsonl", ROWS)
    (folder / "list.json").write_text(json.dumps(ROWS))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(Path(lines).read_bytes()))
    table = table_of(ROWS)
    half = len(ROWS) // 2
    write_stream(folder / "one.arrow", ROWS)
    with pa.ipc.new_file(folder / "new.feather", table.schema,
                         options=pa.ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(table, 300)
    forms = {"lines": lines, "list": folder / "list.json", "packed": folder / "packed.jsonl.gz",
             "parquet": write_parquet(folder / "two.parquet", ROWS, row_group_size=half),
             "arrow": folder / "one.arrow", "feather": folder / "new.feather",
             "saved": save_to_disk(folder / "saved", ROWS)}
    wide = table.append_column("embedding", pa.array([[.5, 1.] for _ in ROWS]))
    wide = wide.append_column("text2", pa.array([b"\xff"] * len(ROWS)))
    forms["other columns"] = write_parquet(folder / "wide.parquet", wide)
    other = table_of(ROWS, text=pa.large_string(), id=pa.dictionary(pa.int32(), pa.string()))
    forms["other types"] = write_parquet(folder / "types.parquet", other)
    view = table.set_column(1, "text", pa.array(TEXTS, pa.string_view()))
    forms["views"] = write_stream(folder / "views.arrow", view)
    return forms


def without_provenance(documents):
    for document in documents:
        document["metadata"].pop("provenance")
    return documents


def test_the_same_rows_in_every_form_are_the_same_documents(tmp_path):
    forms = write_in_every_form(tmp_path)
    documents = {form: without_provenance(list(read_documents(path, "main")))
                 for form, path in forms.items()}
    assert [document["text"] for document in documents["lines"]] == TEXTS
    for form in forms:
        assert documents[form] == documents["lines"], form


def test_the_same_rows_in_every_form_are_the_same_tokens(tmp_path):
    """Clean documents, tokens and tokenizer byte for byte, with 1, 2 and 4 workers."""
    forms = write_in_every_form(tmp_path / "in")
    found = []
    for form, workers in (("lines", 1), ("parquet", 1), ("parquet", 4), ("saved", 2), ("views", 1)):
        folder = build(tmp_path / f"{form}{workers}", forms[form], workers=workers)
        tokens = [file.read_bytes() for file in sorted(folder.rglob("*.bin"))]
        found.append((without_provenance(kept_documents(folder)), tokens,
                      (folder / "tokenizer.json").read_bytes()))
    assert len(found[0][0]) == len(TEXTS) and sum(map(len, found[0][1])) > 10 * len(TEXTS)
    assert all(each == found[0] for each in found)


# ---- Values --------------------------------------------------------------------------------------

ZONE = pa.timestamp("ns", "Nowhere/Land")
CALLS = pa.struct([("role", pa.string()), ("content", pa.large_string()), ("calls", pa.null())])

# (values, their type, what is read of them)
VALUES = [
    (["a", None], pa.large_string(), ["a", None]), (["a"], pa.string_view(), ["a"]),
    (["a", "b", "a"], pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"]),
    ([2**64 - 1], pa.uint64(), [2**64 - 1]), ([True], pa.bool_(), [True]),
    ([1.5, float("nan"), None], pa.float64(), [1.5, None, None]), ([.5], pa.float32(), [.5]),
    ([decimal.Decimal("1.50"), decimal.Decimal(3)], pa.decimal128(5, 2), [1.5, 3]),
    ([1, None], pa.timestamp("ns"), ["1970-01-01 00:00:00.000000001", None]),
    ([[1]], pa.list_(ZONE), [["1970-01-01 00:00:00.000000001Z"]]),
    ([1], pa.date32(), ["1970-01-02"]), ([5], pa.duration("s"), ["5"]),
    ([b"\xff"], pa.binary(), [b"\xff"]), ([None], pa.null(), [None]),
    ([[("a", 1.5), ("b", None)], None], pa.map_(pa.string(), pa.float64()), [{"a": 1.5}, None]),
    ([{"a": None, "b": {"c": 1}}, None], pa.struct([("a", pa.string()),
                                                   ("b", pa.struct([("c", pa.int8())]))]),
     [{"b": {"c": 1}}, None]),
    ([[{"role": "user", "content": "x"}], None, []], pa.list_(CALLS),
     [[{"role": "user", "content": "x"}], None, []]),
    ([["a", None], None, ["b"]], pa.large_list(pa.string()), [["a", None], None, ["b"]]),
    ([[1, 2], None], pa.list_(pa.int32(), 2), [[1, 2], None])]


@pytest.mark.parametrize("values, kind, expected", VALUES, ids=[str(kind) for _, kind, _ in VALUES])
def test_values_are_those_of_json(tmp_path, values, kind, expected):
    """Nulls in objects are absent fields; a slice of a batch begins where it should."""
    many = values * 200  # over MOST_ROWS
    file = write_stream(tmp_path / "x.arrow", pa.table({"x": pa.array(many, kind)}), 10**6)
    assert [row["x"] for _, row in rows_in(file)] == expected * 200
    assert [number for number, _ in rows_in(file)] == list(range(1, len(many) + 1))
    if kind != pa.string_view():
        write_parquet(tmp_path / "x.parquet", pa.table({"x": pa.array(many, kind)}))
        assert [row["x"] for _, row in rows_in(tmp_path / "x.parquet")] == expected * 200


def test_a_document_takes_of_a_row_what_dolma_has(tmp_path):
    """A null is none, and other columns are not even read."""
    kind = pa.struct([("url", pa.string())])
    file = write_parquet(tmp_path / "x.parquet", pa.table({
        "content": ["one", "two"], "id": ["a", None],
        "metadata": pa.array([{"url": "u"}, None], kind),
        "created": pa.array([0, None], pa.timestamp("s", "UTC")), "text": [b"\xff", None],
        "image": pa.array([b"x" * 1000] * 2)}))
    counts = Counter()
    [first, second] = [as_document(record, "s", counts, "content")
                       for record in read_records(file, "s", counts, text_key="content")]
    assert first == {"id": "a", "text": "one", "source": "s", "created": "1970-01-01 00:00:00.000Z",
                     "metadata": {"url": "u", "provenance": "x.parquet:1"}}
    assert second == {"id": "x.parquet:2", "text": "two", "source": "s",
                      "metadata": {"provenance": "x.parquet:2"}}
    [record, _] = read_records(file, "s", counts, text_key="content")
    assert record.content.keys() == {"content", "id", "metadata", "created"}
    assert not +counts
    write_parquet(file, pa.table({"text": ["one"]}).slice(0, 0))
    assert not list(read_documents(file, "s", counts)) and counts["tables without rows"] == 1


def test_nulls_and_metadata_that_is_no_object_mean_the_same_in_json(tmp_path):
    rows = [{"text": "a", "id": None, "metadata": '{"url": "u"}', "added": None, "created": "2024"},
            {"text": "b", "id": "i", "metadata": None, "added": "2023", "created": None}]
    write_parquet(tmp_path / "x.parquet", rows)
    write_jsonl(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1))
    found = []
    for name in ("x.parquet", "x.jsonl", "x.json"):
        counts = Counter()
        documents = list(read_documents(tmp_path / name, "s", counts))
        assert list((+counts).values()) == [1]
        assert documents[0]["metadata"].keys() == documents[1]["metadata"].keys() == {"provenance"}
        assert documents[0].pop("id") == documents[0]["metadata"]["provenance"]
        found.append(without_provenance(documents))
    assert found[0] == found[1] == found[2] and found[0][0]["created"] == "2024"


# ---- Chats, preferences, prompts, evaluation -----------------------------------------------------

CHATS = [{"id": 1, "messages": say("u: q", "a: a"), "source": "s"},
         {"id": 2, "messages": say("s: be", "u: q", "a: a", "u: r", "a: b"), "source": None}]
PAIRS = [{"prompt": "q", "chosen": say("u: q", "a: a"), "rejected": say("u: q", "a: b"),
          "score_chosen": float("nan"), "score_rejected": 3.0},
         {"prompt": "q", "chosen": say("u: q", "a: c"), "rejected": say("u: q", "a: b"),
          "score_chosen": 7.5, "score_rejected": 3.0}]


@pytest.mark.parametrize("method, rows", [("sft", CHATS), ("dpo", PAIRS)])
def test_chats_and_pairs_are_those_of_the_same_rows_in_json(tmp_path, method, rows):
    config = adapt.AdaptConfig(method=method)
    lines = write_jsonl(tmp_path / "x.jsonl", rows)
    found = {}
    if method == "dpo":  # as pandas and datasets write NaN in JSON
        Path(lines).write_text(Path(lines).read_text().replace("NaN", "null"))
    table = pa.Table.from_pylist(rows)
    # what pyarrow makes of a list in which one message of many has a tool's call
    kind = pa.struct([("tool_calls", pa.null()), ("role", pa.string()), ("content", pa.string()),
                      ("weight", pa.float64())])
    for name in ("messages", "chosen", "rejected"):
        if name in table.schema.names:
            column = pa.array(table[name].to_pylist(), pa.list_(kind))
            table = table.set_column(table.schema.get_field_index(name), name, column)
    for path in (lines, write_parquet(tmp_path / "x.parquet", table),
                 write_stream(tmp_path / "x.arrow", table)):
        found[path] = read_set(path, config, False, 0, Counter())
    (_, expected), *others = found.items()
    for path, rows in others:
        assert [row for _, row in rows] == [row for _, row in expected]
        assert [place for place, _ in rows] == [f"{path}:1", f"{path}:2"]


def test_a_faulty_row_of_a_table_is_named(tmp_path):
    chats = [*CHATS, {"id": 3, "messages": say("u: q"), "source": "s"}]
    file = write_parquet(tmp_path / "x.parquet", chats)
    config = adapt.AdaptConfig(method="sft")
    message = refusal(read_set, file, config, False, 0, Counter())
    assert message.startswith(f"{file}:3: messages[0].role") and "mend 1 of 3 rows" in message


def test_prompts_of_a_table_are_read_and_their_rows_can_be_written(tmp_path):
    """`generate` writes each row with its answer; bytes, which JSON has not, in base64."""
    table = pa.table({"prompt": ["q", "r"], "input": [None, None], "raw": [b"\xff", None]})
    file = write_parquet(tmp_path / "x.parquet", table)
    places, rows, requests = read_prompts(str(file), Counter())
    assert places == (f"{file}:1", f"{file}:2") and requests == (say("u: q"), say("u: r"))
    assert "no_run" in refusal(generate_answers, ["no_run", str(file), str(tmp_path / "x.jsonl")])
    assert json.loads(to_json(rows[0])) == {"prompt": "q", "input": None, "raw": "/w=="}


def test_evaluation_reads_tables_of_documents_and_of_requests(tmp_path, request_file):
    from eval import EvalConfig
    file = write_parquet(tmp_path / "x.parquet", ROWS[:3])
    assert suite_at(str(file), EvalConfig()).domains == {"x.parquet": file}
    rows = list(map(json.loads, request_file.read_text().splitlines()))
    for row in rows:
        del row["doc"]  # an empty object, which Parquet has not
    write_parquet(tmp_path / "y.parquet", rows)
    [task] = suite_at(str(tmp_path / "y.parquet"), EvalConfig()).tasks
    [expected] = suite_at(str(request_file), EvalConfig()).tasks
    assert task.questions == expected.questions


# ---- Folders -------------------------------------------------------------------------------------

def names_of(folder, counts=None):
    return [name_in(folder, file) for file in input_files(folder, Counter() if counts is None
                                                          else counts)]


def test_a_folder_of_a_hub_is_read_without_its_card_and_caches(tmp_path):
    save_to_disk(tmp_path, ROWS[:9], 3)
    write_stream(tmp_path / "cache-3f2a.arrow", ROWS[:2])
    write_stream(tmp_path / "old.arrow", ROWS[:2])
    (tmp_path / "README.md").write_text("# A card")
    counts = Counter()
    assert names_of(tmp_path, counts) == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    assert counts == {
        "files not read: written by datasets to describe its tables (first state.json)": 2,
        "files not read: README, license or changelog beside data (first README.md)": 1,
        "files not read: not in the list of a state.json (first cache-3f2a.arrow)": 2}
    assert [document["text"] for document in read_documents(tmp_path, "s", counts)] == TEXTS[:9]
    (tmp_path / "data-00001-of-00003.arrow").unlink()
    assert "data-00001-of-00003.arrow: is not there" in refusal(names_of, tmp_path)


def test_a_cache_of_datasets_is_read_without_what_map_left_there(tmp_path):
    for name in ("my_set-train.arrow", "cache-3f2a.arrow"):
        write_stream(tmp_path / "0.0.0" / name, ROWS[:2])
    (tmp_path / "0.0.0" / "dataset_info.json").write_text("{}")
    counts = Counter()
    assert names_of(tmp_path, counts) == ["0.0.0/my_set-train.arrow"]
    assert counts == {
        "files not read: written by datasets to describe its tables (first "
        "0.0.0/dataset_info.json)": 1,
        "files not read: caches of datasets (first 0.0.0/cache-3f2a.arrow)": 1}


@pytest.mark.parametrize("state, words", [
    ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "flatten_indices"),
    ({"_indices_data_files": None}, ""), ({"_data_files": [1]}, ""), ({"_data_files": "x"}, ""),
    ({"_data_files": [{}]}, "None: is not there"),
    ({"_data_files": [{"filename": "../x.arrow"}]}, "x.arrow: is not there")])
def test_a_list_of_tables_is_used_or_refused(tmp_path, state, words):
    """Rows that datasets before 1.16 chose by their numbers, and a list that is none."""
    save_to_disk(tmp_path, ROWS[:9], 1, **state)
    if words:
        assert words in refusal(names_of, tmp_path)
    else:
        assert names_of(tmp_path) == ["data-00000-of-00001.arrow"]


@pytest.mark.parametrize("names, remedy", [
    (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
      "data/test-00000-of-00001.parquet"], "data/train-*.parquet"),
    (["data/train_sft-00000-of-00001-6f3a.parquet", "data/test_sft-00000-of-00001-1a.parquet"],
     "data/train_sft-*.parquet"),
    (["default/train/0000.parquet", "default/validation/0000.parquet"], "default/train"),
    (["train.parquet", "dev.parquet"], "train.parquet"),
    (["my_set-train.arrow", "my_set-test.arrow"], "my_set-train.arrow"),
    (["data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet"],
     "data/train_prefs-*.parquet"),
    (["train.jsonl", "test.parquet"], "train.jsonl"),
    (["valid.parquet", "eval.parquet"], "eval.parquet")])
def test_a_folder_of_several_splits_is_refused_with_the_path_of_one(tmp_path, names, remedy):
    for i, name in enumerate(names):
        write = {".parquet": write_parquet, ".jsonl": write_jsonl}.get(Path(name).suffix,
                                                                       write_stream)
        write(tmp_path / name, ROWS[i:i + 1])
    message = refusal(names_of, tmp_path)
    assert message.startswith(f"{tmp_path}: holds several splits: ")
    assert f"name one of them: {tmp_path / remedy}; " in message
    one = [path for path in names if path.split("-0")[0] == names[0].split("-0")[0]]
    chosen = input_files(tmp_path / remedy, Counter())
    if remedy != "eval.parquet":
        assert sorted(str(file.relative_to(tmp_path)) for file in chosen) == one


def test_splits_of_json_files_are_read_and_named(tmp_path):
    for name in ("train-1.jsonl", "train-2.jsonl.gz", "test-1.jsonl"):
        write_jsonl(tmp_path / name, ROWS[:2])
    (tmp_path / "dev_settings.json").write_text("{}")  # is not read
    (tmp_path / "validation.md").write_text("no split")
    counts = Counter()
    assert len(names_of(tmp_path, counts)) == 4
    assert sorted(counts.values()) == [1, 1, 2] and "split validation" not in str(counts)
    (tmp_path / "dev_settings.json").unlink()
    (tmp_path / "validation.md").unlink()
    (tmp_path / "test-1.jsonl").unlink()
    counts.clear()
    assert len(names_of(tmp_path, counts)) == 2 and not counts


def test_splits_of_one_kind_are_read_together(tmp_path):
    for name in ("train-wiki-00000-of-00001.parquet", "train-books-00000-of-00001.parquet",
                 "more.parquet", "en/part.0.parquet", "license_texts.parquet"):
        write_parquet(tmp_path / name, ROWS[:2])
    assert len(names_of(tmp_path)) == 5


def test_a_dataset_dict_is_read_if_it_has_one_split(tmp_path):
    save_to_disk(tmp_path / "sft", ROWS[:4])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["sft"]}')
    assert len(names_of(tmp_path)) == 2
    save_to_disk(tmp_path / "prefs", ROWS[:4])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["sft", "prefs"]}')
    message = refusal(names_of, tmp_path)
    assert "holds the splits sft, prefs" in message and str(tmp_path / "sft") in message
    assert len(names_of(tmp_path / "prefs")) == 2
    (tmp_path / "dataset_dict.json").write_text('{"splits": 3}')
    assert len(names_of(tmp_path)) == 4


def test_a_pattern_is_a_path(tmp_path):
    """A source, its digests, its ids and its provenance."""
    for name in ("train-1.parquet", "train-2.parquet", "test-1.parquet"):
        write_parquet(tmp_path / "in" / name, [{"text": f"The text of {name}, number {i}."}
                                               for i in range(20)])
    (tmp_path / "in" / ".train-3.parquet").write_bytes(b"hidden")
    assert len(input_files(tmp_path / "in" / "*", Counter())) == 3
    pattern = tmp_path / "in" / "train-*.parquet"
    folder = build(tmp_path, pattern)
    documents = kept_documents(folder)
    assert len(documents) == 40
    assert documents[-1]["metadata"]["provenance"] == documents[-1]["id"] == "train-2.parquet:20"
    assert len(input_digests(str(pattern), tmp_path / "built")) == 2
    assert is_there(pattern) and not is_there(tmp_path / "in" / "dev-*")
    assert "no such file or folder" in refusal(input_files, tmp_path / "in" / "dev-*", Counter())


# ---- Faults --------------------------------------------------------------------------------------

def damaged(content, kind):
    """The bytes of a file with a fault."""
    middle = len(content) // 2
    return {"empty": b"", "cut": content[:middle], "pointer": POINTER, "html": b"<!DOCTYPE html>",
            "hole": content[:middle] + bytes(200) + content[middle + 200:],
            "bit": content.replace(b"tells of", b"tells if", 1),
            "rows": content.replace(b"\x16\xd0\x0f", b"\x16\xd2\x0f"),  # 1,000 rows, then 1,001
            "junk": b"what is this? " * 50, "json": b'{"text": "x"}\n',
            "gzip": b"\x1f\x8b\x08xyz",
            "footer": content[:-40] + b"\xff" * 28 + content[-12:],
            "encrypted": content[:-4] + b"PARE"}[kind]


@pytest.mark.parametrize("kind, words", [
    ("empty", "0 bytes"), ("cut", "cut off"), ("pointer", "git lfs pull"), ("html", "fetch it"),
    ("hole", "fetch it again"), ("bit", "CRC"), ("rows", "1,001"), ("junk", "not Parquet"),
    ("json", "rename it to x.jsonl"),
    ("gzip", "not Parquet but gzip"), ("footer", "fetch it again"), ("encrypted", "decrypt it")])
def test_a_parquet_file_with_a_fault_is_named(tmp_path, kind, words):
    file = write_parquet(tmp_path / "x.parquet", ROWS, compression="none", row_group_size=100,
                         write_page_checksum=True)
    file.write_bytes(damaged(file.read_bytes(), kind))
    message = refusal(list, read_records(file, "s", Counter(), True))
    assert message.startswith(f"{file}: ") and words in message
    if kind == "hole":
        assert "after row" in message


def test_a_stream_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    """Also one that ends between two batches, which pyarrow takes for a whole one."""
    whole = write_stream(tmp_path / "x.arrow", ROWS).read_bytes()
    for size, rows in ((len(whole) // 2, range(300, 600)), (len(whole) - 8, range(1000, 1001))):
        file = tmp_path / "x.arrow"
        file.write_bytes(whole[:size])
        message = refusal(list, read_records(file, "s", Counter(), False))
        assert message.startswith(f"{file}: ") and "--allow_truncated=true" in message
        counts = Counter()
        assert len(list(read_records(file, "s", counts, True))) in rows
        assert counts["files cut off"] == 1


@pytest.mark.parametrize("name, content, words", [
    ("x.arrow", "parquet", "rename it to x.parquet"),
    ("x.parquet", "stream", "rename it to x.arrow"), ("x.feather", "parquet", "x.parquet"),
    ("x.jsonl", "parquet", "rename it to x.parquet")])
def test_a_table_with_the_name_of_another_kind_is_named(tmp_path, name, content, words):
    write = write_parquet if content == "parquet" else write_stream
    file = write(tmp_path / "y", ROWS[:9]).rename(tmp_path / name)
    assert words in refusal(list, read_records(file, "s", Counter()))


@pytest.mark.parametrize("column, words", [
    (pa.array([b"a", b"b"]), "bytes"), (pa.array([1, 2]), "did you mean body?"),
    (pa.array([["a"], ["b"]]), "a list"), (pa.nulls(2), "null in each row")])
def test_a_text_of_another_type_is_an_error_of_its_column(tmp_path, column, words):
    file = write_parquet(tmp_path / "x.parquet", pa.table({"text": column, "body": ["a", "b"]}))
    message = refusal(build, tmp_path, file)
    assert message.startswith(f"{file}: the column text holds ") and words in message


def test_a_suite_tells_how_to_mend_a_table_without_its_text(tmp_path):
    """It has no key as a source has, and measures each row: a null stops it."""
    from eval import EvalConfig
    other = write_parquet(tmp_path / "x.parquet", [{"id": "1", "body": "words"}])
    assert ("did you mean body? rename it to text: python -c \"import pandas; pandas.read_parquet("
            "'OLD').rename(columns={'body': 'text'}).to_parquet('NEW')\"") in refusal(
                suite_at, str(other), EvalConfig())
    null = write_parquet(tmp_path / "y.parquet", [{"text": "a"}, {"text": None}])
    message = refusal(list, read_documents(null, "s"))
    assert f"{null}:2: text is null, not a string; correct it, or drop each such row: " in message
    assert ".dropna(subset=['text']).to_parquet('NEW')" in message


def test_a_missing_text_column_is_an_error_that_knows_its_name(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [{"content": "a", "id": "b"}])
    message = refusal(build, tmp_path, file)
    assert message.startswith(f"{file}: no key text") and "did you mean content?" in message
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    assert "text is there 2 times" in refusal(build, tmp_path, write_parquet(file, table))


def test_a_null_and_a_text_that_is_not_utf8_are_bad_rows(tmp_path, call):
    """Each with its file and row; the others go on, as bad lines of JSON do."""
    content = b"".join(text.encode() for text in TEXTS[:300]) + b"\xff\xfe"
    ends = [0]
    for text in TEXTS[:300]:
        ends.append(ends[-1] + len(text.encode()))
    ends.append(ends[-1] + 2)
    offsets = pa.array(ends, pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 301, [None, offsets, pa.py_buffer(content)])
    mask = pa.array([i != 6 for i in range(301)])
    texts = pa.compute.if_else(mask, texts, None)
    for file in (write_parquet(tmp_path / "x.parquet", pa.table({"text": texts})),
                 write_stream(tmp_path / "x.arrow", pa.table({"text": texts}))):
        result = call(data, f"--data_dir={tmp_path / file.suffix}", "--tokenizer=bpe:284",
                      "--workers=1", "--eval_share=0", f"--sources={ {'main': str(file)} }")
        assert result.returncode == 0
        out = "".join(result.stdout.split())  # its lines are as wide as a terminal
        for said in (":7: text is null, not a string; correct or delete it",
                     ":301: text is bytes that are not UTF-8"):
            assert "".join(f"{file}{said}".split()) in out


# ---- Hostile files -------------------------------------------------------------------------------

class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("write", [write_parquet, write_stream])
def test_an_extension_type_that_is_pickled_runs_nothing(tmp_path, write):
    marker = tmp_path / "marker"
    name, content = b"ARROW:extension:name", b"ARROW:extension:metadata"
    metadata = {name: b"arrow.py_extension_type", content: pickle.dumps(Bomb(marker))}
    schema = pa.schema([pa.field("text", pa.string(), metadata=metadata)])
    suffix = ".parquet" if write is write_parquet else ".arrow"
    file = write(tmp_path / f"x{suffix}", pa.table({"text": ["a"]}, schema=schema))
    assert rows_in(file) == [(1, {"text": "a"})] and not marker.exists()


def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path):
    offsets = pa.array([0, 10**9, 3, 4], pa.int32()).buffers()[1]
    texts = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abcd")])
    file = write_stream(tmp_path / "x.arrow", pa.table({"text": texts}))
    assert refusal(rows_in, file).startswith(f"{file}: cannot be read after row 0")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what a process takes")
def test_a_bomb_stops_with_its_row(tmp_path, monkeypatch):
    """A few kilobytes that unpack to 512 MB: one text of 2 MiB, in each of 256 rows."""
    monkeypatch.setattr(tables, "MOST_MEMORY", 2**26)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array(["a" * 2**21]))
    file = write_parquet(tmp_path / "x.parquet", pa.table({"text": texts}), compression="zstd",
                         store_schema=False, dictionary_pagesize_limit=2**30)
    assert file.stat().st_size < 10_000
    assert refusal(rows_in, file).startswith(f"{file}:1: to unpack the rows")
    rows = tables.read_table(write_parquet(tmp_path / "y.parquet", ROWS), None, tqdm(disable=True))
    for _ in rows:  # the limit is gone between two rows
        assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_a_row_that_is_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES", 2**15)
    monkeypatch.setattr(tables, "BATCH_BYTES", 2**12)
    file = write_parquet(tmp_path / "x.parquet", [{"text": "a" * n} for n in (9, 2**14, 2**16)])
    assert refusal(rows_in, file).startswith(f"{file}:3: one row of over 32,768 bytes")


@pytest.mark.parametrize("version, words", [(None, "needs the package pyarrow"),
                                            ("14.0.0", "needs a newer pyarrow than 14.0.0")])
def test_no_pyarrow_or_an_old_one_is_one_line(tmp_path, monkeypatch, version, words):
    file = write_parquet(tmp_path / "x.parquet", ROWS[:3])
    if version:
        monkeypatch.setattr(pa, "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refusal(list, read_records(file, "s"))
    assert message.startswith(f"{file}: {words}") and "pip install" in message


def test_pyarrow_is_not_imported_without_a_table():
    for file in ROOT.glob("[!t]*/*.py"):
        assert not re.search("^(import|from) pyarrow", file.read_text(), re.M), file


# ---- Memory --------------------------------------------------------------------------------------

READ = """
import re, sys
from corpus.documents import as_document, read_records
from collections import Counter
n = sum(len(as_document(record, "s", Counter(), "text")["text"])
        for record in read_records(sys.argv[1], "s", text_key="text"))
# not ru_maxrss, which begins with the size of the process that started this one
print(n, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("row_group", [20_000, 10**9], ids=["row groups", "one row group"])
def test_a_large_parquet_file_is_streamed(tmp_path, row_group):
    """600 MB, which may not take more than 400 MB of the whole process."""
    texts = [os.urandom(1500).hex() for _ in range(200)]
    table = pa.table({"text": pa.array([texts[i % 200] + str(i) for i in range(200_000)]),
                      "id": pa.array([str(i) for i in range(200_000)])})
    file = write_parquet(tmp_path / "x.parquet", table, row_group_size=row_group,
                         compression="none", use_dictionary=False)
    assert file.stat().st_size > 600e6
    result = subprocess.run([sys.executable, "-c", READ, file], cwd=ROOT, check=True,
                            capture_output=True, text=True)
    characters, megabytes = map(int, result.stdout.split())
    assert characters > 600e6 and megabytes < 400
