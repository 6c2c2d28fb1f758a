"""The input on the host and on the device: which example stands where, its crops, key shuffle, unreadable images."""

import collections
import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hexa_jax.core.batch import Batch
from hexa_jax.data import decode
from hexa_jax.data.augment import Photometric
from hexa_jax.data.crops import DeviceCrops, Resolution
from hexa_jax.data.decode import BadImage, crop_generator
from hexa_jax.data.pipeline import (
    BadImages,
    HostSteps,
    device_batches,
    host_iterator,
    key_rows,
    pass_order,
    read_or_replace,
    resident_images,
    tolerated,
)
from hexa_jax.data.sources import ArraySource, DataError, FolderSource
from hexa_jax.data.subset import Subset, spread
from hexa_jax.parallel.mesh import Layout, local_rows, make_mesh

NUM, BATCH = 40, 16
# All of what a crop can be, in the second.
TWO_SIZES = (Resolution(2, 8, (0.3, 1.0)), Resolution(3, 6, (0.1, 0.4), (0.5, 2.0), 0.5, 0.5, True))
ONE_CROP = (Resolution(1, 4, (0.2, 1.0)),)


def constant_images(num=NUM, size=9):
    """Image i has the one colour (i, 255 - i, 7 i)."""
    i = np.arange(num)
    colours = np.stack([i, 255 - i, 7 * i % 256], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, None, None], (num, size, size, 3)).copy()


def random_source(num=NUM, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (num, 12, 10, 3), np.uint8)
    return ArraySource(images, np.arange(num) % 5)


def shown(crops):
    """The index that a crop [..., S, S, 3] of a constant image shows; fails where it shows more than one colour."""
    assert (crops == crops[..., :1, :1, :]).all()
    index = crops[..., 0, 0, 0].astype(int)
    np.testing.assert_array_equal(crops[..., 0, 0, 1], 255 - index)
    return index


def make_steps(source=None, *, rows=None, microbatches=1, batch_size=BATCH, key_crops=0, block=0, **settings):
    source = ArraySource(constant_images(), np.arange(NUM) % 5) if source is None else source
    layout = Layout(batch_size, microbatches, 1, 1, 1, block)
    rows = np.arange(batch_size).reshape(microbatches, -1) if rows is None else rows
    settings = {"seed": 3, "num_steps": 20, "resolutions": ONE_CROP, "max_failures": 5, "labels": None} | settings
    return HostSteps(source, len(source), key_crops=key_crops, layout=layout, rows=rows, **settings)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
        assert first[name].dtype == second[name].dtype, name


class Fragile:
    """A source with unreadable examples, that counts its reads."""

    def __init__(self, source, broken, error=BadImage):
        self.source, self.broken, self.error = source, set(broken), error
        self.reads = collections.Counter()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads[index] += 1
        if index in self.broken:
            raise self.error(self.name(index), "broken")
        return self.source[index]

    def name(self, index):
        return f"picture-{index}.jpg"


# ---- Order of the examples ---------------------------------------------------------------------------------------------


def test_every_example_once_per_pass():
    steps = make_steps(batch_size=8)
    assert steps.steps_per_epoch == 5
    passes = [np.concatenate([steps[5 * p + s]["index"].ravel() for s in range(5)]) for p in range(3)]
    for order in passes:
        np.testing.assert_array_equal(np.sort(order), np.arange(NUM))
    other_seed = np.concatenate([make_steps(batch_size=8, seed=4)[s]["index"].ravel() for s in range(5)])
    orders = [tuple(order) for order in (*passes, other_seed, range(NUM))]
    assert len(set(orders)) == 5


def test_a_batch_holds_no_example_twice_and_the_rest_is_left_out():
    steps = make_steps()  # 40 examples, batches of 16
    assert steps.steps_per_epoch == 2 and len(steps) == 20
    first, second, third = (set(steps[s]["index"].ravel().tolist()) for s in range(3))
    assert len(first) == len(second) == BATCH and not first & second
    np.testing.assert_array_equal(steps[2]["index"].ravel(), pass_order(3, 1, NUM)[:BATCH])  # the next pass
    left_out = [frozenset(range(NUM)) - set(pass_order(3, p, NUM)[:32].tolist()) for p in range(6)]
    assert len(set(left_out)) == 6
    assert third != first


