"""What training code relies on, of both backends: precision, checkpointing, copies, compile, data parallelism."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbf
from fastbf import torch_state
from tests import paper
from tests.triton_case import DEVICE, DTYPES

N, C, K = 20, 32, 5
both = pytest.mark.parametrize("backend", ["torch", "triton"])


def models(dropout=0.5, backend="torch"):
    former = fastbf.BatchFormer(C, dropout=dropout, backend=backend, device=DEVICE)
    return former, fastbf.SharedClassifier(C, K, backend=backend, device=DEVICE)


def batch(dtype=torch.float32):
    return torch.randn(N, C, dtype=dtype, device=DEVICE, requires_grad=True), torch.randint(0, K, (N,), device=DEVICE)


def gradients(former, classifier, loss, x):
    return torch.autograd.grad(loss, [x, *former.parameters(), *classifier.parameters()], retain_graph=True)


def skip_what_has_no_kernel(backend, dtype):
    if backend == "triton" and dtype not in DTYPES:
        pytest.skip("no kernel for fp64, and none that is right for bf16 in Triton's interpreter")


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_the_dtypes_of_eager(backend, dtype):
    skip_what_has_no_kernel(backend, dtype)
    former, classifier = models(0.0, backend)
    encoder, linear = paper.encoder(C, dropout=0.0).to(DEVICE), nn.Linear(C, K, device=DEVICE)
    encoder.load_state_dict(former.layers[0].state_dict())
    linear.load_state_dict(classifier.state_dict())
    x, y = batch()
    with torch.autocast(DEVICE.type, dtype=dtype):
        mixed, expected = former.mix(x), encoder(x.unsqueeze(1)).squeeze(1)
        assert mixed.dtype == expected.dtype
        ours, theirs = classifier.loss(former(x), y), paper.step(encoder, linear, x, y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for p, q in zip(gradients(former, classifier, ours, x), gradients(encoder, linear, theirs, x), strict=True):
        assert p.dtype == q.dtype
        assert (p - q).norm() <= 0.05 * q.norm() + 1e-3


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_pure_low_and_double_precision(backend, dtype, p):
    skip_what_has_no_kernel(backend, dtype)
    former, classifier = (m.to(dtype) for m in models(p, backend))
    x, y = batch(dtype)
    loss = classifier.loss(former(x), y)
    assert loss.dtype == dtype
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))


@both
def test_autocast_with_dropout_trains(backend):
    former, classifier = models(backend=backend)
    x, y = batch()
    with torch.autocast(DEVICE.type, dtype=DTYPES[-1] if backend == "triton" else torch.bfloat16):
        loss, stats = classifier.loss(former(x), y, stats=True)
    assert loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))
    assert stats.accuracy.shape == (2,)


@both
def test_gradients_scaled_against_underflow(backend):
    """A step under ``GradScaler`` in fp16 is, but for rounding, the step without."""
    former, classifier = models(0.0, backend)
    start = copy.deepcopy(former.state_dict())
    x, y = batch()
    after = []
    for enabled in (True, False):
        former.load_state_dict(start)
        former.zero_grad()
        optimizer = torch.optim.SGD(former.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12, enabled=enabled)
        with torch.autocast(DEVICE.type, dtype=torch.float16, enabled=enabled):
            loss = classifier.loss(former(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after.append([p.detach().clone() for p in former.parameters()])
    for p, q, before in zip(*after, start.values(), strict=True):
        assert not torch.equal(p, before)
        assert (p - q).norm() <= 0.02 * (q - before).norm() + 1e-3 * q.norm()


@both
@pytest.mark.parametrize("scale", [1e3, 1e-3, 0.0])
def test_no_nan_for_scaled_inputs(backend, scale):
    former, classifier = models(backend=backend)
    x, y = batch()
    loss = classifier.loss(former(x * scale), y)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))


@both
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_dropout(backend, reentrant):
    former, classifier = models(backend=backend)
    x, y = batch()
    torch.manual_seed(5)
    plain = gradients(former, classifier, classifier.loss(former(x), y), x)
    torch.manual_seed(5)
    checkpointed = classifier.loss(checkpoint(former, x, use_reentrant=reentrant), y)
    checkpointed.backward()
    actual = [x.grad, *(p.grad for m in (former, classifier) for p in m.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=True))


@both
def test_backward_twice_gives_the_same_bits(backend):
    former, classifier = models(backend=backend)
    x, y = batch()
    loss = classifier.loss(former(x), y)
    first = gradients(former, classifier, loss, x)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(former, classifier, loss, x), strict=True))


@both
def test_same_seed_same_bits(backend):
    former, classifier = models(backend=backend)
    x, y = batch()
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(gradients(former, classifier, classifier.loss(former(x), y), x))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(backend, duplicate):
    former, _ = models(0.0, backend)
    x, _ = batch()
    other = duplicate(former)
    assert torch.equal(other(x), former(x))
    assert other.layers[0].backend == backend


@both
def test_hooks_see_the_fork(backend):
    former, _ = models(backend=backend)
    seen = []
    former.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    former.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[0].shape))
    former(batch()[0]).sum().backward()
    assert seen == [(2 * N, C)] * 2


@both
def test_frozen_parameters_get_no_gradient(backend):
    former, classifier = models(backend=backend)
    former.layers[0].self_attn.requires_grad_(False)
    former.layers[0].norm2.requires_grad_(False)
    x, y = batch()
    classifier.loss(former(x), y).backward()
    for name, p in former.named_parameters():
        assert (p.grad is None) == (not p.requires_grad), name


@both
def test_without_gradients_nothing_is_kept(backend):
    former, _ = models(backend=backend)
    with torch.no_grad():
        out = former(batch()[0])
    assert out.grad_fn is None
    assert out.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "p"), [("torch", 0.0), ("torch", 0.5), ("torch", 0.1), ("triton", 0.0)])
def test_compiles_as_one_graph(backend, p):
    former, classifier = models(p, backend)
    x, y = batch()

    def step(x, y):
        loss, stats = classifier.loss(former(x), y, stats=True)
        return loss, stats.accuracy

    compiled = torch.compile(step, fullgraph=True)
    torch.manual_seed(1)
    expected, _ = step(x, y)
    torch.manual_seed(1)
    loss, _ = compiled(x, y)
    pairs = [gradients(former, classifier, each, x) for each in (loss, expected)]
    assert all(g.isfinite().all() for g in pairs[0])
    if p == 0:  # under Inductor randint draws other seeds
        torch.testing.assert_close(loss, expected)
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_functional_transforms(backend):
    former, classifier = models(0.0, backend)
    x, y = batch()
    loss = classifier.loss(former(x), y)
    names = dict(former.named_parameters())

    def of(parameters, x):
        return classifier.loss(torch.func.functional_call(former, parameters, (x,)), y)

    by_name, by_x = torch.func.grad(of, argnums=(0, 1))(names, x)
    expected = torch.autograd.grad(loss, [x, *names.values()])
    for a, e in zip([by_x, *by_name.values()], expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_shapes_on_the_meta_device():
    former, classifier = (m.to("meta") for m in models())
    x, y = (t.to("meta") for t in batch())
    assert former(x).shape == (2 * N, C)
    assert classifier.loss(former(x), y).shape == ()


def test_autocast_of_devices_that_a_build_may_lack():
    torch.set_autocast_enabled("mps", True)
    try:
        assert torch_state.autocasts("mps")
        assert not torch_state.autocasts("cpu")
    finally:
        torch.set_autocast_enabled("mps", False)
    assert not torch_state.autocasts("mps")


def test_double_precision_under_autocast_stays_exact():
    former, _ = models(0.1)
    former.double()
    x, _ = batch(torch.float64)
    torch.manual_seed(1)
    expected = former(x)
    torch.manual_seed(1)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(former(x), expected)


def train(backend, samples, steps, optimizer, lr):
    """Backbone, BatchFormer and classifier after some steps, and the accuracy without BatchFormer."""
    torch.manual_seed(0)
    x = torch.randn(samples, C, device=DEVICE)
    y = (x @ torch.randn(C, K, device=DEVICE)).argmax(-1)
    backbone, (former, classifier) = nn.Linear(C, C, device=DEVICE), models(backend=backend)
    parameters = [p for m in (backbone, former, classifier) for p in m.parameters()]
    optimizer = optimizer(parameters, lr=lr)
    for _ in range(steps):
        loss = classifier.loss(former(backbone(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return parameters, (classifier(backbone(x)).argmax(-1) == y).float().mean()


def test_learns():
    assert train("torch", 64, 60, torch.optim.Adam, 1e-2)[1] > 0.9


@pytest.mark.usefixtures("counter_based")
def test_backends_take_the_same_steps():
    """With dropout, whose decisions they share where both draw a seed."""
    ours, theirs = (train(backend, 16, 3, torch.optim.SGD, 0.1)[0] for backend in ("triton", "torch"))
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).norm() <= 1e-3 * q.norm()


def _data_parallel(rank, store, results, backend):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    former, classifier = models(0.0, backend)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(former, classifier))
    torch.manual_seed(rank)
    x, y = batch()
    F.cross_entropy(net(x), torch.cat([y, y])).backward()
    results[rank] = [p.grad.cpu() for p in net.parameters()]
    dist.destroy_process_group()


@pytest.mark.slow
@both
def test_data_parallel_averages_gradients(backend, tmp_path):
    manager = mp.Manager()
    results = manager.dict()
    mp.spawn(_data_parallel, args=(tmp_path / "store", results, backend), nprocs=2)
    torch.manual_seed(0)
    former, classifier = models(0.0, backend)
    total = 0
    for rank in range(2):
        torch.manual_seed(rank)
        x, y = batch()
        total = total + classifier.loss(former(x), y) / 2
    expected = torch.autograd.grad(total, [*former.parameters(), *classifier.parameters()])
    for rank in range(2):
        for a, e in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(a, e.cpu(), rtol=1e-4, atol=1e-6)
