"""When memory runs out in a run: what the run did, and which options are left to take less.

The order is that of docs/scale.md. No option changes a result beyond rounding.
"""

import math

from scaling.machine import choose_micro_batch
from scaling.ranks import world_size
from support.memory import Half
from support.tuned import choose_rows

POLICIES = ("one_in_two", "fine_grained", "whole_layer")  # from fast to small


def where_and_remedies(run):
    """Returns (where, remedies) of a Run, as about_memory in support/memory.py takes them."""
    config = run.config
    seq_len = run.model_config.max_seq_len
    if run.doing == "saving":
        return f"while step {run.step} was saved", []
    if run.doing:
        # one sequence of the context length is the least
        less = Half("eval_batch_tokens", run.settings["eval_batch_tokens"], seq_len)
        return f"in the evaluation after step {run.step}", [less]
    if "method" in run.settings:  # a tuning, in which a row holds at least one example
        examples = math.ceil(config.batch_size / world_size())
        rows = min(choose_rows(config, run.model_config), examples)
    else:
        rows = choose_micro_batch(config, seq_len, world_size())
    where = f"at step {run.step + 1}, with {rows} x {seq_len:,} tokens at a time"
    fewer_rows = Half("micro_batch_size", rows, note=", which changes no result")
    remedies = [fewer_rows, policy_left(config)]
    if world_size() > 1 and not config.reduce_every_micro_batch:
        remedies.append("--reduce_every_micro_batch")
    return where, remedies


def policy_left(config):
    """The option that recomputes more than the run does; None if it recomputes all."""
    now = config.activation_checkpointing
    next_one = POLICIES.index(now) + 1 if now in POLICIES else 0
    if next_one == len(POLICIES):
        return None
    return f"--activation_checkpointing={POLICIES[next_one]}, which is slower"
