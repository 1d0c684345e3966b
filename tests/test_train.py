"""train.py against transformers and torch's AdamW, numpy, an uninterrupted run, and vandals."""

import hashlib
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ROOT, Bomb, check_same_run, columns, flip, forked, is_running, joined,
                      rows, saved_steps, seal, steps, wait_until)

import data
import eval as evaluation
import model as m
import train
from configs import load_config
from corpus.lineage import changed_texts
from corpus.tokenizer import Tokenizer
from scaling import checkpoint
from scaling.checkpoint import create_state, newest_step, verify_step
from scaling.compiler import compile_model
from scaling.directory import MEASURED, NOT_SAVED
from scaling.kept import drop_old_checkpoints
from scaling.log import Log, say_evaluation
from scaling.machine import can_compile, choose_micro_batch
from scaling.ranks import agree_on_machine, batch_hash
from scaling.run import Run
from scaling.signals import StopSignal
from support.files import UserError, write_rows
from support.lock import Lock
from support.weights import save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
SCHEMAS = (m.ModelConfig, data.DataConfig, evaluation.EvalConfig, train.TrainConfig)
SMALL = m.ModelConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=16,
                      vocab_size=64, embedding_size=64, eos_token_id=63, pad_token_id=62)
CPU = torch.device("cpu")


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
def test_a_hundred_steps_equal_those_of_transformers_and_torch(
        tmp_path, tiny_config, transformers, tied, micro_batch_size, schedule):
    """Every step's loss, learning rate and gradient norm; most steps are clipped, to 0.5."""
    file = tiny_config(tmp_path / "run", max_steps=100, warmup_steps=10, lr=3e-3, min_lr=3e-4,
                       grad_clip=0.5, schedule=schedule, weight_tying=tied,
                       micro_batch_size=micro_batch_size, eval_every_steps=0, save_every_steps=0)
    batches, configs = batches_of(file)
    save_hf(m.build_model(configs[0], configs[1].seed), tmp_path / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert train.train(*configs) == 0
    ours = columns(tmp_path / "run", "loss", "lr", "grad_norm")
    theirs = list(oracle_rows(hf, batches, schedule))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([row[1] for row in ours], [row[1] for row in theirs], rtol=1e-12)
    assert sum(norm > 0.5 for _, _, norm in theirs) > 50 and theirs[-1][0] < theirs[0][0] - 1


# ---- Schedule ------------------------------------------------------------------------------------

SEVEN_B = train.TrainConfig(lr=3e-4, min_lr=3e-5, warmup_steps=5000, max_steps=476_837)
ONE_B = train.TrainConfig(lr=4e-4, min_lr=4e-5, warmup_steps=2000, max_steps=739_328,
                          schedule="cosine")


@pytest.mark.parametrize("config, rates", [
    (SEVEN_B, {1: 3.0054e-5, 2500: 1.65e-4, 5000: 3e-4, 100_000: 2.45638e-4, 400_000: 7.39686e-5,
               476_837: 3e-5}),
    (ONE_B, {1: 4.018e-5, 1000: 2.2e-4, 2000: 4e-4, 100_000: 3.845349e-4, 738_020: 4.00028e-5,
             739_328: 4e-5})])
def test_the_learning_rate_is_that_of_the_released_models(config, rates):
    """Official OLMo's scheduler, asked for the released configurations."""
    for step, lr in rates.items():
        assert train.lr_at_step(step, config) == pytest.approx(lr, rel=2e-6)


def test_the_clip_warm_up_of_the_published_yaml_takes_effect_a_step_late():
    """As in official OLMo. tests/test_recipes.py: the run of OLMo-7B itself had no such rule."""
    config = train.TrainConfig(grad_clip_warmup_steps=1000)
    assert [train.clip_at_step(step, config) for step in (1, 2, 1001, 1002)] == [1, 10, 10, 1]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_at_the_edges(schedule):
    """It stays flat after decay_steps; a run that is shorter than its warm-up warms up only."""
    config = train.TrainConfig(lr=1e-3, min_lr=1e-5, warmup_steps=10, decay_steps=50,
                               max_steps=80, schedule=schedule)
    assert train.lr_at_step(49, config) > 1e-5
    assert {train.lr_at_step(step, config) for step in (50, 51, 65, 80)} == {1e-5}
    short = replace(config, warmup_steps=100, decay_steps=0, max_steps=5)
    rates = [train.lr_at_step(step, short) for step in (1, 4)]
    assert rates == pytest.approx([1.09e-4, 1.36e-4])


def test_the_clip_limit_is_larger_for_n_steps_and_a_step_behind():
    """Official OLMo sets the limit after it has clipped: step 1 at 1, steps 2 to 1001 at 10."""
    config = train.TrainConfig(grad_clip=1.0, grad_clip_warmup_steps=1000)
    limits = [train.clip_at_step(step, config) for step in (1, 2, 1000, 1001, 1002, 5000)]
    assert limits == [1, 10, 10, 10, 1, 1]
    for grad_clip, limit in ((0.7, 0.7), (0, math.inf)):
        config = train.TrainConfig(grad_clip=grad_clip)
        assert {train.clip_at_step(step, config) for step in (1, 2, 3, 1000)} == {limit}


# ---- Optimiser -----------------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
def test_all_matrices_decay_but_the_embedding(tied):
    """Nor do parameters of one dimension, such as the gain that a fork may give its norms."""
    model = m.build_model(replace(SMALL, weight_tying=tied), 0)
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(32))
    optimizer = train.build_optimizer(model, train.TrainConfig(
        weight_decay=0.3, beta1=0.8, beta2=0.7, eps=1e-3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: sorted(names[id(p)] for p in group["params"])
              for group in optimizer.param_groups}
    linear = [f"{name}.weight" for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear)]
    assert ("lm_head.weight" in linear) != tied and len(linear) == 8 + (not tied)
    assert groups == {0.3: sorted(linear), 0.0: ["blocks.0.gain", "wte.weight"]}
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.7) and group["eps"] == 1e-3


