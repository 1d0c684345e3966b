"""Going on with an official run, against official OLMo itself.

tests/data/official holds a small run of it, saved at step 10 of 20, and make.py, which made it.
"""

import json
import pickle
import shutil
import zipfile
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT, Bomb, refusal

from support.official import official_config
from support.official_state import (check_optimizer, has_training_state, read_optimizer,
                                    read_progress, steps_taken)
from support.plain_pickle import read_plain
from support.yaml_text import read_yaml

RECORDED = ROOT / "tests" / "data" / "official"
RUN = json.loads((RECORDED / "run.json").read_text())
CHECKPOINT = RECORDED / "step10-unsharded"
MODEL = official_config(CHECKPOINT / "config.yaml")
safetensors = pytest.mark.skipif(not find_spec("safetensors"), reason="needs safetensors")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the checkpoint, to be changed."""
    return shutil.copytree(CHECKPOINT, tmp_path / "step10-unsharded")


def change_yaml(path, **changes):
    """Change lines of config.yaml: `block__key` is a key of a block."""
    file = path / "config.yaml"
    lines = file.read_text().splitlines()
    for name, value in changes.items():
        block, _, key = name.rpartition("__")
        start = lines.index(f"{block}:") if block else 0
        begin = ("  " if block else "") + f"{key}:"
        number = next(i for i in range(start, len(lines)) if lines[i].startswith(begin))
        lines[number] = f"{begin} {value}"
    file.write_text("\n".join(lines) + "\n")


# ---- What the files hold -------------------------------------------------------------------------

def encoded(*keys, is_pickled=False):
    """The name of a tensor as official OLMo's safetensors_util.py writes it."""
    import base64
    return base64.urlsafe_b64encode(pickle.dumps((keys, is_pickled))).decode()


def flatten(value, keys=()):
    """{name: tensor} of nested dicts, as safetensors_util.py writes them."""
    if isinstance(value, dict):
        parts = [flatten(each, (*keys, key)) for key, each in value.items()]
        return {name: tensor for part in parts for name, tensor in part.items()}
    if torch.is_tensor(value):
        return {encoded(*keys): value}
    pickled = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
    return {encoded(*keys, is_pickled=True): pickled}


def by_number(state):
    """The other form of optim.pt: parameters are numbers, and the groups have their names."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    groups = [{**group, "params": [numbers[name] for name in group["params"]]}
              for group in state["param_groups"]]
    return {"state": {numbers[name]: each for name, each in state["state"].items()},
            "param_groups": groups}


@pytest.mark.parametrize("form", ["as saved", "by number",
                                  pytest.param("safetensors", marks=safetensors)])
def test_moments_and_progress_are_those_that_torch_reads(checkpoint, form):
    saved = torch.load(CHECKPOINT / "optim.pt", weights_only=True)
    if form == "by number":
        torch.save(by_number(saved), checkpoint / "optim.pt")
    if form == "safetensors":
        from safetensors.torch import save_file
        loop = torch.load(checkpoint / "train.pt", weights_only=False)
        for name, value in (("optim", saved), ("train", loop)):
            save_file(flatten(value), checkpoint / f"{name}.safetensors")
            (checkpoint / f"{name}.pt").write_bytes(b"not read")
    found = read_optimizer(checkpoint)
    check_optimizer(found, MODEL)
    assert found.state.keys() == saved["state"].keys()
    for name, moments in saved["state"].items():
        assert steps_taken(found, name) == 10
        for moment in ("exp_avg", "exp_avg_sq"):
            rows = found.state[name][moment].rows(1, 7)
            assert torch.equal(rows, moments[moment][1:7]) and rows.any()
    assert [group["params"] for group in found.groups] == [
        group["params"] for group in saved["param_groups"]]
    assert read_progress(checkpoint) == (10, 0, 40, 640)


def rewrite(file, change):
    """Change data.pkl in a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in parts:
            is_pickle = entry.filename.endswith("data.pkl")
            archive.writestr(entry, change(content) if is_pickle else content)


def test_random_states_and_paths_are_left_out(checkpoint):
    """Of every Python and numpy: their pickles name the same things by other modules."""
    file = checkpoint / "train.pt"
    for old, new in ((b"numpy._core.", b"numpy.core."), (b"cpathlib\n", b"cpathlib._local\n")):
        rewrite(file, lambda content, old=old, new=new: content.replace(old, new))
        found = read_plain(file)
        assert found["global_step"] == 10 and found["rng"]["numpy"][0] == "MT19937"
        assert {type(each).__name__ for each in found["unsharded_checkpoints"]} == {"LeftOut"}
        assert type(found["rng"]["numpy"][1]).__name__ == "LeftOut"


# ---- What must not run, and damage ---------------------------------------------------------------

BOMBS = ["train.pt", "train.pt, in a list", "other.pt", "optim.pt"] + [
    pytest.param(each, marks=safetensors) for each in (
        "optim.safetensors, a value", "optim.safetensors, a name", "train.safetensors, a value")]


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_stops_with_its_place_and_runs_nothing(checkpoint, tmp_path, where):
    marker = tmp_path / "ran"
    name, _, how = where.partition(", ")
    file = checkpoint / name
    if name == "other.pt":
        (checkpoint / "train.pt").unlink()
    if name.endswith(".pt"):
        value = {"state": {}, "param_groups": [], "global_step": Bomb(marker)}
        torch.save({**value, "checkpoints": [Bomb(marker)]} if how else value, file)
    else:
        from safetensors.torch import save_file
        pickled = torch.frombuffer(bytearray(pickle.dumps(Bomb(marker))), dtype=torch.uint8)
        name_of_it = encoded("param_groups", is_pickled=True)
        if how == "a name":
            name_of_it = encoded("state", Bomb(marker))
        save_file({name_of_it: pickled}, file)
    read = read_optimizer if file.stem == "optim" else read_progress
    line = refusal(read, checkpoint)
    assert str(file) in line and not marker.exists()
    if how != "a name":
        assert "io.open" in line  # what it would have run
    if name.endswith(".pt"):  # the bomb is live
        torch.load(file, weights_only=False)
        assert marker.exists()


