"""The log: RUN/metrics.jsonl, TensorBoard, and a line in the terminal now and then."""

import math
from dataclasses import dataclass

from tqdm import tqdm

from scaling.machine import peak_flops
from scaling.ranks import rank, world_size
from support.files import UserError, disk_remedy, read_log, rows_until, to_json, write_rows
from support.records import domains_table, tasks_table
from support.text import counted


class Log:
    """RUN/metrics.jsonl: one JSON object a row, written by rank 0 alone, and TensorBoard if asked.

    step: the step from which the run goes on. Rows of later steps are dropped, because those steps
    will be taken again.
    """

    def __init__(self, run, step, tensorboard=False):
        self.file = None
        self.board = None
        if rank() > 0:
            return
        path = run / "metrics.jsonl"
        rows, torn = read_log(run, path.name)
        if torn:
            print(f"{path}: dropped: {counted(torn, 'incomplete line')}, as a crash leaves one")
        write_rows(path, rows_until(rows, step))
        self.file = open(path, "a")
        if tensorboard:
            self.board = open_tensorboard(run / "tensorboard", step)

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
        if self.board:
            self.write_tensorboard(kind, row)

    def write_tensorboard(self, kind, row):
        """The numbers of a row as scalars called kind/name."""
        numbers = {**row, **row.get("bits_per_byte", {})}
        for name, result in row.get("tasks", {}).items():
            numbers[name] = result.get("accuracy")
        for name, value in numbers.items():
            if type(value) in (int, float) and name not in ("step", "tokens", "seconds"):
                self.board.add_scalar(f"{kind}/{name}", value, row["step"])
        self.board.flush()

    def close(self):
        """Close the file; rows are on their way to the disk as soon as they are written."""
        if self.file:
            self.file.close()


def open_tensorboard(folder, step):
    """TensorBoard's writer, which drops what it wrote about steps after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
    return SummaryWriter(folder, purge_step=step + 1)


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

    def rates(self, flops_per_token, device):
        """Speed, model FLOPs utilisation (MFU), and the share of steps that were clipped."""
        speed = self.tokens / self.seconds
        per_device = speed / world_size()
        peak = peak_flops(device)
        mfu = round(per_device * flops_per_token / peak, 4) if peak else None
        return {"clipping_rate": self.clipped / self.steps, "tokens_per_second": round(speed, 1),
                "tokens_per_second_per_device": round(per_device, 1), "mfu": mfu}


def perplexity(loss):
    """exp(loss), of a loss in nats per token; a finite number for any loss."""
    return math.exp(min(loss, 700))


def say_evaluation(step, results):
    """Print the headline numbers of an evaluation, above the progress bar."""
    bits = dict(results["bits_per_byte"])
    accuracy = {}
    for name, result in results["tasks"].items():
        if "accuracy" in result:
            accuracy[name] = f"{100 * result['accuracy']:.1f}%"
        else:
            bits[name] = result["bits_per_byte"]
    bits = {name: f"{value:.3f}" for name, value in bits.items()}
    answers = {name: f"{value:.4f}" for name, value in results.get("tuned", {}).items()}
    for title, numbers in (("bits per byte", bits), ("accuracy", accuracy),
                           ("held-out answers", answers)):
        if numbers:
            line = ", ".join(f"{name} {value}" for name, value in numbers.items())
            tqdm.write(f"step {step}: {title}: {line}")


def print_run(run, model, batches, micro_batch_size):
    """What is about to be trained: parameters, steps, tokens."""
    shards = batches.shards
    parameters = sum(p.numel() for p in model.parameters())
    left_over = len(shards) % batches.batch_size
    print(f"run: {run.path}, {parameters:,} parameters, {run.config.max_steps:,} steps of "
          f"{batches.batch_size} x {shards.seq_len} tokens, {micro_batch_size} sequences at a time")
    print(f"  an epoch: {batches.steps_per_epoch:,} steps; left out: {left_over} sequences, and "
          f"{shards.tail_tokens} tokens at the ends of files")


def print_results(run, sample):
    """The last evaluation's tables, a sample, and what to run next."""
    print(f"\nafter step {run.step}, {run.state['seconds']:.0f} s:")
    if run.results["sums"] or not run.results["tasks"]:
        print(domains_table(run.results["sums"]))
    if run.results["tasks"]:
        print(tasks_table(run.results["tasks"]))
    print(f"\na sample:\n{sample}\n\nnext:")
    print(f"  python eval.py {run.path}")
    print(f'  python eval.py sample {run.path} --prompt="def read_"')
    print(f"  python eval.py report {run.path}")
    print(f"  python model.py export {run.path} OUT")
