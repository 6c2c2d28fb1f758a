"""kNN against scikit-learn, and features: every example once, the same on any number of devices."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hexa_jax.data.decode import resize_center_crop
from hexa_jax.data.sources import ArraySource
from hexa_jax.evals import knn
from hexa_jax.evals.features import EvalImages, extract, make_extractor, raw_pixels
from hexa_jax.evals.knn import accuracy, knn_predict
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.norm import CLEAN, EVALUATION, stats_collection
from hexa_jax.models.resnet import ResNet
from hexa_jax.parallel.mesh import make_mesh


def blobs(num, classes=5, dim=6, seed=0):
    """Overlapping classes of very unequal sizes, features of any length."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(classes, num, p=np.arange(1, classes + 1) / sum(range(classes + 1)))
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    features = centres[labels] + 0.9 * generator.normal(size=(num, dim))
    return (features * generator.uniform(0.1, 10, (num, 1))).astype(np.float32), labels


def reference(bank, labels, queries, neighbours, temperature):
    """scikit-learn in float64: cosine distance d, weights exp((1 - d) / temperature)."""
    classifier = KNeighborsClassifier(
        neighbours, weights=lambda distance: np.exp((1 - distance) / temperature), metric="cosine", algorithm="brute"
    )
    return classifier.fit(np.float64(bank), labels).predict(np.float64(queries))


@pytest.mark.parametrize("num_queries", [1, 100, 256, 300])
@pytest.mark.parametrize("neighbours, temperature", [(1, 0.07), (20, 0.07), (20, 1.0), (90, 0.03)])
def test_predictions_equal_scikit_learn(num_queries, neighbours, temperature):
    bank, labels = blobs(90)
    queries, _ = blobs(num_queries, seed=1)
    got = knn_predict(bank, labels, queries, neighbours=neighbours, temperature=temperature)
    assert got.shape == (num_queries,)
    np.testing.assert_array_equal(got, reference(bank, labels, queries, neighbours, temperature))


def test_the_settings_matter():
    """On these data neighbours, temperature and weights all change the answers, so that the comparison can fail."""
    bank, labels = blobs(90)
    queries, _ = blobs(300, seed=1)
    answers = [
        reference(bank, labels, queries, *settings) for settings in ((1, 0.07), (20, 0.07), (20, 1.0), (90, 0.03))
    ]
    assert len({tuple(answer) for answer in answers}) == 4
    uniform = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(bank, labels).predict(queries)
    assert (uniform != answers[1]).any()


def test_leave_one_out_equals_scikit_learn_without_the_query():
    bank, labels = blobs(70)
    got = knn_predict(bank, labels, bank[:60], neighbours=9, leave_one_out=True)
    rest = [np.arange(70) != i for i in range(60)]
    expected = [reference(bank[keep], labels[keep], bank[i : i + 1], 9, 0.07)[0] for i, keep in enumerate(rest)]
    np.testing.assert_array_equal(got, expected)
    assert (got != knn_predict(bank, labels, bank[:60], neighbours=9)).any()


def test_leave_one_out_beyond_the_first_chunk():
    """1-nearest-neighbour on random labels: a query that saw itself would always be right."""
    features, _ = blobs(knn.QUERIES + 40)
    labels = np.random.default_rng(5).integers(0, 50, len(features))
    got = knn_predict(features, labels, features, neighbours=1, leave_one_out=True)
    assert accuracy(got, labels) < 10 and accuracy(got[knn.QUERIES :], labels[knn.QUERIES :]) < 30
    assert accuracy(knn_predict(features, labels, features, neighbours=1), labels) == 100


def test_more_neighbours_than_the_bank_holds():
    bank, labels = blobs(12)
    queries, _ = blobs(30, seed=1)
    np.testing.assert_array_equal(
        knn_predict(bank, labels, queries, neighbours=200), reference(bank, labels, queries, 12, 0.07)
    )
    assert knn_predict(bank, labels, bank, neighbours=200, leave_one_out=True).shape == (12,)


def test_small_temperatures_do_not_overflow():
    bank, labels = blobs(40)
    np.testing.assert_array_equal(knn_predict(bank, labels, bank, neighbours=10, temperature=0.001), labels)


def test_accuracy_is_in_per_cent():
    assert accuracy(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0])) == 75.0


# ---- Features ----------------------------------------------------------------------------------------------------------


def make_images(num=21, size=12, indices=None, resize=8, crop=6):
    pixels = np.random.default_rng(0).integers(0, 256, (num, size, size + 2, 3), np.uint8)
    source = ArraySource(pixels, np.arange(num) % 3)
    return EvalImages(source, np.arange(num) if indices is None else indices, resize, crop)


