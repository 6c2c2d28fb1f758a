"""Fine-tuning as a task: each learning rate, resumed, any number of devices; labelled examples by list; the Adamax probe."""

import atexit
import functools
import json
import shutil
import signal
import tempfile

import numpy as np
import pytest
from command_line import check_refused, evaluation_words, final_state, image_folder, lines, result
from ml_collections import ConfigDict
from sklearn.linear_model import LogisticRegression

from configs.eval import common, finetune_cifar
from hexa_jax import main
from hexa_jax.checkpoint.checkpointer import MANIFEST
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.decode import resize_center_crop
from hexa_jax.data.shapes import CLASS_NAMES, make_shapes
from hexa_jax.data.sources import ArraySource, DataError, FolderSource
from hexa_jax.evals.backbone import Backbone
from hexa_jax.evals.tasks import finetune, training_loop
from hexa_jax.evals.tasks.labelled import Features, check_classes, listed, open_both, open_split, top_k, usable
from hexa_jax.evals.tasks.linear_features import adamax_probe

# ---- The Adamax probe --------------------------------------------------------------------------------------------------


def adamax(train, labels, classes, rate, epochs, batch, seed, milestones=(), decay=1.0, beta2=0.999, reshuffle=True):
    """Kingma and Ba's Algorithm 2 with torch's eps, on a softmax classifier, float64: (kernel, bias) after each epoch."""
    w, m, u = (np.zeros((train.shape[1] + 1, classes)) for _ in range(3))
    x = np.concatenate([np.float64(train), np.ones((len(train), 1))], axis=1)  # the last row of w is the bias
    rng, step, history = np.random.default_rng(seed), 0, []
    order = rng.permutation(len(x))
    for epoch in range(epochs):
        rate = rate * decay if epoch in milestones else rate
        for first in range(0, len(x) - batch + 1, batch):
            rows = order[first : first + batch]
            p = np.exp(x[rows] @ w)
            p /= p.sum(axis=1, keepdims=True)
            p[np.arange(batch), labels[rows]] -= 1
            gradient = x[rows].T @ p / batch
            step += 1
            m = 0.9 * m + 0.1 * gradient
            u = np.maximum(beta2 * u, np.abs(gradient) + 1e-8)
            w = w - rate / (1 - 0.9**step) * m / u
        history.append((w[:-1], w[-1]))
        order = rng.permutation(len(x)) if reshuffle else order
    return history


def decided(kernel, bias, queries):
    """Classes, and where they do not hang on the fourth digit of the logits."""
    logits = queries @ kernel + bias
    second, first = np.sort(logits, axis=1)[:, -2:].T
    return np.argmax(logits, axis=1), first - second > 1e-4 * np.abs(logits).max()


def blobs(num, spread=1.0, seed=0, classes=4, dim=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, num)
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return (centres[labels] + spread * rng.normal(size=(num, dim))).astype(np.float32), labels


QUERIES = np.random.default_rng(5).normal(size=(20_000, 3)).astype(np.float32)  # dense: boundaries that move cross some


def probe(train, labels, test=QUERIES, **changes):
    settings = {
        "classes": 4,
        "learning_rates": (0.2, 0.03),
        "epochs": 2,
        "batch_size": 5,
        "milestones": (),
        "decay": 1.0,
    }
    return adamax_probe(train, labels, test, **settings | {"seed": 3} | changes)


@pytest.mark.parametrize("milestones", [(), (1,)])
def test_probe_is_adamax(milestones):
    """23 examples in batches of 5: three of them sit out each epoch."""
    train, labels = blobs(23)
    got = probe(train, labels, milestones=milestones, decay=0.1)
    assert got.shape == (2, 2, len(QUERIES))
    for number, rate in enumerate((0.2, 0.03)):
        history = adamax(train, labels, 4, rate, 2, 5, 3, milestones, 0.1)
        for epoch, weights in enumerate(history):
            expected, sure = decided(*weights, QUERIES)
            assert sure.mean() > 0.99 and len(set(expected)) == 4
            np.testing.assert_array_equal(got[epoch, number][sure], expected[sure])


