"""Golden tests of SwAV, SimCLR and rotation: their losses and pseudo-labels against float64 NumPy, on 1 and 4 devices."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from hexa_jax import losses
from hexa_jax.core.batch import Batch
from hexa_jax.methods.base import Spec, Targets
from hexa_jax.methods.rotation import Rotation
from hexa_jax.methods.simclr import Candidates, SimCLR
from hexa_jax.methods.swav import SwAV, SwAVState

B, D, K, A = 8, 4, 5, 2  # rows of a step, embedding, prototypes, crops that get a code
ROWS = P(None, "data")
SPEC = Spec(batch_size=B, steps_per_epoch=2, num_examples=2 * B, embedding_dim=D, num_crops=(3,))
LAYOUTS = pytest.mark.parametrize("num_devices, microbatches", [(1, 1), (1, 2), (4, 1), (4, 2)])


def unit_rows(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_codes(seed, *shape):
    codes = np.random.default_rng(seed).uniform(size=shape)
    return codes / codes.sum(axis=-1, keepdims=True)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def assert_close(actual, expected, rtol=1e-10, atol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def make_mesh(num_devices):
    return jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])


def per_device(num_devices, function, in_specs, out_specs):
    mesh = make_mesh(num_devices)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


def make_batch(microbatches, row=None):
    """A step's rows, one of which shows a replaced image."""
    row = np.arange(B) if row is None else row
    row = row.astype(np.int32).reshape(microbatches, -1)
    return Batch(index=row + 100, row=row, valid=row != 3, label=np.full_like(row, -1))


def in_microbatches(outputs, microbatches):
    return outputs.reshape(microbatches, -1, *outputs.shape[1:])


# ---- Sinkhorn ----------------------------------------------------------------------------------------------------------


