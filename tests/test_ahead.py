"""The start: what a first run compiles beside the building of its data, and what is imported."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT

from model import ModelConfig, OLMo
from scaling import ahead
from scaling.ahead import beside, compile_beside
from scaling.compiler import compile_model

CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks safely")


def is_gone(pid):
    """Whether a process has ended, or is about to, within ten seconds."""
    for _ in range(1000):
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True  # ended, and nobody asks for its exit code
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def compiling_for_ever(folder):
    """A compiler of its own, and a line that the user must not see."""
    print("noise", file=sys.stderr, flush=True)
    compiler = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "aside").write_text(f"{os.getpid()} {compiler.pid}")
    (folder / "aside").rename(folder / "pids")
    time.sleep(600)


@linux
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_no_child_is_left(tmp_path, capfd, error):
    """After the build, an error in it or a Ctrl-C the child and its compiler are ended."""
    try:
        with beside(partial(compiling_for_ever, tmp_path)):
            while not (tmp_path / "pids").exists():
                time.sleep(0.01)
            if error:
                raise error
    except (KeyboardInterrupt, ValueError) as raised:
        assert type(raised) is error
    child, compiler = map(int, (tmp_path / "pids").read_text().split())
    assert is_gone(child) and is_gone(compiler)
    assert capfd.readouterr() == ("", "")


@linux
def test_a_child_that_does_not_end_is_killed(monkeypatch):
    """As one that waits for a lock of the memory that it was forked with."""
    monkeypatch.setattr(ahead, "END_S", 0.2)

    def hang():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(pipe[1], b".")
        time.sleep(30)
    pipe = os.pipe()
    with beside(hang) as child:
        os.read(pipe[0], 1)
    assert child.exitcode == -signal.SIGKILL


@linux
def test_a_child_that_was_killed_leaves_no_compiler(tmp_path):
    with beside(partial(compiling_for_ever, tmp_path)) as child:
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        child.kill()  # as the system does when memory runs out
        child.join()
    assert is_gone(int((tmp_path / "pids").read_text().split()[1]))


@linux
def test_a_start_does_not_wait_for_a_child_that_hangs(tmp_path, monkeypatch):
    def hang(*shape):
        time.sleep(20)
        (tmp_path / "waited for").touch()
    monkeypatch.setattr(ahead, "PATIENCE_S", 0.2)
    monkeypatch.setattr(ahead, "compile_step", hang)
    monkeypatch.setattr(ahead, "Stages", lambda config: Built(False))
    build = compile_beside(str, ModelConfig(), None, CPU, torch.float32, compiled=True)
    assert build("folder") == "folder" and not (tmp_path / "waited for").exists()


@linux
def test_a_child_that_fails_is_silent(capfd):
    def fail():
        raise RuntimeError("the compiler failed")
    with beside(fail) as child:
        child.join()
    assert child.exitcode == 1 and capfd.readouterr() == ("", "")


class Built:
    """In place of Stages: data that is there, or is to be built."""

    def __init__(self, is_done):
        self.are_done = lambda: is_done


@linux
@pytest.mark.parametrize("compiled, is_done, compiles", [
    (True, False, True), (True, True, False), (False, False, False)])
def test_it_compiles_beside_a_build_alone(tmp_path, monkeypatch, compiled, is_done, compiles):
    def compile_step(*shape):
        (tmp_path / "compiled").touch()
    monkeypatch.setattr(ahead, "compile_step", compile_step)
    monkeypatch.setattr(ahead, "Stages", lambda config: Built(is_done))
    build = compile_beside(str, ModelConfig(), None, CPU, torch.float32, compiled)
    assert build("folder") == "folder"
    assert (tmp_path / "compiled").exists() == compiles


def test_all_blocks_are_traced_once(monkeypatch):
    """12 blocks, more than the 8 versions of a function that torch keeps, and the head."""
    from torch._dynamo.testing import CompileCounter
    counter = CompileCounter()
    compiler = partial(torch.compile, backend=counter)
    monkeypatch.setattr(torch, "compile", compiler)
    model = OLMo(ModelConfig(d_model=8, n_layers=12, n_heads=2, mlp_hidden_size=8, max_seq_len=8,
                             vocab_size=16, embedding_size=16, eos_token_id=1, pad_token_id=0))
    compile_model(model, CPU, is_asked=True)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    for _ in range(2):
        model(tokens, targets=tokens).sum().backward()
    assert counter.frame_count == 2


def test_what_a_start_does_not_need_is_not_imported():
    """The compiler takes two seconds; a run that does not compile never needs it."""
    code = ("import sys, adapt, model, torch\n"
            "model.count_parameters(model.ModelConfig())\n"
            "print([name for name in sys.modules if name.startswith(('torch._dynamo.',"
            " 'torch._inductor.', 'matplotlib', 'pyarrow', 'transformers', 'safetensors',"
            " 'tensorboard', 'wandb'))])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
