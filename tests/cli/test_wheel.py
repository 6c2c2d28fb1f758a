"""A wheel alone, in an empty folder: each command of `hexa` on a folder of all sorts of files."""

import os
import pathlib
import shutil
import site
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
from command_line import REPOSITORY, image_folder
from PIL import Image

PARTS = ("hexa_jax", "configs", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
GOOD = 40  # images that can be read


def run(words, **options):
    """A process to its end, which must go well; its output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        ignored = {"ignore": shutil.ignore_patterns("__pycache__"), "symlinks": True}
        copy(REPOSITORY / part, folder / part, **(ignored if copy is shutil.copytree else {}))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run([*build, f"--wheel-dir={folder}", str(folder)], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def venv(wheel, tmp_path_factory):
    """bin/ of a fresh virtual environment with the wheel; all else comes from the one that runs the tests."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(site.getsitepackages()))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, str(wheel)])
    return folder / "bin"


def of_all_sorts(folder):
    """Photographs as people have them: 40 that can be read, one that is cut off and one that is empty."""
    paths = image_folder(folder, by_class=False, count=GOOD - 4)
    data = paths[0].read_bytes()
    (folder / "corrupt.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 80, 4), np.uint8), "CMYK").save(folder / "cmyk.jpg")
    assert cv2.imwrite(str(folder / "16 bit.png"), rng.integers(0, 65535, (50, 70, 3)).astype(np.uint16))
    frames = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    assert cv2.imwrite(str(folder / "large.png"), np.full((5000, 6000), 128, np.uint8))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hexa_jax"}
    recipes = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "configs").rglob("*.py")}
    assert {f"hexa_jax/{recipe}" for recipe in recipes} <= set(names)
    others = {
        path for path in (REPOSITORY / "hexa_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert {path.relative_to(REPOSITORY).as_posix() for path in others} <= set(names)
    assert "hexa_jax/py.typed" in names


def test_the_commands_in_an_empty_folder(venv, tmp_path):
    photos, labeled, empty = tmp_path / "my photos", tmp_path / "labeled", tmp_path / "empty"
    photos.mkdir()
    empty.mkdir()
    of_all_sorts(photos)
    image_folder(labeled, count=12)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    env["JAX_NUM_CPU_DEVICES"] = "1"

    def hexa(*words):
        return run([str(venv / "hexa"), *map(str, words)], cwd=empty, env=env)

    told = hexa("doctor")
    installed = next(venv.parent.glob("lib/python*/site-packages/hexa_jax"))
    assert str(installed) in told and "1 CPU device" in told  # and not the clone
    small = ("--config.model.backbone=resnet10", "--config.model.base_channels=8")
    told = hexa("pretrain", photos, "--workdir=W", "--epochs=2", f"--labelled={labeled}", *small)
    assert "photographs" in told and "expected time" in told
    assert "corrupt.jpg" in told and "empty.jpg" in told  # named before anything is trained
    for line in ("42 images", "no labels", "model.base_channels", "as you said", "memory: a step takes", "kNN"):
        assert line in told
    for name in ("config.json", "result.json", "report/index.html"):
        assert (empty / "W" / name).is_file()
    told = hexa("evaluate", "W", "knn", f"--data={labeled}", "--config.neighbours=(3,)")
    assert "knn3_tau0.07" in told and (empty / "W" / "knn" / "result.json").is_file()
    told = hexa("embed", "W", photos, "--output=photos.csv")
    assert f"{GOOD} x " in told and "2 of 42 images cannot be read" in told
    assert len((empty / "photos.csv").read_text().splitlines()) == 1 + GOOD
    hexa("explore", "W", photos, "--output=photos.html")
    assert "large.png" in (empty / "photos.html").read_text()
    for file in ("torchvision.safetensors", "onnx.onnx"):
        hexa("export", "W", f"--format={file.partition('.')[0]}", f"--output=out/{file}")
        assert (empty / "out" / file).stat().st_size > 10_000
    assert sorted(path.name for path in empty.iterdir()) == ["W", "out", "photos.csv", "photos.html"]


def test_the_script_tells_its_version(venv):
    version = run([str(venv / "hexa"), "--version"]).split()
    assert version == ["hexa_jax", run([sys.executable, "-c", "import hexa_jax; print(hexa_jax.__version__)"]).strip()]
    assert pathlib.Path(venv / "hexa").is_file()
