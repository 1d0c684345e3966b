"""The benches of training steps and of generation: `cpu`, `generate`.

A side is one model with its optimiser in a process of its own, which takes a few steps when it is
told to. An adapter is a Python file that adds a side: it defines

    build(directory, dtype) -> step,   step(tokens) -> loss

where directory is a Hugging Face directory of the weights that all sides begin with, dtype
torch.bfloat16 or torch.float32, and tokens int64 (B, T); a step is forward, loss of the next
tokens, backward, clip at 1.0 and AdamW with OPTIMIZER's settings.
"""

import json
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch

import train
from tests.bench.__main__ import alternate, library_texts
from configs import ROOT
from corpus.tokenizer import train_bpe
from data import Batches, DataConfig, TokenShards, build_data
from model import ModelConfig, build_model, generate, init_weights
from scaling.machine import choose_dtype, flops_per_token, keep_freed_memory
from support.cpu import packed_weights, use_fast_attention
from support.weights import load_model, save_hf

OPTIMIZER = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
TINY = ModelConfig()
SHAPES = {  # model, sequences a step, steps a round
    "tiny": (TINY, 16, 8),
    "small": (replace(TINY, n_layers=8, d_model=512, n_heads=8, mlp_hidden_size=1408,
                      max_seq_len=512, vocab_size=50280, embedding_size=50304, eos_token_id=50279,
                      pad_token_id=1, weight_tying=True), 4, 2)}
ROUNDS = 5
MATRIX = 4096  # side of the square matrices whose product is the machine's peak


# ---- The sides -----------------------------------------------------------------------------------

def build_nanolmo(directory, dtype):
    """train.py's own step, compiled, as it runs by default."""
    model_config = load_model(directory).config
    config = train.TrainConfig(
        lr=OPTIMIZER["lr"], beta1=OPTIMIZER["betas"][0], beta2=OPTIMIZER["betas"][1],
        eps=OPTIMIZER["eps"], weight_decay=OPTIMIZER["weight_decay"])
    device = torch.device("cpu")
    model, optimizer = train.build_training(model_config, config, device, dtype, True)
    whole = dict(load_model(directory).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[name])

    def step(tokens):
        return train.train_step(model, optimizer, [shifted(tokens)], train.pretraining_loss,
                                OPTIMIZER["lr"], 1.0)["loss"]
    return step


def shifted(tokens):
    targets = torch.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    return {"tokens": tokens, "targets": targets,
            "loss_mask": torch.arange(tokens.shape[1]).expand_as(tokens) < tokens.shape[1] - 1}


def build_transformers(directory, dtype):
    """transformers' OlmoForCausalLM at its best: SDPA, compiled, autocast, fused AdamW."""
    from transformers import OlmoForCausalLM
    return transformers_step(OlmoForCausalLM.from_pretrained(directory), dtype)


def transformers_step(model, dtype):
    """step(tokens) of a transformers model, on its device."""
    optimizer = torch.optim.AdamW(model.train().parameters(), fused=True, **OPTIMIZER)
    compiled, device = torch.compile(model), model.device

    def step(tokens):
        tokens = tokens.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        return update(model, optimizer, loss)
    return step


def update(model, optimizer, loss):
    """The rest of a step in torch's own words; returns the loss as a number."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def build_matrix_product(directory, dtype):
    a, b = torch.randn(2, MATRIX, MATRIX).to(dtype)
    return lambda tokens: (a @ b).sum().item()


BUILDERS = {"nanOLMo": build_nanolmo, "transformers": build_transformers,
            "matrix product": build_matrix_product}


def serve(words):
    """A side's process: answers each number of steps on stdin with the seconds that they took."""
    spec = json.loads(words)
    build = BUILDERS.get(spec["build"]) or runpy.run_path(spec["build"])["build"]
    dtype, (config, rows, _) = getattr(torch, spec["dtype"]), SHAPES[spec["shape"]]
    if spec["keep"]:
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(config.vocab_size - 8, (rows, config.max_seq_len),
                             generator=generator) for _ in range(4)]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step = build(spec["directory"], dtype)
        losses = [step(batches[0]) for _ in range(3)]  # they fall, if the step is a whole one
    print(json.dumps({"losses": losses, "peak": allocated_peak(profiler)}), flush=True)
    del profiler
    for line in sys.stdin:
        began = time.perf_counter()
        for i in range(int(line)):
            step(batches[i % len(batches)])
        print(json.dumps((time.perf_counter() - began) / int(line)), flush=True)


