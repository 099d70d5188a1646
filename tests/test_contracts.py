"""What training code relies on: autocast, low precision, checkpointing, retain_graph, compile, data parallelism."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbf
from tests import paper

N, C, K = 20, 16, 5


def models(dropout=0.5):
    return fastbf.BatchFormer(C, dropout=dropout), fastbf.SharedClassifier(C, K)


def batch(dtype=torch.float32):
    return torch.randn(N, C, dtype=dtype, requires_grad=True), torch.randint(0, K, (N,))


def gradients(former, classifier, loss, x):
    return torch.autograd.grad(loss, [x, *former.parameters(), *classifier.parameters()], retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_has_the_dtypes_of_eager(dtype):
    former, classifier = models(0.0)
    encoder, linear = paper.encoder(C, dropout=0.0), nn.Linear(C, K)
    encoder.load_state_dict(former.layers[0].state_dict())
    linear.load_state_dict(classifier.state_dict())
    x, y = batch()
    with torch.autocast("cpu", dtype=dtype):
        mixed, expected = former.mix(x), encoder(x.unsqueeze(1)).squeeze(1)
        assert mixed.dtype == expected.dtype
        ours, theirs = classifier.loss(former(x), y), paper.step(encoder, linear, x, y)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    for p, q in zip(gradients(former, classifier, ours, x), gradients(encoder, linear, theirs, x), strict=True):
        assert p.dtype == q.dtype
        assert (p - q).norm() <= 0.05 * q.norm() + 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_pure_low_and_double_precision(dtype, p):
    former, classifier = (m.to(dtype) for m in models(p))
    x, y = batch(dtype)
    loss = classifier.loss(former(x), y)
    assert loss.dtype == dtype
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))


def test_autocast_with_dropout_trains():
    former, classifier = models()
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats = classifier.loss(former(x), y, stats=True)
    assert loss.dtype == torch.float32
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))
    assert stats.accuracy.shape == (2,)


@pytest.mark.parametrize("scale", [1e3, 1e-3, 0.0])
def test_no_nan_for_scaled_inputs(scale):
    former, classifier = models()
    x, y = batch()
    loss = classifier.loss(former(x * scale), y)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(former, classifier, loss, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_dropout(reentrant):
    former, classifier = models()
    x, y = batch()
    torch.manual_seed(5)
    plain = gradients(former, classifier, classifier.loss(former(x), y), x)
    torch.manual_seed(5)
    checkpointed = classifier.loss(checkpoint(former, x, use_reentrant=reentrant), y)
    checkpointed.backward()
    actual = [x.grad, *(p.grad for m in (former, classifier) for p in m.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=True))


def test_backward_twice_gives_the_same_bits():
    former, classifier = models()
    x, y = batch()
    loss = classifier.loss(former(x), y)
    first = gradients(former, classifier, loss, x)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(former, classifier, loss, x), strict=True))


def test_same_seed_same_bits():
    former, classifier = models()
    x, y = batch()
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(gradients(former, classifier, classifier.loss(former(x), y), x))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5, 0.1])
def test_compiles_as_one_graph(p):
    former, classifier = models(p)
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


def test_functional_transforms():
    former, classifier = models(0.0)
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


def test_double_precision_under_autocast_stays_exact():
    former, _ = models(0.1)
    former.double()
    x, _ = batch(torch.float64)
    torch.manual_seed(1)
    expected = former(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(former(x), expected)


def test_learns():
    torch.manual_seed(0)
    x = torch.randn(64, C)
    y = (x @ torch.randn(C, K)).argmax(-1)
    backbone, (former, classifier) = nn.Linear(C, C), models()
    parameters = [p for m in (backbone, former, classifier) for p in m.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(100):
        loss = classifier.loss(former(backbone(x)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (classifier(backbone(x)).argmax(-1) == y).float().mean() > 0.9


def _data_parallel(rank, store, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    former, classifier = models(0.0)
    net = nn.parallel.DistributedDataParallel(nn.Sequential(former, classifier))
    torch.manual_seed(rank)
    x, y = batch()
    F.cross_entropy(net(x), torch.cat([y, y])).backward()
    results[rank] = [p.grad for p in net.parameters()]
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_averages_gradients(tmp_path):
    manager = mp.Manager()
    results = manager.dict()
    mp.spawn(_data_parallel, args=(tmp_path / "store", results), nprocs=2)
    torch.manual_seed(0)
    former, classifier = models(0.0)
    total = 0
    for rank in range(2):
        torch.manual_seed(rank)
        x, y = batch()
        total = total + classifier.loss(former(x), y) / 2
    expected = torch.autograd.grad(total, [*former.parameters(), *classifier.parameters()])
    for rank in range(2):
        for a, e in zip(results[rank], expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
