"""The Video-Panda patch, on a stand-in with the released interface: same tensors, same answers, a report, an undo."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_nn import DIM, EXACT, lively, pixels
from torch import nn

import python_ref
from panda_kernels.backends import BackendError
from panda_kernels.integrations.video_panda import PandaTower, patch
from panda_kernels.spec import relative_error


class VideoTokenizer(python_ref.STAB):
    """The released tower's name and attributes, one that ours lacks among them."""

    image_processor = "processor"

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.local_attention.conv_stride = self.window

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype


class Model(nn.Module):
    """One tower under two names, as released."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.video_tower = tower
        self.vision_tower = tower
        self.video_projector = nn.Linear(DIM, 3).double()


class Wrapper(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.model = Model(tower)


def tower(**options) -> VideoTokenizer:
    return lively(VideoTokenizer(DIM, **options).double()).eval()


def identities(module: nn.Module) -> dict[str, int]:
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: id(tensor) for name, tensor in named}


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape and relative_error(x.detach(), y.detach()) < EXACT


@pytest.mark.parametrize("frames", [4, 1])
def test_the_released_call(frames):
    model, x = Wrapper(tower()), pixels(frames=frames)
    expected = model.model.video_tower(x, model.model.video_projector)
    handle = patch(model)
    assert isinstance(model.model.video_tower, PandaTower)
    found = model.model.video_tower(x, model.model.video_projector)
    assert_same(found, expected)
    assert isinstance(found[0], list) and isinstance(found[1], list) and len(found[0]) == len(found[1]) == 2 * frames
    assert all(grid.dtype == torch.int64 and grid.shape == (2,) for grid in found[1])
    assert handle.report.replaced == ["model.video_tower", "model.vision_tower"]
    assert not handle.report.skipped and not handle.report.dropped
    assert str(handle.report) == "model.video_tower: replaced\nmodel.vision_tower: replaced"


def test_the_callable_is_given_one_frame_at_a_time():
    model, lengths = Model(tower()), []
    patch(model)
    found, grids = model.video_tower(pixels(), lambda tokens: lengths.append(tokens.shape) or tokens.mean())
    assert lengths == [(1 + h * (w + 1), DIM) for h, w in (grid.tolist() for grid in grids)]
    assert all(mean.ndim == 0 for mean in found)


def test_shared_towers_stay_shared_and_state_dicts_alike():
    model = Wrapper(tower())
    before, state = identities(model), set(model.state_dict())
    patch(model)
    assert model.model.video_tower is model.model.vision_tower
    assert set(model.state_dict()) == state and identities(model) == before
    model.load_state_dict(model.state_dict())


def test_gradients_and_optimizers_carry_on():
    models = [Wrapper(tower(dropout=0.0)).train()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    patch(models[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        frames, _ = model.model.video_tower(pixels(), model.model.video_projector)
        torch.cat(frames).square().mean().backward()
        optimizer.step()
    expected = models[1].state_dict()
    for name, tensor in models[0].state_dict().items():
        assert relative_error(tensor.double(), expected[name].double()) < 1e-10, name


def test_attributes_and_modes_are_the_released_ones():
    released = tower().train()
    released.proj.eval()
    released.dec.eval()
    model = Model(released)
    patch(model)
    ours = model.video_tower
    assert ours.image_processor == "processor" and ours.dtype == torch.float64
    assert ours.training and ours.local_attention.training and ours.dec.ln_1.training is released.dec.ln_1.training
    assert not ours.proj.training and not ours.dec.training
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = ours.nonesuch


def test_other_arithmetic_is_taken_from_the_released_modules():
    released = tower(num_heads=4, gstra_heads=2, patch=7, dropout=0.25)
    model = Model(released)
    expected = released(pixels(), nn.Identity())
    patch(model)
    assert_same(model.video_tower(pixels(), nn.Identity()), expected)
    assert model.video_tower.dec.mlp.dropout.p == model.video_tower.proj[1].p == 0.25
    released = tower(window=3)
    model, x = Model(released), pixels(rectangles=[(0, 4, 0, 5)] * 8)
    expected = released(x, nn.Identity())
    patch(model)
    assert_same(model.video_tower(x, nn.Identity()), expected)


def test_undo():
    model = Wrapper(tower())
    released = model.model.video_tower
    handle = patch(model)
    model.float().double().train()
    with torch.no_grad():
        model.model.video_tower.class_embedding.add_(1)
        model.model.video_tower(pixels(), nn.Identity())
    model.model.video_tower.class_embedding = nn.Parameter(torch.ones(DIM, dtype=torch.float64))
    patched = identities(model)
    handle.undo()
    assert model.model.video_tower is released and model.model.vision_tower is released
    assert identities(model) == patched
    assert all(module.training for module in model.modules())
    assert released.lmhra1.pos_embed[0].num_batches_tracked == 1
    handle.undo()
    assert model.model.video_tower is released


def test_undo_refuses_what_is_no_longer_its_own():
    model = Model(tower())
    handle = patch(model)
    model.vision_tower = other = nn.Identity()
    with pytest.raises(RuntimeError, match=r"Model.vision_tower no longer holds what patch put there"):
        handle.undo()
    assert model.vision_tower is other and isinstance(model.video_tower, PandaTower)


class Incomplete(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(2, 2)


Incomplete.__name__ = "VideoTokenizer"


def wrong_shape() -> nn.Module:
    released = tower()
    released.split_embedding = nn.Parameter(torch.zeros(DIM + 1))
    return released


def extra_parameter() -> nn.Module:
    released = tower()
    released.dec.adapter = nn.Linear(2, 2)
    return released


def missing_parameter() -> nn.Module:
    released = tower()
    released.dpe.bias = None
    return released


def other_norm() -> nn.Module:
    released = tower()
    released.lmhra1.pos_embed[0] = nn.BatchNorm1d(DIM)
    return released


def two_head_counts() -> nn.Module:
    released = tower()
    released.global_attention.num_heads = 4
    return released


def test_synchronised_statistics_are_taken_over():
    model = Model(tower())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert patch(model).report.replaced


@pytest.mark.parametrize("build, reason", [
    (Incomplete, "has no patch_embedding, lmhra1, dpe, dec, local_attention, global_attention, class_embedding"),
    (wrong_shape, f"split_embedding is [{DIM + 1}], expected [{DIM}]"),
    (extra_parameter, "has dec.adapter.weight; has dec.adapter.bias"),
    (missing_parameter, "has no dpe.bias"),
    (other_norm, "lmhra1.pos_embed.0 is BatchNorm1d, expected BatchNorm3d"),
    (two_head_counts, "global_attention has 4 heads, local_attention 8"),
])
def test_what_does_not_fit_is_left_alone_and_said(build, reason):
    model = Model(tower())
    model.other = nn.ModuleDict({"deep": build()})
    misfit = model.other["deep"]
    handle = patch(model)
    assert model.other["deep"] is misfit and isinstance(model.video_tower, PandaTower)
    assert reason in handle.report.skipped["other.deep"]
    assert f"other.deep: not replaced: {handle.report.skipped['other.deep']}" in str(handle.report)
    handle.undo()
    assert model.other["deep"] is misfit


def test_nothing_to_replace():
    report = patch(nn.Linear(2, 2)).report
    assert not report.replaced and str(report) == "no VideoTokenizer found"
    assert "is the model itself" in patch(tower()).report.skipped["VideoTokenizer"]
    model = Model(tower())
    patch(model)
    assert not patch(model).report.replaced


def test_hooks_are_reported():
    model = Wrapper(tower())
    released, calls = model.model.video_tower, []
    released.dpe.register_forward_hook(lambda *_: calls.append(1))
    released.register_forward_pre_hook(lambda *_: calls.append(2))
    released.dec.forward = released.dec.forward
    report = patch(model).report
    assert report.dropped == [f"model.{name}{part}" for name in ("video_tower", "vision_tower")
                              for part in ("", ".dpe", ".dec")]
    assert "model.video_tower.dpe: its hooks are not called" in str(report)
    model.model.video_tower(pixels(), nn.Identity())
    assert not calls


def test_backend():
    model = Model(tower())
    with pytest.raises(BackendError, match="'nonesuch': no such backend"):
        patch(model, backend="nonesuch")
    assert isinstance(model.video_tower, VideoTokenizer)
    patch(model, backend="torch")
    assert model.video_tower.backend == "torch" and model.video_tower.dec.backend == "torch"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_patched_models_copy(duplicate):
    model = Model(tower())
    patch(model)
    expected = model.video_tower(pixels(), model.video_projector)
    twin = duplicate(model)
    with torch.no_grad():
        assert_same(twin.video_tower(pixels(), twin.video_projector), expected)
        model.video_tower.class_embedding.zero_()
        assert_same(twin.video_tower(pixels(), twin.video_projector), expected)
    assert twin.video_tower.image_processor == "processor"


def test_pixels_without_a_mask_are_refused():
    model = Model(tower())
    patch(model)
    with pytest.raises(ValueError, match="validity mask"):
        model.video_tower(pixels()[:, :, :3], nn.Identity())
