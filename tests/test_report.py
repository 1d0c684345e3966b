"""eval.jsonl, metrics.jsonl, tables and the report, with rows that are wrong on purpose."""

import copy
import json
import math
import random
import re
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

import eval as evaluation
import train
from configs import ROOT, load_config
from corpus.trace import held_out_of
from model import ModelConfig
from scaling.log import Log
from scaling.machine import flops_per_token
from scaling.code_files import code_version
from support import progress
from support import records as records_module
from support import report as report_module
from support.data_pictures import funnel
from support.files import log_rows, read_json, read_log, to_json, write_json
from support.measured import after_their_bases, numbers, read_evaluations, read_metrics
from support.panels import (clip_limit, domain_panels, runs_by_method, task_panels,
                            training_panels)
from support.page import STYLE, escaped
from support.pictures import Look, Panel, draw, drawing, grid, looks_of
from support.records import cell, domains_table, keys_recorded, record, tasks_table
from support.report import report, settings_part
from support.runs_table import SEED_SPREAD, trained_on
from support.suites import Suite
from support.xz import xz_levels

ODD = [None, True, -1, 10**400, 1.5, 1e308, math.nan, -math.inf, "text", "\ud800", [], [1], {},
       {"a": 1}, {"suite": ["x"]}, [{"dtype": [1]}]]
ODD_LINES = ["", "nonsense", "[1]", "null", '"x"', "{}", "[" * 5000, '{"kind": "eval", "step": 1}',
             '{"kind": [1], "step": 1}', '{"kind": "eval", "step": NaN, "tokens": 1}', "\x00"]


def strict(text):
    """Parses JSON as the standard has it: without NaN and Infinity."""
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, request_file):
    """A run that was evaluated during training and after it."""
    run = tmp_path_factory.mktemp("report") / "run"
    train.main([str(tiny_config(run, max_steps=6, eval_every_steps=3, save_every_steps=3,
                                suite=f"domains,{request_file}"))])
    evaluation.main([str(run), "--every_checkpoint", f"--suite=domains,{request_file}"])
    return run


# ---- Starts --------------------------------------------------------------------------------------

def test_each_start_is_noted(run, tmp_path, tiny_config):
    """Its command, the machine, and what auto became; a new run begins a new list."""
    [row] = log_rows(run, "starts.jsonl")
    assert row["command"] == shlex.join(["python", *sys.argv]) and row["code"] == code_version()
    assert row["step"] == 0
    assert row["device"] == "cpu"
    assert row["dtype"] == "float32"
    assert row["compiled"] is False
    assert row["threads"] == torch.get_num_threads()
    assert row["ranks"] == 1
    copied = shutil.copytree(run, tmp_path / "run")
    train.main([f"--resume={copied}", "--max_steps=7"])
    assert [row["step"] for row in log_rows(copied, "starts.jsonl")] == [0, 6]
    train.main([str(tiny_config(copied, max_steps=2, eval_every_steps=0)), "--overwrite"])
    assert [row["step"] for row in log_rows(copied, "starts.jsonl")] == [0]


# ---- JSON without NaN ----------------------------------------------------------------------------

def test_json_has_no_nan():
    value = {"a": math.nan, "b": [math.inf, (1.5, -math.inf)], "c": {"d": math.nan, "e": "NaN"}}
    assert strict(to_json(value)) == {"a": None, "b": [None, [1.5, None]],
                                      "c": {"d": None, "e": "NaN"}}
    assert strict(to_json({"a": 1.5})) == {"a": 1.5}


