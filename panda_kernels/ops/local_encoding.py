"""LSTE, local spatio-temporal encoding, in one op: a bottleneck over time, then the dynamic position encoding."""
from __future__ import annotations

import torch
from torch import Tensor

from ..checks import Checks
from ..spec import Cost, Draw, Inputs, OpSpec, tensor_bytes
from ._autocast import cast
from ._register import register
from .patch_embed import SPEC as PATCHES
from .patch_embed import check_patches


def _example(draw: Draw, *, shape: tuple[int, ...], reduced: int | None = None, norm_float32: bool = False,
             patch: int = 0, beyond: int = 0, uint8: bool = False, missing: int = 0) -> Inputs:
    """With a ``patch`` the first product is that of pixels, some ``beyond`` whole patches; the last ``missing`` frames
    are absent."""
    batch, frames, h, w, channels = shape
    inner = int(channels / 1.5) if reduced is None else reduced
    scale, shift = draw(channels, scale=0.2, shift=1.0), draw(channels, scale=0.2)
    inputs = {
        "x": draw(*shape),
        "norm_scale": scale.float() if norm_float32 else scale, "norm_shift": shift.float() if norm_float32 else shift,
        "w1": draw(inner, channels, scale=channels**-0.5), "b1": draw(inner, scale=0.1),
        "wt": draw(inner, 3, scale=3**-0.5), "bt": draw(inner, scale=0.1),
        "w2": draw(channels, inner, scale=inner**-0.5), "b2": draw(channels, scale=0.1),
        "wd": draw(channels, 1, 3, 3, 3, scale=27**-0.5), "bd": draw(channels, scale=0.1),
    }
    source = dict.fromkeys(("pixels", "weight", "present"))
    if patch:
        source = PATCHES.example(draw, shape=(batch, frames, h * patch + beyond, w * patch + beyond), channels=channels,
                                 patch=patch, uint8=uint8, missing=missing)
    return inputs | {"pixels": source["pixels"], "embedding": source["weight"], "present": source["present"]}


def _cost(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
          w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, pixels: Tensor | None = None,
          embedding: Tensor | None = None, present: Tensor | None = None) -> Cost:
    reduced, channels = w1.shape
    tokens = x.numel() // channels
    depth, composing, read = channels, 0, 0
    if pixels is not None and embedding is not None:
        depth = embedding[0].numel()
        composing, read = 2 * reduced * channels * depth, tokens * depth * pixels.element_size()
    # Products with their biases, three taps and a bias, the residual, then 27 taps, a bias and the residual.
    per_token = 2 * reduced * (depth + channels) + reduced + channels + reduced * 7 + channels + channels * (2 * 27 + 2)
    weights = tensor_bytes(norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd, embedding)
    return Cost(bytes=2 * tensor_bytes(x) + read + weights, flops=tokens * per_token + composing)


SPEC = OpSpec(
    name="local_encoding",
    schema="Tensor x, Tensor norm_scale, Tensor norm_shift, Tensor w1, Tensor b1, Tensor wt, Tensor bt, Tensor w2, "
           "Tensor b2, Tensor wd, Tensor bd, Tensor? pixels, Tensor? embedding, Tensor? present",
    source="SPEC stage 2, `lmhra1` and `dpe`",
    reference="python_ref.ops:local_encoding",
    example=_example,
    cost=_cost,
    test_sizes={
        "stab": {"shape": (2, 4, 4, 5, 64)},
        "float32_norm": {"shape": (1, 4, 3, 3, 48), "norm_float32": True},
        "tail": {"shape": (1, 3, 5, 3, 45)},
        "two_frames": {"shape": (1, 2, 3, 4, 32), "reduced": 19},
        "one_frame": {"shape": (2, 1, 3, 3, 24)},
        "one_patch": {"shape": (1, 4, 1, 1, 33)},
        "of_pixels": {"shape": (2, 3, 3, 4, 40), "patch": 4},
        "of_bytes": {"shape": (2, 2, 2, 3, 33), "patch": 3, "beyond": 2, "uint8": True, "missing": 1,
                     "norm_float32": True},
    },
    bench_sizes={
        "clips2": {"shape": (2, 4, 32, 32, 1024)},
        "clip": {"shape": (1, 4, 32, 32, 1024)},
        "clips4": {"shape": (4, 4, 32, 32, 1024)},
        "of_pixels": {"shape": (2, 4, 32, 32, 1024), "patch": 14},
        "dim1408": {"shape": (1, 4, 32, 32, 1408)},
    },
    compile_sizes={
        "dim1152": {"shape": (1, 4, 4, 4, 1152)},
        **{f"frames{frames}": {"shape": (1, frames, 4, 4, 1024)} for frames in (1, 2, 3, 5)},
    },
)


