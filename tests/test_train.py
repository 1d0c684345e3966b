"""train.py against transformers and torch's AdamW, numpy, an uninterrupted run, and vandals."""

import errno
import gzip
import hashlib
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sysconfig
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Bomb, differing_weights, flip, rows, saved_steps, steps
from tqdm import tqdm

import data
import eval as evaluation
import model as m
import train
from configs import load_config
from corpus.tokenizer import Tokenizer
from eval import evaluate
from scaling.checkpoint import load_checkpoint, newest_step, training_tensors, verify_step
from scaling.machine import can_compile, choose_micro_batch
from scaling.ranks import batch_hash
from scaling.directory import MEASURED
from scaling.log import Log, say_evaluation
from scaling.ranks import agree_on_machine
from scaling.run import Run
from scaling.signals import StopSignal
from scaling.sharding import compile_model
from support.files import UserError
from support.weights import load_model, save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
SCHEMAS = (m.ModelConfig, data.DataConfig, evaluation.EvalConfig, train.TrainConfig)
SMALL = m.ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=16,
                      vocab_size=64, embedding_size=64, eos_token_id=63, pad_token_id=62)


# ---- Helpers -------------------------------------------------------------------------------------

def batches_of(file):
    """The Batches of a config file, and the configs that it holds."""
    configs = load_config([str(file)], *SCHEMAS)
    folder = data.build_data(configs[1])
    shards = data.TokenShards(folder, configs[0].max_seq_len)
    return data.Batches(shards, configs[3].batch_size, configs[1].seed, folder), configs


# ---- Parity --------------------------------------------------------------------------------------