def test_every_writer_of_a_run_writes_strict_json(tmp_path):
    state = {"step": 1, "tokens": 2, "seconds": 3.0, "sha256": "x"}
    log = Log(tmp_path, -1)
    log.write("train", state, loss=math.nan)
    log.close()
    record(tmp_path, "eval", state, bits_per_byte={"web": math.nan})
    write_json(tmp_path / "manifest.json", {"share": math.inf})
    for name in ("metrics.jsonl", "eval.jsonl", "manifest.json"):
        assert None in flat(strict((tmp_path / name).read_text()))
    # an older version's log, which is read, and written anew when the run goes on
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN}\n')
    [row] = log_rows(tmp_path)
    assert math.isnan(row["loss"])
    Log(tmp_path, 1).close()
    assert strict((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def flat(value):
    """All values in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [value]
    return [leaf for part in value for leaf in flat(part)]


# ---- Rows of any kind ----------------------------------------------------------------------------

def places(value, path=()):
    """The path of every value inside a JSON value."""
    found = []
    keys = range(len(value)) if isinstance(value, list) else value
    if isinstance(value, (dict, list)):
        for key in keys:
            found += [(*path, key), *places(value[key], (*path, key))]
    return found


def spoiled(row, dice):
    """A copy of a row in which up to three values are missing or of another kind."""
    row = copy.deepcopy(row)
    for _ in range(dice.randint(1, 3)):
        *path, last = dice.choice(places(row) or [("kind",)])
        inner = row
        for key in path:
            inner = inner[key]
        if dice.random() < 0.3:
            inner.pop(last, None) if isinstance(inner, dict) else inner.pop(last)
        else:
            inner[last] = copy.deepcopy(dice.choice(ODD))
    return row


def spoil(run, log, dice):
    lines = []
    for line in (run / log).read_text().splitlines():
        if dice.random() < 0.5:
            line = json.dumps(spoiled(json.loads(line), dice))
        if dice.random() < 0.05:
            line = line[:dice.randint(0, len(line))]
        if dice.random() < 0.1:
            lines.append(dice.choice(ODD_LINES))
        lines.append(line)
    (run / log).write_text("\n".join(lines))


@pytest.mark.parametrize("seed, pictures", [(0, True), *[(seed, False) for seed in range(1, 40)]])
def test_the_report_survives_every_row(run, tmp_path, monkeypatch, seed, pictures):
    """Half of the rows spoiled; no number of the page is nan, and resuming keeps the good rows."""
    copied = tmp_path / "run"
    copied.mkdir()
    for file in run.iterdir():
        if file.is_file():
            shutil.copy(file, copied)
    dice = random.Random(seed)
    spoil(copied, "metrics.jsonl", dice)
    spoil(copied, "eval.jsonl", dice)
    if not pictures:
        monkeypatch.setattr(report_module, "drawing", lambda: None)
    with warnings.catch_warnings(action="error"):
        page = report([copied]).read_text().split("<h2>Samples")[0]
    assert not re.search(r"\b(nan|inf|infinity)\b", page, re.IGNORECASE)
    keys_recorded(copied, run / "step000006")
    Log(copied, 6).close()
    rows, skipped = read_log(copied, "metrics.jsonl")
    assert skipped == 0
    for line in (copied / "metrics.jsonl").read_text().splitlines():
        strict(line)


@pytest.mark.parametrize("manifest", [None, {}, {"sources": [1]}, {"sources": {"web": {}}}])
def test_a_manifest_of_another_form_stops_nothing(run, tmp_path, monkeypatch, manifest):
    """None: a tuned model whose base came from elsewhere. What is not known is not claimed."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "manifest.json").unlink()
    if manifest is not None:
        write_json(copied / "manifest.json", manifest)
    assert "manifest.json" in report([copied]).read_text()
    suite = Suite("one", {"one": run / "metrics.jsonl"}, [])
    state = read_json(copied / "step000006" / "state.json")
    monkeypatch.setattr(records_module, "manifests_behind", lambda *_: [manifest or {}])
    verdict, said = records_module.verdict_on(suite, {"files": ["x"]}, copied, state)
    assert not verdict and "not decontaminated" in said


def test_what_a_report_leaves_out_is_counted(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    assert "no complete rows" not in report([copied]).read_text()
    with open(copied / "eval.jsonl", "a") as file:
        file.write('{"kind": "eval"\n{"kind": "eval", "step": 6}\n'
                   '{"kind": "eval", "step": 6, "tokens": 9, "sums": {"web": {}}}\n')
        file.write('{"kind": "eval", "st')
    said = "eval.jsonl: left out are lines that are no complete rows: 3"
    page = report([copied]).read_text()
    assert said in page and said in capsys.readouterr().out
    assert "results without their size or sums: 1" in page


def test_results_by_another_metric_dtype_or_prompt_are_no_curve(tmp_path):
    """The group with the most steps is drawn, of equal ones the latest; the others are named."""
    def row(step, accuracy, metric="acc_raw", **of):
        return {"kind": "eval", "step": step, "tokens": step, "of": {"dtype": "float32", **of},
                "tasks": {"one": {"questions": 40, "metric": metric, "accuracy": accuracy}}}
    begun = row(3, 0.6, chat=["The answer is:"])
    begun["tasks"]["one"]["answer_begins"] = "The answer is:"
    rows = [row(1, 0.1), row(2, 0.2), row(3, 0.9, "acc_per_char"), row(3, 0.8, dtype="bfloat16"),
            row(3, 0.3), begun]
    found = read_evaluations(tmp_path, {"eval": rows})
    assert [result["accuracy"] for result in found.tasks["one"].values()] == [0.1, 0.2, 0.3]
    assert len(found.left_out) == 3 and all("one" in said for said in found.left_out)
    [said] = [said for said in found.left_out if "bfloat16" in said]
    assert "3 steps" in said and "1 step (at last 80.0% right)" in said and "logs" in said
    found = read_evaluations(tmp_path, {"eval": rows[-2:]})
    assert [result["accuracy"] for result in found.tasks["one"].values()] == [0.6]
    in_training = {**row(1, 0.5), "of": [{"dtype": "float32"}, {"dtype": "float32", "chat": False}]}
    found = read_evaluations(tmp_path, {"eval": [in_training, row(2, 0.2, chat=False)]})
    assert list(found.tasks["one"]) == [1, 2] and not found.left_out


def test_one_sentence_is_of_all_that_was_measured_alike(tmp_path):
    """Three domains measured in two dtypes are one line, with the numbers of all three."""
    rows = []
    for dtype, steps in (("bfloat16", (1, 2)), ("float32", (2,))):
        for step in steps:
            results = {}
            for number, task in enumerate(("a", "b", "c")):
                results[task] = {"questions": 40, "accuracy": number / 10}
            if dtype == "bfloat16" and step == 1:
                del results["c"]
            rows.append({"kind": "eval", "step": step, "tokens": step, "of": {"dtype": dtype},
                         "tasks": results})
    both, alone = read_evaluations(tmp_path, {"eval": rows}).left_out
    assert both.startswith("a, b: ") and "(at last 0.0% right, 10.0% right)" in both
    assert alone.startswith("c: ") and "(at last 20.0% right)" in alone


def test_results_that_cannot_be_shown_are_counted(tmp_path):
    """Half of a result is none; what another version did not measure is only not there."""
    sums = {"documents": 1, "tokens": 2, "bytes": 3, "nats": 4.0}
    task = {"questions": 4, "accuracy": 0.5, "chance": "x", "metric": "acc_raw", "stderr": math.nan}
    for wrong in ({}, 3, *({**sums, key: bad} for key in sums for bad in (None, "1", math.inf))):
        row = {"kind": "eval", "step": 1, "tokens": 1, "sums": {"a": sums, "b": wrong},
               "tasks": {"one": task, "two": {"questions": -1}}}
        found = read_evaluations(tmp_path, {"eval": [row]})
        assert found.sums == {"a": {1: sums}} and found.left_out[0].endswith(": 2")
        assert found.tasks == {"one": {1: {"questions": 4, "accuracy": 0.5, "metric": "acc_raw"}}}


def test_the_prompt_of_one_suite_parts_no_other_results(tmp_path):
    """In training a row holds all suites. Domains have no prompt, and that of a task alone is that
    of the task in its suite; rows of older versions say chat: true.
    """
    def row(step, chat, tasks=(), sums=()):
        of = [{"dtype": "float32"}, {"dtype": "float32", "chat": chat}]
        result = {"questions": 4, "metric": "acc_raw", "accuracy": 0.5}
        return {"kind": "eval", "step": step, "tokens": step, "of": of,
                "tasks": {name: {**result, **more} for name, more in dict(tasks).items()},
                "sums": {name: {"documents": 1, "tokens": 9, "bytes": 9, "nats": 9.0}
                         for name in sums}}
    begun = {"answer_begins": "The answer is:"}
    rows = [row(1, True, {"piqa (chat)": {}}), row(2, ["", ""], {"piqa (chat)": {}}),
            row(3, ["The answer is:"], {"mmlu (chat)": begun, "piqa (chat)": {}}, ["web"]),
            row(4, False, sums=["web"])]
    found = read_evaluations(tmp_path, {"eval": rows})
    assert list(found.tasks["piqa (chat)"]) == [1, 2, 3] and list(found.sums["web"]) == [3, 4]
    assert not found.left_out
    found = read_evaluations(tmp_path, {"eval": [*rows, row(5, True, {"mmlu (chat)": {}})]})
    assert list(found.tasks["mmlu (chat)"]) == [5] and "The answer is:" in found.left_out[0]


# ---- What a class looks at -----------------------------------------------------------------------

def test_the_page_shows_each_checkpoints_samples_the_funnel_and_the_mix(run, monkeypatch):
    """Without matplotlib too. Each source's funnel ends with the documents that were kept."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    content = report([run]).read_text()
    assert [int(step) for step in re.findall(r"<div><h3>step (\d+)</h3><pre>", content)] == [3, 6]
    data = content.split("<h2>The data")[1]
    for name, source in read_json(run / "manifest.json")["sources"].items():
        part = data.split(f"<h3>{name}, documents</h3>")[1].split("</figure>")[0]
        counts = [int(n.replace(",", "")) for n in re.findall(r"stage>([\d,]+) ", part)]
        widths = [float(width) for width in re.findall(r"width:([\d.]+)%", part)]
        assert counts[0] == source["documents in"] and counts[-1] == source["documents"]
        assert widths == [pytest.approx(100 * n / counts[0], abs=0.01) for n in counts]
        assert f"{name}: {source['mix_tokens']:,} tokens, {source['share']:.1%}</span>" in data


def test_what_drops_documents_narrows_the_funnel():
    source = {"documents in": 1000, "held-out documents": 50, "by_rule": {
        "pii": {"edited": 9}, "gopher_repetition": {"dropped": 200}, "document": {"dropped": 150},
        "decontaminate:<b>": {"dropped": 100}}}
    shown = re.findall(r"stage>(.*?)<i style='width:(.*?)%'", funnel("<i>", source))
    assert shown == [("1,000 read", "100.00"),
                     ("900 left: decontaminate:&lt;b&gt; dropped 100", "90.00"),
                     ("700 left: gopher_repetition dropped 200", "70.00"),
                     ("550 left: document dropped 150", "55.00"),
                     ("500 left: 50 are held out", "50.00")]


@pytest.mark.skipif(not shutil.which("xz"), reason="needs the program xz")
def test_xz_compresses_the_text_that_was_measured(run, monkeypatch):
    """As the program xz does, within the few bytes of its header; no other text has its level."""
    rows, _ = read_metrics(run)
    evaluations = read_evaluations(run, rows)
    levels = xz_levels({str(run): evaluations})
    assert sorted(levels) == ["code", "web"]
    for domain, file in held_out_of(run).items():
        text = "".join(json.loads(line)["text"] for line in file.open()).encode()
        size = len(subprocess.run(["xz", "-9", "-c"], input=text, capture_output=True,
                                  check=True).stdout)
        assert levels[domain] == pytest.approx(8 * size / len(text), rel=0.01)
    sums = copy.deepcopy(evaluations.sums)
    sums["web"][max(sums["web"])]["bytes"] += 1
    other = evaluations._replace(sums=sums)
    assert sorted(xz_levels({str(run): other})) == ["code"]
    assert sorted(xz_levels({str(run): evaluations, "other": other})) == ["code"]
    monkeypatch.setattr("support.xz.MOST_BYTES", 10)
    assert xz_levels({str(run): evaluations}) == {}


def test_the_panels_have_their_levels_and_flops(run):
    """The clip limit is drawn over the tokens; FLOPs are tokens times those of a token."""
    rows, _ = read_metrics(run)
    config = read_json(run / "config.json")
    one_run = {str(run): rows}
    panels = {}
    for panel in training_panels(one_run, {str(run): config}, ""):
        panels[panel.title] = panel
    tokens, losses = panels["training loss, nats"].lines[str(run)]
    flops, same = panels["training loss, nats, over FLOPs"].lines[str(run)]
    [model_config] = load_config([str(run / "config.json")], ModelConfig)
    assert same == losses and flops == [n * flops_per_token(model_config) for n in tokens]
    panel = panels["norm of the gradient; dashed: the clip limit"]
    assert panel.limits == {str(run): (tokens, [1.0] * len(tokens))}
    tuned = {str(run): {**config, "method": "dpo"}}
    panels = list(training_panels(one_run, tuned, "dpo"))
    assert panels[0].level == math.log(2)
    assert not any(panel.x == "FLOPs" for panel in panels)


def test_the_clip_limit_is_the_one_of_training():
    """With its warm-up, which begins at step 2; none for a run that does not clip."""
    for settings in ({}, {"grad_clip_warmup_steps": 3}, {"grad_clip": 0.0},
                     {"grad_clip": 2.0, "grad_clip_warmup_steps": 1}):
        config = train.TrainConfig(**settings)
        for step in range(1, 7):
            limit = clip_limit(step, vars(config))
            assert (limit or math.inf) == train.clip_at_step(step, config)
    assert clip_limit(1, {}) is None and clip_limit(1, {"grad_clip": "1"}) is None


# ---- Several runs --------------------------------------------------------------------------------

@pytest.fixture
def two_runs(run, tmp_path):
    """The run, and a copy of it with another loss, another seed and another code."""
    other = shutil.copytree(run, tmp_path / "other")
    config = read_json(other / "config.json")
    config["seed"] += 1
    name = next(iter(config["sources"]))
    config["sources"][name] = {"path": "elsewhere"}
    write_json(other / "config.json", config)
    [*_, last] = [row for row in log_rows(other) if row["kind"] == "train"]
    changed = (other / "metrics.jsonl").read_text().replace(str(last["loss"]), "1.25")
    (other / "metrics.jsonl").write_text(changed)
    start, = log_rows(other, "starts.jsonl")
    files = {**start["files"], "model.py": "0123"}
    (other / "starts.jsonl").write_text(to_json({**start, "code": "0123", "files": files}) + "\n")
    return run, other, last["loss"]


def cells_of(content, name):
    """The cells of a line of the table at the top of a page."""
    content = re.sub("</?span>", "", content)  # around the words of a command
    [line] = re.findall(rf"<tr><td>{re.escape(name)}<td>(.*?)(?=<tr>|</table>)", content)
    return line.split("<td>")


def test_a_table_compares_runs_and_says_how_they_were_started(two_runs, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, loss = two_runs
    content = report([run, other]).read_text()
    assert cells_of(content, "training loss") == [
        f"{loss:.4f} nats", f"1.2500 nats ({1.25 - loss:+.4f})"]
    bits = cells_of(content, "bits per byte, web")
    assert bits[1] == f"{bits[0]} (+0.0000)"
    assert f"<td><span>python</span> <span>{escaped(shlex.quote(sys.argv[0]))}</span>" in content
    code = cells_of(content, "code")
    assert code == [code_version(), "0123; changed in the code here: model.py"]
    command = escaped(shlex.join(["python", *sys.argv]))
    assert cells_of(content, "command") == [command, command]
    different = content.split("Settings and code that differ")[1]
    assert "<td>seed<td>" in different and "<td>model.py<td>" in different
    assert "<td>data.py<td>" not in different
    assert "<td>elsewhere" in content and "<td>(" not in content
    assert content.count("<h2>The data") == 1  # they share it
    (other / "starts.jsonl").unlink()  # of an older version
    assert cells_of(report([run, other]).read_text(), "command") == [command, "-"]


def test_a_continued_run_shows_its_first_command_and_all_starts(two_runs, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    assert "newest command" not in report([run]).read_text()
    [start] = log_rows(other, "starts.jsonl")
    rows = [{**start, "command": "begin", "date": "Monday"},
            {**start, "command": "go on", "date": "Tuesday", "step": 3},
            {**start, "command": "end", "date": "Sunday", "step": 5,
             "files": {**start["files"], "adapt.py": "4567"}}]
    (other / "starts.jsonl").write_text("".join(f"{to_json(row)}\n" for row in rows))
    content = report([run, other]).read_text()
    command, newest_command = (cells_of(content, name) for name in ("command", "newest command"))
    assert command[1] == "begin" and newest_command == ["-", "end"]
    assert cells_of(content, "started")[1] == "Monday"
    assert cells_of(content, "continued") == ["-", "Sunday, after step 5; 3 starts in all"]
    code = cells_of(content, "code")[1]
    assert "changed between its starts: adapt.py; changed in the code here: " in code
    [listed] = re.findall("<summary>other: its 3 starts</summary>(.*?)</details>", content)
    assert re.findall(r"<tr><td>(\w+)<td>(\d)<td>0123<td>([^<]*)", listed) == [
        ("Monday", "0", "begin"), ("Tuesday", "3", "go on"), ("Sunday", "5", "end")]
    (other / "starts.jsonl").write_text('{"kind": "start"}\n{"kind": "start", "files": 1}\n')
    assert cells_of(report([run, other]).read_text(), "command")[1] == "-"


def test_the_spread_between_seeds_stands_below_differences(two_runs, monkeypatch):
    """It is that of the published experiments."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    results = (ROOT / "assets" / "experiments" / "results.md").read_text()
    assert set(re.findall(r"\| unchanged \| 2[\d.]+ ± ([\d.]+) ", results)) == {SEED_SPREAD}
    said = f"standard deviation over three seeds is {SEED_SPREAD}"
    assert said in report([run, other]).read_text()
    assert said not in report([run]).read_text()


def test_code_differs_where_a_run_noted_no_files(two_runs, monkeypatch):
    """One of an older version: the hash of all code is compared."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    [start] = log_rows(other, "starts.jsonl")
    del start["files"]
    (other / "starts.jsonl").write_text(f"{to_json(start)}\n")
    different = report([run, other]).read_text().split("Settings and code that differ")[1]
    assert f"<td>code<td>{code_version()}<td>0123" in different


def test_no_heading_is_without_content(two_runs, monkeypatch):
    """Nor is a run named that has no samples; what nobody needs at once is folded."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    (other / "eval.jsonl").unlink()
    rows = [{key: row[key] for key in row if key != "samples"} for row in log_rows(other)]
    (other / "metrics.jsonl").write_text("".join(f"{to_json(row)}\n" for row in rows))
    content = report([run, other]).read_text()
    headings = re.findall("<h2>(.*?)</h2>", content)
    assert "Samples, run" in headings and "Samples, other" not in headings
    assert "Training" not in headings  # nothing to draw with
    visible = re.sub("<details>.*?</details>", "", content, flags=re.S)
    assert "decontaminated" in content and "decontaminated" not in visible
    parts = re.split("<h2>.*?</h2>", report([other]).read_text())[1:]
    assert all(re.sub("<[^>]*>", "", part).strip() for part in parts)


def test_the_cells_of_the_runs_wrap():
    """They lie in a .scroll, which keeps its lines: a long command printed over its neighbour."""
    [rule] = re.findall(r"\.runs td,\.runs th\{([^}]*)\}", STYLE)
    declared = dict(one.strip().split(":") for one in rule.split(";"))
    assert declared["white-space"] == "normal"
    assert declared["overflow-wrap"] == "anywhere"


def test_a_run_has_one_name_and_one_colour(two_runs, tmp_path):
    pytest.importorskip("matplotlib")
    run, other, _ = two_runs
    content = report([run, other]).read_text()
    looks = looks_of([run, other])
    one, two = looks.values()
    assert (one.label, two.label) == ("run", "other") and one.color != two.color
    for part in re.findall(r"<svg.*?</svg>", content, re.S):
        assert one.color in part and two.color in part
        assert re.match(r'<svg role="img" aria-label="[^"<>]*\brun\b[^"<>]*\bother\b', part)
    assert content.count("<p class=legend>") == 3  # training, held-out text, tasks
    same_name = tmp_path / "elsewhere" / "run"
    labels = [look.label for look in looks_of([run, same_name]).values()]
    assert labels == [str(run), str(same_name)]


def test_a_curve_of_one_point_is_a_bar(two_runs):
    """And a curve is a line; each run's bar has its colour."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    looks = {"a": Look("a", "#ff0000"), "b": Look("b", "#00ff00")}
    for lines, bars in (({"a": ([9], [2.0]), "b": ([9], [1.0])}, 2),
                        ({"a": ([9, 10], [2.0, 1.0]), "b": ([9], [1.0])}, 0)):
        figure, axes = pyplot.subplots()
        panel = Panel("title", lines, 1.5, errors={"a": [0.1] * len(lines["a"][0]), "b": [0.1]})
        draw(axes, panel, looks)
        assert len(axes.patches) == bars
        pyplot.close(figure)


BARS = ((-0.5, 2.0, 0.001), (-3.0, -0.2), (0.0, 0.0), (99.9, 100.0, 2.0))


@pytest.mark.parametrize("values", BARS)
def test_the_value_of_a_bar_can_be_read(values):
    """It is dark, inside the picture, and beside every bar and its error, however short."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(4.2, 1.7), layout="constrained")
    lines = {}
    looks = {}
    for number, value in enumerate(values):
        lines[number] = ([9], [value])
        looks[number] = Look(f"run {number}", "#1f6fb4")
    draw(axes, Panel("title", lines, errors=dict.fromkeys(lines, [0.1])), looks)
    figure.canvas.draw()
    frame = axes.get_window_extent()
    assert [text.get_text() for text in axes.texts] == [f"{value:.4g}" for value in values]
    for text in axes.texts:
        extent = text.get_window_extent()
        assert text.get_color() == "black" and extent.x1 <= frame.x1
        for drawn in [*axes.patches, *axes.lines]:  # a line: an end of an error
            assert not extent.overlaps(drawn.get_window_extent())
    pyplot.close(figure)


def test_numbers_of_other_text_or_questions_are_not_subtracted(two_runs, monkeypatch):
    """Nor a training loss of other data; the pictures say what differs."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    rows = log_rows(other, "eval.jsonl")
    rows = [row for row in rows if row["kind"] == "eval"]
    for row in rows:
        for sums in row.get("sums", {}).values():
            sums["bytes"] += 1
        for result in row.get("tasks", {}).values():
            result["questions"] += 1
    (other / "eval.jsonl").write_text("".join(f"{to_json(row)}\n" for row in rows))
    write_json(other / "manifest.json", read_json(other / "manifest.json") | {"sha256": "other"})
    content = report([run, other]).read_text()
    said = {
        "bits per byte, web": "text",
        "bits per byte, all bytes": "text",
        "made_up": "questions",
        "training loss": "data"}
    for name, what in said.items():
        _, cell_of_other = cells_of(content, name)
        assert cell_of_other.endswith(f" (other {what})")
    found = {}
    for path in (run, other):
        rows, _ = read_metrics(path)
        found[path] = read_evaluations(path, rows)
    panels = [*domain_panels(found, {}), *task_panels(found)]
    assert sorted(panel.title for panel in panels) == [
        "code; the runs' bytes differ",
        "made_up; the runs' questions differ",
        "web; the runs' bytes differ"]


def test_a_number_of_an_earlier_step_says_so(two_runs, monkeypatch):
    """Of a run that was stopped after the last row of its log; it is compared with no other."""
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    for log in ("metrics.jsonl", "eval.jsonl"):
        kept = [row for row in log_rows(other, log) if row["step"] < 6]
        (other / log).write_text("".join(f"{to_json(row)}\n" for row in kept))
    content = report([run, other]).read_text()
    assert cells_of(content, "steps") == ["6 of 6", "6 of 6"]
    tokens, same = cells_of(content.split("<h2>")[0], "tokens")
    assert tokens == same
    for name, step in (("training loss", 5), ("bits per byte, web", 3), ("made_up", 3),
                       ("bits per byte, all bytes", 3)):
        last, earlier = cells_of(content, name)
        assert "step" not in last
        assert earlier.endswith(f" at step {step} (other step)")
    shutil.rmtree(other / "step000006")  # as a crash leaves it
    content = report([run, other]).read_text()
    assert cells_of(content, "steps") == ["6 of 6", "5 of 6"]
    assert "step 5" not in cells_of(content, "training loss")[1]
    (other / "step000003" / "state.json").write_text("{")
    assert cells_of(report([run, other]).read_text(), "steps") == ["6 of 6", "5 of 6"]


def test_tuning_has_pictures_of_its_own(run, tmp_path):
    """Beside pretraining's tokens they would be a sliver, and DPO's loss is of a pair."""
    rows, _ = read_metrics(run)
    config = read_json(run / "config.json")
    base = str(run)
    methods = {base: {}, "chats": {"method": "sft"}, "pairs": {"method": "dpo"},
               "x": {"method": "other"}}
    configs = {name: config | more for name, more in methods.items()}
    shown = {}
    for method, of_method in runs_by_method(dict.fromkeys(configs, rows), configs).items():
        panels = list(training_panels(of_method, configs, method))
        assert {"learning rate", "tokens/s"} < {panel.title for panel in panels}
        for panel in panels:
            assert list(panel.lines) == list(of_method)
        shown[method] = [panel.title for panel in panels if "loss" in panel.title]
    assert shown == {
        "": ["training loss, nats", "training loss, nats, over FLOPs"],
        "sft": ["training loss, nats"],
        "dpo": ["training loss of a pair"],
        "other": ["training loss, nats"]}


@pytest.fixture
def tuned_runs(run, tmp_path):
    """[the run, an SFT of its step 3, a DPO of that SFT's step 6], as their logs would be."""
    runs = [run]
    for method, step in (("sft", 3), ("dpo", 6)):
        base = runs[-1] / f"step{step:06}"
        tuned = shutil.copytree(run, tmp_path / method)
        for file in tuned.glob("step*/state.json"):
            write_json(file, read_json(file) | {"sha256": f"{method} {file.parent.name}"})
        tuned_on = {"base_sha256": read_json(base / "state.json")["sha256"], "data_sha256": method}
        manifest = read_json(tuned / "manifest.json")
        write_json(tuned / "manifest.json", manifest | {"tuned_on": tuned_on})
        config = read_json(tuned / "config.json")
        write_json(tuned / "config.json", config | {"method": method})
        runs.append(tuned)
    return runs


def curves(paths):
    """{title: {name of a run: its tokens}} of the held-out text, as a report on the paths has it.
    """
    found = {}
    configs = {}
    for path in paths:
        rows, _ = read_metrics(path)
        found[str(path)] = read_evaluations(path, rows)
        configs[str(path)] = read_json(path / "config.json")
    shown = {}
    for panel in domain_panels(after_their_bases(found, configs), {}):
        tokens = {path.name: panel.lines[str(path)][0] for path in paths
                  if str(path) in panel.lines}
        shown[panel.title] = tokens
    return shown


def test_the_held_out_curve_of_a_tuned_run_begins_at_the_end_of_its_base(tuned_runs):
    base, chats, pairs = tuned_runs
    own = curves([base])["web"]["run"]  # tokens after steps 3 and 6
    after_sft = [own[0] + tokens for tokens in own]
    after_dpo = [after_sft[-1] + tokens for tokens in own]
    assert curves(tuned_runs)["web"] == {"run": own, "sft": after_sft, "dpo": after_dpo}
    # without the base: the tokens of tuning alone, apart from those of pretraining
    chain = {"sft": own, "dpo": [own[-1] + tokens for tokens in own]}
    assert curves([chats, pairs])["web"] == chain
    shown = curves([base, pairs])
    assert shown["web"] == {"run": own} and shown["web; tuned"] == {"dpo": own}


def test_a_number_that_the_first_run_lacks_stands_beside_its_kind(two_runs, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    text = (other / "eval.jsonl").read_text()
    (other / "eval.jsonl").write_text(text.replace('"made_up"', '"later"'))
    text = (other / "metrics.jsonl").read_text()
    (other / "metrics.jsonl").write_text(text.replace('"made_up"', '"later"'))
    names = re.findall("<tr><td>(.*?)<td>", report([run, other]).read_text().split("<h2>")[0])
    place = names.index("made_up")
    assert names[place:place + 3] == ["made_up", "later", "minutes of training"]
    assert "later" not in report([run]).read_text()


def test_runs_that_name_each_other_as_their_base_end(tuned_runs):
    """As only an edited file can make them."""
    _, chats, pairs = tuned_runs
    manifest = read_json(chats / "manifest.json")
    manifest["tuned_on"]["base_sha256"] = read_json(pairs / "step000006" / "state.json")["sha256"]
    write_json(chats / "manifest.json", manifest)
    assert sorted(curves([chats, pairs])["web"]) == ["dpo", "sft"]


def test_the_page_says_where_the_curves_of_tuned_runs_begin(tuned_runs, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    base, chats, pairs = tuned_runs
    said = report(tuned_runs).read_text().split("<h2>Held-out text</h2>")[1].split("<h2>")[0]
    assert "where its base ended" in said and "alone" not in said
    said = report([base, pairs]).read_text()
    assert "The tokens of dpo are those of tuning alone" in said
    said = report([base]).read_text()
    assert "its base" not in said and "the base" not in said


def test_a_legend_names_the_runs_that_are_drawn(tuned_runs):
    """One alone too, where the page is about several."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    looks = looks_of(tuned_runs)
    base, chats, _ = looks
    panels = [Panel("title", {chats: ([9], [2.0])})]
    [names] = re.findall("<p class=legend>(.*?)</p>", grid(pyplot, panels, looks))
    assert "sft" in names and "run" not in names and "dpo" not in names
    panels = [Panel("title", {base: ([9], [2.0])})]
    assert "legend" not in grid(pyplot, panels, looks_of(tuned_runs[:1]))
    assert grid(pyplot, iter([]), looks) == ""


@pytest.mark.parametrize("most", [3, 2012, 123_456, 17_800_000, 2.5e9, 2.46e12])
@pytest.mark.parametrize("x", ["tokens", "FLOPs"])
def test_the_numbers_of_an_axis_do_not_touch(most, x):
    pyplot = drawing()
    if pyplot is None:
        pytest.skip("needs matplotlib")
    looks = {"a": Look("a", "#1f6fb4")}
    for panel in (Panel("title", {"a": ([0, most], [3.0, 2.0])}, x=x),
                  Panel("title", {"a": ([most], [-most])}, x=x)):
        figure, axes = pyplot.subplots(figsize=(4.2, 2.7), layout="constrained")
        draw(axes, panel, looks)
        figure.canvas.draw()
        extents = [label.get_window_extent() for label in axes.get_xticklabels()]
        for left, right in zip(extents, extents[1:], strict=False):
            assert left.x1 + 3 < right.x0
        pyplot.close(figure)


def test_what_a_tuned_loss_is_of(tmp_path):
    """Another seed, or another base, is no other data; older runs name none."""
    assert trained_on(tmp_path) == trained_on(tmp_path / "none")
    tuned_on = {"data_sha256": "chats", "tokenizer_sha256": "words", "seed": 1}
    seen = []
    for sha256, change in (("a", {}), ("b", {"seed": 2}), ("b", {"data_sha256": "other"})):
        write_json(tmp_path / "manifest.json", {"sha256": sha256, "tuned_on": tuned_on | change})
        seen.append(trained_on(tmp_path))
    assert seen[0] == seen[1] != seen[2]


def test_settings_that_one_run_lacks_are_named(two_runs, monkeypatch):
    monkeypatch.setattr(report_module, "drawing", lambda: None)
    run, other, _ = two_runs
    config = read_json(other / "config.json")
    del config["grad_clip"]
    write_json(other / "config.json", config)
    content = report([run, other]).read_text()
    assert ("<details><summary>1 setting that not every run has</summary><p>grad_clip</p>"
            in content.split("<h2>Settings and code that differ</h2>")[1])
    configs = {"a": {"seed": 1, "run_dir": "a"}, "b": {"seed": 1, "run_dir": "b"}}
    assert settings_part(configs, {}) == []


# ---- Tables --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a", "a much longer name than the others are"])
def test_columns_are_never_glued(name):
    """Nor by short names, nor by large numbers: the words of each line are its cells."""
    result = {"questions": 12345678901, "metric": "acc_per_token", "accuracy": 1.0, "chance": 1.0,
              "stderr": 1.0, "centred": -1.0, "acc_raw": 1.0, "acc_per_token": 1.0,
              "acc_per_char": 1.0, "acc_uncond": 1.0, "bits_per_byte": 123456.7, "greedy": 1.0}
    head, line = tasks_table({name: result}).splitlines()
    assert head.split() == ["task", "questions", "accuracy", "+-", "chance", "centred", "by", "raw",
                            "per_token", "per_char", "uncond", "bits/byte"]
    assert line.removeprefix(name).split() == [
        "12,345,678,901", "100.0", "100.0", "100.0", "-100.0", "acc_per_token", "100.0", "100.0",
        "100.0", "100.0", "123456.7000"]
    del result["accuracy"]
    head, line = tasks_table({name: result}).splitlines()
    assert head.split() == ["set", "answers", "bits/byte", "greedy", "%"]
    assert line.removeprefix(name).split() == ["12,345,678,901", "123456.7000", "100.0"]
    sums = {"documents": 10**12, "tokens": 10**15, "bytes": 10**16, "nats": 1e15}
    head, line = domains_table({name: sums}).splitlines()
    assert head.split() == ["domain", "documents", "tokens", "KB", "nats/token", "bits/byte"]
    assert line.removeprefix(name).split()[:3] == [
        "1,000,000,000,000", "1,000,000,000,000,000", "10,000,000,000,000.0"]


def test_a_number_that_a_row_lacks_is_a_dash():
    for value in (None, math.nan, math.inf, "1", True, [1], 10**400):
        assert numbers({"a": value, "b": 2}) == {"b": 2} and numbers(value) == {}
    assert cell(None, ".1f") == cell(math.nan, ".1f") == "-"
    assert cell(0, ",") == "0" and cell(0.25, ".1f", 100) == "25.0"
    ranked = {"accuracy": 0.5, "chance": 0.25}
    lines = tasks_table({"a": ranked, "b": {"accuracy": math.nan}}).splitlines()
    assert lines[1].split()[:4] == ["a", "-", "50.0", "-"] and lines[3].split() == [
        "average", "-", "-", "-"]


def test_a_domain_of_empty_documents_is_said_and_left_out_of_the_mean():
    whole = {"documents": 1, "tokens": 8, "bytes": 8, "nats": 8 * math.log(2)}
    empty = {"documents": 2, "tokens": 0, "bytes": 0, "nats": 0.0}
    lines = domains_table({"a": whole, "b": empty}).splitlines()
    assert lines[2].split() == ["b", "2", "0", "0.0", "-", "-"]
    assert lines[4].split() == ["(macro)", "1.0000"] and lines[5].startswith("b: ")


# ---- Progress ------------------------------------------------------------------------------------

def evaluate_all(run, request_file, capsys):
    """What an evaluation of the run's domains and a task prints on stderr."""
    capsys.readouterr()
    evaluation.main([str(run), f"--suite=domains,{request_file}"])
    return capsys.readouterr().err


def test_an_evaluation_says_how_far_it_is_where_there_is_no_terminal(
        run, request_file, capsys, monkeypatch):
    """Each SECONDS a line: of the questions and batches of each domain or task, and of its end."""
    assert evaluate_all(run, request_file, capsys) == ""
    monkeypatch.setattr("support.bars.FIRST_S", 0)
    monkeypatch.setattr("support.bars.SECONDS", 0)
    lines = evaluate_all(run, request_file, capsys).splitlines()
    for name in ("web", "code"):
        form = rf"evaluating {name}: batch \d+ of \d+, \d+ s$"
        assert any(re.match(form, line) for line in lines)
    measured = [line.split(", ")[:2] for line in lines if "done" in line]
    assert measured == [
        ["evaluating code: done", "1 of 2"],
        ["evaluating web: done", "2 of 2"],
        ["evaluating made_up: done", "1 of 1"]]
    assert any(line.startswith("evaluating made_up: question 40 of 80") for line in lines)
    monkeypatch.setattr(progress, "rank", lambda: 1)
    monkeypatch.setattr("support.bars.is_silent", lambda: True)
    assert evaluate_all(run, request_file, capsys) == ""


def test_an_evaluation_has_a_bar_on_a_terminal(run, request_file, capsys, monkeypatch):
    """Named for what is measured, and without lines."""
    monkeypatch.setattr("support.bars.FIRST_S", 0)
    monkeypatch.setattr("support.bars.SECONDS", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    shown = evaluate_all(run, request_file, capsys)
    assert "\r" in shown and "web:" in shown and "made_up:" in shown and "done" not in shown
