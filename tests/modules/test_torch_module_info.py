"""PyTorch's generic module tests, in kind, on our modules: its ``ModuleInfo`` with its own inputs where it has them.

The torch backend runs in fp64 on all of them. The Triton backend runs in fp32 (interpreted where there is no GPU) on
those that its kernels cover, for which the inputs here are wider than PyTorch's.
"""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fastbf
from tests.triton_case import DEVICE

machinery = pytest.importorskip(
    "torch.testing._internal.common_modules", reason="this torch lacks the machinery of generic module tests"
)
FunctionInput, ModuleInfo, ModuleInput = machinery.FunctionInput, machinery.ModuleInfo, machinery.ModuleInput
noncontiguous_like = pytest.importorskip("torch.testing._internal.common_utils").noncontiguous_like


def of_layers(info, device, dtype, requires_grad, training):
    """As PyTorch's own, of widths that kernels take, and with dropout's rate 0, as there."""
    features = partial(torch.randn, device=device, dtype=dtype, requires_grad=requires_grad)
    options = [{}, {"norm_first": True}, {"batch_first": True}, {"activation": "gelu"}, {"bias": False}]
    return [
        ModuleInput(
            constructor_input=FunctionInput(16, 2, 24, 0.0, **option),
            forward_input=FunctionInput(features(*shape)),
            desc=f"{option}, {shape}",
        )
        for option, shape in zip(options, [(5, 16), (5, 3, 16), (3, 5, 16), (5, 3, 16), (33, 16)], strict=True)
    ]


def of_formers(info, device, dtype, requires_grad, training):
    features = partial(torch.randn, device=device, dtype=dtype, requires_grad=requires_grad)
    options = [
        ({}, (5, 32)),
        ({"batch_dim": 1, "norm_first": True}, (3, 5, 32)),
        ({"channel_dim": 1, "activation": "gelu"}, (5, 32, 2, 3)),
        ({"forked": True, "bias": False}, (4, 3, 32)),
        ({"num_layers": 2}, (3, 2, 32)),
    ]
    return [
        ModuleInput(
            constructor_input=FunctionInput(32, 4, None, 0.0, **option),
            forward_input=FunctionInput(features(*shape)),
            desc=f"{option}, {shape}",
        )
        for option, shape in options
    ]


#: Ours, and PyTorch's class of the same constructor, if there is one.
# Without dropout attention is PyTorch's own on CPU, which has no second derivative: theirs has none either.
once = partial(ModuleInfo, supports_gradgrad=False)
LAYER = once(fastbf.BatchFormerLayer, module_inputs_func=machinery.module_inputs_torch_nn_TransformerEncoderLayer)
WIDE_LAYER = once(fastbf.BatchFormerLayer, module_inputs_func=of_layers)
FORMER = once(fastbf.BatchFormer, module_inputs_func=of_formers, train_and_eval_differ=True)
CLASSIFIER = ModuleInfo(fastbf.SharedClassifier, module_inputs_func=machinery.module_inputs_torch_nn_Linear)
THEIRS = {fastbf.BatchFormerLayer: nn.TransformerEncoderLayer, fastbf.SharedClassifier: nn.Linear}


class Case:
    """A module with inputs, on a backend."""

    def __init__(self, info, backend, number):
        self.info, self.backend, self.number = info, backend, number
        self.dtype = torch.float64 if backend == "torch" else torch.float32
        self.device = torch.device("cpu") if backend == "torch" else DEVICE

    @property
    def input(self):
        torch.manual_seed(0)
        arguments = {"device": self.device, "dtype": self.dtype, "requires_grad": True, "training": True}
        return self.info.module_inputs_func(self.info, **arguments)[self.number]

    def make(self, cls=None, **options):
        """The module, or another class of the same constructor, always with the same weights."""
        torch.manual_seed(1)
        given = self.input.constructor_input
        ours = {} if cls else {"backend": self.backend}
        options = {"device": self.device, "dtype": self.dtype, **options}
        return (cls or self.info.module_cls)(*given.args, **given.kwargs, **ours, **options)

    def call(self, module, change=lambda x: x):
        """(result, the tensor that went in)."""
        given = self.input.forward_input
        args, kwargs = list(given.args), dict(given.kwargs)
        where, key = (args, 0) if args else (kwargs, "input")
        where[key] = change(where[key])
        return module(*args, **kwargs), where[key]

    def results(self, module, change=lambda x: x, grad=lambda g: g):
        """Result and gradients of the input and of all parameters."""
        out, x = self.call(module, change)
        torch.manual_seed(2)
        wanted = [x, *module.parameters()]
        given = grad(torch.randn_like(out, memory_format=torch.contiguous_format))
        grads = torch.autograd.grad(out, wanted, given) if out is not x else ()
        return [out.detach(), *grads]

    def __str__(self):
        return f"{self.info.module_cls.__name__}-{self.backend}-{self.number}"


def cases(*kinds):
    found = []
    for info, backend in kinds:
        whole = info.module_inputs_func(info, device="cpu", dtype=torch.float32, requires_grad=False, training=True)
        found += [Case(info, backend, number) for number in range(len(whole))]
    return pytest.mark.parametrize("case", found, ids=str)


ON_TORCH = ((LAYER, "torch"), (WIDE_LAYER, "torch"), (FORMER, "torch"), (CLASSIFIER, "torch"))
ON_TRITON = ((WIDE_LAYER, "triton"), (FORMER, "triton"), (CLASSIFIER, "triton"))
everything = cases(*ON_TORCH, *ON_TRITON)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)


