"""The PyTorch side of the step benchmark: it does the same work as ours; turns, FLOPs and rows are what they say."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import compare, ours, step, turns
from benchmarks.flops import product_flops
from benchmarks.hardware import add_rows, peak_of
from benchmarks.turns import Worker, WorkerError, alternate, ratio
from hexa_jax import objective
from hexa_jax.command import parse_command
from hexa_jax.models.norm import ADVERSARIAL, CLEAN
from hexa_jax.models.resnet import STAGES
from hexa_jax.objective import CUTMIX

# ---- The same step -------------------------------------------------------------------------------------------------------------

# Ours has made a step before, PyTorch has not: no momentum.
SETTINGS = ("--config.optimizer.momentum=0",)


def both_sides(name, variant):
    """Our compiled variant, and the same step in PyTorch before anything was copied."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: there is nothing to compare with")
    from benchmarks.peers.torch_step import TorchStep

    arguments = [*compare.settings_of(name), *SETTINGS]
    config = parse_command(["x", *arguments, "--workdir=unused"]).config
    config.update_from_flattened_dict(compare.in_common(config, augment=False))
    views = ours.VARIANTS[compare.VIEWS[variant]]
    torch.set_num_threads(1)
    return ours.Variant(config, views), TorchStep(compare.case_of(config, views))


def pairs_of(params, network):
    """(our leaf's path, its PyTorch parameter) of a network, in PyTorch's shape by `to_torch`."""
    backbone = network.backbone
    found = [(("backbone", "conv1", "kernel"), backbone.conv1.weight)]
    found += norm_pairs(("backbone", "bn1"), backbone.norm1)
    names = [f"layer{s + 1}_{i}" for s, n in enumerate(STAGES[10]) for i in range(n)]
    for name, block in zip(names, backbone.blocks, strict=True):
        for i, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True), start=1):
            found.append((("backbone", name, f"conv{i}", "kernel"), conv.weight))
            found += norm_pairs(("backbone", name, f"bn{i}"), norm)
        if block.has_shortcut:
            found.append((("backbone", name, "downsample_conv", "kernel"), block.shortcut.weight))
            found += norm_pairs(("backbone", name, "downsample_bn"), block.shortcut_norm)
    for i, linear in enumerate((network.head.linear1, network.head.linear2), start=1):
        found.append((("head", f"linear{i}", "kernel"), linear.weight))
        found.append((("head", f"linear{i}", "bias"), linear.bias))
    if network.head.norm is not None:
        found += norm_pairs(("head", "bn1"), network.head.norm)
    ours_flat = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert ours_flat == {path for path, _ in found} and len(found) == len(list(network.parameters()))
    return found


def norm_pairs(path, norm):
    found = []
    for branch, prefix in ((CLEAN, ""), (ADVERSARIAL, "adversarial_")):
        if branch in norm.sets:
            found.append(((*path, f"{prefix}scale"), norm.sets[branch].weight))
            found.append(((*path, f"{prefix}bias"), norm.sets[branch].bias))
    return found


def leaf_of(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def to_torch(leaf):
    """HWIO -> OIHW, [in, out] -> [out, in]."""
    leaf = np.asarray(leaf)
    return leaf.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim])


def copy_network(params, network):
    import torch

    with torch.no_grad():
        for path, parameter in pairs_of(params, network):
            parameter.copy_(torch.from_numpy(to_torch(leaf_of(params, path)).copy()))


def statistics_of(peer):
    """(path in our statistics, PyTorch's {"mean", "var"}) of the first and the last BatchNorm, for each branch."""
    backbone, found = peer.network.backbone, []
    ends = {"bn1": backbone.norm1, "layer4_0": backbone.blocks[-1].norms[-1]}
    for name, norm in ends.items():
        for branch, one in norm.sets.items():
            place = (f"{branch}_batch_stats", "backbone", *((name,) if name == "bn1" else (name, "bn2")))
            found.append((place, {"mean": one.running_mean, "var": one.running_var}))
    return found


