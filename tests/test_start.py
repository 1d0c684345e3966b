"""Where a run goes on from: its tokenizer and data, forks, and directories that are no run."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import (ROOT, TINY, columns, contents_of, flip, forked_ranks, rows, saved_steps, seal,
                      steps)

import adapt
import data
import eval as evaluation
import model
import train
from corpus.bpe import train_bpe
from corpus.documents import as_document
from corpus.stdlib import stdlib_document
from eval import EvalConfig, evaluate_perplexity
from scaling.directory import describe
from scaling.starts import append_row
from support.files import (UserError, disk_remedy, fsync, log_rows, read_json, write_json,
                           write_rows)
from support.models import open_base, open_model

pytestmark = [pytest.mark.usefixtures("one_thread"),
              pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def content_and_times(folder):
    """{file: (bytes, time of the last change)} of everything in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


def starts_of(run):
    return list(log_rows(run, "starts.jsonl"))


# ---- A run's tokenizer is part of its data -------------------------------------------------------

@pytest.fixture(scope="module")
def learned(tmp_path_factory, sources):
    """A folder with a run of 60 steps on bpe:512; all paths in its config are relative."""
    root = tmp_path_factory.mktemp("learned")
    for name, path in sources.items():
        shutil.copytree(path, root / name)
    settings = TINY | dict(sources={"web": "web", "code": "code"}, data_dir="data", run_dir="run",
                           max_steps=60, lr=1e-2, min_lr=5e-3, eval_every_steps=0,
                           save_every_steps=30)
    (root / "run.py").write_text("".join(f"{key} = {value!r}\n"
                                         for key, value in settings.items()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train.main(["run.py"])
    return root


def add_text(folder):
    """The sources' code again, five times, as documents of the web: bpe:512 learns other tokens."""
    lines = (folder / "code/part.jsonl").read_text().replace('"id": "code', '"id": "more')
    (folder / "web/more.jsonl").write_text(5 * lines)


@pytest.fixture
def grown(learned, tmp_path, monkeypatch):
    """A copy of the folder, with more text; it is the working directory."""
    folder = shutil.copytree(learned, tmp_path / "grown")
    monkeypatch.chdir(folder)
    add_text(folder)
    return folder


def nats(step, file):
    """The nats of the text in a file under a step's weights and its run's tokenizer."""
    net, tokenizer, _ = open_model(step, EvalConfig())
    return evaluate_perplexity(net, tokenizer, [{"text": Path(file).read_text()}], 2048)["nats"]


def set_state(step, change):
    """Change the state of a step directory in place, as another version would have saved it."""
    state = json.loads((step / "state.json").read_text())
    change(state)
    seal(step, state)


def forget_digests(run):
    """Make a run one of those that did not save the digest of their tokenizer."""
    for step in run.glob("step??????"):
        set_state(step, lambda state: state["data"].pop("tokenizer_sha256"))


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("option", ["--resume=run", "--start_from=run/step000060",
                                    "--resume=run --run_dir=fork"])
def test_what_goes_on_from_a_run_keeps_its_tokenizer(grown, call, refused, option, is_old):
    """bpe:512 would learn other tokens from the text as it is now: the loss rose to 5.6.

    The changed data is named, and accepted on request. What older steps need is as it was.
    """
    if is_old:
        forget_digests(Path("run"))
    before, old_step = contents_of(Path("run")), nats("run/step000060", "code/part.jsonl")
    new = Path("run" if option == "--resume=run" else "fork" if "fork" in option else "anneal")
    words = [*option.split(), "--max_steps=66"]
    if new.name == "anneal":
        words += ["run.py", "--run_dir=anneal"]
    line = refused(call(train, *words), "data_sha256", "--accept_changes")
    assert "tokenizer" not in line
    result = call(train, *words, "--accept_changes")
    assert result.returncode == 0, result.stderr
    assert "more.jsonl is new" in line and "more.jsonl is new" in result.stdout
    assert "tokenizer: run/tokenizer.json is kept" in result.stdout
    losses = [row["loss"] for row in rows(new)]
    assert steps(new)[-1] == 66 and losses[-6] < rows(Path("run"))[59]["loss"] + 0.2
    assert (new / "tokenizer.json").read_bytes() == before["tokenizer.json"]
    assert nats("run/step000060", "code/part.jsonl") == old_step
    again = call(train, *words)
    assert again.returncode == 0 and again.stdout.splitlines()[-1].startswith(f"{new}: finished")
    if new.name != "run":
        assert contents_of(Path("run")) == before
    else:  # the manifest of the steps before has another name
        sha256 = json.loads(before["manifest.json"])["sha256"]
        assert Path(f"run/manifest-{sha256[:12]}.json").read_bytes() == before["manifest.json"]


def test_a_runs_tokenizer_is_never_written_over(copied, tmp_path):
    """Whatever was checked before: not even where data of another tokenizer is described."""
    folder = shutil.copytree(copied, tmp_path / "folder")
    before = (copied / "tokenizer.json").read_bytes()
    train_bpe([Path(__file__).read_text()], 300).save(folder / "tokenizer.json")
    with pytest.raises(UserError, match="another tokenizer"):
        describe(copied, {}, folder)
    assert (copied / "tokenizer.json").read_bytes() == before


def test_what_an_older_step_was_taken_on_is_still_known(grown, call, refused):
    """trace shows that step's documents, find says what it does not search; and where the data is
    lost, the command that is named builds it again, with the run's tokenizer."""
    def traced(step):
        result = call(data, "trace", "run", f"--step={step}")
        return result.stdout if result.returncode == 0 else result.stderr
    before = traced(30)
    assert call(train, "--resume=run", "--max_steps=62", "--accept_changes").returncode == 0
    assert traced(30) == before
    assert "more" in traced(61) + traced(62) and "more" not in before
    found = call(data, "find", "run", "--doc=web3").stdout
    assert "steps 1 to 60 were taken on other data" in found and "of steps 61 to 62" in found
    assert call(train, "--resume=run", "--max_steps=64", "--batch_size=4",
                "--accept_changes").returncode == 0
    assert traced(30) == before and traced(61) != traced(63)
    results = call(evaluation, "run").stdout
    shutil.rmtree("data")
    line = refused(call(evaluation, "run"), "run/config.json --tokenizer=run/tokenizer.json")
    command = re.search(r"python data.py (\S+ \S+)", line)[1].split()
    assert call(data, *command).returncode == 0
    assert call(evaluation, "run").stdout == results
    assert "restore" in traced(30)  # that data cannot be built again


@pytest.mark.parametrize("is_old", [False, True])
def test_another_tokenizer_is_never_accepted(grown, call, refused, is_old):
    """Not a file that is named, nor a file that was put in place of the run's; in both it is named.

    A file with the same tokenizer, laid out differently, is no other one.
    """
    if is_old:
        forget_digests(Path("run"))
    text = Path("code/part.jsonl").read_text()
    train_bpe([text], 300).save("other.json")
    spec = json.loads(Path("run/tokenizer.json").read_text())
    Path("same.json").write_text(json.dumps(spec, indent=2))
    words = ["--resume=run", "--max_steps=62", "--accept_changes"]
    for option in ("--resume=run", "--start_from=run/step000060 --run_dir=anneal run.py"):
        line = refused(call(train, *words[1:], *option.split(), "--tokenizer=other.json"),
                       "tokenizer=other.json", "run/tokenizer.json")
        assert "accept" not in line
    result = call(train, *words, "--tokenizer=bpe:300")
    assert result.returncode == 0 and "tokenizer: run/tokenizer.json is kept" in result.stdout
    assert call(train, *words, "--tokenizer=same.json", "--max_steps=63").returncode == 0
    train_bpe([text], 512).save("run/tokenizer.json")
    line = refused(call(train, *words, "--max_steps=64", "--tokenizer=bpe:512"),
                   "tokenizer_sha256", "run/tokenizer.json")
    assert "accept" not in line


def test_a_lost_tokenizer_comes_back_with_the_same_data_alone(learned, tmp_path, monkeypatch, call,
                                                              refused):
    folder = shutil.copytree(learned, tmp_path / "here")
    monkeypatch.chdir(folder)
    tokenizer = Path("run/tokenizer.json")
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    assert call(train, "--resume=run", "--max_steps=61").returncode == 0
    assert tokenizer.read_bytes() == content
    tokenizer.unlink()
    add_text(folder)
    for forget in (lambda run: None, forget_digests):
        forget(Path("run"))
        refused(call(train, "--resume=run", "--max_steps=62", "--accept_changes"),
                "run/tokenizer.json")
        assert not tokenizer.exists()


def test_another_python_changes_the_embedded_text_and_not_the_tokenizer(
        tmp_path, monkeypatch, call, refused, tiny_config):
    """With the built data a run goes on as it was; without it, or on request, with the new text."""
    def library(length):
        return [stdlib_document("reference", str(i), f"{i} words of this library " * length, str(i),
                                "lib.py:1") for i in range(60)]
    monkeypatch.setattr("data.leaked_docstrings", lambda eval_share: ())  # it parses the real one
    monkeypatch.setattr("corpus.documents.stdlib_documents", lambda source: library(9))
    run, data_dir = tmp_path / "run", tmp_path / "data"
    file = tiny_config(run, sources={"reference": "stdlib"}, data_dir=str(data_dir), max_steps=2,
                       tokenizer="bpe:300", vocab_size=300, eos_token_id=299, pad_token_id=298,
                       batch_size=4, workers=1, eval_share=0.2)
    assert call(train, file).returncode == 0
    tokenizer = (run / "tokenizer.json").read_bytes()
    monkeypatch.setattr("sys.version", "3.99.0 (of another day)")
    monkeypatch.setattr("corpus.documents.stdlib_documents", lambda source: library(8))
    result = call(train, file, "--max_steps=3")
    assert result.returncode == 0 and "the library of Python 3.1" in result.stdout
    assert len({row["data_sha256"] for row in [json.loads(
        (run / f"step00000{n}/state.json").read_text())["data"] for n in (2, 3)]}) == 1
    shutil.rmtree(data_dir)
    words = [file, "--max_steps=4"]
    assert "tokenizer" not in refused(call(train, *words), "data_sha256", "--accept_changes")
    assert call(train, *words, "--accept_changes").returncode == 0
    assert (run / "tokenizer.json").read_bytes() == tokenizer and steps(run) == [1, 2, 3, 4]


def test_built_data_is_enough_to_go_on(learned, tmp_path, monkeypatch, call, refused):
    """The raw files may be gone; other settings of the data need them."""
    monkeypatch.chdir(shutil.copytree(learned, tmp_path / "here"))
    shutil.rmtree("web")
    result = call(train, "--resume=run", "--max_steps=61")
    assert result.returncode == 0 and "on which run was trained; web: not here" in result.stdout
    assert call(train, "run.py", "--max_steps=62").returncode == 0
    assert call(train, "--resume=run", "--run_dir=fork", "--max_steps=63").returncode == 0
    refused(call(train, "--resume=run", "--max_steps=63", "--eval_share=0.3", "--accept_changes"),
            "web")
    Path("data").rename("moved")
    refused(call(train, "--resume=run", "--max_steps=63"), "web", "--data_dir=PATH")
    assert call(train, "--resume=run", "--max_steps=63", "--data_dir=moved").returncode == 0
    assert steps(Path("run")) == list(range(1, 64))


def test_a_finished_run_notes_where_its_data_is_now(copied, tmp_path, call):
    """Other commands look there: they need not be told."""
    before = read_json(copied / "config.json")
    moved = shutil.copytree(before["data_dir"], tmp_path / "moved")
    write_json(copied / "config.json", {**before, "data_dir": str(tmp_path / "gone")})
    assert "gone" in call(evaluation, copied).stderr
    assert call(train, f"--resume={copied}", f"--data_dir={moved}").returncode == 0
    assert read_json(copied / "config.json") == {**before, "data_dir": str(moved)}
    assert call(evaluation, copied).returncode == 0


@pytest.fixture
def other_code(monkeypatch):
    """Our code as another release would have it: the rule of every source cuts its texts short."""
    monkeypatch.setattr("corpus.stages.building_code", lambda stage: f"another {stage}")
    monkeypatch.setattr("corpus.documents.as_document",
                        lambda *arguments: short(as_document(*arguments)))


def short(document):
    return document | {"text": document["text"][:200]}


@pytest.mark.parametrize("is_old", [False, True])
def test_other_code_builds_no_other_data_for_a_run(learned, tmp_path, monkeypatch, call, refused,
                                                   other_code, is_old):
    """The data on which it was trained is there: it goes on with that, and one line says so.

    With text that has changed since, by name, or with lost data it is refused. is_old: the
    manifest is one of the time before digests of the input files, and knows their ages.
    """
    monkeypatch.chdir(shutil.copytree(learned, tmp_path / "here"))
    [manifest] = Path("data").glob("*/manifest.json")
    if is_old:
        def set_ages(clean, name):
            file = Path(name, "part.jsonl")
            clean["inputs"] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns]]
        content = json.loads(manifest.read_text())
        for name, clean in content["settings"]["clean"].items():
            set_ages(clean, name)
        manifest.write_text(json.dumps(content))
    line = f"data: {manifest.parent}, on which run was trained; built by other code"
    for words in (["--resume=run"], ["--resume=run", "--run_dir=fork"],
                  ["run.py", "--start_from=run/step000060", "--run_dir=anneal"]):
        result = call(train, *words, "--max_steps=61")
        assert result.returncode == 0, result.stderr
        assert line in result.stdout.splitlines()
    assert len(list(Path("data").glob("*/manifest.json"))) == 1
    with open("web/part.jsonl", "a") as out:
        out.write('{"id": "new", "text": "one more text of many words"}\n')
    result = call(train, "--resume=run", "--max_steps=62")
    refused(result, "data_sha256", "--accept_changes")
    assert "data: web: not the text on which run was trained" in result.stdout
    assert call(train, "--resume=run", "--max_steps=62", "--accept_changes").returncode == 0