@pytest.mark.parametrize("batch_size", [4, 7, 21, 64])
def test_each_example_counts_exactly_once(batch_size):
    indices = np.random.default_rng(1).permutation(21)
    images = make_images(indices=indices)
    expected = np.stack([resize_center_crop(images.source[i]["image"], 8, 6) for i in indices])
    batches = list(images.batches(batch_size))
    assert all(batch.shape == (batch_size, 6, 6, 3) and batch.dtype == np.uint8 for batch, _ in batches)
    assert sum(count for _, count in batches) == 21 and len(batches) == -(-21 // batch_size)
    np.testing.assert_array_equal(np.concatenate([batch[:count] for batch, count in batches]), expected)
    sums = extract(lambda batch: batch.astype(np.float64).sum(axis=(1, 2)), images, batch_size)
    np.testing.assert_array_equal(sums, expected.astype(np.float64).sum(axis=(1, 2)))
    assert sums.dtype == np.float32
    np.testing.assert_array_equal(raw_pixels(images, batch_size), expected.reshape(21, -1) / np.float32(255))
    np.testing.assert_array_equal(images.labels, indices % 3)


def test_squashed_images_show_all_of_themselves():
    """Goyal's VOC images: the short side resized, then both sides to one length; the centre crop has lost the border."""
    pixels = np.full((1, 12, 24, 3), 50, np.uint8)
    pixels[:, :, :4], pixels[:, :, -4:] = 0, 250
    whole = EvalImages(ArraySource(pixels, np.zeros(1, int)), np.arange(1), 12, 12, squash=True)
    row = whole.image(0)[6, :, 0].astype(int)
    assert row.shape == (12,) and row[0] == 0 and row[-1] == 250 and (np.diff(row) >= 0).all()
    assert (dataclasses.replace(whole, squash=False).image(0) == 50).all()
    (batch, count) = next(whole.batches(2))
    assert count == 1 and (batch[0] == whole.image(0)).all()


def test_unreadable_and_unlabelled_examples_are_left_out(caplog):
    class Broken(ArraySource):
        def __getitem__(self, index):
            return super().__getitem__(index) | ({"image": b""} if index in (2, 9) else {})

    whole = make_images()
    labels = np.where(np.arange(21) == 5, -1, np.arange(21) % 3)
    images = dataclasses.replace(whole, source=Broken(whole.source._images, labels), indices=np.arange(20, -1, -1))
    with caplog.at_level(logging.WARNING):
        pixels = raw_pixels(images, 8)
        np.testing.assert_array_equal(raw_pixels(images, 8), pixels)
    kept = ~np.isin(images.indices, (2, 9))
    np.testing.assert_array_equal(pixels, np.where(kept[:, None], raw_pixels(whole, 8)[::-1], 0))
    np.testing.assert_array_equal(images.known, ~np.isin(images.indices, (2, 5, 9)))
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(", ")[1] for line in lines] == ["index 2: empty file", "index 9: empty file"]  # each once


def test_features_are_the_same_on_one_and_eight_devices():
    backbone = ResNet(depth=10, base_channels=2, stem="cifar", auxiliary_norm=True)
    network = Network(backbone, ProjectionHead(4, 4, False, auxiliary_norm=True), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    crops = (np.zeros((1, 1, 8, 8, 3), np.float32),)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION))
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        offset = 1 if path[-1].key in ("scale", "var") else 0
        return (offset + 0.3 * generator.uniform(-1, 1, leaf.shape)).astype(np.float32)

    batch_stats = jax.tree_util.tree_map_with_path(draw, dict(shapes))
    params = batch_stats.pop("params")
    images = make_images()
    found = {}
    for num_devices in (1, 8):
        forward = make_extractor(network, make_mesh(jax.devices()[:num_devices]), np.float32)
        found[num_devices] = extract(lambda batch, forward=forward: forward(params, batch_stats, batch), images, 16)
    with pytest.raises(ValueError, match="divi"):  # 8 devices do share the rows
        forward(params, batch_stats, np.zeros((12, 6, 6, 3), np.uint8))
    assert found[1].shape == (21, 16) and found[1].std() > 1e-3
    np.testing.assert_allclose(found[8], found[1], rtol=1e-5, atol=1e-6)
    pixels = raw_pixels(images).reshape(21, 6, 6, 3)
    clean = {"params": params, stats_collection(CLEAN): batch_stats[stats_collection(CLEAN)]}
    direct = jax.jit(lambda x: network.apply(clean, x, EVALUATION, method=Network.features))(pixels)
    np.testing.assert_allclose(found[1], direct, rtol=1e-5, atol=1e-6)
