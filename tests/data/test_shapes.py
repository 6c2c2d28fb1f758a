"""The embedded data set: reproducible, the same at every size, and silent about the class in all but the shape."""

import pickle

import cv2
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hexa_jax.data.shapes import CLASS_NAMES, ShapesSource, _distance, make_shapes

GOLDEN_MEANS = [[129.79, 204.01, 227.53], [231.53, 128.87, 189.16], [164.07, 230.25, 124.46]]


def test_example_depends_on_seed_split_and_index_only():
    images, labels = make_shapes(700)
    assert images.shape == (700, 32, 32, 3) and images.dtype == np.uint8
    assert labels.dtype == np.int32
    chosen = [699, 3, 3, 257]
    again, again_labels = make_shapes(chosen)
    np.testing.assert_array_equal(again, images[chosen])
    np.testing.assert_array_equal(again_labels, labels[chosen])
    for other in (make_shapes(50, seed=1), make_shapes(50, split="test")):
        differ = np.abs(other[0].astype(int) - images[:50]).mean((1, 2, 3))
        assert (differ > 1).all()
    assert len(np.unique(images.reshape(700, -1), axis=0)) == 700
    far = make_shapes([2**40, 2**40 + 1])[0]
    assert not np.array_equal(far[0], far[1])


def test_the_first_images_never_change():
    """Published numbers rest on these pixels; tolerance 1 for another processor's sine."""
    images, _ = make_shapes(3)
    means = images.astype(np.float64).mean((1, 2))
    np.testing.assert_allclose(means, GOLDEN_MEANS, atol=0.05)


def test_classes_are_balanced_in_every_prefix():
    _, labels = make_shapes(1003, image_size=16)
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    assert len(CLASS_NAMES) >= 10 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("size", [64, 96, 224])
def test_same_content_at_every_size(size):
    small = make_shapes(20)[0]
    large = make_shapes(20, image_size=size)[0]
    reduced = np.stack([cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA) for image in large])
    error = np.abs(reduced.astype(int) - small).mean((1, 2, 3))
    unrelated = np.abs(reduced[::-1].astype(int) - small).mean((1, 2, 3))
    assert error.max() < 6 < unrelated.min(), error


def test_shapes_are_mirror_images_of_themselves_with_equal_area():
    grid = np.linspace(-1.5, 1.5, 401, dtype=np.float32)
    x, y = np.meshgrid(grid, grid)
    inside = np.stack([_distance(label, x, y) < 0 for label in range(len(CLASS_NAMES))])
    np.testing.assert_allclose(inside.mean((1, 2)) * 9, 1, atol=0.02)
    assert (inside != inside[:, :, ::-1]).mean() < 1e-3  # a flip keeps the class
    for a in range(len(inside)):  # and no two classes look alike
        for b in range(a):
            assert (inside[a] != inside[b]).mean() * 9 > 0.15, (CLASS_NAMES[a], CLASS_NAMES[b])


def histograms(images: np.ndarray, bins: int = 16) -> np.ndarray:
    binned = images // (256 // bins)
    return (binned[..., None] == np.arange(bins)).mean((1, 2)).reshape(len(images), -1)


def test_colours_are_at_chance_and_pixels_far_from_solved():
    train, train_labels = make_shapes(5000)
    test, test_labels = make_shapes(1000, split="test")

    def knn(features):
        return KNeighborsClassifier(20).fit(features(train), train_labels).score(features(test), test_labels)

    assert knn(histograms) < 0.15  # chance 0.10, standard error 0.01
    assert knn(lambda images: np.concatenate([images.mean((1, 2)), images.std((1, 2))], -1)) < 0.14
    assert knn(lambda images: images.reshape(len(images), -1) / np.float32(255)) < 0.40


def test_bad_arguments_are_named():
    for bad, message in (
        ({"split": "val"}, "train and test"),
        ({"image_size": 8}, "16 to 1024"),
    ):
        with pytest.raises(ValueError, match=message):
            make_shapes(2, **bad)
    with pytest.raises(ValueError, match="negative index -1"):
        make_shapes([-1])
    assert make_shapes(0)[0].shape == (0, 32, 32, 3)


@pytest.mark.parametrize("kept", [True, False])
def test_source_draws_what_make_shapes_draws(kept):
    source = ShapesSource("test", image_size=24, num_examples=30, seed=5)
    source._fits = kept
    images, labels = make_shapes(30, image_size=24, seed=5, split="test")
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (29, 0, 7):
            np.testing.assert_array_equal(copy[i]["image"], images[i])
            assert copy[i]["label"] == labels[i] and type(copy[i]["label"]) is int
    np.testing.assert_array_equal(source.labels(), labels)
    np.testing.assert_array_equal(source.arrays()[0], images)
    assert len(source) == 30 and source.num_classes == len(source.class_names) == 10
    assert source.name(7) == "shapes:test, index 7"
    for outside in (-1, 30):
        with pytest.raises(IndexError):
            source[outside]