def allocated_peak(profiler):
    """The most bytes that tensors held while it watched."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


class Side:
    """A process of `serve`, and what it answered."""

    def __init__(self, name, build, shape, dtype, directory, keep=True):
        self.name, self.seconds, spec = name, [], {
            "build": build, "shape": shape, "dtype": dtype, "directory": str(directory),
            "keep": keep}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench", "side", json.dumps(spec)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.first = self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}")
        return json.loads(line)

    def take(self, steps):
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        self.seconds.append(self.answer())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


# ---- Training steps ------------------------------------------------------------------------------

def bench_cpu(adapter=None):
    """Our step beside transformers' on the CPU. The bars: 1.35 times its speed as a user runs it,
    1.15 with the same allocator, 1.1 in float32; no more memory, on the small shape 70 % of it."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape, (config, rows, steps) in SHAPES.items():
            directory = Path(folder) / shape
            save_hf(build_model(config, seed=0), directory)
            for dtype in ("bfloat16", "float32"):
                sides = [("nanOLMo", "nanOLMo", True),
                         ("transformers, as a user runs it", "transformers", False),
                         ("transformers, our allocator setting", "transformers", True),
                         ("matrix product", "matrix product", True)]
                sides += [(Path(adapter).stem, adapter, True)] if adapter else []
                measured = in_turns([Side(name, build, shape, dtype, directory, keep)
                                     for name, build, keep in sides], steps)
                figures[f"{shape}, {dtype}"] = table(shape, dtype, config, rows, measured)
    loop = loop_share()
    print(f"\nthe loop of train.py, of the speed of its bare step: {loop:.1%}")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                      "steps": figures, "loop": loop}))


def in_turns(sides, steps):
    for i in range(ROUNDS):
        for side in sides[::1 if i % 2 else -1]:
            side.take(steps)
    for side in sides:
        side.close()
    return {side.name: side for side in sides}


def table(shape, dtype, config, rows, sides):
    """Print the Markdown table of a shape; returns it as a dictionary."""
    peak = 2 * MATRIX ** 3 / median(sides.pop("matrix product").seconds)
    tokens, ours = rows * config.max_seq_len, sides["nanOLMo"]
    print(f"\n{shape}, {dtype}: {tokens:,} tokens a step; the best matrix product does "
          f"{peak / 1e9:,.0f} GFLOP/s\n\n| | tokens/s | nanOLMo is faster by | of the matrix peak "
          "| tensors at most, MB | losses |\n|---|---|---|---|---|---|")
    found = {}
    for name, side in sides.items():
        speed = tokens / median(side.seconds)
        ratios = [b / a for a, b in zip(ours.seconds, side.seconds, strict=True)]
        share = speed * flops_per_token(config) / peak
        found[name] = {"tokens_per_second": round(speed), "ratio": round(median(ratios), 3),
                       "of_peak": round(share, 4), "peak_mb": round(side.first["peak"] / 1e6, 1)}
        spread = "" if side is ours else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {speed:,.0f} | {median(ratios):.2f}{spread} | {share:.1%} | "
              f"{side.first['peak'] / 1e6:,.0f} | "
              f"{', '.join(f'{loss:.3f}' for loss in side.first['losses'])} |", flush=True)
        if not np.allclose(side.first["losses"], ours.first["losses"], rtol=0, atol=0.02):
            raise SystemExit(f"{name}: other losses than nanOLMo's: not the same work")
    return found


