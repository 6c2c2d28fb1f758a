"""Weights under other libraries' names: against what PyTorch computed, names from each library's own layout, and mistakes."""

import argparse
import functools
import json
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_torch_goldens import GOLDENS, NETWORKS, SIDES, draw_all, images, samples
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small import small_config

from hexa_jax import export
from hexa_jax.checkpoint.checkpointer import CheckpointError, Checkpoints
from hexa_jax.evals.backbone import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.norm import EVALUATION
from hexa_jax.models.resnet import ResNet, make_resnet
from hexa_jax.models.weights import (
    Architecture,
    WeightsError,
    architecture_of,
    from_torchvision,
    huggingface_config,
    read_weights,
    to_torchvision,
)

TORCH = "needs PyTorch, which the project does not install: pip install torch==2.13.0"
TOLERANCE = 1e-4  # of the largest value


# ---- Weights by name ---------------------------------------------------------------------------------------------------


@functools.cache
def goldens():
    with np.load(GOLDENS) as file:
        return {name: file[name] for name in file.files}


def torch_shapes(name):
    """{name: shape} of a golden network's state_dict."""
    return json.loads(goldens()[f"{name}/shapes"].tobytes())


def torch_arrays(name):
    """A golden network's state_dict."""
    return draw_all(torch_shapes(name))


def widened(shapes, factor):
    """The shapes with every channel but the three of the images multiplied."""

    def wider(shape):
        return [n * factor if axis < 2 and n != 3 else n for axis, n in enumerate(shape)]

    return {name: wider(shape) for name, shape in shapes.items()}


def make_network(depth, base_channels, stem="imagenet", **settings):
    """Takes pixels as they are, and returns pooled features."""
    resnet = make_resnet(f"resnet{depth}", base_channels, stem=stem, **settings)
    return Network(resnet, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), normalize=False)


def shapes_of(network):
    crops = (jnp.zeros((1, 1, 32, 32, 3)),)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), crops, EVALUATION))


@functools.cache
def loader(depth, base_channels, stem):
    """A network, and what makes its variables of named arrays."""
    network = make_network(depth, base_channels, stem)
    return network, functools.partial(from_torchvision, like=shapes_of(network))


def drawn(tree):
    """Like the tree, every leaf drawn on its own."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tree)


@functools.partial(jax.jit, static_argnums=0)
def run(network, variables, x):
    """Pooled features [N, F] and the maps [N, H, W, C] of the four stages."""
    maps = network.backbone.apply(
        {name: tree["backbone"] for name, tree in variables.items()}, x, EVALUATION, method=ResNet.stages
    )
    return network.apply(variables, x, EVALUATION, method=Network.features), maps


def assert_close(got, expected, err_msg=""):
    assert got.shape == expected.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max(), err_msg=err_msg)


def assert_same_arrays(got, expected):
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def assert_same_trees(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


# ---- What PyTorch computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", NETWORKS)
def test_features_and_stage_maps_are_those_of_pytorch(name, side):
    network, load = loader(*NETWORKS[name])
    pooled, maps = run(network, load(torch_arrays(name)), images(*SIDES[side]))
    golden = {key.rpartition("/")[2]: value for key, value in goldens().items() if key.startswith(f"{name}/{side}/")}
    assert_close(pooled, golden["pooled"])
    for stage, values in enumerate(maps, start=1):
        assert values.shape == tuple(golden[f"shape{stage}"])
        assert_close(samples(stage, values), golden[f"stage{stage}"], f"stage {stage}")


def torch_network(depth, base_channels, stem="imagenet"):
    """PyTorch's network in evaluation mode with weights by name, and its state_dict as NumPy."""
    torch = pytest.importorskip("torch", reason=TORCH)
    from torch_resnet import TorchResNet

    network = TorchResNet(depth, base_channels, stem).eval()
    arrays = draw_all({name: value.shape for name, value in network.state_dict().items()})
    network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
    return network, arrays


