"""Images with boxes: coordinates worked by hand, what is mended and counted, and one clear line for every mistake."""

import os
import pathlib
import pickle
import re
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

from hexa_jax.data.decode import BadImage
from hexa_jax.data.source import DataError
from hexa_jax.data.voc import CLASSES
from hexa_jax.detection.annotations import read_annotation
from hexa_jax.detection.data import open_detection

BOX = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
SIZE = "<size><width>{1}</width><height>{0}</height><depth>3</depth></size>"


def thing(name, corners, difficult=None):
    """An object as VOC writes it; difficult None: not said."""
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    rest = "<pose>Left</pose><truncated>0</truncated>"
    return f"<object><name>{name}</name>{rest}{flag}{BOX.format(*corners)}</object>"


def annotation(size, *things):
    return f"<annotation>{SIZE.format(*size) if size else ''}{''.join(things)}</annotation>"


def write_voc(root, images, split="trainval"):
    """A folder in VOC's layout; images: name -> (size of the image, text of the annotation). Returns the folder."""
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    for number, (name, (size, text)) in enumerate(images.items()):
        pixels = np.full((*size, 3), 10 * number + 10, np.uint8)
        assert cv2.imwrite(str(root / "JPEGImages" / f"{name}.jpg"), pixels)
        (root / "Annotations" / f"{name}.xml").write_text(text)
    return root


@pytest.fixture
def folder(tmp_path):
    """Three images of 40 x 60 pixels (height x width); the list is not in alphabetical order."""
    return write_voc(
        tmp_path / "devkit",
        {
            "b": ((40, 60), annotation((40, 60), thing("dog", (1, 1, 2, 1)), thing("cat", (11, 21, 60, 40), 1))),
            "a": ((40, 60), annotation((40, 60), thing("person", (3.5, 4, 30.25, 9), 0))),
            "c": ((40, 60), annotation((40, 60))),
        },
    )


def message(spec, **options):
    """The one line of a DataError."""
    with pytest.raises(DataError) as caught:
        open_detection(str(spec), **options)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


def some(source):
    """The counts that are not 0."""
    return {kind: count for kind, count in source.counts.items() if count}


# ---- Coordinates -------------------------------------------------------------------------------------------------------


def test_corners_are_continuous(folder):
    """VOC counts from 1 and includes both ends: pixels 1 to 2 of row 1 are the interval [0, 2] of [0, 1]."""
    source = open_detection(f"voc:{folder}")
    assert source.class_names == list(CLASSES) and len(source) == 3
    truth = source.truth(0)
    np.testing.assert_array_equal(truth.boxes, [[0, 0, 2, 1], [10, 20, 60, 40]])
    assert truth.boxes.dtype == np.float32 and truth.labels.dtype == np.int32 and truth.difficult.dtype == bool
    assert truth.labels.tolist() == [CLASSES.index("dog"), CLASSES.index("cat")]
    assert truth.difficult.tolist() == [False, True]
    np.testing.assert_array_equal(source.truth(1).boxes, [[2.5, 3, 30.25, 9]])
    assert source.truth(2).boxes.shape == (0, 4)


def test_what_a_source_offers(folder):
    source = open_detection(f"voc:{folder}")
    assert [os.path.basename(source.name(index)) for index in range(3)] == ["b.jpg", "a.jpg", "c.jpg"]
    image, truth = source[1]
    assert image == pathlib.Path(source.name(1)).read_bytes() and truth.labels.tolist() == [CLASSES.index("person")]
    assert source.sizes.tolist() == [[40, 60]] * 3 and source.sizes.dtype == np.int32
    assert some(source) == {"difficult_boxes": 1, "images_without_boxes": 1}
    assert source.summary() == "3 images with 3 boxes of 20 classes; 1 difficult boxes; 1 images without a box"


def test_a_copy_for_a_worker_says_the_same(folder):
    source = open_detection(f"voc:{folder}")
    copy = pickle.loads(pickle.dumps(source))
    for index in range(3):
        assert copy[index].image == source[index].image and copy.name(index) == source.name(index)
        np.testing.assert_array_equal(copy.truth(index).boxes, source.truth(index).boxes)


def test_limit_spreads_over_the_list(tmp_path):
    images = {f"{n}": ((8, 8), annotation((8, 8), thing("dog", (1, 1, n + 1, 4)))) for n in range(6)}
    source = open_detection(f"voc:{write_voc(tmp_path, images)}", limit=3)
    assert [pathlib.Path(source.name(index)).stem for index in range(len(source))] == ["0", "2", "4"]
    assert [float(source.truth(index).boxes[0, 2]) for index in range(3)] == [1, 3, 5]
    assert source[1].image == pathlib.Path(source.name(1)).read_bytes()
    assert len(open_detection(f"voc:{tmp_path}", limit=99)) == 6


