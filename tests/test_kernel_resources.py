"""docs/kernel_resources.md: every row within the limits; every launch compiled anew for a target, as the page says."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from panda_kernels.triton import resources
from panda_kernels.triton.resources import Row

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "kernel_resources.md").read_text()
COMMITTED = resources.parse(PAGE)


def fingerprint(page: str) -> str:
    [line] = [line for line in page.splitlines() if line.startswith(resources.SOURCES)]
    return line


def test_compiled_anew(tmp_path: Path) -> None:
    """The limits hold, with whichever Triton is installed; the page is of these kernels, and has every launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "panda_kernels.triton.resources", str(tmp_path / "page.md"), "--sample"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    page = (tmp_path / "page.md").read_text()
    table = resources.parse(page)
    assert fingerprint(page) == fingerprint(PAGE), "write the page anew"
    assert {row.key() for row in table} <= {row.key() for row in COMMITTED}
    assert {row.key()[:3] for row in table} == {row.key()[:3] for row in COMMITTED}


def test_every_row_is_within_the_limits() -> None:
    assert not [reason for row in COMMITTED for reason in row.violations()]


def test_every_kernel_is_in_the_table() -> None:
    kernels = {f"{file.stem}.{name}" for file in (ROOT / "panda_kernels" / "triton").glob("[a-z]*.py")
               for name in re.findall(r"@triton\.jit\(do_not_specialize.*\ndef (\w+)", file.read_text())}
    assert kernels == {row.kernel for row in COMMITTED}


SOUND = Row("op.kernel", "bf16", "C=1024 threads=128", "sm_90", 200, 0, 0, 10, 10, "none")
FAULTS = [({"spills": 2}, "2 spills"), ({"shared_memory": 233_000}, "233000 bytes of shared memory"),
          ({"target": "gfx942", "shared_memory": 66_000}, "66000 bytes of shared memory"),
          ({"product": "missing"}, "a product without tensor cores"), ({"wide_loads": 4}, "only 4 of 10 loads")]


@pytest.mark.parametrize(("change", "reason"), FAULTS)
def test_limits(change: dict[str, int | str], reason: str) -> None:
    assert not SOUND.violations()
    [found] = replace(SOUND, **change).violations()
    assert reason in found and found.startswith("op.kernel bf16 C=1024 threads=128 ")


def test_a_page_is_read_as_it_was_written() -> None:
    assert resources.parse(resources.render([SOUND, replace(SOUND, spills=1)], "3.7.1", "0"))[1].spills == 1