def _fake(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
          w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, pixels: Tensor | None, embedding: Tensor | None,
          present: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


_op = register(SPEC, _fake)


def local_encoding(x: Tensor, norm_scale: Tensor, norm_shift: Tensor, w1: Tensor, b1: Tensor, wt: Tensor, bt: Tensor,
                   w2: Tensor, b2: Tensor, wd: Tensor, bd: Tensor, *, pixels: Tensor | None = None,
                   embedding: Tensor | None = None, present: Tensor | None = None, backend: str = "auto") -> Tensor:
    """The whole of LSTE on channels-last tokens.

    ``x1 = x + W2 * tconv(W1 * (x * norm_scale + norm_shift) + b1) + b2``, then ``x2 = x1 + dw(x1)``: ``tconv``
    depthwise over time with kernel 3, ``dw`` depthwise 3x3x3, both zero padded.

    Tokens that are ``patch_embed(pixels, embedding, present=present)`` need no product with ``W1``: given what they
    come from, the op takes the ``x`` that ``W1`` is multiplied by from there, composing ``W1`` with the embedding, and
    a patch has fewer pixels than channels. It then has gradients of the pixels and of the embedding, beside those that
    ``x`` hands on to them.

    Args:
        x: ``[B, T, h, w, C]``, any floating dtype, any strides.
        norm_scale, norm_shift: ``[C]``, float32 or the dtype of ``x``: BatchNorm as an affine map, from running or
            from batch statistics.
        w1, b1: ``[R, C]`` and ``[R]``, the projection down.
        wt, bt: ``[R, 3]`` and ``[R]``, the taps over time (previous, same, next frame).
        w2, b2: ``[C, R]`` and ``[C]``, the projection up.
        wd, bd: ``[C, 1, 3, 3, 3]`` and ``[C]``, the position encoding (torch's ``Conv3d`` weight).
        pixels, embedding, present: what ``x`` was embedded from, as :func:`patch_embed` takes it, or None.
        backend: ``auto`` or a name of ``panda_kernels.backends.NAMES``.

    Returns:
        x2, ``[B, T, h, w, C]``, contiguous, dtype of ``x``.

    Raises:
        ValueError: a wrong rank or size, an empty batch, tensors on several devices, or only one of pixels and
            embedding.
        TypeError: a dtype that is not floating, or dtypes that differ.
        BackendError: the backend cannot serve the call.

    Source: SPEC stage 2, ``lmhra1`` and ``dpe``.
    """
    check = Checks(SPEC.name)
    check.shape("x", x, ("B", "T", "h", "w", "C"))
    check.not_empty("x", x)
    check.floating("x", x)
    channels = x.shape[-1]
    check.shape("w1", w1, ("R", channels))
    check.not_empty("w1", w1)
    reduced = w1.shape[0]
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "norm_scale": (norm_scale, (channels,)), "norm_shift": (norm_shift, (channels,)), "b1": (b1, (reduced,)),
        "wt": (wt, (reduced, 3)), "bt": (bt, (reduced,)), "w2": (w2, (channels, reduced)), "b2": (b2, (channels,)),
        "wd": (wd, (channels, 1, 3, 3, 3)), "bd": (bd, (channels,)),
    }
    for name, (tensor, shape) in expected.items():
        check.shape(name, tensor, shape)
    _check_source(check, x, pixels, embedding, present)
    x, w1, b1, wt, bt, w2, b2, wd, bd, embedding = cast(x, w1, b1, wt, bt, w2, b2, wd, bd, embedding)
    check.same(x=x, w1=w1, b1=b1, wt=wt, bt=bt, w2=w2, b2=b2, wd=wd, bd=bd, embedding=embedding)
    check.same_device(x=x, norm_scale=norm_scale, norm_shift=norm_shift)
    for name, tensor in (("norm_scale", norm_scale), ("norm_shift", norm_shift)):
        if tensor.dtype not in (torch.float32, x.dtype):
            check.fail(name, f"torch.float32 or {x.dtype} as x", tensor.dtype, TypeError)
    return _op(x, norm_scale, norm_shift, w1, b1, wt, bt, w2, b2, wd, bd, pixels, embedding, present, backend)


def _check_source(check: Checks, x: Tensor, pixels: Tensor | None, embedding: Tensor | None,
                  present: Tensor | None) -> None:
    if pixels is None or embedding is None:
        for name, tensor in (("pixels", pixels), ("embedding", embedding), ("present", present)):
            if tensor is not None:
                check.fail(name, "None without both of pixels and embedding", "a tensor")
        return
    check_patches(check, pixels, embedding, present, name="embedding")
    batch, frames, _, height, width = pixels.shape
    patch = embedding.shape[3]
    check.shape("x", x, (batch, frames, height // patch, width // patch, len(embedding)))


__all__ = ["SPEC", "local_encoding"]
