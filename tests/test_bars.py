"""How far a long piece of work has come: bars on a terminal, lines elsewhere."""

import re
import sys
import threading

import pytest
import torch

import data
import train
from scaling.compiler import say_when_compiling
from support import bars, interrupts, progress
from support.text import UserError
from tests.conftest import write_jsonl


def test_no_bar_is_drawn_into_a_file(tmp_path, call):
    """docs/scale.md: `grep ^error:` finds the reason, so that no CR may stand before it."""
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": "x"}])
    (tmp_path / "in" / "b.json").write_text('[{"text": "a"},\n{"text": "b"}')
    result = call(data, f"--data_dir={tmp_path / 'built'}", "--tokenizer=bpe:284", "--workers=1",
                  f"--sources={ {'main': str(tmp_path / 'in')} }")
    assert result.returncode == 1 and result.stderr.startswith("\nerror: ")  # \n: of the fixture
    assert "\r" not in result.stderr


def test_each_bar_is_a_line_now_and_then_in_a_file(tmp_path, call, monkeypatch):
    monkeypatch.setattr(bars, "SECONDS", 0)
    monkeypatch.setattr(bars, "FIRST_S", 0)
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"the dog and dog number {i}"} for i in range(9)])
    result = call(data, f"--data_dir={tmp_path / 'built'}", "--tokenizer=bpe:290", "--workers=1",
                  f"--sources={ {'main': str(tmp_path / 'a.jsonl')} }", "--eval_share=0")
    assert result.returncode == 0 and "\r" not in result.stderr
    for line in (f"hashing {tmp_path / 'a.jsonl'}: 0 of 0 MB, 0 s", "cleaning main: 0 of 0 MB, 0 s",
                 "learning merges: 1 of ", "tokenising main: 1 of 1 blocks, 0 s"):
        assert line in result.stderr, result.stderr


