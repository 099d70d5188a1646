"""fastbf: its Triton kernels, its PyTorch fallback, and its own graph capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

import fastbf
from bench.ops import OPS, Inputs, Problem
from bench.providers.base import Case, Traits, Unavailable
from bench.workloads import HEADS
from fastbf import functional
from fastbf.backend import choose


def adopt(modules: list[nn.Module], values: list[Tensor]) -> list[nn.Parameter]:
    """Gives the modules' parameters those values; returns them."""
    parameters = [p for m in modules for p in m.parameters()]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value.detach()
    return parameters


Function = Callable[..., Tensor]


def _attention(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    return lambda q, k, v: functional.batch_attention(q, k, v, dropout_p=p.dropout, backend=backend), leaves


def _add_norm(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    options = {"dropout_p": p.dropout, "eps": 1e-5, "backend": backend}
    return lambda *tensors: functional.dropout_add_layer_norm(*tensors, **options), leaves


def _activation(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    return lambda x: functional.activation_dropout(x, "relu", dropout_p=p.dropout, backend=backend), leaves


def _layer(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    c = p.workload.c
    layer = fastbf.BatchFormerLayer(c, HEADS, c, p.dropout, backend=backend, device=p.device, dtype=leaves[1].dtype)
    return layer, [leaves[0], *adopt([layer], leaves[1:])]


def _loss(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    def loss(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, linear_bias=bias, backend=backend)

    return loss, leaves


def _step(p: Problem, leaves: list[Tensor], backend: str) -> tuple[Function, list[Tensor]]:
    w, options = p.workload, {"backend": backend, "device": p.device, "dtype": leaves[1].dtype}
    former = fastbf.BatchFormer(w.c, HEADS, dropout=p.dropout, **options)
    if not w.k:
        return former, [leaves[0], *adopt([former], leaves[1:])]
    classifier = fastbf.SharedClassifier(w.c, w.k, **options)
    parameters = adopt([former, classifier], leaves[1:])

    def step(x: Tensor, target: Tensor) -> Tensor:
        features = former(x)
        return classifier.loss(features.mean(1) if w.positions > 1 else features, target)

    return step, [leaves[0], *parameters]


#: How each op is built, how many of its leaves are arguments, and the function of fastbf whose kernels serve it.
_FUNCTIONS = {
    "attention": (_attention, 3, "batch_attention"),
    "add_norm": (_add_norm, 4, "dropout_add_layer_norm"),
    "activation": (_activation, 1, "activation_dropout"),
    "layer": (_layer, 1, "encoder_layer"),
    "loss": (_loss, 3, "linear_cross_entropy"),
    "step": (_step, 1, "encoder_layer"),
}


class Fastbf(NamedTuple):
    """This package."""

    name: str
    about: str
    backend: str
    graphed: bool = False
    traits: Traits = Traits()
    ops: tuple[str, ...] = tuple(OPS)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        build, count, served_by = _FUNCTIONS[problem.op]
        try:
            choose(self.backend, served_by, *inputs.leaves[:1], head_dim=problem.workload.head_dim)
        except ValueError as error:
            raise Unavailable(str(error).partition("call: ")[2].replace(served_by, "the op")) from error
        function, leaves = build(problem, inputs.leaves, self.backend)
        arguments = leaves[:count] + ([] if inputs.target is None else [inputs.target])
        if self.graphed:
            with problem.autocast():
                function = fastbf.make_graphed(function, arguments)

        def forward() -> Tensor:
            with problem.autocast():
                return function(*arguments)

        return Case(forward, leaves)


OURS = (
    Fastbf("fastbf", "the Triton kernels", "triton"),
    Fastbf(
        "fastbf-graphed",
        "the same through fastbf.make_graphed",
        "triton",
        True,
        Traits(capturable=False, memory_unseen_on=("cuda",)),
    ),
    Fastbf("fastbf-torch", "the PyTorch fallback", "torch"),
)
