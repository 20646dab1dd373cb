"""Graphs of the visual path: the same bits as plain calls, few graphs, none that is stale, and nobody else disturbed.

Without a GPU a stand-in records the operations with the tensors they had, and does them again at every replay. As a
real graph it gives no values while it records, reads and writes the same memory for ever, shares what is between with
the other graphs, and must not wait for values.
"""
from __future__ import annotations

import copy
import pickle
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_nn import (
    DIM,
    RECTANGLES,
    buffer_in_place,
    fused_step,
    in_place,
    lively,
    load,
    load_assigned,
    optimizer_step,
    pair,
    pixels,
    replaced,
    rounded,
    through_data,
)
from test_video_panda import Model, assert_same
from test_video_panda import tower as released_tower
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from panda_kernels import encode
from panda_kernels.integrations.video_panda import patch
from panda_kernels.nn import Projector, STABOutput, VisualPath, folding
from panda_kernels.nn.cuda_graph import RECORDERS
from panda_kernels.nn.folding import Folded
from panda_kernels.nn.graphs import Graphs
from panda_kernels.rectangles import Rectangles

# As many windows and tokens as RECTANGLES hold, elsewhere and in another order.
MOVED = [(0, 3, 1, 5), (0, 4, 1, 5), (1, 4, 1, 5), (0, 4, 0, 3)] * 2


