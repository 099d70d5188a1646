"""What a step costs the host, in pytest-benchmark's microseconds, on a GPU that does nothing (``bench/stub.py``).

``pytest bench/test_host.py``. Matrix products run on the CPU and are small; they and the autograd engine are in all of
a step's numbers, ours and PyTorch's.
"""

import pytest
import torch
from torch import nn

import fastbf
from bench.stub import stub_gpu
from fastbf import checks
from fastbf.kernels import add_norm
from fastbf.kernels.rows import Rows
from tests import paper

N, C, K = 16, 32, 10


@pytest.fixture
def gpu():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with stub_gpu() as driver:
        yield driver
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dispatcher", ["triton", "fastbf"])
def test_launch(benchmark, gpu, monkeypatch, dispatcher):
    """One launch of the kernel with the most arguments among the elementwise ones."""
    if dispatcher == "triton":
        monkeypatch.setattr(add_norm, "launch", _through_triton)
    x, w = torch.randn(N, C), torch.ones(C)

    def forward():
        add_norm.forward(x, Rows(N, 1, False), y=x, norm=(w, w, 1e-5))

    benchmark.group = "a launch"
    forward()  # compiles
    benchmark(forward)


def _through_triton(kernel, programs, device, tensors, numbers, constants):
    kernel[(programs,)](*tensors, *numbers, **constants)


def _fastbf():
    former, classifier = fastbf.BatchFormer(C, backend="triton"), fastbf.SharedClassifier(C, K, backend="triton")
    return lambda x, y: classifier.loss(former(x), y), [former, classifier]


def _eager():
    layer, linear = nn.TransformerEncoderLayer(C, 4, C, 0.5), nn.Linear(C, K)
    return lambda x, y: paper.step(layer, linear, x, y), [layer, linear]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("provider", [_eager, _fastbf], ids=["eager", "fastbf"])
def test_step(benchmark, gpu, monkeypatch, provider, dtype):
    """Layer, fork, classifier and loss, forward and backward."""
    monkeypatch.setattr(checks, "class_indices", lambda *_: None)  # looked at on a CPU only
    function, modules = provider()
    tensors = [torch.randn(N, C, requires_grad=True), *(p for m in modules for p in m.parameters())]
    y = torch.arange(N) % K

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = function(tensors[0], y)
        torch.autograd.grad(loss, tensors)

    benchmark.group = f"a training step, {dtype}"
    step()
    gpu.launches = 0
    step()
    benchmark.extra_info["launches"] = gpu.launches
    benchmark(step)
