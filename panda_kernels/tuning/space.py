"""What may be chosen for one kernel, and for which of its calls a choice holds."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

Value = int | str


class Space:
    """The values that some fields of a kernel's config may take.

    ``name`` is ``<backend>.<module of the backend>``, for a Triton kernel with ``.<kernel>`` behind it.
    """

    def __init__(self, name: str, **values: tuple[int, ...]) -> None:
        self.name = name
        self.values = values

    @property
    def backend(self) -> str:
        return self.name.partition(".")[0]

    def candidates(self, heuristic: Any) -> Iterator[Any]:
        """Every config of the space but the heuristic's own; fields that the space does not name stay as they are."""
        for chosen in product(*self.values.values()):
            config = replace(heuristic, **dict(zip(self.values, chosen, strict=True)))
            if config != heuristic:
                yield config

    def fields(self, config: Any) -> dict[str, int]:
        """What the space has chosen in a config."""
        return {name: getattr(config, name) for name in self.values}

    def holds(self, fields: dict[str, int]) -> bool:
        """Whether these are a choice of this space, and not of what it once was."""
        return fields.keys() == self.values.keys() and all(fields[name] in self.values[name] for name in fields)


class Point(NamedTuple):
    """The calls that share one setting: a kernel, a device, a dtype and a shape without lengths.

    No number of tokens, frames or clips is part of it: a result's bits would depend on its company, and every new
    length would be unknown.
    """

    space: Space
    device: str
    dtype: str
    shape: tuple[tuple[str, Value], ...]
