"""Train a small tower through the kernels and through the released arithmetic, from the same weights on the same clips.

    python examples/learn.py [PICTURE]

The task: a bright square moves over noise for four frames; say in which of four directions. Writes the two loss curves
as a picture, by default bench/plots/learning.png.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import python_ref
from panda_kernels.nn import STAB

DIM, PATCH, SIDE, FRAMES, CLIPS, STEPS = 32, 4, 40, 4, 16, 50
TOKENS = 1 + (SIDE // PATCH // 2) * (SIDE // PATCH // 2 + 1)  # of a frame
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def clips(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``[CLIPS, FRAMES, 4, SIDE, SIDE]`` with a mask of ones, and the direction of each clip."""
    labels = torch.randint(len(DIRECTIONS), (CLIPS,), generator=generator)
    pixels = 0.3 * torch.randn(CLIPS, FRAMES, 4, SIDE, SIDE, generator=generator)
    pixels[:, :, 3] = 1
    starts = torch.randint(12, SIDE - 20, (CLIPS, 2), generator=generator)
    for clip, (label, start) in enumerate(zip(labels.tolist(), starts.tolist(), strict=True)):
        for t in range(FRAMES):
            row, col = (s + 4 * t * d for s, d in zip(start, DIRECTIONS[label], strict=True))
            pixels[clip, t, :3, row:row + 8, col:col + 8] += 2
    return pixels, labels


class Classifier(nn.Module):
    """A tower, and a linear layer over all tokens of a clip."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(FRAMES * TOKENS * DIM, len(DIRECTIONS))

    def forward(self, pixels: Tensor) -> Tensor:
        if isinstance(self.tower, STAB):
            tokens = self.tower(pixels).tokens
        else:
            tokens = torch.cat(self.tower(pixels, nn.Identity())[0])
        return self.head(tokens.reshape(len(pixels), -1))


def losses(tower_class: type[nn.Module], steps: int = STEPS) -> list[float]:
    """Cross entropy at each step of training from seed 0; both towers have the same names, and so the same weights."""
    torch.manual_seed(0)
    weights = Classifier(python_ref.STAB(DIM, patch=PATCH, dropout=0.0)).state_dict()
    model = Classifier(tower_class(DIM, patch=PATCH, dropout=0.0)).train()
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(steps):
        pixels, labels = clips(generator)
        loss = F.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    target = sys.argv[1] if len(sys.argv) > 1 else "bench/plots/learning.png"
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses(python_ref.STAB), label="released arithmetic", linewidth=4, color="tab:orange", alpha=0.5)
    axes.plot(losses(STAB), label="panda_kernels", linewidth=1.2, color="tab:blue")
    axes.set(xlabel="step", ylabel="cross entropy", title="In which direction does the square move?", ylim=(0, None))
    axes.legend()
    figure.savefig(target, dpi=120)
    print(target)


if __name__ == "__main__":
    main()
