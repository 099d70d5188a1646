"""The domain generalization example: its data and loss, and its quick form, run as a user runs it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

import fastbf
from tests.examples.running import imported, run_quick


@pytest.fixture
def example(monkeypatch):
    return imported("domain_generalization", monkeypatch)


def test_domains(example):
    """As many images in each, no digit twice, each rotated by the angle of its domain."""
    images, labels = example.rotated_digits(0)
    assert images.shape == (6, 299, 1, 10, 10)
    assert labels.shape == (6, 299)
    assert (images >= 0).all()
    assert (images <= 1 + 1e-6).all()
    dealt = np.random.default_rng(0).permutation(1797)[: 6 * 299].reshape(6, 299)
    source = np.pad(example.load_digits().images[dealt[4, 7]] / 16, 1)
    expected = ndimage.rotate(source, 60, reshape=False, order=1)
    other = ndimage.rotate(source, -60, reshape=False, order=1)
    for turned, same in ((expected, True), (other, False)):
        assert np.allclose(images[4, 7, 0].numpy(), turned, atol=1e-6) == same
    assert not torch.equal(example.rotated_digits(1)[1], labels)


def test_families_of_fonts(example):
    """Five families, no font in two of them, as many images of each character in each."""
    images, labels = example.families_of_fonts(0)
    assert images.shape == (5, 490, 1, 14, 14)
    assert all((row.bincount() == 10).all() for row in labels)
    fonts = [font for family in example.FAMILIES for font in example.members(family)]
    assert sorted(fonts) == list(range(len(example.glyphs.FONTS)))
    assert {example.glyphs.FONTS[i] for i in example.members("sans")} == {
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    }  # fmt: skip
    assert not torch.equal(images, example.families_of_fonts(1)[0])


def test_both_arms_begin_alike(example):
    nets = []
    for arm in (False, True):
        torch.manual_seed(0)
        nets.append(example.Net(10, 10, arm))
    plain, mixed = nets
    images, labels = torch.rand(8, 1, 10, 10), torch.arange(8)
    assert torch.equal(plain(images), mixed.eval()(images))
    assert torch.equal(plain.loss(images, labels), mixed.loss(images, labels))  # in evaluation nothing is mixed
    forked = mixed.train().batchformer(mixed.backbone(images))
    assert forked.shape == (16, example.CHANNELS)
    torch.manual_seed(1)
    loss = mixed.loss(images, labels)
    torch.manual_seed(1)
    logits = mixed.classifier(mixed.batchformer(mixed.backbone(images)))
    torch.testing.assert_close(loss, (F.cross_entropy(logits[:8], labels) + F.cross_entropy(logits[8:], labels)) / 2)


def test_stripped_net_predicts_the_same(example):
    net = example.Net(10, 10, True).eval()
    images = torch.rand(8, 1, 10, 10)
    before = net(images)
    assert torch.equal(fastbf.strip(net)(images), before)
    assert not any(isinstance(m, fastbf.BatchFormer) for m in net.modules())


def test_quick(tmp_path):
    lines = run_quick("domain_generalization", tmp_path)
    for name in (*(f"{angle} degrees" for angle in (0, 15, 30, 45, 60, 75)), "mean of all"):
        (row,) = [line for line in lines if line.startswith(f"  {name}  ")]
        assert row.endswith("too few seeds for a verdict")
        if name == "mean of all":
            assert min(float(row[30:].split()[i]) for i in (0, 3)) > 30  # both arms learn: chance is 10
    assert (tmp_path / "domain_generalization_digits.png").stat().st_size > 10_000
