"""Training: ranks, optimiser, schedule, the step, checkpoints, the log, the plan and the loop.

    python train.py configs/tiny.py [--key=value ...]   # train; on a run that exists, go on from it
    python train.py --resume=RUN [--key=value ...]      # the same, the config read from the run
    torchrun --nproc_per_node=8 train.py CONFIG         # the same batches and losses on 8 GPUs
    python train.py CONFIG --plan --gpus=256            # train nothing: memory, days, kWh, CO2

Ctrl-C or SIGTERM finishes the step, saves and leaves. Exit code 0 means finished, any other: run
the same command again. Paper: OLMo (arXiv 2402.00838), section 3. Parts, in order: configuration,
the machine, ranks, optimiser and schedule, the step, checkpoints, the run directory, the log, the
plan, the loop.
"""

import functools
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from configs import flat, load_config
from corpus.funnel import print_table
from corpus.storage import held_out_files
from corpus.tokenizer import Tokenizer
from data import Batches, DataConfig, TokenShards, build_data
from eval import EvalConfig, sample_text
from eval import evaluate as evaluate_model
from model import ModelConfig, OLMo, init_weights, next_token_loss
from scaling.checkpoint import (drop_old_checkpoints, load_checkpoint, newest_step, save_checkpoint,
                                step_directories, verify_step)
from scaling.machine import PowerMeter, carbon_kg, choose_micro_batch, energy_line, flops_per_token
from scaling.plan import PlanConfig, print_plan
from scaling.ranks import (check_agreement, largest, on_all_ranks, on_main, rank,
                           reduce_sum, setup_distributed, world_size)
from scaling.run import (COMMANDS, MEASURED, Log, Recent, StopSignal, agree_on_machine, clear_run,
                         describe_run, documents_of, lacks_evaluation, log_evaluation, log_step,
                         report_not_finite, share_run)
from scaling.sharding import own_part, shard_model
from support.files import UserError, read_json, run_main
from support.records import domains_table, tasks_table
from support.tasks import open_suites


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained; paper, section 3."""

    run_dir: str = "runs/tiny"
    """The directory of this run: config, metrics, checkpoints; one that all nodes see."""
    resume: str = ""
    """Go on with the run in this directory; its config is used."""
    overwrite: bool = False
    """Start anew where run_dir already holds a run."""
    accept_changes: bool = False
    """Go on although the config or the data is not what it was; says what changed."""
    start_from: str = ""
    """Begin with the weights, optimiser and data position of this RUN/step... (an anneal)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto is cuda where there is one, else cpu; mps is untried."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the forward; auto is bfloat16 where the chip is fast at it. Weights stay float32."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Compile the blocks and the head; auto does so where the machine can."""
    shard: Literal["all", "hybrid"] = "all"
    """Split the weights over all ranks, or over those of a node, with a copy on every node."""
    activation_checkpointing: Literal["none", "one_in_four", "one_in_three", "one_in_two",
                                      "fine_grained", "whole_layer"] = "none"
    """What the backward computes again instead of keeping: OLMo's choices, by memory saved."""
    reduce_every_micro_batch: bool = False
    """Reduce gradients after each micro-batch, as OLMo did: slower, with less memory."""
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
    not_finite: Literal["stop", "skip"] = "stop"
    """What to do with a step whose loss or gradient is not finite; its documents are logged."""
    log_every_steps: int = 10
    """Write a row of metrics.jsonl every so many steps."""
    eval_every_steps: int = 300
    """Evaluate the held-out text every so many steps, and at the end; 0 is at the end alone."""
    save_every_steps: int = 300
    """Save a checkpoint every so many steps, and at the end; 0 is at the end alone."""
    save_every_minutes: float = 0.0
    """Save a checkpoint when so many minutes have passed since the last one; 0 is never."""
    keep_last: int = 2
    """How many checkpoints to keep; 0 keeps all."""
    keep_every: int = 0
    """Keep those of each multiple of so many steps as well; 0 is none."""
    verify: Literal["sha256", "size"] = "sha256"
    """How a checkpoint is checked before it is loaded; size is for huge ones."""
    stop_after_minutes: float = 0.0
    """Save and leave after so many minutes, with an exit code that is not 0; 0 is never."""
    tensorboard: bool = False
    """Write the log for TensorBoard too, into RUN/tensorboard."""
    watts: float = 0.0
    """Power of one rank's share of the machine, where no meter of a GPU is read; 0 is unknown."""
    pue: float = 1.1
    """What the data centre uses by what its machines use; paper, section 4.4."""
    kg_co2_per_kwh: float = 0.610
    """Carbon intensity of the grid; the paper's for its A100 run."""

    def __post_init__(self):
        for key, value in vars(self).items():
            least = 1 if key in ("batch_size", "max_steps") else 0
            if type(value) in (int, float) and not least <= value < math.inf:
                raise UserError(f"{key}={value}: a number from {least} on is wanted")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")


