"""What launchers share: the launch, building ahead, operators for ``torch.compile``, and arguments of dropout."""

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, get_type_hints

import torch
from torch import Tensor
from torch.utils import flop_counter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from fastbf.kernels.failures import BuildError, building, compiler_refuses, device_refuses
from fastbf.kernels.rng import KEEP_ALL, KEEP_BITS, KEEP_HALVES

P = ParamSpec("P")


class Drop(NamedTuple):
    """The dropout of an elementwise kernel."""

    seed: Tensor | None = None  #: int64, one element; None only if nothing is dropped
    site: int = 0  #: ``fastbf.dropout.Site``
    threshold: int = 0  #: of 65,536 equally likely values, how many mean "drop"


#: No dropout.
NO_DROP = Drop()

#: Options of every compilation: a product and a sum are rounded once, whatever Triton's default is.
OPTIONS = {"enable_fp_fusion": True}


# Compiled kernels and the values of their compile-time parameters, by all that Triton's cache depends on. A look-up
# takes a fraction of the time of Triton's dispatcher, which inspects every argument.
_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


class Launched(NamedTuple):
    """A launch, with what making it again takes."""

    compiled: Any  #: a ``CompiledKernel``; None for Triton's interpreter, where the observer makes the launch
    programs: int
    tensors: tuple[Tensor, ...]
    values: tuple[Any, ...]  #: numbers and compile-time parameters, in the kernel's order
    interpret: Callable[..., None] | None = None  #: in the interpreter: the launch, given the tensors


#: Whether a mode sees every operator of this thread, as a counter of FLOPs does. Torch has no public way to ask: the
#: backend sets this one, and without it no mode is known of.
watched: Callable[[], bool] = bool


class Planned(NamedTuple):
    """A launch that is not made."""

    kernel: Any
    device: torch.device
    pointers: tuple[tuple[torch.dtype, bool], ...]  #: dtypes, and whether addresses are multiples of 16
    numbers: tuple[Any, ...]
    constants: Mapping[str, Any]


#: Launches by all that Triton's cache depends on.
Plan = dict[tuple[Any, ...], Planned]


class _Observers(threading.local):
    """What this thread does besides, or instead of, launching."""

    observe: Callable[[Launched], None] | None = None
    plan: Plan | None = None
    ahead: "ahead | None" = None


_observers = _Observers()
_INTERPRETED = knobs.runtime.interpret  # where kernels are made, each for its life


@contextmanager
def noted(observe: Callable[[Launched], None]) -> Iterator[None]:
    """Within the context ``observe`` hears of each launch of this thread."""
    _observers.observe = observe
    try:
        yield
    finally:
        _observers.observe = None


@contextmanager
def planned() -> Iterator[Plan]:
    """Within the context launches of this thread are not made. Those without a kernel that is built are listed."""
    before, _observers.plan = _observers.plan, {}
    try:
        yield _observers.plan
    finally:
        _observers.plan = before


@contextmanager
def unplanned() -> Iterator[None]:
    """Within the context launches are made, inside that of :func:`planned` as well."""
    before, _observers.plan = _observers.plan, None
    try:
        yield
    finally:
        _observers.plan = before


class ahead:
    """Within the context, which is entered once, the first launch without a kernel calls ``build(*args)`` before."""

    def __init__(self, build: Callable[..., None], *args: Any) -> None:
        self.build: Callable[..., None] = build
        self.args: tuple[Any, ...] = args

    def __enter__(self) -> None:
        _observers.ahead = self

    def __exit__(self, *_: object) -> None:
        _observers.ahead = None


def build(plan: Plan) -> None:
    """Builds the kernels of a plan side by side: Triton's compiler and ptxas let other threads run.

    Raises:
        BuildError: a compiler or the device refuses one. The others are built.
    """
    if not plan:
        return
    for kernel, device in {(job.kernel, job.device) for job in plan.values()}:
        with _on(device):  # Triton makes a kernel's caches for a device at first use, not safe from several threads
            kernel.device_caches[driver.active.get_current_device()]
    failed: list[Planned] = []

    def attempt(job: Planned) -> None:
        try:
            _compile(job)
        except Exception:
            failed.append(job)

    with ThreadPoolExecutor(min(len(plan), os.cpu_count() or 1)) as threads:
        list(threads.map(attempt, plan.values()))
    for job in failed:  # alone: CPython 3.11 may fail to parse in several threads at once
        _compile(job)