@cases(*(kind for kind in (*ON_TORCH, *ON_TRITON) if kind[0] is not FORMER))
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_gradients_are_those_of_the_replaced_class(case, training):
    theirs = case.make(THEIRS[case.info.module_cls]).train(training)
    ours = case.make().train(training)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    found, expected = case.results(ours), case.results(theirs)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    assert found[0].stride() == expected[0].stride()


@everything
def test_construction_on_a_device_in_a_dtype(case):
    module = case.make(device=case.device, dtype=torch.float16)
    assert {(t.device.type, t.dtype) for t in module.parameters()} == {(case.device.type, torch.float16)}


@everything
def test_construction_on_the_meta_device_and_to_empty(case):
    module, whole = case.make(device="meta"), case.make()
    assert all(t.is_meta for t in module.parameters())
    module.to_empty(device=case.device).load_state_dict(whole.state_dict())
    for found, expected in zip(case.results(module), case.results(whole), strict=True):
        assert torch.equal(found, expected)


@cases(*ON_TORCH)
def test_first_and_second_derivatives(case):
    module = case.make()
    x = case.call(module)[1]
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        given = case.input.forward_input
        kwargs = {k: v for k, v in given.kwargs.items() if k != "input"}
        return torch.func.functional_call(module, state, (x, *given.args[1:]), kwargs)

    # Fast mode: random projections; every entry by itself would take minutes.
    assert gradcheck(function, (x, *parameters), fast_mode=True)
    if case.info.supports_gradgrad:
        assert gradgradcheck(function, (x, *parameters), fast_mode=True)


@cases(*(kind for kind in ON_TRITON if kind[0] is not CLASSIFIER))
def test_kernels_refuse_a_second_derivative(case):
    out, x = case.call(case.make())
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: use backend='torch'"):
        dx.sum().backward()


@everything
def test_inputs_and_incoming_gradients_that_are_not_contiguous(case):
    expected = case.results(case.make())
    module = case.make()

    def scattered(x):
        return noncontiguous_like(x) if x.dim() else x

    for change, grad in ((scattered, lambda g: g), (lambda x: x, scattered), (scattered, scattered)):
        for found, wanted in zip(case.results(module, change, grad), expected, strict=True):
            close(found, wanted)


@everything
def test_inputs_are_left_as_they_are(case):
    module = case.make()
    kept = {}

    def keep(x):
        kept.update(x=x, before=x.detach().clone(), version=x._version)
        return x

    case.results(module, keep)
    assert torch.equal(kept["x"], kept["before"])
    assert kept["x"]._version == kept["version"]


@everything
def test_pickle_and_state_dicts(case):
    module, file = case.make(), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = case.make()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(state)
    expected = case.results(module)
    for restored in (other, pickle.loads(pickle.dumps(module))):
        assert restored.state_dict().keys() == state.keys()
        assert all(torch.equal(a, b) for a, b in zip(case.results(restored), expected, strict=True))


@everything
def test_deepcopy(case):
    module = case.make()
    expected = case.results(module)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert all(torch.equal(a, b) for a, b in zip(case.results(copied), expected, strict=True))


@everything
def test_train_and_eval(case):
    module = case.make()
    assert all(m.training for m in module.modules())
    trained, x = case.call(module)
    evaluated, same = case.call(module.eval())
    assert not any(m.training for m in module.modules())
    if case.info.train_and_eval_differ:  # a BatchFormer: a fork, then the very input
        assert evaluated is same
        assert trained.numel() == (1 if module.forked else 2) * x.numel()
    else:  # dropout has rate 0
        close(evaluated, trained)


@everything
def test_repr_begins_with_the_class_and_shows_every_part(case):
    module = case.make()
    text = repr(module)
    assert text.startswith(f"{case.info.module_cls.__name__}(")
    assert all(f"({name}): " in text for name, _ in module.named_children())


ERRORS = [
    (lambda: fastbf.BatchFormerLayer(10, 3), ValueError, "nhead must divide d_model, got 3 for d_model=10"),
    (lambda: fastbf.BatchFormerLayer(8, 2, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
    (lambda: fastbf.BatchFormerLayer(8, 2, activation="tanh"), ValueError, "activation must be one of 'relu', 'gelu'"),
    (lambda: fastbf.BatchFormerLayer(8, 2)(torch.ones(3, 7)), ValueError, "src must have 8 channels"),
    (lambda: fastbf.BatchFormerLayer(8, 2)(torch.ones(8)), ValueError, "src must have 2 or 3 dimensions"),
    (lambda: fastbf.BatchFormerLayer(8, 2)(torch.ones(3, 8).long()), TypeError, "src must have a floating-point dtype"),
    (lambda: fastbf.BatchFormer(8, 3), ValueError, "num_heads must divide dim, got 3 for dim=8"),
    (lambda: fastbf.BatchFormer(8)(torch.ones(3, 7)), ValueError, "features must have 8 channels"),
    (lambda: fastbf.BatchFormer(8)(torch.ones(3, 8), torch.ones(4)), ValueError, "one entry for each of the 3 samples"),
    (lambda: fastbf.SharedClassifier(0, 3), ValueError, "in_features must be at least 1, got 0"),
    (lambda: fastbf.SharedClassifier(3, 4)(torch.ones(2, 5)), ValueError, "features must have 3 channels"),
    (lambda: fastbf.SharedClassifier(3, 4)([1.0]), TypeError, "features must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
