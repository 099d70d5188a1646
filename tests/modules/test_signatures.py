"""What replaces a module of PyTorch takes the keywords of what it replaces."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbf import BatchFormerLayer, SharedClassifier, functional

#: Ours, theirs, and what of theirs is not taken.
PAIRS = [
    (BatchFormerLayer, nn.TransformerEncoderLayer, ()),
    (BatchFormerLayer.forward, nn.TransformerEncoderLayer.forward, ()),
    (SharedClassifier, nn.Linear, ()),
    (SharedClassifier.forward, nn.Linear.forward, ()),
]
if hasattr(F, "linear_cross_entropy"):  # how it goes in chunks is its own
    PAIRS.append((functional.linear_cross_entropy, F.linear_cross_entropy, ("options",)))


@pytest.mark.parametrize(("ours", "theirs", "without"), PAIRS, ids=[ours.__qualname__ for ours, *_ in PAIRS])
def test_every_keyword_is_taken(ours, theirs, without):
    taken, wanted = (inspect.signature(f).parameters for f in (ours, theirs))
    assert {name for name, p in wanted.items() if p.kind is not p.VAR_KEYWORD} - {*without} <= set(taken)


def test_a_classifier_by_the_names_of_a_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(in_features=3, out_features=4, bias=False, device="cpu", dtype=torch.float64)
    torch.manual_seed(0)
    ours = SharedClassifier(in_features=3, out_features=4, bias=False, device="cpu", dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(ours(input=x), linear(input=x))
    assert torch.equal(ours(features=x), ours(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SharedClassifier(3), "num_classes must be given, as num_classes or as out_features, got neither"),
        (lambda: SharedClassifier(3, 4, out_features=4), "got both"),
        (lambda: SharedClassifier(3, 4)(), "features must be given, as features or as input, got neither"),
        (lambda: SharedClassifier(3, 4)(torch.ones(1, 3), input=torch.ones(1, 3)), "got both"),
    ],
)
def test_a_name_too_many_or_too_few(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_no_index_to_ignore_is_the_usual_one():
    x, w, y = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, -100, 2])
    losses = [functional.linear_cross_entropy(x, w, y, ignore_index=ignored) for ignored in (None, -100)]
    assert torch.equal(*losses)
