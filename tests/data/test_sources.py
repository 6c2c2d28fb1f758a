"""Folders, arrays and the specs that name them: order, labels, odd names, and one clear line for every mistake."""

import multiprocessing
import os
import pickle
import tarfile
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from configs import common
from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.shapes import ShapesSource, make_shapes
from hexa_jax.data.sources import SOURCES, ArraySource, DataError, FolderSource, folder, load_arrays, make_source
from hexa_jax.training.factory import open_training_source


def write_image(path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix.lower() or ".png", np.full((6, 8, 3), value, np.uint8))[1].tobytes())


def relative_names(source: FolderSource) -> list[str]:
    return [os.path.relpath(source.name(i), source.directory) for i in range(len(source))]


def one_line(spec: str, **options) -> str:
    with pytest.raises(DataError) as caught:
        make_source(spec, **options)
    assert "\n" not in str(caught.value) and str(caught.value)
    return str(caught.value)


def test_class_folders(tmp_path):
    names = ["b-side/x.png", "b/2.JPG", "b/1.jpeg", "b/deep/er/0.bmp", "a/3.png", "c/1.webp", "c/1.TIFF"]
    for i, name in enumerate(names):
        write_image(tmp_path / name, 10 * i)
    source = make_source(f"folder:{tmp_path}")
    assert relative_names(source) == sorted(names)
    assert source.class_names == ["a", "b", "b-side", "c"] and source.num_classes == 4
    labels = source.labels()
    assert labels.dtype == np.int32
    assert [source.class_names[label] for label in labels] == [name.split("/")[0] for name in sorted(names)]
    for i, name in enumerate(sorted(names)):
        example = source[i]
        assert set(example) == {"image", "label"} and example["label"] == labels[i] and type(example["label"]) is int
        assert example["image"] == (tmp_path / name).read_bytes()
        np.testing.assert_allclose(decode(example["image"], name), 10 * names.index(name), atol=1)


@pytest.mark.parametrize(
    "names",
    [
        ["1.jpg", "2.png"],  # flat
        ["only/1.jpg", "only/2.png"],  # one sub-directory
        ["x/y/1.jpg", "x/z/2.jpg", "x/3.jpg"],  # classes deeper than the first level
        ["1.jpg", "a/2.jpg", "b/3.jpg"],  # images beside the sub-directories
        ["single.png"],
    ],
)
def test_folders_without_labels(tmp_path, names):
    for name in names:
        write_image(tmp_path / name)
    source = FolderSource(str(tmp_path))
    assert relative_names(source) == sorted(names)
    assert source.labels() is None and source.num_classes is None and source.class_names is None
    assert set(source[0]) == {"image"}


def tree(root, *names):
    for name in names:
        write_image(root / name)
    return f"folder:{root}"


PHOTOS = ("2019/1.jpg", "2020-07/a/2.jpg", "2021_12_24/3.jpg", "20220105/4.jpg")


def test_what_is_taken_for_classes_is_said(tmp_path):
    cameras = tree(tmp_path / "cameras", "a/1.png", "b/2.png", "c/3.png", "d/4.png")
    source = make_source(cameras)
    assert source.num_classes == 4
    assert source.labels_note == (
        f"{cameras}: its 4 sub-folders (a, b, c, ...) are taken as the classes; "
        "if they are not, --config.data.labels=none"
    )
    none = make_source(cameras, labels="none")
    assert none.num_classes is None and none.labels() is None and not none.labels_note
    assert set(none[0]) == {"image"}


def test_a_photo_library_by_date_has_no_classes(tmp_path):
    library = tree(tmp_path / "library", *PHOTOS)
    source = make_source(library)
    assert source.num_classes is None and source.labels() is None
    assert "not taken as classes, because their names are dates" in source.labels_note
    assert source.labels_note.endswith("if they are, --config.data.labels=folders")
    assert make_source(library, labels="folders").class_names == ["2019", "2020-07", "2021_12_24", "20220105"]
    for name in ("1/1.png", "2019/2.png"), ("20/1.png", "2019-13/1.png"), ("2019/1.png", "cats/1.png"):
        assert make_source(tree(tmp_path / name[0].replace("/", "_"), *name)).num_classes == 2  # not all are dates


