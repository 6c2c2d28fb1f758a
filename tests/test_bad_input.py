"""A user's mistake is one clear line on stderr and exit code 2, never a traceback; and it costs nothing that was there."""

import json
import logging
import os
import shutil
import subprocess

import numpy as np
import pytest
from command_line import (
    BATCH,
    IMAGES,
    arguments,
    environment,
    final_state,
    finished,
    image_folder,
    lines,
    run,
)

from hexa_jax import main
from hexa_jax.storage.workdir import LOCK


def one_line(ended):
    """The line of a process that ended with a mistake of the user."""
    assert ended.code == 2, ended.stderr
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("hexa_jax: ") and not ended.stdout, ended.stdout
    return ended.stderr.removeprefix("hexa_jax: ").strip()


@pytest.fixture
def mistake(capsys):
    """Runs main in this process, which has 8 devices, and returns its one line."""
    handlers = logging.root.handlers[:]

    def call(words):
        code = main.main(["hexa", *words])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert len(captured.err.splitlines()) == 1, captured.err
        assert captured.err.startswith("hexa_jax: ") and not captured.out
        return captured.err.removeprefix("hexa_jax: ").strip()

    yield call
    logging.root.handlers[:] = handlers


# ---- in processes of their own ----


def test_unknown_key_in_a_process(tmp_path):
    line = one_line(run([*arguments("moco", tmp_path / "run"), "--config.moco.que_size=64"]))
    assert line == "unknown config key 'moco.que_size'; did you mean 'moco.queue_size'?"
    assert not (tmp_path / "run").exists()


def test_missing_data_in_a_process(tmp_path):
    line = one_line(run(arguments("moco", tmp_path / "run", **{"data.source": f"folder:{tmp_path}/none"})))
    assert line == f"folder:{tmp_path}/none does not exist"


def test_devices_in_a_process(tmp_path):
    words = arguments("deepcluster", tmp_path / "run", batch_size=20, **{"runtime.num_devices": 0})
    line = one_line(run(words, env=environment() | {"JAX_NUM_CPU_DEVICES": "8"}))
    assert line.startswith("batch_size=20 is not divisible by 8 devices x 1 microbatches: use 16 or 32")


def test_too_many_unreadable_images_in_a_process(tmp_path):
    finished("deepcluster")  # has compiled the program that makes the first state
    paths = image_folder(tmp_path / "images")
    for path in paths[1::2]:  # not many in a row, in the order of classes and names
        path.write_bytes(b"")
    overrides = {"data.source": f"folder:{tmp_path}/images", "data.max_bad_fraction": 0.1}
    ended = run(arguments("deepcluster", tmp_path / "run", **overrides))
    *warnings, line = ended.stderr.splitlines()
    assert (
        ended.code == 2
        and f"of {IMAGES} images cannot be read, which is more than the 7 that --config.data.max_bad_fraction=0.1 allows"
        in line
    )
    assert warnings and all(str(tmp_path / "images") in warning for warning in warnings)  # each is named


