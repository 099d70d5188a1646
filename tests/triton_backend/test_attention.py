"""The attention kernels against fp64: in Triton's interpreter on a CPU, compiled where there is a GPU."""

import itertools

import pytest
import torch

import fastbf
from fastbf import reference
from fastbf.dropout import Dropout, attention_mask
from fastbf.functional import batch_attention
from fastbf.kernels import attention as kernels
from fastbf.kernels.attention_configs import Config
from tests.exact import results
from tests.triton_case import DEVICE, DTYPES, SEED

LENGTHS = (1, 2, 7, 16, 33, 127, 200)
HEAD_DIMS = (8, 24, 48, 64, 96, 128, 192, 256, 512)
RATES = (0.0, 0.1, 0.5, 1.0)

# Tiles that cut the same problem differently: several tiles each way, all keys in one tile, chunked channels.
STREAMING = (
    Config(32, 32, 64, 4, 2),
    Config(16, 128, 64, 4, 2),
    Config(64, 16, 32, 4, 2),
    Config(16, 64, 128, 4, 2),
    Config(32, 32, 64, 4, 2, reload=True),
)
# Scores keys by queries in backward; one chunk of all channels, whose weights meet their values a step later.
SPREAD = (Config(32, 16, 128, 4, 2), Config(32, 32, 512, 8, 2))
PACKED = (Config(64, 64, 64, 4, 1), Config(32, 32, 32, 4, 1))


@pytest.fixture
def force(monkeypatch):
    """force(schedule, config): what every launch uses from then on."""

    def patch(schedule, config):
        monkeypatch.setattr(kernels, "schedule", lambda n, m: schedule)
        monkeypatch.setattr(kernels, "choose", lambda *_: config)

    return patch


def inputs(n, m, *rest, dtype=torch.float32):
    return [torch.randn(x, *rest, device=DEVICE).to(dtype).requires_grad_() for x in (n, m, m)]


def formula(q, k, v, p):
    """The definition, in the dtype of its inputs, with the mask materialised."""
    seed = torch.tensor([SEED], device=q.device)
    mask = attention_mask(Dropout(p, seed, q.dtype), q, k.shape[0]) if p else None
    return reference.attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)


def assert_as_exact_as_eager(tensors, p, grad=None):
    """Output and gradients: error against fp64 at most twice that of eager PyTorch in the same dtype + one rounding."""
    q, k, v = tensors
    grad = torch.randn(q.shape, device=q.device).to(q.dtype) if grad is None else grad
    exact = results(lambda *t: formula(*t, p), [t.detach().double().requires_grad_() for t in tensors], grad.double())
    eager = results(lambda *t: formula(*t, p), tensors, grad)
    ours = results(lambda *t: batch_attention(*t, dropout_p=p, seed=SEED, backend="triton"), tensors, grad)
    for name, o, e, t in zip(("o", "dq", "dk", "dv"), ours, eager, exact, strict=True):
        limit = 2 * (e.double() - t).norm() + torch.finfo(q.dtype).eps * t.norm()
        if name in ("dq", "dk"):  # where the softmax is flat these are differences of equal numbers
            limit += torch.finfo(q.dtype).eps * grad.double().norm() * v.double().norm() * k.shape[0] ** -0.5
        assert o.isfinite().all(), name
        assert (o.double() - t).norm() <= limit, name


def cases():
    """Every length with every head dimension; the other values take turns, so that each pair of them meets."""
    turns = zip(
        itertools.product(LENGTHS, HEAD_DIMS),
        itertools.cycle(STREAMING),
        itertools.cycle((16, 200, 1, 127, 7, 33, 2)),
        itertools.cycle((0.5, 0.1, 0.0, 0.5, 0.1)),
        itertools.cycle(DTYPES),
    )
    for i, ((n, d), config, m, p, dtype) in enumerate(turns):
        positions = 40 if n * m * d <= 4096 else 3 if n * m * d <= 1 << 18 else 1
        yield pytest.param(n, m, positions, d, p, dtype, config, id=f"{i}-N{n}-M{m}-L{positions}-D{d}-p{p}-{dtype}")


