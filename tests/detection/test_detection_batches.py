"""Detection's batches: geometry worked by hand and against PyTorch, who stands where, and pixels that agree with boxes."""

import collections
import os
import pathlib
import pickle
import struct
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from command_line import REPOSITORY, environment, free_port
from test_detection_data import annotation, extracted, thing, write_voc

from configs.eval import detection_voc
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError
from hexa_jax.detection.batches import (
    DetectionBatch,
    DetectionSteps,
    EvaluationBatches,
    TrainingBatches,
    largest_boxes,
    pixels_of,
)
from hexa_jax.detection.canvases import Canvases, content_sizes, draw, is_portrait, move_boxes
from hexa_jax.detection.data import open_detection
from hexa_jax.detection.metrics import Truth
from hexa_jax.detection.plans import EvaluationPlan, TrainingPlan
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import make_mesh

PAIRS = ((64, 96), (96, 128))
SIDES, LIMIT = (48, 64, 80), 120


def settings(**overrides):
    """Canvases of at most 96 x 128 pixels; overrides by dotted key."""
    config = detection_voc.get_config()
    config.seed, config.batch_size = 5, 4
    config.data.update(canvases=PAIRS, short_sides=SIDES, eval_short_side=80, long_limit=LIMIT, max_boxes=3)
    config.data.max_bad_fraction = 0.2
    config.runtime.batch_size, config.runtime.prefetch = 4, 2
    config.update_from_flattened_dict(overrides)
    return config


def mesh(count=1):
    return make_mesh(jax.devices()[:count])


def host(batch):
    return jax.tree.map(np.asarray, batch)


