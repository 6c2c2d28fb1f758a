"""The real imagenet2012 builder of tfds: prepared with TensorFlow in one process, read without it in another."""

import io
import json
import tarfile

import numpy as np
import pytest
from official_archives import encoded, prepare, run_python, write_official_tars
from PIL import Image

from hexa_jax.data.sources import DataError, make_source

# The first images of the official validation set, and their official synsets; the archive holds them in another order.
VALIDATION = {"00000001": "n01751748", "00000002": "n09193705", "00000003": "n02105855"}
CLASS_IDS = {"n01440764": 0, "n01443537": 1, "n01751748": 65, "n02077923": 150, "n02105855": 230, "n09193705": 970}

READ = """
import json, pickle, sys
from hexa_jax.data.decode import decode
from hexa_jax.data.sources import make_source
result = {}
for split in ("train", "validation"):
    source = make_source(f"tfds:imagenet2012:{split}", data_dir=sys.argv[1])
    source = pickle.loads(pickle.dumps(source))
    examples = [source[i] for i in range(len(source))]
    assert all(isinstance(example["image"], bytes) for example in examples)
    images = [decode(example["image"], source.name(i)) for i, example in enumerate(examples)]
    assert source.labels().tolist() == [example["label"] for example in examples]
    assert str(source.labels().dtype) == "int32"
    result[split] = [(example["label"], image.shape, image.mean((0, 1)).tolist())
                     for example, image in zip(examples, images)]
result["slice"] = len(make_source("tfds:imagenet2012:5.1.0:train[:50%]", data_dir=sys.argv[1]))
result["classes"] = [source.num_classes, source.class_names[:2], len(source.class_names)]
result["name"] = source.name(2)
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def miniature():
    """Two images that the builder must repair are among them, under their official names: a CMYK JPEG and a PNG."""
    train = {
        "n01440764": {f"n01440764_{i}.JPEG": encoded((200, 10 * i, 0), (40 + i, 30)) for i in range(4)},
        "n02077923": {"n02077923_14822.JPEG": encoded((0, 200, 200, 0), mode="CMYK")},
        "n02105855": {"n02105855_2933.JPEG": encoded((20, 40, 60), kind="PNG")},
        "n01443537": {f"n01443537_{i}.JPEG": encoded((90,), (30, 50 + i), mode="L") for i in range(3)},
    }
    validation = {f"ILSVRC2012_val_{n}.JPEG": encoded((int(n) * 50, 0, 0)) for n in sorted(VALIDATION, reverse=True)}
    return train, validation


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, miniature):
    root = tmp_path_factory.mktemp("tfds")
    write_official_tars(root / "manual", *miniature)
    prepare("imagenet2012", root / "data", root / "manual")
    return root / "data"


def test_reads_the_prepared_imagenet_without_tensorflow(prepared):
    result = json.loads(run_python(READ, prepared))
    assert len(result["train"]) == 9 and len(result["validation"]) == 3
    by_label = {label: [row for row in result["train"] if row[0] == label] for label, _, _ in result["train"]}
    assert {label: len(rows) for label, rows in by_label.items()} == {0: 4, 1: 3, 150: 1, 230: 1}
    assert sorted(shape for _, shape, _ in by_label[0]) == [[30, 40 + i, 3] for i in range(4)]
    assert sorted(shape for _, shape, _ in by_label[1]) == [[50 + i, 30, 3] for i in range(3)]
    np.testing.assert_allclose([mean for _, _, mean in by_label[1]], 90, atol=2)
    np.testing.assert_allclose(by_label[150][0][2], [255, 55, 55], atol=6)  # CMYK (0, 200, 200, 0)
    np.testing.assert_allclose(by_label[230][0][2], [20, 40, 60], atol=3)
    # The validation labels follow the file names, not the order in the archive: red 50 n is image n.
    labels = {round(mean[0] / 50): label for label, _, mean in result["validation"]}
    assert labels == {int(number): CLASS_IDS[synset] for number, synset in VALIDATION.items()}
    assert result["slice"] in (4, 5)
    assert result["classes"] == [1000, ["n01440764", "n01443537"], 1000]
    assert result["name"] == "tfds:imagenet2012:validation, index 2"


def test_genuine_photos_survive_the_official_tars(tmp_path, hexa_data):
    with tarfile.open(hexa_data / "ilsvrc_layout.tar") as archive:
        photos = {m.name.split("/")[-1]: archive.extractfile(m).read() for m in archive if m.name.endswith(".JPEG")}
    train = {}
    for name, data in photos.items():
        train.setdefault(name.split("_")[0], {})[name] = data
    numbers = [f"{i + 1:08d}" for i in range(3)]
    validation = {f"ILSVRC2012_val_{n}.JPEG": data for n, data in zip(numbers, photos.values(), strict=False)}
    write_official_tars(tmp_path / "manual", train, validation)
    prepare("imagenet2012", tmp_path / "data", tmp_path / "manual")
    result = json.loads(run_python(READ, tmp_path / "data"))
    assert len(result["train"]) == len(photos) == 26
    names = read_class_names(tmp_path / "data")
    expected = sorted(
        (name, Image.open(io.BytesIO(data)).size[::-1]) for name, m in train.items() for data in m.values()
    )
    assert sorted((names[label], tuple(shape[:2])) for label, shape, _ in result["train"]) == expected


def read_class_names(data_dir) -> list[str]:
    (path,) = data_dir.glob("imagenet2012/*/label.labels.txt")
    return path.read_text().split()


def test_errors_are_one_line_that_says_what_to_do(tmp_path, prepared, miniature):
    cases = {
        "imagenet2012": (tmp_path, r"is not prepared in .*python -m hexa_jax.prepare imagenet2012 --data_dir="),
        "imagenet2012:tset": (prepared, r"has no split 'tset' \(it has: train, validation\)"),
        "imagenet2012:4.0.0": (prepared, "is not prepared"),
        ":": (prepared, "use tfds:NAME"),
    }
    for spec, (data_dir, message) in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            make_source(f"tfds:{spec}", data_dir=str(data_dir))
        assert "\n" not in str(caught.value)


def test_other_formats_are_refused_with_the_way_out(tmp_path, miniature):
    write_official_tars(tmp_path / "manual", *miniature)
    prepare("imagenet2012", tmp_path / "data", tmp_path / "manual", file_format="tfrecord")
    with pytest.raises(DataError, match=r"stored as tfrecord, without random access.*array_record") as caught:
        make_source("tfds:imagenet2012", data_dir=str(tmp_path / "data"))
    assert "\n" not in str(caught.value)
