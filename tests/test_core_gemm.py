"""The matrix product of csrc/core in every tier this machine has, on NumPy arrays with poison around them.

``PANDA_SANITIZE=1``, with libasan preloaded, runs the same tests on a build with address and undefined sanitizers.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import core_module
import numpy as np
import pytest
import torch
from core_module import POISON, Array, stored, to_bfloat16, widened

CORE = core_module.load(sanitize=bool(os.environ.get("PANDA_SANITIZE")))
TIERS = core_module.supported_tiers(CORE)
DTYPES = ("float32", "bfloat16")


@pytest.fixture(params=TIERS)
def core(request: pytest.FixtureRequest) -> Any:
    with core_module.tier(CORE, request.param):
        yield CORE


def poisoned(rows: int, columns: int, dtype: str, around: int = 3) -> tuple[Array, Array]:
    """A matrix inside a larger one that is all NaN; returns both."""
    outer = np.full((rows + 2, columns + around), POISON[dtype])
    return outer, outer[1:-1, :columns]


class Problem:
    """A [m, k], W [n, k] and what the product needs around them, from one seed."""

    def __init__(
        self, dtype: str, m: int, n: int, k: int, *, epilogue: bool = False, c_dtype: str | None = None
    ) -> None:
        rng = np.random.default_rng(m * 1_000_003 + n * 1009 + k)
        self.dtype, self.m, self.n, self.k, self.c_dtype = dtype, m, n, k, c_dtype or dtype
        readable = k if dtype == "float32" else -(-k // 32) * 32
        self.a = poisoned(m, readable, dtype)[1]
        self.a[:] = 0
        self.a[:, :k] = stored(rng.standard_normal((m, k)), dtype)
        self.w = stored(rng.standard_normal((n, k)) / math.sqrt(k), dtype)
        self.packed = CORE.pack(self.w, dtype == "bfloat16")
        self.bias = rng.standard_normal(n).astype(np.float32) if epilogue else None
        self.gelu = epilogue
        self.residual: Array | None = None
        if epilogue:
            self.residual = poisoned(m, n, dtype)[1]
            self.residual[:] = stored(rng.standard_normal((m, n)), dtype)

    def run(self, blocks: list[tuple[int, int, int, int]] | None = None) -> tuple[Array, Array]:
        """The poisoned matrix around C, and C, after the given blocks of rows and panels (all of them at once)."""
        outer, c = poisoned(self.m, self.n, self.c_dtype)
        panels = -(-self.n // CORE.PANEL)
        for block in blocks or [(0, self.m, 0, panels)]:
            CORE.gemm(self.a, self.packed, self.k, c, self.bias, self.gelu, self.residual, *block)
        return outer, c

    def expected(self, scalar: type = np.float64) -> Array:
        a, w = widened(self.a[:, : self.k]).astype(scalar), widened(self.w).astype(scalar)
        return self.finished(a @ w.T, scalar)

    def in_order(self) -> Array:
        """Plain float32, k after k, in second-level sums of 256."""
        a, w = widened(self.a[:, : self.k]), widened(self.w)
        c = np.zeros((self.m, self.n), np.float32)
        for start in range(0, self.k, 256):
            part = np.zeros_like(c)
            for j in range(start, min(start + 256, self.k)):
                part += np.outer(a[:, j], w[:, j])
            c += part
        return self.finished(c, np.float32)

    def finished(self, c: Array, scalar: type) -> Array:
        if self.bias is not None:
            c = c + self.bias.astype(scalar)
        if self.gelu:
            c = torch.nn.functional.gelu(torch.from_numpy(c)).numpy()
        if self.residual is not None:
            c = c + widened(self.residual).astype(scalar)
        return c

    def check(self) -> None:
        outer, c = self.run()
        exact = self.expected()
        plain = (
            [widened(to_bfloat16(exact))]
            if self.c_dtype == "bfloat16"
            else [self.expected(np.float32), self.in_order()]
        )
        error = float(np.linalg.norm(widened(c) - exact))
        limit = max(float(np.linalg.norm(other - exact)) for other in plain)
        factor = 1.05 if self.c_dtype == "bfloat16" else 1.5
        assert error <= factor * limit, (
            f"{CORE.tier_name()} {self.m}x{self.n}x{self.k}: {error:.2e} against {limit:.2e}"
        )
        c[:] = POISON[self.c_dtype]
        np.testing.assert_array_equal(outer.view(np.uint8), np.full_like(outer, POISON[self.c_dtype]).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows(core: ModuleType, dtype: str) -> None:
    for m in range(1, 71):
        Problem(dtype, m, 33, 33).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 31, 33, 588, 682])
def test_columns_and_depths(core: ModuleType, dtype: str, k: int) -> None:
    for n in (1, 31, 33, 682):
        Problem(dtype, 37, n, k).check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_rows_and_sums_cut_in_parts(core: ModuleType, dtype: str) -> None:
    """More rows than a cache block has, and a sum over k that is longer than one."""
    Problem(dtype, 301, 70, 2100).check()


@pytest.mark.parametrize("c_dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(29, 75, 65), (3, 32, 600)])
def test_epilogue(core: ModuleType, c_dtype: str, m: int, n: int, k: int) -> None:
    if c_dtype == "float32":
        Problem("float32", m, n, k, epilogue=True).check()
    Problem("bfloat16", m, n, k, epilogue=True, c_dtype=c_dtype).check()


def test_a_float32_residual_of_a_bfloat16_product(core: ModuleType) -> None:
    problem = Problem("bfloat16", 17, 45, 64, c_dtype="float32")
    problem.residual = np.random.default_rng(0).standard_normal((17, 45)).astype(np.float32)
    problem.check()
    problem.c_dtype = "bfloat16"
    problem.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_may_be_the_output(core: ModuleType, dtype: str) -> None:
    problem = Problem(dtype, 40, 70, 64, epilogue=True)
    _, apart = problem.run()
    assert problem.residual is not None
    c = problem.residual.copy()
    CORE.gemm(problem.a, problem.packed, problem.k, c, problem.bias, True, c, 0, 40, 0, 3)
    np.testing.assert_array_equal(apart, c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(90, 100, 682), (61, 70, 2100), (300, 40, 40)])
def test_any_division_gives_the_same_bits(core: ModuleType, dtype: str, m: int, n: int, k: int) -> None:
    problem = Problem(dtype, m, n, k, epilogue=True)
    _, whole = problem.run()
    panels = -(-n // CORE.PANEL)
    for rows in (1, 7, 16, 33):
        starts = range(0, m, rows)
        by_panel = [(r, min(r + rows, m), p, p + 1) for r in starts for p in range(panels)]
        assert problem.run(by_panel)[1].tobytes() == whole.tobytes(), f"{rows} rows at a time, one panel at a time"
        by_rows = [(r, min(r + rows, m), 0, panels) for r in starts]
        assert problem.run(by_rows)[1].tobytes() == whole.tobytes(), f"{rows} rows at a time"


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_asked_block_is_written(core: ModuleType, dtype: str) -> None:
    problem = Problem(dtype, 50, 100, 40)
    _, whole = problem.run()
    _, c = problem.run([(13, 31, 1, 3)])
    np.testing.assert_array_equal(c[13:31, 32:96], whole[13:31, 32:96])
    c[13:31, 32:96] = POISON[dtype]
    np.testing.assert_array_equal(c.copy().view(np.uint8), np.full_like(c, POISON[dtype]).view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_in_their_rows(core: ModuleType, dtype: str) -> None:
    problem = Problem(dtype, 20, 40, 50)
    problem.a[3, 7] = POISON[dtype]
    problem.a[11, 49] = stored(np.array(np.inf), dtype)
    c = widened(problem.run()[1])
    assert np.isnan(c[3]).all()
    assert np.isinf(c[11]).all()
    assert np.isfinite(np.delete(c, [3, 11], 0)).all()


def test_a_nan_with_every_bit_set_is_not_rounded_away(core: ModuleType) -> None:
    nan = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(widened(CORE.pack(nan.reshape(1, 1), True).view(np.uint16)[:1]))
    problem = Problem("bfloat16", 2, 33, 4)
    problem.bias = np.repeat(nan, 33)
    assert np.isnan(widened(problem.run()[1])).all()


def gelu(core: ModuleType, x: Array, dtype: str) -> Array:
    """GELU as the epilogue of a product with one: x [m] in the dtype's storage."""
    a = np.zeros((x.size, 1 if dtype == "float32" else 32), x.dtype)
    a[:, 0] = x
    c = np.empty((x.size, 1), x.dtype)
    one = core.pack(stored(np.ones((1, 1)), dtype), dtype == "bfloat16")
    core.gemm(a, one, 1, c, None, True, None, 0, x.size, 0, 1)
    return widened(c[:, 0])


