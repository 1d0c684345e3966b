"""Benches that run train.py itself, as a user starts it, and read its log: `gpu`, `plan`."""

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
from scaling.ranks import setup_distributed
from scaling.sharding import own_part, shard_model
from support.weights import config_to_hf

QUIET = ["--eval_every_steps=0", "--save_every_steps=0", "--log_every_steps=1", "--eval_share=0",
         "--max_steps=100000"]


def write_random_tokens(folder, ids, tokens):
    """A list of one ready token file of random ids; the data of a bench."""
    np.random.default_rng(0).integers(2, ids - 1, tokens, dtype="<u2").tofile(folder / "random.npy")
    (folder / "list.txt").write_text(f"{folder}/random.npy\n")
    return f"--token_files={folder}/list.txt"


def logged_rows(config, options, steps, minutes=9):
    """The train rows of the first `steps` steps of a run of `config` on random tokens.

    It is killed then: its end would save a checkpoint, of 83 GB for the 7B.
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
        rows = log.read_text().splitlines(keepends=True) if log.is_file() else []
        if len(rows) < steps:
            raise SystemExit(f"only {len(rows)} of {steps} steps: {errors[-2000:]}")
        return [json.loads(row) for row in rows[:steps]]


def bench_gpu():
    """The official 1B and 7B on one GPU through train.py: tokens/s, MFU and peak memory; then
    transformers' at several batches.

    The bars: 48 % MFU at 1B and 42 % at 7B, under 130 GiB and within 15 % of the plan, ahead of the
    best of transformers'. Each row of ours is a run of 20 steps, the median of the last 10.
    """
    import torch
    if not torch.cuda.is_available():
        raise SystemExit("this bench needs a CUDA GPU")
    room = torch.cuda.get_device_properties(0).total_memory
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, a matrix product of 8,192: "
          f"{matrix_peak():,.0f} TFLOP/s\n\n| config | sequences a "
          "pass | checkpointing | tokens/s | MFU | peak, GB | plan (eager), GB |\n"
          "|---|---|---|---|---|---|---|")
    cases = [("olmo_1b", 8, "none"), ("olmo_1b", 16, "fine_grained")]
    if room > 130e9:
        cases += [("olmo_7b", rows, policy) for rows, policy in (
            (2, "fine_grained"), (4, "whole_layer"))]
    for name, rows, policy in cases:
        config = f"configs/{name}.py"
        row = measured(config, rows, policy)
        model_config, settings = load_config([str(ROOT / config)], ModelConfig,
                                             train.TrainConfig, other=train.SCHEMAS)
        plan = plan_memory(model_config, replace(
            settings, activation_checkpointing=policy), 1, rows)
        print(f"| {name} | {rows} | {policy} | {row['tokens_per_second']:,.0f} | "
              f"{row['mfu'] or 0:.1%} | {row['peak_memory_gb']:.1f} | "
              f"{sum(plan.values()) / 1e9:.1f} |", flush=True)
    print("\n| transformers | sequences a step | checkpointing | tokens/s | MFU | peak, GB |\n"
          "|---|---|---|---|---|---|")
    for name in dict.fromkeys(name for name, _, _ in cases):
        for rows in (16, 8, 4, 2, 1):
            for recompute in ("", "all"):
                words = [sys.executable, "-m", "tests.bench", "peer", f"configs/{name}.py",
                         str(rows), recompute]
                done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
                if done.returncode and "OutOfMemoryError" not in done.stderr:
                    raise SystemExit(done.stderr[-2000:])
                said = (" does not fit | | |" if done.returncode else done.stdout.splitlines()[-1])
                print(f"| {name} | {rows} | {recompute or 'none'} |{said}", flush=True)


def matrix_peak(n=8192):
    """TFLOP/s of a bf16 product on the GPU, the best of 20."""
    import torch
    a, best = torch.randn(n, n, device="cuda", dtype=torch.bfloat16), math.inf
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n ** 3 / best / 1e12


def print_peer(config, rows, recompute, steps=10):
    """In a process of `bench_gpu`: the rest of a row, of transformers' compiled OLMo."""
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
    tokens = torch.randint(model_config.vocab_size, (int(rows), model_config.max_seq_len))
    for _ in range(3):
        step(tokens)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step(tokens)  # it ends with loss.item(), which waits for the GPU
        seconds.append(time.perf_counter() - began)
    speed, peak = tokens.numel() / median(seconds), peak_flops(device)
    print(f" {speed:,.0f} | {speed * flops_per_token(model_config) / (peak or math.inf):.1%} "
          f"| {peak_memory(device):.1f} |")


