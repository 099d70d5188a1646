"""The host's times: what is timed is the same computation, both ways are measured or say why not."""

import subprocess
from contextlib import nullcontext

import pytest
import torch

from bench import commands, driver, host, patterns, publishing, records, report
from bench.patterns import PATTERNS
from tests.bench.cases import CPU, in_ascii


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_compute_what_the_papers_code_does(name, monkeypatch):
    monkeypatch.setattr(patterns, "DROPOUT", 0.0)
    found = []
    tensors = patterns.given(CPU, torch.float32)
    for build in (PATTERNS[name].fastbf, PATTERNS[name].paper):
        torch.manual_seed(1)
        call = build(tensors)
        out = call.forward()
        found.append([out, *torch.autograd.grad(out, call.leaves, torch.ones_like(out) / 7)])
    assert len(found[0]) == len(found[1]) > 2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def record(*key, status="measured", note=""):
    milliseconds = [0.5 if "fastbf" in key else 1.0] * 3 if status == "measured" else [None] * 3
    return records.Record(*key, status, note, *milliseconds, 10, None, 0, 0, *[None] * 5)


@pytest.fixture
def stand_in(monkeypatch):
    """Nothing is compiled or timed on the stand-in."""
    made = [record(*key) for key in host.planned() if host.HOST in key]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "device", lambda: nullcontext(CPU))
    monkeypatch.setattr(host, "_measured", lambda *_: iter(made))
    return made


def test_without_a_compiler(stand_in, monkeypatch, tmp_path, capsys):
    """A row for each measurement that is left out says why, and one line on the terminal."""
    monkeypatch.setattr(driver, "_compiler", lambda: None)
    assert commands.main(["host", "--seconds", "0", "--out", str(tmp_path / "host.csv")]) == 0
    rows = records.read([tmp_path / "host.csv"])
    left_out = [r for r in rows if r["mode"] == host.LAUNCHER]
    assert len(rows) - len(left_out) == len(left_out) == len(stand_in)
    assert {(r["status"], r["note"]) for r in left_out} == {
        ("skipped", "no C compiler builds the libcuda that does nothing")
    }
    shown = capsys.readouterr().out
    assert shown.count("no C compiler") == len(host.CASES)
    assert shown.count("0.50") == len(host.CASES)


@pytest.mark.skipif(driver.obstacle() is not None, reason=str(driver.obstacle()))
def test_a_process_that_fails(stand_in, monkeypatch):
    """An error, after the rows that there are."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which that process refuses
    run, found = host.measure(0.0), []
    with pytest.raises(subprocess.CalledProcessError):
        found.extend(run)
    assert found == stand_in


@pytest.mark.slow
@pytest.mark.skipif(driver.obstacle() is not None, reason=str(driver.obstacle()))
def test_both_ways(tmp_path):
    """Every row that is promised is measured, what is compared in turns."""
    result = in_ascii("-m", "bench", "host", "--seconds", "0", "--out", tmp_path / "host.csv")
    assert result.returncode == 0, result.stderr
    rows = records.read([tmp_path / "host.csv"])
    assert [tuple(r[name] for name in publishing._KEY[:-1]) for r in rows] == [
        tuple(records.Record(*key, *[None] * 14)._asdict()[name] for name in publishing._KEY[:-1])
        for key in host.planned()
    ]
    assert all(r["status"] == "measured" and r["p50_ms"] > 0 for r in rows)


def test_publishing_is_refused_before_anything_is_measured(stand_in, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(records, "commit", lambda: "abc1234+")
    monkeypatch.setattr(host, "measure", lambda _: pytest.fail("measured"))
    assert commands.main(["host", "--publish", "--out", str(tmp_path)]) == 1
    assert "not published: the sources are not those of a commit (abc1234+)" in capsys.readouterr().err


def test_report(tmp_path):
    """Ours beside the other, with the quotient of both ways."""
    path = tmp_path / "host.csv"
    where = records.environment(CPU)._replace(device="a machine")
    with records.output(path, records.COLUMNS) as put:
        list(records.write(put, where, [record(*key) for key in host.planned()]))
    lines = report._block("host", records.read([path]), []).splitlines()
    assert len(lines) == 2 + len(list(host.planned())) // 2 + 4
    assert "| launch, fp32 | on the stand-in | 1,000 (triton) | 500 | 0.50 |" in lines
    assert "| step, amp | by Triton's launcher | 1,000 (paper) | 500 | 0.50 |" in lines
    assert set(report.LAUNCHED) == {host.HOST, host.LAUNCHER}
