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
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configs import (UserError, file_sha256, flat, load_config, read_assignments, read_json,
                     run_main, write_json)
from data import (DataConfig, Record, Tokenizer, data_of_run, instance_order, is_held_out,
                  leaked_docstrings, parse, read_records, render_chat,
                  stdlib_documents, without_surrogates)
from eval import (EvalConfig, asked, domains_table, evaluate_suites, held_out_files, length_batches,
                  open_suites, own_batches, run_of, tasks_table)
from model import (ModelConfig, choose_device, generate, generate_stream, load_model, newest_step,
                   next_token_loss, read_model_config, read_step, sequence_log_probs,
                   step_directories, verify_step)
from train import (COMMANDS, Log, TrainConfig, agree_on_machine, as_on_main, build_training,
                   check_agreement, check_vocabulary, choose_micro_batch, describe_run, evaluating,
                   lacks_evaluation, load_checkpoint, log_evaluation, on_all_ranks, on_main,
                   open_run, own_part, rank, reduce_sum, setup_distributed, share_run, train_loop,
                   world_size)

ANSWER_BATCH = 8  # prompts answered together: of a 7B their keys and values take up to 8.6 GB
ROLES = ("system", "user", "assistant")
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


@dataclass(frozen=True)
class AnswerOptions:
    """How `chat` and `generate` draw their answers."""

    temperature: float = 0.0
    """0 takes the likeliest token each time; 1 samples from the model as it is."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this much of the probability."""
    max_new_tokens: int = 512
    """Longest answer in tokens; the context length ends it too."""
    sample_seed: int = 1
    """Seed of the sampling."""
    answer_batch: int = ANSWER_BATCH
    """Prompts that `generate` answers at a time."""

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.answer_batch) < 1:
            raise UserError("max_new_tokens and answer_batch must be at least 1")


# ---- Reading -------------------------------------------------------------------------------------

def require(condition, fault):
    if not condition:
        raise UserError(fault)


def read_set(path, config, held_out, eval_share, counts):
    """[(place, row)] of a set that was checked: {messages} for SFT, {prompt, chosen, rejected}.

    UserError for the faulty rows, with their places and the remedy; skipped ones are counted.
    """
    check = {"sft": checked_chat, "dpo": checked_preference}[config.method]
    if path == "stdlib":
        embedded = {"sft": stdlib_chats, "dpo": stdlib_preferences}[config.method]
        return [(f"stdlib:{name}", check(row, name)) for name, row in embedded(held_out,
                                                                               eval_share)]
    rows, faults = [], []
    for record in read_records(path, "", counts):
        try:
            rows.append((record.place, check(parse(record), record.place)))
        except UserError as fault:
            faults.append(str(fault))
    counts["faulty rows skipped"] += len(faults)
    if faults and config.faulty == "stop":
        more = f"\n  and {len(faults) - 5:,} more" if len(faults) > 5 else ""
        raise UserError("; ".join(faults[:5]) + more + f"; mend {len(faults):,} of "
                        f"{len(faults) + len(rows):,} rows, or leave them out: --faulty=skip")
    for fault in faults[:1]:
        print(f"skipped, to name one: {fault}")
    return rows


def checked_chat(row, place):
    """{messages} of a chat in Tulu's format; its last message is an assistant's."""
    require(isinstance(row, dict) and "messages" in row,
            f"{place}: messages is missing; a chat is an object with a list of them")
    return {"messages": checked_messages(row["messages"], f"{place}: messages", "assistant")}


def checked_messages(messages, place, last):
    """[{role, content}]: perhaps a system message, then user and assistant in turn."""
    require(isinstance(messages, list) and messages,
            f"{place} is no list of messages, or an empty one")
    checked = []
    for number, message in enumerate(messages):
        here = f"{place}[{number}]"
        require(isinstance(message, dict), f"{here} is no object with a role and content")
        role, content = message.get("role"), message.get("content")
        require(role in ROLES, f"{here}.role: {repr(role)[:20]} is none of {', '.join(ROLES)}")
        require(isinstance(content, str) and content.strip(), f"{here}.content is no text or empty")
        require(content == without_surrogates(content), f"{here}.content holds half a character")
        before = checked[-1]["role"] if checked else None
        wanted = {None: ("system", "user"), "user": ("assistant",)}.get(before, ("user",))
        require(role in wanted, f"{here}.role: {role} comes where {' or '.join(wanted)} is due")
        checked.append({"role": role, "content": content})
    require(checked[-1]["role"] == last,
            f"{place}: the last message is the {checked[-1]['role']}'s, not the {last}'s")
    return checked


