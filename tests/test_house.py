"""The structure of the code: who imports whom, what runs at import, how long a function is. Every
command answers --help."""

import ast
import runpy
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


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
        allowed = {"support.files", "support.config_text", "support.hints", "support.slips"}
    if name in ("support.config_text", "support.hints", "support.slips"):
        allowed = {"support.files", "support.text", "support.other_words"}
        if name != "support.slips":
            allowed |= {"support.hints", "support.slips"}
    if name in ("support.files", "support.text"):
        allowed = {"support.text"}
    if name == "support.command":
        allowed = {"support.bars", "support.files", "support.hints", "support.interrupts",
                   "support.memory", "support.slips", "support.text"}
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

IMPORTING = ("quiet_while_importing()", "say_starting()", "end_fast()")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_at_import(name):
    """At the top level: docstring, imports, definitions, constants and the guarded main().

    Three calls are allowed: while torch is imported, Ctrl-C must be quiet and a terminal not mute,
    and what is to run last at the end must be registered first.
    """
    for node in ast.parse(NAMES[name].read_text()).body:
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'"
        elif name == "support.interrupts" and ast.unparse(node) in IMPORTING:
            pass
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
