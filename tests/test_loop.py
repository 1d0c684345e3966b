"""What others expect of a loop: Weights & Biases, the best step, prompts, a log without a bar."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from conftest import (POINTER, columns, forked_ranks, refusal, rows, saved_steps,
                      say, steps, write_lines)

import adapt
import eval as evaluation
import train
from corpus.documents import print_line
from corpus.tokenizer import Tokenizer
from scaling import boards
from scaling.boards import numbers_of
from scaling.kept import Kept
from scaling.log import Pace, Window, example_prompt, say_warmup
from support.command import Output
from support.files import UserError, log_rows, write_rows
from support.prompts import open_prompts, read_prompts

WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not WANDB, reason="needs wandb")
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Weights & Biases ----------------------------------------------------------------------------

BLOCK, HEADER = 32768, 7  # of the log format that LevelDB and W&B share


def records_of(file):
    """Yields the bytes of each record in a .wandb file, as LevelDB's log format has them."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, record = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length = int.from_bytes(content[place + 4:place + 6], "little")
        kind = content[place + 6]  # 1: whole; 2, 3, 4: first, middle and last part
        record += content[place + HEADER:place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def offline_run(folder):
    """Returns (id, config, [{name: number}, ...]) of an offline run of W&B, in W&B's own schema."""
    from wandb.proto.wandb_internal_pb2 import Record
    [file] = folder.glob("run-*.wandb")
    name, config, history = None, {}, []
    for content in records_of(file):
        record = Record.FromString(content)
        if record.HasField("run"):
            name = record.run.run_id
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
        if record.HasField("history"):
            history.append({each.key or ".".join(each.nested_key): json.loads(each.value_json)
                            for each in record.history.item})
    return name, config, history


def offline_runs(run):
    return [offline_run(folder) for folder in sorted(run.glob("wandb/offline-run-*"))]


@pytest.fixture
def offline(monkeypatch):
    """W&B without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@needs_wandb
def test_wandb_gets_the_numbers_of_the_log(tmp_path, finished, copied, tiny_config, call, offline):
    """Also those of steps that are taken again after a crash, in the same run at W&B."""
    result = call(train, f"--resume={copied}", "--max_steps=25", "--wandb", "--keep_best",
                  "--eval_every_steps=5")
    assert result.returncode == 0 and f"wandb sync {copied}/wandb/offline-run" in result.stdout
    shutil.rmtree(copied / "step000025")  # as if it had crashed before it saved that one
    assert call(train, f"--resume={copied}", "--max_steps=25", "--wandb").returncode == 0
    (name, config, history), (again, _, repeated) = offline_runs(copied)
    assert name == again and len(name) == 8
    assert config["lr"] == 3e-3 and config["run_dir"] == str(copied) and "wandb" not in config
    new = [row for row in columns(copied, "step", "loss", "lr") if row[0] > 20]
    for part in (history, repeated):
        assert [(row["step"], row["train/loss"], row["train/lr"]) for row in part
                if "train/loss" in row] == new
        assert [(row["step"], row["eval/web"]) for row in part if "eval/web" in row] == [
            (25, rows(copied, "eval")[-1]["bits_per_byte"]["web"])]
        assert all({"step", "tokens", "seconds"} <= row.keys() for row in part)
    for file in copied.glob("wandb/offline*/**/*"):
        if file.is_file() and "logs" not in file.parts:  # those stay here
            assert not any(word.encode() in file.read_bytes() for word in private_words()), file
    assert call(train, f"--resume={copied}", "--overwrite", "--max_steps=2", "--wandb",
                "--eval_every_steps=0").returncode == 0
    [(other, _, history)] = offline_runs(copied)  # a new run there, and the old one's files deleted
    assert other != name and [row["step"] for row in history] == [1, 2, 2, 2]


def test_a_run_that_begins_again_is_a_new_one_at_wandb(tmp_path):
    name = boards.kept_id(tmp_path, -1)
    assert boards.kept_id(tmp_path, 300) == name != boards.kept_id(tmp_path, -1)


def private_words():
    """What W&B would send of this machine by itself."""
    import getpass
    import platform
    printed = "forward in"
    words = [platform.node(), f'"{getpass.getuser()}"', "requirements.txt", "train.py", printed]
    return [word for word in words if len(word) > 4]  # random bytes hold shorter ones too


def fake_wandb(monkeypatch, board):
    """A package wandb whose runs are `board`; returns the arguments of each init."""
    fake, begun = ModuleType("wandb"), []
    fake.__spec__ = ModuleSpec("wandb", None, origin="fake")
    fake.__version__ = "0.31.0"
    fake.Settings = type("Settings", (), {"model_fields": {}})  # it knows none of ours
    fake.errors = SimpleNamespace(UsageError=KeyError, AuthenticationError=KeyError)
    fake.teardown = lambda: None

    def init(**arguments):
        begun.append(arguments)
        return board(arguments) if callable(board) else board
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return begun


class Broken:
    """A run at W&B whose every message fails."""

    offline, url, settings = False, "https://wandb.example/1", SimpleNamespace(sync_dir="HERE")

    def define_metric(self, *_, **__):
        pass

    def log(self, _):
        raise ConnectionError("the line\nis cut")

    def finish(self, exit_code):
        raise TimeoutError("too slow")


def test_a_fault_of_wandb_ends_no_run(copied, call, monkeypatch):
    """One line, and the rest goes on without it."""
    begun = fake_wandb(monkeypatch, Broken())
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    result = call(train, f"--resume={copied}", "--max_steps=23", "--wandb")
    assert result.returncode == 0 and steps(copied) == list(range(1, 24))
    [line] = [line for line in result.stderr.splitlines() if "W&B" in line]
    assert line == ("warning: W&B: the line; the numbers are on this disk; send them: wandb sync "
                    "HERE")
    [arguments] = begun
    assert (arguments["project"], arguments["name"], arguments["dir"]) == ("mine", "copied", copied)


@pytest.mark.parametrize("second, words", [
    (Broken(), ["unreachable", "the line"]), (None, ["unreachable", "metrics.jsonl alone"])])
def test_without_a_network_the_numbers_stay_on_this_disk(copied, call, monkeypatch, second, words):
    def board(arguments):
        if arguments.get("mode") != "offline":
            raise OSError("unreachable")
        if second is None:
            raise RuntimeError("no room")
        return second
    fake_wandb(monkeypatch, board)
    result = call(train, f"--resume={copied}", "--max_steps=22", "--wandb")
    assert result.returncode == 0 and steps(copied)[-1] == 22
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: W&B")]
    assert len(lines) == 2 and all(word in line for word, line in zip(words, lines, strict=True))


def test_a_wandb_that_would_wait_for_ever_is_refused(copied, call, refused, monkeypatch):
    fake_wandb(monkeypatch, Broken())
    sys.modules["wandb"].__version__ = "0.27.2rc1"
    refused(call(train, f"--resume={copied}", "--max_steps=22", "--wandb"), "0.31", "0.27.2rc1")


@needs_wandb
def test_with_a_server_that_does_not_answer_the_run_is_kept_here(copied, call, monkeypatch):
    """The real package, towards a port where nobody listens."""
    monkeypatch.setattr(boards, "INIT_S", 1)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    result = call(train, f"--resume={copied}", "--max_steps=22", "--wandb")
    assert result.returncode == 0 and result.stderr.count("warning: W&B") == 1
    [(_, _, history)] = offline_runs(copied)
    assert [row["step"] for row in history if "train/loss" in row] == [21, 22]


@needs_wandb
def test_without_a_key_wandb_asks_for_nothing(copied, call, refused, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where the keys of `wandb login` are
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    refused(call(train, f"--resume={copied}", "--max_steps=22", "--wandb"), "wandb login",
            "WANDB_MODE=offline")


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_line_before_data_is_built(tmp_path, tiny_config, call, refused,
                                                            monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    config = tiny_config(tmp_path / "run", data_dir=str(tmp_path / "data"))
    refused(call(train, config, f"--{name}"), f"pip install {name}")
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()


def test_the_numbers_of_a_row():
    """What the two boards get; a tuning's evaluation is in `tuned`."""
    row = {"kind": "eval", "step": 3, "tokens": 5, "seconds": 1.0, "of": [{}], "mfu": None,
           "bits_per_byte": {"web": 1.5}, "tuned": {"loss": 2.5}, "samples": ["text"],
           "tasks": {"piqa": {"accuracy": 0.5, "bits_per_byte": 9.0},
                     "gsm8k": {"bits_per_byte": 3.0}}}
    assert numbers_of("eval", row) == {"eval/web": 1.5, "eval/loss": 2.5, "eval/piqa": 0.5,
                                       "eval/gsm8k": 3.0}


# ---- The best step -------------------------------------------------------------------------------

def evaluation_of(value, bytes=1000, of="domains"):
    """Results of an evaluation whose macro bits per byte are `value`, of two domains."""
    def sums(bits):
        return {"documents": 1, "tokens": 9, "bytes": bytes, "nats": bits * bytes * math.log(2)}
    return {"sums": {"a": sums(value - 0.5), "b": sums(value + 0.5)}, "tasks": {},
            "of": [{"suite": of}]}


def kept_in(folder, method=None, **settings):
    config = train.TrainConfig(run_dir=str(folder), keep_best=True, **settings)
    return Kept(folder, config, {"method": method} if method else {})


@pytest.mark.parametrize("values, best", [
    ([3.0, 2.0, 1.0], 3), ([3.0, 1.0, 2.0], 2), ([1.0, 1.0, 1.0], 1), ([1.0, 2.0, 3.0, 4.0], 1),
    ([math.nan, 2.0, math.nan], 2), ([math.nan, math.inf], None), ([2.0, math.nan, 1.0, 3.0], 3)])
@pytest.mark.parametrize("keep_last, keep_every", [(1, 0), (2, 0), (1, 2)])
def test_the_best_step_is_kept(tmp_path, values, best, keep_last, keep_every):
    """Of equal ones the first. At no moment is the best one so far missing."""
    settings = dict(keep_last=keep_last, keep_every=keep_every)
    kept, log = kept_in(tmp_path, **settings), []
    for step, value in enumerate(values, 1):
        (tmp_path / f"step{step:06d}").mkdir()
        kept.drop_old()  # as Run.save does, before the evaluation
        kept.note(step, evaluation_of(value))
        kept.drop_old()
        log.append({"kind": "eval", "step": step, **evaluation_of(value)})
        finite = [each for each in values[:step] if math.isfinite(each)]
        wanted = {values.index(min(finite)) + 1} if finite else set()
        wanted |= set(range(step - keep_last + 1, step + 1)) & set(range(1, step + 1))
        wanted |= {each for each in range(1, step + 1) if keep_every and each % keep_every == 0}
        assert set(saved_steps(tmp_path)) == wanted
    write_rows(tmp_path / "metrics.jsonl", log)
    for each in (kept, kept_in(tmp_path, **settings)):  # as it is, and as a resumed run reads it
        assert (each.best() or {}).get("step") == best
    assert (tmp_path / "best.json").is_file() == (best is not None)
    if best:
        assert json.loads((tmp_path / "best.json").read_text()) == {
            "step": best, "path": f"step{best:06d}", "measure": "bits per byte (macro)",
            "value": pytest.approx(values[best - 1])}
    Kept(tmp_path, train.TrainConfig(run_dir=str(tmp_path)), {})  # a run that does not keep it
    assert not (tmp_path / "best.json").exists()


def test_only_evaluations_of_the_same_text_are_compared(tmp_path, capsys):
    kept = kept_in(tmp_path, keep_last=1)
    found = ((1, 1.0, "domains"), (2, 3.0, "paloma"), (3, 2.5, "paloma"))
    for step, value, of in found:
        (tmp_path / f"step{step:06d}").mkdir()
        best = kept.note(step, evaluation_of(value, of=of))
        assert best["step"] == step
    assert capsys.readouterr().out.count("other text") == 1
    shutil.rmtree(tmp_path / "step000003")  # what is not there is not the best
    assert kept.best()["step"] == 2
    write_rows(tmp_path / "metrics.jsonl", [
        {"kind": "eval", "step": step, **evaluation_of(value, of=of)} for step, value, of in found])
    assert kept_in(tmp_path).best()["step"] == 2  # as a resumed run reads it


@pytest.mark.parametrize("method, key", [("sft", "loss"), ("dpo", "dpo_loss")])
def test_a_tuning_is_compared_by_its_held_out_answers(tmp_path, method, key):
    """Step 0, the model that is tuned, is no step of the run."""
    kept = kept_in(tmp_path, method)
    for step, value in ((0, 0.1), (4, 0.3), (8, 0.2), (12, 0.4)):
        if step:
            (tmp_path / f"step{step:06d}").mkdir()
        best = kept.note(step, {**evaluation_of(value), "tuned": {key: value}})
    assert (best["step"], best["value"]) == (8, 0.2)


@pytest.mark.parametrize("steps, warmup, said", [
    (60, 100, "rises to 0.00064 "), (100, 100, "rises to 0.000991 "), (1, 1, "rises to 1e-07 "),
    (101, 100, ""), (1, 0, "")])
def test_a_warm_up_that_never_ends_is_said(steps, warmup, said, capsys):
    """Also where both are equal: the last step has the rate after the decay."""
    config = train.TrainConfig(max_steps=steps, warmup_steps=warmup, lr=1e-3, min_lr=1e-7)
    rates = [train.lr_at_step(step, config) for step in range(1, steps + 1)]
    say_warmup(config, train.lr_at_step)
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)
    assert not said or f"{max(rates):.3g} " in out


