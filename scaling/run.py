"""The run directory: held, described, logged."""

import fcntl
import json
import math
import os
import shutil
import signal
import socket
import textwrap
import time
import uuid
from dataclasses import dataclass

import torch
from tqdm import tqdm

from corpus.trace import RunData
from scaling.checkpoint import step_directories
from scaling.machine import can_compile, choose_dtype, keep_freed_memory, peak_flops, peak_memory
from scaling.ranks import (batch_hash, check_agreement, code_version, gather, largest, on_main,
                           rank, world_size)
from support.files import UserError, log_rows, read_json, write_json


def choose_machine(config, device):
    """The forward's dtype and whether to compile on `device`; prints what was chosen, and why."""
    dtype = choose_dtype(config.dtype, device)
    compiled = config.compile == "true"
    why = "as asked"
    if config.compile == "auto":
        compiled = device.type in ("cpu", "cuda") and can_compile()
        why = ("the first time takes about half a minute" if compiled else
               "untried" if device.type == "mps" else "no C++ compiler or Python headers")
    print(f"machine: {device.type} with {torch.get_num_threads()} threads"
          + (f", {world_size()} ranks" if world_size() > 1 else "") + f"; forward in {dtype} "
          f"({'as asked' if config.dtype != 'auto' else 'what this chip multiplies best'}); "
          f"{'compiled' if compiled else 'not compiled'} ({why})")
    return dtype, compiled


def agree_on_machine(config, settings, device):
    """(dtype, compiled) of the forward, alike on all ranks as the settings are; prints both."""
    print(textwrap.fill("config: " + ", ".join(f"{key}={value}" for key, value in settings.items()),
                        width=100, subsequent_indent="  "))
    check_agreement({**settings, "code": code_version(), "torch": torch.__version__,
                     "ranks a node": config.shard == "all" or os.environ.get("LOCAL_WORLD_SIZE")})
    dtype, compiled = choose_machine(config, device)
    check_agreement({"device": device.type, "dtype": str(dtype), "compile": compiled})
    keep_freed_memory()
    return dtype, compiled


COMMANDS = {"resume", "overwrite", "accept_changes", "stop_after_minutes", "tensorboard",
            "verify"}  # what to do this time, not what the run is


MEASURED = "eval.jsonl", "report.html"  # what eval.py writes of a run


def lacks_evaluation(run, step):
    """Whether a run's log reaches a step (it is no other run's) and has no evaluation of it."""
    rows = list(log_rows(run))
    return step > 0 and bool(rows) and not any(
        row["kind"] == "eval" and row["step"] == step for row in rows)


def hold_run(run):
    """Make the run directory and lock it against other processes; returns the open lock, its text.

    The text is this process's own, so that other ranks can tell whether they see the same file.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "a+")
    except OSError as error:
        raise UserError(f"run_dir={run}: no directory can be made there ({error})") from None
    # torchrun's restart waits, as a network's disk forgets a dead node's lock after a minute or two
    deadline = time.monotonic() + (150 if "TORCHELASTIC_RUN_ID" in os.environ else 0)
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.seek(0)
                raise UserError(f"{run}: another process trains there ({lock.read()}); wait for "
                                "it, or choose another --run_dir") from None
            time.sleep(0.5)
        except OSError:
            print(f"{run}: its disk knows no locks; see to it that one process alone trains there")
            break
    text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex}"
    lock.truncate(0)
    lock.write(text)
    lock.flush()
    os.fsync(lock.fileno())
    return lock, text


def share_run(run):
    """Hold the run directory for this process and its fellow ranks; returns the lock, to be kept.

    UserError where a rank does not see rank 0's directory, as on a node's own disk.
    """
    locks = []

    def hold():
        lock, text = hold_run(run)
        locks.append(lock)
        return text
    text, file = on_main(hold), run / ".lock"
    # subtle: rank 0 must not open the file again, for closing it would unlock it
    seen = rank() == 0 or (file.is_file() and file.read_text() == text)
    blind = {host for host in gather("" if seen else socket.gethostname()) if host}
    if blind:
        raise UserError(f"run_dir={run} is not the same directory on {', '.join(sorted(blind))}; "
                        "name one on a disk that all nodes share")
    return locks


def clear_run(run):
    """Delete what a run writes, and nothing else that may lie in its directory."""
    for path in [*step_directories(run), *run.glob("step*.tmp"), *run.glob("damaged-step*"),
                 *run.glob("tensorboard")]:
        shutil.rmtree(path)
    for path in run.glob("reference-*.json"):
        path.unlink()
    for name in ("config.json", "tokenizer.json", "manifest.json", "metrics.jsonl", *MEASURED):
        (run / name).unlink(missing_ok=True)


def describe_run(run, settings, folder, **facts):
    """Write config.json and tokenizer.json, and manifest.json: the data's with some `facts` added.

    folder: that of the data, or a Hugging Face directory, which has no manifest.
    """
    write_json(run / "config.json", settings)
    shutil.copyfile(folder / "tokenizer.json", run / "tokenizer.json")
    if (folder / "manifest.json").is_file():
        write_json(run / "manifest.json", {**read_json(folder / "manifest.json"), **facts})


class Log:
    """RUN/metrics.jsonl, one object a row; rows of steps to be done again are dropped.

    Rank 0 writes it, and TensorBoard's files if asked to; elsewhere it is silent.
    """

    def __init__(self, run, step, tensorboard=False):
        self.file = self.board = None
        if rank():
            return
        path, aside = run / "metrics.jsonl", run / "metrics.jsonl.tmp"
        aside.write_text("".join(json.dumps(row) + "\n" for row in log_rows(run)
                                 if row["step"] <= step and row["kind"] != "end"))
        aside.rename(path)
        self.file = open(path, "a")
        if tensorboard:
            self.board = open_tensorboard(run / "tensorboard", step)

    def write(self, kind, state, **row):
        """Append a row of one kind with the step, tokens and seconds of `state`."""
        if not self.file:
            return
        where = {key: state[key] for key in ("step", "tokens", "seconds")}
        try:
            self.file.write(json.dumps({"kind": kind, **where, **row}) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name}: could not be written ({error}); make room, then "
                            "run the same command again") from None
        if self.board:
            accuracy = {name: result.get("accuracy") for name, result
                        in row.get("tasks", {}).items()}
            numbers = {**row, **row.get("bits_per_byte", {}), **accuracy}
            for key, value in numbers.items():
                if type(value) in (int, float):
                    self.board.add_scalar(f"{kind}/{key}", value, state["step"])
            self.board.flush()


def open_tensorboard(folder, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=step + 1)


class StopSignal:
    """While open, keeps the first Ctrl-C, SIGTERM or alarm in `number`.

    Alone, a second signal acts at once. Under torchrun it does not: the launcher passes on what the
    terminal has sent already, and kills who is still there after 30 s.
    """

    def __init__(self, deadline=math.inf):
        self.deadline = deadline  # of time.monotonic(): then an alarm rings

    def __enter__(self):
        self.number, self.before, self.parent = 0, {}, os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self.before[number] = signal.signal(number, self.receive)
        if self.deadline < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self.deadline - time.monotonic()))
        return self

    def receive(self, number, frame):
        if self.number and (self.number != signal.SIGALRM or world_size() > 1):
            return
        self.number = number
        if number == signal.SIGALRM:
            tqdm.write("stop_after_minutes: stopping after this step")
        elif world_size() == 1:
            tqdm.write("stopping after this step; once more stops at once")
            self.restore()

    def reason(self):
        """The signal to leave by, or 0; a rank whose launcher was killed leaves too."""
        orphaned = world_size() > 1 and os.getppid() != self.parent
        return self.number or (signal.SIGTERM if orphaned else 0)

    def restore(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


def documents_of(run, step):
    """The documents of a step's batch, a line each, for the log of a step that went wrong."""
    data = RunData(run)
    if not data.manifest["sources"]:  # the side files of ready token files are slow to search
        return [f"sequence {sequence}: instance {instance}"
                for sequence, instance in enumerate(data.batches.instances(step).tolist())]
    return [f"sequence {span.sequence}: {span.document['source']}/{span.document['id']} "
            f"{span.document['metadata']['provenance']}" for span in data.trace(step)]


