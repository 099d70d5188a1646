"""The classifier's kernels against fp64: in Triton's interpreter on a CPU, compiled where there is a GPU."""

import itertools
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastbf
from fastbf import checks
from fastbf.functional import linear_cross_entropy
from fastbf.kernels import cross_entropy
from fastbf.triton_backend import classifier
from tests.exact import assert_as_exact, doubled, results
from tests.triton_case import DEVICE, DTYPES

N, C = 11, 9


def case(k, forked=True, dtype=torch.float32, ignored=(), n=N, soft=False):
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((n * (2 if forked else 1), C), (k, C), (k,))]
    y = (torch.rand(n, k, device=DEVICE) * 4 / k).to(dtype) if soft else torch.randint(0, k, (n,), device=DEVICE)
    for i in ignored:
        y[i] = -100
    return [t.to(dtype).requires_grad_() for t in tensors], y


def written_out(x, w, b, y, logit_bias=None, scale=1.0, weight=None, **options):
    logits = F.linear(x, w, b) * scale
    if logit_bias is not None:
        logits = logits + logit_bias
    y = y if x.shape[0] == y.shape[0] else torch.cat([y, y])
    y = y.to(logits.dtype) if y.is_floating_point() else y
    return F.cross_entropy(logits, y, None if weight is None else weight.to(logits.dtype), **options)


def check(tensors, y, stats=False, mode="whole", **options):
    """Loss and all gradients, by the rule of ``assert_as_exact``; ``logit_bias`` is the last of the tensors."""

    def ours(x, w, b, logit_bias):
        call = {"linear_bias": b, "logit_bias": logit_bias, "stats": stats, "backend": "triton", **options}
        loss = linear_cross_entropy(x, w, y, **call)
        return loss[0] if stats else loss

    def eager(x, w, b, logit_bias):
        return written_out(x, w, b, y, logit_bias, **options)

    grad = torch.rand_like(eager(*tensors).detach())
    exact = results(eager, doubled(tensors), grad.double())
    # Logits that are kept have a gradient in chunks beside them only if they may be needed again.
    found, theirs = results(ours, tensors, grad, retain_graph=mode == "kept"), results(eager, tensors, grad)
    assert_as_exact(found, theirs, exact, torch.finfo(tensors[0].dtype).eps)


#: How rows are worked on: all at once; in chunks, with the logits kept; in chunks, with the logits made again.
MODES = ("whole", "kept", "recomputed")
SETTINGS = {
    "forked": (False, True),
    "soft": (False, True),
    "weight": (False, True),
    "smoothing": (0.0, 0.1),
    "logit_bias": (False, True),
    "reduction": ("mean", "sum", "none"),
    "linear_bias": (False, True),
    "scale": (1.0, 2.5),
    "stats": (False, True),
    "k": (3, 7, 33, 101, 1000, 5000),
    "mode": MODES,
    "dtype": DTYPES,
}


@pytest.fixture
def rows_in(monkeypatch):
    """Sets how rows are worked on."""

    def choose(mode, rows=4):
        if mode != "whole":
            monkeypatch.setattr(classifier, "MIN_ROWS", rows)
            monkeypatch.setattr(classifier, "CHUNK", 0)
            monkeypatch.setattr(classifier, "KEPT", 0 if mode == "recomputed" else 1)

    return choose


def option_cases():
    """All combinations of the first six settings, with the rest drawn at random; every pair of any two meets."""
    names, draw = list(SETTINGS), random.Random(2)
    cases = [
        (*first, *(draw.choice(SETTINGS[name]) for name in names[6:]))
        for first in itertools.product(*(SETTINGS[name] for name in names[:6]))
    ]
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs = set(itertools.product(SETTINGS[names[a]], SETTINGS[names[b]]))
        assert {(case[a], case[b]) for case in cases} == pairs, (names[a], names[b])
    return [dict(zip(names, case, strict=True)) for case in cases]


