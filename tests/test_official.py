"""Going on with an official run, against official OLMo itself.

tests/data/official holds a small run of it, saved at step 10 of 20, and make.py, which made it.
"""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import zipfile
from collections import defaultdict
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import PATIENCE_S, ROOT, Bomb, columns, forked_ranks, refusal, steps

import train
from corpus.bpe import train_bpe
from scaling.ranks import batch_hash

from support.official import official_config, open_official
from support.official_place import check_place, notes, short_names
from support.official_run import settings_to_go_on
from support.official_state import (check_optimizer, has_training_state, read_optimizer,
                                    read_progress, steps_taken)
from support.plain_pickle import read_plain
from support.weights import load_model, name_table
from support.yaml_text import read_yaml
from train import TrainConfig, lr_at_step

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
    assert read_progress(checkpoint) == (10, 0, 40, 640, 1)


@safetensors
def test_a_tensor_within_a_tensor_is_named(checkpoint):
    from safetensors.torch import save_file
    one = torch.zeros(2)
    save_file({encoded("state"): one, encoded("state", "a", "exp_avg"): one.clone()},
              checkpoint / "optim.safetensors")
    assert "no dict" in refusal(read_optimizer, checkpoint)


def rewrite(file, change):
    """Change data.pkl in a file of torch.save."""
    with zipfile.ZipFile(file) as archive:
        parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w") as archive:
        for entry, content in parts:
            is_pickle = entry.filename.endswith("data.pkl")
            archive.writestr(entry, change(content) if is_pickle else content)


def test_the_norms_of_another_clipping_are_no_moments(checkpoint):
    """Such a run is refused by its config.yaml, unless it has turned that clipping off."""
    save(lambda value: first(value).update(grad_norm_exp_avg=torch.tensor(1.0)))(
        checkpoint / "optim.pt")
    check_optimizer(read_optimizer(checkpoint), MODEL)


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

BOMBS = ["train.pt", "train.pt, in a list", "optim.pt"] + [
    pytest.param(each, marks=safetensors) for each in (
        "optim.safetensors, a value", "optim.safetensors, a name", "train.safetensors, a value")]


@pytest.mark.parametrize("where", BOMBS)
def test_a_bomb_stops_with_its_place_and_runs_nothing(checkpoint, tmp_path, where):
    marker = tmp_path / "ran"
    name, _, how = where.partition(", ")
    file = checkpoint / name
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
        (save(lambda value: value["param_groups"][0].pop("params")), "KeyError"),
        (save(lambda value: value["param_groups"][0].pop("betas")), "betas"),
        (save(lambda value: value["param_groups"][0].update(eps="a")), "eps"),
        (save(lambda value: value["param_groups"][0].update(betas=0.9)), "betas"),
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
        settings_of(checkpoint)
    line = refusal(read)
    assert str(file) in line and word in line


