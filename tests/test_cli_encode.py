"""``panda-kernels encode`` and ``info``: outputs, resuming, names, failures and exit codes."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_video import write_video
from torch import nn

import python_ref
from panda_kernels import cli, encode, info
from panda_kernels.encode import Model
from panda_kernels.video import read_clip


class Tower(nn.Module):
    """A stand-in: one token a frame, its mean pixel, and the frame's corners as the grid."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale]))
        self.calls = 0

    def forward(self, pixels, rectangles, *, present):
        self.calls += 1
        assert pixels.dtype == torch.uint8 and pixels.shape[1:3] == (4, 3) and present.shape == pixels.shape[:2]
        frames = pixels.shape[0] * pixels.shape[1]
        tokens = pixels.flatten(0, 1).float().mean((1, 2, 3)) * present.flatten() * self.scale
        cu_seqlens = torch.arange(frames + 1, dtype=torch.int32)
        return tokens[:, None], cu_seqlens, rectangles.grid()


@pytest.fixture
def tower(monkeypatch) -> Tower:
    tower = Tower()

    def load_model(weights, *, seed, dtype, device, backend, projector):
        tower.backend = backend
        return Model(tower.to(dtype), None, "stand-in" if weights else f"random, seed {seed}")

    monkeypatch.setattr(encode, "load_model", load_model)
    return tower


def run(*arguments: object) -> int:
    return cli.main(["encode", *map(str, arguments), "--device", "cpu"])


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def test_output_holds_what_is_needed_to_use_it(tower, tmp_path, capsys):
    video = write_video(tmp_path / "short.mp4", 3)
    assert run(video, "-o", tmp_path / "out") == 0
    tensors, metadata = read(tmp_path / "out" / "short.safetensors")
    assert sorted(tensors) == ["corners", "cu_seqlens", "frame_times", "grid", "present", "tokens"]
    assert tensors["tokens"].shape == (8, 1) and tensors["cu_seqlens"].tolist() == list(range(9))
    assert tensors["grid"].tolist() == [[12, 16]] * 3 + [[8, 8]] * 5
    assert tensors["present"].tolist() == [True] * 3 + [False] * 5
    assert json.loads(metadata["grid"]) == tensors["grid"].tolist()
    assert json.loads(metadata["frame_times"])[2:4] == [0.2, None] and math.isnan(tensors["frame_times"][3])
    assert metadata["weights"] == "random, seed 0" and metadata["dtype"] == "float32" and metadata["frames"] == "8"
    assert "weights: random, seed 0. The tokens mean nothing" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["short.safetensors"]


def test_frames_are_in_order_over_chunks(tower, tmp_path):
    assert run(write_video(tmp_path / "a.mp4", 8), "-o", tmp_path, "--frames", 8, "--weights", "w") == 0
    tokens = read(tmp_path / "a.safetensors")[0]["tokens"].flatten()
    assert (tokens.diff() > 0).all()  # the frames get brighter


def test_resumes_where_it_stopped(tower, tmp_path, capsys):
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", 2 + ord(name) % 3)
    out = tmp_path / "out"
    assert run(tmp_path, "-o", out) == 0 and tower.calls == 3
    (out / "b.safetensors").unlink()
    damaged = out / "c.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = (out / "a.safetensors").stat().st_mtime_ns
    assert run(tmp_path, "-o", out) == 0 and tower.calls == 5
    assert (out / "a.safetensors").stat().st_mtime_ns == before
    assert "2 encoded, 1 already there, 0 failed" in capsys.readouterr().err
    assert read(damaged)[0]["tokens"].shape == (8, 1)


@pytest.mark.parametrize("change", ["frames", "dtype", "backend", "weights"])
def test_other_settings_encode_again(tower, tmp_path, change):
    video = write_video(tmp_path / "a.mp4", 2)
    assert run(video, "-o", tmp_path) == 0
    options = {"frames": ["--frames", 4], "dtype": ["--dtype", "bfloat16"], "backend": ["--backend", "torch"]}
    if change == "weights":
        tower.scale.data += 1
    for calls in (2, 2):
        assert run(video, "-o", tmp_path, *options.get(change, [])) == 0 and tower.calls == calls


def test_a_failure_leaves_no_partial_file_and_the_old_output(tower, tmp_path, monkeypatch):
    video = write_video(tmp_path / "a.mp4", 2)
    out = tmp_path / "out"
    assert run(video, "-o", out) == 0
    old = (out / "a.safetensors").read_bytes()

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.os, "replace", full_disk)
    assert run(video, "-o", out, "--frames", 4) == 2
    assert [p.name for p in out.iterdir()] == ["a.safetensors"]
    assert (out / "a.safetensors").read_bytes() == old


