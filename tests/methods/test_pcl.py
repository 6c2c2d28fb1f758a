"""PCL-v2: loss, concentrations, queue and bank against float64 NumPy, and whole runs that cross the end of the warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from small import SmallRun, largest_difference, small_config

from configs import pcl_v2
from hexa_jax import kmeans
from hexa_jax.checkpoint.checkpointer import Checkpoints
from hexa_jax.core.batch import Batch
from hexa_jax.core.errors import ConfigError
from hexa_jax.methods.bank import describe_clusters
from hexa_jax.methods.base import Encode, Spec
from hexa_jax.methods.moco import MoCo
from hexa_jax.methods.pcl import PCL, PCLDictionary, PCLLabels, concentration
from hexa_jax.training.factory import make_trainer

B, T, D, Q = 8, 3, 4, 16  # rows of a step, steps of an epoch, embedding, queue
CLUSTERS = (3, 5)
SPEC = Spec(batch_size=B, steps_per_epoch=T, num_examples=B * T + 2, embedding_dim=D, num_crops=(1,))
LAYOUTS = pytest.mark.parametrize("num_devices, microbatches", [(1, 1), (1, 2), (4, 1), (4, 2)])


def make_pcl(**settings):
    sizes = {"queue_size": Q, "num_clusters": CLUSTERS, "iterations": 4, "warmup_epochs": 1}
    return PCL(**{"momentum": 0.9, "temperature": 0.2} | sizes | settings)


def unit_rows(seed, *shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def assert_close(actual, expected, rtol=1e-10, atol=0.0):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def make_mesh(num_devices):
    return jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])


# ---- Loss --------------------------------------------------------------------------------------------------------------


def random_dictionary(seed):
    rng = np.random.default_rng(seed)
    return PCLDictionary(
        queue=unit_rows((seed, 0), Q, D),
        prototypes=tuple(unit_rows((seed, 1 + h), k, D) for h, k in enumerate(CLUSTERS)),
        concentration=tuple(rng.uniform(0.05, 0.4, k) for k in CLUSTERS),
    )


def random_labels(seed, rows):
    """Row 0 has no cluster at all, row 1 none of the second clustering."""
    rng = np.random.default_rng(seed)
    clusters = np.stack([rng.integers(0, k, rows) for k in CLUSTERS], axis=1).astype(np.int32)
    clusters[0], clusters[1, 1] = -1, -1
    return PCLLabels(unit_rows((seed, 9), rows, D), clusters)


def loss_loop(z, y, dictionary, temperature):
    """Equations 11 and 1, example by example: minus the log of the positive's share."""
    result = np.zeros(z.shape[:2])
    for i, v in np.ndindex(*result.shape):
        query = z[i, v]
        own = np.exp(query @ y.key[i] / temperature)
        result[i, v] = -np.log(own / (own + np.exp(dictionary.queue @ query / temperature).sum()))
        for h, (prototypes, phi) in enumerate(zip(dictionary.prototypes, dictionary.concentration, strict=True)):
            if y.clusters[i, h] >= 0:
                scores = np.array([np.exp(query @ c / p) for c, p in zip(prototypes, phi, strict=True)])
                result[i, v] -= np.log(scores[y.clusters[i, h]] / scores.sum()) / len(CLUSTERS)
    return result


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_info_nce_plus_the_mean_of_proto_nce(x64, temperature):
    z, y, dictionary = unit_rows(0, 6, 2, D), random_labels(1, 6), random_dictionary(2)
    result = make_pcl(temperature=temperature).loss({}, z, y, dictionary)
    assert_close(result, loss_loop(z, y, dictionary, temperature))


def test_an_example_without_clusters_has_the_loss_and_gradient_of_moco(x64):
    z, y, dictionary = unit_rows(3, 6, 1, D), random_labels(4, 6), random_dictionary(5)
    y = y._replace(clusters=np.full_like(y.clusters, -1))
    # As they are during warm-up.
    dictionary = dictionary._replace(prototypes=tuple(np.zeros_like(c) for c in dictionary.prototypes))
    pcl, moco = make_pcl(), MoCo(Q, 0.9, 0.2)
    ours = jax.value_and_grad(lambda z: jnp.sum(pcl.loss({}, z, y, dictionary)))(z)
    plain = jax.value_and_grad(lambda z: jnp.sum(moco.loss({}, z, y.key, dictionary.queue)))(z)
    assert_close(ours[0], plain[0])
    assert_close(ours[1], plain[1], atol=1e-14)


