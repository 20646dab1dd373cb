"""Weights from Hugging Face style checkpoints: a file or a folder, sharded or not, safetensors or torch's own.

Only the tensors asked for are read, so a tower comes out of a checkpoint of a whole language model without loading it.
"""
from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

# Released models share one tower, and one projector, between two names; a checkpoint holds either name or both.
TOWER_PREFIXES = ("model.video_tower.", "model.vision_tower.")
PROJECTOR_PREFIXES = ("model.video_projector.", "model.mm_projector.")

_INDEX = ".index.json"
_FOLDER = ("model.safetensors" + _INDEX, "model.safetensors", "pytorch_model.bin" + _INDEX, "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")

_Opened = tuple[set[str], Callable[[str], Tensor]]
M = TypeVar("M", bound=nn.Module)


def read(path: str | PathLike[str], prefixes: tuple[str, ...], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under any of ``prefixes``, prefix removed; of a file with none of them, all if it knows ``names``.

    ``path`` is a folder (``model.safetensors`` or ``pytorch_model.bin``, each with an ``.index.json`` if sharded, or
    any single weight file), one weight file, or an index. Nothing but tensors is unpickled. The tensors are on the CPU
    and may be views of the mapped file.

    Raises:
        FileNotFoundError: there is no such file or folder, or a shard is missing.
        ImportError: safetensors is needed and not installed.
        ValueError: not a checkpoint, damaged, or without any such tensor.
    """
    names = set(names)
    shards = _shards(_find(Path(path)))
    chosen = _select(shards, prefixes, names)
    tensors: dict[str, Tensor] = {}
    for shard in sorted({shards[key] for key in chosen.values()}):
        with _opened(shard) as (keys, get):
            tensors |= {name: get(key) for name, key in chosen.items() if shards[key] == shard and key in keys}
    if not tensors:
        raise ValueError(f"{path}: holds no tensor named {' or '.join(p + '*' for p in prefixes)}, nor any of "
                         f"{', '.join(sorted(names)[:3])}, ...")
    return tensors


def fill(module: M, tensors: Mapping[str, Tensor], path: str | PathLike[str], *, dtype: torch.dtype | None,
         device: torch.device | str | None) -> M:
    """``module``, made on the meta device, in evaluation mode with copies of ``tensors`` as its weights.

    ``dtype`` None keeps that of the checkpoint's first weight, for all of them; ``device`` None is the CPU.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message names all of them.
    """
    expected = module.state_dict()
    faults = [f"missing: {name}" for name in expected if name not in tensors]
    faults += [f"unexpected: {name}" for name in tensors if name not in expected]
    faults += [f"misshapen: {name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}"
               for name, tensor in expected.items() if name in tensors and tensors[name].shape != tensor.shape]
    if faults:
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(faults)}")
    dtype = next(tensors[n].dtype for n, _ in module.named_parameters()) if dtype is None else dtype
    copies = {name: tensor.to(device or "cpu", dtype if tensor.is_floating_point() else None, copy=True)
              for name, tensor in tensors.items()}
    module.load_state_dict(copies, assign=True)
    return module.eval()


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for name in _FOLDER:
        if (path / name).is_file():
            return path / name
    files = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "no weight file"
        raise ValueError(f"{path}: expected {' or '.join(_FOLDER)}, or a single weight file, got {found}")
    return files[0]


def _select(keys: Iterable[str], prefixes: tuple[str, ...], names: set[str]) -> dict[str, str]:
    """From the names asked for to the names in the file; the first prefix that has one wins."""
    keys = list(keys)
    chosen: dict[str, str] = {}
    for prefix in prefixes:
        for key in keys:
            if key.startswith(prefix):
                chosen.setdefault(key.removeprefix(prefix), key)
    if chosen or names.isdisjoint(keys):
        return chosen
    return {key: key for key in keys}


def _shards(file: Path) -> dict[str, Path]:
    """Every tensor of a checkpoint, by name, with the file that holds it."""
    if not file.name.endswith(_INDEX):
        with _opened(file) as (keys, _):
            return dict.fromkeys(keys, file)
    try:
        return {key: file.parent / shard for key, shard in json.loads(file.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the index of a sharded checkpoint ({error!r})") from error


def _opened(file: Path) -> AbstractContextManager[_Opened]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: a shard of the checkpoint is missing")
    return _opened_safetensors(file) if file.suffix == ".safetensors" else _opened_torch(file)


@contextmanager
def _opened_safetensors(file: Path) -> Iterator[_Opened]:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{file}: needs safetensors: pip install 'panda-kernels[video]' ({error})") from error
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            yield set(opened.keys()), opened.get_tensor
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file, or damaged ({error})") from error


@contextmanager
def _opened_torch(file: Path) -> Iterator[_Opened]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{file}: not a file of tensors that torch can map ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a state dict, got {type(content).__name__}")
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    yield set(tensors), tensors.__getitem__
