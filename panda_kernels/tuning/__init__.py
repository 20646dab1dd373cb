"""Settings of kernels that only a measurement can choose: declared spaces, what was measured, and how a call finds it.

A kernel's module declares a :class:`Space` beside the heuristic that picks its config, and a launcher asks
:func:`choose`: the user's cache, then the file shipped for the device, the nearest shape in either, else the heuristic.
``panda-kernels autotune`` (:mod:`.autotune`) fills the cache. Nothing is ever measured inside a call.
"""
from .lookup import choose
from .space import Space

__all__ = ["Space", "choose"]
