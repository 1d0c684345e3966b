"""The scaling layer of train.py: several ranks against one, checkpoints across numbers of ranks,
recomputation, faults, the log's figures, and the plan against torch's memory trackers."""

import math
import multiprocessing.util
import os
import re
import signal
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import conftest
import pytest
import torch
import torch.distributed as dist
from conftest import (ROOT, TINY, children_of, columns, end_of, forked, forked_ranks, joined,
                      refusal, rows, saved_steps, step_count, steps, torchrun, wait_until)
from torch.utils._python_dispatch import TorchDispatchMode

import adapt
import data
import model as m
import train
from configs import load_config
from scaling import checkpoint, sharding
from scaling.checkpoint import verify_step
from scaling.log import Window
from scaling.machine import GPUS, PowerMeter, energy_line, flops_per_token, peak_flops
from scaling.plan import plan_memory
from scaling.ranks import (answer_all_ranks, code_version, launched, rank, setup_distributed,
                           world_size)
from support.weights import load_model

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
FIFTY = dict(max_steps=50, decay_steps=50, save_every_steps=0, eval_every_steps=50,
             eval_batch_tokens=64)  # many forward passes for the ranks to share
SMALL = m.ModelConfig(**{key: TINY[key] for key in TINY.keys() & m.ModelConfig.__annotations__})
MAIN_LINE = ("model", "data", "train", "eval", "adapt")
SEVEN_B, ONE_B, ANNEAL = (str(ROOT / f"configs/olmo_{name}.py")
                          for name in ("7b", "1b", "7b_anneal"))


# ---- Several ranks are one -----------------------------------------------------------------------

@pytest.fixture(scope="module")
def fifty(tmp_path_factory, tiny_config, request_file):
    """A run of 50 steps by one process, with a task at its end: (its directory, its config)."""
    run = tmp_path_factory.mktemp("fifty") / "run"
    file = tiny_config(run, **FIFTY, suite=f"domains,{request_file}")
    assert train.main([str(file)]) == 0
    return run, file


def check_agreement(run, reference):
    """Same batches at every step, losses but for rounding, the same final evaluation."""
    assert columns(run, "step", "batch_hash") == columns(reference, "step", "batch_hash") != []
    for key, tolerance in (("loss", dict(abs=2e-5)),
                           ("grad_norm", dict(rel=1e-3))):  # AdamW alone would hide a wrong scale
        one, other = ([row[key] for row in rows(path)] for path in (run, reference))
        assert one == pytest.approx(other, **tolerance)
    one, other = rows(run, "eval")[-1], rows(reference, "eval")[-1]
    assert one["step"] == other["step"]
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-4)
    for name, sums in other["sums"].items():
        for key in ("documents", "tokens", "bytes"):
            assert one["sums"][name][key] == sums[key]
    [one], [other] = one["tasks"].values(), other["tasks"].values()
    assert one["questions"] == other["questions"] == 40
    assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], abs=1e-4)
    assert one["correct"] == pytest.approx(other["correct"], abs=1)  # rounding may break a tie


@pytest.mark.parametrize("ranks, per_node, shard", [(1, 1, "all"), (2, 2, "all"),
                                                    (4, 2, "hybrid")])
