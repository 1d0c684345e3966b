"""Weights of other houses: Hugging Face and official OLMo directories, read and written."""

import itertools
import shutil
from pathlib import Path

import torch

from model import ModelConfig, OLMo, parameter_shapes
from scaling.checkpoint import check_tensors, newest_step, read_step, verify_step
from support.cpu import use_fast_attention
from support.files import UserError, read_json, write_json

# (ours, official OLMo's, Hugging Face's parts) inside a block. Where we have one tensor and HF
# several, its rows are theirs, one after another. Nothing is permuted: all three rotate halves.
BLOCK_TABLE = (
    ("attn.att_proj", "att_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("attn.attn_out", "attn_out", ("self_attn.o_proj",)),
    ("mlp.ff_proj", "ff_proj", ("mlp.up_proj", "mlp.gate_proj")),
    ("mlp.ff_out", "ff_out", ("mlp.down_proj",)),
)


def name_table(config):
    """Rows (our name, official name, [HF names]) for every tensor of the model."""
    table = [("wte.weight", "transformer.wte.weight", ["model.embed_tokens.weight"])]
    if not config.weight_tying:
        table.append(("lm_head.weight", "transformer.ff_out.weight", ["lm_head.weight"]))
    for i in range(config.n_layers):
        for ours, official, parts in BLOCK_TABLE:
            table.append((f"blocks.{i}.{ours}.weight", f"transformer.blocks.{i}.{official}.weight",
                          [f"model.layers.{i}.{part}.weight" for part in parts]))
    return table


def export(run, out):
    """Write the newest step of a run, or one step, as a Hugging Face directory at `out`."""
    refuse_existing(out)  # before the long part
    model = load_model(run)
    tokenizer = next((folder / "tokenizer.json" for folder in (run, run.parent)
                      if (folder / "tokenizer.json").is_file()), None)
    tuned = tokenizer and "method" in read_json(tokenizer.with_name("config.json"))  # by adapt.py
    save_hf(model, out, tokenizer, tuned)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters"
          + ("" if tokenizer else "; no tokenizer.json was found beside the model"))


def load_model(path, device="cpu"):
    """The OLMo, in float32, that lies in a directory of any of four kinds.

    A run directory (its newest step), a step directory of it, a Hugging Face directory (one
    safetensors file or several), or an official OLMo unsharded checkpoint (model.pt beside
    config.yaml). Raises UserError that names what is missing, unexpected or misshapen. No file's
    content is run.
    """
    path = Path(path)
    config_file = path / "config.json"
    if (path / "state.json").is_file():
        return load_step(path, verify_step(path), device)
    if (path / "model.pt").is_file():
        return load_official(path, device)
    if config_file.is_file() and "model_type" in read_json(config_file):
        return load_hf(path, device)
    if config_file.is_file():
        return load_step(*newest_step(path), device)
    raise UserError(f"{path}: no model here; a run directory, a step directory, a Hugging Face "
                    "directory or an official OLMo directory (model.pt, config.yaml) is wanted")


