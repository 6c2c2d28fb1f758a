"""Pascal VOC: its folder in miniature and the genuine lists, the same from tfds, and one clear line for every mistake."""

import collections
import os
import pathlib
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.sources import DataError
from hexa_jax.data.voc import ABSENT, CLASSES, DIFFICULT, PRESENT, open_voc

# The objects of each image, "~" before difficult ones. No list is in alphabetical order.
OBJECTS = {
    "000009": ["person", "train"],
    "000005": ["~train", "~train"],
    "000012": ["cat", "~cat", "~person"],
    "000007": [],
    "000021": ["train", "~person"],
}
SPLITS = {"train": ["000012", "000009"], "val": ["000005"], "trainval": ["000012", "000009", "000005"]}
SPLITS["test"] = ["000021", "000007"]
NAMES = ("train", "person", "cat")


def value(name, objects):
    return PRESENT if name in objects else DIFFICULT if f"~{name}" in objects else ABSENT


ANNOTATION = "<annotation><size><width>20</width><height>10</height></size>{}</annotation>"
OBJECT = (
    "<object><name>{}</name><pose>Left</pose><truncated>0</truncated><difficult>{}</difficult>"
    "<bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object>"
)


@pytest.fixture
def devkit(tmp_path):
    """VOCdevkit/VOC2007 below a folder, as the official archives unpack; returns that folder."""
    return write_devkit(tmp_path / "data")


def write_devkit(folder):
    root = folder / "VOCdevkit" / "VOC2007"
    for part in ("ImageSets/Main", "ImageSets/Segmentation", "JPEGImages", "Annotations"):
        (root / part).mkdir(parents=True)
    lists = root / "ImageSets" / "Main"
    for split, ids in SPLITS.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
        for name in NAMES:
            lines = [f"{image} {value(name, OBJECTS[image]):2d}\n" for image in ids]
            (lists / f"{name}_{split}.txt").write_text("".join(lines))
    for image, objects in OBJECTS.items():
        pixels = np.full((10, 20, 3), int(image) * 10, np.uint8)
        assert cv2.imwrite(str(root / "JPEGImages" / f"{image}.jpg"), pixels)
        written = "".join(OBJECT.format(name.strip("~"), int(name.startswith("~"))) for name in objects)
        (root / "Annotations" / f"{image}.xml").write_text(ANNOTATION.format(written))
    return folder


def lists_of(devkit):
    return devkit / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"


def message(spec, data_dir=None):
    """The one line of a DataError."""
    with pytest.raises(DataError) as caught:
        open_voc(str(spec), data_dir)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---- The folder --------------------------------------------------------------------------------------------------------


def test_the_lists_are_what_was_written(devkit):
    """The format of the official files: two columns, the second as wide as -1."""
    assert (lists_of(devkit) / "person_trainval.txt").read_text() == "000012  0\n000009  1\n000005 -1\n"
    assert (lists_of(devkit) / "train.txt").exists() and (lists_of(devkit) / "train_train.txt").exists()


def test_order_classes_and_values(devkit):
    voc = open_voc(f"voc:{devkit}:trainval")
    assert voc.class_names == ["cat", "person", "train"]  # VOC's order
    assert len(voc) == 3 and voc.matrix.dtype == np.int8
    np.testing.assert_array_equal(voc.matrix, [[1, 0, -1], [-1, 1, 1], [-1, -1, 0]])
    assert [os.path.basename(voc.name(index)) for index in range(3)] == ["000012.jpg", "000009.jpg", "000005.jpg"]
    assert voc.num_classes is None and voc.labels() is None


def test_images_are_those_of_the_list(devkit):
    voc = open_voc(f"voc:{devkit}:test")
    for index, (image, level) in enumerate([("000021", 210), ("000007", 70)]):
        path = devkit / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{image}.jpg"
        assert voc[index] == {"image": path.read_bytes()} and voc.name(index) == str(path)
        np.testing.assert_allclose(decode(voc[index]["image"], voc.name(index)), level, atol=1)


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_has_its_own_lists(devkit, split):
    voc = open_voc(f"voc:{devkit}:{split}")
    assert voc.class_names == ["cat", "person", "train"]
    expected = [[value(name, OBJECTS[image]) for name in voc.class_names] for image in SPLITS[split]]
    np.testing.assert_array_equal(voc.matrix, expected)


