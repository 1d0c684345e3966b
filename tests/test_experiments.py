"""The experiments: each patch fits and trains; runs are resumed; tables hold means and spreads."""

import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_forks import (check_second_document, forget, imported,
                        train_resume_and_evaluate)

from configs import load_config
from corpus.documents import is_held_out
from experiments import __main__ as program
from experiments import catalogue, corpora, results, runs
from experiments.catalogue import EXPERIMENTS, UNCHANGED, Experiment, short, tuned
from model import count_parameters
from train import SCHEMAS

VARIANTS = {variant.name: variant for experiment in EXPERIMENTS for variant in experiment.variants}
PATCHES = sorted(path.stem for path in (ROOT / "experiments").glob("*.patch"))
DOC = (ROOT / "docs/experiments.md").read_text()
README = (ROOT / "README.md").read_text()
PICTURES = ROOT / "assets/experiments"
RESULTS = (PICTURES / "results.md").read_text()


# ---- The catalogue -------------------------------------------------------------------------------

def test_a_name_stands_for_one_run_and_every_patch_is_used():
    for experiment in EXPERIMENTS:
        for variant in experiment.variants:
            assert VARIANTS[variant.name] == variant
    assert {variant.patch for variant in VARIANTS.values()} - {""} == set(PATCHES)
    assert len(EXPERIMENTS) >= 12


def test_the_options_load_and_say_what_they_mean(tmp_path):
    configs = {}
    for name, variant in VARIANTS.items():
        if not variant.after and variant.patch != "wsd":  # that one is a value of the patched code
            argv = runs.command_of(variant, 6198, tmp_path)[1:]
            configs[name] = load_config([str(ROOT / argv[0]), *argv[1:]], *SCHEMAS)
    rates = [config[3].lr for config in configs.values()]
    assert max(rates) / min(rates) == pytest.approx(30)
    assert all(config[3].min_lr == pytest.approx(config[3].lr / 10) for config in configs.values())
    betas = re.findall(r"--beta=(0\.\d+)", str(EXPERIMENTS))
    assert max(map(float, betas)) / min(map(float, betas)) == pytest.approx(30)
    assert configs["no_warmup"][3].warmup_steps == 0 < configs["unchanged"][3].warmup_steps
    small, large = (configs[f"vocabulary_{size}"][0] for size in (1024, 16384))
    assert (small.vocab_size, large.vocab_size) == (1024, 16384)
    assert count_parameters(large) > 2 * count_parameters(configs["unchanged"][0])


def test_the_doc_lists_what_is_run():
    for experiment in EXPERIMENTS:
        assert "\n".join(program.listed([experiment])).strip() in DOC, experiment.name


def test_the_doc_tells_the_steps_of_the_base_and_of_equal_bytes():
    steps, warmup_steps = catalogue.SHORT[:2]
    assert f"python train.py configs/tiny.py {steps} {warmup_steps} " in DOC
    assert "for 150 steps" in DOC and steps == "--max_steps=150"
    found = re.search(r"([\d,]+) tokens with 1,024 ids,\s+([\d,]+) with 4,096 and ([\d,]+)", DOC)
    smallest, base, largest = (int(number.replace(",", "")) for number in found.groups())
    for name, tokens in (("vocabulary_1024", smallest), ("vocabulary_16384", largest)):
        assert VARIANTS[name].options[-1] == f"--max_steps={round(150 * tokens / base)}"


def test_the_doc_tells_the_number_and_the_time_of_all_runs():
    """Three of each variant; a table has their mean seconds in its last column."""
    rows = re.findall(r"^\| (\w[\w.]*) \|.* (\d+) \|$", RESULTS, re.M)
    seconds = {name: int(number) for name, number in rows}
    assert set(seconds) == set(VARIANTS)
    count, minutes = re.search(r"(\d+) runs, (\d+) minutes in all", DOC).groups()
    assert int(count) == 3 * len(VARIANTS)
    assert int(minutes) == pytest.approx(3 * sum(seconds.values()) / 60, abs=1)


