"""Statistics of paired seeds against scipy's, and the rules of a verdict case by case."""

import math

import numpy as np
import pytest
import scipy.stats

from hexa_jax.experiments.paired import Adjusted, Comparison, compare, holm, verdict

RNG = np.random.default_rng(0)
SEEDS = tuple(range(10, 18))


@pytest.mark.parametrize("pairs", [2, 3, 8])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 7])
def test_interval_and_p_are_those_of_the_paired_t_test(pairs, alpha):
    treated, control = RNG.normal(31, 1, pairs), RNG.normal(30, 1, pairs)
    got = compare(dict(enumerate(treated)), dict(enumerate(control)))
    wanted = scipy.stats.ttest_rel(treated, control)
    interval = wanted.confidence_interval(1 - alpha)
    assert got.p == pytest.approx(wanted.pvalue, rel=1e-9)
    assert got.interval(alpha) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert got.pairs == pairs and got.mean == pytest.approx(np.mean(treated - control))


def test_the_widths_that_numbers_of_seeds_allow():
    """Half of a 95 % interval for differences of standard deviation 1: 2.5 for three seeds, 0.84 for eight."""
    for pairs, wanted in ((3, 2.48), (5, 1.24), (8, 0.84)):
        z = scipy.stats.zscore(RNG.normal(size=pairs), ddof=1)
        assert Comparison(tuple(z)).half_width() == pytest.approx(wanted, abs=0.01)


def test_seeds_are_paired_by_name_not_by_place():
    got = compare({3: 30.0, 1: 12.0, 7: 99.0}, {1: 10.0, 2: 55.0, 3: 29.0})
    assert got.differences == (2.0, 1.0)


def test_few_pairs_show_nothing():
    none, one = compare({1: 3.0}, {2: 3.0}), compare({1: 3.0}, {1: 1.0})
    assert none.text() == "-" and math.isnan(none.mean) and none.p == 1
    assert one.text() == "+2.0" and one.p == 1 and one.interval() == (-math.inf, math.inf)
    assert Comparison((-2.7, -2.7)).text() == "-2.7", "two equal differences are no certainty"
    assert Comparison((2.0, 2.01, 2.0, 2.01)).text() == "+2.0 [+2.0, +2.0]", "four are some"
    same = Comparison((0.0, 0.0, 0.0))
    assert same.p == 1 and same.interval() == (0, 0) and Comparison((1.0, 1.0)).p == 0


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_holm_rejects_what_a_step_by_step_procedure_rejects(count):
    for _ in range(50):
        p_values = list(RNG.uniform(0, 0.06, count))
        rejected, left = set(), sorted(range(count), key=lambda i: p_values[i])
        for rank, position in enumerate(left):  # by the definition: stop at the first that fails
            if p_values[position] >= 0.05 / (count - rank):
                break
            rejected.add(position)
        got = holm(p_values)
        assert {i for i, adjusted in enumerate(got) if adjusted.p < 0.05} == rejected
        smallest = min(range(count), key=lambda i: p_values[i])
        assert got[smallest].alpha == pytest.approx(0.05 / count)
        bonferroni = np.minimum(1, np.array(p_values) * count)
        assert all(p <= adjusted.p <= b + 1e-12 for p, adjusted, b in zip(p_values, got, bonferroni, strict=True))


def test_holm_by_hand():
    got = holm([0.03, 0.01, 0.04])
    assert [adjusted.p for adjusted in got] == pytest.approx([0.06, 0.03, 0.06])
    assert [adjusted.alpha for adjusted in got] == pytest.approx([0.025, 0.05 / 3, 0.05])
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values lie in 0 to 1"):
        holm([0.1, math.nan])


def around(mean, spread=0.2):
    """Eight differences of exactly this mean and standard deviation."""
    return Comparison(tuple(mean + spread * scipy.stats.zscore(np.arange(8.0), ddof=1)))


FIRST = Adjusted(0.001, 0.05 / 4)


@pytest.mark.parametrize(
    ("epochs", "passes", "compute", "noise", "expected"),
    [
        (1.5, 0.5, -1, None, "helps"),
        (1.5, 0.5, 0.5, None, "helps; worth its cost"),
        (0.9, 0.5, 0.5, None, "not shown (half-width 0.2); worth its cost"),  # above 0, but by less than a point
        (1.5, 0.1, -1, None, "not shown (half-width 0.2)"),  # a second clean view does as well
        (-1.5, -2, -2, None, "hurts"),
        (1.5, 0.5, -1, 0.1, "helps; no better than noise"),
        (1.5, 0.5, -1, 0.5, "helps"),
    ],
)
def test_verdicts(epochs, passes, compute, noise, expected):
    noise = None if noise is None else around(noise)
    assert verdict(around(epochs), FIRST, around(passes), around(compute), noise) == expected


def test_a_wide_interval_or_a_lost_family_shows_nothing():
    controls = around(0.5), around(-1)
    wide = around(1.5, 2.0)
    assert wide.interval(0.05 / 4)[0] < 0
    assert verdict(wide, Adjusted(0.3, 0.05 / 4), *controls).startswith("not shown (half-width 2.")
    # Its own interval is above 0, but a smaller p-value of the family was not significant: Holm stops there.
    assert verdict(around(1.5), Adjusted(0.06, 0.05), *controls).startswith("not shown")
    assert verdict(Comparison((3.0,)), Adjusted(1, 0.05), *controls) == "not shown (too few pairs)"
