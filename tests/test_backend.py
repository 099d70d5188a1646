"""Choice of backend, its explanation, the command line, and what importing costs."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from triton.runtime import JITFunction

import fastbf
from fastbf import backend, functional
from fastbf.backend import OPS
from fastbf.kernels import activation, add_norm, attention, cross_entropy, probe
from fastbf.kernels.failures import BuildError
from fastbf.kernels.launch import launch
from tests.triton_case import DEVICE, SEED


def run(*args, **options):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False, **options)


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


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (fastbf.BatchFormer(8), "features must have 8 channels along channel_dim=-1"),
        (fastbf.BatchFormer(8, activation=torch.tanh), "features must have 8 channels along channel_dim=-1"),
        (fastbf.BatchFormerLayer(8, 4), "src must have 8 channels in its last dimension, got 7"),
        (fastbf.SharedClassifier(8, 3), "features must have 8 channels in the last dimension"),
    ],
)
def test_what_does_not_fit_a_module_is_not_explained(module, message):
    x = torch.randn(2, 7)
    for ask in (module, lambda x: fastbf.explain(module, x), lambda x: fastbf.explain(module, x, backend="torch")):
        with pytest.raises(ValueError, match=message):
            ask(x)
    fastbf.explain(module, torch.randn(2, 8))


def test_a_layer_outside_the_fused_path_says_so():
    layer = fastbf.BatchFormerLayer(8, 4, activation=torch.tanh)
    assert "activation" in fastbf.explain(layer, torch.randn(2, 8)).reason


def test_tensors_that_kernels_do_not_see_through():
    class Tagged(torch.Tensor):
        pass

    x = torch.randn(6, 32, device=DEVICE)
    with pytest.raises(ValueError, match="a tensor is a Tagged"):
        functional.activation_dropout(x.as_subclass(Tagged), "relu", dropout_p=0.0, backend="triton")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        CALLS["dropout_add_layer_norm"](x, dropout_p=0.0, backend="triton", residual=x.double())


def test_triton_never_falls_back_silently():
    x = torch.randn(4, 8, dtype=torch.float64)
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        fastbf.BatchFormer(8, backend="triton").double()(x)
    with pytest.raises(ValueError, match="backend='triton' cannot serve this call"):
        fastbf.SharedClassifier(8, 3, backend="triton").double().loss(x, y)
    layer = fastbf.BatchFormerLayer(8, 4, backend="triton")
    with pytest.raises(ValueError, match="attention mask"):
        layer(x, src_mask=torch.zeros(4, 4, dtype=torch.bool))


FITS = torch.randn(6, 8)
BAD_FEATURES = {
    "list": ([1.0], "must be a torch.Tensor, got list"),
    "int": (FITS.long(), "must have a floating-point dtype"),
    "sparse": (FITS.to_sparse(), "must be a dense tensor, got one of layout"),
    "half": (FITS.half(), r"must have the dtype of the weights, torch\.float32, got torch\.float16"),
    "meta": (FITS.to("meta"), "must be on the device of the weights, cpu, got meta"),
    "narrow": (FITS[:, :4], "must have 8 channels"),
}


@pytest.mark.parametrize("kind", BAD_FEATURES)
@pytest.mark.parametrize(
    "module", [fastbf.BatchFormer(8), fastbf.BatchFormer(8, forked=True), fastbf.BatchFormerLayer(8, 4),
               fastbf.SharedClassifier(8, 3)]
)  # fmt: skip
def test_explain_refuses_the_features_that_a_call_refuses(module, kind):
    features, message = BAD_FEATURES[kind]
    call = module.loss if isinstance(module, fastbf.SharedClassifier) else module
    targets = [torch.zeros(6, dtype=torch.long)] if call is not module else []
    for ask in (call, lambda x, *_: fastbf.explain(module, x)):
        with pytest.raises((TypeError, ValueError), match=message):
            ask(features, *targets)


def test_what_is_no_tensor_is_not_explained_where_pytorch_serves():
    layer = fastbf.BatchFormerLayer(8, 4, activation=torch.tanh)
    for ask in (layer, lambda x: fastbf.explain(layer, x)):
        with pytest.raises(TypeError, match=r"src must be a torch\.Tensor, got list"):
            ask([1.0])


def test_explain_of_a_nested_tensor():
    nested = torch.nested.nested_tensor([FITS[:2], FITS[2:]])
    assert fastbf.explain(fastbf.BatchFormerLayer(8, 4), nested).reason == "the input is a nested tensor."


def network(*parts):
    return torch.nn.Sequential(torch.nn.Linear(8, 8), *parts)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("softmax", ValueError, "the name of a function, one of batch_attention, .*; got 'softmax'$"),
        (3, TypeError, "one of batch_attention, .*; got int$"),
        (fastbf.SharedClassifier(8, 3).loss, TypeError, "; got method$"),
        (torch.nn.Linear(2, 2), TypeError, "the name of a function, got Linear, which holds none of them$"),
        (
            network(fastbf.BatchFormer(8), fastbf.SharedClassifier(8, 3)),
            TypeError,
            r"got Sequential: ask for one of those that it holds, 1 \(BatchFormer\), 2 \(SharedClassifier\)$",
        ),
        (network(*map(fastbf.BatchFormer, [8] * 4)), TypeError, r"1 \(BatchFormer\), .*, 3 \(BatchFormer\), …$"),
        (
            network(torch.nn.TransformerEncoderLayer(8, 4)),
            TypeError,
            r"got Sequential: fastbf\.convert makes a BatchFormerLayer of an nn\.TransformerEncoderLayer$",
        ),
    ],
)
def test_what_cannot_be_explained(what, error, message):
    with pytest.raises(error, match=message):
        fastbf.explain(what)


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


@pytest.fixture
def auto_takes_the_interpreter(monkeypatch):
    """backend="auto" takes kernels on CPU tensors too, and forgets afterwards what failed."""
    obstacle = backend._obstacle
    monkeypatch.setattr(backend, "_obstacle", lambda *args, interpreter: obstacle(*args, interpreter=True))
    monkeypatch.setattr(backend, "_failed", {})


def _unbuildable(*_):
    raise BuildError("some_kernel: CompilationError: no such instruction")


CALLS = {
    "batch_attention": lambda x, **options: functional.batch_attention(*[x.unflatten(-1, (4, -1))] * 3, **options),
    "dropout_add_layer_norm": lambda x, residual=None, **options: functional.dropout_add_layer_norm(
        x, x if residual is None else residual, torch.ones(32, device=DEVICE), None, eps=1e-5, **options
    ),
    "linear_cross_entropy": lambda x, dropout_p, **options: functional.linear_cross_entropy(
        x, torch.eye(32, device=DEVICE), torch.arange(6, device=DEVICE), **options
    ),
    "activation_dropout": lambda x, **options: functional.activation_dropout(x, "relu", **options),
    "encoder_layer": lambda x, dropout_p, backend="auto": fastbf.BatchFormer(
        32, dropout=dropout_p, backend=backend, device=DEVICE
    )(x),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_kernel_that_cannot_be_built(op, auto_takes_the_interpreter, monkeypatch):
    """Warns once, with the reason, and computes what PyTorch computes."""
    x = torch.randn(6, 32, device=DEVICE)
    seed = torch.tensor([SEED], device=DEVICE)  # drawn for the kernels, and handed on
    monkeypatch.setattr(functional, "_as_seed", lambda *_: seed)
    torch.manual_seed(1)
    expected = CALLS[op](x, dropout_p=0.5, backend="torch")
    for module in (activation, add_norm, attention, cross_entropy):
        monkeypatch.setattr(module, "launch", _unbuildable)
    assert fastbf.explain(op, x.unflatten(-1, (4, -1)) if op == "batch_attention" else x).backend == "triton"
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=f"fastbf uses PyTorch: a Triton kernel of {op} .* no such instruction"):
        found = CALLS[op](x, dropout_p=0.5)
    torch.testing.assert_close(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS[op](x, dropout_p=0.5)
    with pytest.raises(ValueError, match="could not be built, some_kernel"):
        CALLS[op](x, dropout_p=0.5, backend="triton")


def test_a_backward_kernel_that_cannot_be_built(auto_takes_the_interpreter, monkeypatch):
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    y = CALLS["activation_dropout"](x, dropout_p=0.5)
    monkeypatch.setattr(activation, "launch", _unbuildable)
    with pytest.raises(RuntimeError, match=r"some_kernel: .* takes PyTorch for activation_dropout: run the step again"):
        y.sum().backward()
    CALLS["activation_dropout"](x, dropout_p=0.5).sum().backward()
    assert x.grad is not None


def test_an_explicit_triton_does_not_fall_back(monkeypatch):
    monkeypatch.setattr(activation, "launch", _unbuildable)
    with pytest.raises(BuildError, match="no such instruction"):
        CALLS["activation_dropout"](torch.randn(6, 32, device=DEVICE), dropout_p=0.5, backend="triton")


def test_what_a_compiler_raises_is_a_build_error():
    class Kernel(JITFunction):
        def __init__(self):
            self.fn = _unbuildable

        def warmup(self, *_, **__):
            raise RuntimeError("PassManager::run failed")

    with pytest.raises(BuildError, match="_unbuildable: RuntimeError: PassManager::run failed"):
        launch(Kernel(), 1, torch.device("cpu"), (), (), {})


def test_a_gpu_for_which_nothing_can_be_built(monkeypatch):
    def no_compiler(_):
        raise BuildError("write_one: RuntimeError: Failed to find C compiler")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(probe, "probe", no_compiler)
    device = torch.device("cuda", 7)
    with pytest.warns(RuntimeWarning, match="fastbf uses PyTorch: Triton cannot build .* Failed to find C compiler"):
        reason = backend._gpu_obstacle(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend._gpu_obstacle(device) == reason
    backend._tried.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "below 8.0" in backend._gpu_obstacle(device)
    backend._tried.cache_clear()


BROKEN = {
    "ImportError": "raise ImportError('version GLIBCXX_3.4.30 not found')",
    "OSError": "raise OSError('[WinError 126] DLL load failed')",
    "half of a package": "__version__ = '3.7.0'\ndef jit(f): return f\n__path__ = []",
    "no version": "__path__ = []",
    "an error of its own": "raise RuntimeError('half installed')",
}
OLDER = "triton 3.5.1+git1 is installed, and the kernels need 3.6 or newer."


@pytest.mark.parametrize("broken", [*BROKEN.values(), "__version__ = '3.5.1+git1'"], ids=[*BROKEN, "an older release"])
def test_a_triton_that_cannot_be_imported(broken, tmp_path):
    """Falls back with one warning, which names the cause; "triton" raises with it, and the command line says so."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken, encoding="utf-8")
    code = """
import warnings, torch, fastbf
from fastbf import backend
x = torch.randn(4, 8)
obstacle = backend._obstacle
backend._obstacle = lambda *args, interpreter: obstacle(*args, interpreter=True)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        fastbf.BatchFormer(8)(x)
        fastbf.functional.activation_dropout(x, "relu", dropout_p=0.0)
    print(len(seen), seen[0].message)
print(fastbf.explain("activation_dropout", x))
try:
    fastbf.functional.activation_dropout(x, "relu", dropout_p=0.0, backend="triton")
except ValueError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
    result = run("-c", code, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    warned, explained, refused = result.stdout.splitlines()
    cause = OLDER if "3.5" in broken else "triton is installed and cannot be imported: "
    assert warned.startswith(f"1 fastbf uses PyTorch: {cause}")
    assert explained.startswith(f"torch: {cause}")
    assert refused.startswith(f"backend='triton' cannot serve this call: {cause}")


@pytest.mark.parametrize("op", CALLS)
def test_a_second_derivative_is_refused(op):
    x = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(CALLS[op](x, dropout_p=0.0, backend="triton").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"kernels of {op} cannot be differentiated twice: use backend='torch'"):
        grad.square().sum().backward()


def test_make_graphed_on_cpu_is_the_callable():
    module = fastbf.BatchFormer(8)
    assert fastbf.make_graphed(module, (torch.randn(4, 8),)) is module
    with pytest.raises(ValueError, match="sample_args must hold at least one tensor"):
        fastbf.make_graphed(module, ())
    with pytest.raises(TypeError, match=r"sample_args\[1\] must be a torch\.Tensor, got int"):
        fastbf.make_graphed(module, (torch.randn(4, 8), 3))


def test_a_kernel_that_cannot_be_built_in_a_compiled_graph(monkeypatch):
    """The graph has no other way: the error says what to do."""
    compiled = torch.compile(lambda x: CALLS["activation_dropout"](x, dropout_p=0.0, backend="triton"), backend="eager")
    x = torch.randn(6, 32, device=DEVICE)
    compiled(x)
    monkeypatch.setattr(activation, "launch", _unbuildable)
    with pytest.raises(BuildError, match=r"no such instruction\. A compiled graph .* torch\.compiler\.reset\(\)"):
        compiled(x)
