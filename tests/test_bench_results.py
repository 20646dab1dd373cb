"""Results in long form, the comparison of two runs, and the README and pictures made from a file of results."""
from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from bench import compare, encoders, first_token, machine, pages, records, report, scaling
from bench.records import OURS, Row

FACTS = {"device": "a processor", "threads": 2, "isa": "avx2", "torch": "2", "numpy": "2", "python": "3",
         "panda_kernels": "0", "load_before": 0.25, "commit": "0123456789", "dirty": False, "date": "2026-01-02 03:04"}
PEAKS = machine.Peaks(memory_gb_s=10.0, l3_gb_s=100.0, l3_bytes=1000, gflop_s={"float32": 200.0, "bfloat16": 800.0})


def row(op: str, size: str, contender: str, median: float, *, dtype: str = "float32", metric: str = "seconds",
        **fields: object) -> Row:
    values = {**FACTS, "spread": 0.02, "rounds": 3, "min": median, "max": median, **fields}
    return Row(op=op, size=size, dtype=dtype, contender=contender, metric=metric, median=median, **values)


def ours(op: str, size: str, median: float, **fields: object) -> Row:
    found = {"bytes": 1000, "flops": 10**9, "gb_s": 0.5, "gflop_s": round(1 / median, 1), "fraction_of_peak": 0.905,
             "error": 2.8e-7, "error_limit": 6e-7, "overhead_seconds": 17e-6}
    return row(op, size, OURS, median, **{**found, **fields})


def made_run() -> list[Row]:
    """A run with something of everything that a report shows."""
    half = {"dtype": "bfloat16"}
    clip8, clip100 = encoders.CLIP_8, encoders.CLIP_100
    rows = PEAKS.rows(FACTS)
    rows += [ours("tower", "8 frames", 0.1239), row("tower", "8 frames", "reference", 0.5, error=2.7e-7),
             row("tower", "8 frames", "vectorised", 0.3),
             ours("tower", "8 frames", 0.05, **half, error=3.5e-3),
             row("tower", "8 frames", "reference (float32)", 0.5, **half, error=4.6e-3),
             ours("tower", "image", 0.0057), row("tower", "image", "reference", 0.0114),
             ours("tower + projector", "8 frames", 0.4), row("tower + projector", "8 frames", "reference", 1.0),
             ours("training step", "8 frames", 1.25), row("training step", "8 frames", "reference", 2.5),
             ours("attention_pool", "clips2", 0.002, overhead_seconds=9e-6),
             row("attention_pool", "clips2", "reference", 0.01), row("attention_pool", "clips2", "sdpa", 0.002),
             ours("token_mlp", "clips2", 0.002), row("token_mlp", "clips2", "reference", 0.0024)]
    rows += [row("memory, forward", "8 frames", name, value, metric="peak_bytes")
             for name, value in ((OURS, 100 << 20), ("reference", 350 << 20))]
    rows += [row("memory, forward", "8 frames", OURS, 23 << 20, metric="packed_bytes")]
    slower = {"malloc": "MALLOC_MMAP_THRESHOLD_=4e9"}
    rows += [ours("tower", "8 frames", 0.12, **slower), row("tower", "8 frames", "reference", 0.36, **slower)]
    rows += [row(op, f"{frames} frames", name, scale * frames) for op in (scaling.CLIPS, scaling.ONE_CLIP)
             for frames, (name, scale) in product((4, 8, 16), ((OURS, 0.02), ("reference", 0.1)))]
    rows += [row(scaling.CLIPS, f"{frames} frames", name, frames * 2**20 * scale, metric="peak_bytes")
             for frames, (name, scale) in product((4, 8), ((OURS, 1), ("reference", 4)))]
    rows += [row(scaling.THREADS, "8 frames", name, 0.5 / threads, threads=threads)
             for name, threads in product((OURS, "reference"), (1, 2))]
    scaled = "the time of 8 of 100 frames, scaled"
    rows += [row(encoders.OP, encoders.SIZE, name, seconds, note=note) for name, seconds, note in (
        (OURS, 0.4, ""), ("reference", 1.0, ""), (clip8, 4.0, ""), (clip100, 50.0, scaled))]
    rows += [row(encoders.OP, encoders.SIZE, name, value, metric=metric) for metric, values in (
        ("parameters", (45e6, 45e6, 324e6, 307e6)), ("multiply_adds", (71e9, 105.5e9, 691e9, 8104e9)))
        for name, value in zip((OURS, "reference", clip8, clip100), values, strict=True)]
    for op, of_ours, released in ((first_token.OP, 2.0, 4.0), (first_token.VISUAL, 0.2, 2.0)):
        rows += [row(op, "8 frames, a decoder", OURS, of_ours), row(op, "8 frames, a decoder", "reference", released)]
    return rows


