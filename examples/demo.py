"""Encode two short clips with ours and with the released code, compare, and draw what the tower attends to.

Run as ``python examples/demo.py`` from a checkout; it needs the extras ``video`` and ``bench`` and, the first time, pip
to fetch the clips. The weights are random and seeded: times and errors are those of any weights, but the pictures
show how attention flows, not what a trained model looks at. Writes ``demo/<clip>.png`` and ``demo/table.txt``.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from fetch_clips import clips
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

import python_ref
from panda_kernels.backends.torch import has_products
from panda_kernels.encode import Model, encode_clip
from panda_kernels.nn import STAB
from panda_kernels.video import CHUNK, Clip, read_clip
from python_ref.lste import lste
from python_ref.patch import patch_embed

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
# The released code would take minutes in a dtype that this CPU has no products of.
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype == torch.float32 or has_products(dtype)]
REPEATS = 5
SHARPNESS = 3.0


class Row(NamedTuple):
    clip: str
    dtype: str
    ours_ms: float
    released_ms: float
    ours_error: float
    released_error: float


class Attention(NamedTuple):
    """Relative to uniform attention, mean over heads: ``gstra [T, h, w]``, ``fsra`` one ``[h', w']`` a frame."""

    gstra: Tensor
    fsra: list[Tensor]


def seeded_tower() -> python_ref.STAB:
    """The released initialisation, with what it sets to zero drawn at random, or GSTRA would see and say nothing.

    Its attention is close to uniform; sharper queries, of the same random directions, make it visible.
    """
    torch.manual_seed(SEED)
    tower = python_ref.STAB().eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            if not parameter.any():
                parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
        tower.temporal_cls_token.normal_()
        tower.dec.attn.in_proj_weight[: tower.class_embedding.numel()] *= SHARPNESS
        tower.global_attention.q[1].weight *= SHARPNESS * tower.global_attention.num_heads**0.5
    return tower


@torch.inference_mode()
def compare(name: str, clip: Clip, tower: python_ref.STAB) -> list[Row]:
    """Times and errors of both in every dtype; each is run in turn, so that both meet the same state of the machine."""
    pixels = python_ref.split_chunks(clip.pixel_values()[None])
    exact = released(copy_of(tower, python_ref.STAB, torch.float64), pixels.double())
    rows = []
    for dtype in DTYPES:
        theirs = copy_of(tower, python_ref.STAB, dtype)
        ours = Model(copy_of(tower, STAB, dtype), None, f"seed {SEED}")
        run_ours = lambda: encode_clip(ours, clip).tokens  # noqa: B023, E731
        run_released = lambda: released(theirs, pixels)  # noqa: B023, E731
        errors = [float((run().double() - exact).norm() / exact.norm()) for run in (run_ours, run_released)]
        medians = interleaved(run_ours, run_released)
        rows.append(Row(name, str(dtype).removeprefix("torch."), *medians, *errors))
    return rows


@torch.inference_mode(False)
def copy_of(tower: torch.nn.Module, kind: type[torch.nn.Module], dtype: torch.dtype) -> torch.nn.Module:
    """Its weights are ordinary tensors: what is packed of those made in inference mode could not be kept."""
    into = kind()
    into.load_state_dict(tower.state_dict())
    return into.to(dtype).eval()


def released(tower: python_ref.STAB, pixels: Tensor) -> Tensor:
    tokens, _ = tower(pixels, lambda x: x)
    return torch.cat(tokens)


def interleaved(*runs: Callable[[], Tensor]) -> list[float]:
    """The median time of each in milliseconds."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(REPEATS):
        for run, record in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


@torch.inference_mode()
def attention(clip: Clip, tower: python_ref.STAB) -> Attention:
    """Which patches GSTRA's query and which windows FSRA's query take their values from."""
    pixels = python_ref.split_chunks(clip.pixel_values()[None])
    x0 = patch_embed(pixels, tower.patch_embedding.weight).permute(0, 4, 1, 2, 3)
    x2 = lste(x0, tower.lmhra1, tower.dpe)
    _, weights = tower.dec.attend(tower.temporal_cls_token.expand(1, len(x2), -1), x2.flatten(2).permute(2, 0, 1))
    gstra = (weights.mean(1) * weights.shape[-1]).unflatten(-1, x2.shape[2:]).flatten(0, 1)
    fsra = []
    for frame, (row0, row1, col0, col1) in zip(
        (x2 + x0).permute(0, 2, 3, 4, 1).flatten(0, 1), clip.corners.tolist(), strict=True
    ):
        y = tower.local_attention(frame[row0:row1, col0:col1])
        _, weights = tower.global_attention.attend(tower.class_embedding, y.flatten(0, 1))
        fsra.append((weights.mean(0) * weights.shape[-1]).unflatten(0, y.shape[:2]))
    return Attention(gstra, fsra)


