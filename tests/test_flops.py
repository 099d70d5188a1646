"""What a counter of FLOPs sees of kernels is what it sees of PyTorch's own layer and loss."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastbf
from fastbf import functional
from fastbf.torch_backend import matmul
from tests.triton_case import DEVICE

N, C = 12, 32
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def flops(step):
    """Of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step().sum().backward()
    return counter.get_total_flops()


@BACKENDS
@pytest.mark.parametrize("shape", [(N, 1, C), (40, 1, C), (5, 3, C)], ids=str)  # packed and streaming attention
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("input_grad", [False, True])
def test_layer(shape, norm_first, input_grad, backend):
    options = {"dim_feedforward": 48, "norm_first": norm_first, "device": DEVICE}
    ours = fastbf.BatchFormerLayer(C, 4, **options, backend=backend)
    x = torch.randn(shape, device=DEVICE, requires_grad=input_grad)
    expected = flops(lambda: nn.TransformerEncoderLayer(C, 4, **options)(x))
    assert [flops(lambda: ours(x)) for _ in range(4)] == [expected] * 4  # noted, played, as written


@BACKENDS
def test_frozen_weights(backend):
    """Products for gradients that nothing needs are not made."""
    ours = fastbf.BatchFormerLayer(C, 4, 48, device=DEVICE, backend=backend)
    paper = nn.TransformerEncoderLayer(C, 4, 48, device=DEVICE)
    x = torch.randn(N, 1, C, device=DEVICE, requires_grad=True)
    for layer in (ours, paper):
        for linear in (layer.linear1, layer.linear2):
            linear.requires_grad_(False)
    assert flops(lambda: ours(x)) == flops(lambda: paper(x))


def test_large_products(monkeypatch):
    """Which oneDNN makes on some CPUs, by an operator that counters do not know by themselves."""
    monkeypatch.setattr(matmul, "_suits_onednn", matmul.has_onednn_linear)
    layer, paper = fastbf.BatchFormerLayer(512, 4, 512), nn.TransformerEncoderLayer(512, 4, 512)
    classifier, x = fastbf.SharedClassifier(512, 1000), torch.randn(200, 1, 512, requires_grad=True)
    assert flops(lambda: layer(x)) == flops(lambda: paper(x))
    assert flops(lambda: classifier.loss(x[:, 0], torch.arange(200))) == 6 * 200 * 512 * 1000
    for _ in range(4):  # the last by a tape
        y = layer(x).sum()
        with FlopCounterMode(display=False) as counter:
            y.backward()
        assert counter.get_total_flops() == flops(lambda: paper(x)) * 2 // 3


@BACKENDS
def test_loss(backend):
    classifier = fastbf.SharedClassifier(C, 7, device=DEVICE, backend=backend)
    x, y = torch.randn(2 * N, C, device=DEVICE, requires_grad=True), torch.arange(2 * N, device=DEVICE) % 7
    expected = flops(lambda: F.cross_entropy(classifier(x), y))
    for targets in (y, y[:N]):
        assert [flops(lambda t=targets: classifier.loss(x, t)) for _ in range(4)] == [expected] * 4


@BACKENDS
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_attention(needs, backend):
    """A product for each gradient, and one more that those of queries and keys share."""
    q, k, v = (torch.randn(40, 3, 2, 16, device=DEVICE, requires_grad=need) for need in needs)
    products = 2 + sum(needs) + (needs[0] or needs[1])
    counted = flops(lambda: functional.batch_attention(q, k, v, dropout_p=0.5, backend=backend))
    assert counted == products * 2 * 40 * 40 * 3 * 2 * 16


FIRST = """
import torch, fastbf
from torch.utils.flop_counter import FlopCounterMode
layer, x = fastbf.BatchFormerLayer(32, 4, 48, backend="triton"), torch.randn(8, 32)
for _ in range(2):
    with FlopCounterMode(display=False) as counter:
        layer(x)
    print(counter.get_total_flops())
"""


def test_the_first_call_of_a_process():
    """Kernels are imported at the first call, when the counter has taken the formulas that there were."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST], cwd=Path(__file__).parents[1], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = run.stdout.split()
    assert int(first) == int(second) == 2 * 8 * 32 * (3 * 32 + 32 + 2 * 48) + 4 * 8 * 8 * 32
