"""Bad input: the error's type, and a message that names the argument and what is allowed."""

import pytest
import torch

import fastbf
from fastbf import functional

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
    (lambda: former(batch_dim=2)(X), ValueError, r"batch_dim must lie in \[-2, 1\] for 2-D features, got 2"),
    (lambda: former(channel_dim=-3)(X), ValueError, "channel_dim must lie in"),
    (lambda: former(batch_dim=-1, channel_dim=1)(X), ValueError, "must differ, got -1 and 1"),
    (lambda: former()(X, Y[:4]), ValueError, "targets must have one entry for each of the 6 samples, got 4"),
    (lambda: former()(X, [1, 2]), ValueError, "targets must have one entry for each of the 6 samples, got 2"),
    (lambda: former()(X, torch.tensor(1)), ValueError, "targets must have one entry"),
    (lambda: former()(X, {"a": 1}), TypeError, "targets must be tensors, lists or tuples, got dict"),
    (lambda: former(forked=True)(X[:5]), ValueError, "features must hold both streams along batch_dim=0, got 5"),
    (lambda: former()(X.to("meta")), ValueError, "src must be on the device of the weights, cpu, got meta"),
    # BatchFormerLayer.forward
    (lambda: layer(torch.randn(2, 3, 4, 8)), ValueError, "src must have 2 or 3 dimensions"),
    (lambda: layer(torch.randn(2, 7)), ValueError, "src must have 8 channels"),
    (lambda: layer(Y), TypeError, "src must have a floating-point dtype"),
    # SharedClassifier
    (lambda: classifier()(X[:, :4], Y), ValueError, "features must have 8 channels"),
    (lambda: classifier()(X, Y.float()), TypeError, "target must hold class indices as int64, or probabilities"),
    (lambda: classifier()(X, Y.int()), TypeError, "target must hold class indices as int64"),
    (lambda: classifier()(X, Y[:4]), ValueError, r"target must have shape \(6,\), or \(3,\) for a fork"),
    (lambda: classifier()(X[:5], Y), ValueError, r"target must have shape \(5,\) for an input of 5 rows"),
    (lambda: classifier()(X, torch.rand(6, 4)), ValueError, "probability for each of the 3 classes, got 4"),
    (lambda: classifier()(X, torch.rand(4, 3)), ValueError, r"target must have shape \(6, 3\)"),
    (lambda: classifier()(X, Y + 3), ValueError, r"class indices in \[0, 2\] or ignore_index=-100, got 3"),
    (lambda: classifier()(X, Y - 1), ValueError, "got -1"),
    (lambda: classifier()(X, Y, reduction="max"), ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    (lambda: classifier()(X.to("meta"), Y), ValueError, "features must be on the device of the weights, cpu"),
    (lambda: classifier()(X, Y.to("meta")), ValueError, "target must be on the device of the input, cpu, got meta"),
    (lambda: classifier()(X, [0] * 6), TypeError, "target must be a torch.Tensor, got list"),
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
    (lambda: entropy(w=X[:3].double()), TypeError, "linear_weight must have the dtype of input, torch.float32"),
    (lambda: former()(X.double()), TypeError, "in_proj_weight must have the dtype of x, torch.float64"),
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
