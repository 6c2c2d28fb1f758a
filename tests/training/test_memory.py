"""Memory of a step: known before data are read, near what a process takes, one line when short."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import REPOSITORY, arguments, environment, finished
from small import small_config

from configs.eval import knn as knn_config
from hexa_jax import main
from hexa_jax.data.open import open_training_source
from hexa_jax.data.shapes import ShapesSource
from hexa_jax.parallel.mesh import Layout
from hexa_jax.training import memory
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.memory import (
    Need,
    available,
    cgroup_room,
    compile_ahead,
    microbatches_that_fit,
    needed,
)
from hexa_jax.training.step import Trainer

# A step whose temporaries are large beside everything else that a process holds, told and measured.
MEASURED = """
import json, pathlib, sys
import jax, numpy as np
sys.path.insert(0, "tests")
from small import small_config
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.memory import needed

def resident(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(text.split(name + ":")[1].split()[0])

devices = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
sizes = {"data.crop_size": (64,), "batch_size": 128, "bn_group_size": 64, "data.shapes_count": 128}
sizes |= {"views.adversarial.weight": 0.0, "views.cutmix.weight": 0.0, "model.base_channels": 8}
config = small_config("simclr", precision="float32", **sizes)
trainer = make_trainer(config, 128)
with jax.set_mesh(trainer.mesh):
    steps = trainer.compile()
    compiled = steps.train.lower(trainer.state_shapes(), trainer.batch_shapes(), None).compile()
    state = steps.init(np.uint32(0))
    zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
    batch = jax.tree.map(zeros, trainer.batch_shapes())
    jax.block_until_ready((state, batch))
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before = resident("VmRSS")
    jax.block_until_ready(compiled(state, batch, None))
    print(json.dumps({"told": needed(compiled, "cpu")._asdict(), "grown": resident("VmHWM") - before}))
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_what_the_compiler_says_is_what_a_process_takes(devices):
    if not pathlib.Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux counts a process's peak anew")
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    told = devices * found["told"]["temporaries"]
    assert told > 500e6  # else other parts of the process would hide it
    assert 0.8 * told < found["grown"] < 1.2 * told, found


def small_trainer(**overrides):
    config = small_config("deepcluster", precision="float32", **overrides)
    source = open_training_source(config)
    trainer = make_trainer(config, len(source), jax.devices()[:1])
    return config, source, trainer


def test_the_checked_program_is_the_one_that_runs(capsys):
    config, source, trainer = small_trainer()
    with jax.set_mesh(trainer.mesh):
        jitted = trainer.compile()
        steps = compile_ahead(config, trainer, jitted, source)
        assert capsys.readouterr().out == (
            "compiling the training step: ResNet-6, 8 pixels, 32 images; takes minutes on a CPU\n"
        )
        assert isinstance(steps.train, jax.stages.Compiled) and steps.init is jitted.init
        zeros = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)  # noqa: E731
        batch = jax.tree.map(zeros, trainer.batch_shapes())
        state = steps.init(np.uint32(0))
        after, _ = steps.train(state, batch, None)
        assert int(after.step) == 1 and jitted.train._cache_size() == 0
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))  # donated, as before
        shardings = jax.tree.map(lambda leaf: leaf.sharding, after)
        assert shardings == trainer.state_sharding()
        again, metrics = steps.train(after, batch, None)
        assert int(again.step) == 2 and np.isfinite(float(metrics["loss"]))


def words(workdir, **overrides):
    return ["hexa", *arguments("deepcluster", workdir, **overrides)]


class Unread(ShapesSource):
    """Fails when an image is read but the first."""

    def __getitem__(self, index):
        assert index == 0, "data were read before memory was checked"
        return super().__getitem__(index)


