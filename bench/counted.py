"""Counted, not timed: what entries of attention's table of tiles execute and move, and a model of the time that takes.

Each kernel is compiled for the entry and executed by the emulator in ``../shared/ptx``, which is no part of this
repository: one program, dropout 0.5, fp32 in TF32. A streaming kernel walks over two tiles, then over four, and the
rest is linear. Packed, a program holds as many groups of two samples as fit.

The model lets every multiprocessor be busy and takes the largest of four times: tensor cores, caches, shared memory and
issue slots. It knows no latency, so it can rank tiles and says nothing of what a GPU measures.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.ceilings import H100
from bench.tiles import PRODUCTS, Case, text
from bench.tune import DTYPES, THRESHOLD
from fastbf.kernels import attention
from fastbf.kernels.attention_configs import Config, packed_slots
from fastbf.kernels.launch import cdiv
from tests.emulation import attention_tile

STEPS = (2, 4)  #: tiles that a program walks over where it is executed
REQUESTS = ("shared load", "shared store", "shared copy", "ldmatrix", "stmatrix")  #: to shared memory
WGMMA = re.compile(r"wgmma\.mma_async.*\.m64n(\d+)k(\d+)")
#: Tensors of a group that a kernel has to read or write, and statistics of a row in fp32.
TENSORS = {
    "forward_streaming": (4, 1), "backward_query": (6, 2), "backward_key_value": (6, 2), "forward_packed": (4, 0),
    "backward_packed": (7, 0),
}  # fmt: skip


INTRODUCTION = """\
COUNTED by executing compiled kernels without a GPU: for a group of N queries and keys, packed for a program.
MFLOP: on tensor cores, ÷ those needed. MB: through the caches, ÷ those of every tensor once. Wavefronts: of shared
memory, and of the worst kind of request ÷ those without conflicts. Instructions: of warps, a program.
COMPUTED, NOT MEASURED: useful TFLOP/s if what binds were always busy.
"""


class Counts(NamedTuple):
    """What is executed and moved."""

    flops: float  #: of tensor cores
    asynchronous: float  #: of these, those of wgmma
    bytes: float  #: through L1 and L2
    wavefronts: float  #: of shared memory, for the kernel's own loads, stores and copies
    operands: float  #: bytes of shared memory that wgmma reads as its second operand; the first may be in registers
    instructions: float  #: of warps
    integer: float  #: of these, integer arithmetic

    def at(self, more: Counts, steps: float) -> Counts:
        """At so many steps, if these counts are those of ``STEPS[0]`` and ``more`` those of ``STEPS[1]``."""
        weight = (steps - STEPS[0]) / (STEPS[1] - STEPS[0])
        return Counts(*(a + (b - a) * weight for a, b in zip(self, more, strict=True)))

    def scaled(self, factor: float) -> Counts:
        return Counts(*(x * factor for x in self))


class Rates(NamedTuple):
    """What a GPU is believed to do in a second, all multiprocessors together."""

    flops: float  #: of tensor cores in 16 bits; in TF32 half of it
    synchronous: float  #: the share of this that mma.sync reaches
    bytes: float  #: of L2
    cycles: float  #: of multiprocessors: each has a wavefront of shared memory and four issue slots

    def times(self, counts: Counts, itemsize: int) -> dict[str, float]:
        """Seconds, by what is busy for so long."""
        flops = counts.asynchronous + (counts.flops - counts.asynchronous) / self.synchronous
        return {
            "tensor cores": flops * itemsize / 2 / self.flops,
            "caches": counts.bytes / self.bytes,
            "shared memory": (counts.wavefronts + counts.operands / 128) / self.cycles,
            "issue slots": counts.instructions / 4 / self.cycles,
        }


#: By architecture. H100: products as measured, L2 and mma.sync as others report (arXiv 2501.12084). A100: the same
#: shares of its data sheet's products, and of its clock.
RATES = {
    80: Rates(H100.flops * 312 / 989, 1.0, 5.5e12 * 1.41 / 1.755, 108 * 1.41e9),
    90: Rates(H100.flops, 0.625, 5.5e12, 132 * 1.755e9),
}


class Row(NamedTuple):
    """An entry's counts: a whole group's if it streams, a program's if it is packed."""

    case: Case
    config: Config
    programs: int
    counts: Counts
    conflicts: float  #: wavefronts over those without conflicts, of the kind of shared-memory request with the most

    @property
    def needed(self) -> float:
        """FLOPs of the products: packed, of all that the tiles hold."""
        case, (m, n, *_) = self.case, self.config
        scores = m * n if case.packed else case.n**2
        return 2 * PRODUCTS[case.kernel] * scores * case.head_dim

    @property
    def useful(self) -> float:
        """FLOPs of the products of scores within groups."""
        case = self.case
        groups = packed_slots(self.config, case.n, case.n) if case.packed else 1
        return 2 * PRODUCTS[case.kernel] * groups * case.n**2 * case.head_dim

    @property
    def ideal(self) -> float:
        """Bytes if every input is read once, and every result written once."""
        case, (tensors, statistics) = self.case, TENSORS[self.case.kernel]
        rows = case.n * (packed_slots(self.config, case.n, case.n) if case.packed else 1)
        return rows * (tensors * case.head_dim * case.itemsize + 4 * statistics)


