"""Compiled blocks, and what happens where the compiler fails: eager blocks, or one line of error.

A compiler can be there and fail all the same: it lacks headers, its cache cannot be written, or a
library in the cache was cut off when its compiler was killed.
"""

import fcntl
import re
import struct
import sys
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import torch
import torch._functorch.config as functorch_config

from model import token_losses
from scaling.machine import compiler_cache
from scaling.ranks import launched
from support.bars import stage
from support.cpu import PLAIN_AT_MOST, fast_token_losses
from support.files import UserError


UNFINISHED = "compiled code that a stopped run left unfinished is compiled again"


def compile_model(model, device, is_asked):
    """Compile each block, and the head with its loss.

    is_asked: compile=true. If the compiler fails, that is then a UserError; with compile=auto the
    model runs eagerly, and one line says why.

    # subtle: the embedding is not compiled. Its compiled gradient adds atomically, in any order,
    # and a resumed run could not be bit-exact. For the same reason each length has a kernel of its
    # own (dynamic=False): one for all lengths would depend on which lengths came before.
    """
    # Compile the backward together with the forward: there its failure is caught, in the middle of
    # the backward it could not be.
    functorch_config.force_non_lazy_backward_lowering = True
    # Find the graphs of support/cpu.py's own gradients in the cache too: a later start takes 2 s
    # less. The key holds their code, so that an edited backward is compiled again.
    if hasattr(functorch_config, "autograd_cache_allow_custom_autograd_functions"):
        functorch_config.autograd_cache_allow_custom_autograd_functions = True
    # Tuning compiles each number of packed rows; by default torch would give up after 8 shapes.
    torch._dynamo.config.recompile_limit = 64
    if device.type == "cpu":
        # Recompute elementwise work inside the backward's kernels: 0.7 to 0.8 times the memory at
        # the same speed (python -m tests.bench cpu). Not for long sequences, where SDPA would be
        # recomputed too. This setting is global to the process.
        short = model.config.max_seq_len <= PLAIN_AT_MOST
        functorch_config.aggressive_recomputation = short
        # The CPU's own flags say which vectors it has. Without this, each start also loads a trial
        # library for each kind of vector, which takes 1.2 s, and the first start compiles it, 5 s.
        # subtle: TORCHINDUCTOR_VEC_ISA_OK, set here, would be too late: torch has read it by now
        if torch._inductor.config.cpp.vec_isa_ok is None:
            torch._inductor.config.cpp.vec_isa_ok = True
    remove_broken_libraries(compiler_cache())
    say_when_compiling()
    compiler = Compiler(is_asked)
    for block in model.blocks:
        block.forward = compiler.compiled(block.forward)
    losses = fast_token_losses if device.type == "cpu" else token_losses
    model.token_losses = compiler.compiled(losses)


@lru_cache
def say_when_compiling():
    """From here on, each time torch compiles something, it is a stage of support/bars.py."""
    stages = ExitStack()
    torch._dynamo.callback.callback_handler.register_start_callback(
        lambda *_: stages.enter_context(stage("compiling the network")))
    torch._dynamo.callback.callback_handler.register_end_callback(lambda *_: stages.close())


class Compiler:
    """Compiles the functions of one model; when it fails at one, it is switched off for all."""

    def __init__(self, is_asked):
        self.is_asked = is_asked
        self.is_off = False
        self.rebuilt = set()  # libraries of the cache that were broken

    def compiled(self, function):
        """torch.compile(function), which is `function` itself once the compiler is off."""
        fast = torch.compile(function, dynamic=False)

        def run(*args, **kwargs):
            while not self.is_off:
                try:
                    return fast(*args, **kwargs)
                except Exception as error:
                    if not is_of_compiler(error):
                        raise
                    self.fail(error)
            return function(*args, **kwargs)
        return run

    def fail(self, error):
        """Mend what may be to blame, so that it is compiled again; else give up.

        That is a broken library in the cache, or vectors that g++ does not know.
        """
        library = broken_library(str(error))
        if library and library not in self.rebuilt:
            self.rebuilt.add(library)
            library.unlink()
            say(f"{UNFINISHED} ({library})")
            return
        reason = reason_of(str(error))
        settings = torch._inductor.config.cpp
        if "-mavx512" in reason and settings.simdlen is None:
            settings.simdlen = 256  # bits: AVX2; this g++ is older than the CPU
            say("the compiler lacks AVX-512: compiled for AVX2")
            return
        if self.is_asked:
            raise UserError(f"compile=true: the compiler failed ({reason}); --compile=auto goes on "
                            f"without; or delete its cache, {compiler_cache()}") from None
        self.is_off = True
        say(f"compile=auto: the compiler failed ({reason}); the model is not compiled. If a file "
            f"of its cache is broken, delete {compiler_cache()}")


def say(line):
    """Print a line once per node: its ranks share one machine and one cache."""
    if launched().local_rank == 0:
        print(line, file=sys.stderr, flush=True)


def remove_broken_libraries(cache):
    """Delete the libraries in torch's cache that are cut off, so that they are built again.

    A compiler that was killed leaves them. To load one that is empty is an error; one that has
    lost its end kills the process (SIGBUS).
    """
    removed = []
    for library in cache.glob("*/*.so"):
        if not is_whole(library):
            (cache / "locks").mkdir(exist_ok=True)
            with open(cache / "locks" / f"{library.name.split('.')[0]}.lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # torch holds it to build it
                except BlockingIOError:
                    continue  # another process builds it just now
                library.unlink(missing_ok=True)
                removed.append(library)
    if removed:
        others = f", and {len(removed) - 1:,} more" * (len(removed) > 1)
        say(f"{UNFINISHED} ({removed[0]}{others})")


def is_whole(library):
    """Whether a library has all bytes that its header promises; a linker writes its table last."""
    with open(library, "rb") as file:
        header = file.read(64)
    if len(header) < 64:
        return False
    if header[:5] != b"\x7fELF\x02":
        return True  # not of Linux, or not of 64 bits: left to the loader
    table = struct.unpack_from("<Q", header, 40)[0]
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return 0 < table and table + entry_size * entries <= library.stat().st_size


def is_of_compiler(error):
    """True for an error in compiling, and not in what is computed."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


def broken_library(text):
    """The Path of the library in torch's cache that could not be loaded, or None."""
    match = re.search(r"(/\S+\.so): (file too short|invalid ELF|cannot read|undefined)", text)
    library = Path(match[1]) if match else None
    return library if library and library.is_file() else None


def reason_of(text):
    """One line about why the compiler failed: the first that it printed, else torch's first."""
    printed = text.partition("\nOutput:\n")[2] or text
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it gave no reason"])[0][:300]
