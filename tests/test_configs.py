"""configs.load_config: precedence, types, messages, and that no config file is ever run."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

import pytest

import configs
from configs import load_config
from model import ModelConfig
from support.files import UserError


@dataclass(frozen=True)
class ToyConfig:
    """One field of every type that a room uses."""

    steps: int = 10
    """How many steps to take; twelve words can run
    over two lines."""
    rate: float = 0.5
    """Size of a step."""
    name: str = "toy"
    """What to call it."""
    quick: bool = False
    """Skip the slow part."""
    mode: Literal["linear", "cosine", "true", "false"] = "linear"
    """Shape of the schedule."""
    shares: dict[str, float] = field(default_factory=lambda: {"web": 1.0})
    """Share of each source."""


def toy(*argv):
    [config] = load_config(list(map(str, argv)), ToyConfig)
    return config


def write(path, text):
    path.write_text(text)
    return path


def message(*argv, schemas=(ToyConfig,)):
    """The one line with which `argv` is refused."""
    with pytest.raises(UserError) as caught:
        load_config(list(map(str, argv)), *schemas)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- Precedence ----------------------------------------------------------------------------------

def test_no_words_give_the_defaults():
    assert toy() == ToyConfig()


def test_files_beat_defaults_and_later_files_beat_earlier_ones(tmp_path):
    one = write(tmp_path / "one.py", "steps = 1\nname = 'one'  # why\n")
    two = write(tmp_path / "two.py", "steps = 2\n")
    assert toy(one) == ToyConfig(steps=1, name="one")
    assert toy(one, two) == ToyConfig(steps=2, name="one")
    assert toy(two, one) == ToyConfig(steps=1, name="one")


def test_options_beat_files_wherever_they_stand_and_the_last_one_wins(tmp_path):
    file = write(tmp_path / "one.py", "steps = 1\nrate = 0.1\n")
    assert toy("--steps=7", file) == toy(file, "--steps=7") == ToyConfig(steps=7, rate=0.1)
    assert toy("--steps=7", file, "--steps=8").steps == 8


def test_two_schemas_share_one_file_and_one_command_line(tmp_path):
    file = write(tmp_path / "both.py", '"""Two rooms."""\nsteps = 1\nd_model = 64\n')
    config, model = load_config([str(file), "--n_heads=2", "--rate=0.25"], ToyConfig, ModelConfig)
    assert config == ToyConfig(steps=1, rate=0.25)
    assert model == ModelConfig(d_model=64, n_heads=2)


def test_a_key_in_two_schemas_is_a_bug_of_ours():
    with pytest.raises(AssertionError, match="two schemas"):
        load_config([], ToyConfig, ToyConfig)


def test_configs_are_frozen():
    with pytest.raises(AttributeError):
        toy().steps = 3


# ---- Types ---------------------------------------------------------------------------------------

FILE_VALUES = [("steps", "-3", -3), ("rate", "3e-3", 0.003), ("name", "'a=b'", "a=b"),
               ("quick", "True", True), ("mode", '"cosine"', "cosine"),
               ("shares", "{'web': 0.75, 'code': 0.25}", {"web": 0.75, "code": 0.25})]


@pytest.mark.parametrize("key, text, value", FILE_VALUES)
def test_every_type_is_read_from_a_file(tmp_path, key, text, value):
    assert toy(write(tmp_path / "c.py", f"{key} = {text}\n")) == ToyConfig(**{key: value})


OPTIONS = [("--steps=-3", -3), ("--rate=3e-3", 0.003), ("--rate=-.5", -0.5),
           ("--name=plain", "plain"), ("--name=Any Case", "Any Case"), ("--name=", ""),
           ("--name=7", "7"), ("--name=a=b==c", "a=b==c"), ("--name=--steps=3", "--steps=3"),
           ("--quick", True), ("--quick=TRUE", True), ("--quick=true", True),
           ("--mode=cosine", "cosine"), ("--mode=True", "true"), ("--mode", "true"),
           ("--shares={'web': 0.75, 'code': 0.25}", {"web": 0.75, "code": 0.25})]


@pytest.mark.parametrize("word, value", OPTIONS)
def test_every_type_is_read_from_the_command_line(word, value):
    key = word.removeprefix("--").partition("=")[0]
    assert toy(word) == ToyConfig(**{key: value})
    assert type(getattr(toy(word), key)) is type(value)


@pytest.mark.parametrize("word", ["--quick=false", "--quick=False", "--quick=FALSE"])
def test_a_flag_can_be_taken_back(tmp_path, word):
    assert toy(write(tmp_path / "c.py", "quick = True\n"), word).quick is False


def test_an_int_does_for_a_float_and_becomes_one(tmp_path):
    for config in (toy(write(tmp_path / "c.py", "rate = 2\n")), toy("--rate=2"),
                   toy(write(tmp_path / "c.json", '{"rate": 2}'))):
        assert config.rate == 2.0 and type(config.rate) is float


@pytest.mark.parametrize("key, text, wanted, given", [
    ("steps", "1.0", "int", "float"), ("steps", "True", "int", "bool"),
    ("steps", "'3'", "int", "str"),
    ("steps", "None", "int", "NoneType"), ("rate", "'0.1'", "float", "str"),
    ("rate", "True", "float", "bool"), ("name", "7", "str", "int"), ("quick", "1", "bool", "int"),
    ("quick", "'true'", "bool", "str"), ("shares", "[1]", "dict", "list")])
def test_another_type_in_a_file_is_refused_with_both_named(tmp_path, key, text, wanted, given):
    file = write(tmp_path / "c.py", f"\n\n{key} = {text}\n")
    said = message(file)
    assert said.startswith(f"{file}:3: {key}=")
    assert said.endswith(f"{key} takes {wanted}, not {given}")


@pytest.mark.parametrize("word, wanted", [
    ("--steps=1.5", "int, not str"), ("--steps=1e3", "int, not str"),
    ("--steps=many", "int, not str"),
    ("--rate=fast", "float, not str"), ("--quick=maybe", "bool, not str"),
    ("--quick=1", "bool, not str"), ("--shares=web", "dict, not str"),
    ("--shares", "dict, not str"),
    ("--shares=[1]", "dict, not list")])
def test_another_type_in_an_option_is_refused_with_both_named(word, wanted):
    key = word.removeprefix("--").partition("=")[0]
    said = message(word)
    assert said.startswith(f"--{key}=") and said.endswith(f"{key} takes {wanted}")


@pytest.mark.parametrize("key", ["steps", "rate", "name"])
def test_an_option_without_its_value_is_refused(key):
    assert message(f"--{key}") == f"--{key}: {key} needs a value, --{key}=..."


def test_choices_are_listed(tmp_path):
    file = write(tmp_path / "c.py", "mode = 'square'\n")
    ending = "mode=square: mode takes one of linear, cosine, true, false"
    assert message(file) == f"{file}:1: {ending}"
    assert message("--mode=square") == f"--{ending}"
    file = write(tmp_path / "c.py", "mode = 1\n")
    assert message(file) == f"{file}:1: mode=1: mode takes one of linear, cosine, true, false"


# ---- Unknown keys --------------------------------------------------------------------------------

def test_an_unknown_key_in_a_file_names_file_line_and_the_nearest_key(tmp_path):
    file = write(tmp_path / "c.py", "# a comment\nd_model = 64\nn_layer = 3\n")
    said = message(file, schemas=(ModelConfig,))
    assert said == f"{file}:3: n_layer: unknown key; did you mean n_layers?"


def test_an_unknown_option_names_the_nearest_key():
    assert message("--stesp=3") == "--stesp: unknown key; did you mean steps?"
    assert message("--n_layer=3", schemas=(ModelConfig,)).endswith("did you mean n_layers?")


def test_a_key_like_no_other_points_to_help(tmp_path):
    assert message("--zzzz=3") == "--zzzz: unknown key; --help lists the keys"
    file = write(tmp_path / "c.py", "zzzz = 3\n")
    assert message(file) == f"{file}:1: zzzz: unknown key; --help lists the keys"


def test_a_file_may_hold_keys_of_another_room(tmp_path):
    """One file serves every command; whose key it is stands in the rooms' sources."""
    file = write(tmp_path / "c.py", "steps = 4\nd_model = 'of no concern here'\n")
    assert toy(file) == ToyConfig(steps=4)