@pytest.mark.parametrize("data_dir", ["data", "elsewhere"])
def test_the_data_of_todays_code_is_taken_on_request(learned, tmp_path, monkeypatch, call, refused,
                                                     other_code, data_dir):
    """Without the request a run whose data is lost is refused."""
    monkeypatch.chdir(shutil.copytree(learned, tmp_path / "here"))
    words = ["--resume=run", "--max_steps=61", f"--data_dir={data_dir}"]
    if data_dir == "elsewhere":
        refused(call(train, *words), "data_sha256", "restore", "--accept_changes")
    result = call(train, *words, "--accept_changes")
    assert result.returncode == 0 and "on which run was trained" not in result.stdout
    assert json.loads(Path("run/manifest.json").read_text())["settings"]["code"][0] == "another mix"


def test_a_step_without_its_run_is_a_start(copied, tmp_path, call, tiny_config):
    """A copied step directory; and a run whose config.json is lost goes on with its own config."""
    step = shutil.copytree(copied / "step000020", tmp_path / "alone" / "step000020")
    result = call(train, tiny_config(tmp_path / "anneal"), f"--start_from={step}",
                  "--max_steps=21")
    assert result.returncode == 0, result.stderr
    (copied / "config.json").unlink()
    result = call(train, tiny_config(copied), "--max_steps=21")
    assert result.returncode == 0, result.stderr
    assert steps(copied)[-1] == 21


