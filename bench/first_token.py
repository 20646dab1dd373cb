"""How long a user waits for the first token: the visual path, then a Llama-shaped decoder over its tokens and a prompt.

Weights are random; only shapes matter to the time. On a CPU the decoder is scaled down, and the projector with it.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import python_ref
from panda_kernels.nn import Projector
from panda_kernels.spec import Tolerance, relative_error

from . import tower
from .measure import Errors

OP, VISUAL = "first token", "first token, visual part"
PROMPT = 32
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """A Llama decoder."""

    name: str
    width: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int


SMALL = Shape("Llama of 8 layers, 1024 wide", 1024, 2752, 8, 8, 1024)
LLAMA_7B = Shape("Llama 7B", 4096, 11008, 32, 32, 32000)


def shape_for(device: str, dtype: torch.dtype) -> Shape:
    """The 7B shape where it fits, its 6.7 G parameters and as much again."""
    if device != "cpu" and torch.cuda.mem_get_info()[0] > 2 * 6.7e9 * dtype.itemsize:
        return LLAMA_7B
    return SMALL


class FirstToken:
    """Visual paths by ours and by the released arithmetic, both to the same decoder."""

    def __init__(self, case: tower.Case, dtype: torch.dtype, device: str) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        self.shape = shape_for(device, dtype)
        torch.manual_seed(0)
        self.decoder = _decoder(self.shape, dtype, device)
        self.embed: Run = self.decoder.get_input_embeddings()
        self.prompt = torch.ones(1, PROMPT, dtype=torch.long, device=device)
        self.exact_head = python_ref.Projector(tower.DIM, self.shape.width).double().requires_grad_(False)
        contest = tower.contenders(dtype, device=device)
        self.ours = self._visual(contest.ours, Projector(tower.DIM, self.shape.width))
        self.reference = self._visual(contest.peers["reference"], python_ref.Projector(tower.DIM, self.shape.width))

    def _visual(self, run: Run, head: nn.Module) -> Run:
        head.load_state_dict(self.exact_head.state_dict())
        head.to(self.device, self.dtype).requires_grad_(False)
        return lambda pixels: head(run(pixels))

    def answer(self, tokens: Tensor) -> Tensor:
        """Visual tokens ``[N, width]`` -> the logits of the first token, ``[vocabulary]``."""
        prompt = self.embed(self.prompt)
        found = self.decoder(inputs_embeds=torch.cat([tokens[None], prompt], 1), use_cache=True, logits_to_keep=1)
        return found.logits[0, -1]

    def whole(self, visual: Run, pixels: Tensor) -> Tensor:
        return self.answer(visual(pixels))

    def errors(self, pixels: Tensor) -> Errors:
        """Of the logits, against those of visual tokens from float64; the decoder is the same."""
        exact_tokens = self.exact_head(tower.exact_tokens(self.case, False))
        exact = self.answer(exact_tokens.to(self.device, self.dtype))
        ours, reference = (relative_error(self.whole(run, pixels), exact) for run in (self.ours, self.reference))
        return Errors(ours, reference, Tolerance().limit(reference, self.dtype))


def _decoder(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
                         num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
                         vocab_size=shape.vocabulary, max_position_embeddings=4096)
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 7 G parameters are not to be made in float32 first
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)
