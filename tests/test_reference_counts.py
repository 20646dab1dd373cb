"""Parameters and operations of the reference against the published counts, and how it begins."""

from __future__ import annotations

import pytest
import torch
from golden import weights as golden
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from python_ref import STAB, Projector


def millions(*modules: nn.Module, without: str = "lmhra2.") -> float:
    parameters = [p for m in modules for name, p in m.named_parameters() if not name.startswith(without)]
    return round(sum(p.numel() for p in parameters) / 1e6, 2)


def test_parameters() -> None:
    with torch.device("meta"):
        tower, projector = STAB(), Projector()
    assert millions(tower) == 24.09
    assert millions(projector) == 20.98
    assert millions(tower, projector) == 45.07


def test_multiply_adds_of_eight_square_frames() -> None:
    tower, projector = STAB().eval().requires_grad_(False), Projector().requires_grad_(False)
    pixels = torch.ones(2, 4, 4, 448, 448)
    # The counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(pixels, projector)
    assert round(counter.get_total_flops() / 2e9, 1) == 105.5


def test_names_and_shapes_are_the_released_ones() -> None:
    with torch.device("meta"):
        state = STAB().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == golden.SHAPES


@pytest.mark.parametrize(("dim", "reduced", "heads"), [(1024, 682, 8), (1152, 768, 8), (1408, 938, 11)])
def test_released_widths(dim: int, reduced: int, heads: int) -> None:
    with torch.device("meta"):
        tower = STAB(dim)
    assert tower.lmhra1.pos_embed[1].out_channels == reduced
    assert tower.dec.attn.num_heads == heads
    assert tower.local_attention.num_heads == tower.global_attention.num_heads == 8


def test_initialisation() -> None:
    torch.manual_seed(0)
    state = STAB(64).state_dict()
    zero = {name for name, tensor in state.items() if not tensor.any() and "running" not in name}
    layers = ("lmhra1.pos_embed.3", "lmhra2.pos_embed.3", "dec.attn.out_proj", "dec.mlp.c_proj")
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"balance", "temporal_cls_token", "dpe.bias", "dec.attn.in_proj_bias"}
    # Begun by torch at zero: every norm's bias, the attention's input bias, and the batch counters.
    expected |= {name for name in state if name.endswith("num_batches_tracked")}
    expected |= {f"{norm}.bias" for norm in ("dec.ln_1", "dec.ln_2", "dec.ln_3", "proj.0", "local_attention.q.0")}
    expected |= {f"{norm}.bias" for norm in ("local_attention.kv.0", "global_attention.q.0", "global_attention.kv.0")}
    expected |= {f"lmhra{i}.pos_embed.0.bias" for i in (1, 2)}
    assert zero == expected
    assert 0.7 < float(state["class_embedding"].std()) < 1.3
    assert 0.7 < float(state["split_embedding"].std()) < 1.3
