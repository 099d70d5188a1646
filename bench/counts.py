"""Counted, not timed: the launches of a training step, their FLOPs and the bytes they read and write.

A step runs on fake tensors, which have shapes and no data, so that any size is counted in no time and memory. Every
launch counts the tensors it is given and those it gives once each; what a kernel reads again is taken to hit the cache.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.ops import Problem
from bench.providers import PROVIDERS
from bench.tiles import PRODUCTS
from bench.workloads import Workload
from fastbf import backend, checks, repeats, signatures, tape
from fastbf.kernels import activation, add_norm, attention, cross_entropy, launch
from fastbf.triton_backend import classifier, encoder_backward
from fastbf.triton_backend import encoder_layer as autograd
from tests.launches import launches


class Launch(NamedTuple):
    """One launch."""

    name: str
    flops: float  #: of matrix products
    bytes: int  #: read and written


class Step(NamedTuple):
    """The launches of a training step."""

    forward: list[Launch]
    backward: list[Launch]

    @property
    def all(self) -> list[Launch]:
        return self.forward + self.backward


def _bytes(t: Tensor) -> int:
    """Of what is stored: an expanded dimension is one element long."""
    return math.prod(n for n, s in zip(t.shape, t.stride(), strict=True) if s) * t.element_size()


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    """A kernel is given some tensor in place of those that a call does without: each counts once."""
    return list({(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors}.values())


class Counter(TorchDispatchMode):
    """Collects PyTorch's launches, and our kernels', which do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if launches(func):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            nbytes = sum(map(_bytes, _distinct(tensors)))
            name = func.overloadpacket.__name__
            if (name.endswith("_") and "copy" not in name) or (args and args[0] is kwargs.get("out")):
                nbytes += _bytes(args[0])  # read as well as written
            count = flop_registry.get(func.overloadpacket)
            self.launches.append(Launch(name, count(*args, **kwargs, out_val=out) if count else 0, nbytes))
        return out

    def kernel(self, kernel, programs, device, tensors, numbers, constants) -> None:
        """In the place of ``fastbf.kernels.launch.launch``."""
        name = kernel.fn.__name__
        given = dict(zip(kernel.arg_names, (*tensors, *numbers), strict=False))
        nbytes = sum(map(_bytes, _distinct(list(tensors))))
        if name == "cross_entropy_backward" and given["p_z"].data_ptr() == given["p_dz"].data_ptr():
            nbytes += _bytes(given["p_dz"])  # in place
        flops = 0
        if name in PRODUCTS:
            n, positions, heads, head_dim = given["p_q"].shape
            products = PRODUCTS[name]
            flops = 2 * products * n * len(given["p_k"]) * head_dim * positions * heads
        self.launches.append(Launch(name, flops, nbytes))

    def weight_gradient(self, dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """In the place of ``triton_backend.matmul.weight_gradient``: on a GPU one product, which writes ``dtype``."""
        out = torch.empty(dy.shape[1], x.shape[1], dtype=dtype)
        self.launches.append(Launch("mm", 2 * len(x) * out.numel(), dy.nbytes + x.nbytes + out.nbytes))
        return out

    def product_into(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """In the place of ``fastbf.triton_backend.matmul.product_into``, likewise."""
        self.launches.append(Launch("mm", 2 * len(a) * b.numel(), a.nbytes + b.nbytes + out.nbytes))

    def take(self) -> list[Launch]:
        taken, self.launches = self.launches, []
        return taken


@contextmanager
def _as_on_a_gpu(counter: Counter) -> Iterator[None]:
    """What CUDA does, of CPU tensors: our kernels, fused attention and dropout, norms and losses in fp32."""
    cross_entropy_, layer_norm = F.cross_entropy, F.layer_norm

    def attention_(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, attn_mask, True, dropout_p, is_causal)[0]

    def dropout(x, p=0.5, training=True, inplace=False):
        return torch.ops.aten.native_dropout(x, p, training)[0]

    with ExitStack() as stack:
        for module in (activation, add_norm, attention, cross_entropy):
            stack.enter_context(mock.patch.object(module, "launch", counter.kernel))
        stack.enter_context(mock.patch.object(launch, "watched", return_value=False))
        stack.enter_context(mock.patch.dict(signatures._found, clear=True))
        stack.enter_context(mock.patch.dict(repeats.tapes, clear=True))
        stack.enter_context(mock.patch.object(tape, "is_second", return_value=False))
        stack.enter_context(mock.patch.object(classifier, "product_into", counter.product_into))
        stack.enter_context(mock.patch.object(encoder_backward, "weight_gradient", counter.weight_gradient))
        stack.enter_context(mock.patch.object(backend, "_obstacle", return_value=None))
        stack.enter_context(mock.patch.object(checks, "class_indices"))
        stack.enter_context(mock.patch.object(autograd, "norm_dtype", return_value=torch.float32))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention_))
        stack.enter_context(mock.patch.object(F, "dropout", dropout))
        stack.enter_context(mock.patch.object(F, "layer_norm", lambda x, *rest: layer_norm(x.float(), *rest)))
        stack.enter_context(mock.patch.object(F, "cross_entropy", lambda z, *rest: cross_entropy_(z.float(), *rest)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


def step(provider: str, w: Workload) -> Step:
    """Of a training step under autocast to bf16, dropout 0.5, gradients of features and parameters."""
    problem = Problem("step", w, "amp", torch.device("cpu"), 0.5)
    counter = Counter()
    with FakeTensorMode(), _as_on_a_gpu(counter):
        case = PROVIDERS[provider].case(problem, problem.inputs())
        with counter:
            out = case.forward()
            forward = counter.take()
        grad = torch.empty_like(out)
        with counter:
            case.gradients(out, grad)
            return Step(forward, counter.take())