def test_a_packed_file_is_not_unpacked(checkpoint, monkeypatch):
    monkeypatch.setattr("support.plain_pickle.MOST_BYTES", 2**16)
    for name, read in (("train.pt", read_progress), ("optim.pt", read_optimizer),
                       ("model.pt", open_official)):
        with zipfile.ZipFile(checkpoint / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/data.pkl", bytes(2**16 + 1))
        reason = refusal(read, checkpoint).partition(f"{checkpoint / name}: ")[2]
        assert "65,537 bytes" in reason or "packed" in reason


def test_a_dict_that_holds_itself_has_an_end(checkpoint):
    value = {}
    value["state"] = value
    rewrite(checkpoint / "optim.pt", lambda content: pickle.dumps(value, protocol=2))
    assert "param_groups" in refusal(read_optimizer, checkpoint)


def test_a_tensor_with_more_numbers_than_the_file_is_refused(checkpoint):
    """One number, repeated: memory would be taken for as many as its shape says."""
    huge = torch.zeros(1).expand(10**6, 10**6)
    name = "transformer.wte.weight"
    save(lambda value: value.update({name: huge}))(checkpoint / "model.pt")
    save(lambda value: value["state"][name].update(exp_avg=huge))(checkpoint / "optim.pt")
    for read in (open_official, read_optimizer):
        line = refusal(read, checkpoint)
        assert name in line and "no plain numbers" in line


def test_a_moment_that_is_no_number_is_named(config, checkpoint, call, refused):
    save(lambda value: first(value)["exp_avg_sq"].fill_(float("nan")))(checkpoint / "optim.pt")
    refused(call(train, config, f"--start_from={checkpoint}"), checkpoint / "optim.pt",
            "transformer.blocks.0.att_proj.weight.exp_avg_sq", "NaN")


def test_a_fault_that_one_rank_finds_ends_all_of_them(config, checkpoint):
    save(lambda value: value["state"]["transformer.wte.weight"]["exp_avg"][-1].fill_(math.inf))(
        checkpoint / "optim.pt")  # the last row, which rank 1 has
    codes, log = forked_ranks(2, config.parent / "log", train.main, str(config),
                              f"--start_from={checkpoint}")
    assert codes[0] == 1 and "transformer.wte.weight.exp_avg holds" in log, log  # rank 0 too


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
long: a text that is
  folded, as it is wide
quoted: 'it''s
  folded: too'
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
    ("a: 1\na: 2", 2), ("a: |\n  text", 1), ("a: &x 1", 1), ("a: 1\n  b: 2", 2), ("\ta: 1", 1),
    ("a: {b: 1}", 1), ("a: 'x' y", 1), ("just text", 1), ("a: 'open", 1), ("- 1\na: 1", 2),
    ("a:\n  b: 1\n c: 2", 3), ("a: 'x\n" + "  y\n" * 1000, 203),
    ("a: x" + " " * 100_000 + "y\nz", 2),  # quickly
    ("\n".join("  " * i + "a:" for i in range(60)), 52)])
def test_other_yaml_is_named_with_its_line(tmp_path, text, line):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert f"{file}:{line}: " in refusal(read_yaml, file)
    file.write_text("- 1\n- 2")
    assert f"{file}: holds a list" in refusal(read_yaml, file)


def settings_given(**given):
    """A dict that holds None for every key of ours that is not given."""
    return defaultdict(type(None), given)


def settings_of(path, **given):
    """What is taken from an official run, beside what is given."""
    return settings_to_go_on(path, settings_given(**given), lambda key: "--", vars(MODEL))


@pytest.mark.parametrize(("changes", "wanted"), [
    ({}, dict(batch_size=4, max_seq_len=16, seed=6198, lr=0.02, min_lr=0.002, warmup_steps=12,
              schedule="linear", weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-5, grad_clip=1.0,
              grad_clip_warmup_steps=0, d_model=8)),
    (dict(max_duration="30"), dict(decay_steps=30, max_steps=30)),
    (dict(max_duration="1.3e3T"), dict(decay_steps=20, max_steps=20)),  # 64 tokens a step
    (dict(max_duration="30", scheduler__t_max="25"), dict(decay_steps=25, max_steps=30)),
    (dict(scheduler__units="tokens", scheduler__t_warmup="640", scheduler__t_max="1e4"),
     dict(warmup_steps=10, decay_steps=156)),
    (dict(max_duration="1.33e3T", scheduler__units="tokens"), dict(decay_steps=21, max_steps=20)),
    (dict(max_grad_norm="null", data__prefetch_factor="4"), dict(grad_clip=0.0)),
    (dict(data__timeout="0\n  seed: 7"), dict(seed=7)),
    (dict(scheduler__grad_clip_warmup_steps="7"), dict(grad_clip_warmup_steps=0)),
    (dict(scheduler__name="cosine_with_warmup", scheduler__alpha_f="0.0"),
     dict(schedule="cosine", min_lr=0.0)),
    (dict(scheduler__name="constant"), dict(warmup_steps=0, min_lr=0.02)),
    (dict(scheduler__grad_clip_warmup_steps="7", scheduler__grad_clip_warmup_factor="5.0"),
     dict(grad_clip_warmup_steps=7, grad_clip_warmup_factor=5.0))])
