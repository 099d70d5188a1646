"""The tuning sweep: its candidates, and its course on fakes of what needs a GPU."""

import csv
import itertools
import multiprocessing
import types

import pytest
import torch

from bench import tiles, tune
from bench.tiles import HEADS, Case
from bench.tune import Result
from fastbf.kernels import attention
from fastbf.kernels.attention_configs import TABLE, Config, config_for
from tests.kernels.test_attention_configs import A100, B200, H100

BF16 = Case("forward_streaming", 512, 2, 90, 512, 1)
OTHER = Config(64, 32, 128, 8, 2)


def present_choice(case, limits):
    groups = case.positions * HEADS
    return config_for(case.kernel, case.n, case.n, groups, case.head_dim, case.itemsize, limits)


@pytest.mark.parametrize("limits", [A100, H100, B200])
def test_every_case_has_candidates_that_may_run_the_present_choice_first(limits):
    cases = tiles.cases(limits)
    for itemsize in (2, 4):
        assert {case.kernel for case in cases if case.itemsize == itemsize} == {kernel for kernel, _, _ in TABLE}
    for case in cases:
        first, *rest = tiles.candidates(case, limits)
        assert first == present_choice(case, limits)
        assert 5 <= len(rest) < tiles.CANDIDATES
        assert len({first, *rest}) == 1 + len(rest)
        for config in rest:
            assert tiles.shared_memory(case, config, limits) <= limits.shared_memory
            assert tiles.live_values(case, config) <= tiles.LIVE_VALUES
            assert case.packed or max(config.block_m, config.block_n) < 2 * case.n
            assert 16 <= config.block_n <= 128  # what mask_tile can draw
            assert not config.reload or case.kernel in ("backward_query", "backward_key_value")


def test_the_present_choice_is_never_pruned(monkeypatch):
    monkeypatch.setattr(tiles, "fits", lambda *_: False)
    for case in tiles.cases(H100):
        assert tiles.candidates(case, H100) == [present_choice(case, H100)]


def test_what_the_table_holds_passes_the_estimates():
    for (kernel, itemsize, architecture), by_head_dim in TABLE.items():
        for head_dim, configs in by_head_dim.items():
            case = Case(kernel, head_dim, itemsize, architecture, 2 if kernel.endswith("packed") else 4096, 1)
            limits = {80: A100, 90: H100, 100: B200}[architecture]
            assert all(tiles.fits(case, config, limits) for config in configs)


def test_shared_memory_as_compiled_for_sm_90():
    sizes = {Config(16, 64, 128, 8, 2): 149_504, Config(64, 32, 128, 8, 2): 196_608, Config(64, 64, 128, 8, 2): 327_680}
    for config, compiled in sizes.items():  # scratch for a tile of scores is not counted
        assert compiled - 4096 <= tiles.shared_memory(BF16, config, H100) <= compiled


def result(milliseconds, config=OTHER, case=BF16, present=False):
    return Result(*case, config, milliseconds, "", present)


def test_proposals_name_gains_above_three_per_cent_only():
    now = result(0.14, Config(32, 32, 256, 8, 2), present=True)
    assert tune.proposal(now, result(0.136)) == ""
    assert tune.proposal(now, now) == ""
    assert tune.proposal(now, result(0.123)) == (
        '("forward_streaming", 2, 90) head_dim 512, N=512: Config(64, 32, 128, 8, 2)'
        "  # 0.123 ms, now Config(32, 32, 256, 8, 2) 0.14 ms"
    )
    packed, reload = Case("backward_packed", 64, 2, 90, 2, 1064), Config(16, 16, 32, 8, 2, True)
    line = tune.proposal(now._replace(n=2, positions=1064), result(0.1, reload, packed))
    assert line.startswith('("backward_packed", 2, 90) head_dim 64, N=2, L=1064: Config(16, 16, 32, 8, 2, True)  # 0.1')


def test_the_fastest_is_compared_with_the_lesser_time_of_the_present_choice():
    slow, fast = result(3.0, present=True), result(2.0, present=True)
    alone, failed = result(1.0, case=BF16._replace(n=256)), result(None, case=BF16._replace(n=128), present=True)
    assert tune.compared([slow, result(None), result(2.5), alone, failed, fast]) == [(fast, fast)]


