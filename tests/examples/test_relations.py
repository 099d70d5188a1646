"""The example of sample relations: in its quick form, run as a user runs it, and its parts."""

import numpy as np
import pytest
import torch
from torch import nn

import fastbf
from tests.examples.running import imported, run_quick

CPU = torch.device("cpu")


@pytest.fixture
def example(monkeypatch):
    return imported("relations", monkeypatch)


def test_quick_run(tmp_path):
    lines = run_quick("relations", tmp_path)
    assert lines[2].startswith("backend of BatchFormer  torch: ")
    for title, names in (
        ("attention", ["to the own class, all", "to the own class, many", "to the own class, medium",
                       "to the own class, few", "few-shot to many-shot", "many-shot to few-shot",
                       "spread over a seed's map"]),
        ("gradient", ["from other samples", "at many-shot, from few-shot", "at few-shot, from many-shot"]),
    ):  # fmt: skip
        at = next(i for i, line in enumerate(lines) if line.split() == [title, "initial", "trained", "difference"])
        for name, line in zip(names, lines[at + 1 :], strict=False):
            assert line.startswith(f"  {name} ")
            assert line.endswith("too few seeds for a verdict")
            assert len(line) <= 100
            initial, trained = (float(line[30:].split()[column]) for column in (0, 3))
            assert 0 < initial < 200
            assert 0 < trained < 200
    assert (tmp_path / "relations.png").stat().st_size > 10_000


def test_by_class_is_the_mean_over_pairs_of_two_samples(example, monkeypatch):
    monkeypatch.setattr(example, "CLASSES", 2)
    values = torch.tensor([[9.0, 1.0, 2.0, 3.0], [4.0, 9.0, 5.0, 6.0], [7.0, 8.0, 9.0, 1.0], [2.0, 3.0, 4.0, 9.0]])
    expected = torch.tensor([[2.5, 4.0], [5.0, 2.5]])
    torch.testing.assert_close(example.by_class(values, torch.tensor([0, 0, 1, 1])), expected)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(example.by_class(values[order][:, order], torch.tensor([1, 0, 1, 0])), expected)


def test_even_attention_is_one(example, monkeypatch):
    monkeypatch.setattr(example, "CLASSES", 3)
    labels = torch.tensor([2, 0, 1, 0, 2, 1])
    torch.testing.assert_close(example.by_class(torch.full((6, 6), 1 / 6) * 6, labels), torch.ones(3, 3))


class NoMixing(nn.Module):
    def mix(self, features):
        return features.tanh()


def test_gradients_stay_with_their_samples_if_these_do_not_look_at_each_other(example):
    classifier = fastbf.SharedClassifier(8, 3, dtype=torch.float64)
    features, labels = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    shares = example.gradient_shares(NoMixing(), classifier, features, labels)
    torch.testing.assert_close(shares, torch.eye(5, dtype=torch.float64))


def test_gradient_shares_are_those_of_the_jacobian(example):
    former = fastbf.BatchFormer(8, dtype=torch.float64).eval()
    classifier = fastbf.SharedClassifier(8, 3, class_counts=[5, 2, 1], dtype=torch.float64)
    features, labels = torch.randn(5, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    prior = torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64).log()

    def losses(x):
        return nn.functional.cross_entropy(classifier(former.mix(x)) + prior, labels, reduction="none")

    norms = torch.autograd.functional.jacobian(losses, features).norm(dim=2)  # (losses, samples)
    expected = norms / norms.sum(0)
    shares = example.gradient_shares(former, classifier, features, labels)
    torch.testing.assert_close(shares, expected)
    assert (shares.diagonal() < 1).all()


@pytest.mark.parametrize("seed", [0, 3])
def test_digits_are_those_of_the_ranks(example, seed):
    _, (images, ranks) = example.load("mnist", example.IMBALANCE, seed, CPU)
    known, labels = example.DATA["mnist"].load()
    nearest = torch.cdist(images.flatten(1), known.flatten(1)).argmin(1)
    assert (labels[nearest].numpy() == example.digits(seed)[ranks]).all()


def test_maps_by_digit(example):
    names = np.stack([example.digits(seed) for seed in range(3)])
    by_rank = 10 * names[:, :, None] + names[:, None]  # attending and attended digit
    expected = np.arange(100).reshape(10, 10)
    assert (example.by_digit(by_rank) == expected).all()


def test_report(example):
    random = np.random.default_rng(0)
    attention = 1 + 0.01 * random.standard_normal((6, 2, 10, 10))
    gradient = 0.001 * random.standard_normal((6, 2, 10, 10))
    attention[:, 1, 6:, :3] += 0.5
    gradient[:, 1, 8, 1] = 30
    lines = {line[2:30].strip(): line for line in example.report(attention, gradient)}
    assert lines["few-shot to many-shot"].endswith("  more")
    assert 48 < float(lines["few-shot to many-shot"].split()[-4]) < 52
    assert lines["from other samples"].endswith("+3.0 ± 0.0  more")
    assert lines["at many-shot, from few-shot"].endswith("+10.0 ± 0.0  more")
    assert lines["at few-shot, from many-shot"].endswith("0.0 ± 0.0  no clear change")


def test_sources_add_up(example):
    gradient = np.zeros((2, 10, 10))
    gradient[:, 9, :3] = [[10], [30]]  # at the many-shot classes, from the rarest
    gradient[:, 4, 9] = 8  # at the rarest, one of four few-shot classes, from a medium one
    shares = example.sources(gradient)
    np.testing.assert_allclose(sum(shares.values()), 100)
    np.testing.assert_allclose(shares["others', few-shot"], [20, 0, 0])
    np.testing.assert_allclose(shares["others', medium-shot"], [0, 0, 2])
    np.testing.assert_allclose(shares["its own"], [80, 100, 98])


def test_maps_of_one_seed(example):
    found = example.relate(0, CPU, example.Settings("mnist", 1))
    assert found.attention.shape == found.gradient.shape == (2, 10, 10)
    received = found.gradient.sum(1)
    assert (received > 0).all()
    assert (received < 100).all()
    assert (found.attention[0] != found.attention[1]).any()  # it was trained
