"""What nvcc made of the CUDA kernels, for every target: registers, spills, shared memory, instructions; and its limits.

``python -m panda_kernels.backends.cuda.resources docs/cuda_resources.md`` writes the page. It reads the built extension
with the tools that come with Triton.
"""
from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ... import resource_pages
from . import LIBRARY

REGISTERS = 65536  # of a multiprocessor, on every target
TYPES = {"f": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Claim:
    """What a kernel is written for: blocks of ``threads``, ``blocks`` of them at a time on a multiprocessor."""

    threads: int
    blocks: int
    tensor_cores: bool = False
    async_copies: bool = False


CLAIMS = {
    "convolve": Claim(threads=128, blocks=2),
    "gradient": Claim(threads=128, blocks=2),
    "attend_windows": Claim(threads=256, blocks=1, tensor_cores=True, async_copies=True),
    "all_phases": Claim(threads=256, blocks=1, async_copies=True),
}


@dataclass(frozen=True)
class Row:
    kernel: str
    dtype: str
    target: str
    registers: int
    spills: int  # instructions
    shared_memory: int  # bytes known to the compiler
    loads: int
    wide_loads: int  # of 16 bytes
    products: str  # HMMA or another, or "none"
    async_copies: int

    def violations(self) -> list[str]:
        claim = CLAIMS[self.kernel]
        reasons = [f"{self.spills} spills"] if self.spills else []
        # Registers are given to warps in units of 256.
        if claim.blocks * claim.threads * -(-self.registers // 8) * 8 > REGISTERS:
            reasons.append(f"{self.registers} registers, too many for {claim.blocks} blocks")
        if self.products == "none" and 2 * self.wide_loads < self.loads:
            reasons.append(f"only {self.wide_loads} of {self.loads} loads have 16 bytes")
        if claim.tensor_cores and self.products == "none":
            reasons.append("a product without tensor cores")
        if claim.async_copies and not self.async_copies:
            reasons.append("no asynchronous copies")
        return [f"{self.kernel} {self.dtype} {self.target}: {reason}" for reason in reasons]


def rows() -> list[Row]:
    """Of every kernel and target in the extension."""
    usage = re.findall(r"arch = (\w+)|Function (\w+):\s*(.*)", _cuobjdump("--dump-resource-usage"))
    resources, target = {}, ""
    for arch, function, line in usage:
        target = arch or target
        if function:
            resources[target, function] = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
    found = []
    for (target, function), used in sorted(resources.items(), key=lambda item: (_name(item[0][1]), item[0])):
        code = _listings(target)[function]
        loads = re.findall(r"^(?:LDG|LDGSTS)\b\S*", code, re.M)
        product = re.search(r"^(HGMMA|HMMA|UTCHMMA)\b", code, re.M)
        found.append(Row(*_name(function), target, used["REG"], len(re.findall(r"^(?:LDL|STL)\b", code, re.M)),
                         used["SHARED"], len(loads), sum(".128" in load for load in loads),
                         product[1] if product else "none", len(re.findall(r"^LDGSTS\b", code, re.M))))
    return found


_listed: dict[str, dict[str, str]] = {}


def _listings(target: str) -> dict[str, str]:
    """The machine code of every kernel for a target, an instruction a line."""
    if target not in _listed:
        parts = re.split(r"^\s*Function : (\w+)$", _cuobjdump("-sass", "-arch", target), flags=re.M)
        prefix = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?U?P\w+\s+)?", re.M)
        _listed[target] = {name: prefix.sub("", code) for name, code in zip(parts[1::2], parts[2::2], strict=True)}
    return _listed[target]


def _cuobjdump(*options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, LIBRARY], capture_output=True, text=True, check=True).stdout


def _name(function: str) -> tuple[str, str]:
    """Kernel and type of a mangled name, which holds ``8convolveINS0_8bfloat16E``, or ``If`` for float32."""
    for kernel in CLAIMS:
        if found := re.search(rf"{len(kernel)}{kernel}(?:I(?:(f)|NS\d*_\d+(bfloat16|float16)))?", function):
            return kernel, TYPES.get(found[1] or found[2], "any")
    raise ValueError(f"no kernel of {', '.join(CLAIMS)}: {function}")


def render(table: list[Row]) -> str:
    """The table as a page; :func:`parse` reads it back."""
    return resource_pages.render(Row, table, [
        "# What nvcc makes of the CUDA kernels", "",
        "Written by `python -m panda_kernels.backends.cuda.resources docs/cuda_resources.md`. Registers a thread,",
        "spilling instructions, bytes of static shared memory, loads from global memory, those of 16 bytes, the",
        "instruction of a product, and asynchronous copies. `tests/test_cuda_resources.py` holds the extension as",
        "it was built to the same limits: no spill, as many blocks on a multiprocessor as the kernel is written",
        "for, half of the loads of 16 bytes, tensor cores and asynchronous copies where they are claimed."])


def parse(page: str) -> list[Row]:
    return resource_pages.parse(Row, page)


def main(file: str) -> int:
    table = rows()
    Path(file).write_text(render(table))
    broken = [reason for row in table for reason in row.violations()]
    print("\n".join(broken) or f"{len(table)} rows within their limits")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
