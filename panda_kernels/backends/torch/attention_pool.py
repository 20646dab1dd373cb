"""The pool as two thin products around a softmax, over whole samples or over blocks of packed tokens.

Packed samples are cut into blocks of a fixed length, of which the host knows an upper bound from the shapes alone.
A block belongs to one sample, so that no sample sees another, not even its NaNs.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...rectangles import offsets
from . import refusals  # noqa: F401
from ._arithmetic import normalise, normalise_bwd, wide

BLOCK = 32


class _Blocks(NamedTuple):
    """``samples [blocks]`` and the packed ``tokens [blocks, BLOCK]`` of each; ``valid`` is False beyond a sample."""

    bounds: Tensor  # [S + 1]: where the blocks of each sample begin
    samples: Tensor
    tokens: Tensor
    valid: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """``[blocks, ...]`` -> ``[S, ...]``, in the order of the blocks."""
        return torch.segment_reduce(values, "sum", offsets=self.bounds, axis=0, unsafe=True, initial=0)


def _blocks(cu_seqlens: Tensor, count: int) -> _Blocks:
    starts = cu_seqlens.long()
    bounds = offsets((starts.diff() + BLOCK - 1) // BLOCK)
    block = torch.arange(count // BLOCK + starts.shape[0] - 1, device=starts.device)
    # The blocks no sample needs count as the last one's, beyond its end.
    samples = (torch.searchsorted(bounds, block, right=True) - 1).clamp_max(starts.shape[0] - 2)
    first = starts[samples] + (block - bounds[samples]) * BLOCK
    tokens = first[:, None] + torch.arange(BLOCK, device=starts.device)
    return _Blocks(bounds, samples, tokens.clamp_max(count - 1), tokens < starts[samples + 1, None])


class _Packed(NamedTuple):
    """What both directions need of packed tokens, in the wide dtype."""

    xhat: Tensor  # [blocks, BLOCK, C], zero where not valid
    mean: Tensor
    rstd: Tensor
    queries: Tensor  # [blocks, n, C], or [n, C] where shared
    weights: Tensor  # [blocks, n, BLOCK]


def _packed(x: Tensor, queries: Tensor, blocks: _Blocks, eps: float) -> _Packed:
    xhat, mean, rstd = normalise(x[blocks.tokens], eps)
    xhat = xhat.masked_fill(~blocks.valid[..., None], 0.0)
    queries = queries.to(xhat.dtype)
    if queries.ndim == 3:
        queries = queries[blocks.samples]
    logits = (queries @ xhat.mT).masked_fill(~blocks.valid[:, None], -torch.inf)
    peak = torch.segment_reduce(logits.amax(2), "max", offsets=blocks.bounds, axis=0, unsafe=True)
    weights = (logits - peak[blocks.samples, :, None]).masked_fill(~blocks.valid[:, None], -torch.inf).exp()
    norm = blocks.sum(weights.sum(2))
    return _Packed(xhat, mean, rstd, queries, weights / norm[blocks.samples, :, None])


def fwd(x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float) -> Tensor:
    if cu_seqlens is not None:
        blocks = _blocks(cu_seqlens, x.shape[0])
        packed = _packed(x, queries, blocks, eps)
        return blocks.sum(packed.weights @ packed.xhat).to(x.dtype)
    xhat, _, _ = normalise(x, eps)
    weights = torch.softmax(queries.to(xhat.dtype) @ xhat.mT, 2)
    return (weights @ xhat).to(x.dtype)


def bwd(grad: Tensor, x: Tensor, queries: Tensor, cu_seqlens: Tensor | None, eps: float, *,
        needs: list[bool]) -> list[Tensor | None]:
    grad = grad.to(wide(x))
    if cu_seqlens is not None:
        grad_x, grad_queries = _packed_bwd(grad, x, queries, _blocks(cu_seqlens, x.shape[0]), eps)
    else:
        grad_x, grad_queries = _dense_bwd(grad, x, queries, eps)
    return [grad_x.to(x.dtype), grad_queries.to(queries.dtype)]


def _dense_bwd(grad: Tensor, x: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    xhat, mean, rstd = normalise(x, eps)
    queries = queries.to(xhat.dtype)
    weights = torch.softmax(queries @ xhat.mT, 2)
    grad_weights = grad @ xhat.mT
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(2, keepdim=True))
    grad_xhat = weights.mT @ grad + grad_logits.mT @ queries
    grad_queries = grad_logits @ xhat
    return normalise_bwd(grad_xhat, x, mean, rstd), grad_queries.sum(0) if queries.ndim == 2 else grad_queries


def _packed_bwd(grad: Tensor, x: Tensor, queries: Tensor, blocks: _Blocks, eps: float) -> tuple[Tensor, Tensor]:
    packed = _packed(x, queries, blocks, eps)
    grad = grad[blocks.samples]
    grad_weights = grad @ packed.xhat.mT
    mean_grad = blocks.sum((packed.weights * grad_weights).sum(2))[blocks.samples, :, None]
    grad_logits = packed.weights * (grad_weights - mean_grad)
    grad_xhat = packed.weights.mT @ grad + grad_logits.mT @ packed.queries
    grad_blocks = normalise_bwd(grad_xhat, x[blocks.tokens], packed.mean, packed.rstd)
    # Each token is valid in one block; what is not valid goes to a row that is dropped.
    places = blocks.tokens.masked_fill(~blocks.valid, x.shape[0])
    grad_x = grad_blocks.new_empty(x.shape[0] + 1, x.shape[1])
    grad_x[places.flatten()] = grad_blocks.flatten(0, 1)
    grad_queries = blocks.sum(grad_logits @ packed.xhat)
    return grad_x[:-1], grad_queries.sum(0) if queries.ndim == 2 else grad_queries
