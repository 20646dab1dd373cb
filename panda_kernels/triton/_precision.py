"""How torch's setting for float32 products reads in Triton."""
from __future__ import annotations

import torch


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``: "tf32" where torch's own products would use it, else "ieee".

    Only float32 asks for it; AMD's compilers do not all know tf32.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if allowed and dtype == torch.float32 else "ieee"