@pytest.mark.parametrize("setting", option_cases(), ids=lambda s: "-".join(map(str, s.values())))
def test_options(setting, guards, rows_in):
    rows_in(setting["mode"])
    k, dtype = setting["k"], setting["dtype"]
    tensors, y = case(k, setting["forked"], dtype, () if setting["soft"] else (2, 5), soft=setting["soft"])
    if not setting["linear_bias"]:
        tensors[2] = None
    weight = torch.rand(k, device=DEVICE) if setting["weight"] else None
    logit_bias = torch.randn(k, device=DEVICE).to(dtype).requires_grad_() if setting["logit_bias"] else None
    options = {"weight": weight, "label_smoothing": setting["smoothing"], "reduction": setting["reduction"]}
    check([*tensors, logit_bias], y, setting["stats"], setting["mode"], scale=setting["scale"], **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n", "k"), [*itertools.product((1, 2, 33), (1, 2, 7, 101)), (300, 2), (300, 101), (1, 1000), (5, 1000), (3, 8142)]
)
def test_sizes(n, k, mode, rows_in):
    rows_in(mode, rows=4 if n < 300 else 130)
    tensors, y = case(k, n=n)
    check([*tensors, None], y, mode=mode)


def test_a_million_classes():
    tensors, y = case(1_000_000, forked=False, n=1)
    check([*tensors, None], y)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="2^32 logits are too many for the interpreter")
