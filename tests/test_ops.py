"""Every op on every backend that serves it here: values and gradients against float64, layouts, independence."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from importlib import import_module

import pytest
import torch
from op_cases import (
    ON_CPU,
    OPS,
    assert_as_close_as_torch,
    call,
    calls,
    cotangent,
    first_case,
    in_dtype,
    is_float,
    make,
    result_dtype,
    served,
    with_gradients,
)
from torch import Tensor

import panda_kernels
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs, relative_error

POISON = 7777


@pytest.mark.parametrize(("backend", "device", "op", "case", "dtype"), calls())
def test_close_to_float64(backend: str, device: str, op: str, case: str, dtype: torch.dtype) -> None:
    inputs = make(op, case, dtype, device)
    y, grads = with_gradients(partial(call_by_name, op, backend), inputs)
    assert y.dtype == result_dtype(op, dtype) and y.is_contiguous()
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype and grad.shape == inputs[name].shape
    assert_as_close_as_torch(SPECS[op], (y, grads), inputs, dtype)


def call_by_name(op: str, backend: str, **inputs: object) -> Tensor:
    return call(op, inputs, backend)


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: Tensor) -> Tensor:
    """Every second element of a larger buffer that holds poison between and before them."""
    poison = torch.nan if t.dtype.is_floating_point else POISON % (torch.iinfo(t.dtype).max + 1)
    buffer = torch.full([n + 1 for n in t.shape[:-1]] + [2 * t.shape[-1] + 1], poison, dtype=t.dtype, device=t.device)
    view = buffer[tuple(slice(1, None) for _ in t.shape)][..., ::2]
    return view.copy_(t)


def expanded(t: Tensor) -> Tensor:
    """The first entry for all, at stride 0."""
    return t[:1].expand(t.shape)


def expanded_samples(t: Tensor) -> Tensor:
    """The first sample for all. Packed tokens, matrices and patch weights keep their values: equal ones would make the
    gradients vanish but for rounding, or all outputs one number; index tensors have to."""
    of_samples = t.ndim > 2 and not (t.ndim == 4 and t.shape[1] == 3)
    return expanded(t) if of_samples and (t.dtype.is_floating_point or t.dtype == torch.uint8) else t


Layout = Callable[[Tensor], Tensor]
LAYOUTS: list[tuple[Layout, Layout]] = [(transposed, transposed), (sliced, sliced), (expanded_samples, expanded)]


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUTS)
@pytest.mark.parametrize(("backend", "device", "op", "case", "dtype"), calls(dtypes=(torch.float32, torch.bfloat16)))
def test_any_layout(backend: str, device: str, op: str, case: str, dtype: torch.dtype,
                    layout: Layout, grad_layout: Layout) -> None:
    inputs = {name: layout(value) if isinstance(value, Tensor) and value.dtype != torch.bool else value
              for name, value in make(op, case, dtype, device).items()}
    grad = grad_layout(cotangent(call(op, inputs, backend)))
    result = with_gradients(partial(call_by_name, op, backend), inputs, grad)
    assert_as_close_as_torch(SPECS[op], result, inputs, dtype, grad)


@pytest.mark.parametrize(("backend", "device", "op", "case", "dtype"),
                         calls(dtypes=(torch.float32, torch.bfloat16), first_only=True))
def test_two_runs_give_the_same_bits(backend: str, device: str, op: str, case: str, dtype: torch.dtype) -> None:
    inputs = make(op, case, dtype, device)
    (y, grads), (again, grads_again) = (with_gradients(partial(call_by_name, op, backend), inputs) for _ in range(2))
    assert torch.equal(y, again)
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


def windows_and_tokens(corners: Tensor, window: int) -> tuple[Tensor, Tensor]:
    h, w = ((corners[:, 1::2] - corners[:, ::2]) // window).unbind(1)
    return h * w, 1 + h * (w + 1)


def part(counts: Tensor, i: int) -> slice:
    end = int(counts[:i + 1].sum())
    return slice(end - int(counts[i]), end)


def sample(op: str, inputs: Inputs, i: int) -> tuple[Inputs, dict[str, slice], slice]:
    """Sample ``i`` alone, where its data lie in the inputs, and where its result lies in the batch's."""
    one = slice(i, i + 1)
    if op == "assemble_tokens":
        windows, tokens = windows_and_tokens(inputs["corners"], inputs["window"])
        where = {"y": part(windows, i), "f": one}
        return {"corners": inputs["corners"][one], "num_tokens": int(tokens[i])}, where, part(tokens, i)
    if op == "window_attention_pool":
        windows, _ = windows_and_tokens(inputs["corners"], inputs["window"])
        return {"corners": inputs["corners"][one], "num_windows": int(windows[i])}, {"x": one}, part(windows, i)
    if op == "attention_pool" and inputs["cu_seqlens"] is not None:
        lengths = inputs["cu_seqlens"].diff()
        alone = {"cu_seqlens": torch.tensor([0, lengths[i]], dtype=torch.int32)}
        where = {"x": part(lengths, i)} | ({"queries": one} if inputs["queries"].ndim == 3 else {})
        return alone, where, one
    if op == "attention_pool" and inputs["queries"].ndim == 3:
        return {}, {"x": one, "queries": one}, one
    if op == "patch_embed":
        return {}, {"pixels": one} | ({} if inputs["present"] is None else {"present": one}), one
    return {}, {"x": one}, one


