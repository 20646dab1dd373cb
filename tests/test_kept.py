"""What an eager call keeps for its gradient on a CPU, and the memory that large results have of earlier ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import OPS, is_float, make
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import panda_kernels
from panda_kernels import Rectangles
from panda_kernels.backends.cpu._arrays import column_products
from panda_kernels.nn import LSD, STAB
from panda_kernels.nn.dense_connection import Sum, dense_connection
from panda_kernels.nn.few_rows import FewRows
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs, Tolerance, relative_error

KEEPING = [op for op in OPS if hasattr(import_module(f"panda_kernels.backends.cpu.{op}"), "keep")]
CASES = [(op, case) for op in KEEPING for case in SPECS[op].test_sizes]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = 3 << 20  # elements


def leaves(op: str, case: str, dtype: torch.dtype) -> Inputs:
    return {name: value.requires_grad_() if is_float(value) else value for name, value in make(op, case, dtype).items()}


def eager(op: str, inputs: Inputs) -> Tensor:
    return getattr(panda_kernels, op)(**inputs, backend="cpu")


def traced(op: str, inputs: Inputs) -> Tensor:
    """As a graph calls it."""
    return getattr(torch.ops.panda_kernels, op)(*inputs.values(), "cpu")


def gradients(y: Tensor, inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, [value for value in inputs.values() if is_float(value)], grad, **options)


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_products_are_kept() -> None:
    assert set(KEEPING) == {"local_encoding", "window_attention_pool"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_what_is_kept_has_the_bits_of_what_would_be_computed_again(op: str, case: str, dtype: torch.dtype) -> None:
    inputs = leaves(op, case, dtype)
    y, expected = eager(op, inputs), traced(op, inputs)
    assert y.grad_fn is not None and y.grad_fn.name() == "_KeptBackward" != expected.grad_fn.name()
    assert torch.equal(y, expected)
    assert_same(gradients(y, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("op", KEEPING)
def test_a_gradient_can_be_taken_again_but_not_differentiated(op: str) -> None:
    inputs = leaves(op, next(iter(SPECS[op].test_sizes)), torch.float32)
    y = eager(op, inputs)
    assert_same(gradients(y, inputs, retain_graph=True), gradients(y, inputs, retain_graph=True))
    grads = gradients(y, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(grads[0].sum(), inputs["x"])


@pytest.mark.parametrize("op", KEEPING)
def test_only_what_is_needed_has_a_gradient(op: str) -> None:
    inputs = make(op, next(iter(SPECS[op].test_sizes)), torch.float32)
    y = eager(op, inputs | {"x": inputs["x"].requires_grad_()})
    y.sum().backward()
    assert inputs["x"].grad is not None
    assert all(value.grad is None for name, value in inputs.items() if is_float(value) and name != "x")


@pytest.mark.parametrize("op", KEEPING)
def test_nothing_is_kept_for_nobody(op: str) -> None:
    inputs = leaves(op, next(iter(SPECS[op].test_sizes)), torch.float32)
    with torch.no_grad():
        assert eager(op, inputs).grad_fn is None
    assert eager(op, {name: v.detach() if is_float(v) else v for name, v in inputs.items()}).grad_fn is None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        assert eager(op, fakes).grad_fn.name() != "_KeptBackward"
    with Watching():
        assert eager(op, inputs).grad_fn.name() != "_KeptBackward"


class Watching(TorchDispatchMode):
    """As a tracer of plain tensors does, it is to see the op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_column_products_are_of_all_rows() -> None:
    x, y = torch.randn(2, 300, 5)
    torch.testing.assert_close(column_products(x, y), (x * y).sum(0))


def result(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ops.panda_kernels_cpu.result(sizes, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8])
def test_results_are_apart_while_anything_refers_to_them(dtype: torch.dtype) -> None:
    first, second = (result(3, LARGE // 3, dtype=dtype) for _ in range(2))
    assert first.dtype == dtype and first.is_contiguous() and first.shape == (3, LARGE // 3)
    first.fill_(1)
    second.fill_(2)
    view = first[2, 5:]
    del first
    third = result(LARGE, dtype=dtype).fill_(3)
    assert bool((view == 1).all()) and bool((second == 2).all()) and bool((third == 3).all())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1)])
