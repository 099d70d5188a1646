"""What is built when, by Triton's compiler and driver: all that a call and its backward launch, before either does."""

import itertools
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import JITFunction

import fastbf
from fastbf import functional, repeats
from fastbf.kernels import launch, probe

N, C, K = 48, 64, 10


@pytest.fixture
def modules(cuda):
    yield fastbf.BatchFormer(C, backend="triton"), fastbf.SharedClassifier(C, K, backend="triton")
    repeats.forget()


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


@pytest.mark.parametrize("call", ["layer", "loss"])
def test_what_a_plan_multiplies_is_not_counted(call, modules, cuda):
    former, x, y = fastbf.BatchFormer(C, norm_first=True, backend="triton"), features(), torch.arange(N) % K
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            former(x) if call == "layer" else modules[1].loss(x, y)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


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


def test_how_many_kernels_a_run_meets(modules, cuda):
    """Training, validation, another batch size, no statistics, a frozen backbone, the other 16 bits, and fp32.

    Each part builds what differs from those before. In a second pass nothing is built.
    """
    former, classifier = modules
    y, counts = torch.arange(N) % K, []

    def step(dtype=torch.bfloat16, stats=True, frozen=False, validate=False, n=N):
        x, target = torch.randn(n, C, requires_grad=not frozen), y[:n]
        with autocast(dtype is not None) if dtype is not torch.float16 else torch.autocast("cpu", torch.float16):
            if validate:
                with torch.no_grad():
                    classifier.loss(x, target, stats=True)
            else:
                loss = classifier.loss(former(x), target, stats=stats)
                (loss[0] if stats else loss).backward()

    parts = (
        {}, {"validate": True}, {"n": 40}, {"stats": False}, {"frozen": True}, {"dtype": torch.float16}, {"dtype": None}
    )  # fmt: skip
    for options in (*parts, *parts):
        before = cuda.loads
        step(**options)
        counts.append(cuda.loads - before)
    assert counts == [12, 1, 0, 1, 1, 11, 11, *[0] * len(parts)]
    assert cuda.loads == len(launch._compiled)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(C)
        self.former = fastbf.BatchFormer(C, backend="triton")
        self.classifier = fastbf.SharedClassifier(C, K, backend="triton")

    def forward(self, x, y):
        features = self.former(self.norm(x), y)
        return self.classifier.loss(*features) if self.training else self.classifier.loss(features[0], y)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_warm_up(amp, frozen, cuda):
    """Training and evaluation build nothing after it; the module, gradients and random numbers are as before."""
    net, x, y = Net(), torch.randn(N, C), torch.arange(N) % K
    net.norm.requires_grad_(not frozen)
    before, random = {name: t.clone() for name, t in net.state_dict().items()}, torch.get_rng_state()
    with autocast(amp):
        built = fastbf.warm_up(net.eval(), x, y)
    assert built == cuda.loads > 10
    assert cuda.launches() == []
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert not net.training
    assert all(p.grad is None for p in net.parameters())
    for _ in range(3):
        with autocast(amp):
            loss = net.train()(x, y)
        loss.backward()
        with torch.no_grad(), autocast(amp):
            net.eval()(x, y)
    assert cuda.loads == built == len(launch._compiled)
    with autocast(amp):
        assert fastbf.warm_up(net, x, y) == 0
    repeats.forget()


def test_warm_up_of_a_step(cuda):
    net, x, y = Net(), torch.randn(N, C), torch.arange(N) % K
    step = lambda net, x, y: {"loss": net.classifier.loss(net.former(x), y)}  # noqa: E731
    built = fastbf.warm_up(net, x, y, step=step)
    step(net.train(), x, y)["loss"].backward()
    assert cuda.loads == built
    repeats.forget()


def test_warm_up_raises_what_the_step_raises(cuda):
    net = Net()
    with pytest.raises(ValueError, match="target"):
        fastbf.warm_up(net, torch.randn(N, C), torch.arange(N - 1) % K)
    assert net.training
    assert launch._observers.plan is None


def test_misaligned_class_indices_build_nothing(modules, cuda):
    classifier, x, y = modules[1], features(), torch.arange(N + 1) % K
    classifier.loss(x, y[:-1]).backward()
    before = cuda.loads
    classifier.loss(x, y[1:]).backward()
    assert cuda.loads == before


def test_a_probe_is_launched_where_others_are_planned(cuda):
    with launch.planned() as plan:
        probe.probe(torch.device("cpu"))
        assert launch._observers.plan is not None
    assert plan == {}
    assert [line.split()[0] for line in cuda.launches()] == ["write_one"]


def test_after_calls_by_tapes(modules, cuda):
    """A call that a tape fits and cannot run, of an address that is no multiple of 16, builds ahead like the first."""
    former = fastbf.BatchFormer(C, norm_first=True, backend="triton")
    for _ in range(4):
        former(features()).sum().backward()
    x = torch.randn(N * C + 1)[1:].view(N, C).requires_grad_()
    before = cuda.loads
    out = former(x)
    of_forward = cuda.loads
    assert of_forward > before
    out.sum().backward()
    assert cuda.loads == of_forward