@pytest.mark.parametrize("make", [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.5, fused=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)])
def test_a_created_state_is_that_of_torch_before_its_first_step(make):
    """All zeros, the keys and dtypes of a state that torch made when it was needed, the same steps.

    Making it changes neither weight nor learning rate.
    """
    created, lazy = (make([torch.nn.Parameter(torch.arange(6.0).view(2, 3))]) for _ in range(2))
    create_state(created)
    [one], [other] = created.param_groups[0]["params"], lazy.param_groups[0]["params"]
    assert torch.equal(one, other) and one.grad is None and created.param_groups[0]["lr"] == 0.01
    assert created.state[one] and not any(t.any() for t in created.state[one].values())
    for step in range(3):
        one.grad, other.grad = (torch.full((2, 3), 0.1 + step) for _ in range(2))
        created.step()
        lazy.step()
        assert torch.equal(one, other)
        assert created.state[one].keys() == lazy.state[other].keys()
        for key, tensor in lazy.state[other].items():
            assert torch.equal(created.state[one][key], tensor)
            assert created.state[one][key].dtype == tensor.dtype


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
    optimizer = train.build_optimizer(model, train.TrainConfig(weight_decay=0.1, lr=0.01))
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    dice = np.random.default_rng(0)
    gradients = {name: dice.normal(0, 1e-5, (3, *p.shape)) for name, p in model.named_parameters()}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(gradients[name][step])
        optimizer.step()
    for name, parameter in model.named_parameters():
        decay = 0.0 if name == "wte.weight" else 0.1
        expected = numpy_adamw(before[name], gradients[name], 0.01, decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-14)


# ---- The step ------------------------------------------------------------------------------------

def masked_batch():
    """8 rows, each with another number of targets that count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 60, (8, 16), generator=generator)
    share = torch.linspace(0.1, 0.9, 8)[:, None]
    loss_mask = torch.rand(8, 16, generator=generator) < share
    assert len(set(loss_mask.sum(1).tolist())) > 4
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}


def gradient_by_autograd():
    """(mean loss of the targets that count, {name: its gradient}) over one uncut batch."""
    model, batch = m.build_model(SMALL, 0).double(), masked_batch()
    log_probs = model(batch["tokens"]).log_softmax(-1)
    losses = -log_probs.gather(2, batch["targets"][:, :, None])[:, :, 0]
    loss = losses[batch["loss_mask"]].mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size, limit", [
    (8, math.inf), (1, math.inf), (3, math.inf), (3, 0.25)])
def test_no_way_of_cutting_the_batch_changes_loss_or_gradient(micro_batch_size, limit):
    """With these masks a mean of means would differ. At lr 1 of SGD the update is the gradient.

    Clipping scales all of it by limit / norm; the norm that is logged is the one before.
    """
    loss, gradient = gradient_by_autograd()
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    model = m.build_model(SMALL, 0).double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    micro_batches = train.cut_batch(masked_batch(), micro_batch_size, CPU)
    assert sum(len(batch["tokens"]) for batch in micro_batches) == 8
    metrics = train.train_step(model, torch.optim.SGD(model.parameters(), lr=9.0), micro_batches,
                               train.pretraining_loss, 1.0, limit * norm)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-10)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-10)
    for name, parameter in model.named_parameters():
        expected = gradient[name] * min(1, limit * norm / (norm + 1e-6))
        torch.testing.assert_close(before[name] - parameter, expected, rtol=0, atol=1e-10)
        assert parameter.grad is None  # the next step begins without it


@pytest.mark.parametrize("factors, gradient_factor", [
    ([1.0, math.inf], 1.0), ([1.0, math.nan], 1.0), ([1.0, 1.0], math.nan)])
def test_a_loss_or_gradient_that_is_not_finite_touches_no_weight(factors, gradient_factor):
    """In the second micro-batch, or in the gradient alone; the optimiser's state is untouched."""
    model = m.build_model(SMALL, 0)
    model.lm_head.weight.register_hook(lambda gradient: gradient * gradient_factor)
    optimizer = train.build_optimizer(model, train.TrainConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    factors = iter(factors)

    def loss_fn(model, batch):
        loss, extra = train.pretraining_loss(model, batch)
        return loss * next(factors), extra
    halves = train.cut_batch(masked_batch(), 4, "cpu")
    with pytest.raises(FloatingPointError):
        train.train_step(model, optimizer, halves, loss_fn, 1e-3, 1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert optimizer.state[parameter]["step"] == 0


def test_the_batch_hash_knows_the_rows_but_not_their_order():
    tokens = masked_batch()["tokens"]
    other = tokens.clone()
    other[5, 9] += 1
    assert batch_hash(tokens) == batch_hash(tokens.flip(0)) != batch_hash(other)
    assert re.fullmatch("[0-9a-f]{16}", batch_hash(tokens))


# ---- The machine ---------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_size, seq_len, asked, expected", [
    (16, 256, 0, 16),  # 4,096 tokens
    (64, 256, 0, 64),  # 16,384 just fit
    (2160, 2048, 0, 8), (2048, 2048, 0, 8),  # 8 x 2048 = 16,384
    (7, 4096, 0, 1),  # 7 is a prime
    (6, 4096, 0, 3),  # 4 would fit but does not divide
    (2, 32768, 0, 1),  # one is taken however long
    (8, 32, 3, 3), (8, 32, 100, 8)])  # a number that was asked for, at most the batch
