"""From an :class:`OpSpec` to a torch op: schema, backend choice, fake, autograd.

Every op is one boundary ``panda_kernels::<name>(<schema>, str backend)`` and its gradient
``panda_kernels::<name>_bwd(Tensor grad, <schema>, str backend, bool[] needs) -> Tensor[]``, which recomputes from the
inputs what it needs and returns the gradients asked for, in the order of the tensor arguments.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..spec import OpSpec
from ._autocast import suspended

_library = torch.library.Library("panda_kernels", "DEF")
SPECS: dict[str, OpSpec] = {}


def register(spec: OpSpec, fake: Callable[..., Tensor],
             check_values: Callable[..., None] | None = None) -> Callable[..., Tensor]:
    """Define ``spec`` as a torch op.

    ``fake`` takes the op's arguments and returns an empty result. ``check_values`` takes them too and raises on what
    shapes and dtypes do not tell; it is called with real tensors only, also from a compiled graph.
    """
    SPECS[spec.name] = spec
    name = f"panda_kernels::{spec.name}"
    _library.define(f"{spec.name}({spec.schema}, str backend) -> Tensor")
    _library.define(f"{spec.name}_bwd(Tensor grad, {spec.schema}, str backend, bool[] needs) -> Tensor[]")

    def fwd(*args: Any) -> Tensor:
        *inputs, backend = args
        if check_values is not None:
            check_values(*inputs)
        with suspended(inputs[0]):
            return backends.choose(spec.name, "fwd", backend, inputs)(*inputs)

    def bwd(grad: Tensor, *args: Any) -> list[Tensor]:
        *inputs, backend, needs = args
        with suspended(grad):
            grads = backends.choose(spec.name, "bwd", backend, inputs)(grad, *inputs, needs=needs)
        return [g.contiguous() for g, needed in zip(grads, needs, strict=False) if needed]

    def bwd_fake(grad: Tensor, *args: Any) -> list[Tensor]:
        *inputs, _, needs = args
        return [t.new_empty(t.shape) for t, needed in zip(_tensors(inputs), needs, strict=True) if needed]

    _library.impl(spec.name, fwd, "CompositeExplicitAutograd")
    _library.impl(f"{spec.name}_bwd", bwd, "CompositeExplicitAutograd")
    torch.library.register_fake(name, lambda *args: fake(*args[:-1]), lib=_library)
    torch.library.register_fake(f"{name}_bwd", bwd_fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*_tensors(inputs))
        ctx.plain = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved) if tensor else plain for tensor, plain in zip(ctx.is_tensor, ctx.plain, strict=True)]
        needs = [n for n, tensor in zip(ctx.needs_input_grad, ctx.is_tensor, strict=True) if tensor]
        grads = iter(getattr(torch.ops.panda_kernels, f"{spec.name}_bwd")(grad, *args, needs))
        return tuple(next(grads) if t and n else None
                     for t, n in zip(ctx.is_tensor, ctx.needs_input_grad, strict=True))

    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.panda_kernels, spec.name)


def _tensors(args: Any) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]
