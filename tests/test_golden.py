"""Our modules meet the released tower's outputs, gradients and running statistics.

In float64 to the rounding of the stored numbers; in float32 and bfloat16, by every backend that is there, with at most
1.2 times the error that the released arithmetic itself has in that dtype, and in no parameter's gradient more than 1.5
times, above one rounding.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import weights as golden
from torch import Tensor, nn

import python_ref
from bench.half_products import products_in
from panda_kernels import backends
from panda_kernels.nn import STAB

CASES = Path(__file__).parent / "golden"
EXACT = 1e-6
OWN_ERROR, OWN_ERROR_OF_ONE = 1.2, 1.5
BACKENDS = [name for name, reason in backends.status().items() if reason is None]
FORWARD, GRADIENTS = ("video_full", "video_ragged", "image"), ("grad_eval", "grad_train")


class Run:
    """One case through a tower: tokens of each frame, grid, and for the gradient cases the loss and all gradients."""

    def __init__(self, tower: nn.Module, case: str) -> None:
        dtype = next(tower.parameters()).dtype
        self.gradients: dict[str, Tensor] = {}
        with products_in(dtype):
            self.run(tower, case, dtype)
        self.buffers = {name: buffer.clone() for name, buffer in tower.named_buffers()}
        tower.zero_grad()

    def run(self, tower: nn.Module, case: str, dtype: torch.dtype) -> None:
        pixels = torch.from_numpy(golden.pixels(case, **golden.CASES[case])).to(dtype)
        tower.train(case == "grad_train")
        wants_gradients = case in GRADIENTS
        with torch.set_grad_enabled(wants_gradients):
            pixels.requires_grad_(wants_gradients)
            if isinstance(tower, STAB):
                output = tower(pixels)
                tokens = output.tokens.split(output.cu_seqlens.diff().tolist())
                self.grid = output.grid
            else:
                tokens, grids = tower(pixels, nn.Identity())
                self.grid = torch.stack(grids)
        self.tokens = [frame.detach() for frame in tokens]
        if wants_gradients:
            cotangents = [torch.from_numpy(golden.cotangent(case, i, tuple(t.shape))) for i, t in enumerate(tokens)]
            loss = (torch.cat(tuple(tokens)) * torch.cat(cotangents).to(dtype)).sum()
            loss.backward()
            self.loss = loss.item()
            assert pixels.grad is not None
            self.pixel_gradient = pixels.grad
            self.gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}


def expected(case: str) -> Any:
    return np.load(CASES / f"{case}.npz")


def error(actual: Tensor, reference: np.ndarray) -> float:
    exact = torch.from_numpy(reference).double()
    return float((actual.double() - exact).norm() / exact.norm())


def head(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // 64)][:64]


def errors(run: Run, case: str, exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of the stored tokens and, for the gradient cases, of the pixels' and the parameters' gradients.

    The parameters' are compared whole with ``exact``, the float64 reference's, which the stored heads vouch for: one
    head of 64 elements that happens to round well would decide the mean of all of them.
    """
    want = expected(case)
    rows = torch.cat([tokens[want[f"rows{i}"]] for i, tokens in enumerate(run.tokens)])
    found = {"tokens": error(rows, np.concatenate([want[f"tokens{i}"] for i in range(len(run.tokens))]))}
    if run.gradients:
        found["pixels"] = error(run.pixel_gradient[:, :, :, ::37, ::37], want["grad_pixels"])
        each = {f"gradient of {name}": error(g, exact[name].numpy()) for name, g in run.gradients.items()}
        found["parameters"] = float(torch.tensor(list(each.values())).square().mean().sqrt())
        found |= each
    return found


def tower(cls: type[nn.Module], weights: dict[str, Tensor], dtype: torch.dtype, backend: str = "torch") -> nn.Module:
    built = cls(dropout=0.0).to(dtype)
    built.load_state_dict(weights)
    if isinstance(built, STAB):
        built.backend = backend
    return built


@pytest.fixture(scope="session")
def exact_gradients(golden_weights):
    """All parameters' gradients of a case in float64, empty for the forward cases."""

    @cache
    def measure(case: str) -> dict[str, Tensor]:
        return Run(tower(python_ref.STAB, golden_weights, torch.float64), case).gradients if case in GRADIENTS else {}

    return measure


@pytest.fixture(scope="session")
def released_errors(golden_weights, exact_gradients):
    """Errors of the released arithmetic, of a case in a dtype."""

    @cache
    def measure(case: str, dtype: torch.dtype) -> dict[str, float]:
        return errors(Run(tower(python_ref.STAB, golden_weights, dtype), case), case, exact_gradients(case))

    return measure


@pytest.mark.parametrize("case", FORWARD + GRADIENTS)
def test_float64_is_exact(case, golden_weights):
    run, want = Run(tower(STAB, golden_weights, torch.float64), case), expected(case)
    assert run.grid.tolist() == want["hw"].tolist()
    for i, tokens in enumerate(run.tokens):
        assert tokens.shape == (want[f"count{i}"], golden.DIM)
        assert error(tokens[want[f"rows{i}"]], want[f"tokens{i}"]) < EXACT
        assert abs(float(tokens.norm()) / want[f"norm{i}"] - 1) < EXACT
    if case in GRADIENTS:
        assert_gradients(run, want)
    if case == "grad_train":
        for name in ("lmhra1.pos_embed.0.running_mean", "lmhra1.pos_embed.0.running_var"):
            assert error(run.buffers[name], want[f"buffer:{name}"]) < EXACT
        assert run.buffers["lmhra1.pos_embed.0.num_batches_tracked"] == 1
        assert run.buffers["lmhra2.pos_embed.0.num_batches_tracked"] == 0


def assert_gradients(run: Run, want: Any) -> None:
    assert abs(run.loss / want["loss"] - 1) < EXACT
    assert not run.pixel_gradient[:, :, 3].any()
    assert error(run.pixel_gradient[:, :, :, ::37, ::37], want["grad_pixels"]) < EXACT
    assert abs(float(run.pixel_gradient.norm()) / want["grad_pixels_norm"] - 1) < EXACT
    assert set(run.gradients) == {key.removeprefix("grad_norm:") for key in want.files if key.startswith("grad_norm:")}
    for name, gradient in run.gradients.items():
        assert error(head(gradient), want[f"grad_head:{name}"]) < EXACT, name
        assert abs(float(gradient.norm()) / want[f"grad_norm:{name}"] - 1) < EXACT, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", FORWARD + GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_is_no_more_than_the_released_arithmetics(backend, case, dtype, golden_weights, released_errors,
                                                        exact_gradients):
    found = errors(Run(tower(STAB, golden_weights, dtype, backend), case), case, exact_gradients(case))
    released = released_errors(case, dtype)
    limits = {name: OWN_ERROR_OF_ONE * e + torch.finfo(dtype).eps if name.startswith("gradient of ") else OWN_ERROR * e
              for name, e in released.items()}
    assert {name: (e, limits[name]) for name, e in found.items() if not e <= limits[name]} == {}
