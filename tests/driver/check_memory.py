"""What is held of calls that were made: so much for a batch size and no more, and of a fixed number of them."""

import gc
import sys
import tracemalloc

import pytest
import torch

import fastbf

C, K = 8, 10


@pytest.fixture
def step(cuda):
    """A training step with so many samples, in one thread, as each product is small."""
    cuda.be_quiet()  # the notes of launches would grow
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    former = fastbf.BatchFormer(C, 1, backend="triton")
    classifier = fastbf.SharedClassifier(C, K, backend="triton")

    def step(n):
        x = torch.randn(n, C, requires_grad=True)
        classifier.loss(*former(x, torch.zeros(n, dtype=torch.int64))).backward()
        former.zero_grad()
        classifier.zero_grad()

    yield step
    torch.set_num_threads(threads)


def test_ten_thousand_batch_sizes(step):
    """Once all is held that may be, more sizes add nothing: neither those that come once nor those that come often."""
    held = {}
    for n in range(1, 10_001):
        for _ in range(4 if n % 20 == 0 else 1):
            step(n)
        if n in (1_000, 5_000, 10_000):
            gc.collect()
            held[n] = sys.getallocatedblocks()
    assert held[1_000] < held[5_000]
    # One small object for each of 5,000 sizes would be 5,000 blocks; a kernel that is built is a thousand.
    assert held[10_000] - held[5_000] < 4_000


@pytest.mark.parametrize(("times", "most"), [(1, 16_000), (4, 100_000)], ids=["once", "often"])
def test_a_batch_size(times, most, step):
    """Bytes, while there is room for more. One that comes often has four tapes, of about 16 KB each."""
    for n in (*range(1, 30), *range(2_000, 2_010)):
        for _ in range(4):
            step(n)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for n in range(1_000, 1_050):
            for _ in range(times):
                step(n)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 50 < most
