"""Evaluations of a pre-trained run through the command line: kNN, features, linear probe, and the table of all."""

import json

import numpy as np
import pytest
from command_line import check_refused, evaluation_words, finished, image_folder, result
from sklearn.neighbors import KNeighborsClassifier

import hexa_jax
from configs import common
from configs.eval import all as tables_config
from configs.eval import common as evaluation
from hexa_jax import main
from hexa_jax.cli.command import parse_command
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.source import DataError
from hexa_jax.data.sources import ArraySource
from hexa_jax.evals.backbone import random_backbone
from hexa_jax.evals.tasks import labelled
from hexa_jax.evals.tasks.labelled import Extractor, check_classes
from hexa_jax.evals.tasks.transfer import readouts
from hexa_jax.experiments.evaluation_tables import ROWS, entry_of_row, tables
from hexa_jax.report.pictures import confusion_matrix

DATA = {"data.source": "shapes:train", "data.eval_source": "shapes:test", "data.limit": 60}
PIXELS = {"data.resize": 8, "data.crop": 8, "runtime.num_devices": 1, "runtime.batch_size": 32}


@pytest.fixture(scope="module")
def run():
    return finished("moco")[0]


def evaluate(name, workdir, checkpoint, **settings):
    """Exit code of an evaluation."""
    return main.main(["hexa", *evaluation_words(name, workdir, checkpoint=checkpoint, **settings)])