@pytest.mark.parametrize(("n", "m", "positions", "d", "p", "dtype", "config"), list(cases()))
def test_streaming(n, m, positions, d, p, dtype, config, force, guards):
    force("streaming", config)
    assert_as_exact_as_eager(inputs(n, m, positions, 2, d, dtype=dtype), p)


@pytest.mark.parametrize("config", SPREAD)
@pytest.mark.parametrize(
    ("n", "m", "d", "p", "dtype"),
    [
        (1, 200, 64, 0.5, torch.float32),
        (70, 1, 24, 0.1, torch.float16),
        (64, 64, 512, 0.0, torch.float32),
        (127, 33, 504, 0.1, torch.float16),
        (100, 127, 96, 0.5, torch.float16),
    ],
)
def test_streaming_where_warps_share_out_the_scores(n, m, d, p, dtype, config, force, guards):
    force("streaming", config)
    assert_as_exact_as_eager(inputs(n, m, 2, 2, d, dtype=dtype), p)


def packed_cases():
    lengths = ((1, 1), (2, 2), (7, 7), (16, 16), (32, 32), (2, 7), (16, 1), (1, 31), (27, 3))
    turns = zip(
        itertools.product(lengths, HEAD_DIMS),
        itertools.cycle(PACKED),
        itertools.cycle((40, 1, 3, 40)),
        itertools.cycle((0.5, 0.1, 0.0, 0.5, 0.1)),
        itertools.cycle((*DTYPES, *DTYPES[::-1], *DTYPES)),
    )
    for i, (((n, m), d), config, positions, p, dtype) in enumerate(turns):
        positions = min(positions, 3) if max(n, m) * d > 2048 else positions
        yield pytest.param(n, m, positions, d, p, dtype, config, id=f"{i}-N{n}-M{m}-L{positions}-D{d}-p{p}-{dtype}")


@pytest.mark.parametrize(("n", "m", "positions", "d", "p", "dtype", "config"), list(packed_cases()))
def test_packed(n, m, positions, d, p, dtype, config, force, guards):
    force("packed", config)
    assert_as_exact_as_eager(inputs(n, m, positions, 3, d, dtype=dtype), p)


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("n", [5, 70])
def test_what_the_table_chooses(n, p, guards):
    for shape in ((2, 16), (2, 3, 2, 24)):
        assert_as_exact_as_eager(inputs(n, n, *shape), p)


def test_dropping_everything_gives_zeros():
    q, k, v = inputs(40, 40, 2, 16)
    out = batch_attention(q, k, v, dropout_p=1.0, backend="triton")
    assert not out.any()
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
@pytest.mark.parametrize(
    ("schedule", "config"),
    [("streaming", Config(bm, bn, 128, 4, 2)) for bm, bn in ((16, 16), (16, 32), (64, 64), (32, 128))]
    + [("streaming", config) for config in SPREAD]
    + [("packed", Config(b, b, 128, 4, 1)) for b in (32, 64)],
)
def test_masks_are_those_of_the_definition_bit_for_bit(schedule, config, p, force):
    force(schedule, config)
    n, m = (200, 180) if schedule == "streaming" else (20, 31)
    q = torch.zeros(n, 2, 2, 256, device=DEVICE)
    k = torch.zeros(m, 2, 2, 256, device=DEVICE)
    v = torch.eye(m, 256, device=DEVICE)[:, None, None].repeat(1, 2, 2, 1).requires_grad_()
    kept = attention_mask(Dropout(p, torch.tensor([SEED], device=DEVICE), torch.float32), q, m) > 0  # (2, 2, n, m)
    # With equal scores and a unit matrix of values, the output is the mask itself, scaled; so is v's gradient.
    out = batch_attention(q, k, v, dropout_p=p, seed=SEED, backend="triton")
    assert torch.equal(out.permute(1, 2, 0, 3)[..., :m] > 0, kept)
    unit = torch.eye(n, 256, device=DEVICE)[:, None, None].repeat(1, 2, 2, 1)
    (dv,) = torch.autograd.grad(out, v, unit)
    assert torch.equal(dv.permute(1, 2, 3, 0)[..., :n, :] > 0, kept)


