"""Builds the extensions: ``panda_kernels/_cpu.so``, the core, one object a SIMD tier, and ``panda_kernels/_cuda.so``,
the CUDA kernels for every architecture they run on, each behind a stable-ABI binding.

They link the torch that is already installed, whose headers are enough and whose version does not matter from 2.11 on;
it need not be one for CUDA. Where there is no compiler, no nvcc or no torch to build against, the package installs
without them and ``panda_kernels/_build.json`` keeps the reasons for ``panda-kernels info``. PANDA_KERNELS_BUILD=require
turns that into an error for the CPU, PANDA_KERNELS_CUDA=require for CUDA; with 0 they are left out.
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
GIB_A_JOB = 1.0
CUDA_TARGETS = ("80", "90a", "100a", "120")
LIBRARIES = ("_cpu.so", "_cuda.so")


def binding(torch: Path) -> list[str]:
    return ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", f"-I{torch / 'include'}",
            f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]


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


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if not found.exists():
        raise RuntimeError(f"no nvcc in {found.parent}" if home else "no nvcc in PATH, nor in /usr/local/cuda/bin")
    return str(found)


class BuildExtension(build_ext):
    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"  # no Python ABI in it

    def build_extensions(self) -> None:
        self.build_info: dict[str, str] = {}
        super().build_extensions()
        folder = Path(self.get_ext_fullpath("panda_kernels._cpu")).parent
        (folder / "_build.json").write_text(json.dumps(self.build_info, indent=1) + "\n")

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        kind, switch, compile_it = {
            "_cpu.so": ("", "PANDA_KERNELS_BUILD", self.compile),
            "_cuda.so": ("cuda_", "PANDA_KERNELS_CUDA", self.compile_cuda),
        }[target.name]
        wanted = os.environ.get("PANDA_KERNELS_BUILD", "auto")
        if kind and wanted != "0":
            wanted = os.environ.get("PANDA_KERNELS_CUDA", "auto")
        info = {"error": f"left out by {switch}=0"}
        if wanted != "0":
            try:
                info = compile_it(target)
            except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stderr", None) or error
                if wanted == "require":
                    raise RuntimeError(output) from error
                info = {"error": f"not built: {output}".strip()[-2000:]}
                print(f"panda_kernels: {target.name} was {info['error']}", file=sys.stderr)
        if "error" in info:
            target.unlink(missing_ok=True)  # never one of an earlier build
        self.build_info |= {f"{kind}{name}": value for name, value in info.items()}

    def copy_extensions_to_source(self) -> None:
        """Where the package is used in place: the extensions that there are, and what is known of their build."""
        built, package = Path(self.build_lib) / "panda_kernels", ROOT / "panda_kernels"
        for name in (*LIBRARIES, "_build.json"):
            (package / name).unlink(missing_ok=True)
            if (built / name).exists():
                shutil.copyfile(built / name, package / name)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "panda_kernels" / name) for name in (*LIBRARIES, "_build.json")]

    def get_output_mapping(self) -> dict[str, str]:
        package = ROOT / "panda_kernels"
        return {output: str(package / Path(output).name) for output in self.get_outputs()}

    def objects(self, jobs: list[tuple[str, list[str]]]) -> list[str]:
        """Runs the commands, each given a name, that lack only ``-o`` and the object, and tells the objects."""
        temp = Path(self.build_temp)
        temp.mkdir(parents=True, exist_ok=True)

        def compile_one(job: tuple[str, list[str]]) -> str:
            name, command = job
            built = str(temp / f"{name}.o")
            run(*command, "-o", built)
            return built

        with ThreadPoolExecutor(job_count()) as pool:
            return list(pool.map(compile_one, jobs))

    def compile(self, target: Path) -> dict[str, str]:
        sources, compiler, torch = load_sources(), shlex.split(os.environ.get("CXX", "g++")), torch_folder()
        common = [*compiler, *sources.COMMON, f"-I{ROOT / 'csrc'}"]
        jobs = [(name, [*common, *flags, "-c", str(source)])
                for source, name, flags in sources.jobs(ROOT / "csrc" / "core")]
        jobs.append(("bindings", [*common, *binding(torch), "-c", str(ROOT / "csrc" / "bindings.cpp")]))
        objects = self.objects(jobs)
        run(*compiler, "-shared", "-s", "-o", str(target), *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10")
        return {"compiler": run(*compiler, "--version").splitlines()[0], "torch_headers": version_of(torch),
                "sources": digest()}

    def compile_cuda(self, target: Path) -> dict[str, str]:
        sources, compiler, torch = load_sources(), shlex.split(os.environ.get("CXX", "g++")), torch_folder()
        cuda = nvcc()
        device = [cuda, "-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden",
                  *(f"-gencode=arch=compute_{name},code=sm_{name}" for name in CUDA_TARGETS)]
        jobs = [(f"cuda_{source.stem}", [*device, "-c", str(source)])
                for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
        jobs.append(("cuda_bindings", [*compiler, *sources.COMMON, f"-I{ROOT / 'csrc'}", *binding(torch), "-c",
                                       str(ROOT / "csrc" / "cuda_bindings.cpp")]))
        objects = self.objects(jobs)
        # nvcc knows where its runtime is, which is linked in, so that the target needs a driver alone.
        run(cuda, "-shared", "-cudart", "static", "-Xcompiler", "-s", "-o", str(target), *objects,
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10")
        return {"compiler": run(cuda, "--version").splitlines()[-1],
                "targets": " ".join(f"sm_{name}" for name in CUDA_TARGETS)}


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension(f"panda_kernels.{Path(name).stem}", sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