def count(emulator: Path, case: Case, config: Config) -> Row:
    """Executes programs of a kernel at a configuration, which need not be in the table."""
    if case.packed:
        executed = _executed(emulator, case, config, 1)
        return Row(case, config, 1, _counts(executed), _conflicts(executed))
    own, other = config[:2] if case.kernel != "backward_key_value" else config[1::-1]
    few, more = (_executed(emulator, case, config, steps) for steps in STEPS)
    programs = cdiv(case.n, own)
    counts = _counts(few).at(_counts(more), cdiv(case.n, other)).scaled(programs)
    return Row(case, config, programs, counts, _conflicts(more))


def _executed(emulator: Path, case: Case, config: Config, steps: int) -> list[Any]:
    """The emulator's results, of one program of each launch that the kernel takes."""
    if str(emulator) not in sys.path:
        sys.path.append(str(emulator))
    product, machine = importlib.import_module("ptx.product"), importlib.import_module("ptx.machine")
    torch.set_num_threads(1)
    # That no two threads race is for `make emulate` to say.
    options = machine.Options(races=False, global_races=False)
    emulated = product.fastbf_on(case.architecture, strict=False, tf32=True, options=options)
    with emulated as device, attention_tile(case.kernel, config):
        _call(case, config, steps)
    launches = [launch for launch in device.launches if launch.name == case.kernel]
    assert all(launch.grid == (1, 1, 1) for launch in launches)  # requests of one program are looked at
    return [launch.result for launch in launches]


def _call(case: Case, config: Config, steps: int) -> None:
    """Attention of which the kernel has one program, and walks over so many tiles."""
    kernel, (block_m, block_n, *_) = case.kernel, config
    n, m, positions = block_m, steps * block_n, 1
    if case.packed:
        n, m, positions = case.n, case.n, packed_slots(config, case.n, case.n)
    elif kernel == "backward_key_value":
        n, m = steps * block_m, block_n
    dtype = DTYPES[case.itemsize]
    q, do, o, dq = (torch.randn(n, positions, 1, case.head_dim).to(dtype) for _ in range(4))
    k, v, dk, dv = (torch.randn(m, positions, 1, case.head_dim).to(dtype) for _ in range(4))
    lse = None if case.packed else torch.zeros(positions, n)
    options = attention.Options(case.head_dim**-0.5, torch.tensor([1]), THRESHOLD)
    if kernel.startswith("forward"):
        attention.forward(q, k, v, options, o=o, lse=lse)
        return
    needs = (kernel != "backward_key_value", *2 * (kernel != "backward_query",))
    attention.backward(do, attention.Inputs(q, k, v, o, lse), options, attention.Gradients(dq, dk, dv), needs)


def _counts(results: Iterable[Any]) -> Counts:
    """Of launches of the emulator, together."""
    return Counts(*map(sum, zip(*map(_counts_of_launch, results), strict=True)))


def _counts_of_launch(result: Any) -> Counts:
    counts = result.counts
    products = [(*map(int, found.groups()), n) for op, n in counts.ops.items() if (found := WGMMA.match(op))]
    # Four warps share an instruction of 64 rows, whose depth is 32 bytes.
    asynchronous = sum(2 * 64 * columns * depth * n // 4 for columns, depth, n in products)
    operands = sum(columns * 32 * n // 4 for columns, _, n in products)
    wavefronts = sum(counts.sampled[f"{kind} wavefronts"] for kind in REQUESTS)
    moved = sum(counts.bytes[f"global {kind}"] for kind in ("load", "copy", "store"))
    integer = counts.classes["integer"]
    return Counts(counts.mma_flops, asynchronous, moved, wavefronts, operands, result.instructions, integer)


def _conflicts(results: Iterable[Any]) -> float:
    sampled = [(result.counts.sampled, kind) for result in results for kind in REQUESTS]
    return max(n[f"{kind} wavefronts"] / max(1, n[f"{kind} ideal wavefronts"]) for n, kind in sampled)


def show(entries: Iterable[tuple[Case, Config]], emulator: Path) -> None:
    """Prints the table, a line as soon as it is there."""
    print(INTRODUCTION)
    print(
        f"{'kernel':<19}{'bytes':>5}{'sm':>4}{'D':>5}  {'tile':<30}{'MFLOP':>7}{'÷':>6}{'MB':>9}{'÷':>6}"
        f"{'wavefronts':>12}{'÷':>6}{'instructions':>13}{'integer':>8}{'TFLOP/s':>9}  bound"
    )
    by_architecture: dict[int, list[tuple[Case, Config]]] = {}
    for entry in entries:
        by_architecture.setdefault(entry[0].architecture, []).append(entry)
    for some in by_architecture.values():  # Triton asks once in a process what a device allows
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for row in pool.map(count, [emulator] * len(some), *zip(*some, strict=True)):
                print(line(row), flush=True)


def line(row: Row) -> str:
    """A row of the table."""
    case, c = row.case, row.counts
    times = RATES[case.architecture].times(c, case.itemsize)
    bound = max(times, key=times.__getitem__)
    return (
        f"{case.kernel:<19}{case.itemsize:>5}{case.architecture:>4}{case.head_dim:>5}  {text(row.config):<30}"
        f"{c.flops / 1e6:>7,.1f}{c.flops / row.needed:>6.2f}{c.bytes / 1e6:>9.3f}{c.bytes / row.ideal:>6.2f}"
        f"{c.wavefronts:>12,.0f}{row.conflicts:>6.2f}{c.instructions / row.programs:>13,.0f}"
        f"{c.integer / c.instructions:>8.1%}{row.useful / times[bound] / 1e12:>9.0f}  {bound}"
    )
