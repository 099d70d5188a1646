"""The roofline of a training step on paper: counted FLOPs, bytes and launches, and the time an H100 would allow."""

from __future__ import annotations

import math

import torch

from bench.ceilings import H100, Ceilings
from bench.counts import Launch, step
from bench.ops import OPS, Problem, compulsory_bytes
from bench.workloads import Workload


def seconds(launched: list[Launch], ceilings: Ceilings) -> float:
    """Every launch at the ceiling that binds it, one after another, without gaps."""
    return sum(ceilings.seconds(launch.bytes, launch.flops) for launch in launched)


def floor(w: Workload, ceilings: Ceilings) -> float:
    """If nothing left the chip but what must: inputs, parameters, the result and the gradients."""
    inputs = Problem("step", w, "amp", torch.device("meta"), 0.5).inputs()
    result = 4 if w.k else 2 * 4 * math.prod(w.shape)  # the loss, or the fork in fp32
    return ceilings.seconds(compulsory_bytes(inputs, result, "both"), OPS["step"].flops(w, "both"))


def show(workloads: list[Workload]) -> None:
    """Prints the table."""
    print("COMPUTED, NOT MEASURED: a training step, forward and backward, autocast to bf16, dropout 0.5, at an H100's")
    print(f"measured ceilings of {H100.flops / 1e12:.0f} TFLOP/s and {H100.bytes / 1e12:.1f} TB/s.")
    print("floor: if only inputs, parameters, the result and gradients left the chip. The other times let every launch")
    print("run at the ceiling that binds it, without gaps between launches; launches are operators and kernels.\n")
    print(f"{'':<43}{'floor':>8}   {'fastbf':<35}{'paper':<35}{'paper ÷':>7}")
    columns = f"{'launches':>8}{'GFLOP':>9}{'GB':>8}{'ms':>8}  "
    print(f"{'workload':<20}{'':<23}{'ms':>8}   {columns}{columns}{'fastbf':>7}")
    for w in workloads:
        ours, theirs = step("fastbf", w).all, step("paper", w).all
        times = [seconds(launched, H100) * 1e3 for launched in (ours, theirs)]
        line = f"{w.name:<20}{w.size:<23}{floor(w, H100) * 1e3:>8.3f}   "
        for launched, ms in zip((ours, theirs), times, strict=True):
            flops, nbytes = sum(i.flops for i in launched), sum(i.bytes for i in launched)
            line += f"{len(launched):>8}{flops / 1e9:>9.1f}{nbytes / 1e9:>8.3f}{ms:>8.3f}  "
        print(f"{line}{times[1] / times[0]:>7.2f}", flush=True)