def copy_all(variant, peer):
    """State and batch of ours into PyTorch."""
    import torch

    state, batch = jax.device_get((variant.state, variant.batch))
    whole = lambda leaf: torch.from_numpy(np.array(leaf).reshape(-1, *leaf.shape[2:]))  # noqa: E731 without microbatches
    copy_network(state.params, peer.network)
    for path, norm in statistics_of(peer):
        for name, value in norm.items():
            value.copy_(torch.from_numpy(np.array(leaf_of(state.batch_stats, (*path, name)))))
    peer.batch.crops = [whole(crops) for crops in batch.crops]
    peer.batch.index = whole(batch.index).long()
    if peer.case.method == "moco":
        peer.batch.key_crops, peer.batch.key_row = whole(batch.key_crops), whole(batch.key_row).long()
        copy_network(state.method.key_params, peer.method.key_network)
        peer.method.queue = torch.from_numpy(np.array(state.method.queue))
        peer.method.position = int(state.method.position)
    else:
        peer.method.assignments = torch.from_numpy(np.array(state.method.assignments)).long()
        peer.method.prototypes = torch.from_numpy(np.array(state.method.prototypes))
        peer.method.bank = torch.from_numpy(np.array(state.method.bank))
        peer.method.position = int(state.method.position)


@pytest.mark.parametrize(
    "name, variant",
    [
        ("tiny_moco", "auxiliary"),
        ("tiny_moco", "main"),
        ("tiny_8crop", "cutmix"),
        pytest.param("tiny_moco", "cutmix", marks=pytest.mark.slow),
        pytest.param("tiny_8crop", "main", marks=pytest.mark.slow),
        pytest.param("tiny_8crop", "plain", marks=pytest.mark.slow),
    ],
)
def test_both_sides_compute_one_step(name, variant, monkeypatch):
    """Losses, parameters, keys or bank and running statistics after one step, from equal states; CutMix's boxes are ours."""
    mine, peer = both_sides(name, variant)
    import torch

    copy_all(mine, peer)
    monkeypatch.setattr(objective, "PICTURES", peer.case.batch_size)
    with jax.set_mesh(mine.trainer.mesh):
        shown = jax.device_get(mine.trainer.compile().views(mine.state, mine.batch, None))
    images = {
        view: [torch.from_numpy(np.array(x, np.float32)).flatten(0, 2).permute(0, 3, 1, 2) for x in crops]
        for view, crops in shown.images.items()
    }
    attack = peer.attack

    def check_attack(crops, y, slopes):
        """A pixel whose slope is a rounding error may go the other way, and its crop's gradients with it: on with ours."""
        for theirs, wanted in zip(attack(crops, y, slopes), images[ADVERSARIAL], strict=True):
            assert ((theirs - wanted).abs() > 1e-6).float().mean() < 2e-4
        return images[ADVERSARIAL]

    monkeypatch.setattr(peer, "attack", check_attack)
    if variant == "cutmix":
        partner = torch.from_numpy(np.array(shown.partner)).long().flatten()
        share = torch.from_numpy(np.array(shown.lam[CUTMIX])).flatten(0, 1)
        assert 0.05 < float(share.mean()) < 0.95
        monkeypatch.setattr(peer, "mix", lambda crops: (images[CUTMIX], share, partner))
    before = jax.device_get(mine.state)
    mine.run()
    losses = {kind: float(loss) for kind, loss in peer.step().items()}
    wanted = {kind.removeprefix("loss_"): float(v) for kind, v in mine.metrics.items() if kind.startswith("loss_")}
    assert losses.keys() == wanted.keys()
    for kind, value in losses.items():
        assert value == pytest.approx(wanted[kind], rel=1e-5), kind
    after = jax.device_get(mine.state)
    whole, apart = 0.0, 0.0
    for path, parameter in pairs_of(after.params, peer.network):
        start, end = to_torch(leaf_of(before.params, path)), to_torch(leaf_of(after.params, path))
        step_length, difference = np.linalg.norm(end - start), np.linalg.norm(end - parameter.detach().numpy())
        if path == ("head", "linear1", "bias") and peer.case.head_batch_norm:
            assert max(step_length, difference) < 1e-4  # the BatchNorm behind it takes it away
            continue
        assert step_length > 1e-5, path  # all others learn
        assert difference < 0.05 * step_length, path
        whole, apart = whole + step_length**2, apart + difference**2
    # Our two programs, the step and its views, may disagree about a slope at a rounding error of zero: one pixel of one crop.
    assert apart**0.5 < 0.01 * whole**0.5
    for path, norm in statistics_of(peer):
        for name, value in norm.items():
            end, start = (leaf_of(state.batch_stats, (*path, name)) for state in (after, before))
            assert np.abs(end - start).max() > 1e-4
            np.testing.assert_allclose(value.numpy(), end, rtol=2e-3, atol=1e-4, err_msg=f"{path} {name}")
    if peer.case.method == "moco":
        np.testing.assert_allclose(peer.method.queue.numpy(), after.method.queue, atol=1e-5)
        assert peer.method.position == int(after.method.position)
        key = peer.method.key_network.backbone.conv1.weight.detach().numpy()
        np.testing.assert_allclose(key, to_torch(after.method.key_params["backbone"]["conv1"]["kernel"]), atol=1e-6)
    else:
        np.testing.assert_allclose(peer.method.bank.numpy(), after.method.bank, atol=1e-5)


