"""Adaptation: a base model learns to answer from chats (SFT), then from preferences (DPO).

    python adapt.py configs/tiny_sft.py [--key=value ...]    # then configs/tiny_dpo.py
    python adapt.py --resume=RUN                             # go on where the run stopped
    torchrun --nproc_per_node=8 adapt.py configs/olmo_7b_sft.py
    python adapt.py show CONFIG [--examples=3]               # examples, with what is trained marked
    python adapt.py chat RUN                                 # talk to the tuned model
    python adapt.py generate RUN PROMPTS.jsonl OUT.jsonl     # write its answers, for a judge

RUN is a run directory, one of its step directories, or a Hugging Face directory of an OLMo. Chats
are rows of {messages: [{role, content}]}, preferences of {chosen, rejected}, or of the other forms
in docs/adaptation.md. "stdlib" makes both from the Python that runs this.

Paper: OLMo (arXiv 2402.00838), section 4.3, after Tulu 2 and Open Instruct; DPO: arXiv 2305.18290.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
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
from data import DataConfig, instance_order, render_chat
from eval import EvalConfig, evaluate
from model import ModelConfig, next_token_loss, sequence_log_probs
from scaling.directory import saved_settings
from scaling.ranks import (agree_on_machine, on_all_ranks, on_rank0, rank, setup_distributed,
                           world_size)
from scaling.run import READ_PATIENCE, Run, deadline_after
from support.answers import generate_answers
from support.held_out import evaluate_held_out
from support.models import fill_weights, open_base
from support.packing import NO_TARGET, best_fit, packed_length, packed_mask, shared_prompt
from support.reference import reference_log_probs
from support.rows import read_examples
from support.suites import open_suites
from support.talk import chat
from support.tuned import (ShowOptions, check_adapt_config, check_not_base, checked_argv,
                           choose_rows, fingerprint_of, held_out_of_base, print_results, print_run,
                           show_examples)
from support.vocabulary import open_tokenizer
from train import (SCHEMAS, TrainConfig, build_training, clip_at_step, cut_batch, lr_at_step,
                   resume, train_step)


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class AdaptConfig:
    """How a base model is tuned; paper, section 4.3. The rest of the recipe is TrainConfig's."""

    # sft imitates every answer in a chat; dpo makes one answer likelier than another
    method: Literal["sft", "dpo"] = setting("sft", "Learn from chats, or from preferences.")
    # OLMo: Tulu 2's mixture of 326,154 chats for sft, about 61,000 UltraFeedback pairs for dpo
    train_data: str = setting("", "File, folder or pattern of rows; stdlib: the embedded set.")
    eval_data: str = setting("", "The same, held out: never trained on; empty is none.")
    faulty: Literal["stop", "skip"] = setting("stop", "What to do with a row that has a fault.")
    # OLMo: 3 for both; Tulu 2 had stopped at 2 epochs of SFT
    epochs: float = setting(3.0, "Passes over train_data; they set the steps and the schedule.")
    # OLMo: 3 % of the steps for SFT, 10 % for DPO
    warmup_share: float = setting(0.03, "Share of the steps in which the learning rate rises.")
    # a small beta lets the policy drift far from the reference, a large one hardly lets it learn
    beta: float = setting(0.1, "DPO: strength of the KL penalty towards the reference model.")
    # OLMo 1.0 compared log-probabilities of complete answers, in which long answers weigh more
    length_normalized: bool = setting(
        False, "DPO: compare log-probabilities per token; set beta=5 with it, as OLMo 2 did.")
    eval_answers: int = setting(
        32, "At each evaluation, answer at most so many held-out prompts greedily; log three.")

    def __post_init__(self):
        check_adapt_config(self)


# by_epochs sets these keys, so nobody else may
DERIVED = {"max_steps", "warmup_steps", "decay_steps"}


# ---- Adapting ------------------------------------------------------------------------------------

