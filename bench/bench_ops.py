"""Every op at the sizes of its specification against its plain-torch definition and the ``torch`` backend."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import Bench, Call, Errors
from panda_kernels import backends
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs, OpSpec, relative_error
from panda_kernels.verify import in_float64, public_op, refusals


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("full")
    rows = [(spec, size) for spec in SPECS.values() for size in list(spec.bench_sizes)[: None if full else 1]]
    metafunc.parametrize(("spec", "size"), rows, ids=[f"{spec.name}-{size}" for spec, size in rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_op(bench: Bench, spec: OpSpec, size: str, dtype: torch.dtype, device: str) -> None:
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value
              for name, value in spec.inputs(spec.bench_sizes[size], dtype).items()}
    backend = next(name for name in backends.NAMES if not refusals(spec, name, inputs))
    ours = partial(public_op(spec), **inputs)
    peers: dict[str, Call] = {"reference": partial(spec.load_reference(), **inputs)}
    if backend != "torch":
        peers["torch backend"] = partial(public_op(spec), **inputs, backend="torch")
    if extra := EXTRA_PEERS.get(spec.name):
        peers |= extra(**inputs)
    labels = {"op": spec.name, "size": size, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
    bench.row(labels, ours, peers, _errors(spec, inputs, ours, dtype), spec.cost(**inputs))


def _errors(spec: OpSpec, inputs: Inputs, ours: Callable[[], Tensor], dtype: torch.dtype) -> Errors:
    reference = spec.load_reference()
    with torch.inference_mode():
        exact = reference(**in_float64(inputs))
        error, reference_error = (relative_error(y, exact) for y in (ours(), reference(**inputs)))
    return Errors(error, reference_error, spec.tolerance.limit(reference_error, dtype))


def _conv3d_layouts(x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> dict[str, Call]:
    """torch's convolution alone, without the residual, on input already in either of its layouts."""
    channels_first = x.movedim(-1, 1)
    convolve = partial(F.conv3d, bias=bias, padding=[k // 2 for k in weight.shape[2:]], groups=x.shape[-1])
    last = {"memory_format": torch.channels_last_3d}
    return {"conv3d contiguous": partial(convolve, channels_first.contiguous(), weight),
            "conv3d channels_last_3d": partial(convolve, channels_first.contiguous(**last), weight.contiguous(**last))}


EXTRA_PEERS: dict[str, Callable[..., dict[str, Call]]] = {"depthwise_conv3d": _conv3d_layouts}