def test_a_run_keeps_its_best_step_and_says_which_it_is(tmp_path, tiny_config, call, monkeypatch):
    """The learning rate is so high that the model gets worse. Oracle: eval.py of that step."""
    run = tmp_path / "run"
    words = ["--keep_best", "--keep_last=1", "--save_every_steps=7", "--eval_every_steps=5"]
    config = tiny_config(run, warmup_steps=10, lr=1.0, min_lr=1.0)
    result = call(train, config, *words, "--max_steps=18")
    assert result.returncode == 0
    macro = {row["step"]: sum(row["bits_per_byte"].values()) / 2 for row in rows(run, "eval")}
    best = min(macro, key=macro.get)
    assert list(macro) == [5, 10, 15, 18] and best != 18
    assert saved_steps(run) == [best, 18]
    assert rows(run, "eval")[-1]["best"]["step"] == best
    place = run / f"step{best:06d}"
    assert f"the best step: {place.name}, bits per byte (macro) {macro[best]:.4f}" in result.stdout
    assert f"python model.py export {place} {run}-hf" in result.stdout
    assert call(evaluation, place).returncode == 0
    row = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert sum(row["bits_per_byte"].values()) / 2 == pytest.approx(macro[best], rel=1e-6)
    assert call(evaluation, "report", run).returncode == 0
    assert f"{place.name}, bits per byte (macro) {macro[best]:.4f}" in (
        run / "report.html").read_text()
    # it is known when the run goes on, and a fork has the steps of its own directory alone
    assert call(train, f"--resume={run}", "--max_steps=20").returncode == 0
    assert saved_steps(run) == [best, 20]
    assert call(train, f"--resume={run}", f"--run_dir={tmp_path / 'fork'}",
                "--max_steps=22").returncode == 0
    assert json.loads((tmp_path / "fork/best.json").read_text())["step"] in (20, 22)
    assert call(train, f"--resume={run}", "--max_steps=22", "--keep_best=false").returncode == 0
    assert saved_steps(run) == [22] and not (run / "best.json").exists()


