"""Ranks: the process group that torchrun starts, and what the ranks tell each other.

Each process that torchrun starts is a rank. Without torchrun there is one process and no process
group; a sum over the ranks is then the number itself.
"""

import functools
import hashlib
import os
import socket
import sys
import textwrap
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configs import ROOT
from scaling.machine import choose_compile, choose_device, choose_dtype, keep_freed_memory
from support.files import UserError, file_sha256

ERROR_GRACE_S = 3  # how long a rank other than 0 waits before it prints an error of its own


def rank():
    """The number of this process among all that train together; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- Start and end -------------------------------------------------------------------------------

def setup_distributed(name):
    """Join the process group that torchrun's environment describes; returns this rank's device.

    name: "auto", "cpu", "cuda" or "mps". Raises UserError for more ranks than GPUs.
    """
    device = choose_device(name)
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is above the {torch.cuda.device_count()} GPUs of "
                            f"{socket.gethostname()}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "mps":
            raise UserError("device=mps works for one process only; use --device=cpu for several")
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10), **fresh_rendezvous())
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
    deadline = time.monotonic() + patience_s
    while missing and time.monotonic() < deadline:
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
        try:
            code = main(argv)
        except UserError:
            # If rank 0 failed too, it prints the error and torchrun kills this rank within the
            # grace time. If not, this rank must print it.
            if os.environ.get("RANK", "0") != "0":
                time.sleep(ERROR_GRACE_S)
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    return run


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


def on_rank0(work, patience=None):
    """Run `work()` on rank 0 and return its result on every rank.

    A UserError or OSError of rank 0 becomes a UserError on every rank.
    patience: a timedelta that the other ranks wait, where the usual 10 minutes may be too short.
    """
    if not dist.is_initialized():
        return work()
    group = dist.new_group(backend="gloo", timeout=patience) if patience else None
    result, error = None, None
    if rank() == 0:
        try:
            result = work()
        except (UserError, OSError) as raised:
            error = str(raised)
    outcome = [result, error]
    dist.broadcast_object_list(outcome, group=group)
    result, error = outcome
    if error:
        raise UserError(error)
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
        differing = [f"{key}: {wanted.get(key)} on rank 0, {found.get(key)} on rank {other}"
                     for key in {**wanted, **found} if wanted.get(key) != found.get(key)]
        if differing:
            raise UserError(f"rank {other} ({host}) differs from rank 0: {'; '.join(differing)}. "
                            "Give every node the same code, config and data")


def agree_on_machine(config, settings, device):
    """Returns (dtype of the forward, whether to compile): chosen, printed and equal on all ranks.

    settings: every key of the run; they too must be equal on all ranks.
    """
    text = "config: " + ", ".join(f"{key}={value}" for key, value in settings.items())
    print(textwrap.fill(text, width=100, subsequent_indent="  "))
    ranks_per_node = os.environ.get("LOCAL_WORLD_SIZE") if config.shard == "hybrid" else None
    check_agreement({**settings, "code": code_version(), "torch": torch.__version__,
                     "ranks per node": ranks_per_node})
    dtype = choose_dtype(config.dtype, device)
    compiled, why = choose_compile(config.compile, device)
    check_agreement({"device": device.type, "dtype": str(dtype), "compile": compiled})
    dtype_why = "fastest on this chip" if config.dtype == "auto" else "as asked"
    ranks = f", {world_size()} ranks" if world_size() > 1 else ""
    print(f"machine: {device.type} with {torch.get_num_threads()} threads{ranks}; forward in "
          f"{dtype} ({dtype_why}); {'compiled' if compiled else 'not compiled'} ({why})")
    keep_freed_memory()
    return dtype, compiled


def code_version():
    """One hash over all code files, which must be the same on every rank."""
    folders = (".", "configs", "corpus", "scaling", "support")
    files = [file for folder in folders for file in sorted((ROOT / folder).glob("*.py"))]
    digests = "".join(file_sha256(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest()[:12]


def batch_hash(tokens):
    """A hash of int64 tokens (B, T) over all ranks that does not depend on the order of the rows.

    It is the sum of the rows' hashes modulo 2**64, so any number of ranks gives the same value.
    """
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in tokens.numpy()]
    total = sum(int.from_bytes(digest, "big", signed=True) for digest in digests)
    as_int64 = (total + 2**63) % 2**64 - 2**63  # int64 sums wrap around, in torch as here
    return f"{reduce_sum(torch.tensor(as_int64)).item() % 2**64:016x}"
