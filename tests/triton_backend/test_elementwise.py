"""The elementwise kernels against fp64: in Triton's interpreter on a CPU, compiled where there is a GPU."""

import itertools

import pytest
import torch

from fastbf import reference
from fastbf.dropout import Dropout, Site, elementwise_mask
from fastbf.functional import activation_dropout, dropout_add_layer_norm
from fastbf.kernels.limits import KIB, Limits
from fastbf.kernels.rows import Rows, norm_tile, partial_sums
from tests.exact import assert_as_exact, doubled, results
from tests.triton_case import DEVICE, DTYPES, SEED

CHANNELS = (1, 7, 32, 33, 250, 512, 1000, 2048, 3000, 5000, 8192)
RATES = (0.5, 0.1, 0.0, 1.0)
#: Samples, positions, and whether memory holds (L, N, C).
LAYOUTS = ((33, (), False), (1, (), False), (5, (3,), False), (3, (2, 2), False), (5, (7,), True), (2, (3, 2), True))


def features(samples, positions, position_major, channels, dtype):
    if position_major:
        x = torch.randn(*positions, samples, channels, device=DEVICE).movedim(-2, 0)
    else:
        x = torch.randn(samples, *positions, channels, device=DEVICE)
    return x.to(dtype).requires_grad_()


def mask(site, x, p, dtype):
    return elementwise_mask(Dropout(p, torch.tensor([SEED], device=x.device), dtype), site, x) if p else None


def cases():
    turns = zip(
        CHANNELS * 3, itertools.cycle(LAYOUTS), itertools.cycle((0.5, 0.1, 0.5, 0.0, 1.0)), itertools.cycle(DTYPES)
    )  # fmt: skip
    for i, (channels, layout, p, dtype) in enumerate(turns):
        yield pytest.param(channels, *layout, p, dtype, id=f"{i}-C{channels}-N{layout[0]}-p{p}-{dtype}")