def test_the_command_line_may_not_hold_keys_of_another_room():
    said = message("--d_model=64")
    assert said == "--d_model: this command does not use d_model; --help lists its keys"


def test_the_keys_of_the_house_are_those_of_its_config_classes(tmp_path, monkeypatch):
    assert {field.name for field in fields(ModelConfig)} <= configs.house_keys()
    write(tmp_path / "data.py", "print(1 / 0)\nclass DataConfig:\n    sources: str = ''\n"
                                "class Batches:\n    position: int = 0\n")
    monkeypatch.setattr(configs, "HOUSE", tmp_path)
    assert configs.house_keys() == {"sources"}  # read, not imported


def test_a_single_dash_is_refused():
    assert message("-steps=3") == "-steps=3: an option is written --key=value"


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["missing.py", "missing.json", "."])
def test_a_missing_file_is_named(tmp_path, name):
    assert message(tmp_path / name).startswith(f"{tmp_path / name}: no such config file")


def test_a_syntax_error_names_its_line(tmp_path):
    file = write(tmp_path / "c.py", "steps = 3\nrate = = 4\n")
    assert message(file).startswith(f"{file}:2: ")
    assert message(write(tmp_path / "c.py", "steps = 3\n  rate = 4\n")).startswith(f"{file}:2: ")