BEGIN, END = "<!-- figures -->\n", "<!-- /figures -->\n"
FIGURES = """\
Medians of one interleaved run on 2 threads of a processor (avx2), torch 2, commit 012345678 ([every
row](bench/results/results.jsonl), [speedup](bench/plots/speedup.png), [roofline](bench/plots/roofline.png),
[encoders](bench/plots/encoders.png), [scaling](bench/plots/scaling.png)); the whole tower, without projector.
"Vectorised" is the released arithmetic batched over frames and channels-last. This CPU has no half-precision products:
beside bfloat16 rows torch runs in float32, as its user would let it, and such ratios are marked.

| input | dtype | ours | over the released | over vectorised | error, ours and released |
|---|---|---|---|---|---|
| 8 frames of 448 x 448 | float32 | 124 ms | 4.0x | 2.4x | 2.8e-7, 2.7e-7 |
|  | bfloat16 | 50 ms | 10.0x (its float32) |  | 3.5e-3, 4.6e-3 |
| one image | float32 | 5.7 ms | 2.0x |  | 2.8e-7,  |
| training step, 8 frames | float32 | 1.2 s | 2.0x |  | 2.8e-7,  |

The tower of 8 frames runs at 90 % (float32) and 90 % (bfloat16) of the peak that this machine showed in the same run.
With the projector it is 2.5x over the released. With page faults taken out of both sides (`MALLOC_MMAP_THRESHOLD_=4e9`)
8 frames are 3.0x over the released. A forward needs 3.5 times less memory above the weights. Of its 100 MiB in float32
23 are weights packed for the products, which stay. Alone hardly faster than torch's best, or slower: `attention_pool`
in float32 (1.0x). A call of an op on its smallest input takes 9 to 17 µs. From 4 to 16 frames time grows with their
number to the power 1.00.

| encoder of a video | dtype | parameters | multiply-adds | latency | over ours | the paper's |
|---|---|---|---|---|---|---|
| STAB + projector, 8 frames of 448, these kernels | float32 | 45 M | 71.0 G | 400 ms | 1.0x | 45 M, 105.5 G, 41 ms |
| the same as released | float32 | 45 M | 105.5 G | 1.0 s | 2.5x |  |
| CLIP ViT-L/14 + projector, 8 frames of 224 | float32 | 324 M | 691.0 G | 4.0 s | 10.0x | 425 M, 864 G, 125 ms |
| CLIP ViT-L/14 + projector, 100 frames of 224 | float32 | 307 M | 8104.0 G | 50 s* | 125.0x | 307 M, 8109 G, 171 ms |

\\* the time of 8 of 100 frames, scaled.

Of the wait for the first token (8 frames, a decoder, float32) the visual path is 50 % through the released arithmetic
and 10 % through ours; the whole wait is 4.0 s and 2.0 s.
"""


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    rows = [replace(r, median=1 / 3) for r in made_run()[:8]]
    records.upsert(path, rows)
    assert records.load(path) == [replace(r, median=0.333333) for r in rows]