@pytest.mark.parametrize("inner", ["", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_any_folder_on_the_way_will_do(devkit, inner):
    assert open_voc(f"voc:{devkit / inner}").matrix.tolist() == [[1, 0, -1], [-1, 1, 1], [-1, -1, 0]]  # trainval


def test_a_colon_in_the_path(devkit, tmp_path):
    devkit.rename(tmp_path / "disk:test")
    assert len(open_voc(f"voc:{tmp_path}/disk:test:val")) == 1
    assert len(open_voc(f"voc:{tmp_path}/disk:test/VOCdevkit")) == 3


def test_lines_may_be_in_another_order_and_longer_than_the_list(devkit):
    path = lists_of(devkit) / "cat_trainval.txt"
    expected = open_voc(f"voc:{devkit}").matrix
    path.write_text("000777 1\r\n\r\n" + "".join(f"{line}\r\n" for line in reversed(path.read_text().splitlines())))
    np.testing.assert_array_equal(open_voc(f"voc:{devkit}").matrix, expected)


def test_other_lists_are_no_classes(devkit):
    lists = lists_of(devkit)
    for name in ("ant", "zebra"):
        (lists / f"{name}_trainval.txt").write_text((lists / "cat_trainval.txt").read_text())
    assert open_voc(f"voc:{devkit}").class_names == ["cat", "person", "train"]


def test_classes_of_another_data_set(devkit):
    for name in NAMES:
        (lists_of(devkit) / f"{name}_test.txt").rename(lists_of(devkit) / f"my_{name}_test.txt")
    voc = open_voc(f"voc:{devkit}:test")
    assert voc.class_names == ["my_cat", "my_person", "my_train"]
    np.testing.assert_array_equal(voc.matrix, [[-1, 0, 1], [-1, -1, -1]])


def test_a_missing_image_is_bad(devkit):
    voc = open_voc(f"voc:{devkit}")
    path = pathlib.Path(voc.name(1))
    path.unlink()
    with pytest.raises(BadImage, match=r"000009\.jpg: No such file") as caught:
        voc[1]
    assert caught.value.name == str(path) and voc[0]["image"] and voc[2]["image"]


def test_mistakes_in_the_spec():
    for spec in ("voc", "voc:", "tfds:", "vok:data", "folder:data", ""):
        line = message(spec)
        assert repr(spec) in line and "voc:VOCDEVKIT[:SPLIT]" in line


def test_mistakes_in_the_folder(devkit, tmp_path):
    assert "has no ImageSets/Main" in message(f"voc:{tmp_path}/nothing")
    assert "has no ImageSets/Main" in message(f"voc:{tmp_path}")
    assert "has no ImageSets/Main" in message(f"voc:{devkit}:tset")  # no split: part of the path
    lists = lists_of(devkit)
    (lists / "val.txt").unlink()
    assert message(f"voc:{devkit}:val") == f"{lists / 'val.txt'} is missing"
    for name in NAMES:
        (lists / f"{name}_test.txt").unlink()
    assert "has no CLASS_test.txt" in message(f"voc:{devkit}:test")


OTHER = "holds other values than 1, 0 and -1"
WRONG = {
    "empty": ("", "cat_trainval.txt is empty"),
    "missing id": ("000012  1\n000009 -1\n", "says nothing of 000005, which trainval.txt lists"),
    "one word": ("000012  1\n000009 -1\n000005\n", "cat_trainval.txt:3 has 1 words, not 2"),
    "three words": ("000012  1\n000009 -1 0\n000005 -1\n", "cat_trainval.txt:2 has 3 words, not 2"),
    "after empty lines": ("000012  1\n\n\n000009 -1 0\n000005 -1\n", "cat_trainval.txt:4 has 3 words, not 2"),
    "two": ("000012  1\n000009  2\n000005 -1\n", OTHER),
    "minus three": ("000012  1\n000009 -3\n000005 -1\n", OTHER),
    "beyond int8": ("000012  1\n000009 300\n000005 -1\n", OTHER),
    "a word": ("000012  1\n000009 yes\n000005 -1\n", OTHER),
    "a fraction": ("000012  1\n000009 0.5\n000005 -1\n", OTHER),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_in_a_class_list(devkit, what):
    text, expected = WRONG[what]
    (lists_of(devkit) / "cat_trainval.txt").write_text(text)
    line = message(f"voc:{devkit}")
    assert expected in line and "cat_trainval.txt" in line


def test_mistakes_in_the_list_of_images(devkit):
    (lists_of(devkit) / "trainval.txt").write_text("000012\n000009 1\n")
    assert "trainval.txt:2 has 2 words, not 1" in message(f"voc:{devkit}")


def test_an_empty_list_of_images(devkit):
    (lists_of(devkit) / "trainval.txt").write_text("\n")
    assert "trainval.txt" in message(f"voc:{devkit}")


# ---- The real lists ----------------------------------------------------------------------------------------------------


def extracted(path, folder):
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data", members=[m for m in archive if "Segmentation" not in m.name])


def counted(voc):
    """{class: (images that show it, images with difficult ones alone)}."""
    return {
        name: (int(np.sum(column == PRESENT)), int(np.sum(column == DIFFICULT)))
        for name, column in zip(voc.class_names, voc.matrix.T, strict=True)
    }


def test_genuine_lists_of_2007(tmp_path, hexa_data):
    extracted(hexa_data / "voc_genuine.tar.gz", tmp_path)
    root = tmp_path / "genuine"
    train, test = open_voc(f"voc:{root}:trainval"), open_voc(f"voc:{root}:test")
    assert train.matrix.shape == (5011, 20) and test.matrix.shape == (4952, 20)
    assert train.class_names == test.class_names == list(CLASSES)
    # Images with at least one object: the challenge's own table for aeroplane, person and tvmonitor.
    assert [counted(train)[name][0] for name in ("aeroplane", "person", "tvmonitor")] == [238, 2008, 256]
    assert counted(train)["person"] == (2008, 87) and counted(test)["train"] == (259, 0)
    for split, voc in (("trainval", train), ("test", test)):
        for name in CLASSES:
            text = (root / "VOC2007" / "ImageSets" / "Main" / f"{name}_{split}.txt").read_bytes().decode()
            values = collections.Counter(text.split()[1::2])
            assert counted(voc)[name] == (values["1"], values["0"])
        ids = (root / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").read_bytes().decode().split()
        assert [pathlib.Path(voc.name(index)).stem for index in range(len(voc))] == ids
    assert len(open_voc(f"voc:{root}:train")) + len(open_voc(f"voc:{root}:val")) == 5011
    assert len(open_voc(f"voc:{root}:train")) == 2501  # though train_train.txt lies beside train.txt


def test_a_small_voc_with_photos(tmp_path, hexa_data):
    extracted(hexa_data / "pascal5_small.tar.gz", tmp_path)
    spec = f"voc:{tmp_path}/pascal5_small"
    train, test = open_voc(f"{spec}:trainval"), open_voc(f"{spec}:test")
    assert train.class_names == test.class_names == ["bus", "car", "cat", "person", "train"]
    lists = tmp_path / "pascal5_small" / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    for split, voc in (("trainval", train), ("test", test)):
        assert len(voc) == 150
        for name, (present, difficult) in counted(voc).items():
            values = collections.Counter((lists / f"{name}_{split}.txt").read_text().split()[1::2])
            assert (present, difficult) == (values["1"], values["0"]) and present > 20
    shapes = {decode(train[index]["image"], train.name(index)).shape for index in range(0, 150, 10)}
    assert len(shapes) > 1 and all(len(shape) == 3 and shape[2] == 3 for shape in shapes)


# ---- The same from tfds ------------------------------------------------------------------------------------------------

# The builder's own code reads the devkit and its annotations; only the download is left out.
PREPARE = """
import sys, tensorflow_datasets as tfds
data_dir, devkit = sys.argv[1:]
builder = tfds.builder("voc/2007", data_dir=data_dir, file_format="array_record")
names = {"train": "train", "validation": "val", "test": "test"}
builder._split_generators = lambda manager: {
    name: builder._generate_examples(devkit, split) for name, split in names.items()}
builder.download_and_prepare()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("voc_tfds")
    write_devkit(root)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PREPARE, str(root / "tfds"), str(root)],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return root


@pytest.mark.parametrize("split, ids", [("train", "train"), ("test", "test"), ("train+validation", "trainval")])
def test_tfds_says_the_same(prepared, split, ids):
    """From the annotations, which the builder reads, instead of the lists; and without TensorFlow."""
    before = "tensorflow" in sys.modules
    voc = open_voc(f"tfds:voc/2007:{split}", str(prepared / "tfds"))
    assert voc.class_names == list(CLASSES) and voc.num_classes is None and voc.labels() is None
    assert voc.matrix.shape == (len(SPLITS[ids]), 20) and len(voc) == len(SPLITS[ids])
    found = []
    for index in range(len(voc)):
        image = voc.records.record(index)["image/filename"].decode().removesuffix(".jpg")
        found.append(image)
        expected = [value(name, OBJECTS[image]) for name in CLASSES]
        np.testing.assert_array_equal(voc.matrix[index], expected)
        np.testing.assert_allclose(decode(voc[index]["image"], voc.name(index)), int(image) * 10, atol=1)
    assert sorted(found) == sorted(SPLITS[ids])
    assert ("tensorflow" in sys.modules) == before


def test_tfds_mistakes(prepared):
    assert "is not prepared" in message("tfds:voc/2012:train", str(prepared / "tfds"))
    assert "has no split 'val'" in message("tfds:voc/2007:val", str(prepared / "tfds"))
