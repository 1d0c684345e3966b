"""Step directories: read by name, complete or refused, and never run."""

import errno
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import (Bomb, check_same_run, contents_of, flip, random_model, refusal, same_weights,
                      seal, small_config)

import eval as e
import train
from corpus.storage import mapped_order
from scaling import checkpoint
from scaling.checkpoint import (SafeUnpickler, create_state, newest_step, save_checkpoint,
                                step_directories, verify_step)
from support.files import write_json
from support.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_step(path, model=None, tensors=None):
    """A step directory as train.py writes it: tensors through DCP, all else in state.json."""
    model = model or random_model()
    entries = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    entries |= {"optimizer.wte.weight.exp_avg": torch.ones(3), "optimizer.step": torch.tensor(7)}
    entries |= tensors or {}
    path.mkdir(parents=True)
    dcp.save({name: entry for name, entry in entries.items() if entry is not None},
             checkpoint_id=str(path), no_dist=True)
    return seal(path, {"step": 1, "config": asdict(model.config)})


def state_of(path):
    return json.loads((path / "state.json").read_text())


def refused(path, *words):
    """Loading `path` is the user's error, in one line that names `path` and `words`."""
    message = refusal(load_model, path)
    assert all(word in message for word in (str(path), *words)), message


# ---- Loading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_a_step_directory_loads_bit_for_bit_and_warns_of_nothing(tmp_path, tied, recwarn):
    """torch would warn that there are no ranks, and that .metadata is left open."""
    model = random_model(weight_tying=tied)
    path = write_step(tmp_path / "step000001", model)
    recwarn.clear()
    loaded = load_model(path)
    assert loaded.config == model.config and same_weights(loaded, model)
    assert [str(warning.message) for warning in recwarn] == []


def test_a_run_directory_is_its_newest_step(tmp_path):
    """By number, not by name: step10 follows step9; what is no step directory is passed over."""
    models = {name: random_model(seed=i) for i, name in enumerate(("step9", "step10"))}
    for name, model in models.items():
        write_step(tmp_path / name, model)
    write_step(tmp_path / "step11.tmp")  # a save that was cut off
    (tmp_path / "step12").write_text("a file")
    (tmp_path / "config.json").write_text(json.dumps(asdict(small_config()) | {"lr": 1e-3}))
    assert step_directories(tmp_path) == [tmp_path / "step9", tmp_path / "step10"]
    assert newest_step(tmp_path) == (tmp_path / "step10", state_of(tmp_path / "step10"))
    assert same_weights(load_model(tmp_path), models["step10"])


def test_a_key_that_a_step_lacks_takes_its_default(tmp_path):
    path = write_step(tmp_path / "step1")
    state = state_of(path)
    del state["config"]["rope_theta"], state["config"]["weight_tying"]
    assert load_model(seal(path, state)).config == small_config()


def tensors_of(step):
    """{name: tensor} of everything that a step directory holds."""
    entries = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in entries.items()}
    dcp.load(tensors, checkpoint_id=step, no_dist=True)
    return tensors


def same_tensors(step, tensors):
    """Whether a step directory holds just these tensors, bit for bit."""
    found = tensors_of(step)
    return found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name])
                                                  for name in tensors)


def give_the_head_its_old_name(step):
    """Write a step directory as it was when the output head was called ff_out."""
    state = state_of(step)
    tensors = {name.replace(".lm_head.", ".ff_out."): tensor
               for name, tensor in tensors_of(step).items()}
    assert {"model.ff_out.weight", "optimizer.ff_out.weight.exp_avg"} < tensors.keys()
    shutil.rmtree(step)
    dcp.save(tensors, checkpoint_id=step, no_dist=True)
    seal(step, state)


