"""STAB, the Spatio-Temporal Alignment Block: stages 1 to 9 of SPEC, composed of the public ops."""
from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends, checkpoint, fp8, ops
from ..checks import Checks
from ..ops._rectangle_values import check_corners
from ..rectangles import Rectangles
from . import lste_fp8
from .dense_connection import Sum, dense_connection
from .folding import Folded, can_fold, can_serve
from .fsra import FSRA
from .gstra import GSTRA
from .has_backend import HasBackend
from .lsd import LSD
from .lste import Affine, LocalMHRA, Source, batch_norm_affine, encode, encoding_weights, position_encoding


class STABOutput(NamedTuple):
    """The tokens of all frames, packed; frame ``i = b * T + t`` has rows ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``.

    ``tokens [num_tokens, C]``, ``cu_seqlens`` int32 ``[frames + 1]``, ``grid`` int64 ``[frames, 2]``: h', w'.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    grid: Tensor


class STAB(HasBackend, fp8.HasProducts):
    """The visual tower of Video-Panda, with the released parameter names and initialisation.

    Args:
        dim: channels C, 1024, 1152 or 1408 in the released models.
        patch: side of a patch in pixels.
        window: side of an LSD window in patches.
        num_heads: heads of LSD and FSRA.
        gstra_heads: heads of GSTRA; None is 11 for C = 1408, else 8.
        lste_reduction: LSTE's bottleneck has ``int(C / lste_reduction)`` channels.
        dropout: rate in GSTRA's MLP and before the fusion's Linear.
        device, dtype: of the parameters. Pixels are cast to their dtype and the tokens have it.

    Attributes:
        backend: which implementation of the ops to use, ``auto`` or a name of ``panda_kernels.backends.NAMES``.
            Setting it sets it for the parts as well.
        products: ``native`` (the default), or ``fp8`` for LSTE's pointwise products in e4m3 (panda_kernels/fp8.py): on
            GPUs that multiply it the second, in the tower's one call; elsewhere both, emulated and slow, in a tower
            composed of its ops. Only in inference, by running statistics; where a gradient is wanted, in training mode,
            under autocast and in a compiled graph they stay native. Setting another name raises ValueError.

    In evaluation mode without gradients, what depends on the weights alone is computed once and kept until a weight
    changes. Torch does not notice writes through ``tensor.data``; call ``eval()`` after them.

    Source: SPEC; arXiv 2412.18609, section 3.
    """

    def __init__(self, dim: int = 1024, *, patch: int = 14, window: int = 2, num_heads: int = 8,
                 gstra_heads: int | None = None, lste_reduction: float = 1.5, dropout: float = 0.5,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if gstra_heads is None:
            gstra_heads = 11 if dim == 1408 else 8
        self.patch, self.window = patch, window
        self.class_embedding = nn.Parameter(torch.randn(dim, **factory))
        self.split_embedding = nn.Parameter(torch.randn(dim, **factory))
        self.temporal_cls_token = nn.Parameter(torch.zeros(1, 1, dim, **factory))
        self.balance = nn.Parameter(torch.zeros(dim, **factory))
        self.patch_embedding = nn.Conv2d(3, dim, patch, stride=patch, bias=False, **factory)
        self.lmhra1 = LocalMHRA(dim, lste_reduction, **factory)
        # In every checkpoint, used by nothing.
        self.lmhra2 = LocalMHRA(dim, lste_reduction, **factory)
        self.dpe = position_encoding(dim, **factory)
        self.dec = GSTRA(dim, gstra_heads, dropout=dropout, **factory)
        self.local_attention = LSD(dim, num_heads, window=window, **factory)
        self.global_attention = FSRA(dim, num_heads, **factory)
        self.proj = nn.Sequential(nn.LayerNorm(dim, **factory), nn.Dropout(dropout), nn.Linear(dim, dim, **factory))
        self._folded = Folded(self, _fold)
        self._streamed = Folded(self, _prepare_streamed)
        self.products = "native"

    @classmethod
    def from_checkpoint(cls, path: str | PathLike[str], *, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None) -> STAB:
        """The tower of a Video-Panda checkpoint, or of a bare tower's state dict, in evaluation mode.

        Only its own tensors are read: ``model.video_tower.*``, ``model.vision_tower.*`` or bare names. C and the patch
        are those of the tensors.

        Args:
            path: a folder or file in Hugging Face style, sharded or not, safetensors or torch's ``.bin``.
            dtype: of the parameters; None keeps that of the checkpoint's first weight, for all of them.
            device: None is the CPU.

        Raises:
            FileNotFoundError: there is no such file or folder, or a shard is missing.
            ImportError: the file is in safetensors' format and safetensors is not installed.
            ValueError: not a checkpoint, damaged, without a tower, or with tensors missing, unexpected or misshapen;
                the message names all of them.
        """
        tensors = checkpoint.read(path, checkpoint.TOWER_PREFIXES, cls(device="meta").state_dict())
        kernel, width = tensors.get("patch_embedding.weight"), tensors.get("class_embedding")
        patch = kernel.shape[-1] if kernel is not None and kernel.ndim == 4 else 14
        dim = width.shape[0] if width is not None and width.ndim == 1 else 1024
        return checkpoint.fill(cls(dim, patch=patch, device="meta"), tensors, path, dtype=dtype, device=device)

    def train(self, mode: bool = True) -> STAB:
        self._folded.clear()
        self._streamed.clear()
        return super().train(mode)

    def forward(self, pixel_values: Tensor, rectangles: Rectangles | None = None, *,
                present: Tensor | None = None) -> STABOutput:
        """Chunks of frames, or images with ``T = 1``, to packed tokens.

        With ``rectangles`` the mask is not read and no device is waited for; without, they come from the mask, which
        waits for the device once. Images skip the temporal stages.

        Args:
            pixel_values: ``[B, T, 4, H, W]``, CLIP-normalised channels in any floating dtype, or 0..255 in uint8, and a
                validity mask of zeros and ones; ``[B, T, 3, H, W]`` will do with ``rectangles``. Any strides. Pixels
                beyond the last whole patch are dropped.
            rectangles: of the ``B * T`` frames, made with this tower's ``window``.
            present: bool ``[B, T]``; a False frame is missing: its pixels, and its mask, count as zero.

        Raises:
            ValueError: a wrong rank or number of channels, no frames, frames smaller than a patch, no mask and no
                rectangles, rectangles of another number of frames or outside the grid, a mask that is no rectangle or
                smaller than a window (naming the frame), tensors on several devices, or training on a single token.
            TypeError: pixels neither floating nor uint8, or ``present`` not bool.
            BackendError: the backend cannot serve the call.
        """
        rectangles = self.rectangles(pixel_values, rectangles, present=present)
        streamed = self._stream(pixel_values, rectangles, present)
        if streamed is not None:
            return streamed
        tokens = self._compose(pixel_values, rectangles, present)
        return STABOutput(tokens, rectangles.cu_seqlens(self.window), rectangles.grid(self.window))

    def rectangles(self, pixel_values: Tensor, given: Rectangles | None = None, *,
                   present: Tensor | None = None) -> Rectangles:
        """Those of a call of :meth:`forward`: ``given``, or the mask's, which waits for the device once.

        Arguments, and what is raised, are those of :meth:`forward`.
        """
        self._check(pixel_values, given, present)
        if given is not None:
            return given
        mask = pixel_values[:, :, 3].detach()
        if present is not None:
            mask = mask * present[:, :, None, None]
        return Rectangles.from_mask(mask, self.patch, self.window)

    def constants(self) -> object:
        """What inference keeps of the weights: another object after a change of them or of ``products``, and after
        ``eval()``."""
        return (self._folded if _streaming_backend(self) is None else self._streamed).get()

    def _check(self, pixel_values: Tensor, rectangles: Rectangles | None, present: Tensor | None) -> None:
        check = Checks("STAB")
        check.shape("pixel_values", pixel_values, ("B", "T", "3 or 4", "H", "W"))
        batch, frames, channels, height, width = pixel_values.shape
        if channels not in (3, 4):
            check.fail("pixel_values", "3 colour channels, or 4 with the mask", f"{channels} channels")
        if channels == 3 and rectangles is None:
            check.fail("pixel_values", "the validity mask as 4th channel, or rectangles", "3 channels, rectangles=None")
        check.not_empty("pixel_values", pixel_values)
        check.floating("pixel_values", pixel_values, also=(torch.uint8,))
        if min(height, width) < self.patch:
            check.fail("pixel_values", f"frames of at least a patch, {self.patch} x {self.patch} pixels",
                       f"{height} x {width} pixels")
        tensors = {"patch_embedding.weight": self.patch_embedding.weight, "pixel_values": pixel_values}
        if rectangles is not None:
            check.shape("rectangles.corners", rectangles.corners, (batch * frames, 4))
            tensors["rectangles.corners"] = rectangles.corners
        if present is not None:
            check.shape("present", present, (batch, frames))
            if present.dtype != torch.bool:
                check.fail("present", torch.bool, present.dtype, TypeError)
            tensors["present"] = present
        check.same_device(**tensors)

    def _stream(self, pixel_values: Tensor, rectangles: Rectangles, present: Tensor | None) -> STABOutput | None:
        """The tower in one call, where a backend has it whole; None where it is to be composed."""
        if not self._can_stream(pixel_values):
            return None
        server = _streaming_backend(self)
        if server is None:
            return None
        self._check_rectangles(pixel_values, rectangles)
        tokens, cu_seqlens, grid = server.run(self._streamed.get(), pixel_values, rectangles, present)
        return STABOutput(tokens.to(self.split_embedding.dtype), cu_seqlens, grid)

    def _can_stream(self, pixel_values: Tensor) -> bool:
        """Streaming is for inference, by running statistics."""
        norm: Any = self.lmhra1.pos_embed[0]
        return not norm.training and can_serve(self, pixel_values)

    def _check_rectangles(self, pixel_values: Tensor, rectangles: Rectangles) -> None:
        """What the ops of the composed tower check themselves."""
        check = Checks("STAB")
        rows, cols = (side // self.patch for side in pixel_values.shape[3:])
        held = check_corners(check, rectangles.corners, self.window, rows=rows, cols=cols)
        given = rectangles.num_windows, rectangles.num_tokens
        if held is not None and held != given:
            check.fail("rectangles", "{} windows and {} tokens, which the corners hold".format(*held),
                       "{} and {}".format(*given))

    def _compose(self, pixel_values: Tensor, rectangles: Rectangles, present: Tensor | None) -> Tensor:
        folded = self._folded.get() if can_fold(self) else _NOTHING_FOLDED
        embedding = self.patch_embedding.weight
        x0 = ops.patch_embed(pixel_values, embedding, present=present, backend=self.backend)
        x3, g = Sum(x0), None
        if x0.shape[1] > 1:
            if folded.encoding is not None and self._can_stream(pixel_values):
                x2 = lste_fp8.encode(x0, folded.encoding, backend=self.backend)
            else:
                x2 = encode(x0, self.lmhra1, self.dpe, affine=folded.norm, backend=self.backend,
                            source=Source(pixel_values, embedding, present))
            x2, x3 = dense_connection(x2, x0, backend=self.backend)
            g = self.dec(self.temporal_cls_token, x2.flatten(1, 3), folded=folded.gstra)
        added = None if x3.added is None else x3.added.flatten(0, 1)
        y = self.local_attention(x3.x.flatten(0, 1), rectangles, added=added)
        f = self.global_attention(self.class_embedding, y, rectangles.cu_windows(self.window), folded=folded.fsra)
        if g is not None:
            f = self._fuse(g, f)
        return ops.assemble_tokens(y, f, self.split_embedding, rectangles.corners, rectangles.num_tokens,
                                   window=self.window, backend=self.backend)

    def _fuse(self, g: Tensor, f: Tensor) -> Tensor:
        """Stage 8: clips' tokens ``g [B, C]`` and frames' ``f [B * T, C]`` -> ``[B * T, C]``."""
        a = torch.sigmoid(self.balance)
        frames = f.unflatten(0, (g.shape[0], -1))
        return self.proj((1 - a) * g[:, None] + a * frames).flatten(0, 1)


class _FoldedWeights(NamedTuple):
    """What the composed tower needs of the weights alone: BatchNorm as an affine, the two folded queries, and LSTE's
    weights in FP8 if asked for."""

    norm: Affine | None
    gstra: Tensor | None
    fsra: Tensor | None
    encoding: lste_fp8.Fp8Encoding | None


_NOTHING_FOLDED = _FoldedWeights(None, None, None, None)


def _fold(tower: STAB) -> _FoldedWeights:
    norm: Any = tower.lmhra1.pos_embed[0]
    return _FoldedWeights(
        # A BatchNorm left in training mode inside an evaluated tower still wants each batch's own statistics.
        norm=None if norm.training else batch_norm_affine(norm),
        gstra=tower.dec.fold(tower.temporal_cls_token),
        fsra=tower.global_attention.fold(tower.class_embedding),
        encoding=lste_fp8.prepare(tower.lmhra1, tower.dpe) if tower.products == "fp8" else None,
    )


def _streaming_backend(tower: STAB) -> Any:
    """Whose tower is one call, with the products that are asked for, or None."""
    direction, weight = "run" if tower.products == "native" else "by_fp8", tower.split_embedding
    if direction == "by_fp8" and not fp8.has_products(weight.device):
        return None
    return backends.first("stab_tower", direction, tower.backend, (weight,))


def _prepare_streamed(tower: STAB) -> Any:
    """The weights as the backend that streams the tower wants them."""
    server = _streaming_backend(tower)
    prepared = prepared_by(server, tower)
    return prepared if tower.products == "native" else server.by_fp8(prepared)


def prepared_by(server: Any, tower: STAB) -> Any:
    """The weights as ``server``, a backend's module, wants them for its ``run``."""
    norm: Any = tower.lmhra1.pos_embed[0]
    fsra, gstra, lsd = tower.global_attention, tower.dec, tower.local_attention
    fusion: Any = tower.proj
    return server.prepare(
        tower.patch_embedding.weight,
        encoding_weights(tower.lmhra1, tower.dpe, batch_norm_affine(norm)),
        gstra.fold(tower.temporal_cls_token),
        lsd.weights(),
        fsra.fold(tower.class_embedding),
        tower.split_embedding,
        (tower.temporal_cls_token, *gstra.value_weights()),
        gstra.mlp_weights(),
        (tower.class_embedding, *fsra.value_weights()),
        (tower.balance, fusion[0].weight, fusion[0].bias, fusion[2].weight, fusion[2].bias),
        num_heads=lsd.num_heads, window=tower.window, eps=lsd.eps)
