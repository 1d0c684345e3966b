"""The machine: device, dtype, compiler, memory, power."""

import ctypes
import resource
import shutil
import sys
import sysconfig
import threading
import time
from pathlib import Path

import torch

from model import count_parameters
from support.files import UserError


def choose_device(name="auto"):
    """The device named, or with "auto" the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA GPU here; --device=cpu runs anywhere")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: torch sees no Apple GPU here; --device=cpu runs anywhere")
    return torch.device(name)


def choose_dtype(name, device):
    """The forward's dtype: the one named, or with "auto" bfloat16 where the chip is fast at it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    fast = device.type == "cpu" and "avx512_bf16" in cpu_flags()
    return torch.bfloat16 if fast else torch.float32


def cpu_flags():
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.is_file() else ""

# GPU: (bf16 TFLOP/s, dense; GiB; watts), from the makers' data sheets; MI250X by half, as torch
# sees it
GPUS = {"a100-40": (312, 40, 400), "a100": (312, 80, 400), "h100": (989, 80, 700),
        "h200": (989, 141, 700), "mi250x": (191.5, 64, 280)}


def can_compile():
    """Whether torch.compile finds what it needs: a C++ compiler and Python's headers."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    return bool(compiler) and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def choose_micro_batch(config, seq_len, ranks=1):
    """Sequences per forward: as set, or the most that divide a rank's share in 16,384 tokens."""
    share = max(1, config.batch_size // ranks)
    if config.micro_batch_size:
        return min(config.micro_batch_size, share)
    return max(n for n in range(1, share + 1)
               if share % n == 0 and (n * seq_len <= 16384 or n == 1))


def keep_freed_memory():
    """Tell glibc to keep big freed buffers: faulting them in anew costs a quarter of each step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer by mmap, which free() would give back
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor shrink the heap


def flops_per_token(config):
    """Of a forward and a backward: 6 a weight of the matrices, the head too, and attention's."""
    looked_up = 0 if config.weight_tying else config.embedding_size * config.d_model
    weights = count_parameters(config) - looked_up
    return 6 * weights + 12 * config.n_layers * config.d_model * config.max_seq_len


def peak_flops(device):
    """The bf16 peak of this GPU a second, or None if it is none of the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    if "h100" in name and ("pcie" in name or "nvl" in name):
        return None  # slower than the table's, which has the SXM board
    known = [flops for gpu, (flops, _, _) in GPUS.items() if gpu in name]
    return known[0] * 1e12 if known else None


def peak_memory(device):
    """The most GB that this rank has held: of the GPU's memory, or without one of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class PowerMeter:
    """The energy of this rank's device: NVML's power each second, or else `watts` by the clock.

    As in the paper (section 4.4) power is sampled and averaged over the time; unlike there it is
    the GPU's alone, not the node's. `metered` says which of the two it is.
    """

    def __init__(self, device, watts):
        self.device, self.watts, self.joules = device, watts, 0.0
        self.metered = device.type == "cuda" and self.read() is not None
        self.began = time.monotonic()
        if self.metered:
            threading.Thread(target=self.sample, daemon=True).start()

    def read(self):
        """The power now in watts, or None where no meter can be read."""
        try:
            power = torch.cuda.power_draw(self.device)
            return power if torch.version.hip else power / 1000  # AMD's comes in watts
        except Exception:  # no pynvml, no driver, no right: as many kinds of errors
            return None

    def sample(self):
        then = time.monotonic()
        while True:
            time.sleep(1.0)
            now, watts = time.monotonic(), self.read()
            self.joules += (self.watts if watts is None else watts) * (now - then)
            then = now

    def kwh(self):
        joules = self.joules if self.metered else self.watts * (time.monotonic() - self.began)
        return joules / 3.6e6


def carbon_kg(kwh, config):
    """kg of CO2 equivalent; paper, section 4.4."""
    return kwh * config.pue * config.kg_co2_per_kwh


def energy_line(kwh, metered, config):
    """Energy and carbon of a run, as in the paper's section 4.4."""
    if not kwh:
        return "energy: unknown; --watts=... states the power of a rank where no meter is read"
    source = "of the GPUs, metered" if metered else f"at {config.watts:g} W a rank, as stated"
    return (f"energy: {kwh:.4g} kWh ({source}) x {config.pue:g} (PUE) x "
            f"{config.kg_co2_per_kwh:g} kg/kWh = {carbon_kg(kwh, config):.3g} kg CO2eq")
