"""What the reference takes and what it refuses: masks, chunks, images, uint8 pixels, dtypes, widths."""

from __future__ import annotations

import pytest
import torch

from python_ref import STAB, split_chunks
from python_ref.crop import valid_rectangles
from python_ref.patch import CLIP_MEAN, CLIP_STD


def mask_of(rows: int, cols: int, *cells: tuple[int, int]) -> torch.Tensor:
    """A one-frame mask with one valid pixel in each of the given patches."""
    mask = torch.zeros(1, 1, rows * 14, cols * 14)
    for row, col in cells:
        mask[0, 0, row * 14 + 3, col * 14 + 13] = 1
    return mask


def test_corners_are_the_first_and_last_valid_patch_in_row_major_order() -> None:
    assert valid_rectangles(mask_of(8, 8, (1, 2), (3, 7), (6, 5))) == [(1, 7, 2, 6)]


def test_a_last_partial_patch_is_not_seen() -> None:
    mask = torch.nn.functional.pad(mask_of(8, 8, (1, 2), (6, 5)), (0, 13, 0, 13), value=1.0)
    assert valid_rectangles(mask) == [(1, 7, 2, 6)]


@pytest.mark.parametrize(("rows", "cols"), [(32, 32), (10, 20), (20, 10)])
def test_a_frame_without_valid_pixels_takes_sixteen_rows_and_columns_as_far_as_they_exist(rows: int, cols: int) -> None:
    assert valid_rectangles(mask_of(rows, cols)) == [(0, min(16, rows), 0, min(16, cols))]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (((1, 5), (3, 2)), "frame 1: .*first valid patch.*row 1, column 5.*row 3, column 2.*out of order"),
        (((2, 3), (2, 6)), "frame 1: .*1 x 4 patches is smaller than a window of 2 x 2"),
        (((2, 3), (6, 3)), "frame 1: .*5 x 1 patches is smaller than a window of 2 x 2"),
    ],
)
def test_unusable_masks_name_the_frame(cells: tuple[tuple[int, int], ...], message: str) -> None:
    mask = torch.cat([mask_of(8, 8, (0, 0), (7, 7)), mask_of(8, 8, *cells)], dim=1)
    with pytest.raises(ValueError, match=message):
        valid_rectangles(mask)


def test_pixels_without_a_mask_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pixel_values has shape \(1, 4, 3, 28, 28\), expected \[B, T, 4, H, W\]"):
        STAB(32)(torch.zeros(1, 4, 3, 28, 28), torch.nn.Identity())


def test_chunks_keep_the_order_of_frames() -> None:
    video = torch.arange(16).view(2, 8, 1)
    assert split_chunks(video)[..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_number_of_frames_that_is_no_multiple_of_the_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="pixels has 6 frames, expected a multiple of 4"):
        split_chunks(torch.zeros(1, 6, 4, 28, 28))


def test_chunks_do_not_see_one_another() -> None:
    torch.manual_seed(0)
    tower = STAB(32).double().eval()
    video = torch.randn(1, 8, 4, 56, 56, dtype=torch.float64)
    video[:, :, 3] = 1
    with torch.no_grad():
        together, _ = tower(split_chunks(video), torch.nn.Identity())
        second, _ = tower(video[:, 4:], torch.nn.Identity())
    for a, b in zip(together[4:], second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_modules_are_applied_to_each_frame() -> None:
    tower = STAB(32).eval()
    pixels = torch.ones(1, 4, 4, 56, 84)
    seen: list[tuple[int, ...]] = []

    def first_token(frame: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(frame.shape))
        return frame[:1]

    tokens, grids = tower(pixels, first_token)
    assert seen == [(1 + 2 * (3 + 1), 32)] * 4
    assert [tuple(t.shape) for t in tokens] == [(1, 32)] * 4
    assert [g.tolist() for g in grids] == [[2, 3]] * 4
    assert all(g.dtype == torch.int64 for g in grids)


def test_images_skip_the_temporal_stages() -> None:
    tower = STAB(32).eval()
    for module in (tower.lmhra1, tower.dpe, tower.dec, tower.proj):
        for parameter in module.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
    tokens, _ = tower(torch.ones(2, 1, 4, 56, 56), torch.nn.Identity())
    assert all(frame.isfinite().all() for frame in tokens)


def test_uint8_pixels_are_normalised() -> None:
    torch.manual_seed(0)
    tower = STAB(32).double().eval()
    raw = torch.randint(0, 256, (1, 4, 4, 56, 56), dtype=torch.uint8)
    raw[:, :, 3] = 1
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = raw.double()
    pixels[:, :, :3] = (pixels[:, :, :3] / 255 - mean) / std
    with torch.no_grad():
        expected, _ = tower(pixels, torch.nn.Identity())
        actual, _ = tower(raw, torch.nn.Identity())
    torch.testing.assert_close(torch.cat(actual), torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_are_cast_to_the_weights_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tower = STAB(64).to(dtype).eval()
    pixels = torch.randn(1, 4, 4, 56, 56, dtype=torch.float64)
    pixels[:, :, 3] = 1
    with torch.no_grad():
        actual = torch.cat(tower(pixels, torch.nn.Identity())[0])
        expected = torch.cat(tower.double()(pixels, torch.nn.Identity())[0])
    assert actual.dtype == dtype
    assert float((actual - expected).norm() / expected.norm()) < 4 * torch.finfo(dtype).eps


def test_attention_weights_belong_to_the_output() -> None:
    torch.manual_seed(0)
    tower = STAB(64).double().eval()
    torch.nn.init.normal_(tower.dec.attn.out_proj.weight)
    query, tokens = torch.randn(1, 2, 64).double(), torch.randn(48, 2, 64).double()
    with torch.no_grad():
        g, weights = tower.dec.attend(query, tokens)
        assert weights.shape == (2, 8, 48)
        torch.testing.assert_close(g, tower.dec(query, tokens), rtol=0, atol=1e-12)
        f, frame_weights = tower.global_attention.attend(query[0, 0], tokens[:, 0])
        assert frame_weights.shape == (8, 48)
        torch.testing.assert_close(f, tower.global_attention(query[0, 0], tokens[:, 0]), rtol=0, atol=1e-12)
    for w in (weights, frame_weights):
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), rtol=0, atol=1e-12)


def test_dropout_is_active_in_training_at_both_places() -> None:
    torch.manual_seed(0)
    tower = STAB(64)
    torch.nn.init.normal_(tower.dec.mlp.c_proj.weight)
    query, tokens = torch.randn(1, 2, 64), torch.randn(48, 2, 64)
    with torch.no_grad():
        assert not torch.equal(tower.dec(query, tokens), tower.dec(query, tokens))
        assert not torch.equal(tower.proj(query), tower.proj(query))
        tower.eval()
        assert torch.equal(tower.dec(query, tokens), tower.dec(query, tokens))
        assert torch.equal(tower.proj(query), tower.proj(query))