def test_probe_is_nothing_else():
    """The comparison above finds another order, milestone, rate, second moment or batch size."""
    train, labels = blobs(23)
    got = probe(train, labels)[-1, 0]
    others = {
        "order": adamax(train, labels, 4, 0.2, 2, 5, 3, reshuffle=False),
        "seed": adamax(train, labels, 4, 0.2, 2, 5, 4),
        "milestone": adamax(train, labels, 4, 0.2, 2, 5, 3, (1,), 0.1),
        "rate": adamax(train, labels, 4, 0.202, 2, 5, 3),
        "beta2": adamax(train, labels, 4, 0.2, 2, 5, 3, beta2=0.99),
        "batch": adamax(train, labels, 4, 0.2, 2, 4, 3),
    }
    for name, history in others.items():
        expected, sure = decided(*history[-1], QUERIES)
        assert (got != expected)[sure].any(), name


def test_milestones_count_from_zero_and_add_up():
    train, labels = blobs(23)
    got = probe(train, labels, epochs=4, milestones=(1, 3), decay=0.2)
    for epoch, weights in enumerate(adamax(train, labels, 4, 0.2, 4, 5, 3, (1, 3), 0.2)):
        expected, sure = decided(*weights, QUERIES)
        np.testing.assert_array_equal(got[epoch, 0][sure], expected[sure])
    frozen = probe(train, labels, epochs=3, milestones=(1,), decay=0.0)
    np.testing.assert_array_equal(frozen[0], frozen[2])
    assert (frozen[0] == probe(train, labels)[0]).all() and (frozen[0] != probe(train, labels)[1]).any()


def test_a_batch_larger_than_the_data_is_all_of_it():
    train, labels = blobs(23)
    expected, sure = decided(*adamax(train, labels, 4, 0.2, 2, 23, 3)[-1], QUERIES)
    np.testing.assert_array_equal(probe(train, labels, batch_size=100)[-1, 0][sure], expected[sure])


def test_probe_agrees_with_logistic_regression():
    (train, labels), (test, wanted) = blobs(200, 0.1), blobs(300, 0.1, seed=1)
    expected = LogisticRegression(C=100.0).fit(train, labels).predict(test)
    got = probe(train, labels, test, learning_rates=(0.1,), epochs=20, batch_size=20)
    np.testing.assert_array_equal(got[-1, 0], expected)
    np.testing.assert_array_equal(expected, wanted)  # separable
    # Classes that overlap have one best classifier.
    train, labels = blobs(200)
    best = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(train, labels).predict(QUERIES)
    got = probe(train, labels, learning_rates=(0.5,), epochs=300, batch_size=200)
    assert (got[-1, 0] == best).mean() > 0.999 and (got[0, 0] == best).mean() < 0.95


# ---- Labelled examples -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """bar/001.png bar/004.jpg cross/002.jpg cross/005.png disc/000.jpg disc/003.png, in this order."""
    image_folder(tmp_path / "images", count=6)
    return FolderSource(str(tmp_path / "images"))


def written(path, *names):
    path.write_text("".join(f"{name}\n" for name in names))
    return str(path)


@pytest.mark.parametrize("part", ["path", "dir/name", "name", "stem"])
def test_examples_by_list(tmp_path, folder, part):
    """In the order of the list; an example may come twice."""
    names = {
        "path": [
            f"{tmp_path}/images/disc/003.png",
            f"{tmp_path}/images/bar/001.png",
            f"{tmp_path}/images/disc/000.jpg",
        ],
        "dir/name": ["disc/003.png", "bar/001.png", "disc/000.jpg"],
        "name": ["003.png", "001.png", "000.jpg"],
        "stem": ["003", "001", "000"],
    }[part]
    chosen = listed(folder, written(tmp_path / "list.txt", *names, "", f" {names[0]} "))
    assert [chosen.name(index).rsplit("/", 1)[1] for index in range(4)] == ["003.png", "001.png", "000.jpg", "003.png"]
    assert chosen.labels().tolist() == [2, 0, 2, 2] and chosen.num_classes == 3
    assert [chosen[index] for index in range(3)] == [folder[5], folder[0], folder[4]]


