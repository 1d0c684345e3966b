"""Hugging Face and official OLMo directories, read, refused and written."""

import json
import re

import pytest
import torch
from conftest import Bomb, difference, random_ids, random_model, same_weights, small_config
from test_checkpoint import refused, write_step
from test_model import ONE_B, SEVEN_B

import model as m
import support.weights
from support.files import UserError
from support.official import official_config
from support.weights import load_model, save_hf

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# ---- Hugging Face: reading -----------------------------------------------------------------------

def hf_directory(path, model=None, tensors=None, **changes):
    """A Hugging Face directory of `model`, some of its tensors and settings replaced."""
    safetensors = pytest.importorskip("safetensors.torch")
    save_hf(model or random_model(), path)
    if tensors is not None:
        weights = safetensors.load_file(path / "model.safetensors") | tensors
        kept = {name: tensor.clone() for name, tensor in weights.items() if tensor is not None}
        safetensors.save_file(kept, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(
        {key: value for key, value in config.items() if value is not ...}))
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
    model = random_model()
    hf_directory(tmp_path / "hf", model)
    safetensors = pytest.importorskip("safetensors.torch")
    wide = safetensors.load_file(tmp_path / "hf/model.safetensors")
    halves = {name: tensor.bfloat16() for name, tensor in wide.items()}
    safetensors.save_file(halves, tmp_path / "hf/model.safetensors")
    loaded = load_model(tmp_path / "hf")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())
    assert same_weights(loaded, model.bfloat16().float())


def test_a_repeated_tied_head_is_accepted_and_a_differing_one_refused(tmp_path):
    model = random_model(weight_tying=True)
    head = model.wte.weight.detach()
    hf_directory(tmp_path / "same", model, {"lm_head.weight": head})
    assert same_weights(load_model(tmp_path / "same"), model)
    hf_directory(tmp_path / "other", model, {"lm_head.weight": head + 1})
    refused(tmp_path / "other", "lm_head.weight")
    hf_directory(tmp_path / "alone", model, {"lm_head.weight": head,
                                             "model.embed_tokens.weight": None})
    refused(tmp_path / "alone", "missing model.embed_tokens.weight")


LAYER = "model.layers.1."


@pytest.mark.parametrize("tensors, words", [
    ({LAYER + "self_attn.k_proj.weight": None}, ("missing", LAYER + "self_attn.k_proj.weight")),
    ({"model.norm.weight": torch.ones(32)}, ("unexpected", "model.norm.weight")),
    ({LAYER + "self_attn.q_proj.bias": torch.ones(32)}, ("unexpected", "q_proj.bias")),
    ({LAYER + "mlp.down_proj.weight": torch.ones(32, 41)}, (LAYER, "(32, 41)", "(32, 40)")),
    ({LAYER + "self_attn.v_proj.weight": torch.ones(30, 32)}, (LAYER, "v_proj", "(30, 32)")),
    ({LAYER + "self_attn.q_proj.weight": torch.ones(32, 31)}, (LAYER, "q_proj", "(32, 31)")),
    ({"model.embed_tokens.weight": torch.ones(60, 32)}, ("(60, 32)", "(64, 32)")),
    ({LAYER + "mlp.up_proj.weight": torch.ones(42, 32),  # 42 + 38 rows are not 40 + 40
      LAYER + "mlp.gate_proj.weight": torch.ones(38, 32)}, (LAYER, "up_proj", "gate_proj"))])
def test_misfitting_hf_tensors_are_named(tmp_path, tensors, words):
    refused(hf_directory(tmp_path / "hf", tensors=tensors), *words)