def assert_equal(got, wanted):
    for name, ours, theirs in zip(DetectionBatch._fields, got, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert ours.dtype == theirs.dtype


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 images of many sizes, every third standing; image i has a white box on black, and its class is i mod 20."""
    root, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(0)
    images, boxes = {}, {}
    for number in range(23):
        short, long = rng.integers(60, 100), rng.integers(100, 160)
        size = (int(long), int(short)) if number % 3 == 0 else (int(short), int(long))
        y1, x1 = (int(rng.integers(1, side // 2)) for side in size)
        y2, x2 = (int(rng.integers(side // 2 + 9, side + 1)) for side in size)
        name = f"{number:02d}"
        boxes[name] = (x1, y1, x2, y2)
        images[name] = (size, annotation(size, thing(NAMES[number % 20], boxes[name])))
    write_voc(root, images)
    for name, (x1, y1, x2, y2) in boxes.items():
        pixels = np.zeros((*images[name][0], 3), np.uint8)
        pixels[y1 - 1 : y2, x1 - 1 : x2] = 255
        assert cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])
    return root


NAMES = [f"class{number:02d}" for number in range(20)]


@pytest.fixture
def source(folder):
    return open_detection(f"voc:{folder}", class_names=NAMES)


# ---- Geometry ----------------------------------------------------------------------------------------------------------


def test_sizes_by_hand():
    """512 x 384 at 768: twice as large; at 800: 512 * 800 / 384 = 1066.67; 512 x 128 at 768 would be 3072 long: 1024 / 512."""
    sizes = np.array([[384, 512], [512, 384], [128, 512], [512, 512]])
    np.testing.assert_array_equal(content_sizes(sizes, 768, 1024), [[768, 1024], [1024, 768], [256, 1024], [768, 768]])
    np.testing.assert_array_equal(content_sizes(sizes[0], 800, 1333), [800, 1066])
    assert content_sizes(np.array([1, 5000]), 800, 1333).tolist()[0] == 1


def test_sides_are_a_pixel_short_where_torchvisions_are():
    """int(side * (800 / side)) in float64; the list and the pairs are from torchvision 0.28's transform itself."""
    sides = np.arange(20, 340)
    got = content_sizes(np.stack([sides, sides], axis=1), 800, 1333)
    short = [97, 161, 167, 193, 194, 195, 199, 289, 305, 322, 334, 335, 337]
    assert sides[(got != 800).any(axis=1)].tolist() == short and got.min() == 799
    originals = np.array([[334, 500], [375, 500], [333, 500], [281, 500]])
    wanted = [[799, 1197], [800, 1066], [800, 1201], [749, 1333]]
    np.testing.assert_array_equal(content_sizes(originals, 800, 1333), wanted)


def test_sizes_are_those_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    rng = np.random.default_rng(0)
    exact = 0
    for size, short in zip(rng.integers(20, 700, (400, 2)).tolist(), rng.integers(30, 200, 400).tolist(), strict=True):
        scale = min(short / min(size), 250 / max(size))
        image = torch.zeros(1, 1).expand(1, 1, *size)
        options = {"scale_factor": scale, "recompute_scale_factor": True, "mode": "bilinear", "align_corners": False}
        wanted = list(torch.nn.functional.interpolate(image, **options).shape[2:])
        got = content_sizes(np.array(size), short, 250).tolist()
        assert got == wanted
        exact += short in got or 250 in got
    assert exact < 400  # some are a pixel short


def test_pixels_are_those_of_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is optional")
    rng = np.random.default_rng(0)
    for size, content in (((37, 50), (80, 108)), ((90, 61), (41, 28)), ((20, 20), (20, 20))):
        pixels, canvas = rng.integers(0, 256, (*size, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
        draw(pixels, content, False, canvas)
        wanted = torch.nn.functional.interpolate(
            torch.tensor(pixels).permute(2, 0, 1)[None].float(), size=content, mode="bilinear", align_corners=False
        )
        got = canvas[: content[0], : content[1]].astype(np.float32)
        assert np.abs(got - wanted[0].permute(1, 2, 0).numpy()).max() < 1.01  # whole numbers, in fixed point
        assert not canvas[content[0] :].any() and not canvas[:, content[1] :].any()


def test_drawing_by_hand():
    """Bilinear between pixel centres: 0 and 200 at twice the width are 0, 50, 150, 200; mirrored within the content."""
    pixels, canvas = np.array([[[0] * 3, [200] * 3]], np.uint8), np.zeros((3, 6, 3), np.uint8)
    draw(pixels, (1, 4), False, canvas)
    assert canvas[:, :, 0].tolist() == [[0, 50, 150, 200, 0, 0], [0] * 6, [0] * 6]
    draw(pixels, (1, 4), True, canvas)
    assert canvas[0, :, 2].tolist() == [200, 150, 50, 0, 0, 0]


def test_boxes_by_hand():
    """From 10 rows x 20 columns to 30 x 40: y times 3, x times 2; mirrored, x becomes 40 - x and the corners swap."""
    boxes = np.array([[1, 2, 5, 10], [0, 0, 20, 10]], np.float32)
    np.testing.assert_array_equal(move_boxes(boxes, (10, 20), (30, 40)), [[2, 6, 10, 30], [0, 0, 40, 30]])
    np.testing.assert_array_equal(move_boxes(boxes, (10, 20), (30, 40), True), [[30, 6, 38, 30], [0, 0, 40, 30]])
    assert move_boxes(np.zeros((0, 4), np.float32), (10, 20), (30, 40), True).shape == (0, 4)


# ---- Canvases ----------------------------------------------------------------------------------------------------------


def test_the_smallest_canvas_that_holds_a_batch():
    canvases = Canvases(PAIRS, SIDES, LIMIT)
    assert canvases.all == [(64, 96), (96, 128), (96, 64), (128, 96)]
    assert canvases.smallest(np.array([[60, 80], [60, 90]]), 64) == (64, 96)
    assert canvases.smallest(np.array([[60, 80], [60, 91]]), 64) == (96, 128)  # 64 x 97
    assert canvases.smallest(np.array([[60, 80], [60, 60]]), 80) == (96, 128)
    assert canvases.smallest(np.array([[80, 60], [60, 60], [99, 60]]), 64) == (128, 96)
    # Lying and standing: most lie. At 64, the standing one is 96 high and fits the larger; at 80 it would be 120 high.
    mixed = np.array([[60, 80], [60, 90], [90, 60]])
    assert canvases.smallest(mixed, 64) == canvases.smallest(mixed, 80) == (96, 128)
    np.testing.assert_array_equal(content_sizes(mixed, 64, LIMIT, (96, 128)), [[64, 85], [64, 96], [96, 64]])
    np.testing.assert_array_equal(content_sizes(mixed, 80, LIMIT, (96, 128)), [[80, 106], [80, 120], [96, 64]])
    # If even the largest does not hold it (105 high), the lying ones decide.
    assert canvases.smallest(np.array([[60, 80], [60, 90], [99, 60]]), 64) == (64, 96)
    square = Canvases([*PAIRS, (128, 128)], SIDES, LIMIT)
    assert (128, 128) in square.all and len(square.all) == 5
    assert square.smallest(mixed, 80) == (128, 128)  # all as they should be


def test_a_canvas_shrinks_what_does_not_fit():
    np.testing.assert_array_equal(
        content_sizes(np.array([[384, 512], [512, 384]]), 768, 1024, (768, 1024)), [[768, 1024], [768, 576]]
    )
    for canvas in ((608, 1024), (64, 96)):
        sizes = np.random.default_rng(0).integers(1, 3000, (500, 2))
        contents = content_sizes(sizes, 800, 1333, canvas)
        assert (contents <= canvas).all() and (contents >= 1).all()
        touching = (contents >= np.array(canvas) - 1).any(axis=1)
        assert (touching | (contents == content_sizes(sizes, 800, 1333)).all(axis=1)).all()  # as large as it can be


@pytest.mark.parametrize(
    "pairs, sides, limit, expected",
    [
        (((60, 96),), (48,), 96, "multiples of 32, not"),
        (((64, 96, 3),), (48,), 96, "must be pairs"),
        ((), (48,), 96, "must be pairs"),
        (((64, 96),), (), 96, "must be numbers of pixels"),
        (((64, 96),), (0,), 96, "must be numbers of pixels"),
        (((64, 96), (32, 128)), (48, 80), 96, "holds images of 80 x 96 pixels, .* add (96, 96)"),
        (((64, 96),), (48,), 97, "holds images of 48 x 97 pixels, .* add (64, 128)"),
    ],
)
def test_canvases_that_cannot_work(pairs, sides, limit, expected):
    with pytest.raises(ConfigError, match=expected.replace("(", r"\(").replace(")", r"\)")) as caught:
        Canvases(pairs, sides, limit)
    assert "\n" not in str(caught.value)


def test_the_config_works():
    data = detection_voc.get_config().data
    for sides in (data.short_sides, (data.eval_short_side,)):
        Canvases(data.canvases, sides, data.long_limit)
    assert (data.short_sides[0], data.short_sides[1], data.short_sides[-1]) == (480, 512, 800)


# ---- Who stands where --------------------------------------------------------------------------------------------------


def plan(tall, wide, batch=4, seed=0, sides=SIDES):
    """A plan for so many standing images (90 x 60 pixels) and lying ones."""
    sizes = np.array([[90, 60]] * tall + [[60, 90]] * wide)
    return TrainingPlan(sizes, batch, seed, Canvases(PAIRS, SIDES, LIMIT), sides)


@pytest.mark.parametrize("tall, wide", [(0, 11), (3, 20), (10, 13), (17, 17), (40, 1)])
def test_an_epoch_shows_every_image_once_in_batches_of_one_orientation(tall, wide):
    batches = plan(tall, wide)
    steps = (tall + wide) // 4
    assert batches.steps_per_epoch == steps
    left_out, mixed_seen = collections.Counter(), set()
    for epoch in range(40):
        planned = [batches[epoch * steps + step] for step in range(steps)]
        shown = np.concatenate([batch.index for batch in planned])
        assert len(set(shown.tolist())) == 4 * steps and {batch.epoch for batch in planned} == {epoch}
        left_out.update(set(range(tall + wide)) - set(shown.tolist()))
        portrait = [is_portrait(batches.sizes[batch.index]) for batch in planned]
        mixed = [row for row in portrait if row.any() and not row.all()]
        assert len(mixed) <= 1
        for batch, row in zip(planned, portrait, strict=True):
            assert (batch.canvas[0] > batch.canvas[1]) == (2 * row.sum() > 4)
        for batch, row in zip(planned, portrait, strict=True):
            mixed_seen.update(batch.index[row].tolist() if row.any() and not row.all() else [])
    assert len(left_out) in (0, tall + wide) or len(left_out) > 20  # another remainder each epoch
    assert (tall % 4 == wide % 4 == 0) or not (tall and wide) or len(mixed_seen) >= min(tall, 10)


def test_batches_of_an_orientation_do_not_come_first():
    """Lying and standing alternate at random: neither kind is confined to one half of the epoch."""
    batches = plan(40, 40)
    tall = [is_portrait(batches.sizes[batches[step].index])[0] for step in range(20)]
    assert 2 <= sum(tall[:10]) <= 8


def test_plans_are_functions_of_seed_and_number():
    one, two, other = plan(10, 13), plan(10, 13), plan(10, 13, seed=1)
    for step in (12, 3, 0, 7):
        assert one[step].index.tolist() == two[step].index.tolist()
        assert (one[step].short, one[step].canvas) == (two[step].short, two[step].canvas)
    assert [one[step].index.tolist() for step in range(5)] != [other[step].index.tolist() for step in range(5)]
    assert [one[step].index.tolist() for step in range(5)] != [one[step].index.tolist() for step in range(5, 10)]
    assert [one[step].short for step in range(30)] != [other[step].short for step in range(30)]


def test_short_sides_are_drawn_evenly_and_fit():
    batches = plan(10, 13, sides=SIDES)
    drawn = collections.Counter()
    for step in range(300):
        planned = batches[step]
        drawn[planned.short] += 1
        sizes = batches.sizes[planned.index]
        alike = is_portrait(sizes) == (planned.canvas[0] > planned.canvas[1])
        assert (content_sizes(sizes, planned.short, LIMIT)[alike] <= planned.canvas).all()
    assert set(drawn) == set(SIDES) and min(drawn.values()) > 70


def test_evaluation_has_every_image_once():
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 100, (37, 2))
    canvases = Canvases(PAIRS, (64,), LIMIT)
    batches = EvaluationPlan(sizes, 4, canvases, 64)
    planned = [batches[number] for number in range(len(batches))]
    everything = np.concatenate([batch.index for batch in planned])
    assert sorted(everything[everything >= 0].tolist()) == list(range(37))
    assert len({batch.canvas for batch in planned}) == 4
    padded = collections.Counter(batch.canvas for batch in planned if (batch.index < 0).any())
    assert set(padded.values()) == {1}  # the last batch of a canvas
    for batch in planned:
        index = batch.index[batch.index >= 0]
        assert len(index) and (np.diff(index) > 0).all() and (batch.index[: len(index)] >= 0).all()
        assert (content_sizes(sizes[index], 64, LIMIT) <= batch.canvas).all()
        assert all(canvases.smallest(sizes[[row]], 64) == batch.canvas for row in index)


# ---- Training ----------------------------------------------------------------------------------------------------------


def test_pixels_and_boxes_agree(source):
    """The white rectangle on the canvas is where its box says, after resizing and mirroring; its class is the image's."""
    batches, mirrored = TrainingBatches(settings(), source, mesh()), []
    for batch in map(host, batches.after(0, 10)):
        assert batch.images.shape[1:3] in batches.canvases.all and batch.images.dtype == np.uint8
        for image, size, boxes, labels, index in zip(*batch, strict=True):
            assert labels.tolist() == [index % 20, -1, -1] and not boxes[1:].any()
            white = image[..., 1] > 127
            rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(boxes[0], found, atol=1.0)
            assert (size <= image.shape[:2]).all() and not image[size[0] :].any() and not image[:, size[1] :].any()
            plain = move_boxes(source.truth(index).boxes, source.sizes[index], size)[0]
            flipped = move_boxes(source.truth(index).boxes, source.sizes[index], size, True)[0]
            assert np.abs(boxes[0] - plain).max() < 1e-3 or np.abs(boxes[0] - flipped).max() < 1e-3
            mirrored.append(np.abs(boxes[0] - flipped).max() < 1e-3)
    assert 8 < sum(mirrored) < 32


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_flip_is_a_probability(source, flip):
    batch = host(next(TrainingBatches(settings(**{"data.flip": flip}), source, mesh()).after(0, 1)))
    for size, boxes, index in zip(batch.sizes, batch.boxes, batch.index, strict=True):
        truth = source.truth(index).boxes
        np.testing.assert_allclose(boxes[:1], move_boxes(truth, source.sizes[index], size, bool(flip)), atol=1e-4)


def test_an_image_is_mirrored_anew_each_epoch(source):
    batches = TrainingBatches(settings(), source, mesh())
    seen = collections.defaultdict(set)
    for batch in map(host, batches.after(0, 6 * batches.steps_per_epoch)):
        for size, boxes, index in zip(batch.sizes, batch.boxes, batch.index, strict=True):
            seen[int(index)].add(round(float(boxes[0, 0] / size[1]), 2))
    assert sum(len(places) > 1 for places in seen.values()) > 15


def test_devices_threads_and_resumes_change_nothing(source):
    reference = [host(batch) for batch in TrainingBatches(settings(), source, mesh()).after(0, 7)]
    assert len(reference) == 7
    for devices, start, threads in ((4, 0, 1), (2, 5, 3)):
        batches = TrainingBatches(settings(**{"runtime.threads": threads}), source, mesh(devices))
        got = list(batches.after(start, 7))
        assert len(got) == 7 - start
        for ours, theirs in zip(got, reference[start:], strict=True):
            shards = {shard.data.shape[0] for leaf in ours for shard in leaf.addressable_shards}
            assert shards == {4 // devices}
            assert_equal(host(ours), theirs)
    other = host(next(TrainingBatches(settings(seed=6), source, mesh()).after(0, 1)))
    assert other.index.tolist() != reference[0].index.tolist()


def steps(source, rows, **overrides):
    canvases = Canvases(PAIRS, SIDES, LIMIT)
    numbers = TrainingPlan(source.sizes, 4, 5, canvases, SIDES)
    options = {"source": source, "plan": numbers, "num_steps": 9, "rows": np.array(rows), "seed": 5, "flip": 0.5}
    return DetectionSteps(**(options | {"max_boxes": 3, "max_failures": 0} | overrides))


def test_a_process_makes_its_rows_as_all_would(source):
    whole = steps(source, range(4))
    assert len(whole) == 9
    for rows in ([2, 3], [1]):
        part = pickle.loads(pickle.dumps(steps(source, rows)))
        for number in (0, 8, 3):
            for name, leaf in part[number].items():
                np.testing.assert_array_equal(leaf, whole[number][name][rows] if name != "bad" else [], err_msg=name)


@pytest.mark.slow
def test_worker_processes_change_nothing(source):
    reference = [host(batch) for batch in TrainingBatches(settings(), source, mesh()).after(2, 7)]
    got = TrainingBatches(settings(**{"runtime.workers": 2}), source, mesh()).after(2, 7)
    for ours, theirs in zip(got, reference, strict=True):
        assert_equal(host(ours), theirs)


PROCESS = """
import sys
import jax, numpy as np
from jax.experimental.multihost_utils import process_allgather
from hexa_jax.parallel import processes
from hexa_jax.detection.batches import EvaluationBatches, TrainingBatches
from hexa_jax.detection.data import open_detection
from hexa_jax.parallel.mesh import make_mesh
from test_detection_batches import settings
spec, target = sys.argv[1:]
processes.initialize(processes.Placement())
whole = lambda batch: [np.asarray(process_allgather(leaf, tiled=True)) for leaf in batch]
arrays = []
for batch in TrainingBatches(settings(), open_detection(spec), make_mesh()).after(0, 6):
    arrays += whole(batch)
source = open_detection(spec)
for batch, rows in EvaluationBatches(settings(), source, make_mesh()):
    arrays += [*whole(batch), rows.index, rows.originals, rows.contents]
arrays += [source.truth(index).boxes for index in range(len(source))]
np.savez(f"{target}{jax.process_index()}.npz", *arrays)
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    """Training, and evaluation, in which each learns of the wrong sizes that the other came across."""
    sizes = np.random.default_rng(0).integers(60, 160, (21, 2)).tolist()
    said = [size[:: 1 if number % 5 else -1] for number, size in enumerate(sizes)]
    box = thing("dog", (3, 4, 120, 130))
    images = {
        f"{k:02d}": (tuple(size), annotation(text, box)) for k, (size, text) in enumerate(zip(sizes, said, strict=True))
    }
    spec = f"voc:{write_voc(tmp_path / 'voc', images)}"
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), str(pathlib.Path(__file__).parent), *sys.path])

    def start(name, count, number):
        variables = (f"127.0.0.1:{port}", str(count), str(number)) if count > 1 else ()
        place = dict(zip(processes.VARIABLES, variables, strict=False))
        env = environment() | {"JAX_NUM_CPU_DEVICES": str(4 // count), "PYTHONPATH": path} | place
        return subprocess.Popen([sys.executable, "-c", PROCESS, spec, str(tmp_path / name)], env=env)

    port = free_port()
    for process in [start("pair", 2, 0), start("pair", 2, 1), start("alone", 1, 0)]:
        assert process.wait(timeout=120) == 0
    alone = np.load(tmp_path / "alone0.npz")
    for number in range(2):
        pair = np.load(tmp_path / f"pair{number}.npz")
        assert pair.files == alone.files and len(pair.files) > 50
        for name in alone.files:
            np.testing.assert_array_equal(pair[name], alone[name])


def test_the_largest_boxes_are_kept():
    """Areas 4, 9, 1, 9 and 100, the last difficult: of two, the nines; of three, the four as well; in the order given."""
    sides = np.array([2, 3, 1, 3, 10], np.float32)
    boxes = np.stack([sides * 0, sides * 0, sides, sides], axis=1)
    truth = Truth(boxes, np.arange(5, dtype=np.int32), np.array([0, 0, 0, 0, 1], bool))
    assert [largest_boxes(truth, count).labels.tolist() for count in (1, 2, 3, 9)] == [
        [1],
        [1, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
    ]


def test_difficult_and_missing_boxes_in_training(tmp_path):
    size = (60, 90)
    images = {
        "a": (size, annotation(size, thing("dog", (1, 1, 30, 30), 1), thing("cat", (1, 1, 20, 20)))),
        "b": (size, annotation(size)),
        "c": (size, annotation(size, *(thing("bird", (1, 1, 9 + number, 9)) for number in range(5)))),
        "d": (size, annotation(size, thing("dog", (1, 1, 30, 30), 1))),
    }
    source = open_detection(f"voc:{write_voc(tmp_path, images)}")
    batches = TrainingBatches(settings(), source, mesh())
    assert batches.images_over_max_boxes == 1 and source.counts["difficult_boxes"] == 2
    batch = host(next(batches.after(0, 1)))
    rows = {int(index): row for row, index in enumerate(batch.index)}
    labels = {"abcd"[index]: batch.labels[row].tolist() for index, row in rows.items()}
    cat, bird = source.class_names.index("cat"), source.class_names.index("bird")
    assert labels == {"a": [cat, -1, -1], "b": [-1] * 3, "c": [bird] * 3, "d": [-1] * 3}
    kept = (batch.boxes[rows[2]][:, 2] - batch.boxes[rows[2]][:, 0]) * 90 / batch.sizes[rows[2], 1]
    np.testing.assert_allclose(kept, [11, 12, 13], atol=1e-3)


@pytest.mark.parametrize(
    "override, expected",
    [
        ({"batch_size": 24}, "batch_size=24 must be 1 to 23, the number of images"),
        ({"batch_size": 0}, "batch_size=0 must be"),
        ({"batch_size": 3}, "batch_size=3 is not divisible by 2 devices"),
        ({"data.max_boxes": 0}, "data.max_boxes=0 must be positive"),
        ({"data.flip": 1.5}, "data.flip=1.5 must be a probability"),
        ({"data.long_limit": 150}, "no pair of data.canvases holds images of 80 x 150"),
    ],
)
def test_settings_that_cannot_work(source, override, expected):
    with pytest.raises(ConfigError) as caught:
        TrainingBatches(settings(**override), source, mesh(2))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


# ---- Files that are not as they should be ------------------------------------------------------------------------------


@pytest.fixture
def broken(folder, tmp_path):
    """The folder with image 07 cut off; a source of it."""
    root = tmp_path / "broken"
    for part in ("ImageSets", "Annotations", "JPEGImages"):
        for path in sorted((folder / part).rglob("*.*")):
            target = root / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    path = root / "JPEGImages" / "07.jpg"
    path.write_bytes(path.read_bytes()[:200])
    return open_detection(f"voc:{root}", class_names=NAMES)


def test_bad_images_are_replaced_in_training(broken):
    batches = TrainingBatches(settings(), broken, mesh())
    seen = [host(batch) for batch in batches.after(0, 2 * batches.steps_per_epoch)]
    assert batches.bad_images.seen == {7}
    index, labels = (np.concatenate([getattr(batch, name) for batch in seen]) for name in ("index", "labels"))
    assert 7 not in index and (labels[:, 0] == index % 20).all()
    assert (index == 8).sum() > 2  # in its own place and for 07
    strict = TrainingBatches(settings(**{"data.max_bad_fraction": 0.0}), broken, mesh())
    with pytest.raises(DataError, match=r"cannot be read.*07\.jpg"):
        list(strict.after(0, 2 * batches.steps_per_epoch))


def test_bad_images_stop_an_evaluation(broken):
    with pytest.raises(DataError, match=r"every image of an evaluation must be readable: .*07\.jpg: "):
        list(EvaluationBatches(settings(), broken, mesh()))


def test_images_of_another_size_than_annotated(tmp_path):
    """All say 60 x 90; one is 90 x 60, one 30 x 200: they fit the canvas, boxes follow, and the host knows of them."""
    sizes = {"a": (60, 90), "b": (90, 60), "c": (60, 90), "d": (30, 200)}
    images = {name: (size, annotation((60, 90), thing("dog", (1, 1, 90, 60)))) for name, size in sizes.items()}
    root = write_voc(tmp_path, images)
    source = open_detection(f"voc:{root}")
    batch = host(next(TrainingBatches(settings(), source, mesh()).after(0, 1)))
    assert (batch.sizes <= batch.images.shape[1:3]).all()
    for row, index in enumerate(batch.index):
        height, width = sizes["abcd"[index]]
        content = batch.sizes[row]
        # The content keeps the image's shape; each side is rounded down.
        np.testing.assert_allclose(content[0] / content[1], height / width, rtol=0.08)
        wanted = np.minimum([90, 60], [width, height]) * content[::-1] / [width, height]
        np.testing.assert_allclose(batch.boxes[row, 0, 2:] - batch.boxes[row, 0, :2], wanted, atol=1e-3)
    assert source.found == {1: (90, 60), 3: (30, 200)} and source.counts["wrong_sizes"] == 2
    again = open_detection(f"voc:{root}")
    evaluation = list(EvaluationBatches(settings(), again, mesh()))
    assert again.found == source.found and len(evaluation) == 1
    batch, rows = host(evaluation[0][0]), evaluation[0][1]
    assert rows.originals.tolist() == [list(size) for size in sizes.values()]
    np.testing.assert_array_equal(rows.contents, batch.sizes)
    for row in range(4):
        boxes = rows.to_original(row, batch.boxes[row, :1])
        np.testing.assert_allclose(boxes, again.truth(row).boxes, atol=1e-3)
        np.testing.assert_allclose(boxes[0, 2:], np.minimum([90, 60], rows.originals[row, ::-1]), atol=1e-3)


def with_orientation(data, value):
    """A JPEG's bytes with an EXIF segment that says how to turn it."""
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)
    body = b"Exif\0\0" + b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + entry + struct.pack("<I", 0)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]


@pytest.mark.parametrize("annotated, turned", [((40, 60), False), ((60, 40), True), ((50, 50), False)])
def test_exif_orientation_is_what_the_annotation_means(tmp_path, annotated, turned):
    """Stored 40 x 60, bright at the left, with EXIF's "turn by 90 degrees": then bright at the top."""
    root = write_voc(tmp_path, {"a": ((40, 60), annotation(annotated, thing("dog", (1, 1, 9, 9))))})
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :20] = 255
    path = root / "JPEGImages" / "a.jpg"
    path.write_bytes(with_orientation(cv2.imencode(".jpg", pixels)[1].tobytes(), 6))
    got = pixels_of(open_detection(f"voc:{root}"), 0)
    assert got.shape[:2] == ((60, 40) if turned else (40, 60))
    assert got[20, 0, 0] < 50 if turned else got[20, 0, 0] > 200
    assert got[0, 20, 0] > 200 if turned else got[0, 30, 0] < 50


