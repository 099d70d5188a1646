"""The contrastive example: in its quick form, run as a user runs it, and its parts."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import fastbf
from tests.examples.running import imported, run_quick


@pytest.fixture
def example(monkeypatch):
    return imported("contrastive", monkeypatch)


def test_quick_run(tmp_path):
    lines = run_quick("contrastive", tmp_path)
    assert lines[2].startswith("backend of BatchFormer  torch: ")
    title = next(i for i, line in enumerate(lines) if line.split()[:3] == ["labels", "per", "class"])
    rows = [line.split() for line in lines[title + 1 : title + 5]]
    assert [row[0] for row in rows] == ["1", "5", "20", "120"]
    assert all(row[-1] == "verdict" for row in rows)
    assert all(len(line) <= 100 for line in lines[title : title + 5])
    for arm in (1, 4):  # without, with
        accuracy = [float(row[arm]) for row in rows]
        assert accuracy[0] > 25  # one label of each class; chance is 10
        assert accuracy[-1] > 85
    assert (tmp_path / "contrastive.png").stat().st_size > 10_000


@pytest.mark.parametrize("streams", [1, 2])
def test_info_nce_is_the_losses_written_out(example, streams):
    n = 7
    queries = torch.randn(streams * n, 6, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(n, 6, dtype=torch.float64)
    losses = []
    for stream in queries.split(n):
        similarity = F.cosine_similarity(stream[:, None], keys[None], dim=-1) / example.TEMPERATURE
        losses.append((similarity.logsumexp(1) - similarity.diagonal()).mean())
    expected = sum(losses) / streams
    loss = example.info_nce(queries, keys)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, queries)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, queries)[0])


def test_queries_are_forked_and_keys_are_not(example):
    encoder = example.Encoder(batchformer=True)
    keys = fastbf.strip(copy.deepcopy(encoder))
    images = torch.rand(5, 1, 8, 8)
    assert encoder(images).shape == (10, 64)
    assert keys(images).shape == (5, 64)
    assert encoder.eval()(images).shape == (5, 64)
    assert [n for n, _ in keys.named_parameters()] == [n for n, _ in example.Encoder(False).named_parameters()]


def test_both_arms_begin_with_the_same_weights(example):
    torch.manual_seed(3)
    plain = example.Encoder(False).state_dict()
    torch.manual_seed(3)
    mixed = example.Encoder(True).state_dict()
    assert plain.keys() < mixed.keys()
    assert all(torch.equal(plain[name], mixed[name]) for name in plain)


def test_views_differ_and_can_be_repeated(example):
    images = torch.tensor(load_digits().images[:6], dtype=torch.float32)[:, None] / 16
    random = torch.Generator().manual_seed(0)
    first, second = (example.augment(images, random) for _ in range(2))
    assert first.shape == images.shape
    assert not torch.allclose(first, second)
    assert torch.equal(first, example.augment(images, random.manual_seed(0)))
    # On average a view is its image, blurred, and no other.
    mean = torch.stack([example.augment(images, random) for _ in range(100)]).mean(0)
    assert torch.equal(torch.cdist(mean.flatten(1), images.flatten(1)).argmin(1), torch.arange(6))


def test_split(example):
    target = load_digits().target
    train, test = example.split(1)
    assert sorted([*train, *test]) == list(range(len(target)))
    assert (np.bincount(target[test]) == example.TEST_PER_CLASS).all()
    assert np.bincount(target[train]).min() >= max(example.LABELS)
