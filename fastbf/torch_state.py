"""What surrounds a call (autocast, a compiler, a functional transform), and every private name of torch in fastbf.

A private name may change in any release of torch. Each is read by one function here, whose docstring names the public
substitute. Their tests pass with torch 2.10.0, 2.13.0 and 2.14.1; releases 2.11.0 and 2.12.0 have the names. Those of
:func:`allocator` and :func:`viewer` were tried with 2.13.0; where one is missing, public names serve.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch, _pytree

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

_NOTHING = nullcontext()
_FUNCTORCH: Any = torch._C._functorch
_AUTOGRAD: Any = torch._C._autograd
_HOOKS, _HOOKS_ALLOWED = _AUTOGRAD._top_saved_tensors_default_hooks, _AUTOGRAD._saved_tensors_hooks_is_enabled
_BATCHED: Any = torch._C._parse_dispatch_key("Batched")
_BATCHED_BY_FUNC: Any = torch._C._parse_dispatch_key("FuncTorchBatched")
_VMAP_MODE: Any = torch._C._parse_dispatch_key("VmapMode")


class DispatchMode(_python_dispatch.TorchDispatchMode):
    """A mode that sees every operator of a thread: documented by PyTorch, but for where it lies.

    PyTorch's own hides a mode's code from the compiler, which takes seconds to import, at the first operator. A mode
    that no compiled code enters goes without. Public substitute for the method: none, and the wait.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


#: The class of an operator that a mode sees.
Operator = torch._ops.OpOverload
#: What ``Tensor.to`` and :func:`copy_all` are to such a mode.
CAST, COPY_ALL = torch.ops.aten._to_copy.default, torch.ops.aten._foreach_copy_.default
#: The last step of ``Tensor.reshape`` where it copies.
RESHAPE_COPY = torch.ops.aten._unsafe_view.default
#: ``torch.log_softmax``; the last of three arguments asks for a wider result.
LOG_SOFTMAX = torch.ops.aten._log_softmax.default


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device. Public substitute for the first question: the second."""
    if device in ("cpu", "cuda"):  # of others the first, which takes a third of the time, does not know all
        return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def device_type(x: Tensor) -> str:
    """``x.device.type``, which makes two objects where it is one of these."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives x where it enters a matrix product; None if autocast leaves x alone."""
    device = device_type(x)
    if not autocasts(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


@overload
def autocast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]: ...
@overload
def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]: ...
def autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts the operands of a matrix product to autocast's dtype where autocast is on, as ``F.linear`` does."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, *others
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``F.layer_norm`` gives on x's device for an input of ``dtype``: autocast on CUDA makes it fp32."""
    return torch.float32 if x.is_cuda and autocast_dtype(x) is not None else dtype


class _NoAutocast:
    """Switches autocast off for a type of device, in a quarter of the time of ``torch.autocast``."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.device, True)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which operators on x's device compute in the dtypes that they are given."""
    device = device_type(x)
    if not autocasts(device):
        return _NOTHING
    return torch.autocast(device, enabled=False) if torch.compiler.is_compiling() else _NoAutocast(device)


def traced() -> bool:
    """Whether a compiler, a transform of ``torch.func``, forward-mode AD or ``torch.jit.trace`` is at work.

    They see PyTorch's operators only.
    """
    return torch.compiler.is_compiling() or transformed() or jit_traced()


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def donated(x: Tensor) -> bool:
    """Whether the backward that is running may overwrite what was saved for it, because nothing reads that again.

    False where the graph is retained, where a CUDA graph is captured, which may replay this backward, and under a
    compiler. x: a tensor on the device. Public substitute for the question whether the graph is retained: none.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def release_saved(ctx: Any) -> None:
    """Lets go of what a Function saved, unless the graph is retained; ``ctx.saved_tensors`` was asked for before.

    Then memory is free as soon as backward has read it. Public substitute: none, and it is free when backward ends.
    """
    if hasattr(ctx, "maybe_clear_saved_tensors"):
        ctx.maybe_clear_saved_tensors()


def saves_itself() -> bool:
    """Whether autograd saves tensors as they are: no hooks see them, as those of checkpoints do, and hooks are allowed.

    Public substitute: none.
    """
    return _HOOKS_ALLOWED() and _HOOKS(True) is None


def traced_as_constant(function: AnyFunction) -> AnyFunction:
    """Lets ``torch.compile`` take the function's result at the time of tracing, without tracing the function.

    Public substitute: ``torch.compiler.assume_constant_result``, which imports the whole compiler, Triton included.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@traced_as_constant
