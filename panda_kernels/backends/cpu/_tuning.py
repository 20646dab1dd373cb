"""How much of a call the compiled core takes at a time (csrc/core/tuning.h), set before each call it matters to."""
from __future__ import annotations

import threading
from dataclasses import astuple, dataclass

from torch import Tensor

from ...tuning import Space, choose
from ...tuning.space import Value
from ._arrays import kernels


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """In the order of ``set_tuning`` in csrc/bindings.cpp; its limits are in csrc/core/tuning.cpp."""

    band_tokens: int = 512
    product_rows: int = 512
    block_windows: int = 64
    stencil_rows: int = 8
    staged_channels: int = 256


DEFAULT = Tuning()


class _Thread(threading.local):
    tuning = DEFAULT


_thread = _Thread()


def tune(space: Space, like: Tensor, heuristic: Tuning = DEFAULT, **shape: Value) -> None:
    """Give this thread's next calls of the core the parameters of ``space`` that were measured for such a call, or
    those of the heuristic."""
    wanted = choose(space, heuristic, like, **shape)
    if wanted is not _thread.tuning and wanted != _thread.tuning:
        kernels.set_tuning(list(astuple(wanted)))
        _thread.tuning = wanted
