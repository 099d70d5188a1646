"""Training steps that are repeated with changes, on either backend, and calls by a tape."""

import pytest
import torch

import fastbf
from fastbf import repeats, tape

C, K = 8, 8


def features(n=4, *positions, dtype=torch.float32):
    return torch.randn(n, *positions, C, dtype=dtype, requires_grad=True)


class Step:
    """A training step of a model with changes made to it."""

    def __init__(self, backend="triton", **options):
        torch.manual_seed(1)
        self.former = fastbf.BatchFormer(C, 1, backend=backend, **options)
        self.classifier = fastbf.SharedClassifier(C, K, backend=backend)
        self.autocast = torch.float32
        self.x = features()
        self.y = torch.randint(0, K, (4,))
        self.stats = False
        self.call = lambda x: self.former(x)

    def parameters(self):
        return [self.x, *self.former.parameters(), *self.classifier.parameters()]

    def loss(self):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast != torch.float32):
            return self.classifier.loss(self.call(self.x), self.y, stats=self.stats)

    def __call__(self):
        """Every number of a step."""
        found = self.loss()
        loss, stats = found if self.stats else (found, ())
        wanted = [p for p in self.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [loss.detach(), *stats, *(torch.zeros(()) if g is None else g for g in grads)]


def assert_as_written(step):
    """A step by tapes, if there are any, and as written, from one state of the generator."""
    state = torch.get_rng_state()
    found = step()
    torch.set_rng_state(state)
    with pytest.MonkeyPatch.context() as patch:
        for module in (repeats, tape):
            patch.setattr(module, "find", lambda *_: None)
        patch.setattr(tape, "is_second", lambda *_, **__: False)
        expected = step()
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def call(function, *tensors, what=("test",), noting=tape.noting):
    """What an autograd Function does: the results of ``function``, by a tape if there is one."""
    made = tape.play(what, tensors)
    if made is None:
        with noting(what, tensors) as made:
            made += function(*tensors)
    return made
