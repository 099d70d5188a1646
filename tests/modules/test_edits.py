"""Layers that were edited give what PyTorch's layer gives after the same edits: drawn at random, on every road."""

import copy
import random
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune as pruning

import fastbf
from tests.triton_case import DEVICE

N, L, C = 5, 2, 16
PARTS = ("self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2")
WITH_WEIGHT = ("linear1", "linear2", "norm1", "norm2")


def hook(layer, draw):
    getattr(layer, draw.choice(PARTS)).register_forward_hook(
        lambda m, args, out: (out[0] * 1.5, *out[1:]) if isinstance(out, tuple) else out * 1.5
    )


def pre_hook(layer, draw):
    getattr(layer, draw.choice(PARTS)).register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]))


def backward_hook(layer, draw):
    getattr(layer, draw.choice(PARTS[1:5])).register_full_backward_hook(lambda m, grads, _: (grads[0] * 2,))


def hook_on_the_layer(layer, draw):
    layer.register_forward_hook(lambda m, args, out: out * 1.5)


def patch(layer, draw):
    part = getattr(layer, draw.choice(PARTS[1:]))
    forward = part.forward
    part.forward = lambda x: forward(x) * 0.5


def patch_the_layer(layer, draw):
    layer.forward = lambda src, *args, **kwargs: torch.tanh(src) * 2


def attention_block(layer, draw):
    block = type(layer)._sa_block
    layer._sa_block = lambda x, *args, **kwargs: 0.5 * block(layer, x, *args, **kwargs)


def feed_forward_block(layer, draw):
    layer._ff_block = lambda x: torch.sin(x) @ layer.linear1.weight[:C]


def subclass(layer, draw):
    kind, name = type(layer), draw.choice(["_sa_block", "_ff_block", "forward", "__call__"])

    def method(self, *args, **kwargs):
        return 0.5 * getattr(kind, name)(self, *args, **kwargs)

    layer.__class__ = type(f"Sub{kind.__name__}", (kind,), {name: method})


def parametrize(layer, draw):
    name = draw.choice(["linear1", "linear2"])
    nn.utils.parametrizations.weight_norm(getattr(layer, name))


def weight_norm(layer, draw):
    nn.utils.weight_norm(getattr(layer, draw.choice(["linear1", "linear2"])))


def prune(layer, draw):
    pruning.ln_structured(getattr(layer, draw.choice(["linear1", "linear2"])), "weight", 0.5, n=2, dim=0)


def replace(layer, draw):
    name = draw.choice(PARTS[1:])
    old = getattr(layer, name)
    new = {nn.Linear: lambda: nn.Sequential(old, nn.Tanh()), nn.LayerNorm: nn.Identity, nn.Dropout: nn.Tanh}[type(old)]
    setattr(layer, name, new())


def replace_by_the_same(layer, draw):
    layer.linear1 = nn.Linear(C, 3 * C, device=DEVICE)
    layer.linear2 = nn.Linear(3 * C, C, bias=draw.random() < 0.5, device=DEVICE)


def replace_by_one_channel(layer, draw):
    """Which torch adds to the others by broadcasting."""
    layer.linear2 = nn.Linear(layer.linear1.out_features, 1, device=DEVICE)


def change_the_activation(layer, draw):
    layer.activation = draw.choice([F.gelu, F.relu, torch.tanh, nn.GELU("tanh"), nn.GELU(), nn.ReLU(), nn.SiLU()])


def freeze(layer, draw):
    for p in draw.sample(list(layer.parameters()), 5):
        p.requires_grad_(False)


def share(layer, draw):
    layer.norm2 = layer.norm1


def cast_a_norm(layer, draw):
    getattr(layer, draw.choice(["norm1", "norm2"])).double()


def cast(layer, draw):
    layer.double()


def change_a_rate(layer, draw):
    getattr(layer, draw.choice(PARTS[5:])).p = draw.choice([0.5, 1.0])


def change_all_rates(layer, draw):
    layer.self_attn.dropout = layer.dropout.p = layer.dropout1.p = layer.dropout2.p = 1.0


def change_a_mode(layer, draw):
    part = getattr(layer, draw.choice(PARTS))
    part.train(not part.training)


def change_eps(layer, draw):
    for name in draw.choice([("norm1",), ("norm2",), ("norm1", "norm2")]):
        getattr(layer, name).eps = 0.1


def turn_norm_first(layer, draw):
    layer.norm_first = not layer.norm_first


def change_heads(layer, draw):
    layer.self_attn.num_heads, layer.self_attn.head_dim = 1, C


def no_weight(layer, draw):
    setattr(getattr(layer, draw.choice(WITH_WEIGHT[2:])), draw.choice(["weight", "bias"]), None)


def no_affine(layer, draw):
    setattr(layer, draw.choice(["norm1", "norm2"]), nn.LayerNorm(C, elementwise_affine=False, device=DEVICE))


def wider_norm(layer, draw):
    setattr(layer, draw.choice(["norm1", "norm2"]), nn.LayerNorm((1, C), device=DEVICE))