@pytest.fixture
def small_disk(tmp_path):
    """A real file system with room for one checkpoint or two, but not for all."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow  # tests/checkpoint/test_checkpoint.py fills a disk, too
def test_full_disk_in_a_process(small_disk):
    finished("deepcluster")
    words = arguments("deepcluster", small_disk / "run", **{"runtime.keep_last": 100})
    ended = run(words)
    assert ended.code == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert "No space left on device" in line and str(small_disk) in line
    step, state = final_state(small_disk / "run")  # the newest of those that fitted is whole
    assert step > 0 and all(np.isfinite(value).all() for value in state.values())
    assert [line["step"] for line in lines(small_disk / "run") if "loss" in line][:step] == list(range(1, step + 1))

    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"0" * 4096)
    kept = (small_disk / "run" / "config.json").read_text()
    line = one_line(run(words))
    assert "No space left on device" in line and (small_disk / "run" / "config.json").read_text() == kept
    assert final_state(small_disk / "run")[0] == step


# ---- the command ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.epoch=3"], "unknown config key 'epoch'; did you mean 'epochs'?"),
        (["--config.model.stm=cifar"], "unknown config key 'model.stm'; did you mean 'model.stem'?"),
        (["--config.zzz.y=1"], "unknown config key 'zzz.y'; configs/common.py lists them all"),
        (["--config.knn=3"], "config key 'knn' is a group of settings: knn.crop, knn.every_epochs"),
        (["--config.epochs=abc"], "--config.epochs=abc: must be a whole number"),
        (["--config.epochs=1.5"], "--config.epochs=1.5: must be a whole number"),
        (
            ["--config.views.adversarial.weight=x"],
            "--config.views.adversarial.weight=x: must be a number",
        ),
        (["--config.data.on_device=maybe"], "--config.data.on_device=maybe: must be True or False"),
        (["--config.data.crop_size=(16.5,)"], "--config.data.crop_size takes a tuple of whole numbers, such as '(1,)'"),
        (["--config.data.min_scale=(a,)"], "--config.data.min_scale takes a tuple of numbers"),
        (["--config.epochs"], "Missing value for flag --config.epochs"),
        (["--wrkdir=x"], "unknown flag --wrkdir; did you mean 'workdir'?"),
        (["stray"], "unexpected argument 'stray': settings are given as --config.key=value"),
        (["--config.task=pretran"], "config.task='pretran' is not known: use one of pretrain"),
    ],
)
def test_command(words, expected, mistake, tmp_path):
    assert mistake([*arguments("moco", tmp_path / "run"), *words]).startswith(expected)
    assert not (tmp_path / "run").exists()


def test_missing_flags(mistake, tmp_path):
    config, workdir, *_ = arguments("moco", tmp_path / "run")
    assert mistake([workdir]).startswith("--config is missing")
    assert mistake([config]).startswith("--workdir is missing")
    assert mistake([]).startswith("--config is missing")
    assert mistake([f"--config={tmp_path}/none.py", workdir]) == f"config file '{tmp_path}/none.py' does not exist"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config():\n    return missing\n", "{path}:2 fails: NameError: name 'missing' is not defined"),
        ("import no_such_module\n", "{path}:1 fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:\n", "{path} fails: SyntaxError: invalid syntax"),
        ("def get_config():\n    return 3\n", "{path} fails: AttributeError: 'int' object has no attribute"),
        (
            "from configs import common\ndef get_config():\n    c = common.get_config()\n    c.model.stm = 1\n    return c\n",
            "config.model.stm",
        ),
    ],
)
def test_config_file_that_fails(text, expected, mistake, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    if expected.startswith("{"):
        line = mistake([f"--config={path}", f"--workdir={tmp_path / 'run'}"])
        assert line.startswith("config file " + expected.format(path=path))
    else:  # adding a key in a config file is allowed; overriding one that is not there is not
        line = mistake([f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.model.stn=2"])
        assert line.startswith("unknown config key 'model.stn'; did you mean 'model.st")


# ---- the data ----


def test_data(mistake, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no arrays")

    def line(source):
        return mistake(arguments("moco", tmp_path / "run", **{"data.source": source}))

    assert line(f"folder:{tmp_path}/empty").startswith(f"folder:{tmp_path}/empty holds no image")
    assert line(f"arrays:{tmp_path}/none.npz") == f"arrays:{tmp_path}/none.npz does not exist"
    assert line(f"arrays:{tmp_path}/text.npz").startswith(f"arrays:{tmp_path}/text.npz is not a readable npz file")
    assert line("flder:x").startswith("unknown data source 'flder:x'; did you mean folder:x?")
    assert line("shapes:tset") == "unknown data source 'shapes:tset': use shapes:train or shapes:test"


# ---- settings ----


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "moco",
            {"method": "mocko"},
            "config.method='mocko' is not known: use one of byol, deepcluster, moco, pcl, rotation, simclr",
        ),
        ("moco", {"precision": "float16"}, "config.precision='float16' is not known: use one of bfloat16, float32"),
        (
            "moco",
            {"optimizer.name": "adan"},
            "config.optimizer.name='adan' is not known: use one of adam, larc, lars, sgd",
        ),
        ("moco", {"optimizer.schedule": "step"}, "config.optimizer.schedule='step' is not known: use one of cosine"),
        ("moco", {"model.backbone": "resnet12"}, "unknown backbone 'resnet12': use one of resnet10, resnet18"),
        ("moco", {"model.stem": "tiny"}, "unknown stem 'tiny': use one of imagenet, cifar, small"),
        ("moco", {"views.norm": "l1"}, "config.views.norm='l1' is not known: use one of l2, linf"),
        (
            "moco",
            {"views.attack_norm": "aux"},
            "config.views.attack_norm='aux' is not known: use one of adversarial, clean",
        ),
        ("moco", {"views.steps": 0}, "config.views: an attack needs at least one step"),
        (
            "moco",
            {"runtime.loggers": "('tensorbord',)"},
            "config.runtime.loggers: 'tensorbord' is not known: use some of",
        ),
        ("moco", {"runtime.num_devices": 9}, "runtime.num_devices=9, but there are 8"),
        ("moco", {"runtime.num_devices": 3}, "batch_size=16 is not divisible by 3 devices x 1 microbatches: use "),
        ("moco", {"runtime.microbatches": 3}, "batch_size=16 is not divisible by 1 devices x 3 microbatches: use "),
        ("moco", {"runtime.microbatches": 4}, "bn_group_size=8 does not fit 4 rows a device and microbatch"),
        ("moco", {"runtime.microbatches": -1}, "runtime.microbatches must be at least 1, not -1"),
        ("moco", {"bn_group_size": 6}, "bn_group_size=6 does not fit 16 rows a device and microbatch"),
        (
            "moco",
            {"cutmix_block": 6},
            "cutmix_block=6 does not divide the 16 rows a device and microbatch: use 4 or 8, or other",
        ),
        ("moco", {"shuffle_block": 5}, "shuffle_block=5 does not divide batch_size=16: use 4 or 8"),
        ("moco", {"shuffle_block": 0}, "config.shuffle_block=0 must be positive"),
        ("moco", {"moco.temperature": 0.0}, "config.moco.temperature=0.0 must be positive"),
        ("moco", {"swav.queue_length": -1}, "config.swav.queue_length=-1 must be 0 or more"),  # unused, but a mistake
        ("moco", {"moco.queue_size": 40}, "moco.queue_size=40 is not a multiple of batch_size=16: use 32, 48"),
        ("moco", {"data.num_crops": "(3,)"}, "moco takes two crops of one size, a query and a key"),
        ("moco", {"data.num_crops": "(8,)"}, "moco takes two crops of one size, a query and a key"),
        ("moco", {"method": "simclr", "data.num_crops": "(3,)"}, "simclr pairs two crops of one size"),
        ("moco", {"method": "swav", "data.num_crops": "(1,)"}, "swav.assign_crops=2 is more than the 1 large crops"),
        (
            "moco",
            {"method": "swav", "swav.queue_length": 40},
            "swav.queue_length=40 is not a multiple of batch_size=16",
        ),
        (
            "moco",
            {"scheme": "std+cmxB"},
            "config.scheme='std+cmxB' is not known: use all, or std with any of +adv, +cmx",
        ),
        ("moco", {"scheme": "adv"}, "config.scheme='adv' is not known: use all, or std with any of +adv, +cmx"),
        ("moco", {"scheme": "std+adv+adv"}, "config.scheme='std+adv+adv' is not known: use all, or std with any of"),
        (
            "deepcluster",
            {"scheme": "std+cmx", "views.cutmix.target": "own_crop"},
            "views.cutmix.target=own_crop is for methods with",
        ),
        ("moco", {"views.cutmix.target": "key"}, "config.views.cutmix.target='key' is not known: use one of label"),
        ("moco", {"scheme": "std+cmx", "views.cutmix.replace": 0.3}, "views.cutmix.replace=0.3 is no whole number of"),
        ("moco", {"views.max_increase": -1.0}, "config.views: epsilon and max_increase must be 0 or more"),
        (
            "moco",
            {"views.cutmix_adversarial.weight": -1.0},
            "config.views.cutmix_adversarial.weight=-1.0 must be 0 or more",
        ),
        ("moco", {"batch_size": 96}, f"batch_size=96 is more than the {IMAGES} images: use a smaller one"),
        ("moco", {"batch_size": 0}, "config.batch_size=0 must be positive"),
        ("moco", {"runtime.log_every": 0}, "config.runtime.log_every=0 must be positive"),
        ("moco", {"runtime.keep_last": 0}, "keep_last (0) and keep_every (None) must be at least 1"),
        ("moco", {"seed": -1}, "config.seed=-1 must be 0 or more"),
        ("moco", {"seed": 2**32}, "config.seed=4294967296 must be below 2^32"),
        ("moco", {"data.crop_size": "(0,)"}, "config.data.crop_size=(0,) must be positive"),
        ("moco", {"data.min_scale": "(2.0,)"}, "crop scales are shares of the image with 0 < min <= max <= 1, not 2.0"),
        ("moco", {"data.min_scale": "(0.1, 0.2)"}, "data.num_crops, crop_size, min_scale and max_scale need one entry"),
        ("moco", {"augment.gray_probability": "(0.1, 0.2, 0.3)"}, "augment.gray_probability has 3 entries for 2 crops"),
        (
            "deepcluster",
            {"deepcluster.num_clusters": 65},
            "deepcluster.num_clusters=65 is more than the 64 images seen",
        ),
        ("deepcluster", {"deepcluster.assign_crops": 3}, "deepcluster.assign_crops=3 is more than the 2 large crops"),
    ],
)
def test_settings(kind, overrides, expected, mistake, tmp_path):
    assert mistake(arguments(kind, tmp_path / "run", **overrides)).startswith(expected)
    assert not (tmp_path / "run").exists()  # the corrected command may use it


def test_sizes_that_a_message_offers_work(mistake, tmp_path):
    line = mistake(arguments("moco", tmp_path / "run", bn_group_size=6))
    assert line.endswith("use 4 or 8, or other runtime.microbatches")
    for size in (4, 8):  # gets as far as the next mistake
        line = mistake(arguments("moco", tmp_path / f"run{size}", bn_group_size=size, **{"moco.queue_size": 40}))
        assert line.startswith("moco.queue_size=40")


# ---- the workdir ----


@pytest.fixture
def used(tmp_path):
    """A copy of a finished DeepCluster run."""
    workdir, _ = finished("deepcluster")
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run"


def contents(folder):
    """Files but the lock, which names the process that was there last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK}


