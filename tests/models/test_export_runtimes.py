"""Exported backbones in the libraries that they are for: the same features as here, to 1e-4 of the largest."""

import functools
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import environment
from make_torch_goldens import draw_all
from torch_libraries import features_of, library

from hexa_jax import export
from hexa_jax.evals.backbone import Backbone, load_backbone
from hexa_jax.models import resnet
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import EVALUATION
from hexa_jax.models.resnet import make_resnet
from hexa_jax.models.weights import from_torchvision, to_torchvision

TOLERANCE = 1e-4
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CROP = 224  # of weights from a file


@functools.cache
def backbone(name, stem, base_channels):
    """A backbone whose every tensor is drawn by its name: no statistic or scale is 0 or 1."""
    network = Network(make_resnet(name, base_channels, stem=stem), None, MEAN, STD, normalize=False)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), (jnp.zeros((1, 1, 32, 32, 3)),), EVALUATION))
    like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    arrays = draw_all({key: value.shape for key, value in to_torchvision(like).items()})
    return Backbone(network, jax.tree.map(jnp.asarray, from_torchvision(arrays, like)), -1, None)


def images_of(number, height=32, width=32):
    return np.random.default_rng(number).integers(0, 256, (number, height, width, 3)).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _features(network, variables, images):
    return Backbone(network, variables, -1, None).features(variables, images)


def our_features(which, images):
    return np.asarray(_features(which.network, which.variables, images))


def assert_close(got, expected):
    assert got.shape == expected.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def normalized(images):
    """What the libraries of PyTorch are given."""
    return ((images / 255.0 - MEAN) / STD).astype(np.float32)


# ---- PyTorch's libraries ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standard():
    """A network that all of them know, images, and our features."""
    which, images = backbone("resnet18", "imagenet", 64), images_of(2)
    return which, images, our_features(which, images)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvision_computes_the_same(standard, tmp_path, suffix):
    which, images, expected = standard
    models = library("torchvision").models
    import torch
    from safetensors.torch import load_file

    path = tmp_path / f"weights.{suffix}"
    export.export(which, "torchvision", path)
    network = models.resnet18()
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True) if suffix == "pth" else load_file(path))
    assert_close(features_of(network.eval(), normalized(images)), expected)


def test_timm_computes_the_same(standard, tmp_path):
    which, images, expected = standard
    timm = library("timm")
    export.export(which, "timm", tmp_path / "timm")
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    assert tuple(network.pretrained_cfg["mean"]) == MEAN
    assert_close(features_of(network, normalized(images)), expected)


def test_transformers_computes_the_same(standard, tmp_path):
    which, images, expected = standard
    library("torchvision")  # transformers would try to import it
    transformers = library("transformers")
    export.export(which, "huggingface", tmp_path / "huggingface")
    network = transformers.AutoModel.from_pretrained(tmp_path / "huggingface").eval()
    assert_close(features_of(lambda x: network(x).pooler_output.flatten(1), normalized(images)), expected)


# ---- ONNX ------------------------------------------------------------------------------------------------------------

NETWORKS = [
    ("resnet10", "imagenet", 8),
    ("resnet10", "cifar", 4),
    ("resnet10", "small", 4),
    ("resnet50", "imagenet", 4),
]


def in_onnxruntime(path):
    """A function of images that runs a file, and the session."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra `onnx` has it")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["features"], {"images": images})[0], session


@pytest.mark.parametrize("network", NETWORKS)
def test_onnxruntime_computes_the_same(network, tmp_path, monkeypatch):
    """Any number of images of any size, odd ones too."""
    monkeypatch.setitem(resnet.STAGES, 51, (1, 1, 1, 1))  # the least network of bottlenecks
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` has it")
    which, path = backbone(*network), tmp_path / "backbone.onnx"
    export.export(which, "onnx", path)
    onnx.checker.check_model(path, full_check=True)
    run, session = in_onnxruntime(path)
    images = images_of(2, 33, 46)
    expected = our_features(which, images)
    for number in (1, 2):
        assert_close(run(images[:number]), expected[:number])
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["stem"] == f'"{network[1]}"' and properties["mean"] == "[0.5, 0.4, 0.3]"
    assert properties["crop"] == str(CROP)


def test_onnx_takes_floats(tmp_path):
    which, images = backbone("resnet10", "cifar", 4), images_of(2, 33, 46)
    export.export(which, "onnx", tmp_path / "backbone.onnx", "float32")
    run, _ = in_onnxruntime(tmp_path / "backbone.onnx")
    assert_close(run(images.astype(np.float32) / 255), our_features(which, images))


# ---- StableHLO -------------------------------------------------------------------------------------------------------

LOADER = """
from jax import export
network = export.deserialize(open("backbone.stablehlo", "rb").read())
features = network.call(images)
"""


@pytest.fixture(scope="module")
def stablehlo(tmp_path_factory):
    """A run's backbone, and the file made of it by the command line."""
    folder = tmp_path_factory.mktemp("stablehlo")
    which = backbone("resnet10", "imagenet", 8)
    export.export(which, "torchvision", folder / "weights.safetensors")
    words = [f"--checkpoint={folder}/weights.safetensors", f"--output={folder}/backbone.stablehlo"]
    assert export.main([*words, "--format=stablehlo"]) == 0
    return which, folder


