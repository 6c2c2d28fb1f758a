"""Workdirs, checkpoints and data in a bucket: the whole way over HTTP, to an emulator of Google Cloud Storage."""

import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from bucket import FORBIDDEN, NAME, Cloud
from command_line import (
    REPOSITORY,
    STEPS,
    arguments,
    begin,
    environment,
    final_state,
    finish,
    finished,
    free_port,
    run,
    run_until,
)
from official_archives import prepare, run_python, write_cifar
from same_run import KINDS, assert_same, check_same_run, devices, what_was_learned

from hexa_jax import export, main
from hexa_jax import prepare as preparing
from hexa_jax.checkpoint.checkpointer import MANIFEST, CheckpointError, Checkpoints
from hexa_jax.core.preemption import Terminated
from hexa_jax.data.sources import DataError, make_source
from hexa_jax.evals.backbone import load_backbone
from hexa_jax.storage import gcs, workdir_sync
from hexa_jax.storage.gcs import RemoteError
from hexa_jax.storage.workdir_sync import OWNER, Mirror

# The command line, with a short memory for owners that died.
MAIN = """
import sys
from hexa_jax import main
from hexa_jax.storage import workdir_sync
workdir_sync.BEAT_SECONDS, workdir_sync.LEASE_SECONDS = 0.3, 3
code = main.main(sys.argv)
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
sys.exit(code)
"""
PIXELS = {"data.resize": 8, "data.crop": 8, "runtime.num_devices": 1, "runtime.batch_size": 32}


@pytest.fixture(scope="module", autouse=True)
def background():
    begin("moco")


@pytest.fixture(scope="module")
def cloud():
    """A running server; this process, too, talks to it."""
    started, before = Cloud(), dict(os.environ)
    os.environ.update(started.environment)
    yield started
    os.environ.clear()
    os.environ.update(before)
    started.close()


@pytest.fixture(autouse=True)
def mirrors(monkeypatch):
    """Owners that a test lets die stay open; those of this list are uploaded at every save of the process."""
    monkeypatch.setattr(workdir_sync, "_current", [])


