"""BatchNorm by group against its formula, ResNet against torchvision's geometry in NumPy, heads and the network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hexa_jax.models import pooling, resnet
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.norm import (
    ADVERSARIAL,
    CLEAN,
    EPSILON,
    EVALUATION,
    BatchNorm,
    NormMode,
    blend,
    stats_collection,
)
from hexa_jax.models.pooling import max_pool
from hexa_jax.models.resnet import Block, ResNet, make_resnet
from hexa_jax.parallel.mesh import Layout, make_mesh

EVERYTHING = ["moments", "clean_batch_stats", "adversarial_batch_stats"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_tree(tree, seed=0):
    """Like the tree, every leaf drawn from U(0.5, 1.5) with a random sign for all but scales and variances."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        positive = any(name in jax.tree_util.keystr(path) for name in ("scale", "var"))
        sign = 1 if positive else rng.choice([-1, 1], leaf.shape)
        width = 0.3 if leaf.ndim == 4 else 1
        return jnp.asarray(width * sign * rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


# ---- BatchNorm ---------------------------------------------------------------------------------------------------------


def norm_reference(x, scale, bias, groups, dy):
    """float64 forward, backward and moments of BatchNorm per group of consecutive rows."""
    channels = x.shape[-1]
    values, slopes = (v.reshape(groups, -1, channels) for v in (x, dy))
    mean, var = values.mean(axis=1, keepdims=True), values.var(axis=1, keepdims=True)
    deviation = np.sqrt(var + 1e-5)
    normal = (values - mean) / deviation
    dx = (
        scale / deviation * (slopes - slopes.mean(1, keepdims=True) - normal * (slopes * normal).mean(1, keepdims=True))
    )
    unbiased = values.var(axis=1, ddof=1).mean(axis=0)
    return {
        "y": (normal * scale + bias).reshape(x.shape),
        "dx": dx.reshape(x.shape),
        "scale": (slopes * normal).sum((0, 1)),
        "bias": slopes.sum((0, 1)),
        "mean": mean.mean((0, 1)),
        "var": unbiased,
    }


def norm_data(shape, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(2, 3, shape), rng.normal(size=shape)
    return x, dy, rng.uniform(0.5, 2, shape[-1]), rng.normal(size=shape[-1])


@pytest.mark.parametrize("shape, groups", [((12, 5, 3, 4), 3), ((12, 4), 2), ((6, 2, 2, 3), 6), ((8, 5), 1)])
def test_batch_norm_follows_its_formula(x64, shape, groups):
    x, dy, scale, bias = norm_data(shape)
    module, params = BatchNorm(jnp.float64), {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}

    def apply(params, x):
        return module.apply({"params": params}, x, NormMode(CLEAN, groups), mutable=["moments"])

    @jax.jit
    def differentiate(params, x, dy):
        y, backward, sown = jax.vjp(apply, params, x, has_aux=True)
        return y, *backward(dy), sown

    y, dparams, dx, sown = differentiate(params, jnp.asarray(x), jnp.asarray(dy))
    expected = norm_reference(x, scale, bias, groups, dy)
    got = {"y": y, "dx": dx, "scale": dparams["scale"], "bias": dparams["bias"]}
    assert set(sown) == {"moments"} and all(len(entry) == 1 for entry in sown["moments"].values())
    got |= {name: entry[0] for name, entry in sown["moments"].items()}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("groups", [3, 1, None])
def test_pooling_before_scale_and_bias_is_pooling_after_them(x64, groups):
    """Values, gradients and moments, with scales of both signs and zero."""
    x, _, _, bias = norm_data((6, 7, 6, 5))
    variables = {
        "params": {"scale": jnp.asarray([1.5, -0.7, 0.0, -2.0, 0.3]), "bias": jnp.asarray(bias)},
        "clean_batch_stats": {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6)},
    }
    pool = lambda v: nn.max_pool(v, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # noqa: E731

    def run(params, x, before):
        y, sown = BatchNorm(jnp.float64).apply(
            variables | {"params": params}, x, NormMode(CLEAN, groups), pool if before else None, mutable=["moments"]
        )
        y = nn.relu(y if before else pool(y))
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), (y, sown)

    results = [
        jax.jit(jax.value_and_grad(functools.partial(run, before=before), argnums=(0, 1), has_aux=True))(
            variables["params"], jnp.asarray(x)
        )
        for before in (True, False)
    ]
    (_, (y, sown)), (dparams, dx) = results[0]
    (_, (y_after, sown_after)), (dparams_after, dx_after) = results[1]
    np.testing.assert_allclose(y, y_after, rtol=1e-12, atol=1e-12)
    assert y.shape == (6, 4, 3, 5) and bool(sown) == (groups is not None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), sown, sown_after)
    np.testing.assert_allclose(dparams["bias"], dparams_after["bias"], rtol=1e-10)
    differ = [0, 1, 3, 4]  # with a scale of 0 all values of a window are equal, and any of them has its gradient
    np.testing.assert_allclose(
        dparams["scale"][jnp.array(differ)], dparams_after["scale"][jnp.array(differ)], rtol=1e-9
    )
    np.testing.assert_allclose(dx, dx_after, rtol=1e-9, atol=1e-12)
    assert jnp.isfinite(dparams["scale"]).all() and jnp.abs(dx[..., jnp.array(differ)]).max() > 0.01


