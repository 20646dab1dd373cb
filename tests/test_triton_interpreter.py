"""Each repair of the interpreter: the result is torch's with it, and is not without it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("kernels are compiled where there is a GPU", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton_interpreter import REPLACED  # noqa: E402

N = 16


@triton.jit
def add(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(a + i) + tl.load(b + i))


@triton.jit
def multiply_add(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.fma(tl.load(a + i), tl.load(b + i), tl.load(b + i)))


@triton.jit
def third(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, (tl.load(a + i).to(tl.float32) / 3).to(tl.bfloat16))


@triton.jit
def to_e4m3(a, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(a + i).to(tl.float8e4nv))


@triton.jit
def product(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * 0 + i[None, :]
    tl.store(y + square + i[:, None] * N, tl.dot(tl.load(a + square), tl.load(b + square)))


@triton.jit
def product_of_e4m3(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    tl.store(y + square, tl.dot(tl.load(a + square), tl.load(b + square)))


@triton.jit
def sum_below(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for k in range(tl.load(b).to(tl.int32)):
        total += k
    tl.store(y + i, total)


@triton.jit
def twice(x):
    return x + x


@triton.jit
def by_helper(a, b, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, twice(twice(tl.load(a + i))))


A, B = torch.linspace(-2, 2, N).bfloat16(), torch.linspace(3, 1, N).bfloat16()
REPAIRS: dict[str, tuple[Any, Tensor]] = {
    "binary_op": (add, A + B),
    "create_fma": (multiply_add, (A.double() * B.double() + B.double()).bfloat16()),
    "cast_impl": (third, (A.float() / 3).bfloat16()),
    "create_dot": (product, A.float().expand(N, N) @ B.float().expand(N, N)),
}


def result(kernel: Any, like: Tensor) -> Tensor:
    y = torch.full_like(like, torch.nan)
    kernel[(1,)](A, B, y, N=N)
    return y


@pytest.mark.parametrize("name", REPAIRS)
def test_bfloat16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, expected = REPAIRS[name]
    torch.testing.assert_close(result(kernel, expected), expected, rtol=1e-6 if name == "create_dot" else 0, atol=0)
    monkeypatch.setattr(interpreter.InterpreterBuilder, name, REPLACED[name])
    assert not torch.allclose(result(kernel, expected), expected, rtol=1e-3, atol=0)


def test_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of it, everything halfway between two, what lies beyond, and NaN."""
    every = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = torch.cat([every, (every[1:] + every[:-1]) / 2, torch.tensor([500.0, torch.inf, torch.nan])])
    a = torch.cat([positive, -positive])
    expected = a.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    results = []
    for _ in range(2):
        y = torch.zeros(512, dtype=torch.float8_e4m3fn)
        to_e4m3[(1,)](torch.cat([a, torch.zeros(512 - len(a))]), y, N=512)
        results.append(y.view(torch.uint8)[:len(a)])
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_to_fp", REPLACED["create_fp_to_fp"])
    assert torch.equal(results[0], expected) and not torch.equal(results[1], expected)


def test_products_of_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of it, with NaN among them."""
    a = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(N, N)
    b = torch.eye(N).to(torch.float8_e4m3fn)
    expected = a.float() @ b.float()
    for isclose in (True, False):
        y = torch.zeros(N, N)
        product_of_e4m3[(1,)](a, b, y, N=N)
        assert torch.equal(y.nan_to_num(500), expected.nan_to_num(500)) == isclose
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", REPLACED["create_dot"])


def test_a_loop_to_a_loaded_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = torch.full([N], 3.0)
    assert torch.equal(result(sum_below, expected), expected)
    if triton.__version__.startswith("3.6."):
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", REPLACED["_patch_lang_tensor"])
        with pytest.raises(interpreter.InterpreterError):
            result(sum_below, expected)


def test_helpers_replace_the_language_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave it as it was, so that the next launch finds it whole."""
    replacements = []
    core = interpreter._patch_lang_core
    monkeypatch.setattr(interpreter, "_patch_lang_core", lambda *args: (replacements.append(1), core(*args)))
    for _ in range(2):
        replacements.clear()
        assert torch.equal(result(by_helper, A), 4 * A)
        assert len(replacements) == 1
        assert tl.core.is_builtin(tl.load)
