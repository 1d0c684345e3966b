"""Tables: Parquet, Arrow files and folders of datasets.save_to_disk, read at every door like JSON.

The same rows as JSON lines are the oracle. What is written here is what pyarrow, pandas and
datasets write; a table with a fault is refused with its file, its row or column, and the remedy.
"""

import gzip
import json
from pathlib import Path

import pytest
from conftest import (data_config, kept_documents, write_jsonl)
from tqdm import tqdm

from corpus import tables
from corpus.documents import read_documents
from data import build_data

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
    """Clean documents, tokens and tokenizer byte for byte, with 1 and with 2 workers."""
    forms = write_in_every_form(tmp_path / "in")
    found = []
    for form, workers in (("lines", 1), ("parquet", 1), ("parquet", 2), ("saved", 2), ("views", 1)):
        folder = build(tmp_path / f"{form}{workers}", forms[form], workers=workers)
        tokens = [file.read_bytes() for file in sorted(folder.rglob("*.bin"))]
        found.append((without_provenance(kept_documents(folder)), tokens,
                      (folder / "tokenizer.json").read_bytes()))
    assert len(found[0][0]) == len(TEXTS) and sum(map(len, found[0][1])) > 10 * len(TEXTS)
    assert all(each == found[0] for each in found)
