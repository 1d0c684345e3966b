"""docs/walkthrough.md and docs/files.md are true: their snippets run, what they name is there."""

import json
import re
from codeop import compile_command
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import ROOT, TINY, rows, write_corpus

import adapt
import train

WALK = (ROOT / "docs/walkthrough.md").read_text()
FILES = (ROOT / "docs/files.md").read_text()
STOPS = re.split(r"^## (?=\d+\. )", WALK.partition("\n## Where to go")[0], flags=re.M)[1:]
NAMED = re.compile(r"\[`([\w/]+\.py)`\]\(\.\./([\w/]+\.py)\): ((?:`\w+`(?:, )?)+)")


def snippet_in(part, file):
    """The one Python snippet in a part of a doc; its errors are shown at its lines of the file."""
    [snippet] = re.findall(r"```python\n(.*?)```", part, re.S)
    text = (ROOT / file).read_text()
    lines_before = text[:text.index(snippet)].count("\n")
    return compile("\n" * lines_before + snippet, file, "exec")


def write_rows(path, row):
    path.write_text(8 * (json.dumps(row) + "\n"))
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory, one_thread):
    """A folder with runs/tiny, runs/tiny_sft and runs/tiny_dpo, two steps each, as the reader's."""
    folder = tmp_path_factory.mktemp("walk")
    with chdir(folder):
        build(folder)
    return folder


def build(folder):
    # the sources have the names of the embedded ones, which take seconds to read
    folders = write_corpus(folder / "corpus")
    sources = {"docstrings": folders["web"], "code": folders["code"], "reference": folders["web"]}
    settings = TINY | dict(sources=sources, max_seq_len=128, embedding_size=4096, max_steps=2,
                           workers=1, data_dir="datasets", run_dir="runs/tiny")
    Path("tiny.py").write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    train.main(["tiny.py", "--keep_best=true"])

    sets = {"sft": write_rows(folder / "chats.jsonl", {"prompt": "What?", "completion": "A list."}),
            "dpo": write_rows(folder / "pairs.jsonl", {"prompt": "What?", "chosen": "A list.",
                                                       "rejected": "A dict."})}
    for method, file in sets.items():
        adapt.main([str(ROOT / f"configs/tiny_{method}.py"), f"--train_data={file}",
                    f"--eval_data={file}", "--epochs=2", "--batch_size=8", "--log_every_steps=1",
                    "--device=cpu", "--dtype=float32", "--compile=false", "--warmup_share=0",
                    "--lr=0.01", "--eval_answers=2", "--max_new_tokens=4"])


@pytest.fixture
def walk(built, monkeypatch):
    monkeypatch.chdir(built)
    return built


# ---- docs/walkthrough.md -------------------------------------------------------------------------


def test_the_snippets_run_in_their_order(walk, capsys):
    """Their own asserts hold, and their numbers are what the text says of them."""
    names = {}
    printed = []
    for stop in STOPS:
        capsys.readouterr()
        exec(snippet_in(stop, "docs/walkthrough.md"), names)
        printed.append(capsys.readouterr().out)
        assert printed[-1]
    assert "Drop(" in printed[1] and "|||EMAIL_ADDRESS|||" in printed[1] and "False" in printed[1]

    assert f"{8 * 127} targets" in printed[3]  # of 8 sequences of 128 tokens
    near, same, far = (float(line.split()[-1]) for line in printed[4].splitlines()[:3])
    assert near == pytest.approx(same, abs=2e-3) and abs(near - far) > 2e-3
    before, after = map(float, printed[4].splitlines()[3].split())
    assert before < 1e-4 < after  # what follows changes nothing, up to rounding

    start, _, ln_v = map(float, re.findall(r"\d+\.\d+", printed[6]))
    assert start - ln_v == pytest.approx(0.5, abs=0.1)
    losses = [float(loss) for loss in re.findall(r"'loss': ([\d.]+)", printed[7])]
    assert losses[0] > losses[1] > losses[2]
    assert re.search(r"trained: +'Return the current directory.<\|endoftext\|>'", printed[9])
    base, tuned = map(float, re.findall(r": ([\d.]+) nats", printed[9]))
    assert tuned != base
    first, second = map(float, re.findall(r"loss ([\d.]+)", printed[10]))
    assert first == pytest.approx(0.6931, abs=1e-4) and second != first