# ---- Classes -----------------------------------------------------------------------------------------------------------


def test_classes_of_another_data_set_are_the_names_that_occur(tmp_path):
    things = [thing(name, (1, 1, 4, 4)) for name in ("RBC", "WBC", "RBC", "dog")]
    source = open_detection(f"voc:{write_voc(tmp_path, {'a': ((8, 8), annotation((8, 8), *things))})}")
    assert source.class_names == ["RBC", "WBC", "dog"] and source.truth(0).labels.tolist() == [0, 1, 0, 2]


def test_objects_of_other_classes_are_dropped_and_counted(folder):
    source = open_detection(f"voc:{folder}", class_names=["person", "cat"])
    assert source.class_names == ["person", "cat"]
    assert [source.truth(index).labels.tolist() for index in range(3)] == [[1], [0], []]
    np.testing.assert_array_equal(source.truth(0).boxes, [[10, 20, 60, 40]])
    assert source.truth(0).difficult.tolist() == [True]
    assert some(source) == {"unknown_labels": 1, "difficult_boxes": 1, "images_without_boxes": 1}
    assert "b.jpg and the 2 other images have no box of a known class" in message(f"voc:{folder}", class_names=["ant"])


# ---- What is mended ----------------------------------------------------------------------------------------------------


def test_boxes_are_clipped_and_empty_ones_dropped(tmp_path):
    """Image of 10 x 20: boxes that reach out by the left and top, by the right and bottom; whole ones; and none inside."""
    inside, left, right = (1, 1, 20, 10), (0, -5, 4, 4), (19, 8, 21, 30)
    gone = [(0, 1, 0, 10), (21, 1, 30, 10), (1, 11, 20, 12)]  # before the first column, after the last, below
    things = [thing("dog", corners) for corners in (inside, left, *gone, right)]
    source = open_detection(f"voc:{write_voc(tmp_path, {'a': ((10, 20), annotation((10, 20), *things))})}")
    np.testing.assert_array_equal(source.truth(0).boxes, [[0, 0, 20, 10], [0, 0, 4, 4], [18, 7, 20, 10]])
    assert some(source) == {"clipped_boxes": 2, "empty_boxes": 3}


def test_a_box_of_one_pixel_is_a_box(tmp_path):
    root = write_voc(tmp_path, {"a": ((8, 8), annotation((8, 8), thing("dog", (8, 8, 8, 8))))})
    np.testing.assert_array_equal(open_detection(f"voc:{root}").truth(0).boxes, [[7, 7, 8, 8]])


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_a_size_that_is_not_said_is_the_images(tmp_path, size):
    box = thing("dog", (1, 1, 21, 5))
    images = {"a": ((10, 20), annotation(size, box)), "b": ((9, 9), annotation((9, 9), box))}
    source = open_detection(f"voc:{write_voc(tmp_path, images)}")
    assert source.sizes.tolist() == [[10, 20], [9, 9]]
    np.testing.assert_array_equal(source.truth(0).boxes, [[0, 0, 20, 5]])
    assert some(source) == {"sizes_from_images": 1, "clipped_boxes": 2}


