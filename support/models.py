"""Any model by its path: a run, one of its steps, or a directory from elsewhere."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from configs import load_config
from data import DataConfig
from model import ModelConfig
from scaling.checkpoint import read_step, run_of
from scaling.machine import choose_device, keep_freed_memory
from scaling.ranks import check_agreement, on_each_rank
from scaling.sharding import own_slice
from scaling.starts import say_changed_network
from support import finite
from support.bars import stage, staged
from support.files import UserError, file_sha256
from support.hf_tokenizer import warn_of_other_template
from support.official import TRAINING_STATE
from support.vocabulary import open_tokenizer
from support.weights import (check_weights, fill_from_files, find_step, is_ours, kind_of,
                             load_model, load_step, read_model_config, step_config)


def open_model(path, config):
    """(model, tokenizer, state.json) to evaluate: a run's newest step, one step, or another model.

    config.eval_dtype sets the dtype of the weights. Without a step the state is {}.
    """
    keep_freed_memory()  # an evaluation takes 0.91 to 0.97 times as long
    model, tokenizer, state = open_with_tokenizer(path)
    if config.chat:
        warn_of_other_template(run_of(path))
    model.to(getattr(torch, config.eval_dtype))  # cast once; nobody trains them
    return model, tokenizer, state


def open_with_tokenizer(path):
    """(model, tokenizer, state.json) of any model; UserError unless the two belong together."""
    path = Path(path)
    with stage(f"loading {path}"):
        device = choose_device()
        step, state = find_step(path)
        model = load_step(step, state, device) if state else load_model(path, device)
    tokenizer = open_tokenizer(run_of(path) / "tokenizer.json", model.config)
    return model, tokenizer, state


def check_description(path):
    """UserError if the small files of a directory from elsewhere do not fit together.

    It takes a moment; those of a run are checked when it is opened.
    """
    path = Path(path)
    if not is_ours(path):
        open_tokenizer(path / "tokenizer.json", read_model_config(path))


class Base(NamedTuple):
    """The model that a run starts from: where it lies, its digest and its settings."""

    weights: Path  # a step directory, or a directory of another kind
    home: Path  # may hold tokenizer.json; a run's also config.json and manifest.json
    digest: str
    model_config: ModelConfig
    settings: dict  # those of a run's data; {} for another directory
    kind: str  # "run", "hf" or "official"


@stage("checking the weights to start from")
def open_base(start_from, verify):
    """The Base that `start_from` names; its files are checked, and no weight is loaded yet.

    verify: "sha256" reads every file of a step, anything else compares their sizes.
    """
    if not start_from:
        raise UserError("start_from: name the run to tune, --start_from=RUN, or a Hugging Face "
                        "directory of an OLMo; a config of tuning, such as configs/tiny_sft.py, "
                        "comes first")
    try:
        home = run_of(start_from)
    except UserError as error:
        raise UserError(f"start_from: {error}; --start_from=PATH names another place, with "
                        "--accept_changes if the tuning has begun") from None
    weights, state = find_step(Path(start_from), verify == "sha256")
    if state:
        say_changed_network(home)
        saved = home / "config.json"  # a step may have been copied alone
        settings = asdict(load_config([str(saved)], DataConfig)[0]) if saved.is_file() else {}
        return Base(weights, home, state["sha256"], step_config(state, weights), settings, "run")
    patterns = ("*.safetensors", "model.pt", "config.*")
    files = sorted(file for pattern in patterns for file in weights.glob(pattern)
                   if file.name not in TRAINING_STATE)
    model_config = read_model_config(weights)
    check_weights(weights, model_config)
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    return Base(weights, home, digest, model_config, {}, kind_of(weights))


def fill_weights(model, base):
    """Copy the weights of the base into a model, sharded or not: each rank reads its own slice.

    A fault that one rank finds is a UserError on all of them.
    """
    staged(f"loading {base.weights}", fill_slices, model, base)


def fill_slices(model, base):
    if base.kind != "run":
        row_hash = on_each_rank(fill_from_files, model, base.weights)
        # a node may have another directory under this name, on a disk of its own
        check_agreement({f"the weights in {base.weights}": row_hash})
        return
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    read_step(base.weights, {f"model.{name}": tensor for name, tensor in tensors.items()})
    slices = {name: own_slice(tensor)[1] for name, tensor in tensors.items()}
    on_each_rank(finite.check_weights, slices, base.weights)
