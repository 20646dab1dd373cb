"""Video-Panda: its visual tower, ``VideoTokenizer``, replaced inside a loaded model, with a report and an undo.

    handle = patch(model)
    print(handle.report)
    ...
    handle.undo()
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import backends
from ..nn import STAB, STABOutput
from ..nn.graphs import Graphs
from ..nn.lste import NORMS
from ..nn.visual_path import GRAPHS, by_graphs, is_hooked
from ..rectangles import Rectangles

RELEASED = "VideoTokenizer"
PARTS = ("patch_embedding", "lmhra1", "dpe", "dec", "local_attention", "global_attention", "proj", "class_embedding",
         "split_embedding", "temporal_cls_token", "balance")
# Containers whose arithmetic is ours; every module directly below them is taken over as it is.
_OURS = ("lmhra1", "lmhra2", "dec", "local_attention", "global_attention")


@dataclass
class Report:
    """What a patch did, by module name.

    Attributes:
        replaced: towers that are ours now; one tower under two names is named twice.
        skipped: towers that are not, and why.
        dropped: modules inside replaced towers whose hooks, or replaced ``forward``, are not called any more.
    """

    replaced: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{name}: replaced" for name in self.replaced]
        lines += [f"{name}: not replaced: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{name}: its hooks are not called" for name in self.dropped]
        return "\n".join(lines or [f"no {RELEASED} found"])


class PandaTower(STAB):
    """STAB behind the released call. Everything that holds weights or rates is the released module's own object.

    Attributes that the library's tower lacks, such as ``image_processor`` or ``hidden_size``, are the released one's.
    """

    def __init__(self, released: nn.Module, options: dict[str, Any], graphs: int) -> None:
        super().__init__(**options, device="meta")
        self._graphs = Graphs(graphs)
        # Past nn.Module's registration: it is no part of this module, and its weights are here already.
        self.__dict__["_released"] = released
        for name in self._parameters:
            self._parameters[name] = released._parameters[name]
        for name in self._modules:
            if name not in _OURS:
                self._modules[name] = released.get_submodule(name)
                continue
            ours, theirs = self.get_submodule(name), released.get_submodule(name)
            for child in ours._modules:
                ours._modules[child] = theirs.get_submodule(child)
        _copy_modes(released, self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_released" in self.__dict__:
                return getattr(self.__dict__["_released"], name)
            raise

    def train(self, mode: bool = True) -> PandaTower:
        self._graphs.clear()
        super().train(mode)
        return self

    def forward(self, pixel_values: Tensor,  # type: ignore[override]
                modules: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Pixels and mask ``[B, T, 4, H, W]`` -> two lists over the frames ``b * T + t``.

        The first holds ``modules(tokens)`` of each frame's ``[1 + h' * (w' + 1), C]`` tokens, the second its
        ``LongTensor([h', w'])`` on the tower's device. Images are ``[B, 1, 4, H, W]``. Raises as :class:`STAB` does.
        """
        rectangles = self.rectangles(pixel_values)
        # Read before the tower is launched: afterwards reading would wait for all of it.
        lengths = rectangles.cu_seqlens(self.window).diff().tolist()
        tokens, _, grid = by_graphs(self._graphs, self, None, self._run, pixel_values, rectangles, None)
        return [modules(frame) for frame in tokens.split(lengths)], list(grid)

    def _run(self, pixel_values: Tensor, rectangles: Rectangles | None, present: Tensor | None) -> STABOutput:
        return super().forward(pixel_values, rectangles, present=present)

    def restored(self) -> nn.Module:
        """The released module, with the parameters and modes as they are here by now."""
        released: nn.Module = self.__dict__["_released"]
        released._parameters.update(self._parameters)
        _copy_modes(self, released)
        return released


class Handle:
    """A patch in force: its :class:`Report`, and the way back."""

    def __init__(self, report: Report, places: list[tuple[nn.Module, str, PandaTower]]) -> None:
        self.report = report
        self._places = places

    def undo(self) -> None:
        """Put the released towers back, trained parameters and modes included. Once is enough.

        Raises:
            RuntimeError: something else has been put in the place of a replaced tower; nothing is changed.
        """
        for parent, name, tower in self._places:
            if parent._modules.get(name) is not tower:
                raise RuntimeError(f"undo: {type(parent).__name__}.{name} no longer holds what patch put there")
        for parent, name, tower in self._places:
            parent._modules[name] = tower.restored()
        self._places = []