def checked_preference(row, place):
    """{prompt: messages, chosen: text, rejected: text} of a row in UltraFeedback's format."""
    require(isinstance(row, dict) and {"chosen", "rejected"} <= row.keys(),
            f"{place}: chosen and rejected are wanted, two lists of messages or, with a prompt, "
            "two texts")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    require(type(chosen) is type(rejected), f"{place}: chosen is {type(chosen).__name__} and "
            f"rejected {type(rejected).__name__}; both must be lists of messages, or both texts")
    if isinstance(chosen, str):
        require(prompt is not None, f"{place}: prompt is missing; chosen and rejected are texts")
        if not isinstance(prompt, list):
            prompt = [{"role": "user", "content": prompt}]
        prompt = checked_messages(prompt, f"{place}: prompt", "user")
        chosen, rejected = ([*prompt, {"role": "assistant", "content": answer}]
                            for answer in (chosen, rejected))
        prompt = None
    chosen = checked_messages(chosen, f"{place}: chosen", "assistant")
    rejected = checked_messages(rejected, f"{place}: rejected", "assistant")

    def texts(messages):
        return [(message["role"], message["content"].strip()) for message in messages]
    require(texts(chosen[:-1]) == texts(rejected[:-1]),
            f"{place}: chosen and rejected answer different prompts; they may differ in their last "
            "message alone")
    require(texts(chosen) != texts(rejected), f"{place}: chosen and rejected are the same")
    if prompt is not None:  # as UltraFeedback repeats it
        first = next(text for role, text in texts(chosen) if role == "user")
        require(isinstance(prompt, str) and prompt.strip() == first,
                f"{place}: prompt is not the first user's message of chosen")
    return {"prompt": chosen[:-1], "chosen": chosen[-1]["content"],
            "rejected": rejected[-1]["content"]}


# ---- The embedded sets ---------------------------------------------------------------------------

def stdlib_answers(held_out, eval_share):
    """(id, module, question, answer): what a docstring's first paragraph says of its owner.

    Held out are those of the modules whose text pretraining held out, with the same eval_share, but
    none whose answer stands among the others.
    """
    leaked, others = (), ()
    if held_out:
        leaked = leaked_docstrings(eval_share)
        others = {answer for *_, answer in stdlib_answers(False, eval_share)}
    for document in stdlib_documents("docstrings"):
        heading, docstring = document["text"].split("\n\n", 1)
        answer = " ".join(docstring.strip().split("\n\n")[0].split())
        if (is_held_out(document, eval_share) != held_out or document["id"] in leaked
                or answer in others or not 6 <= len(answer.split()) <= 30):
            continue
        kind, _, name = heading.partition(" ")
        if kind in ("class", "module"):
            question = f"What is the {kind} {name.split('(')[0]}?"
        else:
            ask = random.Random(document["id"]).choice(("What does {} do?", "Explain {}."))
            question = ask.format(heading if len(heading) <= 80 else heading.split("(")[0] + "()")
        yield document["id"], document["metadata"]["split_group"], question, answer


def stdlib_chats(held_out, eval_share):
    """(id, {messages}); one question in four is asked after another on the same module, whose
    answer then stands in two chats."""
    before = None
    for name, module, question, answer in stdlib_answers(held_out, eval_share):
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if before and before[0] == module and random.Random(f"turn {name}").random() < 0.25:
            yield name, {"messages": before[1] + turn}
        else:
            yield name, {"messages": turn}
        before = module, turn


