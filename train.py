"""Training: the machine, the optimiser, the schedule, checkpoints and the loop.

    python train.py configs/tiny.py [--key=value ...]   # train; on a run that exists, go on from it
    python train.py --resume=RUN [--key=value ...]      # the same, the config read from the run

Ctrl-C or SIGTERM finishes the step, saves and leaves. Exit code 0 means finished, any other: run
the same command again. Paper: OLMo (arXiv 2402.00838), section 3. Parts, in order: configuration,
the machine, optimiser and schedule, the step, checkpoints, the run directory, the loop.
"""

import ctypes
import hashlib
import json
import math
import os
import shutil
import signal
import sysconfig
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from configs import (UserError, file_sha256, flat, load_config, read_json, run_main,
                     write_json)
from data import Batches, DataConfig, Tokenizer, TokenShards, build_data, print_table
from eval import (EvalConfig, bits_per_byte, domains_table, evaluate_domains, held_out_domains,
                  sample_text)
from model import (ModelConfig, build_model, choose_device, choose_dtype, head_nats, newest_step,
                   next_token_loss, read_step, state_digest, step_directories)


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained; paper, section 3."""

    run_dir: str = "runs/tiny"
    """The directory of this run: config, metrics, checkpoints."""
    resume: str = ""
    """Go on with the run in this directory; its config is used."""
    overwrite: bool = False
    """Start anew where run_dir already holds a run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda where there is one, else cpu; mps is untried."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward; auto is bfloat16 where the chip is fast at it. Weights stay float32."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile the blocks and the head; auto does so where the machine can."""
    batch_size: int = 16
    """Sequences per step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences per rank and forward pass; 0 chooses."""
    max_steps: int = 900
    """Steps to train; the first is step 1."""
    lr: float = 3e-3
    """Peak learning rate."""
    min_lr: float = 3e-4
    """Learning rate at the end of the decay; OLMo: a tenth of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up, from a tenth of the peak."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Shape of the decay from the peak to min_lr."""
    decay_steps: int = 0
    """Step at which the decay reaches min_lr, to stay there; 0 is max_steps."""
    weight_decay: float = 0.1
    """AdamW's decay of all matrices but the embedding."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the gradient's mean square."""
    eps: float = 1e-5
    """AdamW's epsilon; OLMo's is 1e-5."""
    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient; 0 does not clip."""
    grad_clip_warmup_steps: int = 0
    """OLMo-7B's early rule: from step 2 to the one after this the limit is larger; 0 is no rule."""
    grad_clip_warmup_factor: float = 10.0
    """By how much it is larger."""
    log_every_steps: int = 10
    """Write a row of metrics.jsonl every so many steps."""
    eval_every_steps: int = 300
    """Evaluate the held-out text every so many steps, and at the end; 0 is at the end alone."""
    save_every_steps: int = 300
    """Save a checkpoint every so many steps, and at the end; 0 is at the end alone."""
    keep_last: int = 2
    """How many checkpoints to keep; 0 keeps all."""

    def __post_init__(self):
        for key, value in vars(self).items():
            least = 1 if key in ("batch_size", "max_steps") else 0
            if type(value) in (int, float) and not least <= value < math.inf:
                raise UserError(f"{key}={value}: a number from {least} on is wanted")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")


# ---- The machine ---------------------------------------------------------------------------------

def can_compile():
    """Whether torch.compile finds what it needs: a C++ compiler and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def choose_machine(config):
    """The device, the forward's dtype and whether to compile; prints what was chosen, and why."""
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    compiled = config.compile == "true"
    why = "as asked"
    if config.compile == "auto":
        compiled = device.type in ("cpu", "cuda") and can_compile()
        why = ("the first time takes about half a minute" if compiled else
               "untried" if device.type == "mps" else "no C++ compiler or Python headers")
    print(f"machine: {device.type} with {torch.get_num_threads()} threads; forward in {dtype} "
          f"({'as asked' if config.dtype != 'auto' else 'what this chip multiplies best'}); "
          f"{'compiled' if compiled else 'not compiled'} ({why})")
    return device, dtype, compiled