def test_a_gradient_is_the_sum_over_the_ranks(tmp_path, ranks, per_node, shard):
    """A mean over the ranks would be `ranks` times smaller. At lr 1 of SGD the update is it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 500, (8, 32), generator=generator)
    loss_mask = torch.rand(8, 32, generator=generator) < torch.linspace(0.1, 0.9, 8)[:, None]
    batch = {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}

    def one_step(argv):
        device = setup_distributed("cpu")
        config = train.TrainConfig(shard=shard)
        model, _ = train.build_training(SMALL, config, device, torch.float32, False)
        m.init_weights(model, 0, sharding.own_part)
        own = {key: tensor[rank()::world_size()] for key, tensor in batch.items()}
        optimizer = torch.optim.SGD(model.parameters())
        train.train_step(model, optimizer, train.cut_batch(own, 1, device), train.pretraining_loss,
                         1.0, math.inf)
        weights = {name: sharding.full_tensor(p) for name, p in model.named_parameters()}
        if rank() == 0:
            torch.save(weights, tmp_path / "weights")
        if ranks > 1:
            dist.destroy_process_group()
    codes, printed = forked_ranks(ranks, tmp_path / "log", one_step, per_node=per_node)
    assert codes == [0] * ranks, printed

    model = m.build_model(SMALL, 0)
    losses = model(tokens, targets=batch["targets"])[loss_mask]
    losses.mean().backward()
    for name, weight in torch.load(tmp_path / "weights").items():
        parameter = model.get_parameter(name)
        torch.testing.assert_close(weight, parameter - parameter.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks, per_node, options", [
    (2, 2, ["--micro_batch_size=1"]),
    (4, 2, ["--shard=hybrid"]),  # a copy of the weights on each of two "nodes"
    pytest.param(4, 4, ["--reduce_every_micro_batch", "--micro_batch_size=1"],
                 marks=pytest.mark.slow)])
def test_any_number_of_ranks_computes_the_same(tmp_path, fifty, ranks, per_node, options, call):
    """50 steps in float32; with and without reducing the gradients of each micro-batch."""
    run = tmp_path / "run"
    codes, printed = forked_ranks(ranks, tmp_path / "log", train.main, fifty[1],
                                  f"--run_dir={run}", *options, per_node=per_node)
    assert codes == [0] * ranks, printed
    check_agreement(run, fifty[0])
    assert {row["world_size"] for row in rows(run)} == {ranks}
    assert printed.count("machine:") == 1 and f"{ranks} ranks" in printed  # one of them speaks
    assert verify_step(run / "step000050")
    # each rank wrote its slices, and with copies one node did
    assert len(list(run.glob("step000050/*.distcp"))) >= min(ranks, per_node)
    reference = load_model(fifty[0]).state_dict()
    for name, tensor in load_model(run).state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=0, atol=2e-4)
    # the checkpoint that follows an evaluation, in which FSDP gathers the root, is complete too
    assert call(train, f"--resume={run}", "--max_steps=52").returncode == 0


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, fifty, call):
    """Two ranks, SIGTERM to their launcher, one process to the end: as if never stopped.

    All ranks stop after the same step, which is saved, and the exit code says: run me again.
    """
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--max_steps=100000")
    wait_until(lambda: step_count(run) >= 3, process)
    process.send_signal(signal.SIGTERM)
    code, stdout, stderr = end_of(process)
    assert code != 0
    [last] = saved_steps(run)
    assert steps(run) == list(range(1, last + 1)), stderr
    assert f"stopped after step {last}" in stdout
    result = call(train, f"--resume={run}", f"--max_steps={max(50, last + 3)}")
    assert result.returncode == 0 and f"continues after step {last}" in result.stdout
    assert columns(run, "batch_hash")[:50] == columns(fifty[0], "batch_hash")
    losses = zip(columns(run, "loss"), columns(fifty[0], "loss"), strict=False)
    assert max(abs(one - other) for [one], [other] in losses) < 2e-5


def test_a_dead_rank_ends_the_others_and_torchrun_brings_the_run_back(tmp_path, fifty):
    """Rank 1 is killed; with --max-restarts the same command goes on from the last checkpoint."""
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--save_every_steps=5",
                       options=["--max-restarts=2"])
    wait_until(lambda: list(run.glob("step??????")), process)
    [victim] = [pid for pid in children_of(process.pid)
                if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: victim not in children_of(process.pid)
               and len(children_of(process.pid)) == 2, process)  # both are new
    code, stdout, stderr = end_of(process)
    assert code == 0, stderr
    assert "continues after step" in stdout and str(victim) in stderr
    check_agreement(run, fifty[0])


def test_ranks_whose_launcher_was_killed_save_and_leave(tmp_path, fifty):
    """If not, they would go on, unseen, and hold the run."""
    run = tmp_path / "run"
    process = torchrun(2, fifty[1], f"--run_dir={run}", "--max_steps=100000",
                       "--save_every_steps=0")
    wait_until(lambda: step_count(run) >= 3, process)
    ranks = children_of(process.pid)
    process.kill()
    wait_until(lambda: not any(Path(f"/proc/{pid}").is_dir() for pid in ranks))
    process.communicate()
    assert saved_steps(run) == steps(run)[-1:]


def test_ranks_that_have_finished_leave_without_pythons_clearing_up(tmp_path, fifty):
    """A thread of gloo may still hold a tensor: torch would abort the process with SIGABRT."""
    marker = tmp_path / "cleared"
    codes, printed = forked_ranks(
        2, tmp_path / "log", train.main, fifty[1], "--max_steps=1", f"--run_dir={tmp_path / 'run'}",
        before=lambda: multiprocessing.util.Finalize(None, marker.touch, exitpriority=1))
    assert codes == [0, 0] and not marker.exists(), printed


def on_rank_1(change):
    return lambda: change() if os.environ["RANK"] == "1" else None


def other_code():
    import scaling.ranks
    scaling.ranks.code_version = lambda: "other"


@pytest.mark.parametrize("before, option, words", [
    (on_rank_1(lambda: sys.argv.append("--lr=0.5")), "--lr=0.003",
     ["rank 1 (", "lr: 0.003 on rank 0, 0.5 on rank 1"]),
    (on_rank_1(other_code), "--lr=0.003", ["code: ", "other on rank 1"]),
    (on_rank_1(lambda: os.chdir("elsewhere")), "--run_dir=mine", ["run_dir=mine"]),
    (lambda: None, "--batch_size=7", ["batch_size=7", "2 ranks"])])
def test_ranks_that_cannot_work_together_say_so_once(tmp_path, fifty, monkeypatch, before, option,
                                                     words):
    """Another setting, other code, a directory that is not shared, a batch that is not divided."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    codes, printed = forked_ranks(2, tmp_path / "log", train.main, fifty[1], "--run_dir=run",
                                  option, before=before)
    assert 1 in codes and 0 not in codes and printed.count("error: ") == 1
    for word in words:
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_the_hash_of_the_code_leaves_out_the_configs(tmp_path, monkeypatch):
    """A user's config in the root or in configs/ is no code of the project; its own files are."""
    names = ["configs/__init__.py", *(f"{name}.py" for name in MAIN_LINE),
             "corpus/rules.py", "scaling/ranks.py", "support/report.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    monkeypatch.setattr("scaling.code_files.ROOT", tmp_path)
    version = code_version()
    for users in ("mine.py", "configs/mine.py", "configs/tiny.py"):
        (tmp_path / users).write_text("lr = 1.0\n")
    assert code_version() == version
    for name in names:
        (tmp_path / name).write_text("x = 2\n")
        assert code_version() != version
        (tmp_path / name).write_text("x = 1\n")
    assert code_version() == version


TORCHRUN_SETS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR",
                 "MASTER_PORT", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def environment(monkeypatch):
    """Sets these of torchrun's variables, and no others."""
    def change(text):
        for name in TORCHRUN_SETS:
            monkeypatch.delenv(name, raising=False)
        for word in text.split():
            monkeypatch.setenv(*word.split("="))
    return change


@pytest.mark.parametrize("text", [
    "RANK= WORLD_SIZE= LOCAL_RANK= MASTER_PORT=", "MASTER_ADDR=node1 MASTER_PORT=29500",
    "LOCAL_WORLD_SIZE=8", "SLURM_PROCID=3 SLURM_NTASKS=8", "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"])
def test_what_tells_of_no_rank_is_one_process(environment, text):
    environment(text)
    assert launched()[:3] == (0, 0, 1)
    assert setup_distributed("cpu") == torch.device("cpu") and world_size() == 1


@pytest.mark.parametrize("text, words", [
    ("WORLD_SIZE=8", ["WORLD_SIZE=8", "RANK", "LOCAL_RANK", "MASTER_PORT", "env -u WORLD_SIZE "]),
    ("RANK=3 WORLD_SIZE=", ["RANK=3", "WORLD_SIZE", "env -u RANK "]),
    ("LOCAL_RANK=0", ["LOCAL_RANK=0", "WORLD_SIZE", "env -u LOCAL_RANK "]),
    ("WORLD_SIZE=1", ["WORLD_SIZE=1", "RANK", "env -u WORLD_SIZE "]),
    ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=", ["WORLD_SIZE=2", "MASTER_ADDR"]),
    ("RANK=0 LOCAL_RANK=a WORLD_SIZE=1", ["LOCAL_RANK=a", "number"]),
    ("RANK=-1 LOCAL_RANK=0 WORLD_SIZE=1", ["RANK=-1", "number"]),
    ("RANK=2 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", ["RANK=2", "WORLD_SIZE=2"])])
def test_half_of_what_torchrun_sets_is_one_line(tmp_path, tiny_config, call, refused, environment,
                                                text, words):
    """Not a traceback, and not silence: a process that takes itself for rank 3 prints nothing."""
    file = tiny_config(tmp_path / "run")
    for mode in ("--plan", "--max_steps=1"):
        environment(text)
        refused(call(train, file, mode), *words)
    assert not (tmp_path / "run").exists()


def test_answers_are_written_by_one_process(call, refused, environment):
    environment("RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1")
    for verb in ("show", "chat", "generate"):
        refused(call(adapt, verb, "nowhere"), verb, "torchrun")


def test_nodes_with_different_numbers_of_ranks_cannot_be_hybrid(tmp_path, fifty):
    codes, printed = forked_ranks(3, tmp_path / "log", train.main, fifty[1], "--shard=hybrid",
                                  f"--run_dir={tmp_path / 'run'}", "--batch_size=9", per_node=2)
    assert 0 not in codes and "error: shard=hybrid: 3 ranks" in printed
    assert "Traceback" not in printed


def test_a_port_that_another_process_holds_is_one_line(environment):
    with socket.create_server(("localhost", 0)) as other:
        port = other.getsockname()[1]
        environment(f"RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT={port}")
        assert f"localhost:{port}" in refusal(setup_distributed, "cpu")


def test_rank_0_says_for_whom_it_waits(capsys, monkeypatch):
    monkeypatch.setattr("scaling.ranks.WAIT_IN_SILENCE_S", 0)
    line = refusal(answer_all_ranks, dist.HashStore(), "attempt", 3, patience_s=0.05)
    assert "[1, 2]" in line and "[1, 2]" in capsys.readouterr().err


def test_ranks_are_forked_where_no_other_thread_looks_up_names(tmp_path, monkeypatch):
    """The thread of a store does, under a lock that the fork would inherit held."""
    def noted(*arguments, **options):
        names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
        threads.extend(name for name in names if "store" in name)
        return forked(*arguments, **options)

    def meet(argv):
        setup_distributed("cpu")
        dist.barrier()
        dist.destroy_process_group()
    threads = []
    monkeypatch.setattr(conftest, "forked", noted)
    codes, printed = forked_ranks(3, tmp_path / "log", meet)
    assert codes == [0, 0, 0], printed
    assert not threads


def test_ranks_and_commands_that_hang_say_where_they_stand(tmp_path, monkeypatch, start):
    def wait_here(argv):
        time.sleep(3600)
    (tmp_path / "numpy.py").write_text("import time\nopen('here', 'w')\ntime.sleep(3600)\n")
    with start("data.py", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}) as process:
        wait_until((tmp_path / "here").exists, process)
        monkeypatch.setattr(conftest, "PATIENCE_S", 2)
        with pytest.raises(pytest.fail.Exception, match='numpy.py", line 3'):
            end_of(process)
    with pytest.raises(pytest.fail.Exception, match="not within 2 s") as failed:
        forked_ranks(2, tmp_path / "log", wait_here)
    assert (tmp_path / "log").read_text().count("in wait_here") == 2
    assert (tmp_path / "log").read_text() in str(failed.value)


