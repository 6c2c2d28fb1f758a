"""Which anchor learns which box, and which anchors are drawn: torchvision's rules, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from detection_reference import match as match_loop

from hexa_jax.detection.matching import match, sample

HIGH, LOW = 0.7, 0.3


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def compiled_match(overlaps, valid, high, low, allow_low_quality):
    return match(overlaps, valid, high, low, allow_low_quality)


def matched(overlaps, valid=None, high=HIGH, low=LOW, allow_low_quality=True):
    overlaps = np.asarray(overlaps, np.float32)
    valid = np.ones(len(overlaps), bool) if valid is None else np.asarray(valid)
    result = compiled_match(jnp.asarray(overlaps), jnp.asarray(valid), high, low, allow_low_quality)
    assert result.dtype == jnp.int32
    return list(np.asarray(result))


# ---- Matching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high, low, allow_low_quality", [(HIGH, LOW, True), (HIGH, LOW, False), (0.5, 0.5, False)])
def test_match_equals_the_loop(high, low, allow_low_quality):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(100):
        overlaps = (
            rng.integers(0, 17, (4, 12)) / 20 * (rng.random((1, 12)) < 0.8)
        )  # twentieths: equals, and exactly 0.3, 0.5, 0.7
        overlaps[rng.integers(4)] *= rng.random() < 0.8
        expected = match_loop(overlaps, high, low, allow_low_quality)
        assert matched(overlaps, None, high, low, allow_low_quality) == list(expected)
        seen |= set(expected)
    assert seen == ({-2, -1, 0, 1, 2, 3} if low < high else {-1, 0, 1, 2, 3})


def test_a_threshold_belongs_to_the_better_side():
    assert matched([[0.3, 0.29, 0.7, 0.69, 0.9]], allow_low_quality=False) == [-2, -1, 0, -2, 0]
    assert matched([[0.5, 0.49]], high=0.5, low=0.5, allow_low_quality=False) == [0, -1]


def test_of_equal_boxes_the_first_is_taken():
    assert matched([[0.1, 0.8], [0.75, 0.8], [0.75, 0.8]], allow_low_quality=False) == [1, 0]


def test_every_box_gets_its_best_anchors_however_poor():
    overlaps = [[0.1, 0.1, 0.05, 0.0], [0.0, 0.0, 0.2, 0.0]]
    assert matched(overlaps, allow_low_quality=False) == [-1, -1, -1, -1]
    assert matched(overlaps) == [0, 0, 1, -1]


def test_an_anchor_that_a_box_asks_for_keeps_its_own_best_box():
    # The best that box 0 gets is anchor 1, which is nearer to box 1: it becomes positive, but for box 1.
    assert matched([[0.1, 0.2, 0.0], [0.0, 0.65, 0.4]]) == [-1, 1, -2]


def test_a_box_that_overlaps_nothing_makes_torchvision_s_flood():
    # Its largest overlap is 0, and each anchor with just that becomes positive for its own best box.
    assert matched([[0.0, 0.0, 0.0, 0.0], [0.0, 0.65, 0.2, 0.8]]) == [0, 1, 1, 1]


@pytest.mark.parametrize("allow_low_quality", [False, True])
def test_padding_takes_no_part(allow_low_quality):
    rng = np.random.default_rng(1)
    for _ in range(50):
        overlaps = rng.integers(0, 17, (5, 12)) / 20
        valid = rng.random(5) < 0.6
        padded = overlaps.copy()
        padded[~valid] = rng.choice([0, 1, 2, np.nan])  # whatever stands there
        rows = np.flatnonzero(valid)
        expected = [rows[box] if box >= 0 else box for box in match_loop(overlaps[valid], HIGH, LOW, allow_low_quality)]
        assert matched(padded, valid, allow_low_quality=allow_low_quality) == expected


@pytest.mark.parametrize("allow_low_quality", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_image_without_boxes_has_only_background(allow_low_quality, value):
    assert matched(np.full((3, 4), value), np.zeros(3, bool), allow_low_quality=allow_low_quality) == [-1] * 4


# ---- Sampling ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(2, 3))
def draws(keys, labels, count, fraction):
    """Masks [draws, A] of positives and negatives, one draw a key."""
    return jax.vmap(lambda key: sample(key, labels, count, fraction))(keys)


def sampled(labels, count, fraction, times=8, seed=0):
    keys = jax.random.split(jax.random.key(seed), times)
    positive, negative = draws(keys, jnp.asarray(labels, jnp.int32), count, fraction)
    assert positive.dtype == negative.dtype == bool
    assert positive.shape == negative.shape == (times, len(labels))
    return np.asarray(positive), np.asarray(negative)


def labels_of(positives, negatives, ignored, seed=0):
    labels = np.repeat([1, 0, -1], [positives, negatives, ignored])
    return np.random.default_rng(seed).permutation(labels)


@pytest.mark.parametrize(
    "available, count, fraction, expected",
    [
        ((20, 70, 10), 16, 0.5, (8, 8)),
        ((3, 87, 10), 16, 0.5, (3, 13)),  # negatives fill
        ((0, 90, 10), 16, 0.5, (0, 16)),
        ((20, 5, 75), 16, 0.5, (8, 5)),  # positives do not
        ((20, 0, 80), 16, 0.5, (8, 0)),
        ((20, 70, 10), 10, 0.25, (2, 8)),  # int(2.5)
        ((20, 70, 10), 15, 0.5, (7, 8)),  # int(7.5)
        ((20, 70, 10), 256, 0.5, (20, 70)),  # more places than anchors
        ((0, 0, 100), 16, 0.5, (0, 0)),
        ((60, 40, 0), 16, 1.0, (16, 0)),
        ((60, 40, 0), 16, 0.0, (0, 16)),
    ],
)
def test_how_many_are_drawn(available, count, fraction, expected):
    labels = labels_of(*available)
    positive, negative = sampled(labels, count, fraction)
    np.testing.assert_array_equal(positive.sum(1), expected[0])
    np.testing.assert_array_equal(negative.sum(1), expected[1])
    assert not positive[:, labels != 1].any() and not negative[:, labels != 0].any()  # never an ignored one


def test_a_key_decides_the_draw():
    labels = labels_of(30, 60, 10)
    first, again, other = (sampled(labels, 20, 0.5, seed=seed) for seed in (0, 0, 1))
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert (one != different).any(1).all()
        assert len({row.tobytes() for row in one}) == len(one)


TIMES = 2000


def excess(observed, chance):
    """How many standard deviations the sum of squared deviations lies above what independent fair counts would have."""
    expected = TIMES * chance
    statistic = ((observed - expected) ** 2 / (expected * (1 - chance))).sum()
    return (statistic - observed.size) / np.sqrt(2 * observed.size)


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_draws_are_uniform_over_candidates_and_their_pairs(kind):
    labels = labels_of(12, 20, 8)
    masks = dict(zip(["positive", "negative"], sampled(labels, 10, 0.5, TIMES), strict=True))
    chosen = masks[kind][:, labels == (kind == "positive")].astype(int)
    candidates = chosen.shape[1]
    chance = 5 / candidates
    assert excess(chosen.sum(0), chance) < 5
    together = (chosen.T @ chosen)[np.triu_indices(candidates, 1)]
    assert excess(together, chance * 4 / (candidates - 1)) < 5
