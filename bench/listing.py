"""What can be measured here: ops, workloads, and which provider serves which op, or why it does not."""

from __future__ import annotations

import warnings

import torch

from bench.ops import OPS, Problem, default_dtype
from bench.providers import PROVIDERS, Provider
from bench.workloads import BY_NAME, WORKLOADS
from fastbf.environment import device_name


def show(device: torch.device) -> None:
    """Prints the lists."""
    print("ops")
    for name, op in OPS.items():
        print(f"  {name:<22} {op.about}")
    print("\nworkloads")
    for w in WORKLOADS:
        print(f"  {w.name:<22} {w.size:<28} {', '.join(w.ops)}")
    print(f"\nproviders on {device_name(device)}, in fp32 on a CPU, in 16 bits on a GPU")
    for name, provider in PROVIDERS.items():
        print(f"  {name:<22} {provider.about}")
        for reason, ops in _by_obstacle(provider, device).items():
            print(f"{'':<25}{', '.join(ops)}" + f": not here, {reason}" * bool(reason))


def _by_obstacle(provider: Provider, device: torch.device) -> dict[str, list[str]]:
    """The provider's ops by the reason why it cannot serve them; the empty one comes first."""
    found: dict[str, list[str]] = {"": []}
    for op in provider.ops:
        found.setdefault(_obstacle(provider, op, device), []).append(op)
    return {reason: ops for reason, ops in found.items() if ops}


def _obstacle(provider: Provider, op: str, device: torch.device) -> str:
    """Why a provider cannot serve an op of the paper's main configuration as it is measured by default."""
    workload = BY_NAME["imagenet-lt-512"].reduced(provider.traits.samples)
    problem = Problem(op, workload, default_dtype(op, device), device, 0.0 if op == "loss" else 0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            provider.case(problem, problem.inputs())
    except Exception as error:  # whatever a package raises where it is imported
        return str(error)
    return ""
