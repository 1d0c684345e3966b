"""What official OLMo saves beside the weights: AdamW's moments, and how far its loop had come.

    optim.pt, train.pt                      as its unsharded checkpoints have them
    optim.safetensors, train.safetensors    the same, converted; official OLMo looks for them first

Read: olmo/checkpoint.py, olmo/train.py, olmo/optim.py at v0.2.5. Nothing in the files is run.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from scaling.checkpoint import check_tensors
from scaling.ranks import on_each_rank
from support.files import UserError
from support.hf_weights import opened
from support.official import check_plain, load_mapped
from support.official_names import decode_name
from support.plain_pickle import one_line, read_plain, unpickled
from support.slices import StoredTensor, copy_own_rows, shapes_of
from support.weights import name_table

MOMENTS = ("exp_avg", "exp_avg_sq")
WRAPPED = "_fsdp_wrapped_module."  # FSDP puts it into the names


class Progress(NamedTuple):
    """How far an official run had come when it saved a checkpoint."""

    step: int
    epoch: int  # counts from 0
    examples: int  # of this epoch
    tokens: int  # of all epochs
    ranks: int


# ---- The files -----------------------------------------------------------------------------------

def state_file(path, name):
    """The file of a checkpoint that holds `name`, such as "optim"; None if it has none."""
    files = [path / f"{name}.safetensors", path / f"{name}.pt"]
    return next((file for file in files if file.is_file()), None)


def has_training_state(path):
    """True if a whole state lies beside the weights, False if none; UserError for a part of one."""
    optimizer = state_file(path, "optim")
    loop = state_file(path, "train")
    if bool(optimizer) != bool(loop):
        there, missing = (optimizer, "train.pt") if optimizer else (loop, "optim.pt")
        raise UserError(f"{path / missing}: missing, and {there.name} is there; fetch it too, to "
                        "go on with that run, or begin with its weights alone: --fresh_optimizer")
    return bool(optimizer)


def read_nested(file):
    """A safetensors file of official OLMo as it was before: nested dicts of numbers and tensors.

    Tensors stay in the file: they are StoredTensors.
    """
    tensors = opened(file)
    found = {}
    for encoded in tensors.keys():  # noqa: SIM118
        keys, is_pickled = decode_name(encoded, file)
        part = tensors.get_slice(encoded)
        place = ".".join(map(str, keys))
        if is_pickled:
            value = unpickled(tensors.get_tensor(encoded).numpy().tobytes(), f"{file}: {place}")
        else:
            rows = partial(rows_of_slice, part, tensors, encoded)
            value = StoredTensor(file, place, tuple(part.get_shape()), rows)
        inner = found
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise UserError(f"{file}: {place} lies in what is no dict; fetch it again")
        inner[keys[-1]] = value
    return found


def rows_of_slice(part, tensors, encoded, first=None, last=None):
    """Rows of a tensor in a safetensors file; all of it for one number, which has no rows."""
    return tensors.get_tensor(encoded) if first is None else part[first:last]


def with_stored(value, file, keys=()):
    """A value in which each tensor is a StoredTensor; keys: those that lead to it.

    Of dicts in each other, three levels are looked into, as no moment lies deeper.
    """
    if isinstance(value, dict) and len(keys) < 3:
        return {key: with_stored(each, file, (*keys, key)) for key, each in value.items()}
    if not torch.is_tensor(value):
        return value
    name = ".".join(map(str, keys))
    check_plain(value, name, file)
    return StoredTensor(file, name, tuple(value.shape), partial(rows_of_tensor, value))


def rows_of_tensor(tensor, first=None, last=None):
    return tensor if first is None else tensor[first:last]


# ---- The loop ------------------------------------------------------------------------------------

def read_progress(path):
    """The Progress of an official checkpoint, from its train.pt; UserError for one without it."""
    file = state_file(path, "train")
    found = read_nested(file) if file.suffix == ".safetensors" else read_plain(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no dict; fetch train.pt of an unsharded checkpoint")
    # v0.2 saves None in the first epoch
    counts = {"epoch": found.get("epoch") or 0, "world_size": found.get("world_size", 1)}
    for key in ("global_step", "global_train_examples_seen_this_epoch",
                "global_train_tokens_seen"):
        if key not in found:
            raise UserError(f"{file}: has no {key}; a newer or older official OLMo wrote it than "
                            "v0.2 to v0.6; begin with its weights alone: --fresh_optimizer")
        counts[key] = found[key]
    for key, value in counts.items():
        if type(value) is not int or not 0 <= value < 2**63:
            raise UserError(f"{file}: {key} is no number of steps, examples or tokens "
                            f"({kind_of_value(value)}); fetch it again")
    return Progress(step=counts["global_step"], epoch=counts["epoch"],
                    examples=counts["global_train_examples_seen_this_epoch"],
                    tokens=counts["global_train_tokens_seen"],
                    ranks=max(1, counts["world_size"]))


def kind_of_value(value):
    is_named = isinstance(value, int | float | str)
    return one_line(value)[:40] if is_named else type(value).__name__


# ---- The optimiser -------------------------------------------------------------------------------

class OptimizerState(NamedTuple):
    """What optim.pt holds, by the names of the parameters."""

    file: Path
    state: dict  # official name -> {exp_avg, exp_avg_sq, step}
    groups: list  # of {params: [official name], lr, betas, eps, weight_decay}


def read_optimizer(path):
    """The OptimizerState of an official checkpoint; its tensors stay in the file until used.

    The keys of the state are the parameters' names, or the numbers of these names in the groups.
    """
    file = state_file(path, "optim")
    is_mapped = file.suffix == ".pt"
    found = with_stored(load_mapped(file), file) if is_mapped else read_nested(file)
    try:
        names = {}
        groups = []
        for group in found["param_groups"]:
            own = [name.replace(WRAPPED, "") for name in group.get("param_names", group["params"])]
            names.update(zip(group["params"], own, strict=True))
            groups.append({**group, "params": own})
        state = {}
        for key, moments in found["state"].items():
            state[names[key] if type(key) is int else key.replace(WRAPPED, "")] = dict(moments)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: not the state of an optimiser ({type(error).__name__}: "
                        f"{one_line(error)}); fetch optim.pt of an unsharded checkpoint") from None
    return OptimizerState(file, state, groups)


def check_optimizer(found, config):
    """UserError unless an OptimizerState has moments of the right shapes for every parameter.

    config: the ModelConfig.
    """
    place = f"{found.file}: AdamW's moments"
    wanted = {}
    there = {}
    for names in name_table(config):
        wanted.update({f"{names.official}.{moment}": names.whole for moment in MOMENTS})
    for name, moments in found.state.items():
        stored = {f"{name}.{key}": value for key, value in moments.items() if key != "step"}
        plain = [key for key, value in stored.items() if not isinstance(value, StoredTensor)]
        if plain:
            raise UserError(f"{found.file}: {plain[0]} is no tensor; fetch the file again")
        # of a clipping that the comparison of config.yaml has refused already
        stored.pop(f"{name}.grad_norm_exp_avg", None)
        there.update(shapes_of(stored))
    check_tensors(wanted, there, place)
    for names in name_table(config):
        steps_taken(found, names.official)


def steps_taken(found, name):
    """How many steps AdamW has taken for a parameter: its corrections of the moments need it."""
    value = found.state[name].get("step")
    if isinstance(value, StoredTensor) and value.shape in ((), (1,)):
        value = value.rows().item()
    if type(value) not in (int, float) or not 0 <= value < 2**53 or value != int(value):
        raise UserError(f"{found.file}: {name}.step is no number of steps "
                        f"({kind_of_value(value)}); fetch the file again")
    return value


@torch.no_grad()
def fill_optimizer(path, model, optimizer):
    """Fill AdamW's state from an official checkpoint: each rank reads its own slices.

    A fault that one rank finds is a UserError on all of them.
    """
    on_each_rank(fill_own_slices, path, model, optimizer)


def fill_own_slices(path, model, optimizer):
    """On one rank: the work of fill_optimizer."""
    found = read_optimizer(path)
    if not found.state and read_progress(path).step == 0:
        return  # saved before the first step; our optimiser begins with zeros as well
    check_optimizer(found, model.config)
    parameters = dict(model.named_parameters())
    for names in name_table(model.config):
        state = optimizer.state[parameters[names.ours]]
        for moment in MOMENTS:
            copy_own_rows([found.state[names.official][moment]], state[moment])
        state["step"].fill_(steps_taken(found, names.official))
