"""Asynchronous work that a compiled kernel leaves unguarded, found in its PTX.

Copies (cp.async) and products (wgmma, tcgen05.mma) go on while a program's threads do. Until they are waited for

* what a product reads in shared memory must not be overwritten, by a copy or a store; and after the wait not before a
  barrier, as other warps may not have waited yet;
* registers that a wgmma reads its left operand from must not be written, and those it adds to not be touched;
* bytes that a copy writes must not be read or written; and after the wait not before a barrier, as other threads copied
  them.

Before they begin, a barrier must stand between other threads' stores and a product that reads them, and between other
threads' loads and a copy that overwrites them.

:func:`faults` follows every path through the code, loops included, with the integers that all follow from a thread's
number and from constants: addresses in shared memory, the numbers of a loop's buffers, descriptors. On the way it keeps
which groups of copies and products can be pending, and what each touches. A path ends where the same place is reached
again with the same numbers and the same work pending, so what it says holds for every number of iterations.

It is careful: an address that it cannot compute is all of shared memory, a guard of something that touches memory
holds, a condition is true and false, and what orders work under a guard that is not known, or is of these families and
not known here, is a fault by itself. Where there are products of tcgen05, whose waits and branches depend on one
another, conditions are computed instead, for the lengths that make for some iterations of a loop. Where threads take a
branch differently, what it skips counts as done by all.

It does not see what ptxas makes of the PTX; races between loads and stores; missing fences, of the proxy and of wgmma;
copies by the bulk copy engine; tensor memory, and so what tcgen05 does to it; that a try_wait is repeated until it
succeeds, and that something arrives at all; whether a product's arithmetic is right. ``../shared/ptx`` executes the
same code and sees some of these.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tests.ptx.pending import Pending, Product
from tests.ptx.regions import EVERYWHERE, Operand, operand, region
from tests.ptx.text import Instruction, Program, elements, parse, registers
from tests.ptx.values import U64, Value, constant, evaluate, literal, parts, special

#: States in which one place is reached: with so many, numbers that vary among them are taken for unknown.
MANY = 64
#: States in all: a kernel with more is refused.
TOO_MANY = 20_000
#: None, a few, and one more than three buffers and two barriers of two phases each have states.
ITERATIONS = (*range(8), 13)
WARP_GROUP = 128  #: threads

Numbers = dict[str, Value]
Found = dict[tuple[int, int, str], str]  #: by the lines that it is about

_WGMMA, _TCGEN05 = "wgmma.mma_async", "tcgen05.mma"
_COPIES = ("cp.async.ca.", "cp.async.cg.")
_BARRIERS = ("bar.sync", "barrier.")
_RETURNS = ("ret", "exit")
_ORDER = (
    *_BARRIERS, "cp.async.commit", "cp.async.wait", "wgmma.fence", "wgmma.commit", "wgmma.wait", "tcgen05.commit",
    "mbarrier.init", "mbarrier.try_wait",
)  # fmt: skip
#: Of these, what is not listed after them is a fault.
_FAMILIES = ("cp.async", "wgmma", "tcgen05", "mbarrier", "brx")
_KNOWN = (
    *_COPIES, *_ORDER, _WGMMA, _TCGEN05, "tcgen05.ld", "tcgen05.st", "tcgen05.wait", "tcgen05.fence", "tcgen05.alloc",
    "tcgen05.dealloc", "tcgen05.relinquish_alloc_permit", "mbarrier.inval",
)  # fmt: skip


def faults(ptx: str, tiles: Iterable[int]) -> list[str]:
    """What is wrong, a sentence each.

    Args:
        ptx: what Triton gives as ``asm["ptx"]``.
        tiles: rows and columns of the tiles that loops walk over; where there are products of tcgen05 the lengths that
            make for ``ITERATIONS`` of them are followed one by one, as values of all 32-bit arguments.
    """
    if not re.search(r"cp\.async|wgmma|tcgen05\.mma", ptx):
        return []
    program = parse(ptx)
    found: Found = {}
    lengths = sorted({count * tile for count in ITERATIONS for tile in tiles})
    for length in lengths if _TCGEN05 in ptx else (None,):
        found |= _Walk(program, length).run()
    return [found[key] for key in sorted(found)]


def _is(instruction: Instruction, *names: str) -> bool:
    return instruction.opcode.startswith(names)


def _stores(instruction: Instruction) -> bool:
    """Whether it writes shared memory, at once."""
    kind = instruction.parts[0]
    return kind == "stmatrix" or (kind in ("st", "atom", "red") and "shared" in instruction.opcode)


def _loads(instruction: Instruction) -> bool:
    """Whether it reads shared memory, at once."""
    return instruction.parts[0] == "ldmatrix" or (instruction.parts[0] == "ld" and "shared" in instruction.opcode)


def _places(instruction: Instruction) -> list[str]:
    """Operands that say what an instruction touches: addresses in shared memory, descriptors, phases."""
    o = instruction.operands
    if _is(instruction, *_COPIES, "tcgen05.commit", "mbarrier.init"):
        return o[:1]
    if _loads(instruction) or _stores(instruction):
        return [next(x for x in o if x[0] == "[")]
    if _is(instruction, _WGMMA):
        return [x for x in o[1:3] if x[0] != "{"]
    if _is(instruction, _TCGEN05):
        return [x for x in o[1:4] if x[0] != "["]
    return o[1:3] if _is(instruction, "mbarrier.try_wait") else []


class _Walk:
    """All paths through a kernel."""

    def __init__(self, program: Program, length: int | None) -> None:
        self.threads = program.threads
        self.length = length  #: of all 32-bit arguments; None is not known
        self.conditions = _conditions(program.code)
        self.numbers = _computed_from(program.code, self.conditions if length is not None else ()) | self.conditions
        products = [i for i in program.code if _is(i, _WGMMA)]
        self.held = {r for i in products for o in i.operands[:2] if o[0] == "{" for r in registers(o)}
        self.code, self.labels = self._what_matters(program)
        #: Groups that a wait leaves, at the most.
        self.most_copies, self.most_products = (
            max((int(i.operands[0]) for i in program.code if _is(i, f"{family}.wait_group")), default=0)
            for family in ("cp.async", "wgmma")
        )
        self.live = self._liveness()
        self.regions: dict[tuple, int] = {}
        self.found: Found = {}

    def _what_matters(self, program: Program) -> tuple[list[Instruction], dict[str, int]]:
        """The code and its labels without instructions that neither order work nor touch what it touches."""
        kept, at = [], []
        for i in program.code:
            at.append(len(kept))
            orders = _is(i, *_FAMILIES, *_BARRIERS, *_RETURNS, "bra")
            if orders or _places(i) or i.writes & self.numbers or (i.writes | i.reads) & self.held:
                kept.append(i)
        at.append(len(kept))
        return kept, {name: at[place] for name, place in program.labels.items()}

    def _liveness(self) -> dict[int, frozenset[str]]:
        """At every place that a branch leads to, the numbers that are read from there on."""
        live: list[frozenset[str]] = [frozenset()] * (len(self.code) + 1)
        changed = True
        while changed:
            changed = False
            for at in reversed(range(len(self.code))):
                i, after = self.code[at], live[at + 1]
                if _is(i, "bra"):
                    after = live[self.labels[i.operands[0]]] | (after if i.guard else frozenset())
                elif _is(i, *_RETURNS) and not i.guard:
                    after = frozenset()
                used = frozenset(registers(" ".join((*_places(i), i.guard))))
                if i.writes & self.numbers:
                    used |= i.reads
                now = (after - (frozenset() if i.guard else i.writes)) | (used & self.numbers)
                if now != live[at]:
                    live[at], changed = now, True
        return {at: live[at] for at in self.labels.values()}

    # ---- paths

    def run(self) -> Found:
        todo: list[tuple[int, Numbers, Pending]] = [(0, {}, Pending())]
        seen: dict[int, set] = defaultdict(set)
        unknown: dict[int, set[str]] = defaultdict(set)
        while todo:
            at, numbers, pending = todo.pop()
            while at < len(self.code):
                if at in self.live:
                    numbers = {r: numbers[r] for r in sorted(self.live[at] - unknown[at]) if r in numbers}
                    state = (tuple((r, x.tobytes()) for r, x in numbers.items()), pending)
                    if state in seen[at]:
                        break
                    seen[at].add(state)
                    if sum(map(len, seen.values())) > TOO_MANY:
                        self._report(self.code[at], "is reached in too many states to follow them all: at")
                        return self.found
                    if len(seen[at]) % MANY == 0 and self.length is None:
                        unknown[at] |= _varied(state[0] for state in seen[at])
                i = self.code[at]
                at += 1
                if _is(i, *_RETURNS) and not i.guard:
                    break
                if _is(i, "bra"):
                    target, holds = self.labels[i.operands[0]], self._guard(i, numbers)
                    # Where threads differ, some go on and the others wait for them at a target ahead.
                    if holds is None and (i.guard not in numbers or target < at):
                        todo.append((target, dict(numbers), pending))
                    at = target if holds else at
                    continue
                pending = self._execute(i, numbers, pending)
                if _is(i, "setp"):
                    for register in i.writes & self.conditions - numbers.keys():
                        todo.append((at, {**numbers, register: constant(0)}, pending))
                        numbers[register] = constant(1)
        return self.found

    def _guard(self, i: Instruction, numbers: Numbers) -> bool | None:
        """Whether a guard holds for all threads or for none; None if it is not known or they differ."""
        if not i.guard:
            return True
        value = numbers.get(i.guard)
        if value is None or value.min() != value.max():
            return None
        return bool(value[0]) != i.negated

    def _execute(self, i: Instruction, numbers: Numbers, pending: Pending) -> Pending:
        holds = self._guard(i, numbers)
        if holds is False:
            return pending
        if not _is(i, _WGMMA):
            self._touch_registers(i, pending)
        if _is(i, *_COPIES):
            where = self._region(i, numbers, int(i.operands[2], 0))
            self._write(i, where, pending)
            if pending.loaded & where:
                self._report(i, "overwrites what other threads may still load: no barrier since")
            return pending.copy(where)
        if _is(i, _WGMMA, _TCGEN05):
            product = self._product(i, numbers)
            self._multiply(product, pending)
            return pending.multiply(product)
        if _is(i, *_ORDER):
            # One thread is chosen for these, so that their guards are not known.
            if holds is None and not _is(i, "tcgen05.commit", "mbarrier.init"):
                self._report(i, "orders work for some threads only, it seems")
            return self._order(i, numbers, pending)
        if _is(i, *_FAMILIES) and not _is(i, *_KNOWN):
            self._report(i, "is an instruction that this check does not know")
        if _stores(i):
            where = self._region(i, numbers, _width(i))
            self._write(i, where, pending)
            if pending.copied & where:
                self._report(i, "overwrites what other threads may still copy: no barrier since the wait")
            pending = pending._replace(stored=pending.stored | (0 if where == EVERYWHERE else where))
        elif _loads(i):
            where = self._region(i, numbers, _width(i))
            self._read(i, where, pending)
            pending = pending._replace(loaded=pending.loaded | (0 if where == EVERYWHERE else where))
        if i.writes & self.numbers:
            self._compute(i, numbers, holds)
        return pending

    def _order(self, i: Instruction, numbers: Numbers, pending: Pending) -> Pending:
        """Commits, waits and fences; those for barriers whose address is not known do nothing."""
        if _is(i, "cp.async.commit"):
            return pending.commit_copies(self.most_copies)
        if _is(i, "cp.async.wait"):
            return pending.wait_for_copies(int(i.operands[0]) if i.operands else None)
        if _is(i, "wgmma.commit"):
            return pending.commit_products(self.most_products)
        if _is(i, "wgmma.wait"):
            return pending.wait_for_products(int(i.operands[0]))
        if _is(i, *_BARRIERS) and len(i.operands) == 1:  # of all threads
            return pending.synchronise()
        if _is(i, "tcgen05.commit", "mbarrier."):
            address, *parity = (self._address(o, numbers) for o in _places(i))
            if address is not None and _is(i, "tcgen05.commit"):
                return pending.commit_to_barrier(int(address[0]))
            if address is not None and _is(i, "mbarrier.init"):
                return pending.start_barrier(int(address[0]))
            if address is not None and parity[0] is not None:
                where = int(address[0]), int(parity[0][0]) & 1
                return pending.wait_for_phase(*where)
        return pending

    # ---- numbers

    def _compute(self, i: Instruction, numbers: Numbers, holds: bool | None) -> None:
        written = registers(i.operands[0])
        if _is(i, "ld.param.b32", "ld.param.u32", "ld.param.s32"):
            values = [None if self.length is None else constant(self.length)]
        elif len(written) == 1 or _is(i, "mov"):
            value = evaluate(i, [self._value(o, numbers) for o in elements(i.operands[1:])], self.threads)
            values = [value] if len(written) == 1 else parts(value, len(written), i)
        else:
            values = [None] * len(written)
        for register, value in zip(written, values, strict=True):
            before = numbers.get(register)
            if value is None or (holds is None and (before is None or before.tobytes() != value.tobytes())):
                numbers.pop(register, None)
            else:
                numbers[register] = value

    def _value(self, text: str, numbers: Numbers) -> Value:
        if text in numbers:
            return numbers[text]
        if text == "global_smem":
            return constant(0)
        return special(text, self.threads) if text[0] == "%" else literal(text)

    def _address(self, text: str, numbers: Numbers) -> Value:
        base, _, offset = text.strip("[] ").partition("+")
        value = self._value(base.strip(), numbers)
        # Addresses in shared memory have 32 bits.
        return None if value is None else value + constant(int(offset or "0", 0)) & U64(0xFFFFFFFF)

    def _region(self, i: Instruction, numbers: Numbers, width: int) -> int:
        addresses, active = self._address(_places(i)[0], numbers), numbers.get(i.guard)
        if addresses is not None and active is not None and active.size > 1:
            addresses = np.broadcast_to(addresses, active.shape)[(active != 0) != i.negated]
        key = (None if addresses is None else addresses.tobytes(), width)
        if key not in self.regions:
            self.regions[key] = region(addresses, width)
        return self.regions[key]

    # ---- products

    def _product(self, i: Instruction, numbers: Numbers) -> Product:
        left, right, *_ = i.operands[1:]
        shapes = self._shapes(i, numbers)
        operands = 0
        for text, shape in zip((left, right), shapes, strict=True):
            if text[0] not in "{[":  # registers, tensor memory
                operands |= self._operand(self._value(text, numbers), shape, _is(i, _TCGEN05))
        if _is(i, _TCGEN05):
            return Product(i, operands)
        return Product(
            i, operands, frozenset(registers(left) if left[0] == "{" else ()), frozenset(registers(i.operands[0]))
        )

    def _shapes(self, i: Instruction, numbers: Numbers) -> tuple[Operand | None, Operand | None]:
        """Of the left and the right operand; None is not known."""
        if _is(i, _WGMMA):
            columns, depth = (int(x) for x in re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4]).groups())
            flips = [x == "1" for x in i.operands[6:]]  # of both, of the right one, of none
            flips = [False] * (2 - len(flips)) + flips
            return Operand(64, depth, 32 // depth, flips[0]), Operand(columns, depth, 32 // depth, flips[1])
        described = self._value(i.operands[3], numbers)
        if described is None:
            return None, None
        bits, size = int(described[0]), 4 if "tf32" in i.opcode else 2
        rows, columns = (bits >> 24 & 0x1F) << 4, (bits >> 17 & 0x3F) << 3
        flips = bool(bits >> 15 & 1), bool(bits >> 16 & 1)
        return Operand(rows, 32 // size, size, flips[0]), Operand(columns, 32 // size, size, flips[1])

    def _operand(self, descriptors: Value, shape: Operand | None, tcgen05: bool) -> int:
        if descriptors is None or shape is None:
            return EVERYWHERE
        found = 0
        for descriptor in {int(x) for x in descriptors[::WARP_GROUP]}:
            key = (descriptor, shape, tcgen05)
            if key not in self.regions:
                self.regions[key] = operand(descriptor, shape, tcgen05)
            found |= self.regions[key]
        return found

    # ---- rules

    def _write(self, i: Instruction, where: int, pending: Pending) -> None:
        for product in pending.in_flight():
            if product.operands & where:
                self._report(i, "overwrites what {} may still read", product.instruction)
        if pending.read & where:
            self._report(i, "overwrites what a product of other warps may still read: no barrier since the wait")
        if pending.in_copy() & where:
            self._report(i, "writes where a copy may be under way")

    def _read(self, i: Instruction, where: int, pending: Pending) -> None:
        if pending.in_copy() & where:
            self._report(i, "reads where a copy may be under way")
        if pending.copied & where:
            self._report(i, "reads what other threads may still copy: no barrier since the wait")

    def _multiply(self, product: Product, pending: Pending) -> None:
        i = product.instruction
        self._read(i, product.operands, pending)
        if pending.stored & product.operands:
            self._report(i, "reads what other threads may still store: no barrier since")
        for other in pending.in_flight():
            if other.sums & product.left or (other.sums & product.sums and other.sums != product.sums):
                self._report(i, "reads registers that {} may still add to", other.instruction)
            if other.left & product.sums:
                self._report(i, "adds to registers that {} may still read", other.instruction)

    def _touch_registers(self, i: Instruction, pending: Pending) -> None:
        if not (i.writes | i.reads) & self.held:
            return
        for product in pending.in_flight():
            if i.writes & product.left:
                self._report(i, "writes registers that {} may still read", product.instruction)
            if (i.writes | i.reads) & product.sums:
                self._report(i, "touches registers that {} may still add to", product.instruction)

    def _report(self, i: Instruction, what: str, of: Instruction | None = None) -> None:
        self.found[i.line, of.line if of else 0, what] = f"{i} {what.format(of)}"


def _computed_from(code: list[Instruction], seeds: Iterable[str]) -> frozenset[str]:
    """``seeds``, the registers whose numbers say what is touched, and those that all of these are computed from."""
    sources = defaultdict(set)
    for i in code:
        for register in i.writes if not _is(i, "ld.", "ldmatrix", "mma.") else ():
            sources[register] |= i.reads
    places = (register for i in code for o in _places(i) for register in registers(f"{o} {i.guard}"))
    return _closure([*seeds, *places], sources)


def _conditions(code: list[Instruction]) -> frozenset[str]:
    """The predicates that order work or guard products, back to comparisons."""
    sources = defaultdict(set)
    for i in code:
        for register in i.writes if i.parts[-1] == "pred" else ():
            sources[register] |= i.reads
    ordering = (*_ORDER, *_RETURNS, "bra", _WGMMA, _TCGEN05)
    return _closure([i.guard for i in code if i.guard and _is(i, *ordering)], sources)


def _closure(seeds: list[str], sources: dict[str, set[str]]) -> frozenset[str]:
    found: set[str] = set()
    while seeds:
        register = seeds.pop()
        if register not in found:
            found.add(register)
            seeds += sources[register]
    return frozenset(found)


def _varied(states: Iterable[tuple]) -> set[str]:
    """Registers with many values among the states of one place."""
    values = defaultdict(set)
    for numbers in states:
        for register, value in numbers:
            values[register].add(value)
    return {register for register, found in values.items() if len(found) > MANY // 4}


def _width(i: Instruction) -> int:
    """Bytes from a thread's address on: of ld and st, and of a row of the matrices that ldmatrix and stmatrix move."""
    if i.parts[0] in ("ldmatrix", "stmatrix"):
        return 16
    vector = next((int(part[1:]) for part in i.parts if re.fullmatch(r"v\d", part)), 1)
    return vector * int(re.sub(r"\D", "", i.parts[-1])) // 8
