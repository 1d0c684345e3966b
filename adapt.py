"""Adaptation: a base model learns to answer, from chats (SFT), then from preferences (DPO).

    python adapt.py configs/tiny_sft.py [--key=value ...]    # then configs/tiny_dpo.py
    python adapt.py --resume=RUN                             # go on where it stopped
    torchrun --nproc_per_node=8 adapt.py configs/olmo_7b_sft.py
    python adapt.py show CONFIG [--examples=3]               # examples; what is trained, in colour
    python adapt.py chat RUN                                 # talk to it
    python adapt.py generate RUN PROMPTS.jsonl OUT.jsonl     # its answers, for a judge

RUN is a run directory, one of its step directories, or a Hugging Face directory of an OLMo. Chats
are JSONL of {messages: [{role, content}]}, preferences of {chosen, rejected}, two such lists or,
beside a `prompt`, two texts; "stdlib" makes both from the Python that runs this.

Paper: OLMo (arXiv 2402.00838), section 4.3, after Tulu 2 and Open Instruct; DPO: arXiv 2305.18290.
Parts, in order: configuration, reading, the embedded sets, examples and batches, losses, the
reference, evaluation, the run, answers and chat.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configs import flat, load_config, read_assignments
from corpus.stages import held_out_files
from corpus.tokenizer import Tokenizer
from corpus.trace import data_of_run
from data import DataConfig, instance_order, render_chat
from eval import EvalConfig, length_batches, own_batches
from eval import evaluate as evaluate_model
from model import generate, next_token_loss, sequence_log_probs
from scaling.directory import NOT_SAVED
from scaling.machine import choose_micro_batch
from scaling.ranks import (agree_on_machine, from_rank0, on_all_ranks, on_rank0, rank, reduce_sum,
                           setup_distributed, world_size)
from scaling.run import Run, deadline_after
from scaling.sharding import evaluating
from support.chats import read_set, require
from support.cpu import packed_weights
from support.files import UserError, read_json, run_main, write_json
from support.models import fill_weights, open_base
from support.records import domains_table, tasks_table
from support.talk import ANSWER_BATCH, chat, coloured, generate_answers, harmless
from support.tasks import open_suites
from train import (TrainConfig, build_training, check_vocabulary, clip_at_step, cut_batch,
                   lr_at_step, resumed_argv, train_step)


LN_2 = math.log(2)

FIRST_LOSS_WIDTH = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # of DPO's first loss around ln 2;


# in bfloat16 it lay within 0.0012 over 32 batches of the tiny run, and answers can be longer
# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class AdaptConfig:
    """How a base model is tuned; paper, section 4.3. The rest of the recipe is TrainConfig's."""

    method: Literal["sft", "dpo"] = "sft"
    """Learn the answers of chats, or to prefer one answer to another."""
    train_data: str = "stdlib"
    """JSONL(.gz) file or folder of chats or preferences; stdlib is the embedded set."""
    eval_data: str = "stdlib"
    """The same, held out: evaluated and never trained on; an empty name is none."""
    faulty: Literal["stop", "skip"] = "stop"
    """What to do with a row that cannot be used; skipped ones are counted."""
    epochs: float = 3.0
    """Passes over train_data; max_steps, warmup_steps and decay_steps follow from it."""
    warmup_share: float = 0.03
    """Share of the steps in which the learning rate rises, from a tenth of its peak."""
    beta: float = 0.1
    """DPO: how dear it is to move away from the reference."""
    length_normalized: bool = False
    """DPO: by log-probability a token, not a sequence; set beta=5 with it, as OLMo 2 did."""
    eval_answers: int = 32
    """Held-out prompts, at most, answered greedily at each evaluation; three are logged."""

    def __post_init__(self):
        if not 0 < self.epochs < math.inf or not 0 <= self.warmup_share < 1:
            raise UserError(f"epochs={self.epochs} must be above 0 and warmup_share="
                            f"{self.warmup_share} at least 0 and below 1")
        if not 0 < self.beta < math.inf or self.eval_answers < 0:
            raise UserError(f"beta={self.beta} must be above 0 and eval_answers="
                            f"{self.eval_answers} at least 0")


