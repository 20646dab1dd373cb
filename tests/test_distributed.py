"""Training steps of two processes on gloo, against the same step of one."""
from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_nn import DIM, RECTANGLES, lively, pixels
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from panda_kernels.nn import STAB
from panda_kernels.rectangles import Rectangles
from panda_kernels.spec import relative_error

WORLD = 2
CLIPS = (1, 2)  # of each process: statistics must weigh them by their tokens
CORNERS = RECTANGLES + RECTANGLES[:4]
Weights = dict[str, Tensor]


def tower(synchronised: bool) -> STAB:
    built = lively(STAB(DIM, dropout=0.0)).double().train()
    return nn.SyncBatchNorm.convert_sync_batchnorm(built) if synchronised else built.eval()


def loss(model: nn.Module, clips: slice) -> Tensor:
    """A sum over clips: what the processes' losses have to add up to."""
    x = pixels(sum(CLIPS), rectangles=CORNERS)[clips, :, :3]
    return model(x, Rectangles.from_corners(CORNERS[4 * clips.start:4 * clips.stop])).tokens.square().sum()


def stepped(model: nn.Module, clips: slice, scale: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    (scale * loss(model, clips)).backward()
    optimizer.step()


def whole(model: nn.Module) -> Weights:
    state = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def ddp(model: nn.Module) -> nn.Module:
    # The second bottleneck is never called, as released; nobody waits for its gradients.
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def process(rank: int, wrap: Callable[[nn.Module], nn.Module], synchronised: bool, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD,
                            timeout=timedelta(minutes=5))
    model = wrap(tower(synchronised))
    clips = slice(sum(CLIPS[:rank]), sum(CLIPS[:rank + 1]))
    stepped(model, clips, scale=WORLD)  # gradients are averaged, not added
    weights = whole(model)
    if rank == 0:
        torch.save(weights, folder / "weights.pt")
    dist.destroy_process_group()


# DistributedDataParallel takes SyncBatchNorm on GPUs only.
@pytest.mark.parametrize(("wrap", "synchronised"), [(ddp, False), (fsdp, False), (fsdp, True)])
def test_two_processes_step_as_one(wrap: Callable[[nn.Module], nn.Module], synchronised: bool, tmp_path: Path) -> None:
    mp.spawn(process, (wrap, synchronised, tmp_path), nprocs=WORLD)
    together = torch.load(tmp_path / "weights.pt")
    alone = tower(synchronised)
    before = copy.deepcopy(alone.state_dict())
    stepped(alone, slice(0, sum(CLIPS)))
    for name, value in alone.state_dict().items():
        assert relative_error(together[name].double(), value.double()) < 1e-12, name
    moved = {name for name, value in before.items() if not torch.equal(value, together[name])}
    assert {"patch_embedding.weight", "lmhra1.pos_embed.0.weight", "global_attention.kv.1.weight"} <= moved
    assert ("lmhra1.pos_embed.0.running_var" in moved) == synchronised
