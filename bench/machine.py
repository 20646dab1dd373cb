"""What a row must say of where it ran: processor, versions, commit, and the peaks this machine reached just before."""
from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F

import panda_kernels
from panda_kernels import info
from panda_kernels.tuning.timer import finished

from .half_products import peer_dtype
from .records import Row

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

    def rows(self, facts: dict[str, Any]) -> list[Row]:
        """The peaks as rows of their own; :meth:`of` reads them."""
        found = [("copy in memory", "any", "gb_s", self.memory_gb_s), ("copy in cache", "any", "gb_s", self.l3_gb_s),
                 ("cache", "any", "bytes", self.l3_bytes)]
        found += [("matrix product", dtype, "gflop_s", rate) for dtype, rate in self.gflop_s.items()]
        return [Row(op="peak", size=size, dtype=dtype, metric=metric, contender="torch", median=value, min=value,
                    max=value, **facts) for size, dtype, metric, value in found]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Peaks:
        found = {(row.size, row.dtype): row.median for row in rows if row.op == "peak"}
        rates = {dtype: rate for (size, dtype), rate in found.items() if size == "matrix product"}
        return cls(found["copy in memory", "any"], found["copy in cache", "any"], int(found["cache", "any"]), rates)


def measure_peaks(device: str) -> Peaks:
    """Takes a few seconds and, for the large copy, at most a quarter of the free memory; a GPU's cache is its L2.

    A dtype that torch cannot multiply on this CPU (:mod:`bench.half_products`) has the peak of the one used instead.
    """
    cache = _l3_bytes() if device == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    large = min(max(256 * MIB, 2 * cache), free_bytes(device) // 8)
    # Half of the cache, source and destination together; no more than the tower's own activations need.
    small = min(cache // 4, 16 * MIB)
    with torch.device(device):
        rates = {str(dtype).removeprefix("torch."): _matrix_rate(peer_dtype(dtype, device))
                 for dtype in row_dtypes(device)}
        return Peaks(_copy_rate(large, 4), _copy_rate(small, 50), cache, rates)


def row_dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What a device is measured in: float16 only where it has instructions for it."""
    return (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float32, torch.bfloat16, torch.float16)


def facts(device: str) -> dict[str, Any]:
    """The fields of a :class:`~bench.records.Row` that say where it was measured."""
    sections = info.collect()
    malloc = (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    return {
        "device": sections["machine"]["cpu"] if device == "cpu" else torch.cuda.get_device_name(device),
        "device_type": torch.device(device).type,
        "threads": torch.get_num_threads(),
        "isa": sections["extension"]["instructions"],
        "torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version(),
        "panda_kernels": panda_kernels.__version__,
        "malloc": " ".join(malloc),
        "load_before": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M"),
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


def free_bytes(device: str) -> int:
    """What can be allocated on the device; on a CPU what the system says it could make free is left out."""
    if device != "cpu":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
