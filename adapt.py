"""Adaptation: a base model learns to answer from chats (SFT), then from preferences (DPO).

    python adapt.py configs/tiny_sft.py [--key=value ...]    # then configs/tiny_dpo.py
    python adapt.py --resume=RUN                             # go on where the run stopped
    torchrun --nproc_per_node=8 adapt.py configs/olmo_7b_sft.py
    python adapt.py show CONFIG [--examples=3]               # examples, with what is trained marked
    python adapt.py chat RUN                                 # talk to the tuned model
    python adapt.py generate RUN PROMPTS.jsonl OUT.jsonl     # write its answers, for a judge

RUN is a run directory, one of its step directories, or a Hugging Face directory of an OLMo. Chats
are JSONL of {messages: [{role, content}]}. Preferences are JSONL of {chosen, rejected}: two such
lists, or two texts with a `prompt`. "stdlib" makes both from the Python that runs this.

Paper: OLMo (arXiv 2402.00838), section 4.3, which follows Tulu 2 and Open Instruct; DPO is arXiv
2305.18290. Parts, in order: configuration, adapt(), examples, batches, losses, the reference,
evaluation, commands.
"""

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate
from tqdm import tqdm

from configs import load_config, setting
from corpus.tokenizer import Tokenizer
from data import DataConfig, instance_order, render_chat
from eval import EvalConfig, evaluate
from model import ModelConfig, next_token_loss, sequence_log_probs
from scaling.directory import resumed_argv, saved_settings
from scaling.machine import choose_micro_batch
from scaling.ranks import (agree_on_machine, on_all_ranks, on_rank0, rank, reduce_sum,
                           setup_distributed, world_size)
from scaling.run import READ_PATIENCE, Run, deadline_after
from scaling.sharding import evaluating
from support.chats import read_set
from support.files import UserError, run_main, write_json
from support.models import fill_weights, open_base
from support.scoring import length_batches, own_batches
from support.talk import ShowOptions, answer_prompts, chat, generate_answers, show
from support.tasks import open_suites
from support.tuned import (check_not_base, held_out_of_base, print_results, print_run, print_set,
                           read_reference, reference_file, refuse_derived)
from train import (SCHEMAS, TrainConfig, build_training, check_vocabulary, clip_at_step,
                   cut_batch, lr_at_step, resume, train_step)


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class AdaptConfig:
    """How a base model is tuned; paper, section 4.3. The rest of the recipe is TrainConfig's."""

    # sft imitates every answer of a chat; dpo raises one answer's probability against another's
    method: Literal["sft", "dpo"] = setting("sft", "Learn from chats, or from preferences.")
    # OLMo: Tulu 2's mixture of 326,154 chats, then some 61,000 pairs of UltraFeedback
    train_data: str = setting("stdlib", "JSONL(.gz) file or folder; stdlib is the embedded set.")
    eval_data: str = setting("stdlib", "The same, held out: never trained on; empty is none.")
    faulty: Literal["stop", "skip"] = setting("stop", "What to do with a row that has a fault.")
    epochs: float = setting(3.0, "Passes over train_data; they set the steps and the schedule.")
    # OLMo: 3 % of the steps for SFT, 10 % for DPO, from a tenth of the peak
    warmup_share: float = setting(0.03, "Share of the steps in which the learning rate rises.")
    # a small beta lets the policy move far from the reference for a little gain in preference
    beta: float = setting(0.1, "DPO: strength of the KL penalty towards the reference model.")
    # sums favour long answers, which have more tokens to gain from; OLMo 1.0 took sums all the same
    length_normalized: bool = setting(
        False, "DPO: compare log-probabilities per token; set beta=5 with it, as OLMo 2 did.")
    eval_answers: int = setting(
        32, "At each evaluation, answer at most so many held-out prompts greedily; log three.")

    def __post_init__(self):
        if not 0 < self.epochs < math.inf:
            raise UserError(f"epochs={self.epochs}: it must be above 0")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"warmup_share={self.warmup_share}: it must be at least 0 and below 1")
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta={self.beta}: it must be above 0")
        if self.eval_answers < 0:
            raise UserError(f"eval_answers={self.eval_answers}: it must be at least 0")


