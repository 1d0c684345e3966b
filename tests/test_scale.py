"""The scaling layer of train.py: several ranks against one, checkpoints across numbers of ranks,
recomputation, stops and faults, the log's figures, and the plan against torch's memory trackers."""

import json
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (HOUSE, TINY, Bomb, children_of, end_of, flip, rows, saved_steps, steps,
                      torchrun)
from conftest import seal

import eval as evaluation
import model as m
import train
from configs import load_config
from scaling.checkpoint import verify_step
from scaling.machine import PowerMeter, energy_line, flops_per_token
from scaling.plan import plan_memory
from scaling.log import Window
from scaling.sharding import CHECKPOINTED_BLOCKS, checkpoint_activations
from support.weights import load_model

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
FIFTY = dict(max_steps=50, decay_steps=50, save_every_steps=0, eval_every_steps=50,
             eval_batch_tokens=64)  # many forward passes for the ranks to share


def agree(run, reference, tolerance=2e-5):
    """Same batches at every step, losses within the tolerance, the same final evaluation."""
    one, other = rows(run), rows(reference)
    assert [row["step"] for row in one] == [row["step"] for row in other] != []
    assert [row["batch_hash"] for row in one] == [row["batch_hash"] for row in other]
    worst = max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True))
    assert worst < tolerance, worst
    assert [row["grad_norm"] for row in one] == pytest.approx(
        [row["grad_norm"] for row in other], rel=1e-3)  # AdamW alone would hide a wrong scale
    one, other = rows(run, "eval")[-1], rows(reference, "eval")[-1]
    assert one["step"] == other["step"]
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-4)
    for name, sums in other["sums"].items():
        assert {key: one["sums"][name][key] for key in ("documents", "tokens", "bytes")} == {
            key: sums[key] for key in ("documents", "tokens", "bytes")}
    [one], [other] = one["tasks"].values(), other["tasks"].values()
    assert one["questions"] == other["questions"] == 40
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-4)
    assert one["correct"] == pytest.approx(other["correct"], abs=1)  # a tie may break otherwise


@pytest.fixture(scope="module")
def fifty(tmp_path_factory, tiny_config, request_file):
    """A run of 50 steps by one process, with a task at its end: (its directory, its config)."""
    run = tmp_path_factory.mktemp("fifty") / "run"
    file = tiny_config(run, **FIFTY, suite=f"domains,{request_file}")
    assert train.main([str(file)]) == 0
    return run, file


# ---- Several ranks are one ----------------------------------------------------------------------

@pytest.mark.parametrize("ranks, options", [
    (2, ["--micro_batch_size=1"]),
    pytest.param(4, ["--reduce_every_micro_batch", "--micro_batch_size=1"],
                 marks=pytest.mark.slow)])
def test_any_number_of_ranks_computes_the_same(tmp_path, fifty, ranks, options, call):
    """50 steps in float32; with and without reducing the gradients of each micro-batch."""
    run = tmp_path / "run"
    code, stdout, stderr = end_of(torchrun(ranks, fifty[1], f"--run_dir={run}", *options))
    assert code == 0, stderr
    agree(run, fifty[0])
    assert {row["world_size"] for row in rows(run)} == {ranks}
    assert stdout.count("machine:") == 1 and f"{ranks} ranks" in stdout  # one of them speaks
    assert verify_step(run / "step000050")
    assert len(list(run.glob("step000050/*.distcp"))) == ranks  # each wrote its slices
    for name, tensor in load_model(run).state_dict().items():
        torch.testing.assert_close(tensor, load_model(fifty[0]).state_dict()[name],
                                   rtol=0, atol=2e-4)
    # the checkpoint that follows an evaluation, in which FSDP gathers the root, is whole too
    assert call(train, f"--resume={run}", "--max_steps=52").returncode == 0


