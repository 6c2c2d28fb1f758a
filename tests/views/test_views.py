"""Hard views and equation 10 from their definitions: each view on a small context of its own, the whole step in float64.

Written from the equations and the interface (`hexa_jax.views.base`), not from the code. Legend: N rows, V crops, H W C image.
"""

import functools
import itertools
import json
import pathlib
import re
import shlex
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import environment, lines
from small import SmallRun, largest_difference, small_config

from configs import common
from hexa_jax.core.errors import ConfigError
from hexa_jax.methods.simclr import Candidates, SimCLR
from hexa_jax.training.factory import make_trainer
from hexa_jax.training.input import TrainingData
from hexa_jax.training.schemes import make_scheme, scheme_views
from hexa_jax.views import VIEWS, Attack, adversarial
from hexa_jax.views.extra import Extra
from hexa_jax.views.hard_crop import HardCrop
from hexa_jax.views.mixup import Mixup
from hexa_jax.views.noise import Noise
from hexa_jax.views.scheme import Scheme

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
GREY = 1 / 255
FLOAT32 = 3e-7  # metrics are float32, whatever the precision of the step


def pixels(seed, *shape, low=0.0, high=1.0):
    """Random float64 pixels."""
    return np.random.default_rng(seed).uniform(low, high, size=shape)


class FakeContext:
    """What `hexa_jax.views.Context` promises, from given data; `examples` are the identities that keys depend on."""

    def __init__(self, *crops, attack=None, examples=None, sets=(), losses=None, seed=0):
        self.crops = tuple(jnp.asarray(crop) for crop in crops)
        self.attack = attack
        self.examples = np.arange(len(crops[0])) if examples is None else np.asarray(examples)
        self.sets, self.scorer, self.seed = sets, losses, seed
        self.asked = []

    def keys(self, purpose):
        key = jax.random.fold_in(jax.random.key(self.seed), zlib.crc32(purpose.encode()))
        return jax.vmap(lambda example: jax.random.fold_in(key, example))(jnp.asarray(self.examples))

    def partners(self):
        return jnp.asarray(np.roll(np.arange(len(self.examples)), 1), jnp.int32)

    def new_crops(self, number):
        self.asked.append(number)
        return tuple(jnp.asarray(crop) for crop in self.sets[number])

    def losses(self, crops):
        return self.scorer(crops)

    @property
    def attacked(self):
        raise AssertionError("this view is not made from attacked crops")


# ---- mixup ----------------------------------------------------------------------------------------------------------


def test_mixup_blends_each_crop_with_the_partners_crop_of_the_same_place(x64):
    large, small = pixels(0, 16, 2, 6, 6, 3), pixels(1, 16, 3, 4, 4, 3)
    context = FakeContext(large, small)
    view = Mixup(weight=1.0).make(context)
    lam, partner = np.asarray(view.lam), np.asarray(view.partner)
    assert lam.shape == (16, 5) and lam.min() >= 0 and lam.max() <= 1
    assert view.partner.dtype == jnp.int32
    np.testing.assert_array_equal(partner, np.roll(np.arange(16), 1))
    for x, mixed, share in ((large, view.crops[0], lam[:, :2]), (small, view.crops[1], lam[:, 2:])):
        share = share.astype(np.float64)[..., None, None, None]
        np.testing.assert_allclose(mixed, share * x + (1 - share) * x[partner], rtol=0, atol=4e-16)
    assert len(np.unique(lam)) == 16 * 5  # one for each crop


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.8, 1.0])
def test_mixup_leaves_whole_rows_unmixed_with_the_rest_of_the_probability(x64, probability):
    x = pixels(2, 2000, 2, 2, 2, 1)
    view = Mixup(weight=1.0, probability=probability).make(FakeContext(x))
    lam, mixed = np.asarray(view.lam), np.asarray(view.crops[0])
    unmixed = (lam == 1).all(axis=1)
    np.testing.assert_array_equal(
        (lam == 1).any(axis=1), unmixed
    )  # an image is blended with all its crops or not at all
    np.testing.assert_array_equal(mixed[unmixed], x[unmixed])
    assert (mixed[~unmixed] != x[~unmixed]).any(axis=(1, 2, 3, 4)).all()
    bound = 4 * np.sqrt(probability * (1 - probability) / 2000)
    assert abs(unmixed.mean() - (1 - probability)) <= bound


@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (5.0, 3.0)])
def test_mixups_lam_has_the_moments_of_its_beta_distribution(x64, alpha, beta):
    lam = np.asarray(Mixup(weight=1.0, alpha=alpha, beta=beta).make(FakeContext(np.zeros((4000, 2, 1, 1, 1)))).lam)
    variance = alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))
    assert abs(lam.mean() - alpha / (alpha + beta)) < 5 * np.sqrt(variance / lam.size)
    assert lam.var() == pytest.approx(variance, rel=0.08)
    assert abs(np.corrcoef(lam.T)[0, 1]) < 5 / np.sqrt(4000)  # the crops of an image do not share it


def test_mixups_draws_are_those_of_the_example(x64):
    view, order = Mixup(weight=1.0, probability=0.7), np.array([5, 2, 7, 0, 1, 6, 3, 4])
    x = pixels(3, 8, 2, 3, 3, 3)
    whole = view.make(FakeContext(x, examples=10 + np.arange(8)))
    moved = view.make(FakeContext(x[order], examples=10 + order))
    np.testing.assert_array_equal(moved.lam, np.asarray(whole.lam)[order])
    assert len(np.unique(whole.lam)) > 8
    np.testing.assert_array_equal(moved.lam, view.make(FakeContext(0 * x, examples=10 + order)).lam)
    assert (np.asarray(moved.lam) != view.make(FakeContext(x, examples=10 + order, seed=1)).lam).any()