def test_a_size_that_is_neither_said_nor_readable_waits_for_the_reader(tmp_path):
    box = thing("dog", (1, 1, 5, 5))
    root = write_voc(tmp_path, {"a": ((8, 8), annotation(None, box)), "b": ((8, 8), annotation((8, 8), box))})
    (root / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    source = open_detection(f"voc:{root}")
    assert len(source) == 2 and source[0].image == b"no image"


def test_images_are_not_read_for_their_sizes(folder):
    for path in (folder / "JPEGImages").iterdir():
        path.write_bytes(b"")
    assert open_detection(f"voc:{folder}").sizes.tolist() == [[40, 60]] * 3


def test_a_wrong_size_is_corrected_when_it_is_found(tmp_path):
    """The annotation says 10 x 20, the image has 20 x 10: what was clipped at the right comes off, below it comes back."""
    root = write_voc(tmp_path, {"a": ((20, 10), annotation((10, 20), thing("dog", (5, 5, 18, 18))))})
    source = open_detection(f"voc:{root}")
    np.testing.assert_array_equal(source.truth(0).boxes, [[4, 4, 18, 10]])
    np.testing.assert_array_equal(source.truth(0, (20, 10)).boxes, [[4, 4, 10, 18]])
    source.note_size(0, (10, 20))
    assert source.counts["wrong_sizes"] == 0
    for _ in range(2):
        source.note_size(0, (20, 10))
    assert source.counts["wrong_sizes"] == 1 and source.found == {0: (20, 10)}
    np.testing.assert_array_equal(source.truth(0).boxes, [[4, 4, 10, 18]])
    assert source.sizes.tolist() == [[10, 20]]  # batches are planned by what was written


def test_a_file_that_went_away_is_a_bad_image(folder):
    source = open_detection(f"voc:{folder}")
    pathlib.Path(source.name(1)).unlink()
    with pytest.raises(BadImage, match=r"a\.jpg: No such file"):
        source[1]


# ---- Where data are ----------------------------------------------------------------------------------------------------


def test_folders_on_the_way_and_other_endings(folder, tmp_path):
    (tmp_path / "data" / "VOCdevkit").mkdir(parents=True)
    folder.rename(tmp_path / "data" / "VOCdevkit" / "VOC2007")
    root = tmp_path / "data" / "VOCdevkit" / "VOC2007"
    (root / "JPEGImages" / "a.jpg").rename(root / "JPEGImages" / "a.png")
    for inner in ("", "VOCdevkit", "VOCdevkit/VOC2007"):
        for split in ("", ":trainval"):
            source = open_detection(f"voc:{tmp_path / 'data' / inner}{split}")
            assert len(source) == 3 and source.name(1) == str(root / "JPEGImages" / "a.png")


def two_folders(tmp_path, first="VOC2007", second="VOC2012"):
    roots = []
    for number, name in enumerate((first, second)):
        images = {
            f"{number}{k}": ((8, 8), annotation((8, 8), thing("dog", (1 + k, 1 + number, 8, 8)))) for k in range(2)
        }
        roots.append(write_voc(tmp_path / name, images, split="trainval"))
    return roots


@pytest.mark.parametrize("again", ["", "voc:"])
def test_several_folders(tmp_path, again):
    one, two = two_folders(tmp_path)
    source = open_detection(f"voc:{one}:trainval+{again}{two}:trainval")
    assert [pathlib.Path(source.name(index)).stem for index in range(4)] == ["00", "01", "10", "11"]
    assert [source.truth(index).boxes[0, :2].tolist() for index in range(4)] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert source[3].image == (two / "JPEGImages" / "11.jpg").read_bytes()


def test_plus_and_colon_in_names(tmp_path):
    one, two = two_folders(tmp_path, "a+b", "disk:test")
    assert len(open_detection(f"voc:{one}:trainval")) == len(open_detection(f"voc:{two}")) == 2
    assert len(open_detection(f"voc:{one}:trainval+{two}:trainval")) == 4
    assert len(open_detection(f"voc:{two}+{one}")) == 4


def test_an_image_that_is_listed_twice_counts_once(tmp_path):
    one, two = two_folders(tmp_path)
    lists = one / "ImageSets" / "Main"
    (lists / "train.txt").write_text("01\n01\n")
    source = open_detection(f"voc:{one}:train+{two}:trainval+{one}:trainval")
    assert [pathlib.Path(source.name(index)).stem for index in range(len(source))] == ["01", "10", "11", "00"]
    assert some(source) == {"repeated_images": 2}


def test_mistakes_in_the_spec(folder, tmp_path):
    for spec in ("voc", "voc:", "tfds:", "vok:data", "folder:data", ""):
        line = message(spec)
        assert repr(spec) in line and "voc:VOCDEVKIT[:SPLIT]" in line
    assert "nothing has no ImageSets/Main" in message(f"voc:{tmp_path}/nothing")
    assert "nothing has no ImageSets/Main" in message(f"voc:{folder}+{tmp_path}/nothing:train")
    (folder / "ImageSets" / "Main" / "val.txt").write_text("a\n")
    line = message(f"voc:{folder}:test")
    assert line == f"{folder / 'ImageSets/Main/test.txt'} is missing (there are: trainval, val)"


# ---- Mistakes in files -------------------------------------------------------------------------------------------------

GOOD = thing("dog", (1, 1, 4, 4))
LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
BOMB = f'<!DOCTYPE a [<!ENTITY l0 "{"ha" * 50}">{LAUGHS}]><annotation><object><name>&l11;</name></object></annotation>'
WRONG_XML = {
    "cut off": (annotation((8, 8), GOOD)[:-20], "is no well-formed annotation: unclosed token"),
    "empty": ("", "is no well-formed annotation: no element found"),
    "text": ("a dog at 3, 4", "is no well-formed annotation: syntax error"),
    "a bomb": (BOMB, "is no well-formed annotation: it has a document type"),
    "another file's content": (
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]><annotation>&x;</annotation>',
        "is no well-formed annotation: it has a document type",
    ),
    "an undeclared entity": (annotation((8, 8), thing("&dog;", (1, 1, 4, 4))), "undefined entity"),
    "an unknown encoding": ('<?xml version="1.0" encoding="dogs"?><annotation/>', "is no well-formed annotation"),
    "a word for a corner": (
        annotation((8, 8), GOOD, thing("dog", (1, "two", 4, 4))),
        "ymin is 'two', which is no number",
    ),
    "NaN": (annotation((8, 8), thing("dog", (1, 1, "nan", 4))), "xmax is 'nan', which is no number"),
    "infinity": (annotation((8, 8), thing("dog", (1, 1, 4, "inf"))), "ymax is 'inf', which is no number"),
    "no corner": (annotation((8, 8), thing("dog", (1, 1, 4, ""))), "bndbox without ymax"),
    "swapped in x": (
        annotation((8, 8), thing("dog", (5, 1, 4, 4))),
        "the corners 5, 1 and 4, 4 of a box are in the wrong",
    ),
    "swapped in y": (
        annotation((8, 8), thing("dog", (1, 5, 4, 4))),
        "the corners 1, 5 and 4, 4 of a box are in the wrong",
    ),
    "no box": (annotation((8, 8), "<object><name>dog</name></object>"), "object without bndbox"),
    "no name": (annotation((8, 8), thing(" ", (1, 1, 4, 4))), "object without name"),
    "difficult": (annotation((8, 8), thing("dog", (1, 1, 4, 4), "very")), "difficult is 'very', neither 0 nor 1"),
    "size": (annotation((8, "wide"), GOOD), "width is 'wide', which is no number"),
}


