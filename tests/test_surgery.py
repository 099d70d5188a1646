"""convert and strip."""

import pytest
import torch
from torch import nn

import fastbf


class Net(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.backbone = nn.Linear(6, 16)
        self.former = fastbf.BatchFormer(16, dropout=dropout)
        self.tail = nn.Sequential(nn.ReLU(), fastbf.BatchFormer(16, forked=True, num_layers=2))
        self.classifier = fastbf.SharedClassifier(16, 3)

    def forward(self, x, *targets):
        out = self.former(self.backbone(x), *targets)
        if targets:
            return self.classifier(self.tail(out[0])), *out[1:]
        return self.classifier(self.tail(out))


def test_strip_leaves_the_evaluation_output():
    net = Net().eval()
    x, y = torch.randn(4, 6), torch.arange(4)
    before, labels = net(x, y)
    assert fastbf.strip(net) is net
    after, same = net(x, y)
    assert torch.equal(before, after)
    assert labels is same is y
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"backbone", "classifier"}
    assert not any(isinstance(m, fastbf.BatchFormer | fastbf.BatchFormerLayer) for m in net.modules())
    assert torch.equal(net.train()(x), after)


def test_strip_of_a_batchformer_itself():
    stripped = fastbf.strip(fastbf.BatchFormer(16).eval())
    x = torch.randn(3, 16)
    assert stripped(x) is x
    assert not list(stripped.parameters())
    assert not stripped.training


def test_strip_of_modules_with_several_names_or_inside_others():
    inner, outer = fastbf.BatchFormer(16), fastbf.BatchFormer(16)
    outer.register_module("inner", inner)
    shared = nn.Sequential(inner)
    net = nn.ModuleDict({"a": shared, "b": shared, "c": inner, "outer": outer})
    fastbf.strip(net)
    assert not any(isinstance(m, fastbf.BatchFormer) for m in net.modules())
    assert net["a"] is net["b"]
    assert not list(net["outer"].children())


def test_stripped_models_export_and_trace():
    net, x = fastbf.strip(Net().eval()), torch.randn(4, 6)
    expected = net(x)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(net, x)(x), expected)


def test_convert_keeps_parameters_results_and_optimizers():
    net = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 16, 0.0), 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.randn(5, 1, 16)
    before, parameters = net(x), list(net.parameters())
    assert fastbf.convert(net) == 2
    assert fastbf.convert(net) == 0
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert all(isinstance(layer, fastbf.BatchFormerLayer) for layer in net[1].layers)
    torch.testing.assert_close(net(x), before)
    net(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net(x), before)


def test_convert_of_a_layer_itself_keeps_hooks():
    layer = nn.TransformerEncoderLayer(16, 4)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    assert fastbf.convert(layer) == 1
    layer(torch.randn(5, 16))
    assert isinstance(layer, fastbf.BatchFormerLayer)
    assert calls == [1]


def test_convert_leaves_subclasses_alone():
    class Own(nn.TransformerEncoderLayer):
        pass

    assert fastbf.convert(nn.Sequential(Own(16, 4), fastbf.BatchFormerLayer(16, 4))) == 0


class TransformerEncoderLayer(nn.Module):
    """As facebookresearch/detr has it: the class of torch in name alone."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(16, 4)
        self.linear1, self.linear2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)


class Block(TransformerEncoderLayer):
    """An encoder layer by its parts."""


class OwnLayer(nn.TransformerEncoderLayer):
    pass


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [TransformerEncoderLayer] * 2,
            r"left alone: 2 \S+\.TransformerEncoderLayer, which does not inherit from it\.",
        ),
        ([Block], r"left alone: 1 \S+\.Block, which does not inherit"),
        ([lambda: OwnLayer(16, 4)], r"1 \S+\.OwnLayer, which inherits from it and may do something else\."),
        ([Block, lambda: OwnLayer(16, 4), Block], r"2 \S+\.Block, .*; 1 \S+\.OwnLayer, which inherits"),
    ],
)
def test_convert_names_the_encoder_layers_that_it_leaves(layers, message):
    with pytest.warns(UserWarning, match=f"convert found no torch.nn.TransformerEncoderLayer. .*{message}"):
        assert fastbf.convert(nn.Sequential(*[layer() for layer in layers])) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("others", "count"),
    [
        ([lambda: nn.TransformerEncoderLayer(16, 4)], 1),
        ([lambda: fastbf.BatchFormerLayer(16, 4)], 0),
        ([lambda: fastbf.BatchFormer(16)], 0),
    ],
)
def test_convert_is_silent_beside_layers_that_it_knows(others, count):
    assert fastbf.convert(nn.Sequential(Block(), OwnLayer(16, 4), *[other() for other in others])) == count


def test_convert_says_what_it_looks_for_where_nothing_resembles_it():
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4), 1)
    net = nn.Sequential(nn.Conv2d(1, 1, 1), decoder, nn.MultiheadAttention(16, 4), nn.LSTM(1, 1))
    message = (
        r"no torch\.nn\.TransformerEncoderLayer in Sequential, and nothing like one\. .* gets a fastbf\.BatchFormer"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        assert fastbf.convert(net) == 0
    assert warned[0].filename == __file__


def test_strip_of_a_converted_model_says_that_its_layers_stay():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4), 2, enable_nested_tensor=False)
    fastbf.convert(model)
    message = "no BatchFormer in TransformerEncoder .* BatchFormerLayer, of which it has 2, .* at test time, too"
    with pytest.warns(UserWarning, match=message) as warned:
        assert fastbf.strip(model) is model
    assert warned[0].filename == __file__
    assert sum(isinstance(m, fastbf.BatchFormerLayer) for m in model.modules()) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plain", [False, True])
def test_strip_is_silent_where_it_did_its_work_or_there_is_none(plain):
    layer = fastbf.BatchFormerLayer(16, 4)
    net = nn.Sequential(fastbf.BatchFormer(16), layer, fastbf.SharedClassifier(16, 3))
    for _ in range(1 if plain else 2):
        fastbf.strip(net, plain=plain)
    assert (type(layer) is fastbf.BatchFormerLayer) != plain
    fastbf.strip(nn.Sequential(layer), plain=True)
    fastbf.strip(nn.Linear(2, 2), plain=plain)  # the other arm of a comparison


@pytest.mark.parametrize("function", [fastbf.convert, fastbf.strip])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got int"):
        function(3)
