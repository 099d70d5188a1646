"""Attention of an encoder layer on kernels where several ranks share the batch.

Keys and values are computed first, and are sent while the queries are computed. In backward their gradients are sent
while the output projection's is computed. If the whole batch's keys and values are too large to hold, they come in
parts, in both directions (``fastbf/distributed/exchange.py``). While ``torch.compile`` traces, each direction is one
operator, which waits for the other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbf.distributed import collectives, exchange
from fastbf.distributed.collectives import Pending
from fastbf.distributed.exchange import split_kv
from fastbf.distributed.operators import communicating
from fastbf.distributed.process_groups import Batch, confirm
from fastbf.kernels import attention
from fastbf.kernels.attention import Gradients, Inputs, Options
from fastbf.triton_backend.encoder_call import Layer, Saved
from fastbf.triton_backend.matmul import linear_into


def forward(normed: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, saved: Saved) -> None:
    """Writes q, kv, o and lse of ``saved``.

    Args:
        normed: [R, C], what the product reads.
        weight: (3C, C), in its dtype, and the bias (3C,) or None.
        layer: the call, with a batch.
        saved: what to write to.
    """
    channels, batch, kept = normed.shape[1], layer.batch, saved.kv
    assert batch is not None
    assert kept is not None
    parts = [channels, 2 * channels]
    (w_q, w_kv), (b_q, b_kv) = weight.split(parts), (None, None) if bias is None else bias.split(parts)
    kv = torch.empty(normed.shape[0], 2 * channels, dtype=normed.dtype, device=normed.device)
    linear_into(normed, w_kv, b_kv, kv)
    kv, q, o = layer.by_sample(kv).contiguous(), layer.heads(saved.qkv), layer.heads(saved.o)
    options, compiling = layer.options(channels), torch.compiler.is_compiling()
    coming = None if compiling else _begin(kv, kept, batch)
    linear_into(normed, w_q, b_q, saved.qkv)
    if compiling:
        _triton_attention_across_ranks_forward(
            q, kv, kept, o, saved.lse, options.seed, options.scale, options.threshold, *batch
        )
    else:
        _attend(q, kept, o, saved.lse, options, batch, coming)


def _begin(kv: Tensor, kept: Tensor, batch: Batch) -> Pending | None:
    """Begins to gather all ranks' kv in ``kept``. If they are too large, copies this rank's there and returns None."""
    if collectives.gathers(batch, kv[0].numel() * kv.element_size()):
        return collectives.gather(kv, kept, batch)
    kept.copy_(kv)
    return None


def _attend(
    q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, options: Options, batch: Batch, coming: Pending | None
) -> None:
    """Writes o and lse."""
    if coming is None:
        exchange.forward(_forward_part(options), q, kv, o, lse, batch)
        return
    k, v = split_kv(coming.wait(), q.shape[-2])
    attention.forward(q, k, v, options._replace(row=batch.first()), o=o, lse=lse)


def _forward_part(options: Options) -> Callable[..., None]:
    """``attention.forward`` as ``exchange.forward`` calls it."""

    def part(q: Tensor, k: Tensor, v: Tensor, *, o: Tensor, lse: Tensor | None, origin: tuple[int, int, int]) -> None:
        attention.forward(q, k, v, Options(*options[:3], *origin), o=o, lse=lse)

    return part


@communicating(
    "Tensor q, Tensor kv, Tensor(a!) kept, Tensor(b!) o, Tensor(c!)? lse, Tensor? seed, float scale, SymInt threshold",
)  # fmt: skip
def _triton_attention_across_ranks_forward(
    q: Tensor, kv: Tensor, kept: Tensor, o: Tensor, lse: Tensor | None, seed: Tensor | None, scale: float,
    threshold: int, *of_batch: Any,
) -> None:  # fmt: skip
    batch = Batch(*of_batch)
    confirm(batch)
    _attend(q, kept, o, lse, Options(scale, seed, threshold), batch, _begin(kv, kept, batch))


def backward(do: Tensor, layer: Layer, saved: Saved, d_qkv: Tensor) -> Pending | None:
    """Writes the gradient of q. Those of k and v are written too, or by :func:`finish` if they are still being summed.

    Args:
        do: [R, C], of o.
        layer, saved: as in :func:`forward`.
        d_qkv: [R, 3C].
    """
    channels, batch, kv = do.shape[1], layer.batch, saved.kv
    assert batch is not None
    assert kv is not None
    d_q, d_kv = layer.by_sample(d_qkv).split([channels, 2 * channels], dim=-1)
    q, do, o, d_q = layer.heads(saved.qkv), layer.heads(do), layer.heads(saved.o), layer.split_heads(d_q)
    options = layer.options(channels)
    if torch.compiler.is_compiling():
        numbers = options.scale, options.threshold
        _triton_attention_across_ranks_backward(do, q, kv, o, saved.lse, d_q, d_kv, options.seed, *numbers, *batch)
        return None
    return _gradients(do, (q, kv, o, saved.lse), d_q, d_kv, options, batch)


def finish(pending: Pending | None, layer: Layer, d_qkv: Tensor | None) -> None:
    """Waits for the sum that :func:`backward` began, and writes the gradients of k and v."""
    if pending is not None and d_qkv is not None:
        exchange.take_own(pending.wait(), layer.by_sample(d_qkv)[..., d_qkv.shape[1] // 3 :])


def _gradients(
    do: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor | None], d_q: Tensor, d_kv: Tensor, options: Options,
    batch: Batch,
) -> Pending | None:  # fmt: skip
    """Writes the gradient of q, and that of kv unless its sum over ranks is returned."""
    q, kv, o, lse = saved
    heads = q.shape[-2]
    if not collectives.gathers(batch, kv[0].numel() * kv.element_size()):
        exchange.backward(_backward_part(options), do, q, kv, o, lse, d_q, d_kv, batch)
        return None
    d_all = torch.empty(kv.shape, dtype=torch.float32, device=do.device)
    inputs, grads = Inputs(q, *split_kv(kv, heads), o, lse), Gradients(d_q, *split_kv(d_all, heads))
    attention.backward(do, inputs, options._replace(row=batch.first()), grads)
    return collectives.scatter_sum(d_all, batch)


def _backward_part(options: Options) -> Callable[..., None]:
    """``attention.backward`` as ``exchange.backward`` calls it."""

    def part(
        do: Tensor, *saved: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, origin: tuple[int, int, int]
    ) -> None:  # fmt: skip
        attention.backward(do, Inputs(*saved), Options(*options[:3], *origin), Gradients(dq, dk, dv))

    return part


@communicating(
    "Tensor do, Tensor q, Tensor kv, Tensor o, Tensor? lse, Tensor(a!) d_q, Tensor(b!) d_kv, Tensor? seed, float scale,"
    " SymInt threshold",
)  # fmt: skip
def _triton_attention_across_ranks_backward(
    do: Tensor, q: Tensor, kv: Tensor, o: Tensor, lse: Tensor | None, d_q: Tensor, d_kv: Tensor, seed: Tensor | None,
    *numbers: Any,
) -> None:  # fmt: skip
    scale, threshold, *of_batch = numbers
    batch = Batch(*of_batch)
    pending = _gradients(do, (q, kv, o, lse), d_q, d_kv, Options(scale, seed, threshold), batch)
    if pending is not None:
        exchange.take_own(pending.wait(), d_kv)