# ---- Forks ---------------------------------------------------------------------------------------

def test_a_fork_goes_on_where_the_other_run_stood(copied, tmp_path, call, refused):
    """The same steps as that run would take, bit for bit; that run's files are untouched.

    The command is the same at the start and later; by then the other run may be gone.
    """
    fork, before = tmp_path / "fork", content_and_times(copied)
    words = [f"--resume={copied}", f"--run_dir={fork}"]
    result = call(train, *words, "--max_steps=24")
    assert result.returncode == 0 and "continues after step 20" in result.stdout, result.stderr
    assert steps(fork) == list(range(1, 25)) and saved_steps(fork) == [20, 24]
    assert steps(fork, "eval") == [10, 20, 24] and steps(fork, "end") == [24]
    assert columns(fork, "loss")[:20] == columns(copied, "loss")
    assert json.loads((fork / "fork.json").read_text()) == {"of": str(copied), "step": 20}
    assert json.loads((fork / "config.json").read_text())["run_dir"] == str(fork)
    assert content_and_times(copied) == before
    assert "finished, at step 24" in call(train, *words, "--max_steps=24").stdout
    assert call(train, *words, "--max_steps=26").returncode == 0
    assert saved_steps(fork) == [24, 25, 26] and content_and_times(copied) == before
    assert call(train, f"--resume={copied}", "--max_steps=24").returncode == 0
    assert columns(copied, "loss", "lr", "batch_hash") == columns(fork, "loss", "lr",
                                                                  "batch_hash")[:24]
    shutil.rmtree(copied)
    assert call(train, f"--resume={fork}", "--max_steps=27").returncode == 0


