"""What else pools by attention: torch's scaled_dot_product_attention by each backend there is, flash-attn and timm.

Each computes what the op does unless its docstring says otherwise. What cannot serve a call is left out of it.
"""
from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .measure import Call
from .peers import Attend, pool_windows

BACKENDS = {"sdpa math": SDPBackend.MATH, "sdpa flash": SDPBackend.FLASH_ATTENTION,
            "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}


def attention_pool(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> dict[str, Call]:
    """Peers of ``attention_pool``; of packed samples only equally long ones, which are a batch."""
    samples = _as_batch(x, cu_seqlens)
    if samples is None:
        return {}
    found: dict[str, Call] = {name: partial(_pool, samples, queries, eps, attend) for name, attend in _sdpa().items()}
    if pool := _timm_pool(samples, queries.shape[-2]):
        found["timm AttentionPoolLatent"] = lambda: pool(F.layer_norm(samples, samples.shape[-1:], eps=eps))
    return dict(_able(found))


def window_attention_pool(x: Tensor, corners: Tensor, num_windows: int, **rest: Any) -> dict[str, Call]:
    """Peers of ``window_attention_pool``, for frames with one and the same rectangle."""
    rectangles = {tuple(corner) for corner in corners.tolist()}
    if len(rectangles) > 1:
        return {}
    row0, row1, col0, col1 = rectangles.pop()
    cropped = x[:, row0:row1, col0:col1]
    attends = _sdpa()
    if flash := _flash_attn():
        attends["flash-attn"] = flash
    return dict(_able({name: partial(pool_windows, cropped, **rest, attend=a) for name, a in attends.items()}))


def _pool(x: Tensor, queries: Tensor, eps: float, attend: Attend) -> Tensor:
    """The folded queries over normalised tokens, which are keys and values in one."""
    tokens = F.layer_norm(x, x.shape[-1:], eps=eps)[:, None]
    return attend(queries.expand(len(x), -1, -1)[:, None], tokens, tokens, 1.0)[:, 0]


def _as_batch(x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return x
    lengths = set(cu_seqlens.diff().tolist())
    return x.view(-1, lengths.pop(), x.shape[-1]) if len(lengths) == 1 else None


def _sdpa() -> dict[str, Attend]:
    def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return {name: partial(attend, backend) for name, backend in BACKENDS.items()}


def _flash_attn() -> Attend | None:
    """The flash-attn package, whose heads are 256 wide at most: LSD's will do, the folded queries' will not."""
    try:
        function = importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None
    return lambda q, k, v, scale: function(*(t.transpose(1, 2) for t in (q, k, v)), softmax_scale=scale).transpose(1, 2)


def _timm_pool(x: Tensor, heads: int) -> Callable[[Tensor], Tensor] | None:
    """timm's pool by a latent query. It projects keys and values, token by token, which the op's folded form avoids."""
    try:
        layer = importlib.import_module("timm.layers").AttentionPoolLatent
    except (ImportError, RuntimeError):  # without a torchvision that fits torch it fails with either
        return None
    if x.shape[-1] % heads:
        return None
    return layer(x.shape[-1], out_features=0, num_heads=heads, device=x.device, dtype=x.dtype).eval()


def _able(calls: Mapping[str, Call]) -> Iterator[tuple[str, Call]]:
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of every reason it has against a backend
                call()
        except RuntimeError:
            continue
        yield name, call