# these keys follow from epochs, warmup_share and the size of train_data
DERIVED = {"max_steps", "warmup_steps", "decay_steps"}

# ---- Adapting ------------------------------------------------------------------------------------

def adapt(adapt_config, eval_config, config):
    """Tune a base model, or continue from the run's newest checkpoint; returns the exit code."""
    deadline = deadline_after(config.stop_after_minutes)
    device = setup_distributed(config.device)

    # The base: what pretraining left for SFT, what SFT left for DPO. Rank 0 checks its files.
    base = on_rank0(partial(open_base, config.start_from, config.verify), patience=READ_PATIENCE)
    check_not_base(Path(config.run_dir), base)
    tokenizer = Tokenizer.load(base.home / "tokenizer.json")
    check_vocabulary(base.model_config, tokenizer)

    # The examples, and the schedule that follows from their number
    train_set, eval_set = read_sets(adapt_config, base, tokenizer)
    suites = open_suites(eval_config, partial(held_out_of_base, base))
    config = by_epochs(adapt_config, config, len(train_set))
    fingerprint = fingerprint_of(base, train_set, eval_set, config)
    settings = base.settings | saved_settings(base.model_config, eval_config, adapt_config, config)
    dtype, compiled = agree_on_machine(config, settings, device)

    # The run: new, or as it was left
    run = Run.open(replace(config, start_from=""), settings, fingerprint, base.model_config, device,
                   deadline, free_keys={*DERIVED, *vars(eval_config)})
    if run.is_finished():
        return 0
    model, optimizer = build_training(base.model_config, config, device, dtype, compiled)
    sets = [train_set, eval_set]
    references = reference_log_probs(run, base, model, sets, adapt_config, eval_config)
    if run.checkpoint:
        resume(run, model, optimizer)
    else:
        fill_weights(model, base)
    run.describe(base.home, tuned_on=fingerprint)
    batches, loss_fn = batches_and_loss(run, train_set, references[0], adapt_config)
    print_run(run.path, base, adapt_config, config, batches.micro_batch_size)

    # The steps: the same loop as train.py, with other batches and another loss
    with run:
        if run.step == 0 or run.evaluation_was_missed():  # step 0: what the tuning starts from
            run.log_evaluation(evaluate_tuned(model, tokenizer, suites, eval_set, references[1],
                                              adapt_config, eval_config))
        for step in run.steps():
            lr = lr_at_step(step, config)
            max_norm = clip_at_step(step, config)
            batch = batches(step, rank(), world_size())
            micro_batches = cut_batch(batch, batches.micro_batch_size, device)
            try:
                metrics = train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm)
            except FloatingPointError as error:  # the weights are untouched
                metrics = run.report_not_finite(step, error, batches.places)
            if step == 1 and adapt_config.method == "dpo":
                check_first_loss(metrics, dtype, adapt_config)
            run.log(step, batch, metrics, lr, max_norm)
            if run.save_is_due(step):
                run.save(model, optimizer)
            if run.evaluation_is_due(step):
                run.log_evaluation(evaluate_tuned(model, tokenizer, suites, eval_set, references[1],
                                                  adapt_config, eval_config))
    if not run.ended_by:
        print_results(run.path, run.step, run.results)
    return run.exit_code("adapt.py")


def by_epochs(adapt_config, config, examples):
    """The TrainConfig with the steps and the schedule that the epochs ask for.

    # DIFFERS FROM OLMo: Open Instruct warms up from 0 and runs a step behind, so that its first
    # step changes nothing. Here the warm-up is that of OLMo's pretraining, and the learning rate
    # would reach 0 one step after the last.
    """
    steps_per_epoch = math.ceil(examples / config.batch_size)
    steps = max(1, round(adapt_config.epochs * steps_per_epoch))
    warmup_steps = math.ceil(adapt_config.warmup_share * steps)
    return replace(config, max_steps=steps, warmup_steps=warmup_steps, decay_steps=steps + 1)


