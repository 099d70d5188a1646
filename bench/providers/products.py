"""The matrix products of a training step alone: what is left of its time if nothing else took any."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.ops import Inputs, Problem
from bench.providers.base import Case, Traits
from bench.workloads import HEADS


class Products(NamedTuple):
    """Those of the paper's code, forward and backward, of random tensors of the same shapes."""

    name: str = "products"
    about: str = "the matrix products of a step alone, forward and backward"
    ops: tuple[str, ...] = ("step",)
    traits: Traits = Traits(memory_unseen_on=("cpu", "cuda"), both_only=True, unchecked=True)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        w = problem.workload

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=problem.device, dtype=problem.compute)

        rows, groups = w.n * w.positions, w.positions * HEADS
        maps = [(rows, w.c, 3 * w.c), *[(rows, w.c, w.c)] * 3, *[(2 * w.n, w.c, w.k)] * (w.k > 0)]
        linears = [(random(m, i), random(o, i), random(o), random(m, o)) for m, i, o in maps]
        q, k, v, do = (random(groups, w.n, w.head_dim) for _ in range(4))
        p, ds = (random(groups, w.n, w.n) for _ in range(2))

        def run() -> Tensor:
            torch.bmm(q, k.mT)
            torch.bmm(p, v)
            torch.bmm(p.mT, do)
            torch.bmm(do, v.mT)
            torch.bmm(ds, k)
            torch.bmm(ds.mT, q)
            for x, weight, bias, dy in linears:
                out = F.linear(x, weight, bias)
                torch.mm(dy, weight)
                torch.mm(dy.mT, x)
            return out

        return Case(run, [])