def test_pixels_and_labels_belong_to_the_index():
    element = make_steps(resolutions=TWO_SIZES, microbatches=2)[1]
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in element.items()} == {
        "index": ((2, 8), "int32"),
        "row": ((2, 8), "int32"),
        "label": ((2, 8), "int32"),
        "valid": ((2, 8), "bool"),
        "bad": ((0,), "int32"),
        "crops0": ((2, 8, 2, 8, 8, 3), "uint8"),
        "crops1": ((2, 8, 3, 6, 6, 3), "uint8"),
    }
    for name in ("crops0", "crops1"):
        np.testing.assert_array_equal(
            shown(element[name]), np.broadcast_to(element["index"][..., None], shown(element[name]).shape)
        )
    np.testing.assert_array_equal(element["label"], element["index"] % 5)
    np.testing.assert_array_equal(element["row"].ravel(), np.arange(BATCH))
    assert element["valid"].all()


def test_a_source_without_labels():
    assert (make_steps(ArraySource(constant_images()))[0]["label"] == -1).all()


def test_labels_and_failures_of_resident_images():
    labels = np.arange(NUM, dtype=np.int32) + 100
    whole = make_steps()
    resident = dataclasses.replace(whole, source=None, labels=labels, bad=frozenset({5, 6, 7}))
    failed = 0
    for number in range(2):
        element = resident[number]
        assert set(element) == {"index", "row", "label", "valid", "bad"} and not len(element["bad"])
        np.testing.assert_array_equal(element["index"], whole[number]["index"])
        expected = ~np.isin(element["index"], (5, 6, 7))
        np.testing.assert_array_equal(element["valid"], expected)
        np.testing.assert_array_equal(element["label"], np.where(expected, element["index"] + 100, -1))
        failed += (~expected).sum()
    assert failed > 0


# ---- Processes and microbatches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_crops, block", [(0, 0), (1, 4), (1, 16)])
def test_microbatches_only_reshape(key_crops, block):
    source = random_source()
    settings = {"source": source, "key_crops": key_crops, "block": block}
    whole = make_steps(**settings)[3]
    split = make_steps(**settings, microbatches=4)[3]
    assert_same(whole, {name: x if name == "bad" else x.reshape(1, BATCH, *x.shape[2:]) for name, x in split.items()})
    assert split["crops0"].shape[:2] == (4, 4)


@pytest.mark.parametrize("key_crops, block", [(0, 0), (1, 4), (1, 8), (1, 16)])
@pytest.mark.parametrize("splits", [[4, 4], [2, 6], [1, 2, 5]])
def test_processes_together_build_the_whole(key_crops, block, splits):
    """Each process builds some columns of the rows [2 microbatches, 8]; blocks of keys cross the splits."""
    source, rows = random_source(), np.arange(BATCH).reshape(2, 8)
    settings = {"source": source, "microbatches": 2, "key_crops": key_crops, "block": block, "resolutions": TWO_SIZES}
    whole = make_steps(**settings)[4]
    columns = np.split(rows, np.cumsum(splits)[:-1], axis=1)
    parts = [make_steps(**settings, rows=part)[4] for part in columns]
    joined = {name: np.concatenate([part[name] for part in parts], axis=1) for name in whole if name != "bad"}
    assert_same({name: leaf for name, leaf in whole.items() if name != "bad"}, joined)


