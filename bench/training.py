"""A training step of the whole tower: forward by batch statistics, and backward; no dropout, no optimizer."""
from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

import python_ref
from panda_kernels.nn import STAB
from panda_kernels.spec import Draw, Tolerance, relative_error

from . import tower
from .half_products import peer_dtype, peer_name, yardstick
from .measure import Errors
from .tower import CASES, DIM, Contenders, Run


def contenders(dtype: torch.dtype, *, device: str) -> Contenders:
    """Ours and the reference with the same weights, each from pixels to all gradients in one vector."""
    ours = _with_weights(STAB(DIM, dropout=0.0), dtype, device)
    peers = {peer_name("reference", dtype, device): _reference_step(peer_dtype(dtype, device), device)}
    return Contenders(dtype, device, _step(ours, lambda pixels: ours(pixels).tokens), peers)


def errors(contest: Contenders) -> Errors:
    """Of the gradients of one clip, against the reference in float64."""
    pixels = CASES["1 clip"].pixel_values(contest.dtype).to(contest.device)
    ours = relative_error(contest.ours(pixels).cpu(), _exact())
    reference = _reference_error(contest.dtype, contest.device)
    return Errors(ours, reference, Tolerance().limit(reference, contest.dtype, backward=True))


@functools.cache
def _exact() -> Tensor:
    return _reference_step(torch.float64, "cpu")(CASES["1 clip"].pixel_values(torch.float64))


@functools.cache
def _reference_error(dtype: torch.dtype, device: str) -> float:
    with yardstick(dtype, device):
        gradients = _reference_step(dtype, device)(CASES["1 clip"].pixel_values(dtype).to(device))
    return relative_error(gradients.cpu(), _exact())


def _reference_step(dtype: torch.dtype, device: str) -> Run:
    reference = _with_weights(python_ref.STAB(DIM, dropout=0.0), dtype, device)
    return _step(reference, tower.packed(reference, tower.identity))


def _with_weights(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    module.load_state_dict(tower.weights()[0].state_dict())
    # The second bottleneck is never called, and has no gradients.
    module.get_submodule("lmhra2").requires_grad_(False)
    return module.to(device, dtype).train()


def _step(module: nn.Module, run: Run) -> Run:
    """Forward and backward alone are timed: all gradients lie in the vector that is the result from the start."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.zeros_like(nn.utils.parameters_to_vector(parameters), requires_grad=False)
    for parameter, gradient in zip(parameters, gradients.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)

    def step(pixels: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            gradients.zero_()
            tokens = run(pixels.clone() if pixels.is_inference() else pixels)
            tokens.backward(_upstream(tokens.shape, tokens.dtype, tokens.device))
        return gradients

    return step


@functools.cache
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return Draw(2, dtype)(*shape).to(device)