class Clock:
    """Stands in for the module ``time``: a second passes whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1
        return self.now


class Builders:
    """Stands in for the pool: builds when asked for the result; ``late`` candidates never come."""

    def __init__(self, clock, late=()):
        self.clock, self.late, self.submitted, self.left = clock, late, [], False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.left = True

    def apply_async(self, function, arguments):
        self.submitted.append(arguments)

        def get(timeout):
            if arguments[1] in self.late:
                self.clock.now += timeout
                raise multiprocessing.TimeoutError
            return function(*arguments)

        return types.SimpleNamespace(get=get)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune, "time", clock)
    return clock


@pytest.fixture
def builders(clock, monkeypatch):
    builders = Builders(clock)
    monkeypatch.setattr(tune, "_pool", lambda: builders)
    return builders


@pytest.fixture
def fakes(builders, monkeypatch):
    """A kernel that differs with 2 warps and does not build with one stage; 4 warps take 1 ms, any other number 2."""

    def problem(case, device):
        out = torch.zeros(8, dtype=torch.bfloat16)
        q = torch.empty(case.n, case.positions, HEADS, case.head_dim, dtype=tune.DTYPES[case.itemsize], device="meta")

        def run():
            config = attention.choose(case.kernel, q, case.n)
            out.fill_(2.0 if config.num_warps == 2 else 1.0)
            return config

        return run, [out]

    monkeypatch.setattr(tune, "_device", lambda: torch.device("cpu"))  # whose limits are those of an H100
    monkeypatch.setattr(tune, "problem", problem)
    monkeypatch.setattr(tune, "build", lambda case, config: "no room" if config.num_stages == 1 else "")
    monkeypatch.setattr(tune, "times", lambda runs, *_: {"": [1e-3 if runs[""]().num_warps == 4 else 2e-3] * 3})


def test_a_sweep_measures_what_builds_and_computes_the_same(fakes, builders, capsys):
    results = list(tune.sweep(0.05, 1e9))
    cases = tiles.cases(H100)
    assert builders.left
    built = [(case.kernel, case.head_dim, case.itemsize, config) for case, config in builders.submitted]
    assert len(built) == len(set(built))  # once, however many lengths it is measured at
    assert all(case.positions == 1 and case.n <= 64 for case, _ in builders.submitted)
    assert list(dict.fromkeys(Case(*r[:6]) for r in results)) == cases
    for case in cases:
        of_case = [r for r in results if Case(*r[:6]) == case]
        configs = tiles.candidates(case, H100)
        assert [r.config for r in of_case] == [*configs, configs[0]]
        assert [r.present for r in of_case] == [True, *[False] * (len(configs) - 1), True]
        for r in of_case:
            expected = 1.0 if r.config.num_warps == 4 else 2.0
            if not r.present and r.config.num_stages == 1:
                assert (r.milliseconds, r.note) == (None, "no room")
            elif (r.config.num_warps == 2) != (configs[0].num_warps == 2):
                assert r.milliseconds is None
                assert r.note.startswith("ArithmeticError: differs from the present choice by ")
            else:
                assert r.milliseconds == expected
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(case) for case in cases]


def test_the_budget_ends_a_sweep_between_candidates(fakes, builders, capsys):
    results = list(tune.sweep(0.05, 20))
    assert builders.left
    assert 10 < len(results) < tiles.CANDIDATES
    assert {Case(*r[:6]) for r in results} == {tiles.cases(H100)[0]}
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_build_that_does_not_come_costs_its_patience_and_no_more_than_the_budget(fakes, builders, clock):
    _, late, *_ = tiles.candidates(tiles.cases(H100)[0], H100)
    builders.late = (late,)
    sweep = tune.sweep(0.05, 100)
    assert next(sweep).milliseconds is not None
    stuck = next(sweep)
    assert (stuck.config, stuck.milliseconds, stuck.note) == (late, None, "not built in 60 s")
    sweep.close()
    assert builders.left
    assert [r.present for r in tune.sweep(0.05, 30)] == [True]


def test_nothing_else_is_measured_where_the_present_choice_cannot_run(fakes, monkeypatch):
    def trial(*_):
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(tune, "Trial", trial)
    results = list(itertools.islice(tune.sweep(0.05, 1e9), 3))
    assert all(r.present and r.milliseconds is None for r in results)
    assert {r.note for r in results} == {"RuntimeError: out of memory"}
    assert len({r[:6] for r in results}) == 3


def test_rows_are_written_as_they_come_and_proposals_printed(tmp_path, capsys):
    path = tmp_path / "new" / "tune.csv"
    given = [result(2.0, Config(16, 64, 128, 8, 2), present=True), result(None)._replace(note="no room"), result(1.0)]

    def results():
        for i, r in enumerate(given):
            yield r
            assert len(path.read_text(encoding="utf-8").splitlines()) == 2 + i

    tune.show(results(), path)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(given)
    assert {"torch", "triton", "device", "date"} <= rows[0].keys()
    assert rows[0]["torch"] == torch.__version__
    assert [row["config"] for row in rows] == ["Config(16, 64, 128, 8, 2)", *2 * ["Config(64, 32, 128, 8, 2)"]]
    assert [row["milliseconds"] for row in rows] == ["2", "", "1"]
    assert [row["present"] for row in rows] == ["True", "False", "False"]
    assert rows[1]["note"] == "no room"
    printed = capsys.readouterr().out
    assert "50.0% less" in printed
    assert tune.proposal(given[0], given[2]) in printed.splitlines()
    tune.show(given[:1], path)
    assert "nothing saves more than 3%" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", tiles.PRODUCTS)
def test_a_kernel_is_built_and_tried(kernel, monkeypatch):
    """The real thing at a small size; fp32, as Triton's interpreter has no bf16 that is right."""
    monkeypatch.setattr(tune, "times", lambda runs, *_: {"": [1.0, 2.0, 4.0]})
    case = Case(kernel, 8, 4, 90, *((2, 3) if kernel.endswith("packed") else (33, 1)))
    config = Config(32, 32, 16, 4, 1)
    assert tune.build(case, config) == ""
    trial = tune.Trial(case, present_choice(case, tune.device_limits(tune._device())))
    assert trial.milliseconds(config, 0.01) == 2000.0
    trial.expected[-1] *= 1.01
    with pytest.raises(ArithmeticError, match="differs from the present choice by"):
        trial.milliseconds(config, 0.01)


def test_a_build_says_why_it_fails(monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("out of resource\nat length")

    monkeypatch.setattr(attention, "launch", refuse)
    assert tune.build(BF16._replace(n=64), OTHER) == "RuntimeError: out of resource"
