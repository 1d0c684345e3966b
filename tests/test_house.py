"""The house rules of the project, read from its sources: who imports whom, what runs at import, and
the shipped configs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapt import AdaptConfig
from configs import load_config
from data import DataConfig
from eval import EvalConfig
from model import ModelConfig, OLMo
from train import TrainConfig


ROOT = Path(__file__).resolve().parent.parent
LINE = ["configs", "model", "data", "eval", "train", "adapt"]
MAY_IMPORT = {"configs": set(), "model": {"configs"}, "data": {"configs"},
              "eval": {"configs", "model", "data"}, "train": {"configs", "model", "data", "eval"},
              "adapt": {"configs", "model", "data", "eval", "train"}}
SHIPPED = sorted(path.name for path in (ROOT / "configs").glob("[a-z]*.py"))


def source_of(room):
    return ROOT / ("configs/__init__.py" if room == "configs" else f"{room}.py")


@pytest.mark.parametrize("room", [room for room in LINE if source_of(room).is_file()])
def test_imports_form_a_line(room):
    tree = ast.parse(source_of(room).read_text())
    imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(tree)
                 if isinstance(node, ast.ImportFrom) and node.module}
    assert imported & set(LINE) <= MAY_IMPORT[room]


@pytest.mark.parametrize("room", ["model", "data", "eval"])
def test_the_rooms_before_train_know_no_rank(room):
    """Of torch.distributed, model.py alone names the reader of step directories, and no more."""
    tree = ast.parse(source_of(room).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    distributed = {name for name in modules if name.startswith("torch.distributed")}
    assert all(name.startswith("torch.distributed.checkpoint") for name in distributed)
    assert room == "model" or not distributed
    assert not {"DTensor", "DeviceMesh", "dist"} & names


@pytest.mark.parametrize("room", [room for room in LINE if source_of(room).is_file()])
def test_nothing_runs_at_import(room):
    """At module level: docstring, imports, definitions, constants and the guarded main alone."""
    for node in ast.parse(source_of(room).read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef,
                                     ast.Assign)), ast.unparse(node)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_is_read_and_says_what_it_is(name):
    path = ROOT / "configs" / name
    load_config([str(path)], ModelConfig, DataConfig, EvalConfig, TrainConfig, AdaptConfig)
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("name, parameters", [
    ("olmo_1b.py", 1_176_764_416), ("olmo_7b.py", 6_888_095_744), ("small.py", 151_879_680),
    ("tiny.py", 5_308_416)])
def test_parameter_counts(name, parameters):
    """Untied: 2 V D + L (4 D^2 + 3 D F); tied: one V D less. Nothing else has parameters.

    1B: 50304 * 2048 + 16 * (4 * 2048^2 + 3 * 2048 * 8192) = 1,176,764,416 (facts: official count).
    """
    [config] = load_config([str(ROOT / "configs" / name)], ModelConfig)
    with torch.device("meta"):
        model = OLMo(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_config_names_its_missing_folder_and_the_remedy(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/small.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "documents: no such file or folder" in done.stderr and "--sources" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("room", ["model", "data", "eval", "train", "adapt"])
def test_every_file_answers_help(room):
    done = subprocess.run([sys.executable, str(source_of(room)), "--help"], capture_output=True,
                          text=True)
    assert done.returncode == 0 and f"python {room}.py" in done.stdout
