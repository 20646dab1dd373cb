"""How the tower's cost grows: with the number of clips, with the length of one, and what more threads give."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import memory, tower
from bench.measure import Bench
from bench.records import OURS
from bench.scaling import CLIPS, ONE_CLIP, THREADS

SHORT, FULL = (4, 8, 16), (4, 8, 16, 32, 64, 128, 256, 512)
MOST_OF_REFERENCE = 128  # frames on a CPU, where each takes it a tenth of a second or more


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "frames" in metafunc.fixturenames:
        metafunc.parametrize("frames", FULL if metafunc.config.getoption("full") else SHORT)


@pytest.mark.parametrize("series", [CLIPS, ONE_CLIP])
def test_frames(bench: Bench, series: str, frames: int, device: str) -> None:
    case = _case(series, frames)
    contest = tower.contenders(_dtype(device), device=device)
    ours, peers = contest.calls(case.pixel_values(contest.dtype))
    few = case.fits(device) and (device != "cpu" or frames <= MOST_OF_REFERENCE)
    bench.row(_labels(series, frames, device), ours, {"reference": peers["reference"]} if few else {},
              partial(tower.errors, case, contest, False), tower.cost(case, contest.dtype, False))


def test_memory(bench: Bench, full: bool, frames: int, device: str) -> None:
    """Peaks above the weights; in a short run only of the first two sizes, for each takes processes of its own."""
    if frames > (64 if full else SHORT[1]):
        pytest.skip(f"peak memory of {frames} frames")
    dtype, case = _dtype(device), _case(CLIPS, frames)
    names = {OURS: "ours", "reference": "reference"}
    bench.value(_labels(CLIPS, frames, device), "peak_bytes", {
        name: memory.of_tower(contender, dtype, "forward", case.clips, case.frames, device)
        for name, contender in names.items()})


def test_threads(bench: Bench, device: str) -> None:
    if device != "cpu":
        pytest.skip("threads are a CPU's")
    case, most = tower.CASES["8 frames"], torch.get_num_threads()
    contest = tower.contenders(torch.float32, device=device)
    ours, peers = contest.calls(case.pixel_values(torch.float32))
    counts = sorted({*(2**i for i in range(most.bit_length()) if 2**i < most), most})
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            on_threads = replace(bench, facts={**bench.facts, "threads": threads})
            on_threads.row(_labels(THREADS, 8, device), ours, {"reference": peers["reference"]},
                           partial(tower.errors, case, contest, False), tower.cost(case, torch.float32, False))
    finally:
        torch.set_num_threads(most)


def _case(series: str, frames: int) -> tower.Case:
    return tower.Case(clips=frames // 4) if series == CLIPS else tower.Case(clips=1, frames=frames)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _labels(op: str, frames: int, device: str) -> dict[str, str]:
    return {"op": op, "size": f"{frames} frames", "dtype": str(_dtype(device)).removeprefix("torch."),
            "backend": "auto"}
