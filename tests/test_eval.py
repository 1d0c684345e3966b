"""eval.py against lm-eval's windows, a float64 log-softmax a document at a time, and arithmetic."""

import copy
import importlib.util
import itertools
import json
import math
import random
import re
import shutil

import pytest
import torch
from conftest import ROOT, sharpened, write_jsonl

import adapt
import eval as evaluation
import model as network
import train
from corpus.bpe import train_bpe
from corpus.documents import read_documents
from corpus.tokenizer import EOS, Tokenizer
from model import token_losses
from support import scoring
from support.records import bits_per_byte
from support.suites import Suite
from support.weights import load_model, save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
T = 32  # context length of every model here


# ---- Helpers -------------------------------------------------------------------------------------

def lm_eval_windows(ids, prefix, length):
    """(context, continuation) pairs in lm-eval's own steps: get_rolling_token_windows with
    context_len 1, then make_disjoint_window."""
    if not ids:
        return []
    first = min(length, len(ids))
    rolling, predicted = [([prefix] + ids[:first - 1], ids[:first])], first
    while predicted < len(ids):
        end = predicted + min(len(ids) - predicted, length)
        rolling.append((ids[end - length - 1:end - 1], ids[predicted:end]))
        predicted = end
    return [(context[:len(context) - (len(continuation) - 1)], continuation)
            for context, continuation in rolling]


def brute_force(model, tokenizer, text):
    """Total nats (float) of one document, window by window, by a log-softmax in float64."""
    wide, nats = copy.deepcopy(model).double(), 0.0
    for context, continuation in lm_eval_windows(tokenizer.encode(text), tokenizer.eos_token_id, T):
        tokens = (context + continuation)[:-1]
        with torch.no_grad():
            log_probs = wide(torch.tensor([tokens]))[0].log_softmax(-1)[-len(continuation):]
        nats -= sum(log_probs[i, token].item() for i, token in enumerate(continuation))
    return nats


def perplexity(model, tokenizer, *texts, **options):
    documents = [{"text": text} for text in texts]
    return evaluation.evaluate_perplexity(model, tokenizer, documents, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_config):
    """A finished run of 30 steps, saved at 20 and 30, with 64 padding rows in its embedding."""
    run = tmp_path_factory.mktemp("eval") / "run"
    train.main([str(tiny_config(run, max_steps=30, lr=1e-2, embedding_size=576, eval_every_steps=15,
                                save_every_steps=20))])
    return run


@pytest.fixture(scope="module")
def tokenizer(run):
    return Tokenizer.load(run / "tokenizer.json")


@pytest.fixture(scope="module")
def model(run):
    """The run's model, its weights half as large again, for sharper predictions."""
    return sharpened(load_model(run), 1.5)


@pytest.fixture(scope="module")
def texts(sources):
    """30 texts: from one letter to many windows, with letters of several bytes, and one empty."""
    documents = list(read_documents(sources["code"], "code"))
    dice = random.Random(3)
    cut = [document["text"][:dice.randint(1, 900)] for document in documents[:25]]
    return [*cut, "", "x", "Ünïcödé ← 日本語 🙂 " * 9, "cafe\u0301", "tabs\t\tand\n\n    spaces"]


# ---- Rolling windows -----------------------------------------------------------------------------

@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 1000])
@pytest.mark.parametrize("length", [8, 1, 2])
def test_rolling_windows_are_those_of_lm_eval(count, length):
    ids = list(range(100, 100 + count))
    ours = evaluation.rolling_windows(ids, 7, length)
    theirs = lm_eval_windows(ids, 7, length)
    assert [targets[-scored:] for _, targets, scored in ours] == [wanted for _, wanted in theirs]
    assert [inputs for inputs, _, _ in ours] == [
        (context + continuation)[:-1] for context, continuation in theirs]


