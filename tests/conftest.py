import os

import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter. Triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