def section_of(text, heading):
    """The part of a text below this heading, until the next heading of its level."""
    marks = heading.split()[0]
    return text.partition(f"\n{heading}\n")[2].partition(f"\n{marks} ")[0]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=[each.name for each in EXPERIMENTS])
def test_the_doc_holds_the_results(experiment):
    """The tables that --publish wrote; what is written about them has no other figures."""
    results_here = section_of(RESULTS, f"## {experiment.name}")
    assert experiment.hypothesis in results_here
    lines = [line for line in results_here.splitlines() if line.startswith("|")]
    table = "\n".join(lines)
    section = section_of(DOC, f"### {experiment.name}")
    assert table in section
    seconds = [line.split("|")[-2].strip() for line in lines[2:]]
    assert all(float(each) < 240 for each in seconds if each)
    said = section.partition(table)[2]
    assert re.findall(r"^(Outcome|What it (?:means|does not mean)): .", said, re.M) == [
        "Outcome", "What it means", "What it does not mean"]
    numbers = re.findall(r"\d+\.\d+", re.sub(r"arXiv \S+", "", said))
    assert set(numbers) <= set(re.findall(r"\d+\.\d+", table))


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=[each.name for each in EXPERIMENTS])
def test_the_doc_shows_a_picture_and_says_what_is_seen(experiment):
    section = section_of(DOC, f"### {experiment.name}")
    place = re.escape(f"(../assets/experiments/{experiment.name}.svg)")
    [words] = re.findall(rf"!\[([^\]]+)\]{place}", section)
    assert len(words) > 60
    picture = (PICTURES / f"{experiment.name}.svg").read_text()
    assert len(picture) < 45_000
    assert all(f">{variant.name}<" in picture for variant in experiment.variants)


# ---- The patches ---------------------------------------------------------------------------------

@pytest.fixture
def patched(tmp_path, monkeypatch):
    """patched(PATCH): the modules of a copy of the code with that patch, until the test ends."""
    folder = tmp_path / "code"

    def make(name):
        return imported(runs.patched_code(name, folder), monkeypatch)
    yield make
    forget(folder)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_fits_trains_resumes_and_evaluates(patched, tiny_config, tmp_path, name):
    code = patched(name)
    run = tmp_path / "run"
    changes = {"schedule": "wsd"} if name == "wsd" else {}
    config = tiny_config(run, max_steps=3, warmup_steps=1, eval_every_steps=3, save_every_steps=1,
                         keep_last=3, **changes)
    tensors = train_resume_and_evaluate(code, config, run)
    check = globals().get(f"check_{name}")
    check(code, run, tensors)


def check_wsd(code, run, tensors):
    """Constant after the warm-up until four fifths have passed, then down to min_lr."""
    config = code.train.TrainConfig(schedule="wsd", warmup_steps=10, max_steps=110, lr=1.0,
                                    min_lr=0.1)
    rates = [code.train.lr_at_step(step, config) for step in (10, 50, 90, 100, 110)]
    assert rates == pytest.approx([1, 1, 1, 0.55, 0.1])


def check_learned_gain(code, run, tensors):
    gains = [tensor for name, tensor in tensors.items()
             if re.fullmatch(r"model\.blocks\.\d\.(attn|mlp)_gain", name)]
    assert len(gains) == 4 and all(gain.ne(1).any() for gain in gains)


def small_model(code):
    config = code.model.ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48)
    return code.model.build_model(config, 0)


def check_no_rope(code, run, tensors):
    """A token that is told another position, and sees the same tokens, predicts the same."""
    model = small_model(code)
    tokens = torch.tensor([[5, 6, 7, 8]])
    logits = [model(tokens, positions=torch.tensor([positions]))
              for positions in ([0, 1, 2, 3], [9, 2, 40, 1])]
    assert torch.equal(*logits)


def check_gelu(code, run, tensors):
    """With 1.5 times the width there are as many parameters as in SwiGLU."""
    config = code.model.ModelConfig(mlp_hidden_size=1056)
    assert code.model.count_parameters(config) == 5_308_416
    assert "--mlp_hidden_size=1056" in VARIANTS["gelu"].options
    mlp = small_model(code).blocks[0].mlp
    x = torch.randn(3, 32)
    hidden = torch.nn.functional.gelu(x @ mlp.ff_proj.weight.T)
    assert torch.allclose(mlp(x), hidden @ mlp.ff_out.weight.T, atol=1e-6)


