"""What notes the operators of a call as lines of Python, and makes a tape of them."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbf.repeats import Results, Tape
from fastbf.torch_state import (
    CAST,
    COPY_ALL,
    LOG_SOFTMAX,
    RESHAPE_COPY,
    DispatchMode,
    Operator,
    allocator,
    copy_all,
    overwritten,
    viewer,
)

aten: Any = torch.ops.aten
_matmul: Any = torch.backends.cuda.matmul


class Unrecordable(Exception):
    """A tape does not hold it."""


class _Base(NamedTuple):
    """A tensor that has a name: an input, or what an operator made."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    address: int

    @classmethod
    def of(cls, t: Tensor, name: str) -> _Base:
        return cls(name, tuple(t.shape), t.stride(), int(t.storage_offset()), t.dtype, t.data_ptr())


class Step(NamedTuple):
    """A line, and the names that it makes."""

    code: str
    makes: tuple[str, ...] = ()
    into: tuple[tuple[str, str], ...] = ()  #: names in whose memory the result may be, and the line that puts it there


_NAME = re.compile(r"\b(?:p_)?([xt]\d+)\b")


class Recorder(DispatchMode):
    """Notes what happens under it, as lines of Python.

    Attributes:
        steps: the lines. What listens adds its own, of what :meth:`constant`, :meth:`read` and :meth:`pointer` return.
        failure: why no tape can be made; empty if one can.
        paused: whether operators go unnoted.
        drew: whether numbers were drawn. If ``differentiated``, they are not, and memory has any values.
        guards: conditions for the tape, in Python.
        written: which inputs an operator writes to.
    """

    def __init__(
        self, inputs: Sequence[Tensor | None], seed: Tensor | None = None, differentiated: bool = False
    ) -> None:  # fmt: skip
        """``differentiated``: whether the tape depends on which inputs require gradients, and results do not matter."""
        super().__init__()
        self.environment: dict[str, object] = {}
        self.steps: list[Step | None] = []
        self.owners: dict[int, tuple[_Base, tuple[Any, ...], weakref.ref[Tensor]]] = {}  # by id, while a tensor lives
        self.fresh: dict[str, int] = {}  # the step that allocates what nothing has read or written yet
        self.views: dict[tuple[Any, ...], str] = {}
        self.splits: dict[str, tuple[str, list[tuple[Any, ...]]]] = {}  # by what is split
        self.failure: str = ""
        self.paused: bool = False
        self.count: int = 0
        self.inputs: list[str] = [f"x{i}" for i in range(len(inputs))]
        self.dtypes: tuple[torch.dtype | None, ...] = tuple([None if t is None else t.dtype for t in inputs])
        self.frees: bool = isinstance(inputs, list)
        self.seed: str = f"x{len(inputs)}"
        self.draws: bool = seed is not None
        self.differentiated: bool = differentiated
        self.drew: bool = False
        self.written: set[int] = set()
        self.bases: dict[int, list[_Base]] = {}  # by where their storage begins
        self.shared: set[str] = set()  # those whose memory has other names, too
        for name, t in (*zip(self.inputs, inputs, strict=True), (self.seed, seed)):
            if t is not None:
                self._own(_Base.of(t, name), t)
                self.bases.setdefault(t.untyped_storage().data_ptr(), []).append(self._owner(t))
        self.guards: list[str] = list(self._guards(inputs, differentiated))

    def __torch_dispatch__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        random = torch.Tag.nondeterministic_seeded in func.tags
        self.drew |= random
        if self.differentiated and random:
            if func is not _RANDOM:
                raise Unrecordable("numbers that are drawn otherwise")
            result = args[0]
        else:
            result = func(*args, **kwargs)
        if not self.paused and not self.failure:
            try:
                self._note(func, args, kwargs, result)
            except Unrecordable as error:
                self.failure = str(error)
        return result

    # Names

    def constant(self, value: object) -> str:
        name = f"c{len(self.environment)}"
        self.environment[name] = value
        return name

    def _once(self, value: object) -> str:
        """The constant that has this value, one for all."""
        found = next((name for name, held in self.environment.items() if held is value), None)
        return found or self.constant(value)

    def _new(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def _name(self, t: Tensor) -> str:
        base, place = _Base.of(t, self._new()), t.untyped_storage().data_ptr()
        before = [b.name for b in self.bases.get(place, [])]
        alive = {b.name for b, _, _ in self.owners.values()}
        if not alive.isdisjoint(before):  # the operator returns its argument's memory
            self.shared.update(before, [base.name])
        self._own(base, t)
        self.bases[place] = [base]
        return base.name

    def _own(self, base: _Base, t: Tensor) -> None:
        key, owners = id(t), self.owners
        owners[key] = base, self._geometry(base, t), weakref.ref(t, lambda _: owners.pop(key, None))

    def _owner(self, t: Tensor) -> _Base:
        if id(t) not in self.owners:
            self._own(self._aliased(t), t)
        base, geometry, _ = self.owners[id(t)]
        if self._geometry(base, t) != geometry:
            raise Unrecordable("a tensor that was given another shape or memory")
        return base

    def _aliased(self, t: Tensor) -> _Base:
        """The base of a tensor that no operator made, the only one whose memory holds its.

        Autograd returns what it saved as a tensor of its own.
        """
        bases = self.bases.get(t.untyped_storage().data_ptr(), []) if t.numel() else []
        (begin, end), places = _place(t.shape, t.stride(), t.dtype, t.data_ptr()), []
        for base in bases:
            first, last = _place(base.shape, base.stride, base.dtype, base.address)
            if begin < last and first < end:
                places.append((base, first <= begin and end <= last))
        if len(places) == 1 and places[0][1]:
            return places[0][0]
        raise Unrecordable("a tensor that is neither an input nor made here")

    def is_of_input(self, t: Tensor) -> bool:
        """Whether a tensor is an input or a part of one."""
        return self._owner(t).name in self.inputs

    @staticmethod
    def _geometry(base: _Base, t: Tensor) -> tuple[Any, ...]:
        return base.name, tuple(t.shape), t.stride(), t.storage_offset()

    def _is_whole(self, t: Tensor) -> bool:
        base = self._owner(t)
        return self._geometry(base, t) == (base.name, base.shape, base.stride, base.offset)

    def pointer(self, t: Tensor) -> str:
        base = self._owner(t)
        self.fresh.pop(base.name, None)
        distance = t.data_ptr() - base.address
        return f"p_{base.name}" + (f" + {distance}" if distance else "")

    def read(self, t: Tensor) -> str:
        """An expression for a tensor that an operator reads or writes."""
        base = self._owner(t)
        self.fresh.pop(base.name, None)
        return self._view(base, t)

    def _returned(self, t: Tensor) -> str:
        """An expression for a result. A part of an input is a view that autograd knows, and checks for changes."""
        base = self._owner(t)
        if base.name not in self.inputs or self._is_whole(t):
            return self.read(t)
        distance = int(t.storage_offset()) - base.offset
        return f"{base.name}.as_strided({tuple(t.shape)}, {t.stride()}, {base.name}.storage_offset() + {distance})"

    def _view(self, base: _Base, t: Tensor) -> str:
        if t.dtype != base.dtype:
            raise Unrecordable("a view of another dtype")
        if self._is_whole(t):
            return base.name
        shape, stride, offset = tuple(t.shape), t.stride(), int(t.storage_offset())
        key = self._geometry(base, t)
        call, parts = self.splits.pop(base.name, ("", ()))
        if key in parts:
            names = [self.views.setdefault(part, self._new()) for part in parts]
            self.steps.append(Step(f"{', '.join(names)}, = {call}"))
        elif key not in self.views:
            name = self.views[key] = self._new()
            self.steps.append(Step(f"{name} = {self._part(base, shape, stride, offset - base.offset)}", (name,)))
        return self.views[key]

    def _part(self, base: _Base, shape: tuple[int, ...], stride: tuple[int, ...], distance: int) -> str:
        if (quick := viewer()) is not None:
            return f"{self._once(quick)}({base.name}, {shape}, {stride}, {distance})"
        return f"{base.name}.as_strided({shape}, {stride}, {base.name}.storage_offset() + {distance})"

    # Operators

    def _note(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func is aten.promote_types.default:  # its result is a dtype, of dtypes
            return
        if (func.is_view and func is not aten.view.dtype) or func is RESHAPE_COPY:
            base = self._owner(args[0])
            several = isinstance(result, list | tuple)
            for view in result if several else [result]:
                self._own(base, view)
            if several and func in _CALLS and self._is_whole(args[0]):  # one call instead of a view each
                rest = ", ".join(map(repr, args[1:]))
                call = f"{self._once(_CALLS[func])}({base.name}, {rest})"
                self.splits[base.name] = call, [self._geometry(base, view) for view in result]
            return
        if func in (aten.empty.memory_format, aten.new_empty.default) and result.is_contiguous():
            name = self._name(result)
            self.fresh[name] = len(self.steps)
            self.steps.append(Step(f"{name} = {self._allocation(result)}", (name,)))
            return
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            raise Unrecordable("a generator, whose state goes on")
        if func in _INTO and kwargs.keys() == {"out"} and self._may_allocate(func, args, kwargs["out"]):
            return self._allocating(func, args, kwargs["out"])
        for t in overwritten(func, args, kwargs):
            if (owner := self._owner(t).name) in self.inputs:
                self.written.add(self.inputs.index(owner))
        code = self._call(func, args, kwargs)
        if any(result is a for a in (*args, *kwargs.values())) or result is None:
            self.steps.append(Step(code))
        elif isinstance(result, Tensor):
            name = self._name(result)
            into = self._into(func, args, name, result) if not kwargs else ()
            self.steps.append(Step(f"{name} = {code}", (name,), tuple(into)))
        elif isinstance(result, tuple) and all(isinstance(t, Tensor | None) for t in result):
            names = ["_" if t is None else self._name(t) for t in result]
            self.steps.append(Step(f"{', '.join(names)} = {code}", tuple(names)))
        else:
            raise Unrecordable(f"the results of {func}")

    def _allocation(self, t: Tensor) -> str:
        size, dtype = f"{tuple(t.shape)}, {t.stride()}", self._once(t.dtype)
        if (quick := allocator(t.device.type)) is not None:
            return f"{self._once(quick)}({size}, {dtype})"
        return f"{self._once(torch.empty_strided)}({size}, dtype={dtype}, device={self._once(t.device)})"

    def _call(self, func: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        call: Callable[..., Any] = _CALLS.get(func, func)
        if func in _WITH_DTYPE:  # which PyTorch's own functions take by name
            args, kwargs = args[:-1], {**kwargs, "out_dtype": args[-1]}
        if func is CAST and kwargs.keys() != {"dtype"}:
            call = func
        if func is aten.addmm.default and not kwargs:
            call, args = self._product(call, args)
        if func is LOG_SOFTMAX and not args[2]:
            call, args = torch.log_softmax, args[:2]
        given = [*map(self._argument, args), *(f"{name}={self._argument(a)}" for name, a in kwargs.items())]
        return f"{self._once(call)}({', '.join(given)})"

    def _argument(self, a: Any) -> str:
        if isinstance(a, Tensor):
            return self.read(a)
        if isinstance(a, list | tuple) and any(isinstance(item, Tensor) for item in a):
            return f"[{', '.join(map(self._argument, a))}]"
        return repr(a) if isinstance(a, int | None) else self.constant(a)

    def _into(self, func: Operator, args: tuple[Any, ...], name: str, result: Tensor) -> Iterator[tuple[str, str]]:
        """For each operand whose memory the result fits into: its name and the line that writes there."""
        if func not in _IN_PLACE or not all(isinstance(a, Tensor) for a in args):
            return
        for a, b in (args, args[::-1]):  # the order does not matter to these operators
            base = self._owner(a)
            if (a.shape, a.stride(), a.dtype) != (result.shape, result.stride(), result.dtype):
                continue
            if self._is_whole(a) and base.name not in {*self.inputs, *self.shared} and self._owner(b).name != base.name:
                yield base.name, f"{name} = {self._once(_IN_PLACE[func])}({base.name}, {self.read(b)})"

    def _may_allocate(self, func: Operator, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether an operator may allocate what it writes to: nothing has seen that yet, and it is whole."""
        if func is aten.sum.IntList_out and (len(args) != 2 or len(args[1]) != 1 or args[0].dtype != out.dtype):
            return False
        return self._is_whole(out) and self._owner(out).name in self.fresh

    def _allocating(self, func: Operator, args: tuple[Any, ...], out: Tensor) -> None:
        name, call = self._owner(out).name, _CALLS[func]
        self.steps[self.fresh.pop(name)] = None
        if func is aten.sum.IntList_out:
            x, (dim,) = args
            args = x, dim
        else:
            call, args = self._product(call, args)
        self.steps.append(Step(f"{name} = {self._once(call)}({', '.join(map(self._argument, args))})", (name,)))

    def _product(self, call: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """What computes [bias +] x · weight: ``F.linear``, which needs no view, if the transposed weight is whole."""
        *bias, x, weight = args
        transposed = weight.t()
        self._own(self._owner(weight), transposed)
        return (F.linear, (x, transposed, *bias)) if self._is_whole(transposed) else (call, args)

    # The tape

    def tape(self, results: Results, of: Any, again: Callable[..., Any] | None) -> Tape:
        """The tape of what was noted; the last two are its own."""
        if self.failure:
            raise Unrecordable(self.failure)
        returned = ", ".join("None" if t is None else self._returned(t) for t in results)
        steps = [step for step in self.steps if step is not None]
        addressed = {m[1] for step in steps for m in _NAME.finditer(step.code) if m[0].startswith("p_")}
        seed, inputs = self.seed, self.inputs
        pointers = [name for name in (*inputs, seed) if name in addressed]
        lines = [f"{', '.join(inputs)}, = tensors", *["tensors.clear()"] * self.frees]
        lines += [f"p_{name} = {name}.data_ptr()" for name in pointers]
        lines += [f"if ({' | '.join(f'p_{name}' for name in pointers)}) & 15: return None"] * bool(pointers)
        last = {name: i for i, step in enumerate(steps) for name in _names(step.code)}
        kept = {*_names(returned), seed, *([] if self.frees else inputs)}
        for i, step in enumerate(steps):
            free = (line for name, line in step.into if all(last[n] <= i and n not in kept for n in self._all(name)))
            lines.append(next(free, step.code))
            lines += [f"p_{name} = {name}.data_ptr()" for name in step.makes if name in addressed]
            if dead := sorted(name for name, at in last.items() if at == i and name not in kept):
                lines.append(f"del {', '.join(dead)}")
        lines.append(f"return ({returned},)")
        guards, body = " and ".join(self.guards) or "True", "\n    ".join(lines)
        source = f"def fits({', '.join(inputs)}):\n    return {guards}\n\n"
        source += f"def run(stream, {seed}, tensors):\n    {body}\n"
        scope: dict[str, Any] = dict(self.environment)
        exec(compile(source, "<fastbf tape>", "exec"), scope)
        return Tape(scope["fits"], scope["run"], self.draws, self.dtypes, of, again, source)

    def _all(self, name: str) -> Iterator[str]:
        """The names of a tensor's memory: its own and its views'."""
        yield name
        yield from (view for key, view in self.views.items() if key[0] == name)

    def reads(self, i: int, results: Results) -> bool:
        """Whether an operator reads the i-th input, or a result is one or a part of it."""
        name = self.inputs[i]
        if any(step is not None and name in _names(step.code) for step in self.steps):
            return True
        return any(t is not None and self._owner(t).name == name for t in results)

    def is_alone(self, i: int) -> bool:
        """Whether the i-th input shares its storage with no other one."""
        return all(len(bases) == 1 for bases in self.bases.values() if self.inputs[i] in [b.name for b in bases])

    def overlap(self, a: Tensor, b: Tensor) -> bool:
        """Whether two tensors that are there have memory in common, as parts of one."""
        return a is not b and self._owner(a).name == self._owner(b).name

    def _guards(self, inputs: Sequence[Tensor | None], differentiated: bool) -> Iterator[str]:
        """Conditions for tensors of the geometry that was noted, whatever they are."""
        for name, t in zip(self.inputs, inputs, strict=True):
            if t is None:
                yield f"{name} is None"
                continue
            yield f"type({name}) is {self._once(type(t))} and {name}.shape == {self._once(t.shape)}"
            # In half the time of its strides. Those of dimensions of size 1, which it leaves open, address nothing.
            contiguous = t.is_contiguous()
            yield f"{name}.is_contiguous()" if contiguous else f"{name}.stride() == {self.constant(t.stride())}"
            yield f"{name}.dtype is {self._once(t.dtype)}"
            yield f"{name}.is_cpu" if t.is_cpu else f"{name}.device == {self.constant(t.device)}"
            if differentiated:
                yield f"{name}.requires_grad" if t.requires_grad else f"not {name}.requires_grad"
        if any(t is not None and t.is_cuda for t in inputs):
            # Attention in fp32 goes by it, products see for themselves.
            yield f"{self._once(_matmul)}.fp32_precision == {_matmul.fp32_precision!r}"
        if differentiated:  # which products may be by oneDNN
            yield f"{self._once(torch.backends.mkldnn)}.enabled"


def _place(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, address: int) -> tuple[int, int]:
    """Where a tensor that has elements begins and ends in memory."""
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return address, address + (last + 1) * dtype.itemsize


def _names(code: str) -> set[str]:
    return {m[1] for m in _NAME.finditer(code)}


_RANDOM: Operator = getattr(aten.random_, "from")
#: Quicker ways to call operators than by their overloads.
_CALLS: dict[Operator, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
    aten.mm.dtype: torch.mm,
    aten.mm.dtype_out: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.addmm.out: torch.addmm,
    aten.addmm.dtype: torch.addmm,
    aten.addmm.dtype_out: torch.addmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.baddbmm.out: torch.baddbmm,
    aten.copy_.default: Tensor.copy_,
    aten.add_.Tensor: Tensor.add_,
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: Tensor.mul_,
    aten.sub_.Tensor: Tensor.sub_,
    aten.addcmul_.default: Tensor.addcmul_,
    aten.copysign_.Tensor: Tensor.copysign_,
    aten.clamp_min.out: torch.clamp_min,
    aten.abs.out: torch.abs,
    aten.relu_.default: Tensor.relu_,
    aten.cat.default: torch.cat,
    aten.clone.default: torch.clone,
    aten.full.default: torch.full,
    aten.ones_like.default: torch.ones_like,
    _RANDOM: Tensor.random_,
    aten.softmax.int_out: torch.softmax,
    aten.view.dtype: Tensor.view,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.sum.dim_IntList: torch.sum,
    aten.sum.IntList_out: torch.sum,
    aten.split_with_sizes.default: torch.split_with_sizes,
    CAST: Tensor.to,
    COPY_ALL: copy_all,
}
#: Operators of two tensors that may write into either.
_IN_PLACE: dict[Operator, Callable[..., Any]] = {aten.add.Tensor: Tensor.add_, aten.mul.Tensor: Tensor.mul_}
_WITH_DTYPE = (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out)
_INTO = (aten.mm.out, aten.addmm.out, aten.sum.IntList_out)  # which allocate what they are not given
