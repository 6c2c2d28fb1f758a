"""The report: findings in words, charts, one page of one run, one page of several, in a browser if there is one."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from configs import quickstart
from hexa_jax.cli import app
from hexa_jax.data.decode import BadImage
from hexa_jax.report import charts, images, words
from hexa_jax.report.__main__ import main
from hexa_jax.report.page import Pictured, SampleImages, write_report
from hexa_jax.report.record import read_record, write_facts
from hexa_jax.report.style import CSS
from hexa_jax.views.preview import ViewPreview

RNG = np.random.default_rng(0)
COUNT = 60  # images of the sample


class Source:
    """Plain colored images, of which number 3 is damaged."""

    num_classes, class_names = 4, None

    def __len__(self):
        return 80

    def __getitem__(self, index):
        if index == 3:
            raise BadImage(self.name(index), "damaged")
        return {"image": np.full((20, 24, 3), (3 * index, 90, 200 - index), np.uint8)}

    def name(self, index):
        return f"/photos/<b>camera & co</b>/{index:03}.jpg"


def write_run(folder, gain=8.0, finished=True, **settings):
    """The files of a run whose accuracy grows by `gain` points an epoch."""
    config = quickstart.get_config("epochs=6")
    config.update_from_flattened_dict(settings)
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    lines = [{"step": 0, "knn_accuracy": 25.0}]
    for epoch in range(7 if finished else 3):
        lines.append(
            {
                "step": 10 * epoch,
                "epoch": epoch,
                "rankme": 10 + 5 * epoch,
                "rankme_embedding": 9 + epoch,
                "alignment": 1 / (1 + epoch),
                "uniformity": -epoch / 2,
                "neighbor_agreement": 0.2 + epoch / 20,
                "cluster_evenness": 0.8,
            }
            | ({"cluster_stability": 0.1 * epoch, "knn_accuracy": 25 + gain * epoch} if epoch else {})
        )
        if epoch:
            loss = {"loss": 3 / epoch, "loss_clean": 2 / epoch, "loss_adversarial": 3 / epoch}
            lines.append({"step": 10 * epoch, **loss, "embedding_std": 0.7, "input_wait": 0.01})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    changed = {"batch_size": [128, 64], "runtime.workers": [0, 2]}
    command = {"argv": ["hexa", "a b"], "recipe": "configs/quickstart.py", "changed": changed}
    (folder / "command.json").write_text(json.dumps(command))
    facts = {"device": "1 x cpu", "images": 80, "classes": 4, "test_images": 400, "steps_per_epoch": 10}
    write_facts(folder / "report", 1e9, facts | {"rank_limit": 60, "unreadable": [Source().name(3)]})
    if finished:
        results = {"epochs": 6, "knn_accuracy": 25 + 6 * gain, "random_knn_accuracy": 25.0}
        (folder / "result.json").write_text(json.dumps(results | {"pixels_knn_accuracy": 30.0}))
    return config


def pictured():
    """Views of 16 rows in 2 microbatches, clusters of two heads, and a sample."""
    clean = RNG.random((2, 8, 2, 16, 16, 3))
    adversarial = np.clip(clean + RNG.choice([-1, 1], clean.shape) / 255, 0, 1)
    outputs = {name: RNG.normal(size=(2, 8, 2, 5)) for name in ("clean", "unattacked", "adversarial")}
    views = ViewPreview(
        images={"clean": (clean,), "adversarial": (adversarial,), "cutmix": (clean[:, ::-1],)},
        mask=(),
        lam={"cutmix": np.full((2, 8, 2), 0.63)},
        row=None,
        partner=None,
        index=None,
        outputs=outputs,
        y=None,
    )
    sample = SampleImages(
        indices=np.arange(COUNT),
        images=RNG.integers(0, 255, (COUNT, 16, 16, 3), np.uint8),
        features=RNG.normal(size=(COUNT, 7)),
        neighbors=np.arange(COUNT)[:, None] - np.arange(1, 4),
        similarity=np.full((COUNT, 3), 0.91),
        clusters=np.arange(COUNT) % 3,
    )
    return Pictured(views, Source(), np.arange(80)[None].repeat(2, 0) % 5, sample)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a finished run with its page."""
    folder = tmp_path_factory.mktemp("runs") / "a <run>"
    write_report(folder, write_run(folder), pictured())
    return folder