def tensors_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def spoil(tensor: Tensor) -> None:
    """NaN, or -1, in all its memory."""
    torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple] = []
        self.between: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "local_scalar_dense" in str(func):
            raise RuntimeError("operation not permitted when stream is capturing")
        known = {memory(t) for t in tensors_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.between |= {memory(t): t for t in tensors_of(result) if memory(t) not in known}
        self.steps.append((func, args, kwargs or {}, tensors_of(result)))
        return result

    def play(self) -> None:
        for func, args, kwargs, results in self.steps:
            for kept, fresh in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
                if kept.data_ptr() != fresh.data_ptr():
                    kept.copy_(fresh)


class Recorder:
    """In place of CudaRecorder, for the CPU."""

    made: list[Recorder]
    thread = threading.local()
    fault: Exception | None = None

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"
        self.tapes: list[Tape] = []
        self.replays = self.finished = 0
        self.whose_turn: int | None = None
        self.made.append(self)

    @classmethod
    def is_recording(cls) -> bool:
        return getattr(cls.thread, "recording", False)

    @classmethod
    @contextmanager
    def recording(cls):
        cls.thread.recording = True
        try:
            yield
        finally:
            cls.thread.recording = False

    def warm_up(self, function) -> None:
        function()

    def record(self, function):
        assert not torch.is_inference_mode_enabled()
        if self.fault is not None:
            raise self.fault
        tape = Tape()
        with self.recording(), tape:
            results = function()
        for result in results:
            tape.between.pop(memory(result))
            spoil(result)
        self.tapes.append(tape)
        return partial(self.replay, tape), results

    def replay(self, tape: Tape) -> None:
        assert self.whose_turn == threading.get_ident()
        for other in self.tapes:
            for tensor in other.between.values():
                spoil(tensor)
        time.sleep(1e-4)
        tape.play()
        time.sleep(1e-4)
        self.replays += 1

    @contextmanager
    def turn(self):
        assert self.whose_turn is None
        self.whose_turn = threading.get_ident()
        try:
            yield
        finally:
            self.whose_turn = None

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def made(monkeypatch) -> list[Recorder]:
    """The stand-ins, in the order in which they were made."""
    found: list[Recorder] = []
    monkeypatch.setattr(Recorder, "made", found, raising=False)
    monkeypatch.setitem(RECORDERS, "cpu", Recorder)
    # The stand-in sees operations as tracers do, but the modules are to behave as with a real recording.
    is_traced = folding.is_traced
    monkeypatch.setattr(folding, "is_traced", lambda: not Recorder.is_recording() and is_traced())
    return found


def recordings(made: list[Recorder]) -> int:
    return sum(len(recorder.tapes) for recorder in made)


def replays(made: list[Recorder]) -> int:
    return sum(recorder.replays for recorder in made)


def visual_path(graphs: int = 4, dtype: torch.dtype = torch.float64, device: str = "cpu") -> VisualPath:
    path = VisualPath(pair()[0], lively(Projector(DIM, 24), 1).double().eval(), graphs=graphs).to(device, dtype)
    if device == "cpu":  # composed of ops, as on a GPU
        path.tower.backend = path.projector.backend = "torch"
    return path


def plain(path: VisualPath, x: Tensor, rectangles: Rectangles | None = None,
          present: Tensor | None = None) -> STABOutput:
    tokens, cu_seqlens, grid = path.tower(x, rectangles, present=present)
    return STABOutput(path.projector(tokens), cu_seqlens, grid)


def same(found: STABOutput, expected: STABOutput) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


def served(path: VisualPath, *args, times: int = 3, **kwargs) -> bool:
    """Whether every one of some calls gives the plain call's bits."""
    return all(same(path(*args, **kwargs), plain(path, *args, **kwargs)) for _ in range(times))


# What a call gives


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float", "uint8", "no mask", "present", "image"])
@torch.no_grad()
def test_the_bits_of_plain_calls(made, dtype, kind):
    path = visual_path(dtype=dtype)
    rectangles = Rectangles.from_corners(RECTANGLES[:2] if kind == "image" else RECTANGLES)
    for seed in range(4):
        x, present = pixels(frames=1 if kind == "image" else 4, seed=seed), None
        if kind == "uint8":
            x = (40 * x + 128).clamp(0, 255).to(torch.uint8)
        elif kind == "no mask":
            x = x[:, :, :3]
        elif kind == "present":
            present = torch.rand(2, 4, generator=torch.Generator().manual_seed(seed)) < 0.5
        assert same(path(x, rectangles, present=present), plain(path, x, rectangles, present))
    assert recordings(made) == 1 and replays(made) == 3


@torch.no_grad()
def test_the_tower_alone(made):
    path = visual_path()
    alone = VisualPath(path.tower)
    for seed in range(3):
        assert same(alone(pixels(seed=seed)), path.tower(pixels(seed=seed)))
    assert recordings(made) == 1


@torch.no_grad()
def test_other_corners_share_a_graph_if_they_hold_as_much(made):
    path, x = visual_path(), pixels()
    for corners in (RECTANGLES, MOVED, RECTANGLES, MOVED[2:] + MOVED[:2]):
        assert same(path(x, Rectangles.from_corners(corners)), plain(path, x, Rectangles.from_corners(corners)))
    assert recordings(made) == 1 and replays(made) == 3


@torch.no_grad()
def test_rectangles_are_read_from_the_mask_before(made):
    path, present = visual_path(), torch.ones(2, 4, dtype=torch.bool)
    for corners in (RECTANGLES, MOVED, RECTANGLES):
        assert served(path, pixels(rectangles=corners), times=2)
    assert recordings(made) == 1
    present[1, 2] = False  # a missing frame takes the whole grid
    assert served(path, pixels(), present=present)
    assert recordings(made) == 2


@torch.no_grad()
def test_strides_share_a_graph(made):
    path, x = visual_path(), pixels()
    for layout in (x, x.movedim(2, -1).contiguous().movedim(-1, 2), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert served(path, layout)
    assert recordings(made) == 1


@torch.no_grad()
def test_an_answer_is_the_callers(made):
    path, x = visual_path(), pixels()
    path(x)
    first = path(x)
    kept = STABOutput(*(t.clone() for t in first))
    second = path(pixels(seed=1))
    assert same(first, kept) and not torch.equal(second.tokens, first.tokens)
    for tensor in second:
        tensor.zero_()
    assert same(path(x), kept)


def test_inference_mode_and_its_contrary_share_a_graph(made):
    path = visual_path()
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            output = path(pixels())
            assert same(output, plain(path, pixels()))
            assert output.tokens.is_inference() == torch.is_inference_mode_enabled()
    assert recordings(made) == 1


# Which graphs are kept


def shape(i: int) -> Tensor:
    return torch.randn(1 + i, 1, 4, 28, 28, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


@torch.no_grad()
def test_the_least_recently_used_goes_first(made):
    path = visual_path(graphs=2)
    a, b, c = (shape(i) for i in range(3))

    def recorded(x: Tensor) -> int:
        before = recordings(made)
        assert same(path(x), plain(path, x))
        assert len(path._graphs._kept) <= 2
        return recordings(made) - before

    assert [recorded(x) for x in (a, a, b, b, a, b, a)] == [0, 1, 0, 1, 0, 0, 0]
    assert [recorded(x) for x in (c, c, a, c)] == [0, 1, 0, 0]  # b went
    assert [recorded(x) for x in (b, b, c, a, a)] == [0, 1, 0, 0, 1]  # a went, then came back
    assert len(made) == 1 and made[0].finished == 3


@torch.no_grad()
def test_a_shape_that_comes_once_is_not_recorded(made):
    path, usual = visual_path(graphs=1), shape(0)
    assert served(path, usual, times=2) and recordings(made) == 1
    for i in range(1, 6):
        path(shape(i))
        assert served(path, usual, times=1)
    assert recordings(made) == 1 and replays(made) == 6
    for _ in range(3):  # nor are more shapes in turn than are kept
        path(shape(1))
        path(shape(2))
    assert recordings(made) == 1


@torch.no_grad()
def test_what_does_not_share_a_graph(made):
    path, x, rectangles = visual_path(), pixels(), Rectangles.from_corners(RECTANGLES)
    for given in (x, x.float(), x.abs().to(torch.uint8), x[..., :56, :70]):  # by dtype, by size
        assert served(path, given, rectangles)
    assert recordings(made) == 4
    assert served(path, x, Rectangles.full(8, 4, 5)) and recordings(made) == 5  # by windows


@torch.no_grad()
def test_settings_that_are_no_tensors(made):
    path, x = visual_path(), pixels()
    assert served(path, x)
    path.tower.dec.backend = "nonesuch"
    with pytest.raises(RuntimeError, match="nonesuch"):
        path(x)
    path.tower.dec.backend = "torch"
    assert served(path, x) and recordings(made) == 1
    products = torch.backends.cuda.matmul
    precision = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        assert served(path, x) and recordings(made) == 2
        torch.use_deterministic_algorithms(True)
        assert served(path, x) and recordings(made) == 3
    finally:
        products.fp32_precision = precision
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("change", [optimizer_step, fused_step, in_place, buffer_in_place, load, load_assigned,
                                    replaced, through_data, rounded])
@torch.no_grad()
def test_a_change_of_the_weights_drops_the_graphs(made, change):
    path, x = visual_path(), pixels()
    assert served(path, x) and recordings(made) == 1
    before = path(x).tokens
    with torch.enable_grad():
        change(path.tower)
    after = path(x)
    assert same(after, plain(path, x)) and (after.tokens - before).abs().max() > 1e-5
    assert not path._graphs._kept and made[0].finished == 1
    assert served(path, x) and recordings(made) == 2


@pytest.mark.parametrize("change", [lambda p: p[0].weight.mul_(2), lambda p: p.load_state_dict(
    {n: t + 1 for n, t in p.state_dict().items()}), lambda p: (p[2].bias.data.add_(1), p.eval()),
    lambda p: setattr(p[2], "bias", nn.Parameter(torch.ones_like(p[2].bias)))])
@torch.no_grad()
def test_a_change_of_the_projector_drops_the_graphs(made, change):
    path, x = visual_path(), pixels()
    assert served(path, x)
    before = path(x)
    change(path.projector)
    assert not torch.equal(path(x).tokens, before.tokens) and served(path, x) and recordings(made) == 2


@torch.no_grad()
def test_another_dtype_drops_the_graphs(made):
    path = visual_path()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert served(path.to(dtype), pixels()) and path(pixels()).tokens.dtype == dtype
        assert len(path._graphs._kept) == 1
    assert recordings(made) == 3


@torch.no_grad()
def test_a_change_between_any_two_calls_records_nothing(made):
    path, x = visual_path(), pixels()
    for _ in range(4):
        assert served(path, x, times=1)
        path.tower.class_embedding.mul_(1.5)
    assert recordings(made) == 0


@torch.no_grad()
def test_a_change_while_it_is_recorded(made):
    """The graph is not kept, nor is what was folded meanwhile, which has no values yet."""
    path, x = visual_path(), pixels()
    path(x)
    record = Recorder.record

    def disturbed(self, function):
        path.tower.class_embedding.data = 2 * path.tower.class_embedding.data
        return record(self, function)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recorder, "record", disturbed)
        assert same(path(x), plain(path, x))
    assert recordings(made) == 1 and not path._graphs._kept
    assert served(path, x) and recordings(made) == 2


@torch.no_grad()
def test_what_is_folded_in_a_recording_is_not_kept(made):
    layer = nn.Linear(2, 2).eval()
    folded = Folded(layer, lambda module: module.weight * 2)
    with Recorder.recording():
        first = folded.get()
        assert folded.get() is not first
    kept = folded.get()
    with Recorder.recording():
        assert folded.get() is kept


@torch.no_grad()
def test_train_and_eval_drop_the_graphs(made):
    path = visual_path()
    assert served(path, pixels()) and path._graphs._kept
    path.eval()
    assert not path._graphs._kept and path._graphs._recorder is None and made[0].finished == 1
    assert served(path, pixels()) and recordings(made) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda path: pickle.loads(pickle.dumps(path))])
