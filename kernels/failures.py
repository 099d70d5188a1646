"""What building a kernel fails of: a refusal, which the next attempt meets as well, or a failure that passes.

Only a refusal is a :class:`BuildError`, after which ``backend="auto"`` takes PyTorch. All else that goes wrong at a
first launch (no memory left, the error of an earlier kernel, an assertion on the device, whatever is unknown) raises as
it is.
"""

import errno
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from triton.errors import TritonError


class BuildError(RuntimeError):
    """A compiler refuses a kernel, or the device cannot load or hold it."""


class CaptureError(RuntimeError):
    """A kernel's first launch was to be captured into a CUDA graph."""


# How Triton begins what it says about an error of the driver, whose number it does not give.
_OF_DRIVER = "Triton Error [CUDA]: "
# The driver's texts (cuGetErrorString) for a device or driver that does not run such code.
_NOT_FOR_THIS_DEVICE = (
    "device kernel image is invalid",
    "no kernel image is available for execution on the device",
    "a PTX JIT compilation failed",
    "PTX JIT compiler library not found",
    "the provided PTX was compiled with an unsupported toolchain",
    "PTX JIT compilation was disabled",
    "too many resources requested for launch",
)
_WHILE_CAPTURING = re.compile(r"(stream is|during|on a|in a) captur")  # results 900, 901, 906 and 907
# Of the operating system: what a compiler lacks for the moment.
_FOR_THE_MOMENT = {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EINTR}
_KILLED = re.compile(r"failed with error code -\d+")  # what Triton says of a ptxas that a signal ended


@contextmanager
def building(kernel: str, refuses: Callable[[Exception], bool]) -> Iterator[None]:
    """Within the context an error that ``refuses`` knows becomes a :class:`BuildError`, others raise as they are.

    Raises:
        BuildError: the kernel is refused.
        CaptureError: the driver refuses because it captures a CUDA graph.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and _WHILE_CAPTURING.search(str(error)):
            raise CaptureError(
                f"{kernel}: a kernel's first launch loads it onto the device, which no CUDA graph captures. Before the"
                " capture run one step, forward and backward, of the same modes, shapes and dtypes."
            ) from error
        if refuses(error):
            raise BuildError(f"{kernel}: {type(error).__name__}: {error}") from error
        raise


def compiler_refuses(error: Exception) -> bool:
    """Whether what was raised while a kernel is compiled will be raised again: all but what passes."""
    if isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError, Warning)):
        return False  # a warning is raised where a filter makes it an error
    if isinstance(error, OSError):
        return error.errno not in _FOR_THE_MOMENT
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode >= 0  # else a signal ended it
    if _OF_DRIVER in str(error):
        return _is_refusal(str(error))
    return not _KILLED.search(str(error))


def device_refuses(error: Exception) -> bool:
    """Whether what was raised while a kernel is loaded and launched will be raised again: what is known to be."""
    if isinstance(error, (TritonError, OSError, subprocess.CalledProcessError)):
        return compiler_refuses(error)
    return isinstance(error, RuntimeError) and _is_refusal(str(error))


def _is_refusal(text: str) -> bool:
    if "Failed to find C compiler" in text:
        return True
    return text.startswith(_OF_DRIVER) and text[len(_OF_DRIVER) :].startswith(_NOT_FOR_THIS_DEVICE)
