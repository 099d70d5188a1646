"""SharedClassifier: one linear classifier for the plain and the mixed stream, with its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fastbf import checks, functional, reference
from fastbf.backend import check_backend, choose
from fastbf.modules.class_numbers import numbers
from fastbf.modules.class_values import ClassValues, LogCounts
from fastbf.suggestions import NOTHING, hiding_unknown, names_of, suggesting, unexpected
from fastbf.torch_state import (
    as_leaf,
    autocast_dtype,
    has_hooks,
    has_own,
    has_own_hooks,
    is_linear_patched,
    linear_weights,
)


class SharedClassifier(nn.Linear):
    """A linear classifier shared by the plain and the mixed stream, with its loss.

    It also takes the keywords of ``nn.Linear``: ``out_features`` for ``num_classes``, and ``input`` for ``features`` in
    ``forward``.

    Args:
        in_features: channels C.
        num_classes: K.
        bias: whether there is one.
        class_counts: training samples of each class, K finite numbers ≥ 0 in the order of classes, not all 0, or a
            mapping from classes such as a ``Counter``, where a class that is missing has none. Their logarithm is added
            to the logits in the loss only (Balanced Softmax). The loss of a row whose class has count 0 is infinite: a
            warning says so once on a CPU. On a GPU nothing does, because that would wait for the device.
        class_weight: a factor for each class in the loss, K finite numbers ≥ 0, or a mapping from all classes.
        label_smoothing: in [0, 1], in the loss.
        ignore_index: rows with this class index do not count.
        scale: multiplies input · weightᵀ + bias, in ``forward`` and in the loss.
        backend: "auto", "triton" or "torch".
        device: of the parameters.
        dtype: of the parameters.

    Every rank holds the whole weight; classes are not split over ranks. The ``state_dict`` is that of ``nn.Linear``.
    Class counts and class weights are no buffers: casts, ``to_empty`` and averages of buffers leave them as they were
    given, and the loss uses them in fp32, or in fp64 for fp64 weights.

    Attributes:
        log_prior: what the loss adds to the logits, a tensor (K,) on the device of the weight, or None. It can be set
            to another tensor (-inf switches a class off; it may require a gradient), or to None.
        class_weight: the factors of classes, likewise.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what is allowed. ValueError also
            for counts that hold a 0 together with ``label_smoothing``, because every loss would be infinite.

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
        if not isinstance(bias, int):  # True and False are such
            raise TypeError(f"bias must be True or False, got {type(bias).__name__}; class counts go in class_counts=")
        checks.positive("in_features", in_features)
        super().__init__(in_features, count, bias, device=device, dtype=dtype)
        self.label_smoothing = checks.probability("label_smoothing", label_smoothing)
        self.scale, self.backend = checks.finite("scale", scale), check_backend(backend)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self._log_prior: ClassValues | None = None
        self._class_weight: ClassValues | None = None
        if class_counts is not None:
            self._log_prior = LogCounts(numbers("class_counts", class_counts, count, absent=0))
            self._log_prior.check_smoothing(self.label_smoothing)
        if class_weight is not None:
            self._class_weight = ClassValues(numbers("class_weight", class_weight, count))
        self.held_tensors()  # a copy to a GPU is not for the first loss, which a CUDA graph may capture

    @property
    def log_prior(self) -> Tensor | None:
        """The logarithm of the class counts, (K,) on the device of the weight, or None. See the class.

        Examples:
            >>> fastbf.SharedClassifier(32, 2, class_counts=[1, 1]).log_prior
            tensor([0., 0.])
        """
        return self._on(self.weight, self._log_prior)

    @log_prior.setter
    def log_prior(self, value: Tensor | None) -> None:
        self._log_prior = self._held_as("log_prior", value)

    @property
    def class_weight(self) -> Tensor | None:
        """The factor of each class in the loss, (K,) on the device of the weight, or None. See the class.

        Examples:
            >>> fastbf.SharedClassifier(32, 2, class_weight=[1, 3]).class_weight
            tensor([1., 3.])
        """
        return self._on(self.weight, self._class_weight)

    @class_weight.setter
    def class_weight(self, value: Tensor | None) -> None:
        self._class_weight = self._held_as("class_weight", value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module.register_parameter``. TypeError for the attributes that are no parameters.

        Examples:
            >>> classifier = fastbf.SharedClassifier(32, 3)
            >>> classifier.register_parameter("temperature", torch.nn.Parameter(torch.ones(())))
            >>> len(list(classifier.parameters()))
            3
        """
        if name in ("log_prior", "class_weight"):
            raise TypeError(
                f"{name} cannot be a Parameter: set it to a tensor that is computed from one, or learn the bias instead"
            )
        super().register_parameter(name, param)

    def held_tensors(self) -> list[Tensor]:
        """The tensors that the loss reads beside parameters, which a captured graph holds by their addresses.

        Examples:
            >>> len(fastbf.SharedClassifier(32, 2, class_counts=[5, 1]).held_tensors())
            1
        """
        return [t for t in (self.log_prior, self.class_weight) if t is not None]

    def _held_as(self, name: str, value: object) -> ClassValues | None:
        if value is None:
            return None
        checks.shape(name, checks.floating(name, value), (self.out_features,))
        return ClassValues(value)  # type: ignore[arg-type]

    def _per_class(self, x: Tensor) -> dict[str, Tensor | None]:
        """The arguments of the loss that hold a number for each class: as a subclass computes them, or as held."""
        kind = type(self)
        weight = self._on(x, self._class_weight) if kind.class_weight is _CLASS_WEIGHT else self.class_weight
        prior = self._on(x, self._log_prior) if kind.log_prior is _LOG_PRIOR else self.log_prior
        return {"weight": weight, "logit_bias": prior}

    def _on(self, x: Tensor, values: ClassValues | None) -> Tensor | None:
        """The values on x's device, in fp32, or in fp64 for fp64 weights."""
        if values is None:
            return None
        return values.on(x, torch.float64 if self.weight.dtype == torch.float64 else torch.float32)

    def forward(  # type: ignore[override]  # nn.Linear's takes no name but ``input``
        self, features: Tensor | None = None, *targets: Any, input: Tensor | None = None, **keywords: Any
    ) -> Tensor:
        """Logits scale · (features · weightᵀ + bias), without class counts. (…, C) → (…, K).

        Raises:
            TypeError, ValueError: features that do not fit; TypeError for other keywords, and for targets, which
                :meth:`loss` takes.

        Examples:
            >>> fastbf.SharedClassifier(32, 3)(torch.randn(6, 32)).shape
            torch.Size([6, 3])
        """
        traced = input if features is None else features
        if isinstance(traced, torch.fx.Proxy):  # of a model, or of this module, whose arguments are all proxies then
            leaf = as_leaf(self, _FORWARD, traced)
            return reference.class_logits(super().forward(traced), self.scale, None) if leaf is None else leaf
        if targets or keywords:
            raise TypeError(self._advice(targets, keywords))
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
    @hiding_unknown
    def loss(
        self,
        features: Tensor = NOTHING,
        target: Tensor = NOTHING,
        *,
        reduction: str = "mean",
        stats: bool = False,
        **unknown: Any,
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

        If a call of the module runs more than the class's ``forward`` (hooks, ``torch.nn.utils.weight_norm``, a
        ``forward`` of a subclass or of this object), the loss is that of the logits which such a call returns.

        Examples:
            >>> classifier = fastbf.SharedClassifier(32, 3)
            >>> fork = torch.randn(12, 32)  # of 6 samples, so 6 labels
            >>> loss, stats = classifier.loss(fork, torch.tensor([0, 0, 0, 1, 1, 2]), stats=True)
            >>> stats.accuracy.shape  # of the plain and of the mixed stream
            torch.Size([2])
        """
        if unknown:
            settings = names_of(SharedClassifier)
            raise TypeError(unexpected("SharedClassifier.loss", next(iter(unknown)), names_of(_LOSS), settings))
        if isinstance(features, torch.fx.Proxy):
            return as_leaf(self, _LOSS, features, target, reduction=reduction, stats=stats)
        if isinstance(self._log_prior, LogCounts):
            self._log_prior.check_smoothing(self.label_smoothing)
            self._log_prior.check(checks.tensor("target", target), self.ignore_index)
        reason = self.parent_reason()
        if reason is not None:
            return self._loss_of_logits(features, target, reason, reduction=reduction, stats=stats)
        weight, bias = linear_weights(self, SharedClassifier)
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
            linear_bias=bias,
            **self._per_class(features),
            scale=self.scale,
            reduction=reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            stats=stats,
            backend=self.backend,
        )

    def parent_reason(self) -> str | None:
        """Why the loss takes the logits that a call of the module returns, in a sentence; None if it does not.

        Examples:
            >>> classifier = fastbf.SharedClassifier(32, 3)
            >>> handle = classifier.register_forward_hook(lambda module, args, logits: logits / 4)
            >>> classifier.parent_reason()
            'the classifier has hooks.'
        """
        kind = type(self)
        if kind.forward is not _FORWARD or kind.__call__ is not nn.Module.__call__ or has_own(self, "forward"):
            return "the classifier has a forward of its own."
        if is_linear_patched():
            return "a class of torch has a forward of its own."
        if has_hooks(self):
            if has_own_hooks(self):
                return "the classifier has hooks."
            if "loss" not in self.__dict__ and type(self.weight) not in (Tensor, nn.Parameter):
                return "FSDP holds a part of the weight here; register_fsdp_forward_method(classifier, 'loss') helps."
        return None

    def _loss_of_logits(
        self, features: Tensor, target: Tensor, reason: str, *, reduction: str, stats: bool
    ) -> Tensor | tuple[Tensor, functional.LossStats]:
        choose(self.backend, self.op, checks.floating("features", features), obstacle=reason)  # raises for "triton"
        logits = checks.floating("what forward returns", self(features))
        return functional.cross_entropy(
            logits,
            target,
            **self._per_class(logits),
            reduction=reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            stats=stats,
        )

    @staticmethod
    def _advice(targets: tuple[Any, ...], keywords: dict[str, Any]) -> str:
        """What to write instead of a call with more than features."""
        named = [name for name in keywords if name in _TARGETS]
        if keywords and not named and not targets:
            return unexpected("SharedClassifier.forward", next(iter(keywords)), ["features", "input"])
        given = f"{named[0]}=" if named else f"{1 + len(targets)} arguments"
        return (
            f"a call of SharedClassifier takes features alone, got {given}: the loss of features and targets is "
            "classifier.loss(features, target)"
        )

    def _check(self, x: object) -> Tensor:
        features, weight = checks.dense("features", checks.floating("features", x)), self.weight
        if not features.dim() or features.shape[-1] != self.in_features:
            fits = [dim for dim, size in enumerate(features.shape) if size == self.in_features]
            raise ValueError(
                f"features must have {self.in_features} channels in the last dimension, got shape "
                f"{tuple(features.shape)}" + (f": features.movedim({fits[-1]}, -1) has them there" if fits else "")
            )
        if features.device != weight.device:
            raise ValueError(f"features must be on the device of the weights, {weight.device}, got {features.device}")
        if features.dtype != weight.dtype and autocast_dtype(features) is None:
            checks.dtype_of_weights("features", features, {"weight": weight})
        return features

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        prior = "class_counts" if isinstance(self._log_prior, LogCounts) else "log_prior"
        for name, values in ((prior, self._log_prior), ("class_weight", self._class_weight)):
            if values is not None:
                parts.append(f"{name}={values}")
        for name, default in (("label_smoothing", 0.0), ("ignore_index", -100), ("scale", 1.0), ("backend", "auto")):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


#: Names that a target has in calls of other libraries.
_TARGETS = ("target", "targets", "label", "labels", "y")

_FORWARD, _LOSS = SharedClassifier.forward, SharedClassifier.loss
_LOG_PRIOR, _CLASS_WEIGHT = SharedClassifier.log_prior, SharedClassifier.class_weight
