"""What data.py reads and what it leaves out: folders and links, encodings, JSON, large texts, and
built data that may only be read. Nothing is left out without a count or an error."""

import ctypes
import gzip
import json
import os
import sys
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from conftest import (POINTER, data_config, kept_documents, manifest_of, official_order, refusal,
                      write_jsonl)

import data
from corpus.bpe import sample_texts
from corpus.dedup import evaluation_texts
from corpus.documents import as_document, begin_of_end, read_documents, read_records
from corpus.inputs import input_digests, state_of
from corpus.large_drops import print_funnel
from corpus.lines import CHUNK_BYTES
from corpus.storage import DocumentWriter, mapped_order, pack, read_block
from corpus.token_files import read_sidecar, token_file
from corpus.tokenizer import Tokenizer
from data import build_data
from support.files import UserError, read_json
from support.text import decoded, noted, parsed_json, read_text


def texts_at(path, **options):
    """[(provenance, text)] of a source, and what was not read of it."""
    counts = Counter()
    documents = read_documents(path, "main", counts)
    found = [(each["metadata"]["provenance"], each["text"]) for each in documents]
    return found, dict(+counts)


def build(folder, **source):
    """A build of one source with a tokenizer of 284 ids; {} is the manifest's entry of it."""
    config = data_config(folder, sources={"main": source}, tokenizer="bpe:284")
    return build_data(config)


# ---- Folders and links ---------------------------------------------------------------------------

@pytest.mark.parametrize("names", [
    ("a.txt", "b.md", "c.txt.gz", "d.jsonl", "e.json.gz", "license.rst"), ("d.jsonl", "readme.md")])
def test_capitals_in_an_ending_change_nothing(tmp_path, names):
    """Of a folder and of a file that is named, here those of Windows and of old cameras."""
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(3)).encode()
    found = {}
    for case in (str.lower, str.upper, str.title):
        folder = tmp_path / case.__name__
        folder.mkdir()
        for name in names:
            content = rows if ".json" in name else name.encode()
            packed = gzip.compress(content) if name.endswith("gz") else content
            (folder / case(name)).write_bytes(packed)
        texts, counts = texts_at(folder)
        found[case] = sorted(text for _, text in texts), sum(counts.values())
        for name in names:
            alone, _ = texts_at(folder / case(name))
            assert len(alone) == (3 if ".json" in name else 1)
    assert found[str.upper] == found[str.title] == found[str.lower]


def test_links_are_followed_and_each_file_is_read_once(tmp_path):
    """80 documents, not 50: in files and folders behind links, and no circle without an end."""
    real = tmp_path / "real"
    write_jsonl(real / "a.jsonl", [{"text": f"a {i}"} for i in range(50)])
    write_jsonl(tmp_path / "other" / "b.jsonl", [{"text": f"b {i}"} for i in range(20)])
    write_jsonl(tmp_path / "file.jsonl", [{"text": f"c {i}"} for i in range(10)])
    (real / "linked").symlink_to("../other")
    (real / "c.jsonl").symlink_to(tmp_path / "file.jsonl")
    (real / "0 again.jsonl").symlink_to("a.jsonl")  # sorted before the file that it leads to
    (real / "deep").mkdir()
    (real / "deep" / "up").symlink_to("../..")
    (real / "loop").symlink_to(".")
    (tmp_path / "other" / "back").symlink_to(real)
    (real / "self.jsonl").symlink_to("self.jsonl")
    (real / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "source").symlink_to(real)  # the source itself may be a link
    for root in (real, tmp_path / "source"):
        found, counts = texts_at(root)
        assert [text for _, text in found] == [
            *(f"a {i}" for i in range(50)), *(f"c {i}" for i in range(10)),
            *(f"b {i}" for i in range(20))]
        assert found[0][0] == "a.jsonl:1" and found[-1][0] == "linked/b.jsonl:20"
        assert counts == {"links not followed: broken (first gone.jsonl)": 2,
                          "links not followed: to a folder above (first loop)": 2,
                          "links not followed: to what is read already (first 0 again.jsonl)":
                          2}