def no_compiler():
    import scaling.machine
    scaling.machine.can_compile = lambda: os.environ["RANK"] == "0"


def test_no_rank_compiles_where_one_cannot(tmp_path, fifty):
    codes, printed = forked_ranks(2, tmp_path / "log", train.main, fifty[1], "--max_steps=1",
                                  f"--run_dir={tmp_path / 'run'}", "--compile=auto",
                                  before=no_compiler)
    assert codes == [0, 0] and "not compiled (no C++ compiler" in printed, printed


# ---- A step that goes wrong ----------------------------------------------------------------------

def poisoned(at, factor):
    """pretraining_loss, but for its n-th call on rank 1 or in a single process."""
    calls, loss = [], train.pretraining_loss

    def loss_fn(model, batch):
        calls.append(1)
        summed, extra = loss(model, batch)
        is_bad = len(calls) == at and os.environ.get("RANK", "1") == "1"
        return summed * (factor if is_bad else 1), extra
    return loss_fn


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_weights(tmp_path, fifty,
                                                                            monkeypatch):
    monkeypatch.setattr(train, "pretraining_loss", poisoned(7, math.nan))
    run = tmp_path / "run"
    codes, printed = forked_ranks(2, tmp_path / "log", train.main, fifty[1], f"--run_dir={run}",
                                  "--save_every_steps=5")
    assert 0 not in codes and "step 7: loss nan" in printed and printed.count("error: ") == 1
    assert saved_steps(run) == [5] and steps(run) == list(range(1, 7))
    [row] = rows(run, "not_finite")
    assert row["step"] == 7 and not row["skipped"]
    assert {line.split(":")[0] for line in row["documents"]} == {f"sequence {i}" for i in range(8)}


