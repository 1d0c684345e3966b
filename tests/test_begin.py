"""A run that begins with somebody's weights: a Hugging Face directory, or weights of ours alone."""

import json
import shutil

import pytest
from conftest import ROOT, rows, steps

import eval as evaluation
import model
import train
from eval import EvalConfig
from support.models import open_model
from support.records import domains_table
from support.suites import open_suites
from support.weights import load_model

CONTINUE = ROOT / "configs/continue.py"
# What a run needs besides: small, and no key of the network.
SMALL = ["--dtype=float32", "--compile=false", "--device=cpu", "--batch_size=8", "--max_steps=6",
         "--warmup_steps=2", "--lr=1e-3", "--eval_every_steps=3", "--log_every_steps=1",
         "--eval_share=0.2", "--max_new_tokens=4", "--workers=1"]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run as a Hugging Face directory; no test changes it."""
    pytest.importorskip("safetensors")
    out = tmp_path_factory.mktemp("exported") / "OUT"
    model.main(["export", str(finished), str(out)])
    return out


@pytest.fixture
def begin(tmp_path, sources, monkeypatch, call):
    """Runs train.py with configs/continue.py and one of the two sources in an empty directory."""
    monkeypatch.chdir(tmp_path)
    text = f"--sources={ {'mine': sources['code']} }"

    def run(*words, config=CONTINUE):
        return call(train, config, *SMALL, text, *words)
    return run


def state_of(run, step):
    return json.loads((run / f"step{step:06d}/state.json").read_text())


def test_a_run_begins_with_the_weights_of_a_directory(begin, exported, tmp_path, call, one_thread):
    """Bar: before step 1 it is worth what eval.py says of the directory. Then it goes on alone."""
    out = tmp_path / "OUT"
    shutil.copytree(exported, out)
    result = begin("--start_from=OUT", "--run_dir=run")
    assert result.returncode == 0, result.stderr
    assert "weights of OUT" in result.stdout and "step 0: bits per byte" in result.stdout
    run = tmp_path / "run"
    assert steps(run) == [1, 2, 3, 4, 5, 6] and steps(run, "eval") == [0, 3, 6]
    settings = json.loads((run / "config.json").read_text())
    there = vars(load_model(exported).config)
    assert {key: settings[key] for key in there} == there
    assert settings["fresh_optimizer"] and settings["start_from"] == "OUT"
    began = state_of(run, 6)["began"]
    assert began["weights"] == str(out) and len(began["sha256"]) == 64
    assert json.loads((run / "manifest.json").read_text())["began"] == began

    [manifest] = (tmp_path / "datasets").rglob("manifest.json")
    suite = str(manifest.parent / "held_out/mine.jsonl")
    first, _, last = (row["sums"]["mine"] for row in rows(run, "eval"))
    assert domains_table({"mine.jsonl": first}) in call(evaluation, out, f"--suite={suite}").stdout
    config = EvalConfig(suite=suite)
    network, tokenizer, _ = open_model(out, config)
    there = evaluation.evaluate(network, tokenizer, open_suites(config), config)["sums"]
    assert there == {"mine.jsonl": first}
    assert last["nats"] < first["nats"]
