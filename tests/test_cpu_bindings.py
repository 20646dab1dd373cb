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
assert backends.load_error("cpu") is None


def window_pool_arguments() -> dict[str, Any]:
    corners = torch.tensor([[0, 4, 0, 6], [1, 4, 2, 6]])
    square = pack(torch.eye(16), torch.float32)
    keys, values = pack(torch.ones(2, 8, 16), torch.float32, transposed=True), pack(torch.ones(2, 8, 16), torch.float32)
    return {"x": torch.zeros(2, 4, 6, 16), "corners": corners,
            "weights": [square, torch.zeros(16), keys, values, square, torch.zeros(16)],
            "heads": 2, "window": 2, "eps": 1e-5, "y": torch.empty(8, 16)}


def assemble_arguments() -> dict[str, Any]:
    return {"y": torch.zeros(8, 16), "f": torch.zeros(2, 16), "split": torch.zeros(16),
            "corners": torch.tensor([[0, 4, 0, 6], [1, 4, 2, 6]]), "window": 2, "tokens": torch.empty(13, 16)}


def pool_arguments() -> dict[str, Any]:
    return {"x": torch.zeros(9, 16), "queries": torch.zeros(3, 16), "offsets": torch.tensor([0, 4, 9]), "eps": 1e-5,
            "z": torch.empty(2, 3, 16)}


def tower_arguments() -> dict[str, Any]:
    """As ``run`` hands them over, for two frames of 4 x 6 patches."""
    tower = STAB(16, patch=4, num_heads=2, gstra_heads=2).eval()
    streamed = tower._streamed.get()
    return {"pixels": torch.zeros(1, 2, 3, 16, 24), "present": torch.ones(1, 2, dtype=torch.bool),
            "normalise": normalisation(), "corners": torch.tensor([[0, 4, 0, 6], [1, 4, 2, 6]]),
            "weights": streamed.weights, "patch": 4, "r": streamed.reduced, "heads": 2, "window": 2, "eps": 1e-5,
            "tokens": torch.empty(13, 16), "clip_pooled": torch.empty(1, 2, 16), "frame_pooled": torch.empty(2, 2, 16)}


def mlp_arguments() -> dict[str, Any]:
    return {"x": torch.zeros(3, 16), "w1": pack(torch.zeros(24, 16), torch.float32), "b1": torch.zeros(24),
            "w2": pack(torch.zeros(8, 24), torch.float32), "b2": torch.zeros(8), "y": torch.empty(3, 8)}


def patch_arguments() -> dict[str, Any]:
    return {"pixels": torch.zeros(1, 2, 3, 16, 24), "present": None, "normalise": normalisation(), "patch": 4,
            "weight": pack(torch.zeros(16, 48), torch.float32), "y": torch.empty(1, 2, 4, 6, 16)}


def depthwise_arguments() -> dict[str, Any]:
    return {"x": torch.zeros(1, 2, 4, 6, 16), "taps": torch.zeros(27, 16), "bias": torch.zeros(16), "kt": 3, "kh": 3,
            "kw": 3, "y": torch.empty(1, 2, 4, 6, 16)}


def encoding_arguments() -> dict[str, Any]:
    weights = [pack(torch.zeros(8, 16), torch.float32), torch.zeros(8), torch.zeros(3, 8), torch.zeros(8),
               pack(torch.zeros(16, 8), torch.float32), torch.zeros(16), torch.zeros(27, 16), torch.zeros(16)]
    return {"x": torch.zeros(1, 2, 4, 6, 16), "weights": weights, "r": 8, "y": torch.empty(1, 2, 4, 6, 16)}


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "window_attention_pool": window_pool_arguments, "assemble_tokens": assemble_arguments,
    "attention_pool": pool_arguments, "stab_tower": tower_arguments, "token_mlp": mlp_arguments,
    "patch_embed": patch_arguments, "depthwise_conv3d": depthwise_arguments,
    "local_encoding": encoding_arguments}


def shortened(weights: list[Tensor], i: int) -> list[Tensor]:
    return [w.flatten()[:-1] if i == k else w for k, w in enumerate(weights)]


def rectangle(*corners: int) -> Tensor:
    return torch.tensor([[0, 4, 0, 6], corners])


OUTSIDE = [rectangle(1, 5, 2, 6), rectangle(1, 4, 3, 7), rectangle(-1, 2, 2, 6), rectangle(1, 4, -2, 2),
           rectangle(3, 0, 2, 6), rectangle(1, 2, 2, 6), rectangle(1, 4, 5, 6), torch.tensor([[0, 4, 0, 6]]),
           rectangle(1, 4, 2, 6).int()]