def test_rolling_windows_by_hand():
    """Ten ids, four at a time: EOS | 0-3, then 3 | 4-7, then 5, 6, 7 | 8, 9."""
    assert evaluation.rolling_windows(list(range(10)), 99, 4) == [
        ([99, 0, 1, 2], [0, 1, 2, 3], 4), ([3, 4, 5, 6], [4, 5, 6, 7], 4),
        ([5, 6, 7, 8], [6, 7, 8, 9], 2)]


# ---- Perplexity ----------------------------------------------------------------------------------

@pytest.mark.parametrize("batch_tokens", [1, 32, 200, 8192])
def test_nats_are_those_of_one_document_at_a_time_in_float64(model, tokenizer, texts, batch_tokens):
    """The softmax is over all 576 rows of the head, also the 64 of no token."""
    sums = perplexity(model, tokenizer, *texts, batch_tokens=batch_tokens)
    nats = sum(brute_force(model, tokenizer, text) for text in texts)
    assert sums == {"nats": pytest.approx(nats, rel=1e-6), "documents": len(texts),
                    "tokens": sum(len(tokenizer.encode(text)) for text in texts),
                    "bytes": sum(len(text.encode()) for text in texts)}


@pytest.mark.parametrize("world_size", [2, 3, 50])
def test_ranks_share_the_windows_and_make_as_many_forwards(model, tokenizer, texts, monkeypatch,
                                                           world_size):
    """The parts that ranks pass to reduce_sum add up; one that has run out repeats a batch."""
    alone, parts, forwards = perplexity(model, tokenizer, *texts, batch_tokens=96)["nats"], [], []
    monkeypatch.setattr(scoring, "world_size", lambda: world_size)
    monkeypatch.setattr(evaluation, "reduce_sum", lambda part: parts.append(part) or part)
    score_batch = evaluation.score_batch
    for rank in range(world_size):
        counted = []
        monkeypatch.setattr(scoring, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluation, "score_batch", lambda *words, counted=counted:
                            counted.append(1) or score_batch(*words))
        perplexity(model, tokenizer, *texts, batch_tokens=96)
        forwards.append(len(counted))
    assert sum(parts).item() == pytest.approx(alone, rel=1e-9)
    assert len(set(forwards)) == 1 and sum(part > 0 for part in parts) > 1


def test_a_forward_holds_at_most_batch_tokens_and_no_graph(model, tokenizer, texts, monkeypatch):
    shapes = []

    def counted(x, head, targets):
        assert not torch.is_grad_enabled()
        shapes.append(tuple(targets.shape))
        return token_losses(x, head, targets)
    monkeypatch.setattr(model, "token_losses", counted)
    perplexity(model, tokenizer, *texts, batch_tokens=200)
    assert len(shapes) > 10 and max(rows * length for rows, length in shapes) <= 200
    assert max(rows for rows, _ in shapes) > 1


def test_more_windows_than_are_sorted_at_once_are_all_scored(model, tokenizer):
    """4,097 windows are scored when they are there, the other three at the end."""
    one = perplexity(model, tokenizer, "x")
    many = perplexity(model, tokenizer, *["x"] * 4100)
    assert many["documents"] == 4100 and many["tokens"] == 4100 * one["tokens"]
    assert many["nats"] == pytest.approx(4100 * one["nats"], rel=1e-4)


def test_bytes_are_those_of_the_raw_text(model, tokenizer):
    """"cafe" and U+0301 are 6 bytes, their NFC 5; the ids, and so the nats, are the same. A literal
    end of text is 13 bytes of text and never the special id. An empty document adds nothing."""
    raw, composed = (perplexity(model, tokenizer, text) for text in ("cafe\u0301", "caf\u00e9"))
    assert (raw["bytes"], composed["bytes"]) == (6, 5)
    assert (raw["nats"], raw["tokens"]) == (composed["nats"], composed["tokens"])
    text = f"one{EOS}two"
    sums = perplexity(model, tokenizer, text)
    assert tokenizer.eos_token_id not in tokenizer.encode(text) and sums["bytes"] == 6 + 13
    assert sums["nats"] == pytest.approx(brute_force(model, tokenizer, text), rel=1e-5)
    without = perplexity(model, tokenizer, "some", "words")
    assert perplexity(model, tokenizer, "some", "", "words") == {**without, "documents": 3}
    assert perplexity(model, tokenizer, "") == {"documents": 1, "tokens": 0, "bytes": 0, "nats": 0}


