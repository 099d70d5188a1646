import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def library():
    from bench.driver import Library

    return Library(Path(os.environ["TRITON_LIBCUDA_PATH"]))


@pytest.fixture
def cuda(library):
    """The library under a device with compute capability 9.0, on which nothing was built."""
    from bench.driver import device

    library.forget()
    with device():
        yield library