def exact_gelu(x: Array) -> Array:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64)])


def test_gelu_errs_like_torch_and_keeps_the_left_tail(core: ModuleType) -> None:
    edges = [-6, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 4, 8]
    for low, high in itertools.pairwise(edges):
        x = np.linspace(low, high, 3001).astype(np.float32)
        exact = exact_gelu(x)
        ours = np.abs(gelu(core, x, "float32") - exact)
        torchs = np.abs(torch.nn.functional.gelu(torch.from_numpy(x)).numpy() - exact)
        assert ours.max() <= torchs.max() * (1 / 3 if high <= -1 else 1.5), f"[{low}, {high}]"


def test_gelu_in_bfloat16_is_rounded_once_as_far_as_bfloat16_can_tell(core: ModuleType) -> None:
    x = to_bfloat16(np.linspace(-4, 6, 4001))
    exact = exact_gelu(widened(x))
    rounded = np.abs(widened(to_bfloat16(exact)) - exact)
    ours = np.abs(gelu(core, x, "bfloat16") - exact)
    assert np.linalg.norm(ours) <= 1.02 * np.linalg.norm(rounded)
    assert (ours <= rounded + 1e-3 * np.abs(exact)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_special_values(core: ModuleType, dtype: str) -> None:
    x = stored(np.array([0.0, np.inf, 100.0, 3e38, -60.0, -100.0, -3e38, np.nan]), dtype)
    y = gelu(core, x, dtype)
    np.testing.assert_array_equal(y[:4], widened(x)[:4])
    np.testing.assert_array_equal(y[4:7], 0)
    assert np.isnan(y[7])


@pytest.mark.parametrize("n_k", [(1, 1), (33, 31), (40, 66)])
def test_packed_layout(n_k: tuple[int, int]) -> None:
    n, k = n_k
    w = np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
    w[0, 0] = np.nan
    panels, kp = -(-n // 32), -(-k // 32) * 32
    expected = np.zeros((panels * 32, kp), np.float32)
    expected[:n, :k] = w
    by_panel = expected.reshape(panels, 32, kp)
    plain = CORE.pack(w, False).view(np.float32).reshape(panels, k, 32)
    np.testing.assert_array_equal(plain, by_panel.transpose(0, 2, 1)[:, :k])
    pairs = to_bfloat16(by_panel).reshape(panels, 32, kp // 2, 2).transpose(0, 2, 1, 3)
    for source in (w, to_bfloat16(w), np.asfortranarray(w)):
        np.testing.assert_array_equal(CORE.pack(source, True).view(np.uint16).reshape(pairs.shape), pairs)


def isa_in_a_new_process(value: str | None) -> tuple[str, str]:
    environment = {name: v for name, v in os.environ.items() if name != "PANDA_KERNELS_ISA"}
    if value is not None:
        environment["PANDA_KERNELS_ISA"] = value
    code = "import core_module, os; c = core_module.load(sanitize=bool(os.environ.get('PANDA_SANITIZE')))"
    run = [sys.executable, "-c", code + "; print(c.tier_name(), c.requested_isa())"]
    folder = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(run, check=True, capture_output=True, text=True, cwd=folder, env=environment)
    tier, request = done.stdout.split()
    return tier, request


def test_the_environment_lowers_the_tier() -> None:
    assert isa_in_a_new_process(None) == (TIERS[-1], "None")
    assert isa_in_a_new_process("portable") == ("portable", "portable")
    assert isa_in_a_new_process(TIERS[len(TIERS) // 2]) == (TIERS[len(TIERS) // 2],) * 2
    assert isa_in_a_new_process("sse9") == (TIERS[-1], "sse9")


def test_set_tier_refuses_what_is_not_there() -> None:
    before = CORE.tier_name()
    absent = {"portable", "avx2", "avx512", "avx512_bf16", "amx"} - set(TIERS)
    for name in ["sse9", "", *absent]:
        assert not CORE.set_tier(name)
        assert CORE.tier_name() == before


def test_no_tier_shares_code_with_another() -> None:
    """A weak symbol in a tier's object file could be the one the linker keeps for all of them."""
    tiers = ("avx2", "avx512", "avx512_bf16", "amx", "portable")
    objects = [file for tier in tiers for file in core_module.build().parent.glob(f"*_{tier}.o")]
    assert objects
    for file in objects:
        symbols = subprocess.run(["nm", "-C", str(file)], check=True, capture_output=True, text=True).stdout
        weak = [line for line in symbols.splitlines() if line[16:19].strip() in ("W", "V", "u") and "panda::" in line]
        assert not weak, f"{file.name}: {weak}"