def report_not_finite(log, config, state, step, error, documents):
    """Log the documents of a step whose loss or gradient is not finite; UserError to stop at it."""
    skipped = config.not_finite == "skip"
    try:
        lines = documents(step)
    except Exception as fault:  # what is wrong with the data must not hide what is with the step
        lines = [f"not traced: {fault}"]
    log.write("not_finite", {**state, "step": step}, error=str(error), skipped=skipped,
              documents=lines)
    if not skipped:
        raise UserError(f"step {step}: {error}; its documents are in {log.file.name}, and the "
                        "newest checkpoint is from before it. A lower --lr, in a run of its own, "
                        "may hold; --not_finite=skip goes on without the step")
    tqdm.write(f"step {step}: {error}; skipped, the weights are as they were")


@dataclass
class Recent:
    """What happened since the last row of the log; evaluations and checkpoints are not timed."""

    steps: int = 0
    clipped: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, clipped, tokens, seconds):
        self.steps, self.clipped = self.steps + 1, self.clipped + clipped
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds

    def rates(self, flops, device):
        """Speed, model FLOPs utilisation and the share of steps that were clipped."""
        speed, peak = self.tokens / self.seconds, peak_flops(device)
        return {"clipping_rate": self.clipped / self.steps, "tokens_per_second": round(speed, 1),
                "tokens_per_second_per_device": round(speed / world_size(), 1),
                "mfu": round(speed / world_size() * flops / peak, 4) if peak else None}


def log_step(log, state, row, device, batch):
    """A row of kind train: what all ranks have seen of a step, the peak memory of the fullest."""
    if "rewards/margins" not in row:  # DPO's loss is of pairs, not of tokens
        row = {**row, "perplexity": math.exp(min(row["loss"], 700))}
    log.write("train", state, **row,
              peak_memory_gb=round(largest(peak_memory(device))[0], 3), kwh=state["kwh"],
              world_size=world_size(), batch_hash=batch_hash(batch["tokens"]))


def log_evaluation(log, state, results):
    log.write("eval", state, **results)
    tuned = {name: f"{value:.4f}" for name, value in results.get("tuned", {}).items()}
    accuracy = {name: f"{100 * result['accuracy']:.1f}%" for name, result
                in results["tasks"].items() if "accuracy" in result}
    bits = results["bits_per_byte"] | {name: result["bits_per_byte"] for name, result
                                       in results["tasks"].items() if name not in accuracy}
    for what, found in (("bits per byte", {name: f"{value:.3f}" for name, value in bits.items()}),
                        ("accuracy", accuracy), ("held-out answers", tuned)):
        if found:
            tqdm.write(f"step {state['step']}: {what}: "
                       + ", ".join(f"{name} {value}" for name, value in found.items()))
