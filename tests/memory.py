"""Peak memory counted from the tensors that a piece of code allocates, exact on any machine."""

from __future__ import annotations

import gc
import weakref
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Within the context: ``peak``, the largest number of bytes that newly allocated tensors held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        gc.freeze()  # what is here already need not be looked at each time
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        gc.unfreeze()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        if sum(self.live.values()) > self.peak:
            gc.collect()  # Triton's interpreter leaves a kernel's tensors in reference cycles
            self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_by_profiler(run) -> int:
    """The same on a CPU as the allocator tells it, which no mode has to see: calls by tapes remain so."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
