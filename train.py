"""Training: the optimiser, the schedule, the step and the loop (OLMo, arXiv 2402.00838, section 3).

    python train.py configs/tiny.py [--key=value ...]   # train; a run that exists is continued
    python train.py --resume=RUN [--key=value ...]      # the same, with the config of the run
    python train.py CONFIG --start_from=DIRECTORY       # begin with somebody's weights
    torchrun --nproc_per_node=8 train.py CONFIG         # the same batches and losses on 8 GPUs
    python train.py CONFIG --plan --gpus=256            # trains nothing: memory, days, kWh, CO2

Ctrl-C or SIGTERM ends the run after the current step, and saves it. Exit code 0 means
finished; after any other code, run the same command again.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from configs import load_config, setting
from corpus.large_drops import print_funnel
from corpus.storage import held_out_files
from corpus.trace import places_of_step
from data import Batches, DataConfig, TokenShards, build_data
from eval import EvalConfig, evaluate, sample_text
from model import ModelConfig, OLMo, init_weights, next_token_loss
from scaling.ahead import compile_beside
from scaling.begin import settings_of_start
from scaling.checkpoint import create_state
from scaling.directory import resumed_argv, saved_settings
from scaling.log import print_results, print_run
from scaling.machine import choose_micro_batch
from scaling.plan import PlanConfig, print_plan, say_unused
from scaling.ranks import (agree_on_machine, on_all_ranks, on_rank0, rank, reduce_sum,
                           setup_distributed, world_size)
from scaling.run import Run, deadline_after
from scaling.run_data import BUILD_PATIENCE, data_for_run
from scaling.sharding import full_tensor, init_own_parts, shard_model, sync_gradients
from support.prompts import draw_samples, open_prompts
from support.suites import check_suites, open_suites
from support.vocabulary import open_tokenizer

# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class TrainConfig:
    """How the model is trained (paper, section 3)."""

    # the run
    run_dir: str = setting("runs/tiny", "Directory of the run, on a disk that all nodes see.")
    resume: str = setting("", "Continue this run, with its config; in another run_dir, a fork.")
    overwrite: bool = setting(False, "Delete the run that is in run_dir and begin at step 1.")
    accept_changes: bool = setting(False, "Continue although config or data differ; prints how.")
    start_from: str = setting(
        "", "Begin a new run with this RUN/step... or official checkpoint, optimiser and place in "
        "the data included, or with another model's weights; in adapt.py: the model to tune.")
    fresh_optimizer: bool = setting(
        False, "Take the weights of start_from alone, and begin at step 1 of the data.")
    # the machine
    device: Literal["auto", "cpu", "cuda", "mps"] = setting(
        "auto", "auto is cuda where there is one, else cpu; mps was never tried.")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Dtype of the forward; auto is bfloat16 on fast chips. Weights stay float32.")
    compile: Literal["auto", "true", "false"] = setting(
        "auto", "Compile the blocks and the head; auto does so where the machine can.")
    shard: Literal["all", "hybrid"] = setting(
        "all", "Split the weights over all ranks, or over each node's ranks with a copy per node.")
    activation_checkpointing: Literal["none", "one_in_four", "one_in_three", "one_in_two",
                                      "fine_grained", "whole_layer"] = setting(
        "none", "What the backward recomputes instead of keeping: OLMo's choices, by memory saved.")
    # Without it each rank holds complete float32 gradients until the last backward.
    reduce_every_micro_batch: bool = setting(
        False, "Sum gradients over ranks after each micro-batch, as OLMo did: slower, less memory.")
    # the batch
    batch_size: int = setting(16, "Sequences per step, over all ranks.")
    micro_batch_size: int = setting(0, "Sequences per rank and forward; 0 chooses.")
    max_steps: int = setting(900, "Steps to train; the first is step 1.")
    # the learning rate
    lr: float = setting(3e-3, "Peak learning rate.")
    min_lr: float = setting(3e-4, "Learning rate after the decay; OLMo: a tenth of the peak.")
    warmup_steps: int = setting(100, "Steps of linear warm-up, from a tenth of the peak.")
    schedule: Literal["linear", "cosine"] = setting("linear", "Shape of the decay to min_lr.")
    decay_steps: int = setting(0, "Step at which the rate reaches min_lr; 0 is max_steps.")
    # AdamW
    weight_decay: float = setting(0.1, "AdamW's decay of all matrices but the embedding.")
    beta1: float = setting(0.9, "AdamW's decay of the mean of the gradient.")
    beta2: float = setting(0.95, "AdamW's decay of the mean of the squared gradient.")
    eps: float = setting(1e-5, "AdamW's epsilon; OLMo's is 1e-5.")
    grad_clip: float = setting(1.0, "Largest L2 norm of the whole gradient; 0 does not clip.")
    grad_clip_warmup_steps: int = setting(
        0, "For steps 2..N+1 the clip limit is larger (OLMo-7B-Twin: N = 1000); 0 is off.")
    grad_clip_warmup_factor: float = setting(10.0, "The factor of that larger clip limit.")
    not_finite: Literal["stop", "skip"] = setting(
        "stop", "What to do with a step whose loss or gradient is not finite; it is logged.")
    # when to log, evaluate and save
    log_every_steps: int = setting(10, "Steps between rows of metrics.jsonl.")
    eval_every_steps: int = setting(300, "Steps between evaluations; 0: only at the end.")
    save_every_steps: int = setting(300, "Steps between checkpoints; 0: only at the end.")
    save_every_minutes: float = setting(0.0, "Minutes between further checkpoints; 0: never.")
    keep_last: int = setting(2, "How many checkpoints to keep; 0 keeps all.")
    keep_every: int = setting(0, "Also keep checkpoints of multiples of this step; 0 keeps none.")
    keep_best: bool = setting(False, "Also keep the evaluated step with the fewest bits per byte.")
    verify: Literal["sha256", "size"] = setting(
        "sha256", "How a checkpoint is checked before it is loaded; size is for huge ones.")
    stop_after_minutes: float = setting(
        0.0, "Save and leave after so many minutes, with an exit code other than 0; 0: never.")
    tensorboard: bool = setting(False, "Write the log for TensorBoard too, into RUN/tensorboard.")
    wandb: bool = setting(False, "Send the log to Weights & Biases too; WANDB_PROJECT is obeyed.")
    # energy (paper, section 4.4)
    watts: float = setting(0.0, "Power per rank in watts where no GPU's meter is read; 0: unknown.")
    pue: float = setting(1.1, "PUE: energy of the data centre / energy of its machines.")
    kg_co2_per_kwh: float = setting(0.610, "Carbon intensity of the grid (paper: its A100s).")

    def __post_init__(self):
        for key, value in vars(self).items():
            least = 1 if key in ("batch_size", "max_steps") else 0
            if type(value) in (int, float) and not least <= value < math.inf:
                raise UserError(f"{key}={value}: must be a number >= {least}")
        if max(self.beta1, self.beta2) >= 1:
            raise UserError(f"beta1={self.beta1} and beta2={self.beta2} must be below 1")


# A config file may set any key of these.
SCHEMAS = (ModelConfig, DataConfig, EvalConfig, TrainConfig, PlanConfig)


# ---- The main function ---------------------------------------------------------------------------

def train(model_config, data_config, eval_config, config):
    """Train a run from its start, or its newest checkpoint, to max_steps; returns the exit code."""
    # The machine. Under torchrun this process is one of several ranks. All of them run this very
    # function, line by line, each with its share of every batch and its slice of every weight.
    deadline = deadline_after(config.stop_after_minutes)
    device = setup_distributed(config.device)
    settings = saved_settings(model_config, data_config, eval_config, config)
    dtype, compiled = agree_on_machine(config, settings, device)

    # The data: text -> tokens -> the batch of any step. Rank 0 builds or finds it; the others wait.
    on_rank0(check_suites, eval_config)  # a misspelt suite is an error now, not in hours
    build = compile_beside(build_data, model_config, config, device, dtype, compiled)
    folder = on_rank0(data_for_run, config, data_config, settings, vars(eval_config), build,
                      patience=BUILD_PATIENCE)
    print_funnel(folder, config.run_dir, config.overwrite)
    tokenizer = open_tokenizer(folder / "tokenizer.json", model_config)
    shards = TokenShards(folder, model_config.max_seq_len)
    batches = Batches(shards, config.batch_size, data_config.seed, folder)
    batches(1, rank(), world_size())  # an indivisible batch size is an error now
    suites = open_suites(eval_config, partial(held_out_files, folder))
    prompts = on_rank0(open_prompts, eval_config, tokenizer, model_config.max_seq_len)

    # The run: new, or as it was left. One command starts a run and continues it after a crash.
    run = Run.open(config, settings, batches.fingerprint(), model_config, device, deadline,
                   free_keys=vars(eval_config), can_compare=any(suite.domains for suite in suites))
    if run.is_finished():
        return 0
    model, optimizer = build_training(model_config, config, device, dtype, compiled)
    if run.checkpoint:
        resume(run, model, optimizer)
    else:
        init_own_parts(init_weights, model, data_config.seed)
    run.describe(folder, order=run.state["data"], before=run.state.get("data_changes", []))
    micro_batch_size = choose_micro_batch(config, model_config.max_seq_len, world_size())
    print_run(run, model, batches, micro_batch_size, lr_at_step)

    # The steps. Batch, learning rate and clip limit are functions of the step alone. So a resumed
    # run needs weights, optimiser and this one integer, and any number of ranks does the same.
    with run:
        if run.evaluation_was_missed():
            run.log_evaluation(measure(run, model, tokenizer, suites, prompts, eval_config))
        for step in run.steps():
            lr = lr_at_step(step, config)
            max_norm = clip_at_step(step, config)
            batch = batches(step, rank(), world_size())  # this rank's rows of the global batch
            micro_batches = cut_batch(batch, micro_batch_size, device)
            try:
                metrics = train_step(model, optimizer, micro_batches, pretraining_loss, lr,
                                     max_norm)
            except FloatingPointError as error:  # the weights are untouched
                metrics = run.report_not_finite(step, error, partial(places_of_step, run.path))
            run.log(step, batch, metrics, lr, max_norm)
            if run.save_is_due(step):
                run.save(model, optimizer)  # first: an evaluation may fail, and a signal gives 30 s
            if run.evaluation_is_due(step):
                run.log_evaluation(measure(run, model, tokenizer, suites, prompts, eval_config))
    if not run.ended_by:
        print_results(run)
    return run.exit_code("train.py")


# ---- What training starts from -------------------------------------------------------------------

def build_training(model_config, config, device, dtype, compiled):
    """Returns (an OLMo with empty weights, sharded and compiled as configured; its optimiser)."""
    with torch.device("meta"):  # shapes without memory: a rank of many never holds a whole 7B
        model = OLMo(model_config)
    # Parallelism comes from outside: model.py knows nothing of what this one line puts on it.
    shard_model(model, config, device, dtype, compiled)
    # The optimiser comes after it, because it must hold the parameters that FSDP has split.
    return model, build_optimizer(model, config)


def build_optimizer(model, config):
    """AdamW with OLMo's two groups of parameters; its state exists from the start.

    To try another optimiser, change the one line that makes it: checkpoints and --plan follow.
    """
    # Decay pulls matrices towards zero. Official olmo/optim.py leaves the embedding out, and gives
    # no reason; a usual one: the rows of tokens that a batch lacks have no gradient from the lookup
    # and would only shrink. A tied head has gradients in all rows, but is the same tensor.
    # A norm's gain or a bias (one dimension) is left out too: decay would pull a gain to 0.
    decayed = []
    not_decayed = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() > 1 and name != "wte.weight"
        (decayed if is_matrix else not_decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay},
              {"params": not_decayed, "weight_decay": 0.0}]
    # beta2 = 0.95, not the usual 0.999: the mean of squares then forgets within 20 steps, so one
    # odd batch is not felt for a thousand. eps = 1e-5 is OLMo's, in its code and not in its yaml.
    fused = model.wte.weight.device.type in ("cpu", "cuda")  # one kernel for all parameters
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2),
                                  eps=config.eps, fused=fused)
    create_state(optimizer)
    return optimizer


def resume(run, model, optimizer):
    """Load the run's checkpoint; print it if the learning rate goes on differently from before."""
    run.load(model, optimizer)
    before = run.config_before  # None for a new run
    if before is None or run.step >= run.config.max_steps:
        return
    step = run.step + 1
    lr_before = lr_at_step(step, before)
    lr_now = lr_at_step(step, run.config)
    if lr_now != lr_before:
        print(f"the schedule has changed: step {step} has the learning rate {lr_now:.3g}; with "
              f"max_steps={before.max_steps} it would have had {lr_before:.3g}")


