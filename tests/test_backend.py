"""Choice of backend, its explanation, the command line, and what importing costs."""

import subprocess
import sys

import pytest
import torch

import fastbf
from fastbf.backend import OPS


def run(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_torch_and_says_why(op):
    choice = fastbf.explain(op, torch.randn(2, 8))
    assert choice.backend == "torch"
    assert op in choice.reason
    assert fastbf.explain(op, backend="torch").backend == "torch"


@pytest.mark.parametrize(
    "module", [fastbf.BatchFormer(8), fastbf.BatchFormerLayer(8, 4), fastbf.SharedClassifier(8, 3)]
)
def test_modules_are_explained(module):
    assert fastbf.explain(module, torch.randn(2, 8)).backend == "torch"
    assert "asked for" in fastbf.explain(module, torch.randn(2, 8), backend="torch").reason


def test_a_layer_outside_the_fused_path_says_so():
    layer = fastbf.BatchFormerLayer(8, 4, activation=torch.tanh)
    assert "activation" in fastbf.explain(layer, torch.randn(2, 8)).reason


def test_triton_never_falls_back_silently():
    x = torch.randn(4, 8)
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        fastbf.BatchFormer(8, backend="triton")(x)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        fastbf.SharedClassifier(8, 3, backend="triton").loss(x, y)
    layer = fastbf.BatchFormerLayer(8, 4, backend="triton")
    with pytest.raises(ValueError, match="attention mask"):
        layer(x, src_mask=torch.zeros(4, 4, dtype=torch.bool))


def test_what_cannot_be_explained():
    with pytest.raises(ValueError, match="what must be one of batch_attention"):
        fastbf.explain("softmax")
    with pytest.raises(TypeError, match="got Linear"):
        fastbf.explain(torch.nn.Linear(2, 2))


def test_import_does_not_load_triton_nor_initialise_cuda():
    code = "import sys, fastbf, torch; print('triton' in sys.modules, torch.cuda.is_initialized())"
    assert run("-c", code).stdout.split() == ["False", "False"]


def test_kernels_install_inside_fastbf_only():
    assert run("-c", "import fastbf.kernels").returncode == 0


def test_command_line():
    result = run("-m", "fastbf")
    assert result.returncode == 0, result.stderr
    for word in ("torch", "triton", "device", "linear_cross_entropy", "self-check", "everything is in order"):
        assert word in result.stdout


def test_self_check_can_fail(monkeypatch):
    from fastbf import __main__ as command
    from fastbf import reference

    exact = reference.attention
    monkeypatch.setattr(command.functional, "batch_attention", lambda *a: exact(*a, scale=0.2))
    assert not command.self_check(torch.device("cpu"))


def test_make_graphed_on_cpu_is_the_callable():
    module = fastbf.BatchFormer(8)
    assert fastbf.make_graphed(module, (torch.randn(4, 8),)) is module
    with pytest.raises(ValueError, match="sample_args must hold at least one tensor"):
        fastbf.make_graphed(module, ())
    with pytest.raises(TypeError, match=r"sample_args\[1\] must be a torch\.Tensor, got int"):
        fastbf.make_graphed(module, (torch.randn(4, 8), 3))
