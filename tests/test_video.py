"""panda_kernels.video: sampling, fitting and decoding as "Preparing a video" fixes them."""
from __future__ import annotations

import math
import struct
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from panda_kernels.rectangles import Rectangles
from panda_kernels.video import VideoError, fit_frame, read_clip, sample_positions


def write_video(
    path: Path,
    count: int,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 48),
    rotate: int = 0,
    ticks: Sequence[int] = (),
) -> Path:
    """``count`` grey frames, brighter by 8 each, of ``size`` (width, height), their top quarter white.

    ``ticks`` gives the presentation time of each frame in units of 1/fps; one a tick by default.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        if rotate:
            stream.set_display_rotation(rotate)
        for i in range(count):
            rgb = np.full((size[1], size[0], 3), 8 * i, np.uint8)
            rgb[: size[1] // 4] = 255
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            if ticks:
                frame.pts = ticks[i]
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def brightness(clip) -> list[int]:
    """Which frame of :func:`write_video` each frame of the clip is, read from the grey in the middle."""
    middle = clip.pixels.shape[1] // 2
    return [round(int(frame[middle, middle].float().mean()) / 8) for frame in clip.pixels[clip.present]]


@pytest.mark.parametrize(
    ("num_frames", "fps", "count", "expected"),
    [
        (250, 25, 8, [0, 25, 50, 75, 125, 150, 175, 225]),  # ten seconds thinned to eight
        (200, 25, 8, [0, 25, 50, 75, 100, 125, 150, 175]),  # eight as they are
        (201, 25, 8, [0, 25, 50, 75, 100, 125, 150, 200]),  # nine: linspace truncated, not rounded
        (132, 25, 8, [0, 18, 36, 54, 72, 90, 108, 126]),  # too few seconds: filled with a stride of 131 // 7
        (300, 29.97, 8, [0, 30, 60, 90, 150, 180, 210, 270]),  # the step is a rounded rate
        (9, 0.2, 8, [0, 1, 2, 3, 4, 5, 6, 8]),  # the step is at least one frame
        (5, 25, 8, [0, 1, 2, 3, 4]),
        (1, 25, 8, [0]),
        (40, 10, 16, list(range(0, 32, 2))),
        (40, 10, 4, [0, 10, 20, 30]),
    ],
)
def test_sample_positions(num_frames, fps, count, expected):
    assert sample_positions(num_frames, fps, count) == expected


def test_sample_positions_need_frames():
    with pytest.raises(ValueError, match="num_frames: expected at least 1, got 0"):
        sample_positions(0, 25)


@pytest.mark.parametrize(
    ("height", "width", "corners"),
    [
        (448, 448, (0, 32, 0, 32)),
        (272, 640, (8, 22, 0, 32)),  # 6.8 windows become 7, placed at 4 * 28
        (720, 1280, (6, 24, 0, 32)),  # exactly 9: nothing is rounded up
        (1280, 720, (0, 32, 6, 24)),
        (1, 1000, (14, 16, 0, 32)),  # the thinnest picture is one window
    ],
)
def test_fit_frame_places_the_picture(height, width, corners):
    rgb = np.zeros((height, width, 3), np.uint8)
    square, given = fit_frame(rgb)
    assert given == corners
    outside = np.ones((448, 448), bool)
    row0, row1, col0, col1 = (14 * c for c in corners)
    outside[row0:row1, col0:col1] = False
    assert (square[~outside] == 0).all()
    assert (square[outside] == (122, 116, 104)).all()


def test_fit_frame_is_pillows_antialiased_bicubic():
    rgb = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    square, (row0, row1, col0, col1) = fit_frame(rgb, size=56)
    expected = Image.fromarray(rgb).resize((56, 56), Image.Resampling.BICUBIC)  # two windows by ceil(1.5)
    np.testing.assert_array_equal(square[14 * row0 : 14 * row1, 14 * col0 : 14 * col1], np.asarray(expected))
    stripes = np.zeros((896, 896, 3), np.uint8)
    stripes[:, ::2] = 255
    interior = fit_frame(stripes).square[8:-8, 8:-8].astype(int)
    assert abs(interior - 127).max() <= 2  # without antialiasing the stripes would alias to black or white


def test_fit_frame_refuses():
    with pytest.raises(ValueError, match="size: expected a multiple of 28 pixels, got 100"):
        fit_frame(np.zeros((4, 4, 3), np.uint8), size=100)
    with pytest.raises(TypeError, match="rgb: expected uint8, got float64"):
        fit_frame(np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"rgb: expected shape \[height, width, 3\], got \[4, 4\]"):
        fit_frame(np.zeros((4, 4), np.uint8))


def test_read_clip_samples_and_times(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mp4", 25), size=112)
    expected = sample_positions(25, 10)
    assert brightness(clip) == expected
    torch.testing.assert_close(clip.times, torch.tensor(expected, dtype=torch.float64) / 10)
    assert clip.fps == 10 and clip.source_size == (48, 64) and bool(clip.present.all())
    assert brightness(read_clip(tmp_path / "a.mp4", size=112, frames=4)) == sample_positions(25, 10, 4)


def test_both_inputs_hold_the_same_numbers(tmp_path):
    clip = read_clip(write_video(tmp_path / "short.mp4", 3), size=224)
    assert clip.present.tolist() == [True] * 3 + [False] * 5
    assert all(math.isnan(t) for t in clip.times[3:])
    values = clip.pixel_values()
    assert values.shape == (8, 4, 224, 224) and values.dtype == torch.float32
    assert not values[3:].any()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)
    exact = (clip.channels_first[:3].double() / 255 - mean) / std
    torch.testing.assert_close(values[:3, :3].double(), exact, rtol=0, atol=1e-6)
    assert values[0, 3].mean() == 0.75 and set(values[0, 3].unique().tolist()) == {0.0, 1.0}
    from_mask = Rectangles.from_mask(values[None, :, 3])
    assert torch.equal(from_mask.corners, clip.corners)
    assert clip.corners[0].tolist() == [2, 14, 0, 16] and clip.corners[7].tolist() == [0, 16, 0, 16]


def test_missing_frames_take_the_cells_that_exist(tmp_path):
    video = write_video(tmp_path / "short.mp4", 1)
    for size, side in ((112, 8), (448, 16)):
        clip = read_clip(video, size=size, frames=4)
        assert clip.corners[3].tolist() == [0, side, 0, side]
        assert torch.equal(Rectangles.from_mask(clip.mask()[None]).corners, clip.corners)


def test_container_without_a_frame_count(tmp_path):
    video = write_video(tmp_path / "a.mkv", 25)
    with av.open(str(video)) as container:
        assert container.streams.video[0].frames == 0
    assert brightness(read_clip(video, size=112)) == sample_positions(25, 10)


@pytest.mark.parametrize("claimed", [7, 1000])
def test_container_with_a_wrong_frame_count(tmp_path, claimed, caplog):
    video = write_video(tmp_path / "a.avi", 25)
    data = bytearray(video.read_bytes())
    length = data.index(b"strh") + 8 + 32  # dwLength of the stream header
    assert struct.unpack_from("<I", data, length) == (25,)
    struct.pack_into("<I", data, length, claimed)
    video.write_bytes(data)
    with av.open(str(video)) as container:
        assert container.streams.video[0].frames == claimed
    assert brightness(read_clip(video, size=112)) == sample_positions(25, 10)
    assert ("claims 1000 frames, 25 could be decoded" in caplog.text) == (claimed == 1000)


def test_variable_frame_rate(tmp_path):
    ticks = [5, 6, 8, 13, 14, 25]
    clip = read_clip(write_video(tmp_path / "a.mkv", 6, ticks=ticks), size=112)
    assert brightness(clip) == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(clip.times[:6], (torch.tensor(ticks, dtype=torch.float64) - 5) / 10)


def test_stored_rotation_is_applied(tmp_path):
    clip = read_clip(write_video(tmp_path / "a.mp4", 1, rotate=90), size=112)
    assert clip.source_size == (64, 48) and clip.corners[0].tolist() == [0, 8, 0, 6]
    frame = clip.pixels[0].float().mean(-1)
    assert frame[56, 9] > 200 and frame[9, 42] < 50  # counterclockwise: what was on top is on the left


def _text(path: Path) -> None:
    path.write_text("not a video\n" * 100)


def _wave(path: Path) -> None:
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 136, b"WAVE", b"fmt ", 16, 1, 1, 8000, 8000, 1, 8, b"data", 100)
    path.write_bytes(header + bytes(100))


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("notes.txt", _text, "a text file"),
        ("notes.mp4", _text, "cannot be decoded as a video"),
        ("sound.wav", _wave, "no video stream"),
        ("picture.png", lambda path: Image.new("RGB", (32, 32)).save(path), "a still image"),
        ("empty.mp4", lambda path: path.touch(), "cannot be decoded as a video"),
        ("cut.mp4", lambda path: path.write_bytes(write_video(path, 9).read_bytes()[:-200]), "holds no frames"),
        ("nothing.mp4", lambda path: None, "no such file"),
        ("folder.mp4", lambda path: path.mkdir(), "no such file"),
    ],
)
def test_what_is_no_video_says_so(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(VideoError, match=f"{name}: .*{reason}"):
        read_clip(tmp_path / name)


def test_refused_arguments(tmp_path):
    video = write_video(tmp_path / "a.mp4", 1)
    for frames in (0, -4, 6):
        with pytest.raises(ValueError, match=f"frames: expected a multiple of 4, got {frames}"):
            read_clip(video, frames=frames)
    with pytest.raises(ValueError, match="size: expected a multiple of 28 pixels, got 14"):
        read_clip(video, size=14)
    with pytest.raises(ValueError, match=r"decoder: expected one of .*, got 'vlc'"):
        read_clip(video, decoder="vlc")


def test_missing_packages_name_the_extra(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", 1)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ImportError, match="pip install 'torchcodec'"):
        read_clip(video, decoder="torchcodec")
    monkeypatch.setitem(sys.modules, "av", None)
    for decoder in ("auto", "pyav"):
        with pytest.raises(ImportError, match=r"pip install 'panda-kernels\[video\]'"):
            read_clip(video, decoder=decoder)


class FakeTorchcodec:
    """The part of ``torchcodec.decoders.VideoDecoder`` that is used, on frames of :func:`write_video`'s greys."""

    def __init__(self, path: str, *, dimension_order: str, seek_mode: str) -> None:
        assert (dimension_order, seek_mode) == ("NHWC", "exact")
        self.metadata = types.SimpleNamespace(average_fps=10.0, codec="mpeg4")

    def __len__(self) -> int:
        return 25

    def get_frames_at(self, indices: list[int]) -> types.SimpleNamespace:
        greys = 8 * torch.tensor(indices, dtype=torch.uint8)
        data = greys.view(-1, 1, 1, 1).expand(-1, 48, 64, 3).contiguous()
        return types.SimpleNamespace(data=data, pts_seconds=torch.tensor(indices, dtype=torch.float64) / 10 + 3)


def test_torchcodec_serves_where_pyav_is_missing(tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", 25)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=FakeTorchcodec))
    clip = read_clip(video, size=112)
    assert clip.decoder == "torchcodec" and clip.source_size == (48, 64) and clip.fps == 10
    assert brightness(clip) == sample_positions(25, 10)
    torch.testing.assert_close(clip.times, torch.tensor(sample_positions(25, 10), dtype=torch.float64) / 10)
