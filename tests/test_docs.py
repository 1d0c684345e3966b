"""docs/walkthrough.md and docs/files.md are true: their snippets run, what they name is there."""

import json
import re
from codeop import compile_command
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, rows, write_corpus, write_requests

import adapt
import eval as evaluation
import train
from configs import load_config
from corpus.bpe import BPE_SAMPLE_CHARS
from corpus.dedup import LEAST_WORDS, BloomFilter
from corpus.gopher import REPEATED_LINES_LIMIT, REPEATED_NGRAM_LIMITS, TOP_NGRAM_LIMITS
from corpus.pages import Drop, Page
from corpus.rules import LONGEST_PERIOD, REPETITIONS, RULES
from data import DataConfig
from eval import rolling_windows
from scaling.directory import NAMES
from scaling.machine import choose_micro_batch
from support.files import UserError, log_rows
from support.tasks import PAPER_METRIC, read_task

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

    write_requests(folder / "questions.jsonl", 3)
    evaluation.main(["runs/tiny", "--every_checkpoint", "--suite=domains,questions.jsonl",
                     "--max_new_tokens=4"])
    long = {"prompt": "What? " * 200}  # leaves no room for an answer
    lines = [json.dumps(row) + "\n" for row in ({"prompt": "What?"}, long)]
    Path("prompts.jsonl").write_text("".join(lines))
    adapt.main(["generate", "runs/tiny_sft", "prompts.jsonl", "out.jsonl", "--temperature=0.5",
                "--max_new_tokens=4", "--dtype=float32"])


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
        assert re.search(r"```python\n[^`]*```\n\n```\n[^`]+\n```\n", stop)  # and what it printed
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


def test_the_numbers_of_the_answers_are_those_of_the_code():
    text = " ".join(WALK.split())

    assert "30 % of the lines, or of the characters" in text
    assert REPEATED_LINES_LIMIT == 0.3
    assert "20, 18 and 16 % of the characters, for n = 2, 3 and 4" in text
    assert TOP_NGRAM_LIMITS == {2: 0.20, 3: 0.18, 4: 0.16}
    assert "15, 14, ... 10 % of the characters, for n = 5, 6, ... 10" in text
    assert REPEATED_NGRAM_LIMITS == {n: (20 - n) / 100 for n in range(5, 11)}
    assert "(50 to 100,000)" in text
    is_kept = [judged("gopher_word_count", n * "word ") is None for n in (49, 50, 100_000, 100_001)]
    assert is_kept == [False, True, True, False]
    assert "mask five addresses, and drop a document with six" in text
    assert not isinstance(judged("pii", 5 * "ada@example.org "), Drop)
    assert isinstance(judged("pii", 6 * "ada@example.org "), Drop)
    assert "each line of 13 words or more" in text and LEAST_WORDS == 13

    assert "one in a million. It takes 28.8 bits" in text
    filter = BloomFilter(1000, DataConfig().bloom_fp_rate)
    assert DataConfig().bloom_fp_rate == 1e-6
    assert filter.bits / 1000 == pytest.approx(28.8, abs=0.05)

    assert "Three million characters of each source" in text and BPE_SAMPLE_CHARS == 3_000_000
    assert "up to 13 tokens come 100 times in a row" in text
    assert (LONGEST_PERIOD, REPETITIONS) == (13, 100)

    assert "at most 16,384 tokens" in text
    [config] = load_config(["--batch_size=64"], train.TrainConfig)
    assert choose_micro_batch(config, seq_len=2048) == 8
    assert "1 + 1/512 is 1" in text
    assert torch.tensor(1 + 1 / 512, dtype=torch.bfloat16) == 1


def judged(rule, text):
    return RULES[rule](Page({"id": "mine", "text": text, "metadata": {}}, scorers={}))


def test_what_the_answers_say_of_the_measure():
    """The windows of a document of 10 tokens, and the paper's metric for each task."""
    windows = rolling_windows(list(range(1, 11)), "EOS", max_seq_len=4)
    for inputs, _, _ in windows:
        assert f"`{' '.join(map(str, inputs))}`" in WALK
    assert [targets[-scored:] for _, targets, scored in windows] == [
        [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert PAPER_METRIC == {**dict.fromkeys(["boolq", "sciq"], "acc_raw"),
                            **dict.fromkeys(["hellaswag", "piqa", "winogrande"], "acc_per_token"),
                            **dict.fromkeys(["arc_challenge", "arc_easy", "openbookqa"],
                                            "acc_uncond")}


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
    assert len(paths) >= 18
    assert not [path for path in sorted(paths) if f"| `{path}`" not in FILES]
    # also what only some runs leave: the names that a run may write, replace or delete
    assert not [name for name in re.findall(r"[a-z]{3,}", NAMES.pattern) if name not in FILES]


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
        for start in log_rows(run, "starts.jsonl"):
            assert set(start) == keys_in("key of a start")


def test_every_key_of_an_evaluation_is_listed(walk):
    found = list(log_rows(Path("runs/tiny"), "eval.jsonl"))
    assert {row["kind"] for row in found} == {"eval", "sample"}
    assert set().union(*found) == keys_in("key in `eval.jsonl`")
    of = FILES.partition("| `of` | what the result depends on")[2].partition("\n")[0]
    for row in found:
        assert not [key for key in row["of"] if f"`{key}`" not in of]
    [task] = [row["tasks"]["questions"] for row in found if row.get("tasks")]
    assert set(task) == keys_in("key of a task")
    tuned = FILES.partition("| `tuned` |")[2].partition("\n")[0]
    for name in ("tiny_sft", "tiny_dpo"):
        for row in rows(Path("runs") / name, "eval"):
            assert not [key for key in row["tuned"] if f"`{key}`" not in tuned]


def test_every_key_of_a_request_and_of_an_answer_is_listed(walk, tmp_path):
    request = json.loads(Path("questions.jsonl").read_text().splitlines()[0])
    keys = keys_in("key of a request")
    assert keys == {"doc_id", "idx", "label", "request"}
    for key in keys:
        row = {name: value for name, value in request.items() if name != key}
        with pytest.raises(UserError, match=key):
            read_task(write_rows(tmp_path / "questions.jsonl", row), None)
    answers = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert set().union(*answers) - {"prompt"} == keys_in("key of an answer")


def test_a_shard_is_read_by_numpy_alone(walk, capsys):
    exec(snippet_in(FILES, "docs/files.md"), {})
    assert "-00000.bin" in capsys.readouterr().out
