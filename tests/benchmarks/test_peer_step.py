"""The step in plain PyTorch that ours is timed beside computes the same step: losses, updates, statistics, queue and bank.

In float64 and over two steps. In float32 the sign in the attack turns round where a slope is nearly 0, and a comparison has to
allow for what such pixels change; in float64 no slope comes that near, and everything can be compared to 1e-9.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import small_config

from benchmarks.compare import case_of, in_common
from benchmarks.flops import product_flops
from benchmarks.ours import VARIANTS, num_examples
from hexa_jax.methods.deepcluster import DeepClusterState
from hexa_jax.models import resnet
from hexa_jax.training.factory import make_trainer

torch = pytest.importorskip("torch", reason="compares with PyTorch")

from benchmarks.peers import torch_network, torch_step  # noqa: E402

# Two blocks again, the first one with the first stage's shortcut: 6 of two 3x3 convolutions, 56 with a bottleneck.
BLOCKS = {6: (1, 0, 0, 1), 56: (1, 0, 0, 1)}
LAYERS = ("layer1_0", "layer4_0")
BASE = {"batch_size": 8, "views.epsilon": 6.0, "views.step_size": 4.0}  # such an attack's second step leaves the ball
TWO_SIZES = {
    "data.num_crops": (2, 1),
    "data.crop_size": (12, 8),
    "data.min_scale": (0.2, 0.1),
    "data.max_scale": (1.0, 0.2),
}
CASES = {
    "moco, auxiliary attack, cut-mixed": (
        "moco",
        {"model.stem": "imagenet", "data.crop_size": (32,), "views.cutmix.weight": 0.7, "optimizer.weight_decay": 0.01},
    ),
    "moco, two attack steps through the main set": (
        "moco",
        {
            "views.attack_norm": "clean",
            "views.steps": 2,
            "views.adversarial.weight": 0.6,
            "views.cutmix.weight": 0.0,
            "optimizer.weight_decay": 0.01,
        },
    ),
    "deepcluster, two sizes, all views": ("deepcluster", TWO_SIZES),
    "deepcluster, plain, bottleneck": (
        "deepcluster",
        {
            "model.backbone": "resnet56",
            "views.adversarial.weight": 0.0,
            "views.cutmix.weight": 0.0,
            "optimizer.momentum": 0.5,
        },
    ),
}


@pytest.fixture
def float64_torch(monkeypatch):
    """PyTorch computes in float64, also where the step asks for float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def place_of(name):
    """Of a tensor of the peer's network: collection and path in our variables."""
    part, *modules, leaf = name.split(".")
    branch = ""
    if "sets" in modules:
        branch, modules = modules[-1], modules[:-2]
    if modules[0] == "blocks":
        block, kind, *number = modules[1:]
        one_based = str(int(number[0]) + 1) if number else ""
        module = {"convs": "conv", "norms": "bn", "shortcut": "downsample_conv", "shortcut_norm": "downsample_bn"}[kind]
        path = (part, LAYERS[int(block)], module + one_based)
    else:
        path = (part, {"norm1": "bn1", "norm": "bn1"}.get(modules[0], modules[0]))
    if leaf.startswith("running"):
        return f"{branch}_batch_stats", (*path, leaf.removeprefix("running_"))
    ours = {"weight": "scale" if branch else "kernel", "bias": "bias"}[leaf]
    return "params", (*path, f"adversarial_{ours}" if branch == "adversarial" else ours)


def as_torch(variables, network):
    """Our variables as the peer's state dict; every one of ours must have its place there."""
    arrays, places = {}, set()
    for name in network.state_dict():
        if name.endswith("num_batches_tracked"):
            continue
        collection, path = place_of(name)
        places.add((collection, *path))
        value = variables[collection]
        for module in path:
            value = value[module]
        axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(np.ndim(value))
        arrays[name] = torch.from_numpy(np.array(np.transpose(value, axes)))
    ours = jax.tree_util.tree_flatten_with_path(variables)[0]
    assert places == {tuple(entry.key for entry in path) for path, _ in ours}
    return arrays


def perturbed(tree, rng):
    """Every number moved, so that no two BatchNorm sets and no two scales are the same."""
    return jax.tree.map(lambda leaf: leaf * (1 + 0.2 * rng.random(leaf.shape)) + 0.1 * rng.random(leaf.shape), tree)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def example_batch(trainer, config, rng):
    """Noise of other examples than the first ones; keys in another order than their images."""
    shapes, size = trainer.batch_shapes(), config.batch_size
    flat = lambda x: np.asarray(x, np.int32).reshape(1, size)  # noqa: E731
    noise = lambda s: rng.integers(0, 256, s.shape, np.uint8)  # noqa: E731
    index, order = rng.permutation(num_examples(config))[:size], rng.permutation(size)
    batch = shapes._replace(
        index=flat(index),
        row=flat(range(size)),
        valid=np.ones((1, size), bool),
        label=flat(index),
        crops=tuple(noise(s) for s in shapes.crops),
    )
    if shapes.key_crops is not None:
        keys = {"key_index": flat(index[order]), "key_row": flat(np.argsort(order))}
        batch = batch._replace(key_crops=noise(shapes.key_crops), **keys)
    return batch


def our_side(config, rng):
    """Compiled steps, a state with noise in every part, and a batch; both as NumPy."""
    trainer = make_trainer(config, num_examples(config))
    steps = trainer.compile()
    with jax.set_mesh(trainer.mesh):
        state = jax.device_get(steps.init(0))
    method = state.method
    if isinstance(method, DeepClusterState):
        labels = rng.integers(0, config.deepcluster.num_clusters, method.assignments.shape, np.int32)
        method = method._replace(assignments=labels, prototypes=unit(rng, *method.prototypes.shape))
    else:
        keys, last = perturbed(method.key_params, rng), np.int32(config.moco.queue_size - config.batch_size)
        method = method._replace(key_params=keys, queue=unit(rng, *method.queue.shape), position=last)
    params, stats = perturbed(state.params, rng), perturbed(state.batch_stats, rng)
    state = state._replace(params=params, batch_stats=stats, method=method)
    return trainer, steps, state, example_batch(trainer, config, rng)


