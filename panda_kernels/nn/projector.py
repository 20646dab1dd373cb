"""The projector: from the tower's tokens to the language model's width (SPEC stage 10)."""
from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, checkpoint, fp8, ops
from .folding import Folded, can_serve
from .has_backend import HasBackend


class Projector(HasBackend, nn.Sequential, fp8.HasProducts):
    """``Linear(dim -> out_dim)``, exact GELU, ``Linear(out_dim -> out_dim)`` on every token.

    The children ``0`` and ``2`` hold the parameters, as in the checkpoints.

    Attributes:
        backend: which implementation of the op to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.
        products: ``native`` (the default), or ``fp8`` for both products in e4m3 (panda_kernels/fp8.py), whatever the
            backend: on GPUs that multiply it, elsewhere emulated and slow. Only in inference; where a gradient is
            wanted, in training mode, under autocast and in a compiled graph they stay native. Setting another name
            raises ValueError.

    Source: SPEC stage 10.
    """

    def __init__(self, dim: int = 1024, out_dim: int = 4096, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__(nn.Linear(dim, out_dim, device=device, dtype=dtype), nn.GELU(),
                         nn.Linear(out_dim, out_dim, device=device, dtype=dtype))
        self.products = "native"
        self._prepared = Folded(self, _prepare)

    def train(self, mode: bool = True) -> Projector:
        self._prepared.clear()
        return super().train(mode)

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], *, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> Projector:
        """The projector of a checkpoint, in evaluation mode; sizes are those of its tensors.

        ``path``, ``dtype``, ``device`` and what is raised are those of :meth:`STAB.from_checkpoint`; the tensors are
        named ``model.video_projector.*``, ``model.mm_projector.*`` or, bare, ``{0,2}.{weight,bias}``.
        """
        tensors = checkpoint.read(path, checkpoint.PROJECTOR_PREFIXES, cls(device="meta").state_dict())
        first = tensors.get("0.weight")
        out_dim, dim = first.shape if first is not None and first.ndim == 2 else (4096, 1024)
        return checkpoint.fill(cls(dim, out_dim, device="meta"), tensors, path, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[..., dim]`` of the parameters' dtype -> ``[..., out_dim]``.

        Raises:
            ValueError: a wrong width, no tokens, or tensors on several devices.
            TypeError: dtypes that differ.
        """
        can_prepare = self._can_prepare(x)
        if can_prepare and self.products == "fp8":
            return _by_fp8(x, *self._prepared.get())
        server = _preparing_backend(self) if can_prepare else None
        if server is None:
            return ops.token_mlp(x, *_weights(self), backend=self.backend)
        return server.run(self._prepared.get(), x)

    def constants(self) -> object:
        """What inference keeps of the weights: another object after a change of them or of ``products``, and after
        ``eval()``."""
        return self._prepared.get()

    def _can_prepare(self, x: Tensor) -> bool:
        """Inference on tokens that need no check by the op: packed weights can be kept from call to call."""
        weight = _weights(self)[0]
        if x.dtype != weight.dtype or x.device != weight.device or not x.numel():
            return False
        return x.ndim > 0 and x.shape[-1] == weight.shape[1] and can_serve(self, x)


def _weights(projector: Projector) -> tuple[Tensor, ...]:
    parts: Any = projector
    first, _, last = parts
    return first.weight, first.bias, last.weight, last.bias


def _preparing_backend(projector: Projector) -> Any:
    return backends.first("token_mlp", "prepare", projector.backend, _weights(projector))


def _prepare(projector: Projector) -> Any:
    """The weights quantised, or as the backend that packs them wants them; as they are where none does."""
    w1, b1, w2, b2 = weights = _weights(projector)
    if projector.products == "fp8":
        return fp8.prepare(w1, b1), fp8.prepare(w2, b2)
    server = _preparing_backend(projector)
    return weights if server is None else server.prepare(*weights)


def _by_fp8(x: Tensor, first: fp8.Fp8Weight, last: fp8.Fp8Weight) -> Tensor:
    hidden = fp8.product(fp8.quantise(x), first, x.dtype)
    return fp8.product(fp8.quantise(hidden, gelu=True), last, x.dtype).view(*x.shape[:-1], -1)
