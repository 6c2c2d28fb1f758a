"""Evaluations on data as it is published: CIFAR's binary files and the 1 % lists of ImageNet, through tfds's own builders."""

import subprocess
import sys

import numpy as np
import pytest
from command_line import evaluation_words, result
from official_archives import encoded, prepare, write_cifar, write_official_tars

from hexa_jax import main
from hexa_jax.data.decode import decode
from hexa_jax.data.sources import make_source

ROWS = 8  # a file
SMALL = {
    "checkpoint": "random",
    "random.backbone": "resnet10",
    "random.base_channels": 2,
    "runtime.num_devices": 1,
    "runtime.batch_size": 16,
}


def evaluate(name, workdir, **settings):
    """Numbers of an evaluation of a random network, run as a user would."""
    assert main.main(["hexa", *evaluation_words(name, workdir, **SMALL | settings)]) == 0
    return result(workdir)


def batches(num_files, num_labels, classes):
    rng = np.random.default_rng(num_files)
    labels = [np.stack([rng.permutation(classes)[:ROWS] for _ in range(num_labels)], axis=1) for _ in range(num_files)]
    return [(rows, rng.integers(0, 256, (ROWS, 32, 32, 3), np.uint8)) for rows in labels]


def pairs(source):
    """(label, pixels) of all examples, in an order of their own."""
    examples = [source[index] for index in range(len(source))]
    return sorted((e["label"], decode(e["image"], source.name(i)).tobytes()) for i, e in enumerate(examples))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-10 with eight images a file and CIFAR-100 with two files, prepared by tfds; and what was written."""
    root = tmp_path_factory.mktemp("cifar")
    ten, hundred = batches(6, 1, 10), batches(2, 2, 20)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    kinds = {"batches.meta.txt": [f"kind{i}" for i in range(10)]}
    write_cifar(root / "ten", "cifar-10-batches-bin", dict(zip(names, ten, strict=True)), kinds)
    kinds = {
        "coarse_label_names.txt": [f"group{i}" for i in range(20)],
        "fine_label_names.txt": list(map(str, range(100))),
    }
    write_cifar(root / "hundred", "cifar-100-binary", {"train.bin": hundred[0], "test.bin": hundred[1]}, kinds)
    prepare("cifar10", root / "tfds", downloads=root / "ten")
    prepare("cifar100", root / "tfds", downloads=root / "hundred")
    return root / "tfds", ten, hundred


def test_cifar_is_read_byte_for_byte(cifar):
    data_dir, ten, hundred = cifar
    splits = {
        "cifar10:train": ten[:5],
        "cifar10:test": ten[5:],
        "cifar100:train": hundred[:1],
        "cifar100:test": hundred[1:],
    }
    for name, written in splits.items():
        source = make_source(f"tfds:{name}", data_dir=str(data_dir))
        labels, images = (np.concatenate(arrays) for arrays in zip(*written, strict=True))
        fine = labels[:, -1].tolist()  # CIFAR-100 has the coarse label first
        expected = sorted((label, image.tobytes()) for label, image in zip(fine, images, strict=True))
        assert pairs(source) == expected and source.num_classes == (100 if "100" in name else 10)
        assert sorted(source.labels()) == sorted(fine)
    assert make_source("tfds:cifar10:test", data_dir=str(data_dir)).class_names[3] == "kind3"


def test_cifar_probe(cifar, tmp_path):
    """The config names the data itself."""
    result = evaluate(
        "linear_cifar.py:dataset=cifar100", tmp_path, epochs=1, batch_size=4, **{"runtime.data_dir": cifar[0]}
    )
    assert (result["train_images"], result["test_images"]) == (8, 8)
    assert 0 <= result["accuracy"] <= 100


def test_lossy_cifar_in_the_official_layout(tmp_path, hexa_data):
    """Sixty real images, through the files of the binary version."""
    maker = hexa_data.parent / "tools" / "make_cifar_official.py"
    if not maker.is_file():
        pytest.skip("the tool that writes CIFAR's own layout is not beside the image packs")
    subprocess.run([sys.executable, maker, hexa_data, tmp_path / "files", "10"], check=True, timeout=120)
    prepare("cifar10", tmp_path / "tfds", downloads=tmp_path / "files")
    source = make_source("tfds:cifar10:train", data_dir=str(tmp_path / "tfds"))
    assert len(source) == 50 and source.class_names[0] == "airplane" and len(set(source.labels())) > 5
    data = {"data.source": "tfds:cifar10:train", "data.eval_source": "tfds:cifar10:test"}
    pixels = {"data.resize": 32, "data.crop": 32, "runtime.data_dir": tmp_path / "tfds"}
    result = evaluate("knn.py", tmp_path / "knn", **data, **pixels)
    assert (result["train_images"], result["test_images"]) == (50, 10)
    assert (tmp_path / "knn" / "report" / "neighbours.png").is_file()


# ---- ImageNet with few labels --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Three synsets of four photos in the official archives, and a 1 % list with five of them."""
    root = tmp_path_factory.mktemp("subset")
    synsets = ("n01440764", "n02077923", "n02105855")
    train = {s: {f"{s}_{i}.JPEG": encoded((60 * k, 50 * i, 9)) for i in range(4)} for k, s in enumerate(synsets)}
    # These are in the official validation set, with the synsets that its ground truth gives them.
    validation = {f"ILSVRC2012_val_{number:08d}.JPEG": encoded((9, 9, 80 * number)) for number in (1, 2, 3)}
    write_official_tars(root / "manual", train, validation)
    chosen = ["n01440764_1.JPEG", "n01440764_3.JPEG", "n02077923_0.JPEG", "n02105855_2.JPEG", "n02105855_0.JPEG"]
    (root / "lists").mkdir()
    (root / "lists" / "1percent.txt").write_text("\n".join(chosen) + "\n")
    prepare("imagenet2012", root / "tfds", root / "manual")
    prepare("imagenet2012_subset/1pct", root / "tfds", root / "manual", downloads=root / "lists")
    for synset, members in train.items():
        folder = root / "folder" / "train" / synset
        folder.mkdir(parents=True)
        for name, data in members.items():
            (folder / name).write_bytes(data)
    return root, chosen


def test_the_subset_and_the_list_are_the_same_images(imagenet):
    root, chosen = imagenet
    subset = make_source("tfds:imagenet2012_subset/1pct:train", data_dir=str(root / "tfds"))
    names = [subset.record(index)["file_name"].decode() for index in range(len(subset))]
    assert sorted(names) == sorted(chosen)
    known = {"n01440764": 0, "n02077923": 150, "n02105855": 230}  # of 1000
    assert [known[name.split("_")[0]] for name in names] == subset.labels().tolist() and subset.num_classes == 1000


def test_semi_supervised_protocol_on_its_own_data(imagenet, tmp_path):
    """The config as it is: 1 % from tfds, tested on the validation set of the whole."""
    root, chosen = imagenet
    small = {"epochs": 1, "batch_size": 4, "data.crop": 32, "data.resize": 32, "runtime.data_dir": root / "tfds"}
    result = evaluate("semi_imagenet.py:percent=1", tmp_path / "tfds", **small)
    assert result["train_images"] == len(chosen) and 0 <= result["top1"] <= result["top5"] <= 100
    listed = small | {"data.list": root / "lists" / "1percent.txt"}
    listed |= {f"data.{name}": f"folder:{root}/folder/train" for name in ("source", "eval_source")}
    result = evaluate("semi_imagenet.py:percent=1", tmp_path / "folder", **listed)
    assert result["train_images"] == len(chosen)