CODE = ["import os", "from os import path", "steps = int('3')", "steps = 1 + 2", "steps = 2 ** 3",
        "steps = rate", "name = f'{1}'", "name = 'a' 'b'.upper()", "name = __name__",
        "steps = [3][0]", "shares = {**{}}", "print('hello')", "if True:\n    steps = 3",
        "def steps():\n    pass", "class steps:\n    pass", "steps: int = 3", "steps += 1",
        "steps = rate = 3", "steps, rate = 3, 4", "os.steps = 3", "shares['web'] = 3", "del steps",
        "steps = lambda: 3", "steps = 3 if True else 4", "(steps := 3)", "assert True", "pass"]


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_config_file_is_refused(tmp_path, code):
    file = write(tmp_path / "c.py", f"rate = 0.5\n{code}\n")
    assert message(file).startswith(f"{file}:2: a config file holds only")


@pytest.mark.parametrize("code", [
    "open({marker!r}, 'w')", "name = open({marker!r}, 'w').name", "import touch",
    "name = str(__import__('pathlib').Path({marker!r}).touch())",
    "shares = {{'web': open({marker!r}, 'w')}}"])
def test_code_in_a_config_file_never_runs(tmp_path, monkeypatch, code):
    marker = tmp_path / "ran"
    write(tmp_path / "touch.py", f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = code.format(marker=str(marker))
    file = write(tmp_path / "c.py", text)
    assert message(file).startswith(f"{file}:1: a config file holds only")
    assert not marker.exists()
    exec(text)  # it is live
    assert marker.exists()


def test_code_on_the_command_line_never_runs(tmp_path):
    said = message(f"--shares={{'web': open({str(tmp_path / 'ran')!r}, 'w')}}")
    assert said.endswith("shares takes dict, not str")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name, content", [
    ("c.py", b"shares = {[1]: 2}"), ("c.py", b"# caf\xe9\nsteps = 3"), ("c.json", b"[1]")])
