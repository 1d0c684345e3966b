"""Training: ranks, optimiser, schedule, the step, checkpoints, the log, the plan and the loop.

    python train.py configs/tiny.py [--key=value ...]   # train; on a run that exists, go on from it
    python train.py --resume=RUN [--key=value ...]      # the same, the config read from the run
    torchrun --nproc_per_node=8 train.py CONFIG         # the same batches and losses on 8 GPUs
    python train.py CONFIG --plan --gpus=256            # train nothing: memory, days, kWh, CO2

Ctrl-C or SIGTERM finishes the step, saves and leaves. Exit code 0 means finished, any other: run
the same command again. Paper: OLMo (arXiv 2402.00838), section 3. Parts, in order: configuration,
the machine, ranks, optimiser and schedule, the step, checkpoints, the run directory, the log, the
plan, the loop.
"""

import ctypes
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import sysconfig
import textwrap
import threading
import time
import types
import uuid
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import (CheckpointPolicy, checkpoint,
                                    create_selective_checkpoint_contexts)
from tqdm import tqdm

from configs import (HOUSE, ROOMS, UserError, file_sha256, flat, fsync, load_config, read_json,
                     run_main, write_json)
from data import (Batches, DataConfig, RunData, Tokenizer, TokenShards, build_data, log_rows,
                  print_table)
from eval import (EvalConfig, asked, domains_table, evaluate_suites, held_out_files,
                  open_suites, sample_text, tasks_table)
from model import (PLAIN_AT_MOST, Block, ModelConfig, OLMo, choose_device, choose_dtype,
                   count_parameters, head_nats, init_weights, newest_step, next_token_loss,
                   read_step, root_cause, state_digest, step_directories, verify_step)


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained; paper, section 3."""

    run_dir: str = "runs/tiny"
    """The directory of this run: config, metrics, checkpoints; one that all nodes see."""
    resume: str = ""
    """Go on with the run in this directory; its config is used."""
    overwrite: bool = False
    """Start anew where run_dir already holds a run."""
    accept_changes: bool = False
    """Go on although the config or the data is not what it was; says what changed."""
    start_from: str = ""
    """Begin with the weights, optimiser and data position of this RUN/step... (an anneal)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda where there is one, else cpu; mps is untried."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward; auto is bfloat16 where the chip is fast at it. Weights stay float32."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile the blocks and the head; auto does so where the machine can."""
    shard: Literal["all", "hybrid"] = "all"
    """Split the weights over all ranks, or over those of a node, with a copy on every node."""
    activation_checkpointing: Literal["none", "one_in_four", "one_in_three", "one_in_two",
                                      "fine_grained", "whole_layer"] = "none"
    """What the backward computes again instead of keeping: OLMo's choices, by memory saved."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients after each micro-batch, as OLMo did: slower, with less memory."""
    batch_size: int = 16
    """Sequences per step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences per rank and forward pass; 0 chooses."""
    max_steps: int = 900
    """Steps to train; the first is step 1."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr: float = 3e-4
    """Learning rate at the end of the decay; OLMo: a tenth of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up, from a tenth of the peak."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay from the peak to min_lr."""
    decay_steps: int = 0
    """Step at which the decay reaches min_lr, to stay there; 0 is max_steps."""
    weight_decay: float = 0.1
    """AdamW's decay of all matrices but the embedding."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's mean square."""
    eps: float = 1e-5
    """AdamW's epsilon; OLMo's is 1e-5."""
    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 does not clip."""
    grad_clip_warmup_steps: int = 0
    """OLMo-7B's early rule: from step 2 to the one after this the limit is larger; 0 is no rule."""
    grad_clip_warmup_factor: float = 10.0
    """By how much it is larger."""
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite; its documents are logged."""
    log_every_steps: int = 10
    """Write a row of metrics.jsonl every so many steps."""
    eval_every_steps: int = 300
    """Evaluate the held-out text every so many steps, and at the end; 0 is at the end alone."""
    save_every_steps: int = 300
    """Save a checkpoint every so many steps, and at the end; 0 is at the end alone."""
    save_every_minutes: float = 0.0
    """Save a checkpoint when so many minutes have passed since the last one; 0 is never."""
    keep_last: int = 2
    """How many checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Keep those of each multiple of so many steps as well; 0 is none."""
    verify: Literal["sha256", "size"] = "sha256"
    """How a checkpoint is checked before it is loaded; size is for huge ones."""
    stop_after_minutes: float = 0.0
    """Save and leave after so many minutes, with an exit code that is not 0; 0 is never."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into RUN/tensorboard."""
    watts: float = 0.0
    """Power of one rank's share of the machine, where no meter of a GPU is read; 0 is unknown."""
    pue: float = 1.1
    """What the data centre uses by what its machines use; paper, section 4.4."""
    kg_co2_per_kwh: float = 0.610
    """Carbon intensity of the grid; the paper's for its A100 run."""

    def __post_init__(self):
        for key, value in vars(self).items():
            least = 1 if key in ("batch_size", "max_steps") else 0
            if type(value) in (int, float) and not least <= value < math.inf:
                raise UserError(f"{key}={value}: a number from {least} on is wanted")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")


# GPU: (bf16 TFLOP/s, dense; GiB; watts), from the makers' data sheets; MI250X by half, as torch
# sees it
GPUS = {"a100-40": (312, 40, 400), "a100": (312, 80, 400), "h100": (989, 80, 700),
        "h200": (989, 141, 700), "mi250x": (191.5, 64, 280)}


@dataclass(frozen=True)
class PlanConfig:
    """What --plan reckons with."""

    plan: bool = False
    """Train nothing: print memory per GPU, tokens, days, energy and carbon of the config."""
    gpus: int = 8
    """How many GPUs."""
    gpu: Literal["a100-40", "a100", "h100", "h200", "mi250x"] = "h100"
    """Which GPU; of an MI250X, one of its two halves."""
    assumed_mfu: float = 0.4
    """Share of the GPU's peak that training reaches; 0.4 to 0.5 is what others report for 7B."""

    def __post_init__(self):
        if self.gpus < 1 or not 0 < self.assumed_mfu <= 1:
            raise UserError(f"gpus={self.gpus} must be at least 1 and "
                            f"assumed_mfu={self.assumed_mfu} above 0 and at most 1")


# ---- The machine ---------------------------------------------------------------------------------

