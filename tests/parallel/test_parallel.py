"""Promise 1: the same run on any number of devices and microbatches, for every method with both hard views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SmallRun, largest_difference, small_config

METHODS = ("moco", "simclr", "deepcluster", "swav", "byol", "supervised")
# One method sees crops with all that they can have.
SETTINGS = {
    "moco": {
        "data.flip": "both",
        "data.quarter_turns": True,
        "data.aspect_ratio": (0.5, 2.0),
        "data.pixel_mean": (0.6, 0.5, 0.4),
        "data.pixel_std": (0.3, 0.2, 0.1),
    }
}
LAYOUTS = {"8 devices": (8, 1), "4 microbatches": (1, 4)}


@pytest.fixture(scope="module")
def reference():
    """Four float64 steps (two epochs) on one device, per method."""
    with jax.enable_x64(True):
        return {method: SmallRun(small_config(method, **SETTINGS.get(method, {}))).train(4) for method in METHODS}


def assert_layout_does_not_change(method, layout, expected):
    """Four steps in a layout end where they do on one device: in the state `expected`."""
    devices, microbatches = LAYOUTS[layout]
    config = small_config(method, **{"runtime.microbatches": microbatches}, **SETTINGS.get(method, {}))
    state = SmallRun(config, devices).train(4)
    assert largest_difference(state.params, expected.params) < 1e-9
    assert largest_difference(state.batch_stats, expected.batch_stats) < 1e-9
    assert largest_difference(state.opt_state, expected.opt_state) < 1e-9
    # The order of DeepCluster's bank and SwAV's queue follows the layout, their content does not.
    kept = {"deepcluster": ("assignments", "prototypes", "objective"), "swav": ("step",)}
    pick = lambda method_state: [getattr(method_state, name) for name in kept.get(method, ())] or method_state  # noqa: E731
    assert largest_difference(pick(state.method), pick(expected.method)) < 1e-9


@pytest.mark.slow  # its pseudo-labels are drawn example by example, so less can go wrong than in the others
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_rotation(layout, x64):
    assert_layout_does_not_change("rotation", layout, SmallRun(small_config("rotation")).train(4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_run(reference, method, layout, x64):
    assert_layout_does_not_change(method, layout, reference[method])


def test_the_reference_run_learns_and_uses_its_views(reference):
    """The comparison above would hold for a step that does nothing, too."""
    with jax.enable_x64(True):
        fresh = jax.device_get(SmallRun(small_config("moco", **SETTINGS["moco"])).state)
    assert largest_difference(reference["moco"].params, fresh.params) > 1e-4
    for branch in ("clean", "adversarial"):
        name = f"{branch}_batch_stats"
        assert largest_difference(reference["moco"].batch_stats[name], fresh.batch_stats[name]) > 1e-4
    assert (reference["deepcluster"].method.assignments >= 0).sum() == 2 * 64  # two heads, 70 images in batches of 32


@pytest.mark.parametrize("method", ["moco", pytest.param("swav", marks=pytest.mark.slow)])
def test_first_gradients_agree_in_float32_given_the_same_adversarial_input(method):
    """A last-bit difference flips the attack's signs in float32, so there is none here: the attack is compared in float64."""
    gradients = []
    for devices, microbatches in ((1, 1), (4, 2)):
        settings = {"precision": "float32", "views.adversarial.weight": 0.0, "runtime.microbatches": microbatches}
        run = SmallRun(small_config(method, **settings), devices)
        # The first momentum buffer is the first gradient plus weight decay, which is the same everywhere.
        state = run.train(1)
        gradients.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=0, atol=1e-5 * np.abs(gradients[0]).max())


@pytest.mark.parametrize("method", ["deepcluster", pytest.param("simclr", marks=pytest.mark.slow)])
def test_sharing_the_clean_backward_gives_the_same_gradients(method, x64):
    """With attack_norm=clean the attack's gradient is that of the clean pass: taking it from there changes nothing."""
    states = [
        SmallRun(small_config(method, **{"views.attack_norm": "clean", "views.share_gradient": share})).train(2)
        for share in (True, False)
    ]
    assert largest_difference(states[0].params, states[1].params) < 1e-12


@pytest.mark.slow  # one step and no random start, which the layouts above attack with, need less
def test_attacks_through_a_live_dictionary_are_exact_in_microbatches(x64):
    """SimCLR's attack needs the embeddings of the whole step, at each of its points."""
    settings = {"scheme": "std+adv+cmxA", "views.steps": 2, "views.random_start": True, "views.epsilon": 4.0}
    runs = []
    for devices, microbatches in ((1, 1), (2, 4)):
        config = small_config("simclr", **settings, **{"runtime.microbatches": microbatches})
        runs.append(SmallRun(config, devices).train(2))
    assert largest_difference(runs[0].params, runs[1].params) < 1e-9
    assert largest_difference(runs[0].batch_stats, runs[1].batch_stats) < 1e-9


def test_sharing_saves_a_forward_and_a_backward():
    """Floating-point operations of the compiled step; an attack through the auxiliary set cannot be shared."""
    flops = []
    for norm_set in ("clean", "adversarial"):
        settings = {"precision": "float32", "views.attack_norm": norm_set, "views.cutmix.weight": 0.0}
        run = SmallRun(small_config("deepcluster", **settings))
        with jax.set_mesh(run.trainer.mesh):
            shapes = run.trainer.state_shapes(), run.trainer.batch_shapes(), None
            flops.append(run.steps.train.lower(*shapes).compile().cost_analysis()["flops"])
    # Clean, attack and adversarial passes cost 3 + 2 + 3 forwards (the attack needs no weight gradients); 2 are saved.
    assert 0.65 < flops[0] / flops[1] < 0.85


@pytest.mark.parametrize("method", ["deepcluster", "byol", "supervised"])
def test_state_keeps_its_types_and_the_step_is_traced_once(method, x64):
    run = SmallRun(small_config(method))
    types = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), run.state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state)
    run.train(3)  # crosses an epoch
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), run.state) == types
    assert jax.tree.map(lambda leaf: leaf.sharding, run.state) == shardings
    assert run.steps.train._cache_size() == 1
    assert run.steps.refresh._cache_size() == 1
    assert run.state.step == jnp.int32(3)


@pytest.mark.parametrize("method", ["moco", "swav", "byol"])
def test_forward_passes_leave_a_method_without_a_first_pass_as_it_is(method, x64):
    """They measure a random network's BatchNorm statistics, and there are no pseudo-labels to keep."""
    run = SmallRun(small_config(method))
    with jax.set_mesh(run.trainer.mesh):
        before = jax.device_get(run.state)
        after = jax.device_get(run.steps.observe(run.state, next(run.batches()), None))
    assert largest_difference(after.method, before.method) == 0
    assert largest_difference(after.batch_stats, before.batch_stats) > 1e-3


@pytest.mark.slow
def test_multi_crop_run_is_the_same_on_8_devices(x64):
    """Two resolutions: each has its own BatchNorm statistics and boxes, one head call, one partner for all crops."""
    crops = {
        "data.num_crops": (2, 2),
        "data.crop_size": (16, 8),
        "data.min_scale": (0.3, 0.1),
        "data.max_scale": (1.0, 0.3),
    }
    states = [SmallRun(small_config("deepcluster", **crops), devices).train(1) for devices in (1, 8)]
    assert largest_difference(states[0].params, states[1].params) < 1e-9
    assert largest_difference(states[0].batch_stats, states[1].batch_stats) < 1e-9