def test_kinds_of_names_may_be_mixed(tmp_path, folder):
    chosen = listed(folder, written(tmp_path / "list.txt", "004", "cross/002.jpg", "005.png"))
    assert chosen.indices.tolist() == [1, 2, 3]


def test_mistakes_in_a_list(tmp_path, folder):
    cases = {
        "2 of 3 are not in the data, the first is bar/002.jpg": ("001", "bar/002.jpg", "009"),
        "1 of 1 are not in the data, the first is 001.jpg": ("001.jpg",),
        "lists nothing": ("", " "),
    }
    for message, names in cases.items():
        with pytest.raises(DataError) as caught:
            listed(folder, written(tmp_path / "list.txt", *names))
        assert message in str(caught.value) and "list.txt" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"data.list=.*gone.txt: No such file"):
        listed(folder, str(tmp_path / "gone.txt"))


def test_a_list_that_is_no_text(tmp_path, folder):
    (tmp_path / "list.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(DataError, match=r"list\.png"):
        listed(folder, str(tmp_path / "list.png"))


def arrays(num=20, classes=4, names=None):
    return ArraySource(np.zeros((num, 4, 4, 3), np.uint8), np.arange(num) % classes, names)


def test_classes_must_be_the_same():
    check_classes(arrays(), arrays(9))
    check_classes(arrays(names=list("abcd")), arrays())  # one has no names
    check_classes(arrays(names=list("abcd")), arrays(names=list("abcd")))
    with pytest.raises(DataError, match="3 classes to test on, 4 to train on"):
        check_classes(arrays(), arrays(classes=3))
    with pytest.raises(DataError, match=r"other names, such as d, e$"):
        check_classes(arrays(names=list("abcd")), arrays(names=list("abce")))
    with pytest.raises(DataError, match="other names"):
        check_classes(arrays(names=list("abcd")), arrays(names=list("abdc")))


def opened(name="source", run=None, labelled=True, **data):
    config = common.get_config("finetune")
    config.data.update(data)
    return open_split(config, Backbone(None, None, 0, run), name, labelled=labelled)


RUN = ConfigDict({
    "data": {"source": "shapes", "eval_source": "shapes:test", "shapes_count": 70, "shapes_size": 20},
    "runtime": {"data_dir": "", "data_cache": ""},
})  # fmt: skip


def test_sources_default_to_those_of_the_run():
    train, test = opened(run=RUN), opened("eval_source", run=RUN)
    assert train.name(0) == "shapes:train, index 0" and test.name(0) == "shapes:test, index 0"
    assert len(train) == 70 and train[0]["image"].shape == (20, 20, 3)
    assert opened(run=RUN, source="shapes:test").name(0) == "shapes:test, index 0"
    assert len(opened(source="shapes")) == 10_000
    for name in ("source", "eval_source"):
        with pytest.raises(ConfigError, match=f"data.{name} is empty"):
            opened(name)


def test_limit_and_list_are_for_training_alone(tmp_path, folder):
    short = opened(run=RUN, limit=7)
    assert [short.name(index) for index in range(7)] == [f"shapes:train, index {i}" for i in range(0, 70, 10)]
    assert len(opened("eval_source", run=RUN, limit=7)) == 70
    path = written(tmp_path / "list.txt", "005", "001", "000", "004")
    images = f"folder:{folder.directory}"
    assert opened(source=images, list=path).indices.tolist() == [3, 0, 4, 1]
    both = opened(source=images, list=path, limit=2)
    assert [both[index] for index in range(2)] == [folder[3], folder[4]]  # of the list
    assert len(opened("eval_source", eval_source=images, list=path)) == 6


def test_labels_are_needed(tmp_path):
    image_folder(tmp_path, by_class=False, count=3)
    with pytest.raises(DataError, match=r"has no labels, which config\.task=finetune needs"):
        opened(source=f"folder:{tmp_path}")
    assert len(opened(source=f"folder:{tmp_path}", labelled=False)) == 3


def test_both_splits_are_of_one_data_set(folder):
    config = common.get_config("finetune")
    config.data.source, config.data.eval_source = f"folder:{folder.directory}", "shapes:test"
    with pytest.raises(DataError, match="10 classes to test on, 3 to train on"):
        open_both(config, Backbone(None, None, 0, None))


# ---- Accuracy ----------------------------------------------------------------------------------------------------------


def test_top_one_and_five_by_hand():
    """Class 2 is 1st, 2nd, 5th and 6th in the first four rows, two do not count, and it ties with an earlier one in the last."""
    logits = np.float32([
        [0, 1, 9, 2, 3, 4, 5], [0, 1, 8, 9, 2, 3, 4], [0, 9, 5, 8, 7, 6, 1], [0, 9, 4, 8, 7, 6, 5],
        [0, 0, 9, 0, 0, 0, 0], [0, 0, 9, 0, 0, 0, 0], [3, 0, 3, 0, 0, 0, 0],
    ])  # fmt: skip
    labels, known = np.array([2, 2, 2, 2, -1, 2, 2]), np.array([1, 1, 1, 1, 1, 0, 1], bool)
    assert top_k(*usable(Features(logits, labels, known))) == {"top1": 20.0, "top5": 80.0}  # 1 and 4 of 5


def test_a_network_that_broke_is_never_right():
    """The last step's update can overflow after the last loss that was looked at."""
    for broken in (np.nan, np.inf, -np.inf):
        logits = np.full((8, 10), broken, np.float32)
        assert top_k(*usable(Features(logits, np.arange(8), np.full(8, True))))["top1"] < 50


# ---- The task ----------------------------------------------------------------------------------------------------------

RATES = (0.003, 0.03)


@functools.cache
def held_out():
    """300 of the shapes to test on, as a file."""
    folder = tempfile.mkdtemp(prefix="hexa_finetune_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    images, labels = make_shapes(300, split="test")
    np.savez(f"{folder}/test.npz", images=images, labels=labels, class_names=CLASS_NAMES)
    return f"arrays:{folder}/test.npz"


def words(workdir, **settings):
    settings = {
        "checkpoint": "random", "random.backbone": "resnet10", "random.stem": "cifar", "random.base_channels": 4,
        "data.source": "shapes:train", "data.eval_source": held_out(), "data.limit": 48, "data.resize": 8,
        "data.crop": 8, "batch_size": 16, "optimizer.learning_rates": str(RATES), "optimizer.milestones": "(1,)",
        "runtime.num_devices": 1, "runtime.log_every": 1,
    } | settings  # fmt: skip
    return ["hexa", *evaluation_words("finetune_cifar.py:epochs=2", workdir, **settings)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finetune") / "run"
    assert main.main(words(workdir)) == 0
    return workdir


def manifest(workdir, rate):
    """What the newest checkpoint holds besides arrays."""
    newest = max((workdir / f"lr{rate}" / "checkpoints").iterdir())
    return json.loads((newest / MANIFEST).read_text())["metadata"]


def losses(workdir, rate):
    return [line["loss"] for line in lines(workdir / f"lr{rate}") if "loss" in line]


def test_reports_each_learning_rate(run):
    values = result(run)
    assert values["train_images"] == 48 and values["epochs"] == 2
    tops = [(values[f"top1_lr{rate}"], values[f"top5_lr{rate}"]) for rate in RATES]
    assert all(0 < first < fifth <= 100 for first, fifth in tops) and tops[0] != tops[1]
    best = max(range(2), key=lambda number: tops[number])
    assert (values["top1"], values["top5"]) == tops[best] and values["best_learning_rate"] == RATES[best]
    for rate in RATES:
        epochs = [line for line in lines(run / f"lr{rate}") if "top1" in line]
        assert [(line["step"], line["epoch"]) for line in epochs] == [(3, 1), (6, 2)]
        assert epochs[-1]["top1"] == values[f"top1_lr{rate}"] and epochs[-1]["top5"] == values[f"top5_lr{rate}"]
    assert (run / "report" / "curves.png").stat().st_size > 1000


def test_learning_rates_begin_at_the_same_weights_and_learn(run):
    small, large = (losses(run, rate) for rate in RATES)
    assert len(small) == len(large) == 6 and small[0] == large[0] and small[1] != large[1]
    assert small[0] == pytest.approx(np.log(10), abs=0.05)  # a classifier of N(0, 0.01)
    assert np.mean(large[3:]) < np.mean(small[3:]) < np.mean(small[:3])


def test_an_interruption_changes_nothing(run, tmp_path):
    """As after a kill in the second epoch of each learning rate: the checkpoint of the first is the newest."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    (part / "result.json").unlink()
    histories = [manifest(part, rate)["history"] for rate in RATES]
    for rate in RATES:
        newest = max((part / f"lr{rate}" / "checkpoints").iterdir())
        assert newest.name == "step_00000006"
        shutil.rmtree(newest)
        assert len(manifest(part, rate)["history"]) == 1
    assert main.main(words(part)) == 0
    assert [manifest(part, rate)["history"] for rate in RATES] == histories and len(histories[0]) == 2
    assert (part / "result.json").read_bytes() == (run / "result.json").read_bytes()
    for rate in RATES:
        assert losses(part, rate) == losses(run, rate)
        (_, resumed), (_, whole) = (final_state(folder / f"lr{rate}") for folder in (part, run))
        assert resumed.keys() == whole.keys()
        for name in whole:
            np.testing.assert_array_equal(resumed[name], whole[name])


def test_the_whole_network_and_its_statistics_are_trained(run, tmp_path):
    shutil.copytree(run / f"lr{RATES[1]}", tmp_path / "part")
    step, after = final_state(tmp_path / "part")
    shutil.rmtree(max((tmp_path / "part" / "checkpoints").iterdir()))
    earlier, before = final_state(tmp_path / "part")
    assert (earlier, step) == (3, 6)
    weights = [name for name in before if "params" in name]
    means, variances = ([name for name in before if "stats" in name and name.endswith(end)] for end in ("mean", "var"))
    assert len(weights) > 20 and len(means) == len(variances) > 5 and any("classifier" in name for name in weights)
    for name in weights + means + variances:
        assert (before[name] != after[name]).any(), name
    for name in means:  # they began at 0
        assert (before[name] != 0).any() and (after[name] != 0).any(), name


def test_pixels_are_those_of_the_evaluation_unless_augmented(tmp_path, monkeypatch):
    """Each epoch shows each image once, in another order."""
    monkeypatch.setattr(finetune, "open_backbone", lambda config: Backbone(None, None, 0, None))
    config = finetune_cifar.get_config("epochs=2")
    config.checkpoint, config.batch_size, config.runtime.num_devices = "random", 4, 1
    pixels = np.random.default_rng(0).integers(0, 256, (12, 11, 14, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=pixels, labels=np.arange(12) % 3)
    config.data.source = config.data.eval_source = f"arrays:{tmp_path}/data.npz"
    config.data.resize, config.data.crop = 8, 6
    expected = np.stack([resize_center_crop(image, 8, 6) for image in pixels])
    for augment in (False, True):
        config.data.augment = augment
        batches = list(finetune._Tuning(config, tmp_path)._batches(0))
        index = np.concatenate([batch.index[0] for batch in batches])
        assert sorted(index[:12]) == sorted(index[12:]) == list(range(12)) and list(index[:12]) != list(index[12:])
        np.testing.assert_array_equal(np.concatenate([batch.label[0] for batch in batches]), index % 3)
        shown = np.concatenate([batch.crops[0][0, :, 0] for batch in batches])
        same = (shown == expected[index]).all(axis=(1, 2, 3))
        assert not same.any() if augment else same.all()


def test_a_finished_run_is_not_trained_again(run, tmp_path):
    """Its result is written anew from the checkpoints' histories."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    (part / "result.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in part.glob("lr*/checkpoints/*/MANIFEST.json")}
    assert main.main(words(part)) == 0
    assert result(part) == result(run) and len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in part.glob("lr*/checkpoints/*/MANIFEST.json")} == before


def test_a_signal_in_the_last_step_of_a_learning_rate_stops_before_the_next(run, tmp_path, monkeypatch, capsys):
    part, log = tmp_path / "part", training_loop.log
    shutil.copytree(run, part)
    (part / "result.json").unlink()
    shutil.rmtree(max((part / f"lr{RATES[0]}" / "checkpoints").iterdir()))
    shutil.rmtree(part / f"lr{RATES[1]}")

    def terminated(text):
        log(text)
        if text.startswith("step 6/6 "):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training_loop, "log", terminated)
    assert main.main(words(part)) == 143
    captured = capsys.readouterr()
    assert f"SIGTERM: saved step 6 in {part}/lr{RATES[0]}; the same command resumes it" in captured.err
    assert f"learning rate {RATES[0]} (1 of 2)" in captured.out and "(2 of 2)" not in captured.out
    assert losses(part, RATES[0]) == losses(run, RATES[0]) and not (part / f"lr{RATES[1]}").exists()


def test_four_devices_agree_with_one(run, tmp_path):
    rate = RATES[1]
    four = words(tmp_path / "four", **{"runtime.num_devices": 4, "optimizer.learning_rates": f"({rate},)"})
    assert main.main(four) == 0
    assert result(tmp_path / "four")["top1"] == result(run)[f"top1_lr{rate}"]
    np.testing.assert_allclose(losses(tmp_path / "four", rate), losses(run, rate), rtol=1e-4)


def test_mistakes_are_one_line(run, tmp_path, capsys):
    image_folder(tmp_path / "flat", by_class=False, count=4)
    (tmp_path / "empty").mkdir()
    written(tmp_path / "list.txt", "n01440764_10026.JPEG")
    cases = {
        "batch_size=160 is more than the 48 images": {"batch_size": 160},
        "batch_size=16 is not divisible by 3 devices": {"runtime.num_devices": 3},
        "has no labels, which config.task=finetune needs": {"data.source": f"folder:{tmp_path}/flat"},
        "the first is n01440764_10026.JPEG": {"data.list": tmp_path / "list.txt"},
        "is neither a file nor the workdir of a run": {"checkpoint": tmp_path / "empty"},
        "is no pre-training run": {"checkpoint": run},
        "config.checkpoint is missing": {"checkpoint": ""},
        "config.optimizer.name='adam' is not known: use one of adamax, sgd": {"optimizer.name": "adam"},
    }
    for message, settings in cases.items():
        check_refused(words(tmp_path / "run", **settings)[1:], message, capsys)
        assert not (tmp_path / "run" / "config.json").exists()  # the corrected command may use the folder


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"optimizer.learning_rates": "()"}])
def test_nothing_to_train_is_a_mistake(tmp_path, capsys, setting):
    check_refused(words(tmp_path / "run", **setting)[1:], next(iter(setting)), capsys)


def test_a_mistake_leaves_a_run_that_began_its_config(run, tmp_path, capsys):
    """Or else the next command could resume it with other settings."""
    part = tmp_path / "part"
    shutil.copytree(run, part)
    assert main.main(words(part, **{"runtime.num_devices": 3})) == 2
    assert main.main(words(part, seed=1)) == 2
    assert "holds a run of another config: seed was 0, is 1" in capsys.readouterr().err
