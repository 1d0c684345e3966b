"""An adapter for `python -m tests.bench cpu`: nanoGPT's model at its best on a CPU.

    git clone https://github.com/karpathy/nanoGPT
    NANOGPT=nanoGPT python -m tests.bench cpu tests/bench/nanogpt.py

The shape is ours: layers, width, heads, context, ids, tokens per step. The work is not: nanoGPT's
head is always tied, its MLP has two matrices of 4 D (8 D^2 weights, where ours has about as many in
three), it learns its positions, and its weights are its own random ones. So are its losses.
"""

import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from support.weights import load_model
from tests.bench.speed import OPTIMIZER, update

DOES_OTHER_WORK = True  # its losses cannot be ours


def build(directory, dtype):
    """step(tokens) -> loss of nanoGPT, compiled, with autocast and fused AdamW."""
    checkout = os.environ.get("NANOGPT")
    if not checkout:
        raise SystemExit("NANOGPT must name a checkout of github.com/karpathy/nanoGPT")
    nanogpt = runpy.run_path(str(Path(checkout, "model.py")))
    ours = load_model(directory).config
    torch.manual_seed(0)
    shape = nanogpt["GPTConfig"](
        block_size=ours.max_seq_len, vocab_size=ours.embedding_size, n_layer=ours.n_layers,
        n_head=ours.n_heads, n_embd=ours.d_model, dropout=0.0, bias=False)
    with redirect_stdout(sys.stderr):  # it prints, and the bench reads this process's stdout
        model = nanogpt["GPT"](shape)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **OPTIMIZER)
    compiled = torch.compile(model)

    def step(tokens):
        targets = tokens.roll(-1, 1)
        targets[:, -1] = -1  # nanoGPT's mark of a token without a target
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            _, loss = compiled(tokens, targets)
        return update(model, optimizer, loss)
    return step
