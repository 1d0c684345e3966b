"""The machine: device, dtype, compiler, memory, speed and energy."""

import ctypes
import getpass
import os
import re
import resource
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import torch

from model import count_parameters
from support.files import UserError

# GPU: (dense bf16 TFLOP/s with float32 sums, GiB, watts), from the makers' data sheets and, for
# GeForce and RTX, NVIDIA's papers on GA102, Ada and Blackwell. Where a sheet has only the figure
# with sparsity, half of it. torch sees an MI250 or MI250X as two devices; these are of one.
GPUS = {"a100-40": (312, 40, 400), "a100": (312, 80, 400), "a100-pcie": (312, 80, 300),
        "h100": (989, 80, 700), "h100-pcie": (756, 80, 350), "h100-nvl": (835, 94, 400),
        "h200": (989, 141, 700), "b200": (2250, 180, 1000),
        "a10": (125, 24, 150), "a30": (165, 24, 165), "a40": (149.7, 48, 300),
        "l4": (121, 24, 72), "l40": (181, 48, 300), "l40s": (362, 48, 350),
        "a6000": (154.8, 48, 300), "6000-ada": (364, 48, 300),
        "3090": (71, 24, 350), "4090": (165.2, 24, 450), "5090": (209.5, 32, 575),
        "mi250x": (191.5, 64, 280), "mi250": (181, 64, 280), "mi300x": (1307, 192, 750)}

# Words of a device's name that make it another GPU, or a part of one.
VARIANTS = {"pcie", "nvl", "laptop", "ti", "super", "d", "max", "mig"}


# ---- What the forward runs on --------------------------------------------------------------------

def choose_device(name="auto"):
    """The torch.device called `name`; "auto" is the GPU if there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA GPU here; --device=cpu runs anywhere")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: torch sees no Apple GPU here; --device=cpu runs anywhere")
    return torch.device(name)


def choose_dtype(name, device):
    """The forward's dtype called `name`; "auto" is bfloat16 where the chip multiplies it fast."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = device.type == "cpu" and "avx512_bf16" in cpu_flags()
    return torch.bfloat16 if is_fast else torch.float32


def cpu_flags():
    """The text of /proc/cpuinfo, which lists the CPU's instruction sets; "" where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text() if cpuinfo.is_file() else ""


def choose_compile(name, device):
    """Returns (whether to compile, why): as `name` says, or with "auto" wherever it works.

    Raises UserError where compile=true cannot work.
    """
    fault = cache_fault()
    if name == "false":
        return False, "as asked"
    if name == "auto" and device.type not in ("cpu", "cuda"):
        return False, f"never tried on {device.type}"
    if not can_compile():
        fault = "no C++ compiler or no Python headers"
    if fault and name == "true":
        raise UserError(f"compile=true: {fault}; --compile=auto goes on without")
    if fault:
        return False, fault
    return True, "the first start takes about half a minute" if name == "auto" else "as asked"


def can_compile():
    """True if torch.compile finds what it needs: a C++ compiler and Python's headers.

    Whether they work is seen when it compiles (scaling/compiler.py).
    """
    usual = "clang++" if sys.platform == "darwin" else "g++"
    compiler = shutil.which(os.environ.get("CXX") or usual)  # the one that torch takes
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return bool(compiler) and headers.is_file()


def compiler_cache():
    """The directory in which torch keeps what it has compiled."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # a container's user may have no name
        user = f"uid_{os.getuid()}"
    usual = Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or usual)


def cache_fault():
    """Why torch's cache cannot be written, or None."""
    folder = compiler_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
        return None
    except OSError as error:
        if not folder.is_dir():
            # torch makes the directory even where it compiles nothing; this one is there already
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.sep
        return (f"torch's cache cannot be written: {error}; TORCHINDUCTOR_CACHE_DIR can name "
                "another place")