@pytest.fixture(scope="module")
def page(run):
    return (run / "report" / "index.html").read_text()


class Checker(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its elements close in order."""

    VOID = ("meta", "link", "img", "input", "br", "hr", "line", "circle", "polyline")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.fetched = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.images += [found] if tag == "img" else []
        self.fetched += [found[name] for name in ("src", "href") if name in found]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_html(text):
    """Well-formed, self-contained, every link has its target and every image its words."""
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link[1:] in checker.ids for link in checker.links)
    assert all(image["alt"] for image in checker.images)
    assert all(address.startswith(("data:", "#")) for address in checker.fetched)
    assert 'name="viewport"' in text and "http" not in re.sub(r"data:[^\"]*", "", text)
    return checker


def test_a_page_has_everything_inside(page):
    checker = check_html(page)
    sections = {
        "health", "scores", "curves", "hard-examples", "clusters", "map", "neighbors", "data", "settings", "next",
    }  # fmt: skip
    assert sections <= set(checker.ids)
    # 6 examples of 4 columns, 5 clusters of 12 images (one is damaged in one of them), the map, 8 queries with 3 neighbors.
    assert 24 + 59 <= len(checker.images) <= 24 + 60 + 1 + 32
    assert "<b>camera" not in page and "camera &amp; co" in page  # names of files are no HTML
    assert "a &lt;run&gt;" in page


def test_a_page_says_what_was_run_and_how_it_goes(page):
    text = re.sub(r"<[^>]+>", " ", page)
    assert "epoch 6 of 6, finished" in text
    assert "kNN 73.0 ± 4.4 % on 400 images against 25.0 % with random weights" in text
    assert "Effective rank 40 of 60, still rising." in text
    assert "difference × 40" in text and "at most 1.00 of 255" in text and "63 % this image" in text
    assert "Adversarial views have 50 % more loss than clean ones." in text
    settings = text[text.index("Settings that differ from the recipe") :]
    assert settings.index("batch_size") < settings.index("All settings") < settings.index("augment.blur")
    assert "runtime.workers" not in settings[: settings.index("All settings")]


def test_a_page_of_a_run_on_its_way(tmp_path):
    config = write_run(tmp_path / "run", finished=False)
    shown = Pictured(None, Source(), None, None)
    text = write_report(tmp_path / "run", config, shown).read_text()
    check_html(text)
    assert "epoch 2 of 6, running or stopped" in text and "<progress" in text
    assert 'id="hard-examples"' not in text and 'id="clusters"' not in text
    assert [path.name for path in (tmp_path / "run/report").iterdir() if "tmp" in path.name] == []


def record_of(tmp_path, **values):
    """A run with the given curves, one value an epoch."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    write_run(folder)
    lines = [{"step": 10 * epoch, name: value} for name, curve in values.items() for epoch, value in enumerate(curve)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").unlink()
    return read_record(folder)


@pytest.mark.parametrize(
    "curves, status, said",
    [
        ({"embedding_std": [0.5, 0.01]}, words.BAD, "Embeddings have collapsed"),
        ({"rankme": [30, 20, 1.4]}, words.BAD, "The network has collapsed."),
        ({"rankme": [10, 40, 20]}, words.WATCH, "fell to 20 of 60 from 40"),
        ({"rankme": [10, 20, 30, 40]}, words.GOOD, "Effective rank 40 of 60, still rising."),
        ({"knn_accuracy": [25, 26]}, words.WATCH, "no evidence of learning yet"),
        ({"knn_accuracy": [25, 60]}, words.GOOD, "kNN 60.0 ± 4.8 % on 400 images against 25.0 %"),
        ({"rankme": [1, 9, 9, 9], "input_wait": [0, 0.6]}, words.WATCH, "60 % of the time goes into waiting"),
        ({"neighbor_agreement": [0.3, 0.3]}, words.WATCH, "no more than at the start (30 %)"),
        ({"rankme": [30]}, words.PLAIN, "Effective rank 30 of 60."),
    ],
)
def test_verdicts(tmp_path, curves, status, said):
    found = words.verdict(record_of(tmp_path, **curves))
    assert found.status == status and said in found.words


def test_trends():
    def of(*values):
        return words.trend(list(enumerate(values)))

    assert [of(1, 2), of(1, 2, 3), of(3, 2, 1), of(1, 5, 5.01)] == ["", "rising", "falling", "level"]


def test_intervals_are_binomial():
    assert words.interval(50, 400) == pytest.approx(100 * 1.96 * np.sqrt(0.25 / 400))
    assert words.interval(0, 400) > 0 and words.interval(50, None) == 0


def test_axes_have_round_ticks():
    assert charts.ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert charts.ticks(0.013, 0.029) == pytest.approx([0.015, 0.02, 0.025])
    assert [charts.number(x) for x in (0, 0.01234, 0.5, 12.34, 123.4, 12345)] == [
        "0",
        "0.012",
        "0.50",
        "12.3",
        "123",
        "12,345",
    ]


def test_long_lines_are_thinned_but_end_where_they_end():
    points = [(float(x), float(x % 7)) for x in range(5001)]
    thinned = charts.thin(points)
    assert len(thinned) <= charts.POINTS and thinned[-1] == points[-1]
    assert np.mean([y for _, y in thinned]) == pytest.approx(3, abs=0.2)


def test_a_chart_survives_constant_and_infinite_values():
    drawn = charts.line_chart("x", [charts.Line("y", [(0, 1.0), (1, 1.0), (2, float("nan"))])])
    assert "nan" not in drawn.lower() and drawn.count("<circle") == 2
    assert charts.line_chart("x", [charts.Line("y", [])]) == ""
    assert charts.line_chart("x", [charts.Line("y", [(0, 3.0)])])


def luminance(color):
    """Of #rgb or #rrggbb, as WCAG defines it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", [0, 1])
def test_text_and_lines_stand_out_in_light_and_dark(mode):
    block = re.findall(r":root\{(.*?)\}", CSS, re.S)[mode]
    colors = dict(re.findall(r"--([a-z0-9-]+):(#[0-9a-f]+)", block))
    pairs = [(name, ground) for name in ("ink", "soft", "accent") for ground in ("card", "page")]
    pairs += [(status, f"{status}-bg") for status in ("good", "watch", "problem", "note")]
    pairs += [(status, "card") for status in ("good", "watch", "problem", "note")]
    pairs += [(f"s{number}", "card") for number in range(8)]
    for front, ground in pairs:
        low, high = sorted(luminance(colors[name]) for name in (front, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, ground)


def test_long_names_keep_both_ends():
    assert charts.fitting("hexa") == "hexa"
    assert charts.fitting("a-very-long-name-seed0") == "a-very-l…me-seed0"


def test_similar_images_are_neighbors_on_the_map():
    colors = np.repeat(np.eye(3, dtype=np.uint8) * 255, 8, axis=0)
    pictures = np.broadcast_to(colors[:, None, None], (24, 4, 4, 3)).astype(np.uint8)
    order = np.random.default_rng(1).permutation(24)
    canvas = images.image_map(pictures[order], np.repeat(np.eye(3) * 9, 8, axis=0)[order])
    pitch = images.MAP_THUMBNAIL + 2
    cells = canvas[images.MAP_THUMBNAIL // 2 :: pitch, images.MAP_THUMBNAIL // 2 :: pitch].astype(int)
    assert cells.shape == (4, 6, 3) and not (cells == 255).all(axis=-1).any()  # all 24, no hole
    same = [
        (cells[r, c] == cells[r + dr, c + dc]).all()
        for r in range(cells.shape[0] - 1)
        for c in range(cells.shape[1] - 1)
        for dr, dc in ((0, 1), (1, 0))
    ]
    assert np.mean(same) > 0.6  # at random: a third


# ---- Several runs ---------------------------------------------------------------------------------


def test_runs_side_by_side(run, tmp_path, capsys):
    other = tmp_path / "other"
    write_run(other, gain=1.0, finished=False, **{"views.epsilon": 4.0, "runtime.workers": 3})
    assert main([str(run), str(other), f"--output={tmp_path / 'page.html'}"]) == 0
    text = (tmp_path / "page.html").read_text()
    check_html(text)
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    differing = text[text.index('id="settings"') : text.index('id="scores"')]
    assert re.findall(r"<code>(views\.[a-z]+)</code>", differing) == ["views.epsilon"]
    assert "runtime.workers" not in differing
    loss = json.loads(html.unescape(re.search(r'data-chart="([^"]+)"', text)[1]))
    assert [line["label"] for line in loss["lines"]] == ["a <run>", "other"]


def test_one_run_is_its_own_page(run, capsys):
    assert app.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")


def test_names_that_are_the_same_get_their_parents(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name / "run", finished=False)
    assert main([str(tmp_path / "a/run"), str(tmp_path / "b/run"), f"--output={tmp_path / 'page.html'}"]) == 0
    assert "a/run, b/run" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "the following arguments are required: workdirs"),
        (["nowhere"], "nowhere is not the workdir of a pre-training run"),
        (["RUN", "RUN"], "is named twice"),
        (["RUN", "--output=/nowhere/page.html"], "No such file"),
        (["RUN"] * 9, "9 runs are more than the 8"),
    ],
)
def test_mistakes_are_one_line(arguments, said, run, capsys):
    assert main([str(run) if word == "RUN" else word for word in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hexa_jax.report: ") and said in line


# ---- In a browser ---------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Loads the page in a frame of a given width and writes what it measures into the title.
PROBE = """<!doctype html><title>waiting</title><iframe id=f style="width:{width}px;height:900px;border:0"></iframe><script>
const f=document.getElementById('f');f.onload=()=>{{const d=f.contentDocument,w=f.contentWindow,r=d.documentElement;
const wide=[...d.querySelectorAll('body *')].filter(e=>!e.closest('.scroll,.zoom')&&e.getBoundingClientRect().right>{width}+1);
const broken=[...d.images].filter(i=>{{i.loading='eager';return !i.complete||!i.naturalWidth}});
const svg=d.querySelector('.chart svg'),b=svg.getBoundingClientRect();
svg.dispatchEvent(new w.PointerEvent('pointermove',{{clientX:b.left+b.width*.7,clientY:b.top+9}}));
document.title=JSON.stringify({{scroll:r.scrollWidth,wide:wide.map(e=>e.tagName+'.'+e.className),
tip:(d.querySelector('.tip')||{{}}).textContent||'',images:d.images.length}})}};f.srcdoc={page};</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["one run", "two runs"])
def test_in_a_browser_nothing_is_wider_than_the_window(page, run, tmp_path, width, which):
    if which == "two runs":
        write_run(tmp_path / "another run with a longer name", finished=False, **{"views.epsilon": 4.0})
        both = [str(run), str(tmp_path / "another run with a longer name")]
        assert main([*both, f"--output={tmp_path / 'page.html'}"]) == 0
        page = (tmp_path / "page.html").read_text()
    probe = tmp_path / "probe.html"
    source = json.dumps(page).replace("</", "<\\/")
    probe.write_text(PROBE.format(width=width, page=source))
    words_ = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    words_ += ["--window-size=1400,1000", "--virtual-time-budget=8000", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(words_, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))
    assert found["scroll"] <= width and found["wide"] == []
    assert found["tip"].startswith("epoch ") and ": " in found["tip"]
    assert (found["images"] > 70) == (which == "one run")