def check_document_mask(code, run, tensors):
    check_second_document(code, small_model(code), eos_token_id=4095)


def check_sft_all_tokens(code, run, tensors):
    """Training counts each token of a chat but the first; held-out chats count their answers."""
    chats = run.parent / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [
        {"role": "user", "content": "the"}, {"role": "assistant", "content": "a"}]}) + "\n")
    base = importlib.import_module("support.models").open_base(str(run), "size")
    tokenizer = importlib.import_module("support.vocabulary").open_tokenizer(
        base.home / "tokenizer.json", base.model_config)
    config = code.adapt.AdaptConfig(train_data=str(chats), eval_data=str(chats))
    [[trained], [held_out]] = code.adapt.read_sets(config, base, tokenizer)
    assert trained.trained.all() and not held_out.trained.all()
    assert held_out.trained[held_out.prompt:].any() and (trained.ids == held_out.ids).all()


# ---- The texts -----------------------------------------------------------------------------------

def test_the_texts_hold_the_copies_and_the_leaked_set(tmp_path, monkeypatch):
    def docstrings(source):
        for number in range(400):
            yield {"id": f"docstrings/{number}", "text": f"text {number}", "source": source,
                   "metadata": {"split_group": f"group {number}"}}
    monkeypatch.setattr(corpora, "stdlib_documents", docstrings)
    monkeypatch.setattr(corpora, "leaked_docstrings", lambda share: {"docstrings/0"})
    corpora.write_corpora(tmp_path / "corpora")

    def read(file):
        lines = (tmp_path / "corpora" / file).read_text().splitlines()
        return [json.loads(line) for line in lines]
    clean = read("clean/docstrings.jsonl")
    leaked_set = read("leaked_set.jsonl")
    assert len(clean) + len(leaked_set) == 399 and leaked_set
    assert all(is_held_out(document, 0.05) for document in leaked_set)
    for folder, times in (("copies", 19), ("leaked", 10)):
        assert read(f"{folder}/docstrings.jsonl") == clean
        more = read(f"{folder}/more.jsonl")
        assert not any(is_held_out(document, 0.05) for document in more)
        texts = [document["text"] for document in more]
        assert {texts.count(text) for text in texts} == {times}
    copied = {document["text"] for document in read("copies/more.jsonl")}
    assert 0.05 < len(copied) / len(clean) < 0.15
    held_out = {document["text"] for document in clean if is_held_out(document, 0.05)}
    assert held_out and not copied & held_out
    leaks = {document["text"] for document in read("leaked/more.jsonl")}
    assert leaks == {document["text"] for document in leaked_set}


# ---- The runner ----------------------------------------------------------------------------------

BASE = short("base")
ONE = Experiment("one", "It changes.", (catalogue.BITS,), (BASE, short("other", "--lr=1e-3")))
TWO = Experiment("two", "It tunes.", (catalogue.PREFERRED,),
                 (tuned("dpo", BASE, "dpo"), tuned("beta", BASE, "dpo", "--beta=1")))


@pytest.fixture
def started(monkeypatch):
    """The commands that were started; each "run" writes its figures, or fails if told to."""
    calls = []

    def start(words, folder, log):
        options = dict(word.partition("=")[::2] for word in words if word.startswith("--"))
        run = Path(options["--run_dir"])
        calls.append((run.name, words, folder))
        if start.fails == run.name:
            return 1
        run.mkdir(exist_ok=True)
        seed = int(options.get("--seed", 6198)) - 6198
        nats = 693.147 * (2 + 0.1 * seed + 0.5 * ("--lr" in options))
        row = {"kind": "eval", "step": 1, "tuned": {"accuracy": 0.75}, "sums": {
            "code": {"documents": 1, "tokens": 100, "bytes": 1000, "nats": nats}}}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        return 0
    start.fails = None
    monkeypatch.setattr(runs, "start", start)
    monkeypatch.setattr(program, "EXPERIMENTS", [ONE, TWO])
    return SimpleNamespace(calls=calls, start=start)


