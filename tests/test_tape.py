"""A call by a tape gives what the call as written gives, to the last bit, whatever changes between calls."""

import copy
import gc
import random
import subprocess
import sys
import weakref
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbf
from fastbf import functional, recorder, repeats, tape
from tests.repeated import C, K, Step, assert_as_written, call, features

on_both = pytest.mark.parametrize("backend", ["triton", "torch"])


@on_both
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("autocast", [torch.float32, torch.bfloat16])
def test_the_third_step_goes_by_tapes(norm_first, autocast, plays, backend):
    step = Step(backend, norm_first=norm_first)
    step.autocast = autocast
    for _ in range(4):
        step()
    assert plays == {"as written": 8, "by a tape": 8}
    if autocast == torch.float32:  # 16 bits differ in Triton's interpreter between one call and the next
        assert_as_written(step)
        assert plays["by a tape"] == 12


@on_both
def test_a_repeated_call_checks_nothing_but_its_tensors(monkeypatch, plays, backend):
    """And other arguments that look alike meet the checks, on every step."""
    step = Step(backend)
    for _ in range(3):
        step()
    for name in ("signature", "choose"):
        monkeypatch.setattr(functional, name, lambda *_, **__: pytest.fail("a known call is checked again"))
    monkeypatch.setattr(functional.checks, "layer", lambda *_: pytest.fail("a known call is checked again"))
    step()
    assert plays["by a tape"] == 8


@on_both
def test_without_names_of_inductors_code(monkeypatch, plays, backend):
    """Another torch may lack them."""
    assert recorder.allocator("cpu") is not None
    assert recorder.viewer() is not None
    for name in ("allocator", "viewer"):
        monkeypatch.setattr(recorder, name, lambda *_: None)
    step = Step(backend)
    step.x, step.y = features(3, 2), torch.randint(0, K, (3, 2))
    for _ in range(2):
        step()
    assert_as_written(step)
    assert plays["by a tape"] == 4
    assert any("as_strided" in t.source for held in repeats.tapes.values() for t in held)


