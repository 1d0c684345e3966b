"""config.json of a Hugging Face directory of an OLMo 1.0, read and written."""

import math

from model import ModelConfig
from support.files import UserError, read_json
from support.run_hints import runs_below
from support.text import shown
from support.vocabulary import count_of_ids

SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers",
         "num_attention_heads": "n_heads", "intermediate_size": "mlp_hidden_size",
         "max_position_embeddings": "max_seq_len", "vocab_size": "embedding_size"}

# What OLMo 1.0 fixes.
FIXED = {"model_type": "olmo", "hidden_act": "silu", "attention_bias": False,
         "attention_dropout": 0.0, "clip_qkv": None}

# The same, under keys that Hugging Face's OLMo does not need and some writers add.
ALSO_FIXED = {"mlp_bias": False, "is_decoder": False, "add_cross_attention": False,
              "tie_encoder_decoder": False, "pruned_heads": {}, "partial_rotary_factor": 1.0}

# Our fields that config_to_hf writes: each has a key in HF's config.json.
FIELDS = {*SIZES.values(), "eos_token_id", "pad_token_id", "vocab_size", "rope_theta",
          "weight_tying"}

# What special_ids and hf_rope_theta read, and what only save_hf writes.
OTHERS = {"eos_token_id", "pad_token_id", "rope_theta", "rope_parameters", "rope_scaling",
          "tie_word_embeddings", "unpadded_vocab_size"}

# Keys that change no logit: they say who wrote the file, how to start, store or sample.
HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attn_implementation",
    "bos_token_id", "chunk_size_feed_forward", "do_sample", "dtype", "finetuning_task", "id2label",
    "initializer_range", "is_encoder_decoder", "label2id", "max_length", "output_attentions",
    "output_hidden_states", "prefix", "problem_type", "return_dict", "sep_token_id",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "use_bfloat16", "use_cache"}


# ---- Reading -------------------------------------------------------------------------------------

def is_hf(path):
    """True for a directory whose config.json is Hugging Face's."""
    file = path / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def why_no_model(path):
    """What a directory lacks in which no model is found."""
    config = path / "config.json"
    if config.is_file():
        return f"{config}: names no model_type; restore the file that the weights came with"
    if any(path.glob("*.safetensors")):
        return f"{config}: missing; it describes the weights: copy it from where they came from"
    if (path / "model_and_optim").is_dir() or any(path.glob("model/rank*.pt")):
        return (f"{path}: an official checkpoint in the ranks' slices; join them first, with "
                "scripts/unshard.py of github.com/allenai/OLMo")
    return runs_below(path) or (
        f"{path}: no model here; name a run directory, a step directory, a Hugging Face directory "
        "(config.json, model.safetensors) or an official OLMo directory (config.yaml, model.pt or "
        "model.safetensors)")


def read_hf_config(path, tokenizer=None):
    """Our configuration of the Hugging Face directory `path`, whose Tokenizer is `tokenizer`.

    UserError for a setting that OLMo 1.0 does not have.
    """
    place = path / "config.json"
    hf = read_json(place)
    check_settings(hf, place)
    sizes = {ours: hf[theirs] for theirs, ours in SIZES.items()}
    sizes["vocab_size"] = count_of_ids(unpadded_size(hf, place), hf["vocab_size"], tokenizer)
    eos, pad = special_ids(hf, path, tokenizer)
    rope_theta = hf_rope_theta(hf, place)
    try:
        return ModelConfig(**sizes, eos_token_id=eos, pad_token_id=pad,
                           weight_tying=hf.get("tie_word_embeddings") or False,
                           rope_theta=rope_theta)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def check_settings(hf, place):
    """UserError for a setting that is unknown, of another type, or not OLMo 1.0's."""
    if hf["model_type"] == "hf_olmo" or "d_model" in hf:
        raise UserError(f"{place}: this is the older format hf_olmo; take the repository of the "
                        "same name that ends in -hf, such as allenai/OLMo-1B-hf")
    if hf["model_type"] != "olmo":
        raise UserError(f"{place}: model_type={shown(hf['model_type'])} is not OLMo 1.0, which "
                        'has model_type="olmo"')
    if hf.get("quantization_config"):
        raise UserError(f"{place}: quantization_config: quantised weights are not read; take those "
                        "from before the quantisation")
    for key in SIZES:
        if type(hf.get(key)) is not int:
            raise UserError(f"{place}: {key}={shown(hf.get(key))} must be a whole number")
    if hf.get("tie_word_embeddings") not in (True, False, None):
        raise UserError(f"{place}: tie_word_embeddings={shown(hf['tie_word_embeddings'])} "
                        "must be true or false")
    heads = hf["num_attention_heads"]
    if heads < 1 or hf["hidden_size"] % heads:  # first: other sizes follow from it
        raise UserError(f"{place}: hidden_size={hf['hidden_size']} must be a multiple of "
                        f"num_attention_heads={heads}")
    fixed = {**FIXED, **ALSO_FIXED, "num_key_value_heads": heads,
             "head_dim": hf["hidden_size"] // heads,
             "layer_types": ["full_attention"] * len(hf.get("layer_types") or "")}
    known = {*fixed, *SIZES, *OTHERS, *HARMLESS}
    for key, value in hf.items():
        if key in fixed and value not in (fixed[key], None):
            raise UserError(f"{place}: {key}={shown(value)} is not OLMo 1.0, which has "
                            f"{key}={shown(fixed[key])}")
        if key not in known and value is not None:
            raise UserError(f"{place}: {key}={shown(value)}: Hugging Face's OLMo has no such "
                            "setting; delete the key if it changes nothing")