def test_an_evaluation_that_was_missed_is_made_up_for(tmp_path, tiny_config, call, refused,
                                                      monkeypatch):
    """Also of a step without a row in the log; what is not evaluated cannot be the best."""
    def stop(*_):
        raise UserError("no memory")
    config = tiny_config(tmp_path / "run", log_every_steps=20, eval_every_steps=4, max_steps=8)
    with monkeypatch.context() as patch:
        patch.setattr("train.evaluate", stop)
        refused(call(train, config, "--keep_best"), "no memory")
    assert saved_steps(tmp_path / "run") == [4] and not rows(tmp_path / "run")
    assert call(train, config, "--keep_best").returncode == 0
    assert steps(tmp_path / "run", "eval") == [4, 8]


def test_keep_best_needs_something_to_compare(tmp_path, tiny_config, finished, request_file, call,
                                              refused):
    config = tiny_config(tmp_path / "run")
    tasks = f"--suite={request_file}"
    refused(call(train, config, "--keep_best", tasks), "keep_best", request_file)
    refused(call(train, config, "--keep_best", "--eval_share=0"), "keep_best", "eval_share")
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": say("u: wo", "a: ba")}] * 4)
    tuning = tmp_path / "tuning.py"
    tuning.write_text(f"train_data = {str(chats)!r}\nrun_dir = {str(tmp_path / 'tuned')!r}\n"
                      f"start_from = {str(finished)!r}\ndevice = 'cpu'\ncompile = 'false'\n")
    refused(call(adapt, tuning, "--keep_best"), "keep_best", "eval_data")
    refused(call(adapt, tuning, "--prompts=file.txt"), "--prompts=file.txt", "generate")


