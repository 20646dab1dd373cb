"""The paper's Table 3 on this machine: STAB with its projector against the encoders that it replaces."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import encoders, memory, tower
from bench.encoders import CLIP_8, CLIP_100, FRAMES
from bench.half_products import peer_dtype
from bench.measure import Bench, Call
from bench.records import OURS, Row

CASE = tower.CASES["8 frames"]


def test_encoders(bench: Bench, full: bool, dtype: torch.dtype, device: str) -> None:
    if not encoders.available():
        pytest.skip("Table 3, because transformers is not installed")
    if peer_dtype(dtype, device) != dtype:
        pytest.skip(f"Table 3 in {dtype}, in which torch has no products here")
    on_gpu = device != "cpu"
    contest = tower.contenders(dtype, device=device, projected=True)
    ours, peers = contest.calls(CASE.pixel_values(dtype))
    # On a CPU a frame of ViT-L takes seconds, and no frame sees another: time is in proportion to their number.
    measured = {name: frames if on_gpu else (8 if full else 1) for name, frames in FRAMES.items()}
    calls: dict[str, Call] = {"reference": peers["reference"]}
    for name in FRAMES if on_gpu else (CLIP_8,):
        frames = encoders.frames(measured[name], dtype, device)
        calls[name] = partial(encoders.encoder(name, dtype, device), frames)
    labels = {"op": encoders.OP, "size": encoders.SIZE, "dtype": str(dtype).removeprefix("torch."), "backend": "auto"}
    bench.row(labels, ours, calls, partial(tower.errors, CASE, contest, True), tower.cost(CASE, dtype, True),
              scales={CLIP_8: _scale(8, measured[CLIP_8])})
    if not on_gpu:
        bench.rows.append(_scaled_row(bench, measured[CLIP_8]))
    counts = encoders.counts()
    parameters = {OURS: counts["reference"][0]} | {name: count for name, (count, _) in counts.items()}
    bench.value(labels, "parameters", parameters)
    bench.value(labels, "multiply_adds", {OURS: tower.cost(CASE, dtype, True).flops // 2}
                | {name: count for name, (_, count) in counts.items()})
    if full or on_gpu:
        above = {name: memory.of_encoder(name, dtype, frames, device) for name, frames in measured.items()}
        weights = {name: parameters[name] * dtype.itemsize for name in measured}
        bench.value(labels, "memory_bytes", {name: above[name] + weights[name] for name in measured})


def _scale(frames: int, measured: int) -> tuple[float, str]:
    return frames / measured, "" if frames == measured else f"the time of {measured} of {frames} frames, scaled"


def _scaled_row(bench: Bench, measured: int) -> Row:
    """Video-ChatGPT's 100 frames by the time of CLIP over 8."""
    factor, note = _scale(100, measured)
    by_frame = next(row for row in reversed(bench.rows) if row.contender == CLIP_8)
    factor *= measured / 8
    return replace(by_frame, contender=CLIP_100, median=factor * by_frame.median, min=factor * by_frame.min,
                   max=factor * by_frame.max, note=note, first_call_seconds=None)