def test_a_fork_on_a_disk_without_hard_links_is_a_copy(copied, tmp_path, call, monkeypatch):
    def no_link(file, target):
        raise OSError(errno.EPERM, "no links here")
    monkeypatch.setattr("os.link", no_link)
    fork = tmp_path / "fork"
    assert call(train, f"--resume={copied}", f"--run_dir={fork}").returncode == 0
    assert contents_of(fork / "step000020") == contents_of(copied / "step000020")


def test_a_fork_may_begin_at_an_older_step(copied, tmp_path, call, refused):
    step, fork = copied / "step000010", tmp_path / "fork"
    measured = [{"kind": "eval", "step": step, "of": {}} for step in (5, 10, 20)]
    write_rows(copied / "eval.jsonl", measured)
    assert "RUN" not in refused(call(train, f"--resume={step}"), step, f"--resume={copied}")
    words = [f"--resume={step}", f"--run_dir={fork}", "--lr=0.001", "--max_steps=12"]
    refused(call(train, *words), "lr: 0.003 there, 0.001 now")
    assert not fork.exists()
    assert call(train, *words, "--accept_changes").returncode == 0
    assert steps(fork) == list(range(1, 13)) and saved_steps(fork) == [10, 12]
    assert steps(fork, "eval") == [10, 12]
    assert list(log_rows(fork, "eval.jsonl")) == measured[:2]


