"""One training step of BatchFormer and SharedClassifier equals the paper's own code, forward and backward."""

import pytest
import torch

import fastbf
from fastbf import functional
from tests import paper
from tests.exact import layer_masks

N, C, K = 33, 24, 7


def models(dropout):
    encoder, linear = paper.encoder(C, dropout=dropout).double(), torch.nn.Linear(C, K).double()
    former, classifier = fastbf.BatchFormer(C, dropout=dropout).double(), fastbf.SharedClassifier(C, K).double()
    former.layers[0].load_state_dict(encoder.state_dict())
    classifier.load_state_dict(linear.state_dict())
    return encoder, linear, former, classifier


def assert_same_step(encoder, linear, former, classifier, x, y):
    ours = classifier.loss(former(x), y)
    theirs = paper.step(encoder, linear, x, y)
    torch.testing.assert_close(ours, theirs)
    actual = torch.autograd.grad(ours, [x, *former.parameters(), *classifier.parameters()])
    expected = torch.autograd.grad(theirs, [x, *encoder.parameters(), *linear.parameters()])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def batch():
    return torch.randn(N, C, dtype=torch.float64, requires_grad=True), torch.randint(0, K, (N,))


def test_without_dropout():
    assert_same_step(*models(0.0), *batch())


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_with_identical_masks(p, monkeypatch):
    encoder, linear, former, classifier = models(p)
    x, y = batch()
    seed = torch.tensor([11])
    monkeypatch.setattr(functional, "_as_seed", lambda *_: seed)
    paper.set_masks(encoder, layer_masks(x, 4, C, seed, p), monkeypatch)
    assert_same_step(encoder, linear, former, classifier, x, y)


def test_evaluation_is_the_plain_classifier():
    _, linear, former, classifier = models(0.5)
    x, y = batch()
    former.eval()
    assert former(x) is x
    same, labels = former(x, y)
    assert same is x
    assert labels is y
    torch.testing.assert_close(classifier(x), linear(x))