# ---- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon, step_size, steps", [(4, 1, 1), (4, 1, 3), (2, 1, 5), (1, 3, 1)])
def test_noise_moves_each_pixel_by_as_much_as_the_attack_can(x64, epsilon, step_size, steps):
    attack = Attack(epsilon=epsilon * GREY, step_size=step_size * GREY, steps=steps)
    large, small = (np.clip(pixels(seed, 6, 2, 8, 8, 3, low=-0.2, high=1.2), 0, 1) for seed in (0, 1))
    view = Noise(weight=1.0).make(FakeContext(large, small, attack=attack))
    size = min(epsilon, steps * step_size) * GREY
    assert view.lam is None and view.partner is None and len(view.crops) == 2
    for x, noisy in zip((large, small), map(np.asarray, view.crops), strict=True):
        up, down = np.minimum(x + size, 1), np.maximum(x - size, 0)
        assert (np.isclose(noisy, up, rtol=0, atol=1e-14) | np.isclose(noisy, down, rtol=0, atol=1e-14)).all()
        assert noisy.min() >= 0 and noisy.max() <= 1


def test_noise_has_balanced_independent_signs(x64):
    attack = Attack(epsilon=GREY, step_size=GREY)
    x = np.full((6, 2, 32, 32, 3), 0.5)
    noisy = Noise(weight=1.0).make(FakeContext(x, x, attack=attack)).crops
    signs = np.concatenate([np.sign(np.asarray(part) - 0.5).reshape(12, -1) for part in noisy])
    assert (signs != 0).all()
    count = signs.shape[1]
    assert np.abs(signs.mean(axis=1)).max() < 5 / np.sqrt(count)
    assert np.abs(np.corrcoef(signs) - np.eye(24)).max() < 5 / np.sqrt(count)  # examples, crops and resolutions differ


@pytest.mark.parametrize("epsilon, step_size, steps", [(0.4, 0.1, 1), (0.4, 0.1, 3), (0.2, 0.1, 5)])
def test_l2_noise_has_the_length_of_the_attack(x64, epsilon, step_size, steps):
    attack = Attack(epsilon=epsilon, step_size=step_size, steps=steps, norm="l2")
    x = np.full((6, 2, 16, 16, 3), 0.5)
    delta = np.asarray(Noise(weight=1.0).make(FakeContext(x, attack=attack)).crops[0]).reshape(12, -1) - 0.5
    np.testing.assert_allclose(np.sqrt((delta**2).sum(axis=1)), min(epsilon, steps * step_size), rtol=1e-9)
    cosines = delta @ delta.T / np.outer(*[np.sqrt((delta**2).sum(axis=1))] * 2)
    assert np.abs(cosines - np.eye(12)).max() < 5 / np.sqrt(delta.shape[1])
    assert np.abs(delta.mean(axis=1) / delta.std(axis=1)).max() < 5 / np.sqrt(delta.shape[1])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_depends_on_the_example_and_not_on_the_image(x64, norm):
    attack = Attack(epsilon=0.01, step_size=0.01, norm=norm)
    order = np.array([3, 0, 2, 1])

    def moves(x, examples):
        return np.asarray(Noise(weight=1.0).make(FakeContext(x, attack=attack, examples=examples)).crops[0]) - x

    gray, image = np.full((4, 2, 4, 4, 3), 0.5), pixels(0, 4, 2, 4, 4, 3, low=0.1, high=0.9)
    whole = moves(gray, np.arange(4))
    np.testing.assert_allclose(moves(image, np.arange(4)), whole, atol=1e-15)
    np.testing.assert_allclose(moves(gray, order), whole[order], atol=1e-15)


# ---- hardest of several crops ---------------------------------------------------------------------------------------


def scores(crops, scale=1.0):
    """Losses [N, V] that have no order in brightness."""
    return jnp.concatenate([jnp.sin(1e3 * scale * crop.mean(axis=(2, 3, 4))) for crop in crops], axis=1)


@pytest.mark.parametrize("candidates", [2, 3])
def test_the_hardest_crop_of_each_place_is_chosen(x64, candidates):
    view = HardCrop(weight=1.0, candidates=candidates)
    assert view.crop_sets == candidates
    sets = [(pixels(2 * s, 20, 2, 4, 4, 3), pixels(2 * s + 1, 20, 3, 3, 3, 3)) for s in range(candidates)]
    context = FakeContext(*(np.zeros_like(crop) for crop in sets[0]), sets=sets, losses=scores)
    made = view.make(context)
    assert made.lam is None and made.partner is None
    assert sorted(set(context.asked)) == list(range(candidates))
    losses = np.stack([np.asarray(scores(crops)) for crops in sets])  # [candidates, N, 5]
    best = losses.argmax(axis=0)
    assert len(np.unique(best)) == candidates
    for row, position in itertools.product(range(20), range(5)):
        resolution, crop = (0, position) if position < 2 else (1, position - 2)
        expected = sets[best[row, position]][resolution][row, crop]
        np.testing.assert_array_equal(made.crops[resolution][row, crop], expected)


def test_no_gradient_flows_through_the_choice(x64):
    sets = [(pixels(s, 4, 2, 4, 4, 3),) for s in range(2)]

    def brightness(scale):
        context = FakeContext(sets[0][0], sets=sets, losses=functools.partial(scores, scale=scale))
        return HardCrop(weight=1.0).make(context).crops[0].sum()

    assert jax.grad(brightness)(1.0) == 0