def fingerprint_of(base, train_set, eval_set, config):
    """What a resumed run must find unchanged: weights, examples, order."""
    digest = hashlib.sha256(str([len(train_set), len(eval_set)]).encode())
    for example in sequences_of([*train_set, *eval_set]):
        digest.update(example.ids.tobytes())
        digest.update(example.trained.tobytes())
    return {"base_sha256": base.digest, "data_sha256": digest.hexdigest(),
            "instances": len(train_set), "seq_len": base.model_config.max_seq_len,
            "batch_size": config.batch_size, "seed": DataConfig(**base.settings).seed}


def choose_rows(adapt_config, config, seq_len):
    """The micro-batch size: pairs as in pretraining, or packed rows of about 1,024 tokens."""
    if adapt_config.method == "dpo":
        return choose_micro_batch(config, 2 * seq_len, world_size())  # a pair is two sequences
    return config.micro_batch_size or max(1, 1024 // seq_len)


def batches_and_loss(run, train_set, reference, adapt_config):
    """Returns (batches, loss_fn): what sets SFT and DPO apart from pretraining, and nothing else.

    reference: of the Pairs of train_set, float64 (N, 2); None for SFT.
    """
    seed = run.state["data"]["seed"]
    micro_batch_size = choose_rows(adapt_config, run.config, run.model_config.max_seq_len)
    order = (train_set, run.config.batch_size, seed, run.model_config, micro_batch_size)
    if adapt_config.method == "sft":
        return ChatBatches(*order), sft_loss
    loss_fn = partial(preference_loss, beta=adapt_config.beta,
                      length_normalized=adapt_config.length_normalized)
    return PreferenceBatches(*order, reference), loss_fn


# ---- Examples ------------------------------------------------------------------------------------

class Example(NamedTuple):
    """A chat as token ids."""

    ids: np.ndarray  # (T,) int32
    trained: np.ndarray  # (T,) bool: whether the loss counts the id, as a target
    prompt: int  # how many ids come before the last answer
    place: str  # file:line of the row, for the user


class Pair(NamedTuple):
    """One prompt with two answers; people, or a model in their place, preferred the chosen one."""

    chosen: Example
    rejected: Example

    @property
    def place(self):
        return self.chosen.place


def read_sets(adapt_config, base, tokenizer):
    """Returns (train_set, eval_set): lists of Examples for SFT, of Pairs for DPO."""
    # eval_share: the embedded set holds out the modules whose text pretraining held out
    read = partial(read_examples, config=adapt_config, tokenizer=tokenizer,
                   max_seq_len=base.model_config.max_seq_len,
                   eval_share=DataConfig(**base.settings).eval_share)
    train_set = read(adapt_config.train_data, held_out=False)
    eval_set = read(adapt_config.eval_data, held_out=True)
    return train_set, eval_set


def read_examples(path, config, tokenizer, max_seq_len, held_out, eval_share):
    """The Examples or Pairs of a set, in its order; prints how many rows were cut or dropped."""
    if not path:
        return []
    counts = Counter()
    examples = []
    for place, row in read_set(path, config, held_out, eval_share, counts):
        if config.method == "sft":
            example = encode_example(row["messages"], tokenizer, max_seq_len, place, counts)
        else:
            example = encode_pair(row, tokenizer, max_seq_len, place, counts)
        if example is not None:
            examples.append(example)
    key = "eval_data" if held_out else "train_data"
    if not examples:
        raise UserError(f"{key}={path}: none of its rows can be used ({dict(counts)}); name "
                        "another file")
    kind = "chats" if config.method == "sft" else "pairs"
    print_set(key, path, kind, sequences_of(examples), len(examples), counts)
    return examples


def encode_example(messages, tokenizer, max_seq_len, place, counts, answer_only=False):
    """The Example of a chat; None, and counted, if nothing that is trained fits.

    answer_only: train the last message alone, as the two sides of a preference differ in no other.
    """
    # Only what the assistant says is trained: the model must learn to answer, not to ask. Each
    # answer's EOS is trained too, or the model would never learn to stop.
    ids, trained = render_chat(messages, tokenizer)
    before, _ = render_chat(messages[:-1], tokenizer, reply=True)
    prompt = len(before)
    if answer_only:
        trained[:prompt] = [False] * prompt

    # Too long a chat is cut on the right, so that every token keeps its context
    cut = len(ids) > max_seq_len
    ids = np.array(ids[:max_seq_len], np.int32)
    trained = np.array(trained[:max_seq_len], bool)
    if not trained.any():
        counts["dropped, as nothing of an answer fits"] += 1
        return None
    if cut:
        counts["cut, so that the last answer has no end"] += 1
    return Example(ids, trained, prompt, place)


def encode_pair(row, tokenizer, max_seq_len, place, counts):
    """The Pair of a preference.

    None, and counted, if a side has nothing to train or if both sides are cut to the same ids.
    """
    sides = []
    found = Counter()
    for answer in (row["chosen"], row["rejected"]):
        messages = [*row["prompt"], {"role": "assistant", "content": answer}]
        sides.append(encode_example(messages, tokenizer, max_seq_len, place, found,
                                    answer_only=True))
    counts.update(list(found))  # a pair counts once, even if both sides were cut
    chosen, rejected = sides
    if chosen is None or rejected is None:
        return None
    if np.array_equal(chosen.ids, rejected.ids):
        counts["dropped, as both answers are cut to the same"] += 1
        return None
    return Pair(chosen, rejected)


def sequences_of(examples):
    """The Examples of a set; for Pairs all the chosen ones, and then all the rejected ones."""
    if examples and isinstance(examples[0], Pair):
        chosen = [pair.chosen for pair in examples]
        rejected = [pair.rejected for pair in examples]
        return chosen + rejected
    return list(examples)


# ---- Batches -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExampleBatches:
    """The batch of any step, as a pure function of its number, as in pretraining."""

    examples: list
    batch_size: int  # chats or pairs a step, over all ranks
    seed: int
    model_config: ModelConfig  # for its max_seq_len and pad_token_id
    micro_batch_size: int  # packed rows or pairs of one forward

    def numbers(self, step):
        """The indices of the examples in a step."""
        return examples_of_step(step, len(self.examples), self.batch_size, self.seed)

    def places(self, step):
        """A line for each example of a step: file:line of its row."""
        return [self.examples[i].place for i in self.numbers(step)]

    def missing(self, rows, world_size):
        """How many empty rows make `rows` a multiple of what all ranks pass through at a time.

        FSDP gathers the weights from all ranks, so each rank needs as many forwards as the others.
        """
        return -rows % (self.micro_batch_size * world_size)


class ChatBatches(ExampleBatches):
    """SFT: batch_size counts chats, as in Open Instruct, however few rows they are packed into."""

    def __call__(self, step, rank=0, world_size=1):
        """The rows (B, T) of a step that `rank` takes; see `packed_rows`."""
        seq_len = self.model_config.max_seq_len
        chats = [self.examples[i] for i in self.numbers(step)]
        bins = []
        for indices in best_fit([len(example.ids) for example in chats], seq_len):
            bins.append([chats[i] for i in indices])
        bins += [[]] * self.missing(len(bins), world_size)
        return packed_rows(bins[rank::world_size], seq_len, self.model_config.pad_token_id)


@dataclass(frozen=True)
class PreferenceBatches(ExampleBatches):
    """DPO: a pair is two rows, padded on the right."""

    reference: np.ndarray  # (N, 2) float64: the reference's log-probability of either answer

    def __call__(self, step, rank=0, world_size=1):
        """The pairs of a step that `rank` takes.

        {tokens, targets: int64 (B, 2, T), loss_mask: bool (B, 2, T), chosen first;
        reference: float32 (B, 2); real: bool (B,), False for pairs that only fill up}.
        """
        numbers = self.numbers(step)
        # T is the power of two that holds the longest answer: each new length is compiled anew
        longest = max(len(side.ids) for i in numbers for side in self.examples[i])
        length = max(64, 2 ** math.ceil(math.log2(longest)))
        length = min(length, self.model_config.max_seq_len)

        filled = numbers + [None] * self.missing(len(numbers), world_size)
        rows = []
        reference = []
        own = filled[rank::world_size]
        for i in own:
            if i is None:
                rows += [[], []]
                reference.append((0.0, 0.0))
            else:
                rows += [[self.examples[i].chosen], [self.examples[i].rejected]]
                reference.append(self.reference[i].tolist())
        batch = packed_rows(rows, length, self.model_config.pad_token_id)
        # positions and documents are not needed: a row holds one example, from its beginning on
        return {
            "tokens": batch["tokens"].view(-1, 2, length),
            "targets": batch["targets"].view(-1, 2, length),
            "loss_mask": batch["loss_mask"].view(-1, 2, length),
            "reference": torch.tensor(reference),
            "real": torch.tensor([i is not None for i in own]),
        }


def examples_of_step(step, n, batch_size, seed):
    """The indices of the examples in a step, among n.

    Each epoch has an order of its own. Its last step takes what is left, so that no example is
    dropped; pretraining, with more data than it needs, drops the rest of an epoch.
    """
    steps_per_epoch = math.ceil(n / batch_size)
    epoch, position = divmod(step - 1, steps_per_epoch)
    begin = position * batch_size
    return epoch_order(n, seed, epoch)[begin:begin + batch_size].tolist()


@lru_cache(maxsize=2)
def epoch_order(n, seed, epoch):
    return instance_order(n, seed, epoch)


def best_fit(lengths, room):
    """Pack examples of these lengths into bins of `room` tokens; returns their indices, bin by bin.

    Best fit decreasing, as TRL packs: the longest example first, each into the fullest bin that
    still has room for it. No example is split. Chats are much shorter than the context, so that a
    row for each would be mostly padding.
    """
    bins = []  # the indices in each bin
    free = []  # the tokens left in each bin
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, left in enumerate(free) if left >= lengths[i]]
        if fitting:
            b = min(fitting, key=lambda b: free[b])
        else:
            b = len(bins)
            bins.append([])
            free.append(room)
        bins[b].append(i)
        free[b] -= lengths[i]
    return bins


