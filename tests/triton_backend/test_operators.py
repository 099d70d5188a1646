"""The kernels as registered operators: what ``torch.compile`` relies on, and layers compiled as one graph."""

import re
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

import fastbf
from fastbf import backend, functional, ops
from fastbf.distributed import gathering as distributed
from fastbf.kernels import probe
from fastbf.kernels.rows import Rows
from fastbf.reference import LayerWeights
from fastbf.torch_backend import attention_across_ranks
from fastbf.triton_backend import classifier
from fastbf.triton_backend.classifier import Head
from fastbf.triton_backend.encoder_call import NO_BATCH, Layer, Saved, kept
from fastbf.triton_backend.encoder_weights import Factors, cast_factors
from tests.distributed import across_ranks
from tests.distributed.across_ranks import CHECKS
from tests.triton_backend.test_encoder_layer import features, weights
from tests.triton_case import DEVICE, SEED


def check(name, *args):
    operator = getattr(torch.ops.fastbf, name).default
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    assert set(opcheck(operator, tuple(args), test_utils=CHECKS).values()) == {"SUCCESS"}
    return operator(*args)


def seed():
    return torch.tensor([SEED], device=DEVICE)


@pytest.mark.parametrize("n", [6, 40])
def test_attention(n):
    q, k, v = (torch.randn(n, 3, 2, 16, device=DEVICE) for _ in range(3))
    o, *lse = check("attention_forward", q, k, v, seed(), 0.25, 32768)
    saved = (o, *lse) if lse else (None, None)
    check("attention_backward", torch.randn_like(o), q, k, v, *saved, seed(), 0.25, 32768, [True] * 3)


def test_add_norm():
    x, residual, weight = torch.randn(6, 24).half(), torch.randn(6, 24), torch.randn(24)
    x, residual, weight = (t.to(DEVICE) for t in (x, residual, weight))
    rows = Rows(3, 2, True)
    y, total = check(
        "add_norm_forward", x, residual, weight, None, 1e-5, seed(), 6554, torch.float32, *rows
    )  # fmt: skip
    check("add_norm_backward", y, total, weight, 1e-5, seed(), 6554, torch.float16, torch.float32, *rows)


@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_activation(name):
    h = torch.randn(6, 24, device=DEVICE)
    (u,) = check("activation_forward", h, name, seed(), 32768, *Rows(6, 1, False))
    check("activation_backward", h, u, name, seed(), 32768, *Rows(6, 1, False))


@pytest.mark.parametrize(
    ("n", "norm_first", "fork", "compute"),
    [
        (6, False, "x", torch.float32),
        (6, True, "", torch.float16),
        (40, False, "input", torch.float16),
        (6, False, "plain", torch.float16),
        (6, True, "input", torch.float32),
        (40, True, "x", torch.float32),
    ],
)
def test_encoder(n, norm_first, fork, compute):
    activation = "gelu" if norm_first else "relu"
    layer = Layer(n, 1, False, 4, activation, norm_first, 1e-5, 32768, fork, compute, torch.float32, *NO_BATCH)
    x, given = features(n, (), 32).detach(), [t.detach() for t in weights(32, 40)]
    plain = {"plain": x + 1, "input": torch.cat([x + 1, x])}.get(fork)
    out, *rest = check("_encoder_forward", x, plain, given, seed(), *layer)
    tensors = iter(rest)
    saved = Saved(*(next(tensors) if wanted else None for wanted in kept(x.dtype, LayerWeights(*given), layer)))
    factors = Factors(*given[:8:2], given[8], given[10])
    if saved.cast is not None:
        factors = cast_factors(saved.cast, 40, given[8], given[10])
    for wanted in ([True] * 13, [False] * 12 + [True], [True] + [False] * 12):
        check(
            "_encoder_backward", out, x, list(saved._replace(cast=None)), list(factors), seed(), wanted, torch.float32,
            *layer,
        )  # fmt: skip


@pytest.mark.parametrize("compute", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("soft", [True, False])
def test_classifier(compute, reduction, keep, soft):
    """Eight classes: what pads the rows of others is in no result."""
    x, matrix, bias = (torch.randn(shape, device=DEVICE) for shape in ((12, 16), (8, 16), (8,)))
    target, weight = torch.arange(6, device=DEVICE), torch.rand(8, device=DEVICE)
    if soft:
        target = torch.rand(6, 8, device=DEVICE)
    head = Head(2, reduction, 2.0, 3, 0.1, True, keep, compute, torch.float32)
    loss, _, total, *rest = check("_classifier_forward", x, matrix, bias, target, weight, bias, *head)
    *_, z, of_rows = rest
    assert z.shape == (12 if keep else 0, 8)
    dtypes = (torch.float32, torch.float32)
    saved = [*(t.to(compute) for t in (x, matrix)), z, of_rows, total, bias, target, weight, bias]
    for wanted in ([True] * 4, [True, False, False, False], [False, True, False, True]):
        check("_classifier_backward", loss, *saved, wanted, *dtypes, *head)


def test_every_operator_is_checked():
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastbf::")}
    forwards = (
        "attention_forward",
        "add_norm_forward",
        "activation_forward",
        "_encoder_forward",
        "_classifier_forward",
    )
    across_ranks = {
        "_gather",
        "_scatter_sum",
        "_confirmed",
    }  # these: tests/distributed
    across_ranks |= {name for name in names if "across_ranks" in name}
    assert names - across_ranks == {*forwards, *(name.replace("forward", "backward") for name in forwards)}
    owners = distributed, attention_across_ranks, ops
    assert all(any(hasattr(owner, name) for owner in owners) for name in names)


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
        raise RuntimeError("no C compiler")

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
    files = (Path(__file__), Path(across_ranks.__file__))
    checked = set(
        re.findall(r"\b(?:check\(\s*\"|operators\.)(\w+)", "".join(f.read_text(encoding="utf-8") for f in files))
    )
    assert len(names) >= 17
    assert names <= checked
