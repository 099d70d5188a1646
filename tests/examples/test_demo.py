"""The demo: its data, its groups of classes, and its quick form, run as a user runs it."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.examples.running import EXAMPLES, imported, run_quick

CPU = torch.device("cpu")


@pytest.fixture
def demo(monkeypatch):
    return imported("long_tailed", monkeypatch)


def test_quick(tmp_path):
    lines = run_quick("long_tailed", tmp_path)
    assert lines[2].startswith("backend of BatchFormer  torch: ")
    for group in ("all (300 to 3)", "many (300 to 108)", "medium (65 to 23)", "few (14 to 3)"):
        rows = [line for line in lines if line.strip().startswith(group)]
        assert len(rows) == 2
        assert all(row.endswith("too few seeds for a verdict") for row in rows)
        assert all(len(row) <= 100 for row in rows)
    balanced = [line for line in lines if line.strip().startswith("all (")][1]
    assert float(balanced[30:].split()[0]) > 20  # it learns: chance is 10
    assert any("iNaturalist 2018" in line and "few +2.6" in line for line in lines)
    assert any("the same 2000 test predictions" in line for line in lines)
    assert (tmp_path / "long_tailed_mnist.png").stat().st_size > 10_000


def test_one_seed_is_refused(tmp_path):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "long_tailed.py", "--seeds", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "--seeds must be at least 2" in result.stderr


@pytest.mark.parametrize("data", ["mnist", "glyphs"])
def test_long_tailed_data(demo, data):
    """As many training images as the counts say, the same test images of each class, no image in both."""
    (train, labels), (test, test_labels) = demo.load(data, 100, 0, CPU)
    counts = demo.class_counts(data, 100)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 100 * max(counts[-1], 1)
    assert labels.bincount().tolist() == counts
    assert test_labels.bincount().tolist() == [demo.DATA[data].test] * demo.DATA[data].classes
    assert train.shape[1:] == test.shape[1:] == (1, 28, 28)
    assert 0 <= train.min() < train.max() <= 1
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in test}
    assert not torch.equal(train, demo.load(data, 100, 1, CPU)[0][0])


def test_groups_are_the_papers(demo):
    counts = [500, 101, 100, 20, 19, 1]
    masks = {name: mask.tolist() for name, mask in demo.groups(counts).items()}
    assert masks["many"] == [True, True, False, False, False, False]
    assert masks["medium"] == [False, False, True, True, False, False]
    assert masks["few"] == [False, False, False, False, True, True]
    assert list(demo.groups([300, 300])) == ["all", "many"]
    accuracies = np.arange(12.0).reshape(2, 6)
    rows = demo.by_group({False: accuracies, True: accuracies + 1}, counts)
    assert rows["few"][0].tolist() == [4.5, 10.5]
    assert rows["few"][1].tolist() == [5.5, 11.5]


def test_frozen_features_are_not_trained_twice(demo):
    """In decoupled training both arms have the features of plain cross-entropy."""
    settings = demo.Settings("mnist", 2)
    runs = [(demo.CROSS_ENTROPY, False), (demo.FROZEN, False), (demo.FROZEN, True)]
    nets = [demo.train(demo.Run(10000, loss, arm, 0), CPU, settings).model.backbone.state_dict() for loss, arm in runs]
    for net in nets[1:]:
        assert all(torch.equal(net[name], value) for name, value in nets[0].items())


def test_published_means_lie_between_their_groups(published):
    """A misprint shows: means over groups of classes lie between the groups."""
    for accuracy in published.LONG_TAILED.values():
        for arm in (0, 1):
            parts = [accuracy[name][arm] for name in ("many", "medium", "few")]
            assert min(parts) < accuracy["all"][arm] < max(parts)


@pytest.fixture
def published(monkeypatch):
    return imported("published", monkeypatch)
