"""What a first launch fails of, by Triton's driver: what is remembered, and what raises as it is."""

import re
import subprocess
import warnings

import pytest
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import fastbf
from bench.driver import device
from fastbf import backend, functional
from fastbf.kernels import activation, failures, launch, probe
from fastbf.kernels.failures import BuildError, CaptureError

CPU, CAPTURING = torch.device("cpu"), 900


@pytest.fixture(autouse=True)
def auto_takes_kernels(monkeypatch):
    """backend="auto" serves CPU tensors by kernels, tries the device before, and forgets afterwards what failed."""
    obstacle, run = backend._obstacle, probe.probe
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(probe, "probe", lambda _: run(CPU))
    monkeypatch.setattr(
        backend,
        "_obstacle",
        lambda *args, interpreter: backend._tried(torch.device("cuda", 0)) or obstacle(*args, interpreter=True),
    )
    monkeypatch.setattr(backend, "_failed", {})
    backend._tried.cache_clear()
    yield
    backend._tried.cache_clear()


def call(**options):
    return functional.activation_dropout(torch.ones(64, 32), "relu", dropout_p=0.0, **options)


def silently(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


PASSING = {
    "out of memory": ("cuModuleLoadData", 2, "out of memory"),
    "out of memory, of a function": ("cuModuleGetFunction", 2, "out of memory"),
    "an illegal access before": ("*", 700, "an illegal memory access was encountered"),
    "a failure before": ("*", 719, "unspecified launch failure"),
    "an assertion before": ("cuLaunchKernelEx", 710, "device-side assert triggered"),
    "unknown": ("cuModuleLoadData", 999, "unknown error"),
    "unknown, of a launch": ("cuLaunchKernelEx", 1, "unknown error"),
}


@pytest.mark.parametrize("case", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("where", ["probe", "kernel"])
def test_what_passes_raises_as_it_is(case, where, cuda):
    name, result, text = case
    if where == "kernel":
        backend._tried(torch.device("cuda", 0))
    with cuda.failing(name, result), pytest.raises(RuntimeError, match=re.escape(f"Triton Error [CUDA]: {text}")) as e:
        silently(call)
    assert not isinstance(e.value, BuildError | CaptureError)
    cuda.forget()
    silently(call)
    assert cuda.launches()[-1].startswith("activation_forward")
    assert backend._failed == {}


@pytest.mark.parametrize("where", ["probe", "kernel"])
@pytest.mark.parametrize(("name", "result"), [("cuModuleLoadData", 900), ("cuModuleGetFunction", 901)])
def test_a_first_launch_that_is_captured(where, name, result, cuda):
    """Raises with advice, with either backend, and the next one succeeds."""
    if where == "kernel":
        backend._tried(torch.device("cuda", 0))
    for options in ({}, {"backend": "triton"}):
        with cuda.failing(name, result), pytest.raises(CaptureError, match=r"Before the\s+capture run one step"):
            silently(call, **options)
    cuda.forget()
    silently(call)
    assert cuda.launches()
    with cuda.failing("cuModuleLoadData", CAPTURING):
        silently(call)  # is loaded


def test_capture_in_backward(cuda):
    x = torch.ones(64, 32, requires_grad=True)
    y = functional.activation_dropout(x, "relu", dropout_p=0.0)
    launch._compiled.clear()  # forward built the kernel of backward
    activation.activation_backward.device_caches.clear()
    with cuda.failing("cuModuleLoadData", CAPTURING), pytest.raises(CaptureError):
        silently(y.sum().backward)
    assert backend._failed == {}
    silently(functional.activation_dropout(x, "relu", dropout_p=0.0).sum().backward)


REFUSED = {
    "an image of another device": ("cuModuleLoadData", 200, "device kernel image is invalid"),
    "no image for this device": ("cuModuleLoadData", 209, "no kernel image is available"),
    "too many resources": ("cuLaunchKernelEx", 701, "too many resources requested for launch"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_a_device_refuses_is_remembered(case, cuda):
    name, result, text = case
    backend._tried(torch.device("cuda", 0))
    with cuda.failing(name, result):
        with pytest.warns(RuntimeWarning, match=f"fastbf uses PyTorch: .* could not be built, .*{text}"):
            torch.testing.assert_close(call(), torch.ones(64, 32))
        with pytest.raises(ValueError, match=text):
            call(backend="triton")
    silently(call)
    assert fastbf.explain("activation_dropout", torch.ones(64, 32)).backend == "torch"


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_device_that_refuses_the_probe(case, cuda):
    name, result, text = case
    with cuda.failing(name, result), pytest.warns(RuntimeWarning, match=f"cannot build a kernel for cuda:0, .*{text}"):
        call()
    silently(call)
    assert text in fastbf.explain("activation_dropout", torch.ones(64, 32)).reason


def test_a_gpu_that_ptxas_does_not_know(library):
    """As sm_110 is to Triton 3.6."""
    with device((13, 0)), pytest.warns(RuntimeWarning, match=r"(?s)cannot build a kernel for cuda:0, .*PTXAS.*sm_130"):
        call()


ERRORS = {
    CompilationError("source", None, "no"): True,
    PTXASError("`ptxas` failed with error code 255"): True,
    PTXASError("`ptxas` failed with error code -9"): False,
    OutOfResources(300000, 232448, "shared memory"): True,
    RuntimeError("PassManager::run failed"): True,
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable"): True,
    AssertionError("libcuda.so cannot found!"): True,
    PermissionError(13, "Permission denied"): True,
    FileNotFoundError(2, "No such file or directory", "/sbin/ldconfig"): True,
    OSError(28, "No space left on device"): False,
    OSError(12, "Cannot allocate memory"): False,
    subprocess.CalledProcessError(1, "gcc"): True,
    subprocess.CalledProcessError(-9, "gcc"): False,
    MemoryError(): False,
    UserWarning("of Triton, where warnings are errors"): False,
    torch.OutOfMemoryError("CUDA out of memory"): False,
    torch.AcceleratorError("CUDA error: device-side assert triggered"): False,
    RuntimeError("Triton Error [CUDA]: unspecified launch failure"): False,
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error}"[:40])
def test_what_a_compiler_says(error, cuda, monkeypatch):
    """An error while a kernel is compiled."""
    backend._tried(torch.device("cuda", 0))

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("triton.runtime.JITFunction.warmup", fail)
    if ERRORS[error]:
        with pytest.warns(RuntimeWarning, match="could not be built, activation_forward"):
            call()
        silently(call)
    else:
        with pytest.raises(type(error)) as found:
            silently(call)
        assert found.value is error
        assert backend._failed == {}


@pytest.mark.parametrize("error", [ValueError("cpu tensor?"), RuntimeError("of a profiler's hook"), TypeError("x")])
def test_unknown_errors_of_a_launch(error):
    assert not failures.device_refuses(error)


def test_resources_are_the_devices(cuda, monkeypatch):
    """More shared memory than there is: Triton raises as it loads the kernel."""
    backend._tried(torch.device("cuda", 0))
    monkeypatch.setattr("triton.compiler.compiler.max_shared_mem", lambda _: -1)
    with pytest.warns(RuntimeWarning, match="OutOfResources: out of resource: shared memory"):
        call()
    assert not launch._compiled or all(f.__name__ != "activation_forward" for f, *_ in launch._compiled)
