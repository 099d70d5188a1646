"""What a provider is: it turns a problem into a callable, or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench.ops import Inputs, Problem


class Unavailable(RuntimeError):
    """Why a provider cannot serve a problem here, in a sentence."""


class Case(NamedTuple):
    """A problem in a provider's hands."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]  #: gradients are taken of these, in the order of the problem's inputs; may be none
    note: str = ""  #: how it differs from what was asked for

    def gradients(self, out: Tensor, grad: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
        """Of the leaves, given that of the result."""
        return torch.autograd.grad(out, self.leaves, grad, retain_graph=retain_graph) if self.leaves else ()


class Traits(NamedTuple):
    """What measurements must know of a provider."""

    capturable: bool = True  #: into a CUDA graph: not what replays one itself, or waits for the device
    #: Devices where a graph keeps its memory, a compiler cannot be watched, or what it takes says nothing.
    memory_unseen_on: tuple[str, ...] = ()
    checked_as: str = ""  #: the name of a provider that computes the same and is quicker to compare
    samples: int = 80  #: of a batch, to compare results: enough to take the path that is timed
    both_only: bool = False  #: its forward computes the gradients too
    unchecked: bool = False  #: it computes nothing that could be compared, and is no way to compute the op


class Provider(Protocol):
    """Computes some ops."""

    name: str
    about: str
    ops: tuple[str, ...]
    traits: Traits

    def case(self, problem: Problem, inputs: Inputs) -> Case:
        """The problem ready to run.

        Raises:
            Unavailable: not installed, not for this device, dtype or size.
        """
        ...


class Timed(NamedTuple):
    """What is timed."""

    run: Callable[[], object]
    result_bytes: int  #: of the op's result


def timed(case: Case, mode: str) -> Timed:
    """Forward keeps what backward needs; backward goes over a retained graph; both do neither."""
    out = case.forward()
    grad = torch.ones_like(out) if out.dim() == 0 else torch.randn_like(out)
    if mode == "forward":
        return Timed(case.forward, out.nbytes)
    if mode == "backward":
        return Timed(lambda: case.gradients(out, grad, retain_graph=True), out.nbytes)
    return Timed(lambda: case.gradients(case.forward(), grad), out.nbytes)


def captured(case: Case, mode: str) -> Timed:
    """The same as one CUDA graph, whose replays cost the host next to nothing.

    Raises:
        RuntimeError: it does what a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # forward too: autograd runs backward where forward ran
        run, result_bytes = timed(case, mode)
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept, run, case  # which own the memory that the graph reads

    return Timed(replay, result_bytes)


#: How far from fp64 a result may be, in the Euclidean norm, on top of three times eager PyTorch's own error: a TF32
#: product is 3e-4 off, a bf16 one 3e-3. What is left out altogether, such as a bias, is off by far more.
TOLERANCE = {"fp32": 3e-3, "bf16": 1e-2, "fp16": 3e-3, "amp": 1e-2}


def differs(provider: Provider, reference: Provider, problem: Problem) -> str:
    """How a provider's results and gradients differ from the reference's in fp64, in words; empty if they do not.

    Args:
        reference: in eager PyTorch; its own error in the problem's dtype counts too, as rounding flips signs that ReLU
            looks at.
        problem: without dropout; :meth:`Problem.reduced` is quick.

    Raises:
        Unavailable: the provider cannot serve it.
    """
    results = _results(provider, problem, problem.inputs())
    for name, (wanted, allowed) in _expected(reference, problem).items():
        error = _error(results[name], wanted)
        if not error <= allowed:
            return f"its {name} is off by {error:.1e}"
    return ""


@lru_cache(maxsize=1)  # problems come with all their providers
def _expected(reference: Provider, problem: Problem) -> dict[str, tuple[Tensor, float]]:
    """Each result in fp64, and how far from it one may be."""
    exact = _results(reference, problem.exact(), problem.inputs())
    eager = _results(reference, problem, problem.inputs())
    return {name: (t, TOLERANCE[problem.dtype] + 3 * _error(eager[name], t)) for name, t in exact.items()}


def _error(result: Tensor, wanted: Tensor) -> float:
    return ((result.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def _results(provider: Provider, problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """The result and the gradient of each leaf, by name."""
    if problem.dtype == "fp64":
        inputs = inputs._replace(leaves=[t.detach().double().requires_grad_() for t in inputs.leaves])
    case = provider.case(problem, inputs)
    out = case.forward()
    torch.manual_seed(1)
    grad = torch.ones_like(out) if out.dim() == 0 else torch.randn(out.shape).to(out)
    names = [f"gradient {i}" for i in range(len(case.leaves))]
    return {"result": out.detach(), **dict(zip(names, case.gradients(out, grad), strict=True))}