def adapt(adapt_config, eval_config, config):
    """Tune a base model, or continue from the run's newest checkpoint; returns the exit code."""
    deadline = deadline_after(config.stop_after_minutes)
    device = setup_distributed(config.device)

    # The base: what pretraining left for SFT, what SFT left for DPO. Rank 0 checks its files.
    base = on_rank0(partial(open_base, config.start_from, config.verify), patience=READ_PATIENCE)
    check_not_base(Path(config.run_dir), base)
    tokenizer = open_tokenizer(base.home / "tokenizer.json", base.model_config)

    # The texts that are measured; the examples, and the schedule that follows from their number
    suites = open_suites(eval_config, partial(held_out_of_base, base))
    train_set, eval_set = read_sets(adapt_config, base, tokenizer)  # chats, or pairs of answers
    config = by_epochs(adapt_config, config, len(train_set))
    fingerprint = fingerprint_of(base, train_set, eval_set, config.batch_size)  # of the run
    settings = base.settings | saved_settings(base.model_config, eval_config, adapt_config, config)
    dtype, compiled = agree_on_machine(config, settings, device)

    # The run: new, with the base's weights, or as it was left. The base is DPO's reference too.
    run = Run.open(replace(config, start_from=""), settings, fingerprint, base.model_config, device,
                   deadline, {*DERIVED, *vars(eval_config)}, can_compare=bool(eval_set))
    if run.is_finished():
        return 0
    model, optimizer = build_training(base.model_config, config, device, dtype, compiled)
    if not run.checkpoint:
        fill_weights(model, base)
    train_reference, eval_reference = reference_log_probs(  # DPO; before the weights change
        run, base, model, [train_set, eval_set], adapt_config.method, eval_config.eval_batch_tokens)
    if run.checkpoint:
        resume(run, model, optimizer)
    run.describe(base.home, tuned_on=fingerprint)
    batches, loss_fn = batches_and_loss(run, train_set, train_reference, adapt_config)
    print_run(run.path, base, adapt_config, config, batches.micro_batch_size)

    # The steps: the same loop as in train.py, with other batches and a different loss
    with run:
        if run.step == 0 or run.evaluation_was_missed():  # step 0: what the tuning starts from
            run.log_evaluation(evaluate_tuned(model, tokenizer, suites, eval_set, eval_reference,
                                              adapt_config, eval_config))
        for step in run.steps():
            lr = lr_at_step(step, config)
            max_norm = clip_at_step(step, config)
            batch = batches(step, rank(), world_size())  # this rank's share of the chats or pairs
            micro_batches = cut_batch(batch, batches.micro_batch_size, device)
            try:
                metrics = train_step(model, optimizer, micro_batches, loss_fn, lr, max_norm)
            except FloatingPointError as error:  # the weights are untouched
                metrics = run.report_not_finite(step, error, batches.places)
            if step == 1 and adapt_config.method == "dpo":  # the policy is still the reference
                check_first_loss(metrics, dtype, adapt_config)
            run.log(step, batch, metrics, lr, max_norm)
            if run.save_is_due(step):
                run.save(model, optimizer)  # first: an evaluation may fail, and a signal gives 30 s
            if run.evaluation_is_due(step):
                run.log_evaluation(evaluate_tuned(model, tokenizer, suites, eval_set,
                                                  eval_reference, adapt_config, eval_config))
    if not run.ended_by:
        print_results(run.path, run.step, run.results)
    return run.exit_code("adapt.py")


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
    encode = encode_example if adapt_config.method == "sft" else encode_pair
    # what is cut or dropped is counted and printed: nothing vanishes in silence
    encode = partial(encode, tokenizer=tokenizer, max_seq_len=base.model_config.max_seq_len)
    # the embedded set holds out the modules whose text pretraining held out
    eval_share = DataConfig(**base.settings).eval_share
    train_set = read_examples(adapt_config, "train_data", encode, eval_share)
    eval_set = read_examples(adapt_config, "eval_data", encode, eval_share)
    return train_set, eval_set


