"""How far a long piece of work has come: bars on a terminal, lines elsewhere."""

import sys

import data
from support import bars
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
    monkeypatch.setattr(bars, "SECONDS", 0)
    with bars.bar(None, "x", 3, hidden=True) as shown:
        shown.update(2)
    assert list(bars.bar([1, 2], "x", hidden=True)) == [1, 2]
    assert capsys.readouterr().err == ""
