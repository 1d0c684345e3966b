"""Ranks: the process group that torchrun starts, and what ranks tell each other."""

import functools
import hashlib
import os
import socket
import sys
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from configs import ROOT
from scaling.machine import choose_device
from support.files import UserError, file_sha256


# The scaling layer: model.py, data.py and eval.py know nothing of it. A process that torchrun
# started is a rank; without torchrun there is one, and no process group.
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def setup_distributed(name):
    """(rank, world size, device named `name`) of this process, from torchrun's environment."""
    device = choose_device(name)
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node is above the {torch.cuda.device_count()} GPUs of "
                            f"{socket.gethostname()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "mps":
            raise UserError("device=mps works for one process; --device=cpu for several")
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(minutes=10), **fresh_rendezvous())
        if rank():  # one rank speaks; the others' errors go to stderr
            sys.stdout = open(os.devnull, "w")
    return rank(), world_size(), device


def fresh_rendezvous():
    """The store, rank and world size of this attempt, for init_process_group.

    # subtle: torchrun keeps one store over its restarts, and who finds a dead rank's address in it
    # waits for ever (pytorch/pytorch#135712). So rank 0 names each attempt anew, and tells the name
    # to those who ask under a new name of their own; they meet in a store of the attempt's name.
    """
    store, number, ranks = next(rendezvous("env://"))
    name = uuid.uuid4().hex
    if number:
        store.set(f"asking {number}", name)
        attempt = store.get(f"attempt for {name}").decode()  # waits for it
        store.set(f"{attempt} has {number}", "")
        return dict(store=dist.PrefixStore(attempt, store), rank=number, world_size=ranks)
    missing, deadline = set(range(1, ranks)), time.monotonic() + 1800
    while missing and time.monotonic() < deadline:
        for other in sorted(missing):
            if store.check([f"asking {other}"]):
                store.set(f"attempt for {store.get(f'asking {other}').decode()}", name)
            if store.check([f"{name} has {other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return dict(store=dist.PrefixStore(name, store), rank=number, world_size=ranks)


def reduce_sum(tensor):
    """The sum of a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest(*numbers):
    """The largest of each of `numbers` over all ranks, so that all of them decide alike."""
    if not dist.is_initialized():
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def gather(value):
    """[value of rank 0, of rank 1, ...] on every rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_main(work, patience=None):
    """What `work()` returns on rank 0, on every rank; its UserError or OSError ends them all.

    patience: how long the others wait, where 10 minutes may not do.
    """
    if not dist.is_initialized():
        return work()
    group = dist.new_group(backend="gloo", timeout=patience) if patience else None
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, group=group)
    if outcome[1]:
        raise UserError(outcome[1])
    return outcome[0]


def as_on_main(value):
    """Rank 0's `value` on every rank, which may have rounded its own otherwise."""
    return on_main(lambda: value)


def on_all_ranks(main):
    """`main` so that ranks leave their group at its end, and a mistake is said once."""
    @functools.wraps(main)
    def run(argv):
        try:
            code = main(argv)
        except UserError:
            if os.environ.get("RANK", "0") != "0":  # what rank 0 met too, it says, and torchrun
                time.sleep(3)  # ends the others; what this one met alone it must say itself
            raise
        if dist.is_initialized():
            dist.destroy_process_group()
        return code
    return run


def check_agreement(facts):
    """UserError on every rank if the dict `facts` is not the same on all of them."""
    everyone = gather((socket.gethostname(), facts))
    wanted = everyone[0][1]
    for number, (host, theirs) in enumerate(everyone):
        differing = [f"{key}: {wanted.get(key)} on rank 0, {theirs.get(key)} on rank {number}"
                     for key in {**wanted, **theirs} if wanted.get(key) != theirs.get(key)]
        if differing:
            raise UserError(f"rank {number} ({host}) is not on the same run: "
                            f"{'; '.join(differing)}. Give every node the same code, config and "
                            "data")


def code_version():
    """One hash over the code that every rank must share."""
    modules = ("model.py", "data.py", "eval.py", "train.py", "adapt.py", "configs/__init__.py")
    files = [ROOT / module for module in modules]
    for part in ("corpus", "scaling", "support"):
        files += sorted((ROOT / part).glob("*.py"))
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:12]


def batch_hash(tokens):
    """A hash of the tokens (B, T) of all ranks, whose rows may come in any order: their sum."""
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in tokens.numpy()]
    own = sum(int.from_bytes(digest, "big", signed=True) for digest in digests)
    wrapped = (own + 2**63) % 2**64 - 2**63  # int64 sums wrap around, in torch as here
    return f"{reduce_sum(torch.tensor(wrapped)).item() % 2**64:016x}"
