"""Ops count their FLOPs and bytes right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.ops import MODES, OPS, compulsory_bytes
from bench.providers import PROVIDERS
from tests.bench.cases import POOLED, SMALL, problem


class TestOps:
    @pytest.mark.parametrize("w", [SMALL, POOLED], ids=lambda w: w.name)
    @pytest.mark.parametrize("op", ["layer", "step", "loss"])
    def test_flops_are_those_of_the_products(self, op, w):
        """Forward to the last; backward too, but for the scores that fused attention computes again."""
        p = problem(op, w)
        case = PROVIDERS["paper"].case(p, p.inputs())
        with FlopCounterMode(display=False) as forward:
            out = case.forward()
        assert forward.get_total_flops() == OPS[op].flops(w, "forward")
        with FlopCounterMode(display=False) as backward:
            case.gradients(out, torch.ones_like(out))
        again = 0.0 if op == "loss" else 2.0 * w.n**2 * w.c * w.positions
        assert backward.get_total_flops() == OPS[op].flops(w, "backward") - again

    def test_bytes_of_an_op_in_place_of_many(self):
        """x is read and y written forward; x and dy are read and dx written backward."""
        p = problem("activation")
        inputs = p.inputs()
        each = SMALL.n * SMALL.c * 4
        sizes = [compulsory_bytes(inputs, each, mode) for mode in MODES]
        assert sizes == [2 * each, 3 * each, 5 * each]
