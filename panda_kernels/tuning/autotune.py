"""``panda-kernels autotune``: measure what each kernel's space offers on this machine, and keep what is faster.

Every op is called once under :func:`.lookup.observed`, which tells the kernels it goes through and the shapes they are
tuned by. Then, point by point: configs that the compiler or the result speaks against are dropped, the others are timed
in turns, and the best of them meets the heuristic's once more. Its gain is kept if it is beyond the noise of that.
"""
from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import backends
from . import cases, identity, lookup, store, timer
from .cases import Case
from .lookup import Session
from .space import Point
from .store import Entry

SECONDS = 1.0  # for all candidates of a kernel together, and again for the best and the heuristic
DUEL = 15  # rounds at least
LEAST_GAIN = 0.02


@dataclass
class Result:
    """What was tried at a point; ``best`` is None where nothing beat the heuristic."""

    point: Point
    heuristic: Any
    tried: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    best: Any = None
    gain: float = 0.0

    def entry(self) -> Entry:
        """What to save or, by its key, to take out."""
        space, device, dtype, shape = self.point
        return Entry(kernel=space.name, device=identity.device_of(space.backend, device),
                     versions=identity.versions(space.backend), content=identity.content(space.name), dtype=dtype,
                     shape=dict(shape), config=space.fields(self.heuristic if self.best is None else self.best),
                     gain=round(self.gain, 3))

    def line(self) -> tuple[str, ...]:
        space, _, dtype, shape = self.point
        chosen = {} if self.best is None else space.fields(self.best)
        before = space.fields(self.heuristic)
        changes = ", ".join(f"{name} {before[name]} -> {value}" for name, value in chosen.items()
                            if value != before[name])
        notes = "".join(f"; {count} {why}" for why, count in sorted(self.dropped.items()))
        return (space.name, dtype, " ".join(f"{name}={value}" for name, value in shape), f"{self.tried}{notes}",
                f"{self.gain:+.1%}" if chosen else "-", changes or "as the heuristic has it")


@dataclass
class Work:
    """A point, and the cases whose calls go through it."""

    heuristic: Any
    cases: list[Case] = field(default_factory=list)


def work_of(found: Sequence[Case]) -> dict[Point, Work]:
    points: dict[Point, Work] = {}
    for case in found:
        with lookup.observed() as session:
            case.call()
        for point, heuristic in session.seen.items():
            points.setdefault(point, Work(heuristic)).cases.append(case)
    return points


def tune(session: Session, point: Point, heuristic: Any, found: Sequence[Case]) -> Result:
    """Times every candidate on all of the point's cases, one after the other: a setting must serve every length."""
    result = Result(point, heuristic)
    candidates = list(_sound(session, point, found, result))
    result.tried = len(candidates)
    calls = {str(i): partial(_run, session, point, config, found)
             for i, config in enumerate([result.heuristic, *candidates])}
    if candidates:
        clock = timer.clock_of(torch.device(point.device).type)
        seconds = timer.interleaved(calls, SECONDS, clock)
        fastest = min(list(calls)[1:], key=lambda name: statistics.median(seconds[name]))
        # Again: of many candidates the luckiest would always be ahead.
        duel = timer.interleaved({"heuristic": calls["0"], "candidate": calls[fastest]}, SECONDS, clock, DUEL)
        if gain := gained(duel["heuristic"], duel["candidate"]):
            result.best, result.gain = candidates[int(fastest) - 1], gain
    if result.best is not None:
        session.wanted[point] = result.best  # what follows is measured beside it
    return result


def gained(heuristic: Sequence[float], candidate: Sequence[float]) -> float | None:
    """The median gain of rounds in which both were timed; None unless three quarters of them show a gain."""
    ratios = [a / b for a, b in zip(heuristic, candidate, strict=True)]
    return statistics.median(ratios) - 1 if statistics.quantiles(ratios, n=4)[0] > 1 + LEAST_GAIN else None


def _run(session: Session, point: Point, config: Any, found: Sequence[Case]) -> None:
    session.wanted[point] = config
    for case in found:
        case.call()
    del session.wanted[point]


