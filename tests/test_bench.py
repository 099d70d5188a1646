"""The benchmarks count right, compare before they time, and report what they could not do."""

import csv
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command_line
from bench import counts, limits, pictures, records, report, runner, timing
from bench.ops import MODES, OPS, Problem, compulsory_bytes
from bench.providers import PROVIDERS, Case, Traits, Unavailable, differs, timed
from bench.runner import Plan
from bench.workloads import BY_NAME, WORKLOADS, Workload

CPU = torch.device("cpu")
SMALL = Workload("cifar100-lt", 24, 64, 10)
DENSE = Workload("v2-detr", 2, 64, positions=5)
PLAN = Plan(("fastbf-torch", "paper"), ("both",), ("eager",), seconds=0.0)


def problem(op="step", workload=SMALL, dtype="fp32", dropout=0.5):
    return Problem(op, workload, dtype, CPU, dropout)


def measured(plan=PLAN, *problems):
    return list(runner.measure(runner.cells(list(problems) or [problem()], plan), plan, lambda _: None))


class Stub:
    """A provider of the loss that does what a test says."""

    name, about, ops, traits = "stub", "", ("loss",), Traits()

    def __init__(self, function):
        self.function = function

    def case(self, problem, inputs):
        return Case(lambda: self.function(problem, inputs), inputs.leaves)


@pytest.fixture
def stub(monkeypatch):
    def install(function):
        monkeypatch.setitem(PROVIDERS, "stub", Stub(function))
        return measured(PLAN._replace(providers=("stub", "paper")), problem("loss"))

    yield install
    runner._differs.cache_clear()


def loss_of(inputs, bias=True):
    (x, w, b), y = inputs.leaves, inputs.target
    return nn.functional.cross_entropy(x @ w.mT + b * bias, torch.cat([y, y]))


class TestWorkloads:
    def test_names_are_unique(self):
        assert len(BY_NAME) == len(WORKLOADS)

    @pytest.mark.parametrize("w", WORKLOADS, ids=lambda w: w.name)
    def test_reduced_ones_take_the_same_path(self, w):
        small = w.reduced()
        assert (small.n <= 32) == (w.n <= 32)
        assert (small.c, small.ops) == (w.c, w.ops)


class TestOps:
    @pytest.mark.parametrize("op", ["layer", "step", "loss"])
    def test_flops_are_those_of_the_products(self, op):
        """Forward to the last; backward too, but for the scores that fused attention computes again."""
        w, p = SMALL, problem(op)
        case = PROVIDERS["paper"].case(p, p.inputs())
        with FlopCounterMode(display=False) as forward:
            out = case.forward()
        assert forward.get_total_flops() == OPS[op].flops(w, "forward")
        with FlopCounterMode(display=False) as backward:
            case.gradients(out, torch.ones_like(out))
        again = 0.0 if op == "loss" else 2.0 * w.n**2 * w.c
        assert backward.get_total_flops() == OPS[op].flops(w, "backward") - again

    def test_bytes_of_an_op_in_place_of_many(self):
        """x is read and y written forward; x and dy are read and dx written backward."""
        p = problem("activation")
        inputs = p.inputs()
        each = SMALL.n * SMALL.c * 4
        sizes = [compulsory_bytes(inputs, each, mode) for mode in MODES]
        assert sizes == [2 * each, 3 * each, 5 * each]


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

    @pytest.mark.parametrize("name", ["fastbf", "fastbf-torch"])
    def test_compute_the_same_of_dense_features(self, name):
        assert differs(PROVIDERS[name], PROVIDERS["paper"], problem("step", DENSE).reduced()) == ""

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


