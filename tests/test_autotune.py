"""``panda-kernels autotune``: what it times, what it keeps, and what it says."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from panda_kernels import backends, cli
from panda_kernels.ops import SPECS
from panda_kernels.spec import Tolerance
from panda_kernels.tuning import Space, autotune, choose, identity, lookup, store, timer
from panda_kernels.tuning.cases import Case
from panda_kernels.tuning.store import Entry
from panda_kernels.verify import arguments

SPACE = Space("cpu.made_up", rows=(1, 2, 4), columns=(1, 2))
HERE = torch.zeros(1)


@dataclass(frozen=True)
class Config:
    rows: int = 1
    columns: int = 1


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PANDA_KERNELS_CACHE", str(tmp_path / "cache"))
    lookup.forget()
    yield
    lookup.forget()


def saved() -> list[Entry]:
    return [entry for file in store.cache_folder().glob("*.json") for entry in store.load(file)]


class Op:
    """Asks for a config; each has its result and, in turns of a made-up clock, its seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Config], float],
                 result: Callable[[Config], float] = lambda config: 1.0) -> None:
        self.seconds, self.result, self.clock = seconds, result, 0.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.clock)
        monkeypatch.setattr(identity, "device_of", lambda backend, device: {"name": "whatever"})

    def call(self) -> list[Tensor]:
        config = choose(SPACE, Config(), HERE, C=8)
        self.clock += self.seconds(config)
        return [torch.tensor([self.result(config)])]

    def tuned(self) -> autotune.Result:
        case = Case("made up", self.call, lambda: [torch.ones(1, dtype=torch.float64)], torch.float32, Tolerance(),
                    False)
        work = autotune.work_of([case])
        [(point, found)] = work.items()
        with lookup.observed() as session:
            return autotune.tune(session, point, found.heuristic, found.cases)


def test_the_fastest_is_kept_with_its_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {Config(rows=4): 0.08, Config(rows=2, columns=2): 0.09}
    result = Op(monkeypatch, lambda config: seconds.get(config, 0.1)).tuned()
    assert result.best == Config(rows=4) and result.gain == pytest.approx(0.25) and result.tried == 5
    assert result.entry().config == {"rows": 4, "columns": 1} and result.entry().shape == {"C": 8}
    assert result.line()[-2:] == ("+25.0%", "rows 1 -> 4")


def test_a_gain_within_the_noise_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = iter(range(10**6))
    result = Op(monkeypatch, lambda config: 0.1 + 0.03 * (next(noise) * 7919 % 11) / 11).tuned()
    assert result.best is None and result.line()[-1] == "as the heuristic has it"
    assert autotune.gained([1.0] * 20, [0.985] * 20) is None
    assert autotune.gained([1.0] * 20, [0.8] * 12 + [1.1] * 8) is None
    assert autotune.gained([1.0] * 20, [0.8] * 16 + [1.1] * 4) == pytest.approx(0.25)


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def result(config: Config) -> float:
        if config.columns == 2:
            raise MemoryError
        return 1.0 + 1e-3 * (config.rows == 4)

    found = Op(monkeypatch, lambda config: 0.1 / config.rows, result).tuned()
    assert found.best == Config(rows=2) and found.tried == 1
    assert dict(found.dropped) == {"raised MemoryError": 3, "inexact": 1}
    assert found.line()[3] == "1; 1 inexact; 3 raised MemoryError"


def test_all_candidates_and_the_heuristic_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = timer.interleaved(calls, 0.0, timer.wall_clock, least=4)
    assert "".join(order) == "abccba" * 2 and [len(s) for s in samples.values()] == [4, 4, 4]