def measured(config, rows, policy, steps=20):
    """{key: median over the last half of the steps} of a run; two micro-batches a step."""
    logged = logged_rows(config, [f"--micro_batch_size={rows}", f"--batch_size={2 * rows}",
                                  f"--activation_checkpointing={policy}"], steps)
    keys = ("tokens_per_second", "mfu", "peak_memory_gb")
    return {key: median(row[key] or 0 for row in logged[steps // 2:]) for key in keys}


def bench_plan():
    """The plan's memory beside what real processes on a CPU allocate, by torch's profiler.

    (Their resident memory is a third more: glibc keeps what is freed, in fragments.)
    """
    print("| processes | checkpointing | plan, MB | measured, MB | plan / measured |\n"
          "|---|---|---|---|---|")
    for ranks, policy in ((1, "none"), (1, "whole_layer"), (2, "none"), (2, "fine_grained")):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"] * (ranks > 1)
        done = subprocess.run([sys.executable, *launcher, "-m", "tests.bench", "allocated", policy],
                              capture_output=True, text=True, check=True, cwd=ROOT)
        plan, measured = (float(word) / 1e6 for word in done.stdout.split()[-2:])
        print(f"| {ranks} | {policy} | {plan:,.0f} | {measured:,.0f} | {plan / measured:.2f} |",
              flush=True)


def print_allocated(policy):
    """In a process of `bench_plan`: bytes by the plan, and allocated at the peak of two steps."""
    import torch
    rows, model_config = 1, ModelConfig(  # longer than what plain attention is for
        d_model=256, n_heads=4, mlp_hidden_size=704, n_layers=8, max_seq_len=1024, vocab_size=8192,
        embedding_size=8192)
    config = train.TrainConfig(device="cpu", dtype="float32", activation_checkpointing=policy)
    _, ranks, device = setup_distributed("cpu")
    with torch.device("meta"):
        model = OLMo(model_config)
    tokens = torch.zeros(2 * rows, 1024, dtype=torch.long)
    batch = {"tokens": tokens, "targets": tokens, "loss_mask": tokens == 0}
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        shard_model(model, config, device, torch.float32, False)
        init_weights(model, 0, own_part)
        optimizer = train.build_optimizer(model, config)
        for _ in range(2):
            train.train_step(model, optimizer, train.cut_batch(batch, rows, device),
                             train.pretraining_loss, 1e-3, 1.0)
    print(sum(plan_memory(model_config, config, ranks, rows).values()),
          allocated_peak(profiler))


def bench_checkpoint():
    """What a checkpoint costs: seconds of saving against seconds of 100 steps of configs/tiny.py.

    The bar: less than 2 %. The model, its compiled step and its files are those of the real run.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, ROOT / "train.py", ROOT / "configs/tiny.py",
                        f"--run_dir={folder}/run", "--max_steps=300", "--save_every_steps=100",
                        "--eval_every_steps=0", "--log_every_steps=50"], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(row) for row in open(folder / "run/metrics.jsonl")]
        rows = [row for row in rows if row["kind"] == "train"]
        # A row before a checkpoint is due holds steps alone; the next row's wall time the saving.
        steps = sum(50 * 4096 / row["tokens_per_second"] for row in rows)
        wall = rows[-2]["seconds"] - rows[0]["seconds"]
        alone = sum(50 * 4096 / row["tokens_per_second"] for row in rows[1:-1])
        saving = (wall - alone) / 2  # two checkpoints lie between these rows
        print(f"100 steps {steps / 3:.2f} s, a checkpoint {saving:.2f} s: "
              f"{saving / (steps / 3):.2%} of the time")