def test_evaluate_measures_each_domain_by_itself(model, tokenizer, texts, tmp_path):
    """One without documents is left out; the key names the files and the dtype of the forward."""
    paths = {name: write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in some])
             for name, some in (("one", texts[:9]), ("none", []), ("two", texts[9:]))}
    config = evaluation.EvalConfig(eval_batch_tokens=8192)
    suite = Suite("mine", {name: tmp_path / f"{name}.jsonl" for name in paths}, [])
    results = evaluation.evaluate(model, tokenizer, [suite], config)
    assert results["sums"] == {
        "one": perplexity(model, tokenizer, *texts[:9], batch_tokens=8192),
        "two": perplexity(model, tokenizer, *texts[9:], batch_tokens=8192)}
    sums = results["sums"]["one"]
    assert results["bits_per_byte"] == {name: bits_per_byte(found)
                                        for name, found in results["sums"].items()}
    assert bits_per_byte(sums) == pytest.approx(sums["nats"] / math.log(2) / sums["bytes"])
    assert math.isnan(bits_per_byte({"nats": 0.0, "bytes": 0}))
    [key] = results["of"]
    assert key["suite"] == "mine" and key["dtype"] == "float32" and len(key["files"]) == 3


# ---- Samples -------------------------------------------------------------------------------------

def sample(model, tokenizer, **options):
    config = evaluation.EvalConfig(**{"prompt": "wo", "max_new_tokens": 20, **options})
    return evaluation.sample_text(model, tokenizer, config)


def test_a_sample_depends_on_its_seed_and_keeps_its_prompt(model, tokenizer):
    """As it was written: NFC would make one letter of the accent. It may be empty."""
    first, again = (sample(model, tokenizer, temperature=1.0, sample_seed=4) for _ in range(2))
    others = {sample(model, tokenizer, temperature=1.0, sample_seed=seed) for seed in range(5)}
    assert first == again and len(others) > 1
    assert all(text.startswith("wo") and len(text) > 2 for text in others)
    assert sample(model, tokenizer, prompt="cafe\u0301").startswith("cafe\u0301")
    assert sample(model, tokenizer, prompt="")