def test_the_micro_batch_divides_the_batch_within_16384_tokens(batch_size, seq_len, asked,
                                                               expected):
    config = train.TrainConfig(batch_size=batch_size, micro_batch_size=asked)
    assert choose_micro_batch(config, seq_len) == expected


def test_auto_compiles_where_a_compiler_and_the_headers_of_python_are(monkeypatch, tmp_path,
                                                                      capsys):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    config = train.TrainConfig(dtype="float32")
    for compiler in (None, "/bin/c++"):
        monkeypatch.setattr(shutil, "which", lambda name, compiler=compiler: compiler)
        (tmp_path / "Python.h").unlink(missing_ok=True)
        assert not can_compile()
        (tmp_path / "Python.h").touch()
        assert can_compile() == bool(compiler)
        assert agree_on_machine(config, {"lr": 0.5}, CPU) == (torch.float32, bool(compiler))
        *settings, line = capsys.readouterr().out.splitlines()
        assert "lr=0.5" in "".join(settings) and "torch.float32" in line and "1 threads" in line
        assert ("not compiled" in line) != bool(compiler)


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
    batches, _ = batches_of(finished.with_suffix(".py"))
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
        assert row["batch_hash"] == batch_hash(batches(row["step"])["tokens"])
    seconds = [row["seconds"] for row in rows(finished)]
    assert seconds == sorted(seconds) and seconds[0] > 0
    for row in rows(finished, "eval"):
        assert set(row["sums"]) == {"web", "code"}
        for name, sums in row["sums"].items():
            bits = sums["nats"] / math.log(2) / sums["bytes"]
            assert row["bits_per_byte"][name] == pytest.approx(bits, rel=1e-12)


def test_the_energy_of_a_run_never_falls(copied, call):
    """The last evaluation comes after the last checkpoint: the row "end" alone counts it."""
    log = copied / "metrics.jsonl"
    *before, end = map(json.loads, log.read_text().splitlines())
    write_rows(log, [*before, end | {"kwh": end["kwh"] + 5.0}])
    assert call(train, f"--resume={copied}", "--max_steps=22").returncode == 0
    energy = [row["kwh"] for row in [*rows(copied), *rows(copied, "end")]]
    assert energy == sorted(energy) and energy[19] < 5 <= energy[20]


def a_run(folder, **settings):
    """A Run that was not opened, in a directory that nobody locks."""
    config = train.TrainConfig(run_dir=str(folder), **settings)
    run = Run(config, {}, SMALL, CPU, math.inf)
    run.state = {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}
    return run


@pytest.mark.parametrize("interval, due", [
    (0, [13]), (1, range(1, 14)), (6, [6, 12, 13]), (13, [13]), (100, [13])])
def test_what_is_due_at_multiples_of_its_interval_and_at_the_end(tmp_path, interval, due):
    run = a_run(tmp_path, max_steps=13, save_every_steps=interval, eval_every_steps=interval)
    run.is_late_to_save = False
    for is_due in (run.save_is_due, run.evaluation_is_due):
        assert [step for step in range(1, 14) if is_due(step)] == list(due)
    # A signal, or save_every_minutes, makes a checkpoint due at any step, and no evaluation.
    run.ended_by = signal.SIGTERM
    assert run.save_is_due(5) and run.evaluation_is_due(5) == (5 in due)
    run.ended_by, run.is_late_to_save = 0, True
    assert run.save_is_due(5) and run.evaluation_is_due(5) == (5 in due)


def test_the_run_directory_says_what_the_run_is(finished):
    batches, configs = batches_of(finished.with_suffix(".py"))
    assert load_config([str(finished / "config.json")], *SCHEMAS) == configs
    saved = json.loads((finished / "config.json").read_text())
    assert saved.keys() == {field.name for s in SCHEMAS for field in fields(s)} - NOT_SAVED
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


def test_an_evaluation_is_printed_with_what_it_has(capsys):
    tasks = {"one": {"accuracy": 0.254, "greedy": 0.0, "bits_per_byte": 2.0},
             "set": {"greedy": 0.0, "bits_per_byte": 3.25}}
    say_evaluation(5, {"bits_per_byte": {}, "sums": {}, "tasks": tasks})
    assert capsys.readouterr().out.splitlines() == [
        "step 5: bits per byte: set 3.250", "step 5: accuracy: one 25.4%"]


# ---- A run goes on as if it had not stopped ------------------------------------------------------

