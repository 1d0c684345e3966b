"""Hugging Face and official OLMo directories, read, refused and written."""

import json
import re
import shutil

import pytest
import torch
from conftest import (IDS, POINTER, Bomb, difference, random_ids, random_model, refusal,
                      same_weights, small_config)
from test_checkpoint import refused, write_step
from test_model import ONE_B, SEVEN_B

import model as m
import support.files
import support.weights
from corpus.tokenizer import Tokenizer
from data import render_chat
from support.hf_tokenizer import CHAT_TEMPLATE
from support.official import official_config
from support.weights import load_model, save_hf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# ---- Hugging Face: reading -----------------------------------------------------------------------

def hf_directory(path, model=None, tensors=None, **changes):
    """A Hugging Face directory of `model`, some tensors and settings changed; ... takes one out."""
    safetensors = pytest.importorskip("safetensors.torch")
    save_hf(model or random_model(), path)
    if tensors is not None:
        weights = safetensors.load_file(path / "model.safetensors") | tensors
        kept = {name: tensor.clone() for name, tensor in weights.items() if tensor is not ...}
        safetensors.save_file(kept, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("changes", [dict(weight_tying=False), dict(weight_tying=True),
                                     dict(eos_token_id=20)])
def test_save_and_load_change_no_bit(tmp_path, changes):
    """HF's config knows only the padded vocabulary; ours comes back all the same."""
    model = random_model(**changes)
    loaded = load_model(hf_directory(tmp_path / "hf", model))
    assert loaded.config == model.config and same_weights(loaded, model)


def test_sharded_safetensors_load_like_one_file(transformers, tmp_path):
    model = random_model()
    save_hf(model, tmp_path / "one")
    hf = transformers.OlmoForCausalLM.from_pretrained(tmp_path / "one")
    hf.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "many" / "model.safetensors").exists()
    assert same_weights(load_model(tmp_path / "many"), model)
    shards[1].unlink()
    refused(tmp_path / "many", shards[1].name)


