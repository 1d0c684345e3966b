"""The plan: memory, days, energy and carbon of a config, before anything is rented."""

import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from model import count_parameters
from scaling.machine import GPUS, carbon_kg, choose_micro_batch, flops_per_token
from scaling.sharding import CHECKPOINTED_BLOCKS
from support.files import UserError


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