LONG = dict(max_steps=120, save_every_steps=4, eval_every_steps=40)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_config):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main([str(tiny_config(run, **LONG))])
    return run


def signal_at(number, module, name, call):
    """Sends a run this signal at the n-th call of a function: there, however loaded the machine."""
    def change():
        calls, function = [], getattr(module, name)

        def signal_and_call(*args, **options):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return function(*args, **options)
        setattr(module, name, signal_and_call)
    return change


def test_a_run_stopped_by_signals_goes_on_as_if_it_had_not(tmp_path, tiny_config, call,
                                                           uninterrupted):
    """SIGINT, --resume, SIGTERM in the first step, --resume: exit codes 130 and 143, and each stop
    saves its step."""
    run = tmp_path / "run"
    words = [tiny_config(run, **LONG | {"save_every_steps": 1000})]
    for number, at, last in ((signal.SIGINT, 11, 11), (signal.SIGTERM, 1, 12)):
        log = tmp_path / f"{number}.log"
        process = forked(log, train.main, *words,
                         before=signal_at(number, train, "train_step", at))
        assert joined(process) == 128 + number and "Traceback" not in log.read_text()
        assert f"stopped after step {last}" in log.read_text() and saved_steps(run) == [last]
        assert steps(run) == list(range(1, last + 1))
        words = [f"--resume={run}", "--keep_last=1"]
    result = call(train, *words)
    assert result.returncode == 0 and f"continues after step {last}" in result.stdout
    check_same_run(run, uninterrupted)


def is_stopped(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_a_run_that_was_stopped_before_its_first_step_is_begun(tmp_path, tiny_config, call,
                                                               monkeypatch):
    """--resume and the same command alike; a run that has lost its steps is another matter."""
    run = tmp_path / "run"
    config = tiny_config(run, max_steps=2)
    for words in ([config], [f"--resume={run}"]):
        def interrupted(*_):
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", interrupted)
            stopped = call(train, *words)
        assert stopped.returncode == 130 and stopped.stderr.count("the same command") == 1
    assert call(train, f"--resume={run}").returncode == 0 and saved_steps(run) == [2]
    shutil.rmtree(run / "step000002")
    assert "holds no step" in call(train, f"--resume={run}").stderr


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, tiny_config, call, uninterrupted):
    """In a step, while it saves, in a step. test_torture.py kills more often, and several ranks."""
    run = tmp_path / "run"
    file = tiny_config(run, **LONG)
    for where in ((train, "train_step", 15), (checkpoint, "finish_checkpoint", 3),
                  (train, "train_step", 7)):
        process = forked(tmp_path / "log", train.main, file,
                         before=signal_at(signal.SIGSTOP, *where))
        wait_until(lambda: is_stopped(process), process)  # noqa: B023
        process.kill()
        wait_until(lambda: not is_running(process))  # noqa: B023
        for step in run.glob("step??????"):
            verify_step(step)
    assert "continues after step 24" in call(train, file).stdout
    check_same_run(run, uninterrupted)


def kill(process, run, moment):
    """SIGKILL so many seconds after a new checkpoint, or while one is "saving"."""
    before = set(run.glob("step??????"))
    wait_until(lambda: set(run.glob("step??????")) - before, process)
    if moment == "saving":
        wait_until(lambda: list(run.glob("step*.tmp")), process)
    else:
        time.sleep(moment)
    assert is_running(process)
    process.kill()
    wait_until(lambda: not is_running(process))
    for step in run.glob("step??????"):
        verify_step(step)


@pytest.mark.slow
def test_the_compiled_default_on_two_threads_goes_on_too(tmp_path, start, python):
    """configs/tiny.py itself, shortened: compiled blocks, the chip's own dtype, two threads."""
    if not can_compile():
        pytest.skip("needs a C++ compiler")
    words = [ROOT / "configs/tiny.py", "--compile=true", "--max_steps=30", "--save_every_steps=5",
             "--eval_every_steps=15", "--log_every_steps=1", f"--data_dir={tmp_path / 'data'}"]
    options = dict(threads=2, env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    run, reference = tmp_path / "run", tmp_path / "reference"
    assert python("train.py", *words, f"--run_dir={reference}", **options).returncode == 0
    words.append(f"--run_dir={run}")
    for moment in (0.7, "saving", 0.1):
        with start("train.py", *words, **options) as process:
            kill(process, run, moment)
    assert "continues after step" in python("train.py", *words, **options).stdout
    check_same_run(run, reference)


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
                    reason="this system gives no pages of 2 MB")
def test_large_tensors_of_a_run_lie_on_large_pages():
    """PyTorch reads the switch at its first tensor: importing a command must not make one. adapt
    imports train, and with it all others."""
    code = ("import torch, adapt; from scaling.ranks import setup_distributed; "
            "setup_distributed('cpu'); kept = torch.ones(2**24); "
            "print(open('/proc/self/smaps_rollup').read())")
    text = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                          stdout=subprocess.PIPE).stdout
    [kib] = re.findall(r"AnonHugePages: +(\d+) kB", text)
    assert int(kib) > 0


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
    compile_model(compiled, CPU, is_asked=True)
    first, expected = gradients(compiled), gradients(eager)
    for _ in range(6):
        again = gradients(compiled)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
    bound = 1e-4 if dtype == torch.float32 else 0.05
    for name, gradient in expected.items():
        assert (first[name] - gradient).norm() < bound * gradient.norm(), name


