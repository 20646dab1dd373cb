"""Which implementation serves a call, and why another one does not.

A backend is a subpackage: ``load_error()`` says why it is absent (None if it is there), and a module an op holds
``fwd``, where it has one ``bwd``, and ``refusals(inputs)``, the reasons it cannot serve a call. The same
reasons make ``auto`` go on to the next backend and make an explicitly named one raise.
"""
from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAMES = ("cuda", "triton", "cpu", "torch")  # fastest first: the order in which "auto" asks
ON_GPU = ("cuda", "triton")  # serve nothing else
log = logging.getLogger("panda_kernels")


class BackendError(RuntimeError):
    """No backend, or not the one named, can serve a call; the message lists every reason."""


@functools.cache
def load_error(name: str) -> str | None:
    return import_module(f"{__name__}.{name}").load_error()


def status() -> dict[str, str | None]:
    """Every backend by name: None if it is usable on this machine, else the reason it is not."""
    return {name: load_error(name) for name in NAMES}


@functools.cache
def _op_module(name: str, op: str) -> ModuleType | None:
    path = f"{__name__}.{name}.{op}"
    return import_module(path) if find_spec(path) else None


def refusals(name: str, op: str, direction: str, inputs: Sequence[Any]) -> list[str]:
    """Why backend ``name`` cannot serve this call (``direction`` is ``fwd`` or ``bwd``); empty if it can."""
    if error := load_error(name):
        return [error]
    module = _op_module(name, op)
    if module is None or not hasattr(module, direction):
        return [f"has no {direction} of {op}"]
    return module.refusals(inputs)


def first(op: str, direction: str, requested: str, inputs: Sequence[Any]) -> ModuleType | None:
    """The module of the first backend asked that can serve a call of ``op``, or None; for ops that not all have.

    A name that is none is left to :func:`choose` to refuse.
    """
    for name in NAMES:
        if requested in ("auto", name) and not refusals(name, op, direction, inputs):
            return _op_module(name, op)
    return None


def choose(op: str, direction: str, requested: str, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The function that serves a call of ``op`` on ``inputs``, the op's arguments in order.

    A backward that the named backend lacks is served as by ``auto``: naming a backend names who runs the forward.
    """
    if requested not in ("auto", *NAMES):
        raise BackendError(f"{op}: backend must be one of {', '.join(('auto', *NAMES))}, got {requested!r}")
    asked: tuple[str, ...] = NAMES if requested == "auto" else (requested,)
    if direction == "bwd" and requested != "auto":
        asked = (requested, *(n for n in NAMES if n != requested))
    reasons = []
    for name in asked:
        why = refusals(name, op, direction, inputs)
        if not why:
            return getattr(_op_module(name, op), direction)
        reasons.append(f"{name}: {'; '.join(why)}")
        _log_once(op, direction, reasons[-1])
    raise BackendError(f"{op}: no backend can serve this call ({'. '.join(reasons)})")


@functools.cache
def _log_once(op: str, direction: str, reason: str) -> None:
    log.info("%s %s passed over %s", op, direction, reason)
