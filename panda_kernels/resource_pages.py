"""Pages that say what compilers make of kernels: a dataclass a row, as a table that can be read back."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any, TypeVar

R = TypeVar("R")


def render(kind: type[R], table: Sequence[R], introduction: Sequence[str]) -> str:
    """Lines of text, then ``table``; ``kind`` is a dataclass of integers and strings."""
    names = [f.name.replace("_", " ") for f in fields(kind)]  # type: ignore[arg-type]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    rows = ["| " + " | ".join(map(str, astuple(row))) + " |" for row in table]  # type: ignore[call-overload]
    return "\n".join([*introduction, "", *head, *rows, ""])


def parse(kind: type[R], page: str) -> list[R]:
    """The table of a page that :func:`render` wrote."""
    lines = [line for line in page.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    types: list[Any] = [int if f.type == "int" else str for f in fields(kind)]  # type: ignore[arg-type]
    return [kind(*(of(cell) for of, cell in zip(types, line, strict=True))) for line in cells]
