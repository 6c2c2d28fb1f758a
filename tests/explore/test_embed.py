"""`hexa embed`: the table against a computation by hand, bad files, memory, and mistakes in a line each."""

import csv
import pathlib

import numpy as np
import pytest
from command_line import image_folder

from hexa_jax import load
from hexa_jax.cli import embed as command
from hexa_jax.data.decode import BadImage, decode, resize_center_crop
from hexa_jax.explore import structure
from hexa_jax.explore.embedding import Embedded
from hexa_jax.explore.images import ImageReader
from hexa_jax.explore.structure import find_clusters, find_neighbors, outlier_scores
from hexa_jax.explore.tables import write_table

SIZE, IMAGES, NEIGHBORS = 16, 30, 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of images by class, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("photos")
    image_folder(folder, count=IMAGES)
    (folder / "bar" / "empty.jpg").write_bytes(b"")
    (folder / "disc" / "text, with a comma.png").write_text("no image")
    return folder


def run(*words):
    return command.main([*map(str, words), f"--size={SIZE}", "--threads=2"])


@pytest.fixture(scope="module")
def table(weights, photos, tmp_path_factory):
    """The columns that the command writes as .npz."""
    path = tmp_path_factory.mktemp("table") / "table.npz"
    words = (weights, photos, f"--output={path}", f"--neighbors={NEIGHBORS}", "--batch_size=7")
    assert run(*words) == 0
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_each_readable_image_has_a_row_with_its_feature(weights, photos, table):
    readable = [f for f in photos.rglob("*") if f.is_file() and f.stat().st_size > 20]
    assert table["path"].tolist() == sorted(map(str, readable)) and len(readable) == IMAGES
    assert [str(path).split("/")[-2] for path in table["path"]] == table["label"].tolist()
    apply, variables = load(str(weights))
    pixels = [decode(pathlib.Path(path).read_bytes(), path) for path in table["path"]]
    crops = np.stack([resize_center_crop(image, round(SIZE * 256 / 224), SIZE) for image in pixels])
    np.testing.assert_allclose(table["embedding"], apply(variables, crops), rtol=1e-4, atol=1e-5)


