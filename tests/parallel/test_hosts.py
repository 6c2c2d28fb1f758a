"""Several processes: what they are told, and that two of them do what one does. Real processes, which talk over gloo."""

import functools
import os
import signal
import time

import pytest
from command_line import arguments, final_state, finish, free_port, lines, run, run_until, start
from same_run import KINDS, assert_same, devices, what_was_learned

from hexa_jax.parallel import processes
from hexa_jax.parallel.processes import DistributedError, Placement


def start_pair(words):
    """Two processes with two devices each; the second finds its place in the variables."""
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--coordinator={address}", "--num_processes=2", "--process_id=0"]
    variables = dict(zip(processes.VARIABLES, (address, "2", "1"), strict=True))
    return start([*words, *flags], env=devices(2)), start(words, env=devices(2) | variables)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Workdirs of runs in one process with four devices, by kind; each is run when it is asked for."""
    root = tmp_path_factory.mktemp("alone")

    @functools.cache
    def workdir(kind):
        ended = run(arguments(kind, root / kind, **KINDS[kind]), env=devices(4))
        assert ended.code == 0, ended.stderr
        return root / kind

    return workdir


@pytest.mark.parametrize("kind", ["moco", pytest.param("deepcluster", marks=pytest.mark.slow)])
def test_two_processes_do_what_one_does(alone, tmp_path, kind):
    ended = [finish(process) for process in start_pair(arguments(kind, tmp_path, **KINDS[kind]))]
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert_same(what_was_learned(tmp_path), what_was_learned(alone(kind)))
    assert "step 8/8" in ended[0].stdout and "step" not in ended[1].stdout  # one of them speaks
    losses, expected = (
        [line["loss"] for line in lines(folder) if "loss" in line] for folder in (tmp_path, alone(kind))
    )
    assert losses == pytest.approx(expected, rel=1e-6) and len(losses) == 8
    assert (tmp_path / "report" / "index.html").is_file()
    accuracy = [line["knn_accuracy"] for line in lines(tmp_path) if "knn_accuracy" in line]
    assert (
        accuracy == [line["knn_accuracy"] for line in lines(alone(kind)) if "knn_accuracy" in line]
        and len(accuracy) == 3
    )


@pytest.mark.slow  # test_parallel does the same in one process
@pytest.mark.parametrize("kind", KINDS)
def test_four_microbatches_do_what_four_devices_do(alone, tmp_path, kind):
    ended = run(arguments(kind, tmp_path, **KINDS[kind], **{"runtime.microbatches": 4}), env=devices(1))
    assert ended.code == 0, ended.stderr
    assert_same(what_was_learned(tmp_path), what_was_learned(alone(kind)))


@pytest.mark.slow  # two minutes
def test_sigterm_to_one_stops_both_and_one_process_goes_on(alone, tmp_path):
    words = arguments("deepcluster", tmp_path, **KINDS["deepcluster"])
    first, second = start_pair(words)
    run_until(first, "step 2/8")
    second.send_signal(signal.SIGTERM)
    ended = [finish(process) for process in (first, second)]
    assert [process.code for process in ended] == [143, 143], ended[0].stderr + ended[1].stderr
    assert all("SIGTERM: saved step" in process.stderr for process in ended)
    assert final_state(tmp_path)[0] < 8
    ended = run(words, env=devices(4))
    assert ended.code == 0, ended.stderr
    assert "resuming at step" in ended.stdout
    assert_same(what_was_learned(tmp_path), what_was_learned(alone("deepcluster")))


@pytest.mark.slow  # two minutes
def test_a_killed_process_takes_the_other_with_it_and_the_pair_resumes(alone, tmp_path):
    words = arguments("moco", tmp_path, **KINDS["moco"])
    first, second = start_pair(words)
    run_until(first, "step 4/8")  # a checkpoint of step 3 is there, or on its way
    second.kill()
    begin = time.monotonic()
    ended = finish(first, timeout=120)
    assert time.monotonic() - begin < 60 and ended.code not in (0, 143) and ended.stderr
    ended = [finish(process) for process in start_pair(words)]
    assert [process.code for process in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert_same(what_was_learned(tmp_path), what_was_learned(alone("moco")))


# ---- Who the others are --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # inside sbatch or salloc, but not under srun
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "SLURM"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_launchers(variables, expected):
    assert processes.launcher(variables) == expected


@pytest.mark.parametrize(
    "given, variables, message",
    [
        (Placement("host:1"), {}, "--num_processes is missing: a run of several processes needs all of"),
        (Placement("host:1", 2), {}, "--process_id is missing"),
        (Placement(None, 2, 0), {}, "--coordinator is missing"),
        (Placement("host", 2, 0), {}, "--coordinator='host' must be HOST:PORT"),
        (Placement("host:1", 2, 2), {}, "--process_id=2 must be 0 to 1"),
        (Placement("host:1", 0, 0), {}, "--num_processes=0 must be positive"),
        (Placement("host:1"), {"JAX_NUM_PROCESSES": "two"}, "num_processes='two' of the environment is no number"),
    ],
)
def test_mistakes_are_one_line(given, variables, message):
    with pytest.raises(DistributedError) as caught:
        processes.initialize(given, variables)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flags_come_before_variables_and_variables_before_the_launcher():
    variables = {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert processes._complete(Placement("a:1", None, 0), variables) == Placement("a:1", 4, 0)
    variables = {"JAX_COORDINATOR_ADDRESS": "b:2", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert processes._complete(Placement(), variables) == Placement("b:2", 2, 1)


def test_a_tpu_without_metadata_is_alone_but_a_pod_that_does_not_answer_is_an_error(monkeypatch):
    def initialize(*_, **__):
        raise problem

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    monkeypatch.setattr(processes, "launcher", lambda environment: processes.TPU_VM)
    problem = ValueError("coordinator_address should be defined.")
    processes.initialize(Placement(), {})
    problem = RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")
    with pytest.raises(DistributedError, match="cannot join the other processes at Cloud TPU: DEADLINE_EXCEEDED"):
        processes.initialize(Placement(), {})


def test_one_process_alone_does_not_connect(monkeypatch):
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: pytest.fail("connected"))
    processes.initialize(Placement(), {})
    processes.initialize(Placement("127.0.0.1:1", 1, 0), {})
    assert os.getpid() and processes.is_main_process()


def test_a_process_says_whom_it_waits_for(monkeypatch, capsys):
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **__: None)
    processes.initialize(Placement("127.0.0.1:7", 2, 1), {})
    assert "process 1 of 2: waiting for the others at 127.0.0.1:7" in capsys.readouterr().err