def test_hybrid_sharding_on_two_nodes_of_two_computes_the_same(tmp_path, fifty):
    """Two launchers of two ranks each; a copy of the weights on each 'node'."""
    run, port = tmp_path / "run", random.Random(str(tmp_path)).randint(20000, 29000)
    options = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
               "--rdzv_id=hybrid"]
    nodes = [torchrun(2, fifty[1], f"--run_dir={run}", "--shard=hybrid", options=options)
             for _ in range(2)]
    for code, _, stderr in map(end_of, nodes):
        assert code == 0, stderr
    agree(run, fifty[0])


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, fifty, call):
    """Two ranks to step 20, SIGTERM to the launcher, one process to the end: as if never stopped.

    All ranks stop after the same step, which is saved, and the exit code says: run me again.
    """
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--max_steps=100000")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(steps(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = end_of(process)
    assert code != 0
    [last] = saved_steps(run)
    assert steps(run) == list(range(1, last + 1)), stderr
    assert f"stopped after step {last}, which is saved" in stdout
    ahead = max(50, last + 3)
    result = call(train, f"--resume={run}", f"--max_steps={ahead}")
    assert result.returncode == 0 and f"continues after step {last}" in result.stdout
    assert [row["batch_hash"] for row in rows(run)][:50] == [
        row["batch_hash"] for row in rows(fifty[0])]
    assert max(abs(a["loss"] - b["loss"]) for a, b in
               zip(rows(run), rows(fifty[0]), strict=False)) < 2e-5


