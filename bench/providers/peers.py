"""What fastbf is compared with: the paper's code, PyTorch's ways to speed it up, and published kernels.

The published ones are optional: ``pip install liger-kernel cut-cross-entropy ffpa-attn``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.ops import OPS, Inputs, Problem
from bench.providers.base import Case, Traits, Unavailable
from bench.providers.ours import adopt
from bench.workloads import HEADS
from tests import paper

Function = Callable[..., Tensor]


def _attention(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    """As ``nn.MultiheadAttention`` calls it: the batch axis moved to where sequences are."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p.dropout).permute(2, 0, 1, 3)

    return attention, leaves


def _add_norm(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + F.dropout(x, p.dropout), x.shape[-1:], weight, bias)

    return add_norm, leaves


def _activation(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    return lambda x: F.dropout(F.relu(x), p.dropout), leaves


def _encoder(p: Problem, dtype: torch.dtype) -> nn.Module:
    return paper.encoder(p.workload.c, HEADS, p.dropout, device=p.device, dtype=dtype)


def _layer(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    layer = _encoder(p, leaves[1].dtype)
    leaves = [leaves[0], *adopt([layer], leaves[1:])]
    return (layer if leaves[0].dim() == 3 else lambda x: layer(x.unsqueeze(1)).squeeze(1)), leaves


def _loss(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    return lambda x, w, b, y: F.cross_entropy(F.linear(x, w, b), torch.cat([y, y])), leaves


def _step(p: Problem, leaves: list[Tensor]) -> tuple[Function, list[Tensor]]:
    layer = _encoder(p, leaves[1].dtype)
    if not p.workload.k:
        parameters = adopt([layer], leaves[1:])
        return lambda x: torch.cat([x, layer(x)]), [leaves[0], *parameters]
    linear = nn.Linear(p.workload.c, p.workload.k, device=p.device, dtype=leaves[1].dtype)
    parameters = adopt([layer, linear], leaves[1:])

    def dense(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(linear(torch.cat([x, layer(x)]).mean(1)), torch.cat([y, y]))

    step = dense if p.workload.positions > 1 else lambda x, y: paper.step(layer, linear, x, y)
    return step, [leaves[0], *parameters]


#: Each op in eager PyTorch, and how many of its leaves are arguments.
_FUNCTIONS = {
    "attention": (_attention, 3),
    "add_norm": (_add_norm, 4),
    "activation": (_activation, 1),
    "layer": (_layer, 1),
    "loss": (_loss, 3),
    "step": (_step, 1),
}


def _case(p: Problem, inputs: Inputs, wrap: Callable[[Function], Function] = lambda function: function) -> Case:
    """The paper's code under the problem's autocast, ``wrap`` around it."""
    build, count = _FUNCTIONS[p.op]
    function, leaves = build(p, inputs.leaves)
    function = wrap(function)
    arguments = leaves[:count] + ([] if inputs.target is None else [inputs.target])

    def forward() -> Tensor:
        with p.autocast():
            return function(*arguments)

    return Case(forward, leaves)


class Paper(NamedTuple):
    """The paper's code in eager PyTorch."""

    name: str = "paper"
    about: str = "the paper's code in eager PyTorch"
    ops: tuple[str, ...] = tuple(OPS)
    traits: Traits = Traits()

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        return _case(problem, inputs)


class Compiled(NamedTuple):
    """The paper's code under ``torch.compile``."""

    name: str
    about: str
    mode: str | None
    traits: Traits
    ops: tuple[str, ...] = tuple(OPS)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        if self.mode is not None and problem.device.type != "cuda":
            raise Unavailable(f"mode={self.mode!r} is for GPUs")
        torch._dynamo.reset()
        return _case(problem, inputs, lambda function: torch.compile(function, mode=self.mode, dynamic=False))


class Sdpa(NamedTuple):
    """The paper's code with one backend of ``F.scaled_dot_product_attention``."""

    name: str
    about: str
    backend: SDPBackend
    ops: tuple[str, ...] = ("attention", "layer", "step")
    traits: Traits = Traits()

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        self._try(problem)

        def only(function: Function) -> Function:
            def call(*tensors: Tensor) -> Tensor:
                with sdpa_kernel(self.backend):
                    return function(*tensors)

            return call

        return _case(problem, inputs, only)

    def _try(self, problem: Problem) -> None:
        """Attention of few samples, to see whether there is such a kernel at all."""
        x = torch.zeros(1, HEADS, 16, problem.workload.head_dim, dtype=problem.compute, device=problem.device)
        try:
            with sdpa_kernel(self.backend):
                F.scaled_dot_product_attention(*[x.requires_grad_()] * 3, dropout_p=problem.dropout)
        except RuntimeError as error:
            raise Unavailable("this backend has no kernel for such a head dimension and rate of dropout") from error


class PytorchChunks(NamedTuple):
    """PyTorch's own loss in chunks of rows."""

    name: str = "F.linear_cross_entropy"
    about: str = "PyTorch's loss in chunks (2.13)"
    ops: tuple[str, ...] = ("loss",)
    traits: Traits = Traits()

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unavailable(f"torch {torch.__version__} does not have it, 2.13 does")
        (x, w, b), y = inputs.leaves, inputs.target
        options = nn.LinearCrossEntropyOptions()

        def forward() -> Tensor:
            with problem.autocast():
                return F.linear_cross_entropy(x, w, torch.cat([y, y]), linear_bias=b, options=options)

        return Case(forward, inputs.leaves)


def _package(name: str, module: str, problem: Problem) -> object:
    """An optional package's module, which needs a GPU."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed ({error})") from error
    if problem.device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    return found


class Liger(NamedTuple):
    """Liger's fused linear cross-entropy (arXiv 2410.10989)."""

    name: str = "liger"
    about: str = "liger-kernel's fused linear cross-entropy"
    ops: tuple[str, ...] = ("loss",)
    traits: Traits = Traits(capturable=False, both_only=True)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        liger = _package("liger-kernel", "liger_kernel.transformers.functional", problem)
        (x, w, b), y = inputs.leaves, inputs.target

        def forward() -> Tensor:
            with problem.autocast():
                return liger.liger_fused_linear_cross_entropy(x, w, torch.cat([y, y]), b)

        return Case(forward, inputs.leaves)


class CutCrossEntropy(NamedTuple):
    """Cut cross-entropy (arXiv 2411.09009). It takes no bias: a column of the weight is, against ones. By default it
    leaves small gradients out, and the more classes, the more of them; here it computes all.
    """

    name: str = "cut-cross-entropy"
    about: str = "Apple's cut cross-entropy"
    ops: tuple[str, ...] = ("loss",)
    traits: Traits = Traits(capturable=False)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        cut = _package("cut-cross-entropy", "cut_cross_entropy", problem)
        if problem.compute == torch.float32:
            raise Unavailable("it is for 16-bit dtypes")
        (x, w, b), y = inputs.leaves, inputs.target
        # One column for the bias, and what keeps rows at multiples of 16 bytes.
        ones = F.one_hot(torch.zeros(len(x), dtype=torch.int64, device=x.device), 8).to(problem.compute)

        def forward() -> Tensor:
            weight = torch.cat([w, F.pad(b[:, None], (0, 7))], dim=1).to(problem.compute)
            return cut.linear_cross_entropy(torch.cat([x, ones], dim=1), weight, torch.cat([y, y]), filter_eps=None)

        return Case(forward, inputs.leaves, "bias as a column of the weight, no gradient filtered")


class Ffpa(NamedTuple):
    """FFPA, attention for head dimensions above 256."""

    name: str = "ffpa"
    about: str = "ffpa-attn, for head dimensions above 256"
    ops: tuple[str, ...] = ("attention",)
    traits: Traits = Traits(capturable=False, samples=512)

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        if problem.workload.head_dim <= 256:
            raise Unavailable(f"it passes a head dimension of {problem.workload.head_dim} on to PyTorch")
        if problem.workload.n < 512:
            raise Unavailable("it passes fewer than 512 samples on to PyTorch")
        ffpa = _package("ffpa-attn", "ffpa_attn", problem)
        if problem.compute == torch.float32:
            raise Unavailable("it is for 16-bit dtypes")

        def forward() -> Tensor:
            q, k, v = (t.permute(1, 2, 0, 3) for t in inputs.leaves)
            return ffpa.ffpa_attn_func(q, k, v, dropout_p=problem.dropout).permute(2, 0, 1, 3)

        return Case(forward, inputs.leaves)


_MAX = Traits(capturable=False, memory_unseen_on=("cpu", "cuda"), checked_as="compile")

PEERS = (
    Paper(),
    Compiled("compile", "the paper's code under torch.compile", None, Traits(memory_unseen_on=("cpu",))),
    Compiled("compile-max", "the same with mode='max-autotune', CUDA graphs included", "max-autotune", _MAX),
    Sdpa("sdpa-math", "the paper's code with SDPA's math backend", SDPBackend.MATH),
    Sdpa("sdpa-flash", "the same with its flash backend", SDPBackend.FLASH_ATTENTION),
    Sdpa("sdpa-efficient", "the same with its memory-efficient backend", SDPBackend.EFFICIENT_ATTENTION),
    Sdpa("sdpa-cudnn", "the same with its cuDNN backend", SDPBackend.CUDNN_ATTENTION),
    PytorchChunks(),
    Liger(),
    CutCrossEntropy(),
    Ffpa(),
)
