"""What :func:`fastbf.autograd.once_differentiable` makes of a backward."""

import pytest
import torch
from torch.autograd import Function

from fastbf.autograd import once_differentiable


class Product(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    @once_differentiable("not twice")
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * y, None


def gradient(incoming):
    x, y = torch.randn(3, requires_grad=True), torch.arange(3.0)
    return torch.autograd.grad(Product.apply(x, y), x, incoming, create_graph=True)[0]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_second_derivatives_are_refused_whatever_came_in(needs_grad):
    grad = gradient(torch.ones(3, requires_grad=needs_grad))
    assert torch.equal(grad, torch.arange(3.0))
    with pytest.raises(RuntimeError, match="not twice"):
        grad.sum().backward()


def test_gradients_may_be_changed_in_place():
    assert torch.equal(gradient(torch.ones(3)).mul_(2), 2 * torch.arange(3.0))


def test_without_a_graph_gradients_are_plain_tensors():
    x = torch.randn(3, requires_grad=True)
    Product.apply(x, torch.ones(3)).sum().backward()
    assert not x.grad.requires_grad
