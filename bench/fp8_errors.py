"""Errors of FP8 products against float64, beside those of float32 and bfloat16.

    python -m bench.fp8_errors --write

prints the table, and puts it into docs/numerics.md. It runs anywhere: where no GPU multiplies e4m3, what is measured is
the emulation of panda_kernels/fp8.py. Weights and tokens are exact in bfloat16, so that all compute the same function;
with FP8 everything else is in bfloat16.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from panda_kernels.nn import STAB, Projector, lste_fp8
from panda_kernels.nn.lste import encode
from panda_kernels.spec import Draw, relative_error
from python_ref.lste import lste

from . import pages
from .machine import ROOT
from .tower import DIM, PATCH, SQUARE, identity, our_modules, weights

PAGE = ROOT / "docs" / "numerics.md"
COLUMNS = {"float32": (torch.float32, "native"), "bfloat16": (torch.bfloat16, "native"),
           "FP8": (torch.bfloat16, "fp8")}
FRAMES = 4
ROWS = ("projector", "LSTE", "tower", "tower and projector")


def errors(clips: int, side: int) -> dict[str, dict[str, float]]:
    """Relative errors of :data:`ROWS` in each of :data:`COLUMNS`, for whole clips of 4 frames of ``side`` patches."""
    exact_tower, exact_head = weights()
    modules = {column: our_modules(dtype, "cpu", products) for column, (dtype, products) in COLUMNS.items()}
    pixels = Draw(0, torch.float64)(clips, FRAMES, 4, side * PATCH, side * PATCH)
    pixels[:, :, 3] = 1
    patches = Draw(1, torch.float64)(clips, FRAMES, side, side, DIM)
    with torch.inference_mode():
        exact_tokens = torch.cat(exact_tower(pixels, identity)[0])
        tokens = exact_tokens.bfloat16()
        encoded = lste(patches.movedim(-1, 1), exact_tower.lmhra1, exact_tower.dpe).movedim(1, -1)
        exact = exact_head(tokens.double()), encoded, exact_tokens, exact_head(exact_tokens)
        found: dict[str, dict[str, float]] = {name: {} for name in ROWS}
        for column, (dtype, _) in COLUMNS.items():
            given = _run(*modules[column], pixels.to(dtype), tokens.to(dtype), patches.to(dtype))
            for row, result, wanted in zip(found.values(), given, exact, strict=True):
                row[column] = relative_error(result, wanted)
    return found


def _run(tower: STAB, head: Projector, pixels: Tensor, tokens: Tensor, patches: Tensor) -> Sequence[Tensor]:
    if tower.products == "fp8":
        encoded = lste_fp8.encode(patches, lste_fp8.prepare(tower.lmhra1, tower.dpe))
    else:
        encoded = encode(patches, tower.lmhra1, tower.dpe)
    own = tower(pixels).tokens
    return head(tokens), encoded, own, head(own)


def table(found: dict[str, dict[str, float]]) -> str:
    lines = [f"| relative error | {' | '.join(COLUMNS)} |", f"|---{'|---' * len(COLUMNS)}|"]
    lines += [f"| {name} | {' | '.join(f'{error:.1e}' for error in row.values())} |" for name, row in found.items()]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fp8_errors", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    write = parser.parse_args().write
    text = table(errors(2, SQUARE[1]))
    print(text)
    if write:
        PAGE.write_text(pages.replaced(PAGE.read_text(), "fp8", text))


if __name__ == "__main__":
    main()
