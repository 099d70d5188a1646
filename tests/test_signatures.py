"""A call of a known signature skips checks, and nothing else: a bad call gets its message on any step."""

import pytest
import torch

from fastbf import functional, signatures

N, C, K = 4, 16, 5


def layer_arguments(**changes):
    w = torch.randn
    tensors = {
        "x": w(N, C), "in_proj_weight": w(3 * C, C), "in_proj_bias": w(3 * C), "out_proj_weight": w(C, C),
        "out_proj_bias": w(C), "linear1_weight": w(C, C), "linear1_bias": w(C), "linear2_weight": w(C, C),
        "linear2_bias": w(C), "norm1_weight": w(C), "norm1_bias": w(C), "norm2_weight": w(C), "norm2_bias": w(C),
    }  # fmt: skip
    settings = {"num_heads": 2, "activation": "relu", "dropout_p": 0.5, "eps": 1e-5, "backend": "torch"}
    return {**tensors, **settings, **changes}


def loss_arguments(**changes):
    tensors = {"input": torch.randn(2 * N, C), "linear_weight": torch.randn(K, C), "target": torch.randint(0, K, (N,))}
    settings = {"scale": 1.0, "ignore_index": -100, "label_smoothing": 0.0, "backend": "torch"}
    return {**tensors, **settings, **changes}


BAD_LAYERS = {
    "x": [torch.randn(N, C + 8), torch.randn(C), torch.randint(0, 2, (N, C)), None, torch.randn(N, C).double()],
    "in_proj_weight": [torch.randn(C, C), None, torch.randn(3 * C, C).half()],
    "linear2_bias": [torch.randn(C + 1), "bias"],
    "norm1_weight": [torch.randint(0, 2, (C,)), None],
    "num_heads": [3, True, 2.0, "2", [2]],
    "activation": ["tanh", None, ["relu"]],
    "dropout_p": [1.5, True, "0.5", float("nan"), [0.5]],
    "eps": [float("inf"), float("nan"), True, None],
    "backend": ["cuda", None, ["torch"]],
    "plain": [torch.randn(N + 1, C), torch.randn(N, C + 1)],
    "seed": [1.0, torch.zeros(2, dtype=torch.int64), 2**63],
}
BAD_LOSSES = {
    "input": [torch.randn(2 * N, C + 1), torch.randn(C), None, torch.randn(2 * N + 1, C)],
    "linear_weight": [torch.randn(K, C + 1), torch.randn(C), torch.randn(K, C).half()],
    "target": [torch.full((N,), K), torch.full((N,), -1), torch.zeros(N + 1, dtype=torch.int64), torch.zeros(N).int()],
    "weight": [torch.randn(K + 1)],
    "logit_bias": [torch.randn(K, 1)],
    "scale": [float("inf"), True, None],
    "reduction": ["max", True],
    "ignore_index": [True, 0.5],
    "label_smoothing": [-0.1, True],
    "backend": ["cpu"],
}


def bad(calls):
    return [pytest.param(name, value, id=f"{name}-{i}") for name, values in calls.items()
            for i, value in enumerate(values)]  # fmt: skip


def message(call, arguments):
    with pytest.raises((TypeError, ValueError)) as error:
        call(**arguments)
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), bad(BAD_LAYERS))
def test_layer(name, value):
    first = message(functional.encoder_layer, layer_arguments(**{name: value}))
    for _ in range(3):
        functional.encoder_layer(**layer_arguments())
        assert message(functional.encoder_layer, layer_arguments(**{name: value})) == first


@pytest.mark.parametrize(("name", "value"), bad(BAD_LOSSES))
def test_loss(name, value):
    first = message(functional.linear_cross_entropy, loss_arguments(**{name: value}))
    for _ in range(3):
        functional.linear_cross_entropy(**loss_arguments())
        assert message(functional.linear_cross_entropy, loss_arguments(**{name: value})) == first