def test_mixed_loss_mixes_keys_and_clusters_alike(x64):
    z, y, dictionary = unit_rows(6, 6, 1, D), random_labels(7, 6), random_dictionary(8)
    partner = np.array([3, 0, 5, 1, 4, 2])
    y_partner = jax.tree.map(lambda leaf: leaf[partner], y)
    lam = np.random.default_rng(9).uniform(size=(6, 1))
    expected = lam * loss_loop(z, y, dictionary, 0.2) + (1 - lam) * loss_loop(z, y_partner, dictionary, 0.2)
    assert_close(make_pcl().mixed_loss({}, z, y, y_partner, lam, dictionary), expected)


def test_own_crop_takes_the_place_of_the_key_and_leaves_the_clusters(x64):
    y, dictionary, outputs = random_labels(10, 6), random_dictionary(11), unit_rows(12, 6, 1, D)
    own, same = make_pcl().own_crop_labels(y, dictionary, outputs)
    np.testing.assert_array_equal(own.key, outputs[:, 0])
    assert own.clusters is y.clusters and all(a is b for a, b in zip(same, dictionary, strict=True))


# ---- Concentration -----------------------------------------------------------------------------------------------------


def concentration_loop(members, temperature):
    """From each cluster's list of distances, by the rules of salesforce/PCL's run_kmeans."""
    phi = np.zeros(len(members))
    for k, distances in enumerate(members):
        if len(distances) > 1:
            phi[k] = np.mean(distances) / np.log(len(distances) + 10)
    for k, distances in enumerate(members):
        if len(distances) <= 1:
            phi[k] = phi.max()
    phi = np.clip(phi, np.percentile(phi, 10), np.percentile(phi, 90))
    return temperature * phi / phi.mean()


def sums(members):
    return np.array([np.sum(m) for m in members]), np.array([float(len(m)) for m in members])


@pytest.mark.parametrize("temperature", [0.1, 0.2])
def test_concentration_is_that_of_the_reference(x64, temperature):
    rng = np.random.default_rng(0)
    sizes = [7, 1, 0, 2, 40, 3, 1, 12, 5, 5, 9, 2, 30]
    members = [rng.uniform(0.1, 1.0) * rng.uniform(size=size) for size in sizes]
    members[7] = np.full(12, 1e-3)  # so dense that the lower percentile bounds it
    members[4] *= 50.0  # so loose that the upper one does
    result = concentration(*sums(members), temperature)
    assert_close(result, concentration_loop(members, temperature))
    assert_close(np.mean(result), temperature)
    assert result[7] == np.min(result) and result[4] == np.max(result) == result[1] == result[2]
    bounded = np.sum(result == np.min(result)), np.sum(result == np.max(result))
    assert min(bounded) > 1, "the percentiles have to bound something"


@pytest.mark.parametrize("sizes", [[1, 1, 0, 1], [2, 5, 3], [0, 0]])
def test_without_any_distance_all_concentrations_are_the_temperature(x64, sizes):
    assert_close(concentration(*sums([np.zeros(size) for size in sizes]), 0.2), np.full(len(sizes), 0.2))


def test_clusters_whose_members_coincide_count_as_single_members(x64):
    """The reference's rules would make their concentration 0, and divide by it."""
    loose, tight = [np.array([0.3, 0.5]), np.array([0.1, 0.1, 0.4])], np.zeros(2)
    assert_close(
        concentration(*sums([*loose, tight, tight]), 0.2), concentration_loop([*loose, tight[:1], tight[:1]], 0.2)
    )


