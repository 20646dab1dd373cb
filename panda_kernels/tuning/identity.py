"""What a measured setting holds for: a device, versions, and the source of the kernel."""
from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

import torch

from .space import Value

_TRITON = Path(__file__).parent.parent / "triton"


def device_of(backend: str, device: str) -> dict[str, Value]:
    """The name of ``device`` and, on CPUs, what else decides a time: the instructions and the threads."""
    from .. import info

    if backend != "cpu":
        return {"name": torch.cuda.get_device_name(device)}
    from ..backends import cpu

    return {"name": info.cpu_name(), "model": info.cpu_model(), "isa": cpu.isa(), "threads": torch.get_num_threads()}


def versions(backend: str) -> dict[str, str]:
    from .. import __version__, info

    found = {"panda_kernels": __version__, "torch": str(torch.__version__)}
    return found | ({"triton": info.installed("triton")} if backend == "triton" else {})


@functools.cache
def content(kernel: str) -> str:
    """A digest of a kernel's source, by the name of its space: csrc as it was compiled, or the files of a Triton
    kernel."""
    backend, module, *_ = kernel.split(".")
    if backend == "cpu":
        from ..backends import cpu

        return cpu.build_info().get("sources", "unknown")
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(_with_imports(module)))).hexdigest()[:16]


def _with_imports(module: str, found: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """The file of a module of ``panda_kernels.triton`` and of all it imports from there."""
    file = _TRITON / f"{module}.py"
    if file in found:
        return found
    found |= {file}
    for imported in re.findall(r"^from \.(\w+) import", file.read_text(), re.MULTILINE):
        found = _with_imports(imported, found)
    return found
