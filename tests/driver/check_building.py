"""What is built when, by Triton's compiler and driver: all that a call and its backward launch, before either does."""

import itertools
import threading

import pytest
import torch
from triton.runtime import JITFunction

import fastbf
from fastbf import functional
from fastbf.kernels import launch
from fastbf.triton_backend import tape

N, C, K = 48, 64, 10


@pytest.fixture
def modules(cuda):
    yield fastbf.BatchFormer(C, backend="triton"), fastbf.SharedClassifier(C, K, backend="triton")
    tape.forget()


def features(n=N, *positions, dtype=torch.float32):
    return torch.randn(n, *positions, C, dtype=dtype, requires_grad=True)


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("amp", [False, True])
def test_forward_builds_what_backward_needs(amp, modules, cuda):
    former, classifier = modules
    with autocast(amp):
        fork = former(features())
        of_layer = cuda.loads
        fork = former(features())
        assert cuda.loads == of_layer
        loss = classifier.loss(fork, torch.arange(N) % K)
    before = cuda.loads
    loss.backward()
    assert cuda.loads == before == len(launch._compiled)
    launched = {line.split()[0] for line in cuda.launches()}
    assert {"backward_query", "activation_backward", "cross_entropy_backward"} <= launched


@pytest.mark.parametrize("call", ["batch_attention", "dropout_add_layer_norm", "activation_dropout"])
def test_of_functions(call, modules, cuda):
    x = features()
    given = {
        "batch_attention": lambda: functional.batch_attention(*[x.view(N, 4, -1)] * 3, dropout_p=0.5, backend="triton"),
        "dropout_add_layer_norm": lambda: functional.dropout_add_layer_norm(
            x, x, torch.ones(C), None, dropout_p=0.5, eps=1e-5, backend="triton"
        ),
        "activation_dropout": lambda: functional.activation_dropout(x, "gelu", dropout_p=0.5, backend="triton"),
    }
    out = given[call]()
    before = cuda.loads
    out.sum().backward()
    assert cuda.loads == before == len(launch._compiled) == len({line.split()[0] for line in cuda.launches()})


def test_without_gradients_only_forward_is_built(modules, cuda):
    with torch.no_grad():
        modules[0](features())
    assert len(launch._compiled) == cuda.loads == 4
    assert not any("backward" in line for line in cuda.launches())


def test_side_by_side(modules, monkeypatch):
    """Kernels are compiled in several threads: the first two wait for each other here."""
    meeting, compile_, begun = threading.Barrier(2, timeout=60), launch._compile, itertools.count()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(launch, "_compile", lambda job: (next(begun) < 2 and meeting.wait(), compile_(job)))
    modules[0](features())
    assert next(begun) > 2


def test_a_launch_that_is_planned_is_not_made(modules, cuda):
    x = torch.ones(64, 32)
    with launch.planned() as plan:
        functional.activation_dropout(x, "relu", dropout_p=0.0, backend="triton")
    assert [job.kernel.fn.__name__ for job in plan.values()] == ["activation_forward"]
    assert (cuda.loads, cuda.launches()) == (0, [])
    launch.build(plan)
    assert (cuda.loads, cuda.launches()) == (1, [])
    functional.activation_dropout(x, "relu", dropout_p=0.0, backend="triton")
    assert (cuda.loads, len(cuda.launches())) == (1, 1)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_kernel_of_backward_that_is_refused_fails_in_forward(backend, modules, cuda, monkeypatch):
    warmup = JITFunction.warmup

    def refuse(self, *args, **options):
        if self.fn.__name__ == "backward_query":
            raise RuntimeError("PassManager::run failed")
        return warmup(self, *args, **options)

    monkeypatch.setattr(JITFunction, "warmup", refuse)
    monkeypatch.setattr("fastbf.backend._failed", {})
    obstacle = fastbf.backend._obstacle
    monkeypatch.setattr(fastbf.backend, "_obstacle", lambda *args, interpreter: obstacle(*args, interpreter=True))
    former, x = fastbf.BatchFormer(C, backend=backend), features()
    if backend == "triton":
        with pytest.raises(launch.BuildError, match="backward_query"):
            former(x)
    else:
        with pytest.warns(RuntimeWarning, match="could not be built, backward_query"):
            former(x).sum().backward()
        assert x.grad is not None
    assert not any(line.startswith("forward") for line in cuda.launches())


def test_misaligned_tensors_are_planned_as_such(modules, cuda):
    """Addresses are known of tensors that are parts of others."""
    x = torch.randn(N * C + 1)[1:].view(N, C).requires_grad_()
    out = functional.activation_dropout(x, "gelu", dropout_p=0.5, backend="triton")
    before = cuda.loads
    out.sum().backward()
    assert cuda.loads == before == len(launch._compiled) == 2


#: Kernels that a training step of a BatchFormer and a classifier meets (docs/backends.md).
VARIANTS = {
    "fp32": (12, {}),
    "autocast": (12, {"amp": True}),
    "16 bits": (12, {"dtype": torch.float16}),
    "packed": (11, {"positions": (3,), "n": 8}),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_how_many_kernels_a_step_meets(case, modules, cuda):
    count, options = VARIANTS[case]
    amp, dtype = options.pop("amp", False), options.pop("dtype", torch.float32)
    n, positions = options.get("n", N), options.get("positions", ())
    former, classifier = (m.to(dtype) for m in modules)
    for _ in range(3):
        with autocast(amp):
            fork = former(features(n, *positions, dtype=dtype))
            classifier.loss(fork, (torch.arange(n) % K).view(n, *[1] * len(positions)).expand(n, *positions)).backward()
    assert len(launch._compiled) == cuda.loads == count