def test_a_fork_never_takes_the_place_of_another_run(copied, finished, tmp_path, call, refused):
    other = shutil.copytree(finished, tmp_path / "other")
    before = content_and_times(other)
    refused(call(train, f"--resume={copied}", f"--run_dir={other}"), other, copied)
    assert content_and_times(other) == before
    fork = tmp_path / "fork"
    assert call(train, f"--resume={copied}", f"--run_dir={fork}", "--max_steps=21").returncode == 0
    refused(call(train, f"--resume={finished}", f"--run_dir={fork}"), fork, copied)
    flip(copied / "step000020/__0_0.distcp")  # a file of its own, or the same one: either is found
    result = call(train, f"--resume={copied}", f"--run_dir={tmp_path / 'next'}", "--max_steps=16")
    assert result.returncode == 0 and "continues after step 15" in result.stdout
    result = call(train, f"--resume={copied}", f"--run_dir={fork}", "--overwrite",
                  "--max_steps=16")
    assert result.returncode == 0 and saved_steps(fork) == [15, 16]
    assert saved_steps(copied) == [10, 15, 20]


def test_a_fork_that_was_killed_while_it_began_begins_again(copied, tmp_path, call, monkeypatch,
                                                            refused):
    fork = tmp_path / "fork"
    words = [f"--resume={copied}", f"--run_dir={fork}", "--max_steps=21"]
    for name in ("write_rows", "link_or_copy"):
        with monkeypatch.context() as patch:
            def die(*_):
                raise UserError("killed")
            patch.setattr(f"scaling.start.{name}", die)
            refused(call(train, *words), "killed")
    assert call(train, *words).returncode == 0 and steps(fork) == list(range(1, 22))


def test_a_fork_of_another_step_is_another_fork(copied, tmp_path, call, refused):
    """Where a step is named. Where only the run is, the fork goes on; --overwrite begins again."""
    fork = tmp_path / "fork"
    ten, twenty = (f"--resume={copied / step}" for step in ("step000010", "step000020"))
    here = f"--run_dir={fork}"
    assert call(train, ten, here, "--max_steps=11").returncode == 0
    before = content_and_times(fork)
    line = refused(call(train, twenty, here, "--max_steps=21"), "step 10 ", "step 20", copied)
    assert f"--resume={fork}" in line and content_and_times(fork) == before
    for first, last in ((ten, 12), (f"--resume={copied}", 13)):
        assert call(train, first, here, f"--max_steps={last}").returncode == 0
    result = call(train, twenty, here, "--max_steps=21", "--overwrite")
    assert result.returncode == 0 and saved_steps(fork) == [20, 21]
    assert json.loads((fork / "fork.json").read_text())["step"] == 20


# ---- What differs is told before the data is built, with a remedy that works ---------------------

def test_another_run_is_told_before_its_data_is_built(copied, tmp_path, tiny_config, call, refused,
                                                      monkeypatch):
    """Its settings, and not the tokenizer that would follow from them."""
    monkeypatch.setattr("train.build_data", lambda config: pytest.fail("builds data"))
    names = [file.name for file in tmp_path.iterdir()]
    other = tiny_config(tmp_path / "other", d_model=64, tokenizer="bpe:300", vocab_size=300,
                        eos_token_id=299, pad_token_id=298)
    line = refused(call(train, f"--resume={copied}", other), f"{copied}", "d_model: 32 there, 64",
                   "tokenizer: bpe:512 there", "leave out")
    assert "accept_changes" not in line and "run_dir" not in line
    line = refused(call(train, other, f"--run_dir={copied}", "--accept_changes"), "d_model: 32",
                   "--run_dir", "--overwrite")
    assert "accept_changes" not in line  # it cannot give weights another shape
    start = f"--start_from={copied / 'step000010'}"
    refused(call(train, other, start), copied / "step000010", "other.py:1: d_model=64", "=32")
    train_bpe([Path(__file__).read_text()], 300).save(copied / "tokenizer.json")
    same = tiny_config(tmp_path / "same", max_steps=22)
    for words in ([f"--resume={copied}"], [same, start], [same, f"--run_dir={copied}"],
                  [f"--resume={copied}", f"--run_dir={tmp_path / 'fork'}"]):
        line = refused(call(train, *words), f"restore {copied / 'tokenizer.json'}")
        assert "vocab_size" not in line
    assert sorted(names + ["other.py", "same.py"]) == sorted(f.name for f in tmp_path.iterdir())