def can_compile():
    """Whether torch.compile finds what it needs: a C++ compiler and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def choose_machine(config, device):
    """The forward's dtype and whether to compile on `device`; prints what was chosen, and why."""
    dtype = choose_dtype(config.dtype, device)
    compiled = config.compile == "true"
    why = "as asked"
    if config.compile == "auto":
        compiled = device.type in ("cpu", "cuda") and can_compile()
        why = ("the first time takes about half a minute" if compiled else
               "untried" if device.type == "mps" else "no C++ compiler or Python headers")
    print(f"machine: {device.type} with {torch.get_num_threads()} threads"
          + (f", {world_size()} ranks" if world_size() > 1 else "") + f"; forward in {dtype} "
          f"({'as asked' if config.dtype != 'auto' else 'what this chip multiplies best'}); "
          f"{'compiled' if compiled else 'not compiled'} ({why})")
    return dtype, compiled


def agree_on_machine(config, settings, device):
    """(dtype, compiled) of the forward, alike on all ranks as the settings are; prints both."""
    print(textwrap.fill("config: " + ", ".join(f"{key}={value}" for key, value in settings.items()),
                        width=100, subsequent_indent="  "))
    check_agreement({**settings, "code": code_version(), "torch": torch.__version__,
                     "ranks a node": config.shard == "all" or os.environ.get("LOCAL_WORLD_SIZE")})
    dtype, compiled = choose_machine(config, device)
    check_agreement({"device": device.type, "dtype": str(dtype), "compile": compiled})
    keep_freed_memory()
    return dtype, compiled


def choose_micro_batch(config, seq_len, ranks=1):
    """Sequences per forward: as set, or the most that divide a rank's share in 16,384 tokens."""
    share = max(1, config.batch_size // ranks)
    if config.micro_batch_size:
        return min(config.micro_batch_size, share)
    return max(n for n in range(1, share + 1)
               if share % n == 0 and (n * seq_len <= 16384 or n == 1))


def keep_freed_memory():
    """Tell glibc to keep big freed buffers: faulting them in anew costs a quarter of each step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer by mmap, which free() would give back
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor shrink the heap


# ---- Ranks ---------------------------------------------------------------------------------------
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
    rooms = [HOUSE / room for room in ("configs/__init__.py", *ROOMS) if (HOUSE / room).is_file()]
    return hashlib.sha256("".join(map(file_sha256, rooms)).encode()).hexdigest()[:12]


def shard_model(model, config, device, dtype, compiled):
    """Make an OLMo on the meta device ready for training on `device`: empty, and in this order.

    Recomputation goes inside of the compiled region, so that the compiler plans it; FSDP's hooks
    stay outside, where they can gather a block's weights just before it and free them after.
    Weights, gradients' sums and optimiser are float32 slices; a block gathered is `dtype`.
    """
    model.compute_dtype = dtype
    checkpoint_activations(model, config.activation_checkpointing)
    if compiled:
        compile_model(model, device)
    if dist.is_initialized():
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)  # RoPE's table stays float32
        mesh = build_mesh(config.shard, device)
        for module in (*model.blocks, model):  # the root, last, takes embedding and head
            fully_shard(module, mesh=mesh, mp_policy=policy)
        # It warns that nobody may write into the nats, a view, in place; nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return model.to_empty(device=device)


def build_training(model_config, config, device, dtype, compiled):
    """An OLMo without weights yet, sharded and compiled as the config says, and its optimiser."""
    with torch.device("meta"):
        model = OLMo(model_config)
    shard_model(model, config, device, dtype, compiled)
    return model, build_optimizer(model, config)


@contextmanager
def evaluating(model):
    """For forwards without a backward: eager, as their shapes vary, and the weights split again."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
    if isinstance(model, FSDPModule):
        model.reshard()  # subtle: a forward without a backward leaves the root gathered


def build_mesh(shard, device):
    """All ranks in a row, or for hybrid sharding a row of ranks for each node."""
    if shard == "all":
        return init_device_mesh(device.type, (world_size(),))
    node = int(os.environ["LOCAL_WORLD_SIZE"])
    return init_device_mesh(device.type, (world_size() // node, node),
                            mesh_dim_names=("replicate", "shard"))


CHECKPOINTED_BLOCKS = {"none": 0, "one_in_four": 4, "one_in_three": 3, "one_in_two": 2,
                       "fine_grained": 1, "whole_layer": 1}  # one in so many


def checkpoint_activations(model, policy):
    """Let blocks keep their input alone, or with fine_grained the two big projections too."""
    every = CHECKPOINTED_BLOCKS[policy]
    options = dict(use_reentrant=False, preserve_rng_state=False)  # there is no dropout
    if policy == "fine_grained":
        widths = {3 * model.config.d_model, 2 * model.config.mlp_hidden_size}

        def keep_wide_products(context, op, *args, **kwargs):
            wide = op == torch.ops.aten.mm.default and args[1].shape[1] in widths
            return CheckpointPolicy.MUST_SAVE if wide else CheckpointPolicy.PREFER_RECOMPUTE
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts,
                                                  keep_wide_products)

    def forward(block, *args):  # one function for all blocks, so that it compiles once
        return checkpoint(lambda *inputs: Block.forward(block, *inputs), *args, **options)
    for block in model.blocks[::every] if every else ():
        block.forward = types.MethodType(forward, block)


def compile_model(model, device):
    """Compile each block, and the head with its loss.

    # subtle: the embedding stays outside: its compiled gradient adds up atomically, in any order,
    # and a resumed run could not be bit-exact. Nor could it with one kernel for all lengths, once a
    # second one has come.
    """
    if device.type == "cpu":
        # What takes no matrix product is computed anew in the backward, inside of its kernels: 0.7
        # to 0.8 times the memory in no more time (python -m tests.bench cpu). Not for long
        # sequences: SDPA would be computed anew as well. The setting is the whole process's.
        functorch_config.aggressive_recomputation = model.config.max_seq_len <= PLAIN_AT_MOST
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    model.head_nats = torch.compile(head_nats, dynamic=False)


def own_part(tensor, parameter):
    """Of a full tensor, what this rank holds of the parameter."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements,
                             src_data_rank=None)  # every rank has it: nothing is sent


# ---- Optimiser and schedule ----------------------------------------------------------------------

def build_optimizer(model, config):
    """AdamW with OLMo's two groups: matrices decay, the embedding (also a tied head) does not.

    The moments exist from the start, so that a checkpoint of any step has the same tensors.
    """
    decayed = [p for name, p in model.named_parameters() if name != "wte.weight"]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": [model.wte.weight], "weight_decay": 0.0}]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),
                                  eps=config.eps, fused=fused)
    for p in model.parameters():
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def lr_at_step(step, config):
    """The learning rate of step `step`, the first being 1 (official olmo/optim.py).

    Warm-up from a tenth of the peak, then linear or cosine to min_lr at decay_steps, then flat.
    OLMo-7B's final anneal is the linear one with its warm-up already over: lr 2.3e-5,
    min_lr 2.3e-8, warmup_steps 556000, decay_steps 557000.
    """
    last = config.decay_steps or config.max_steps
    if step < config.warmup_steps:
        return config.lr * (0.1 + 0.9 * step / config.warmup_steps)
    if step >= last:
        return config.min_lr
    progress = (step - config.warmup_steps) / (last - config.warmup_steps)
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.lr - (config.lr - config.min_lr) * progress


def clip_at_step(step, config):
    """The limit of the gradient's norm at a step; OLMo-7B starts with ten times the usual one.

    # subtle: official OLMo sets the limit after it has clipped, so the rule lags by a step.
    """
    early = 2 <= step <= config.grad_clip_warmup_steps + 1 and config.grad_clip_warmup_steps
    return config.grad_clip * (config.grad_clip_warmup_factor if early else 1) or math.inf


# ---- The step ------------------------------------------------------------------------------------

def train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm, reduce_every=False):
    """One update from this rank's `micro_batches`; {loss, grad_norm, ...} of the global batch.

    `loss_fn(model, batch)` gives (summed loss, count), and may add {name: sum} of what else is to
    be logged. The loss is the sum over all micro-batches and ranks by their whole count, so that no
    way of cutting the batch changes it; so is what else there is. grad_norm is the global L2 norm
    before clipping. reduce_every: sum the gradients over the ranks after each micro-batch, not only
    the last. Raises FloatingPointError on every rank, before the weights are touched, if the loss
    or the gradient is not finite.
    """
    total, count, others = 0.0, 0, Counter()
    for i, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            # subtle: it counts when the forward begins, not at backward()
            model.set_requires_gradient_sync(reduce_every or i == len(micro_batches) - 1)
        summed, n, *beside = loss_fn(model, batch)
        summed.backward()
        total, count = total + summed.detach(), count + n
        for name, value in beside[0].items() if beside else ():
            others[name] += value
    total, count, *values = reduce_sum(torch.stack(
        [total, *(value.to(total) for value in (count, *others.values()))]))
    gradients = [p.grad for p in model.parameters()]
    scale = world_size() / count  # FSDP has averaged over the ranks; a sum is wanted
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    grad_norm = grad_norm * scale
    metrics = {"loss": (total / count).item(), "grad_norm": grad_norm.item(), **{
        name: (value / count).item() for name, value in zip(others, values, strict=True)}}
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        optimizer.zero_grad()
        raise FloatingPointError(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
    scale *= (max_norm / (grad_norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_, in the same pass
    for gradient in gradients:
        gradient.mul_(scale)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def pretraining_loss(model, batch):
    """(summed nats, count) of a batch's next tokens."""
    nats = model(batch["tokens"], targets=batch["targets"])
    return next_token_loss(nats, batch["loss_mask"])


def cut_batch(batch, rows, device):
    """A batch as micro-batches of at most `rows` rows, on `device`."""
    B = len(batch["tokens"])
    return [{key: tensor[i:i + rows].to(device) for key, tensor in batch.items()}
            for i in range(0, B, rows)]


def batch_hash(tokens):
    """A hash of the tokens (B, T) of all ranks, whose rows may come in any order: their sum."""
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in tokens.numpy()]
    own = sum(int.from_bytes(digest, "big", signed=True) for digest in digests)
    wrapped = (own + 2**63) % 2**64 - 2**63  # int64 sums wrap around, in torch as here
    return f"{reduce_sum(torch.tensor(wrapped)).item() % 2**64:016x}"


