"""What holds for every command: printing fails nothing, Ctrl-C is quiet, and what the machine lacks
is said in one line. A toy command stands for all; then a run for the real ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, end_of, forked, joined, rows, saved_steps, wait_until

import data
import eval as e
import train
from scaling.signals import StopSignal
from support.bars import noted
from support.text import BOLD_GREEN, PLAIN, UserError, harmless

TOY = r"""
import sys
from support.command import UserError, run_main

def main(argv):
    for name in argv:
        print(f"{name}: caf\u00e9 \u65e5\u672c \udcff", flush=True)
        print(f"{name}: on stderr", file=sys.stderr)
    open("done", "w").close()

main.takes_ranks = __file__.endswith("run.py")
run_main(main)
"""


@pytest.fixture
def toy(tmp_path):
    """Runs a command that prints two lines with characters that no terminal has all of."""
    def run(shell, name="toy.py", **environment):
        (tmp_path / name).write_text(TOY)
        (tmp_path / "done").unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **environment}
        command = shell.replace("TOY", f"{sys.executable} {tmp_path / name} one two")
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment,
                              capture_output=True)
        assert (tmp_path / "done").exists(), done.stderr
        assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
        return done
    return run


# ---- Printing ------------------------------------------------------------------------------------

FOREIGN = "a\tb\n\x1b[2J\x1b]0;title\x07c\rd\x9be\x7f \u00e9"
SHOWN = "a\tb\n\\x1b[2J\\x1b]0;title\\x07c\\rd\\x9be\\x7f \u00e9"


@pytest.mark.parametrize("fails", [False, True])
def test_a_terminal_obeys_no_text_of_others(call, fails):
    """Documents, answers and file names, on stdout and in an error; our own colours and bars are
    left as they are."""
    def main(argv):
        if fails:
            raise UserError(FOREIGN)
        print(FOREIGN)
        print(f"{BOLD_GREEN}{FOREIGN}{PLAIN}")
        print(f"\r{FOREIGN[4:]}\x1b[A", file=sys.stderr)
    result = call(SimpleNamespace(__file__="data.py", main=main))
    assert harmless(FOREIGN) == SHOWN
    if fails:
        assert result.stderr == f"\nerror: {SHOWN}\n"
    else:
        assert result.stdout == f"{SHOWN}\n{BOLD_GREEN}{SHOWN}{PLAIN}\n"
        assert result.stderr == f"\r{SHOWN[4:]}\x1b[A\n".replace("\\r", "\r")


def test_the_text_of_a_document_is_shown_as_it_is_and_moves_no_cursor(tmp_path, tiny_config, call):
    rows = [json.dumps({"id": f"\x1b[3{n}m", "text": f"{n} \x1b[2J words \x9d of it " * 9}) + "\n"
            for n in range(60)]
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/part.jsonl").write_text("".join(rows))
    file = tiny_config(tmp_path / "run", sources={"evil": str(tmp_path / "evil")}, max_steps=1,
                       tokenizer="bpe:300", vocab_size=300, eos_token_id=299, pad_token_id=298,
                       data_dir=str(tmp_path / "data"), batch_size=2, eval_share=0.2)
    assert call(train, file).returncode == 0
    for words in ([data, "trace", tmp_path / "run"],
                  [data, "find", tmp_path / "run", "--text=words"],
                  [e, "sample", tmp_path / "run"]):
        result = call(*words)
        assert result.returncode == 0 and not set("\x1b\x9d") & set(result.stdout), result.stderr
        assert words[1] == "sample" or "\\x1b[3" in result.stdout


@pytest.mark.parametrize("encoding, printed", [
    ("utf-8", "caf\u00e9 \u65e5\u672c \\udcff".encode()),
    ("ascii", rb"caf\xe9 \u65e5\u672c \udcff"),
    ("latin-1", b"caf\xe9 \\u65e5\\u672c \\udcff")])
@pytest.mark.parametrize("errors", ["", ":strict"])
def test_what_a_terminal_lacks_is_printed_as_an_escape(toy, encoding, printed, errors):
    done = toy("TOY", PYTHONIOENCODING=encoding + errors)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == b"one: " + printed


@pytest.mark.parametrize("shell", ["TOY | true; exit ${PIPESTATUS[0]}", "TOY >&-", "TOY 2>&-",
                                   "TOY >&- 2>&-", "TOY 2> >(true)", "TOY 2>/dev/full"])
def test_a_reader_that_leaves_stops_nothing(toy, shell):
    assert toy(shell).returncode == 0


@pytest.mark.parametrize("name, code", [("toy.py", 1), ("run.py", 0)])
def test_a_full_disk_under_stdout_is_said_and_stops_nothing(toy, name, code):
    """A run has its files and is finished; of another command the table is lost: exit code 1."""
    done = toy("TOY > /dev/full", name)
    assert done.returncode == code
    assert done.stderr.count(b"No space left") == 1
    assert done.stderr.count(b"on stderr") == 2


def test_a_run_whose_output_goes_nowhere_is_finished(tmp_path, tiny_config):
    """With an ASCII terminal, a full disk under stdout, and a directory whose name is no UTF-8."""
    run = tmp_path / os.fsdecode(b"caf\xe9")
    config = tiny_config(tmp_path / "config", max_steps=4, eval_every_steps=2)
    data.main([str(config)])  # in a fork of a test no workers can be started
    log, out = tmp_path / "log", tmp_path / "out"

    def ends_well(place, main, *words):
        def print_to_it():
            sys.stdout = open(place, "w", encoding="ascii")
        return joined(forked(log, main, *words, before=print_to_it)) == 0
    assert ends_well("/dev/full", train.main, config, f"--run_dir={run}"), log.read_text()
    assert saved_steps(run) == [4] and len(rows(run)) == 4
    assert ends_well(out, e.main, run) and "web" in out.read_text(), log.read_text()
    assert "Traceback" not in log.read_text()


def test_what_is_no_text_is_one_line(copied, call, refused):
    """The shell gives bytes that are not UTF-8 as half a surrogate pair, which no tokenizer has."""
    refused(call(e, "sample", copied, f"--prompt={os.fsdecode(bytes([99, 233]))}"), r"c\udce9")


# ---- Ctrl-C --------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ["train", "data", "eval", "adapt", "model"])
def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path, start, module):
    """The import of torch, which takes seconds, is a file that says so and waits."""
    (tmp_path / "torch.py").write_text("import time\nopen('importing', 'w')\ntime.sleep(600)\n")
    (tmp_path / "numpy.py").write_text("import torch\n")
    with start(f"{module}.py", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}) as process:
        wait_until((tmp_path / "importing").exists, process)
        process.send_signal(signal.SIGINT)
        assert end_of(process) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("place", ["my_experiment.py", "tests", "tests/train.py"])
def test_ctrl_c_is_as_ever_for_others_who_import_us(tmp_path, place):
    """For a fork's script beside ours, and for python -c, wherever it is started."""
    house = shutil.copytree(ROOT / "support", tmp_path / "house" / "support").parent
    (house / "tests").mkdir()
    code = f"import sys; sys.path.insert(0, {str(house)!r})\nimport support.command, signal\n"
    code += "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    words = ["-c", code]
    if place.endswith(".py"):
        (house / place).write_text(code)
        words = [house / place]
    result = subprocess.run([sys.executable, *words], cwd=house / "tests", capture_output=True,
                            text=True)
    assert (result.stdout, result.stderr) == ("True\n", "")


