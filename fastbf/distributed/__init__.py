"""The batch across ranks: samples of several processes attend to each other (docs/distributed.md)."""

from fastbf.distributed.gathering import gather

__all__ = ["gather"]
