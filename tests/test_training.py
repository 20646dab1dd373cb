"""Training as a user runs it: learning, dropout, activation checkpointing, autocast, and gradients that repeat."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compile import clips
from test_nn import DIM, lively, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import python_ref
from panda_kernels.nn import STAB
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import learn

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, tokens: Tensor) -> Gradients:
    model.zero_grad(set_to_none=True)
    tokens.float().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_bits(one: Gradients, other: Gradients) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_tower_learns_as_the_released_one_does() -> None:
    ours, released = learn.losses(STAB), learn.losses(python_ref.STAB)
    assert released[-1] < 0.2 * released[0]
    # Rounding is all that differs, and fifty steps have not amplified it to a thousandth.
    assert max(abs(a - b) for a, b in zip(ours, released, strict=True)) < 1e-3 * released[0]


def test_dropout_follows_torchs_generator_and_gradients_repeat() -> None:
    tower, (x, rectangles) = lively(STAB(DIM)).train(), clips(2, 4)

    def step(seed: int) -> Gradients:
        torch.manual_seed(seed)
        return gradients(tower, tower(x.float(), rectangles).tokens)

    assert same_bits(step(0), step(0))
    assert not same_bits(step(0), step(1))


def test_activation_checkpointing() -> None:
    tower, (x, rectangles) = lively(STAB(DIM)).double().train(), clips(2, 4)
    norm: Any = tower.lmhra1.pos_embed[0]
    norm.eval()  # recomputing would update its statistics twice

    def step(run: Any) -> Gradients:
        torch.manual_seed(0)
        return gradients(tower, run(x, rectangles).tokens)

    plain, recomputed = step(tower), step(lambda *args: checkpoint(tower, *args, use_reentrant=False))
    assert same_bits(plain, recomputed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """docs/numerics.md, "Autocast": tokens in autocast's dtype, gradients in the parameters', errors as released."""
    ours, reference = pair(dropout=0.0)
    x, rectangles = clips(2, 4)
    masked = torch.cat([x, mask_of(rectangles, x)], 2)
    exact = gradients(reference, torch.cat(reference(masked, nn.Identity())[0]))
    errors = []
    for tower in (ours.float(), reference.float()):
        with torch.autocast("cpu", dtype):
            if isinstance(tower, STAB):
                tokens = tower(x.float(), rectangles).tokens
                assert tokens.dtype == dtype
            else:
                tokens = torch.cat(tower(masked.float(), nn.Identity())[0])
        found = gradients(tower, tokens)
        assert all(g.dtype == torch.float32 for g in found.values())
        errors.append(torch.tensor([relative_error(found[name].double(), exact[name]) for name in exact]))
    assert errors[0].square().mean().sqrt() <= 1.2 * errors[1].square().mean().sqrt()


def mask_of(rectangles: Rectangles, x: Tensor) -> Tensor:
    mask = torch.zeros_like(x[:, :, :1])
    for i, (row0, row1, col0, col1) in enumerate(14 * rectangles.corners):
        mask[i // x.shape[1], i % x.shape[1], :, row0:row1, col0:col1] = 1
    return mask


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_given_rectangles_nothing_waits_for_the_gpu(train: bool) -> None:
    tower = lively(STAB(DIM)).cuda().train(train)
    x, rectangles = clips(2, 4)
    x, on_gpu = x.float().cuda(), Rectangles(rectangles.corners.cuda(), rectangles.num_windows, rectangles.num_tokens)
    gradients(tower, tower(x, on_gpu).tokens)  # the first call compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(tower, tower(x, on_gpu).tokens)
        with pytest.raises(RuntimeError):
            x.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