def test_ctrl_c_that_python_can_only_ignore_comes_again(tmp_path):
    """In a callback of os.fork, where the workers of a data build start."""
    def start_workers(argv):
        def interrupted():
            if not (tmp_path / "once").exists():
                (tmp_path / "once").touch()
                raise KeyboardInterrupt
        os.register_at_fork(after_in_parent=interrupted)
        if os.fork() == 0:
            os._exit(0)
        time.sleep(3600)
    process = forked(tmp_path / "log", start_workers)
    assert joined(process) == 130
    assert (tmp_path / "log").read_text() == "stopped; to go on, run the same command again\n"


CHILD = """
import pathlib, time
pathlib.Path("started").touch()
while not pathlib.Path("go").exists():
    time.sleep(0.005)
pathlib.Path("finished").touch()
"""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM],
                                     [signal.SIGINT, signal.SIGINT]])
def test_a_signal_in_the_first_step_is_answered_and_not_heard_by_the_compiler(tmp_path, signals):
    """A terminal sends Ctrl-C to the compiler too; killed, it would leave a broken library. Python
    handles no signal while it waits for it: the answer must come all the same. A second signal
    ends the run, and the compiler ends by itself."""
    def first_step(argv):
        os.setpgid(0, 0)
        os.chdir(tmp_path)
        with StopSignal() as stop:
            subprocess.run([sys.executable, "-c", CHILD], check=True)
            print("ends by", stop.reason())
            second_acts = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        print("a second one acts:", second_acts)
    log = tmp_path / "log"
    process = forked(log, first_step)
    wait_until((tmp_path / "started").exists, process)
    os.killpg(process.pid, signals[0])
    wait_until(lambda: "stops after this step" in log.read_text(), process)
    for number in signals[1:]:
        os.killpg(process.pid, number)
        assert joined(process) == 128 + number
    (tmp_path / "go").touch()
    wait_until((tmp_path / "finished").exists)
    name = "Ctrl-C" if signals[0] == signal.SIGINT else "SIGTERM"  # a batch system has no keyboard
    assert f"a second {name} stops at once" in log.read_text()
    if len(signals) == 1:
        assert joined(process) == 0, log.read_text()
        assert f"ends by {int(signals[0])}" in log.read_text()
        assert "a second one acts: True" in log.read_text()


