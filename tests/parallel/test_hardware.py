"""Accelerators that the machine has and JAX does not use: found without JAX, told in one line with the remedy."""

import pytest

from hexa_jax.parallel.hardware import Accelerator, find_accelerator, unused_accelerator

GPU, TPU = Accelerator("NVIDIA GPU", "cuda13"), Accelerator("TPU", "tpu")
CPU_ONLY = {"jax": "0.10.2"}


def machine(root, *files):
    """A file system with these files, as (path, text)."""
    for path, text in files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "cuda13"), ("575.57.08", "cuda12"), ("", "cuda13"), ("595.10", "cuda13")]
)
def test_a_gpu_is_found_with_the_jax_for_its_driver(driver, extra, tmp_path):
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sun Jul 27\n" if driver else ""
    root = machine(tmp_path, ("dev/nvidia0", ""), ("proc/driver/nvidia/version", version))
    assert find_accelerator(root) == Accelerator("NVIDIA GPU", extra)


def test_a_driver_without_a_card_is_no_gpu(tmp_path):
    assert find_accelerator(tmp_path) is None
    root = machine(tmp_path, ("dev/nvidiactl", ""), ("proc/driver/nvidia/version", "580.65.06"))
    assert find_accelerator(root) is None


def test_a_tpu_is_found_but_not_a_network_card(tmp_path):
    root = machine(tmp_path, ("sys/bus/pci/devices/0000:00:04.0/vendor", "0x1ae0\n"))
    assert find_accelerator(root) is None
    assert find_accelerator(machine(root, ("dev/accel0", ""))) == TPU


def test_the_line_has_the_command_that_installs_the_right_jax():
    line = unused_accelerator(GPU, "cpu", {}, CPU_ONLY)
    assert line.startswith("this machine has an NVIDIA GPU, but JAX sees only the CPU: ")
    assert line.endswith("-m pip install --upgrade 'jax[cuda13]==0.10.2'") and "\n" not in line
    assert "'jax[tpu]==0.10.2'" in unused_accelerator(TPU, "cpu", {}, CPU_ONLY)


def test_an_installed_plugin_that_fails_is_asked_why():
    line = unused_accelerator(GPU, "cpu", {}, CPU_ONLY | {"jax-cuda13-plugin": "0.10.2"})
    assert "jax-cuda13-plugin 0.10.2 is installed" in line and "JAX_PLATFORMS=cuda" in line


@pytest.mark.parametrize(
    ("accelerator", "platform", "environment"),
    [
        (None, "cpu", {}),
        (GPU, "gpu", {}),
        (TPU, "tpu", {}),
        (GPU, "cpu", {"JAX_PLATFORMS": "cpu"}),
        (GPU, "cpu", {"CUDA_VISIBLE_DEVICES": "-1"}),
        (GPU, "cpu", {"CUDA_VISIBLE_DEVICES": ""}),
    ],
)
def test_who_uses_it_or_chose_the_cpu_is_told_nothing(accelerator, platform, environment):
    assert unused_accelerator(accelerator, platform, environment, CPU_ONLY) == ""
