"""Class counts and class weights outlive what happens to a module's parameters and buffers."""

import copy
import io
import pickle
from array import array
from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastbf

N, C, K = 12, 8, 5
COUNTS, WEIGHTS = [500, 200, 80, 30, 10], [0.1, 1, 2, 3, 0.3]


def made(**options):
    return fastbf.SharedClassifier(C, K, class_counts=COUNTS, class_weight=WEIGHTS, **options)


def batch(dtype=torch.float32):
    return torch.randn(N, C, dtype=dtype), torch.randint(0, K, (N,))


def expected(module, x, y, counts=COUNTS, weight=WEIGHTS):
    """In fp64, from the numbers as they were given."""
    bias = None if module.bias is None else module.bias.double()
    logits = F.linear(x.double(), module.weight.double(), bias) + torch.tensor(counts, dtype=torch.float64).log()
    return F.cross_entropy(logits, y, torch.tensor(weight, dtype=torch.float64))


def assert_right(module, dtype=torch.float32, tolerance=None):
    x, y = batch(dtype)
    tolerance = tolerance or {torch.float64: 1e-14, torch.float32: 1e-5}.get(dtype, 0.05)
    torch.testing.assert_close(module.loss(x, y).double(), expected(module, x, y), rtol=tolerance, atol=tolerance)


def filled(module):
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module


def loaded(module):
    module.load_state_dict(filled(fastbf.SharedClassifier(C, K)).state_dict(), assign=True)
    return module


def averaged(module):
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(filled(module))
    return average.module


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


EVENTS = {
    "to_empty": lambda m: filled(m.to("meta").to_empty(device="cpu")),
    "assigned": lambda m: loaded(m.to("meta")),
    "averaged with buffers": averaged,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "half and back": lambda m: m.half().float(),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("used", [False, True])
def test_they_survive(event, used):
    module = made()
    if used:
        assert_right(module)
    assert_right(event(module))
    assert not list(module.buffers())


def test_made_on_the_meta_device():
    with torch.device("meta"):
        module = made()
    assert module.log_prior.is_meta
    assert_right(filled(copy.deepcopy(module).to_empty(device="cpu")))
    assert_right(loaded(module))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_casts_lose_nothing(dtype):
    module = made().to(dtype)
    assert module.log_prior.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_right(module, dtype)
    assert torch.equal(made().double().class_weight, torch.tensor(WEIGHTS, dtype=torch.float64))
    assert torch.equal(made().double().log_prior, torch.tensor(COUNTS, dtype=torch.float64).log())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_both_backends(backend):
    assert_right(made(backend=backend))


def test_set_and_removed():
    module, (x, y) = made(), batch()
    prior = torch.randn(K)
    module.log_prior = prior
    torch.testing.assert_close(module.loss(x, y).double(), expected(module, x, y, prior.double().exp().tolist()))
    prior[2] = 7.0  # the tensor stays the caller's
    torch.testing.assert_close(module.loss(x, y).double(), expected(module, x, y, prior.double().exp().tolist()))
    module.log_prior = None
    assert module.log_prior is None
    torch.testing.assert_close(module.loss(x, y).double(), expected(module, x, y, [1] * K))
    module.class_weight = torch.ones(K, dtype=torch.float64)
    torch.testing.assert_close(module.loss(x, y).double(), expected(module, x, y, [1] * K, [1.0] * K))
    module.class_weight = None
    torch.testing.assert_close(module.loss(x, y), F.cross_entropy(module(x), y))
    with pytest.raises(ValueError, match=r"log_prior must have shape \(5,\)"):
        module.log_prior = torch.zeros(3)
    with pytest.raises(TypeError, match=r"class_weight must be a torch\.Tensor"):
        module.class_weight = [1.0] * K
    with pytest.raises(TypeError, match="log_prior cannot be a Parameter"):
        module.log_prior = torch.nn.Parameter(torch.zeros(K))


@pytest.mark.parametrize("then", [copy.deepcopy, lambda m: m.double().float(), lambda m: m.double()])
def test_what_is_written_in_place_stays(then):
    module = made()
    module.class_weight.copy_(torch.arange(1.0, K + 1))
    module.log_prior[3] = -torch.inf
    module = then(module)
    (x, y), dtype = batch(), module.weight.dtype
    y[y == 3] = 2
    found = module.loss(x.to(dtype), y)
    counts = [n if i != 3 else 0 for i, n in enumerate(COUNTS)]
    torch.testing.assert_close(found.double(), expected(module, x, y, counts, range(1, K + 1)), rtol=1e-5, atol=1e-5)


def test_a_prior_with_a_gradient():
    module, (x, y) = made(), batch()
    logits = torch.zeros(K, requires_grad=True)
    module.log_prior = logits * 2
    module.loss(x, y).backward()
    assert logits.grad.abs().min() > 0


def test_first_use_where_tensors_do_not_last():
    """Under inference mode, a transform and a compiler: later calls train."""
    for first in (torch.inference_mode(), torch.no_grad()):
        module, (x, y) = made(), batch()
        module = module.double().float()
        with first:
            module.loss(x, y)
        module.loss(x, y).backward()
    module = copy.deepcopy(made())
    names = dict(module.named_parameters())
    gradient = torch.func.grad(lambda p: torch.func.functional_call(Loss(module), p, batch()))
    gradient({f"classifier.{name}": p for name, p in names.items()})
    assert_right(module)


class Loss(torch.nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x, y):
        return self.classifier.loss(x, y)


@pytest.mark.parametrize("used", [False, True])
def test_compiled_as_one_graph(used):
    module, (x, y) = copy.deepcopy(made()), batch()
    if used:
        assert_right(module)
    compiled = torch.compile(Loss(module), fullgraph=True, backend="aot_eager")
    compiled(x, y).backward()
    torch.testing.assert_close(compiled(x, y), module.loss(x, y))
    module.log_prior = None
    torch.testing.assert_close(compiled(x, y), module.loss(x, y))
    module.double()
    torch.testing.assert_close(compiled(x.double(), y), module.loss(x.double(), y))


@pytest.mark.parametrize(
    "counts",
    [
        torch.tensor(COUNTS), numpy.array(COUNTS), numpy.array(COUNTS[::-1])[::-1], tuple(COUNTS), array("d", COUNTS),
        dict(enumerate(COUNTS)), [torch.tensor(n) for n in COUNTS], numpy.array(COUNTS, numpy.float32),
    ],
)  # fmt: skip
def test_what_counts_can_be(counts):
    module = fastbf.SharedClassifier(C, K, class_counts=counts, class_weight=(w for w in WEIGHTS))
    assert_right(module)


@pytest.mark.parametrize("name", ["class_counts", "class_weight"])
@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([1, 2, 3, 4, -5], ValueError, "must not be negative, got -5.0 for class 4"),
        ([1, float("nan"), 3, 4, 5], ValueError, "must be finite, got nan for class 1"),
        (torch.tensor([1, 2, torch.inf, 4, 5]), ValueError, "must be finite, got inf for class 2"),
        (set(range(5)), TypeError, "one for each class in order, got set"),
        ("12345", TypeError, "got str"),
        (list("12345"), TypeError, "got str for class 0"),
        (3, TypeError, "got int"),
        ([1, 2], ValueError, r"must have shape \(5,\), got \(2,\)"),
        (torch.ones(5, 1), ValueError, r"must have shape \(5,\), got \(5, 1\)"),
        (torch.ones(5, device="meta"), ValueError, "on the meta device"),
        (Counter(torch.tensor([0, 1])), TypeError, "count labels.tolist()"),
        (torch.ones(5).to_sparse(), TypeError, "layout torch.sparse_coo: give a dense one"),
        ([1, 2, 3, 4, 10**400], ValueError, "must be finite, got inf for class 4"),
        ([1, 2, 3, 4, 5j], TypeError, "got complex for class 4"),
    ],
)
def test_what_they_cannot_be(name, values, error, message):
    with pytest.raises(error, match=f"{name} .*{message}"):
        fastbf.SharedClassifier(C, K, **{name: values})


