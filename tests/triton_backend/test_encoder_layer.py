"""The whole encoder layer on kernels against fp64, with identical masks: interpreted on a CPU, compiled on a GPU."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import fastbf
from fastbf import functional, reference
from fastbf.reference import LayerWeights
from tests.exact import assert_as_exact, doubled, layer_masks, results
from tests.triton_case import DEVICE, DTYPES, SEED

NAMES = ("out", "x", *LayerWeights._fields)


def weights(channels, width, dtype=torch.float32, bias=True):
    """Of a layer; the hidden units are far from zero, so that rounding switches none of them on or off."""
    shapes = [(3 * channels, channels), (channels, channels), (width, channels), (channels, width)]
    tensors = []
    for i, shape in enumerate([*shapes, (channels,), (channels,)]):
        scale = 0.5 if len(shape) == 2 else 1
        w = torch.randn(shape) * scale / shape[-1] ** 0.5 + (len(shape) == 1)
        b = torch.randn(shape[0]) / 2
        b = b.sign() * 3 + b if i == 2 else b
        tensors += [w, b if bias else None]
    return [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in tensors]


def features(n, positions, channels, dtype=torch.float32, position_major=False):
    """(N, …, C); in memory the samples may stand right before the channels."""
    x = torch.randn(*positions, n, channels).movedim(-2, 0) if position_major else torch.randn(n, *positions, channels)
    return x.to(DEVICE, dtype).requires_grad_()


def formula(x, *tensors, heads, p, fork="", mask_dtype=None, **options):
    """The definition, with the masks materialised; x is a fork itself with ``fork`` "input"."""
    plain, stream = x.chunk(2) if fork == "input" else (x, x)
    width = tensors[4].shape[0]
    seed = torch.tensor([SEED], device=x.device)
    masks = layer_masks(stream, heads, width, seed, p, mask_dtype)
    mixed = reference.encoder_layer(stream, LayerWeights(*tensors), num_heads=heads, eps=1e-5, masks=masks, **options)
    return torch.cat([plain, mixed]) if fork else mixed


def kernels(x, *tensors, heads, p, fork="", **options):
    forks = {"": {}, "x": {"plain": x}, "input": {"forked": True}}[fork]
    return functional.encoder_layer(
        x, *tensors, num_heads=heads, dropout_p=p, eps=1e-5, seed=SEED, backend="triton", **forks, **options
    )


def assert_layer_exact(x, tensors, grad=None, **call):
    shape = formula(x, *tensors, **call).shape
    grad = torch.randn(shape, device=DEVICE).to(x.dtype) if grad is None else grad
    given = [x, *tensors]
    names = ["out", *(name for name, t in zip(NAMES[1:], given, strict=True) if t is not None)]
    exact = results(lambda *t: formula(*t, **call), doubled(given), grad.double())
    eager = results(lambda *t: formula(*t, **call), given, grad)
    ours = results(lambda *t: kernels(*t, **call), given, grad)
    assert_as_exact(ours, eager, exact, torch.finfo(x.dtype).eps, names)


SHAPES = (
    # samples, positions, channels, feed-forward, heads
    (7, (), 32, 48, 4),
    (33, (), 24, 24, 1),
    (1, (), 16, 8, 2),
    (2, (5,), 64, 33, 2),
    (40, (3,), 48, 100, 2),
    (5, (2, 3), 32, 32, 4),
    (130, (), 64, 64, 1),
)
OPTIONS = list(itertools.product((False, True), ("relu", "gelu"), (True, False), ("", "x", "input")))


def cases():
    turns = zip(
        OPTIONS * 2,
        itertools.cycle(SHAPES),
        itertools.cycle((0.5, 0.1, 0.5, 0.0, 1.0)),
        itertools.cycle((False, False, True)),
        itertools.cycle((DTYPES[0], DTYPES[0], DTYPES[0], *DTYPES[1:])),
    )
    for i, ((norm_first, activation, bias, fork), shape, p, position_major, dtype) in enumerate(turns):
        if activation == "relu" and not bias:
            dtype = torch.float32  # rounding switches hidden units on and off
        yield pytest.param(
            shape, norm_first, activation, bias, fork, p, position_major, dtype,
            id=f"{i}-N{shape[0]}-{'pre' if norm_first else 'post'}-{activation}-bias{bias:d}-fork_{fork}-p{p}-{dtype}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "norm_first", "activation", "bias", "fork", "p", "position_major", "dtype"), list(cases())
)
def test_layer(shape, norm_first, activation, bias, fork, p, position_major, dtype, guards):
    n, positions, channels, width, heads = shape
    n = 2 * n if fork == "input" else n
    x = features(n, positions, channels, dtype, position_major and bool(positions))
    call = {"heads": heads, "p": p, "fork": fork, "activation": activation, "norm_first": norm_first}
    assert_layer_exact(x, weights(channels, width, dtype, bias), **call)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("scale", [1e3, 1e-3, 0.0])
def test_scaled_inputs(norm_first, scale):
    x = (features(9, (), 32).detach() * scale).requires_grad_()
    assert_layer_exact(
        x, weights(32, 40), heads=4, p=0.5, fork="x", activation="gelu", norm_first=norm_first
    )  # fmt: skip


def test_constant_rows():
    x = torch.full((6, 32), 3.0, device=DEVICE, requires_grad=True)
    out = kernels(x, *weights(32, 40), heads=4, p=0.5, fork="x", activation="relu", norm_first=False)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), x))


PARAMETERS = LayerWeights._fields
SUBSETS = [("x",), (), *((name,) for name in PARAMETERS), ("x", "norm1_bias"), PARAMETERS]
SUBSETS += [("linear1_weight", "out_proj_bias"), ("norm2_weight", "in_proj_bias"), ("x", "linear2_bias", "norm2_bias")]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("fork", ["", "x", "input"])
def test_gradients_of_any_subset(norm_first, fork):
    tensors = dict(zip(("x", *PARAMETERS), [features(8, (), 32), *weights(32, 40)], strict=True))

    def gradients(needed):
        given = [t.detach().requires_grad_(name in needed) for name, t in tensors.items()]
        call = {"heads": 4, "p": 0.5, "fork": fork, "activation": "gelu", "norm_first": norm_first}
        out = kernels(*given, **call)
        assert out.requires_grad == bool(needed)
        wanted = [t for t in given if t.requires_grad]
        return dict(zip((n for n in tensors if n in needed), torch.autograd.grad(out.sin().sum(), wanted), strict=True))

    every = gradients(tuple(tensors))
    for needed in SUBSETS:
        if needed:
            for name, grad in gradients(needed).items():
                assert torch.equal(grad, every[name]), (needed, name)
        else:
            with torch.no_grad():
                assert not kernels(
                    *tensors.values(), heads=4, p=0.5, fork=fork, activation="gelu", norm_first=norm_first
                ).requires_grad


def test_gradients_that_are_not_contiguous():
    x, tensors = features(6, (4,), 32), weights(32, 40)
    grad = torch.randn(32, 4, 12, device=DEVICE).permute(2, 1, 0)
    assert_layer_exact(x, tensors, grad, heads=4, p=0.5, fork="x", activation="relu", norm_first=False)


def test_inputs_and_gradients_are_left_alone():
    given = [features(6, (), 32), *weights(32, 40)]
    copies = [t.detach().clone() for t in given]
    out = kernels(*given, heads=4, p=0.5, fork="x", activation="relu", norm_first=False)
    grad = torch.randn_like(out)
    kept = out.detach().clone(), grad.clone()
    first = torch.autograd.grad(out, given, grad, retain_graph=True)
    second = torch.autograd.grad(out, given, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
    assert torch.equal(out, kept[0])
    assert torch.equal(grad, kept[1])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fork", ["", "x", "input"])
def test_autocast(norm_first, activation, x_dtype, fork, guards):
    """fp32 parameters, products in 16 bits: eager's dtypes, and errors that are no larger."""
    given = [features(12, (), 32, x_dtype), *weights(32, 40)]
    call = {"heads": 4, "p": 0.5, "fork": fork, "activation": activation, "norm_first": norm_first}

    def autocast(op, **more):
        def run(*tensors):
            with torch.autocast(DEVICE.type, torch.float16):
                return op(*tensors, **call, **more)

        return run

    grad = torch.randn(12 if fork != "x" else 24, 32, device=DEVICE)
    exact = results(lambda *t: formula(*t, **call), doubled(given), grad.double())
    eager = results(autocast(formula, mask_dtype=torch.float16), given, grad)
    ours = results(autocast(kernels), given, grad)
    assert_as_exact(ours, eager, exact, torch.finfo(torch.float16).eps, NAMES)


