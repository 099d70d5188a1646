"""How far it is from a module to the first launch: functions and files on the way (docs/design.md, one road)."""

import sys
from pathlib import Path

import torch

import fastbf
from fastbf.kernels import launch
from tests.triton_case import DEVICE

FOLDERS = tuple(str(Path(module.__file__).resolve().parent) for module in (fastbf, launch))


def road(call):
    """(file, function) of every one of ours that has been entered and not left when the first kernel is launched."""
    found = []

    def entered(frame, event, _):
        if not found and event == "call" and frame.f_code is launch.launch.__code__:
            while frame is not None:
                file = str(Path(frame.f_code.co_filename).resolve())
                if file.startswith(FOLDERS):
                    found.append((file, frame.f_code.co_name))
                frame = frame.f_back

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found[::-1]


def test_nine_functions_in_seven_files():
    former, x = fastbf.BatchFormer(32, backend="triton", device=DEVICE), torch.randn(6, 32, device=DEVICE)
    former(x)
    functions = road(lambda: former(x))
    assert functions[0][1] == "forward"
    assert functions[-1][1] == "launch"
    assert len(functions) <= 9
    assert len({file for file, _ in functions}) <= 7


def test_one_decision_a_call(monkeypatch):
    """Of the backend, and of whether the fused layer covers the call."""
    calls = []
    choose, reason = fastbf.functional.choose, fastbf.BatchFormerLayer._fused_or_reason
    for place in ("fastbf.functional.choose", "fastbf.modules.layer.choose"):
        monkeypatch.setattr(place, lambda *args, **kwargs: calls.append("choose") or choose(*args, **kwargs))
    counted = lambda *args: calls.append("reason") or reason(*args)  # noqa: E731
    monkeypatch.setattr(fastbf.BatchFormerLayer, "_fused_or_reason", counted)
    former, x = fastbf.BatchFormer(32, backend="torch"), torch.randn(6, 32)
    former(x)
    assert sorted(calls) == ["choose", "reason"]
    calls.clear()
    fastbf.BatchFormerLayer(32, 4, backend="torch")(x)
    assert calls.count("reason") == 1