def oracle_rows(hf, batches, schedule):
    """(loss, lr, gradient norm) of 100 steps by transformers, torch's AdamW and arithmetic."""
    named = dict(hf.named_parameters())
    embedding = named.pop("model.embed_tokens.weight")
    optimizer = torch.optim.AdamW([{"params": list(named.values()), "weight_decay": 0.1},
                                   {"params": [embedding], "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), eps=1e-5, fused=False, foreach=False)
    for step in range(1, 101):
        if step < 10:
            lr = 3e-4 + 2.7e-3 * step / 10
        elif schedule == "linear":
            lr = 3e-3 - 2.7e-3 * (step - 10) / 90
        else:
            lr = 3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2
        tokens = batches(step)["tokens"]
        loss = hf(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        yield loss.item(), lr, norm.item()


@pytest.mark.parametrize("tied, micro_batch_size, schedule", [
    (False, 0, "linear"), (True, 3, "cosine")])
def test_a_hundred_steps_equal_those_of_transformers_and_torch(tmp_path, tiny_config, tied,
                                                               micro_batch_size, schedule):
    """Every step's loss, learning rate and gradient norm; most steps are clipped, to 0.5."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    file = tiny_config(tmp_path / "run", max_steps=100, warmup_steps=10, lr=3e-3, min_lr=3e-4,
                       grad_clip=0.5, schedule=schedule, weight_tying=tied,
                       micro_batch_size=micro_batch_size, eval_every_steps=0, save_every_steps=0)
    batches, configs = batches_of(file)
    save_hf(m.build_model(configs[0], configs[1].seed), tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert train.train(*configs) == 0
    ours = [(row["loss"], row["lr"], row["grad_norm"]) for row in rows(tmp_path / "run")]
    theirs = list(oracle_rows(hf, batches, schedule))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([row[1] for row in ours], [row[1] for row in theirs], rtol=1e-12)
    assert sum(norm > 0.5 for _, _, norm in theirs) > 50 and theirs[-1][0] < theirs[0][0] - 1


# ---- Schedule ------------------------------------------------------------------------------------

SEVEN_B = train.TrainConfig(lr=3e-4, min_lr=3e-5, warmup_steps=5000, max_steps=476_837)
ONE_B = train.TrainConfig(lr=4e-4, min_lr=4e-5, warmup_steps=2000, max_steps=739_328,
                          schedule="cosine")


@pytest.mark.parametrize("config, step, lr", [  # facts/recipe.md, 2.3
    (SEVEN_B, 1, 3.0054e-5), (SEVEN_B, 2500, 1.65e-4), (SEVEN_B, 5000, 3e-4),
    (SEVEN_B, 100_000, 2.45638e-4), (SEVEN_B, 400_000, 7.39686e-5), (SEVEN_B, 476_837, 3e-5),
    (ONE_B, 1, 4.018e-5), (ONE_B, 1000, 2.2e-4), (ONE_B, 2000, 4e-4),
    (ONE_B, 100_000, 3.845349e-4), (ONE_B, 738_020, 4.00028e-5), (ONE_B, 739_328, 4e-5)])
def test_the_learning_rate_is_that_of_the_released_models(config, step, lr):
    assert train.lr_at_step(step, config) == pytest.approx(lr, rel=2e-6)


def test_the_final_anneal_is_that_of_olmo_7b():
    """Halfway from 2.3e-5 to 2.3e-8 lies 1.15115e-5 (facts/recipe.md, 2.4, point 4)."""
    anneal = train.TrainConfig(lr=2.3e-5, min_lr=2.3e-8, warmup_steps=556_000,
                               decay_steps=557_000, max_steps=557_001)
    wanted = {556_000: 2.3e-5, 556_500: 1.15115e-5, 557_000: 2.3e-8, 557_001: 2.3e-8}
    for step, lr in wanted.items():
        assert train.lr_at_step(step, anneal) == pytest.approx(lr, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_stays_flat_after_decay_steps(schedule):
    config = train.TrainConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10, decay_steps=50,
                               max_steps=80, schedule=schedule)
    assert train.lr_at_step(49, config) > 1e-5
    assert {train.lr_at_step(step, config) for step in (50, 51, 65, 80)} == {1e-5}


def test_a_run_shorter_than_its_warm_up_warms_up_only():
    config = train.TrainConfig(lr=1e-3, warmup_steps=100, max_steps=5)
    assert [train.lr_at_step(step, config) for step in (1, 5)] == pytest.approx([1.09e-4, 1.45e-4])


def test_olmo_7b_clips_later_for_a_thousand_steps_and_a_step_behind():
    """Official OLMo sets the limit after it has clipped: step 1 at 1, steps 2 to 1001 at 10."""
    config = train.TrainConfig(grad_clip=1.0, grad_clip_warmup_steps=1000)
    limits = [train.clip_at_step(step, config) for step in (1, 2, 1000, 1001, 1002, 5000)]
    assert limits == [1, 10, 10, 10, 1, 1]


def test_without_the_rule_the_limit_never_changes():
    config = train.TrainConfig(grad_clip=0.7)
    assert {train.clip_at_step(step, config) for step in (1, 2, 3, 1000)} == {0.7}


# ---- Optimiser -----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_all_matrices_decay_but_the_embedding(tied):
    model = m.build_model(m.ModelConfig(weight_tying=tied, **{
        key: value for key, value in asdict(SMALL).items() if key != "weight_tying"}), 0)
    optimizer = train.build_optimizer(model, train.TrainConfig(
        weight_decay=0.3, beta1=0.8, beta2=0.7, eps=1e-3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
              for group in optimizer.param_groups}
    linear = [f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)]
    assert ("lm_head.weight" in linear) != tied and len(linear) == 8 + (not tied)
    assert groups == {0.3: sorted(linear), 0.0: ["wte.weight"]}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-3


def numpy_adamw(weight, gradients, lr, decay, beta1=0.9, beta2=0.95, eps=1e-5):
    """Loshchilov and Hutter's algorithm 2, the decay scaled by the learning rate as in torch."""
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for t, gradient in enumerate(gradients, 1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        step = mean / (1 - beta1**t) / (np.sqrt(square / (1 - beta2**t)) + eps)
        weight = weight - lr * decay * weight - lr * step
    return weight


def test_three_updates_are_those_of_numpy_in_float64():
    """Gradients of 1e-5, so that eps = 1e-5 takes away half of each step."""
    model = m.build_model(SMALL, 0).double()
    optimizer = train.build_optimizer(model, train.TrainConfig(weight_decay=0.1))
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    dice = np.random.default_rng(0)
    gradients = {name: dice.normal(0, 1e-5, (3, *p.shape)) for name, p in model.named_parameters()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][step])
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if name == "wte.weight" else 0.1
        wanted = numpy_adamw(before[name], gradients[name], 0.01, decay)
        np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=0, atol=1e-14)


# ---- The step ------------------------------------------------------------------------------------

def masked_batch():
    """8 rows of which each keeps another number of targets."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (8, 16), generator=generator)
    share = torch.linspace(0.1, 0.9, 8)[:, None]
    loss_mask = torch.rand(8, 16, generator=generator) < share
    assert len(set(loss_mask.sum(1).tolist())) > 4
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}


def step_by_sgd(cut, max_norm=math.inf):
    """One train_step by plain descent at lr 1: (metrics, {name: how far each weight went down})."""
    model = m.build_model(SMALL, 0).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, begin, micro_batches = masked_batch(), 0, []
    for size in cut:
        micro_batches.append({key: value[begin:begin + size] for key, value in batch.items()})
        begin += size
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)
    metrics = train.train_step(model, optimizer, micro_batches, train.pretraining_loss, 1.0,
                               max_norm)
    return metrics, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def whole_gradient():
    """(mean nats over the kept targets, {name: its gradient}) by plain autograd over one batch."""
    model, batch = m.build_model(SMALL, 0).double(), masked_batch()
    log_probs = model(batch["tokens"]).log_softmax(-1)
    nats = -log_probs.gather(2, batch["targets"][:, :, None])[:, :, 0]
    loss = nats[batch["loss_mask"]].sum() / int(batch["loss_mask"].sum())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("cut", [[8], [1] * 8, [3, 3, 2], [2, 6]])
def test_no_way_of_cutting_the_batch_changes_loss_or_gradient(cut):
    """With unequal masks a mean of means would differ. At lr 1 the way is the gradient."""
    loss, gradient = whole_gradient()
    metrics, way = step_by_sgd(cut)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-10)
    for name, wanted in gradient.items():
        torch.testing.assert_close(way[name], wanted, rtol=0, atol=1e-10)
    norm = math.sqrt(sum((g**2).sum().item() for g in gradient.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)


def test_clipping_scales_all_gradients_by_one_global_norm():
    """coefficient = max_norm / (norm + 1e-6); the norm that is told is the one before."""
    _, gradient = whole_gradient()
    norm = math.sqrt(sum((g**2).sum().item() for g in gradient.values()))
    metrics, way = step_by_sgd([3, 3, 2], max_norm=norm / 4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)
    for name, wanted in gradient.items():
        wanted = wanted * (norm / 4) / (norm + 1e-6)
        torch.testing.assert_close(way[name], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_touches_no_weight(poison):
    model = m.build_model(SMALL, 0)
    optimizer = train.build_optimizer(model, train.TrainConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = iter([1.0, poison])

    def loss_fn(model, batch):
        loss, extra = train.pretraining_loss(model, batch)
        return loss * next(factors), extra
    halves = train.cut_batch(masked_batch(), 4, "cpu")
    with pytest.raises(FloatingPointError, match="gradient norm"):
        train.train_step(model, optimizer, halves, loss_fn, 1e-3, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert optimizer.state[parameter]["step"] == 0


def test_a_gradient_that_is_not_finite_but_a_loss_that_is_stops_too():
    model = m.build_model(SMALL, 0)
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    before = model.wte.weight.detach().clone()
    with pytest.raises(FloatingPointError):
        train.train_step(model, train.build_optimizer(model, train.TrainConfig()), [masked_batch()],
                         train.pretraining_loss, 1e-3, 1.0)
    assert torch.equal(model.wte.weight, before)


def test_gradients_do_not_carry_over_to_the_next_step():
    """At lr 0 nothing moves, so a second step over the same batch has the same gradient."""
    model = m.build_model(SMALL, 0)
    optimizer = train.build_optimizer(model, train.TrainConfig())
    first, second = (train.train_step(model, optimizer, [masked_batch()], train.pretraining_loss,
                                      0.0, 1.0) for _ in range(2))
    assert first == second


def test_a_batch_is_cut_into_rows_that_make_it_up_again():
    batch = masked_batch()
    pieces = train.cut_batch(batch, 3, torch.device("cpu"))
    assert [len(piece["tokens"]) for piece in pieces] == [3, 3, 2]
    for key in batch:
        assert torch.equal(torch.cat([piece[key] for piece in pieces]), batch[key])


def test_the_batch_hash_knows_the_rows_but_not_their_order():
    tokens = masked_batch()["tokens"]
    other = tokens.clone()
    other[5, 9] += 1
    assert batch_hash(tokens) == batch_hash(tokens.flip(0))
    assert batch_hash(tokens) != batch_hash(other)
    assert re.fullmatch("[0-9a-f]{16}", batch_hash(tokens))


# ---- The machine ---------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, seq_len, wanted", [
    (16, 256, 16),  # 4,096 tokens
    (64, 256, 64),  # 16,384 just fit
    (2160, 2048, 8), (2048, 2048, 8),  # 8 x 2048 = 16,384
    (7, 4096, 1),  # 7 has no divisor below but 1
    (6, 4096, 3),  # 4 would fit but does not divide
    (2, 32768, 1)])  # one is taken however long
def test_the_micro_batch_divides_the_batch_within_16384_tokens(batch_size, seq_len, wanted):
    assert choose_micro_batch(train.TrainConfig(batch_size=batch_size), seq_len) == wanted


def test_a_micro_batch_by_hand_is_kept_but_never_above_the_batch():
    for given, wanted in ((3, 3), (8, 8), (100, 8)):
        config = train.TrainConfig(batch_size=8, micro_batch_size=given)
        assert choose_micro_batch(config, 32) == wanted


def test_compiling_needs_a_compiler_and_the_headers_of_python(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert not can_compile()
    (tmp_path / "Python.h").touch()
    assert can_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not can_compile()


@pytest.mark.parametrize("compiler, wanted", [(None, False), ("/bin/c++", True)])
def test_auto_compiles_on_a_cpu_only_where_it_can(monkeypatch, capsys, compiler, wanted):
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    config = train.TrainConfig(dtype="float32")
    _, compiled = agree_on_machine(config, {}, torch.device("cpu"))
    assert compiled == wanted
    printed = capsys.readouterr().out
    assert ("compiler" in printed and "not compiled" in printed) != wanted


def test_what_was_chosen_is_printed(capsys):
    config = train.TrainConfig(dtype="bfloat16", compile="true")
    dtype, compiled = agree_on_machine(config, {"lr": 0.5}, torch.device("cpu"))
    assert (dtype, compiled) == (torch.bfloat16, True)
    settings, line = capsys.readouterr().out.splitlines()
    assert "lr=0.5" in settings
    for word in ("cpu", "1 threads", "torch.bfloat16 (as asked)", "; compiled (as asked)"):
        assert word in line


# ---- Learning and logging ------------------------------------------------------------------------

def test_a_tiny_run_learns(tmp_path, tiny_config):
    """At the start the logits have unit variance, so that the loss is ln V + 1/2: 6.74 for 512."""
    run = tmp_path / "run"
    train.main([str(tiny_config(run, max_steps=150, lr=1e-2, save_every_steps=0))])
    losses = [row["loss"] for row in rows(run)]
    assert losses[0] == pytest.approx(math.log(512) + 0.5, abs=0.2)
    assert np.mean(losses[-10:]) < math.log(512) - 2
    first, last = (row["bits_per_byte"] for row in (rows(run, "eval")[0], rows(run, "eval")[-1]))
    assert all(last[name] < first[name] - 1 for name in ("web", "code"))


def test_metrics_have_their_rows_and_keys(finished):
    assert steps(finished) == list(range(1, 21))
    assert steps(finished, "eval") == [10, 20] and steps(finished, "end") == [20]
    assert list(json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])) == [
        "kind", "step", "tokens", "seconds", "kwh", "kg_co2"]
    for row in rows(finished):
        assert row.keys() == {
            "kind", "step", "tokens", "seconds", "loss", "perplexity", "grad_norm", "clipping_rate",
            "lr", "tokens_per_second", "tokens_per_second_per_device", "mfu", "peak_memory_gb",
            "kwh", "world_size", "batch_hash"}
        assert row["tokens"] == row["step"] * 8 * 32 and row["tokens_per_second"] > 0
    seconds = [row["seconds"] for row in rows(finished)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows(finished, "eval"):
        assert set(row["sums"]) == {"web", "code"}
        for name, sums in row["sums"].items():
            bits = sums["nats"] / math.log(2) / sums["bytes"]
            assert row["bits_per_byte"][name] == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("key, kind, wanted", [
    ("log_every_steps", "train", [6, 12, 13]), ("eval_every_steps", "eval", [6, 12, 13])])
def test_rows_come_when_they_are_due_and_at_the_end(tmp_path, tiny_config, key, kind, wanted):
    run = tmp_path / "run"
    train.main([str(tiny_config(run, max_steps=13, **{key: 6}))])
    assert steps(run, kind) == wanted


def test_the_run_directory_says_what_the_run_is(finished):
    batches, configs = batches_of(finished.with_suffix(".py"))
    assert load_config([str(finished / "config.json")], *SCHEMAS) == configs
    saved = json.loads((finished / "config.json").read_text())
    commands = {"resume", "overwrite", "accept_changes", "stop_after_minutes", "tensorboard",
                "verify"}
    assert saved.keys() == {field.name for s in SCHEMAS for field in fields(s)} - commands
    manifest = json.loads((finished / "manifest.json").read_text())
    order = np.arange(len(batches.shards), dtype=np.uint32)
    np.random.Generator(np.random.PCG64(6198)).shuffle(order)
    assert manifest["order"]["order_sha256"] == hashlib.sha256(order.tobytes()).hexdigest()
    assert manifest["order"]["data_sha256"] == manifest["sha256"]
    for shard in manifest["shards"]:
        content = (batches.order_dir / shard["file"]).read_bytes()
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    tokenizer = Tokenizer.load(finished / "tokenizer.json")
    assert tokenizer.vocab_size == 512 and tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_a_row_names_its_batch(finished):
    batches, _ = batches_of(finished.with_suffix(".py"))
    for row in rows(finished):
        assert row["batch_hash"] == batch_hash(batches(row["step"])["tokens"])


# ---- A run goes on as if it had not stopped ------------------------------------------------------

def new_checkpoint(run):
    """A test for a step directory beyond those that are there now."""
    before = set(run.glob("step??????"))
    return lambda: set(run.glob("step??????")) - before


def wait_for(process, condition):
    """Wait until `condition()` holds; the process must still be there then."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def interrupt(process, number):
    """Send a signal; the exit code and what was printed."""
    process.send_signal(number)
    stdout, stderr = process.communicate()
    return process.returncode, stdout, stderr


def same_run(run, reference):
    """Every logged number, the final weights and moments equal the reference's, bit for bit."""
    count = len(rows(reference))
    assert steps(run) == list(range(1, count + 1))  # each once, in order, none missing
    for kind, keys in (("train", ("step", "tokens", "batch_hash", "loss", "lr", "grad_norm")),
                       ("eval", ("step", "tokens", "sums")), ("end", ("step", "tokens"))):
        one, other = ([[row[key] for key in keys] for row in rows(path, kind)]
                      for path in (run, reference))
        assert one == other
    seconds = [row["seconds"] for row in rows(run)]
    assert seconds == sorted(seconds)  # they too go on
    assert saved_steps(run)[-1] == saved_steps(reference)[-1] == count
    assert differing_weights(load_model(run), load_model(reference)) == []
    one, other = (next(path.glob(f"step{count:06d}/*.distcp")) for path in (run, reference))
    assert one.read_bytes() == other.read_bytes()


LONG = dict(max_steps=120, save_every_steps=4, eval_every_steps=40)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_config):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main([str(tiny_config(run, **LONG))])
    return run


def test_a_run_stopped_by_signals_goes_on_as_if_it_had_not(tmp_path, tiny_config, start, call,
                                                           uninterrupted):
    """SIGINT, --resume, SIGTERM, --resume: exit codes 130 and 143, and each stop saves its step."""
    run, dice = tmp_path / "run", random.Random(5)
    words, last = [tiny_config(run, **LONG | {"save_every_steps": 1000})], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        process, wanted = start("train.py", *words), last + dice.randint(5, 20)
        wait_for(process, lambda: (run / "metrics.jsonl").is_file()
                 and (run / "metrics.jsonl").read_bytes().count(b'"train"') >= wanted)  # noqa: B023
        code, stdout, stderr = interrupt(process, number)
        assert code == 128 + number and "Traceback" not in stderr
        last = saved_steps(run)[-1]
        assert f"stopped after step {last}, which is saved" in stdout and wanted <= last < 120
        assert steps(run) == list(range(1, last + 1))
        words = [f"--resume={run}"]
    result = call(train, *words)
    assert result.returncode == 0 and f"continues after step {last}" in result.stdout
    same_run(run, uninterrupted)


def torture(run, words, start, moments, **options):
    """Kill a run at each of `moments`, which are seconds after a new checkpoint, or "saving"."""
    for moment in moments:
        process = start("train.py", *words, **options)
        wait_for(process, new_checkpoint(run))
        if moment == "saving":
            wait_for(process, lambda: list(run.glob("step*.tmp")))
        else:
            time.sleep(moment)
        assert interrupt(process, signal.SIGKILL)[0] == -signal.SIGKILL
        for step in run.glob("step??????"):
            verify_step(step)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, tiny_config, start, call,
                                                    uninterrupted):
    run, dice = tmp_path / "run", random.Random(7)
    file = tiny_config(run, **LONG)
    torture(run, [file], start, [dice.uniform(0, 0.3), "saving", dice.uniform(0, 0.3)])
    assert "continues after step" in call(train, file).stdout
    same_run(run, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_kills_change_nothing(tmp_path, tiny_config, start, python, seed):
    settings = LONG | {"max_steps": 400, "keep_last": 0}
    dice = random.Random(seed)
    file, reference = (tiny_config(tmp_path / name, **settings) for name in ("run", "reference"))
    assert python("train.py", reference).returncode == 0
    moments = [dice.choice(["saving", dice.uniform(0, 0.4)]) for _ in range(10)]
    torture(tmp_path / "run", [file], start, moments)
    assert "continues after step" in python("train.py", file).stdout
    same_run(tmp_path / "run", tmp_path / "reference")


@pytest.mark.slow
def test_the_compiled_default_on_two_threads_goes_on_too(tmp_path, start, python):
    """configs/tiny.py itself, shortened: compiled blocks, the chip's own dtype, two threads."""
    if not can_compile():
        pytest.skip("needs a C++ compiler")
    words = [Path(train.__file__).parent / "configs/tiny.py", "--compile=true",
             "--max_steps=30", "--save_every_steps=5", "--eval_every_steps=15",
             "--log_every_steps=1", f"--data_dir={tmp_path / 'data'}"]
    options = dict(threads=2, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert python("train.py", *words, f"--run_dir={reference}", **options).returncode == 0
    words.append(f"--run_dir={run}")
    torture(run, words, start, [0.7, "saving", 0.1], **options)
    assert "continues after step" in python("train.py", *words, **options).stdout
    same_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_same_bits_each_time_and_near_the_eager_ones(
        tmp_path, monkeypatch, request, dtype):
    """On two threads, at the size of configs/tiny.py; with the embedding compiled they differ."""
    if not can_compile():
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    tokens = (torch.rand(16, 256, generator=torch.Generator().manual_seed(0))**3 * 4000).long()
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": tokens >= 0}

    def gradients(model):
        model.zero_grad()
        summed, _ = train.pretraining_loss(model, batch)
        (summed / batch["loss_mask"].sum()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}
    eager, compiled = (m.build_model(m.ModelConfig(), 0) for _ in range(2))
    eager.compute_dtype = compiled.compute_dtype = dtype
    compile_model(compiled, torch.device("cpu"))
    first, wanted = gradients(compiled), gradients(eager)
    for _ in range(6):
        again = gradients(compiled)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
    bound = 1e-4 if dtype == torch.float32 else 0.05
    for name, gradient in wanted.items():
        assert (first[name] - gradient).norm() < bound * gradient.norm(), name


class Knocking(dict):
    """A run's state that sends SIGTERM to this process when it is read for the n-th time."""

    countdown = 0

    def __getitem__(self, key):
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(key)


def test_whenever_the_signal_comes_the_step_that_it_ends_is_saved(tmp_path):
    """The loop reads its state everywhere, so that each count of reads is another moment."""
    config = train.TrainConfig(max_steps=3, save_every_steps=2, eval_every_steps=0,
                               log_every_steps=0)
    model, batch = m.build_model(SMALL, 0), masked_batch()
    optimizer = train.build_optimizer(model, config)
    before, ended = signal.signal(signal.SIGTERM, lambda *_: None), set()  # outside of the loop
    try:
        for countdown in range(1, 50):
            run = tmp_path / f"run{countdown}"
            run.mkdir()
            state = Knocking(step=0, tokens=0, seconds=0.0, kwh=0.0)
            state.countdown = countdown
            this_run = Run(replace(config, run_dir=str(run)), {}, SMALL, torch.device("cpu"),
                           math.inf)
            this_run.state = state
            with this_run:
                for step in this_run.steps():
                    metrics = train.train_step(model, optimizer, [batch], train.pretraining_loss,
                                               1e-3, 1.0)
                    this_run.log(step, batch, metrics, 1e-3, 1.0)
                    if this_run.save_is_due(step):
                        this_run.save(model, optimizer)
            ended.add((this_run.ended_by, state["step"]))
            saved = saved_steps(run)
            assert (saved[-1] if saved else 0) == state["step"], f"at read {countdown}"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert {(signal.SIGTERM, 1), (signal.SIGTERM, 2), (0, 3)} <= ended


def test_a_signal_before_the_first_step_does_not_claim_a_saved_one(tmp_path, tiny_config, call,
                                                                   monkeypatch):
    bar = tqdm

    def knock(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return bar(*args, **options)
    knock.write = bar.write
    monkeypatch.setattr("scaling.run.tqdm", knock)
    run = tmp_path / "run"
    result = call(train, tiny_config(run))
    assert result.returncode == 143
    assert ("is saved" in result.stdout) == bool(saved_steps(run))


def test_a_second_signal_acts_at_once():
    """The first is only noted, and puts the handler back that was there before."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("at once"))
    try:
        with StopSignal() as stop:
            assert stop.number == 0
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.number == signal.SIGTERM and not received
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == ["at once"]
        with StopSignal():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["at once"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- A run directory that exists -----------------------------------------------------------------

def content(run):
    """Every file of a directory but its lock, with its bytes."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("form", ["config", "resume"])
def test_a_finished_run_says_so_and_is_left_alone(copied, finished, call, form):
    before = content(copied)
    words = {"config": [finished.with_suffix(".py"), f"--run_dir={copied}"],
             "resume": [f"--resume={copied}"]}[form]
    result = call(train, *words)
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == f"{copied}: finished, at step 20 of 20"
    assert content(copied) == before


def test_a_differing_config_is_refused_and_its_keys_named(copied, finished, call, refused):
    before = content(copied)
    result = call(train, finished.with_suffix(".py"), f"--run_dir={copied}", "--lr=0.5",
                  "--weight_decay=0.2", "--schedule=cosine", "--max_steps=30")
    line = refused(result, copied, "lr: 0.003 there, 0.5 now", "weight_decay: 0.1 there, 0.2 now",
                   "schedule: linear there, cosine now", "--overwrite")
    assert "max_steps" not in line
    assert content(copied) == before


@pytest.mark.parametrize("option", [
    "--lr=0.1", "--min_lr=0.1", "--warmup_steps=3", "--decay_steps=9", "--batch_size=4",
    "--beta1=0.5", "--beta2=0.5", "--eps=1", "--grad_clip=2", "--grad_clip_warmup_steps=7",
    "--grad_clip_warmup_factor=3", "--seed=1", "--weight_tying=true", "--rope_theta=500"])
def test_a_key_that_makes_another_run_may_not_differ(finished, call, refused, option):
    key = option[2:].split("=")[0]
    refused(call(train, f"--resume={finished}", "--max_steps=30", option), f"({key}: ")


def test_free_keys_may_differ(copied, call):
    result = call(train, f"--resume={copied}", "--max_steps=24", "--log_every_steps=2",
                  "--eval_every_steps=3", "--save_every_steps=3", "--keep_last=1",
                  "--micro_batch_size=4", "--dtype=bfloat16", "--device=auto", "--compile=false",
                  "--prompt=x", "--eval_batch_tokens=64")
    assert result.returncode == 0 and "continues after step 20" in result.stdout
    assert steps(copied) == [*range(1, 21), 22, 24] and steps(copied, "end") == [24]
    assert steps(copied, "eval") == [10, 20, 21, 24] and saved_steps(copied) == [24]
    assert json.loads((copied / "config.json").read_text())["max_steps"] == 24


def test_overwrite_starts_anew_and_leaves_foreign_files(copied, finished, call):
    (copied / "notes.txt").write_text("mine")
    (copied / "plots").mkdir()
    (copied / "plots/curve.svg").write_text("mine too")
    (copied / "step000099.tmp").mkdir()
    result = call(train, finished.with_suffix(".py"), f"--run_dir={copied}", "--lr=0.001",
                  "--max_steps=4", "--overwrite")
    assert result.returncode == 0 and "goes on" not in result.stdout
    assert steps(copied) == [1, 2, 3, 4] and steps(copied, "end") == [4]
    assert saved_steps(copied) == [4]
    assert json.loads((copied / "config.json").read_text())["lr"] == 0.001
    assert (copied / "notes.txt").read_text() == "mine"
    assert (copied / "plots/curve.svg").read_text() == "mine too"


def test_a_run_that_overwrote_goes_on_without_the_word(tmp_path, tiny_config, call):
    """--overwrite is no setting of the run: a plain restart of the run goes on with it."""
    file = tiny_config(tmp_path / "run", max_steps=3)
    assert call(train, file, "--overwrite").returncode == 0
    assert "finished, at step 3" in call(train, file).stdout


def test_a_faulty_suite_is_met_before_the_data_is_built(tmp_path, tiny_config, call, refused):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    for suite, words in ((tmp_path / "bad.jsonl", ["bad.jsonl:2", "not JSON"]),
                         (tmp_path / "gone", ["no such file"])):
        file = tiny_config(tmp_path / "run", suite=f"domains,{suite}",
                           data_dir=str(tmp_path / "data"))
        refused(call(train, file), *words)
    assert not (tmp_path / "data").exists()


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(tmp_path, tiny_config, call,
                                                                   monkeypatch, refused):
    """At step 10 of 20 and again at the last: each time the step is saved, and evaluated later."""
    run, good = tmp_path / "run", [0, 1, 0, 1]

    def sometimes(*words):
        if good and not good.pop(0):
            raise UserError("no evaluation today")
        return evaluate(*words)
    monkeypatch.setattr("train.evaluate", sometimes)
    file = tiny_config(run, save_every_steps=10)
    for step in (10, 20):
        refused(call(train, file), "no evaluation today")
        assert saved_steps(run)[-1] == step and step not in steps(run, "eval")
    result = call(train, file)
    assert result.returncode == 0 and "after step 20" in result.stdout, result.stderr
    assert steps(run, "eval") == [10, 20] and steps(run, "end") == [20]
    assert steps(run) == list(range(1, 21))
    assert "finished, at step 20" in call(train, file).stdout


def test_what_was_measured_of_a_run_goes_when_it_starts_over(copied, finished, call):
    for step in copied.glob("step*"):
        shutil.rmtree(step)
    for name in MEASURED:
        (copied / name).write_text("{}\n")
    assert call(train, finished.with_suffix(".py"), f"--run_dir={copied}").returncode == 0
    assert not any((copied / name).exists() for name in MEASURED)


def test_a_state_tells_of_the_data_before_accept_changes(copied, finished, call, tmp_path):
    state = json.loads((copied / "step000020" / "state.json").read_text())
    assert "earlier_data" not in state
    result = call(train, f"--resume={copied}", "--max_steps=22", "--eval_share=0.2",
                  "--accept_changes")
    assert result.returncode == 0, result.stderr
    later = json.loads((copied / "step000022" / "state.json").read_text())
    assert later["earlier_data"] == [state["data"]["data_sha256"]] != [later["data"]["data_sha256"]]


def test_the_loop_speaks_of_what_there_is(tmp_path, capsys):
    tasks = {"one": {"accuracy": 0.254, "greedy": 0.0, "bits_per_byte": 2.0},
             "set": {"greedy": 0.0, "bits_per_byte": 3.25}}
    say_evaluation(5, {"bits_per_byte": {}, "sums": {}, "tasks": tasks})
    assert capsys.readouterr().out.splitlines() == [
        "step 5: bits per byte: set 3.250", "step 5: accuracy: one 25.4%"]


@pytest.mark.parametrize("form", ["config", "resume"])
def test_a_directory_without_a_whole_step_is_started_over(copied, finished, call, form):
    """As a kill before the first checkpoint leaves it: rows, half a row, a half-written step."""
    for step in copied.glob("step*"):
        step.rename(step.with_name("step000005.tmp") if step.name.endswith("20")
                    else copied.parent / step.name)
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    words = {"config": [finished.with_suffix(".py"), f"--run_dir={copied}"],
             "resume": [f"--resume={copied}"]}[form]
    assert call(train, *words).returncode == 0
    same_run(copied, finished)


def test_resume_of_nothing_is_one_clear_line(tmp_path, call, refused):
    refused(call(train, f"--resume={tmp_path / 'nowhere'}"), tmp_path / "nowhere", "no run there")
    assert not (tmp_path / "nowhere").exists()


def test_keep_last_keeps_the_newest(tmp_path, tiny_config, call):
    for keep_last, wanted in ((2, [8, 9]), (0, [2, 4, 6, 8, 9]), (1, [9])):
        run = tmp_path / f"keep{keep_last}"
        call(train, tiny_config(run, max_steps=9, save_every_steps=2, keep_last=keep_last))
        assert saved_steps(run) == wanted


def test_leftovers_of_a_kill_vanish(copied, call):
    for name in ("step000020.tmp", "step000021.tmp"):
        shutil.copytree(copied / "step000020", copied / name)
    assert call(train, f"--resume={copied}", "--max_steps=21").returncode == 0
    assert saved_steps(copied) == [15, 20, 21]


@pytest.fixture
def own_data(tmp_path, tiny_config, sources):
    """A finished run of 3 steps on a corpus of its own: (config file, a file of the corpus)."""
    mine = {name: shutil.copytree(path, tmp_path / name) for name, path in sources.items()}
    file = tiny_config(tmp_path / "run", max_steps=3, data_dir=str(tmp_path / "data"),
                       sources={name: str(path) for name, path in mine.items()})
    train.main([str(file)])
    return file, mine["web"] / "part.jsonl"


def test_changed_data_is_refused_and_what_changed_is_named(own_data, call, refused):
    config, file = own_data
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    line = refused(call(train, config, "--max_steps=5"), "its data has changed", "data_sha256",
                   "order_sha256", "instances", "--overwrite")
    assert "seed" not in line
    file.write_text("".join(lines))
    assert call(train, config, "--max_steps=5").returncode == 0


def test_data_that_was_only_touched_is_the_same(own_data, call):
    config, file = own_data
    os.utime(file, (1, 1))
    result = call(train, config, "--max_steps=5")
    assert result.returncode == 0 and "continues after step 3" in result.stdout


# ---- Checkpoints are whole or named --------------------------------------------------------------

def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


def miscount(file):
    """One byte that leaves the JSON whole: step 20 saw 5,120 tokens."""
    text = file.read_text()
    assert '"tokens": 5120,' in text
    file.write_text(text.replace('"tokens": 5120,', '"tokens": 5121,'))


FILES = (".metadata", "__0_0.distcp", "state.json")


@pytest.mark.parametrize("name, damage", [
    *((name, damage) for name in FILES for damage in (flip, cut, Path.unlink)),
    ("state.json", miscount)])
def test_a_damaged_step_is_named_and_the_one_before_goes_on(copied, finished, call, name, damage):
    assert {path.name for path in (copied / "step000020").iterdir()} == set(FILES)
    damage(copied / "step000020" / name)
    result = call(train, f"--resume={copied}")
    assert result.returncode == 0
    assert f"warning: {copied / 'step000020' / name}" in result.stdout
    assert "continues after step 15" in result.stdout
    same_run(copied, finished)


def test_a_repaired_run_needs_no_second_repair(copied, call):
    """The damaged step 20 was made anew, whole, when the run came by it again."""
    flip(copied / "step000020/__0_0.distcp")
    assert "warning" in call(train, f"--resume={copied}").stdout
    verify_step(copied / "step000020")
    result = call(train, f"--resume={copied}")
    assert "warning" not in result.stdout and "finished, at step 20" in result.stdout


def test_a_damaged_step_does_not_count_among_the_last_that_are_kept(copied, call):
    """keep_last=1 must not drop whole steps for the sake of a damaged one of a higher number."""
    flip(copied / "step000020/__0_0.distcp")
    result = call(train, f"--resume={copied}", "--max_steps=17", "--keep_last=1")
    assert result.returncode == 0
    assert newest_step(copied)[0].name == "step000017"


def seal(step, **changes):
    """Recompute the digests of a step directory, as a stranger would who wrote all of it."""
    state = json.loads((step / "state.json").read_text()) | changes
    del state["sha256"]
    for name in state["files"]:
        whole = (step / name).read_bytes()
        state["files"][name] = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    body = json.dumps(state, sort_keys=True).encode()
    state["sha256"] = hashlib.sha256(body).hexdigest()
    (step / "state.json").write_text(json.dumps(state))


def test_a_bomb_in_a_checkpoint_does_not_go_off(copied, tmp_path, call, refused):
    marker, file = tmp_path / "boom", copied / "step000020/.metadata"
    file.write_bytes(pickle.dumps(Bomb(marker)))
    seal(file.parent)
    refused(call(train, f"--resume={copied}", "--max_steps=25"), file, "refused")
    assert not marker.exists()
    pickle.loads(file.read_bytes())
    assert marker.exists()  # so it was one


def test_a_checkpoint_of_another_shape_is_refused_by_name(finished):
    step = finished / "step000020"
    config = json.loads((step / "state.json").read_text())["config"]
    shape = {key: config[key] for key in m.ModelConfig.__dataclass_fields__}
    for change, words in ((dict(n_layers=3), "missing model.blocks.2"),
                          (dict(n_layers=1), "unexpected model.blocks.1"),
                          (dict(mlp_hidden_size=40), r"shape \(96, 32\), not \(80, 32\)")):
        model = m.build_model(m.ModelConfig(**shape | change), 0)
        optimizer = train.build_optimizer(model, train.TrainConfig())
        with pytest.raises(UserError, match=f"step000020.*{words}"):
            load_checkpoint(step, model, optimizer)


def test_a_run_of_another_shape_is_refused_by_name(copied, call, refused):
    """config.json and state.json agree on three layers; the tensors do not."""
    step = copied / "step000020"
    config = json.loads((copied / "config.json").read_text()) | {"n_layers": 3}
    (copied / "config.json").write_text(json.dumps(config))
    seal(step, config=config)
    refused(call(train, f"--resume={copied}", "--max_steps=25"), step, "missing model.blocks.2")


def test_a_checkpoint_restores_weights_and_moments(finished):
    """Into a model and an optimiser of another seed, in place, every tensor of them."""
    _, configs = batches_of(finished.with_suffix(".py"))
    pairs = []
    for seed in (1, 2):
        model = m.build_model(configs[0], seed)
        optimizer = train.build_optimizer(model, configs[3])
        load_checkpoint(finished / "step000020", model, optimizer)
        pairs.append(training_tensors(model, optimizer))
    assert len(pairs[0]) == 4 * 10  # ten matrices; of each the weight, two moments and a count
    for name, tensor in pairs[0].items():
        assert torch.equal(tensor, pairs[1][name]) and tensor.any(), name
        assert not name.endswith(".step") or tensor == 20
    for name, parameter in load_model(finished).named_parameters():
        assert torch.equal(parameter, pairs[0][f"model.{name}"])


def test_a_full_disk_ends_in_one_line_and_harms_nothing(copied, python, call, refused):
    """No file may grow beyond 300 KB: a step's tensors, 670 KB, do not fit, all else does."""
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    before = content(copied / "step000020")
    words = [f"--resume={copied}", "--max_steps=24", "--save_every_steps=22"]
    result = python("train.py", *words, preexec_fn=small_files)
    refused(result, "step000022", "free some space", f"--resume={copied}")
    assert saved_steps(copied) == [10, 15, 20] and content(copied / "step000020") == before
    for step in saved_steps(copied):
        verify_step(copied / f"step{step:06d}")
    result = call(train, *words)
    assert result.returncode == 0 and "continues after step 20" in result.stdout
    assert steps(copied) == list(range(1, 25)) and saved_steps(copied) == [20, 22, 24]


def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    class FullDisk:
        name = "metrics.jsonl"

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")
    log = Log(tmp_path, 0)
    log.file.close()
    log.file = FullDisk()
    with pytest.raises(UserError, match="metrics.jsonl.*No space left.*free some space"):
        log.write("train", {"step": 1, "tokens": 2, "seconds": 3.0})


# ---- Mistakes of the user ------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    (["--lrr=1"], ["lrr", "did you mean lr?"]),
    (["--lr=fast"], ["lr=fast", "float", "str"]),
    (["--max_steps=1.5"], ["max_steps=1.5", "int"]),
    (["--compile=maybe"], ["compile=maybe", "auto, true, false"]),
    (["--batch_size=100000"], ["batch_size=100000", "lower batch_size"]),
    (["--n_heads=5"], ["d_model=32", "n_heads"]),
    (["--batch_size=0"], ["batch_size"]),
    (["--micro_batch_size=-1"], ["micro_batch_size"]),
    (["--keep_last=-1"], ["keep_last"])])
def test_a_wrong_option_is_one_line(tmp_path, tiny_config, call, refused, options, words):
    refused(call(train, tiny_config(tmp_path / "run"), *options), *words)
    assert not (tmp_path / "run").exists()


def test_a_missing_config_file_is_one_line(call, refused):
    refused(call(train, "configs/nowhere.py"), "configs/nowhere.py", "no such config file")


@pytest.mark.parametrize("words", [[], ["--lr=1"], ["--resume"]])
def test_no_config_at_all_is_one_line(call, refused, words):
    refused(call(train, *words), "python train.py configs/tiny.py", "--resume=RUN")


@pytest.mark.parametrize("key", ["run_dir", "data_dir"])
def test_a_file_in_a_directorys_place_is_one_line(tmp_path, tiny_config, call, refused, key):
    (tmp_path / "file").write_text("not a directory")
    result = call(train, tiny_config(tmp_path / "run"), f"--{key}={tmp_path / 'file'}")
    refused(result, tmp_path / "file")


def test_in_a_process_of_its_own_a_mistake_is_one_line_too(tmp_path, tiny_config, python, refused):
    """Nothing but the line on stderr, and exit code 1."""
    result = python("train.py", tiny_config(tmp_path / "run"), "--lrr=1")
    assert refused(result, "lrr", "did you mean lr?") == result.stderr.rstrip()


def broken_gzip(folder):
    whole = gzip.compress(b'{"text": "some words"}\n' * 1000)
    (folder / "part.jsonl.gz").write_bytes(whole[:len(whole) // 2])


def flipped_gzip(folder):
    whole = bytearray(gzip.compress(os.urandom(3000).hex().encode()))
    whole[len(whole) // 2] ^= 1
    (folder / "part.jsonl.gz").write_bytes(whole)


def jsonl(*lines):
    return lambda folder: (folder / "part.jsonl").write_text("".join(f"{x}\n" for x in lines))


GOOD = json.dumps({"text": "the words of a good line"})
BAD_SOURCES = {
    "missing folder": (Path.rmdir, "bpe:512", ["no such file or folder", "--sources"]),
    "truncated gzip": (broken_gzip, "bpe:512", ["part.jsonl.gz", "cut off"]),
    "corrupt gzip": (flipped_gzip, "bpe:512", ["part.jsonl.gz", "corrupt"]),
    "bad lines alone": (jsonl("{oh", "[1]"), "own", ["mine", "2 bad lines"]),
    "no document": (jsonl(), "own", ["mine", "no text to train on"]),
    "blank documents": (jsonl('{"text": " "}'), "own", ["mine", "no text to train on"]),
    "nothing to learn from": (jsonl(), "bpe:512", ["mine", "no text to train on"]),
    "less than a batch": (jsonl(GOOD), "own", ["batch_size=8", "add text"])}


@pytest.mark.parametrize("spoil, tokenizer, words", BAD_SOURCES.values(), ids=BAD_SOURCES.keys())
def test_a_bad_source_is_one_line(tmp_path, tiny_config, finished, call, refused, spoil, tokenizer,
                                  words):
    (tmp_path / "mine").mkdir()
    spoil(tmp_path / "mine")
    tokenizer = str(finished / "tokenizer.json") if tokenizer == "own" else tokenizer
    file = tiny_config(tmp_path / "run", sources={"mine": str(tmp_path / "mine")},
                       data_dir=str(tmp_path / "data"), tokenizer=tokenizer, eval_share=0.0)
    refused(call(train, file), *words)
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("data/*.tmp"))


def test_a_vocabulary_that_is_not_the_tokenizers_is_named(tmp_path, tiny_config, call, refused):
    """256 bytes and 28 added tokens are 284 ids; the flags that the line gives make it work."""
    for size in (300, 600):
        run = tmp_path / f"run{size}"
        words = [tiny_config(run, tokenizer=f"bpe:{size}"), "--max_steps=1"]
        line = refused(call(train, *words), f"--vocab_size={size}", f"--eos_token_id={size - 1}",
                       f"--pad_token_id={size - 2}")
        assert ("--embedding_size=600" in line) == (size == 600)
        flags = re.findall(r"--\w+=\d+", line)
        assert call(train, *words, *flags).returncode == 0 and steps(run) == [1]


def test_a_learning_rate_that_explodes_ends_in_one_line(tmp_path, tiny_config, call, refused):
    """1e30 at step 1 makes weights whose logits are not finite at step 2."""
    run = tmp_path / "run"
    refused(call(train, tiny_config(run, lr=1e30, warmup_steps=0, save_every_steps=1)), "step 2",
            "nan", "--lr")
    assert saved_steps(run) == [1] and steps(run) == [1]
