"""The CPU core's parameters: no value changes a bit, but of one gradient; a wrong one is refused; each thread has its
own."""
from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from op_cases import assert_as_close_as_torch, cotangent
from torch import Tensor

from panda_kernels import Rectangles, backends
from panda_kernels.nn import STAB
from panda_kernels.ops import SPECS
from panda_kernels.spec import Draw
from panda_kernels.verify import arguments, seeded_tower

if reason := backends.load_error("cpu"):
    pytest.skip(reason, allow_module_level=True)

from panda_kernels.backends.cpu import _tuning
from panda_kernels.backends.cpu._arrays import kernels
from panda_kernels.backends.cpu._tuning import DEFAULT, Tuning

# Least and most, and so small that every op below is cut into several blocks, the last of them uneven.
SETTINGS = [
    Tuning(band_tokens=1, product_rows=1, block_windows=1, stencil_rows=1, staged_channels=64),
    Tuning(band_tokens=7, product_rows=5, block_windows=3, stencil_rows=3, staged_channels=192),
    Tuning(band_tokens=11, product_rows=3, block_windows=2, stencil_rows=2, staged_channels=128),
    Tuning(band_tokens=65536, product_rows=65536, block_windows=4096, stencil_rows=64, staged_channels=4096),
]
SIZES: dict[str, dict[str, Any]] = {
    "depthwise_conv3d": {"shape": (2, 5, 9, 3, 200)},
    "local_encoding": {"shape": (2, 3, 7, 4, 136)},
    "patch_embed": {"shape": (3, 2, 28, 70), "channels": 48},
    "token_mlp": {"shape": (23, 40), "hidden": 72},
    "window_attention_pool": {"grid": (6, 8), "corners": ((0, 6, 0, 8), (1, 5, 2, 8)), "channels": 48, "num_heads": 3},
}
DTYPES = [torch.float32, torch.bfloat16]
Setting = Callable[[Tuning], None]


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """Has every call take these parameters."""
    yield lambda tuning: monkeypatch.setattr(_tuning, "choose", lambda *args, **shape: tuning)
    monkeypatch.undo()
    kernels.set_tuning(list(astuple(DEFAULT)))
    _tuning._thread.tuning = DEFAULT


def run(op: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The result, and the gradients by name."""
    module, inputs = import_module(f"panda_kernels.backends.cpu.{op}"), SPECS[op].inputs(SIZES[op], dtype)
    values = arguments(SPECS[op], inputs)
    y = module.fwd(*values)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    needs = [inputs[name].dtype.is_floating_point for name in names]
    grads = module.bwd(cotangent(y), *values, needs=needs)
    return {"result": y} | {n: g for n, g, needed in zip(names, grads, needs, strict=False) if needed}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", SIZES)
def test_no_parameter_changes_a_bit(op: str, dtype: torch.dtype, setting: Setting) -> None:
    before = run(op, dtype)
    for tuning in SETTINGS:
        setting(tuning)
        for name, tensor in run(op, dtype).items():
            if (op, name) != ("patch_embed", "weight"):  # summed band by band
                assert torch.equal(tensor, before[name]), f"{tuning} changes {name}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_summed_by_bands_stays_exact_and_repeats(dtype: torch.dtype, setting: Setting) -> None:
    inputs = SPECS["patch_embed"].inputs(SIZES["patch_embed"], dtype)
    for tuning in SETTINGS:
        setting(tuning)
        result, again = run("patch_embed", dtype), run("patch_embed", dtype)
        assert torch.equal(result["weight"], again["weight"])
        y = result.pop("result")
        assert_as_close_as_torch(SPECS["patch_embed"], (y, result), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frames", [1, 5])
def test_no_parameter_changes_a_bit_of_the_tower(frames: int, dtype: torch.dtype, setting: Setting) -> None:
    tower, h, w = STAB(136, dtype=dtype).eval(), 7, 6
    tower.load_state_dict(seeded_tower(136).state_dict())
    pixels, mask = Draw(0, dtype)(2, frames, 3, 14 * h, 14 * w), torch.ones(2, frames, 14 * h, 14 * w)
    mask[1, 0, :, :28] = 0
    rectangles = Rectangles.from_mask(mask)
    with torch.no_grad():
        before = tower(pixels, rectangles).tokens
        assert bool(before.isfinite().all())
        for tuning in SETTINGS:
            setting(tuning)
            assert torch.equal(tower(pixels, rectangles).tokens, before), tuning


WRONG = [({"band_tokens": 0}, "band_tokens: expected an integer from 1 to 65536, got 0"),
         ({"product_rows": -5}, "product_rows: expected an integer from 1 to 65536, got -5"),
         ({"block_windows": 4097}, "block_windows: expected an integer from 1 to 4096, got 4097"),
         ({"stencil_rows": 65}, "stencil_rows: expected an integer from 1 to 64, got 65"),
         ({"staged_channels": 100}, "staged_channels: expected a multiple of 64 from 64 to 4096, got 100")]


@pytest.mark.parametrize(("wrong", "said"), WRONG)
def test_a_wrong_value_is_refused_and_changes_nothing(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        kernels.set_tuning(list(astuple(replace(DEFAULT, **{"stencil_rows": 4} | wrong))))
    with pytest.raises(RuntimeError, match="expected 5 parameters, got 1"):
        kernels.set_tuning([1])
    assert kernels.set_tuning(list(astuple(DEFAULT))) == list(astuple(DEFAULT))


def test_each_thread_begins_with_the_defaults_and_keeps_its_own(setting: Setting) -> None:
    odd, found = SETTINGS[-1], []
    setting(odd)
    run("depthwise_conv3d", torch.float32)
    thread = threading.Thread(target=lambda: found.append(kernels.set_tuning(list(astuple(SETTINGS[0])))))
    thread.start()
    thread.join()
    assert found == [list(astuple(DEFAULT))]
    assert kernels.set_tuning(list(astuple(DEFAULT))) == list(astuple(odd))