def assemble(config, tensors, place, device):
    """An OLMo filled with `tensors`, {our name: tensor}; every name and shape must fit."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_tensors(parameter_shapes(config), found, place)
    with torch.device("meta"):
        model = OLMo(config)
    tensors = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    model.load_state_dict(tensors, assign=True)
    return ready(model)


def load_step(path, state, device):
    """The model of one step directory, whose verified state.json is `state`."""
    saved = state.get("config", {})
    keys = ModelConfig.__dataclass_fields__
    config = ModelConfig(**{key: saved[key] for key in keys if key in saved})  # or its default
    with torch.device("meta"):
        model = OLMo(config)
    model.to_empty(device="cpu")
    read_step(path, {f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return ready(model.to(device))


def ready(model):
    if model.wte.weight.device.type == "cpu":
        use_fast_attention(model)
    return model


def read_model_config(path):
    """The configuration of a Hugging Face directory, or of an official OLMo checkpoint."""
    if (path / "model.pt").is_file():
        return official_config(path / "config.yaml")
    return hf_to_config(read_json(path / "config.json"), path / "config.json")


def load_hf(path, device):
    """The model of a Hugging Face directory of an OLMo 1.0."""
    config = read_model_config(path)
    found, table, shapes = read_safetensors(path), name_table(config), parameter_shapes(config)
    tied_head = found.pop("lm_head.weight", None) if config.weight_tying else None
    wanted = {name: (shapes[ours][0] // len(names), shapes[ours][1])  # the parts' rows are equal
              for ours, _, names in table for name in names}
    check_tensors(wanted, {name: tuple(tensor.shape) for name, tensor in found.items()}, path)
    if tied_head is not None and not torch.equal(tied_head, found["model.embed_tokens.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from the embedding that it is tied to")
    return assemble(config, {ours: torch.cat([found[name] for name in names])
                             for ours, _, names in table}, path, device)


def read_safetensors(path):
    """{name: tensor} of model.safetensors, or of the files that its index lists."""
    load_file = import_safetensors().load_file
    index = path / "model.safetensors.index.json"
    files = ([path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
             if index.is_file() else [path / "model.safetensors"])
    tensors = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: missing; the directory must hold its safetensors files")
        try:
            tensors.update(load_file(file))
        except Exception as error:
            raise UserError(f"{file}: damaged or not safetensors ({error})") from None
    return tensors


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("Hugging Face weights need the package safetensors: "
                        "pip install safetensors") from None
    return safetensors.torch


def hf_to_config(hf, place):
    """Our configuration from HF's; UserError for a setting that OLMo 1.0 does not have."""
    heads = hf.get("num_attention_heads")
    for key, wanted in (("model_type", "olmo"), ("hidden_act", "silu"), ("attention_bias", False),
                        ("clip_qkv", None), ("num_key_value_heads", heads), ("rope_scaling", None)):
        if hf.get(key, wanted) != wanted:
            raise UserError(f"{place}: {key}={hf[key]} is not OLMo 1.0, which has {key}={wanted}")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{place}: rope_type={rope['rope_type']} is not OLMo 1.0's plain rotation")
    for key in HF_SIZES:
        if type(hf.get(key)) is not int:
            raise UserError(f"{place}: {key} is {hf.get(key)}, a whole number is wanted")
    sizes = {ours: hf[theirs] for theirs, ours in HF_SIZES.items()}
    sizes["vocab_size"] = hf.get("unpadded_vocab_size", sizes["embedding_size"])
    return ModelConfig(**sizes, weight_tying=hf.get("tie_word_embeddings", False),
                       rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))))


HF_SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads", "intermediate_size": "mlp_hidden_size",
            "max_position_embeddings": "max_seq_len", "vocab_size": "embedding_size",
            "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id"}


def config_to_hf(config):
    """Hugging Face's config.json for our configuration."""
    return {
        **{theirs: getattr(config, ours) for theirs, ours in HF_SIZES.items()},
        "architectures": ["OlmoForCausalLM"], "model_type": "olmo", "hidden_act": "silu",
        "num_key_value_heads": config.n_heads, "tie_word_embeddings": config.weight_tying,
        "unpadded_vocab_size": config.vocab_size,  # ours; HF's own knows only the padded one
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None, "use_cache": True,
        "initializer_range": 0.02, "torch_dtype": "float32", "bos_token_id": None,
    }

# data.py's render_chat in Jinja, for transformers' apply_chat_template
CHAT_TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'].strip() }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if message['role'] != 'assistant' or not loop.last or add_generation_prompt %}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")


