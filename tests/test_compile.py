"""The modules under ``torch.compile``, ``torch.export`` and fake tensors: whole graphs, few recompiles, no waiting."""
from __future__ import annotations

import copy

import pytest
import torch
from test_nn import DIM, lively, pair, pixels
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from panda_kernels.nn import STAB, Projector, STABOutput
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import relative_error

CORNERS = [(0, 4, 0, 5), (1, 4, 0, 5), (0, 4, 2, 4), (0, 3, 1, 5)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def clips(batch: int, frames: int, rows: int = 4, cols: int = 5, seed: int = 0) -> tuple[Tensor, Rectangles]:
    """Frames of ``rows x cols`` patches without a mask, and rectangles of which no two neighbours are alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, 3, 14 * rows, 14 * cols, generator=generator, dtype=torch.float64)
    corners = [(CORNERS[i % 4][0], rows, CORNERS[i % 4][2], cols) for i in range(batch * frames)]
    return x, Rectangles.from_corners(corners)


def step(model: torch.nn.Module, x: Tensor, rectangles: Rectangles) -> tuple[STABOutput, dict[str, Tensor]]:
    """Forward and backward; the output and all gradients."""
    leaf = x.clone().requires_grad_()
    model.zero_grad()
    output = model(leaf, rectangles)
    output.tokens.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output, {"pixels": leaf.grad, **gradients}


def names_without_wrapper(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}


def assert_same_step(found, expected) -> None:
    assert relative_error(found[0].tokens.detach(), expected[0].tokens.detach()) < 1e-12
    assert found[0].grid.tolist() == expected[0].grid.tolist()
    assert found[0].cu_seqlens.tolist() == expected[0].cu_seqlens.tolist()
    gradients = names_without_wrapper(found[1])
    assert gradients.keys() == expected[1].keys()
    assert all(relative_error(gradients[name], gradient) < 1e-10 for name, gradient in expected[1].items())


@pytest.mark.parametrize("train", [False, True])
def test_one_recompile_serves_every_size(train):
    tower = pair(dropout=0.0)[0].train(train)
    twin = copy.deepcopy(tower)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tower, fullgraph=True, backend=counter)
    # torch takes the sizes that differ at the second call as free from then on.
    for sizes in ((2, 4, 4, 5), (3, 5, 6, 7), (4, 5, 6, 7), (3, 3, 6, 7), (3, 4, 5, 7), (2, 4, 4, 4)):
        x, rectangles = clips(*sizes)
        assert_same_step(step(compiled, x, rectangles), step(twin, x, rectangles))
    assert counter.frame_count <= 2
    for (name, found), expected in zip(tower.named_buffers(), twin.buffers(), strict=True):
        assert relative_error(found.double(), expected.double()) < 1e-12, name
    assert tower.lmhra1.pos_embed[0].num_batches_tracked == (6 if train else 0)


def test_images():
    tower = pair()[0]
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    x, rectangles = clips(2, 1)
    assert_same_step(step(compiled, x, rectangles), step(tower, x, rectangles))


def test_inference_sees_changed_weights():
    tower = pair()[0]
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    x, rectangles = clips(2, 4)
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(compiled(x, rectangles).tokens, tower(x, rectangles).tokens) < 1e-12
            tower.class_embedding.mul_(2)


def test_dropout_is_part_of_the_graph():
    tower = lively(STAB(DIM)).double().train()
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    x, rectangles = clips(2, 4)
    assert not torch.equal(compiled(x, rectangles).tokens, compiled(x, rectangles).tokens)


def test_projector():
    projector = lively(Projector(DIM, 24)).double()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(projector, fullgraph=True, backend=counter)
    for tokens in (5, 9, 17):
        x = torch.randn(tokens, DIM, dtype=torch.float64)
        compiled(x).sum().backward()
        found = names_without_wrapper({n: p.grad for n, p in compiled.named_parameters()})
        projector.zero_grad(set_to_none=True)
        assert relative_error(compiled(x).detach(), projector(x).detach()) < 1e-12
        projector(x).sum().backward()
        assert all(relative_error(found[n], p.grad) < 1e-12 for n, p in projector.named_parameters())
        projector.zero_grad(set_to_none=True)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    tower = pair()[0]
    x, rectangles = clips(2, 4)
    program = torch.export.export(tower, (x, rectangles), strict=strict)
    other, _ = clips(2, 4, seed=1)
    found, expected = program.module()(other, rectangles), tower(other, rectangles)
    assert relative_error(found.tokens.detach(), expected.tokens.detach()) < 1e-12
    assert torch.equal(found.cu_seqlens, expected.cu_seqlens) and torch.equal(found.grid, expected.grid)
    assert {str(node.target) for node in program.graph.nodes} >= {
        f"panda_kernels.{op}.default" for op in ("patch_embed", "local_encoding", "attention_pool",
                                                 "window_attention_pool", "assemble_tokens")}
    encoding = next(node for node in program.graph.nodes if str(node.target) == "panda_kernels.local_encoding.default")
    assert all(encoding.args[11:13]), "the bottleneck is not taken from the pixels and the embedding"


@pytest.mark.parametrize("frames", [4, 1])
@pytest.mark.parametrize("train", [False, True])
def test_given_rectangles_nothing_waits_for_the_device(frames, train):
    with FakeTensorMode(allow_non_fake_inputs=False):
        tower = STAB(DIM).train(train)
        x = torch.empty(2, frames, 4, 56, 70, requires_grad=True)
        corners = torch.empty(2 * frames, 4, dtype=torch.int64)
        present = torch.empty(2, frames, dtype=torch.bool)
        output = tower(x, Rectangles(corners, 30, 50), present=present)
        output.tokens.sum().backward()
        assert output.tokens.shape == (50, DIM) and x.grad.shape == x.shape
        assert output.cu_seqlens.shape == (2 * frames + 1,) and output.grid.shape == (2 * frames, 2)
        with pytest.raises(DataDependentOutputException):  # what reading a value, the negative control, looks like
            output.cu_seqlens.tolist()


def test_folded_inference_reads_no_value_of_a_fake_device():
    with FakeTensorMode(), torch.no_grad():
        tower = STAB(DIM).eval()
        output = tower(torch.empty(2, 4, 3, 56, 70), Rectangles(torch.empty(8, 4, dtype=torch.int64), 30, 50))
        assert output.tokens.shape == (50, DIM)


def test_tracing_leaves_nothing_fake_behind():
    tower, reference = pair()
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tower(mode.from_tensor(pixels()[:, :, :3]), Rectangles(torch.empty(8, 4, dtype=torch.int64), 30, 50))
        assert relative_error(tower(pixels()).tokens, torch.cat(reference(pixels(), torch.nn.Identity())[0])) < 1e-12
