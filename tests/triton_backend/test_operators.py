"""The launchers as registered operators: what ``torch.compile`` relies on, and layers compiled as one graph."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch._ops import OpOverload
from torch.library import opcheck

import fastbf
from fastbf import backend, functional
from fastbf.kernels import probe
from fastbf.kernels.failures import BuildError
from fastbf.triton_backend import classifier
from tests.distributed.across_ranks import CHECKS, OPERATORS
from tests.triton_backend.test_encoder_layer import features, weights
from tests.triton_case import DEVICE, SEED


@contextmanager
def operators_called():
    """What a compiler would trace, run: every operator of fastbf with its arguments, as they were before the call."""
    found, call = [], OpOverload.__call__

    def recorded(operator, /, *args, **kwargs):
        if operator.namespace == "fastbf":
            found.append((operator, [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]))
        return call(operator, *args, **kwargs)

    with patch.object(OpOverload, "__call__", recorded), patch("torch.compiler.is_compiling", lambda: True):
        yield found


def check(function, *inputs):
    """PyTorch's checks of the operators that a function and its backward call; their names."""
    inputs = [x.requires_grad_() for x in inputs]
    with operators_called() as called:
        function(*inputs).float().sum().backward()
    kinds = {(operator, tuple(map(type, args))): args for operator, args in called}
    for (operator, _), args in kinds.items():
        assert set(opcheck(operator, tuple(args), test_utils=CHECKS).values()) == {"SUCCESS"}
    return {operator._schema.name.split("::")[1] for operator, _ in kinds}


CLASSIFIER = {"classifier_forward_rows", "classifier_backward_rows"}


def both(name):
    return {f"{name}_forward", f"{name}_backward"}


@pytest.mark.parametrize("n", [6, 40])
def test_attention(n):
    qkv = [torch.randn(n, 3, 2, 16, device=DEVICE) for _ in range(3)]
    options = {"dropout_p": 0.5, "seed": SEED, "backend": "triton"}
    assert check(lambda *x: functional.batch_attention(*x, **options), *qkv) == both("attention")


def test_add_norm():
    x, residual, weight = (torch.randn(s, device=DEVICE) for s in ((2, 3, 24), (2, 3, 24), (24,)))
    options = {"dropout_p": 0.1, "eps": 1e-5, "seed": SEED, "backend": "triton"}

    def function(x, residual, weight):
        return functional.dropout_add_layer_norm(x.transpose(0, 1), residual.transpose(0, 1), weight, None, **options)

    assert check(function, x, residual, weight) == both("add_norm")


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_activation(name):
    options = {"dropout_p": 0.5, "seed": SEED, "backend": "triton"}
    h = torch.randn(6, 24, device=DEVICE)
    assert check(lambda h: functional.activation_dropout(h, name, **options), h) == both("activation")


@pytest.mark.parametrize(
    ("n", "norm_first", "fork", "half"),
    [
        (6, False, "x", False),
        (6, True, "", True),
        (40, False, "input", True),
        (6, False, "plain", True),
        (6, True, "input", False),
        (40, True, "x", False),
    ],
)
def test_encoder(n, norm_first, fork, half):
    activation = "gelu" if norm_first else "relu"
    options = {"num_heads": 4, "activation": activation, "norm_first": norm_first, "dropout_p": 0.5, "seed": SEED}

    def function(x, *tensors):
        plain = {"x": x, "plain": x.detach() + 1}.get(fork)
        with torch.autocast(DEVICE.type, torch.float16, enabled=half):
            return functional.encoder_layer(
                x, *tensors, **options, plain=plain, forked=fork == "input", backend="triton"
            )

    x = features(2 * n if fork == "input" else n, (), 32).detach()
    found = check(function, x, *(t.detach() for t in weights(32, 40)))
    assert found == both("attention") | both("add_norm") | both("activation")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_classifier(half, reduction, keep, soft, monkeypatch):
    """Eight classes: what pads the rows of others is in no result."""
    monkeypatch.setattr(classifier, "KEPT", int(keep))
    x, matrix, bias = (torch.randn(shape, device=DEVICE) for shape in ((12, 16), (8, 16), (8,)))
    target, weight = torch.arange(6, device=DEVICE), torch.rand(8, device=DEVICE)
    if soft:
        target = torch.rand(6, 8, device=DEVICE)
    options = {"scale": 2.0, "reduction": reduction, "label_smoothing": 0.1, "stats": True}
    options["ignore_index"] = -100 if soft else 3

    def function(x, matrix, bias):
        tensors = {"linear_bias": bias, "weight": weight, "logit_bias": bias}
        with torch.autocast(DEVICE.type, torch.float16, enabled=half):
            return functional.linear_cross_entropy(x, matrix, target, **tensors, **options, backend="triton")[0]

    found = check(function, x, matrix, bias)
    assert found == CLASSIFIER | both("cross_entropy") | {"cross_entropy_finish"}  # the former run the latter


def outcome(function, x, parameters):
    torch.manual_seed(5)
    out = function(x)
    return [out, *torch.autograd.grad(out.sin().sum(), [x, *parameters])]


def assert_compiled_is_the_same(function, x, parameters=(), exact=True, **options):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, **options)
    for a, b in zip(outcome(compiled, x, parameters), outcome(function, x, parameters), strict=True):
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("counter_based")
@pytest.mark.parametrize("which", ["triton", "torch"])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((6, 32), {}),
        ((40, 32), {"norm_first": True, "activation": "gelu", "num_layers": 2}),
        ((3, 12, 32), {"batch_dim": 1, "forked": True}),
        ((6, 32, 2, 3), {"channel_dim": 1, "bias": False}),
    ],
)
def test_modules_compile_as_one_graph(which, shape, options):
    former = fastbf.BatchFormer(32, backend=which, device=DEVICE, **options)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    assert_compiled_is_the_same(former, x, list(former.parameters()), exact=which == "triton", backend="aot_eager")


