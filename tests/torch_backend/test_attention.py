"""batch_attention on the torch backend against the formula in fp64."""

import itertools

import pytest
import torch

from fastbf import reference
from fastbf.dropout import Dropout, attention_mask
from fastbf.functional import batch_attention
from fastbf.torch_backend import attention as ways

SEED = 42


def inputs(n, m, *rest, dtype=torch.float64):
    return tuple(torch.randn(length, *rest, dtype=dtype, requires_grad=True) for length in (n, m, m))


def formula(q, k, v, p, seed=SEED, scale=None):
    """The definition with the mask materialised."""
    mask = attention_mask(Dropout(p, torch.tensor([seed]), q.dtype), q, k.shape[0]) if p else None
    return reference.attention(q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale, mask=mask)


def assert_same(ours, expected, tensors, rtol=1e-9):
    grad = torch.randn_like(expected)
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=rtol)
    actual = torch.autograd.grad(ours, tensors, grad)
    for a, e in zip(actual, torch.autograd.grad(expected, tensors, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 8), (1, 24), (3, 2, 16), (2, 3, 4, 8)])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 7), (33, 33), (127, 40), (1, 33)])
def test_matches_the_formula(n, m, shape, p):
    q, k, v = inputs(n, m, *shape)
    assert_same(batch_attention(q, k, v, dropout_p=p, seed=SEED), formula(q, k, v, p), (q, k, v))


@pytest.mark.parametrize("elements", [1, 50, 1000, 10**9])
def test_pieces_change_nothing(elements, monkeypatch):
    monkeypatch.setattr(ways, "CPU_PIECE", elements)
    for n in (17, 30):
        q, k, v = inputs(n, n, 3, 2, 8)
        assert_same(batch_attention(q, k, v, dropout_p=0.5, seed=SEED), formula(q, k, v, 0.5), (q, k, v))


def test_scale_is_used():
    q, k, v = inputs(5, 6, 2, 8)
    for p in (0.0, 0.5):
        ours = batch_attention(q, k, v, dropout_p=p, scale=0.3, seed=SEED)
        assert_same(ours, formula(q, k, v, p, scale=0.3), (q, k, v))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_gradients_of_every_subset(needs):
    q, k, v = inputs(20, 20, 2, 8)
    for t, need in zip((q, k, v), needs, strict=True):
        t.requires_grad_(need)
    out = batch_attention(q, k, v, dropout_p=0.5, seed=SEED)
    assert out.requires_grad == any(needs)
    wanted = [t for t, need in zip((q, k, v), needs, strict=True) if need]
    if wanted:
        assert_same(out, formula(q, k, v, 0.5), wanted)


def test_strided_inputs_and_gradients():
    buffer = torch.randn(20, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = buffer.unbind(1)
    out, expected = batch_attention(q, k, v, dropout_p=0.5, seed=SEED), formula(q, k, v, 0.5)
    grad = torch.randn(8, 20, 4, dtype=torch.float64).movedim(0, -1)
    torch.testing.assert_close(
        torch.autograd.grad(out, buffer, grad)[0], torch.autograd.grad(expected, buffer, grad)[0]
    )


def test_second_backward_and_untouched_inputs():
    q, k, v = inputs(20, 20, 2, 8)
    before = [t.detach().clone() for t in (q, k, v)]
    out = batch_attention(q, k, v, dropout_p=0.5, seed=SEED)
    grad = torch.randn_like(out)
    kept = grad.clone()
    first = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=True))


def test_double_backward():
    q, k, v = inputs(3, 4, 1, 3)
    assert torch.autograd.gradgradcheck(lambda *t: batch_attention(*t, dropout_p=0.5, seed=SEED), (q, k, v), atol=1e-4)


def test_seed_decides_the_mask():
    q, k, v = inputs(16, 16, 2, 8)

    def run(seed):
        return batch_attention(q, k, v, dropout_p=0.5, seed=seed)

    assert torch.equal(run(7), run(torch.tensor([7])))
    assert not torch.equal(run(7), run(8))
    assert not torch.equal(run(None), run(None))
    torch.manual_seed(1)
    first = run(None)
    torch.manual_seed(1)
    assert torch.equal(first, run(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [33, 300])
def test_error_is_within_twice_eagers(dtype, n):
    exact = inputs(n, n, 4, 64)
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    grad = torch.randn(n, 4, 64, dtype=torch.float64)

    def results(fn, tensors):
        out = fn(*tensors)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    rounded = [t.detach().double().requires_grad_() for t in low]
    truth = results(lambda *t: formula(*t, 0.5), rounded)
    ours = results(lambda *t: batch_attention(*t, dropout_p=0.5, seed=SEED), low)
    eager = results(lambda *t: formula(*t, 0.5), low)
    for o, e, t in zip(ours, eager, truth, strict=True):
        limit = 2 * (e.double() - t).norm() + torch.finfo(dtype).eps * t.norm()
        assert (o.double() - t).norm() <= limit


def test_no_samples():
    q, k, v = inputs(0, 0, 2, 8)
    assert batch_attention(q, k, v, dropout_p=0.5).shape == (0, 2, 8)


def test_graph_of_the_gradient_when_inputs_depend_on_each_other():
    x = torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True)
    out = batch_attention(x, 2 * x, x.sin(), dropout_p=0.5, seed=SEED).square().sum()
    plain = torch.autograd.grad(out, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out, x, create_graph=True)[0], plain)


def test_backward_inside_autocast_computes_as_forward_did():
    q, k, v = inputs(20, 20, 2, 8, dtype=torch.float32)
    out = batch_attention(q, k, v, dropout_p=0.5, seed=SEED).sum()
    expected = torch.autograd.grad(out, (q, k, v), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = torch.autograd.grad(out, (q, k, v))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_seeds_of_any_shape(shape):
    q, k, v = inputs(6, 6, 2, 8)
    out = batch_attention(q, k, v, dropout_p=0.1, seed=torch.full(shape, SEED))
    assert torch.equal(out, batch_attention(q, k, v, dropout_p=0.1, seed=SEED))
