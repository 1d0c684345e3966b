"""The README is run: every command of its `sh` blocks, at reduced size, in a copy."""

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from configs import load_config
from data import DEDUPLICATIONS, RULES, DataConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S)
            for line in block.splitlines() if line.strip() and not line.startswith("#")]
SMALL_DATA = ["--eval_share=0.004"]
SMALL = [*SMALL_DATA, "--max_steps=2", "--eval_every_steps=0", "--compile=false",
         "--max_new_tokens=5", "--d_model=32", "--n_layers=2", "--n_heads=2",
         "--mlp_hidden_size=64"]
INSTALL = "pip", "python -m pytest", "python -m tests.bench"  # CI's part, and a bench


def words_of(command):
    """The words of a command without its comment; `pip install ... &&` in front is left out."""
    words = shlex.split(command, comments=True)
    return words[words.index("&&") + 1:] if "&&" in words else words


def shrink(words):
    """A command that builds or trains, at a size that takes seconds; the last value counts."""
    if words[1] == "data.py" and words[2].startswith("configs/"):
        return words + SMALL_DATA
    return words + SMALL if words[1] == "train.py" and "--resume" not in words[2] else words


def needs(words):
    """The dev requirement without which a command is skipped."""
    return "matplotlib" if "report" in words else "safetensors" if "export" in words else None


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh") / "nanolmo"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


def test_readme_commands_run(copy):
    """In order, as a reader types them; installing, and the test suite itself, are CI's part."""
    ran = 0
    for command in COMMANDS:
        words = words_of(command)
        if " ".join(words).startswith(INSTALL):
            continue
        assert words[0] == "python", f"the test does not know how to run: {command}"
        if needs(words) and not find_spec(needs(words)):
            continue
        if "configs/small.py" in words or "configs/olmo_7b.py" in words:
            continue  # need other hardware; test_house.py reads the configs
        words = [sys.executable, *shrink(words)[1:]]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 8


def test_readme_names_what_exists():
    """Every `room.py: function` of the map exists in that room, and the listed deviations too."""
    for room, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", README):
        text = (ROOT / room).read_text()
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(def|class) {name}\b", text), f"{room} has no {name}"


def test_readme_configs_load(tmp_path):
    [block] = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "config.py").write_text(block)
    [config] = load_config([str(tmp_path / "config.py")], DataConfig)
    assert len(config.parse_sources()) == 3 and config.decontaminate and config.bloom_items


def test_readme_lists_every_rule():
    named = set(re.findall(r"`(\w+)`", README.split("| rule |")[1].split("\n\n")[0]))
    assert named - {"LANGUAGE_SCORERS", "CONTENT_SCORERS"} == {*RULES, *DEDUPLICATIONS} - {"empty"}


def test_readme_lists_every_deviation():
    """Each `# DIFFERS FROM OLMo:` in the code has a line under the README's heading."""
    marks = sum((ROOT / room).read_text().count("# DIFFERS FROM OLMo:")
                for room in ("model.py", "data.py", "eval.py", "train.py"))
    section = README.split("## Differences from OLMo")[1].split("\n## ")[0]
    assert section.count("\n- ") == marks > 0