# ---- Checkpoints ---------------------------------------------------------------------------------

def training_tensors(model, optimizer):
    """{name: tensor} of all that training changes: the weights, AdamW's moments and counts."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors.update((f"optimizer.{name}.{key}", value)
                       for key, value in optimizer.state[p].items())
    return tensors


def save_checkpoint(run, state, model, optimizer):
    """Write RUN/step000500: tensors through DCP, and state.json with each file's size and SHA-256.

    Every rank writes and hashes its own slices; another number of ranks can load them. It is
    written under another name and renamed when all are done: one that exists is whole, a failed one
    is gone. There is no random state to save: training draws nothing, and the data's order is a
    function of the step.
    """
    path = Path(run) / f"step{state['step']:06d}"
    if on_main(path.exists):
        return path
    aside = path.with_name(path.name + ".tmp")
    on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
    files, fault = {}, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is but one process
            dcp.save(training_tensors(model, optimizer), checkpoint_id=aside)
        files = records(aside.glob(f"__{rank()}_*"))
    except (OSError, CheckpointException) as error:
        fault = root_cause(error)
    everyone = gather((files, fault))
    on_main(lambda: finish_checkpoint(path, aside, state, everyone))
    return path


def finish_checkpoint(path, aside, state, everyone):
    """Write state.json over what all ranks have written, and give the checkpoint its name."""
    try:
        faults = [fault for _, fault in everyone if fault]
        if faults:
            raise OSError(faults[0])
        files = {name: record for theirs, _ in everyone for name, record in theirs.items()}
        files |= records(file for file in aside.iterdir() if file.name not in files)  # .metadata
        state = {**state, "files": dict(sorted(files.items()))}
        write_json(aside / "state.json", {**state, "sha256": state_digest(state)})
        aside.rename(path)
        fsync(path.parent)  # an older one may now be deleted: the new name must be on the disk
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written ({error}); make room, then "
                        "go on from the one before: "
                        f"python train.py --resume={path.parent}") from None


def records(files):
    """{name: its size and SHA-256}."""
    return {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
            for file in files}


def load_checkpoint(path, model, optimizer):
    """Restore weights and optimiser in place from a step directory, of any number of ranks."""
    read_step(path, training_tensors(model, optimizer))


def drop_old_checkpoints(run, keep_last, keep_every):
    """Delete all but the newest `keep_last` steps and the multiples of `keep_every`.

    They are renamed first: a step's name means whole.
    """
    if keep_last:
        for path in step_directories(run)[:-keep_last]:
            if not keep_every or int(path.name[4:]) % keep_every:
                doomed = path.rename(path.with_name(path.name + ".tmp"))
                shutil.rmtree(doomed)


# ---- The run directory ---------------------------------------------------------------------------

COMMANDS = {"resume", "overwrite", "accept_changes", "stop_after_minutes", "tensorboard",
            "verify"}  # what to do this time, not what the run is


def may_differ(key):
    """Whether a run may go on with another value of this key."""
    evaluation = key in EvalConfig.__dataclass_fields__  # changes no weight
    free = {"run_dir", "max_steps", "device", "dtype", "compile", "micro_batch_size", "workers",
            "shard", "activation_checkpointing", "reduce_every_micro_batch", "not_finite",
            "save_every_minutes", "watts", "pue", "kg_co2_per_kwh"}
    return (evaluation or key in free or key.endswith("_every_steps")
            or key.startswith("keep_"))


MEASURED = "eval.jsonl", "report.html"  # what eval.py writes of a run


def open_run(config, settings, fingerprint):
    """Look at what the run directory holds; returns (step directory to load or None, state).

    That is the newest whole step of the run, or for a new run the one of start_from. Raises
    UserError that names the keys, or the part of the data, that differ from the run's.
    """
    run, fresh = Path(config.run_dir), {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}
    start = Path(config.start_from) if config.start_from else None
    if config.overwrite:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--overwrite with --max-restarts would delete the run at each restart; "
                            "leave one of them away")
        if start and start.resolve().parent == run.resolve():
            raise UserError(f"--overwrite would delete {start}, which start_from names; choose "
                            "another --run_dir")
        clear_run(run)
    for leftover in run.glob("step*.tmp"):
        shutil.rmtree(leftover)
    if not step_directories(run):
        for name in MEASURED:  # of a run that was there before
            (run / name).unlink(missing_ok=True)
        if not start:
            return None, fresh
        saved = verify_step(start, config.verify == "sha256")
        check_changes(start, saved, {}, fingerprint, config)
        return start, fresh | {"step": saved["step"], "tokens": saved["tokens"]}
    try:
        step, saved = newest_step(run, config.verify == "sha256")
    except UserError as error:
        raise UserError(f"{error}; --overwrite starts the run anew") from None
    check_changes(run, saved, settings, fingerprint, config)
    say_new_schedule(saved, config)
    for damaged in step_directories(run)[step_directories(run).index(step) + 1:]:
        shutil.rmtree(run / f"damaged-{damaged.name}", ignore_errors=True)
        damaged.rename(run / f"damaged-{damaged.name}")  # make way for the same step, done anew
    earlier, before = saved.get("earlier_data", []), saved["data"]["data_sha256"]
    if before != fingerprint["data_sha256"]:
        earlier = [*earlier, before]  # what was trained on until here, for eval.py
    return step, fresh | {key: saved[key] for key in fresh if key in saved} | {
        "earlier_data": earlier}


def lacks_evaluation(run, step):
    """Whether a run's log reaches a step (it is no other run's) and has no evaluation of it."""
    rows = list(log_rows(run))
    return step > 0 and bool(rows) and not any(
        row["kind"] == "eval" and row["step"] == step for row in rows)


def check_changes(place, saved, settings, fingerprint, config):
    """UserError if settings or data are not those of a saved state; with accept_changes a line."""
    before = saved["config"]
    changed = [f"{key}: {before[key]} there, {value} now" for key, value in settings.items()
               if key in before and before[key] != value and not may_differ(key)]
    moved = [f"{key}: {saved['data'].get(key)} then, {value} now"
             for key, value in fingerprint.items() if saved["data"].get(key) != value]
    if config.accept_changes and changed + moved:
        print(f"{place}: goes on with changes: {'; '.join(changed + moved)}")
    elif changed:
        raise UserError(f"{place} holds another run ({'; '.join(changed)}); choose another "
                        "--run_dir, or --overwrite it, or --accept_changes")
    elif moved:
        raise UserError(f"{place}: its data has changed ({'; '.join(moved)}); restore it, or "
                        "--overwrite the run, or --accept_changes")


def say_new_schedule(saved, config):
    """Print it if the next step's learning rate is not what the run so far would have had there."""
    keys = TrainConfig.__dataclass_fields__
    before = TrainConfig(**{key: value for key, value in saved["config"].items() if key in keys})
    step = saved["step"] + 1
    then, now = lr_at_step(step, before), lr_at_step(step, config)
    if then != now and config.max_steps > saved["step"]:
        print(f"the schedule is another one: step {step} has the learning rate {now:.3g}, where "
              f"with max_steps={before.max_steps} it would have had {then:.3g}")


