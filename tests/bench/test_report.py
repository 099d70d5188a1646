"""Tables and pictures come from CSV files alone."""

import re
from itertools import product

import pytest

from bench import pictures, records, report
from bench.providers import PROVIDERS
from bench.workloads import BY_NAME
from tests.bench.cases import CPU, ROOT

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
        workloads = {"cifar100-lt": 128, "imagenet-lt-256": 256}
        for (workload, n), (name, ms) in product(workloads.items(), {"fastbf-torch": 1.0, "paper": 2.0}.items()):
            key = ("step", workload, n, 1, 2048, 1000, "fp32", 0.5, "both", "eager", name)
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
    def test_the_rest_of_a_page_stays_whatever_the_locale(self, newline, tmp_path, cp1252):
        """Of the project's own, byte for byte, and of what is not UTF-8; what is filled in is UTF-8."""

        def around(text):
            return re.sub(rb"(?s)(<!-- bench:(\w+) -->).*?<!-- /bench:\2 -->", rb"\1", text)

        launch = self.rows(tmp_path / "a.csv")[0]._replace(op="launch", mode="host")
        with records.output(tmp_path / "host.csv", records.COLUMNS) as put:
            list(records.write(put, records.environment(CPU)._replace(device="a machine"), [launch]))
        readme = tmp_path / "README.md"
        page = (ROOT / "docs" / "benchmarks.md").read_bytes().replace(b"\n", newline.encode())
        before = page + b"caf\xe9, then no newline"
        readme.write_bytes(before)
        report.make([tmp_path / "host.csv"], [readme], tmp_path)
        after = readme.read_bytes()
        assert around(after) == around(before)
        assert "| what | launches | other, µs | fastbf, µs | fastbf ÷ other |".encode() in after
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

    def test_pictures_are_of_small_batches_too(self, tmp_path, monkeypatch):
        """Of whole computations on an idle machine, at the paper's rate of dropout."""
        paths = self.steps(
            tmp_path / "a.csv",
            ("small-16-64", 0.5, 0, {"paper": 1.0}),
            *(("large-1024-512", rate, n, {"paper": 1.0, "products": 1.0}) for rate in (0.5, 0.1) for n in (0, 1)),
        )
        seen = []
        monkeypatch.setattr(pictures, "draw", lambda rows, _: seen.extend(rows) or [])
        report.make(paths, [], tmp_path)
        assert [(r["workload"], r["dropout"], r["busy"], r["provider"]) for r in seen] == [
            ("small-16-64", 0.5, 0, "paper"),
            ("large-1024-512", 0.5, 0, "paper"),
        ]

    def test_pictures_show_all_of_every_panel(self, tmp_path, monkeypatch):
        """The axis that panels share reaches from 0 over the largest value, in whichever panel it is."""
        limits = {}

        def savefig(figure, path, **_):
            limits[path.name.partition("-")[0]] = [ax.get_ylim() for ax in figure.axes]

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
        times = {"fastbf-torch": 1.0, "paper": 2.0}
        paths = self.steps(
            tmp_path / "a.csv",
            ("small-16-64", 0.5, 0, times),
            ("small-64-64", 0.5, 0, times),
            ("large-1024-512", 0.5, 0, {"fastbf-torch": 1.0, "paper": 9.0}),
            ("large-4096-512", 0.5, 0, {"fastbf-torch": 1.0, "paper": 5.0}),
        )
        report.make(paths, [], tmp_path)
        assert {name: len(panels) for name, panels in limits.items()} == {"speed": 2, "share": 2, "memory": 2}
        for name, largest in {"speed": 9, "share": 50, "memory": 100}.items():
            assert all(low == 0 and high > largest for low, high in limits[name]), (name, limits[name])

    def test_the_latest_machine(self, tmp_path):
        path, paths = tmp_path / "rows.csv", []
        self.rows(path)
        for name, date in (("a later machine", "2026-02-01"), ("z machine", "2026-01-31")):
            made = re.sub(r"\d{4}-\d\d-\d\d", date, path.read_text(encoding="utf-8")).replace("a machine", name)
            paths.append(tmp_path / f"{date}.csv")
            paths[-1].write_text(made, encoding="utf-8")
        readme = tmp_path / "README.md"
        readme.write_text(README.replace("bench:step", "bench:latest"), encoding="utf-8")
        report.make(paths, [readme], tmp_path)
        text = readme.read_text(encoding="utf-8")
        assert "a later machine, torch" in text
        assert "z machine, torch" not in text

    def test_docs_without_a_measurement(self, tmp_path):
        """As they are before anything is measured; the project's own have every block."""
        docs = tmp_path / "docs.md"
        docs.write_text(DOCS, encoding="utf-8")
        report.make([], [docs], tmp_path)
        assert docs.read_text(encoding="utf-8").count("Not measured yet.") == len(report.FALLBACK)
        own = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/benchmarks.md"))
        blocks = ["latest", "pictures", "memory", "loss", "host", *report.FALLBACK]
        assert sorted(re.findall(r"<!-- bench:(\w+) -->", own)) == sorted(blocks)

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