def test_the_remedy_of_a_change_works(copied, tmp_path, sources, tiny_config, call, refused):
    """What the line says depends on where the state comes from: each remedy is tried."""
    def remedy(*words):
        line = refused(call(train, *words))
        return {option for option in ("--run_dir", "--overwrite", "--accept_changes", "leave out",
                                      "restore") if option in line}
    resume, fork = f"--resume={copied}", f"--run_dir={tmp_path / 'fork'}"
    same = tiny_config(tmp_path / "same", max_steps=21)
    assert remedy(resume, "--lr=1e-3") == {"leave out", "--accept_changes"}
    assert remedy(resume, fork, "--lr=1e-3") == {"leave out", "--accept_changes"}
    assert remedy(same, f"--run_dir={copied}", "--lr=1e-3") == {"--run_dir", "--overwrite",
                                                               "--accept_changes"}
    refused(call(train, same, f"--run_dir={copied}", "--lr=1e-3"), "--overwrite (deletes that run)",
            "--accept_changes (continues it with ")
    less = f"--sources={ {'web': sources['web']} }"
    start = [same, f"--start_from={copied / 'step000010'}", less]
    assert remedy(*start) == {"restore", "--accept_changes"}
    for words in ([resume, fork, "--lr=1e-3", "--max_steps=21"], start):
        assert call(train, *words, "--accept_changes").returncode == 0


def test_a_run_that_has_lost_its_steps_does_not_begin_again_in_silence(copied, tiny_config, call,
                                                                       refused):
    """--resume names what there is to do instead; a config begins again, and says what it drops."""
    for step in copied.glob("step*"):
        shutil.rmtree(step)
    before = content_and_times(copied)
    line = refused(call(train, f"--resume={copied}"), copied, "no step")
    assert content_and_times(copied) == before
    command = re.search(r"python train.py (\S+) (\S+)", line).groups()
    lost = len(list(log_rows(copied)))
    began = starts_of(copied)
    result = call(train, *command, "--max_steps=2")
    assert result.returncode == 0 and f"{lost} rows" in result.stdout and steps(copied) == [1, 2]
    assert "starts.jsonl keeps" in result.stdout and len(starts_of(copied)) == len(began) + 1
    assert "rows" not in call(train, *command, "--max_steps=2", "--overwrite").stdout


def test_a_start_after_a_torn_one_has_a_line_of_its_own(tmp_path):
    """A crash may tear the last line; the next row must not be lost with it."""
    file = tmp_path / "starts.jsonl"
    for step in (0, 5):
        append_row(file, {"kind": "start", "step": step})
    file.write_bytes(file.read_bytes()[:-9])
    append_row(file, {"kind": "start", "step": 7})
    assert [row["step"] for row in starts_of(tmp_path)] == [0, 7]
    assert len(file.read_text().splitlines()) == 3


def test_a_step_that_is_not_there_is_told_with_those_that_are(copied, tiny_config, call, refused):
    tiny_config(copied)
    step, other = copied / "step000007", f"--run_dir={copied}_other"
    for words in ([evaluation, step], [evaluation, "sample", step], [evaluation, "report", step],
                  [train, f"--resume={step}", other],
                  [train, f"{copied}.py", f"--start_from={step}", other],
                  [adapt, ROOT / "configs/tiny_sft.py", f"--start_from={step}", other],
                  [model, "export", step, f"{copied}_out"], [adapt, "chat", step],
                  [adapt, "generate", step, ROOT / "tests/data", f"{copied}.jsonl"]):
        line = refused(call(*words), "step000007", "step000010, step000015, step000020")
        assert "tiny" not in line
    for words in ([model, "export", "nowhere", f"{copied}_out"], [adapt, "chat", "nowhere"]):
        refused(call(*words), "nowhere: no such directory")


def test_options_of_the_plan_alone_are_named(copied, call):
    words = [f"--resume={copied}", "--gpus=2", "--gpu=a100"]
    assert call(train, *words).stdout.startswith("--gpu, --gpus: for --plan alone")
    assert "for --plan alone" not in call(train, *words, "--plan").stdout
    assert "for --plan alone" not in call(train, words[0]).stdout


# ---- Directories that are no run, and ends before the beginning ----------------------------------

def test_a_run_lies_neither_in_a_step_nor_at_a_file_nor_among_others(
        copied, tiny_config, tmp_path, call, refused, monkeypatch):
    monkeypatch.setattr("train.build_data", lambda config: pytest.fail("builds data"))
    before = content_and_times(copied)
    for place, words in ((copied / "step000020", "a step of the run"),
                         (copied / "config.json", "a file"), (ROOT / "docs", "checks.md")):
        refused(call(train, tiny_config(tmp_path / "x"), f"--run_dir={place}"), words)
    assert content_and_times(copied) == before


def test_a_list_of_tokens_that_is_not_there_is_told_beside_the_sources(tiny_config, tmp_path, call,
                                                                      refused):
    """They would not be read; configs/olmo_1b.py names a list, and a user their text."""
    refused(call(train, tiny_config(tmp_path / "run"), "--token_files=none.txt"), "none.txt",
            "replaces the sources", "--token_files= reads them")


