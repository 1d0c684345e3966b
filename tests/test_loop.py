"""What others expect of a loop: Weights & Biases, the best step, prompts, a log without a bar."""

import importlib.util

import pytest
from conftest import columns, rows

import train

WANDB = importlib.util.find_spec("wandb") is not None
needs_wandb = pytest.mark.skipif(not WANDB, reason="needs wandb")
pytestmark = pytest.mark.usefixtures("one_thread")


# ---- Weights & Biases ----------------------------------------------------------------------------

BLOCK, HEADER = 32768, 7  # of the log format that LevelDB and W&B share


def records_of(file):
    """Yields the bytes of each record in a .wandb file, as LevelDB's log format has them."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    place, record = HEADER, b""
    while place + HEADER <= len(content):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK
            continue
        length = int.from_bytes(content[place + 4:place + 6], "little")
        kind = content[place + 6]  # 1: whole; 2, 3, 4: first, middle and last part
        record += content[place + HEADER:place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):
            yield record
            record = b""


def offline_run(folder):
    """Returns (id, config, [{name: number}, ...]) of an offline run of W&B, in W&B's own schema."""
    import json
    from wandb.proto.wandb_internal_pb2 import Record
    [file] = folder.glob("run-*.wandb")
    name, config, history = None, {}, []
    for content in records_of(file):
        record = Record.FromString(content)
        if record.HasField("run"):
            name = record.run.run_id
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
        if record.HasField("history"):
            history.append({each.key or ".".join(each.nested_key): json.loads(each.value_json)
                            for each in record.history.item})
    return name, config, history


def offline_runs(run):
    return [offline_run(folder) for folder in sorted(run.glob("wandb/offline-run-*"))]


@pytest.fixture
def offline(monkeypatch):
    """W&B without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@needs_wandb
def test_wandb_gets_the_numbers_of_the_log(tmp_path, tiny_config, call, offline):
    """Also of steps that are taken again after a crash, in the same run at W&B."""
    run = tmp_path / "run"
    result = call(train, tiny_config(run, save_every_steps=10), "--wandb")
    assert result.returncode == 0 and f"wandb sync {run}/wandb/offline-run" in result.stdout
    [(name, config, history)] = offline_runs(run)
    assert config["lr"] == 3e-3 and config["run_dir"] == str(run) and "wandb" not in config
    logged = [(row["step"], row["train/loss"], row["train/lr"]) for row in history
              if "train/loss" in row]
    assert logged == columns(run, "step", "loss", "lr")
    evaluated = [(row["step"], row["eval/web"]) for row in history if "eval/web" in row]
    assert evaluated == [(row["step"], row["bits_per_byte"]["web"]) for row in rows(run, "eval")]
    assert all({"step", "tokens", "seconds"} <= row.keys() for row in history)
    for line in ("step", "*"):
        assert line.encode() in next(run.glob("wandb/offline*/*.wandb")).read_bytes()
