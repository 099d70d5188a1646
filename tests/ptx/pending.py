"""The asynchronous work that can be under way at a point of a kernel, as groups that are committed and waited for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from tests.ptx.text import Instruction


class Product(NamedTuple):
    """A product under way."""

    instruction: Instruction
    operands: int  #: bytes that it reads
    left: frozenset[str] = frozenset()  #: registers that it reads
    sums: frozenset[str] = frozenset()  #: registers that it adds to


Group = tuple[Product, ...]


class Barrier(NamedTuple):
    """An mbarrier, at which groups of products arrive one by one, each ending a phase."""

    address: int
    phase: int = 0  #: 0 or 1: of the oldest group, or of the next if there is none
    groups: tuple[Group, ...] = ()


class Pending(NamedTuple):
    """Groups in the order of their begin, the last of them not committed yet; bytes as in :mod:`tests.ptx.regions`.

    Nothing is changed: every method returns what is pending afterwards.
    """

    copies: tuple[int, ...] = (0,)  #: bytes that each group writes
    products: tuple[Group, ...] = ((),)
    barriers: tuple[Barrier, ...] = ()
    #: Bytes of which other threads may not know yet, as there was no barrier since:
    copied: int = 0  #: by copies that were waited for
    read: int = 0  #: by products that were waited for
    stored: int = 0  #: by threads
    loaded: int = 0  #: likewise

    def in_flight(self) -> Iterator[Product]:
        groups = itertools.chain(self.products, *(barrier.groups for barrier in self.barriers))
        return itertools.chain.from_iterable(groups)

    def in_copy(self) -> int:
        """Bytes that copies may be writing."""
        written = 0
        for group in self.copies:
            written |= group
        return written

    def copy(self, where: int) -> Pending:
        *groups, last = self.copies
        return self._replace(copies=(*groups, last | where))

    def multiply(self, product: Product) -> Pending:
        *groups, last = self.products
        return self if product in last else self._replace(products=(*groups, (*last, product)))

    def commit_copies(self, most: int) -> Pending:
        """``most``: groups that a wait leaves, at the most; what is older need not be told apart."""
        first, *rest = self.copies
        if len(rest) > most:
            first, rest = first | rest[0], rest[1:]
        return self._replace(copies=(first, *rest, 0))

    def commit_products(self, most: int) -> Pending:
        first, *rest = self.products
        if len(rest) > most:
            first, rest = (*first, *(product for product in rest[0] if product not in first)), rest[1:]
        return self._replace(products=(first, *rest, ()))

    def wait_for_copies(self, left: int | None) -> Pending:
        """All but ``left`` committed groups are done; None: those not committed, too."""
        done = len(self.copies) if left is None else max(0, len(self.copies) - 1 - left)
        copied = self._replace(copies=self.copies[:done]).in_copy()
        return self._replace(copies=self.copies[done:] or (0,), copied=self.copied | copied)

    def wait_for_products(self, left: int) -> Pending:
        done = max(0, len(self.products) - 1 - left)
        read = self.read
        for product in itertools.chain.from_iterable(self.products[:done]):
            read |= product.operands
        return self._replace(products=self.products[done:], read=read)

    def synchronise(self) -> Pending:
        """All threads have come here: what was waited for is done for all of them."""
        return self._replace(copied=0, read=0, stored=0, loaded=0)

    def start_barrier(self, address: int) -> Pending:
        """mbarrier.init: its first phase begins."""
        return self._with(self._barrier(address)._replace(phase=0))

    def commit_to_barrier(self, address: int) -> Pending:
        """tcgen05.commit: what was begun so far arrives at the barrier when it is done."""
        *groups, last = self.products
        barrier = self._barrier(address)
        return self._with(barrier._replace(groups=(*barrier.groups, last)))._replace(products=(*groups, ()))

    def wait_for_phase(self, address: int, parity: int) -> Pending:
        """The phase of this parity is over, and with it the oldest group if it is that phase's."""
        barrier = self._barrier(address)
        if barrier.phase != parity:
            return self
        return self._with(barrier._replace(phase=1 - parity, groups=barrier.groups[1:]))

    def _barrier(self, address: int) -> Barrier:
        return next((barrier for barrier in self.barriers if barrier.address == address), Barrier(address))

    def _with(self, barrier: Barrier) -> Pending:
        others = [other for other in self.barriers if other.address != barrier.address]
        return self._replace(barriers=tuple(sorted((*others, barrier), key=lambda b: b.address)))