def test_one_crop_is_no_choice():
    with pytest.raises(ValueError, match=r"candidates=1"):
        HardCrop(candidates=1)


# ---- a second clean view --------------------------------------------------------------------------------------------


def test_extra_shows_a_set_of_crops_of_its_own(x64):
    own, other = pixels(0, 3, 2, 4, 4, 3), pixels(1, 3, 2, 4, 4, 3)
    context = FakeContext(own, sets=[(other,)])
    view = Extra(weight=1.0)
    assert view.crop_sets == 1 and view.norm == "clean"
    made = view.make(context)
    np.testing.assert_array_equal(made.crops[0], other)
    assert context.asked == [0] and made.lam is None and made.partner is None


def first_step(scheme, on_device, **overrides):
    """Metrics and pictures of a run's first step, with host-cut crops or resident data."""
    config = small_config("moco", scheme=scheme, **{"data.on_device": on_device, **overrides})
    run = SmallRun(config)
    data = TrainingData.open(config, run.source, run.trainer)
    with jax.set_mesh(run.trainer.mesh):
        batch = next(data.batches(0))
        shown = jax.device_get(run.steps.views(run.state, batch, data.resident))
        _, metrics = run.steps.train(run.state, batch, data.resident)
    return jax.device_get(metrics), shown


@pytest.mark.parametrize("on_device", [False, True])
def test_a_second_clean_view_leaves_the_methods_own_crops_as_they_are(x64, on_device):
    plain, plain_shown = first_step("std", on_device)
    extra, shown = first_step("std+extra", on_device)
    # Crops are cut on the device in float32, where another program may round the last bit the other way.
    rounding = 2**-22 if on_device else 0
    np.testing.assert_allclose(shown.images["clean"][0], plain_shown.images["clean"][0], rtol=0, atol=rounding)
    assert abs(extra["loss_clean"] - plain["loss_clean"]) <= rounding
    difference = np.abs(shown.images["extra"][0] - shown.images["clean"][0]).reshape(-1, 8 * 8 * 3).max(axis=1)
    assert difference.min() > 1e-3  # no crop is shown twice
    assert abs(extra["loss_extra"] - extra["loss_clean"]) > 1e-4
    assert extra["loss_extra"] == pytest.approx(extra["loss_clean"], rel=0.3)  # crops of the same images


# ---- adaptive radius ------------------------------------------------------------------------------------------------


def per_image(value):
    """[N, V] against images [N, V, H, W, C]."""
    return np.asarray(value)[..., None, None, None]


def dual_norm(gradient, norm):
    """[N, V] of gradients [N, V, H, W, C]: what bounds the first-order rise of the loss in a ball of radius 1."""
    axes = (2, 3, 4)
    return np.abs(gradient).sum(axis=axes) if norm == "linf" else np.sqrt((gradient**2).sum(axis=axes))


