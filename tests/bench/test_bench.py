"""The benchmarks count right, compare before they time, and report what they could not do."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    commands,
    counts,
    host,
    limits,
    pictures,
    records,
    report,
    runner,
    targets,
    test_ops,
    timing,
    workloads,
)
from bench.busy import busy_processes
from bench.ops import MODES, OPS, Problem, compulsory_bytes
from bench.providers import PROVIDERS, Case, Traits, Unavailable, differs, timed
from bench.runner import Plan
from bench.workloads import BY_NAME, WORKLOADS, Workload

CPU = torch.device("cpu")
SMALL = Workload("cifar100-lt", 24, 64, 10)
DENSE = Workload("v2-detr", 2, 64, positions=5)
POOLED = Workload("small-v2-16-65-64", 24, 64, 10, positions=5)
PLAN = Plan(("fastbf-torch", "paper"), ("both",), ("eager",), seconds=0.0)
ROOT = Path(__file__).parents[2]


def problem(op="step", workload=SMALL, dtype="fp32", dropout=0.5):
    return Problem(op, workload, dtype, CPU, dropout)


def measured(plan=PLAN, *problems):
    return list(runner.measure(runner.cells(list(problems) or [problem()], plan), plan, lambda _: None))


def in_ascii(*arguments):
    """Python, run where neither files nor standard output hold more than ASCII unless asked to, and nothing is set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def cp1252(monkeypatch):
    """What a program opens without naming an encoding is read and written as on a Windows of western Europe."""

    def opened(file, mode="r", buffering=-1, encoding=None, *rest, **options):
        legacy = "b" not in mode and encoding in (None, "locale")
        return io_open(file, mode, buffering, "cp1252" if legacy else encoding, *rest, **options)

    io_open = io.open
    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)


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

    def test_tables(self):
        """Of docs/benchmarks.md: (N, L, C, K)."""

        def sizes(names):
            return [(w.n, w.positions, w.c, w.k) for w in map(BY_NAME.get, names)]

        assert sizes(workloads.SMALL) == [
            (16, 1, 64, 10), (64, 1, 64, 10), (128, 1, 64, 100), (128, 1, 128, 100), (256, 1, 64, 100),
            (32, 1, 512, 100), (128, 1, 512, 1000), (512, 1, 64, 100), (1024, 1, 512, 1000), (16, 65, 64, 10),
            (32, 197, 192, 100), (2, 500, 256, 91),
        ]  # fmt: skip
        assert sizes(workloads.LARGE) == [
            (128, 1, 512, 1000), (1024, 1, 512, 1000), (4096, 1, 512, 1000), (512, 1, 512, 8142), (256, 1, 2048, 1000)
        ]  # fmt: skip
        assert set(workloads.BUSY) < set(workloads.SMALL)


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
        what = [command, "--workloads", "cifar100-lt", "--providers", "fastbf-torch", "paper", "--csv", str(rows)]
        what += ["--seconds", "0.02"] if command == "step" else []
        result = in_ascii("-m", "bench", *what, "--device", "cpu")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "paper \\xf7" in result.stdout
        assert [row["status"] for row in records.read([rows])] == ["measured", "measured"]

    def test_rates_and_busy_processes(self, monkeypatch, tmp_path):
        """Every rate of a step, one of the loss, which has none; the file of a busy run is another one."""
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(commands, "RESULTS", tmp_path)
        what = ["--workloads", "small-16-64", "--providers", "paper", "--seconds", "0.02", "--device", "cpu"]
        what += ["--dropout", "0.5", "0.1"]
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

    def test_our_failure_is_an_error(self, monkeypatch, tmp_path):
        def fail(*_):
            raise RuntimeError("broken on purpose")

        monkeypatch.setattr("bench.runner.timed", fail)
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        what = ["--workloads", "cifar100-lt", "--seconds", "0.02", "--device", "cpu", "--csv", str(tmp_path / "r.csv")]
        for provider, status in (("paper", 0), ("fastbf-torch", 1)):
            assert commands.main(["step", *what, "--providers", provider]) == status

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


