"""RUN/starts.jsonl: a row for each start of a run: its command, its machine, what auto became."""

import platform
import re
import shlex
import sys
import time

import torch

from corpus.documents import print_line
from scaling.checkpoint import step_directories, step_of
from scaling.code_files import code_version, main_files
from scaling.machine import choose_dtype, cpu_flags
from scaling.ranks import agree_on_compile, on_rank0, world_size
from support.files import UserError, disk_remedy, log_rows, to_json


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
           "code": code_version(),
           "files": main_files()}
    on_rank0(note_row, path, row)


def note_row(path, row):
    """Append the row of a start; print which main files have changed since the last saved step."""
    changed = changed_files(path)
    if changed:
        print(f"the code has changed since the run's last saved step: {', '.join(changed)}")
    append_row(path / "starts.jsonl", row)


def noted_files(run):
    """The main_files of the newest start from which a step was saved; {} if it noted none."""
    starts = list(log_rows(run, "starts.jsonl"))
    newest_step = max(map(step_of, step_directories(run)), default=0)
    starts = [start for start in starts if start["step"] < newest_step] or starts
    noted = starts[-1].get("files") if starts else None
    return noted if isinstance(noted, dict) else {}


def changed_files(run):
    """The names of the main files that are not as noted_files has them."""
    noted = noted_files(run)
    return [name for name, digest in main_files().items() if noted.get(name, digest) != digest]


def say_changed_network(run):
    """A line before a run's weights are used with another model.py than they were trained with."""
    if "model.py" in changed_files(run):
        print_line(f"{run}: model.py has changed since this run was trained; its weights are used "
                   "with model.py as it is now")


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