def test_a_run_from_before_the_head_was_called_lm_head_loads_evaluates_and_resumes(
        copied, call, one_thread):
    """Steps 16 to 20 after the old step 15 end at the very bits of the uninterrupted run."""
    uninterrupted = tensors_of(copied / "step000020")
    model = load_model(copied / "step000015")
    shutil.rmtree(copied / "step000020")
    give_the_head_its_old_name(copied / "step000015")
    assert same_weights(load_model(copied), model)
    assert call(e, copied).returncode == 0
    assert call(train, f"--resume={copied}").returncode == 0
    assert same_tensors(copied / "step000020", uninterrupted)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_a_signal_while_tensors_are_read_is_no_damage(tmp_path, monkeypatch, error):
    """DCP collects every exception of its readers and writers, these too."""
    def interrupted(*_, **__):
        raise error
    path = write_step(tmp_path / "run" / "step000001")
    monkeypatch.setattr(checkpoint.SafeReader, "read_data", interrupted)
    with pytest.raises(type(error)):
        load_model(path)


def test_a_lack_of_memory_while_tensors_are_read_is_no_damage(tmp_path, monkeypatch):
    def lacking(*_, **__):
        raise MemoryError
    path = write_step(tmp_path / "run" / "step000001")
    monkeypatch.setattr(checkpoint.SafeReader, "read_data", lacking)
    refused(path, "out of memory")


# ---- Damage --------------------------------------------------------------------------------------

