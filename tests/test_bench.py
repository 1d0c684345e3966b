"""The bench of training steps at its smallest runs to its end, with an adapter."""

import json
import runpy
from functools import partial

import pytest
import torch
from conftest import ROOT

from model import build_model
from support.weights import save_hf

pytest.importorskip("transformers")

from tests.bench import generation, speed  # noqa: E402

ADAPTER = """
import torch
from support.weights import load_model
from tests.bench.speed import OPTIMIZER, update


def build(directory, dtype):
    model = load_model(directory)
    model.compute_dtype = dtype
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)

    def step(tokens):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        return update(model, optimizer, loss)
    return step
"""


@pytest.mark.slow
def test_the_bench_of_a_step_measures_all_sides_and_the_loop(tmp_path, monkeypatch, capsys):
    (tmp_path / "eager.py").write_text(ADAPTER)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "SHAPES", {"tiny": (speed.TINY, 16, 1)})
    monkeypatch.setattr(speed, "loop_share", partial(speed.loop_share, steps=3))
    speed.bench_cpu(str(tmp_path / "eager.py"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["steps"]) == ["tiny, bfloat16", "tiny, float32"]
    for sides in found["steps"].values():
        assert list(sides) == ["nanOLMo", "transformers, as a user runs it",
                               "transformers, our allocator setting", "eager"]
        assert all(side["tokens_per_second"] > 0 < side["peak_mb"] for side in sides.values())
        assert sides["nanOLMo"]["ratio"] == 1
    assert 0.5 < found["loop"] < 2


@pytest.mark.slow
def test_another_models_losses_are_refused(tmp_path, monkeypatch):
    (tmp_path / "lazy.py").write_text(ADAPTER.replace("**OPTIMIZER", "lr=0.0"))
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "SHAPES", {"tiny": (speed.TINY, 16, 1)})
    with pytest.raises(SystemExit, match="lazy: .*losses"):
        speed.bench_cpu(str(tmp_path / "lazy.py"))


@pytest.mark.slow
def test_the_bench_of_generation_compares_ids_and_times(capsys):
    generation.bench_generate([(torch.float32, 2, 8, 6), (torch.bfloat16, 1, 300, 4)], rounds=1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["generate"]
    assert [row["dtype"] for row in found] == ["float32", "bfloat16"]
    assert found[0]["equal"] == 1 and all(row["token ours"] > 0 < row["first theirs"]
                                          for row in found)


@pytest.mark.slow
def test_other_work_is_measured_where_the_adapter_says_so(tmp_path, monkeypatch, capsys):
    lazy = ADAPTER.replace("**OPTIMIZER", "lr=0.0") + "\n\nDOES_OTHER_WORK = True\n"
    (tmp_path / "lazy.py").write_text(lazy)
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "SHAPES", {"tiny": (speed.TINY, 16, 1), "small": None})
    speed.bench_cpu("tiny", "float32", str(tmp_path / "lazy.py"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["steps"]) == ["tiny, float32"] and found["loop"] is None
    assert list(found["steps"]["tiny, float32"])[-1] == "lazy"


NANOGPT = """
from dataclasses import dataclass
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        print("number of parameters")
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=config.bias)

    def forward(self, ids, targets):
        GPT.seen = (self.config, ids, targets)
        logits = self.head(self.wte(ids))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
"""


def test_nanogpt_gets_our_shape_and_the_next_tokens(tmp_path, monkeypatch, capsys):
    """With a stand-in for its checkout, and without the compiler, which takes seconds."""
    save_hf(build_model(speed.TINY, seed=0), tmp_path / "weights")
    (tmp_path / "model.py").write_text(NANOGPT)
    monkeypatch.setenv("NANOGPT", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda model: model)
    adapter = runpy.run_path(str(ROOT / "tests/bench/nanogpt.py"))
    seen = []
    run_path = runpy.run_path
    monkeypatch.setattr(runpy, "run_path", lambda path: seen.append(run_path(path)) or seen[-1])
    step = adapter["build"](tmp_path / "weights", torch.bfloat16)
    tokens = torch.randint(4000, (2, 256))
    losses = [step(tokens) for _ in range(3)]
    assert capsys.readouterr().out == ""  # the bench reads the side's answers there
    assert losses == sorted(losses, reverse=True) and adapter["DOES_OTHER_WORK"]
    config, ids, targets = seen[0]["GPT"].seen
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) == (
        4, 4, 256, 256, 4096)
    assert ids.equal(tokens)
    assert targets[:, :-1].equal(tokens[:, 1:]) and (targets[:, -1] == -1).all()