def test_images_beside_the_folders_are_told_and_may_be_unknown(tmp_path):
    mixed = tree(tmp_path / "mixed", "stray.png", "a/1.png", "b/2.png")
    source = make_source(mixed)
    assert source.num_classes is None
    assert "2 sub-folders (a, b) are not taken as classes, because 1 image lies beside them" in source.labels_note
    told = make_source(mixed, labels="folders")
    assert told.class_names == ["a", "b"] and told.num_classes == 2 and not told.labels_note
    assert told.labels().tolist() == [0, 1, -1] and told[2]["label"] == -1


def test_labels_that_cannot_be(tmp_path):
    flat = tree(tmp_path / "flat", "1.png", "only/2.png")
    assert not make_source(flat).labels_note
    assert "has 1 sub-folders with images: --config.data.labels=folders needs" in one_line(flat, labels="folders")
    assert "data.labels='yes' is not known: use one of auto, folders, none" in one_line(flat, labels="yes")


def test_the_line_is_said_when_a_run_opens_its_data(tmp_path, capsys):
    config = common.get_config()
    config.data.source = tree(tmp_path / "cameras", "a/1.png", "b/2.png")
    assert open_training_source(config).num_classes == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert "its 2 sub-folders (a, b) are taken as the classes" in line
    config.data.labels = "none"
    assert open_training_source(config).num_classes is None and not capsys.readouterr().out
    del config.data.labels  # as in runs of before it was there
    assert open_training_source(config).num_classes == 2


def test_hidden_and_other_files_are_ignored(tmp_path):
    write_image(tmp_path / "seen.png")
    for name in (".hidden.png", "._seen.png", ".cache/x.png", "a/.ipynb_checkpoints/x.png"):
        write_image(tmp_path / name)
    for name in ("notes.txt", "Thumbs.db", "png", "x.png.part", "list.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty.png.d").mkdir()
    assert relative_names(FolderSource(str(tmp_path))) == ["seen.png"]


def test_unicode_spaces_and_bytes_that_are_not_utf8(tmp_path):
    names = ["a b/it's 1.png", "猫/ねこ ①.png", "Ünï/naïve café.png", "c\nd/new\tline.png"]
    for name in names:
        write_image(tmp_path / name)
    raw = os.path.join(os.fsencode(tmp_path), b"a b", b"latin-\xe9.png")
    with open(raw, "wb") as file:
        file.write((tmp_path / names[0]).read_bytes())
    source = pickle.loads(pickle.dumps(FolderSource(str(tmp_path))))
    assert len(source) == 5 and source.num_classes == 4
    found = {os.fsencode(source.name(i)) for i in range(5)}
    assert found == {raw} | {os.fsencode(tmp_path / name) for name in names}
    assert all(source[i]["image"] for i in range(5))


def test_links_are_followed_once(tmp_path):
    write_image(tmp_path / "data" / "z" / "1.png")
    write_image(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "a_link_to_z").symlink_to(tmp_path / "data" / "z")  # seen already
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "z" / "up").symlink_to("..")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "z" / "3.png").symlink_to(tmp_path / "elsewhere" / "2.png")
    source = FolderSource(str(tmp_path / "data"))
    assert relative_names(source) == ["linked/2.png", "z/1.png", "z/3.png"]
    assert source.class_names == ["linked", "z"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "empty.png").write_bytes(b"")
    source = FolderSource(str(tmp_path))
    assert relative_names(source) == ["empty.png", "gone.png", "good.png"]
    with pytest.raises(BadImage, match=r"gone\.png: No such file"):
        source[1]
    with pytest.raises(BadImage, match=r"empty\.png: empty file"):
        decode(source[0]["image"], source.name(0))