@pytest.mark.parametrize("n", [9, 70])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_gradients_of_every_subset(needs, n):
    tensors = inputs(n, n, 2, 16)
    expected = torch.autograd.grad(formula(*tensors, 0.5).square().sum(), tensors)
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    out = batch_attention(*tensors, dropout_p=0.5, seed=SEED, backend="triton")
    assert out.requires_grad == any(needs)
    if any(needs):
        out.square().sum().backward()
    for t, need, e in zip(tensors, needs, expected, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [9, 70])
def test_strided_inputs_and_incoming_gradients(n, guards):
    buffer = torch.randn(3, n, 5, 2, 48, device=DEVICE)
    q, k, v = (x[..., 8:40].transpose(1, 2)[:, :, 1:].requires_grad_() for x in buffer)
    assert_as_exact_as_eager([q, k, v], 0.5, grad=torch.randn(2 * n, 2, 4, 32, device=DEVICE)[n:])
    last = torch.randn(2, 4, 32, n, device=DEVICE).movedim(-1, 0)
    assert_as_exact_as_eager([q, k, v], 0.5, grad=last)
    assert_as_exact_as_eager([q, k, v], 0.1, grad=torch.ones((), device=DEVICE).expand(q.shape))


@pytest.mark.parametrize("odd", ["rows", "last dimension", "address"])
def test_rows_that_do_not_start_at_16_bytes_are_copied(odd):
    wide = torch.randn(40 * 2 * 17 + 1, device=DEVICE)
    x = {
        "rows": wide[:-1].view(40, 2, 17)[..., :16],
        "last dimension": torch.randn(40, 16, 2, device=DEVICE).mT,
        "address": wide[1 : 40 * 2 * 16 + 1].view(40, 2, 16),
    }[odd]
    tensors = [x.detach().requires_grad_() for _ in range(3)]
    assert_as_exact_as_eager(tensors, 0.5)


@pytest.mark.parametrize("n", [9, 70])
def test_same_seed_same_bits_and_nothing_overwritten(n):
    q, k, v = inputs(n, n, 3, 2, 16)
    grad = torch.randn_like(q)
    before = [t.detach().clone() for t in (q, k, v, grad)]
    out = batch_attention(q, k, v, dropout_p=0.5, seed=SEED, backend="triton")
    first = torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
    second = torch.autograd.grad(out, (q, k, v), grad)
    again = results(lambda *t: batch_attention(*t, dropout_p=0.5, seed=SEED, backend="triton"), [q, k, v], grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip([out, *first], again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, grad), before, strict=True))


def test_packed_tiles_share_places_where_strides_are_alike_with_the_same_bits(monkeypatch):
    """Of one tensor for q, k and v, and of k and v apart; a layer's are one tensor."""
    alike, launch = [], kernels.launch

    def noting(*args):
        alike.append(args[-1]["ALIKE"])
        launch(*args)

    monkeypatch.setattr(kernels, "launch", noting)
    one = torch.randn(3, 5, 6, 16, device=DEVICE)
    together = [t.detach().requires_grad_() for t in one.split(2, dim=2)]
    grad = torch.randn(3, 5, 2, 16, device=DEVICE)
    found = []
    for tensors in (together, [together[0], *(t.detach().clone().requires_grad_() for t in together[1:])]):
        call = lambda *t: batch_attention(*t, dropout_p=0.1, seed=SEED, backend="triton")  # noqa: E731
        found.append(results(call, tensors, grad))
    assert alike == [True, True, False, False]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    alike.clear()
    layer = fastbf.BatchFormerLayer(32, 2, 32, backend="triton", device=DEVICE)
    layer(torch.randn(3, 5, 32, device=DEVICE)).sum().backward()
    assert alike == [True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("n", "config"), [(3, None), (40, None), *((40, config) for config in SPREAD)])
