"""Step directories: read by name, whole or refused, and never run."""

import hashlib
import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

import eval as e
import train
from support.weights import load_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def seal(path, state):
    """Write state.json: the size and SHA-256 of every file, and of its own other keys."""
    files = {file.name: {"size": file.stat().st_size,
                         "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in path.iterdir() if file.name != "state.json"}
    state = {**state, "files": files}
    state.pop("sha256", None)
    state["sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state, indent=1))
    return path


def tensors_of(step):
    """{name: tensor} of everything that a step directory holds."""
    entries = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
               for name, entry in entries.items()}
    dcp.load(tensors, checkpoint_id=step, no_dist=True)
    return tensors


def with_the_heads_old_name(step):
    """The step directory as it was written when the output head was called ff_out."""
    state = json.loads((step / "state.json").read_text())
    tensors = {name.replace(".lm_head.", ".ff_out."): tensor
               for name, tensor in tensors_of(step).items()}
    assert {"model.ff_out.weight", "optimizer.ff_out.weight.exp_avg"} < tensors.keys()
    shutil.rmtree(step)
    dcp.save(tensors, checkpoint_id=step, no_dist=True)
    seal(step, state)


def test_a_run_from_before_the_head_was_called_lm_head_loads_evaluates_and_resumes(copied, call):
    """Steps 16 to 20 after the old step 15 end at the very bits of the uninterrupted run."""
    wanted = tensors_of(copied / "step000020")
    model = load_model(copied / "step000015")
    shutil.rmtree(copied / "step000020")
    with_the_heads_old_name(copied / "step000015")
    loaded = load_model(copied).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert call(e, copied).returncode == 0
    assert call(train, f"--resume={copied}").returncode == 0
    resumed = tensors_of(copied / "step000020")
    assert resumed.keys() == wanted.keys()
    assert all(torch.equal(resumed[name], wanted[name]) for name in wanted)
