"""Which ranks share a batch, and how they agree on it before any of them sends a sample.

A process group is identified by its ``group_name``, a string. Modules that hold it can be copied and pickled, and an
operator can take it. Every call of an op across ranks begins with a *meeting*: each rank sends all others its number of
samples and its :class:`Facts`, in one small message between hosts, which waits for no GPU. So every rank knows the
sizes of all batches, and calls that do not fit each other raise the same error on every rank before tensors are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastbf import torch_state
from fastbf.torch_state import traced_as_constant


class Peers(NamedTuple):
    """The ranks of a process group, as one of them sees it."""

    group: dist.ProcessGroup  #: carries tensors
    hosts: dist.ProcessGroup  #: the same ranks; carries the messages of meetings
    size: int
    own_calls: set[Hashable]  #: calls that this rank has met for
    calls: set[Hashable]  #: what meetings found, the same on every rank


class Batch(NamedTuple):
    """A batch whose samples are on several ranks, in their order."""

    group: str
    rank: int
    sizes: Sequence[int]  #: samples of every rank
    facts: Sequence[int]  #: :meth:`Facts.numbers` of the call
    met: bool  #: whether the meeting was held; under a compiler the operator holds it
    new: bool = False  #: whether a rank makes such a call for the first time, and may fail to build what it takes

    def first(self) -> int:
        """The index of this rank's first sample."""
        return sum(self.sizes[: self.rank])

    def own(self) -> int:
        """The number of this rank's samples."""
        return self.sizes[self.rank]

    def total(self) -> int:
        """The number of all ranks' samples."""
        return sum(self.sizes)

    def silent(self) -> Batch:
        """The same, of which nothing is sent."""
        return self._replace(group="")


#: A :class:`Batch` in the schema of an operator.
BATCH = "str group, int rank, SymInt[] sizes, SymInt[] facts, bool met, bool new"

_CALLS = ("gather", "encoder_layer")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_BACKENDS = ("torch", "triton")
_MAX_DIMENSIONS = 8


class Facts(NamedTuple):
    """What the ranks of a call must have in common."""

    call: str
    dtype: torch.dtype  #: of what is sent
    backward: bool  #: whether a backward will send gradients
    backend: str  #: the order of collectives depends on it, and all ranks need the same order
    num_heads: int
    dropout: int  #: ``fastbf.dropout.drop_threshold``
    shape: Sequence[int]  #: of a sample

    def numbers(self) -> list[int]:
        """The facts as integers, as many for every call.

        Raises:
            TypeError: a dtype that is none of fp16, bf16, fp32 and fp64.
            ValueError: more than eight dimensions.
        """
        if self.dtype not in _DTYPES:
            raise TypeError(f"ranks exchange {', '.join(map(str, _DTYPES))}, got {self.dtype}")
        dimensions = len(self.shape)
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"across ranks a sample must have {_MAX_DIMENSIONS} dimensions at most, got {dimensions}")
        kinds = _CALLS.index(self.call), _DTYPES.index(self.dtype), int(self.backward), _BACKENDS.index(self.backend)
        rest = self.num_heads, self.dropout, dimensions, *self.shape
        return [*kinds, *rest, *[0] * (_MAX_DIMENSIONS - dimensions)]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Facts:
        """The facts of :meth:`numbers`."""
        call, dtype, backward, backend, num_heads, dropout, dimensions, *shape = numbers
        kinds = _CALLS[call], _DTYPES[dtype], bool(backward), _BACKENDS[backend]
        return cls(*kinds, num_heads, dropout, tuple(shape[:dimensions]))


def name_of(process_group: object) -> str | None:
    """The name of a process group; a name or None is returned as it is.

    Raises:
        TypeError: not a process group.
        ValueError: a group that this process is not a member of.
    """
    if process_group is None or isinstance(process_group, str):
        return process_group
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be a group of which this process is a member")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {type(process_group).__name__}")
    return process_group.group_name


def known_name(process_group: object) -> str | None:
    """As :func:`name_of`; a name must be that of a group.

    Raises:
        TypeError, ValueError: as :func:`name_of`; ValueError for a name that no group has.
    """
    name = name_of(process_group)
    if name is not None and name is process_group:
        try:
            torch_state.process_group(name)
        except (RuntimeError, ValueError):
            raise ValueError(
                "process_group must be a torch.distributed process group, such as torch.distributed.group.WORLD, the "
                f"group_name of one, or None, got {name!r}, which names none"
            ) from None
    return name


def group_of(name: str | None) -> dist.ProcessGroup | None:
    """The group of a name; None for None.

    Raises:
        ValueError: this process has no group of that name, as a layer from another process may.
    """
    return None if name is None else _group(name)


def _group(name: str) -> dist.ProcessGroup:
    try:
        return torch_state.process_group(name)
    except (RuntimeError, ValueError):
        raise ValueError(
            f"this process has no process_group named {name!r}: give the layer one, layer.process_group = group"
        ) from None


@traced_as_constant
def rank_and_size(name: str) -> tuple[int, int]:
    """This process's rank in a group, and the number of ranks."""
    group = _group(name)
    return dist.get_rank(group), dist.get_world_size(group)


