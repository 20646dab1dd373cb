"""Video files into the frames the tower takes: decoded, sampled and fitted ("Preparing a video" of the specification).

PyAV, or torchcodec, decodes and Pillow resizes; both are imported at first use and come with the extra
``panda-kernels[video]``. Inference only: the random flip of the released preprocessing is left out.
"""
from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("panda_kernels")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = tuple(int(255 * m) for m in CLIP_MEAN)
PATCH = 14
CELL = 2 * PATCH  # a side of the picture is a whole number of windows of two patches
CHUNK = 4
DECODERS = ("pyav", "torchcodec")
PICTURE_CODECS = ("png", "mjpeg", "webp", "bmp", "tiff")

EXTRA = "panda-kernels[video]"

Corners = tuple[int, int, int, int]


class VideoError(ValueError):
    """The file is missing, is no video, or cannot be decoded; the message names the file and the reason."""


class FittedFrame(NamedTuple):
    """One frame on its square: uint8 ``[size, size, 3]``, and where it lies: (row0, row1, col0, col1) in patches."""

    square: np.ndarray
    corners: Corners


class _Frame(NamedTuple):
    fitted: FittedFrame
    time: float | None
    height: int
    width: int


class _Decoded(NamedTuple):
    frames: list[_Frame]
    fps: float


@dataclass(frozen=True, eq=False)
class Clip:
    """The sampled, fitted frames of one video; ``T`` frames on squares of ``size`` pixels.

    Attributes:
        pixels: uint8 ``[T, size, size, 3]``, RGB; zeros where a frame is missing.
        corners: int64 ``[T, 4]`` on the CPU, the valid rectangle of each frame in patches of 14 pixels as
            (row0, row1, col0, col1), ends exclusive. A missing frame has rows and columns 0..15, as far as they
            exist: what the tower takes for an all-zero mask (stage 5).
        present: bool ``[T]``, False for the frames that a short video lacks.
        times: float64 ``[T]``, seconds since the video's first frame; NaN where a frame is missing.
        fps: average frames per second as the file states them; 0.0 where it does not.
        source_size: (height, width) of the video as shown, in pixels.
        decoder: name of the decoder that read it.
    """

    pixels: Tensor
    corners: Tensor
    present: Tensor
    times: Tensor
    fps: float
    source_size: tuple[int, int]
    decoder: str

    @property
    def channels_first(self) -> Tensor:
        """uint8 ``[T, 3, size, size]``, a view of :attr:`pixels`: with ``corners`` and ``present`` the tower's cheap
        input, four times fewer bytes than :meth:`pixel_values`."""
        return self.pixels.permute(0, 3, 1, 2)

    def mask(self) -> Tensor:
        """float32 ``[T, size, size]``, 1 where the picture is; all zero for a missing frame."""
        mask = torch.zeros(self.pixels.shape[:3])
        for frame, (row0, row1, col0, col1) in enumerate(self.corners.tolist()):
            if self.present[frame]:
                mask[frame, row0 * PATCH : row1 * PATCH, col0 * PATCH : col1 * PATCH] = 1.0
        return mask

    def pixel_values(self) -> Tensor:
        """float32 ``[T, 4, size, size]``: three CLIP-normalised channels and the mask, as the released model takes
        them; a missing frame is all zero."""
        mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
        std = torch.tensor(CLIP_STD).view(3, 1, 1)
        normalised = (self.channels_first.float() / 255 - mean) / std
        normalised[~self.present] = 0.0
        return torch.cat([normalised, self.mask()[:, None]], dim=1)