@pytest.mark.parametrize("height, width", [(2, 2), (1, 2), (2, 1)])
def test_convolutions_of_maps_smaller_than_the_kernel(x64, height, width):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(3, height, width, 4))), jnp.asarray(rng.normal(size=(3, 3, 4, 5)))
    conv = nn.Conv(5, (3, 3), padding=1, use_bias=False)
    ours = resnet.make_conv(5, 3, 1, jnp.float64, None)
    loss = lambda conv: lambda x, kernel: jnp.sum(jnp.sin(conv.apply({"params": {"kernel": kernel}}, x)))  # noqa: E731
    got, wanted = (jax.value_and_grad(loss(one), (0, 1))(x, kernel) for one in (ours, conv))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, wanted)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(loss(ours))(x, kernel))


@pytest.mark.parametrize("height, width", [(8, 6), (7, 9), (1, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_max_pool_by_place_is_that_by_scattering(height, width, dtype):
    """Exactly, with many equal maxima; a rectifier's zeros are such. The command line's platform decides between the two."""
    rng = np.random.default_rng(height)
    x = jnp.asarray(rng.integers(-2, 3, (3, height, width, 5)), dtype)
    y = max_pool(x)
    torch_shape = ((height + 1) // 2, (width + 1) // 2)
    assert y.shape == (3, *torch_shape, 5) and y.dtype == dtype
    np.testing.assert_array_equal(y, nn.max_pool(x.astype(jnp.float32), (3, 3), (2, 2), ((1, 1), (1, 1))).astype(dtype))
    dy = jnp.asarray(rng.integers(-8, 9, y.shape), dtype)
    again, places = jax.jit(pooling._maxima_and_places)(x)
    np.testing.assert_array_equal(again, y)
    assert places.dtype == jnp.uint8
    wanted = jax.jit(pooling._gradient_by_scattering)(x, y, places, dy)
    for gradient in (pooling._gradient_by_place, pooling._gradient_by_known_place):
        np.testing.assert_array_equal(jax.jit(gradient)(x, y, places, dy), wanted)
    np.testing.assert_array_equal(jax.jit(lambda x: jax.vjp(max_pool, x)[1](dy)[0])(x), wanted)
    assert wanted.dtype == dtype and float(jnp.abs(wanted).sum()) > 0


def test_groups_are_independent():
    x, _, _, _ = norm_data((8, 3, 3, 2))
    module, params = BatchNorm(), {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    run = jax.jit(lambda x, groups: module.apply({"params": params}, x, NormMode(CLEAN, groups)), static_argnums=1)
    changed = x.copy()
    changed[5] += 7.0  # in the second group of two
    before, after = run(jnp.float32(x), 2), run(jnp.float32(changed), 2)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert np.abs(before[4:] - after[4:]).min(axis=(1, 2, 3)).max() > 1e-3
    np.testing.assert_allclose(before[4:], run(jnp.float32(x[4:]), 1), rtol=1e-5, atol=1e-5)


def test_evaluation_normalises_with_the_clean_running_statistics():
    x, _, scale, bias = norm_data((5, 3, 3, 2))
    rng = np.random.default_rng(1)
    mean, var = rng.normal(size=2), rng.uniform(0.5, 2, 2)
    params = {"scale": scale, "bias": bias, "adversarial_scale": 9 * scale, "adversarial_bias": bias - 5}
    stats = {
        "clean_batch_stats": {"mean": mean, "var": var},
        "adversarial_batch_stats": {"mean": mean + 9, "var": 9 * var},
    }
    variables = jax.tree.map(jnp.float32, {"params": params, **stats})
    y = BatchNorm(auxiliary=True).apply(variables, jnp.float32(x), EVALUATION)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + EPSILON) * scale + bias, rtol=1e-4, atol=1e-5)
    y = BatchNorm(auxiliary=True).apply(variables, jnp.float32(x), NormMode(ADVERSARIAL))
    expected = (x - mean - 9) / np.sqrt(9 * var + EPSILON) * 9 * scale + bias - 5
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_adversarial_branch_must_exist():
    variables = BatchNorm().init(jax.random.key(0), jnp.zeros((2, 3)), EVALUATION)
    with pytest.raises(ValueError, match="no adversarial BatchNorm set"):
        BatchNorm().apply(variables, jnp.zeros((2, 3)), NormMode(ADVERSARIAL, 1))


def test_running_statistics_move_by_a_tenth_per_resolution():
    running = {"bn1": {"mean": np.array([1.0, -2.0]), "var": np.array([1.0, 4.0])}}
    first, second = np.array([3.0, 5.0]), np.array([-1.0, 0.5])
    running = jax.tree.map(jnp.float32, running)
    once = blend(running, {"bn1": {"mean": (jnp.float32(first),), "var": (jnp.float32(first),)}})
    np.testing.assert_allclose(once["bn1"]["mean"], [0.9 * 1 + 0.3, 0.9 * -2 + 0.5], rtol=1e-6)
    twice = blend(running, {"bn1": {name: (jnp.float32(first), jnp.float32(second)) for name in ("mean", "var")}})
    np.testing.assert_allclose(
        twice["bn1"]["mean"], 0.9 * (0.9 * np.array([1, -2]) + 0.1 * first) + 0.1 * second, rtol=1e-6
    )
    np.testing.assert_allclose(
        twice["bn1"]["var"], 0.9 * (0.9 * np.array([1, 4]) + 0.1 * first) + 0.1 * second, rtol=1e-6
    )
    wide = blend(running, {"bn1": {name: (np.float64(first),) for name in ("mean", "var")}})
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((once, twice, wide)))


@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 32], ids=lambda size: f"group{size}")
def test_groups_across_devices_equal_one_device(x64, group_size):
    """4 rows a device: groups inside a device, of 2 and 4 devices, and of all 8."""
    x, dy, scale, bias = norm_data((32, 3, 2, 3))
    layout = Layout(batch_size=32, microbatches=1, num_devices=8, bn_group_size=group_size, cutmix_block=1)
    layout.check()
    mode, module = layout.norm_mode(CLEAN), BatchNorm(jnp.float64)

    def local(params, x, dy):
        """The gradient of a device's own loss, then a sum over devices: as the train step does."""

        def loss(params, x):
            y, sown = module.apply({"params": params}, x, mode, mutable=["moments"])
            return jnp.sum(y * dy), (y, sown["moments"])

        (dparams, dx), (y, moments) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, dx, jax.lax.psum(dparams, "data"), jax.lax.pmean(moments, "data")

    rows, whole = P("data"), P()
    sharded = jax.shard_map(
        local, mesh=make_mesh(), in_specs=(whole, rows, rows), out_specs=(rows, rows, whole, whole), check_vma=False
    )
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    y, dx, dparams, moments = jax.jit(sharded)(params, jnp.asarray(x), jnp.asarray(dy))
    expected = norm_reference(x, scale, bias, 32 // group_size, dy)
    got = {"y": y, "dx": dx, **dparams, "mean": moments["mean"][0], "var": moments["var"][0]}
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


# ---- ResNet ------------------------------------------------------------------------------------------------------------


def windows_reference(x, size, stride, padding, fill):
    """All windows [N, H', W', C, size, size] of a padded image, where H' = floor((H + 2p - k) / s) + 1 as in torch."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    views = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return views[:, ::stride, ::stride]


def conv_reference(x, kernel, stride):
    """torch's Conv2d(k, stride, padding=k // 2, bias=False) on [N, H, W, C] with a kernel [k, k, C, F]."""
    size = kernel.shape[0]
    y = np.einsum("nhwcij,ijcf->nhwf", windows_reference(x, size, stride, size // 2, 0), kernel)
    expected = [(length + 2 * (size // 2) - size) // stride + 1 for length in x.shape[1:3]]
    assert list(y.shape[1:3]) == expected
    return y


def eval_norm_reference(x, name, params, stats):
    factor = params[name]["scale"] / np.sqrt(stats[name]["var"] + 1e-5)
    return (x - stats[name]["mean"]) * factor + params[name]["bias"]


def block_reference(x, params, stats, strides):
    """torchvision's BasicBlock or Bottleneck (version 1.5: stride on the 3x3 convolution)."""
    y = x
    for i, stride in enumerate(strides, start=1):
        y = eval_norm_reference(conv_reference(y, params[f"conv{i}"]["kernel"], stride), f"bn{i}", params, stats)
        y = y if i == len(strides) else np.maximum(y, 0)
    if "downsample_conv" in params:
        x = conv_reference(x, params["downsample_conv"]["kernel"], max(strides))
        x = eval_norm_reference(x, "downsample_bn", params, stats)
    return np.maximum(x + y, 0)


def resnet_reference(x, params, stats, stem):
    """Feature maps of the four stages of a network of two-convolution blocks, one per stage."""
    x = conv_reference(x, params["conv1"]["kernel"], 1 if stem == "cifar" else 2)
    x = np.maximum(eval_norm_reference(x, "bn1", params, stats), 0)
    if stem == "imagenet":
        x = windows_reference(x, 3, 2, 1, -np.inf).max(axis=(4, 5))
    maps = []
    for stage in range(1, 5):
        name = f"layer{stage}_0"
        x = block_reference(x, params[name], stats[name], (1 if stage == 1 else 2, 1))
        maps.append(x)
    return maps


@pytest.mark.parametrize(
    "stem, height, width",
    [("imagenet", 64, 48), ("imagenet", 75, 37), ("cifar", 18, 17), ("small", 32, 32), ("small", 37, 22)],
)
def test_resnet_has_torchvision_geometry(x64, stem, height, width):
    network = ResNet(depth=10, base_channels=3, stem=stem, dtype=jnp.float64)
    x = np.random.default_rng(0).normal(size=(2, height, width, 3))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), EVALUATION))
    variables = random_tree(shapes)
    params, stats = (jax.tree.map(np.asarray, variables[name]) for name in ("params", "clean_batch_stats"))

    @jax.jit
    def run(variables, x):
        stages = network.apply(variables, x, EVALUATION, method=ResNet.stages)
        return stages, network.apply(variables, x, EVALUATION), network.apply(variables, x, EVALUATION, 2)

    stages, pooled, corners = run(variables, jnp.asarray(x))
    expected = resnet_reference(x, params, stats, stem)
    for got, wanted in zip(stages, expected, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9 * np.abs(wanted).max())
    assert pooled.shape == (2, network.feature_dim) == (2, 24)
    np.testing.assert_allclose(pooled, expected[-1].mean((1, 2)), rtol=1e-9)
    rows, columns = (slice(0, -1), slice(1, None)), (slice(0, -1), slice(1, None))  # 7 x 7 would have two windows of 6
    windows = [expected[-1][:, row, column].mean((1, 2)) for row in rows for column in columns]
    np.testing.assert_allclose(corners, np.concatenate(windows, axis=1), rtol=1e-9)
    with pytest.raises(ValueError, match="has no 4 x 4 windows: use larger images"):
        jax.eval_shape(lambda x: network.apply(variables, x, EVALUATION, 4), x)


@pytest.mark.parametrize("height, width, stride", [(6, 5, 1), (8, 6, 2), (7, 9, 2)])
def test_bottleneck_has_its_stride_on_the_middle_convolution(x64, height, width, stride):
    block = Block(2, stride, True, jnp.float64, auxiliary_norm=False, zero_init_residual=False)
    x = np.random.default_rng(1).normal(size=(2, height, width, 5))
    variables = random_tree(jax.eval_shape(lambda: block.init(jax.random.key(0), jnp.asarray(x), EVALUATION)))
    params, stats = (jax.tree.map(np.asarray, variables[name]) for name in ("params", "clean_batch_stats"))
    y = jax.jit(lambda variables, x: block.apply(variables, x, EVALUATION))(variables, jnp.asarray(x))
    np.testing.assert_allclose(y, block_reference(x, params, stats, (1, stride, 1)), rtol=1e-9, atol=1e-9)


def backbone_shapes(network, size=32):
    return jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), EVALUATION))