# ---- What a step is given ------------------------------------------------------------------------

def lr_at_step(step, config):
    """The learning rate of step `step`, counted from 1 (official olmo/optim.py).

    Linear warm-up from a tenth of the peak, then linear or cosine decay to min_lr at decay_steps,
    then min_lr. OLMo-7B's final anneal is the decay alone: its warm-up ends before its first step.
    """
    # 1) Warm-up. AdamW divides by a mean of squares that rests on few batches at first, so its
    #    first steps would be large in poor directions. They are made small (OLMo: 2,000 or 5,000).
    if step < config.warmup_steps:
        return config.lr * (0.1 + 0.9 * step / config.warmup_steps)
    # 2) After the decay, the smallest rate for the rest of the run.
    last = config.decay_steps or config.max_steps
    if step >= last:
        return config.min_lr
    # 3) In between, down from the peak. Large steps find a good region, small ones settle in it.
    #    OLMo-7B goes linearly to a tenth of the peak (paper, section 3.2); OLMo-1B's yaml: cosine.
    progress = (step - config.warmup_steps) / (last - config.warmup_steps)  # 0 .. 1
    if config.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return config.lr - (config.lr - config.min_lr) * progress


def clip_at_step(step, config):
    """The limit of the gradient's norm at a step; math.inf where nothing is clipped.

    # subtle: OLMo-7B's twin on LUMI was to have ten times the limit in steps 1..N. Official OLMo
    # clips before it sets the limit, so 2..N+1 had it and step 1 had not. It is the same here.
    """
    limit = config.grad_clip or math.inf
    if 2 <= step <= config.grad_clip_warmup_steps + 1:
        limit *= config.grad_clip_warmup_factor
    return limit