def hold_run(run):
    """Make the run directory and lock it against other processes; returns the open lock, its text.

    The text is this process's own, so that other ranks can tell whether they see the same file.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "a+")
    except OSError as error:
        raise UserError(f"run_dir={run}: no directory can be made there ({error})") from None
    # torchrun's restart waits, as a network's disk forgets a dead node's lock after a minute or two
    deadline = time.monotonic() + (150 if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(f"{run}: another process trains there ({lock.read()}); wait for "
                                "it, or choose another --run_dir") from None
            time.sleep(0.5)
        except OSError:
            print(f"{run}: its disk knows no locks; see to it that one process alone trains there")
            break
    text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
    lock.truncate(0)
    lock.write(text)
    lock.flush()
    os.fsync(lock.fileno())
    return lock, text


def share_run(run):
    """Hold the run directory for this process and its fellow ranks; returns the lock, to be kept.

    UserError where a rank does not see rank 0's directory, as on a node's own disk.
    """
    locks = []

    def hold():
        lock, text = hold_run(run)
        locks.append(lock)
        return text
    text, file = on_main(hold), run / ".lock"
    # subtle: rank 0 must not open the file again, for closing it would unlock it
    seen = rank() == 0 or (file.is_file() and file.read_text() == text)
    blind = {host for host in gather("" if seen else socket.gethostname()) if host}
    if blind:
        raise UserError(f"run_dir={run} is not the same directory on {', '.join(sorted(blind))}; "
                        "name one on a disk that all nodes share")
    return locks


def clear_run(run):
    """Delete what a run writes, and nothing else that may lie in its directory."""
    for path in [*step_directories(run), *run.glob("step*.tmp"), *run.glob("damaged-step*"),
                 *run.glob("tensorboard")]:
        shutil.rmtree(path)
    for path in run.glob("reference-*.json"):
        path.unlink()
    for name in ("config.json", "tokenizer.json", "manifest.json", "metrics.jsonl", *MEASURED):
        (run / name).unlink(missing_ok=True)


def describe_run(run, settings, folder, **facts):
    """Write config.json and tokenizer.json, and manifest.json: the data's with some `facts` added.

    folder: that of the data, or a Hugging Face directory, which has no manifest.
    """
    write_json(run / "config.json", settings)
    shutil.copyfile(folder / "tokenizer.json", run / "tokenizer.json")
    if (folder / "manifest.json").is_file():
        write_json(run / "manifest.json", {**read_json(folder / "manifest.json"), **facts})


# ---- The log -------------------------------------------------------------------------------------

class Log:
    """RUN/metrics.jsonl, one object a row; rows of steps to be done again are dropped.

    Rank 0 writes it, and TensorBoard's files if asked to; elsewhere it is silent.
    """

    def __init__(self, run, step, tensorboard=False):
        self.file = self.board = None
        if rank():
            return
        path, aside = run / "metrics.jsonl", run / "metrics.jsonl.tmp"
        aside.write_text("".join(json.dumps(row) + "\n" for row in log_rows(run)
                                 if row["step"] <= step and row["kind"] != "end"))
        aside.rename(path)
        self.file = open(path, "a")
        if tensorboard:
            self.board = open_tensorboard(run / "tensorboard", step)

    def write(self, kind, state, **row):
        """Append a row of one kind with the step, tokens and seconds of `state`."""
        if not self.file:
            return
        where = {key: state[key] for key in ("step", "tokens", "seconds")}
        try:
            self.file.write(json.dumps({"kind": kind, **where, **row}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name}: could not be written ({error}); make room, then "
                            "run the same command again") from None
        if self.board:
            accuracy = {name: result.get("accuracy") for name, result
                        in row.get("tasks", {}).items()}
            numbers = {**row, **row.get("bits_per_byte", {}), **accuracy}
            for key, value in numbers.items():
                if type(value) in (int, float):
                    self.board.add_scalar(f"{kind}/{key}", value, state["step"])
            self.board.flush()


def open_tensorboard(folder, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=step + 1)


def flops_per_token(config):
    """Of a forward and a backward: 6 a weight of the matrices, the head too, and attention's."""
    looked_up = 0 if config.weight_tying else config.embedding_size * config.d_model
    weights = count_parameters(config) - looked_up
    return 6 * weights + 12 * config.n_layers * config.d_model * config.max_seq_len