@pytest.fixture
def quick(monkeypatch):
    """Owners in this process sign often and are missed soon."""
    monkeypatch.setattr(workdir_sync, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(workdir_sync, "LEASE_SECONDS", 2)


def start_on(machine, words, env=None):
    """The command line on a machine, a folder that is its home and its disk for temporary files."""
    machine.mkdir(exist_ok=True)
    env = (env or environment()) | {"HOME": str(machine), "TMPDIR": str(machine)}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    return subprocess.Popen([sys.executable, "-c", MAIN, *words], **options)


def complaint(process):
    """Its error output, without what the C++ libraries log about the emulator."""
    return [line for line in process.stderr.splitlines() if "TESTING" not in line and "absl::InitializeLog" not in line]


def said(capsys, *words):
    """The one line with which the command line answers a mistake."""
    assert main.main(["hexa", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def evaluation(name, workdir, checkpoint, **settings):
    words = [f"--config={REPOSITORY}/configs/eval/{name}", f"--config.checkpoint={checkpoint}", f"--workdir={workdir}"]
    return [*words, *(f"--config.{key}={value}" for key, value in (PIXELS | settings).items())]


# ---- Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_moves_to_another_machine(cloud, tmp_path):
    expected, _ = finished("moco")
    words = arguments("moco", f"gs://{NAME}/runs/moved")

    process = start_on(tmp_path / "first", words)
    run_until(process, f"step 8/{STEPS} ")  # the save of step 6 has waited for that of step 3
    process.kill()
    assert finish(process).code == -signal.SIGKILL
    saved = [int(name.split("_")[1][:8]) for name in cloud.names("runs/moved/checkpoints") if name.endswith(MANIFEST)]
    measured = [json.loads(line)["step"] for line in cloud.read("runs/moved/metrics.jsonl").splitlines()]
    assert 3 in saved and max(measured) >= max(saved)  # no checkpoint counts before its metrics are there
    assert f"runs/moved/{OWNER}" in cloud.names() and "runs/moved/result.json" not in cloud.names()

    ended = finish(start_on(tmp_path / "second", words))
    assert ended.code == 0, ended.stderr
    assert all("skipping a checkpoint" in warning for warning in complaint(ended))  # one that the kill cut in half
    assert "waiting 3 s to see whether it is alive" in ended.stdout
    assert f"resuming at step {max(saved)} from gs://{NAME}/runs/moved/checkpoints" in ended.stdout
    assert f"report: gs://{NAME}/runs/moved/report/index.html" in ended.stdout
    assert f"runs/moved/{OWNER}" not in cloud.names() and not list((tmp_path / "second").glob("hexa_jax_*"))
    cloud.get("runs/moved", tmp_path / "copy")
    check_same_run(tmp_path / "copy", expected)
    kept = {name.split("/")[3] for name in cloud.names("runs/moved/checkpoints")}
    assert kept == {f"step_{step:08}" for step in (STEPS - 3, STEPS)}  # nothing is left of the others
    files = {str(path.relative_to(expected)) for path in expected.rglob("*.*") if path.is_file()}
    files = {name for name in files if not name.startswith((".", "checkpoints", "tensorboard"))}
    there = {name.removeprefix("runs/moved/") for name in cloud.names("runs/moved")}
    assert files <= there and {"config.json", "report/index.html"} <= files
    assert len([name for name in there if "tensorboard" in name]) == 2  # one of each machine


def test_sigterm_uploads_too(cloud):
    with pytest.raises(Terminated), workdir_sync.local_workdir(f"gs://{NAME}/terminated") as folder:
        (pathlib.Path(folder) / "part.npz").write_text("so far")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert cloud.names("terminated") == ["terminated/part.npz"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_evaluations_find_weights_in_a_bucket(cloud, tmp_path):
    expected, _ = finished("moco")
    cloud.put(expected, "runs/whole")
    data = {"data.source": "shapes:train", "data.limit": 60, "leave_one_out": True}
    assert main.main(["hexa", *evaluation("knn.py", tmp_path / "local", expected, **data)]) == 0
    words = evaluation("knn.py", f"gs://{NAME}/evaluated", f"gs://{NAME}/runs/whole", **data)
    assert main.main(["hexa", *words]) == 0
    assert json.loads(cloud.read("evaluated/result.json")) == json.loads((tmp_path / "local/result.json").read_text())
    parts = [name for name in cloud.names("evaluated") if name.endswith(".npz")]
    pictures = [name for name in cloud.names("evaluated/report") if name.endswith(".png")]
    assert parts and pictures and f"evaluated/{OWNER}" not in cloud.names()

    done = len(cloud.requests)
    assert main.main(["hexa", *words]) == 0  # features are fetched, and neither computed nor uploaded again
    requests = [request for request in cloud.requests[done:] if "part_00000" in request]
    assert requests and all(request.startswith("GET") for request in requests)

    weights = tmp_path / "weights.safetensors"
    words = [f"--checkpoint=gs://{NAME}/runs/whole", "--format=torchvision", f"--output={weights}"]
    assert export.main(words) == 0
    cloud.write("weights.safetensors", weights.read_bytes())
    ours, theirs = load_backbone(str(expected)), load_backbone(f"gs://{NAME}/weights.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(*(b.features(b.variables, images) for b in (ours, theirs)), rtol=1e-5, atol=1e-5)


def test_mistakes_are_one_line_and_leave_nothing(cloud, tmp_path, capsys, monkeypatch):
    there = f"gs://{NAME}/mistake"
    tiny = f"--config={REPOSITORY}/configs/tiny.py"
    assert "gs://nobucket/run cannot be" in said(capsys, tiny, "--workdir=gs://nobucket/run")
    assert "does not have access" in said(capsys, tiny, f"--workdir=gs://{FORBIDDEN}/run")
    assert "s3://there/run: only local paths and gs:// buckets" in said(capsys, tiny, "--workdir=s3://there/run")
    wrong = {
        "tfds:cifar10 is not prepared in gs://nobucket/data": ["runtime.data_dir=gs://nobucket/data", "data.source=tfds:cifar10"],
        "pack them": [f"data.source=folder:gs://{NAME}/photos"],
        f"gs://{NAME}/no.npz cannot be read: no such": [f"data.source=arrays:gs://{NAME}/no.npz"],
        "needs a config.runtime.data_cache": [f"data.source=arrays:gs://{NAME}/no.npz", "runtime.data_cache="],
    }  # fmt: skip
    for message, settings in wrong.items():
        cache = f"--config.runtime.data_cache={tmp_path}"
        settings = [f"--config.{setting}" for setting in settings]
        assert message in said(capsys, tiny, f"--workdir={there}", cache, *settings)
        assert cloud.names("mistake") == []  # not even the config: the corrected command may use the folder
    assert "is neither a file nor the workdir" in said(capsys, *evaluation("knn.py", there, f"gs://{NAME}/nothing"))
    assert "does not have access" in said(capsys, *evaluation("knn.py", there, f"gs://{FORBIDDEN}/nothing"))
    assert cloud.names("mistake") == []
    assert preparing.main(["cifar10", f"--data_dir=gs://{NAME}/data"]) == 2
    assert f"gcloud storage cp -r DIR/* gs://{NAME}/data" in capsys.readouterr().err
    from hexa_jax.experiments.__main__ import main as experiment

    assert experiment(["fig2", f"--workdir={there}"]) == 2 and "needs a local folder" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    assert f"{there} needs gcsfs: pip install gcsfs" in said(capsys, tiny, f"--workdir={there}")
    assert "pip install gcsfs" in said(capsys, *evaluation("knn.py", tmp_path / "run", f"gs://{NAME}/run"))


# ---- Checkpoints -----------------------------------------------------------------------------------------------------------


def test_damaged_and_unfinished_checkpoints_do_not_count(cloud, caplog):
    tree = {"a": np.arange(1000.0), "b": np.ones((30, 4), np.float32)}
    checkpoints = Checkpoints(f"gs://{NAME}/damaged")
    for step in (1, 2, 3):
        checkpoints.save(step, {**tree, "a": tree["a"] + step})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3]
    cloud.delete(f"damaged/step_00000003/{MANIFEST}")  # as if the last save had been cut off
    assert checkpoints.steps() == [1, 2]
    largest = max(cloud.names("damaged/step_00000002/state"), key=lambda name: len(cloud.read(name)))
    content = bytearray(cloud.read(largest))
    content[len(content) // 2] ^= 1
    cloud.write(largest, bytes(content))
    step, restored, _ = checkpoints.restore_latest(tree)
    assert step == 1 and (restored["a"] == tree["a"] + 1).all()
    assert f"gs://{NAME}/damaged/step_00000002: {largest.split('/', 2)[2]} does not match its checksum" in caplog.text
    cloud.delete(f"damaged/step_00000001/{MANIFEST}")
    with pytest.raises(CheckpointError, match=f"no intact checkpoint in gs://{NAME}/damaged"):
        checkpoints.restore_latest(tree)
    with pytest.raises(
        RemoteError, match=f"gs://{FORBIDDEN}/x cannot be read: Forbidden"
    ):  # that is not "no checkpoint"
        Checkpoints(f"gs://{FORBIDDEN}/x").restore_latest(tree)


def test_storage_may_fail_for_a_while(cloud, tmp_path):
    tree = {"a": np.arange(1000.0)}
    with workdir_sync.local_workdir(f"gs://{NAME}/outage") as folder:
        checkpoints = Checkpoints(f"{folder}/checkpoints")
        checkpoints.save(1, tree)
        checkpoints.wait()
        (pathlib.Path(folder) / "metrics.jsonl").write_text("{}")
        cloud.fail_for(2)
        checkpoints.save(2, tree)
        checkpoints.wait()
        cloud.fail_for(2)
        assert checkpoints.restore_latest(tree)[0] == 2
        cloud.fail_for(2)
    assert "outage/metrics.jsonl" in cloud.names() and f"outage/{OWNER}" not in cloud.names()
    assert Checkpoints(f"gs://{NAME}/outage/checkpoints").steps() == [1, 2]


# ---- Workdirs ----------------------------------------------------------------------------------------------------------------


def test_a_workdir_has_one_owner(cloud, quick, capsys, monkeypatch):
    first = Mirror(f"gs://{NAME}/owned")
    first.open()
    with pytest.raises(RemoteError, match=rf"workdir gs://{NAME}/owned is in use by process {os.getpid()} on "):
        Mirror(f"gs://{NAME}/owned").open()
    (first.folder / "a.txt").write_text("one")
    first.close()
    assert cloud.names("owned") == ["owned/a.txt"] and not first.root.exists()

    second = Mirror(f"gs://{NAME}/owned")
    second.open()
    assert "waiting" in capsys.readouterr().out.splitlines()[-1]  # that of the refused one: this one did not wait
    assert (second.folder / "a.txt").read_text() == "one"
    second._ended.set()  # it hangs, or its network is gone
    third = Mirror(f"gs://{NAME}/owned")
    third.open()
    (second.folder / "a.txt").write_text("two")
    monkeypatch.setattr(os, "_exit", stop)
    with pytest.raises(Stopped, match="1"):
        second.upload()
    assert f"gs://{NAME}/owned was taken over by process" in capsys.readouterr().err
    third.close()
    assert cloud.names("owned") == ["owned/a.txt"] and cloud.read("owned/a.txt") == b"one"


def test_of_two_that_start_at_once_one_is_refused(cloud, monkeypatch):
    first, second = (Mirror(f"gs://{NAME}/at_once") for _ in range(2))
    monkeypatch.setattr(Mirror, "_watch", lambda _: None)  # neither has seen the other
    first.open()
    lease = cloud.read(f"at_once/{OWNER}")
    with pytest.raises(RemoteError, match=f"workdir gs://{NAME}/at_once is in use by process {os.getpid()} on "):
        second.open()
    second.close()
    assert cloud.read(f"at_once/{OWNER}") == lease
    first.close()
    assert cloud.names("at_once") == []


class Stopped(BaseException):
    """In place of the end of this process."""


def stop(code):
    raise Stopped(code)


def test_what_is_deleted_or_unfinished_is_not_in_the_bucket(cloud):
    kept = Mirror(f"gs://{NAME}/kept")
    kept.open()
    for name in ("a.txt", "b.tmp", "unfinished", ".lock", "deep/c.json", "checkpoints/d"):
        (kept.folder / name).parent.mkdir(exist_ok=True)
        (kept.folder / name).write_text(name)
    kept.upload()
    assert cloud.names("kept") == [f"kept/{OWNER}", "kept/a.txt", "kept/deep/c.json"]
    (kept.folder / "a.txt").unlink()
    (kept.folder / "deep/c.json").write_text("new")
    kept.close()
    assert cloud.names("kept") == ["kept/deep/c.json"] and cloud.read("kept/deep/c.json") == b"new"


class Cut:
    """A bucket that is gone after some changes; signatures are none."""

    def __init__(self, bucket, changes):
        self.bucket, self.left = bucket, changes

    def __getattr__(self, name):
        def call(target, *content, **options):
            if name in ("rm_file", "pipe_file") and not target.endswith(OWNER):
                self.left -= 1
                if self.left < 0:
                    raise OSError("the machine is gone")
            return getattr(self.bucket, name)(target, *content, **options)

        return call


@pytest.mark.parametrize("changes", range(6))
def test_an_upload_that_is_cut_off_leaves_no_old_features_under_a_new_name(cloud, changes):
    """Whatever change is the last one: parts in the bucket are those that the file beside them describes."""
    features = Mirror(f"gs://{NAME}/cut{changes}")
    features.open()
    for content in ("old", "renewed"):
        for name in ("part_00000.npz", "about.json", "part_00001.npz"):
            (features.folder / name).write_text(content)
        if content == "old":
            features.upload()
    features.bucket = Cut(features.bucket, changes)
    if changes < 5:  # two deletions, three uploads
        with pytest.raises(RemoteError, match="the machine is gone"):
            features.upload()
    else:
        features.upload()
    names = [name for name in cloud.names(f"cut{changes}") if not name.endswith(OWNER)]
    found = {name.split("/")[1]: cloud.read(name).decode() for name in names}
    assert all(value == found["about.json"] for name, value in found.items() if name.startswith("part")), found
    assert found["about.json"] == ("old" if changes < 3 else "renewed") and len(found) == (3, 2, 1, 1, 2, 3)[changes]
    features._ended.set()


# ---- Data --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar(tmp_path_factory, cloud):
    """CIFAR-10 with eight images a file, prepared by tfds in two shards a split; and copied to the bucket."""
    root = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    files = {name: (rng.permutation(10)[:8, None], rng.integers(0, 256, (8, 32, 32, 3), np.uint8)) for name in names}
    write_cifar(root / "archive", "cifar-10-batches-bin", files, {"batches.meta.txt": [f"kind{i}" for i in range(10)]})
    prepare("cifar10", root / "tfds", downloads=root / "archive")
    cloud.put(root / "tfds", "data")
    return root / "tfds"


def examples(source):
    return [(example["label"], example["image"]) for example in (source[index] for index in range(len(source)))]


def test_tfds_data_are_fetched_once(cloud, cifar, tmp_path):
    expected = examples(make_source("tfds:cifar10", data_dir=str(cifar)))
    settings = {"data_dir": f"gs://{NAME}/data", "data_cache": str(tmp_path)}
    done = len(cloud.requests)
    source = make_source("tfds:cifar10", **settings)
    assert examples(source) == expected
    assert examples(pickle.loads(pickle.dumps(source))) == expected and source.class_names[3] == "kind3"
    downloads = [request for request in cloud.requests[done:] if "/download/" in request and "array_record" in request]
    assert len(set(downloads)) == len(downloads) == 2 and all("train" in request for request in downloads)

    def fetched(spec):
        """Shards that a second opening reads from the bucket."""
        done = len(cloud.requests)
        assert len(make_source(spec, **settings)) in (8, 40)
        found = [
            r for r in cloud.requests[done:] if "array_record-" in r and not r.startswith("GET /storage/v1/b/bucket/o?")
        ]
        return sorted({re.search(r"(train|test)\.array_record-\d+", request)[0] for request in found})

    assert fetched("tfds:cifar10:train") == []
    assert fetched("tfds:cifar10:test") == ["test.array_record-00000", "test.array_record-00001"]
    first, second = sorted(tmp_path.rglob("*train.array_record-*"))
    first.unlink()  # as if the last start had been cut off
    assert fetched("tfds:cifar10:train") == ["train.array_record-00000"]
    name = f"data/{second.relative_to(tmp_path / NAME / 'data')}"
    cloud.write(name, cloud.read(name))  # the same again is the same
    assert fetched("tfds:cifar10:train") == []
    cloud.write(name, bytes(len(cloud.read(name))))
    assert fetched("tfds:cifar10:train") == ["train.array_record-00001"]
    cloud.put(cifar, "data")


READ = """
import sys
from hexa_jax.data.sources import make_source
source = make_source("tfds:cifar10:test", data_dir=sys.argv[1])
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
print(source.labels().tolist(), sum(len(source[index]["image"]) for index in range(len(source))))
"""


def test_tfds_data_are_read_in_place_without_tensorflow(cloud, cifar):
    expected = make_source("tfds:cifar10:test", data_dir=str(cifar))
    size = sum(len(image) for _, image in examples(expected))
    assert run_python(READ, f"gs://{NAME}/data") == f"{expected.labels().tolist()} {size}\n"


def test_data_that_do_not_fit_are_refused(cloud, cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(gcs.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises((DataError, RemoteError), match=r"does not fit.*config\.runtime\.data_cache"):
        make_source("tfds:cifar10", data_dir=f"gs://{NAME}/data", data_cache=str(tmp_path))


def test_arrays_are_fetched(cloud, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5))
    cloud.write("arrays/a.npz", (tmp_path / "a.npz").read_bytes())
    source = make_source(f"arrays:gs://{NAME}/arrays/a.npz", data_cache=str(tmp_path / "cache"))
    assert [example[0] for example in examples(source)] == list(range(5))
    np.testing.assert_array_equal(np.stack([example[1] for example in examples(source)]), images)


# ---- Slow ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # half a minute
def test_a_terminated_run_moves_too(cloud, tmp_path):
    words = arguments("moco", f"gs://{NAME}/runs/terminated")
    process = start_on(tmp_path / "first", words)
    run_until(process, f"step 7/{STEPS} ")
    process.terminate()
    stopped = finish(process)
    assert stopped.code == 143, stopped.stderr
    (line,) = complaint(stopped)
    saved = re.search(rf"SIGTERM: saved step (\d+) in gs://{NAME}/runs/terminated; the same command resumes it", line)[
        1
    ]
    ended = finish(start_on(tmp_path / "second", words))
    assert ended.code == 0 and not complaint(ended), ended.stderr
    assert "waiting" not in ended.stdout and f"resuming at step {saved} from" in ended.stdout
    cloud.get("runs/terminated", tmp_path / "copy")
    check_same_run(tmp_path / "copy", finished("moco")[0])


@pytest.mark.slow  # a minute
def test_workers_read_in_place(cloud, cifar, tmp_path):
    data = {"data.source": "tfds:cifar10:train", "data.shapes_count": 0, "runtime.workers": 2, "epochs": 1}
    data |= {"runtime.checkpoint_every": 2, "runtime.data_cache": ""}
    for name, where in (("near", cifar), ("far", f"gs://{NAME}/data")):
        ended = finish(
            start_on(tmp_path / "m", arguments("moco", tmp_path / name, **data, **{"runtime.data_dir": where}))
        )
        assert ended.code == 0, ended.stderr
    near, far = (final_state(tmp_path / name) for name in ("near", "far"))
    assert near[0] == far[0] > 0
    for name, value in near[1].items():
        np.testing.assert_array_equal(value, far[1][name], err_msg=name)


@pytest.mark.slow  # two minutes
def test_two_processes_with_disks_of_their_own(cloud, tmp_path):
    ended = run(arguments("moco", tmp_path / "alone", **KINDS["moco"]), env=devices(4))
    assert ended.code == 0, ended.stderr
    address = f"127.0.0.1:{free_port()}"
    words = arguments("moco", f"gs://{NAME}/pair", **KINDS["moco"])
    cloud.write(f"pair/{OWNER}", b'{"by": "one that is dead", "token": ""}')  # both wait
    processes = []
    for number in range(2):
        flags = [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}"]
        processes.append(start_on(tmp_path / str(number), [*words, *flags], devices(2)))
    ended = [finish(process) for process in processes]
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    cloud.get("pair", tmp_path / "pair")
    assert_same(what_was_learned(tmp_path / "pair"), what_was_learned(tmp_path / "alone"))
    assert f"pair/{OWNER}" not in cloud.names() and (tmp_path / "pair/report/index.html").is_file()
    assert not [path for number in range(2) for path in (tmp_path / str(number)).glob("hexa_jax_*")]


@pytest.mark.slow  # a minute
def test_a_run_that_was_given_up_for_dead_ends_when_it_wakes(cloud, tmp_path):
    words = arguments("moco", f"gs://{NAME}/woken")
    sleeper = start_on(tmp_path / "first", words)
    run_until(sleeper, f"step 5/{STEPS} ")
    sleeper.send_signal(signal.SIGSTOP)
    other = start_on(tmp_path / "second", words)
    run_until(other, "resuming at step 3")
    sleeper.send_signal(signal.SIGCONT)
    woken = finish(sleeper)
    assert woken.code == 1 and f"gs://{NAME}/woken was taken over by process {other.pid} on" in woken.stderr
    ended = finish(other)
    assert ended.code == 0, ended.stderr
    cloud.get("woken", tmp_path / "copy")
    check_same_run(tmp_path / "copy", finished("moco")[0])
