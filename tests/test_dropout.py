"""The keep decisions: against a second implementation, and as random numbers."""

import itertools
import math

import pytest
import torch

from fastbf.dropout import Dropout, Site, draw_seed, drop_threshold, philox, round_keys

SEED = -1234567890123456789
LOW = 0xFFFFFFFF


def philox_by_hand(counter, seed):
    """Philox4x32-7 in Python's integers, after Salmon et al. (SC 2011), table 2 and figure 3."""
    c, k = list(counter), [seed & LOW, seed >> 32 & LOW]
    for _ in range(7):
        high0, low0 = divmod(c[0] * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(c[2] * 0xCD9E8D57, 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & LOW, (k[1] + 0xBB67AE85) & LOW]
    return c


def keeps_by_hand(p, seed, site, group, row, column):
    """One decision, from the layout that fastbf.dropout documents."""
    if p != 0.5 and site == Site.ATTENTION:
        rest, (high, low, last) = column // 32, (column // 8 % 4, column // 2 % 4, column % 2)
        column = 32 * rest + 8 * low + 2 * high + last
    width = 128 if p == 0.5 else 8
    words = philox_by_hand((column // width, row, group & LOW, (group >> 32) * 4 + site), seed)
    if p == 0.5:
        return words[column // 32 % 4] >> column % 32 & 1 == 1
    half = words[column // 2 % 4] >> 16 * (column % 2) & 0xFFFF
    return half >= drop_threshold(p)


def draw(p, groups, rows, columns, *, seed=SEED, site=Site.ATTENTION, dtype=torch.float64):
    dropout = Dropout(p, torch.tensor([seed]), dtype)
    return dropout.multiplier(site, torch.tensor(groups)[:, None], torch.tensor(rows), columns)


def test_philox_words_match_a_second_implementation():
    counters = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [LOW, LOW, LOW, LOW], [7, LOW, 0, 12]])
    words = philox(tuple(counters.unbind(1)), round_keys(torch.tensor([SEED])))
    expected = [philox_by_hand(c, SEED & 0xFFFFFFFFFFFFFFFF) for c in counters.tolist()]
    assert [[w & LOW for w in row] for row in words.tolist()] == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("site", Site)
def test_decisions_match_a_second_implementation(p, site):
    groups, rows, columns = [0, 5, 2**32 + 3], [0, 1, 77, 65535], 259
    kept = draw(p, groups, rows, columns, site=site) > 0
    seed = SEED & 0xFFFFFFFFFFFFFFFF
    for (i, g), (j, r), c in itertools.product(enumerate(groups), enumerate(rows), range(0, columns, 3)):
        assert kept[i, j, c] == keeps_by_hand(p, seed, site, g, r, c)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_decisions_do_not_depend_on_how_they_are_cut(p):
    whole = draw(p, range(6), range(50), 300)
    assert torch.equal(whole[2:4, 17:31, :77], draw(p, [2, 3], range(17, 31), 77))


@pytest.mark.parametrize("p", [0.0001, 0.1, 0.3, 0.5, 0.9])
def test_kept_values_are_scaled_by_the_rate_applied(p):
    values = draw(p, range(2), range(100), 100).unique().tolist()
    applied = drop_threshold(p) / 65536
    assert all(v == 0 or v == pytest.approx(1 / (1 - applied), rel=1e-12) for v in values)


def test_the_threshold_itself_is_kept():
    half = philox_by_hand((0, 0, 0, Site.ATTENTION), SEED & 0xFFFFFFFFFFFFFFFF)[0] & 0xFFFF
    assert draw(half / 65536, [0], [0], 1) > 0
    assert draw((half + 1) / 65536, [0], [0], 1) == 0


def test_every_rate_that_rounds_to_one_half_is_one_half():
    assert torch.equal(draw(0.5, [3], range(9), 200), draw(0.500001, [3], range(9), 200))


def test_p_one_gives_zeros():
    assert not draw(1.0, [0], range(3), 5).any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_is_within_binomial_bounds(p):
    kept = (draw(p, range(8), range(256), 512) > 0).double()
    n, keep = kept.numel(), 1 - drop_threshold(p) / 65536
    assert abs(kept.mean().item() - keep) < 5 * math.sqrt(keep * (1 - keep) / n)
    for dims in ((0, 1), (0, 2), (1, 2)):
        part = kept.mean(dims)
        bound = 6 * math.sqrt(keep * (1 - keep) * part.numel() / n)
        assert (part - keep).abs().max() < bound


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_sites_and_successive_seeds_are_uncorrelated(p):
    keep = 1 - drop_threshold(p) / 65536
    base = (draw(p, range(4), range(256), 512) > 0).double() - keep
    others = {
        "row": base.roll(1, 1),
        "column": base.roll(1, 2),
        "word": base.roll(32, 2),
        "head": base.roll(1, 0),
        "position": base.roll(2, 0),
        "call": base.roll(8, 2),
        "seed": (draw(p, range(4), range(256), 512, seed=SEED + 1) > 0).double() - keep,
        "site": (draw(p, range(4), range(256), 512, site=Site.ACTIVATION) > 0).double() - keep,
    }
    variance = keep * (1 - keep)
    for name, other in others.items():
        assert abs((base * other).mean().item()) < 5 * variance / math.sqrt(base.numel()), name


def test_seeds_obey_manual_seed():
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    second = draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.dtype == torch.int64
    assert first.shape == (1,)


def chi_squared(a, b):
    """Of two boolean tensors being independent of each other, one degree of freedom: above 25 once in two million."""
    n = a.numel()
    table = torch.tensor([[(x & y).sum().item() for y in (b, ~b)] for x in (a, ~a)], dtype=torch.float64)
    expected = table.sum(1, keepdim=True) * table.sum(0) / n
    return ((table - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", [None, SEED])
def test_rates_and_independence(p, seed):
    """Of rows, columns, heads, sites and pieces, with the default generator and with a seed."""
    torch.manual_seed(11)
    cpu = torch.device("cpu")
    dropout = Dropout(p, None if seed is None else torch.tensor([seed]), torch.float32)
    scores = dropout.scores((8, 128, 256), cpu) > dropout.limit
    sites = [dropout.elements(site, (128, 8, 256), cpu).movedim(0, 1) > dropout.limit for site in list(Site)[1:]]
    piece = dropout.scores((8, 128, 256), cpu, group=8) > dropout.limit
    keep = 1 - drop_threshold(p) / 65536
    for drawn in (scores, piece, *sites):
        n, kept = drawn.numel(), drawn.sum().item()
        assert (kept - n * keep) ** 2 / (n * keep * (1 - keep)) < 25
        for dim, shift in itertools.product(range(3), (1, 2, 4, 7)):
            assert chi_squared(drawn, drawn.roll(shift, dim)) < 25, (dim, shift)
    for a, b in itertools.combinations((scores, piece, *sites), 2):
        assert chi_squared(a, b) < 25


def test_multipliers_of_several_sites_are_drawn_at_once():
    shapes = [(2, 3, 5), (4, 7), (4, 9)]
    dropout = Dropout(0.1, None, torch.float64)
    torch.manual_seed(2)
    given = dropout.multipliers([(Site.ACTIVATION, shape) for shape in shapes], torch.device("cpu"))
    assert [t.shape for t in given] == [torch.Size(s) for s in shapes]
    torch.manual_seed(2)
    numbers = Dropout(0.1, None, torch.float64).elements(Site.ACTIVATION, (30 + 28 + 36,), torch.device("cpu"))
    assert torch.equal(torch.cat([t.flatten() for t in given]), dropout.as_multiplier(numbers))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0001, 0.1, 0.5, 0.99999, 1.0])
def test_the_multiplier_is_the_scale_where_a_word_exceeds_the_limit(dtype, p):
    dropout = Dropout(p, torch.tensor([SEED]), dtype)
    words = dropout.elements(Site.ACTIVATION, (40, 300), torch.device("cpu"))
    multiplier = dropout.as_multiplier(words)
    assert multiplier.dtype == dtype
    assert torch.equal(multiplier, torch.where(words > dropout.limit, torch.tensor(dropout.scale, dtype=dtype), 0.0))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_words_that_are_reserved_are_given_out_in_order(p):
    cpu, count = torch.device("cpu"), 2 * 3 * 5 + 4 * 7
    torch.manual_seed(2)
    dropout = Dropout(p, None, torch.float32)
    dropout.reserve(count, cpu)
    words = [dropout.scores((2, 3, 5), cpu), dropout.elements(Site.ACTIVATION, (4, 7), cpu)]
    assert dropout.scores((1, 2, 3), cpu).shape == (1, 2, 3)  # more than was reserved
    torch.manual_seed(2)
    assert torch.equal(
        torch.cat([w.flatten() for w in words]),
        Dropout(p, None, torch.float32).elements(Site.ACTIVATION, (count,), cpu),
    )