def sample_positions(num_frames: int, fps: float, count: int = 8) -> list[int]:
    """Positions of at most ``count`` frames among ``num_frames``: one a second, thinned or filled up to ``count``.

    Source: "Preparing a video". The list is shorter than ``count`` only where the video is; an ``fps`` that is not
    known (0) samples from all frames.

    Raises:
        ValueError: ``num_frames`` or ``count`` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"sample_positions: num_frames: expected at least 1, got {num_frames}")
    if count < 1:
        raise ValueError(f"sample_positions: count: expected at least 1, got {count}")
    step = max(1, round(fps))
    seconds = list(range(0, num_frames, step))
    if len(seconds) >= count:
        thinned = np.linspace(0, len(seconds) - 1, count).astype(int)
        return [seconds[i] for i in thinned]
    filled = min(count, num_frames)
    stride = max(1, (num_frames - 1) // (filled - 1)) if filled > 1 else 0
    return [k * stride for k in range(filled)]


def fit_frame(rgb: np.ndarray, size: int = 448) -> FittedFrame:
    """Resize one frame so that its longer side is ``size`` pixels and place it on a square of the mean colour.

    The shorter side becomes the next whole number of windows (28 pixels), so the aspect ratio is kept up to that
    rounding. Bicubic with antialiasing, Pillow's.

    Args:
        rgb: uint8 ``[height, width, 3]``.
        size: side of the square in pixels, a multiple of 28.

    Raises:
        TypeError, ValueError: ``rgb`` or ``size`` is not of that form.
        ImportError: Pillow is not installed.
    """
    if rgb.dtype != np.uint8:
        raise TypeError(f"fit_frame: rgb: expected uint8, got {rgb.dtype}")
    if rgb.ndim != 3 or rgb.shape[2] != 3 or 0 in rgb.shape:
        raise ValueError(f"fit_frame: rgb: expected shape [height, width, 3], got {list(rgb.shape)}")
    _check_size("fit_frame", size)
    image = _require("PIL.Image", EXTRA)
    height, width = rgb.shape[:2]
    cells = size // CELL
    # Whole numbers keep the ceiling exact: cells * short / long in floating point can land just above an integer.
    short_cells = -(-cells * min(height, width) // max(height, width))
    offset, short = 2 * ((cells - short_cells) // 2), 2 * short_cells
    long = 2 * cells
    corners = (offset, offset + short, 0, long) if width >= height else (0, long, offset, offset + short)
    row0, row1, col0, col1 = (PATCH * c for c in corners)
    picture = image.fromarray(rgb).resize((col1 - col0, row1 - row0), image.Resampling.BICUBIC)
    square = np.empty((size, size, 3), np.uint8)
    square[:] = MEAN_COLOUR
    square[row0:row1, col0:col1] = np.asarray(picture)
    return FittedFrame(square, corners)


def read_clip(path: str | Path, *, frames: int = 8, size: int = 448, decoder: str = "auto") -> Clip:
    """Decode a video and return ``frames`` of its frames, sampled and fitted.

    Frames are counted by decoding, so a count that the container lacks or has wrong does not matter; only sampled
    frames are converted to RGB. Rotation stored in the file is applied.

    Args:
        path: the video file.
        frames: how many to sample, a multiple of 4 (the model's default is 8); missing ones are appended as absent.
        size: side of the square in pixels, a multiple of 28.
        decoder: "pyav", "torchcodec", or "auto": PyAV where it is installed, else torchcodec.

    Raises:
        VideoError: the file is missing, is no video, has no frames, or is damaged.
        ValueError: ``frames``, ``size`` or ``decoder`` is not as above.
        ImportError: no decoder, or not the one named, is installed.
    """
    if frames < 1 or frames % CHUNK:
        raise ValueError(f"read_clip: frames: expected a multiple of {CHUNK}, got {frames}")
    _check_size("read_clip", size)
    decoder = _choose_decoder(decoder)
    path = Path(path)
    if not path.is_file():
        raise VideoError(f"{path}: no such file")
    decode = _decode_pyav if decoder == "pyav" else _decode_torchcodec
    decoded = decode(path, lambda count, fps: sample_positions(count, fps, frames), size)
    return _assemble(decoded, frames, size, decoder)


def _assemble(decoded: _Decoded, frames: int, size: int, decoder: str) -> Clip:
    side = min(16, size // PATCH)
    pixels = torch.zeros(frames, size, size, 3, dtype=torch.uint8)
    corners = torch.tensor([(0, side, 0, side)] * frames)
    present = torch.zeros(frames, dtype=torch.bool)
    times = torch.full((frames,), math.nan, dtype=torch.float64)
    start = decoded.frames[0].time or 0.0  # position 0 is always sampled
    for i, frame in enumerate(decoded.frames):
        pixels[i] = torch.from_numpy(frame.fitted.square)
        corners[i] = torch.tensor(frame.fitted.corners)
        present[i] = True
        if frame.time is not None:
            times[i] = frame.time - start
    first = decoded.frames[0]
    return Clip(pixels, corners, present, times, decoded.fps, (first.height, first.width), decoder)


Choose = Callable[[int, float], list[int]]


def _decode_pyav(path: Path, choose: Choose, size: int) -> _Decoded:
    with _open_pyav(path) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        expected = stream.frames
        if not expected:
            expected = sum(packet.size > 0 for packet in container.demux(stream))
    frames, count = _frames_at(path, choose(max(1, expected), fps), size)
    if count != expected:
        # The container's count is a claim, and packets need not be frames; what was decoded is the truth.
        if count == 0:
            raise VideoError(f"{path}: the video stream holds no frames")
        if count < expected:
            log.warning("%s: claims %d frames, %d could be decoded; the file may be cut off", path, expected, count)
        frames, _ = _frames_at(path, choose(count, fps), size)
    return _Decoded(frames, fps)


def _frames_at(path: Path, positions: list[int], size: int) -> tuple[list[_Frame], int]:
    """The frames at ``positions`` and the number of frames of the whole stream."""
    wanted, frames, count = set(positions), [], 0
    with _open_pyav(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            if count in wanted:
                rgb = frame.to_ndarray(format="rgb24")
                rgb = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
                time = frame.time if frame.time is not None or not stream.average_rate else count / stream.average_rate
                height, width = rgb.shape[:2]
                frames.append(_Frame(fit_frame(rgb, size), None if time is None else float(time), height, width))
            count += 1
    return frames, count


@contextmanager
def _open_pyav(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream; what goes wrong inside is raised as :class:`VideoError`."""
    av = _require("av", EXTRA)
    try:
        # The prefix keeps ffmpeg from reading a name such as "a:b.mp4" as a protocol.
        with av.open(f"file:{path}") as container:
            name = container.format.name
            _refuse_lookalikes(path, text=name == "tty", picture=name == "image2" or name.endswith("_pipe"))
            cover = av.stream.Disposition.attached_pic
            streams = [s for s in container.streams.video if not s.disposition & cover]
            if not streams:
                raise VideoError(f"{path}: not a video (no video stream in this {container.format.long_name} file)")
            yield container, streams[0]
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be decoded as a video ({getattr(error, 'strerror', error)})") from error


def _decode_torchcodec(path: Path, choose: Choose, size: int) -> _Decoded:
    decoders = _require("torchcodec.decoders", "torchcodec")
    try:
        video = decoders.VideoDecoder(str(path), dimension_order="NHWC", seek_mode="exact")
        count, fps = len(video), float(video.metadata.average_fps or 0)
        if count == 0:
            raise VideoError(f"{path}: the video stream holds no frames")
        codec = video.metadata.codec
        _refuse_lookalikes(path, text=codec == "ansi", picture=count == 1 and codec in PICTURE_CODECS)
        batch = video.get_frames_at(choose(count, fps))
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: cannot be decoded as a video ({str(error).splitlines()[0]})") from error
    height, width = batch.data.shape[1:3]
    frames = [
        _Frame(fit_frame(rgb, size), time, height, width)
        for rgb, time in zip(batch.data.numpy(), batch.pts_seconds.tolist(), strict=True)
    ]
    return _Decoded(frames, fps)


def _refuse_lookalikes(path: Path, *, text: bool, picture: bool) -> None:
    """ffmpeg draws text files as ANSI art and takes a single picture for a video of one frame."""
    if text or picture:
        raise VideoError(f"{path}: not a video ({'a text file' if text else 'a still image'})")


def _choose_decoder(decoder: str) -> str:
    if decoder in DECODERS:
        return decoder
    if decoder != "auto":
        raise ValueError(f"read_clip: decoder: expected one of {('auto', *DECODERS)}, got {decoder!r}")
    try:
        importlib.import_module("av")
    except ImportError:
        _require("torchcodec.decoders", EXTRA)
        return "torchcodec"
    return "pyav"


def _require(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchcodec without ffmpeg's libraries raises RuntimeError
        reason = str(error).splitlines()[0]
        raise ImportError(f"panda_kernels.video needs {module}: pip install '{package}' ({reason})") from error


def _check_size(where: str, size: int) -> None:
    if size < CELL or size % CELL:
        raise ValueError(f"{where}: size: expected a multiple of {CELL} pixels, got {size}")
