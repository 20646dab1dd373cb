"""docs/cuda_resources.md and the extension as built here: the same kernels and targets, all within the limits."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from panda_kernels.backends import cpu, cuda
from panda_kernels.backends.cuda import resources
from panda_kernels.backends.cuda.resources import Row

pytest.importorskip("triton")  # brings the tools that read the extension
ROOT = Path(__file__).resolve().parent.parent
COMMITTED = resources.parse((ROOT / "docs" / "cuda_resources.md").read_text())


def key(row: Row) -> tuple[str, str, str, str]:
    return row.kernel, row.dtype, row.target, row.products


@pytest.mark.skipif(not cuda.LIBRARY.exists(), reason=f"no extension: {cpu.build_info().get('cuda_error')}")
def test_the_extension_is_as_the_page_says_and_within_the_limits() -> None:
    built = resources.rows()
    assert {key(row) for row in built} == {key(row) for row in COMMITTED}, "write the page anew"
    assert not [reason for row in (*built, *COMMITTED) for reason in row.violations()]


def test_every_kernel_has_a_claim() -> None:
    sources = "".join(file.read_text() for file in (ROOT / "csrc" / "cuda").glob("*.cu"))
    kernels = re.findall(r"__global__ void(?: __launch_bounds__\([^)]*\))? (\w+)\(", sources)
    assert sorted(kernels) == sorted(resources.CLAIMS)


SOUND = Row("convolve", "bf16", "sm_90a", 240, 0, 0, 10, 10, "none", 0)
FAULTS = [({"spills": 2}, "2 spills"), ({"registers": 257}, "257 registers, too many for 2 blocks"),
          ({"wide_loads": 4}, "only 4 of 10 loads")]


@pytest.mark.parametrize(("change", "reason"), FAULTS)
def test_limits(change: dict[str, int], reason: str) -> None:
    assert not SOUND.violations()
    [found] = replace(SOUND, **change).violations()
    assert reason in found and found.startswith("convolve bf16 sm_90a: ")


def test_what_is_claimed_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources.CLAIMS, "convolve", resources.Claim(128, 2, tensor_cores=True, async_copies=True))
    assert len(SOUND.violations()) == 2
    assert not replace(SOUND, products="HMMA", async_copies=1).violations()


def test_names() -> None:
    assert resources._name("_ZN5panda4cuda20_GLOBAL__N__ab_12348convolveINS0_8bfloat16EEEvNS0_7StencilEi") == (
        "convolve", "bf16")
    assert resources._name("_ZN5panda4cuda20_GLOBAL__N__ab_12348gradientIfEEvNS0_15StencilGradientE") == (
        "gradient", "fp32")
    with pytest.raises(ValueError, match="no kernel of"):
        resources._name("_Z5otherv")


def test_a_page_is_read_as_it_was_written() -> None:
    assert resources.parse(resources.render([SOUND, replace(SOUND, spills=1)]))[1].spills == 1