def choose_micro_batch(config, seq_len):
    """Sequences per forward: as set, or the most that divide the batch within 16,384 tokens."""
    if config.micro_batch_size:
        return min(config.micro_batch_size, config.batch_size)
    return max(n for n in range(1, config.batch_size + 1)
               if config.batch_size % n == 0 and (n * seq_len <= 16384 or n == 1))


def keep_freed_memory():
    """Tell glibc to keep big freed buffers: faulting them in anew costs a quarter of each step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer by mmap, which free() would give back
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor shrink the heap


def compile_model(model):
    """Compile each block, and the head with its loss.

    # subtle: the embedding stays outside: its compiled gradient adds up atomically, in any order,
    # and a resumed run could not be bit-exact.
    """
    for block in model.blocks:
        block.compile()
    model.head_nats = torch.compile(head_nats)


# ---- Optimiser and schedule ----------------------------------------------------------------------

def build_optimizer(model, config):
    """AdamW with OLMo's two groups: matrices decay, the embedding (also a tied head) does not.

    The moments exist from the start, so that a checkpoint of any step has the same tensors.
    """
    decayed = [p for name, p in model.named_parameters() if name != "wte.weight"]
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": [model.wte.weight], "weight_decay": 0.0}]
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),
                                  eps=config.eps, fused=fused)
    for p in model.parameters():
        step = torch.zeros((), dtype=torch.float32, device=p.device if fused else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def lr_at_step(step, config):
    """The learning rate of step `step`, the first being 1 (official olmo/optim.py).

    Warm-up from a tenth of the peak, then linear or cosine to min_lr at decay_steps, then flat.
    OLMo-7B's final anneal is the linear one with its warm-up already over: lr 2.3e-5,
    min_lr 2.3e-8, warmup_steps 556000, decay_steps 557000.
    """
    last = config.decay_steps or config.max_steps
    if step < config.warmup_steps:
        return config.lr * (0.1 + 0.9 * step / config.warmup_steps)
    if step >= last:
        return config.min_lr
    progress = (step - config.warmup_steps) / (last - config.warmup_steps)
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.lr - (config.lr - config.min_lr) * progress


def clip_at_step(step, config):
    """The limit of the gradient's norm at a step; OLMo-7B starts with ten times the usual one.

    # subtle: official OLMo sets the limit after it has clipped, so the rule lags by a step.
    """
    early = 2 <= step <= config.grad_clip_warmup_steps + 1 and config.grad_clip_warmup_steps
    return config.grad_clip * (config.grad_clip_warmup_factor if early else 1) or math.inf


# ---- The step ------------------------------------------------------------------------------------

def train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm):
    """One update from `micro_batches`; returns {loss, grad_norm}, the norm before clipping.

    `loss_fn(model, batch)` gives (summed loss, count). The loss is the sum over all micro-batches
    by their whole count, so that no way of cutting the batch changes it. Raises FloatingPointError
    before the weights are touched if the loss or the gradient is not finite.
    """
    total, count = 0.0, 0
    for batch in micro_batches:
        summed, n = loss_fn(model, batch)
        summed.backward()
        total, count = total + summed.detach(), count + n
    for p in model.parameters():
        p.grad.div_(count)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    metrics = {"loss": (total / count).item(), "grad_norm": grad_norm.item()}
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        raise FloatingPointError(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return metrics


def pretraining_loss(model, batch):
    """(summed nats, count) of a batch's next tokens."""
    nats = model(batch["tokens"], targets=batch["targets"])
    return next_token_loss(nats, batch["loss_mask"])


def cut_batch(batch, rows, device):
    """A batch as micro-batches of at most `rows` rows, on `device`."""
    B = len(batch["tokens"])
    return [{key: tensor[i:i + rows].to(device) for key, tensor in batch.items()}
            for i in range(0, B, rows)]


def batch_hash(tokens):
    """A hash of tokens (B, T) that no order of the rows changes: the sum of the rows' hashes."""
    digests = [hashlib.sha256(row.tobytes()).digest()[:8] for row in tokens.numpy()]
    return f"{sum(int.from_bytes(digest, 'big') for digest in digests) % 2**64:016x}"