def choose_micro_batch(config, seq_len, world_size=1):
    """Sequences per forward on each rank: micro_batch_size, or what 16,384 tokens hold.

    The choice divides a rank's share of the batch, so that all forwards have one shape.
    """
    per_rank = max(1, config.batch_size // world_size)
    if config.micro_batch_size:
        return min(config.micro_batch_size, per_rank)
    fitting = [n for n in range(1, per_rank + 1) if per_rank % n == 0 and n * seq_len <= 16384]
    return max(fitting, default=1)


# ---- Memory --------------------------------------------------------------------------------------

def keep_freed_memory():
    """Keep large freed buffers, on pages of 2 MB where Linux gives them (CPU only).

    glibc would return them to the system, and each step would spend a quarter of its time on page
    faults. With pages of 4 KiB a step takes 1.13 to 1.18 times as long (python -m tests.bench cpu).

    # subtle: PyTorch reads the variable at its first tensor: call this before there is one.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer by mmap, which free() would return to the OS
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: do not shrink the heap either


def peak_memory(device):
    """The most GB that this process has held: of GPU memory, or without a GPU of main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- Speed ---------------------------------------------------------------------------------------

def flops_per_token(config):
    """FLOPs per token, forward + backward: 6 per weight of the products, 12 L D T for attention.

    The head is a matrix product; looking a row up in the embedding is none. As in PaLM
    (arXiv 2204.02311, appendix B), attention is counted as if nothing were masked.
    """
    lookup = 0 if config.weight_tying else config.embedding_size * config.d_model
    weights = count_parameters(config) - lookup
    attention = 12 * config.n_layers * config.d_model * config.max_seq_len
    return 6 * weights + attention


def peak_flops(device):
    """The GPU's bf16 FLOP/s at best, or None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    words = set(re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower()))
    for gpu, (tflops, _, _) in GPUS.items():
        key = set(gpu.split("-"))
        if key <= words and not words & VARIANTS - key:
            return tflops * 1e12
    return None


# ---- Energy --------------------------------------------------------------------------------------

class PowerMeter:
    """Energy of this rank's device: the GPU's power, read once a second, or else `watts` x time.

    As in the paper (section 4.4) power is sampled; here it is summed over time, there averaged.
    Unlike there, it is the power of the GPU alone, not of the node. `metered` is True where a GPU's
    meter is read.
    """

    def __init__(self, device, watts):
        self.device = device
        self.watts = watts
        self.joules = 0.0
        self.start = time.monotonic()
        self.metered = device.type == "cuda" and self.read() is not None
        if self.metered:
            threading.Thread(target=self.sample, daemon=True).start()

    def read(self):
        """The GPU's power now in watts, or None if its meter cannot be read."""
        try:
            power = torch.cuda.power_draw(self.device)
        except Exception:  # no pynvml, no driver, no permission: each raises an error of its own
            return None
        return power if torch.version.hip else power / 1000  # AMD reports watts, NVIDIA milliwatts

    def sample(self):
        """Add up the energy once a second, for ever (in a thread)."""
        then = time.monotonic()
        while True:
            time.sleep(1.0)
            now = time.monotonic()
            power = self.read()
            self.joules += (self.watts if power is None else power) * (now - then)
            then = now

    def kwh(self):
        """The energy so far."""
        if self.metered:
            return self.joules / 3.6e6
        return self.watts * (time.monotonic() - self.start) / 3.6e6


def carbon_kg(kwh, config):
    """kg of CO2 equivalent = energy x PUE x carbon intensity of the grid (paper, section 4.4)."""
    return kwh * config.pue * config.kg_co2_per_kwh


def energy_line(kwh, metered, config):
    """One line with the energy and carbon of a run, by the formula of the paper's section 4.4."""
    if not kwh:
        return "energy: unknown; --watts=N states the power of a rank where no meter is read"
    source = "of the GPUs, metered" if metered else f"at watts={config.watts:g} per rank"
    return (f"energy: {kwh:.4g} kWh ({source}) x {config.pue:g} (PUE) x "
            f"{config.kg_co2_per_kwh:g} kg/kWh = {carbon_kg(kwh, config):.3g} kg CO2eq")
