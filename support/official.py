"""Official OLMo 1.0 checkpoints (github.com/allenai/OLMo): model.pt and config.yaml are read."""

import itertools

import torch

from model import ModelConfig
from support.text import UserError, read_text, refuse_pointer
from support.vocabulary import count_of_ids

# The texts that OLMo 1.0 has. None where the key may be missing, as official OLMo's default for it
# is the same; where it is not, the file must say it.
FIXED = {
    "block_type": ("sequential", None), "activation_type": ("swiglu", None), "rope": ("true",),
    "rope_full_precision": ("true", None), "alibi": ("false", None), "include_bias": ("false",),
    "layer_norm_type": ("default", None), "layer_norm_with_affine": ("false",),
    "layer_norm_eps": ("1.0e-05", "1e-05", "1e-5", None), "attention_layer_norm": ("false", None),
    "embedding_layer_norm": ("false", None), "norm_after": ("false", None),
    "multi_query_attention": ("false", None), "clip_qkv": (None,), "scale_logits": ("false", None)}

SIZES = {"d_model", "n_heads", "n_layers", "mlp_ratio", "mlp_hidden_size", "max_sequence_length",
         "vocab_size", "embedding_size", "weight_tying", "rope_theta", "eos_token_id",
         "pad_token_id"}

OLMO_EOS = 50279  # the last of the ids of OLMo 1.0's tokenizer

# Keys that change no logit: how to start, train, wrap and place the model.
HARMLESS = {
    "alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine",
    "bias_for_layer_norm", "block_group_size", "emb_init_std", "embedding_dropout",
    "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "precision",
    "residual_dropout", "scale_emb_init"}


def read_official(path):
    """{official name: tensor} of an unsharded checkpoint's model.pt; nothing in it is run."""
    refuse_pointer(path / "model.pt")
    try:
        found = torch.load(path / "model.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch's message runs over lines, and advises to run what is in the file
        found = None
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{path / 'model.pt'}: damaged, or holds more than named tensors")
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"{path / 'model.pt'}: {name} is {tensor.dtype}; quantised weights are "
                            "not read")
    return found


def official_config(path, tokenizer=None):
    """Our configuration from the `model:` block of an official config.yaml.

    tokenizer: the Tokenizer beside it; it may have more ids, as somebody added tokens.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; an official checkpoint needs it beside model.pt")
    settings = read_model_block(path)
    check_settings(settings, path)
    try:
        d_model = int(settings["d_model"])
        vocab_size = int(settings["vocab_size"])
        rows = int(settings.get("embedding_size") or vocab_size)
        # the frozen yaml says 50279; the one in use then said 0, the converter rewrites it
        eos = int(settings["eos_token_id"])
        is_olmo = vocab_size == OLMO_EOS + 1
        # no result depends on the id of padding
        pad = int(settings["pad_token_id"])
        if tokenizer and tokenizer.vocab_size <= rows:  # a larger one is refused
            pad = tokenizer.pad_token_id
        fused = int(settings.get("mlp_hidden_size") or int(settings["mlp_ratio"]) * d_model)
        return ModelConfig(
            d_model=d_model,
            n_layers=int(settings["n_layers"]),
            n_heads=int(settings["n_heads"]),
            mlp_hidden_size=fused // 2,  # theirs counts the values and the gates
            max_seq_len=int(settings["max_sequence_length"]),
            # equal to the rows, it may count the padding, as Hugging Face does
            vocab_size=count_of_ids(vocab_size if vocab_size != rows else None, rows, tokenizer),
            embedding_size=rows,
            rope_theta=float(settings.get("rope_theta") or 10000),
            weight_tying=settings.get("weight_tying") != "false",  # tied by default
            eos_token_id=OLMO_EOS if is_olmo and eos == 0 else eos,
            pad_token_id=pad)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: the model block lacks or garbles {error}") from None


def check_settings(settings, path):
    """UserError for a setting that is unknown, or that OLMo 1.0 does not have."""
    for key, value in settings.items():
        if key not in FIXED.keys() | SIZES | HARMLESS | {"n_kv_heads"}:
            raise UserError(f"{path}: {key}: {value} is unknown; delete the line if it changes "
                            "nothing")
    no_grouping = (settings.get("n_heads"), None)
    for key, accepted in {**FIXED, "n_kv_heads": no_grouping}.items():
        if settings.get(key) not in accepted:
            raise UserError(f"{path}: {key}: {settings.get(key)} is not OLMo 1.0, which has "
                            f"{accepted[0]}")


def read_model_block(path):
    """{key: text} of the flat `model:` block of a YAML file; a null has no key here."""
    lines = [line.split(" #")[0].rstrip() for line in read_text(path).splitlines()]
    lines = [line for line in lines if line.strip()]
    if "model:" not in lines:
        raise UserError(f"{path}: has no `model:` block")
    block = itertools.takewhile(lambda line: line.startswith(" "),
                                lines[lines.index("model:") + 1:])
    settings = {}
    for line in block:
        key, _, value = line.strip().partition(":")
        value = value.strip().strip("'\"")
        if value.lower() in ("true", "false"):  # YAML knows True and TRUE too
            value = value.lower()
        if value.lower() not in ("", "null", "~"):
            settings[key] = value
    return settings