def test_boxes_are_pasted_where_they_are():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from benchmarks.peers.torch_step import paste

    x, partner = torch.zeros(1, 2, 8, 8, 3), torch.ones(1, 2, 8, 8, 3)
    box = torch.tensor([[[1, 4, 2, 8], [5, 5, 0, 8]]])  # 3 rows of 6 columns; nothing
    mixed, share = paste(x, partner, box)
    assert mixed[0, 0, 1:4, 2:8].min() == 1 and mixed.sum() == 3 * 6 * 3
    assert share.tolist() == [[1 - 18 / 64, 1.0]]


def test_the_peer_says_what_it_cannot_do():
    arguments = ["--config=configs/tiny.py:method=simclr", "--workdir=unused"]
    config = parse_command(["x", *arguments]).config
    with pytest.raises(compare.ConfigError, match="has no peer: use moco or deepcluster"):
        compare.case_of(config, {})
    config = parse_command(["x", *compare.settings_of("tiny_moco"), "--workdir=unused"]).config
    for views, message in [({"norm": "l2"}, "views.norm='l2'"), ({"random_start": True}, "views.random_start=True")]:
        with pytest.raises(compare.ConfigError, match=message):
            compare.case_of(config, views)


# ---- FLOPs ---------------------------------------------------------------------------------------------------------------------


def flops(function, *shapes):
    return product_flops(jax.make_jaxpr(function)(*[jnp.zeros(shape) for shape in shapes]))


def convolution(stride):
    return lambda x, w: jax.lax.conv_general_dilated(
        x, w, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_flops_are_those_counted_by_hand():
    assert flops(jnp.matmul, (5, 7), (7, 3)) == 2 * 5 * 7 * 3
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 5, 7), (4, 7, 3)) == 4 * 2 * 5 * 7 * 3
    forward = 2 * (2 * 4 * 4 * 6) * (3 * 3 * 5)  # outputs, taps
    assert flops(convolution(2), (2, 8, 8, 5), (3, 3, 5, 6)) == forward
    both = jax.grad(lambda x, w: jnp.sum(convolution(2)(x, w) ** 2), (0, 1))
    counted = flops(both, (2, 8, 8, 5), (3, 3, 5, 6))  # each gradient again costs about as much: borders differ
    assert 2.6 * forward < counted < 3.4 * forward
    looped = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]  # noqa: E731
    assert flops(looped, (4, 4)) == 5 * 2 * 4 * 4 * 4
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert flops(branches, (4, 4)) == 2 * 2 * 4 * 4 * 4
    assert flops(jax.jit(lambda x: jnp.exp(x) + 1), (4, 4)) == 0


# ---- Turns ---------------------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from benchmarks.turns import serve
name, log, mode = sys.argv[1:4]
def make():
    print("noise on stdout")
    if mode == "raises":
        raise RuntimeError("no\\nroom")
    def run(steps):
        with open(log, "a") as file:
            file.write(f"{name}{steps} ")
        if mode == "dies":
            os._exit(3)
        if mode == "hangs":
            time.sleep(60)
        return 0.5 * steps
    return run, {"step_seconds": 0.1, "name": name}
