"""How many kernels and matrix products a training step launches (docs/design.md), counted, not timed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbf
from fastbf import checks
from fastbf.kernels import activation, add_norm, attention, cross_entropy, launch
from tests.launches import launches
from tests.triton_case import DEVICE

N, C, K = 40, 32, 10


class Launches(TorchDispatchMode):
    """Collects the names of PyTorch's operators that launch something, and of our kernels, which do not run."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        monkeypatch.setattr(launch, "watched", bool)
        for module in (activation, add_norm, attention, cross_entropy):
            monkeypatch.setattr(module, "launch", lambda kernel, *_: self.names.append(kernel.fn.__name__))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if launches(func):
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    def take(self):
        names, self.names = self.names, []
        return names


_FORWARD = "randint addmm forward_streaming addmm add_norm_forward addmm activation_forward addmm add_norm_forward"
_BACKWARD = (
    "add_norm_backward mm activation_backward mm mm mm add_norm_backward mm mm"
    " backward_query backward_key_value mm sum addmm sum"
)
POST = (_FORWARD.split(), _BACKWARD.split())
PRE = (
    ["randint", "add_norm_forward", *POST[0][1:]],
    [*POST[1][:-2], "mm", "add_norm_backward", "sum"],
)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("forked", [False, True])
def test_layer_and_fork(norm_first, forked, monkeypatch):
    former = fastbf.BatchFormer(C, backend="triton", norm_first=norm_first, forked=forked, device=DEVICE)
    x = torch.randn(N * (2 if forked else 1), C, device=DEVICE, requires_grad=True)
    with Launches(monkeypatch) as counted:
        out = former(x)
        forward = counted.take()
        torch.autograd.grad(out, [x, *former.parameters()], torch.ones_like(out).detach())
        backward = counted.take()
    expected = PRE if norm_first else POST
    assert forward == expected[0]
    assert sorted(backward[1:]) == sorted(expected[1])  # the first makes the gradient


def test_autocast_adds_one_launch_for_all_casts(monkeypatch):
    former = fastbf.BatchFormer(C, backend="triton", device=DEVICE)
    x = torch.randn(N, C, device=DEVICE, requires_grad=True)
    with Launches(monkeypatch) as counted, torch.autocast(DEVICE.type, torch.float16):
        former(x)
    assert counted.names == [POST[0][0], "_foreach_copy_", *POST[0][1:]]


@pytest.mark.parametrize("stats", [False, True])
def test_a_training_step(stats, monkeypatch):
    """Layer, fork, classifier and loss: at most 12 forward and 22 backward, the engine's first gradient included."""
    monkeypatch.setattr(checks, "class_indices", lambda *_: None)  # which no GPU waits for
    former = fastbf.BatchFormer(C, backend="triton", device=DEVICE)
    classifier = fastbf.SharedClassifier(C, K, backend="triton", device=DEVICE)
    x = torch.randn(N, C, device=DEVICE, requires_grad=True)
    y = torch.arange(N, device=DEVICE) % K
    with Launches(monkeypatch) as counted:
        loss = classifier.loss(former(x), y, stats=stats)
        forward = counted.take()
        (loss[0] if stats else loss).backward()
        backward = counted.take()
    assert forward == [*POST[0], "mm", "cross_entropy_forward", "cross_entropy_finish"]
    assert sorted(backward) == sorted(["ones_like", "cross_entropy_backward", "mm", "mm", "sum", *POST[1]])
    assert len(forward) <= 12
    assert len(backward) <= 22
