"""Launch scripts: what they would run, word by word, and their mistakes. Nothing real is started."""

import os
import shlex
import subprocess

import pytest
from command_line import REPOSITORY

LAUNCH = REPOSITORY / "launch"
STARTED = ("tpu_vm.sh", "gke.sh", "slurm.sh")  # the others are sourced
WORDS = ["--config=configs/hexa_moco.py", "--workdir=/mnt/shared/a run; $(reboot)", "--config.epochs=800"]
TPU = ["--name=hexa", "--zone=us-west4-a", "--type=v5litepod-64", "--bucket=gs://bucket/code"]
GKE = ["--name=hexa", "--cluster=c", "--zone=z", "--type=v5litepod-256", "--image=registry/hexa:tpu"]


def script(name, *words, path=""):
    env = {"PATH": path + os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run([LAUNCH / name, *words], capture_output=True, text=True, timeout=60, env=env)


def printed(done):
    """Commands as lists of words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def remote(command):
    """The words that a command given to another machine's shell consists of."""
    (text,) = (word.partition("=")[2] for word in command if word.startswith("--command="))
    return shlex.split(text)


def test_tpu_vm_creates_installs_runs_and_deletes():
    create, archive, copy, setup, run, delete = printed(script("tpu_vm.sh", *TPU, "--spot", "--dry-run", "--", *WORDS))
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "hexa"]
    assert {"--accelerator-type=v5litepod-64", "--zone=us-west4-a", "--spot"} <= set(create)
    assert archive[:2] == ["git", "archive"] and copy[-1] == "gs://bucket/code/hexa_jax.tar.gz"
    assert "--worker=all" in setup and "jax[tpu]" in remote(setup)
    assert "--worker=all" in run and remote(run)[-4:] == ["hexa_jax.main", *WORDS]
    assert delete[4:6] == ["delete", "hexa"]
    kept = printed(script("tpu_vm.sh", *TPU, "--keep", "--project=p", "--dry-run", "--", *WORDS))
    mount = "mount -t nfs host:/share /mnt/shared"
    first = printed(script("tpu_vm.sh", *TPU, f"--setup={mount}", "--dry-run", "--", *WORDS))[3]
    assert remote(first) == mount.split() and "--worker=all" in first
    assert [command[4] for command in kept if command[0] == "gcloud" and command[1] == "compute"] == [
        "create",
        "ssh",
        "ssh",
    ]
    assert "--spot" not in kept[0] and "--project=p" in kept[0]


GCLOUD = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/calls"
case "$*" in *" $(cat "$(dirname "$0")/refuses") "*) echo "ERROR: ALREADY_EXISTS" >&2; exit 1 ;; esac
"""


@pytest.mark.parametrize(
    ("refused", "calls"),
    [("create", ["create"]), ("ssh", ["create", "ssh", "delete"]), ("nothing", ["create", "ssh", "ssh", "delete"])],
)
def test_tpu_vm_deletes_what_it_created_and_nothing_else(refused, calls, tmp_path):
    for name, text in {"gcloud": GCLOUD, "git": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "refuses").write_text(refused)
    done = script("tpu_vm.sh", *TPU, "--", "--config=c", path=f"{tmp_path}:")
    assert done.returncode == (refused != "nothing")
    made = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[3] for words in made if words[0] == "compute"] == calls
    assert ("hexa was not created" in done.stderr) == (refused == "create")


def test_gke_builds_pushes_and_starts():
    build, push, start = printed(script("gke.sh", *GKE, "--restarts=3", "--dry-run", "--", *WORDS))
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "registry/hexa:tpu"]
    assert start[:3] == ["xpk", "workload", "create"] and "--max-restarts=3" in start
    assert remote(start) == ["python", "-m", "hexa_jax.main", *WORDS]


def test_slurm_starts_a_process_for_each_gpu():
    (command,) = printed(script("slurm.sh", "--dry-run", *WORDS))
    assert command[0] == "srun" and command[-4:] == ["hexa_jax.main", *WORDS]
    text = (LAUNCH / "slurm.sh").read_text()
    assert "#SBATCH --gpus-per-task=1" in text and "#SBATCH --signal=TERM@" in text and "#SBATCH --requeue" in text


def test_slurm_explains_itself_without_a_cluster():
    done = script("slurm.sh", "--help")
    assert done.returncode == 0 and "sbatch --nodes=4" in done.stdout and "#SBATCH" not in done.stdout


def test_the_image_has_what_the_program_needs():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in text.splitlines():
        if line.startswith("COPY"):
            assert all((REPOSITORY / name).exists() for name in line.split()[1:-1]), line
    ignored = (REPOSITORY / ".dockerignore").read_text().split()
    assert not {"hexa_jax", "configs", "requirements.txt"} & set(ignored) and ".venv" in ignored


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("tpu_vm.sh", TPU[1:] + ["--", "x"], "--name is missing"),
        ("tpu_vm.sh", TPU, "nothing to run"),
        ("tpu_vm.sh", ["--zoom=1"], "unknown argument --zoom=1"),
        ("tpu_vm.sh", ["--spot=1"], "unknown argument --spot=1"),
        ("tpu_vm.sh", ["--name"], "unknown argument --name"),
        ("tpu_vm.sh", ["spot"], "unknown argument spot"),
        ("gke.sh", ["--spot"], "unknown argument --spot"),
        ("gke.sh", GKE[:4] + ["--", "x"], "--image is missing"),
        ("slurm.sh", ["--dry-run"], "words for hexa_jax.main are missing"),
    ],
)
def test_mistakes(name, words, message):
    done = script(name, *words)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_help_is_the_head_of_the_script():
    for name in STARTED[:2]:
        done = script(name, "--help")
        assert done.returncode == 0 and "--dry-run" in done.stdout and "set -euo" not in done.stdout
    assert all(os.access(LAUNCH / name, os.X_OK) for name in STARTED)
