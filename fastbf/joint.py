"""Both directions of a formula by tapes (``tape.py``), on a CPU.

A formula is a function of tensors in PyTorch's operators, and autograd differentiates it. When it comes for the second
time, it is noted beside the call: forward first, then what autograd does backward. From the third call on one autograd
Function runs both tapes, and autograd records that alone. Results and gradients are the same to the last bit. Noting
costs more than another step. A large call is noted when it comes for the ninth time, so that sizes that come a few
times do not pay it.

The tapes are for calls that draw from the default generator, or not at all. A second derivative, or a batch of
gradients, runs the formula again, from the generator's state at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from fastbf import tape
from fastbf.autograd import Gradients, applying
from fastbf.recorder import Recorder, Unrecordable
from fastbf.repeats import Tape, What, hold
from fastbf.torch_state import (
    autocast_dtype,
    count_onednn,
    donated,
    is_batched,
    no_autocast,
    release_saved,
    saves_itself,
    unbatched,
    version,
    watched,
)

#: Up to this many elements of the first tensor a call is small; docs/backends.md has what tapes gain.
SMALL = 1 << 17
#: Of tensors or None; the first result is differentiated.
Formula = Callable[..., tuple[Tensor, ...]]


class _Noted(NamedTuple):
    """A formula whose tapes there are."""

    formula: Formula
    results: int  #: how many it has; what backward needs besides the inputs follows them in forward's tape
    backward: Tape | None  #: of the gradient, the inputs and what forward kept; None if no gradient is wanted
    others: tuple[int, ...]  #: the inputs that backward does not read
    written: tuple[int, ...]  #: which of its own it overwrites
    draws: bool  #: whether it draws from the default generator
    autocast: torch.dtype | None


def call(formula: Formula, what: What | None, tensors: Sequence[Tensor | None], again: Callable[..., Any]) -> Any:
    """The formula's results, given its tensors.

    Args:
        formula: depends on nothing but tensors that ``what`` does not tell.
        what: as in :func:`fastbf.tape.play`; the other arguments, the mode of autograd and that of autocast.
        tensors: the first is none of None.
        again: makes a call that a tape fits (``fastbf.repeats.Tape``).
    """
    first: Any = tensors[0]
    if what is not None and first.is_cpu and saves_itself() and not watched():
        nth = 2 if first.numel() <= SMALL else 9
        if tape.is_second(what, tensors, nth=nth):
            with suppress(Exception):  # the call as written raises its own
                hold(what, _noted(formula, tensors, again))
    return formula(*tensors)


def play(found: Tape, tensors: Sequence[Tensor | None]) -> Any:
    """The results of a formula, by a tape that fits the tensors."""
    noted: _Noted = found.of
    if not saves_itself():  # checkpoints count what is saved, which must be the same at every call
        return noted.formula(*tensors)
    if noted.backward is None:
        return tape.play(None, tensors, None, found)
    return applying(_Played, tensors[0])(found, *tensors)


class _Played(Function):
    """Saves what the tape of backward reads, as autograd does. A second derivative needs the other inputs as well."""

    @staticmethod
    def forward(ctx: Any, found: Tape, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        noted: _Noted = found.of
        ctx.noted, ctx.state = noted, torch.default_generator.get_state() if noted.draws else None
        made = tape.play(None, tensors, None, found)
        read: list[Tensor | None] = list(tensors)
        ctx.others = {}
        for i in noted.others:
            ctx.others[i], read[i] = (tensors[i], version(tensors[i])), None  # type: ignore[arg-type]
        ctx.save_for_backward(*read, *made[noted.results :])
        ctx.set_materialize_grads(False)
        results = made[: noted.results]
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        noted, needs, tensors = ctx.noted, ctx.needs_input_grad, ctx.saved_tensors
        if grad is None:  # that of other results alone
            return (None,) * len(needs)
        if torch.is_grad_enabled() or is_batched(grad):
            return None, *_differentiable(ctx, grad, tensors, needs[1:])
        inputs = [grad.contiguous(), *tensors]
        del tensors
        if donated(grad):
            ctx.state, ctx.others = None, {}
        else:
            for i in noted.written:
                inputs[i] = inputs[i].clone()
        release_saved(ctx)
        count_onednn()
        return None, *tape.play(None, inputs, None, noted.backward)


def _differentiable(
    ctx: Any, grad: Tensor, saved: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:  # fmt: skip
    """The gradients with a graph of their own."""
    noted, state = ctx.noted, ctx.state
    inputs: list[Any] = list(saved[: len(needs)])
    for i, (t, before) in ctx.others.items():
        if version(t) != before:
            raise RuntimeError(
                f"a tensor of shape {tuple(t.shape)} that a second derivative needs was modified by an inplace "
                f"operation after forward."
            )
        inputs[i] = t
    now = torch.default_generator.get_state()
    with torch.enable_grad():
        # Views, because one input may be computed from another and only the direct dependence counts.
        inputs = [None if t is None else t.view_as(t) for t in inputs]
        try:
            if state is not None:
                torch.default_generator.set_state(state)
            autocast = torch.autocast(grad.device.type, noted.autocast, enabled=noted.autocast is not None)
            with unbatched(grad), autocast:
                result = noted.formula(*inputs)[0]
        finally:
            torch.default_generator.set_state(now)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(result, wanted, grad, create_graph=True, allow_unused=True))
    return [next(grads) if need else None for need in needs]


def _noted(formula: Formula, tensors: Sequence[Tensor | None], again: Callable[..., Any]) -> Tape:
    """The tape of a formula's forward, which knows that of backward. Nothing is drawn."""
    first: Any = tensors[0]
    if not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors):
        raise Unrecordable("a subclass, whose operators may be others")
    autocast, forward, kept = autocast_dtype(first), Recorder(tensors, differentiated=True), _Kept()
    try:
        # Autocast must not keep what it casts, which is not the caller's.
        uncached = torch.autocast(first.device.type, autocast, enabled=autocast is not None, cache_enabled=False)
        with uncached, forward, saved_tensors_hooks(partial(kept.pack, forward), kept.unpack):
            leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
            results = formula(*leaves)
        if any(t is not None and forward.overlap(result, t) for result in results for t in kept.tensors):
            raise Unrecordable("a result whose changes autograd would not notice")
        noted = _Noted(formula, len(results), None, (), (), forward.drew, autocast)
        made = forward.tape([*results, *kept.tensors], None, again)
        if results[0].requires_grad:
            noted = _with_backward(noted, results[0], leaves, tensors, kept)
        return made._replace(of=noted)
    finally:
        kept.tensors.clear()  # which hooks of the graph refer to


