"""Detection as a task: from weights of every kind, with parts frozen, stopped and resumed, on any number of devices; mistakes."""

import contextlib
import json
import re
import shutil
import signal

import cv2
import jax
import numpy as np
import pytest
from command_line import evaluation_words, final_state, lines, result
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import small_config
from test_detection_data import annotation, thing

from hexa_jax import export, main
from hexa_jax.checkpoint.checkpointer import MANIFEST, Checkpoints
from hexa_jax.detection import task
from hexa_jax.evals.tasks import training_loop
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import EVALUATION
from hexa_jax.models.resnet import make_resnet

CLASSES = ("blue", "green", "red")  # the channel that a rectangle has most of
TRAIN, TEST, BATCH, EPOCHS = 12, 5, 4, 3
STEPS = TRAIN // BATCH * EPOCHS
MEAN, STD = (0.2, 0.25, 0.3), (0.25, 0.24, 0.23)  # of the pre-training, unlike ImageNet's

SETTINGS = {
    "data.canvases": "((64,96),)", "data.short_sides": "(56,64)", "data.eval_short_side": 64, "data.long_limit": 96,
    "data.max_boxes": 3, "batch_size": BATCH, "epochs": EPOCHS, "eval_every_epochs": 2, "model.dim": 16,
    "model.hidden": 32, "model.anchor_sizes": "(8.0,16.0,32.0,64.0,128.0)", "model.train_proposals": "(40,30)",
    "model.test_proposals": "(40,30)", "model.regions": 16, "model.frozen_stages": 2,
    "model.batch_norm": "synchronised", "optimizer.learning_rate": 0.02, "optimizer.warmup_steps": 2,
    "optimizer.milestones": "(12,)", "runtime.num_devices": 1, "runtime.batch_size": 4, "runtime.log_every": 1,
}  # fmt: skip


# ---- Miniatures --------------------------------------------------------------------------------------------------------


def split(root, name, count, seed, portraits=()):
    """Images of 64 to 96 x 96 to 128 pixels, those of `portraits` standing: one or two coloured rectangles on noise."""
    rng = np.random.default_rng(seed)
    for part in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / part).mkdir(parents=True, exist_ok=True)
    names = [f"{name}{number:02d}" for number in range(count)]
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{line}\n" for line in names))
    for number, stem in enumerate(names):
        height, width = int(rng.integers(64, 97)), int(rng.integers(96, 129))
        if number in portraits:
            height, width = width, height
        pixels, things = rng.integers(0, 90, (height, width, 3), np.uint8), []
        for _ in range(1 + number % 2):
            (w, h), label = rng.integers(20, 50, 2).tolist(), int(rng.integers(3))
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            colour = np.full(3, 30)
            colour[label] = 230
            pixels[y : y + h, x : x + w] = colour
            things.append(thing(CLASSES[label], (x + 1, y + 1, x + w, y + h)))
        assert cv2.imwrite(str(root / "JPEGImages" / f"{stem}.png"), pixels)
        (root / "Annotations" / f"{stem}.xml").write_text(annotation((height, width), *things))