@torch.no_grad()
def test_copies_are_independent(made, duplicate):
    path, x = visual_path(graphs=3), pixels()
    assert served(path, x)
    twin = duplicate(path)
    assert twin._graphs.limit == 3 and not twin._graphs._kept
    twin.tower.class_embedding.mul_(2)
    assert served(twin, x) and served(path, x) and recordings(made) == 2
    assert not torch.equal(twin(x).tokens, path(x).tokens)


# Who may call


def call_in_threads(path: VisualPath, inputs: list[Tensor], expected: list[STABOutput], rounds: int) -> list[bool]:
    """Each input from a thread of its own, all at once, several times: whether each answer was right."""
    start, right = threading.Barrier(len(inputs)), []

    def run(x: Tensor, wanted: STABOutput) -> None:
        with torch.no_grad():
            start.wait()
            right.extend(same(path(x), wanted) for _ in range(rounds))

    threads = [threading.Thread(target=run, args=call, daemon=True) for call in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    for thread in threads:  # garbage for corners, which is what a race gives, can keep an op busy for ever
        thread.join(max(0.0, deadline - time.monotonic()))
    return right


@torch.no_grad()
def test_threads(made):
    path = visual_path(graphs=2)
    inputs = [shape(i % 3) + i for i in range(9)]  # of three shapes, so that graphs are recorded and dropped on the way
    expected = [plain(path, x) for x in inputs]
    assert call_in_threads(path, inputs, expected, 10) == [True] * 90
    assert recordings(made) and replays(made)


def frozen(path: VisualPath) -> None:
    path.requires_grad_(False)


@pytest.mark.parametrize("prepare, mode, input_of", [
    (lambda path: None, torch.enable_grad, pixels),
    (frozen, torch.enable_grad, lambda: pixels().requires_grad_()),
    (lambda path: path.tower.train(), torch.no_grad, pixels),
    (lambda path: path.tower.requires_grad_(False), torch.enable_grad, pixels),
    (lambda path: path.tower.lmhra1.train(), torch.no_grad, pixels),
    (lambda path: path.tower.dec.train(), torch.no_grad, pixels),
    (lambda path: path.projector.train(), torch.no_grad, pixels),
    (lambda path: path.float(), lambda: torch.autocast("cpu", torch.bfloat16), pixels),
    (lambda path: path.tower.dec.mlp.register_forward_hook(lambda *_: None), torch.no_grad, pixels),
    (lambda path: path.tower.register_forward_pre_hook(lambda *_: None), torch.no_grad, pixels),
    (lambda path: setattr(path.projector, "forward", path.projector.forward), torch.no_grad, pixels),
    (lambda path: None, torch.no_grad, lambda: nn.Parameter(pixels())),
    (lambda path: None, lambda: Tape(), pixels),
    (lambda path: path(pixels()), Recorder.recording, pixels),
], ids=["gradients", "gradients of pixels", "training", "gradients of the projector", "statistics in training",
        "dropout in training", "projector in training", "autocast", "hook", "hook of the tower", "another forward",
        "subclass", "tracing", "recorded by the caller"])
def test_no_effect(made, prepare, mode, input_of):
    path = visual_path()
    with torch.no_grad():
        prepare(path)
    for _ in range(3):
        with torch.no_grad(), mode():
            path(input_of())
    assert recordings(made) == 0


def test_gradients_of_no_weight_are_wanted(made):
    path = visual_path()
    frozen(path)
    assert served(path, pixels()) and recordings(made) == 1  # what the cases above would do otherwise


def test_gradients_are_right_after_a_recording(made):
    path = visual_path()
    with torch.no_grad():
        assert served(path, pixels())
    found, expected = (torch.autograd.grad(run(pixels()).tokens.square().sum(), list(path.projector.parameters()))
                       for run in (path, partial(plain, path)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_weights_made_in_inference_mode(made):
    with torch.inference_mode():
        path = visual_path()
        with pytest.warns(UserWarning, match="inference mode"):
            assert served(path, pixels())
    assert recordings(made) == 0


@torch.no_grad()
def test_none_are_kept_if_none_are_wanted(made):
    assert served(visual_path(graphs=0), pixels()) and not made
    with pytest.raises(ValueError, match="Graphs: limit: expected 0 or more, got -1"):
        visual_path(graphs=-1)


@torch.no_grad()
def test_the_cpu_has_no_graphs():
    path = visual_path()
    assert served(path, pixels()) and path._graphs._recorder is None and not path._graphs._seen


def test_compiling(made):
    path, x = visual_path(), pixels()
    torch._dynamo.reset()
    compiled = torch.compile(path, fullgraph=True, backend="eager")
    rectangles = Rectangles.from_corners(RECTANGLES)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x, rectangles), plain(path, x, rectangles))
    torch._dynamo.reset()
    assert recordings(made) == 0


# What goes wrong


@torch.no_grad()
def test_a_recording_that_fails(made, monkeypatch):
    path = visual_path()
    monkeypatch.setattr(Recorder, "fault", RuntimeError("no memory for it"))
    with pytest.warns(UserWarning) as caught:
        for seed in range(4):
            assert served(path, pixels(seed=seed))
    assert len(caught) == 1
    assert str(caught[0].message) == ("no graph can be recorded of inputs of shapes [2, 4, 3, 60, 71], [8, 4], which "
                                      "are served without one: RuntimeError: no memory for it")
    monkeypatch.setattr(Recorder, "fault", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert served(path, pixels()) and recordings(made) == 0  # nor is it tried again
        assert served(path, pixels(batch=1, rectangles=RECTANGLES[:4])) and recordings(made) == 1


def waits(x: Tensor) -> tuple[Tensor]:
    return (x * x.sum().item(),)


@torch.no_grad()
def test_what_waits_for_a_value_is_not_recorded(made):
    graphs, constant = Graphs(1), object()
    with pytest.warns(UserWarning, match=r"shapes \[3\].*not permitted when stream is capturing"):
        for i in range(4):
            x = torch.full((3,), float(i))
            assert graphs.call(waits, (x,), lambda: (constant,), None)[0].tolist() == [3.0 * i * i] * 3


@torch.no_grad()
def test_errors_are_those_of_plain_calls(made):
    path, x = visual_path(), pixels()
    outside = Rectangles.from_corners([*RECTANGLES[:7], (0, 4, 4, 6)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            with pytest.raises(ValueError, match="inside the grid of 4 x 5 in frame 7"):
                path(x, outside)
            with pytest.raises(ValueError, match="5 channels"):
                path(torch.cat([x, x[:, :, :1]], 2), Rectangles.from_corners(RECTANGLES))
            with pytest.raises(TypeError, match=r"present: expected torch.bool"):
                path(x, present=torch.ones(2, 4))
    assert served(path, x) and recordings(made) == 1


# Who uses it


@torch.no_grad()
def test_a_patched_model(made):
    model = Model(released_tower())
    project = model.video_projector
    expected = [model.video_tower(pixels(seed=seed), project) for seed in range(3)]
    patch(model, backend="torch")
    for seed in range(3):
        assert_same(model.video_tower(pixels(seed=seed), project), expected[seed])
    assert recordings(made) == 1 and replays(made) == 2
    model.eval()
    assert not model.video_tower._graphs._kept
    patch(other := Model(released_tower()), graphs=0)
    for _ in range(3):
        other.video_tower(pixels(), project)
    assert recordings(made) == 1


def test_encode(made):
    path = visual_path()
    model = encode.Model(path.tower, path.projector, "seeded")
    clip = SimpleNamespace(channels_first=torch.arange(8 * 3 * 56 * 70).view(8, 3, 56, 70).to(torch.uint8),
                           present=torch.ones(8, dtype=torch.bool), corners=torch.tensor(RECTANGLES))
    first, *others = [encode.encode_clip(model, clip) for _ in range(3)]
    assert recordings(made) == 1 and all(same(other, first) for other in others)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_real_graph_has_the_bits_of_plain_calls(dtype, mode):
    path = visual_path(dtype=dtype, device="cuda")
    with mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for corners in (RECTANGLES, MOVED, RECTANGLES, MOVED):
            for seed in range(2):
                x, rectangles = pixels(seed=seed).cuda(), Rectangles.from_corners(corners, device="cuda")
                bytes_in = (40 * x[:, :, :3] + 128).clamp(0, 255).to(torch.uint8)
                present = torch.arange(8, device="cuda").view(2, 4) != seed
                assert same(path(x), plain(path, x))
                assert same(path(x, rectangles), plain(path, x, rectangles))
                assert same(path(bytes_in, rectangles, present=present), plain(path, bytes_in, rectangles, present))
    assert len(path._graphs._kept) == 2


@pytest.mark.gpu
@torch.no_grad()
def test_a_real_graph_waits_for_nothing():
    path, x = visual_path(dtype=torch.float32, device="cuda"), pixels().cuda()
    rectangles = Rectangles.from_corners(RECTANGLES, device="cuda")
    assert served(path, x, rectangles)
    torch.cuda.set_sync_debug_mode("error")
    try:
        path(x, rectangles)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_a_real_graph_is_dropped_with_its_weights():
    path, x = visual_path(dtype=torch.float32, device="cuda"), pixels().cuda()
    for change in (in_place, buffer_in_place, replaced, load_assigned, rounded):
        assert served(path, x) and path._graphs._kept
        change(path.tower)
        assert served(path, x, times=1) and not path._graphs._kept


@pytest.mark.gpu
@torch.no_grad()
def test_memory_of_real_graphs_is_given_back():
    path = visual_path(graphs=1, dtype=torch.float32, device="cuda")
    small, large = pixels(batch=1, rectangles=RECTANGLES[:4]).float().cuda(), pixels().float().cuda()

    def held() -> int:
        plain(path, small)  # folded weights and the libraries' workspace are there at every look
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = held()
    path(small), path(small)
    one = held() - before
    assert one > 0
    for x in (large, large, small, small) * 2:
        path(x)
    assert held() - before == one
    path.eval()
    assert held() == before


def on_streams() -> tuple[VisualPath, dict[Tensor, tuple[torch.cuda.Stream, STABOutput]]]:
    """A path for fewer shapes than there are, and inputs, each with a stream of its own and what is expected."""
    path = visual_path(graphs=2, dtype=torch.float32, device="cuda")
    inputs = [shape(i % 3).float().cuda() + i for i in range(6)]
    calls = {x: (torch.cuda.Stream(), plain(path, x)) for x in inputs}
    torch.cuda.synchronize()
    return path, calls


@pytest.mark.gpu
@torch.no_grad()
def test_streams_take_turns():
    path, calls = on_streams()
    found = []
    for _ in range(20):
        for x, (stream, wanted) in calls.items():
            with torch.cuda.stream(stream):
                found.append((path(x), wanted))
    torch.cuda.synchronize()
    assert all(same(output, wanted) for output, wanted in found) and path._graphs._kept


@pytest.mark.gpu
@torch.no_grad()
def test_threads_on_streams_of_their_own():
    path, calls = on_streams()

    class OnStream:
        def __call__(self, x: Tensor) -> STABOutput:
            with torch.cuda.stream(calls[x][0]):
                output = path(x)
                torch.cuda.current_stream().synchronize()
                return output

    expected = [wanted for _, wanted in calls.values()]
    assert call_in_threads(OnStream(), list(calls), expected, 20) == [True] * 120


@pytest.mark.gpu
@torch.no_grad()
def test_inside_a_recording_of_the_caller():
    path, x = visual_path(dtype=torch.float32, device="cuda"), pixels().float().cuda()
    rectangles = Rectangles.from_corners(RECTANGLES, device="cuda")
    assert served(path, x, rectangles)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = path(x, rectangles)
    graph.replay()
    assert same(output, plain(path, x, rectangles))


@pytest.mark.gpu
@torch.no_grad()
def test_a_real_recording_that_fails_leaves_the_stream():
    graphs, x, constant = Graphs(1), torch.ones(3, device="cuda"), object()
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="served without one"):
        for _ in range(3):
            assert graphs.call(waits, (x,), lambda: (constant,), None)[0].tolist() == [3.0] * 3
    assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
