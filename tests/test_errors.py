"""Bad input: the error's type, and a message that names the argument and what is allowed."""

import copy
import inspect
import pickle
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import fastbf
from fastbf import functional
from tests.triton_case import DEVICE

X, Y = torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
Q = torch.randn(6, 2, 4)


def former(**options):
    return lambda x, *t: fastbf.BatchFormer(8, **options)(x, *t)


def classifier(**options):
    return lambda x, y, **call: fastbf.SharedClassifier(8, 3, **options).loss(x, y, **call)


def layer(x, **call):
    return fastbf.BatchFormerLayer(8, 4)(x, **call)


def attention(q=Q, k=Q, v=Q, **options):
    return functional.batch_attention(q, k, v, **options)


def entropy(x=X, w=X[:3], y=Y, **options):
    return functional.linear_cross_entropy(x, w, y, **options)


def encoder(*, change=None, value=None, **options):
    weights = list(fastbf.BatchFormerLayer(8, 4, 16)._weights())
    if change is not None:
        weights[change] = value
    return functional.encoder_layer(X, *weights, **{"num_heads": 4, **options})


CASES = [
    # constructors
    (lambda: fastbf.BatchFormer(8, 3), ValueError, "num_heads must divide dim, got 3 for dim=8"),
    (lambda: fastbf.BatchFormer(0), ValueError, "dim must be at least 1, got 0"),
    (lambda: fastbf.BatchFormer(8.0), TypeError, "dim must be an int, got float"),
    (lambda: fastbf.BatchFormer(8, num_layers=0), ValueError, "num_layers must be at least 1"),
    (lambda: fastbf.BatchFormer(8, dropout=1.5), ValueError, r"dropout must lie in \[0, 1\], got 1.5"),
    (lambda: fastbf.BatchFormer(8, dropout=-0.1), ValueError, r"dropout must lie in \[0, 1\]"),
    (lambda: fastbf.BatchFormer(8, dropout="x"), TypeError, "dropout must be a number, got str"),
    (lambda: fastbf.BatchFormer(8, activation="tanh"), ValueError, "activation must be one of 'relu', 'gelu'"),
    (lambda: fastbf.BatchFormer(8, backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'torch'"),
    (lambda: fastbf.BatchFormer(8, batch_dim=1, channel_dim=1), ValueError, "batch_dim and channel_dim must differ"),
    (lambda: fastbf.BatchFormer(8, batch_dim=0.0), TypeError, "batch_dim must be an int, got float"),
    (
        lambda: fastbf.BatchFormer(8, process_group=1),
        TypeError,
        "process_group must be a torch.distributed process group",
    ),
    (lambda: fastbf.BatchFormerLayer(8, 3), ValueError, "nhead must divide d_model, got 3"),
    (lambda: fastbf.BatchFormerLayer(8, 4, 0), ValueError, "dim_feedforward must be at least 1"),
    (lambda: fastbf.SharedClassifier(8, 0), ValueError, "num_classes must be at least 1"),
    (lambda: fastbf.SharedClassifier(8, 3, class_counts=[1, 2]), ValueError, r"class_counts must have shape \(3,\)"),
    (lambda: fastbf.SharedClassifier(8, 3, class_counts=[1, -2, 3]), ValueError, "class_counts must not be negative"),
    (lambda: fastbf.SharedClassifier(8, 3, class_weight=[1.0]), ValueError, r"class_weight must have shape \(3,\)"),
    (lambda: fastbf.SharedClassifier(8, 3, label_smoothing=2), ValueError, "label_smoothing must lie in"),
    (lambda: fastbf.SharedClassifier(8, 3, scale=float("nan")), ValueError, "scale must be finite"),
    # BatchFormer.forward
    (lambda: former()([1, 2]), TypeError, "features must be a torch.Tensor, got list"),
    (lambda: former()(Y), TypeError, "features must have a floating-point dtype, got torch.int64"),
    (lambda: former()(X[0]), ValueError, "features must be .* at least 2 dimensions"),
    (lambda: former()(X[:, :4]), ValueError, "features must have 8 channels along channel_dim=-1"),
    (
        lambda: former()(torch.randn(6, 8, 4, 4)),
        ValueError,
        r"channels along channel_dim=-1, got shape \(6, 8, 4, 4\), which fits channel_dim=1$",
    ),
    (lambda: former()(X[:, :4]), ValueError, r"got shape \(6, 4\)$"),
    (
        lambda: former()(X.T),
        ValueError,
        r"got shape \(8, 6\), which fits once two dimensions change places, features\.transpose\(0, 1\)$",
    ),
    (lambda: fastbf.BatchFormer(X, Y), TypeError, "dim must be an int, got Tensor: make the module once, and call it"),
    (lambda: former()(X, torch.cat([Y, Y])), ValueError, r"got 12 in targets\[0\]: give each once, they are repeated"),
    (
        lambda: former()(X, Y, True),
        TypeError,
        r"got bool as targets\[1\]: a BatchFormer has its own .*, so write former\(features, target\)",
    ),
    (lambda: former()(X, nn.Linear(1, 1)), TypeError, r"got Linear as targets\[0\]: a BatchFormer has its own encoder"),
    (lambda: fastbf.BatchFormer(30), ValueError, "num_heads must divide dim, got 4 for dim=30; 3 does$"),
    (
        lambda: fastbf.BatchFormer(8)(X, targets=Y),
        TypeError,
        r"by position, got targets=: write former\(features, target",
    ),
    (lambda: former(batch_dim=2)(X), ValueError, r"batch_dim must lie in \[-2, 1\] for 2-D features, got 2"),
    (lambda: former(channel_dim=-3)(X), ValueError, "channel_dim must lie in"),
    (lambda: former(batch_dim=-1, channel_dim=1)(X), ValueError, "must differ, got -1 and 1"),
    (lambda: former()(X, Y[:4]), ValueError, "targets must have one entry for each of the 6 samples, got 4"),
    (lambda: former()(X, [1, 2]), ValueError, "targets must have one entry for each of the 6 samples, got 2"),
    (lambda: former()(X, torch.tensor(1)), ValueError, "targets must have one entry"),
    (lambda: former()(X, {"a": 1}), TypeError, "targets must be tensors, lists, tuples or None, got dict as targets"),
    (lambda: former(forked=True)(X[:5]), ValueError, "features must hold both streams along batch_dim=0, got 5"),
    (lambda: former()(X.to("meta")), ValueError, "src must be on the device of the weights, cpu, got meta"),
    # BatchFormerLayer.forward
    (lambda: layer(torch.randn(2, 3, 4, 8)), ValueError, "src must have 2 or 3 dimensions"),
    (lambda: layer(torch.randn(2, 7)), ValueError, "src must have 8 channels"),
    (lambda: layer(Y), TypeError, "src must have a floating-point dtype"),
    # SharedClassifier
    (lambda: classifier()(X[:, :4], Y), ValueError, "features must have 8 channels"),
    (lambda: classifier()(X, Y.float()), TypeError, "target must hold class indices as int64, or probabilities"),
    (lambda: classifier()(X, Y.int()), TypeError, r"class indices as int64.* got torch\.int32: target\.long\(\) makes"),
    (lambda: classifier()(X, Y.float()), TypeError, r"of shape \(6,\): target\.long\(\) makes class indices of it$"),
    (lambda: classifier()(X, Y.float()[:, None]), ValueError, r"got 1: target\.long\(\)\.squeeze\(-1\) makes class"),
    (lambda: classifier()(X, Y[:, None]), ValueError, r"got \(6, 1\): target\.squeeze\(-1\) drops the last dimension$"),
    (lambda: classifier()(X, Y[:, None].repeat(1, 3)), ValueError, r"got \(6, 3\): target\.argmax\(-1\) makes class"),
    (lambda: classifier()(X, torch.cat([Y, Y])), ValueError, r"got \(12,\): these are two a row, .* call train\(\) if"),
    (lambda: classifier()(X.T, Y), ValueError, r"got shape \(8, 6\): features\.movedim\(0, -1\) has them there$"),
    (lambda: fastbf.SharedClassifier(8, 3, [1, 2, 3]), TypeError, "got list; class counts go in class_counts=$"),
    # surgery
    (lambda: fastbf.strip(nn.Linear(1, 1).state_dict()), TypeError, "got OrderedDict: load it into a model, and give"),
    (lambda: classifier()(X, Y[:4]), ValueError, r"target must have shape \(6,\), or \(3,\) for a fork"),
    (lambda: classifier()(X[:5], Y), ValueError, r"target must have shape \(5,\) for an input of 5 rows"),
    (lambda: classifier()(X, torch.rand(6, 4)), ValueError, "probability for each of the 3 classes, got 4"),
    (lambda: classifier()(X, torch.rand(4, 3)), ValueError, r"target must have shape \(6, 3\)"),
    (lambda: classifier()(X, Y + 3), ValueError, r"class indices in \[0, 2\] or ignore_index=-100, got 3"),
    (lambda: classifier()(X, Y - 1), ValueError, "got -1"),
    (lambda: classifier()(X, Y, reduction="max"), ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    (lambda: classifier()(X.to("meta"), Y), ValueError, "features must be on the device of the weights, cpu"),
    (lambda: classifier()(X, Y.to("meta")), ValueError, "target must be on the device of the input, cpu, got meta"),
    (lambda: classifier()(X, [0] * 6), TypeError, "target must be a torch.Tensor, got list: torch.as_tensor makes one"),
    # functional
    (lambda: attention(q=Q[0]), ValueError, r"q must be \(N, …, H, D\) with at least 3 dimensions"),
    (lambda: attention(k=Q[:, :1]), ValueError, "k must have shape"),
    (lambda: attention(v=Q[:5]), ValueError, r"v must have shape \(6, 2, 4\), got \(5, 2, 4\)"),
    (lambda: attention(k=Q.double()), TypeError, "k must have the dtype of q, torch.float32, got torch.float64"),
    (lambda: attention(v=Q.to("meta")), ValueError, "v must be on the device of q"),
    (lambda: attention(dropout_p=2), ValueError, r"dropout_p must lie in \[0, 1\]"),
    (lambda: attention(seed=1.5), TypeError, "seed must be an int, an int64 tensor of one element or None"),
    (lambda: attention(seed=2**63), ValueError, "seed must fit in 64 bits"),
    (lambda: attention(seed=Y), TypeError, "seed must be an int64 tensor of one element"),
    (lambda: attention(seed=Y[:1].to("meta")), ValueError, "seed must be on the device of the input"),
    (lambda: attention(backend="flash"), ValueError, "backend must be one of"),
    (lambda: attention(backend="triton"), ValueError, "backend='triton' cannot serve this call"),
    (lambda: encoder(num_heads=3), ValueError, "num_heads must divide the width of x"),
    (lambda: encoder(activation="silu"), ValueError, "activation must be one of"),
    (lambda: encoder(change=0, value=X), ValueError, r"in_proj_weight must have shape \(24, 8\), got \(6, 8\)"),
    (lambda: encoder(change=5, value=X[0]), ValueError, r"linear1_bias must have shape \(16,\)"),
    (lambda: encoder(change=10, value=None), TypeError, "norm2_weight must be a torch.Tensor, got NoneType"),
    (
        lambda: functional.dropout_add_layer_norm(X, X[:3], X[0], None, dropout_p=0.5, eps=1e-5),
        ValueError,
        "residual must have shape",
    ),
    (
        lambda: functional.dropout_add_layer_norm(X, X, X[0], X[0, :3], dropout_p=0.5, eps=1e-5),
        ValueError,
        r"bias must have shape \(8,\), got \(3,\)",
    ),
    (lambda: functional.activation_dropout(X, "elu", dropout_p=0.5), ValueError, "activation must be one of"),
    (lambda: entropy(w=X[:3, :4]), ValueError, r"linear_weight must have shape \(3, 8\), got \(3, 4\)"),
    (lambda: entropy(linear_bias=X[0]), ValueError, r"linear_bias must have shape \(3,\), got \(8,\)"),
    (lambda: entropy(weight=Y[:3]), TypeError, "weight must have a floating-point dtype"),
    (lambda: entropy(label_smoothing=1.1), ValueError, "label_smoothing must lie in"),
    (lambda: entropy(w=X[:3].double()), TypeError, "input must have the dtype of the weights, torch.float64"),
    (lambda: former()(X.double()), TypeError, "x must have the dtype of the weights, torch.float32, got torch.float64"),
    (lambda: entropy(scale=torch.tensor(2.0)), TypeError, "scale must be a number, got Tensor"),
    (lambda: entropy(scale=float("inf")), ValueError, "scale must be finite, got inf"),
    (lambda: entropy(ignore_index="3"), TypeError, "ignore_index must be an int, got str"),
    (lambda: entropy(w=X[:0]), ValueError, "the number of classes, .* must be at least 1, got 0"),
    (lambda: entropy(linear_bias=[1, 2, 3]), TypeError, "linear_bias must be a torch.Tensor, got list"),
    (lambda: attention(scale="2"), TypeError, "scale must be a number, got str"),
    (lambda: encoder(eps=None), TypeError, "eps must be a number, got NoneType"),
    (lambda: encoder(change=1, value=[0] * 24), TypeError, "in_proj_bias must be a torch.Tensor, got list"),
    (lambda: layer([1, 2]), TypeError, "src must be a torch.Tensor, got list"),
    (lambda: entropy(x=X[0]), ValueError, r"input must be \(M, …, C\) with at least 2 dimensions"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def counts(values, count=3):
    return lambda: fastbf.SharedClassifier(8, count, class_counts=values)


def weights(values, count=3):
    return lambda: fastbf.SharedClassifier(8, count, class_weight=values)


IN_ORDER = r"must hold 3 numbers, one for each class in order, got"
NUMBERS = [
    (counts([1, float("nan"), 3]), ValueError, "class_counts must be finite, got nan for class 1"),
    (counts([1, float("inf"), 3]), ValueError, "class_counts must be finite, got inf for class 1"),
    (counts([1, -2, 3]), ValueError, "class_counts must not be negative, got -2.0 for class 1"),
    (counts(torch.tensor([1, 2, float("nan")])), ValueError, "class_counts must be finite, got nan for class 2"),
    (weights([1, float("nan"), 3]), ValueError, "class_weight must be finite, got nan for class 1"),
    (counts("123"), TypeError, f"class_counts {IN_ORDER} str"),
    (counts(b"123"), TypeError, f"class_counts {IN_ORDER} bytes"),
    (counts(["1", "2", "3"]), TypeError, f"class_counts {IN_ORDER} str for class 0"),
    (counts([1, None, 3]), TypeError, f"class_counts {IN_ORDER} NoneType for class 1"),
    (counts([1, 2j, 3]), TypeError, f"class_counts {IN_ORDER} complex for class 1"),
    (counts({1, 2, 3}), TypeError, f"class_counts {IN_ORDER} set"),
    (counts(3), TypeError, f"class_counts {IN_ORDER} int"),
    (counts([1, 2]), ValueError, r"class_counts must have shape \(3,\), got \(2,\)"),
    (counts(n for n in range(4)), ValueError, r"class_counts must have shape \(3,\), got \(4,\)"),
    (counts(np.ones((3, 1))), ValueError, r"class_counts must have shape \(3,\), got \(3, 1\)"),
    (counts(np.float32(3)), TypeError, f"class_counts {IN_ORDER} float32"),
    (counts(torch.ones(3, device="meta")), ValueError, "a tensor on the meta device, which holds none"),
    (counts(Counter("abc")), TypeError, "class_counts must have the classes 0 to 2 as keys, got 'a'"),
    (
        counts(Counter(torch.tensor([0, 1]))),
        TypeError,
        r"class_counts must have the classes 0 to 2 as keys, got tensor",
    ),
    (counts({1: 1, 2: 2, 3: 3}), ValueError, "class_counts must have the classes 0 to 2 as keys, got 3"),
    (counts({-1: 1}), ValueError, "class_counts must have the classes 0 to 2 as keys, got -1"),
    (counts({0.0: 1}), TypeError, "class_counts must have the classes 0 to 2 as keys, got 0.0"),
    (counts({True: 1}), TypeError, "class_counts must have the classes 0 to 2 as keys, got True"),
    (counts({0: 1, 1: "2"}), TypeError, f"class_counts {IN_ORDER} str for class 1"),
    (weights({0: 1.0, 2: 1.0}), ValueError, "class_weight must have all classes 0 to 2 as keys, got none for 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), NUMBERS)
def test_numbers_of_classes(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Series:
    """As of pandas: the index holds the classes, by descending counts in what ``value_counts`` gives."""

    def __init__(self, index, values):
        self.index, self.values, self.shape = index, values, (len(values),)

    def keys(self):
        return self.index

    def tolist(self):
        return self.values

    def __iter__(self):
        return iter(self.values)

    def __getitem__(self, key):
        return self.values[self.index.index(key)]


@pytest.mark.parametrize(
    "values",
    [
        (5, 3, 4),
        (n for n in (5, 3, 4)),
        range(5, 2, -1),
        np.array([4, 3, 5])[::-1],
        np.array([5.0, 3.0, 4.0], dtype=np.float16),
        torch.tensor([4, 3, 5]).flip(0),
        torch.tensor([5.0, 3.0, 4.0], requires_grad=True),
        [torch.tensor(5), np.int64(3), 4.0],
        {0: 5, 1: 3, 2: 4},
        {2: 4, 1: 3, 0: 5},
        {0: 5, 2: 4, 1: 3}.values(),
        Counter([2] * 4 + [0] * 5 + [1] * 3),
        {np.int64(2): 4, np.int64(0): 5, np.int64(1): 3},
        Series([0, 2, 1], [5, 4, 3]),
    ],
)
def test_numbers_of_classes_from_what_holds_them(values):
    if isinstance(values, range):
        wanted = torch.tensor([5.0, 4.0, 3.0])
    else:
        wanted = torch.tensor([5.0, 4.0, 3.0] if type(values) is type({}.values()) else [5.0, 3.0, 4.0])
    torch.testing.assert_close(fastbf.SharedClassifier(8, 3, class_counts=values).log_prior, wanted.log())


def test_a_class_that_a_counter_lacks_has_no_samples():
    classifier = fastbf.SharedClassifier(8, 4, class_counts=Counter([1, 1, 3]))
    torch.testing.assert_close(classifier.log_prior.exp(), torch.tensor([0.0, 2.0, 0.0, 1.0]))


KEYWORDS = [
    (fastbf.BatchFormer, "nhead", "num_heads"),
    (fastbf.BatchFormer, "n_heads", "num_heads"),
    (fastbf.BatchFormer, "num_head", "num_heads"),
    (fastbf.BatchFormer, "d_model", "dim"),
    (fastbf.BatchFormer, "embed_dim", "dim"),
    (fastbf.BatchFormer, "batch_first", "batch_dim"),
    (fastbf.BatchFormer, "dropout_p", "dropout"),
    (fastbf.BatchFormer, "depth", "num_layers"),
    (fastbf.BatchFormer, "eps", "layer_norm_eps"),
    (fastbf.BatchFormer, "dim_feedfoward", "dim_feedforward"),
    (fastbf.BatchFormer, "Backend", "backend"),
    (fastbf.BatchFormerLayer, "num_heads", "nhead"),
    (fastbf.BatchFormerLayer, "dim", "d_model"),
    (fastbf.BatchFormerLayer, "pre_norm", "norm_first"),
    (fastbf.BatchFormerLayer, "batch_fist", "batch_first"),
    (fastbf.SharedClassifier, "class_weights", "class_weight"),
    (fastbf.SharedClassifier, "weight", "class_weight"),
    (fastbf.SharedClassifier, "cls_num_list", "class_counts"),
    (fastbf.SharedClassifier, "n_classes", "num_classes"),
    (fastbf.SharedClassifier, "smoothing", "label_smoothing"),
    (fastbf.SharedClassifier, "dim", "in_features"),
]


INTERPRETED = pytest.mark.skipif(DEVICE.type == "cuda", reason="an assertion would stop the GPU")


@pytest.mark.parametrize(
    ("backend", "rows"), [("torch", 16), ("torch", 600), pytest.param("triton", 16, marks=INTERPRETED)]
)
@pytest.mark.parametrize("options", [{}, {"stats": True}, {"label_smoothing": 0.1, "ignore_index": 3}], ids=str)
def test_a_class_index_out_of_range_at_every_call(backend, rows, options):
    """Also where the call runs from a tape; PyTorch's leaves the check to the operators."""
    x, w = torch.randn(2 * rows, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    good = torch.randint(1000, (rows,))
    for _ in range(12):
        functional.linear_cross_entropy(x, w, good, **options, backend=backend)
        for index in (1000, -1, -(2**40)):
            bad = good.clone()
            bad[rows // 2] = index
            with pytest.raises(ValueError, match=rf"^target must hold class indices in .* got {index}$") as caught:
                functional.linear_cross_entropy(x, w, bad, **options, backend=backend)
            assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("args", [(), (8, 4)])
@pytest.mark.parametrize(("module", "given", "meant"), KEYWORDS)
def test_keywords_of_other_libraries(module, given, meant, args):
    message = rf"{module.__name__}\.__init__\(\) got an unexpected keyword argument '{given}': did you mean {meant}=\?"
    with pytest.raises(TypeError, match=message):
        module(*args, **{given: 3})


def test_a_keyword_like_no_other():
    with pytest.raises(TypeError, match="unexpected keyword argument 'xyz': it takes dim, num_heads, dim_feedforward,"):
        fastbf.BatchFormer(8, xyz=1)


@pytest.mark.parametrize("module", [fastbf.BatchFormer, fastbf.BatchFormerLayer, fastbf.SharedClassifier])
def test_signatures_are_those_of_the_constructors(module):
    names = list(inspect.signature(module).parameters)
    assert names[0] in ("dim", "d_model", "in_features")
    assert {"backend", "device", "dtype"} < set(names)
    own = type("Own", (module,), {"__init__": lambda self, **options: module.__init__(self, 8, 4, **options)})
    assert own(backend="torch").backend == "torch"
    with pytest.raises(TypeError, match=r"\.__init__\(\) got an unexpected keyword argument 'backnd': .* backend="):
        own(backnd="torch")


@pytest.mark.parametrize("make", [former, lambda **o: lambda x: fastbf.BatchFormerLayer(8, 4, **o)(x)])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, 3, None, int])
def test_an_activation_that_is_not_a_callable_of_tensors(make, activation):
    given = getattr(activation, "__name__", type(activation).__name__)
    message = (
        rf"activation must be 'relu', 'gelu' or a callable that takes a tensor, such as nn\.ReLU\(\), got .*{given}"
    )
    with pytest.raises(TypeError, match=message):
        make(activation=activation)(X)


BACKENDS = ["torch", "triton"]
HALF = "must have the dtype of the weights, torch.float32, got torch.float16: use torch.autocast, or cast one of them"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "mix", "src", "input", "features"])
def test_features_of_another_dtype(name, backend):
    x = X.half().to(DEVICE)
    with torch.device(DEVICE):
        former, layer = fastbf.BatchFormer(8, backend=backend), fastbf.BatchFormerLayer(8, 4, backend=backend)
        classifier = fastbf.SharedClassifier(8, 3, backend=backend)
    call = {
        "x": lambda: former(x),
        "mix": lambda: former.mix(x),
        "src": lambda: layer(x),
        "input": lambda: classifier.loss(x, Y.to(DEVICE)),
        "features": lambda: classifier(x),
    }[name]
    with pytest.raises(TypeError, match=f"{'src' if name == 'mix' else name} {HALF}"):
        call()


def test_a_weight_of_another_dtype_than_the_others_is_named():
    former = fastbf.BatchFormer(8)
    former.layers[0].linear2.half()
    with pytest.raises(TypeError, match=r"linear2_weight must have the dtype of x, torch\.float32, got torch\.float16"):
        former(X)


def test_features_of_the_weights_dtype_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = fastbf.BatchFormer(8)(X.bfloat16())
        fastbf.SharedClassifier(8, 3).loss(out, Y).backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: torch.nested.nested_tensor([x[:2], x[2:]]), "must be a dense tensor, got a nested one: pad it"),
        (lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged), "must be a dense tensor, got a nested one"),
        (lambda x: x.to_sparse(), "must be a dense tensor, got one of layout torch.sparse_coo: convert it"),
        (lambda x: x.to_sparse_csr(), "must be a dense tensor, got one of layout torch.sparse_csr"),
    ],
)
def test_features_that_are_not_dense(change, message, backend):
    with torch.device(DEVICE):
        former = fastbf.BatchFormer(32, backend=backend)
        classifier = fastbf.SharedClassifier(32, 3, backend=backend)
        x, y = torch.randn(6, 32), torch.zeros(6, dtype=torch.long)
    weights = former.layers[0]._weights()
    calls = (
        former,
        former.mix,
        classifier,
        lambda x: classifier.loss(x, y),
        lambda x: functional.linear_cross_entropy(x, classifier.weight, y, backend=backend),
        lambda x: functional.encoder_layer(x, *weights, num_heads=4, backend=backend),
    )
    for call in calls:
        call(x)  # what passed is remembered
        with pytest.raises(TypeError, match=message):
            call(change(x))


def test_a_sparse_input_of_a_layer():
    with pytest.raises(TypeError, match=r"src must be a dense tensor, got one of layout torch\.sparse_coo"):
        layer(X.to_sparse())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((nn.Linear(8, 8), X), "sample_args must be a tuple or a list of tensors, got Tensor"),
        ((nn.Linear(8, 8), {"x": X}), "sample_args must be a tuple or a list of tensors, got dict"),
        ((nn.Linear(8, 8), (x for x in [X])), "sample_args must be a tuple or a list of tensors, got generator"),
        ((nn.Linear(8, 8), None), "sample_args must be a tuple or a list of tensors, got NoneType"),
        ((nn.Linear(8, 8), (X, 3)), r"sample_args\[1\] must be a torch\.Tensor, got int"),
        (((X,), nn.Linear(8, 8)), "callable must be a module or a function, got tuple"),
        ((X, (X,)), "callable must be a module or a function, got Tensor"),
    ],
)
def test_arguments_of_make_graphed(args, message):
    with pytest.raises(TypeError, match=message):
        fastbf.make_graphed(*args)