@pytest.mark.parametrize("words, kept", [
    (["--keep_last=2", "--save_every_steps=100"], 2),
    (["--keep_last=2", "--save_every_steps=100", "--keep_best"], 3),
    (["--keep_last=0", "--save_every_steps=100", "--eval_every_steps=150", "--keep_best"], 8),
    (["--keep_last=1", "--save_every_steps=0", "--eval_every_steps=0", "--keep_best"], 1)])
def test_the_plan_counts_the_best_step(tmp_path, tiny_config, call, words, kept):
    """600 steps: multiples of 100 are 6, and 150 and 450 besides."""
    result = call(train, tiny_config(tmp_path / "run", max_steps=600), "--plan", "--gpus=1", *words)
    assert f"for the {kept} that are kept" in result.stdout


# ---- Prompts -------------------------------------------------------------------------------------

PROMPTS = ["def read_", "  two words ", "naïve"]


@pytest.mark.parametrize("name, content", [
    ("p.txt", "def read_\n\n  two words \nnaïve\n"), ("p.txt", "def read_\n  two words \nnaïve"),
    ("p.txt", "\ufeffdef read_\r\n  two words \r\n \r\nnaïve\r\n"),
    ("p.jsonl", "".join(json.dumps({"prompt": each, "id": 1}) + "\n\n" for each in PROMPTS)),
    ("p.json", json.dumps([{"prompt": each} for each in PROMPTS]))])
