"""STAB and its parts as modules, with the parameter names of the released Video-Panda tower."""
from .chunks import split_chunks
from .fsra import FSRA
from .gstra import GSTRA
from .lsd import LSD
from .lste import LSTE
from .projector import Projector
from .stab import STAB, STABOutput
from .visual_path import VisualPath

__all__ = ["FSRA", "GSTRA", "LSD", "LSTE", "STAB", "Projector", "STABOutput", "VisualPath", "split_chunks"]
