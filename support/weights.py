"""Weights in and out: any directory that holds an OLMo 1.0, and Hugging Face's format.

One rule: what is read or written computes what its files say. A tensor or a setting that the other
side does not know stops with its name, and an export is compared with transformers' own model.
"""

import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from corpus.tokenizer import tokenizer_at
from model import ModelConfig, OLMo
from scaling.checkpoint import check_tensors, read_step, run_of, step_at
from scaling.directory import has_steps
from scaling.same_run import check_model_keys
from scaling.starts import say_changed_network
from support import finite
from support.bars import stage
from support.compare import compare_with_transformers
from support.files import (UserError, disk_remedy, free_name, fsync, fsync_all, read_json,
                           write_json)
from support.hf_config import config_to_hf, end_ids, is_hf, read_hf_config, why_no_model
from support.hf_tokenizer import check_tokenizer_config, template_of, write_tokenizer
from support.hf_weights import import_safetensors, open_safetensors, safetensors_files
from support.official import (TRAINING_STATE, official_config, official_weights,
                              open_official)
from support.slices import check_same_rows, copy_own_rows, shapes_of
from support.vocabulary import NAME_IT, check_vocabulary

# ---- Names ---------------------------------------------------------------------------------------

# Nothing is permuted between the three: all rotate halves in RoPE (see model.apply_rope).
BLOCK_TABLE = (
    # ours, official OLMo's, Hugging Face's parts (their rows, one after another), a part's shape
    ("attn.att_proj", "att_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
     ("d_model", "d_model")),
    ("attn.attn_out", "attn_out", ("self_attn.o_proj",), ("d_model", "d_model")),
    ("mlp.ff_proj", "ff_proj", ("mlp.up_proj", "mlp.gate_proj"), ("mlp_hidden_size", "d_model")),
    ("mlp.ff_out", "ff_out", ("mlp.down_proj",), ("d_model", "mlp_hidden_size")),
)


class Names(NamedTuple):
    """One tensor of ours under the names of the other two, and the shape of each HF part."""

    ours: str
    official: str
    parts: list
    shape: tuple

    @property
    def whole(self):
        """The shape of the tensor itself: the rows of its parts, one after another."""
        return (len(self.parts) * self.shape[0], *self.shape[1:])


def name_table(config):
    """[Names] of every tensor of an OLMo 1.0 of this configuration."""
    matrix = (config.embedding_size, config.d_model)
    table = [Names("wte.weight", "transformer.wte.weight", ["model.embed_tokens.weight"], matrix)]
    if not config.weight_tying:
        table.append(Names("lm_head.weight", "transformer.ff_out.weight", ["lm_head.weight"],
                           matrix))
    for i in range(config.n_layers):
        for ours, official, parts, sizes in BLOCK_TABLE:
            parts = [f"model.layers.{i}.{part}.weight" for part in parts]
            shape = tuple(getattr(config, size) for size in sizes)
            table.append(Names(f"blocks.{i}.{ours}.weight",
                               f"transformer.blocks.{i}.{official}.weight", parts, shape))
    return table


# ---- Any directory -------------------------------------------------------------------------------

def load_model(path, device="cpu"):
    """The OLMo, in float32, of a directory of any of four kinds.

    A run directory (its newest step), a step directory, a Hugging Face directory (one safetensors
    file or several), or an official OLMo unsharded checkpoint (config.yaml beside model.pt or
    model.safetensors). Raises UserError that names what is missing, unexpected or misshapen. No
    file's content is run.
    """
    path = Path(path)
    run_of(path)  # the UserError for a path that is not there, or a step that was not kept
    step, state = find_step(path)
    if state:
        return load_step(step, state, device)
    config = read_model_config(path)
    check_weights(path, config)  # before memory is taken for what they are said to be
    model = empty_model(config).to_empty(device=device)
    fill_from_files(model, path)
    return model


def find_step(path, digests=True):
    """(step directory, its verified state.json) of a run or of a step; else (path, {}).

    digests=False leaves the files' SHA-256 out.
    """
    return step_at(path, digests) if is_ours(path) else (path, {})


def is_ours(path):
    """True for a run or a step of one, False for a directory from elsewhere."""
    return (path / "state.json").is_file() or has_steps(path)


