"""The elementwise ops and the layer as functions."""

import pytest
import torch
import torch.nn.functional as F

import fastbf
from fastbf import functional
from fastbf.dropout import Dropout, Site, elementwise_mask
from tests.memory import PeakMemory

SEED = torch.tensor([3])


def features(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def mask(p, site, x):
    return elementwise_mask(Dropout(p, SEED, x.dtype), site, x) if p else 1.0


@pytest.mark.parametrize("shape", [(5, 16), (5, 3, 16), (5, 2, 3, 16)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_dropout_add_layer_norm(shape, p, bias):
    x, residual, weight = features(*shape), features(*shape), features(16)
    b = features(16) if bias else None
    out = functional.dropout_add_layer_norm(x, residual, weight, b, dropout_p=p, eps=1e-3, seed=SEED)
    expected = F.layer_norm(residual + x * mask(p, Site.ATTENTION_OUTPUT, x), (16,), weight, b, 1e-3)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_activation_dropout(activation, p):
    x = features(5, 3, 40)
    out = functional.activation_dropout(x, activation, dropout_p=p, seed=SEED)
    torch.testing.assert_close(out, getattr(F, activation)(x) * mask(p, Site.ACTIVATION, x))


def test_positions_drop_independently():
    x = torch.ones(4, 3, 64, dtype=torch.float64)
    out = functional.activation_dropout(x, "relu", dropout_p=0.5, seed=SEED)
    assert not torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out[:, :1], functional.activation_dropout(x[:, :1], "relu", dropout_p=0.5, seed=SEED))


def test_encoder_layer_is_the_modules():
    layer = fastbf.BatchFormerLayer(16, 4, 24, 0.0, dtype=torch.float64)
    x = features(7, 3, 16)
    torch.testing.assert_close(functional.encoder_layer(x, *layer._weights(), num_heads=4), layer(x))


def test_drawing_for_few_samples_at_many_positions_takes_little_memory():
    q = torch.randn(2, 4000, 8, 4)
    with PeakMemory() as memory:
        functional.batch_attention(q, q, q, dropout_p=0.5)
    assert memory.peak < 100 * 2**20
