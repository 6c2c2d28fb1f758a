"""BYOL and SimSiam against their papers' equations, and in small runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SmallRun, largest_difference, small_config

from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.methods.base import Encode, Spec
from hexa_jax.methods.byol import BYOL
from hexa_jax.models.norm import CLEAN, NormMode
from hexa_jax.training.factory import make_trainer

N, D = 6, 5
SPEC = Spec(batch_size=N, steps_per_epoch=5, num_examples=30, embedding_dim=D, total_steps=10)
PLAIN = {"views.adversarial.weight": 0.0, "views.cutmix.weight": 0.0}


def make_byol(momentum=0.996, simsiam=False):
    return BYOL(momentum=momentum, predictor_hidden=4, simsiam=simsiam).for_run(SPEC)


def unit_rows(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def cosine_weight(momentum, step, total):
    """The target's weight in the update of a step, as the paper writes it (section 3.2)."""
    return 1 - (1 - momentum) * (np.cos(np.pi * step / total) + 1) / 2


def without_predictor(params):
    return {name: tree for name, tree in params["network"].items() if name != "predictor"}


def test_loss_is_the_squared_distance_of_unit_vectors(x64):
    """Equation 2 of BYOL; SimSiam's equation 1, the negative cosine, is half of it but for a constant."""
    outputs, y = unit_rows(0, N, 2, D), unit_rows(1, N, 2, D)
    expected = np.square(outputs - y).sum(axis=-1)
    losses = make_byol().loss({}, outputs, y, ())
    assert losses.shape == (N, 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    negative_cosine = -(outputs * y).sum(axis=-1)
    np.testing.assert_allclose(make_byol(simsiam=True).loss({}, outputs, y, ()), 1 + negative_cosine, rtol=1e-12)


@pytest.mark.parametrize("simsiam", [False, True])
def test_targets_are_the_other_crops_projections(simsiam):
    """By the target's parameters in BYOL, by the network's own in SimSiam."""
    projections, used = unit_rows(2, 2, 3, 2, D), []

    def crops(params):
        used.append(params)
        return jnp.asarray(projections)

    rows = np.arange(N, dtype=np.int32).reshape(2, 3)
    batch = Batch(index=rows, row=rows, valid=rows >= 0, label=rows)
    params, state = {"network": "online"}, () if simsiam else "target"
    method = make_byol(simsiam=simsiam)
    targets = method.targets(Encode(None, crops), params, state, batch, None)
    assert used == ["online" if simsiam else "target"]
    np.testing.assert_allclose(targets.y[:, :, 0], projections[:, :, 1], rtol=1e-6)
    np.testing.assert_allclose(targets.y[:, :, 1], projections[:, :, 0], rtol=1e-6)
    assert targets.known.shape == (2, 3) and targets.known.all()
    own, _ = method.own_crop_labels(targets.y.reshape(N, 2, D), (), None)
    np.testing.assert_allclose(own, projections.reshape(N, 2, D), rtol=1e-6)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.996), (5, 0.998), (10, 1.0), (25, 1.0)], ids=str)
