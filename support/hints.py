"""What a mistyped command line or config probably means: the nearest name, the right command."""

import difflib
import os
import re
import sys
from pathlib import Path

from support.files import UserError, here

ROOT = Path(__file__).resolve().parent.parent  # the repository
# What our keys are called elsewhere: by Hugging Face, nanoGPT and official OLMo.
ELSEWHERE = {
    "lr": "learning_rate max_lr", "min_lr": "min_learning_rate alpha_f", "weight_decay": "wd",
    "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon",
    "grad_clip": "max_grad_norm max_norm", "warmup_steps": "warmup_iters t_warmup",
    "decay_steps": "lr_decay_iters t_max", "max_steps": "max_iters max_duration num_train_steps",
    "batch_size": "global_train_batch_size train_batch_size",
    "micro_batch_size": "gradient_accumulation_steps per_device_train_batch_size "
                        "device_train_microbatch_size", "dtype": "bf16 fp16 precision",
    "run_dir": "output_dir out_dir save_folder", "max_seq_len": "block_size max_sequence_length "
    "context_length max_position_embeddings", "eval_every_steps": "eval_interval eval_steps",
    "log_every_steps": "log_interval logging_steps", "save_every_steps": "save_interval save_steps",
    "d_model": "n_embd hidden_size", "n_layers": "n_layer num_hidden_layers",
    "n_heads": "n_head num_attention_heads", "mlp_hidden_size": "intermediate_size",
    "epochs": "num_train_epochs num_epochs", "fresh_optimizer": "reset_optimizer_state",
    "start_from": "init_from load_path model_name_or_path", "keep_last": "save_total_limit",
    "keep_best": "load_best_model_at_end", "wandb": "wandb_log report_to"}


def unknown_key(key, known, place):
    """The UserError for a key that no schema of this command has. place: begins its message."""
    if command_of(key):
        return unused_key(key, place)
    key_there = key.lower().replace("-", "_")
    if key_there == "dropout":
        return UserError(f"{place}{key}: OLMo 1 has none; leave it out")
    ours = [own for own, others in ELSEWHERE.items() if key_there in others.split()]
    near = [own for own in ours if own in known] or difflib.get_close_matches(key_there, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the keys"
    return UserError(f"{place}{key}: unknown key; {hint}")


def unused_key(key, place):
    """The UserError for a key that another command has."""
    owner = command_of(key)
    return UserError(f"{place}{key}: a key of {owner}, which {command()} does not use; leave "
                     f"it out, or run python {owner}")


def command():
    """The command that runs, such as train.py."""
    return Path(sys.argv[0]).name


def command_of(key):
    """The command whose configuration has this key; None if none has."""
    for path in (*sorted(ROOT.glob("*.py")), ROOT / "scaling/plan.py"):
        if re.search(rf"^    {re.escape(key)}: (.*\bsetting\(|Literal\[)", path.read_text(), re.M):
            return path.name if path.name in ("adapt.py", "eval.py") else "train.py"
    return None


def example_of(kind, value):
    """What to write instead of a value that has not the type `kind`; "" if nothing is better."""
    if kind is int and type(value) is float and value.is_integer():  # such as 1e6
        return f"; write {int(value)}"
    if kind is bool:
        return "; write True or False"
    return "; such as \"{'name': 'path'}\"" if str(kind).startswith("dict[str, str") else ""


def missing_value(key, word):
    """The UserError for an option without its value; word: what follows it, or None."""
    return UserError(f"--{key}: the value is missing; write --{key}={word or 'VALUE'}")


def no_config_file(path, fields):
    """The UserError for a word of the command line that is no config file."""
    key, equals, value = str(path).lstrip("-–—").partition("=")
    if equals and key in fields:
        return UserError(f"{path}: no such config file; an option begins with two hyphens: "
                         f"--{key}={value}")
    if os.path.isfile(path / "config.json"):
        return UserError(f"{path}: a directory, not a config file; {path}/config.json holds its "
                         f"settings, and train.py --resume={path} continues a run")
    if os.path.exists(path):
        kind = "a directory" if os.path.isdir(path) else "a pipe or a device"
        return UserError(f"{path}: {kind}, not a config file; configs/ holds those that come with "
                         "nanOLMo")
    return UserError(f"{path}: no such config file{here(path)}; {nearest_path(path)}")


def nearest_path(path):
    """Which file or folder beside a missing path, or which config of ours, has a similar name."""
    beside = {}
    for folder in (ROOT / "configs", path.parent):
        beside |= {file.name: file for file in folder.glob("[!_.]*")}
    for name in difflib.get_close_matches(path.name, beside, n=1):
        found = beside[name]
        cwd = Path.cwd()
        return f"did you mean {found.relative_to(cwd) if found.is_relative_to(cwd) else found}?"
    return "configs/ holds those that come with nanOLMo"


def check_base(path, base, before, place):
    """UserError unless the config file that `path` adds to, or a saved config, stands before it."""
    if not any(file.name == base or file.suffix == ".json" for file in before):
        raise UserError(f"{place}adds_to={base}: this file adds to that one; name both: "
                        f"{path.parent / str(base)} {path}")


def hub_remedy(path):
    """What to do about a directory that is not there, if its name looks like one on the hub, or
    has a ~; else "".
    """
    if path.parts[:1] == ("~",):
        return f"the shell has left the ~ as it is: write $HOME{str(path)[1:]}"
    is_own = path.is_absolute() or path.parts[0] == "runs" or path.parent.exists()
    if is_own or len(path.parts) != 2:
        return ""
    return (f"if it is a model of Hugging Face's hub, download it first: hf download {path} "
            f"--local-dir {path.name}, and then name {path.name}")