def _sound(session: Session, point: Point, found: Sequence[Case], result: Result) -> Iterator[Any]:
    """Candidates that compile into the device's limits and whose results are as exact as the heuristic's."""
    exact = [case.exactly() for case in found]
    limits = [case.limits(case.errors(e)) for case, e in zip(found, exact, strict=True)]
    for config in point.space.candidates(result.heuristic):
        session.wanted[point] = config
        try:
            if point.space.backend == "triton" and (why := _over_limits(point, config, found)):
                result.dropped[why] += 1
                continue
            errors = [case.errors(e) for case, e in zip(found, exact, strict=True)]
        except Exception as fault:  # compilers and drivers each have their own for what does not fit
            result.dropped[f"raised {type(fault).__name__}"] += 1
            continue
        finally:
            del session.wanted[point]
        if all(error <= limit for of_case, to in zip(errors, limits, strict=True)
               for error, limit in zip(of_case, to, strict=True)):
            yield config
        else:
            result.dropped["inexact"] += 1


def _over_limits(point: Point, config: Any, found: Sequence[Case]) -> str:
    """What the compiler makes of the point's kernel in a config that calls want, if it spills or needs too much memory.
    """
    from ..triton import resources
    from ..triton._launch import recorded

    target = resources.target_of(point.device)
    with recorded() as launches:
        found[0].call()
    for launch in launches:
        ours = point.space.name == f"triton.{launch.name}"  # and at this point, not at another of the kernel's
        if target and ours and point.space.fields(launch.config) == point.space.fields(config):
            row = resources.compile_for(launch, target)
            if row.spills and target in resources.NO_SPILLS:
                return "spill registers"
            if row.shared_memory > resources.TARGETS[target].shared_memory:
                return "exceed shared memory"
    return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`main` reads."""
    parser.add_argument("--ops", nargs="+", metavar="OP",
                        help="only these; 'tower' is the whole tower in inference, 'fp8' what FP8 adds on GPUs")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE",
                        help="sizes of the specifications by name (default: each op's first of bench_sizes)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: a GPU if there is one)")


def main(args: argparse.Namespace) -> int:
    """Tune, save and print; 2 if it cannot be done."""
    try:
        device, backend = _device(args.device)
        wanted = _wanted(args.ops, args.shapes)
        name = str(identity.device_of(backend, device)["name"])
        file = store.file_of(store.cache_folder(), name)
        store.update(file, [])  # better to know now that it cannot be written
    except (ValueError, OSError, RuntimeError) as error:
        print(f"panda-kernels autotune: error: {error}", file=sys.stderr)
        return 2
    print(f"{name}: timing; other work on this machine spoils it", file=sys.stderr)
    results = []
    with torch.no_grad():
        points = work_of([case for op, size in wanted for case in cases.cases_of(op, size, backend, device)])
        with lookup.observed() as session:
            for point in _progress(points):
                result = tune(session, point, points[point].heuristic, points[point].cases)
                results.append(result)
                better, entry = result.best is not None, result.entry()
                store.update(file, [entry] if better else [], [] if better else [entry.key()])
    lookup.forget()
    print(render(results))
    print(f"{sum(r.best is not None for r in results)} of {len(results)} kernels gained; saved in {file}")
    return 0


def _device(asked: str | None) -> tuple[str, str]:
    """The device as tensors name it, and the backend that is tuned there."""
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or a GPU, got {device}")
    backend = "cpu" if device.type == "cpu" else "triton"
    if reason := backends.load_error(backend):
        raise ValueError(f"--device {device}: the {backend} backend cannot be used: {reason}")
    return str(torch.empty(0, device=device).device), backend


def _wanted(names: Sequence[str] | None, sizes: Sequence[str] | None) -> list[tuple[str, str]]:
    """Ops and their sizes; a size that some of the ops have is enough."""
    if unknown := set(names or ()) - set(cases.names()):
        raise ValueError(f"--ops: expected some of {', '.join(cases.names())}, got {', '.join(sorted(unknown))}")
    chosen = names or cases.names()
    known = {op: cases.sizes_of(op) for op in chosen}
    if unknown := set(sizes or ()) - {size for of_op in known.values() for size in of_op}:
        every = sorted({size for of_op in known.values() for size in of_op})
        raise ValueError(f"--shapes: expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    return [(op, size) for op in chosen for size in (sizes or [next(iter(known[op]))]) if size in known[op]]


def _progress(points: Collection[Point]) -> Iterator[Point]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield from points
        return
    with tqdm(points, unit="kernel", disable=None) as bar:
        for point in bar:
            bar.set_postfix_str(f"{point.space.name} {point.dtype}")
            yield point


def render(results: Sequence[Result]) -> str:
    """A table: what was tried at each point, and what was gained over the heuristic."""
    lines = [("kernel", "dtype", "shape", "candidates", "gain", "config"), *(r.line() for r in results)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
