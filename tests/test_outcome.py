"""What a run says at its end: before and after tuning, the next commands, odd choices."""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapt import AdaptConfig
from configs import load_config
from eval import EvalConfig
from scaling.log import say_evaluation
from support.outcome import print_next, say_if_untuned, tuning_table, without_blank_runs
from support.tuned import say_odd_choices
from train import SCHEMAS, TrainConfig

STDLIB = {"sources": {"code": {"path": "stdlib"}}}
OWN = {"sources": {"mine": "documents"}}
SFT = {"loss": 5.25, "loss_error": 0.03, "ended": 0.25}


@pytest.fixture
def run(tmp_path):
    """Makes a run directory with these settings, and rows of a log."""
    def make(settings, *rows, name="mine_sft"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"d_model": 256, **settings}))
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / "metrics.jsonl").write_text("".join(lines))
        return folder
    return make


def test_a_tuning_is_shown_before_and_after(run):
    def sums(nats):
        return {"code": {"nats": nats, "bytes": 100, "tokens": 30, "documents": 1}}
    first = {"kind": "eval", "step": 0, "sums": sums(100.0), "tuned": SFT}
    later = {**first, "step": 5, "sums": sums(110.0)}
    last = {"step": 9, "sums": sums(138.63), "tuned": {**SFT, "loss": 4.125, "ended": 1.0}}
    table = tuning_table(run({}, {"kind": "train", "step": 1}, first, later), last, "chats.jsonl")
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[:3] == ["held-out answers of chats.jsonl before after",
                        "nats per token 5.2500 +- 0.0300 4.1250 +- 0.0300",
                        "answers that end 25.0% 100.0%"]
    assert rows[3:5] == ["bits per byte of text before after", "code 1.4427 2.0000"]
    assert tuning_table(run({}, first, name="other"), {"sums": {}}, "") == ""


def test_held_out_answers_name_their_source(capsys):
    pairs = {"dpo_loss": 0.5, "accuracy": 0.4, "accuracy_error": 0.09, "reward_accuracy": 0.75,
             "reward_margin": 0.1}
    for tuned, said in ((SFT, "nats per token 5.2500 +- 0.0300, answers that end 25.0%"),
                        (pairs, "likelier 40.0% +- 9.0, reward accuracy 75.0%, reward margin")):
        say_evaluation(3, {"bits_per_byte": {}, "tasks": {}, "tuned": tuned}, "stdlib")
        printed = capsys.readouterr().out
        assert printed.startswith("step 3: held-out answers of stdlib: ") and said in printed


@pytest.mark.parametrize("settings, verbs, data", [
    (STDLIB, ["eval.py", "sample", "report", "_sft.py"], "stdlib"),
    (OWN, ["eval.py", "sample", "report", "_sft.py"], "chats.jsonl"),
    ({**OWN, "d_model": 2048}, ["eval.py", "sample", "report", "olmo_1b_sft.py"], "chats.jsonl"),
    ({**OWN, "method": "sft", "train_data": "stdlib"}, ["chat", "_dpo.py", "report"], "stdlib"),
    ({**STDLIB, "method": "sft", "train_data": "a.jsonl"}, ["chat", "_dpo.py", "report"],
     "preferences.jsonl"),
    ({**STDLIB, "method": "dpo", "train_data": "stdlib"}, ["chat", "report", "export"], ""),
])
def test_the_next_commands_follow_from_the_run(run, settings, verbs, data, capsys):
    """A tuning reads own chats after own text, and is one that adapt.py reads."""
    print_next(run(settings), "runs/x/step000005")
    [title, *commands] = capsys.readouterr().out.strip().splitlines()
    assert title == "next:" and len(commands) == len(verbs)
    assert all(verb in command for verb, command in zip(verbs, commands, strict=True))
    for command in commands:
        words = shlex.split(command)[2:]
        if words[0].startswith("configs/"):
            tuning, _, config = load_config(words, AdaptConfig, EvalConfig, TrainConfig,
                                            other=SCHEMAS)
            assert tuning.train_data == data and config.start_from == "runs/x/step000005"
            assert not Path(config.run_dir).exists()


def test_dpo_of_a_base_and_answers_of_another_set_are_warned_of(run, capsys):
    def said(method, home, **sets):
        base = SimpleNamespace(weights=home, home=home, model_config=SimpleNamespace(d_model=256))
        say_odd_choices(base, AdaptConfig(method=method, **sets))
        return capsys.readouterr().out
    base, tuned = run(STDLIB, name="base"), run({**STDLIB, "method": "sft"})
    own = dict(train_data="chats.jsonl", eval_data="held.jsonl")
    assert f"adapt.py configs/tiny_sft.py --start_from={base} --train_data=" in said(
        "dpo", base, **own)
    assert said("dpo", tuned, **own) == said("sft", base, **own) == ""
    assert "chats.jsonl" in said("sft", base, train_data="chats.jsonl", eval_data="stdlib")
    for sets in (dict(train_data="stdlib", eval_data="stdlib"), dict(train_data="chats.jsonl")):
        assert said("sft", base, **sets) == ""


def test_a_directory_from_elsewhere_is_tuned_too(tmp_path, capsys):
    say_if_untuned(tmp_path, tmp_path, d_model=4096)
    assert "configs/olmo_7b_sft.py --start_from=" in capsys.readouterr().out


def test_blank_lines_of_a_sample_are_counted():
    assert without_blank_runs("a\n\n\nb") == "a\n\n\nb"
    assert without_blank_runs("a" + 8 * "\n" + "b\n \nc") == "a\n[7 blank lines]\nb\n \nc"