SCHEMAS = (ModelConfig, DataConfig, EvalConfig, TrainConfig, PlanConfig)  # whose keys a config has


def build_training(model_config, config, device, dtype, compiled):
    """An OLMo without weights yet, sharded and compiled as the config says, and its optimiser."""
    with torch.device("meta"):
        model = OLMo(model_config)
    shard_model(model, config, device, dtype, compiled)
    return model, build_optimizer(model, config)


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

def train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm, reduce_every=False):
    """One update from this rank's `micro_batches`; {loss, grad_norm, ...} of the global batch.

    `loss_fn(model, batch)` gives (summed loss, count), and may add {name: sum} of what else is to
    be logged. The loss is the sum over all micro-batches and ranks by their whole count, so that no
    way of cutting the batch changes it; so is what else there is. grad_norm is the global L2 norm
    before clipping. reduce_every: sum the gradients over the ranks after each micro-batch, not only
    the last. Raises FloatingPointError on every rank, before the weights are touched, if the loss
    or the gradient is not finite.
    """
    total, count, others = 0.0, 0, Counter()
    for i, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):
            # subtle: it counts when the forward begins, not at backward()
            model.set_requires_gradient_sync(reduce_every or i == len(micro_batches) - 1)
        summed, n, *beside = loss_fn(model, batch)
        summed.backward()
        total, count = total + summed.detach(), count + n
        for name, value in beside[0].items() if beside else ():
            others[name] += value
    total, count, *values = reduce_sum(torch.stack(
        [total, *(value.to(total) for value in (count, *others.values()))]))
    gradients = [p.grad for p in model.parameters()]
    scale = world_size() / count  # FSDP has averaged over the ranks; a sum is wanted
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    grad_norm = grad_norm * scale
    metrics = {"loss": (total / count).item(), "grad_norm": grad_norm.item(), **{
        name: (value / count).item() for name, value in zip(others, values, strict=True)}}
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        optimizer.zero_grad()
        raise FloatingPointError(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
    scale *= (max_norm / (grad_norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_, in the same pass
    for gradient in gradients:
        gradient.mul_(scale)
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


def may_differ(key):
    """Whether a run may go on with another value of this key."""
    evaluation = key in EvalConfig.__dataclass_fields__  # changes no weight
    free = {"run_dir", "max_steps", "device", "dtype", "compile", "micro_batch_size", "workers",
            "shard", "activation_checkpointing", "reduce_every_micro_batch", "not_finite",
            "save_every_minutes", "watts", "pue", "kg_co2_per_kwh"}
    return (evaluation or key in free or key.endswith("_every_steps")
            or key.startswith("keep_"))


def open_run(config, settings, fingerprint):
    """Look at what the run directory holds; returns (step directory to load or None, state).

    That is the newest whole step of the run, or for a new run the one of start_from. Raises
    UserError that names the keys, or the part of the data, that differ from the run's.
    """
    run, fresh = Path(config.run_dir), {"step": 0, "tokens": 0, "seconds": 0.0, "kwh": 0.0}
    start = Path(config.start_from) if config.start_from else None
    if config.overwrite:
        if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--overwrite with --max-restarts would delete the run at each restart; "
                            "leave one of them away")
        if start and start.resolve().parent == run.resolve():
            raise UserError(f"--overwrite would delete {start}, which start_from names; choose "
                            "another --run_dir")
        clear_run(run)
    for leftover in run.glob("step*.tmp"):
        shutil.rmtree(leftover)
    if not step_directories(run):
        for name in MEASURED:  # of a run that was there before
            (run / name).unlink(missing_ok=True)
        if not start:
            return None, fresh
        saved = verify_step(start, config.verify == "sha256")
        check_changes(start, saved, {}, fingerprint, config)
        return start, fresh | {"step": saved["step"], "tokens": saved["tokens"]}
    try:
        step, saved = newest_step(run, config.verify == "sha256")
    except UserError as error:
        raise UserError(f"{error}; --overwrite starts the run anew") from None
    check_changes(run, saved, settings, fingerprint, config)
    say_new_schedule(saved, config)
    for damaged in step_directories(run)[step_directories(run).index(step) + 1:]:
        shutil.rmtree(run / f"damaged-{damaged.name}", ignore_errors=True)
        damaged.rename(run / f"damaged-{damaged.name}")  # make way for the same step, done anew
    earlier, before = saved.get("earlier_data", []), saved["data"]["data_sha256"]
    if before != fingerprint["data_sha256"]:
        earlier = [*earlier, before]  # what was trained on until here, for eval.py
    return step, fresh | {key: saved[key] for key in fresh if key in saved} | {
        "earlier_data": earlier}


def check_changes(place, saved, settings, fingerprint, config):
    """UserError if settings or data are not those of a saved state; with accept_changes a line."""
    before = saved["config"]
    changed = [f"{key}: {before[key]} there, {value} now" for key, value in settings.items()
               if key in before and before[key] != value and not may_differ(key)]
    moved = [f"{key}: {saved['data'].get(key)} then, {value} now"
             for key, value in fingerprint.items() if saved["data"].get(key) != value]
    if config.accept_changes and changed + moved:
        print(f"{place}: goes on with changes: {'; '.join(changed + moved)}")
    elif changed:
        raise UserError(f"{place} holds another run ({'; '.join(changed)}); choose another "
                        "--run_dir, or --overwrite it, or --accept_changes")
    elif moved:
        raise UserError(f"{place}: its data has changed ({'; '.join(moved)}); restore it, or "
                        "--overwrite the run, or --accept_changes")


def say_new_schedule(saved, config):
    """Print it if the next step's learning rate is not what the run so far would have had there."""
    keys = TrainConfig.__dataclass_fields__
    before = TrainConfig(**{key: value for key, value in saved["config"].items() if key in keys})
    step = saved["step"] + 1
    then, now = lr_at_step(step, before), lr_at_step(step, config)
    if then != now and config.max_steps > saved["step"]:
        print(f"the schedule is another one: step {step} has the learning rate {now:.3g}, where "
              f"with max_steps={before.max_steps} it would have had {then:.3g}")


# ---- The loop ------------------------------------------------------------------------------------

def check_vocabulary(config, tokenizer):
    """The ids in the model's config must be the tokenizer's: a wrong EOS would go unnoticed."""
    wanted = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
              "pad_token_id": tokenizer.pad_token_id}
    wrong = [f"--{key}={value}" for key, value in wanted.items() if getattr(config, key) != value]
    if wrong:
        room = (f" --embedding_size={tokenizer.vocab_size}"
                if config.embedding_size < tokenizer.vocab_size else "")
        raise UserError(f"the model's ids are not the tokenizer's; set {' '.join(wrong)}{room}, or "
                        "mend config.json of a Hugging Face directory that is tuned")


def train(model_config, data_config, eval_config, config):
    """Train a run from its start, or its newest checkpoint, to max_steps; returns the exit code."""
    began, run = time.monotonic(), Path(config.run_dir)
    settings = flat(model_config, data_config, eval_config, config)
    settings = {key: value for key, value in settings.items() if key not in COMMANDS}

    # The machine
    number, ranks, device = setup_distributed(config.device)
    dtype, compiled = agree_on_machine(config, settings, device)
    rows = choose_micro_batch(config, model_config.max_seq_len, ranks)

    # The data: rank 0 builds it, on a disk that all nodes see
    on_main(lambda: open_suites(eval_config) and None)  # a typing error is met before hours of work
    folder = on_main(lambda: build_data(data_config), patience=timedelta(days=2))
    print_table(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    check_vocabulary(model_config, tokenizer)
    suites = open_suites(eval_config, lambda: held_out_files(folder))
    shards = TokenShards(folder, model_config.max_seq_len)
    batches = Batches(shards, config.batch_size, data_config.seed, folder)
    batches(1, number, ranks)  # what is wrong with its size is said before the run begins
    fingerprint = batches.fingerprint()
    check_agreement(fingerprint)

    # The run: new, or as it was left
    lock = share_run(run)  # noqa: F841  held until this process ends
    start, state = on_main(lambda: open_run(config, settings, fingerprint),
                           patience=timedelta(hours=2))  # it reads the whole checkpoint once
    missed = on_main(lambda: lacks_evaluation(run, state["step"]))
    if state["step"] > config.max_steps or state["step"] == config.max_steps and not missed:
        print(f"{run}: finished, at step {state['step']} of {config.max_steps}")
        return 0
    state.update(config=settings, data=fingerprint, torch=torch.__version__)

    # The model and its optimiser
    model, optimizer = build_training(model_config, config, device, dtype, compiled)
    if start:
        load_checkpoint(start, model, optimizer)
        print(f"{run}: goes on after step {state['step']}")
    else:
        init_weights(model, data_config.seed, own_part)
    on_main(lambda: describe_run(run, settings, folder, order=fingerprint))
    print_run(run, model, config, batches, rows)

    # The steps
    def draw_sample():
        return sample_text(model, tokenizer, eval_config)

    def evaluate():
        results = evaluate_model(model, tokenizer, suites, eval_config)
        if ranks == 1:  # several would gather the whole model for each token
            results["samples"] = [draw_sample()]
        return results

    deadline = began + 60 * config.stop_after_minutes if config.stop_after_minutes else math.inf
    ended_by, results = train_loop(
        config, run, state, model, optimizer,
        functools.partial(batches, rank=number, world_size=ranks), pretraining_loss, evaluate,
        functools.partial(documents_of, run), rows, deadline, missed)
    if ended_by:
        launcher = "python" if ranks == 1 else "torchrun ..."
        print(f"stopped after step {state['step']}, which is saved; go on: {launcher} train.py "
              f"--resume={run}")
        return 128 + ended_by

    print(f"\nafter step {state['step']}, {state['seconds']:.0f} s:")
    if results["sums"] or not results["tasks"]:
        print(domains_table(results["sums"]))
    if results["tasks"]:
        print(tasks_table(results["tasks"]))
    [sample] = results.get("samples") or [draw_sample()]
    print(f"\na sample:\n{sample}\n\nnext:")
    print(f"  python eval.py {run}\n  python eval.py sample {run} --prompt=\"def read_\"\n"
          f"  python eval.py report {run}\n  python model.py export {run} OUT")
    return 0


def print_run(run, model, config, batches, rows):
    shards = batches.shards
    print(f"run: {run}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{config.max_steps:,} steps of {config.batch_size} x {shards.seq_len} tokens, "
          f"{rows} sequences at a time\n"
          f"  an epoch: {batches.steps_per_epoch:,} steps; {len(shards) % config.batch_size} "
          f"sequences and {shards.tail_tokens} tokens at the ends of files do not fill one")


def train_loop(config, run, state, model, optimizer, batches, loss_fn, evaluate, documents, rows,
               deadline=math.inf, missed=False, check=lambda step, metrics: None):
    """Take the steps after state["step"] up to max_steps; log, save and evaluate as they fall due.

    `batches(step)` gives this rank's batch, `evaluate()` what eval.evaluate gives,
    `documents(step)` the lines that the log gets for a batch that went wrong; `deadline` is of
    time.monotonic(); `missed`: the state was saved, its evaluation cut off; `check(step, metrics)`
    may raise at a step that cannot be right. `state` {step, tokens, seconds, kwh, ...} is kept up
    to date. Returns (the signal that ended it or 0, the last evaluation's result); whatever ends
    it, all ranks end after the same step.
    """
    log, device = Log(run, state["step"], config.tensorboard), model.wte.weight.device
    meter, kwh_before = PowerMeter(device, config.watts), state["kwh"]
    began, saved_at = time.perf_counter() - state["seconds"], time.monotonic()
    recent, flops, ended_by, results = Recent(), flops_per_token(model.config), 0, None

    def due(every):
        return state["step"] == config.max_steps or (every and state["step"] % every == 0)

    def count_energy():
        own = torch.tensor(meter.kwh(), dtype=torch.float64)
        state["kwh"] = kwh_before + reduce_sum(own).item()

    def save():
        count_energy()
        save_checkpoint(run, state, model, optimizer)
        on_main(lambda: drop_old_checkpoints(run, config.keep_last, config.keep_every))
        return time.monotonic()

    with (StopSignal(deadline) as stop, tqdm(total=config.max_steps, initial=state["step"],
                                             unit="step", disable=rank() > 0) as bar):
        if missed and due(config.eval_every_steps):
            results = evaluate()
            log_evaluation(log, state, results)
        while state["step"] < config.max_steps and not ended_by:
            tick, step = time.perf_counter(), state["step"] + 1
            batch, lr = batches(step), lr_at_step(step, config)
            max_norm, metrics = clip_at_step(step, config), None
            try:
                metrics = train_step(model, optimizer, cut_batch(batch, rows, device), loss_fn, lr,
                                     max_norm, config.reduce_every_micro_batch)
            except FloatingPointError as error:
                on_main(functools.partial(report_not_finite, log, config, state, step, error,
                                          documents), patience=timedelta(hours=2))
            if metrics:
                check(step, metrics)
            padding = batch["tokens"] == model.config.pad_token_id  # there is some in tuning
            tokens = reduce_sum((~padding).sum()).item()
            clipped = bool(metrics) and metrics["grad_norm"] > max_norm
            recent.add(clipped, tokens, time.perf_counter() - tick)
            state.update(step=step, tokens=state["tokens"] + tokens,
                         seconds=round(time.perf_counter() - began, 3))
            bar.update()
            minutes = (time.monotonic() - saved_at) / 60
            late = bool(config.save_every_minutes) and minutes >= config.save_every_minutes
            ended_by, late = map(int, largest(stop.reason(), late))  # what one rank says, all do
            if metrics and due(config.log_every_steps):
                count_energy()
                row = {**metrics, "lr": lr, **recent.rates(flops, device)}
                log_step(log, state, row, device, batch)
                bar.set_postfix_str("loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"
                                    .format(**row))
                recent = Recent()
            if ended_by or due(config.save_every_steps) or late:
                saved_at = save()  # first of all: torchrun gives it 30 s, an evaluation may fail
            if due(config.eval_every_steps):
                results = evaluate()
                log_evaluation(log, state, results)
        count_energy()
        bar.close()
        print(energy_line(state["kwh"], meter.metered, config))
        if state["step"] == config.max_steps:
            log.write("end", state, kwh=state["kwh"], kg_co2=carbon_kg(state["kwh"], config))
            return 0, results
        return ended_by, results


@on_all_ranks
def main(argv):
    resumed = [word.partition("=")[2] for word in argv if word.startswith("--resume=")]
    if resumed:
        saved = Path(resumed[-1]) / "config.json"
        if not saved.is_file():
            raise UserError(f"--resume={resumed[-1]}: no run there; train.py CONFIG starts one")
        if "method" in read_json(saved):
            raise UserError(f"--resume={resumed[-1]}: a tuned run; adapt.py --resume goes on")
        argv = [str(saved), f"--run_dir={resumed[-1]}", *argv]
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python train.py configs/tiny.py) or --resume=RUN")
    *configs, plan = load_config(argv, *SCHEMAS)
    if not plan.plan:
        return train(*configs)
    if os.environ.get("RANK", "0") == "0":
        print_plan(configs[0], configs[3], plan)
    return 0


if __name__ == "__main__":
    run_main(main)