def torch_run(network, x):
    """Pooled features and stage maps [N, H, W, C] of images [N, H, W, 3]."""
    import torch

    with torch.no_grad():
        pooled, maps = network(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
    return pooled.numpy(), [values.permute(0, 2, 3, 1).numpy() for values in maps]


@pytest.mark.parametrize("height, width", [(224, 224), (199, 161)])
@pytest.mark.parametrize(
    "depth, base_channels",
    [
        (18, 64),
        (50, 64),
        pytest.param(34, 64, marks=pytest.mark.slow),
        pytest.param(50, 128, marks=pytest.mark.slow),
    ],
)
def test_full_size_networks_equal_pytorch(depth, base_channels, height, width):
    theirs, arrays = torch_network(depth, base_channels)
    network, load = loader(depth, base_channels, "imagenet")
    x = images(height, width)
    pooled, maps = run(network, load(arrays), x)
    expected, expected_maps = torch_run(theirs, x)
    assert_close(pooled, expected)
    for got, wanted in zip(maps, expected_maps, strict=True):
        assert_close(got, wanted)


def test_pth_files_travel_both_ways(tmp_path):
    theirs, arrays = torch_network(50, 4)
    import torch

    published = {"epoch": 200, "arch": "resnet50", "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    published["state_dict"] = {name: torch.from_numpy(value) for name, value in moco(arrays).items()}
    torch.save(published, tmp_path / "moco_v2.pth.tar")
    assert exported(tmp_path / "moco_v2.pth.tar", "torchvision", tmp_path / "ours.pth") == 0
    state = torch.load(tmp_path / "ours.pth", weights_only=True)
    again = type(theirs)(50, 4).eval()
    again.load_state_dict(state)  # strict: every name
    x = images(64, 64)
    np.testing.assert_array_equal(torch_run(again, x)[0], torch_run(theirs, x)[0])


@pytest.mark.parametrize("kind", ["half", "bfloat16", "parameters"])
def test_pth_files_hold_other_kinds_of_tensors(tmp_path, kind):
    torch = pytest.importorskip("torch", reason=TORCH)
    arrays = torch_arrays("resnet18")
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    change = {"half": torch.Tensor.half, "bfloat16": torch.Tensor.bfloat16, "parameters": torch.nn.Parameter}[kind]
    torch.save({n: change(t) if t.is_floating_point() else t for n, t in tensors.items()}, tmp_path / "weights.pth")
    read = read_weights(str(tmp_path / "weights.pth"))
    rounding = {"half": 2e-3, "bfloat16": 1e-2, "parameters": 0}[kind]
    for name, value in arrays.items():
        np.testing.assert_allclose(np.float32(read[name]), value, rtol=rounding, atol=1e-6, err_msg=name)


# ---- To and from torchvision's names -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth, stem", [(18, "cifar"), (50, "imagenet")])
def test_a_round_trip_keeps_the_clean_branch_and_leaves_the_adversarial_one_out(depth, stem):
    resnet = make_resnet(f"resnet{depth}", 4, stem=stem, auxiliary_norm=True)
    network = Network(resnet, ProjectionHead(6, 5, True, auxiliary_norm=True), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    variables = drawn(shapes_of(network))
    arrays = to_torchvision(variables)
    name = f"resnet{depth}" if stem == "imagenet" else f"resnet{depth}_cifar"
    assert {key: list(value.shape) for key, value in arrays.items()} == torch_shapes(name)
    back = from_torchvision(arrays, variables)
    expected = {
        collection: {"backbone": clean(variables[collection]["backbone"])}
        for collection in ("params", "clean_batch_stats")
    }
    assert_same_trees(back, expected)
    assert_same_arrays(to_torchvision(back), arrays)
    assert_same_arrays(to_torchvision({name: tree["backbone"] for name, tree in back.items()}), arrays)


def clean(tree):
    """Without the leaves of the adversarial set."""
    kept = {name: node for name, node in tree.items() if not name.startswith("adversarial")}
    return {name: clean(node) if isinstance(node, dict) else node for name, node in kept.items()}


def test_kernels_and_statistics_go_where_their_names_say():
    arrays = torch_arrays("resnet50")
    _, load = loader(*NETWORKS["resnet50"])
    variables = load(arrays)
    params, stats = variables["params"]["backbone"], variables["clean_batch_stats"]["backbone"]
    kernel = arrays["layer2.0.downsample.0.weight"]
    assert kernel.shape == (32, 16, 1, 1)
    np.testing.assert_array_equal(params["layer2_0"]["downsample_conv"]["kernel"], kernel.transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["conv1"]["kernel"][6, 2, 1, 3], arrays["conv1.weight"][3, 1, 6, 2])
    np.testing.assert_array_equal(params["layer4_2"]["bn3"]["scale"], arrays["layer4.2.bn3.weight"])
    np.testing.assert_array_equal(params["layer4_2"]["bn3"]["bias"], arrays["layer4.2.bn3.bias"])
    mean = arrays["layer1.0.downsample.1.running_mean"]
    np.testing.assert_array_equal(stats["layer1_0"]["downsample_bn"]["mean"], mean)
    np.testing.assert_array_equal(stats["bn1"]["var"], arrays["bn1.running_var"])


def under(prefix, arrays):
    return {f"{prefix}{name}": value for name, value in arrays.items()}


def zeros(**shapes):
    return {name.replace("__", "."): np.zeros(shape, np.float32) for name, shape in shapes.items()}


def moco(arrays):
    """facebookresearch/moco v2: two encoders with a head each, and the queue."""
    head = zeros(fc__0__weight=(8, 8), fc__0__bias=8, fc__2__weight=(4, 8), fc__2__bias=4)
    other = {name: np.asarray(value + 1) for name, value in arrays.items()}
    queue = zeros(module__queue=(4, 16), module__queue_ptr=1)
    return under("module.encoder_k.", other | head) | queue | under("module.encoder_q.", arrays | head)


def swav(arrays):
    """facebookresearch/swav: one network with a head and prototypes."""
    head = zeros(projection_head__0__weight=(8, 8), projection_head__3__weight=(4, 8), prototypes__weight=(30, 4))
    norm = zeros(
        projection_head__1__weight=8, projection_head__1__running_mean=8, projection_head__1__num_batches_tracked=()
    )
    return under("module.", head | norm | arrays)


LAYOUTS = {
    "torchvision": lambda arrays: arrays | zeros(fc__weight=(10, 8), fc__bias=10),
    "moco": moco,
    "moco_v3": lambda arrays: (
        under("module.base_encoder.", arrays | zeros(fc__0__weight=(8, 8)))
        | under("module.momentum_encoder.", arrays)
        | zeros(module__predictor__0__weight=(4, 4))
    ),
    "simsiam": lambda arrays: (
        under("module.encoder.", arrays | zeros(fc__0__weight=(8, 8), fc__1__running_mean=8))
        | zeros(module__predictor__0__weight=(4, 4))
    ),
    "swav": swav,
    "deepcluster_v2": lambda arrays: swav(arrays) | zeros(module__prototypes__prototypes0__weight=(30, 4)),
    "dino": lambda arrays: under("module.backbone.", arrays) | zeros(module__head__mlp__0__weight=(4, 4)),
    "without counters": lambda arrays: {n: v for n, v in arrays.items() if not n.endswith("num_batches_tracked")},
    "vissl": lambda arrays: under("_feature_blocks.", arrays),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load(layout):
    arrays = torch_arrays("resnet18")
    _, load = loader(*NETWORKS["resnet18"])
    published = LAYOUTS[layout](arrays)
    assert architecture_of(published) == Architecture(18, 4, "imagenet")
    assert_same_trees(load(published), load(arrays))


@pytest.mark.parametrize("key", ["state_dict", "model", "teacher", "model_state_dict", None])
def test_the_state_dict_is_found_inside_a_checkpoint(key):
    arrays = torch_arrays("resnet18")
    content = {"epoch": 3, key: arrays} if key else arrays | {"epoch": 3}
    assert_same_arrays(read_weights("model.pth.tar", lambda path: content), arrays)


def test_a_file_without_arrays_is_refused():
    for content, message in (([1, 2], "holds no dict of arrays"), ({"state_dict": {"lr": 0.1}}, "holds no arrays")):
        with pytest.raises(WeightsError, match=f"model.pth {message}"):
            read_weights("model.pth", lambda path, content=content: content)


def without(arrays, *names):
    return {name: value for name, value in arrays.items() if name not in names}


def test_all_that_does_not_fit_is_listed_in_one_message():
    arrays = torch_arrays("resnet18")
    _, load = loader(*NETWORKS["resnet18"])
    wrong = without(arrays, "layer1.1.bn2.running_var") | zeros(conv1__bias=4)
    wrong["layer4.0.conv1.weight"] = np.zeros((32, 8, 3, 3), np.float32)
    with pytest.raises(WeightsError) as error:
        load(under("module.", wrong))
    assert str(error.value) == (
        "the weights are of another architecture: layer1.1.bn2.running_var is missing; conv1.bias is left over; "
        "layer4.0.conv1.weight has shape (32, 8, 3, 3), not (32, 16, 3, 3)"
    )
    gone = [name for name in arrays if name.startswith("layer1.") and not name.endswith("num_batches_tracked")]
    assert len(gone) == 4 * 5  # convolutions with a BatchNorm
    with pytest.raises(WeightsError, match=r"(: |; )layer1\.\d.* is missing(; layer1.* is missing){2}; and 17 more$"):
        load(without(arrays, *gone))


def test_weights_inside_the_layers_are_never_dropped():
    """A squeeze-and-excitation network has the names of a ResNet and more; without those it computes something else."""
    arrays = torch_arrays("resnet18")
    _, load = loader(*NETWORKS["resnet18"])
    for name in ("layer1.0.se.fc1.weight", "layer1.0.se.fc.weight"):
        with pytest.raises(WeightsError, match=f"{name} is left over"):
            load(arrays | {name: np.zeros((4, 4), np.float32)})


def test_no_resnet_at_all():
    for arrays in ({}, zeros(patch_embed__proj__weight=(4, 3, 7, 7), norm__bias=4)):
        with pytest.raises(WeightsError, match=f"no ResNet's conv1.weight among {len(arrays)} arrays"):
            architecture_of(arrays)


# ---- Architecture ------------------------------------------------------------------------------------------------------


def empty(shapes):
    """Arrays that take no memory."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def longer(shapes):
    """ResNet-101 from the shapes of ResNet-50: 23 blocks in the third stage."""
    last = {name: shape for name, shape in shapes.items() if name.startswith("layer3.5.")}
    more = [{name.replace("layer3.5.", f"layer3.{i}."): shape for name, shape in last.items()} for i in range(6, 23)]
    return functools.reduce(lambda a, b: a | b, more, shapes)


@pytest.mark.parametrize("factor, width", [(1, 4), (16, 64), (32, 128), (48, 192)])
def test_architecture_is_read_off_names_and_shapes(factor, width):
    for name, expected in {
        "resnet18": (18, width, "imagenet"),
        "resnet34": (34, width, "imagenet"),
        "resnet50": (50, width, "imagenet"),
        "resnet50w2": (50, 2 * width, "imagenet"),
        "resnet18_cifar": (18, width, "cifar"),
    }.items():
        shapes = widened(torch_shapes(name), factor)
        assert architecture_of(empty(shapes)) == expected
        assert architecture_of(under("module.", empty(shapes))) == expected
    assert architecture_of(empty(longer(widened(torch_shapes("resnet50"), factor)))) == (101, width, "imagenet")


def test_architecture_has_the_name_that_make_resnet_takes():
    names = {"resnet50": (50, 64, "imagenet"), "resnet50w2": (50, 128, "cifar"), "resnet18w4": (18, 256, "cifar")}
    for name, architecture in names.items():
        assert Architecture(*architecture).name == name
        resnet = make_resnet(name, stem=architecture[2])
        assert (resnet.depth, resnet.base_channels, resnet.stem) == architecture


def unknown_architectures():
    basic, bottleneck = torch_shapes("resnet18"), torch_shapes("resnet50")
    yield {n: s for n, s in basic.items() if not n.startswith("layer4.1.")}, r"\[2, 2, 2, 1\] basic blocks"
    yield {n: s for n, s in basic.items() if not n.startswith("layer3.")}, r"\[2, 2, 0, 2\] basic blocks"
    yield (
        {n: s for n, s in bottleneck.items() if n[6:9] in ("", ".0.", ".1.") or n[0] != "l"},
        r"\[2, 2, 2, 2\] bottleneck",
    )
    yield {n: s for n, s in bottleneck.items() if n.startswith(("conv1", "bn1"))}, r"\[0, 0, 0, 0\] basic blocks"
    yield basic | {"conv1.weight": (4, 3, 5, 5)}, r"a stem of \(4, 3, 5, 5\)"
    yield basic | {"conv1.weight": (4,)}, r"a stem of \(4,\)"


@pytest.mark.parametrize("number", range(6))
def test_unknown_architectures_are_refused(number):
    shapes, message = list(unknown_architectures())[number]
    with pytest.raises(WeightsError, match=message):
        architecture_of(empty(shapes))


def test_wide_resnets_of_another_kind_do_not_load():
    """torchvision's wide_resnet50_2 has wide 3x3 convolutions and ordinary blocks around them."""
    arrays = torch_arrays("resnet50")
    arrays["layer1.0.conv1.weight"] = np.zeros((8, 4, 1, 1), np.float32)
    _, load = loader(*NETWORKS["resnet50"])
    with pytest.raises(WeightsError, match=r"layer1.0.conv1.weight has shape \(8, 4, 1, 1\), not \(4, 4, 1, 1\)"):
        load(arrays)


# ---- Other libraries' names --------------------------------------------------------------------------------------------


def units(depth):
    """(convolution, BatchNorm) by torchvision's, Hugging Face's and detectron2's names, from the layout of each model."""
    blocks, layers = ((3, 4, 6, 3) if depth > 18 else (2, 2, 2, 2)), (3 if depth >= 50 else 2)
    stem = "embedder.embedder"
    yield ("conv1", "bn1"), (f"{stem}.convolution", f"{stem}.normalization"), ("stem.conv1", "stem.conv1.norm")
    for stage, count in enumerate(blocks):
        for block in range(count):
            ours, detectron = f"layer{stage + 1}.{block}", f"res{stage + 2}.{block}"
            face = f"encoder.stages.{stage}.layers.{block}"
            if block == 0 and (stage > 0 or layers == 3):  # the shape changes
                yield (
                    (f"{ours}.downsample.0", f"{ours}.downsample.1"),
                    (f"{face}.shortcut.convolution", f"{face}.shortcut.normalization"),
                    (f"{detectron}.shortcut", f"{detectron}.shortcut.norm"),
                )
            for i in range(layers):
                yield (
                    (f"{ours}.conv{i + 1}", f"{ours}.bn{i + 1}"),
                    (f"{face}.layer.{i}.convolution", f"{face}.layer.{i}.normalization"),
                    (f"{detectron}.conv{i + 1}", f"{detectron}.conv{i + 1}.norm"),
                )


def renamed(arrays, depth, library, counters):
    """The arrays under a library's names: 1 for Hugging Face, 2 for detectron2."""
    result = {}
    for unit in units(depth):
        (conv, norm), (their_conv, their_norm) = unit[0], unit[library]
        result[f"{their_conv}.weight"] = arrays[f"{conv}.weight"]
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            result[f"{their_norm}.{leaf}"] = arrays[f"{norm}.{leaf}"]
        if counters:
            result[f"{their_norm}.num_batches_tracked"] = np.zeros((), np.int64)
    return result


@pytest.fixture
def saved(tmp_path):
    """Writes a golden network's weights, or other arrays, to a file; returns its path."""

    def write(name, arrays=None):
        path = tmp_path / f"{name}.safetensors"
        save_file(torch_arrays(name) if arrays is None else arrays, path)
        return path

    return write


def exported(checkpoint, form, output):
    """Exit code of the command line."""
    return export.main([f"--checkpoint={checkpoint}", f"--format={form}", f"--output={output}"])


@pytest.mark.parametrize(
    "name, sizes, kind", [("resnet18", (4, 8, 16, 32), "basic"), ("resnet50", (16, 32, 64, 128), "bottleneck")]
)
def test_huggingface_folder(saved, tmp_path, capsys, name, sizes, kind):
    folder = tmp_path / "deep" / "huggingface"
    assert exported(saved(name), "huggingface", folder) == 0
    assert capsys.readouterr() == (f"{folder}\n", "")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    depth = NETWORKS[name][0]
    arrays = load_file(folder / "model.safetensors")
    assert_same_arrays(arrays, renamed(torch_arrays(name), depth, 1, counters=True))
    assert {
        "embedder.embedder.convolution.weight",
        "embedder.embedder.normalization.running_mean",
        "encoder.stages.1.layers.0.shortcut.convolution.weight",
        "encoder.stages.3.layers.1.layer.0.normalization.running_var",
    } <= set(arrays)
    assert ("encoder.stages.0.layers.0.shortcut.convolution.weight" in arrays) == (kind == "bottleneck")
    config = json.loads((folder / "config.json").read_text())
    expected = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 4,
        "hidden_sizes": list(sizes),
        "depths": [3, 4, 6, 3] if depth == 50 else [2, 2, 2, 2],
        "layer_type": kind,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    assert config == expected | {"torch_dtype": "float32"}
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert processor["rescale_factor"] == 1 / 255 and processor["do_normalize"] is True


def test_huggingface_config_of_the_standard_networks():
    config = huggingface_config(Architecture(50, 64, "imagenet"))  # as microsoft/resnet-50
    assert (config["embedding_size"], config["hidden_sizes"]) == (64, [256, 512, 1024, 2048])
    config = huggingface_config(Architecture(34, 64, "imagenet"))
    assert (config["hidden_sizes"], config["depths"]) == ([64, 128, 256, 512], [3, 4, 6, 3])
    assert huggingface_config(Architecture(101, 128, "imagenet"))["depths"] == [3, 4, 23, 3]


@pytest.mark.parametrize("name", ["resnet34", "resnet50w2"])
def test_detectron2_pickle(saved, tmp_path, name):
    output = tmp_path / "backbone.pkl"
    assert exported(saved(name), "detectron2", output) == 0
    content = pickle.loads(output.read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True and content["__author__"] != "Caffe2"  # which has names of its own
    assert_same_arrays(content["model"], renamed(torch_arrays(name), NETWORKS[name][0], 2, counters=False))
    names = {
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res3.0.shortcut.norm.bias",
        "res2.0.conv1.norm.weight",
    }
    assert names <= set(content["model"])
    assert ("res2.0.shortcut.weight" in content["model"]) == (name == "resnet50w2")


def test_torchvision_file_says_what_it_is(saved, tmp_path):
    output = tmp_path / "out.safetensors"
    assert exported(saved("resnet50w2", draw_all(widened(torch_shapes("resnet18"), 16))), "torchvision", output) == 0
    with safe_open(output, "numpy") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == "resnet18"
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(IMAGENET_MEAN), list(IMAGENET_STD))


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_file_keeps_every_weight(saved, tmp_path, name):
    assert exported(saved(name), "torchvision", tmp_path / "out.safetensors") == 0
    counters = {n: np.zeros((), np.int64) for n in torch_shapes(name) if n.endswith("num_batches_tracked")}
    assert_same_arrays(load_file(tmp_path / "out.safetensors"), torch_arrays(name) | counters)


def test_timm_folder(saved, tmp_path):
    arrays = draw_all(widened(torch_shapes("resnet18"), 16))
    assert exported(saved("full", arrays), "timm", tmp_path / "timm") == 0
    written = load_file(tmp_path / "timm" / "model.safetensors")
    assert set(written) == set(arrays)
    np.testing.assert_array_equal(written["layer4.1.conv2.weight"], arrays["layer4.1.conv2.weight"])
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == ("resnet18", 0)
    pretrained = config["pretrained_cfg"]
    assert (pretrained["mean"], pretrained["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert (pretrained["num_classes"], pretrained["input_size"]) == (0, [3, 224, 224])


# ---- load_backbone -----------------------------------------------------------------------------------------------------


def make_run(workdir, metadata=None, **overrides):
    """The folder of a run with drawn weights, a head and an adversarial set; returns its state and config."""
    config = small_config("moco", **overrides)
    pixels = config.data.pixel_mean, config.data.pixel_std
    resnet = make_resnet(config.model.backbone, config.model.base_channels, stem=config.model.stem, auxiliary_norm=True)
    tree = drawn(shapes_of(Network(resnet, ProjectionHead(16, 8, True, auxiliary_norm=True), *pixels)))
    state = {
        "params": {"network": tree.pop("params")},
        "batch_stats": tree,
        "method": {"queue": np.ones((4, 8), np.float32)},
    }
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json())
    checkpoints = Checkpoints(workdir / "checkpoints")
    for step in (3, 7):
        checkpoints.save(step, state | {"step": np.int32(step)}, metadata)
    checkpoints.close()
    return state, config


def test_backbone_of_a_run_has_its_clean_weights(tmp_path):
    state, config = make_run(tmp_path / "run")
    backbone = load_backbone(str(tmp_path / "run"))
    assert backbone.step == 7 and json.loads(backbone.config.to_json()) == json.loads(config.to_json())
    assert backbone.feature_dim == 32
    expected = {
        "params": {"backbone": clean(state["params"]["network"]["backbone"])},
        "clean_batch_stats": {"backbone": state["batch_stats"]["clean_batch_stats"]["backbone"]},
    }
    assert_same_trees(jax.device_get(backbone.variables), expected)


@pytest.mark.parametrize(
    ("wanted", "metadata", "finished", "warned"),
    [
        ("reestimated", {}, False, True),
        ("reestimated", {"reestimated": 3}, True, True),  # an evaluation on the way
        ("reestimated", {"reestimated": 7}, False, False),
        ("reestimated", {}, True, False),  # by an older version
        ("running", {}, False, False),
    ],
)
def test_running_statistics_in_place_of_reestimated_ones_are_told(tmp_path, caplog, wanted, metadata, finished, warned):
    make_run(tmp_path / "run", metadata, eval_statistics=wanted)
    if finished:
        (tmp_path / "run" / "result.json").write_text("{}")
    load_backbone(str(tmp_path / "run"))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == warned
    assert all("unfinished at step 7" in line and "config.eval_statistics" in line for line in messages)


@pytest.mark.parametrize(
    "mean, std", [(IMAGENET_MEAN, IMAGENET_STD), ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))]
)
def test_an_exported_backbone_gives_the_features_of_its_run(tmp_path, mean, std):
    make_run(tmp_path / "run", **{"data.pixel_mean": mean, "data.pixel_std": std})
    assert exported(tmp_path / "run", "torchvision", tmp_path / "out.safetensors") == 0
    before, after = load_backbone(str(tmp_path / "run")), load_backbone(str(tmp_path / "out.safetensors"))
    assert (after.step, after.config) == (-1, None)
    assert_same_trees(after.variables, before.variables)
    got, expected = (features_of(backbone, pixels(16)) for backbone in (after, before))
    assert expected.shape == (2, 32) and expected.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def pixels(side):
    """uint8 [2, side, side, 3]."""
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8))


def features_of(backbone, x):
    """A backbone's features of images."""
    return jax.jit(backbone.features)(backbone.variables, x)


def test_bytes_are_pixels_over_255():
    backbone = load_backbone("random", seed=3, backbone="resnet10", stem="cifar", base_channels=2)
    x = pixels(12)
    features = features_of(backbone, x)
    np.testing.assert_allclose(features, features_of(backbone, jnp.float32(x) / 255), rtol=1e-5, atol=1e-6)
    normal = np.float32((np.asarray(x) / 255 - IMAGENET_MEAN) / IMAGENET_STD)
    network = make_network(10, 2, "cifar")
    np.testing.assert_allclose(features, run(network, backbone.variables, normal)[0], rtol=1e-4, atol=1e-5)


def test_random_backbones_depend_on_their_seed():
    settings = {"backbone": "resnet10", "stem": "cifar", "base_channels": 2}
    first, again, other = (load_backbone("random", seed=seed, **settings) for seed in (0, 0, 1))
    assert_same_trees(first.variables, again.variables)
    kernels = [backbone.variables["params"]["backbone"]["conv1"]["kernel"] for backbone in (first, other)]
    assert np.abs(kernels[0] - kernels[1]).min() > 0 and (first.step, first.config) == (0, None)
    like = load_backbone("random", seed=1, like=first)
    assert_same_trees(like.variables, other.variables)


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda folder: None, "neither a file nor the workdir of a run"),
        (lambda folder: (folder / "config.json").write_text(small_config().to_json()), "has no checkpoint yet"),
        (lambda folder: (folder / "config.json").write_text('{"task": "knn"}'), "is no pre-training run"),
    ],
)
def test_folders_that_are_no_run(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(str(tmp_path))


def test_a_run_of_another_network_is_refused(tmp_path):
    make_run(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"]["base_channels"] = 6
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="another architecture"):
        load_backbone(str(tmp_path / "run"))


# ---- Mistakes on the command line --------------------------------------------------------------------------------------


def refused(capsys, checkpoint, form, output):
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert exported(checkpoint, form, output) == 2
    printed, line = capsys.readouterr()
    assert not printed and line.startswith("hexa_jax.export: ") and line.endswith("\n") and line.count("\n") == 1
    return line


def test_formats_refuse_networks_that_they_cannot_hold(saved, tmp_path, capsys):
    cifar, narrow = saved("resnet18_cifar"), saved("resnet18")
    assert "7x7 stem" in refused(capsys, cifar, "huggingface", tmp_path / "out")
    assert "7x7 stem" in refused(capsys, cifar, "timm", tmp_path / "out")
    assert "standard width" in refused(capsys, narrow, "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_stem_comes_back_as_small(tmp_path, capsys):
    """Its arrays look like a cifar stem's: the file says which it is."""
    before = load_backbone("random", backbone="resnet10", stem="small", base_channels=2)
    export.export(before, "torchvision", tmp_path / "out.safetensors")
    after = load_backbone(str(tmp_path / "out.safetensors"))
    assert after.network.backbone.stem == "small"
    assert exported(tmp_path / "out.safetensors", "detectron2", tmp_path / "out.pkl") == 2
    assert "stem=small cannot be written" in capsys.readouterr().err


def test_detectron2_refuses_a_small_stem(saved, tmp_path, capsys):
    """Its stem is a 7x7 convolution and a pool."""
    assert "7x7 stem" in refused(capsys, saved("resnet18_cifar"), "detectron2", tmp_path / "out.pkl")


def test_timm_refuses_the_depth_that_it_lacks(saved, tmp_path, capsys):
    """timm has no resnet10."""
    shapes = widened(torch_shapes("resnet18"), 16)
    short = draw_all({name: shape for name, shape in shapes.items() if name[:5] != "layer" or name[6:9] == ".0."})
    assert architecture_of(short) == Architecture(10, 64, "imagenet")
    refused(capsys, saved("short", short), "timm", tmp_path / "out")


@pytest.mark.parametrize(
    "form, output, message",
    [
        ("torchvision", "out.bin", "out.bin must end in .safetensors or .pth"),
        ("torchvision", "out", "must end in .safetensors or .pth"),
        ("detectron2", "out.pth", "out.pth must end in .pkl"),
        ("detectron2", "folder.pkl", "folder.pkl: Is a directory"),
        ("huggingface", "file", "file: File exists"),
        ("huggingface", "file/out", "file: File exists"),
        ("torchvision", "folder.safetensors", "folder.safetensors"),
    ],
)
def test_outputs_that_cannot_be(saved, tmp_path, capsys, form, output, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "folder.safetensors").mkdir()
    assert message in refused(capsys, saved("resnet18"), form, tmp_path / output)


def damaged(folder, name):
    """A weights file with something wrong."""
    how, suffix = name.split(".")
    path = folder / name
    arrays = torch_arrays("resnet18")
    if suffix == "safetensors":
        save_file(arrays, path)
    else:
        np.savez(path, **arrays)
    content = path.read_bytes()
    damage = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}
    damage["flipped"] = content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]
    path.write_bytes(damage[how])
    return path