def test_a_block_that_crosses_processes_is_decoded_by_both():
    def reads(block, columns):
        source = Fragile(random_source(), ())
        steps = make_steps(source, key_crops=1, block=block, rows=np.arange(BATCH).reshape(1, -1)[:, columns])
        element = steps[0]
        assert set(source.reads.values()) == {1}  # each image is decoded once
        assert source.reads.keys() == set(element["index"].ravel().tolist()) | set(
            element["key_index"].ravel().tolist()
        )
        return source.reads.keys()

    halves = slice(0, 8), slice(8, 16)
    assert not reads(8, halves[0]) & reads(8, halves[1])
    first, second = reads(16, halves[0]), reads(16, halves[1])
    assert 8 < len(first) < 16 and first & second


# ---- Crops and keys ----------------------------------------------------------------------------------------------------


def test_a_crop_depends_on_seed_pass_index_and_crop_only():
    source = random_source()
    steps = make_steps(source, resolutions=TWO_SIZES, key_crops=1, block=8)
    element = steps[3]  # the second of the second pass
    numbered = [
        (name, v, number)
        for number, (name, v) in enumerate([("crops0", 0), ("crops0", 1)] + [("crops1", v) for v in range(3)])
    ]
    for r, index in enumerate(element["index"][0]):
        for name, v, number in numbered:
            resolution = TWO_SIZES[int(name[-1])]
            generator = crop_generator(3, 1, int(index), number)
            settings = dataclasses.astuple(resolution)[1:]
            expected = decode.random_resized_crop(source[index]["image"], generator, *settings)
            np.testing.assert_array_equal(element[name][0, r, v], expected)
        key_index = int(element["key_index"][0, r])
        expected = decode.random_resized_crop(
            source[key_index]["image"], crop_generator(3, 1, key_index, 5), 8, (0.3, 1.0)
        )
        np.testing.assert_array_equal(element["key_crops"][0, r, 0], expected)


def test_crops_differ_between_passes_seeds_and_crops():
    source = ArraySource(np.random.default_rng(1).integers(0, 256, (NUM, 60, 50, 3), np.uint8))
    resolutions = (Resolution(2, 8, (0.2, 0.5)),)

    def crops_of(seed, pass_number, index=11):
        steps = make_steps(source, seed=seed, batch_size=8, resolutions=resolutions)
        for step in range(5):
            element = steps[5 * pass_number + step]
            found = np.argwhere(element["index"][0] == index)
            if len(found):
                return list(element["crops0"][0, found[0, 0]])
        raise AssertionError

    crops = crops_of(3, 0) + crops_of(3, 1) + crops_of(4, 0)
    assert len({crop.tobytes() for crop in crops}) == 6