@pytest.mark.parametrize("name", ["world", "", "0", "nccl"])
def test_a_process_group_by_a_name_that_none_has(name):
    layer = fastbf.BatchFormerLayer(8, 4)
    message = f"process_group must be a .* process group, such as .*WORLD, .* got '{name}', which names none"
    for call in (
        lambda: fastbf.BatchFormer(8, process_group=name),
        lambda: fastbf.BatchFormerLayer(8, 4, process_group=name),
        lambda: setattr(layer, "process_group", name),
        lambda: setattr(fastbf.BatchFormer(8), "process_group", name),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert layer.process_group is None
    for call in (lambda: encoder(process_group=name), lambda: fastbf.distributed.gather(X, process_group=name)):
        with pytest.raises(ValueError, match=f"this process has no process_group named '{name}'"):
            call()


@pytest.mark.parametrize("training", [True, False])
def test_a_call_of_the_classifier_with_targets_suggests_the_loss(training):
    classifier = fastbf.SharedClassifier(8, 3).train(training)
    with pytest.raises(TypeError, match=r"features alone, got 2 arguments: .* is classifier\.loss\(features, target\)"):
        classifier(X, Y)
    for name in ("target", "labels"):
        with pytest.raises(
            TypeError, match=rf"features alone, got {name}=: .* is classifier\.loss\(features, target\)"
        ):
            classifier(X, **{name: Y})
    with pytest.raises(TypeError, match=r"got 2 arguments: .* is classifier\.loss"):
        classifier(X, Y, reduction="sum")


@pytest.mark.parametrize(("given", "advice"), [("x", "did you mean features="), ("xyz", "it takes features, input")])
def test_a_call_of_the_classifier_with_an_unknown_keyword(given, advice):
    message = rf"SharedClassifier\.forward\(\) got an unexpected keyword argument '{given}': {advice}"
    with pytest.raises(TypeError, match=message):
        fastbf.SharedClassifier(8, 3)(**{given: X})


def with_prefix(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("inside", "prefix"), [("", ""), ("former.", "former."), ("1.", "1.encoder_layers.")])
def test_a_checkpoint_of_an_encoder_layer_suggests_its_keys(inside, prefix, strict):
    """Of a BatchFormer and of a model that holds one, once, whether or not the keys are an error."""
    former = fastbf.BatchFormer(8)
    model = {"": former, "former.": nn.ModuleDict({"former": former}), "1.": nn.Sequential(nn.ReLU(), former)}[inside]
    state = nn.TransformerEncoderLayer(8, 4, 8).state_dict()
    refused = pytest.raises(RuntimeError, match="Missing key") if strict else nullcontext()
    with pytest.warns(UserWarning, match="is not loaded") as warned, refused:
        model.load_state_dict(with_prefix(prefix, state), strict=strict)
    (message,) = [str(w.message) for w in warned]
    assert f"'{prefix}self_attn.in_proj_weight' is not loaded" in message
    assert f"this one to '{inside}layers.0.self_attn.in_proj_weight'" in message
    assert warned[0].filename == __file__


FUNCTIONS = [
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "labels", "did you mean target="),
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "x", "did you mean features="),
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "stat", "did you mean stats="),
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "xyz", "it takes features, target, reduction, stats"),
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "scale", "scale= is an argument of the constructor"),
    (fastbf.SharedClassifier(8, 3).loss, "SharedClassifier.loss", "weight", "class_weight= is an argument of the con"),
    (fastbf.BatchFormer(8).mix, "BatchFormer.mix", "x", "did you mean features="),
    (fastbf.BatchFormer(8).attention_map, "BatchFormer.attention_map", "labels", "it takes features"),
    (functional.linear_cross_entropy, "linear_cross_entropy", "targets", "did you mean target="),
    (functional.linear_cross_entropy, "linear_cross_entropy", "features", "did you mean input="),
    (functional.cross_entropy, "cross_entropy", "labels", "did you mean target="),
    (functional.batch_attention, "batch_attention", "dropout", "did you mean dropout_p="),
    (functional.dropout_add_layer_norm, "dropout_add_layer_norm", "p", "did you mean dropout_p="),
    (functional.activation_dropout, "activation_dropout", "act", "did you mean activation="),
    (functional.encoder_layer, "encoder_layer", "dropout", "did you mean dropout_p="),
    (fastbf.strip, "strip", "model", "did you mean module="),
    (fastbf.convert, "convert", "model", "did you mean module="),
    (fastbf.explain, "explain", "module", "did you mean what="),
    (fastbf.make_graphed, "make_graphed", "sample_arg", "did you mean sample_args="),
    (fastbf.update_average, "update_average", "buffer", "did you mean buffers="),
    (fastbf.warm_up, "warm_up", "model", "did you mean module="),
    (fastbf.distributed.gather, "gather", "group", "did you mean process_group="),
]