#: A process that starts another one and is killed.
KILLED = """
import os, signal
from bench.busy import busy_processes

with busy_processes(1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


class TestBusy:
    """Processes keep the CPU busy as long as something is timed, however that ends."""

    @pytest.fixture
    def started(self, monkeypatch):
        class Popen(subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                processes.append(self)

        processes = []
        monkeypatch.setattr(subprocess, "Popen", Popen)
        return processes

    def test_spin(self):
        """In this session, with which they share the processor, whatever Ctrl-C says."""
        before = os.times().children_user
        with busy_processes(2) as processes:
            time.sleep(0.5)
            for process in processes:
                process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            assert [p.poll() for p in processes] == [None, None]
            assert {os.getsid(p.pid) for p in processes} == {os.getsid(0)}
        assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2
        assert os.times().children_user > before + 0.05

    @pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
    def test_while_something_is_timed(self, error, started, monkeypatch):
        def times(runs, *_):
            running.extend(p.poll() for p in started)
            if error:
                raise error
            return {name: [1.0] for name in runs}

        running = []
        monkeypatch.setattr(timing, "times", times)
        with pytest.raises(KeyboardInterrupt) if error is KeyboardInterrupt else nullcontext():
            rows = measured(PLAN._replace(busy=2), problem("loss"))
            assert {(r.status, r.busy) for r in rows} == {("failed" if error else "measured", 2)}
        assert running == [None, None]
        assert [p.returncode for p in started] == [-signal.SIGKILL] * 2

    def test_none_unless_asked_for(self, started):
        assert {r.busy for r in measured(PLAN, problem("loss"))} == {0}
        assert not started

    def test_end_with_the_process_that_started_them(self):
        """They hold its standard output, which is read to the end."""
        result = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, timeout=60, check=False)
        assert result.returncode == -signal.SIGKILL


class TestTargets:
    @pytest.fixture
    def attempts(self, monkeypatch):
        """Ratios of workloads, by attempt, in the place of measurements; what was measured comes back."""

        def install(*ratios):
            def pairs(problems, plan):
                names = [p.workload.name for p in problems]
                seen.append((names, plan.busy))
                now = ratios[len(seen) - 1]
                return [(SimpleNamespace(p50_ms=1.0), SimpleNamespace(p50_ms=now[name])) for name in names]

            monkeypatch.setattr(targets, "pairs", pairs)
            return seen

        seen = []
        return install

    PROBLEMS = (problem(), problem(workload=DENSE))
    A, B = SMALL.name, DENSE.name

    def test_what_is_slow_is_measured_again(self, attempts):
        seen = attempts({self.A: 0.9, self.B: 2.0}, {self.A: 0.8}, {self.A: 1.0})
        targets.hold(self.PROBLEMS, 1.0, busy=3)
        assert seen == [([self.A, self.B], 3), ([self.A], 3), ([self.A], 3)]

    def test_all_are_where_the_mean_is_too_low(self, attempts):
        """One that was quick enough once may be slow by then."""
        seen = attempts({self.A: 1.1, self.B: 1.2}, {self.A: 0.9, self.B: 3.0})
        targets.hold(self.PROBLEMS, 1.0, 1.4)
        assert seen == [([self.A, self.B], 0)] * 2

    @pytest.mark.parametrize("slow", [{A: 0.9, B: 9.0}, {A: 1.1, B: 1.2}], ids=["worst", "mean"])
    def test_three_times_at_most(self, slow, attempts):
        seen = attempts(slow, slow, slow)
        with pytest.raises(pytest.fail.Exception, match="geometric mean"):
            targets.hold(self.PROBLEMS, 1.0, 1.4)
        assert len(seen) == 3

    def test_every_rate(self):
        found = [(p.workload.name, p.dropout) for p in targets.steps(workloads.SMALL)]
        assert found == list(product(workloads.SMALL, (0.5, 0.1)))

    def test_measures_ours_and_the_papers(self, capsys):
        ((ours, paper),) = targets.pairs([problem()], targets.PLAN._replace(timed=False))
        assert (ours.provider, paper.provider) == ("fastbf-torch", "paper")
        assert ours.peak_mib > 0
        assert paper.peak_mib > 0


class TestCounts:
    def test_launches_of_a_step(self):
        """As many as ``test_launches.py`` counts, and two for the casts of autocast."""
        step = counts.step("fastbf", BY_NAME["imagenet-lt-256"])
        assert len(step.forward) == 12 + 2
        assert len(step.backward) == 20 - 1  # but for the first gradient

    @pytest.mark.parametrize("provider", ["fastbf", "paper"])
    @pytest.mark.parametrize(
        "name", ["imagenet-lt-256", "v2-deit-s", "v2-detr", "large-32768-2048", "small-v2-32-197-192"]
    )
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

DOCS = "next\n".join(f"<!-- bench:{name} -->\nold\n<!-- /bench:{name} -->\n" for name in report.FALLBACK)


class TestReport:
    def rows(self, path, device_type="cpu"):
        """Two workloads of two sizes, made up: ours twice as fast."""
        where = records.environment(CPU)._replace(device="a machine", device_type=device_type)
        made = []
        for n, (name, ms) in product((128, 256), {"fastbf-torch": 1.0, "paper": 2.0}.items()):
            key = ("step", f"imagenet-lt-{n}", n, 1, 2048, 1000, "fp32", 0.5, "both", "eager", name)
            made.append(records.Record(*key, "measured", "", ms, ms, ms, 5, 3.5, 1e9, 1e6, 1.0, 1.0, 9.0, 9.0, 0.5))
        with records.output(path, records.COLUMNS) as put:
            return list(records.write(put, where, made))

    def test_csv_round_trip(self, tmp_path):
        made = self.rows(tmp_path / "a.csv")
        (first, *_), found = made, records.read([tmp_path / "a.csv"])
        assert len(found) == len(made)
        assert found[0]["p50_ms"] == first.p50_ms
        assert found[0]["workload"] == first.workload
        assert found[0]["date"]

    def test_fills_the_readme(self, tmp_path):
        self.rows(tmp_path / "a.csv")
        readme = tmp_path / "README.md"
        readme.write_text(README, encoding="utf-8")
        written = report.make([tmp_path / "a.csv"], [readme], tmp_path)
        text = readme.read_text(encoding="utf-8")
        assert "old" not in text
        assert text.startswith("before\n")
        assert "geometric mean |  |  |  | 2.00 |  |  | 2.00 |" in text
        assert "a machine, torch" in text
        assert "Not measured on a GPU yet." in text
        assert len(written) == 4
        for picture in written[1:]:
            assert picture.stat().st_size > 10_000
            assert f"]({picture.name})" in text
        report.make([tmp_path / "a.csv"], [readme], tmp_path)
        assert readme.read_text(encoding="utf-8") == text

    @pytest.mark.parametrize("newline", ["\n", "\r\n"])
    def test_the_rest_of_the_readme_stays_whatever_the_locale(self, newline, tmp_path, cp1252):
        """Of the project's own, byte for byte, and of what is not UTF-8; what is filled in is UTF-8."""

        def around(text):
            return re.sub(rb"(?s)(<!-- bench:(\w+) -->).*?<!-- /bench:\2 -->", rb"\1", text)

        launch = self.rows(tmp_path / "a.csv")[0]._replace(op="launch", mode="host")
        with records.output(tmp_path / "host.csv", records.COLUMNS) as put:
            list(records.write(put, records.environment(CPU)._replace(device="a machine"), [launch]))
        readme = tmp_path / "README.md"
        before = (ROOT / "README.md").read_bytes().replace(b"\n", newline.encode()) + b"caf\xe9, then no newline"
        readme.write_bytes(before)
        report.make([tmp_path / "host.csv"], [readme], tmp_path)
        after = readme.read_bytes()
        assert around(after) == around(before)
        assert "| what | by | host time, µs |".encode() in after
        assert b"a machine, torch" in after
        assert after.count(b"\n") == after.count(newline.encode())

    def test_a_rewrite_that_fails_leaves_the_readme(self, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError("no space left on device")

        readme = tmp_path / "README.md"
        readme.write_text(README, encoding="utf-8")
        monkeypatch.setattr("shutil.copymode", fail)
        with pytest.raises(OSError, match="no space"):
            report.make([], [readme], tmp_path)
        assert readme.read_text(encoding="utf-8") == README
        assert list(tmp_path.iterdir()) == [readme]

    def test_a_rewrite_keeps_links_and_permissions(self, tmp_path):
        readme, link = tmp_path / "README.md", tmp_path / "link.md"
        readme.write_text(README, encoding="utf-8")
        readme.chmod(0o640)
        link.symlink_to(readme)
        report.make([], [link], tmp_path)
        assert link.is_symlink()
        assert readme.stat().st_mode & 0o777 == 0o640
        assert "old" not in readme.read_text(encoding="utf-8")

    def steps(self, path, *made):
        """Rows, made up: (workload, dropout, busy, {provider: milliseconds})."""
        rows = [
            records.Record(
                "step", name, w.n, w.positions, w.c, w.k, "fp32", rate, "both", "eager", provider, "measured", "",
                ms, ms, ms, 5, 3.5, 1e9, 1e6, 1.0, 1.0, 9.0, 9.0, 0.5, busy,
            )
            for name, rate, busy, times in made for w in [BY_NAME[name]] for provider, ms in times.items()
        ]  # fmt: skip
        with records.output(path, records.COLUMNS) as put:
            list(records.write(put, records.environment(CPU)._replace(device="a machine"), rows))
        return [path]

    def test_fills_the_docs(self, tmp_path):
        """Idle rows apart from those beside busy processes; in the README neither these nor small ones or products."""
        paths = self.steps(
            tmp_path / "a.csv",
            ("large-1024-512", 0.5, 0, {"fastbf-torch": 4.0, "paper": 6.0, "products": 2.0}),
            ("small-16-64", 0.1, 0, {"fastbf-torch": 1.0, "paper": 3.0}),
            ("small-16-64", 0.5, 0, {"fastbf-torch": 2.0, "paper": 4.0, "compile": 3.0, "products": 1.0}),
            ("small-16-64", 0.5, 3, {"fastbf-torch": 7.0, "paper": 77.0}),
            ("large-1024-512", 0.1, 0, {"paper": 6.0}),
        )
        readme, docs = tmp_path / "README.md", tmp_path / "docs.md"
        readme.write_text(README, encoding="utf-8")
        docs.write_text(DOCS, encoding="utf-8")
        assert report.make(paths, [readme, docs], tmp_path) == [readme, docs]
        small, large, busy = docs.read_text(encoding="utf-8").split("next\n")
        lines = [line for line in small.splitlines() if line.startswith("| ")][2:]
        assert lines == [
            "| small-16-64: N=16 C=64 K=10 | 0.5 | 4 | 2 | 2.00 | 3 | 1 | 2.00 |",
            "| small-16-64: N=16 C=64 K=10 | 0.1 | 3 | 1 | 3.00 |  |  |  |",
            "| large-1024-512: N=1024 C=512 K=1000 | 0.5 | 6 | 4 | 1.50 |  | 2 | 2.00 |",
            "| geometric mean; worst | 0.5 |  |  | 1.73; 1.50 |  |  |  |",
            "| geometric mean; worst | 0.1 |  |  | 3.00; 3.00 |  |  |  |",
            "| geometric mean; worst | all |  |  | 2.08; 1.50 |  |  |  |",
        ]
        assert "a machine, torch" in small
        assert "GPU" not in small
        assert "small-16-64" not in large
        assert "| 0.5 | 6 | 4 | 1.50 |  | 2 | 2.00 |" in large
        assert "| small-16-64: N=16 C=64 K=10 | 0.5 | 77 | 7 | 11.00 |  |  |  |" in busy
        assert "large-1024-512" not in busy
        assert "a machine, beside 3 busy processes, torch" in busy
        step = [line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
        assert [line.partition(" | fp32 | ")[2] for line in step] == [
            "6 | 4 | 1.50 | 6 (paper) | 4 (fastbf-torch) | 1.50 | 50% |"
        ]

    def test_pictures_are_of_the_readmes_rows(self, tmp_path, monkeypatch):
        paths = self.steps(
            tmp_path / "a.csv",
            ("small-16-64", 0.5, 0, {"paper": 1.0}),
            *(("large-1024-512", rate, n, {"paper": 1.0, "products": 1.0}) for rate in (0.5, 0.1) for n in (0, 1)),
        )
        seen = []
        monkeypatch.setattr(pictures, "draw", lambda rows, _: seen.extend(rows) or [])
        report.make(paths, [], tmp_path)
        assert [(r["workload"], r["dropout"], r["busy"], r["provider"]) for r in seen] == [
            ("large-1024-512", 0.5, 0, "paper")
        ]

    def test_docs_without_a_measurement(self, tmp_path):
        """As they are before anything is measured; the project's own have every block."""
        docs = tmp_path / "docs.md"
        docs.write_text(DOCS, encoding="utf-8")
        report.make([], [docs], tmp_path)
        assert docs.read_text(encoding="utf-8").count("Not measured yet.") == len(report.FALLBACK)
        own = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
        assert re.findall(r"<!-- bench:(\w+) -->", own) == list(report.FALLBACK)

    def test_files_without_a_column_for_busy_processes(self, tmp_path):
        """As earlier versions wrote them."""
        (path,) = self.steps(tmp_path / "a.csv", ("small-16-64", 0.5, 3, {"paper": 1.0}))
        lines = [line.rpartition(",")[0] for line in path.read_text(encoding="utf-8").splitlines()]
        old = tmp_path / "old.csv"
        old.write_text("\n".join(lines), encoding="utf-8")
        assert [row["busy"] for row in records.read([path, old])] == [3, 0]

    def test_a_gpu_comes_first(self, tmp_path):
        self.rows(tmp_path / "a.csv")
        self.rows(tmp_path / "b.csv", "cuda")
        block = report._block("step", records.read([tmp_path / "a.csv", tmp_path / "b.csv"]), [])
        assert "Not measured on a GPU" not in block

    def test_no_figure_without_a_measurement(self, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text(README, encoding="utf-8")
        assert report.make([], [readme], tmp_path) == [readme]
        assert "Not measured on a GPU yet." in readme.read_text(encoding="utf-8")

    def test_every_provider_of_a_step_has_a_colour(self):
        shown = {name for name, p in PROVIDERS.items() if "step" in p.ops and not p.traits.unchecked}
        assert shown == set(pictures.STYLES)
        assert len(set(pictures.STYLES.values())) == len(pictures.STYLES)


class TestOutput:
    """Rows outlive a run that is stopped, and those of an earlier run outlive it too."""

    COLUMNS = ("name", "value")

    def put(self, path, *rows, stop=None):
        with records.output(path, self.COLUMNS) as put:
            for row in rows:
                put(row)
            if stop:
                raise stop

    def test_rows_are_there_as_soon_as_they_are_measured(self, tmp_path):
        with records.output(tmp_path / "new" / "a.csv", self.COLUMNS) as put:
            put(("one", 1))
            assert (tmp_path / "new" / "a.csv").read_bytes() == b"name,value\r\none,1\r\n"

    def test_a_run_that_is_stopped_leaves_its_rows(self, tmp_path, capsys):
        path = tmp_path / "a.csv"
        with pytest.raises(KeyboardInterrupt):
            self.put(path, ("one", 1), stop=KeyboardInterrupt())
        assert path.read_text(encoding="utf-8").split() == ["name,value", "one,1"]
        assert capsys.readouterr().err == f"\nnot finished: what was measured is in {path}\n"

    @pytest.mark.parametrize("stop", [KeyboardInterrupt(), runner.DeviceLost(), KeyError()], ids=type)
    def test_earlier_rows_stay_until_new_ones_are_complete(self, stop, tmp_path, capsys):
        path = tmp_path / "a.csv"
        self.put(path, ("one", 1))
        earlier = path.read_bytes()
        with pytest.raises(type(stop)):
            self.put(path, ("two", 2), stop=stop)
        assert path.read_bytes() == earlier
        (partial,) = tmp_path.glob("*.partial")
        assert partial.read_text(encoding="utf-8").split() == ["name,value", "two,2"]
        assert capsys.readouterr().err == f"\nnot finished: what was measured is in {partial}\n"
        self.put(path, ("three", 3))
        assert path.read_text(encoding="utf-8").split() == ["name,value", "three,3"]

    @pytest.mark.parametrize("earlier", [True, False])
    def test_nothing_measured_leaves_nothing(self, earlier, tmp_path, capsys):
        path = tmp_path / "a.csv"
        if earlier:
            self.put(path, ("one", 1))
        before = [(p, p.read_bytes()) for p in tmp_path.iterdir()]
        with pytest.raises(KeyboardInterrupt):
            self.put(path, stop=KeyboardInterrupt())
        assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == before
        assert capsys.readouterr().err == "\nnot finished: nothing was measured\n"

    def test_a_later_run_leaves_the_rows_of_one_that_was_stopped(self, tmp_path, monkeypatch):
        path = tmp_path / "a.csv"
        self.put(path, ("one", 1))
        for process in (1, 2):
            monkeypatch.setattr("os.getpid", lambda process=process: process)
            with pytest.raises(KeyboardInterrupt):
                self.put(path, ("two", process), stop=KeyboardInterrupt())
        assert len(list(tmp_path.glob("*.partial"))) == 2

    def test_links_and_pipes_stay_what_they_are(self, tmp_path):
        link, path = tmp_path / "link.csv", tmp_path / "a.csv"
        self.put(path, ("one", 1))
        link.symlink_to(path)
        self.put(link, ("two", 2))
        assert link.is_symlink()
        assert path.read_text(encoding="utf-8").split() == ["name,value", "two,2"]
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
            self.put(pipe, ("three", 3))
            assert reader.read() == b"name,value\r\nthree,3\r\n"
        assert pipe.is_fifo()

    def test_in_utf8_whatever_the_locale_and_the_message(self, tmp_path, cp1252):
        path = tmp_path / "a.csv"
        self.put(path, ("µ", "→ caf\udce9"))
        assert path.read_bytes() == "name,value\r\nµ,→ caf\\udce9\r\n".encode()
        ((row),) = records.read([path])
        assert row["name"] == "µ"

    @pytest.mark.parametrize("command", ["step", "op", "memory", "host"])
    def test_every_command_keeps_earlier_rows(self, command, tmp_path, monkeypatch, capsys):
        def stopped(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr("bench.runner.timed", stopped)
        monkeypatch.setattr(host, "measure", stopped)
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        path = tmp_path / "a.csv"
        self.put(path, ("one", 1))
        earlier = path.read_bytes()
        what = [command, "--csv", str(path)] + ["loss"] * (command == "op")
        what += [] if command == "host" else ["--workloads", "cifar100-lt", "--device", "cpu"]
        what += [] if command == "memory" else ["--seconds", "0.02"]
        with pytest.raises(KeyboardInterrupt):
            commands.main(what)
        assert path.read_bytes() == earlier
        assert "not finished: nothing was measured" in capsys.readouterr().err

    def test_nothing_to_measure_is_no_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        path = tmp_path / "a.csv"
        assert commands.main(["op", "loss", "--workloads", "v2-detr", "--csv", str(path)]) == 2
        assert not path.exists()
        assert "nothing to measure" in capsys.readouterr().err


#: Runs ``python -m bench``; the second case to be timed sends the process what Ctrl-C does.
STOPPED = """
import os, runpy, signal
from bench import providers, runner

def timed(case, mode, timed=runner.timed):
    calls.append(mode)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return timed(case, mode)

calls, runner.timed = [], timed
runpy.run_module("bench", run_name="__main__")
"""

#: The same while PyTorch is imported, where exceptions are caught.
IMPORTING = """
import os, runpy, signal, sys, time

class Finder:
    def find_spec(name, *_):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException:
                pass

sys.meta_path.insert(0, Finder)
runpy.run_module("bench", run_name="__main__")
"""


class TestEntry:
    """What the process does, whatever the command."""

    def test_ctrl_c(self, tmp_path):
        """At the second of two modes: one line, the status of a process that was interrupted, the first's row."""
        path = tmp_path / "a.csv"
        path.write_text("earlier", encoding="utf-8")
        what = ["op", "loss", "--modes", "forward", "both", "--workloads", "cifar100-lt", "--providers", "paper"]
        what += ["--seconds", "0.02", "--device", "cpu", "--csv", path]
        result = in_ascii("-c", STOPPED, *what)
        assert result.returncode == 130, result.stderr
        (partial,) = tmp_path.glob("*.partial")
        assert result.stderr == f"\nnot finished: what was measured is in {partial}\n"
        assert [row["mode"] for row in records.read([partial])] == ["forward"]
        assert path.read_text(encoding="utf-8") == "earlier"

    def test_ctrl_c_while_it_is_imported(self):
        result = in_ascii("-c", IMPORTING, "list")
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "")

    @pytest.mark.parametrize("command", [("list",), ("limits", "--workloads", "czsl")])
    def test_escapes_what_standard_output_lacks(self, command):
        result = in_ascii("-m", "bench", *command)
        assert result.returncode == 0, result.stderr
        assert "\\" in result.stdout

    def test_standard_output_may_be_closed(self):
        result = subprocess.run(
            ["sh", "-c", f"{sys.executable} -m bench limits --workloads czsl >&-"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr

    def test_examples_too(self):
        result = in_ascii("examples/compositional_zero_shot.py", "--help")
        assert result.returncode == 0, result.stderr
        assert "digits \\xd7 attributes" in result.stdout

    def test_setup_reads_utf8(self):
        result = in_ascii("setup.py", "--name")
        assert result.returncode == 0, result.stderr
        assert result.stdout.split()[-1] == "fastbf"
