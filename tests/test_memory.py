"""Out of memory: one line that says where it was, with an option that the same command takes."""

import errno
import os
import re
import resource
from types import SimpleNamespace

import pytest
import torch
from conftest import forked, joined, write_lines

import adapt
import data
import eval as e
import train
from scaling import ranks
from scaling.memory import where_and_remedies
from support import answers
from support.memory import Half, about_memory, is_lack_of_memory

CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80000000 bytes."
GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def fails(monkeypatch):
    """Lets a function of a module fail for lack of memory; `mend()` ends it."""
    def put(module, name, error=None):
        def fail(*_, **__):
            raise error or RuntimeError(CPU)
        monkeypatch.setattr(module, name, fail)
    put.mend = monkeypatch.undo
    return put


def option_in(line):
    """The one option that a line tells to try."""
    [option] = re.findall(r"try (--\w+=\w+)", line)
    return option


@pytest.mark.parametrize("error, lacks", [
    (RuntimeError(CPU), True), (torch.OutOfMemoryError(GPU), True), (MemoryError(), True),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), True), (RuntimeError("std::bad_alloc"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
    (RuntimeError("can't start new thread"), True),
    (RuntimeError("mat1 and mat2 shapes"), False), (OSError(errno.ENOSPC, "No space"), False),
    (KeyError("out of memory"), False)])
def test_the_errors_that_tell_of_a_lack_of_memory(error, lacks):
    assert is_lack_of_memory(error) == lacks


@pytest.mark.parametrize("half, share, words", [
    (Half("n", 16), 0.1, "--n=8"), (Half("n", 3), 0, "--n=1"), (Half("n", 1), 0, None),
    (Half("n", 300, 256), 0, "--n=256"), (Half("n", 256, 256), 0, None),
    (Half("n", 16), 3, "--n=4"), (Half("n", 16), 16, "--n=1"), (Half("n", 16), 17, None)])
def test_half_of_a_value_is_less_where_one_half_is_more_than_all_memory(half, share, words):
    assert half.words(share) == words


def test_more_memory_than_there_is_asks_for_a_smaller_model():
    for size, is_small in (("20.00 GiB", True), ("1.50 TiB", False)):
        error = torch.OutOfMemoryError(GPU.replace("2.00 GiB", size))
        line = about_memory(error, "at step 1", [Half("micro_batch_size", 2)])
        assert size in line and ("--micro_batch_size=1" in line) == is_small
        assert ("smaller model" in line) != is_small


@pytest.mark.parametrize("error", [RuntimeError(CPU), torch.OutOfMemoryError(GPU), MemoryError()])
def test_a_step_names_a_smaller_micro_batch(tmp_path, tiny_config, call, refused, fails, error):
    """And then recomputation: each option, typed as it is printed, is another start of the run."""
    config = tiny_config(tmp_path / "run", max_steps=1, batch_size=4)
    words = [config]
    for option in ("--micro_batch_size=2", "--micro_batch_size=1",
                   "--activation_checkpointing=one_in_two",
                   "--activation_checkpointing=fine_grained",
                   "--activation_checkpointing=whole_layer"):
        fails(train, "train_step", error)
        line = refused(call(train, *words), "out of memory at step 1, with ")
        assert option_in(line) == option
        words.append(option)
    refused(call(train, *words), "smaller model")
    fails.mend()
    result = call(train, *words)
    assert result.returncode == 0 and "1 sequences at a time" in result.stdout


def test_a_tuning_has_no_more_rows_than_examples():
    """A smaller number than that is what changes something."""
    config = SimpleNamespace(batch_size=6, micro_batch_size=0, activation_checkpointing="none",
                             reduce_every_micro_batch=False)
    run = SimpleNamespace(config=config, settings={"method": "sft"}, doing="", step=0,
                          model_config=SimpleNamespace(max_seq_len=256))
    where, [fewer_rows, _] = where_and_remedies(run)
    assert "with 6 x 256 tokens" in where
    assert fewer_rows.words(share=0).startswith("--micro_batch_size=3,")


