"""Rectangles of valid patches: from corners, from masks, and the ragged shapes that follow."""
from __future__ import annotations

import pytest
import torch
from panda_kernels import Rectangles
from torch._subclasses.fake_tensor import FakeTensorMode


def test_counts_and_offsets() -> None:
    rectangles = Rectangles.from_corners([(0, 4, 0, 6), (1, 6, 2, 5)])
    assert (rectangles.num_windows, rectangles.num_tokens) == (6 + 2, 2 * 4 + 1 + 2 * 2 + 1)
    assert rectangles.grid().tolist() == [[2, 3], [2, 1]]
    assert rectangles.cu_seqlens().tolist() == [0, 9, 14]
    assert rectangles.cu_windows().tolist() == [0, 6, 8]
    assert rectangles.cu_seqlens().dtype == torch.int32


def test_mask_of_any_dtype_gives_its_rectangle() -> None:
    mask = torch.zeros(1, 2, 70, 84)
    mask[0, 0, 14:56, 28:70] = 1
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.bool):
        rectangles = Rectangles.from_mask(mask.to(dtype))
        assert rectangles.corners.tolist() == [[1, 4, 2, 5], [0, 5, 0, 6]]


def test_empty_frame_takes_rows_and_columns_0_to_15() -> None:
    assert Rectangles.from_mask(torch.zeros(1, 1, 448, 448)).corners.tolist() == [[0, 16, 0, 16]]


@pytest.mark.parametrize(("corners", "error", "text"), [
    ([(0, 4, 0, 4), (3, 3, 0, 4)], ValueError, "frame 1"),
    ([(0, 1, 0, 4)], ValueError, "frame 0"),
    ([(-2, 2, 0, 4)], ValueError, "frame 0"),
    ([], ValueError, "corners"),
    ([(0, 4, 0)], ValueError, "corners"),
    (torch.zeros(1, 4), TypeError, "integers"),
])
def test_what_is_no_rectangle_is_named(corners: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Rectangles.from_corners(corners)  # type: ignore[arg-type]


def test_a_mask_whose_corners_are_out_of_order_is_named() -> None:
    mask = torch.zeros(1, 1, 56, 56)
    mask[0, 0, 0, 42], mask[0, 0, 42, 0] = 1, 1  # the last valid patch lies left of the first
    with pytest.raises(ValueError, match="frame 0"):
        Rectangles.from_mask(mask)


def test_nothing_waits_for_the_device_once_corners_are_known() -> None:
    rectangles = Rectangles.from_corners([(0, 4, 0, 6)])
    with FakeTensorMode() as mode:  # raises where a value is asked for
        fake = rectangles._replace(corners=mode.from_tensor(rectangles.corners))
        assert fake.cu_seqlens().shape == (2,) and fake.grid().shape == (1, 2) and fake.cu_windows().shape == (2,)
