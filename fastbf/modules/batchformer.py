"""BatchFormer: the module that forks features in training and is the identity in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from fastbf import checks, reference
from fastbf.modules import layout
from fastbf.modules.layer import BatchFormerLayer
from fastbf.suggestions import suggesting
from fastbf.torch_state import as_leaf, has_own, is_replica, part
from fastbf.warned import warn

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Targets = TypeVarTuple("Targets")


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode, and every part of it back into its own mode on exit."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, training in modes.items():
            m.training = training


class BatchFormer(nn.Module):
    """Lets samples of a mini-batch learn from each other in training; the identity in evaluation.

    In training the features are forked. The result holds the plain stream and, behind it along ``batch_dim``, the
    mixed stream, which a transformer encoder makes of the features along the batch. Train both with one classifier
    and the repeated targets. In evaluation the module returns the objects that it was given. :func:`fastbf.strip`
    removes the module for deployment.

    Features have at least 2 dimensions: the batch's, the channels', and any number of others, the positions. The batch
    is mixed at each position separately. Examples are (N, C); (N, L, C); (L, N, C) with ``batch_dim=1``; (N, C, H, W)
    with ``channel_dim=1``.

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
        forked: whether the input is a fork already (a second insertion in a BatchFormerV2 network). Then only its
            mixed half goes through the encoder, and nothing is doubled.
        backend: "auto", "triton" or "torch".
        process_group: a ``torch.distributed`` group whose ranks' batches attend to each other, see
            :mod:`fastbf.distributed`; None is this process alone.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        layers: ``nn.ModuleList`` of :class:`BatchFormerLayer`.

    A checkpoint of one ``nn.TransformerEncoderLayer`` loads under the names ``layers.0.…``. Where the names lack that,
    a UserWarning says which to write, for a model that holds the module, too.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what is allowed.

    Examples:
        >>> former = fastbf.BatchFormer(32)
        >>> former(torch.randn(6, 32)).shape
        torch.Size([12, 32])
        >>> x = torch.randn(6, 32)
        >>> former.eval()(x) is x
        True

    Source: Hou et al., CVPR 2022 (arXiv 2203.01522), section 3, figure 2; dense features: arXiv 2204.01254.
    """

    op = "encoder_layer"
    dim: int
    batch_dim: int
    channel_dim: int
    forked: bool
    backend: str
    layers: nn.ModuleList

    if TYPE_CHECKING:

        @overload
        def __call__(self, features: Tensor) -> Tensor: ...
        @overload
        def __call__(self, features: Tensor, *targets: Unpack[Targets]) -> tuple[Tensor, Unpack[Targets]]: ...
        def __call__(self, features: Tensor, *targets: Any) -> Any: ...  # type: ignore[misc]

    @suggesting
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
        if isinstance(dim, Tensor):
            raise TypeError("dim must be an int, got Tensor: make the module once, and call it, former(features)")
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
        self.register_load_state_dict_pre_hook(_warn_of_a_bare_layer)

    @property
    def process_group(self) -> Any:
        """The process group of the layers, or None; can be set.

        Examples:
            >>> fastbf.BatchFormer(32).process_group is None
            True
        """
        return self.layers[0].process_group

    @process_group.setter
    def process_group(self, process_group: Any) -> None:
        for layer in self.layers:
            layer.process_group = process_group

    def forward(self, features: Tensor, *targets: Any, **keywords: Any) -> Any:
        """Forks the features in training; returns its arguments in evaluation.

        Args:
            features: floating point, rank ≥ 2, N samples along ``batch_dim`` (2N if ``forked``), C channels along
                ``channel_dim``.
            targets: tensors with N rows, or lists or tuples of N items, one per sample (2N if ``forked``); None stays.

        Returns:
            The features, or the tuple ``(features, *targets)`` if targets were given. In training the features are a
            fork of 2N samples, the plain half first, in the memory format of the input. A tensor target is
            concatenated with itself along its first dimension; a list or tuple is repeated. With ``forked`` targets
            are returned as they are.

        Warns:
            RuntimeWarning: once a process, for features or a target that come from a fork as they are while ``forked``
                is not set, which makes 4N rows; for one sample at several positions; for a replica of
                ``nn.DataParallel`` without targets, whose streams are gathered replica by replica. What an operator
                made of a fork is not recognised.

        Raises:
            TypeError: features that are not a floating-point tensor, targets of another type, or by keyword.
            ValueError: wrong rank, width or device, dimensions out of range or equal, targets of the wrong length,
                an odd batch where it should be forked.

        Examples:
            >>> former = fastbf.BatchFormer(32)
            >>> features, labels = former(torch.randn(2, 32), torch.tensor([3, 5]))
            >>> features.shape, labels
            (torch.Size([4, 32]), tensor([3, 5, 3, 5]))
        """
        if not isinstance(features, Tensor) and (leaf := as_leaf(self, _FORWARD, features, *targets)) is not None:
            return leaf
        if keywords:
            raise TypeError(
                f"a call of BatchFormer takes features and targets by position, got {next(iter(keywords))}=: write "
                "former(features, target)"
            )
        if not self.training:
            return (features, *targets) if targets else features
        dims = batch_dim, _ = self._check(features)
        n = features.shape[batch_dim]
        if not self.forked:
            if hasattr(features, "is_fork") or any(map(_is_fork, targets)):
                _warn_once(
                    "features or targets hold both streams already and are forked again: a second BatchFormer of a "
                    "network has forked=True"
                )
            if n == 1 and features.dim() > 2:
                _warn_once(
                    f"features hold one sample along batch_dim={self.batch_dim}, which attends to itself alone: an "
                    "(N, C) batch is not to become (1, N, C)"
                )
            if not targets and is_replica(self):
                _warn_once(
                    "DataParallel gathers [plain, mixed, plain, mixed, …], one pair a replica, and targets that stay "
                    "outside do not fit those rows: pass the targets through the BatchFormer, or compute the loss "
                    "inside of what DataParallel replicates"
                )
            if targets:
                targets = tuple(_doubled(i, target, n) for i, target in enumerate(targets))
        elif n % 2:
            raise ValueError(f"features must hold both streams along batch_dim={self.batch_dim}, got {n} samples")
        else:
            for i, target in enumerate(targets):
                _check_length(i, target, n)
        *others, last = part(self, BatchFormer, "layers")  # with each layer as often as it is listed
        x = _samples_first(features, dims)
        if type(self).mix is not _MIX or has_own(self, "mix"):
            plain, stream = features.tensor_split(2, dim=batch_dim) if self.forked else (features, features)
            fork = reference.fork(plain, self.mix(stream), dim=batch_dim)
        elif isinstance(last, BatchFormerLayer) and (x.is_contiguous() or x.movedim(0, -2).is_contiguous()):
            x = _flat(x)
            if others:
                plain, stream = x.chunk(2) if self.forked else (x, x)
                fork = last.fork(self._run(stream, others), plain=plain)
            else:
                fork = last.fork(x, forked=True) if self.forked else last.fork(x, plain=x)
            fork = _unflat(fork, features, dims)
        else:  # the fork is written in the features' own layout, which saves a copy
            plain, stream = features.tensor_split(2, dim=batch_dim) if self.forked else (features, features)
            fork = reference.fork(plain, self._mix(stream, dims), dim=batch_dim)
        fork = layout.formatted(fork, features)
        for made in () if self.forked or torch.compiler.is_compiling() else (fork, *targets):
            if isinstance(made, Tensor):
                made.is_fork = True  # type: ignore[attr-defined]
        return (fork, *targets) if targets else fork

    @suggesting
    def mix(self, features: Tensor) -> Tensor:
        """The mixed stream alone, in the shape of ``features``, in either mode; dropout acts in training only.

        Examples:
            >>> fastbf.BatchFormer(32).mix(torch.randn(6, 32)).shape
            torch.Size([6, 32])
        """
        if not isinstance(features, Tensor) and (leaf := as_leaf(self, _MIX, features)) is not None:
            return leaf
        return layout.formatted(self._mix(features, self._check(features)), features)

    def _mix(self, features: Tensor, dims: tuple[int, int]) -> Tensor:
        return _unflat(self._run(_flat(_samples_first(features, dims)), self.layers), features, dims)

    @suggesting
    def attention_map(self, features: Tensor) -> Tensor:
        """Softmax weights of the last layer, without dropout, which show relations between samples.

        Returns:
            (…, H, N, N): positions, heads, queries, keys. With a ``process_group`` the keys are the samples of all
            ranks, in the order of ranks.

        Examples:
            >>> fastbf.BatchFormer(32).attention_map(torch.randn(6, 32)).shape
            torch.Size([4, 6, 6])
        """
        x = _samples_first(features, self._check(features))
        positions = x.shape[1:-1]
        with _evaluating(self.layers):
            x = self._run(_flat(x), self.layers[:-1])
        last: Any = self.layers[-1]
        weights = last.attention_map(x)
        return weights.view(*positions, *weights.shape[-3:])

    def extra_repr(self) -> str:
        parts = f"{self.dim}, batch_dim={self.batch_dim}, channel_dim={self.channel_dim}, forked={self.forked}"
        return parts + ("" if self.backend == "auto" else f", backend={self.backend!r}")

    def _check(self, features: Tensor) -> tuple[int, int]:
        """Checks the features and returns their batch and channel dimension, counted from the front."""
        checks.dense("features", checks.floating("features", features))
        rank = features.dim()
        if rank < 2:
            checks.min_rank("features", features, 2, "a batch of features")
        batch_dim, channel_dim = self.batch_dim, self.channel_dim
        if not (-rank <= batch_dim < rank and -rank <= channel_dim < rank):
            name, dim = ("channel_dim", channel_dim) if -rank <= batch_dim < rank else ("batch_dim", batch_dim)
            raise ValueError(f"{name} must lie in [{-rank}, {rank - 1}] for {rank}-D features, got {dim}")
        dims = batch_dim % rank, channel_dim % rank
        if dims[0] == dims[1]:
            raise ValueError(
                f"batch_dim and channel_dim must differ, got {self.batch_dim} and {self.channel_dim}, the same "
                f"dimension of {rank}-D features"
            )
        if features.shape[dims[1]] != self.dim:
            fits = [f"channel_dim={dim}" for dim, n in enumerate(features.shape) if n == self.dim and dim != dims[0]]
            if features.shape[dims[0]] == self.dim:
                fits.append(f"once two dimensions change places, features.transpose{dims}")
            raise ValueError(
                f"features must have {self.dim} channels along channel_dim={self.channel_dim}, got shape "
                f"{tuple(features.shape)}" + (f", which fits {fits[0]}" if fits else "")
            )
        return dims

    @staticmethod
    def _run(x: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x


def _samples_first(features: Tensor, dims: tuple[int, int]) -> Tensor:
    """Views features as (N, …, C); ``dims`` holds their batch and channel dimension."""
    return features if dims == (0, features.dim() - 1) else features.movedim(dims, (0, -1))


def _flat(x: Tensor) -> Tensor:
    """(N, …, C) → (N, positions, C); (N, C) stays."""
    return x if x.dim() == 2 else x.flatten(1, -2)


def _unflat(x: Tensor, features: Tensor, dims: tuple[int, int]) -> Tensor:
    """(N, C) or (N, positions, C) → the dimensions of ``features``; ``dims`` as in :func:`_samples_first`."""
    if features.dim() == 2 and dims == (0, 1):
        return x
    shape = features.movedim(dims, (0, -1)).shape
    return x.view(x.shape[0], *shape[1:]).movedim((0, -1), dims)


def _check_length(i: int, target: Any, n: int) -> None:
    if target is None:
        return
    if not isinstance(target, Tensor | list | tuple):
        given = f"{type(target).__name__} as targets[{i}]{checks.as_tensor(target)}"
        if isinstance(target, nn.Module | bool):  # as in the paper's function
            given += ": a BatchFormer has its own encoder and its own mode, so write former(features, target)"
        raise TypeError(f"targets must be tensors, lists, tuples or None, got {given}")
    length = len(target) if not isinstance(target, Tensor) else target.shape[0] if target.dim() else None
    if length != n:
        hint = ": transpose it, samples come first" if isinstance(target, Tensor) and n in target.shape[1:] else ""
        hint = ": give each once, they are repeated here" if length == 2 * n else hint
        raise ValueError(f"targets must have one entry for each of the {n} samples, got {length} in targets[{i}]{hint}")


def _doubled(i: int, target: Any, n: int) -> Any:
    _check_length(i, target, n)
    if target is None:
        return None
    return torch.cat([target, target]) if isinstance(target, Tensor) else target * 2


def _is_fork(x: object) -> bool:
    """Whether x is what a BatchFormer returned: the very tensor, which holds both streams."""
    return isinstance(x, Tensor) and hasattr(x, "is_fork")


def _warn_of_a_bare_layer(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    """Says how to rename the keys of an encoder layer that does not stand in a list of layers, before any is loaded.

    It warns, because hooks are not told whether unexpected keys are an error.
    """
    known = tuple(f"{prefix}{name}." for name, _ in module.named_children())
    for key in state_dict:
        if key.startswith(prefix) and key.endswith(_OF_A_LAYER) and not key.startswith(known):
            warn(
                f"the encoder layer of '{key}' is not loaded, because a BatchFormer holds a list of layers: rename its "
                f"keys, this one to '{prefix}layers.0.{_OF_A_LAYER}' and the others likewise",
                UserWarning,
            )
            return


_OF_A_LAYER = "self_attn.in_proj_weight"
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warn(message)


_FORWARD, _MIX = BatchFormer.forward, BatchFormer.mix
