"""What can be measured of a workload: each op's tensors, its FLOPs, and the bytes it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.workloads import HEADS, Workload

MODES = ("forward", "backward", "both")
#: Of tensors; "amp" is fp32 parameters under autocast to bf16, and bf16 features, as a backbone leaves them there.
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "amp": torch.float32,
    "fp64": torch.float64,
}


def default_dtype(op: str, device: torch.device) -> str:
    """What people train in."""
    return "fp32" if device.type == "cpu" else "bf16" if op == "attention" else "amp"


class Problem(NamedTuple):
    """One op of one workload, as every provider is given it."""

    op: str
    workload: Workload
    dtype: str  #: a key of ``DTYPES``
    device: torch.device
    dropout: float

    @property
    def compute(self) -> torch.dtype:
        """Of the matrix products."""
        return torch.bfloat16 if self.dtype == "amp" else DTYPES[self.dtype]

    def autocast(self) -> torch.autocast:
        """What the op runs under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "amp")

    def inputs(self) -> Inputs:
        """Fresh tensors, the same ones for every provider."""
        torch.manual_seed(0)
        with self.device:
            return OPS[self.op].inputs(self)

    def reduced(self, samples: int = 80) -> Problem:
        """A small one without dropout, for comparing results; many problems have it in common."""
        return self._replace(workload=self.workload.reduced(samples), dropout=0.0)

    def exact(self) -> Problem:
        """The same mathematics in fp64."""
        return self._replace(dtype="fp64")


class Inputs(NamedTuple):
    """What an op computes on."""

    leaves: list[Tensor]  #: gradients are taken of these; first the features, or q, k and v, then parameters
    target: Tensor | None = None  #: (N,) class indices


class Op(NamedTuple):
    """An op: how its tensors are made, and how many floating-point operations its matrix products take."""

    about: str
    inputs: Callable[[Problem], Inputs]
    forward_flops: Callable[[Workload], float]
    backward_flops: Callable[[Workload], float]

    def flops(self, w: Workload, mode: str) -> float:
        """Two for each multiplication and addition; recomputed scores count in attention's backward, as usual."""
        forward, backward = self.forward_flops(w), self.backward_flops(w)
        return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def _leaves(p: Problem, *tensors: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.to(dtype or DTYPES[p.dtype]).requires_grad_() for t in tensors]


def _features(p: Problem) -> list[Tensor]:
    """(N, L, C) as a backbone leaves them: in bf16 under autocast."""
    return _leaves(p, torch.randn(p.workload.shape), dtype=p.compute)


def _attention(p: Problem) -> Inputs:
    w = p.workload
    return Inputs(_leaves(p, *torch.randn(3, w.n, w.positions, HEADS, w.head_dim), dtype=p.compute))


def _add_norm(p: Problem) -> Inputs:
    c = p.workload.c
    branch = _features(p)
    return Inputs(branch + _leaves(p, torch.randn(p.workload.shape), 1 + torch.randn(c) / 8, torch.randn(c) / 8))


def _activation(p: Problem) -> Inputs:
    return Inputs(_features(p))


def _layer_parameters(w: Workload) -> list[Tensor]:
    """Of ``nn.TransformerEncoderLayer``, in its order and with its initialisation, biases aside, which are not zero."""
    layer = nn.TransformerEncoderLayer(w.c, HEADS, w.c)
    return [p.detach() if p.dim() > 1 else p.detach() + torch.randn_like(p) / 8 for p in layer.parameters()]


def _layer(p: Problem) -> Inputs:
    return Inputs(_features(p) + _leaves(p, *_layer_parameters(p.workload)))


def _classifier_parameters(w: Workload) -> list[Tensor]:
    return [torch.randn(w.k, w.c) * w.c**-0.5, torch.randn(w.k) / 8]


def _target(p: Problem) -> Tensor:
    return torch.randint(0, p.workload.k, (p.workload.n,))


def _loss(p: Problem) -> Inputs:
    w = p.workload
    x = _leaves(p, torch.randn(2 * w.n, w.c), dtype=p.compute)
    return Inputs(x + _leaves(p, *_classifier_parameters(w)), _target(p))


def _step(p: Problem) -> Inputs:
    w = p.workload
    parameters = _layer_parameters(w) + (_classifier_parameters(w) if w.k else [])
    return Inputs(_features(p) + _leaves(p, *parameters), _target(p) if w.k else None)


def _attention_flops(w: Workload) -> float:
    return 4.0 * w.n**2 * w.c * w.positions


def _linear_flops(w: Workload) -> float:
    """Of the layer's four linear maps."""
    return 12.0 * w.n * w.c**2 * w.positions


def _loss_flops(w: Workload) -> float:
    return 4.0 * w.n * w.c * w.k


OPS = {
    "attention": Op(
        "softmax(q kᵀ/√D) v over the batch, with dropout; q, k, v (N, L, H, D)",
        _attention,
        _attention_flops,
        lambda w: 2.5 * _attention_flops(w),
    ),
    "add_norm": Op("LayerNorm(residual + dropout(x)); x (N, L, C)", _add_norm, lambda w: 0.0, lambda w: 0.0),
    "activation": Op("dropout(relu(x)); x (N, L, C)", _activation, lambda w: 0.0, lambda w: 0.0),
    "layer": Op(
        "the encoder layer along the batch axis; x (N, L, C)",
        _layer,
        lambda w: _linear_flops(w) + _attention_flops(w),
        lambda w: 2 * _linear_flops(w) + 2.5 * _attention_flops(w),
    ),
    "loss": Op(
        "linear + cross-entropy of 2N forked rows against N targets; x (2N, C)",
        _loss,
        _loss_flops,
        lambda w: 2 * _loss_flops(w),
    ),
    "step": Op(
        "layer, fork, mean over positions, classifier and loss; the fork alone where there are no classes",
        _step,
        lambda w: _linear_flops(w) + _attention_flops(w) + _loss_flops(w),
        lambda w: 2 * _linear_flops(w) + 2.5 * _attention_flops(w) + 2 * _loss_flops(w),
    ),
}


def compulsory_bytes(inputs: Inputs, result: int, mode: str) -> int:
    """Each direction reads what it is given and writes what it gives; nothing else needs to leave the chip.

    Args:
        result: the bytes of what forward gives.
    """
    given = sum(t.nbytes for t in inputs.leaves) + (0 if inputs.target is None else inputs.target.nbytes)
    forward = given + result
    backward = given + result + sum(t.nbytes for t in inputs.leaves)
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]