def test_what_is_not_finite_stays_in_its_group_and_shows(n, config, which, bad, force):
    if config:
        force("streaming", config)
    tensors = inputs(n, n, 8, 2, 16)
    with torch.no_grad():
        tensors[which][1, 3, 1, 5] = bad
    grad = torch.randn(n, 8, 2, 16, device=DEVICE)
    ours = results(lambda *t: batch_attention(*t, dropout_p=0.5, seed=SEED, backend="triton"), tensors, grad)
    eager = results(lambda *t: formula(*t, 0.5), tensors, grad)
    for o, e in zip(ours, eager, strict=True):
        assert torch.equal(o.isfinite(), e.isfinite())


@pytest.mark.parametrize("config", [None, *SPREAD])
def test_an_infinite_key_that_gets_no_weight_changes_no_other_gradient(config, force):
    if config:
        force("streaming", config)
    q, k, v = inputs(40, 40, 2, 16)
    with torch.no_grad():
        q[..., 3] = q[..., 3].abs() + 1
        k[7, :, 3] = -torch.inf
    grad = torch.randn(40, 2, 16, device=DEVICE)
    ours = results(lambda *t: batch_attention(*t, dropout_p=0.5, seed=SEED, backend="triton"), [q, k, v], grad)
    for o, e in zip(ours, results(lambda *t: formula(*t, 0.5), [q, k, v], grad), strict=True):
        torch.testing.assert_close(o, e, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("factor", [1e3, 1e-3, 0.0])
@pytest.mark.parametrize("n", [9, 70])
def test_scores_far_apart_or_equal_do_not_overflow(n, factor):
    q, k, v = inputs(n, n, 2, 16)
    q = (factor * q).detach().requires_grad_()
    grad = torch.randn_like(q)
    ours = results(lambda *t: batch_attention(*t, backend="triton"), [q, k, v], grad)
    for o, e in zip(ours, results(lambda *t: formula(*t, 0.0), [q, k, v], grad), strict=True):
        # Scores of ten thousand carry rounding errors of a thousandth, and weights the same relative ones.
        torch.testing.assert_close(o, e, rtol=5e-3, atol=5e-3)


def test_more_groups_than_a_grid_axis_takes(force):
    force("packed", Config(128, 128, 16, 4, 1))
    q, k, v = inputs(1, 2, 35_000, 2, 8)
    with torch.no_grad():
        ours = batch_attention(q, k, v, dropout_p=0.5, seed=SEED, backend="triton")
        torch.testing.assert_close(ours, formula(q, k, v, 0.5))


@pytest.mark.parametrize("schedule", ["packed", "streaming"])
def test_offsets_past_two_to_the_31(schedule, force):
    force(schedule, Config(32, 32, 16, 4, 2))
    stride = (1 << 30) + 8  # elements; the third row starts past 2³¹
    buffer = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    far = [buffer.as_strided((3, 1, 16), (stride, 16, 1), offset) for offset in (0, 16, 32)]
    near = inputs(3, 3, 1, 16, dtype=torch.float16)
    for x, y in zip(far, near, strict=True):
        x.copy_(y.detach())
    with torch.no_grad():
        expected, ours = (batch_attention(*t, backend="triton") for t in (near, far))
    assert torch.equal(ours, expected)
    do = torch.randn(3, 1, 16, device=DEVICE).half()
    o = torch.empty(3, 1, 16, dtype=torch.float16, device=DEVICE)
    lse = torch.empty(1, 3, device=DEVICE) if schedule == "streaming" else None
    options = kernels.Options(0.25)
    kernels.forward(*near, options, o=o, lse=lse)
    wanted = [torch.empty(3, 1, 16, dtype=torch.float16, device=DEVICE) for _ in range(3)]
    for grads in (wanted, far):
        kernels.backward(do, kernels.Inputs(*near, o, lse), options, kernels.Gradients(*grads))
    assert all(torch.equal(x, y) for x, y in zip(far, wanted, strict=True))


def layer_pair(dropout=0.5, **options):
    ours = fastbf.BatchFormer(32, dropout=dropout, backend="triton", device=DEVICE, **options)
    theirs = fastbf.BatchFormer(32, dropout=dropout, backend="torch", device=DEVICE, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.usefixtures("counter_based")
@pytest.mark.parametrize("shape", [(6, 32), (70, 32), (5, 7, 32)])
@pytest.mark.parametrize("options", [{}, {"norm_first": True, "num_layers": 2}])
def test_the_layer_on_both_backends(shape, options):
    x = torch.randn(shape, device=DEVICE)
    outcomes = []
    for former in layer_pair(**options):
        torch.manual_seed(1)
        out = former(x)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), list(former.parameters()))])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


