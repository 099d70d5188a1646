"""Counts of the table's entries, and the bound that is computed from them."""

import json

import pytest

from bench import counted, tiles
from bench.commands import main
from bench.counted import Counts, Row
from bench.tiles import Case
from fastbf.kernels.attention_configs import TABLE, Config
from tests.bench.cases import EMULATOR, in_ascii, needs_emulator

NOTHING = Counts(0, 0, 0, 0, 0, 0, 0)

#: Counts a kernel at a tile, then executes all programs of a problem of five by five such tiles.
WHOLE = """
import json, sys
from pathlib import Path
import torch
from bench import counted
from bench.tiles import Case
from fastbf.kernels import attention
from fastbf.kernels.attention_configs import Config
from tests.emulation import attention_tile

emulator, case, config = Path(sys.argv[1]), Case("forward_streaming", 32, 2, 80, 320, 1), Config(64, 64, 32, 4, 2)
row = counted.count(emulator, case, config)
from ptx.product import fastbf_on
q, k, v, o = (torch.randn(case.n, 1, 1, case.head_dim).bfloat16() for _ in range(4))
options = attention.Options(0.1, torch.tensor([1]), counted.THRESHOLD)
with fastbf_on(case.architecture, strict=False) as device, attention_tile(case.kernel, config):
    attention.forward(q, k, v, options, o=o, lse=torch.zeros(1, case.n))
executed = counted._counts(launch.result for launch in device.launches)
print(json.dumps([row.counts._asdict(), executed._asdict(), row.programs, row.conflicts]))
"""


def everything(n=256):
    return tiles.entries(sorted({key[0] for key in TABLE}), (80, 90, 100), (), (2, 4), n)


def test_entries_are_those_of_the_table_that_are_asked_for():
    assert [config for _, config in everything()] == [
        c for d in TABLE.values() for configs in d.values() for c in configs
    ]
    assert {case.n for case, _ in everything(4096)} == {2, 4096}
    some = tiles.entries(["backward_query"], [90], [512], [2], 256)
    assert [config for _, config in some] == list(TABLE["backward_query", 2, 90][512])
    assert {case for case, _ in some} == {Case("backward_query", 512, 2, 90, 256, 1)}


def test_without_counts_the_table_alone(capsys):
    assert main(["tiles", "--kernel", "backward_packed", "--bytes", "4", "--sm", "100"]) == 0
    (config,) = TABLE["backward_packed", 4, 100][512]
    _header, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["backward_packed", "4", "100", "512", *tiles.text(config).split()]
    assert main(["tiles", "--head-dim", "7"]) == 2


def test_a_missing_emulator_is_said_and_no_error(capsys, tmp_path):
    assert main(["tiles", "--counted", "--emulator", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No emulator in {tmp_path}: nothing is counted.\n"


def test_counts_are_linear_in_steps():
    few, more = NOTHING._replace(flops=20, bytes=7), NOTHING._replace(flops=40, bytes=9)
    assert few.at(more, 2) == few
    assert few.at(more, 4) == more
    assert few.at(more, 9) == NOTHING._replace(flops=90, bytes=14)
    assert few.scaled(3) == NOTHING._replace(flops=60, bytes=21)


@pytest.mark.parametrize(
    ("busy", "counts"),
    [
        ("tensor cores", NOTHING._replace(flops=8e12, asynchronous=8e12)),
        ("caches", NOTHING._replace(bytes=5.5e10)),
        ("shared memory", NOTHING._replace(wavefronts=132 * 1.755e7)),
        ("shared memory", NOTHING._replace(operands=128 * 132 * 1.755e7)),
        ("issue slots", NOTHING._replace(instructions=4 * 132 * 1.755e7)),
    ],
)
def test_the_bound_is_the_largest_of_four_times(busy, counts):
    times = counted.RATES[90].times(counts, 2)
    assert times.pop(busy) == pytest.approx(0.01)
    assert set(times.values()) == {0}


def test_products_that_wait_and_those_of_tf32_take_longer():
    synchronous, asynchronous = NOTHING._replace(flops=8e12), NOTHING._replace(flops=8e12, asynchronous=8e12)
    assert counted.RATES[90].times(synchronous, 2)["tensor cores"] == pytest.approx(0.016)
    assert counted.RATES[90].times(asynchronous, 4)["tensor cores"] == pytest.approx(0.02)


def test_what_is_needed():
    streaming = Row(Case("backward_key_value", 512, 2, 90, 256, 1), Config(32, 16, 256, 8, 2), 16, NOTHING, 1)
    assert (streaming.needed, streaming.ideal) == (8 * 256 * 256 * 512, 6 * 256 * 512 * 2 + 8 * 256)
    packed = Row(Case("backward_packed", 64, 2, 90, 2, 1), Config(64, 32, 64, 4, 1), 1, NOTHING, 1)
    assert (packed.needed, packed.ideal) == (10 * 64 * 32 * 64, 7 * 32 * 64 * 2)


@pytest.mark.slow
@needs_emulator
def test_a_group_counts_as_if_all_its_programs_had_been_executed():
    result = in_ascii("-c", WHOLE, EMULATOR)
    assert result.returncode == 0, result.stderr
    estimated, executed, programs, conflicts = json.loads(result.stdout)
    assert (programs, conflicts) == (5, 1)
    sampled = executed.pop("wavefronts")
    assert estimated.pop("wavefronts") == 5 * sampled  # a launch's requests are those of one program
    assert estimated == executed
    assert executed["flops"] == 4 * 320 * 320 * 32


@pytest.mark.slow
@needs_emulator
def test_a_line_for_each_entry():
    result = in_ascii("-m", "bench", "tiles", "--counted", "--emulator", EMULATOR, "--kernel", "forward_packed")
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("forward_packed")]
    entries = [(str(a), str(d)) for (kernel, itemsize, a), by_head_dim in TABLE.items() for d, c in by_head_dim.items()
               for _ in c if kernel == "forward_packed" and itemsize == 2 and a < 100]  # fmt: skip
    assert [(line[2], line[3]) for line in lines] == entries
    for line in lines:
        assert line[10] == "1.00", line  # FLOPs: what the tiles hold
