"""The benchmarks' own arithmetic, and that a wrong result is never recorded. No speed is asserted."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import bench_tower, half_products, machine, measure, stages, table, tower
from bench.measure import OURS
from panda_kernels.spec import Cost

PEAKS = machine.Peaks(memory_gb_s=10.0, l3_gb_s=100.0, l3_bytes=1000, gflop_s={"float32": 200.0, "bfloat16": 800.0})
LABELS = {"op": "op", "size": "size", "dtype": "float32", "backend": "torch"}
FACTS = {"device": "a processor", "device_type": "cpu", "threads": 2, "isa": "avx2", "torch": "2", "panda_kernels": "0",
         "load_before": 0.0, "commit": "0123456789", "dirty": True, "date": "2026-01-02 03:04"}
GOOD = measure.Errors(1e-7, 1.5e-7, 2e-7)


@pytest.mark.parametrize(("projected", "operations"), [(False, 51e9), (True, 142e9)])
def test_cost_is_that_of_the_specification(projected, operations):
    """Which counts W1 as a product of the tokens, where 588 pixels of a patch stand for its 1024 channels."""
    saved = 2 * 8192 * 682 * (1024 - 588)
    flops = tower.cost(tower.CASES["8 frames"], torch.float32, projected).flops
    assert flops == pytest.approx(operations - saved, rel=0.01)


def test_cost_of_a_training_step_has_no_gradient_of_the_pixels():
    case = tower.CASES["8 frames"]
    forward, step = tower.cost(case, torch.float32, False).flops, tower.training_cost(case, torch.float32).flops
    of_pixels = 2 * 8192 * 588 * (1024 + 682)
    assert step == 2 * of_pixels + 3 * (forward - of_pixels)


def test_cost_of_a_cropped_clip_is_less_and_bytes_follow_the_dtype():
    full, cropped = (tower.cost(tower.CASES[case], torch.float32, True) for case in ("1 clip", "720p clip"))
    assert cropped.flops < full.flops and cropped.bytes < full.bytes
    assert tower.cost(tower.CASES["1 clip"], torch.bfloat16, True).bytes * 2 == full.bytes


def test_the_stages_of_the_tower_are_calls_that_their_kernels_take():
    with torch.inference_mode():
        for stage in stages.stages(torch.float32):
            stage.call()


def test_widescreen_is_a_fitted_720p_frame():
    row0, row1, col0, col1 = tower.WIDESCREEN
    windows = -(-224 * 720 // (1280 * 14))
    assert (col0, col1, row1 - row0, 14 * row0) == (0, 32, 2 * windows, 2 * ((16 - windows) // 2 * 14))


def test_large_inputs_repeat_what_is_compared_with_float64(monkeypatch):
    monkeypatch.setattr(tower, "PATCH", 1)
    small = tower.Case(2).pixel_values(torch.float32)
    assert not torch.equal(small[0], small[1])
    large = tower.Case(5).pixel_values(torch.float32)
    assert torch.equal(large, small[[0, 1, 0, 1, 0]])
    eight = tower.Case(1, frames=8).pixel_values(torch.float32)
    assert torch.equal(tower.Case(1, frames=12).pixel_values(torch.float32), torch.cat([eight, eight[:, :4]], 1))


@pytest.mark.parametrize("case", [tower.Case(4), tower.Case(1, frames=16)])
@pytest.mark.parametrize("wrong", [False, True])
def test_every_clip_and_the_windows_of_a_long_one_are_compared(monkeypatch, case, wrong):
    exact = torch.randn(case.distinct.clips * case.distinct.frames * 5, 3, dtype=torch.float64)
    monkeypatch.setattr(tower, "exact_tokens", lambda *_: exact)
    monkeypatch.setattr(tower, "_reference_error", lambda *_: 1e-7)
    monkeypatch.setattr(tower.Case, "pixel_values", lambda *_: torch.zeros(1))
    given = torch.cat([exact, exact]).float()
    if wrong:
        given[-1 if case.clips > 1 else 1] += 1
    contest = tower.Contenders(torch.float32, "cpu", lambda _: given, {})
    assert (tower.errors(case, contest, False).ours > 1e-3) == wrong


def test_roofline_takes_the_slower_of_moving_and_computing():
    assert PEAKS.least_seconds(10_000, 0, "float32") == pytest.approx(1e-6)
    assert PEAKS.least_seconds(1000, 0, "float32") == pytest.approx(1e-8)
    assert PEAKS.least_seconds(10_000, 400_000, "float32") == pytest.approx(2e-6)
    assert PEAKS.least_seconds(10_000, 400_000, "bfloat16") == pytest.approx(1e-6)


def test_peaks_come_back_from_their_rows():
    assert machine.Peaks.of(PEAKS.rows(FACTS)) == PEAKS


def test_wrong_result_is_not_recorded():
    bench = measure.Bench(FACTS, PEAKS, seconds=0.0)
    calls = []
    for error in (3e-7, float("nan")):
        with pytest.raises(measure.WrongResult, match=r"op size float32 torch: relative error.*limit 2\.00e-07"):
            bench.row(LABELS, lambda: calls.append(1), {"reference": lambda: pytest.fail("timed")},
                      lambda error=error: measure.Errors(error, 1e-7, 2e-7), Cost(1, 1))
    assert len(calls) == 2 and not bench.rows


def test_row_interleaves_and_records():
    order = []
    peers = {name: lambda name=name: order.append(name) for name in ("reference", "other")}
    bench = measure.Bench(FACTS, PEAKS, seconds=0.0)
    bench.row(LABELS, lambda: order.append(OURS), peers, lambda: order.append("check") or GOOD, Cost(bytes=8, flops=4),
              overheads={OURS: 0.5}, scales={"other": (1e6, "a part")})
    turn = ["reference", "other", OURS]
    assert order[:2] == [OURS, "check"] and order[2:] == ["reference", "other", *turn, *reversed(turn), *turn]
    rows = {row.contender: row for row in bench.rows}
    assert list(rows) == [OURS, "reference", "other"]
    assert all((row.commit, row.device, row.op, row.rounds) == ("0123456789", "a processor", "op", 3)
               and row.min <= row.median <= row.max and row.first_call_seconds >= 0 for row in rows.values())
    ours = rows[OURS]
    assert ours.gb_s == pytest.approx(2 * ours.gflop_s) and ours.gb_s == pytest.approx(8e-9 / ours.median)
    assert ours.fraction_of_peak == pytest.approx(PEAKS.least_seconds(8, 4, "float32") / ours.median)
    assert (ours.error, ours.error_limit, ours.overhead_seconds) == (1e-7, 2e-7, 0.5)
    assert (rows["reference"].error, rows["other"].error) == (1.5e-7, None)
    assert rows["other"].note == "a part" and rows["other"].median > 1e3 * ours.median


def test_row_of_fp8(monkeypatch):
    """By the emulation, for a small clip."""
    monkeypatch.setattr(tower, "SQUARE", (0, 4, 0, 4))
    bench = measure.Bench(FACTS, PEAKS, seconds=0.0)
    bench_tower.fp8_row(bench, tower.Case(1, rectangle=(0, 4, 0, 4)), "cpu")
    rows = {row.contender: row for row in bench.rows}
    assert list(rows) == [OURS, "ours, bfloat16"] and rows[OURS].op == "tower + projector, FP8"
    assert 0.02 < rows[OURS].error < rows[OURS].error_limit == tower.FP8_LIMIT
    monkeypatch.setattr(tower, "FP8_LIMIT", 0.02)
    with pytest.raises(measure.WrongResult):
        bench_tower.fp8_row(bench, tower.Case(1, rectangle=(0, 4, 0, 4)), "cpu")


def test_summary_of_samples():
    row = measure.summary([4.0, 1.0, 2.0, 3.0, 10.0], op="op", size="s", dtype="d", contender=OURS, metric="seconds")
    assert (row.median, row.min, row.max, row.rounds) == (3.0, 1.0, 10.0, 5)
    assert row.spread == pytest.approx((4.0 - 2.0) / 3.0)


def test_rounds_fill_the_time_given():
    clock = iter(range(10_000))

    def timer(call):
        call()
        return float(next(clock) >= 0)  # each call takes a second

    bench = measure.Bench(FACTS, PEAKS, seconds=8.0)
    samples = bench._interleave({"a": lambda: None, "b": lambda: None}, 100.0, timer)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 4, "b": 4}


def rows(dtype: str, spread: float, peer: str = "reference"):
    row = measure.summary([2e-3], **FACTS, **{**LABELS, "dtype": dtype}, contender=OURS, metric="seconds")
    return [replace(row, spread=spread, fraction_of_peak=0.25, error=1e-7),
            replace(row, contender=peer, median=4e-3, error=2e-7)]


def test_table_shows_peers_peak_errors_and_disturbance():
    peaks = PEAKS.rows(FACTS)
    text = list(table.render([*peaks, *rows("float32", 0.01), *rows("bfloat16", 0.5, "reference (float32)")]))
    steady = next(line for line in text if "reference 4" in line)
    assert "2    " in steady and "reference 4 (2.00x)" in steady and "25" in steady
    assert steady.endswith("1.0e-07  2.0e-07")
    disturbed = next(line for line in text if line.startswith("op") and "bfloat16" in line)
    assert "2 ~" in disturbed and "reference (float32) 4 (2.00x)" in disturbed and disturbed.endswith("2.0e-07")
    assert any(line.startswith("~") for line in text) and "with changes" in text[1]
    assert not any(line.startswith("~") for line in table.render([*peaks, *rows("float32", 0.01)]))


def test_memory_lines():
    bench = measure.Bench(FACTS, PEAKS, seconds=0.0, rows=PEAKS.rows(FACTS))
    bench.value({**LABELS, "op": "tower memory"}, "peak_bytes", {OURS: 2**20, "reference": [2**20, 3 * 2**20, 2**22]})
    assert list(table.render(bench.rows))[-1].endswith("1 MiB above the weights, reference 3 MiB (3.0 times)")


def test_peers_of_a_cpu_without_half_products_run_in_float32_and_say_so(monkeypatch):
    monkeypatch.setattr(half_products, "has_products", lambda dtype: dtype == torch.float32)
    assert half_products.peer_name("reference", torch.bfloat16, "cpu") == "reference (float32)"
    assert half_products.peer_name("reference", torch.float32, "cpu") == "reference"
    assert half_products.peer_name("reference", torch.bfloat16, "cuda") == "reference"
    contest = tower.Contenders(torch.bfloat16, "cpu", lambda x: x, {"peer": lambda x: x})
    ours, peers = contest.calls(torch.ones(1))
    assert (ours().dtype, peers["peer"]().dtype) == (torch.bfloat16, torch.float32)


def test_products_on_such_a_cpu_are_those_of_float32_rounded(monkeypatch):
    monkeypatch.setattr(half_products, "has_products", lambda dtype: dtype == torch.float32)
    a, b = (torch.randn(size).bfloat16() for size in ((8, 64), (64, 8)))
    with half_products.yardstick(torch.bfloat16, "cpu"):
        product = torch.nn.functional.linear(a, b.T)
    assert product.dtype == torch.bfloat16 and torch.equal(product, (a.float() @ b.float()).bfloat16())


def test_commit_of_a_folder_without_git_is_unknown_and_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == {"commit": "unknown", "dirty": True}
