"""The attention of an encoder layer: its first product and the kernels, of a batch on this rank alone or on several.

Across ranks the product of keys and values comes first, and they travel while that of the queries runs; in backward
their gradients travel while the output projection's is computed. Where the whole batch's keys and values are too large
to hold, they come in parts, in either direction (``fastbf/exchange.py``).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastbf.distributed import collectives, exchange
from fastbf.distributed.exchange import split_kv
from fastbf.kernels import attention
from fastbf.reference import split_qkv
from fastbf.triton_backend.encoder_call import Layer, Saved
from fastbf.triton_backend.matmul import linear_into


def forward(
    normed: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, layer: Layer, saved: Saved
) -> None:  # fmt: skip
    """Writes qkv, or q and kv, o and lse.

    Args:
        normed: [R, C], what the product reads.
        weight: (3C, C), in its dtype, and the bias (3C,) or None.
        seed: int64, one element; None only if nothing is dropped.
        layer: the call.
        saved: what to write to.
    """
    channels, batch = normed.shape[1], layer.batch
    o, drops = layer.heads(saved.o), {"scale": layer.scale(channels), "threshold": layer.drop}
    if batch is None:
        linear_into(normed, weight, bias, saved.qkv)
        q, k, v = split_qkv(layer.by_sample(saved.qkv), layer.num_heads)
        attention.forward(q, k, v, seed, o=o, lse=saved.lse, **drops)
        return

    parts = [channels, 2 * channels]
    (w_q, w_kv), (b_q, b_kv) = weight.split(parts), (None, None) if bias is None else bias.split(parts)
    kv, q = torch.empty(normed.shape[0], 2 * channels, dtype=normed.dtype, device=normed.device), layer.heads(saved.qkv)
    linear_into(normed, w_kv, b_kv, kv)
    kv = layer.by_sample(kv).contiguous()
    if layer.in_parts(channels):
        saved.kv.copy_(kv)
        linear_into(normed, w_q, b_q, saved.qkv)
        exchange.forward(partial(attention.forward, seed=seed, **drops), q, saved.kv, o, saved.lse, batch)
        return
    coming = collectives.gather(kv, saved.kv, batch)
    linear_into(normed, w_q, b_q, saved.qkv)
    k, v = split_kv(coming.wait(), layer.num_heads)
    attention.forward(q, k, v, seed, o=o, lse=saved.lse, origin=(0, batch.first, 0), **drops)


class Backward:
    """The gradient of qkv [R, 3C]: begun, and ready once it has been waited for."""

    def __init__(self, do: Tensor, seed: Tensor | None, layer: Layer, saved: Saved) -> None:
        """do: [R, C], of o; the rest as in :func:`forward`."""
        channels = do.shape[1]
        self.pending = None
        self.d_qkv = torch.empty(do.shape[0], 3 * channels, dtype=do.dtype, device=do.device)
        by_sample, batch = layer.by_sample(self.d_qkv), layer.batch
        do, o = layer.heads(do), layer.heads(saved.o)
        drops = {"scale": layer.scale(channels), "threshold": layer.drop}
        dq, dk, dv = split_qkv(by_sample, layer.num_heads)
        if batch is None:
            q, k, v = split_qkv(layer.by_sample(saved.qkv), layer.num_heads)
            attention.backward(do, q, k, v, o, saved.lse, seed, dq, dk, dv, **drops)
            return
        q, self.d_kv = layer.heads(saved.qkv), by_sample[..., channels:]
        if layer.in_parts(channels):
            part = partial(attention.backward, seed=seed, **drops)
            exchange.backward(part, do, q, saved.kv, o, saved.lse, dq, self.d_kv, batch)
            return
        d_kv = torch.empty(saved.kv.shape, dtype=torch.float32, device=do.device)
        dk, dv = split_kv(d_kv, layer.num_heads)
        k, v = split_kv(saved.kv, layer.num_heads)
        attention.backward(do, q, k, v, o, saved.lse, seed, dq, dk, dv, origin=(0, batch.first, 0), **drops)
        self.pending = collectives.scatter_sum(d_kv, batch)

    def wait(self) -> Tensor:
        """[R, 3C]."""
        if self.pending is not None:
            exchange.take_own(self.pending.wait(), self.d_kv)
        return self.d_qkv