def test_folder_mistakes_are_one_line(tmp_path):
    assert one_line(f"folder:{tmp_path}/missing").endswith("missing does not exist")
    assert "holds no image (jpg, jpeg, png" in one_line(f"folder:{tmp_path}")
    (tmp_path / "file.png").write_bytes(b"x")
    assert one_line(f"folder:{tmp_path}/file.png").endswith("file.png is not a directory")


def test_splits_taken_for_classes_are_pointed_out(tmp_path, caplog):
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/1.png"):
        write_image(tmp_path / name)
    assert FolderSource(str(tmp_path)).class_names == ["train", "val"]
    assert "sub-directories train, val" in caplog.text
    caplog.clear()
    assert FolderSource(str(tmp_path / "train")).class_names == ["cat", "dog"]
    assert not caplog.text


@pytest.mark.parametrize("spec", ["foldr:x", "", "folder", "folder:", "arrays:", "tfds:", "images/", "shapes:val"])
def test_unknown_specs_list_what_exists(spec):
    line = one_line(spec)
    if spec == "shapes:val":
        assert "use shapes:train or shapes:test" in line
    else:
        assert all(kind.usage in line for kind in SOURCES.values())
    assert ("did you mean folder:x?" in line) == (spec == "foldr:x")


def test_shapes_specs():
    source = make_source("shapes:test", image_size=20, num_examples=40, seed=3)
    assert isinstance(source, ShapesSource) and len(source) == 40
    expected = make_shapes([11], image_size=20, seed=3, split="test")[0][0]
    np.testing.assert_array_equal(source[11]["image"], expected)
    assert make_source("shapes").name(0) == "shapes:train, index 0"
    assert "cannot draw 0 images" in one_line("shapes", num_examples=0)
    assert "of 8 pixels" in one_line("shapes", image_size=8)


def stored(path, compressed: bool, **arrays) -> str:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return str(path)


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 4, 3), (7, 5, 4), (7, 5, 4, 1)])
def test_arrays(tmp_path, compressed, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = np.array([0, 1, 2, 0, -1, 2, 4])
    path = stored(tmp_path / "x.npz", compressed, labels=labels, images=images, class_names=np.array(list("abcdef")))
    source = make_source(f"arrays:{path}")
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 500  # the path, not the pixels
    for each in (source, copy):
        assert len(each) == 7 and each.num_classes == 6 and each.class_names == list("abcdef")
        assert each.labels().dtype == np.int32
        np.testing.assert_array_equal(each.labels(), labels)
        for i in range(7):
            example = each[i]
            assert example["image"].shape == (5, 4, 3) and example["image"].dtype == np.uint8
            expected = np.broadcast_to(images[i].reshape(5, 4, -1), (5, 4, 3))
            np.testing.assert_array_equal(example["image"], expected)
            assert example["label"] == labels[i]
    assert isinstance(source._images, np.memmap) != compressed
    assert source.name(3) == f"arrays:{path}, index 3"


def test_arrays_in_fortran_order_and_without_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
    source = make_source("arrays:" + stored(tmp_path / "x.npz", False, images=np.asfortranarray(images)))
    np.testing.assert_array_equal(source[6]["image"], images[6])
    assert source.labels() is None and source.num_classes is None and set(source[0]) == {"image"}


def test_arrays_in_memory():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    source = pickle.loads(pickle.dumps(ArraySource(images, np.array([0, 3, 1], np.uint8), ["a", "b", "c", "d"])))
    assert source.num_classes == 4 and source[1]["label"] == 3 and source.name(1) == "arrays, index 1"
    assert ArraySource(images, np.array([0, 3, 1])).num_classes == 4
    assert ArraySource(images, np.full(3, -1)).num_classes is None


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.zeros(3)}, "has no array 'images' (it holds: x)"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, "images must be uint8, not float32"),
        ({"images": np.zeros((2, 3, 4, 4), np.uint8)}, "[N, H, W, 3] or [N, H, W], not [2, 3, 4, 4]"),
        ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "not [0, 4, 4, 3]"),
        ({"images": np.zeros(4, np.uint8)}, "not [4]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "integers [2], not int64 [3]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "integers [2], not float64 [2]"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -5])}, "not -5 to 0"),
        ({"images": np.array([None, 1], object)}, "is not a readable npz file"),
    ],
)
def test_array_mistakes_are_one_line(tmp_path, arrays, message):
    path = stored(tmp_path / "x.npz", False, **arrays)
    line = one_line(f"arrays:{path}")
    assert message in line and path in line


