"""What is measured: the configurations of the BatchFormer papers, large batches and small ones, as data.

Sources: BatchFormer (arXiv 2203.01522), section 4 and its released configurations; BatchFormerV2 (arXiv 2204.01254).
"""

from __future__ import annotations

from typing import NamedTuple

HEADS = 4


class Workload(NamedTuple):
    """Features (N, L, C), or (N, C) if L is 1; the feed-forward layer is as wide as the features."""

    name: str
    n: int  #: samples in a batch
    c: int  #: channels
    k: int = 0  #: classes; 0 where no classifier follows
    positions: int = 1  #: L
    loss_only: bool = False  #: too many classes for anything but the loss to matter

    @property
    def head_dim(self) -> int:
        return self.c // HEADS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the features."""
        return (self.n, self.c) if self.positions == 1 else (self.n, self.positions, self.c)

    @property
    def size(self) -> str:
        """The sizes in words."""
        parts = [f"N={self.n}"]
        if self.positions > 1:
            parts.append(f"L={self.positions}")
        parts.append(f"C={self.c}")
        if self.k:
            parts.append(f"K={self.k}")
        return " ".join(parts)

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that it says something about (``bench/ops.py``)."""
        if self.loss_only:
            return ("loss",)
        return ("attention", "add_norm", "activation", "layer", *(("loss",) if self.k else ()), "step")

    def reduced(self, samples: int = 80) -> Workload:
        """A small one that takes the same paths, for comparing results before anything is timed."""
        few = self.n if self.n <= 32 else samples
        return self._replace(name="reduced", n=few, positions=min(self.positions, 5), k=min(self.k, 2000))


WORKLOADS = (
    Workload("cifar100-lt", 512, 64, 100),
    Workload("imagenet-lt-128", 128, 2048, 1000),
    Workload("imagenet-lt-256", 256, 2048, 1000),
    Workload("imagenet-lt-512", 512, 2048, 1000),
    Workload("inaturalist", 512, 2048, 8142),
    Workload("czsl", 512, 512, 2000),
    Workload("vit", 1024, 768, 1000),
    Workload("v2-deit-s", 128, 384, positions=197),
    Workload("v2-detr", 2, 256, positions=1064),
    Workload("v2-deformable-detr", 3, 256, positions=17_821),
    Workload("large-1024-512", 1024, 512, 1000),
    Workload("large-4096-512", 4096, 512, 1000),
    Workload("large-16384-512", 16_384, 512, 1000),
    Workload("large-32768-512", 32_768, 512, 1000),
    Workload("large-4096-2048", 4096, 2048, 1000),
    Workload("large-16384-2048", 16_384, 2048, 1000),
    Workload("large-32768-2048", 32_768, 2048, 1000),
    Workload("large-512-512-8142", 512, 512, 8142),
    Workload("classes-8142", 1024, 512, 8142, loss_only=True),
    Workload("classes-50000", 512, 512, 50_000, loss_only=True),
    Workload("classes-128000", 8192, 2048, 128_000, loss_only=True),
    Workload("small-16-64", 16, 64, 10),
    Workload("small-64-64", 64, 64, 10),
    Workload("small-128-64", 128, 64, 100),
    Workload("small-128-128", 128, 128, 100),
    Workload("small-256-64", 256, 64, 100),
    Workload("small-32-512", 32, 512, 100),
    Workload("small-128-512", 128, 512, 1000),
    Workload("small-v2-16-65-64", 16, 64, 10, positions=65),
    Workload("small-v2-32-197-192", 32, 192, 100, positions=197),
    Workload("small-v2-2-500-256", 2, 256, 91, positions=500),
)
BY_NAME = {w.name: w for w in WORKLOADS}

#: Names, as in the tables of docs/benchmarks.md.
SMALL = (
    "small-16-64", "small-64-64", "small-128-64", "small-128-128", "small-256-64", "small-32-512", "small-128-512",
    "cifar100-lt", "large-1024-512", "small-v2-16-65-64", "small-v2-32-197-192", "small-v2-2-500-256",
)  # fmt: skip
LARGE = ("small-128-512", "large-1024-512", "large-4096-512", "large-512-512-8142", "imagenet-lt-256")
#: Measured beside busy processes too.
BUSY = (
    "small-16-64", "small-64-64", "small-128-64", "small-128-512", "cifar100-lt", "small-v2-16-65-64",
    "small-v2-2-500-256",
)  # fmt: skip