# ---- Signals -------------------------------------------------------------------------------------

@pytest.fixture
def received():
    """The list in which SIGTERMs are noted that a run does not handle."""
    numbers = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


class Knocking(dict):
    """A run's state that sends SIGTERM to this process when it is read for the n-th time."""

    def __getitem__(self, key):
        self.n -= 1
        if self.n == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(key)


def test_whenever_a_signal_comes_the_step_that_it_ends_is_saved(tmp_path, received):
    """A run reads its state at many moments of its loop; each n is another moment for the signal.

    Nothing is computed here: the loop is that of train(), without the model.
    """
    batch = {"tokens": torch.ones(1, 4, dtype=torch.int64)}
    metrics = {"loss": 1.0, "grad_norm": 1.0}
    ends = set()
    for n in range(1, 200):
        run = a_run(tmp_path, max_steps=3, save_every_steps=2, log_every_steps=1)
        run.state = Knocking(run.state)
        run.state.n = n
        saved = 0
        with run:
            for step in run.steps():
                run.log(step, batch, metrics, 1e-3, 1.0)
                if run.save_is_due(step):
                    saved = run.state["step"]
        assert saved == run.state["step"], f"at read {n}"
        ends.add((run.ended_by, saved))
        if run.state.n > 0:  # so many reads there are not: the run was not disturbed
            break
    assert ends == {(signal.SIGTERM, 1), (signal.SIGTERM, 2), (0, 3)} and 20 < n < 199


def test_a_second_signal_acts_at_once(received, capsys):
    """The first is only noted, and puts the handler back that was there before. (In the first
    step the compiler must not hear them: test_command.py.)"""
    with StopSignal() as stop:
        assert stop.reason() == 0  # as it is asked after the first step
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM and len(received) == 0
        assert "a second SIGTERM stops at once" in capsys.readouterr().out
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(received) == 1
    with StopSignal():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert len(received) == 2


def test_the_clock_ends_a_run(tmp_path, tiny_config, call):
    """It is stopped with the alarm's exit code after a step, which is saved."""
    run = tmp_path / "run"
    words = [tiny_config(run, max_steps=100_000, save_every_steps=0, eval_every_steps=0),
             "--stop_after_minutes=0.02"]
    result = call(train, *words)
    assert result.returncode == 128 + signal.SIGALRM
    [saved] = saved_steps(run)
    assert f"stopped after step {saved}" in result.stdout and steps(run)[-1] == saved


def test_the_clock_saves(tmp_path, tiny_config, call):
    """With an interval that is shorter than a step, each step is saved; 0 saves none."""
    for minutes, saved in ((1e-9, [1, 2, 3]), (0.0, [3])):
        run = tmp_path / f"{minutes}"
        words = [tiny_config(run, max_steps=3, save_every_steps=0, keep_last=0,
                             eval_every_steps=0), f"--save_every_minutes={minutes}"]
        assert call(train, *words).returncode == 0 and saved_steps(run) == saved


# ---- A run directory that exists -----------------------------------------------------------------

def content(run):
    """Every file of a directory but its lock, with its bytes."""
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name != ".lock"}


def test_a_finished_run_says_so_and_is_left_alone(copied, finished, call):
    before = content(copied)
    for words in ([finished.with_suffix(".py"), f"--run_dir={copied}"], [f"--resume={copied}"]):
        result = call(train, *words)
        assert result.returncode == 0
        assert f"{copied}: finished, at step 20 of 20" in result.stdout.splitlines()[-1]
        assert content(copied) == before


def test_settings_and_funnel_are_printed_whole_once_and_then_what_changed(tiny_config, tmp_path,
                                                                          call):
    file = tiny_config(tmp_path / "run", max_steps=1)
    whole = call(train, file).stdout
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    words = " ".join(whole.split())
    assert all(f" {key}=" in words for key in saved) and "run_dir=" + str(tmp_path / "run") in words
    assert "documents in" in whole
    config, _, funnel, *_ = call(train, file).stdout.splitlines()
    assert config == f"config: as in {tmp_path / 'run' / 'config.json'}"
    assert "as before" in funnel and f"eval.py report {tmp_path / 'run'}" in funnel
    config, *_ = call(train, file, "--max_steps=2").stdout.splitlines()
    assert config.endswith("config.json, except max_steps=2 (before: 1)")
    assert "documents in" in call(train, file, "--overwrite").stdout


def test_a_differing_config_is_refused_and_its_keys_named(copied, finished, call, refused):
    """Every key that changes what is learned from a batch is named, and no other."""
    before = content(copied)
    options = {"lr": 0.5, "min_lr": 0.1, "warmup_steps": 3, "decay_steps": 9, "beta1": 0.5,
               "beta2": 0.5, "eps": 1, "weight_decay": 0.2, "grad_clip": 2,
               "grad_clip_warmup_steps": 7, "grad_clip_warmup_factor": 3, "schedule": "cosine",
               "batch_size": 4, "seed": 1, "weight_tying": "true", "rope_theta": 500}
    words = [f"--{key}={value}" for key, value in options.items()]
    line = refused(call(train, finished.with_suffix(".py"), f"--run_dir={copied}", "--max_steps=30",
                        *words), copied, "lr: 0.003 there, 0.5 now", "--overwrite")
    assert set(re.findall(r"(\w+): \S+ there, \S+ now", line)) == options.keys()
    assert content(copied) == before