def test_settings_are_taken_from_config_yaml(checkpoint, changes, wanted):
    change_yaml(checkpoint, **changes)
    found = settings_of(checkpoint)
    assert {key: found[key] for key in wanted} == pytest.approx(wanted)
    assert ("decay_steps" in found) == ("max_duration" in changes or "scheduler__t_max" in changes)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("units", ["steps", "tokens"])
def test_the_learning_rate_is_that_of_a_slow_scheduler(checkpoint, scheduler, units):
    """olmo/optim.py at v0.2.5, written again: LinearWithWarmup and CosWithWarmup."""
    per_step = 1 if units == "steps" else 64
    change_yaml(checkpoint, scheduler__name=f"{scheduler}_with_warmup", max_duration="100",
                scheduler__units=units, scheduler__t_warmup=str(12 * per_step),
                scheduler__t_max=str(80 * per_step), scheduler__alpha_f="0.25")
    config = TrainConfig(**{key: value for key, value in settings_of(checkpoint).items()
                            if key in TrainConfig.__dataclass_fields__})
    for step in range(1, 101):
        current, warmup, last = (count * per_step for count in (step, 12, 80))
        if current < warmup:
            rate = 0.02 * (0.1 + 0.9 * min(current, warmup) / warmup)
        elif current >= last:
            rate = 0.02 * 0.25
        elif scheduler == "cosine":
            share = (current - warmup) / (last - warmup)
            rate = 0.005 + (0.02 - 0.005) * (1 + math.cos(math.pi * share)) / 2
        else:
            rate = 0.02 - (0.02 - 0.005) * ((current - warmup) / (last - warmup))
        assert lr_at_step(step, config) == pytest.approx(rate, rel=1e-12)


def test_what_is_set_otherwise_is_named_all_at_once(checkpoint):
    change_yaml(checkpoint, max_duration="30")
    same = dict(batch_size=4, lr=0.02, min_lr=0.1 * 0.02, schedule="linear", decay_steps=30,
                max_steps=20, eps=1e-5, d_model=8)
    assert settings_of(checkpoint, **same)["max_steps"] == 30  # which the config then overrides
    change_yaml(checkpoint, optimizer__learning_rate="3.0e-4")  # times 0.1 it is 2.99...97e-05
    settings_of(checkpoint, min_lr=3e-5)
    change_yaml(checkpoint, optimizer__learning_rate="0.02")
    other = dict(batch_size=8, lr=0.03, schedule="cosine", decay_steps=20, eps=1e-8, seed=1,
                 beta2=0.99, grad_clip=0.0, weight_decay=0.0, warmup_steps=3, d_model=16,
                 max_seq_len=8)
    line = refusal(settings_of, checkpoint, **other)
    assert str(checkpoint) in line and "--fresh_optimizer" in line
    for key, value in other.items():
        assert f"--{key}={value}, not " in line
    for words in ("not 4 (global_train_batch_size: 4 in config.yaml)", "beta: 0.95 in optim.pt",
                  "not linear (scheduler.name: linear_with_warmup in config.yaml)"):
        assert words in line


@pytest.mark.parametrize(("changes", "words"), [
    (dict(optimizer__name="lionw", softmax_auxiliary_loss="true"),
     ["optimizer.name: lionw, not adamw", "softmax_auxiliary_loss: true"]),
    (dict(optimizer__decay_embeddings="true"), ["decay_embeddings: true"]),
    (dict(model__attention_dropout="0.1"), ["model.attention_dropout: 0.1"]),
    (dict(scheduler__name="max_scheduler"), ["scheduler.name: max_scheduler"]),
    (dict(max_grad_norm_ratio="2.0"), ["max_grad_norm_ratio: 2.0, not null"]),
    (dict(reset_optimizer_state="true"), ["reset_optimizer_state"]),
    (dict(fast_forward_batches="5"), ["fast_forward_batches: 5, not null"]),
    (dict(data__timeout="0\n  twist: 3"), ["data.twist is unknown"]),
    (dict(data__generate_attention_mask="true"), ["generate_attention_mask"]),
    (dict(global_train_batch_size="four"), ["four"]), (dict(max_duration="soon"), ["soon"]),
    (dict(optimizer__learning_rate="nan"), ["nan"]), (dict(global_train_batch_size="0"), ["0"]),
    (dict(scheduler__t_max="0"), ["t_max"]), (dict(max_duration="xep"), ["x"]),
    (dict(max_duration="[1]"), ["endswith"]), (dict(scheduler__name="[a]"), ["scheduler.name"]),
    (dict(seed="-1"), ["seed: -1"]), (dict(global_train_batch_size="[4]"), ["list"])])
