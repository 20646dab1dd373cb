"""Builds the CPU extension, ``panda_kernels/_cpu.so``: the core, one object a SIMD tier, behind a stable-ABI binding.

It links the torch that is already installed, whose headers are enough and whose version does not matter from 2.11 on.
Where there is no compiler or no torch to build against, the package installs without it and
``panda_kernels/_build.json`` keeps the reason for ``panda-kernels info``. PANDA_KERNELS_BUILD=require turns that into
an error, PANDA_KERNELS_BUILD=0 skips the extension.
"""
from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
BINDING = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
GIB_A_JOB = 1.0


def load_sources() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sources", ROOT / "csrc" / "core" / "sources.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_folder() -> Path:
    """The installed torch; an isolated build hides it from imports, but it is where this Python's packages are."""
    found = importlib.util.find_spec("torch")
    folders = [Path(found.origin).parent] if found and found.origin else []
    folders += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            return folder
    raise RuntimeError("no torch >= 2.11 was installed to build against; install torch first, then this package again")


def digest() -> str:
    """Of all that is compiled: settings that were tuned for other sources are not taken for these."""
    files = sorted(file for file in (ROOT / "csrc").rglob("*") if file.suffix in (".cpp", ".h", ".inc", ".py"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()[:16]


def version_of(torch: Path) -> str:
    found = re.search(r"^__version__ = '(.+)'", (torch / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else "unknown"


def job_count() -> int:
    if "MAX_JOBS" in os.environ:
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(os.cpu_count() or 1, int(memory / GIB_A_JOB)))


class BuildExtension(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"  # no Python ABI in it

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("PANDA_KERNELS_BUILD", "auto")
        info: dict[str, object] = {"error": "left out by PANDA_KERNELS_BUILD=0"}
        if wanted != "0":
            try:
                info = self.compile(target)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                if wanted == "require":
                    raise
                output = getattr(error, "stderr", None) or error
                info = {"error": f"not built: {output}".strip()[-2000:]}
                print(f"panda_kernels: the cpu extension was {info['error']}", file=sys.stderr)
        if "error" in info:
            target.unlink(missing_ok=True)  # never one of an earlier build
        (target.parent / "_build.json").write_text(json.dumps(info, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Where the package is used in place: the extension, if there is one, and what is known of its build."""
        built, package = Path(self.build_lib) / "panda_kernels", ROOT / "panda_kernels"
        for name in ("_cpu.so", "_build.json"):
            (package / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copyfile(built / name, package / name)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "panda_kernels" / name) for name in ("_cpu.so", "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        package = ROOT / "panda_kernels"
        return {output: str(package / Path(output).name) for output in self.get_outputs()}

    def compile(self, target: Path) -> dict[str, object]:
        torch = torch_folder()
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        sources, temp = load_sources(), Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        jobs = [*sources.jobs(ROOT / "csrc" / "core"),
                sources.Job(ROOT / "csrc" / "bindings.cpp", "bindings", [*BINDING, *includes])]

        def run(*command: str) -> None:
            subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, flags = job
            built = str(temp / f"{name}.o")
            run(*compiler, *sources.COMMON, f"-I{ROOT / 'csrc'}", *flags, "-c", str(source), "-o", built)
            return built

        with ThreadPoolExecutor(job_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run(*compiler, "-shared", "-s", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10")
        version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
        return {"compiler": version.splitlines()[0], "torch_headers": version_of(torch), "sources": digest()}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("panda_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