def encode_example(messages, tokenizer, max_seq_len, place, counts, answer_only=False):
    """The Example of a chat; None, and counted, if nothing that is trained fits.

    answer_only: train the last message alone, as the two sides of a preference differ in no other.
    """
    # Only answers are trained, each with its EOS, so that the model learns to answer and to stop.
    # DIFFERS FROM OLMo: Open Instruct with add_bos also trains the line break before each answer.
    ids, trained = render_chat(messages, tokenizer)
    before, _ = render_chat(messages[:-1], tokenizer, reply=True)
    prompt = len(before)  # the ids up to and with the header `<|assistant|>` of the last answer
    if answer_only:
        trained[:prompt] = [False] * prompt  # DIFFERS FROM OLMo: Open Instruct sums all answers

    # A chat that is too long is cut on the right, so that what remains keeps its context
    cut = len(ids) > max_seq_len
    ids = np.array(ids[:max_seq_len], np.int32)
    trained = np.array(trained[:max_seq_len], bool)
    if not trained.any():  # it would take up room and teach nothing
        counts["dropped, as nothing of an answer fits"] += 1
        return None
    if cut:
        counts["cut, so that the last answer has no end"] += 1
    return Example(ids, trained, prompt, place)


def encode_pair(row, tokenizer, max_seq_len, place, counts):
    """The Pair of a preference; None, and counted, if nothing is left to train or to prefer."""
    sides = []
    found = Counter()
    for answer in (row["chosen"], row["rejected"]):
        messages = [*row["prompt"], {"role": "assistant", "content": answer}]
        sides.append(encode_example(messages, tokenizer, max_seq_len, place, found,
                                    answer_only=True))
    chosen, rejected = sides
    if chosen is None or rejected is None:
        counts["dropped, as nothing of an answer fits"] += 1
        return None
    if np.array_equal(chosen.ids, rejected.ids):  # they differed only in what was cut off
        counts["dropped, as both answers are cut to the same"] += 1
        return None
    counts.update(list(found))  # cut: a pair counts once, even if both sides were
    return Pair(chosen, rejected)


# ---- The schedule --------------------------------------------------------------------------------

def by_epochs(adapt_config, config, examples):
    """The TrainConfig with the steps and the schedule that the epochs ask for.

    # DIFFERS FROM OLMo: Open Instruct warms up from 0 and runs a step behind, so that its first
    # step changes nothing. Here the warm-up begins at a tenth of the peak, as in pretraining.
    """
    steps_per_epoch = math.ceil(examples / config.batch_size)  # the last one may be smaller
    steps = max(1, round(adapt_config.epochs * steps_per_epoch))  # a fraction may round to none
    return replace(
        config,
        max_steps=steps,
        warmup_steps=math.ceil(adapt_config.warmup_share * steps),
        decay_steps=steps + 1,  # a step later, as a step at min_lr=0 would change nothing
    )


# ---- Batches -------------------------------------------------------------------------------------

def batches_and_loss(run, train_set, reference, adapt_config):
    """Returns (batches, loss_fn): what sets SFT and DPO apart from pretraining, and nothing else.

    reference: of the Pairs of train_set, float64 (N, 2); None for SFT.
    """
    arguments = dict(
        examples=train_set,
        batch_size=run.config.batch_size,
        seed=run.state["data"]["seed"],  # of the order in each epoch
        model_config=run.model_config,
        micro_batch_size=choose_rows(run.config, run.model_config),
    )
    if adapt_config.method == "sft":
        return ChatBatches(**arguments), sft_loss
    loss_fn = partial(preference_loss, beta=adapt_config.beta,
                      length_normalized=adapt_config.length_normalized)
    return PreferenceBatches(**arguments, reference=reference), loss_fn


epoch_order = lru_cache(maxsize=2)(instance_order)  # shuffled once an epoch, not at each step


