"""README's figures as Markdown, sentence by sentence, from the rows of one run; what was not measured is left out."""
from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from panda_kernels.ops import SPECS

from . import encoders, first_token, scaling
from .records import OURS, STORE, Contest, Row, as_run, contests, speedups

INPUTS = {("tower", "8 frames"): "8 frames of 448 x 448", ("tower", "720p clip"): "one 720p clip",
          ("tower", "image"): "one image", ("training step", "8 frames"): "training step, 8 frames"}
HEADER = ("| input | dtype | ours | over the released | over vectorised | error, ours and released |\n"
          "|---|---|---|---|---|---|")
ENCODERS = {OURS: "STAB + projector, 8 frames of 448, these kernels", "reference": "the same as released",
            encoders.CLIP_8: "CLIP ViT-L/14 + projector, 8 frames of 224",
            encoders.CLIP_100: "CLIP ViT-L/14 + projector, 100 frames of 224"}
Found = dict[tuple[str, str, str], Contest]


def text(rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """Markdown of one run, with links to its pictures by file name."""
    plain = as_run(rows)
    found = contests(plain)
    parts = [_paragraph([_where(plain[0], pictures), *_about_dtypes(found)])]
    parts += ["\n".join([HEADER, *_table(found)])] if any(key[:2] in INPUTS for key in found) else []
    parts.append(_paragraph([*_beside_the_table(found), *_page_faults(rows), *_memory(plain), *_not_faster(found),
                             *_overheads(found), *_scaling(plain)]))
    parts += [table] if (table := _encoders(plain)) else []
    parts.append(_paragraph(_first_token(found)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _paragraph(sentences: Sequence[str] | Iterator[str]) -> str:
    return textwrap.fill(" ".join(sentences), 120, break_long_words=False, break_on_hyphens=False)


def _where(row: Row, pictures: Sequence[str]) -> str:
    links = [f"[every row](bench/results/{STORE.name})"]
    links += [f"[{name.removesuffix('.png').replace('_', ' ')}](bench/plots/{name})" for name in pictures]
    on = f"{row.threads} threads of {row.device} ({row.isa})" if row.device_type == "cpu" else row.device
    return (f"Medians of one interleaved run on {on}, torch {row.torch}, commit {row.commit[:9]}"
            f"{' with changes' if row.dirty else ''} ({', '.join(links)}); the whole tower, without projector. "
            '"Vectorised" is the released arithmetic batched over frames and channels-last.')


def _about_dtypes(found: Found) -> Iterator[str]:
    if any(name == "reference (float32)" for contest in found.values() for name in contest):
        yield ("This CPU has no half-precision products: beside bfloat16 rows torch runs in float32, as its user would "
               "let it, and such ratios are marked.")


def _table(found: Found) -> Iterator[str]:
    for (op, size), name in INPUTS.items():
        label = name
        for dtype in ("float32", "bfloat16", "float16"):
            contest = found.get((op, size, dtype))
            if contest is None:
                continue
            ours, reference = contest[OURS], _peer(contest, "reference")
            errors = f"{_error(ours)}, {_error(reference)}"
            yield (f"| {label} | {dtype} | {_time(ours.median)} | {_ratio(contest, 'reference')} | "
                   f"{_ratio(contest, 'vectorised')} | {errors} |")
            label = ""


def _beside_the_table(found: Found) -> Iterator[str]:
    tower = _by_dtype(found, "tower", "8 frames")
    peaks = {dtype: contest[OURS].fraction_of_peak for dtype, contest in tower.items()}
    if tower:
        shares = _list(f"{100 * (peaks[dtype] or 0):.0f} % ({dtype})" for dtype in tower)
        yield f"The tower of 8 frames runs at {shares} of the peak that this machine showed in the same run."
    projected = _by_dtype(found, "tower + projector", "8 frames")
    if projected:
        yield f"With the projector it is {_list(_ratio(c, 'reference') for c in projected.values())} over the released."


def _page_faults(rows: Sequence[Row]) -> Iterator[str]:
    """Of a run under other allocator settings, which large tensors do not make the system map and clear anew."""
    settings = {row.malloc for row in rows if row.malloc and row.op == "tower"}
    for malloc in sorted(settings):
        tower = _by_dtype(contests(row for row in rows if row.malloc == malloc), "tower", "8 frames")
        if tower:
            yield (f"With page faults taken out of both sides (`{malloc}`) 8 frames are "
                   f"{_list(_ratio(contest, 'reference') for contest in tower.values())} over the released.")


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    found = contests(rows, "peak_bytes")
    forward, training = (_by_dtype(found, f"memory, {kind}", "8 frames") for kind in ("forward", "training"))
    if forward:
        less = [_list(_ratio(contest, "reference", " times") for contest in kind.values())
                for kind in (forward, training) if kind]
        yield f"A forward needs {', a training step '.join(less)} less memory above the weights."
    peaks, packed = forward.get("float32", {}).get(OURS), contests(rows, "packed_bytes")
    of_packed = _by_dtype(packed, "memory, forward", "8 frames").get("float32")
    if peaks and of_packed:
        most, stays = (row.median / 2**20 for row in (peaks, of_packed[OURS]))
        yield f"Of its {most:.0f} MiB in float32 {stays:.0f} are weights packed for the products, which stay."


def _not_faster(found: Found) -> Iterator[str]:
    """The ops that gain less than a seventh over the best of their peers."""
    slow = []
    for (op, size, dtype), contest in found.items():
        if op in SPECS and size == next(iter(SPECS[op].bench_sizes)):
            best = min(speedups(contest).values(), default=2.0)
            slow += [f"`{op}` in {dtype} ({best:.1f}x)"] if best < 1.15 else []
    if slow:
        yield f"Alone hardly faster than torch's best, or slower: {_list(slow)}."


def _overheads(found: Found) -> Iterator[str]:
    ours = [contest[OURS].overhead_seconds for (op, _, _), contest in found.items() if op in SPECS]
    overheads = [1e6 * seconds for seconds in ours if seconds is not None]
    if overheads:
        yield f"A call of an op on its smallest input takes {min(overheads):.0f} to {max(overheads):.0f} µs."


def _scaling(rows: Sequence[Row]) -> Iterator[str]:
    points = scaling.by_frames(rows, scaling.CLIPS, OURS)
    if len(points) > 1:
        yield (f"From {points[0][0]:.0f} to {points[-1][0]:.0f} frames time grows with their number to the power "
               f"{scaling.fitted_slope(points):.2f}.")


def _encoders(rows: Sequence[Row]) -> str:
    """Table 3 for each dtype: what was measured, the ratio to ours, and what the paper says."""
    of_encoders = [row for row in rows if row.op == encoders.OP]
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in of_encoders):
        found = {(row.contender, row.metric): row for row in of_encoders if row.dtype == dtype}
        for name, label in ENCODERS.items():
            if (name, "seconds") not in found:
                continue
            seconds = found[name, "seconds"]
            ratio = seconds.median / found[OURS, "seconds"].median
            paper = encoders.PAPER.get(name)
            counts = [f"{unit * found[name, metric].median:.{digits}f} {letter}" for metric, unit, digits, letter in
                      (("parameters", 1e-6, 0, "M"), ("multiply_adds", 1e-9, 1, "G"))]
            published = "" if paper is None else (f"{1e-6 * paper.parameters:.0f} M, {1e-9 * paper.multiply_adds:g} G, "
                                                  f"{_time(paper.seconds)}")
            lines.append(f"| {label} | {dtype} | {counts[0]} | {counts[1]} | {_time(seconds.median)}"
                         f"{'*' * bool(seconds.note)} | {ratio:.1f}x | {published} |")
    if not lines:
        return ""
    notes = dict.fromkeys(row.note for row in of_encoders if row.note)
    star = [_paragraph([f"\\* {_list(notes)}."])] if notes else []
    header = ("| encoder of a video | dtype | parameters | multiply-adds | latency | over ours | the paper's |\n"
              "|---|---|---|---|---|---|---|")
    return "\n\n".join(["\n".join([header, *lines]), *star])


def _first_token(found: Found) -> Iterator[str]:
    for (op, size, dtype), whole in found.items():
        part = found.get((first_token.VISUAL, size, dtype))
        if op == first_token.OP and part:
            shares = {name: part[name].median / row.median for name, row in whole.items()}
            yield (f"Of the wait for the first token ({size}, {dtype}) the visual path is "
                   f"{100 * shares['reference']:.0f} % through the released arithmetic and {100 * shares[OURS]:.0f} % "
                   f"through ours; the whole wait is {_time(whole['reference'].median)} and "
                   f"{_time(whole[OURS].median)}.")


def _by_dtype(found: Found, op: str, size: str) -> dict[str, Contest]:
    return {key[2]: contest for key, contest in found.items() if key[:2] == (op, size)}


def _peer(contest: Contest, name: str) -> Row | None:
    return next((row for contender, row in contest.items() if contender.split(" (")[0] == name), None)


def _ratio(contest: Contest, name: str, unit: str = "x") -> str:
    """The peer over ours; with the peer's dtype if that is another than the row's."""
    peer = _peer(contest, name)
    if peer is None:
        return ""
    dtype = peer.contender.partition(" (")[2].rstrip(")")
    ratio = f"{peer.median / contest[OURS].median:.1f}"
    return f"{ratio}{unit}{f' (its {dtype})' if dtype else ''}"


def _error(row: Row | None) -> str:
    return "" if row is None or row.error is None else f"{row.error:.1e}".replace("e-0", "e-")


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1e3 * seconds:.0f} ms" if seconds >= 10e-3 else f"{1e3 * seconds:.2g} ms"


def _list(items: Iterator[str] | Sequence[str] | dict[str, None]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
