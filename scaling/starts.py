"""RUN/starts.jsonl: a row for each start of a run: its command, its machine, what auto became."""

import platform
import re
import shlex
import sys
import time

import torch

from scaling.machine import choose_dtype, cpu_flags
from scaling.ranks import agree_on_compile, code_version, on_rank0, world_size
from support.files import UserError, disk_remedy, to_json


def note_start(path, step, config, device):
    """Append a row; all ranks call this, and rank 0 writes. step: from which the run goes on.

    The command is that of the process, also where a program of its own calls train.main. `compiled`
    is what auto chose; a compiler that then fails is switched off (scaling/compiler.py).
    """
    compiled, _ = agree_on_compile(config, device)
    dtype = choose_dtype(config.dtype, device)
    row = {"kind": "start", "step": step,
           "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
           "command": shlex.join(["python", *sys.argv]),
           "machine": machine_name(device),
           "ranks": world_size(),
           "threads": torch.get_num_threads(),
           "device": device.type,
           "dtype": str(dtype).removeprefix("torch."),
           "compiled": compiled,
           "python": sys.version.split()[0],
           "torch": torch.__version__,
           "code": code_version()}
    on_rank0(append_row, path / "starts.jsonl", row)


def append_row(file, row):
    """Append a row, {key: value}, to a file of JSON lines, on a line of its own.

    A crash may have torn the last line. The row must not become a part of it, and be lost too.
    """
    try:
        rows = file.read_bytes() if file.is_file() else b""
        with open(file, "a") as log:
            log.write("\n" * (rows[-1:] not in (b"", b"\n")) + to_json(row) + "\n")
    except OSError as error:
        raise UserError(f"{file}: could not be written ({error}); {disk_remedy(error)}") from None


def machine_name(device):
    """The name of the GPU, or of the CPU where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*: (.+)$", cpu_flags(), re.M)
    return found[1].strip() if found else platform.machine()