def test_a_layer_in_place_of_pytorchs_compiles():
    layer = fastbf.BatchFormerLayer(32, 4, 40, 0.5, batch_first=True, backend="triton", device=DEVICE)
    x = torch.randn(3, 7, 32, device=DEVICE, requires_grad=True)
    assert_compiled_is_the_same(layer, x, list(layer.parameters()), backend="aot_eager")


def test_what_is_found_out_about_a_gpu_compiles(monkeypatch):
    """The compiler takes the answer and does not look at how it came about."""

    def no_compiler(_):
        raise BuildError("write_one: RuntimeError: no C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(probe, "probe", no_compiler)
    device = torch.device("cuda", 5)
    compiled = torch.compile(lambda x: x + (backend._gpu_obstacle(device) is None), fullgraph=True, backend="eager")
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert compiled(torch.zeros(1)) == 0
    backend._tried.cache_clear()


def test_parameters_that_are_shared_compile():
    layer = fastbf.BatchFormerLayer(32, 4, 32, 0.5, backend="triton", device=DEVICE)
    layer.norm2 = layer.norm1
    x = torch.randn(7, 32, device=DEVICE, requires_grad=True)
    assert_compiled_is_the_same(layer, x, list(layer.parameters()), exact=False, backend="aot_eager")


def test_compiles_under_autocast():
    former = fastbf.BatchFormer(32, backend="triton", device=DEVICE)
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)

    def function(x):
        with torch.autocast(DEVICE.type, torch.float16):
            return former(x)

    assert_compiled_is_the_same(function, x, list(former.parameters()), backend="aot_eager")


def test_a_whole_step_compiles():
    former = fastbf.BatchFormer(32, backend="triton", device=DEVICE)
    classifier = fastbf.SharedClassifier(32, 5, label_smoothing=0.1, class_counts=[1] * 5, backend="triton")
    classifier.to(DEVICE)
    x, y = torch.randn(6, 32, device=DEVICE, requires_grad=True), torch.arange(6, device=DEVICE) % 5

    def step(x):
        loss, stats = classifier.loss(former(x), y, stats=True)
        return loss + 0 * stats.loss.sum()

    assert_compiled_is_the_same(step, x, [*former.parameters(), *classifier.parameters()], backend="aot_eager")


@pytest.mark.parametrize("kept", [0, 1])
def test_a_loss_of_probabilities_compiles(kept, monkeypatch):
    """With the logits kept, and made again in chunks."""
    monkeypatch.setattr(classifier, "KEPT", kept)
    monkeypatch.setattr(classifier, "CHUNK", 0)
    monkeypatch.setattr(classifier, "MIN_ROWS", 5)
    x, w = torch.randn(12, 16, device=DEVICE, requires_grad=True), torch.randn(7, 16, device=DEVICE, requires_grad=True)
    y = torch.rand(6, 7, device=DEVICE)

    def function(x):
        loss, stats = functional.linear_cross_entropy(x, w, y, label_smoothing=0.1, stats=True, backend="triton")
        return loss + stats.accuracy.sum()

    assert_compiled_is_the_same(function, x, [w], exact=False, backend="aot_eager")


def test_functions_compile():
    x = torch.randn(12, 3, 32, device=DEVICE, requires_grad=True)

    def function(x):
        o = functional.batch_attention(*[x.unflatten(-1, (2, 16))] * 3, dropout_p=0.5, backend="triton").flatten(-2)
        u = functional.activation_dropout(o, "gelu", dropout_p=0.1, backend="triton")
        u = functional.dropout_add_layer_norm(u, u, x[0, 0], None, dropout_p=0.1, eps=1e-5, backend="triton")
        return functional.dropout_add_layer_norm(u, x, x[0, 0], None, dropout_p=0.5, eps=1e-5, backend="triton")

    assert_compiled_is_the_same(function, x, exact=False, backend="aot_eager")  # sums in another order


@pytest.mark.parametrize("keep", [0, 1])
def test_new_lengths_of_a_loss_in_chunks_do_not_recompile(keep, monkeypatch):
    for name, value in {"KEPT": keep, "CHUNK": 0, "MIN_ROWS": 8}.items():
        monkeypatch.setattr(classifier, name, value)
    w = torch.randn(7, 16, device=DEVICE, requires_grad=True)

    def loss(x, y):
        return functional.linear_cross_entropy(x, w, y, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    sizes = [(n, torch.randn(n, 16, device=DEVICE), torch.arange(n, device=DEVICE) % 7) for n in (20, 21, 30, 41)]
    for _, x, y in sizes[:2]:
        compiled(x, y).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _, x, y in sizes[2:]:
            torch.testing.assert_close(compiled(x, y), loss(x, y))
            compiled(x, y).backward()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
def test_inductor(dynamic):
    former = fastbf.BatchFormer(32, backend="triton", device=DEVICE)
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiled_is_the_same(former, x, list(former.parameters()), exact=False, dynamic=dynamic)


def test_new_lengths_do_not_recompile():
    former = fastbf.BatchFormer(32, backend="triton", device=DEVICE)
    compiled = torch.compile(former, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (40, 41):
        compiled(torch.randn(n, 32, device=DEVICE))
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (42, 97, 33):
            assert compiled(torch.randn(n, 32, device=DEVICE)).shape == (2 * n, 32)


def test_every_registered_operator_is_checked():
    """Here, or, of those that communicate, on several ranks."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastbf::")}
    here = both("attention") | both("add_norm") | both("activation") | both("cross_entropy") | {"cross_entropy_finish"}
    assert names == here | CLASSIFIER | set(OPERATORS)
