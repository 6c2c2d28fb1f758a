"""Statistics of paired seeds: Student's t intervals, Holm's adjustment, verdicts.

Pure functions of numbers; what is compared with what is decided in `study`.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import scipy.stats

ALPHA = 0.05  # of the family of confirmed arms, and of every single interval
GAIN = 1.0  # points over the plain method from which on an arm can be said to help


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences, by seed, between a run and its control, in points.

    Attributes:
        differences: treated minus control, one per seed that both have.
    """

    differences: tuple[float, ...]

    @property
    def pairs(self) -> int:
        """How many seeds there are."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Mean difference; nan without pairs."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean; nan for fewer than two pairs, whose spread is unknown."""
        return (
            statistics.stdev(self.differences) / math.sqrt(self.pairs)
            if self.pairs > 1
            else math.nan
        )

    @property
    def p(self) -> float:
        """Two-sided p-value of the paired t-test; 1 where the pairs are too few to tell."""
        error = self.standard_error
        if math.isnan(error):
            return 1.0
        if error == 0:  # equal differences: certain of any mean but 0
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * scipy.stats.t.sf(abs(self.mean) / error, self.pairs - 1))

    def half_width(self, alpha: float = ALPHA) -> float:
        """Half of the width of the 1 - alpha interval; infinite for fewer than two pairs."""
        if self.pairs < 2:
            return math.inf
        return float(scipy.stats.t.ppf(1 - alpha / 2, self.pairs - 1)) * self.standard_error

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """The 1 - alpha interval of the mean; infinite for fewer than two pairs."""
        half = self.half_width(alpha)
        if math.isinf(half):
            return -math.inf, math.inf
        return self.mean - half, self.mean + half

    def text(self, alpha: float = ALPHA) -> str:
        """For a table: mean and interval; a dash for no pairs.

        The mean alone for one pair, and for two whose differences agree by chance: an interval of
        no width would look like certainty.
        """
        if not self.pairs:
            return "-"
        if self.pairs == 1 or (self.pairs == 2 and self.half_width(alpha) < 0.05):
            return f"{self.mean:+.1f}"
        low, high = self.interval(alpha)
        return f"{self.mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def compare(treated: Mapping[int, float], control: Mapping[int, float]) -> Comparison:
    """Pair two runs' values by seed; seeds that only one has are left out."""
    return Comparison(
        tuple(treated[seed] - control[seed] for seed in sorted(treated.keys() & control.keys()))
    )


@dataclasses.dataclass(frozen=True)
class Adjusted:
    """One hypothesis of a family after Holm's procedure.

    Attributes:
        p: adjusted p-value, to be compared with alpha itself.
        alpha: level at which this one is tested; the interval that goes with it has 1 - alpha.
    """

    p: float
    alpha: float


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> list[Adjusted]:
    """Adjust levels by Holm's step-down rule, in the order given.

    The k-th smallest of m (from 0) is tested at alpha / (m - k).

    Raises:
        ValueError: a value that is no probability.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"p-values lie in 0 to 1, not {list(p_values)}")
    order = sorted(range(len(p_values)), key=lambda position: p_values[position])
    adjusted, running = {}, 0.0
    for rank, position in enumerate(order):
        left = len(p_values) - rank
        running = max(running, min(1.0, left * p_values[position]))
        adjusted[position] = Adjusted(running, alpha / left)
    return [adjusted[position] for position in range(len(p_values))]


def verdict(
    equal_epochs: Comparison,
    adjusted: Adjusted,
    equal_passes: Comparison,
    equal_compute: Comparison,
    noise: Comparison | None = None,
    alpha: float = ALPHA,
) -> str:
    """What a confirmed arm's comparisons say, in words; parts are separated by "; ".

    "helps": at least GAIN points over plain training at equal epochs, with the adjusted interval
    above 0, and the interval over equally many passes above 0. "worth its cost": the interval over
    equal compute is above 0. "no better than noise": an attack whose interval over noise of its
    size is not above 0. "hurts": the adjusted interval over plain training is below
    0. Else "not shown", with what such a number of seeds could have shown.

    Args:
        equal_epochs: arm minus plain; the member of the family.
        adjusted: its place in the family.
        equal_passes: arm minus plain with a second clean view.
        equal_compute: arm minus plain with as many more steps as the arm costs.
        noise: for attacks: arm minus noise of the same size.
        alpha: of the controls' intervals.
    """
    low, high = equal_epochs.interval(adjusted.alpha)
    significant = adjusted.p < alpha
    helps = (
        significant
        and low > 0
        and equal_epochs.mean >= GAIN
        and equal_passes.interval(alpha)[0] > 0
    )
    parts = []
    if helps:
        parts.append("helps")
    elif significant and high < 0:
        parts.append("hurts")
    else:
        half = equal_epochs.half_width(adjusted.alpha)
        parts.append(
            "not shown"
            + (f" (half-width {half:.1f})" if math.isfinite(half) else " (too few pairs)")
        )
    if equal_compute.interval(alpha)[0] > 0:
        parts.append("worth its cost")
    if noise is not None and not noise.interval(alpha)[0] > 0:
        parts.append("no better than noise")
    return "; ".join(parts)
