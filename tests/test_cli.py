"""The command line end to end, in processes of its own: every source, and what a finished workdir holds."""

import json
import struct

import numpy as np
import pytest
from command_line import (
    DEEPCLUSTER,
    EPOCHS,
    IMAGES,
    STEPS,
    arguments,
    begin,
    finished,
    image_folder,
    lines,
    picture,
    run,
)

TRAINING = {
    "loss",
    "loss_clean",
    "loss_adversarial",
    "embedding_std",
    "gradient_norm",
    "learning_rate",
    "epoch",
    "images_per_second",
    "input_wait",
    "unreadable_images",
}


@pytest.fixture(scope="module", autouse=True)
def background():
    begin("deepcluster", "moco")


def result(workdir):
    """result.json, which must be flat: names and numbers."""
    values = json.loads((workdir / "result.json").read_text())
    assert all(isinstance(value, int | float) for value in values.values()), values
    return values


def check_page(workdir, *sections):
    """The report has these sections with pictures, and nothing of the run's beside the one page and its facts."""
    page = (workdir / "report" / "index.html").read_text()
    for name in sections:
        part = page[page.index(f'<section id="{name}"') :]
        assert 'src="data:image/' in part[: part.index("</section>")], name
    assert "kNN" in page and 'id="curves"' in page and 'id="health"' in page
    assert {path.name for path in (workdir / "report").iterdir()} == {"index.html", "facts.json"}
    facts = json.loads((workdir / "report" / "facts.json").read_text())
    assert facts["steps_per_epoch"] == 4 and facts["device"] == "1 CPU device"
    command = json.loads((workdir / "command.json").read_text())
    assert command["recipe"].endswith(".py") and command["changed"]["batch_size"][1] == 16
    return page