def names_of(calls):
    return [name for name, _, _ in calls]


def test_all_is_run_once_and_nothing_again(started, tmp_path, capsys):
    argv = ["--seeds=2", f"--out={tmp_path}"]
    program.main(argv)
    assert names_of(started.calls) == [
        "base-seed6198", "other-seed6198", "base-seed6199", "other-seed6199",
        "dpo-seed6198", "beta-seed6198", "dpo-seed6199", "beta-seed6199"]
    table = (tmp_path / "results.md").read_text()
    assert "| base | 2.0500 ± 0.0707 |  | 0 |" in table
    assert "| other | 2.5500 ± 0.0707 | +0.5000 ± 0.0000 | 0 |" in table
    assert "| beta | 0.7500 ± 0.0000 | +0.0000 ± 0.0000, within the spread | 0 |" in table
    assert "| other | 2.5500" in capsys.readouterr().out
    started.calls.clear()
    program.main(argv)
    assert started.calls == []


def test_only_and_seeds_choose(started, tmp_path):
    program.main(["--only=two", "--seeds=1", f"--out={tmp_path}"])
    assert names_of(started.calls) == ["base-seed6198", "dpo-seed6198", "beta-seed6198"]
    assert "not yet run" in (tmp_path / "results.md").read_text()  # of the other one
    with pytest.raises(ValueError, match="only=tow.*two"):
        program.main(["--only=tow", f"--out={tmp_path}"])


def test_a_run_that_failed_continues(started, tmp_path):
    started.start.fails = "other-seed6198"
    argv = ["--only=one", "--seeds=1", f"--out={tmp_path}"]
    with pytest.raises(ValueError, match="other-seed6198: ended with exit code 1"):
        program.main(argv)
    started.start.fails = None
    program.main(argv)
    assert names_of(started.calls) == ["base-seed6198", "other-seed6198", "other-seed6198"]
    assert "--overwrite" not in started.calls[-1][1]


def test_the_seconds_of_all_starts_are_added_up(started, tmp_path, monkeypatch):
    """Also those of a start that Ctrl-C ended."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock.now)

    def start(words, folder, log):
        clock.now += 20
        if clock.now < 30:
            raise KeyboardInterrupt
        return started.start(words, folder, log)
    monkeypatch.setattr(runs, "start", start)
    with pytest.raises(KeyboardInterrupt):
        runs.finish(BASE, 6198, tmp_path)
    record = runs.finish(BASE, 6198, tmp_path)
    assert record["seconds"] == 40 and "--overwrite" not in started.calls[-1][1]
    assert json.loads((tmp_path / "runs/base-seed6198.json").read_text()) == record


def test_a_stopped_run_ends_before_the_command_does(tmp_path):
    """What it prints after Ctrl-C is in its log, behind that of earlier starts."""
    log = tmp_path / "log"
    log.write_text("an earlier start\n")
    words = ["-c", "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(1); "
                   "print('saved')"]
    with pytest.raises(KeyboardInterrupt):
        runs.start(words, tmp_path, log)
    first, *_, last = log.read_text().splitlines()
    assert (first, last) == ("an earlier start", "saved")


@pytest.mark.parametrize("changed", ["code_version", "file_sha256"])  # the second: of the config
def test_changed_code_is_said_and_changes_no_result(started, tmp_path, monkeypatch, capsys,
                                                    changed):
    argv = ["--only=one", "--seeds=1", f"--out={tmp_path}"]
    program.main(argv)
    assert "code has changed" not in capsys.readouterr().out
    monkeypatch.setattr(runs, changed, lambda *_: "other")
    started.calls.clear()
    program.main(argv)
    assert "changed since 2 finished runs, such as base-seed6198" in capsys.readouterr().out
    assert started.calls == []


def test_another_option_or_patch_overwrites(started, tmp_path, monkeypatch):
    """Also the runs that are tuned from the changed one."""
    argv = ["--seeds=1", f"--out={tmp_path}"]
    program.main(argv)
    started.calls.clear()
    base = BASE._replace(options=("--lr=2e-3",))
    dpo = TWO.variants[0]._replace(after=base)
    monkeypatch.setattr(program, "EXPERIMENTS",
                        [ONE._replace(variants=(base, ONE.variants[1])),
                         TWO._replace(variants=(dpo, TWO.variants[1]._replace(after=base)))])
    program.main(argv)
    assert names_of(started.calls) == ["base-seed6198", "dpo-seed6198", "beta-seed6198"]
    assert all("--overwrite" in words for _, words, _ in started.calls)


def test_a_patch_runs_in_its_copy(started, tmp_path, monkeypatch):
    """Also where the copy lies inside a repository, as runs/experiments does."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    patched = Experiment("gain", "", (catalogue.BITS,), (short("gain", patch="learned_gain"),))
    monkeypatch.setattr(program, "EXPERIMENTS", [patched])
    program.main(["--seeds=1", f"--out={tmp_path}"])
    [(_, _, folder)] = started.calls
    assert "mlp_gain" in (folder / "model.py").read_text()
    assert "mlp_gain" not in (ROOT / "model.py").read_text()


