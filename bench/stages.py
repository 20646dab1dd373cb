"""The tower of 8 frames stage by stage on the CPU, beside what each must cost: ``python -m bench.stages [--write]``.

Every stage is timed alone, on warm weights, through the kernel that the streamed tower uses or one around it; the whole
tower follows in the same rounds. ``--write`` puts the table into docs/performance.md.
"""
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from panda_kernels.backends.cpu import class_tokens, stab_tower
from panda_kernels.backends.cpu._arrays import compute_dtype, kernels, pack, product
from panda_kernels.backends.cpu.patch_embed import normalisation
from panda_kernels.nn import STAB
from panda_kernels.rectangles import Rectangles
from panda_kernels.tuning.timer import interleaved, wall_clock
from panda_kernels.verify import seeded_tower

from . import machine, pages, tower

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
CLIPS, FRAMES, SIDE, C, R, HEADS, PATCH, WINDOW = 2, 4, 32, tower.DIM, int(tower.DIM / 1.5), tower.HEADS, 14, 2
TOKENS, WINDOWS, K = CLIPS * FRAMES * SIDE**2, CLIPS * FRAMES * (SIDE // WINDOW) ** 2, 3 * PATCH**2
BAND = 512
SECONDS = 10.0


@dataclass(frozen=True)
class Stage:
    """``multiply_adds``, and the numbers it must at least read and write, each once, if it stood alone."""

    name: str
    kernel: str
    multiply_adds: int
    numbers: int
    call: Callable[[], object]


def stages(dtype: torch.dtype) -> list[Stage]:
    streamed = _streamed(dtype)
    w = streamed.clips
    embed, squeeze, squeeze_bias, local, clip_queries = *w[8:11], w[11:17], w[17]
    pixels = tower.CASES["8 frames"].pixel_values(dtype)
    rectangles = Rectangles.full(frames=CLIPS * FRAMES, h=SIDE, w=SIDE)
    image = tower.CASES["image"]
    one = image.pixel_values(dtype)
    x, y = (torch.randn(CLIPS, FRAMES, SIDE, SIDE, C).to(dtype) for _ in range(2))
    patches, inner = torch.randn(BAND, K).to(dtype), torch.empty(BAND, R, dtype=dtype)
    rows, first = x.view(-1, C), pack(torch.randn(R, C) * C**-0.5, dtype)
    windows, z = torch.empty(WINDOWS, C, dtype=dtype), torch.empty(CLIPS, HEADS, C)
    frame_z = torch.empty(CLIPS * FRAMES, HEADS, C)

    def in_bands(rows_of: Callable[[int], Tensor], weight: Tensor) -> None:
        for band in range(0, TOKENS, BAND):
            product(rows_of(band), weight, R, bias=squeeze_bias, out=inner)

    return [
        Stage("patches and embedding", "patch_embed", TOKENS * K * C, TOKENS * (K + C) + K * C,
              lambda: kernels.patch_embed(pixels, None, normalisation(), PATCH, embed, None, y)),
        Stage("LSTE, first product (from the patches)", "product", TOKENS * K * R, TOKENS * (K + R) + K * R,
              lambda: in_bands(lambda band: patches, squeeze)),
        Stage("LSTE whole, first product from tokens", "local_encoding",
              TOKENS * (2 * C * R + 3 * R + 27 * C), 2 * TOKENS * C + 2 * C * R,
              lambda: kernels.local_encoding(x, [first, squeeze_bias, *local], R, y)),
        Stage("- of that, its first product", "product", TOKENS * C * R, TOKENS * (C + R) + C * R,
              lambda: in_bands(lambda band: rows[band:band + BAND], first)),
        Stage("GSTRA, pooling", "attention_pool", 2 * TOKENS * HEADS * C, TOKENS * C,
              lambda: kernels.attention_pool(x.view(CLIPS, -1, C), clip_queries, _bounds(CLIPS, TOKENS), 1e-5, z)),
        Stage("LSD", "window_attention_pool", WINDOWS * (4 * C**2 + 2 * HEADS * WINDOW**2 * C),
              (TOKENS + WINDOWS) * C + 4 * C**2,
              lambda: kernels.window_attention_pool(x.view(-1, SIDE, SIDE, C), None, rectangles.corners, w[:6],
                                                    HEADS, WINDOW, 1e-5, windows, [])),
        Stage("FSRA, pooling", "attention_pool", 2 * WINDOWS * HEADS * C, WINDOWS * C,
              lambda: kernels.attention_pool(windows.view(CLIPS * FRAMES, -1, C), w[6],
                                             _bounds(CLIPS * FRAMES, WINDOWS), 1e-5, frame_z)),
        Stage("class tokens", "linear", CLIPS * 10 * C**2 + CLIPS * FRAMES * 3 * C**2, 13 * C**2,
              lambda: class_tokens.run(streamed.class_tokens, z, frame_z)),
        Stage("whole tower", "stab_tower", tower.cost(tower.CASES["8 frames"], dtype, False).flops // 2,
              tower.cost(tower.CASES["8 frames"], dtype, False).bytes // dtype.itemsize,
              lambda: stab_tower.run(streamed, pixels, rectangles, None)),
        Stage("one image, whole", "stab_tower", tower.cost(image, dtype, False).flops // 2,
              tower.cost(image, dtype, False).bytes // dtype.itemsize,
              lambda: stab_tower.run(streamed, one, Rectangles.full(frames=1, h=SIDE, w=SIDE), None)),
    ]


def _streamed(dtype: torch.dtype) -> stab_tower.Streamed:
    module = STAB(C).to(dtype).eval()
    module.load_state_dict(seeded_tower(C).state_dict())
    with torch.inference_mode():
        return module._streamed.get()


def _bounds(samples: int, tokens: int) -> Tensor:
    return torch.arange(samples + 1) * (tokens // samples)


def table(dtype: torch.dtype, peaks: machine.Peaks) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    found = stages(dtype)
    with torch.inference_mode():
        for stage in found:
            stage.call()
        seconds = interleaved({stage.name: stage.call for stage in found}, SECONDS, wall_clock)
    lines = [f"| {name} | kernel | GFLOP | least MB | floor, ms | measured, ms | floor / measured |",
             "|---|---|---|---|---|---|---|"]
    for stage in found:
        num_bytes, flops = stage.numbers * dtype.itemsize, 2 * stage.multiply_adds
        floor = peaks.least_seconds(num_bytes, flops, name if compute_dtype(dtype) == dtype else "float32")
        median = statistics.median(seconds[stage.name])
        lines.append(f"| {stage.name} | `{stage.kernel}` | {flops / 1e9:.2f} | {num_bytes / 1e6:.1f} | "
                     f"{1e3 * floor:.1f} | {1e3 * median:.1f} | {floor / median:.0%} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stages", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    write = parser.parse_args().write
    peaks = machine.measure_peaks("cpu")
    facts = machine.facts("cpu")
    rates = ", ".join(f"{name} products {rate:.0f} GFLOP/s" for name, rate in peaks.gflop_s.items())
    lines = [f"{facts['device']}, {facts['threads']} threads, {facts['isa']}; {rates}; copies {peaks.memory_gb_s:.0f} "
             f"GB/s, {peaks.l3_gb_s:.0f} within the cache; commit {facts['commit'][:9]}.", ""]
    for dtype in (torch.float32, torch.bfloat16):
        lines += table(dtype, peaks)
    text = "\n".join(lines)
    print(text)
    if write:
        PAGE.write_text(pages.replaced(PAGE.read_text(), "stages", text))


if __name__ == "__main__":
    main()
