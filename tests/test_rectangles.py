"""Rectangles: read from masks as the reference reads them, counted, and refused by name where they are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from panda_kernels import Rectangles
from python_ref.crop import valid_rectangles

RAGGED = [(0, 6, 0, 8), (1, 4, 2, 8), (0, 5, 3, 6), (2, 6, 0, 7)]


def masks(corners: list[tuple[int, int, int, int]], rows: int = 6, cols: int = 8, patch: int = 14) -> Tensor:
    mask = torch.zeros(1, len(corners), rows * patch, cols * patch)
    for i, (r0, r1, c0, c1) in enumerate(corners):
        mask[0, i, r0 * patch:r1 * patch, c0 * patch:c1 * patch] = 1
    return mask


def counted(corners: list[tuple[int, int, int, int]], window: int) -> tuple[list[list[int]], list[int], list[int]]:
    """Grids, windows and tokens of each frame, one frame at a time."""
    grids = [[(r1 - r0) // window, (c1 - c0) // window] for r0, r1, c0, c1 in corners]
    return grids, [h * w for h, w in grids], [1 + h * (w + 1) for h, w in grids]


def running(counts: list[int]) -> list[int]:
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_counts_and_offsets(window: int, as_tensor: bool) -> None:
    given = torch.tensor(RAGGED, dtype=torch.int32) if as_tensor else RAGGED
    rectangles = Rectangles.from_corners(given, window)
    grids, windows, tokens = counted(RAGGED, window)
    assert rectangles.corners.tolist() == [list(c) for c in RAGGED]
    assert rectangles.corners.dtype == torch.int64
    assert (rectangles.num_windows, rectangles.num_tokens) == (sum(windows), sum(tokens))
    assert rectangles.grid(window).tolist() == grids
    for offsets, counts in ((rectangles.cu_windows(window), windows), (rectangles.cu_seqlens(window), tokens)):
        assert offsets.dtype == torch.int32
        assert offsets.tolist() == running(counts)


def test_a_square_frame_gives_273_tokens() -> None:
    rectangles = Rectangles.full(8, 32, 32)
    assert rectangles.num_tokens == 8 * 273
    assert rectangles.corners.tolist() == [[0, 32, 0, 32]] * 8


def test_given_corners_are_not_shared() -> None:
    corners = torch.tensor(RAGGED)
    rectangles = Rectangles.from_corners(corners)
    corners.zero_()
    assert rectangles.corners.tolist() == [list(c) for c in RAGGED]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_mask_gives_the_corners_it_was_made_of(dtype: torch.dtype) -> None:
    assert Rectangles.from_mask(masks(RAGGED).to(dtype)).corners.tolist() == [list(c) for c in RAGGED]


def reference_corners(mask: Tensor, patch: int = 14) -> list[list[int]]:
    return [list(corners) for corners in valid_rectangles(mask, patch)]


def test_masks_are_read_as_the_reference_reads_them() -> None:
    """One pixel makes a patch valid, pixels beyond the last whole patch do not count, holes do not matter."""
    torch.manual_seed(0)
    mask = masks([(1, 5, 2, 6)] * 3)
    mask[0, 0, 14:70, 28:84] = 0
    mask[0, 0, 20, 33] = mask[0, 0, 69, 83] = 1
    mask[0, 1] *= torch.rand(mask.shape[2:]) > 0.5
    padded = torch.nn.functional.pad(mask, (0, 9, 0, 5), value=1.0)
    expected = reference_corners(mask)
    assert expected[0] == [1, 5, 2, 6]
    assert Rectangles.from_mask(mask).corners.tolist() == expected
    assert Rectangles.from_mask(padded).corners.tolist() == expected == reference_corners(padded)


@pytest.mark.parametrize(("rows", "cols", "expected"), [(20, 18, [0, 16, 0, 16]), (5, 30, [0, 5, 0, 16])])
def test_an_empty_frame_takes_what_exists_of_sixteen(rows: int, cols: int, expected: list[int]) -> None:
    mask = torch.zeros(2, 1, rows * 14, cols * 14)
    mask[1] = 1
    assert Rectangles.from_mask(mask).corners.tolist() == [expected, [0, rows, 0, cols]] == reference_corners(mask)


def test_only_the_first_patch_valid_is_no_empty_frame() -> None:
    with pytest.raises(ValueError, match="frame 0: expected at least a window of 2 x 2 patches, got 1 x 1"):
        Rectangles.from_mask(masks([(0, 1, 0, 1)], rows=20, cols=20))


def test_other_patches() -> None:
    assert Rectangles.from_mask(masks(RAGGED, patch=4), patch=4).corners.tolist() == [list(c) for c in RAGGED]


def test_offsets_need_no_values() -> None:
    """What a device would have to be waited for: fake tensors have none."""
    rectangles = Rectangles.from_corners(RAGGED)
    with FakeTensorMode() as mode:
        fake = rectangles._replace(corners=mode.from_tensor(rectangles.corners))
        assert fake.grid().shape == (4, 2)
        assert fake.cu_seqlens().shape == fake.cu_windows().shape == (5,)


CORNER_FAULTS = [
    ([(0, 4, 0, 4), (3, 3, 0, 4)], ValueError, "frame 1: the corners are out of order: rows 3 to 3"),
    ([(0, 4, 5, 2)], ValueError, "frame 0: the corners are out of order"),
    ([(0, 4, 0, 1)], ValueError, "frame 0: expected at least a window of 2 x 2 patches, got 4 x 1"),
    ([(-1, 4, 0, 4)], ValueError, "frame 0: expected corners from 0 on"),
    ([(0, 4, 0)], ValueError, r"corners: expected shape \[frames >= 1, 4\], got \[1, 3\]"),
    ([], ValueError, r"corners: expected shape \[frames >= 1, 4\]"),
    (torch.ones(2, 4), TypeError, "corners: expected integers, got torch.float32"),
    (torch.ones(2, 4, dtype=torch.bool), TypeError, "corners: expected integers, got torch.bool"),
    (torch.ones(2, 4, device="meta", dtype=torch.int64), ValueError, "corners: expected a tensor on the cpu"),
]


@pytest.mark.parametrize(("corners", "error", "message"), CORNER_FAULTS)
def test_bad_corners_are_named(corners: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"Rectangles: {message}"):
        Rectangles.from_corners(corners)  # type: ignore[arg-type]


def test_a_mask_out_of_order_names_the_frame() -> None:
    mask = masks([(0, 4, 0, 4), (0, 4, 0, 4)])
    mask[0, 1] = 0
    mask[0, 1, 0, 5 * 14] = mask[0, 1, 3 * 14, 14] = 1
    with pytest.raises(ValueError, match="frame 1: the corners are out of order: rows 0 to 4, columns 5 to 2"):
        Rectangles.from_mask(mask)


@pytest.mark.parametrize(("shape", "message"), [((2, 28, 28), r"expected shape \[B, T, H, W\]"),
                                                ((0, 4, 28, 28), r"expected shape \[B, T, H, W\] with frames"),
                                                ((1, 4, 13, 28), "expected at least one patch of 14 x 14 pixels")])
def test_bad_masks_are_named(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"Rectangles: mask: {message}"):
        Rectangles.from_mask(torch.ones(shape))
