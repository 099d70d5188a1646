"""Peak memory of a training step, counted, next to the paper's code."""

import pytest
import torch
from torch import nn

import fastbf
from tests import paper
from tests.memory import PeakMemory


def peak(step):
    """Of a second step, with gradients from the first released."""
    step()
    with PeakMemory() as memory:
        step()
    return memory.peak


@pytest.mark.parametrize(("n", "c", "k"), [(128, 512, 1000), (1024, 128, 1000), (2048, 64, 10), (256, 128, 8142)])
def test_no_higher_than_the_papers(n, c, k):
    x, y = torch.randn(n, c, requires_grad=True), torch.randint(0, k, (n,))
    encoder, linear = paper.encoder(c), nn.Linear(c, k)
    former, classifier = fastbf.BatchFormer(c), fastbf.SharedClassifier(c, k)

    def run(loss, *modules):
        for t in (x, *(p for m in modules for p in m.parameters())):
            t.grad = None
        loss().backward()

    theirs = peak(lambda: run(lambda: paper.step(encoder, linear, x, y), encoder, linear))
    ours = peak(lambda: run(lambda: classifier.loss(former(x), y), former, classifier))
    print(f"peak at N={n} C={c} K={k}: paper {theirs / 2**20:.1f} MiB, fastbf {ours / 2**20:.1f} MiB")
    assert ours <= theirs


def test_counts_what_is_alive():
    with PeakMemory() as memory:
        x = torch.ones(1000)
        y = x.view(10, 100) * 2
        del x
        z = y + 1
        del y, z
    assert memory.peak == 8000
    assert not memory.live
