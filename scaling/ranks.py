"""Ranks: the process group that torchrun starts, and what the ranks tell each other.

Each process that torchrun starts is a rank. Without torchrun there is one process and no process
group; a sum over the ranks is then the number itself.
"""

import functools
import hashlib
import os
import re
import socket
import sys
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from scaling.boards import check_boards
from scaling.code_files import code_version
from scaling.machine import choose_compile, choose_device, choose_dtype, keep_freed_memory
from support.files import UserError
from support.settings import print_settings

WAIT_IN_SILENCE_S = 10  # after so long, rank 0 says for which ranks it waits
ALONE = {"show", "chat", "generate"}  # of adapt.py; several processes would write one file
STORES = []  # the store in which a rank other than 0 notes that it prints an error of its own
ERROR_GRACE_S = 3  # how long a rank other than 0 waits before it prints an error of its own


def rank():
    """The number of this process among all that train together; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- What torchrun says --------------------------------------------------------------------------

class Launch(NamedTuple):
    """Which of how many processes this one is, over all nodes and on its own."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    ranks_per_node: int = 0  # 0: not said


def launched():
    """The Launch that torchrun describes in the environment; without torchrun it is one process.

    Its variables are read together or not at all: a cluster's script may leave single ones behind.
    Raises UserError for a part of them, and for values that do not fit together.
    """
    wanted = ["RANK", "LOCAL_RANK", "WORLD_SIZE"]
    if not any(os.environ.get(name) for name in wanted):  # MASTER_ADDR alone tells of no rank
        return Launch()
    if os.environ.get("WORLD_SIZE") != "1":
        wanted += ["MASTER_ADDR", "MASTER_PORT"]
    found = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    missing = ", ".join(name for name in wanted if name not in found)
    if missing:
        raise wrong_launch(found, f"not {missing}")
    numbers = {name: value for name, value in found.items() if name != "MASTER_ADDR"}
    numbers["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE") or "0"
    for name, value in numbers.items():
        if not value.isdecimal():
            raise wrong_launch(found, f"{name}={value} is no number")
    launch = Launch(rank=int(numbers["RANK"]), local_rank=int(numbers["LOCAL_RANK"]),
                    world_size=int(numbers["WORLD_SIZE"]),
                    ranks_per_node=int(numbers["LOCAL_WORLD_SIZE"]))
    if launch.world_size <= max(launch.rank, launch.local_rank):
        raise wrong_launch(found, "the ranks of N processes are 0 to N - 1")
    return launch


def wrong_launch(found, fault):
    """The UserError about torchrun's variables in this environment."""
    text = ", ".join(f"{name}={value}" for name, value in found.items())
    unset = " ".join(f"-u {name}" for name in found)
    return UserError(f"the environment has {text}, but {fault}: torchrun sets them together. Start "
                     f"several ranks with torchrun, and one process with: env {unset} python ...")


# ---- Start and end -------------------------------------------------------------------------------

def setup_distributed(name):
    """Join the process group that torchrun's environment describes; returns this rank's device.

    name: "auto", "cpu", "cuda" or "mps". Raises UserError for more ranks than GPUs.
    """
    keep_freed_memory()
    device = choose_device(name)
    launch = launched()
    if device.type == "cuda":
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is above the count of GPUs of "
                            f"{socket.gethostname()}, {torch.cuda.device_count()}")
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    if launch.world_size > 1:
        if device.type == "mps":
            raise UserError("device=mps works for one process only; use --device=cpu for several")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            group = fresh_rendezvous()
            STORES.append(group["store"])
            dist.init_process_group(backend, timeout=timedelta(minutes=10), **group)
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"rank {launch.rank} of {launch.world_size} does not reach the others "
                            f"at {place} ({str(error).splitlines()[0]})") from None
        if rank() > 0:  # only rank 0 prints; the errors of all ranks go to stderr
            sys.stdout = open(os.devnull, "w")
    return device


