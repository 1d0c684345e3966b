"""The bench of tuning: `tune`. SFT's and DPO's steps beside pretraining's, on the embedded sets."""

import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

import adapt
import train
from configs import ROOT, load_config
from corpus.tokenizer import Tokenizer
from model import ModelConfig, init_weights
from scaling.machine import choose_dtype, keep_freed_memory
from scaling.sharding import evaluating
from support.packing import dense_mask
from support.rows import read_examples
from support.tuned import choose_rows
from tests.bench.__main__ import alternate, ratios_of
from tests.bench.speed import own_tokenizer

ROUNDS = 5
STEPS = 4  # of SFT and of DPO a round
LR = 1e-5


def bench_tune():
    """A step of configs/tiny_sft.py and of tiny_dpo.py beside one of configs/tiny.py, in turns.

    The bars, padding not counted: SFT makes 0.95 times pretraining's tokens/s; DPO 0.9 times what
    two forwards of pretraining, as for policy and reference, and one backward would make.
    """
    keep_freed_memory()
    [model_config] = load_config([str(ROOT / "configs/tiny.py")], ModelConfig, other=train.SCHEMAS)
    device = torch.device("cpu")
    dtype = choose_dtype("auto", device)
    config = train.TrainConfig(lr=LR)
    model, optimizer = train.build_training(model_config, config, device, dtype, True)
    init_weights(model, 0)
    step = partial(train.train_step, model, optimizer, lr=LR, max_norm=1.0)

    batch = pretraining_batch(model_config, 16)
    loss_of = {"SFT": adapt.sft_loss, "DPO": partial(adapt.preference_loss, beta=0.1)}
    sets = {name: steps_of(name, model_config) for name in loss_of}
    for name, (batches, _) in sets.items():
        check_losses(model, batches, loss_of[name])

    def tune(name):
        for batch in sets[name][0]:
            step([batch], loss_of[name])

    def pretrain():
        for _ in range(STEPS):
            step([batch], train.pretraining_loss)

    def pretrain_with_reference():
        for _ in range(STEPS):
            train.pretraining_loss(model, batch)  # not yet another graph to compile
            step([batch], train.pretraining_loss)

    peers = {"SFT": "pretraining", "DPO": "pretraining with a second forward"}
    sides = {"pretraining": pretrain, peers["DPO"]: pretrain_with_reference,
             "SFT": partial(tune, "SFT"), "DPO": partial(tune, "DPO")}
    seconds = alternate(sides, ROUNDS)
    tokens = STEPS * batch["tokens"].numel()
    print(f"tiny shape, {dtype}, medians of {ROUNDS} rounds of {STEPS} steps in turns\n\n"
          "| steps | tokens | computed | padding | tokens/s | ratio |\n|---|---|---|---|---|---|")
    for name in peers.values():
        speed = tokens / median(seconds[name])
        print(f"| {name} | {tokens:,} | {tokens:,} | 0 % | {speed:,.0f} | |")
    for name, peer in peers.items():
        batches, own = sets[name]
        computed = sum(batch["tokens"].numel() for batch in batches)
        padding = sum((batch["documents"] < 0).sum().item() for batch in batches) / computed
        ratios = [own / tokens * ratio for ratio in ratios_of(seconds, slow=peer, fast=name)]
        print(f"| {name} | {own:,} | {computed:,} | {padding:.0%} | "
              f"{own / median(seconds[name]):,.0f} | {median(ratios):.2f} times {peer} "
              f"({min(ratios):.2f} to {max(ratios):.2f}) |")


def pretraining_batch(model_config, rows):
    """A batch of random ids, as data.Batches makes it."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, model_config.max_seq_len)
    tokens = torch.randint(model_config.vocab_size - 8, shape, generator=generator)
    loss_mask = torch.ones(shape, dtype=torch.bool)
    loss_mask[:, -1] = False
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}


def steps_of(name, model_config):
    """Returns (the batches of the first STEPS steps, the tokens of their examples); in DPO a
    prompt counts with either answer, as where each answer has a row of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer.load(own_tokenizer(Path(folder), model_config))
    path = ROOT / f"configs/tiny_{name.lower()}.py"
    adapt_config, config = load_config([str(path)], adapt.AdaptConfig, train.TrainConfig,
                                       other=train.SCHEMAS)
    encode = adapt.encode_example if name == "SFT" else adapt.encode_pair
    encode = partial(encode, tokenizer=tokenizer, max_seq_len=model_config.max_seq_len)
    examples = read_examples(adapt_config, "train_data", encode, 0.0)
    arguments = (examples, config.batch_size, 0, model_config, choose_rows(config, model_config))
    if name == "SFT":
        batches = adapt.ChatBatches(*arguments)
    else:
        batches = adapt.PreferenceBatches(*arguments, np.full((len(examples), 2), -50.0))
    steps = range(1, STEPS + 1)
    chosen = [examples[i] for step in steps for i in batches.indices(step)]
    sides = chosen if name == "SFT" else [side for pair in chosen for side in pair]
    return [batches(step) for step in steps], sum(len(example.ids) for example in sides)


def check_losses(model, batches, loss_fn):
    """SystemExit if a loss differs from that of the dense mask."""
    fast = model.packed_mask
    for batch in batches:
        with evaluating(model):
            ours = loss_fn(model, batch)[0]
            model.packed_mask = dense_mask
            theirs = loss_fn(model, batch)[0]
            model.packed_mask = fast
        count = batch.get("real", batch["loss_mask"]).sum()
        if abs(ours - theirs) / count > 0.01:
            raise SystemExit(f"the loss is {ours / count}, with a dense mask {theirs / count}")
