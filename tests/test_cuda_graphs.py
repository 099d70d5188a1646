"""``fastbf.make_graphed``, on a stand-in for CUDA graphs that owns and overwrites memory as they do."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

import fastbf
from fastbf import cuda_graphs as graphs
from fastbf.torch_state import flattened
from tests.triton_case import DEVICE

N, C, K = 8, 32, 5
CUDA = DEVICE.type == "cuda"
stands_in = pytest.mark.skipif(CUDA, reason="only the stand-in draws what eager draws")


def stand_in(function, sample_args, allow_unused_input=False):
    """What ``torch.cuda.make_graphed_callables`` gives: inputs, results and gradients at fixed places in memory."""
    assert allow_unused_input
    assert not (torch.is_autocast_enabled(DEVICE.type) and torch.is_autocast_cache_enabled())
    wanted = [x for x in sample_args if x.requires_grad]
    results, rebuild = flattened(function(*sample_args))
    places = [x.detach().clone() for x in results]
    gradient_places = [torch.empty_like(x) for x in wanted]
    live = []

    class Replay(Function):
        @staticmethod
        def forward(ctx, *inputs):
            for place, x in zip(sample_args, inputs, strict=True):
                if place.data_ptr() != x.data_ptr():
                    place.data.copy_(x)
            with torch.enable_grad():
                live[:], _ = flattened(function(*sample_args))
            for place, x in zip(places, live, strict=True):
                place.copy_(x.detach())
            return tuple(place.detach() for place in places)

        @staticmethod
        def backward(ctx, *grads):
            pairs = [(x, g) for x, g in zip(live, grads, strict=True) if x.requires_grad]
            out, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(out, wanted, grads, retain_graph=True, allow_unused=True)
            for place, grad in zip(gradient_places, found, strict=True):
                place.copy_(0 if grad is None else grad)
            given = iter(gradient_places)
            return tuple(next(given).detach() if x.requires_grad else None for x in sample_args)

    return lambda *inputs: rebuild(Replay.apply(*inputs))


@pytest.fixture(autouse=True)
def _capture(monkeypatch):
    if not CUDA:
        monkeypatch.setattr(graphs, "CAPTURABLE", "cpu")
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)


def models(dropout=0.5, backend="torch"):
    former = fastbf.BatchFormer(C, dropout=dropout, backend=backend, device=DEVICE)
    return former, fastbf.SharedClassifier(C, K, backend=backend, device=DEVICE)


def batch(n=N):
    return torch.randn(n, C, device=DEVICE, requires_grad=True), torch.randint(0, K, (n,), device=DEVICE)


def step_of(former, classifier, **options):
    return lambda x, y: classifier.loss(former(x), y, **options)


@pytest.fixture
def replays(monkeypatch):
    """How often each graphed callable made from now on was replayed."""
    counts = []
    before = graphs._Results.forward

    def count(ctx, *args):
        counts.append(1)
        return before(ctx, *args)

    monkeypatch.setattr(graphs._Results, "forward", count)
    return counts


class Parallel(DistributedDataParallel):
    """Without a process group."""

    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, x):
        return x


def gradients(loss, x, *modules):
    return torch.autograd.grad(loss, [x, *(p for m in modules for p in m.parameters())])


@stands_in
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_whole_step_is_eagers(backend, replays):
    former, classifier = models(backend=backend)
    step = step_of(former, classifier)
    graphed = fastbf.make_graphed(step, batch())
    for _ in range(2):
        x, y = batch()
        state = torch.get_rng_state()
        expected = gradients(step(x, y), x, former, classifier)
        torch.set_rng_state(state)
        found = gradients(graphed(x, y), x, former, classifier)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(replays) == 2


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_without_dropout_a_step_is_eagers(backend, replays):
    former, classifier = models(0.0, backend)
    step = step_of(former, classifier)
    graphed = fastbf.make_graphed(step, batch())
    x, y = batch()
    pairs = [(f(x, y), f) for f in (step, graphed)]
    torch.testing.assert_close(pairs[0][0], pairs[1][0])
    for a, e in zip(*(gradients(loss, x, former, classifier) for loss, _ in pairs), strict=True):
        torch.testing.assert_close(a, e)
    assert len(replays) == 1


def test_dropout_is_drawn_afresh():
    former, classifier = models()
    graphed = fastbf.make_graphed(step_of(former, classifier), batch())
    x, y = batch()
    assert graphed(x, y) != graphed(x, y)


def test_results_are_the_callers_own():
    former, classifier = models(0.0)
    graphed = fastbf.make_graphed(step_of(former, classifier), batch())
    first = graphed(*batch())
    value = first.item()
    graphed(*batch())
    assert first.item() == value


def test_gradients_add_up_over_steps():
    former, classifier = models(0.0)
    step = step_of(former, classifier)
    graphed = fastbf.make_graphed(step, batch())
    batches = [batch() for _ in range(3)]
    for x, y in batches:
        graphed(x, y).backward()
    kept = [x.grad for x, _ in batches] + [p.grad for m in (former, classifier) for p in m.parameters()]
    for module in (former, classifier):
        module.zero_grad()
    for x, _ in batches:
        x.grad = None
    for x, y in batches:
        step(x, y).backward()
    expected = [x.grad for x, _ in batches] + [p.grad for m in (former, classifier) for p in m.parameters()]
    for a, e in zip(kept, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_sample_arguments_stay_as_they_are():
    former, classifier = models()
    x, y = batch()
    before = x.detach().clone(), y.clone()
    fastbf.make_graphed(step_of(former, classifier), (x, y))(*batch())
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert x.grad is None


def test_stats_have_no_gradient():
    former, classifier = models()
    loss, stats = fastbf.make_graphed(step_of(former, classifier, stats=True), batch())(*batch())
    assert loss.requires_grad
    assert not stats.loss.requires_grad
    assert stats.accuracy.shape == (2,)


def test_what_differs_runs_eagerly(replays):
    former, classifier = models()
    graphed = fastbf.make_graphed(step_of(former, classifier), batch())
    graphed(*batch(5))
    x, y = batch()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        graphed(x, y)
    former.eval()
    assert graphed(x, y) == classifier.loss(x, y)
    former.train()
    former.layers[0].linear1.weight.requires_grad_(False)
    graphed(x, y)
    former.layers[0].linear1.weight.requires_grad_(True)
    assert not replays
    graphed(x, y)
    with torch.no_grad():
        graphed(x.detach(), y)
    assert len(replays) == 2
    former.layers[0].dropout1.p = 0.1
    graphed(x, y)
    former.layers[0].dropout1.p = 0.5
    layer = former.layers[0]
    weight, layer.norm1.weight = layer.norm1.weight, nn.Parameter(torch.ones(C, device=DEVICE))
    graphed(x, y)
    layer.norm1.weight = weight
    assert len(replays) == 2
    former.double()
    classifier.double()
    graphed(x.double(), y)
    former.float()  # back, but elsewhere in memory
    classifier.float()
    graphed(x, y)
    assert len(replays) == 2


def test_autocast_at_capture(replays):
    former, classifier = models()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        graphed = fastbf.make_graphed(step_of(former, classifier), batch())
        assert torch.is_autocast_cache_enabled()
        graphed(*batch()).backward()
    assert len(replays) == 1
    graphed(*batch())
    assert len(replays) == 1


def test_a_module_stays_what_it_was(replays):
    former, _ = models(0.0)
    keys = list(former.state_dict())
    x, _ = batch()
    expected = former(x)
    graphed = fastbf.make_graphed(former, (x,))
    assert graphed is former
    torch.testing.assert_close(former(x), expected)
    assert len(replays) == 1
    assert list(former.state_dict()) == keys
    former.eval()
    assert former(x) is x


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_module_run_eagerly_on_their_own_parameters(duplicate, replays):
    former, _ = models(0.0)
    x, _ = batch()
    fastbf.make_graphed(former, (x,))
    other = duplicate(former)
    with torch.no_grad():
        other.layers[0].norm2.weight.zero_()
        other.layers[0].norm2.bias.zero_()
    assert not other(x)[N:].any()
    assert former(x)[N:].any()
    assert len(replays) == 1


def test_backward_after_a_later_call():
    former, classifier = models()
    graphed = fastbf.make_graphed(step_of(former, classifier), batch())
    loss = graphed(*batch())
    graphed(*batch())
    with pytest.raises(RuntimeError, match="backward came after a later call"):
        loss.backward()


def test_hooks_of_the_module_itself_run_at_every_call():
    former, _ = models()
    calls = []
    former.register_forward_hook(lambda *_: calls.append(1))
    graphed = fastbf.make_graphed(former, (batch()[0],))
    calls.clear()
    graphed(batch()[0])
    graphed(batch()[0])
    assert len(calls) == 2


def test_what_cannot_be_captured():
    former, classifier = models()
    step = step_of(former, classifier)
    x, y = batch()
    with pytest.raises(TypeError, match="callable must return tensors only, got float"):
        fastbf.make_graphed(lambda x, y: step(x, y).item(), (x, y))
    handle = former.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"must have no hooks, .* BatchFormerLayer has"):
        fastbf.make_graphed(step, (x, y))
    handle.remove()
    handle = classifier.weight.register_hook(lambda grad: grad)
    with pytest.raises(ValueError, match="parameters must have no hooks"):
        fastbf.make_graphed(step, (x, y))
    handle.remove()
    with pytest.raises(ValueError, match="must not hold DistributedDataParallel"):
        fastbf.make_graphed(nn.Sequential(former, Parallel()), (x,))
    with pytest.raises(TypeError, match="a graphed function cannot be pickled"):
        pickle.dumps(fastbf.make_graphed(step, (x, y)))


@stands_in
def test_pytorchs_refusal_is_explained(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(RuntimeError, match=r"cannot be captured as a CUDA graph: .* not permitted when stream"):
        fastbf.make_graphed(step_of(*models()), batch())
