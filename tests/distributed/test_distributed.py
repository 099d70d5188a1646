"""The batch across ranks, with gloo on CPUs: ranks together compute what one process does, or all of them raise."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbf
from fastbf.distributed import process_groups
from tests.distributed import across_ranks as work
from tests.distributed.ranks import Ranks
from tests.exact import assert_as_exact, doubled, results
from tests.triton_backend.test_encoder_layer import NAMES, formula

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.usefixtures("counter_based")]
BACKENDS = ("torch", "triton")
KINDS = ("gathered", "in parts")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Ranks by their number, started when first asked for."""
    started = {}

    def ranks(size):
        if size not in started or not started[size].alive:
            started[size] = Ranks(size, tmp_path_factory.mktemp(f"world{size}"))
        return started[size]

    yield ranks
    for world in started.values():
        if world.alive:
            world.stop()


def whole(parts, streams=1):
    """The ranks' results, of one stream or of two, as one process would hold them."""
    if streams == 1:
        return torch.cat(parts)
    return torch.cat([torch.cat(half) for half in zip(*(part.chunk(2) for part in parts), strict=True)])


V1 = ((), 32, 24)  # positions, channels, feed-forward
V2 = ((3,), 16, 16)
LAYERS = [
    # sizes of the ranks' batches, shape, dtype, position-major, fork, options
    ((5,), V1, "float32", False, "x", {"dropout_p": 0.5}),
    ((4, 4), V1, "float32", False, "", {"dropout_p": 0.5}),
    ((4, 4), V2, "float32", False, "x", {"dropout_p": 0.1}),
    ((5, 2), V2, "float32", True, "input", {"dropout_p": 0.5}),
    ((40, 40), V1, "float32", False, "x", {"dropout_p": 0.1, "norm_first": True, "activation": "gelu"}),
    ((3, 0), V1, "float32", False, "x", {"dropout_p": 0.5}),
    ((3, 3, 3), V2, "float16", True, "", {"dropout_p": 0.5}),
    ((0, 7, 2), V2, "float32", False, "input", {"dropout_p": 0.5}),
    ((2, 2, 2, 2), V2, "float32", True, "x", {"dropout_p": 0.5, "norm_first": True}),
    ((9, 33, 0, 1), V1, "float32", False, "", {"dropout_p": 0.0}),
    ((128, 100, 128), V1, "float32", False, "x", {"dropout_p": 0.5}),
    ((40, 0, 50), V2, "float32", True, "x", {"dropout_p": 0.1}),
    ((128, 128), V1, "float16", False, "", {"dropout_p": 0.1}),
    ((150, 0, 3, 140), V1, "float32", False, "", {"dropout_p": 0.1, "norm_first": True}),
]


def layers():
    """Every layer in every way, but for large batches on kernels at once, which take Triton's interpreter long."""
    for case, kind, backend in itertools.product(LAYERS, KINDS, BACKENDS):
        if sum(case[0]) < 200 or backend == "torch" or kind == "in parts":
            name = f"{case[0]}-{case[2]}-{case[4] or 'plain'}-{kind}-{backend}"
            yield pytest.param(case, kind, backend, id=name)


@pytest.mark.parametrize(("case", "kind", "backend"), list(layers()))
def test_layer_is_that_of_one_process(worlds, case, kind, backend):
    """Outputs and all gradients, with the dropout decisions of one process, against fp64."""
    sizes, (positions, channels, width), dtype, position_major, fork, options = case
    shape = positions, channels, width, getattr(torch, dtype), position_major
    call = {"num_heads": 2, "eps": 1e-5, "activation": "relu", "norm_first": False} | options
    found = worlds(len(sizes)).run(work.layer, sizes, shape, backend, kind, fork, call)

    x, tensors, grad = work.layer_inputs(sum(sizes), *shape, fork=fork)
    mathematics = {"heads": 2, "p": call["dropout_p"], "fork": fork}
    mathematics |= {name: call[name] for name in ("activation", "norm_first")}
    given = [x, *tensors]
    exact = results(lambda *t: formula(*t, **mathematics), doubled(given), grad.double())
    eager = results(lambda *t: formula(*t, **mathematics), given, grad)
    outs, xs, *weights = zip(*found, strict=True)
    summed = [sum(w.double() for w in parts).to(parts[0].dtype) for parts in weights]
    ours = [whole(outs, 2 if fork else 1), whole(xs, 2 if fork == "input" else 1), *summed]
    assert_as_exact(ours, eager, exact, 2 * torch.finfo(x.dtype).eps, NAMES)