# ---- Evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices, batch_size", [(1, 4), (4, 3)])
def test_evaluation_shows_every_image_once_and_finds_its_way_back(source, devices, batch_size):
    batches = EvaluationBatches(settings(**{"runtime.batch_size": batch_size}), source, mesh(devices))
    assert batches.batch_size == 4
    seen, shapes = [], set()
    for batch, rows in batches:
        batch = host(batch)
        shapes.add(batch.images.shape[1:3])
        np.testing.assert_array_equal(batch.index, rows.index)
        np.testing.assert_array_equal(batch.sizes, rows.contents)
        for row, index in enumerate(rows.index):
            if index < 0:
                assert not batch.images[row].any() and (batch.labels[row] == -1).all() and not batch.sizes[row].any()
                continue
            seen.append(index)
            np.testing.assert_array_equal(rows.originals[row], source.sizes[index])
            np.testing.assert_array_equal(batch.sizes[row], content_sizes(source.sizes[index], 80, LIMIT))
            boxes = rows.to_original(row, batch.boxes[row, :1])
            np.testing.assert_allclose(boxes, source.truth(index).boxes, atol=1e-3)
    assert sorted(seen) == list(range(23)) and len(seen) > 4 * (len(batches) - len(shapes))
    assert shapes <= set(batches.canvases.all) and len(shapes) > 1