def test_a_bar_that_an_error_left_is_ended_before_its_line(call, monkeypatch, capsys):
    """One that still lives where the error is printed would stand before it on its line."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    left = []

    def main(_):
        left.append(bars.bar(None, "cleaning", 9))
        raise UserError("a: is wrong; mend it")

    from types import SimpleNamespace
    result = call(SimpleNamespace(__file__="data.py", main=main))
    assert "cleaning" in result.stderr
    assert result.stderr.rpartition("\r")[2] == "\nerror: a: is wrong; mend it\n"
    assert left[0].disable  # as tqdm says that it is closed


def test_a_hidden_bar_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bars, "FIRST_S", 0)
    with bars.bar(None, "x", 3, hidden=True) as shown:
        shown.update(2)
    assert list(bars.bar([1, 2], "x", hidden=True)) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])  # the second of SIGTERM
def test_a_signal_while_the_data_is_prepared_says_what_is_kept(stop):
    def build(config):
        raise stop
    with pytest.raises(stop) as raised:
        bars.prepared(build, data.DataConfig())
    assert "the same command continues" in raised.value.__notes__[0]


def test_each_stage_is_named_before_it_ends(monkeypatch, capsys):
    """Where there is no terminal: a line at its begin, without a CR; none from other ranks."""
    monkeypatch.setattr(bars, "FIRST_S", 0)
    with bars.stage("saving"):
        assert capsys.readouterr().err == "saving\n"
    assert bars.staged("adding", max, 2, 3) == 3
    assert capsys.readouterr().err == "adding\n"
    monkeypatch.setattr(bars, "is_silent", lambda: True)
    with bars.stage("saving"):
        assert capsys.readouterr().err == ""


@pytest.fixture
def no_thread(monkeypatch):
    """A stage shows itself at its begin, and then only when the test calls show()."""
    monkeypatch.setattr(bars, "FIRST_S", 0)
    monkeypatch.setattr(bars.Stage, "keep_showing", lambda self, ended: None)


def test_a_stage_has_a_line_on_a_terminal_which_is_gone_at_its_end(no_thread, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bars.stage("saving"):
        assert re.search(r"saving, \d+ s", capsys.readouterr().err)
        bars.hide_bars()  # as before a line on stdout
        assert capsys.readouterr().err.split("\r")[-1].strip() == ""
    assert not list(bars.tqdm._instances)


def showing_threads():
    """How many threads show a stage; tqdm has one of its own."""
    names = [thread.name for thread in threading.enumerate()]
    return sum("keep_showing" in name for name in names)


def test_a_stage_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(bars, "FIRST_S", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with pytest.raises(UserError), bars.stage("saving"):
        assert showing_threads() == 1
        raise UserError("the disk is full; free some space")
    assert not list(bars.tqdm._instances) and showing_threads() == 0


def test_of_stages_inside_each_other_the_innermost_is_seen(no_thread, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with bars.stage("outer"):
        outer = bars.Stage.lasting[-1]
        assert outer.bar is not None
        with bars.stage("inner"):
            capsys.readouterr()
            outer.show()  # as its thread does each second
            assert outer.bar is None and "outer" not in capsys.readouterr().err
        outer.show()
        assert re.search(r"outer, \d+ s", capsys.readouterr().err)


def test_bars_are_listed_while_nobody_adds_one(monkeypatch):
    """The thread of a stage may add its bar while another thread prints."""
    bars.take_lock()
    is_held = []

    class Bars(list):
        def __iter__(self):
            is_held.append(bars.tqdm.get_lock()._is_owned())
            return super().__iter__()
    monkeypatch.setattr(bars.tqdm, "_instances", Bars([bars.bar([], "x", hidden=True)]))
    bars.hide_bars()
    bars.end_bars()
    assert is_held == [True, True]


def test_ctrl_c_before_a_fork_leaves_a_lock_to_release(monkeypatch):
    """Otherwise the release after the fork is an error, and the child may inherit a locked lock."""
    class Lock:
        interrupts = 1
        depth = 0

        def acquire(self):
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            self.depth += 1

        def _is_owned(self):
            return self.depth > 0

    lock = Lock()
    with pytest.raises(KeyboardInterrupt):
        bars.hold(lock)
    assert lock.depth == 1
    bars.hold(lock)
    assert lock.depth == 2


def test_the_lines_of_many_tasks_are_as_far_apart_as_those_of_one(monkeypatch, capsys):
    monkeypatch.setattr(bars, "FIRST_S", 0)
    monkeypatch.setattr(bars, "SECONDS", 600)
    for _ in range(2):  # two suites
        for _ in progress.titled([("one",), ("two",), ("three",)]):
            assert list(progress.watched([1, 2], "question")) == [1, 2]
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("evaluating one: question 1 of 2")


def test_a_terminal_shows_a_word_while_torch_is_imported(monkeypatch, capsys):
    """Rank 0's terminal alone; run_main clears it."""
    monkeypatch.setattr(interrupts, "IS_COMMAND", True)
    for is_terminal, rank, printed in ((True, "0", "starting ...\r\033[K"), (True, "1", ""),
                                       (False, "0", "")):
        monkeypatch.setattr("sys.stderr.isatty", lambda shown=is_terminal: shown, raising=False)
        monkeypatch.setenv("RANK", rank)
        interrupts.say_starting()
        interrupts.clear_starting()
        assert capsys.readouterr().err == printed


def test_what_a_training_does_is_said_in_order(tmp_path, tiny_config, call, monkeypatch):
    """From nothing, then once more to a later step: each stage before the next begins."""
    monkeypatch.setattr(bars, "FIRST_S", 0)
    file = tiny_config(tmp_path / "run", max_steps=2)
    in_order = ["preparing the data", "cleaning", "tokenising", "reading the evaluation sets",
                "looking for a checkpoint", "preparing the model", "drawing the weights",
                "saving step 2"]
    assert_in_order(call(train, file, f"--data_dir={tmp_path / 'data'}"), in_order)
    in_order = ["looking for a checkpoint", f"checking {tmp_path}", f"loading {tmp_path}",
                "saving step 3"]
    assert_in_order(call(train, file, f"--data_dir={tmp_path / 'data'}", "--max_steps=3"), in_order)


def test_compiling_is_a_stage(monkeypatch, capsys):
    """Also of what is compiled later, such as another shape in adapt.py."""
    monkeypatch.setattr(bars, "FIRST_S", 0)
    say_when_compiling()
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    line = "compiling the network\n"
    for shape, expected in ((1, line), (1, ""), (2, line)):
        double(torch.ones(shape))
        assert capsys.readouterr().err == expected


def assert_in_order(result, texts):
    """All of them begin a line of stderr, the first line of each after that of the one before."""
    assert result.returncode == 0 and "\r" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    places = []
    for text in texts:
        places.append(next(i for i, line in enumerate(lines) if line.startswith(text)))
    assert places == sorted(places), lines
