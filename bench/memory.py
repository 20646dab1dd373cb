"""Peak memory of a call in bytes, in a process of its own, because allocators keep what earlier calls left behind.

On a CPU it is read from the kernel's high-water mark of the resident set: torch does not see what its libraries and our
kernels allocate.
"""
from __future__ import annotations

import ctypes
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .machine import ROOT

Run = Callable[[Tensor], object]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def of_tower(contender: str, dtype: torch.dtype, kind: str, clips: int, frames: int, device: str, *,
             times: int = 1) -> list[int]:
    """Above the weights, at the peak of two passes. ``contender`` is ``ours`` or ``reference``; ``kind`` is ``forward``
    or ``training``, which is a forward and a backward: the gradients themselves count as weights. Measured ``times``
    over: what glibc gives back of large blocks, and when, differs from process to process.
    """
    arguments = contender, str(dtype).removeprefix("torch."), kind, clips, frames, device
    return [_in_subprocess(i, "tower_pass", *arguments) for i in range(times)]


def of_encoder(name: str, dtype: torch.dtype, frames: int, device: str) -> int:
    """Above the weights, at the peak of two passes of one of :mod:`bench.encoders`."""
    return _in_subprocess(0, "encoder_pass", name, str(dtype).removeprefix("torch."), frames, device)


def tower_pass(contender: str, dtype: str, kind: str, clips: int, frames: int, device: str) -> int:
    from . import tower, training

    make = training.contenders if kind == "training" else tower.contenders
    contest = make(getattr(torch, dtype), device=device)
    run = contest.ours if contender == "ours" else next(iter(contest.peers.values()))
    with torch.inference_mode(kind == "forward"):
        return peak(run, tower.Case(clips, frames).pixel_values(getattr(torch, dtype)).to(device))


def encoder_pass(name: str, dtype: str, frames: int, device: str) -> int:
    from . import encoders

    run = encoders.encoder(name, getattr(torch, dtype), device)
    with torch.inference_mode():
        return peak(run, encoders.frames(frames, getattr(torch, dtype), device))


def peak(run: Run, x: Tensor) -> int:
    """Bytes above what is there now at the peak of two calls."""
    # Libraries make their own buffers and code at their first product; those are neither weights nor activations.
    torch.conv2d(x.new_ones(1, 8, 8, 8), x.new_ones(8, 8, 1, 1))
    torch.mm(x.new_ones(64, 64), x.new_ones(64, 64))
    if x.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what building the weights left free must not serve the call unseen
        before = _resident("VmRSS")
        CLEAR.write_text("5")  # resets VmHWM to VmRSS
    for _ in range(2):
        run(x)
    return (torch.cuda.max_memory_allocated() if x.is_cuda else _resident("VmHWM")) - before


@functools.cache
def _in_subprocess(number: int, function: str, *arguments: str | int) -> int:
    """Of the ``number``-th process that measures this."""
    command = [sys.executable, "-m", "bench.memory", function, json.dumps(arguments)]
    return int(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"bench.memory: {STATUS}: no {name}; this needs Linux")
    return 1024 * int(found[1])


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(globals()[sys.argv[1]](*json.loads(sys.argv[2])))