def test_bfloat16_weights_come_in_as_float32(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = random_model()
    save_hf(model, tmp_path / "wide")
    wide = safetensors.load_file(tmp_path / "wide/model.safetensors")
    narrow = {name: tensor.bfloat16() for name, tensor in wide.items()}
    loaded = load_model(hf_directory(tmp_path / "narrow", model, narrow))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert same_weights(loaded, model.bfloat16().float())


def test_a_repeated_tied_head_is_accepted_and_a_differing_one_refused(tmp_path):
    model = random_model(weight_tying=True)
    head = model.wte.weight.detach()
    repeated = hf_directory(tmp_path / "same", model, {"lm_head.weight": head})
    assert same_weights(load_model(repeated), model)
    refused(hf_directory(tmp_path / "other", model, {"lm_head.weight": head + 1}), "lm_head.weight")
    alone = {"lm_head.weight": head, "model.embed_tokens.weight": ...}
    refused(hf_directory(tmp_path / "alone", model, alone), "missing model.embed_tokens.weight")


@pytest.mark.parametrize("tensors, fault", [
    ({"self_attn.k_proj.weight": ...}, "missing model.layers.1.self_attn.k_proj.weight"),
    ({"self_attn.q_proj.bias": torch.ones(32)}, "unexpected model.layers.1.self_attn.q_proj.bias"),
    ({"mlp.down_proj.weight": torch.ones(32, 41)}, "down_proj.weight has shape (32, 41)"),
    ({"mlp.up_proj.weight": torch.ones(42, 32),  # 42 + 38 rows are not 40 + 40
      "mlp.gate_proj.weight": torch.ones(38, 32)}, "gate_proj.weight has shape (38, 32)")])
def test_misfitting_hf_tensors_are_named(tmp_path, tensors, fault):
    tensors = {f"model.layers.1.{name}": tensor for name, tensor in tensors.items()}
    refused(hf_directory(tmp_path / "hf", tensors=tensors), fault)


@pytest.mark.parametrize("key, value", [
    ("clip_qkv", 8.0), ("attention_bias", True), ("num_key_value_heads", 1), ("hidden_act", "gelu"),
    ("model_type", "olmo2"), ("attention_dropout", 0.1), ("rope_scaling", {"factor": 2.0}),
    ("sliding_window", 64),  # unknown to HF's OLMo
    ("rope_parameters", {"rope_type": "linear"}),
    ("rope_parameters", {"partial_rotary_factor": 0.5}),
    ("intermediate_size", ...),  # missing
    ("pad_token_id", 64), ("eos_token_id", ["49"])])
def test_a_setting_that_olmo_1_does_not_have_is_refused(tmp_path, key, value):
    subkeys = value if key == "rope_parameters" else ()
    refused(hf_directory(tmp_path / "hf", **{key: value}), "config.json", key, *subkeys)


@pytest.mark.parametrize("changes, ours", [
    (dict(rope_parameters=None, rope_theta=500.0), dict(rope_theta=500.0)),  # transformers < 5
    (dict(rope_parameters=dict(rope_type="default", rope_theta=600.0), rope_theta=...),
     dict(rope_theta=600.0)),
    (dict(dtype="bfloat16", _name_or_path="x", transformers_version="4.40", initializer_range=0.5,
          use_cache=False, architectures=None, bos_token_id=3), dict()),  # these change no logit
    (dict(unpadded_vocab_size=...), dict(vocab_size=64))])  # which only save_hf writes
def test_what_config_json_may_say(tmp_path, changes, ours):
    assert load_model(hf_directory(tmp_path / "hf", **changes)).config == small_config(**ours)


@pytest.mark.parametrize("changes, ours", [
    # transformers' own ways to say nothing at all
    (dict(num_key_value_heads=None), {}), (dict(num_key_value_heads=...), {}),
    (dict(rope_scaling=dict(rope_type="default")), {}),
    (dict(rope_scaling=dict(type="default")), {}),
    (dict(rope_scaling=None, rope_parameters=...), {}),
    (dict(rope_parameters=dict(rope_theta=700.0, rope_type="default", partial_rotary_factor=1.0),
          rope_theta=...), dict(rope_theta=700.0)),
    (dict(attention_bias=None, clip_qkv=None, sliding_window=None, quantization_config=None), {}),
    (dict(head_dim=16, layer_types=["full_attention"] * 2, mlp_bias=False, pruned_heads={}), {}),
    (dict(tie_word_embeddings=None), {}),
    # the ids: one, a list of them, or none
    (dict(eos_token_id=[49]), {}), (dict(eos_token_id=[49, 3]), {}),
    (dict(eos_token_id=None), {}),  # then generation_config.json has it
    (dict(pad_token_id=None), dict(pad_token_id=49)),  # no tokenizer says better
    (dict(pad_token_id=...), dict(pad_token_id=49)),
    (dict(pad_token_id=49), dict(pad_token_id=49))])
def test_valid_directories_are_read(tmp_path, changes, ours, capsys):
    assert load_model(hf_directory(tmp_path / "hf", **changes)).config == small_config(**ours)
    assert ("[3]" in capsys.readouterr().out) == (changes.get("eos_token_id") == [49, 3])


@pytest.mark.parametrize("changes, fixed", [
    (dict(eos_token_id=[3, 299]), {}), (dict(eos_token_id=None), {}), (dict(eos_token_id=...), {}),
    (dict(pad_token_id=None), {}), (dict(pad_token_id=299), {}),
    (dict(pad_token_id=310), {}), (dict(pad_token_id=7), {})])
def test_what_config_json_leaves_open_the_tokenizer_says(tmp_path, tokenizer, changes, fixed):
    pytest.importorskip("safetensors")
    save_hf(random_model(**IDS), tmp_path / "one", tokenizer)
    config = json.loads((tmp_path / "one/config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (tmp_path / "one/config.json").write_text(json.dumps(config))
    (tmp_path / "one/generation_config.json").unlink()
    assert load_model(tmp_path / "one").config == small_config(**IDS)


HF_OLMO = {"model_type": "hf_olmo", "d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 50}


@pytest.mark.parametrize("config, words", [
    (HF_OLMO, ["hf_olmo", "-hf"]), ({**HF_OLMO, "model_type": "olmo"}, ["hf_olmo", "-hf"]),
    (dict(model_type="gpt2", hidden_size=...), ['model_type="gpt2"']),
    (dict(model_type=None), ["model_type"]),
    (dict(quantization_config={"load_in_4bit": True}), ["quantization_config"]),
    (dict(head_dim=8), ["head_dim=8"]), (dict(layer_types=["sliding_attention"]), ["layer_types"]),
    (dict(mlp_bias=True), ["mlp_bias"]), (dict(partial_rotary_factor=0.5), ["partial_rotary"]),
    (dict(rope_parameters=["default"]), ["rope_parameters"]),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), ["rope_scaling", '"linear"']),
    (dict(rope_theta="10000", rope_parameters=...), ['rope_theta="10000" (a string)']),
    (dict(rope_theta=0, rope_parameters=...), ["rope_theta=0"]),
    (dict(rope_theta=500.0), ["rope_theta=500.0", "10000.0"]),  # two that differ
    (dict(tie_word_embeddings="false"), ["tie_word_embeddings"]),
    (dict(unpadded_vocab_size=65), ["unpadded_vocab_size=65"]),
    (dict(vocab_size=True), ["vocab_size"]),
    (dict(eos_token_id=[49, -1]), ["eos_token_id=-1"]),
    (dict(pad_token_id="1"), ['pad_token_id="1"']),
    (dict(eos_token_id=7), ["generation_config.json", "eos_token_id", "49", "7"]),
    (dict(hidden_size=10**30), ["model.embed_tokens.weight"]),
    (dict(num_hidden_layers=10**12), ["1,000,000,000,000"]),
    (dict(vocab_size=10**15, unpadded_vocab_size=...), ["model.embed_tokens.weight"]),
    (dict(num_attention_heads=0, num_key_value_heads=...), ["config.json", "_heads=0"]),
    (dict(num_attention_heads=3, num_key_value_heads=...), ["hidden_size=32", "_heads=3"]),
    (dict(num_hidden_layers="2"), ['num_hidden_layers="2" (a string)'])])
def test_what_changes_the_model_is_refused_by_name(tmp_path, config, words):
    path = hf_directory(tmp_path / "hf", **config)
    if "d_model" in config:
        (path / "config.json").write_text(json.dumps(config))
    refused(path, str(path), *words)
    assert refusal(load_model, path).count("config.json:") <= 1


@pytest.mark.parametrize("content, words", [
    ("[1, 2]", ["list"]), ('{"model_type": "ol', ["JSON"]), ("", ["JSON"]),
    (b"\xff\xfe{\x00", ["config.json"])])
def test_a_damaged_config_json_is_named(tmp_path, content, words):
    file = hf_directory(tmp_path / "hf") / "config.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(tmp_path / "hf", str(file), *words)


@pytest.mark.parametrize("index, words", [
    ({}, ["weight_map"]), ({"weight_map": []}, ["weight_map"]),
    ({"weight_map": {}}, ["weight_map"]),
    ({"weight_map": {"model.embed_tokens.weight": "../other.safetensors"}}, ["other.safetensors"]),
    ({"weight_map": {"model.embed_tokens.weight": None}}, ["None"])])
def test_a_damaged_index_is_named(tmp_path, index, words):
    path = hf_directory(tmp_path / "hf")
    (path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, str(path), *words)


def test_weights_of_integers_are_no_weights(tmp_path):
    """Quantised ones came in as if their integers were the weights."""
    name = "transformer.blocks.0.ff_out.weight"
    tensors = {name: torch.ones(32, 40, dtype=torch.int8)}
    refused(official_directory(tmp_path / "official", tensors=tensors), name, "int8")
    name = "model.layers.0.mlp.up_proj.weight"
    refused(hf_directory(tmp_path / "hf", tensors={name: torch.ones(40, 32, dtype=torch.int8)}),
            name, "I8")


def test_a_damaged_safetensors_file_is_named(tmp_path):
    file = hf_directory(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / "hf", "model.safetensors")
    for path in (file, official_directory(tmp_path / "official") / "model.pt"):
        path.write_bytes(POINTER)
        refused(path.parent, f"{path}: a Git LFS pointer")
    file.unlink()
    refused(tmp_path / "hf", "model.safetensors", "missing")


def test_a_path_without_a_model_says_what_may_be_there(tmp_path):
    refused(tmp_path, "run directory")
    refused(tmp_path / "nowhere", "no such directory")
    path = hf_directory(tmp_path / "hf")
    (path / "config.json").write_text("{}")
    refused(path, str(path / "config.json"), "model_type")
    (path / "config.json").unlink()
    refused(path, str(path / "config.json"), "missing")


# ---- Hugging Face: writing -----------------------------------------------------------------------

# What cannot be exported: test_forks.py.


def test_a_tokenizer_travels_with_the_model(transformers, tokenizer, tmp_path):
    save_hf(random_model(**IDS), tmp_path / "hf", tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the dog sleeps"
    ours = Tokenizer.load(tokenizer)
    assert theirs(f"{text}<|endoftext|>")["input_ids"] == [*ours.encode(text), 299]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (299, 298)


def test_a_batch_of_prompts_is_answered_as_each_alone(transformers, tokenizer, tmp_path):
    """With padding behind them, the shorter of three went on after the padding."""
    model = random_model(**IDS, scale=3.0)
    with torch.no_grad():
        model.lm_head.weight[300:] *= 9  # padding rows that it would choose
    save_hf(model, tmp_path / "hf", tokenizer)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompts = ["the lazy dog sleeps again", "fox", "the quick"]
    batch = theirs(prompts, return_tensors="pt", padding=True)
    together = hf.generate(**batch, max_new_tokens=12, do_sample=False)[:, -12:]
    for prompt, answer in zip(prompts, together, strict=True):
        alone = hf.generate(**theirs(prompt, return_tensors="pt"), max_new_tokens=12,
                            do_sample=False)[0]
        assert torch.equal(alone[-12:], answer)
        [ours] = m.generate(model, [Tokenizer.load(tokenizer).encode(prompt)], 12)
        assert ours == answer.tolist()


def test_transformers_trains_on_what_render_chat_trains_on(transformers, tokenizer, tmp_path):
    """Its mask of the assistant's tokens is ours, the EOS after each answer included."""
    save_hf(random_model(**IDS), tmp_path / "hf", tokenizer, CHAT_TEMPLATE)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ours = Tokenizer.load(tokenizer)
    said = [("system", "be brief"), ("user", " the dog "), ("assistant", "\n sleeps, e\u0301! "),
            ("user", "日本"), ("assistant", "x"), ("user", "again"), ("assistant", "the fox")]
    messages = [{"role": role, "content": content} for role, content in said]
    for chat in (messages, messages[1:], messages[:3], messages[:2], messages[:4]):
        found = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True,
                                           return_dict=True)
        ids, trained = render_chat(chat, ours)
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == [int(value) for value in trained]


@pytest.mark.parametrize("tokenizer", ["{damaged", '{"added_tokens": []}'])
def test_a_failed_export_leaves_nothing_behind(tmp_path, tokenizer):
    pytest.importorskip("safetensors")
    file = tmp_path / "tokenizer.json"
    file.write_text(tokenizer)
    assert str(file) in refusal(save_hf, random_model(), tmp_path / "hf", file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_bfloat16_stream_is_exported_all_the_same(transformers, tmp_path):
    """The comparison runs in float32, and the model goes on as it was."""
    model = random_model()
    model.compute_dtype = torch.bfloat16
    save_hf(model, tmp_path / "hf")
    assert model.compute_dtype == torch.bfloat16
    save_hf(model.bfloat16(), tmp_path / "rounded")
    assert next(model.parameters()).dtype == torch.bfloat16


# ---- Official OLMo -------------------------------------------------------------------------------

OFFICIAL_YAML = """\
wandb:
  project: olmo-small

model:
  d_model: 32
  n_heads: 2
  n_layers: 2
  mlp_hidden_size: 80
  weight_tying: false
  alibi: false
  rope: true
  flash_attention: false  # not available on AMD
  attention_layer_norm: false
  multi_query_attention: false
  include_bias: false
  block_type: sequential
  layer_norm_type: default
  layer_norm_with_affine: false
  activation_type: swiglu
  max_sequence_length: 64
  vocab_size: 50
  embedding_size: 64
  eos_token_id: 49
  pad_token_id: 1
  init_fn: mitchell

decoy:
  n_layers: 99
"""


def official_yaml(**changes):
    """The file with settings of its model block changed or added; ... takes one out."""
    text = OFFICIAL_YAML
    for key, value in changes.items():
        line = "" if value is ... else f"\n  {key}: {value}"
        text, found = re.subn(f"\n  {key}: .*", line, text, count=1)
        if not found:
            text = text.replace("\nmodel:", f"\nmodel:{line}")
    return text


def official_directory(path, model=None, tensors=None, **changes):
    """model.pt and config.yaml, as official OLMo writes an unsharded checkpoint."""
    path.mkdir()
    weights = {}
    for name, parameter in (model or random_model()).named_parameters():
        # by hand rather than with name_table, which this is to test
        for ours, official in ((".attn.", "."), (".mlp.", "."), ("lm_head", "ff_out")):
            name = name.replace(ours, official)
        weights["transformer." + name] = parameter.data
    weights |= tensors or {}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not ...}
    torch.save(weights, path / "model.pt")
    (path / "config.yaml").write_text(official_yaml(**changes))
    return path


OPTIONAL = ("alibi", "attention_layer_norm", "multi_query_attention", "block_type",
            "layer_norm_type", "activation_type", "flash_attention", "init_fn")


@pytest.mark.parametrize("ours, settings", [
    (dict(), dict()), (dict(), dict(mlp_ratio=2)), (dict(), dict.fromkeys(OPTIONAL, ...)),
    # mlp_hidden_size, or else mlp_ratio * d_model = 2 * 32, counts both halves of the MLP.
    (dict(mlp_hidden_size=32), dict(mlp_hidden_size="null", mlp_ratio=2)),
    (dict(mlp_hidden_size=32), dict(mlp_hidden_size=..., mlp_ratio=2)),
    (dict(weight_tying=True), dict(weight_tying="true")),  # no head in the file
    (dict(weight_tying=True), dict(weight_tying=...)),
    # YAML's other spellings of the same
    (dict(), dict(weight_tying="False", rope="True", include_bias="FALSE", clip_qkv="~",
                  block_type="'sequential'", activation_type='"swiglu"'))])
def test_an_official_checkpoint_loads_bit_for_bit(tmp_path, ours, settings):
    model = random_model(**ours)
    loaded = load_model(official_directory(tmp_path / "official", model, **settings))
    assert loaded.config == model.config and same_weights(loaded, model)


def test_the_released_shapes_are_read_from_their_official_yaml(tmp_path):
    """1B has mlp_ratio 8, so 16,384 for both halves; 7B mlp_hidden_size 22,016; EOS 0 is V - 1."""
    one_b = dict(d_model=2048, n_heads=16, n_layers=16, mlp_hidden_size=..., mlp_ratio=8,
                 max_sequence_length=2048, vocab_size=50280, embedding_size=50304,
                 weight_tying="true", eos_token_id=0)
    seven_b = one_b | dict(d_model=4096, n_heads=32, n_layers=32, mlp_hidden_size=22016,
                           weight_tying="false")
    file = tmp_path / "config.yaml"
    for settings, shape in ((one_b, ONE_B), (seven_b, SEVEN_B)):
        file.write_text(official_yaml(**settings))
        assert official_config(file) == m.ModelConfig(**shape)


def test_eos_0_of_somebody_elses_model_stays_0(tmp_path):
    """Only OLMo's own yaml says 0 where 50279 was meant."""
    assert load_model(official_directory(tmp_path / "official", eos_token_id=0)
                      ).config.eos_token_id == 0


@pytest.mark.parametrize("name, tensor, fault", [
    ("blocks.1.ff_proj.weight", ..., "missing transformer.blocks.1.ff_proj.weight"),
    ("ff_out.weight", ..., "missing transformer.ff_out.weight"),
    ("attn_norm.weight", torch.ones(32), "unexpected transformer.attn_norm.weight"),
    ("blocks.1.att_proj.weight", torch.ones(96, 31), "att_proj.weight has shape (96, 31)")])
def test_misfitting_official_tensors_are_named(tmp_path, name, tensor, fault):
    tensors = {f"transformer.{name}": tensor}
    refused(official_directory(tmp_path / "official", tensors=tensors), fault)


@pytest.mark.parametrize("key, value", [
    ("clip_qkv", "8.0"), ("rope", "false"), ("alibi", "true"), ("include_bias", "true"),
    ("block_type", "llama"), ("activation_type", "gelu"), ("layer_norm_type", "rms"),
    ("layer_norm_with_affine", "true"), ("attention_layer_norm", "true"),
    ("multi_query_attention", "true"), ("n_kv_heads", "1"), ("norm_after", "true"),
    ("scale_logits", "true"), ("sliding_window", "64"),  # unknown
    # Official OLMo's own default for these three is not what OLMo 1.0 has.
    ("rope", ...), ("include_bias", ...), ("layer_norm_with_affine", ...),
    ("n_layers", ...), ("d_model", "wide")])
def test_an_official_setting_that_olmo_1_does_not_have_is_refused(tmp_path, key, value):
    file = tmp_path / "config.yaml"
    file.write_text(official_yaml(**{key: value}))
    faulty = "wide" if value == "wide" else key
    assert {str(file), faulty} <= set(re.split(r": | |'", refusal(official_config, file)))


@pytest.mark.parametrize("changes, words", [
    (dict(n_layers=10**12), ["1,000,000,000,000"]), (dict(n_heads=0), ["config.yaml", "n_heads"]),
    (dict(d_model=10**30), ["transformer.wte.weight"]),
    (dict(embedding_size=40), ["config.yaml", "embedding_size"]),
    (dict(eos_token_id=64), ["config.yaml", "eos_token_id"])])
def test_sizes_that_cannot_be_are_named(tmp_path, changes, words):
    refused(official_directory(tmp_path / "official", **changes), str(tmp_path), *words)


def test_an_official_yaml_that_is_no_text_is_named(tmp_path):
    file = official_directory(tmp_path / "official") / "config.yaml"
    file.write_bytes(b"\xff\xfem\x00")
    refused(tmp_path / "official", str(file))


def test_an_official_yaml_without_a_model_is_refused(tmp_path):
    file = official_directory(tmp_path / "official") / "config.yaml"
    file.write_text(OFFICIAL_YAML.replace("\nmodel:", "\nnetwork:"))
    refused(tmp_path / "official", str(file), "model")
    file.unlink()
    refused(tmp_path / "official", str(file), "missing")


def test_a_model_pt_that_holds_more_than_tensors_is_refused_and_not_run(tmp_path):
    """In one line: torch's own eight advise to try weights_only=False."""
    marker, path = tmp_path / "boom", official_directory(tmp_path / "official")
    for content in ({"model": {"wte.weight": torch.ones(2)}}, [torch.ones(2)],
                    {"transformer.wte.weight": Bomb(marker)}):
        torch.save(content, path / "model.pt")
        refused(path, "model.pt")
    assert not marker.exists()
    torch.load(path / "model.pt", weights_only=False)
    assert marker.exists()  # it is live


# ---- The command ---------------------------------------------------------------------------------

def test_export_writes_what_transformers_loads(transformers, tmp_path, call):
    model = random_model(seed=3)
    step, out = write_step(tmp_path / "run/step000001", model), tmp_path / "deep/hf"
    done = call(m, "export", step, out)
    assert done.returncode == 0, done.stderr
    count = sum(parameter.numel() for parameter in model.parameters())
    assert str(out) in done.stdout and f"{count:,}" in done.stdout
    hf = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    assert type(hf).__name__ == "OlmoForCausalLM"
    tokens = random_ids(2, 20)
    with torch.no_grad():
        assert difference(hf(tokens).logits, model(tokens)) < 1e-5
    assert [path.name for path in out.parent.iterdir()] == ["hf"]
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert len(set(modes.values())) == 1, modes  # whoever may read one file may read all


def test_a_broken_transformers_is_one_line(tmp_path, monkeypatch):
    """Its lazy import raises RuntimeError for a torch that it does not fit."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")

    class Broken:
        @staticmethod
        def from_pretrained(*args, **options):
            raise RuntimeError("Failed to import transformers.models.olmo.modeling_olmo because "
                               "of the following error:\nno module named torch.x")
    monkeypatch.setattr(transformers, "OlmoForCausalLM", Broken)
    line = refusal(save_hf, random_model(), tmp_path / "hf")
    assert "transformers" in line and "torch.x" in line
    assert not list(tmp_path.iterdir())


def test_an_export_without_transformers_says_that_nothing_was_compared(tmp_path, monkeypatch, call):
    pytest.importorskip("safetensors")
    step = write_step(tmp_path / "run/step000001")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not compared" in call(m, "export", step, tmp_path / "hf").stdout


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, tokenizer, monkeypatch):
    """And what lies beside it, even under a likely name, is left alone."""
    pytest.importorskip("safetensors")
    (tmp_path / "hf.tmp").mkdir()
    synced = []

    def fsync(path):
        assert path == tmp_path or not (tmp_path / "hf").exists()
        synced.append(path.name)
    monkeypatch.setattr(support.files, "fsync", fsync)
    monkeypatch.setattr(support.weights, "fsync", fsync)
    save_hf(random_model(**IDS), tmp_path / "hf", tokenizer)
    assert {file.name for file in (tmp_path / "hf").iterdir()} < set(synced)
    assert synced[-1] == tmp_path.name and (tmp_path / "hf.tmp").is_dir()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("safetensors.torch")
    import safetensors.torch

    def full(*args, **options):
        raise safetensors.SafetensorError("Error while serializing: No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert "No space" in refusal(save_hf, random_model(), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_export_touches_no_directory_that_holds_something(tmp_path, call, monkeypatch):
    pytest.importorskip("safetensors")
    step, out = write_step(tmp_path / "step1"), tmp_path / "out"
    out.mkdir()
    save_hf(random_model(), out)  # an empty one may be written to
    content = {file.name: file.read_bytes() for file in out.iterdir()}
    assert f"{out}: exists" in refusal(save_hf, random_model(), out)
    monkeypatch.setattr(support.weights, "load_model", None)  # refused before the long part
    done = call(m, "export", step, out)
    assert done.returncode != 0 and done.stdout == "" and str(out) in done.stderr
    assert "delete" not in done.stderr and f"{out}-2" in done.stderr  # out may be the only copy
    (tmp_path / "out-2").symlink_to("nowhere")
    assert f"{out}-3" in call(m, "export", step, out).stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == content


def test_export_takes_the_tokenizer_from_the_run(tmp_path, tokenizer, call):
    pytest.importorskip("safetensors")
    step = write_step(tmp_path / "run/step1", random_model(**IDS))
    (tmp_path / "run/config.json").write_text(json.dumps({"d_model": 32}))
    shutil.copyfile(tokenizer, tmp_path / "tokenizer.json")  # which is not this run's
    assert "no tokenizer.json" in call(m, "export", step, tmp_path / "bare").stdout
    shutil.copyfile(tokenizer, tmp_path / "run/tokenizer.json")
    for source in (step, tmp_path / "run"):
        out = tmp_path / f"hf-{source.name}"
        assert call(m, "export", source, out).returncode == 0
        special = json.loads((out / "special_tokens_map.json").read_text())
        assert special == {"eos_token": "<|endoftext|>", "pad_token": "<|padding|>"}
        assert (out / "tokenizer.json").is_file()


def test_help_and_wrong_words_name_the_form(call):
    assert "python model.py export RUN OUT" in call(m, "--help").stdout
    for argv in ([], ["export", "one"], ["import"]):
        assert "export RUN OUT" in call(m, *argv).stderr
