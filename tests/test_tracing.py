"""Tracers, transforms and batched gradients: what they allow of PyTorch's own modules they allow of ours."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastbf
from fastbf.functional import linear_cross_entropy

C, K = 8, 5


class Net(nn.Module):
    """A training step, or with ``loss=False`` a prediction."""

    def __init__(self, loss=True, dropout=0.0):
        super().__init__()
        self.backbone, self.former = nn.Linear(C, C), fastbf.BatchFormer(C, 1, dropout=dropout)
        self.layer, self.classifier = nn.TransformerEncoderLayer(C, 1, C, dropout), fastbf.SharedClassifier(C, K)
        self.loss = loss

    def forward(self, x, y=None):
        features = self.former(self.layer(self.backbone(x)))
        return self.classifier.loss(features, y) if self.loss else self.classifier(features)


def batch(n=4, *more):
    return torch.randn(*more, n, C), torch.randint(0, K, (*more, n))


def plain_loss(x, weight, y, **options):
    return F.cross_entropy(F.linear(x, weight), y, **options)


class TestClassIndices:
    """They are looked at only where they have values."""

    def test_vmap(self):
        (x, y), weight = batch(4, 6), torch.randn(K, C)
        for function in (
            lambda f: vmap(grad(lambda w, x, y: f(x, w, y)), (None, 0, 0))(weight, x, y),
            lambda f: vmap(lambda y: f(x[0], weight, y))(y),
            lambda f: jvp(lambda w: f(x[0], w, y[0]), (weight,), (torch.ones_like(weight),)),
        ):
            torch.testing.assert_close(function(linear_cross_entropy), function(plain_loss))

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    def test_make_fx(self, mode):
        (x, y), weight = batch(), torch.randn(K, C)
        graph = make_fx(lambda x, weight, y: linear_cross_entropy(x, weight, y), tracing_mode=mode)(x, weight, y)
        torch.testing.assert_close(graph(x, weight, y), plain_loss(x, weight, y))

    def test_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            loss = Net()(*batch())
            loss.backward()
            assert loss.shape == ()

    def test_jit_trace(self):
        net = Net()
        traced = torch.jit.trace(net, batch(), check_trace=False)
        x, y = batch()
        torch.testing.assert_close(traced(x, y), net(x, y))


class TestExport:
    @pytest.mark.parametrize("strict", [True, False])
    def test_a_step_of_any_batch(self, strict):
        n, net = torch.export.Dim("n"), Net()
        program = torch.export.export(net, batch(6), dynamic_shapes=({0: n}, {0: n}), strict=strict)
        x, y = batch(9)
        torch.testing.assert_close(program.module()(x, y), net(x, y))


class TestSymbolicTrace:
    """As modules of torch, ours are leaves."""

    @pytest.mark.parametrize("convert", [True, False])
    @pytest.mark.parametrize("train", [True, False])
    def test_a_whole_model(self, train, convert):
        net = Net(loss=False).train(train)
        if convert:
            fastbf.convert(net)
        graph, (x, _) = torch.fx.symbolic_trace(net), batch()
        assert torch.equal(graph(x), net(x))
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"].count("classifier") == 1
        assert {"layer", "former"} & {node.target for node in graph.graph.nodes if train or convert} or not train

    @pytest.mark.parametrize("options", [{}, {"class_counts": range(1, K + 1)}], ids=str)
    @pytest.mark.parametrize("stats", [True, False])
    def test_a_loss_in_the_model(self, stats, options):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.ModuleDict({"classifier": fastbf.SharedClassifier(C, K, **options)})

            def forward(self, x, y):
                loss = self.head["classifier"].loss(2 * x, target=y, stats=stats)
                return (loss[0], loss[1].accuracy) if stats else loss

        model, (x, y) = Model(), batch()
        graph = torch.fx.symbolic_trace(model)
        graph.graph.lint()
        torch.testing.assert_close(graph(x, y), model(x, y), rtol=0, atol=0)
        assert "head.classifier" in {node.target for node in graph.graph.nodes if node.op == "get_attr"}

    def test_a_classifier_itself(self):
        """The module that is traced is no leaf, as an ``nn.Linear`` is none then."""
        classifier = fastbf.SharedClassifier(C, K, scale=2.0)
        graph, (x, _) = torch.fx.symbolic_trace(classifier), batch()
        assert torch.equal(graph(x), classifier(x))

    @pytest.mark.parametrize("kind", ["layer", "former", "classifier"])
    @pytest.mark.parametrize("edit", ["hook", "pre_hook", "patch", "subclass"])
    def test_what_surrounds_a_forward_acts_once(self, edit, kind):
        net, (x, _) = Net(loss=False), batch()
        fastbf.convert(net)
        part = getattr(net, kind)
        forward, cls = part.forward, type(part)
        if edit == "hook":
            part.register_forward_hook(lambda module, args, out: out * 3)
        elif edit == "pre_hook":
            part.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        elif edit == "patch":
            part.forward = lambda x, *args, **kwargs: forward(x * 3)
        else:
            method = {"forward": lambda self, x, *args, **kwargs: cls.forward(self, x * 3)}
            part.__class__ = type("Sub", (cls,), method)
        torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), net(x))

    @pytest.mark.parametrize("patch", [True, False])
    def test_other_methods(self, patch):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.former, self.classifier = fastbf.BatchFormer(C, 1, dropout=0.0), fastbf.SharedClassifier(C, K)

            def forward(self, x, y):
                return self.classifier.loss(self.former.mix(x), y)

        model, (x, y) = Model(), batch()
        if patch:
            mix, loss = model.former.mix, model.classifier.loss
            model.former.mix = lambda x: mix(x * 3)
            model.classifier.loss = lambda x, y: loss(x * 3, y)
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, y), model(x, y))

    def test_a_graph_of_evaluation_can_be_trained(self):
        net, (x, _) = Net(loss=False).eval(), batch()
        graph = torch.fx.symbolic_trace(net)
        assert graph.train()(x).shape == net.train()(x).shape

    def test_a_stripped_model(self):
        net = fastbf.strip(Net(loss=False).eval())
        graph, (x, _) = torch.fx.symbolic_trace(net), batch()
        assert torch.equal(graph(x), net(x))


class TestRandomness:
    @pytest.mark.parametrize("randomness", ["different", "same"])
    def test_vmap(self, randomness):
        net, (x, y) = Net(dropout=0.5), batch(4, 3)
        parameters = dict(net.named_parameters())
        x, y = x[:1].expand(3, -1, -1), y[:1].expand(3, -1)
        losses = vmap(lambda x, y: functional_call(net, parameters, (x, y)), randomness=randomness)(x, y)
        assert (len(losses.unique()) == 1) == (randomness == "same")


class TestBatchedGradients:
    """``is_grads_batched`` and ``jacobian(vectorize=True)``, where backward is a Function's."""

    @staticmethod
    def assert_batched(out, inputs):
        grads = torch.randn(3, *out.shape)
        found = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
        each = [torch.autograd.grad(out, inputs, g, retain_graph=True) for g in grads]
        for i, of_input in enumerate(found):
            torch.testing.assert_close(of_input, torch.stack([g[i] for g in each]), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize(("n", "classes"), [(4, K), (700, 1000)])
    def test_loss(self, n, classes):
        x, weight = torch.randn(n, C, requires_grad=True), torch.randn(classes, C, requires_grad=True)
        y = torch.randint(0, classes, (n,))
        self.assert_batched(linear_cross_entropy(x, weight, y, reduction="none"), [x, weight])

    @pytest.mark.parametrize("n", [4, 600])
    def test_layer(self, n):
        layer, x = fastbf.BatchFormerLayer(C, 1, C, 0.5, backend="torch"), torch.randn(n, C, requires_grad=True)
        self.assert_batched(layer(x), [x, layer.linear1.weight])

    def test_jacobian(self):
        layer, x = fastbf.BatchFormerLayer(C, 1, C, 0.5), torch.randn(3, C)

        def call(x):
            torch.manual_seed(0)
            return layer(x)

        jacobian = torch.autograd.functional.jacobian
        torch.testing.assert_close(jacobian(call, x, vectorize=True), jacobian(call, x))


@pytest.mark.parametrize(("n", "classes"), [(4, K), (128, 1000), (700, 1000)])
def test_forward_mode_of_a_loss(n, classes):
    x, y = torch.randn(n, 512), torch.randint(0, classes, (n,))
    weight, tangent = torch.randn(classes, 512), torch.randn(classes, 512)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        found, expected = (forward_ad.unpack_dual(f(x, dual, y)) for f in (linear_cross_entropy, plain_loss))
        torch.testing.assert_close(found.primal, expected.primal)
        torch.testing.assert_close(found.tangent, expected.tangent, atol=1e-4, rtol=1e-4)


class TestStripOfCompiled:
    """Nothing that forks is left, in a graph either."""

    @pytest.mark.parametrize("where", ["itself", "inside", "around", "in place"])
    def test(self, where):
        former = fastbf.BatchFormer(C, 1)
        if where == "in place":
            former.compile(backend="eager")
        model = torch.compile(former, backend="eager") if where in ("itself", "inside") else former
        if where != "itself":
            model = nn.Sequential(nn.Identity(), model)
        if where == "around":
            model = torch.compile(model, backend="eager")
        x, _ = batch()
        assert len(model.train()(x)) == 8
        stripped = fastbf.strip(model)
        assert torch.equal(stripped.train()(x), x)
        assert not any(isinstance(m, fastbf.BatchFormer) for m in stripped.modules())


AGAIN = """
import importlib, sys, torch, fastbf

def step(fastbf, backend):
    former, classifier = fastbf.BatchFormer(32, backend=backend), fastbf.SharedClassifier(32, 5, backend=backend)
    x = torch.randn(4, 32, requires_grad=True)
    classifier.loss(former(x), torch.randint(5, (4,))).backward()
    assert x.grad is not None

for backend in ("triton", "torch"):
    step(fastbf, backend)
for name in sorted((name for name in sys.modules if name.startswith("fastbf")), key=lambda name: -name.count(".")):
    importlib.reload(sys.modules[name])
for backend in ("triton", "torch"):
    step(fastbf, backend)
for name in [name for name in sys.modules if name.startswith("fastbf")]:
    del sys.modules[name]
import fastbf as again
assert again is not fastbf
for backend in ("triton", "torch"):
    step(again, backend)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run in Triton's interpreter")
def test_imported_again():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", AGAIN], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("name", ["layer._ff_block", "layer.linear1.forward", "former.mix", "classifier.forward"])
def test_a_compiled_step_sees_what_is_patched_later(name):
    net, (x, y) = Net(), batch()
    fastbf.convert(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(x, y)
    module, _, method = name.rpartition(".")
    part = net.get_submodule(module)
    original = getattr(part, method)
    setattr(part, method, lambda x: original(x) * 2)
    torch.testing.assert_close(compiled(x, y), net(x, y))
    delattr(part, method)
    torch.testing.assert_close(compiled(x, y), net(x, y))
