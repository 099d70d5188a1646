"""Processes that make a group, for tests of what happens across ranks: started once, then given call after call.

They compute on the CPU, kernels in Triton's interpreter, on a machine with a GPU too: a group of several ranks needs as
many of those.
"""

from __future__ import annotations

import os
import queue
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

# A call that hangs is an error, and soon.
TIMEOUT = 300


def _serve(rank: int, size: int, store: str, calls: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (call := calls.get()) is not None:
        function, args = call
        torch.manual_seed(0)
        try:
            results.put((rank, True, function(*args)))
        except Exception:
            results.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``size`` processes, group "gloo", one thread each. Functions and arguments are pickled: functions of modules."""

    def __init__(self, size: int, folder: os.PathLike) -> None:
        context = mp.get_context("spawn")
        self.size, self.results = size, context.Queue()
        self.calls = [context.Queue() for _ in range(size)]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, f"{folder}/store", self.calls[rank], self.results))
            for rank in range(size)
        ]
        self.alive = True
        with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}):
            for process in self.processes:
                process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank; its results in their order. Raises what it raised, as text, on any."""
        for calls in self.calls:
            calls.put((function, args))
        answers = {}
        while len(answers) < self.size:
            try:
                rank, *answer = self.results.get(timeout=TIMEOUT)
            except queue.Empty:
                self.stop(kill=True)
                missing = sorted(set(range(self.size)) - set(answers))
                raise AssertionError(f"ranks {missing} hang in {function.__name__}; the others: {answers}") from None
            answers[rank] = answer
        failed = {rank: text for rank, (good, text) in answers.items() if not good}
        assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in sorted(failed.items()))
        return [answers[rank][1] for rank in range(self.size)]

    def stop(self, kill: bool = False) -> None:
        self.alive = False
        for calls, process in zip(self.calls, self.processes, strict=True):
            if kill:
                process.kill()
            else:
                calls.put(None)
        for process in self.processes:
            process.join(30)