WRONG: dict[str, list[dict[str, Any]]] = {
    "window_attention_pool": [
        *({"corners": c} for c in OUTSIDE), {"y": torch.empty(7, 16)}, {"y": torch.empty(9, 16)},
        {"y": torch.empty(8, 15)}, {"x": torch.zeros(2, 4, 6, 16).transpose(1, 2)},
        *({"weights": shortened(window_pool_arguments()["weights"], i)} for i in range(6)), {"weights": []}],
    "assemble_tokens": [
        *({"corners": c} for c in OUTSIDE if int(c.min()) < 0 or c.dtype != torch.int64 or len(c) < 2),
        {"y": torch.zeros(7, 16)}, {"y": torch.zeros(8, 15)}, {"tokens": torch.empty(12, 16)},
        {"tokens": torch.empty(13, 15)}, {"split": torch.zeros(15)}, {"f": torch.zeros(3, 16)},
        {"f": torch.zeros(2, 16).bfloat16()}],
    "attention_pool": [
        {"offsets": torch.tensor(o)} for o in ([0, 4, 10], [-1, 4, 9], [0, 12, 9], [0, -3, 9], [0, 4, 5, 9])] + [
        {"queries": torch.zeros(2, 16)}, {"queries": torch.zeros(1, 3, 16)}, {"z": torch.empty(2, 4, 16)},
        {"offsets": torch.tensor([0, 4, 9]).int()}],
    "stab_tower": [
        *({"corners": c} for c in OUTSIDE), {"tokens": torch.empty(12, 16)}, {"tokens": torch.empty(14, 16)},
        {"clip_pooled": torch.empty(0, 2, 16)}, {"frame_pooled": torch.empty(1, 2, 16)},
        {"frame_pooled": torch.empty(2, 3, 16)}, {"present": torch.ones(1, 1, dtype=torch.bool)},
        {"normalise": torch.zeros(5)}, {"pixels": torch.zeros(1, 2, 2, 16, 24)},
        {"pixels": torch.zeros(1, 2, 3, 15, 24)}, {"pixels": torch.zeros(1, 2, 3, 16, 24).half()}, {"weights": []},
        *({"weights": shortened(tower_arguments()["weights"], i)} for i in range(18))],
    "token_mlp": [
        {"b1": torch.zeros(25)}, {"b2": torch.zeros(40)}, {"w1": torch.zeros(8, dtype=torch.uint8)},
        {"x": torch.zeros(3, 17)}, {"x": torch.zeros(3, 16).half()}, {"y": torch.empty(2, 8)},
        {"y": torch.empty(3, 8).bfloat16()}],
    "patch_embed": [
        {"pixels": torch.zeros(1, 2, 3, 15, 24)}, {"pixels": torch.zeros(1, 1, 3, 16, 24)},
        {"y": torch.empty(1, 2, 5, 6, 16)}, {"y": torch.empty(1, 2, 4, 7, 16)}, {"y": torch.empty(2, 2, 4, 6, 16)},
        {"y": torch.empty(1, 2, 4, 6, 40)}, {"present": torch.ones(1, 1, dtype=torch.bool)},
        {"pixels": torch.zeros(1, 2, 3, 16, 24).double()}],
    "depthwise_conv3d": [
        {"taps": torch.zeros(26, 16)}, {"bias": torch.zeros(15)}, {"y": torch.empty(1, 2, 4, 5, 16)},
        {"y": torch.empty(1, 2, 4, 6, 16).bfloat16()}, {"x": torch.zeros(1, 2, 4, 16, 6).transpose(3, 4)}],
    "local_encoding": [
        *({"weights": shortened(encoding_arguments()["weights"], i)} for i in range(8)), {"weights": []},
        {"y": torch.empty(1, 2, 3, 6, 16)}, {"y": torch.empty(1, 2, 4, 6, 16).bfloat16()}],
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


@pytest.mark.parametrize(("op", "wrong"), [pytest.param(op, wrong, id=f"{op}-{i}-{'-'.join(wrong)}")
                                           for op, cases in WRONG.items() for i, wrong in enumerate(cases)])
def test_refuses_what_does_not_fit(op: str, wrong: dict[str, Any]) -> None:
    arguments = {name: with_room(value) for name, value in (ARGUMENTS[op]() | wrong).items()}
    with pytest.raises(RuntimeError, match="panda_kernels: "):
        getattr(KERNELS, op)(**arguments)
