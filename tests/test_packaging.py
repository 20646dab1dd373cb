"""What an installation holds, with and without a compiler, in every way of installing; and what importing it costs.

The compiler is a stand-in that writes a mark where an object or library was asked for: setup.py is tested here, the
extension by every other test.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import panda_kernels

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import pathlib, sys
if "--version" in sys.argv:
    print("stand-in 1.0")
else:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_text("compiled")
"""
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
SHIPPED = [file.stem for file in (ROOT / "panda_kernels" / "tuning" / "devices").glob("*.json")]
# Fails the import of what only extras bring, and of what would be slow to import for everyone.
IMPORT = """
import sys, torch
wanted = set()
class Finder:
    def find_spec(self, name, path=None, target=None):
        wanted.add(name.partition(".")[0])
sys.meta_path.insert(0, Finder())
read = []
sys.addaudithook(lambda event, args: read.append(str(args[0])) if event == "open" else None)
import panda_kernels, panda_kernels.nn
print([file for file in read if "panda_kernels" in file and not file.endswith((".py", ".pyc"))
       and "__pycache__" not in file])
print(sorted(wanted & set("av PIL safetensors tqdm triton matplotlib transformers timm python_ref".split())))
print(torch.cuda.is_initialized(), hasattr(torch.ops.panda_kernels_cpu, "isa"))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the package is built from, as git would check it out."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
    for name in ("panda_kernels", "python_ref", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "compiler.py").write_text(STAND_IN)
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\nexec {sys.executable} {folder / "compiler.py"} "$@"\n')
    nvcc.chmod(0o755)
    return folder


def run(checkout: Path, *arguments: str, compiler: bool = True, **variables: str) -> str:
    """What python says to these arguments in the checkout, its last line."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PANDA_KERNELS_")}
    environment |= {"CXX": f"{sys.executable} compiler.py", "CUDA_HOME": str(checkout / "cuda")} if compiler else {
        "CXX": "/nonexistent/compiler", "CUDA_HOME": "/nonexistent/cuda"}
    environment |= variables
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


def build(checkout: Path, compiler: bool = True, **variables: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(checkout / run(checkout, "-c", BUILD, "build_wheel", ".", compiler=compiler, **variables))


def build_info(wheel: zipfile.ZipFile) -> dict[str, str]:
    return json.loads(wheel.read("panda_kernels/_build.json"))


def test_wheel_holds_the_package_and_the_extension(checkout: Path) -> None:
    (checkout / "panda_kernels" / "tuning" / "devices" / "a-device.json").write_text("{}")
    with build(checkout) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = build_info(wheel)
        assert info["compiler"] == info["cuda_compiler"] == "stand-in 1.0"
        assert info["cuda_targets"] == "sm_80 sm_90a sm_100a sm_120"
        assert re.fullmatch("[0-9a-f]{16}", info["sources"])
    modules = {str(file.relative_to(ROOT)) for room in ("panda_kernels", "python_ref")
               for file in (ROOT / room).rglob("*.py")}
    settings = {f"panda_kernels/tuning/devices/{name}.json" for name in ("a-device", *SHIPPED)}
    built = {f"panda_kernels/{name}" for name in ("_cpu.so", "_cuda.so", "_build.json")}
    assert held == modules | settings | built
    assert re.fullmatch(r".*-py3-none-(?!any)\w+\.whl", wheel.filename or "")


def test_without_a_compiler_the_wheel_holds_the_reason_and_nothing_stale(checkout: Path, tmp_path: Path) -> None:
    run(checkout, "setup.py", "-q", "build_ext", "--inplace")
    build(checkout).close()
    with build(checkout, compiler=False) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        assert "/nonexistent/compiler" in build_info(wheel)["error"]
        assert "no nvcc in /nonexistent/cuda/bin" in build_info(wheel)["cuda_error"]
        wheel.extractall(tmp_path / "installed")
    code = "from panda_kernels import backends; print(backends.status())"
    said = run(tmp_path / "installed", "-c", code)
    assert "extension is missing: not built" in said
    assert "/nonexistent/compiler" in said
    assert "'torch': None" in said


def test_the_extension_can_be_left_out_or_required(checkout: Path) -> None:
    with build(checkout, PANDA_KERNELS_BUILD="0") as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]
        assert "PANDA_KERNELS_BUILD=0" in build_info(wheel)["error"]
    with build(checkout, PANDA_KERNELS_CUDA="0") as wheel:
        assert "panda_kernels/_cuda.so" not in wheel.namelist() and "panda_kernels/_cpu.so" in wheel.namelist()
        assert "PANDA_KERNELS_CUDA=0" in build_info(wheel)["cuda_error"]
    for wanted in ({"PANDA_KERNELS_BUILD": "require"}, {"PANDA_KERNELS_CUDA": "require"}):
        with pytest.raises(subprocess.CalledProcessError):
            build(checkout, compiler=False, **wanted)


@pytest.mark.parametrize("how", [("setup.py", "-q", "build_ext", "--inplace"), ("-c", BUILD, "build_editable", ".")],
                         ids=["inplace", "editable"])
def test_in_place_all_files_are_beside_the_package_and_follow_the_last_build(checkout: Path, how: tuple) -> None:
    package = checkout / "panda_kernels"
    run(checkout, *how)
    assert (package / "_cpu.so").read_text() == (package / "_cuda.so").read_text() == "compiled"
    assert json.loads((package / "_build.json").read_text())["compiler"] == "stand-in 1.0"
    run(checkout, *how, compiler=False)
    assert not list(package.glob("*.so"))
    assert "/nonexistent/compiler" in json.loads((package / "_build.json").read_text())["error"]


def test_sdist_holds_what_a_build_needs(checkout: Path) -> None:
    archive = run(checkout, "-c", BUILD, "build_sdist", ".")
    shutil.unpack_archive(checkout / archive, checkout / "unpacked")
    unpacked = checkout / "unpacked" / archive.removesuffix(".tar.gz")
    sources = {file.relative_to(checkout) for file in (checkout / "csrc").rglob("*.*")}
    assert sources <= {file.relative_to(unpacked) for file in unpacked.rglob("*")}


def test_metadata(checkout: Path) -> None:
    with build(checkout, PANDA_KERNELS_BUILD="0") as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_string(wheel.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in wheel.namelist()
    assert metadata["Version"] == panda_kernels.__version__
    requirements = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert {re.split(r"[^\w-]", r)[0] for r in requirements} == {"torch", "numpy"}
    assert set(metadata.get_all("Provides-Extra", [])) == {"triton", "video", "flash", "bench", "dev"}


def test_import_takes_no_extra_and_starts_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "False False"]