@dataclass(frozen=True)
class ExampleBatches:
    """The batch of any step, as a pure function of its number, as in pretraining."""

    examples: list
    batch_size: int  # chats or pairs a step, over all ranks
    seed: int
    model_config: ModelConfig  # the context length and the id of padding
    micro_batch_size: int  # packed rows of one forward, at most

    def indices(self, step):
        """The indices of the examples in a step.

        Each epoch has an order of its own. Its last step takes what is left, so that no example is
        dropped; pretraining, with more data than it needs, drops the rest of an epoch.
        """
        n = len(self.examples)
        steps_per_epoch = math.ceil(n / self.batch_size)
        epoch, position = divmod(step - 1, steps_per_epoch)
        order = epoch_order(n, self.seed, epoch)
        begin = position * self.batch_size
        return order[begin:begin + self.batch_size].tolist()

    def places(self, step):
        """A line for each example of a step: file:line of its row."""
        return [self.examples[i].place for i in self.indices(step)]

    def own_rows(self, groups, seq_len, rank, world_size):
        """[numbers of the groups in a row, for each row that `rank` takes].

        Chats are much shorter than the context, and a row for each would be mostly padding. So
        several share a row, as many as fit; none is split.
        """
        rows = best_fit([packed_length(group) for group in groups], seq_len)
        # FSDP gathers the weights from all ranks, so each rank needs as many forwards as the
        # others. torch.compile compiles each number of rows: an even one is one of few.
        at_a_time = min(2, self.micro_batch_size) * world_size
        rows += [[]] * (-len(rows) % at_a_time)
        return rows[rank::world_size]  # every rank packs all rows, and keeps its own


class ChatBatches(ExampleBatches):
    """SFT: batch_size counts chats, as in Open Instruct, however few rows they are packed into."""

    def __call__(self, step, rank=0, world_size=1):
        """The rows (B, T) of a step that `rank` takes; see `packed_rows`."""
        groups = [[self.examples[i]] for i in self.indices(step)]
        T = self.model_config.max_seq_len
        own = self.own_rows(groups, T, rank, world_size)
        rows = [[groups[i] for i in numbers] for numbers in own]
        return packed_rows(rows, T, self.model_config.pad_token_id)


@dataclass(frozen=True)
class PreferenceBatches(ExampleBatches):
    """DPO: the two answers of a pair follow their prompt in one row, and several pairs share it."""

    reference: np.ndarray  # (N, 2) float64: the reference's log-probability of either answer

    def __call__(self, step, rank=0, world_size=1):
        """The rows (B, T) of a step that `rank` takes; see `packed_rows`. With them come P pairs
        a row {reference: float32 (B, P, 2); real: bool (B, P), False where a row has fewer}.
        """
        indices = self.indices(step)
        pairs = [self.examples[i] for i in indices]
        # two answers may be longer than the context, in which each of them fits with the prompt
        T = self.model_config.max_seq_len
        if max(map(packed_length, pairs)) > T:
            T *= 2
        own = self.own_rows(pairs, T, rank, world_size)
        P = max(map(len, own), default=0)
        reference = torch.zeros(len(own), P, 2)
        real = torch.zeros(len(own), P, dtype=torch.bool)
        for row, numbers in enumerate(own):
            known = self.reference[[indices[i] for i in numbers]]
            reference[row, :len(numbers)] = torch.from_numpy(known)
            real[row, :len(numbers)] = True
        rows = [[pairs[i] for i in numbers] for numbers in own]
        batch = packed_rows(rows, T, self.model_config.pad_token_id)
        return batch | {"reference": reference, "real": real}


def packed_rows(rows, seq_len, pad_token_id):
    """A batch of rows, each of a list of groups, padded to seq_len. A group is a chat by itself,
    or the two sides of a Pair.

    {tokens, targets, positions, documents: int64; seen_until: int32; loss_mask: bool}: (B, T) each.
    """
    rows = [packed_row(groups, seq_len, pad_token_id) for groups in rows]
    return default_collate(rows)  # {key: the rows' tensors, stacked}