def test_counts_of_zero():
    with pytest.raises(ValueError, match="must not be 0 for every class"):
        fastbf.SharedClassifier(C, K, class_counts=[0] * K)
    with pytest.raises(ValueError, match="positive with label_smoothing, got 0 for class 1"):
        fastbf.SharedClassifier(C, K, class_counts=[1, 0, 1, 1, 1], label_smoothing=0.1)
    module, (x, y) = fastbf.SharedClassifier(C, K, class_counts=[1, 0, 1, 1, 1], ignore_index=1), batch()
    assert module.loss(x, y).isfinite()
    module.ignore_index = -100
    assert module.loss(x, y * 0).isfinite()
    with pytest.warns(RuntimeWarning, match="class_counts is 0 for class 1, which occurs in target") as warned:
        losses = [module.loss(x, y * 0 + 1) for _ in range(2)]
    assert all(loss.isinf() for loss in losses)
    assert len(warned) == 1
    with pytest.raises(ValueError, match="where targets are probabilities"):
        module.loss(x, F.one_hot(y, K).float())


def test_repr_shows_what_matters():
    many = fastbf.SharedClassifier(C, 100, class_counts=range(1, 101), scale=2.0, backend="torch", ignore_index=3)
    assert repr(many) == (
        "SharedClassifier(in_features=8, out_features=100, bias=True, class_counts=[1, 2, 3, …, 99, 100], "
        "ignore_index=3, scale=2.0, backend='torch')"
    )
    assert "class_weight=[0.1, 1, 2, 3, 0.3]" in repr(made())
    assert repr(fastbf.SharedClassifier(8, 3)) == "SharedClassifier(in_features=8, out_features=3, bias=True)"
    module = made()
    module.log_prior = torch.zeros(K)
    assert "log_prior=tensor of shape (5,)" in repr(module)
    assert "class_counts" not in repr(module)
    layer = fastbf.BatchFormerLayer(8, 2, 8, backend="torch")
    assert "backend='torch'" in repr(layer)
    assert "backend" not in repr(fastbf.BatchFormer(8))
    assert "backend='torch'" in repr(fastbf.BatchFormer(8, backend="torch"))
