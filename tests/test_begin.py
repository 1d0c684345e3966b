"""A run that begins with somebody's weights: a Hugging Face directory, or weights of ours alone."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, columns, difference, forked_ranks, rows, saved_steps, steps

import data
import eval as evaluation
import model
import support.models
import train
from corpus.bpe import train_bpe
from eval import EvalConfig
from scaling.checkpoint import load_checkpoint
from support.files import UserError
from support.models import open_model
from support.records import domains_table
from support.suites import open_suites
from support.weights import load_model, save_hf

CONTINUE = ROOT / "configs/continue.py"
# What a run needs besides: small, and no key of the network.
SMALL = ["--dtype=float32", "--compile=false", "--device=cpu", "--batch_size=8", "--max_steps=6",
         "--warmup_steps=2", "--lr=1e-3", "--eval_every_steps=3", "--log_every_steps=1",
         "--eval_share=0.2", "--max_new_tokens=4", "--workers=1"]


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The finished run as a Hugging Face directory; no test changes it."""
    pytest.importorskip("safetensors")
    out = tmp_path_factory.mktemp("exported") / "OUT"
    model.main(["export", str(finished), str(out)])
    return out


@pytest.fixture
def begin(tmp_path, sources, monkeypatch, call):
    """Runs train.py with configs/continue.py and one of the two sources in an empty directory."""
    monkeypatch.chdir(tmp_path)
    text = f"--sources={ {'mine': sources['code']} }"

    def run(*words, config=CONTINUE):
        return call(train, config, *SMALL, text, *words)
    return run


def state_of(run, step):
    return json.loads((run / f"step{step:06d}/state.json").read_text())


def settings_of(run):
    return json.loads((run / "config.json").read_text())


# ---- A directory from elsewhere ------------------------------------------------------------------

def test_a_run_begins_with_the_weights_of_a_directory(begin, exported, tmp_path, call, one_thread):
    """Before step 1 it is worth what eval.py says of the directory. Then it learns."""
    out = shutil.copytree(exported, tmp_path / "OUT")
    result = begin("--start_from=OUT", "--run_dir=run")
    assert result.returncode == 0, result.stderr
    assert "weights of OUT" in result.stdout and "step 0: bits per byte" in result.stdout
    assert "python eval.py report run\n" in result.stdout and "--run_dir=run_sft\n" in result.stdout
    run = tmp_path / "run"
    assert steps(run) == [1, 2, 3, 4, 5, 6] and steps(run, "eval") == [0, 3, 6]
    settings, there = settings_of(run), vars(load_model(out).config)
    assert {key: settings[key] for key in there} == there
    assert settings["fresh_optimizer"] and settings["start_from"] == "OUT"
    began = state_of(run, 6)["began"]
    assert began["weights"] == str(out) and len(began["sha256"]) == 64
    assert json.loads((run / "manifest.json").read_text())["began"] == began

    [manifest] = (tmp_path / "datasets").rglob("manifest.json")
    suite = str(manifest.parent / "held_out/mine.jsonl")
    first, _, last = (row["sums"]["mine"] for row in rows(run, "eval"))
    assert domains_table({"mine.jsonl": first}) in call(evaluation, out, f"--suite={suite}").stdout
    config = EvalConfig(suite=suite)
    network, tokenizer, _ = open_model(out, config)
    there = evaluation.evaluate(network, tokenizer, open_suites(config), config)["sums"]
    assert there == {"mine.jsonl": first}
    assert last["nats"] < first["nats"]
    verdict = call(evaluation, run, f"--suite={suite}").stdout
    assert f"{out}, with which it began" in " ".join(verdict.split())