def test_the_layer_reads_and_writes_the_gemms_buffer(monkeypatch):
    """q, k, v are views of one buffer, and so are their gradients: nothing is transposed or copied."""
    seen = []
    for name in ("forward", "backward"):
        launcher = getattr(kernels, name)

        def spy(*tensors, launcher=launcher, **options):
            seen.append(tensors)
            return launcher(*tensors, **options)

        monkeypatch.setattr(kernels, name, spy)
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("a copy"))
    layer_pair()[0].mix(torch.randn(40, 3, 32, device=DEVICE)).sum().backward()
    (q, k, v, *_), (_, _, _, (dq, dk, dv)) = seen
    for first, second, third in ((q, k, v), (dq, dk, dv)):
        assert first.stride() == (3 * 96, 96, 8, 1)
        assert second.data_ptr() - first.data_ptr() == third.data_ptr() - second.data_ptr() == 32 * first.itemsize


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES[2:]])
def test_autocast(dtype):
    former = layer_pair()[0]
    with torch.autocast(DEVICE.type, dtype=dtype):
        q, k, v = inputs(40, 40, 2, 16)
        assert batch_attention(q, k, v, backend="triton").dtype == dtype
        out = former(torch.randn(40, 32, device=DEVICE))
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in former.parameters())


def test_evaluation_on_the_triton_backend():
    ours, theirs = (former.eval() for former in layer_pair())
    x = torch.randn(40, 32, device=DEVICE)
    torch.testing.assert_close(ours.mix(x), theirs.mix(x), rtol=1e-4, atol=1e-5)


def qkv(d=16, dtype=torch.float32, m=4):
    return [torch.randn(x, 2, d, dtype=dtype, device=DEVICE) for x in (4, m, m)]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (qkv(d=12), "head dimension is 12; kernels take multiples of 8 up to 512"),
        (qkv(d=520), "head dimension is 520"),
        (qkv(dtype=torch.float64), "take fp32, fp16 and bf16, not torch.float64"),
        (qkv(m=0), "a tensor is empty"),
    ],
)
def test_what_no_kernel_covers(tensors, reason):
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: .*{reason}"):
        batch_attention(*tensors, backend="triton")
    choice = fastbf.explain("batch_attention", *tensors, backend="auto")
    assert choice.backend == "torch"
    assert batch_attention(*tensors).shape == tensors[0].shape


def test_a_layer_whose_heads_no_kernel_covers():
    layer = fastbf.BatchFormer(24, num_heads=4, backend="triton", device=DEVICE)
    with pytest.raises(ValueError, match="head dimension is 6"):
        layer(torch.randn(4, 24, device=DEVICE))


def test_the_choice_is_explained():
    choice = fastbf.explain("batch_attention", *qkv(), backend="triton")
    assert choice == ("triton", "a Triton kernel covers batch_attention for these tensors.")
    layer = fastbf.BatchFormer(32, backend="triton", device=DEVICE)
    assert "all of encoder_layer" in fastbf.explain(layer, torch.randn(4, 32, device=DEVICE)).reason