def test_a_run_never_takes_the_place_of_something_else(tmp_path, finished, tiny_config, call,
                                                       refused, monkeypatch):
    """Neither with --overwrite: a Hugging Face directory, somebody's checkpoints, a stray log."""
    places = {"hf": {"config.json": '{"model_type": "olmo"}', "tokenizer.json": "{}"},
              "mine": {"config.json": "my settings"}, "others": {"step1000/model.pt": "weights"},
              "log": {"metrics.jsonl": "my log"}, "board": {"tensorboard/events": "curves"}}
    file = tiny_config(tmp_path / "run", max_steps=1)
    for name, files in places.items():
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(content)
        before = content_and_times(tmp_path / name)
        for words in ([], ["--overwrite"]):
            for start in ([file], [f"--resume={finished}"]):
                refused(call(train, *start, f"--run_dir={tmp_path / name}", *words),
                        tmp_path / name)
        assert content_and_times(tmp_path / name) == before
    monkeypatch.chdir(shutil.copytree(tmp_path / "hf", tmp_path / "work" / "hf").parent)
    for run_dir in ("", ".", "..", "/", str(Path.home()), str(ROOT), str(ROOT.parent), "hf/.."):
        for words in ([], ["--overwrite"]):
            refused(call(train, file, f"--run_dir={run_dir}", *words), "run_dir")
    assert sorted(path.name for path in Path(".").rglob("*")) == ["config.json", "hf",
                                                                  "tokenizer.json"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/plan.txt").write_text("of a user")
    refused(call(train, file, f"--run_dir={tmp_path / 'notes'}"), "holds plan.txt, and no run")
    (tmp_path / "notes/plan.txt").rename(tmp_path / "notes/job.log")  # of a batch system
    assert call(train, file, f"--run_dir={tmp_path / 'notes'}").returncode == 0
    monkeypatch.chdir(tmp_path / "notes")
    assert call(train, "--resume=.", "--max_steps=2").returncode == 0
    for words in (["--resume=.", "--overwrite"], [file, "--run_dir="]):
        refused(call(train, *words), "run_dir")


def test_neither_a_run_nor_built_data_lies_in_a_source(learned, tmp_path, monkeypatch, call,
                                                       refused):
    """Its logs, and the held-out text, would be read as text of the source."""
    monkeypatch.chdir(shutil.copytree(learned, tmp_path / "here"))
    before = sorted(Path("web").rglob("*"))
    for option in ("--run_dir=web", "--run_dir=code/../web/runs/one", "--data_dir=web/built"):
        key = option[2:option.index("=")]
        says = "holds part.jsonl" if option == "--run_dir=web" else "source web,"
        refused(call(train, "run.py", option), f"{key}=", says)
    refused(call(data, "run.py", "--data_dir=web"), "data_dir=web", "source web,")
    assert sorted(Path("web").rglob("*")) == before


def test_a_last_step_before_the_first_is_an_error(copied, tmp_path, tiny_config, call, refused):
    before = content_and_times(copied)
    line = refused(call(train, f"--resume={copied}", "--max_steps=12"), "max_steps=12", "step 20")
    assert f"--resume={copied / 'step000010'} --run_dir=NEW" in line
    for words in ([f"--resume={copied}", f"--run_dir={tmp_path / 'fork'}"],
                  [tiny_config(tmp_path / "run"), f"--start_from={copied / 'step000015'}"]):
        refused(call(train, *words, "--max_steps=9"), "max_steps=9")
    refused(call(train, tiny_config(tmp_path / "run"), f"--start_from={copied / 'step000020'}"),
            "max_steps=20")
    assert content_and_times(copied) == before
    assert not saved_steps(tmp_path / "run") and not saved_steps(tmp_path / "fork")


def test_a_start_that_is_none_is_found_before_the_data_is_built(tmp_path, copied, tiny_config, call,
                                                                refused, monkeypatch):
    """A relative path is named with the directory where it was looked for."""
    monkeypatch.chdir(tmp_path)
    data_dir = tmp_path / "data"
    file = tiny_config(tmp_path / "run", data_dir=str(data_dir))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "olmo"}')
    for start in ("nowhere", "nowhere/step000010", "hf"):
        refused(call(train, file, f"--start_from={start}"), f"start_from={start}", tmp_path)
    refused(call(train, file, f"--start_from={copied}"), f"{copied / 'step000020'}")
    assert not data_dir.exists()
    for words in ([file, "--resume=nowhere"], ["nowhere.py"], [file, "--tokenizer=none.json"],
                  [file, "--sources={'web': 'nowhere'}"], [file, "--token_files=none.txt"],
                  [file, "--decontaminate={'set': 'none'}"]):
        refused(call(train, *words), tmp_path)