def test_the_compiler_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    resources = import_module("panda_kernels.triton.resources")
    kernel = import_module("panda_kernels.triton.depthwise_conv3d")
    row = resources.Row("", "bf16", "", "sm_90", 99, 0, 0, 1, 1, "none")

    def compile_for(launch: Any, target: str) -> Any:
        assert launch.name == "depthwise_conv3d.stencil" and target == "sm_90"
        return replace(row, spills=launch.config.rows == 8, shared_memory=launch.config.block_w << 13)

    monkeypatch.setattr(resources, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(resources, "compile_for", compile_for)
    x, taps = torch.zeros(1, 1, 2, 2, 64, device="meta"), torch.zeros(27, 64, device="meta")

    def call() -> list[Tensor]:
        kernel.parameter_gradients(x, x, (3, 3, 3))  # another kernel, which is none of this point's business
        return [kernel.convolve(x, taps, None, (3, 3, 3), mirrored=False, residual=False)]

    with lookup.observed() as session, import_module("panda_kernels.triton._launch").recorded():
        call()
        [point] = [p for p in session.seen if p.space is kernel.STENCIL]
        reasons = {}
        for config in kernel.STENCIL.candidates(session.seen[point]):
            session.wanted[point] = config
            case = Case("", call, lambda: [], torch.float32, Tolerance(), False)
            reasons[config.rows, config.block_w] = autotune._over_limits(point, config, [case])
    expected = {(rows, w): "spill registers" if rows == 8 else "exceed shared memory" if w == 32 else ""
                for rows in (2, 4, 8) for w in (8, 16, 32)}
    assert reasons == expected


# The command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    if backends.load_error("cpu"):
        pytest.skip("no compiled extension")
    monkeypatch.setattr(autotune, "SECONDS", 1e-3)
    monkeypatch.setattr(autotune, "DUEL", 3)
    for op, values in {"depthwise_conv3d": {"stencil_rows": (2, 8), "staged_channels": (64, 256)},
                       "stab_tower": {"band_tokens": (1, 2048)}}.items():
        monkeypatch.setattr(import_module(f"panda_kernels.backends.cpu.{op}").SPACE, "values", values)


def test_the_command_measures_saves_and_is_found(quick: None, monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(autotune, "gained", lambda heuristic, candidate: 0.5)
    module = import_module("panda_kernels.backends.cpu.depthwise_conv3d")
    inputs = SPECS["depthwise_conv3d"].inputs({"shape": (2, 3, 5, 4, 16)}, torch.float32)
    before = module.fwd(*arguments(SPECS["depthwise_conv3d"], inputs))
    command = ["autotune", "--ops", "depthwise_conv3d", "--shapes", "one_frame", "--device", "cpu"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert said.count("+50.0%") == 4 and "4 of 4 kernels gained" in said
    kept = saved()
    assert {(e.dtype, e.shape["direction"]) for e in kept} == {
        (dtype, direction) for dtype in ("float32", "bfloat16") for direction in ("fwd", "bwd")}
    [of_this] = [e for e in kept if e.dtype == "float32" and e.shape["direction"] == "fwd"]
    tuning = import_module("panda_kernels.backends.cpu._tuning")
    assert torch.equal(module.fwd(*arguments(SPECS["depthwise_conv3d"], inputs)), before)
    assert vars(tuning._thread.tuning) == vars(tuning.DEFAULT) | of_this.config

    monkeypatch.setattr(autotune, "gained", lambda heuristic, candidate: None)
    assert cli.main(command) == 0
    assert "0 of 4 kernels gained" in capsys.readouterr().out
    assert saved() == [], "what is no gain any more is taken out"


def test_the_tower_is_tuned_too(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["autotune", "--ops", "tower", "--shapes", "small", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("cpu.stab_tower") == 2 and "inexact" not in said and "raised" not in said


@pytest.mark.parametrize(("arguments", "said"), [
    (["--ops", "attention"], "--ops: expected some of .*depthwise_conv3d.*got attention"),
    (["--ops", "token_mlp", "--shapes", "giant"], "--shapes: expected some of .*clips2.*got giant"),
    (["--device", "meta"], "--device: expected cpu or a GPU, got meta")])
def test_what_cannot_be_done_is_said(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["autotune", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error