def cut_batch(batch, micro_batch_size, device):
    """A batch as micro-batches of at most micro_batch_size rows on `device`.

    Only the activations of one micro-batch must fit into memory; gradients add up over all of them.
    """
    starts = range(0, len(batch["tokens"]), micro_batch_size)
    return [{key: tensor[start:start + micro_batch_size].to(device)
             for key, tensor in batch.items()} for start in starts]


# ---- The step ------------------------------------------------------------------------------------

def pretraining_loss(model, batch):
    """Returns (summed loss of the next tokens in nats, {})."""
    token_losses = model(batch["tokens"], targets=batch["targets"])
    summed_loss, _ = next_token_loss(token_losses, batch["loss_mask"])
    return summed_loss, {}


def train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm):
    """One update of the weights; returns {loss, grad_norm, ...} of the global batch.

    loss_fn(model, batch) returns (summed loss, extra): extra is {name: summed value} of what else
    is logged. Loss and extra are the sums over all micro-batches and ranks divided by their count
    of trained tokens (in DPO: pairs), so they do not depend on how the batch is cut. grad_norm is
    the L2 norm of the gradient before clipping. Raises FloatingPointError on every rank, before the
    weights change, if the loss or the gradient is not finite.
    """
    # 1) All parts are divided by the count of targets in the step, so every token weighs the same.
    # DIFFERS FROM OLMo: Open Instruct takes the mean of each micro-batch, then the mean of these;
    # tokens of short answers then weigh more.
    # DIFFERS FROM OLMo: since v0.4.0 OLMo divides by T; the code of 1.0 divided by T - 1, as here.
    count = global_count(micro_batches)

    # 2) Forward and backward, one micro-batch at a time. Gradients add up in parameter.grad, then
    #    over the ranks: scaling/sharding.py sets a sum, in the place of FSDP's mean.
    sums = Counter()
    for i, batch in enumerate(micro_batches):
        is_last = i == len(micro_batches) - 1
        sync_gradients(model, is_last)  # ranks sum their gradients, in the last backward alone
        summed_loss, extra = loss_fn(model, batch)
        loss = summed_loss / count
        loss.backward()
        sums["loss"] += loss.detach()
        for name, value in extra.items():
            sums[name] += value / count
    # One message for all numbers. Every rank then has the same ones, and decides alike below.
    totals = reduce_sum(torch.stack(list(sums.values())))

    # 3) A rare batch with a huge gradient would undo the work of many steps. clip_grad_norm_ scales
    #    the gradient down to max_norm (paper, section 3.2) and returns the norm it had before.
    grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    numbers = torch.cat([totals, grad_norm[None]]).tolist()  # the step's one wait for the GPU
    metrics = dict(zip([*sums, "grad_norm"], numbers, strict=True))

    # 4) One inf or nan in the gradient would make all weights nan, so look before the update.
    if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
        optimizer.zero_grad()
        raise FloatingPointError(f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")

    # 5) The update.
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()  # frees the gradients: the next step begins without them
    return metrics


def global_count(micro_batches):
    """How many targets (in DPO: pairs) the step is trained on, over all ranks: a tensor ()."""
    # "real" marks the pairs that are not padding; only the batches of DPO have it
    counted = [batch.get("real", batch["loss_mask"]) for batch in micro_batches]
    return reduce_sum(sum(mask.sum() for mask in counted))


# ---- Evaluation ----------------------------------------------------------------------------------

def measure(run, model, tokenizer, suites, prompts, eval_config):
    """What eval.evaluate returns and, with a single process or at the end, samples.

    With several ranks every new token needs all weights gathered once, so one round must do.
    """
    results = evaluate(model, tokenizer, suites, eval_config)
    if world_size() == 1 or run.step == run.config.max_steps:
        results["samples"] = draw_samples(model, tokenizer, prompts, eval_config, sample_text)
    return results


# ---- The command ---------------------------------------------------------------------------------

@on_all_ranks
def main(argv):
    argv = resumed_argv(argv, "train.py", "configs/tiny.py", is_tuned=False)
    base = settings_of_start(argv, SCHEMAS)  # the shape of the weights that start_from names
    model_config, data_config, eval_config, config, plan = load_config(argv, *SCHEMAS, base=base)
    if plan.plan:
        return print_plan(model_config, config, plan, build_optimizer)
    say_unused(argv)
    return train(model_config, data_config, eval_config, config)


if __name__ == "__main__":
    run_main(main)
