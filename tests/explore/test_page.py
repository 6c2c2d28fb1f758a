"""The page of `hexa explore` without a browser: the data in it, hostile names, mistakes."""

import base64
import html.parser
import json
import re
import sys

import cv2
import numpy as np
import pytest
from textures import reencoded, resized, texture
from threadpoolctl import threadpool_limits

from hexa_jax.cli import explore as command
from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.knn import nearest
from hexa_jax.explore import maps
from hexa_jax.explore.page import render_page
from hexa_jax.explore.thumbnails import ATLAS_SIDE, make_atlases, make_thumbnail, thumbnail_side

SIZE, IMAGES = 16, 30
HOSTILE = "</script><img src=x onerror='boom()'>.png".replace("/", "\u2215")


def run(*words):
    return command.main([*map(str, words), f"--size={SIZE}", "--threads=2", "--map=pca"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Textures in two folders with copies of two of them, a hostile name and a corrupt file."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(IMAGES - 3):
        path = root / ("even" if number % 2 == 0 else "odd") / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        write(path, texture(number))
    write(root / "even" / HOSTILE, texture(100))
    write(root / "odd" / "copy of 04.jpg", reencoded(resized(texture(4), 0.5), 80))
    write(root / "odd" / "copy of 09.jpg", reencoded(texture(9), 40))
    (root / "odd" / "corrupt.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return root


def write(path, image):
    path.write_bytes(cv2.imencode(path.suffix, image[..., ::-1])[1].tobytes())


@pytest.fixture(scope="module")
def page(weights, folder, tmp_path_factory):
    """The text of the page."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert run(weights, folder, f"--output={path}", "--clusters=4", "--neighbors=5") == 0
    return path.read_text(encoding="utf-8")


def data_of(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_data_are_those_of_the_images(page, folder):
    data = data_of(page)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stem != "corrupt")
    assert data["root"] == str(folder)
    assert data["names"] == sorted(str(path.relative_to(folder)) for path in paths)
    assert data["labels"]["names"] == ["even", "odd"] and data["folders"] is None
    of = [data["names"][i].startswith("odd") for i in range(IMAGES)]
    assert data["labels"]["of"] == [int(odd) for odd in of]
    [[name, reason]] = data["unreadable"]
    assert name == str(folder / "odd" / "corrupt.jpg") and "JPEG" in reason
    assert sum(np.bincount(data["clusters"])) == IMAGES and max(data["clusters"]) <= 3
    assert [m["title"] for m in data["maps"]] == ["PCA"] and len(data["maps"][0]["x"]) == IMAGES
    assert np.shape(data["neighbors"]) == np.shape(data["similarity"]) == (IMAGES, 5)
    assert all(i not in row for i, row in enumerate(data["neighbors"]))
    score = 1 - np.mean(data["similarity"], axis=1) / data["precision"]
    np.testing.assert_allclose(np.array(data["outlier"]) / data["precision"], score, atol=1e-4)


def test_near_duplicates_are_the_inserted_copies(page):
    data = data_of(page)
    strong = [
        sorted(data["names"][i].rpartition("/")[2] for i in pair)
        for pair, correlation in zip(data["pairs"], data["correlation"], strict=True)
        if correlation >= data["threshold"] * data["precision"]
    ]
    assert sorted(strong) == [["04.png", "copy of 04.jpg"], ["09.png", "copy of 09.jpg"]]


def decoded(atlas):
    encoded = base64.b64decode(atlas.removeprefix("data:image/webp;base64,"))
    return cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)


def test_thumbnails_are_in_their_cells(page, folder):
    data = data_of(page)
    side, columns = data["side"], data["columns"]
    assert len(data["atlases"]) == 1 and side == thumbnail_side(IMAGES)
    atlas = decoded(data["atlases"][0]).astype(int)
    for i in (0, 7, IMAGES - 1):
        top, left = i // columns * side, i % columns * side
        cell = atlas[top : top + side, left : left + side]
        image = cv2.imread(str(folder / data["names"][i]), cv2.IMREAD_COLOR_RGB)
        assert np.abs(cell - make_thumbnail(image, side)).mean() < 6  # WebP is lossy


def test_full_atlases_are_followed_by_another():
    side = 1024
    columns = ATLAS_SIDE // side
    cells = [np.full((side, side, 3), 10 * i, np.uint8) for i in range(columns**2 + 2)]
    atlases, found = make_atlases(cells)
    assert found == columns and len(atlases) == 2
    last = decoded(atlases[1])
    assert last.shape == (side, ATLAS_SIDE, 3)
    assert abs(int(last[side // 2, side + 9, 0]) - 10 * (columns**2 + 1)) < 3


class Elements(html.parser.HTMLParser):
    """Counts elements, and keeps addresses and event handlers."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]


def test_nothing_comes_from_outside_and_names_are_no_markup(page):
    elements = Elements()
    elements.feed(page)
    assert elements.tags.count("script") == 2 and "img" not in elements.tags
    assert elements.addresses == [] and elements.handlers == []
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page
    assert any("onerror" in name for name in data_of(page)["names"])


def test_the_data_cannot_end_their_element():
    page = render_page({"names": ["</script><script>boom()</script>", "<!--", "\udcff"]})
    assert page.count("<script") == 2 and data_of(page)["names"][2] == "\udcff"


def test_a_sample_says_so_and_is_spread_over_the_folder(weights, folder, tmp_path, capsys):
    output = tmp_path / "sample.html"
    assert run(weights, folder, f"--output={output}", "--limit=9", "--title=Mine") == 0
    data = data_of(output.read_text(encoding="utf-8"))
    assert len(data["names"]) == 9 and data["total"] == IMAGES + 1 and data["title"] == "Mine"
    assert {name[:3] for name in data["names"]} == {"eve", "odd"}
    assert "9 of 31 images" in capsys.readouterr().out


def test_arrays_have_no_files_to_show(weights, tmp_path):
    images = np.stack([texture(number, 20, 20) for number in range(3)])
    np.savez(tmp_path / "images.npz", images=images, labels=np.array([1, 0, 1]))
    output = tmp_path / "page.html"
    assert run(weights, f"arrays:{tmp_path / 'images.npz'}", f"--output={output}") == 0
    data = data_of(output.read_text(encoding="utf-8"))
    assert data["root"] == "" and data["names"][1].endswith("index 1")
    assert data["labels"] == {"names": ["0", "1"], "of": [1, 0, 1]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("W", "P", "--output=page.pdf"), "must end in .html"),
        (("W", "P", "--output=missing/page.html"), "no folder missing"),
        (("W", "P", "--limit=-1"), "--limit=-1"),
        (("W", "P", "--map=som"), "invalid choice"),
        (("W", "missing"), "does not exist"),
        (("missing", "P"), "neither a file nor the workdir"),
    ],
)
def test_a_mistake_is_one_line(words, said, weights, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = [{"W": str(weights), "P": str(folder)}.get(word, word) for word in words]
    assert command.main(words) == 2
    error = capfd.readouterr().err.strip()
    assert said in error and "\n" not in error and error.startswith("hexa explore: ")
    assert not list(tmp_path.iterdir())


# ---- Maps --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread():
    """On few points the threads of t-SNE wait for each other most of the time."""
    with threadpool_limits(1):
        yield


def groups():
    """40 vectors in four directions, and their groups."""
    group = np.repeat(np.arange(4), 10)
    noise = np.random.default_rng(0).normal(0, 0.05, (40, 16))
    return (np.eye(16)[group] + noise).astype(np.float32), group


def test_tsne_keeps_groups_together_and_pca_comes_with_it():
    values, group = groups()
    found = maps.make_maps(values, "tsne")
    assert list(found) == ["t-SNE", "PCA"]
    for points in found.values():
        assert points.shape == (40, 2) and points.dtype == np.float32
        extent = points.max(axis=0) - points.min(axis=0)
        assert points.min() >= -1e-6 and points.max() <= 1 + 1e-6 and np.isclose(extent.max(), 1)
    points = found["t-SNE"] - found["t-SNE"].mean(axis=0)
    distance = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (group[np.argmin(distance, axis=1)] == group).all()
    again = maps.make_maps(values, "tsne")
    np.testing.assert_array_equal(found["t-SNE"], again["t-SNE"])


def test_pca_is_that_of_the_directions():
    values, _ = groups()
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    scores = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
    points = maps.make_maps(values, "pca")["PCA"]
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], scores[:, axis])[0, 1]) > 0.9999


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8])
def test_maps_of_few_images(count):
    values, _ = groups()
    found = maps.make_maps(values[::5][:count], "tsne")
    assert all(points.shape == (count, 2) and np.isfinite(points).all() for points in found.values())


def test_umap_that_cannot_be_imported_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match="pip install umap-learn"):
        maps.make_maps(groups()[0], "umap")


# umap-learn compiles itself for most of a minute.
@pytest.mark.slow
def test_umap_keeps_groups_together():
    try:
        maps.import_umap()
    except ConfigError as error:
        pytest.skip(str(error))
    values, group = groups()
    points = maps.make_maps(values, "umap")["UMAP"]
    _, rows = nearest(points, points, 1, own=np.arange(40))
    assert (group[rows[:, 0]] == group).mean() > 0.9
