"""Data sets written once: a folder of images as ArrayRecord, and tfds by name, each in a process of its own."""

import importlib.util
import re
import subprocess
import sys

import pytest
from command_line import REPOSITORY, environment, image_folder
from official_archives import encoded, write_official_tars

from hexa_jax import prepare as preparing
from hexa_jax.data.source import DataError
from hexa_jax.data.sources import make_source


def prepare(*words, timeout=300):
    command = [sys.executable, "-W", "ignore", "-m", "hexa_jax.prepare", *map(str, words)]
    env = environment() | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)


def test_a_folder_keeps_its_bytes_and_labels(tmp_path):
    image_folder(tmp_path / "photos", count=23)
    done = prepare(f"folder:{tmp_path}/photos", "--name=my_photos", f"--data_dir={tmp_path}/data")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "23 of 23 images" in done.stdout and "ready: " in done.stdout
    folder, packed = (
        make_source(f"folder:{tmp_path}/photos"),
        make_source("tfds:my_photos", data_dir=f"{tmp_path}/data"),
    )
    assert packed.class_names == folder.class_names and len(packed) == 23
    stored = {packed.record(i)["file_name"].decode(): packed[i] for i in range(23)}
    for index in range(23):
        name = folder.name(index).removeprefix(f"{tmp_path}/photos/")
        assert stored[name]["image"] == folder[index]["image"] and stored[name]["label"] == folder[index]["label"]
    again = prepare(f"folder:{tmp_path}/photos", "--name=my_photos", f"--data_dir={tmp_path}/data")
    assert again.returncode == 0 and "images/s" not in again.stdout  # it is there
    unlabelled = prepare(
        f"folder:{tmp_path}/photos", "--name=unlabelled", "--labels=none", f"--data_dir={tmp_path}/data"
    )
    assert unlabelled.returncode == 0 and "--labels=none" in done.stdout and "classes" not in unlabelled.stdout
    assert make_source("tfds:unlabelled", data_dir=f"{tmp_path}/data").num_classes is None
    image_folder(tmp_path / "photos", count=24)
    other = prepare(f"folder:{tmp_path}/photos", "--name=my_photos", f"--data_dir={tmp_path}/data")
    assert other.returncode == 2 and "has 23 images" in other.stderr and "Traceback" not in other.stderr


def test_imagenet_by_name(tmp_path):
    train = {"n01440764": {f"n01440764_{i}.JPEG": encoded((9, 50 * i, 0)) for i in range(3)}}
    write_official_tars(tmp_path / "manual", train, {"ILSVRC2012_val_00000001.JPEG": encoded((80, 0, 0))})
    done = prepare("imagenet2012", f"--data_dir={tmp_path}/data", f"--manual_dir={tmp_path}/manual")
    assert done.returncode == 0, done.stderr[-2000:]
    source = make_source("tfds:imagenet2012:train", data_dir=f"{tmp_path}/data")
    assert len(source) == 3 and source.num_classes == 1000


@pytest.mark.parametrize(
    "words, message",
    [
        (["imagenet2012", "--manual_dir=/nowhere"], "imagenet2012 cannot be prepared"),
        (["no_such_data"], "tfds has no 'no_such_data'"),
        (["folder:/nowhere", "--name=a"], "folder:/nowhere does not exist"),
        (["folder:/tmp", "--name=My Photos"], "--name='My Photos': lower case letters"),
        ([], "see python -m hexa_jax.prepare --help"),
        (["imagenet2012", "--wrong"], "unrecognized arguments: --wrong"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, message):
    done = prepare(*words, *([f"--data_dir={tmp_path}"] if words else []))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and message in last and "Traceback" not in done.stderr


def test_without_tensorflow_the_message_names_what_can_be_installed(monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    without = lambda name, *rest: None if name == "tensorflow" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert preparing.main(["mnist"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -e '.[prepare]'" in line
    assert "pip install tensorflow-cpu importlib_resources" in line
    with pytest.raises(DataError, match=r"pip install -e '.\[prepare\]'"):
        make_source("tfds:mnist", data_dir=str(tmp_path))


def test_nothing_tells_a_user_to_install_the_project_from_an_index():
    """The project is in no package index: whoever takes its name there would run code on users' machines."""
    wrong = re.compile(r"pip3? install (-\S+ )*['\"]?hexa[_-]jax")
    texts = [REPOSITORY / "README.md"]
    for folder in ("hexa_jax", "configs", "launch", "docs", "notebooks", "benchmarks"):
        texts += [p for p in (REPOSITORY / folder).rglob("*") if p.suffix in (".py", ".md", ".sh", ".ipynb")]
    assert len(texts) > 100
    for path in texts:
        assert not wrong.search(path.read_text()), path
