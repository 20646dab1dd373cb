"""What compilers make of the kernels, on targets this machine need not have.

    python -m panda_kernels.triton.resources FILE [--sample]

Runs every op that has a Triton backend, forward and backward, on meta tensors of the sizes that its specification
names for benchmarks and for this table, the towers of the released widths, in FP8 too, and FP8's quantisation; compiles
each different launch for each target, of a sample for one of them. FILE becomes a table; a broken limit is an error.
"""
from __future__ import annotations

import hashlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from .. import resource_pages
from ..spec import Draw
from ._launch import Launch, recorded

PROCESSES = 2
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32",
          torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv"}


@dataclass(frozen=True)
class Target:
    backend: str
    arch: Any
    warp_size: int
    shared_memory: int  # the most that one program can have
    tensor_core: str  # the instruction of a product


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, r"HMMA"),
    "sm_90": Target("cuda", 90, 32, 227 << 10, r"[HQ]GMMA"),
    "sm_100": Target("cuda", 100, 32, 227 << 10, r"UTC\w*MMA|HMMA"),  # small products have only the latter
    "sm_120": Target("cuda", 120, 32, 99 << 10, r"[HQ]MMA"),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, r"v_mfma"),
}
NO_SPILLS = ("sm_80", "sm_90", "sm_100")
WITH_E4M3 = ("sm_90", "sm_100", "sm_120")  # Triton has none for sm_80, and gfx942 has another FP8
# Widths of what is quantised: tokens, LSTE's bottleneck and the projector's hidden layer, then those of other towers.
QUANTISED = (1024, 688, 4096)
QUANTISED_ELSEWHERE = (1152, 768, 1408, 944)
SOURCES = "Fingerprint of the kernels:"


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration on one target."""

    kernel: str
    dtype: str
    constants: str
    target: str
    registers: int
    spills: int
    shared_memory: int
    loads: int
    wide_loads: int  # of 16 bytes, or whole blocks by the copy engine
    product: str  # its instruction, "missing", "fma" where exact float32 has none on tensor cores, or "none"

    def key(self) -> tuple[str, ...]:
        """What every Triton version must agree on; counts move between versions."""
        return self.kernel, self.dtype, self.constants, self.target, self.product

    def violations(self) -> list[str]:
        reasons = []
        if self.spills and self.target in NO_SPILLS:
            reasons.append(f"{self.spills} spills")
        if self.shared_memory > TARGETS[self.target].shared_memory:
            reasons.append(f"{self.shared_memory} bytes of shared memory")
        if self.product == "missing":
            reasons.append("a product without tensor cores")
        if self.product == "none" and 2 * self.wide_loads < self.loads:
            reasons.append(f"only {self.wide_loads} of {self.loads} loads have 16 bytes")
        return [f"{' '.join(self.key()[:-1])}: {reason}" for reason in reasons]


class _Shapes(Draw):
    """Tensors without numbers."""

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")


def cases() -> Iterator[tuple[Launch, tuple[str, ...]]]:
    """Every different launch, and the targets it is compiled for.

    At the sizes of the benchmarks, in float32 and bfloat16, these are all; in float16, and at the further sizes a
    specification names for this table, those where nothing may spill. What FP8 adds comes last, for those that have
    e4m3.
    """
    seen = set()
    for launches, targets in _runs():
        for launch in launches:
            if (case := (launch.kernel, *_describe(launch))) not in seen:
                seen.add(case)
                yield launch, targets


def _runs() -> Iterator[tuple[list[Launch], tuple[str, ...]]]:
    """Launches of every op, forward and backward, of the towers, which share most of them with the ops, and of FP8."""
    from ..ops import SPECS

    both = torch.float32, torch.bfloat16
    for op, spec in SPECS.items():
        if not find_spec(f"panda_kernels.backends.triton.{op}"):
            continue
        first, *others = spec.bench_sizes.values()
        runs = [(sizes, dtype, tuple(TARGETS)) for sizes in (first, *others) for dtype in both]
        runs += [(sizes, dtype, NO_SPILLS) for sizes in spec.compile_sizes.values() for dtype in both]
        for sizes, dtype, targets in [*runs, (first, torch.float16, NO_SPILLS)]:
            yield _launches_of(op, sizes, dtype), targets
    towers = {1024: (*both, torch.float16), 1152: both, 1408: both}
    for dim, dtypes in towers.items():
        for dtype in dtypes:
            targets = tuple(TARGETS) if dim == 1024 and dtype in both else NO_SPILLS
            for frames in (4, 1):
                yield _launches_of_tower(dim, dtype, frames), targets
    yield _quantisations(), WITH_E4M3
    for dim, dtypes in towers.items():
        for dtype in dtypes:
            yield _launches_of_tower(dim, dtype, 4, by_fp8=True), WITH_E4M3


def _quantisations() -> list[Launch]:
    from .fp8 import quantise

    runs = [(width, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16) for width in QUANTISED]
    runs += [(width, torch.bfloat16) for width in QUANTISED_ELSEWHERE]
    with recorded() as found:
        for width, dtype in runs:
            quantise(torch.empty(16, width, dtype=dtype, device="meta"), width, gelu=width == QUANTISED[2])
    return found


def _launches_of(op: str, sizes: Mapping[str, Any], dtype: torch.dtype) -> list[Launch]:
    from ..ops import SPECS

    module = import_module(f"panda_kernels.backends.triton.{op}")
    inputs = [value.to("meta") if isinstance(value, Tensor) else value
              for value in SPECS[op].example(_Shapes(0, dtype), **sizes).values()]
    needs = [value.dtype.is_floating_point for value in inputs if isinstance(value, Tensor)]
    with recorded() as found:
        module.bwd(module.fwd(*inputs), *inputs, needs=needs)
    return found


def _launches_of_tower(dim: int, dtype: torch.dtype, frames: int, *, by_fp8: bool = False) -> list[Launch]:
    from ..backends.triton import stab_tower
    from ..nn import STAB
    from ..nn.stab import prepared_by
    from ..rectangles import Rectangles

    with torch.no_grad():
        weights = prepared_by(stab_tower, STAB(dim, dtype=dtype, device="meta").eval())
        weights = stab_tower.by_fp8(weights) if by_fp8 else weights
        pixels = torch.empty(1, frames, 3, 448, 448, dtype=dtype, device="meta")
        whole = Rectangles.full(frames, 32, 32)
        with recorded() as found:
            stab_tower.run(weights, pixels, whole._replace(corners=whole.corners.to("meta")), None)
    return found


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[str]]:
    """Triton's types of the arguments, the constants among them, and the pointers, which torch aligns to 16 bytes."""
    types, constants, pointers = {}, {}, []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = f"*{DTYPES[value.dtype]}"
            pointers.append(name)
        else:
            assert parameter.do_not_specialize, f"{launch.kernel.__name__}: {name} must be in do_not_specialize"
            types[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
    return types, constants, pointers


def _describe(launch: Launch) -> tuple[str, str]:
    """The dtype, and the constants of a launch: a flag by its name, not at all where it is off."""
    types, constants, _ = _signature(launch)
    shown = [k if v is True else f"{k}={v}" for k, v in constants.items() if v is not False]
    options = f"threads={launch.config.threads}", f"stages={launch.config.num_stages}"
    return next(t[1:] for t in types.values() if t[0] == "*"), " ".join([*shown, *options])


def compile_for(launch: Launch, name: str) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[name]
    types, constants, pointers = _signature(launch)
    index = {parameter: (i,) for i, parameter in enumerate(types)}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs={index[n]: v for n, v in constants.items()},
                       attrs={index[n]: [["tt.divisibility", 16]] for n in pointers})
    compiled = triton.compile(source, target=GPUTarget(target.backend, target.arch, target.warp_size),
                              options=launch.options(target.warp_size))
    registers, spills, code = _nvidia(compiled) if target.backend == "cuda" else _amd(compiled)
    loads = re.findall(r"^(?:LDG|UTMALDG|global_load_|buffer_load_)\S*", code, re.M)
    wide = [load for load in loads if re.search(r"UTMALDG|\.128|dwordx4", load)]
    found = re.search(rf"^({target.tensor_core})", code, re.M)
    wanted = re.search(r"tt\.dot\w*\b.*(inputPrecision = tf32|x(bf|f)16>|xf8E4M3FN>)", compiled.asm["ttir"])
    product = found[1] if found else "missing" if wanted else "fma" if "tt.dot" in compiled.asm["ttir"] else "none"
    return Row(launch.name, *_describe(launch), name, registers, spills, compiled.metadata.shared, len(loads),
               len(wide), product)