def fresh_rendezvous():
    """The store, rank and world size of this attempt, as init_process_group takes them.

    # subtle: torchrun reuses one key-value store across restarts. A rank that reads a dead rank's
    # address from it hangs (pytorch/pytorch#135712). So rank 0 draws a new random prefix per
    # attempt and hands it to each rank that asks; all ranks then use the store under that prefix.
    # A rank asks under a random name of its own, so that an old answer cannot reach it.
    """
    store, own_rank, size = next(rendezvous("env://"))
    name = uuid.uuid4().hex
    if own_rank == 0:
        attempt = name
        answer_all_ranks(store, attempt, size)
    else:
        store.set(f"asking {own_rank}", name)
        attempt = store.get(f"attempt for {name}").decode()  # blocks until rank 0 answers
        store.set(f"{attempt} has {own_rank}", "")
    return {"store": dist.PrefixStore(attempt, store), "rank": own_rank, "world_size": size}


def answer_all_ranks(store, attempt, size, patience_s=1800):
    """On rank 0: tell the attempt's name to each rank that asks, until each confirms it."""
    missing = set(range(1, size))
    began = time.monotonic()
    is_said = False
    while missing:
        waited = time.monotonic() - began
        if waited > WAIT_IN_SILENCE_S and not is_said:
            print(f"rank 0 waits for ranks {sorted(missing)}", file=sys.stderr, flush=True)
            is_said = True
        if waited > patience_s:
            raise UserError(f"ranks {sorted(missing)} did not come within {waited / 60:.0f} min")
        for other in sorted(missing):
            if store.check([f"asking {other}"]):
                asker = store.get(f"asking {other}").decode()
                store.set(f"attempt for {asker}", attempt)
            if store.check([f"{attempt} has {other}"]):
                missing.remove(other)
        time.sleep(0.02)


def on_all_ranks(main):
    """Decorator of a `main(argv)`: the ranks leave their group at its end, and an error is printed
    once.
    """
    @functools.wraps(main)
    def run(argv):
        own_rank = launched().rank
        try:
            if launched().world_size > 1 and argv and argv[0] in ALONE:
                raise UserError(f"{argv[0]} is one process; start it with python, not torchrun")
            with named_loss():
                code = main(argv)
        except UserError:
            # If rank 0 failed too, it prints the error and torchrun kills this rank within the
            # grace time. If not, this rank must print it.
            if own_rank > 0:
                time.sleep(ERROR_GRACE_S)
                with suppress(dist.DistError):
                    for store in STORES:
                        store.set("an error is told", "")
            raise
        finally:
            run.had_group = dist.is_initialized()  # for run_main
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    run.takes_ranks = True  # for run_main: other commands are one process
    return run


@contextmanager
def named_loss():
    """Around a rank's work: a lost connection to another rank ends it with a line, no traceback.

    # subtle: not at once. torchrun looks ten times a second, and is to name the rank that ended
    # first; it then ends this one.
    """
    try:
        yield
    except RuntimeError as error:
        found = re.search("(reset|closed) by peer|Broken pipe|remote process exited", str(error))
        if not (dist.is_initialized() and found):
            raise
        is_told = False
        with suppress(dist.DistError):  # the store has ended with the other rank
            is_told = STORES[0].check(["an error is told"])
        if not is_told:
            print(f"error: rank {rank()}: another rank has ended ({found[0]}). Its own error says "
                  "why. If torchrun names an exitcode -9 below, that rank was killed, as happens "
                  "when memory runs out", file=sys.stderr, flush=True)
        time.sleep(ERROR_GRACE_S)
        os._exit(1)


# ---- Collectives ---------------------------------------------------------------------------------

