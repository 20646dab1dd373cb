"""The whole visual path, pixels in and tokens out, by one CUDA graph a shape where that can be."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..rectangles import Rectangles
from .cuda_graph import RECORDERS, is_recording
from .folding import can_serve, modules_of
from .graphs import Graphs
from .has_backend import HasBackend
from .projector import Projector
from .stab import STAB, STABOutput

GRAPHS = 8  # kept unless the caller says how many
Run = Callable[[Tensor, Rectangles | None, Tensor | None], STABOutput]


class VisualPath(nn.Module):
    """The tower and, if there is one, the projector after it.

    In inference on a GPU the calls of a shape are recorded as one CUDA graph, which takes one launch instead of some
    fifty; the answer has the same bits. Shape here is that of the pixels, and the numbers of windows and of tokens:
    clips whose rectangles differ in nothing else share a graph. Modules in training mode, wanted gradients, autocast,
    hooks, compiling, weights made in inference mode and a graph that the caller records himself mean plain calls, and
    so does the CPU. Whatever changes the weights drops the graphs; torch does not notice writes through
    ``tensor.data``: call ``eval()`` after them.

    Args:
        tower: as it is, its mode included.
        projector: likewise; without one the tokens are the tower's.
        graphs: of how many shapes a graph is kept, the least recently used dropped first; 0 records none. They share
            the memory for what is computed on the way; each holds its pixels and its tokens.

    Source: SPEC stages 1 to 10.
    """

    def __init__(self, tower: STAB, projector: Projector | None = None, *, graphs: int = GRAPHS) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self._graphs = Graphs(graphs)

    def train(self, mode: bool = True) -> VisualPath:
        self._graphs.clear()
        return super().train(mode)

    def forward(self, pixel_values: Tensor, rectangles: Rectangles | None = None, *,
                present: Tensor | None = None) -> STABOutput:
        """As :class:`STAB`, but for the tokens' width, ``[num_tokens, out_dim]`` with a projector.

        Arguments, and what is raised, are those of :meth:`STAB.forward` and :meth:`Projector.forward`. Threads, each on
        a stream of its own, may call at once.
        """
        return by_graphs(self._graphs, self.tower, self.projector, self._run, pixel_values, rectangles, present)

    def _run(self, pixel_values: Tensor, rectangles: Rectangles | None, present: Tensor | None) -> STABOutput:
        tokens, cu_seqlens, grid = self.tower(pixel_values, rectangles, present=present)
        return STABOutput(tokens if self.projector is None else self.projector(tokens), cu_seqlens, grid)


def by_graphs(graphs: Graphs, tower: STAB, projector: Projector | None, run: Run, pixel_values: Tensor,
              rectangles: Rectangles | None, present: Tensor | None) -> STABOutput:
    """``run(pixel_values, rectangles, present)``, which calls the modules, by a graph where that can be."""
    parts: list[STAB | Projector] = [tower] if projector is None else [tower, projector]
    if not graphs.limit or not _may_record(parts, pixel_values):
        return run(pixel_values, rectangles, present)
    modules = [module for part in parts for module in modules_of(part)]
    # A recording leaves out somebody's hooks, and would have to repeat fresh noise and running statistics.
    if any(module.training or is_hooked(module) for module in modules):
        return run(pixel_values, rectangles, present)
    corners, num_windows, num_tokens = tower.rectangles(pixel_values, rectangles, present=present)

    def function(pixels: Tensor, corners: Tensor, present: Tensor | None) -> STABOutput:
        return run(pixels, Rectangles(corners, num_windows, num_tokens), present)

    settings = (num_windows, num_tokens, torch.backends.cuda.matmul.fp32_precision,
                torch.are_deterministic_algorithms_enabled(),
                *(module.backend for module in modules if isinstance(module, HasBackend)))
    # Past the rectangles nobody reads the mask.
    inputs = (pixel_values[:, :, :3], corners, present)
    return STABOutput(*graphs.call(function, inputs, lambda: tuple(part.constants() for part in parts), settings))


def _may_record(parts: Sequence[nn.Module], x: Tensor) -> bool:
    if x.device.type not in RECORDERS or not all(can_serve(part, x) for part in parts):
        return False
    return type(x) is Tensor and not is_recording(x.device)


def is_hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says."""
    own = module.__dict__
    return bool("forward" in own or own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"]
                or own["_backward_hooks"])
