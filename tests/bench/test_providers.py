"""Providers compute the same before anything is timed."""

from itertools import product

import pytest
import torch
from torch import nn

from bench import counts
from bench.ops import MODES, OPS
from bench.providers import PROVIDERS, Unavailable, differs, timed
from tests.bench.cases import DENSE, POOLED, SMALL, problem

SERVED = [
    (op, name)
    for op, name in product(OPS, ("fastbf", "fastbf-torch", "compile", "sdpa-math", "F.linear_cross_entropy"))
    if op in PROVIDERS[name].ops
]


class TestProviders:
    @pytest.mark.parametrize(("op", "name"), SERVED)
    def test_compute_the_same(self, op, name):
        assert differs(PROVIDERS[name], PROVIDERS["paper"], problem(op).reduced()) == ""

    @pytest.mark.parametrize("dtype", ["bf16", "fp16", "amp"])
    @pytest.mark.parametrize("op", OPS)
    def test_compute_the_same_in_16_bits(self, op, dtype):
        """Rounding flips signs that ReLU looks at, which must not be taken for another computation."""
        assert differs(PROVIDERS["fastbf-torch"], PROVIDERS["paper"], problem(op, dtype=dtype).reduced()) == ""

    @pytest.mark.parametrize("w", [DENSE, POOLED], ids=["fork", "classes"])
    @pytest.mark.parametrize("name", ["fastbf", "fastbf-torch", "compile", "sdpa-math"])
    def test_compute_the_same_of_dense_features(self, name, w):
        assert differs(PROVIDERS[name], PROVIDERS["paper"], problem("step", w).reduced()) == ""

    def test_dense_features_of_the_papers_step(self):
        """Attention along the batch, then the mean over positions, written out."""
        p = problem("step", POOLED, dropout=0.0)
        case = PROVIDERS["paper"].case(p, p.inputs())
        x, *parameters, w, b = case.leaves
        layer = nn.TransformerEncoderLayer(POOLED.c, 4, POOLED.c, 0.0)
        layer.load_state_dict(dict(zip(layer.state_dict(), parameters, strict=True)))
        mixed = torch.stack([layer(x[:, i : i + 1])[:, 0] for i in range(POOLED.positions)], dim=1)
        rows, y = torch.cat([x.mean(1), mixed.mean(1)]), p.inputs().target
        torch.testing.assert_close(case.forward(), nn.functional.cross_entropy(rows @ w.mT + b, torch.cat([y, y])))

    @pytest.mark.parametrize("w", [SMALL, POOLED, DENSE], ids=lambda w: w.name)
    def test_products_are_those_of_a_step(self, w):
        """All of them, the scores once, and nothing else."""
        p = problem("step", w)
        run = timed(PROVIDERS["products"].case(p, p.inputs()), "both").run
        with counts.Counter() as counter:
            run()
        made = counter.take()
        assert sum(i.flops for i in made) == OPS["step"].flops(w, "both") - 2.0 * w.n**2 * w.c * w.positions
        assert {i.name for i in made} == {"addmm", "mm", "bmm"}

    @pytest.mark.parametrize("name", ["compile-max", "liger", "cut-cross-entropy", "ffpa"])
    def test_say_why_they_cannot_serve(self, name):
        op = PROVIDERS[name].ops[-1]
        p = problem(op)
        with pytest.raises(Unavailable, match=r"GPU|installed|head dimension"):
            PROVIDERS[name].case(p, p.inputs())

    @pytest.mark.parametrize("mode", MODES)
    def test_modes(self, mode):
        p = problem("loss")
        case = PROVIDERS["paper"].case(p, p.inputs())
        run = timed(case, mode).run
        for _ in range(2):
            result = run()
            assert len(result) == 3 if mode != "forward" else result.requires_grad