def test_files_that_are_no_npz(tmp_path):
    assert one_line(f"arrays:{tmp_path}/missing.npz").endswith("missing.npz does not exist")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", np.zeros((2, 4, 4), np.uint8))
    whole = stored(tmp_path / "x.npz", True, images=np.random.default_rng(0).integers(0, 256, (9, 9, 9, 3), np.uint8))
    with open(whole, "rb") as file:
        data = bytearray(file.read())
    data[200:1500] = b"\0" * 1300
    (tmp_path / "damaged.npz").write_bytes(bytes(data))
    (tmp_path / "cut.npz").write_bytes(bytes(data[: len(data) // 2]))
    for name in ("text.npz", "single.npy", "damaged.npz", "cut.npz"):
        assert "is not a readable npz file" in one_line(f"arrays:{tmp_path}/{name}")
    assert "is not a readable npz file" in one_line(f"arrays:{tmp_path}")  # a directory


def sources_of_each_kind(tmp_path) -> list:
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        write_image(tmp_path / "folder" / name)
    images, labels = make_shapes(3, image_size=16)
    path = stored(tmp_path / "x.npz", False, images=images, labels=labels)
    return [
        FolderSource(str(tmp_path / "folder")),
        load_arrays(path),
        ArraySource(images, labels),
        ShapesSource(num_examples=3, image_size=16),
    ]


def test_an_index_is_an_identity(tmp_path):
    for source in sources_of_each_kind(tmp_path):
        assert source[np.int64(2)]["label"] == source.labels()[2]
        for outside in (-1, 3):
            with pytest.raises(IndexError, match=f"index {outside} of a source of 3 examples"):
                source[outside]


def read_all(source):
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_sources_travel_to_worker_processes(tmp_path, method):
    every = sources_of_each_kind(tmp_path)
    with warnings.catch_warnings(), multiprocessing.get_context(method).Pool(1) as pool:
        for source, there in zip(every, pool.map(read_all, every), strict=True):
            for here, other in zip(read_all(source), there, strict=True):
                assert here["label"] == other["label"]
                np.testing.assert_array_equal(np.asarray(here["image"]), np.asarray(other["image"]))


def test_a_million_paths_stay_small(monkeypatch):
    monkeypatch.setattr(folder, "_walk", lambda directory: (f"n{i % 100:08d}/{i}.JPEG" for i in range(100_000)))
    source = FolderSource("/")
    assert len(pickle.dumps(source)) < 100_000 * 40
    assert source.num_classes == 100 and source.name(0) == "/n00000000/0.JPEG"
    assert {source.name(i) for i in range(99_999, 100_000)} == {"/n00000099/99999.JPEG"}


def test_genuine_imagenet_photos(tmp_path, hexa_data):
    with tarfile.open(hexa_data / "ilsvrc_layout.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    source = make_source(f"folder:{tmp_path}/ilsvrc_layout/train")
    assert len(source) == source.num_classes == 26
    images = [decode(source[i]["image"], source.name(i)) for i in range(26)]
    assert all(image.dtype == np.uint8 and image.shape[2] == 3 for image in images)
    assert len({image.shape for image in images}) > 10
    for i, image in enumerate(images):
        expected = np.asarray(Image.open(source.name(i)).convert("RGB"))
        np.testing.assert_allclose(image.astype(int), expected, atol=3)
    grey = [image for image in images if np.ptp(image.astype(int), axis=2).mean() < 0.1]
    assert len(grey) == 2