def kind_of(path):
    """Whose files a directory from elsewhere holds: "hf" or "official"."""
    official = official_weights(path)
    is_described = (path / "config.yaml").is_file()
    hf = path / "model.safetensors"
    if official == hf or not hf.is_file():
        hf = path / "model.safetensors.index.json"
    has_hf = is_hf(path) and hf.is_file()
    if official and is_described and has_hf:
        raise UserError(f"{path}: holds two models, {official.name} with config.yaml and {hf.name} "
                        "with config.json; move the files of one to a directory of their own")
    if official and (is_described or not has_hf):
        return "official"
    if is_hf(path):
        return "hf"
    raise UserError(why_no_model(path))


def read_model_config(path, file=None):
    """The configuration of a Hugging Face directory, or of an official OLMo checkpoint.

    The tokenizer.json beside it, if there is one, must be the model's. file: another one.
    """
    remedy = NAME_IT if file else None
    file = file or path / "tokenizer.json"
    tokenizer = tokenizer_at(file) if file.is_file() else None
    if kind_of(path) == "official":
        config = official_config(path / "config.yaml", tokenizer)
    else:
        config = read_hf_config(path, tokenizer)
    if tokenizer:
        check_tokenizer_config(path, tokenizer)
        check_vocabulary(config, tokenizer, file, remedy)
    return config


def load_step(path, state, device):
    """The model of one step directory, whose verified state.json is `state`."""
    say_changed_network(run_of(path))
    model = empty_model(step_config(state, path))
    model.to_empty(device="cpu")
    read_step(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    finite.check_weights(dict(model.named_parameters()), path)
    return model.to(device)


def step_config(state, path):
    """The network's configuration at a step; the run's config.json may have changed since."""
    check_model_keys(state, path)
    saved = state.get("config", {})
    known = ModelConfig.__dataclass_fields__
    # A key that is newer than the run takes its default.
    return ModelConfig(**{key: value for key, value in saved.items() if key in known})


def empty_model(config):
    """An OLMo on the meta device: shapes without numbers."""
    with torch.device("meta"):
        return OLMo(config)


# ---- From elsewhere, by slices -------------------------------------------------------------------

def open_weights(path, config):
    """{our name: [StoredTensor]} of a directory from elsewhere: each tensor's parts, row by row.

    UserError unless all names and shapes fit `config`. Nothing but them is read yet. A tied model
    may have an lm_head.weight, as some writers repeat the embedding under that name.
    """
    is_official = kind_of(path) == "official"
    found = open_official(path) if is_official else open_safetensors(safetensors_files(path))
    # before the table of their names is made: a damaged file may ask for 10^12 blocks
    if config.n_layers > len(found):
        raise UserError(f"{path}: its configuration has {config.n_layers:,} blocks, and its files "
                        f"have {len(found)} tensors")
    wanted = {}
    parts = {}
    for names in name_table(config):
        parts[names.ours] = [names.official] if is_official else names.parts
        shape = names.whole if is_official else names.shape
        wanted.update(dict.fromkeys(parts[names.ours], shape))
    head = "lm_head.weight"
    if config.weight_tying and head in found and not is_official:
        wanted[head] = (config.embedding_size, config.d_model)
        parts[head] = [head]
    check_tensors(wanted, shapes_of(found), path)
    return {ours: [found[name] for name in theirs] for ours, theirs in parts.items()}


def check_weights(path, config):
    """UserError if the weights of a directory from elsewhere do not fit `config`; loads none."""
    open_weights(path, config)


def fill_from_files(model, path):
    """Copy the weights of a directory from elsewhere into a model: each rank its own slice.

    Returns a hash of one row, by which ranks see that they have read the same weights.
    """
    stored = open_weights(path, model.config)
    parameters = dict(model.named_parameters())
    given = {names.ours: names.whole for names in name_table(model.config)}
    check_tensors(shapes_of(parameters), given, path)  # a fork's network may have others
    for name, parameter in parameters.items():
        copy_own_rows(stored[name], parameter)
    if model.config.weight_tying and "lm_head.weight" in stored:
        [head] = stored["lm_head.weight"]
        [embedding] = stored["wte.weight"]
        check_same_rows(head, embedding, model.wte.weight)
    files = {part.file for parts in stored.values() for part in parts}
    say_what_is_unused(path, files, model.config.eos_token_id)
    # each step of a training moves this row; an embedding's may belong to an id that never comes
    row = stored["blocks.0.attn.att_proj.weight"][0].rows(0, 1)
    return zlib.crc32(row.view(torch.uint8).numpy().tobytes())


def say_what_is_unused(path, files, eos_token_id):
    """Print which weights and ends of a text in a directory are not used; files: those that are."""
    unread = [file.name for file in sorted((*path.glob("*.safetensors"), path / "model.pt"))
              if file.is_file() and file not in files and file.name not in TRAINING_STATE]
    if unread:
        print(f"{path}: the weights are those of {', '.join(file.name for file in sorted(files))}; "
              f"{', '.join(unread)} is not read")
    if kind_of(path) == "hf":
        other_ends = set(end_ids(read_json(path / "config.json"), path)) - {eos_token_id}
        if other_ends:
            print(f"{path}: eos_token_id lists {sorted(other_ends)} too; here a text ends at "
                  f"{eos_token_id} alone")


# ---- Hugging Face: writing -----------------------------------------------------------------------

def export(path, out):
    """Write a run's newest step, one step, or any other model as a Hugging Face directory `out`.

    The tokenizer.json of the run goes with it, and after adapt.py the template of chats.
    """
    out = Path(out)
    refuse_existing(out)  # before the long part
    with stage(f"loading {path}"):
        model = load_model(path)
    home = run_of(path)
    tokenizer = home / "tokenizer.json"
    note = ""
    if not tokenizer.is_file():
        tokenizer = None
        note = "; no tokenizer.json was found beside the model"
    with stage("exporting"):
        was_compared = save_hf(model, out, tokenizer, template_of(home))
    if not was_compared:
        note += "; its logits were not compared, as no transformers with an OLMo is installed"
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"wrote {out}: {count:,} parameters{note}")


