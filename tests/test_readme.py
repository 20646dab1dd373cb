"""README's Python runs as it stands, except the blocks that need a released model; commands and links are right."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from panda_kernels.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_there_are_examples() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS)
def test_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == "torch.Size([584, 4096]) [8, 8]\n"


def test_commands_are_understood() -> None:
    commands = re.findall(r"^    panda-kernels (.*)$", README, re.MULTILINE)
    parsed = [build_parser().parse_args(shlex.split(command, comments=True)).command for command in commands]
    assert sorted(parsed) == ["autotune", "encode", "info", "verify"]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
