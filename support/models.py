"""Any model by its path: a run, a step of it, or a directory from elsewhere."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from configs import load_config
from corpus.tokenizer import Tokenizer
from data import DataConfig
from model import ModelConfig
from scaling.checkpoint import newest_step, read_step, run_of, step_directories, verify_step
from scaling.machine import choose_device
from scaling.sharding import own_part
from support.chats import require
from support.files import UserError, file_sha256
from support.weights import load_model, load_step, read_model_config


def open_model(path, config):
    """(model, tokenizer, state.json) of a run's newest step or of one step; else a state of {}."""
    path, device, state = Path(path), choose_device(), {}
    tokenizer = Tokenizer.load(run_of(path) / "tokenizer.json")
    if (path / "state.json").is_file():
        state = verify_step(path)
    elif step_directories(path):
        path, state = newest_step(path)
    model = load_step(path, state, device) if state else load_model(path, device)
    if config.eval_dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    if tokenizer.vocab_size > model.config.embedding_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size:,} ids and the model but "
                        f"{model.config.embedding_size:,}; they do not belong together")
    return model, tokenizer, state


class Base(NamedTuple):
    """What is tuned: its weights' directory, their digest, and what belongs to them."""

    weights: Path  # a step directory, or one of another kind
    home: Path  # where tokenizer.json lies, and of a run config.json and manifest.json
    digest: str
    model_config: ModelConfig
    settings: dict  # of a run, those of its data


def open_base(start_from, verify):
    """The Base that start_from names; its files are checked, and not loaded yet."""
    require(start_from, "start_from: name the run to tune, --start_from=RUN, or a Hugging Face "
            "directory of an OLMo")
    home, weights = run_of(start_from), Path(start_from)
    if step_directories(weights) or (weights / "state.json").is_file():
        weights, state = (newest_step(weights, verify == "sha256") if step_directories(weights)
                          else (weights, verify_step(weights, verify == "sha256")))
        model_config, data_config = load_config([str(home / "config.json")], ModelConfig,
                                                DataConfig)
        return Base(weights, home, state["sha256"], model_config, asdict(data_config))
    files = sorted([*weights.glob("*.safetensors"), *weights.glob("model.pt"),
                    *weights.glob("config.*")])
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    vocab_size = Tokenizer.load(home / "tokenizer.json").vocab_size  # HF's counts padding too
    return Base(weights, home, digest, replace(read_model_config(weights), vocab_size=vocab_size),
                {})


def fill_weights(model, base):
    """Copy the base's weights into a model, whole or sharded."""
    if (base.weights / "state.json").is_file():
        read_step(base.weights, {f"model.{name}": p.detach()
                                 for name, p in model.named_parameters()})
        return
    whole = dict(load_model(base.weights).named_parameters())  # on each rank, for a moment
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own_part(whole[name].to(parameter.device), parameter))