@pytest.mark.parametrize("what", WRONG_XML)
def test_mistakes_in_an_annotation(folder, what):
    text, expected = WRONG_XML[what]
    path = folder / "Annotations" / "a.xml"
    path.write_text(text)
    line = message(f"voc:{folder}")
    assert line.startswith(str(path)) and expected in line


def test_a_bomb_in_another_encoding(folder):
    """A search for <!DOCTYPE in the bytes would not see this one."""
    path = folder / "Annotations" / "a.xml"
    path.write_bytes(f'<?xml version="1.0" encoding="utf-16"?>{BOMB}'.encode("utf-16"))
    assert "it has a document type" in message(f"voc:{folder}")


def test_missing_files_and_empty_lists(folder):
    lists = folder / "ImageSets" / "Main"
    (folder / "Annotations" / "c.xml").unlink()
    assert message(f"voc:{folder}") == f"{folder / 'Annotations' / 'c.xml'}: No such file or directory"
    (folder / "JPEGImages" / "a.jpg").unlink()
    line = message(f"voc:{folder}")
    assert line == f"{folder / 'JPEGImages' / 'a.jpg'} is missing, and {lists / 'trainval.txt'} lists it"
    (lists / "trainval.txt").write_text(" \n\n")
    assert message(f"voc:{folder}") == f"{lists / 'trainval.txt'} is empty"
    (lists / "trainval.txt").write_text("b 1\n")
    assert message(f"voc:{folder}") == f"{lists / 'trainval.txt'}:1 has 2 words, not 1"


def test_parts_of_an_object_are_no_objects(tmp_path):
    part = f"<part><name>head</name>{BOX.format(2, 2, 3, 3)}</part>"
    text = annotation((8, 8), thing("person", (1, 1, 4, 4)).replace("</object>", part + "</object>"))
    source = open_detection(f"voc:{write_voc(tmp_path, {'a': ((8, 8), text)})}")
    assert len(source.truth(0).labels) == 1 and source.class_names == list(CLASSES)


# ---- Real data ---------------------------------------------------------------------------------------------------------


def extracted(path, folder, part):
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data", members=[member for member in archive if part in member.name])