@pytest.fixture(scope="module")
def devkit(tmp_path_factory):
    root = tmp_path_factory.mktemp("devkit")
    split(root, "train", TRAIN, 0, portraits=(3,))
    split(root, "test", TEST, 1)
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The workdir of a pre-training run, as it leaves it, with a head, and drawn weights and statistics."""
    workdir = tmp_path_factory.mktemp("pretraining") / "run"
    config = small_config("moco", **{"model.backbone": "resnet10", "model.stem": "imagenet", "model.base_channels": 8})
    config.data.pixel_mean, config.data.pixel_std = MEAN, STD
    resnet = make_resnet("resnet10", 8)
    network = Network(resnet, None, MEAN, STD)
    crops = (np.zeros((1, 1, 32, 32, 3), np.float32),)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION))
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        name = path[-1].key
        if name == "kernel":
            value = rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
        else:
            value = rng.uniform(0.5, 1.5, leaf.shape) if name in ("scale", "var") else rng.normal(0, 0.1, leaf.shape)
        return value.astype(np.float32)

    tree = jax.tree_util.tree_map_with_path(drawn, dict(shapes))
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    with contextlib.closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        checkpoints.save(7, {"params": {"network": tree.pop("params")}, "batch_stats": tree, "step": np.int32(7)})
    return workdir


@pytest.fixture(scope="module")
def weights(pretrained):
    """The same backbone as a weights file."""
    path = pretrained.parent / "weights.safetensors"
    assert export.main([f"--checkpoint={pretrained}", "--format=torchvision", f"--output={path}"]) == 0
    return path


@pytest.fixture(scope="module", autouse=True)
def programs():
    """One jitted step and one jitted detector for all runs that have the same: they are traced and compiled once."""
    makers = {name: getattr(task, name) for name in ("make_step", "make_detect", "make_base_optimizer")}
    known, recipes = {}, []

    def optimizer(config, steps_per_epoch):
        recipes.append((config.optimizer.to_json(), steps_per_epoch, config.steps > 0))
        return makers["make_base_optimizer"](config, steps_per_epoch)

    def step(model, optimizer, frozen, mesh, batch_size):
        key = recipes[-1], model, frozen, mesh, batch_size
        known[key] = known.get(key) or makers["make_step"](model, optimizer, frozen, mesh, batch_size)
        return known[key]

    def detect(model, mesh):
        known[model, mesh] = known.get((model, mesh)) or makers["make_detect"](model, mesh)
        return known[model, mesh]

    with pytest.MonkeyPatch.context() as patch:
        for name, maker in (("make_step", step), ("make_detect", detect), ("make_base_optimizer", optimizer)):
            patch.setattr(task, name, maker)
        yield


def words(workdir, devkit, recipe="paper", **settings):
    """Command line words; settings by dotted key."""
    sources = {
        f"data.{name}": f"voc:{devkit}:{split}" for name, split in (("source", "train"), ("eval_source", "test"))
    }
    settings = SETTINGS | sources | settings
    return ["hexa", *evaluation_words(f"detection_voc.py:recipe={recipe}", workdir, **settings)]


def precisions(workdir):
    return {name: value for name, value in result(workdir).items() if "AP" in name}


def detector(workdir):
    return load_file(workdir / "detector.safetensors")


def losses(workdir):
    return [line["loss"] for line in lines(workdir) if "loss" in line]


def assert_same(got, wanted):
    assert got.keys() == wanted.keys() and len(got) > 20
    for name, value in got.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)


def assert_same_run(workdir, expected):
    """Bitwise the same last state, and the same numbers along the way and at the end."""
    (step, state), (wanted_step, wanted) = final_state(workdir), final_state(expected)
    assert step == wanted_step == STEPS
    assert_same(state, wanted)
    assert losses(workdir) == losses(expected) and result(workdir) == result(expected)
    assert_same(detector(workdir), detector(expected))


# ---- A run -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(devkit, weights, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("detection") / "run"
    assert main.main(words(workdir, devkit, checkpoint=weights)) == 0
    return workdir


def test_a_run_leaves_what_it_should(run):
    values = result(run)
    assert (values["steps"], values["train_images"], values["test_images"]) == (STEPS, TRAIN, TEST)
    assert {"AP", "AP50", "AP75", "VOC_AP50", "VOC07_AP50", "AP_red", "VOC_AP50_green"} <= values.keys()
    logged = [line for line in lines(run) if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    for line in logged:
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert len(parts) == 4 and min(parts) > 0 and sum(parts) == pytest.approx(line["loss"], rel=1e-5)
    assert np.mean(losses(run)[-3:]) < 0.9 * np.mean(losses(run)[:3])
    (tested,) = [line for line in lines(run) if "AP" in line]
    assert tested["epoch"] == 2 and {"AP50", "AP75"} <= tested.keys()
    image = cv2.imread(str(run / "report" / "detections.png"))
    assert image.shape[0] > 300 and image.std() > 10
    assert (run / "report" / "curves.png").stat().st_size > 1000
    with safe_open(run / "detector.safetensors", "numpy") as file:
        about = {name: json.loads(value) for name, value in file.metadata().items()}
    assert about == {"classes": list(CLASSES), "mean": list(MEAN), "std": list(STD)}


def test_frozen_stages_stay_and_the_others_do_not(run, weights):
    """Stem and first stage of five: weights, scales, biases, running statistics."""
    before, after = load_file(weights), detector(run)
    frozen = [name for name in before if re.match(r"conv1|bn1|layer1", name) and "num_batches" not in name]
    trained = [name for name in before if re.match(r"layer[234]", name) and "num_batches" not in name]
    assert len(frozen) > 10 and len(trained) > 30
    for name in frozen:
        np.testing.assert_array_equal(after[f"backbone.body.{name}"], before[name], err_msg=name)
    for name in trained:
        assert (after[f"backbone.body.{name}"] != before[name]).any(), name


def test_everything_else_is_trained(run, tmp_path):
    """Between the last two checkpoints."""
    shutil.copytree(run, tmp_path / "part")
    shutil.rmtree(max((tmp_path / "part" / "checkpoints").iterdir()))
    (before_step, before), (step, after) = final_state(tmp_path / "part"), final_state(run)
    assert (before_step, step) == (STEPS - TRAIN // BATCH, STEPS)
    heads = [name for name in before if re.search(r"params.*(fpn|rpn|box)", name)]
    assert len(heads) == 2 * (8 + 3 + 4)
    for name in heads:
        assert (before[name] != after[name]).any(), name


def test_a_workdir_and_its_weights_file_begin_the_same_run(run, devkit, pretrained, tmp_path):
    assert main.main(words(tmp_path / "run", devkit, checkpoint=pretrained)) == 0
    assert_same_run(tmp_path / "run", run)


@pytest.fixture(scope="module")
def longer(run, devkit, tmp_path_factory):
    """Training that goes on from the detector of the first run, until it finds something."""
    workdir = tmp_path_factory.mktemp("longer") / "run"
    assert main.main(words(workdir, devkit, detector=run / "detector.safetensors", epochs=10, eval_every_epochs=0)) == 0
    return workdir


def test_training_goes_on_from_a_detector_file(run, longer):
    assert losses(longer)[0] < 0.9 * losses(run)[0] and np.mean(losses(longer)[-3:]) < 0.7 * losses(longer)[0]
    before, after = detector(run), detector(longer)
    same = {name for name in before if (before[name] == after[name]).all()}
    assert len(same) > 10 and all(re.match(r"backbone\.body\.(conv1|bn1|layer1)", name) for name in same)
    assert result(longer)["AP50"] > result(run)["AP50"]


def test_a_detector_file_is_tested_as_in_its_run(longer, devkit, tmp_path, capsys):
    file = longer / "detector.safetensors"
    assert main.main(words(tmp_path / "run", devkit, detector=file, epochs=0)) == 0
    assert precisions(tmp_path / "run") == precisions(longer) and precisions(longer)["AP"] > 0
    assert result(tmp_path / "run")["steps"] == 0 and "train_images" not in result(tmp_path / "run")
    assert_same(detector(tmp_path / "run"), detector(longer))
    assert not (tmp_path / "run" / "checkpoints").exists() and "step 1/" not in capsys.readouterr().out


# ---- Stopped and resumed -----------------------------------------------------------------------------------------------


def test_a_cut_off_changes_nothing(run, devkit, weights, tmp_path):
    """As after a kill in the last epoch: the newest checkpoint is of the one before, and metrics go on beyond it."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    for name in ("result.json", "detector.safetensors"):
        (part / name).unlink()
    newest = max((part / "checkpoints").iterdir())
    shutil.rmtree(newest)
    assert main.main(words(part, devkit, checkpoint=weights)) == 0
    assert newest.is_dir() and len(lines(part)) == len(lines(run))
    assert_same_run(part, run)


