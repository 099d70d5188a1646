"""How training loops call this package, and the paper's code for the same, of tensors whose products cost nothing.

There is one sample: of more, 16-bit products on a CPU take longer than all that the host does around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbf
from bench.workloads import HEADS, Workload
from tests import paper

SMALL = Workload("small", 1, 32, 10)
DROPOUT = 0.5


class Call(NamedTuple):
    """What a loop does in forward, and the tensors that backward gives gradients."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]


class Given(NamedTuple):
    """What a loop has before it calls anything."""

    x: Tensor  #: (N, C), as a backbone leaves them: in 16 bits under autocast
    fork: Tensor  #: (2N, C)
    dense: Tensor  #: (2N, 1, 1, C): a fork with positions, as BatchFormerV2 has it at a second insertion
    y: Tensor  #: (N,)


def given(device: torch.device, dtype: torch.dtype) -> Given:
    """Fresh tensors."""
    n, c = SMALL.n, SMALL.c
    shapes = (n, c), (2 * n, c), (2 * n, 1, 1, c)
    x, fork, dense = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    return Given(x, fork, dense, torch.randint(0, SMALL.k, (n,), device=device))


def _call(forward: Callable[[], Tensor], x: Tensor, *modules: nn.Module) -> Call:
    """Of modules that have just been made."""
    for module in modules:
        module.to(x.device)
    return Call(forward, [x, *(p for module in modules for p in module.parameters())])


def _former(**options: bool) -> fastbf.BatchFormer:
    return fastbf.BatchFormer(SMALL.c, HEADS, dropout=DROPOUT, backend="triton", **options)


def _classifier() -> fastbf.SharedClassifier:
    return fastbf.SharedClassifier(SMALL.c, SMALL.k, backend="triton")


def _step(t: Given) -> Call:
    former, classifier = _former(), _classifier()
    return _call(lambda: classifier.loss(former(t.x), t.y), t.x, former, classifier)


def _targets(t: Given) -> Call:
    former, classifier = _former(), _classifier()
    return _call(lambda: classifier.loss(*former(t.x, t.y)), t.x, former, classifier)


def _papers_step(t: Given) -> Call:
    layer, linear = paper.encoder(SMALL.c, HEADS, DROPOUT), nn.Linear(SMALL.c, SMALL.k)
    return _call(lambda: paper.step(layer, linear, t.x, t.y), t.x, layer, linear)


def _stats(t: Given) -> Call:
    classifier = _classifier()
    return _call(lambda: classifier.loss(t.fork, t.y, stats=True)[0], t.fork, classifier)


def _papers_stats(t: Given) -> Call:
    """With the loss and the accuracy of each stream, as a loop logs them."""
    linear = nn.Linear(SMALL.c, SMALL.k)

    def forward() -> Tensor:
        logits, target = linear(t.fork), torch.cat([t.y, t.y])
        losses = F.cross_entropy(logits, target, reduction="none")
        losses.detach().view(2, -1).mean(1)
        (logits.detach().argmax(1) == target).float().view(2, -1).mean(1)
        return losses.mean()

    return _call(forward, t.fork, linear)


def _layer(t: Given) -> Call:
    layer = fastbf.BatchFormerLayer(SMALL.c, HEADS, SMALL.c, DROPOUT, backend="triton")
    return _call(lambda: layer(t.x), t.x, layer)


def _papers_layer(t: Given) -> Call:
    layer = paper.encoder(SMALL.c, HEADS, DROPOUT)
    return _call(lambda: layer(t.x), t.x, layer)


def _forked(t: Given) -> Call:
    former = _former(forked=True)
    return _call(lambda: former(t.dense), t.dense, former)


def _papers_forked(t: Given) -> Call:
    layer = paper.encoder(SMALL.c, HEADS, DROPOUT)

    def forward() -> Tensor:
        plain, stream = t.dense.chunk(2)
        return torch.cat([plain, layer(stream.flatten(1, 2)).view_as(stream)])

    return _call(forward, t.dense, layer)


class Pattern(NamedTuple):
    """A way to call this package, and the paper's code for it."""

    about: str
    fastbf: Callable[[Given], Call]
    paper: Callable[[Given], Call]


PATTERNS = {
    "step": Pattern("classifier.loss(former(x), y)", _step, _papers_step),
    "targets": Pattern("classifier.loss(*former(x, y))", _targets, _papers_step),
    "stats": Pattern("classifier.loss(fork, y, stats=True)", _stats, _papers_stats),
    "layer": Pattern("BatchFormerLayer(…)(x)", _layer, _papers_layer),
    "forked": Pattern("BatchFormer(…, forked=True)(x), x of rank 4", _forked, _papers_forked),
}