@pytest.mark.parametrize("changes, word", [
    (dict(clip_qkv=8.0), "clip_qkv=8.0"), (dict(attention_bias=True), "attention_bias=True"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling="),
    (dict(num_key_value_heads=1), "num_key_value_heads=1"), (dict(hidden_act="gelu"), "gelu"),
    (dict(model_type="olmo2"), "model_type=olmo2"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1"),
    (dict(sliding_window=64), "sliding_window=64"),  # unknown to HF's OLMo
    (dict(rope_parameters={"rope_type": "linear", "factor": 2.0}), "rope_type=linear"),
    (dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary"),
    (dict(intermediate_size=...), "intermediate_size"),  # missing
    (dict(pad_token_id=None), "pad_token_id"), (dict(eos_token_id=[49, 0]), "eos_token_id")])
def test_a_setting_that_olmo_1_does_not_have_is_refused(tmp_path, changes, word):
    refused(hf_directory(tmp_path / "hf", **changes), "config.json", word)


@pytest.mark.parametrize("changes, theta", [
    (dict(rope_parameters=None, rope_theta=500.0), 500),  # transformers before 5
    (dict(rope_parameters={"rope_type": "default", "rope_theta": 600.0}), 600)])
def test_rope_theta_is_read_in_both_forms(tmp_path, changes, theta):
    assert load_model(hf_directory(tmp_path / "hf", **changes)).config.rope_theta == theta


def test_settings_that_change_no_logit_are_passed_over(tmp_path):
    hf_directory(tmp_path / "hf", dtype="bfloat16", _name_or_path="x", transformers_version="4.40",
                 initializer_range=0.5, use_cache=False, architectures=None, bos_token_id=3)
    assert load_model(tmp_path / "hf").config == small_config()


def test_a_damaged_safetensors_file_is_named(tmp_path):
    file = hf_directory(tmp_path / "hf") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path / "hf", "model.safetensors")
    file.unlink()
    refused(tmp_path / "hf", "model.safetensors", "missing")


def test_a_path_without_a_model_says_what_may_be_there(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        refused(path, "run directory")


# ---- Hugging Face: writing -----------------------------------------------------------------------

def test_a_tokenizer_travels_with_the_model(transformers, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(48)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|padding|>", "<|endoftext|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    save_hf(random_model(pad_token_id=48), tmp_path / "hf", tmp_path / "tokenizer.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("w3 w47 <|endoftext|>")["input_ids"] == [3, 47, 49]
    assert (theirs.eos_token_id, theirs.pad_token_id) == (49, 48)


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "tokenizer.json").write_text("{damaged")
    with pytest.raises(UserError, match="tokenizer.json"):
        save_hf(random_model(), tmp_path / "hf", tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def not_exported(model, out, *words):
    with pytest.raises(UserError) as caught:
        save_hf(model, out)
    assert all(word in str(caught.value) for word in words), caught.value
    assert list(out.parent.iterdir()) == []


def test_a_tensor_that_hugging_face_does_not_have_stops_the_export(tmp_path):
    model = random_model()
    model.blocks[1].gain = torch.nn.Parameter(torch.ones(32))
    not_exported(model, tmp_path / "hf", "unexpected", "blocks.1.gain")
    model = random_model()
    model.blocks[0].attn.att_proj = m.Linear(32, 64)  # grouped queries
    not_exported(model, tmp_path / "hf", "blocks.0.attn.att_proj.weight", "(64, 32)", "(96, 32)")


def test_a_forward_that_differs_from_transformers_stops_the_export(transformers, tmp_path):
    """Neither has a tensor of its own: attention with other scores, a norm behind the MLP."""
    model = random_model()
    for block in model.blocks:
        block.attn.attend = lambda q, k, v, mask, is_causal: (
            torch.nn.functional.scaled_dot_product_attention(
                m.layer_norm(q), m.layer_norm(k), v, mask, is_causal=is_causal))
    not_exported(model, tmp_path / "hf", str(tmp_path / "hf"), "logits")
    model = m.build_model(small_config(), 0)
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: m.layer_norm(out))
    not_exported(model, tmp_path / "hf", str(tmp_path / "hf"), "logits")


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
run_name: OLMo-tiny
seed: 6198

wandb:
  project: olmo-small

model:
  d_model: 32
  n_heads: 2
  n_layers: 2
  {width}
  weight_tying: false
  alibi: false
  rope: true
  flash_attention: false  # not available on AMD
  attention_dropout: 0.0
  attention_layer_norm: false
  multi_query_attention: false
  include_bias: false
  block_type: sequential
  layer_norm_type: default
  layer_norm_with_affine: false
  bias_for_layer_norm: false
  activation_type: swiglu
  max_sequence_length: 64
  vocab_size: 50
  embedding_size: 64
  eos_token_id: 49
  pad_token_id: 1
  init_device: meta
  init_fn: mitchell

decoy:
  n_layers: 99

optimizer:
  betas:
  - 0.9
  - 0.95
"""


def official_directory(path, model=None, tensors=None, edit=("", ""), width="mlp_hidden_size: 80"):
    """model.pt and config.yaml, as official OLMo writes an unsharded checkpoint."""
    path.mkdir()
    weights = {}
    for name, parameter in (model or random_model()).named_parameters():
        # by hand rather than with name_table, which this is to test
        for ours, official in ((".attn.", "."), (".mlp.", "."), ("lm_head", "ff_out")):
            name = name.replace(ours, official)
        weights["transformer." + name] = parameter.data
    weights |= tensors or {}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save(weights, path / "model.pt")
    text = OFFICIAL_YAML.format(width=width)
    assert edit[0] in text
    (path / "config.yaml").write_text(text.replace(*edit, 1))
    return path


@pytest.mark.parametrize("width", ["mlp_hidden_size: 80", "mlp_ratio: 2\n  mlp_hidden_size: 80",
                                   "mlp_hidden_size: null\n  mlp_ratio: 2", "mlp_ratio: 2"])
def test_an_official_checkpoint_loads_bit_for_bit(tmp_path, width):
    """OLMo's own mlp_hidden_size, or else mlp_ratio * d_model = 2 * 32, counts both halves."""
    ours = 40 if "80" in width else 32
    model = random_model(mlp_hidden_size=ours)
    loaded = load_model(official_directory(tmp_path / "official", model, width=width))
    assert loaded.config == model.config and same_weights(loaded, model)


@pytest.mark.parametrize("tied", ["  weight_tying: true\n", ""])  # OLMo ties by default
def test_a_tied_official_checkpoint_has_no_head(tmp_path, tied):
    model = random_model(weight_tying=True)
    official_directory(tmp_path / "one", model, edit=("  weight_tying: false\n", tied))
    assert same_weights(load_model(tmp_path / "one"), model)


def test_the_released_shapes_are_read_from_their_official_yaml(tmp_path):
    """1B has mlp_ratio 8, so 16,384 for both halves; 7B mlp_hidden_size 22,016; EOS 0 is V - 1."""
    file = tmp_path / "config.yaml"
    text = OFFICIAL_YAML.format(width="mlp_ratio: 8")
    one_b = {"d_model": 2048, "n_heads": 16, "n_layers": 16, "max_sequence_length": 2048,
             "vocab_size": 50280, "embedding_size": 50304, "weight_tying": "true",
             "eos_token_id": 0}
    for released, shape in ((one_b, ONE_B), (
            {"d_model": 4096, "n_heads": 32, "n_layers": 32, "weight_tying": "false",
             "mlp_ratio": "8\n  mlp_hidden_size: 22016"}, SEVEN_B)):
        for key, value in released.items():
            text = re.sub(f"\n  {key}: .*", f"\n  {key}: {value}", text, count=1)
        file.write_text(text)
        assert official_config(file) == m.ModelConfig(**shape)


@pytest.mark.parametrize("tensors, words", [
    ({"transformer.blocks.1.ff_proj.weight": None}, ("missing", "blocks.1", "ff_proj")),
    ({"transformer.ff_out.weight": None}, ("missing", "lm_head.weight")),
    ({"transformer.blocks.0.attn_norm.weight": torch.ones(32)},
     ("unexpected", "transformer.blocks.0.attn_norm.weight")),
    ({"transformer.blocks.1.att_proj.weight": torch.ones(96, 31)},
     ("blocks.1", "att_proj", "(96, 31)"))])
def test_misfitting_official_tensors_are_named(tmp_path, tensors, words):
    refused(official_directory(tmp_path / "official", tensors=tensors), *words)


@pytest.mark.parametrize("old, new, word", [
    ("rope: true", "rope: true\n  clip_qkv: 8.0", "clip_qkv: 8.0"),
    ("rope: true", "rope: false", "rope: false"), ("  rope: true\n", "", "rope"),
    ("alibi: false", "alibi: true", "alibi: true"),
    ("include_bias: false", "include_bias: true", "include_bias: true"),
    ("block_type: sequential", "block_type: llama", "block_type: llama"),
    ("activation_type: swiglu", "activation_type: gelu", "activation_type: gelu"),
    ("layer_norm_type: default", "layer_norm_type: rms", "layer_norm_type: rms"),
    ("with_affine: false", "with_affine: true", "layer_norm_with_affine: true"),
    ("attention_layer_norm: false", "attention_layer_norm: true", "attention_layer_norm: true"),
    ("query_attention: false", "query_attention: true", "multi_query_attention: true"),
    ("rope: true", "rope: true\n  n_kv_heads: 1", "n_kv_heads: 1"),
    ("rope: true", "rope: true\n  norm_after: true", "norm_after: true"),
    ("rope: true", "rope: true\n  scale_logits: true", "scale_logits: true"),
    ("rope: true", "rope: true\n  sliding_window: 64", "sliding_window: 64"),  # unknown
    ("  n_layers: 2\n", "", "n_layers"), ("d_model: 32", "d_model: wide", "wide"),
    ("model:\n", "network:\n", "model")])
def test_an_official_setting_that_olmo_1_does_not_have_is_refused(tmp_path, old, new, word):
    refused(official_directory(tmp_path / "official", edit=(old, new)), "config.yaml", word)


def test_a_missing_official_yaml_is_named(tmp_path):
    (official_directory(tmp_path / "official") / "config.yaml").unlink()
    refused(tmp_path / "official", "config.yaml", "missing")


@pytest.mark.parametrize("weights", [{"model": {"wte.weight": torch.ones(2)}}, [torch.ones(2)]])
def test_a_model_pt_of_another_kind_is_the_users_error(tmp_path, weights):
    official_directory(tmp_path / "official")
    torch.save(weights, tmp_path / "official/model.pt")
    refused(tmp_path / "official", "model.pt")


def test_a_bomb_in_model_pt_does_not_go_off(tmp_path):
    """The refusal is one line: torch's own eight advise to try weights_only=False."""
    marker = tmp_path / "boom"
    path = official_directory(tmp_path / "official")
    torch.save({"transformer.wte.weight": Bomb(marker)}, path / "model.pt")
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


def test_export_touches_no_directory_that_holds_something(tmp_path, call, monkeypatch):
    pytest.importorskip("safetensors")
    step, out = write_step(tmp_path / "step1"), tmp_path / "out"
    out.mkdir()
    save_hf(random_model(), out)  # an empty one may be written to
    content = {file.name: file.read_bytes() for file in out.iterdir()}
    monkeypatch.setattr(support.weights, "load_model", None)  # refused before the long part
    done = call(m, "export", step, out)
    assert done.returncode != 0 and done.stdout == "" and str(out) in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == content
    with pytest.raises(UserError, match=str(out)):
        save_hf(random_model(), out)


def test_export_takes_the_tokenizer_from_the_run(tmp_path, call):
    pytest.importorskip("safetensors")
    step = write_step(tmp_path / "run/step1")
    (tmp_path / "run/config.json").write_text(json.dumps({"d_model": 32}))
    assert "no tokenizer.json" in call(m, "export", step, tmp_path / "bare").stdout
    tokens = [{"id": 1, "content": "<pad>"}, {"id": 49, "content": "<end>"}]
    (tmp_path / "run/tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    for source in (step, tmp_path / "run"):
        out = tmp_path / f"hf-{source.name}"
        assert call(m, "export", source, out).returncode == 0
        special = json.loads((out / "special_tokens_map.json").read_text())
        assert special == {"eos_token": "<end>", "pad_token": "<pad>"}
        assert (out / "tokenizer.json").is_file()


def test_help_and_wrong_words_name_the_form(call):
    assert "python model.py export RUN OUT" in call(m, "--help").stdout
    for argv in ([], ["export", "one"], ["import"]):
        assert "export RUN OUT" in call(m, *argv).stderr
