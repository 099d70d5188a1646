"""The torch backend's matrix products: PyTorch's results whichever library computes them."""

import pytest
import torch
import torch.nn.functional as F

from fastbf.torch_backend import matmul


@pytest.fixture(autouse=True, params=["mkl", "onednn"])
def _library(request, monkeypatch):
    """Whatever this processor prefers."""
    monkeypatch.setattr(matmul, "_suits_onednn", lambda: request.param == "onednn")
    monkeypatch.setattr(matmul, "_LARGE", 0)


def matrices(dtype):
    wide = torch.randn(33, 70, dtype=dtype)
    return [wide, wide[:, 3:60], torch.randn(70, 33, dtype=dtype).mT, torch.randn(33, 1, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("i", range(4))
def test_linear_and_its_gradients(dtype, i):
    x = matrices(dtype)[i].requires_grad_()
    w, b = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((20, x.shape[1]), (20,)))
    grad = torch.randn(20, 33, dtype=dtype).mT
    for bias in (b, None):
        tensors = [x, w] if bias is None else [x, w, bias]
        expected = F.linear(x, w, bias)
        found = matmul.linear(x, w, bias)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for a, e in zip(
            torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_autograd_records_what_pytorch_computes():
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert torch.equal(*torch.autograd.grad(matmul.linear(x, w, None).sum(), x), torch.ones(3, 5) @ w)


def test_the_public_switch_turns_onednn_off(monkeypatch):
    monkeypatch.setattr(matmul, "_suits_onednn", lambda: True)
    x = torch.randn(3, 4)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not matmul._onednn(x, x)
    assert matmul._onednn(x, x)
    assert not matmul._onednn(x.double(), x.double())
    with torch.autocast("cpu"):
        assert not matmul._onednn(x, x)


def test_small_products_stay_where_they_are(monkeypatch):
    monkeypatch.setattr(matmul, "_LARGE", 1 << 40)
    monkeypatch.setattr(matmul, "_product", None)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(matmul.linear(x, x, None), F.linear(x, x))
        torch.testing.assert_close(matmul.mm(x, x.mT), x @ x.mT)


@pytest.mark.parametrize("bias", [torch.randn(4, 6)[:, 2], torch.randn(1).expand(4), torch.randn(8)[::2]])
def test_bias_of_any_stride(bias):
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(matmul.linear(x, w, bias), F.linear(x, w, bias))


def test_error_at_the_papers_width():
    """oneDNN adds up a long inner dimension in one go, MKL in blocks: its error must still stay within twice MKL's."""
    a, b = torch.randn(64, 2048), torch.randn(2048, 2048)
    exact = a.double() @ b.double()
    with torch.no_grad():
        ours, eager = ((r.double() - exact).norm() for r in (matmul.mm(a, b), a @ b))
    assert ours <= 2 * eager + torch.finfo(torch.float32).eps * exact.norm()