def test_what_we_do_not_do_as_official_olmo_is_named(checkpoint, changes, words):
    change_yaml(checkpoint, **changes)
    line = refusal(settings_of, checkpoint)
    assert str(checkpoint / "config.yaml") in line
    for word in words:
        assert word in line


def test_what_is_not_the_same_here_is_said(checkpoint):
    settings = dict(max_seq_len=16, dtype="auto")
    [files] = notes(checkpoint, settings)
    assert "names and order: " in files and "global_indices.npy" in files
    shutil.copytree(RECORDED / "train_data", checkpoint.parent / "train_data")
    change_yaml(checkpoint, precision="amp_bf16\ndistributed_strategy: fsdp")
    files, loss, precision = notes(checkpoint, settings)
    assert files.endswith("names and order")
    assert "0.4" in loss and "16" in loss
    assert "amp_bf16" in precision and "--dtype=auto" in precision


@pytest.mark.parametrize("change", [dict(betas=(0.9, 0.99)), dict(amsgrad=True), dict(eps=1e-8)])
def test_an_adamw_of_another_kind_is_named(checkpoint, change):
    """Official OLMo takes these from optim.pt: the values of config.yaml no longer count."""
    save(lambda value: value["param_groups"][1].update(change))(checkpoint / "optim.pt")
    assert str(checkpoint / "optim.pt") in refusal(settings_of, checkpoint)
    if "amsgrad" not in change:
        save(lambda value: value["param_groups"][0].update(change))(checkpoint / "optim.pt")
        found = settings_of(checkpoint)
        assert (found["beta2"], found["eps"]) == (change.get("betas", (0, 0.95))[1],
                                                  change.get("eps", 1e-5))


# ---- The place in the data -----------------------------------------------------------------------

@pytest.fixture
def place(tmp_path, checkpoint):
    """check_place, with our list of the token files and other settings."""
    def check(names=("tokens-0.npy", "tokens-1.npy"), **changes):
        (tmp_path / "list").write_text("".join(f"{RECORDED / name}\n" for name in names))
        settings = dict(batch_size=4, max_seq_len=16, vocab_size=300, decay_steps=28, max_steps=20,
                        token_files=str(tmp_path / "list"))
        check_place(checkpoint, {**settings, **changes})
    return check


def test_other_token_files_are_named(place, checkpoint, tmp_path):
    place()
    place(decay_steps=0, max_steps=28)
    (tmp_path / "far").mkdir()
    for number in (0, 1):
        shutil.copy(RECORDED / f"tokens-{number}.npy", tmp_path / "far" / f"tokens-{number}.npy")
    place([tmp_path / "far/tokens-0.npy", tmp_path / "far/tokens-1.npy"])  # only the names count
    for names, words in (
            (["tokens-1.npy", "tokens-0.npy"], ["file 1 is tokens-1.npy", "tokens-0.npy in"]),
            (["tokens-0.npy"], ["1 file", "config.yaml 2"])):
        line = refusal(place, names)
        assert all(word in line for word in (*words, f"token_files={tmp_path / 'list'}"))
    assert "2 token files: --token_files" in refusal(place, token_files="")
    file = checkpoint / "config.yaml"
    text = file.read_text()
    lines = "  paths:\n  - tokens-0.npy\n  - tokens-1.npy\n  datasets: null\n"
    labelled = "  datasets:\n    b:\n    - x/tokens-1.npy\n    a:\n    - y/tokens-0.npy\n"
    file.write_text(text.replace(lines, labelled))
    place()  # the files of the labels, in the order of these
    for other in ("paths: tokens-0.npy\n", "paths:\n  - [a]\n", "paths:\n  - x:\n"):
        file.write_text(text.replace(lines, "  " + other))
        assert "no list of paths" in refusal(place)
    file.write_text(text)
    assert "decay_steps=28" in refusal(place, decay_steps=30)
    assert "max_steps=10, and it is at step 10" in refusal(place, max_steps=10)
    assert "--max_steps=28" in refusal(place, max_steps=29)
    assert "less than one batch" in refusal(place, batch_size=1000)