@pytest.mark.parametrize("chunk", [1 << 24, 20], ids=["one chunk", "chunks of 4 rows"])
@pytest.mark.parametrize("num_devices", [1, 4])
def test_distances_by_cluster_are_those_of_a_loop(x64, monkeypatch, chunk, num_devices):
    monkeypatch.setattr(kmeans, "CHUNK_SCORES", chunk)
    x, centroids = unit_rows(1, 36, D), unit_rows(2, 5, D)
    labels = np.random.default_rng(3).integers(-1, 4, 36).astype(np.int32)  # cluster 4 has no member
    split = P("data")
    function = jax.shard_map(
        lambda *args: kmeans.distances_by_cluster(*args, axis_name="data"),
        mesh=make_mesh(num_devices),
        in_specs=(split, P(), split),
        out_specs=P(),
        check_vma=False,
    )
    members = [np.linalg.norm(x[labels == k] - centroids[k], axis=1) for k in range(5)]
    for ours, expected in zip(jax.jit(function)(x, centroids, labels), sums(members), strict=True):
        assert_close(ours, expected)


def test_changed_clusters_are_those_that_left_the_largest_group():
    rng = np.random.default_rng(4)
    was, now = (rng.integers(-1, k, (2, 50)).astype(np.int32) for k in (4, 6))
    moved, both = 0, 0
    for h in range(2):
        for cluster in range(4):
            to = now[h][(was[h] == cluster) & (now[h] >= 0)]
            moved += len(to) - max(np.bincount(to))
            both += len(to)
    described = describe_clusters(was, now, (6, 9), np.array([0.25, 0.75]))
    assert_close(described["changed_cluster"], moved / both, rtol=1e-6)
    assert described["empty_clusters"] == 1.5 and described["kmeans_objective"] == 0.5
    np.testing.assert_array_equal(describe_clusters(was, was, (4, 4), np.zeros(2))["changed_cluster"], 0)


# ---- Queue, bank and clusters ------------------------------------------------------------------------------------------


def make_step(step, microbatches):
    """A step's batch, keys in shuffled order, one image replaced; and the keys [B, D] in the rows' order."""
    order = np.random.default_rng((20, step)).permutation(B)
    keys = unit_rows((21, step), B, D)
    shape = lambda x: np.asarray(x, np.int32).reshape(microbatches, -1)  # noqa: E731
    index = np.arange(B) + step * B
    batch = Batch(
        index=shape(index),
        row=shape(np.arange(B)),
        valid=shape(np.arange(B)) != (3 if step == 1 else -1),
        label=shape(np.full(B, -1)),
        key_index=shape(index[order]),
        key_row=shape(np.argsort(order)),
    )
    encode = Encode(key_crops=lambda _: jnp.asarray(keys[order].reshape(microbatches, -1, 1, D)), crops=None)
    return batch, encode, keys


def run_epoch(method, num_devices, microbatches):
    """State after T steps, and the parameters of each; runs under the mesh that the caller has set."""
    weights = [{"network": {"w": unit_rows((22, step), 3)}} for step in range(T + 1)]
    mesh, spec = make_mesh(num_devices), method.state_spec(SPEC)
    state = method.init(jax.random.key(0), weights[0], SPEC)
    state = jax.tree.map(
        lambda p, leaves: jax.device_put(leaves, jax.sharding.NamedSharding(mesh, p)),
        spec,
        state,
        is_leaf=lambda node: isinstance(node, P),
    )
    for step in range(T):
        batch, encode, _ = make_step(step, microbatches)

        @jax.jit
        def one(state, params, batch, encode=encode, step=step):
            targets = method.targets(encode, params, state, batch, None)
            return targets, method.update(state, params, batch, None, targets, jnp.int32(step))

        _, state = one(state, weights[step + 1], batch)
    return state, weights


@LAYOUTS
def test_bank_holds_each_examples_key_after_an_epoch(x64, num_devices, microbatches):
    with jax.set_mesh(make_mesh(num_devices)):
        bank = jax.device_get(run_epoch(make_pcl(), num_devices, microbatches)[0].bank)
    assert bank.rows.shape == (T, B, 1, D) and bank.position == 0
    for step in range(T):
        batch, _, keys = make_step(step, microbatches)
        expected = {int(i): key for i, key in zip(batch.index.ravel(), keys, strict=True)}
        if step == 1:
            del expected[step * B + 3]  # the replaced image
        written = {int(i): row for i, row in zip(bank.index[step], bank.rows[step, :, 0], strict=True) if i >= 0}
        assert written.keys() == expected.keys()
        for index, row in written.items():
            np.testing.assert_array_equal(row, expected[index])


