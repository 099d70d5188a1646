"""A kernel that stores one number, to find out whether Triton can build and launch kernels here."""

import torch
import triton
import triton.language as tl

from fastbf.kernels.launch import launch, unplanned


@triton.jit
def write_one(p_x):
    tl.store(p_x, 1)


def probe(device: torch.device) -> None:
    """Builds and launches a kernel on ``device``; raises the error if this fails."""
    x = torch.empty(1, dtype=torch.int32, device=device)
    with unplanned():
        launch(write_one, 1, device, (x,), (), {"num_warps": 1})
