"""Peak memory of the tower above its weights, in bytes: ``python -m bench.memory ours|reference DTYPE PASS``.

PASS is ``forward`` or ``training``, which is a forward and a backward; the gradients themselves count as weights.

A process of its own, because allocators keep what earlier calls left behind; read from the kernel's high-water mark of
the resident set, because torch does not see what its libraries and our kernels allocate.
"""
from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import torch

from .machine import ROOT

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def in_subprocess(contender: str, dtype: str, kind: str) -> int:
    """Bytes above the weights at the peak of two passes over 8 frames."""
    command = [sys.executable, "-m", "bench.memory", contender, dtype, kind]
    return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def peak_above_weights(contender: str, dtype: torch.dtype, kind: str) -> int:
    from . import tower, training

    make = training.contenders if kind == "training" else tower.contenders
    contest = make(dtype, device="cpu")
    run = contest.ours if contender == "ours" else contest.peers["reference"]
    pixels = tower.CASES["8 frames"].pixel_values(dtype)
    with torch.inference_mode(kind == "forward"):
        # Libraries make their own buffers and code at their first product; those are neither weights nor activations.
        torch.conv2d(torch.ones(1, 8, 8, 8, dtype=dtype), torch.ones(8, 8, 1, 1, dtype=dtype))
        torch.mm(torch.ones(64, 64, dtype=dtype), torch.ones(64, 64, dtype=dtype))
        ctypes.CDLL(None).malloc_trim(0)  # what building the weights left free must not serve the forward unseen
        before = _resident("VmRSS")
        CLEAR.write_text("5")  # resets VmHWM to VmRSS
        for _ in range(2):
            run(pixels)
        return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"bench.memory: {STATUS}: no {name}; this needs Linux")
    return 1024 * int(found[1])


if __name__ == "__main__":
    print(peak_above_weights(sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]))
