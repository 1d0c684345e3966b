"""The log: RUN/metrics.jsonl, the boards beside it, and what is printed about a run."""

import math
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from tqdm import tqdm

from scaling.machine import peak_flops
from scaling.ranks import rank, world_size
from support.files import UserError, disk_remedy, read_log, rows_until, to_json, write_rows
from support.outcome import answer_numbers, print_next, without_blank_runs
from support.records import domains_table, tasks_table
from support.text import counted


class Log:
    """RUN/metrics.jsonl: one JSON object a row, written by rank 0 alone.

    step: the step from which the run goes on. Rows of later steps are dropped, because those steps
    will be taken again. open_boards(): the boards that get the rows too (scaling/boards.py).
    """

    def __init__(self, run, step, open_boards=list):
        self.file = None
        if rank() > 0:
            return
        path = run / "metrics.jsonl"
        rows, torn = read_log(run, path.name)
        if torn:
            print(f"{path}: dropped: {counted(torn, 'incomplete line')}, as a crash leaves one")
        write_rows(path, rows_until(rows, step))
        self.boards = open_boards()
        self.file = open(path, "a")

    def write(self, kind, state, **row):
        """Append a row of this kind, with the step, tokens and seconds of `state`."""
        if not self.file:
            return
        row = {"kind": kind, "step": state["step"], "tokens": state["tokens"],
               "seconds": state["seconds"], **row}
        try:
            self.file.write(to_json(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{self.file.name}: could not be written ({error}); "
                            f"{disk_remedy(error)}") from None
        for board in self.boards:
            board.write(kind, row)

    def close(self, failed=False):
        """Close the file; rows are on their way to the disk as soon as they are written."""
        if self.file:
            self.file.close()
            for board in self.boards:
                board.close(failed)


@dataclass
class Window:
    """What happened since the last row of the log; evaluations and checkpoints are not timed."""

    steps: int = 0
    clipped: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, clipped, tokens, seconds):
        """Count one step."""
        self.steps += 1
        self.clipped += clipped
        self.tokens += tokens
        self.seconds += seconds

    def leave_time_out(self):
        """Forget the speed of the steps so far, because the first one may have compiled."""
        self.tokens = 0
        self.seconds = 0.0

    def rates(self, flops_per_token, device):
        """Speed, model FLOPs utilisation (MFU), and the share of steps that were clipped."""
        speed = self.tokens / self.seconds
        per_device = speed / world_size()
        peak = peak_flops(device)
        mfu = round(per_device * flops_per_token / peak, 4) if peak else None
        return {"clipping_rate": self.clipped / self.steps, "tokens_per_second": round(speed, 1),
                "tokens_per_second_per_device": round(per_device, 1), "mfu": mfu}


class Pace:
    """How long the rest of a run takes, at its pace since the first step of this start.

    That pace has the evaluations and checkpoints in it, and not the first step, which may compile.
    """

    def __init__(self):
        self.first = None  # (step, time) of the end of the first step

    def begin(self, step):
        """The first step has ended."""
        self.first = (step, time.monotonic())

    def seconds_left(self, step, last, window):
        """Of the steps after `step`; after the first step, the window is all that is measured."""
        if self.first is None:
            return (last - step) * window.seconds / window.steps
        first_step, began = self.first
        return (last - step) * (time.monotonic() - began) / (step - first_step)


def perplexity(loss):
    """exp(loss), of a loss in nats per token; a finite number for any loss."""
    return math.exp(min(loss, 700))


def has_bar():
    """True where this process shows a bar of the steps: rank 0 at a terminal."""
    return rank() == 0 and sys.stderr.isatty()


def say_row(watch, step, last, said, seconds_left, memory):
    """A line about a step where no bar is seen, such as in the log of a batch system.

    watch: a Watch of support/bars.py.
    """
    if rank() == 0 and not has_bar():
        left = timedelta(seconds=round(seconds_left))
        watch.say(f"step {step:,} of {last:,}: {said}, {left} left, {memory:.2f} GB")


def say_slow_step(watch, step, last):
    """The same about a step without a row, if there was no line for long."""
    if rank() == 0 and not has_bar() and watch.is_due():
        watch.say(f"step {step:,} of {last:,}")


def say_evaluation(step, results, eval_data=""):
    """Print the headline numbers of an evaluation, above the progress bar.

    eval_data: of a tuning, where its held-out answers are from.
    """
    bits = dict(results["bits_per_byte"])
    accuracy = {}
    for name, result in results["tasks"].items():
        if "accuracy" in result:
            accuracy[name] = f"{100 * result['accuracy']:.1f}%"
        else:
            bits[name] = result["bits_per_byte"]
    bits = {name: f"{value:.3f}" for name, value in bits.items()}
    answers = answer_numbers(results.get("tuned", {}))
    for title, numbers in (("bits per byte", bits), ("accuracy", accuracy),
                           (f"held-out answers of {eval_data}", answers)):
        if numbers:
            line = ", ".join(f"{name} {value}" for name, value in numbers.items())
            tqdm.write(f"step {step}: {title}: {line}")
    if results.get("best"):
        tqdm.write(f"step {step}: the best so far: {best_in(results)}")


def best_in(results):
    """What keep_best has found, in words: where it is, and its number (scaling/kept.py)."""
    best = results["best"]
    return f"{best['path']}, {best['measure']} {best['value']:.4f}"


def print_run(run, model, batches, micro_batch_size, lr_at_step):
    """What is about to be trained: parameters, steps, tokens; lr_at_step is train.py's."""
    shards = batches.shards
    parameters = sum(p.numel() for p in model.parameters())
    left_over = len(shards) % batches.batch_size
    print(f"run: {run.path}, {parameters:,} parameters, {run.config.max_steps:,} steps of "
          f"{batches.batch_size} x {shards.seq_len} tokens, {micro_batch_size} sequences at a time")
    print(f"  an epoch: {batches.steps_per_epoch:,} steps; left out: {left_over} sequences, and "
          f"{shards.tail_tokens} tokens at the ends of files")
    say_warmup(run.config, lr_at_step)


def say_warmup(config, lr_at_step):
    """A line about a run that ends before its warm-up does."""
    last = config.max_steps
    if last <= config.warmup_steps:
        highest = max(lr_at_step(step, config) for step in (max(1, last - 1), last))
        print(f"  warmup_steps={config.warmup_steps} is not below max_steps={last}: the learning "
              f"rate rises to {highest:.3g} and never reaches lr={config.lr:g}; lower "
              f"--warmup_steps, to {last // 10} for example")


def print_results(run):
    """The last evaluation's tables and samples, and what to run next."""
    print(f"\nafter step {run.step}, {run.state['seconds']:.0f} s of training:")
    if run.results["sums"] or not run.results["tasks"]:
        print(domains_table(run.results["sums"]))
    if run.results["tasks"]:
        print(tasks_table(run.results["tasks"]))
    samples = run.results["samples"]
    print(f"\n{'a sample' if len(samples) == 1 else counted(len(samples), 'sample')}:")
    print(f"\n{'-' * 40}\n".join(map(without_blank_runs, samples)))
    best = run.path
    if run.results.get("best"):
        best = run.path / run.results["best"]["path"]
        print(f"\nthe best step: {best_in(run.results)}")
    print_next(run.path, best)
