"""Committed measurements are replaced on request only, and by what is at least as much."""

import csv

import pytest

from bench import commands, publishing, records, runner
from bench.publishing import Refused
from bench.runner import Plan
from tests.bench.cases import CPU, PLAN, measured, problem

WHERE = records.environment(CPU)._replace(device="a machine", commit="abc1234")
NAME = "step-a-machine.csv"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in the place of ``bench/results``."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(publishing, "RESULTS", folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    """Two measurements of a step."""
    return measured(PLAN)


def written(path, rows, where=WHERE):
    with records.output(path, records.COLUMNS) as put:
        list(records.write(put, where, rows))
    return path


@pytest.mark.parametrize("stem", ["step", "step-a-machine"])
def test_publish_names_the_file_after_command_and_device(stem, results, tmp_path, rows):
    path = written(tmp_path / f"{stem}.csv", rows)
    assert publishing.publish(path) == results / NAME
    assert (results / NAME).read_bytes() == path.read_bytes()


def test_a_fuller_run_replaces_what_is_committed(results, tmp_path, rows):
    publishing.publish(written(tmp_path / "step.csv", rows[:1]))
    publishing.publish(written(tmp_path / "step.csv", rows))
    assert len(records.read([results / NAME])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:1], "1 measurements that are committed would be lost, such as op step, workload cifar100"),
        (lambda rows: [rows[0]._replace(status="failed", note="boom"), rows[1]], "fastbf failed in 1 .*boom"),
        (lambda rows: [rows[0], rows[1]._replace(status="skipped")], "1 measurements .*provider paper, busy 0"),
    ],
    ids=["partial", "failed", "skipped"],
)
def test_what_is_committed_stays(change, message, results, tmp_path, rows):
    publishing.publish(written(tmp_path / "step.csv", rows))
    before = (results / NAME).read_bytes()
    with pytest.raises(Refused, match=message):
        publishing.publish(written(tmp_path / "step.csv", change(rows)))
    assert (results / NAME).read_bytes() == before


@pytest.mark.parametrize("commit", ["abc1234+", "sources 0123456789"])
def test_changed_sources_are_refused(commit, results, tmp_path, rows):
    with pytest.raises(Refused, match=f"not those of a commit .{commit[:7]}"):
        publishing.publish(written(tmp_path / "step.csv", rows, WHERE._replace(commit=commit)))
    assert not list(results.iterdir())


def test_a_machine_without_git_may_have_the_same_sources(results, tmp_path, rows, monkeypatch):
    path = written(tmp_path / "step.csv", rows, WHERE._replace(commit=f"sources {records.sources()}"))
    monkeypatch.setattr(publishing, "commit", lambda: "abc1234+")
    with pytest.raises(Refused, match="not those of a commit"):
        publishing.publish(path)
    monkeypatch.setattr(publishing, "commit", lambda: "abc1234")
    publishing.publish(path)
    assert {row["commit"] for row in records.read([results / NAME])} == {"abc1234"}


def test_other_files_are_refused(results, tmp_path, rows):
    with (tmp_path / "tune.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("device", "kernel"), ("a machine", "forward")])
    with pytest.raises(Refused, match="does not hold the measurements of one device"):
        publishing.publish(tmp_path / "tune.csv")
    both = written(tmp_path / "both.csv", rows).read_text(encoding="utf-8")
    written(tmp_path / "other.csv", rows, WHERE._replace(device="another"))
    text = both + (tmp_path / "other.csv").read_text(encoding="utf-8").partition("\n")[2]
    (tmp_path / "both.csv").write_text(text, encoding="utf-8", newline="")
    with pytest.raises(Refused, match="one device"):
        publishing.publish(tmp_path / "both.csv")


def test_the_plan_tells_what_would_be_lost_before_anything_is_measured():
    wide = Plan(("fastbf-torch", "paper"), ("both",), ("eager",), 0.0)
    cells = [cell for group in runner.cells([problem()], wide) for cell in group]
    every = publishing.planned(map(runner.key, cells), 0, "abc1234")
    publishing.check(every, every)
    with pytest.raises(Refused, match="would be lost"):
        publishing.check(every[1:], every)
    with pytest.raises(Refused, match="would be lost"):
        publishing.check(publishing.planned(map(runner.key, cells), 3, "abc1234"), every)


class TestCommand:
    """``python -m bench step``."""

    RUN = ("step", "--workloads", "cifar100-lt", "--providers", "paper", "fastbf-torch", "--device", "cpu")

    @pytest.fixture(autouse=True)
    def prepared(self, results, tmp_path, monkeypatch):
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        monkeypatch.setattr(commands, "environment", lambda _: WHERE)
        monkeypatch.chdir(tmp_path)

    def test_results_go_to_out(self, results, tmp_path, capsys):
        assert commands.main([*self.RUN, "--seconds", "0.02"]) == 0
        assert not list(results.iterdir())
        assert len(records.read([tmp_path / "out" / NAME])) == 2
        assert f"written to out/{NAME}" in capsys.readouterr().out

    def test_publish(self, results, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(commands, "SECONDS", 0.02)
        assert commands.main([*self.RUN, "--publish", "--out", "new/mine.csv"]) == 0
        assert (results / NAME).read_bytes() == (tmp_path / "new" / "mine.csv").read_bytes()
        assert f"published as {results / NAME}" in capsys.readouterr().out

    def test_publish_measures_nothing_that_it_would_refuse(self, results, tmp_path, capsys, monkeypatch, rows):
        publishing.publish(written(tmp_path / "step.csv", [*rows, rows[0]._replace(workload="czsl")]))
        monkeypatch.setattr("bench.runner.timed", None)
        assert commands.main([*self.RUN, "--publish"]) == 1
        assert "not published: 1 measurements" in capsys.readouterr().err
        monkeypatch.setattr(commands, "environment", lambda _: WHERE._replace(commit="abc1234+"))
        assert commands.main([*self.RUN, "--publish"]) == 1
        assert "not those of a commit" in capsys.readouterr().err
        assert commands.main([*self.RUN, "--publish", "--seconds", "0.02"]) == 1
        assert "for a look only" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_an_empty_run_is_an_error_and_leaves_nothing(self, tmp_path, capsys):
        assert commands.main([*self.RUN, "--max-flops", "1"]) == 1
        out, err = capsys.readouterr()
        assert "skipped: " in out
        assert "written" not in out
        assert err == "\nnot finished: nothing was measured\n"
        assert not list((tmp_path / "out").iterdir())

    def test_report_writes_copies(self, results, tmp_path, capsys, monkeypatch, rows):
        pages = [tmp_path / "README.md"]
        pages[0].write_text("<!-- bench:step -->\n<!-- /bench:step -->\n", encoding="utf-8")
        monkeypatch.setattr(commands, "PAGES", pages)
        path = written(tmp_path / "step.csv", rows)
        assert commands.main(["report", "--csv", str(path), "--out", "seen"]) == 0
        assert "Not measured" not in pages[0].read_text(encoding="utf-8")
        assert "a machine, torch" in (tmp_path / "seen" / "README.md").read_text(encoding="utf-8")
        monkeypatch.setattr(commands, "RESULTS", results)
        assert commands.main(["report", "--publish"]) == 0
        assert "Not measured on a GPU yet." in pages[0].read_text(encoding="utf-8")


class TestList:
    """``python -m bench list``."""

    @pytest.fixture
    def lines(self, monkeypatch, capsys):
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        assert commands.main(["list", "--device", "cpu"]) == 0
        return capsys.readouterr().out.splitlines()

    @staticmethod
    def below(name, lines):
        return lines[next(i for i, line in enumerate(lines) if line.startswith(f"  {name} ")) + 1].strip()

    def test_says_what_keeps_a_provider_from_each_op(self, lines):
        reason = "the op was given tensors on cpu, and Triton's kernels run on CUDA GPUs."
        assert self.below("fastbf", lines) == f"attention, add_norm, activation, layer, loss, step: not here, {reason}"
        assert self.below("fastbf-torch", lines) == "attention, add_norm, activation, layer, loss, step"
        assert self.below("sdpa-math", lines) == "attention, layer, step"
        assert "not here, this backend has no kernel" in self.below("sdpa-cudnn", lines)

    def test_looks_at_a_problem_that_the_provider_is_for(self, lines):
        assert "samples" not in self.below("ffpa", lines)
