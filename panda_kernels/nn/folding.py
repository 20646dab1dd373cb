"""Tensors computed from a module's weights once, and kept until one of the weights changes."""
from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..ops._autocast import is_autocasting
from ..ops._register import is_traced
from .cuda_graph import is_recording

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# Fused optimizers write the weights without counting it in the version.
register_optimizer_step_post_hook(_count_step)


def modules_of(module: nn.Module) -> list[nn.Module]:
    """``module`` and every module in it, once; ``module.modules()`` takes five times as long, for each call."""
    found, known = [module], {module}
    for part in found:
        for child in part._modules.values():
            if child is not None and child not in known:
                known.add(child)
                found.append(child)
    return found


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for part in modules_of(module) for held in (part._parameters, part._buffers) for t in held.values()
            if t is not None]


def can_fold(module: nn.Module) -> bool:
    """Whether weights may be taken as constants: evaluation mode, no gradient wanted, and nothing being traced."""
    if module.training or is_traced():
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(module)))


def can_serve(module: nn.Module, x: Tensor) -> bool:
    """Whether what is kept of the weights may serve a call on ``x``: besides :func:`can_fold`, no gradient of ``x`` is
    wanted and no autocast would change its dtype."""
    return not ((torch.is_grad_enabled() and x.requires_grad) or is_autocasting(x)) and can_fold(module)


class Folded(Generic[M, T]):
    """``build(module)``, computed at the first :meth:`get` and again after any parameter or buffer has changed.

    A change is a tensor replaced (``.to``, ``load_state_dict(assign=True)``, a new ``Parameter``) or written in place
    (``load_state_dict``, ``copy_``): storage, address and torch's version counter are compared. Any optimizer's step
    counts as a change, and so does another ``backend`` or ``products`` of a module that has one. Torch does not count
    writes through ``.data``; call :meth:`clear` after them. Weights made in inference mode have no counter, so what
    follows from them is never kept.

    Only for use where :func:`can_fold` holds. ``build`` runs without gradients and outside autocast; to pickle the
    module it must be a module-level function.
    """

    def __init__(self, module: M, build: Callable[[M], T]) -> None:
        self.module = module
        self.build = build
        self._kept: tuple[tuple[object, ...], list[StorageWeakRef], T] | None = None

    def get(self) -> T:
        tensors = tensors_of(self.module)
        if any(t.is_inference() for t in tensors):
            warnings.warn(f"{type(self.module).__name__}: weights made or moved in inference mode have no version, so "
                          "what follows from them is computed at every call; make them outside it", stacklevel=2)
            return self._build(tensors)
        settings = getattr(self.module, "backend", None), getattr(self.module, "products", None)
        key = (_steps, *settings, [_identity(t) for t in tensors])
        if self._kept is None or self._kept[0] != key:
            if is_recording(tensors[0].device):  # what is only noted down has no value yet
                return self._build(tensors)
            # The weak references keep a freed storage's identity from being given to a new one.
            references = [StorageWeakRef(t.untyped_storage()) for t in tensors]
            self._kept = (key, references, self._build(tensors))
        return self._kept[2]

    def clear(self) -> None:
        """Forget the value."""
        self._kept = None

    def _build(self, tensors: list[Tensor]) -> T:
        with torch.no_grad(), torch.autocast(tensors[0].device.type, enabled=False):
            return self.build(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Folded[M, T]:
        return Folded(copy.deepcopy(self.module, memo), self.build)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "build": self.build, "_kept": None}


def _identity(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.untyped_storage()._cdata, tensor.data_ptr(), tensor._version