def no_bias(layer, draw):
    getattr(layer, draw.choice(WITH_WEIGHT)).bias = None


def extra_keys(layer, draw):
    layer.self_attn.add_zero_attn = True


def new_values(layer, draw):
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.linspace(-1, 1 + i, p.numel(), device=p.device).view(p.shape).cos() / 4)


EDITS = (
    hook, pre_hook, backward_hook, hook_on_the_layer, patch, patch_the_layer, attention_block, feed_forward_block,
    subclass, parametrize, weight_norm, prune, replace, replace_by_the_same, replace_by_one_channel,
    change_the_activation, freeze, share, cast_a_norm, cast, change_a_rate, change_all_rates, change_a_mode,
    change_eps, turn_norm_first, change_heads, no_weight, no_affine, wider_norm, no_bias, extra_keys, new_values,
)  # fmt: skip


def patched(kind, draw):
    """A class of torch with another ``forward``."""
    original = kind.forward
    forward = lambda self, *args, **kwargs: twice(original(self, *args, **kwargs))  # noqa: E731
    return mock.patch.object(kind, "forward", forward)


def twice(out):
    return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2


CLASSES = (nn.MultiheadAttention, nn.Linear, nn.LayerNorm, nn.Dropout, nn.TransformerEncoderLayer)


def results(call, layer, x):
    """The output, and the gradients of x and of all parameters; or the error."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    try:
        out = call(x)
        wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=out.dtype).sin().view(out.shape)
        return out, torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
        return error, None


def assert_same(ours, theirs):
    (out, gradients), (expected, their_gradients) = ours, theirs
    if isinstance(out, Exception):
        raise out
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(out, expected, **tolerance)
    for g, h in zip(gradients, their_gradients, strict=True):
        assert (g is None or not g.any()) if h is None else True
        if h is not None:
            torch.testing.assert_close(torch.zeros_like(h) if g is None else g, h, **tolerance)


def drawn(draw, backend, training):
    """Makes a pair of layers, edits both, and compares: as layers, or inside of a BatchFormer."""
    number = draw.randrange(1 << 30)
    options = {"norm_first": draw.random() < 0.5, "batch_first": draw.random() < 0.3, "bias": draw.random() < 0.8}
    edits = draw.sample(EDITS, draw.choice([1, 1, 2, 3]))
    forks = training and not options["batch_first"] and draw.random() < 0.4
    converted = subclass not in edits and draw.random() < 0.3
    theirs = nn.TransformerEncoderLayer(C, 2, C, 0.0, device=DEVICE, **options).train(training)
    kind = nn.TransformerEncoderLayer if converted else fastbf.BatchFormerLayer
    ours = kind(C, 2, C, 0.0, device=DEVICE, **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    for edit in edits:
        for layer in (theirs, ours):
            torch.manual_seed(number)
            try:
                edit(layer, random.Random(number))
            except (KeyError, ValueError, AttributeError, TypeError):  # edits that exclude each other
                return False
    if converted:
        assert fastbf.convert(ours) == 1
    x = torch.randn(*draw.choice([(N, C), (N, L, C), (N, 1, C)]), device=DEVICE)
    x = x.to(next(theirs.parameters()).dtype)
    with patched(draw.choice(CLASSES), draw) if draw.random() < 0.1 else mock.MagicMock():
        former = fastbf.BatchFormer(C)
        former.layers[0] = ours
        call = former if forks else ours
        expected = results(lambda x: torch.cat([x, theirs(x)]) if forks else theirs(x), theirs, x)
        if isinstance(expected[0], Exception):  # evaluation without a bias, norms of another dtype on a CPU
            return False
        ours.backend = backend
        if backend == "triton" and ours.parent_reason(x) is not None:
            found = results(call, ours, x)[0]
            # A forward, a call or a hook on the layer need not come to the layer's own.
            assert not isinstance(found, Exception) or ours.parent_reason(x) in str(found), found
            ours.backend = "auto"
        if backend == "triton" and x.dtype == torch.float64:
            ours.backend = "auto"
        assert_same(results(call, ours, x), expected)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_pytorchs_layer_with_the_same_edits(backend, training, seed):
    draw, done = random.Random(f"{backend} {training} {seed}"), 0
    while done < (28 if backend == "torch" else 4):  # kernels take the interpreter long
        done += drawn(draw, backend, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("part", ["linear2", "out_proj"])
def test_a_part_of_one_channel_is_broadcast_as_in_pytorch(part, training):
    theirs = nn.TransformerEncoderLayer(C, 2, C, 0.0, device=DEVICE).train(training)
    setattr(theirs if part == "linear2" else theirs.self_attn, part, nn.Linear(C, 1, device=DEVICE))
    ours = copy.deepcopy(theirs)
    assert fastbf.convert(ours) == 1
    assert "another width" in ours.parent_reason()
    x = torch.randn(N, L, C, device=DEVICE)
    assert_same(results(ours, ours, x), results(theirs, theirs, x))
