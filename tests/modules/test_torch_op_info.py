"""``linear_cross_entropy`` with the unit matrix as weight, on the inputs that PyTorch tests its own loss with."""

import pytest
import torch
import torch.nn.functional as F

from fastbf.functional import linear_cross_entropy
from tests.triton_case import DEVICE

operators = pytest.importorskip(
    "torch.testing._internal.common_methods_invocations", reason="this torch lacks its table of operators"
)
INFO = next(op for op in operators.op_db if op.name == "nn.functional.cross_entropy")


def classes_last(x):
    """(N, K, …) → (N, …, K), what has no rows gets one."""
    return x.unsqueeze(0) if x.dim() == 1 else x.movedim(1, -1)


def samples(device, dtype):
    torch.manual_seed(0)
    return list(INFO.sample_inputs(device, dtype, requires_grad=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_values_and_gradients(backend):
    device, dtype = ("cpu", torch.float64) if backend == "torch" else (DEVICE, torch.float32)
    found = samples(device, dtype)
    assert len(found) > 20
    for sample in found:
        logits, (target, *_), options = sample.input, sample.args, sample.kwargs
        theirs = F.cross_entropy(logits, target, **options)
        if backend == "triton":  # whose kernels give probabilities no gradient
            target = target.detach()
        x = classes_last(logits)
        target = classes_last(target) if target.is_floating_point() else target.reshape(x.shape[:-1])
        unit = torch.eye(x.shape[-1], dtype=dtype, device=device)
        ours = linear_cross_entropy(x, unit, target, backend=backend, **options)
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, equal_nan=True)
        grad = torch.randn_like(theirs)
        grads = [torch.autograd.grad(out, logits, g) for out, g in ((ours, grad.reshape(ours.shape)), (theirs, grad))]
        torch.testing.assert_close(*grads, equal_nan=True)