def patch(model: nn.Module, *, backend: str = "auto", graphs: int = GRAPHS) -> Handle:
    """Replace every released ``VideoTokenizer`` inside ``model`` by :class:`PandaTower`, in place.

    Parameters and buffers stay the very same objects, so optimizers and saved state dicts carry on; devices and
    training modes stay. A tower that does not fit is left alone and named in the report with the reason.

    Args:
        model: any module that holds towers, at any depth.
        backend: of the replaced towers, ``auto`` or a name of ``panda_kernels.backends.NAMES``.
        graphs: of how many shapes each tower keeps a CUDA graph, as :class:`panda_kernels.nn.VisualPath` does; 0
            records none.

    Raises:
        BackendError: there is no such backend, or it cannot be used on this machine.
        ValueError: a negative number of graphs.
    """
    if backend != "auto" and (reason := backends.status().get(backend, "no such backend")):
        raise backends.BackendError(f"patch: backend {backend!r}: {reason}")
    report, places = Report(), []
    towers: dict[nn.Module, PandaTower | str] = {}
    if type(model).__name__ == RELEASED:
        report.skipped[RELEASED] = "it is the model itself; pass a module that holds it"
    for parent, name, path in list(_released_towers(model)):
        released = parent.get_submodule(name)
        if released not in towers:
            towers[released] = _replacement(released, backend, graphs)
        tower = towers[released]
        if isinstance(tower, str):
            report.skipped[path] = tower
            continue
        report.replaced.append(path)
        report.dropped += [f"{path}.{inner}".rstrip(".") for inner, part in released.named_modules() if is_hooked(part)]
        parent._modules[name] = tower
        places.append((parent, name, tower))
    return Handle(report, places)


def _released_towers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    for prefix, parent in model.named_modules():
        for name, child in parent._modules.items():
            if child is not None and type(child).__name__ == RELEASED:
                yield parent, name, f"{prefix}.{name}".lstrip(".")


def _replacement(released: nn.Module, backend: str, graphs: int) -> PandaTower | str:
    """Our tower in place of ``released``, or why it cannot be."""
    if lacking := [part for part in PARTS if not hasattr(released, part)]:
        return f"has no {', '.join(lacking)}"
    try:
        options = _options(released)
        model = STAB(**options, device="meta")
    except (AttributeError, IndexError, ValueError) as error:
        return str(error)
    expected, given = model.state_dict(), released.state_dict()
    faults = [f"has no {name}" for name in expected if name not in given]
    faults += [f"has {name}" for name in given if name not in expected]
    faults += [f"{name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
               for name, tensor in expected.items() if name in given and given[name].shape != tensor.shape]
    if faults:
        return "; ".join(faults)
    theirs = dict(released.named_modules())
    faults = [f"{name} is {type(theirs[name]).__name__}, expected {type(ours).__name__}"
              for name, ours in model.named_modules()
              if type(ours).__module__.startswith("torch.") and not _like(ours, theirs.get(name))]
    if faults:
        return "; ".join(faults)
    tower = PandaTower(released, options, graphs)
    tower.backend = backend
    return tower


def _like(ours: nn.Module, theirs: nn.Module | None) -> bool:
    return type(theirs) is type(ours) or (type(ours) in NORMS and type(theirs) in NORMS)


def _options(released: Any) -> dict[str, Any]:
    """How to build a STAB of the same arithmetic; what shapes do not tell is read from the modules."""
    local, frame = released.local_attention, released.global_attention
    num_heads = getattr(local, "num_heads", 8)
    if getattr(frame, "num_heads", num_heads) != num_heads:
        raise ValueError(f"global_attention has {frame.num_heads} heads, local_attention {num_heads}")
    return {
        "dim": released.class_embedding.shape[0],
        "patch": released.patch_embedding.weight.shape[-1],
        "window": getattr(local, "conv_stride", 2),
        "num_heads": num_heads,
        "gstra_heads": released.dec.attn.num_heads,
    }


def _copy_modes(source: nn.Module, target: nn.Module) -> None:
    modes = {name: module.training for name, module in source.named_modules()}
    for name, module in target.named_modules():
        module.training = modes.get(name, source.training)