def packed_rows(bins, seq_len, pad_token_id):
    """A batch of rows, one for each list of Examples in `bins`, each padded to seq_len.

    {tokens, targets, positions, documents: int64 (B, T); loss_mask: bool (B, T)}.
    """
    return default_collate([packed_row(examples, seq_len, pad_token_id) for examples in bins])


def packed_row(examples, seq_len, pad_token_id):
    """One row of `packed_rows`: Examples one after another, and then padding."""
    row = {
        "tokens": torch.full((seq_len,), pad_token_id),
        "targets": torch.full((seq_len,), pad_token_id),
        "positions": torch.zeros(seq_len, dtype=torch.int64),  # in the example, not in the row
        "documents": torch.full((seq_len,), -1),  # the example's number in the row; -1 is padding
        "loss_mask": torch.zeros(seq_len, dtype=torch.bool),
    }
    begin = 0
    for number, example in enumerate(examples):
        end = begin + len(example.ids)
        ids = torch.from_numpy(example.ids)
        trained = torch.from_numpy(example.trained)
        row["tokens"][begin:end] = ids
        row["positions"][begin:end] = torch.arange(len(ids))
        row["documents"][begin:end] = number
        # subtle: a target is the next token of the same example, so the last token has none
        row["targets"][begin:end - 1] = ids[1:]
        row["loss_mask"][begin:end - 1] = trained[1:]
        begin = end
    return row