def test_memory_is_used_again_and_its_neighbours_join(order: tuple[int, ...]) -> None:
    kept = result(LARGE)
    blocks = {i: result(LARGE) for i in range(3)}
    low = min(block.data_ptr() for block in blocks.values())
    for i in order:
        del blocks[i]
    assert result(LARGE).data_ptr() == low
    both = result(3 * LARGE)
    assert both.data_ptr() == low
    both.fill_(1)
    assert kept.data_ptr() != low


def lent() -> int:
    """Bytes of this process that the system may take if it runs short."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(rollup.split("LazyFree:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="other systems do not tell")
def test_memory_is_lent_once_more_is_free_than_taken() -> None:
    most = 20 * LARGE
    taken = [result(size).fill_(1) for size in (most, LARGE)]
    before = lent()
    taken.pop()
    assert lent() <= before
    taken.pop()
    assert lent() >= before + 4 * most


def test_results_outlive_threads_and_nothing_else() -> None:
    def work(i: int) -> Tensor:
        for _ in range(20):
            x = result(LARGE + i).fill_(i)
        return x

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(8)))
    assert all(bool((x == i).all()) for i, x in enumerate(found))
    assert len({x.data_ptr() for x in found}) == len(found)


def whole(tokens: Sum) -> Tensor:
    return tokens.x if tokens.added is None else tokens.x + tokens.added


def dense_gradients(x0: Tensor, x2: Tensor, weights: list[Tensor], *, plain: bool) -> list[Tensor]:
    """Of all three where each has more than one consumer, x0 before and behind the sum, as in STAB."""
    leaves = x0.clone().requires_grad_(), x2.clone().requires_grad_()
    x0, x2 = leaves[0] * 1, leaves[1] * 1
    loss = (x0 * weights[0]).sum()
    x2, x3 = (x2, Sum(x2 + x0)) if plain else dense_connection(x2, x0, backend="cpu")
    assert plain or x3.added is not None
    x3.x.retain_grad()
    loss = loss + (x2 * weights[1]).sum() + (whole(x3).flatten() * weights[2].flatten()).sum() + (x0 * weights[3]).sum()
    loss.backward()
    return [x.grad for x in (*leaves, x3.x) if x.grad is not None]


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1024, 1024)])
def test_dense_connection_has_the_gradients_of_a_sum(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x0, x2, *weights = (torch.randn(shape, generator=draw) for _ in range(6))
    found, expected = (dense_gradients(x0, x2, weights, plain=plain) for plain in (False, True))
    assert len(found) == 3
    torch.testing.assert_close(found, expected)


def test_dense_connection_where_only_the_sum_is_used() -> None:
    x0, x2 = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    _, x3 = dense_connection(x2, x0, backend="cpu")
    assert torch.equal(whole(x3), x2 + x0)
    whole(x3).sum().backward()
    torch.testing.assert_close([x0.grad, x2.grad], [torch.ones(2, 3)] * 2)


def test_dense_connection_is_a_plain_sum_elsewhere() -> None:
    x0, x2 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3)
    for a, b, backend in ((x2, x0, "auto"), (x2.bfloat16(), x2, "auto"), (x2, x2, "torch")):
        same, x3 = dense_connection(a, b, backend=backend)
        assert same is a and x3.added is None and torch.equal(x3.x, a + b)


def attended(case: str, dtype: torch.dtype, *, summed: bool, backend: str = "cpu",
             within: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """LSD of a sum of two in ``dtype`` and its gradients, of the tokens first."""
    sizes = SPECS["window_attention_pool"].test_sizes[case]
    torch.manual_seed(0)
    lsd = LSD(sizes["channels"], sizes.get("num_heads", 8), window=sizes.get("window", 2)).to(dtype).to(within or dtype)
    lsd.backend = backend
    shape = len(sizes["corners"]), *sizes["grid"], sizes["channels"]
    x, added = (torch.randn(shape).to(dtype).to(within or dtype).requires_grad_() for _ in range(2))
    rectangles = Rectangles.from_corners(sizes["corners"], lsd.window)
    y = lsd(x + added.detach(), rectangles) if summed else lsd(x, rectangles, added=added)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y.dtype)
    grads = torch.autograd.grad(y, (x, *lsd.parameters(), added), grad, allow_unused=True)
    assert grads[-1] is None and (summed or backend != "cpu" or y.grad_fn.name() == "_KeptBackward")
    return y, *grads[:-1]


ATTENDED = tuple(SPECS["window_attention_pool"].test_sizes)


@pytest.mark.parametrize("case", ATTENDED)
@pytest.mark.parametrize(("backend", "dtype"), [("cpu", torch.float32), ("torch", torch.float32),
                                                ("auto", torch.float64)])
def test_a_sum_is_attended_as_if_it_were_summed(case: str, backend: str, dtype: torch.dtype) -> None:
    found, expected = (attended(case, dtype, summed=summed, backend=backend) for summed in (False, True))
    assert_same(found, expected)


def test_what_is_added_has_the_shape_of_the_tokens() -> None:
    x, rectangles = torch.randn(1, 2, 4, 16), Rectangles.full(1, 2, 4)
    with pytest.raises(ValueError, match=r"added: expected shape \[1, 2, 4, 16\]"):
        LSD(16)(x, rectangles, added=x[..., :1])


@pytest.mark.parametrize("case", ATTENDED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_not_summed_is_not_rounded(case: str, dtype: torch.dtype) -> None:
    exact = attended(case, dtype, summed=True, backend="torch", within=torch.float64)
    found, rounded = (attended(case, dtype, summed=summed) for summed in (False, True))
    for ours, summed, wanted in zip(found, rounded, exact, strict=True):
        limit = Tolerance().limit(relative_error(summed, wanted), dtype, backward=True)
        assert relative_error(ours, wanted) <= limit
    assert relative_error(found[0], exact[0]) < relative_error(rounded[0], exact[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [((2,), 70, 33), ((3, 2), 1100, 1024)])
def test_few_rows_have_a_linear_layers_gradients(rows: tuple[int, ...], outputs: int, inputs: int,
                                                 dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = FewRows(inputs, outputs, dtype=dtype)
    x, grad = torch.randn(*rows, inputs).to(dtype).requires_grad_(), torch.randn(*rows, outputs).to(dtype)
    own = x, layer.weight, layer.bias
    y = layer(x)
    assert y.grad_fn is not None and y.grad_fn.name() == "_LinearBackward"
    plain, exact = (torch.nn.functional.linear(*(t.to(wide) for t in own)) for wide in (dtype, torch.float64))
    found, torchs, wanted = (torch.autograd.grad(z, own, grad.to(z.dtype)) for z in (y, plain, exact))
    for ours, theirs, expected in zip(found, torchs, wanted, strict=True):
        assert ours.dtype == dtype and ours.shape == expected.shape
        limit = Tolerance().limit(relative_error(theirs, expected), dtype, backward=True)
        assert relative_error(ours, expected) <= limit


def test_few_rows_are_torchs_own_where_no_backend_serves_them() -> None:
    layer, x = FewRows(8, 3), torch.randn(2, 8)
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and y.grad_fn.name() != "_LinearBackward"
    for backend, dtype in (("torch", torch.float32), ("auto", torch.float64)):
        layer.backend = backend
        assert layer.to(dtype)(x.to(dtype)).grad_fn.name() == "AddmmBackward0"


def test_a_tower_tells_its_few_rows_the_backend() -> None:
    tower = STAB(16, patch=4, num_heads=2, gstra_heads=2)
    tower.backend = "torch"
    assert [layer.backend for layer in tower.modules() if isinstance(layer, FewRows)] == ["torch", "torch"]