def stdlib_preferences(held_out, eval_share):
    """(id, {prompt, chosen, rejected}): in training one of a third of the questions.

    Rejected is the answer to another question, the right one without its last two words, or its
    words in disorder; held out, each question comes with all three.
    """
    answers = list(stdlib_answers(held_out, eval_share))
    for name, _, question, answer in answers:
        dice, words = random.Random(f"preference {name}"), answer.split()
        if not held_out and dice.random() > 1 / 3:
            continue
        rejected = {"another": dice.choice(answers)[3], "cut": " ".join(words[:-2]),
                    "disorder": " ".join(dice.sample(words, len(words)))}
        for kind in rejected if held_out else [dice.choice(list(rejected))]:
            if rejected[kind] != answer:
                yield f"{name} {kind}", {"prompt": question, "chosen": answer,
                                         "rejected": rejected[kind]}


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
    return next_token_loss(nats, batch["loss_mask"])


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
    """(summed loss, count, {metric: sum}) of the real pairs of a batch, all in one forward."""
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
    return sums.pop("loss"), batch["real"].sum(), sums


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

def completion_log_probs(model, sequences, batch_tokens, number=0, ranks=1):
    """Float64 (N, 2): log-probability in nats of each Example's trained tokens, and their count.

    Of rank `number` of several, those of the others are 0: the sum over ranks is the whole.
    """
    found = torch.zeros(len(sequences), 2, dtype=torch.float64)
    batches = length_batches(list(enumerate(sequences)), batch_tokens, lambda row: len(row[1].ids))
    with evaluating(model):
        for batch, counts in tqdm(own_batches(batches, number, ranks), leave=False, unit="batch",
                                  total=-(-len(batches) // ranks), disable=number > 0 or None):
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
    return reduce_sum(completion_log_probs(model, sequences, batch_tokens, rank(), world_size()))


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
    if not on_main(file.is_file):
        log_probs = [shared_log_probs(model, sequences_of(pairs), batch_tokens)[:, 0]
                     .view(2, -1).T.tolist() for pairs in sets]
        on_main(lambda: write_json(file, {"log_probs": log_probs}))
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
    with evaluating(model):
        answers = []
        for begin in range(0, len(prompts), ANSWER_BATCH):
            answers += generate(model, prompts[begin:begin + ANSWER_BATCH], max_new_tokens,
                                stop_ids=(tokenizer.eos_token_id,), agree=as_on_main)
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


# ---- The run -------------------------------------------------------------------------------------

class Base(NamedTuple):
    """What is tuned: its weights' directory, their digest, and what belongs to them."""

    weights: Path  # a step directory, or one of another kind
    home: Path  # where tokenizer.json lies, and of a run config.json and manifest.json
    digest: str
    model_config: ModelConfig
    settings: dict  # of a run, those of its data


def open_base(start_from, verify):
    """The Base that start_from names; its files are checked, and not loaded yet."""
    require(start_from, "start_from: name the run to tune, --start_from=RUN, or a Hugging Face "
            "directory of an OLMo")
    home, weights = run_of(start_from), Path(start_from)
    if step_directories(weights) or (weights / "state.json").is_file():
        weights, state = (newest_step(weights, verify == "sha256") if step_directories(weights)
                          else (weights, verify_step(weights, verify == "sha256")))
        model_config, data_config = load_config([str(home / "config.json")], ModelConfig,
                                                DataConfig)
        return Base(weights, home, state["sha256"], model_config, asdict(data_config))
    files = sorted([*weights.glob("*.safetensors"), *weights.glob("model.pt"),
                    *weights.glob("config.*")])
    digest = hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()
    vocab_size = Tokenizer.load(home / "tokenizer.json").vocab_size  # HF's counts padding too
    return Base(weights, home, digest, replace(read_model_config(weights), vocab_size=vocab_size),
                {})


def fill_weights(model, base):
    """Copy the base's weights into a model, whole or sharded."""
    if (base.weights / "state.json").is_file():
        read_step(base.weights, {f"model.{name}": p.detach()
                                 for name, p in model.named_parameters()})
        return
    whole = dict(load_model(base.weights).named_parameters())  # on each rank, for a moment
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(own_part(whole[name].to(parameter.device), parameter))


FOLLOWING = {"max_steps", "warmup_steps", "decay_steps"}  # from the epochs and the data


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
    began, run = time.monotonic(), Path(config.run_dir)
    is_dpo = adapt_config.method == "dpo"
    number, ranks, device = setup_distributed(config.device)

    # What is tuned, and on what
    base = on_main(lambda: open_base(config.start_from, config.verify),
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
    settings = {key: value for key, value in settings.items() if key not in COMMANDS}
    dtype, compiled = agree_on_machine(config, settings, device)
    check_agreement(fingerprint)
    rows = choose_rows(config, seq_len, ranks, is_dpo)

    # The run: new, or as it was left
    lock = share_run(run)  # noqa: F841  held until this process ends
    chosen = {key: value for key, value in settings.items() if key not in FOLLOWING}
    start, state = on_main(lambda: open_run(replace(config, start_from=""), chosen, fingerprint),
                           patience=timedelta(hours=2))
    missed = on_main(lambda: lacks_evaluation(run, state["step"]))
    if state["step"] > config.max_steps or state["step"] == config.max_steps and not missed:
        print(f"{run}: finished, at step {state['step']} of {config.max_steps}")
        return 0
    state.update(config=settings, data=fingerprint, torch=torch.__version__)

    # The model, its optimiser, and what the reference thinks
    model, optimizer = build_training(base.model_config, config, device, dtype, compiled)
    order, held_out_reference = (config.batch_size, data_config.seed), None
    file = reference_file(run, fingerprint, dtype)
    if not start or is_dpo and not on_main(file.is_file):
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
    if start:
        load_checkpoint(start, model, optimizer)
        print(f"{run}: goes on after step {state['step']}")
    on_main(lambda: describe_run(run, settings, base.home, tuned_on=fingerprint))
    print(f"run: {run}, {adapt_config.method} of {base.weights}, {config.max_steps:,} steps of "
          f"{config.batch_size} {'pairs' if is_dpo else 'chats'}, {rows} "
          f"{'pairs' if is_dpo else 'packed rows'} at a time")

    # The steps
    of = [asked(suite, eval_config, str(dtype).removeprefix("torch.")) for suite in suites]

    def evaluate():
        with evaluating(model):
            results = evaluate_suites(model, tokenizer, suites, eval_config, number, ranks,
                                      reduce_sum) | {"of": of}
        return results | evaluate_tuning(model, tokenizer, eval_set, held_out_reference,
                                         adapt_config, eval_config)

    sequences = sequences_of(train_set)

    def places(step):
        return [sequences[i].place for i in examples_of_step(step, len(train_set), *order)]
    if not state["step"]:  # what the tuning starts from
        log_evaluation(Log(run, -1), state, evaluate())
    deadline = began + 60 * config.stop_after_minutes if config.stop_after_minutes else math.inf
    ended_by, results = train_loop(
        replace(config, start_from=""), run, state, model, optimizer,
        partial(batches, rank=number, world_size=ranks), loss_fn, evaluate, places, rows, deadline,
        missed, check)
    if ended_by:
        launcher = "python" if ranks == 1 else "torchrun ..."
        print(f"stopped after step {state['step']}, which is saved; go on: {launcher} adapt.py "
              f"--resume={run}")
        return 128 + ended_by
    if results["sums"]:
        print(f"\nheld-out text after step {state['step']}:\n{domains_table(results['sums'])}")
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


# ---- Answers and chat ----------------------------------------------------------------------------

def open_assistant(path):
    """(model, tokenizer) of a run, a step or a Hugging Face directory."""
    home = run_of(path)
    return load_model(path, choose_device()), Tokenizer.load(home / "tokenizer.json")


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


def coloured(example, tokenizer, on, off):
    """The text of an Example, special tokens too, with each trained stretch between on and off."""
    text, begin = "", 0
    for end in range(1, len(example.ids) + 1):
        if end == len(example.ids) or example.trained[end] != example.trained[begin]:
            part = harmless(tokenizer.decode(example.ids[begin:end]))
            text += f"{on}{part}{off}" if example.trained[begin] else part
            begin = end
    return text


def harmless(text):
    """`text` without the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def speak(model, tokenizer, prompt, options):
    """Print the answer to the ids of a prompt as it comes; returns its text."""
    ids, shown = [], ""
    for chosen in generate_stream(model, [prompt], options.max_new_tokens, options.temperature,
                                  options.top_p, (tokenizer.eos_token_id,), options.sample_seed):
        if chosen[0] != tokenizer.eos_token_id:
            ids.append(chosen[0])
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # of a character's bytes there may be more to come
            print(harmless(text[len(shown):]), end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(harmless(text[len(shown):]))
    return text


def fitted(messages, tokenizer, room):
    """(messages without as many of the oldest turns as are in the way, how many those are)."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns, dropped = messages[len(system):], 0
    while len(render_chat([*system, *turns], tokenizer, reply=True)[0]) > room and len(turns) > 2:
        turns, dropped = turns[2:], dropped + 1
    return [*system, *turns], dropped


CHAT_HELP = """/reset           forget what was said
/system TEXT     begin anew with this system message; without a text, with none
/temperature X   0 takes the likeliest token each time
/quit            or Ctrl-D"""


def chat(argv):
    """A conversation in the terminal: history, answers as they come, commands that begin with /."""
    paths = [word for word in argv if not word.startswith("-")]
    [options] = load_config([word for word in argv if word.startswith("-")], AnswerOptions)
    require(len(paths) == 1, "the form is chat RUN")
    model, tokenizer = open_assistant(paths[0])
    room, messages = model.config.max_seq_len * 3 // 4, []
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(f"{paths[0]}: /help shows the commands")
    while True:
        try:
            line = without_surrogates(input("> ")).strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/help":
            print(CHAT_HELP)
        elif word in ("/reset", "/system"):
            kept = messages[:1] if messages and messages[0]["role"] == "system" else []
            messages = kept if word == "/reset" else [
                {"role": "system", "content": rest}] if rest.strip() else []
            print("(begun anew)")
        elif word == "/temperature":
            try:
                options = replace(options, temperature=float(rest))
                print(f"(temperature {options.temperature:g})")
            except ValueError:
                print(f"({rest!r} is no temperature; 0 or more is wanted)")
        elif word.startswith("/"):
            print(f"({word} is no command)\n{CHAT_HELP}")
        elif line:
            wanted, dropped = fitted([*messages, {"role": "user", "content": line}], tokenizer,
                                     room)
            prompt, _ = render_chat(wanted, tokenizer, reply=True)
            if len(prompt) >= model.config.max_seq_len:
                print(f"(that is {len(prompt):,} tokens, and the model sees "
                      f"{model.config.max_seq_len:,}; say it in fewer words)")
                continue
            if dropped:
                print(f"(the oldest {dropped} turns no longer fit and were forgotten)")
            messages = [*wanted, {"role": "assistant",
                                  "content": speak(model, tokenizer, prompt, options)}]
            options = replace(options, sample_seed=options.sample_seed + 1)


def prompt_of(row, place):
    """The messages that a row of a prompt file asks to be answered."""
    require(isinstance(row, dict) and {"prompt", "instruction", "messages"} & row.keys(),
            f"{place}: no object with a prompt, an instruction or messages")
    text = row.get("prompt", row.get("instruction"))
    messages = row.get("messages", [{"role": "user", "content": text}])
    return checked_messages(messages, f"{place}: messages" if "messages" in row
                            else f"{place}: prompt", "user")


def generate_answers(argv):
    """Write a row for each row of a prompt file: it, with `output`, and whether that ended.

    Rows that OUT has already, of the same weights and options, are not done again.
    """
    paths = [word for word in argv if not word.startswith("-")]
    [options] = load_config([word for word in argv if word.startswith("-")], AnswerOptions)
    require(len(paths) == 3 and paths[2].endswith(".jsonl"),
            "the form is generate RUN PROMPTS.jsonl OUT.jsonl, the last with this ending")
    run, prompts, out = Path(paths[0]).as_posix(), paths[1], Path(paths[2])
    require(out.resolve().parent.is_dir(), f"{out}: there is no such directory; make it")
    records = list(read_records(prompts, "", Counter()))
    rows = [parse(record) for record in records]
    asked = [prompt_of(row, record.place) for row, record in zip(rows, records, strict=True)]
    drawn = {"generator": run, "weights": open_base(run, "size").digest, **asdict(options)}
    del drawn["answer_batch"]
    done = rows_done(out, rows, drawn)
    model, tokenizer = open_assistant(run)
    ids = [render_chat(messages, tokenizer, reply=True)[0] for messages in asked]
    for prompt, record in zip(ids, records, strict=True):
        require(len(prompt) < model.config.max_seq_len, f"{record.place}: {len(prompt):,} tokens, "
                f"and the model sees {model.config.max_seq_len:,}; shorten it")
    with open(out, "a", encoding="utf-8") as file:
        # a batch that is half done is drawn anew, for each has its own random streams
        for begin in tqdm(range(done - done % options.answer_batch, len(rows),
                                options.answer_batch), unit="batch"):
            answers = generate(model, ids[begin:begin + options.answer_batch],
                               options.max_new_tokens, options.temperature, options.top_p,
                               (tokenizer.eos_token_id,), options.sample_seed + begin)
            answered = list(zip(rows[begin:], answers, strict=False))
            for row, answer in answered[max(0, done - begin):]:
                ended = answer[-1] == tokenizer.eos_token_id
                output = tokenizer.decode(answer[:-1] if ended else answer)
                file.write(json.dumps({**row, "output": output, "ended": ended, **drawn}) + "\n")
            file.flush()
    print(f"wrote {out}: {len(rows):,} answers, {done:,} of them were there already")


def rows_done(out, rows, drawn):
    """How many of `rows` a file of answers `drawn` so has; a last line that a crash tore is cut.

    UserError, and nothing is touched, for a file that holds anything else.
    """
    if not out.is_file():
        return 0
    content = out.read_bytes()
    whole, torn = content[:content.rfind(b"\n") + 1], content[content.rfind(b"\n") + 1:]
    answered = [parse(Record(out.name, number, f"{out}:{number}", line))
                for number, line in enumerate(whole.splitlines(), 1)]
    own = "output", "ended"  # a row may bring others' of these names, and of those of `drawn`
    same = len(answered) <= len(rows) and (not torn or torn.startswith(b"{")) and all(
        isinstance(answer, dict) and all(answer.get(key) == value for key, value
                                         in {**row, **drawn}.items() if key not in own)
        for answer, row in zip(answered, rows, strict=False))
    require(same, f"{out}: holds something else than answers of {drawn['generator']}, as it is "
            "now, to these prompts with these options; choose another OUT")
    if torn:
        out.write_bytes(whole)
    return len(answered)


# ---- Commands ------------------------------------------------------------------------------------

@on_all_ranks
def main(argv):
    verbs = {"show": show, "chat": chat, "generate": generate_answers}
    if argv and argv[0] in verbs:
        return verbs[argv[0]](argv[1:])
    follows = [word for word in argv if word.removeprefix("--").partition("=")[0] in FOLLOWING]
    require(not follows, f"{' '.join(follows)}: follows from --epochs and --warmup_share here, "
            "such as --epochs=0.1")
    for file in [word for word in argv if word.endswith(".py") and Path(word).is_file()]:
        for line, key, _ in read_assignments(Path(file)):
            if key in FOLLOWING:
                print(f"{file}:{line}: {key} is not used; epochs and warmup_share say it")
    resumed = [word.partition("=")[2] for word in argv if word.startswith("--resume=")]
    if resumed:
        saved = Path(resumed[-1]) / "config.json"
        require(saved.is_file() and "method" in read_json(saved),
                f"--resume={resumed[-1]}: no run of adapt.py is there; adapt.py CONFIG starts one")
        argv = [str(saved), f"--run_dir={resumed[-1]}", *argv]
    if all(word.startswith("-") for word in argv) and not {"-h", "--help"} & set(argv):
        raise UserError("name a config file (python adapt.py configs/tiny_sft.py), --resume=RUN, "
                        "show, chat or generate")
    return adapt(*load_config(argv, AdaptConfig, EvalConfig, TrainConfig))


if __name__ == "__main__":
    run_main(main)
