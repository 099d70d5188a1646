"""Attention whole, in pieces and computed again: one result, whatever supplies the decisions."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastbf
from fastbf import functional, reference
from fastbf.dropout import Dropout
from fastbf.functional import batch_attention
from tests.exact import assert_as_exact, layer_masks, results
from tests.torch_backend.ways import every_way, take

RATES = pytest.mark.parametrize("p", [0.1, 0.5])
SEED = torch.tensor([-5])


def layer_tensors(channels, width, bias=True, dtype=torch.float64):
    """The weights of an encoder layer, in order."""
    shapes = [(3 * channels, channels), (channels, channels), (width, channels), (channels, width)]
    tensors = []
    for shape in (*shapes, (channels,), (channels,)):
        weight = torch.randn(shape, dtype=dtype) / shape[-1] ** 0.5
        tensors += [weight.requires_grad_(), torch.randn(shape[0], dtype=dtype, requires_grad=True) if bias else None]
    return tensors


@every_way
@RATES
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients_are_those_of_finite_differences(way, p, activation, norm_first, monkeypatch):
    """With the default generator, from one state of it each time."""
    take(way, monkeypatch)
    x = torch.randn(5, 2, 8, dtype=torch.float64, requires_grad=True)

    def layer(*tensors):
        torch.manual_seed(1)
        options = {"num_heads": 2, "activation": activation, "norm_first": norm_first, "dropout_p": p}
        return functional.encoder_layer(*tensors, plain=tensors[0], **options)

    assert gradcheck(layer, [x, *layer_tensors(8, 6)], atol=1e-4)


@every_way
@RATES
def test_second_derivatives_are_those_of_finite_differences(way, p, monkeypatch):
    take(way, monkeypatch)
    tensors = [torch.randn(n, 1, 3, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4)]

    def attention(*tensors):
        torch.manual_seed(1)
        return batch_attention(*tensors, dropout_p=p)

    assert gradgradcheck(attention, tensors, atol=1e-4)


@every_way
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(9, 8), (9, 3, 8), (4, 2, 3, 8)])
@pytest.mark.parametrize(("norm_first", "bias"), [(False, True), (True, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_with_a_seed_the_layer_is_the_formula(way, p, shape, norm_first, bias, transposed, monkeypatch):
    take(way, monkeypatch)
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.movedim(0, -2).contiguous().movedim(-2, 0) if transposed else x).requires_grad_()
    options = {"num_heads": 2, "activation": "gelu", "norm_first": norm_first, "eps": 1e-5}
    tensors, grad = [x, *layer_tensors(8, 6, bias)], torch.randn_like(x)
    masks = layer_masks(x, 2, 6, SEED, p)

    def formula(x, *weights):
        return reference.encoder_layer(x, reference.LayerWeights(*weights), masks=masks, **options)

    def ours(*tensors):
        return functional.encoder_layer(*tensors, dropout_p=p, seed=SEED, **options)

    for a, e in zip(results(ours, tensors, grad), results(formula, tensors, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@every_way
@RATES
def test_without_one_the_decisions_are_the_generators(way, p, monkeypatch):
    """Equal scores and a unit matrix of values show them."""
    take(way, monkeypatch)
    n, groups = 6, 4
    q = torch.zeros(n, groups, 8, dtype=torch.float64)
    v = torch.eye(n, 8, dtype=torch.float64)[:, None].repeat(1, groups, 1)
    torch.manual_seed(3)
    seen = batch_attention(q, q, v, dropout_p=p).movedim(0, 1)[..., :n] > 0
    torch.manual_seed(3)
    dropout = Dropout(p, None, torch.float64)
    rows = 6 if way == "whole" else 20 * 2 // n  # of a piece
    step = groups if way == "whole" else 1
    drawn = torch.cat(
        [
            torch.cat([dropout.scores((step, min(rows, n - r), n), q.device) for r in range(0, n, rows)], dim=1)
            for _ in range(0, groups, step)
        ]
    )
    assert torch.equal(seen, drawn > dropout.limit)


@every_way
@RATES
@pytest.mark.parametrize("shape", [(12, 32), (12, 3, 32)])
def test_one_state_of_the_generator_gives_one_step(way, p, shape, monkeypatch):
    """Bit by bit: after manual_seed, from a state that was kept, in fork_rng, and under both kinds of checkpointing."""
    take(way, monkeypatch)
    former, classifier = fastbf.BatchFormer(32, dropout=p), fastbf.SharedClassifier(32, 5)
    x, y = torch.randn(shape, requires_grad=True), torch.randint(0, 5, shape[:-1])

    def step(former):
        loss = classifier.loss(former(x), y)
        return [loss, *torch.autograd.grad(loss, [x, *parameters])]

    parameters = [*former.parameters(), *classifier.parameters()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = step(former), step(former)
    assert not torch.equal(first[0], second[0])
    torch.set_rng_state(state)
    with torch.random.fork_rng():
        inside = step(former)
    again = [inside, step(former)]
    for reentrant in (False, True):
        torch.manual_seed(7)
        loss = classifier.loss(checkpoint(former, x, use_reentrant=reentrant), y)
        loss.backward()
        again.append([loss, x.grad, *(p.grad for p in parameters)])
        for t in (x, *parameters):
            t.grad = None
    for result in again:
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@every_way
@RATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_error_is_within_twice_eagers(way, p, dtype, autocast, monkeypatch):
    """Of the layer, in narrow dtypes and under autocast to bf16."""
    take(way, monkeypatch)
    options = {"num_heads": 4, "activation": "gelu", "norm_first": False, "eps": 1e-5}
    inner = torch.float32 if autocast else dtype
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    tensors, grad = [x, *layer_tensors(32, 24, dtype=inner)], torch.randn(40, 32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in tensors]

    def run(op, tensors, **more):
        def call(*tensors):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and tensors[0].dtype != torch.float64):
                return op(*tensors, **more)

        return results(call, tensors, grad.to(tensors[0].dtype))

    def formula(x, *weights):
        narrow = torch.bfloat16 if autocast else dtype
        masks = layer_masks(x, 4, 24, SEED, p, x.dtype if x.dtype == torch.float64 else narrow)
        return reference.encoder_layer(x, reference.LayerWeights(*weights), masks=masks, **options)

    ours = run(functional.encoder_layer, tensors, dropout_p=p, seed=SEED, **options)
    eps = torch.finfo(torch.bfloat16 if autocast else dtype).eps
    assert_as_exact(ours, run(formula, tensors), run(formula, exact), eps)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_site_of_a_layer_without_a_seed_has_its_own_multiplier(dtype, autocast):
    layer = fastbf.BatchFormerLayer(8, 2, 24, 0.5, backend="torch", dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert layer(torch.randn(5, 3, 8, dtype=dtype)).isfinite().all()


@every_way
def test_what_is_kept_for_backward(way, monkeypatch):
    """Of N x N numbers: probabilities with their signs, or bits; PyTorch's operators keep more."""
    take(way, monkeypatch)
    n, heads = 64, 2
    q, k, v = (torch.randn(n, heads, 8, requires_grad=True) for _ in range(3))
    saved = {}
    keep = lambda t: saved.setdefault(t.data_ptr(), t) if t.numel() >= n * n / 8 else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        batch_attention(q, k, v, dropout_p=0.1)
    sizes = sorted(t.nbytes for t in saved.values())
    of_inputs, scores = [4 * n * heads * 8] * 3, heads * n * n
    assert sizes == sorted([*of_inputs, scores // 8 if way == "computed again" else 4 * scores])


@every_way
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@RATES
def test_what_is_not_finite_stays_in_its_group(way, value, p, monkeypatch):
    take(way, monkeypatch)
    tensors = [torch.randn(7, 3, 8) for _ in range(3)]
    tensors[2][1, 1, 5] = value
    out = batch_attention(*(t.requires_grad_() for t in tensors), dropout_p=p, seed=SEED)
    out.sum().backward()
    finite = out.isfinite().all(-1).all(0)
    assert finite.tolist() == [True, False, True]
    assert all(t.grad[:, ::2].isfinite().all() for t in tensors)


@every_way
def test_everything_dropped_is_zero(way, monkeypatch):
    take(way, monkeypatch)
    q = torch.randn(7, 3, 8, requires_grad=True)
    out = batch_attention(q, q, q, dropout_p=1.0)
    out.sum().backward()
    assert not out.any()
    assert not q.grad.any()