def packed_row(groups, seq_len, pad_token_id):
    """One row of `packed_rows`: groups of Examples one after another, and then padding.

    The first tokens of a row that begins with a Pair: prompt a b c, chosen answer x y, rejected z:

        tokens      a b c x y c z   both answers share a b; the second one follows without them
        targets     . . x y . z .   the target of c is x in one, z in the other: each has its c
        positions   0 1 2 3 4 2 3   in the example, not in the row
        documents   0 0 0 0 0 1 1   the example's number: even is the chosen one, odd the rejected
        seen_until  7 7 5 5 5 7 7   place q attends to place k if k <= q < seen_until[k]
    """
    tokens = torch.full([seq_len], pad_token_id)
    targets = torch.full([seq_len], NO_TARGET)
    positions = torch.zeros(seq_len, dtype=torch.int64)
    documents = torch.full([seq_len], -1)  # -1: padding
    seen_until = torch.full([seq_len], seq_len, dtype=torch.int32)
    number = 0
    end = 0
    for group in groups:
        first = end
        shared = shared_prompt(group)
        for example in group:
            skipped = 0 if end == first else shared
            ids = torch.from_numpy(example.ids[skipped:])
            trained = torch.from_numpy(example.trained[skipped:])
            begin = end
            end += len(ids)
            tokens[begin:end] = ids
            # subtle: a target is the next token of the same example, so the last token has none
            targets[begin:end - 1] = ids[1:].where(trained[1:], NO_TARGET)
            positions[begin:end] = torch.arange(skipped, len(example.ids))
            documents[begin:end] = number
            seen_until[begin:end] = end  # its own tokens alone attend to it
            number += 1
        seen_until[first:first + shared] = end  # the second answer attends to the shared part too
    return {"tokens": tokens, "targets": targets, "positions": positions, "documents": documents,
            "seen_until": seen_until, "loss_mask": targets != NO_TARGET}


# ---- Losses --------------------------------------------------------------------------------------

def sft_loss(model, batch):
    """Returns (summed, {}): the cross-entropy, in nats, of the trained tokens of packed rows."""
    token_losses = losses_of_rows(model, batch)  # (B, T)
    summed, _ = next_token_loss(token_losses, batch["loss_mask"])
    return summed, {}


def losses_of_rows(model, batch):
    """The losses (B, T) of all targets in packed rows."""
    # A token attends to its own example alone: the model cannot tell a packed row from separate
    # rows. Rotary positions are relative; they restart at 0 so that even the rounding is the same.
    attn_mask = packed_mask(model, batch["seen_until"])
    return model(batch["tokens"], targets=batch["targets"], attn_mask=attn_mask,
                 positions=batch["positions"])


def preference_loss(model, batch, beta, length_normalized=False):
    """Returns (summed, {metric: sum}): DPO's loss and metrics, summed over the real pairs.

    batch: as PreferenceBatches gives it. train_step divides by the number of pairs, not of tokens.
    """
    # DPO compares the policy, the model that is trained, with the reference, the model before that.
    # An answer is not rewarded for being likely, but for being likelier than the reference finds
    # it. So the policy learns what is preferred, and stays close to the language that it has.
    P = batch["real"].shape[1]
    # In `documents`, pair i of a row is 2i, its chosen answer, and 2i + 1, its rejected one.
    answers = torch.arange(2 * P, device=batch["documents"].device)  # chosen, rejected, chosen, ...
    own = batch["documents"].unsqueeze(1) == answers.unsqueeze(1)  # (B, 2P, T)
    loss_mask = own & batch["loss_mask"].unsqueeze(1)
    token_losses = losses_of_rows(model, batch).unsqueeze(1)  # (B, 1, T)
    policy, counts = sequence_log_probs(token_losses, loss_mask)  # (B, 2P)
    reference = batch["reference"].flatten(1).to(policy)  # a constant: no gradient flows to it
    if length_normalized:
        counts = counts.clamp(min=1)  # a pair that only fills up has no tokens
        policy = policy / counts
        reference = reference / counts
    terms = dpo_terms(policy[:, 0::2], policy[:, 1::2], reference[:, 0::2], reference[:, 1::2],
                      beta)  # (B, P)
    sums = {}
    for name, values in terms.items():
        sums[name] = (values * batch["real"]).sum()  # 0 for a pair that only fills up
    return sums.pop("loss"), sums


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """Returns (loss, {metric: mean}): the means of `dpo_terms` over pairs."""
    terms = dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta)
    means = {name: values.mean() for name, values in terms.items()}
    return means.pop("loss"), means


