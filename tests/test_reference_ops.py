"""The definitions of the ops, chained, are the released tower; and each one's own promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from python_ref import STAB, Projector, ops
from python_ref.fusion import fuse
from python_ref.patch import normalise

RECTANGLES = [(0, 6, 0, 8), (1, 4, 2, 8), (0, 5, 3, 6), (2, 6, 0, 7)]


def small_tower(dim: int = 32) -> STAB:
    """Every parameter random, so that no zero-initialised layer hides a stage."""
    torch.manual_seed(0)
    tower = STAB(dim, dropout=0.0).double()
    for name, tensor in tower.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=max(tensor[0].numel(), 1) ** -0.5 if tensor.ndim > 1 else 0.5)
    return tower.eval()


def masked_pixels() -> Tensor:
    pixels = torch.randn(1, 4, 4, 6 * 14, 8 * 14, dtype=torch.float64)
    pixels[:, :, 3] = 0
    for i, (r0, r1, c0, c1) in enumerate(RECTANGLES):
        pixels[0, i, 3, r0 * 14 : r1 * 14, c0 * 14 : c1 * 14] = 1
    return pixels


def folded_query(q: Tensor, wk: Tensor, gamma: Tensor, num_heads: int, scale: float) -> Tensor:
    """One projected query ``[C]`` seen from the normalised tokens, a row a head."""
    per_head = torch.einsum("nd,ndc->nc", q.view(num_heads, -1), wk.unflatten(0, (num_heads, -1)))
    return scale * gamma * per_head


def project_pooled(z: Tensor, wv: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    """Pooled normalised tokens ``[S, n, C]`` through each head's rows of the value projection: ``[S, C]``."""
    return torch.einsum("snc,ndc->snd", z * norm.weight + norm.bias, wv.unflatten(0, (z.shape[1], -1))).flatten(1)


def tower_by_ops(tower: STAB, projector: Projector, pixels: Tensor) -> tuple[Tensor, Tensor]:
    dim = tower.balance.shape[0]
    corners = torch.tensor(RECTANGLES)
    sides = (corners[:, 1::2] - corners[:, ::2]) // 2
    windows = sides.prod(1)
    x0 = ops.patch_embed(pixels, tower.patch_embedding.weight)

    norm, w1, over_time, w2 = tower.lmhra1.pos_embed
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    x2 = ops.local_encoding(
        x0,
        scale,
        norm.bias - scale * norm.running_mean,
        w1.weight.flatten(1),
        w1.bias,
        over_time.weight.view(-1, 3),
        over_time.bias,
        w2.weight.flatten(1),
        w2.bias,
        tower.dpe.weight,
        tower.dpe.bias,
    )

    e, dec = tower.temporal_cls_token[0], tower.dec
    (wq, wk, wv), (bq, _, bv) = dec.attn.in_proj_weight.chunk(3), dec.attn.in_proj_bias.chunk(3)
    q = F.linear(dec.ln_1(e), wq, bq)[0]
    u = folded_query(q, wk, dec.ln_3.weight, 8, (dim // 8) ** -0.5)
    g = e + dec.attn.out_proj(project_pooled(ops.attention_pool(x2.flatten(1, 3), u), wv, dec.ln_3) + bv)
    g = g + dec.mlp(dec.ln_2(g))

    lsd = tower.local_attention
    y = ops.window_attention_pool(
        (x2 + x0).flatten(0, 1),
        corners,
        int(windows.sum()),
        lsd.q[0].weight,
        lsd.q[0].bias,
        lsd.q[1].weight,
        lsd.kv[0].weight,
        lsd.kv[0].bias,
        lsd.kv[1].weight,
        lsd.proj.weight,
        lsd.proj.bias,
    )

    fsra, c = tower.global_attention, tower.class_embedding
    wk, wv = fsra.kv[1].weight.chunk(2)
    u = folded_query(fsra.q(c), wk, fsra.kv[0].weight, 8, dim**-0.5)
    z = ops.attention_pool(y, u, cu_seqlens=F.pad(windows.cumsum(0), (1, 0)).int())
    f = fuse(g, c + fsra.proj(project_pooled(z, wv, fsra.kv[0])), tower.balance, tower.proj)

    num_tokens = int((1 + windows + sides[:, 0]).sum())
    tokens = ops.assemble_tokens(y, f, tower.split_embedding, corners, num_tokens)
    return ops.token_mlp(tokens, *projector.parameters()), sides


def test_chained_ops_are_the_tower() -> None:
    tower, projector, pixels = small_tower(), Projector(32, 24).double(), masked_pixels()
    with torch.no_grad():
        expected, grids = tower(pixels, projector)
        actual, sides = tower_by_ops(tower, projector, pixels)
    assert sides.tolist() == torch.stack(grids).tolist()
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-11)


def test_missing_frames_count_as_zero_normalised_pixels() -> None:
    weight = torch.randn(8, 3, 14, 14, dtype=torch.float64)
    pixels = torch.randint(0, 256, (2, 2, 3, 30, 45), dtype=torch.uint8)
    present = torch.tensor([[True, False], [False, True]])
    tokens = ops.patch_embed(pixels, weight, present=present)
    assert tokens.shape == (2, 2, 2, 3, 8)
    assert not tokens[~present].any()
    torch.testing.assert_close(tokens[present], ops.patch_embed(normalise(pixels), weight)[present])


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1), (1, 5, 3)])
def test_depthwise_conv3d_is_a_sum_of_shifted_products(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, 1, *kernel, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    padded = F.pad(x, [0, 0] + [k // 2 for k in reversed(kernel) for _ in (0, 1)])
    expected = bias.expand_as(x).clone()
    for t in range(kernel[0]):
        for i in range(kernel[1]):
            for j in range(kernel[2]):
                expected += padded[:, t : t + 3, i : i + 4, j : j + 5] * weight[:, 0, t, i, j]
    torch.testing.assert_close(ops.depthwise_conv3d(x, weight, bias), expected)
    torch.testing.assert_close(ops.depthwise_conv3d(x, weight, bias, residual=True), x + expected)


def test_attention_pool_takes_queries_a_sample_and_empty_segments() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 16, dtype=torch.float64)
    queries = torch.randn(3, 5, 16, dtype=torch.float64)
    packed = ops.attention_pool(x, queries, cu_seqlens=torch.tensor([0, 4, 4, 7], dtype=torch.int32))
    assert packed.shape == (3, 5, 16)
    assert not packed[1].any()
    torch.testing.assert_close(packed[0], ops.attention_pool(x[None, :4], queries[:1])[0])
    torch.testing.assert_close(packed[2], ops.attention_pool(x[None, 4:], queries[2])[0])


def test_counts_that_do_not_fit_the_corners_are_refused() -> None:
    lsd = small_tower().local_attention
    weights = (*lsd.q.parameters(), *lsd.kv.parameters(), *lsd.proj.parameters())
    corners = torch.tensor([[0, 4, 0, 4]])
    with pytest.raises(ValueError, match="hold 4 windows, num_windows says 5"):
        ops.window_attention_pool(torch.zeros(1, 4, 4, 32).double(), corners, 5, *weights)
    y, f = torch.zeros(4, 32), torch.zeros(1, 32)
    with pytest.raises(ValueError, match="hold 7 tokens, num_tokens says 8"):
        ops.assemble_tokens(y, f, f[0], corners, 8)
