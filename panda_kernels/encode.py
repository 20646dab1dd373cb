"""Video files to token files: what ``panda-kernels encode`` does, for use from Python as well.

Each video becomes one safetensors file holding ``tokens [num_tokens, C]``, ``cu_seqlens`` int32 ``[frames + 1]``
(offsets of the frames in ``tokens``), ``grid`` int64 ``[frames, 2]`` (rows and columns of windows), ``frame_times``
float64 ``[frames]`` (seconds, NaN where the video was too short), ``corners`` int64 ``[frames, 4]`` (see
:class:`panda_kernels.video.Clip`) and ``present`` bool ``[frames]``, and as metadata, all strings, what they were made
from.
"""
from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .nn import STAB, Projector, VisualPath, split_chunks
from .rectangles import Rectangles
from .video import EXTRA, Clip, VideoError, read_clip

# Looked for in folders. No ".ts": more often a program than a transport stream.
VIDEO_SUFFIXES = frozenset((
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv",
    ".vob", ".webm", ".wmv",
))
FORMAT = "panda_kernels.tokens/1"
# An output of the same video is complete if these agree: they decide its numbers (the checksum sees the dtype too).
SETTINGS = ("format", "model", "weights_sha256", "backend", "projector", "frames", "size")
SAMPLE = 1 << 20


class OutputError(RuntimeError):
    """An output file cannot be written without losing another video's tokens."""


@dataclass(frozen=True)
class Model:
    """A tower in evaluation mode, the projector after it if one is wanted, and the name of their weights."""

    tower: STAB
    projector: Projector | None
    weights: str

    @functools.cached_property
    def path(self) -> VisualPath:
        return VisualPath(self.tower, self.projector)

    def describe(self) -> dict[str, str]:
        parameter = next(self.tower.parameters())
        return {
            "model": type(self.tower).__name__,
            "weights": self.weights,
            "weights_sha256": checksum(m for m in (self.tower, self.projector) if m is not None),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "backend": str(getattr(self.tower, "backend", "auto")),
            "projector": "no" if self.projector is None else "yes",
        }


class Tokens(NamedTuple):
    """``tokens [num_tokens, C]``, ``cu_seqlens`` int32 ``[frames + 1]``, ``grid`` int64 ``[frames, 2]``."""

    tokens: Tensor
    cu_seqlens: Tensor
    grid: Tensor