def loop_share(steps=30):
    """The speed of train_loop over that of its bare step, on the tiny shape, in turns; the bar is
    0.97. Evaluations and checkpoints, which a run pays every few hundred steps, are left out."""
    model_config, rows, _ = SHAPES["tiny"]
    config = train.TrainConfig(batch_size=rows, max_steps=1, log_every_steps=10, eval_every_steps=0,
                               save_every_steps=0)
    with tempfile.TemporaryDirectory() as folder:
        run, folder = Path(folder) / "run", Path(folder)
        run.mkdir()
        ids = np.random.default_rng(0).integers(2, model_config.vocab_size - 8, 2**20, dtype="<u2")
        ids.tofile(folder / "random.npy")
        (folder / "list.txt").write_text(f"{folder}/random.npy\n")
        data = DataConfig(token_files=f"{folder}/list.txt", data_dir=f"{folder}/data", eval_share=0,
                          tokenizer=str(own_tokenizer(folder, model_config)))
        built = build_data(data)
        batches = Batches(TokenShards(built, model_config.max_seq_len), rows, 0, built)
        device, dtype = torch.device("cpu"), choose_dtype("auto", torch.device("cpu"))
        keep_freed_memory()
        model, optimizer = train.build_training(model_config, config, device, dtype, True)
        init_weights(model, 0)
        state = {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}
        nothing = {"bits_per_byte": {}, "sums": {}, "tasks": {}}
        fixed = train.cut_batch(batches(1), rows, device)

        def loop():
            train.train_loop(replace(config, max_steps=state["step"] + steps), run, state, model,
                             optimizer, batches, train.pretraining_loss, lambda: nothing,
                             lambda step: [], rows)

        def bare():
            for _ in range(steps):
                train.train_step(model, optimizer, fixed, train.pretraining_loss, 1e-3, 1.0)
        with mock.patch.object(train, "save_checkpoint"), redirect_stdout(None):
            seconds = alternate({"loop": loop, "bare": bare})
        return median(alone / within for alone, within in zip(seconds["bare"], seconds["loop"],
                                                              strict=True))


def own_tokenizer(folder, model_config):
    train_bpe(library_texts(2_000_000), model_config.vocab_size).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


# ---- Generation ----------------------------------------------------------------------------------

def bench_generate(new_tokens=200):
    """Greedy answers of the tiny shape beside transformers' `generate`, in float32: the same ids.

    The bar: twice its tokens/s at batch 1 and 32. The weights are untrained and doubled, so that
    two ids are never nearly as likely.
    """
    from transformers import OlmoForCausalLM
    keep_freed_memory()
    ours = build_model(TINY, seed=0)
    use_fast_attention(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, folder)
        theirs = OlmoForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    generator, figures = torch.Generator().manual_seed(0), {}
    print("| batch | tokens/s, nanOLMo | transformers | ratio | first token, ms, nanOLMo | "
          "transformers | ratio |\n|---|---|---|---|---|---|---|")
    for batch in (1, 32):
        prompts = torch.randint(TINY.vocab_size - 8, (batch, 32), generator=generator)

        def answer(n, prompts=prompts):
            with packed_weights(ours):
                return generate(ours, prompts.tolist(), n)

        def their_answer(n, prompts=prompts):
            return theirs.generate(prompts, attention_mask=torch.ones_like(prompts),
                                   do_sample=False, max_new_tokens=n,
                                   pad_token_id=TINY.pad_token_id)
        if answer(new_tokens) != their_answer(new_tokens)[:, 32:].tolist():
            raise SystemExit("the two sides give other ids, so their speeds do not compare")
        row = []
        for n in (new_tokens, 1):
            seconds = alternate({"ours": partial(answer, n), "theirs": partial(their_answer, n)})
            row.append((median(seconds["ours"]), median(seconds["theirs"]), median(
                slow / fast for fast, slow in zip(seconds["ours"], seconds["theirs"],
                                                  strict=True))))
        (fast, slow, ratio), (first, their_first, first_ratio) = row
        tokens = batch * new_tokens
        print(f"| {batch} | {tokens / fast:,.0f} | {tokens / slow:,.0f} | {ratio:.2f} | "
              f"{1e3 * first:.1f} | {1e3 * their_first:.1f} | {first_ratio:.2f} |", flush=True)
        figures[batch] = {"tokens_per_second": round(tokens / fast), "ratio": round(ratio, 3),
                          "first_token_ms": round(1e3 * first, 2),
                          "first_token_ratio": round(first_ratio, 3)}
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                      "generate": figures}))
