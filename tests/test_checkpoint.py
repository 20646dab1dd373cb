"""Weights from checkpoints: every layout and prefix, only the tensors asked for, and errors that name the fault."""
from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_nn import lively
from torch import Tensor

from panda_kernels.nn import STAB, Projector

DIM, OUT = 64, 24
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tower() -> Tensors:
    return lively(STAB(DIM)).state_dict()


@pytest.fixture(scope="module")
def projector() -> Tensors:
    return lively(Projector(DIM, OUT), seed=1).state_dict()


def model(tower: Tensors, projector: Tensors, names: tuple[str, str] = ("video_tower", "video_projector")) -> Tensors:
    """A checkpoint of a whole model: the language model's tensors among them."""
    return {
        "model.embed_tokens.weight": torch.zeros(5, 3),
        **{f"model.{names[0]}.{name}": tensor for name, tensor in tower.items()},
        **{f"model.{names[1]}.{name}": tensor for name, tensor in projector.items()},
        "model.layers.0.mlp.weight": torch.zeros(3, 3),
    }


def save(tensors: Tensors, file: Path) -> Path:
    (save_file if file.suffix == ".safetensors" else torch.save)(dict(tensors), file)
    return file


def save_sharded(tensors: Tensors, folder: Path, suffix: str, shards: int = 3) -> Path:
    """The language model in a shard of its own, which is left unreadable."""
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    parts: list[Tensors] = [{} for _ in range(shards)]
    visual = [name for name in tensors if "tower" in name or "projector" in name]
    for i, name in enumerate(visual):
        parts[1 + i % (shards - 1)][name] = tensors[name]
    parts[0] = {name: tensors[name] for name in tensors if name not in visual}
    weight_map = {}
    for i, part in enumerate(parts):
        file = folder / f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        save(part, file)
        weight_map |= dict.fromkeys(part, file.name)
    (folder / f"{stem}-00001-of-{shards:05d}.{suffix}").write_bytes(b"unreadable")
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def assert_holds(module: torch.nn.Module, tensors: Tensors) -> None:
    state = module.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert not module.training


@pytest.mark.parametrize("names", [("video_tower", "video_projector"), ("vision_tower", "mm_projector")])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "other.safetensors", "other.pt"])
def test_one_file(file, names, tower, projector, tmp_path):
    path = save(model(tower, projector, names), tmp_path / file)
    for where in (path, tmp_path, str(tmp_path)):
        assert_holds(STAB.from_checkpoint(where), tower)
        assert_holds(Projector.from_checkpoint(where), projector)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_of_other_tensors_are_not_opened(suffix, tower, projector, tmp_path):
    index = save_sharded(model(tower, projector), tmp_path, suffix)
    for where in (tmp_path, index):
        assert_holds(STAB.from_checkpoint(where), tower)
        assert_holds(Projector.from_checkpoint(where), projector)


def test_only_the_tensors_asked_for_are_read(tower, projector, tmp_path, monkeypatch):
    import safetensors

    path, read = save(model(tower, projector), tmp_path / "model.safetensors"), []
    real = safetensors.safe_open

    class Recorder:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *exception):
            return self.file.__exit__(*exception)

        def keys(self):
            return self.file.keys()

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(safetensors, "safe_open", Recorder)
    Projector.from_checkpoint(path)
    assert sorted(read) == sorted(f"model.video_projector.{name}" for name in projector)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_bare_state_dicts(suffix, tower, projector, tmp_path):
    assert_holds(STAB.from_checkpoint(save(tower, tmp_path / f"tower.{suffix}")), tower)
    assert_holds(Projector.from_checkpoint(save(projector, tmp_path / f"projector.{suffix}")), projector)


def test_a_tower_shared_by_two_names_may_be_split_between_them(tower, tmp_path):
    names = sorted(tower)
    split = {f"model.video_tower.{n}": tower[n] for n in names[::2]}
    split |= {f"model.vision_tower.{n}": tower[n] for n in names[1::2]}
    assert_holds(STAB.from_checkpoint(save(split, tmp_path / "model.safetensors")), tower)


