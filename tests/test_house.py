"""The structure of the code: who imports whom, what runs at import, how long a function is. Every
command answers --help, and every config in configs/ has the values that it should have."""

import ast
import dataclasses
import runpy
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from adapt import AdaptConfig
from configs import load_config
from model import ModelConfig, OLMo
from train import SCHEMAS


ROOT = Path(__file__).resolve().parent.parent
MAIN_LINE = ["model", "data", "eval", "train", "adapt"]  # each may import those to its left
PARTS = ["corpus", "scaling", "support"]
FILES = [ROOT / f"{name}.py" for name in MAIN_LINE] + [ROOT / "configs/__init__.py"]
FILES += [file for part in PARTS for file in sorted((ROOT / part).glob("*.py"))]
NAMES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
         for file in FILES}
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("[a-z]*.py"))


def imports_of(name):
    """All modules that a file imports anywhere but inside its main(), which dispatches verbs."""
    tree = ast.parse(NAMES[name].read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "main"]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}  # from part import x
    return found


def ours(name):
    """Those of them that are files of this repository."""
    return imports_of(name) & set(NAMES) - {name, *PARTS}


# ---- Imports -------------------------------------------------------------------------------------

def test_no_circle():
    """graphlib raises CycleError, which names the circle."""
    list(TopologicalSorter({name: ours(name) for name in NAMES}).static_order())


@pytest.mark.parametrize("name", NAMES)
def test_nobody_imports_what_is_above(name):
    allowed = {each for each in NAMES if "." in each} | {"configs", "model", "data"}  # a part
    if name in MAIN_LINE:
        allowed = allowed - {"model", "data"} | set(MAIN_LINE[:MAIN_LINE.index(name)])
    if name == "data":
        allowed.remove("model")
    if name == "configs":
        allowed = {"support.files"}
    if name == "support.files":
        allowed = set()
    if name.startswith("corpus.") and name != "corpus.trace":
        allowed -= {"model", "data", "corpus.trace"}
        allowed = {each for each in allowed if not each.startswith("scaling.")}
    assert ours(name) <= allowed


@pytest.mark.parametrize("name", ["model", "data"])
def test_the_network_and_the_data_know_neither_ranks_nor_weight_files(name):
    forbidden = ("torch.distributed", "scaling", "safetensors", "ctypes", "support.cpu",
                 "support.weights")
    assert not [each for each in imports_of(name) if each.startswith(forbidden)]
    tree = ast.parse(NAMES[name].read_text())
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"DTensor", "DeviceMesh", "FSDPModule", "dist", "distributed", "mkldnn"}


# ---- Form ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_at_import(name):
    """At the top level: docstring, imports, definitions, constants and the guarded main()."""
    for node in ast.parse(NAMES[name].read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), ast.unparse(node)
        else:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef,
                                     ast.Assign, ast.AnnAssign)), ast.unparse(node)


