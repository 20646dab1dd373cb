"""docs/environment.md names the environment variables that the code reads, all of them and no other."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READS = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*"([A-Z_]+)"|"([A-Z_]+)" in os\.environ""")


def test_every_variable_is_documented() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "panda_kernels").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    read = {a or b for source in sources for a, b in READS.findall(source.read_text())}
    documented = set(re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    assert read == documented
