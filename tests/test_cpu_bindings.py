"""What the compiled ops refuse: whatever would have them read or write outside the tensors they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from panda_kernels import backends
from panda_kernels.backends.cpu._arrays import pack
from panda_kernels.backends.cpu.patch_embed import normalisation
from panda_kernels.nn import STAB

KERNELS = torch.ops.panda_kernels_cpu
Arguments = dict[str, Any]
assert backends.load_error("cpu") is None


def packed(*shape: int, dtype: torch.dtype = torch.float32, transposed: bool = False) -> Tensor:
    return pack(torch.zeros(*shape), dtype, transposed=transposed)


def rectangles(*second: int) -> Tensor:
    return torch.tensor([[0, 4, 0, 6], second])


def pack_arguments() -> Arguments:
    return {"w": torch.zeros(2, 16, 24), "matrices": 2, "transposed": False,
            "to": torch.empty(2 * KERNELS.packed_bytes(False, 16, 24), dtype=torch.uint8)}


def depthwise_arguments() -> Arguments:
    return {"x": torch.zeros(1, 2, 4, 6, 16), "taps": torch.zeros(27, 16), "bias": torch.zeros(16), "kt": 3, "kh": 3,
            "kw": 3, "y": torch.empty(1, 2, 4, 6, 16)}


def patch_arguments() -> Arguments:
    return {"pixels": torch.zeros(1, 2, 3, 16, 24), "present": torch.ones(1, 2, dtype=torch.bool),
            "normalise": normalisation(), "patch": 4, "weight": packed(16, 48), "bias": torch.zeros(16),
            "y": torch.empty(1, 2, 4, 6, 16)}


def encoding_arguments() -> Arguments:
    weights = [packed(8, 16), torch.zeros(8), torch.zeros(3, 8), torch.zeros(8), packed(16, 8), torch.zeros(16),
               torch.zeros(27, 16), torch.zeros(16)]
    return {"x": torch.zeros(1, 2, 4, 6, 16), "weights": weights, "r": 8, "y": torch.empty(1, 2, 4, 6, 16)}


def pool_arguments() -> Arguments:
    return {"x": torch.zeros(9, 16), "queries": torch.zeros(3, 16), "offsets": torch.tensor([0, 4, 9]), "eps": 1e-5,
            "z": torch.empty(2, 3, 16)}


def window_pool_arguments() -> Arguments:
    weights = [packed(16, 16), torch.zeros(16), packed(2, 8, 16, transposed=True), packed(2, 8, 16), packed(16, 16),
               torch.zeros(16)]
    return {"x": torch.zeros(2, 4, 6, 16), "added": None, "corners": rectangles(1, 4, 2, 6), "weights": weights,
            "heads": 2, "window": 2, "eps": 1e-5, "y": torch.empty(8, 16), "kept": []}


def assemble_arguments() -> Arguments:
    return {"y": torch.zeros(8, 16), "f": torch.zeros(2, 16), "split": torch.zeros(16),
            "corners": rectangles(1, 4, 2, 6), "window": 2, "tokens": torch.empty(13, 16)}


def linear_arguments() -> Arguments:
    return {"x": torch.zeros(3, 2, 16), "w": torch.zeros(2, 8, 16), "bias": torch.zeros(16),
            "quick_gelu": True, "y": torch.empty(3, 2, 8)}


def mlp_arguments() -> Arguments:
    return {"x": torch.zeros(3, 16), "w1": packed(24, 16), "b1": torch.zeros(24), "w2": packed(8, 24),
            "b2": torch.zeros(8), "y": torch.empty(3, 8)}


def clip_arguments() -> Arguments:
    """As ``stab_tower.run`` hands them over, for two frames of 4 x 6 patches."""
    streamed = STAB(16, patch=4, num_heads=2, gstra_heads=2).eval()._streamed.get()
    return {"pixels": torch.zeros(1, 2, 3, 16, 24), "present": torch.ones(1, 2, dtype=torch.bool),
            "normalise": normalisation(), "corners": rectangles(1, 4, 2, 6), "weights": streamed.clips, "patch": 4,
            "r": streamed.reduced, "heads": 2, "window": 2, "eps": 1e-5, "tokens": torch.empty(13, 16),
            "clip_pooled": torch.empty(1, 2, 16), "frame_pooled": torch.empty(2, 2, 16)}


def image_arguments() -> Arguments:
    """Two images instead of one clip, with a triangle of two steps."""
    images = STAB(160, patch=7, num_heads=2, gstra_heads=2).eval()._streamed.get().images
    return {"pixels": torch.zeros(2, 1, 3, 28, 42), "present": torch.ones(2, 1, dtype=torch.bool),
            "normalise": normalisation(), "corners": rectangles(1, 4, 2, 6), "weights": images, "patch": 7, "heads": 2,
            "window": 2, "eps": 1e-5, "tokens": torch.empty(13, 160), "frame_pooled": torch.empty(2, 2, 160)}


def depthwise_gradient_arguments() -> Arguments:
    return {"x": torch.zeros(GRID), "grad": torch.zeros(GRID), "kt": 3, "kh": 3, "kw": 3,
            "taps": torch.empty(27, 16), "bias": torch.empty(16)}


def patch_gradient_arguments() -> Arguments:
    arguments = patch_arguments()
    del arguments["y"]
    return arguments | {"grad": torch.zeros(GRID), "add": False, "weight": torch.empty(16, 48), "bias": torch.empty(16)}


def pool_gradient_arguments() -> Arguments:
    arguments = pool_arguments()
    del arguments["z"]
    return arguments | {"grad": torch.zeros(2, 3, 16), "grad_x": torch.empty(9, 16), "grad_queries": torch.empty(3, 16)}


def window_pool_gradient_arguments() -> Arguments:
    """Nothing kept: the last three weights are those of what is computed again."""
    arguments = window_pool_arguments()
    del arguments["y"]
    weights = [packed(2, 8, 16, transposed=True), packed(16, 16), packed(2, 8, 16), packed(2, 8, 16, transposed=True),
               packed(16, 16), packed(16, 16), torch.zeros(16), packed(2, 8, 16)]
    sums = [torch.empty(16, *more) for more in ((16,), (), (16,), (16,), (), (16,), ())]
    return arguments | {"grad": torch.zeros(8, 16), "weights": weights, "grad_x": torch.empty(2, 4, 6, 16),
                        "sums": sums}


def kept_windows() -> list[Tensor]:
    return [torch.zeros(8, 16), torch.zeros(8, 16)]


def product_arguments() -> Arguments:
    return {"x": torch.zeros(5, 24), "w": packed(16, 24), "bias": torch.zeros(16), "residual": torch.zeros(5, 16),
            "y": torch.empty(5, 16)}


def weight_gradient_arguments() -> Arguments:
    return {"grad": torch.zeros(5, 16), "x": torch.zeros(5, 24), "add": False, "w": torch.empty(16, 24),
            "b": torch.empty(16)}


def assemble_gradient_arguments() -> Arguments:
    return {"grad": torch.zeros(13, 16), "corners": rectangles(1, 4, 2, 6), "window": 2, "y": torch.empty(8, 16),
            "f": torch.empty(2, 16), "split": torch.empty(16)}


def statistics_arguments() -> Arguments:
    return {"x": torch.zeros(5, 16), "result": torch.empty(2, 16)}


def affine_arguments() -> Arguments:
    return {"x": torch.zeros(5, 16), "scale": torch.zeros(16), "shift": torch.zeros(16), "y": torch.empty(5, 16)}


GRID = (1, 2, 4, 6, 16)
ARGUMENTS: dict[str, Callable[[], Arguments]] = {
    "pack": pack_arguments, "depthwise_conv3d": depthwise_arguments, "patch_embed": patch_arguments,
    "local_encoding": encoding_arguments, "attention_pool": pool_arguments,
    "window_attention_pool": window_pool_arguments, "assemble_tokens": assemble_arguments, "linear": linear_arguments,
    "token_mlp": mlp_arguments, "stab_clips": clip_arguments, "stab_images": image_arguments,
    "depthwise_gradient": depthwise_gradient_arguments,
    "patch_embed_gradient": patch_gradient_arguments, "attention_pool_gradient": pool_gradient_arguments,
    "window_attention_pool_gradient": window_pool_gradient_arguments, "product": product_arguments,
    "weight_gradient": weight_gradient_arguments, "assemble_tokens_gradient": assemble_gradient_arguments,
    "batch_statistics": statistics_arguments, "affine": affine_arguments}

NOT_RECTANGLES = [rectangles(3, 0, 2, 6), rectangles(1, 2, 2, 6), rectangles(1, 4, 5, 6), rectangles(-1, 2, 2, 6),
                  rectangles(1, 4, -2, 2), rectangles(2**62, -2**62, 2, 6), torch.tensor([[0, 4, 0, 6]]),
                  rectangles(1, 4, 2, 6).int(), rectangles(1, 4, 2, 6).T.contiguous().T]
OUTSIDE = [*NOT_RECTANGLES, rectangles(1, 5, 2, 6), rectangles(1, 4, 3, 7)]
PIXELS: list[Arguments] = [
    {"pixels": torch.zeros(1, 2, 3, 15, 24)}, {"pixels": torch.zeros(1, 1, 3, 16, 24)},
    {"pixels": torch.zeros(1, 2, 2, 16, 24)}, {"pixels": torch.zeros(1, 2, 3, 16, 24).half()},
    {"pixels": torch.zeros(2, 3, 16, 24)}, {"pixels": torch.zeros(1, 0, 3, 16, 24)}, {"patch": 0}, {"patch": -4},
    {"patch": 5}, {"patch": 2**32 + 4}, {"normalise": torch.zeros(5)}, {"present": torch.ones(1, 1, dtype=torch.bool)},
    {"present": torch.ones(1, 2)}]


NOT_KEPT = [[torch.zeros(8, 16)], kept_windows() + kept_windows()[:1], [torch.zeros(8, 16), torch.zeros(7, 16)],
            [torch.zeros(8, 17), torch.zeros(8, 16)], [torch.zeros(8, 16), torch.zeros(8, 16).bfloat16()],
            [torch.zeros(16, 8).T, torch.zeros(8, 16)]]
NOT_ADDED = torch.zeros(1, 4, 6, 16), torch.zeros(2, 4, 6, 16).bfloat16(), torch.zeros(2, 6, 4, 16).transpose(1, 2)


def each(name: str, *values: Any) -> list[Arguments]:
    return [{name: value} for value in values]


def damaged(op: str, name: str = "weights") -> list[Arguments]:
    """A weight too short, too long or of another type, one after the other; too few of them; too many."""
    weights = ARGUMENTS[op]()[name]
    changes: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.flatten()[:-1], lambda w: torch.cat([w, w]), lambda w: w.double()]
    lists = [[change(w) if i == k else w for k, w in enumerate(weights)] for i in range(len(weights))
             for change in changes]
    return each(name, [], weights[:-1], [*weights, weights[0]], *lists)


WRONG: dict[str, list[Arguments]] = {
    "batch_statistics": [
        *each("x", torch.zeros(5, 17), torch.zeros(0, 16), torch.zeros(16, 5).T, torch.zeros(5, 16).half()),
        *each("result", torch.empty(3, 16), torch.empty(2, 15), torch.empty(2, 16).bfloat16())],
    "affine": [
        *each("x", torch.zeros(6, 16), torch.zeros(5, 17), torch.zeros(5, 16).bfloat16()),
        *each("scale", torch.zeros(15), torch.zeros(16).bfloat16()), *each("shift", torch.zeros(17)),
        *each("y", torch.empty(4, 16), torch.empty(5, 16).bfloat16(), torch.empty(16, 5).T)],
    "assemble_tokens_gradient": [
        *each("corners", *NOT_RECTANGLES), *each("window", 0, 1),
        *each("grad", torch.zeros(12, 16), torch.zeros(13, 15), torch.zeros(13, 16).bfloat16()),
        *each("y", torch.empty(7, 16), torch.empty(8, 16).bfloat16()), *each("f", torch.empty(3, 16)),
        *each("split", torch.empty(15), torch.empty(16).bfloat16())],
    "pack": [
        *each("w", torch.zeros(2, 40, 24), torch.zeros(2, 16, 25), torch.zeros(16, 24), torch.zeros(2, 16, 24).half(),
              torch.zeros(3, 16, 24), torch.zeros(2, 16, 24).bfloat16()),
        *each("matrices", 1, 3), {"transposed": True},
        *each("to", torch.empty(6143, dtype=torch.uint8), torch.empty(6144), torch.empty(0, dtype=torch.uint8))],
    "depthwise_conv3d": [
        *each("x", torch.zeros(2, 4, 6, 16), torch.zeros(1, 2, 4, 16, 6).transpose(3, 4), torch.zeros(1, 2, 4, 7, 16)),
        *each("taps", torch.zeros(26, 16), torch.zeros(27, 15), torch.zeros(27, 16).bfloat16()),
        *each("bias", torch.zeros(15), torch.zeros(16).double()), *each("kw", 5, 0), {"kt": -3, "kh": -3},
        *each("y", torch.empty(1, 2, 4, 5, 16), torch.empty(GRID).bfloat16(),
              torch.empty(1, 2, 4, 16, 6).transpose(3, 4))],
    "patch_embed": [
        *PIXELS, *each("weight", packed(16, 49), packed(33, 48), packed(16, 48, dtype=torch.bfloat16)),
        *each("bias", torch.zeros(15), torch.zeros(16).double()),
        *each("y", torch.empty(1, 2, 5, 6, 16), torch.empty(1, 2, 4, 7, 16), torch.empty(2, 2, 4, 6, 16),
              torch.empty(1, 2, 4, 6, 40), torch.empty(GRID).bfloat16(), torch.empty(GRID).half())],
    "local_encoding": [
        *damaged("local_encoding"), *each("r", 9, -8, 0),
        *each("x", torch.zeros(2, 4, 6, 16), torch.zeros(1, 2, 4, 0, 16), torch.zeros(GRID).double(),
              torch.zeros(1, 2, 6, 4, 16).transpose(2, 3)),
        *each("y", torch.empty(1, 2, 3, 6, 16), torch.empty(GRID).bfloat16())],
    "attention_pool": [
        *each("offsets", *(torch.tensor(o) for o in ([0, 4, 10], [-1, 4, 9], [0, 12, 9], [0, -3, 9], [0, 4, 5, 9],
                                                     [0, 9], [0, 4, 2**60])),
              torch.tensor([0, 4, 9]).int(), torch.tensor([[0, 0], [4, 0], [9, 0]])[:, 0]),
        *each("queries", torch.zeros(2, 16), torch.zeros(1, 3, 16), torch.zeros(3, 15), torch.zeros(3, 16).bfloat16()),
        *each("x", torch.zeros(8, 16), torch.zeros(9, 15), torch.zeros(16, 9).T, torch.zeros(9, 16).half()),
        *each("z", torch.empty(2, 4, 16), torch.empty(1, 3, 16), torch.empty(2, 3, 16).bfloat16(), torch.empty(6, 16))],
    "window_attention_pool": [
        *damaged("window_attention_pool"), *each("corners", *OUTSIDE), *each("heads", 0, -2, 3, 4),
        *each("window", 0, -2, 1, 3), *each("kept", *NOT_KEPT),
        *each("y", torch.empty(7, 16), torch.empty(9, 16), torch.empty(8, 15), torch.empty(8, 16).bfloat16()),
        *each("x", torch.zeros(2, 4, 6, 16).transpose(1, 2), torch.zeros(2, 4, 6, 17), torch.zeros(4, 6, 16)),
        *each("added", *NOT_ADDED)],
    "assemble_tokens": [
        *each("corners", *NOT_RECTANGLES, rectangles(0, 2**40, 2, 6)), *each("window", 0, 1),
        *each("y", torch.zeros(7, 16), torch.zeros(8, 15), torch.zeros(8, 16).bfloat16(), torch.zeros(16, 8).T),
        *each("tokens", torch.empty(12, 16), torch.empty(13, 15), torch.empty(13, 16).bfloat16()),
        *each("split", torch.zeros(15), torch.zeros(16).bfloat16()),
        *each("f", torch.zeros(3, 16), torch.zeros(2, 16).bfloat16(), torch.zeros(32))],
    "linear": [
        *each("x", torch.zeros(4, 2, 16), torch.zeros(3, 1, 16), torch.zeros(3, 2, 17), torch.zeros(3, 32),
              torch.zeros(3, 2, 16).double(), torch.zeros(2, 3, 16).transpose(0, 1)),
        *each("w", torch.zeros(8, 16), torch.zeros(2, 9, 16), torch.zeros(2, 8, 17), torch.zeros(2, 8, 16).half(),
              torch.zeros(2, 16, 8).mT),
        *each("bias", torch.zeros(8), torch.zeros(17), torch.zeros(16).bfloat16()),
        *each("y", torch.empty(2, 2, 8), torch.empty(3, 1, 8), torch.empty(3, 2, 40), torch.empty(3, 16),
              torch.empty(3, 2, 8).bfloat16())],
    "token_mlp": [
        *each("b1", torch.zeros(40), torch.zeros(24).bfloat16()), *each("b2", torch.zeros(40), torch.zeros(9)),
        *each("w1", torch.zeros(8, dtype=torch.uint8), packed(24, 16).view(torch.float32)),
        {"w2": packed(8, 25)},
        *each("x", torch.zeros(3, 17), torch.zeros(3, 16).half(), torch.zeros(48), torch.zeros(16, 3).T),
        *each("y", torch.empty(2, 8), torch.empty(3, 9), torch.empty(3, 8).bfloat16())],
    "stab_images": [
        *damaged("stab_images"), *PIXELS[2:],
        *each("pixels", torch.zeros(2, 1, 3, 27, 42), torch.zeros(1, 1, 3, 28, 42)),
        *each("corners", *OUTSIDE), *each("heads", 0, 3), *each("window", 0, 1, 3),
        *each("tokens", torch.empty(12, 160), torch.empty(14, 160), torch.empty(13, 161),
              torch.empty(13, 160).bfloat16()),
        *each("frame_pooled", torch.empty(1, 2, 160), torch.empty(2, 3, 160), torch.empty(2, 2, 160).double())],
    "stab_clips": [
        *damaged("stab_clips"), *PIXELS, *each("corners", *OUTSIDE), *each("r", 9, -10), *each("heads", 0, 3),
        *each("window", 0, 1, 3),
        *each("tokens", torch.empty(12, 16), torch.empty(14, 16), torch.empty(13, 17), torch.empty(13, 16).bfloat16()),
        *each("clip_pooled", torch.empty(0, 2, 16), torch.empty(1, 3, 16), torch.empty(1, 32)),
        *each("frame_pooled", torch.empty(1, 2, 16), torch.empty(2, 3, 16), torch.empty(2, 2, 16).double())],
    "depthwise_gradient": [
        *each("x", torch.zeros(2, 4, 6, 16), torch.zeros(1, 2, 4, 16, 6).transpose(3, 4), torch.zeros(1, 2, 4, 7, 16),
              torch.zeros(GRID).bfloat16()),
        *each("grad", torch.zeros(1, 2, 4, 5, 16), torch.zeros(GRID).bfloat16()), *each("kw", 5, 0),
        {"kt": -3, "kh": -3}, *each("taps", torch.empty(26, 16), torch.empty(27, 15), torch.empty(27, 16).bfloat16()),
        *each("bias", torch.empty(15), torch.empty(16).double())],
    "patch_embed_gradient": [
        *PIXELS, *each("weight", torch.empty(16, 49), torch.empty(15, 48), torch.empty(16, 48).bfloat16()),
        *each("bias", torch.empty(15), torch.empty(16).double()),
        *each("grad", torch.zeros(1, 2, 5, 6, 16), torch.zeros(2, 2, 4, 6, 16), torch.zeros(1, 2, 4, 6, 17),
              torch.zeros(GRID).half(), torch.zeros(1, 2, 4, 16, 6).transpose(3, 4))],
    "attention_pool_gradient": [
        *each("offsets", *(torch.tensor(o) for o in ([0, 4, 10], [-1, 4, 9], [0, 12, 9], [0, 4, 5, 9], [0, 9]))),
        *each("queries", torch.zeros(2, 16), torch.zeros(1, 3, 16), torch.zeros(2, 3, 16), torch.zeros(3, 15)),
        *each("x", torch.zeros(8, 16), torch.zeros(9, 15), torch.zeros(16, 9).T, torch.zeros(9, 16).bfloat16()),
        *each("grad", torch.zeros(2, 4, 16), torch.zeros(1, 3, 16), torch.zeros(2, 3, 16).bfloat16()),
        *each("grad_x", torch.empty(8, 16), torch.empty(9, 16).bfloat16(), torch.empty(3, 3, 16)),
        *each("grad_queries", torch.empty(2, 16), torch.empty(2, 3, 16), torch.empty(3, 16).bfloat16())],
    "window_attention_pool_gradient": [
        *damaged("window_attention_pool_gradient"), *damaged("window_attention_pool_gradient", "sums"),
        *({"kept": kept, "weights": window_pool_gradient_arguments()["weights"][:5]} for kept in NOT_KEPT[1:]),
        {"kept": kept_windows()}, {"weights": window_pool_gradient_arguments()["weights"][:5]},
        *each("corners", *OUTSIDE), *each("heads", 0, -2, 3, 4), *each("window", 0, -2, 1, 3),
        *each("grad", torch.zeros(7, 16), torch.zeros(9, 16), torch.zeros(8, 16).bfloat16()),
        *each("grad_x", torch.empty(1, 4, 6, 16), torch.empty(2, 4, 6, 16).bfloat16()),
        *each("x", torch.zeros(2, 4, 6, 16).transpose(1, 2), torch.zeros(2, 4, 6, 17), torch.zeros(4, 6, 16)),
        *each("added", *NOT_ADDED)],
    "product": [
        *each("x", torch.zeros(4, 24), torch.zeros(5, 25), torch.zeros(24, 5).T, torch.zeros(5, 24).bfloat16(),
              torch.zeros(5, 24).half(), torch.zeros(120)),
        *each("w", packed(33, 24), packed(16, 25), packed(16, 24, dtype=torch.bfloat16)),
        *each("bias", torch.zeros(15), torch.zeros(16).bfloat16()),
        *each("residual", torch.zeros(4, 16), torch.zeros(5, 17), torch.zeros(5, 16).bfloat16(), torch.zeros(16, 5).T),
        *each("y", torch.empty(4, 16), torch.empty(5, 40), torch.empty(5, 16).bfloat16(), torch.empty(16, 5).T)],
    "weight_gradient": [
        *each("grad", torch.zeros(4, 16), torch.zeros(5, 17), torch.zeros(5, 16).bfloat16(), torch.zeros(16, 5).T),
        *each("x", torch.zeros(4, 24), torch.zeros(5, 25), torch.zeros(5, 24).bfloat16(), torch.zeros(5, 24).half()),
        *each("w", torch.empty(16, 25), torch.empty(15, 24), torch.empty(16, 24).bfloat16(), torch.empty(24, 16).T),
        *each("b", torch.empty(15), torch.empty(16).bfloat16())],
}


def with_room(value: Any) -> Any:
    """What is not refused stays inside memory of its own: the tests fail, and nothing else breaks."""
    if isinstance(value, list):
        return [with_room(v) for v in value]
    if not isinstance(value, Tensor) or not value.is_contiguous():
        return value
    room = torch.zeros(value.numel() + 4096, dtype=value.dtype)
    return room[:value.numel()].copy_(value.flatten()).view(value.shape)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_takes_what_fits(op: str) -> None:
    getattr(KERNELS, op)(**{name: with_room(value) for name, value in ARGUMENTS[op]().items()})


def test_takes_calls_without_what_is_optional() -> None:
    KERNELS.stab_clips(**clip_arguments() | {"present": None})
    KERNELS.depthwise_conv3d(**depthwise_arguments() | {"bias": None})
    KERNELS.product(**product_arguments() | {"bias": None, "residual": None})
    for name, arguments in (("", window_pool_arguments()), ("_gradient", window_pool_gradient_arguments())):
        getattr(KERNELS, f"window_attention_pool{name}")(**arguments | {"added": torch.zeros(2, 4, 6, 16)})


def test_takes_what_is_kept_and_then_no_weights_to_compute_it_again() -> None:
    KERNELS.window_attention_pool(**window_pool_arguments() | {"kept": kept_windows()})
    arguments = window_pool_gradient_arguments()
    KERNELS.window_attention_pool_gradient(**arguments | {"weights": arguments["weights"][:5], "kept": kept_windows()})


@pytest.mark.parametrize(("sizes", "dtype"), [
    ((0,), torch.float32), ((2, -1), torch.float32), ((2**40, 2**40), torch.uint8), ((2**45,), torch.float32),
    ((4,), torch.complex64), ((4,), torch.int64)])
def test_refuses_to_give_such_results(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeError, match="panda_kernels: no result"):
        KERNELS.result(sizes, dtype)


@pytest.mark.parametrize(("op", "wrong"), [pytest.param(op, wrong, id=f"{op}-{i}-{'-'.join(wrong)}")
                                           for op, cases in WRONG.items() for i, wrong in enumerate(cases)])
def test_refuses_what_does_not_fit(op: str, wrong: Arguments) -> None:
    arguments = {name: with_room(value) for name, value in (ARGUMENTS[op]() | wrong).items()}
    with pytest.raises(RuntimeError, match="panda_kernels: "):
        getattr(KERNELS, op)(**arguments)