def test_what_is_no_video_fails_and_the_rest_is_done(tower, tmp_path, capsys):
    bad = tmp_path / "bad.mp4"
    bad.write_text("not a video")
    good = write_video(tmp_path / "good.mp4", 2)
    (tmp_path / "nothing").mkdir()
    assert run(bad, tmp_path / "gone.mp4", tmp_path / "nothing", good, "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "bad.mp4: cannot be decoded as a video" in error and "gone.mp4: No such file" in error
    assert "nothing: no videos in this folder" in error and "1 encoded, 0 already there, 3 failed" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.safetensors"]


def test_folders_are_searched_for_videos(tower, tmp_path):
    deep = tmp_path / "videos" / "x" / "y"
    deep.mkdir(parents=True)
    video = write_video(deep / "a.mp4", 2).rename(deep / "a.MP4")
    for name in ("readme.txt", "._a.mp4"):
        (deep / name).write_text("text")
    (deep / "folder.mp4").mkdir()
    again = deep / ".." / "y" / video.name
    assert run(tmp_path / "videos", again, "-o", tmp_path / "out") == 0
    assert tower.calls == 1 and (tmp_path / "out" / "a.safetensors").is_file()


def test_equal_stems_do_not_overwrite_each_other(tower, tmp_path, capsys):
    for folder, count in (("one", 2), ("two", 3)):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "a.mp4", count)
    out = tmp_path / "both"
    assert run(tmp_path / "one", tmp_path / "two", "-o", out) == 0
    assert len(list(out.glob("a-????????.safetensors"))) == 2
    assert run(tmp_path / "two", tmp_path / "one", "-o", out) == 0 and tower.calls == 2

    out = tmp_path / "later"
    assert run(tmp_path / "one", "-o", out) == 0
    kept = (out / "a.safetensors").read_bytes()
    assert run(tmp_path / "two", "-o", out) == 1
    assert "a.safetensors: holds the tokens of another video" in capsys.readouterr().err
    assert (out / "a.safetensors").read_bytes() == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "6"], "expected a multiple of 4, got 6"),
        (["--frames", "x"], "expected a multiple of 4, got x"),
        (["--backend", "abacus"], "--backend abacus: no such backend; there are auto, "),
        (["--projector"], "--projector: needs --weights"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
)
def test_arguments_that_cannot_be_served(tower, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run("a.mp4", "-o", tmp_path, *arguments)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_checkpoint_is_an_error_without_a_traceback(tmp_path, capsys):
    assert run("a.mp4", "-o", tmp_path, "--weights", tmp_path / "none.safetensors") == 2
    assert "panda-kernels encode: error:" in capsys.readouterr().err


def test_checksum_sees_every_bit():
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    two.load_state_dict(one.state_dict())
    assert encode.checksum([one]) == encode.checksum([two])
    two.bias.data[1] += 1e-6
    assert encode.checksum([one]) != encode.checksum([two])


def test_seeded_weights_are_the_same_model_each_time():
    state = torch.get_rng_state()
    one, two, other = (encode.load_model(None, seed=seed).describe() for seed in (3, 3, 4))
    assert one == two and one["weights_sha256"] != other["weights_sha256"]
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_those_of_the_reference(tmp_path):
    """The whole way from a file: uint8 pixels, corners and missing frames against normalised pixels with a mask."""
    tower, projector = python_ref.STAB(64).eval(), python_ref.Projector(64, 96)
    for parameter in tower.parameters():
        parameter.data.normal_(std=0.3)
    named = {f"model.video_tower.{n}": t for n, t in tower.state_dict().items()}
    named |= {f"model.video_projector.{n}": t for n, t in projector.state_dict().items()}
    save_file(named, tmp_path / "model.safetensors")
    video = write_video(tmp_path / "a.mp4", 6)
    model = encode.load_model(tmp_path / "model.safetensors", projector=True)
    assert encode.encode_videos([video], tmp_path, model, size=280) == 0
    tokens = read(tmp_path / "a.safetensors")[0]["tokens"]

    pixels = python_ref.split_chunks(read_clip(video, size=280).pixel_values()[None])
    with torch.no_grad():
        torch32 = torch.cat(tower(pixels, projector)[0])
        exact = torch.cat(tower.double()(pixels.double(), projector.double())[0])
    assert tokens.shape == exact.shape == (6 * (1 + 8 * 11) + 2 * (1 + 8 * 9), 96)
    assert (tokens - exact).norm() <= 2 * (torch32 - exact).norm()


def test_encode_with_the_tower_itself(tmp_path):
    video = write_video(tmp_path / "a.mp4", 2)
    assert run(video, "-o", tmp_path, "--frames", 4) == 0
    tensors, metadata = read(tmp_path / "a.safetensors")
    lengths = [1 + h * (w + 1) for h, w in tensors["grid"].tolist()]
    assert tensors["grid"].tolist() == [[12, 16]] * 2 + [[8, 8]] * 2
    assert tensors["cu_seqlens"].diff().tolist() == lengths and len(tensors["tokens"]) == sum(lengths)
    assert tensors["tokens"].isfinite().all() and metadata["model"] == "STAB"


def test_info_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("PANDA_KERNELS_EXAMPLE", "1")
    monkeypatch.setattr("panda_kernels.backends.status", lambda: {"torch": None, "cuda": "no GPU"})
    monkeypatch.setattr(info, "PACKAGES", ("numpy", "no-such-package"))
    assert cli.main(["info", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert sections["backends"] == {"torch": "there", "cuda": "no GPU"}
    assert sections["versions"]["torch"] == torch.__version__
    assert sections["versions"]["no-such-package"] == "not installed"
    assert sections["environment"]["PANDA_KERNELS_EXAMPLE"] == "1"
    assert cli.main(["info"]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_interrupting_is_not_a_traceback(monkeypatch, capsys):
    def interrupted(as_json):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "main", interrupted)
    assert cli.main(["info"]) == 130
    assert "interrupted" in capsys.readouterr().err