def unpadded_size(hf, place):
    """What save_hf wrote; None in other files, whose vocab_size counts the padding rows too."""
    unpadded = hf.get("unpadded_vocab_size")
    if unpadded is not None:
        check_id(unpadded, hf["vocab_size"] + 1, f"{place}: unpadded_vocab_size")
    return unpadded


def special_ids(hf, path, tokenizer):
    """Returns (eos_token_id, pad_token_id) of a Hugging Face directory.

    Both may be missing, and the end of a text may be a list: the tokenizer then chooses.
    """
    ends = end_ids(hf, path)
    pad = hf.get("pad_token_id")
    if pad is not None:
        check_id(pad, hf["vocab_size"], f"{path / 'config.json'}: pad_token_id")
    if tokenizer and (not ends or tokenizer.eos_token_id in ends):
        eos = tokenizer.eos_token_id
    elif ends:
        eos = ends[0]
    else:
        raise UserError(f"{path / 'config.json'}: eos_token_id is missing; set it to the id of "
                        "<|endoftext|>")
    # no result depends on the id of padding; many files pad with EOS, or with a token of their own
    if tokenizer and tokenizer.pad_token_id < hf["vocab_size"]:  # else check_vocabulary says more
        pad = tokenizer.pad_token_id
    elif pad is None or pad in ends:
        pad = eos
    return eos, pad


def end_ids(hf, path):
    """The ids that end a text, by config.json and then generation_config.json."""
    rows = hf["vocab_size"]
    ends = listed_ids(hf, rows, path / "config.json")
    place = path / "generation_config.json"  # where transformers looks first
    if not place.is_file():
        return ends
    generation_ends = listed_ids(read_json(place), rows, place)
    if ends and generation_ends and not set(ends) & set(generation_ends):
        raise UserError(f"{place}: eos_token_id is {generation_ends}, and {ends} in config.json; "
                        "correct the wrong one")
    return list(dict.fromkeys(ends + generation_ends))


def listed_ids(settings, rows, place):
    """eos_token_id as a list: the file may have an id, a list of them, or none."""
    ends = settings.get("eos_token_id")
    if ends is None:
        return []
    ends = ends if isinstance(ends, list) else [ends]
    for end in ends:
        check_id(end, rows, f"{place}: eos_token_id")
    return ends


def check_id(value, limit, place):
    if type(value) is not int or not 0 <= value < limit:
        raise UserError(f"{place}={shown(value)} must be a whole number from 0 to {limit - 1}")


def hf_rope_theta(hf, place):
    """The base of plain RoPE; transformers 5 keeps it in rope_parameters, older ones do not."""
    found = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = hf.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{place}: {key}={shown(rope)} must be an object, or null")
        for name, value in rope.items():
            if name == "rope_theta":
                found[f"{key}: rope_theta"] = value
            elif (name, value) not in PLAIN_ROPE:
                raise UserError(f"{place}: {key}: {name}={shown(value)} is not OLMo 1.0's plain "
                                "rotation")
    if hf.get("rope_theta") is not None:
        found["rope_theta"] = hf["rope_theta"]
    for key, value in found.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{place}: {key}={shown(value)} must be a number above 0")
    if len(set(found.values())) > 1:
        listed = " and ".join(f"{key}={shown(value)}" for key, value in found.items())
        raise UserError(f"{place}: {listed}: versions of transformers differ in which they use; "
                        "keep one")
    return float(next(iter(found.values()), 10000.0))


PLAIN_ROPE = [("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1.0),
              ("rope_type", None), ("type", None), ("partial_rotary_factor", None)]


# ---- Writing -------------------------------------------------------------------------------------

def config_to_hf(config):
    """Hugging Face's config.json; UserError for a field of ours that it cannot say."""
    for key, field in type(config).__dataclass_fields__.items():
        value = getattr(config, key)
        if key not in FIELDS and value != field.default:
            raise UserError(f"{key}={value}: Hugging Face's OLMo has no such setting, so that its "
                            "model would compute something else; it cannot be exported")
    sizes = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {
        **sizes, **FIXED, "architectures": ["OlmoForCausalLM"],
        "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        "num_key_value_heads": config.n_heads, "tie_word_embeddings": config.weight_tying,
        "unpadded_vocab_size": config.vocab_size,  # ours; HF's own knows only the padded one
        "rope_theta": config.rope_theta, "rope_parameters": rope,
        "use_cache": True, "initializer_range": 0.02, "torch_dtype": "float32",
        "bos_token_id": None}