def test_neighbors_are_those_of_the_whole_matrix(table):
    unit = table["embedding"] / np.linalg.norm(table["embedding"], axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    best = np.sort(cosine, axis=1)[:, ::-1][:, :NEIGHBORS]
    np.testing.assert_allclose(table["similarity"], best, atol=1e-6)
    found = np.take_along_axis(cosine, table["neighbors"], axis=1)
    np.testing.assert_allclose(found, best, atol=1e-6)
    assert table["neighbors"].dtype == np.int32


def test_unreadable_images_are_named(weights, photos, tmp_path, capfd):
    assert run(weights, photos, f"--output={tmp_path / 'table.parquet'}") == 0
    said = capfd.readouterr()
    assert len(said.err.splitlines()) == 2
    assert "bar/empty.jpg: empty file" in said.err and "with a comma.png: not a JPEG" in said.err
    assert "2 of 32 images cannot be read" in said.out


def test_parquet_and_csv_hold_the_same_table(table, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    images = Embedded(np.arange(IMAGES), table["path"].tolist(), table["label"], table["embedding"], [], [])
    clusters = structure.Clusters(table["cluster"], table["similarity"][:, 0], np.array([IMAGES]))
    neighbors = structure.Neighbors(table["neighbors"], table["similarity"])
    for name in ("table.parquet", "table.csv"):
        write_table(tmp_path / name, images, table["label"].tolist(), clusters, neighbors)
    read = parquet.read_table(tmp_path / "table.parquet").to_pydict()
    assert read.keys() == table.keys()
    for name, values in read.items():
        np.testing.assert_array_equal(np.array(values, table[name].dtype), table[name], err_msg=name)
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name, column in (("embedding", "embedding"), ("neighbors", "neighbor")):
        width = table[name].shape[1]
        values = [[row[f"{column}_{i + 1}"] for i in range(width)] for row in rows]
        np.testing.assert_array_equal(np.array(values).astype(table[name].dtype), table[name])
    assert [row["path"] for row in rows] == table["path"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.parquet"]


def test_an_unfinished_table_is_not_left_behind(table, tmp_path):
    images = Embedded(np.arange(IMAGES), table["path"].tolist(), table["label"], table["embedding"], [], [])
    clusters = structure.Clusters(table["cluster"], table["similarity"][:, 0], np.array([IMAGES]))
    neighbors = structure.Neighbors(table["neighbors"][:5], table["similarity"])
    with pytest.raises(IndexError):
        write_table(tmp_path / "table.csv", images, [""] * IMAGES, clusters, neighbors)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("W", "P"), "--output is missing"),
        (("W", "P", "--output=table.xlsx"), "must end in .parquet, .csv or .npz"),
        (("W", "P", "--output=missing/table.csv"), "no folder missing"),
        (("W", "P", "--output=table.csv", "--clusters=0"), "whole number above 0"),
        (("W", "P", "--output=table.csv", "--clusters=33"), "more than the 32 images"),
        (("W", "P/none", "--output=table.csv"), "does not exist"),
        (("W", "nonsense:x", "--output=table.csv"), "unknown data source"),
        (("P", "P", "--output=table.csv"), "neither a file nor the workdir"),
        (("random", "P", "--output=table.csv"), "random weights"),
        (("W", "P", "--output=table.csv", "--colour=red"), "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(words, said, weights, photos, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    places = {"W": str(weights), "P": str(photos), "P/none": str(photos / "none")}
    assert run(*(places.get(word, word) for word in words)) == 2
    error = capfd.readouterr().err.strip()
    assert said in error and "\n" not in error and error.startswith("hexa embed: ")
    assert not list(tmp_path.iterdir())


def test_nothing_readable_and_weights_that_diverged(weights, tmp_path, capfd):
    (tmp_path / "a.png").write_text("no image")
    assert run(weights, tmp_path, f"--output={tmp_path / 't.csv'}") == 2
    assert "none of 1 images can be read" in capfd.readouterr().err
    from safetensors.numpy import load_file, save_file

    arrays = load_file(weights)
    arrays["conv1.weight"] = arrays["conv1.weight"] * np.float32(np.nan)
    save_file(arrays, tmp_path / "nan.safetensors")
    folder = tmp_path / "images"
    image_folder(folder, count=3)
    assert run(tmp_path / "nan.safetensors", folder, f"--output={tmp_path / 't.csv'}") == 2
    assert "not finite" in capfd.readouterr().err


class Counted:
    """Grey images that count how often they are read; every fifth cannot be."""

    num_classes = class_names = None

    def __init__(self, length):
        self.length, self.reads = length, 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        self.reads += 1
        if index % 5 == 4:
            raise BadImage(self.name(index), "worn out")
        return {"image": np.full((9, 12, 3), index, np.uint8)}

    def name(self, index):
        return f"image {index}"


def test_images_are_read_in_order_once_and_little_ahead():
    source = Counted(60)
    reader = ImageReader(source, 8, 8, summarize=lambda pixels: pixels.shape, threads=3, ahead=10)
    seen = []
    for image in reader:
        seen.append((image.index, int(image.crop[0, 0, 0]), image.label, image.summary))
        assert source.reads <= image.index + 1 + 10
    expected = [index for index in range(60) if index % 5 != 4]
    assert seen == [(index, index, -1, (9, 12, 3)) for index in expected]
    assert source.reads == 60 and len(reader.unreadable) == 12


def test_stopping_early_reads_no_more():
    source = Counted(1000)
    for _ in ImageReader(source, 8, 8, threads=2, ahead=10):
        break
    assert source.reads <= 11


def blobs():
    """Three groups of 40, 30 and 20 directions close to each other, in mixed order, and their groups."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], [40, 30, 20]))
    return (np.eye(8)[group] + rng.normal(0, 0.05, (90, 8))).astype(np.float32) * 3, group


@pytest.mark.parametrize("rows", [structure.KMEANS_ROWS, 45])
def test_clusters_are_the_groups_largest_first(rows, monkeypatch):
    monkeypatch.setattr(structure, "KMEANS_ROWS", rows)
    values, group = blobs()
    clusters = find_clusters(values, 3)
    assert clusters.sizes.tolist() == [40, 30, 20]
    np.testing.assert_array_equal(clusters.labels, group)
    assert clusters.similarity.min() > 0.9


def test_few_images():
    values = np.eye(2, dtype=np.float32)
    for count in (1, 2):
        neighbors = find_neighbors(values[:count], 10)
        assert neighbors.rows.shape == (count, count - 1)
        assert outlier_scores(neighbors).shape == (count,)
        assert find_clusters(values[:count]).sizes.sum() == count


def test_the_odd_one_out_has_the_highest_score():
    values, _ = blobs()
    values[17] = -values[17]
    assert int(np.argmax(outlier_scores(find_neighbors(values, 5)))) == 17