def test_the_same_command_goes_on_when_the_directory_is_gone(begin, exported, tmp_path, refused,
                                                             call, one_thread):
    """Shape and tokenizer are then the run's own. No other start takes the place of its start."""
    shutil.copytree(exported, tmp_path / "OUT")
    run = tmp_path / "run"
    assert begin("--start_from=OUT", "--run_dir=run", "--max_steps=3").returncode == 0
    (tmp_path / "OUT").rename(tmp_path / "moved")
    for number, start in enumerate(("OUT", "./OUT/", tmp_path / "OUT"), 4):
        result = begin(f"--start_from={start}", "--run_dir=run", f"--max_steps={number}")
        assert result.returncode == 0 and f"after step {number - 1}" in result.stdout
    assert call(train, "--resume=run", "--max_steps=7").returncode == 0
    assert steps(run) == [1, 2, 3, 4, 5, 6, 7] and steps(run, "eval")[0] == 0
    assert state_of(run, 7)["began"]["weights"] == str(tmp_path / "OUT")
    for other in ("moved", "elsewhere"):
        line = refused(begin(f"--start_from={other}", "--run_dir=run", "--accept_changes"),
                       "start_from: ", f"OUT there, {other} now", "--overwrite")
        assert "or --accept_changes" not in line
    refused(begin("--run_dir=run"), "start_from: missing", "--resume=run")
    for again in ("false", "true"):
        assert call(train, "--resume=run", "--run_dir=fork", "--max_steps=8",
                    f"--overwrite={again}").returncode == 0
    assert state_of(tmp_path / "fork", 8)["began"] == state_of(run, 7)["began"]


def test_a_run_that_was_killed_before_its_first_step_begins_again(begin, exported, tmp_path,
                                                                  monkeypatch, call, refused,
                                                                  one_thread):
    """Its evaluation of step 0 is then in the log once."""
    def stop(*words):
        raise UserError("no step today")
    words = [f"--start_from={exported}", "--run_dir=run", "--max_steps=1"]
    with monkeypatch.context() as patch:
        patch.setattr("train.train_step", stop)
        refused(begin(*words), "no step today")
    assert steps(tmp_path / "run", "eval") == [0] and not saved_steps(tmp_path / "run")
    for command, other in ((evaluation, "run"), (train, "--resume=run")):
        assert "--resume=run" not in refused(call(command, other, *["--run_dir=fork"] * (
            command is train)), "saved no step", "the command that began it")
    assert begin(*words).returncode == 0
    assert steps(tmp_path / "run", "eval") == [0, 1]
    assert "step 0, with which the run began, was better" in begin(
        *words, "--overwrite", "--lr=9", "--keep_best").stdout
    assert begin(*words, "--overwrite", "--eval_every_steps=0").returncode == 0
    assert steps(tmp_path / "run", "eval") == [1]  # only at the end, as asked


# ---- The shape -----------------------------------------------------------------------------------

def test_a_config_may_name_the_shape_and_only_the_context_may_differ(
        begin, exported, finished, tmp_path, refused, monkeypatch, one_thread):
    """A line of a config file, an option and a saved config.json are named each as it is."""
    config = shutil.copy(finished.with_suffix(".py"), tmp_path / "same.py")
    words = [f"--start_from={exported}", "--run_dir=run", "--max_steps=1"]
    result = begin(*words, "--max_seq_len=48", config=config)
    assert result.returncode == 0, result.stderr
    assert f"--max_seq_len=48: not 32, with which {exported}" in result.stdout
    assert settings_of(tmp_path / "run")["max_seq_len"] == 48
    monkeypatch.setattr("train.build_data", lambda config: pytest.fail("builds data"))
    (tmp_path / "other.py").write_text("lr = 1e-3\nn_heads = 4\n")
    saved = settings_of(finished) | {"rope_theta": 500.0, "start_from": ""}
    (tmp_path / "saved.json").write_text(json.dumps(saved))
    new = [f"--start_from={exported}", "--run_dir=new"]
    for config, option, fault in ((CONTINUE, "--d_model=33", "--d_model=33: "),
                                  (CONTINUE, "--weight_tying", "--weight_tying=True: "),
                                  (CONTINUE, "--eos_token_id=9", "--eos_token_id=9: "),
                                  ("other.py", "--lr=1", "other.py:2: n_heads=4: "),
                                  ("saved.json", "--lr=1", "saved.json: rope_theta=500.0: ")):
        key = fault.split("=")[0].split()[-1].strip("-")
        there = getattr(load_model(exported).config, key)
        refused(begin(*new, option, config=config), fault, f"start_from={exported}",
                f"{key}={there}")
    assert not (tmp_path / "new").exists()


