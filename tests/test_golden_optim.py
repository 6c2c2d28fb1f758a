"""Golden tests of `hexa_jax.optim`: apex LARC, torch's SGD and the reference schedules in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hexa_jax import optim

STEPS = 5


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(3, 4)), "scale": np.ones(4), "bias": rng.normal(size=4)}


def gradients(seed=1):
    rng = np.random.default_rng(seed)
    return [{name: rng.normal(size=value.shape) for name, value in start().items()} for _ in range(STEPS)]


def torch_sgd_loop(parameters, all_gradients, learning_rate, momentum, change):
    """torch.optim.SGD: b <- momentum * b + d, p <- p - learning_rate * b, where d is the `change`d gradient."""
    parameters = {name: value.copy() for name, value in parameters.items()}
    buffers = {name: np.zeros_like(value) for name, value in parameters.items()}
    history = []
    for step, gradient in enumerate(all_gradients):
        for name, p in parameters.items():
            buffers[name] = momentum * buffers[name] + change(p, gradient[name])
            parameters[name] = p - learning_rate(step) * buffers[name]
        history.append(dict(parameters))
    return history


def larc_change(weight_decay, trust_coefficient):
    """apex LARC(clip=False): (g + wd p) * trust |p| / (|g| + wd |p| + 1e-8), or g itself where a norm is zero."""

    def change(p, g):
        p_norm, g_norm = np.linalg.norm(p), np.linalg.norm(g)
        if p_norm == 0 or g_norm == 0:
            return g
        return (g + weight_decay * p) * trust_coefficient * p_norm / (g_norm + weight_decay * p_norm + 1e-8)

    return change


def run(transformation, parameters, all_gradients):
    parameters = jax.tree.map(jnp.asarray, parameters)
    state = transformation.init(parameters)
    history = []
    for gradient in all_gradients:
        updates, state = transformation.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        history.append(parameters)
    return history


def assert_same_history(got, expected, **tolerance):
    for got_step, expected_step in zip(got, expected, strict=True):
        for name in expected_step:
            np.testing.assert_allclose(got_step[name], expected_step[name], err_msg=name, **tolerance)


def types(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jax.typeof(leaf).dtype, jax.typeof(leaf).weak_type), tree)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("trust_coefficient", [0.001, 0.02])
def test_larc_equals_apex(x64, weight_decay, trust_coefficient):
    got = run(optim.larc(4.8, 0.9, weight_decay, trust_coefficient), start(), gradients())
    expected = torch_sgd_loop(start(), gradients(), lambda _: 4.8, 0.9, larc_change(weight_decay, trust_coefficient))
    assert_same_history(got, expected, rtol=1e-10, atol=1e-12)


def test_larc_applies_the_learning_rate_after_the_momentum_buffer(x64):
    """With a learning rate that changes, lr before and after the buffer are different optimisers."""

    def schedule(count):
        return 4.8 / (1 + count) ** 2

    got = run(optim.larc(schedule, 0.9, 0.01, 0.01), start(), gradients())
    expected = torch_sgd_loop(start(), gradients(), schedule, 0.9, larc_change(0.01, 0.01))
    assert_same_history(got, expected, rtol=1e-10, atol=1e-12)


def test_larc_takes_the_raw_gradient_of_a_zero_parameter(x64):
    parameters = {"bias": np.zeros(3), "kernel": np.ones((2, 2))}
    rng = np.random.default_rng(2)
    all_gradients = [{"bias": rng.normal(size=3), "kernel": rng.normal(size=(2, 2))} for _ in range(STEPS)]
    got = run(optim.larc(0.5, 0.9, 0.1, 0.001), parameters, all_gradients)
    np.testing.assert_allclose(got[0]["bias"], -0.5 * all_gradients[0]["bias"], rtol=1e-12)
    expected = torch_sgd_loop(parameters, all_gradients, lambda _: 0.5, 0.9, larc_change(0.1, 0.001))
    assert_same_history(got, expected, rtol=1e-10, atol=1e-12)


def test_larc_does_not_decay_where_the_gradient_is_zero(x64):
    parameters = {"kernel": np.ones((2, 3))}
    got = run(optim.larc(0.5, 0.9, 0.1, 0.001), parameters, [{"kernel": np.zeros((2, 3))}] * 2)
    np.testing.assert_array_equal(got[-1]["kernel"], parameters["kernel"])


def test_larc_has_no_exclusion_list(x64):
    """A BatchNorm scale is adapted and decayed like a kernel: its step is trust |p| (g + wd p) / (|g| + wd |p|)."""
    parameters, gradient = {"bn": {"scale": np.ones(4)}}, {"bn": {"scale": np.array([3.0, 0.0, 0.0, 4.0])}}
    got = run(optim.larc(1.0, 0.9, 0.5, 0.001), parameters, [gradient])
    step = 0.001 * 2.0 * (gradient["bn"]["scale"] + 0.5) / (5.0 + 0.5 * 2.0 + 1e-8)
    np.testing.assert_allclose(got[0]["bn"]["scale"], 1.0 - step, rtol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.1])
def test_sgd_equals_torch(x64, weight_decay):
    got = run(optim.sgd(0.03, 0.9, weight_decay), start(), gradients())
    expected = torch_sgd_loop(start(), gradients(), lambda _: 0.03, 0.9, lambda p, g: g + weight_decay * p)
    assert_same_history(got, expected, rtol=1e-12, atol=1e-14)


def test_sgd_applies_the_learning_rate_after_the_momentum_buffer(x64):
    def schedule(count):
        return 0.3 / (1 + count) ** 2

    got = run(optim.sgd(schedule, 0.9, 0.1), start(), gradients())
    expected = torch_sgd_loop(start(), gradients(), schedule, 0.9, lambda p, g: g + 0.1 * p)
    assert_same_history(got, expected, rtol=1e-12, atol=1e-14)


def test_sgd_decays_every_parameter(x64):
    zeros = jax.tree.map(np.zeros_like, start())
    got = run(optim.sgd(0.5, 0.9, 0.1), start(), [zeros])
    for name, value in start().items():
        np.testing.assert_allclose(got[0][name], 0.95 * value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ["larc", "sgd"])
def test_an_update_keeps_the_types_of_state_and_parameters(name, scheduled):
    rate = optim.warmup_cosine(4.8, 0.0048, 10, 2, 0.3) if scheduled else 4.8
    transformation = optim.larc(rate, 0.9, 1e-6, 0.001) if name == "larc" else optim.sgd(rate, 0.9, 1e-4)
    parameters = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start())
    state = transformation.init(parameters)
    gradient = jax.tree.map(jnp.ones_like, parameters)
    updates, next_state = jax.jit(transformation.update)(gradient, state, parameters)
    assert types(next_state) == types(state)
    assert types(updates) == types(parameters)


@pytest.mark.parametrize("warmup_steps", [0, 2, 7])
def test_warmup_cosine_equals_the_reference_at_every_step(warmup_steps):
    base, final, steps, warmup_start = 4.8, 0.0048, 40, 0.3
    schedule = optim.warmup_cosine(base, final, steps, warmup_steps, warmup_start)
    rest = steps - warmup_steps
    cosine = [final + 0.5 * (base - final) * (1 + np.cos(np.pi * t / rest)) for t in range(rest)]
    expected = np.concatenate([np.linspace(warmup_start, base, warmup_steps), cosine])
    got = [float(schedule(jnp.asarray(step))) for step in range(steps)]
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_warmup_cosine_of_a_full_length_run():
    steps, warmup_steps = 249_600, 3_120
    schedule = jax.jit(optim.warmup_cosine(4.8, 0.0048, steps, warmup_steps, 0.3))
    for step in [0, 1, 3_119, 3_120, 3_121, 126_360, 249_599]:
        if step < warmup_steps:
            expected = np.linspace(0.3, 4.8, warmup_steps)[step]
        else:
            share = (step - warmup_steps) / (steps - warmup_steps)
            expected = 0.0048 + 0.5 * (4.8 - 0.0048) * (1 + np.cos(np.pi * share))
        np.testing.assert_allclose(float(schedule(jnp.asarray(step))), expected, rtol=1e-5, atol=1e-6)


def test_epoch_cosine_changes_once_an_epoch():
    schedule = optim.epoch_cosine(0.03, 4, 5)
    got = [float(schedule(jnp.asarray(step))) for step in range(20)]
    expected = [0.03 * 0.5 * (1 + np.cos(np.pi * (step // 5) / 4)) for step in range(20)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert len(set(got)) == 4


def test_epoch_cosine_of_a_full_length_run_changes_at_the_first_step_of_an_epoch():
    schedule = jax.jit(optim.epoch_cosine(0.03, 200, 5004))
    for epoch in [1, 2, 7, 100, 133, 199]:
        for step, current in [(5004 * epoch - 1, epoch - 1), (5004 * epoch, epoch)]:
            expected = 0.03 * 0.5 * (1 + np.cos(np.pi * current / 200))
            np.testing.assert_allclose(float(schedule(jnp.asarray(step))), expected, rtol=1e-6, atol=3e-9)