def test_an_evaluation_names_fewer_tokens(tmp_path, finished, tiny_config, call, refused, fails):
    """In training and in eval.py; one sequence of the context length is the least."""
    config = tiny_config(tmp_path / "run", max_steps=1, eval_batch_tokens=64)
    fails(e, "evaluate_domains")
    line = refused(call(train, config), "evaluation after step 1")
    assert option_in(line) == "--eval_batch_tokens=32"
    assert option_in(refused(call(e, finished), "evaluation")) == "--eval_batch_tokens=1024"
    line = refused(call(e, finished, "--eval_batch_tokens=1"), "evaluation")
    assert option_in(line) == "--eval_dtype=bfloat16"
    fails.mend()
    assert call(e, finished, option_in(line)).returncode == 0


def test_answers_and_samples_name_their_options(finished, tmp_path, call, refused, fails):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    words = ["generate", finished, prompts, tmp_path / "out.jsonl"]
    fails(answers, "answers_of")
    assert option_in(refused(call(adapt, *words), "answer")) == "--answer_batch=4"
    line = refused(call(adapt, *words, "--answer_batch=1"), "answer")
    assert option_in(line) == "--max_new_tokens=256"
    fails(e, "sample_text")
    assert option_in(refused(call(e, "sample", finished), "sample")) == "--max_new_tokens=100"
    fails.mend()
    assert call(adapt, *words, "--answer_batch=1", option_in(line)).returncode == 0


def test_the_building_of_data_names_fewer_workers(tmp_path, tiny_config, call, refused, fails):
    config = tiny_config(tmp_path / "run")
    fails(data, "build_data", MemoryError())
    line = refused(call(data, config, "--workers=6"), "while the data was prepared")
    assert option_in(line) == "--workers=3"
    refused(call(data, config, "--workers=1"), "--bloom_items")


def test_where_no_option_is_known_the_command_has_a_line(call, refused, fails):
    fails(train, "load_config", MemoryError("Unable to allocate 7.3 GiB for an array"))
    refused(call(train, "configs/tiny.py"), "7.3 GiB", "smaller model", "torchrun")
    fails(train, "load_config", RuntimeError(CPU.replace("80000000", str(2**52))))
    refused(call(train, "configs/tiny.py"), f"{2**32:,} MiB", "less than that")


@pytest.mark.parametrize("is_told", [False, True])
def test_a_rank_that_has_lost_another_says_it_in_one_line(monkeypatch, capsys, is_told):
    """Or none, where the other one has told its own error. torchrun must name the other one, so
    this one waits before it ends.
    """
    waits = []

    def end(code):
        assert waits
        raise SystemExit(code)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks, "STORES", [SimpleNamespace(check=lambda keys: is_told)])
    monkeypatch.setattr(ranks.time, "sleep", waits.append)
    monkeypatch.setattr(ranks.os, "_exit", end)
    with pytest.raises(SystemExit, match="1"), ranks.named_loss():
        raise RuntimeError("[pair.cc:537] Read error [::1]:42675: Connection reset by peer")
    said = capsys.readouterr().err
    assert ("another rank has ended" in said and "exitcode -9" in said) != is_told
    with pytest.raises(RuntimeError, match="shapes"), ranks.named_loss():
        raise RuntimeError("shapes differ")


@pytest.mark.slow
@pytest.mark.usefixtures("finished")  # whose data is built
def test_a_real_lack_of_memory(tmp_path, tiny_config):
    """In a child that may take 200 MB more than it has."""
    def limit():
        pages = int(open("/proc/self/statm").read().split()[0])
        most = pages * resource.getpagesize() + 200 * 10**6
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs Linux")
    config = tiny_config(tmp_path / "run", max_steps=1, batch_size=128, d_model=256, n_heads=4,
                         mlp_hidden_size=1024, n_layers=4, compile="false")
    log = tmp_path / "log"
    assert joined(forked(log, train.main, config, before=limit)) == 1, log.read_text()
    assert "out of memory at step 1" in log.read_text()
    assert option_in(log.read_text()) == "--micro_batch_size=64"