def sinkhorn_loop(scores, epsilon, iterations):
    """The rule of facebookresearch/swav, main_swav.py, line for line."""
    q = np.exp(scores / epsilon).T  # [K, N]
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True)
        q /= q.shape[0]
        q /= q.sum(axis=0, keepdims=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_with_a_mask_is_sinkhorn_of_the_remaining_rows(x64, iterations):
    scores = unit_rows(0, 12, D) @ unit_rows(1, K, D).T
    mask = np.arange(12) % 3 > 0
    scores[~mask] *= 1e3
    codes = np.asarray(losses.sinkhorn(scores, 0.1, iterations, mask=mask))
    assert_close(codes[mask], sinkhorn_loop(scores[mask], 0.1, iterations))
    np.testing.assert_array_equal(codes[~mask], 0.0)


def test_sinkhorn_with_a_mask_that_keeps_all_rows_is_plain_sinkhorn(x64):
    scores = unit_rows(2, 12, D) @ unit_rows(3, K, D).T
    assert_close(losses.sinkhorn(scores, 0.05, 3, mask=np.ones(12, bool)), sinkhorn_loop(scores, 0.05, 3))


def test_sinkhorn_over_a_mesh_axis_is_sinkhorn_of_all_rows(x64):
    scores = unit_rows(4, 12, D) @ unit_rows(5, K, D).T
    sharded = per_device(4, lambda s: losses.sinkhorn(s, 0.05, 3, axis_name="data"), P("data"), P("data"))
    assert_close(sharded(scores), sinkhorn_loop(scores, 0.05, 3))


def test_sinkhorn_over_a_mesh_axis_with_a_mask_where_one_device_keeps_nothing(x64):
    scores = unit_rows(6, 12, D) @ unit_rows(7, K, D).T
    mask = np.array([0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1], bool)
    masked = lambda s, m: losses.sinkhorn(s, 0.05, 3, mask=m, axis_name="data")  # noqa: E731
    codes = np.asarray(per_device(4, masked, (P("data"), P("data")), P("data"))(scores, mask))
    assert_close(codes[mask], sinkhorn_loop(scores[mask], 0.05, 3))
    np.testing.assert_array_equal(codes[~mask], 0.0)


# ---- SwAV --------------------------------------------------------------------------------------------------------------


def make_swav(queue_length=0):
    return SwAV(
        num_prototypes=K,
        assign_crops=A,
        temperature=0.1,
        epsilon=0.05,
        iterations=3,
        queue_length=queue_length,
        queue_start_epoch=1,
        freeze_steps=3,
    )


def swap_loop(z, codes, prototypes, temperature):
    """Swapped prediction: each code against all other crops, mean over those, then mean over codes."""
    num_crops, num_codes = z.shape[1], codes.shape[1]
    result = np.zeros(len(z))
    for a in range(num_codes):
        for v in set(range(num_crops)) - {a}:
            entropy = -(codes[:, a] * log_softmax(z[:, v] @ prototypes.T / temperature)).sum(axis=-1)
            result += entropy / (num_crops - 1) / num_codes
    return result


@pytest.mark.parametrize("num_crops", [2, 5])
def test_swav_loss_is_the_swapped_prediction(x64, num_crops):
    z, prototypes, codes = unit_rows(0, 6, num_crops, D), 2.0 * unit_rows(1, K, D), random_codes(2, 6, A, K)
    result = make_swav().loss({"prototypes": prototypes}, z, codes, ())
    assert result.shape == (6, num_crops)
    assert_close(np.mean(result, axis=1), swap_loop(z, codes, prototypes, 0.1))


def test_swav_loss_of_a_crop_depends_on_its_own_output_only(x64):
    """With the mean over crops given, this fixes how the loss is shared out: lambda of a cut-mixed crop weighs it."""
    z, prototypes, codes = unit_rows(3, 1, 5, D), unit_rows(4, K, D), random_codes(5, 1, A, K)
    jacobian = jax.jit(jax.jacobian(lambda z: make_swav().loss({"prototypes": prototypes}, z, codes, ())[0]))(z)
    moved_by = np.abs(jacobian[:, 0]).max(axis=-1)  # [crop of the loss, crop of the output]
    np.testing.assert_array_equal(moved_by > 0, np.eye(5, dtype=bool))


@pytest.mark.parametrize("num_crops", [2, 5])
@pytest.mark.parametrize("own", range(A))
def test_swav_code_of_a_crop_never_enters_its_own_loss(x64, num_crops, own):
    z, params = unit_rows(6, 6, num_crops, D), {"prototypes": unit_rows(7, K, D)}
    codes, other = random_codes(8, 6, A, K), random_codes(8, 6, A, K)
    other[:, own] = random_codes(9, 6, K)
    before, after = (np.asarray(make_swav().loss(params, z, y, ())) for y in (codes, other))
    changed = (before != after).any(axis=0)
    np.testing.assert_array_equal(changed, np.arange(num_crops) != own)


def test_swav_prototypes_start_with_unit_norm_and_are_projected_to_it(x64):
    method = make_swav()
    start = method.init_params(jax.random.key(0), SPEC)["prototypes"]
    assert start.shape == (K, D)
    assert_close(np.linalg.norm(start, axis=-1), 1.0)
    assert len(np.unique(np.round(start, 6), axis=0)) == K
    directions, lengths = unit_rows(1, K, D), np.linspace(0.1, 30.0, K)[:, None]
    assert_close(method.project({"prototypes": directions * lengths})["prototypes"], directions)


def test_swav_prototypes_are_frozen_before_step_freeze_steps(x64):
    gradients = {"prototypes": unit_rows(2, K, D)}
    freeze = jax.jit(make_swav().freeze)
    for step in range(6):
        expected = gradients["prototypes"] * (step >= 3)
        np.testing.assert_array_equal(freeze(gradients, jnp.int32(step))["prototypes"], expected)


def swav_steps(method, num_devices, microbatches):
    """The compiled (targets, new state) of one step."""
    in_specs = (P(), method.state_spec(SPEC), ROWS, ROWS)
    find_targets = per_device(num_devices, method.targets_from_outputs, in_specs, Targets(ROWS, P(), ROWS))
    batch = make_batch(microbatches)

    @jax.jit
    def step(params, state, outputs):
        targets = find_targets(params, state, batch, outputs)
        return targets, method.update(state, {"method": params}, batch, outputs, None, jnp.int32(0))

    return step


def queue_simulation(steps, queue_length, start):
    """Codes [B, A, K] of each step; the queue is a list of batches, and a step's own batch joins it after its codes."""
    queue = collections.deque(maxlen=queue_length // B)
    for step, (prototypes, z) in enumerate(steps):
        full = len(queue) == queue.maxlen
        codes = []
        for crop in range(A):
            rows = np.concatenate([z[:, crop]] + [old[:, crop] for old in queue if full])
            codes.append(sinkhorn_loop(rows @ prototypes.T, 0.05, 3)[:B])
        yield np.stack(codes, axis=1)
        if step >= start:
            queue.append(z)


@LAYOUTS
def test_swav_codes_are_those_of_a_simulated_queue(x64, num_devices, microbatches):
    """Steps 0-3 see no queue (it fills from epoch 1 on, in steps 2 and 3), later ones the two batches before them."""
    method = make_swav(queue_length=2 * B)
    steps = [(unit_rows((10, step), K, D), unit_rows((11, step), B, 3, D)) for step in range(7)]
    params = {"method": {"prototypes": steps[0][0]}}
    with jax.set_mesh(make_mesh(num_devices)):
        state, run = method.init(jax.random.key(0), params, SPEC), swav_steps(method, num_devices, microbatches)
        for (prototypes, z), codes in zip(steps, queue_simulation(steps, 2 * B, start=2), strict=True):
            targets, state = run({"prototypes": prototypes}, state, in_microbatches(z, microbatches))
            assert targets.y.shape == (microbatches, B // microbatches, A, K)
            assert_close(np.reshape(targets.y, (B, A, K)), codes)
            assert np.all(targets.known)


def test_swav_without_a_queue_has_no_state(x64):
    method, z, prototypes = make_swav(), unit_rows(12, B, 3, D), unit_rows(13, K, D)
    params = {"prototypes": prototypes}
    assert method.init(jax.random.key(0), {"method": params}, SPEC) == ()
    with jax.set_mesh(make_mesh(4)):
        targets, state = swav_steps(method, 4, 2)(params, (), in_microbatches(z, 2))
    assert state == ()
    (codes,) = queue_simulation([(prototypes, z)], 2 * B, start=2)
    assert_close(np.reshape(targets.y, (B, A, K)), codes)


def test_swav_queue_keeps_shape_and_types(x64):
    method, params = make_swav(queue_length=2 * B), {"prototypes": unit_rows(14, K, D)}
    state = method.init(jax.random.key(0), {"method": params}, SPEC)
    assert isinstance(state, SwAVState)
    assert state.queue.shape == (2, B, A, D)
    update = jax.jit(method.update)
    after = update(
        state, {"method": params}, make_batch(2), in_microbatches(unit_rows(15, B, 3, D), 2), None, jnp.int32(0)
    )
    types = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert types(after) == types(state)
    assert int(after.step) == int(state.step) + 1


def test_swav_codes_give_no_gradient(x64):
    method, weights = make_swav(), np.random.default_rng(16).normal(size=(1, B, A, K))
    find_targets = per_device(1, method.targets_from_outputs, (P(), P(), ROWS, ROWS), Targets(ROWS, P(), ROWS))

    def total(params, outputs):
        return jnp.sum(weights * find_targets(params, (), make_batch(1), outputs).y)

    params, outputs = {"prototypes": unit_rows(17, K, D)}, unit_rows(18, 1, B, 3, D)
    for gradient in jax.tree.leaves(jax.jit(jax.grad(total, (0, 1)))(params, outputs)):
        np.testing.assert_array_equal(gradient, 0.0)


# ---- SimCLR ------------------------------------------------------------------------------------------------------------


def simclr_loop(z, y, embeddings, rows, temperature):
    """Crop v with pseudo-label r finds (r, 1 - v) among all clean embeddings but (r, v)."""
    result = np.zeros(z.shape[:2])
    for i, label in enumerate(y):
        for v in range(2):
            positive, logits = None, []
            for row, pair in zip(rows, embeddings, strict=True):
                for u in range(2):
                    if (row, u) == (label, v):
                        continue
                    logits.append(z[i, v] @ pair[u] / temperature)
                    if row == label:
                        positive = logits[-1]
            result[i, v] = np.log(np.sum(np.exp(logits))) - positive
    return result


def simclr_targets(num_devices, microbatches):
    out_specs = Targets(ROWS, P(), ROWS)
    return per_device(num_devices, SimCLR(0.2).targets_from_outputs, (P(), P(), ROWS, ROWS), out_specs)


@LAYOUTS
def test_simclr_targets_are_row_numbers_and_all_clean_embeddings(x64, num_devices, microbatches):
    z, row = unit_rows(20, B, 2, D), np.random.default_rng(21).permutation(B)
    batch = make_batch(microbatches, row)
    targets = simclr_targets(num_devices, microbatches)({}, (), batch, in_microbatches(z, microbatches))
    np.testing.assert_array_equal(targets.y, batch.row)
    assert np.all(targets.known)
    embeddings, rows = targets.dictionary
    assert embeddings.shape == (B, 2, D)
    np.testing.assert_array_equal(np.asarray(embeddings)[np.argsort(rows)], z[np.argsort(row)])


@LAYOUTS
def test_simclr_loss_with_its_own_targets_is_the_loop(x64, num_devices, microbatches):
    z, batch = unit_rows(22, B, 2, D), make_batch(microbatches)
    targets = simclr_targets(num_devices, microbatches)({}, (), batch, in_microbatches(z, microbatches))
    result = SimCLR(0.2).loss({}, z, np.reshape(targets.y, B), jax.device_get(targets.dictionary))
    assert_close(result, simclr_loop(z, np.arange(B), z, np.arange(B), 0.2))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_simclr_loss_of_hard_views_is_the_loop(x64, temperature):
    hard, clean, rows = 2.0 * unit_rows(23, 3, 2, D), 3.0 * unit_rows(24, B, 2, D), np.arange(B)
    y = np.array([6, 0, 3])
    result = SimCLR(temperature).loss({}, hard, y, Candidates(clean, rows))
    assert_close(result, simclr_loop(hard, y, clean, rows, temperature))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_simclr_mean_loss_of_clean_outputs_is_nt_xent(x64, temperature):
    z, rows = unit_rows(25, B, 2, D), np.arange(B)
    result = SimCLR(temperature).loss({}, z, rows, Candidates(z, rows))
    assert_close(np.mean(result), np.mean(losses.nt_xent(z[:, 0], z[:, 1], temperature)))


@LAYOUTS
def test_simclr_gradient_of_clean_outputs_is_that_of_nt_xent(x64, num_devices, microbatches):
    """Each device differentiates its own rows' losses; a live dictionary brings back what other devices' losses say."""
    z, batch, method = unit_rows(26, B, 2, D), make_batch(microbatches), SimCLR(0.2)

    def local_loss(outputs, batch):
        targets = method.targets_from_outputs({}, (), batch, outputs)
        own = method.loss({}, outputs.reshape(-1, 2, D), targets.y.reshape(-1), targets.dictionary)
        return jnp.sum(own) / (2 * B)

    gradient = per_device(num_devices, jax.grad(local_loss), (ROWS, ROWS), ROWS)
    expected = jax.jit(jax.grad(lambda z: jnp.mean(losses.nt_xent(z[:, 0], z[:, 1], 0.2))))(z)
    assert_close(np.reshape(gradient(in_microbatches(z, microbatches), batch), (B, 2, D)), expected, atol=1e-14)


def test_simclr_loss_with_partner_labels_is_the_loop(x64):
    """CutMix permutes y: what is classified is row i, what is looked for is its partner's sibling crop."""
    z, rows, partner = unit_rows(27, B, 2, D), np.arange(B), np.array([4, 2, 7, 3, 1, 0, 5, 6])
    result = SimCLR(0.2).loss({}, z, rows[partner], Candidates(z, rows))
    assert_close(result, simclr_loop(z, partner, z, rows, 0.2))


def test_simclr_loss_does_not_see_the_order_of_the_dictionary(x64):
    z, rows, order = unit_rows(28, B, 2, D), np.arange(B), np.array([5, 1, 7, 0, 2, 6, 4, 3])
    y = rows[::-1]
    straight = SimCLR(0.2).loss({}, z, y, Candidates(z, rows))
    assert_close(SimCLR(0.2).loss({}, z, y, Candidates(z[order], rows[order])), straight)


# ---- Rotation ----------------------------------------------------------------------------------------------------------


def example_keys(num_examples):
    return jax.random.split(jax.random.key(3), num_examples)


def rotation_turns(keys):
    """Quarter turns [M, n, 4] of the examples with keys [M, n]."""
    numbers = np.arange(keys.size, dtype=np.int32).reshape(keys.shape)
    batch = Batch(index=numbers, row=numbers, valid=numbers >= 0, label=numbers)
    targets = jax.jit(lambda keys: Rotation().targets(None, {}, (), batch, keys))(keys)
    assert np.all(targets.known)
    return np.asarray(targets.y)


def test_rotation_turned_back_by_its_labels_gives_the_crops():
    n, num_crops, size = 6, 2, 4
    x = np.random.default_rng(30).uniform(size=(n, num_crops, size, size, 3)).astype(np.float32)
    (turned,) = jax.jit(Rotation().prepare)(example_keys(n), (x,))
    turns = rotation_turns(example_keys(n).reshape(2, 3)).reshape(n, 4)
    assert turned.shape == (n, 4 * num_crops, size, size, 3)
    copies = np.asarray(turned).reshape(n, num_crops, 4, size, size, 3)
    for i in range(n):
        for j in range(4):
            back = np.rot90(copies[i, :, j], -turns[i, j], axes=(1, 2))
            np.testing.assert_array_equal(back, x[i])


def test_rotation_shows_each_orientation_once_in_an_order_that_differs_between_examples():
    turns = rotation_turns(example_keys(64)[None])[0]
    np.testing.assert_array_equal(np.sort(turns, axis=1), np.tile(np.arange(4), (64, 1)))
    for j in range(4):
        assert set(turns[:, j]) == {0, 1, 2, 3}
    assert len(np.unique(turns, axis=0)) > 12  # of 24 orders


def test_rotation_order_follows_the_key_of_the_example():
    together = rotation_turns(example_keys(6)[None])[0]
    np.testing.assert_array_equal(rotation_turns(example_keys(6)[2:].reshape(2, 2)).reshape(4, 4), together[2:])


def test_rotation_loss_is_softmax_cross_entropy(x64):
    generator = np.random.default_rng(31)
    n, num_crops = 3, 2
    kernel, bias, outputs = (generator.normal(size=shape) for shape in ((D, 4), (4,), (n, 4 * num_crops, D)))
    y = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 1, 0, 2]])
    result = Rotation().loss({"kernel": kernel, "bias": bias}, outputs, y, ())
    expected = np.zeros((n, 4 * num_crops))
    for i in range(n):
        for copy in range(4 * num_crops):
            expected[i, copy] = -log_softmax(outputs[i, copy] @ kernel + bias)[y[i, copy % 4]]
    assert_close(result, expected)