def test_a_file_of_prompts(tmp_path, capsys, name, content):
    file = tmp_path / name
    file.write_bytes(content.encode())
    assert [prompt for _, prompt in read_prompts(str(file))] == PROMPTS
    blank = name == "p.txt" and content.count("\n\n") + content.count("\n \r\n")
    assert ("1 blank line" in capsys.readouterr().out) == bool(blank)


def test_prompts_from_a_table(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"prompt": PROMPTS, "n": [1, 2, 3]}), tmp_path / "p.parquet")
    assert [prompt for _, prompt in read_prompts(str(tmp_path / "p.parquet"))] == PROMPTS


@pytest.mark.parametrize("name, content, words", [
    ("p.txt", b"", ["holds no prompt"]), ("p.txt", b"\n \n", ["holds no prompt"]),
    ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', [":2", "prompt"]),
    ("p.jsonl", b'{"prompt": ["a"]}\n', [":1", "prompt"]),
    ("p.jsonl", b'{"messages": []}\n', [":1", "generate"]),
    ("p.txt", b"a\xe9\n", [":1", "UTF-8"]), ("p.txt", POINTER, ["LFS"]),
    ("p.pdf", b"a", ["p.pdf"]), ("folder", None, ["folder"]), ("nowhere", None, ["no such file"])])