def peer_side(case, state, batch):
    """The peer's step with the same numbers in it."""
    step = torch_step.TorchStep(case)
    step.network.load_state_dict(
        as_torch({"params": state.params["network"], **state.batch_stats}, step.network), strict=False
    )
    index = torch.from_numpy(batch.index[0].astype(np.int64))
    step.batch = torch_step.Batch([torch.from_numpy(crops[0]) for crops in batch.crops], index)
    if case.method == "moco":
        keys = as_torch({"params": state.method.key_params, **state.batch_stats}, step.network)
        step.method.key_network.load_state_dict(keys, strict=False)
        step.method.queue, step.method.position = torch.from_numpy(state.method.queue.copy()), state.method.position
        step.batch.key_crops = torch.from_numpy(batch.key_crops[0])
        step.batch.key_row = torch.from_numpy(batch.key_row[0].astype(np.int64))
    else:
        step.method.assignments = torch.from_numpy(state.method.assignments.astype(np.int64))
        step.method.prototypes = torch.from_numpy(state.method.prototypes)
    return step


def same_boxes(monkeypatch, config, crops, rng):
    """Both sides cut and paste the same: partners, and one box a crop."""
    partner = rng.permutation(config.batch_size)
    monkeypatch.setattr("hexa_jax.training.step_context.block_permutation", lambda *_: jnp.asarray(partner, jnp.int32))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.from_numpy(partner))
    boxes = {}
    for x in crops:
        _, num, count, size, _, _ = x.shape
        corners = np.sort(rng.integers(0, size + 1, (num, count, 2, 2)), axis=-1)  # top, bottom; left, right
        boxes[size] = corners.reshape(num, count, 4)
    monkeypatch.setattr(
        sys.modules["hexa_jax.views.cutmix"],  # the package's attribute of this name is the function
        "cutmix_boxes",
        lambda keys, x, **_: tuple(jnp.asarray(boxes[leaf.shape[2]], jnp.int32) for leaf in x),
    )
    monkeypatch.setattr(torch_step.TorchStep, "boxes", lambda self, shape, size: torch.from_numpy(boxes[size]))


def assert_close(ours, theirs):
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


SLOW = ("deepcluster, plain, bottleneck",)  # the others have every part but the third convolution of a block


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_the_same_step(name, x64, float64_torch, monkeypatch):
    method, overrides = CASES[name]
    for depth, blocks in BLOCKS.items():
        monkeypatch.setitem(resnet.STAGES, depth, blocks)
        monkeypatch.setitem(torch_network.BLOCKS, depth, blocks)
    config, rng = small_config(method, **{**BASE, **overrides}), np.random.default_rng(0)
    config.update_from_flattened_dict(in_common(config, augment=False))
    single = config.copy_and_resolve_references()
    single.precision = "float32"  # the peer knows no other; the fixture sees to it
    trainer, steps, state, batch = our_side(config, rng)
    same_boxes(monkeypatch, config, batch.crops, rng)
    peer = peer_side(case_of(single, {}), state, batch)
    before = as_torch({"params": state.params["network"], **state.batch_stats}, peer.network)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (trainer.state_shapes(), trainer.batch_shapes()))
    for _ in range(2):  # the second one sees momentum, and what the first one wrote
        with jax.set_mesh(trainer.mesh):
            state, metrics = jax.device_get(steps.train(*jax.device_put((state, batch), shardings), None))
        losses = peer.step()
        shown = {key.removeprefix("loss_"): value for key, value in metrics.items() if key.startswith("loss_")}
        assert losses.keys() == shown.keys() == trainer.objective.scheme.weights(0).keys()
        for view, loss in losses.items():  # metrics are float32
            assert float(loss) == pytest.approx(float(shown[view]), rel=2e-7)
        after = as_torch({"params": state.params["network"], **state.batch_stats}, peer.network)
        theirs = {key: value.detach() for key, value in peer.network.state_dict().items()}
        assert_close(after, theirs)
        if method == "moco":
            keys = as_torch({"params": state.method.key_params, **state.batch_stats}, peer.network)
            names = [key for key in keys if "running" not in key]
            assert_close({key: keys[key] for key in names}, peer.method.key_network.state_dict())
            assert_close({"queue": state.method.queue}, {"queue": peer.method.queue})
        else:
            ours = {"bank": state.method.bank.rows, "index": state.method.bank.index}
            assert_close(ours, {"bank": peer.method.bank, "index": peer.method.bank_index})
        assert peer.method.position == (state.method if method == "moco" else state.method.bank).position
    assert max(float((after[key] - before[key]).abs().max()) for key in before) > 1e-2


@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_same_flops(backbone):
    """As torch's own counter has it. The 7x7 stem differs: ours is one of 8x8 with a row and a column of zeros."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config("moco", **{"precision": "float32", "batch_size": 4, "model.backbone": backbone})
    config.update_from_flattened_dict(in_common(config, augment=False))
    config.views.update_from_flattened_dict(VARIANTS["plain"])
    trainer = make_trainer(config, num_examples(config))
    ours = product_flops(jax.make_jaxpr(trainer.train_step)(trainer.state_shapes(), trainer.batch_shapes()))
    peer = torch_step.TorchStep(case_of(config, {}))
    with FlopCounterMode(display=False) as counter:
        peer.step()
    assert ours == counter.get_total_flops()
