"""When the Triton backend serves, and what it says when it does not."""
from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from op_cases import make

import panda_kernels
from panda_kernels import backends
from panda_kernels.backends import triton as backend

INPUTS = list(make("depthwise_conv3d", "one_frame", torch.float32).values())


@pytest.mark.parametrize(("gpu", "package", "reason"), [
    (False, True, "torch sees no GPU"), (True, False, "triton is not installed"), (True, True, None)])
def test_why_it_is_absent(monkeypatch: pytest.MonkeyPatch, gpu: bool, package: bool, reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backend, "find_spec", lambda name: object() if package else None)
    assert backend.load_error.__wrapped__() == reason


def test_what_it_refuses() -> None:
    assert backend.refusals(INPUTS) == ["tensors on cpu"]
    assert backend.refusals([INPUTS[0].double()]) == ["tensors on cpu", "dtype torch.float64"]


@pytest.mark.gpu
def test_it_serves_a_gpu_before_the_others() -> None:
    inputs = [t.cuda() if isinstance(t, torch.Tensor) else t for t in INPUTS]
    assert backends.choose("depthwise_conv3d", "fwd", "auto", inputs).__module__ == \
        "panda_kernels.backends.triton.depthwise_conv3d"


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU says")
def test_named_without_a_gpu_it_says_why() -> None:
    x, weight, bias, _ = INPUTS
    with pytest.raises(backends.BackendError, match="triton: torch sees no GPU"):
        panda_kernels.depthwise_conv3d(x, weight, bias, backend="triton")


def test_a_call_on_the_cpu_does_not_import_triton() -> None:
    script = """
import sys, torch, panda_kernels
x = torch.zeros(1, 1, 2, 2, 8)
panda_kernels.depthwise_conv3d(x, torch.zeros(8, 1, 3, 3, 3))
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