def steep_and_flat(seed=0):
    """Gradients [4, 2, 5, 5, 3] whose sizes lie far apart."""
    scale = np.geomspace(1e-3, 10, 8).reshape(4, 2)
    return np.random.default_rng(seed).normal(size=(4, 2, 5, 5, 3)) * per_image(scale)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_adaptive_radius_is_the_smaller_of_epsilon_and_the_increase_over_the_dual_norm(x64, norm):
    gradient = steep_and_flat()
    attack = Attack(epsilon=0.02, step_size=1.0, norm=norm, max_increase=0.05)
    radius = np.asarray(attack.radius(jnp.asarray(gradient)))
    expected = np.minimum(0.02, 0.05 / dual_norm(gradient, norm))
    assert radius.shape == (4, 2, 1, 1, 1) and 0 < (expected < 0.02).sum() < 8
    np.testing.assert_allclose(radius, per_image(expected), rtol=1e-9)
    scale = np.array([0.25, 1.0, 3.0, 1e-3])
    scaled = attack.radius(jnp.asarray(gradient * scale[:, None, None, None, None]), jnp.asarray(scale))
    np.testing.assert_allclose(scaled, per_image(expected), rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scale", [None, (0.25, 1.0, 3.0, 1e-3)])
def test_an_adaptive_attack_raises_a_linear_loss_by_at_most_the_given_increase(x64, norm, scale):
    slope, x = steep_and_flat(), pixels(1, 4, 2, 5, 5, 3, low=0.4, high=0.6)
    factors = np.ones(4) if scale is None else np.array(scale)
    result = adversarial(
        jax.random.key(0),
        x,
        lambda x: factors[:, None] * (slope * x).sum((2, 3, 4)),
        epsilon=0.02,
        step_size=0.02,
        norm=norm,
        max_increase=0.05,
        loss_scale=None if scale is None else jnp.asarray(factors),
    )
    delta = np.asarray(result) - x
    radius = np.minimum(0.02, 0.05 / dual_norm(slope, norm))
    size = np.abs(delta).max(axis=(2, 3, 4)) if norm == "linf" else np.sqrt((delta**2).sum(axis=(2, 3, 4)))
    np.testing.assert_allclose(size, radius, rtol=1e-9)
    rise = (slope * delta).sum(axis=(2, 3, 4))
    np.testing.assert_allclose(rise, radius * dual_norm(slope, norm), rtol=1e-9)
    assert rise.max() <= 0.05 * (1 + 1e-9) and np.isclose(rise, 0.05).any() and (rise < 0.04).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_adaptive_radius_is_that_of_the_gradient_at_the_clean_image(x64, norm, steps):
    """On a quadratic loss the gradient grows on the way; the ball is chosen once."""
    curve, x = np.abs(steep_and_flat(2)) + 1e-3, pixels(3, 4, 2, 5, 5, 3, low=0.4, high=0.6)
    result = adversarial(
        jax.random.key(0),
        x,
        lambda x: (curve * x**2).sum((2, 3, 4)),
        epsilon=0.02,
        step_size=0.02,
        steps=steps,
        norm=norm,
        max_increase=0.05,
    )
    gradient, delta = 2 * curve * x, np.asarray(result) - x
    radius = np.minimum(0.02, 0.05 / dual_norm(gradient, norm))
    size = np.abs(delta).max(axis=(2, 3, 4)) if norm == "linf" else np.sqrt((delta**2).sum(axis=(2, 3, 4)))
    np.testing.assert_allclose(size, radius, rtol=1e-9)
    assert (gradient * delta).sum(axis=(2, 3, 4)).max() <= 0.05 * (1 + 1e-9)  # first-order rise


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_adaptive_attack_without_a_gradient_leaves_the_image(x64, norm):
    x = pixels(0, 2, 2, 4, 4, 3)
    attack = {"epsilon": 0.1, "step_size": 0.1, "norm": norm, "max_increase": 0.05}
    result = adversarial(jax.random.key(0), x, lambda x: 0.0 * x.sum((2, 3, 4)), **attack)
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize("branch", ["adversarial", "clean"])
def test_a_whole_step_raises_the_loss_by_the_given_increase(x64, branch):
    """In the step, losses are means over crops and rows; the increase is in units of one crop's loss all the same."""
    increase = 1e-4  # small: the first order decides
    settings = {"views.epsilon": 20.0, "views.step_size": 20.0, "views.max_increase": increase}
    run = SmallRun(small_config("deepcluster", scheme="std+adv", **settings, **{"views.attack_norm": branch}))
    _, metrics, _ = next_step_of_deepcluster(run)
    # The sets are copies of each other before the first step. Pixels at the range's ends cannot move.
    assert 0.5 * increase < metrics["loss_adversarial"] - metrics["loss_clean"] < 1.01 * increase


def next_step_of_deepcluster(run):
    """`next_step` of the first step, with the clusters made."""
    run.train(0)
    with jax.set_mesh(run.trainer.mesh):
        run.state, _ = run.steps.refresh(run.state, jnp.int32(0))
    return next_step(run)


# ---- labels ---------------------------------------------------------------------------------------------------------


def logsumexp(values):
    """Of a list of numbers."""
    values = np.array(values)
    return values.max() + np.log(np.exp(values - values.max()).sum())


def unit(seed, *shape):
    """Random unit vectors."""
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def nt_xent(output, embeddings, positive, absent, temperature):
    """Loss of one output against clean crops [B, 2, D] by position: `positive` (row, side), without those in `absent`."""
    assert positive not in absent
    places = [place for place in np.ndindex(embeddings.shape[:2]) if place not in absent]
    return (
        logsumexp([output @ embeddings[place] / temperature for place in places])
        - output @ embeddings[positive] / temperature
    )


ROWS = np.array([6, 2, 4, 0, 1, 3])  # the row that each candidate shows: in no order
Y = np.array([3, 0, 6, 2])  # of the outputs
PLACE = {row: place for place, row in enumerate(ROWS)}
TEMPERATURE = 0.3


@pytest.fixture
def simclr(x64):
    candidates = Candidates(jnp.asarray(unit(0, 6, 2, 8)), jnp.asarray(ROWS, jnp.int32))
    return SimCLR(temperature=TEMPERATURE), candidates, jnp.asarray(unit(1, 4, 2, 8)), jnp.asarray(Y, jnp.int32)


def test_simclr_finds_the_sibling_and_is_not_compared_with_its_own_crop(simclr):
    method, candidates, outputs, y = simclr
    losses = method.loss({}, outputs, y, candidates)
    for n, v in np.ndindex(4, 2):
        place = PLACE[Y[n]]
        expected = nt_xent(
            np.asarray(outputs)[n, v], np.asarray(candidates.embeddings), (place, 1 - v), [(place, v)], TEMPERATURE
        )
        assert float(losses[n, v]) == pytest.approx(expected, rel=1e-12)


def test_simclrs_own_crop_label_is_the_crop_itself_and_its_sibling_is_absent(simclr):
    method, candidates, outputs, y = simclr
    clean = candidates.embeddings[jnp.asarray([PLACE[row] for row in Y])]
    losses = method.loss({}, outputs, *method.own_crop_labels(y, candidates, clean))
    for n, v in np.ndindex(4, 2):
        place = PLACE[Y[n]]
        expected = nt_xent(
            np.asarray(outputs)[n, v], np.asarray(candidates.embeddings), (place, v), [(place, 1 - v)], TEMPERATURE
        )
        assert float(losses[n, v]) == pytest.approx(expected, rel=1e-12)


def mixed_nt_xent(output, embeddings, side, own, partner, lam, temperature):
    """Equation 9 for a mixture of the crops `side` of the rows at `own` and `partner`; none of the two is a candidate."""
    absent = [(own, side), (partner, side)]
    first, second = (nt_xent(output, embeddings, (place, 1 - side), absent, temperature) for place in (own, partner))
    return lam * first + (1 - lam) * second


def test_simclrs_mixed_crop_is_compared_with_neither_of_its_sources(simclr):
    method, candidates, outputs, y = simclr
    y_partner, lam = [0, 3, 6, 4], pixels(2, 4, 2)  # the third is its own partner
    losses = method.mixed_loss({}, outputs, y, jnp.asarray(y_partner, jnp.int32), jnp.asarray(lam), candidates)
    for n, v in np.ndindex(4, 2):
        own, other = PLACE[Y[n]], PLACE[y_partner[n]]
        expected = mixed_nt_xent(
            np.asarray(outputs)[n, v], np.asarray(candidates.embeddings), v, own, other, lam[n, v], TEMPERATURE
        )
        assert float(losses[n, v]) == pytest.approx(expected, rel=1e-12)


def next_step(run):
    """What the run's next step learns from, its metrics and the state before it, on the host."""
    with jax.set_mesh(run.trainer.mesh):
        batch = next(run.batches())
        shown, before = jax.device_get((run.steps.views(run.state, batch, None), run.state))
        run.state, metrics = run.steps.train(run.state, batch, None)
    return shown, jax.device_get(metrics), before


def flat(outputs):
    """[M, n, V, D] as [B, V, D]."""
    return outputs.reshape(-1, *outputs.shape[-2:])


def test_mocos_own_crop_label_is_the_clean_output_among_the_queue(x64):
    settings = {"views.adversarial.target": "own_crop", "views.epsilon": 4.0, "views.step_size": 4.0}
    run = SmallRun(small_config("moco", scheme="std+adv", **settings))
    run.train(1)  # the sets differ from now on
    shown, metrics, before = next_step(run)
    clean, attacked = (flat(shown.outputs[name]) for name in ("clean", "adversarial"))
    tau, losses = run.trainer.objective.method.temperature, []
    for query, positive in zip(attacked[:, 0], clean[:, 0], strict=True):
        logits = [query @ positive / tau, *(before.method.queue @ query / tau)]
        losses.append(logsumexp(logits) - logits[0])
    assert len(losses) == 32 and before.method.queue.shape == (64, 8)
    assert metrics["loss_adversarial"] == pytest.approx(np.mean(losses), rel=FLOAT32)
    assert np.abs(clean - attacked).max() > 1e-3


def test_a_simclr_step_pairs_and_mixes_as_defined(x64):
    """Attacked crops look for their own clean crop, cut-mixed ones for both siblings among all but their sources."""
    settings = {"views.adversarial.target": "own_crop", "views.epsilon": 4.0, "views.step_size": 4.0}
    run = SmallRun(small_config("simclr", scheme="std+adv+cmx", **settings))
    run.train(1)
    shown, metrics, _ = next_step(run)
    clean, attacked, mixed = (flat(shown.outputs[name]) for name in ("clean", "adversarial", "cutmix"))
    place = {row: n for n, row in enumerate(np.ravel(shown.row))}
    partner, lam = np.ravel(shown.partner), shown.lam["cutmix"].reshape(-1, 2)
    tau, own_crop, mixture = run.trainer.objective.method.temperature, [], []
    assert len(clean) == 32 and (partner != np.ravel(shown.row)).any()
    for n, v in np.ndindex(32, 2):
        own_crop.append(nt_xent(attacked[n, v], clean, (n, v), [(n, 1 - v)], tau))
        mixture.append(mixed_nt_xent(mixed[n, v], clean, v, n, place[partner[n]], lam[n, v], tau))
    assert metrics["loss_adversarial"] == pytest.approx(np.mean(own_crop), rel=FLOAT32)
    assert metrics["loss_cutmix"] == pytest.approx(np.mean(mixture), rel=FLOAT32)


# ---- from when on ---------------------------------------------------------------------------------------------------


def scheme_of(*views, steps_per_epoch=4):
    return Scheme(tuple(views), Attack(epsilon=GREY, step_size=GREY), steps_per_epoch=steps_per_epoch)


def weight_at(scheme, name, step):
    return float(scheme.weights(jnp.int32(step)).get(name, 0.0))


def test_a_view_counts_from_its_start_epoch_on(x64):
    scheme = scheme_of(Noise(weight=0.7, start_epoch=1.5), Extra(weight=2.0))
    assert [weight_at(scheme, "noise", step) for step in (0, 4, 5)] == [0, 0, 0]
    assert [weight_at(scheme, "noise", step) for step in (6, 7, 1000)] == pytest.approx([0.7] * 3)
    assert [weight_at(scheme, "extra", step) for step in (0, 5, 6, 1000)] == pytest.approx([2.0] * 4)
    assert weight_at(scheme, "clean", 0) == weight_at(scheme, "clean", 6) == 1
    assert [bool(scheme.active(scheme.views[0], jnp.int32(step))) for step in (5, 6, 7)] == [False, True, True]


def test_a_ramp_grows_linearly_to_the_full_weight(x64):
    scheme = scheme_of(Noise(weight=0.6, start_epoch=1.0, ramp_epochs=2.5))  # steps 4 to 14
    weights = np.array([weight_at(scheme, "noise", step) for step in range(20)])
    np.testing.assert_array_equal(weights[:4], 0)
    np.testing.assert_allclose(weights[14:], 0.6)
    np.testing.assert_allclose(np.diff(weights[4:14]), 0.06, atol=2e-7)  # a tenth of the weight a step
    assert weights[9] == pytest.approx(0.3, abs=0.061)  # half of it half-way, give or take a step
    assert (weights[4:13] < 0.6 - 1e-9).all()


def common_leaves(tree, of):
    """The leaves of `tree` whose paths `of` has, too."""
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(of)}
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in pairs if jax.tree_util.keystr(path) in paths}


