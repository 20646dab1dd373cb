"""LSTE, local spatio-temporal encoding: a bottleneck over time, then a dynamic position encoding (SPEC stage 2)."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..checks import Checks
from .has_backend import HasBackend

Affine = tuple[Tensor, Tensor]
NORMS = (nn.BatchNorm3d, nn.SyncBatchNorm)


class LocalMHRA(nn.Module):
    """The parameters of one bottleneck, ``pos_embed.0..3``: BatchNorm, ``W1``, the temporal convolution and ``W2``."""

    def __init__(self, dim: int, reduction: float = 1.5, **factory: Any) -> None:
        super().__init__()
        reduced = int(dim / reduction)
        expand = nn.Conv3d(reduced, dim, 1, **factory)
        nn.init.zeros_(expand.weight)
        nn.init.zeros_(_bias(expand))
        self.pos_embed = nn.Sequential(
            nn.BatchNorm3d(dim, **factory),
            nn.Conv3d(dim, reduced, 1, **factory),
            nn.Conv3d(reduced, reduced, (3, 1, 1), padding=(1, 0, 0), groups=reduced, **factory),
            expand,
        )


def position_encoding(dim: int, **factory: Any) -> nn.Conv3d:
    """The depthwise 3x3x3 convolution of ``x2 = x1 + dw(x1)``, its bias zero at first."""
    conv = nn.Conv3d(dim, dim, 3, padding=1, groups=dim, **factory)
    nn.init.zeros_(_bias(conv))
    return conv


class Source(NamedTuple):
    """The arguments of ``patch_embed`` that gave the tokens."""

    pixels: Tensor
    embedding: Tensor
    present: Tensor | None


def encode(x: Tensor, mhra: LocalMHRA, dpe: nn.Conv3d, *, affine: Affine | None = None, source: Source | None = None,
           backend: str = "auto") -> Tensor:
    """``x0 [B, T, h, w, C]`` -> ``x2`` of that shape; ``affine`` is :func:`batch_norm_affine`, if known already."""
    Checks("LSTE").shape("x", x, ("B", "T", "h", "w", dpe.out_channels))
    norm: Any = mhra.pos_embed[0]
    affine = batch_norm_affine(norm, x) if affine is None else affine
    given = {} if source is None else source._asdict()
    return ops.local_encoding(x, *encoding_weights(mhra, dpe, affine), **given, backend=backend)


def encoding_weights(mhra: LocalMHRA, dpe: nn.Conv3d, affine: Affine) -> tuple[Tensor, ...]:
    """The arguments of ``local_encoding`` after the tokens."""
    parts: Any = mhra.pos_embed
    _, down, temporal, up = parts
    return (*affine, down.weight.flatten(1), down.bias, temporal.weight.flatten(1), temporal.bias,
            up.weight.flatten(1), up.bias, dpe.weight, _bias(dpe))


def batch_norm_affine(norm: nn.BatchNorm3d | nn.SyncBatchNorm, x: Tensor | None = None) -> Affine:
    """BatchNorm as ``x * scale + shift``, both ``[C]`` and at least float32.

    In training mode from the statistics of the tokens ``x [..., C]``, for ``SyncBatchNorm`` of those of all processes,
    differentiable through them, and the running ones are updated as torch updates them; otherwise from the running
    statistics.

    Raises:
        TypeError: a norm of another class, whose statistics these would not be.
        ValueError: training on a single token.
    """
    if type(norm) not in NORMS:
        names = " or ".join(f"torch.nn.{kind.__name__}" for kind in NORMS)
        raise TypeError(f"LSTE: pos_embed.0: expected {names}, got {type(norm).__name__}")
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    if norm.training:
        if x is None:
            raise ValueError("LSTE: x: expected tokens to take batch statistics from, got None")
        tokens = x.numel() // x.shape[-1]
        count: int | Tensor = tokens
        if tokens < 2:
            raise ValueError("LSTE: x: expected more than one token to take batch statistics from, got 1")
        mean, var = ops.batch_statistics(x).to(dtype)
        if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
            mean, var, count = _over_processes(mean, var, tokens, norm.process_group)
        _update_running_statistics(norm, mean.detach(), var.detach(), count)
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    scale = norm.weight.to(dtype) * torch.rsqrt(var + norm.eps)
    return scale, norm.bias.to(dtype) - mean * scale


def _over_processes(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None) -> tuple[Tensor, ...]:
    """Mean, biased variance and number of the tokens of all processes, which may have different numbers of them."""
    from torch.distributed.nn.functional import all_gather  # not in every build of torch

    own = torch.stack([mean, var, torch.full_like(mean, count)])
    means, variances, counts = torch.stack(all_gather(own, group or dist.group.WORLD)).unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    # Var[x] = E[Var[x | process]] + Var[E[x | process]], which subtracts no large numbers.
    return mean, (counts * (variances + (means - mean).square())).sum(0) / total, total


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm3d | nn.SyncBatchNorm, mean: Tensor, var: Tensor,
                               count: int | Tensor) -> None:
    assert norm.momentum is not None and norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    # What is stored is the unbiased variance, though the biased one normalises.
    for running, batch in ((norm.running_mean, mean), (norm.running_var, var * (count / (count - 1)))):
        assert running is not None
        running.copy_(torch.lerp(running.to(batch.dtype), batch, norm.momentum))


def _bias(conv: nn.Conv3d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


class LSTE(HasBackend):
    """``x1 = x0 + W2 tconv(W1 BN(x0) + b1) + b2``, then ``x2 = x1 + dw(x1)``.

    Args:
        dim: channels C.
        reduction: the bottleneck has ``int(C / reduction)`` channels.
        device, dtype: of the parameters.

    Attributes:
        backend: which implementation of the ops to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    ``W2`` and the biases of ``W2`` and ``dw`` are zero at first, as released; the parameters are named ``lmhra1`` and
    ``dpe`` as in the tower. Source: SPEC stage 2; arXiv 2412.18609, section 3.
    """

    def __init__(self, dim: int = 1024, *, reduction: float = 1.5, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.lmhra1 = LocalMHRA(dim, reduction, device=device, dtype=dtype)
        self.dpe = position_encoding(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[B, T, h, w, C]`` of the parameters' dtype -> the same shape and dtype.

        Raises:
            ValueError: a wrong rank or C, an empty batch, tensors on several devices, or training on a single token.
            TypeError: dtypes that differ.
        """
        return encode(x, self.lmhra1, self.dpe, backend=self.backend)
