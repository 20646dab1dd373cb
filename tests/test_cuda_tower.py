"""The tower with the kernels of csrc/cuda, emulated on CPU tensors where there is no GPU."""
from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import test_triton_tower as by_triton
from test_cuda_ops import DEVICE, buffers  # noqa: F401
from test_triton_tower import CASES, by_reference, frames_of, tower_of
from tower_cases import errors

from panda_kernels.backends.cuda import stab_tower, window_attention_pool
from panda_kernels.nn.stab import prepared_by
from panda_kernels.spec import Tolerance

SERVED = [("image_bytes", torch.float32), ("two", torch.bfloat16), ("even_heads", torch.bfloat16),
          ("even_heads", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), SERVED)
def test_close_to_float64(name: str, dtype: torch.dtype) -> None:
    x, rectangles, present = frames_of(name)
    (exact, _), (plain, _) = by_reference(name, torch.float64), by_reference(name, dtype)
    with torch.no_grad():
        prepared = prepared_by(stab_tower, tower_of(name, dtype)[0])
        corners = rectangles.corners.to(DEVICE)
        tokens, cu_seqlens, _ = stab_tower.run(prepared, x.to(DEVICE), rectangles._replace(corners=corners),
                                               None if present is None else present.to(DEVICE))
    ours, theirs = (errors(y, exact, cu_seqlens.cpu()[:-1]) for y in (tokens.cpu(), plain))
    limits = [Tolerance().limit(error, dtype) for error in theirs]
    assert ours[0] <= limits[0] and ours[1] <= limits[1], f"errors {ours}, torch's own {theirs}"


@by_triton.BY_FP8
def test_by_fp8_no_worse_than_composed() -> None:
    ours, composed = by_triton.errors_by_fp8("even_heads", torch.bfloat16, stab_tower)
    assert 1e-3 < ours[1] < 0.1 and all(a < 1.2 * b for a, b in zip(ours, composed, strict=True)), (ours, composed)


def test_the_attention_of_windows_is_where_it_serves() -> None:
    served = {name: not window_attention_pool.unserved(torch.bfloat16, case.dim, case.heads, case.window)
              for name, case in CASES.items()}
    assert served["even_heads"] and not served["two"]
    towers = {name: prepared_by(stab_tower, tower_of(name, torch.bfloat16)[0]) for name in ("even_heads", "two")}
    ours, tritons = window_attention_pool.head_outputs, by_triton.stab_tower.window_attention_pool.head_outputs
    assert ours in towers["even_heads"].window_pool.args and tritons in towers["two"].window_pool.args
