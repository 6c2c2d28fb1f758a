"""The command that compiles for devices that are not there: its mistakes, facts and tables; with -m slow, a real program."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import jax
import pytest
from command_line import REPOSITORY
from small import small_config

from hexa_jax.cli.command import parse_command
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.training.factory import make_trainer
from launch import aot, gpu_topology, lowering, tables
from launch.gpu_topology import TopologyError, gpu_devices, read_gpus, target_config
from launch.kernels import Kernel, Peaks, summary

H100 = read_gpus()["h100"]


def test_facts_of_gpus():
    gpus = read_gpus()
    assert set(gpus) == {"a100", "h100", "h200", "b200"} and not set(gpus) & set(aot.CHIPS)
    assert all({"spec", "flops_source", "name"} <= set(gpu.description) for gpu in gpus.values())
    assert [gpus[kind].memory // 10**9 for kind in ("a100", "h100", "h200", "b200")] == [85, 84, 151, 191]
    assert H100.peaks == Peaks(3352320000000, {"bf16": 989.4e12, "f16": 989.4e12, "f32": 494.7e12}, 66.9e12)
    text = target_config(gpus["b200"])
    assert "cuda_compute_capability { major: 10 minor: 0 }" in text and "core_count: 148" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100:0", "GPUs are h100:N of one host or h100:HOSTSxN"),
        ("h100:2x", "GPUs are h100:N of one host"),
        ("h100", "GPUs are h100:N of one host"),
        ("p100:8", "--topology=p100:8 is not known: use v4, "),
    ],
)
def test_mistakes_are_one_line(capsys, topology, message):
    words = ["aot", "--config=configs/tiny.py", f"--topology={topology}", "--programs=train"]
    assert aot.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("aot: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--config=configs/tiny.py", "--programs=train,detect"],
            "--programs=detect is not known: use train,augment,init",
        ),
        (["--config=configs/eval/knn.py"], "config.task=knn is not compiled"),
    ],
)
def test_programs_that_a_config_has_not(capsys, words, message):
    assert aot.main(["aot", "--topology=h100:1", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aot: ") and message in error and error.count("\n") == 1


def test_programs_are_lowered_from_shapes():
    """On the CPU's devices, which the suite has in place of those that are not there."""
    mesh = make_mesh(jax.devices()[:2])
    words = ["aot", "--config=configs/eval/detection_voc.py:recipe=scratch", "--config.random.base_channels=8"]
    words += [
        "--config.random.backbone=resnet10",
        "--config.model.dim=16",
        "--config.model.hidden=16",
        "--workdir=unused",
    ]
    words += ["--config.data.canvases=((64,96),)", "--config.data.short_sides=(64,)", "--config.data.long_limit=96"]
    with jax.set_mesh(mesh):
        programs = lowering.detection(parse_command(words).config, mesh, num_classes=2, steps_per_epoch=10)
        assert set(programs) == set(lowering.DETECTION)
        assert "tensor<8x64x96x3xui8>" in programs["train"]().as_text()
    trainer = make_trainer(small_config("moco", precision="float32"), 1024, jax.devices()[:2])
    assert set(lowering.pretraining(trainer)) == set(lowering.PRETRAINING) - {"refresh"}


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(gpu_topology, "PLUGINS", ("no-such-plugin",))
    with pytest.raises(TopologyError, match=r"the GPU compiler is missing: pip install -e '.\[aot-gpu\]'"):
        gpu_devices(H100, 1, 1)


def test_when_private_names_of_jax_are_gone(monkeypatch):
    monkeypatch.setattr(gpu_topology, "PLUGINS", ("jax",))
    monkeypatch.setitem(sys.modules, "jax._src.lib", types.SimpleNamespace(xla_client=types.SimpleNamespace()))
    with pytest.raises(TopologyError, match=r"has not the private names of .*: pip install") as error:
        gpu_devices(H100, 1, 1)
    assert "\n" not in str(error.value)


def test_tables_of_a_row():
    kernels = [
        Kernel(
            "conv",
            "convolution forward",
            1,
            3 * 10**9,
            10**9,
            5e12,
            "bf16",
            0,
            "bf16[8]",
            "models/resnet.py:31",
            "conv1",
        ),
        Kernel("norm", "reduction", 2, 10**9, 0, 0.0, "", 1e9, "f32[4]", "models/norm.py:9", "backward: bn1/mul"),
    ]
    row = summary(kernels, H100.peaks) | {"peak_bytes": 2**30, "argument_bytes": 0, "fits": True, "advice": "fits: all"}
    row |= {"config": "moco", "overrides": ["a=1"], "topology": "h100:8", "program": "train"}
    row |= {"collectives": {"all-reduce f32": {"count": 3, "bytes": 2 * 10**6}}, "warnings": ["2 sorts: a.py:1"]}
    shown = tables.lines_of(row)
    assert shown[0] == "train: fits: all" and "peak 1.00 GiB a GPU" in shown[1]
    assert "5.002 TFLOP, 6.00 GB in 3 kernels, of which 0 move" in shown[2]
    assert shown[-2:] == ["  slow: 2 sorts: a.py:1", "  3 x all-reduce f32, 2.000 MB"]
    cells = [cell.strip() for cell in tables.markdown({"key": row}).splitlines()[2].strip("|").split("|")]
    assert cells[:4] == ["moco a=1", "h100:8", "train", "1.0"] and cells[4:8] == ["5.00", "6.0", "4.0", "3 (0)"]
    # By memory 6 GB at 3.35 TB/s; the convolution is bound by its arithmetic, 5 TFLOP at 989.
    assert cells[8] == f"{5.0535 + 0.0299:.1f} / {6000 / 3352.32:.1f} / {5.0535 + 2000 / 3352.32:.1f}"
    assert cells[9:] == ["3 all-reduce f32 (2.0 MB)", "2 sorts"]
    assert "| 2.00 | 2 | reduction | `models/norm.py:9` | backward: bn1/mul | `f32[4]` |" in tables.kernel_table(row)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the extra aot-gpu")
def test_a_step_compiled_for_gpus(tmp_path):
    """HEXA_MoCo on two H100: nothing slow by pattern, gradients reduced once in float32, no images on the way."""
    settings = ["--config=configs/hexa_moco.py", "--config.model.backbone=resnet18"]
    settings += ["--config.batch_size=64", "--config.shuffle_block=64"]
    options = ["--topology=h100:2", "--programs=train", f"--rows={tmp_path}/rows.json"]
    command = [sys.executable, "-W", "ignore", "-m", "launch.aot", *settings, *options]
    environment = {
        name: value for name, value in os.environ.items() if name != "XLA_FLAGS"
    }  # those are of the CPU's tests
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "rows.json").read_text()).values()

    # Among these would be float32 convolutions, scatters and sorts.
    assert row["fits"] and row["warnings"] == []
    assert {"convolution forward", "convolution filter gradient", "convolution input gradient"} <= set(row["by_kind"])
    assert not {"scatter", "sort"} & set(row["by_kind"])

    config = parse_command(["aot", *settings, "--workdir=unused"]).config
    trainer = make_trainer(config, 1024, jax.devices()[:2])
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(trainer.state_shapes().params))
    reduced = row["collectives"]["all-reduce f32"]["bytes"]
    assert parameters <= reduced <= 1.02 * parameters, (reduced, parameters)
    images = 32 * 224 * 224 * 3  # bytes of one crop of all images of a GPU
    others = {name: entry for name, entry in row["collectives"].items() if name != "all-reduce f32"}
    assert sum(entry["bytes"] for entry in others.values()) < images / 50, others
