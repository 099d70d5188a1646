"""Launches, as a device sees them, are those of Triton's dispatcher, byte for byte."""

import pytest
import torch

import fastbf
from fastbf.kernels import activation, add_norm, attention, cross_entropy
from fastbf.kernels.launch import _compiled, _observers, launch

MODULES = (activation, add_norm, attention, cross_entropy)


@pytest.fixture
def compared(cuda, monkeypatch):
    """Each launch is made three times, as a first one, as a warm one and by the dispatcher; the lines are equal."""
    seen = []

    def thrice(kernel, programs, device, tensors, numbers, constants):
        if _observers.plan is not None:
            launch(kernel, programs, device, tensors, numbers, constants)
            return
        cuda.forget()
        for _ in range(2):
            launch(kernel, programs, device, tensors, numbers, constants)
        kernel[(programs,)](*tensors, *numbers, **constants)
        first, warm, dispatched = cuda.launches()
        assert first == dispatched
        assert warm == dispatched
        seen.append(first)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", thrice)
    return seen


def step(n, c, dropout, dtype=torch.float32, amp=False, positions=()):
    """A training step of layer, fork, classifier and loss."""
    former = fastbf.BatchFormer(c, dropout=dropout, backend="triton").to(dtype)
    classifier = fastbf.SharedClassifier(c, 10, class_counts=range(1, 11), backend="triton").to(dtype)
    x = torch.randn(n, *positions, c, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        features, target = former(x, torch.randint(10, (n, *positions)))
        classifier.loss(features, target, stats=False).backward()


@pytest.mark.parametrize(
    "case",
    [
        {"n": 7, "c": 64, "dropout": 0.1, "dtype": torch.float16, "positions": (3,)},  # attention is packed
        {"n": 48, "c": 64, "dropout": 0.5, "amp": True},  # and streams
    ],
    ids=["fp16", "amp"],
)
def test_first_and_warm_launches(case, compared):
    step(**case)
    names = {line.split()[0] for line in compared}
    assert len(compared) >= 10
    assert any(name.startswith("backward") for name in names)
    assert "cross_entropy_backward" in names


def test_misaligned_tensors(compared):
    """A kernel for pointers that are multiples of 16 is not launched with others."""
    memory, seed = torch.randn(64 * 32 + 1), torch.tensor([1])
    for start in (0, 1, 0):
        x = memory[start : start + 64 * 32].view(64, 32)
        fastbf.functional.activation_dropout(x, "relu", dropout_p=0.5, seed=seed, backend="triton")
    assert len(compared) == 3
    assert len(_compiled) == 2


def test_the_launches_of_a_tape(cuda):
    """From the third step on, launches differ from those as written in addresses at most."""
    former = fastbf.BatchFormer(64, dropout=0.5, backend="triton")
    x = torch.randn(48, 64, requires_grad=True)
    steps = []
    for _ in range(5):
        cuda.forget()
        with torch.autocast("cpu", torch.bfloat16):
            y = former(x)
        y.sum().backward()
        steps.append([_without_addresses(line) for line in cuda.launches()])
    assert len(steps[0]) > 6
    assert all(lines == steps[0] for lines in steps)


def _without_addresses(line):
    """A launch, of whose parameters of eight bytes, pointers and 64-bit numbers, the alignment alone is kept."""
    return [f"aligned {int(word[:2], 16) % 16 == 0}" if len(word) == 16 else word for word in line.split(" ")]