_peers: dict[str, Peers] = {}
#: What a rank tells the others about its call: made before, made for the first time, or made by a compiled graph.
KNOWN, NEW, COMPILED = range(3)
#: How many calls of each kind are remembered.
_MOST_CALLS = 4096


def peers(name: str) -> Peers:
    """The ranks of a group.

    Raises:
        ValueError: neither the group nor another one made for that carries messages between hosts.
    """
    group, found = _group(name), _peers.get(name)
    if found is None or found.group is not group:  # names are used again after destroy_process_group
        found = _peers[name] = Peers(group, _hosts(group), dist.get_world_size(group), set(), set())
    return found


def _hosts(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that carries CPU tensors."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    if group is dist.group.WORLD:
        return dist.new_group(backend="gloo")  # every process calls, at its first meeting
    raise ValueError(
        "process_group must carry CPU tensors as well, by which hosts tell each other the sizes of their batches: "
        'init_process_group("cpu:gloo,cuda:nccl"), or without a backend, makes all later groups such'
    )


def meet(name: str, samples: int, facts: Facts, call: Hashable = None) -> Batch:
    """Holds the meeting of a call: every rank learns how many samples each of the others has.

    Under a compiler all ranks are assumed to have as many as this one. The operator that gets the batch then holds the
    meeting, by :func:`confirm`.

    Args:
        name: of the group; all of its ranks call.
        samples: 0 or more.
        facts: what has to be the same on all ranks.
        call: all that this rank's kernels depend on, if the call takes any.

    Raises:
        ValueError: on every rank, if it is not the same.
        RuntimeError: a CUDA graph is being captured, whose replays would not meet.
    """
    (rank, size), numbers = rank_and_size(name), facts.numbers()
    if torch.compiler.is_compiling():
        return Batch(name, rank, [samples] * size, numbers, met=False)
    of_group = peers(name)
    is_new = call is not None and call not in of_group.own_calls
    sizes, kinds = _exchange(name, samples, numbers, NEW if is_new else KNOWN)
    new = False
    if call is not None and COMPILED not in kinds:  # a compiled graph agrees on nothing, and remembers nothing
        found = (*sizes, *numbers)
        new = NEW in kinds or found not in of_group.calls
        for calls, one in ((of_group.own_calls, call), (of_group.calls, found)):
            if len(calls) >= _MOST_CALLS:  # of what meetings found at the same time on every rank
                calls.clear()
            calls.add(one)
    return Batch(name, rank, sizes, numbers, met=True, new=new)


def agree(batch: Batch, attempt: Callable[[], object]) -> None:
    """Makes an attempt on every rank, before tensors are sent. If it fails on one rank, all raise.

    Raises:
        Exception: what the attempt raised.
        RuntimeError: it failed on other ranks only.
    """
    _, hosts, size, own_calls, calls = peers(batch.group)
    error: Exception | None = None
    try:
        attempt()
    except Exception as raised:
        error = raised
    failed = torch.empty(size, dtype=torch.int64, device="cpu")
    all_gather(failed, torch.tensor([error is not None], dtype=torch.int64, device="cpu"), hosts).wait()
    if error is None and not failed.any():
        return
    own_calls.clear()
    calls.clear()
    if error is not None:
        try:
            raise error
        finally:
            del error  # else its traceback and this frame hold one another, and all tensors below
    ranks = ", ".join(str(rank) for rank, one in enumerate(failed.tolist()) if one)
    raise RuntimeError(f"rank {ranks} of process_group failed before it sent anything, with the error that it raises")


def confirm(batch: Batch) -> None:
    """Holds the meeting of a batch if it was not held, and checks that all ranks have the same number of samples.

    Raises:
        ValueError: on every rank, if they have not.
    """
    if batch.met:
        return
    sizes, _ = _exchange(batch.group, batch.own(), batch.facts, COMPILED)
    if len(set(sizes)) > 1:
        raise ValueError(f"under torch.compile every rank must have as many samples as the others, got {sizes}")


def _exchange(name: str, samples: int, numbers: Sequence[int], kind: int) -> tuple[list[int], list[int]]:
    """Sends this rank's samples and facts to all ranks, and compares the facts.

    Returns every rank's samples, and whether its call is KNOWN, NEW or COMPILED.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention across ranks cannot be captured as a CUDA graph: the ranks meet at every call")
    _, hosts, size, _, _ = peers(name)
    own = torch.tensor([samples, kind, *numbers], dtype=torch.int64, device="cpu")
    messages = torch.empty(size * len(own), dtype=torch.int64, device="cpu")
    all_gather(messages, own, hosts).wait()
    of_ranks = messages.view(size, -1).tolist()
    sizes = [message[0] for message in of_ranks]
    for fact, *values in zip(Facts._fields, *[Facts.of(message[2:]) for message in of_ranks], strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"all ranks of process_group must make the same call, got {fact} {values} on ranks 0 to {size - 1} "
                f"with {sizes} samples"
            )
    return sizes, [message[1] for message in of_ranks]


def all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begins ``torch.distributed``'s all-gather, whose name depends on the version of torch."""
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x, group=group, async_op=True)


def reduce_scatter(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begins ``torch.distributed``'s reduce-scatter, whose name depends on the version of torch."""
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x, group=group, async_op=True)