@pytest.mark.parametrize(
    "name, parameters, feature_dim",
    [("resnet18", 11_176_512, 512), ("resnet34", 21_284_672, 512), ("resnet50", 23_508_032, 2048)],
)
def test_backbones_have_torchvision_parameter_counts(name, parameters, feature_dim):
    network = make_resnet(name)
    params = backbone_shapes(network)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    pooled = jax.eval_shape(
        lambda: network.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 64, 3)), EVALUATION)[0]
    )
    assert network.feature_dim == feature_dim and pooled.shape == (2, feature_dim) and pooled.dtype == jnp.float32


def test_names_widths_and_stems():
    assert make_resnet("resnet101").feature_dim == 2048 and make_resnet("resnet10").feature_dim == 512
    wide = make_resnet("resnet50w2", 8, stem="cifar")
    assert (wide.depth, wide.base_channels, wide.feature_dim) == (50, 16, 512)
    assert make_resnet("resnet18").stem == "imagenet"
    for name in ("resnet19", "resnet", "vit", "resnet50w", "resnet50-w2", ""):
        with pytest.raises(ValueError, match=f"unknown backbone '{name}'.*resnet50.*resnet50w2"):
            make_resnet(name)
    with pytest.raises(ValueError, match="unknown stem 'tiny': use one of imagenet, cifar, small"):
        make_resnet("resnet18", stem="tiny")


