"""The visual path of Video-Panda (arXiv 2412.18609) in plain torch, as released: full key and value projections,
torch's own layers, contiguous channels-first tensors, one frame at a time after the temporal stages.

It judges every kernel (in float64) and is the speed "as released". It imports nothing but torch. One file holds one
stage; ``tower.py`` puts them together; ``ops.py`` lists what each op of the library has to compute.
"""

from .chunks import split_chunks
from .projector import Projector
from .tower import STAB

__all__ = ["STAB", "Projector", "split_chunks"]
