"""What is written can be read again, in any locale."""

import os

import pytest

from bench import commands, host, records, runner


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
        what = [command, "--out", str(path)] + ["loss"] * (command == "op")
        what += [] if command == "host" else ["--workloads", "cifar100-lt", "--device", "cpu"]
        what += [] if command == "memory" else ["--seconds", "0.02"]
        with pytest.raises(KeyboardInterrupt):
            commands.main(what)
        assert path.read_bytes() == earlier
        assert "not finished: nothing was measured" in capsys.readouterr().err

    def test_nothing_to_measure_is_no_run(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(commands.triton.knobs.runtime, "interpret", False)
        path = tmp_path / "a.csv"
        assert commands.main(["op", "loss", "--workloads", "v2-detr", "--out", str(path)]) == 2
        assert not path.exists()
        assert "nothing to measure" in capsys.readouterr().err
