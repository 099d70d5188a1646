"""Results lie in memory as those of the PyTorch code that a module replaces, in training and in evaluation."""

import random

import pytest
import torch
from torch import nn

from fastbf import BatchFormer, BatchFormerLayer
from tests.triton_case import DEVICE

N, L, C = 5, 3, 32
BACKENDS = ("torch", "triton")
LAYOUTS = {
    "contiguous": lambda: torch.randn(N, L, C, device=DEVICE),
    "other first": lambda: torch.randn(L, N, C, device=DEVICE).transpose(0, 1),
    "channels second": lambda: torch.randn(N, C, L, device=DEVICE).transpose(1, 2),
    "backwards": lambda: torch.randn(C, L, N, device=DEVICE).permute(2, 1, 0),
    "every second": lambda: torch.randn(N, 2 * L, C, device=DEVICE)[:, ::2],
    "first channels": lambda: torch.randn(N, L, 2 * C, device=DEVICE)[:, :, :C],
    "two dimensions": lambda: torch.randn(N, C, device=DEVICE),
    "two, transposed": lambda: torch.randn(C, N, device=DEVICE).T,
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer(backend, batch_first, norm_first, training, make):
    options = {"dropout": 0.0, "batch_first": batch_first, "norm_first": norm_first, "device": DEVICE}
    theirs = nn.TransformerEncoderLayer(C, 2, C, **options).train(training)
    ours = BatchFormerLayer(C, 2, C, **options, backend=backend).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = make()
    for recorded in (True, False):  # without gradients the evaluation takes PyTorch's inference path
        with torch.set_grad_enabled(recorded):
            found, expected = ours(x), theirs(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_and_a_mix_can_be_viewed(backend, num_layers, make):
    x = make()
    former = BatchFormer(C, num_layers=num_layers, backend=backend, device=DEVICE)
    assert former(x).is_contiguous()
    assert former.mix(x).is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_in_the_second_dimension(backend):
    former = BatchFormer(C, batch_dim=1, backend=backend, device=DEVICE)
    for x in (torch.randn(L, N, C, device=DEVICE), torch.randn(N, L, C, device=DEVICE).transpose(0, 1)):
        assert former(x).is_contiguous()
        assert former.mix(x).is_contiguous()


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((4, 5), torch.channels_last), ((2, 3, 2), torch.channels_last_3d)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_maps_keep_their_format(backend, shape, channels_last):
    former = BatchFormer(C, channel_dim=1, backend=backend, device=DEVICE)
    x = torch.randn(N, C, *shape, device=DEVICE)
    for features, kept in ((x, torch.contiguous_format), (x.contiguous(memory_format=channels_last), channels_last)):
        for out in (former(features), former.mix(features)):
            assert out.is_contiguous(memory_format=kept)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_under_a_compiler_and_under_transforms(norm_first, batch_first):
    """Strides are symbols for the one; the others tell no memory formats."""
    layer = BatchFormerLayer(C, 2, C, dropout=0.0, norm_first=norm_first, batch_first=batch_first)
    x = torch.randn(L, N, C).transpose(0, 1)
    for dynamic in (False, True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x), layer(x))
    both = torch.stack([x, 2 * x]).transpose(1, 2)
    torch.testing.assert_close(torch.func.vmap(layer)(both), torch.stack([layer(part) for part in both]))


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.transpose(-1, -2), lambda x: x.movedim(1, -1)])
def test_feature_maps_under_transforms(make):
    x = make(torch.randn(N, C, 4, 4))
    former = BatchFormer(C, channel_dim=1 if x.shape[1] == C else -1, dropout=0.0)
    many = x.unsqueeze(0).expand(2, *x.shape)
    torch.testing.assert_close(torch.func.vmap(former)(many)[1], former(x))
    maps = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.func.vmap(former)(maps.unsqueeze(0).expand(2, *x.shape))[1], former(x))


def drawn(shape, draw):
    """A tensor of a shape whose dimensions lie in any order in memory, some with gaps and some expanded."""
    order = draw.sample(range(len(shape)), len(shape))
    if draw.random() < 0.4:
        order = [0, *range(2, len(shape)), 1]  # channels last
    gaps = [draw.random() < 0.2 for _ in shape]
    whole = torch.randn([shape[dim] * (2 if gaps[dim] else 1) for dim in order])
    whole = whole[tuple(slice(None, None, 2 if gaps[dim] else 1) for dim in order)]
    x = whole.permute([order.index(dim) for dim in range(len(shape))])
    at = draw.randrange(len(shape) - 1)
    return x.narrow(at, 0, 1).expand(shape) if draw.random() < 0.2 else x


def dense_strides(x):
    """Those of dimensions of more than one, which alone matter."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("seed", range(10))
def test_drawn_layouts_of_a_fork(seed):
    draw = random.Random(seed)
    for _ in range(10):
        spatial = [draw.choice([1, 2, 6]) for _ in range(draw.choice([1, 2, 2, 3]))]
        x = drawn([draw.choice([1, 2, 6]), 8, *spatial], draw)
        fork = BatchFormer(8, 2, channel_dim=1, backend="torch")(x)
        assert dense_strides(fork) == dense_strides(torch.cat([x, x])), (x.shape, x.stride())


@pytest.mark.parametrize("seed", range(10))
def test_drawn_layouts_of_a_layer(seed):
    draw = random.Random(seed)
    for _ in range(10):
        x = drawn([draw.choice([1, 2, 6]), draw.choice([1, 2, 6]), 8], draw)
        options = {"batch_first": draw.random() < 0.5, "norm_first": draw.random() < 0.5, "dim_feedforward": 8}
        training, grad = draw.random() < 0.5, draw.random() < 0.5
        ours = BatchFormerLayer(8, 2, **options, backend="torch").train(training)
        theirs = nn.TransformerEncoderLayer(8, 2, **options).train(training)
        with torch.set_grad_enabled(grad):
            assert dense_strides(ours(x)) == dense_strides(theirs(x)), (x.shape, x.stride(), options, training, grad)
