"""Weights from elsewhere read by slices, and official OLMo's safetensors files."""

import base64
import json
import os
import pickle
import shutil
import tracemalloc
import weakref
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (IDS, ROOT, Bomb, forked_ranks, random_model, refusal, same_weights)
from test_checkpoint import refused, write_step
from test_model import ONE_B
from test_weights import official_yaml

import adapt
import data
import eval as evaluation
import model as m
import support.hf_weights
import support.models
import train
from scaling.ranks import rank, setup_distributed
from scaling.sharding import apply_fsdp, build_mesh, full_tensor, shard_model
from support import finite
from support.models import fill_weights, open_base
from support.official_names import decode_name
from support.plain_pickle import unpickled
from support.weights import empty_model, fill_from_files, kind_of, load_model, name_table

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

# Its numbers of rows leave a rest on 3 ranks, and one of the ranks has none of the 4.
UNEVEN = dict(d_model=4, n_heads=2, mlp_hidden_size=5, vocab_size=7, embedding_size=7,
              eos_token_id=6, pad_token_id=1)


# ---- Writers, by hand: name_table and decode_name are what is tested -----------------------------

def hf_names(model):
    """{Hugging Face's name: tensor} of a model."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = f"model.{name}".replace("blocks", "layers").replace("attn.", "self_attn.")
        if name == "model.lm_head.weight":
            tensors["lm_head.weight"] = tensor
        elif name == "model.wte.weight":
            tensors["model.embed_tokens.weight"] = tensor
        elif "att_proj" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace("att_proj", f"{part}_proj")] = rows
        elif "ff_proj" in name:
            for part, rows in zip(("up", "gate"), tensor.chunk(2), strict=True):
                tensors[name.replace("ff_proj", f"{part}_proj")] = rows
        else:
            tensors[name.replace("attn_out", "o_proj").replace("ff_out", "down_proj")] = tensor
    return tensors


def write_hf(path, model, dtype=torch.bfloat16, shards=4, **changed):
    """A Hugging Face directory of several files with their index."""
    safetensors = pytest.importorskip("safetensors.torch")
    path.mkdir(parents=True)
    config = small_hf_config(model.config)
    (path / "config.json").write_text(json.dumps(config))
    tensors = {**hf_names(model), **changed}
    files = [{} for _ in range(shards)]
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        file = f"model-{number % shards + 1:05d}-of-{shards:05d}.safetensors"
        weight_map[name] = file
        files[number % shards][name] = tensor.to(dtype).clone()
    for number, held in enumerate(files):
        safetensors.save_file(held, path / f"model-{number + 1:05d}-of-{shards:05d}.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def small_hf_config(config):
    return dict(model_type="olmo", hidden_size=config.d_model, num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads, intermediate_size=config.mlp_hidden_size,
                max_position_embeddings=config.max_seq_len, vocab_size=config.embedding_size,
                unpadded_vocab_size=config.vocab_size, eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id, tie_word_embeddings=config.weight_tying)


def official_names(model):
    """{official OLMo's name: tensor} of a model."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for ours, official in ((".attn.", "."), (".mlp.", "."), ("lm_head", "ff_out")):
            name = name.replace(ours, official)
        tensors[f"transformer.{name}"] = tensor
    return tensors


def encoded(keys, is_pickled=False):
    """A tensor's name as olmo/safetensors_util.py encodes it."""
    return base64.urlsafe_b64encode(pickle.dumps((keys, is_pickled), protocol=4)).decode()


def write_official(path, model, kind="safetensors", dtype=torch.float32, **names):
    """An official unsharded checkpoint: config.yaml beside model.safetensors or model.pt.

    names: further tensors of the safetensors file, under names as they are.
    """
    path.mkdir(parents=True, exist_ok=True)
    config = model.config
    keys = ("d_model", "n_heads", "n_layers", "vocab_size", "embedding_size", "eos_token_id",
            "pad_token_id")
    (path / "config.yaml").write_text(official_yaml(
        mlp_hidden_size=2 * config.mlp_hidden_size, max_sequence_length=config.max_seq_len,
        weight_tying=str(config.weight_tying).lower(),
        **{key: getattr(config, key) for key in keys}))
    tensors = {name: tensor.to(dtype) for name, tensor in official_names(model).items()}
    if kind == "pt":
        torch.save(tensors, path / "model.pt")
    else:
        safetensors = pytest.importorskip("safetensors.torch")
        tensors = {encoded((name,)): tensor for name, tensor in tensors.items()}
        safetensors.save_file({**tensors, **names}, path / "model.safetensors")
    return path


def rounded(dtype, **changes):
    """A model whose weights have no more digits than `dtype`."""
    model = random_model(**changes)
    return model.to(dtype).float()


def write_settings(run):
    """config.json of a run."""
    settings = {**asdict(data.DataConfig()), "run_dir": str(run)}
    (run / "config.json").write_text(json.dumps(settings))


# ---- On several ranks ----------------------------------------------------------------------------

def filled_on_ranks(folder, paths, world_size, per_node=None, shard="all"):
    """Fill a model from each directory on so many ranks; returns what each rank said.

    FOLDER/NAME.pt gets the weights, gathered again. A relative path lies in FOLDER/RANK.
    """
    def fill(argv):
        device = setup_distributed("cpu")
        if (folder / str(rank())).exists():
            os.chdir(folder / str(rank()))
        for path in paths:
            base = open_base(str(path), "size")
            with torch.device("meta"):
                model = m.OLMo(base.model_config)
            shard_model(model, train.TrainConfig(shard=shard), device, torch.float32, False)
            for parameter in model.parameters():
                parameter.detach().fill_(torch.nan)
            try:
                fill_weights(model, base)
                (folder / f"{path.name} {rank()}").write_text("filled")
            except ValueError as error:
                (folder / f"{path.name} {rank()}").write_text(str(error))
                continue
            weights = {name: full_tensor(p) for name, p in model.named_parameters()}
            if rank() == 0:
                torch.save(weights, folder / f"{path.name}.pt")
        dist.destroy_process_group()
    codes, printed = forked_ranks(world_size, folder / "log", fill, per_node=per_node)
    assert codes == [0] * world_size, printed
    return {path.name: [(folder / f"{path.name} {number}").read_text()
                        for number in range(world_size)] for path in paths}


@pytest.mark.parametrize("world_size, per_node, shard", [(3, 3, "all"), (4, 2, "hybrid")])
def test_each_rank_fills_its_own_rows(tmp_path, world_size, per_node, shard):
    models = {"hf": rounded(torch.bfloat16, **UNEVEN),
              "hf_tied": rounded(torch.bfloat16, **UNEVEN, weight_tying=True),
              "pt": rounded(torch.float32, **UNEVEN),
              "safetensors": rounded(torch.float16, **UNEVEN),
              "step000001": rounded(torch.float32, **UNEVEN)}
    paths = [write_hf(tmp_path / "hf", models["hf"]),
             write_hf(tmp_path / "hf_tied", models["hf_tied"]),
             write_official(tmp_path / "pt", models["pt"], "pt", torch.float64),
             write_official(tmp_path / "safetensors", models["safetensors"], dtype=torch.float16),
             write_step(tmp_path / "run/step000001", models["step000001"])]
    write_settings(tmp_path / "run")
    said = filled_on_ranks(tmp_path, paths, world_size, per_node, shard)
    assert said == {path.name: ["filled"] * world_size for path in paths}
    for name, model in models.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert found.keys() == dict(model.named_parameters()).keys()
        for key, parameter in model.named_parameters():
            assert torch.equal(found[key], parameter), (name, key)


def test_what_one_rank_finds_ends_all_of_them(tmp_path):
    """Each fault lies in rows that one rank alone reads; the others would wait for it for ever."""
    model = rounded(torch.bfloat16, **UNEVEN, weight_tying=True)
    last = {name: tensor.clone() for name, tensor in hf_names(model).items()}
    name = "model.layers.1.mlp.gate_proj.weight"
    last[name][-1, -1] = torch.nan
    head = last["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1
    official = write_official(tmp_path / "official", model)
    paths = [write_hf(tmp_path / "nan", model, **{name: last[name]}),
             write_hf(tmp_path / "head", model, **{"lm_head.weight": head}),
             write_hf(tmp_path / "same", model, **{"lm_head.weight": last[
                 "model.embed_tokens.weight"]}), official]
    with torch.no_grad():
        model.blocks[0].mlp.ff_proj.weight[0, 0] = torch.inf
    step = write_step(tmp_path / "run/step000001", model)
    write_settings(tmp_path / "run")
    for number in range(3):
        write_hf(tmp_path / str(number) / "other", rounded(torch.bfloat16, seed=number // 2))
    said = filled_on_ranks(tmp_path, [*paths, step, Path("other")], 3)
    [message] = set(said["other"])  # rank 2 sees other weights under that name
    assert "rank 2" in message and "the weights in other" in message
    for path, words in ((paths[0], [name, "NaN", "of-00004.safetensors"]),
                        (paths[1], ["lm_head.weight", "tied", "of-00004.safetensors"]),
                        (step, ["blocks.0.mlp.ff_proj.weight", "infinite"])):
        [message] = set(said[path.name])
        assert all(word in message for word in (str(path), *words))
    assert said["same"] == said["official"] == ["filled"] * 3


def test_one_rank_alone_hashes_the_files(tmp_path, tokenizer, monkeypatch):
    path = write_hf(tmp_path / "hf", random_model(**IDS), shards=2)
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    hashed = support.models.file_sha256

    def noted(file):
        with open(tmp_path / "hashed", "a") as log:
            log.write(f"{file.name} on rank {os.environ['RANK']}\n")
        return hashed(file)
    monkeypatch.setattr(support.models, "file_sha256", noted)
    codes, printed = forked_ranks(
        2, tmp_path / "log", adapt.main, ROOT / "configs/tiny_sft.py",
        f"--start_from={path}", f"--train_data={tmp_path / 'none.jsonl'}",
        f"--run_dir={tmp_path / 'run'}", "--device=cpu")
    assert 0 not in codes and "none.jsonl" in printed
    assert (tmp_path / "hashed").read_text().splitlines() == [
        "config.json on rank 0", "model-00001-of-00002.safetensors on rank 0",
        "model-00002-of-00002.safetensors on rank 0"]


# ---- How much is read and held -------------------------------------------------------------------

def write_sparse_1b(path, shards=4):
    """Hugging Face's directory of the released 1B in bfloat16, all zeros that take no disk."""
    config = m.ModelConfig(**ONE_B)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(small_hf_config(config)))
    shapes = {part: names.shape for names in name_table(config) for part in names.parts}
    weight_map = {name: f"{number % shards}.safetensors" for number, name in enumerate(shapes)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in set(weight_map.values()):
        header, end = {}, 0
        for name in (name for name in shapes if weight_map[name] == file):
            begin, end = end, end + 2 * shapes[name][0] * shapes[name][1]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        content = json.dumps(header).encode()
        with open(path / file, "wb") as stream:
            stream.write(len(content).to_bytes(8, "little") + content)
            stream.truncate(8 + len(content) + end)
    return path


def test_no_rank_of_a_1b_holds_more_than_its_slice_and_one_tensor(tmp_path, monkeypatch):
    """The network is on the meta device; the files are real, and what is asked of them counted."""
    pytest.importorskip("safetensors")
    from torch.testing._internal.distributed.fake_pg import FakeStore
    path = write_sparse_1b(tmp_path / "1b")
    config = m.ModelConfig(**ONE_B)
    rows_of = support.hf_weights.rows_of
    alive, read = [], []

    def counted(file, key, first, last):
        assert not [tensor for tensor in alive if tensor() is not None]  # one at a time
        rows = rows_of(file, key, first, last)
        alive.append(weakref.ref(rows))
        read.append(rows.numel())
        return rows
    monkeypatch.setattr(support.hf_weights, "rows_of", counted)
    monkeypatch.setattr(finite, "check_weights", lambda tensors, file: None)  # meta has no numbers
    parameters = sum(parameter.numel() for parameter in empty_model(config).parameters())
    whole = []
    for number in range(4):
        dist.init_process_group("fake", rank=number, world_size=4, store=FakeStore())
        try:
            model = empty_model(config)
            apply_fsdp(model, build_mesh("all", torch.device("cpu")), torch.float32)
            read.clear()
            fill_from_files(model, path)
        finally:
            dist.destroy_process_group()
        assert read.pop() == 2048  # the row by which the ranks see that they read the same
        own = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert own == sum(read) == pytest.approx(parameters / 4, rel=0.01)
        assert max(read) <= 50_304 * 2048 / 4
        whole.append(sum(read))
    assert sum(whole) == parameters  # each number is read once


# ---- model.safetensors of official OLMo ----------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_an_official_safetensors_file_loads_bit_for_bit(tmp_path, tied, capsys):
    """So does official OLMo's own writer's (checked once with olmo/safetensors_util.py)."""
    model = random_model(weight_tying=tied)
    path = write_official(tmp_path / "official", model)
    loaded = load_model(path)
    assert loaded.config == model.config and same_weights(loaded, model)
    assert open_base(str(path), "size").kind == "official"
    digest = open_base(str(path), "size").digest
    (path / "optim.safetensors").write_text("of no interest here")
    assert same_weights(load_model(path), model)
    assert open_base(str(path), "size").digest == digest
    assert capsys.readouterr().out == ""


def test_an_official_safetensors_file_is_exported_and_evaluated(tmp_path, tokenizer, call):
    model = random_model(**IDS)
    path = write_official(tmp_path / "official", model)
    shutil.copyfile(tokenizer, path / "tokenizer.json")
    assert call(m, "export", path, tmp_path / "hf").returncode == 0
    assert same_weights(load_model(tmp_path / "hf"), model)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/web.jsonl").write_text('{"text": "the dog sleeps again"}\n')
    one, other = (call(evaluation, each, f"--suite={tmp_path / 'text'}").stdout
                  for each in (path, tmp_path / "hf"))
    assert "bits/byte" in one and one == other.replace(str(tmp_path / "hf"), str(path))


@pytest.mark.parametrize("keys, is_pickled, words", [
    (("transformer.wte.bias",), False, ["unexpected transformer.wte.bias"]),
    (("state", "transformer.wte.weight"), False, ['"state"']),  # an optimiser's
    (("model",), True, ['"model"'])])
def test_what_is_no_tensor_of_the_model_is_named(tmp_path, keys, is_pickled, words):
    tensors = {encoded(keys, is_pickled): torch.ones(2)}
    refused(write_official(tmp_path / "official", random_model(), **tensors), *words)


def test_a_nan_and_integers_in_an_official_file_are_named(tmp_path):
    name = "transformer.blocks.1.ff_proj.weight"
    bad = random_model()
    with torch.no_grad():
        bad.blocks[1].mlp.ff_proj.weight[-1, -1] = torch.inf
    for kind in ("pt", "safetensors"):
        refused(write_official(tmp_path / kind, bad, kind), f"model.{kind}", name, "infinite")
    integers = {encoded((name,)): torch.ones(80, 32, dtype=torch.int8)}
    refused(write_official(tmp_path / "int8", random_model(), **integers), name, "I8")
    again = base64.urlsafe_b64encode(pickle.dumps(((name,), False), protocol=5)).decode()
    refused(write_official(tmp_path / "twice", random_model(), **{again: torch.ones(80, 32)}),
            name, "model.safetensors too")


def test_a_repeated_tied_head_of_another_shape_is_named(tmp_path):
    head = {"lm_head.weight": torch.ones(63, 32)}
    refused(write_hf(tmp_path / "hf", random_model(weight_tying=True), **head),
            "lm_head.weight has shape (63, 32)")


# ---- Nothing that is loaded runs code ------------------------------------------------------------

def as_name(pickled):
    return base64.urlsafe_b64encode(pickled).decode()


def bombs(marker):
    """Pickles that create the file `marker` when they are unpickled freely."""
    bomb = Bomb(marker)
    yield pickle.dumps(((bomb,), False))
    yield pickle.dumps((("transformer.wte.weight",), bomb))
    yield pickle.dumps(bomb)
    yield pickle.dumps(((bomb,), False), protocol=2)
    old = pickle.dumps(bomb, protocol=0)  # text; behind the version of a newer one
    yield b"\x80\x04" + old
    # runs, and leaves what a name should hold
    yield pickle.dumps(bomb)[:-1] + b"0" + pickle.dumps((("transformer.wte.weight",), False))[2:]


@pytest.mark.parametrize("number", range(6))
def test_a_bomb_in_a_name_does_not_go_off(tmp_path, number):
    marker = tmp_path / "boom"
    pickled = list(bombs(marker))[number]
    name = as_name(pickled)
    path = write_official(tmp_path / "official", random_model(), **{name: torch.ones(1)})
    refused(path, "model.safetensors", "instruction")
    assert not marker.exists()
    pickle.loads(pickled)
    assert marker.exists()  # it is live


@pytest.mark.parametrize("name, words", [
    (as_name(b"\x80\x04K\x01r\xff\xff\xff\x7f."), ["LONG_BINPUT"]),  # asks for 16 GiB
    (as_name(pickle.dumps([("a",), False])), ["EMPTY_LIST"]),
    (as_name(pickle.dumps((("a" * 9000,), False))), ["characters"]),
    (as_name(pickle.dumps((("a", ("b",)), False))), ["key"]),
    (as_name(pickle.dumps(((), False))), []), (as_name(pickle.dumps((("a",), 1))), []),
    (as_name(pickle.dumps("a")), []), (as_name(b"\x80\x04(K\x01\x87."), []),
    (as_name(b"\x80\x04\x87."), []), (as_name(b"\x80\x04h\x05."), []), (as_name(b"\x80\x04."), []),
    (as_name(pickle.dumps((("a",), False)))[:-8], []),
    (as_name(b"\x80\x04K\x01" + pickle.dumps((("a",), False))[2:]), []),  # two values
    (f"gA!{encoded(('a',))[2:]}", []), ("gASV", []), ("gAS", []), ("gA\n\n", [])])
def test_a_name_that_official_olmo_does_not_write_is_refused(name, words):
    line = refusal(decode_name, name, "FILE")
    assert "FILE: the name" in line and all(word in line for word in words)


@pytest.mark.parametrize("keys", [
    ("transformer.wte.weight",), ("state", "x" * 300, "exp_avg"), ("a", "same", "same"), ("a",) * 5,
    ("param_groups", 0, 256, 70_000, -1), ("ä", "日本")])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_names_that_official_olmo_writes_are_read(keys, is_pickled):
    assert decode_name(encoded(keys, is_pickled), "FILE") == (keys, is_pickled)


def test_eight_bytes_do_not_take_gigabytes():
    """An index of 2**27 would take 2 GiB in the unpickler that is written in C."""
    tracemalloc.start()
    try:
        assert unpickled(b"\x80\x04K\x01r\xff\xff\xff\x07.", "FILE") == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_tensors_without_numbers_are_refused(tmp_path):
    """torch's own reader of weights admits them."""
    for odd in (torch.ones(64, 32, device="meta"), torch.ones(64, 32).to_sparse()):
        path = write_official(tmp_path / "official", random_model(), "pt")
        tensors = torch.load(path / "model.pt")
        torch.save({**tensors, "transformer.wte.weight": odd}, path / "model.pt")
        refused(path, "model.pt", "transformer.wte.weight")


# ---- Which files a directory's model is in -------------------------------------------------------

@pytest.mark.parametrize("files, kind", [
    ("yaml pt", "official"), ("yaml encoded", "official"), ("yaml pt encoded", "official"),
    ("json plain", "hf"), ("json shards", "hf"), ("json plain shards", "hf"),
    ("yaml pt json", "official"), ("yaml encoded json", "official"),  # no weights for config.json
    ("yaml pt plain", "official"), ("json plain pt", "hf"), ("json plain yaml", "hf"),
    ("yaml json pt plain", ["two models", "model.pt", "model.safetensors"]),
    ("yaml json pt shards", ["two models", "model.pt", "model.safetensors.index.json"]),
    ("yaml json encoded shards", ["two models", "index.json"]),
    ("pt", ["config.yaml: missing", "model.pt"]),
    ("encoded", ["config.yaml: missing", "model.safetensors"]),
    ("json encoded", ["config.yaml: missing", "model.safetensors"]),
    ("plain", ["config.json: missing"]), ("yaml plain", ["config.json: missing"]),
    ("json", ["model.safetensors: missing"]),
    ("yaml", ["no model here", "model.pt or model.safetensors"]),
    ("yaml slices", ["scripts/unshard.py"]), ("", ["no model here"])])
def test_the_files_say_what_a_directory_is(tmp_path, files, kind, capsys):
    model = random_model()
    hf = write_hf(tmp_path / "hf", model, torch.float32, shards=1)
    official = write_official(tmp_path / "official", model)
    write_official(official, model, "pt")
    [shard] = hf.glob("*.safetensors")
    index = hf / "model.safetensors.index.json"
    sources = {"yaml": [official / "config.yaml"], "pt": [official / "model.pt"],
               "encoded": [official / "model.safetensors"], "json": [hf / "config.json"],
               "shards": [shard, index]}
    path = tmp_path / "model"
    path.mkdir()
    for word in files.split():
        for file in sources.get(word, ()):
            shutil.copyfile(file, path / file.name)
        if word == "plain":
            shutil.copyfile(shard, path / "model.safetensors")
        if word == "slices":
            (path / "model_and_optim").mkdir()
    if isinstance(kind, str):
        assert kind_of(path) == kind
        assert same_weights(load_model(path), model)
        is_left = len({*files.split()} & {"pt", "encoded", "plain", "shards"}) > 1
        assert ("is not read" in capsys.readouterr().out) == is_left
    else:
        line = refusal(load_model, path)
        assert str(path) in line and all(word in line for word in kind), line
