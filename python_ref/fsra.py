"""Stage 7, FSRA, frame-wise spatial aggregation: one learned query attends to a frame's window tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FSRA(nn.Module):
    """``f = c + Wp * MHA(Wq * LNq(c), Wkv * LNkv(y)) + bp``, scale ``C**-0.5`` of the full width."""

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False))
        self.kv = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim, bias=False))
        self.proj = nn.Linear(dim, dim)

    def attend(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Query ``[C]`` and one frame's tokens ``[h' * w', C]`` -> ``f [C]`` and the weights ``[heads, h' * w']``."""
        q = self.q(query[None]).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        k, v = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(-2, -1) * query.shape[-1] ** -0.5, dim=-1)
        return query + self.proj((weights @ v).flatten()), weights[:, 0]

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        return self.attend(query, tokens)[0]