@on_both
def test_what_looks_alike_meets_the_checks(backend):
    layer = fastbf.BatchFormerLayer(C, 1, C, 0.0, backend=backend)
    weights, x = layer._weights(), features()
    arguments = {"num_heads": 1, "dropout_p": 1.0, "eps": 1e-5, "backend": backend}
    for _ in range(4):
        functional.encoder_layer(x, *weights, **arguments)
    for name, value, error in (
        ("num_heads", True, "num_heads must be"),
        ("dropout_p", True, "dropout_p must be"),
        ("eps", [1e-5], "eps must be"),
        ("activation", ["relu"], "activation must be"),
        ("plain", torch.randn(3, C), "plain must"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            functional.encoder_layer(x, *weights, **{**arguments, name: value})
    others = x.double(), x[None, 0, 0], x[:, :4], x.to("meta"), x.tolist(), x.to_sparse(), x.detach().to_sparse_csr()
    for other in others:
        with pytest.raises((TypeError, ValueError), match=r"must|cannot"):
            functional.encoder_layer(other, *weights, **arguments)
    for i, weight in ((0, weights[0].double()), (1, torch.randn(C)), (4, weights[4].tolist()), (8, None)):
        others = [*weights[:i], weight, *weights[i + 1 :]]
        with pytest.raises((TypeError, ValueError), match=r"must|cannot"):
            functional.encoder_layer(x, *others, **arguments)
    numbers = {**arguments, "eps": np.float64(1e-5), "dropout_p": np.float64(0.0), "forked": []}
    for _ in range(4):
        functional.encoder_layer(x, *weights, **numbers)


@on_both
@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("forked", [False, True])
def test_results_may_be_changed_in_place(batch_dim, forked, backend):
    """A fork with positions is no view of another tensor, which autograd would not let anybody change."""
    former = fastbf.BatchFormer(C, 1, dropout=0.0, batch_dim=batch_dim, forked=forked, backend=backend)
    x = torch.randn(4, 6, C, requires_grad=True)
    for _ in range(4):
        fork = former(x)
        expected = torch.autograd.grad(torch.relu(fork).sum(), x, retain_graph=True)
        assert torch.equal(*torch.autograd.grad(fork.relu_().sum(), x), *expected)


@on_both
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_features_with_positions_that_were_changed_in_place(batch_dim, backend):
    former = fastbf.BatchFormer(C, 1, batch_dim=batch_dim, backend=backend)
    classifier = fastbf.SharedClassifier(C, K, backend=backend)
    target = torch.randint(0, K, (4, 3))
    copied = backend == "torch" and batch_dim == 1  # the features into rows, and nothing else is read again
    for function in (former, lambda x: classifier.loss(x, target)):
        for _ in range(4):
            leaf = features(4, 3)
            x = leaf * 1
            made = function(x)
            (expected,) = torch.autograd.grad(made.sum(), leaf, retain_graph=True)
            x.add_(1)
            if copied and function is former:
                assert torch.equal(*torch.autograd.grad(made.sum(), leaf), expected)
                continue
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                made.sum().backward()
    classes, shares = torch.randint(0, K, (4, 3)), torch.rand(4, 3, K)
    for target in (classes, shares):
        for _ in range(4):
            labels = target.clone()
            loss = classifier.loss(features(4, 3), labels)
            labels.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@on_both
@pytest.mark.parametrize("positions", [(), (3,)])
def test_several_layers(positions, backend):
    """The last layer's plain half comes from another tensor than its input."""
    step = Step(backend, num_layers=2)
    step.x, step.y = features(4, *positions), torch.randint(0, K, (4, *positions))
    for _ in range(2):
        step()
    assert_as_written(step)


def test_modes_see_what_is_written(plays):
    """A mode that sees operators may keep some of them for recomputation, and counts on the same ones every time."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen[-1].append(str(func))
            return func(*args, **(kwargs or {}))

    seen, function = [], lambda x: (torch.mm(x, x, out=torch.empty(4, 4)),)
    for _ in range(4):
        seen.append([])
        with Names():
            call(function, torch.randn(4, 4))
    assert seen[0] == seen[1] == seen[2] == seen[3] != []


def _rate(step, random):
    rate = random.choice([0.0, 0.1, 0.5])
    for m in step.former.modules():
        if isinstance(m, nn.Dropout):
            m.p = rate
        elif isinstance(m, nn.MultiheadAttention):
            m.dropout = rate


def _freeze(step, random):
    p = random.choice(list(step.former.parameters()))
    p.requires_grad_(not p.requires_grad)


def _replace(step, random):
    linear = step.former.layers[0].linear1
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)


def _transpose(step, random):
    """The same numbers, other strides."""
    linear = step.former.layers[0].linear2
    linear.weight.data = linear.weight.detach().t().contiguous().t()


def _in_place(step, random):
    with torch.no_grad():
        step.former.layers[0].norm1.weight.mul_(1.25)


def _misalign(step, random):
    buffer = torch.randn(4 * C + 1)
    step.x = buffer[1:].view(4, C).detach().requires_grad_()


def _shared_memory(step, random):
    """Two parameters in one storage, at another distance every time."""
    layer, gap = step.former.layers[0], 4 * random.randrange(5)
    flat = torch.ones(2 * C + gap)
    layer.norm1.weight.data, layer.norm2.weight.data = flat[:C], flat[C + gap :]
    with torch.no_grad():
        layer.norm2.weight.fill_(0.5)


def _size(step, random):
    n = random.choice([2, 4, 5])
    step.x, step.y = features(n), torch.randint(0, K, (n,))


def _positions(step, random):
    step.x, step.y = features(3, 2), torch.randint(0, K, (3, 2))


def _position_major(step, random):
    x = torch.randn(2, 3, C).transpose(0, 1)
    step.x, step.y = x.detach().requires_grad_(), torch.randint(0, K, (3, 2))


def _no_input_gradient(step, random):
    step.x = step.x.detach().requires_grad_(not step.x.requires_grad)


def _eps(step, random):
    layer = step.former.layers[0]
    layer.norm1.eps = layer.norm2.eps = random.choice([1e-5, 1e-2])


def _copy(step, random):
    step.former = copy.deepcopy(step.former)


def _checkpointed(step, random):
    step.call = lambda x: checkpoint(step.former, x, use_reentrant=False)


def _smoothing(step, random):
    step.classifier.label_smoothing = random.choice([0.0, 0.1])


def _ignored(step, random):
    step.y = step.y.clone()
    step.y.view(-1)[0] = -100


def _stats(step, random):
    step.stats = not step.stats


def _bias(step, random):
    step.classifier.bias = None if step.classifier.bias is not None else nn.Parameter(torch.randn(K))


def _cast_weights(step, random):
    step.classifier.scale = random.choice([1.0, 2.0])


EDITS = (
    _rate, _freeze, _replace, _transpose, _in_place, _misalign, _shared_memory, _size, _positions, _position_major,
    _no_input_gradient, _eps, _copy, _checkpointed, _smoothing, _ignored, _stats, _bias, _cast_weights,
)  # fmt: skip


@on_both
@pytest.mark.parametrize("seed", range(3))
def test_whatever_changes_between_steps(seed, backend):
    """Sequences of edits, several steps after each, so that tapes of before and after are met."""
    draw = random.Random(seed)
    step = Step(backend, norm_first=seed % 2 == 1, activation=draw.choice(["relu", "gelu"]))
    for _ in range(3):
        step()
    for edit in draw.sample(EDITS, 4):
        edit(step, draw)
        for _ in range(draw.choice([1, 2])):
            assert_as_written(step)


@on_both
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_"))
def test_each_change(edit, backend):
    draw, step = random.Random(0), Step(backend)
    for _ in range(2):
        step()
    for _ in range(2):
        edit(step, draw)
        assert_as_written(step)
    assert_as_written(step)


def part_and_product(a, b):
    out = torch.empty(a.shape[0], b.shape[1])
    torch.mm(a, b, out=out)
    return a[1:, 2:] * 2, out, b.t() + 1, None


@pytest.mark.parametrize(
    "others",
    [
        lambda a, b: (a.t().contiguous().t(), b),
        lambda a, b: (torch.cat([torch.zeros(4, 4), a])[4:], b),
        lambda a, b: (torch.cat([a, a], 1)[:, :4], b),
        lambda a, b: (a, b.expand(4, 4)),
        lambda a, b: (a.double(), b.double()),
        lambda a, b: (torch.zeros(17)[1:].view(4, 4).copy_(a), b),
        lambda a, b: (a, a),
    ],
    ids=["strides", "offset", "gaps", "expanded", "dtype", "misaligned", "twice"],
)
@pytest.mark.parametrize("first", [True, False])
def test_tensors_of_another_geometry(others, first, plays):
    """Noted with the usual ones and played with the others, and the other way round."""

    def usual():
        return torch.randn(4, 4), torch.randn(4, 4)

    def function(a, b):
        return part_and_product(a, b) if a.dtype == torch.float32 else [a @ b]

    makers = [usual, lambda: others(*usual())]
    for make in (makers if first else makers[::-1]) * 3:
        for _ in range(3):
            tensors = make()
            for found, expected in zip(call(function, *tensors), function(*tensors), strict=True):
                assert (found is None) == (expected is None)
                assert found is None or torch.equal(found, expected)
    assert plays["by a tape"]


@on_both
def test_backward_after_a_change_in_place_is_an_error(backend):
    step = Step(backend)
    for _ in range(3):
        step()
    loss = step.loss()
    with torch.no_grad():
        step.former.layers[0].linear1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = step.loss()
    loss.backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Forgetting(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@on_both
@pytest.mark.parametrize("stats", [False, True])
def test_a_loss_without_gradient(stats, backend):
    step = Step(backend)
    for _ in range(4):
        loss = step.classifier.loss(step.x, step.y, stats=stats)
        (grad,) = torch.autograd.grad(Forgetting.apply(loss[0] if stats else loss) + 0 * step.x.sum(), step.x)
        assert not grad.any()


@on_both
def test_overwritten_logits_are_noticed(backend):
    """The gradient of the logits takes their place once; a graph that was to be retained later is not reused."""
    step = Step(backend)
    for _ in range(4):
        loss = step.loss()
        torch.autograd.grad(loss, step.x, retain_graph=True)
        torch.autograd.grad(loss, step.x)


@on_both
def test_saved_tensor_hooks_may_change_strides(backend):
    """What a hook gives back has other strides than what was saved: the call runs as written."""
    step = Step(backend, dropout=0.0)
    _transpose(step, None)
    for _ in range(3):
        expected = step()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        found = [step() for _ in range(3)][-1]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_threads():
    """Tapes are noted and played by several threads at once, each with its own tensors."""
    wrong = []

    def function(a, b):
        out = torch.empty(a.shape[0], b.shape[1])
        torch.mm(a, b.t(), out=out)
        return out, out[:, 1:3], a

    def work():
        for _ in range(200):
            a, b = torch.randn(3, 4), torch.randn(4, 4)
            product, part, same = call(function, a, b)
            if not (torch.equal(product, a @ b.t()) and torch.equal(part, product[:, 1:3]) and same is a):
                wrong.append((a, b))

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert repeats.tapes


def test_bounded(monkeypatch):
    """Batches of ever new sizes hold no more than a fixed number of tapes and signatures."""
    monkeypatch.setattr(repeats, "MOST_TAPES", 6)
    monkeypatch.setattr(repeats, "MOST_SEEN", 20)
    for n in range(1, 40):
        x = torch.randn(n, 4)
        for _ in range(2):
            with tape.noting(("bounded", n % 3), (x,)) as made:
                made += (torch.mm(x.t(), x),)
    assert len(repeats._held) == 6
    assert sum(map(len, repeats.tapes.values())) == 6
    assert len(repeats._seen) == 20
    assert all(repeats.tapes.values())


@on_both
def test_a_tape_holds_no_tensor(backend):
    step = Step(backend)
    for _ in range(3):
        step()
    alive = [weakref.ref(p) for p in step.parameters()]
    del step
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_what_a_tape_does_not_hold_runs_as_written(plays):
    """A result that depends on a value or on a tensor that was not given, or one that was resized."""
    others = {}

    def resized(x):
        out = torch.empty(0)
        return (torch.add(x, 1, out=out),)

    functions = (lambda x: (x * x.sum().item(),)), (lambda x: (x * others["y"],)), resized
    for function in functions:
        for value in (1.0, 1.0, 2.0, 3.0):
            x, others["y"] = torch.full((4,), value), torch.tensor([value])
            assert torch.equal(call(function, x, what=(function,))[0], function(x)[0])
    assert plays["by a tape"] == 0


def test_training_on_a_cpu_imports_neither_the_compiler_nor_triton():
    """Each would make a step wait, the compiler for seconds."""
    code = """
import sys, torch, fastbf
former, classifier = fastbf.BatchFormer(32), fastbf.SharedClassifier(32, 5)
for _ in range(3):
    loss = classifier.loss(former(torch.randn(8, 32)), torch.arange(8) % 5)
    loss.backward()
from fastbf import repeats
print(len(repeats.tapes), sorted({"sympy", "torch._dynamo", "triton"} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split(maxsplit=1) == ["2", "[]\n"]


def test_odd_sizes_have_tapes_on_pytorch(plays):
    """Masks of several sites share a buffer, and begin where the one before ends."""
    former, x = fastbf.BatchFormer(6, 2, 5, 0.1, backend="torch"), torch.randn(3, 6, requires_grad=True)
    for _ in range(3):
        former(x).sum().backward()
    assert plays == {"as written": 4, "by a tape": 2}


def test_what_was_read_for_the_last_time_is_free():
    """A list of tensors is emptied, and a tape lets go of each after its last use."""
    for i in range(4):
        tensors = [torch.randn(4), torch.randn(4)]
        made = tape.play(("freed",), tensors)
        if made is None:
            with tape.noting(("freed",), tensors) as made:
                made += ((tensors[0] + 1) * tensors[1],)
        assert len(tensors) == (2 if i < 2 else 0)
    (held,) = repeats.tapes["freed",]
    body = held.source.partition("def run")[2]
    assert body.index("del x0") < body.index("(t1, x1)") < body.index("del t1, x1")