# ---- Losses --------------------------------------------------------------------------------------

def sft_loss(model, batch):
    """Returns (summed, {}): cross-entropy in nats, summed over the trained tokens of packed rows.

    The step divides by the number of trained tokens of the global batch. A mean per micro-batch, as
    Open Instruct took it by default, would weigh the tokens of a short micro-batch more.
    """
    # A token attends to its own example alone: to the model, a packed row is as many chats as it
    # holds. Rotary positions are relative, so that counting them from 0 only spares rounding.
    documents = batch["documents"]
    same_document = documents[:, :, None] == documents[:, None, :]
    attn_mask = same_document.tril()[:, None]  # (B, 1, T, T): of the same example, and not later
    token_losses = model(batch["tokens"], targets=batch["targets"], attn_mask=attn_mask,
                         positions=batch["positions"])
    summed, _ = next_token_loss(token_losses, batch["loss_mask"])
    return summed, {}


def preference_loss(model, batch, beta, length_normalized=False):
    """Returns (summed, {metric: sum}): DPO's loss and metrics, summed over the real pairs.

    batch: as PreferenceBatches gives it. The step divides by the number of pairs: the mean is over
    pairs, not over tokens.
    """
    # One forward for both sides: FSDP then gathers the weights once
    token_losses = model(chosen_then_rejected(batch["tokens"]),
                         targets=chosen_then_rejected(batch["targets"]))
    log_probs, counts = sequence_log_probs(token_losses, chosen_then_rejected(batch["loss_mask"]))
    policy = log_probs.view(2, -1)  # (2, B)
    reference = batch["reference"].T.to(policy)
    if length_normalized:
        counts = counts.view(2, -1).clamp(min=1)  # a pair that only fills up has no tokens
        policy = policy / counts
        reference = reference / counts
    terms = dpo_terms(policy[0], policy[1], reference[0], reference[1], beta)
    sums = {name: (values * batch["real"]).sum() for name, values in terms.items()}
    return sums.pop("loss"), sums