def test_whoever_imports_our_files_keeps_ctrl_c():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- torchrun ------------------------------------------------------------------------------------

def test_a_command_of_one_process_refuses_torchrun(call, refused, monkeypatch):
    """Several would write one file."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(call(data), "torchrun")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "torchrun" not in call(data).stderr


def test_ctrl_c_while_python_shuts_down_is_quiet(finished, start, tmp_path):
    """The work is done: the exit code stays 0, and torch's atexit functions print no traceback."""
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os, signal, time\n"
        "register = atexit.register\n"
        "def after_ours(function, *arguments, **options):\n"  # as torch registers its own
        "    atexit.register = register\n"
        "    register(function, *arguments, **options)\n"
        "    register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(9)))\n"
        "atexit.register = after_ours\n")
    with start("train.py", f"--resume={finished}", env={"PYTHONPATH": str(tmp_path)}) as process:
        code, stdout, stderr = end_of(process)
    assert code == 0 and "finished" in stdout and "Traceback" not in stderr, stderr


def test_a_command_ends_without_taking_torch_apart():
    """Else nothing is seen for 1 to 3 s. Other functions at exit are still called."""
    program = """if True:
        import atexit
        class Torch:
            def __del__(self): print("taken apart")
        torch = Torch()
        from support import interrupts
        interrupts.IS_COMMAND = True
        interrupts.end_fast()
        atexit.register(print, "cleaned up")
        interrupts.end_at_ctrl_c(3)"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert ended.returncode == 3 and ended.stdout == b"cleaned up\n"


def test_sigterm_clears_up_as_ctrl_c_does(tmp_path):
    """Exit code 143; a child that gets it too ends at once, and runs nothing of its parent's."""
    def main(argv):
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        _, status = os.wait()
        print("child", -os.waitstatus_to_exitcode(status))
        with noted("rows are kept"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    process = forked(tmp_path / "log", main)
    assert joined(process) == 128 + signal.SIGTERM
    assert (tmp_path / "log").read_text() == f"child {int(signal.SIGTERM)}\nrows are kept\n"


def test_sigterm_in_a_destructor_is_not_lost(tmp_path):
    """There Python only prints an exception: the signal comes again, and clears up all the same."""
    class Last:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    def main(argv):
        with noted("rows are kept"):
            Last()
            time.sleep(60)
    process = forked(tmp_path / "log", main)
    assert joined(process) == 128 + signal.SIGTERM
    assert (tmp_path / "log").read_text() == "rows are kept\n"