def test_the_plan_is_that_of_the_directory(begin, exported, tmp_path, call, monkeypatch):
    monkeypatch.setattr("support.weights.copy_own_rows", lambda *_: pytest.fail("reads weights"))
    result = begin(f"--start_from={exported}", "--plan", "--gpus=8")
    count = sum(p.numel() for p in model.OLMo(load_shape(exported)).parameters())
    assert result.returncode == 0 and f"{count:,} parameters; 6 steps" in result.stdout
    assert str(exported) in result.stdout and not (tmp_path / "runs").exists()
    words = ["configs/olmo_7b.py", "configs/olmo_7b_anneal.py", "--plan"]  # its start is not here
    assert "1,000 steps" in call(train, *[ROOT / word if "/" in word else word for word in words]
                                 ).stdout


def load_shape(path):
    from support.weights import read_model_config
    return read_model_config(path)


# ---- The tokenizer -------------------------------------------------------------------------------

def test_the_tokenizer_is_that_of_the_weights(begin, exported, finished, tmp_path, refused,
                                              monkeypatch, one_thread):
    """Another file with the same ids will do, as transformers may have written it anew. A
    directory without one needs it named, and it is checked before the data is built."""
    words = [f"--start_from={exported}", "--run_dir=run", "--max_steps=1"]
    spec = json.loads((exported / "tokenizer.json").read_text())
    (tmp_path / "same.json").write_text(json.dumps({**spec, "version": "9.0"}))
    result = begin(*words, "--tokenizer=same.json")
    assert result.returncode == 0 and "in place of tokenizer=same.json" in result.stdout
    assert "rises to 0.00055 and never reaches lr=0.001" in result.stdout  # of 2 steps of warm-up
    bare = shutil.copytree(exported, tmp_path / "bare",
                           ignore=lambda *_: {"tokenizer.json", "tokenizer_config.json"})
    assert begin(f"--start_from={bare}", "--run_dir=named", "--max_steps=1",
                 f"--tokenizer={exported / 'tokenizer.json'}").returncode == 0
    losses = [columns(tmp_path / run, "batch_hash", "loss") for run in ("run", "named")]
    assert losses[0] == losses[1]
    (tmp_path / "same.json").unlink()  # a run that has begun needs neither it nor the built data
    shutil.rmtree(tmp_path / "datasets")
    result = begin(*words, "--tokenizer=same.json", "--max_steps=2")
    assert result.returncode == 0, result.stderr
    assert "in place of tokenizer=same.json" in result.stdout

    monkeypatch.setattr("train.build_data", lambda config: pytest.fail("builds data"))
    train_bpe([CONTINUE.read_text() * 9], 300).save(tmp_path / "other.json")
    new = "--run_dir=new"
    refused(begin(f"--start_from={exported}", new, "--tokenizer=other.json"),
            "tokenizer=other.json", exported)
    for start in (exported, finished / "step000010"):
        refused(begin(f"--start_from={start}", new, "--tokenizer=nofile.json"),
                "tokenizer=nofile.json", "no such file", "leave it out")
    refused(begin(f"--start_from={bare}", new), f"{bare}: has no tokenizer.json", "--tokenizer=")
    refused(begin(f"--start_from={bare}", new, "--tokenizer=other.json"), "other.json: ",
            "vocab_size")
    assert not (tmp_path / "new").exists()