def test_a_token_file_that_is_cut_off_is_found_by_the_order_beside_it(place, checkpoint, tmp_path):
    """Its name is the same, and in the first epoch the place in the data is, too."""
    shutil.copy(RECORDED / "tokens-0.npy", tmp_path)
    cut = tmp_path / "tokens-1.npy"
    cut.write_bytes((RECORDED / "tokens-1.npy").read_bytes()[:-100])  # 3 sequences of 16 tokens
    names = [tmp_path / "tokens-0.npy", cut]
    place(names, decay_steps=26)
    order = shutil.copytree(RECORDED / "train_data", tmp_path / "train_data") / "global_indices.npy"
    place()
    line = refusal(place, names, decay_steps=26)
    assert f"{order} lists 58 sequences" in line and "hold 55" in line
    for ranks, listed, fits in ((4, 56, True), (4, 60, True), (4, 58, False), (1, 57, False)):
        order.write_bytes(bytes(4 * listed))  # without the rest, or with some of them twice
        save(lambda value, ranks=ranks: value.update(world_size=ranks))(checkpoint / "train.pt")
        place() if fits else refusal(place)


def test_files_of_the_same_name_are_told_apart_by_their_folders():
    paths = ["s3://a/x/cc/part-0.npy", "s3://a/x/wiki/part-0.npy"]
    assert short_names(paths) == ["cc/part-0.npy", "wiki/part-0.npy"]
    assert short_names(["/data/cc/part-0.npy", "/data/wiki/part-0.npy"]) == short_names(paths)
    assert short_names(["/data/wiki/part-0.npy", "/data/cc/part-0.npy"]) != short_names(paths)
    assert short_names(["/a/part-0.npy"] * 2) == ["part-0.npy"] * 2  # shown twice


@pytest.mark.parametrize(("step", "epoch", "examples", "fits"), [
    (10, 0, 40, True), (14, 0, 56, True), (14, 1, 0, True), (20, 1, 24, True), (28, 2, 0, True),
    (10, None, 40, True), (10, 0, 80, False), (20, 0, 80, False), (20, 1, 0, False)])
def test_the_place_in_the_data_follows_from_the_step(place, checkpoint, step, epoch, examples,
                                                     fits):
    """Also at the end of an epoch, which official OLMo saves in two ways."""
    file = checkpoint / "train.pt"
    save(lambda value: value.update(global_step=step, epoch=epoch,
                                    global_train_examples_seen_this_epoch=examples,
                                    global_train_tokens_seen=64 * step))(file)
    if fits:
        assert "stood at" not in refusal(place, max_steps=step)  # which it has reached
    else:
        line = refusal(place, max_steps=28)
        assert f"example {examples} of epoch {epoch}" in line and "14 steps" in line


def test_a_number_of_tokens_that_does_not_follow_from_the_step_is_named(place, checkpoint):
    save(lambda value: value.update(global_train_tokens_seen=320))(checkpoint / "train.pt")
    assert "had seen 320 tokens, and 640 are" in refusal(place)


# ---- The run -------------------------------------------------------------------------------------