DAMAGE = [f"{how}.{suffix}" for how in ("truncated", "empty", "text") for suffix in ("safetensors", "npz")]


@pytest.mark.parametrize("name", [*DAMAGE, "flipped.npz"])  # .safetensors has no checksum
def test_damaged_files(tmp_path, capsys, name):
    path = damaged(tmp_path, name)
    assert f"{path} cannot be read: " in refused(capsys, path, "torchvision", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_array_in_the_place_of_many(tmp_path, capsys):
    with open(tmp_path / "one.npz", "wb") as file:
        np.save(file, np.zeros(3))
    assert "one.npz" in refused(capsys, tmp_path / "one.npz", "torchvision", tmp_path / "out.safetensors")


def test_torch_files_need_torch(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, even where it is
    (tmp_path / "truncated.pth").write_bytes(b"PK\3\4 and no more")
    line = refused(capsys, tmp_path / "truncated.pth", "torchvision", tmp_path / "out.safetensors")
    assert "truncated.pth needs torch: pip install" in line
    assert "writing .pth needs torch" in refused(capsys, saved("resnet18"), "torchvision", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_torch_file_that_cannot_be_written(saved, tmp_path, capsys):
    pytest.importorskip("torch", reason=TORCH)
    (tmp_path / "folder.pth").mkdir()
    assert "folder.pth" in refused(capsys, saved("resnet18"), "torchvision", tmp_path / "folder.pth")


@pytest.mark.parametrize("how", ["truncated", "empty", "code"])
def test_damaged_torch_files(tmp_path, capsys, how):
    torch = pytest.importorskip("torch", reason=TORCH)
    path = tmp_path / f"{how}.pth"
    tensors = {name: torch.from_numpy(value) for name, value in torch_arrays("resnet18").items()}
    torch.save({"state_dict": tensors} | ({"args": argparse.Namespace(lr=0.1)} if how == "code" else {}), path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "code": content}[how])
    line = refused(capsys, path, "torchvision", tmp_path / "out.safetensors")
    assert f"{path} cannot be read as weights alone" in line and "\x1b" not in line


def test_other_mistakes(saved, tmp_path, capsys):
    assert "neither a file nor the workdir" in refused(capsys, tmp_path / "none.pth", "timm", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("hello")
    line = refused(capsys, tmp_path / "notes.txt", "timm", tmp_path / "out")
    assert "notes.txt is no weights file: use .safetensors" in line
    assert "invalid choice: 'caffe'" in refused(capsys, saved("resnet18"), "caffe", tmp_path / "out")
    assert export.main(["--format=timm"]) == 2
    assert "required: --checkpoint, --output" in capsys.readouterr().err
    wrong = without(torch_arrays("resnet18"), "bn1.bias")
    line = refused(capsys, saved("wrong", wrong), "timm", tmp_path / "out")
    assert "wrong.safetensors: the weights are of another architecture: bn1.bias is missing\n" in line
    assert not (tmp_path / "out").exists()


def test_help(capsys):
    assert export.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "python -m hexa_jax.export --checkpoint" in printed and all(form in printed for form in export.FORMATS)