def test_a_dead_rank_ends_the_others_and_torchrun_brings_the_run_back(tmp_path, fifty):
    """Rank 1 is killed; with --max-restarts the same command goes on from the last checkpoint."""
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--save_every_steps=5",
                       options=["--max-restarts=2"])
    deadline = time.monotonic() + 60
    while not saved_or_none(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    [victim] = [pid for pid in children_of(process.pid)
                if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    while victim in children_of(process.pid) or len(children_of(process.pid)) < 2:
        assert time.monotonic() < began + 30  # both are new
        time.sleep(0.05)
    code, stdout, stderr = end_of(process)
    assert code == 0, stderr
    assert "continues after step" in stdout and str(victim) in stderr
    agree(run, fifty[0])


def test_ranks_whose_launcher_was_killed_save_and_leave(tmp_path, fifty):
    """They would else go on, unseen, and hold the run."""
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--max_steps=100000",
                       "--save_every_steps=0")
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file() or len(steps(run)) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    ranks = children_of(process.pid)
    process.kill()
    while any(Path(f"/proc/{pid}").is_dir() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.communicate()
    assert not any(Path(f"/proc/{pid}").is_dir() for pid in ranks)
    assert saved_steps(run) == steps(run)[-1:]


def saved_or_none(run):
    return list(run.glob("step??????")) if run.is_dir() else []


RANK_SCRIPT = """
import os, sys
sys.path.insert(0, {house!r})
import train
{body}
from support.files import run_main
run_main(train.main)
"""


def run_differently(tmp_path, body, *words):
    """Two ranks of a script that may behave differently by RANK before train.main begins."""
    file = tmp_path / "script.py"
    file.write_text(RANK_SCRIPT.format(house=str(HOUSE), body=body))
    return end_of(torchrun(2, *words, file=file))


@pytest.mark.parametrize("body, words", [
    ('sys.argv += ["--lr=0.5"] * (os.environ["RANK"] == "1")',
     ["rank 1 (", "lr: 0.003 on rank 0, 0.5 on rank 1"]),
    pytest.param('import scaling.ranks; scaling.ranks.code_version = lambda: os.environ["RANK"]',
                 ["code: 0 on rank 0, 1 on rank 1"], marks=pytest.mark.slow)])
def test_ranks_that_disagree_are_told_apart(tmp_path, fifty, body, words):
    code, _, stderr = run_differently(tmp_path, body, fifty[1], f"--run_dir={tmp_path / 'run'}")
    assert code != 0 and not (tmp_path / "run").exists()
    for word in words:
        assert word in stderr
    assert stderr.count("error: ") == 1  # said once


@pytest.mark.slow
def test_a_directory_that_a_node_does_not_share_is_named(tmp_path, fifty):
    folders = {rank: str(tmp_path / f"node{rank}") for rank in "01"}
    for folder in folders.values():
        os.mkdir(folder)
    body = f'os.chdir({folders}[os.environ["RANK"]])'
    code, _, stderr = run_differently(tmp_path, body, fifty[1], "--run_dir=run")
    assert code != 0 and "run_dir=run is not the same directory" in stderr


def test_a_gradient_that_is_not_finite_on_one_rank_stops_all_before_the_weights(tmp_path, fifty):
    body = '''
def poisoned(model, batch, loss=train.pretraining_loss, calls=[0]):
    calls[0] += 1
    summed, extra = loss(model, batch)
    return summed * (float("nan") if calls[0] == 7 and os.environ["RANK"] == "1" else 1), extra
train.pretraining_loss = poisoned'''
    run = tmp_path / "run"
    code, _, stderr = run_differently(tmp_path, body, fifty[1], f"--run_dir={run}",
                                      "--save_every_steps=5")
    assert code != 0 and "step 7: loss nan" in stderr and stderr.count("error: ") == 1
    assert saved_steps(run) == [5] and steps(run) == list(range(1, 7))
    [row] = rows(run, "not_finite")
    assert row["step"] == 7 and not row["skipped"]
    assert {line.split(":")[0] for line in row["documents"]} == {
        f"sequence {i}" for i in range(8)}


def test_a_batch_that_the_ranks_do_not_divide_is_refused(tmp_path, fifty):
    code, _, stderr = end_of(torchrun(2, fifty[1], f"--run_dir={tmp_path / 'run'}",
                                      "--batch_size=7"))
    assert code != 0 and "batch_size=7 does not divide by 2 ranks" in stderr
    assert stderr.count("error: ") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_ranks_shares_of_an_evaluation_add_up(world_size, monkeypatch):
    """Every rank makes as many forward passes, and the sum is that of one process."""
    dice, passes = random.Random(3), []
    windows = [(row, row, 1) for row in ([dice.randrange(60)] * dice.randint(1, 16)
                                         for _ in range(50))]
    model = m.build_model(m.ModelConfig(**{key: TINY[key] for key in (
        "d_model", "n_layers", "n_heads", "mlp_hidden_size", "max_seq_len", "vocab_size",
        "embedding_size", "eos_token_id", "pad_token_id")}), 0)
    model.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        whole = evaluation.score_windows(model, windows, 40)
        passes.clear()
        shares, counts = [], []
        for rank in range(world_size):
            monkeypatch.setattr("support.scoring.rank", lambda rank=rank: rank)
            monkeypatch.setattr("support.scoring.world_size", lambda: world_size)
            shares.append(evaluation.score_windows(model, windows, 40))
            counts.append(len(passes))
            passes.clear()
    assert sum(shares) == pytest.approx(whole, rel=1e-12) and len(set(counts)) == 1


# ---- Recomputation ------------------------------------------------------------------------------

POLICIES = list(CHECKPOINTED_BLOCKS)


def gradients(policy):
    """{name: gradient} of a small model under a policy, and how many products it computed."""
    config = m.ModelConfig(d_model=32, n_layers=6, n_heads=2, mlp_hidden_size=48, max_seq_len=16,
                           vocab_size=64, embedding_size=64, eos_token_id=63, pad_token_id=62)
    model = m.build_model(config, 0)
    checkpoint_activations(model, policy)
    tokens = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with Counter() as counter:
        model(tokens, targets=tokens).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, counter.products


class Counter(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.products += function == torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputing_changes_no_gradient_and_repeats_what_it_says(policy):
    """Of a block's four products the last feeds only the sum: 3 are computed again, or with
    fine_grained the one after attention; every n-th of six blocks: 0, 2, 2, 3, 6, 6 of them."""
    plain, products = gradients("none")
    again, more = gradients(policy)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    blocks = {"none": 0, "one_in_four": 2, "one_in_three": 2, "one_in_two": 3, "fine_grained": 6,
              "whole_layer": 6}[policy]
    each = 1 if policy == "fine_grained" else 3
    assert blocks * each <= more - products <= blocks * (each + 1)
    assert (more == products) == (policy == "none")


# ---- A run goes on, or refuses ------------------------------------------------------------------

def test_a_new_schedule_is_said(copied, call):
    result = call(train, f"--resume={copied}", "--max_steps=22")
    assert result.returncode == 0
    assert "step 21 has the learning rate" in result.stdout and "max_steps=20" in result.stdout


def test_changes_are_accepted_on_request_and_named(copied, finished, call, refused):
    words = [f"--resume={copied}", "--max_steps=24", "--lr=0.001"]
    refused(call(train, *words), "lr: 0.003 there, 0.001 now", "--accept_changes")
    result = call(train, *words, "--accept_changes")
    assert result.returncode == 0
    assert "continues with changes: lr: 0.003 there, 0.001 now" in result.stdout
    assert steps(copied) == list(range(1, 25))
    assert json.loads((copied / "config.json").read_text())["lr"] == 0.001
    assert call(train, f"--resume={copied}", "--max_steps=25").returncode == 0


def test_an_anneal_goes_on_from_a_step_with_its_own_schedule(tmp_path, finished, tiny_config,
                                                             call, fifty):
    """start_from takes weights, moments and place in the data: with the same schedule nothing
    differs from the run itself; with another only the learning rate does."""
    start = finished / "step000015"
    same = tiny_config(tmp_path / "same", save_every_steps=5, keep_last=3)
    assert call(train, same, f"--start_from={start}").returncode == 0
    assert [row["loss"] for row in rows(tmp_path / "same")] == [
        row["loss"] for row in rows(finished)[15:]]
    assert steps(tmp_path / "same") == [16, 17, 18, 19, 20]
    assert rows(tmp_path / "same")[0]["tokens"] == 16 * 8 * 32
    anneal = tiny_config(tmp_path / "anneal", max_steps=20, lr=2.3e-5, min_lr=2.3e-8,
                         warmup_steps=15, decay_steps=20)
    assert call(train, anneal, f"--start_from={start}").returncode == 0
    logged = rows(tmp_path / "anneal")
    assert [row["batch_hash"] for row in logged] == [
        row["batch_hash"] for row in rows(finished)[15:]]
    assert logged[-1]["lr"] == 2.3e-8 and logged[0]["lr"] == pytest.approx(1.84046e-5)
    again = call(train, anneal, f"--start_from={start}")  # a restart finds the run, not its start
    assert "finished, at step 20" in again.stdout


def test_an_anneal_on_other_data_is_refused(tmp_path, finished, tiny_config, call, refused,
                                            sources):
    file = tiny_config(tmp_path / "run", sources={"web": sources["web"]}, seed=1)
    refused(call(train, file, f"--start_from={finished / 'step000015'}"), "its data has changed",
            "seed: 6198 there, 1 now")


def test_overwrite_never_deletes_what_it_needs(copied, call, refused, monkeypatch):
    words = [f"--resume={copied}", "--overwrite", "--lr=0.001"]
    refused(call(train, *words, f"--start_from={copied / 'step000015'}"), "would delete")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    refused(call(train, *words), "--max-restarts would delete")
    assert saved_steps(copied) == [10, 15, 20]


def test_changes_that_do_not_fit_leave_the_run_as_it_was(copied, call, refused):
    before = (copied / "config.json").read_bytes()
    refused(call(train, f"--resume={copied}", "--d_model=64", "--max_steps=22",
                 "--accept_changes"), "do not fit")
    assert (copied / "config.json").read_bytes() == before


def test_a_torn_log_does_not_stop_a_run(copied, call):
    """As a power cut leaves it: zeros in the middle, half a row at the end."""
    log = copied / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_bytes("".join(lines[:5]).encode() + b"\0" * 300 + b"\n"
                    + "".join(lines[6:]).encode() + b'{"kind": "tr')
    assert call(train, f"--resume={copied}", "--max_steps=22").returncode == 0
    assert steps(copied) == [1, 2, 3, 4, 5, *range(7, 23)]


def test_the_shipped_anneal_ends_where_olmo_7b_ended():
    """2.3e-5 at step 556,000, half at 556,500, 2.3e-8 at 557,000 (facts/recipe.md, 2.4)."""
    [config] = load_config([SEVEN_B, ANNEAL], train.TrainConfig, other=train.SCHEMAS)
    lrs = [train.lr_at_step(step, config) for step in (556_001, 556_500, 557_000)]
    assert lrs == pytest.approx([2.2977e-5, 1.15115e-5, 2.3e-8], rel=1e-5)
    assert config.max_steps == 557_000


def test_the_shipped_7b_uses_its_early_clip_and_its_horizon():
    [config] = load_config([SEVEN_B], train.TrainConfig, other=train.SCHEMAS)
    assert [train.clip_at_step(step, config) for step in (1, 2, 1001, 1002)] == [1, 10, 10, 1]
    assert train.lr_at_step(5000, config) == 3e-4 and train.lr_at_step(452_112, config) == 3e-5
    assert config.batch_size * 2048 * config.max_steps == pytest.approx(2.46e12, rel=1e-3)


def test_a_second_process_in_a_run_is_refused(tmp_path, tiny_config, start, call, refused):
    run = tmp_path / "run"
    file = tiny_config(run, max_steps=100_000)
    process = start("train.py", file)
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        refused(call(train, file), run, "another process works there")
    finally:
        process.kill()
        process.communicate()


def test_checkpoints_of_multiples_are_kept(tmp_path, tiny_config, call):
    run = tmp_path / "run"
    assert call(train, tiny_config(run, max_steps=13, save_every_steps=2, keep_last=1,
                                   keep_every=4)).returncode == 0
    assert saved_steps(run) == [4, 8, 12, 13]


def test_the_clock_saves_and_ends_a_run(tmp_path, tiny_config, call):
    """After 1.2 s it is stopped with the alarm's exit code; by then it has saved every 0.3 s."""
    run = tmp_path / "run"
    words = [tiny_config(run, max_steps=100_000, save_every_steps=0, keep_last=0,
                         eval_every_steps=0, save_every_minutes=0.005), "--stop_after_minutes=0.02"]
    result = call(train, *words)
    assert result.returncode == 128 + signal.SIGALRM
    saved = saved_steps(run)
    assert f"stopped after step {saved[-1]}, which is saved" in result.stdout
    assert 3 <= len(saved) <= 6 and steps(run)[-1] == saved[-1]


def test_damage_that_keeps_the_size_passes_verify_size_only(copied, call):
    file = next((copied / "step000020").glob("*.distcp"))
    flip(file)
    assert f"warning: {file}: damaged" in call(train, f"--resume={copied}").stdout
    seal_size = call(train, f"--resume={copied}", "--max_steps=21", "--verify=size")
    assert "warning" not in seal_size.stdout


def test_a_bomb_in_place_of_a_tensor_does_not_go_off(copied, tmp_path, call, refused):
    """Where the metadata says that the tensors lie, and with digests that fit; it is a real one."""
    marker, step = tmp_path / "boom", copied / "step000020"
    torch.save(Bomb(marker), step / "__0_0.distcp")
    metadata = pickle.loads((step / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (step / "__0_0.distcp").stat().st_size
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step)
    refused(call(train, f"--resume={copied}", "--max_steps=22"), step, "cannot be read")
    assert not marker.exists()
    torch.load(step / "__0_0.distcp", weights_only=False)
    assert marker.exists()


def test_byte_entries_are_refused(copied, call, refused):
    """DCP unpickles what is no tensor without limits; a checkpoint that has such is refused."""
    step = copied / "step000020"
    metadata = pickle.loads((step / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(step)
    refused(call(train, f"--resume={copied}", "--max_steps=22"), name, "pickled bytes")


# ---- What goes wrong in a step ------------------------------------------------------------------

def poison(monkeypatch, at):
    """The n-th forward's loss is infinite."""
    calls, loss = [0], train.pretraining_loss

    def poisoned(model, batch):
        calls[0] += 1
        summed, count = loss(model, batch)
        return summed * (math.inf if calls[0] == at else 1), count
    monkeypatch.setattr(train, "pretraining_loss", poisoned)


def test_a_skipped_step_leaves_the_weights_and_the_order_alone(tmp_path, tiny_config, call,
                                                               monkeypatch, fifty):
    poison(monkeypatch, 7)
    run = tmp_path / "run"
    result = call(train, tiny_config(run, **FIFTY | {"max_steps": 9}, not_finite="skip"))
    assert result.returncode == 0
    assert steps(run) == [1, 2, 3, 4, 5, 6, 8, 9]
    [row] = rows(run, "not_finite")
    assert row["step"] == 7 and row["skipped"] and "loss inf" in row["error"]
    reference = {row["step"]: row for row in rows(fifty[0])}
    for row in rows(run):
        assert row["batch_hash"] == reference[row["step"]]["batch_hash"]
    assert [row["loss"] for row in rows(run)][:6] == [reference[s]["loss"] for s in range(1, 7)]
    assert "loss" in rows(run)[-1] and math.isfinite(rows(run)[-1]["loss"])


def test_the_documents_of_a_bad_step_are_those_of_trace(tmp_path, tiny_config, call, monkeypatch):
    import data
    poison(monkeypatch, 3)
    run = tmp_path / "run"
    result = call(train, tiny_config(run, max_steps=9))
    assert result.returncode == 1 and "names its documents" in result.stderr
    [row] = rows(run, "not_finite")
    traced = call(data, "trace", run, "--step=3").stdout
    for line in row["documents"]:
        name = re.fullmatch(r"sequence \d+: \w+/(\w+) \S+:\d+", line)[1]
        assert f": {name}  (" in traced


# ---- The log ------------------------------------------------------------------------------------

def test_flops_per_token_are_those_of_the_facts():
    """facts/perf.md, 3: 1B 7.87e9, 7B 4.33e10."""
    for name, wanted in (("olmo_1b", 7.87e9), ("olmo_7b", 4.33e10)):
        [config] = load_config([str(HOUSE / f"configs/{name}.py")], m.ModelConfig,
                               other=train.SCHEMAS)
        assert flops_per_token(config) == pytest.approx(wanted, rel=2e-3)


def test_rates_are_of_the_steps_since_the_last_row():
    recent = Window(steps=8, clipped=2, tokens=4096, seconds=2.0)
    assert recent.rates(1e9, torch.device("cpu")) == {
        "clipping_rate": 0.25, "tokens_per_second": 2048.0,
        "tokens_per_second_per_device": 2048.0, "mfu": None}


def test_mfu_is_the_share_of_the_gpus_peak(monkeypatch):
    """1,000 tokens/s at 4.33e10 FLOP a token of 989 TFLOP/s: 4.38 %."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recent = Window(steps=1, clipped=0, tokens=1000, seconds=1.0)
    assert recent.rates(4.33e10, torch.device("cuda"))["mfu"] == 0.0438
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert recent.rates(4.33e10, torch.device("cuda"))["mfu"] is None


def test_energy_is_the_papers_arithmetic():
    """104 MWh x 1.1 x 0.610 = 69.78 t (facts/recipe.md, 7)."""
    line = energy_line(104_000, True, train.TrainConfig())
    assert line.endswith("= 6.98e+04 kg CO2eq") and "metered" in line
    assert "unknown" in energy_line(0.0, False, train.TrainConfig())


def test_stated_watts_count_by_the_clock(tmp_path, tiny_config, call):
    run = tmp_path / "run"
    words = [tiny_config(run, watts=3.6e6, max_steps=30), "--eval_every_steps=0"]
    assert "energy: " in call(train, *words).stdout
    for row in rows(run):  # 3.6 MW are a kWh a second
        assert row["kwh"] == pytest.approx(row["seconds"], abs=0.2)
    [end] = rows(run, "end")
    assert end["kg_co2"] == pytest.approx(end["kwh"] * 1.1 * 0.610)
    call(train, f"--resume={run}", "--max_steps=40")  # it goes on from there
    assert rows(run)[30]["kwh"] > rows(run)[29]["kwh"]


def test_a_meter_adds_up_its_power(monkeypatch):
    """At 3.6 MW a second is a kWh; the meter of the GPU goes before the stated watts."""
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 3.6e9)
    monkeypatch.setattr(time, "sleep", lambda s, sleep=time.sleep: sleep(0.01))
    meter = PowerMeter(torch.device("cuda"), watts=1.0)
    began = time.monotonic()
    while time.monotonic() < began + 0.5:
        pass
    assert meter.metered and meter.kwh() == pytest.approx(time.monotonic() - began, abs=0.1)


def test_tensorboard_gets_the_same_numbers(tmp_path, tiny_config, call):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path / "run"
    assert call(train, tiny_config(run), "--tensorboard").returncode == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows(run)]
    assert {"train/lr", "train/grad_norm", "eval/web"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_one_line_says_so(tmp_path, tiny_config, call, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(call(train, tiny_config(tmp_path / "run"), "--tensorboard"), "pip install tensorboard")


# ---- The plan -----------------------------------------------------------------------------------

TRACKER = """
import json, sys
from dataclasses import replace
sys.path.insert(0, {house!r})
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
import model as m, train
from configs import load_config
from scaling import sharding
name, ranks, rows, changes = json.loads(sys.argv[1])
model_config, config = load_config([name], m.ModelConfig, train.TrainConfig,
                                   other=train.SCHEMAS)
config = replace(config, **changes)
if ranks > 1:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = sharding.build_mesh("all", torch.device("cpu"))
with FakeTensorMode():
    with torch.device("meta" if ranks > 1 else "cpu"):
        model = m.OLMo(model_config)
    model.to_empty = model.to_empty if ranks > 1 else lambda device: model
    sharding.build_mesh = lambda *_: mesh
    sharding.shard_model(model, config, torch.device("cpu"), torch.bfloat16, False)
    optimizer = train.build_optimizer(model, config)
    tracker = FSDPMemTracker(model, optimizer) if ranks > 1 else MemTracker()
    ranks > 1 or tracker.track_external(model, optimizer)
    tokens = torch.zeros(rows, model_config.max_seq_len, dtype=torch.long)
    with tracker:
        for last in (False, True)[rows * ranks >= config.batch_size:]:
            if ranks > 1:
                model.set_requires_gradient_sync(last or config.reduce_every_micro_batch)
            model(tokens, targets=tokens).sum().backward()
            tracker.reset_mod_stats()
    [peak] = tracker.get_tracker_snapshot("peak").values()
    print("PEAK", peak["Total"])
"""


def tracked_peak(tmp_path, *case):
    """Bytes at the peak by torch's tracker, with fake tensors: nothing is allocated or computed."""
    file = tmp_path / "tracker.py"
    file.write_text(TRACKER.format(house=str(HOUSE)))
    done = subprocess.run([sys.executable, file, json.dumps(case)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("PEAK")[1])


SEVEN_B, ONE_B, ANNEAL = (str(HOUSE / f"configs/olmo_{name}.py")
                          for name in ("7b", "1b", "7b_anneal"))
PLANS = [(SEVEN_B, 256, 2, {"reduce_every_micro_batch": False, "batch_size": 512})]
SLOW_PLANS = [
    (SEVEN_B, 8, 2, {}), (SEVEN_B, 256, 2, {}),
    *((SEVEN_B, ranks, 2, {"activation_checkpointing": policy}) for ranks in (1, 8, 256)
      for policy in ("none", "one_in_two", "whole_layer")),
    (SEVEN_B, 8, 4, {"activation_checkpointing": "whole_layer"}),
    (SEVEN_B, 8, 2, {"reduce_every_micro_batch": False}), (SEVEN_B, 1, 2, {}),
    (ONE_B, 8, 8, {}), (ONE_B, 1, 8, {}), (ONE_B, 64, 4, {"reduce_every_micro_batch": True})]


@pytest.mark.parametrize("case", PLANS + [pytest.param(case, marks=pytest.mark.slow)
                                          for case in SLOW_PLANS])
def test_the_plan_is_within_15_percent_of_torchs_tracker(tmp_path, case):
    name, ranks, rows_a_pass, changes = case
    model_config, config = load_config([name], m.ModelConfig, train.TrainConfig,
                                       other=train.SCHEMAS)
    parts = plan_memory(model_config, replace(config, **changes), ranks, rows_a_pass)
    ratio = sum(parts.values()) / tracked_peak(tmp_path, *case)
    assert 0.85 < ratio < 1.15, ratio


def test_the_plan_states_its_figures(call):
    """2.46e12 tokens x 4.33e10 FLOP / (256 x 989e12 x 0.4) = 12.2 days; 12 bytes a parameter."""
    result = call(train, SEVEN_B, "--plan", "--gpus=256", "--gpu=h100")
    assert result.returncode == 0
    for words in ("6,888,095,744 parameters", "2,460 G tokens", "40% MFU", "12.2 days",
                  "240 or 270 GPUs", "82.7 GB per checkpoint",
                  "it fits"):
        assert words in result.stdout
    kwh = 256 * 0.7 * 12.175 * 24
    [line] = [line for line in result.stdout.splitlines() if "kWh" in line]
    assert float(line.split()[0].replace(",", "")) == pytest.approx(kwh, rel=1e-3)
    assert float(line.split()[-3]) == pytest.approx(kwh * 1.1 * 0.61 / 1000, rel=1e-2)


@pytest.mark.parametrize("words, advice", [
    (["--gpus=8", "--gpu=a100-40", "--activation_checkpointing=none", "--micro_batch_size=3"],
     "does not fit; --activation_checkpointing=one_in_two --micro_batch_size=3 would"),
    (["--gpus=1", "--gpu=h100"], "it would on 2 GPUs"), (["--gpus=8", "--gpu=h100"], "it fits")])
def test_the_plan_advises(call, words, advice):
    result = call(train, SEVEN_B, "--plan", *words)
    assert result.returncode == 0 and advice in result.stdout, result.stdout


def test_the_plan_of_the_anneal_is_of_its_1000_steps(call):
    result = call(train, SEVEN_B, ANNEAL, "--plan", "--gpus=216", "--gpu=a100")
    assert "1,000 steps" in result.stdout and "4.424 G tokens" in result.stdout
    assert "for the 2 that are kept" in result.stdout


def test_the_plan_of_a_run_needs_no_data_and_makes_no_directory(tmp_path, tiny_config, call):
    file = tiny_config(tmp_path / "run", sources={"gone": "nowhere"})
    assert "parameters" in call(train, file, "--plan").stdout
    assert not (tmp_path / "run").exists()


def test_a_wrong_plan_is_one_line(call, refused):
    refused(call(train, SEVEN_B, "--plan", "--gpus=0"), "gpus=0")
    refused(call(train, SEVEN_B, "--plan", "--gpu=b17"), "gpu=b17", "h100")