def test_free_keys_may_differ(copied, call):
    result = call(train, f"--resume={copied}", "--max_steps=24", "--log_every_steps=2",
                  "--eval_every_steps=3", "--save_every_steps=3", "--keep_last=1",
                  "--micro_batch_size=4", "--dtype=bfloat16", "--device=auto", "--compile=false",
                  "--prompt=x", "--eval_batch_tokens=64")
    assert result.returncode == 0 and "continues after step 20" in result.stdout
    assert steps(copied) == [*range(1, 21), 22, 24] and steps(copied, "end") == [24]
    assert steps(copied, "eval") == [10, 20, 21, 24] and saved_steps(copied) == [24]
    assert json.loads((copied / "config.json").read_text())["max_steps"] == 24


def test_a_changed_schedule_is_printed(copied, call):
    """max_steps is free; with it the decay ends later, and the next learning rate is another."""
    [config] = load_config([str(copied / "config.json")], train.TrainConfig, other=train.SCHEMAS)
    shutil.rmtree(copied / "step000020")
    result = call(train, f"--resume={copied}", "--max_steps=22")
    [line] = [line for line in result.stdout.splitlines() if "the schedule" in line]
    lr_before, lr_now = (train.lr_at_step(16, replace(config, max_steps=steps))
                         for steps in (20, 22))
    assert "step 16" in line and "max_steps=20" in line
    assert f"{lr_now:.3g};" in line and line.endswith(f"{lr_before:.3g}")
    shutil.rmtree(copied / "step000022")
    result = call(train, f"--resume={copied}")  # of 22 steps since then
    assert "continues after step 20" in result.stdout and "the schedule" not in result.stdout


def test_changes_are_accepted_on_request_and_named(copied, call, refused):
    """The state also keeps the digest of the data before."""
    data_before = json.loads((copied / "step000020" / "state.json").read_text())["data"]
    words = [f"--resume={copied}", "--max_steps=24", "--lr=0.001", "--eval_share=0.2"]
    refused(call(train, *words), "lr: 0.003 there, 0.001 now", "--accept_changes")
    result = call(train, *words, "--accept_changes")
    assert result.returncode == 0 and "lr: 0.003 there, 0.001 now" in result.stdout
    assert steps(copied) == list(range(1, 25))
    assert json.loads((copied / "config.json").read_text())["lr"] == 0.001
    later = json.loads((copied / "step000024" / "state.json").read_text())
    assert later["earlier_data"] == [data_before["data_sha256"]] != [later["data"]["data_sha256"]]
    assert call(train, f"--resume={copied}", "--max_steps=25").returncode == 0


@pytest.mark.parametrize("layers", [3, 1])
def test_changes_that_do_not_fit_leave_the_run_as_it_was(copied, call, refused, layers):
    before = content(copied)
    refused(call(train, f"--resume={copied}", f"--n_layers={layers}", "--max_steps=22",
                 "--accept_changes"), copied, f"n_layers: 2 there, {layers} now")
    assert content(copied) == before


def test_overwrite_begins_at_step_1_and_leaves_foreign_files(copied, finished, call):
    """It is no setting of the run: the same command without it continues the new run."""
    (copied / "plots").mkdir()
    (copied / "plots/curve.svg").write_text("mine")
    (copied / "step000099.tmp").mkdir()
    words = [finished.with_suffix(".py"), f"--run_dir={copied}", "--lr=0.001", "--max_steps=4"]
    result = call(train, *words, "--overwrite")
    assert result.returncode == 0 and "continues" not in result.stdout
    assert steps(copied) == [1, 2, 3, 4] and steps(copied, "end") == [4]
    assert saved_steps(copied) == [4]
    assert json.loads((copied / "config.json").read_text())["lr"] == 0.001
    assert (copied / "plots/curve.svg").read_text() == "mine"
    assert "finished, at step 4" in call(train, *words).stdout


def test_overwrite_never_deletes_what_it_needs(copied, call, refused, monkeypatch):
    words = [f"--resume={copied}", "--overwrite", "--lr=0.001"]
    refused(call(train, *words, f"--start_from={copied / 'step000015'}"), "start_from")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    refused(call(train, *words), "--max-restarts")
    assert saved_steps(copied) == [10, 15, 20]


