"""``panda-kernels verify`` passes on a sound installation and names what is broken in another."""
from __future__ import annotations

import json
import re

import pytest
import torch

from panda_kernels import backends, cli, verify
from panda_kernels.ops import SPECS

OP = "depthwise_conv3d"
DTYPES = ("float32", "bfloat16")


@pytest.fixture
def torch_module():
    return backends._op_module("torch", OP)


def test_everything_is_within_tolerance(tmp_path, capsys):
    report = tmp_path / "report.json"
    assert cli.main(["verify", "--json", str(report)]) == 0, capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["ok"]
    checked = {(row["op"], row["dtype"], row["direction"]) for row in found["comparisons"] if row["backend"] == "torch"}
    expected = {(op, dtype, "forward") for op in (*SPECS, verify.TOWER) for dtype in DTYPES}
    assert expected <= checked
    assert {(verify.TOWER, dtype, "backward") for dtype in DTYPES} <= checked
    assert {row["backend"] for row in found["comparisons"]} == {n for n, why in backends.status().items() if not why}


def test_wrong_forward_is_named(torch_module, monkeypatch, capsys):
    sound = torch_module.fwd
    monkeypatch.setattr(torch_module, "fwd", lambda *arguments: 1.05 * sound(*arguments))
    assert cli.main(["verify", "--ops", OP]) == 1
    out = capsys.readouterr().out
    for dtype in DTYPES:
        assert f"WRONG: {OP} by torch in {dtype}, forward of stab, result" in out
    assert f"WRONG: {OP} by cpu" not in out


def test_wrong_gradient_is_named(torch_module, monkeypatch, capsys):
    sound = torch_module.bwd

    def without_bias(*arguments, needs):
        grad_x, grad_weight, grad_bias = sound(*arguments, needs=needs)
        return [grad_x, grad_weight, None if grad_bias is None else torch.zeros_like(grad_bias)]

    monkeypatch.setattr(torch_module, "bwd", without_bias)
    assert cli.main(["verify", "--ops", OP]) == 1
    out = capsys.readouterr().out
    assert f"WRONG: {OP} by torch in float32, backward of stab, bias" in out
    assert "of stab, weight" not in out


def test_backend_that_raises_is_a_fault_and_the_rest_is_still_checked(torch_module, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("bad launch")

    monkeypatch.setattr(torch_module, "fwd", broken)
    assert cli.main(["verify", "--ops", OP, "assemble_tokens"]) == 1
    out = capsys.readouterr().out
    assert f"WRONG: {OP} by torch in float32, forward of stab, -: RuntimeError: bad launch" in out
    assert "WRONG: assemble_tokens" not in out
    assert re.search(r"assemble_tokens +torch +float32 +forward .*ok$", out, re.MULTILINE)


def test_wrong_tower_is_named(monkeypatch, capsys):
    sound = verify.STAB.forward

    def forgets_the_ragged_frame(self, pixels, *arguments, **named):
        return sound(self, torch.cat([pixels[:, :, :3], torch.ones_like(pixels[:, :, 3:])], 2), *arguments, **named)

    monkeypatch.setattr(verify.STAB, "forward", forgets_the_ragged_frame)
    assert cli.main(["verify", "--ops", verify.TOWER]) == 1
    assert "WRONG: tower by torch in float32, forward of clip, result: expected shape" in capsys.readouterr().out


def test_reason_of_an_absent_backend_is_shown(monkeypatch, capsys):
    reasons = {name: None if name == "torch" else "no compiler" for name in backends.NAMES}
    monkeypatch.setattr(backends, "status", lambda: reasons)
    assert cli.main(["verify", "--ops", "assemble_tokens"]) == 0
    assert "not checked: cpu backend: no compiler" in capsys.readouterr().out


def test_unknown_op_is_refused(capsys):
    assert cli.main(["verify", "--ops", "depthwise"]) == 2
    assert OP in capsys.readouterr().err


def test_no_stage_of_the_seeded_tower_is_idle():
    """A branch whose output is zero would hide faults in it."""
    tower = verify.seeded_tower(32)
    pixels = verify._tower_cases(56)["clip"]
    before = verify._run_tower(tower, pixels, verify.FORWARD).result
    for name, parameter in tower.named_parameters():
        if name.startswith("lmhra2."):
            continue
        kept = parameter.clone()
        with torch.no_grad():
            parameter.mul_(1.5)
            changed = verify._run_tower(tower, pixels, verify.FORWARD).result
            parameter.copy_(kept)
        assert float((changed - before).norm() / before.norm()) > 1e-6, name


def test_broken_yardstick_is_not_a_licence():
    """Where torch itself is wrong, the limit is that of a sound result."""
    exact = verify._Outcome(torch.ones(4, dtype=torch.float64), {})
    nonsense = verify._Outcome(-torch.ones(4), {})
    label = ("op", "torch", "float32", verify.FORWARD, "case")
    (row,) = verify._compare(label, lambda: nonsense, nonsense, exact, verify.Tolerance(), torch.float32)
    assert row.torch_error == 2.0 and not row.ok
