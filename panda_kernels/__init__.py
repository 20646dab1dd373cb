"""Fused kernels for STAB, the encoder-free visual front end of Video-Panda (CVPR 2025, arXiv 2412.18609).

The ops are plain functions of tensors; ``panda_kernels.nn`` holds modules with the released parameter names.
Importing this package needs neither a compiled extension, nor Triton, nor a GPU.
"""
from .ops import (
    assemble_tokens,
    attention_pool,
    batch_statistics,
    depthwise_conv3d,
    local_encoding,
    patch_embed,
    token_mlp,
    window_attention_pool,
)
from .rectangles import Rectangles

__version__ = "0.1.0"

__all__ = ["Rectangles", "__version__", "assemble_tokens", "attention_pool", "batch_statistics",
           "depthwise_conv3d", "local_encoding", "patch_embed", "token_mlp", "window_attention_pool"]
