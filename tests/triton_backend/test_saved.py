"""What an encoder layer keeps for backward, in bytes, against what its docstrings say."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastbf.functional import encoder_layer
from tests.triton_backend.test_encoder_layer import features, weights
from tests.triton_case import DEVICE

N, C = 40, 32


def saved_bytes(x, tensors, dtype, **options):
    """Of all tensors saved, their storages counted once, without those of x and the parameters."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t), torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
        out = encoder_layer(x, *tensors, num_heads=4, dropout_p=0.5, backend="triton", **options)
    for t in (x, *tensors):
        storages.pop(t.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())


def statistics(heads=4):
    return 4 * heads * N + 8  # the log-sum-exp and the seed


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("plain", [False, True])
def test_in_one_dtype(activation, plain):
    x = features(N, (), C)
    options = {"activation": activation, "plain": x if plain else None}
    for dtype in (torch.float32, torch.float16):
        x, tensors = x.detach().to(dtype).requires_grad_(), weights(C, C, dtype)
        options["plain"] = x if plain else None
        size = saved_bytes(x, tensors, None, **options)
        assert size == N * 8 * C * dtype.itemsize + statistics()  # 16C in two bytes an element


def test_under_autocast():
    tensors = weights(C, C)
    cast = 2 * 6 * C * C
    assert saved_bytes(features(N, (), C), tensors, torch.float16) == N * 22 * C + statistics() + cast


def test_norm_first():
    # x is there anyway; no second sum, but both norms' results.
    size = saved_bytes(features(N, (), C), weights(C, C), None, norm_first=True)
    assert size == N * 8 * C * 4 + statistics()