def load_model(
    weights: Path | None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    projector: bool = False,
) -> Model:
    """The tower (and projector) of a checkpoint, or without one a tower with the released initialisation.

    Random weights are drawn on the CPU in float32, so that a seed means the same model everywhere.

    Raises:
        ValueError: a projector is wanted without a checkpoint; also whatever ``from_checkpoint`` raises.
    """
    head: Projector | None = None
    if weights is not None:
        tower = STAB.from_checkpoint(weights, dtype=dtype, device=device)
        if projector:
            head = Projector.from_checkpoint(weights, dtype=dtype, device=device)
        name = weights.name
    else:
        if projector:
            raise ValueError("load_model: projector: expected a checkpoint that holds one, got no weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = STAB().to(device=device, dtype=dtype)
        name = f"random, seed {seed}"
    for module in (tower, head):
        if module is not None:
            module.eval()
            module.backend = backend
    return Model(tower, head, name)


@torch.inference_mode()
def encode_clip(model: Model, clip: Clip) -> Tokens:
    """Tokens of one clip, its frames in order; they go through the tower in chunks of 4 (stages 1 to 9, or 10)."""
    device = next(model.tower.parameters()).device
    pixels = split_chunks(clip.channels_first[None].to(device))
    present = split_chunks(clip.present[None].to(device))
    rectangles = Rectangles.from_corners(clip.corners, device=device)
    return Tokens(*model.path(pixels, rectangles, present=present))


def encode_videos(inputs: Sequence[Path], out: Path, model: Model, *, frames: int = 8, size: int = 448) -> int:
    """Encode every video of ``inputs`` (files, and folders searched to any depth) into ``out``; print what happened.

    A file that fails is reported and the others are still done. An output that is already complete for the same
    settings and the same video is left alone. Returns the number of failures.

    Raises:
        ImportError: a package of ``panda-kernels[video]`` is missing.
    """
    tqdm = _require("tqdm").tqdm
    videos, failures = find_videos(inputs)
    described = {"format": FORMAT, **model.describe(), "frames": str(frames), "size": str(size)}
    out.mkdir(parents=True, exist_ok=True)
    done: Counter[str] = Counter()
    with tqdm(output_paths(videos, out), unit="video", disable=None) as bar:
        for video, target in bar:
            try:
                settings = {**described, "video_fingerprint": fingerprint(video)}
                if _is_complete(target, settings):
                    done["already there"] += 1
                    continue
                clip = read_clip(video, frames=frames, size=size)
                encoded = encode_clip(model, clip)
                save_tokens(target, encoded, clip, {**settings, "video": video.name})
            except (VideoError, OutputError) as error:
                failures.append(str(error))
                tqdm.write(f"failed: {error}", file=sys.stderr)
            else:
                done["encoded"] += 1
                tqdm.write(f"{video} -> {target}: {len(encoded.tokens)} tokens of {frames} frames", file=sys.stderr)
    counts = [f"{done[what]} {what}" for what in ("encoded", "already there")]
    print(", ".join([*counts, f"{len(failures)} failed"]), file=sys.stderr)
    return len(failures)


def find_videos(inputs: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The files named, and those in the folders named that end like videos, each once; and what found nothing."""
    videos: dict[Path, Path] = {}
    failures = []
    for path in inputs:
        found = [path]
        if path.is_dir():
            found = sorted(
                p
                for p in path.rglob("*")
                if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith(".") and p.is_file()
            )
            if not found:
                failures.append(f"{path}: no videos in this folder")
                print(f"failed: {failures[-1]}", file=sys.stderr)
        for video in found:
            videos.setdefault(video.resolve(), video)
    return list(videos.values()), failures


def output_paths(videos: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Each video with its output, ``<stem>.safetensors``; equal stems have part of the videos' fingerprints added."""
    stems = Counter(video.stem.casefold() for video in videos)
    pairs = []
    for video in videos:
        unique = stems[video.stem.casefold()] == 1 or not video.is_file()
        name = video.stem if unique else f"{video.stem}-{fingerprint(video)[:8]}"
        pairs.append((video, out / f"{name}.safetensors"))
    return pairs


def fingerprint(video: Path) -> str:
    """SHA-256 of the file's size and of its first and last MiB: tells videos apart without reading all of them.

    Raises:
        VideoError: the file cannot be read.
    """
    try:
        with video.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    except OSError as error:
        raise VideoError(f"{video}: {error.strerror}") from error
    return digest.hexdigest()


def checksum(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tokens(path: Path, encoded: Tokens, clip: Clip, settings: dict[str, str]) -> None:
    """Write one output whole or not at all: beside its place first, then renamed over it.

    Raises:
        OSError: the file cannot be written.
    """
    from . import __version__

    times = clip.times.tolist()
    metadata = {
        **settings,
        "package_version": __version__,
        "fps": str(clip.fps),
        "source_size": json.dumps(clip.source_size),
        "decoder": clip.decoder,
        "grid": json.dumps(encoded.grid.tolist()),
        "frame_times": json.dumps([t if t == t else None for t in times]),
    }
    tensors = {
        **encoded._asdict(),
        "frame_times": clip.times,
        "corners": clip.corners,
        "present": clip.present,
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        _require("safetensors.torch").save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _is_complete(path: Path, settings: dict[str, str]) -> bool:
    """Whether ``path`` already holds this video with these settings.

    Raises:
        OutputError: it holds another video's tokens.
    """
    metadata = _read_metadata(path)
    if metadata is None or metadata.get("format") != FORMAT:
        return False
    if metadata["video_fingerprint"] != settings["video_fingerprint"]:
        raise OutputError(
            f"{path}: holds the tokens of another video ({metadata['video']}, {metadata['video_fingerprint'][:8]}); "
            "remove it or choose another output folder"
        )
    return all(metadata.get(key) == settings[key] for key in SETTINGS)


def _read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a whole safetensors file, None for a missing or damaged one."""
    safetensors = _require("safetensors")
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata()
    except safetensors.SafetensorError:
        return None


def _require(module: str) -> ModuleType | Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"panda-kernels encode needs {module}: pip install '{EXTRA}' ({error})") from error