def test_weights_are_cast_once(monkeypatch):
    """One launch casts all of them, and x, forward; backward finds them saved."""
    calls = []
    cast = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *a: calls.append(len(a[0])) or cast(*a))
    with torch.autocast(DEVICE.type, torch.float16):
        out = kernels(
            features(6, (), 32), *weights(32, 40), heads=4, p=0.5, fork="x", activation="relu", norm_first=False
        )  # fmt: skip
    out.float().sum().backward()
    assert calls == [9]


def formers(**options):
    ours = fastbf.BatchFormer(32, backend="triton", device=DEVICE, **options)
    theirs = fastbf.BatchFormer(32, backend="torch", device=DEVICE, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.usefixtures("counter_based")
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 32), {}),
        ((40, 3, 32), {}),
        ((3, 6, 32), {"batch_dim": 1}),
        ((6, 2, 3, 32), {}),
        ((2, 3, 6, 32), {"batch_dim": 2}),
        ((2, 6, 3, 32), {"batch_dim": 1}),
        ((6, 32, 2, 3), {"channel_dim": 1}),
    ],
)
def test_forks_of_any_layout(shape, options, layers, forked, norm_first):
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    outcomes = []
    for former in formers(num_layers=layers, forked=forked, norm_first=norm_first, **options):
        torch.manual_seed(1)
        out = former(x)
        weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), [x, *former.parameters()])
        assert out.is_contiguous()
        outcomes.append([out, *grads])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-4, atol=5e-5)