def test_initialisation_follows_torchvision():
    block = Block(64, 2, False, jnp.float32, auxiliary_norm=True, zero_init_residual=False)
    params = jax.jit(lambda key: block.init(key, jnp.zeros((1, 4, 4, 32)), EVALUATION))(jax.random.key(3))["params"]
    for name in ("conv1", "conv2", "downsample_conv"):
        kernel = np.asarray(params[name]["kernel"])
        fan_out = kernel.shape[0] * kernel.shape[1] * kernel.shape[3]
        assert abs(kernel.std() / np.sqrt(2 / fan_out) - 1) < 0.05
        assert np.abs(kernel).max() > 2.5 * kernel.std()  # a normal distribution that is not cut
    norms = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "scale" in path[-1].key]
    assert norms and all((leaf == 1).all() for leaf in norms)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_zero_init_residual_starts_as_the_identity(bottleneck):
    block = Block(2, 1, bottleneck, jnp.float32, auxiliary_norm=True, zero_init_residual=True)
    x = jax.random.normal(jax.random.key(0), (4, 5, 5, 8 if bottleneck else 2))
    variables = jax.jit(lambda x: block.init(jax.random.key(1), x, EVALUATION))(x)
    last = "bn3" if bottleneck else "bn2"
    for name, module in variables["params"].items():
        if "scale" in module:
            np.testing.assert_array_equal(module["scale"], 0.0 if name == last else 1.0)
            np.testing.assert_array_equal(module["adversarial_scale"], 0.0 if name == last else 1.0)
    for branch in (CLEAN, ADVERSARIAL):
        y = jax.jit(lambda v, x, branch=branch: block.apply(v, x, NormMode(branch, 2)))(variables, x)
        np.testing.assert_array_equal(y, np.maximum(x, 0))