def test_a_skipped_step_leaves_the_weights_and_the_order_alone(tmp_path, tiny_config, call,
                                                               monkeypatch, fifty):
    monkeypatch.setattr(train, "pretraining_loss", poisoned(7, math.inf))
    run = tmp_path / "run"
    result = call(train, tiny_config(run, **FIFTY | {"max_steps": 9}, not_finite="skip"))
    assert result.returncode == 0
    assert steps(run) == [1, 2, 3, 4, 5, 6, 8, 9]
    [row] = rows(run, "not_finite")
    assert row["step"] == 7 and row["skipped"] and "loss inf" in row["error"]
    hashes, losses = columns(fifty[0], "batch_hash"), columns(fifty[0], "loss")
    assert columns(run, "batch_hash") == hashes[:6] + hashes[7:9]
    assert columns(run, "loss")[:6] == losses[:6] and math.isfinite(rows(run)[-1]["loss"])


def test_the_documents_of_a_bad_step_are_those_of_trace(tmp_path, tiny_config, call, monkeypatch):
    monkeypatch.setattr(train, "pretraining_loss", poisoned(3, math.inf))
    run = tmp_path / "run"
    result = call(train, tiny_config(run, max_steps=9))
    assert result.returncode == 1 and "step 3" in result.stderr
    [row] = rows(run, "not_finite")
    traced = call(data, "trace", run, "--step=3").stdout
    for line in row["documents"]:
        name = re.fullmatch(r"sequence \d+: \w+/(\w+) \S+:\d+", line)[1]
        assert f": {name}  (" in traced


