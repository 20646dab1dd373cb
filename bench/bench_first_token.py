"""The wait for the first token, through the released arithmetic and through ours."""
from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import encoders, first_token, tower
from bench.half_products import peer_dtype
from bench.measure import Bench
from panda_kernels.spec import Cost


def test_first_token(bench: Bench, full: bool, dtype: torch.dtype, device: str) -> None:
    if not encoders.available():
        pytest.skip("the wait for the first token, because transformers is not installed")
    if peer_dtype(dtype, device) != dtype:
        pytest.skip(f"the wait for the first token in {dtype}, in which torch has no products here")
    case = "8 frames" if full or device != "cpu" else "720p clip"
    race = first_token.FirstToken(tower.CASES[case], dtype, device)
    pixels = tower.CASES[case].pixel_values(dtype).to(device)
    labels = {"size": f"{case}, {race.shape.name}", "dtype": str(dtype).removeprefix("torch."), "backend": "auto"}
    check = partial(race.errors, pixels)
    # What the decoder costs is not ours to count, so neither are the least bytes and operations of the whole.
    bench.row({"op": first_token.OP} | labels, partial(race.whole, race.ours, pixels),
              {"reference": partial(race.whole, race.reference, pixels)}, check, Cost(0, 0))
    bench.row({"op": first_token.VISUAL} | labels, partial(race.ours, pixels),
              {"reference": partial(race.reference, pixels)}, check, Cost(0, 0))