@pytest.fixture(scope="module")
def features(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("features") / "run"
    assert evaluate("features.py", workdir, run, **PIXELS, **{"data.source": "shapes:train", "data.limit": 60}) == 0
    with np.load(workdir / "features.npz") as file:
        return {name: file[name] for name in file.files}


def test_features_are_those_of_load(run, features):
    from hexa_jax.data.shapes import ShapesSource

    assert features["features"].shape == (60, 32) and features["readable"].all()
    apply, variables = hexa_jax.load(str(run))
    source = ShapesSource("train", image_size=20, num_examples=70)  # 60 of the run's 70 examples, spread evenly
    index = int(np.arange(60)[7] * 70 // 60)
    assert features["labels"][7] == source[index]["label"] and features["names"][7] == source.name(index)
    from hexa_jax.data.decode import resize_center_crop

    image = resize_center_crop(source[index]["image"], 8, 8)
    np.testing.assert_allclose(apply(variables, image[None])[0], features["features"][7], rtol=1e-4, atol=1e-5)


def test_parquet_holds_the_same(run, features, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    settings = PIXELS | {"data.source": "shapes:train", "data.limit": 60}
    assert evaluate("features.py:format=parquet", tmp_path / "run", run, **settings) == 0
    table = parquet.read_table(tmp_path / "run" / "features.parquet").to_pydict()
    np.testing.assert_array_equal(np.array(table["feature"], np.float32), features["features"])
    assert table["label"] == features["labels"].tolist() and table["name"] == features["names"].tolist()


def test_knn_leaves_each_image_out_of_its_own_vote(run, features, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(
        "hexa_jax.evals.tasks.knn.confusion_matrix",
        lambda labels, predictions, *rest: (
            drawn.append((labels == predictions).mean()) or confusion_matrix(labels, predictions, *rest)
        ),
    )
    settings = PIXELS | {"data.source": "shapes:train", "data.limit": 60, "leave_one_out": True, "neighbours": "(1,99)"}
    assert evaluate("knn.py", tmp_path / "run", run, **settings) == 0
    x = features["features"] / np.linalg.norm(features["features"], axis=1, keepdims=True)
    right = 0
    for row in range(60):
        others = np.arange(60) != row
        vote = KNeighborsClassifier(1, metric="cosine").fit(x[others], features["labels"][others])
        right += vote.predict(x[row : row + 1])[0] == features["labels"][row]
    assert result(tmp_path / "run")["knn_accuracy"] == pytest.approx(100 * right / 60)
    assert drawn == [pytest.approx(right / 60)], "the picture shows the accuracy that is the headline"
    said = capsys.readouterr().out
    assert "all 59 images vote" in said
    for picture in ("confusion.png", "neighbours.png"):
        assert picture in said
        assert (tmp_path / "run" / "report" / picture).stat().st_size > 5000


def test_table_sets_random_weights_and_the_paper_beside(run, tmp_path, capsys):
    group = {f"data.cifar10.{key}": value for key, value in {"resize": 8, "crop": 8, "limit": 48}.items()}
    group |= {"data.cifar10.source": "shapes:train", "data.cifar10.eval_source": "shapes:test"}
    # The linear probe only: the others have tests of their own. These cells count as finished.
    for cell, values in {
        "transfer-cifar10": {"cifar10_linear": 40.0, "cifar10_k4": 20.0},
        "finetune_cifar-cifar10": {"top1": 12.5},
    }.items():
        for name in ("pre-trained", "random"):
            folder = tmp_path / "run" / "cells" / f"{cell}-{name}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(values))
    assert evaluate("all.py", tmp_path / "run", run, **group, **{"runtime.num_devices": 1}) == 0
    capsys.readouterr()
    text = (tmp_path / "run" / "tables.md").read_text()
    linear = result(tmp_path / "run" / "cells" / "linear_cifar-cifar10-pre-trained")["accuracy"]
    random = result(tmp_path / "run" / "cells" / "linear_cifar-cifar10-random")["accuracy"]
    paper = "HEXA_MoCo 90.4, HEXA_DCluster 90.7, HEXA_DCluster (8-crop) 92.9, HEXA+_DCluster (8-crop) 91.9"
    assert f"| CIFAR-10, linear probe | 1 | {linear:.1f} | {random:.1f} | {paper} |" in text
    assert "| CIFAR-10, fine-tuned | 5 | 12.5 | 12.5 | HEXA_MoCo 96.1, HEXA_DCluster 97.2, " in text
    assert "| CIFAR-10, 4 images per class | - | 20.0 | 20.0 | - |" in text
    assert "VOC07" not in text


def test_tables_stages_are_commands_that_the_evaluations_take(tmp_path):
    """Each row's config takes the row's settings; those of robustness and transfer name their data."""
    config = tables_config.get_config()
    for number, group in enumerate(tables_config.GROUPS):
        config.data[group].update({"source": f"folder:train{number}", "eval_source": f"folder:test{number}"})
    config.checkpoint, config.data.cifar100.limit = "random", 7
    commands = {}
    for row in ROWS:
        cell = entry_of_row(config, row, "pre-trained", "random").cell
        (stage,) = cell.stages
        commands[cell.name] = parse_command(["hexa", *stage.command(tmp_path, ())[3:]]).config
    assert len(commands) == len({(row.evaluation, row.needs) for row in ROWS})
    robustness = commands["robustness-imagenet-pre-trained"]
    assert (robustness.data.source, robustness.data.limit, robustness.with_random) == ("folder:train0", 50_000, False)
    transfer = commands["transfer-cifar100-pre-trained"]
    assert transfer.targets == ("cifar100=folder:train5,folder:test5",)
    assert (transfer.data.limit, transfer.with_random) == (7, False)
    wanted = {f"cifar100_{readout.key}" for readout in readouts(transfer)}
    assert {row.metric for row in ROWS if row.config == "transfer.py" and row.needs == "cifar100"} == wanted
    config.without = "knn,svm"
    with pytest.raises(ConfigError, match=r"config.without has 'svm': it takes some of .*knn,.*robustness"):
        tables(config, tmp_path)


def test_mistakes_are_one_line(run, tmp_path, capsys):
    truncated = tmp_path / "weights.safetensors"
    truncated.write_bytes(b"\x10\x00\x00\x00")
    other = tmp_path / "features.npz"  # of an evaluation
    np.savez(other, features=np.zeros((3, 4), np.float32), labels=np.zeros(3, np.int32))
    flat = tmp_path / "flat"
    image_folder(flat, by_class=False, count=3)
    cases = {
        "config.checkpoint is missing": ("knn.py", "", DATA),
        "is neither a file nor the workdir": ("knn.py", tmp_path / "nothing", DATA),
        f"{truncated} cannot be read": ("knn.py", truncated, DATA),
        f"{other}: no ResNet's conv1.weight among 2 arrays": ("knn.py", other, DATA),
        "has no labels": ("knn.py", run, DATA | {"data.eval_source": f"folder:{flat}"}),
        "use one of npz, parquet; hexa embed writes .csv, too": ("features.py:format=csv", run, {}),
        "no data to evaluate on": ("all.py", run, {}),
        "has no ImageSets/Main": (
            "svm_voc07.py",
            run,
            {"data.source": f"voc:{flat}", "data.eval_source": f"voc:{flat}"},
        ),
    }
    for number, (message, (name, checkpoint, settings)) in enumerate(cases.items()):
        command = evaluation_words(name, tmp_path / f"run{number}", checkpoint=checkpoint, **settings)
        check_refused(command, message, capsys)


def test_classes_that_no_held_out_image_has_are_named():
    images = np.zeros((6, 4, 4, 3), np.uint8)
    train = ArraySource(images, np.arange(6) % 3)
    held_out = ArraySource(images, np.arange(6) % 2)
    train.class_names, held_out.class_names = ["deer", "fox", "lynx"], ["deer", "fox"]
    with pytest.raises(DataError, match="2 classes to test on, 3 to train on: no held-out image is of lynx; add one"):
        check_classes(train, held_out)
    train.class_names = held_out.class_names = None
    with pytest.raises(DataError, match="the same data set"):
        check_classes(train, held_out)


def test_the_run_s_own_folders_stay_classes(tmp_path):
    """A run that was told that folders named by date are classes is evaluated on them; another source is judged anew."""
    for year in (2019, 2020):
        image_folder(tmp_path / "photos" / str(year), by_class=False, count=2)
    run = common.get_config()
    run.data.source, run.data.labels = f"folder:{tmp_path}/photos", "folders"
    backbone = random_backbone(backbone="resnet10", base_channels=2)._replace(config=run)
    config = evaluation.get_config("knn")
    assert labelled.open_split(config, backbone, "source").class_names == ["2019", "2020"]
    config.data.source = run.data.source
    with pytest.raises(DataError, match="has no labels"):
        labelled.open_split(config, backbone, "source")
    config.data.labels = "folders"
    assert labelled.open_split(config, backbone, "source").num_classes == 2


# ---- Going on after a kill ---------------------------------------------------------------------------------------------


class Counted(ArraySource):
    """Remembers which examples were read, and dies when one of them is read again."""

    def __init__(self, images, labels, fatal=None):
        super().__init__(images, labels)
        self.read, self.fatal = [], fatal

    def __getitem__(self, index):
        if index == self.fatal and index in self.read:
            raise KeyboardInterrupt
        self.read.append(index)
        return super().__getitem__(index)


def test_extraction_goes_on_behind_its_last_part(tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "PART_BATCHES", 2)
    images = np.random.default_rng(0).integers(0, 256, (42, 8, 8, 3), np.uint8)
    labels = np.arange(42) % 5
    config = evaluation.get_config("knn")
    config.update_from_flattened_dict(PIXELS | {"checkpoint": "random", "runtime.batch_size": 8, "runtime.threads": 1})
    backbone = random_backbone(backbone="resnet10", base_channels=2)

    def extracted(source, folder, **settings):
        config.update_from_flattened_dict(settings)
        return Extractor(config, backbone, folder)(source, "some features")

    expected = extracted(Counted(images, labels), None)
    assert expected.values.shape == (42, 16) and expected.known.all() and (expected.labels == labels).all()
    with pytest.raises(KeyboardInterrupt):
        extracted(Counted(images, labels, fatal=37), tmp_path)
    (tmp_path / "some_features" / "unfinished").write_bytes(b"cut off")
    again = Counted(images, labels)
    for got, wanted in zip(extracted(again, tmp_path), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    calibration = 42  # a random network sees the images once more for its statistics
    assert sorted(again.read[calibration:]) == list(range(32, 42))
    windows = {"grid": 2, "data.resize": 64, "data.crop": 64}
    for settings, width in (({"data.resize": 9}, 16), ({"seed": 1}, 16), (windows, 64)):
        other = Counted(images, labels)
        assert extracted(other, tmp_path, **settings).values.shape == (42, width)
        assert len(other.read) == 2 * calibration  # nothing old is used