# ---- Recomputation -------------------------------------------------------------------------------

class Counter(TorchDispatchMode):
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.products += function == torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


def gradients(policy):
    """{name: gradient} of a small model under a policy, and how many products it computed."""
    model = m.build_model(replace(SMALL, n_layers=6), 0)
    sharding.checkpoint_activations(model, policy)
    tokens = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    with Counter() as counter:
        model(tokens, targets=tokens).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}, counter.products


@pytest.mark.parametrize("policy, blocks", {
    "none": 0, "one_in_four": 2, "one_in_three": 2, "one_in_two": 3, "fine_grained": 6,
    "whole_layer": 6}.items())
def test_recomputing_changes_no_gradient_and_repeats_what_it_says(policy, blocks):
    """So many of six blocks. The last of a block's four products feeds only the sum: 3 are computed
    again, or with fine_grained the one after attention."""
    plain, products = gradients("none")
    again, more = gradients(policy)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    each = 1 if policy == "fine_grained" else 3
    assert blocks * each <= more - products <= blocks * (each + 1)
    assert (more == products) == (policy == "none")
    assert policy in sharding.CHECKPOINTED_BLOCKS and len(sharding.CHECKPOINTED_BLOCKS) == 6


# ---- The log -------------------------------------------------------------------------------------

def test_flops_per_token_of_the_released_models():
    """6 per weight of the products and 12 L D T for attention: 7.87e9 (1B) and 4.33e10 (7B)."""
    for file, expected in ((ONE_B, 7.87e9), (SEVEN_B, 4.33e10)):
        [config] = load_config([file], m.ModelConfig, other=train.SCHEMAS)
        assert flops_per_token(config) == pytest.approx(expected, rel=2e-3)


