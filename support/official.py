"""Official OLMo 1.0's unsharded checkpoints (github.com/allenai/OLMo).

model.pt or model.safetensors holds the weights, config.yaml describes them.
"""

import re
import zipfile
from functools import partial

import torch

from model import ModelConfig
from support.hf_weights import open_safetensors, tensor_names
from support.official_names import decode_name, is_encoded
from support.plain_pickle import MOST_BYTES
from support.slices import StoredTensor
from support.text import UserError, refuse_pointer, shown
from support.vocabulary import count_of_ids
from support.yaml_text import read_yaml

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

# What lies beside the weights: the optimiser's state and the loop's (also as .pt).
TRAINING_STATE = ("optim.safetensors", "train.safetensors")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

OLMO_EOS = 50279  # the last of the ids of OLMo 1.0's tokenizer

# Keys that change no logit: how to start, train, wrap and place the model.
HARMLESS = {
    "alibi_bias_max", "attention_dropout", "attention_layer_norm_with_affine",
    "bias_for_layer_norm", "block_group_size", "emb_init_std", "embedding_dropout",
    "flash_attention", "init_cutoff_factor", "init_device", "init_fn", "init_std", "precision",
    "residual_dropout", "scale_emb_init"}


def official_weights(path):
    """The file with the weights of an unsharded checkpoint; None where there is none.

    Official OLMo looks for model.safetensors first too.
    """
    encoded = path / "model.safetensors"
    if encoded.is_file() and any(map(is_encoded, tensor_names(encoded))):
        return encoded
    plain = path / "model.pt"
    return plain if plain.is_file() else None


def open_official(path):
    """{official name: StoredTensor} of an unsharded checkpoint; nothing in its files is run."""
    file = official_weights(path)
    if file.suffix == ".safetensors":
        return open_safetensors([file], partial(name_of_tensor, file=file))
    stored = {}
    for name, tensor in mapped_tensors(file).items():
        stored[name] = StoredTensor(file, name, tuple(tensor.shape), partial(rows_of, file, name))
    return stored


def rows_of(file, name, first, last):
    """Rows of a tensor of model.pt, opened anew for the reason told in support/hf_weights.py."""
    return mapped_tensors(file)[name][first:last]


def name_of_tensor(encoded, file):
    """The name of a tensor of the model in an official safetensors file."""
    keys, is_pickled = decode_name(encoded, file)
    if is_pickled or len(keys) > 1:
        raise UserError(f"{file}: {shown(list(keys))} is no tensor of a model; name the directory "
                        "of an unsharded checkpoint")
    return keys[0]


def mapped_tensors(file):
    """{name: tensor} of model.pt, mapped into memory."""
    found = load_mapped(file)
    if not isinstance(found, dict) or not all(map(torch.is_tensor, found.values())):
        raise UserError(f"{file}: holds more than named tensors; fetch it again")
    for name, tensor in found.items():
        check_plain(tensor, name, file)
        if tensor.dtype not in FLOATS:
            raise UserError(f"{file}: {name} is {tensor.dtype}; quantised weights are not read")
    return found


def load_mapped(file):
    """What torch.save wrote, mapped into memory: what is not used is not read, and nothing is run.

    UserError for a file that is damaged, or that holds more than numbers, texts and tensors.
    """
    refuse_pointer(file)
    try:
        check_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (PermissionError, UserError):
        raise
    except Exception as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest advises to run what it found
        reason = f"it names {named[1]}" if named else type(error).__name__
        raise UserError(f"{file}: damaged, or holds more than numbers and tensors ({reason}); "
                        "nothing in it was run; fetch it again") from None


def check_archive(file):
    """UserError for a file whose small part would unpack to more than any checkpoint needs."""
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
        sizes = [entry.file_size for entry in archive.infolist()
                 if entry.filename.endswith("data.pkl")]
    if packed or max(sizes, default=0) > MOST_BYTES:
        raise UserError(f"{file}: packed, as torch.save writes none; fetch it again")


def check_plain(tensor, name, file):
    """UserError for a tensor whose numbers are not all in the file, each at a place of its own."""
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not is_plain or tensor.untyped_storage().nbytes() < tensor.nbytes:
        raise UserError(f"{file}: {name} holds no plain numbers ({tensor.layout}, "
                        f"{tensor.device}); fetch it again")


def official_config(path, tokenizer=None):
    """Our configuration from the `model:` block of an official config.yaml.

    tokenizer: the Tokenizer beside it; it may have more ids, as somebody added tokens.
    """
    if not path.is_file():
        raise UserError(f"{path}: missing; an official checkpoint needs it beside "
                        f"{official_weights(path.parent).name}")
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
    """{key: text} of the `model:` block of a YAML file; a null has no key here."""
    block = read_yaml(path).get("model")
    if not isinstance(block, dict):
        raise UserError(f"{path}: has no `model:` block")
    return {key: value for key, value in block.items() if value is not None}
