"""The modules: names, initialisation, parts, inputs, training behaviour, folded weights and errors."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from golden import weights as golden
from torch import Tensor, nn

import python_ref
from panda_kernels import backends
from panda_kernels.nn import FSRA, GSTRA, LSD, LSTE, STAB, Projector, split_chunks
from panda_kernels.nn.folding import Folded, can_fold
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import relative_error
from python_ref.lste import LocalMHRA, lste, position_encoding

DIM = 64
EXACT = 1e-12
RECTANGLES = [(0, 4, 0, 5), (1, 4, 0, 5), (0, 4, 2, 4), (0, 3, 1, 5)] * 2


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with no weight idle: at its initialisation some branches are zero and could hide any fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.ndim > 1:
                value.copy_(noise * value[0].numel() ** -0.5)
            elif name.endswith(("weight", "running_var")):
                value.copy_(1 + 0.1 * noise.clamp(-2, 2))
            else:
                value.copy_(0.3 * noise)
    return module


def pair(dim: int = DIM, **options) -> tuple[STAB, python_ref.STAB]:
    """Our tower and the reference with the same weights, float64, evaluation mode."""
    reference = lively(python_ref.STAB(dim, **options).double()).eval()
    ours = STAB(dim, dtype=torch.float64, **options).eval()
    ours.load_state_dict(reference.state_dict())
    return ours, reference


def pixels(batch: int = 2, frames: int = 4, rectangles=RECTANGLES, seed: int = 0) -> Tensor:
    """float64 frames of 4 x 5 patches (and a few pixels more) with their masks."""
    x = torch.randn(batch * frames, 4, 60, 71, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 3] = 0
    for i in range(batch * frames):
        row0, row1, col0, col1 = (14 * v for v in rectangles[i])
        x[i, 3, row0:row1, col0:col1] = 1
    return x.unflatten(0, (batch, frames))


def by_reference(reference: python_ref.STAB, x: Tensor) -> Tensor:
    return torch.cat(reference(x, nn.Identity())[0])


# Names and initialisation


@pytest.mark.parametrize("cls", [STAB, python_ref.STAB])
def test_names_and_shapes_are_the_released_ones(cls):
    shapes = {name: tuple(tensor.shape) for name, tensor in cls().state_dict().items()}
    assert shapes == golden.SHAPES


@pytest.mark.parametrize("dim", [1024, 1152, 1408])
def test_released_widths(dim):
    ours, reference = STAB(dim, device="meta"), python_ref.STAB(dim).to("meta")
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in reference.state_dict().items()}
    assert ours.dec.attn.num_heads == reference.dec.attn.num_heads == (11 if dim == 1408 else 8)
    assert ours.local_attention.num_heads == ours.global_attention.num_heads == 8


def test_initialisation_is_the_released_one():
    towers = []
    for cls in (STAB, python_ref.STAB):
        torch.manual_seed(3)
        towers.append(cls(DIM))
    ours, reference = (tower.state_dict() for tower in towers)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)
    zero = {name for name, tensor in ours.items() if not tensor.any()}
    norms = ("dec.ln_1", "dec.ln_2", "dec.ln_3", "proj.0", "local_attention.q.0", "local_attention.kv.0",
             "global_attention.q.0", "global_attention.kv.0", "lmhra1.pos_embed.0", "lmhra2.pos_embed.0")
    assert zero - {f"{norm}.bias" for norm in norms} == {
        "balance", "temporal_cls_token", "dpe.bias", "dec.attn.in_proj_bias", "dec.attn.out_proj.weight",
        "dec.attn.out_proj.bias", "dec.mlp.c_proj.weight", "dec.mlp.c_proj.bias",
        *(f"lmhra{i}.pos_embed.{n}" for i in (1, 2)
          for n in ("3.weight", "3.bias", "0.running_mean", "0.num_batches_tracked"))}
    assert 0.8 < float(ours["class_embedding"].std()) < 1.2


def test_state_dict_is_strict_and_makes_the_round_trip():
    source, target = lively(STAB(DIM)), STAB(DIM)
    target.load_state_dict(source.state_dict())
    state = source.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.state_dict().items())
    del state["lmhra2.pos_embed.1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing.*lmhra2.pos_embed.1.weight"):
        target.load_state_dict(state)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_are_independent(duplicate):
    tower, x = pair()[0], pixels()
    with torch.no_grad():
        before = tower(x).tokens
        twin = duplicate(tower)
        assert torch.equal(twin(x).tokens, before)
        twin.class_embedding.mul_(2)
        twin.temporal_cls_token.mul_(2)
        assert not torch.equal(twin(x).tokens, before)
        assert torch.equal(tower(x).tokens, before)


# The parts alone


def test_lste():
    x = torch.randn(2, 4, 3, 5, DIM, dtype=torch.float64)
    ours = lively(LSTE(DIM, dtype=torch.float64)).eval()
    reference = nn.ModuleDict({"lmhra1": LocalMHRA(DIM), "dpe": position_encoding(DIM)}).double().eval()
    reference.load_state_dict(ours.state_dict())
    expected = lste(x.movedim(-1, 1), reference["lmhra1"], reference["dpe"]).movedim(1, -1)
    assert relative_error(ours(x).detach(), expected.detach()) < EXACT


@pytest.mark.parametrize("num_heads", [8, 4])
def test_gstra(num_heads):
    x, query = torch.randn(3, 20, DIM, dtype=torch.float64), torch.randn(1, 1, DIM, dtype=torch.float64)
    ours = lively(GSTRA(DIM, num_heads, dtype=torch.float64)).eval()
    reference = python_ref.gstra.GSTRA(DIM, num_heads).double().eval()
    reference.load_state_dict(ours.state_dict())
    assert relative_error(ours(query, x), reference(query.expand(1, 3, -1), x.transpose(0, 1))) < EXACT


def test_lsd_and_fsra():
    rectangles = Rectangles.from_corners(RECTANGLES[:4])
    x, query = torch.randn(4, 4, 5, DIM, dtype=torch.float64), torch.randn(DIM, dtype=torch.float64)
    lsd, fsra = (lively(cls(DIM, dtype=torch.float64)) for cls in (LSD, FSRA))
    lsd_reference, fsra_reference = python_ref.lsd.LSD(DIM).double(), python_ref.fsra.FSRA(DIM).double()
    lsd_reference.load_state_dict(lsd.state_dict())
    fsra_reference.load_state_dict(fsra.state_dict())
    y, f, frames = lsd(x, rectangles), [], []
    for frame, (row0, row1, col0, col1) in zip(x, RECTANGLES[:4], strict=True):
        frames.append(lsd_reference(frame[row0:row1, col0:col1]).flatten(0, 1))
        f.append(fsra_reference(query, frames[-1]))
    assert relative_error(y, torch.cat(frames)) < EXACT
    assert relative_error(fsra(query, y, rectangles.cu_windows()), torch.stack(f)) < EXACT


@pytest.mark.parametrize("width", [(16, 40), (24, 16)])
def test_projector(width):
    ours, x = Projector(*width, dtype=torch.float64), torch.randn(7, width[0], dtype=torch.float64)
    reference = python_ref.projector.Projector(*width).double()
    reference.load_state_dict(ours.state_dict())
    assert relative_error(ours(x), reference(x)) < EXACT


def test_split_chunks_keeps_the_order():
    video = torch.arange(2 * 8 * 3).view(2, 8, 3)
    assert torch.equal(split_chunks(video).flatten(0, 1), video.flatten(0, 1))
    assert split_chunks(video).shape == (4, 4, 3) and split_chunks(video, 2).shape == (8, 2, 3)


@pytest.mark.parametrize("shape, chunk, error", [((1, 6, 3), 4, "multiple of 4.*got 6"), ((1, 0, 3), 4, "got 0"),
                                                 ((8,), 4, r"\[V, T_all"), ((1, 8), 0, "at least 1 frame, got 0")])
def test_split_chunks_refuses(shape, chunk, error):
    with pytest.raises(ValueError, match=f"split_chunks.*{error}"):
        split_chunks(torch.zeros(shape), chunk)


# Inputs


@pytest.mark.parametrize("frames", [4, 1, 3])
def test_tower(frames):
    ours, reference = pair()
    x = pixels(frames=frames)
    output = ours(x)
    tokens, grids = reference(x, nn.Identity())
    assert relative_error(output.tokens, torch.cat(tokens)) < EXACT
    assert output.grid.tolist() == torch.stack(grids).tolist() and output.grid.dtype == torch.int64
    assert output.cu_seqlens.diff().tolist() == [len(frame) for frame in tokens]
    assert output.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("options", [{"patch": 7, "window": 3}, {"num_heads": 4, "gstra_heads": 16},
                                     {"lste_reduction": 2.5}, {"dim": 48}])
def test_other_sizes(options):
    ours, reference = pair(**{"dim": DIM, **options})
    x = pixels(rectangles=[(0, 4, 0, 5)] * 8)
    assert relative_error(ours(x).tokens, by_reference(reference, x)) < EXACT


def test_given_rectangles_the_mask_is_not_read():
    tower, x = pair()[0], pixels()
    rectangles = Rectangles.from_corners(RECTANGLES)
    expected = tower(x).tokens
    x[:, :, 3] = float("nan")
    assert torch.equal(tower(x, rectangles).tokens, expected)
    assert torch.equal(tower(x[:, :, :3], rectangles).tokens, expected)


def test_uint8_pixels_are_normalised():
    ours, reference = pair()
    x = torch.randint(0, 256, (2, 4, 4, 60, 71), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    x[:, :, 3] = pixels()[:, :, 3]
    floats = torch.cat([python_ref.patch.normalise(x[:, :, :3]), x[:, :, 3:]], 2)
    assert relative_error(ours(x).tokens, by_reference(reference, floats)) < 1e-6  # the constants are float32 ones


def test_a_missing_frame_counts_as_zero_pixels_and_mask():
    ours, reference = pair()
    x, present = pixels(), torch.ones(2, 4, dtype=torch.bool)
    present[0, 2] = present[1, 3] = False
    zeroed = x * present[:, :, None, None, None]
    assert relative_error(ours(x, present=present).tokens, by_reference(reference, zeroed)) < EXACT


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("frames", [4, 3, 1])
@pytest.mark.parametrize("with_missing", [False, True])
def test_inference_of_every_kind_of_input(frames, with_missing, dtype, limit):
    ours, reference = pair()
    ours.to(dtype)
    bytes_in = torch.randint(0, 256, (2, frames, 4, 60, 71), generator=torch.Generator().manual_seed(1)).byte()
    bytes_in[:, :, 3] = pixels(frames=frames)[:, :, 3]
    floats = torch.cat([python_ref.patch.normalise(bytes_in[:, :, :3]), bytes_in[:, :, 3:]], 2)
    present = torch.ones(2, frames, dtype=torch.bool)
    present[1, -1] = not with_missing
    with torch.no_grad():
        expected = by_reference(reference, floats * present[:, :, None, None, None])
        channels_last = floats.movedim(2, -1).contiguous().movedim(-1, 2)
        for x in (bytes_in, floats, floats.float(), channels_last.float(), floats.to(dtype)):
            assert relative_error(ours(x, present=present).tokens, expected) < limit, (x.dtype, x.stride())


def test_strides_do_not_matter():
    tower, x = pair()[0], pixels()
    layouts = [x.movedim(2, -1).contiguous().movedim(-1, 2), x.transpose(0, 1).contiguous().transpose(0, 1),
               torch.stack([x, x], -1)[..., 0]]
    for layout in layouts:
        assert not layout.is_contiguous() and torch.equal(tower(layout).tokens, tower(x).tokens)


def test_clips_do_not_see_one_another():
    tower, x = pair()[0], pixels()
    rectangles = Rectangles.from_mask(x[:, :, 3])
    clip = tower(x[1:]).tokens
    x[0] = float("nan")
    whole = tower(x, rectangles)
    assert relative_error(whole.tokens[whole.cu_seqlens[4]:], clip) < EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pixels_are_cast_to_the_weights(dtype):
    tower, x = lively(STAB(DIM)).eval(), pixels().bfloat16()
    with torch.no_grad():
        output = tower(x.to(dtype)).tokens
        assert output.dtype == torch.float32
        assert relative_error(output, tower(x.float()).tokens) < 1e-6


def test_autocast():
    tower, x = lively(STAB(DIM)).eval(), pixels().float()
    reference = lively(python_ref.STAB(DIM)).eval()
    reference.load_state_dict(tower.state_dict())
    exact = by_reference(copy.deepcopy(reference).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        output, released = tower(x).tokens, by_reference(reference, x)
    assert relative_error(output, exact) <= 1.2 * relative_error(released, exact)
    tower.train()
    with torch.autocast("cpu", torch.bfloat16):
        tower(x).tokens.float().sum().backward()
    assert tower.patch_embedding.weight.grad.isfinite().all()


@pytest.mark.parametrize("shape, error", [
    ((2, 4, 60, 71), r"pixel_values: expected shape \[B, T, 3 or 4, H, W\]"),
    ((2, 4, 5, 60, 71), "5 channels"),
    ((2, 4, 3, 60, 71), "validity mask as 4th channel, or rectangles"),
    ((0, 4, 4, 60, 71), "at least one element"),
    ((2, 4, 4, 13, 71), "at least a patch, 14 x 14 pixels, got 13 x 71"),
    ((2, 4, 4, 60, 13), "at least a patch"),
])
def test_refuses_pixels(shape, error):
    with pytest.raises(ValueError, match=f"STAB.*{error}"):
        STAB(DIM, device="cpu")(torch.ones(shape))


@pytest.mark.parametrize("corners, error", [
    (RECTANGLES[:7], r"rectangles.corners: expected shape \[8, 4\], got \[7, 4\]"),
    ([(0, 5, 0, 5), *RECTANGLES[1:]], "inside the grid of 4 x 5 in frame 0"),
    ([*RECTANGLES[:7], (0, 4, 4, 6)], "inside the grid of 4 x 5 in frame 7"),
])
@pytest.mark.parametrize("gradients", [True, False])
def test_refuses_rectangles(corners, error, gradients):
    with pytest.raises(ValueError, match=error), torch.set_grad_enabled(gradients):
        STAB(DIM).eval()(pixels().float(), Rectangles.from_corners(corners))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("wrong", [{"num_windows": 19}, {"num_tokens": 41}])
def test_refuses_totals_that_the_corners_do_not_hold(wrong, gradients):
    rectangles = Rectangles.from_corners(RECTANGLES)._replace(**wrong)
    with pytest.raises(ValueError, match="which the corners hold"), torch.set_grad_enabled(gradients):
        STAB(DIM).eval()(pixels().float(), rectangles)


def test_refuses_integer_pixels_that_are_not_uint8():
    with pytest.raises(TypeError, match=r"pixel_values: expected a floating dtype or torch.uint8, got torch.int32"):
        STAB(DIM)(pixels().int())


def test_refuses_rectangles_smaller_than_a_window():
    with pytest.raises(ValueError, match=r"frame 1.*window of 2 x 2"):
        Rectangles.from_corners([(0, 4, 0, 4), (0, 1, 0, 4)])
    with pytest.raises(ValueError, match="3 x 3 patches"):
        STAB(DIM, window=3)(pixels().float(), Rectangles.from_corners([(0, 2, 0, 2)] * 8))


def test_refuses_a_mask_that_is_no_rectangle():
    x = pixels().float()
    x[1, 2, 3] = 0
    x[1, 2, 3, 0:14, 56:70] = x[1, 2, 3, 42:56, 0:14] = 1
    with pytest.raises(ValueError, match="frame 6"):
        STAB(DIM)(x)


@pytest.mark.parametrize("present, error", [
    (torch.ones(4, 2, dtype=torch.bool), (ValueError, r"present: expected shape \[2, 4\]")),
    (torch.ones(2, 4), (TypeError, "present: expected torch.bool")),
])
def test_refuses_present(present, error):
    with pytest.raises(error[0], match=error[1]):
        STAB(DIM)(pixels().float(), present=present)


def test_refuses_mixed_devices():
    tower, x, rectangles = STAB(DIM, device="meta"), pixels().float(), Rectangles.from_corners(RECTANGLES)
    with pytest.raises(ValueError, match="pixel_values: expected device meta"):
        tower(x, rectangles)
    with pytest.raises(ValueError, match=r"rectangles.corners: expected device meta"):
        tower(x.to("meta"), rectangles)


@pytest.mark.parametrize("build", [lambda: GSTRA(64, 7), lambda: LSD(64, 7), lambda: FSRA(64, 7),
                                   lambda: STAB(60), lambda: STAB(64, gstra_heads=11)])
def test_refuses_heads_that_do_not_divide(build):
    with pytest.raises(ValueError, match="num_heads: expected a divisor of dim"):
        build()


def test_parts_refuse_another_width():
    wrong = torch.zeros(2, 4, 4, 4, DIM // 2)
    with pytest.raises(ValueError, match=r"LSTE: x: expected shape \[B, T, h, w, 64\]"):
        LSTE(DIM)(wrong)
    with pytest.raises(ValueError, match="attention_pool: queries"):
        GSTRA(DIM)(torch.zeros(DIM), wrong.flatten(1, 3))
    with pytest.raises(ValueError, match="window_attention_pool"):
        LSD(DIM)(wrong[:, 0], Rectangles.full(2, 4, 4))
    with pytest.raises(ValueError, match="token_mlp"):
        Projector(DIM, 8)(wrong)


def test_the_backend_reaches_every_part():
    tower = STAB(DIM)
    tower.backend = "nonesuch"
    assert {part.backend for part in (tower, tower.dec, tower.local_attention, tower.global_attention)} == {"nonesuch"}
    with pytest.raises(backends.BackendError, match="nonesuch"):
        tower(pixels().float())
    for part in ("dec", "local_attention", "global_attention"):
        tower.backend = "torch"
        getattr(tower, part).backend = "nonesuch"
        with pytest.raises(backends.BackendError, match="nonesuch"):
            tower(pixels().float())


# Training


def test_training_statistics_and_gradients():
    ours, reference = pair(dropout=0.0)
    x = pixels()
    results = []
    for tower in (ours.train(), reference.train()):
        leaf = x.clone().requires_grad_()
        tokens = tower(leaf).tokens if tower is ours else by_reference(tower, leaf)
        tokens.square().sum().backward()
        gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        results.append({"pixels": leaf.grad, **gradients, **dict(tower.named_buffers())})
    assert results[0].keys() == results[1].keys()
    assert all(relative_error(ours, results[1][name]) < 1e-10 for name, ours in results[0].items())


def test_gradcheck_through_batch_statistics():
    lste = lively(LSTE(6, dtype=torch.float64))
    x = torch.randn(2, 2, 2, 1, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lste, (x,))


def test_a_frozen_batch_norm_keeps_its_statistics():
    ours, reference = pair(dropout=0.0)
    for tower in (ours, reference):
        tower.train()
        tower.lmhra1.pos_embed[0].eval()
    before = ours.lmhra1.pos_embed[0].running_mean.clone()
    assert relative_error(ours(pixels()).tokens, by_reference(reference, pixels())) < EXACT
    assert torch.equal(ours.lmhra1.pos_embed[0].running_mean, before)


@pytest.mark.parametrize("dtype, limit", [(torch.float64, EXACT), (torch.float32, 1e-6)])
def test_batch_norm_in_training_mode_inside_an_evaluated_tower(dtype, limit):
    ours, reference = pair()
    ours.to(dtype)
    for tower in (ours, reference):
        tower.lmhra1.pos_embed[0].train()
    with torch.no_grad():
        assert relative_error(ours(pixels()).tokens, by_reference(reference, pixels())) < limit
    assert ours.lmhra1.pos_embed[0].num_batches_tracked == 1


@pytest.mark.parametrize("buffer", ["running_mean", "running_var"])
def test_bfloat16_running_statistics_are_no_worse_than_torchs(buffer):
    ours, torchs, exact = LSTE(DIM, dtype=torch.bfloat16), nn.BatchNorm3d(DIM).bfloat16(), nn.BatchNorm3d(DIM).double()
    x = torch.randn(2, 4, 3, 5, DIM, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours(x)
    torchs(x.movedim(-1, 1))
    exact(x.movedim(-1, 1).double())
    found, released, right = (getattr(norm, buffer) for norm in (ours.lmhra1.pos_embed[0], torchs, exact))
    assert relative_error(found, right) <= relative_error(released, right)


def test_dropout_follows_torchs_generator():
    tower, x = lively(STAB(DIM)).train(), pixels().float()
    tower.lmhra1.pos_embed[0].eval()
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(tower(x))
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    changed = (outputs[0].tokens != outputs[2].tokens).any(1).nonzero()[:, 0]
    assert changed.tolist() == outputs[0].cu_seqlens[:-1].tolist()  # dropout is on the frame tokens' path alone


@pytest.mark.parametrize("where", ["dec.mlp.dropout", "proj.1"])
def test_both_dropouts_are_active(where):
    tower, x = lively(STAB(DIM)).train(), pixels().float()
    tower.lmhra1.pos_embed[0].eval()
    other = {"dec.mlp.dropout": "proj.1", "proj.1": "dec.mlp.dropout"}[where]
    tower.get_submodule(other).p = 0.0
    assert not torch.equal(tower(x).tokens, tower(x).tokens)
    tower.get_submodule(where).p = 0.0
    assert torch.equal(tower(x).tokens, tower(x).tokens)


def test_training_refuses_what_has_no_statistics():
    with pytest.raises(ValueError, match="more than one token"):
        LSTE(DIM)(torch.zeros(1, 1, 1, 1, DIM))
    tower = STAB(DIM)
    tower.lmhra1.pos_embed[0] = nn.InstanceNorm3d(DIM)
    with pytest.raises(TypeError, match=r"expected torch.nn.BatchNorm3d or torch.nn.SyncBatchNorm, got InstanceNorm3d"):
        tower(pixels().float())


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_frozen_weights_still_pass_gradients_to_the_pixels(dtype, limit):
    ours, reference = pair()
    gradients = []
    for tower in (ours.requires_grad_(False).to(dtype), reference.requires_grad_(False)):
        leaf = pixels().to(dtype if tower is ours else torch.float64).requires_grad_()
        (tower(leaf).tokens if tower is ours else by_reference(tower, leaf)).square().sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(*gradients) < limit


# Folded weights


def builds(tower: STAB, monkeypatch) -> list[STAB]:
    calls: list[STAB] = []
    build = tower._folded.build
    monkeypatch.setattr(tower._folded, "build", lambda module: (calls.append(module), build(module))[1])
    return calls


def test_folded_weights_are_computed_once(monkeypatch):
    tower, x = pair()[0], pixels()
    calls = builds(tower, monkeypatch)
    with torch.no_grad():
        first = tower(x).tokens
        assert torch.equal(tower(x).tokens, first) and len(calls) == 1
        tower(pixels(seed=1)[:, :1])
        assert len(calls) == 1
    assert relative_error(tower(x).tokens, first) < EXACT and len(calls) == 1  # gradients wanted: nothing folded
    with torch.no_grad():
        tower.train()(x)
    assert len(calls) == 1


def optimizer_step(tower: STAB) -> None:
    tower.class_embedding.grad = torch.ones_like(tower.class_embedding)
    torch.optim.AdamW([tower.class_embedding]).step()


def fused_step(tower: STAB) -> None:
    for parameter in tower.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(tower.parameters(), fused=True).step()


@torch.no_grad()
def in_place(tower: STAB) -> None:
    tower.global_attention.q[1].weight.mul_(2)


@torch.no_grad()
def buffer_in_place(tower: STAB) -> None:
    tower.lmhra1.pos_embed[0].running_var.add_(1)


def load(tower: STAB) -> None:
    tower.load_state_dict({n: t + 1 for n, t in tower.state_dict().items()})


def load_assigned(tower: STAB) -> None:
    tower.load_state_dict({n: t + 1 for n, t in tower.state_dict().items()}, assign=True)


def replaced(tower: STAB) -> None:
    tower.temporal_cls_token = nn.Parameter(torch.ones_like(tower.temporal_cls_token))


def through_data(tower: STAB) -> None:
    tower.class_embedding.data.mul_(2)
    tower.eval()


def rounded(tower: STAB) -> None:
    # Back in the first dtype, perhaps at the first address, yet other numbers.
    dtype = tower.balance.dtype
    tower.to(torch.bfloat16).to(dtype)


@pytest.mark.parametrize("change", [optimizer_step, fused_step, in_place, buffer_in_place, load, load_assigned,
                                    replaced, through_data, rounded])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, EXACT), (torch.float32, 1e-6)])
def test_a_change_of_the_weights_drops_what_was_folded(change, dtype, limit):
    tower, reference = pair()
    with torch.no_grad():
        tower.to(dtype)
        before = tower(pixels()).tokens
        with torch.enable_grad():
            change(tower)
        after = tower(pixels()).tokens
        reference.load_state_dict(tower.state_dict())
        assert relative_error(after, before) > 1e-5
        assert relative_error(after, by_reference(reference, pixels())) < limit


def test_weights_of_another_dtype_are_folded_again():
    tower = pair()[0]
    with torch.no_grad():
        tower(pixels())
        assert tower.float()(pixels()).tokens.dtype == torch.float32


def test_inference_mode():
    with torch.inference_mode():
        made_inside = lively(STAB(DIM, dtype=torch.float64)).eval()
        with pytest.warns(UserWarning, match="STAB: weights made or moved in inference mode"):
            first = made_inside(pixels()).tokens
        made_inside.class_embedding.mul_(2)
        assert not torch.equal(made_inside(pixels()).tokens, first)
    tower, reference = pair()
    with torch.inference_mode():
        tower(pixels())
    gradient = torch.autograd.grad(tower(pixels()).tokens.sum(), tower.class_embedding)[0]
    expected = torch.autograd.grad(by_reference(reference, pixels()).sum(), reference.class_embedding)[0]
    assert relative_error(gradient, expected) < 1e-10


def test_what_is_folded_under_autocast_serves_outside_it():
    tower = pair()[0]
    expected = tower(pixels()).tokens
    tower.float().backend = "torch"  # composed, under autocast and outside it
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            tower(pixels())
        assert relative_error(tower(pixels()).tokens, expected.detach()) < 1e-6


def test_can_fold_and_clear():
    layer = nn.Linear(2, 2)
    assert not can_fold(layer) and not can_fold(layer.eval())
    with torch.no_grad():
        assert can_fold(layer)
    assert can_fold(layer.requires_grad_(False)) and not can_fold(layer.train())
    folded = Folded(layer, lambda module: module.weight * 2)
    kept = folded.get()
    assert folded.get() is kept
    folded.clear()
    assert folded.get() is not kept