@pytest.fixture(scope="module")
def plain():
    """Final state of a plain run of three steps, by method and optimizer."""

    @functools.cache
    def train(method, optimizer="sgd"):
        with jax.enable_x64(True):
            return SmallRun(small_config(method, scheme="std", **{"optimizer.name": optimizer})).train(3)

    return train


@pytest.mark.parametrize("scheme, view, ramp", [("std+cmx", "cutmix", 0.0), ("std+adv", "adversarial", 1.0)])
def test_before_a_view_starts_the_run_is_the_plain_one(x64, scheme, view, ramp):
    """Two steps an epoch; the view starts with the second."""
    ends = []
    for name in ("std", scheme):
        settings = {f"views.{view}.start_epoch": 1.0, f"views.{view}.ramp_epochs": ramp, "views.epsilon": 4.0}
        run, states = SmallRun(small_config("moco", scheme=name, **settings, **{"views.step_size": 4.0})), []
        with jax.set_mesh(run.trainer.mesh):
            batches = run.batches()
            for _ in range(4):
                run.state, _ = run.steps.train(run.state, next(batches), None)
                states.append(jax.device_get((run.state.params, run.state.method)))
        ends.append(states)
        assert run.steps.train._cache_size() == 1
    for step, (expected, actual) in enumerate(zip(*ends, strict=True)):
        names = common_leaves(expected, expected)
        difference = largest_difference(common_leaves(actual, expected), names)
        assert difference < 1e-12 if step < 2 else difference > 1e-6 if step == 3 else True, step