# ---- Heads and the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_is_linear_norm_relu_linear(x64, batch_norm):
    head = ProjectionHead(7, 4, batch_norm, jnp.float64, auxiliary_norm=True)
    x = np.random.default_rng(0).normal(size=(6, 5))
    variables = random_tree(head.init(jax.random.key(0), jnp.asarray(x), EVALUATION))
    params = jax.tree.map(np.asarray, variables["params"])
    assert set(params) == {"linear1", "linear2"} | ({"bn1"} if batch_norm else set())
    assert params["linear1"]["kernel"].shape == (5, 7) and params["linear2"]["kernel"].shape == (7, 4)
    hidden = x @ params["linear1"]["kernel"] + params["linear1"]["bias"]
    if batch_norm:
        bn = params["bn1"]
        hidden = norm_reference(hidden, bn["scale"], bn["bias"], 2, np.zeros_like(hidden))["y"]
    expected = np.maximum(hidden, 0) @ params["linear2"]["kernel"] + params["linear2"]["bias"]
    np.testing.assert_allclose(
        head.apply(variables, jnp.asarray(x), NormMode(CLEAN, 2)), expected, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("branch", [CLEAN, ADVERSARIAL])
def test_simsiam_head_has_a_norm_behind_each_of_three_layers(branch, x64):
    """The last one without scale and bias (builder.py of facebookresearch/simsiam)."""
    head = ProjectionHead(7, 4, True, jnp.float64, auxiliary_norm=True, layers=3, output_norm=True)
    x = np.random.default_rng(0).normal(size=(6, 5))
    variables = random_tree(head.init(jax.random.key(0), jnp.asarray(x), EVALUATION))
    params = jax.tree.map(np.asarray, variables["params"])
    assert set(params) == {"linear1", "bn1", "linear2", "bn2", "linear3"}
    assert set(variables["clean_batch_stats"]) == {"bn1", "bn2", "bn3"}
    prefix, expected = "" if branch == CLEAN else "adversarial_", x
    for layer in (1, 2, 3):
        linear, bn = params[f"linear{layer}"], params.get(f"bn{layer}", {})
        scale, bias = bn.get(f"{prefix}scale", np.ones(4)), bn.get(f"{prefix}bias", np.zeros(4))
        expected = expected @ linear["kernel"] + linear["bias"]
        expected = norm_reference(expected, scale, bias, 2, np.zeros_like(expected))["y"]
        expected = np.maximum(expected, 0) if layer < 3 else expected
    outputs, sown = head.apply(variables, jnp.asarray(x), NormMode(branch, 2), mutable=["moments"])
    np.testing.assert_allclose(outputs, expected, rtol=1e-9, atol=1e-9)
    assert set(sown["moments"]) == {"bn1", "bn2", "bn3"}
    # With the running statistics, the last layer's alone make its output.
    evaluated = head.apply(variables, jnp.asarray(x), NormMode(branch))
    statistics = variables[f"{branch}_batch_stats"]["bn3"]
    shifted = variables | {
        f"{branch}_batch_stats": variables[f"{branch}_batch_stats"]
        | {"bn3": {"mean": statistics["mean"] + 1, "var": statistics["var"]}}
    }
    moved = head.apply(shifted, jnp.asarray(x), NormMode(branch)) - evaluated
    np.testing.assert_allclose(moved, -jnp.ones((6, 1)) / np.sqrt(statistics["var"] + 1e-5)[None], rtol=1e-9)


def test_one_layer_head_is_linear(x64):
    head = ProjectionHead(7, 4, True, jnp.float64, layers=1)
    x = np.random.default_rng(0).normal(size=(6, 5))
    variables = head.init(jax.random.key(0), jnp.asarray(x), EVALUATION)
    assert set(variables) == {"params"} and set(variables["params"]) == {"linear1"}
    linear = variables["params"]["linear1"]
    outputs = head.apply(variables, jnp.asarray(x), NormMode(CLEAN, 2))
    np.testing.assert_allclose(outputs, x @ linear["kernel"] + linear["bias"][None], rtol=1e-9, atol=1e-9)


def test_head_starts_like_torch_linear():
    params = ProjectionHead(300, 50, False).init(jax.random.key(0), jnp.zeros((1, 100)), EVALUATION)["params"]
    for name, fan_in in (("linear1", 100), ("linear2", 300)):
        bound = fan_in**-0.5
        for leaf in params[name].values():
            assert np.abs(leaf).max() <= bound and np.abs(leaf).max() > 0.9 * bound
            assert np.ptp(leaf) > 1.7 * bound and abs(float(leaf.mean())) < 0.2 * bound


def tiny_network(dtype=jnp.float32, auxiliary=True):
    backbone = ResNet(depth=10, base_channels=2, stem="cifar", dtype=dtype, auxiliary_norm=auxiliary)
    return Network(backbone, ProjectionHead(6, 5, True, dtype, auxiliary), MEAN, STD)


def tiny_variables(network, seed=0):
    """Random parameters and statistics, in float32 or, under x64, float64."""
    crops = (jnp.zeros((1, 1, 16, 16, 3)),)
    return random_tree(jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION)), seed)


