"""Characters drawn from matplotlib's fonts: all there, all different, and what their distortion keeps."""

import pytest
import torch

from tests.examples.running import imported


@pytest.fixture
def glyphs(monkeypatch):
    return imported("glyphs", monkeypatch)


def test_every_character_of_every_font_is_drawn(glyphs):
    images = glyphs.draw()
    assert images.shape == (22, 49, 28, 28)
    assert len(set(glyphs.CHARACTERS)) == 49
    assert (images.amax((2, 3)) > 0.5).all()
    for font in images.flatten(2):
        assert torch.pdist(font).min() > 1  # no font shows one sign for two characters, as it does for those it lacks


def test_distortion(glyphs):
    sources = glyphs.draw()[:, 3]
    random = torch.Generator().manual_seed(0)
    views = glyphs.distort(sources, random)
    assert views.shape == (22, 1, 28, 28)
    assert 0 <= views.min() < views.max() <= 1
    assert not torch.equal(views, glyphs.distort(sources, random))
    assert torch.equal(views, glyphs.distort(sources, random.manual_seed(0)))


def test_load(glyphs):
    images, labels = glyphs.load()
    assert images.shape == (49 * 300, 1, 28, 28)
    assert labels.bincount().tolist() == [300] * 49
