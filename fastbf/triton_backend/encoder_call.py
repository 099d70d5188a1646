"""A call of an encoder layer on kernels: its numbers, and the tensors that forward saves for backward.

Between the features and the result all tensors are matrices of R = N · L rows of channels in memory order
(``kernels/rows.py``). Matrix products take rows in any order, elementwise kernels find the sample and position of a
row, and attention reads and writes by strides. So no layout is transposed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.distributed import collectives
from fastbf.distributed.process_groups import Batch
from fastbf.dropout import Site
from fastbf.kernels import attention
from fastbf.kernels.launch import Drop
from fastbf.kernels.rows import Rows
from fastbf.reference import LayerWeights
from fastbf.triton_backend.functions import as_rows


class Layer(NamedTuple):
    """A call without its tensors, except the seed, which the autograd Function takes as an argument of its own.

    ``fork`` is the source of the result's plain half: "x"; "plain", another matrix; "input", the plain half of a fork
    [2R, C] whose mixed half is x; or "" if the result is no fork.
    """

    shape: torch.Size  #: of the features as they were given, (N, …, C), or of the fork, (2N, …, C)
    samples: int
    positions: int
    position_major: bool  #: memory holds (L, N, C)
    num_heads: int
    activation: str
    norm_first: bool
    eps: float
    threshold: int  #: ``fastbf.dropout.drop_threshold``
    fork: str  #: "x", "plain", "input" or ""
    compute: torch.dtype  #: of the matrix products
    norm: torch.dtype  #: of a norm's result
    batch: Batch | None = None  #: the samples of all ranks; None for this process alone
    seed: Tensor | None = None  #: int64, one element, on the device; None only if nothing is dropped

    def given_rows(self) -> Rows:
        """The rows of the features as they were given, a fork's of both halves."""
        return Rows(self.shape[0], self.positions, self.position_major)

    def result_shape(self) -> tuple[int, ...]:
        """Of the features or of the fork, or in memory order (L, N, C) of the matrix of their rows."""
        count = 2 * self.shape[0] if self.fork in ("x", "plain") else self.shape[0]
        return (count * self.positions, self.shape[-1]) if self.position_major else (count, *self.shape[1:])

    def matrix(self, x: Tensor) -> Tensor:
        """The features that go through the layer, of those that were given, as [R, C]; a view where memory allows."""
        matrix = as_rows(x, self.given_rows())
        if self.fork != "input":
            return matrix
        return self.halves(matrix)[1].reshape(self.rows().total(), -1).contiguous()

    def views(self, x: Tensor) -> bool:
        """Whether :meth:`matrix` is a view of x."""
        return x.is_contiguous() or (self.fork != "input" and x.movedim(0, -2).is_contiguous())

    def rows(self) -> Rows:
        """The rows, as elementwise kernels take them."""
        return Rows(self.samples, self.positions, self.position_major, 0 if self.batch is None else self.batch.first())

    def keys(self) -> int:
        """How many samples a sample attends to."""
        return self.samples if self.batch is None else self.batch.total()

    def in_parts(self, channels: int) -> bool:
        """Whether keys and values of other ranks come in parts."""
        if self.batch is None:
            return False
        return not collectives.gathers(self.batch, 2 * channels * self.positions * self.compute.itemsize)

    def options(self, channels: int) -> attention.Options:
        """The options of attention."""
        return attention.Options((channels // self.num_heads) ** -0.5, self.seed, self.threshold)

    def drop(self, site: Site) -> Drop:
        """The dropout of an elementwise kernel."""
        return Drop(self.seed, int(site), self.threshold)

    def halves(self, fork: Tensor) -> tuple[Tensor, ...]:
        """The plain and the mixed half of a fork [2R, C], as (N, L, C) in memory order, views."""
        if self.position_major:
            return fork.view(self.positions, 2, self.samples, -1).unbind(1)
        return fork.view(2, self.samples, self.positions, -1).unbind(0)

    def by_sample(self, matrix: Tensor) -> Tensor:
        """[R, W] → (N, L, W), a view."""
        if self.position_major:
            return matrix.view(self.positions, self.samples, -1).transpose(0, 1)
        return matrix.view(self.samples, self.positions, -1)

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, L, C) → (N, L, H, D), a view."""
        return x.unflatten(-1, (self.num_heads, -1))

    def heads(self, matrix: Tensor) -> Tensor:
        """[R, C] → (N, L, H, D), a view."""
        return self.split_heads(self.by_sample(matrix))


class Factors(NamedTuple):
    """The weights that backward multiplies with."""

    in_proj: Tensor  #: (3C, C), in the products' dtype, as the next three
    out_proj: Tensor  #: (C, C)
    linear1: Tensor  #: (F, C)
    linear2: Tensor  #: (C, F)
    norm1: Tensor  #: (C,)
    norm2: Tensor  #: (C,)


class Saved(NamedTuple):
    """What forward saves besides x, the seed and :class:`Factors`: matrices of R rows, unless a shape is given.

    Products are bytes a row. X, T and Z are the bytes of an element of x, of a matrix product and of a norm's result.
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


def allocate(x: Tensor, weights: LayerWeights, layer: Layer) -> Saved:
    """Empty tensors for what a call saves."""
    rows, channels = x.shape
    width, groups, across = weights.linear1_weight.shape[0], layer.positions * layer.num_heads, layer.batch is not None
    held = layer.samples if layer.in_parts(channels) else layer.keys()
    compute, streams = layer.compute, attention.streams(layer.samples, layer.keys())

    def empty(*shape: int, dtype: torch.dtype = compute) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    return Saved(
        normed=empty(rows, channels) if layer.norm_first else None,  # else forward finds out whether x has its dtype
        qkv=empty(rows, channels if across else 3 * channels),
        kv=empty(held, layer.positions, 2 * channels) if across else None,
        o=empty(rows, channels),
        lse=empty(groups, layer.samples, dtype=torch.float32) if streams else None,
        s1=empty(rows, channels, dtype=torch.promote_types(x.dtype, compute)),
        z=empty(rows, channels),
        hidden=empty(rows, width),
        s2=None if layer.norm_first else empty(rows, channels, dtype=torch.promote_types(layer.norm, compute)),
    )
