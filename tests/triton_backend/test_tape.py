"""Tapes of calls on kernels: launches, what kernels refuse, and single operators."""

import pytest
import torch

import fastbf
from fastbf import backend, functional, repeats, signatures
from fastbf.kernels import launch
from fastbf.triton_backend import launches
from tests.repeated import C, Step, assert_as_written, call, features


def test_a_seed_that_is_given_and_none():
    """A rate that drops nothing, with and without a seed."""
    weights, x = fastbf.BatchFormerLayer(C, 1, C)._weights(), features()
    for p in (1e-7, 1e-7, 1e-7, 0.0, 0.0, 0.0, 1e-7):
        functional.encoder_layer(x, *weights, num_heads=1, dropout_p=p, seed=5, backend="triton")
    of_calls = [what for what in repeats.tapes if what[0] == "encoder_layer" and what[1:2] != (x.shape,)]
    assert {what[-1] for what in of_calls} == {True, False}  # whether there is no seed


def test_a_kernel_that_is_refused_ends_repeated_calls(plays):
    """The backward's, say: the next step takes PyTorch, though forward has a tape. Other kernels get tapes again."""
    step = Step()
    for _ in range(3):
        step()
    assert repeats.tapes
    backend.unbuilt("encoder_layer", torch.device("cpu"), RuntimeError("boom"))
    try:
        assert not repeats.tapes
        with pytest.raises(ValueError, match="boom"):
            step()
    finally:
        backend._failed.clear()
        signatures.forget()
    plays.clear()
    for _ in range(3):
        step()
    assert plays["by a tape"] == 4


def _attention(n, p):
    q, k, v = torch.randn(3, n, 2, C).unbind()
    return (q, k, v), lambda *qkv: functional.batch_attention(*qkv, dropout_p=p, backend="triton")


def _add_norm(n, p):
    given = torch.randn(n, 3, C), torch.randn(n, 3, C), torch.rand(C), torch.rand(C)
    return given, lambda *t: functional.dropout_add_layer_norm(*t, dropout_p=p, eps=1e-5, backend="triton")


def _relu(n, p):
    return (torch.randn(n, C),), lambda x: functional.activation_dropout(x, "relu", dropout_p=p, backend="triton")


def _gelu(n, p):
    return (torch.randn(n, C),), lambda x: functional.activation_dropout(x, "gelu", dropout_p=p, backend="triton")


@pytest.mark.parametrize("n", [4, 40])  # attention packs the smaller one
@pytest.mark.parametrize("op", [_attention, _add_norm, _relu, _gelu])
def test_single_ops(op, n, plays):
    for p, frozen in ((0.5, 1), (0.5, 0), (0.25, 0)):
        given, function = op(n, p)
        given = [t.requires_grad_(i >= frozen or len(given) == 1) for i, t in enumerate(given)]

        def step(function=function, given=given):
            out = function(*given)
            return [out.detach(), *torch.autograd.grad(out.sin().sum(), [t for t in given if t.requires_grad])]

        for _ in range(2):
            step()
        plays.clear()
        assert_as_written(step)
        assert plays["by a tape"] == 2


class Compiled:
    """In the place of a compiled kernel; notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)


def test_launches(monkeypatch):
    """Pointers are those of a call's own tensors and views; numbers and the rest are what was noted."""
    compiled = Compiled()
    monkeypatch.setattr(launches, "stream_for", lambda _: 77)

    def function(a, b):
        made = torch.empty(3, 4)
        launch._observers.observe(launch.Launched(compiled, 5, (a, b[1:], made, made[2]), (2.5, 64)))
        return made, made[1]

    for _ in range(2):
        a, b = torch.randn(8), torch.randn(4, 4)
        launch._observers.observe = lambda _: None
        call(function, a, b, noting=launches.noting)
    for _ in range(2):
        a, b = torch.randn(8), torch.randn(4, 4)
        made, row = call(function, a, b, noting=launches.noting)
        head = (5, 1, 1, 77, "function", "metadata", None, None, None)
        pointers = (a.data_ptr(), b.data_ptr() + 16, made.data_ptr(), made.data_ptr() + 32)
        assert compiled.launches.pop() == (*head, *pointers, 2.5, 64)
        assert row.data_ptr() == made.data_ptr() + 16
    assert not compiled.launches


def test_misaligned_inputs_are_not_launched_on(monkeypatch, plays):
    """The kernel that was noted may assume multiples of 16 bytes."""
    compiled = Compiled()
    monkeypatch.setattr(launches, "stream_for", lambda _: 0)

    def function(a):
        if launch._observers.observe:
            launch._observers.observe(launch.Launched(compiled, 1, (a,), ()))
        return (a + 1,)

    launch._observers.observe = None
    for aligned in (True, True, True, False, False, False, True):
        a = torch.randn(9)[:8] if aligned else torch.randn(9)[1:]
        assert torch.equal(call(function, a, noting=launches.noting)[0], a + 1)
    assert plays["by a tape"] == 2
    assert [pointer % 16 for *_, pointer in compiled.launches] == [0, 0]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_every_launch(hook, monkeypatch):
    from triton import knobs

    monkeypatch.setattr(launch, "_INTERPRETED", False)
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        assert launch.stream_for(torch.device("cpu")) is None
    finally:
        chain.remove(print)


def test_retained_graphs_and_second_derivatives():
    step = Step(dropout=0.0)
    for _ in range(4):
        loss = step.loss()
        wanted = step.parameters()
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        again = torch.autograd.grad(loss, wanted, retain_graph=True)
        assert all(map(torch.equal, first, again))
        twice = torch.autograd.grad(loss, step.x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            twice.sum().backward()


def test_batches_of_gradients_are_refused_and_change_nothing():
    step = Step()
    for _ in range(4):
        for out in (step.classifier.loss(step.x, step.y), step.call(step.x)):
            grads = torch.ones(3, *out.shape)
            with pytest.raises(RuntimeError, match="one gradient at a time"):
                torch.autograd.grad(out, step.x, grads, is_grads_batched=True)
            assert torch.autograd.grad(out, step.x, grads[0])[0].any()


def test_kernels_read_one_of_several_results(monkeypatch):
    """Of an operator that returns a tuple."""
    compiled = Compiled()
    monkeypatch.setattr(launches, "stream_for", lambda _: 0)

    def function(a):
        _, mean, _ = torch.native_layer_norm(a, (4,), None, None, 1e-5)
        if launch._observers.observe:
            launch._observers.observe(launch.Launched(compiled, 1, (mean,), ()))
        return (mean,)

    launch._observers.observe = None
    for _ in range(3):
        (mean,) = call(function, torch.randn(3, 4), noting=launches.noting)
    assert [pointer for *_, pointer in compiled.launches] == [mean.data_ptr()]
