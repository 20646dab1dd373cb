"""The attribute ``backend`` of modules."""
from __future__ import annotations

from torch import nn


class HasBackend(nn.Module):
    """``backend``, ``auto`` or a name of ``panda_kernels.backends.NAMES``; setting it sets it for the parts as well."""

    _backend = "auto"

    @property
    def backend(self) -> str:
        return self._backend

    @backend.setter
    def backend(self, name: str) -> None:
        for part in self.modules():
            if isinstance(part, HasBackend):
                part._backend = name