def save_hf(model, out, tokenizer=None, chat_template=None):
    """Write `model`, and the tokenizer.json at `tokenizer`, as a Hugging Face directory at `out`.

    AutoModelForCausalLM and AutoTokenizer load it, with the chat_template if there is one. `out`
    must not exist or be empty. It is written under another name first, so that it is complete or
    absent. Returns False if no transformers was there to compare its logits. Raises UserError, and
    writes nothing, for a model that Hugging Face's OLMo cannot be.
    """
    out = Path(out).resolve()
    refuse_existing(out)
    config = config_to_hf(model.config)
    tensors = hf_tensors(model, out)
    safetensors = import_safetensors()
    aside = out.with_name(f".{out.name}.export.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)  # a crash may have left it
        aside.mkdir(parents=True)
        file = aside / "model.safetensors"
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
        write_json(aside / "config.json", config)
        shutil.copymode(aside / "config.json", file)  # safetensors lets nobody else read its file
        write_json(aside / "generation_config.json", generation_config(model.config))
        if tokenizer is not None:
            write_tokenizer(Path(tokenizer), aside, model.config, chat_template)
        with stage("comparing with transformers' model"):
            was_compared = compare_with_transformers(model, aside, out)
        # a power cut must not leave a directory whose files are empty
        fsync_all(aside)
        aside.replace(out)  # an empty directory gives way
        fsync(out.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{out}: could not be written ({error}); "
                        f"{disk_remedy(error)}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return was_compared


def generation_config(config):
    """generation_config.json, by which transformers' generate goes."""
    settings = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    padding_rows = list(range(config.vocab_size, config.embedding_size))
    if padding_rows:
        settings["suppress_tokens"] = padding_rows  # they are never chosen, here as there
    return settings


def refuse_existing(out):
    """UserError if a directory to be written holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another name, such as {free_name(out)}")


def hf_tensors(model, out):
    """{HF's name: float32 tensor} of a model; UserError names one that HF's OLMo does not have."""
    state = model.state_dict()
    table = name_table(model.config)
    wanted = {names.ours: names.whole for names in table}
    check_tensors(wanted, shapes_of(state),
                  f"{out}: not written: Hugging Face's OLMo has other tensors")
    tensors = {}
    for names in table:
        pieces = state[names.ours].cpu().float().chunk(len(names.parts))
        for part, piece in zip(names.parts, pieces, strict=True):
            tensors[part] = piece.contiguous()
    return tensors