def test_genuine_annotations(tmp_path, hexa_data):
    """Of 2011, with a fraction for a corner, xmax before xmin, and a point; read off the file by eye."""
    extracted(hexa_data / "voc_genuine.tar.gz", tmp_path, "samples/voc/Annotations")
    scene = read_annotation(tmp_path / "genuine" / "samples" / "voc" / "Annotations" / "2011_003353.xml")
    assert (scene.size, scene.names, scene.difficult.tolist()) == ((500, 375), ["person"], [False])
    np.testing.assert_allclose(scene.boxes, [[129, 44.7, 375, 470]], atol=1e-5)
    scene = read_annotation(tmp_path / "genuine" / "samples" / "voc" / "Annotations" / "2007_000063.xml")
    assert scene.size == (375, 500) and scene.names == ["dog", "chair"]


@pytest.mark.parametrize(
    "archive, root, classes",
    [("bccd", "bccd/BCCD", ["Platelets", "RBC", "WBC"]), ("pascal5_small", "pascal5_small", list(CLASSES))],
)
def test_real_folders(tmp_path, hexa_data, archive, root, classes):
    """As many boxes of every class as the text of the files has, none of them mended."""
    with tarfile.open(hexa_data / f"{archive}.tar.gz") as packed:
        packed.extractall(tmp_path, filter="data")
    source = open_detection(f"voc:{tmp_path / root}:test")
    assert source.class_names == classes
    names = []
    for index in range(len(source)):
        path = pathlib.Path(source.name(index))
        text = (path.parent.parent / "Annotations" / f"{path.stem}.xml").read_text()
        names += re.findall(r"<name>(.*?)</name>", text)
        corners = np.array(re.findall(r"<[xy]m(?:in|ax)>(\d+)<", text), np.float32).reshape(-1, 4)
        np.testing.assert_array_equal(source.truth(index).boxes + [1, 1, 0, 0], corners)
        height, width = cv2.imread(str(path)).shape[:2]
        assert source.sizes[index].tolist() == [height, width]
    labels = np.concatenate([source.truth(index).labels for index in range(len(source))])
    assert [classes[label] for label in labels] == names and len(names) > 200
    assert some(source) == {}


# ---- The same from tfds ------------------------------------------------------------------------------------------------

# The builder's own code reads the devkit and its annotations; only the download is left out.
PREPARE = """
import sys, tensorflow_datasets as tfds
data_dir, devkit = sys.argv[1:]
builder = tfds.builder("voc/2007", data_dir=data_dir, file_format="array_record")
builder._split_generators = lambda manager: {
    "train": builder._generate_examples(devkit, "train"), "test": builder._generate_examples(devkit, "test")}
builder.download_and_prepare()
"""


def test_tfds_says_the_same(tmp_path):
    """tfds stores the corners as they are written, from 1, divided by the size; so the 1 must come off after that."""
    root, rng = tmp_path / "VOCdevkit" / "VOC2007", np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        images = {}
        for number in range(count):
            height, width = rng.integers(200, 500, 2).tolist()
            things = []
            for name in rng.choice(CLASSES, 4):
                x, y = np.sort(rng.integers(1, width + 1, 2)), np.sort(rng.integers(1, height + 1, 2))
                things.append(thing(name, (x[0], y[0], x[1], y[1]), int(rng.integers(2))))
            things.append(thing("person", (1, 45.75, width, height), 0))
            images[f"{split}{number}"] = ((height, width), annotation((height, width), *things))
        write_voc(root, images, split)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREPARE, str(tmp_path / "tfds"), str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    stored = open_detection("tfds:voc/2007:train+test", str(tmp_path / "tfds"))
    assert len(stored) == 8 and stored.class_names == list(CLASSES)
    assert len(open_detection("tfds:voc/2007:train+voc/2007:test", str(tmp_path / "tfds"))) == 8
    written = open_detection(f"voc:{root}:train+{root}:test")
    place = {written[index].image: index for index in range(8)}
    for index in range(8):
        other = place[stored[index].image]
        np.testing.assert_array_equal(stored.sizes[index], written.sizes[other])
        for got, wanted in zip(stored.truth(index), written.truth(other), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4)
        whole = written.truth(other).boxes == np.round(written.truth(other).boxes)
        np.testing.assert_array_equal(stored.truth(index).boxes[whole], written.truth(other).boxes[whole])
    assert some(stored) == some(written)
    joined = open_detection(f"voc:{root}:train+tfds:voc/2007:test", str(tmp_path / "tfds"))
    assert len(joined) == 8 and joined[7].image in place
    copy = pickle.loads(pickle.dumps(joined))
    assert copy[7].image == joined[7].image


def test_tfds_mistakes(tmp_path):
    assert "is not prepared" in message("tfds:voc/2012:train", data_dir=str(tmp_path))