SEVERAL = [("assemble_tokens", "ragged"), ("attention_pool", "gstra"), ("attention_pool", "a_set_a_sample"),
           ("attention_pool", "packed"), ("depthwise_conv3d", "stab"), ("local_encoding", "stab"),
           ("patch_embed", "stab"), ("patch_embed", "missing"), ("token_mlp", "packed"),
           ("window_attention_pool", "ragged"), ("window_attention_pool", "window3")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("op", "case"), SEVERAL)
@pytest.mark.parametrize("backend", ON_CPU)
def test_no_sample_sees_its_neighbours(backend: str, op: str, case: str, dtype: torch.dtype) -> None:
    """Neighbours turned to NaN (bytes: to other bytes) change no bit of a sample's result and gradient."""
    inputs = make(op, case, dtype)
    if not served(backend, op, inputs):
        backend = "auto"
    _, where, out = sample(op, inputs, 1)
    poisoned = dict(inputs)
    for name, own in where.items():
        value = inputs[name]
        if value.dtype == torch.bool:
            continue
        poisoned[name] = torch.full_like(value, torch.nan if is_float(value) else 0)
        poisoned[name][own] = value[own]
    clean, poisoned = (with_gradients(partial(call_by_name, op, backend), i) for i in (inputs, poisoned))
    assert torch.equal(poisoned[0][out], clean[0][out])
    for name, own in where.items():
        if name in clean[1]:
            assert torch.equal(poisoned[1][name][own], clean[1][name][own]), name


# torch's products choose their blocking by the number of rows; only what is no product is the same in any company.
INVARIANT = {"cpu": set(OPS), "torch": {"assemble_tokens", "depthwise_conv3d"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "op", "case"),
                         [(b, o, c) for b in ON_CPU for o, c in SEVERAL if o in INVARIANT[b]])
def test_alone_and_in_a_batch_the_same_bits(backend: str, op: str, case: str, dtype: torch.dtype) -> None:
    inputs = make(op, case, dtype)
    batch = call(op, inputs, backend)
    for i in range(2):
        alone, where, out = sample(op, inputs, i)
        alone = inputs | {name: inputs[name][own] for name, own in where.items()} | alone
        assert torch.equal(call(op, alone, backend), batch[out])


def test_a_missing_frame_gives_zeros_whatever_it_holds() -> None:
    inputs = make("patch_embed", "missing_float", torch.float32)
    inputs["pixels"][0, 1] = torch.nan
    for backend in ON_CPU:
        y, grads = with_gradients(partial(call_by_name, "patch_embed", backend), inputs)
        assert not y[0, 1].any() and y[0, 0].all()
        assert not grads["pixels"][0, 1].any()
        assert torch.isfinite(grads["weight"]).all()


@pytest.mark.parametrize("backend", ON_CPU)
def test_packed_pooling_is_pooling_sample_by_sample(backend: str) -> None:
    inputs = make("attention_pool", "packed_sets", torch.float32)
    x, queries, bounds = inputs["x"], inputs["queries"], inputs["cu_seqlens"].tolist()
    packed = panda_kernels.attention_pool(x, queries, cu_seqlens=inputs["cu_seqlens"], backend=backend)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        expected = panda_kernels.attention_pool(x[None, begin:end], queries[i], backend=backend)[0] \
            if end > begin else torch.zeros_like(packed[i])
        torch.testing.assert_close(packed[i], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ON_CPU)
def test_only_the_gradients_asked_for(backend: str) -> None:
    """Each input alone as the one that needs a gradient gets the same as when all do."""
    for op in OPS:
        inputs = make(op, first_case(op), torch.float32)
        _, everything = with_gradients(partial(call_by_name, op, backend), inputs)
        for name, expected in everything.items():
            only = inputs[name].detach().requires_grad_()
            y = call(op, inputs | {name: only}, backend)
            torch.testing.assert_close(torch.autograd.grad(y, only, cotangent(y))[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SPECS["attention_pool"].test_sizes)
@pytest.mark.parametrize("backend", ON_CPU)
def test_pooling_in_half_precision_rounds_once(backend: str, case: str, dtype: torch.dtype) -> None:
    """Statistics, logits and softmax in float32 leave one rounding, that of the result; torch's own error is larger."""
    inputs = make("attention_pool", case, dtype)
    if not served(backend, "attention_pool", inputs):
        backend = "torch"
    exact = SPECS["attention_pool"].load_reference()(**in_dtype(inputs, torch.float64))
    assert relative_error(call("attention_pool", inputs, backend), exact) < 0.6 * torch.finfo(dtype).eps / 2


def test_windows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More windows than a chunk holds, the last chunk not full."""
    monkeypatch.setattr(import_module("panda_kernels.backends.torch.window_attention_pool"), "CPU_CHUNK", 5)
    inputs = make("window_attention_pool", "ragged", torch.float32)
    assert inputs["num_windows"] % 5
    result = with_gradients(partial(call_by_name, "window_attention_pool", "torch"), inputs)
    assert_as_close_as_torch(SPECS["window_attention_pool"], result, inputs, torch.float32)
