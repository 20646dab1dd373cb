"""The whole tower streamed through the caches (csrc/core/tower.cpp), for inference."""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._arrays import compute_dtype, floats, kernels, pack
from .local_encoding import fold_norm, streamed_weights
from .patch_embed import normalisation, readable
from .window_attention_pool import window_weights