def test_dtype(tower, tmp_path):
    mixed = {n: t.bfloat16() if t.is_floating_point() and n != "balance" else t for n, t in tower.items()}
    path = save(mixed, tmp_path / "tower.safetensors")
    for dtype, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        state = STAB.from_checkpoint(path, dtype=dtype, device="cpu").state_dict()
        counters = {n for n in state if n.endswith("num_batches_tracked")}
        assert {state[n].dtype for n in counters} == {torch.int64}
        assert {t.dtype for n, t in state.items() if n not in counters} == {expected}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_module_does_not_write_into_the_file(suffix, tower, tmp_path):
    path = save(tower, tmp_path / f"tower.{suffix}")
    before = path.read_bytes()
    loaded = STAB.from_checkpoint(path)
    path.write_bytes(bytes(len(before)))
    assert_holds(loaded, tower)
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())


@pytest.mark.parametrize("dim, heads, patch", [(1408, 11, 14), (64, 8, 7)])
def test_sizes_are_those_of_the_tensors(dim, heads, patch, tmp_path):
    shapes = STAB(dim, patch=patch, device="meta").state_dict()
    path = save({n: torch.zeros(t.shape, dtype=torch.bfloat16) for n, t in shapes.items()}, tmp_path / "tower.bin")
    loaded = STAB.from_checkpoint(path)
    assert loaded.balance.shape == (dim,) and loaded.dec.attn.num_heads == heads and loaded.patch == patch


def test_every_misfit_is_named_at_once(tower, tmp_path):
    broken = {f"model.video_tower.{n}": t for n, t in tower.items() if n != "dec.ln_1.bias" and "class" not in n}
    broken["model.video_tower.extra"] = torch.zeros(1)
    broken["model.video_tower.proj.2.weight"] = torch.zeros(2, 3)
    with pytest.raises(ValueError) as error:
        STAB.from_checkpoint(save(broken, tmp_path / "model.safetensors"))
    for fault in ("missing: class_embedding", "missing: dec.ln_1.bias", "unexpected: extra",
                  "misshapen: proj.2.weight is [2, 3], expected"):
        assert fault in str(error.value)
    assert str(tmp_path / "model.safetensors") in str(error.value)


def test_a_checkpoint_without_a_tower(tmp_path):
    path = save({"model.embed_tokens.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor named model.video_tower.\* or model.vision_tower.\*"):
        STAB.from_checkpoint(path)


def test_what_is_no_checkpoint(tower, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        STAB.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got no weight file"):
        STAB.from_checkpoint(tmp_path)
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not tensors")
        with pytest.raises(ValueError, match=f"{name}: not a"):
            STAB.from_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match=r"got a.bin, a.safetensors"):
        STAB.from_checkpoint(tmp_path)
    torch.save([1], tmp_path / "a.bin")
    with pytest.raises(ValueError, match="expected a state dict, got list"):
        STAB.from_checkpoint(tmp_path / "a.bin")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not the index of a sharded checkpoint"):
        STAB.from_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tower, projector, tmp_path):
    save_sharded(model(tower, projector), tmp_path, "safetensors")
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003.safetensors"):
        STAB.from_checkpoint(tmp_path)


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"class_embedding": Payload()}, "tower.bin")
    with pytest.raises(ValueError, match=r"tower.bin: not a file of tensors"):
        STAB.from_checkpoint("tower.bin")
    assert not Path("unpickled").exists()
    with pytest.raises(ValueError, match=r"old.bin: not a file of tensors"):
        Path("old.bin").write_bytes(pickle.dumps({"class_embedding": Payload()}))
        STAB.from_checkpoint("old.bin")


def test_without_safetensors_the_error_says_how_to_install_it(tower, tmp_path, monkeypatch):
    path = save(tower, tmp_path / "tower.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs safetensors: pip install 'panda-kernels\[video\]'"):
        STAB.from_checkpoint(path)