# ---- Checkpoints ---------------------------------------------------------------------------------

def training_tensors(model, optimizer):
    """{name: tensor} of all that training changes: the weights, AdamW's moments and counts."""
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"model.{name}"] = p.detach()
        tensors.update((f"optimizer.{name}.{key}", value)
                       for key, value in optimizer.state[p].items())
    return tensors


def save_checkpoint(run, state, model, optimizer):
    """Write RUN/step000500: tensors through DCP, and state.json with each file's size and SHA-256.

    It is written under another name and renamed: one that exists is whole, a failed one is gone.
    """
    path = Path(run) / f"step{state['step']:06d}"
    if path.exists():
        return path
    aside = path.with_name(path.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is but one process
            dcp.save(training_tensors(model, optimizer), checkpoint_id=aside)
        files = {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)}
                 for file in sorted(aside.iterdir())}
        state = {**state, "files": files}
        write_json(aside / "state.json", {**state, "sha256": state_digest(state)})
        aside.rename(path)
    except (OSError, CheckpointException) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{path}: the checkpoint could not be written ({root_cause(error)}); make "
                        "room, then go on from the one before: "
                        f"python train.py --resume={run}") from None
    return path


def root_cause(error):
    """The OSError inside DCP's wrapper, in one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def load_checkpoint(path, model, optimizer):
    """Restore weights and optimiser in place from a step directory."""
    read_step(path, training_tensors(model, optimizer))


def drop_old_checkpoints(run, keep_last):
    """Delete all but the newest `keep_last` steps, renamed first: a step's name means whole."""
    if keep_last:
        for path in step_directories(run)[:-keep_last]:
            doomed = path.rename(path.with_name(path.name + ".tmp"))
            shutil.rmtree(doomed)


# ---- The run directory ---------------------------------------------------------------------------

COMMANDS = {"resume", "overwrite"}  # keys that say what to do, not what the run is


def may_differ(key):
    """Whether a run may go on with another value of this key."""
    evaluation = key in EvalConfig.__dataclass_fields__  # changes no weight
    free = {"run_dir", "max_steps", "device", "dtype", "compile", "micro_batch_size", "workers"}
    return (evaluation or key in free or key.endswith("_every_steps")
            or key.startswith(("keep_", "stop_")))


