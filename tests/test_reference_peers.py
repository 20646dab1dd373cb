"""The peers that the benchmarks time compute what the reference computes, gradients included."""

from __future__ import annotations

import pytest
import torch

from bench import attention_peers
from bench.peers import VectorisedSTAB
from panda_kernels.ops import SPECS
from python_ref import STAB

FULL = [(0, 6, 0, 8)] * 8
# Equal rectangles lie in different clips.
RAGGED = [*FULL[:2], (1, 4, 2, 8), (2, 6, 0, 7), (1, 4, 2, 8), (0, 5, 3, 6), *FULL[:2]]


@pytest.mark.parametrize("rectangles", [FULL, RAGGED], ids=["full", "ragged"])
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectorised_peer_is_the_reference(
    rectangles: list[tuple[int, int, int, int]], frames: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tower = STAB(32, dropout=0.0).to(dtype)
    for parameter in tower.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    pixels = torch.randn(8 // frames, frames, 4, 90, 120, dtype=dtype)
    pixels[:, :, 3] = 0
    for i, (r0, r1, c0, c1) in enumerate(rectangles):
        pixels.flatten(0, 1)[i, 3, r0 * 14 : r1 * 14, c0 * 14 : c1 * 14] = 1

    projector = torch.nn.Linear(32, 5).to(dtype)
    outcomes = []
    for peer in (tower, VectorisedSTAB(tower)):
        tower.zero_grad()
        leaf = pixels.clone().requires_grad_()
        tokens, grids = peer(leaf, projector)
        torch.cat(tokens).square().sum().backward()
        gradients = [p.grad for p in (leaf, *tower.parameters()) if p.grad is not None]
        outcomes.append((torch.cat(tokens), torch.stack(grids), gradients))
    (expected, expected_grids, expected_gradients), (actual, grids, gradients) = outcomes
    assert torch.equal(grids, expected_grids)
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert len(gradients) == len(expected_gradients)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))


def test_vectorised_peer_normalises_uint8_pixels() -> None:
    torch.manual_seed(0)
    tower = STAB(32).double().eval()
    pixels = torch.randint(1, 256, (1, 4, 4, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        expected, _ = tower(pixels, torch.nn.Identity())
        actual, _ = VectorisedSTAB(tower)(pixels, torch.nn.Identity())
    torch.testing.assert_close(torch.cat(actual), torch.cat(expected))


@pytest.mark.parametrize("sizes", [{"batch": 2, "tokens": 70, "channels": 64}, {"lengths": (9,) * 3, "channels": 24},
                                   {"batch": 2, "tokens": 5, "channels": 40, "queries": 3, "per_sample": True}])
def test_sdpa_peers_pool_as_the_op_does(sizes: dict[str, int]) -> None:
    spec = SPECS["attention_pool"]
    inputs = spec.inputs(sizes, torch.float64)
    peers = {name: call for name, call in attention_peers.attention_pool(**inputs).items() if name.startswith("sdpa")}
    assert {"sdpa math", "sdpa flash"} <= set(peers)
    for call in peers.values():
        torch.testing.assert_close(call(), spec.load_reference()(**inputs))


@pytest.mark.parametrize("size", ["image", "window3", "one_head"])
def test_sdpa_peers_pool_windows_as_the_op_does(size: str) -> None:
    spec = SPECS["window_attention_pool"]
    inputs = spec.inputs(spec.test_sizes[size], torch.float64)
    if size != "image":  # these have frames of several rectangles, which the peers cannot serve at once
        assert not attention_peers.window_attention_pool(**inputs)
        inputs["corners"][:] = inputs["corners"][0]
        row0, row1, col0, col1 = inputs["corners"][0].tolist()
        window = inputs["window"]
        inputs["num_windows"] = len(inputs["x"]) * ((row1 - row0) // window) * ((col1 - col0) // window)
    peers = attention_peers.window_attention_pool(**inputs)
    assert {"sdpa math", "sdpa flash"} <= set(peers)
    for call in peers.values():
        torch.testing.assert_close(call(), spec.load_reference()(**inputs))


def test_unequal_samples_have_no_sdpa_peer() -> None:
    spec = SPECS["attention_pool"]
    assert not attention_peers.attention_pool(**spec.inputs({"lengths": (3, 4), "channels": 8}, torch.float32))
