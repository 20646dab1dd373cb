"""What a row must say of where it ran: processor, versions, commit, and the peaks this machine reached just before."""
from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F

import panda_kernels
from panda_kernels import info
from panda_kernels.tuning.timer import finished

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@dataclass(frozen=True)
class Peaks:
    """Best of a few tries on all threads. Copies count bytes read and written; rates are by dtype name."""

    memory_gb_s: float
    l3_gb_s: float
    l3_bytes: int
    gflop_s: dict[str, float]

    def bandwidth(self, num_bytes: int) -> float:
        """GB/s for a call that touches ``num_bytes``: those of the L3 cache if they fit in it."""
        return self.l3_gb_s if num_bytes <= self.l3_bytes else self.memory_gb_s

    def least_seconds(self, num_bytes: int, flops: int, dtype: str) -> float:
        """The roofline: no call moves its bytes or does its arithmetic faster than this."""
        return max(num_bytes / self.bandwidth(num_bytes), flops / self.gflop_s[dtype]) / 1e9


def measure_peaks(device: str) -> Peaks:
    """Takes a few seconds and, for the large copy, at most a quarter of the free memory; a GPU's cache is its L2."""
    cache = _l3_bytes() if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    free = _free_bytes() if device == "cpu" else torch.cuda.mem_get_info()[0]
    large = min(max(256 * MIB, 2 * cache), free // 8)
    # Half of the cache, source and destination together; no more than the tower's own activations need.
    small = min(cache // 4, 16 * MIB)
    with torch.device(device):
        rates = {str(dtype).removeprefix("torch."): _matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
        return Peaks(_copy_rate(large, 4), _copy_rate(small, 50), cache, rates)


def facts(peaks: Peaks, device: str) -> dict[str, Any]:
    """What every row carries, flat or in small dicts of strings and numbers."""
    sections = info.collect()
    machine = {name: sections["machine"][name] for name in ("system", "cpu", "cpu flags", "torch isa")}
    return {
        "device": machine["cpu"] if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "machine": machine,
        "isa": sections["extension"]["instructions"],
        "backends": sections["backends"],
        "versions": {"panda_kernels": panda_kernels.__version__, "torch": torch.__version__,
                     "numpy": numpy.__version__, "python": platform.python_version()},
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "load_before": os.getloadavg()[0],
        "peaks": asdict(peaks),
        **commit(),
    }


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether the working tree differs from it, results apart."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":!bench/results", ":!bench/plots")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "unknown", "dirty": True}


def _best(call: Callable[[], object], tries: int) -> float:
    finished(call)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        finished(call)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _copy_rate(num_bytes: int, tries: int) -> float:
    source, target = (torch.ones(num_bytes // 4) for _ in range(2))
    return 2e-9 * num_bytes / _best(lambda: target.copy_(source), tries)


def _matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """The best of the products torch offers: ``mm`` and oneDNN's 1x1 channels-last convolution, into a warm buffer."""
    a, b, out = (torch.ones(size, size, dtype=dtype) for _ in range(3))
    image = a.view(1, size // 64, 64, size).permute(0, 3, 1, 2)
    kernel = b[:, :, None, None]
    with torch.inference_mode():
        products = (lambda: torch.mm(a, b, out=out), lambda: F.conv2d(image, kernel))
        return 2e-9 * size**3 / min(_best(product, 10) for product in products)


def _l3_bytes() -> int:
    sizes = {"K": 1 << 10, "M": MIB, "G": 1 << 30}
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
    except OSError:
        return 32 * MIB
    return int(text[:-1]) * sizes[text[-1]]


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