# ---- average --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, scheme, optimizer",
    [
        ("moco", "std+adv", "sgd"),
        ("moco", "std+adv", "adam"),
        ("deepcluster", "std+adv", "sgd"),
        ("deepcluster", "std+noise", "sgd"),
    ],
)
def test_hexa_without_attack_is_the_plain_method(x64, plain, method, scheme, optimizer):
    """An attack of radius 0 shows the clean crops to the other BatchNorm set, whose copy learns what the clean one does."""
    expected = plain(method, optimizer)
    settings = {"views.average": True, "views.epsilon": 0.0, "optimizer.name": optimizer}
    state = SmallRun(small_config(method, scheme=scheme, **settings)).train(3)
    leaves = common_leaves(expected.params, expected.params)
    adversarial_part = [name for name in common_leaves(state.params, state.params) if name not in leaves]
    assert adversarial_part and all("adversarial" in name for name in adversarial_part)
    assert largest_difference(common_leaves(state.params, expected.params), leaves) < 1e-9
    assert largest_difference(state.batch_stats["clean_batch_stats"], expected.batch_stats["clean_batch_stats"]) < 1e-9


def test_without_the_average_hexa_without_attack_differs(x64, plain):
    expected = plain("deepcluster")
    settings = {"views.average": False, "views.epsilon": 0.0}
    state = SmallRun(small_config("deepcluster", scheme="std+noise", **settings)).train(3)
    leaves = common_leaves(expected.params, expected.params)
    assert largest_difference(common_leaves(state.params, expected.params), leaves) > 1e-3


# ---- replace --------------------------------------------------------------------------------------------------------


def losses_without_each_row(run):
    """Metrics of the next step with all rows, and with each row in turn left out of the means."""
    with jax.set_mesh(run.trainer.mesh):
        batch, metrics = next(run.batches()), []
        for row in (None, *range(32)):
            valid = np.arange(32)[None] != (-1 if row is None else row)
            state = jax.tree.map(jnp.copy, run.state)  # a step takes its state's memory
            given = batch._replace(valid=jax.device_put(valid, batch.valid.sharding))
            metrics.append(jax.device_get(run.steps.train(state, given, None)[1]))
    return metrics[0], metrics[1:]


@pytest.mark.parametrize("method", ["moco", "simclr"])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_replaced_rows_count_in_the_views_loss_and_the_others_in_the_clean_one(x64, method, share):
    """Each loss is the mean over its own rows; what a row adds is seen by leaving it out."""
    run = SmallRun(small_config(method, scheme="std+cmx", **{"views.cutmix.replace": share}))
    whole, without = losses_without_each_row(run)
    replaced = np.arange(32) % 4 < 4 * share
    for name, own in (("loss_clean", ~replaced), ("loss_cutmix", replaced)):
        rows, mean, means = own.sum(), float(whole[name]), np.array([float(part[name]) for part in without])
        added = rows * mean - (rows - 1) * means
        if method == "moco":  # elsewhere a row is also a candidate of others
            np.testing.assert_allclose(means[~own], mean, rtol=FLOAT32)
            assert added[own].mean() == pytest.approx(mean, rel=1e-4)
        assert np.abs(means[own] - mean).min() > 1e-6 * mean
    expected = (1 - share) * float(whole["loss_clean"]) + share * float(whole["loss_cutmix"])
    assert whole["loss"] == pytest.approx(expected, rel=FLOAT32)