def test_an_anneal_goes_on_from_a_step_with_its_own_schedule(tmp_path, finished, tiny_config, call,
                                                             refused, sources):
    """start_from takes weights, moments and place in the data: with the same schedule nothing
    differs from the run itself; with another only the learning rate does. Other data is refused."""
    start = f"--start_from={finished / 'step000015'}"
    same = tiny_config(tmp_path / "same", save_every_steps=5, keep_last=3)
    assert call(train, same, start).returncode == 0
    assert columns(tmp_path / "same", "step", "loss") == columns(finished, "step", "loss")[15:]
    assert rows(tmp_path / "same")[0]["tokens"] == 16 * 8 * 32
    anneal = tiny_config(tmp_path / "anneal", max_steps=20, lr=2.3e-5, min_lr=2.3e-8,
                         warmup_steps=15, decay_steps=20)
    assert call(train, anneal, start).returncode == 0
    assert columns(tmp_path / "anneal", "batch_hash") == columns(finished, "batch_hash")[15:]
    rates = [row["lr"] for row in rows(tmp_path / "anneal")]
    assert rates[0] == pytest.approx(1.84046e-5) and rates[-1] == 2.3e-8
    again = call(train, anneal, start)  # a restart finds the run, not its start
    assert "finished, at step 20" in again.stdout
    other = tiny_config(tmp_path / "other", sources={"web": sources["web"]}, seed=1)
    refused(call(train, other, start), "data_sha256: ", "seed: 6198 there, 1 now")


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(tmp_path, tiny_config, call,
                                                                   monkeypatch, refused):
    """At step 10 of 20 and again at the last: each time the step is saved, and evaluated later."""
    run, good = tmp_path / "run", [0, 1, 0, 1]

    def sometimes(*words):
        if good and not good.pop(0):
            raise UserError("no evaluation today")
        return evaluation.evaluate(*words)
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


def test_a_directory_without_a_complete_step_is_started_over(copied, finished, call):
    """As a kill before the first checkpoint leaves it: rows, half a row, a half-written step.

    What eval.py measured belongs to a run that is no more, and is deleted.
    """
    for step in copied.glob("step*"):
        step.rename(step.with_name("step000005.tmp") if step.name.endswith("20")
                    else copied.parent / step.name)
    for name in MEASURED:
        (copied / name).write_text("{}\n")
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert call(train, copied / "config.json", f"--run_dir={copied}").returncode == 0
    check_same_run(copied, finished)
    assert not any((copied / name).exists() for name in MEASURED)


def test_leftovers_of_a_kill_and_of_a_power_cut_do_not_stop_a_run(copied, call):
    """Half-written steps; zeros in the middle of the log, and half a row at its end."""
    for name in ("step000020.tmp", "step000021.tmp"):
        shutil.copytree(copied / "step000020", copied / name)
    log = copied / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    lines[5] = b"\0" * 300 + b"\n"
    log.write_bytes(b"".join(lines) + b'{"kind": "tr')
    assert call(train, f"--resume={copied}", "--max_steps=21").returncode == 0
    assert saved_steps(copied) == [15, 20, 21]
    assert steps(copied) == [1, 2, 3, 4, 5, *range(7, 22)]


@pytest.mark.parametrize("keep_last, keep_every, kept", [
    (2, 0, [10, 11]), (0, 0, [2, 4, 6, 8, 10, 11]), (1, 0, [11]), (1, 4, [4, 8, 11])])
def test_the_newest_steps_and_multiples_are_kept(tmp_path, keep_last, keep_every, kept):
    for step in (2, 4, 6, 8, 10, 11):
        (tmp_path / f"step{step:06d}").mkdir()
    drop_old_checkpoints(tmp_path, keep_last, keep_every)
    assert saved_steps(tmp_path) == kept


def test_a_second_process_in_a_run_is_refused(copied, tmp_path, call, refused):
    def hold(argv):
        with Lock(copied / ".lock"):
            (tmp_path / "held").touch()
            time.sleep(3600)
    process = forked(tmp_path / "log", hold)
    wait_until((tmp_path / "held").exists, process)
    refused(call(train, f"--resume={copied}", "--max_steps=21"), copied, process.pid)
    process.kill()
    process.join()
    assert call(train, f"--resume={copied}", "--max_steps=21").returncode == 0


def test_data_that_changed_is_refused_and_data_that_was_touched_is_not(tmp_path, tiny_config,
                                                                       sources, call, refused):
    mine = {name: shutil.copytree(path, tmp_path / name) for name, path in sources.items()}
    config = tiny_config(tmp_path / "run", max_steps=3, data_dir=str(tmp_path / "data"),
                         sources={name: str(path) for name, path in mine.items()})
    train.main([str(config)])
    file = mine["web"] / "part.jsonl"
    text = file.read_text()
    file.write_text("".join(text.splitlines(keepends=True)[:-1]))
    line = refused(call(train, config, "--max_steps=5"), tmp_path / "run", "--overwrite")
    assert set(re.findall(r"(\w+): \S+ there", line)) == {"data_sha256", "order_sha256",
                                                          "instances"}
    assert "web: part.jsonl has changed" in line
    (file.parent / "new.jsonl").write_text(text)
    said = changed_texts(tmp_path / "run", tmp_path / "data")
    assert said == ["web: new.jsonl is new (and 1 other file)"]
    (file.parent / "new.jsonl").unlink()
    file.write_text(text)
    os.utime(file, (1, 1))
    result = call(train, config, "--max_steps=5")
    assert result.returncode == 0 and "continues after step 3" in result.stdout


# ---- Checkpoints ---------------------------------------------------------------------------------
# How a step directory is read, and which damage is found: test_checkpoint.py.

def test_a_damaged_step_is_named_and_the_one_before_goes_on(copied, finished, call, refused):
    """The run saves the damaged step again, and needs no second repair.

    --verify=size does not see it: then it is loading that fails.
    """
    file = copied / "step000020/__0_0.distcp"
    flip(file)
    refused(call(train, f"--resume={copied}", "--max_steps=21", "--verify=size"), file.parent)
    result = call(train, f"--resume={copied}")
    assert result.returncode == 0 and f"warning: {file}" in result.stdout
    assert "continues after step 15" in result.stdout
    check_same_run(copied, finished)
    verify_step(copied / "step000020")
    result = call(train, f"--resume={copied}")
    assert "warning" not in result.stdout and "finished, at step 20" in result.stdout


