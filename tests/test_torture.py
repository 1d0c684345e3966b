"""Runs under torchrun that are killed at every moment, on one node and on two, with as many ranks
as each start happens to have; and the dtypes and the compiler under ranks. All against runs of one
process that nothing disturbed."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import (PATIENCE_S, ROOT, check_same_run, children_of, columns, rows, saved_steps,
                      step_count, steps, wait_until)

from scaling.checkpoint import verify_step
from scaling.machine import can_compile

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux's /proc")]
TORCHRUN = ["-m", "torch.distributed.run"]
KEPT = 3
LONG = dict(max_steps=400, save_every_steps=4, keep_last=KEPT, eval_every_steps=100)


# ---- Processes -----------------------------------------------------------------------------------

def alive(pid):
    """Whether a process runs; one that has ended but that nobody waited for has no command line."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_all(launcher):
    """SIGKILL a launcher, stopped first so that it starts nothing more, and all of its ranks."""
    launcher.send_signal(signal.SIGSTOP)
    ranks = children_of(launcher.pid)
    for pid in (launcher.pid, *ranks):
        os.kill(pid, signal.SIGKILL)
    assert launcher.wait() == -signal.SIGKILL
    wait_until(lambda: not any(map(alive, ranks)))


def kill_one(launcher, dice):
    """SIGKILL one rank: torchrun must see it, end the others and itself, with an error."""
    ranks = children_of(launcher.pid)
    os.kill(dice.choice(ranks), signal.SIGKILL)
    assert launcher.wait(timeout=PATIENCE_S) > 0
    assert not any(map(alive, ranks))


@pytest.fixture
def launch():
    """Starts train.py on so many ranks without waiting; what it prints is appended to `log`."""
    launched = []

    def popen(log, *words, ranks=1, torchrun=("--standalone",), prefix=(), **env):
        runner = [*TORCHRUN, *torchrun, f"--nproc_per_node={ranks}"] if ranks > 1 or prefix else []
        command = [*prefix, sys.executable, *runner, ROOT / "train.py", *words]
        with open(log, "a") as file:
            launched.append(subprocess.Popen(
                command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=file,
                stderr=subprocess.STDOUT))
        return launched[-1]
    yield popen
    for launcher in launched:
        if launcher.poll() is None:
            kill_all(launcher)


@pytest.fixture
def finish(launch):
    """Trains to the end."""
    def run(log, *words, **options):
        code = launch(log, *words, **options).wait(timeout=PATIENCE_S)
        assert code == 0, Path(log).read_text()[-3000:]
    return run


# ---- Kills ---------------------------------------------------------------------------------------

def checkpoints(run):
    return {int(path.name[4:]) for path in run.glob("step??????")}


def inode(path):
    return path.stat().st_ino if path.exists() else 0


def wait_for_moment(process, run, moment, dice):
    """Wait until a run that was just started has taken a few steps, and then for the moment."""
    log, newest = run / "metrics.jsonl", max(checkpoints(run), default=0)
    old, least = inode(log), newest + dice.randint(1, 9)
    # A start replaces the log by one without the rows of the steps that it takes again.
    wait_until(lambda: inode(log) not in (0, old), process)
    wait_until(lambda: step_count(run) >= least, process)
    if moment == "saving":
        wait_until(lambda: list(run.glob("step*.tmp")), process)
    elif moment == "renaming":
        before = checkpoints(run)
        wait_until(lambda: checkpoints(run) - before, process)
    else:
        time.sleep(dice.uniform(0, 0.15))


def check_checkpoints(run, before):
    """All that have a step's name are complete; of those before at most old ones are gone."""
    now = checkpoints(run)
    for step in now:
        verify_step(run / f"step{step:06d}")
    lost = [step for step in before - now if sum(other > step for other in now) < KEPT]
    assert lost == [], f"before {sorted(before)}, now {sorted(now)}"
    return now