def test_the_same_bits_every_time(worlds):
    call = {"num_heads": 2, "dropout_p": 0.5}
    for kind in KINDS:
        runs = [
            worlds(3).run(work.layer, (128, 100, 128), (*V1, torch.float32), "torch", kind, "x", call) for _ in range(2)
        ]
        for a, b in zip(*(itertools.chain(*run) for run in runs), strict=True):
            assert torch.equal(a, b)


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    for gradients in found:
        assert gradients.keys() == expected.keys()
        for name, g in gradients.items():
            torch.testing.assert_close(g, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


STEPS = [
    # sizes, positions, backend, kind, options
    ((6,), (), "torch", "gathered", {}),
    ((4, 4), (), "torch", "gathered", {"layers": 2}),
    ((4, 4), (3,), "triton", "gathered", {"layers": 2}),
    ((3, 3, 3), (2,), "torch", "in parts", {"layers": 2, "checkpointed": True}),
    ((3, 3), (), "triton", "gathered", {"layers": 2, "checkpointed": True}),
    ((2, 2, 2, 2), (), "triton", "in parts", {}),
    ((4, 4), (), "torch", "gathered", {"steps": 3}),
    ((5, 2), (), "torch", "gathered", {"layers": 2}),
    ((5, 0, 2), (), "triton", "gathered", {"layers": 2, "checkpointed": True}),
    ((5, 0), (3,), "torch", "in parts", {"steps": 2}),
    ((5, 0), (3,), "triton", "in parts", {"layers": 2, "checkpointed": "reentrant"}),
    ((4, 3), (), "torch", "gathered", {"layers": 2, "checkpointed": "reentrant"}),
    ((4, 4), (3,), "torch", "in parts", {"compiled": "eager", "checkpointed": True}),
    ((3, 3), (), "triton", "gathered", {"compiled": "eager", "checkpointed": True}),
    ((4, 4), (), "torch", "gathered", {"compiled": "eager", "layers": 2}),
    ((4, 4), (3,), "triton", "gathered", {"compiled": "eager", "layers": 2}),
    ((130, 130), (), "triton", "in parts", {"compiled": "eager"}),
]


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_step_under_data_parallel(worlds, case):
    """BatchFormer and the shared classifier: every rank's averaged gradients are those of one process."""
    sizes, positions, backend, kind, options = case
    found = worlds(len(sizes)).run(work.data_parallel, sizes, positions, backend, kind, options)
    net = work.Loss(work.models("torch", layers=options.get("layers", 1)))
    assert_same(found, work.step(net, sum(sizes), positions, options.get("steps", 1)))


@pytest.mark.slow
def test_step_compiled_by_inductor(worlds):
    found = worlds(2).run(work.data_parallel, (4, 4), (3,), "torch", "gathered", {"compiled": "inductor", "layers": 2})
    assert_same(found, work.step(work.Loss(work.models("torch", layers=2)), 8, (3,)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_for_any_length(worlds, backend):
    for of_rank in worlds(2).run(work.compiled_lengths, (3, 5, 40), backend):
        for compiled, eager in of_rank:
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_one_process_is_not_what_ranks_compute_alone(worlds):
    """The comparison above would notice a group that is not used."""
    expected = work.step(work.Loss(work.models("torch")), 8)
    alone = work.step(work.Loss(work.models("torch")), 4)
    with pytest.raises(AssertionError):
        assert_same([alone], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("where", "sizes", "steps"), [("whole", (4, 4), 1), ("layers", (4, 4), 2), ("layers", (5, 3), 1)]
)
def test_fsdp2(worlds, where, sizes, steps, backend):
    found = worlds(2).run(work.sharded, sizes, where, backend, steps)
    assert_same(found, work.step(work.Loss(work.models("torch")), 8, steps=steps))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_gradient_alone(worlds, kind, backend):
    """Ranks send gradients back, or do not, whichever are wanted."""
    for norm_first in (False, True):
        call = {"num_heads": 2, "dropout_p": 0.5, "norm_first": norm_first}
        for same in worlds(2).run(work.some_gradients, (4, 3), (*V2, torch.float32), backend, kind, call):
            assert all(same), [name for name, good in zip(NAMES[1:], same, strict=True) if not good]


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.bfloat16), ("triton", torch.float16)])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(worlds, kind, backend, dtype):
    """As exact as one process under autocast."""
    found = worlds(2).run(work.data_parallel, (4, 4), (3,), backend, kind, {"autocast": dtype})[0]
    exact = work.step(work.Loss(work.models("torch")).double(), 8, (3,))
    eager = work.step(work.Loss(work.models("torch")), 8, (3,), autocast=dtype)
    assert_as_exact(*([g[name] for name in exact] for g in (found, eager, exact)), torch.finfo(dtype).eps, list(exact))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(4, 4), (5, 0, 2)])
