"""Which of PyTorch's operators launch something on a GPU."""

from __future__ import annotations

from torch._ops import OpOverload

_FREE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias", "reshape")
_FREE += ("promote_types", "device")


def launches(operator: OpOverload) -> bool:
    """Whether it does: views, allocations and questions do not."""
    return not operator.is_view and not operator.overloadpacket.__name__.startswith(_FREE)