def torture(run, file, launch, dice, kills, worlds):
    """Start and kill a run again and again: at the start, in a step, a save, around the rename."""
    before = set()
    for number in range(kills):
        ranks = dice.choice(worlds)
        moments = ["starting", "stepping", "saving", "renaming"] if number else ["saving"]
        moment = dice.choice(moments)
        process = launch(f"{run}.log", f"--resume={run}" if number else file, ranks=ranks)
        if moment == "starting":
            time.sleep(dice.uniform(0, 3))
        else:
            wait_for_moment(process, run, moment, dice)
        if ranks == 1 or moment == "starting" or dice.random() < 0.5:
            kill_all(process)
        else:
            kill_one(process, dice)
        before = check_checkpoints(run, before)
    assert max(before) > 0


def worst(one, other):
    """The largest difference between the losses of two runs at the same step."""
    losses = zip(columns(one, "loss"), columns(other, "loss"), strict=True)
    return max(abs(mine - theirs) for [mine], [theirs] in losses)


def check_same_course(run, reference):
    """Each step once and in order, of the same batches; losses and evaluations but for rounding."""
    assert steps(run) == list(range(1, steps(reference)[-1] + 1))
    assert columns(run, "batch_hash") == columns(reference, "batch_hash")
    assert worst(run, reference) <= 2e-5
    assert steps(run, "eval") == steps(reference, "eval")
    for one, other in zip(rows(run, "eval"), rows(reference, "eval"), strict=True):
        assert one["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=0, abs=1e-4)


def test_thirty_kills_on_changing_numbers_of_ranks_change_nothing(tmp_path, tiny_config, launch,
                                                                  finish):
    run, reference = tmp_path / "run", tmp_path / "reference"
    finish(tmp_path / "reference.log", tiny_config(reference, **LONG))
    torture(run, tiny_config(run, **LONG), launch, random.Random(6), 30, [1, 2, 4])
    finish(tmp_path / "run.log", f"--resume={run}", ranks=2)
    assert {row["world_size"] for row in rows(run)} == {1, 2, 4}
    assert saved_steps(run) == saved_steps(reference)
    check_same_course(run, reference)


def test_six_kills_on_two_ranks_change_no_bit(tmp_path, tiny_config, launch, finish):
    """Nor does a second run without any."""
    files = {name: tiny_config(tmp_path / name, **LONG | {"max_steps": 140})
             for name in ("reference", "again", "run")}
    for name in ("reference", "again"):
        finish(tmp_path / f"{name}.log", files[name], ranks=2)
    check_same_run(tmp_path / "again", tmp_path / "reference")
    run = tmp_path / "run"
    torture(run, files["run"], launch, random.Random(3), 6, [2])
    finish(tmp_path / "run.log", f"--resume={run}", ranks=2)
    check_same_run(run, tmp_path / "reference")
    assert len(list(run.glob("step000140/*.distcp"))) == 2  # the slices of each rank


# ---- Two nodes -----------------------------------------------------------------------------------

@dataclass
class Node:
    """A network namespace, which is a machine of its own as far as sockets can tell."""

    name: str
    interface: str
    address: str

    def pids(self):
        words = ["ip", "netns", "pids", self.name]
        return list(map(int, subprocess.check_output(words, text=True).split()))

    def kill(self):
        """SIGKILL all that runs in it."""
        while pids := self.pids():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.01)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def nodes():
    """Two nodes that a cable joins: 10.77.0.1, where the rendezvous is, and 10.77.0.2."""
    made = [Node(f"olmo{os.getpid()}{side}", f"v{os.getpid()}{side}", f"10.77.0.{number}")
            for number, side in enumerate("ab", 1)]
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root, and iproute2, to make network namespaces")
    try:
        for node in made:
            if subprocess.run(["ip", "netns", "add", node.name], capture_output=True).returncode:
                pytest.skip("needs root that may make network namespaces")
        ip("link", "add", made[0].interface, "netns", made[0].name, "type", "veth", "peer", "name",
           made[1].interface, "netns", made[1].name)
        for node in made:
            inside = ["-n", node.name]
            ip(*inside, "address", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                ip(*inside, "link", "set", interface, "up")
        yield made
    finally:
        for node in made:
            if Path("/run/netns", node.name).exists():
                node.kill()
                ip("netns", "delete", node.name)  # and with it its end of the cable


def start_node(launch, node, file):
    """The command of one of two nodes, the same at every start."""
    host = int(node.address.endswith(".1"))
    torchrun = ["--nnodes=2", "--rdzv_backend=c10d", "--rdzv_endpoint=10.77.0.1:29500",
                "--rdzv_id=torture", f"--rdzv_conf=is_host={host}", f"--local_addr={node.address}"]
    return launch(file.with_suffix(f".{host}.log"), file, torchrun=torchrun,
                  prefix=["ip", "netns", "exec", node.name], GLOO_SOCKET_IFNAME=node.interface)


def supervise(launch, nodes, launchers, file, restarts=6, seconds=PATIENCE_S):
    """What systemd or Slurm does: start again what ended with an error, until both are done."""
    deadline = time.monotonic() + seconds
    while any(launcher.poll() != 0 for launcher in launchers):
        assert time.monotonic() < deadline
        for i, launcher in enumerate(launchers):
            if launcher.poll():
                restarts -= 1
                assert restarts >= 0
                launchers[i] = start_node(launch, nodes[i], file)
        time.sleep(0.1)


@pytest.mark.parametrize("dying", [1, 0])
def test_a_node_that_dies_and_comes_back_changes_nothing(tmp_path, tiny_config, launch, finish,
                                                         nodes, dying):
    """The other ends by itself, and a supervisor starts both again; node 0 has the rendezvous."""
    run, reference = tmp_path / "run", tmp_path / "reference"
    settings = LONG | {"max_steps": 120, "eval_every_steps": 40}
    finish(tmp_path / "reference.log", tiny_config(reference, **settings))
    file = tiny_config(run, **settings)
    launchers = [start_node(launch, node, file) for node in nodes]
    wait_until(lambda: len(checkpoints(run)) >= KEPT, launchers[0])
    saved = checkpoints(run)
    nodes[dying].kill()
    assert launchers[dying].wait() == -signal.SIGKILL
    assert launchers[1 - dying].wait(timeout=PATIENCE_S) > 0
    assert nodes[1 - dying].pids() == []
    assert max(check_checkpoints(run, saved)) < 120
    supervise(launch, nodes, launchers, file)
    assert "continues after step" in run.with_suffix(".1.log").read_text()
    assert {row["world_size"] for row in rows(run)} == {2}
    check_same_course(run, reference)


# ---- Dtypes and the compiler ---------------------------------------------------------------------

def test_two_ranks_differ_from_one_by_no_more_than_bfloat16_does(tmp_path, tiny_config, finish):
    """The yardstick is how far bfloat16 is from float32 in the same 30 steps of one process; two
    noisy runs may lie up to sqrt(2) of it apart."""
    for name, ranks, dtype in (("exact", 1, "float32"), ("one", 1, "bfloat16"),
                               ("two", 2, "bfloat16")):
        file = tiny_config(tmp_path / name, max_steps=30, dtype=dtype, save_every_steps=0)
        finish(tmp_path / f"{name}.log", file, ranks=ranks)
    exact, one, two = (tmp_path / name for name in ("exact", "one", "two"))
    noise, difference = worst(one, exact), worst(two, one)
    assert 0 < difference <= 1.5 * noise


def test_two_compiled_ranks_that_recompute_equal_one_eager_process(tmp_path, tiny_config, finish):
    if not can_compile():
        pytest.skip("needs a C++ compiler")
    run, reference = tmp_path / "run", tmp_path / "reference"
    settings = dict(max_steps=10, save_every_steps=0)
    finish(tmp_path / "reference.log", tiny_config(reference, **settings))
    finish(tmp_path / "run.log", tiny_config(run, **settings), "--compile=true",
           "--activation_checkpointing=fine_grained", ranks=2,
           TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "; compiled (" in (tmp_path / "run.log").read_text()
    check_same_course(run, reference)