def _compile(job: Planned) -> None:
    """Compiles and loads a kernel."""
    tensors = [torch.empty(32, dtype=dtype, device="cpu")[0 if aligned else 1 :] for dtype, aligned in job.pointers]
    with _on(job.device):
        with building(job.kernel.fn.__name__, compiler_refuses):
            compiled = job.kernel.warmup(*tensors, *job.numbers, grid=(1,), **job.constants, **OPTIONS)
        with building(job.kernel.fn.__name__, device_refuses):
            compiled.run  # noqa: B018 (a property, which loads it)


def _captures(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_heard() -> bool:
    """Whether launches are noted or planned."""
    return _observers.observe is not None or _observers.plan is not None


def stream_for(device: torch.device) -> int | None:
    """The current stream; None where a launch is not made or takes the long way.

    That is inside of :func:`planned`, on another device than the current one, and with a profiler's hooks.
    """
    if _observers.plan is not None:
        return None
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # Triton allows None
        return None
    if _INTERPRETED:
        return 0
    of_device = driver.active
    current = of_device.get_current_device()
    if device.index is not None and device.index != current:
        return None
    return of_device.get_current_stream(current)


def launch(
    kernel: Any, programs: int, device: torch.device, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...],
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """Runs ``programs`` programs of a kernel on ``device``.

    Args:
        kernel: its parameters are pointers, then numbers that it does not specialise on, then compile-time ones.
        tensors, numbers: the first two kinds, in order.
        constants: the compile-time parameters by name, and options of the launch such as num_warps. A call site always
            gives them in the same order.

    Raises:
        BuildError: at the first launch with such arguments, a compiler or the device refuses the kernel.
        CaptureError: the first launch is captured into a CUDA graph.
    """
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, device, tensors, numbers, constants)
        return
    observe, plan = _observers.observe, _observers.plan
    if not isinstance(kernel, JITFunction):  # Triton's interpreter, which builds nothing
        if plan is not None:
            return
        interpret = partial(_interpret, kernel, programs, numbers, constants)
        if observe is None:
            interpret(*tensors)
        else:
            observe(Launched(None, programs, tensors, (), interpret))
        return
    addresses = 0
    for t in tensors:
        addresses |= t.data_ptr()
    aligned = addresses % 16 == 0 or tuple([t.data_ptr() % 16 == 0 for t in tensors])
    key = (kernel.fn, device, aligned, *[t.dtype for t in tensors], *constants.values())
    found = _compiled.get(key)
    if plan is not None:
        if found is None:
            pointers = tuple([(t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
            plan[key] = Planned(kernel, device, pointers, numbers, constants)
        return
    if found is None:
        build_ahead, _observers.ahead = _observers.ahead, None
        if build_ahead is not None and observe is None and not _captures(device):
            build_ahead.build(*build_ahead.args)
        with building(kernel.fn.__name__, compiler_refuses):
            kernel.warmup(*tensors, *numbers, grid=(programs,), **constants, **OPTIONS)
        with building(kernel.fn.__name__, device_refuses):
            compiled = kernel[(programs,)](*tensors, *numbers, **constants, **OPTIONS)
        values = tuple(constants[p.name] for p in kernel.params if p.is_constexpr)
        _compiled[key] = compiled, values
    else:
        compiled, values = found
        compiled[(programs, 1, 1)](*tensors, *numbers, *values)
    if observe is not None:
        observe(Launched(compiled, programs, tensors, (*numbers, *values)))


def _interpret(
    kernel: Any, programs: int, numbers: tuple[Any, ...], constants: Mapping[str, Any], *tensors: Tensor
) -> None:  # fmt: skip
    kernel[(programs,)](*tensors, *numbers, **constants)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. Triton's own is made for kernels and costs the host a few microseconds."""
    return -(-a // b)


def at_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy of it, whose address is a multiple of 16: for others another kernel would be built."""
    return x.clone() if x.data_ptr() % 16 else x


def keep_mode(threshold: int) -> int:
    """How decisions are drawn: ``KEEP`` of ``kernels/rng.py``."""
    return {0: KEEP_ALL, 32768: KEEP_BITS}.get(threshold, KEEP_HALVES).value


def keep_scale(threshold: int) -> float:
    """What a kept element is multiplied by; 0 at 65,536, where none is kept."""
    return 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def seed_or(seed: Tensor | None, stand_in: Tensor) -> Tensor:
    """The seed, or without dropout another tensor, which kernels do not read."""
    return stand_in if seed is None else seed


def _flat(name: str, kind: Any) -> dict[str, Any]:
    """A launcher's parameter as parameters of a schema: a NamedTuple becomes its fields."""
    if not hasattr(kind, "_fields"):
        return {name: kind}
    return {f"{name}_{field}": of_field for field, of_field in get_type_hints(kind).items()}


def _newest(module: str, launcher: str, *values: Any) -> None:
    """What an operator does: the launcher as its module has it, which may have been imported once more."""
    getattr(sys.modules[module], launcher).as_operator(*values)


def operator(*writes: str, flops: Callable[..., int] | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Makes a launcher one operator in the graphs of ``torch.compile``. An eager call runs the launcher itself.

    The schema follows from the annotations. The operator returns nothing, so that a compiler needs no shapes from us.

    Args:
        writes: the names of the tensors that the launcher writes to.
        flops: of a launcher that multiplies matrices: the number of its floating-point operations, from the operator's
            arguments with shapes in place of tensors. Such a launcher is an operator wherever a mode counts, too.
    """

    def register(launcher: Callable[P, None]) -> Callable[P, None]:
        parameters = inspect.signature(launcher, eval_str=True).parameters
        kinds = {name: p.annotation for name, p in parameters.items()}
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        flat = {name: _flat(name, kind) for name, kind in kinds.items()}

        def run(*values: Any) -> None:
            rest = iter(values)
            given = {name: [next(rest) for _ in names] for name, names in flat.items()}
            try:
                launcher(**{n: kinds[n](*v) if n not in flat[n] else v[0] for n, v in given.items()})  # type: ignore
            except BuildError as error:
                raise BuildError(
                    f"{error}. A compiled graph keeps its kernels: call torch.compiler.reset(), and compile with"
                    " backend='torch'."
                ) from error

        either = inspect.Parameter.POSITIONAL_OR_KEYWORD
        of_schema = {name: kind for names in flat.values() for name, kind in names.items()}
        run.__signature__ = inspect.Signature(
            [inspect.Parameter(name, either, annotation=kind) for name, kind in of_schema.items()],
            return_annotation=None,
        )
        name = f"{launcher.__module__.rpartition('.')[2]}_{launcher.__name__.lstrip('_')}"
        if not hasattr(torch.ops.fastbf, name):  # else its module is imported once more
            torch.library.define(f"fastbf::{name}", torch.library.infer_schema(run, mutates_args=writes))
            newest = partial(_newest, launcher.__module__, launcher.__name__)
            torch.library.impl(f"fastbf::{name}", ("cpu", "cuda"))(newest)
            torch.library.register_fake(f"fastbf::{name}")(lambda *_: None)
            if flops is not None:
                flop_counter.register_flop_formula(getattr(torch.ops.fastbf, name))(flops)
        registered = getattr(torch.ops.fastbf, name).default

        @wraps(launcher)
        def call(*args: P.args, **kwargs: P.kwargs) -> None:
            if not torch.compiler.is_compiling() and (flops is None or _is_heard() or not watched()):
                launcher(*args, **kwargs)
                return
            given = {**defaults, **dict(zip(kinds, args, strict=False)), **kwargs}
            groups = ([given[name]] if name in names else given[name] for name, names in flat.items())
            registered(*(value for group in groups for value in group))

        call.__dict__["as_operator"] = run
        return call

    return register