@pytest.mark.parametrize("name", [*MAIN_LINE, "configs"])
def test_functions_of_the_main_line_fit_on_a_screen(name):
    for node in ast.walk(ast.parse(NAMES[name].read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has over 60 lines"


@pytest.mark.parametrize("name", MAIN_LINE)
def test_every_command_answers_help(name, monkeypatch, capsys):
    """Run as `python FILE --help`: how to call it, then every key with a sentence."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(NAMES[name]), run_name="__main__")
    assert not end.value.code
    out = capsys.readouterr().out
    assert f"python {name}.py" in out
    lines = out.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            assert lines[number + 1].startswith("      ") and lines[number + 1].endswith(".")


# ---- The shipped configs -------------------------------------------------------------------------

@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_is_read_and_says_what_it_is(name):
    path = ROOT / "configs" / name
    load_config([str(path)], *SCHEMAS, AdaptConfig)
    assert ast.get_docstring(ast.parse(path.read_text()))


# What OLMo-7B, its anneal and its tuning were given: paper, model cards, OLMo's yaml files.
PRETRAINING = dict(d_model=4096, n_layers=32, n_heads=32, mlp_hidden_size=11008, max_seq_len=2048,
                   vocab_size=50280, embedding_size=50304, weight_tying=False, eos_token_id=50279,
                   token_files="dolma/olmo_7b.txt", tokenizer="olmo", seed=6198, batch_size=2160,
                   lr=3e-4, min_lr=3e-5, warmup_steps=5000, max_steps=556_000, decay_steps=452_112,
                   schedule="linear", weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-5,
                   grad_clip=1.0, grad_clip_warmup_steps=1000, dtype="bfloat16", suite="core",
                   limit=1000, activation_checkpointing="fine_grained", keep_last=0)
ANNEAL = PRETRAINING | dict(start_from="runs/olmo_7b/step556000", run_dir="runs/olmo_7b_anneal",
                            max_steps=557_000, lr=2.3e-5, min_lr=2.3e-8, warmup_steps=556_000,
                            decay_steps=557_000, grad_clip_warmup_steps=0, eval_every_steps=100,
                            save_every_steps=500)
ONE_B = PRETRAINING | dict(d_model=2048, n_layers=16, n_heads=16, mlp_hidden_size=8192,
                           weight_tying=True, token_files="dolma/olmo_1b.txt", batch_size=2048,
                           lr=4e-4, min_lr=4e-5, warmup_steps=2000, max_steps=739_328,
                           decay_steps=0, schedule="cosine", grad_clip_warmup_steps=0,
                           activation_checkpointing="none", keep_last=9)
TUNING = dict(min_lr=0.0, weight_decay=0.0, grad_clip=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
              schedule="linear", epochs=3.0)
SFT = TUNING | dict(method="sft", start_from="runs/olmo_7b_anneal", train_data="tulu/train.jsonl",
                    lr=2e-6, batch_size=128, micro_batch_size=1, warmup_share=0.03, suite="mmlu",
                    chat=True, activation_checkpointing="whole_layer", dtype="bfloat16")
DPO = SFT | dict(method="dpo", start_from="runs/olmo_7b_sft", lr=5e-7, batch_size=32, beta=0.1,
                 train_data="ultrafeedback/train_prefs.jsonl", warmup_share=0.1)
SMALLER = dict(micro_batch_size=4, activation_checkpointing="none")


@pytest.mark.parametrize("names, wanted", [
    ("olmo_7b", PRETRAINING), ("olmo_7b olmo_7b_anneal", ANNEAL), ("olmo_1b", ONE_B),
    ("olmo_7b_sft", SFT), ("olmo_7b_dpo", DPO),
    ("olmo_7b_sft olmo_1b_sft", SFT | SMALLER | dict(start_from="runs/olmo_1b", epochs=5, lr=1e-5)),
    ("olmo_7b_dpo olmo_1b_dpo", DPO | SMALLER | dict(start_from="runs/olmo_1b_sft")),
    ("tiny_sft", TUNING | dict(start_from="runs/tiny", lr=2e-4, batch_size=32, method="sft",
                               warmup_share=0.03, train_data="stdlib", dtype="auto")),
    ("tiny_dpo", TUNING | dict(start_from="runs/tiny_sft", lr=1e-4, batch_size=32, method="dpo",
                               warmup_share=0.1, train_data="stdlib", beta=0.1))])
def test_the_recipes_have_the_values_of_olmo(names, wanted):
    """A variant, such as the anneal, names only what differs from the file to its left."""
    paths = [str(ROOT / f"configs/{name}.py") for name in names.split()]
    found = {}
    for config in load_config(paths, *SCHEMAS, AdaptConfig):
        found.update(dataclasses.asdict(config))
    assert {key: found[key] for key in wanted} == wanted


@pytest.mark.parametrize("name, parameters", [
    ("olmo_1b.py", 1_176_764_416), ("olmo_7b.py", 6_888_095_744), ("small.py", 151_879_680),
    ("tiny.py", 5_308_416)])
def test_parameter_counts(name, parameters):
    """Untied: 2 V D + L (4 D^2 + 3 D F); tied: V D less. Nothing else has parameters.

    1B: 50304 * 2048 + 16 * (4 * 2048^2 + 3 * 2048 * 8192) = 1,176,764,416, the official count.
    """
    [config] = load_config([str(ROOT / "configs" / name)], ModelConfig, other=SCHEMAS)
    with torch.device("meta"):
        model = OLMo(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_a_missing_folder_is_named_with_the_remedy(call, refused, tmp_path, monkeypatch):
    import train
    monkeypatch.chdir(tmp_path)
    refused(call(train, ROOT / "configs/small.py"), "documents: ", "--sources")
    assert not any(tmp_path.iterdir())
