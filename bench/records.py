"""Measurements as rows of a tidy CSV."""

from __future__ import annotations

import csv
import datetime
import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, get_type_hints

import torch

from fastbf.environment import device_name, version

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


class Environment(NamedTuple):
    """Where and when something was measured."""

    device: str
    device_type: str
    driver: str
    cuda: str
    torch: str
    triton: str
    python: str
    commit: str
    date: str


class Record(NamedTuple):
    """One measurement, or the note why there is none. Times in milliseconds, rates and memory as their names say."""

    op: str
    workload: str
    n: int
    positions: int
    c: int
    k: int
    dtype: str
    dropout: float
    mode: str  #: forward, backward or both; of the host's times, which way launches go (``bench/host.py``)
    capture: str  #: eager, or graph where a CUDA graph was replayed
    provider: str
    status: str  #: measured, skipped or failed
    note: str
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    calls: int
    peak_mib: float | None
    flops: float  #: of the matrix products
    bytes: float  #: that must be read and written
    gbytes_per_s: float | None  #: the latter over the median
    tflops_per_s: float | None
    copy_gbytes_per_s: float | None  #: the ceilings, measured in the same run
    product_tflops_per_s: float | None
    share: float | None  #: of the median, what the ceilings allow at best
    busy: int = 0  #: other processes that kept the CPU busy


COLUMNS = (*Environment._fields, *Record._fields)
_NUMBERS = {name for name, kind in get_type_hints(Record).items() if kind is not str}
Row = dict[str, object]
Put = Callable[..., None]  #: writes a row; a second argument says whether it holds a measurement


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def commit() -> str:
    """The commit, with a plus if what is measured is not as it holds it; without git, a digest of the sources."""
    git = ["git", "-C", str(ROOT)]
    status = ["status", "--porcelain", "fastbf", "kernels", "bench", ":!bench/results"]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, *status], capture_output=True, text=True, check=True)
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return f"sources {sources()}"


def sources() -> str:
    """A digest of the package's files."""
    digest = hashlib.sha1()
    own = [path for path in ROOT.glob("fastbf/**/*.py") if "kernels" not in path.relative_to(ROOT).parts]  # a link
    for path in sorted((*own, *ROOT.glob("kernels/*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]


def environment(device: torch.device) -> Environment:
    """Of this run."""
    return Environment(
        device_name(device), device.type, _driver() if device.type == "cuda" else "", torch.version.cuda or "",
        torch.__version__, version("triton"), platform.python_version(), commit(), str(datetime.date.today()),
    )  # fmt: skip


def file_name(command: str, device: str) -> str:
    """One for each command and device: a later run replaces it once it is complete."""
    return f"{command}-{slug(device)}.csv"


def slug(device: str) -> str:
    """A device's name as part of a file's."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


class NothingMeasured(RuntimeError):
    """A run ended, and no provider could serve anything."""


@contextmanager
def output(path: Path, columns: Iterable[str]) -> Iterator[Put]:
    """Writes a CSV file, each row at once, so that a run cut short leaves what it had, and says where that lies.

    Where an earlier run's file is, rows go to one beside it, which takes its place when it is complete: until then the
    earlier rows are all there are. The name is this process's own, as what an earlier run left there may be all it had.

    Raises:
        NothingMeasured: no row holds a measurement.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.resolve() if path.is_file() else None  # a link stays one; /dev/null is written to
    new = earlier.with_name(f"{path.name}.{os.getpid()}.partial") if earlier else path
    measured = False
    try:
        # A message may hold what UTF-8 cannot, a path's undecodable bytes for one.
        with new.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            rows = csv.writer(file)

            def put(row: Iterable[object], holds: bool = True) -> None:
                nonlocal measured
                measured = measured or holds
                rows.writerow(row)
                file.flush()

            rows.writerow(columns)
            yield put
            if not measured:
                raise NothingMeasured
    except BaseException:
        if not measured and new.is_file():
            new.unlink()
        what = f"what was measured is in {new}" if measured else "nothing was measured"
        print(f"\nnot finished: {what}", file=sys.stderr)
        raise
    if earlier:
        os.replace(new, earlier)


def write(put: Put, where: Environment, records: Iterable[Record]) -> Iterator[Record]:
    """Passes the records on, each one written first."""
    for record in records:
        put([*where, *(_short(value) for value in record)], record.status == "measured")
        yield record


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def read(paths: Iterable[Path]) -> list[Row]:
    """Every row of the files, numbers as numbers and empty ones None, and the file as ``run``.

    Files of earlier versions have no column ``busy``: nothing was.
    """
    rows = []
    for path in paths:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                numbers = {key: _number(value) if key in _NUMBERS else value for key, value in row.items()}
                rows.append({"busy": 0.0, **numbers, "run": path.name})
    return rows


def _number(text: str) -> float | None:
    return float(text) if text else None
