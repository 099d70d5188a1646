"""Which ranks share a batch, and how they agree on it before any of them sends a sample.

A process group is known by its name, a string: modules that hold one can be copied and pickled, and an operator can
take it. Every call of an op across ranks begins with a *meeting*: each rank tells the others how many samples it has
and what it is about to do, in one small message between hosts, which waits for no GPU. So batches of different sizes
are known as such, and calls that do not fit each other end in the same error on every rank, before tensors are sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastbf.context import traced_as_constant


class Peers(NamedTuple):
    """The ranks of a process group, as one of them sees it."""

    group: dist.ProcessGroup  #: carries tensors
    hosts: dist.ProcessGroup  #: the same ranks, by gloo: carries what hosts tell each other
    rank: int
    size: int


class Batch(NamedTuple):
    """A batch that lies on several ranks, in their order."""

    group: str
    rank: int
    sizes: Sequence[int]  #: samples of every rank
    facts: Sequence[int]  #: what the ranks agree on besides: :class:`Facts`
    met: bool  #: whether the ranks have agreed on that; under a compiler they do when the operator runs

    @property
    def first(self) -> int:
        """Where this rank's samples begin."""
        return sum(self.sizes[: self.rank])

    @property
    def own(self) -> int:
        """This rank's samples."""
        return self.sizes[self.rank]

    @property
    def total(self) -> int:
        """All ranks' samples."""
        return sum(self.sizes)


class Facts(NamedTuple):
    """What the ranks of a call must have in common, as numbers. Shapes are those of a sample."""

    call: int  #: one of CALLS, by index
    positions: int
    channels: int
    num_heads: int
    dtype: int  #: of what is sent: one of DTYPES, by index
    dropout: int  #: ``fastbf.dropout.threshold``
    backward: int  #: whether a backward will send gradients
    backend: int  #: "torch" or "triton", by index: they must come to their collectives in the same order


CALLS = ("gather", "encoder_layer")
BACKENDS = ("torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = {"call": CALLS, "dtype": DTYPES, "backward": (False, True), "backend": BACKENDS}


def dtype_fact(dtype: torch.dtype) -> int:
    """The number of a dtype in :class:`Facts`."""
    if dtype not in DTYPES:
        raise TypeError(f"ranks exchange {', '.join(map(str, DTYPES))}, got {dtype}")
    return DTYPES.index(dtype)


_groups: dict[str, dist.ProcessGroup] = {}
_peers: dict[str, Peers] = {}


def name_of(process_group: dist.ProcessGroup | str | None) -> str | None:
    """The name by which a process group is known from now on; a name and None are given back.

    Raises:
        TypeError: something else than a process group.
        ValueError: a group that this process is not a member of, or a name that no group was seen by.
    """
    if process_group is None:
        return None
    if isinstance(process_group, str):
        if process_group not in _groups:
            raise ValueError(
                f"process_group {process_group!r} is not known in this process: give the layer its group here, "
                "layer.process_group = group"
            )
        return process_group
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must be a group of which this process is a member")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed process group, got {type(process_group).__name__}")
    name = process_group.group_name
    if _groups.get(name) is not process_group:  # names are given anew after destroy_process_group
        _groups[name] = process_group
        _peers.pop(name, None)
    return name


def group_of(name: str | None) -> dist.ProcessGroup | None:
    """The group that :func:`name_of` named."""
    return None if name is None else _groups[name_of(name)]


@traced_as_constant
def rank_and_size(name: str) -> tuple[int, int]:
    """This process's place in a group, and how many there are."""
    group = _groups[name_of(name)]
    return dist.get_rank(group), dist.get_world_size(group)


def peers(name: str) -> Peers:
    """The ranks of a group. The first call of a group makes one for the hosts, if it has to: all ranks must call."""
    found = _peers.get(name)
    if found is None:
        group, hosts = _groups[name_of(name)], _groups[name]
        if dist.get_backend(group) != dist.Backend.GLOO:
            ranks = dist.get_process_group_ranks(group)
            hosts = dist.new_group(ranks, backend=dist.Backend.GLOO, use_local_synchronization=True)
        found = _peers[name] = Peers(group, hosts, *rank_and_size(name))
    return found


def meet(name: str, samples: int, facts: Facts) -> Batch:
    """Tells the other ranks of this one's samples, and hears of theirs.

    Under a compiler all ranks are taken to have as many: the operator that gets the batch holds the meeting then, by
    :func:`confirm`.

    Args:
        name: of the group; all of its ranks call.
        samples: 0 or more.
        facts: what has to be the same on all ranks.

    Raises:
        ValueError: on every rank, if it is not the same.
        RuntimeError: a CUDA graph is being captured, whose replays would not meet.
    """
    rank, size = rank_and_size(name)
    if torch.compiler.is_compiling():
        return Batch(name, rank, [samples] * size, list(facts), met=False)
    return Batch(name, rank, _told(name, samples, facts), facts, met=True)


def confirm(batch: Batch) -> None:
    """Holds the meeting of a batch whose ranks were taken to have as many samples each, if it was not held.

    Raises:
        ValueError: on every rank, if they have not.
    """
    if batch.met:
        return
    sizes = _told(batch.group, batch.own, batch.facts)
    if len(set(sizes)) > 1:
        raise ValueError(f"under torch.compile every rank must have as many samples as the others, got {sizes}")


def _told(name: str, samples: int, facts: Sequence[int]) -> list[int]:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attention across ranks cannot be captured as a CUDA graph: the ranks meet at every call")
    _, hosts, _, size = peers(name)
    told = torch.tensor([samples, *facts], dtype=torch.int64)
    heard = torch.empty(size * len(told), dtype=torch.int64)
    all_gather(heard, told, group=hosts)
    sizes, *columns = heard.view(size, -1).T.tolist()
    for fact, values in zip(Facts._fields, columns, strict=True):
        if len(set(values)) > 1:
            said = [_NAMES[fact][value] for value in values] if fact in _NAMES else values
            raise ValueError(
                f"all ranks of process_group must make the same call, got {fact} {said} on ranks 0 to {size - 1} "
                f"with {sizes} samples"
            )
    return sizes


def all_gather(out: Tensor, x: Tensor, **options: object) -> dist.Work | None:
    """``torch.distributed``'s, under the name that the version has for it."""
    return getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(out, x, **options)


def reduce_scatter(out: Tensor, x: Tensor, **options: object) -> dist.Work | None:
    """Likewise."""
    return getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(out, x, **options)