def test_a_reader_can_paste_the_snippets():
    """Line by line, as a terminal gives them: a block must end with an empty line."""
    for source in re.findall(r"```python\n(.*?)```", WALK + FILES, re.S):
        typed = ""
        for line in [*source.splitlines(), ""]:
            typed += line + "\n"
            if compile_command(typed.rstrip("\n") + "\n" * (line == "")):
                typed = ""
        assert not typed.strip()


def test_twelve_stops_have_their_parts():
    """The section of the paper, the functions, what to look at, a snippet, why, and a question."""
    assert [stop.partition(".")[0] for stop in STOPS] == [str(i) for i in range(1, 13)]
    for stop in STOPS:
        places = [stop.find(part) for part in ("**Paper:** ", "**Code:** ", "**Look at** ",
                                               "```python\n", "**Why so?** ", "<details><summary>")]
        assert -1 not in places and places == sorted(places), stop[:60]
        assert stop.count("<details><summary>") == stop.count("</summary>\n\n")
        assert stop.count("<details>") == stop.count("\n\n</details>")


def test_every_function_of_a_stop_is_in_the_file_that_it_links():
    for stop in STOPS:
        code = stop.partition("**Code:** ")[2].partition("\n\n")[0]
        found = NAMED.findall(code)
        assert sum(names.count("`") // 2 + 1 for *_, names in found) == code.count("`") // 2
        for shown, linked, names in found:
            assert shown == linked
            source = (ROOT / linked).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^(def|class) {name}\b", source, re.M), f"{linked}: {name}"


def test_the_comments_that_the_walk_sends_to_are_there():
    """What the text says of the code's form: three parts of build_data, five of train_step."""
    data, training = ((ROOT / file).read_text() for file in ("data.py", "train.py"))
    assert re.findall(r"^        # (\d)\. (Documents|Tokens|The mix)", data, re.M) == [
        ("1", "Documents"), ("2", "Tokens"), ("3", "The mix")]
    step = training.partition("def train_step")[2].partition("\ndef ")[0]
    assert re.findall(r"^    # (\d)\)", step, re.M) == list("12345")


# ---- docs/files.md -------------------------------------------------------------------------------

def pattern_of(path):
    """A path as the tables have it: with their names and numbers of sources, hashes and steps."""
    path = re.sub(r"^reference-[0-9a-f]{16}\.", "reference-HASH.", path)
    path = re.sub(r"\b(code|docstrings|reference)(?=-\d|\.)", "SOURCE", path)
    path = re.sub(r"order-n\d+-seed6198-epoch\d", "order-n13790-seed6198-epoch0", path)
    return re.sub(r"step\d{6}", "step000600", path)


def test_every_file_is_listed(walk):
    """All that a run, its tuning and its data leave on the disk."""
    [data] = [file.parent for file in Path("datasets").glob("*/manifest.json")]
    folders = [data, *Path("runs").iterdir()]
    paths = {pattern_of(file.relative_to(folder).as_posix())
             for folder in folders for file in folder.rglob("*") if file.is_file()}
    assert len(paths) >= 17
    assert not [path for path in sorted(paths) if f"| `{path}`" not in FILES]


def keys_in(heading):
    """The keys in the first column of the table under a heading."""
    table = FILES.partition(f"| {heading} | meaning |")[2].partition("\n\n")[0]
    return {key for line in table.splitlines()[2:]
            for key in re.findall(r"`([\w/]+)`", line.split("|")[1])}


def test_every_key_is_listed(walk):
    """The rows of the log and the state of a step have the keys of the tables, and no others."""
    runs = [Path("runs") / name for name in ("tiny", "tiny_sft", "tiny_dpo")]
    common = {"kind", "step", "tokens", "seconds"}
    for kind, heading in (("train", "key of a `train` row"), ("eval", "key of an `eval` row")):
        found = set().union(*(row for run in runs for row in rows(run, kind)))
        assert found - common == keys_in(heading)
    for run in runs:
        state = json.loads((run / "step000002/state.json").read_text())
        assert set(state) == keys_in("key of a step")


def test_a_shard_is_read_by_numpy_alone(walk, capsys):
    exec(snippet_in(FILES, "docs/files.md"), {})
    assert "-00000.bin" in capsys.readouterr().out
