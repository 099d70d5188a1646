"""SharedClassifier: one linear classifier for the plain and the mixed stream, with its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastbf import checks, functional, reference
from fastbf.backend import check_backend
from fastbf.modules.class_numbers import numbers
from fastbf.suggestions import suggesting
from fastbf.torch_state import autocast_dtype, has_forward_pre_hooks


class SharedClassifier(nn.Linear):
    """A linear classifier shared by the plain and the mixed stream, with its loss.

    It also takes the keywords of ``nn.Linear``: ``out_features`` for ``num_classes``, and ``input`` for ``features`` in
    ``forward``.

    Args:
        in_features: channels C.
        num_classes: K.
        bias: whether there is one.
        class_counts: training samples of each class, K finite numbers ≥ 0 in the order of classes, or a mapping
            from classes such as a ``Counter``, where a class that is missing has none. Their logarithm is added to the
            logits in the loss only (Balanced Softmax).
        class_weight: a factor for each class in the loss, K finite numbers ≥ 0, or a mapping from all classes.
        label_smoothing: in [0, 1], in the loss.
        ignore_index: rows with this class index do not count.
        scale: multiplies input · weightᵀ + bias, in ``forward`` and in the loss.
        backend: "auto", "triton" or "torch".
        device: of the parameters.
        dtype: of the parameters.

    Every rank holds the whole weight; classes are not split over ranks. The ``state_dict`` is that of ``nn.Linear``.
    Class counts and class weights are buffers outside it: a cast of the module casts them, and ``to_empty`` after
    construction on the meta device loses them.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what is allowed.

    Examples:
        >>> classifier = fastbf.SharedClassifier(32, 3, class_counts=[500, 80, 10])
        >>> fork = fastbf.BatchFormer(32)(torch.randn(6, 32))
        >>> classifier.loss(fork, torch.tensor([0, 0, 0, 1, 1, 2])).shape
        torch.Size([])

    Source: Hou et al., CVPR 2022, section 3.2 (shared classifier); Ren et al., NeurIPS 2020 (Balanced Softmax).
    """

    op = "linear_cross_entropy"
    label_smoothing: float
    ignore_index: int
    scale: float
    backend: str
    log_prior: Tensor | None
    class_weight: Tensor | None

    @suggesting
    def __init__(
        self,
        in_features: int,
        num_classes: int | None = None,
        bias: bool = True,
        *,
        out_features: int | None = None,
        class_counts: Tensor | Iterable[float] | Mapping[int, float] | None = None,
        class_weight: Tensor | Iterable[float] | Mapping[int, float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        scale: float = 1.0,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        count = checks.positive("num_classes", checks.either("num_classes", num_classes, "out_features", out_features))
        checks.positive("in_features", in_features)
        super().__init__(in_features, count, bias, device=device, dtype=dtype)
        self.label_smoothing = checks.probability("label_smoothing", label_smoothing)
        self.scale, self.backend = checks.finite("scale", scale), check_backend(backend)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        counts = self._per_class("class_counts", class_counts, absent=0)
        self.register_buffer("log_prior", None if counts is None else counts.log(), persistent=False)
        self.register_buffer("class_weight", self._per_class("class_weight", class_weight), persistent=False)

    def _per_class(self, name: str, values: Any, absent: float | None = None) -> Tensor | None:
        if values is None:
            return None
        exact = torch.tensor(numbers(name, values, self.out_features, absent=absent), dtype=torch.float64, device="cpu")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return exact.to(device=self.weight.device, dtype=dtype, copy=True)

    def forward(  # type: ignore[override]  # nn.Linear's takes no name but ``input``
        self, features: Tensor | None = None, *targets: Any, input: Tensor | None = None
    ) -> Tensor:
        """Logits scale · (features · weightᵀ + bias), without class counts. (…, C) → (…, K).

        Raises:
            TypeError, ValueError: features that do not fit; TypeError for targets, which :meth:`loss` takes.

        Examples:
            >>> fastbf.SharedClassifier(32, 3)(torch.randn(6, 32)).shape
            torch.Size([6, 3])
        """
        if targets:
            raise TypeError(
                f"a call of SharedClassifier takes features alone, got {1 + len(targets)} arguments: the loss of "
                "features and targets is classifier.loss(features, target)"
            )
        x = self._check(checks.either("features", features, "input", input))
        return reference.class_logits(super().forward(x), self.scale, None)

    @overload
    def loss(
        self, features: Tensor, target: Tensor, *, reduction: str = "mean", stats: Literal[False] = False
    ) -> Tensor: ...  # fmt: skip
    @overload
    def loss(
        self, features: Tensor, target: Tensor, *, reduction: str = "mean", stats: Literal[True]
    ) -> tuple[Tensor, functional.LossStats]: ...  # fmt: skip
    @overload
    def loss(
        self, features: Tensor, target: Tensor, *, reduction: str = "mean", stats: bool
    ) -> Tensor | tuple[Tensor, functional.LossStats]: ...  # fmt: skip
    def loss(
        self, features: Tensor, target: Tensor, *, reduction: str = "mean", stats: bool = False
    ) -> Tensor | tuple[Tensor, functional.LossStats]:
        """Cross-entropy of features or of a fork.

        Args:
            features: (N, …, C), or a fork (2N, …, C), the plain half first.
            target: class indices (N, …) int64, or probabilities (N, …, K).
            reduction: "mean" over all rows of both streams that are not ignored, "sum" or "none".
            stats: also return loss and accuracies of each stream, without waiting for the device. ``accuracy`` is that
                of logits with class counts, ``unadjusted_accuracy`` that of the logits which ``forward`` returns.

        Returns:
            The loss, or the pair (loss, :class:`fastbf.functional.LossStats`).

        Raises:
            TypeError, ValueError: as :func:`fastbf.functional.linear_cross_entropy`.
            RuntimeError: the module has forward pre-hooks (``torch.nn.utils.weight_norm`` and ``spectral_norm``), which
                run in ``forward`` only; ``torch.nn.utils.parametrizations`` works.

        Examples:
            >>> classifier = fastbf.SharedClassifier(32, 3)
            >>> fork = torch.randn(12, 32)  # of 6 samples, so 6 labels
            >>> loss, stats = classifier.loss(fork, torch.tensor([0, 0, 0, 1, 1, 2]), stats=True)
            >>> stats.accuracy.shape  # of the plain and of the mixed stream
            torch.Size([2])
        """
        if has_forward_pre_hooks(self):
            raise RuntimeError(
                "SharedClassifier.loss runs no forward pre-hooks: use torch.nn.utils.parametrizations instead"
            )
        weight = self.weight
        if (
            not isinstance(features, Tensor)
            or features.is_nested  # which has no shape
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

    def _check(self, x: object) -> Tensor:
        features, weight = checks.dense("features", checks.floating("features", x)), self.weight
        if not features.dim() or features.shape[-1] != self.in_features:
            raise ValueError(
                f"features must have {self.in_features} channels in the last dimension, got shape "
                f"{tuple(features.shape)}"
            )
        if features.device != weight.device:
            raise ValueError(f"features must be on the device of the weights, {weight.device}, got {features.device}")
        if features.dtype != weight.dtype and autocast_dtype(features) is None:
            checks.dtype_of_weights("features", features, {"weight": weight})
        return features