@pytest.mark.parametrize(("function", "name", "given", "advice"), FUNCTIONS)
def test_unknown_keywords_of_functions(function, name, given, advice):
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    by_name = {p.name: None for p in needed if p.kind is p.KEYWORD_ONLY}
    positional = [None] * sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in needed)
    message = rf"^{name}\(\) got an unexpected keyword argument '{given}': {advice}"
    with pytest.raises(TypeError, match=message):
        function(*positional, **by_name, **{given: 3})


def test_a_keyword_in_place_of_a_needed_one():
    for call in (functional.linear_cross_entropy, fastbf.SharedClassifier(8, 3).loss):
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'labels': did you mean target=\?"):
            call(X, labels=Y)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got nothing"):
        fastbf.SharedClassifier(8, 3).loss(X)
    with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got nothing"):
        fastbf.SharedClassifier(8, 3).loss(target=Y)


@pytest.mark.parametrize("function", {name: function for function, name, *_ in FUNCTIONS}.values())
def test_signatures_are_those_that_are_documented(function):
    """No ``**unknown``, and a default for what may be left out only."""
    shown = inspect.signature(function).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    if "target" in shown:
        assert shown["target"].default is inspect.Parameter.empty


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_other_keys_suggests_nothing():
    former, layer = fastbf.BatchFormer(8), nn.TransformerEncoderLayer(8, 4, 8)
    former.load_state_dict(with_prefix("layers.0.", layer.state_dict()), assign=True)
    assert former.layers[0].linear1.weight.data_ptr() == layer.linear1.weight.data_ptr()
    former.load_state_dict(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        former.load_state_dict({})
    former.register_module("inner", fastbf.BatchFormer(8))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(former)))
    copied.load_state_dict(former.state_dict())


def test_class_values_of_a_classifier_from_the_meta_device():
    real = fastbf.SharedClassifier(8, 3, class_weight=[1.0, 2.0, 3.0], class_counts=[1, 2, 3])
    made = fastbf.SharedClassifier(8, 3, class_weight=[1.0, 2.0, 3.0], class_counts=[1, 2, 3], device="meta")
    made.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(made.loss(X, Y), real.loss(X, Y))
