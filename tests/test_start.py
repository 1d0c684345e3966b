"""Where a run goes on from: its tokenizer and data, forks, and directories that are no run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, columns, flip, rows, saved_steps, steps

import train
from corpus.tokenizer import Tokenizer
from support.models import open_model

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


# ---- A run's tokenizer is part of its data -------------------------------------------------------

@pytest.fixture(scope="module")
def learned(tmp_path_factory, sources):
    """A folder with a run of 60 steps on bpe:512; all paths in its config are relative."""
    root = tmp_path_factory.mktemp("learned")
    for name, path in sources.items():
        shutil.copytree(path, root / name)
    settings = TINY | dict(sources={"web": "web", "code": "code"}, data_dir="data", run_dir="run",
                           max_steps=60, lr=1e-2, min_lr=5e-3, eval_every_steps=0,
                           save_every_steps=30)
    (root / "run.py").write_text("".join(f"{key} = {value!r}\n"
                                         for key, value in settings.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main(["run.py"])
    return root


def add_text(folder):
    """60 documents of other words: bpe:512 learns other tokens from them."""
    words = "zyxwv qponm lkjih gfedc aeiou uoiea".split()
    with open(folder / "more.jsonl", "w") as file:
        for i in range(60):
            text = " ".join(words[i * j % 6] for j in range(80))
            file.write(json.dumps({"id": f"more{i}", "text": text}) + "\n")


@pytest.fixture
def grown(learned, tmp_path, monkeypatch):
    """A copy of the folder, with more text; it is the working directory."""
    folder = shutil.copytree(learned, tmp_path / "grown")
    monkeypatch.chdir(folder)
    add_text(folder / "web")
    return folder


def test_added_text_leaves_the_run_its_tokenizer(grown, call, refused):
    run = grown / "run"
    tokenizer = (run / "tokenizer.json").read_bytes()
    before = rows(run)[-1]["loss"]
    words = ["--resume=run", "--max_steps=66", "--accept_changes"]
    line = refused(call(train, *words[:2]), "data_sha256")
    assert "tokenizer" not in line
    result = call(train, *words)
    assert result.returncode == 0, result.stderr
    assert (run / "tokenizer.json").read_bytes() == tokenizer
    raise ValueError(before, [row["loss"] for row in rows(run)[-6:]])
    assert rows(run)[60]["loss"] < before + 0.5