def two_resolutions(num, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.uniform(size=(num, v, s, s, 3))) for v, s in ((2, 12), (3, 8)))


def test_network_is_one_backbone_call_per_resolution_and_one_head_call(x64):
    network, crops, mode = tiny_network(jnp.float64), two_resolutions(4), NormMode(CLEAN, 2)
    params = tiny_variables(network)["params"]
    backbone, head = network.backbone, network.head

    @jax.jit
    def apply(params, crops):
        return network.apply({"params": params}, crops, mode, mutable=["moments"])

    @jax.jit
    def apply_by_hand(params, crops):
        features = []
        for x in crops:
            x = (x - jnp.asarray(MEAN).reshape(1, 1, 1, 1, 3)) / jnp.asarray(STD).reshape(1, 1, 1, 1, 3)
            pooled = backbone.apply({"params": params["backbone"]}, x.reshape(-1, *x.shape[2:]), mode)
            features.append(pooled.reshape(4, x.shape[1], -1))
        z = head.apply({"params": params["head"]}, jnp.concatenate(features, axis=1).reshape(4 * 5, -1), mode)
        return z.reshape(4, 5, -1)

    outputs, sown = apply(params, crops)
    z = np.asarray(apply_by_hand(params, crops))
    assert outputs.shape == (4, 5, 5) and (np.abs(np.linalg.norm(z, axis=-1) - 1) > 1e-3).all()
    np.testing.assert_allclose(outputs, z / np.linalg.norm(z, axis=-1, keepdims=True), rtol=1e-9, atol=1e-10)
    counts = {name: len(entry) for name, entry in sown["moments"]["backbone"]["bn1"].items()}
    assert counts == {"mean": 2, "var": 2}  # one per resolution
    assert len(sown["moments"]["head"]["bn1"]["mean"]) == 1
    assert set(sown) == {"moments"}