@LAYOUTS
def test_queue_and_key_encoder_are_mocos(x64, num_devices, microbatches):
    with jax.set_mesh(make_mesh(num_devices)):
        fresh = make_pcl().init(jax.random.key(0), {"network": {"w": unit_rows((22, 0), 3)}}, SPEC)
        state, weights = run_epoch(make_pcl(), num_devices, microbatches)
    queue, key_weights = np.array(fresh.moco.queue), weights[0]["network"]["w"]
    for step in range(T):
        place = step * B % Q
        queue[place : place + B] = make_step(step, microbatches)[2]
        key_weights = 0.9 * key_weights + 0.1 * weights[step + 1]["network"]["w"]
    np.testing.assert_array_equal(state.moco.queue, queue)
    assert_close(state.moco.key_params["w"], key_weights)
    assert state.moco.position == T * B % Q and state.step == T


@pytest.mark.parametrize("num_devices", [1, 4])
def test_clusters_and_concentrations_are_those_of_the_bank(x64, num_devices):
    method = make_pcl()
    with jax.set_mesh(make_mesh(num_devices)):
        state, _ = run_epoch(method, num_devices, 1)
        state = jax.device_get(jax.jit(method.refresh)(jax.random.key(1), state))
    embeddings = dict(zip(state.bank.index.ravel(), state.bank.rows.reshape(-1, D), strict=True))
    seen = np.setdiff1d(np.arange(B * T), [B + 3])
    x = np.stack([embeddings[i] for i in seen])
    np.testing.assert_array_equal((state.assignments >= 0).all(axis=0), np.isin(np.arange(B * T + 2), seen))
    np.testing.assert_array_equal((state.assignments >= 0).any(axis=0), np.isin(np.arange(B * T + 2), seen))
    for h, k in enumerate(CLUSTERS):
        prototypes, labels = state.prototypes[h], state.assignments[h, seen]
        assert prototypes.shape == (k, D) and len(np.unique(labels)) > 1
        np.testing.assert_array_equal(labels, np.argmax(x @ prototypes.T, axis=1))
        assert_close(state.objective[h], np.mean(np.max(x @ prototypes.T, axis=1)))
        members = [np.linalg.norm(x[labels == c] - prototypes[c], axis=1) for c in range(k)]
        assert_close(state.concentration[h], concentration_loop(members, 0.2))


def test_clusters_wait_for_the_end_of_the_warm_up(x64):
    method, changed = make_pcl(warmup_epochs=2), []
    with jax.set_mesh(make_mesh(4)):
        state, _ = run_epoch(method, 4, 1)
        refresh = jax.jit(method.refresh)
        for epoch in range(4):
            after = refresh(jax.random.key(epoch), state._replace(step=jnp.int32(epoch * T)))
            changed.append(bool(np.any(after.assignments >= 0)))
            if not changed[-1]:
                same = jax.tree.map(np.array_equal, after, state._replace(step=after.step))
                assert all(jax.tree.leaves(same))
    assert changed == [False, False, True, True]
    assert refresh._cache_size() == 1


# ---- Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pcl.temperature": 0.0}, "pcl.temperature=0.0 must be positive"),
        ({"pcl.iterations": 0}, "pcl.iterations=0 must be positive"),
        ({"pcl.queue_size": 0}, "pcl.queue_size=0 must be positive"),
        ({"pcl.queue_size": 40}, "pcl.queue_size=40 is not a multiple of batch_size=32: use 32, 64"),
        ({"pcl.momentum": 1.5}, "pcl.momentum=1.5 must be from 0 to 1"),
        ({"pcl.num_clusters": ()}, "pcl.num_clusters=() must be one or more positive numbers"),
        ({"pcl.num_clusters": (5, 0)}, "pcl.num_clusters=(5, 0) must be one or more positive numbers"),
        ({"pcl.num_clusters": (5, 65)}, "pcl.num_clusters=(5, 65) has more than the 64 images seen in an epoch"),
        ({"pcl.warmup_epochs": 0}, "pcl.warmup_epochs=0 must be 1 or more"),
        ({"data.num_crops": (3,)}, "pcl takes two crops of one size"),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting, message):
    with pytest.raises(ConfigError) as error:
        make_trainer(small_config("pcl", precision="float32", **setting), 70, jax.devices()[:1])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_has_the_references_numbers():
    """main_pcl.py's defaults and the README's command."""
    config = pcl_v2.get_config()
    assert config.pcl.to_dict() == {
        "queue_size": 16384,
        "momentum": 0.999,
        "temperature": 0.2,
        "num_clusters": (25000, 50000, 100000),
        "iterations": 20,
        "warmup_epochs": 20,
    }
    assert config.model.head_dim == 128 and not config.model.head_batch_norm
    assert config.optimizer.schedule == "epoch_cosine" and config.optimizer.momentum == 0.9
    assert pcl_v2.get_config("scheme=std+adv").scheme == "std+adv"


