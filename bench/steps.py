"""A whole training step, layer + fork + classifier + loss, forward and backward: workloads and providers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastbf
from tests import paper


class Workload(NamedTuple):
    n: int  # batch
    c: int  # channels
    k: int  # classes

    def __str__(self) -> str:
        return f"N={self.n} C={self.c} K={self.k}"


WORKLOADS = (
    Workload(128, 512, 1000),
    Workload(1024, 512, 1000),
    Workload(4096, 512, 1000),
    Workload(512, 512, 8142),
    Workload(256, 2048, 1000),
)


def _paper(w: Workload) -> tuple[list[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
    encoder, linear = paper.encoder(w.c), nn.Linear(w.c, w.k)
    return [encoder, linear], lambda x, y: paper.step(encoder, linear, x, y)


def _fastbf(w: Workload) -> tuple[list[nn.Module], Callable[[Tensor, Tensor], Tensor]]:
    former, classifier = fastbf.BatchFormer(w.c), fastbf.SharedClassifier(w.c, w.k)
    return [former, classifier], lambda x, y: classifier.loss(former(x), y)


PROVIDERS = {"paper": _paper, "fastbf": _fastbf}


def make_step(provider: str, w: Workload) -> Callable[[], None]:
    """A closure that runs one step at dropout 0.5, gradients released before and computed for features too."""
    modules, loss = PROVIDERS[provider](w)
    x, y = torch.randn(w.n, w.c, requires_grad=True), torch.randint(0, w.k, (w.n,))
    tensors = [x, *(p for m in modules for p in m.parameters())]

    def step() -> None:
        for t in tensors:
            t.grad = None
        loss(x, y).backward()

    return step