@pytest.mark.parametrize("mode", MODES)
def test_more_logits_than_32_bits_count(mode, rows_in):
    rows_in(mode, rows=8192)
    x, w = torch.randn(131_072, 64, device=DEVICE), torch.randn(32_768, 64, device=DEVICE) / 8
    y = torch.randint(0, 32_768, (65_536,), device=DEVICE)
    x, w = (t.bfloat16().requires_grad_() for t in (x, w))
    calls = [linear_cross_entropy(x, w, y, backend=backend) for backend in ("triton", "torch")]
    torch.testing.assert_close(*calls, rtol=1e-2, atol=1e-2)
    for a, e in zip(*(torch.autograd.grad(loss, (x, w)) for loss in calls), strict=True):
        assert (a - e).norm() <= 0.02 * e.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_gradients_of_any_subset(needs, mode, rows_in):
    rows_in(mode)
    tensors, y = case(7)
    tensors.append(torch.randn(7, device=DEVICE))
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    wanted = [t for t in tensors if t.requires_grad]
    x, w, b, logit_bias = tensors
    loss = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=logit_bias, backend="triton")
    assert loss.requires_grad == any(needs)
    if wanted:
        expected = torch.autograd.grad(written_out(x, w, b, y, logit_bias), wanted)
        for a, e in zip(torch.autograd.grad(loss, wanted, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
        first, again = (torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(smoothing, reduction, mode, rows_in):
    rows_in(mode)
    tensors, y = case(7, ignored=range(N))
    options = {"label_smoothing": smoothing, "reduction": reduction}
    ours = linear_cross_entropy(*tensors[:2], y, linear_bias=tensors[2], backend="triton", **options)
    theirs = written_out(*tensors, y, **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for a, e in zip(*(torch.autograd.grad(out.sum(), tensors) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


@pytest.mark.parametrize("k", [7, 5000])
@pytest.mark.parametrize("off", [slice(0, 1), slice(-1, None), slice(0, 4)])
def test_classes_switched_off(k, off):
    """A whole tile of them as well."""
    tensors, y = case(k)
    off = slice(0, 3000) if off == slice(0, 4) and k > 3000 else off
    bias = torch.zeros(k, device=DEVICE)
    bias[off] = -torch.inf
    y[:] = k - 2
    check([*tensors, bias], y)
    y[0] = torch.arange(k, device=DEVICE)[off][0]
    assert linear_cross_entropy(*tensors[:2], y, logit_bias=bias, backend="triton") == torch.inf


@pytest.mark.parametrize("value", [1e4, -1e4, torch.inf, torch.nan])
def test_extreme_inputs(value):
    (x, w, b), y = case(7)
    with torch.no_grad():
        x[1] *= value
    ours, theirs = linear_cross_entropy(x, w, y, linear_bias=b, backend="triton"), written_out(x, w, b, y)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    for a, e in zip(*(torch.autograd.grad(out, (x, w, b)) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="stops a GPU, see below")
def test_an_index_out_of_range_is_not_read_and_shows(monkeypatch):
    (x, w, b), y = case(7)
    y[3] = 10**12
    monkeypatch.setattr(checks, "class_indices", lambda *_: None)  # which no GPU waits for
    finish, of_rows = cross_entropy.finish, []
    monkeypatch.setattr(cross_entropy, "finish", lambda rows, **to: (of_rows.append(rows), finish(rows, **to)))
    loss, _ = linear_cross_entropy(x, w, y, linear_bias=b, reduction="none", stats=True, backend="triton")
    bad = torch.zeros(2 * N, dtype=torch.bool, device=DEVICE)
    bad[[3, N + 3]] = True
    assert torch.equal(loss.isnan(), bad)
    assert torch.equal(of_rows[0][4] == -1, bad)  # on which a GPU's assertion fails
    (dx,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(dx.isnan().all(1), bad)
    assert dx[~bad].isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("classes", "soft"), [(7, False), (7, True), (5000, False)])
def test_statistics(classes, soft, prior, bias, mode, rows_in):
    """With a prior that says class 0 to nearly all rows, predictions, which do without it, are other ones."""
    rows_in(mode)
    (x, w, b), y = case(classes, ignored=() if soft else (1,), soft=soft)
    weight = torch.rand(classes, device=DEVICE)
    logit_bias = torch.tensor([50.0, *[0.0] * (classes - 1)], device=DEVICE) if prior else None
    options = {"linear_bias": b if bias else None, "weight": weight, "logit_bias": logit_bias, "stats": True}
    calls = [linear_cross_entropy(x, w, y, backend=backend, **options) for backend in ("triton", "torch")]
    for ours, theirs in zip(*((loss, *stats) for loss, stats in calls), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not calls[0][1].loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("rows", [4, 6, 10, 30])  # of a stream: one part, two that differ, and more than are added up
def test_numbers_of_many_rows_are_added_up_in_parts(rows, streams, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "PART", 4)
    monkeypatch.setattr(cross_entropy, "_MOST_PARTS", 4)
    (x, w, b), y = case(7, forked=streams == 2, n=rows, ignored=(1,))
    options = {"linear_bias": b, "weight": torch.rand(7, device=DEVICE), "reduction": reduction, "stats": True}
    calls = [linear_cross_entropy(x, w, y, backend=backend, **options) for backend in ("triton", "torch")]
    for ours, theirs in zip(*((loss, *stats) for loss, stats in calls), strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(loss, (x, w, b)) for loss, _ in calls)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("others", [(1, 2), (1, 4999)])
def test_the_first_of_equal_logits_counts(others):
    """In one tile, and in two."""
    w = torch.zeros(5000, 1, device=DEVICE)
    w[list(others)] = 3.0
    for y, right in zip(others, (1.0, 0.0), strict=True):
        target = torch.full((2,), y, device=DEVICE)
        call = linear_cross_entropy(torch.ones(2, 1, device=DEVICE), w, target, stats=True, backend="triton")
        assert call[1].accuracy == right


@pytest.mark.parametrize("mode", MODES)
def test_strides(mode, rows_in):
    rows_in(mode)
    x = torch.randn(C, 2 * N, 5, device=DEVICE, requires_grad=True)
    w = torch.randn(C, 7, device=DEVICE, requires_grad=True)
    logit_bias = torch.randn(7, 2, device=DEVICE)[:, 0]
    y = torch.randint(0, 7, (5, N), device=DEVICE).T
    calls = [
        linear_cross_entropy(x.movedim(0, -1), w.T, y, logit_bias=logit_bias, reduction="none", backend=backend)
        for backend in ("triton", "torch")
    ]
    assert calls[0].shape == (2 * N, 5)
    torch.testing.assert_close(*calls)
    grad = torch.rand(5, 2 * N, device=DEVICE).T
    for a, e in zip(*(torch.autograd.grad(out, (x, w), grad) for out in calls), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES[2:]])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast(dtype, weight_dtype):
    """The dtypes of eager PyTorch, whatever the parameters'."""
    (x, w, b), y = case(7)
    w = w.detach().to(weight_dtype).requires_grad_()
    with torch.autocast(DEVICE.type, dtype=dtype):
        ours = linear_cross_entropy(x, w, y, linear_bias=b, backend="triton")
        theirs = written_out(x, w, b, y)
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    for a, e in zip(*(torch.autograd.grad(out, (x, w, b)) for out in (ours, theirs)), strict=True):
        assert a.dtype == e.dtype
        assert (a - e).norm() <= 0.02 * e.norm()


def test_what_the_kernels_leave_to_pytorch():
    (x, w, _), y = case(7)
    soft = torch.rand(N, 7, device=DEVICE, requires_grad=True)
    for target, options, reason in (
        (soft, {}, "give probabilities no gradient"),
        (soft.detach(), {"weight": torch.rand(7, device=DEVICE, requires_grad=True)}, "give class weights no gradient"),
        (y, {"logit_bias": torch.rand(7, device=DEVICE).double()}, "logit_bias is fp64"),
    ):
        with pytest.raises(ValueError, match=reason):
            linear_cross_entropy(x, w, target, backend="triton", **options)
        assert linear_cross_entropy(x, w, target, **options).isfinite()


def test_contrastive_use_replaces_four_losses():
    """The queries of MoCo v3 with BatchFormer, plain and mixed, of two views, against the other view's keys."""
    q1, m1, q2, m2, k1, k2 = (F.normalize(torch.randn(N, C, device=DEVICE), dim=1).requires_grad_() for _ in range(6))
    labels, tau, tensors = torch.arange(N, device=DEVICE), 0.2, (q1, m1, q2, m2, k1, k2)
    four = sum(F.cross_entropy(q @ k.T / tau, labels) for q, k in ((q1, k2), (m1, k2), (q2, k1), (m2, k1)))
    calls = (((q1, m1), k2), ((q2, m2), k1))
    options = {"scale": 1 / tau, "backend": "triton"}
    ours = sum(2 * linear_cross_entropy(torch.cat(q), k, labels, **options) for q, k in calls)
    torch.testing.assert_close(ours, four)
    for a, e in zip(*(torch.autograd.grad(loss, tensors) for loss in (ours, four)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_other_numbers_of_keys_compile_nothing(monkeypatch):
    """Of a contrastive loss it is the batch length; these share a tile, and what divides them."""
    seen = set()
    monkeypatch.setattr(cross_entropy, "launch", lambda kernel, *_: seen.add((kernel, *_[-1].values())))
    for keys in (520, 776, 1024):
        x, w = torch.randn(8, C, device=DEVICE, requires_grad=True), torch.randn(keys, C, device=DEVICE)
        linear_cross_entropy(x, w, torch.arange(8, device=DEVICE), backend="triton").backward()
    assert len(seen) == 3  # kernels


def test_the_graph_may_be_retained():
    """What backward overwrites if it cannot come again, it leaves alone if it can."""
    tensors, y = case(101)
    loss = linear_cross_entropy(*tensors[:2], y, linear_bias=tensors[2], backend="triton")
    found = [torch.autograd.grad(loss, tensors, retain_graph=retain) for retain in (True, True, False)]
    for grads in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads, found[0], strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, tensors)


def test_a_backward_that_failed_half_way_cannot_be_tried_again(monkeypatch):
    """The logits are gone by then."""
    tensors, y = case(7)
    loss = linear_cross_entropy(*tensors[:2], y, linear_bias=tensors[2], backend="triton")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "mm", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            torch.autograd.grad(loss, tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_all_rows_of_weight_zero(backend):
    """0 / 0, though smoothing leaves a loss."""
    (x, w, _), _ = case(7)
    y, weight = torch.zeros(N, dtype=torch.long, device=DEVICE), torch.arange(7.0, device=DEVICE)
    options = {"weight": weight, "label_smoothing": 0.1}
    loss, stats = linear_cross_entropy(x, w, y, stats=True, backend=backend, **options)
    theirs = written_out(x, w, None, y, **options)
    assert loss.isnan()
    assert theirs.isnan()
    assert stats.loss.isnan().all()
    for a, e in zip(*(torch.autograd.grad(out, (x, w)) for out in (loss, theirs)), strict=True):
        torch.testing.assert_close(a, e, equal_nan=True)


def test_ignore_index_is_a_class():
    tensors, y = case(7)
    check([*tensors, None], y, ignore_index=int(y[0]), label_smoothing=0.1)


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_nothing_is_kept_where_no_backward_comes(how, monkeypatch, rows_in):
    rows_in("kept")
    (x, w, _), y = case(7)
    rows = []
    forward = cross_entropy.forward
    monkeypatch.setattr(cross_entropy, "forward", lambda z, *a, **k: (rows.append(len(z)), forward(z, *a, **k)))
    if how == "frozen":
        x, w = x.detach(), w.detach()
    with torch.set_grad_enabled(how != "no_grad"):
        linear_cross_entropy(x, w, y, backend="triton")
    assert max(rows) <= 4


def test_offsets_past_two_to_the_31():
    """A row stride of 2^29 elements, of which few are touched, takes the last row past what 32 bits hold."""
    z, y = torch.randn(5, 7, device=DEVICE), torch.arange(5, device=DEVICE)
    wide = torch.empty(5 * 2**29, dtype=torch.float16, device=DEVICE).as_strided((5, 7), (2**29, 1))
    narrow = torch.empty(5, 8, dtype=torch.float16, device=DEVICE)[:, :7]
    options = cross_entropy.Options(None, None, None, 1.0, -100, 0.0)
    made = []
    for t in (wide, narrow):
        t.copy_(z)
        of_rows, grad = torch.empty(cross_entropy.ROW, 5, device=DEVICE), torch.ones(1, device=DEVICE)
        cross_entropy.forward(t, y, options, count=True, first=0, of_rows=of_rows)
        cross_entropy.backward(grad, t, y, of_rows, options, total=None, first=0, dz=t, sums=None)
        made.append((of_rows, t))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter has no device-side assertions")
def test_an_index_out_of_range_stops_the_gpu():
    """In a process of its own, whose device is lost."""
    code = (
        "import torch, fastbf.functional as functional; x, y = torch.randn(4, 8).cuda(), torch.tensor([0, 1, 2, 9]);"
        "functional.linear_cross_entropy(x, x, y.cuda(), backend='triton').item()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "a class index in target is out of range" in run.stderr


def test_shared_classifier():
    counts, weight = torch.tensor([100, 50, 20, 10, 5, 2, 1]), torch.rand(7)
    module = fastbf.SharedClassifier(
        C, 7, class_counts=counts, class_weight=weight, label_smoothing=0.1, scale=3.0, device=DEVICE, backend="triton"
    )
    (x, _, _), y = case(7)
    assert fastbf.explain(module, x).backend == "triton"
    losses = []
    for module.backend in ("triton", "torch"):
        losses.append([module.loss(x, y), *torch.autograd.grad(module.loss(x, y), (x, *module.parameters()))])
    for a, e in zip(*losses, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