@dataclass(frozen=True)
class ShowOptions:
    """What `show` prints."""

    examples: int = 3
    """How many examples, from all over the set."""

    def __post_init__(self):
        if self.examples < 1:
            raise UserError(f"examples={self.examples} must be at least 1")


# ---- Examples and batches ------------------------------------------------------------------------

class Example(NamedTuple):
    """A chat as ids, as long whether each is trained, and how many ids come before its answer."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool
    prompt: int
    place: str


class Pair(NamedTuple):
    chosen: Example
    rejected: Example


def encode_example(messages, tokenizer, max_seq_len, place, counts, answer_only=False):
    """The Example of messages, cut at the right; None, and counted, if nothing of it is trained.

    answer_only: of the last message alone, as preferences differ in no other.
    """
    ids, trained = render_chat(messages, tokenizer)
    prompt = len(render_chat(messages[:-1], tokenizer, reply=True)[0])
    cut = len(ids) > max_seq_len
    ids, trained = np.array(ids[:max_seq_len], np.int32), np.array(trained[:max_seq_len])
    if answer_only:
        trained[:prompt] = False
    if not trained.any():
        counts["left out, as nothing of an answer fits"] += 1
        return None
    counts["cut, so that the last answer has no end"] += cut
    return Example(ids, trained, prompt, place)


def encode_pair(row, tokenizer, max_seq_len, place, counts):
    """The Pair of a preference; None, and counted, if one side is None or both are cut to one."""
    found = Counter()
    chosen, rejected = (
        encode_example([*row["prompt"], {"role": "assistant", "content": row[side]}], tokenizer,
                       max_seq_len, place, found, answer_only=True)
        for side in ("chosen", "rejected"))
    counts.update(dict.fromkeys(+found, 1))  # a pair counts once, whichever of its sides it is
    if not (chosen and rejected):
        return None
    if np.array_equal(chosen.ids, rejected.ids):
        counts["left out, as both answers are cut to the same"] += 1
        return None
    return Pair(chosen, rejected)


def read_examples(path, config, tokenizer, max_seq_len, held_out, eval_share):
    """The Examples or Pairs of a set, in its order; prints what was counted."""
    if not path:
        return []
    counts, examples = Counter(), []
    for place, row in read_set(path, config, held_out, eval_share, counts):
        example = (encode_example(row["messages"], tokenizer, max_seq_len, place, counts)
                   if config.method == "sft" else
                   encode_pair(row, tokenizer, max_seq_len, place, counts))
        if example:
            examples.append(example)
    sequences = sequences_of(examples)
    tokens = sum(len(sequence.ids) for sequence in sequences)
    trained = sum(int(sequence.trained.sum()) for sequence in sequences)
    require(examples, f"{path}: nothing is left of it ({dict(+counts)})")
    print(f"{'eval' if held_out else 'train'}_data={path}: {len(examples):,} "
          f"{'chats' if config.method == 'sft' else 'pairs'} of {tokens:,} tokens, "
          f"{trained / tokens:.0%} of them in answers"
          + "".join(f"; {count:,} {what}" for what, count in counts.items() if count))
    return examples


def sequences_of(examples):
    """The Examples of a set; of pairs, all that are chosen and then all that are rejected."""
    if examples and isinstance(examples[0], Pair):
        return [pair.chosen for pair in examples] + [pair.rejected for pair in examples]
    return list(examples)


def examples_of_step(step, n, batch_size, seed):
    """The numbers of the examples in a step, of n, as in pretraining a pure function of it.

    An epoch's order is its own; its last step takes what is left, so that none is lost.
    """
    epoch, position = divmod(step - 1, -(-n // batch_size))
    return epoch_order(n, seed, epoch)[position * batch_size:(position + 1) * batch_size].tolist()


epoch_order = lru_cache(2)(instance_order)


def best_fit(lengths, room):
    """Bins of at most `room` tokens, as lists of numbers: each, the longest first, into the fullest
    bin that still holds it."""
    bins, free = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [number for number, left in enumerate(free) if left >= lengths[i]]
        if not fitting:
            fitting, bins, free = [len(bins)], [*bins, []], [*free, room]
        number = min(fitting, key=free.__getitem__)
        bins[number].append(i)
        free[number] -= lengths[i]
    return bins


def packed_rows(bins, seq_len, pad_token_id):
    """{tokens, targets, positions, documents: int64, loss_mask: bool}, (B, T) each, of `bins`.

    bins: lists of Examples, a row each. `documents` numbers those of a row, -1 where there is none;
    `positions` count from 0 in each. A target is the next token of the same example.
    """
    shape = len(bins), seq_len
    batch = {"tokens": torch.full(shape, pad_token_id), "targets": torch.full(shape, pad_token_id),
             "positions": torch.zeros(shape, dtype=torch.int64),
             "documents": torch.full(shape, -1), "loss_mask": torch.zeros(shape, dtype=torch.bool)}
    for row, examples in enumerate(bins):
        begin = 0
        for number, example in enumerate(examples):
            end = begin + len(example.ids)
            batch["tokens"][row, begin:end] = torch.from_numpy(example.ids)
            batch["targets"][row, begin:end - 1] = torch.from_numpy(example.ids[1:])
            batch["positions"][row, begin:end] = torch.arange(end - begin)
            batch["documents"][row, begin:end] = number
            batch["loss_mask"][row, begin:end - 1] = torch.from_numpy(example.trained[1:])
            begin = end
    return batch


def sft_batches(examples, batch_size, seed, seq_len, pad_token_id, rows):
    """The batch of a step, `batches(step, rank, world_size)`: its examples packed into rows.

    batch_size counts examples, as in Open Instruct, however few rows they take. Empty rows fill up
    what the ranks pass through the model, `rows` at a time.
    """
    def batches(step, rank=0, world_size=1):
        chosen = [examples[i] for i in examples_of_step(step, len(examples), batch_size, seed)]
        bins = [[chosen[i] for i in numbers]
                for numbers in best_fit([len(example.ids) for example in chosen], seq_len)]
        bins += [[]] * (-len(bins) % (rows * world_size))
        return packed_rows(bins[rank::world_size], seq_len, pad_token_id)
    return batches


def preference_batches(pairs, reference, batch_size, seed, seq_len, pad_token_id, rows):
    """The batch of a step, `batches(step, rank, world_size)`: pairs, padded on the right.

    {tokens, targets, loss_mask: (B, 2, T), chosen first; reference: float32 (B, 2), of `reference`
    (N, 2); real: bool (B,)}. T is the power of two that holds the step's longest, as each length is
    compiled for itself. Pairs that are not real fill up what the ranks pass through.
    """
    def batches(step, rank=0, world_size=1):
        numbers = examples_of_step(step, len(pairs), batch_size, seed)
        longest = max(len(side.ids) for i in numbers for side in pairs[i])
        length = min(seq_len, max(64, 2 ** (longest - 1).bit_length()))
        wanted = numbers + [None] * (-len(numbers) % (rows * world_size))
        own = wanted[rank::world_size]
        sides = [[] if i is None else [pairs[i][side]] for i in own for side in (0, 1)]
        batch = packed_rows(sides, length, pad_token_id)
        batch = {key: batch[key].unflatten(0, (len(own), 2))
                 for key in ("tokens", "targets", "loss_mask")}
        known = [(0.0, 0.0) if i is None else reference[i].tolist() for i in own]
        return {**batch, "reference": torch.tensor(known),
                "real": torch.tensor([i is not None for i in own])}
    return batches


# ---- Losses --------------------------------------------------------------------------------------

def sft_loss(model, batch):
    """(summed nats, count) of the trained tokens of packed rows, which see their own example."""
    documents = batch["documents"]
    sees = (documents[:, :, None] == documents[:, None]).tril()[:, None]  # (B, 1, T, T)
    nats = model(batch["tokens"], targets=batch["targets"], attn_mask=sees,
                 positions=batch["positions"])
    return next_token_loss(nats, batch["loss_mask"])[0], {}


def dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """{loss and metrics, under TRL's names: (B,)} of log-probabilities (B,) of answers in nats.

    A reward is beta times how much likelier the policy finds an answer than the reference does; the
    loss is -log sigmoid of the chosen one's over the other's (arXiv 2305.18290, eq. 7).
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return {"loss": -F.logsigmoid(chosen - rejected),
            "rewards/chosen": chosen.detach(), "rewards/rejected": rejected.detach(),
            "rewards/margins": (chosen - rejected).detach(),
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": policy_chosen.detach(), "logps/rejected": policy_rejected.detach()}


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """(loss, metrics): the means of `dpo_terms` over pairs."""
    terms = dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    means = {name: value.mean() for name, value in terms.items()}
    return means.pop("loss"), means


def preference_loss(model, batch, beta, length_normalized=False):
    """(summed loss, {metric: sum}) of the real pairs of a batch, all in one forward."""
    tokens, targets, loss_mask = (batch[key].transpose(0, 1).flatten(0, 1)  # chosen, then rejected
                                  for key in ("tokens", "targets", "loss_mask"))
    log_probs, counts = sequence_log_probs(model(tokens, targets=targets), loss_mask)
    policy, counts = (x.unflatten(0, (2, -1)) for x in (log_probs, counts))  # (2, B)
    reference = batch["reference"].T.to(policy)
    if length_normalized:
        counts = counts.clamp(min=1)  # of what only fills up
        policy, reference = policy / counts, reference / counts
    sums = {name: (value * batch["real"]).sum()
            for name, value in dpo_terms(*policy, *reference, beta).items()}
    return sums.pop("loss"), sums


def check_first_loss(step, metrics, width):
    """At step 1 the policy is the reference: UserError where DPO's loss is not ln 2 +- width."""
    if step > 1:
        return
    tqdm.write(f"the first step's loss is {metrics['loss']:.4f}; ln 2 is {LN_2:.4f}")
    if abs(metrics["loss"] - LN_2) > width:
        raise UserError(f"the first loss must be ln 2 within {width:g}: the reference's log-"
                        "probabilities are not those of the weights that are tuned; --overwrite "
                         "computes them anew. If that changes nothing, bfloat16 may round too much "
                        "of long answers: --dtype=float32")


# ---- The reference -------------------------------------------------------------------------------

def completion_log_probs(model, sequences, batch_tokens):
    """Float64 (N, 2): log-probability in nats of each Example's trained tokens, and their count.

    Those of the other ranks are 0: the sum over ranks is the whole.
    """
    found = torch.zeros(len(sequences), 2, dtype=torch.float64)
    batches = length_batches(list(enumerate(sequences)), batch_tokens, lambda row: len(row[1].ids))
    with evaluating(model):
        for batch, counts in tqdm(own_batches(batches), leave=False, unit="batch",
                                  disable=rank() > 0 or None):
            numbers, examples = zip(*batch, strict=True)
            packed = packed_rows([[example] for example in examples], len(examples[0].ids),
                                 model.config.pad_token_id)
            tokens, targets, loss_mask = (packed[key].to(model.wte.weight.device)
                                          for key in ("tokens", "targets", "loss_mask"))
            sums = sequence_log_probs(model(tokens, targets=targets), loss_mask)
            own = torch.stack(sums, dim=1).cpu().double()
            found.index_add_(0, torch.tensor(numbers), own * counts)
    return found


def shared_log_probs(model, sequences, batch_tokens):
    """The same, computed by all ranks together."""
    return reduce_sum(completion_log_probs(model, sequences, batch_tokens))


def reference_file(run, fingerprint, dtype):
    """Where the reference's log-probabilities lie: under a name of its weights, data and dtype."""
    key = json.dumps([fingerprint["base_sha256"], fingerprint["data_sha256"], str(dtype)])
    return run / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def reference_log_probs(file, model, sets, batch_tokens):
    """Float64 (N, 2) for each of some sets of pairs: the reference's log-probability of each chosen
    and rejected answer.

    Computed once, with the model as it is now, and kept in `file`; then they are read from there.
    UserError if one is missing.
    """
    if not on_rank0(file.is_file):
        log_probs = [shared_log_probs(model, sequences_of(pairs), batch_tokens)[:, 0]
                     .view(2, -1).T.tolist() for pairs in sets]
        on_rank0(lambda: write_json(file, {"log_probs": log_probs}))
    found = [np.array(own, np.float64).reshape(-1, 2)
             for own in read_json(file).get("log_probs", ())]
    require(list(map(len, found)) == list(map(len, sets))
            and np.isfinite(np.concatenate(found)).all(), f"{file}: does not hold the "
            f"log-probabilities of {sum(map(len, sets)):,} pairs; delete it")
    return found


# ---- Evaluation ----------------------------------------------------------------------------------

def mean_and_error(sums, counts):
    """Sum of `sums` by sum of `counts`, (N,) each, and the standard error of that ratio."""
    n, mean = len(sums), (sums.sum() / counts.sum()).item()
    residuals = sums - mean * counts
    error = math.sqrt(n / max(1, n - 1) * (residuals ** 2).sum().item()) / counts.sum().item()
    return mean, error


def evaluate_chats(model, examples, batch_tokens):
    """{loss, loss_error}: nats per trained token of held-out chats."""
    log_probs, counts = shared_log_probs(model, examples, batch_tokens).T
    loss, error = mean_and_error(-log_probs, counts)
    return {"loss": loss, "loss_error": error}


def evaluate_pairs(model, pairs, reference, batch_tokens, config):
    """{dpo_loss, accuracy, ...} of held-out pairs.

    accuracy: share whose chosen answer the policy itself finds likelier; reward_accuracy: in which
    it does so more than the reference does.
    """
    found = shared_log_probs(model, sequences_of(pairs), batch_tokens)
    policy, counts = (column.view(2, -1) for column in found.T)  # (2, N): chosen, rejected
    right = (policy[0] > policy[1]).double()
    accuracy, error = mean_and_error(right, torch.ones_like(right))
    scale = counts if config.length_normalized else 1
    loss, metrics = dpo_loss(*(policy / scale), *(torch.from_numpy(reference).T / scale),
                             config.beta)
    return {"dpo_loss": loss.item(), "accuracy": accuracy, "accuracy_error": error,
            "reward_accuracy": metrics["rewards/accuracies"].item(),
            "reward_margin": metrics["rewards/margins"].item()}


def answer_prompts(model, tokenizer, prompts, max_new_tokens):
    """(texts of prompts, ids, with their greedy answers; share of the answers that end)."""
    with evaluating(model), packed_weights(model):
        answers = []
        for begin in range(0, len(prompts), ANSWER_BATCH):
            answers += generate(model, prompts[begin:begin + ANSWER_BATCH], max_new_tokens,
                                stop_ids=(tokenizer.eos_token_id,), sync=from_rank0)
    ended = sum(answer[-1] == tokenizer.eos_token_id for answer in answers)
    return [tokenizer.decode([*prompt[1:], *answer]) for prompt, answer
            in zip(prompts, answers, strict=True)], ended / len(prompts)


def evaluate_tuning(model, tokenizer, eval_set, reference, adapt_config, eval_config):
    """{tuned: what is measured of the held-out set, samples: three answers}."""
    if not eval_set:
        return {}
    batch_tokens = eval_config.eval_batch_tokens
    tuned = (evaluate_chats(model, eval_set, batch_tokens) if adapt_config.method == "sft" else
             evaluate_pairs(model, eval_set, reference, batch_tokens, adapt_config))
    prompts = list(dict.fromkeys(
        tuple(example.ids[:example.prompt].tolist()) for example in sequences_of(eval_set)
        if example.prompt < model.config.max_seq_len))
    if not prompts or not adapt_config.eval_answers:
        return {"tuned": tuned}
    prompts = prompts[::-(-len(prompts) // adapt_config.eval_answers)]  # from all over the set
    texts, ended = answer_prompts(model, tokenizer, prompts, eval_config.max_new_tokens)
    return {"tuned": {**tuned, "ended": ended}, "samples": texts[:3]}


DERIVED = {"max_steps", "warmup_steps", "decay_steps"}  # from the epochs and the data


def by_epochs(adapt_config, config, examples):
    """The TrainConfig with the steps and the schedule that the epochs ask for.

    # DIFFERS FROM OLMo: Open Instruct warms up from 0 and runs a step behind, so that its first
    # step changes nothing. Here it is OLMo's own warm-up, and the rate is 0 a step after the last.
    """
    steps = max(1, round(adapt_config.epochs * -(-examples // config.batch_size)))
    return replace(config, max_steps=steps, decay_steps=steps + 1,
                   warmup_steps=math.ceil(adapt_config.warmup_share * steps))


def fingerprint_of(base, train_set, eval_set, batch_size, seed):
    """What a resumed run must find unchanged."""
    digest = hashlib.sha256(str([len(train_set), len(eval_set)]).encode())
    for example in sequences_of([*train_set, *eval_set]):
        digest.update(example.ids.tobytes() + example.trained.tobytes())
    return {"base_sha256": base.digest, "data_sha256": digest.hexdigest(),
            "instances": len(train_set), "seq_len": base.model_config.max_seq_len,
            "batch_size": batch_size, "seed": seed}


def adapt(adapt_config, eval_config, config):
    """Tune a run from its base, or its newest checkpoint, to the end; returns the exit code."""
    deadline, run = deadline_after(config.stop_after_minutes), Path(config.run_dir)
    is_dpo = adapt_config.method == "dpo"
    device, ranks = setup_distributed(config.device), world_size()

    # What is tuned, and on what
    base = on_rank0(lambda: open_base(config.start_from, config.verify),
                   patience=timedelta(hours=2))
    require(run.resolve() not in (base.home.resolve(), base.weights.resolve()),
            f"run_dir={run} is the run that is tuned; choose another --run_dir")
    tokenizer = Tokenizer.load(base.home / "tokenizer.json")
    check_vocabulary(base.model_config, tokenizer)
    seq_len, pad_token_id = base.model_config.max_seq_len, base.model_config.pad_token_id
    data_config = DataConfig(**base.settings)
    read = partial(read_examples, config=adapt_config, tokenizer=tokenizer, max_seq_len=seq_len,
                   eval_share=data_config.eval_share)
    train_set = read(adapt_config.train_data, held_out=False)
    eval_set = read(adapt_config.eval_data, held_out=True)
    config = by_epochs(adapt_config, config, len(train_set))
    fingerprint = fingerprint_of(base, train_set, eval_set, config.batch_size, data_config.seed)
    suites = open_suites(eval_config, partial(held_out_of_base, base))

    # The machine
    settings = {**base.settings, **flat(base.model_config, eval_config, adapt_config, config)}
    settings = {key: value for key, value in settings.items() if key not in NOT_SAVED}
    dtype, compiled = agree_on_machine(config, settings, device)
    rows = choose_rows(config, seq_len, ranks, is_dpo)

    # The run: new, or as it was left
    derived_or_free = {*DERIVED, *vars(eval_config)}
    run = Run.open(replace(config, start_from=""), settings, fingerprint, base.model_config, device,
                   deadline, free_keys=derived_or_free)
    if run.is_finished():
        return 0

    # The model, its optimiser, and what the reference thinks
    model, optimizer = build_training(base.model_config, config, device, dtype, compiled)
    order, held_out_reference = (config.batch_size, data_config.seed), None
    file = reference_file(run.path, fingerprint, dtype)
    if not run.checkpoint or is_dpo and not on_rank0(file.is_file):
        fill_weights(model, base)
    if is_dpo:
        reference, held_out_reference = reference_log_probs(
            file, model, (train_set, eval_set), eval_config.eval_batch_tokens)
        batches = preference_batches(train_set, reference, *order, seq_len, pad_token_id, rows)
        loss_fn = partial(preference_loss, beta=adapt_config.beta,
                          length_normalized=adapt_config.length_normalized)
        scale = 1 if adapt_config.length_normalized else max(1, adapt_config.beta / 0.1)
        check = partial(check_first_loss, width=FIRST_LOSS_WIDTH[dtype] * scale)
    else:
        batches = sft_batches(train_set, *order, seq_len, pad_token_id, rows)
        loss_fn, check = sft_loss, lambda step, metrics: None
    if run.checkpoint:
        run.load(model, optimizer)
    run.describe(base.home, tuned_on=fingerprint)
    print(f"run: {run.path}, {adapt_config.method} of {base.weights}, {config.max_steps:,} steps "
          f"of {config.batch_size} {'pairs' if is_dpo else 'chats'}, {rows} "
          f"{'pairs' if is_dpo else 'packed rows'} at a time")

    # The steps
    def evaluate():
        results = evaluate_model(model, tokenizer, suites, eval_config)
        return results | evaluate_tuning(model, tokenizer, eval_set, held_out_reference,
                                         adapt_config, eval_config)

    sequences = sequences_of(train_set)

    def places(step):
        return [sequences[i].place for i in examples_of_step(step, len(train_set), *order)]
    with run:
        if run.step == 0 or run.evaluation_was_missed():  # step 0: what the tuning starts from
            run.log_evaluation(evaluate())
        for step in run.steps():
            lr = lr_at_step(step, config)
            max_norm = clip_at_step(step, config)
            batch = batches(step, rank(), world_size())
            micro_batches = cut_batch(batch, rows, device)
            try:
                metrics = train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm)
                check(step, metrics)
            except FloatingPointError as error:
                metrics = run.report_not_finite(step, error, places)
            run.log(step, batch, metrics, lr, max_norm)
            if run.save_is_due(step):
                run.save(model, optimizer)
            if run.evaluation_is_due(step):
                run.log_evaluation(evaluate())
    if run.ended_by:
        return run.say_stopped("adapt.py")
    results, last, run = run.results, run.step, run.path
    if results["sums"]:
        print(f"\nheld-out text after step {last}:\n{domains_table(results['sums'])}")
    if results["tasks"]:
        print(tasks_table(results["tasks"]))
    for text in results.get("samples", ()):
        print(f"\n{harmless(text)}")
    print(f"\nnext:\n  python adapt.py chat {run}"
          + f"\n  python eval.py {run}" * (run / "manifest.json").is_file())
    return 0


def held_out_of_base(base):
    """{source: file} of the text that the base's pretraining held out; {} for others' models."""
    if not (base.home / "manifest.json").is_file():
        return {}
    return held_out_files(data_of_run(base.home, DataConfig(**base.settings)))


def choose_rows(config, seq_len, ranks, is_dpo):
    """Rows of a forward: pairs as in pretraining, or packed rows of about 1,024 tokens."""
    if is_dpo:
        return choose_micro_batch(config, 2 * seq_len, ranks)
    return config.micro_batch_size or max(1, 1024 // seq_len)


def show(argv):
    """Print examples of a config's train_data, what is trained in colour or in brackets."""
    adapt_config, config, options = load_config(argv, AdaptConfig, TrainConfig, ShowOptions)
    base = open_base(config.start_from, config.verify)
    tokenizer = Tokenizer.load(base.home / "tokenizer.json")
    examples = read_examples(adapt_config.train_data, adapt_config, tokenizer,
                             base.model_config.max_seq_len, False,
                             DataConfig(**base.settings).eval_share)
    on, off = ("\033[1;32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")
    for example in examples[::max(1, len(examples) // options.examples)][:options.examples]:
        for side in ("chosen", "rejected") if isinstance(example, Pair) else ("",):
            sequence = getattr(example, side) if side else example
            print(f"\n---- {side} {sequence.place}: {len(sequence.ids)} tokens, "
                  f"{sum(sequence.trained)} of them trained")
            print(coloured(sequence, tokenizer, on, off))


# ---- Commands ------------------------------------------------------------------------------------

@on_all_ranks
def main(argv):
    verbs = {"show": show, "chat": chat, "generate": generate_answers}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    follows = [word for word in argv if word.removeprefix("--").partition("=")[0] in DERIVED]
    require(not follows, f"{' '.join(follows)}: follows from --epochs and --warmup_share here, "
            "such as --epochs=0.1")
    for file in [word for word in argv if word.endswith(".py") and Path(word).is_file()]:
        for line, key, _ in read_assignments(Path(file)):
            if key in DERIVED:
                print(f"{file}:{line}: {key} is not used; epochs and warmup_share say it")
    argv = resumed_argv(argv, "adapt.py", is_tuned=True)
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python adapt.py configs/tiny_sft.py), --resume=RUN, "
                        "show, chat or generate")
    return adapt(*load_config(argv, AdaptConfig, EvalConfig, TrainConfig))


if __name__ == "__main__":
    run_main(main)