def test_deepcluster_on_shapes_leaves_everything_that_a_run_should():
    workdir, output = finished("deepcluster")
    assert set(result(workdir)) == {
        "step",
        "epochs",
        "knn_accuracy",
        "random_knn_accuracy",
        "pixels_knn_accuracy",
        "nmi",
    }  # no linear probe without held-out examples
    assert result(workdir)["step"] == STEPS
    assert all(0 <= value <= 100 for name, value in result(workdir).items() if "accuracy" in name)

    steps = [line for line in lines(workdir) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(set(line) >= TRAINING and "loss_cutmix" not in line for line in steps)
    assert all(np.isfinite(list(line.values())).all() for line in steps)
    clusters = [line for line in lines(workdir) if "kmeans_objective" in line]
    assert [line["step"] for line in clusters] == list(range(0, STEPS, 4))
    assert all(set(line) >= {"empty_clusters", "changed_cluster", "nmi"} for line in clusters)
    assert all(0 < line["kmeans_objective"] <= 1 and 0 <= line["nmi"] <= 1 for line in clusters)
    assert [line["step"] for line in lines(workdir) if "knn_accuracy" in line] == [0, 8, 16, 24]

    config = json.loads((workdir / "config.json").read_text())
    assert config["deepcluster"]["num_clusters"] == 8 and config["data"]["crop_size"] == [8]
    page = check_page(workdir, "hard-examples", "clusters", "map", "neighbors")
    assert "epoch 6 of 6, finished" in page
    assert f"step {STEPS}/{STEPS}" in output and "images/s  ETA 0:00:00" in output
    assert "raw pixels" in output and f"report: {workdir / 'report' / 'index.html'}" in output


def test_tensorboard_events_can_be_read():
    workdir, _ = finished("deepcluster")
    (path,) = (workdir / "tensorboard").iterdir()
    data, records = path.read_bytes(), []
    while data:  # length, its checksum, the record, its checksum
        length = struct.unpack("<Q", data[:8])[0]
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    assert len(records) > STEPS and any(b"loss_adversarial" in record for record in records)


@pytest.mark.parametrize("kind", ["deepcluster", "moco"])
def test_step_is_traced_once_and_tensorflow_stays_away(kind):
    _, output = finished(kind)
    inspected = json.loads(output.rpartition("INSPECTED ")[2])
    assert inspected["tensorflow"] is False
    assert inspected["traced"]["train"] == 1 and inspected["traced"]["refresh"] == 1  # over EPOCHS epochs
    # What gives the random network its statistics: the first pass, or the moments of some batches.
    assert inspected["traced"]["observe" if kind == "deepcluster" else "moments"] == 1


def test_moco_logs_all_three_losses():
    workdir, _ = finished("moco")
    steps = [line for line in lines(workdir) if "loss" in line]
    for line in steps:
        parts = line["loss_clean"] + line["loss_adversarial"] + line["loss_cutmix"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert not any("kmeans_objective" in line for line in lines(workdir))
    check_page(workdir, "hard-examples", "clusters", "map", "neighbors")  # clusters of the sample


def test_folder_by_class_with_a_corrupt_image(tmp_path):
    finished("deepcluster")  # has compiled what this run needs
    broken = image_folder(tmp_path / "images")[33]
    broken.write_bytes(broken.read_bytes()[:50])
    overrides = {"data.source": f"folder:{tmp_path / 'images'}", "data.max_bad_fraction": 0.02}
    ended = run(arguments("deepcluster", tmp_path / "run", **overrides))
    assert ended.code == 0, ended.stderr
    warnings = ended.stderr.splitlines()  # one by the training, one by the evaluation
    assert len(warnings) == 2 and all(str(broken) in line for line in warnings), ended.stderr
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert steps[-1]["unreadable_images"] == 1
    assert {line["invalid"] for line in steps} <= {0, 1} and any(line["invalid"] for line in steps)
    assert result(tmp_path / "run")["knn_accuracy"] > 100 / 3  # discs, bars and crosses: easy
    assert any("nmi" in line for line in lines(tmp_path / "run"))


def test_flat_folder_without_labels(tmp_path):
    finished("moco")
    image_folder(tmp_path / "images", by_class=False)
    ended = run(arguments("moco", tmp_path / "run", **{"data.source": f"folder:{tmp_path / 'images'}"}))
    assert ended.code == 0 and not ended.stderr, ended.stderr
    assert result(tmp_path / "run") == {"step": STEPS, "epochs": EPOCHS}
    assert "no labels" in ended.stdout
    check_page(tmp_path / "run", "hard-examples", "map")


def test_arrays_on_the_device(tmp_path):
    images, labels = zip(*(picture(number) for number in range(IMAGES)), strict=True)
    np.savez(tmp_path / "train.npz", images=np.stack(images), labels=np.array(labels))
    images, labels = zip(*(picture(1000 + number) for number in range(30)), strict=True)
    np.savez(tmp_path / "test.npz", images=np.stack(images), labels=np.array(labels))
    overrides = {
        "data.source": "arrays:train.npz",
        "data.eval_source": "arrays:test.npz",
        "runtime.data_dir": str(tmp_path),
        "data.on_device": True,
        "linear.at_end": True,
        "knn.every_epochs": 5,  # never on the way: the curve has its ends
        "epochs": 2,
        "views.adversarial.weight": 0.0,  # compiles faster
    }
    ended = run(arguments("deepcluster", tmp_path / "run", **overrides))
    assert ended.code == 0 and not ended.stderr, ended.stderr
    values = result(tmp_path / "run")
    assert {"linear_accuracy", "pixels_linear_accuracy", "random_linear_accuracy"} <= values.keys()
    assert values["knn_accuracy"] > 100 / 3
    assert "linear probe" in ended.stdout
    for name in ("knn_accuracy", "linear_accuracy"):
        curve = [(line["step"], line[name]) for line in lines(tmp_path / "run") if name in line]
        assert curve == [(0, values[f"random_{name}"]), (8, values[name])]


@pytest.mark.slow  # tests/faults has the same with a worker that is killed on the way
def test_worker_processes_give_the_same_run(tmp_path):
    workdir, _ = finished("deepcluster")
    ended = run(arguments("deepcluster", tmp_path / "run", **{"runtime.workers": 2}))
    assert ended.code == 0 and not ended.stderr, ended.stderr
    assert result(tmp_path / "run") == result(workdir)
    losses = [
        [(line["step"], line["loss"]) for line in lines(w) if "loss" in line] for w in (workdir, tmp_path / "run")
    ]
    assert losses[0] == losses[1]


def test_help_lists_the_flags():
    ended = run(["--help"])
    assert ended.code == 0 and not ended.stderr
    assert all(flag in ended.stdout for flag in ("--config", "--workdir", "--extend"))


def test_shared_settings_exist():
    assert DEEPCLUSTER["epochs"] * (IMAGES // DEEPCLUSTER["batch_size"]) == STEPS