@pytest.mark.parametrize("on_device", [False, True])
def test_too_little_memory_is_one_line_before_data_are_read(on_device, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hexa_jax.data.sources.shapes.ShapesSource", Unread)
    monkeypatch.setattr(memory, "available", lambda mesh: 300_000)
    workdir = tmp_path / "run"
    settings = {"data.on_device": on_device, "data.normalization": "fixed"}  # to measure is to read
    assert main.main(words(workdir, **settings)) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("hexa_jax: a training step of ResNet-10, 8 pixels, 16 images needs ")
    assert "and there are 300 kB free for it: " in line
    assert "--config.batch_size" in line and "--config.data.crop_size" in line
    assert "--config.runtime.check_memory=False" in line
    assert "compiling the training step: ResNet-10" in said.out
    assert not workdir.exists()  # the corrected command may use it


def test_the_check_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda mesh: 300_000)
    config, source, trainer = small_trainer(**{"runtime.check_memory": False})
    with jax.set_mesh(trainer.mesh):
        compile_ahead(config, trainer, trainer.compile(), source)


def test_resident_images_are_counted(monkeypatch):
    config, source, trainer = small_trainer(**{"data.on_device": True, "data.shapes_count": 3000})
    with jax.set_mesh(trainer.mesh):
        steps = compile_ahead(config, trainer, trainer.compile(), source)
        assert needed(steps.train, "cpu").fixed > 3000 * 32 * 32 * 3
        monkeypatch.setattr(memory, "available", lambda mesh: 3000 * 32 * 32 * 3)
        with pytest.raises(memory.ConfigError, match=r"a training step of ResNet-6, .* needs "):
            compile_ahead(config, trainer, trainer.compile(), source)


def test_the_suggested_microbatches_fit(monkeypatch):
    sizes = {
        "data.crop_size": (48,),
        "batch_size": 64,
        "bn_group_size": 8,
        "model.base_channels": 8,
    }
    config, source, trainer = small_trainer(**sizes)
    with jax.set_mesh(trainer.mesh):
        whole = needed(compile_ahead(config, trainer, trainer.compile(), source).train, "cpu")
        room = whole.total // 3
        monkeypatch.setattr(memory, "available", lambda mesh: room)
        with pytest.raises(
            memory.ConfigError,
            match=r"--config\.runtime\.microbatches=4 should do \(an estimate\), or",
        ):
            compile_ahead(config, trainer, trainer.compile(), source)
        config.runtime.microbatches = 4
        finer = make_trainer(config, len(source), jax.devices()[:1])
        compile_ahead(config, finer, finer.compile(), source)  # fits


def test_other_groups_are_suggested_where_microbatches_cannot_hold_theirs():
    """README's recipe: groups of the whole batch, which no microbatch holds."""
    layout = Layout(batch_size=256, microbatches=1, num_devices=1, bn_group_size=256, cutmix_block=0)
    layout.check()
    finer, same = microbatches_that_fit(layout, Need(10**9, 108 * 10**9), 10**8, 20 * 10**9)
    assert not same and (finer.microbatches, finer.bn_group_size) == (8, 32)
    finer.check()
    blocks = dataclasses.replace(layout, bn_group_size=16, cutmix_block=32)
    finer, same = microbatches_that_fit(blocks, Need(10**9, 100 * 10**9), 10**8, 10 * 10**9)
    assert not same and (finer.microbatches, finer.bn_group_size, finer.cutmix_block) == (
        16,
        16,
        16,
    )
    finer, same = microbatches_that_fit(blocks, Need(10**9, 100 * 10**9), 10**8, 30 * 10**9)
    assert same and finer == dataclasses.replace(blocks, microbatches=4)
    assert microbatches_that_fit(layout, Need(10**9, 10**9), 10**8, 10**9) is None  # the state alone is too large


