"""A formula by tapes of both directions gives what autograd gives, whatever is asked of it."""

import gc
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import fastbf
from fastbf import functional, joint, repeats
from fastbf.dropout import Dropout
from fastbf.torch_backend import classifier
from tests.repeated import Step, features


def again(found, *tensors):
    return joint.play(found, tensors)


def call(formula, *tensors, what=("formula",)):
    """As the public functions do."""
    what = (*what, torch.is_grad_enabled())
    found = repeats.find(what, tensors)
    return joint.call(formula, what, tensors, again) if found is None else found.again(found, *tensors)


def dropped(x, w, b):
    """Draws, reads parts of an input, saves results, and uses one tensor twice."""
    mask = Dropout(0.5, None, torch.float64).multipliers([(1, x.shape)], x.device)[0]
    h = torch.tanh(x @ w.t()[:, :4] + b) * mask
    return (h * x[:, :4]).sum(1), h.detach().sum()


def tensors():
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 4), (6, 4), (4,))]


@pytest.fixture
def _noted():
    """The formula comes for the third time, and is known to have tapes."""
    for _ in range(2):
        call(dropped, *tensors())
    assert len(repeats.tapes) == 1


@pytest.mark.usefixtures("_noted")
def test_first_and_second_derivatives():
    def formula(*tensors):
        torch.manual_seed(3)
        return call(dropped, *tensors)[0]

    assert "_Played" in type(formula(*tensors()).grad_fn).__name__
    assert gradcheck(formula, tensors())
    assert gradgradcheck(formula, tensors())