def test_one_seed_has_no_spread():
    assert results.with_spread([1.5]) == "1.5000" and results.with_spread([]) == "not yet run"
    records = {0: {"figures": {"x": 2.0}}}
    assert results.difference("x", records, {0: {"figures": {"x": 1.5}}}) == "+0.5000"


def test_the_commands_of_the_docs_name_experiments_and_options():
    commands = re.findall(r"^python -m experiments.*", README + DOC, re.M)
    assert len(commands) >= 5
    for line in commands:
        [config] = load_config(shlex.split(line, comments=True)[3:], program.ExperimentsConfig)
        assert config.chosen()
    patches = re.findall(r"git apply (?:-R )?experiments/(\w+)\.patch", README + DOC)
    assert patches and set(patches) <= set(PATCHES)


# ---- What is published ---------------------------------------------------------------------------

def test_a_table_takes_the_place_of_the_older_one(started):
    """In the section of its experiment alone; a doc without a place for it is an error."""
    doc = ("### zero\n\n| variant | bits per byte | x |\n\n"
           "### one\n\n| variant | options |\n\n| variant | bits per byte | old |\n| base | 1 |\n\n"
           "meaning\n\n### two\n\nend\n")
    lines = ["| variant | bits per byte | new |", "| base | 2 |"]
    found = results.with_table(doc, ONE, lines)
    old = "| variant | bits per byte | old |\n| base | 1 |\n"
    assert found == doc.replace(old, "\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="two: has no table"):
        results.with_table(doc, TWO, lines)


def test_a_part_of_the_seeds_is_said():
    records = {"base": {0: {"figures": {catalogue.BITS: 2.0}, "seconds": 8.4},
                        1: {"figures": {catalogue.BITS: 3.0}, "seconds": 8.4}},
               "other": {1: {"figures": {catalogue.BITS: 3.5}, "seconds": 9.0}}}
    assert results.table(ONE, records, 2)[2:] == [
        "| base | 2.5000 ± 0.7071 |  | 8 |", "| other (1 of 2 seeds) | 3.5000 | +0.5000 | 9 |"]


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with a doc that has a place for a table of each experiment."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/experiments.md").write_text(
        "### one\n\n| variant | bits per byte |\n\n### two\n\n"
        f"| variant | {catalogue.PREFERRED} |\n\n")
    monkeypatch.setattr(program, "ROOT", tmp_path)
    return tmp_path


def contents(folder):
    """{file: its bytes} of the published files."""
    files = [*folder.glob("docs/*"), *folder.glob("assets/*/*")]
    return {file.name: file.read_bytes() for file in files}