def peak_flops(device):
    """The bf16 peak of this GPU a second, or None if it is none of the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    if "h100" in name and ("pcie" in name or "nvl" in name):
        return None  # slower than the table's, which has the SXM board
    known = [flops for gpu, (flops, _, _) in GPUS.items() if gpu in name]
    return known[0] * 1e12 if known else None


def peak_memory(device):
    """The most GB that this rank has held: of the GPU's memory, or without one of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class PowerMeter:
    """The energy of this rank's device: NVML's power each second, or else `watts` by the clock.

    As in the paper (section 4.4) power is sampled and averaged over the time; unlike there it is
    the GPU's alone, not the node's. `metered` says which of the two it is.
    """

    def __init__(self, device, watts):
        self.device, self.watts, self.joules = device, watts, 0.0
        self.metered = device.type == "cuda" and self.read() is not None
        self.began = time.monotonic()
        if self.metered:
            threading.Thread(target=self.sample, daemon=True).start()

    def read(self):
        """The power now in watts, or None where no meter can be read."""
        try:
            power = torch.cuda.power_draw(self.device)
            return power if torch.version.hip else power / 1000  # AMD's comes in watts
        except Exception:  # no pynvml, no driver, no right: as many kinds of errors
            return None

    def sample(self):
        then = time.monotonic()
        while True:
            time.sleep(1.0)
            now, watts = time.monotonic(), self.read()
            self.joules += (self.watts if watts is None else watts) * (now - then)
            then = now

    def kwh(self):
        joules = self.joules if self.metered else self.watts * (time.monotonic() - self.began)
        return joules / 3.6e6


def carbon_kg(kwh, config):
    """kg of CO2 equivalent; paper, section 4.4."""
    return kwh * config.pue * config.kg_co2_per_kwh


def energy_line(kwh, metered, config):
    """Energy and carbon of a run, as in the paper's section 4.4."""
    if not kwh:
        return "energy: unknown; --watts=... states the power of a rank where no meter is read"
    source = "of the GPUs, metered" if metered else f"at {config.watts:g} W a rank, as stated"
    return (f"energy: {kwh:.4g} kWh ({source}) x {config.pue:g} (PUE) x "
            f"{config.kg_co2_per_kwh:g} kg/kWh = {carbon_kg(kwh, config):.3g} kg CO2eq")


