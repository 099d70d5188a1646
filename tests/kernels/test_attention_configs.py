"""The table of tiles and the function that reads it."""

import itertools

import pytest

from fastbf.kernels.attention_configs import TABLE, Config, config_for, packed_slots, schedule, transposes
from fastbf.kernels.limits import KIB, Limits

A100 = Limits(163 * KIB, 108, (8, 0), 80 * KIB**3)
RTX_4090 = Limits(99 * KIB, 128, (8, 9), 24 * KIB**3)
RTX_5090 = Limits(99 * KIB, 170, (12, 0), 32 * KIB**3)
H100 = Limits(227 * KIB, 132, (9, 0), 80 * KIB**3)
B200 = Limits(227 * KIB, 148, (10, 0), 180 * KIB**3)
KERNELS = ("forward_streaming", "backward_query", "backward_key_value", "forward_packed", "backward_packed")


@pytest.mark.parametrize("limits", [A100, RTX_4090, RTX_5090, H100, B200])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_dimension_has_tiles(kernel, itemsize, limits):
    sizes = (1, 15, 30, 32) if kernel.endswith("packed") else (33, 64, 500, 65_536)
    for head_dim, n, groups in itertools.product(range(8, 513, 8), sizes, (1, 4, 100_000)):
        config = config_for(kernel, n, n, groups, head_dim, itemsize, limits)
        for tile in config[:3]:
            assert tile in (16, 32, 64, 128, 256, 512)
        # What mask_tile can draw, and what the reciprocal of a packed tile's row count is exact for.
        assert config.block_n <= 128
        if kernel.endswith("packed"):
            assert packed_slots(config, n, n) >= 1


def test_backward_computes_scores_keys_by_queries_where_warps_outnumber_tiles_of_16_queries():
    assert transposes(Config(32, 16, 128, 4, 2))
    assert transposes(Config(64, 16, 128, 8, 2))
    assert not transposes(Config(64, 16, 128, 4, 2))  # a tile for each warp
    assert not transposes(Config(16, 32, 128, 4, 2))  # keys by queries they would have fewer columns
    assert not transposes(Config(32, 16, 128, 4, 2, reload=True))


def test_the_table_has_nothing_else():
    assert set(TABLE) == set(itertools.product(KERNELS, (2, 4), (80, 90, 100)))


def test_few_rows_take_small_tiles_so_that_every_multiprocessor_works():
    def rows(n, groups):
        return config_for("forward_streaming", n, n, groups, 512, 2, H100).block_m

    assert rows(512, 4) == 16  # V1 of ResNet-50: 4 heads of 512 samples
    assert rows(8192, 4) == 64
    assert rows(33, 10_000) <= 64  # no tile twice as long as the batch


def test_keys_are_tiled_by_their_own_number():
    assert config_for("backward_key_value", 65_536, 64, 4, 64, 2, H100).block_n == 16
    assert config_for("backward_key_value", 64, 65_536, 4, 64, 2, H100).block_n > 16


@pytest.mark.parametrize(("n", "rows"), [(2, 16), (5, 16), (6, 32), (9, 32), (11, 16), (16, 16), (17, 32), (32, 32)])
def test_packed_groups_take_the_tile_that_they_fill_best(n, rows):
    for kernel in ("forward_packed", "backward_packed"):
        assert config_for(kernel, n, n, 10_000, 64, 2, H100).block_m == rows
    assert packed_slots(config_for("forward_packed", n, 2, 10_000, 64, 2, H100), n, 2) > 0


@pytest.mark.parametrize(("n", "m", "expected"), [(2, 2, "packed"), (32, 32, "packed"), (33, 2, "streaming")])
def test_schedule(n, m, expected):
    assert schedule(n, m) == expected