def test_channels_last_feature_maps_stay_that():
    x = torch.randn(6, 32, 2, 3, device=DEVICE).to(memory_format=torch.channels_last)
    for former in formers(channel_dim=1):
        assert former(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, {"forked": True}, {"num_layers": 2}, {"batch_dim": 1, "forked": True}])
def test_nothing_is_concatenated(options, monkeypatch):
    """Neither in forward nor in backward, where autograd would join the gradients of a fork's halves."""
    former = formers(**options)[0]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 6, 32, device=DEVICE, requires_grad=True)
    with Watch():
        former(x).sum().backward()
    assert torch.ops.aten.mm.default in seen
    assert torch.ops.aten.cat.default not in seen


def test_hooks_on_the_last_layer_run():
    former, _ = formers()
    calls = []
    former.layers[0].register_forward_hook(lambda *_: calls.append(1))
    assert former(torch.randn(5, 32, device=DEVICE)).shape == (10, 32)
    assert calls == [1]


@pytest.mark.parametrize("shape", [(17, 32), (17, 3, 32), (1, 32), (2, 20, 32)])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_in_the_place_of_pytorchs_layer(shape, batch_first, training):
    options = {"dim_feedforward": 40, "dropout": 0.0, "batch_first": batch_first, "device": DEVICE}
    theirs = nn.TransformerEncoderLayer(32, 4, **options).train(training)
    ours = fastbf.BatchFormerLayer(32, 4, backend="triton", **options).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    outcomes = []
    for layer in (ours, theirs, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        out = layer(x)
        outcomes.append([out, *torch.autograd.grad(out.cos().sum(), [x, *layer.parameters()])])
    for outcome in outcomes[1:]:
        for a, b in zip(outcomes[0], outcome, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_encoder_stacks():
    layer = fastbf.BatchFormerLayer(32, 4, 40, 0.0, backend="triton", device=DEVICE)
    ours = nn.TransformerEncoder(layer, 3)
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 40, 0.0, device=DEVICE), 3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(9, 3, 32, device=DEVICE, requires_grad=True)
    for training in (True, False):
        outs = [stack.train(training)(x) for stack in (ours, theirs)]
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        grads = [torch.autograd.grad(out.cos().sum(), x)[0] for out in outs]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_plain_and_forked_exclude_each_other():
    x, tensors = features(6, (), 32), weights(32, 40)
    with pytest.raises(ValueError, match="plain must be None if forked, got plain as well"):
        functional.encoder_layer(x, *tensors, num_heads=4, plain=x, forked=True)
    with pytest.raises(ValueError, match=r"x must hold two streams .* got 5 samples"):
        functional.encoder_layer(x[:5], *tensors, num_heads=4, forked=True)
    with pytest.raises(ValueError, match=r"plain must have shape \(6, 32\), got \(5, 32\)"):
        functional.encoder_layer(x, *tensors, num_heads=4, plain=x[:5])


def test_a_plain_half_with_gaps():
    x, tensors = features(6, (), 32), weights(32, 40)
    plain = torch.randn(12, 64, device=DEVICE)[::2, 16:48]
    calls = [functional.encoder_layer(x, *tensors, num_heads=4, plain=plain, backend=b) for b in ("triton", "torch")]
    torch.testing.assert_close(*calls, rtol=1e-4, atol=1e-5)


def test_parameters_with_gaps():
    x, tensors = features(6, (), 32), weights(32, 40)
    spread = []
    for t in tensors:
        wide = torch.randn(*t.shape[:-1], 2 * t.shape[-1], device=DEVICE)
        wide[..., ::2] = t.detach()
        spread.append(wide[..., ::2].requires_grad_())
    with torch.autocast(DEVICE.type, torch.float16, enabled=False):
        outs = [functional.encoder_layer(x, *spread, num_heads=4, backend=b) for b in ("triton", "torch")]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for a, e in zip(*(torch.autograd.grad(out.sin().sum(), [x, *spread]) for out in outs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("counter_based")
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("layers", [1, 2])
def test_forked_layers_of_few_samples(samples, layers):
    options = {"batch_dim": 1, "forked": True, "num_layers": layers, "device": DEVICE}
    ours, theirs = (fastbf.BatchFormer(32, backend=b, **options) for b in ("triton", "torch"))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(10, 2 * samples, 32, device=DEVICE, requires_grad=True)
    outs = []
    for former in (ours, theirs):
        torch.manual_seed(4)
        outs.append(former(x))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    pairs = zip((ours, theirs), outs, strict=True)
    grads = [torch.autograd.grad(out.sin().sum(), [x, *former.parameters()]) for former, out in pairs]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


def test_parameters_of_several_dtypes_under_autocast():
    """What one parameter's dtype is has no say in another's gradient."""
    x, tensors = features(40, (), 32), weights(32, 40)
    mixed = [tensors[0].detach().bfloat16().requires_grad_(), *tensors[1:]]
    exact = [t.detach().double().requires_grad_() for t in mixed]
    grad = torch.randn(40, 32, device=DEVICE)

    def run(parameters, backend, x):
        out = functional.encoder_layer(x, *parameters, num_heads=4, backend=backend)
        return torch.autograd.grad(out, parameters, grad.to(out.dtype))

    truth = run(exact, "torch", x.detach().double())
    with torch.autocast(DEVICE.type, torch.float16):
        ours, eager = (run(mixed, backend, x.detach()) for backend in ("triton", "torch"))
    for name, o, e, t in zip(LayerWeights._fields, ours, eager, truth, strict=True):
        assert o.dtype == e.dtype, name
        limit = 2 * (e.double() - t).norm() + torch.finfo(torch.float16).eps * t.norm()
        assert (o.double() - t).norm() <= limit, name