def test_publishing_writes_tables_and_pictures(started, published):
    """A picture has a curve for each variant, and a dot for each seed of each figure."""
    pytest.importorskip("matplotlib")
    out = published / "out"
    argv = ["--seeds=2", f"--out={out}"]
    program.main(argv)
    for log in out.glob("runs/*/metrics.jsonl"):
        with open(log, "a") as file:
            for step in (1, 2):
                file.write(json.dumps({"kind": "train", "step": step, "tokens": step, "loss": 3.0,
                                       "rewards/margins": 1.0}) + "\n")
    started.calls.clear()
    program.main([*argv, "--publish"])
    assert started.calls == []
    tables = (published / "assets/experiments/results.md").read_text()
    assert tables == (out / "results.md").read_text()
    assert tables.count(f"\n\n4 runs, 0 minutes, on {runs.this_machine()}.\n") == 2
    doc = (published / "docs/experiments.md").read_text()
    assert "| other | 2.5500 ± 0.0707 | +0.5000 ± 0.0000 | 0 |" in doc
    picture = (published / "assets/experiments/one.svg").read_text()
    assert all(f">{name}<" in picture for name in ("base", "other", catalogue.BITS))
    margins = (published / "assets/experiments/two.svg").read_text()
    assert ">DPO: margin of the rewards<" in margins


def test_publishing_keeps_what_it_has_no_run_of(started, published, monkeypatch):
    """The tables and pictures of other experiments; without any run it is an error."""
    monkeypatch.setattr(program, "draw_pictures", lambda shown, *rest: drawn.append(
        [experiment.name for experiment in shown]))
    drawn = []
    out = f"--out={published / 'out'}"
    program.main(["--seeds=2", out])
    program.main(["--seeds=2", out, "--publish"])
    before = contents(published)
    fresh = f"--out={published / 'fresh'}"
    with pytest.raises(ValueError, match="no finished run of these experiments"):
        program.main(["--publish", fresh])
    program.main(["--only=one", "--seeds=1", fresh])
    with pytest.raises(ValueError, match="no finished run of these experiments"):
        program.main(["--publish", "--only=two", fresh])
    assert contents(published) == before
    for argv in (["--only=one"], []):  # both hold the same: there is no other run
        program.main(["--seeds=1", fresh, "--publish", *argv])
        after = contents(published)
        for name in ("experiments.md", "results.md"):
            old, new = (text[name].decode().split("two") for text in (before, after))
            assert old[1] == new[1] and "| base | 2.0500 ±" in old[0]
            assert "| base | 2.0000 |" in new[0]
    assert drawn == [["one", "two"], ["one"], ["one"]]


def test_a_record_names_the_machines_of_its_starts(started, tmp_path, monkeypatch):
    """Another machine that writes the tables is not among them; one of an older version names none.
    """
    def finish_on(machine):
        monkeypatch.setattr(runs, "this_machine", lambda: machine)
        return runs.finish(BASE, 6198, tmp_path)
    started.start.fails = "base-seed6198"
    for _ in range(2):
        with pytest.raises(ValueError, match="exit code"):
            finish_on("4 cores")
    started.start.fails = None
    record = finish_on("8 cores")
    assert record["machines"] == ["4 cores", "8 cores"]
    monkeypatch.setattr(runs, "this_machine", lambda: "a writer")
    records = program.finished(ONE, [6198], tmp_path, ())
    assert results.how_run(records) == "1 run, 0 minutes, on 4 cores and on 8 cores."
    file = tmp_path / "runs/base-seed6198.json"
    del record["machines"]
    file.write_text(json.dumps(record))
    records = program.finished(ONE, [6198], tmp_path, ())
    assert results.how_run(records).endswith("on a writer.")


# ---- A real one ----------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_first_command_runs(tmp_path, capsys):
    """Two small runs and a patched one: figures, a table, a patched copy."""
    extra = ("--max_steps=2 --warmup_steps=1 --compile=false --d_model=32 --n_layers=2 --n_heads=2 "
             "--mlp_hidden_size=64 --max_new_tokens=5")
    argv = ["--only=no_warmup,learned_gain", "--seeds=1", f"--out={tmp_path}", f"--extra={extra}"]
    program.main(argv)
    table = (tmp_path / "results.md").read_text()
    assert re.search(r"\| no_warmup \| \d\.\d{4} \| [+-]\d\.\d{4} \| \d+ \|", table)
    assert re.search(r"\| learned_gain \| \d\.\d{4} \| [+-]\d\.\d{4} \| \d+ \|", table)
    assert UNCHANGED.name in table
