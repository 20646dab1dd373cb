"""The whole tower, with and without projector, and the memory it needs."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import memory, tower, training
from bench.half_products import peer_dtype, peer_name
from bench.measure import Bench
from bench.records import OURS
from panda_kernels import fp8

PROJECTED = ("8 frames", "720p clip", "image", "1 clip", "4 clips")
ROWS = [(case, projected) for case in tower.CASES for projected in ((False, True) if case in PROJECTED else (False,))]
SHORT = [(case, projected) for case, projected in ROWS if case in tower.SHORT and (case == "8 frames" or not projected)]
STEPS = ("8 frames", "1 clip", "4 clips", "16 clips", "64 clips")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("full")
    if "projected" in metafunc.fixturenames:
        rows = ROWS if full else SHORT
        ids = [f"{case}{', projected' * projected}".replace(" ", "_") for case, projected in rows]
        metafunc.parametrize(("case", "projected"), rows, ids=ids)
    elif "case" in metafunc.fixturenames:
        metafunc.parametrize("case", STEPS if full else STEPS[:1], ids=lambda case: case.replace(" ", "_"))


def test_tower(bench: Bench, full: bool, case: str, projected: bool, dtype: torch.dtype, device: str) -> None:
    input_ = tower.CASES[case]
    _skip_if_too_large(input_.fits(device))
    # Compiling takes most of a minute, so it is measured for the usual input only.
    contest = tower.contenders(dtype, device=device, projected=projected, with_compiled=full and case == "8 frames")
    ours, peers = contest.calls(input_.pixel_values(dtype))
    bench.row(_labels("tower + projector" if projected else "tower", case, dtype), ours, peers,
              partial(tower.errors, input_, contest, projected), tower.cost(input_, dtype, projected),
              overheads=contest.overheads())


def test_fp8(bench: Bench, device: str) -> None:
    if not fp8.has_products(torch.device(device)):
        pytest.skip("FP8, of which this device has no products")
    fp8_row(bench, tower.CASES["8 frames"], device)


def fp8_row(bench: Bench, input_: tower.Case, device: str) -> None:
    contest = tower.by_fp8(device)
    ours, peers = contest.calls(input_.pixel_values(contest.dtype))
    bench.row(_labels("tower + projector, FP8", "8 frames", contest.dtype), ours, peers,
              lambda: replace(tower.errors(input_, contest, True), limit=tower.FP8_LIMIT),
              tower.cost(input_, contest.dtype, True))


def test_training_step(bench: Bench, case: str, dtype: torch.dtype, device: str) -> None:
    _skip_if_too_large(tower.CASES[case].fits(device, training=True))
    contest = training.contenders(dtype, device=device)
    ours, peers = contest.calls(tower.CASES[case].pixel_values(dtype))
    bench.row(_labels("training step", case, dtype), ours, peers, partial(training.errors, contest),
              tower.training_cost(tower.CASES[case], dtype))


@pytest.mark.parametrize("kind", ["forward", "training"])
def test_memory(bench: Bench, full: bool, dtype: torch.dtype, device: str, kind: str) -> None:
    """Peak above the weights of two passes over 8 frames, each contender in processes of its own."""
    labels, times = _labels(f"memory, {kind}", "8 frames", dtype), 3 if full else 1
    bench.value(labels, "peak_bytes", {
        OURS: memory.of_tower("ours", dtype, kind, 2, 4, device, times=times),
        peer_name("reference", dtype, device): memory.of_tower("reference", peer_dtype(dtype, device), kind, 2, 4,
                                                               device, times=times)})
    if device == "cpu" and kind == "forward":
        bench.value(labels, "packed_bytes", {OURS: tower.packed_bytes(dtype)})


def _labels(op: str, case: str, dtype: torch.dtype) -> dict[str, str]:
    return {"op": op, "size": case, "dtype": str(dtype).removeprefix("torch."), "backend": "auto"}


def _skip_if_too_large(fits: bool) -> None:
    if not fits:
        pytest.skip("a size for whose peers too little memory is free")