def test_the_bar_says_when_it_stands_for_an_evaluation(tmp_path, tiny_config, call, monkeypatch):
    monkeypatch.setattr("scaling.run.has_bar", lambda: True)  # as at a terminal
    result = call(train, tiny_config(tmp_path / "run", max_steps=3, eval_every_steps=0))
    bars = re.split(r"[\r\n]+", result.stderr)
    assert any("3/3" in bar and "evaluating" in bar for bar in bars)
    last = [bar for bar in bars if "3/3" in bar][-1]
    assert "evaluating" not in last


# ---- The disk ------------------------------------------------------------------------------------

@pytest.mark.parametrize("number, kind, fails", [
    (errno.EINVAL, "folder", False), (errno.EINVAL, "file", True), (errno.EIO, "folder", True),
    (errno.ENOSPC, "folder", True)])
def test_a_disk_that_cannot_sync_a_folder_is_no_full_one(tmp_path, monkeypatch, number, kind,
                                                         fails):
    def no_sync(handle):
        raise OSError(number, os.strerror(number))
    (tmp_path / "file").write_text("content")
    path = tmp_path if kind == "folder" else tmp_path / "file"
    monkeypatch.setattr("os.fsync", no_sync)
    if not fails:
        fsync(path)
        return
    with pytest.raises(OSError) as caught:
        fsync(path)
    assert ("free some space" in disk_remedy(caught.value)) == (number == errno.ENOSPC)


def test_a_checkpoint_that_cannot_be_written_says_what_failed(copied, call, refused, monkeypatch):
    def no_sync(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr("scaling.checkpoint.fsync", no_sync)
    line = refused(call(train, f"--resume={copied}", "--max_steps=21"), "step000021",
                   os.strerror(errno.EIO))
    assert "space" not in line


def test_a_base_is_the_network_of_its_step(copied, call):
    """rope_theta has no tensor: RUN/config.json has the newest one, and each step its own."""
    words = [f"--resume={copied}", "--max_steps=21", "--rope_theta=500", "--accept_changes"]
    assert call(train, *words).returncode == 0
    thetas = [open_base(copied / step, "size").model_config.rope_theta
              for step in ("step000020", "step000021")]
    assert thetas == [10000.0, 500.0]
    assert open_base(copied, "size").model_config.rope_theta == 500.0


# ---- Runs of other code --------------------------------------------------------------------------

def test_a_setting_of_another_network_is_refused_and_another_unknown_one_is_named(
        copied, tmp_path, tiny_config, call, refused):
    """A fork's key without a tensor of its own changes what is computed: at every door it is named.

    Keys that are not the network's, such as one that was removed since then, are listed.
    """
    def another(state):
        state["config"] |= {"old_key": 1}
    for step in copied.glob("step??????"):
        set_state(step, another)
    result = call(train, f"--resume={copied}", "--max_steps=21")
    assert result.returncode == 0 and "warning: " in result.stdout and "old_key=1" in result.stdout

    def another_network(state):
        state["config"] |= {"logit_scale": 0.5}
        state["model_keys"] = [*state["model_keys"], "logit_scale"]
    for step in copied.glob("step??????"):
        set_state(step, another_network)
    file = tiny_config(tmp_path / "run", method="sft")
    for command, *words in (
            [train, f"--resume={copied}", "--max_steps=22", "--accept_changes"],
            [train, f"--resume={copied}", f"--run_dir={tmp_path / 'fork'}", "--max_steps=22"],
            [train, tiny_config(tmp_path / "anneal", max_steps=22),
             f"--start_from={copied / 'step000020'}"],
            [evaluation, copied], [evaluation, "sample", copied / "step000020"],
            [adapt, file, f"--start_from={copied}"], [model, "export", copied, tmp_path / "hf"]):
        refused(call(command, *words), "logit_scale=0.5", copied)
    assert not (tmp_path / "fork/config.json").exists()


# ---- Several ranks -------------------------------------------------------------------------------

def test_two_ranks_begin_a_fork_and_one_goes_on(copied, tmp_path, call):
    """Only rank 0 copies; a mistake is printed once."""
    fork, log = tmp_path / "fork", tmp_path / "log"
    words = [f"--resume={copied}", f"--run_dir={fork}"]
    codes, text = forked_ranks(2, log, train.main, *words, "--max_steps=15")
    assert set(codes) != {0} and text.count("error: max_steps=15") == 1
    codes, text = forked_ranks(2, log, train.main, *words, "--max_steps=22")
    assert codes == [0, 0], text
    assert call(train, *words, "--max_steps=23").returncode == 0
    for last in (22, 23):
        assert call(train, f"--resume={copied}", f"--max_steps={last}").returncode == 0
    assert steps(fork) == list(range(1, 24))
    one, other = columns(copied, "batch_hash"), columns(fork, "batch_hash")
    assert one == other
    assert columns(fork, "loss")[-1][0] == pytest.approx(columns(copied, "loss")[-1][0], rel=1e-5)
