"""Faster forwards where no gradient is asked for, put on the network from outside.

They compute what model.py computes, up to rounding. A reader who skips this file loses nothing of
the recipe. The gains are in docs/speed.md.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn as nn

from model import Linear, linear
from scaling.machine import cpu_flags

PACKED_AT_MOST = 2**29  # weights: to pack a larger model takes longer than it saves
PACKED_ROWS = 64  # rows of x: oneDNN's order is fast for as few rows as it was made for


@contextmanager
def fixed_weights(model):
    """Compute fast within this block: `with fixed_weights(model): generate(model, ...)`.

    Within it the weights must not change; at its end the model is as it was. Forwards without
    gradients run in inference mode, and
    - where the stream has another dtype than the weights, each weight is cast once and not at each
      use, if the copies fit into the device's memory;
    - on a CPU, from the second id of an answer on, products read weights in oneDNN's own order,
      if that is faster on this chip.
    A sharded model is left alone. A stream of ids that begins in the block must end in it: outside
    of it torch refuses to write into a cache that has grown in inference mode.
    """
    if is_sharded(model):
        yield
        return
    plain_forward = model.forward
    before = model.__dict__.get("forward")  # a wrapper that somebody else has put on, or None
    copies = Copies(model)

    def forward(tokens, *args, **kwargs):
        if torch.is_grad_enabled():
            return plain_forward(tokens, *args, **kwargs)
        with torch.inference_mode():  # no bookkeeping for gradients
            copies.prepare(is_one_id=tokens.shape[1] == 1)
            return plain_forward(tokens, *args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        copies.remove()
        del model.forward
        if before is not None:
            model.forward = before


class Copies:
    """Copies of one model's weights, each made when a forward first needs it."""

    def __init__(self, model):
        self.model = model
        self.dtype = model.stream_dtype
        self.casts = model.wte.weight.dtype != self.dtype and copies_fit(model)
        self.can_pack = is_packable(model)
        self.packs = False
        self.before = {}  # {module: what stood where its fast product stands now, or None}

    def prepare(self, is_one_id):
        """Put fast products on the model, unless they are there or would not be faster.

        A prompt is read before anything is packed: its products have too many rows to gain.
        """
        self.packs = self.packs or (self.can_pack and is_one_id)
        if self.before or not (self.casts or self.packs):
            return
        for module in self.model.blocks.modules():
            # a subclass with a forward of its own computes something else, and is left alone
            if isinstance(module, Linear) and type(module).forward is Linear.forward:
                self.before[module] = module.__dict__.get("forward")
                module.forward = self.product_of(module.weight)
        self.before[self.model] = self.model.head_product
        self.model.head_product = self.product_of(self.model.head_weight())

    def product_of(self, weight):
        """model.linear with a copy of `weight`; where gradients are on, model.linear."""
        plain = weight.detach()
        if self.casts:
            plain = plain.to(self.dtype)
        packed = None

        def product(x, weight=weight):
            nonlocal packed
            if torch.is_grad_enabled():
                return linear(x, weight)
            rows = x.numel() // x.shape[-1]
            if not self.packs or rows > PACKED_ROWS:
                return linear(x, plain)
            if packed is None:
                packed = torch.ops.mkldnn._reorder_linear_weight(plain.to(self.dtype), rows)
            return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product

    def remove(self):
        """Take the fast products off again."""
        for module, before in self.before.items():
            if module is self.model:
                module.head_product = before
            elif before is None:
                vars(module).pop("forward", None)  # none was put on if the copy failed
            else:
                module.forward = before
        self.before = {}


def is_sharded(model):
    """Whether FSDP has put tensors of its own in place of the parameters."""
    return not all(type(parameter) is nn.Parameter for parameter in model.parameters())


def count_weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


def copies_fit(model):
    """Whether copies of all weights in the stream's dtype leave half of the free memory free."""
    device = model.wte.weight.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has freed and keeps for itself
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = free_memory()
    return count_weights(model) * model.stream_dtype.itemsize < free / 2


def free_memory():
    """Bytes of main memory that a process may still take; a guess where the system does not say."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.is_file() else ""
    found = re.search(r"MemAvailable: +(\d+)", text)  # in kB
    return 1024 * int(found[1]) if found else 2**32


def is_packable(model):
    """Whether the model lies on a CPU, is small enough, and oneDNN's order is faster there."""
    if model.wte.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if count_weights(model) > PACKED_AT_MOST:
        return False
    if model.stream_dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    # Intel's MKL, which torch calls without packing, takes 0.5 to 0.8 times as long on Intel's
    # chips for 1 to 16 rows; on AMD's it takes 1.3 to 3 times as long.
    return model.stream_dtype == torch.float32 and "GenuineIntel" not in cpu_flags()