sys.exit(serve(make))
"""


def worker(name, log, mode="works", timeout=30.0):
    return lambda: Worker(name, [sys.executable, "-c", WORKER, name, str(log), mode], timeout)


def test_turns_alternate_and_the_first_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    log = tmp_path / "log"
    found = alternate({"a": worker("a", log), "b": worker("b", log)}, 2, 0.3)
    assert log.read_text().split() == ["a3", "b3"] * 3 and found["steps"] == 3
    assert found["seconds"] == {"a": [0.5, 0.5], "b": [0.5, 0.5]} and found["facts"]["b"]["name"] == "b"


@pytest.mark.parametrize(
    "mode, timeout, message",
    [
        ("raises", 30, "b: RuntimeError: no room"),
        ("dies", 30, "b stopped with exit code 3"),
        ("hangs", 1.5, "b gave no answer within 2 s"),
    ],
)
def test_a_worker_that_fails_ends_the_comparison(tmp_path, monkeypatch, mode, timeout, message):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    begin = time.monotonic()
    with pytest.raises(WorkerError) as error:
        alternate({"a": worker("a", tmp_path / "log"), "b": worker("b", tmp_path / "log", mode, timeout)}, 2, 0.1)
    assert str(error.value) == message and time.monotonic() - begin < 25


def test_the_ratio_is_above_one_where_ours_is_faster():
    assert ratio([1.0, 2.0, 1.0], [3.0, 3.0, 2.0]) == (3.0, 1.5, 3.0)


# ---- Rows and the command ------------------------------------------------------------------------------------------------------


def test_rows_are_added_to_those_before(tmp_path):
    path = tmp_path / "new" / "rows.json"
    add_rows(path, [{"a": 1}])
    add_rows(path, [{"b": 2}, {"c": 3}])
    assert json.loads(path.read_text()) == [{"a": 1}, {"b": 2}, {"c": 3}]
    add_rows(None, [{"a": 1}])
    assert peak_of("NVIDIA H200 NVL").bfloat16 < peak_of("NVIDIA H200").bfloat16 and peak_of("cpu") is None


@pytest.mark.parametrize(
    "words, message",
    [
        (["--cases=tiny_moco", "--variants=plain,hard"], "--variants=hard is not known: use plain, auxiliary"),
        (["--cases=resnet51"], "--cases=resnet51 is not known: use moco_resnet50"),
        (["--cases=tiny_moco", "--config=configs/tiny.py"], "give --config or --cases, not both"),
        (["--cases=tiny_moco", "--peer-python=/nonexistent/python"], "cannot be started: No such file"),
        (["--cases=tiny_moco", "--config.precision=float64"], "config.precision='float64' has no peer"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    words = words if any("peer-python" in word for word in words) else [*words, f"--peer-python={sys.executable}"]
    assert step.main(["step.py", "--peer", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("step: ") and message in lines[-1]


def run_step(*words):
    command = [sys.executable, "benchmarks/step.py", "--peer", "--cases=tiny_moco", "--variants=plain", *words]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env, check=False)


def test_a_case_from_the_command_line(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    rows_file = tmp_path / "rows.json"
    done = run_step("--repeats=2", "--turn-seconds=0.05", f"--rows={rows_file}")
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(rows_file.read_text())
    assert row["case"] == "tiny_moco" and row["variant"] == "plain" and row["turns"] == "alternating"
    assert row["ratio"] == pytest.approx(row["torch"]["seconds"] / row["ours"]["seconds"])
    assert row["ratio_low"] <= row["ratio_high"] and len(row["ours"]["all_seconds"]) == 2
    assert row["ours"]["images_per_second"] == pytest.approx(32 / row["ours"]["seconds"])
    assert row["flops"] > 1e6 and not row["not_finite"] and row["step"]["method"] == "moco"
    assert {"date", "command", "host", "versions"} <= row.keys() and row["torch"]["versions"]["torch"]
    assert all(
        math.isfinite(row[side]["losses"]["clean" if side == "torch" else "loss_clean"]) for side in ("ours", "torch")
    )
    assert f"{row['ratio']:.2f}" in done.stdout


@pytest.mark.slow  # a step compiled and timed, to see a message
def test_without_pytorch_ours_runs_alone(tmp_path):
    rows_file = tmp_path / "rows.json"
    done = run_step("--repeats=1", "--turn-seconds=0.05", f"--rows={rows_file}", "--peer-python=/bin/false")
    assert done.returncode == 1 and "/bin/false has no PyTorch (pip install torch): ours runs alone" in done.stderr
    (row,) = json.loads(rows_file.read_text())
    assert "ratio" not in row and row["ours"]["seconds"] > 0


def test_every_case_is_a_config_that_both_sides_understand():
    for name in compare.CASES:
        config = parse_command(["x", *compare.settings_of(name), "--workdir=unused"]).config
        config.update_from_flattened_dict(compare.in_common(config, augment=False))
        for variant in compare.VIEWS.values():
            case = compare.case_of(config, ours.VARIANTS[variant])
            again = type(case).from_json(json.loads(json.dumps(dataclasses.asdict(case))))
            assert again == case and case.batch_size == config.batch_size
            assert bool(case.alpha1) == ("adversarial" in variant) and bool(case.alpha2) == ("cut-mixed" in variant)
