"""What a bug report needs: versions, machine, environment, and every backend with the reason it is not there."""
from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("numpy", "triton", "av", "torchcodec", "pillow", "safetensors", "tqdm", "transformers", "timm")
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_fp16", "sve", "bf16")


def collect() -> dict[str, dict[str, str]]:
    """Sections of names and values, all strings. Starts no CUDA context."""
    return {
        "versions": _versions(),
        "machine": _machine(),
        "extension": _extension(),
        "gpu": _gpu(),
        "backends": _backends(),
        "tuning": _tuning(),
        "environment": {n: v for n, v in sorted(os.environ.items()) if n.startswith(("PANDA_KERNELS_", "TRITON_"))},
    }


def render(sections: dict[str, dict[str, str]]) -> str:
    """The sections as lines of text, names aligned."""
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines.append(f"{title}:")
        lines += [f"  {name:<{width}}  {value}" for name, value in section.items()] or ["  (nothing)"]
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from . import __version__

    versions = {"panda_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return versions | {name: installed(name) for name in PACKAGES}


def installed(package: str) -> str:
    """Its version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, str]:
    fields = _cpuinfo()
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu flags": " ".join(f for f in CPU_FLAGS if f in flags) or "none of those the kernels know",
        "cores": f"{os.cpu_count()} ({usable} usable)",
        "torch threads": str(torch.get_num_threads()),
        "torch isa": torch.backends.cpu.get_cpu_capability(),
    }


def cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_model() -> str:
    """Family and model as numbers, as far as the system tells: names can be those of a whole line of processors."""
    return ".".join(_cpuinfo().get(name, "") for name in ("cpu family", "model")).strip(".")


def _cpuinfo() -> dict[str, str]:
    """What the system tells of its first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _extension() -> dict[str, str]:
    """What the compiled extension was built with, and the instructions it uses here."""
    from .backends import cpu, load_error

    return cpu.build_info() | {"instructions": "none" if load_error("cpu") else cpu.isa()}


def _gpu() -> dict[str, str]:
    # torch counts devices without a context; names would need one, so the driver's own tool is asked.
    gpus = {"torch built for": f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"}
    gpus["available"] = f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no"
    tool = shutil.which("nvidia-smi")
    if tool:
        query = [tool, "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
        listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        gpus |= {f"device {i}": line.strip() for i, line in enumerate(listing.splitlines())}
    return gpus


def _backends() -> dict[str, str]:
    from .backends import status

    return {name: reason or "there" for name, reason in status().items()}


def _tuning() -> dict[str, str]:
    """Where measured settings are looked for. Which of them hold on a GPU only its name tells, so only a context."""
    from .backends import load_error
    from .tuning import lookup, store

    folders = {"cache": store.cache_folder(), "shipped": store.SHIPPED}
    found = {kind: ", ".join(sorted(file.name for file in folder.glob("*.json"))) for kind, folder in folders.items()}
    lines = {kind: f"{folder}: {found[kind] or 'no files'}" for kind, folder in folders.items()}
    if load_error("cpu") is None:
        lines["in use on the cpu"] = "{} settings of the cache, {} shipped".format(*lookup.in_use("cpu", "cpu"))
    return lines


def main(as_json: bool = False) -> int:
    """Print everything; as JSON for a program to read."""
    sections = collect()
    print(json.dumps(sections, indent=2) if as_json else render(sections))
    return 0
