"""Benches that run train.py as a user starts it, and read its log: `gpu`, `checkpoint`; and `plan`.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

import train
from tests.bench.speed import allocated_peak
from configs import ROOT, load_config
from model import ModelConfig, OLMo, init_weights
from scaling.machine import choose_device, flops_per_token, peak_flops, peak_memory
from scaling.plan import plan_memory
from scaling.ranks import setup_distributed, world_size
from scaling.sharding import own_part, shard_model
from support.weights import config_to_hf

QUIET = ["--eval_every_steps=0", "--save_every_steps=0", "--log_every_steps=1", "--eval_share=0",
         "--suite=domains", "--max_steps=100000"]


def write_random_tokens(folder, ids, tokens):
    """Write a ready token file of random ids; returns the option that trains on it."""
    random_ids = np.random.default_rng(0).integers(2, ids - 1, tokens, dtype="<u2")
    random_ids.tofile(folder / "random.npy")
    (folder / "list.txt").write_text(f"{folder}/random.npy\n")
    return f"--token_files={folder}/list.txt"


def logged_rows(config, options, steps, minutes=9):
    """The train rows of the first `steps` steps of a run of `config` on random tokens.

    The run is then killed: at its end it would save a checkpoint, of 83 GB for the 7B.
    """
    [model_config] = load_config([str(ROOT / config)], ModelConfig, other=train.SCHEMAS)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tokens = write_random_tokens(folder, model_config.vocab_size, 2**24)
        log = folder / "run/metrics.jsonl"
        process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", ROOT / config, tokens, *options,
             *QUIET, f"--run_dir={folder}/run", f"--data_dir={folder}/data"],
            start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60 * minutes
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_bytes().count(b"\n") >= steps:
                break
            time.sleep(0.2)
        if process.poll() is None:
            os.killpg(process.pid, 9)
        errors = process.communicate()[1]
        rows = log.read_text().splitlines() if log.is_file() else []
        if len(rows) < steps:
            raise SystemExit(f"only {len(rows)} of {steps} steps: {errors[-2000:]}")
        return [json.loads(row) for row in rows[:steps]]


# Our runs and transformers' steps: (config, sequences a pass, activation checkpointing). On an H200
# these were the fastest of each side that fit; a 7B with its optimiser takes 110 GB at rest.
OURS = [("olmo_1b", 8, "none"), ("olmo_1b", 16, "fine_grained"),
        ("olmo_7b", 4, "fine_grained"), ("olmo_7b", 4, "whole_layer")]
THEIRS = [("olmo_1b", 16, ""), ("olmo_1b", 8, ""), ("olmo_7b", 4, "all")]


def bench_gpu():
    """The official 1B and 7B on one GPU through train.py: tokens/s, MFU and peak memory; then
    transformers'.

    The bars: 48 % MFU at 1B and 42 % at 7B, under 130 GiB and within 15 % of the plan, faster than
    the best of transformers'. Each row of ours is a run of 20 steps, the median of the last 10.
    """
    import torch
    if not torch.cuda.is_available():
        raise SystemExit("this bench needs a CUDA GPU")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, a matrix product of 8,192: "
          f"{matrix_peak():,.0f} TFLOP/s\n")
    holds_7b = torch.cuda.get_device_properties(0).total_memory > 130e9
    print("| config | sequences a pass | checkpointing | tokens/s | MFU | peak, GB "
          "| plan (eager), GB |\n|---|---|---|---|---|---|---|")
    for name, micro_batch_size, policy in OURS:
        if name == "olmo_7b" and not holds_7b:
            continue
        config = f"configs/{name}.py"
        row = measured(config, micro_batch_size, policy)
        model_config, settings = load_config([str(ROOT / config)], ModelConfig, train.TrainConfig,
                                             other=train.SCHEMAS)
        settings = replace(settings, activation_checkpointing=policy)
        plan = sum(plan_memory(model_config, settings, 1, micro_batch_size).values())
        print(f"| {name} | {micro_batch_size} | {policy} | {row['tokens_per_second']:,.0f} | "
              f"{row['mfu']:.1%} | {row['peak_memory_gb']:.1f} | {plan / 1e9:.1f} |", flush=True)

    print("\n| transformers | sequences a step | checkpointing | tokens/s | MFU | peak, GB |\n"
          "|---|---|---|---|---|---|")
    for name, batch_size, recompute in THEIRS:
        if name == "olmo_7b" and not holds_7b:
            continue
        rest = peer_row(name, batch_size, recompute)
        print(f"| {name} | {batch_size} | {recompute or 'none'} |{rest}", flush=True)


def peer_row(name, batch_size, recompute):
    """The end of a row about transformers, measured in a process of its own."""
    words = [sys.executable, "-m", "tests.bench", "peer", f"configs/{name}.py", str(batch_size),
             recompute]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    if "OutOfMemoryError" in done.stderr:
        return " does not fit | | |"
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout.splitlines()[-1]


def matrix_peak(n=8192):
    """TFLOP/s of a bf16 product on the GPU, the best of 20."""
    import torch
    a = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    best = math.inf
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best / 1e12


def print_peer(config, batch_size, recompute, steps=10):
    """A process of `bench_gpu`: print the end of a row about transformers' compiled OLMo."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    from tests.bench.speed import transformers_step
    [model_config] = load_config([str(ROOT / config)], ModelConfig, other=train.SCHEMAS)
    device = choose_device()
    with device:
        model = OlmoForCausalLM(OlmoConfig(**config_to_hf(model_config)))
    if recompute:
        model.gradient_checkpointing_enable()
    step = transformers_step(model, torch.bfloat16)
    tokens = torch.randint(model_config.vocab_size, (int(batch_size), model_config.max_seq_len))
    for _ in range(3):
        step(tokens)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step(tokens)  # it ends with loss.item(), which waits for the GPU
        seconds.append(time.perf_counter() - start)
    speed = tokens.numel() / median(seconds)
    mfu = speed * flops_per_token(model_config) / (peak_flops(device) or math.inf)
    print(f" {speed:,.0f} | {mfu:.1%} | {peak_memory(device):.1f} |")