def reduce_sum(tensor):
    """The sum of `tensor` over all ranks, in place and on every rank."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(*numbers):
    """The largest value over all ranks of each of `numbers`, so that all ranks decide alike."""
    if not dist.is_initialized():
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_rank0(work, *arguments, patience=None):
    """Run `work(*arguments)` on rank 0 and return its result on every rank.

    A UserError or OSError of rank 0 becomes a UserError on every rank.
    patience: a timedelta that the other ranks wait, where the usual 10 minutes may be too short.
    """
    if not dist.is_initialized():
        return work(*arguments)
    group = dist.new_group(backend="gloo", timeout=patience) if patience else None
    result, error = None, None
    if rank() == 0:
        try:
            result = work(*arguments)
        except (UserError, OSError) as raised:
            error = str(raised)
    outcome = [result, error]
    dist.broadcast_object_list(outcome, group=group)
    result, error = outcome
    if error:
        raise UserError(error)
    return result


def on_each_rank(work, *arguments):
    """Run `work(*arguments)` on every rank, each for itself; returns this rank's own result.

    A UserError or OSError of one rank becomes a UserError on every rank. The others would else wait
    for that rank in their next collective.
    """
    result, error = None, None
    try:
        result = work(*arguments)
    except (UserError, OSError) as raised:
        error = str(raised)
    for each in gather(error):
        if each:
            raise UserError(each)
    return result


def from_rank0(value):
    """Rank 0's `value` on every rank; another rank may have rounded its own differently."""
    return on_rank0(lambda: value)


# ---- Agreement -----------------------------------------------------------------------------------

def check_agreement(facts):
    """UserError on every rank if the dict `facts` differs between ranks; it names the first key."""
    everyone = gather((socket.gethostname(), facts))
    _, wanted = everyone[0]
    for other, (host, found) in enumerate(everyone):
        differing = []
        for key in wanted | found:
            if wanted.get(key) != found.get(key):
                differing.append(f"{key}: {wanted.get(key)} on rank 0, {found.get(key)} on rank "
                                 f"{other}")
        if differing:
            raise UserError(f"rank {other} ({host}) differs from rank 0: {'; '.join(differing)}. "
                            "Give every node the same code, config and data")


def agree_on_machine(config, settings, device):
    """Returns (dtype of the forward, whether to compile): chosen, printed and equal on all ranks.

    settings: every key of the run, printed too; they must be equal on all ranks.
    """
    on_rank0(print_settings, config, settings)
    on_rank0(check_boards, config)
    ranks_per_node = launched().ranks_per_node if config.shard == "hybrid" else None
    check_agreement({**settings, "code": code_version(), "torch": torch.__version__,
                     "ranks per node": ranks_per_node})
    dtype = choose_dtype(config.dtype, device)
    compiled, why = agree_on_compile(config, device)
    check_agreement({"device": device.type, "dtype": str(dtype), "compile": compiled})
    dtype_why = "fastest on this chip" if config.dtype == "auto" else "as asked"
    compiled_or_not = "compiled" if compiled else "not compiled"
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    print(f"machine: {device.type} with {torch.get_num_threads()} threads{ranks}; forward in "
          f"{dtype} ({dtype_why}); {compiled_or_not} ({why})")
    return dtype, compiled


def agree_on_compile(config, device):
    """Returns (whether to compile, why), with compile=auto the same on all ranks."""
    choices = gather(choose_compile(config.compile, device))
    if config.compile == "auto":  # one node without a compiler: no node compiles
        choices = [min(choices)] * len(choices)
    return choices[rank()]


def batch_hash(tokens):
    """A hash of int64 tokens (B, T) over all ranks that does not depend on the order of the rows.

    It is the sum of the rows' hashes modulo 2**64, so any number of ranks gives the same value.
    """
    total = 0
    for row in tokens.numpy():
        digest = hashlib.sha256(row.tobytes()).digest()
        total += int.from_bytes(digest[:8], "big", signed=True)
    as_int64 = (total + 2**63) % 2**64 - 2**63  # int64 sums wrap around, in torch as here
    return f"{reduce_sum(torch.tensor(as_int64)).item() % 2**64:016x}"
