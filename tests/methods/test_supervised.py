"""The supervised method against float64 NumPy, and in small runs."""

import jax
import numpy as np
import pytest
from small import SmallRun, small_config

from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.methods.base import Spec
from hexa_jax.methods.supervised import Supervised
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.input import TrainingData

N, V, D, C = 6, 2, 5, 4
LABELS = np.array([0, 3, 2, -1, 1, 3], np.int32)


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(D, C)), "bias": rng.normal(size=C)}
    return params, rng.normal(size=(N, V, D))


def cross_entropy(params, outputs, labels, smoothing):
    """Minus the sum over classes of q log p, where q is the smoothed label; 0 without a label."""
    logits = outputs @ params["kernel"] + params["bias"]
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    losses = np.zeros((N, V))
    for row, label in enumerate(labels):
        if label >= 0:
            q = np.full(C, smoothing / C)
            q[label] += 1 - smoothing
            losses[row] = -(q * np.log(p[row])).sum(axis=-1)
    return losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_loss_is_the_cross_entropy_of_the_smoothed_label(smoothing, x64):
    params, outputs = make_data()
    losses = Supervised(smoothing).loss(params, outputs, LABELS, ())
    expected = cross_entropy(params, outputs, LABELS, smoothing)
    np.testing.assert_allclose(losses, expected, rtol=1e-12)
    assert (np.asarray(losses)[LABELS < 0] == 0).all()


def test_mixed_images_have_a_mixture_of_labels(x64):
    """CutMix (Yun et al., 2019, equation 1); a partner without a label adds nothing."""
    params, outputs = make_data(1)
    partners, lam = np.array([3, 0, 1, 2, 5, 4]), np.random.default_rng(2).uniform(size=(N, V))
    losses = Supervised(0.1).mixed_loss(params, outputs, LABELS, LABELS[partners], lam, ())
    own, other = (cross_entropy(params, outputs, y, 0.1) for y in (LABELS, LABELS[partners]))
    np.testing.assert_allclose(losses, lam * own + (1 - lam) * other, rtol=1e-12)


def test_targets_are_the_labels_and_rows_without_one_do_not_count():
    rows = np.arange(N, dtype=np.int32).reshape(2, 3)
    batch = Batch(index=rows, row=rows, valid=rows >= 0, label=LABELS.reshape(2, 3))
    targets = Supervised(0.0).targets(None, {}, (), batch, None)
    np.testing.assert_array_equal(targets.y, LABELS.reshape(2, 3))
    np.testing.assert_array_equal(targets.known, LABELS.reshape(2, 3) >= 0)


def test_classifier_starts_like_torch_linear():
    spec = Spec(batch_size=8, steps_per_epoch=1, num_examples=8, embedding_dim=64, num_classes=500)
    params = Supervised(0.0).init_params(jax.random.key(0), spec)
    assert params["kernel"].shape == (64, 500) and params["bias"].shape == (500,)
    for leaf in params.values():
        assert 0.95 / 8 < np.abs(leaf).max() <= 1 / 8
        assert abs(float(leaf.mean())) < 0.1 / 8


def test_a_small_network_learns_its_classes():
    """Far below the chance level of log(classes), on both of an example's crops."""
    settings = {"scheme": "std", "precision": "float32", "optimizer.learning_rate": 0.1}
    config = small_config("supervised", **settings, epochs=60)
    config.data.min_scale, config.augment.jitter_probability = (0.8,), (0.0,)
    config.augment.gray_probability = (0.0,)
    run = SmallRun(config)
    run.train(90)
    chance = np.log(run.source.num_classes)
    assert np.mean(run.losses[:2]) > 0.8 * chance
    assert np.mean(run.losses[-4:]) < 0.6 * chance


def test_labels_of_a_resident_data_set_reach_the_step(x64):
    """And have their part in its gradients."""
    config = small_config("supervised", **{"data.on_device": True, "scheme": "std"})
    run = SmallRun(config)
    opened = TrainingData.open(config, run.source, run.trainer)
    with jax.set_mesh(run.trainer.mesh):
        batch = next(opened.batches(0))
        labels = run.source.labels()
        np.testing.assert_array_equal(batch.label, labels[np.asarray(batch.index)])
        losses = []
        for label in (batch.label, (batch.label + 1) % run.source.num_classes):
            state = run.steps.init(config.seed)
            _, metrics = run.steps.train(state, batch._replace(label=label), opened.resident)
            losses.append(float(metrics["loss"]))
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_step_leaves_out_rows_without_a_label(x64):
    """Its loss is the mean over the other rows."""
    run = SmallRun(small_config("supervised", scheme="std"))
    with jax.set_mesh(run.trainer.mesh):
        batch = next(run.batches())
        shown = run.steps.views(run.state, batch, None)
        outputs, own = np.asarray(shown.outputs["clean"][0]), jax.device_get(run.state.params["method"])
        label = batch.label.at[0, ::3].set(-1)
        _, metrics = run.steps.train(run.state, batch._replace(label=label), None)
    logits = outputs @ own["kernel"] + own["bias"]
    kept = np.asarray(label[0]) >= 0
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    entropies = -log_p[np.arange(32)[:, None], np.arange(2)[None], np.asarray(label[0])[:, None]]
    assert float(metrics["loss"]) == pytest.approx(entropies[kept].mean(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_out_of_range_is_named(smoothing):
    config = small_config("supervised", **{"supervised.label_smoothing": smoothing})
    with pytest.raises(ConfigError, match=rf"supervised\.label_smoothing={smoothing} must be"):
        make_trainer(config, 70, jax.devices()[:1], num_classes=4)


def test_a_source_without_labels_is_refused():
    with pytest.raises(ConfigError, match="learns from labels and the source has none"):
        make_trainer(small_config("supervised"), 70, jax.devices()[:1])