def test_permuting_a_group_permutes_the_outputs(x64):
    network, crops = tiny_network(jnp.float64), two_resolutions(8)
    params = tiny_variables(network)["params"]
    run = jax.jit(lambda crops: network.apply({"params": params}, crops, NormMode(CLEAN, 2)))
    outputs = run(crops)
    inside = np.array([2, 0, 3, 1, 7, 4, 6, 5])
    np.testing.assert_allclose(run(tuple(x[inside] for x in crops)), outputs[inside], rtol=1e-8, atol=1e-9)
    across = np.array([4, 1, 2, 3, 0, 5, 6, 7])
    assert np.abs(run(tuple(x[across] for x in crops)) - outputs[across]).max() > 1e-4


def test_clean_and_adversarial_sets_are_separate():
    network, crops = tiny_network(), (jnp.float32(two_resolutions(4)[1]),)
    variables = tiny_variables(network)
    params = variables["params"]
    assert set(variables) == {"params", stats_collection(CLEAN), stats_collection(ADVERSARIAL)}
    weight = jnp.float32(np.random.default_rng(5).normal(size=(4, 3, 5)))

    def loss(params, branch):
        outputs, sown = network.apply({"params": params}, crops, NormMode(branch, 1), mutable=EVERYTHING)
        assert set(sown) == {"moments"}  # a training pass writes no running statistics
        return jnp.sum(outputs * weight), outputs

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    seen = {}
    for branch in (CLEAN, ADVERSARIAL):
        grads, seen[branch] = run(params, branch)
        norms = {"own": 0, "other": 0, "shared": 0}
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            name = path[-1].key
            of = ADVERSARIAL if name.startswith("adversarial_") else CLEAN
            kind = "shared" if "bn" not in path[-2].key else "own" if of == branch else "other"
            norms[kind] += 1
            assert (np.abs(leaf).max() > 0) == (kind != "other"), (branch, path)
        assert norms["own"] == norms["other"] == 2 * 13 and norms["shared"] == 12 + 4, norms
    assert np.abs(seen[CLEAN] - seen[ADVERSARIAL]).max() > 1e-3  # the sets hold different numbers


