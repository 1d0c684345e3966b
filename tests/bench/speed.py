"""The bench of training steps: `cpu`.

A side is a model with its optimiser in a process of its own; it takes steps when it is told to. An
adapter is a Python file that adds a side. It defines

    build(directory, dtype) -> step,   step(tokens) -> loss

directory: a Hugging Face directory with the weights that all sides begin with. dtype:
torch.bfloat16 or torch.float32. tokens: int64 (B, T). A step is: forward, loss of the next tokens,
backward, clip at 1.0, AdamW with OPTIMIZER's settings. The losses must be ours, as then the work is
the same; an adapter of another architecture says DOES_OTHER_WORK = True, and they are only printed.
"""

import io
import json
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

import train
from tests.bench.__main__ import alternate, library_texts, ratios_of
from configs import ROOT
from corpus.bpe import train_bpe
from data import Batches, DataConfig, TokenShards, build_data
from model import ModelConfig, build_model, init_weights
from scaling.machine import choose_dtype, flops_per_token, keep_freed_memory
from scaling.run import Run
from support.weights import load_model, save_hf

OPTIMIZER = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
TINY = ModelConfig()
SHAPES = {  # (model, sequences per step, steps per round)
    "tiny": (TINY, 16, 8),
    "small": (replace(TINY, n_layers=8, d_model=512, n_heads=8, mlp_hidden_size=1408,
                      max_seq_len=512, vocab_size=50280, embedding_size=50304, eos_token_id=50279,
                      pad_token_id=1, weight_tying=True), 4, 2)}
DTYPES = ("bfloat16", "float32")
ROUNDS = 5
MATRIX = 4096  # side of the square matrices whose product gives the machine's peak


# ---- The sides -----------------------------------------------------------------------------------

def build_nanolmo(directory, dtype):
    """train.py's own step, compiled, as it runs by default."""
    model_config = load_model(directory).config
    config = train.TrainConfig(
        lr=OPTIMIZER["lr"], beta1=OPTIMIZER["betas"][0], beta2=OPTIMIZER["betas"][1],
        eps=OPTIMIZER["eps"], weight_decay=OPTIMIZER["weight_decay"])
    device = torch.device("cpu")
    model, optimizer = train.build_training(model_config, config, device, dtype, True)
    weights = dict(load_model(directory).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])

    def step(tokens):
        metrics = train.train_step(model, optimizer, [batch_of(tokens)], train.pretraining_loss,
                                   OPTIMIZER["lr"], 1.0)
        return metrics["loss"]
    return step


def batch_of(tokens):
    """A batch as data.Batches makes it: the last token of a row has no target."""
    loss_mask = torch.ones_like(tokens, dtype=torch.bool)
    loss_mask[:, -1] = False
    return {"tokens": tokens, "targets": tokens.roll(-1, 1), "loss_mask": loss_mask}


def build_transformers(directory, dtype):
    """transformers' OlmoForCausalLM at its best: SDPA, compiled, autocast, fused AdamW."""
    from transformers import OlmoForCausalLM
    return transformers_step(OlmoForCausalLM.from_pretrained(directory), dtype)


def transformers_step(model, dtype):
    """step(tokens) of a transformers model, on its device."""
    optimizer = torch.optim.AdamW(model.train().parameters(), fused=True, **OPTIMIZER)
    compiled = torch.compile(model)
    device = model.device

    def step(tokens):
        tokens = tokens.to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        return update(model, optimizer, loss)
    return step


def update(model, optimizer, loss):
    """The rest of a step, after the forward; returns the loss as a number."""
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
    """A side's process: answers each number of steps on stdin with the seconds of one step."""
    spec = json.loads(words)
    build = BUILDERS.get(spec["build"])
    other_work = False
    if build is None:
        adapter = runpy.run_path(spec["build"])
        build = adapter["build"]
        other_work = adapter.get("DOES_OTHER_WORK", False)
    dtype = getattr(torch, spec["dtype"])
    config, batch_size, _ = SHAPES[spec["shape"]]
    if spec["keep"]:
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config.max_seq_len)
    batches = [torch.randint(config.vocab_size - 8, shape, generator=generator) for _ in range(4)]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        step = build(spec["directory"], dtype)
        losses = [step(batches[0]) for _ in range(3)]  # they fall, if the step is complete
    print(json.dumps({"losses": losses, "peak": allocated_peak(profiler),
                      "other_work": other_work}), flush=True)
    del profiler
    for line in sys.stdin:
        steps = int(line)
        start = time.perf_counter()
        for i in range(steps):
            step(batches[i % len(batches)])
        seconds = time.perf_counter() - start
        print(json.dumps(seconds / steps), flush=True)


def allocated_peak(profiler):
    """The largest number of bytes that tensors held while the profiler ran."""
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