def test_a_file_that_holds_no_prompts_is_one_line(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    if name == "folder":
        (tmp_path / name).mkdir()
    line = refusal(read_prompts, str(tmp_path / name))
    assert all(word in line for word in [str(tmp_path / name), *words]), line


def test_a_prompt_that_is_too_long_is_told_with_its_place(tmp_path, finished):
    tokenizer = Tokenizer.load(finished / "tokenizer.json")
    file = tmp_path / "p.txt"
    config = evaluation.EvalConfig(prompts=str(file))
    fits = tokenizer.decode(tokenizer.encode("word " * 99)[:30])  # with an EOS before it, 31 of 32
    file.write_text(f"{fits}\n")
    longest = 1 + len(tokenizer.encode(fits))
    assert open_prompts(config, tokenizer, longest + 1) == [fits]
    file.write_text(f"wo\n{fits}\n{fits} wo\n")
    line = refusal(open_prompts, config, tokenizer, longest)
    assert f"{file}:2: " in line and f"{longest} tokens" in line and "2 of the 3" not in line
    assert "2 of 3 prompts" in line
    alone = replace(config, prompts="", prompt=fits)
    assert "prompt: " in refusal(open_prompts, alone, tokenizer, 9)


def test_each_prompt_of_a_file_gets_its_sample(tmp_path, copied, call, refused):
    """The same as with --prompt, in `sample`, in training and for each checkpoint."""
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "wo"}, {"prompt": "ab\nc"}])
    words = ["--max_new_tokens=9", "--temperature=0.9"]
    alone = call(evaluation, "sample", copied, *words, "--prompt=wo", "--prompt=ab\nc").stdout
    assert call(evaluation, "sample", copied, *words, f"--prompts={file}").stdout == alone
    refused(call(evaluation, "sample", copied, f"--prompts={file}", "--prompt=x"), "--prompt=x",
            f"--prompts={file}")
    result = call(train, f"--resume={copied}", "--max_steps=21", f"--prompts={file}", *words)
    assert result.returncode == 0 and "2 samples:\nwo" in result.stdout
    samples = rows(copied, "eval")[-1]["samples"]
    assert [text[:2] for text in samples] == ["wo", "ab"] and samples[1].startswith("ab\nc")
    for _ in range(2):  # the second time nothing is left to do
        result = call(evaluation, copied, "--every_checkpoint", f"--prompts={file}", *words)
    assert result.stdout.count("done already") == len(saved_steps(copied))
    drawn = [json.loads(line) for line in (copied / "eval.jsonl").read_text().splitlines()]
    drawn = [row for row in drawn if row["kind"] == "sample" and row["step"] == 21]
    assert [row["of"]["prompt"] for row in drawn] == ["wo", "ab\nc"]


# ---- A log without a bar -------------------------------------------------------------------------

def test_where_no_bar_is_seen_each_row_of_the_log_is_a_line(copied, call, monkeypatch):
    words = [f"--resume={copied}", "--log_every_steps=4", "--eval_every_steps=0", "--keep_last=1",
             "--keep_best"]
    result = call(train, *words, "--max_steps=30")
    assert result.returncode == 0 and "step/s" not in result.stderr  # a bar's speed
    lines = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    logged = [row for row in rows(copied) if row["step"] > 20]
    assert [row["step"] for row in logged] == [24, 28, 30] and len(lines) == 3
    for line, row in zip(lines, logged, strict=True):
        speed, memory = row["tokens_per_second"], row["peak_memory_gb"]
        for part in (f"step {row['step']} of 30: loss {row['loss']:.3f}, ", " left, ",
                     f"{speed:,.0f} tokens/s", f"{memory:.2f} GB"):
            assert part in line
    assert "0:00:00 left" in lines[-1]
    assert saved_steps(copied) == [30]  # better than step 20, which was the best so far
    monkeypatch.setattr("scaling.run.has_bar", lambda: True)  # at a terminal there is the bar alone
    monkeypatch.setattr("scaling.log.has_bar", lambda: True)
    result = call(train, *words, "--max_steps=34")
    assert "34/34" in result.stderr and " left, " not in result.stderr