def test_evaluation_reads_the_clean_statistics_only():
    network, crops = tiny_network(), (jnp.float32(two_resolutions(3)[1]),)
    variables = tiny_variables(network)
    run = jax.jit(lambda variables, crops: network.apply(variables, crops, EVALUATION))
    outputs = run(variables, crops)
    repeated = (jnp.asarray(np.repeat(crops[0][:1], 3, axis=0)),)
    np.testing.assert_allclose(run(variables, repeated)[2], outputs[0], rtol=1e-4, atol=1e-5)  # no other row matters
    for name, matters in ((stats_collection(CLEAN), True), (stats_collection(ADVERSARIAL), False)):
        moved = dict(variables) | {name: jax.tree.map(lambda leaf: 2 * leaf + 1, variables[name])}
        assert (np.abs(run(moved, crops) - outputs).max() > 1e-3) == matters


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
    half, full, mode = tiny_network(jnp.bfloat16), tiny_network(jnp.float32), NormMode(ADVERSARIAL, 2)
    crops = (jnp.float32(two_resolutions(4)[0]),)
    variables = jax.eval_shape(lambda: half.init(jax.random.key(0), crops, EVALUATION))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    params = {"params": random_tree(variables)["params"]}

    def loss(params):
        outputs, sown = half.apply(params, crops, mode, mutable=["moments"])
        return jnp.sum(outputs), (outputs, sown)

    grads, (outputs, sown) = jax.eval_shape(jax.grad(loss, has_aux=True), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((grads, outputs, sown)))

    image = crops[0][:, 0]
    maps = jax.eval_shape(
        lambda: half.backbone.apply({"params": params["params"]["backbone"]}, image, mode, method=ResNet.stages)
    )
    assert [x.dtype for x in maps] == [jnp.bfloat16] * 4
    features, reference = jax.jit(
        lambda params: [network.apply(params, image, mode, method=Network.features) for network in (half, full)]
    )(params)
    assert features.dtype == jnp.float32
    error = np.abs(features - reference).max() / np.abs(reference).max()
    assert 1e-6 < error < 0.1  # computed in bfloat16, and still close


def test_moments_of_bfloat16_values_are_accumulated_in_float32():
    x = jnp.bfloat16(1 + 0.25 * np.random.default_rng(0).normal(size=(512, 4)))
    norm = BatchNorm(jnp.bfloat16)
    _, sown = norm.apply(
        {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}, x, NormMode(CLEAN, 1), mutable=["moments"]
    )
    np.testing.assert_allclose(sown["moments"]["mean"][0], np.float64(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(sown["moments"]["var"][0], np.float64(x).var(0, ddof=1), rtol=1e-4)
