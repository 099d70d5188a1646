"""Fixtures of the tests of benchmarks."""

import io

import pytest

from bench import runner
from bench.providers import PROVIDERS
from tests.bench.cases import PLAN, Stub, measured, problem


@pytest.fixture
def cp1252(monkeypatch):
    """What a program opens without naming an encoding is read and written as on a Windows of western Europe."""

    def opened(file, mode="r", buffering=-1, encoding=None, *rest, **options):
        legacy = "b" not in mode and encoding in (None, "locale")
        return io_open(file, mode, buffering, "cp1252" if legacy else encoding, *rest, **options)

    io_open = io.open
    monkeypatch.setattr("io.open", opened)
    monkeypatch.setattr("builtins.open", opened)


@pytest.fixture
def stub(monkeypatch):
    def install(function):
        monkeypatch.setitem(PROVIDERS, "stub", Stub(function))
        return measured(PLAN._replace(providers=("stub", "paper")), problem("loss"))

    yield install
    runner._differs.cache_clear()
