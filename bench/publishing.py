"""Committed measurements: what may take the place of a file in ``bench/results``, and what may not."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from bench.records import COLUMNS, RESULTS, Record, Row, commit, file_name, output, read, slug, sources

#: What tells one measurement from another.
_KEY = ("op", "workload", "dtype", "dropout", "mode", "capture", "provider", "busy")


class Refused(Exception):
    """Why measurements are not published, in a sentence."""


def check(rows: Iterable[Row], earlier: Iterable[Row]) -> None:
    """Accepts rows that may take the place of earlier ones.

    Raises:
        Refused: nothing is measured, fastbf failed, the sources had changes that are not committed, or a measurement of
            the earlier rows would be lost.
    """
    rows = list(rows)
    if not _measured(rows):
        raise Refused("nothing was measured")
    if failed := [r for r in rows if r["status"] == "failed" and str(r["provider"]).startswith("fastbf")]:
        raise Refused(f"fastbf failed in {len(failed)} measurements, the first: {failed[0]['note']}")
    for source in {str(r["commit"]) for r in rows}:
        if source.endswith("+") or " " in source:
            raise Refused(f"the sources are not those of a commit ({source}): commit them and measure again")
    if lost := _measured(earlier) - _measured(rows):
        example = ", ".join(f"{name} {value}" for name, value in zip(_KEY, min(lost, key=str), strict=True))
        raise Refused(f"{len(lost)} measurements that are committed would be lost, such as {example}")


def _measured(rows: Iterable[Row]) -> set[tuple[object, ...]]:
    return {tuple(r[name] for name in _KEY) for r in rows if r["status"] == "measured"}


def committed(name: str) -> list[Row]:
    """The rows of a committed file; none if there is no such file."""
    path = RESULTS / name
    return read([path]) if path.is_file() else []


def planned(keys: Iterable[tuple[object, ...]], busy: int, source: str) -> list[Row]:
    """The rows that a run leaves if all goes well. ``keys`` are the first fields of records, ``source`` the commit."""
    made: Row = {"busy": float(busy), "status": "measured", "commit": source}
    return [dict(zip(Record._fields, key, strict=False)) | made for key in keys]


def publish(path: Path, name: str | None = None) -> Path:
    """Copies a run's CSV into ``bench/results``; returns where it lies.

    Without a name it has the file's, a command, and its device's. A file from a machine without git is taken if its
    sources are those of the commit here.

    Raises:
        Refused: as :func:`check`; the file holds no measurements, or those of several devices.
    """
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    if tuple(header) != COLUMNS or len(devices := {line[0] for line in lines}) != 1:
        raise Refused(f"{path} does not hold the measurements of one device")
    here, column = commit(), COLUMNS.index("commit")
    for line in lines:
        if line[column] == f"sources {sources()}" and not here.endswith("+"):
            line[column] = here
    device = devices.pop()
    target = RESULTS / (name or file_name(path.stem.removesuffix(f"-{slug(device)}"), device))
    rows = [{**row, "commit": line[column]} for row, line in zip(read([path]), lines, strict=True)]
    check(rows, committed(target.name))
    with output(target, COLUMNS) as put:
        for line in lines:
            put(line)
    return target