class StopSignal:
    """While open, keeps the first Ctrl-C, SIGTERM or alarm in `number`.

    Alone, a second signal acts at once. Under torchrun it does not: the launcher passes on what the
    terminal has sent already, and kills who is still there after 30 s.
    """

    def __init__(self, deadline=math.inf):
        self.deadline = deadline  # of time.monotonic(): then an alarm rings

    def __enter__(self):
        self.number, self.before, self.parent = 0, {}, os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self.before[number] = signal.signal(number, self.receive)
        if self.deadline < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self.deadline - time.monotonic()))
        return self

    def receive(self, number, frame):
        if self.number and (self.number != signal.SIGALRM or world_size() > 1):
            return
        self.number = number
        if number == signal.SIGALRM:
            tqdm.write("stop_after_minutes: stopping after this step")
        elif world_size() == 1:
            tqdm.write("stopping after this step; once more stops at once")
            self.restore()

    def reason(self):
        """The signal to leave by, or 0; a rank whose launcher was killed leaves too."""
        orphaned = world_size() > 1 and os.getppid() != self.parent
        return self.number or (signal.SIGTERM if orphaned else 0)

    def restore(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


# ---- The plan ------------------------------------------------------------------------------------

def plan_memory(model_config, config, ranks, rows):
    """{part: bytes} that one GPU holds at the worst moment of a step of `rows` sequences a pass.

    Reckoned from what autograd keeps of the eager model on a GPU; compiled it needs less. The tests
    hold it within 15 % of torch's own memory trackers. On top come the driver and fragments: 2 GB.
    """
    D, F, L = model_config.d_model, model_config.mlp_hidden_size, model_config.n_layers
    V, tokens = model_config.embedding_size, rows * model_config.max_seq_len
    width = 4 if config.dtype == "float32" else 2  # bytes of an activation or a gathered weight
    weights = count_parameters(model_config)
    block = 4 * D * D + 3 * D * F
    root = weights - L * block  # embedding and head
    slices = ranks if config.shard == "all" else min(ranks, 8)  # the node has 8
    one_pass = rows * ranks >= config.batch_size
    whole_gradients = ranks > 1 and not one_pass and not config.reduce_every_micro_batch

    # What a block keeps for the backward. With one rank that includes its weights' bf16 copies.
    casts = width * block if ranks == 1 and width == 2 else 0
    everything = (10 * D + 4 * F) * width * tokens + casts
    every = CHECKPOINTED_BLOCKS[config.activation_checkpointing]
    fine = config.activation_checkpointing == "fine_grained"
    little = (4 * D + 2 * F if fine else D) * width * tokens
    few = -(-L // every) if every else 0
    kept = (L - few) * everything + few * little

    # The worst moment is the loss, with three float32 tensors the size of the logits, or the
    # backward of the last block, where it is computed again and its gradients reduced.
    gathered = 2 * width * block if ranks > 1 else 0  # this block's weights and the next one's
    at_the_loss = 3 * 4 * V * tokens + (gathered / 2 or width * V * D)
    in_the_block = (everything if every else 0) + gathered + (width + 4) * block + width * V * D
    return {"weights": 4 * weights / slices, "AdamW": 8 * weights / slices,
            "gradients": 4 * weights / (1 if whole_gradients else slices),
            "gathered weights": width * root if ranks > 1 else 0,
            "activations": kept, "at the worst moment": max(at_the_loss, in_the_block)}


def print_plan(model_config, config, plan):
    """Memory per GPU by part, tokens, days, energy, carbon and disk of a config; trains nothing."""
    tflops, capacity, watts = GPUS[plan.gpu]
    weights = count_parameters(model_config)
    before = re.fullmatch(r"step(\d+)", Path(config.start_from).name)  # an anneal's first part
    steps = config.max_steps - (int(before[1]) if before else 0)
    tokens = steps * config.batch_size * model_config.max_seq_len
    print(f"{weights:,} parameters; {steps:,} steps of {config.batch_size:,} x "
          f"{model_config.max_seq_len:,} tokens: {tokens / 1e9:,.4g} G tokens")
    if config.batch_size % plan.gpus:
        near = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        near = sorted(near, key=lambda n: abs(n - plan.gpus))[:2]
        print(f"  batch_size={config.batch_size} does not divide by {plan.gpus} GPUs: use "
              f"{' or '.join(map(str, sorted(near)))}, or --batch_size="
              f"{max(1, round(config.batch_size / plan.gpus)) * plan.gpus}, another run")
    rows = choose_micro_batch(config, model_config.max_seq_len, plan.gpus)
    print(f"\nmemory of each of {plan.gpus:,} {plan.gpu} ({capacity} GiB), {rows} sequences at a "
          f"time, activation_checkpointing={config.activation_checkpointing}:")
    parts = plan_memory(model_config, config, plan.gpus, rows)
    for part, size in [*parts.items(), ("peak", sum(parts.values()))]:
        print(f"  {part:<20}{size / 2**30:>9.2f} GiB")
    print(advice(model_config, config, plan, rows))
    seconds = tokens * flops_per_token(model_config) / (plan.gpus * tflops * 1e12
                                                        * plan.assumed_mfu)
    kwh = plan.gpus * watts / 1000 * seconds / 3600
    print(f"\nat {plan.assumed_mfu:.0%} MFU of {tflops} TFLOP/s (assumed; --assumed_mfu):\n"
          f"  {tokens / seconds:,.0f} tokens/s, {tokens / seconds / plan.gpus:,.0f} a GPU\n"
          f"  {seconds / 86400:,.1f} days, {plan.gpus * seconds / 3600:,.0f} GPU hours\n"
          f"  {kwh:,.0f} kWh at {watts} W a GPU x {config.pue:g} (PUE) x "
          f"{config.kg_co2_per_kwh:g} kg/kWh = "
          f"{carbon_kg(kwh, config) / 1000:,.2f} t CO2eq")
    saved = -(-steps // config.save_every_steps) if config.save_every_steps else 1
    kept = min(saved, config.keep_last or saved)
    if config.keep_every and config.save_every_steps:
        kept = min(saved, kept + steps // math.lcm(config.keep_every, config.save_every_steps))
    print(f"  {12 * weights / 1e9:,.1f} GB a checkpoint, {12 * weights * kept / 1e12:,.2f} TB for "
          f"the {kept:,} that are kept")


def advice(model_config, config, plan, rows):
    """One line: that it fits, or the mildest setting with which it would."""
    room = 2**30 * GPUS[plan.gpu][1] - 2e9  # of the driver and fragments

    def fits(rows, ranks=plan.gpus, **changes):
        parts = plan_memory(model_config, replace(config, **changes), ranks, rows)
        return sum(parts.values()) < room
    if fits(rows):
        return "  it fits" + ("" if rows * 2 > config.batch_size // plan.gpus or not fits(rows * 2)
                              else f"; so would --micro_batch_size={rows * 2}")
    fewer = dict.fromkeys(n for n in (rows, rows // 2, rows // 4, 1) if n)
    reduces = sorted({config.reduce_every_micro_batch, plan.gpus > 1})
    for n, reduce_every, policy in itertools.product(fewer, reduces, CHECKPOINTED_BLOCKS):
        if fits(n, activation_checkpointing=policy, reduce_every_micro_batch=reduce_every):
            added = reduce_every and not config.reduce_every_micro_batch
            return (f"  it does not fit; --activation_checkpointing={policy} "
                    f"--micro_batch_size={n}{' --reduce_every_micro_batch' * added} would")
    for ranks in range(plan.gpus, 8 * plan.gpus + 1):
        if fits(1, ranks, activation_checkpointing="whole_layer", reduce_every_micro_batch=True,
                shard="all"):
            return f"  it does not fit, whatever is computed again; it would on {ranks} GPUs"
    return "  it does not fit, whatever is computed again; take many more GPUs"


# ---- The loop ------------------------------------------------------------------------------------

def check_vocabulary(config, tokenizer):
    """The ids in the model's config must be the tokenizer's: a wrong EOS would go unnoticed."""
    wanted = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    wrong = [f"--{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        room = (f" --embedding_size={tokenizer.vocab_size}"
                if config.embedding_size < tokenizer.vocab_size else "")
        raise UserError(f"the model's ids are not the tokenizer's; set {' '.join(wrong)}{room}, or "
                        "mend config.json of a Hugging Face directory that is tuned")


def train(model_config, data_config, eval_config, config):
    """Train a run from its start, or its newest checkpoint, to max_steps; returns the exit code."""
    began, run = time.monotonic(), Path(config.run_dir)
    settings = flat(model_config, data_config, eval_config, config)
    settings = {key: value for key, value in settings.items() if key not in COMMANDS}

    # The machine
    number, ranks, device = setup_distributed(config.device)
    dtype, compiled = agree_on_machine(config, settings, device)
    rows = choose_micro_batch(config, model_config.max_seq_len, ranks)

    # The data: rank 0 builds it, on a disk that all nodes see
    on_main(lambda: open_suites(eval_config) and None)  # a typing error is met before hours of work
    folder = on_main(lambda: build_data(data_config), patience=timedelta(days=2))
    print_table(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    check_vocabulary(model_config, tokenizer)
    suites = open_suites(eval_config, lambda: held_out_files(folder))
    shards = TokenShards(folder, model_config.max_seq_len)
    batches = Batches(shards, config.batch_size, data_config.seed, folder)
    batches(1, number, ranks)  # what is wrong with its size is said before the run begins
    fingerprint = batches.fingerprint()
    check_agreement(fingerprint)

    # The run: new, or as it was left
    lock = share_run(run)  # noqa: F841  held until this process ends
    start, state = on_main(lambda: open_run(config, settings, fingerprint),
                           patience=timedelta(hours=2))  # it reads the whole checkpoint once
    missed = on_main(lambda: lacks_evaluation(run, state["step"]))
    if state["step"] > config.max_steps or state["step"] == config.max_steps and not missed:
        print(f"{run}: finished, at step {state['step']} of {config.max_steps}")
        return 0
    state.update(config=settings, data=fingerprint, torch=torch.__version__)

    # The model and its optimiser
    model, optimizer = build_training(model_config, config, device, dtype, compiled)
    if start:
        load_checkpoint(start, model, optimizer)
        print(f"{run}: goes on after step {state['step']}")
    else:
        init_weights(model, data_config.seed, own_part)
    on_main(lambda: describe_run(run, settings, folder, order=fingerprint))
    print_run(run, model, config, batches, rows)

    # The steps
    of = [asked(suite, eval_config, str(dtype).removeprefix("torch.")) for suite in suites]

    def draw_sample():
        with evaluating(model):
            return sample_text(model, tokenizer, eval_config, agree=as_on_main)

    def evaluate():
        with evaluating(model):
            results = evaluate_suites(model, tokenizer, suites, eval_config, number, ranks,
                                      reduce_sum) | {"of": of}
            if ranks == 1:  # several would gather the whole model for each token
                results["samples"] = [draw_sample()]
        return results

    deadline = began + 60 * config.stop_after_minutes if config.stop_after_minutes else math.inf
    ended_by, results = train_loop(
        config, run, state, model, optimizer,
        functools.partial(batches, rank=number, world_size=ranks), pretraining_loss, evaluate,
        functools.partial(documents_of, run), rows, deadline, missed)
    if ended_by:
        launcher = "python" if ranks == 1 else "torchrun ..."
        print(f"stopped after step {state['step']}, which is saved; go on: {launcher} train.py "
              f"--resume={run}")
        return 128 + ended_by

    print(f"\nafter step {state['step']}, {state['seconds']:.0f} s:")
    if results["sums"] or not results["tasks"]:
        print(domains_table(results["sums"]))
    if results["tasks"]:
        print(tasks_table(results["tasks"]))
    [sample] = results.get("samples") or [draw_sample()]
    print(f"\na sample:\n{sample}\n\nnext:")
    print(f"  python eval.py {run}\n  python eval.py sample {run} --prompt=\"def read_\"\n"
          f"  python eval.py report {run}\n  python model.py export {run} OUT")
    return 0


def print_run(run, model, config, batches, rows):
    shards = batches.shards
    print(f"run: {run}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.max_steps:,} steps of {config.batch_size} x {shards.seq_len} tokens, "
          f"{rows} sequences at a time\n"
          f"  an epoch: {batches.steps_per_epoch:,} steps; {len(shards) % config.batch_size} "
          f"sequences and {shards.tail_tokens} tokens at the ends of files do not fill one")


def documents_of(run, step):
    """The documents of a step's batch, a line each, for the log of a step that went wrong."""
    data = RunData(run)
    if not data.manifest["sources"]:  # the side files of ready token files are slow to search
        return [f"sequence {sequence}: instance {instance}"
                for sequence, instance in enumerate(data.batches.instances(step).tolist())]
    return [f"sequence {span.sequence}: {span.document['source']}/{span.document['id']} "
            f"{span.document['metadata']['provenance']}" for span in data.trace(step)]


def report_not_finite(log, config, state, step, error, documents):
    """Log the documents of a step whose loss or gradient is not finite; UserError to stop at it."""
    skipped = config.not_finite == "skip"
    try:
        lines = documents(step)
    except Exception as fault:  # what is wrong with the data must not hide what is with the step
        lines = [f"not traced: {fault}"]
    log.write("not_finite", {**state, "step": step}, error=str(error), skipped=skipped,
              documents=lines)
    if not skipped:
        raise UserError(f"step {step}: {error}; its documents are in {log.file.name}, and the "
                        "newest checkpoint is from before it. A lower --lr, in a run of its own, "
                        "may hold; --not_finite=skip goes on without the step")
    tqdm.write(f"step {step}: {error}; skipped, the weights are as they were")


@dataclass
class Recent:
    """What happened since the last row of the log; evaluations and checkpoints are not timed."""

    steps: int = 0
    clipped: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, clipped, tokens, seconds):
        self.steps, self.clipped = self.steps + 1, self.clipped + clipped
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def rates(self, flops, device):
        """Speed, model FLOPs utilisation and the share of steps that were clipped."""
        speed, peak = self.tokens / self.seconds, peak_flops(device)
        return {"clipping_rate": self.clipped / self.steps, "tokens_per_second": round(speed, 1),
                "tokens_per_second_per_device": round(speed / world_size(), 1),
                "mfu": round(speed / world_size() * flops / peak, 4) if peak else None}


def log_step(log, state, row, device, batch):
    """A row of kind train: what all ranks have seen of a step, the peak memory of the fullest."""
    if "rewards/margins" not in row:  # DPO's loss is of pairs, not of tokens
        row = {**row, "perplexity": math.exp(min(row["loss"], 700))}
    log.write("train", state, **row,
              peak_memory_gb=round(largest(peak_memory(device))[0], 3), kwh=state["kwh"],
              world_size=world_size(), batch_hash=batch_hash(batch["tokens"]))


def log_evaluation(log, state, results):
    log.write("eval", state, **results)
    tuned = {name: f"{value:.4f}" for name, value in results.get("tuned", {}).items()}
    accuracy = {name: f"{100 * result['accuracy']:.1f}%" for name, result
                in results["tasks"].items() if "accuracy" in result}
    bits = results["bits_per_byte"] | {name: result["bits_per_byte"] for name, result
                                       in results["tasks"].items() if name not in accuracy}
    for what, found in (("bits per byte", {name: f"{value:.3f}" for name, value in bits.items()}),
                        ("accuracy", accuracy), ("held-out answers", tuned)):
        if found:
            tqdm.write(f"step {state['step']}: {what}: "
                       + ", ".join(f"{name} {value}" for name, value in found.items()))


def train_loop(config, run, state, model, optimizer, batches, loss_fn, evaluate, documents, rows,
               deadline=math.inf, missed=False, check=lambda step, metrics: None):
    """Take the steps after state["step"] up to max_steps; log, save and evaluate as they fall due.

    `batches(step)` gives this rank's batch, `evaluate()` what evaluate_suites gives,
    `documents(step)` the lines that the log gets for a batch that went wrong; `deadline` is of
    time.monotonic(); `missed`: the state was saved, its evaluation cut off; `check(step, metrics)`
    may raise at a step that cannot be right. `state` {step, tokens, seconds, kwh, ...} is kept up
    to date. Returns (the signal that ended it or 0, the last evaluation's result); whatever ends
    it, all ranks end after the same step.
    """
    log, device = Log(run, state["step"], config.tensorboard), model.wte.weight.device
    meter, kwh_before = PowerMeter(device, config.watts), state["kwh"]
    began, saved_at = time.perf_counter() - state["seconds"], time.monotonic()
    recent, flops, ended_by, results = Recent(), flops_per_token(model.config), 0, None

    def due(every):
        return state["step"] == config.max_steps or (every and state["step"] % every == 0)

    def count_energy():
        own = torch.tensor(meter.kwh(), dtype=torch.float64)
        state["kwh"] = kwh_before + reduce_sum(own).item()

    def save():
        count_energy()
        save_checkpoint(run, state, model, optimizer)
        on_main(lambda: drop_old_checkpoints(run, config.keep_last, config.keep_every))
        return time.monotonic()

    with (StopSignal(deadline) as stop, tqdm(total=config.max_steps, initial=state["step"],
                                             unit="step", disable=rank() > 0) as bar):
        if missed and due(config.eval_every_steps):
            results = evaluate()
            log_evaluation(log, state, results)
        while state["step"] < config.max_steps and not ended_by:
            tick, step = time.perf_counter(), state["step"] + 1
            batch, lr = batches(step), lr_at_step(step, config)
            max_norm, metrics = clip_at_step(step, config), None
            try:
                metrics = train_step(model, optimizer, cut_batch(batch, rows, device), loss_fn, lr,
                                     max_norm, config.reduce_every_micro_batch)
            except FloatingPointError as error:
                on_main(functools.partial(report_not_finite, log, config, state, step, error,
                                          documents), patience=timedelta(hours=2))
            if metrics:
                check(step, metrics)
            padding = batch["tokens"] == model.config.pad_token_id  # there is some in tuning
            tokens = reduce_sum((~padding).sum()).item()
            clipped = bool(metrics) and metrics["grad_norm"] > max_norm
            recent.add(clipped, tokens, time.perf_counter() - tick)
            state.update(step=step, tokens=state["tokens"] + tokens,
                         seconds=round(time.perf_counter() - began, 3))
            bar.update()
            minutes = (time.monotonic() - saved_at) / 60
            late = bool(config.save_every_minutes) and minutes >= config.save_every_minutes
            ended_by, late = map(int, largest(stop.reason(), late))  # what one rank says, all do
            if metrics and due(config.log_every_steps):
                count_energy()
                row = {**metrics, "lr": lr, **recent.rates(flops, device)}
                log_step(log, state, row, device, batch)
                bar.set_postfix_str("loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
                                    .format(**row))
                recent = Recent()
            if ended_by or due(config.save_every_steps) or late:
                saved_at = save()  # first of all: torchrun gives it 30 s, an evaluation may fail
            if due(config.eval_every_steps):
                results = evaluate()
                log_evaluation(log, state, results)
        count_energy()
        bar.close()
        print(energy_line(state["kwh"], meter.metered, config))
        if state["step"] == config.max_steps:
            log.write("end", state, kwh=state["kwh"], kg_co2=carbon_kg(state["kwh"], config))
            return 0, results
        return ended_by, results


@on_all_ranks
def main(argv):
    schemas = (ModelConfig, DataConfig, EvalConfig, TrainConfig, PlanConfig)
    resumed = [word.partition("=")[2] for word in argv if word.startswith("--resume=")]
    if resumed:
        saved = Path(resumed[-1]) / "config.json"
        if not saved.is_file():
            raise UserError(f"--resume={resumed[-1]}: no run there; train.py CONFIG starts one")
        if "method" in read_json(saved):
            raise UserError(f"--resume={resumed[-1]}: a tuned run; adapt.py --resume goes on")
        argv = [str(saved), f"--run_dir={resumed[-1]}", *argv]
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python train.py configs/tiny.py) or --resume=RUN")
    *configs, plan = load_config(argv, *schemas)
    if not plan.plan:
        return train(*configs)
    if os.environ.get("RANK", "0") == "0":
        print_plan(configs[0], configs[3], plan)
    return 0


if __name__ == "__main__":
    run_main(main)