def chosen_then_rejected(x):
    """(B, 2, T) -> (2B, T): the chosen answers of all pairs, and then the rejected ones."""
    return x.transpose(0, 1).flatten(0, 1)


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Returns (loss, {metric: mean}): the means of `dpo_terms` over pairs."""
    terms = dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    means = {name: values.mean() for name, values in terms.items()}
    return means.pop("loss"), means


def dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """{loss, and metrics under TRL's names: (B,)} of log-probabilities (B,) in nats of answers.

    The optimum of reward minus beta * KL(policy || reference) is a policy whose log-ratio to the
    reference is the reward / beta, but for a term of the prompt alone. So the policy itself implies
    rewards, and no reward model is trained: DPO fits them to the preferences, which a logistic
    model turns into probabilities (Bradley-Terry; arXiv 2305.18290, equation 7).
    """
    chosen = beta * (policy_chosen - reference_chosen)  # the implied rewards
    rejected = beta * (policy_rejected - reference_rejected)
    margins = chosen - rejected
    return {
        "loss": -F.logsigmoid(margins),  # -log P(chosen is preferred)
        "rewards/chosen": chosen.detach(),  # it may fall: only the margin is asked to rise
        "rewards/rejected": rejected.detach(),
        "rewards/margins": margins.detach(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),  # strictly: 0 at step 1
        "logps/chosen": policy_chosen.detach(),
        "logps/rejected": policy_rejected.detach(),
    }


# How far DPO's first loss may lie from ln 2, by the dtype of the forward. In bfloat16 it lay within
# 0.0012 over 32 batches of the tiny run, and answers can be longer.
FIRST_LOSS_WIDTH = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def check_first_loss(metrics, dtype, adapt_config):
    """UserError if DPO's loss of step 1 is not ln 2, within rounding in the forward's dtype.

    At step 1 the policy is the reference: all rewards are 0, and -log sigmoid(0) = ln 2. Any other
    loss means that the two were not computed from the same weights or tokens.
    """
    if not metrics:  # the step was skipped
        return
    loss = metrics["loss"]
    ln_2 = math.log(2)
    width = FIRST_LOSS_WIDTH[dtype]
    if not adapt_config.length_normalized:
        width *= max(1, adapt_config.beta / 0.1)  # rewards, and their rounding, grow with beta
    tqdm.write(f"the first step's loss is {loss:.4f}; ln 2 is {ln_2:.4f}")
    if abs(loss - ln_2) > width:
        raise UserError(f"loss={loss:.4f} at step 1: DPO's must be ln 2 = {ln_2:.4f} within "
                        f"{width:g}, so the reference's log-probabilities are not those of the "
                        "weights that are tuned. --overwrite computes them again; if that changes "
                        "nothing, bfloat16 may round long answers too much: --dtype=float32")


# ---- The reference -------------------------------------------------------------------------------

def reference_log_probs(run, base, model, sets, adapt_config, eval_config):
    """The reference's log-probabilities of chosen and rejected answers: float64 (N, 2) per set.

    For SFT, which has no reference, None per set. The reference is the base itself: its opinion of
    every answer is computed once, before the first step, so that no second model has to stay in
    memory. It is written to a file of the run, from which a resumed run reads it. UserError if a
    number is missing there.
    """
    if adapt_config.method == "sft":
        return [None] * len(sets)
    file = reference_file(run.path, run.state["data"], model.compute_dtype)
    if not on_rank0(file.is_file):
        fill_weights(model, base)
        tables = []
        for pairs in sets:
            found = completion_log_probs(model, sequences_of(pairs), eval_config.eval_batch_tokens)
            tables.append(found[:, 0].view(2, len(pairs)).T.tolist())
        on_rank0(partial(write_json, file, {"log_probs": tables}))
    return read_reference(file, [len(pairs) for pairs in sets])


def completion_log_probs(model, sequences, batch_tokens):
    """Float64 (N, 2): log-probability in nats of each Example's trained tokens, and their number.

    The ranks share the forwards; every rank gets all rows.
    """
    found = torch.zeros(len(sequences), 2, dtype=torch.float64)
    batches = length_batches(list(enumerate(sequences)), batch_tokens, lambda row: len(row[1].ids))
    disable = True if rank() > 0 else None  # None: silent too where there is no terminal
    with evaluating(model):
        for batch, counts in tqdm(own_batches(batches), unit="batch", leave=False,
                                  disable=disable):
            numbers = [number for number, _ in batch]
            log_probs = log_probs_of_batch(model, [example for _, example in batch])
            found.index_add_(0, torch.tensor(numbers), log_probs * counts)
    return reduce_sum(found)


def log_probs_of_batch(model, examples):
    """The rows of `completion_log_probs` for Examples, the longest first, in one forward."""
    device = model.wte.weight.device
    # causal attention never sees the padding on the right, so no mask is needed
    batch = packed_rows([[example] for example in examples], len(examples[0].ids),
                        model.config.pad_token_id)
    token_losses = model(batch["tokens"].to(device), targets=batch["targets"].to(device))
    sums, numbers = sequence_log_probs(token_losses, batch["loss_mask"].to(device))
    return torch.stack([sums, numbers], dim=1).cpu().double()


# ---- Evaluation ----------------------------------------------------------------------------------

def evaluate_tuned(model, tokenizer, suites, eval_set, reference, adapt_config, eval_config):
    """Evaluate the suites and the held-out set.

    Returns what eval.evaluate returns and, if there is a held-out set, {tuned: {metric: number},
    samples: the first three answers}. reference: of the Pairs of eval_set, float64 (N, 2).
    """
    results = evaluate(model, tokenizer, suites, eval_config)
    if not eval_set:
        return results
    batch_tokens = eval_config.eval_batch_tokens
    if adapt_config.method == "sft":
        tuned = evaluate_chats(model, eval_set, batch_tokens)
    else:
        tuned = evaluate_pairs(model, eval_set, reference, batch_tokens, adapt_config)
    prompts = held_out_prompts(eval_set, model.config.max_seq_len, adapt_config.eval_answers)
    if prompts:
        texts, tuned["ended"] = answer_prompts(model, tokenizer, prompts,
                                               eval_config.max_new_tokens)
        results["samples"] = texts[:3]
    results["tuned"] = tuned
    return results


def evaluate_chats(model, examples, batch_tokens):
    """{loss, loss_error}: nats per trained token of held-out chats."""
    log_probs, counts = completion_log_probs(model, examples, batch_tokens).T
    loss, error = mean_and_error(-log_probs, counts)
    return {"loss": loss, "loss_error": error}


def evaluate_pairs(model, pairs, reference, batch_tokens, config):
    """{dpo_loss, accuracy, accuracy_error, reward_accuracy, reward_margin} of held-out pairs.

    accuracy: how often the policy itself finds the chosen answer likelier than the rejected one.
    reward_accuracy: how often it does so more than the reference does.
    """
    found = completion_log_probs(model, sequences_of(pairs), batch_tokens)
    policy = found[:, 0].view(2, -1)  # (2, N): chosen, rejected
    counts = found[:, 1].view(2, -1)
    reference = torch.from_numpy(reference).T
    right = (policy[0] > policy[1]).double()
    accuracy, error = mean_and_error(right, torch.ones_like(right))
    if config.length_normalized:
        policy = policy / counts
        reference = reference / counts
    loss, metrics = dpo_loss(policy[0], policy[1], reference[0], reference[1], config.beta)
    return {"dpo_loss": loss.item(), "accuracy": accuracy, "accuracy_error": error,
            "reward_accuracy": metrics["rewards/accuracies"].item(),
            "reward_margin": metrics["rewards/margins"].item()}


def mean_and_error(sums, counts):
    """Returns (mean, error): total of sums / total of counts, (N,) each, and its standard error.

    The N examples were drawn, not their tokens, so the error is that of a ratio of two totals.
    """
    n = len(sums)
    total = counts.sum().item()
    mean = sums.sum().item() / total
    residuals = sums - mean * counts
    error = math.sqrt(n / max(1, n - 1) * (residuals ** 2).sum().item()) / total
    return mean, error


def held_out_prompts(eval_set, max_seq_len, at_most):
    """Up to `at_most` different prompts, as ids, from all over a held-out set."""
    prompts = []
    for example in sequences_of(eval_set):
        if example.prompt < max_seq_len:  # or no token of an answer would fit
            prompts.append(tuple(example.ids[:example.prompt].tolist()))
    prompts = list(dict.fromkeys(prompts))
    if not prompts or not at_most:
        return []
    return prompts[::math.ceil(len(prompts) / at_most)]


# ---- Commands ------------------------------------------------------------------------------------

def show_train_data(argv):
    """Print examples of a config's train_data, with what is trained in colour or in brackets."""
    adapt_config, config, options = load_config(argv, AdaptConfig, TrainConfig, ShowOptions,
                                                other=SCHEMAS)
    base = open_base(config.start_from, config.verify)
    tokenizer = Tokenizer.load(base.home / "tokenizer.json")
    train_set, _ = read_sets(replace(adapt_config, eval_data=""), base, tokenizer)
    every = max(1, len(train_set) // options.examples)  # from all over the set
    for example in train_set[::every][:options.examples]:
        if adapt_config.method == "sft":
            show(example, "", tokenizer)
        else:
            show(example.chosen, "chosen", tokenizer)
            show(example.rejected, "rejected", tokenizer)


@on_all_ranks
def main(argv):
    verbs = {"show": show_train_data, "chat": chat, "generate": generate_answers}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    refuse_derived(argv, DERIVED)
    argv = resumed_argv(argv, "adapt.py", is_tuned=True)
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python adapt.py configs/tiny_sft.py), --resume=RUN, "
                        "show, chat or generate")
    return adapt(*load_config(argv, AdaptConfig, EvalConfig, TrainConfig, other=SCHEMAS))


if __name__ == "__main__":
    run_main(main)