def test_a_damaged_step_does_not_count_among_the_last_that_are_kept(copied, call):
    """keep_last=1 must not drop good steps for the sake of a damaged one of a higher number."""
    flip(copied / "step000020/__0_0.distcp")
    result = call(train, f"--resume={copied}", "--max_steps=17", "--keep_last=1")
    assert result.returncode == 0
    assert newest_step(copied)[0].name == "step000017"


def test_a_bomb_in_place_of_a_tensor_does_not_go_off(copied, tmp_path, call, refused):
    """Where the metadata says that the tensors lie, and with digests that fit; it is a live one."""
    marker, step = tmp_path / "boom", copied / "step000020"
    torch.save(Bomb(marker), step / "__0_0.distcp")
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (step / "__0_0.distcp").stat().st_size
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step, json.loads((step / "state.json").read_text()))
    refused(call(train, f"--resume={copied}", "--max_steps=22"), step)
    assert not marker.exists()
    torch.load(step / "__0_0.distcp", weights_only=False)
    assert marker.exists()


def test_a_full_disk_ends_in_one_line_and_harms_nothing(copied, tmp_path, call):
    """No file may grow beyond 300 KB: a step's tensors, 670 KB, do not fit, all else does."""
    before = content(copied / "step000020")
    words = [f"--resume={copied}", "--max_steps=24", "--save_every_steps=22"]
    process = forked(tmp_path / "log", train.main, *words, before=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (300_000, 300_000)))
    code = joined(process)
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert code == 1 and line.startswith("error: ")
    assert "step000022" in line
    assert saved_steps(copied) == [10, 15, 20] and content(copied / "step000020") == before
    result = call(train, *words)
    assert result.returncode == 0 and "continues after step 20" in result.stdout
    assert steps(copied) == list(range(1, 25)) and saved_steps(copied) == [20, 22, 24]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    log = Log(tmp_path, 0)
    log.file.close()
    log.file = open("/dev/full", "w")
    with pytest.raises(UserError, match="/dev/full.*No space left"):
        log.write("train", {"step": 1, "tokens": 2, "seconds": 3.0})


# ---- Mistakes of the user ------------------------------------------------------------------------
# What the loader of configs refuses: test_configs.py; sources that cannot be read: test_data.py.

def test_a_mistake_is_one_line_and_makes_no_run(tmp_path, tiny_config, call, refused):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "file").write_text("not a directory")
    run, nowhere = tmp_path / "run", tmp_path / "nowhere"
    file = tiny_config(run, data_dir=str(tmp_path / "data"))
    mistakes = {  # before any data is built
        "--lrr=1": "lr", "--n_heads=5": "d_model", "--batch_size=0": "batch_size",
        "--micro_batch_size=-1": "micro_batch_size", "--keep_last=-1": "keep_last",
        "--beta1=1": "beta1", "--lr=nan": "lr", f"--suite=domains,{nowhere}": nowhere,
        f"--suite=domains,{tmp_path / 'bad.jsonl'}": "bad.jsonl:2",
        f"--data_dir={tmp_path / 'file'}": tmp_path / "file"}
    for option, word in mistakes.items():
        refused(call(train, file, option), word)
    for words in ([], ["--lr=1"], ["--resume"]):
        refused(call(train, *words), "configs/tiny.py", "--resume=RUN")
    refused(call(train, nowhere), nowhere)
    refused(call(train, f"--resume={nowhere}"), nowhere)
    assert not (tmp_path / "data").exists() and not nowhere.exists()
    refused(call(train, file, "--sources=web=" + str(nowhere)), nowhere)
    refused(call(train, file, "--batch_size=100000"), "batch_size=100000")
    assert not run.exists() and not list(tmp_path.glob("data/*.tmp"))
    refused(call(train, file, f"--run_dir={tmp_path / 'file'}"), "run_dir", tmp_path / "file")


def test_in_a_process_of_its_own_a_mistake_is_one_line_too(tmp_path, tiny_config):
    """Nothing else is printed, and the exit code is 1."""
    process = forked(tmp_path / "log", train.main, tiny_config(tmp_path / "run"), "--lrr=1")
    code = joined(process)
    [line] = (tmp_path / "log").read_text().splitlines()
    assert code == 1 and line.startswith("error: ") and "lrr" in line


@pytest.mark.parametrize("size", [300, 600])
def test_a_vocabulary_that_is_not_the_tokenizers_is_named(tmp_path, tiny_config, call, refused,
                                                          size):
    """The flags that the line gives make it work."""
    run = tmp_path / "run"
    words = [tiny_config(run, tokenizer=f"bpe:{size}"), "--max_steps=1"]
    line = refused(call(train, *words), f"--vocab_size={size}", f"--eos_token_id={size - 1}",
                   f"--pad_token_id={size - 2}")
    assert ("--embedding_size=600" in line) == (size == 600)
    flags = re.findall(r"--\w+=\d+", line)
    assert call(train, *words, *flags).returncode == 0 and steps(run) == [1]
