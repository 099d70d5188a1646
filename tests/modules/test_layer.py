"""BatchFormerLayer against nn.TransformerEncoderLayer, whose place it takes."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbf
from fastbf import functional
from tests import paper
from tests.exact import layer_masks


def pair(width=24, heads=4, feedforward=40, dropout=0.0, **options):
    theirs = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, dtype=torch.float64, **options)
    ours = fastbf.BatchFormerLayer(width, heads, feedforward, dropout, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_same(ours, theirs, x, **call):
    a, b = ours(x, **call), theirs(x, **call)
    torch.testing.assert_close(a, b)
    grad = torch.randn_like(b)
    actual = torch.autograd.grad(a, [x, *ours.parameters()], grad)
    expected = torch.autograd.grad(b, [x, *theirs.parameters()], grad)
    for g, h in zip(actual, expected, strict=True):
        torch.testing.assert_close(g, h)


def features(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.relu, F.gelu, nn.ReLU(), nn.GELU()])
@pytest.mark.parametrize("bias", [True, False])
def test_same_results_without_dropout(heads, norm_first, activation, bias):
    ours, theirs = pair(heads=heads, norm_first=norm_first, activation=activation, bias=bias)
    assert ours.parent_reason() is None
    assert_same(ours, theirs, features(17, 24))


@pytest.mark.parametrize("shape", [(17, 24), (17, 3, 24), (1, 24), (1, 1, 24), (2, 50, 24)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_every_shape_and_mode(shape, batch_first, training):
    ours, theirs = pair(batch_first=batch_first)
    assert_same(ours.train(training), theirs.train(training), features(*shape))


@pytest.mark.parametrize("shape", [(0, 24), (0, 1, 24), (0, 3, 24)])
def test_no_samples_as_the_parent(shape):
    ours, theirs = pair(dropout=0.5)
    assert ours(features(*shape)).shape == theirs(features(*shape)).shape == shape


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("n", [6, 130])
def test_same_results_with_the_same_masks(norm_first, n, monkeypatch):
    ours, theirs = pair(dropout=0.5, feedforward=24, norm_first=norm_first)
    x, seed = features(n, 24), torch.tensor([5])
    monkeypatch.setattr(functional, "_as_seed", lambda *_: seed)
    mixed = ours(x)
    paper.set_masks(theirs, layer_masks(x, 4, 24, seed, 0.5), monkeypatch)
    expected = theirs(x.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(mixed, expected)
    grad = torch.randn_like(mixed)
    actual = torch.autograd.grad(mixed, [x, *ours.parameters()], grad)
    for g, h in zip(actual, torch.autograd.grad(expected, [x, *theirs.parameters()], grad), strict=True):
        torch.testing.assert_close(g, h)


def test_dropout_differs_between_sites_and_calls():
    ours, _ = pair(dropout=0.5, feedforward=24)
    x = features(16, 24)
    assert not torch.equal(ours(x), ours(x))
    masks = layer_masks(x, 4, 24, torch.tensor([5]), 0.5)[1:]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


def test_masks_fall_back_to_the_parent():
    ours, theirs = pair()
    mask = torch.zeros(17, 17, dtype=torch.bool).fill_diagonal_(True)
    assert_same(ours, theirs, features(17, 24), src_mask=mask)
    padding = torch.zeros(3, 17, dtype=torch.bool)
    padding[1, 9:] = True
    assert_same(ours, theirs, features(17, 3, 24), src_key_padding_mask=padding)
    causal = nn.Transformer.generate_square_subsequent_mask(17, dtype=torch.float64)
    assert_same(ours, theirs, features(17, 24), src_mask=causal, is_causal=True)


def test_what_the_fused_layer_does_not_cover_falls_back():
    x = features(17, 24)
    assert_same(*pair(activation=torch.tanh), x)
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.linear1.register_forward_hook(lambda m, args, out: out * 2)
    assert "hooks" in ours.parent_reason()
    assert_same(ours, theirs, x)
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.dropout1 = nn.Identity()
    assert "replaced" in ours.parent_reason()
    assert_same(ours, theirs, x)

    class Attention(nn.Module):
        batch_first = False

        def forward(self, q, k, v, **_):
            return q + 1, None

    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.self_attn = Attention()
    torch.testing.assert_close(ours(x), theirs(x))
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda m, args, out: out * 2)
    assert_same(*pair(activation=hooked), x)

    class Leaky(nn.ReLU):
        def forward(self, x):
            return F.leaky_relu(x)

    assert_same(*pair(activation=Leaky()), x)
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.linear2.forward = lambda x: x[..., :24] * 3
    assert "forward of its own" in ours.parent_reason()
    torch.testing.assert_close(ours(x), theirs(x))
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.self_attn.add_zero_attn = True
    assert "extra keys" in ours.parent_reason()
    assert_same(ours, theirs, x)
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.norm1 = nn.LayerNorm(24, elementwise_affine=False)
    assert_same(ours, theirs, x)
    ours, _ = pair()
    ours.dropout2.p = 0.3
    assert "rates" in ours.parent_reason()
    ours, _ = pair()
    ours.dropout2.eval()
    assert "mode" in ours.parent_reason()
    ours, _ = pair()
    ours.norm2.eps = 1e-3
    assert "eps" in ours.parent_reason()


def test_state_dict_goes_both_ways():
    ours, theirs = pair()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(fastbf.BatchFormerLayer(24, 4, 40).double().state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours, theirs, features(5, 24))


def test_same_initialisation():
    torch.manual_seed(3)
    theirs = nn.TransformerEncoderLayer(24, 4, 40)
    torch.manual_seed(3)
    ours = fastbf.BatchFormerLayer(24, 4, 40)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_stacks(batch_first, training):
    ours, theirs = (nn.TransformerEncoder(layer, 3) for layer in pair(batch_first=batch_first))
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours.train(training), theirs.train(training), features(17, 3, 24))


def test_inference_without_gradients():
    ours, theirs = pair(batch_first=True)
    x = torch.randn(2, 17, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
        assert ours.train()(x).shape == x.shape


def test_copies_and_pickles():
    ours, theirs = pair()
    x = features(5, 24)
    assert_same(copy.deepcopy(ours), theirs, x)
    assert_same(pickle.loads(pickle.dumps(ours)), theirs, x)


def test_hooks_on_the_layer_run():
    ours, _ = pair()
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    ours(features(3, 24))
    assert calls == [1]


def test_frozen_parameters_get_no_gradient():
    ours, theirs = pair()
    for layer in (ours, theirs):
        layer.linear1.weight.requires_grad_(False)
        layer.self_attn.in_proj_bias.requires_grad_(False)
        layer.norm2.requires_grad_(False)
    x = features(9, 24)
    ours(x).square().sum().backward()
    gradient, x.grad = x.grad, None
    theirs(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_full_dropout_leaves_the_residual():
    ours, _ = pair(dropout=1.0)
    x = features(7, 24)
    twice = F.layer_norm(F.layer_norm(x, (24,)), (24,))
    torch.testing.assert_close(ours(x), twice)
    assert ours(x).sum().isfinite()


def half_attention(kind):
    def block(self, x, *args, **kwargs):
        return 0.5 * kind._sa_block(self, x, *args, **kwargs)

    return type("Own", (kind,), {"_sa_block": block})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["subclass", "instance", "before convert", "patched class"])
def test_overridden_internals_act(where, training, monkeypatch):
    ours, theirs = pair()
    if where == "subclass":
        ours.__class__, theirs.__class__ = (half_attention(type(layer)) for layer in (ours, theirs))
    elif where == "patched class":
        forward = nn.MultiheadAttention.forward
        monkeypatch.setattr(
            nn.MultiheadAttention,
            "forward",
            lambda self, *args, **kwargs: (forward(self, *args, **kwargs)[0] / 2, None),
        )
    else:
        if where == "before convert":
            ours = copy.deepcopy(theirs)
        for layer in (ours, theirs):
            layer._ff_block = lambda x: torch.sin(x)
        assert fastbf.convert(ours) == (where == "before convert")
    assert "of its own" in ours.parent_reason()
    x = features(5, 24)
    torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x))
    former = fastbf.BatchFormer(24, dtype=torch.float64)
    former.layers[0] = ours.train()
    torch.testing.assert_close(former(x), torch.cat([x, theirs(x)]))


@pytest.mark.parametrize("training", [True, False])
def test_norms_that_are_not_of_the_channels_alone(training):
    x = features(5, 1, 24)
    for change in (
        lambda layer: setattr(layer.norm1, "weight", None),
        lambda layer: setattr(layer, "norm2", nn.LayerNorm((1, 24), dtype=torch.float64)),
    ):
        ours, theirs = pair()
        for layer in (ours, theirs):
            change(layer.train(training))
        assert "norm of the layer" in ours.parent_reason()
        with torch.enable_grad():
            torch.testing.assert_close(ours.train()(x), theirs.train()(x))