# ---- Whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Four float64 steps, two in the warm-up and two after it, on one device: the run and its last state."""
    with jax.enable_x64(True):
        run = SmallRun(small_config("pcl"))
        types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding), run.state)
        return run, types, run.train(4)


def test_the_run_crosses_the_end_of_the_warm_up(reference):
    run, _, state = reference
    assert (state.method.assignments >= 0).sum() == 2 * 64  # two clusterings, 70 images in batches of 32
    clustered, unclustered = run.losses[2:], run.losses[:2]
    assert min(clustered) > max(unclustered)  # three views, each with two more terms of about log 6
    for phi in state.method.concentration:
        assert_close(np.mean(phi), 0.2)
    assert not any(np.allclose(phi, phi[0]) for phi in state.method.concentration)


def test_state_keeps_its_types_and_each_program_is_traced_once(reference):
    run, types, _ = reference
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding), run.state) == types
    assert run.steps.train._cache_size() == 1 and run.steps.refresh._cache_size() == 1


@pytest.mark.parametrize("devices, microbatches", [(8, 1), (1, 4)])
def test_the_layout_does_not_change_the_run(reference, devices, microbatches, x64):
    expected = reference[2]
    state = SmallRun(small_config("pcl", **{"runtime.microbatches": microbatches}), devices).train(4)
    for part in ("params", "batch_stats", "opt_state"):
        assert largest_difference(getattr(state, part), getattr(expected, part)) < 1e-9
    # The order of the bank follows the layout, its content does not.
    without_bank = lambda method: method._replace(bank=method.bank.position)  # noqa: E731
    assert largest_difference(without_bank(state.method), without_bank(expected.method)) < 1e-9
    by_example = lambda bank: bank.rows.reshape(-1, 8)[np.argsort(bank.index.ravel())]  # noqa: E731
    assert np.abs(by_example(state.method.bank) - by_example(expected.method.bank)).max() < 1e-9


def test_a_checkpoint_in_the_middle_of_an_epoch_continues_the_run(reference, tmp_path, x64):
    run, _, expected = reference
    with jax.set_mesh(run.trainer.mesh):
        batches = run.batches(run.steps_per_epoch)
        state = run.steps.init(0)
        for step in range(4):
            if step % run.steps_per_epoch == 0:
                state, _ = run.steps.refresh(state, jnp.int32(step // run.steps_per_epoch))
            state, _ = run.steps.train(state, next(batches), None)
            if step in (0, 2):  # before and after the first clusters
                checkpoints = Checkpoints(tmp_path / str(step))
                checkpoints.save_now(step + 1, state, {})
                saved, state, _ = checkpoints.restore_latest(run.trainer.state_shapes())
                checkpoints.close()
                assert saved == step + 1
        differences = jax.tree.map(np.array_equal, jax.device_get(state), expected)
    assert all(jax.tree.leaves(differences))


def test_looking_at_a_fresh_network_leaves_the_method_alone(reference, x64):
    """`observe` measures BatchNorm moments; there are no keys then."""
    run = reference[0]
    with jax.set_mesh(run.trainer.mesh):
        before = jax.device_get(run.steps.init(0))
        after = run.steps.observe(run.steps.init(0), next(run.batches()), None)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(after.method), before.method)))
    assert largest_difference(after.batch_stats, before.batch_stats) > 0
