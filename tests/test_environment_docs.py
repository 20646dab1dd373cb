"""docs/environment.md names the environment variables that the code reads, all of them and no other."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".cpp", ".h", ".inc")
READS = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["']([A-Z_]+)["']|"([A-Z_]+)" (?:not )?in os\.environ""")


def test_every_variable_is_documented() -> None:
    folders = ("panda_kernels", "python_ref", "csrc", "tests", "bench", "examples")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix in SUFFIXES]
    read = {a or b for file in (ROOT / "setup.py", *files) for a, b in READS.findall(file.read_text())}
    rows = re.findall(r"^\| (`[A-Z_`, ]+) \|", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE)
    documented = {name.strip("`") for row in rows for name in row.split(", ")}
    assert read == documented
