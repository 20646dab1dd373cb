"""The reference meets the released tower's outputs, gradients and running statistics, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import weights as golden

from python_ref import STAB

CASES = Path(__file__).parent / "golden"
TOLERANCE = 1e-6


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    reference = torch.from_numpy(expected).double()
    return float((actual - reference).norm() / reference.norm())


def run(case: str, golden_weights: dict[str, torch.Tensor], *, train: bool = False) -> tuple[STAB, torch.Tensor, Any]:
    tower = STAB(dropout=0.0).double()
    tower.load_state_dict(golden_weights)
    tower.train(train)
    pixels = torch.from_numpy(golden.pixels(case, **golden.CASES[case])).double()
    return tower, pixels, np.load(CASES / f"{case}.npz")


def assert_outputs(tokens: list[torch.Tensor], grids: list[torch.Tensor], expected: Any) -> None:
    assert torch.stack(grids).tolist() == expected["hw"].tolist()
    for i, frame in enumerate(tokens):
        assert frame.shape == (expected[f"count{i}"], golden.DIM)
        assert relative_error(frame[expected[f"rows{i}"]], expected[f"tokens{i}"]) < TOLERANCE
        assert abs(float(frame.norm()) / expected[f"norm{i}"] - 1) < TOLERANCE


@pytest.mark.parametrize("case", ["video_full", "video_ragged", "image"])
def test_forward(case: str, golden_weights: dict[str, torch.Tensor]) -> None:
    tower, pixels, expected = run(case, golden_weights)
    with torch.no_grad():
        tokens, grids = tower(pixels, torch.nn.Identity())
    assert_outputs(tokens, grids, expected)


@pytest.mark.parametrize("case", ["grad_eval", "grad_train"])
def test_gradients(case: str, golden_weights: dict[str, torch.Tensor]) -> None:
    tower, pixels, expected = run(case, golden_weights, train=case == "grad_train")
    pixels.requires_grad_()
    tokens, grids = tower(pixels, torch.nn.Identity())
    assert_outputs([frame.detach() for frame in tokens], grids, expected)

    cotangents = [torch.from_numpy(golden.cotangent(case, i, tuple(frame.shape))) for i, frame in enumerate(tokens)]
    loss = (torch.cat(tokens) * torch.cat(cotangents)).sum()
    assert abs(loss.item() / expected["loss"] - 1) < TOLERANCE
    loss.backward()

    assert pixels.grad is not None
    assert not pixels.grad[:, :, 3].any()
    assert relative_error(pixels.grad[:, :, :, ::37, ::37], expected["grad_pixels"]) < TOLERANCE
    assert abs(float(pixels.grad.norm()) / expected["grad_pixels_norm"] - 1) < TOLERANCE

    gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    assert set(gradients) == {key.removeprefix("grad_norm:") for key in expected.files if key.startswith("grad_norm:")}
    assert not any(name.startswith("lmhra2.") for name in gradients)
    for name, gradient in gradients.items():
        head = gradient.flatten()[:: max(1, gradient.numel() // 64)][:64]
        assert relative_error(head, expected[f"grad_head:{name}"]) < TOLERANCE, name
        assert abs(float(gradient.norm()) / expected[f"grad_norm:{name}"] - 1) < TOLERANCE, name


def test_training_updates_the_running_statistics(golden_weights: dict[str, torch.Tensor]) -> None:
    tower, pixels, expected = run("grad_train", golden_weights, train=True)
    with torch.no_grad():
        tower(pixels, torch.nn.Identity())
    buffers = dict(tower.named_buffers())
    for name in ("lmhra1.pos_embed.0.running_mean", "lmhra1.pos_embed.0.running_var"):
        assert relative_error(buffers[name], expected[f"buffer:{name}"]) < TOLERANCE
    assert int(buffers["lmhra1.pos_embed.0.num_batches_tracked"]) == 1
    assert int(buffers["lmhra2.pos_embed.0.num_batches_tracked"]) == 0
