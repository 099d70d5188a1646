"""BatchFormerLayer: a drop-in ``nn.TransformerEncoderLayer`` that is quick along the batch axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbf import checks, functional, reference
from fastbf.backend import Choice, check_backend, choose
from fastbf.distributed import gathering
from fastbf.distributed.process_groups import group_of, known_name
from fastbf.modules import layout
from fastbf.suggestions import suggesting
from fastbf.torch_state import (
    are_patched,
    as_leaf,
    autocast_dtype,
    differentiated,
    encoder_parts,
    encoder_weights,
    has_own_blocks,
    is_altered,
    part,
)

_KINDS = nn.MultiheadAttention, *[nn.Linear] * 2, *[nn.LayerNorm] * 2, *[nn.Dropout] * 3


def _activation_name(activation: str | Callable[[Tensor], Tensor]) -> str | None:
    """ "relu" or "gelu" for the activations that the fused layer covers, None for any other."""
    if activation is F.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none"):
        return "gelu"
    return None


class BatchFormerLayer(nn.TransformerEncoderLayer):
    """A drop-in ``nn.TransformerEncoderLayer`` that is quick along the batch axis.

    Constructor, parameters, initialisation, ``state_dict``, ``forward`` signature and results are the parent's, in an
    ``nn.TransformerEncoder`` too. Calls that the fused layer does not cover (masks, other activations, hooks or
    replaced modules inside) run the parent's ``forward``.

    Args:
        backend: keyword-only; "auto", "triton" or "torch".
        process_group: keyword-only; a ``torch.distributed`` group whose ranks' batches attend to each other, in
            training and evaluation, see :mod:`fastbf.distributed`; None is this process alone (``dist.group.WORLD`` is
            None before ``init_process_group``). It can be set later. With a group, calls that the fused layer does not
            cover raise.

    Raises:
        ValueError: an activation name other than "relu" and "gelu", a head count that does not divide ``d_model``,
            dropout outside [0, 1], an unknown backend, a group that this process is not in.
        TypeError: process_group is not a group, activation is not callable, or an unknown keyword.

    Examples:
        >>> layer = fastbf.BatchFormerLayer(32, 4, 32, 0.5)
        >>> layer(torch.randn(6, 32)).shape  # one sequence of 6 samples
        torch.Size([6, 32])

    Source: paper section 3.2; the arithmetic is that of ``torch.nn.TransformerEncoderLayer``.
    """

    op = "encoder_layer"

    @suggesting
    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        checks.heads("d_model", d_model, "nhead", nhead)
        checks.positive("dim_feedforward", dim_feedforward)
        checks.probability("dropout", dropout)
        if isinstance(activation, str):
            checks.choice("activation", activation, functional.ACTIVATIONS)
        elif isinstance(activation, type) or not callable(activation):
            given = f"the class {activation.__name__}" if isinstance(activation, type) else type(activation).__name__
            raise TypeError(
                f"activation must be 'relu', 'gelu' or a callable that takes a tensor, such as nn.ReLU(), got {given}"
            )
        check_backend(backend)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.backend = backend
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """The group whose ranks' batches attend to each other, or None. Copies and pickles of a layer hold its name.

        Examples:
            >>> fastbf.BatchFormerLayer(32, 4).process_group is None
            True
        """
        return group_of(self._group)

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._group = known_name(process_group)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """src (S, C), (S, B, C), or (B, S, C) with ``batch_first``; attention runs along S, for BatchFormer the batch.

        Returns src's shape, with the strides of the parent's result.

        Raises:
            ValueError: wrong rank, width or device; ``backend="triton"`` for a call that no kernel covers; a
                process_group for a call that the fused layer does not cover.
            TypeError: src is not a floating-point tensor.

        Examples:
            >>> layer = fastbf.BatchFormerLayer(32, 4, batch_first=True)
            >>> layer(torch.randn(1, 6, 32)).shape  # 6 samples that attend to each other
            torch.Size([1, 6, 32])
        """
        if not isinstance(src, Tensor):
            leaf: Any = as_leaf(self, _FORWARD, src, src_mask, src_key_padding_mask, is_causal)
            if leaf is not None:
                return leaf
        masked = src_mask is not None or src_key_padding_mask is not None or is_causal
        checks.floating("src", src)
        fused = "the call has an attention mask." if masked else self._fused_or_reason(src)
        backend: str | Choice = self.backend
        if isinstance(fused, str):
            if self._group is not None:
                raise ValueError(f"a layer with a process_group cannot serve this call: {fused}")
            choose(backend, self.op, src, obstacle=fused)  # raises for "triton"
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        weights, options = fused
        self._check(src, weights)
        if self._group is None and not self.training:
            head_dim = src.shape[-1] // options["num_heads"]
            backend = choose(backend, self.op, src, head_dim=head_dim)
            # In evaluation the parent's inference path is quicker than the fused layer of the torch backend.
            if backend.backend == "torch":
                return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        along_batch = src.dim() == 3 and self.self_attn.batch_first
        x = src.transpose(0, 1) if along_batch else src
        out = functional.encoder_layer(x, *weights, **options, backend=backend)
        out = out.transpose(0, 1) if along_batch else out
        # The parent's result is contiguous if a norm comes last, and by its inference path, which needs batch_first.
        # Else it has the strides of the sum src + ….
        inference = along_batch and not self.training and not differentiated(src, *weights)
        return layout.like(out, src, along_batch) if self.norm_first and not inference else out.contiguous()

    def fork(self, x: Tensor, *, plain: Tensor | None = None, forked: bool = False) -> Tensor:
        """The fork of x (N, …, C); ``plain`` and ``forked`` as in ``functional.encoder_layer``.

        Examples:
            >>> x = torch.randn(6, 32)
            >>> fork = fastbf.BatchFormerLayer(32, 4).fork(x, plain=x)
            >>> fork.shape, torch.equal(fork[:6], x)
            (torch.Size([12, 32]), True)
        """
        kind = type(self)
        called = kind.forward is not _FORWARD or kind.__call__ is not nn.Module.__call__ or is_altered(self)
        called = called or (x.dim() == 3 and self.self_attn.batch_first)  # along the positions, not the batch
        fused = "" if called or not x.shape[0] else self._fused_or_reason(x)
        if not isinstance(fused, str):
            weights, options = fused
            if x.device != weights[0].device:
                self._check(x, weights)
            return functional.encoder_layer(x, *weights, **options, plain=plain, forked=forked, backend=self.backend)
        if forked:
            plain, x = x.tensor_split(2)
        mixed = self(x)
        return mixed if plain is None else reference.fork(plain, mixed)

    def parent_reason(self, src: Tensor | None = None) -> str | None:
        """Why a call without masks runs ``nn.TransformerEncoderLayer.forward``, in a sentence; None if it does not.

        Examples:
            >>> fastbf.BatchFormerLayer(32, 4, activation=torch.tanh).parent_reason()
            'the activation is neither relu nor exact gelu.'
        """
        found = self._fused_or_reason(src)
        return found if isinstance(found, str) else None

    def _fused_or_reason(self, src: Tensor | None = None) -> tuple[tuple[Any, ...], dict[str, Any]] | str:
        """The arguments of ``functional.encoder_layer``, or why the parent runs, as :meth:`parent_reason`."""
        inside = encoder_parts(self, BatchFormerLayer)
        attention, _, linear2, norm1, norm2, dropout, dropout1, dropout2 = inside
        activation = self.activation
        if src is not None and src.is_nested:
            return "the input is a nested tensor."
        if has_own_blocks(self):
            return "the layer has an attention block or a feed-forward block of its own."
        if are_patched():
            return "a class of torch that the layer is made of has a forward of its own."
        if (name := _activation_name(activation)) is None:
            return "the activation is neither relu nor exact gelu."
        if tuple(map(type, inside)) != _KINDS:
            return "a module inside the layer was replaced."
        out_proj = part(attention, nn.MultiheadAttention, "out_proj")
        if is_altered(*inside, out_proj, *((activation,) if isinstance(activation, nn.Module) else ())):
            return "a module inside the layer has hooks, or a forward of its own."
        channels, p, eps, training = attention.embed_dim, dropout.p, norm1.eps, self.training
        if not linear2.out_features == out_proj.out_features == channels:
            return "a module inside the layer has another width than the layer."
        weights = encoder_weights(attention, out_proj, *inside[1:5])
        in_proj_weight, *_, norm1_weight, _, norm2_weight, _ = weights
        if attention.bias_k is not None or attention.add_zero_attn or in_proj_weight is None:
            return "the attention has extra keys or other widths for them."
        if norm1_weight is None or norm2_weight is None:
            return "a norm of the layer has no weight."
        if not norm1.normalized_shape == norm2.normalized_shape == (channels,):
            return "a norm of the layer does not normalise the channels alone."
        if not attention.dropout == p == dropout1.p == dropout2.p:
            return "the layer's dropouts have different rates."
        if not training == attention.training == dropout.training == dropout1.training == dropout2.training:
            return "parts of the layer are in another mode than the layer."
        if eps != norm2.eps:
            return "the layer's norms have different eps."
        return weights, {
            "num_heads": attention.num_heads,
            "activation": name,
            "dropout_p": p if training else 0.0,
            "norm_first": self.norm_first,
            "eps": eps,
            "process_group": self._group,
        }

    def extra_repr(self) -> str:
        parts = [] if self.backend == "auto" else [f"backend={self.backend!r}"]
        return ", ".join(parts if self._group is None else [*parts, f"process_group={self._group!r}"])

    def _check(self, src: Tensor, weights: tuple[Any, ...] | None = None) -> None:
        """Checks the input, for the layer's weights in the order of ``LayerWeights``, if they were read already."""
        weights = weights or self._weights()
        checks.dense("src", src)
        if src.dim() not in (2, 3):
            raise ValueError(f"src must have 2 or 3 dimensions, (S, C) or (S, B, C), got shape {tuple(src.shape)}")
        _, _, weight, *_ = weights
        if src.shape[-1] != weight.shape[0]:
            raise ValueError(f"src must have {weight.shape[0]} channels in its last dimension, got {src.shape[-1]}")
        if src.device != weight.device:
            raise ValueError(f"src must be on the device of the weights, {weight.device}, got {src.device}")
        if src.dtype != weight.dtype and autocast_dtype(src) is None:
            fields = reference.LayerWeights._make(weights)._asdict()
            checks.dtype_of_weights("src", src, {n: w for n, w in fields.items() if not n.startswith("norm")})

    def _weights(self) -> reference.LayerWeights:
        inside = encoder_parts(self, BatchFormerLayer)
        return reference.LayerWeights._make(encoder_weights(inside[0], inside[0].out_proj, *inside[1:5]))

    def attention_map(self, x: Tensor) -> Tensor:
        """Softmax weights (…, H, N, M) of x (N, …, C), without dropout; M counts the samples of all ranks.

        Examples:
            >>> fastbf.BatchFormerLayer(32, 4).attention_map(torch.randn(6, 32)).shape
            torch.Size([4, 6, 6])
        """
        w = self._weights()
        if self.norm_first:
            x = F.layer_norm(x, (x.shape[-1],), w.norm1_weight, w.norm1_bias, self.norm1.eps)
        q, k, _ = reference.split_qkv(F.linear(x, w.in_proj_weight, w.in_proj_bias), self.self_attn.num_heads)
        k, _ = gathering.gather(k, self._group)
        return reference.attention_weights(q, k, scale=q.shape[-1] ** -0.5)


_FORWARD = BatchFormerLayer.forward
