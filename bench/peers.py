"""What the kernels are timed against: the released tower, and the best that plain torch makes of the same arithmetic.

All peers hold the parameters of one ``python_ref.STAB`` and are called like it, ``peer(pixel_values, modules)``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from python_ref import STAB
from python_ref.crop import Rectangle, valid_rectangles
from python_ref.patch import normalise

Projection = Callable[[Tensor], Tensor]
Output = tuple[list[Tensor], list[Tensor]]


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A Linear on ``[..., C]`` as a channels-last 1x1 convolution.

    In float32 on CPUs torch gives convolutions to oneDNN and linears to MKL, which reaches half the speed on AMD.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight.flatten(1), bias)
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
    y = F.conv2d(rows, weight.flatten(1)[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, T, h, w, C]``, through a view that torch recognises as channels_last_3d."""
    padding = tuple(k // 2 for k in weight.shape[2:])
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, bias, padding=padding, groups=len(weight))
    return y.permute(0, 2, 3, 4, 1)


class VectorisedSTAB(nn.Module):
    """The released arithmetic, all projections in full, channels-last and batched over frames of equal rectangles."""

    def __init__(self, tower: STAB) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor, modules: Projection) -> Output:
        weight = self.tower.patch_embedding.weight
        mask = pixel_values[:, :, 3].to(weight.dtype)
        return self.encode(pixel_values, modules, valid_rectangles(mask, self.tower.patch, self.tower.window))

    def encode(self, pixel_values: Tensor, modules: Projection, rectangles: list[Rectangle]) -> Output:
        """The tower without the reading of the mask, which needs the host."""
        tower = self.tower
        frames = pixel_values.shape[1]
        x = self._patches(pixel_values)
        g = None
        if frames > 1:
            x0 = x
            x = self._lste(x0)
            g = self._gstra(x.flatten(1, 3)).repeat_interleave(frames, 0)
            x = x + x0
        x = x.flatten(0, 1)

        groups: dict[Rectangle, list[int]] = defaultdict(list)
        for i, rectangle in enumerate(rectangles):
            groups[rectangle].append(i)
        tokens: list[Tensor] = [x] * len(rectangles)
        grids: list[Tensor] = [x] * len(rectangles)
        for (row0, row1, col0, col1), members in groups.items():
            everything = len(members) == len(rectangles)
            y = self._lsd((x if everything else x[members])[:, row0:row1, col0:col1])
            f = self._fsra(y.flatten(1, 2))
            if g is not None:
                a = torch.sigmoid(tower.balance)
                f = tower.proj((1 - a) * (g if everything else g[members]) + a * f)
            split = tower.split_embedding.expand(*y.shape[:2], 1, -1)
            packed = torch.cat([f[:, None], torch.cat([y, split], 2).flatten(1, 2)], 1)
            projected = modules(packed.flatten(0, 1)).unflatten(0, packed.shape[:2])
            for i, frame in zip(members, projected.unbind(), strict=True):
                tokens[i] = frame
                grids[i] = torch.tensor(y.shape[1:3], device=y.device)
        return tokens, grids

    def _patches(self, pixels: Tensor) -> Tensor:
        weight = self.tower.patch_embedding.weight
        p = weight.shape[-1]
        images = pixels[:, :, :3]
        images = (normalise(images) if images.dtype == torch.uint8 else images).to(weight.dtype)
        batch, frames, _, height, width = images.shape
        h, w = height // p, width // p
        cells = images[..., : h * p, : w * p].reshape(batch, frames, 3, h, p, w, p).permute(0, 1, 3, 5, 2, 4, 6)
        return pointwise(cells.reshape(batch, frames, h, w, -1), weight)

    def _lste(self, x0: Tensor) -> Tensor:
        norm, w1, over_time, w2 = self.tower.lmhra1.pos_embed
        x = norm(x0.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
        x = _depthwise(pointwise(x, *w1.parameters()), *over_time.parameters())
        x1 = x0 + pointwise(x, *w2.parameters())
        return x1 + _depthwise(x1, *self.tower.dpe.parameters())

    def _gstra(self, tokens: Tensor) -> Tensor:
        block = self.tower.dec
        attn = block.attn
        e = self.tower.temporal_cls_token.expand(len(tokens), 1, -1)
        wq, wkv = attn.in_proj_weight.split([e.shape[-1], 2 * e.shape[-1]])
        bq, bkv = attn.in_proj_bias.split([e.shape[-1], 2 * e.shape[-1]])
        q, kv = F.linear(block.ln_1(e), wq, bq), pointwise(block.ln_3(tokens), wkv, bkv)
        g = e + attn.out_proj(_attend(q, kv, attn.num_heads))
        return (g + block.mlp(block.ln_2(g)))[:, 0]

    def _lsd(self, x: Tensor) -> Tensor:
        stage = self.tower.local_attention
        weights = (*stage.q.parameters(), *stage.kv.parameters(), *stage.proj.parameters())
        pooled = pool_windows(x, *weights, num_heads=stage.num_heads, window=stage.window)
        return pooled.view(len(x), x.shape[1] // stage.window, x.shape[2] // stage.window, -1)

    def _fsra(self, tokens: Tensor) -> Tensor:
        stage = self.tower.global_attention
        c = self.tower.class_embedding
        q = stage.q(c).expand(len(tokens), 1, -1)
        kv = pointwise(stage.kv[0](tokens), *stage.kv[1].parameters())
        return c + stage.proj(_attend(q, kv, stage.num_heads, scale=len(c) ** -0.5))[:, 0]


Attend = Callable[[Tensor, Tensor, Tensor, float | None], Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _attend(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None, attend: Attend = _sdpa) -> Tensor:
    """One query ``[B, 1, C]`` over ``[B, N, 2C]`` keys and values -> ``[B, 1, C]``."""
    k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attend(q.unflatten(-1, (num_heads, -1)).transpose(1, 2), k, v, scale).transpose(1, 2).flatten(2)


def pool_windows(x: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor, wq: Tensor, kv_norm_weight: Tensor,
                 kv_norm_bias: Tensor, wkv: Tensor, wp: Tensor, bp: Tensor, *, num_heads: int, window: int,
                 eps: float = 1e-5, scale: float | None = None, attend: Attend = _sdpa) -> Tensor:
    """The released form of LSD, all windows at once: ``[frames, rows, cols, C]`` -> ``[windows of all frames, C]``."""
    frames, dim, s = len(x), x.shape[-1], window
    h, w = x.shape[1] // s, x.shape[2] // s
    windows = x[:, : h * s, : w * s].reshape(frames, h, s, w, s, dim).transpose(2, 3).reshape(-1, s * s, dim)
    mean = windows.mean(1, keepdim=True)
    q = pointwise(F.layer_norm(mean, (dim,), q_norm_weight, q_norm_bias, eps), wq)
    kv = pointwise(F.layer_norm(windows, (dim,), kv_norm_weight, kv_norm_bias, eps), wkv)
    pooled = _attend(q, kv, num_heads, dim**-0.5 if scale is None else scale, attend)
    return (mean + pointwise(pooled, wp, bp))[:, 0]


def compiled(tower: STAB) -> Callable[[Tensor, Projection], Output]:
    """VectorisedSTAB under torch.compile, ``modules`` included; the mask is read outside the graph.

    On a GPU ``max-autotune``: products tuned, and the whole graph replayed as a CUDA graph.
    """
    peer = VectorisedSTAB(tower)
    mode = "max-autotune" if tower.split_embedding.is_cuda else None
    encode = torch.compile(peer.encode, fullgraph=True, mode=mode)

    def call(pixel_values: Tensor, modules: Projection) -> Output:
        mask = pixel_values[:, :, 3].to(tower.patch_embedding.weight.dtype)
        return encode(pixel_values, modules, valid_rectangles(mask, tower.patch, tower.window))

    return call