def test_evaluation(worlds, sizes, backend):
    """``mix``, the bare layer and ``attention_map`` see all ranks; the module stays the identity."""
    found = worlds(len(sizes)).run(work.mixed_in_evaluation, sizes, backend)
    former = work.models("torch")["former"].eval()
    x, _ = work.batch(sum(sizes))
    mixed, layer, maps, same = (list(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(torch.cat(mixed), former.mix(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(layer), former.layers[0](x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(maps, dim=-2), former.attention_map(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat(same), x)


@pytest.mark.parametrize("learn_keys", [True, False])
@pytest.mark.parametrize("sizes", [(6,), (3, 3), (4, 0, 3)])
def test_contrastive_loss(worlds, sizes, learn_keys):
    """The gradient's scale is that of one process, whether keys learn or not."""
    total = sum(sizes)
    torch.manual_seed(5)
    encoder = nn.Linear(16, 16)
    x, _ = work.batch(total)
    keys = F.normalize(encoder(x * 2), dim=1)
    keys = keys if learn_keys else keys.detach()
    F.cross_entropy(F.normalize(encoder(x), dim=1) @ keys.T * 5, torch.arange(total)).backward()
    for all_keys, grads in worlds(len(sizes)).run(work.contrastive, sizes, learn_keys):
        torch.testing.assert_close(all_keys, keys)
        torch.testing.assert_close(grads, [p.grad for p in encoder.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 2), (0, 3, 1)])
def test_gather(worlds, sizes, dtype):
    found = worlds(len(sizes)).run(work.gathered, sizes, dtype)
    for i, shape in enumerate(((), (3,), (2, 3))):
        torch.manual_seed(6)
        x = torch.randn(sum(sizes), *shape).to(dtype)
        # Every rank's gradient is a sample's place, times rank + 1.
        expected = (torch.arange(x.numel()).view(x.shape) * sum(range(1, len(sizes) + 1))).to(dtype)
        for rank, results_of_rank in enumerate(found):
            out, first, grad = results_of_rank[i]
            assert torch.equal(out, x)
            assert first == sum(sizes[:rank])
            assert torch.equal(grad, expected.split(list(sizes))[rank])


def test_hosts_have_a_group_of_their_own_where_tensors_are_on_gpus(worlds):
    for found, apart in worlds(3).run(work.hosts_apart, (2, 0, 3)):
        assert apart
        assert all(torch.equal(x, torch.arange(5.0)) for x in found)


def test_gather_of_one_process():
    x = torch.randn(3, 2)
    out, first = fastbf.distributed.gather(x, None)
    assert out is x
    assert first == 0


ERRORS = {
    "positions": ("ValueError", "the same call, got shape [(2, 16), (3, 16), (3, 16)] on ranks 0 to 2 with [4, 4, 4]"),
    "order of dimensions": ("ValueError", "got shape [(2, 3), (3, 2), (3, 2)] on ranks 0 to 2"),
    "dropout": ("ValueError", "got dropout [32768, 16384, 16384]"),
    "backward": ("ValueError", "got backward [False, True, True]"),
    "call": ("ValueError", "got call ['encoder_layer', 'gather', 'gather']"),
    "dtype": ("ValueError", "got dtype [torch.float32, torch.float64, torch.float64]"),
    "none, compiled": ("ValueError", "every rank must have as many samples as the others, got [0, 4, 4]"),
    "none, gathered and compiled": ("ValueError", "as many samples as the others, got [0, 4, 4]"),
    "ragged, compiled": ("ValueError", "every rank must have as many samples as the others, got [3, 4, 4]"),
    "sharded inside": ("ValueError", "cannot serve this call: a module inside the layer"),
    "mask": ("ValueError", "a layer with a process_group cannot serve this call: the call has an attention mask."),
    "activation": ("ValueError", "cannot serve this call: the activation is neither relu nor exact gelu."),
    "twice, gathered": ("RuntimeError", "what was gathered from other ranks cannot be differentiated twice"),
    "twice, in parts": ("RuntimeError", "attention across ranks cannot be differentiated twice"),
    "foreign name": ("ValueError", "this process has no process_group named 'x'"),
    "no way for hosts": ("ValueError", "process_group must carry CPU tensors as well"),
    "not a member": ("ValueError", "process_group must be a group of which this process is a member"),
}


@pytest.mark.parametrize("call", ERRORS)
def test_every_rank_raises_the_same(worlds, call):
    for found in worlds(3).run(work.refused, call):
        kind, text = ERRORS[call]
        assert found is not None
        assert found[0].endswith(kind) or kind in found[1], found
        assert text in found[1]


def test_ranks_can_go_on_after_an_error(worlds):
    worlds(3).run(work.refused, "positions")
    assert_same(worlds(3).run(work.data_parallel, (2, 2, 2), (), "torch", "gathered", {}), one_step(6))


def one_step(samples):
    return work.step(work.Loss(work.models("torch")), samples)


def test_a_cuda_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph"):
        process_groups._exchange("group", 3, [0], process_groups.KNOWN)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(3, 3), (130, 3)], ids=str)
def test_a_kernel_that_one_rank_cannot_build(sizes, kind, worlds):
    """All ranks raise before a tensor is sent, and do so until it can be built; then they agree once."""
    expected = "RuntimeError: rank 1 of process_group failed", "BuildError: backward_query: refused"
    for error, (raised, sent, agreements) in zip(expected, worlds(2).run(work.unbuilt, sizes, kind), strict=True):
        assert [text[: len(error)] for text in raised] == [error] * 2
        assert (sent, agreements) == (0, [1, 1])


def test_a_call_that_one_rank_compiles(worlds):
    """A compiled rank agrees on nothing, so none does; the first call that none compiles is agreed on."""
    assert worlds(2).run(work.compiled_on_one) == [[0, 0, 1, 1]] * 2


def test_kernels_of_another_dtype_are_agreed_on(worlds):
    """Autocast is part of what a rank remembers of its calls."""
    assert worlds(2).run(work.agreed_by_dtype) == [[1, 2, 3]] * 2


def test_operators(worlds):
    worlds(2).run(work.checked_operators)


def test_copies_and_pickles_keep_the_group(worlds):
    assert worlds(2).run(work.copied) == [[True, True]] * 2


def test_groups_within_the_world(worlds):
    sizes = (3, 2, 1, 4)
    found = worlds(4).run(work.subgroups, sizes)
    former = work.models("torch", dropout=0.0)["former"]
    x, _ = work.batch(sum(sizes))
    torch.testing.assert_close(torch.cat(found[:2]), former.mix(x[:5]))
    torch.testing.assert_close(torch.cat(found[2:]), former.mix(x[5:]))


def test_one_meeting_a_layer(worlds):
    """Two layers, forward and once more by checkpointing: four messages a step, none in backward itself."""
    assert worlds(2).run(work.meetings, 2) == [8, 8]


@pytest.mark.parametrize("shape", [(2048, 16), (2, 1500, 16)])
def test_memory(worlds, shape):
    """Gathered it grows with the whole batch's keys, in parts with a rank's own; never with N × N."""
    one = 4 * torch.Size(shape).numel()
    peaks = {(ranks, kind): max(worlds(ranks).run(work.peak_memory, shape, kind)) for ranks in (3, 4) for kind in KINDS}
    more = peaks[4, "gathered"] - peaks[3, "gathered"]  # a rank's k, v and their gradients
    assert 2 * one <= more <= 8 * one
    assert peaks[4, "in parts"] - peaks[3, "in parts"] <= one / 4
    assert peaks[4, "in parts"] < peaks[4, "gathered"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_example(ranks):
    """As a user runs it: local attention differs from one process, global attention does not."""
    example = Path(__file__).parents[2] / "examples" / "distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    result = subprocess.run(
        [*command, example, "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if not line.startswith("[Gloo]")]  # of older releases
    rows = [line.split("]")[1].split() for line in lines if "]" in line]
    assert [row[1] for row in rows] == ["local", "global"] * 3
    for _, attention, *differences in rows:
        equal = attention == "global" or ranks == 1
        assert all((float(d) < 1e-5) == equal for d in differences)
    assert "global attention" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("registered", [False, True])
def test_a_classifiers_loss_under_fsdp2(worlds, size, hooked, registered):
    """Registered as a method that FSDP gathers the weight for, or not; with hooks of the user's, or without."""
    for loss, gradient, reason in worlds(size).run(work.sharded_classifier, hooked, registered):
        assert loss < 1e-6
        assert gradient < 1e-6
        assert (reason is None) == (registered and not hooked)


def test_a_default_device(worlds):
    for found, expected in worlds(2).run(work.under_a_default_device, (3, 4)):
        assert torch.equal(found, expected)