def test_a_greedy_sample_needs_no_seed_and_starts_after_eos(model, tokenizer):
    """Against the likeliest id each time, by full forwards from EOS on."""
    ids = [tokenizer.eos_token_id, *tokenizer.encode("wo")]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 20 and len(ids) < T:
            ids.append(model(torch.tensor([ids]))[0, -1, :512].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
    wanted = "wo" + tokenizer.decode(i for i in ids[start:] if i != tokenizer.eos_token_id)
    assert {sample(model, tokenizer, temperature=0.0, sample_seed=s) for s in (1, 2)} == {wanted}


def test_a_sample_ends_at_the_end_of_text(model, tokenizer):
    """A model that says a space, EOS, "x": nothing comes after EOS, which is not shown itself."""
    script = iter([*tokenizer.encode(" "), tokenizer.eos_token_id, *tokenizer.encode("x") * 30])
    scripted = copy.deepcopy(model)
    scripted.forward = lambda tokens, **_: torch.nn.functional.one_hot(
        torch.full_like(tokens[:, -1], next(script)), 576).float()
    assert sample(scripted, tokenizer, temperature=0.0) == "wo "


# ---- Commands ------------------------------------------------------------------------------------

def read_table(result):
    """{domain: (documents, tokens, KB, nats/token, bits/byte)} of a printed table; (pooled) too."""
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    begin = [line[:1] for line in lines].index(["domain"])
    rows = itertools.takewhile(lambda line: line and not line[0].endswith(":"), lines[begin + 1:])
    return {name: tuple(float(x.replace(",", "")) for x in numbers)
            for name, *numbers in rows if name != "(macro)"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory, texts):
    """A file of documents."""
    path = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    write_jsonl(path, [{"text": text} for text in texts])
    return path


def test_a_suite_is_a_file_of_documents_and_a_step_is_a_model(run, call, suite, tokenizer, texts):
    """step000020 has other weights than the last step, with the run's tokenizer and held-out text.
    """
    numbers = []
    for path in (run, run / "step000020"):
        sums = perplexity(load_model(path), tokenizer, *texts)
        table = read_table(call(evaluation, path, f"--suite={suite}"))
        assert table == {"suite.jsonl": (sums["documents"], sums["tokens"],
                                         pytest.approx(sums["bytes"] / 1e3, abs=0.051),
                                         pytest.approx(sums["nats"] / sums["tokens"], abs=6e-5),
                                         pytest.approx(bits_per_byte(sums), abs=6e-5))}
        held_out = read_table(call(evaluation, path))
        assert held_out.keys() == {"web", "code", "(pooled)"}
        numbers.append((table["suite.jsonl"][-1], held_out["web"][-1]))
    assert numbers[0][0] != numbers[1][0] and numbers[0][1] != numbers[1][1]


def test_sample_prints_each_prompt_and_continues_it_as_if_alone(run, call, tokenizer):
    words = ["sample", run, "--max_new_tokens=9", "--sample_seed=3", "--temperature=0.9"]
    both = call(evaluation, *words, "--prompt=wo", "--prompt=ab c").stdout
    one, other = (evaluation.sample_text(load_model(run), tokenizer, evaluation.EvalConfig(
        prompt=prompt, max_new_tokens=9, sample_seed=3, temperature=0.9))
        for prompt in ("wo", "ab c"))
    assert both == f"{one}\n{'-' * 40}\n{other}\n"


@pytest.mark.parametrize("words, wanted", [
    ([], []), (["one", "two"], ["--suite=two"]), (["sample"], []),
    (["NOWHERE"], ["nowhere"]), (["sample", "NOWHERE"], ["nowhere"]),
    (["report", "NOWHERE"], ["nowhere"]),
    (["report", "EMPTY"], ["metrics.jsonl", "python eval.py"]),
    (["EMPTY"], ["no model here"]), (["RUN/step000009"], ["no such step", "step000"]),
    (["RUN/config.json"], ["a file"]), (["sample", "RUN", "--chat"], ["chat=True"]),
    (["RUN", "--chat"], ["chat=True", "suite=domains"]), (["RUN", "--limit=3"], ["limit=3"]),
    (["RUN", "--temprature=1"], ["temperature"]),
    (["RUN", "--top_p=high"], ["top_p", "float"]), (["sample", "RUN", "--top_p=0"], ["top_p=0"]),
    (["RUN", "--temperature=inf"], ["temperature=inf"]), (["RUN", "--limit=-1"], ["limit=-1"]),
    (["RUN", "--eval_batch_tokens=0"], ["batch_tokens=0"]),
    (["RUN", "--suite=nowhere"], ["suite=nowhere"]), (["RUN", "--suite="], ["suite="]),
    (["RUN", f"--suite={ROOT}/READM.md"], [f"did you mean {ROOT}/README.md?"]),
    (["RUN", "--suite=arc_esay"], ["suite=arc_esay", "did you mean arc_easy?"]),
    (["RUN", "--suite=domain"], ["did you mean domains?"]),
    (["RUN", "--suite=domains,,piqa"], ["suite=domains,,piqa"]),
    (["sample", "RUN", "--prompt=" + "many words " * 50], ["prompt"]),
    (["CHANGED"], ["--data_dir=PATH"])])
def test_a_wrong_word_is_one_clear_line(run, call, refused, tmp_path, monkeypatch, words, wanted):
    """With the package of tasks and without it. CHANGED: a run whose data changed since."""
    paths = {"RUN": run, "EMPTY": tmp_path, "NOWHERE": tmp_path / "nowhere",
             "CHANGED": tmp_path / "changed"}
    if "CHANGED" in words:
        shutil.copytree(run, paths["CHANGED"])
        manifest = json.loads((run / "manifest.json").read_text()) | {"sha256": "0" * 64}
        (paths["CHANGED"] / "manifest.json").write_text(json.dumps(manifest))
    words = [paths.get(word, re.sub("^RUN/", f"{run}/", word)) for word in words]
    refused(call(evaluation, *words), *wanted)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(call(evaluation, *words), *wanted)


def test_what_is_named_in_the_place_of_a_run_is_told_with_the_run(run, tmp_path, call, refused):
    (tmp_path / "mine.py").write_text('run_dir = "runs/mine"\n')
    refused(call(evaluation, tmp_path / "mine.py"), "a config file", "runs/mine")
    refused(call(evaluation, run.parent), f"name one: {run}")


@pytest.mark.parametrize("words", [["PATH"], ["sample", "PATH"], ["PATH", "--every_checkpoint"]])
def test_a_run_without_a_step_says_so_at_every_door(run, call, refused, tmp_path, words):
    path = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("step*"))
    words = [path if word == "PATH" else word for word in words]
    line = refused(call(evaluation, *words), path, "saved no step", "began it: python")
    assert line == refused(call(adapt, "chat", path))
    assert line == refused(call(network, "export", path, tmp_path / "hf"))


