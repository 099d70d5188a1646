"""``python -m fastbf``: the environment, the backend of every op and why, and a self-check against fp64."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

import fastbf
from fastbf import functional, reference
from fastbf.backend import OPS, explain
from fastbf.environment import device_name, version


def _cases(device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """(what, op, its reference, fp64 inputs): both are called with the inputs, the reference always in fp64."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    qkv = [normal(67, 4, 32) for _ in range(3)]
    yield (
        "batch_attention",
        functional.batch_attention,
        lambda q, k, v: reference.attention(q, k, v, scale=q.shape[-1] ** -0.5),
        qkv,
    )
    shapes = [(192, 64), (192,), (64, 64), (64,), (128, 64), (128,), (64, 128), (64,)] + [(64,)] * 4
    layer = [normal(67, 64), *(normal(*s) / 8 for s in shapes)]
    yield (
        "encoder_layer",
        lambda x, *w: functional.encoder_layer(x, *w, num_heads=4),
        lambda x, *w: reference.encoder_layer(
            x, reference.LayerWeights(*w), num_heads=4, activation="relu", norm_first=False, eps=1e-5
        ),
        layer,
    )
    yield (
        "dropout_add_layer_norm",
        lambda *t: functional.dropout_add_layer_norm(*t, dropout_p=0.0, eps=1e-5),
        lambda *t: reference.dropout_add_layer_norm(*t, eps=1e-5),
        [normal(67, 65), normal(67, 65), normal(65), normal(65)],
    )
    yield (
        "activation_dropout",
        lambda x: functional.activation_dropout(x, "gelu", dropout_p=0.0),
        lambda x: reference.activation_dropout(x, "gelu"),
        [normal(67, 65)],
    )
    target = torch.arange(33, device=device) % 11
    yield (
        "linear_cross_entropy",
        lambda x, w: functional.linear_cross_entropy(x, w, target),
        lambda x, w: reference.linear_cross_entropy_terms(x, w, target.repeat(2))[0].loss.mean(),
        [normal(66, 64), normal(11, 64)],
    )


def _gradients(op: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = op(*inputs)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def _worst(results: list[Tensor], exact: list[Tensor]) -> float:
    """Largest relative error, in the Euclidean norm, of any output or gradient."""
    return max(((r.double() - e).norm() / e.norm()).item() for r, e in zip(results, exact, strict=True))


def self_check(device: torch.device) -> bool:
    """Outputs and gradients against fp64, held to twice eager PyTorch's own error; 16-bit dtypes on a GPU too."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32,)
    good = True
    for (name, op, oracle, inputs), dtype in product(_cases(device), dtypes):
        rounded = [x.to(dtype) for x in inputs]
        exact = _gradients(oracle, [x.double() for x in rounded])
        error, eager = _worst(_gradients(op, rounded), exact), _worst(_gradients(oracle, rounded), exact)
        passed = error <= 2 * eager + torch.finfo(dtype).eps
        good &= passed
        kind = str(dtype).removeprefix("torch.")
        print(f"  {name:<24} {kind:<9} error {error:.1e}, eager PyTorch's {eager:.1e}: {'ok' if passed else 'FAILED'}")
    return good


def main() -> int:
    """Prints the report; the exit status is 0 if the self-check passes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"fastbf {fastbf.__version__}, Python {platform.python_version()}, {platform.system()}")
    print(f"torch {torch.__version__}, triton {version('triton')}")
    print(f'device: {device.type}, {device_name(device)}\n\nbackend="auto" chooses')
    sample = torch.empty(2, 8, device=device)
    for op in OPS:
        print(f"  {op:<24} {explain(op, sample)}")
    print("\nself-check, outputs and gradients against fp64")
    good = self_check(device)
    print("\neverything is in order" if good else "\nself-check FAILED: please report this with the lines above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
