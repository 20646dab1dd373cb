"""Files of measured settings, one a device: the user's cache, and what the package ships.

Both are ``{"format": 1, "entries": [...]}``, an :class:`Entry` each, so that a file of the cache can be shipped as it
is. A file that is not this is ignored, with one warning.
"""
from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .space import Value

FORMAT = 1
SHIPPED = Path(__file__).parent / "devices"
_warned: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The best config measured for a kernel's calls of one dtype and shape, and what it gained over the heuristic."""

    kernel: str
    device: dict[str, Value]
    versions: dict[str, str]
    content: str
    dtype: str
    shape: dict[str, Value]
    config: dict[str, int]
    gain: float

    def key(self) -> str:
        known = {name: value for name, value in asdict(self).items() if name not in ("config", "gain")}
        return json.dumps(known, sort_keys=True)


def cache_folder() -> Path:
    """PANDA_KERNELS_CACHE, or ``panda_kernels`` in XDG_CACHE_HOME or ``~/.cache``."""
    if folder := os.environ.get("PANDA_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "panda_kernels"


def file_of(folder: Path, device_name: str) -> Path:
    return folder / f"{re.sub('[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def load(file: Path) -> list[Entry]:
    """The entries of a file; none if there is no file, or if it is not one of ours, which is said once a process."""
    try:
        return _parse(file.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warn_once(file, f"is ignored: {error}")
        return []


def warn_once(file: Path, message: str) -> None:
    if file not in _warned:
        _warned.add(file)
        warnings.warn(f"panda_kernels: {file} {message}", RuntimeWarning, stacklevel=2)


def _parse(text: str) -> list[Entry]:
    """Raises ValueError (which json's errors are) on anything but what :func:`update` writes."""
    page = json.loads(text)
    if not isinstance(page, dict) or page.get("format") != FORMAT or not isinstance(page.get("entries"), list):
        raise ValueError(f"expected settings in format {FORMAT}")
    return [_entry(values) for values in page["entries"]]


_TYPES = {"kernel": str, "device": dict, "versions": dict, "content": str, "dtype": str, "shape": dict,
          "config": dict, "gain": float}
assert list(_TYPES) == [f.name for f in fields(Entry)]


def _entry(values: object) -> Entry:
    if not isinstance(values, dict) or values.keys() != _TYPES.keys():
        raise ValueError("an entry without its fields, or with others")
    for name, expected in _TYPES.items():
        if not isinstance(values[name], expected):
            raise ValueError(f"an entry whose {name} is no {expected.__name__}")
    if not all(type(value) is int for value in values["config"].values()):
        raise ValueError("an entry whose config holds something else than integers")
    return Entry(**values)


def update(file: Path, found: Collection[Entry], dropped: Collection[str] = ()) -> None:
    """Put entries into a file and take out those whose keys are ``dropped``; others, also those that another process
    wrote meanwhile, stay. Readers see the old file or the new one.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.with_suffix(".lock")):
        entries = {entry.key(): entry for entry in load(file)} | {entry.key(): entry for entry in found}
        kept = [asdict(entries[key]) for key in sorted(entries.keys() - set(dropped))]
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as unfinished:
            try:
                json.dump({"format": FORMAT, "entries": kept}, unfinished, indent=1)
                unfinished.close()
                os.replace(unfinished.name, file)
            except BaseException:
                os.unlink(unfinished.name)
                raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it."""
    import fcntl

    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
