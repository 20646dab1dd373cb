"""What every op promises beside its values: registration, gradients, compilation, autocast, backends, errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from op_cases import HOMES, ON_CPU, OPS, call, first_case, is_float, make, result_dtype, with_gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import panda_kernels
from panda_kernels import backends
from panda_kernels.ops import SPECS
from panda_kernels.spec import Inputs

CASES = [(op, case) for op in OPS for case in SPECS[op].test_sizes]
# One for each way an op is called: optional tensors there and not, packed and dense.
WAYS = [(op, first_case(op)) for op in OPS] + [
    ("attention_pool", "packed_sets"), ("depthwise_conv3d", "one_frame"), ("local_encoding", "of_pixels"),
    ("patch_embed", "missing")]


def arguments(op: str, inputs: Inputs, backend: str) -> tuple[Any, ...]:
    return (*inputs.values(), backend)


def leaves(inputs: Inputs) -> Inputs:
    return {name: value.detach().requires_grad_() if is_float(value) else value for name, value in inputs.items()}


@pytest.mark.parametrize(("op", "case"), WAYS)
@pytest.mark.parametrize(("backend", "device"), HOMES)
def test_opcheck(backend: str, device: str, op: str, case: str) -> None:
    inputs = make(op, case, torch.float32, device)
    forward = getattr(torch.ops.panda_kernels, op).default
    torch.library.opcheck(forward, arguments(op, leaves(inputs), backend))
    y = call(op, inputs, backend)
    needs = [is_float(value) for value in inputs.values() if isinstance(value, Tensor)]
    backward = getattr(torch.ops.panda_kernels, f"{op}_bwd").default
    torch.library.opcheck(backward, (torch.ones_like(y), *arguments(op, inputs, backend), needs),
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_gradcheck(op: str, case: str) -> None:
    # float32 affines of float64 tokens cannot be differenced in float64.
    inputs = {name: value.double() if is_float(value) else value
              for name, value in make(op, case, torch.float64).items()}
    names = [name for name, value in inputs.items() if is_float(value)]

    def function(*floats: Tensor) -> Tensor:
        return call(op, inputs | dict(zip(names, floats, strict=True)), "torch")

    floats = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, floats, fast_mode=True, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("op", "case"), WAYS)
@pytest.mark.parametrize(("backend", "device"), HOMES)
def test_compiles_whole(backend: str, device: str, op: str, case: str) -> None:
    torch._dynamo.reset()
    inputs = make(op, case, torch.float32, device)
    function = partial(getattr(panda_kernels, op), backend=backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (y, grads), (expected, expected_grads) = with_gradients(compiled, inputs), with_gradients(function, inputs)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


def test_other_rectangles_recompile_at_most_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(panda_kernels.window_attention_pool, fullgraph=True, backend=counter)
    inputs = make("window_attention_pool", "ragged", torch.float32)
    for rows in (6, 4, 2):
        rectangles = panda_kernels.Rectangles.from_corners([(0, rows, 0, 8)] * 4)
        call_inputs = inputs | {"corners": rectangles.corners, "num_windows": rectangles.num_windows}
        assert torch.equal(compiled(**call_inputs), panda_kernels.window_attention_pool(**call_inputs))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("op", "case"), CASES)
def test_torch_backend_never_waits_for_the_device(op: str, case: str) -> None:
    """Fake tensors have no values: reading one, as ``.item()`` and ``.tolist()`` do, raises."""
    inputs = make(op, case, torch.float32)
    y = call(op, inputs, "torch")
    module = import_module(f"panda_kernels.backends.torch.{op}")
    needs = [is_float(value) for value in inputs.values() if isinstance(value, Tensor)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs.values()]
        assert module.fwd(*fakes).shape == y.shape
        grads = module.bwd(mode.from_tensor(y), *fakes, needs=needs)
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
    for grad, tensor, needed in zip(grads, tensors, needs, strict=False):
        assert not needed or grad.shape == tensor.shape


@pytest.mark.parametrize(("op", "case"), CASES)
def test_meta_tensors_tell_shape_and_dtype(op: str, case: str) -> None:
    inputs = make(op, case, torch.bfloat16)
    y = call(op, inputs, "torch")
    meta = call(op, {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in inputs.items()}, "auto")
    assert (meta.shape, meta.dtype, meta.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ON_CPU)
def test_autocast(backend: str, op: str) -> None:
    """float32 tensors give what bfloat16 ones give, and gradients in float32."""
    inputs = make(op, first_case(op), torch.float32)
    keep = ("norm_scale", "norm_shift")
    cast = {n: v.bfloat16() if is_float(v) and n not in keep else v for n, v in inputs.items()}
    expected, expected_grads = with_gradients(partial(getattr(panda_kernels, op), backend=backend), cast)
    with torch.autocast("cpu", torch.bfloat16):
        y, grads = with_gradients(partial(getattr(panda_kernels, op), backend=backend), inputs)
    assert y.dtype == result_dtype(op, torch.bfloat16) and torch.equal(y, expected)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32 and torch.equal(grad, expected_grads[name].float())


def test_an_unknown_backend_is_named_with_those_there_are() -> None:
    expected = r"token_mlp: backend must be one of auto, cuda, triton, cpu, torch, got 'cuda9'"
    with pytest.raises(backends.BackendError, match=expected):
        call("token_mlp", make("token_mlp", "packed", torch.float32), "cuda9")


def test_every_refusal_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "refusals", lambda name, *_: [f"{name} is away", f"{name} is tired"])
    inputs = make("token_mlp", "packed", torch.float32)
    with pytest.raises(backends.BackendError) as error:
        call("token_mlp", inputs, "auto")
    for name in backends.NAMES:
        assert f"{name}: {name} is away; {name} is tired" in str(error.value)
    with pytest.raises(backends.BackendError, match=r"torch is away") as error:
        call("token_mlp", inputs, "torch")
    assert "cpu is away" not in str(error.value)


def test_auto_goes_on_to_the_next_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make("token_mlp", "packed", torch.float32)
    expected = call("token_mlp", inputs, "torch")
    monkeypatch.setattr(backends, "load_error", lambda name: None if name == "torch" else f"{name} is not built")
    assert torch.equal(call("token_mlp", inputs, "auto"), expected)
    with pytest.raises(backends.BackendError, match="cpu is not built"):
        call("token_mlp", inputs, "cpu")


Change = Callable[[Any], Any]
INTEGER: Change = lambda t: t.int()  # noqa: E731
DOUBLE: Change = lambda t: t.double()  # noqa: E731
META: Change = lambda t: t.to("meta")  # noqa: E731
FLAT: Change = lambda t: t.flatten()  # noqa: E731
NONE_LEFT: Change = lambda t: t[:0]  # noqa: E731
WIDER: Change = lambda t: torch.cat([t, t[..., :1]], -1)  # noqa: E731
LONGER: Change = lambda t: torch.cat([t, t[:1]])  # noqa: E731


def to(value: object) -> Change:
    return lambda _: value


def tensor(*values: Any, dtype: torch.dtype = torch.int64) -> Change:
    return to(torch.tensor(values, dtype=dtype))


FAULTS: list[tuple[str, str, str, Change, type[Exception], str]] = [
    ("patch_embed", "stab", "pixels", lambda t: t[0], ValueError, r"pixels: expected shape \[B, T, P, H, W\]"),
    ("patch_embed", "stab", "pixels", NONE_LEFT, ValueError, "pixels: expected at least one element"),
    ("patch_embed", "stab", "pixels", INTEGER, TypeError, "pixels: expected .*uint8, got torch.int32"),
    ("patch_embed", "stab", "pixels", lambda t: t[:, :, :2], ValueError, "pixels: expected at least 3 planes, got 2"),
    ("patch_embed", "stab", "pixels", lambda t: t[..., :13], ValueError, "pixels: expected at least one patch of 14 x"),
    ("patch_embed", "stab", "pixels", lambda t: t[..., :13, :], ValueError, "pixels: expected at least one patch"),
    ("patch_embed", "stab", "pixels", META, ValueError, "weight: expected device meta"),
    ("patch_embed", "stab", "weight", lambda t: t[:, :2], ValueError, r"weight: expected shape \[C, 3, p, p\]"),
    ("patch_embed", "stab", "weight", lambda t: t[..., :7], ValueError, "weight: expected square patches, got 14 x 7"),
    ("patch_embed", "stab", "weight", NONE_LEFT, ValueError, "weight: expected at least one element"),
    ("patch_embed", "stab", "weight", INTEGER, TypeError, "weight: expected a floating dtype, got torch.int32"),
    ("patch_embed", "missing", "present", LONGER, ValueError, r"present: expected shape \[2, 2\], got \[3, 2\]"),
    ("patch_embed", "missing", "present", INTEGER, TypeError, "present: expected torch.bool, got torch.int32"),
    ("batch_statistics", "grid", "x", lambda t: t[0, 0, 0, 0, 0], ValueError, r"x: expected shape .*, got a scalar"),
    ("batch_statistics", "grid", "x", NONE_LEFT, ValueError, "x: expected at least one element"),
    ("batch_statistics", "grid", "x", INTEGER, TypeError, "x: expected a floating dtype, got torch.int32"),
    ("depthwise_conv3d", "stab", "x", INTEGER, TypeError, "x: expected a floating dtype, got torch.int32"),
    ("depthwise_conv3d", "stab", "x", lambda t: t[0], ValueError, "x: expected shape"),
    ("depthwise_conv3d", "stab", "x", NONE_LEFT, ValueError, "x: expected at least one element"),
    ("depthwise_conv3d", "stab", "x", WIDER, ValueError, r"weight: expected shape \[65, 1, kt, kh, kw\]"),
    ("depthwise_conv3d", "stab", "weight", lambda t: t[..., :2], ValueError, r"weight: expected odd kernel sizes"),
    ("depthwise_conv3d", "stab", "weight", DOUBLE, TypeError, "weight: expected torch.float32 as x, got torch.float64"),
    ("depthwise_conv3d", "stab", "bias", LONGER, ValueError, r"bias: expected shape \[64\], got \[65\]"),
    ("depthwise_conv3d", "stab", "bias", META, ValueError, "bias: expected device cpu as x, got meta"),
    ("local_encoding", "stab", "x", FLAT, ValueError, "x: expected shape"),
    ("local_encoding", "stab", "x", NONE_LEFT, ValueError, "x: expected at least one element"),
    ("local_encoding", "stab", "x", INTEGER, TypeError, "x: expected a floating dtype"),
    ("local_encoding", "stab", "norm_scale", LONGER, ValueError, r"norm_scale: expected shape \[64\]"),
    ("local_encoding", "stab", "norm_shift", DOUBLE, TypeError, "norm_shift: expected torch.float32 .*float64"),
    ("local_encoding", "stab", "norm_shift", META, ValueError, "norm_shift: expected device cpu"),
    ("local_encoding", "stab", "w1", WIDER, ValueError, r"w1: expected shape \[R, 64\], got \[42, 65\]"),
    ("local_encoding", "stab", "w1", NONE_LEFT, ValueError, "w1: expected at least one element"),
    ("local_encoding", "stab", "wt", WIDER, ValueError, r"wt: expected shape \[42, 3\], got \[42, 4\]"),
    ("local_encoding", "stab", "w2", LONGER, ValueError, r"w2: expected shape \[64, 42\]"),
    ("local_encoding", "stab", "wd", WIDER, ValueError, r"wd: expected shape \[64, 1, 3, 3, 3\]"),
    ("local_encoding", "stab", "bd", DOUBLE, TypeError, "bd: expected torch.float32 as x"),
    ("local_encoding", "of_pixels", "pixels", to(None), ValueError, "embedding: expected None without both of pixels"),
    ("local_encoding", "of_pixels", "embedding", to(None), ValueError, "pixels: expected None without both of pixels"),
    ("local_encoding", "of_pixels", "pixels", lambda t: t[:, :2], ValueError, r"x: expected shape \[2, 2, 3, 4, 40\]"),
    ("local_encoding", "of_pixels", "pixels", lambda t: t[..., :15], ValueError, r"x: expected shape \[2, 3, 3, 3, 40"),
    ("local_encoding", "of_pixels", "pixels", lambda t: t[:, :, :2], ValueError, "pixels: expected at least 3 planes"),
    ("local_encoding", "of_pixels", "embedding", lambda t: t[..., :3], ValueError, "embedding: expected square"),
    ("local_encoding", "of_pixels", "embedding", lambda t: t[1:], ValueError, r"x: expected shape .* 39\]"),
    ("local_encoding", "of_pixels", "embedding", DOUBLE, TypeError, "embedding: expected torch.float32 as x"),
    ("local_encoding", "of_bytes", "present", LONGER, ValueError, r"present: expected shape \[2, 2\], got \[3, 2\]"),
    ("attention_pool", "gstra", "x", FLAT, ValueError, r"x: expected shape \[B, N, C\]"),
    ("attention_pool", "gstra", "x", lambda t: t[:, :0], ValueError, "x: expected at least one element"),
    ("attention_pool", "gstra", "x", INTEGER, TypeError, "x: expected a floating dtype"),
    ("attention_pool", "gstra", "queries", WIDER, ValueError, r"queries: expected shape \[n, 64\], got \[8, 65\]"),
    ("attention_pool", "gstra", "queries", NONE_LEFT, ValueError, "queries: expected at least one element"),
    ("attention_pool", "gstra", "queries", DOUBLE, TypeError, "queries: expected torch.float32 as x"),
    ("attention_pool", "gstra", "queries", META, ValueError, "queries: expected device cpu as x"),
    ("attention_pool", "a_set_a_sample", "queries", LONGER, ValueError, r"queries: expected shape \[2, n, 40\]"),
    ("attention_pool", "gstra", "eps", to(-1.0), ValueError, "eps: expected a number >= 0, got -1.0"),
    ("attention_pool", "packed", "x", lambda t: t[None], ValueError, r"x: expected shape \[total, C\]"),
    ("attention_pool", "packed", "cu_seqlens", lambda t: t.long(), TypeError, "cu_seqlens: expected torch.int32"),
    ("attention_pool", "packed", "cu_seqlens", lambda t: t[:1], ValueError, "cu_seqlens: expected at least two"),
    ("attention_pool", "packed", "cu_seqlens", lambda t: t[:-1], ValueError, "cu_seqlens: expected offsets .*0 to 139"),
    ("attention_pool", "packed", "cu_seqlens", lambda t: t.flip(0), ValueError, "cu_seqlens: expected offsets"),
    ("window_attention_pool", "ragged", "x", lambda t: t[0], ValueError, "x: expected shape"),
    ("window_attention_pool", "ragged", "x", NONE_LEFT, ValueError, "x: expected at least one element"),
    ("window_attention_pool", "ragged", "x", INTEGER, TypeError, "x: expected a floating dtype"),
    ("window_attention_pool", "ragged", "corners", LONGER, ValueError, r"corners: expected shape \[4, 4\]"),
    ("window_attention_pool", "ragged", "corners", INTEGER, TypeError, "corners: expected torch.int64"),
    ("window_attention_pool", "image", "corners", tensor([0, 5, 0, 8]), ValueError, "corners: .*5 x 7 in frame 0"),
    ("window_attention_pool", "image", "corners", tensor([-1, 5, 0, 7]), ValueError, "corners: .*rows -1 to 5"),
    ("window_attention_pool", "image", "corners", tensor([4, 5, 0, 7]), ValueError, "corners: .*at least 2 x 2"),
    ("window_attention_pool", "image", "corners", META, ValueError, "corners: expected device cpu"),
    ("window_attention_pool", "image", "num_windows", to(7), ValueError, "num_windows: expected 6, .*got 7"),
    ("window_attention_pool", "image", "num_windows", to(0), ValueError, "num_windows: expected at least 1, got 0"),
    ("window_attention_pool", "image", "num_heads", to(3), ValueError, "num_heads: expected a divisor of the 40"),
    ("window_attention_pool", "image", "num_heads", to(0), ValueError, "num_heads: expected a divisor of the 40"),
    ("window_attention_pool", "image", "window", to(6), ValueError, "window: expected from 1 .*5 x 7, got 6"),
    ("window_attention_pool", "image", "eps", to(-1.0), ValueError, "eps: expected a number >= 0"),
    ("window_attention_pool", "image", "wq", WIDER, ValueError, r"wq: expected shape \[40, 40\]"),
    ("window_attention_pool", "image", "wkv", LONGER, ValueError, r"wkv: expected shape \[80, 40\]"),
    ("window_attention_pool", "image", "wp", DOUBLE, TypeError, "wp: expected torch.float32 as x"),
    ("window_attention_pool", "image", "bp", LONGER, ValueError, r"bp: expected shape \[40\]"),
    ("assemble_tokens", "ragged", "y", FLAT, ValueError, r"y: expected shape \[num_windows, C\]"),
    ("assemble_tokens", "ragged", "y", NONE_LEFT, ValueError, "y: expected at least one element"),
    ("assemble_tokens", "ragged", "y", INTEGER, TypeError, "y: expected a floating dtype"),
    ("assemble_tokens", "ragged", "y", LONGER, ValueError, "y: expected 23 windows.*got 24"),
    ("assemble_tokens", "ragged", "f", WIDER, ValueError, r"f: expected shape \[frames, 64\]"),
    ("assemble_tokens", "ragged", "split", LONGER, ValueError, r"split: expected shape \[64\]"),
    ("assemble_tokens", "ragged", "split", DOUBLE, TypeError, "split: expected torch.float32 as y"),
    ("assemble_tokens", "ragged", "corners", LONGER, ValueError, r"corners: expected shape \[4, 4\]"),
    ("assemble_tokens", "ragged", "corners", INTEGER, TypeError, "corners: expected torch.int64"),
    ("assemble_tokens", "image", "corners", tensor([5, 0, 0, 7]), ValueError, "corners: .*rows 5 to 0"),
    ("assemble_tokens", "image", "num_tokens", to(12), ValueError, "num_tokens: expected 9, .*got 12"),
    ("assemble_tokens", "image", "num_tokens", to(7), ValueError, "num_tokens: expected more than the 6 windows"),
    ("assemble_tokens", "image", "window", to(0), ValueError, "window: expected at least 1, got 0"),
    ("token_mlp", "packed", "x", lambda t: t[0, 0], ValueError, r"x: expected shape \[..., C\], got a scalar"),
    ("token_mlp", "packed", "x", NONE_LEFT, ValueError, "x: expected at least one element"),
    ("token_mlp", "packed", "x", INTEGER, TypeError, "x: expected a floating dtype"),
    ("token_mlp", "packed", "w1", WIDER, ValueError, r"w1: expected shape \[hidden, 64\]"),
    ("token_mlp", "packed", "b1", LONGER, ValueError, r"b1: expected shape \[96\]"),
    ("token_mlp", "packed", "w2", WIDER, ValueError, r"w2: expected shape \[out, 96\]"),
    ("token_mlp", "packed", "b2", DOUBLE, TypeError, "b2: expected torch.float32 as x"),
    ("token_mlp", "packed", "b2", META, ValueError, "b2: expected device cpu as x, got meta"),
]


@pytest.mark.parametrize(("op", "case", "argument", "change", "error", "message"), FAULTS)
def test_bad_input_is_named(op: str, case: str, argument: str, change: Change, error: type[Exception],
                            message: str) -> None:
    inputs = make(op, case, torch.float32)
    inputs[argument] = change(inputs[argument])
    with pytest.raises(error, match=f"^{op}: {message}"):
        call(op, inputs, "auto")


def test_every_op_has_faults_and_a_documented_function() -> None:
    assert {fault[0] for fault in FAULTS} == set(OPS)
    for op in OPS:
        text = getattr(panda_kernels, op).__doc__
        assert all(part in text for part in ("Args:", "Returns:", "Raises:", "Source:")), op


@pytest.mark.parametrize("op", OPS)
def test_cost_counts_bytes_by_dtype(op: str) -> None:
    """The operations of a call are the same in every dtype, its bytes are not."""
    spec = SPECS[op]
    for sizes in spec.test_sizes.values():
        half, single = (spec.cost(**spec.inputs(sizes, dtype)) for dtype in (torch.bfloat16, torch.float32))
        assert half.flops == single.flops >= 0
        assert 0 < half.bytes < single.bytes
