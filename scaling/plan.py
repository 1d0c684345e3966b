"""The plan: memory, days, energy and carbon of a config, before anything is rented."""

import itertools
import math
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from configs import setting
from model import ModelConfig, build_model, count_parameters
from scaling.machine import GPUS, carbon_kg, choose_micro_batch, flops_per_token
from scaling.ranks import launched
from scaling.sharding import CHECKPOINTED_BLOCKS
from support.files import UserError

GPUS_PER_NODE = 8
RESERVED_BYTES = 2e9  # for the driver, and for memory that fragments make unusable


@dataclass(frozen=True)
class PlanConfig:
    """What --plan assumes."""

    plan: bool = setting(False, "Train nothing: print memory per GPU, tokens, days and energy.")
    gpus: int = setting(8, "How many GPUs.")
    gpu: Literal[*GPUS] = setting(
        "h100", "Which GPU; an MI250 or MI250X counts as two, as torch sees it.")
    assumed_mfu: float = setting(0.4, "Share of the GPU's peak FLOP/s; others report 0.4 to 0.5.")

    def __post_init__(self):
        if self.gpus < 1:
            raise UserError(f"gpus={self.gpus}: must be at least 1")
        if not 0 < self.assumed_mfu <= 1:
            raise UserError(f"assumed_mfu={self.assumed_mfu}: must be above 0 and at most 1")


def print_plan(model_config, config, plan, build_optimizer):
    """On rank 0: print what training `config` on plan.gpus GPUs takes; trains nothing.

    build_optimizer(model, config): of train.py; its optimiser's state is counted.
    """
    if launched().rank > 0:
        return
    state_bytes = state_bytes_per_weight(config, build_optimizer)
    steps = config.max_steps - steps_before(config)
    tokens = steps * config.batch_size * model_config.max_seq_len
    print(f"{count_parameters(model_config):,} parameters; {steps:,} steps of "
          f"{config.batch_size:,} x {model_config.max_seq_len:,} tokens: {tokens / 1e9:,.4g} G "
          "tokens")
    if config.fresh_optimizer:
        print(f"  step 1 begins with the weights of {config.start_from}, of which none is read now")
    print_batch_size_hint(config, plan.gpus)
    print_memory(model_config, config, plan, state_bytes)
    print_time_and_energy(model_config, config, plan, tokens)
    print_disk(model_config, config, steps, state_bytes)


def say_unused(argv):
    """On rank 0: print which options of a training are for --plan alone."""
    given = {word[2:].partition("=")[0] for word in argv if word.startswith("--")}
    unused = sorted(given & {field.name for field in fields(PlanConfig)} - {"plan"})
    if unused and launched().rank == 0:
        print(f"--{', --'.join(unused)}: for --plan alone; this run does not use it (torchrun "
              "--nproc_per_node=N starts one on N GPUs)")


def steps_before(config):
    """The steps that were taken before start_from, as for an anneal; else 0."""
    if config.fresh_optimizer:
        return 0
    match = re.fullmatch(r"step(\d+)(?:-unsharded)?", Path(config.start_from).name)
    return int(match[1]) if match else 0


def print_batch_size_hint(config, gpus):
    """If the GPUs do not divide the batch: which numbers of GPUs would, and which batch size."""
    if config.batch_size % gpus == 0:
        return
    divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
    nearest = sorted(divisors, key=lambda n: abs(n - gpus))[:2]
    choices = " or --gpus=".join(str(n) for n in sorted(nearest))
    batch_size = max(1, round(config.batch_size / gpus)) * gpus
    print(f"  batch_size={config.batch_size} is not a multiple of {gpus} GPUs: use "
          f"--gpus={choices}, or --batch_size={batch_size}, which is another run")


def state_bytes_per_weight(config, build_optimizer):
    """Bytes of optimiser state per weight (AdamW: 8), counted on a model of a few weights."""
    tiny = ModelConfig(d_model=16, n_layers=1, n_heads=1, mlp_hidden_size=16)
    model = build_model(tiny, seed=0)
    optimizer = build_optimizer(model, config)
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()
               if tensor.dim() > 0]  # not the step counters
    return sum(tensor.nbytes for tensor in moments) / sum(p.numel() for p in model.parameters())


