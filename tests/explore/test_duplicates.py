"""Near duplicates: edited copies are found, and different pictures are not."""

import cv2
import numpy as np
from textures import reencoded, resized, texture

from hexa_jax.explore.duplicates import GRID, THRESHOLD, find_pairs, groups_of, signature


def copies(image):
    """The same picture in other files."""
    return [
        reencoded(resized(image, 0.5), 75),
        reencoded(image, 30),
        resized(image, 1.7),
        np.clip(image * 1.05 + 8, 0, 255).astype(np.uint8),
        cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
    ]


def test_copies_are_found_and_nothing_else():
    originals = [texture(number) for number in range(40)]
    images = originals + copies(originals[3]) + copies(originals[17])
    pairs, correlation = find_pairs(np.stack([signature(image) for image in images]))
    groups = groups_of(pairs, len(images))
    assert groups == [[3, 40, 41, 42, 43, 44], [17, 45, 46, 47, 48, 49]]
    assert (pairs[:, 0] < pairs[:, 1]).all() and (np.diff(correlation) <= 0).all()
    assert correlation.min() >= THRESHOLD and correlation.max() <= 1
    assert len(np.unique(pairs, axis=0)) == len(pairs)


def test_a_mirror_image_and_a_crop_are_other_pictures():
    image = texture(0)
    others = [image, image[:, ::-1], image[12:48, 16:64]]
    assert len(find_pairs(np.stack([signature(other) for other in others]))[0]) == 0


def test_a_signature_is_the_correlation_of_small_grey_pictures():
    a, b = texture(1), texture(2, 90, 50)
    small = [cv2.resize(image, (GRID, GRID), interpolation=cv2.INTER_AREA) for image in (a, b)]
    grey = [image.astype(float) @ [0.299, 0.587, 0.114] for image in small]
    expected = np.corrcoef(grey[0].ravel(), grey[1].ravel())[0, 1]
    assert np.isclose(signature(a) @ signature(b), expected, atol=1e-6)


def test_images_of_one_colour_are_alike_and_like_no_other():
    images = [np.full((20, 30, 3), level, np.uint8) for level in (0, 128, 255)] + [texture(0)]
    signatures = np.stack([signature(image) for image in images])
    np.testing.assert_allclose(np.linalg.norm(signatures, axis=1), 1, atol=1e-6)
    assert groups_of(find_pairs(signatures)[0], 4) == [[0, 1, 2]]


def test_many_copies_are_one_group():
    pairs, _ = find_pairs(np.stack([signature(texture(0))] * 50 + [signature(texture(1))]))
    assert groups_of(pairs, 51) == [list(range(50))]


def test_one_image_has_no_pairs():
    pairs, correlation = find_pairs(signature(texture(0))[None])
    assert pairs.shape == (0, 2) and correlation.shape == (0,) and groups_of(pairs, 1) == []


def test_photographs(hexa_data):
    """900 photographs of Imagenette, and half-size JPEG copies of 60 of them."""
    with np.load(hexa_data / "imagenette160_val_jpack.npz") as arrays:
        pack = {name: arrays[name] for name in arrays.files}  # each look into a file reads all of it
    images = [photograph(pack, number) for number in range(0, 3600, 4)]
    chosen = range(5, 900, 15)
    inserted = [reencoded(resized(images[n], 0.5), 75 if n % 2 else 30) for n in chosen]
    pairs, _ = find_pairs(np.stack([signature(image) for image in images + inserted]))
    assert sorted(pairs.tolist()) == [[n, 900 + place] for place, n in enumerate(chosen)]


def photograph(pack, number):
    """RGB pixels of an image of a pack: a shared header, then its own data."""
    start, end = pack["header_offsets"][pack["header_id"][number] + np.array([0, 1])]
    data = pack["blob"][pack["offsets"][number] : pack["offsets"][number + 1]]
    return cv2.imdecode(np.concatenate([pack["headers"][start:end], data]), cv2.IMREAD_COLOR_RGB)
