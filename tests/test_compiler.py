"""Where the compiler is there and fails: compile=auto trains without it, compile=true says why."""

import _ctypes
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, columns, refusal

import train
from model import ModelConfig, OLMo
from scaling import machine
from scaling.compiler import (broken_library, compile_model, reason_of,
                              remove_broken_libraries)
from scaling.machine import can_compile, choose_compile

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def failing(monkeypatch):
    """Puts a compiler that raises this error in place of torch's; returns how often it was called.

    The import of torch's takes seconds and changes nothing here.
    """
    import torch._dynamo.exc

    def put(error, at=1):
        calls = []

        def compile(function, dynamic):
            def run(*args, **kwargs):
                calls.append(1)
                if len(calls) >= at:
                    raise error
                return function(*args, **kwargs)
            return run
        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(machine, "can_compile", lambda: True)
        return calls
    return put


def compile_error(text):
    return torch._dynamo.exc.InternalTorchDynamoError(text)


GXX = """C++ compile error

Command:
g++ a.cpp -o a.so

Output:
In file included from a.cpp:1:
a.cpp:1:10: fatal error: Python.h: No such file or directory
compilation terminated."""


@pytest.mark.parametrize("at", [1, 3])
def test_auto_goes_on_without_a_compiler_that_fails(tmp_path, tiny_config, finished, call, failing,
                                                    at):
    """At the first block or at the head: one line names the compiler's own, and losses are those of
    a run that never compiled."""
    calls = failing(compile_error(GXX), at)
    run = tmp_path / "run"
    result = call(train, tiny_config(run, compile="auto", max_steps=3, decay_steps=20))
    assert result.returncode == 0 and len(calls) == at
    [line] = [line for line in result.stderr.splitlines() if "compile=auto" in line]
    assert "fatal error: Python.h" in line and "not compiled" in line
    assert columns(run, "loss") == columns(finished, "loss")[:3]


def test_a_compiler_without_avx512_compiles_for_avx2(monkeypatch, capsys):
    """Torch takes the CPU's flags for what g++ knows, and g++ may be older than the CPU."""
    model = OLMo(ModelConfig(d_model=8, n_layers=1, n_heads=2, mlp_hidden_size=8, max_seq_len=8,
                             vocab_size=16, embedding_size=16, eos_token_id=1, pad_token_id=0))
    settings = torch._inductor.config.cpp
    seen = []

    def compile(function, dynamic):
        def run(*args, **kwargs):
            seen.append((settings.vec_isa_ok, settings.simdlen))
            if settings.simdlen is None:
                raise compile_error("\nOutput:\ng++: error: unrecognized option '-mavx512f'")
            return function(*args, **kwargs)
        return run
    monkeypatch.setattr(torch, "compile", compile)
    with torch._inductor.config.patch({"cpp.simdlen": None, "cpp.vec_isa_ok": None}):
        compile_model(model, CPU, is_asked=True)
        model(torch.zeros(1, 8, dtype=torch.int64), targets=torch.zeros(1, 8, dtype=torch.int64))
    assert seen == [(True, None), (True, 256), (True, 256)]
    assert capsys.readouterr().err == "the compiler lacks AVX-512: compiled for AVX2\n"


def test_true_is_one_line(tmp_path, tiny_config, call, refused, failing):
    failing(compile_error(GXX))
    refused(call(train, tiny_config(tmp_path / "run", compile="true")), "compile=true",
            "fatal error: Python.h", "--compile=auto", str(machine.compiler_cache()))


def test_an_error_that_is_not_the_compilers_is_not_hidden(tmp_path, tiny_config, call, refused,
                                                          failing):
    failing(MemoryError("Unable to allocate 9.0 GiB"))
    refused(call(train, tiny_config(tmp_path / "run", compile="auto")), "out of memory", "9.0 GiB")