# ---- Memory --------------------------------------------------------------------------------------

def print_memory(model_config, config, plan, state_bytes):
    """The memory of one GPU, part by part, and whether it fits."""
    micro_batch_size = choose_micro_batch(config, model_config.max_seq_len, plan.gpus)
    _, capacity, _ = GPUS[plan.gpu]
    print(f"\nmemory of each of {plan.gpus:,} {plan.gpu} ({capacity} GiB), {micro_batch_size} "
          f"sequences at a time, activation_checkpointing={config.activation_checkpointing}:")
    parts = plan_memory(model_config, config, plan.gpus, micro_batch_size, state_bytes)
    for part, size in parts.items():
        print(f"  {part:<20}{size / 2**30:>9.2f} GiB")
    print(f"  {'peak':<20}{sum(parts.values()) / 2**30:>9.2f} GiB")
    print(f"  {advice(model_config, config, plan, micro_batch_size, state_bytes)}")


def plan_memory(model_config, config, world_size, micro_batch_size, state_bytes=8):
    """{part: bytes} that one GPU holds at the worst moment of a step.

    Computed from what autograd keeps of the eager model on a GPU; a compiled model needs less. The
    tests hold it within 15 % of torch's own memory trackers.
    """
    D = model_config.d_model
    F = model_config.mlp_hidden_size
    V = model_config.embedding_size
    tokens = micro_batch_size * model_config.max_seq_len
    width = 4 if config.dtype == "float32" else 2  # bytes of an activation or a gathered weight
    weights = count_parameters(model_config)
    block_weights = 4 * D * D + 3 * D * F
    root_weights = weights - model_config.n_layers * block_weights  # embedding and head
    is_sharded = world_size > 1
    slices = world_size if config.shard == "all" else min(world_size, GPUS_PER_NODE)

    # FSDP keeps whole gradients from one micro-batch to the next, unless it reduces each of them.
    one_pass = micro_batch_size * world_size >= config.batch_size
    keeps_gradients = is_sharded and not one_pass and not config.reduce_every_micro_batch

    # What a block keeps for the backward; without FSDP, also the bf16 copies of its weights.
    copies = width * block_weights if not is_sharded and width == 2 else 0
    kept_by_block = (10 * D + 4 * F) * width * tokens + copies
    activations = kept_activations(model_config, config, tokens, width, kept_by_block)

    # The worst moment is one of two: the loss, with three float32 tensors the size of the logits,
    # or the backward of the last block, when it is recomputed and its gradients are reduced.
    gathered = 2 * width * block_weights if is_sharded else 0  # of this block and of the next
    head_gradient = width * V * D
    at_the_loss = 3 * 4 * V * tokens + (gathered / 2 if is_sharded else head_gradient)
    recomputed = kept_by_block if config.activation_checkpointing != "none" else 0
    in_the_block = recomputed + gathered + (width + 4) * block_weights + head_gradient
    return {"weights": 4 * weights / slices,
            "optimiser": state_bytes * weights / slices,
            "gradients": 4 * weights / (1 if keeps_gradients else slices),
            "gathered weights": width * root_weights if is_sharded else 0,
            "activations": activations,
            "at the worst moment": max(at_the_loss, in_the_block)}


def kept_activations(model_config, config, tokens, width, kept_by_block):
    """Bytes that all blocks keep between forward and backward, under activation_checkpointing."""
    D = model_config.d_model
    F = model_config.mlp_hidden_size
    interval = CHECKPOINTED_BLOCKS[config.activation_checkpointing]
    if not interval:
        return model_config.n_layers * kept_by_block
    recomputing = math.ceil(model_config.n_layers / interval)
    if config.activation_checkpointing == "fine_grained":
        kept_by_recomputing = (4 * D + 2 * F) * width * tokens  # input and two large projections
    else:
        kept_by_recomputing = D * width * tokens  # the input alone
    others = model_config.n_layers - recomputing
    return others * kept_by_block + recomputing * kept_by_recomputing


