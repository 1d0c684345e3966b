"""The config loader: precedence, types, errors, --help, and that a config file is never run."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pytest

import adapt
import configs
import data
import eval as evaluation
import model
import train
from configs import fields_of, load_config, setting
from corpus.trace import FindOptions, TraceOptions
from data import ShowOptions
from experiments.__main__ import ExperimentsConfig
from model import ModelConfig
from support.files import UserError
from support.hints import shipped
from support.other_words import OURS, SAYINGS
from support.run_hints import run_remedy, runs_below
from support.slips import EMPTY, verbs
from support.text import counted
from train import SCHEMAS


@dataclass(frozen=True)
class ToyConfig:
    """One key of every type that a command uses."""

    steps: int = setting(10, "How many steps to take.")
    rate: float = setting(0.5, "Size of a step.")
    name: str = setting("toy", "What to call it.")
    quick: bool = setting(False, "Skip the slow part.")
    mode: Literal["linear", "cosine", "true", "false"] = setting("linear", "Shape of the decay.")
    weights: dict[str, float] = setting({"web": 1.0}, "Weight of each source.")


def toy(*argv, **schemas):
    [config] = load_config([str(word) for word in argv], ToyConfig, **schemas)
    return config


def write(path, text):
    path.write_text(text)
    return path


def refused(*argv, **schemas):
    """The message of the UserError, which must be one line."""
    with pytest.raises(UserError) as caught:
        toy(*argv, **schemas)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- Precedence ----------------------------------------------------------------------------------

def test_defaults_then_files_from_left_to_right_then_options(tmp_path):
    one = write(tmp_path / "one.py", '"""Text."""\nsteps = 1\nname = "one"  # why\n')
    two = write(tmp_path / "two.py", "steps = 2\n")
    assert toy() == ToyConfig()
    assert toy(one, two) == ToyConfig(steps=2, name="one")
    assert toy(two, one) == ToyConfig(steps=1, name="one")
    assert toy("--steps=7", one, "--rate=2", two, "--steps=8") == ToyConfig(8, 2.0, "one")


def test_schemas_share_files_and_options_and_no_key(tmp_path):
    file = write(tmp_path / "both.py", "steps = 1\nd_model = 64\n")
    both = load_config([str(file), "--n_heads=2"], ToyConfig, ModelConfig)
    assert both == (ToyConfig(steps=1), ModelConfig(d_model=64, n_heads=2))
    with pytest.raises(AssertionError):
        load_config([], ToyConfig, ToyConfig)


def test_configs_are_frozen_and_share_no_default():
    with pytest.raises(AttributeError):
        toy().steps = 3
    toy().weights["code"] = 2.0
    assert toy().weights == {"web": 1.0}


# ---- Types ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("key, text, value", [
    ("steps", "-3", -3), ("rate", "3e-3", 0.003), ("rate", "2", 2.0), ("name", "'a=b'", "a=b"),
    ("quick", "True", True), ("mode", "'cosine'", "cosine"), ("mode", "True", "true"),
    ("weights", "{'web': 0.75, 'code': 0.25}", {"web": 0.75, "code": 0.25})])
def test_values_of_a_file(tmp_path, key, text, value):
    config = toy(write(tmp_path / "c.py", f"{key} = {text}\n"))
    assert config == ToyConfig(**{key: value})
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("word, value", [
    ("--steps=-3", -3), ("--rate=3e-3", 0.003), ("--rate=-.5", -0.5), ("--rate=2", 2.0),
    ("--name=Any Case", "Any Case"), ("--name=", ""), ("--name=7", "7"),
    ("--name=--steps=3", "--steps=3"), ("--quick", True), ("--quick=TRUE", True),
    ("--quick=False", False), ("--mode=cosine", "cosine"), ("--mode=True", "true"),
    ("--mode", "true"), ("--weights={'web': 0.75}", {"web": 0.75})])
def test_values_of_an_option(word, value):
    key = word[2:].partition("=")[0]
    assert toy(word) == ToyConfig(**{key: value})
    assert type(getattr(toy(word), key)) is type(value)


@pytest.mark.parametrize("key, text, wanted, given", [
    ("steps", "1.5", "int", "float"), ("steps", "True", "int", "bool"),
    ("steps", "None", "int", "NoneType"), ("rate", "'0.1'", "float", "str"),
    ("rate", "True", "float", "bool"), ("name", "7", "str", "int"), ("quick", "1", "bool", "int"),
    ("quick", "'true'", "bool", "str"), ("weights", "[1]", "dict[str, float]", "list"),
    ("weights", "{'a': 'b'}", "dict[str, float]", "dict"), ("mode", "1", "linear|cosine", "1"),
    ("mode", "'square'", "linear|cosine", "square")])
def test_a_wrong_type_in_a_file_is_named_with_both_types(tmp_path, key, text, wanted, given):
    file = write(tmp_path / "c.py", f"\n\n{key} = {text}\n")
    message = refused(file)
    assert message.startswith(f"{file}:3: {key}=")
    assert wanted in message and f" not {given}" in message


@pytest.mark.parametrize("word, wanted", [
    ("--steps=1.5", "int"), ("--steps=1e3", "int"), ("--steps", "--steps="), ("--rate=x", "float"),
    ("--rate", "--rate="), ("--name", "--name="), ("--quick=1", "bool"), ("--weights=web", "dict"),
    ("--weights", "--weights="), ("--weights=[1]", "dict"), ("--weights={[1]: 2}", "dict"),
    ("--mode=square", "linear|cosine")])
def test_a_wrong_type_in_an_option_is_named(word, wanted):
    key = word.partition("=")[0]
    assert refused(word).startswith(key) and wanted in refused(word)


# ---- Unknown keys --------------------------------------------------------------------------------

def test_an_unknown_key_is_named_with_its_place_and_the_nearest_key(tmp_path):
    file = write(tmp_path / "c.py", "# a comment\nrate = 1\nstep = 3\n")
    assert refused(file).startswith(f"{file}:3: step: ") and "steps?" in refused(file)
    assert refused("--stesp=3").startswith("--stesp: ") and "steps?" in refused("--stesp=3")
    assert refused("--zzzz=3").startswith("--zzzz: ") and "--help" in refused("--zzzz=3")
    assert refused("-steps=3").startswith("-steps=3: ")


def test_a_key_of_other_commands_may_stand_in_a_file_where_its_type_is_checked(tmp_path):
    file = write(tmp_path / "c.py", "steps = 4\nd_model = 64\n")
    for schemas in ({"other": [ModelConfig]}, {"siblings": [ModelConfig]}):
        assert toy(file, **schemas) == ToyConfig(steps=4)
    assert refused(file).startswith(f"{file}:2: d_model: ")
    write(file, "d_model = 6.4")
    assert refused(file, other=[ModelConfig]).startswith(f"{file}:1: d_model=6.4: ")
    write(file, "n_layer = 3\n")
    assert "did you mean n_layers?" in refused(file, other=[ModelConfig])


def test_an_option_of_a_sibling_is_not_used_and_named(tmp_path, capsys):
    """data.py takes the command line of train.py, so that one line serves both."""
    file = write(tmp_path / "c.py", "steps = 4\n")
    assert toy(file, "--d_model=64", "--n_heads=2", siblings=[ModelConfig]) == ToyConfig(steps=4)
    [line] = capsys.readouterr().out.splitlines()
    assert "--d_model" in line and "--n_heads" in line
    assert refused(file, "--d_model=x", siblings=[ModelConfig]).startswith("--d_model=x: ")
    # another model is no harmless change, and without a file nothing else would be configured
    assert refused(file, "--d_model=64", other=[ModelConfig]).startswith("--d_model: ")
    assert refused("--d_model=64", siblings=[ModelConfig]).startswith("--d_model: ")


def test_data_py_takes_the_command_line_of_train_py(tmp_path, tiny_config, call):
    import data
    file = tiny_config(tmp_path / "run")
    result = call(data, file, "--max_steps=3", "--gpus=2", "--d_model=32")
    assert result.returncode == 0, result.stderr
    assert "does not use --max_steps, --gpus, --d_model" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key, owner", [
    ("method", "adapt.py"), ("metric", "eval.py"), ("max_steps", "train.py"),
    ("gpus", "train.py"), ("d_model", "train.py"), ("activation_checkpointing", "train.py")])
def test_a_key_of_another_command_is_named_with_that_command(tmp_path, key, owner):
    file = write(tmp_path / "c.py", f"{key} = 3\n")
    for message in (refused(file), refused(f"--{key}=3")):
        assert f"python {owner}" in message


# ---- Slips of the hand ---------------------------------------------------------------------------

@pytest.mark.parametrize("words, remedy", [
    (["--rate", "1e-3"], "--rate=1e-3"), (["--name", "runs/tiny"], "--name=runs/tiny"),
    (["--quick", "true"], "--quick=true"), (["rate=1e-3"], "--rate=1e-3"),
    (["–rate=1e-3"], "--rate=1e-3"), (["configs/tinny.py"], "configs/tiny.py?"),
    (["configs/tiny"], "configs/tiny.py?"), (["tiny_sfd.py"], "configs/tiny_sft.py?"),
    (["configs"], "a directory"), (["/dev/null"], "a device"),
    (["--steps=1e6"], "write 1000000"), (["--step", "3"], "steps?"),
    (["-steps=3"], "--key=value"), (["--STEPS=3"], "steps?"), (["--Rate=3"], "rate?"),
    (["zzzzzz.py"], "configs/"), ([5000 * "z"], "configs/")])
def test_a_slip_of_the_hand_is_told_the_right_form(monkeypatch, words, remedy):
    monkeypatch.chdir(configs.ROOT)
    assert remedy in refused(*words)


def test_a_config_of_ours_is_found_from_any_directory_and_one_there_comes_first(tmp_path,
                                                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = str(configs.ROOT / "configs/tiny.py")
    assert shipped("configs/tiny.py") == ours
    words = ["configs/none.py", "tiny.py", "--lr=1", "configs/" + "x" * 5000, "configs/\0"]
    assert list(map(shipped, words)) == words
    assert refused("tiny").endswith(f"did you mean {ours}?")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/tiny.py").write_text("")
    assert shipped("configs/tiny.py") == "configs/tiny.py"


def test_a_run_is_no_config_file_and_its_settings_are_named(tmp_path):
    write(tmp_path / "config.json", "{}")
    message = refused(tmp_path)
    assert f"{tmp_path}/config.json" in message and f"--resume={tmp_path}" in message
    near = refused(tmp_path.with_name(tmp_path.name + "x"))
    assert near.endswith(f"did you mean {tmp_path}?")


@pytest.mark.parametrize("text", [
    '{"model_type": "olmo", "steps": 3}', '{"version": "1.0", "truncation": null}', "{}"])
def test_a_json_file_that_is_no_runs_config_is_refused(tmp_path, text):
    """Such as config.json and tokenizer.json of a Hugging Face directory."""
    file = write(tmp_path / "config.json", text)
    assert refused(file).startswith(f"{file}: ")


def test_the_config_of_a_tuning_is_none_of_pretraining(tmp_path):
    file = write(tmp_path / "config.json", '{"method": "sft", "run_dir": "runs/x", "d_model": 32}')
    assert load_config([str(file)], ModelConfig) == (ModelConfig(d_model=32),)
    with pytest.raises(UserError, match="python adapt.py"):
        load_config([str(file)], *SCHEMAS)


@pytest.mark.parametrize("text, place", [
    ("steps = 3\nrate = 0.1\nsteps = 4\n", ":3: steps "),
    ("weights = {'web': 1.0, 'code': 0.5, 'web': 2.0}", ":1: the key 'web' "),
    ("steps = 9**9**9", ":1: "), ("weights = " + 10**5 * "[", ":1: "), ("steps = 3\0", ":1: "),
    ("steps = " + 5000 * "9", ":1: "), ("steps = 0x" + 5000 * "f", ":1: steps="),
    (f"steps = {2**63}", ":1: steps="), ("rate = 1" + 400 * "0", ":1: rate="),
    ("rate = 1e999", ":1: rate=inf: "), ("rate = -1e999", ":1: rate=-inf: "),
    ("weights = " + 500 * "[" + 500 * "]", ":1: "), ("steps = 'a\\nb'", ":1: steps=a b: "),
    ("steps = 1e6", ":1: steps=1000000.0: ")])
def test_an_absurd_file_is_refused_in_one_short_line(tmp_path, text, place):
    file = write(tmp_path / "c.py", text)
    message = refused(file)
    assert message.startswith(f"{file}{place}") and len(message) < 400


@pytest.mark.parametrize("word", [
    "--rate=nan", "--rate=inf", "--rate=-inf", "--rate=1e999", "--steps=" + 5000 * "9",
    "--steps=9**9**9", "--weights=" + 10**5 * "(", "--weights={'a': 1.0, 'a': 2.0}"])
def test_an_absurd_option_is_refused_in_one_short_line(word):
    message = refused(word)
    assert message.startswith(word.partition("=")[0]) and len(message) < 400


@pytest.mark.parametrize("schema, key", [(ModelConfig, "rope_theta"), (TraceOptions, "chars"),
                                         (FindOptions, "limit")])
def test_a_value_below_the_least_is_refused(schema, key):
    with pytest.raises(UserError, match=f"^--{key}=-1"):
        load_config([f"--{key}=-1"], schema)


def test_a_byte_order_mark_is_read_and_another_encoding_refused(tmp_path):
    file = tmp_path / "c.py"
    file.write_bytes('steps = 3  # café\n'.encode("utf-8-sig"))
    assert toy(file) == ToyConfig(steps=3)
    (tmp_path / "c.json").write_bytes('{"steps": 3}'.encode("utf-8-sig"))
    assert toy(tmp_path / "c.json") == ToyConfig(steps=3)
    for encoding in ("utf-16", "utf-16-le", "latin-1"):
        file.write_bytes('steps = 3  # café\n'.encode(encoding))
        message = refused(file)
        assert message.startswith(f"{file}:1: ") and ("UTF-16" in message) == ("utf" in encoding)


def test_a_variant_of_a_config_of_ours_names_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(configs.ROOT)
    near = write(tmp_path / "near.py", "adds_to = 'tinny.py'\nsteps = 4\n")
    assert "no such file; did you mean configs/tiny.py?" in refused(near)
    mine = write(tmp_path / "mine.py", "adds_to = 'tiny.py'\nsteps = 4\n")
    assert refused(mine).endswith(f"name both: configs/tiny.py {mine}")


def test_a_variant_needs_the_file_that_it_adds_to(tmp_path):
    base = write(tmp_path / "base.py", "steps = 3\nname = 'base'\n")
    variant = write(tmp_path / "variant.py", "adds_to = 'base.py'\nsteps = 4\n")
    saved = write(tmp_path / "config.json", '{"steps": 5, "name": "saved"}')
    assert toy(base, variant) == ToyConfig(steps=4, name="base")
    assert toy(saved, variant) == ToyConfig(steps=4, name="saved")
    for words in ([variant], [variant, base], [write(tmp_path / "other.py", "rate = 1"), variant]):
        assert refused(*words) == f"{variant}:1: adds_to=base.py: this file adds to that one; " \
                                  f"name both: {base} {variant}"


# ---- Files ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, place", [
    ("c.py", None, ": "), ("c.json", None, ": "), (".", None, ": "), ("c.py", b"# caf\xe9", ":1: "),
    ("c.py", b"steps = 3\nrate = = 4\n", ":2: "), ("c.py", b"steps = 3\n  rate = 4\n", ":2: "),
    ("c.py", b"weights = {[1]: 2}", ":1: "), ("c.json", b"[1]", ": "),
    ("c.json", b'{"steps": 3', ":1: "), ("c.json", b'{"steps": "3"}', ": steps=3: "),
    ("c.py", b"\n\0", ":"), ("c.py", b"x = " + b"-" * 100_000 + b"1", ":"),
    ("c.py", "steps = 3".encode("utf-16"), ":1: not UTF-8 but UTF-16"),
    ("c.json", '{"steps": 3}'.encode("utf-16-le"), ":1: not UTF-8 but UTF-16"),
    ("c.json", b'{"steps": 3,\n "steps": 4}', ":1: "), ("c.json", b"[" * 100_000, ":1: ")])
def test_an_unreadable_file_is_named(tmp_path, name, content, place):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(f"{tmp_path / name}{place}")


@pytest.mark.parametrize("name, content", [
    ("c.py", b"\xef\xbb\xbfsteps = 5\r\n"), ("c.py", "# Ж\rsteps = 5\r".encode()),
    ("c.json", b'\xef\xbb\xbf{"steps":\r\n5}')])
def test_a_byte_order_mark_and_any_line_ends_are_read(tmp_path, name, content):
    """As Windows' editors and PowerShell write them."""
    (tmp_path / name).write_bytes(content)
    assert toy(tmp_path / name).steps == 5