def test_momentum_rises_from_its_base_to_one(step, expected, x64):
    assert float(make_byol().target_momentum(jnp.int32(step))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("step", range(11))
def test_momentum_follows_the_papers_cosine(step, x64):
    got = float(make_byol(0.9).target_momentum(jnp.int32(step)))
    assert got == pytest.approx(cosine_weight(0.9, step, 10), abs=1e-12)


def test_target_is_a_moving_average_of_the_network_without_its_predictor(x64):
    run = SmallRun(small_config("byol", **PLAIN))
    total = 3 * run.steps_per_epoch
    expected = jax.device_get(without_predictor(run.state.params))
    assert set(expected) == {"backbone", "head"} and "predictor" in run.state.params["network"]
    for step in range(3):
        state = run.train(1)
        weight, online = cosine_weight(0.9, step, total), without_predictor(state.params)
        expected = jax.tree.map(lambda old, new, weight=weight: weight * old + (1 - weight) * new, expected, online)
        assert largest_difference(state.method, expected) < 1e-12
    assert largest_difference(state.method, online) > 1e-4


def test_a_longer_run_has_a_longer_cosine():
    """Whatever a checkpoint holds: the schedule is no part of the state."""
    for epochs in (3, 30):
        trainer = make_trainer(small_config("byol", epochs=epochs), 70, jax.devices()[:1])
        assert trainer.objective.method.total_steps == epochs * 2


def test_pseudo_labels_of_a_run_are_unit_projections_by_the_target(x64):
    """The first BatchNorm group of a step, computed by hand."""
    run = SmallRun(small_config("byol", **PLAIN))
    target = jax.tree.map(lambda leaf: leaf + 0.1, run.state.method)
    state = run.state._replace(method=target)
    with jax.set_mesh(run.trainer.mesh):
        shown = jax.device_get(run.steps.views(state, next(run.batches()), None))
    network, mode = run.trainer.objective.network, NormMode(CLEAN, 1)
    crops = tuple(x[0] for x in shown.images["clean"])  # 8 rows: one group

    def apply(params, predict):
        outputs, _ = network.apply({"params": params}, crops, mode, predict, mutable=["moments"])
        return np.asarray(outputs)

    projections = apply(target, predict=False)
    np.testing.assert_allclose(np.linalg.norm(projections, axis=-1), 1, rtol=1e-9)
    np.testing.assert_allclose(shown.y[0, :8], projections[:, ::-1], rtol=0, atol=1e-9)
    predictions = apply(run.state.params["network"], predict=True)
    np.testing.assert_allclose(shown.outputs["clean"][0, :8], predictions, rtol=0, atol=1e-9)
    assert np.abs(predictions - apply(run.state.params["network"], predict=False)).max() > 0.1


def test_simsiam_is_byol_without_momentum(x64):
    """Two steps: in the first update BYOL's momentum 0 is not yet on its way to 1. SimSiam's loss is half."""
    ends = []
    for simsiam, rate in ((False, 0.05), (True, 0.1)):
        settings = PLAIN | {
            "byol.simsiam": simsiam,
            "byol.momentum": 0.0,
            "optimizer.learning_rate": rate,
            "optimizer.weight_decay": 0.0,
        }
        run = SmallRun(small_config("byol", **settings))
        start = jax.device_get(run.state.params)
        ends.append(run.train(2))
    assert largest_difference(ends[0].params, ends[1].params) < 1e-9
    assert largest_difference(ends[0].batch_stats, ends[1].batch_stats) < 1e-9
    assert largest_difference(ends[0].params, start) > 1e-3
    assert jax.tree.leaves(ends[1].method) == []


def test_adversarial_norm_of_the_predictor_learns_from_attacked_passes_only(x64):
    """Until the attacked pass starts, its set is a copy of the clean one, whose gradient does not change by it."""
    after = {}
    for start_epoch in (0.0, 2.0):
        settings = {"scheme": "std+adv", "views.adversarial.start_epoch": start_epoch}
        settings |= {"optimizer.weight_decay": 0.0}
        state = SmallRun(small_config("byol", **settings)).train(1)
        # The first momentum buffer is the first gradient.
        buffers = optax.tree.get(state.opt_state, "trace")["network"]["predictor"]["bn1"]
        statistics = [state.batch_stats[f"{name}_batch_stats"]["predictor"]["bn1"] for name in ("adversarial", "clean")]
        after[start_epoch] = buffers, statistics
    (attacked, (own, clean)), (plain, (copied, copied_from)) = after[0.0], after[2.0]
    for name in ("scale", "bias"):
        assert np.abs(attacked[f"adversarial_{name}"]).max() > 1e-6
        assert np.abs(attacked[f"adversarial_{name}"] - attacked[name]).max() > 1e-6
        np.testing.assert_array_equal(plain[f"adversarial_{name}"], plain[name])
        assert np.abs(plain[name]).max() > 1e-6
        np.testing.assert_allclose(attacked[name], plain[name], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(copied["mean"], copied_from["mean"])
    assert np.abs(own["mean"] - clean["mean"]).max() > 1e-9


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"byol.momentum": 1.5}, r"byol\.momentum=1\.5 must be"),
        ({"byol.predictor_hidden": 0}, r"byol\.predictor_hidden=0 must be"),
        ({"data.num_crops": (3,)}, "two crops of one size"),
        ({"model.head_layers": 0}, r"model\.head_layers=0 must be"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        make_trainer(small_config("byol", **settings), 70, jax.devices()[:1])