def test_the_bank_holds_clean_embeddings_only(x64):
    """Rows 0 and 1 of every 4 are cut-mixed: their images have no cluster in the next epoch."""
    run = SmallRun(small_config("deepcluster", scheme="std+cmx", **{"views.cutmix.replace": 0.5}))
    run.train(0)
    with jax.set_mesh(run.trainer.mesh):
        batches, clean = run.batches(run.steps_per_epoch), set()
        run.state, _ = run.steps.refresh(run.state, jnp.int32(0))
        for _ in range(run.steps_per_epoch):
            batch = next(batches)
            clean |= set(np.ravel(batch.index)[np.arange(32) % 4 >= 2].tolist())
            run.state, _ = run.steps.train(run.state, batch, None)
        method = jax.device_get(run.steps.refresh(run.state, jnp.int32(1))[0].method)
    written = method.bank.index.ravel()
    assert len(clean) == 32 and set(written[written >= 0].tolist()) == clean
    np.testing.assert_array_equal(np.flatnonzero((method.assignments >= 0).all(axis=0)), sorted(clean))
    np.testing.assert_array_equal((method.assignments < 0).all(axis=0), ~np.isin(np.arange(70), list(clean)))


def test_deepcluster_says_what_replaced_images_lose(caplog):
    settings = {"scheme": "std+cmx", "views.cutmix.replace": 0.5}
    with caplog.at_level("WARNING"):
        make_trainer(small_config("deepcluster", **settings), 70, jax.devices()[:1])
        make_trainer(small_config("pcl", **settings), 70, jax.devices()[:1])
    (line,) = [record.getMessage() for record in caplog.records]
    assert "50% of the images" in line and "no cluster" in line and "\n" not in line


@pytest.mark.parametrize(
    ("scheme", "settings", "expected"),
    [
        ("std+cmx", {}, []),
        ("", {"views.cutmix.ramp_epochs": 5.0}, []),
        ("std+cmx", {"views.adversarial.weight": 0.5, "views.cutmix.start_epoch": 2.5}, []),
        ("std+cmx", {"views.cutmix.start_epoch": 3.0}, ["views.cutmix is never used: its start_epoch=3 is not before"]),
        ("std", {"views.mixup.alpha": 0.2, "views.mixup.replace": 0.5}, ["so alpha=0.2, replace=0.5 changes nothing"]),
        ("std", {"views.cutmix.alpha": 1.0}, ["views.cutmix is not used, so alpha=1.0 changes nothing: it needs +cmx"]),
        ("", {"views.noise.start_epoch": 1.0}, ["it needs a weight above 0"]),
    ],
)
def test_view_settings_that_change_nothing_are_told(scheme, settings, expected, caplog):
    config = small_config("moco", scheme=scheme, precision="float32", **settings)  # 3 epochs
    make_trainer(config, 70, jax.devices()[:1])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(expected) and all(part in line for part, line in zip(expected, messages, strict=True))


def test_a_pass_has_a_loss_while_it_has_rows():
    settings = {"views.cutmix.replace": 1.0, "views.cutmix.start_epoch": 1.0, "views.noise.weight": 1.0}
    objective = make_trainer(small_config("moco", **settings, **{"views.adversarial.weight": 0.0}), 70).objective
    assert [objective.scored_passes(step) for step in (0, 1)] == [{"clean", "noise"}] * 2
    assert [objective.scored_passes(step) for step in (2, 9)] == [{"cutmix", "noise"}] * 2


def test_a_view_that_replaces_all_rows_leaves_no_clean_pass(x64):
    run = SmallRun(small_config("moco", scheme="std+cmx", **{"views.cutmix.replace": 1.0}))
    scheme = run.trainer.objective.scheme
    assert (
        not run.trainer.objective.has_pass("clean", jnp.int32(0))
        and scheme.weights(jnp.int32(0)).get("clean", 0.0) == 0
    )
    before = jax.device_get(run.state.params)
    _, metrics, _ = next_step(run)
    assert metrics["loss"] == pytest.approx(metrics["loss_cutmix"], rel=1e-12)
    assert metrics.get("loss_clean", 0.0) == 0
    assert largest_difference(jax.device_get(run.state.params), before) > 1e-4


def step_flops(**settings):
    """Floating-point operations of the compiled step of MoCo."""
    run = SmallRun(small_config("moco", precision="float32", **settings))
    with jax.set_mesh(run.trainer.mesh):
        shapes = run.trainer.state_shapes(), run.trainer.batch_shapes(), None
        return run.steps.train.lower(*shapes).compile().cost_analysis()["flops"]


def test_replacing_costs_no_more_than_the_plain_step():
    plain = step_flops(scheme="std")
    for share in (0.5, 1.0):
        assert step_flops(scheme="std+cmx", **{"views.cutmix.replace": share}) == pytest.approx(plain, rel=0.05)
    assert step_flops(scheme="std+cmx") > 1.5 * plain


# ---- names of schemes -----------------------------------------------------------------------------------------------

FIGURE_2 = {
    "std": set(),
    "std+adv": {"adversarial"},
    "std+cmx": {"cutmix"},
    "std+adv+cmx": {"adversarial", "cutmix"},
    "std+adv+cmxA": {"adversarial", "cutmix_adversarial"},
    "all": {"adversarial", "cutmix", "cutmix_adversarial"},
}


@pytest.mark.parametrize("scheme", FIGURE_2)
def test_the_schemes_of_figure_2_have_the_papers_views(scheme):
    config = common.get_config()
    config.scheme = scheme
    assert {view.name for view in make_scheme(config).views} == FIGURE_2[scheme]
    assert scheme_views(scheme) == FIGURE_2[scheme]


@pytest.mark.parametrize("count", [2, 3])
def test_a_scheme_is_a_sum_in_any_order(count):
    config, names = common.get_config(), {view.scheme_name: view.name for view in VIEWS.values()}
    for chosen in itertools.permutations(names, count):
        config.scheme = "+".join(("std", *chosen))
        assert {view.name for view in make_scheme(config).views} == {names[name] for name in chosen}
    config.views.noise.weight, config.scheme = 0.5, "std+mixup"
    assert [view.name for view in make_scheme(config).views] == ["mixup"]  # what is not named does not count