def advice(model_config, config, plan, micro_batch_size, state_bytes):
    """One line: that it fits, or the mildest setting with which it would."""
    capacity = 2**30 * GPUS[plan.gpu][1] - RESERVED_BYTES

    def fits(micro_batch_size, world_size=plan.gpus, **changes):
        changed = replace(config, **changes)
        parts = plan_memory(model_config, changed, world_size, micro_batch_size, state_bytes)
        return sum(parts.values()) < capacity

    if fits(micro_batch_size):
        double = micro_batch_size * 2
        if double <= config.batch_size // plan.gpus and fits(double):
            return f"it fits; so would --micro_batch_size={double}"
        return "it fits"
    # From mild to harsh: smaller micro-batches cost most speed, recomputation least.
    sizes = sorted({micro_batch_size, micro_batch_size // 2, micro_batch_size // 4, 1} - {0})
    reductions = sorted({config.reduce_every_micro_batch, plan.gpus > 1})
    for size, reduces, policy in itertools.product(sizes[::-1], reductions, CHECKPOINTED_BLOCKS):
        if fits(size, activation_checkpointing=policy, reduce_every_micro_batch=reduces):
            words = f"--activation_checkpointing={policy} --micro_batch_size={size}"
            if reduces and not config.reduce_every_micro_batch:
                words += " --reduce_every_micro_batch"
            return f"it does not fit; {words} would"
    # On more GPUs, with all that saves memory; at first on numbers of them that divide the batch.
    more = range(plan.gpus, 8 * plan.gpus + 1)
    for gpus in sorted(more, key=lambda n: config.batch_size % n > 0):
        batch_size = -(-config.batch_size // gpus) * gpus  # rounded up
        if fits(1, gpus, activation_checkpointing="whole_layer", reduce_every_micro_batch=True,
                shard="all", batch_size=batch_size):
            words = [f"--gpus={gpus}", "--activation_checkpointing=whole_layer",
                     "--micro_batch_size=1", "--reduce_every_micro_batch"]
            words += ["--shard=all"] * (config.shard != "all")
            words += [f"--batch_size={batch_size}"] * (batch_size != config.batch_size)
            return f"it does not fit, whatever is recomputed; {' '.join(words)} would"
    return ("it does not fit, whatever is recomputed, nor on 8 times the GPUs; use many more GPUs, "
            "or a smaller model")


# ---- Time, energy, disk --------------------------------------------------------------------------

def print_time_and_energy(model_config, config, plan, tokens):
    """Speed, days, kWh and CO2, from the assumed share of the GPUs' peak."""
    tflops, _, watts = GPUS[plan.gpu]
    flops = tokens * flops_per_token(model_config)
    seconds = flops / (plan.gpus * tflops * 1e12 * plan.assumed_mfu)
    speed = tokens / seconds
    gpu_hours = plan.gpus * seconds / 3600
    kwh = gpu_hours * watts / 1000
    tonnes = carbon_kg(kwh, config) / 1000
    print(f"\nat {plan.assumed_mfu:.0%} MFU of {tflops} TFLOP/s (assumed; --assumed_mfu):")
    print(f"  {speed:,.0f} tokens/s, {speed / plan.gpus:,.0f} per GPU")
    print(f"  {seconds / 86400:,.1f} days, {gpu_hours:,.0f} GPU hours")
    print(f"  {kwh:,.0f} kWh at {watts} W per GPU x {config.pue:g} (PUE) x "
          f"{config.kg_co2_per_kwh:g} kg/kWh = {tonnes:,.2f} t CO2eq")


def print_disk(model_config, config, steps, state_bytes):
    """The size of a checkpoint, and of all that are kept: weights and optimiser state."""
    size = (4 + state_bytes) * count_parameters(model_config)
    due = {steps}
    for interval in (config.save_every_steps, config.keep_best and config.eval_every_steps):
        if interval:
            due.update(range(interval, steps, interval))
    saved = len(due)
    kept = min(saved, config.keep_last or saved)
    if config.keep_every and config.save_every_steps:
        also_kept = steps // math.lcm(config.keep_every, config.save_every_steps)
        kept = min(saved, kept + also_kept)
    kept = min(saved, kept + config.keep_best)
    print(f"  {size / 1e9:,.1f} GB per checkpoint, {size * kept / 1e12:,.2f} TB for the {kept:,} "
          "that are kept")