def test_a_signal_saves_and_changes_nothing(run, devkit, weights, tmp_path, monkeypatch, capsys):
    """In the middle of an epoch, where no checkpoint is due."""
    log, command = training_loop.log, words(tmp_path / "run", devkit, checkpoint=weights)

    def terminated(text):
        log(text)
        if text.startswith(f"step 5/{STEPS} "):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training_loop, "log", terminated)
    assert main.main(command) == 143
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("hexa_jax: SIGTERM: saved step 5 in ") and "step 6/" not in captured.out
    assert final_state(tmp_path / "run")[0] == 5 and not (tmp_path / "run" / "result.json").exists()
    monkeypatch.setattr(training_loop, "log", log)
    assert main.main(command) == 0
    assert f"step 6/{STEPS} " in (said := capsys.readouterr().out) and f"step 5/{STEPS} " not in said
    assert_same_run(tmp_path / "run", run)


def test_a_finished_run_is_not_trained_again(run, devkit, weights, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    (part / "result.json").unlink()
    assert main.main(words(part, devkit, checkpoint=weights)) == 0
    assert "loss" not in capsys.readouterr().out
    assert_same_run(part, run)


# ---- Devices -----------------------------------------------------------------------------------------------------------

FROZEN = {"model.frozen_stages": 1, "model.batch_norm": "frozen"}
TRAINED = {"model.frozen_stages": 0, "model.pyramid_norm": True, "model.head_norm": True}


@pytest.mark.slow  # two programs in float64, each for 1 and for 4 devices
@pytest.mark.parametrize("settings", [FROZEN, TRAINED], ids=["frozen", "synchronised"])
def test_devices_change_nothing(settings, devkit, weights, tmp_path):
    settings = settings | {"checkpoint": weights, "steps": 3, "eval_every_epochs": 0, "precision": "float64"}
    try:
        for devices in (1, 4):
            command = words(tmp_path / f"{devices}", devkit, **settings | {"runtime.num_devices": devices})
            assert main.main(command) == 0
    finally:
        jax.config.update("jax_enable_x64", False)
    (_, one), (_, four) = (final_state(tmp_path / f"{devices}") for devices in (1, 4))
    start = load_file(weights)["layer4.0.conv1.weight"]
    for name, value in one.items():
        assert value.dtype == four[name].dtype and value.dtype != np.float32
        np.testing.assert_allclose(four[name], value, rtol=0, atol=1e-9, err_msg=name)
    for number, loss in enumerate(losses(tmp_path / "1")):
        assert losses(tmp_path / "4")[number] == pytest.approx(loss, abs=1e-9)
    moved = np.abs(detector(tmp_path / "1")["backbone.body.layer4.0.conv1.weight"] - start).max()
    assert moved > 1e-6
    assert result(tmp_path / "1") == result(tmp_path / "4")


@pytest.mark.slow  # a program of its own
def test_from_random_weights(devkit, tmp_path):
    """The recipe for it: everything is trained, with BatchNorm everywhere."""
    settings = {"checkpoint": "random", "random.backbone": "resnet10", "random.base_channels": 8, "steps": 3}
    settings |= {"model.frozen_stages": 0, "model.pyramid_norm": True, "model.head_norm": True}
    assert main.main(words(tmp_path / "run", devkit, recipe="scratch", **settings)) == 0
    assert len(losses(tmp_path / "run")) == 3 and np.isfinite(losses(tmp_path / "run")).all()
    assert any("box_head.bn6" in name for name in detector(tmp_path / "run"))


# ---- Mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(run, devkit, weights, tmp_path, capsys):
    missing, swapped, other = (tmp_path / name for name in ("missing", "swapped", "other"))
    for folder in (missing, swapped):
        shutil.copytree(devkit, folder)
    (missing / "JPEGImages" / "train07.png").unlink()
    annotated = swapped / "Annotations" / "test02.xml"
    annotated.write_text(annotation((70, 100), thing("red", (50, 8, 20, 30))))
    split(other, "train", 4, 0)
    split(other, "test", 4, 1)
    for path in other.glob("Annotations/*.xml"):
        path.write_text(re.sub("red|green|blue", "yellow", path.read_text()))
    nameless = tmp_path / "nameless.safetensors"  # as torchvision's: without names of classes
    arrays = detector(run)
    save_file(arrays, nameless)
    random = {"checkpoint": "random", "random.backbone": "resnet10", "random.base_channels": 8}
    file = {"detector": run / "detector.safetensors", "epochs": 0}
    cases = {
        f"{nameless} knows 3 classes, the data has 1": file | {"detector": nameless, "devkit": other},
        "no box of a known class: they have yellow, known are blue, green, red": file | {"devkit": other},
        "leave config.checkpoint empty": file | {"checkpoint": weights},
        f"{weights} is no Faster R-CNN": {"detector": weights},
        "the weights are of another detector": file | {"model.hidden": 31},
        "there is no config.detector to test": {"checkpoint": weights, "epochs": 0},
        "config.checkpoint is missing": {},
        "which only the imagenet stem gives": random | {"random.stem": "cifar"},
        "random weights have no running statistics": random | {"model.batch_norm": "frozen"},
        "multiples of 32, not [(64, 100)]": {"checkpoint": weights, "data.canvases": "((64,96),(64,100))"},
        "no pair of data.canvases holds images of 64 x 96": {"checkpoint": weights, "data.canvases": "((32,96),)"},
        "recipe=paperr is not known: use paper, detectron2 or scratch": {"recipe": "paperr"},
        f"batch_size=13 must be 1 to {TRAIN}": {"checkpoint": weights, "batch_size": 13},
        "batch_size=4 is not divisible by 3 devices": {"checkpoint": weights, "runtime.num_devices": 3},
        f"{missing}/JPEGImages/train07.jpg is missing, and": {"checkpoint": weights, "devkit": missing},
        f"{annotated}: the corners 50, 8 and 20, 30": {"checkpoint": weights, "devkit": swapped},
        "data.eval_source is empty": {"checkpoint": weights, "data.eval_source": ""},
        "model.batch_norm='none' is not known": {"checkpoint": weights, "model.batch_norm": "none"},
        "model.frozen_stages=6 must be 0": {"checkpoint": weights, "model.frozen_stages": 6},
    }
    for number, (message, settings) in enumerate(cases.items()):
        workdir = tmp_path / f"run{number}"
        code = main.main(words(workdir, settings.pop("devkit", devkit), **settings))
        (line,) = capsys.readouterr().err.splitlines()
        assert code == 2 and line.startswith("hexa_jax: ") and message in line, line
        assert not (workdir / "config.json").exists(), message  # the corrected command may use the folder


def test_checkpoints_are_whole(run):
    """What the tests above copy and compare."""
    folders = sorted((run / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step_{step:08}" for step in (STEPS - 3, STEPS)]
    assert all((folder / MANIFEST).exists() for folder in folders)