def test_the_data_may_be_built_first(begin, exported, tmp_path, sources, call, refused, one_thread):
    """With the tokenizer of the start; a start that is still to be trained is no hindrance."""
    words = [CONTINUE, f"--sources={ {'mine': sources['code']} }", "--eval_share=0.2",
             f"--start_from={exported}"]
    result = call(data, *words, "--batch_size=2")
    assert result.returncode == 0 and "data.py does not use --batch_size\n" in result.stdout
    assert begin(words[-1], "--max_steps=1", "--run_dir=run").returncode == 0
    assert len(list((tmp_path / "datasets").rglob("manifest.json"))) == 1
    refused(call(data, *words[:-1]), "start_from: missing")
    result = call(data, ROOT / "configs/tiny.py", *words[1:3], "--start_from=runs/later",
                  "--tokenizer=bpe:300", "--workers=1")
    assert result.returncode == 0, result.stderr


def test_a_step_that_was_copied_alone_gives_its_weights(begin, copied, tmp_path, refused,
                                                        one_thread):
    """It has no tokenizer.json, but its state.json knows the tokenizer's digest."""
    (tmp_path / "alone").mkdir()
    step = shutil.move(copied / "step000010", tmp_path / "alone")
    words = [f"--start_from={step}", "--run_dir=run", "--max_steps=1"]
    refused(begin(*words), "alone: has no tokenizer.json", "--tokenizer=")
    assert not (tmp_path / "datasets").exists()
    train_bpe([CONTINUE.read_text() * 9], 512).save(tmp_path / "other.json")
    refused(begin(*words, "--tokenizer=other.json"), "tokenizer_sha256")
    assert begin(*words, f"--tokenizer={copied / 'tokenizer.json'}").returncode == 0


# ---- Weights of ours alone -----------------------------------------------------------------------

@pytest.mark.parametrize("step", ["", "step000010"])
def test_a_run_of_ours_gives_its_weights_alone(begin, finished, tmp_path, call, step, one_thread):
    """Its newest step, or the one that is named. The same data begins at its start, and every
    moment of the optimiser is that of one step."""
    run = tmp_path / "run"
    result = call(train, finished.with_suffix(".py"), f"--start_from={finished / step}",
                  "--fresh_optimizer", f"--run_dir={run}", "--max_steps=1")
    assert result.returncode == 0, result.stderr
    assert "begins at step 1" in result.stdout
    assert columns(run, "step", "batch_hash") == columns(finished, "step", "batch_hash")[:1]
    there = [row for row in rows(finished, "eval") if row["step"] == (10 if step else 20)]
    assert rows(run, "eval")[0]["sums"] == there[0]["sums"]
    assert rows(run)[0]["loss"] < columns(finished, "loss")[0][0]
    assert state_of(run, 1)["began"]["weights"] == str(finished / (step or "step000020"))
    config = train.TrainConfig(device="cpu")
    network, optimizer = train.build_training(load_model(run).config, config, torch.device("cpu"),
                                              torch.float32, False)
    load_checkpoint(run / "step000001", network, optimizer)
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}


def test_weights_of_ours_learn_from_other_text(begin, finished, tmp_path, refused, one_thread):
    """continue.py says that they are taken alone. Whole, they need the data of their own run."""
    assert begin(f"--start_from={finished}", "--run_dir=run", "--max_steps=1").returncode == 0
    assert settings_of(tmp_path / "run")["tokenizer"] == str(finished / "tokenizer.json")
    step = finished / "step000010"
    line = refused(begin(f"--start_from={step}", "--run_dir=whole", "--fresh_optimizer=false",
                         "--max_steps=12"), step, "its data has changed", "--fresh_optimizer")
    assert "--overwrite" not in line


# ---- What is wrong -------------------------------------------------------------------------------

