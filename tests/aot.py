"""``python -m tests.aot``: compiles every kernel at every committed configuration, without a GPU.

Checks what the machine code says of itself: no spilled register, shared memory within what the device allows a program,
tensor-core instructions, wide loads and assertions where they are meant. Checks in the PTX that no asynchronous copy or
product is left unguarded, as far as :mod:`tests.ptx.unguarded` sees. Prints a table; the exit status is 0 if all is
well.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from fastbf.kernels.launch import OPTIONS
from fastbf.kernels.limits import KIB
from tests.aot_jobs import KERNELS, Job, jobs
from tests.ptx.unguarded import faults

#: Shared memory a program may use, in KiB, by compute capability (CUDA C++ programming guide).
SHARED = {80: 163, 86: 99, 90: 227, 100: 227}

TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|UTC\w*MMA)")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Result(NamedTuple):
    """What the machine code says."""

    registers: int
    spill: int  #: bytes of local memory a thread
    shared: int  #: bytes a program
    tensor_core: int  #: instructions
    missing: str = ""  #: what is not in it and should be
    unguarded: tuple[str, ...] = ()  #: asynchronous work that may meet what it must not
    error: str = ""


def build(job: Job) -> Result:
    """Compiles one kernel and reads its PTX and its machine code."""
    try:
        compiled = compiled_kernel(job)
        unguarded = tuple(faults(compiled.asm["ptx"], job.sides))
    except Exception as error:
        return Result(0, 0, 0, 0, error=f"{type(error).__name__}: {error}"[:300])
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
        ", ".join(text for text in job.meant if text not in code),
        unguarded,
    )


def compiled_kernel(job: Job) -> CompiledKernel:
    """What Triton makes of a kernel."""
    function = KERNELS[job.kernel]
    signature, pointers = {}, {}
    for i, p in enumerate(function.params):
        if p.is_constexpr:
            signature[p.name] = "constexpr"
        elif p.name in job.elements:
            signature[p.name] = "*" + job.elements[p.name]
            pointers[i,] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = p.annotation_type
    constants = {name: value for name, value in job.constants.items() if name in signature}
    return triton.compile(
        ASTSource(function, signature, constants, pointers),
        target=GPUTarget("cuda", job.capability, 32),
        options={**OPTIONS, **job.options},
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([BIN / tool, *arguments], capture_output=True, text=True, check=True).stdout


def fault(job: Job, result: Result, may_spill: bool) -> str:
    """What is wrong with a kernel; empty if nothing is."""
    if result.error:
        return result.error
    if result.spill and not may_spill:
        return f"spills {result.spill} bytes"
    if result.shared > SHARED[job.capability] * KIB:
        return f"needs {result.shared} bytes of shared memory"
    if (result.tensor_core > 0) != job.tensor_cores:
        return f"has {result.tensor_core} tensor-core instructions"
    if result.missing:
        return f"has no {result.missing}"
    if result.unguarded:
        return f"leaves asynchronous work unguarded in {len(result.unguarded)} places: {result.unguarded[0]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", nargs="+", choices=sorted(KERNELS), default=sorted(KERNELS))
    parser.add_argument("--sm", nargs="+", type=int, choices=SHARED, default=list(SHARED))
    parser.add_argument("--may-spill", action="store_true", help="spilled registers are shown, and are no fault")
    parser.add_argument("--full", action="store_true", help="every dtype both ways, which takes twice as long")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one compilation of N, from end to end")
    arguments = parser.parse_args()
    todo = jobs(arguments.kernel, arguments.sm, arguments.full)[:: arguments.every]
    print(f"triton {triton.__version__}: {len(todo)} compilations")
    print(f"{'kernel':<23}{'dtype':<10}size keep   sm {'tiles':<31} regs spill  KiB  mma")
    faults = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for job, result in zip(todo, pool.map(build, todo, chunksize=8), strict=True):
            wrong = fault(job, result, arguments.may_spill)
            faults += bool(wrong)
            print(
                f"{job.kernel:<23}{job.kind:<10}{job.size:>4} {job.keep:>4} {job.capability:>4} {job.tiles:<31}"
                f"{result.registers:>5}{result.spill:>6}{result.shared // KIB:>5}{result.tensor_core:>5}  {wrong}",
                flush=True,
            )
    print(f"{len(todo)} compilations, {faults} faults")
    return 1 if faults or not todo else 0


if __name__ == "__main__":
    sys.exit(main())
