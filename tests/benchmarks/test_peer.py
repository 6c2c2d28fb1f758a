"""The step benchmark: its mistakes, the count of FLOPs, turns of two processes, rows; and itself in miniature."""

import json
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import small  # noqa: F401  (it adds resnet6)
from command_line import REPOSITORY, environment
from jax.sharding import PartitionSpec as P

from benchmarks import step, turns
from benchmarks.flops import product_flops
from benchmarks.hardware import PEAKS, add_rows, peak_of
from benchmarks.ours import VARIANTS
from benchmarks.turns import Refusal, Worker, WorkerError, alternate, one_after_the_other, ratio
from hexa_jax.parallel.mesh import make_mesh

TINY = f"--config={REPOSITORY}/configs/tiny.py"


# ---- the command line ----


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--peer"], "--config is missing"),
        (["--peer", "--cases=huge"], "--cases=huge is not known: use moco_resnet50, "),
        (["--peer", "--cases=tiny_moco", "--variants=bar"], "--variants=bar is not known: use plain, "),
        (["--peer", "--cases=tiny_moco", "--variants="], "--variants='' is not known"),
        (["--peer", "--cases=tiny_moco", TINY], "give --config or --cases, not both"),
        (["--peer", "--cases=tiny_moco", "--compile=quick"], "invalid choice: 'quick'"),
        (["--peer", "--cases=tiny_moco", "--peer-python=/no/python"], "--peer-python=/no/python cannot be started: No such"),
        (["--peer", "--cases=tiny_moco", "--config.model.width=3"], "unknown config key 'model.width'"),
        (["--peer", "--cases=tiny_moco", "--config.precision=float64"], "has no peer: use bfloat16 or float32"),
        (["--peer", "--cases=tiny_moco", "--config.views.norm=l2"], "the peer knows no views.norm='l2', only 'linf'"),
        (["--peer", f"{TINY}:method=simclr"], "config.method='simclr' has no peer: use moco or deepcluster"),
        (["--repeats=0", TINY], "--repeats=0 must be positive"),
        (["--repeats=x", TINY], "invalid int value: 'x'"),
        (["--turn-seconds=nan", TINY], "--turn-seconds=nan must be positive"),
        (["--rows=/dev/null/rows.json", TINY], "--rows=/dev/null/rows.json cannot take rows"),
        (["--reepeats=3", TINY], "unknown flag --reepeats"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(capfd, words, expected):
    """Found before a worker starts, or a table's head is printed."""
    assert step.main(["benchmarks/step.py", *words]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert not out and line.startswith("step: ") and expected in line


# ---- rows ----


def test_rows_are_added_to_those_of_former_runs(tmp_path):
    path = tmp_path / "new" / "rows.json"
    add_rows(None, [{"a": 0}])
    add_rows(path, [{"a": 1}])
    add_rows(path, [])
    add_rows(path, [{"a": 2}, {"a": 3}])
    assert json.loads(path.read_text()) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("text", ["{}", "[", ""])
def test_a_file_that_holds_no_rows_is_left_alone(tmp_path, capsys, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert step.main(["benchmarks/step.py", TINY, f"--rows={path}"]) == 2
    assert f"--rows={path} cannot take rows" in capsys.readouterr().err and path.read_text() == text


def test_a_device_has_the_peak_of_its_longest_name():
    assert peak_of("NVIDIA H200") == PEAKS["NVIDIA H200"] and peak_of("NVIDIA H200 NVL") == PEAKS["NVIDIA H200 NVL"]
    assert peak_of("NVIDIA A100-SXM4-80GB") == PEAKS["NVIDIA A100"] and peak_of("cpu") is None


# ---- FLOPs ----


def flops_of(function, *shapes):
    return product_flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def convolution(x, kernel):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=names)


def test_flops_of_products():
    assert flops_of(lambda a, b: jnp.tanh(a @ b) + 1, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops_of(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (4, 3, 5), (4, 7, 5)) == 2 * 4 * 3 * 5 * 7
    assert (
        flops_of(jax.grad(lambda a, b: (a @ b).sum(), (0, 1)), (3, 5), (5, 7)) == 3 * 2 * 3 * 5 * 7
    )  # forward and two


def test_flops_of_a_strided_convolution_and_its_gradients():
    """Side 8, stride 2, a border of 1: 4 x 4 outputs, each of 3 x 3 x 6 factors; each gradient takes as many products."""
    shapes, forward = ((2, 8, 8, 6), (3, 3, 6, 10)), 2 * (2 * 4 * 4 * 10) * (3 * 3 * 6)
    loss = lambda x, kernel: jnp.sin(convolution(x, kernel)).sum()  # noqa: E731
    assert flops_of(convolution, *shapes) == forward
    assert flops_of(jax.grad(loss, 0), *shapes) == 2 * forward
    assert flops_of(jax.grad(loss, 1), *shapes) == 2 * forward
    assert flops_of(jax.grad(loss, (0, 1)), *shapes) == 3 * forward


def test_flops_of_a_grouped_convolution():
    def grouped(x, kernel):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=names, feature_group_count=3)

    assert flops_of(grouped, (1, 4, 4, 6), (1, 1, 2, 9)) == 2 * (4 * 4 * 9) * 2


def test_flops_of_loops_branches_and_devices():
    product = 2 * 4**3

    def five_times(x):
        return jax.lax.scan(lambda carry, _: (jax.jit(lambda c: c @ x)(carry), None), x, length=5)[0]

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    mesh = make_mesh(jax.devices()[:4])
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert flops_of(five_times, (4, 4)) == 5 * product
    assert flops_of(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: c @ x, x), (4, 4)) == 3 * product
    assert flops_of(either, (4, 4)) == 2 * product
    assert flops_of(split, (16, 4)) == 4 * product  # each of four devices has 4 x 4


# ---- turns ----

TOY = """
import json, os, pathlib, sys, time
from benchmarks.turns import Refusal, serve
name, log, manner = sys.argv[1:]
calls = []

def turn(steps):
    calls.append(steps)
    with open(log, "a") as file:
        file.write(f"{name}{steps} ")
    print("noise that is no message")
    if manner == "late death" and len(calls) == 2:
        os._exit(7)
    if manner == "late error" and len(calls) == 2:
        raise ValueError("no\\nmemory")
    if manner == "hang":
        time.sleep(60)
    return steps * (1000.0 if len(calls) == 1 else len(calls))

def make():
    print("more noise")
    if manner == "death":
        os._exit(3)
    if manner == "error":
        raise RuntimeError("two\\nlines")
    if manner == "refusal":
        raise Refusal("not\\nhere")
    return turn, {"step_seconds": 0.1 if name == "A" else 0.2}

sys.exit(serve(make))
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Starters of two workers that do nothing, A and B as told; and the file in which they write their turns."""
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    program, log = tmp_path / "toy.py", tmp_path / "log"
    program.write_text(TOY)
    started = []

    def starters(timeout=20.0, **manners):
        def start(name):
            worker = Worker(f"side {name}", [sys.executable, str(program), name, str(log), manners[name]], timeout)
            started.append(worker)
            return worker

        return {name: lambda name=name: start(name) for name in manners}

    yield starters, log
    assert all(worker.process.poll() is not None for worker in started)  # whatever happened, none is left


def test_turns_alternate_and_the_first_one_is_not_counted(toys):
    starters, log = toys
    found = alternate(starters(A="", B=""), turns=3, seconds=1.0)
    assert log.read_text().split() == ["A5", "B5"] * 4  # 5 steps of the slower one last a second
    assert found["steps"] == 5 and found["seconds"] == {"A": [2.0, 3.0, 4.0], "B": [2.0, 3.0, 4.0]}
    assert found["facts"] == {"A": {"step_seconds": 0.1}, "B": {"step_seconds": 0.2}}


def test_one_after_the_other(toys):
    starters, log = toys
    found = one_after_the_other(starters(A="", B=""), turns=2, seconds=0.4)
    assert log.read_text().split() == ["A4"] * 3 + ["B2"] * 3
    assert found["steps"] == 4 and found["seconds"] == {"A": [2.0, 3.0], "B": [2.0, 3.0]}
    assert found["facts"].keys() == {"A", "B"}


@pytest.mark.parametrize("facts, seconds, steps", [([0.1], 1, 10), ([1e-6, 1e-5], 1, 100), ([3.0], 1, 1)])
def test_a_turn_has_one_to_a_hundred_steps(facts, seconds, steps):
    assert turns._steps([{"step_seconds": value} for value in facts], seconds) == steps


@pytest.mark.parametrize(
    "manner, timeout, message",
    [
        ("death", 20, "side B stopped with exit code 3"),
        ("late death", 20, "side B stopped with exit code 7"),
        ("error", 20, "side B: RuntimeError: two lines"),
        ("late error", 20, "side B: ValueError: no memory"),
        ("hang", 2, "side B gave no answer within 2 s"),
    ],
)
def test_a_worker_that_fails_is_one_line(toys, manner, timeout, message):
    starters, _ = toys
    with pytest.raises(WorkerError) as raised:
        alternate(starters(timeout, A="", B=manner), turns=2, seconds=0.1)
    assert str(raised.value) == message and not isinstance(raised.value, Refusal)


def test_a_refusal_needs_no_traceback(toys, capfd):
    starters, _ = toys
    with pytest.raises(Refusal, match=r"^not here$"):
        alternate(starters(A="refusal"), turns=1, seconds=0.1)
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_no_worker_is_told(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    with pytest.raises(WorkerError, match="echo is no worker: it said b'hello"):
        Worker("echo", [sys.executable, "-c", "print('hello')"], 20.0)


def test_ratio_is_that_of_medians_with_the_extremes_of_pairs():
    assert ratio([1.0, 2.0, 4.0], [2.0, 6.0, 6.0]) == (3.0, 1.5, 3.0)
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


# ---- the whole in miniature ----

COMMAND = [sys.executable, "benchmarks/step.py", "--peer", "--cases=tiny_moco", "--variants=plain", "--repeats=1"]


def run(tmp_path, *words):
    """The command in a process of its own, and the rows it wrote."""
    path = tmp_path / "rows.json"
    path.write_text('[{"former": "row"}]')
    command = [*COMMAND, "--turn-seconds=0.05", f"--rows={path}", *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    former, *rows = json.loads(path.read_text()) if path.exists() else [None]
    assert former == {"former": "row"}
    return done, rows


def check_row(row, sides):
    """What every row has."""
    assert row["benchmark"] == "step" and row["case"] == "tiny_moco" and row["variant"] == "plain"
    assert {"date", "command", "commit", "host", "versions"} <= row.keys() and "error" not in row
    assert row["step"]["method"] == "moco" and row["step"]["alpha1"] == row["step"]["alpha2"] == 0
    assert row["notes"] == [] and row["turns"] == "alternating" and row["not_finite"] is False
    assert row["flops"] > 1e6 and row["peak"] is None and row["steps_a_turn"] >= 1
    assert row["augmentation"] == "left out on both sides"
    for side in sides:
        assert row[side]["images_per_second"] == pytest.approx(32 / row[side]["seconds"])
        assert row[side]["flops_per_second"] == pytest.approx(row["flops"] / row[side]["seconds"])
        assert (
            row[side]["seconds"] == statistics.median(row[side]["all_seconds"])
            and row[side]["losses"]["clean" if side == "torch" else "loss_clean"] > 0
        )


def test_a_miniature_beside_torch(tmp_path):
    pytest.importorskip("torch", reason="compares with PyTorch")
    done, rows = run(tmp_path)
    assert done.returncode == 0, done.stderr
    (row,) = rows
    check_row(row, ("ours", "torch"))
    assert row["ratio"] == pytest.approx(row["torch"]["seconds"] / row["ours"]["seconds"])
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["torch"]["compile"] == "off"
    line = done.stdout.splitlines()[-1].split()
    assert line[0] == "plain" and float(line[3]) == pytest.approx(row["ratio"], abs=0.006)


def test_without_torch_ours_runs_alone(tmp_path):
    done, rows = run(tmp_path, "--peer-python=/bin/false")
    assert done.returncode == 1
    assert "step: /bin/false has no PyTorch (pip install torch): ours runs alone" in done.stderr.splitlines()
    (row,) = rows
    check_row(row, ("ours",))
    assert "torch" not in row and "ratio" not in row
    assert done.stdout.splitlines()[-1].split()[2:4] == ["-", "-"]


def test_sizes_that_do_not_fit_are_told_once(capfd):
    words = ["--peer", "--cases=tiny_moco", "--config.batch_size=33", "--peer-python=/bin/false"]
    assert step.main(["benchmarks/step.py", *words]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if "no PyTorch" not in line] == [
        "step: moco.queue_size=64 is not a multiple of batch_size=33: use 33, 66"
    ]


def test_alone_tells_the_share_of_the_augmentation(tmp_path, monkeypatch, capsys):
    """Two of the variants, to compile less."""
    chosen = ("plain", "adversarial, auxiliary")
    monkeypatch.setattr(step, "VARIANTS", {name: VARIANTS[name] for name in chosen})
    path = tmp_path / "rows.json"
    settings = {"model.backbone": "resnet6", "runtime.num_devices": 1, "augment.jitter_probability": "(0.0,)"}
    words = [TINY, "--repeats=3", f"--rows={path}", *(f"--config.{name}={value}" for name, value in settings.items())]
    assert step.main(["benchmarks/step.py", *words]) == 0
    plain, attacked, augmentation = rows = json.loads(path.read_text())
    assert [row["variant"] for row in rows] == [*chosen, "augmentation"]
    assert all(row["benchmark"] == "step alone" and len(row["ours"]["all_seconds"]) == 3 for row in rows)
    assert attacked["flops"] > 2 * plain["flops"] and "flops" not in augmentation
    seconds = augmentation["ours"]["seconds"]
    assert seconds == statistics.median(augmentation["ours"]["all_seconds"]) > 0
    shares = {row["variant"]: seconds / row["ours"]["seconds"] for row in (plain, attacked)}
    assert augmentation["share_of_step"] == pytest.approx(shares)
    head, *_, last = capsys.readouterr().out.splitlines()
    assert head.startswith("1 x cpu, ")
    plain_share, attacked_share = (f"{100 * share:.1f} %" for share in shares.values())
    assert last == (
        f"augmentation on the device: {1000 * seconds:.2f} ms, {plain_share} of 'plain' "
        f"and {attacked_share} of 'adversarial, auxiliary'"
    )