class Side:
    """A process of `serve`, and the seconds per step that it answered."""

    def __init__(self, name, build, shape, dtype, directory, keep=True):
        self.name = name
        self.seconds = []
        spec = {"build": build, "shape": shape, "dtype": dtype, "directory": str(directory),
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

def bench_cpu(*words):
    """Our step against transformers' on the CPU.

    words: names of SHAPES and DTYPES to run alone, without the loop; any other is an adapter file.

    The bars: 1.35 times its speed as a user runs it, 1.15 with the same allocator, 1.1 in float32;
    no more memory, and on the small shape at most 70 % of it.
    """
    # (name, BUILDERS' key or an adapter file, whether freed memory is kept as train.py does)
    sides = [("nanOLMo", "nanOLMo", True),
             ("transformers, as a user runs it", "transformers", False),
             ("transformers, our allocator setting", "transformers", True),
             ("matrix product", "matrix product", True)]
    adapters = [word for word in words if word not in (*SHAPES, *DTYPES)]
    sides += [(Path(adapter).stem, adapter, True) for adapter in adapters]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for shape in chosen(SHAPES, words):
            config, _, steps = SHAPES[shape]
            directory = Path(folder) / shape
            save_hf(build_model(config, seed=0), directory)
            for dtype in chosen(DTYPES, words):
                started = [Side(name, build, shape, dtype, directory, keep)
                           for name, build, keep in sides]
                run_in_turns(started, steps)
                figures[f"{shape}, {dtype}"] = print_steps(shape, dtype, started)
    loop = None
    if len(adapters) == len(words):
        loop = loop_share()
        print(f"\nspeed of train.py's loop / speed of its bare step: {loop:.1%}")
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                      "steps": figures, "loop": loop}))


def chosen(names, words):
    """Those of `names` that are among the words; all of them if none is."""
    return [name for name in names if name in words] or list(names)


def run_in_turns(sides, steps):
    for i in range(ROUNDS):
        order = sides if i % 2 else sides[::-1]
        for side in order:
            side.take(steps)
    for side in sides:
        side.close()


def print_steps(shape, dtype, sides):
    """Print the Markdown table of a shape; returns {name: figures}."""
    config, batch_size, _ = SHAPES[shape]
    sides = {side.name: side for side in sides}
    peak = 2 * MATRIX ** 3 / median(sides.pop("matrix product").seconds)
    tokens = batch_size * config.max_seq_len
    ours = sides["nanOLMo"]
    print(f"\n{shape}, {dtype}: {tokens:,} tokens a step; the best matrix product does "
          f"{peak / 1e9:,.0f} GFLOP/s\n")
    print("| | tokens/s | nanOLMo is faster by | of the matrix peak | tensors at most, MB | losses "
          "|\n|---|---|---|---|---|---|")
    figures = {}
    for name, side in sides.items():
        speed = tokens / median(side.seconds)
        ratios = [b / a for a, b in zip(ours.seconds, side.seconds, strict=True)]
        of_peak = speed * flops_per_token(config) / peak
        memory = side.first["peak"] / 1e6
        losses = side.first["losses"]
        spread = "" if side is ours else f" ({min(ratios):.2f} to {max(ratios):.2f})"
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {name} | {speed:,.0f} | {median(ratios):.2f}{spread} | {of_peak:.1%} "
              f"| {memory:,.0f} | {shown} |", flush=True)
        figures[name] = {"tokens_per_second": round(speed), "ratio": round(median(ratios), 3),
                         "of_peak": round(of_peak, 4), "peak_mb": round(memory, 1)}
        is_ours = np.allclose(losses, ours.first["losses"], rtol=0, atol=0.02)
        if not is_ours and not side.first["other_work"]:
            raise SystemExit(f"{name}: its losses are not nanOLMo's, so it does other work")
    return figures


def loop_share(steps=30):
    """Speed of train.py's loop / speed of its bare step, on the tiny shape, in turns.

    The bar: 0.97. The loop is train()'s, without the evaluations and checkpoints that a run pays
    for every few hundred steps.
    """
    model_config, batch_size, _ = SHAPES["tiny"]
    device = torch.device("cpu")
    with (tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()),
          redirect_stderr(io.StringIO())):  # progress bars
        folder = Path(folder)
        config = train.TrainConfig(run_dir=str(folder / "run"), batch_size=batch_size, max_steps=1,
                                   log_every_steps=10)
        batches = random_batches(folder, model_config, batch_size)
        keep_freed_memory()
        dtype = choose_dtype("auto", device)
        model, optimizer = train.build_training(model_config, config, device, dtype, True)
        init_weights(model, 0)
        run = Run.open(config, {}, batches.fingerprint(), model_config, device)
        fixed = train.cut_batch(batches(1), batch_size, device)

        def loop():
            run.config = replace(config, max_steps=run.step + steps)
            for step in run.steps():
                lr = train.lr_at_step(step, config)
                max_norm = train.clip_at_step(step, config)
                batch = batches(step)
                micro_batches = train.cut_batch(batch, batch_size, device)
                metrics = train.train_step(model, optimizer, micro_batches, train.pretraining_loss,
                                           lr, max_norm)
                run.log(step, batch, metrics, lr, max_norm)

        def bare():
            for _ in range(steps):
                train.train_step(model, optimizer, fixed, train.pretraining_loss, 1e-3, 1.0)

        with run:
            seconds = alternate({"loop": loop, "bare": bare})
    return median(ratios_of(seconds, slow="bare", fast="loop"))


def random_batches(folder, model_config, batch_size):
    """Batches of random ids, from a ready token file."""
    ids = np.random.default_rng(0).integers(2, model_config.vocab_size - 8, 2**20, dtype="<u2")
    ids.tofile(folder / "random.npy")
    (folder / "list.txt").write_text(f"{folder}/random.npy\n")
    tokenizer = own_tokenizer(folder, model_config)
    built = build_data(DataConfig(token_files=f"{folder}/list.txt", data_dir=f"{folder}/data",
                                  eval_share=0, tokenizer=str(tokenizer)))
    return Batches(TokenShards(built, model_config.max_seq_len), batch_size, 0, built)


def own_tokenizer(folder, model_config):
    train_bpe(library_texts(2_000_000), model_config.vocab_size).save(folder / "tokenizer.json")
    return folder / "tokenizer.json"
