"""A training step of the whole tower: forward by batch statistics, and backward; no dropout, no optimizer."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import python_ref
from panda_kernels.nn import STAB
from panda_kernels.spec import Draw, Tolerance, relative_error

from . import tower
from .measure import Errors
from .tower import CASES, DIM, Contenders


def contenders(dtype: torch.dtype, *, device: str) -> Contenders:
    """Ours and the reference with the same weights, each from pixels to all gradients in one vector."""
    ours, reference = (_with_weights(cls(DIM, dropout=0.0), dtype, device) for cls in (STAB, python_ref.STAB))
    return Contenders(_step(ours, lambda pixels: ours(pixels).tokens),
                      {"reference": _step(reference, tower.packed(reference, tower.identity))})


def errors(contest: Contenders, dtype: torch.dtype, device: str) -> Errors:
    """Of the gradients of one clip, against the reference in float64."""
    case = CASES["1 clip"]
    exact = contenders(torch.float64, device="cpu").peers["reference"](case.pixel_values(torch.float64))
    ours, reference = (relative_error(run(case.pixel_values(dtype).to(device)).cpu(), exact)
                       for run in (contest.ours, contest.peers["reference"]))
    return Errors(ours, reference, Tolerance().limit(reference, dtype, backward=True))


def _with_weights(module: nn.Module, dtype: torch.dtype, device: str) -> nn.Module:
    module.load_state_dict(tower.weights()[0].state_dict())
    # The second bottleneck is never called, and has no gradients.
    module.get_submodule("lmhra2").requires_grad_(False)
    for parameter in module.to(device, dtype).parameters():
        parameter.grad = torch.zeros_like(parameter)
    return module.train()


def _step(module: nn.Module, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def step(pixels: Tensor) -> Tensor:
        module.zero_grad(set_to_none=False)
        with torch.inference_mode(False), torch.enable_grad():
            tokens = run(pixels.clone())
            tokens.backward(Draw(2, tokens.dtype)(*tokens.shape).to(tokens.device))
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None and p.requires_grad])

    return step