def test_workdir_of_another_config(used, mistake):
    before = contents(used)
    line = mistake(arguments("deepcluster", used, seed=1, **{"model.head_dim": 8, "runtime.log_every": 7}))
    assert line == f"workdir {used} holds a run of another config: model.head_dim was 16, is 8; seed was 0, is 1"
    assert contents(used) == before


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("deepcluster", {"model.head_dim": 8}), ("moco", {}), ("deepcluster", {"model.backbone": "resnet18"})],
    ids=["head", "method", "backbone"],
)
def test_checkpoint_of_another_model(kind, overrides, used, mistake):
    (used / "config.json").unlink()  # else the config says it first
    before = contents(used)
    line = mistake(arguments(kind, used, **overrides))
    assert " is of another architecture or method: " in line and str(used / "checkpoints") in line
    after = contents(used)
    assert json.loads(after.pop(used / "config.json"))
    # The command is the one that was last tried, as the config is.
    assert after.pop(used / "command.json") != before.pop(used / "command.json")
    assert after == before


def test_workdir_of_another_program(mistake, tmp_path):
    (tmp_path / "config.json").write_text("epochs: 3\n")
    line = mistake(arguments("moco", tmp_path))
    assert line == f"{tmp_path}/config.json is not readable as a config: is this another program's folder?"
    assert (tmp_path / "config.json").read_text() == "epochs: 3\n"


def test_workdir_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("")
    line = mistake(arguments("moco", tmp_path / "file" / "run"))
    assert line == f"cannot write to workdir {tmp_path}/file/run: Not a directory"
    if os.access("/proc", os.X_OK):  # nobody can make a folder there, not even root
        assert mistake(arguments("moco", "/proc/run")).startswith("cannot write to workdir /proc/run: ")


def test_read_only_workdir(mistake, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o500)
    if os.access(tmp_path / "run", os.W_OK):
        pytest.skip("this user writes everywhere; test_workdir_that_cannot_be_written stands in")
    line = mistake(arguments("moco", tmp_path / "run"))
    assert line == f"cannot write to workdir {tmp_path}/run: Permission denied"


def test_batch_is_what_the_tests_say():
    assert IMAGES // BATCH * BATCH == 64  # test_settings relies on it
