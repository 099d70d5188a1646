"""An encoder layer as matrix products and kernels, forward and backward, on plain tensors.

Everything is a matrix of rows of channels, R = N · L of them in memory order (``kernels/rows.py``): matrix products and
elementwise kernels do not care which sample a row belongs to, and attention reads and writes by strides. So no tensor
is transposed, whatever the layout.

Source: DESIGN sections 1 and 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastbf.context import no_autocast
from fastbf.dropout import Site
from fastbf.encoder_weights import cast, cast_size, needs_cast
from fastbf.kernels import activation, add_norm, attention
from fastbf.kernels.rows import Rows
from fastbf.products import linear_into
from fastbf.reference import LayerWeights, split_qkv


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

    @property
    def rows(self) -> Rows:
        return Rows(self.samples, self.positions, self.position_major)

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
    qkv: Tensor  #: 3C · T
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
        o=True,
        lse=attention.streams(layer.samples, layer.samples),
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
    saved = Saved(
        normed=empty(rows, channels, wanted=needed.normed),
        qkv=empty(rows, 3 * channels),
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


def forward(
    x: Tensor, plain: Tensor | None, weights: LayerWeights, seed: Tensor | None, layer: Layer
) -> tuple[Tensor, Saved]:
    """The layer's result and what backward needs.

    Args:
        x: [R, C], contiguous.
        plain: what ``layer.fork`` says: of x's size for "plain", a fork [2R, C] for "input", contiguous; else None.
        weights: of the layer.
        seed: int64, one element, on x's device; None only if nothing is dropped.
        layer: the call.

    Returns:
        [R, C], or the fork: in memory (2N, L, C), or (L, 2N, C) if ``layer.position_major``, as [2R, C].
    """
    out, saved = allocate(x, plain, weights, layer)
    with no_autocast(x):
        _forward(x, x if layer.fork == "x" else plain, weights, seed, layer, out, saved)
    return out, saved


def _forward(
    x: Tensor, plain: Tensor | None, w: LayerWeights, seed: Tensor | None, layer: Layer, out: Tensor, saved: Saved
) -> None:
    rows = layer.rows
    norms = (w.norm1_weight, w.norm1_bias, layer.eps), (w.norm2_weight, w.norm2_bias, layer.eps)
    narrowed = {} if layer.norm_first or saved.normed is None else {saved.normed: x}
    if saved.cast is not None:
        w = cast(w, saved.cast, narrowed)
    elif narrowed:
        saved.normed.copy_(x)

    if layer.norm_first:
        add_norm.forward(x, rows, y=saved.normed, norm=norms[0])
    linear_into(x if saved.normed is None else saved.normed, w.in_proj_weight, w.in_proj_bias, saved.qkv)
    attention.forward(
        *split_qkv(layer.by_sample(saved.qkv), layer.num_heads), seed,
        scale=(x.shape[1] // layer.num_heads) ** -0.5, threshold=layer.drop, o=layer.heads(saved.o), lse=saved.lse,
    )  # fmt: skip
    branch = torch.empty_like(saved.o)
    linear_into(saved.o, w.out_proj_weight, w.out_proj_bias, branch)

    drops = layer.drops(Site.ATTENTION_OUTPUT, seed)
    if layer.norm_first:
        residual = saved.s1
        add_norm.forward(x, rows, x=branch, total=saved.s1, y=saved.z, norm=norms[1], **drops)
    else:
        copied = layer.norm != layer.compute
        residual = torch.empty(x.shape, dtype=layer.norm, device=x.device) if copied else saved.z
        copy = saved.z if copied else None
        add_norm.forward(x, rows, x=branch, total=saved.s1, y=residual, copy=copy, norm=norms[0], **drops)

    linear_into(saved.z, w.linear1_weight, w.linear1_bias, saved.hidden)
    u = saved.hidden if layer.activation == "relu" else torch.empty_like(saved.hidden)
    activation.forward(saved.hidden, rows, layer.activation, u=u, **layer.drops(Site.ACTIVATION, seed))
    linear_into(u, w.linear2_weight, w.linear2_bias, branch)

    norm = None if layer.norm_first else norms[1]
    drops = layer.drops(Site.FEEDFORWARD_OUTPUT, seed)
    fork = {"plain": plain, "plain_forked": layer.fork == "input"}
    add_norm.forward(residual, rows, x=branch, total=saved.s2, y=out, norm=norm, **fork, **drops)