def test_a_fork_is_looked_at_every_time():
    for n, fits in ((4, True), (4, True), (3, False), (6, True), (5, False)):
        arguments = layer_arguments(x=torch.randn(n, C), forked=True)
        if fits:
            assert functional.encoder_layer(**arguments).shape == (n, C)
        else:
            assert "two streams" in message(functional.encoder_layer, arguments)


def test_the_backend_is_chosen_again_where_a_kernel_could_not_be_built(monkeypatch):
    """``backend.unbuilt`` forgets what was chosen."""
    from fastbf import backend

    monkeypatch.setattr(backend, "_failed", {})
    arguments = layer_arguments(backend="triton")
    functional.encoder_layer(**arguments)
    functional.encoder_layer(**arguments)
    backend.unbuilt("encoder_layer", torch.device("cpu"), RuntimeError("boom"))
    assert "boom" in message(functional.encoder_layer, arguments)


def test_autocast_and_transforms_are_asked_for_every_time():
    arguments = layer_arguments(x=torch.randn(N, C, dtype=torch.bfloat16), dropout_p=0.0)
    for _ in range(2):
        assert "dtype" in message(functional.encoder_layer, arguments)
        with torch.autocast("cpu", torch.bfloat16):
            functional.encoder_layer(**arguments)
    arguments = layer_arguments(backend="triton", dropout_p=0.0)
    for _ in range(2):
        functional.encoder_layer(**arguments)
        with pytest.raises(ValueError, match=r"transform of torch.func"):
            torch.func.jvp(
                lambda x: functional.encoder_layer(**{**arguments, "x": x}), (arguments["x"],) * 1, (arguments["x"],)
            )


def test_bounded(monkeypatch):
    monkeypatch.setattr(signatures, "MOST", 5)
    for width in range(1, 20):
        functional.linear_cross_entropy(**loss_arguments(linear_weight=torch.randn(K + width, C)))
    assert len(signatures._found) == 5


class Doubled(torch.Tensor):
    """A tensor that kernels do not see through."""


@pytest.mark.parametrize("first", [True, False])
def test_types_of_tensors_count(first):
    plain = loss_arguments(backend="triton")
    other = {**plain, "linear_weight": plain["linear_weight"].as_subclass(Doubled)}
    for arguments in ([plain, other] if first else [other, plain]) * 2:
        if arguments is other:
            assert "Doubled" in message(functional.linear_cross_entropy, arguments)
        else:
            functional.linear_cross_entropy(**arguments)


def test_who_chose_counts(monkeypatch):
    """A kernel that cannot be built is an error for "triton" and a warning for "auto", whichever came first."""
    from fastbf import backend
    from fastbf.triton_backend import encoder_layer

    def unbuilt(*_, **__):
        raise encoder_layer.BuildError("boom")

    seen, arguments = [], layer_arguments()
    monkeypatch.setattr(functional, "give_up", lambda choice, *_, **__: seen.append(choice))
    monkeypatch.setattr(encoder_layer, "encoder_layer", unbuilt)
    chosen = [choices["encoder_layer"] for choices in (backend._CHOSEN, backend._ASKED_FOR, backend._CHOSEN)]
    for choice in chosen:
        functional.encoder_layer(**{**arguments, "backend": choice})
    assert all(found is choice for found, choice in zip(seen, chosen, strict=True))


def test_new_signatures_do_not_recompile():
    """What eager calls add is no part of a graph."""
    from fastbf import BatchFormer, SharedClassifier

    former, classifier = BatchFormer(C, 2), SharedClassifier(C, K)
    batches = [(torch.randn(n, C), torch.randint(0, K, (n,))) for n in (4, 5, 6)]
    classifier.loss(former(batches[0][0]), batches[0][1])
    step = torch.compile(lambda x, y: classifier.loss(former(x), y), backend="eager")
    step(*batches[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for x, y in batches[1:]:
            classifier.loss(x, y)
            step(*batches[0])
