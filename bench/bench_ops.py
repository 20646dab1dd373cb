"""Every op at the sizes of its specification against its plain-torch definition and the ``torch`` backend."""
from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import attention_peers, half_products
from bench.measure import Bench, Call, Errors, overhead
from bench.records import OURS
from panda_kernels import backends
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs, OpSpec, relative_error
from panda_kernels.verify import in_float64, public_op, refusals


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("full")
    rows = [(spec, size) for spec in SPECS.values() for size in list(spec.bench_sizes)[: None if full else 1]]
    metafunc.parametrize(("spec", "size"), rows, ids=[f"{spec.name}-{size}" for spec, size in rows])


def test_op(bench: Bench, spec: OpSpec, size: str, dtype: torch.dtype, device: str) -> None:
    inputs = _on(device, spec.inputs(spec.bench_sizes[size], dtype))
    backend, ours, peers = contenders(spec, inputs, dtype, device)
    labels = {"op": spec.name, "size": size, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
    bench.row(labels, ours, peers, partial(_errors, spec, size, inputs, ours, dtype, device), spec.cost(**inputs),
              overheads=_overheads(spec.name, dtype, device))


def contenders(spec: OpSpec, inputs: Inputs, dtype: torch.dtype,
               device: str) -> tuple[str, Callable[[], Tensor], dict[str, Call]]:
    """The backend of ours, ours, and the peers by name; these in the dtype that torch can multiply here."""
    backend = next(name for name in backends.NAMES if not refusals(spec, name, inputs))
    inputs_of_peers = _in_dtype(half_products.peer_dtype(dtype, device), inputs)
    peers: dict[str, Call] = {"reference": partial(spec.load_reference(), **inputs_of_peers)}
    if backend != "torch":
        peers["torch backend"] = partial(public_op(spec), **inputs_of_peers, backend="torch")
    if extra := EXTRA_PEERS.get(spec.name):
        peers |= extra(**inputs_of_peers)
    named = {half_products.peer_name(name, dtype, device): call for name, call in peers.items()}
    return backend, partial(public_op(spec), **inputs), named


@functools.cache
def _overheads(op: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Of a call on the smallest of the sizes that the tests use."""
    spec = SPECS[op]
    examples = (spec.inputs(sizes, dtype) for sizes in spec.test_sizes.values())
    smallest = min(examples, key=lambda inputs: spec.cost(**inputs).bytes)
    _, ours, peers = contenders(spec, _on(device, smallest), dtype, device)
    return {name: overhead(call) for name, call in {**peers, OURS: ours}.items()}


def _errors(spec: OpSpec, size: str, inputs: Inputs, ours: Callable[[], Tensor], dtype: torch.dtype,
            device: str) -> Errors:
    exact = _exact(spec.name, size, device)
    with half_products.yardstick(dtype, device):
        reference = spec.load_reference()(**inputs)
    error, reference_error = (relative_error(y, exact) for y in (ours(), reference))
    return Errors(error, reference_error, spec.tolerance.limit(reference_error, dtype))


@functools.lru_cache(maxsize=1)
def _exact(op: str, size: str, device: str) -> Tensor:
    """The rows of one size follow each other, and every dtype is given the same numbers."""
    spec = SPECS[op]
    return spec.load_reference()(**in_float64(_on(device, spec.inputs(spec.bench_sizes[size], torch.float64))))


def _on(device: str, inputs: Inputs) -> Inputs:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def _in_dtype(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    return {name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()}


def _conv3d_layouts(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> dict[str, Call]:
    """torch's convolution alone, without the residual, on input already in either of its layouts."""
    channels_first = x.movedim(-1, 1)
    convolve = partial(F.conv3d, bias=bias, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[-1])
    last = {"memory_format": torch.channels_last_3d}
    return {"conv3d contiguous": partial(convolve, channels_first.contiguous(), weight),
            "conv3d channels_last_3d": partial(convolve, channels_first.contiguous(**last), weight.contiguous(**last))}


def _conv2d_layouts(pixels: Tensor, weight: Tensor, **_: object) -> dict[str, Call]:
    """torch's strided convolution of the colours in either layout, its input copied into it beforehand."""
    colours = pixels.flatten(0, 1)[:, :3].to(weight.dtype)
    last = {"memory_format": torch.channels_last}
    return {"conv2d contiguous": partial(F.conv2d, colours.contiguous(), weight, stride=weight.shape[-1]),
            "conv2d channels_last": partial(F.conv2d, colours.contiguous(**last), weight.contiguous(**last),
                                            stride=weight.shape[-1])}


EXTRA_PEERS: dict[str, Callable[..., dict[str, Call]]] = {
    "depthwise_conv3d": _conv3d_layouts,
    "patch_embed": _conv2d_layouts,
    "attention_pool": attention_peers.attention_pool,
    "window_attention_pool": attention_peers.window_attention_pool,
}
