"""fastbf: BatchFormer at speed. See README.md; importing this needs no GPU and does not import triton."""

from fastbf import distributed, functional
from fastbf.averaging import update_average
from fastbf.backend import explain
from fastbf.cuda_graphs import make_graphed
from fastbf.modules import BatchFormer, BatchFormerLayer, SharedClassifier
from fastbf.surgery import convert, strip
from fastbf.version import __version__
from fastbf.warming import warm_up

__all__ = [
    "BatchFormer",
    "BatchFormerLayer",
    "SharedClassifier",
    "__version__",
    "convert",
    "distributed",
    "explain",
    "functional",
    "make_graphed",
    "strip",
    "update_average",
    "warm_up",
]
