"""The first start: a child process compiles the network while this process builds the data.

The compiler needs the shapes alone. What it has compiled lies in torch's cache, on disk, where the
first step finds it. A child that fails or is ended changes nothing but the time: the first step
then compiles by itself, and says what is wrong.
"""

import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import torch

from corpus.stages import Stages, follow_parent
from model import OLMo
from scaling.machine import choose_micro_batch
from scaling.ranks import world_size
from scaling.sharding import shard_model
from support.bars import staged

PATIENCE_S = 30  # for the child when the data is built; what it has finished is in the cache
END_S = 5  # from SIGTERM to SIGKILL


def compile_beside(build_data, model_config, config, device, dtype, compiled):
    """Returns build_data; on a CPU, one that compiles beside it where there is data to build.

    Not with several ranks, whose blocks FSDP has cut: they compile something else.
    """
    # only Linux forks safely; and a process that is forked from here cannot use a GPU
    if not compiled or device.type != "cpu" or world_size() > 1 or sys.platform != "linux":
        return build_data

    def build(data_config):
        if Stages(data_config).are_done():
            return build_data(data_config)
        with beside(partial(compile_step, model_config, config, device, dtype)) as child:
            folder = build_data(data_config)
            import torch._inductor.compile_fx  # noqa: F401  1.3 s that pass beside the child too
            staged("compiling the network", child.join, PATIENCE_S)
        return folder
    return build


def compile_step(model_config, config, device, dtype):
    """Fill torch's cache with all that the run's steps will call."""
    # All blocks have one shape, and compile once. Two, as activation_checkpointing may take only
    # every second, third or fourth.
    model_config = replace(model_config, n_layers=min(2, model_config.n_layers))
    with torch.device("meta"):
        model = OLMo(model_config)
    shard_model(model, config, device, dtype, compiled=True)
    rows = choose_micro_batch(config, model_config.max_seq_len)
    tokens = torch.zeros(rows, model_config.max_seq_len, dtype=torch.int64)
    model(tokens, targets=tokens)  # the backward is compiled with it: see compile_model


@contextmanager
def beside(work):
    """Run work() in a child process during the block; at its end the child and its own are ended.

    Ctrl-C in a terminal reaches neither the child nor its g++. Yields the Process.

    # subtle: a fork has this process's memory without its other threads, and so may wait for ever
    # for a lock that one of them held. Nothing here waits for the child without a limit.
    """
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=run_in_silence, args=(work, os.getpid()), daemon=True)
    child.start()
    with suppress(OSError):
        os.setpgid(child.pid, child.pid)  # here and in the child: whoever is first
    try:
        yield child
    finally:
        end_group(child, signal.SIGTERM)  # at which g++ deletes what it has half written
        if child.is_alive():
            end_group(child, signal.SIGKILL)


def end_group(child, number):
    """Send a signal to the child and its own, also if it has ended before them; wait for it."""
    with suppress(OSError):
        os.killpg(child.pid, number)
    child.join(END_S)


def run_in_silence(work, parent):
    """In the child: its errors are told by the first step, which meets them too."""
    os.setpgid(0, 0)
    follow_parent(parent)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    for number in (1, 2):  # of g++
        os.dup2(sys.stdout.fileno(), number)
    work()