def test_a_hugging_face_directory_is_evaluated_and_left_alone(run, call, refused, suite, tmp_path):
    """The numbers of the run; it has no held-out text and no steps, and must fit its tokenizer."""
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    save_hf(load_model(run), out, run / "tokenizer.json")
    before = sorted(out.iterdir())
    ours, theirs = (call(evaluation, path, f"--suite={suite}") for path in (run, out))
    assert read_table(ours) == read_table(theirs) and "not decontaminated" in theirs.stdout
    refused(call(evaluation, out), out, "--suite")
    refused(call(evaluation, out, "--every_checkpoint"), "--every_checkpoint")
    assert sorted(out.iterdir()) == before
    words = (f"{a}{b}{c} " for a in "abcdefgh" for b in "aeiou" for c in "klmnpqrstvwxyz")
    train_bpe([" ".join(words) * 3], 600).save(out / "tokenizer.json")
    refused(call(evaluation, out, f"--suite={suite}"), "600", "576")


def test_what_cannot_be_written_is_one_line_after_the_table(run, call, refused, suite, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copy")
    (copied / "eval.jsonl").unlink(missing_ok=True)
    (copied / "eval.jsonl").mkdir()
    (copied / "report.html").mkdir()
    result = call(evaluation, copied, f"--suite={suite}")
    refused(result, "eval.jsonl")
    assert "suite.jsonl" in result.stdout
    refused(call(evaluation, "report", copied), "report.html")


def test_an_evaluation_does_not_import_the_compiler(run, python, suite):
    """torch._dynamo would take a second or two. This eval.py is a process of its own."""
    result = python("eval.py", run, f"--suite={suite}", env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert read_table(result) and "torch.nn" in result.stderr
    assert "torch._dynamo\n" not in result.stderr


def test_eval_dtype_is_that_of_the_forward(run, call, suite):
    found = []
    for dtype in ("float32", "bfloat16"):
        assert call(evaluation, run, f"--suite={suite}", f"--eval_dtype={dtype}").returncode == 0
        last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
        assert last["of"]["dtype"] == dtype
        found.append(last["sums"]["suite.jsonl"]["nats"])
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.01)


@pytest.mark.parametrize("option", ["--every_checkpoint", "--sample_seed=1"])
def test_data_dir_says_where_the_held_out_text_is_now(copied, call, refused, option):
    refused(call(evaluation, copied, option, "--data_dir=elsewhere"), "elsewhere", "does not hold")
