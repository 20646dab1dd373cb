"""docs/kernel_resources.md: every kernel compiled anew for every target, within the limits, as the page says."""
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
COMMITTED = resources.parse((ROOT / "docs" / "kernel_resources.md").read_text())


def test_compiled_anew(tmp_path: Path) -> None:
    """The limits hold, with whichever Triton is installed, and the rows and their instructions are the committed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "panda_kernels.triton.resources", str(tmp_path / "page.md")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    table = resources.parse((tmp_path / "page.md").read_text())
    assert [row.key() for row in table] == [row.key() for row in COMMITTED]


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
    assert resources.parse(resources.render([SOUND, replace(SOUND, spills=1)], "3.7.1"))[1].spills == 1