@pytest.mark.parametrize(("channels", "samples", "positions", "position_major", "p", "dtype"), list(cases()))
def test_add_norm(channels, samples, positions, position_major, p, dtype, guards):
    x, residual = (features(samples, positions, position_major, channels, dtype) for _ in range(2))
    weight, bias = (torch.randn(channels, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
    bias = bias if channels % 2 else None
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    grad = torch.randn_like(residual)

    def formula(x, residual, weight, bias=None):
        multiplier = mask(Site.ATTENTION_OUTPUT, x, p, x.dtype)
        return reference.dropout_add_layer_norm(x, residual, weight, bias, eps=1e-5, mask=multiplier)

    def ours(x, residual, weight, bias=None):
        return dropout_add_layer_norm(
            x, residual, weight, bias, dropout_p=p, eps=1e-5, seed=SEED, backend="triton"
        )  # fmt: skip

    exact = results(formula, doubled(tensors), grad.double())
    mine = results(ours, tensors, grad)
    # A norm of one channel gives no gradient: what both have is the rounding of differences.
    scale = grad.double().norm() if channels == 1 else 0
    for o, e, t in zip(mine, results(formula, tensors, grad), exact, strict=True):
        limit = 2 * (e.double() - t).norm() + torch.finfo(dtype).eps * (t.norm() + scale)
        assert o.isfinite().all()
        assert (o.double() - t).norm() <= limit
    assert mine[0].stride() == x.stride()


def activation_cases():
    turns = zip(
        CHANNELS * 2, itertools.cycle(LAYOUTS), itertools.cycle(("relu", "gelu", "gelu")), itertools.cycle(RATES),
        itertools.cycle(DTYPES),
    )  # fmt: skip
    for i, (width, layout, activation, p, dtype) in enumerate(turns):
        yield pytest.param(width, *layout, activation, p, dtype, id=f"{i}-F{width}-{activation}-p{p}-{dtype}")


@pytest.mark.parametrize(
    ("width", "samples", "positions", "position_major", "activation", "p", "dtype"), list(activation_cases())
)
def test_activation(width, samples, positions, position_major, activation, p, dtype, guards):
    h = features(samples, positions, position_major, width, dtype)
    grad = torch.randn_like(h)

    def formula(h):
        return reference.activation_dropout(h, activation, mask=mask(Site.ACTIVATION, h, p, h.dtype))

    def ours(h):
        return activation_dropout(h, activation, dropout_p=p, seed=SEED, backend="triton")

    exact = results(formula, doubled([h]), grad.double())
    mine = results(ours, [h], grad)
    assert_as_exact(mine, results(formula, [h], grad), exact, torch.finfo(dtype).eps)
    assert torch.equal(mine[0] == 0, exact[0].to(dtype) == 0)


@pytest.mark.parametrize("value", [0.0, 1e-3, 1e3, -5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows(value, dtype):
    x = torch.zeros(5, 40, dtype=dtype, device=DEVICE, requires_grad=True)
    residual = torch.full((5, 40), value, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.ones(40, dtype=dtype, device=DEVICE, requires_grad=True)
    out = dropout_add_layer_norm(x, residual, weight, weight, dropout_p=0.0, eps=1e-5, backend="triton")
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-2, rtol=0)
    grads = torch.autograd.grad(out, [x, residual, weight], torch.randn_like(out))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("needed", [s for n in (1, 2, 3) for s in itertools.combinations(range(4), n)])
def test_gradients_of_any_subset(needed):
    tensors = [torch.randn(6, 24, device=DEVICE), torch.randn(6, 24, device=DEVICE)]
    tensors += [torch.randn(24, device=DEVICE), torch.randn(24, device=DEVICE)]
    grad = torch.randn(24, 6, device=DEVICE).t()  # not contiguous

    def gradients(which):
        inputs = [t.clone().requires_grad_(i in which) for i, t in enumerate(tensors)]
        out = dropout_add_layer_norm(*inputs, dropout_p=0.5, eps=1e-5, seed=3, backend="triton")
        return torch.autograd.grad(out, [inputs[i] for i in which], grad)

    everything = gradients(range(4))
    for i, g in zip(needed, gradients(needed), strict=True):
        assert torch.equal(g, everything[i])


def test_dtypes_may_differ():
    x, residual = torch.randn(6, 24).half().to(DEVICE), torch.randn(6, 24).to(DEVICE)
    weight = torch.randn(24).to(DEVICE)
    out, expected = (
        dropout_add_layer_norm(x, residual, weight, None, dropout_p=0.1, eps=1e-5, seed=1, backend=backend)
        for backend in ("triton", "torch")
    )
    assert out.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_dtypes_under_autocast(dtype):
    x, weight = torch.randn(6, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype):
        for a, b in ((x, x), (x.to(dtype), x), (x.to(dtype), x.to(dtype))):
            outs = [
                dropout_add_layer_norm(a, b, weight, weight, dropout_p=0.0, eps=1e-5, backend=backend)
                for backend in ("triton", "torch")
            ]
            assert outs[0].dtype == outs[1].dtype
            torch.testing.assert_close(*outs, rtol=1e-2, atol=1e-2)


def test_more_channels_than_a_row_holds():
    x = torch.randn(2, 8200, device=DEVICE)
    with pytest.raises(ValueError, match="there are 8200 channels; kernels that normalise take up to 8192"):
        dropout_add_layer_norm(x, x, x[0], None, dropout_p=0.0, eps=1e-5, backend="triton")


def test_what_is_not_finite_stays_in_its_row():
    x = torch.randn(5, 24, device=DEVICE)
    x[2, 3], x[4, 5] = float("nan"), float("inf")
    weight = torch.ones(24, device=DEVICE)
    out = dropout_add_layer_norm(x, x, weight, None, dropout_p=0.5, eps=1e-5, seed=1, backend="triton")
    assert out[[0, 1, 3]].isfinite().all()
    assert out[2].isnan().all()
    for name in ("relu", "gelu"):
        ours = activation_dropout(x, name, dropout_p=0.0, backend="triton")
        exact = reference.activation_dropout(x.double(), name)
        torch.testing.assert_close(ours.double(), exact, equal_nan=True, rtol=1e-5, atol=1e-6)


H100 = Limits(227 * KIB, 132, (9, 0), 80 * KIB**3)


@pytest.mark.parametrize("rows", [1, 3, 4, 100, 5000, 1 << 20])
def test_few_partial_sums(rows):
    parts = partial_sums(rows, H100)
    assert 1 <= parts <= max(1, min(264, rows // 4))


@pytest.mark.parametrize("kernel", ["add_norm_forward", "add_norm_backward"])
def test_tiles_hold_whole_rows(kernel):
    for channels in range(1, 8193):
        tile = norm_tile(kernel, channels)
        assert tile.channels >= channels
        assert tile.rows * tile.channels <= 8192
        assert tile.channels < 2 * channels or tile.channels == 32


def test_rows_know_their_fork():
    for samples, positions in ((3, 4), (5, 1)):
        for position_major in (False, True):
            rows = Rows(samples, positions, position_major)
            fork = torch.arange(2 * rows.total())
            shape = (positions, 2, samples) if position_major else (2, samples, positions)
            mixed = fork.view(shape).select(1 if position_major else 0, 1).flatten()
            skipped, half = rows.fork()
            index = torch.arange(rows.total())
            assert torch.equal(mixed, index + index // rows.inner() * skipped + half)


@pytest.mark.parametrize("which", ["residual", "x", "weight", "bias"])
@pytest.mark.parametrize("kind", ["slice", "every other", "expanded"])
def test_strides(which, kind):
    """Kernels read rows and parameters without gaps; what has gaps is copied."""
    tensors = {name: torch.randn(6, 32, device=DEVICE) for name in ("x", "residual")}
    tensors |= {name: torch.randn(32, device=DEVICE) for name in ("weight", "bias")}
    shape = tensors[which].shape
    wide = torch.randn(*shape[:-1], 64, device=DEVICE)
    ways = {"slice": wide[..., 7:39], "every other": wide[..., ::2], "expanded": wide[..., :1].expand(shape)}
    tensors[which] = ways[kind]
    calls = [dropout_add_layer_norm(**tensors, dropout_p=0.5, eps=1e-5, seed=3, backend=b) for b in ("triton", "torch")]
    torch.testing.assert_close(*calls)