def test_what_is_not_read_is_counted_by_reason_and_printed(tmp_path, call):
    home = tmp_path / "in"
    write_jsonl(home / "a.jsonl", [{"text": f"words of text {i}"} for i in range(30)])
    for name in (".hidden.jsonl", ".git/x.py", "b.orc", "c.orc", "d.csv.gz", "none",
                 "e.1", "e.2", "e.3", "deep/._a.jsonl"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(b"x")
    (home / "empty.jsonl").write_bytes(b"")
    os.mkfifo(home / "pipe.jsonl")
    result = call(data, f"--data_dir={tmp_path / 'built'}", "--tokenizer=bpe:284", "--workers=1",
                  f"--sources={ {'main': str(home)} }")
    [folder] = [file.parent for file in (tmp_path / "built").glob("*/manifest.json")]
    notes = manifest_of(folder)["sources"]["main"]["notes"]
    assert notes == {
        "files not read: hidden (first .hidden.jsonl)": 2, "folders not read: hidden (first .git)":
        1, "files not read: empty (first empty.jsonl)": 1,
        "files not read: .orc (first b.orc); to make one that is read: python -c \"import pandas; "
        "pandas.read_orc('OLD').to_json('NEW.jsonl', orient='records', lines=True)\"": 2,
        "files not read: .csv.gz (first d.csv.gz); to make one that is read: gunzip OLD; what "
        "holds JSON may be packed, as NAME.jsonl.gz": 1, "files not read: .1 (first e.1)": 1,
        "files not read: .2 (first e.2)": 1, "files not read: .3 (first e.3)": 1,
        "files not read: other endings (first none)": 1,
        "files not read: pipes, sockets or devices (first pipe.jsonl)": 1}
    assert result.returncode == 0
    remark = " ".join(result.stdout.split())
    for reason, n in notes.items():
        assert f"main: {noted(n, reason)}" in remark
    assert "main: 1 file not read: empty (first empty.jsonl)" in remark
    # what can be converted, at the begin too: a build may take hours
    assert "warning: main: 2 files not read: .orc (first b.orc); to make one" in result.stderr
    assert result.stderr.count("warning: ") == 2


@pytest.mark.parametrize("name, remedy", [
    ("x.orc", ".parquet"), ("x.json", "one object"), ("x.csv.zst", "zstd -d"), ("x", ""),
    ("x.csv", "read_csv"),
    ("x.XLSX", "read_excel"), ("x.xls", "read_excel"), ("x.ods", "read_excel"),
    ("x.tsv", "read_csv('OLD', sep='\\t')"), ("x.sqlite", "sqlite3 -json OLD"),
    ("x.pdf", "pdftotext"), ("x.docx", "save it as text"), ("x.html", "save it as text"),
    ("x.xyz", "save another kind as text"), ("x.tar.gz", "tar -xf"),
    (".x.jsonl", "hidden"), ("x.csv.gz", "gunzip"), ("empty.jsonl", "")])
def test_a_folder_of_other_files_is_refused_with_what_it_holds(tmp_path, name, remedy):
    """At every door: a source, an evaluation set, a contamination set."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(b"" if name == "empty.jsonl" else b"x")
    for read in (read_documents, evaluation_texts, lambda path, *_: read_records(path)):
        message = refusal(list, read(*[tmp_path / "in", "main"][:read.__code__.co_argcount]))
        assert message.startswith(f"{tmp_path / 'in'}: ") and remedy in message
        if remedy and name.startswith("x.") and name != "x.json":
            message = refusal(list, read_records(tmp_path / "in" / name))
            assert message.startswith(f"{tmp_path / 'in' / name}: ") and remedy in message


def test_the_funnel_names_a_text_file_that_is_lost_and_how_to_convert_it(tmp_path, call):
    """Behind many bad lines of another reason; of each reason the first is shown."""
    home = tmp_path / "in"
    write_jsonl(home / "a.jsonl", [{}] * 20 + [{"text": f"words of text {i}"} for i in range(30)])
    (home / "b.txt").write_bytes("words\nand a café".encode("latin-1"))
    result = call(data, f"--data_dir={tmp_path / 'built'}", "--tokenizer=bpe:284", "--workers=1",
                  f"--sources={ {'main': str(home)} }")
    assert "main: 20 bad lines: no key text\n" in result.stdout
    assert "main: 1 document in text files left out: not UTF-8 but another" in result.stdout
    assert f"main: left out: {home / 'b.txt'}:2: not UTF-8 but another encoding" in result.stdout
    assert "if it is Windows-1252 by: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW" in result.stdout
    assert result.stdout.count("left out: ") == 3


def test_evaluation_data_says_what_is_not_read(tmp_path, capsys):
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "x"}])
    (tmp_path / "in" / "b.pdf").write_bytes(b"x")
    for _ in range(2):  # once is enough
        assert list(evaluation_texts(tmp_path / "in")) == ["x"]
    said = f"{tmp_path / 'in'}: 1 file not read: .pdf (first b.pdf); "
    assert capsys.readouterr().out.count(said) == 1


def test_a_file_that_may_not_be_read_is_named_with_the_remedy(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    monkeypatch.setattr("corpus.inputs.file_sha256", refuse)
    message = refusal(build, tmp_path, path=file)
    assert message.startswith(f"{file}: cannot be read") and "restore it" in message


def test_a_pipe_a_broken_link_and_a_file_that_changes_are_refused_by_name(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe.jsonl", "link", "loop"):
        assert str(tmp_path / name) in refusal(build, tmp_path, path=str(tmp_path / name))
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"text": str(i)} for i in range(10)])
    file.unlink()
    assert str(file) in refusal(list, read_records(file))


@pytest.mark.parametrize("puts_back", [False, True])
@pytest.mark.parametrize("changed", ["a.jsonl", "test.jsonl"])
def test_a_text_that_changes_while_it_is_read_is_never_kept_under_the_name_of_another(
        tmp_path, monkeypatch, changed, puts_back):
    """Also where it changed before it was read, as while another build was waited for; also an
    evaluation set. Kept, it would be used whenever the text is again as it was."""
    def write(word, name):
        return write_jsonl(tmp_path / name, [{"text": f"{word} {i} of a text " * 9}
                                             for i in range(9)])
    config = data_config(tmp_path, sources={"main": write("one", "a.jsonl")}, tokenizer="bpe:284",
                         decontaminate={"test": write("two", "test.jsonl")})

    def read_another(*arguments, **options):
        before = (tmp_path / changed).read_text()
        write("two" if changed == "a.jsonl" else "one", changed)
        yield from read_records(*arguments, **options)
        if puts_back:
            (tmp_path / changed).write_text(before)
    monkeypatch.setattr("data.read_records", read_another)
    assert f"{changed}: changed while" in refusal(build_data, config)
    monkeypatch.undo()
    for name, word in (("a.jsonl", "one"), ("test.jsonl", "two")):
        write(word, name)
    assert {row["text"][:3] for row in kept_documents(build_data(config))} == {"one"}


def test_a_damaged_list_of_digests_is_made_again(tmp_path):
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"text": "words of a text"}] * 9)
    known = input_digests(file, tmp_path)
    entries = (5, None, {"a": 1}, [], state_of(file), [*state_of(file), 5])
    damaged = [json.dumps({str(file): entry}) for entry in entries]
    for content in ("[]", "5", "{}", '{"torn', "\x80", "[" * 10**5, *damaged):
        (tmp_path / "inputs.json").write_bytes(content.encode("latin-1"))
        assert input_digests(file, tmp_path) == known


def test_a_source_that_holds_its_own_built_data_is_refused(tmp_path):
    """At the second build, the clean documents of the first would be read as text."""
    write_jsonl(tmp_path / "a.jsonl", [{"text": "words of a text"}] * 9)
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):  # built in tmp_path/link/built
        assert "data_dir" in refusal(build, tmp_path / "link", path=str(path))
    for key, value in (("path", ""), ("text", ""), ("separator", 3)):
        assert key in refusal(data_config, tmp_path, sources={"a": {"path": "x", key: value}})


def test_an_evaluation_set_that_is_never_found_is_said(tmp_path, capsys):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "words of a text"}] * 9)
    for text, said in (("too short to be found", True), ("long enough " * 9, False)):
        test = write_jsonl(tmp_path / "test.jsonl", [{"text": text}])
        build_data(data_config(tmp_path, sources={"main": file}, tokenizer="bpe:284",
                               decontaminate={"mine": test}))
        assert (f"decontaminate: mine: {test}: " in capsys.readouterr().err) == said


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", b'{"text": "x"}\n', ["plain text", "rename it to a.jsonl"]),
    ("a.jsonl.gz", b"\x28\xb5\x2f\xfd", ["zstd", "rename it to a.jsonl.zst"]),
    ("a.jsonl.gz", b"\1?", ["again"]),
    ("a.jsonl", b'{"text": "x"}\r{"text": "y"}\r', ["CR alone", "tr '\\r'"])])
def test_a_file_of_another_kind_is_named_with_what_mends_it(tmp_path, name, content, words):
    """--allow_truncated would not: nothing of such a file can be read."""
    (tmp_path / name).write_bytes(content)
    line = refusal(lambda: [as_document(record, "main", Counter())
                            for record in read_records(tmp_path, "main")])
    assert name in line and all(word in line for word in words), line
    assert "allow_truncated" not in line


@pytest.mark.parametrize("content", [b"", gzip.compress(b"0,9,a,b,1\n" * 99)[:-9], b"plain",
                                     gzip.compress(b"0,9,a,b\n"), gzip.compress(b"0,x,a,b,1\n"),
                                     gzip.compress(b"0,9,\xff,b,1\n")],
                         ids=["empty", "cut off", "not gzip", "four", "a word", "not UTF-8"])
def test_a_damaged_sidecar_of_ready_token_files_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.csv.gz").write_bytes(content)
    assert refusal(read_sidecar, tmp_path / "a.csv.gz").startswith(f"{tmp_path}/a.csv.gz:")


# ---- Encodings -----------------------------------------------------------------------------------

PRICE = '{"text": "costs \u20ac5"}\r\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_an_error_that_names_it_and_never_other_letters(tmp_path, name, encoding):
    content = (PRICE * 30).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    message = refusal(list, read_documents(tmp_path / name, "main"))
    assert message.startswith(f"{tmp_path / name}:1: ") and encoding[:6].upper() in message
    config = data_config(tmp_path, sources={"main": str(tmp_path / name)})
    assert encoding[:6].upper() in refusal(build_data, config)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_text_and_line_ends_may_be_windows(tmp_path, name):
    content = (PRICE * 2).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    wanted = [PRICE * 2] if name == "a.txt" else ["costs \u20ac5"] * 2
    assert [text for _, text in texts_at(tmp_path / name)[0]] == wanted


def test_another_encoding_is_named_with_file_and_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo\ncaf\xe9".encode("latin-1"))
    message = refusal(list, read_documents(tmp_path / "a.txt", "main"))
    assert message.startswith(f"{tmp_path / 'a.txt'}:3: ") and "0xe9" in message
    assert "byte 0xe9 at byte 6" in refusal(decoded, b"\xef\xbb\xbfcaf\xe9", "f:1")
    for content, kind in ((b"\x1f\x8b\x08\xff", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        assert kind in refusal(decoded, content, "f:1")
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert "b.jsonl.gz" in refusal(list, read_documents(tmp_path / "b.jsonl", "main"))
    for text in ("", "a\0b", "x" * 50 + "\0" * 50, "\ufeff", "日本"):
        assert decoded(text.encode(), "f:1") == text.removeprefix("\ufeff")


def test_a_token_list_and_a_tokenizer_are_read_alike(tmp_path):
    for name, key in (("list.txt", "token_files"), ("tokenizer.json", "tokenizer")):
        (tmp_path / name).write_bytes("x".encode("utf-16"))
        config = data_config(tmp_path, **{key: str(tmp_path / name)},
                             sources={"main": write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])})
        assert f"{tmp_path / name}:1: not UTF-8 but UTF-16" in refusal(build_data, config)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


# ---- JSON ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, place, words", [
    (b'{"a": 1, "b": 2, "a": 3}', ":1: ", "'a'"), (b'{"x": {"a": 1, "a": 1}}', ":1: ", "'a'"),
    (b'{"a": ' * 300 + b"1" + b"}" * 300, ":1: ", "200 levels"), (b"[" * 10**5, ":1: ", "200"),
    (b"9" * 5000, ":1: ", "digits"), (b'{"a":\n\n x}', ":3: ", ""), (b'{"a": 1\n', ":1: ", ""),
    (b'{"a": "\0"}', ":1: ", ""), (b"\0" * 99, ":1: ", ""), (b"", ":1: ", "")])
def test_json_that_json_loads_would_bend_or_die_of_is_refused_with_its_line(content, place, words):
    message = refusal(parsed_json, content, "f:1")
    assert message.startswith(f"f{place}") and words in message


def test_json_of_many_brackets_and_large_numbers_is_read():
    value = {"text": "[{" * 500, "n": [10**4000, 1e300, -0.0], "deep": None}
    for _ in range(150):
        value["deep"] = [value["deep"]]
    assert parsed_json(json.dumps(value).encode(), "f:1") == value


@pytest.mark.parametrize("rows, words", [
    ([{"content": "x", "url": "u"}], ["keys are content, url", '"text": "content"']),
    ([{"text": None}], ["text is null"]), ([{"prompt": "x"}], ["adapt.py"]),
    ([{"request": {}}], ["--suite"]), ([{}], ["none at all"]), ([["x"]], ["a list"])])
def test_a_source_without_documents_says_what_its_rows_hold(tmp_path, rows, words):
    file = write_jsonl(tmp_path / "a.jsonl", rows * 30)
    message = refusal(build, tmp_path, path=file)
    for word in (f"sources: main: {file}: ", "30 lines", f"{file}:1: ", *words):
        assert word in message


def test_text_may_lie_under_another_key(tmp_path):
    home = tmp_path / "in"
    file = write_jsonl(home / "a.jsonl", [{"content": f"one {i}", "text": 1} for i in range(9)])
    (home / "b.txt").write_text("a text file has no keys")
    folder = build(tmp_path, path=str(home), text="content")
    texts = [document["text"] for document in kept_documents(folder)]
    assert texts == [*(f"one {i}" for i in range(9)), "a text file has no keys"]
    assert "text is a number" in refusal(build, tmp_path, path=file)
    both = [{"content": f"one {i}", "text": f"two {i}"} for i in range(9)]
    write_jsonl(home / "a.jsonl", both)  # the key is part of what the built data is named by
    for key, word in (("text", "two"), ("content", "one")):
        kept = kept_documents(build(tmp_path, path=file, text=key))
        assert [document["text"] for document in kept] == [f"{word} {i}" for i in range(9)]


def test_built_documents_are_json_also_where_the_source_holds_nan(tmp_path):
    lines = [f'{{"text": "words {i} of a text", "metadata": {{"score": NaN, "most": 1e999}}}}\n'
             for i in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    folder = build(tmp_path, path=str(tmp_path / "a.jsonl"))
    scores = {(row["metadata"]["score"], row["metadata"]["most"]) for row in kept_documents(folder)}
    assert scores == {(None, None)}


def test_many_bad_rows_are_ten_examples_and_a_summary(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("corpus.stages.BATCH_BYTES", 50)  # several parts, each with some
    lines = ["{}\n", "junk\n", '{"text": "words"}\n', '{"text": null}\n'] * 3000
    (tmp_path / "a.jsonl").write_text("".join(lines))
    folder = build(tmp_path, path=str(tmp_path / "a.jsonl"))
    counts = manifest_of(folder)["sources"]["main"]
    assert capsys.readouterr().err.count("left out: ") == len(counts["bad_lines"]) == 10
    assert counts["bad lines"] == 9000 and counts["documents"] == 3000
    assert counts["bad_reasons"] == {"no key text": 3000, "not JSON": 3000,
                                     "text is null, not a string": 3000}


# ---- Nothing left, nothing held out --------------------------------------------------------------

def test_all_held_out_all_dropped_and_an_empty_file_are_different_errors(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words"}] * 4)
    config = data_config(tmp_path, sources={"main": file}, eval_share=1.0)
    message = refusal(build_data, config)
    assert "4 documents, is held out" in message and "separator" in message
    (tmp_path / "b.txt").write_text("one--two--three")
    cut = {"main": {"path": str(tmp_path / "b.txt"), "separator": "--"}}  # it is cut already
    message = refusal(build_data, data_config(tmp_path, sources=cut, eval_share=1.0))
    assert "3 documents, is held out" in message and "separator" not in message
    message = refusal(build, tmp_path, path=file, rules="gopher_word_count document")
    assert "gopher_word_count 4" in message and "document " not in message.split("dropped by")[1]
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert "holds no document" in refusal(build, tmp_path, path=file)


def test_a_build_of_one_document_says_that_it_holds_nothing_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one document of some words")
    whole = {"path": str(tmp_path / "a.txt")}
    cut = whole | {"separator": "document"}
    idle = whole | {"separator": "chapter"}
    for share, source, said in ((0.001, whole, True), (0.001, cut, True), (0.0, whole, False),
                                (0.001, idle, True)):
        config = data_config(tmp_path, sources={"main": source}, eval_share=share,
                             tokenizer="bpe:284")
        print_funnel(build_data(config))
        out = capsys.readouterr().out
        assert ("main: nothing is held out" in out) == said
        assert ("with separator" in out) == (said and source is whole)
        assert ("main: the separator 'chapter' cut no file" in out) == (source is idle)


# ---- A source that is one text -------------------------------------------------------------------

VERSES = [f"verse {i}\nof the song\n\n" for i in range(200)]


def sides_of(folder):
    """([(id, provenance, text)] that are trained on, the same of those that are held out)."""
    held_out = map(json.loads, (folder / "held_out" / "main.jsonl").read_text().splitlines())
    return [[(each["id"], each["metadata"]["provenance"], each["text"]) for each in side]
            for side in (kept_documents(folder), held_out)]


@pytest.mark.parametrize("name, workers", [("input.txt", 1), ("Input.TXT.GZ", 2), ("in/a.md", 1)])
def test_the_end_of_a_source_that_is_one_text_is_held_out(tmp_path, capsys, name, workers):
    """After a blank line, and none of it is trained on."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    content = "".join(VERSES).encode()
    file.write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    source = {"path": str(file if file.parent == tmp_path else file.parent), "rules": "document"}
    config = data_config(tmp_path, sources={"main": source}, eval_share=0.1, tokenizer="bpe:284",
                         workers=workers)
    folder = build_data(config)
    place = f"{file.name}:1"
    parts = "".join(VERSES[:180]), "".join(VERSES[180:])
    assert sides_of(folder) == [[(place, place, parts[0])],
                                [(f"{place}.2", f"{place}.2", parts[1])]]
    print_funnel(folder)
    assert f"main: 1 document, {place}, is the whole source; its last 10.2 % are held out, as" \
        in capsys.readouterr().out
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    ids = np.fromfile(folder / "main-00000.bin", manifest_of(folder)["dtype"])
    assert tokenizer.decode(ids[:-1].tolist()) == parts[0].strip()


def test_what_the_rules_leave_of_one_text_is_cut_and_a_short_one_is_not(tmp_path):
    """Also of an object; with a second document, the hashes of the ids choose as ever."""
    def built(text, beside=(), **source):
        rows = [{"text": text, "id": "a", "metadata": {"url": "u"}}, *beside]
        file = write_jsonl(tmp_path / "a.jsonl", rows)
        config = data_config(tmp_path, sources={"main": {"path": file} | source},
                             eval_share=0.05, tokenizer="bpe:284")
        return build_data(config)

    mail = "write to someone@example.com\n"
    [[trained], [held_out]] = sides_of(built("x\n" * 3000 + mail + "y\n" * 3000,
                                             rules="pii url document"))
    assert trained[0] == "a" and held_out[:2] == ("a.2", "a.jsonl:1.2")
    assert (trained[2] + held_out[2]).count("|||EMAIL_ADDRESS|||") == 1
    assert 0.04 < len(held_out[2]) / len(trained[2] + held_out[2]) < 0.07
    text = "x\n" * 2000
    assert [len(side) for side in sides_of(built(text, [{"text": "y", "id": "b"}]))] == [2, 0]
    assert [len(side) for side in sides_of(built("some words\n" * 100))] == [1, 0]


@pytest.mark.parametrize("text, share, end", [
    ("a" * 999 + "\n" + "b" * 990 + "\n\n" + "c" * 1000, 1 / 3, "c" * 1000),
    ("a" * 890 + "\r\n\r\n" + "b" * 106, 0.1, "b" * 106),
    ("a b\n" * 100 + "c" * 50, 0.205, "a b\n" * 11 + "c" * 50),  # the break before the share
    ("a " * 500, 0.1, "a " * 50), ("a" * 1000, 0.1, "a" * 100), ("a\n" * 50, 1.0, "a\n" * 50)])
def test_where_the_end_of_a_text_begins(text, share, end):
    assert text[begin_of_end(text, share):] == end


# ---- Large texts ---------------------------------------------------------------------------------

STORY = "Once upon a time.\r\n\nThe end.\n"
EOT = "<|endoftext|>"


def test_a_separator_cuts_a_text_into_documents_with_their_lines(tmp_path):
    """A blank part is none; a byte-order mark is no text; other files keep their documents."""
    content = EOT.join([STORY, "\n" + STORY, " \n", "", "last"])
    file = write_jsonl(tmp_path / "in" / "b.jsonl", [{"text": f"x{EOT}y"}])
    (tmp_path / "in" / "a.txt").write_text("\ufeff" + content, newline="")
    records = list(read_records(tmp_path / "in", separator=EOT))
    found = [(record.line, record.content) for record in records]
    assert [line for line, _ in found] == [1, 5, 9, 1]
    assert found[2][1] == b"last" and found[3][1] == f'{{"text": "x{EOT}y"}}\n'.encode()
    assert "separator" in refusal(list, read_records(file, separator=EOT))
    whole = build(tmp_path, path=str(tmp_path / "in"))
    folder = build(tmp_path, path=str(tmp_path / "in"), separator=EOT)
    assert folder != whole and len(kept_documents(whole)) == 2
    assert [row["text"] for row in kept_documents(folder)] == [STORY, "\n" + STORY, "last",
                                                               f"x{EOT}y"]


def test_documents_of_one_line_have_different_ids(tmp_path):
    """Else all of them would be held out or none, and drawn for a part or not."""
    file = tmp_path / "a.txt"
    file.write_text("a\nb|  c|\n \nd|e||f")
    records = list(read_records(file, separator="|"))
    assert [(record.line, record.place) for record in records] == [
        (int(float(line)), f"{file}:{line}") for line in ("1", "2", "4", "4.2", "4.3")]
    found, _ = texts_at(tmp_path)
    assert found == [("a.txt:1", file.read_text())]
    ids = [as_document(record, "main", Counter())["id"] for record in records]
    assert ids == ["a.txt:1", "a.txt:2", "a.txt:4", "a.txt:4.2", "a.txt:4.3"]
    file.write_text("|".join(f"words of text {i}" for i in range(200)))
    config = data_config(tmp_path, sources={"main": {"path": str(file), "separator": "|"}},
                         eval_share=0.3, tokenizer="bpe:284")
    assert 0 < manifest_of(build_data(config))["sources"]["main"]["held-out documents"] < 200


def test_a_separator_may_lie_across_the_end_of_what_is_read_at_a_time(tmp_path):
    for shift in range(len(EOT) + 2):
        first = "a" * (CHUNK_BYTES - shift)
        (tmp_path / "a.txt").write_text(f"{first}{EOT}b{EOT}")
        parts = [record.content for record in read_records(tmp_path / "a.txt", separator=EOT)]
        assert parts == [first.encode(), b"b"]


def test_only_the_begin_of_a_file_tells_its_encoding(tmp_path):
    """What is read at a time is no begin: a text may hold NUL characters anywhere."""
    text = "a" * CHUNK_BYTES + "b\0" * 500
    (tmp_path / "a.txt").write_text(text)
    found, notes = texts_at(tmp_path)
    assert [each for _, each in found] == [text] and [*notes.values()] == [1]


def test_a_text_that_holds_many_eos_is_said_to_be_one_document(tmp_path):
    (tmp_path / "a.txt").write_text(f"{STORY}{EOT}\n" * 20)
    folder = build(tmp_path, path=str(tmp_path / "a.txt"))
    note, windows = manifest_of(folder)["sources"]["main"]["notes"]
    assert f'separator="{EOT}"' in note and "CR LF" in windows
    assert manifest_of(folder)["sources"]["main"]["documents"] == 1


def test_streaming_a_cut_text_takes_memory_of_a_document_not_of_the_file(tmp_path):
    part = (STORY * 300 + EOT).encode()
    (tmp_path / "a.txt").write_bytes(part * 1500)  # 13 MB
    tracemalloc.start()
    n = sum(1 for _ in read_records(tmp_path / "a.txt", separator=EOT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 1500 and peak < 5 * CHUNK_BYTES


def test_a_large_block_is_read_back_in_linear_time(tmp_path, monkeypatch):
    """Read in 20,000 parts; adding each of them to what was read took 10 s, not 0.2."""
    writer = DocumentWriter(tmp_path, "main")
    text = np.random.Generator(np.random.PCG64(0)).bytes(6_000_000).hex()
    writer.add(*pack([b'{"text": "%s"}\n' % text.encode()]))
    writer.close()
    monkeypatch.setattr("corpus.storage.BLOCK_BYTES", 256)
    begin = time.process_time()
    [line] = read_block(tmp_path, "main", 0, 0)
    assert json.loads(line)["text"] == text and time.process_time() - begin < 3


def test_the_tokenizers_sample_of_one_long_document_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.bpe.BPE_SAMPLE_CHARS", 1000)
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words " * 9999}, {"text": "not read"}])
    folder = build(tmp_path, path=file)
    assert [len(text) for text in sample_texts({"main": folder})] == [1000]


# ---- Data that may only be read ------------------------------------------------------------------

@pytest.fixture
def plain_user():
    """Takes root's right to write everywhere from this thread: a mode of 0555 then holds."""
    if os.geteuid():
        yield
        return
    if sys.platform != "linux":
        pytest.skip("needs Linux's capabilities, or another user than root")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3; this thread
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    less = (ctypes.c_uint32 * 6)(*before)
    less[0] &= ~0b110  # effective: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, less) == 0
    yield
    assert libc.capset(header, before) == 0


def set_modes(folder, directory, file):
    for path in (*folder.rglob("*"), folder):
        path.chmod(directory if path.is_dir() else file)


@pytest.fixture
def read_only(tmp_path, plain_user):
    """Makes a folder read-only until the test ends."""
    made = []

    def make(folder):
        made.append(folder)
        set_modes(folder, 0o555, 0o444)
        with pytest.raises(PermissionError):
            (folder / "new").write_text("x")
        return folder
    yield make
    for folder in made:
        set_modes(folder, 0o755, 0o644)


def test_built_data_that_may_only_be_read_serves_a_run(tmp_path, tiny_config, call, read_only):
    """Its config builds nothing, its order is in memory, and trace reads both data and run."""
    import eval as evaluation
    import train
    shared = tmp_path / "shared"
    config = tiny_config(tmp_path / "run", data_dir=str(shared), max_steps=3)
    assert call(data, config).returncode == 0
    read_only(shared)
    for command in ((data, config), (train, config), (evaluation, tmp_path / "run"),
                    (data, "trace", tmp_path / "run", "--step=2")):
        result = call(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    other = call(data, config, "--eval_share=0.3")  # not built there
    assert other.returncode == 1 and f"{shared}: " in other.stderr and "--data_dir" in other.stderr
    read_only(tmp_path / "run")
    assert "step 2" in call(data, "trace", tmp_path / "run", "--step=2").stdout


def test_an_order_is_the_same_where_it_cannot_be_written(tmp_path, read_only):
    def make():
        return data.instance_order(50, 7, 0)
    (tmp_path / "order").mkdir()
    order = mapped_order(read_only(tmp_path / "order") / "order.bin", make, 50)
    assert order.tolist() == official_order(50, 7, 0).tolist() and order.dtype == np.uint32
    assert list((tmp_path / "order").iterdir()) == []


def test_a_file_or_folder_without_the_right_to_read_it_is_named(tmp_path, plain_user):
    file = tmp_path / "in" / "a.jsonl"
    write_jsonl(file, [{"text": "x"}])
    write_jsonl(tmp_path / "in" / "closed" / "b.jsonl", [{"text": "y"}])
    (tmp_path / "in" / "closed").chmod(0)
    found, counts = texts_at(tmp_path / "in")
    assert len(found) == 1 and counts == {"folders not read: no right to read (first closed)": 1}
    file.chmod(0)
    with pytest.raises(UserError, match=f"{file}: "):
        list(read_documents(tmp_path / "in", "main"))
    (tmp_path / "in" / "closed").chmod(0o755)


def test_a_pointer_of_git_lfs_is_no_damaged_file(tmp_path):
    for name in ("a.jsonl.gz", "a.txt"):
        (tmp_path / name).write_bytes(POINTER)
        assert "git lfs pull" in refusal(texts_at, tmp_path / name)
    for read in (read_json, read_text, Tokenizer.load, lambda path: token_file(path, None)):
        assert refusal(read, tmp_path / "a.txt").startswith(f"{tmp_path / 'a.txt'}: a Git LFS")


# ---- Every door ----------------------------------------------------------------------------------

@pytest.mark.parametrize("door", ["chats", "preferences", "contamination", "suite"])
@pytest.mark.parametrize("content, words", [
    ((PRICE * 9).encode("utf-16"), "UTF-16"), (gzip.compress(b"{}"), "gzip"),
    (POINTER, "git lfs pull")], ids=["UTF-16", "gzip", "LFS"])
def test_a_file_of_another_kind_is_one_error_at_every_door(tmp_path, door, content, words):
    import adapt
    import eval as evaluation
    from support.rows import read_set
    from support.suites import read_suites
    path = str(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(content)
    doors = {
        "chats": lambda: read_set(path, adapt.AdaptConfig(), False, 0.1, Counter()),
        "preferences": lambda: read_set(path, adapt.AdaptConfig(method="dpo", faulty="skip"), False,
                                        0.1, Counter()),
        "contamination": lambda: list(evaluation_texts(path)),
        "suite": lambda: read_suites(evaluation.EvalConfig(suite=path), dict)}
    message = refusal(doors[door])
    assert message.startswith(path) and words in message
