"""The encoders that STAB replaces, as the paper's Table 3 counts them: random weights of the published shapes.

CLIP ViT-L/14 at 224 x 224, with the projector of each baseline to a language model of width 4096: a linear layer for
Video-ChatGPT, which encodes 100 frames and averages them over time and over space first; two layers with a GELU for
Video-LLaVA, which encodes 8. The first makes the paper's 307 M parameters. Of the 425 M of the second some 100 M are
LanguageBind's attention over time in each layer, which transformers' CLIP does not have: it is left out here, so that
this encoder is lighter than theirs.
"""
from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import python_ref

from .tower import DIM, PATCH, PROJECTED, SQUARE

OP, SIZE = "encoder", "a video"
CLIP_8, CLIP_100 = "CLIP ViT-L/14, 8 frames", "CLIP ViT-L/14, 100 frames"
FRAMES = {CLIP_8: 8, CLIP_100: 100}


@dataclass(frozen=True)
class Published:
    """A row of the paper's Table 3."""

    parameters: float
    multiply_adds: float
    seconds: float


PAPER = {"panda_kernels": Published(45e6, 105.5e9, 41e-3), CLIP_8: Published(425e6, 864e9, 125e-3),
         CLIP_100: Published(307e6, 8109e9, 171e-3)}


def available() -> bool:
    return importlib.util.find_spec("transformers") is not None


class Encoder(nn.Module):
    """Frames ``[n, 3, 224, 224]`` -> projected tokens, ``[n * 256, 4096]`` or, averaged, ``[n + 256, 4096]``."""

    def __init__(self, name: str) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        shape = CLIPVisionConfig(hidden_size=DIM, intermediate_size=4 * DIM, num_hidden_layers=24,
                                 num_attention_heads=16, image_size=224, patch_size=PATCH)
        shape._attn_implementation = "sdpa"
        self.vision = CLIPVisionModel(shape)
        self.averages = name == CLIP_100
        after = [] if self.averages else [nn.GELU(), nn.Linear(PROJECTED, PROJECTED)]
        self.projector = nn.Sequential(nn.Linear(DIM, PROJECTED), *after)

    def forward(self, frames: Tensor) -> Tensor:
        patches = self.vision(pixel_values=frames).last_hidden_state[:, 1:]
        tokens = torch.cat([patches.mean(1), patches.mean(0)]) if self.averages else patches.flatten(0, 1)
        return self.projector(tokens)


@functools.cache
def encoder(name: str, dtype: torch.dtype, device: str) -> Encoder:
    torch.manual_seed(0)
    with torch.device(device):
        return Encoder(name).to(dtype).eval().requires_grad_(False)


def frames(count: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.ones(count, 3, 224, 224, dtype=dtype, device=device)


def parameters(*modules: nn.Module) -> int:
    """Of what is used: the tower's second bottleneck is in every checkpoint and never called."""
    named = (pair for module in modules for pair in module.named_parameters())
    return sum(p.numel() for name, p in named if not name.startswith("lmhra2."))


def counts() -> dict[str, tuple[int, int]]:
    """Parameters and multiply-adds, by torch's counter, of the released STAB with projector and of the encoders."""
    tower, head = (m.eval().requires_grad_(False) for m in (python_ref.STAB(DIM), python_ref.Projector(DIM, PROJECTED)))
    side = SQUARE[1] * PATCH
    released = multiply_adds(lambda: tower(torch.ones(2, 4, 4, side, side), head))
    found = {"reference": (parameters(tower, head), released)}
    if available():
        for name, number in FRAMES.items():
            with torch.device("meta"):
                module = Encoder(name).eval().requires_grad_(False)
            call = partial(module, frames(number, torch.float32, "meta"))
            found[name] = parameters(module), multiply_adds(call)
    return found


def multiply_adds(call: Callable[[], object]) -> int:
    # The counter does not know the CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
