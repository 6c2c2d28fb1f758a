"""Equation 10 on real crops: what each view adds, and which rows count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SmallRun, largest_difference, small_config

from hexa_jax.training.schemes import make_scheme


@pytest.fixture(scope="module")
def run():
    """A DeepCluster run in float64 with its clusters made, and its next batch."""
    with jax.enable_x64(True):
        run = SmallRun(small_config("deepcluster"))
        run.train(0)
        with jax.set_mesh(run.trainer.mesh):
            run.state, _ = run.steps.refresh(run.state, jnp.int32(0))
            run.batch = next(run.batches())
    return run


@functools.cache
def compiled(run, settings):
    """The objective of the run's rows under other view settings, jitted."""
    config = small_config("deepcluster", **{f"views.{name}": value for name, value in settings})
    objective = dataclasses.replace(run.trainer.objective, scheme=make_scheme(config, run.steps_per_epoch))
    trainer = dataclasses.replace(run.trainer, objective=objective)

    def compute(state, batch):
        rngs = trainer._rngs(state)
        inputs, _ = trainer._inputs(state, batch, rngs, None)
        return trainer._reduced_gradients(state.params, inputs, rngs, None)

    return jax.jit(compute)


def gradients(run, alpha1, alpha2, batch=None, **settings):
    """Result of the objective for the run's batch, on the host; the attack is strong enough to see."""
    settings |= {"adversarial.weight": float(alpha1), "cutmix.weight": float(alpha2), "epsilon": 4.0, "step_size": 4.0}
    with jax.set_mesh(run.trainer.mesh):
        result = compiled(run, tuple(sorted(settings.items())))(run.state, run.batch if batch is None else batch)
    return jax.device_get(result)


def test_objective_is_the_weighted_sum_of_its_views(run, x64):
    plain, adversarial, cutmix = (gradients(run, *alphas).params for alphas in ((0, 0), (1, 0), (0, 1)))
    weighted = gradients(run, 0.5, 2.0)
    combine = lambda p, a, c: p + 0.5 * (a - p) + 2 * (c - p)  # noqa: E731
    assert largest_difference(weighted.params, jax.tree.map(combine, plain, adversarial, cutmix)) < 1e-12
    assert largest_difference(adversarial, plain) > 1e-4
    assert largest_difference(cutmix, plain) > 1e-4
    # Losses are reported without their weights.
    assert weighted.losses["adversarial"] == pytest.approx(gradients(run, 1, 0).losses["adversarial"])
    assert weighted.losses["cutmix"] == pytest.approx(gradients(run, 0, 1).losses["cutmix"])


def test_attack_raises_the_loss(run, x64):
    """The adversarial set starts as a copy of the clean one, so a larger loss is the attack's doing."""
    losses = gradients(run, 1, 0).losses
    assert losses["adversarial"] > losses["clean"] + 1e-3


def test_clean_gradients_leave_the_adversarial_set_alone(run, x64):
    def adversarial_part(params):
        paths = jax.tree_util.tree_leaves_with_path(params)
        return [leaf for path, leaf in paths if "adversarial" in jax.tree_util.keystr(path)]

    assert all(np.all(leaf == 0) for leaf in adversarial_part(gradients(run, 0, 0).params))
    assert all(np.any(leaf != 0) for leaf in adversarial_part(gradients(run, 1, 0).params))


def test_cutmix_that_cuts_nothing_is_the_clean_loss(run, x64):
    """Beta(1e6, 1e-3) puts lambda0 at 1: the box is empty."""
    result = gradients(run, 0, 1, **{"cutmix.alpha": 1e6, "cutmix.beta": 1e-3})
    assert result.losses["cutmix"] == pytest.approx(result.losses["clean"], abs=1e-12)


def test_unreadable_rows_have_no_say_but_stay_in_batch_statistics(run, x64):
    valid = np.ones((1, 32), bool)
    valid[0, 5] = False
    dropped = run.batch._replace(valid=jax.device_put(valid, run.batch.valid.sharding))
    whole, part = gradients(run, 0, 0), gradients(run, 0, 0, batch=dropped)
    np.testing.assert_allclose(part.outputs, whole.outputs)  # BatchNorm saw the same rows
    assert part.losses["clean"] != pytest.approx(whole.losses["clean"], rel=1e-6)
    # The mean over 31 rows: what is missing is row 5's loss.
    method, state = run.trainer.objective.method, run.state.method
    labels = np.moveaxis(np.asarray(state.assignments)[:, np.asarray(run.batch.index)[0]], 0, -1)
    row_losses = np.asarray(method.loss({}, jnp.asarray(whole.outputs[0]), labels, state.prototypes)).mean(axis=1)
    assert whole.losses["clean"] == pytest.approx(row_losses.mean())
    assert part.losses["clean"] == pytest.approx(np.delete(row_losses, 5).mean())


def test_pgd_gradient_steps_see_each_other_through_batch_norm(run, x64):
    """The attack follows the gradient of the summed loss, cross terms of the batch statistics included."""
    trainer = run.trainer
    with jax.set_mesh(trainer.mesh):
        views = jax.device_get(run.steps.views(run.state, run.batch, None)).images
    delta = views["adversarial"][0] - views["clean"][0]
    assert np.abs(delta).max() <= 1 / 255 + 1e-12
    moved = np.isclose(np.abs(delta), 1 / 255)
    clipped = (views["adversarial"][0] == 0) | (views["adversarial"][0] == 1)
    assert (moved | clipped).mean() > 0.99  # one linf step moves every pixel by its full size, or to the range's end