@pytest.mark.parametrize("name, fails", [("auto", False), ("false", False), ("true", True)])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, name, fails):
    """torch makes the directory even where it compiles nothing; an eager run must start too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
    if fails:
        assert str(tmp_path / "file") in refusal(choose_compile, name, CPU)
    else:
        compiled, why = choose_compile(name, CPU)
        assert not compiled and (name == "false" or str(tmp_path / "file") in why)
        assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir()


def test_the_compiler_is_the_one_that_torch_takes(monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "which", asked.append)
    for name in ("clang++-15", ""):
        monkeypatch.setenv("CXX", name)
        can_compile()
    assert asked == ["clang++-15", "clang++" if sys.platform == "darwin" else "g++"]


# ---- Broken libraries ----------------------------------------------------------------------------

@pytest.fixture
def cache(tmp_path):
    """A cache of torch's form with four libraries: whole, empty, cut off, and being built."""
    (tmp_path / "ab").mkdir()
    content = Path(_ctypes.__file__).read_bytes()
    for name, part in {"whole.main": content, "empty.main": b"", "cut": content[:-1],
                       "built": content[:99]}.items():
        (tmp_path / "ab" / f"{name}.so").write_bytes(part)
    return tmp_path


def test_broken_libraries_are_removed_before_they_are_loaded(cache, capsys):
    """A library that has lost its end would kill the process; one that is being built stays."""
    (cache / "locks").mkdir()
    with open(cache / "locks" / "built.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        remove_broken_libraries(cache)
        left = {file.name for file in (cache / "ab").iterdir()}
        assert left == {"whole.main.so", "built.so"}
    printed = capsys.readouterr().err
    assert str(cache / "ab") in printed and "1 more" in printed
    remove_broken_libraries(cache)
    assert [file.name for file in (cache / "ab").iterdir()] == ["whole.main.so"]
    remove_broken_libraries(cache / "not there")


def test_a_library_that_cannot_be_loaded_is_built_again_once(cache, tmp_path, tiny_config, call,
                                                             failing):
    """If it is broken again, the compiler is to blame."""
    library = cache / "ab" / "empty.main.so"
    calls = failing(compile_error(f"OSError: {library}: file too short"))
    result = call(train, tiny_config(tmp_path / "run", compile="auto", max_steps=1))
    assert result.returncode == 0 and not library.exists()
    assert len(calls) == 2 and result.stderr.count("compiled again") == 1
    assert "not compiled" in result.stderr


@pytest.mark.parametrize("text, name", [
    ("ImportError: {}: invalid ELF header", "cut.so"), ("no such file", None),
    ("error: /nowhere/a.so: file too short", None)])
def test_the_broken_library_is_found_in_the_error(cache, text, name):
    found = broken_library(text.format(cache / "ab" / "cut.so"))
    assert (found and found.name) == name


@pytest.mark.parametrize("text, reason", [
    (GXX, "a.cpp:1:10: fatal error: Python.h: No such file or directory"),
    ("CppCompileError\n\nOutput:\nkilled\n", "killed"), ("one\ntwo", "one"),
    ("", "it gave no reason")])
def test_the_reason_is_the_compilers_first_error(text, reason):
    assert reason_of(text) == reason


# ---- The real one --------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("compile", ["auto", "true"])
def test_a_real_compiler_that_fails(tmp_path, tiny_config, refused, compile):
    gxx = tmp_path / "g++"
    gxx.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo g++ 12.2 && exit\n"
                   "echo 'error: no licence' >&2\nexit 1\n")
    gxx.chmod(0o755)
    env = {**os.environ, "CXX": str(gxx), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    file = tiny_config(tmp_path / "run", compile=compile, max_steps=2)
    done = subprocess.run([sys.executable, ROOT / "train.py", file], env=env, capture_output=True,
                          text=True)
    if compile == "true":
        refused(done, "no licence")
    else:
        assert done.returncode == 0 and done.stderr.count("no licence") == 1, done.stderr


@pytest.mark.slow
def test_a_real_cache_with_broken_libraries(tmp_path, tiny_config):
    if not can_compile():
        pytest.skip("needs a C++ compiler")
    cache = tmp_path / "cache"
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    losses = []
    for name in ("first", "second"):
        file = tiny_config(tmp_path / name, compile="true", max_steps=2)
        done = subprocess.run([sys.executable, ROOT / "train.py", file], env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append(columns(tmp_path / name, "loss"))
        for i, library in enumerate(sorted(cache.glob("*/*.so"))):
            if i % 3:
                library.write_bytes(library.read_bytes()[:5000 * (i % 3 - 1)])
    assert losses[0] == losses[1] and ", and " in done.stderr