def test_jax_alone_computes_the_same(stablehlo):
    """The loader of the documentation, without this package; two numbers of images by one file."""
    which, folder = stablehlo
    text = f"""
import numpy, sys
for number in (1, 3):
    images = numpy.load(f"images{{number}}.npy")
{"".join(f"    {line}{chr(10)}" for line in LOADER.strip().splitlines())}
    numpy.save(f"features{{number}}.npy", features)
assert "hexa_jax" not in sys.modules and "flax" not in sys.modules
"""
    images = images_of(3, CROP, CROP)
    expected = our_features(which, images)
    for number in (1, 3):
        np.save(folder / f"images{number}.npy", images[:number])
    subprocess.run([sys.executable, "-c", text], cwd=folder, env=environment(), check=True)
    for number in (1, 3):
        assert_close(np.load(folder / f"features{number}.npy"), expected[:number])


def test_one_stablehlo_file_is_for_all_platforms(stablehlo):
    exported = jax.export.deserialize((stablehlo[1] / "backbone.stablehlo").read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    (images,) = exported.in_avals
    assert str(images) == f"uint8[batch,{CROP},{CROP},3]"
    (features,) = exported.out_avals
    assert str(features) == "float32[batch,64]"
    # Every convolution is exact, on accelerators too.
    convolutions = [line for line in exported.mlir_module().splitlines() if "stablehlo.convolution" in line]
    assert convolutions and all(line.count("HIGHEST") == 2 for line in convolutions)


def test_stablehlo_takes_floats(tmp_path):
    which = backbone("resnet10", "cifar", 4)
    export.export(which, "stablehlo", tmp_path / "backbone.stablehlo", "float32")
    exported = jax.export.deserialize((tmp_path / "backbone.stablehlo").read_bytes())
    assert str(exported.in_avals[0]) == f"float32[batch,{CROP},{CROP},3]"


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["onnx", "stablehlo"])
def test_files_have_their_suffix(form, stablehlo, tmp_path, capsys):
    words = [f"--checkpoint={stablehlo[1]}/weights.safetensors", f"--format={form}", f"--output={tmp_path}/out"]
    assert export.main(words) == 2
    assert capsys.readouterr().err == f"hexa_jax.export: --output={tmp_path}/out must end in .{form}\n"
    assert not list(tmp_path.iterdir())


def test_onnx_says_what_to_install(stablehlo, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it fails, even where it is
    words = [f"--checkpoint={stablehlo[1]}/weights.safetensors", "--format=onnx", f"--output={tmp_path}/out.onnx"]
    assert export.main(words) == 2
    assert capsys.readouterr().err == "hexa_jax.export: --format=onnx needs onnx: pip install onnx onnxruntime\n"


def test_a_weights_file_is_exported_as_onnx(stablehlo, tmp_path):
    """By the command line, from a file: its own pixel statistics go along."""
    pytest.importorskip("onnx", reason="the extra `onnx` has it")
    weights, path = stablehlo[1] / "weights.safetensors", tmp_path / "backbone.onnx"
    assert export.main([f"--checkpoint={weights}", "--format=onnx", f"--output={path}", "--input=float32"]) == 0
    run, _ = in_onnxruntime(path)
    images = images_of(2, 33, 46)
    assert_close(run(images.astype(np.float32) / 255), our_features(load_backbone(str(weights)), images))