def test_rates_are_of_the_steps_since_the_last_row(monkeypatch):
    """MFU, for a GPU that is known: 1,000 tokens/s at 4.33e10 FLOP a token of 989 TFLOP/s."""
    window = Window(steps=8, clipped=2, tokens=2000, seconds=2.0)
    rates = {"clipping_rate": 0.25, "tokens_per_second": 1000.0,
             "tokens_per_second_per_device": 1000.0, "mfu": None}
    assert window.rates(4.33e10, torch.device("cpu")) == rates
    for name, mfu in (("NVIDIA H100 80GB HBM3", 0.0438), ("Some GPU", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert window.rates(4.33e10, torch.device("cuda")) == rates | {"mfu": mfu}


@pytest.mark.parametrize("name, tflops", {
    "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989, "NVIDIA B200": 2250,
    "NVIDIA A10": 125, "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364,
    "NVIDIA GeForce RTX 3090": 71, "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5, "AMD Instinct MI250X/MI250": 191.5,
    "AMD Instinct MI300X": 1307,
    # Others of a like name have another peak: unknown is better than wrong.
    "NVIDIA GB200": None, "NVIDIA H200 NVL": None, "NVIDIA A10G": None, "Quadro RTX 6000": None,
    "NVIDIA GeForce RTX 3090 Ti": None, "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 5090 Laptop GPU": None, "NVIDIA A100-SXM4-80GB MIG 3g.40gb": None}.items())
def test_the_peak_of_a_gpu_is_known_by_its_whole_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"))
    assert peak == (tflops and pytest.approx(tflops * 1e12))


def test_energy_is_the_papers_arithmetic():
    """104 MWh x 1.1 x 0.610 = 69.78 t, OLMo-7B on A100s (paper, section 4.4)."""
    line = energy_line(104_000, True, train.TrainConfig())
    assert line.endswith("= 6.98e+04 kg CO2eq") and "metered" in line
    assert "unknown" in energy_line(0.0, False, train.TrainConfig())


def test_stated_watts_count_by_the_clock(tmp_path, tiny_config, call):
    run = tmp_path / "run"
    words = [tiny_config(run, watts=3.6e6, max_steps=30), "--eval_every_steps=0"]
    began = time.monotonic()
    assert "energy: " in call(train, *words).stdout
    for row in rows(run):  # 3.6 MW are a kWh a second
        assert row["seconds"] - 0.001 < row["kwh"] < time.monotonic() - began
    [end] = rows(run, "end")
    assert end["kg_co2"] == pytest.approx(end["kwh"] * 1.1 * 0.610)
    call(train, f"--resume={run}", "--max_steps=40")  # it goes on from there
    assert rows(run)[30]["kwh"] > rows(run)[29]["kwh"]


def test_a_meter_adds_up_its_power(monkeypatch):
    """At 3.6 MW a second is a kWh; the meter of the GPU is preferred to the stated watts."""
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 3.6e9)
    monkeypatch.setattr(time, "sleep", lambda s, sleep=time.sleep: sleep(0.01))
    began = time.monotonic()
    meter = PowerMeter(torch.device("cuda"), watts=1.0)
    wait_until(lambda: meter.kwh() > 0.5)
    assert meter.metered and meter.kwh() < time.monotonic() - began


def test_tensorboard_gets_the_same_numbers(tmp_path, tiny_config, call, refused, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path / "run"
    assert call(train, tiny_config(run), "--tensorboard").returncode == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows(run)]
    assert {"train/lr", "train/grad_norm", "eval/web"} <= set(events.Tags()["scalars"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    other = tiny_config(tmp_path / "other")
    refused(call(train, other, "--tensorboard"), "pip install tensorboard")


# ---- The plan ------------------------------------------------------------------------------------

def track(name, ranks, micro_batch_size, changes):
    """Print the bytes at the peak by torch's tracker, with fake tensors: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    model_config, config = load_config([name], m.ModelConfig, train.TrainConfig,
                                       other=train.SCHEMAS)
    config = replace(config, **changes)
    checkpoint.check_starts_at_zero = lambda optimizer: None  # fake tensors have no values
    sharding.only_of_targets = lambda token_losses: token_losses  # a GPU computes all logits
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        mesh = sharding.build_mesh("all", torch.device("cpu"))
        sharding.build_mesh = lambda *_: mesh
    with FakeTensorMode():
        with torch.device("meta" if ranks > 1 else "cpu"):
            model = m.OLMo(model_config)
        if ranks == 1:
            model.to_empty = lambda device: model
        sharding.shard_model(model, config, torch.device("cpu"), torch.bfloat16, False)
        optimizer = train.build_optimizer(model, config)
        if ranks > 1:
            tracker = FSDPMemTracker(model, optimizer)
        else:
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
        tokens = torch.zeros(micro_batch_size, model_config.max_seq_len, dtype=torch.long)
        one_pass = micro_batch_size * ranks >= config.batch_size
        with tracker:
            for is_last in (True,) if one_pass else (False, True):
                sharding.sync_gradients(model, is_last)
                model(tokens, targets=tokens).sum().backward()
                tracker.reset_mod_stats()
        [peak] = tracker.get_tracker_snapshot("peak").values()
    print("PEAK", peak["Total"])


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
    name, ranks, micro_batch_size, changes = case
    model_config, config = load_config([name], m.ModelConfig, train.TrainConfig,
                                       other=train.SCHEMAS)
    parts = plan_memory(model_config, replace(config, **changes), ranks, micro_batch_size)
    log = tmp_path / "log"
    process = forked(log, lambda argv: track(*case))
    assert joined(process) == 0, log.read_text()[-2000:]
    ratio = sum(parts.values()) / int(log.read_text().split("PEAK")[1])
    assert 0.85 < ratio < 1.15, ratio


def test_the_plan_states_its_figures(call):
    """2.22e12 tokens x 4.33e10 FLOP / (256 x 989e12 x 0.4) = 11.0 days; 12 bytes a parameter."""
    result = call(train, SEVEN_B, "--plan", "--gpus=256", "--gpu=h100")
    assert result.returncode == 0
    for words in ("6,888,095,744 parameters", "2,216 G tokens", "40% MFU", "11.0 days",
                  "--gpus=240", "82.7 GB per checkpoint", "it fits"):
        assert words in result.stdout
    kwh = 256 * 0.7 * 10.971 * 24
    [line] = [line for line in result.stdout.splitlines() if "kWh" in line]
    assert float(line.split()[0].replace(",", "")) == pytest.approx(kwh, rel=1e-3)
    assert float(line.split()[-3]) == pytest.approx(kwh * 1.1 * 0.61 / 1000, rel=1e-2)


@pytest.mark.parametrize("words, advice", [
    (["--gpus=8", "--gpu=a100-40", "--activation_checkpointing=none", "--micro_batch_size=3"],
     "does not fit; --activation_checkpointing=one_in_two --micro_batch_size=3 would"),
    (["--gpus=1", "--gpu=h100"], "--gpus=2 "), (["--gpus=8", "--gpu=h100"], "it fits"),
    ([ANNEAL, "--gpus=216", "--gpu=a100"], "1,000 steps"),  # those of the anneal alone
    ([ANNEAL, "--gpus=216", "--gpu=a100"], "4.424 G tokens"),
    ([ANNEAL, "--gpus=216", "--gpu=a100"], "for the 2 that are kept")])
def test_the_plan_advises(call, words, advice):
    result = call(train, SEVEN_B, *words, "--plan")
    assert result.returncode == 0 and advice in result.stdout, result.stdout


@pytest.mark.parametrize("words", [
    ["--gpus=1", "--gpu=4090", "--batch_size=1"], ["--gpus=1", "--gpu=4090"],
    ["--gpus=7", "--gpu=4090", "--batch_size=7"], ["--gpus=16", "--gpu=3090", "--shard=hybrid"],
    ["--gpus=8", "--gpu=a100-40", "--micro_batch_size=3"]])
def test_with_what_the_plan_advises_it_fits(call, words):
    [line] = [line for line in call(train, SEVEN_B, *words, "--plan").stdout.splitlines()
              if "does not fit" in line]
    advised = [word for word in line.split() if word.startswith("--")]
    result = call(train, SEVEN_B, *words, *advised, "--plan")
    assert "it fits" in result.stdout and "is not a multiple" not in result.stdout, result.stdout


@pytest.mark.parametrize("gpu", GPUS)
def test_the_plan_knows_the_gpus_that_people_have(call, gpu):
    tflops, capacity, watts = GPUS[gpu]
    result = call(train, ROOT / "configs/tiny.py", "--plan", "--gpus=1", f"--gpu={gpu}")
    assert result.returncode == 0 and "it fits" in result.stdout
    for words in (f"{gpu} ({capacity} GiB)", f"of {tflops} TFLOP/s", f"at {watts} W per GPU"):
        assert words in result.stdout


def test_a_plan_needs_no_data_and_makes_no_directory(tmp_path, tiny_config, call, refused):
    file = tiny_config(tmp_path / "run", sources={"gone": "nowhere"})
    assert "parameters" in call(train, file, "--plan").stdout
    assert not (tmp_path / "run").exists()
    for option in ("gpus=0", "gpu=b17"):
        refused(call(train, file, "--plan", f"--{option}"), option)
