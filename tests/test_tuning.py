"""Measured settings: what they are kept by, how a call finds them, and files that hold none."""
from __future__ import annotations

import json
import multiprocessing
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from panda_kernels import backends, info
from panda_kernels.ops import SPECS
from panda_kernels.tuning import Space, choose, identity, lookup, store
from panda_kernels.tuning.space import Point
from panda_kernels.tuning.store import Entry
from panda_kernels.verify import arguments

PACKAGE = Path(store.__file__).parent.parent
SPACE = Space("cpu.made_up", rows=(1, 2, 4), columns=(1, 2))
HERE = torch.zeros(1)


@dataclass(frozen=True)
class Config:
    rows: int = 1
    columns: int = 1
    depth: int = 7


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, nothing shipped, and a processor that is here whether or not the extension is."""
    monkeypatch.setenv("PANDA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(store, "_warned", set())
    monkeypatch.setattr(identity, "device_of", lambda backend, device: {"name": "A (tm) CPU", "threads": 2})
    lookup.forget()
    yield
    lookup.forget()


def entry(**changes: Any) -> Entry:
    found = Entry(kernel=SPACE.name, device={"name": "A (tm) CPU", "threads": 2}, versions=identity.versions("cpu"),
                  content=identity.content(SPACE.name), dtype="float32", shape={"C": 1024, "kernel": "3x3x3"},
                  config={"rows": 4, "columns": 2}, gain=0.1)
    return replace(found, **changes)


def file_in(folder: Path) -> Path:
    return store.file_of(folder, "A (tm) CPU")


def chosen(C: int = 1024, kernel: str = "3x3x3", like: Tensor = HERE) -> tuple[int, int]:
    config = choose(SPACE, Config(), like, C=C, kernel=kernel)
    assert config.depth == 7
    return config.rows, config.columns


HEURISTIC, MEASURED = (1, 1), (4, 2)


# Lookup


def test_a_call_finds_what_was_measured_and_only_for_its_dtype_and_device() -> None:
    assert chosen() == HEURISTIC
    store.update(file_in(store.cache_folder()), [entry()])
    assert chosen() == HEURISTIC, "files are read once a process"
    lookup.forget()
    assert chosen() == MEASURED
    assert chosen(like=HERE.double()) == HEURISTIC
    assert chosen(like=HERE.to("meta")) == HEURISTIC


@pytest.mark.parametrize("other", [{"device": {"name": "A (tm) CPU", "threads": 4}}, {"content": "of another kernel"},
                                   {"kernel": "cpu.another"}, {"config": {"rows": 3, "columns": 2}},
                                   {"config": {"rows": 4}}])
def test_what_was_measured_for_something_else_is_not_taken(other: dict[str, Any]) -> None:
    store.update(file_in(store.cache_folder()), [entry(), entry(shape={"C": 2048, "kernel": "3x3x3"}, **other)])
    assert chosen(C=2048) == MEASURED  # the other entry's
    store.update(file_in(store.cache_folder()), [], [entry().key()])
    lookup.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chosen(C=2048) == HEURISTIC


def test_the_nearest_shape_serves_unless_it_is_far_or_differs_in_more_than_size() -> None:
    near, far = entry(), entry(shape={"C": 64, "kernel": "3x3x3"}, config={"rows": 2, "columns": 1})
    store.update(file_in(store.cache_folder()), [near, far])
    assert chosen(C=1152) == chosen(C=300) == chosen(C=4096) == MEASURED
    assert chosen(C=200) == chosen(C=16) == (2, 1)
    assert chosen(C=15) == chosen(C=4097) == chosen(kernel="1x3x3") == HEURISTIC


def test_distance_is_in_powers_of_two_over_all_sizes() -> None:
    assert lookup.distance({"C": 8, "n": 3}, {"C": 2, "n": 6}) == 3.0
    assert lookup.distance({"C": 8}, {"C": 8, "n": 1}) == lookup.distance({"t": True}, {"t": False}) == float("inf")
    assert lookup.distance({"t": True, "k": "a"}, {"t": True, "k": "a"}) == 0.0


def test_the_cache_comes_before_what_is_shipped_which_outlives_versions() -> None:
    shipped = entry(config={"rows": 2, "columns": 2}, versions={"torch": "1.0"})
    store.update(file_in(store.SHIPPED), [shipped])
    assert chosen() == (2, 2) and lookup.in_use("cpu", "cpu") == [0, 1]
    store.update(file_in(store.cache_folder()), [entry()])
    lookup.forget()
    assert chosen() == MEASURED and lookup.in_use("cpu", "cpu") == [1, 1]


# Files

DAMAGED = {"cut": '{"format": 1, "entr', "another program's": '{"theme": "dark"}', "a list": "[1, 2]", "empty": "",
           "another format": '{"format": 2, "entries": []}', "no entry": '{"format": 1, "entries": [{"kernel": "a"}]}',
           "another type": {"gain": "much"}, "no integer": {"config": {"rows": 4.5, "columns": 2}}}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(what: str) -> None:
    text, file = DAMAGED[what], file_in(store.cache_folder())
    store.update(file, [entry()])
    if isinstance(text, dict):
        page = json.loads(file.read_text())
        page["entries"][0] |= text
        text = json.dumps(page)
    file.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"a-tm-cpu\.json is ignored") as warned:
        assert chosen() == chosen(C=512) == HEURISTIC
        lookup.forget()
        assert chosen() == HEURISTIC
    assert len(warned) == 1
    store.update(file, [entry()])
    lookup.forget()
    assert chosen() == MEASURED, "a tuner replaces it"


def test_settings_of_other_versions_are_ignored_with_one_warning() -> None:
    file = file_in(store.cache_folder())
    store.update(file, [entry(versions={"torch": "1.0"}), entry(content="of another kernel")])
    with pytest.warns(RuntimeWarning, match="measured with other versions") as warned:
        assert chosen() == HEURISTIC
        lookup.forget()
        assert chosen() == HEURISTIC
    assert len(warned) == 1
    store.update(file, [entry()])
    lookup.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == MEASURED, "those of another environment may lie beside ours"


def test_an_update_replaces_adds_and_drops() -> None:
    file, other = file_in(store.cache_folder()), entry(dtype="bfloat16")
    store.update(file, [entry(), other])
    store.update(file, [entry(config={"rows": 2, "columns": 1})], [other.key()])
    assert [e.config for e in store.load(file)] == [{"rows": 2, "columns": 1}]
    assert {f.name for f in file.parent.iterdir()} == {file.name, file.with_suffix(".lock").name}


def _write(file: Path, kernel: str, count: int) -> None:
    for i in range(count):
        store.update(file, [entry(kernel=kernel, shape={"C": i + 1})])


def test_two_processes_lose_nothing_and_readers_never_see_half_a_file() -> None:
    file, count = file_in(store.cache_folder()), 20
    store.update(file, [])
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(file, kernel, count)) for kernel in ("cpu.a", "cpu.b")]
    for writer in writers:
        writer.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.is_alive() for writer in writers):
            store.load(file)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert {(e.kernel, e.shape["C"]) for e in store.load(file)} == {
        (kernel, i + 1) for kernel in ("cpu.a", "cpu.b") for i in range(count)}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("PANDA_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / "panda_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "panda_kernels"


def test_info_says_which_files_there_are() -> None:
    store.update(file_in(store.cache_folder()), [entry()])
    section = info.collect()["tuning"]
    assert section["cache"] == f"{store.cache_folder()}: a-tm-cpu.json"
    assert section["shipped"] == f"{store.SHIPPED}: no files"


# Spaces and keys

MODULES = [*(f"backends.cpu.{f.stem}" for f in sorted((PACKAGE / "backends" / "cpu").glob("[a-z]*.py"))),
           *(f"triton.{f.stem}" for f in sorted((PACKAGE / "triton").glob("[a-z]*.py")))]


def spaces() -> list[tuple[Any, Space]]:
    pytest.importorskip("triton")
    modules = [import_module(f"panda_kernels.{name}") for name in MODULES]
    return [(module, value) for module in modules for value in vars(module).values() if isinstance(value, Space)]


def test_every_space_is_named_by_its_kernel_and_small_enough_to_time() -> None:
    found = spaces()
    assert len({space.name for _, space in found}) == len(found)
    for module, space in found:
        _, name, *kernel = space.name.split(".")
        assert module.__name__.rpartition(".")[2] == name and all(hasattr(module, k) for k in kernel), space.name
        assert identity.content(space.name) != "unknown" or space.backend == "cpu"
        count = 1
        for values in space.values.values():
            assert len(set(values)) == len(values)
            count *= len(values)
        assert count <= 64, space.name


def test_every_kernel_has_a_space() -> None:
    kernels = {space.name.removeprefix("triton.") for _, space in spaces() if space.backend == "triton"}
    resources = import_module("panda_kernels.triton.resources")
    table = resources.parse((PACKAGE.parent / "docs" / "kernel_resources.md").read_text())
    # One program over a few numbers leaves nothing to choose.
    assert {row.kernel for row in table} == kernels | {"rectangles.measure"}


def test_content_is_that_of_all_files_a_kernel_is_made_of() -> None:
    files = {file.name for file in identity._with_imports("token_mlp")}
    assert files == {"token_mlp.py", "matmul.py", "_launch.py", "_precision.py"}
    assert identity.content("triton.token_mlp.hidden_gradient") != identity.content("triton.matmul.product")


# The same op at two lengths; what else a size is stays the same.
LENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "assemble_tokens": ({"corners": ((0, 2, 0, 2),), "channels": 16},
                        {"corners": ((0, 4, 0, 6), (1, 3, 0, 2)), "channels": 16}),
    "attention_pool": ({"batch": 1, "tokens": 3, "channels": 24}, {"batch": 5, "tokens": 70, "channels": 24}),
    "depthwise_conv3d": ({"shape": (1, 4, 2, 3, 16)}, {"shape": (3, 2, 7, 5, 16)}),
    "local_encoding": ({"shape": (1, 2, 2, 3, 24)}, {"shape": (2, 5, 4, 2, 24)}),
    "patch_embed": ({"shape": (1, 1, 28, 28), "channels": 16}, {"shape": (2, 3, 14, 70), "channels": 16}),
    "token_mlp": ({"shape": (5, 16), "hidden": 32}, {"shape": (2, 40, 16), "hidden": 32}),
    "window_attention_pool": ({"grid": (2, 4), "corners": ((0, 2, 0, 4),), "channels": 16, "num_heads": 2},
                              {"grid": (6, 2), "corners": ((0, 6, 0, 2),) * 3, "channels": 16, "num_heads": 2}),
}


def points(backend: str, op: str, sizes: dict[str, Any]) -> list[Point]:
    """What forward and backward ask for, on the CPU or, kernels only noted down, on the meta device."""
    device = "cpu" if backend == "cpu" else "meta"
    module = import_module(f"panda_kernels.backends.{backend}.{op}")
    values = [v.to(device) if isinstance(v, Tensor) else v
              for v in arguments(SPECS[op], SPECS[op].inputs(sizes, torch.float32))]
    needs = [v.dtype.is_floating_point for v in values if isinstance(v, Tensor)]

    def both() -> None:
        y = module.fwd(*values)
        if hasattr(module, "bwd"):
            module.bwd(torch.zeros_like(y), *values, needs=needs)

    with lookup.observed() as session:
        if backend == "cpu":
            both()
        else:
            with import_module("panda_kernels.triton._launch").recorded():
                both()
    return list(session.seen)


@pytest.mark.parametrize("op", LENGTHS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_no_length_is_in_a_key(backend: str, op: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    elif backends.load_error("cpu"):
        pytest.skip("no compiled extension")
    short, long = (points(backend, op, sizes) for sizes in LENGTHS[op])
    assert short == long
    assert short or (backend == "cpu" and op in ("attention_pool", "assemble_tokens"))
