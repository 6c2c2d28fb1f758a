"""Folders, arrays and the specs that name them: order, labels, odd names, and one clear line for every mistake."""

import gzip
import io
import multiprocessing
import os
import pickle
import sys
import tarfile
import warnings

import cv2
import numpy as np
import pytest
from PIL import Image

from configs import common
from hexa_jax.cli.words import source_of
from hexa_jax.data.decode import BadImage, decode
from hexa_jax.data.open import open_training_source
from hexa_jax.data.pipeline import BadImages, read_or_replace
from hexa_jax.data.shapes import ShapesSource, make_shapes
from hexa_jax.data.sources import (
    SOURCES,
    ArraySource,
    DataError,
    FolderSource,
    absolute_spec,
    folder,
    load_arrays,
    make_source,
    parquet,
    paths,
    tar,
)


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


def test_images_that_need_a_package_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "missing_formats", lambda: {".heic": "HEIC needs a package: pip install pillow-heif"})
    for name in ("a.HEIC", "b.heic"):
        (tmp_path / name).write_bytes(b"x")
    line = f"folder:{tmp_path}: 2 images are skipped, because HEIC needs a package: pip install pillow-heif"
    assert one_line(f"folder:{tmp_path}") == line
    write_image(tmp_path / "c.png")
    source = make_source(f"folder:{tmp_path}")
    assert relative_names(source) == ["c.png"] and source.skipped_note == line


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


# ---- Files that hold or list images ---------------------------------------------------------------------------------

BYTES = [cv2.imencode(".png", np.full((6, 8, 3), 40 * i, np.uint8))[1].tobytes() for i in range(3)]
KINDS = ("cat", "dog", "dog")  # of BYTES


def write_list(folder) -> str:
    for i, data in enumerate(BYTES):
        (folder / f"{i} é.png").write_bytes(data)
    (folder / "list.txt").write_text("".join(f"{i} é.png\t{KINDS[i]}\n\n" for i in range(3)))
    return f"list:{folder}/list.txt"


def write_tar(path, members) -> str:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def write_shards(folder) -> str:
    """Two webdataset shards, with names of classes."""
    samples = [[(f"{i:05}.png", BYTES[i]), (f"{i:05}.cls", KINDS[i].encode()), (f"{i:05}.txt", b"x")] for i in range(3)]
    write_tar(folder / "s-0.tar", samples[0] + samples[1])
    write_tar(folder / "s-1.tar", samples[2])
    return f"tar:{folder}/s-*.tar"