def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is active, which see PyTorch's operators only.

    Public substitute: none.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_fake(x: Tensor) -> bool:
    """Whether x has a shape but no values, as under ``FakeTensorMode``. Public substitute: none."""
    return type(x) not in (Tensor, nn.Parameter) and isinstance(x, torch._subclasses.FakeTensor)


def outlived(x: Tensor) -> bool:
    """Whether x stems from a transform of ``torch.func`` that has ended. Public substitute: none."""
    return _FUNCTORCH.is_functorch_wrapped_tensor(x)


def as_leaf(module: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of a module, or of a method of it, in the graph of ``torch.fx.symbolic_trace``, as of a module of torch.

    Modules of torch are leaves of such graphs, but for the one that is traced itself. Ours have control flow that a
    tracer cannot follow. What comes before and after ``method``, in hooks or in a subclass, is in the graph already.

    Args:
        module: ours.
        method: as its class of ours defines it.
        args: those of the call, and kwargs.

    Returns:
        The result's proxy; None if there is no such graph, or if it is the module's own.
    """
    proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.fx.Proxy)), None)
    tracer: Any = getattr(proxy, "tracer", None)
    if proxy is None or tracer.root is module:
        return None
    path, name = tracer.path_of_module(module), method.__name__
    own = getattr(type(module), name) is method and name not in module.__dict__
    if name == "forward" and own and not is_altered(module):
        return tracer.create_proxy("call_module", path, args, kwargs)
    found = tracer.create_proxy("get_attr", path, (), {})
    if own:
        return tracer.create_proxy("call_method", name, (found, *args), kwargs)
    return tracer.create_proxy("call_function", method, (found, *args), kwargs)


def is_batched(x: Tensor) -> bool:
    """Whether x stands for a batch of tensors, as gradients do with ``is_grads_batched`` and in ``torch.func.vmap``.

    Public substitute: none.
    """
    keys = torch._C._dispatch_keys(x)
    return keys.has(_BATCHED) or keys.has(_BATCHED_BY_FUNC)


@contextmanager
def unbatched(x: Tensor) -> Iterator[None]:
    """A context in which operators know nothing of the batch that x may stand for. Public substitute: none."""
    if not is_batched(x):
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack(), torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_VMAP_MODE)):
        yield


def jit_traced() -> bool:
    """Whether ``torch.jit.trace`` is at work, to which sizes are tensors. Public substitute: ``torch.jit.is_tracing``,
    in Python.
    """
    return torch._C._is_tracing()


def watched() -> bool:
    """Whether a mode sees every operator of this thread: a counter of FLOPs, fake tensors. Public substitute: none."""
    return torch._C._len_torch_dispatch_stack() > 0


def modes() -> list[Any]:
    """The modes that see every operator of this thread, the outermost first. Public substitute: none."""
    return _python_dispatch._get_current_dispatch_mode_stack()


def unwatched() -> AbstractContextManager[object]:
    """A context in which no mode sees operators. Public substitute: none."""
    return _python_dispatch._disable_current_modes()


def add_flop_formulas(formulas: dict[Any, Any]) -> None:
    """Adds to the counters of FLOPs that are active in this thread, which took those there were when they were made.

    Public substitute: the argument ``custom_mapping`` of a counter.
    """
    for mode in modes():
        counter: Any = getattr(mode, "counter", None)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry = {**formulas, **counter.flop_registry}


def has_values(x: Tensor) -> bool:
    """Whether the numbers in x can be looked at here: not while a compiler, a transform or a tracer is at work.

    Public substitute: none that tells of modes and of ``FakeTensor``.
    """
    if torch.compiler.is_compiling() or transformed() or jit_traced():
        return False
    return x.device.type != "meta" and not is_fake(x) and not watched()


def overwritten(func: Operator, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call of an operator writes to. Public substitute: none."""
    for i, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from given if isinstance(given, list | tuple) else () if given is None else (given,)


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copies each source into its target, in one launch where all are dense and all sources have one dtype.

    Public substitute: ``Tensor.copy_``, one launch a tensor.
    """
    torch._foreach_copy_(targets, sources)


def allocator(device: str) -> Callable[..., Tensor] | None:
    """What Inductor's code allocates by, on the current device of a type: a function of size, strides and dtype.

    None if this torch has none. Public substitute: ``torch.empty_strided``, which takes twice as long.
    """
    return getattr(torch._C._dynamo.guards, f"_empty_strided_{device}", None)


def viewer() -> Callable[..., Tensor] | None:
    """What Inductor's code views by: a function of a tensor, size, strides and a distance in elements.

    Autograd does not know the result for a view, and does not notice changes in place. None if this torch has none.
    Public substitute: ``Tensor.as_strided``, which takes twice as long.
    """
    return getattr(torch._C._dynamo.guards, "_reinterpret_tensor", None)


def has_onednn_linear() -> bool:
    """Whether this build of torch has :func:`onednn_linear`."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x · weightᵀ + bias by oneDNN, on CPU. x (M, K), weight (N, K), each whole in memory; bias (N,), contiguous.

    Public substitute: ``F.linear``, by the library that torch prefers.
    """
    count_onednn()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def count_onednn() -> None:
    """Lets the counters of FLOPs that are active in this thread know :func:`onednn_linear`, if there are any."""
    if watched() and any(hasattr(mode, "counter") for mode in modes()):
        from torch.utils.flop_counter import flop_registry, register_flop_formula

        product = torch.ops.mkldnn._linear_pointwise
        if product not in flop_registry:

            @register_flop_formula(product)
            def of_product(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
                return 2 * math.prod(x) * weight[0]

        add_flop_formulas({product: flop_registry[product]})


def process_group(name: str) -> dist.ProcessGroup:
    """The group of a ``group_name``; RuntimeError or ValueError if there is none. Public substitute: none."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


def flattened(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of nested containers, and a function that puts others in their places. Public substitute: none."""
    leaves, structure = _pytree.tree_flatten(tree)
    return leaves, lambda others: _pytree.tree_unflatten(others, structure)


def own_tensors(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module, those of its children apart.

    Public substitute: ``Module.parameters`` and ``Module.buffers``, which make 13 Python calls a module; a graphed
    callable asks all of its modules at every call.
    """
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module, or its backward, runs hooks. Public substitute: none, as of the three below."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks)


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs hooks other than those of FSDP2, which gather and shard its parameters."""
    if not has_hooks(module):
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = *module._forward_hooks.values(), *module._forward_pre_hooks.values()
    return not all(str(getattr(hook, "__module__", None)).startswith("torch.distributed.fsdp.") for hook in hooks)


def has_own(module: nn.Module, method: str) -> bool:
    """Whether a method was set on the object, beside that of its class."""
    if torch.compiler.is_compiling():
        getattr(module, method)  # a compiler guards what is looked up, not what __dict__ holds
    return method in module.__dict__


def is_altered(*modules: nn.Module) -> bool:
    """Whether a call of one of the modules runs hooks, or another ``forward`` than its class's."""
    for m in modules if torch.compiler.is_compiling() else ():  # as in has_own
        m.forward, m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks  # noqa: B018
    for m in modules:
        own = m.__dict__  # whose items cost less than attributes of a module
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def part(module: nn.Module, kind: type, name: str) -> Any:
    """The module of this name inside a module of ``kind``, None if it was removed.

    A subclass may compute it. Public substitute: an attribute, which costs as much as a small operator.
    """
    return module._modules.get(name) if type(module) is kind else getattr(module, name)


def encoder_parts(layer: nn.TransformerEncoderLayer, kind: type) -> tuple[Any, ...]:
    """The modules inside a layer of ``kind``, None for one that was removed. Public substitute: as of :func:`part`.

    Attention, the linear layers 1 and 2, the norms 1 and 2, and the dropouts of the feed-forward, 1 and 2.
    """
    own = layer._modules if type(layer) is kind else {name: getattr(layer, name) for name in _ENCODER_PARTS}
    try:
        return (
            own["self_attn"], own["linear1"], own["linear2"], own["norm1"], own["norm2"], own["dropout"],
            own["dropout1"], own["dropout2"],
        )  # fmt: skip
    except KeyError:
        return tuple(map(own.get, _ENCODER_PARTS))


#: In the order of the result.
_ENCODER_PARTS = "self_attn", "linear1", "linear2", "norm1", "norm2", "dropout", "dropout1", "dropout2"


def encoder_weights(
    attention: Any, out_proj: nn.Module, linear1: nn.Module, linear2: nn.Module, norm1: nn.Module, norm2: nn.Module
) -> tuple[Any, ...]:  # fmt: skip
    """Weight and bias of each of these parts of a layer. Public substitute: as of :func:`part`."""
    a, o, f, g = attention._parameters, out_proj._parameters, linear1._parameters, linear2._parameters
    m, n = norm1._parameters, norm2._parameters
    try:
        return (
            a["in_proj_weight"], a["in_proj_bias"], o["weight"], o["bias"], f["weight"], f["bias"], g["weight"],
            g["bias"], m["weight"], m["bias"], n["weight"], n["bias"],
        )  # fmt: skip
    except KeyError:  # something else computes one, or a tensor has its place, as in a replica
        others = [t for part in (out_proj, linear1, linear2, norm1, norm2) for t in (part.weight, part.bias)]
        return attention.in_proj_weight, attention.in_proj_bias, *others


def linear_weights(linear: nn.Linear, kind: type) -> tuple[Any, Any]:
    """Weight and bias of a linear layer of ``kind``. Public substitute: as of :func:`part`."""
    own = linear.__dict__
    if type(linear) is kind and "weight" not in own and "bias" not in own:
        parameters = linear._parameters
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
    return linear.weight, linear.bias  # something computes one, or a tensor has its place


def _of_torch(kind: type, name: str) -> Any:
    """A method as torch defines it; None if something else has its place already."""
    method = getattr(kind, name)
    home: Any = sys.modules[nn.Module.__module__ if name == "__call__" else kind.__module__]
    return method if getattr(method, "__globals__", None) is vars(home) else None


_SA_BLOCK, _FF_BLOCK = (_of_torch(nn.TransformerEncoderLayer, name) for name in ("_sa_block", "_ff_block"))
_KINDS = nn.TransformerEncoderLayer, nn.MultiheadAttention, nn.Linear, nn.LayerNorm, nn.Dropout, nn.ReLU, nn.GELU
_FORWARDS = tuple(_of_torch(kind, "forward") for kind in _KINDS)
_LINEAR = _of_torch(nn.Linear, "forward")


@traced_as_constant
def is_linear_patched() -> bool:
    """Whether ``nn.Linear`` has another ``forward`` or ``__call__`` than torch's."""
    call: Any = nn.Module.__call__
    return nn.Linear.forward is not _LINEAR or nn.Linear.__call__ is not call


@traced_as_constant
def are_patched() -> bool:
    """Whether a class that a layer is made of has another ``forward`` or ``__call__`` than torch's."""
    call: Any = nn.Module.__call__
    a, b, c, d, e, f, g = _KINDS
    if (a.forward, b.forward, c.forward, d.forward, e.forward, f.forward, g.forward) != _FORWARDS:
        return True
    return not (a.__call__ is b.__call__ is c.__call__ is d.__call__ is e.__call__ is f.__call__ is g.__call__ is call)


def has_own_blocks(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether a layer's attention block or feed-forward block is not torch's. Public substitute: none."""
    kind = type(layer)
    if kind._sa_block is not _SA_BLOCK or kind._ff_block is not _FF_BLOCK:
        return True
    if torch.compiler.is_compiling():  # as in has_own
        layer._sa_block, layer._ff_block  # noqa: B018
    own = layer.__dict__
    return "_sa_block" in own or "_ff_block" in own


def is_replica(module: nn.Module) -> bool:
    """Whether the module is a copy that ``nn.DataParallel`` made for one call. Public substitute: none."""
    return "_is_replica" in module.__dict__


def version(x: Tensor) -> int:
    """How often x was written to in place; 0 for tensors that do not count. Public substitute: none."""
    return 0 if x.is_inference() else x._version


def has_gradient_hooks(leaf: Tensor) -> bool:
    """Whether hooks run on the gradient of a leaf, or after it was added up."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)