def target_of(device: str) -> str | None:
    """The target that a device is, if it is one of them."""
    properties = torch.cuda.get_device_properties(device)
    name = properties.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return name if name in TARGETS else None


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    """Registers, spilling instructions, and the machine code, an instruction a line."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, listing = (subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True,
                                         check=True).stdout
                          for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf")))
    code = re.sub(r"^\s*(?:/\*\w+\*/)?\s*(?:@!?U?P\w+\s+)?", "", listing, flags=re.M)
    registers = re.search(r"\bREG:(\d+)", usage)
    assert registers, usage
    return int(registers[1]), len(re.findall(r"^(?:LDL|STL)\b", code, re.M)), code


def _amd(compiled: Any) -> tuple[int, int, str]:
    listing = compiled.asm["amdgcn"]
    counts = dict(re.findall(r"\.(\w+_count):\s*(\d+)", listing))
    spills = int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])
    return int(counts["vgpr_count"]), spills, re.sub(r"^\s+", "", listing, flags=re.M)


def rows(*, sample: bool) -> list[Row]:
    """Of every launch on every target of its, or of a ``sample`` of them: each launch on one, in turn."""
    # Forked: a launch holds a kernel, which does not travel in any other way.
    jobs = [(launch, target) for i, (launch, targets) in enumerate(cases())
            for target in (targets[i % len(targets):][:1] if sample else targets)]
    with multiprocessing.get_context("fork").Pool(PROCESSES, _work_on, (jobs,)) as pool:
        return pool.map(_job, range(len(jobs)), chunksize=1)


_jobs: list[tuple[Launch, str]] = []


def _work_on(jobs: list[tuple[Launch, str]]) -> None:
    _jobs[:] = jobs


def _job(i: int) -> Row:
    return compile_for(*_jobs[i])


def fingerprint() -> str:
    """Of the source of everything that is compiled."""
    import triton

    modules = [import_module(f"{__package__}.{module.name}") for module in iter_modules([str(Path(__file__).parent)])]
    sources = {getsource(value.fn) for module in modules for value in vars(module).values()
               if isinstance(value, triton.JITFunction)}
    return hashlib.sha256("".join(sorted(sources)).encode()).hexdigest()[:16]


def render(table: list[Row], version: str, sources: str) -> str:
    """The table as a page; :func:`parse` reads it back."""
    return resource_pages.render(Row, table, [
        "# What the compilers make of the Triton kernels", "",
        f"Written by `python -m panda_kernels.triton.resources docs/kernel_resources.md`, with Triton {version}.",
        "Registers a thread, spilling instructions, bytes of shared memory, loads, those of 16 bytes, and the",
        "instruction of a product. `tests/test_kernel_resources.py` holds each row to its limits, and compiles",
        "each launch anew for one of its targets; numbers move between versions of Triton.", "",
        f"{SOURCES} {sources}"])


def parse(page: str) -> list[Row]:
    return resource_pages.parse(Row, page)


def main(file: str, *, sample: bool = False) -> int:
    import triton

    if triton.knobs.runtime.interpret:
        sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    table = rows(sample=sample)
    Path(file).write_text(render(table, triton.__version__, fingerprint()))
    broken = [reason for row in table for reason in row.violations()]
    print("\n".join(broken) or f"{len(table)} rows within their limits")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sample="--sample" in sys.argv))