def _with_backward(
    noted: _Noted, result: Tensor, leaves: Sequence[Tensor | None], tensors: Sequence[Tensor | None], kept: _Kept
) -> _Noted:  # fmt: skip
    """Notes how the gradients of leaves, which stand for tensors, come from that of the result."""
    grad = result.detach().new_zeros(result.shape)
    recorder = Recorder([grad, *tensors, *kept.tensors])
    recorder.guards.clear()  # the tape is for what forward's kept
    recorder.paused = True
    total = _Given.apply(result, grad, recorder)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    with recorder, no_autocast(result):
        found = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    if any(i <= len(tensors) or not recorder.is_alone(i) for i in recorder.written):
        raise Unrecordable("a change of what is the caller's, or of what has another name")
    grads = [next(found) if t is not None and t.requires_grad else None for t in leaves]
    others = tuple([i for i, t in enumerate(tensors) if t is not None and not recorder.reads(i + 1, grads)])
    return noted._replace(
        backward=recorder.tape(grads, None, None), others=others, written=tuple(sorted(recorder.written))
    )


class _Kept:
    """What autograd saves while a recorder notes forward, apart from the inputs. It is freed after its last use."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.uses: list[int] = []

    def pack(self, recorder: Recorder, t: Tensor) -> tuple[Any, int]:
        """A tensor of the inputs or the index of another, and the tensor's version."""
        if recorder.is_of_input(t):
            return t, version(t)
        at = next((i for i, held in enumerate(self.tensors) if held is t), len(self.tensors))
        if at == len(self.tensors):
            self.tensors.append(t)
            self.uses.append(0)
        self.uses[at] += 1
        return at, version(t)

    def unpack(self, packed: tuple[Any, int]) -> Any:
        held, before = packed
        t: Any = held if isinstance(held, Tensor) else self.tensors[held]
        if version(t) != before:
            raise Unrecordable("a change of what backward reads, which autograd refuses")
        if t is not held:
            self.uses[held] -= 1
            if not self.uses[held]:
                self.tensors[held] = None
        return t


class _Given(Function):
    """A number whose gradient is one that is given, from where on a recorder notes.

    ``torch.autograd.grad`` imports sympy where it is given one itself, which takes a quarter of a second.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, grad: Tensor, recorder: Recorder) -> Tensor:
        ctx.grad, ctx.recorder = grad, recorder
        return result.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        ctx.recorder.paused = False
        return ctx.grad, None, None