def dpo_terms(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta):
    """{loss, and metrics under TRL's names: (B,)} of log-probabilities (B,) in nats of answers.

    Source: arXiv 2305.18290, equation 7.
    """
    # RLHF trains a reward model, and then a policy that maximises reward - beta * KL(policy from
    # reference). The best such policy has log(policy / reference) = reward / beta, up to a term
    # that is the same for all answers to a prompt. So each policy implies rewards of its own:
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    # and it can be fitted to the preferences directly. The Bradley-Terry model says with which
    # probability the chosen answer is preferred: sigmoid of the difference in reward.
    margins = chosen - rejected
    return {
        "loss": -F.logsigmoid(margins),  # cross-entropy of "the chosen one is preferred"
        "rewards/chosen": chosen.detach(),  # may fall in training: only the margin must rise
        "rewards/rejected": rejected.detach(),
        "rewards/margins": margins.detach(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),  # a tie counts as wrong
        "logps/chosen": policy_chosen.detach(),
        "logps/rejected": policy_rejected.detach(),
    }


# how far DPO's first loss may lie from ln 2, for each dtype of the forward. In bfloat16 it was
# within 0.0012 over 32 batches of the tiny run, and answers can be longer.
FIRST_LOSS_WIDTH = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def check_first_loss(metrics, dtype, adapt_config):
    """UserError if DPO's loss at step 1 is not ln 2, within the rounding of the forward's dtype."""
    # At step 1 the policy is still the reference: all rewards are 0, and -log sigmoid(0) = ln 2.
    # Any other loss means that the two did not see the same weights or tokens.
    if not metrics:  # the step was skipped
        return
    width = FIRST_LOSS_WIDTH[dtype]
    if not adapt_config.length_normalized:
        width *= max(1, adapt_config.beta / 0.1)  # rewards, and their rounding, grow with beta
    loss = metrics["loss"]
    ln_2 = math.log(2)
    tqdm.write(f"step 1: the loss is {loss:.4f}; with equal rewards it is ln 2 = {ln_2:.4f}")
    if abs(loss - ln_2) > width:
        raise UserError(f"loss={loss:.4f} at step 1: DPO's must be ln 2 = {ln_2:.4f} within "
                        f"{width:g}, so the reference's log-probabilities are not those of the "
                        "weights that are tuned. --overwrite computes them again; if that changes "
                        "nothing, bfloat16 may round long answers too much: --dtype=float32")


# ---- Evaluation ----------------------------------------------------------------------------------

def evaluate_tuned(model, tokenizer, suites, eval_set, reference, adapt_config, eval_config):
    """What eval.evaluate returns and, if there is a held-out set, {tuned: metrics, samples: texts}.

    reference: of the Pairs of eval_set, float64 (N, 2); None for SFT.
    """
    results = evaluate(model, tokenizer, suites, eval_config)  # the same as in pretraining
    # How likely are the held-out answers, or the preferred ones of two? What does it answer itself?
    return results | evaluate_held_out(model, tokenizer, eval_set, reference, adapt_config,
                                       eval_config, dpo_loss)


# ---- Commands ------------------------------------------------------------------------------------

def show_train_data(argv):
    """Print examples of a config's train_data, with what is trained in colour or in brackets."""
    adapt_config, config, options = load_config(argv, AdaptConfig, TrainConfig, ShowOptions,
                                                other=SCHEMAS)
    base = open_base(config.start_from, config.verify)
    tokenizer = open_tokenizer(base.home / "tokenizer.json", base.model_config)
    train_set, _ = read_sets(replace(adapt_config, eval_data=""), base, tokenizer)
    show_examples(train_set, options.examples, tokenizer)


@on_all_ranks
def main(argv):
    verbs = {"show": show_train_data, "chat": chat, "generate": generate_answers}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    argv = checked_argv(argv, DERIVED)  # --resume=RUN becomes the config of the run
    return adapt(*load_config(argv, AdaptConfig, EvalConfig, TrainConfig, other=SCHEMAS))


if __name__ == "__main__":
    run_main(main)
