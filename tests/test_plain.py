"""strip(plain=True): modules of torch alone."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fastbf
from fastbf import cuda_graphs
from fastbf.surgery import PassThrough

X = torch.randn(5, 16)


def network(**options):
    return nn.Sequential(
        nn.Linear(16, 16),
        fastbf.BatchFormer(16),
        nn.TransformerEncoder(fastbf.BatchFormerLayer(16, 4, 16, batch_first=True), 2, enable_nested_tensor=False),
        nn.ModuleDict({"former": fastbf.BatchFormer(16, forked=True)})["former"],
        fastbf.SharedClassifier(16, 3, **options),
    ).eval()


def types_of_fastbf(model):
    """Of its modules, and of what these hold beside tensors and modules."""
    held = [value for m in model.modules() for value in vars(m).values()]
    return {type(v).__name__ for v in (*model.modules(), *held) if type(v).__module__.startswith("fastbf")}


def plain(model):
    """The stripped model, of which nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastbf.strip(model, plain=True)


OPTIONS = [
    {},
    {"scale": 4.0, "class_counts": [1, 2, 3], "class_weight": [1.0, 2.0, 3.0], "label_smoothing": 0.1},
    {"bias": False, "scale": 0.3},
    {"dtype": torch.float64, "scale": 3},
    {"scale": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_results_and_keys_stay_and_types_are_torchs(options):
    model = network(**options)
    model.to(options.get("dtype"))
    x = X.to(model[0].weight.dtype)
    before, keys = model(x), [key for key in model.state_dict() if not key.startswith(("1.", "3."))]
    classifier, layer = model[4], model[2].layers[0]
    assert types_of_fastbf(model)
    assert plain(model) is model
    torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) == keys
    assert not types_of_fastbf(model)
    assert [type(m) for m in (model[1], model[3], classifier)] == [nn.Identity, nn.Identity, nn.Linear]
    assert model[4] is classifier
    assert model[2].layers[0] is layer
    assert vars(classifier).keys() == vars(nn.Linear(1, 1)).keys()
    assert vars(layer).keys() == vars(nn.TransformerEncoderLayer(1, 1)).keys()
    assert list(classifier.buffers()) == []
    assert fastbf.convert(model) == 2


def test_modes_and_gradients_stay():
    model = network(scale=2.0).train()
    model[4].bias.requires_grad_(False)
    model[1].eval()
    plain(model)
    assert [m.training for m in model[1:]] == [False, True, True, True]
    assert [model[4].weight.requires_grad, model[4].bias.requires_grad] == [True, False]
    model(X).sum().backward()
    assert model[4].weight.grad is not None


def test_without_a_scale_parameters_stay_the_same_objects():
    model = network(class_counts=[1, 2, 3])
    parameters = dict(model.named_parameters())
    plain(model)
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("stripped", [False, True])
@pytest.mark.parametrize("make", [lambda: fastbf.BatchFormer(16), lambda: fastbf.SharedClassifier(16, 3, scale=2)])
def test_of_a_module_itself(make, stripped):
    module = make().eval()
    before = module(X)
    module = plain(fastbf.strip(module) if stripped else module)
    assert type(module) in (nn.Identity, nn.Linear)
    assert not module.training
    torch.testing.assert_close(module(X), before)


def test_of_a_layer_itself():
    layer = fastbf.BatchFormerLayer(16, 4).eval()
    before = layer(X)
    assert type(plain(layer)) is nn.TransformerEncoderLayer
    torch.testing.assert_close(layer(X), before)


def test_after_strip():
    model = fastbf.strip(network())
    assert type(model[1]) is PassThrough
    assert not types_of_fastbf(plain(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script():
    model = network(scale=2.0)
    before = model(X)
    torch.testing.assert_close(torch.jit.script(plain(model))(X), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_dynamic_quantization():
    model = nn.Sequential(nn.Linear(16, 16), fastbf.BatchFormer(16), fastbf.SharedClassifier(16, 3, scale=2.0)).eval()
    before = model(X)
    quantized = torch.ao.quantization.quantize_dynamic(plain(model), {nn.Linear})
    assert type(quantized[2]) is torch.ao.nn.quantized.dynamic.Linear
    torch.testing.assert_close(quantized(X), before, atol=0.1, rtol=0.1)


def test_a_pickle_loads_without_fastbf(tmp_path):
    model = network(scale=2.0, class_counts=[1, 2, 3])
    model[4].register_forward_hook(_halved)
    del model[4]._forward_hooks[next(iter(model[4]._forward_hooks))]
    torch.save((plain(model), X, model(X)), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['fastbf'] = None\n"
        f"model, x, out = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "torch.testing.assert_close(model(x), out)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _halved(module, args, out):
    return out / 2


def test_hooks_stay():
    model = network(scale=2.0)
    model[4].register_forward_hook(_halved)
    before = model(X)
    torch.testing.assert_close(plain(model)(X), before)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrizations_are_computed(norm, training, scale):
    model = network(scale=scale)
    norm(model[4])
    model(X)
    model.eval()
    before = model(X)
    plain(model.train(training))
    assert type(model[4]) is nn.Linear
    assert {name for name, _ in model[4].named_parameters()} == {"weight", "bias"}
    assert model[4].weight.is_leaf
    assert model[4].weight.requires_grad
    torch.testing.assert_close(model.eval()(X), before)


class Noisy(nn.Module):
    def forward(self, x):
        return 3 * x if self.training else x


def test_parametrizations_act_as_in_evaluation():
    model = network(scale=2.0)
    parametrize.register_parametrization(model[4], "weight", Noisy())
    before = model.eval()(X)
    torch.testing.assert_close(plain(model.train()).eval()(X), before)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def test_parametrized_bias():
    model = network(scale=2.0)
    parametrize.register_parametrization(model[4], "bias", Doubled())
    before = model(X)
    torch.testing.assert_close(plain(model)(X), before)
    assert type(model[4]) is nn.Linear


@pytest.mark.parametrize("parametrized", [False, True])
def test_what_is_tied_to_the_weight_stays(parametrized):
    net = nn.ModuleDict({"embedding": nn.Embedding(3, 16), "a": fastbf.SharedClassifier(16, 3, scale=2.0)}).eval()
    net["a"].weight = net["embedding"].weight
    net["b"] = fastbf.SharedClassifier(16, 3, scale=2.0)
    net["b"].weight = net["embedding"].weight
    net["c"] = fastbf.SharedClassifier(16, 3, scale=3.0)
    net["c"].weight = net["embedding"].weight
    if parametrized:
        parametrize.register_parametrization(net["a"], "weight", Doubled())
    values, results = net["embedding"].weight.clone(), [net[name](X) for name in "abc"]
    keys = {key.replace("parametrizations.weight.original", "weight") for key in net.state_dict()}
    plain(net)
    torch.testing.assert_close([net[name](X) for name in "abc"], results)
    assert torch.equal(net["embedding"].weight, values)
    assert set(net.state_dict()) == keys
    assert parametrized or net["a"].weight is net["b"].weight


def test_tied_without_a_scale():
    net = nn.ModuleDict({"embedding": nn.Embedding(3, 16), "a": fastbf.SharedClassifier(16, 3)})
    net["a"].weight = net["embedding"].weight
    plain(net)
    assert net["a"].weight is net["embedding"].weight


def test_a_module_with_two_names():
    classifier = fastbf.SharedClassifier(16, 3, scale=2.0)
    before = classifier(X)
    net = plain(nn.ModuleDict({"a": classifier, "b": nn.Sequential(classifier)}))
    assert net["a"] is net["b"][0]
    torch.testing.assert_close(net["a"](X), before)


class Counted(fastbf.SharedClassifier):
    """A subclass that sets options alone."""

    def __init__(self):
        super().__init__(16, 3, class_counts=[1, 2, 3], scale=2.0)


class Cosine(fastbf.SharedClassifier):
    def forward(self, features):
        return torch.cosine_similarity(features[:, None], self.weight, dim=-1)


class Computed(fastbf.SharedClassifier):
    bias = property(lambda self: self.weight[:, 0], lambda self, _: None)

    def register_parameter(self, name, parameter):
        if name != "bias":
            super().register_parameter(name, parameter)


class Mixed(nn.Flatten, fastbf.SharedClassifier):
    def __init__(self):
        fastbf.SharedClassifier.__init__(self, 16, 3)


class Own(fastbf.BatchFormerLayer):
    def _ff_block(self, x):
        return -x


def with_own_forward(module):
    module.forward = lambda x: x
    return module


def hooked(scale=2.0):
    return prune.random_unstructured(fastbf.SharedClassifier(16, 3, scale=scale), "weight", 0.5)


def in_a_group():
    layer = fastbf.BatchFormerLayer(16, 4)
    layer._group = "7"
    return layer


def test_a_subclass_without_a_forward_becomes_linear():
    model = nn.Sequential(Counted())
    before = model(X)
    torch.testing.assert_close(plain(model)(X), before)
    assert type(model[0]) is nn.Linear


LEFT = [
    (lambda: Cosine(16, 3), "Cosine: it has a forward of its own"),
    (lambda: with_own_forward(fastbf.SharedClassifier(16, 3)), "SharedClassifier: it has a forward of its own"),
    (lambda: with_own_forward(fastbf.BatchFormerLayer(16, 4)), "BatchFormerLayer: it has a forward of its own"),
    (lambda: Computed(16, 3), "Computed: its class computes weight or bias"),
    (Mixed, "Mixed: it"),
    (lambda: Own(16, 4), "Own: a subclass may do something else"),
    (hooked, "scale=2.0 cannot be folded into what a forward pre-hook computes"),
    (in_a_group, "it has a process_group"),
    (lambda: fastbf.SharedClassifier(16, 3, scale=1e7, dtype=torch.float16), r"scale=10000000.0 does not fit in torch"),
    (lambda: fastbf.SharedClassifier(16, 3, scale=1e-6, dtype=torch.float16), r"scale=1e-06 does not fit in torch"),
]


@pytest.mark.parametrize(("make", "message"), LEFT)
def test_what_cannot_be_plain_stays_and_is_named(make, message):
    model = nn.ModuleDict({"former": fastbf.BatchFormer(16), "kept": make(), "other": fastbf.SharedClassifier(16, 3)})
    kept, state = type(model["kept"]), copy.deepcopy(model["kept"].state_dict())
    with pytest.warns(UserWarning, match=rf"strip left modules that cannot be made plain: kept \(.*{message}"):
        fastbf.strip(model, plain=True)
    assert type(model["kept"]) is kept
    torch.testing.assert_close(model["kept"].state_dict(), state)
    assert [type(model["former"]), type(model["other"])] == [nn.Identity, nn.Linear]


def test_pruned_without_a_scale():
    model = nn.Sequential(hooked(scale=1.0))
    before = model(X)
    torch.testing.assert_close(plain(model)(X), before)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [16.0, 1 / 0.07])
def test_scales_in_use_fit_sixteen_bits(dtype, scale):
    plain(nn.Sequential(fastbf.SharedClassifier(512, 1000, scale=scale, dtype=dtype)))


def test_zero_and_infinite_weights():
    classifier = fastbf.SharedClassifier(16, 3, scale=2.0)
    nn.init.constant_(classifier.bias, 0)
    nn.init.constant_(classifier.weight, torch.inf)
    plain(classifier)
    assert classifier.weight.isinf().all()


def test_on_the_meta_device():
    model = plain(network(scale=2.0, device="meta").to("meta"))
    assert model[4].weight.is_meta


def test_a_graphed_forward_is_dropped():
    model = network()
    forward = cuda_graphs._Graphed.__new__(cuda_graphs._Graphed)
    before = model(X)
    model.forward = forward
    torch.testing.assert_close(plain(model)(X), before)


def test_random_numbers_are_not_drawn():
    model = network(scale=2.0)
    torch.manual_seed(3)
    plain(model)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_targets_need_a_change_of_the_callers_code():
    former = fastbf.strip(fastbf.BatchFormer(16), plain=True)
    with pytest.raises(TypeError):
        former(X, X)