def test_real_photos(tmp_path, hexa_data):
    """Blood cells on the recipe's canvases: their rims are darker than what lies beside them."""
    extracted(hexa_data / "bccd.tar.gz", tmp_path, "bccd/BCCD")
    source = open_detection(f"voc:{tmp_path / 'bccd' / 'BCCD'}:test", limit=4)
    config = detection_voc.get_config()
    config.runtime.batch_size = 4
    ((batch, rows),) = EvaluationBatches(config, source, mesh())
    assert batch.images.shape == (4, 800, 1344, 3) and rows.contents.tolist() == [[800, 1066]] * 4
    images = np.asarray(batch.images, np.float32)
    white = source.class_names.index("WBC")
    cells, grounds = [], []
    for row in range(4):
        inside = np.zeros(images.shape[1:3], bool)
        for box, label in zip(np.asarray(batch.boxes[row]), np.asarray(batch.labels[row]), strict=True):
            x1, y1, x2, y2 = box.round().astype(int)
            inside[y1:y2, x1:x2] |= label >= 0
            if label == white:
                cells.append(images[row, y1:y2, x1:x2, 1].mean())
        inside[799:] = inside[:, 1066:] = True
        grounds.append(images[row][~inside][:, 1].mean())
    assert len(cells) >= 3 and max(cells) < min(grounds)