def table(rows=range(3)):
    """A data set of the datasets library."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[dev]'")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {
        "image": [{"bytes": BYTES[i], "path": f"{i}.png"} for i in rows],
        "label": [int(KINDS[i] == "dog") for i in rows],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def write_parquet(folder) -> str:
    table([0, 1]).to_parquet(folder / "p-0.parquet", batch_size=1)  # two row groups
    table([2]).to_parquet(folder / "p-1.parquet")
    return f"parquet:{folder}/p-*.parquet"


def write_hf(folder) -> str:
    table().save_to_disk(folder / "saved")
    return f"hf:{folder}/saved"


def write_video(path, seconds=3, rate=5):
    """Frames that get brighter: each second is 80 brighter than the one before."""
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        stream.gop_size = 7  # key frames do not lie on whole seconds
        for number in range(seconds * rate):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 80 * (number // rate), np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_videos(folder) -> str:
    write_video(folder / "videos" / "a" / "1.mp4", seconds=2)
    write_video(folder / "videos" / "b" / "2.mp4", seconds=1)
    return f"video:{folder}/videos"


PACKED = {
    "list": write_list,
    "tar": write_shards,
    "parquet": write_parquet,
    "hf": write_hf,
    "video": write_videos,
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_images(tmp_path, kind):
    spec = PACKED[kind](tmp_path)
    source = make_source(spec)
    names = [source.name(i) for i in range(3)]
    for each in (source, pickle.loads(pickle.dumps(source)), make_source(spec)):
        assert len(each) == 3 and each.num_classes == 2 and each.labels().dtype == np.int32
        assert [each.name(i) for i in range(3)] == names and len(set(names)) == 3
        if kind == "video":
            assert each.class_names == ["a", "b"] and each.labels().tolist() == [0, 0, 1]
            for i, value in enumerate((0, 80, 0)):
                assert each[i]["image"].shape == (16, 32, 3) and each[i]["image"].dtype == np.uint8
                np.testing.assert_allclose(each[i]["image"].astype(int), value, atol=6)
        else:
            assert each.class_names == ["cat", "dog"] and each.labels().tolist() == [0, 1, 1]
            assert [each[i]["image"] for i in (2, 0, 1)] == [BYTES[i] for i in (2, 0, 1)]
        assert [each[i]["label"] for i in range(3)] == each.labels().tolist()
    none = make_source(spec, labels="none")
    assert none.labels() is None and none.num_classes is None and set(none[0]) == {"image"}


def test_several_folders_are_one(tmp_path):
    one = tree(tmp_path / "site 1", "cat/1.png", "dog/2.png").removeprefix("folder:")
    two = tree(tmp_path / "site 2", "ape/3.png", "dog/4.png").removeprefix("folder:")
    source = pickle.loads(pickle.dumps(make_source(f"{one}, {two}")))
    names = [os.path.relpath(source.name(i), tmp_path) for i in range(4)]
    assert names == ["site 1/cat/1.png", "site 1/dog/2.png", "site 2/ape/3.png", "site 2/dog/4.png"]
    assert source.class_names == ["ape", "cat", "dog"] and source.labels().tolist() == [1, 2, 0, 2]
    assert source[3]["label"] == 2 and source[3]["image"] == (tmp_path / "site 2/dog/4.png").read_bytes()
    assert f"folder:{one}: its 2 sub-folders" in source.labels_note and f"folder:{two}: its" in source.labels_note
    flat = tree(tmp_path / "flat, and odd", "5.png").removeprefix("folder:")
    assert len(make_source(f"folder:{flat}")) == 1  # a comma in the name
    assert "flat/5.png of one without: --config.data.labels=none" in one_line(
        f"{one},{tree(tmp_path / 'flat', '5.png')[7:]}"
    )
    assert len(make_source(f"folder:{one},{tmp_path}/flat", labels="none")) == 3
    assert "its images would count twice" in one_line(f"folder:{one},{tmp_path}")
    assert "would count twice" in one_line(f"folder:{one},{one}")
    assert one_line(f"folder:{one},{tmp_path}/gone") == f"folder:{tmp_path}/gone does not exist"


def test_the_kind_of_a_bare_path_is_recognized(tmp_path):
    images, _ = make_shapes(3, image_size=16)
    specs = [write_list(tmp_path), write_shards(tmp_path), "arrays:" + stored(tmp_path / "x.npz", False, images=images)]
    for spec in specs:
        bare = spec.partition(":")[2]
        assert type(make_source(bare)) is type(make_source(spec)) and len(make_source(bare)) == 3
    relative = make_source("list.txt", data_dir=str(tmp_path))
    assert relative[2]["image"] == BYTES[2]


def test_specs_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    for spec, expected in {
        "folder:a, b": f"folder:{tmp_path}/a, b",
        "folder:x, y": f"folder:{tmp_path}/x,{tmp_path}/y",
        "tar:x/*.tar": f"tar:{tmp_path}/x/*.tar",
        "list:/l.txt": "list:/l.txt",
        "arrays:gs://b/x.npz": "arrays:gs://b/x.npz",
        "x.npz": f"{tmp_path}/x.npz",
        "tfds:cifar10:test": "tfds:cifar10:test",
        "hf:owner/name:test": "hf:owner/name:test",
        "shapes": "shapes",
    }.items():
        assert absolute_spec(spec) == expected
    assert source_of(["x", "y"]) == f"folder:{tmp_path}/x,{tmp_path}/y" and source_of(["x"]) == f"folder:{tmp_path}/x"
    (tmp_path / "l.txt").write_text("a.png")
    assert source_of(["l.txt"]) == f"{tmp_path}/l.txt" and source_of(["*.tar"]) == f"{tmp_path}/*.tar"
    assert source_of(["shapes"]) == "shapes" and source_of(["tar:s-*.tar"]) == f"tar:{tmp_path}/s-*.tar"


def test_lists(tmp_path):
    def listing(text):
        (tmp_path / "l.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"list:{tmp_path}/l.txt"

    write_list(tmp_path)
    (tmp_path / "plain.png").write_bytes(BYTES[0])
    source = make_source(listing(f"{tmp_path}/plain.png\t7\r\nplain.png\nplain.png\t0"))
    assert source.labels().tolist() == [7, -1, 0] and source.num_classes == 8 and source.class_names is None
    unlabelled = make_source(listing("plain.png\ngone.png\n"))
    assert unlabelled.labels() is None
    with pytest.raises(BadImage, match=r"gone.png: No such file"):  # counted like any bad file
        unlabelled[1]
    assert "a label follows a tab, not a space" in one_line(listing("plain.png 7\n"))
    assert "does not exist, nor do those after it: paths are relative to" in one_line(listing("a.png\nb.png"))
    assert "a.png has 3 columns" in one_line(listing("a.png\t1\t2"))
    assert "lists nothing" in one_line(listing("\n \n"))
    assert "is no text file" in one_line(listing(b"PK\0\0"))
    assert one_line(f"list:{tmp_path}/none.txt") == f"list:{tmp_path}/none.txt does not exist"


def test_a_tar_files_index_is_kept_and_renewed(tmp_path, monkeypatch):
    shard, index = str(tmp_path / "a.tar"), tmp_path / "a.tar.index.npz"
    write_tar(shard, [("a.png", BYTES[0]), ("b.png", BYTES[1])])
    scans = []
    monkeypatch.setattr(tar, "_scan", lambda path, scan=tar._scan: scans.append(path) or scan(path))
    first = make_source(f"tar:{shard}")
    assert scans == [shard] and index.exists()
    again = make_source(f"tar:{shard}")
    assert scans == [shard] and [again[i] for i in (0, 1)] == [first[i] for i in (0, 1)]
    write_tar(shard, [("b.png", BYTES[1]), ("a.png", BYTES[2])])  # of the same size
    os.utime(shard, ns=(1, 1))
    assert make_source(f"tar:{shard}")[1]["image"] == BYTES[2] and len(scans) == 2
    write_tar(shard, [("only.png", BYTES[0])] * 30)
    os.utime(shard, ns=(1, 1))  # of the same time
    assert len(make_source(f"tar:{shard}")) == 30 and len(scans) == 3
    index.write_bytes(b"damaged")
    assert len(make_source(f"tar:{shard}")) == 30 and len(scans) == 4
    assert len(make_source(f"tar:{shard}")) == 30 and len(scans) == 4


def test_the_index_goes_into_the_cache_where_the_folder_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    write_tar(tmp_path / "a.tar", [("a.png", BYTES[0])])
    save, scans = tar._save, []
    monkeypatch.setattr(tar, "_scan", lambda path, scan=tar._scan: scans.append(path) or scan(path))

    def refuse(place, *rest):
        if os.path.dirname(place) == str(tmp_path):
            raise PermissionError(13, "Permission denied")  # root may write anywhere
        save(place, *rest)

    monkeypatch.setattr(tar, "_save", refuse)
    for _ in range(2):
        assert make_source(f"tar:{tmp_path}/a.tar", data_cache=str(tmp_path / "cache"))[0]["image"] == BYTES[0]
    assert len(scans) == 1 and len(list((tmp_path / "cache").rglob("*.npz"))) == 1 and not caplog.records
    assert len(make_source(f"tar:{tmp_path}/a.tar")) == 1
    assert "cannot be kept" in caplog.text


def test_labels_in_tar_files(tmp_path):
    def source(*members, **options):
        return make_source("tar:" + write_tar(tmp_path / "x.tar", members), **options)

    png = BYTES[0]
    numbers = source(
        ("a/1.png", png), ("a/1.cls", b"3\n"), ("b/1.png", png), ("c.2.png", png), ("c.json", b'{"label": 0}')
    )
    assert numbers.labels().tolist() == [3, -1, 0] and numbers.num_classes == 4
    folders = ("./p/dog/1.png", png), ("./p/cat/2.png", png), ("./p/dog/._1.png", b""), ("./p/notes.txt", b"x")
    by_folder = source(*folders)
    assert by_folder.class_names == ["cat", "dog"] and by_folder.labels().tolist() == [1, 0]
    assert "its 2 sub-folders (cat, dog) are taken as the classes" in by_folder.labels_note
    assert source(*folders, labels="none").labels() is None
    assert source(("1.png", png), ("1.json", b"no json")).labels() is None


def test_tar_mistakes_are_one_line(tmp_path):
    shard = write_tar(tmp_path / "train-000.tar", [(f"{i}.png", BYTES[i]) for i in range(3)])
    data = (tmp_path / "train-000.tar").read_bytes()
    assert one_line(f"tar:{tmp_path}/trian-000.tar").endswith("; did you mean train-000.tar?")
    assert "does not exist" in one_line(f"tar:{tmp_path}/none/*.tar")
    (tmp_path / "z.tar").write_bytes(gzip.compress(data))
    assert "is compressed" in one_line(f"tar:{tmp_path}/z.tar")
    (tmp_path / "z.tar").write_bytes(b"text" * 300)
    assert "cannot be read as a tar file" in one_line(f"tar:{tmp_path}/z.tar")
    (tmp_path / "z.tar").write_bytes(data[:1600])
    assert "cannot be read as a tar file" in one_line(f"tar:{tmp_path}/z.tar")
    write_tar(tmp_path / "z.tar", [("a.txt", b"x")])
    assert "no member is an image (jpg, " in one_line(f"tar:{tmp_path}/z.tar")
    source = make_source(f"tar:{shard}")
    (tmp_path / "train-000.tar").write_bytes(data[:600])  # while it is in use
    with pytest.raises(BadImage, match=r"train-000.tar/2.png: the tar file ends before it"):
        source[2]


def test_parquet_files_of_others(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[dev]'")
    import pyarrow.parquet as pq

    def written(name="x", **columns):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet", row_group_size=2)
        return f"parquet:{tmp_path}/{name}.parquet"

    plain = make_source(written(id=[5, 6, 7], img=[*BYTES[:2], None], label=["dog", None, "cat"]))
    assert (
        plain.class_names == ["cat", "dog"] and plain.labels().tolist() == [1, -1, 0] and plain[1]["image"] == BYTES[1]
    )
    with pytest.raises(BadImage, match=r"x.parquet, row 2: the row holds no image"):
        plain[2]
    (tmp_path / "1.png").write_bytes(BYTES[1])
    by_path = make_source(written(image=[{"bytes": None, "path": "1.png"}, {"bytes": b"", "path": "gone.png"}]))
    assert by_path[0] == {"image": BYTES[1]}
    two = written(left=BYTES, right=BYTES[::-1], fine=[1, 2, 3])
    assert "several columns of images: it has left (binary), right" in one_line(two)
    right = make_source(two, image_column="right", label_column="fine")
    assert right[0] == {"image": BYTES[2], "label": 1}
    assert "no column of labels 'coarse'" in one_line(two, image_column="left", label_column="coarse")
    assert "no column of images 'fine'" in one_line(two, image_column="fine")
    assert "no column of image bytes" in one_line(written(text=["a"]))
    written("y-1", img=BYTES[:1], label=[0])
    written("y-2", img=BYTES[:1])
    assert "y-2.parquet has no column 'label', which" in one_line(f"parquet:{tmp_path}/y-*")
    (tmp_path / "z.parquet").write_bytes(b"PAR1" * 9)
    assert "z.parquet cannot be read: " in one_line(f"parquet:{tmp_path}/z.parquet")


def test_parquet_keeps_no_more_row_groups_than_it_may(tmp_path, monkeypatch):
    source = make_source(write_parquet(tmp_path))
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    for index in (0, 1, 2, 0):
        assert source[index]["image"] == BYTES[index] and len(source._kept) == 1


def test_hf_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install -e '.[dev]'")
    datasets.DatasetDict({"train": table(), "test": table([1])}).save_to_disk(tmp_path / "splits")
    assert len(make_source(f"hf:{tmp_path}/splits")) == 3
    test = make_source(f"hf:{tmp_path}/splits:test")
    assert test[0] == {"image": BYTES[1], "label": 1} and test.name(0) == f"hf:{tmp_path}/splits:test, row 0"
    assert "has no split 'val' (it has: train, test)" in one_line(f"hf:{tmp_path}/splits:val")
    # A copy of a repository of the Hub, which the library reads into its cache.
    (tmp_path / "copy").mkdir()
    write_parquet(tmp_path / "copy")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    copy = make_source(f"hf:{tmp_path}/copy")
    assert [copy[i]["image"] for i in range(3)] == BYTES and copy.class_names == ["cat", "dog"]
    assert "'val'" in one_line(f"hf:{tmp_path}/copy:val") or '"val"' in one_line(f"hf:{tmp_path}/copy:val")
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(tmp_path / "no images")
    assert "has no column of images: it has x (Value)" in one_line(f"hf:{tmp_path}/no images")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert one_line("hf:nobody/nothing:train").startswith("hf:nobody/nothing:train cannot be opened: ")


def test_frames_of_videos(tmp_path):
    write_video(tmp_path / "v" / "1.mp4")
    source = make_source(f"video:{tmp_path}/v/*.mp4", video_seconds=0.5)
    assert len(source) == 6 and source.labels() is None and source.name(3) == f"{tmp_path}/v/1.mp4 at 1.5 s"
    values = [float(source[i]["image"].mean()) for i in (5, 0, 1, 2, 3, 4)]  # in any order
    np.testing.assert_allclose(values, [160, 0, 0, 80, 80, 160], atol=6)
    (tmp_path / "v" / "broken.mp4").write_bytes(b"no video")
    both = make_source(f"video:{tmp_path}/v")
    assert len(both) == 4 and both.name(3) == f"{tmp_path}/v/broken.mp4 at 0 s"
    with pytest.raises(BadImage, match=r"broken.mp4 at 0 s: unreadable video: "):
        both[3]
    assert "must be positive" in one_line(f"video:{tmp_path}/v", video_seconds=0.0)
    assert "holds no video (mp4, " in one_line(f"video:{tree(tmp_path / 'p', '1.png')[7:]}")


def test_bad_images_in_a_tar_file_are_replaced_and_counted(tmp_path, caplog):
    members = [("0.png", BYTES[0]), ("1.png", b"no image"), ("2.png", BYTES[2])]
    source = make_source("tar:" + write_tar(tmp_path / "x.tar", members))
    image, label, failed = read_or_replace(source, 1, 1)
    assert failed == [1] and label == -1
    np.testing.assert_array_equal(image, decode(BYTES[2], "2.png"))
    BadImages(source, 0.5).add(failed)
    assert f"cannot read {tmp_path}/x.tar/1.png: its slot is filled by the next readable image" in caplog.text


@pytest.mark.parametrize("kind, package", [("parquet", "pyarrow"), ("hf", "datasets"), ("video", "av")])
def test_a_missing_package_is_named(tmp_path, kind, package, monkeypatch):
    (tmp_path / "x").write_bytes(b"")
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert one_line(f"{kind}:{tmp_path}/x").endswith(f"pip install {package}")


def sources_of_each_kind(tmp_path, packed=PACKED) -> list:
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        write_image(tmp_path / "folder" / name)
    specs = [PACKED[kind](tmp_path) for kind in packed]
    images, labels = make_shapes(3, image_size=16)
    path = stored(tmp_path / "x.npz", False, images=images, labels=labels)
    return [
        FolderSource(str(tmp_path / "folder")),
        load_arrays(path),
        ArraySource(images, labels),
        ShapesSource(num_examples=3, image_size=16),
        *map(make_source, specs),
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
    # The import of datasets takes seconds: in one of the two.
    every = sources_of_each_kind(tmp_path, PACKED if method == "spawn" else ("list", "tar", "video"))
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
