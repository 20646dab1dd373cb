"""The benchmarks' own arithmetic, and that a wrong result is never timed. No speed is asserted."""
from __future__ import annotations

import json

import pytest
import torch

from bench import machine, measure, plot, table, tower
from panda_kernels.spec import Cost

PEAKS = machine.Peaks(memory_gb_s=10.0, l3_gb_s=100.0, l3_bytes=1000, gflop_s={"float32": 200.0, "bfloat16": 800.0})
LABELS = {"op": "op", "size": "size", "dtype": "float32", "backend": "torch"}
FACTS = {"device": "a processor", "threads": 2, "isa": "avx2", "versions": {"torch": "2", "panda_kernels": "0"},
         "load_before": 0.0, "commit": "0123456789", "dirty": True, "peaks": {
             "memory_gb_s": 10.0, "l3_gb_s": 100.0, "l3_bytes": 1000, "gflop_s": {"float32": 200.0, "bfloat16": 800.0}}}
GOOD = measure.Errors(1e-7, 1e-7, 2e-7)


@pytest.mark.parametrize(("projected", "operations"), [(False, 51e9), (True, 142e9)])
def test_cost_is_that_of_the_specification(projected, operations):
    assert tower.cost(tower.CASES["8 frames"], torch.float32, projected).flops == pytest.approx(operations, rel=0.01)


def test_cost_of_a_cropped_clip_is_less_and_bytes_follow_the_dtype():
    full, cropped = (tower.cost(tower.CASES[case], torch.float32, True) for case in ("1 clip", "720p clip"))
    assert cropped.flops < full.flops and cropped.bytes < full.bytes
    assert tower.cost(tower.CASES["1 clip"], torch.bfloat16, True).bytes * 2 == full.bytes


def test_widescreen_is_a_fitted_720p_frame():
    row0, row1, col0, col1 = tower.WIDESCREEN
    windows = -(-224 * 720 // (1280 * 14))
    assert (col0, col1, row1 - row0, 14 * row0) == (0, 32, 2 * windows, 2 * ((16 - windows) // 2 * 14))


def test_roofline_takes_the_slower_of_moving_and_computing():
    assert PEAKS.least_seconds(10_000, 0, "float32") == pytest.approx(1e-6)
    assert PEAKS.least_seconds(1000, 0, "float32") == pytest.approx(1e-8)
    assert PEAKS.least_seconds(10_000, 400_000, "float32") == pytest.approx(2e-6)
    assert PEAKS.least_seconds(10_000, 400_000, "bfloat16") == pytest.approx(1e-6)


def test_wrong_result_is_not_timed():
    bench = measure.Bench(None, FACTS, PEAKS, seconds=0.0)
    calls = []
    with pytest.raises(measure.WrongResult, match=r"op size float32 torch: relative error 3\.00e-07.*limit 2\.00e-07"):
        bench.row(LABELS, lambda: calls.append(1), {}, measure.Errors(3e-7, 1e-7, 2e-7), Cost(1, 1))
    with pytest.raises(measure.WrongResult):
        bench.row(LABELS, lambda: calls.append(1), {}, measure.Errors(float("nan"), 1e-7, 2e-7), Cost(1, 1))
    assert not calls


def test_row_interleaves_and_records(benchmark):
    order = []
    peers = {name: lambda name=name: order.append(name) for name in ("reference", "other")}
    bench = measure.Bench(benchmark, FACTS, PEAKS, seconds=0.0)
    bench.row(LABELS, lambda: order.append("ours"), peers, GOOD, Cost(bytes=8, flops=4))
    assert order == ["reference", "other", "ours"] * (len(order) // 3) and len(order) >= 4 * 3
    row = benchmark.extra_info
    assert row["commit"] == FACTS["commit"] and row["device"] == FACTS["device"]
    assert row["gb_s"] == pytest.approx(2 * row["gflop_s"])
    for peer in row["peers"].values():
        assert peer["min"] <= peer["median"] <= peer["max"]
        assert peer["speedup"] == pytest.approx(peer["median"] / benchmark.stats.stats.median)


def row(dtype: str, spread: float) -> dict:
    peer = {"median": 4e-3, "min": 4e-3, "max": 4e-3, "speedup": 2.0}
    return {**FACTS, **LABELS, "dtype": dtype, "seconds": 2e-3, "spread": spread, "bytes": 8, "flops": 64,
            "error": 1e-7, "reference_error": 2e-7, "gb_s": 1.0, "gflop_s": 8.0, "fraction_of_peak": 0.25,
            "peers": {"reference": peer}}


def test_table_shows_peers_peak_errors_and_disturbance():
    text = list(table.render([row("float32", 0.01), row("bfloat16", 0.5)], FACTS))
    steady = next(line for line in text if "float32" in line and "reference 4" in line)
    assert "2    " in steady and "reference 4 (2.00x)" in steady and "25" in steady and "1.0e-07" in steady
    assert "2 ~" in next(line for line in text if line.startswith("op") and "bfloat16" in line)
    assert any(line.startswith("~") for line in text) and "with changes" in text[1]
    assert not any(line.startswith("~") for line in table.render([row("float32", 0.01)], FACTS))


def test_memory_lines():
    memory = {"op": "tower memory", "size": "8 frames", "dtype": "float32", "peak_bytes": 2**20,
              "reference_peak_bytes": 3 * 2**20}
    assert "1 MiB above the weights, reference 3 MiB (3.0 times)" in list(table.render([memory], FACTS))[-1]


def test_plots_are_drawn_from_the_saved_file(tmp_path):
    results = tmp_path / "results.json"
    timed = [{"extra_info": row(dtype, 0.0), "stats": {"median": 2e-3}} for dtype in ("float32", "bfloat16")]
    memory = {"extra_info": {"op": "tower memory"}, "stats": {"median": 1.0}}
    results.write_text(json.dumps({"benchmarks": [*timed, memory]}))
    assert len(plot.load(results)) == 2
    assert plot.main([str(results), "-o", str(tmp_path / "plots")]) == 0
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    timed[0]["extra_info"]["flops"] = 0
    results.write_text(json.dumps({"benchmarks": timed[:1]}))
    assert plot.main([str(results), "-o", str(tmp_path / "copies")]) == 0
    assert [path.name for path in (tmp_path / "copies").iterdir()] == ["speedup.png"]
    results.write_text(json.dumps({"benchmarks": [memory]}))
    with pytest.raises(ValueError, match="expected rows that were timed"):
        plot.load(results)


def test_commit_of_a_folder_without_git_is_unknown_and_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == {"commit": "unknown", "dirty": True}