def measured(config, micro_batch_size, policy, steps=20):
    """{key: median over the last half of the steps} of a run; two micro-batches a step."""
    options = [f"--micro_batch_size={micro_batch_size}", f"--batch_size={2 * micro_batch_size}",
               f"--activation_checkpointing={policy}"]
    rows = logged_rows(config, options, steps)[steps // 2:]
    keys = ("tokens_per_second", "mfu", "peak_memory_gb")
    return {key: median(row[key] or 0 for row in rows) for key in keys}


def bench_plan():
    """The plan's memory against what real processes on a CPU allocate, by torch's profiler.

    (Their resident memory is a third more: glibc keeps freed memory, in fragments.)
    """
    print("| processes | checkpointing | plan, MB | measured, MB | plan / measured |\n"
          "|---|---|---|---|---|")
    cases = [(1, "none"), (1, "whole_layer"), (2, "none"), (2, "fine_grained")]
    for processes, policy in cases:
        words = ["-m", "tests.bench", "allocated", policy]
        if processes > 1:
            words = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *words]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True,
                              cwd=ROOT)
        plan, allocated = (float(word) / 1e6 for word in done.stdout.split()[-2:])
        print(f"| {processes} | {policy} | {plan:,.0f} | {allocated:,.0f} "
              f"| {plan / allocated:.2f} |", flush=True)


def print_allocated(policy):
    """A process of `bench_plan`: print the plan's bytes and the peak of two steps."""
    import torch
    # longer than the sequences that support/cpu.py attends to in its own way
    model_config = ModelConfig(d_model=256, n_heads=4, mlp_hidden_size=704, n_layers=8,
                               max_seq_len=1024, vocab_size=8192, embedding_size=8192)
    micro_batch_size = 1
    config = train.TrainConfig(device="cpu", dtype="float32", activation_checkpointing=policy)
    device = setup_distributed("cpu")
    with torch.device("meta"):
        model = OLMo(model_config)
    tokens = torch.zeros(2 * micro_batch_size, 1024, dtype=torch.long)
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": tokens == 0}
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        shard_model(model, config, device, torch.float32, False)
        init_weights(model, 0, own_part)
        optimizer = train.build_optimizer(model, config)
        micro_batches = train.cut_batch(batch, micro_batch_size, device)
        for _ in range(2):
            train.train_step(model, optimizer, micro_batches, train.pretraining_loss, 1e-3, 1.0)
    plan = plan_memory(model_config, config, world_size(), micro_batch_size)
    print(sum(plan.values()), allocated_peak(profiler))


def bench_checkpoint():
    """What a checkpoint costs: seconds of saving / seconds of 100 steps of configs/tiny.py.

    The bar: less than 2 %. The model, its compiled step and its files are those of the real run.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        run = Path(folder) / "run"
        subprocess.run([sys.executable, ROOT / "train.py", ROOT / "configs/tiny.py",
                        f"--run_dir={run}", "--max_steps=300", "--save_every_steps=100",
                        "--eval_every_steps=0", "--log_every_steps=50"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(row) for row in open(run / "metrics.jsonl")]
    rows = [row for row in rows if row["kind"] == "train"]
    # A row is written before the checkpoint that is due at its step, and its speed counts the steps
    # alone; so the time between two rows, less that of the steps, is that of saving.
    steps = [50 * 16 * 256 / row["tokens_per_second"] for row in rows]
    between = rows[-2]["seconds"] - rows[0]["seconds"]
    saving = (between - sum(steps[1:-1])) / 2  # two checkpoints lie between these rows
    hundred_steps = sum(steps) / 3
    print(f"100 steps {hundred_steps:.2f} s, a checkpoint {saving:.2f} s: "
          f"{saving / hundred_steps:.2%} of the time")
