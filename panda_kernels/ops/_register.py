"""From an :class:`OpSpec` to a torch op: schema, backend choice, fake, autograd.

Every op is one boundary ``panda_kernels::<name>(<schema>, str backend)`` and its gradient
``panda_kernels::<name>_bwd(Tensor grad, <schema>, str backend, bool[] needs) -> Tensor[]``, which recomputes from the
inputs what it needs and returns the gradients asked for, in the order of the tensor arguments.

A graph is traced for all backends. Outside of one, a backend whose module has ``keep`` may hand its own gradient what
this would compute again: ``keep(*inputs)`` gives the result and a list of tensors, which ``bwd`` gets as ``kept``.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

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
        return _asked(grads, needs)

    def bwd_fake(grad: Tensor, *args: Any) -> list[Tensor]:
        *inputs, _, needs = args
        return [t.new_empty(t.shape) for t, needed in zip(_tensors(inputs), needs, strict=True) if needed]

    _library.impl(spec.name, fwd, "CompositeExplicitAutograd")
    _library.impl(f"{spec.name}_bwd", bwd, "CompositeExplicitAutograd")
    torch.library.register_fake(name, lambda *args: fake(*args[:-1]), lib=_library)
    torch.library.register_fake(f"{name}_bwd", bwd_fake, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save(ctx, inputs)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        args, _ = _saved(ctx)
        op = getattr(torch.ops.panda_kernels, f"{spec.name}_bwd")
        return _where_needed(ctx.is_tensor, ctx.needs_input_grad, lambda needs: op(grad, *args, needs))

    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.panda_kernels, spec.name)

    def call(*args: Any) -> Tensor:
        y = call_kept(spec.name, check_values, args)
        return op(*args) if y is None else y

    return call


def call_kept(op: str, check_values: Callable[..., None] | None, args: Sequence[Any], **more: Any) -> Tensor | None:
    """A call outside of graphs, of a backend that keeps something for its gradient; None where there is neither.

    ``more`` is for ``keep`` alone.
    """
    *inputs, backend = args
    module = _keeper(op, backend, inputs)
    if module is None:
        return None
    if check_values is not None:
        check_values(*inputs)
    return _Kept.apply(module, more, *inputs)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: ModuleType, more: dict[str, Any], *inputs: Any) -> Tensor:
        ctx.module = module
        with suspended(inputs[0]):
            y, kept = module.keep(*inputs, **more)
        _save(ctx, inputs, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, kept = _saved(ctx)

        def gradients(needs: list[bool]) -> list[Tensor]:
            with suspended(grad):
                return _asked(ctx.module.bwd(grad, *inputs, needs=needs, kept=kept), needs)

        return None, None, *_where_needed(ctx.is_tensor, ctx.needs_input_grad[2:], gradients)


def _keeper(op: str, backend: str, inputs: Sequence[Any]) -> ModuleType | None:
    """The module that serves this call and keeps something for the gradient, if one is wanted and nothing traced."""
    tensors = _tensors(inputs)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if not wanted or not is_eager(*tensors):
        return None
    module = backends.first(op, "fwd", backend, inputs)
    return module if hasattr(module, "keep") else None


def is_eager(*tensors: Tensor) -> bool:
    """Whether a call computes, on plain tensors: nothing is being compiled, traced or transformed."""
    if is_traced() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def is_traced() -> bool:
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


def _save(ctx: Any, args: Sequence[Any], kept: Iterable[Tensor] = ()) -> None:
    ctx.save_for_backward(*_tensors(args), *kept)
    ctx.plain = [None if isinstance(a, Tensor) else a for a in args]
    ctx.is_tensor = [isinstance(a, Tensor) for a in args]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The arguments, and what was kept beside them."""
    saved = iter(ctx.saved_tensors)
    args = [next(saved) if tensor else plain for tensor, plain in zip(ctx.is_tensor, ctx.plain, strict=True)]
    return args, list(saved)


def _where_needed(is_tensor: Sequence[bool], needed: Sequence[bool],
                  gradients: Callable[[list[bool]], Iterable[Tensor]]) -> tuple[Tensor | None, ...]:
    """One for each argument, of ``gradients(needs)``, which gives those needed of the tensors."""
    grads = iter(gradients([n for n, tensor in zip(needed, is_tensor, strict=True) if tensor]))
    return tuple(next(grads) if t and n else None for t, n in zip(is_tensor, needed, strict=True))


def _asked(grads: Iterable[Any], needs: Iterable[bool]) -> list[Tensor]:
    return [g.contiguous() for g, needed in zip(grads, needs, strict=False) if needed]


def _tensors(args: Any) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]
