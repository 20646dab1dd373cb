"""``panda-kernels verify``: does this installation compute what it should, on this machine?

Every op at the test sizes of its :class:`~panda_kernels.spec.OpSpec` and the whole tower at a small size, by every
backend that is there, in float32 and bfloat16, forward and backward, against the plain-torch reference in float64.
A result passes if its error is within the op's tolerance, a multiple of what torch itself loses in that dtype.
"""
from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import python_ref

from . import backends, info, ops
from .backends import BackendError
from .nn import STAB
from .spec import Draw, Inputs, OpSpec, Tolerance, relative_error

DTYPES = (torch.float32, torch.bfloat16)
TOWER = "tower"
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Row:
    """One comparison with float64. ``error`` and ``torch_error`` are relative Frobenius norms; ``tensor`` names the
    result or the gradient compared, ``fault`` the exception that kept the call from having one."""

    op: str
    backend: str
    dtype: str
    direction: str
    case: str
    tensor: str
    error: float
    torch_error: float
    limit: float
    fault: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def margin(self) -> float:
        return self.error / self.limit if self.limit else float("inf")


@dataclass
class Report:
    """What was compared, and in words what was not, and why."""

    rows: list[Row] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    def skip(self, note: str) -> None:
        if note not in self.not_checked:
            self.not_checked.append(note)


@dataclass(frozen=True)
class _Outcome:
    """A call's result and, if asked for, the gradients of its tensor arguments, by name."""

    result: Tensor
    gradients: dict[str, Tensor]

    def tensors(self, direction: str) -> dict[str, Tensor]:
        return {"result": self.result} if direction == FORWARD else self.gradients


def public_op(spec: OpSpec) -> Callable[..., Tensor]:
    """The op as users call it, with its checks."""
    return getattr(ops, spec.name)


def in_float64(inputs: Inputs) -> Inputs:
    """The same arguments with every floating tensor in float64."""
    return {name: a.double() if _is_floating(a) else a for name, a in inputs.items()}


def refusals(spec: OpSpec, backend: str, inputs: Inputs, direction: str = "fwd") -> list[str]:
    """Why ``backend`` does not serve ``direction`` (``fwd`` or ``bwd``) of this call; empty if it does."""
    return backends.refusals(backend, spec.name, direction, arguments(spec, inputs))


def arguments(spec: OpSpec, inputs: Inputs) -> list[Any]:
    """The arguments of a call as the backends take them: in the order of the schema, defaults included."""
    call = inspect.signature(public_op(spec)).bind(**inputs)
    call.apply_defaults()
    schema = getattr(torch.ops.panda_kernels, spec.name).default._schema
    return [call.arguments.get(a.name) for a in schema.arguments if a.name != "backend"]


def seeded_tower(dim: int = 1024) -> python_ref.STAB:
    """The reference tower in float64 and evaluation mode, with weights in which no stage is idle.

    At its own initialisation several residual branches are zero and could hide any fault. All values are exact in
    bfloat16, so that every dtype computes the same function.
    """
    tower = python_ref.STAB(dim).double().eval().requires_grad_(False)
    draw = Draw(0, torch.float64)
    for name, value in (*tower.named_parameters(), *tower.named_buffers()):
        if name.endswith("embedding") or name == "temporal_cls_token":
            value.copy_(draw(*value.shape))
        elif value.ndim > 1:
            value.copy_(draw(*value.shape, scale=value[0].numel() ** -0.5))
        elif name.endswith(("weight", "running_var")):
            value.copy_(1 + draw(*value.shape, scale=0.2).clamp(-0.5, 0.5))
        elif value.ndim == 1:
            value.copy_(draw(*value.shape, scale=0.1))
    return tower


def check_op(spec: OpSpec, names: Sequence[str], report: Report) -> None:
    """Compare one op, by each of the backends ``names`` that serves the call."""
    for case, sizes in spec.test_sizes.items():
        exact = _Reference(spec, spec.inputs(sizes, torch.float64))
        for dtype in DTYPES:
            inputs = spec.inputs(sizes, dtype)
            by_torch = _Reference(spec, inputs)
            for backend, direction in product(names, (FORWARD, BACKWARD)):
                placed = {name: _on(_device(backend), value) for name, value in inputs.items()}
                if why := refusals(spec, backend, placed, "fwd" if direction == FORWARD else "bwd"):
                    report.skip(f"{spec.name} {direction} by {backend}: {'; '.join(why)}")
                    continue
                label = (spec.name, backend, _name(dtype), direction, case)
                call = partial(_run, partial(public_op(spec), backend=backend), placed, direction)
                report.rows += _compare(label, call, by_torch[direction], exact[direction], spec.tolerance, dtype)