@pytest.mark.parametrize(
    "scheme", ["std+adw", "std+adv+adv", "std+", "+std", "std+all", "std+std", "hexa", "std adv", "all+adv"]
)
def test_unknown_and_repeated_names_are_one_line(scheme):
    config = common.get_config()
    config.scheme = scheme
    with pytest.raises(ConfigError, match=re.escape(f"config.scheme={scheme!r}")) as raised:
        make_scheme(config)
    assert "\n" not in str(raised.value) and "cmxA" in str(raised.value)


# ---- views and methods of one's own ---------------------------------------------------------------------------------


def page_sections():
    """The sections of docs/extending.md that end in a command: {title: ({file: text}, command)}."""
    sections = {}
    for section in re.split(r"^## ", (REPOSITORY / "docs" / "extending.md").read_text(), flags=re.MULTILINE)[1:]:
        files = {
            re.match(r"# (\S+\.py)\n", text)[1]: text
            for text in re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
        }
        commands = re.findall(r"^```sh\n(.*?)^```", section, re.M | re.S)
        if commands:
            (command,) = commands
            sections[section.splitlines()[0]] = files, command
    return sections


@pytest.mark.parametrize(
    "title, losses",
    [
        ("A view", {"clean", "erased"}),
        ("A method", {"clean", "adversarial", "cutmix"}),
        ("A source", {"clean"}),
    ],
)
def test_the_page_on_extending_runs_as_printed(tmp_path, title, losses):
    files, command = page_sections()[title]
    assert len(files) == 2
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    program, *words = shlex.split(command)
    assert program == "python"
    words.append("--config.linear.at_end=False")  # takes longer than the run
    ended = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    (workdir,) = (tmp_path / "runs").iterdir()
    steps = [line for line in lines(workdir) if "loss" in line]
    assert steps and {name for name in steps[0] if name.startswith("loss_")} == {f"loss_{name}" for name in losses}
    assert all(np.isfinite(line["loss"]) for line in steps)
    config = json.loads((workdir / "config.json").read_text())
    # The command's own setting went into the block that the config file added.
    settings = {
        "A view": lambda: config["views"]["erased"]["share"] == 0.4,
        "A method": lambda: config["plain_byol"]["momentum"] == 0.9,
        "A source": lambda: config["data"]["source"] == "sky:64",
    }
    assert settings[title]()


def test_every_runnable_section_of_the_page_is_run_above():
    assert set(page_sections()) == {"A view", "A method", "A source"}


def test_until_its_first_pass_the_adversarial_set_is_a_copy_of_the_clean_one(x64):
    """Adam would shrink it by whole steps: weight decay is all the gradient it has."""
    settings = {"scheme": "std+adv", "views.adversarial.start_epoch": 2.0, "optimizer.name": "adam"}
    run = SmallRun(small_config("moco", **settings, **{"optimizer.learning_rate": 0.01}))
    state = run.train(3)  # two steps an epoch
    assert adversarial_differences(state) == 0
    fresh = jax.device_get(SmallRun(small_config("moco", **settings)).state)
    assert largest_difference(state.params, fresh.params) > 1e-3
    assert adversarial_differences(run.train(6)) > 1e-4


def adversarial_differences(state):
    """Largest difference between the two sets' parameters, and between their statistics."""
    by_path = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    pairs = [
        (leaf, by_path[path.replace("adversarial_", "")]) for path, leaf in by_path.items() if "adversarial_" in path
    ]
    assert pairs
    stats = state.batch_stats["adversarial_batch_stats"], state.batch_stats["clean_batch_stats"]
    return max(*(np.max(np.abs(a - b)) for a, b in pairs), largest_difference(*stats))


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": "std+noise", "views.noise.replace": 0.5, "bn_group_size": 32},
        {"scheme": "std+cmx", "views.cutmix.one_box": True},
    ],
)
def test_replaced_rows_and_shared_boxes_are_the_same_on_any_layout(settings, layout, x64):
    if "bn_group_size" in settings and layout[1] > 1:
        pytest.skip("a BatchNorm group of the whole batch leaves no microbatches")
    devices, microbatches = layout
    runs = [SmallRun(small_config("moco", **settings)).train(2)]
    other = SmallRun(small_config("moco", **settings, **{"runtime.microbatches": microbatches}), devices)
    assert largest_difference(other.train(2).params, runs[0].params) < 1e-9


def test_settings_that_would_not_do_what_they_say_are_refused():
    def refused(message, method="moco", **settings):
        with pytest.raises(ConfigError, match=message):
            make_trainer(small_config(method, **settings), 70, jax.devices()[:1])

    refused("no pass with the clean BatchNorm set", scheme="std+adv", **{"views.adversarial.replace": 1.0})
    whole = {"scheme": "std+cmx", "views.cutmix.replace": 1.0}
    refused("of which views.*.replace leave none", method="deepcluster", **whole)
    half = {"views.cutmix.replace": 0.5, "deepcluster.num_clusters": 33}
    refused("more than the 32 images seen clean", method="deepcluster", scheme="std+cmx", **half)
    refused("no control of an attack limited", scheme="std+noise", **{"views.max_increase": 0.1})
    refused("no random_start", **{"views.max_increase": 0.1, "views.random_start": True})
    refused("shows other crops", scheme="std+extra", **{"views.extra.target": "own_crop"})
