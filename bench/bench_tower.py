"""The whole tower, with and without projector, and the memory it needs."""
from __future__ import annotations

import pytest
import torch

from bench import memory, tower, training
from bench.measure import Bench
from panda_kernels.spec import Cost

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = [(case, projected) for case in tower.CASES for projected in (False, True)]
SHORT = [(case, projected) for case, projected in ROWS if case in tower.SHORT and (case == "8 frames" or not projected)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rows = ROWS if metafunc.config.getoption("full") else SHORT
    if "case" in metafunc.fixturenames:
        ids = [f"{case}{', projected' * projected}".replace(" ", "_") for case, projected in rows]
        metafunc.parametrize(("case", "projected"), rows, ids=ids)
    metafunc.parametrize("dtype", list(DTYPES))


def test_tower(bench: Bench, request: pytest.FixtureRequest, case: str, projected: bool, dtype: str,
               device: str) -> None:
    # Compiling takes most of a minute, so it is measured for the usual input only.
    with_compiled = request.config.getoption("full") and case == "8 frames"
    contest = tower.contenders(DTYPES[dtype], device=device, projected=projected, with_compiled=with_compiled)
    pixels = tower.CASES[case].pixel_values(DTYPES[dtype]).to(device)
    labels = {"op": "tower + projector" if projected else "tower", "size": case, "dtype": dtype, "backend": "auto"}
    errors = tower.errors(case, contest, DTYPES[dtype], projected, device)
    peers = {name: lambda run=run: run(pixels) for name, run in contest.peers.items()}
    cost = tower.cost(tower.CASES[case], DTYPES[dtype], projected)
    bench.row(labels, lambda: contest.ours(pixels), peers, errors, cost)


def test_training_step(bench: Bench, dtype: str, device: str) -> None:
    contest = training.contenders(DTYPES[dtype], device=device)
    pixels = tower.CASES["8 frames"].pixel_values(DTYPES[dtype]).to(device)
    labels = {"op": "training step", "size": "8 frames", "dtype": dtype, "backend": "auto"}
    forward = tower.cost(tower.CASES["8 frames"], DTYPES[dtype], False)
    cost = Cost(bytes=3 * forward.bytes, flops=3 * forward.flops)
    peers = {name: lambda run=run: run(pixels) for name, run in contest.peers.items()}
    bench.row(labels, lambda: contest.ours(pixels), peers, training.errors(contest, DTYPES[dtype], device), cost)


@pytest.mark.parametrize("kind", ["forward", "training"])
def test_memory(bench: Bench, dtype: str, device: str, kind: str) -> None:
    """Peak above the weights of two passes over 8 frames, each contender in a process of its own."""
    if device != "cpu":
        pytest.skip("the resident set does not show a GPU's memory")
    bench.memory_row({"op": f"memory, {kind}", "size": "8 frames", "dtype": dtype},
                     ours=lambda: memory.in_subprocess("ours", dtype, kind),
                     reference=lambda: memory.in_subprocess("reference", dtype, kind))