def save_hf(model, out, tokenizer=None, tuned=False):
    """Write `model`, and the tokenizer.json at `tokenizer`, as a Hugging Face directory at `out`.

    AutoModelForCausalLM and AutoTokenizer load it as it is; if `tuned`, with the template of chats.
    `out` must not exist or be empty; it is written under another name first, so that it is whole or
    not there.
    """
    out, config = Path(out).resolve(), model.config
    refuse_existing(out)
    save_file = import_safetensors().save_file
    state, tensors = model.state_dict(), {}
    for ours, _, names in name_table(config):
        pieces = state[ours].cpu().float().chunk(len(names))
        tensors.update((name, piece.contiguous())
                       for name, piece in zip(names, pieces, strict=True))
    aside = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})
        ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
        write_json(aside / "config.json", config_to_hf(config))
        write_json(aside / "generation_config.json", ends)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), aside, config, tuned)
        aside.replace(out)  # an empty directory gives way
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_existing(out):
    """UserError if a directory to be written holds something already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another name or delete it")


def copy_tokenizer(file, out, config, tuned):
    """Copy tokenizer.json and name its special tokens the way that AutoTokenizer reads them."""
    added = {token["id"]: token["content"] for token in read_json(file).get("added_tokens", ())}
    if not {config.eos_token_id, config.pad_token_id} <= added.keys():
        raise UserError(f"{file}: has no added tokens with the model's ids of EOS "
                        f"({config.eos_token_id}) and padding ({config.pad_token_id})")
    shutil.copyfile(file, out / "tokenizer.json")
    special = {"eos_token": added[config.eos_token_id], "pad_token": added[config.pad_token_id]}
    write_json(out / "special_tokens_map.json", special)
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False, **special,
        **({"chat_template": CHAT_TEMPLATE} if tuned else {})})


def load_official(path, device):
    """The model of an official OLMo unsharded checkpoint: model.pt beside config.yaml."""
    config = read_model_config(path)
    try:
        found = torch.load(path / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch's message runs over lines, and advises to run what is in the file
        found = None
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{path / 'model.pt'}: damaged, or holds more than named tensors")
    ours = {official: name for name, official, _ in name_table(config)}
    tensors = {ours.get(name, name): tensor for name, tensor in found.items()}
    return assemble(config, tensors, path, device)


def official_config(path):
    """Our configuration from the `model:` block of an official config.yaml."""
    if not path.is_file():
        raise UserError(f"{path}: missing; an official checkpoint needs it beside model.pt")
    settings = read_model_block(path)
    for key, wanted in (("block_type", "sequential"), ("activation_type", "swiglu"),
                        ("rope", "true"), ("alibi", "false"), ("include_bias", "false"),
                        ("layer_norm_type", "default"), ("layer_norm_with_affine", "false"),
                        ("attention_layer_norm", "false"), ("multi_query_attention", "false"),
                        ("clip_qkv", None)):
        if settings.get(key) not in (wanted, None):
            raise UserError(f"{path}: {key}: {settings[key]} is not OLMo 1.0, which has {wanted}")
    try:
        d_model, vocab_size = int(settings["d_model"]), int(settings["vocab_size"])
        fused = int(settings.get("mlp_hidden_size") or int(settings["mlp_ratio"]) * d_model)
        return ModelConfig(
            d_model=d_model, n_layers=int(settings["n_layers"]), n_heads=int(settings["n_heads"]),
            mlp_hidden_size=fused // 2,  # of both halves
            max_seq_len=int(settings["max_sequence_length"]),
            vocab_size=vocab_size, embedding_size=int(settings.get("embedding_size") or vocab_size),
            rope_theta=float(settings.get("rope_theta") or 10000),
            weight_tying=settings.get("weight_tying") != "false",
            # the frozen yaml says 50279; the one in use then said 0, the converter rewrites it
            eos_token_id=int(settings["eos_token_id"]) or vocab_size - 1,
            pad_token_id=int(settings["pad_token_id"]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the model block lacks or garbles {error}") from None


def read_model_block(path):
    """{key: text} of the flat `model:` block of a YAML file; a null has no key here."""
    lines = [line.split(" #")[0].rstrip() for line in path.read_text().splitlines()]
    lines = [line for line in lines if line.strip()]
    if "model:" not in lines:
        raise UserError(f"{path}: has no `model:` block")
    block = itertools.takewhile(lambda line: line.startswith(" "),
                                lines[lines.index("model:") + 1:])
    pairs = [line.strip().partition(":") for line in block]
    return {key: value.strip() for key, _, value in pairs if value.strip() not in ("", "null")}