def test_the_time_left_is_that_of_the_pace_with_evaluations_in_it(monkeypatch):
    pace, clock = Pace(), [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    window = Window(steps=1, seconds=20.0)
    assert pace.seconds_left(1, 111, window) == 2200.0  # nothing else is known yet
    pace.begin(1)
    clock[0] += 50  # ten steps of 2 s and an evaluation of 30 s
    assert pace.seconds_left(11, 111, window) == 100 * 5.0
    assert pace.seconds_left(111, 111, window) == 0


def test_the_first_step_of_a_start_is_left_out_of_the_speed(copied, monkeypatch):
    """It may compile for half a minute: the next line told of hours that are left."""
    seen = []
    rates = Window.rates
    monkeypatch.setattr(Window, "rates", lambda window, *arguments: seen.append(
        (window.steps, window.tokens)) or rates(window, *arguments))
    train.main([f"--resume={copied}", "--log_every_steps=4", "--eval_every_steps=0",
                "--max_steps=28"])
    assert seen == [(4, 3 * 8 * 32), (4, 4 * 8 * 32)]


# ---- The code has changed ------------------------------------------------------------------------

def test_changed_code_is_named_at_a_resume_and_where_weights_are_loaded(copied, call, tmp_path,
                                                                        tiny_config):
    [start] = log_rows(copied, "starts.jsonl")
    changed = {**start, "files": {**start["files"], "model.py": "0", "adapt.py": "0"}}
    (copied / "starts.jsonl").write_text(json.dumps(changed) + "\n")
    said = f"{copied}: model.py has changed since this run was trained"
    assert call(evaluation, copied).stdout.count(said) == 1
    resumed = call(train, f"--resume={copied}", "--max_steps=21", "--eval_every_steps=0").stdout
    assert "the code has changed since the run's last start: model.py, adapt.py\n" in resumed
    print_line.cache_clear()
    assert said not in call(evaluation, copied).stdout  # today's code has trained it too
    (copied / "starts.jsonl").write_text(json.dumps(changed) + "\n")
    for number, words in enumerate(([f"--resume={copied}"], [f"--start_from={copied}/step000020"],
                                    [f"--start_from={copied}", "--fresh_optimizer"])):
        fork = tiny_config(tmp_path / f"fork{number}", max_steps=22, eval_every_steps=0)
        words = words if number == 0 else [fork, *words]
        print_line.cache_clear()
        result = call(train, *words, f"--run_dir={tmp_path}/fork{number}", "--max_steps=22")
        assert said in result.stdout, result.stderr


# ---- A line is written at once -------------------------------------------------------------------

def test_a_line_is_in_the_file_at_once(tmp_path):
    """stdout of a batch job is a file, into which Python writes 8 KB at a time."""
    with open(tmp_path / "log", "w") as file:
        print("a line", file=Output(file))
        assert (tmp_path / "log").read_text() == "a line\n"


@pytest.mark.slow
def test_of_several_ranks_one_speaks(tmp_path, finished, tiny_config, offline):
    """One run at W&B, a line for each row of the log, the best step and the samples said once."""
    run = tmp_path / "run"
    file = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "wo"}, {"prompt": "ab"}])
    words = ["--log_every_steps=5", "--keep_best", "--keep_last=1", f"--prompts={file}"]
    codes, said = forked_ranks(2, tmp_path / "log", train.main, tiny_config(run), *words,
                               *["--wandb"] * WANDB)
    assert codes == [0, 0], said
    assert len([line for line in said.splitlines() if " left, " in line]) == 4
    assert said.count("the best step: step000020") == said.count("2 samples:") == 1
    assert len(offline_runs(run)) == WANDB and saved_steps(run) == [20]


@pytest.mark.parametrize("path, prompt", [("stdlib", '"def read_"'), ("poems", '"THE BEGINNING')])
def test_the_prompt_that_is_proposed_fits_the_text(tmp_path, path, prompt):
    (tmp_path / "config.json").write_text(json.dumps({"sources": {"s": {"path": path}}}))
    assert example_prompt(tmp_path).startswith(prompt)