def test_an_odd_file_is_the_users_error(tmp_path, name, content):
    """Otherwise: TypeError, UnicodeDecodeError, AttributeError."""
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in message(tmp_path / name)


def test_an_unhashable_key_on_the_command_line_is_the_users_error():
    """Otherwise: literal_eval's TypeError."""
    assert message("--shares={[1]: 2}").startswith("--shares=")


# ---- Saved configs -------------------------------------------------------------------------------

def test_a_saved_config_reads_back_equal(tmp_path):
    """One flat object; each schema takes its own keys and leaves the rest."""
    config = ToyConfig(steps=3, rate=2.0, name="a=b", quick=True, mode="cosine", shares={"x": 0.1})
    model = ModelConfig(d_model=64, rope_theta=500.0)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(configs.flat(config, model)))
    assert json.loads(file.read_text()) == asdict(config) | asdict(model)
    assert load_config([str(file)], ToyConfig, ModelConfig) == (config, model)
    assert load_config([str(file)], ModelConfig) == (model,)
    assert toy(file, "--steps=4").steps == 4


def test_a_damaged_or_mistyped_saved_config_is_named(tmp_path):
    file = write(tmp_path / "config.json", '{"steps": 3')
    assert message(file).startswith(f"{file}: not valid JSON")
    file.write_text('{"steps": "3"}')
    assert message(file) == f"{file}: steps=3: steps takes int, not str"


# ---- Help ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_prints_every_field_with_default_type_and_sentence(capsys, word):
    with pytest.raises(SystemExit) as caught:
        load_config([word, "--zzzz=3", "missing.py"], ToyConfig, ModelConfig)  # before any error
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for line, sentence in {
            "--steps=10  (int)": "How many steps to take; twelve words can run over two lines.",
            "--rate=0.5  (float)": "Size of a step.", "--name=toy  (str)": "What to call it.",
            "--quick=False  (bool)": "Skip the slow part.",
            "--mode=linear  (linear|cosine|true|false)": "Shape of the schedule.",
            "--shares={'web': 1.0}  (dict)": "Share of each source.",
            "--rope_theta=10000.0  (float)": "Base of the rotary frequencies."}.items():
        assert lines[lines.index(f"  {line}") + 1].strip() == sentence
    for each in fields(ModelConfig):
        [at] = [i for i, line in enumerate(lines) if line.startswith(f"  --{each.name}=")]
        assert len(lines[at + 1].split()) > 2


# ---- run_main ------------------------------------------------------------------------------------

MAIN = '''"""Usage: toy."""
import sys
from dataclasses import dataclass
from configs import load_config
from support.files import UserError, run_main

@dataclass(frozen=True)
class ToyConfig:
    steps: int = 10
    """How many."""

def main(argv):
    [config] = load_config(argv, ToyConfig)
    if config.steps == 0:
        raise ValueError("a bug of ours")
    if config.steps == 1:
        return 3
    print("steps", config.steps)

if __name__ == "__main__":
    run_main(main)
'''


@pytest.fixture
def run(tmp_path):
    """Runs a little command built on run_main as a program of its own."""
    script = write(tmp_path / "toy.py", MAIN)
    environment = os.environ | {"PYTHONPATH": str(configs.HOUSE)}
    return lambda *words: subprocess.run([sys.executable, script, *words], text=True,
                                         capture_output=True, timeout=60, env=environment)


def test_run_main_turns_a_users_mistake_into_one_line(run):
    done = run("--stesp=3")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: --stesp: ") and done.stderr.count("\n") == 1


def test_run_main_keeps_the_traceback_of_a_bug(run):
    done = run("--steps=0")
    assert done.returncode == 1 and done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ValueError: a bug of ours\n")


def test_run_main_returns_what_main_returns(run):
    assert run("--steps=1").returncode == 3
    done = run("--steps=2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "steps 2\n", "")


def test_help_of_a_program_begins_with_its_docstring(run):
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: toy.\n\nToyConfig") and "--steps=10" in done.stdout
