"""The modules: BatchFormer (the method), BatchFormerLayer (a drop-in encoder layer), SharedClassifier (one
classifier for both streams)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbf import checks, distributed, functional, layout, reference
from fastbf.backend import check_backend, choose
from fastbf.process_groups import group_of, name_of


def _activation_name(activation: str | Callable[[Tensor], Tensor]) -> str | None:
    """ "relu" or "gelu" for the activations that the fused layer covers, None for any other."""
    if activation is F.relu or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu or (type(activation) is nn.GELU and activation.approximate == "none"):
        return "gelu"
    return None


class BatchFormerLayer(nn.TransformerEncoderLayer):
    """A drop-in ``nn.TransformerEncoderLayer`` that is quick along the batch axis.

    Same constructor, parameters, initialisation, ``state_dict``, ``forward`` signature and results as the parent;
    stacks by ``nn.TransformerEncoder`` included. Calls that the fused layer does not cover (masks, other
    activations, hooks or replaced modules inside) run the parent's ``forward``.

    Args:
        backend: keyword-only; "auto", "triton" or "torch".
        process_group: keyword-only; a ``torch.distributed`` group whose ranks' batches attend to each other, in
            training and evaluation, see :mod:`fastbf.distributed`; None is this process alone (``dist.group.WORLD`` is
            None before ``init_process_group``). Can be set later, too. Calls that the fused layer does not cover raise.

    Raises:
        ValueError: an activation name other than "relu" and "gelu", a head count that does not divide ``d_model``,
            dropout outside [0, 1], an unknown backend, a group that this process is not in.
        TypeError: process_group is something else than a group.

    Source: paper section 3.2; the arithmetic is that of ``torch.nn.TransformerEncoderLayer``.
    """

    op = "encoder_layer"

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
        check_backend(backend)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        self.backend = backend
        self.process_group = process_group

    @property
    def process_group(self) -> Any:
        """The group whose ranks' batches attend to each other, or None. Copies and pickles of a layer hold its name."""
        return group_of(self._group)

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        self._group = name_of(process_group)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As the parent's. src (S, C), (S, B, C), or (B, S, C) with ``batch_first``; attention runs along S.

        For BatchFormer S is the batch of samples. Returns src's shape, with the strides that the parent gives.

        Raises:
            ValueError: wrong rank, width or device; ``backend="triton"`` for a call that no kernel covers; a
                process_group for a call that the fused layer does not cover.
            TypeError: src is not a floating-point tensor.
        """
        masked = src_mask is not None or src_key_padding_mask is not None or is_causal
        checks.floating("src", src)
        reason = "the call has an attention mask." if masked else self.parent_reason(src)
        if reason is None:
            self._check(src)
        elif self._group is not None:
            raise ValueError(f"a layer with a process_group cannot serve this call: {reason}")
        if self._group is None:
            head_dim = None if reason else self.self_attn.head_dim
            choice = choose(self.backend, self.op, src, head_dim=head_dim, obstacle=reason)
            # Without dropout PyTorch's own inference path is the quickest there is in PyTorch.
            if reason is not None or (choice.backend == "torch" and not self.training):
                return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        along_batch = self.self_attn.batch_first and src.dim() == 3
        out = self._fused(src.transpose(0, 1) if along_batch else src)
        out = out.transpose(0, 1) if along_batch else out
        # A norm ends the parent's layer, and gives what is contiguous, or a sum that begins with src.
        return layout.like(out, src) if self.norm_first else out.contiguous()

    def forks(self, x: Tensor) -> bool:
        """Whether :meth:`fork` does for x (N, …, C) what ``forward`` would do."""
        if type(self).forward is not BatchFormerLayer.forward or _is_altered(self) or self.parent_reason(x) is not None:
            return False
        return x.shape[0] > 0

    def fork(self, x: Tensor, *, plain: Tensor | None = None, forked: bool = False) -> Tensor:
        """The fork of x (N, …, C) along its first dimension; ``plain`` and ``forked`` as in ``encoder_layer``."""
        return self._fused(x, plain=plain, forked=forked)

    def parent_reason(self, src: Tensor | None = None) -> str | None:
        """Why a call without masks runs ``nn.TransformerEncoderLayer.forward``, in a sentence; None if it does not."""
        inside, activation = self._modules, self.activation  # a tenth of what attributes cost the host
        attention, dropout, norm1, norm2 = inside["self_attn"], inside["dropout"], inside["norm1"], inside["norm2"]
        linear1, linear2 = inside["linear1"], inside["linear2"]
        dropout1, dropout2 = inside["dropout1"], inside["dropout2"]
        if src is not None and src.is_nested:
            return "the input is a nested tensor."
        if _activation_name(activation) is None:
            return "the activation is neither relu nor exact gelu."
        for m, kind in (
            (attention, nn.MultiheadAttention), (linear1, nn.Linear), (linear2, nn.Linear), (norm1, nn.LayerNorm),
            (norm2, nn.LayerNorm), (dropout, nn.Dropout), (dropout1, nn.Dropout), (dropout2, nn.Dropout),
        ):  # fmt: skip
            if type(m) is not kind:
                return "a module inside the layer was replaced."
            if _is_altered(m):
                return "a module inside the layer has hooks, or a forward of its own."
        if _is_altered(attention._modules["out_proj"]) or (
            isinstance(activation, nn.Module) and _is_altered(activation)
        ):
            return "a module inside the layer has hooks, or a forward of its own."
        if attention.bias_k is not None or attention.add_zero_attn or not attention._qkv_same_embed_dim:
            return "the attention has extra keys or other widths for them."
        if not (norm1.elementwise_affine and norm2.elementwise_affine):
            return "a norm of the layer has no weight."
        if not attention.dropout == dropout.p == dropout1.p == dropout2.p:
            return "the layer's dropouts have different rates."
        if not self.training == attention.training == dropout.training == dropout1.training == dropout2.training:
            return "parts of the layer are in another mode than the layer."
        if norm1.eps != norm2.eps:
            return "the layer's norms have different eps."
        return None

    def _check(self, src: Tensor) -> None:
        channels = self.self_attn.embed_dim
        if src.dim() not in (2, 3):
            raise ValueError(f"src must have 2 or 3 dimensions, (S, C) or (S, B, C), got shape {tuple(src.shape)}")
        if src.shape[-1] != channels:
            raise ValueError(f"src must have {channels} channels in its last dimension, got {src.shape[-1]}")
        if src.device != self.linear1.weight.device:
            raise ValueError(
                f"src must be on the device of the weights, {self.linear1.weight.device}, got {src.device}"
            )

    def _weights(self) -> reference.LayerWeights:
        inside = self._modules
        attention = inside["self_attn"]
        out_proj, linear1, linear2 = attention._modules["out_proj"], inside["linear1"], inside["linear2"]
        norm1, norm2 = inside["norm1"], inside["norm2"]
        try:  # registered parameters, at a fifth of what attributes cost the host
            weights = [attention._parameters["in_proj_weight"], attention._parameters["in_proj_bias"]]
            for m in (out_proj, linear1, linear2, norm1, norm2):
                parameters = m._parameters
                weights += parameters["weight"], parameters["bias"]
        except KeyError:  # some are plain attributes (FSDP's flat parameters)
            weights = [attention.in_proj_weight, attention.in_proj_bias]
            for m in (out_proj, linear1, linear2, norm1, norm2):
                weights += m.weight, m.bias
        return reference.LayerWeights(*weights)

    def _fused(self, x: Tensor, **fork: Any) -> Tensor:
        """The layer along the first dimension of x (N, …, C)."""
        weights = self._weights()
        if x.device != weights.in_proj_weight.device:
            self._check(x)
        return functional.encoder_layer(
            x,
            *weights,
            num_heads=self.self_attn.num_heads,
            activation=_activation_name(self.activation),
            dropout_p=self.dropout.p if self.training else 0.0,
            norm_first=self.norm_first,
            eps=self.norm1.eps,
            backend=self.backend,
            process_group=self._group,
            **fork,
        )

    def attention_map(self, x: Tensor) -> Tensor:
        """Softmax weights along the first dimension of x (N, …, C), without dropout: (…, H, N, M), M of all ranks."""
        w = self._weights()
        if self.norm_first:
            x = F.layer_norm(x, (x.shape[-1],), w.norm1_weight, w.norm1_bias, self.norm1.eps)
        q, k, _ = reference.split_qkv(F.linear(x, w.in_proj_weight, w.in_proj_bias), self.self_attn.num_heads)
        k, _ = distributed.gather(k, self._group)
        return reference.attention_weights(q, k, scale=q.shape[-1] ** -0.5)


def _is_altered(m: nn.Module) -> bool:
    """Whether calling ``m`` would run more, or other, than the ``forward`` of its class."""
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks) or "forward" in m.__dict__


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, every part back in its own mode afterwards."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


class BatchFormer(nn.Module):
    """BatchFormer: samples of a mini-batch learn from each other while training; the identity in evaluation.

    In training the features are forked: the result holds the plain features and, behind them along ``batch_dim``,
    the same features mixed by a transformer encoder that runs along the batch. Train both halves with one
    classifier and the repeated targets. In evaluation the very same objects come back, and :func:`fastbf.strip`
    removes the module for good.

    Features have any rank of at least 2; every dimension but the batch's and the channels' is a position, at which
    the batch is mixed independently: (N, C); (N, L, C); (L, N, C) with ``batch_dim=1``; (N, C, H, W) with
    ``channel_dim=1``.

    Args:
        dim: channels C.
        num_heads: H, divides ``dim``.
        dim_feedforward: F; None is ``dim``, as in the paper.
        dropout: probability in [0, 1].
        num_layers: encoder layers.
        activation: "relu", "gelu", or a callable.
        norm_first: normalise before instead of after the residual sums.
        layer_norm_eps: eps of the norms.
        bias: whether linear layers and norms have biases.
        batch_dim: the dimension that holds the samples.
        channel_dim: the dimension that holds the channels.
        forked: the input already holds both streams (a second insertion in a BatchFormerV2 network): only its second
            half is mixed, and nothing is doubled.
        backend: "auto", "triton" or "torch".
        process_group: a ``torch.distributed`` group whose ranks' batches attend to each other, see
            :mod:`fastbf.distributed`; None is this process alone.
        device, dtype: of the parameters.

    Attributes:
        layers: ``nn.ModuleList`` of :class:`BatchFormerLayer`.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what is allowed.

    Source: Hou et al., CVPR 2022 (arXiv 2203.01522), section 3, figure 2; dense features: arXiv 2204.01254.
    """

    op = "encoder_layer"

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        dim_feedforward: int | None = None,
        dropout: float = 0.5,
        *,
        num_layers: int = 1,
        activation: str | Callable[[Tensor], Tensor] = "relu",
        norm_first: bool = False,
        layer_norm_eps: float = 1e-5,
        bias: bool = True,
        batch_dim: int = 0,
        channel_dim: int = -1,
        forked: bool = False,
        backend: str = "auto",
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.heads("dim", dim, "num_heads", num_heads)
        checks.positive("num_layers", num_layers)
        for name, value in (("batch_dim", batch_dim), ("channel_dim", channel_dim)):
            checks.integer(name, value)
        if batch_dim == channel_dim:
            raise ValueError(f"batch_dim and channel_dim must differ, got {batch_dim} for both")
        self.dim, self.batch_dim, self.channel_dim = dim, batch_dim, channel_dim
        self.forked, self.backend = forked, backend
        self.layers = nn.ModuleList(
            BatchFormerLayer(
                dim,
                num_heads,
                dim if dim_feedforward is None else dim_feedforward,
                dropout,
                activation,
                layer_norm_eps,
                norm_first=norm_first,
                bias=bias,
                device=device,
                dtype=dtype,
                backend=backend,
                process_group=process_group,
            )
            for _ in range(num_layers)
        )

    @property
    def process_group(self) -> Any:
        """That of the layers."""
        return self.layers[0].process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        for layer in self.layers:
            layer.process_group = process_group

    def forward(self, features: Tensor, *targets: Any) -> Any:
        """Forks the features in training; gives everything back as it is in evaluation.

        Args:
            features: floating point, rank ≥ 2, N samples along ``batch_dim`` (2N if ``forked``), C channels along
                ``channel_dim``.
            targets: tensors with N rows, or lists or tuples of N items, one per sample.

        Returns:
            ``features``, or the tuple ``(features, *targets)`` if targets were given. In training the features have
            2N samples, the plain half first, contiguous or channels last, as they came; each tensor target is
            concatenated with itself along its first dimension, each list or tuple repeated. In evaluation the same
            objects; with ``forked`` the same targets.

        Raises:
            TypeError: features that are not a floating-point tensor, targets of another type.
            ValueError: wrong rank, width or device, dimensions out of range or equal, targets of the wrong length,
                an odd batch where it should be forked.
        """
        if not self.training:
            return (features, *targets) if targets else features
        dims = batch_dim, _ = self._dims(features)
        n = features.shape[batch_dim]
        if not self.forked:
            targets = tuple(_doubled(target, n) for target in targets)
        elif n % 2:
            raise ValueError(f"features must hold both streams along batch_dim={self.batch_dim}, got {n} samples")
        fork = self._fork(features, dims)
        if fork is None:
            plain, stream = features.tensor_split(2, dim=batch_dim) if self.forked else (features, features)
            fork = torch.cat([plain, self._mix(stream, dims)], dim=batch_dim)
        fork = layout.formatted(fork, features)
        return (fork, *targets) if targets else fork

    def _fork(self, features: Tensor, dims: tuple[int, int]) -> Tensor | None:
        """The fork, written as such by the last layer; None where that cannot write it as the features lie."""
        *others, last = self.layers
        x = _samples_first(features, dims)
        dense = x.is_contiguous() or x.movedim(0, -2).is_contiguous()
        if not dense or not isinstance(last, BatchFormerLayer) or not last.forks(x):
            return None
        x = _flat(x)
        if others:
            plain, stream = x.chunk(2) if self.forked else (x, x)
            fork = last.fork(self._run(stream, others), plain=plain)
        else:
            fork = last.fork(x, forked=True) if self.forked else last.fork(x, plain=x)
        return _unflat(fork, features, dims)

    def mix(self, features: Tensor) -> Tensor:
        """The mixed stream alone, (as ``features``), in either mode; dropout acts in training only."""
        return layout.formatted(self._mix(features, self._dims(features)), features)

    def _mix(self, features: Tensor, dims: tuple[int, int]) -> Tensor:
        return _unflat(self._run(_flat(_samples_first(features, dims)), self.layers), features, dims)

    def attention_map(self, features: Tensor) -> Tensor:
        """Softmax weights of the last layer, without dropout, for looking at sample relations.

        Returns:
            (…, H, N, N): the positions in their order, then heads, queries, keys. With a ``process_group`` the keys
            are those of all ranks, in their order.
        """
        x = _samples_first(features, self._dims(features))
        positions = x.shape[1:-1]
        with _evaluating(self.layers):
            x = self._run(_flat(x), self.layers[:-1])
        weights = self.layers[-1].attention_map(x)
        return weights.view(*positions, *weights.shape[-3:])

    def extra_repr(self) -> str:
        return f"{self.dim}, batch_dim={self.batch_dim}, channel_dim={self.channel_dim}, forked={self.forked}"

    def _dims(self, features: Tensor) -> tuple[int, int]:
        """Checks the features; batch and channel dimension, counted from the front."""
        checks.floating("features", features)
        checks.min_rank("features", features, 2, "a batch of features")
        rank = features.dim()
        dims = []
        for name, dim in (("batch_dim", self.batch_dim), ("channel_dim", self.channel_dim)):
            if not -rank <= dim < rank:
                raise ValueError(f"{name} must lie in [{-rank}, {rank - 1}] for {rank}-D features, got {dim}")
            dims.append(dim % rank)
        if dims[0] == dims[1]:
            raise ValueError(
                f"batch_dim and channel_dim must differ, got {self.batch_dim} and {self.channel_dim}, the same "
                f"dimension of {rank}-D features"
            )
        if features.shape[dims[1]] != self.dim:
            raise ValueError(
                f"features must have {self.dim} channels along channel_dim={self.channel_dim}, got shape "
                f"{tuple(features.shape)}"
            )
        return dims[0], dims[1]

    @staticmethod
    def _run(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x


def _samples_first(features: Tensor, dims: tuple[int, int]) -> Tensor:
    """(N, …, C), a view, of features whose batch and channel dimension ``dims`` names."""
    return features if dims == (0, features.dim() - 1) else features.movedim(dims, (0, -1))


def _flat(x: Tensor) -> Tensor:
    """(N, C) as it is; (N, …, C) → (N, positions, C)."""
    return x if x.dim() == 2 else x.flatten(1, -2)


def _unflat(x: Tensor, features: Tensor, dims: tuple[int, int]) -> Tensor:
    """(N, C) or (N, positions, C) → the layout of ``features``, whose batch and channel dimension ``dims`` names."""
    if features.dim() == 2 and dims == (0, 1):
        return x
    shape = features.movedim(dims, (0, -1)).shape
    return x.view(x.shape[0], *shape[1:]).movedim((0, -1), dims)


def _doubled(target: Any, n: int) -> Any:
    if not isinstance(target, Tensor | list | tuple):
        raise TypeError(f"targets must be tensors, lists or tuples, got {type(target).__name__}")
    length = len(target) if not isinstance(target, Tensor) else target.shape[0] if target.dim() else None
    if length != n:
        raise ValueError(f"targets must have one entry for each of the {n} samples, got {length}")
    return torch.cat([target, target]) if isinstance(target, Tensor) else target * 2


class SharedClassifier(nn.Linear):
    """A linear classifier shared by the plain and the mixed stream, with its loss.

    Takes the keywords of the ``nn.Linear`` that it replaces, too: ``out_features`` for ``num_classes``, and in
    ``forward`` ``input`` for ``features``.

    Args:
        in_features: channels C.
        num_classes: K.
        bias: whether there is one.
        class_counts: training samples of each class, K numbers ≥ 0; adds their logarithm to the logits in the loss
            only (Balanced Softmax).
        class_weight: a factor for each class in the loss, K numbers.
        label_smoothing: in [0, 1], in the loss.
        ignore_index: targets of this value count nothing.
        scale: multiplies input · weightᵀ + bias, in ``forward`` and in the loss.
        backend: "auto", "triton" or "torch".
        device, dtype: of the parameters.

    Classes split over ranks are out of scope: every rank holds the whole weight. Neither counts nor weights of
    classes are part of the ``state_dict``: it is that of ``nn.Linear``. They are buffers all the same: a cast of the
    module casts them, and ``to_empty`` after construction on the meta device loses them.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what is allowed.

    Source: Hou et al., CVPR 2022, section 3.2 (shared classifier); Ren et al., NeurIPS 2020 (Balanced Softmax).
    """

    op = "linear_cross_entropy"

    def __init__(
        self,
        in_features: int,
        num_classes: int | None = None,
        bias: bool = True,
        *,
        out_features: int | None = None,
        class_counts: Tensor | Sequence[float] | None = None,
        class_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        scale: float = 1.0,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        num_classes = checks.either("num_classes", num_classes, "out_features", out_features)
        checks.positive("in_features", in_features)
        checks.positive("num_classes", num_classes)
        super().__init__(in_features, num_classes, bias, device=device, dtype=dtype)
        self.label_smoothing = checks.probability("label_smoothing", label_smoothing)
        self.scale, self.backend = checks.finite("scale", scale), check_backend(backend)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        counts = self._per_class("class_counts", class_counts)
        self.register_buffer("log_prior", None if counts is None else counts.log(), persistent=False)
        self.register_buffer("class_weight", self._per_class("class_weight", class_weight), persistent=False)

    def _per_class(self, name: str, values: Tensor | Sequence[float] | None) -> Tensor | None:
        if values is None:
            return None
        values = torch.as_tensor(values, device="cpu").detach()
        checks.shape(name, values, (self.out_features,))
        if not (values >= 0).all():
            raise ValueError(f"{name} must not be negative, got {values.min().item()}")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return values.to(device=self.weight.device, dtype=dtype, copy=True)

    def forward(self, features: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """Logits scale · (features · weightᵀ + bias), without class counts. (…, C) → (…, K)."""
        features = checks.either("features", features, "input", input)
        self._check(features)
        return reference.class_logits(super().forward(features), self.scale, None)

    def loss(
        self, features: Tensor, target: Tensor, *, reduction: str = "mean", stats: bool = False
    ) -> Tensor | tuple[Tensor, functional.LossStats]:
        """Cross-entropy of the features, forked or not.

        Args:
            features: (N, …, C), or the fork of twice as many rows, the plain half first.
            target: class indices (N, …) int64, or probabilities (N, …, K).
            reduction: "mean" over all rows of both streams that are not ignored, "sum" or "none".
            stats: also return loss and accuracy of each stream, without waiting for the device: ``accuracy`` of logits
                with the class counts, as the loss sees them, ``unadjusted_accuracy`` of those that ``forward`` gives.

        Returns:
            The loss, or the pair (loss, :class:`fastbf.functional.LossStats`).

        Raises:
            TypeError, ValueError: as :func:`fastbf.functional.linear_cross_entropy`.
            RuntimeError: the module has forward pre-hooks (``torch.nn.utils.weight_norm`` and ``spectral_norm``), which
                run in ``forward`` only; those of ``torch.nn.utils.parametrizations`` work.
        """
        if self._forward_pre_hooks:
            raise RuntimeError(
                "SharedClassifier.loss runs no forward pre-hooks: use torch.nn.utils.parametrizations instead"
            )
        weight = self.weight
        if (
            not isinstance(features, Tensor)
            or features.shape[-1:] != weight.shape[1:]
            or features.device != weight.device
        ):
            self._check(features)
        return functional.linear_cross_entropy(
            features,
            weight,
            target,
            linear_bias=self.bias,
            weight=self.class_weight,
            logit_bias=self.log_prior,
            scale=self.scale,
            reduction=reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            stats=stats,
            backend=self.backend,
        )

    def _check(self, features: Tensor) -> None:
        checks.floating("features", features)
        if not features.dim() or features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must have {self.in_features} channels in the last dimension, got shape "
                f"{tuple(features.shape)}"
            )
        if features.device != self.weight.device:
            raise ValueError(
                f"features must be on the device of the weights, {self.weight.device}, got {features.device}"
            )
