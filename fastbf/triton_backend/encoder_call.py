"""A call of an encoder layer: its numbers, and the tensors that forward leaves for backward.

Everything is a matrix of rows of channels, R = N · L of them in memory order (``kernels/rows.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.distributed import collectives
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import Site
from fastbf.kernels import attention
from fastbf.kernels.rows import Rows
from fastbf.reference import LayerWeights
from fastbf.triton_backend.encoder_weights import cast_size, needs_cast

#: What a :class:`Layer` ends with whose samples are all there are.
NO_BATCH = Batch("", 0, (), (), True)


class Layer(NamedTuple):
    """A call without its tensors. Numbers, names and dtypes only, so that a registered operator can take it.

    ``fork`` is "x" where the plain half is x, "plain" where it is another matrix, and "input" where it is the plain
    half of a fork [2R, C] whose mixed half is x.
    """

    samples: int
    positions: int
    position_major: bool  #: memory holds (L, N, C)
    num_heads: int
    activation: str
    norm_first: bool
    eps: float
    drop: int  #: ``fastbf.dropout.threshold``
    fork: str  #: what the plain half of the result holds, if that is a fork: "x", "plain", "input"; else ""
    compute: torch.dtype  #: of the matrix products
    norm: torch.dtype  #: of what a norm gives
    group: str  #: with the next four, the ``Batch`` that the samples are a part of; "" if they are all there are
    rank: int
    sizes: Sequence[int]
    facts: Sequence[int]
    met: bool

    @property
    def rows(self) -> Rows:
        batch = self.batch
        return Rows(self.samples, self.positions, self.position_major, 0 if batch is None else batch.first)

    @property
    def batch(self) -> Batch | None:
        return Batch(*self[-5:]) if self.group else None

    @property
    def keys(self) -> int:
        """How many samples a sample attends to."""
        return sum(self.sizes) if self.group else self.samples

    def in_parts(self, channels: int) -> bool:
        """Whether keys and values of other ranks come in parts."""
        if not self.group:
            return False
        return not collectives.gathers(self.batch, 2 * channels * self.positions * self.compute.itemsize)

    def scale(self, channels: int) -> float:
        """Of attention's scores."""
        return (channels // self.num_heads) ** -0.5

    def mixed(self, fork: Tensor) -> Tensor:
        """The mixed half of a fork [2R, C], as (N, L, C) in memory order, a view."""
        return self._halves(fork)[1]

    def plain(self, fork: Tensor) -> Tensor:
        """The plain half, likewise."""
        return self._halves(fork)[0]

    def _halves(self, fork: Tensor) -> tuple[Tensor, ...]:
        if self.position_major:
            return fork.view(self.positions, 2, self.samples, -1).unbind(1)
        return fork.view(2, self.samples, self.positions, -1).unbind(0)

    def by_sample(self, matrix: Tensor) -> Tensor:
        """[R, W] → (N, L, W), a view."""
        if self.position_major:
            return matrix.view(self.positions, self.samples, -1).transpose(0, 1)
        return matrix.view(self.samples, self.positions, -1)

    def heads(self, matrix: Tensor) -> Tensor:
        """[R, C] → (N, L, H, D), a view."""
        return self.by_sample(matrix).unflatten(-1, (self.num_heads, -1))

    def drops(self, site: Site, seed: Tensor | None) -> dict[str, object]:
        """The arguments by which an elementwise kernel draws its decisions."""
        return {"seed": seed, "site": int(site), "threshold": self.drop}


class Saved(NamedTuple):
    """What forward leaves for backward besides its inputs; all matrices of R rows unless it says otherwise.

    X, T and Z are the bytes of an element of x, of the products' dtype and of what a norm gives.
    """

    normed: Tensor | None  #: C · T: what the first product reads, unless that is x itself
    qkv: Tensor  #: 3C · T; across ranks q alone, C · T
    kv: Tensor | None  #: across ranks: (M, L, 2C) of all samples or, if they come in parts, (N, L, 2C), in the dtype T
    o: Tensor  #: C · T
    lse: Tensor | None  #: fp32 (L · H, N), unless attention was packed
    s1: Tensor  #: C · max(X, T): the first residual sum
    z: Tensor  #: C · T: what the feed-forward's first product reads
    hidden: Tensor  #: F · T: u with ReLU, h with GELU
    s2: Tensor | None  #: C · Z: the second residual sum, unless norms come first
    cast: Tensor | None  #: 1-D: the weights in the products' dtype, unless they have it already


def kept(dtype: torch.dtype, weights: LayerWeights, layer: Layer) -> Saved:
    """Which of :class:`Saved` a call with an x of ``dtype`` leaves, as booleans."""
    return Saved(
        normed=layer.norm_first or dtype != layer.compute,
        qkv=True,
        kv=bool(layer.group),
        o=True,
        lse=attention.streams(layer.samples, layer.keys),
        s1=True,
        z=True,
        hidden=True,
        s2=not layer.norm_first,
        cast=needs_cast(weights, layer.compute),
    )


def allocate(x: Tensor, plain: Tensor | None, weights: LayerWeights, layer: Layer) -> tuple[Tensor, Saved]:
    """Empty tensors for a call's result and for what it saves."""
    rows, channels = x.shape
    width = weights.linear1_weight.shape[0]
    compute, first_sum = layer.compute, torch.promote_types(x.dtype, layer.compute)
    needed = kept(x.dtype, weights, layer)

    def empty(*shape: int, dtype: torch.dtype = compute, wanted: bool = True) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=x.device) if wanted else None

    groups = layer.positions * layer.num_heads
    held = layer.samples if layer.in_parts(channels) else layer.keys
    saved = Saved(
        normed=empty(rows, channels, wanted=needed.normed),
        qkv=empty(rows, channels if needed.kv else 3 * channels),
        kv=empty(held, layer.positions, 2 * channels, wanted=needed.kv),
        o=empty(rows, channels),
        lse=empty(groups, layer.samples, dtype=torch.float32, wanted=needed.lse),
        s1=empty(rows, channels, dtype=first_sum),
        z=empty(rows, channels),
        hidden=empty(rows, width),
        s2=empty(rows, channels, dtype=torch.promote_types(layer.norm, compute), wanted=needed.s2),
        cast=empty(cast_size(channels, width), wanted=needed.cast),
    )
    dtype = first_sum if layer.norm_first else layer.norm
    if layer.fork:
        dtype = torch.promote_types((x if plain is None else plain).dtype, dtype)
        return empty(2 * rows, channels, dtype=dtype), saved
    return empty(rows, channels, dtype=dtype), saved