class TestRunner:
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
        """In a process that has imported nothing else: ours and the paper's code are measured."""
        rows = tmp_path / "rows.csv"
        what = [command, "--workloads", "cifar100-lt", "--providers", "fastbf-torch", "paper", "--csv", str(rows)]
        what += ["--seconds", "0.02"] if command == "step" else []
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        result = subprocess.run(
            [sys.executable, "-m", "bench", *what, "--device", "cpu"],
            cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        assert [line.split(",").count("measured") for line in rows.read_text().splitlines()[1:]] == [1, 1]

    def test_our_failure_is_an_error(self, monkeypatch, tmp_path):
        def fail(*_):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr("bench.runner.timed", fail)
        monkeypatch.setattr(command_line.triton.knobs.runtime, "interpret", False)
        what = ["--workloads", "cifar100-lt", "--seconds", "0.02", "--device", "cpu", "--csv", str(tmp_path / "r.csv")]
        for provider, status in (("paper", 0), ("fastbf-torch", 1)):
            arguments = command_line._parser().parse_args(["step", *what, "--providers", provider])
            assert arguments.run(arguments) == status

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


class TestCounts:
    def test_launches_of_a_step(self):
        """As many as ``test_launches.py`` counts, and two for the casts of autocast."""
        step = counts.step("fastbf", BY_NAME["imagenet-lt-256"])
        assert len(step.forward) == 12 + 2
        assert len(step.backward) == 20 - 1  # but for the first gradient

    @pytest.mark.parametrize("provider", ["fastbf", "paper"])
    @pytest.mark.parametrize("name", ["imagenet-lt-256", "v2-deit-s", "v2-detr", "large-32768-2048"])
    def test_flops(self, provider, name):
        """Those of the formula; our backward computes the scores twice, in one kernel for dq and one for dk and dv."""
        w = BY_NAME[name]
        step = counts.step(provider, w)
        again = 4.0 * w.n**2 * w.c * w.positions if provider == "fastbf" and w.n > 32 else 0.0
        assert sum(i.flops for i in step.forward) == OPS["step"].flops(w, "forward")
        assert sum(i.flops for i in step.backward) == OPS["step"].flops(w, "backward") + again

    def test_fewer_bytes_than_the_papers(self):
        for w in WORKLOADS:
            if "step" in w.ops:
                ours, theirs = (counts.step(name, w) for name in ("fastbf", "paper"))
                assert sum(i.bytes for i in ours.all) < sum(i.bytes for i in theirs.all)

    def test_no_step_is_under_the_floor(self, capsys):
        for w in WORKLOADS:
            if "step" in w.ops:
                assert limits.floor(w, limits.H100) <= limits.seconds(counts.step("fastbf", w).all, limits.H100)
        limits.show([BY_NAME["czsl"]])
        assert "COMPUTED, NOT MEASURED" in capsys.readouterr().out


README = """before
<!-- bench:step -->
old
<!-- /bench:step -->
between
<!-- bench:pictures -->
<!-- /bench:pictures -->
"""


class TestReport:
    def rows(self, path, device_type="cpu"):
        """Two workloads of two sizes, made up: ours twice as fast."""
        where = records.environment(CPU)._replace(device="a machine", device_type=device_type)
        made = []
        for n, (name, ms) in product((128, 256), {"fastbf-torch": 1.0, "paper": 2.0}.items()):
            key = ("step", f"imagenet-lt-{n}", n, 1, 2048, 1000, "fp32", 0.5, "both", "eager", name)
            made.append(records.Record(*key, "measured", "", ms, ms, ms, 5, 3.5, 1e9, 1e6, 1.0, 1.0, 9.0, 9.0, 0.5))
        return list(records.write(path, where, made))

    def test_csv_round_trip(self, tmp_path):
        made = self.rows(tmp_path / "a.csv")
        (first, *_), found = made, records.read([tmp_path / "a.csv"])
        assert len(found) == len(made)
        assert found[0]["p50_ms"] == first.p50_ms
        assert found[0]["workload"] == first.workload
        assert found[0]["date"]

    def test_a_run_cut_short_leaves_its_rows(self, tmp_path):
        where, (first, *_) = records.environment(CPU), self.rows(tmp_path / "a.csv")
        rows = records.write(tmp_path / "b.csv", where, iter([first, first]))
        next(rows)
        with (tmp_path / "b.csv").open() as file:
            assert len(list(csv.reader(file))) == 2

    def test_fills_the_readme(self, tmp_path):
        self.rows(tmp_path / "a.csv")
        readme = tmp_path / "README.md"
        readme.write_text(README)
        written = report.make([tmp_path / "a.csv"], readme, tmp_path)
        text = readme.read_text()
        assert "old" not in text
        assert text.startswith("before\n")
        assert "geometric mean |  |  |  | 2.00 |  |  | 2.00 |" in text
        assert "a machine, torch" in text
        assert "Not measured on a GPU yet." in text
        assert len(written) == 4
        for picture in written[1:]:
            assert picture.stat().st_size > 10_000
            assert f"]({picture.name})" in text
        once = readme.read_text()
        report.make([tmp_path / "a.csv"], readme, tmp_path)
        assert readme.read_text() == once

    def test_a_gpu_comes_first(self, tmp_path):
        self.rows(tmp_path / "a.csv")
        self.rows(tmp_path / "b.csv", "cuda")
        block = report._block("step", records.read([tmp_path / "a.csv", tmp_path / "b.csv"]), [])
        assert "Not measured on a GPU" not in block

    def test_no_figure_without_a_measurement(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(README)
        assert report.make([], readme, tmp_path) == [readme]
        assert "Not measured on a GPU yet." in readme.read_text()

    def test_every_provider_of_a_step_has_a_colour(self):
        assert {name for name, p in PROVIDERS.items() if "step" in p.ops} == set(pictures.STYLES)
        assert len(set(pictures.STYLES.values())) == len(pictures.STYLES)
