"""Triton's interpreter, repaired: importing this makes TRITON_INTERPRET=1 give what a GPU would.

The interpreter keeps bfloat16 as bits in uint16 and, in 3.6 and 3.7, computes with them as if they were integers, cuts
them off instead of rounding, and multiplies them in ``tl.dot``; none of it raises. Here an operation on bfloat16 is
one in float32 with the result rounded to nearest, ties to even. To e4m3 it rounds ties up, and loses what a mantissa
carries into the exponent; here it rounds as torch and saturates as a GPU. In products it takes e4m3's NaN for 480. TF32
is not emulated, nor are races.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

REPLACED: dict[str, Any] = {}  # what the repairs have replaced, by name


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _from_e4m3(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.float8e4nv:
        return handle
    return TensorHandle(torch.from_numpy(handle.data).view(torch.float8_e4m3fn).float().numpy(), tl.float32)


def _round(values: np.ndarray) -> TensorHandle:
    shape = np.shape(values)  # torch rounds as the hardware does; its bfloat16 has no NumPy type but int16's bits
    bits = torch.from_numpy(np.array(values, np.float32, ndmin=1)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return TensorHandle(bits.reshape(shape), tl.bfloat16)


def _in_float32(method: Callable[..., TensorHandle], operands: int) -> Callable[..., TensorHandle]:
    """A builder's method whose first ``operands`` arguments may be bfloat16."""

    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        handles, rest = args[:operands], args[operands:]
        result = method(self, *map(_widen, handles), *rest)
        narrow = any(map(_is_bfloat16, handles)) and result.data.dtype == np.float32
        return _round(result.data) if narrow else result

    return repaired


def _cast(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else _round(source.data)
        return method(self, _widen(source), target)

    return repaired


def _dot(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return method(self, *(_widen(_from_e4m3(handle)) for handle in (a, b)), *rest)

    return repaired


def _to_e4m3(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @functools.wraps(method)
    def repaired(self: InterpreterBuilder, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        if target.scalar != tl.float8e4nv:
            return method(self, source, target, rounding)
        values = torch.from_numpy(np.array(_widen(source).data, np.float32, ndmin=1)).clamp(-448, 448)
        bits = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return TensorHandle(bits.reshape(np.shape(source.data)), tl.float8e4nv)

    return repaired


def _loop_bounds(patch_tensor: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 makes a bound an int in a way that NumPy 2.4 no longer allows."""

    @functools.wraps(patch_tensor)
    def repaired(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    return repaired


def _once_a_launch(patch_language: Callable[..., Any]) -> Callable[..., Any]:
    """Not a fault but most of the time: a helper, whenever it is called, replaces the whole language again."""
    done: set[int] = set()

    @functools.wraps(patch_language)
    def repaired(function: Any) -> Any:
        if id(function.__globals__) in done:
            return interpreter._LangPatchScope()
        scope = patch_language(function)
        if not done:
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(id(function.__globals__))
        return scope

    return repaired


def _replace(owner: Any, name: str, repair: Callable[..., Any], *args: Any) -> None:
    REPLACED[name] = getattr(owner, name)
    setattr(owner, name, repair(REPLACED[name], *args))


if not REPLACED:
    for _name, _operands in {"binary_op": 2, "create_fma": 3}.items():
        _replace(InterpreterBuilder, _name, _in_float32, _operands)
    _replace(InterpreterBuilder, "cast_impl", _cast)
    _replace(InterpreterBuilder, "create_dot", _dot)
    _replace(InterpreterBuilder, "create_fp_to_fp", _to_e4m3)
    _replace(interpreter, "_patch_lang_tensor", _loop_bounds)
    _replace(interpreter, "_patch_lang", _once_a_launch)
    # Every integer operation is otherwise done a second time, in int64, to look for overflows.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False)