class _Reference(dict[str, _Outcome]):
    """The reference's outcomes by direction, each made when it is first asked for."""

    def __init__(self, spec: OpSpec, inputs: Inputs) -> None:
        self.function, self.inputs = spec.load_reference(), inputs

    def __missing__(self, direction: str) -> _Outcome:
        self[direction] = _run(self.function, self.inputs, direction)
        return self[direction]


def check_tower(names: Sequence[str], report: Report, *, dim: int = 1024, size: int = 112) -> None:
    """Compare the whole tower, stages 1 to 9: a clip of 4 frames with one ragged frame, and two images."""
    exact_tower = seeded_tower(dim)
    for case, pixels in _tower_cases(size).items():
        exact = _run_tower(exact_tower, pixels, BACKWARD)
        for dtype in DTYPES:
            reference = python_ref.STAB(dim).to(dtype).eval()
            reference.load_state_dict(exact_tower.state_dict())
            by_torch = _run_tower(reference, pixels.to(dtype), BACKWARD)
            tower = STAB(dim, dtype=dtype).eval()
            tower.load_state_dict(exact_tower.state_dict())
            for backend, direction in product(names, (FORWARD, BACKWARD)):
                tower.to(_device(backend)).backend = backend
                label = (TOWER, backend, _name(dtype), direction, case)
                call = partial(_run_tower, tower, pixels.to(_device(backend), dtype), direction)
                try:
                    report.rows += _compare(label, call, by_torch, exact, Tolerance(), dtype)
                except BackendError as error:
                    report.skip(f"{TOWER} {direction} by {backend}: {error}")


def _tower_cases(size: int) -> dict[str, Tensor]:
    """Pixels and mask ``[B, T, 4, size, size]`` in float64."""
    cases = {}
    for case, (batch, frames) in {"clip": (1, 4), "images": (2, 1)}.items():
        pixels = Draw(0, torch.float64)(batch, frames, 4, size, size)
        pixels[:, :, 3] = 1.0
        pixels[0, -1, 3, : 2 * 14] = 0.0
        cases[case] = pixels
    return cases


def _run_tower(tower: torch.nn.Module, pixels: Tensor, direction: str) -> _Outcome:
    if direction == FORWARD:
        with torch.inference_mode():
            return _Outcome(_tokens(tower, pixels), {})
    leaves = {n: p.requires_grad_() for n, p in tower.named_parameters() if not n.startswith("lmhra2.")}
    leaves["pixel_values"] = pixels.detach().requires_grad_()
    tokens = _tokens(tower, leaves["pixel_values"])
    return _Outcome(tokens.detach(), _gradients(tokens, leaves))


def _tokens(tower: torch.nn.Module, pixels: Tensor) -> Tensor:
    if isinstance(tower, python_ref.STAB):
        return torch.cat(tower(pixels, lambda tokens: tokens)[0])
    return tower(pixels).tokens


def _run(function: Callable[..., Tensor], inputs: Inputs, direction: str) -> _Outcome:
    if direction == FORWARD:
        with torch.no_grad():
            return _Outcome(function(**inputs), {})
    leaves = {name: a.detach().requires_grad_() for name, a in inputs.items() if _is_floating(a)}
    result = function(**{**inputs, **leaves})
    return _Outcome(result.detach(), _gradients(result, leaves))