def rewrite(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


def replace(content):
    return rewrite(lambda old: content)


DIGEST_OF_NOTHING = hashlib.sha256(b"{}").hexdigest().encode()


@pytest.mark.parametrize("pattern, damage, word", [
    ("*.distcp", flip, "SHA-256"), (".metadata", flip, "SHA-256"),
    ("*.distcp", rewrite(lambda old: old[:-1]), "bytes"),
    ("*.distcp", rewrite(lambda old: old + b"0"), "bytes"),
    ("*.distcp", Path.unlink, "missing"), ("state.json", Path.unlink, "state.json"),
    ("state.json", rewrite(lambda old: old.replace(b'"n_heads": 2', b'"n_heads": 4')), "digest"),
    ("state.json", rewrite(lambda old: old[:-9]), "JSON"), ("state.json", replace(b""), "JSON"),
    ("state.json", replace(b"\xff\xfe\0"), "UTF-16"), ("state.json", replace(b"[1]"), "list"),
    ("state.json", replace(b"{}"), "digest"),
    ("state.json", replace(b'{"sha256": "%s"}' % DIGEST_OF_NOTHING), "files")])
def test_damage_to_a_step_is_named(tmp_path, pattern, damage, word):
    path = write_step(tmp_path / "step1")
    verify_step(path)
    [file] = path.glob(pattern)
    damage(file)
    message = refusal(verify_step, path)
    assert str(file) in message and word in message
    refused(path, str(file) if file.exists() else "")


def test_the_newest_step_passes_over_damaged_ones(tmp_path, capsys):
    """And a run without an undamaged step is refused."""
    models = [random_model(seed=seed) for seed in range(2)]
    first, second, third, fourth = (write_step(tmp_path / f"step00000{i}", models[i % 2])
                                    for i in range(1, 5))
    (tmp_path / "config.json").write_text(json.dumps(asdict(small_config())))
    flip(next(third.glob("*.distcp")))
    (fourth / "state.json").unlink()
    assert newest_step(tmp_path)[0] == second
    assert same_weights(load_model(tmp_path), models[0])
    printed = capsys.readouterr().out
    assert third.name in printed and fourth.name in printed
    shutil.rmtree(first)
    (second / ".metadata").unlink()
    for run in (tmp_path, tmp_path / "nowhere"):
        assert str(run) in refusal(newest_step, run)


@pytest.mark.parametrize("tensors, words", [
    ({"model.wte.weight": None}, ["missing model.wte.weight"]),
    ({"model.norm.weight": torch.ones(32)}, ["unexpected model.norm.weight"]),
    ({"model.wte.weight": torch.ones(64, 30)}, ["model.wte.weight", "(64, 30)", "(64, 32)"]),
    ({f"model.{i}": torch.ones(1) for i in range(8)}, ["model.4", "3 more"])])  # five are named
def test_misfitting_tensors_of_a_step_are_named(tmp_path, tensors, words):
    refused(write_step(tmp_path / "step1", tensors=tensors), *words)


# ---- What this code cannot read ------------------------------------------------------------------

def metadata_of_python(path, monkeypatch, module):
    """Write a step's .metadata anew, as a Python whose paths are defined in `module` writes it."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module, pathlib)
        for kind in (pathlib.PosixPath, pathlib.WindowsPath):
            patch.setattr(kind, "__module__", module)
        content = pickle.dumps(metadata)
    assert module.encode() in content
    (path / ".metadata").write_bytes(content)
    seal(path, state_of(path))


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_step_of_another_python_is_read(tmp_path, monkeypatch, module):
    """Python 3.13 calls the class of a path pathlib._local.PosixPath, 3.11 pathlib.PosixPath."""
    model = random_model()
    path = write_step(tmp_path / "step1", model)
    metadata_of_python(path, monkeypatch, module)
    assert same_weights(load_model(path), model)


@pytest.mark.parametrize("module, name", [
    ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"), ("torch", "float16")])
def test_metadata_may_name_these(module, name):
    assert SafeUnpickler(io.BytesIO()).find_class(module, name)


@pytest.mark.parametrize("module, name", [
    ("pathlib", "os"), ("pathlib", "os.Path"), ("torch", "load"), ("torch.float16", "Path"),
    ("builtins", "eval")])
def test_metadata_may_not_name_those(module, name):
    with pytest.raises(ValueError, match=name):
        SafeUnpickler(io.BytesIO()).find_class(module, name)


class OfTheFuture:
    """Stands for a class that a later torch may write into .metadata."""


def make_unreadable(step):
    (step / ".metadata").write_bytes(pickle.dumps(OfTheFuture()))
    seal(step, state_of(step))
    return step


def test_the_step_before_an_unreadable_one_goes_on(copied, finished, call, one_thread):
    """Nothing is deleted: the unreadable step gets another name, and is taken again."""
    newest = make_unreadable(copied / "step000020")
    content = contents_of(newest)
    result = call(train, f"--resume={copied}")
    assert result.returncode == 0 and "continues after step 15" in result.stdout
    assert f"warning: {newest / '.metadata'}" in result.stdout and "OfTheFuture" in result.stdout
    assert contents_of(copied / "unread-step000020") == content
    check_same_run(copied, finished)


def test_what_no_step_can_be_read_for_is_no_damage(copied, call, refused):
    """The message names the reason and the torch that wrote the steps; all keep their names."""
    steps = step_directories(copied)
    for step in steps:
        make_unreadable(step)
    line = refused(call(train, f"--resume={copied}"), "step000020", "OfTheFuture",
                   torch.__version__)
    assert "overwrite" not in line and "damaged" not in line
    assert step_directories(copied) == steps


@pytest.mark.parametrize("name, errno, lasts", [
    ("state.json", errno.EACCES, True), ("__0_0.distcp", errno.EACCES, True),
    ("__0_0.distcp", errno.EIO, False)])
def test_a_file_that_may_not_be_read_is_no_damage(copied, call, refused, monkeypatch, name, errno,
                                                  lasts):
    """The user's rights are wrong: one line. A disk that fails is damage: the step before."""
    denied = copied / "step000020" / name

    def denying(function):
        def call_unless_denied(path, *args, **options):
            if path == denied:
                raise OSError(errno, os.strerror(errno), str(path))
            return function(path, *args, **options)
        return call_unless_denied
    monkeypatch.setattr(Path, "read_bytes", denying(Path.read_bytes))
    monkeypatch.setattr(checkpoint, "file_sha256", denying(checkpoint.file_sha256))
    result = call(train, f"--resume={copied}")
    if lasts:
        refused(result, denied)
    assert denied.exists()
    assert (copied / "unread-step000020").exists() != lasts


# ---- No file's content is run --------------------------------------------------------------------

def dotted_bomb(marker):
    """The pickle of a call of torch.serialization's os.system: an allowed module, a dotted name."""
    def text(value):
        return b"\x8c" + bytes([len(value)]) + value.encode()
    return (b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
            + text(f"touch '{marker}'") + b"\x85R.")


@pytest.mark.parametrize("make", [lambda marker: pickle.dumps(Bomb(marker)), dotted_bomb])
def test_a_bomb_in_a_step_does_not_go_off(tmp_path, make):
    """The digests fit, as they do where a stranger wrote the complete directory."""
    marker = tmp_path / "boom"
    bomb = make(marker)
    pickle.loads(bomb)
    assert marker.exists()  # it is live
    marker.unlink()
    path = write_step(tmp_path / "step1")
    (path / ".metadata").write_bytes(bomb)
    seal(path, state_of(path))
    verify_step(path)
    refused(path, ".metadata")
    assert not marker.exists()


def test_a_bomb_of_memory_in_a_step_is_refused(tmp_path):
    """The unpickler that is written in C would take 128 MiB for this index, of 2**23."""
    path = write_step(tmp_path / "step1")
    (path / ".metadata").write_bytes(b"\x80\x04K\x01r\xff\xff\x7f\0.")
    seal(path, state_of(path))
    tracemalloc.start()
    refused(path, ".metadata", "it holds int")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.parametrize("name", ["model.wte.weight", "model.note", "note"])
def test_pickled_bytes_in_a_step_are_refused(tmp_path, name):
    """DCP would unpickle such an entry without limits."""
    marker = tmp_path / "boom"
    refused(write_step(tmp_path / "step1", tensors={name: Bomb(marker)}), ".metadata", name)
    assert not marker.exists()


def test_torchs_own_reader_of_metadata_is_never_asked(tmp_path, monkeypatch):
    """It unpickles without limits, and what was checked could have been exchanged since."""
    path = write_step(tmp_path / "step1")
    monkeypatch.setattr(dcp.FileSystemReader, "read_metadata", None)
    assert same_weights(load_model(path), random_model())


def test_metadata_of_another_kind_is_refused(tmp_path):
    """A harmless pickle that is not DCP's must not end in an AttributeError."""
    path = write_step(tmp_path / "step1")
    found = dcp.FileSystemReader(path).read_metadata()
    del found.state_dict_metadata["model.wte.weight"].size
    for content in ({"a": 1}, found):
        (path / ".metadata").write_bytes(pickle.dumps(content))
        refused(seal(path, state_of(path)), ".metadata")


# ---- On the disk ---------------------------------------------------------------------------------

@pytest.fixture
def disk(monkeypatch):
    """What is synced and what is renamed, in order: ("sync" or "rename", name of the file)."""
    events = []
    names = {}  # a file's number -> its name: fsync is given a number

    def sync(handle, fsync=os.fsync):
        events.append(("sync", names.get(os.fstat(handle).st_ino, "?")))
        fsync(handle)

    def open_named(path, *args, open=os.open, **options):
        handle = open(path, *args, **options)
        names[os.fstat(handle).st_ino] = Path(path).name
        return handle

    def renaming(rename):
        def renamed(path, target):
            events.append(("rename", path.name))
            return rename(path, target)
        return renamed
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "open", open_named)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return events


def test_a_json_file_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    write_json(tmp_path / "state.json", {"step": 1})
    assert disk == [("sync", "state.json.tmp"), ("rename", "state.json.tmp")]


def test_an_epochs_order_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    """Only the size of one that is there is checked: it must not be one of zeros."""
    order = mapped_order(tmp_path / "order.bin", lambda: np.arange(5, dtype=np.uint32), 5)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert disk[-2:] == [("sync", "order.bin.tmp"), ("rename", "order.bin.tmp")]


def test_a_steps_name_is_on_the_disk_before_the_save_returns(tmp_path, disk):
    """An older step may be deleted then: a power cut must not leave the run without both."""
    model = random_model()
    optimizer = train.build_optimizer(model, train.TrainConfig())
    save_checkpoint(tmp_path, {"step": 1}, model, optimizer)
    assert disk[-2:] == [("rename", "step000001.tmp"), ("sync", tmp_path.name)]
    assert ("sync", "state.json.tmp") in disk


def test_an_optimiser_whose_state_does_not_start_at_zero_is_refused():
    model = random_model()
    assert refusal(create_state, torch.optim.NAdam(model.parameters())).startswith("NAdam: ")
    create_state(torch.optim.RAdam(model.parameters()))
