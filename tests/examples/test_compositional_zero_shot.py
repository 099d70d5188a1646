"""The compositional zero-shot example: its metrics on cases counted by hand, and its quick form, run as a user does."""

import numpy as np
import pytest
import torch

from tests.examples.running import imported, run_quick


@pytest.fixture
def example(monkeypatch):
    return imported("compositional_zero_shot", monkeypatch)


# Pairs 0 and 1 are seen, 2 and 3 are not. Margin: best seen score minus best unseen score.
UNSEEN = np.array([False, False, True, True])
SCORES = np.array(
    [
        [5.0, 0.0, 1.0, 0.0],  # pair 0: right while the bias is below its margin, 4
        [1.0, 3.0, 1.0, 2.0],  # pair 1: below 1
        [0.0, 4.0, 0.0, 2.0],  # pair 0 taken for 1: never right; margin 2
        [3.0, 0.0, 2.5, 0.0],  # pair 2: right above 0.5
        [0.0, 6.0, 3.0, 1.0],  # pair 2: above 3
        [2.0, 0.0, 0.0, 3.0],  # pair 3: above -1, so without any bias as well
        [0.0, 1.0, 0.0, 1.0],  # pair 2 taken for 3: never right; margin 0
    ]
)
LABELS = np.array([0, 1, 0, 2, 2, 3, 2])


def test_curve_by_hand(example):
    curve = example.seen_unseen_curve(SCORES, LABELS, UNSEEN)
    # At the margins -1, 0, 0.5, 1, 2, 3, 4 (a sample goes over just above its own) and at +inf; of 3 and of 4 samples.
    np.testing.assert_allclose(curve.seen, np.array([2, 2, 2, 2, 1, 1, 1, 0]) * 100 / 3)
    np.testing.assert_allclose(curve.unseen, np.array([0, 1, 1, 2, 2, 2, 3, 3]) * 100 / 4)


def test_metrics_by_hand(example):
    metrics = example.seen_unseen_curve(SCORES, LABELS, UNSEEN).metrics()
    assert metrics["seen"] == pytest.approx(200 / 3)
    assert metrics["unseen"] == pytest.approx(75)
    # Seen 2/3 and unseen 1/2 at bias 1: 2 · (2/3 · 1/2) / (2/3 + 1/2) = 4/7.
    assert metrics["harmonic mean"] == pytest.approx(400 / 7)
    # 1/2 wide at 2/3, 1/4 wide at 1/3.
    assert metrics["AUC"] == pytest.approx(100 * (1 / 2 * 2 / 3 + 1 / 4 * 1 / 3))


def test_area_below_a_diagonal(example):
    """A seen and an unseen sample of one margin change together: the curve is the straight line between both ends."""
    scores = np.array([[2.0, 1.0], [1.0, 0.0]])
    metrics = example.seen_unseen_curve(scores, np.array([0, 1]), np.array([False, True])).metrics()
    assert metrics == pytest.approx({"seen": 100, "unseen": 100, "harmonic mean": 0, "AUC": 50})


def test_curve_is_that_of_a_plain_sweep(example):
    random = np.random.default_rng(0)
    unseen, labels = random.random(12) < 0.4, random.integers(0, 12, 200)
    scores = random.normal(size=(200, 12)) + 2 * np.eye(12)[labels] - 1.5 * unseen
    curve = example.seen_unseen_curve(scores, labels, unseen)
    for bias in (-100.0, -1.0, 0.0, 0.7, 1.5, 3.0, 100.0):
        right = (scores + bias * unseen).argmax(1) == labels
        pair = 100 * right[~unseen[labels]].mean(), 100 * right[unseen[labels]].mean()
        assert min(np.hypot(curve.seen - pair[0], curve.unseen - pair[1])) < 1e-9


@pytest.mark.parametrize(("data", "held", "by_object"), [("digits", 3, {1, 2, 3}), ("glyphs", 5, {2, 3, 4})])
def test_unseen_pairs(example, data, held, by_object):
    """Every attribute and every object is seen in most of its pairs; no training image shows a pair held out."""
    random, data = np.random.default_rng(3), example.DATA[data]
    unseen = example.unseen_pairs(random, data.shape)
    grid = unseen.reshape(data.shape)
    assert (grid.sum(0) == held).all()
    assert set(grid.sum(1)) <= by_object
    (images, pairs), (test_images, test_pairs) = example.load(data, random, unseen)
    assert not unseen[pairs].any()
    assert np.bincount(test_pairs).tolist() == [20] * len(unseen)
    assert len(images) == len(pairs) == 10 * sum(~unseen)
    assert images.shape[1:] == test_images.shape[1:]
    assert len(test_images) == 20 * len(unseen)
    assert not {x.numpy().tobytes() for x in images} & {x.numpy().tobytes() for x in test_images}


def test_pairs_show_what_their_number_says(example):
    """The thick zero of pair 4 has more ink than the plain one, and a pair of the next digit has another digit."""
    data = example.DATA["digits"]
    train, _ = data.load(np.random.default_rng(0))
    ink = train.mean((1, 2, 3)).reshape(data.shape)
    names = list(data.attributes)
    assert (ink[:, names.index("thick")] > ink[:, names.index("plain")]).all()
    assert (ink[:, names.index("faint")] < ink[:, names.index("plain")]).all()
    assert (ink[:, names.index("inverted")] > 0.5).all()


def test_gradient_reaches_the_embeddings(example):
    model = example.Net(example.DATA["digits"], True)
    seen = torch.tensor([0, 9, 18])
    loss = model.loss(torch.rand(6, 1, 12, 12), torch.tensor([0, 1, 2, 0, 1, 2]), seen)
    loss.backward()
    moved = model.objects.weight.grad.norm(dim=1) > 0
    assert moved.tolist() == [True, True, True] + [False] * 7  # the digits of the seen pairs, no others
    assert model.batchformer.layers[0].linear1.weight.grad.abs().sum() > 0


def test_quick(tmp_path):
    lines = run_quick("compositional_zero_shot", tmp_path)
    rows = {}
    for name in ("seen", "unseen", "harmonic mean", "AUC"):
        (row,) = [line for line in lines if line.startswith(f"  {name}  ")]
        assert row.endswith("too few seeds for a verdict")
        rows[name] = [float(row[30:].split()[i]) for i in (0, 3)]  # without, with
    assert min(rows["seen"]) > 30  # it learns: chance is 1.8, one pair of 56
    assert min(rows["unseen"]) > 12.5  # and composes what it learned: chance is 4.2, one pair of 24
    assert (tmp_path / "compositional_zero_shot_digits.png").stat().st_size > 10_000
