"""Peak memory of a training step, counted, next to the paper's code."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbf
from fastbf.functional import linear_cross_entropy
from fastbf.kernels import cross_entropy
from fastbf.precision import chunk_elements
from fastbf.torch_backend import classifier as chunked_classifier
from fastbf.triton_backend import classifier
from tests import paper
from tests.memory import PeakMemory, peak_by_profiler
from tests.triton_case import DEVICE


def peak(step):
    """Of a second step, with gradients from the first released."""
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        (16, 64, 10),
        (32, 512, 100),
        (128, 512, 1000),
        (1024, 128, 1000),
        (2048, 64, 10),
        (256, 128, 8142),
        (128, 16, 10),
        (181, 32, 10),
        (256, 64, 100),
    ],
)
def test_no_higher_than_the_papers(n, c, k):
    x, y = torch.randn(n, c, requires_grad=True), torch.randint(0, k, (n,))
    encoder, linear = paper.encoder(c), nn.Linear(c, k)
    former, classifier = fastbf.BatchFormer(c), fastbf.SharedClassifier(c, k)

    def run(loss, *modules):
        loss().backward()
        for t in (x, *(p for m in modules for p in m.parameters())):
            t.grad = None

    steps = (
        lambda: run(lambda: paper.step(encoder, linear, x, y), encoder, linear),
        lambda: run(lambda: classifier.loss(former(x), y), former, classifier),
    )
    theirs, ours = map(peak, steps)
    for _ in range(3):
        steps[1]()
    by_tape = peak_by_profiler(steps[1])
    assert by_tape <= peak_by_profiler(steps[0])
    print(f"peak at N={n} C={c} K={k}: paper {theirs / 2**20:.1f} MiB, fastbf {ours / 2**20:.1f} MiB")
    assert ours <= theirs


def classifier_peak(loss, m, c, k, retain=False, device=DEVICE):
    """Of the loss of M forked rows and its gradients, these included."""
    x, w = torch.randn(m, c, device=device, requires_grad=True), torch.randn(k, c, device=device, requires_grad=True)
    b, y = torch.zeros(k, device=device, requires_grad=True), torch.randint(0, k, (m // 2,), device=device)
    return peak(lambda: torch.autograd.grad(loss(x, w, b, y), (x, w, b), retain_graph=retain))


def plain(x, w, b, y):
    return F.cross_entropy(F.linear(x, w, b), torch.cat([y, y]))


def on(backend):
    return lambda x, w, b, y: linear_cross_entropy(x, w, y, linear_bias=b, backend=backend)


@pytest.mark.parametrize(("m", "c", "k"), [(256, 2048, 1000), (2048, 64, 8142), (1024, 32, 50_000)])
def test_the_torch_backend_of_the_classifier(m, c, k):
    """No more than plain PyTorch where the logits are small next to the gradients; half of it where they are not."""
    ours, theirs = (classifier_peak(loss, m, c, k, device="cpu") for loss in (on("torch"), plain))
    print(f"peak at M={m} C={c} K={k}: plain {theirs / 2**20:.1f} MiB, fastbf {ours / 2**20:.1f} MiB")
    assert ours <= (1 if k < c else 0.6) * theirs


def test_the_torch_backend_in_chunks(monkeypatch):
    """One chunk of logits at a time where they are not kept: half of the rows."""
    monkeypatch.setattr(chunked_classifier, "KEEP_LOGITS_BYTES", 0)
    rows, c, k = 1024, 4, 50_000
    gradients = (rows * c + 3 * k * c + k) * 4  # the weight's, what a chunk adds to it, and the sum
    parts = 2 * chunk_elements(torch.device("cpu"), torch.float32) * 4  # between two products
    assert classifier_peak(on("torch"), rows, c, k, device="cpu") < gradients + rows * k * 4 / 2 + 1.1 * parts


M, C, K = 512, 4, 1000
LOGITS, GRADIENTS = M * K * 4, (M * C + K * C + K) * 4


def rest(rows):
    """Numbers of rows, partial sums."""
    return 16 * M * 4 + (cross_entropy.sums_parts(rows, K, DEVICE) + 4) * K * 4


@pytest.mark.parametrize(("retain", "buffers"), [(False, 1), (True, 2)])
def test_the_kernels_of_the_classifier(retain, buffers):
    """One tensor of the logits' size, two if the graph is retained; plain PyTorch has three."""
    ours, theirs = classifier_peak(on("triton"), M, C, K, retain), classifier_peak(plain, M, C, K, retain)
    assert buffers * LOGITS < ours - GRADIENTS < buffers * LOGITS + rest(M)
    assert theirs - GRADIENTS > 2.5 * LOGITS


def test_the_kernels_of_the_classifier_in_chunks(monkeypatch):
    """One chunk of logits."""
    monkeypatch.setattr(classifier, "MIN_ROWS", 64)
    monkeypatch.setattr(classifier, "CHUNK", 0)
    monkeypatch.setattr(classifier, "KEPT", 0)
    product = K * C * 4  # of one chunk, on its way to the weight's gradient
    assert classifier_peak(on("triton"), M, C, K) - GRADIENTS < LOGITS / 8 + product + rest(64)


def test_counts_what_is_alive():
    with PeakMemory() as memory:
        x = torch.ones(1000)
        y = x.view(10, 100) * 2
        del x
        z = y + 1
        del y, z
    assert memory.peak == 8000
    assert not memory.live