def test_key_rows_shuffle_inside_blocks():
    for block in (1, 4, 8, 32):
        slots = key_rows(0, 1, 2, 32, block)
        np.testing.assert_array_equal(np.sort(slots), np.arange(32))
        np.testing.assert_array_equal(slots // block, np.arange(32) // block)
    blocks = key_rows(0, 1, 2, 32, 8).reshape(4, 8) % 8
    assert len({tuple(row) for row in blocks}) == 4  # each block its own order
    others = [key_rows(*where, 32, 8) for where in ((0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2))]
    assert len({tuple(other) for other in others}) == 4


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_keys_come_shuffled_with_the_way_back(block, microbatches):
    steps = make_steps(key_crops=1, block=block, microbatches=microbatches)
    moved = 0
    for number in (0, 1, 5):
        element = steps[number]
        index, key_index, key_row = (element[name].ravel() for name in ("index", "key_index", "key_row"))
        np.testing.assert_array_equal(key_index[key_row], index)  # key_row undoes the shuffle
        np.testing.assert_array_equal(key_row // block, np.arange(BATCH) // block)
        np.testing.assert_array_equal(shown(element["key_crops"])[..., 0].ravel(), key_index)
        np.testing.assert_array_equal(shown(element["crops0"])[..., 0].ravel(), index)
        moved += (key_index != index).mean()
    assert moved > 1.5


def test_no_keys_without_key_crops():
    assert not [name for name in make_steps()[0] if name.startswith("key")]


# ---- Unreadable images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BadImage, OSError])
def test_the_next_readable_image_fills_the_slot(error):
    def break_it(name, reason):
        return BadImage(name, reason) if error is BadImage else OSError(5, reason, name)

    source = Fragile(ArraySource(constant_images(), np.arange(NUM) % 5), (7, 8, 39), break_it)
    steps = make_steps(source, batch_size=NUM, key_crops=1, block=NUM)
    element = steps[0]
    instead = {7: 9, 8: 9, 39: 0}
    index = element["index"].ravel()
    wanted = [instead.get(int(i), int(i)) for i in index]
    np.testing.assert_array_equal(shown(element["crops0"]).ravel(), wanted)
    np.testing.assert_array_equal(element["valid"].ravel(), ~np.isin(index, list(instead)))
    np.testing.assert_array_equal(element["label"].ravel(), np.where(element["valid"].ravel(), index % 5, -1))
    assert sorted(element["bad"].tolist()) == [7, 8, 8, 39]  # 7's replacement was tried too
    keys = [instead.get(int(i), int(i)) for i in element["key_index"].ravel()]
    np.testing.assert_array_equal(shown(element["key_crops"]).ravel(), keys)
    np.testing.assert_array_equal(np.sort(index), np.arange(NUM))  # the identity stays


def test_corrupt_files_are_reported_once_by_path(tmp_path, caplog):
    import cv2

    for i in range(20):
        (tmp_path / f"{i:02d}.png").write_bytes(cv2.imencode(".png", constant_images()[i][..., ::-1])[1].tobytes())
    (tmp_path / "04.png").write_bytes(b"")
    (tmp_path / "11.png").write_bytes((tmp_path / "11.png").read_bytes()[:40])
    source = FolderSource(str(tmp_path))
    bad_images, mesh = BadImages(source, 0.1), make_mesh(jax.devices()[:1])
    labels = np.full(20, 50, np.int32)
    steps = make_steps(source, batch_size=10, num_steps=6)
    with caplog.at_level(logging.WARNING):
        batches = list(device_batches(iter([steps[i] for i in range(6)]), mesh, steps.layout, bad_images, labels))
    assert bad_images.seen == {4, 11}
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(line.split()[2] for line in lines) == [f"{tmp_path}/04.png:", f"{tmp_path}/11.png:"]
    invalid = [int(i) for batch in batches for i in np.asarray(batch.index)[~np.asarray(batch.valid)]]
    assert sorted(invalid) == [4, 4, 4, 11, 11, 11] and len(batches) == 6
    assert (labels == -1).all()  # passed by, and none known


def test_too_many_unreadable_images_stop_the_run():
    source = Fragile(random_source(), ())
    bad_images = BadImages(source, 0.1)
    bad_images.add([3, 3, 5])
    bad_images.add(np.array([9, 1]))
    with pytest.raises(DataError, match=r"5 of 40 images cannot be read.*data\.max_bad_fraction.*picture-\d+\.jpg"):
        bad_images.add([1, 30])
    strict = BadImages(source, 0.0)
    strict.add([])
    with pytest.raises(DataError, match="1 of 40"):
        strict.add([2])


@pytest.mark.parametrize(
    "images, fraction, limit",
    [
        (1513, 0.001, 10),  # a folder of photographs: four bad files do not end the run
        (1513, 0.01, 15),
        (1_281_167, 0.001, 1281),
        (100, 0.001, 5),
        (40, 0.1, 4),
        (19, 0.001, 0),
        (1513, 0.0, 0),
    ],
)
def test_a_handful_of_bad_files_is_tolerated(images, fraction, limit):
    assert tolerated(fraction, images) == limit
    bad_images = BadImages(Fragile(np.zeros((images, 1)), ()), fraction)
    bad_images.add(range(limit))
    message = (
        rf"{limit + 1} of {images} images .* the {limit} that --config\.data\.max_bad_fraction={fraction:g} allows"
    )
    with pytest.raises(DataError, match=message):
        bad_images.add([limit])


@pytest.mark.parametrize("max_failures, tried", [(0, 1), (2, 3), (100, NUM)])
def test_everything_unreadable_ends(max_failures, tried):
    source = Fragile(random_source(), range(NUM))
    with pytest.raises(DataError, match=f"{tried} images? in a row cannot be read, the last is picture-") as caught:
        read_or_replace(source, 38, max_failures)
    assert "\n" not in str(caught.value) and sum(source.reads.values()) == tried


def test_one_readable_image_among_allowed_failures_is_found():
    source = Fragile(ArraySource(constant_images(), np.arange(NUM)), set(range(NUM)) - {2})
    image, label, failed = read_or_replace(source, 3, NUM)
    assert image[0, 0, 0] == 2 and label == 2 and failed == [*range(3, NUM), 0, 1]


# ---- Threads and worker processes --------------------------------------------------------------------------------------


def test_threads_and_workers_give_the_same_elements():
    steps = make_steps(random_source(), microbatches=2, key_crops=1, block=8, num_steps=7)
    expected = [steps[number] for number in range(7)]
    for start in (0, 3, 7):
        elements = list(host_iterator(steps, start, workers=0, threads=2, buffer=3))
        assert len(elements) == 7 - start
        for element, wanted in zip(elements, expected[start:], strict=True):
            assert_same(element, wanted)
    elements = list(host_iterator(steps, 2, workers=2, threads=2, buffer=2))
    assert len(elements) == 5
    for element, wanted in zip(elements, expected[2:], strict=True):
        assert_same(element, wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_error_reaches_the_loop_as_itself(workers):
    images = np.zeros((4, 4, 4, 3), np.uint8)
    steps = make_steps(Unreadable(images), batch_size=2, num_steps=4, max_failures=1)
    with pytest.raises(DataError) as caught:
        next(host_iterator(steps, 1, workers, threads=1, buffer=1))
    assert re.fullmatch(
        r"2 images in a row cannot be read, the last is arrays, index \d: empty file", str(caught.value)
    )


class Unreadable(ArraySource):
    """All images are empty files; crosses to worker processes."""

    def __getitem__(self, index):
        return {"image": b""}

    def __reduce__(self):
        return Unreadable, (self._images,)


def test_batches_reach_eight_devices():
    mesh, layout = make_mesh(), Layout(BATCH, 2, 8, 1, 1, 8)
    steps = make_steps(resolutions=TWO_SIZES, key_crops=1, block=8, rows=local_rows(mesh, layout), microbatches=2)
    labels, source = np.full(NUM, -1, np.int32), steps.source
    elements = [steps[number] for number in range(4)]
    taken = []

    def take():
        for element in elements:
            taken.append(element)
            yield dict(element)

    stream = device_batches(take(), mesh, layout, BadImages(source, 0.0), labels)
    batches = [next(stream)]
    assert len(taken) == 3  # two are on their way while the first is used
    batches += stream
    assert len(batches) == 4
    for batch, element in zip(batches, elements, strict=True):
        assert [x.shape for x in batch.crops] == [(2, 8, 2, 8, 8, 3), (2, 8, 3, 6, 6, 3)]
        np.testing.assert_array_equal(batch.crops[0], element["crops0"])
        np.testing.assert_array_equal(batch.crops[1], element["crops1"])
        for name in ("index", "row", "valid", "label", "key_crops", "key_index", "key_row"):
            leaf = getattr(batch, name)
            np.testing.assert_array_equal(leaf, element[name])
            assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {1}
    seen = np.unique(np.concatenate([element["index"].ravel() for element in elements]))
    np.testing.assert_array_equal(labels[seen], seen % 5)
    assert (np.delete(labels, seen) == -1).all()


# ---- Whole data sets on the device -------------------------------------------------------------------------------------


def test_resident_images():
    images = constant_images()
    source = Fragile(ArraySource(images), (0, 17, 39))
    bad_images = BadImages(source, 0.1)
    got = resident_images(source, bad_images, 4)
    expected = images.copy()
    expected[[0, 17, 39]] = images[[1, 18, 1]]  # 39's next is 0, which cannot be read either
    np.testing.assert_array_equal(got, expected)
    assert got.dtype == np.uint8 and bad_images.seen == {0, 17, 39}
    with pytest.raises(DataError, match="3 of 40"):
        resident_images(source, BadImages(source, 0.05), 4)


def test_resident_images_must_have_one_size():
    class Mixed(Fragile):
        def __getitem__(self, index):
            return {"image": np.zeros((4, 6 if index == 3 else 5, 3), np.uint8)}

    source = Mixed(random_source(), ())
    with pytest.raises(
        DataError, match=r"data\.on_device needs images of one size: picture-3\.jpg is 6x4, the first is 5x4"
    ):
        resident_images(source, BadImages(source, 0.0), 0)


def test_subset_is_a_source():
    source = random_source()
    part = Subset(source, spread(NUM, 7))
    assert len(part) == 7 and part.num_classes == 5
    np.testing.assert_array_equal(part.labels(), source.labels()[spread(NUM, 7)])
    assert part.name(2) == source.name(int(spread(NUM, 7)[2]))
    np.testing.assert_array_equal(part[6]["image"], source[int(spread(NUM, 7)[6])]["image"])
    assert Subset(ArraySource(constant_images()), np.array([3])).labels() is None


def test_spread_is_even_and_within_limits():
    np.testing.assert_array_equal(spread(10, 0), np.arange(10))
    np.testing.assert_array_equal(spread(10, 20), np.arange(10))
    np.testing.assert_array_equal(spread(10, 5), [0, 2, 4, 6, 8])
    for num, limit in ((1000, 7), (1_281_167, 20_000), (13, 12)):
        indices = spread(num, limit)
        assert len(set(indices.tolist())) == limit and indices[0] == 0 and indices[-1] < num
        assert np.ptp(np.diff(indices)) <= 1 and num - indices[-1] <= num // limit + 1


# ---- Crops on the device -----------------------------------------------------------------------------------------------

PLAIN = Photometric(jitter_probability=0, gray_probability=0, blur_probability=0)
GREY = dataclasses.replace(PLAIN, gray_probability=1.0)
SOLARIZED = dataclasses.replace(PLAIN, solarize_probability=1.0)
# Only what compiles quickly: the operations have tests of their own.
RANDOM = dataclasses.replace(
    PLAIN, jitter_probability=0.9, contrast=0, saturation=0, hue=0, gray_probability=0.3, solarize_probability=0.5
)
DEVICE_SIZES = (Resolution(2, 8, (0.3, 1.0)), Resolution(1, 6, (0.1, 0.4), (0.5, 2.0), 0.5, 0.5, True))


def device_batch(num=6, seed=0, key=True):
    rng = np.random.default_rng(seed)
    index = jnp.asarray(rng.permutation(NUM)[:num], jnp.int32)
    crops = tuple(jnp.asarray(rng.integers(0, 256, (num, r.count, r.size, r.size, 3), np.uint8)) for r in DEVICE_SIZES)
    keys = jnp.asarray(rng.integers(0, 256, (num, 1, 8, 8, 3), np.uint8))
    row = jnp.arange(num, dtype=jnp.int32)
    return Batch(index, row, row >= 0, row, crops, keys, index[::-1], row[::-1])


def example_keys(index, seed=0):
    key = jax.random.key(seed)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


@functools.partial(jax.jit, static_argnums=0)
def both_crops(crops, batch, data, seed):
    online = crops.online(example_keys(batch.index, seed), batch, data)
    return online, crops.target(example_keys(batch.key_index, seed), batch, data)


def run_crops(crops, batch, data=None, seed=0):
    """(online crops per resolution, key crops) as NumPy arrays."""
    online, target = both_crops(crops, batch, data, seed)
    return [np.asarray(x) for x in online], np.asarray(target)


@pytest.mark.parametrize("resident", [False, True])
def test_device_crops_are_pixels_in_the_unit_interval(resident):
    crops, batch = DeviceCrops(DEVICE_SIZES, 1, (RANDOM,) * 4), device_batch()
    data = jnp.asarray(np.random.default_rng(2).integers(0, 256, (NUM, 10, 9, 3), np.uint8)) if resident else None
    online, target = run_crops(crops, batch, data)
    assert [x.shape for x in online] == [(6, 2, 8, 8, 3), (6, 1, 6, 6, 3)] and target.shape == (6, 1, 8, 8, 3)
    for x in (*online, target):
        assert x.dtype == np.float32 and x.min() >= 0 and x.max() <= 1 and x.std() > 0.05
    # The same example makes the same crop in any place of any batch.
    order = np.array([4, 1, 1, 5, 0, 4])
    part = jax.tree.map(lambda leaf: leaf[order], batch)
    moved, moved_target = run_crops(crops, part, data)
    for x, y in zip((*online, target), (*moved, moved_target), strict=True):
        np.testing.assert_allclose(y, x[order], atol=1e-6)
    again, _ = run_crops(crops, batch, data, seed=1)
    assert np.abs(again[0] - online[0]).max() > 0.1


def test_device_crops_show_the_examples_of_index_and_key_index():
    crops, batch = DeviceCrops(DEVICE_SIZES, 1, (PLAIN,) * 4), device_batch()
    online, target = run_crops(crops, batch, jnp.asarray(constant_images()))
    for x, index in ((online[0], batch.index), (online[1], batch.index), (target, batch.key_index)):
        colours = constant_images()[np.asarray(index)][:, None, :1, :1] / 255
        np.testing.assert_allclose(x, np.broadcast_to(colours, x.shape), atol=1e-6)


def test_each_crop_has_its_own_settings():
    batch = device_batch()
    online, target = run_crops(DeviceCrops(DEVICE_SIZES, 1, (PLAIN, SOLARIZED, GREY, SOLARIZED)), batch)
    first, second, third, key = (
        np.asarray(x, np.float32) / 255
        for x in (batch.crops[0][:, 0], batch.crops[0][:, 1], batch.crops[1][:, 0], batch.key_crops[:, 0])
    )
    np.testing.assert_allclose(online[0][:, 0], first, atol=1e-6)
    np.testing.assert_allclose(online[0][:, 1], np.where(second >= 0.5, 1 - second, second), atol=1e-6)
    np.testing.assert_allclose(
        online[1][:, 0], np.repeat(third @ np.array([[0.299], [0.587], [0.114]]), 3, -1), atol=1e-3
    )
    np.testing.assert_allclose(target[:, 0], np.where(key >= 0.5, 1 - key, key), atol=1e-6)


@pytest.mark.parametrize("resident", [False, True])
def test_a_crop_does_not_depend_on_the_settings_of_others(resident):
    batch, data = device_batch(), jnp.asarray(random_source()._images) if resident else None
    same, key = run_crops(DeviceCrops(DEVICE_SIZES, 1, (RANDOM,) * 4), batch, data)
    mixed, other_key = run_crops(DeviceCrops(DEVICE_SIZES, 1, (PLAIN, RANDOM, RANDOM, RANDOM)), batch, data)
    np.testing.assert_allclose(mixed[0][:, 1], same[0][:, 1], atol=1e-6)
    np.testing.assert_allclose(mixed[1], same[1], atol=1e-6)
    np.testing.assert_allclose(other_key, key, atol=1e-6)
    assert np.abs(mixed[0][:, 0] - same[0][:, 0]).max() > 0.05


def test_crops_of_one_resident_image_differ():
    crops, batch = DeviceCrops((Resolution(3, 8, (0.1, 0.3)),), 1, (PLAIN,) * 4), device_batch(2)
    batch = batch._replace(crops=(), key_crops=None, key_index=batch.index)
    online, target = run_crops(crops, batch, jnp.asarray(random_source()._images))
    made = [*online[0][0], target[0, 0]]
    assert len({np.round(x, 4).tobytes() for x in made}) == 4
