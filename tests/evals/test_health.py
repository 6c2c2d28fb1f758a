"""Measures without labels: golden values of explicit formulas in float64, and their extremes."""

import itertools
import math

import numpy as np
import pytest

from hexa_jax.evals import health

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(60, 12)) * np.arange(1, 13)


def test_rankme_is_the_entropy_of_singular_values():
    singular = np.linalg.svd(FEATURES)[1]
    p = singular / singular.sum() + 1e-7
    expected = math.exp(-sum(value * math.log(value) for value in p))
    assert health.rankme(FEATURES) == pytest.approx(expected, rel=1e-9)
    assert health.rankme(FEATURES.T) == pytest.approx(expected, rel=1e-6)  # fewer images than width
    assert health.rankme(FEATURES.astype(np.float32)) == pytest.approx(expected, rel=1e-5)


def test_rankme_at_its_extremes():
    assert health.rankme(np.eye(40, 8)) == pytest.approx(8, rel=1e-5)
    assert health.rankme(np.outer(RNG.normal(size=40), RNG.normal(size=8))) < 1.001
    assert health.rankme(np.zeros((40, 8))) == 1
    assert health.rankme(7 * FEATURES) == pytest.approx(health.rankme(FEATURES))


def test_alignment_and_uniformity_are_those_of_wang_and_isola():
    first, second = RNG.normal(size=(2, 9, 5))
    u, v = (x / np.sqrt((x**2).sum(axis=1))[:, None] for x in (first, second))
    expected = np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(u, v, strict=True)])
    assert health.alignment(first, second) == pytest.approx(expected, rel=1e-12)
    assert health.alignment(first, 3 * first) == pytest.approx(0, abs=1e-12)
    pairs = [math.exp(-2 * np.linalg.norm(a - b) ** 2) for a, b in itertools.combinations(u, 2)]
    assert health.uniformity(first) == pytest.approx(math.log(np.mean(pairs)), rel=1e-12)
    assert health.uniformity(np.ones((9, 5))) == pytest.approx(0, abs=1e-9)


def test_neighbors_agree_as_counted_one_by_one():
    first, second = FEATURES[:20] + RNG.normal(size=(2, 20, 12))
    bank = FEATURES[:20]

    def near(query, own):
        cosine = {
            n: row @ query / np.linalg.norm(row) / np.linalg.norm(query) for n, row in enumerate(bank) if n != own
        }
        return set(sorted(cosine, key=cosine.get, reverse=True)[:4])

    shared = [len(near(first[n], n) & near(second[n], n)) / 4 for n in range(20)]
    found = health.neighbor_agreement(bank, first, second, count=4)
    assert found == pytest.approx(np.mean(shared)) and 0 < found < 1
    assert health.neighbor_agreement(bank, first, first) == 1


def test_stability_is_the_adjusted_rand_index_over_all_pairs():
    before, after = RNG.integers(4, size=(2, 30))
    pairs = list(itertools.combinations(range(30), 2))
    same = [(before[a] == before[b], after[a] == after[b]) for a, b in pairs]
    both = sum(x and y for x, y in same)
    in_first, in_second = sum(x for x, _ in same), sum(y for _, y in same)
    expected = in_first * in_second / len(pairs)
    rand = (both - expected) / ((in_first + in_second) / 2 - expected)
    assert health.cluster_stability(before, after) == pytest.approx(rand)
    assert health.cluster_stability(before, (before + 1) % 4) == 1  # numbers do not matter


def test_evenness_of_cluster_sizes():
    sizes = [6, 3, 1]
    entropy = -sum(n / 10 * math.log(n / 10) for n in sizes)
    clusters = np.repeat([0, 2, 5], sizes)  # numbers without an image do not count
    assert health.cluster_evenness(clusters) == pytest.approx(math.exp(entropy) / 3)
    assert health.cluster_evenness(np.arange(10) % 5) == pytest.approx(1)


def test_clusters_find_separate_groups_again():
    centers = np.eye(5, 12) * 10
    truth = np.arange(100) % 5
    features = centers[truth] + 0.1 * RNG.normal(size=(100, 12))
    found = health.cluster(features)
    assert found.max() == 4 and health.cluster_stability(truth, found) == 1
    assert (health.cluster(features) == found).all()
    assert (health.cluster(np.ones((100, 12))) == 0).all()  # collapsed: one cluster, no warning


def test_measure_gives_all_by_name():
    views = np.stack([FEATURES, FEATURES + 1])
    first = health.measure(FEATURES, FEATURES[:, :4], views, views[..., :4])
    assert set(first.values) == set(health.HIGHER_IS_BETTER) - {"cluster_stability"}
    again = health.measure(FEATURES, FEATURES[:, :4], views, views[..., :4], first.clusters)
    assert again.values["cluster_stability"] == 1
    assert again.values["rankme"] > again.values["rankme_embedding"]
    other = health.measure(FEATURES, FEATURES[:, :4], views, views[..., :4], first.clusters[:9])
    assert "cluster_stability" not in other.values  # of another sample
    with pytest.raises(ValueError, match="at least 3"):
        health.measure(FEATURES[:2], FEATURES[:2], views[:, :2], views[:, :2])
