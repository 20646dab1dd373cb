"""Stage 3, GSTRA, global spatio-temporal aggregation: one learned query attends to all tokens of a clip."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class GSTRA(nn.Module):
    """A pre-norm cross-attention block: ``g = e + MHA(LN1(e), LN3(x), LN3(x))``, then ``g + MLP(LN2(g))``."""

    def __init__(self, dim: int, num_heads: int = 8, dropout: float = 0.5) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, num_heads)
        self.ln_1 = nn.LayerNorm(dim)
        c_proj = nn.Linear(4 * dim, dim)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(dim, 4 * dim),
                gelu=QuickGELU(),
                dropout=nn.Dropout(dropout),
                c_proj=c_proj,
            )
        )
        self.ln_2 = nn.LayerNorm(dim)
        self.ln_3 = nn.LayerNorm(dim)
        for layer in (self.attn.out_proj, c_proj):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Query ``[1, B, C]`` and tokens ``[N, B, C]`` -> ``g [B, C]``."""
        memory = self.ln_3(tokens)
        return self._residual(query, self.attn(self.ln_1(query), memory, memory, need_weights=False)[0])

    def attend(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` together with the attention weights ``[B, heads, N]``, for pictures."""
        memory = self.ln_3(tokens)
        attended, weights = self.attn(self.ln_1(query), memory, memory, average_attn_weights=False)
        return self._residual(query, attended), weights[:, :, 0]

    def _residual(self, query: Tensor, attended: Tensor) -> Tensor:
        g = query + attended
        return (g + self.mlp(self.ln_2(g)))[0]