@pytest.mark.usefixtures("_noted")
def test_a_second_derivative_leaves_the_generator_alone():
    x, w, b = tensors()
    y, _ = call(dropped, x, w, b)
    state = torch.get_rng_state()
    first = torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
    graphed = torch.autograd.grad(y.sum(), (x, w, b), create_graph=True)
    assert all(torch.equal(a, e) for a, e in zip(graphed, first, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("_noted")
def test_what_only_a_second_derivative_reads_must_not_change():
    x, w, b = tensors()
    y, _ = call(dropped, x, w, b)
    with torch.no_grad():
        b.add_(1)  # which the gradients do not need
    torch.autograd.grad(y.sum(), (x, w, b), retain_graph=True)
    with pytest.raises(RuntimeError, match=r"shape \(4,\) that a second derivative needs was modified by an inplace"):
        torch.autograd.grad(y.sum(), (x, w, b), create_graph=True)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.usefixtures("_noted")
def test_batches_of_gradients_and_strides():
    x, w, b = tensors()
    y, _ = call(dropped, x, w, b)
    rows = [torch.autograd.grad(y, (x, w, b), row, retain_graph=True) for row in torch.eye(4, dtype=torch.float64)]
    batch = torch.autograd.grad(
        y, (x, w, b), torch.eye(4, dtype=torch.float64), is_grads_batched=True, retain_graph=True
    )
    mapped = torch.func.vmap(lambda row: torch.autograd.grad(y, (x, w, b), row, retain_graph=True))
    for i, of_batch in enumerate([*batch, *mapped(torch.eye(4, dtype=torch.float64))]):
        i %= 3
        torch.testing.assert_close(of_batch, torch.stack([row[i] for row in rows]))
    strided = torch.randn(4, 2, dtype=torch.float64)[:, 0]
    of_strided = torch.autograd.grad(y, (x, w, b), strided, retain_graph=True)
    of_copy = torch.autograd.grad(y, (x, w, b), strided.clone())
    assert all(torch.equal(a, e) for a, e in zip(of_strided, of_copy, strict=True))


@pytest.mark.usefixtures("_noted")
def test_other_results_have_no_gradient():
    y, total = call(dropped, *tensors())
    assert y.requires_grad
    assert not total.requires_grad


def test_noting_leaves_no_trace():
    """Neither in the generator nor in memory, in the hooks of a graph for instance."""
    x, w, b = tensors()
    call(dropped, x, w, b)
    seen, state = [], torch.get_rng_state()

    def watching(x, w, b):
        results = dropped(x, w, b)
        seen.extend(map(weakref.ref, results))
        return results

    expected = dropped(x, w, b)[0]
    torch.set_rng_state(state)
    assert torch.equal(call(watching, x, w, b)[0], expected)
    assert len(repeats.tapes) == 1
    gc.collect()
    assert len(seen) == 4
    assert not [ref for ref in seen if ref() is not None]


def test_large_calls_are_noted_later(monkeypatch):
    """Sizes that come a few times each must not pay for another step."""
    monkeypatch.setattr(joint, "SMALL", 15)
    for i in range(1, 12):
        y, _ = call(dropped, *tensors())
        assert len(repeats.tapes) == (i >= 9)
        assert ("_Played" in type(y.grad_fn).__name__) == (i > 9)


def test_which_inputs_require_gradients_tells_tapes_apart():
    for needs in ((True, True, True), (False, True, False), (False, False, True), (False, False, False)) * 3:
        inputs = [t.requires_grad_(need) for t, need in zip(tensors(), needs, strict=True)]
        state = torch.get_rng_state()
        y, _ = call(dropped, *inputs)
        torch.set_rng_state(state)
        expected, _ = dropped(*inputs)
        assert torch.equal(y, expected)
        assert y.requires_grad == any(needs)
        if wanted := [t for t in inputs if t.requires_grad]:
            found = torch.autograd.grad(y.sum(), wanted)
            assert all(map(torch.equal, found, torch.autograd.grad(expected.sum(), wanted)))
    assert sum(map(len, repeats.tapes.values())) == 4


def test_a_formula_that_reads_another_tensor_has_no_tape():
    for _ in range(4):
        x, other = tensors()[0], torch.randn(4, dtype=torch.float64)
        assert torch.equal(call(lambda x: (x * other,), x)[0], x * other)  # noqa: B023
    assert not repeats.tapes


def test_a_formula_that_autograd_refuses_has_no_tape():
    """It writes to what its gradient needs."""
    for _ in range(4):
        (y,) = call(lambda x: (torch.tanh(x).mul_(2),), tensors()[0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert not repeats.tapes


@pytest.mark.parametrize("small", [0, 1 << 19])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_of_the_loss_may_be_used_again(small, reduction, monkeypatch):
    """Its logits' gradient is overwritten only at the end."""
    monkeypatch.setattr(classifier, "SMALL", small)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    y = torch.randint(0, 5, (3,))
    for _ in range(4):
        loss = functional.linear_cross_entropy(x, w, y, reduction=reduction, scale=2.0).sum()
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(2 * loss, (x, w), retain_graph=True)
        third = torch.autograd.grad(loss, (x, w))
        assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
        assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, (x, w))
    (held,) = [t for held in repeats.tapes.values() for t in held]
    assert bool(held.of.written) == (not small)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_of_a_step_that_repeats(p):
    """As of a training with a penalty on gradients."""
    step = Step("torch", dropout=p)
    step.x = features(4, 3)
    step.y = torch.randint(0, 8, (4, 3))
    for _ in range(4):
        state = torch.get_rng_state()
        (grad,) = torch.autograd.grad(step.loss(), step.x, create_graph=True)
        found = torch.autograd.grad(grad.square().sum(), [*step.former.parameters()], allow_unused=True)
        torch.set_rng_state(state)
        repeated, repeats.tapes = repeats.tapes, {}
        (grad,) = torch.autograd.grad(step.loss(), step.x, create_graph=True)
        expected = torch.autograd.grad(grad.square().sum(), [*step.former.parameters()], allow_unused=True)
        repeats.tapes = repeated
        for a, e in zip(found, expected, strict=True):
            assert (a is None) == (e is None)
            assert a is None or torch.allclose(a, e, rtol=1e-4, atol=1e-6)


def test_hooks_on_saved_tensors_see_the_same_ones_at_every_call():
    former, x = fastbf.BatchFormer(8, 1, dropout=0.5), features()
    counts = []
    for _ in range(5):
        former(x).sum().backward()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):  # noqa: B023
            former(x).sum().backward()
        counts.append(seen)
    assert all(seen == counts[0] for seen in counts)


def test_inputs_that_share_memory_have_no_tape():
    """They may be others the next time."""
    z, bank, target = torch.randn(3, 8), torch.randn(3, 8), torch.arange(3)

    def gradient(keys):
        q = z.clone().requires_grad_()
        loss = functional.linear_cross_entropy(q, q.detach() if keys is None else keys, target)
        return torch.autograd.grad(loss, q)[0]

    expected = gradient(bank), gradient(None)
    repeats.forget()
    for keys in (None, None, bank, bank, bank, None):
        assert torch.equal(gradient(keys), expected[keys is None])


def test_parameters_in_one_storage_have_tapes(plays):
    step = Step("torch")
    for module in (step.former, step.classifier):
        parameters = [*module.parameters()]
        flat = torch.cat([p.detach().flatten() for p in parameters])
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.data = part.view(p.shape)
    for _ in range(3):
        step()
    assert plays["by a tape"] == 4


def test_noting_leaves_the_generator_to_others():
    """Other threads draw from it meanwhile, and its state must not go back."""
    states, other = [], torch.Generator().manual_seed(5).get_state()

    def formula(*tensors):
        states.append(torch.get_rng_state())
        results = dropped(*tensors)
        states.append(torch.get_rng_state())
        if len(states) == 4:  # that which is noted
            torch.set_rng_state(other)
        return results

    for _ in range(3):
        call(formula, *tensors())
    assert len(states) == 6
    assert torch.equal(states[3], states[2])
    assert torch.equal(states[4], other)


def test_another_default_device():
    step = Step("torch")
    for _ in range(4):
        with torch.device("meta"):
            loss = step.loss()
        assert loss.device.type == "cpu"


def test_results_that_view_what_is_saved_have_no_tape():
    """Autograd would not notice that they were changed."""
    for _ in range(4):
        (y,) = call(lambda x: (torch.tanh(x).view(-1),), tensors()[0])
        y.data_ptr()
        with torch.no_grad():
            y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_a_gradient_that_is_an_input():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(w)
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return ctx.saved_tensors[0], None

    for _ in range(4):
        x, w, _ = tensors()
        (y,) = call(lambda x, w: (Scaled.apply(x, w),), x, w[:4])
        assert torch.equal(*torch.autograd.grad(y.sum(), x), w[:4])
