"""The bench of training steps at its smallest runs to its end, with an adapter."""

import json
from functools import partial

import pytest
import torch

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