@pytest.fixture
def config(tmp_path, tokenizer, monkeypatch):
    """A config file in an empty folder: what an official run does not say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").write_text(f"{RECORDED}/tokens-0.npy\n{RECORDED}/tokens-1.npy\n")
    (tmp_path / "on.py").write_text(
        f'token_files = "list"\ntokenizer = "{tokenizer}"\nrun_dir = "run"\ndevice = "cpu"\n'
        'dtype = "float32"\ncompile = "false"\neval_every_steps = 0\nlog_every_steps = 1\n'
        "decay_steps = 28\nmax_steps = 20\nmax_new_tokens = 1\nkeep_last = 0\n")
    return tmp_path / "on.py"


def check_goes_on(run, recorded, record):
    """Loss, learning rate and batch of steps 11 to 20 and the weights are official OLMo's."""
    found = columns(run, "step", "loss", "lr", "batch_hash", "world_size")
    assert [step for step, *_ in found] == list(range(11, 21))
    files = [np.fromfile(recorded / f"tokens-{number}.npy", np.uint16) for number in (0, 1)]
    instances = np.concatenate([file[:len(file) // 16 * 16].reshape(-1, 16) for file in files])
    for step, loss, lr, digest, ranks in found:
        assert loss == pytest.approx(record["loss"][step - 1], abs=1e-4)
        assert lr == pytest.approx(record["lr"][step - 1], rel=1e-12)
        if ranks == 1:
            batch = instances[record["batch"][step - 1]].astype(np.int64)
            assert digest == batch_hash(torch.from_numpy(batch))
    ours = dict(load_model(run / "step000020").named_parameters())
    theirs = torch.load(recorded / "step20.pt", weights_only=True)
    before = torch.load(recorded / "step10-unsharded/model.pt", weights_only=True)
    for names in name_table(official_config(recorded / "step10-unsharded/config.yaml")):
        wanted = theirs[names.official]
        assert (ours[names.ours] - wanted).norm() <= 1e-4 * wanted.norm()
        assert (before[names.official] - wanted).norm() > 0.01 * wanted.norm()  # it has learned


def test_a_run_goes_on_as_official_olmo_would_have(config, checkpoint, call, one_thread):
    """Over the border of the first epoch, at step 14. Then it is a run as any other."""
    words = [train, config, f"--start_from={checkpoint}"]
    result = call(*words)
    assert result.returncode == 0, result.stderr
    assert f"after step 10 of the official run in {checkpoint}" in result.stdout
    run = config.parent / "run"
    check_goes_on(run, RECORDED, RUN)
    settings = json.loads((run / "config.json").read_text())
    assert (settings["batch_size"], settings["lr"], settings["eps"]) == (4, 0.02, 1e-5)
    assert not settings["fresh_optimizer"]
    shutil.rmtree(checkpoint)  # it may be gone once the run has a step of its own
    assert call(*words, "--max_steps=22").returncode == 0
    assert call(train, "--resume=run", "--max_steps=24").returncode == 0
    assert steps(run) == list(range(11, 25))


def test_two_ranks_go_on_as_official_olmo_would_have(config, checkpoint):
    codes, log = forked_ranks(2, config.parent / "log", train.main, str(config),
                              f"--start_from={checkpoint}")
    assert codes == [0, 0], log
    assert {ranks for (ranks,) in columns(config.parent / "run", "world_size")} == {2}
    check_goes_on(config.parent / "run", RECORDED, RUN)


def test_a_checkpoint_from_before_the_first_step_has_no_moments(config, checkpoint, call, refused):
    """Official OLMo saves one, to see that it can; AdamW has no state yet."""
    optimizer, loop = checkpoint / "optim.pt", checkpoint / "train.pt"
    save(lambda value: value["state"].clear())(optimizer)
    words = [train, config, f"--start_from={checkpoint}", "--max_steps=12"]
    refused(call(*words), optimizer, "missing transformer.wte.weight.exp_avg")
    save(lambda value: value.update(global_step=0, global_train_examples_seen_this_epoch=0,
                                    global_train_tokens_seen=0))(loop)
    result = call(*words)
    assert result.returncode == 0 and "after step 0 of the official run" in result.stdout
    assert steps(config.parent / "run") == list(range(1, 13))


def test_the_plan_of_such_a_run_and_the_tokenizer_beside_it(config, checkpoint, call, tokenizer):
    shutil.copy(tokenizer, checkpoint / "tokenizer.json")
    words = [train, config, f"--start_from={checkpoint}"]
    config.write_text(re.sub("tokenizer = .*\n", "", config.read_text()))
    result = call(*words, "--plan")
    assert result.returncode == 0 and "10 steps of 4 x 16 tokens" in result.stdout
    assert call(*words, "--max_steps=11").returncode == 0
    settings = json.loads((config.parent / "run/config.json").read_text())
    assert settings["tokenizer"] == str(checkpoint / "tokenizer.json")


def test_another_tokenizer_is_named_with_its_remedy(config, checkpoint, tmp_path, call, refused):
    """The shape is that of the weights: to set another vocab_size would be the next error."""
    train_bpe(["the quick brown fox " * 99], 290).save(tmp_path / "other.json")
    line = refused(call(train, config, f"--start_from={checkpoint}", "--tokenizer=other.json"),
                   "other.json: vocab_size is 290 here", "--tokenizer=FILE")
    assert "set --vocab_size" not in line


def test_a_run_stops_where_official_olmo_would_go_on_differently(config, checkpoint, call,
                                                                 refused):
    words = [train, config, f"--start_from={checkpoint}"]
    refused(call(*words, "--batch_size=8"), "--batch_size=8, not 4", checkpoint)
    (config.parent / "list").write_text(f"{RECORDED}/tokens-0.npy\n")
    refused(call(*words), "token_files=list names 1 file", "config.yaml 2")
    config.write_text(config.read_text() + "lr = 1.0\nschedule = 'cosine'\n")
    refused(call(*words), f"{config}:13: lr=1.0, not 0.02", f"{config}:14: schedule=cosine")
    assert not (config.parent / "run").exists() and not (config.parent / "datasets").exists()


def test_without_its_training_state_the_weights_alone_are_taken(config, checkpoint, call, refused):
    words = [train, config, f"--start_from={checkpoint}", "--max_steps=2", "--batch_size=2"]
    result = call(*words, "--fresh_optimizer")
    assert result.returncode == 0, result.stderr
    (checkpoint / "optim.pt").unlink()
    refused(call(*words, "--run_dir=half"), checkpoint / "optim.pt", "--fresh_optimizer")
    (checkpoint / "train.pt").unlink()
    result = call(*words, "--run_dir=alone")
    assert "begins at step 1" in result.stdout and "without optim.pt" in result.stdout
    for run in ("run", "alone"):
        assert steps(config.parent / run) == [1, 2]
    assert columns(config.parent / "run", "loss") == columns(config.parent / "alone", "loss")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--tied"], [], ["--tokens"], ["--cosine"]])
def test_official_olmo_run_anew(config, call, one_thread, options):
    """NANOLMO_OFFICIAL_PYTHON names a Python with what make.py needs."""
    python = os.environ.get("NANOLMO_OFFICIAL_PYTHON")
    if not python:
        pytest.skip("needs NANOLMO_OFFICIAL_PYTHON, a Python with ai2-olmo 0.2.5")
    out = config.parent / "official"
    subprocess.run([python, RECORDED / "make.py", out, *options], check=True, timeout=PATIENCE_S,
                   capture_output=True)
    (config.parent / "list").write_text(f"{out}/tokens-0.npy\n{out}/tokens-1.npy\n")
    if "--cosine" in options:
        config.write_text(config.read_text().replace("decay_steps = 28\n", ""))  # t_max says it
    result = call(train, config, f"--start_from={out / 'step10-unsharded'}")
    assert result.returncode == 0, result.stderr
    check_goes_on(config.parent / "run", out, json.loads((out / "run.json").read_text()))
