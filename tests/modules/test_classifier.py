"""linear_cross_entropy and SharedClassifier against F.cross_entropy on written-out logits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastbf
from fastbf.functional import linear_cross_entropy
from fastbf.torch_backend import classifier as chunked_classifier

N, C, K = 12, 9, 7


def case(k=K, forked=False, soft=False, ignored=(), dtype=torch.float64, n=N):
    x = torch.randn(n * (2 if forked else 1), C, dtype=dtype, requires_grad=True)
    w = torch.randn(k, C, dtype=dtype, requires_grad=True)
    b = torch.randn(k, dtype=dtype, requires_grad=True)
    y = torch.rand(n, k, dtype=dtype) if soft else torch.randint(0, k, (n,))
    for i in ignored:
        y[i] = -100
    return x, w, b, y


def written_out(x, w, y, b=None, logit_bias=None, scale=1.0, **options):
    logits = F.linear(x, w, b) * scale
    if logit_bias is not None:
        logits = logits + logit_bias
    y = y if x.shape[0] == y.shape[0] else torch.cat([y, y])
    return F.cross_entropy(logits, y, **options)


def assert_same(ours, theirs, tensors, **tolerance):
    torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
    grad = torch.rand_like(theirs)
    actual = torch.autograd.grad(ours, tensors, grad, retain_graph=True)
    expected = torch.autograd.grad(theirs, tensors, grad)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)
    again = torch.autograd.grad(ours, tensors, grad)  # which may use up what was saved, and so work in other chunks
    for a, e in zip(again, expected, strict=True):
        torch.testing.assert_close(a, e, equal_nan=True, **tolerance)


OPTIONS = list(
    itertools.product(
        [False, True],  # forked
        [False, True],  # probabilities
        [None, "weight"],
        [0.0, 0.1],  # label smoothing
        [None, "logit_bias"],
        [1.0, 12.5],  # scale
        ["mean", "sum", "none"],
    )
)


@pytest.mark.parametrize(("forked", "soft", "weight", "smoothing", "bias", "scale", "reduction"), OPTIONS)
def test_every_combination_of_options(forked, soft, weight, smoothing, bias, scale, reduction):
    x, w, b, y = case(forked=forked, soft=soft, ignored=() if soft else (2, 5))
    weight = torch.rand(K, dtype=torch.float64) if weight else None
    logit_bias = torch.randn(K, dtype=torch.float64, requires_grad=True) if bias else None
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    ours = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=logit_bias, scale=scale, **options)
    theirs = written_out(x, w, y, b, logit_bias, scale, **options)
    assert_same(ours, theirs, [t for t in (x, w, b, logit_bias) if t is not None])


@pytest.mark.parametrize("k", [1, 2, 101])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_chunks_change_nothing(k, keep, rows, monkeypatch):
    monkeypatch.setattr(chunked_classifier, "_MIN_ROWS", rows)
    monkeypatch.setattr(chunked_classifier, "chunk_elements", lambda *_: 0)
    monkeypatch.setattr(chunked_classifier, "SMALL", 0)
    monkeypatch.setattr(chunked_classifier, "KEEP_LOGITS_BYTES", 1 << 30 if keep else 0)
    for forked, soft in itertools.product([False, True], repeat=2):
        x, w, b, y = case(k, forked=forked, soft=soft)
        assert_same(linear_cross_entropy(x, w, y, linear_bias=b), written_out(x, w, y, b), (x, w, b))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_gradients_of_every_subset(needs):
    x, w, b, y = case(forked=True)
    tensors = (x, w, b, torch.randn(K, dtype=torch.float64))
    for t, need in zip(tensors, needs, strict=True):
        t.requires_grad_(need)
    ours = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=tensors[3])
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    assert ours.requires_grad == any(needs)
    if wanted:
        assert_same(ours, written_out(x, w, y, b, tensors[3]), wanted)


def test_probabilities_and_class_weights_get_gradients():
    x, w, _, y = case(soft=True)
    y.requires_grad_()
    weight = torch.rand(K, dtype=torch.float64, requires_grad=True)
    assert_same(linear_cross_entropy(x, w, y, weight=weight), written_out(x, w, y, weight=weight), (x, w, y, weight))


def test_double_backward():
    x, w, b, y = case(forked=True, n=3)
    assert torch.autograd.gradgradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1, scale=0.5), (x, w, b)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(smoothing, reduction):
    x, w, b, y = case(ignored=range(N))
    options = {"label_smoothing": smoothing, "reduction": reduction}
    assert_same(linear_cross_entropy(x, w, y, linear_bias=b, **options), written_out(x, w, y, b, **options), (x, w, b))


def test_class_switched_off():
    x, w, b, _ = case()
    y = torch.arange(N) % (K - 1)
    off = torch.zeros(K, dtype=torch.float64)
    off[K - 1] = -torch.inf
    ours = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=off)
    assert ours.isfinite()
    assert_same(ours, written_out(x, w, y, b, off), (x, w, b))
    y[0] = K - 1
    assert linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=off) == torch.inf


@pytest.mark.parametrize("value", [1e4, -1e4, torch.inf, torch.nan])
def test_extreme_inputs(value):
    x, w, b, y = case()
    with torch.no_grad():
        x[1] *= value
    assert_same(linear_cross_entropy(x, w, y, linear_bias=b), written_out(x, w, y, b), (x, w, b))


def test_ignore_index():
    x, w, b, y = case()
    assert_same(
        linear_cross_entropy(x, w, y, linear_bias=b, ignore_index=3), written_out(x, w, y, b, ignore_index=3), (x, w, b)
    )


def test_dense_features_and_strides():
    x = torch.randn(C, 2 * N, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, K, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, K, (N, 5))
    ours = linear_cross_entropy(x.movedim(0, -1), w.T, y, reduction="none")
    theirs = F.cross_entropy(
        F.linear(x.movedim(0, -1), w.T).flatten(0, 1), torch.cat([y, y]).flatten(), reduction="none"
    )
    assert ours.shape == (2 * N, 5)
    assert_same(ours, theirs.view(2 * N, 5), (x, w))


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_statistics_of_each_stream(forked, soft):
    x, w, b, y = case(forked=forked, soft=soft, ignored=() if soft else (1,))
    weight = torch.rand(K, dtype=torch.float64)
    loss, stats = linear_cross_entropy(x, w, y, linear_bias=b, weight=weight, stats=True)
    assert_same(loss, written_out(x, w, y, b, weight=weight), (x, w, b))
    streams = x.chunk(2) if forked else [x]
    expected = torch.stack([written_out(s, w, y, b, weight=weight) for s in streams])
    torch.testing.assert_close(stats.loss, expected.detach())
    labels = y.argmax(-1) if soft else y
    hits = [(F.linear(s, w, b).argmax(-1) == labels)[labels >= 0].double().mean() for s in streams]
    torch.testing.assert_close(stats.accuracy, torch.stack(hits))
    torch.testing.assert_close(stats.unadjusted_accuracy, stats.accuracy)
    assert not stats.loss.requires_grad


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("soft", [False, True])
def test_accuracy_with_class_counts_and_without(soft, chunked, monkeypatch):
    """The prior says class 0 to nearly all rows; predictions do without it."""
    if chunked:
        monkeypatch.setattr(chunked_classifier, "chunk_elements", lambda *_: 2 * K)
        monkeypatch.setattr(chunked_classifier, "SMALL", 0)
    x, w, b, y = case(forked=True, soft=soft, ignored=() if soft else (1,), n=20)
    logit_bias = torch.tensor([50.0, *[0.0] * (K - 1)], dtype=torch.float64)
    _, stats = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=logit_bias, stats=True)
    labels = y.argmax(-1) if soft else y
    for accuracy, prior in ((stats.accuracy, logit_bias), (stats.unadjusted_accuracy, 0)):
        logits = [F.linear(s, w, b) + prior for s in x.chunk(2)]
        expected = [(z.argmax(-1) == labels)[labels >= 0].double().mean() for z in logits]
        torch.testing.assert_close(accuracy, torch.stack(expected))
    assert not torch.equal(stats.accuracy, stats.unadjusted_accuracy)


def test_contrastive_use_replaces_four_losses():
    q1, m1, q2, m2, k1, k2 = (F.normalize(torch.randn(N, C, dtype=torch.float64), dim=1) for _ in range(6))
    q1, m1, q2, m2 = (t.requires_grad_() for t in (q1, m1, q2, m2))
    labels, tau = torch.arange(N), 0.2
    four = sum(F.cross_entropy(q @ k.T / tau, labels) for q, k in ((q1, k2), (m1, k2), (q2, k1), (m2, k1)))
    ours = sum(
        2 * linear_cross_entropy(torch.cat(q), k, labels, scale=1 / tau) for q, k in (((q1, m1), k2), ((q2, m2), k1))
    )
    assert_same(ours, four, (q1, m1, q2, m2))


@pytest.mark.parametrize("bias", [True, False])
def test_shared_classifier(bias):
    counts, weight = torch.tensor([100, 50, 20, 10, 5, 2, 1]), torch.rand(K)
    module = fastbf.SharedClassifier(
        C, K, bias, class_counts=counts, class_weight=weight, label_smoothing=0.1, scale=3.0, dtype=torch.float64
    )
    x, _, _, y = case(forked=True)
    torch.testing.assert_close(module(x), 3 * F.linear(x, module.weight, module.bias))
    theirs = written_out(
        x, module.weight, y, module.bias, counts.double().log(), 3.0, weight=weight.double(), label_smoothing=0.1
    )
    assert_same(module.loss(x, y), theirs, (x, *module.parameters()))


def test_state_dict_is_that_of_linear():
    module = fastbf.SharedClassifier(C, K, class_counts=[1] * K, class_weight=[1.0] * K)
    plain = torch.nn.Linear(C, K)
    assert list(module.state_dict()) == list(plain.state_dict())
    module.load_state_dict(plain.state_dict())
    plain.load_state_dict(module.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_within_twice_eagers(dtype):
    exact = [t.detach() for t in case(forked=True, n=300)]
    low = [t.to(dtype).requires_grad_() for t in exact[:3]]
    rounded = [t.detach().double().requires_grad_() for t in low]
    y = exact[3]

    def results(fn, x, w, b):
        loss = fn(x, w, y, b)
        return [loss, *torch.autograd.grad(loss, (x, w, b))]

    truth = results(written_out, *rounded)
    eager = results(written_out, *low)
    ours = results(lambda x, w, y, b: linear_cross_entropy(x, w, y, linear_bias=b), *low)
    for o, e, t in zip(ours, eager, truth, strict=True):
        assert o.dtype == e.dtype
        assert (o.double() - t).norm() <= 2 * (e.double() - t).norm() + torch.finfo(dtype).eps * t.norm()


def test_logits_are_kept_at_most_once():
    n, k = 600, 5000
    x, w = torch.randn(2 * n, C, requires_grad=True), torch.randn(k, C, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, w, torch.randint(0, k, (n,)))
    assert sum(saved) < 1.1 * 2 * n * k


def test_can_be_built_on_the_meta_device():
    module = fastbf.SharedClassifier(C, K, class_counts=[3] * K, device="meta")
    assert module.log_prior.device.type == "meta"


def test_no_rows_as_the_reference():
    x, w, b, y = case(n=0)
    assert_same(linear_cross_entropy(x, w, y, linear_bias=b), written_out(x, w, y, b), (x, w, b))


def test_logit_bias_of_another_precision():
    x, w, b, y = case(dtype=torch.float32)
    bias = torch.randn(K, dtype=torch.float64, requires_grad=True)
    ours, theirs = linear_cross_entropy(x, w, y, linear_bias=b, logit_bias=bias), written_out(x, w, y, b, bias)
    assert_same(ours, theirs, (x, w, b, bias), rtol=1e-4, atol=1e-5)


def test_graph_of_the_gradient_when_inputs_depend_on_each_other():
    x = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(x, 2 * x, torch.arange(N))
    plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, x, create_graph=True)[0], plain)


def test_low_precision_with_class_weights_on_every_path():
    module = fastbf.SharedClassifier(C, K, class_weight=range(1, K + 1), dtype=torch.bfloat16)
    x, _, _, y = case(dtype=torch.bfloat16)
    loss = module.loss(x, y)
    plain = torch.autograd.grad(loss, x, retain_graph=True)[0]
    graphed = torch.autograd.grad(loss, x, create_graph=True)[0]
    torch.testing.assert_close(graphed, plain)
    assert module.loss(x[:0], y[:0]).isnan()
    weighted = module.loss(x, F.one_hot(y, K).to(torch.bfloat16).requires_grad_())
    assert weighted.dtype == torch.bfloat16


class Cosine(fastbf.SharedClassifier):
    def forward(self, x):
        return 8 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


def quartered(module):
    module.register_forward_hook(lambda _, args, out: out / 4)
    return module


def of_the_instance(module):
    module.forward = lambda x: F.linear(x, module.weight) ** 2
    return module


def halved_before(module):
    module.register_forward_pre_hook(lambda _, args: (args[0] / 2,))
    return module


EDITS = {
    "hook": quartered,
    "pre-hook": halved_before,
    "forward of the instance": of_the_instance,
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrized": torch.nn.utils.parametrizations.weight_norm,
    "subclass": lambda module: Cosine(C, K, **module.given),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils")
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("forked", [False, True])
def test_the_loss_is_that_of_what_forward_gives(edit, soft, forked):
    given = {"class_counts": range(1, K + 1), "class_weight": range(1, K + 1), "label_smoothing": 0.1}
    given |= {"scale": 0.7, "dtype": torch.float64}
    module = fastbf.SharedClassifier(C, K, **given)
    module.given = given
    module = edit(module).eval()  # spectral_norm changes with every training call
    x, _, _, y = case(forked=forked, soft=soft, ignored=() if soft else (1,))
    numbers = torch.arange(1, K + 1, dtype=torch.float64)
    repeated = torch.cat([y, y]) if forked else y
    options = {"weight": numbers, "label_smoothing": 0.1}
    for reduction in ("mean", "sum", "none"):
        ours = module.loss(x, y, reduction=reduction)
        theirs = F.cross_entropy(module(x) + numbers.log(), repeated, reduction=reduction, **options)
        assert_same(ours, theirs, (x, *module.parameters()) if "forward" not in vars(module) else (x, module.weight))
    _, stats = module.loss(x, y, stats=True)
    logits, labels = module(x).detach(), repeated.argmax(-1) if soft else repeated
    for accuracy, z in ((stats.accuracy, logits + numbers.log()), (stats.unadjusted_accuracy, logits)):
        hits = [(h == t)[t >= 0].double().mean() for h, t in zip(z.argmax(-1).chunk(2), labels.chunk(2), strict=True)]
        torch.testing.assert_close(accuracy, torch.stack(hits) if forked else (z.argmax(-1) == labels)[labels >= 0]
                                   .double().mean().view(1))  # fmt: skip


@pytest.mark.parametrize("edit", [quartered, of_the_instance])
def test_explain_tells_why_the_loss_calls_the_module(edit):
    module, x = fastbf.SharedClassifier(C, K, backend="triton"), torch.randn(N, C)
    assert module.parent_reason() is None
    reason = edit(module).parent_reason()
    assert "of its own" in reason or "hooks" in reason
    with pytest.raises(ValueError, match=reason):
        module.loss(x, torch.zeros(N, dtype=torch.long))
    assert fastbf.explain(module, x, backend="torch").backend == "torch"


def test_a_patch_of_the_class_acts_in_the_loss(monkeypatch):
    module, (x, _, _, y) = fastbf.SharedClassifier(C, K).double(), case()
    before, forward = module.loss(x, y), torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: forward(self, x) * 3)
    torch.testing.assert_close(module.loss(x, y), F.cross_entropy(3 * F.linear(x, module.weight, module.bias), y))
    assert not torch.equal(module.loss(x, y), before)
    monkeypatch.undo()
    assert torch.equal(module.loss(x, y), before)


class Learned(fastbf.SharedClassifier):
    """Computes what belongs to the classes."""

    theta = torch.linspace(-1, 1, K)

    @property
    def log_prior(self):
        return torch.log_softmax(self.theta, 0)

    @property
    def class_weight(self):
        return self.theta.detach() + 2


@pytest.mark.parametrize("hook", [True, False])
def test_values_that_a_subclass_computes_act_in_the_loss(hook):
    x, _, _, y = case(dtype=torch.float32)
    classifier = Learned(C, K)
    if hook:
        classifier.register_forward_hook(lambda module, args, out: out)
    theta = classifier.theta = torch.linspace(-2, 1, K).requires_grad_()
    loss = classifier.loss(x, y)
    expected = F.cross_entropy(classifier(x) + torch.log_softmax(theta, 0), y, theta.detach() + 2)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, theta)[0].any()


class Doubled(fastbf.SharedClassifier):
    """Computes its bias from the parameter of that name."""

    @property
    def bias(self):
        if "bias" not in self._parameters:
            raise AttributeError("bias")
        return 2 * self._parameters["bias"]

    def reset_parameters(self):
        torch.nn.init.normal_(self._parameters["weight"])
        torch.nn.init.normal_(self._parameters["bias"])


def in_the_place_of_the_weight(module):
    vars(module)["weight"] = module.weight.detach() * 3
    return module


@pytest.mark.parametrize(
    "make", [lambda: Doubled(C, K), lambda: in_the_place_of_the_weight(fastbf.SharedClassifier(C, K))]
)
def test_tensors_in_the_place_of_parameters_act_in_the_loss(make):
    module, (x, _, _, y) = make(), case(dtype=torch.float32)
    assert module.parent_reason() is None
    torch.testing.assert_close(module.loss(x, y), F.cross_entropy(module(x), y))


def test_a_part_of_the_weight_is_no_weight():
    """As a library that shards it leaves it outside of its own calls."""
    module = fastbf.SharedClassifier(C, K)
    module.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"must be \(K, C\)|must have"):
        module.loss(torch.randn(N, C), torch.zeros(N, dtype=torch.long))


def test_parametrizations_train():
    module = torch.nn.utils.parametrizations.spectral_norm(fastbf.SharedClassifier(C, K))
    assert module.parent_reason() is None
    module.loss(torch.randn(N, C), torch.zeros(N, dtype=torch.long)).backward()
    assert module.parametrizations.weight.original.grad.abs().max() > 0


@pytest.mark.parametrize("size", [N, 2000])
@pytest.mark.parametrize("ignore_index", [0, 3])
def test_ignored_classes_and_probabilities_exclude_each_other(size, ignore_index, monkeypatch):
    """As in ``F.cross_entropy``, at every size."""
    monkeypatch.setattr(chunked_classifier, "SMALL", 1000)
    x, w, _, y = case(soft=True, n=size)
    with pytest.raises(RuntimeError, match="ignore_index"):
        written_out(x, w, y, ignore_index=ignore_index)
    for backend in ("torch", "triton") if size == N else ("torch",):
        with pytest.raises(ValueError, match="ignore_index must be negative"):
            linear_cross_entropy(x.float(), w.float(), y.float(), ignore_index=ignore_index, backend=backend)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("around", ["reentrant", "not reentrant", "on the CPU"])
def test_hooks_on_saved_tensors_see_what_is_saved_for_backward_alone(few, around, monkeypatch):
    """Forward takes the logits' gradient at once, by autograd, whose own tensors are nobody's business."""
    if not few:
        monkeypatch.setattr(chunked_classifier, "SMALL", 0)
    x, w, b, y = case(dtype=torch.float32)
    calls = []

    def loss(x, w, b):
        calls.append(1)
        return linear_cross_entropy(x, w, y, linear_bias=b, label_smoothing=0.1)

    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    for _ in range(3):  # as written, noted, by a tape
        if around == "on the CPU":
            with torch.autograd.graph.save_on_cpu():
                out = loss(x, w, b)
        else:
            out = checkpoint(loss, x, w, b, use_reentrant=around == "reentrant")
        for t in (x, w, b):
            t.grad = None
        out.backward()
        assert all(torch.equal(t.grad, e) for t, e in zip((x, w, b), expected, strict=True))
    assert len(calls) == (4 if around == "on the CPU" else 7)