def test_a_row_measured_again_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "results.jsonl"
    first, second = ours("tower", "image", 1.0), ours("tower", "8 frames", 2.0)
    records.upsert(path, [first, second])
    again = ours("tower", "image", 3.0, date="2026-02-02 03:04", error=1e-7)
    others = [replace(first, **{name: value}) for name, value in (
        ("commit", "fedcba"), ("dirty", True), ("device", "another"), ("isa", "avx512"), ("threads", 1),
        ("malloc", "M=1"), ("op", "o"), ("size", "s"), ("dtype", "bfloat16"), ("contender", "reference"),
        ("metric", "peak_bytes"))]
    records.upsert(path, [again, *others])
    assert records.load(path) == [again, second, *others]
    assert [file.name for file in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.parametrize("line", ['{"op": "tower"}', "[]", "not json", '{"op": 1, "unknown": 2}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "results.jsonl"
    records.upsert(path, [ours("tower", "image", 1.0)])
    path.write_text(path.read_text() + line)
    with pytest.raises(ValueError, match=r"results\.jsonl:2: expected a row"):
        records.load(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        records.load(path)


def test_newest_run_is_of_one_commit_and_device():
    old = ours("tower", "image", 1.0, commit="old", date="2026-01-01 00:00")
    new = [ours("tower", size, 1.0, date=f"2026-01-02 0{i}:00") for i, size in enumerate(("image", "8 frames"))]
    card = ours("tower", "image", 1.0, device="a card", device_type="cuda", date="2026-01-03 00:00")
    assert records.newest([old, *new, card], "cpu") == new
    assert records.newest([old, *new, card], "cuda") == [card]
    assert records.newest([old], "cuda") == []


def test_contests_need_ours_and_speedups_are_over_it():
    found = records.contests([ours("tower", "image", 2.0), row("tower", "image", "reference", 5.0),
                              row("tower", "clip", "reference", 5.0)])
    assert list(found) == [("tower", "image", "float32")]
    assert records.speedups(found["tower", "image", "float32"]) == {"reference": 2.5}


@pytest.mark.parametrize(("after", "spread", "drift", "beyond"), [
    (1.1, 0.02, 1.0, True), (1 / 1.1, 0.02, 1.0, True), (1.1, 0.12, 1.0, False), (1.1, 0.02, 1.09, False),
    (1.1, 0.02, 1 / 1.09, False), (1.01, 0.0, 1.0, True), (1.0, 0.0, 1.0, False)])
def test_a_change_counts_beyond_both_spreads_and_the_references_drift(after, spread, drift, beyond):
    before = [ours("tower", "image", 1.0, spread=spread), row("tower", "image", "reference", 4.0)]
    now = [ours("tower", "image", after, spread=spread), row("tower", "image", "reference", 4.0 * drift)]
    change = next(c for c in compare.changes(before, now) if c.after.contender == OURS)
    assert change.ratio == pytest.approx(after) and change.beyond_noise == beyond


def test_compare_finds_files_and_commits(tmp_path, monkeypatch, capsys):
    store, other = tmp_path / "store.jsonl", tmp_path / "other.jsonl"
    records.upsert(store, [ours("tower", "image", 1.0), ours("tower", "clip", 1.0)])
    records.upsert(other, [ours("tower", "image", 0.5, commit="fedcba", isa="avx512")])
    monkeypatch.setattr(compare, "STORE", store)
    assert compare.main(["01234", str(other)]) == 0
    shown = capsys.readouterr().out
    assert "not one machine" in shown and "0.500" in shown and "clip" not in shown
    assert "of ours beyond the noise: 1 better, 0 worse" in shown
    assert compare.main(["99", str(other)]) == 2
    assert "99: neither a file nor the beginning of a commit" in capsys.readouterr().err


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_fitted_slope_is_the_power(power):
    exact = [(x, 3 * x**power) for x in (4.0, 8.0, 32.0, 64.0)]
    assert scaling.fitted_slope(exact) == pytest.approx(power)
    noisy = [(x, y * (1.1 if i % 2 else 1 / 1.1)) for i, (x, y) in enumerate(exact)]
    assert 1e-3 < abs(scaling.fitted_slope(noisy) - power) < 0.06
    with pytest.raises(ValueError, match="two or more x"):
        scaling.fitted_slope([(4.0, 1.0), (4.0, 2.0)])


def test_report_writes_readme_and_pictures_from_the_file(tmp_path):
    results, readme = tmp_path / "results.jsonl", tmp_path / "README.md"
    records.upsert(results, [*made_run(), ours("tower", "8 frames", 9.0, commit="old", date="2026-01-01 00:00")])
    readme.write_text(f"before\n{BEGIN}typed by hand\n{END}after\n")
    arguments = ["--results", str(results), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main(arguments) == 0
    assert readme.read_text() == f"before\n{BEGIN}{FIGURES}{END}after\n"
    names = ["encoders.png", "roofline.png", "scaling.png", "speedup.png"]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == names
    assert all((tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_report_leaves_out_what_was_not_measured():
    rows = [*PEAKS.rows(FACTS), ours("assemble_tokens", "clips2", 1e-3, flops=0, gflop_s=0.0, overhead_seconds=None),
            row("assemble_tokens", "clips2", "reference", 2e-3)]
    assert [picture.name for picture in report.pictures(rows, "_cuda")] == ["speedup_cuda.png"]
    text = report.text(rows, [])
    assert "| " not in text and text.count("\n") == 3


def test_readme_without_marks_is_refused():
    for readme in ("no marks", BEGIN, END + BEGIN):
        with pytest.raises(ValueError, match="expected the lines"):
            pages.replaced(readme, "figures", "figures\n")


def test_readme_holds_what_the_saved_results_give():
    """Figures in it are not typed by hand: ``make plots`` writes them."""
    written, drawn = report.figures(records.load(records.STORE))
    readme = (machine.ROOT / "README.md").read_text()
    assert pages.replaced(readme, "figures", written) == readme
    assert all((machine.ROOT / "bench" / "plots" / picture.name).exists() for picture in drawn)