CODE = ["import os", "from os import path", "steps = int('3')", "steps = 1 + 2", "steps = 2 ** 3",
        "steps = rate", "name = f'{1}'", "name = 'a' 'b'.upper()", "name = __name__",
        "steps = [3][0]", "weights = {**{}}", "print('hello')", "if True:\n    steps = 3",
        "def steps():\n    pass", "class steps:\n    pass", "steps: int = 3", "steps += 1",
        "steps = rate = 3", "steps, rate = 3, 4", "os.steps = 3", "weights['web'] = 3", "del steps",
        "steps = lambda: 3", "steps = 3 if True else 4", "(steps := 3)", "assert True", "pass"]


@pytest.mark.parametrize("code", CODE)
def test_code_in_a_file_is_refused(tmp_path, code):
    file = write(tmp_path / "c.py", f"rate = 0.5\n{code}\n")
    assert refused(file).startswith(f"{file}:2: ")


@pytest.mark.parametrize("code", [
    "open({marker!r}, 'w')", "name = open({marker!r}, 'w').name", "import touch",
    "name = str(__import__('pathlib').Path({marker!r}).touch())",
    "weights = {{'web': open({marker!r}, 'w')}}"])
def test_code_in_a_file_never_runs(tmp_path, monkeypatch, code):
    marker = tmp_path / "ran"
    write(tmp_path / "touch.py", f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    text = code.format(marker=str(marker))
    refused(write(tmp_path / "c.py", text))
    if text.startswith("weights"):
        refused("--" + text.replace(" = ", "="))
    assert not marker.exists()
    exec(text)  # the code would have left the mark
    assert marker.exists()


def test_a_saved_config_gives_each_schema_its_keys(tmp_path):
    config = ToyConfig(3, 2.0, "a=b", True, "cosine", {"x": 0.1})
    model = ModelConfig(d_model=64, rope_theta=500.0)
    saved = configs.flat(config, model)
    assert saved == asdict(config) | asdict(model)
    del saved["steps"]  # as in a run from before this key: it takes its default
    saved["gone"] = 1  # a key that no schema has any more
    file = write(tmp_path / "config.json", json.dumps(saved))
    config = ToyConfig(10, 2.0, "a=b", True, "cosine", {"x": 0.1})
    assert load_config([str(file)], ToyConfig, ModelConfig) == (config, model)
    assert load_config([str(file)], ModelConfig) == (model,)
    assert toy(file, "--steps=4").steps == 4


# ---- Help and run_main ---------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_every_key_with_its_default_type_and_sentence(capsys, word):
    with pytest.raises(SystemExit) as caught:
        load_config([word, "--zzzz=3", "missing.py"], ToyConfig)  # help comes before any error
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {"--steps=10  (int)": "How many steps to take.",
             "--rate=0.5  (float)": "Size of a step.",
             "--name=toy  (str)": "What to call it.",
             "--quick=False  (bool)": "Skip the slow part.",
             "--mode=linear  (linear|cosine|true|false)": "Shape of the decay.",
             "--weights={'web': 1.0}  (dict[str, float])": "Weight of each source."}
    for key, sentence in shown.items():
        assert lines[lines.index(f"  {key}") + 1].strip() == sentence


MAIN = '''"""Usage: toy."""
import errno
from support.command import UserError, run_main

def main(argv):
    if argv == ["mistake"]:
        raise UserError("steps=x: steps takes int")
    if argv == ["bug"]:
        raise ValueError("a bug of ours")
    if argv == ["full"]:
        raise OSError(errno.ENOSPC, "No space left on device", "f")
    if argv == ["stop"]:
        raise KeyboardInterrupt
    return len(argv)

run_main(main)
'''


@pytest.mark.parametrize("word, code, begins, lines", [
    ("", 0, "", 0), ("a b c", 3, "", 0), ("mistake", 1, "error: steps=x: ", 1),
    ("full", 1, "error: ", 1), ("stop", 130, "stopped; ", 1),
    ("bug", 1, "Traceback", None)])
def test_run_main(tmp_path, word, code, begins, lines):
    """A user's mistake and a full disk are one line; a bug keeps its traceback."""
    script = write(tmp_path / "toy.py", MAIN)
    done = subprocess.run([sys.executable, script, *word.split()], text=True, capture_output=True,
                          env={"PYTHONPATH": str(configs.ROOT)})
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(begins)
    assert lines is None or done.stderr.count("\n") == lines


@pytest.mark.parametrize("word, hint", [
    ("--learning_rate=1", "did you mean lr?"), ("--wd=1", "did you mean weight_decay?"),
    ("--n-embd=1", "did you mean d_model?"), ("--block_size=1", "did you mean max_seq_len?"),
    ("--gradient_accumulation_steps=1", "--micro_batch_size=N"), ("--lora_r=8", "all weights"),
    ("--output_dir=x", "did you mean run_dir?"), ("--bf16", "write --dtype=bfloat16"),
    ("--eval_interval=1", "did you mean eval_every_steps?"), ("--dropout=0.1", "has none"),
    ("--epochs=1", "--max_steps=N"), ("--num_train_epochs=1", "--max_steps=N"),
    ("--overwrite=ja", "True or False"), ("--max_steps=1e6", "write 1000000"),
    ("--sources=mytext", "such as --sources=\"{'mine': 'mytext'}\""), ("--steps=3", "max_steps?"),
    ("--sources=a\"b", "{'mine': 'PATH'}"), ("--dtype=bf16", "write bfloat16"),
    ("--device=gpu", "write cuda"), ("--dtype=double", "not double; train.py lists the choices\n"),
    ("--data=mytext", "--sources="), ("--fp16", "on purpose"), ("--patience=3", "--keep_best"),
    ("--load_in_4bit", "on purpose"), ("--bias=true", "no bias"), ("--optimizer=lion", "AdamW"),
    ("--num_gpus=2", "torchrun"), ("--cpu", "--device=cpu"), ("--config=x.py", "name the file"),
    ("--warmup_ratio=0.1", "did you mean warmup_steps?"), ("--vocab_size=512", "--tokenizer=bpe:N"),
    ("--alpha_f=0.1", "--min_lr=RATE"), ("--hidden_dim=512", "--mlp_hidden_size=N"),
    ("--total_batch_size=524288", "--batch_size=N, in sequences"),
    ("--LR=1", "did you mean lr?"), ("--learning_rat=1", "did you mean lr?"),
    ("--lr=1,5e-3", "write 1.5e-3, with a point\n"), ("--lr", "write --lr=VALUE (Peak"),
    ("--max_steps=1,000", "write 1000, without commas\n"), ("--zzz=1", "--help"),
    ("--rules=web", "'rules': 'web'"), ("--lr=1e-3x", "a number, such as 0.003\n"),
    ("--lr='2e-3',", "write 2e-3\n"), ("--lr=1e–3", "write 1e-3\n"), ("--lr=", "as 0.003\n"),
    ("--max_steps=2k", "write 2000\n"), ("--max_steps=9.5", "a whole number, such as 900\n"),
    ("--schedule=sqrt", "not sqrt; train.py lists the choices\n"),
    ("--overwrite=yes", "write --overwrite=true\n"), ("--no-compile", "write --compile=false\n"),
    ("--run_dir='x'", "write --run_dir=x\n"), ("--run_dir=None", "leave --run_dir out"),
    ("--start_from=None", "write --start_from= (new"), ("--data_dir=", "leave --data_dir out"),
    ("-max_steps=3", ": --max_steps=3\n"), ("--report", "python eval.py report"),
    ("--tokenizer=1024", "--tokenizer=bpe:1024, which"), ("max_steps", "--max_steps=VALUE")])
def test_names_of_other_houses_and_values_of_other_types_get_a_hint(call, word, hint):
    result = call(train, configs.ROOT / "configs/tiny.py", word)
    assert result.returncode == 1 and hint in result.stderr, result.stderr


@pytest.mark.parametrize("module, words, right", [
    (adapt, "report runs/x", "eval.py report runs/x"), (train, "trace r --step=3", "data.py trace "
     "r --step=3"), (evaluation, "chat runs/x", "adapt.py chat runs/x"), (evaluation, "evaluate r",
     "eval.py r"), (model, "sample", "eval.py sample RUN"), (data, "export r x", "model.py export"),
    (evaluation, "samples r", "eval.py sample r"), (train, "resume r", "train.py --resume=r"),
    (adapt, "--dtype=float32 chat r", "adapt.py chat --dtype=float32 r"), (data, "show", "--show="),
    (adapt, "train x.py", "adapt.py x.py"), (train, "--lr = 1e-3", "--lr=1e-3"),
    (train, "--lr= 1e-3", "--lr=1e-3"), (train, "--lr =1e-3", "--lr=1e-3"),
    (adapt, "show c.jsonl", "adapt.py show configs/tiny_sft.py --train_data=c.jsonl"),
    (train, "configs/tiny.py c.jsonl", "configs/tiny.py --sources=\"{'mine': 'c.jsonl'}\""),
    (train, "mine.py configs/tiny.py", "train.py configs/tiny.py mine.py"),
    (adapt, "configs/tiny_sft.py mine.py", "configs/tiny_sft.py --start_from=runs/mine"),
    (train, "configs/tiny_sft.py", "configs/tiny_sft.py"),
    (train, "configs\\tiny.py", "mean configs/tiny.py?"), (train, "configstiny.py", "/tiny.py?"),
    (evaluation, "runs/x core", "form --suite=core"), (data, "trace r step=3", "form --step=3"),
    (evaluation, "sample runs/x a", "form --prompt=a"), (data, "trace runs", "name one: runs/x"),
    (evaluation, "runs/x runs/x", "report runs/x runs/x"), (data, "trace", "such as runs/tiny"),
    (data, "--sources={'a':'stdlib'}", "reference, docstrings and code"),
    (evaluation, "report runs", "name one: runs/x"), (train, "--resume=runs", "name one: runs/x"),
    (evaluation, "x", "did you mean runs/x?"), (evaluation, "run/x", "did you mean runs/x?")])
def test_a_slip_gets_the_command_that_works(call, tmp_path, monkeypatch, module, words, right):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.jsonl", "{}")
    write(tmp_path / "mine.py", "adds_to = 'tiny.py'\nrun_dir = 'runs/mine'\n")
    monkeypatch.setattr(data, "build_data", lambda *_: pytest.fail("the text is read"))
    (tmp_path / "runs/x").mkdir(parents=True)
    write(tmp_path / "runs/x/config.json", "{}")
    right = right.replace("mean configs", f"mean {configs.ROOT}/configs")
    result = call(module, *words.split())
    assert result.returncode == 1 and right in result.stderr, result.stderr


def test_the_verbs_are_those_of_the_main_files(call):
    """They are read from docstrings; each file does what its docstring lists."""
    modules = {"eval.py": evaluation, "adapt.py": adapt, "data.py": data, "model.py": model}
    assert verbs().keys() == {"sample", "report", "show", "chat", "generate", "trace", "find",
                              "export"}
    for verb, (file, _) in verbs().items():
        said = call(modules[file], verb).stderr
        assert "error: " in said and "does this" not in said and "no such config" not in said


def test_the_keys_that_may_be_empty_are_known():
    fields = {**fields_of([*train.SCHEMAS, adapt.AdaptConfig, ShowOptions]),
              "html": TraceOptions.__dataclass_fields__["html"], **fields_of([ExperimentsConfig])}
    empty = {key for key, field in fields.items() if field.type is str and field.default == ""}
    assert empty - {"train_data"} == EMPTY.keys()


def test_another_option_is_not_taken_for_the_value_that_is_missing():
    for following in ("--run_dir=x", "--name", "-x"):
        assert refused("--rate", following) == ("--rate: the value is missing; write --rate=VALUE "
                                                "(Size of a step)")
    for following in ("0.1", "-1e-3"):
        assert f"write --rate={following} (" in refused("--rate", following)


@pytest.mark.parametrize("module, word, hint", [
    (adapt, "--learning_rate=1", "did you mean lr?"), (adapt, "--max_iters=9", "--epochs"),
    (adapt, "--warmup_ratio=0.1", "did you mean warmup_share?"), (adapt, "--qlora", "on purpose"),
    (adapt, "--sources=x", "--train_data=PATH"), (adapt, "--n_embd=64", "follows from the model"),
    (adapt, "--seed=1", "a key of train.py"), (evaluation, "--batch_size=8", "--eval_batch_tokens"),
    (evaluation, "--num_gpus=2", "one process"), (data, "--devices=2", "--workers=N"),
    (evaluation, "--config=x.py", "runs/tiny"), (adapt, "--config=x.py", "tiny_sft.py"),
    (evaluation, "--fp16", "--eval_dtype=bfloat16"), (adapt, "--patience=3", "--epochs"),
    (evaluation, "--total_batch_size=8", "--eval_batch_tokens"),
    (evaluation, "--run=r", "runs/tiny"), (evaluation, "--resume=r", "name the directory alone"),
    (evaluation, "--bf16", "--eval_dtype=bfloat16"), (evaluation, "--lr=1", "a key of train.py"),
    (evaluation, "--learning_rate=1", "called lr here, a key of train.py"),
    (evaluation, "--max_tokens=9", "did you mean max_new_tokens?"),
    (evaluation, "--data=x", "--suite=PATH"), (evaluation, "--num_fewshot=5", "mmlu:5shot"),
    (evaluation, "--tasks=mmlu", "did you mean suite?"), (data, "--data=x", "--sources="),
    (data, "--num_proc=4", "did you mean workers?"), (data, "--val_split=0.1", "eval_share?"),
    (data, "--max_iters=4", "did you mean max_steps?"), (data, "--dpo_beta=1", "called beta here")])
def test_each_command_names_what_it_has(call, module, word, hint):
    begin = {adapt: "configs/tiny_sft.py", data: "configs/tiny.py"}.get(module, "configs")
    result = call(module, configs.ROOT / begin, word)
    assert result.returncode == 1 and hint in result.stderr, result.stderr


def test_the_names_of_other_houses_are_those_of_our_keys():
    """Each word means one key of a command, and no word is said to be elsewhere that is a key."""
    schemas = [*train.SCHEMAS, adapt.AdaptConfig]
    known = fields_of(schemas)
    words = [word for words in OURS.values() for word in words.split()]
    assert OURS.keys() <= known.keys() and not known.keys() & set(words)
    assert {word for word in words if words.count(word) > 1} == {"warmup_ratio"}
    commands = {"train.py": fields_of(train.SCHEMAS), "data.py": fields_of(train.SCHEMAS),
                "adapt.py": fields_of([adapt.AdaptConfig, train.TrainConfig]),
                "eval.py": fields_of([evaluation.EvalConfig])}
    for words, named, saying in SAYINGS:
        for command in named.split() or commands:
            # adapt.py sets the keys of the schedule by itself, and refuses them by name
            taken = commands[command].keys() - adapt.DERIVED
            assert not taken & set(words.split()), saying


OPTION = re.compile(r"--(\w+)(?:=(\"[^\"]*\"|[\w.:]+))?")
EXAMPLES = {"N": "64", "RATE": "1e-5", "true": "true"}  # of what stands after the = in a saying


def options_in(saying):
    """The options that a saying names, as somebody would type them; not those of torchrun."""
    fields = fields_of([*train.SCHEMAS, adapt.AdaptConfig])
    for key, value in OPTION.findall(re.sub(r"torchrun \S+", "torchrun", saying)):
        if not value and key in fields:
            value = str(fields[key].default)
        yield f"--{key}={EXAMPLES.get(value, value.strip(chr(34)))}"


@pytest.mark.parametrize("module, begin, work", [
    (train, ["configs/tiny.py"], "train"), (adapt, ["configs/tiny_sft.py"], "adapt"),
    (data, ["configs/tiny.py"], "build_data"), (evaluation, ["configs"], "evaluate_path")])
def test_each_option_in_a_saying_is_one_of_the_command_that_says_it(call, monkeypatch, module,
                                                                    begin, work):
    """Whoever does as told must not be refused again, nor told of another command's program."""
    def reach(*_):  # the command line is read, and the work would begin
        raise UserError("reached")
    monkeypatch.chdir(configs.ROOT)
    monkeypatch.setattr(module, work, reach)
    command = Path(module.__file__).name
    faults = []
    for words, named, saying in SAYINGS:
        if named and command not in named.split():
            continue
        for option in options_in(saying):
            said = call(module, *begin, option).stderr
            if not said.endswith("error: reached\n"):
                faults.append(f"{words.split()[0]}: {saying}: {said.strip()}")
        if "torchrun" in saying and not hasattr(module.main, "takes_ranks"):
            faults.append(f"{words.split()[0]}: {saying}: {command} is one process")
    assert not faults, "\n".join(faults)


def test_counts_are_written_with_their_noun():
    assert [counted(n, "line") for n in (0, 1, 2000)] == ["0 lines", "1 line", "2,000 lines"]


def test_a_run_that_is_not_there_is_compared_with_those_beside_it(tmp_path):
    assert run_remedy(tmp_path / "tiny").startswith("python train.py configs/tiny.py makes")
    made = run_remedy(tmp_path / "tiny_dpo")
    assert made.endswith("adapt.py configs/tiny_dpo.py makes runs/tiny_dpo")
    assert "adapt.py configs/tiny_sft.py &&" in made
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert run_remedy(tmp_path / "mine1").startswith(f"did you mean {tmp_path}/mine? If it has mo")
    assert run_remedy(tmp_path / "x").startswith(f"{tmp_path} has mine, other; if it has moved")
    near = run_remedy(tmp_path / "tine")
    assert near.startswith(f"did you mean {tmp_path}/mine?")
    assert runs_below(tmp_path).endswith(f"name one: {tmp_path}/mine, {tmp_path}/other")
    assert runs_below(tmp_path / "mine") == ""
