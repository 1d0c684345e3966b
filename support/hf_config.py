"""config.json of a Hugging Face directory of an OLMo 1.0, read and written."""

from model import ModelConfig
from support.files import UserError

SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads", "intermediate_size": "mlp_hidden_size",
            "max_position_embeddings": "max_seq_len", "vocab_size": "embedding_size",
            "eos_token_id": "eos_token_id", "pad_token_id": "pad_token_id"}

# What OLMo 1.0 fixes.
FIXED = {"model_type": "olmo", "hidden_act": "silu", "attention_bias": False,
            "attention_dropout": 0.0, "clip_qkv": None}

# Our fields that config_to_hf writes: each has a key in HF's config.json.
FIELDS = {*SIZES.values(), "vocab_size", "rope_theta", "weight_tying"}

# Keys that change no logit: they say who wrote the file, how to start, store or sample.
HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "id2label", "initializer_range", "is_encoder_decoder",
    "label2id", "max_length", "output_attentions", "output_hidden_states", "problem_type",
    "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"}


def hf_to_config(hf, place):
    """Our configuration from HF's; UserError for a setting that OLMo 1.0 does not have."""
    heads = hf.get("num_attention_heads")
    fixed = {**FIXED, "num_key_value_heads": heads, "rope_scaling": None}
    for key, value in fixed.items():
        if hf.get(key, value) != value:
            raise UserError(f"{place}: {key}={hf[key]} is not OLMo 1.0, which has {key}={value}")
    known = {*SIZES, *fixed, *HARMLESS, "tie_word_embeddings", "unpadded_vocab_size",
             "rope_theta", "rope_parameters"}
    for key in hf:
        if key not in known:
            raise UserError(f"{place}: {key}={hf[key]}: Hugging Face's OLMo has no such setting; "
                            "delete the key if it changes nothing")
    for key in SIZES:
        if type(hf.get(key)) is not int:
            raise UserError(f"{place}: {key} is {hf.get(key)}, but must be a whole number")
    sizes = {ours: hf[theirs] for theirs, ours in SIZES.items()}
    sizes["vocab_size"] = hf.get("unpadded_vocab_size", sizes["embedding_size"])
    return ModelConfig(**sizes, weight_tying=hf.get("tie_word_embeddings", False),
                       rope_theta=hf_rope_theta(hf, place))


def hf_rope_theta(hf, place):
    """The base of plain RoPE; transformers 5 keeps it in rope_parameters, older ones do not."""
    rope = hf.get("rope_parameters") or {}
    for key, value in rope.items():
        plain = key == "rope_theta" or (key, value) == ("rope_type", "default")
        if not plain:
            raise UserError(f"{place}: rope_parameters: {key}={value} is not OLMo 1.0's plain "
                            "rotation")
    return float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))


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
        "num_key_value_heads": config.n_heads, "tie_word_embeddings": config.weight_tying,
        "unpadded_vocab_size": config.vocab_size,  # ours; HF's own knows only the padded one
        "rope_theta": config.rope_theta, "rope_parameters": rope,
        "use_cache": True, "initializer_range": 0.02, "torch_dtype": "float32",
        "bos_token_id": None}
