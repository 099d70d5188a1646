"""The batch across processes: local attention, global attention, and what one process makes of the whole batch.

    torchrun --nproc-per-node 2 examples/distributed.py [--batch N] [--device auto|cpu|cuda]

Every rank holds its part of a batch of digits. Under plain data parallelism BatchFormer mixes each part by itself, and
what a sample learns from depends on how many ranks there are. With ``process_group`` all samples of all ranks attend to
each other. Both are compared with one process that holds the whole batch: mixed features, and the gradients that
DistributedDataParallel averages, without dropout and with it, and where the last rank has fewer samples.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastbf

CHANNELS, CLASSES = 64, 10


class Net(nn.Module):
    """A backbone, BatchFormer across ranks or not, the shared classifier; its forward is the loss of a step."""

    def __init__(self, dropout: float, process_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, CHANNELS), nn.ReLU())
        self.batchformer = fastbf.BatchFormer(CHANNELS, dropout=dropout, process_group=process_group)
        self.classifier = fastbf.SharedClassifier(CHANNELS, CLASSES)

    def forward(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """The sum of the losses of 2N rows, times ``share``."""
        return share * self.classifier.loss(self.batchformer(self.backbone(images)), labels, reduction="sum")


def step(net: nn.Module, images: Tensor, labels: Tensor, share: float, seed: int) -> list[Tensor]:
    """The mixed features of a step, and the gradient of every parameter."""
    inner = net.module if isinstance(net, DistributedDataParallel) else net
    net.zero_grad()
    mixed = []
    hook = inner.batchformer.register_forward_hook(lambda _, __, out: mixed.append(out.detach().chunk(2)[1]))
    torch.manual_seed(seed)  # the same on every rank: dropout goes by a sample's place in the whole batch
    net(images, labels, share).backward()
    hook.remove()
    return [mixed[0], *(p.grad.clone() for p in net.parameters())]


def difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest relative difference on any rank, in the Euclidean norm of a tensor."""
    pairs = zip(found, expected, strict=True)
    worst = max(((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs if b.numel())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def compare(sizes: list[int], dropout: float, device: torch.device) -> dict[str, tuple[float, float]]:
    """Largest differences from one process, of mixed features and of gradients, on ranks with batches of ``sizes``."""
    rank, ranks, total = dist.get_rank(), dist.get_world_size(), sum(sizes)
    digits = load_digits()
    images = torch.tensor(digits.images[:total] / 16, dtype=torch.float32, device=device)
    labels = torch.tensor(digits.target[:total], device=device)
    found = {}
    alone = [dist.new_group([i]) for i in range(ranks)][rank]  # with a group dropout goes by places, on any backend
    for name, group in (("one process", alone), ("local", alone), ("global", dist.group.WORLD)):
        torch.manual_seed(0)
        net = Net(dropout, group).to(device)
        own = (images, labels)
        if name != "one process":
            net, own = DistributedDataParallel(net), tuple(x.split(sizes)[rank] for x in own)
        # The mean over all rows of all ranks: DistributedDataParallel divides by the number of ranks.
        share = (1 if name == "one process" else ranks) / (2 * total)
        found[name] = step(net, *own, share, seed=1)
    mixed, *gradients = found.pop("one process")
    mixed = mixed.split(sizes)[rank]
    return {
        name: (difference([ours], [mixed]), difference(theirs, gradients)) for name, (ours, *theirs) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32, help="samples on each rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 examples/distributed.py")
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    if dist.get_rank() == 0:
        print(f"{ranks} processes on {device.type}, differences from one process that holds the whole batch\n")
        print(f"  {'samples on each rank':<24}{'dropout':<10}{'attention':<10}{'mixed features':>16}{'gradients':>14}")
    full = [args.batch] * ranks
    ragged = [*full[1:], args.batch // 3]  # the last batch of an epoch
    good = True
    for sizes, dropout in ((full, 0.0), (full, 0.5), (ragged, 0.5)):
        for name, (mixed, gradients) in compare(sizes, dropout, device).items():
            if dist.get_rank() == 0:
                print(f"  {sizes!s:<24}{dropout:<10}{name:<10}{mixed:>16.1e}{gradients:>14.1e}")
            equal = max(mixed, gradients) < 1e-4
            good &= equal == (name == "global" or ranks == 1)
    if dist.get_rank() == 0:
        text = "global attention is that of one process; local attention is not"
        text = "with one rank, local and global attention are the same" if ranks == 1 else text
        print(f"\n{text if good else 'NOT as expected'}")
    dist.destroy_process_group()
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
