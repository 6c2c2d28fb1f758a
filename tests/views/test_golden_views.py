"""Golden tests of `hexa_jax.views`: PGD (eq. 5-7) against a NumPy loop, CutMix (eq. 8-9) by counting pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hexa_jax.views import adversarial
from hexa_jax.views import cutmix as cutmix_views

cutmix = jax.jit(cutmix_views, static_argnames=("alpha", "beta"))

GREY = 1 / 255  # one grey level on [0, 1] pixels


def pixels(seed, *shape):
    """Random pixels, a tenth of them black and a tenth white."""
    return np.clip(np.random.default_rng(seed).uniform(-0.125, 1.125, size=shape), 0, 1)


def image_norm(difference):
    return np.sqrt((difference**2).sum(axis=(-3, -2, -1), keepdims=True))


def bowl(centre):
    """The objective -|x - c|^2 of each crop image, whose maximum is the image c."""
    return lambda x: -jnp.sum((x - centre) ** 2, axis=(-3, -2, -1))


def bowl_gradient(centre):
    return lambda x: -2 * (x - centre)


def pgd_loop(x, gradient, epsilon, step_size, steps, norm):
    """Projected gradient ascent: step, project on the ball around x, clip to [0, 1]."""
    moved = x.copy()
    for _ in range(steps):
        g = gradient(moved)
        if norm == "linf":
            delta = np.clip(moved + step_size * np.sign(g) - x, -epsilon, epsilon)
        else:
            delta = moved + step_size * g / image_norm(g) - x
            delta = delta * np.minimum(1.0, epsilon / image_norm(delta))
        moved = np.clip(x + delta, 0.0, 1.0)
    return moved


# ---- adversarial ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon, step_size", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_one_linf_step_moves_by_the_smaller_of_epsilon_and_step(x64, epsilon, step_size):
    x, centre = pixels(0, 3, 2, 4, 4, 3), pixels(1, 3, 2, 4, 4, 3)
    result = adversarial(jax.random.key(0), x, bowl(centre), epsilon=epsilon * GREY, step_size=step_size * GREY)
    expected = np.clip(x + min(epsilon, step_size) * GREY * np.sign(centre - x), 0, 1)
    np.testing.assert_allclose(result, expected, atol=1e-14)


def test_one_linf_step_on_softplus(x64):
    rng = np.random.default_rng(2)
    x, slope, offset = pixels(0, 3, 4, 4, 3), rng.normal(size=(3, 4, 4, 3)), rng.normal(size=(3, 4, 4, 3))

    def objective(x):
        return jnp.sum(jax.nn.softplus(slope * x + offset), axis=(1, 2, 3))

    result = adversarial(jax.random.key(0), x, objective, epsilon=0.1, step_size=0.1)
    gradient = slope / (1 + np.exp(-(slope * x + offset)))
    np.testing.assert_allclose(result, np.clip(x + 0.1 * np.sign(gradient), 0, 1), atol=1e-14)


def test_default_is_one_linf_step_from_the_clean_image(x64):
    x, centre = pixels(0, 2, 4, 4, 3), pixels(1, 2, 4, 4, 3)
    short = adversarial(jax.random.key(0), x, bowl(centre), epsilon=0.1, step_size=0.05)
    long = adversarial(
        jax.random.key(1),
        x,
        bowl(centre),
        epsilon=0.1,
        step_size=0.05,
        steps=1,
        norm="linf",
        random_start=False,
    )
    np.testing.assert_array_equal(short, long)


def test_epsilon_is_in_the_units_of_the_pixels_as_passed():
    levels = np.random.default_rng(3).integers(10, 245, size=(2, 4, 4, 3))
    x = jnp.asarray(levels / 255, jnp.float32)
    result = adversarial(jax.random.key(0), x, lambda x: x.sum((1, 2, 3)), epsilon=GREY, step_size=GREY)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(result) * 255, levels + 1, atol=1e-4)


def test_a_zero_gradient_moves_nothing_with_linf():
    x = jnp.full((2, 4, 4, 3), 0.5)
    result = adversarial(jax.random.key(0), x, lambda x: 0.0 * x.sum((1, 2, 3)), epsilon=0.1, step_size=0.1)
    np.testing.assert_array_equal(result, x)


def test_a_zero_gradient_moves_nothing_with_l2():
    x = jnp.full((2, 4, 4, 3), 0.5)
    result = adversarial(jax.random.key(0), x, lambda x: 0.0 * x.sum((1, 2, 3)), epsilon=0.1, step_size=0.1, norm="l2")
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize("epsilon, step_size, steps", [(0.1, 0.04, 5), (0.02, 0.05, 4), (0.5, 0.05, 2)])
@pytest.mark.parametrize("shape", [(3, 4, 4, 3), (2, 3, 4, 4, 3)])
def test_linf_steps_equal_a_numpy_loop(x64, shape, epsilon, step_size, steps):
    x = pixels(4, *shape)
    centre = x + np.random.default_rng(5).uniform(-0.1, 0.1, size=shape)  # near: the gradient's sign turns on the way
    result = adversarial(
        jax.random.key(0), x, bowl(centre), epsilon=epsilon, step_size=step_size, steps=steps, norm="linf"
    )
    expected = pgd_loop(x, bowl_gradient(centre), epsilon, step_size, steps, "linf")
    np.testing.assert_allclose(result, expected, atol=1e-13)


@pytest.mark.parametrize("epsilon, step_size, steps", [(0.5, 0.3, 1), (0.3, 0.9, 2), (0.5, 0.2, 5), (2.0, 0.7, 3)])
@pytest.mark.parametrize("spread", [0.06, 0.6])  # the gradient turns on the way, or always points out of the ball
@pytest.mark.parametrize("shape", [(3, 4, 4, 3), (2, 3, 4, 4, 3)])
def test_l2_steps_equal_a_numpy_loop(x64, shape, spread, epsilon, step_size, steps):
    x = pixels(4, *shape)
    centre = x + np.random.default_rng(5).uniform(-spread, spread, size=shape)
    result = adversarial(
        jax.random.key(0), x, bowl(centre), epsilon=epsilon, step_size=step_size, steps=steps, norm="l2"
    )
    expected = pgd_loop(x, bowl_gradient(centre), epsilon, step_size, steps, "l2")
    np.testing.assert_allclose(result, expected, atol=1e-9)


def test_one_l2_step_has_the_length_of_the_step_for_each_crop_image(x64):
    x = 0.5 + 0.01 * pixels(6, 2, 3, 4, 4, 3)  # far from black and white: nothing is clipped
    scale = np.arange(1.0, 7.0).reshape(2, 3)  # crops with very different gradients

    result = adversarial(
        jax.random.key(0),
        x,
        lambda x: scale**4 * jnp.sum(x**2, (2, 3, 4)),
        epsilon=0.3,
        step_size=0.2,
        norm="l2",
    )
    np.testing.assert_allclose(image_norm(np.asarray(result) - x), 0.2, rtol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_scale_of_the_loss_does_not_matter(x64, norm):
    x, centre = pixels(7, 2, 4, 4, 3), pixels(8, 2, 4, 4, 3)
    attack = {"epsilon": 0.3, "step_size": 0.1, "steps": 3, "norm": norm}
    large = adversarial(jax.random.key(0), x, bowl(centre), **attack)
    small = adversarial(jax.random.key(0), x, lambda x: 1e-6 * bowl(centre)(x), **attack)
    np.testing.assert_allclose(large, small, atol=1e-7)


def test_the_gradient_is_that_of_the_sum_of_the_losses(x64):
    """Example 0's loss may depend on example 1's pixels (SimCLR): the cross terms count."""
    x = 0.4 + 0.2 * pixels(9, 2, 4, 4, 3)
    weight = np.array([[1.0, -3.0], [2.0, 1.0]])  # loss_i = sum_j weight_ij * brightness_j

    def objective(x):
        return jnp.asarray(weight) @ x.sum((1, 2, 3))

    result = adversarial(jax.random.key(0), x, objective, epsilon=0.01, step_size=0.01)
    signs = np.array([1.0, -1.0]).reshape(2, 1, 1, 1)  # column sums 3 and -2
    np.testing.assert_allclose(result, x + 0.01 * signs, atol=1e-14)


@pytest.mark.parametrize("per_crop", [True, False])
def test_a_list_of_resolutions_is_attacked_as_a_whole(x64, per_crop):
    """The objective couples both resolutions, so a crop's gradient depends on the other's pixels."""
    large, small = 0.3 + 0.4 * pixels(10, 2, 1, 6, 6, 3), 0.3 + 0.4 * pixels(11, 2, 3, 4, 4, 3)
    a, b = np.random.default_rng(12).normal(size=large.shape), np.random.default_rng(13).normal(size=small.shape)

    def objective(crops):
        first, second = (crops[0] * a).sum((1, 2, 3, 4)), (crops[1] * b).sum((1, 2, 3, 4))
        loss = first * second
        return jnp.stack([loss] * 4, axis=1) if per_crop else loss

    result = adversarial(jax.random.key(0), [large, small], objective, epsilon=0.02, step_size=0.02)
    first, second = (large * a).sum((1, 2, 3, 4), keepdims=True), (small * b).sum((1, 2, 3, 4), keepdims=True)
    assert isinstance(result, list)
    np.testing.assert_allclose(result[0], large + 0.02 * np.sign(a * second), atol=1e-14)
    np.testing.assert_allclose(result[1], small + 0.02 * np.sign(b * first), atol=1e-14)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_list_of_resolutions_equals_each_attacked_alone(x64, norm):
    large, small = pixels(10, 2, 1, 6, 6, 3), pixels(11, 2, 3, 4, 4, 3)
    attack = {"epsilon": 0.2, "step_size": 0.1, "steps": 3, "norm": norm}

    def objective(crops):
        return jnp.concatenate([bowl(0.4)(crops[0]), bowl(0.6)(crops[1])], axis=1)

    result = adversarial(jax.random.key(0), [large, small], objective, **attack)
    alone = [adversarial(jax.random.key(0), x, bowl(c), **attack) for x, c in [(large, 0.4), (small, 0.6)]]
    for got, expected in zip(result, alone, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3])
def test_the_objective_is_evaluated_once_a_step_for_all_crops(steps):
    evaluations = []

    def objective(crops):
        assert [crop.shape for crop in crops] == [(2, 2, 6, 6, 3), (2, 3, 4, 4, 3)]
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.concatenate([crop.sum((2, 3, 4)) for crop in crops], axis=1)

    crops = [jnp.full((2, 2, 6, 6, 3), 0.5), jnp.full((2, 3, 4, 4, 3), 0.5)]
    result = adversarial(jax.random.key(0), crops, objective, epsilon=0.1, step_size=0.1, steps=steps)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert len(evaluations) == steps


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.05), ("l2", 0.5)])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_attack_leaves_neither_the_ball_nor_the_pixel_range(x64, seed, steps, random_start, norm, epsilon):
    x, centre = pixels(seed, 3, 2, 4, 4, 3), pixels(seed + 50, 3, 2, 4, 4, 3)
    settings = {"epsilon": epsilon, "step_size": 0.8 * epsilon, "steps": steps, "norm": norm}
    key = jax.random.key(seed)
    result = np.asarray(adversarial(key, x, bowl(centre), random_start=random_start, **settings))
    assert result.min() >= 0 and result.max() <= 1
    if norm == "linf":
        assert np.abs(result - x).max() <= epsilon + 1e-14
    else:
        assert image_norm(result - x).max() <= epsilon + 1e-12


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.02), ("l2", 0.3)])
def test_an_attack_raises_the_loss_of_every_crop(x64, norm, epsilon):
    x, centre = pixels(14, 3, 2, 4, 4, 3), pixels(15, 3, 2, 4, 4, 3)
    result = adversarial(jax.random.key(0), x, bowl(centre), epsilon=epsilon, step_size=epsilon, norm=norm)
    assert (np.asarray(bowl(centre)(result)) > np.asarray(bowl(centre)(x))).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_the_same_key_gives_the_same_attack(norm, random_start):
    x, centre = pixels(16, 3, 2, 4, 4, 3).astype(np.float32), pixels(17, 3, 2, 4, 4, 3).astype(np.float32)

    @jax.jit
    def attack(key):
        return adversarial(
            key, x, bowl(centre), epsilon=0.2, step_size=0.05, steps=2, norm=norm, random_start=random_start
        )

    np.testing.assert_array_equal(attack(jax.random.key(7)), attack(jax.random.key(7)))
    assert (attack(jax.random.key(7)) != attack(jax.random.key(8))).any() == random_start


def test_the_linf_random_start_is_uniform_in_the_ball_and_differs_between_crops():
    x = jnp.full((4, 2, 32, 32, 3), 0.5)
    result = adversarial(
        jax.random.key(0), x, lambda x: 0.0 * x.sum((2, 3, 4)), epsilon=0.1, step_size=0.1, random_start=True
    )
    delta = np.asarray(result - x).reshape(8, -1)
    np.testing.assert_allclose(delta.mean(axis=1), 0.0, atol=0.006)  # standard error 0.001
    np.testing.assert_allclose(delta.std(axis=1), 0.1 / np.sqrt(3), rtol=0.05)
    correlations = np.corrcoef(delta) - np.eye(8)
    assert np.abs(correlations).max() < 0.1  # standard error 0.018


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_with_one_key_per_example_a_random_start_depends_on_its_own_key_only(norm):
    x, rows = pixels(18, 5, 2, 4, 4, 3).astype(np.float32), np.array([4, 1, 2])

    def attack(keys, x):
        return adversarial(keys, x, bowl(0.5), epsilon=0.2, step_size=0.01, norm=norm, random_start=True)

    whole = np.asarray(attack(jax.random.split(jax.random.key(0), 5), x))
    part = attack(jax.random.split(jax.random.key(0), 5)[rows], x[rows])
    np.testing.assert_allclose(part, whole[rows], atol=1e-7)


# ---- cutmix ---------------------------------------------------------------------------------------------------------


def distinct(*shape):
    """Images whose every number occurs once, exactly, in float32."""
    return jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)


def pasted(x, mixed, permutation):
    """Where `mixed` shows the partner, [..., H, W]; fails unless each pixel is the partner's or the image's own."""
    x, mixed, partner = np.asarray(x), np.asarray(mixed), np.asarray(x)[np.asarray(permutation)]
    assert ((mixed == x) | (mixed == partner)).all()
    mask = (mixed != x).any(axis=-1)
    assert (mixed == np.where(mask[..., None], partner, x)).all()
    return mask


@pytest.mark.parametrize("shape", [(6, 16, 16, 3), (6, 3, 16, 16, 3), (6, 2, 12, 20, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lam_is_exactly_the_share_of_pixels_of_the_image_itself(shape, seed):
    value = jnp.arange(6.0).reshape((6,) + (1,) * (len(shape) - 1))
    x = jnp.broadcast_to(value, shape)
    mixed, lam, permutation = cutmix(
        jax.random.key(seed), x, alpha=5.0, beta=3.0, permutation=jnp.roll(jnp.arange(6), 1)
    )
    own = np.asarray(mixed) == np.asarray(x)
    assert lam.shape == shape[:-3]
    np.testing.assert_allclose(lam, own.mean(axis=(-3, -2, -1)), atol=1e-6)
    np.testing.assert_array_equal(permutation, np.roll(np.arange(6), 1))


def test_both_labels_of_a_mixture_have_their_share_of_pixels():
    x = jnp.broadcast_to(jnp.arange(8.0).reshape(8, 1, 1, 1, 1), (8, 2, 16, 16, 3))
    mixed, lam, permutation = cutmix(jax.random.key(3), x, alpha=5.0, beta=3.0)
    expected = lam * np.arange(8.0)[:, None] + (1 - lam) * np.asarray(permutation)[:, None]
    np.testing.assert_allclose(np.asarray(mixed).mean(axis=(2, 3, 4)), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 16, 16, 3), (8, 3, 12, 20, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pasted_patches_are_axis_aligned_rectangles_of_the_same_place_and_crop(shape, seed):
    x = distinct(*shape)
    mixed, _, permutation = cutmix(jax.random.key(seed), x, alpha=1.0, beta=1.0, permutation=jnp.arange(8)[::-1])
    masks = pasted(x, mixed, permutation).reshape(-1, *shape[-3:-1])
    assert masks.any()
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if mask.any():
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()


def test_the_partner_is_shared_by_the_crops_of_an_image():
    x = jnp.broadcast_to(jnp.arange(16.0).reshape(16, 1, 1, 1, 1), (16, 4, 8, 8, 3))
    mixed, _, permutation = cutmix(jax.random.key(0), x, alpha=2.0, beta=5.0)
    for example, crops in enumerate(np.asarray(mixed)):
        assert set(np.unique(crops)) <= {example, int(permutation[example])}


def test_the_returned_permutation_is_a_permutation():
    drawn = [
        np.asarray(cutmix(jax.random.key(seed), jnp.zeros((16, 4, 4, 3)), alpha=5.0, beta=3.0)[2]) for seed in range(5)
    ]
    for permutation in drawn:
        assert np.issubdtype(permutation.dtype, np.integer)
        np.testing.assert_array_equal(np.sort(permutation), np.arange(16))
    assert len({tuple(permutation) for permutation in drawn}) == 5


def test_a_given_permutation_is_respected():
    x, given = distinct(6, 2, 8, 8, 3), jnp.array([2, 0, 1, 5, 3, 4])
    mixed, _, permutation = cutmix(jax.random.key(0), x, alpha=1.0, beta=3.0, permutation=given)
    np.testing.assert_array_equal(permutation, given)
    assert pasted(x, mixed, given).any()


def test_boxes_of_the_crops_of_an_image_are_independent():
    x = jnp.zeros((512, 2, 16, 16, 1))
    _, lam, _ = cutmix(jax.random.key(0), x, alpha=5.0, beta=3.0)
    correlation = np.corrcoef(np.asarray(lam).T)[0, 1]
    assert abs(correlation) < 0.2  # standard error 0.044; a shared lambda0 gives 0.58


def test_the_same_key_gives_the_same_mixture():
    x = distinct(6, 2, 8, 8, 3)
    first = cutmix(jax.random.key(4), x, alpha=5.0, beta=3.0)
    second = cutmix(jax.random.key(4), x, alpha=5.0, beta=3.0)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_mean_lam_of_the_papers_beta_at_224_pixels():
    _, lam, _ = cutmix(jax.random.key(0), jnp.zeros((256, 2, 224, 224, 1)), alpha=5.0, beta=3.0)
    assert 0.72 <= float(lam.mean()) <= 0.78


@pytest.mark.parametrize("alpha, beta", [(5.0, 3.0), (3.0, 5.0), (1.0, 1.0)])
def test_mean_lam_equals_that_of_a_simulated_box(alpha, beta):
    """Side sqrt(1 - lambda0) of the crop, centre uniform, clipped: in real numbers, so up to a pixel of rounding."""
    rng = np.random.default_rng(0)
    half = 0.5 * np.sqrt(1 - rng.beta(alpha, beta, size=100_000))
    centre = rng.uniform(size=(2, 100_000))
    sides = np.minimum(centre + half, 1) - np.maximum(centre - half, 0)
    _, lam, _ = cutmix(jax.random.key(1), jnp.zeros((256, 4, 112, 112, 1)), alpha=alpha, beta=beta)
    assert abs(float(lam.mean()) - (1 - sides.prod(axis=0)).mean()) < 0.03  # standard error 0.006


def test_lambda0_of_one_leaves_the_image_unchanged():
    x = distinct(6, 2, 16, 16, 3)
    mixed, lam, _ = cutmix(jax.random.key(0), x, alpha=1e6, beta=1e-3, permutation=jnp.roll(jnp.arange(6), 1))
    np.testing.assert_array_equal(mixed, x)
    np.testing.assert_array_equal(lam, 1.0)


def test_lambda0_of_zero_covers_at_least_a_quarter():
    """A box as large as the crop keeps, after clipping, at least half of each side (less a pixel of rounding)."""
    x = jnp.zeros((64, 2, 32, 32, 1))
    _, lam, _ = cutmix(jax.random.key(0), x, alpha=1e-3, beta=1e6)
    assert float(lam.max()) <= 1 - (15 / 32) ** 2
    assert float(lam.min()) < 0.4


def test_a_list_of_resolutions_shares_the_permutation_and_has_a_lam_each():
    crops = [distinct(8, 2, 16, 16, 3), -distinct(8, 3, 8, 8, 3)]
    mixed, lam, permutation = cutmix(jax.random.key(0), crops, alpha=2.0, beta=3.0)
    assert permutation.shape == (8,)
    assert isinstance(mixed, list) and isinstance(lam, list)
    other = np.asarray(permutation) != np.arange(8)
    for x, mixture, share in zip(crops, mixed, lam, strict=True):
        assert mixture.shape == x.shape and share.shape == x.shape[:2]
        mask = pasted(x, mixture, permutation)
        np.testing.assert_allclose(share[other], 1 - mask.mean(axis=(-2, -1))[other], atol=1e-6)
        assert mask.any()


def test_a_single_crop_per_image_has_a_lam_without_a_crop_axis():
    mixed, lam, _ = cutmix(jax.random.key(0), jnp.zeros((4, 8, 8, 3)), alpha=5.0, beta=3.0)
    assert mixed.shape == (4, 8, 8, 3) and lam.shape == (4,)


def test_with_one_key_per_example_lam_depends_on_its_own_key_only():
    x, rows = jnp.zeros((6, 2, 16, 16, 3)), np.array([5, 0, 3])

    def shares(keys, x):
        return np.asarray(cutmix(keys, x, alpha=5.0, beta=3.0, permutation=jnp.arange(len(x)))[1])

    whole = shares(jax.random.split(jax.random.key(0), 6), x)
    part = shares(jax.random.split(jax.random.key(0), 6)[rows], x[rows])
    assert len(np.unique(whole)) > 3
    np.testing.assert_array_equal(part, whole[rows])


def test_with_one_key_per_example_boxes_depend_on_their_own_key_only():
    """Neighbours swap, so that a subset of pairs shows the same boxes as the whole batch does."""
    x, rows = distinct(6, 2, 16, 16, 3), np.array([4, 5, 0, 1])
    whole, _, _ = cutmix(
        jax.random.split(jax.random.key(0), 6),
        x,
        alpha=5.0,
        beta=3.0,
        permutation=jnp.array([1, 0, 3, 2, 5, 4]),
    )
    part, _, _ = cutmix(
        jax.random.split(jax.random.key(0), 6)[rows],
        x[rows],
        alpha=5.0,
        beta=3.0,
        permutation=jnp.array([1, 0, 3, 2]),
    )
    np.testing.assert_array_equal(part, np.asarray(whole)[rows])


def test_with_one_key_per_example_a_list_of_resolutions_has_different_boxes():
    keys = jax.random.split(jax.random.key(0), 64)
    crops = [jnp.zeros((64, 2, 16, 16, 1)), jnp.zeros((64, 2, 16, 16, 1))]
    _, lam, _ = cutmix(keys, crops, alpha=5.0, beta=3.0, permutation=jnp.arange(64))
    columns = np.concatenate([np.asarray(leaf) for leaf in lam], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(4)).max() < 0.5  # standard error 0.125


def test_what_bfloat16_leaves_of_one_grey_level():
    """The docstring of Attack says 0.9 to 1.8 levels, by ImageNet's means and deviations."""
    levels = np.arange(257) / 255
    arrived = []
    for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True):
        seen = np.asarray(jnp.asarray((levels - mean) / std, jnp.bfloat16), np.float64)
        arrived.append(np.diff(seen) * std * 255)
    assert 0.85 < np.min(arrived) < 0.95 and 1.75 < np.max(arrived) < 1.85