def test_a_compiler_that_refuses_the_program_is_one_line(monkeypatch, tmp_path, capsys):
    """What TPU compilers do with a step that is larger than their memory."""

    class Refused:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.\nmore\nlines")

    compiled = Trainer.compile
    monkeypatch.setattr(Trainer, "compile", lambda self: compiled(self)._replace(train=Refused()))
    assert main.main(words(tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit the memory of cpu: use --config.runtime.microbatches=N" in line and "hbm" in line
    assert not (tmp_path / "run").exists()


# ---- while a run goes on ----


def exhausted(*_):
    """What XLA raises when it cannot have the memory of an operation."""
    jnp.zeros((1 << 50,), jnp.uint8).block_until_ready()


def too_large_for_numpy(*_):
    np.empty(1 << 60, np.uint8)


@pytest.mark.parametrize("fail", [exhausted, too_large_for_numpy])
@pytest.mark.parametrize("processes", [1, 2])
def test_memory_that_runs_out_is_one_line(fail, processes, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(main.TASKS, "pretrain", fail)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr("hexa_jax.parallel.processes.is_main_process", lambda: True)
    assert main.main(words(tmp_path / "run")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hexa_jax: out of memory: use --config.runtime.microbatches=N (0 finds N before ")
    assert "--config.batch_size or --config.data.crop_size (" in line


def test_an_evaluation_names_its_own_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(main.TASKS, "knn", exhausted)
    assert main.main(["hexa", f"--config={knn_config.__file__}", f"--workdir={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory: use a smaller --config.runtime.batch_size or --config.data.crop (" in line


def test_other_failures_of_a_step_are_not_called_so(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setitem(main.TASKS, "pretrain", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        main.main(words(tmp_path / "run"))


def test_a_step_that_runs_out_leaves_the_workdir_to_the_corrected_command(tmp_path, capsys, monkeypatch):
    """The first step fails; then another batch size, and the run goes to its end."""
    finished("deepcluster")  # has compiled most of what this run needs

    def compiled(config, trainer, source):
        return trainer, trainer.compile()._replace(train=exhausted)

    with monkeypatch.context() as patch:
        patch.setattr("hexa_jax.training.run.compile_to_fit", compiled)
        assert main.main(words(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "metrics.jsonl").exists()  # a first pass and a kNN were made
    assert main.main(words(tmp_path / "run", epochs=1, **{"linear.at_end": False})) == 0
    assert "it made no step: starting over" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epochs"] == 1


# ---- how much there is ----


def test_virtual_devices_share_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "machine_room", lambda: 8000)
    monkeypatch.setattr(memory, "cgroup_room", lambda: None)
    for count, room in ((1, 8000), (8, 1000)):
        assert available(jax.sharding.Mesh(jax.devices()[:count], ("data",))) == room
    monkeypatch.setattr(memory, "cgroup_room", lambda: 2000)
    assert available(jax.sharding.Mesh(jax.devices()[:2], ("data",))) == 1000


@pytest.mark.parametrize("stats, room", [({"bytes_limit": 70, "bytes_in_use": 3}, 70), ({}, None), (None, None)])
def test_accelerators_say_their_limit(stats, room):
    class Device:
        platform = "gpu"

        def memory_stats(self):
            return stats

    class Devices:
        local_devices = (Device(), Device())

    assert available(Devices()) == room


def test_this_machine(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684092 kB\nMemFree:  1 kB\nMemAvailable:   20366448 kB\n")
    assert memory.machine_room(meminfo) == 20366448 * 1024
    assert memory.machine_room(tmp_path / "none") > 1e8  # then all of it


def group(folder, limit, used, cached, names):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")


VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def test_control_groups_of_version_2(tmp_path):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("0::/slurm/job/step\n")
    group(root / "slurm/job/step", "max", 500, 0, VERSION_2)
    assert cgroup_room(root, own) is None
    group(root / "slurm/job", 1000, 500, 100, VERSION_2)
    assert cgroup_room(root, own) == 600
    group(root / "slurm", 800, 700, 0, VERSION_2)
    assert cgroup_room(root, own) == 100
    group(root / "slurm", 800, 900, 0, VERSION_2)
    assert cgroup_room(root, own) == 0


def test_control_groups_of_version_1(tmp_path):
    own, root = tmp_path / "own", tmp_path / "cgroup"
    own.write_text("9:name=systemd:/\n4:cpu,memory:/docker/0123\n3:cpuset:/\n0::/\n")
    group(root / "memory", 1000, 500, 200, VERSION_1)  # what a container sees: its own group, mounted as the root
    assert cgroup_room(root, own) == 700
    assert cgroup_room(root, tmp_path / "none") is None