def test_a_start_that_cannot_be_is_one_line_before_the_data_is_built(
        begin, exported, copied, finished, tmp_path, call, refused, monkeypatch):
    monkeypatch.setattr("train.build_data", lambda config: pytest.fail("builds data"))
    config, new = finished.with_suffix(".py"), "--run_dir=new"
    refused(begin(), "start_from: missing", "configs/continue.py --start_from=OLMo-1B-hf")
    refused(begin("--fresh_optimizer", config=config), "start_from: missing", "run.py --start")
    refused(begin("--start_from=allenai/OLMo-1B-hf"), "start_from=allenai/OLMo-1B-hf", tmp_path,
            "hf download allenai/OLMo-1B-hf", "name OLMo-1B-hf")
    refused(call(evaluation, "allenai/OLMo-1B-hf"), "hf download allenai/OLMo-1B-hf")
    refused(call(evaluation, "~/OUT"), "$HOME/OUT")
    refused(begin("--start_from=runs/tiny"), "name a run")
    refused(begin("--start_from=nowhere", new), "start_from=nowhere", tmp_path, "no such")
    refused(begin(f"--start_from={exported / 'config.json'}", new), "a file; name its directory")
    line = refused(begin(f"--start_from={copied}", new, config=config), "step000020",
                   "--fresh_optimizer")
    assert "no such" not in line
    refused(begin(f"--start_from={copied / 'step000011'}", new, config=config),
            f"no such step; {copied} has step000010, step000015")
    (tmp_path / "empty").mkdir()
    refused(begin("--start_from=empty", new), "start_from=empty", "no model here")
    damaged = shutil.copytree(exported, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"0" * 99)
    refused(begin("--start_from=damaged", new), "damaged/model.safetensors")
    other = shutil.copytree(exported, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"num_hidden_layers": 3}
    (other / "config.json").write_text(json.dumps(config))
    refused(begin("--start_from=other", new), "other: ", "missing model.layers.2")
    refused(begin(f"--start_from={exported}", f"--run_dir={exported}"), f"run_dir={exported}")
    for start in (copied, copied / "step000010"):
        refused(begin(f"--start_from={start}", f"--run_dir={copied}", "--overwrite"),
                f"would delete {start}")
    assert saved_steps(copied) == [10, 15, 20] and not (tmp_path / "new").exists()


# ---- On many ranks -------------------------------------------------------------------------------

@pytest.fixture
def sharded(exported, tmp_path):
    """A tied model in bfloat16, in four files with an index, as large ones lie on the hub."""
    import safetensors.torch as files
    config = load_model(exported).config
    settings = {**vars(config), "weight_tying": True}
    out = tmp_path / "sharded"
    save_hf(model.build_model(model.ModelConfig(**settings), seed=1), out,
            exported / "tokenizer.json")
    tensors = files.load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    where = {name: f"model-{i % 4 + 1}-of-4.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        files.save_file({name: tensor.bfloat16() for name, tensor in tensors.items()
                         if where[name] == file}, out / file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return out


def test_two_ranks_begin_as_one_does(begin, sharded, sources, tmp_path, one_thread):
    """Bar: within 2e-5. A file that one rank alone cannot read ends both, with its name."""
    words = [f"--start_from={sharded}", "--max_steps=3"]
    assert begin(*words, "--run_dir=one").returncode == 0
    words = [CONTINUE, *SMALL, f"--sources={ {'mine': sources['code']} }", *words]
    codes, text = forked_ranks(2, tmp_path / "log", train.main, *words, "--run_dir=two")
    assert codes == [0, 0], text
    one, two = tmp_path / "one", tmp_path / "two"
    assert columns(one, "batch_hash") == columns(two, "batch_hash")
    def numbers(run):
        nats = [row["sums"]["mine"]["nats"] for row in rows(run, "eval")]
        return [row[key] for row in rows(run) for key in ("loss", "grad_norm")] + nats
    assert numbers(two) == pytest.approx(numbers(one), rel=2e-5)
    weights = [load_model(run).state_dict() for run in (one, two)]
    assert all(difference(weights[1][name], weights[0][name]) < 2e-5 for name in weights[0])

    def break_rank_1():
        import os
        if os.environ["RANK"] == "1":
            support.models.fill_from_files = unreadable

    def unreadable(*_):
        raise UserError("model-2-of-4.safetensors: damaged")
    codes, text = forked_ranks(2, tmp_path / "log", train.main, *words, "--run_dir=new",
                               before=break_rank_1)
    assert set(codes) != {0} and len(re.findall("error: .*2-of-4.*damaged", text)) == 1, text
    assert not saved_steps(tmp_path / "new")
