"""The runner compares before it times, and reports what it could not do."""

import pytest
import torch
from torch import nn

from bench import commands, records, runner, test_ops, timing
from bench.providers import PROVIDERS
from bench.workloads import BY_NAME
from tests.bench.cases import CPU, PLAN, SMALL, Stub, in_ascii, measured, problem


def loss_of(inputs, bias=True):
    (x, w, b), y = inputs.leaves, inputs.target
    return nn.functional.cross_entropy(x @ w.mT + b * bias, torch.cat([y, y]))


class TestRunner:
    def test_products_are_not_compared(self, monkeypatch):
        """They are measured all the same, but not in one direction, and not under pytest-benchmark."""
        monkeypatch.setattr(runner, "_differs", lambda provider, _: pytest.fail(f"{provider.name} was compared"))
        plan = PLAN._replace(providers=("products",), modes=("both", "forward"))
        both, forward = measured(plan, problem(), problem("loss"))
        assert (both.status, both.peak_mib, forward.status) == ("measured", None, "skipped")
        assert both.p50_ms > 0
        assert "products" not in test_ops.NAMES

    def test_measures(self):
        ours, paper = measured()
        assert (ours.provider, paper.provider) == ("fastbf-torch", "paper")
        for r in (ours, paper):
            assert r.status == "measured"
            assert 0 < r.p20_ms <= r.p50_ms <= r.p80_ms
            assert r.share > 0
            assert r.peak_mib > 0

    def test_compares_before_it_times(self, stub):
        wrong, paper = stub(lambda _, inputs: loss_of(inputs, bias=False))
        assert wrong.status == "skipped"
        assert "not the same computation" in wrong.note
        assert paper.status == "measured"

    @pytest.mark.parametrize("command", ["step", "memory"])
    def test_as_a_user_runs_it(self, command, tmp_path):
        """In a process that has imported nothing else: ours and the paper's code are measured, on any terminal."""
        rows = tmp_path / "rows.csv"
        what = [command, "--workloads", "cifar100-lt", "--providers", "fastbf-torch", "paper", "--out", str(rows)]
        what += ["--seconds", "0.02"] if command == "step" else []
        result = in_ascii("-m", "bench", *what, "--device", "cpu")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "paper \\xf7" in result.stdout
        assert [row["status"] for row in records.read([rows])] == ["measured", "measured"]

    def test_rates_and_busy_processes(self, monkeypatch, tmp_path):
        """Every rate of a step, one of the loss, which has none; the file of a busy run is another one."""
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        what = ["--workloads", "small-16-64", "--providers", "paper", "--seconds", "0.02", "--device", "cpu"]
        what += ["--dropout", "0.5", "0.1", "--out", str(tmp_path)]
        for command, rates, busy in (
            (["step"], [0.5, 0.1], 0), (["step", "--busy", "1"], [0.5, 0.1], 1), (["op", "loss"], [0.0], 0),
            (["memory"], [0.5, 0.1], 0),
        ):  # fmt: skip
            assert commands.main([*command, *what]) == 0
            (path,) = tmp_path.glob("*.csv")
            assert path.name.startswith(f"{command[0]}-busy-" if busy else f"{command[0]}-")
            assert ("busy" in path.name) == (busy > 0)
            assert [(row["dropout"], row["busy"]) for row in records.read([path])] == [(rate, busy) for rate in rates]
            path.unlink()

    @pytest.mark.parametrize(("failing", "status"), [("liger", 0), ("fastbf-torch", 1)])
    def test_our_failure_is_an_error(self, failing, status, monkeypatch, tmp_path, capsys):
        """A peer's is a row and no more."""

        def fail(*_):
            raise RuntimeError("broken on purpose")

        monkeypatch.setitem(PROVIDERS, failing, Stub(fail))
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        what = ["--workloads", "cifar100-lt", "--seconds", "0.02", "--device", "cpu", "--out", str(tmp_path / "r.csv")]
        assert commands.main(["op", "loss", *what, "--providers", "paper", failing]) == status
        assert ("broken on purpose" in capsys.readouterr().err) == (status == 1)
        assert [row["status"] for row in records.read([tmp_path / "r.csv"])] == ["measured", "failed"]

    @pytest.mark.parametrize(
        ("error", "note"), [(torch.OutOfMemoryError("9 GiB"), "out of memory"), (KeyError("head 7"), "head 7")]
    )
    def test_a_failure_is_a_row(self, error, note, stub):
        def fails(p, inputs):
            if p.workload == SMALL.reduced() and p.dropout == 0:
                return loss_of(inputs)
            raise error

        failed, paper = stub(fails)
        assert failed.status == "failed"
        assert note in failed.note
        assert failed.p50_ms is None
        assert paper.status == "measured"

    def test_says_what_it_skips(self):
        skipped = measured(PLAN._replace(max_flops=1.0, captures=("eager", "graph")))
        assert {r.status for r in skipped} == {"skipped"}
        assert any("--max-flops" in r.note for r in skipped)
        assert any("CUDA graphs" in r.note for r in skipped)

    def test_memory_alone(self):
        ours, paper = measured(PLAN._replace(timed=False), problem(workload=BY_NAME["cifar100-lt"]))
        assert ours.p50_ms is paper.p50_ms is None
        assert 0 < ours.peak_mib < paper.peak_mib

    def test_turns(self):
        """On a CPU all have had as many calls."""
        calls = dict.fromkeys("ab", 0)

        def count(name):
            calls[name] += 1

        taken = timing.times({name: lambda name=name: count(name) for name in calls}, CPU, 0.01)
        assert calls["a"] == calls["b"] == len(taken["a"]) + 1
