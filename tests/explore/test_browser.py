"""The page of `hexa explore` in headless Chromium: what a person does with it."""

import numpy as np
import pytest
from textures import texture

from hexa_jax.data.decode import BadImage
from hexa_jax.explore.duplicates import SHOWN, find_pairs, signature
from hexa_jax.explore.embedding import Embedded
from hexa_jax.explore.page import page_data, render_page
from hexa_jax.explore.structure import find_clusters, find_neighbors
from hexa_jax.explore.thumbnails import make_atlases, make_thumbnail

IMAGES, SIDE = 60, 32
HOSTILE = "<img src=x onerror=\"document.title='boom'\"> & #50%.png"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page about textures on a spiral; 7 and 8 are copies of 6, and number 3 has a hostile name."""
    images = [texture(6 if i in (7, 8) else i, SIDE, SIDE) for i in range(IMAGES)]
    angle = np.linspace(0, 5, IMAGES)
    values = np.stack([np.cos(angle), np.sin(angle), np.ones(IMAGES)], axis=1).astype(np.float32)
    names = [f"/photos/camera {'ab'[i % 2]}/image {i:02}.png" for i in range(IMAGES)]
    names[3] = f"/photos/camera b/{HOSTILE}"
    spiral = values[:, :2] * np.linspace(0.1, 0.5, IMAGES)[:, None] + 0.5
    pairs, correlation = find_pairs(np.stack([signature(image) for image in images]), SHOWN)
    embedded = Embedded(np.arange(IMAGES), names, np.full(IMAGES, -1), values, [], [BadImage("bad.jpg", "empty file")])
    data = page_data(
        embedded,
        title="Textures",
        weights="tiny",
        total=IMAGES + 1,
        is_folder=True,
        labels=[""] * IMAGES,
        maps={"t-SNE": spiral.astype(np.float32), "PCA": 1 - spiral.astype(np.float32)},
        clusters=find_clusters(values, 5),
        neighbors=find_neighbors(values, 6),
        pairs=pairs,
        correlation=correlation,
        thumbnails=(*make_atlases([make_thumbnail(image, SIDE) for image in images]), SIDE),
    )
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_page(data), encoding="utf-8")
    return path


@pytest.fixture
def shown(browser, page):
    """The page in a window, ready."""

    def show(**window):
        browser.open(page, **window)
        browser.wait_for("document.documentElement.dataset.ready")
        return browser

    return show


def text(browser, selector="#view"):
    return browser.evaluate(f"document.querySelector({selector!r}).innerText")


def place_of(browser, image):
    """Where an image is in the window."""
    return browser.evaluate(
        f"(() => {{ const box = document.getElementById('canvas').getBoundingClientRect();"
        f"const [x, y] = explore.screenOf({image}); return [box.left + x, box.top + y]; }})()"
    )


def test_a_click_shows_the_image_and_its_neighbors(shown):
    browser = shown()
    browser.click(*place_of(browser, 59))
    assert text(browser, ".name") == "camera b/image 59.png"
    expected = browser.evaluate("explore.data.neighbors[59]")
    found = "[...document.querySelectorAll('#view .thumb')].map((node) => Number(node.dataset.image))"
    assert browser.evaluate(found) == expected and expected[0] == 58
    browser.evaluate("document.querySelector('#view .thumb').click()")
    assert text(browser, ".name") == "camera a/image 58.png"


def test_thumbnails_are_drawn_with_their_colours(shown):
    browser = shown()
    browser.evaluate("explore.select(59); explore.zoom(1)")
    pixel = """(() => {
      const canvas = document.getElementById('canvas');
      const [x, y] = explore.screenOf(59).map((v) => Math.round(v * canvas.width / canvas.clientWidth));
      return [...canvas.getContext('2d').getImageData(x - 2, y - 2, 4, 4).data];
    })()"""
    browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    drawn = np.array(browser.evaluate(pixel)).reshape(-1, 4)[:, :3].mean(axis=0)
    middle = texture(59, SIDE, SIDE)[14:18, 14:18].reshape(-1, 3).mean(axis=0)
    assert np.abs(drawn - middle).max() < 25


def test_drag_wheel_and_keys_move_the_map(shown):
    browser = shown()
    start = browser.evaluate("({...explore.view})")
    browser.drag((300, 300), (360, 340))
    dragged = browser.evaluate("({...explore.view})")
    assert np.isclose((start["x"] - dragged["x"]) * start["scale"], 60)
    assert np.isclose((start["y"] - dragged["y"]) * start["scale"], 40)
    before = place_of(browser, 30)
    browser.wheel(*before, -240)
    assert browser.evaluate("explore.view.scale") > start["scale"]
    np.testing.assert_allclose(place_of(browser, 30), before, atol=1)
    browser.evaluate("document.getElementById('canvas').focus()")
    browser.press("0", "0")
    reset = browser.evaluate("({...explore.view})")
    assert reset == start
    browser.press("ArrowRight")
    assert browser.evaluate("explore.view.x") > start["x"]
    browser.press("Enter")
    assert text(browser, ".name").startswith("camera")


def test_search_finds_names_and_marks_them(shown):
    browser = shown()
    browser.evaluate("document.getElementById('query').focus()")
    browser.write("IMAGE 1")
    names = [name.lower() for name in browser.evaluate("explore.data.names")]
    count = sum("image" in name and "1" in name for name in names)
    assert f"{count} images found" in text(browser) and 10 < count < IMAGES
    assert f"{count} images found" in text(browser, "#marked")
    browser.press("Enter", "\r")
    assert text(browser, ".name") == "camera b/image 01.png"
    browser.evaluate("document.getElementById('query').value = ''")
    browser.evaluate("document.getElementById('query').dispatchEvent(new Event('input'))")
    assert browser.evaluate("document.getElementById('marked').hidden")


def test_duplicates_follow_the_threshold(shown):
    browser = shown()
    browser.evaluate("document.getElementById('tab-duplicates').click()")
    assert "1 group; 2 images could go" in text(browser)
    groups = "[...document.querySelectorAll('.group')].map((group) => group.querySelectorAll('.thumb').length)"
    assert browser.evaluate(groups) == [3]
    saved = """(async () => {
      let blob;
      const make = URL.createObjectURL;
      URL.createObjectURL = (made) => { blob = made; return make(made); };
      HTMLAnchorElement.prototype.click = () => {};
      [...document.querySelectorAll('#view button')].find((b) => b.textContent === 'Save groups').click();
      return blob.text();
    })()"""
    lines = browser.evaluate(saved).split("\r\n")
    assert lines[:2] == ["group,name", "1,camera a/image 06.png"] and len(lines) == 5


def test_clusters_outliers_and_unreadable(shown):
    browser = shown()
    browser.evaluate("document.getElementById('tab-clusters').click()")
    rows = browser.evaluate("[...document.querySelectorAll('.row')].map((row) => row.innerText)")
    sizes = [int(row.split()[2]) for row in rows]
    assert sum(sizes) == IMAGES and sizes == sorted(sizes, reverse=True) and len(rows) == 5
    browser.evaluate("document.querySelector('.row').click()")
    assert "Most typical" in text(browser) and "Cluster 1" in text(browser, "#marked")
    browser.evaluate("document.getElementById('tab-outliers').click()")
    scores = browser.evaluate("[...document.querySelectorAll('#view .thumb span')].map((s) => Number(s.textContent))")
    assert scores == sorted(scores, reverse=True) and len(scores) == IMAGES
    browser.evaluate("document.getElementById('tab-unreadable').click()")
    assert "bad.jpg: empty file" in text(browser)


def test_maps_and_colours_can_be_chosen(shown):
    browser = shown()
    choose = (
        "(() => {{ const s = document.getElementById({!r}); s.value = {!r}; s.dispatchEvent(new Event('change')); }})()"
    )
    first = place_of(browser, 59)
    browser.evaluate(choose.format("map", "1"))
    assert np.abs(np.subtract(place_of(browser, 59), first)).max() > 50
    colours = browser.evaluate("[...document.getElementById('color').options].map((o) => o.value)")
    assert colours == ["cluster", "folder", "outlier"]
    for colour in colours:
        browser.evaluate(choose.format("color", colour))
    assert browser.problems() == []


def test_names_are_text_and_nothing_is_loaded(shown, page):
    browser = shown()
    browser.evaluate("explore.select(3)")
    assert text(browser, ".name") == f"camera b/{HOSTILE}"
    assert browser.evaluate("document.title") == "Textures"
    # The full-size file is looked for, and is not there: the thumbnail stays.
    assert [url for url in browser.requests() if not url.startswith("file:///")] == []
    assert browser.evaluate("document.querySelector('.preview').tagName") == "CANVAS"
    problems = [problem for problem in browser.problems() if "ERR_FILE_NOT_FOUND" not in problem]
    assert problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_in_both_schemes(shown, dark):
    browser = shown(width=390, height=844, touch=True, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    back, front = (
        sum(map(int, browser.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3)")))
        for name in ("backgroundColor", "color")
    )
    assert (back < front) == dark and abs(back - front) > 450
    small = """[...document.querySelectorAll('button, select, input')].filter((node) => node.offsetParent)
      .filter((node) => node.getBoundingClientRect().height < 36).map((node) => node.id || node.textContent)"""
    assert browser.evaluate(small) == []


def test_the_keyboard_reaches_everything(shown):
    browser = shown()
    unnamed = """[...document.querySelectorAll('button, select, input, canvas[tabindex]')].filter((node) =>
      !(node.getAttribute('aria-label') || node.textContent.trim() || (node.labels && node.labels.length))).length"""
    assert browser.evaluate(unnamed) == 0
    browser.evaluate("document.getElementById('tab-image').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate("document.activeElement.id") == "tab-clusters"
    assert "5 clusters" in text(browser)
    browser.evaluate("explore.select(20)")
    assert "image 20" in text(browser, "#spoken")
