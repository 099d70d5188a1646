"""The rule that every result is held to: twice eager PyTorch's own error against fp64, and one rounding."""

import torch

from fastbf.dropout import Dropout, Site, attention_mask, elementwise_mask
from fastbf.reference import LayerMasks


def results(op, tensors, grad, retain_graph=False):
    """The output of ``op`` and the gradients of those tensors that require one."""
    out = op(*tensors)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad.to(out.dtype), retain_graph=retain_graph)]


def doubled(tensors):
    """The same tensors in fp64, with the same wish for gradients."""
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def assert_as_exact(ours, eager, exact, eps, names=None):
    """Each of ours within twice eager's error plus one rounding ``eps``, in the Euclidean norm; same dtypes."""
    for i, (o, e, t) in enumerate(zip(ours, eager, exact, strict=True)):
        name = names[i] if names else i
        assert o.dtype == e.dtype, name
        assert o.shape == e.shape, name
        assert o.isfinite().all(), name
        limit = 2 * (e.double() - t).norm() + eps * t.norm()
        assert (o.double() - t).norm() <= limit, (name, (o.double() - t).norm() / t.norm(), limit / t.norm())


def layer_masks(x, heads, width, seed, p, dtype=None):
    """The four multipliers of a layer call on x (N, …, C)."""
    if p == 0:
        return LayerMasks()
    dropout = Dropout(p, seed, dtype or x.dtype)
    hidden = x.new_empty(*x.shape[:-1], width)
    q = x.unflatten(-1, (heads, -1))
    return LayerMasks(
        attention_mask(dropout, q, x.shape[0]),
        elementwise_mask(dropout, Site.ATTENTION_OUTPUT, x),
        elementwise_mask(dropout, Site.ACTIVATION, hidden),
        elementwise_mask(dropout, Site.FEEDFORWARD_OUTPUT, x),
    )