def draw(name: str, clip: Clip, attended: Attention, path: Path) -> None:
    """The frames, and under them both attentions, cut to the picture."""
    frames, gstra = [], []
    for pixels, heat, (row0, row1, col0, col1) in zip(clip.pixels, attended.gstra, clip.corners.tolist(), strict=True):
        frames.append(pixels[14 * row0 : 14 * row1, 14 * col0 : 14 * col1].numpy())
        gstra.append(heat[row0:row1, col0:col1])
    height, width = frames[0].shape[:2]
    size = (2.6 * len(frames) + 1, 3 * 2.55 * height / width + 0.9)
    figure, axes = plt.subplots(3, len(frames), figsize=size, layout="constrained")
    figure.get_layout_engine().set(hspace=0.03, wspace=0.01)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for t, axis in enumerate(axes[0]):
        axis.imshow(frames[t])
        axis.set_title(f"{clip.times[t]:.2f} s, chunk {t // CHUNK + 1}", fontsize=10)
    draw_row(figure, axes[1], frames, gstra)
    draw_row(figure, axes[2], frames, attended.fsra)
    for axis, label in zip(axes[:, 0], ("frames", "GSTRA", "FSRA"), strict=True):
        axis.set_ylabel(label, fontsize=12)
    padding = 1 - sum(float(heat.sum()) for heat in gstra) / attended.gstra.numel()
    figure.suptitle(
        f"{name}: attention of GSTRA over the patches of a chunk of {CHUNK} frames ({padding:.0%} of it on padding, "
        "not shown) and of FSRA over the windows of a frame. Random seeded weights, mean over heads.",
        fontsize=11,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_row(figure: plt.Figure, axes: np.ndarray, frames: list[np.ndarray], heats: list[Tensor]) -> None:
    """One heat map a frame over its grey picture; the colours span the 1st to the 99th percentile of the row."""
    low, high = np.percentile(torch.cat([heat.flatten() for heat in heats]).numpy(), (1, 99))
    colours = ScalarMappable(Normalize(low, high), "inferno")
    for axis, frame, heat in zip(axes, frames, heats, strict=True):
        height, width = frame.shape[:2]
        axis.imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=255)
        placed = {"extent": (0, width, height, 0), "interpolation": "bilinear", "alpha": 0.6}
        axis.imshow(heat.numpy(), cmap=colours.cmap, norm=colours.norm, **placed)
    bar = figure.colorbar(colours, ax=axes, fraction=0.05, pad=0.005, aspect=12, extend="both")
    bar.set_label("times uniform", fontsize=9)
    bar.ax.tick_params(labelsize=8)


def table(rows: list[Row]) -> str:
    lines = [
        f"8 frames of 448 x 448, tower without projector, {torch.get_num_threads()} threads, medians of {REPEATS}; "
        "errors relative to float64",
        f"{'clip':<16}{'dtype':<10}{'ours':>9}{'released':>12}{'speed-up':>10}{'our error':>12}{'released':>11}",
    ]
    for r in rows:
        times = f"{r.ours_ms:>6.0f} ms{r.released_ms:>9.0f} ms{r.released_ms / r.ours_ms:>9.1f}x"
        lines.append(f"{r.clip:<16}{r.dtype:<10}{times}{r.ours_error:>12.1e}{r.released_error:>11.1e}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "demo", help="folder for the pictures and the table")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    tower = seeded_tower()
    rows: list[Row] = []
    for path in clips():
        clip = read_clip(path)
        draw(path.stem, clip, attention(clip, tower), out / f"{path.stem}.png")
        rows += compare(path.stem, clip, tower)
    text = table(rows)
    (out / "table.txt").write_text(text + "\n")
    print(f"Random weights, seed {SEED}: the pictures show how attention flows, not what a trained model looks at.\n")
    print(text)
    print(f"\npictures: {', '.join(str(p) for p in sorted(out.glob('*.png')))}")


if __name__ == "__main__":
    main()
