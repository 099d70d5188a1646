"""``python -m tests.aot``: compiles every kernel at every committed configuration, without a GPU.

Checks what the machine code says of itself: no spilled register, shared memory within what the device allows a program,
tensor-core instructions where they are meant. Prints a table; the exit status is 0 if all is well.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbf.kernels import attention
from fastbf.kernels.attention_configs import KIB, TABLE, Config, key_value_passes
from fastbf.kernels.rng import KEEP_BITS, KEEP_HALVES

#: Shared memory a program may use, in KiB, by compute capability (CUDA C++ programming guide).
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}
#: Which of them use the table's entries for an architecture.
USERS = {80: (80, 86), 90: (90,), 100: (100,)}

FP32_POINTERS = ("p_lse", "p_delta")
TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTC\w*MMA)")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Job(NamedTuple):
    """One compilation."""

    kernel: str
    dtype: str
    precision: str
    head_dim: int
    keep: int
    capability: int
    config: Config
    needs: tuple[bool, bool]  #: dk and dv, of backward_key_value


class Result(NamedTuple):
    """What the machine code says."""

    registers: int
    spill: int  #: bytes of local memory a thread
    shared: int  #: bytes a program
    tensor_core: int  #: instructions
    error: str = ""


def jobs(kernels: list[str], capabilities: list[int], full: bool) -> Iterator[Job]:
    """Every entry of the table in every dtype, for every GPU that uses it.

    One of an entry's two kinds is compiled at its largest head dimension with decisions of one bit, the other at a head
    dimension that fills no chunk with decisions of 16; ``full`` compiles both ways of both.
    """
    for (kernel, itemsize, architecture), by_head_dim in TABLE.items():
        if kernel not in kernels:
            continue
        kinds = [("bf16", "tf32"), ("fp16", "tf32")] if itemsize == 2 else [("fp32", "tf32"), ("fp32", "ieee")]
        for head_dim, configs in by_head_dim.items():
            ways = [(head_dim, KEEP_BITS.value), (head_dim - 8, KEEP_HALVES.value)]
            pairs = list(itertools.product(kinds, ways)) if full else list(zip(kinds, ways, strict=True))
            for config, capability, (kind, way) in itertools.product(configs, USERS[architecture], pairs):
                if capability in capabilities:
                    for needs in key_value_passes(config) if kernel == "backward_key_value" else [(True, True)]:
                        yield Job(kernel, *kind, *way, capability, config, needs)


def build(job: Job) -> Result:
    """Compiles one kernel and reads its machine code."""
    function = getattr(attention, job.kernel)
    constants = {
        "D": job.head_dim, "BM": job.config.block_m, "BN": job.config.block_n, "BD": job.config.block_d,
        "KEEP": job.keep, "PRECISION": job.precision, "RELOAD": job.config.reload,
        "NEEDS_DQ": True, "NEEDS_DK": job.needs[0], "NEEDS_DV": job.needs[1],
    }  # fmt: skip
    signature, pointers = {}, {}
    for i, p in enumerate(function.params):
        if p.is_constexpr:
            signature[p.name] = "constexpr"
        elif p.name.startswith("p_"):
            element = "i64" if p.name == "p_seed" else "fp32" if p.name in FP32_POINTERS else job.dtype
            signature[p.name] = "*" + element
            pointers[i,] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = p.annotation_type
    constants = {name: value for name, value in constants.items() if name in signature}
    try:
        compiled = triton.compile(
            ASTSource(function, signature, constants, pointers),
            target=GPUTarget("cuda", job.capability, 32),
            options={"num_warps": job.config.num_warps, "num_stages": job.config.num_stages},
        )
    except Exception as error:
        return Result(0, 0, 0, 0, f"{type(error).__name__}: {error}"[:300])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+)", code, re.M)
    return Result(
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
        sum(bool(TENSOR_CORE.match(op)) for op in opcodes),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def fault(job: Job, result: Result) -> str:
    """What is wrong with a kernel; empty if nothing is."""
    if result.error:
        return result.error
    if result.spill:
        return f"spills {result.spill} bytes"
    if result.shared > SHARED[job.capability] * KIB:
        return f"needs {result.shared} bytes of shared memory"
    if (result.tensor_core > 0) != (job.precision == "tf32"):
        return f"has {result.tensor_core} tensor-core instructions"
    return ""


def main() -> int:
    kernels = sorted({kernel for kernel, _, _ in TABLE})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--sm", nargs="+", type=int, choices=SHARED, default=list(SHARED))
    parser.add_argument("--full", action="store_true", help="every dtype both ways, which takes twice as long")
    arguments = parser.parse_args()
    todo = list(jobs(arguments.kernel, arguments.sm, arguments.full))
    print(f"triton {triton.__version__}: {len(todo)} compilations")
    print(f"{'kernel':<20}{'dtype':<10}   D keep   sm {'tiles':<31} regs spill  KiB  mma")
    faults = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for job, result in zip(todo, pool.map(build, todo, chunksize=8), strict=True):
            wrong = fault(job, result)
            faults += bool(wrong)
            kind = job.dtype if job.dtype != "fp32" else f"fp32 {job.precision}"
            tiles = "{}x{}x{}, {} warps, {}".format(*job.config) + ", reload" * job.config.reload
            print(
                f"{job.kernel:<20}{kind:<10}{job.head_dim:>4} {job.keep:>4} {job.capability:>4} {tiles:<31}"
                f"{result.registers:>5}{result.spill:>6}{result.shared // KIB:>5}{result.tensor_core:>5}  {wrong}",
                flush=True,
            )
    print(f"{len(todo)} compilations, {faults} faults")
    return 1 if faults or not todo else 0


if __name__ == "__main__":
    sys.exit(main())
