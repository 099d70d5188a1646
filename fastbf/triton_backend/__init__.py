"""The Triton backend: autograd Functions over the launchers of ``kernels/``. Its modules import triton."""

from torch.utils.flop_counter import flop_registry

import fastbf.kernels.attention  # noqa: F401 (registers formulas)
from fastbf import torch_state
from fastbf.kernels import launch

launch.watched = torch_state.watched
torch_state.add_flop_formulas(flop_registry)