def cut(file):
    file.write_bytes(file.read_bytes()[:-300])


def save(change):
    """Change what torch reads from a file."""
    def write(file):
        value = torch.load(file, weights_only=False)
        change(value)
        torch.save(value, file)
    return write


def first(value):
    return next(iter(value["state"].values()))


def drop_first(value):
    del value["state"]["transformer.wte.weight"]


DAMAGE = {
    "train.pt": [
        (cut, "train.pt"), (lambda file: file.write_bytes(b""), "train.pt"),
        (lambda file: torch.save([1], file), "dict"),
        (save(lambda value: value.update(global_step="ten")), "global_step"),
        (save(lambda value: value.update(global_step=True)), "global_step"),
        (save(lambda value: value.update(global_train_tokens_seen=-1)), "tokens_seen"),
        (save(lambda value: value.pop("global_train_examples_seen_this_epoch")), "examples_seen"),
        (save(lambda value: value.update(epoch=2**70)), "epoch")],
    "optim.pt": [
        (cut, "optim.pt"), (lambda file: file.write_text("hello"), "optim.pt"),
        (lambda file: torch.save({"state": 1}, file), "param_groups"),
        (save(drop_first), "missing transformer.wte.weight.exp_avg"),
        (save(lambda value: value["state"].update(more=first(value))), "unexpected more.exp_avg"),
        (save(lambda value: first(value).update(exp_avg=torch.zeros(2, 3))), "shape (2, 3)"),
        (save(lambda value: first(value).update(exp_avg=1.0)), "exp_avg"),
        (save(lambda value: first(value).update(step=torch.tensor(-1.0))), "step"),
        (save(lambda value: first(value).pop("step")), "step"),
        (save(lambda value: first(value).update(max_exp_avg_sq=torch.zeros(24, 8))),
         "max_exp_avg_sq")]}


@pytest.mark.parametrize(("name", "damage", "word"), [
    (name, *case) for name, cases in DAMAGE.items() for case in cases])
def test_damage_is_named(checkpoint, name, damage, word):
    file = checkpoint / name
    damage(file)

    def read():
        if name == "train.pt":
            read_progress(checkpoint)
        check_optimizer(read_optimizer(checkpoint), MODEL)
    line = refusal(read)
    assert str(file) in line and word in line


def test_a_packed_file_is_not_unpacked(checkpoint):
    for name, read in (("train.pt", read_progress), ("optim.pt", read_optimizer)):
        with zipfile.ZipFile(checkpoint / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(2**26 + 1))  # 64 KiB on the disk
        assert str(checkpoint / name) in refusal(read, checkpoint)


def test_half_a_training_state_is_named(checkpoint):
    assert has_training_state(checkpoint)
    for there, missing in (("train.pt", "optim.pt"), ("optim.pt", "train.pt")):
        shutil.copy(CHECKPOINT / there, checkpoint)
        (checkpoint / missing).unlink()
        line = refusal(has_training_state, checkpoint)
        assert str(checkpoint / missing) in line and "--fresh_optimizer" in line
    (checkpoint / "optim.pt").unlink()
    assert not has_training_state(checkpoint)


# ---- config.yaml ---------------------------------------------------------------------------------

def plain(value):
    """A value of PyYAML as ours: texts, "true", "false" and None."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return str(value).lower() if isinstance(value, bool) else value and str(value)


YAML = """\
# a comment
---
a: 1  # one
"b c": 'd # e'
'f': "g: h"
list: [1.5, x, 'y z']
none: ~
nested:
  - label: v3   # a mapping in a list
    data:
      paths:
      - s3://bucket/a#1.npy
      - "b"
  -
    label: other
  - - inner
    - True
empty: {}
deep: {}
url: https://example.org/a:b
after:
- 1
- null
"""


@pytest.mark.skipif(not find_spec("yaml"), reason="needs pyyaml")
def test_yaml_is_read_as_by_pyyaml(tmp_path):
    import yaml
    file = tmp_path / "config.yaml"
    for text in (YAML, (CHECKPOINT / "config.yaml").read_text()):
        file.write_text(text)
        wanted = yaml.safe_load(text)
        assert read_yaml(file) == plain_numbers(plain(wanted), read_yaml(file))


def plain_numbers(wanted, ours):
    """`wanted` with our text where both are the same number, as 3.0e-4 and 0.0003 are."""
    if isinstance(wanted, dict):
        return {key: plain_numbers(each, ours.get(key)) for key, each in wanted.items()}
    if isinstance(wanted, list):
        return [plain_numbers(*pair) for pair in zip(wanted, ours, strict=True)]
    try:
        return ours if float(wanted) == float(ours) else wanted
    except (TypeError, ValueError):
        return wanted


@pytest.mark.parametrize(("text", "line"), [
    ("a: 1\na: 2", 2), ("a: |\n  text", 1), ("a: &x 1", 1), ("a: 1\n  more", 2), ("\ta: 1", 1),
    ("a: {b: 1}", 1), ("just text", 1), ("a: 'open", 1), ("- 1\na: 1", 2), ("a:\n  b: 1\n c: 2", 3),
    ("\n".join("  " * i + "a:" for i in range(60)), 52)])
def test_other_yaml_is_named_with_its_line(tmp_path, text, line):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert f"{file}:{line}: " in refusal(read_yaml, file)