def open_run(run, settings, fingerprint, overwrite):
    """Make or reopen the run directory; returns (newest whole step or None, its state).

    Raises UserError that names the keys, or the part of the data, that differ from the run's.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={run}: no directory can be made there ({error})") from None
    if overwrite:
        clear_run(run)
    for leftover in run.glob("step*.tmp"):
        shutil.rmtree(leftover)
    if not step_directories(run):
        return None, {"step": 0, "tokens": 0, "seconds": 0.0}
    try:
        step, state = newest_step(run)
    except UserError as error:
        raise UserError(f"{error}; --overwrite starts the run anew") from None
    saved = state["config"]
    changed = [f"{key}: {saved[key]} there, {value} now" for key, value in settings.items()
               if key in saved and saved[key] != value and not may_differ(key)]
    if changed:
        raise UserError(f"{run} holds another run ({'; '.join(changed)}); choose another "
                        "--run_dir, or --overwrite it")
    moved = [f"{key}: {state['data'].get(key)} then, {value} now"
             for key, value in fingerprint.items() if state["data"].get(key) != value]
    if moved:
        raise UserError(f"{run}: its data has changed ({'; '.join(moved)}); restore it, or "
                        "--overwrite the run")
    for damaged in step_directories(run)[step_directories(run).index(step) + 1:]:
        shutil.rmtree(run / f"damaged-{damaged.name}", ignore_errors=True)
        damaged.rename(run / f"damaged-{damaged.name}")  # make way for the same step, done anew
    return step, {key: state[key] for key in ("step", "tokens", "seconds")}


def clear_run(run):
    """Delete what a run writes, and nothing else that may lie in its directory."""
    for path in [*step_directories(run), *run.glob("step*.tmp"), *run.glob("damaged-step*")]:
        shutil.rmtree(path)
    for name in ("config.json", "tokenizer.json", "manifest.json", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)


def describe_run(run, settings, folder, fingerprint):
    """Write config.json, tokenizer.json and manifest.json (the data's, with the order's hash)."""
    write_json(run / "config.json", settings)
    shutil.copyfile(folder / "tokenizer.json", run / "tokenizer.json")
    write_json(run / "manifest.json", {**read_json(folder / "manifest.json"), "order": fingerprint})


class Log:
    """RUN/metrics.jsonl, one object a row; rows of steps to be done again are dropped."""

    def __init__(self, run, step):
        path = run / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.is_file() else []
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= step
                and json.loads(row)["kind"] != "end"]
        aside = run / "metrics.jsonl.tmp"
        aside.write_text("".join(kept))
        aside.rename(path)
        self.file = open(path, "a")

    def write(self, kind, state, **row):
        """Append a row of one kind with the step, tokens and seconds of `state`."""
        where = {key: state[key] for key in ("step", "tokens", "seconds")}
        try:
            self.file.write(json.dumps({"kind": kind, **where, **row}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name}: could not be written ({error}); make room, then "
                            "run the same command again") from None


class StopSignal:
    """While open, keeps the first Ctrl-C or SIGTERM in `number`; a second one acts at once."""

    def __enter__(self):
        self.number, self.before = 0, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        self.number = number
        tqdm.write("stopping after this step; once more stops at once")
        self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


# ---- The loop ------------------------------------------------------------------------------------

def check_vocabulary(config, tokenizer):
    """The ids in the model's config must be the tokenizer's: a wrong EOS would go unnoticed."""
    wanted = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    wrong = [f"--{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        raise UserError(f"the model's ids are not the tokenizer's; set {' '.join(wrong)}"
                        + (f" --embedding_size={tokenizer.vocab_size}"
                           if config.embedding_size < tokenizer.vocab_size else ""))


def train(model_config, data_config, eval_config, config):
    """Train a run from its start, or its newest checkpoint, to max_steps; returns the exit code."""
    run = Path(config.run_dir)
    settings = flat(model_config, data_config, eval_config, config)
    settings = {key: value for key, value in settings.items() if key not in COMMANDS}
    print(textwrap.fill("config: " + ", ".join(f"{key}={value}" for key, value in settings.items()),
                        width=100, subsequent_indent="  "))

    # The machine
    device, dtype, compiled = choose_machine(config)
    rows = choose_micro_batch(config, model_config.max_seq_len)
    keep_freed_memory()

    # The data
    folder = build_data(data_config)
    print_table(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    check_vocabulary(model_config, tokenizer)
    shards = TokenShards(folder, model_config.max_seq_len)
    batches = Batches(shards, config.batch_size, data_config.seed, folder)
    fingerprint = batches.fingerprint()

    # The model and its optimiser, new or as the run left them
    start, state = open_run(run, settings, fingerprint, config.overwrite)
    if state["step"] >= config.max_steps:
        print(f"{run}: finished, at step {state['step']} of {config.max_steps}")
        return 0
    model = build_model(model_config, data_config.seed, device)
    optimizer = build_optimizer(model, config)
    if start:
        load_checkpoint(start, model, optimizer)
        print(f"{run}: goes on after step {state['step']}")
    describe_run(run, settings, folder, fingerprint)
    state.update(config=settings, data=fingerprint, torch=torch.__version__)
    model.compute_dtype = dtype
    if compiled:
        compile_model(model)
    print(f"run: {run}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.max_steps:,} steps of {config.batch_size} x {shards.seq_len} tokens, "
          f"{rows} sequences at a time\n"
          f"  an epoch: {batches.steps_per_epoch:,} steps; {len(shards) % config.batch_size} "
          f"sequences and {shards.tail_tokens} tokens at the ends of files do not fill one")

    # The steps
    def evaluate():
        with torch.compiler.set_stance("force_eager"):  # its shapes vary
            return evaluate_domains(model, tokenizer, held_out_domains(folder),
                                    eval_config.eval_batch_tokens)

    signal_number, results = train_loop(config, run, state, model, optimizer, batches,
                                        pretraining_loss, evaluate, rows)
    if signal_number:
        where = f"after step {state['step']}, which is saved" if state["step"] else "before step 1"
        print(f"stopped {where}; go on: python train.py --resume={run}")
        return 128 + signal_number

    # What came out
    print(f"\nheld-out text after step {state['step']}, {state['seconds']:.0f} s:")
    print(domains_table(results))
    with torch.compiler.set_stance("force_eager"):
        print(f"\na sample:\n{sample_text(model, tokenizer, eval_config)}\n\nnext:")
    print(f"  python eval.py {run}\n  python eval.py sample {run} --prompt=\"def read_\"\n"
          f"  python eval.py report {run}\n  python model.py export {run} OUT")
    return 0


def train_loop(config, run, state, model, optimizer, batches, loss_fn, evaluate, rows):
    """Take the steps after state["step"] up to max_steps; log, evaluate and save as they fall due.

    `batches(step)` gives a batch, `evaluate()` {domain: sums}; `state` {step, tokens, seconds, ...}
    is kept up to date. Returns (the signal that ended it or 0, the last evaluation's result).
    """
    log, device, results = Log(run, state["step"]), model.wte.weight.device, None
    began, tokens_before = time.perf_counter() - state["seconds"], state["tokens"]
    busy_seconds = 0.0  # of steps since the last row: evaluations and checkpoints aside

    def due(every):
        return state["step"] == config.max_steps or (every and state["step"] % every == 0)

    with (StopSignal() as stop,
          tqdm(total=config.max_steps, initial=state["step"], unit="step") as bar):
        while state["step"] < config.max_steps and not stop.number:
            tick, step = time.perf_counter(), state["step"] + 1
            batch, lr = batches(step), lr_at_step(step, config)
            try:
                metrics = train_step(model, optimizer, cut_batch(batch, rows, device), loss_fn,
                                     lr, clip_at_step(step, config))
            except FloatingPointError as error:
                raise UserError(f"step {step}: {error}; the newest checkpoint is from before it. "
                                "A lower --lr, in a run of its own, may hold") from None
            busy_seconds += time.perf_counter() - tick
            state.update(step=step, tokens=state["tokens"] + batch["tokens"].numel(),
                         seconds=round(time.perf_counter() - began, 3))
            bar.update()
            if due(config.log_every_steps):
                speed = (state["tokens"] - tokens_before) / busy_seconds
                tokens_before, busy_seconds = state["tokens"], 0.0
                log.write("train", state, **metrics, lr=lr, tokens_per_second=round(speed, 1),
                          batch_hash=batch_hash(batch["tokens"]))
                bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {speed:,.0f} tokens/s")
            if due(config.eval_every_steps):
                results = evaluate()
                bits = {name: bits_per_byte(sums) for name, sums in results.items()}
                log.write("eval", state, bits_per_byte=bits, sums=results)
                tqdm.write(f"step {step}: held-out bits per byte: "
                           + (", ".join(f"{name} {value:.3f}" for name, value in bits.items())
                              or "there is no held-out text"))
            if due(config.save_every_steps):
                save_checkpoint(run, state, model, optimizer)
                drop_old_checkpoints(run, config.keep_last)
        if state["step"] == config.max_steps:
            log.write("end", state)
            return 0, results
        if state["step"]:  # a signal came, whenever it was
            save_checkpoint(run, state, model, optimizer)
        return stop.number, results


def main(argv):
    schemas = (ModelConfig, DataConfig, EvalConfig, TrainConfig)
    resumed = [word.partition("=")[2] for word in argv if word.startswith("--resume=")]
    if resumed:
        saved = Path(resumed[-1]) / "config.json"
        if not saved.is_file():
            raise UserError(f"--resume={resumed[-1]}: no run there; train.py CONFIG starts one")
        argv = [str(saved), f"--run_dir={resumed[-1]}", *argv]
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python train.py configs/tiny.py) or --resume=RUN")
    configs = load_config(argv, *schemas)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # else each rank would train a run of its own
        raise UserError("train.py runs as one process so far; start it with python, not torchrun")
    return train(*configs)


if __name__ == "__main__":
    run_main(main)