def _gradients(result: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    cotangent = Draw(1, result.dtype)(*result.shape).to(result.device)
    gradients = torch.autograd.grad(result, list(leaves.values()), cotangent, allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def _compare(label: tuple[str, str, str, str, str], call: Callable[[], _Outcome], by_torch: _Outcome,
             exact: _Outcome, tolerance: Tolerance, dtype: torch.dtype) -> Iterator[Row]:
    direction = label[3]
    try:
        given = {name: tensor.cpu() for name, tensor in call().tensors(direction).items()}
    except BackendError:
        raise
    # Whatever a broken kernel raises is a finding, and must not keep the other ops from being checked.
    except Exception as fault:
        yield Row(*label, "-", float("inf"), 0.0, 0.0, f"{type(fault).__name__}: {fault}")
        return
    wanted = exact.tensors(direction)
    scale = max(float(t.norm()) for t in wanted.values())
    for name, tensor in wanted.items():
        if name not in given or given[name].shape != tensor.shape:
            shape = list(given[name].shape) if name in given else "nothing"
            yield Row(*label, name, float("inf"), 0.0, 0.0, f"expected shape {list(tensor.shape)}, got {shape}")
            continue
        error, torch_error = (error_beside(t, tensor, scale) for t in (given[name], by_torch.tensors(direction)[name]))
        # torch has wrong gradients of its own (bfloat16 depthwise weights on tiny grids): no yardstick for anyone.
        yardstick = torch_error if torch_error < 0.5 else torch.finfo(dtype).eps
        limit = tolerance.limit(yardstick, dtype, backward=direction == BACKWARD)
        yield Row(*label, name, error, torch_error, limit)


def error_beside(given: Tensor, exact: Tensor, scale: float) -> float:
    """Relative error; for a gradient that is zero but for float64's rounding, the error relative to the largest one."""
    if float(exact.norm()) > 1e-12 * scale:
        return relative_error(given, exact)
    return float((given.double() - exact).norm() / scale)


def _device(backend: str) -> str:
    return "cuda" if backend in backends.ON_GPU else "cpu"


def _on(device: str, argument: object) -> object:
    return argument.to(device) if isinstance(argument, Tensor) else argument


def _is_floating(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def render(rows: Sequence[Row]) -> str:
    """A table with, for each op, backend, dtype and direction, the comparison closest to its limit."""
    lines: list[tuple[str, ...]] = [
        ("op", "backend", "dtype", "direction", "checks", "error", "torch's", "limit", "closest to its limit", "")]
    for labels, group in groupby(rows, lambda row: (row.op, row.backend, row.dtype, row.direction)):
        checked = list(group)
        worst = max(checked, key=lambda row: row.margin)
        wrong = sum(not row.ok for row in checked)
        lines.append((*labels, str(len(checked)), f"{worst.error:.1e}", f"{worst.torch_error:.1e}",
                      f"{worst.limit:.1e}", f"{worst.case}, {worst.tensor}", f"{wrong} WRONG" if wrong else "ok"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`main` reads."""
    parser.add_argument("--ops", nargs="+", metavar="OP", help=f"only these; '{TOWER}' is the whole tower")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every comparison to FILE")


def main(args: argparse.Namespace) -> int:
    """Check and print; 0 if every result is within tolerance, 1 if one is not, 2 if an op asked for does not exist."""
    everything = (*ops.SPECS, TOWER)
    wanted = args.ops or everything
    if unknown := [name for name in wanted if name not in everything]:
        print(f"verify: --ops: expected some of {', '.join(everything)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    there = [name for name, reason in backends.status().items() if reason is None]
    report = Report(not_checked=[f"{name} backend: {why}" for name, why in backends.status().items() if why])
    for name in wanted:
        if name == TOWER:
            check_tower(there, report)
        else:
            check_op(ops.SPECS[name], there, report)
    report.rows.sort(key=lambda row: (wanted.index(row.op), row.backend, row.dtype, row.direction))

    print(render(report.rows))
    for note in report.not_checked:
        print(f"not checked: {note}")
    for row in report.wrong:
        print(f"WRONG: {row.op} by {row.backend} in {row.dtype}, {row.direction} of {row.case}, {row.tensor}: "
              f"{row.fault or f'error {row.error:.2e}, limit {row.limit:.2e}'}")
    print(f"{len(report.rows)} comparisons with float64, {len(report.wrong)} out of tolerance")
    if args.json:
        comparisons = [{**asdict(row), "ok": row.ok} for row in report.rows]
        text = {"ok": not report.wrong, "machine": info.collect(), "not_checked": report.not_checked,
                "comparisons": comparisons}
        args.json.write_text(json.dumps(text, indent=2))
    return 1 if report.wrong else 0
