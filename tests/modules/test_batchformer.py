"""BatchFormer: layouts, forks, targets, depth, dropout."""

import inspect

import pytest
import torch
from torch import nn

import fastbf

LAYOUTS = [  # shape, batch_dim, channel_dim
    ((5, 16), 0, -1),
    ((16, 5), 1, 0),
    ((5, 9, 16), 0, -1),
    ((9, 5, 16), 1, -1),
    ((5, 16, 3, 4), 0, 1),
    ((3, 16, 4, 5), -1, 1),
    ((3, 4, 5, 2, 16), 2, 4),
]


def former(**options):
    return fastbf.BatchFormer(16, dropout=options.pop("dropout", 0.0), dtype=torch.float64, **options)


def per_position(layers, x):
    """(N, L, C): every position on its own, as the paper's code does it for one."""
    for layer in layers:
        x = torch.stack([layer(x[:, i]) for i in range(x.shape[1])], dim=1)
    return x


@pytest.mark.parametrize(("shape", "batch_dim", "channel_dim"), LAYOUTS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_layout(shape, batch_dim, channel_dim, num_layers):
    module = former(batch_dim=batch_dim, channel_dim=channel_dim, num_layers=num_layers)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    canonical = x.movedim((batch_dim, channel_dim), (0, -1)).reshape(5, -1, 16)
    expected = per_position(module.layers, canonical)
    out = module(x)
    assert out.shape[batch_dim] == 10
    plain, mixed = out.chunk(2, dim=batch_dim)
    assert torch.equal(plain, x)
    actual = mixed.movedim((batch_dim, channel_dim), (0, -1)).reshape(5, -1, 16)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(module.mix(x), mixed)
    grad = torch.randn_like(mixed)
    reordered = grad.movedim((batch_dim, channel_dim), (0, -1)).reshape(5, -1, 16)
    torch.testing.assert_close(torch.autograd.grad(mixed, x, grad)[0], torch.autograd.grad(expected, x, reordered)[0])
    assert module.eval()(x) is x


@pytest.mark.parametrize(("shape", "batch_dim", "channel_dim"), LAYOUTS)
def test_attention_map(shape, batch_dim, channel_dim):
    module = former(batch_dim=batch_dim, channel_dim=channel_dim, num_layers=2, dropout=0.5, num_heads=2)
    x = torch.randn(shape, dtype=torch.float64)
    weights = module.attention_map(x)
    positions = [s for i, s in enumerate(shape) if i not in (batch_dim % len(shape), channel_dim % len(shape))]
    assert weights.shape == (*positions, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.equal(weights, module.attention_map(x))


def test_forked_chain_mixes_the_second_half_only():
    first, second = former(), former(forked=True)
    x = torch.randn(5, 9, 16, dtype=torch.float64)
    y = torch.arange(5)
    forked, labels = first(x, y)
    out, same = second(forked, labels)
    assert same is labels
    assert out.shape == (10, 9, 16)
    assert torch.equal(out[:5], x)
    torch.testing.assert_close(out[5:], second.mix(forked[5:]))
    assert second.eval()(x) is x


def test_forked_along_another_dimension():
    module = former(forked=True, batch_dim=1)
    x = torch.randn(9, 10, 16, dtype=torch.float64)
    out = module(x)
    assert torch.equal(out[:, :5], x[:, :5])
    torch.testing.assert_close(out[:, 5:], module.mix(x[:, 5:]))


def test_targets_are_repeated():
    x = torch.randn(3, 16, dtype=torch.float64)
    labels, boxes, names = torch.tensor([4, 5, 6]), [{"id": i} for i in range(3)], ("a", "b", "c")
    _, twice, boxes2, names2 = former()(x, labels, boxes, names)
    assert twice.tolist() == [4, 5, 6, 4, 5, 6]
    assert boxes2 == boxes * 2
    assert names2 == names * 2
    assert len(boxes) == 3


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("n", [1, 2, 33])
def test_every_dropout_rate_trains(p, n):
    module = former(dropout=p)
    x = torch.randn(n, 16, dtype=torch.float64, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(w.grad.isfinite().all() for w in module.parameters())


@pytest.mark.parametrize("norm_first", [False, True])
def test_thirty_two_layers(norm_first):
    module = former(num_layers=32, dropout=0.5, norm_first=norm_first)
    module(torch.randn(8, 16, dtype=torch.float64)).sum().backward()
    assert all(w.grad.isfinite().all() for w in module.parameters())


def test_options_reach_the_layers():
    module = fastbf.BatchFormer(
        16, 2, 40, 0.3, num_layers=2, activation="gelu", norm_first=True, layer_norm_eps=1e-3, bias=False
    )
    layer = module.layers[1]
    assert isinstance(layer, fastbf.BatchFormerLayer)
    assert (layer.self_attn.num_heads, layer.linear1.out_features, layer.dropout.p) == (2, 40, 0.3)
    assert layer.norm_first
    assert layer.norm1.eps == 1e-3
    assert layer.linear1.bias is None
    assert layer.parent_reason() is None
    assert fastbf.BatchFormer(16).layers[0].linear1.out_features == 16


def test_mix_in_evaluation_has_no_dropout():
    module = former(dropout=0.5).eval()
    x = torch.randn(6, 16, dtype=torch.float64)
    assert torch.equal(module.mix(x), module.mix(x))
    assert not torch.equal(module.mix(x), x)


def test_samples_do_learn_from_each_other_in_training_only():
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    mixed = former().mix(x)
    assert torch.autograd.grad(mixed[0].sum() + mixed[0].square().sum(), x)[0][1:].abs().max() > 0


def test_no_samples():
    out, labels = former(dropout=0.5)(torch.randn(0, 16, dtype=torch.float64), torch.zeros(0))
    assert out.shape == (0, 16)
    assert labels.shape == (0,)


def test_attention_map_of_layers_outside_the_fused_path():
    module = former(activation=torch.tanh, num_layers=3, dropout=0.5)
    module.layers[1].dropout2.eval()
    x = torch.randn(6, 16, dtype=torch.float64)
    assert torch.equal(module.attention_map(x), module.attention_map(x))
    assert module.layers[0].dropout2.training
    assert not module.layers[1].dropout2.training


def test_a_layer_that_is_listed_twice_runs_twice():
    former = fastbf.BatchFormer(32, num_layers=3, dropout=0.0)
    former.layers[1] = former.layers[0]
    x = torch.randn(6, 32)
    torch.testing.assert_close(former(x)[6:], former.mix(x))


class Scaled(fastbf.BatchFormer):
    def mix(self, features):
        return 3 * super().mix(features)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("own", ["subclass", "instance", "class"])
def test_an_overridden_mix_acts_in_training(own, forked, backend, monkeypatch):
    former = (Scaled if own == "subclass" else fastbf.BatchFormer)(32, dropout=0.0, forked=forked, backend=backend)
    x = torch.randn(6, 32)
    plain, stream = x.chunk(2) if forked else (x, x)
    if own == "instance":
        mix = former.mix
        former.mix = lambda features: 3 * mix(features)
    elif own == "class":
        mix = fastbf.BatchFormer.mix
        monkeypatch.setattr(fastbf.BatchFormer, "mix", lambda self, features: 3 * mix(self, features))
    torch.testing.assert_close(former(x), torch.cat([plain, 3 * former.layers[0](stream)]), rtol=1e-4, atol=1e-5)


@pytest.fixture
def _warnings_anew(monkeypatch):
    monkeypatch.setattr("fastbf.modules.batchformer._warned", set())


@pytest.mark.usefixtures("_warnings_anew")
@pytest.mark.parametrize("between", [lambda x: x, lambda x: x + 1])
def test_a_fork_of_a_fork_warns_once(between):
    first, second = fastbf.BatchFormer(32), fastbf.BatchFormer(32)
    x, y = first(torch.randn(4, 32), torch.arange(4))
    with pytest.warns(RuntimeWarning, match="forked again") as warned:
        _ = [second(between(x), y) for _ in range(2)]
    assert len(warned) == 1


@pytest.mark.usefixtures("_warnings_anew")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_warning_points_at_the_line_of_the_call(compiled):
    net = nn.Sequential(nn.Identity(), fastbf.BatchFormer(32))
    net = torch.compile(net, backend="eager", fullgraph=True) if compiled else net
    x = torch.randn(1, 2, 32)
    with pytest.warns(RuntimeWarning, match="one sample along batch_dim=0") as warned:
        net(x)
    line = inspect.currentframe().f_lineno - 1
    assert [(w.filename, w.lineno) for w in warned] == [(__file__, line)]


@pytest.mark.usefixtures("_warnings_anew")
@pytest.mark.filterwarnings("error")
def test_what_is_no_fork_of_a_fork_does_not_warn():
    first, again = fastbf.BatchFormer(32), fastbf.BatchFormer(32, forked=True)
    x, y = torch.randn(4, 32), torch.arange(4)
    again(*first(x, y))
    fastbf.BatchFormer(32)(x, y)
    fork, _ = first(x, y)
    first(fork[:4], y)
    first.eval()(fork, y)


@pytest.mark.usefixtures("_warnings_anew")
def test_a_replica_without_targets_warns_once():
    former, x = fastbf.BatchFormer(32), torch.randn(4, 32)
    replicas = [former._replicate_for_data_parallel() for _ in range(2)]
    replicas[0](x, torch.arange(4))
    with pytest.warns(RuntimeWarning, match="DataParallel gathers") as warned:
        _ = [replica(x) for replica in replicas]
    assert len(warned) == 1


def test_a_layer_that_has_the_batch_first_mixes_as_mix_does():
    former, x = fastbf.BatchFormer(32, dropout=0.0), torch.randn(4, 3, 32)
    former.layers[0].self_attn.batch_first = True
    torch.testing.assert_close(former(x)[4:], former.mix(x))
