"""Backbone weights under the names of other libraries, and published checkpoints.

Everything here is NumPy: trees of `Backbone.variables` on one side, dicts of named arrays on the
other. The clean BatchNorm set is the one that travels. Legend of shapes: torch kernels are [O, I,
H, W], ours [H, W, I, O].
"""

import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hexa_jax.models.norm import CLEAN, stats_collection
from hexa_jax.models.resnet import STAGES

Arrays = dict[str, np.ndarray]
BATCH_NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# What others put in front of a backbone's names; the published MoCo and SwAV checkpoints first.
PREFIXES = (
    "module.encoder_q.", "module.encoder.", "module.base_encoder.", "module.backbone.", "module.", "encoder_q.", "base_encoder.",
    "online_encoder.net.", "_feature_blocks.", "trunk._feature_blocks.", "backbone.", "encoder.", "resnet.", "model.", "net.",
)  # fmt: skip
IGNORED = re.compile(
    r"^(fc|classifier|head|projection_head|prototypes|projection|predictor)\b|num_batches_tracked"
)


class WeightsError(ValueError):
    """Weights that do not fit; the message is one line."""


class Architecture(NamedTuple):
    """What names and shapes tell of a ResNet."""

    depth: int
    base_channels: int
    stem: str

    @property
    def name(self) -> str:
        """As `make_resnet` takes it, where the width is a multiple of 64."""
        width = self.base_channels // 64
        return f"resnet{self.depth}" + (f"w{width}" if width > 1 else "")


def to_torchvision(variables: Mapping[str, Any]) -> Arrays:
    """Named arrays as in torchvision's and timm's ResNet, without a classifier.

    Args:
        variables: {"params": ..., "clean_batch_stats": ...} of the backbone module or with
            "backbone" on top.
    """
    arrays: Arrays = {}
    for path, leaf in _leaves(variables):
        arrays[_torchvision_name(path)] = _to_torch(np.asarray(leaf))
    for name in [name for name in arrays if name.endswith(".running_var")]:
        arrays[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return arrays


def from_torchvision(arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Our variables from named arrays.

    Args:
        arrays: torchvision's names, behind any of PREFIXES; classifiers and projection heads are
            left out.
        like: variables of the wanted backbone: structure and shapes.

    Raises:
        WeightsError: names are missing or left over, or a shape differs; the message lists the
            first of them.
    """
    found, problems = _matched(arrays, like)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WeightsError(
            f"the weights are of another architecture: {'; '.join(problems[:3])}{more}"
        )
    return _tree(found)


def first_difference(arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> str:
    """Return what keeps the arrays from filling a backbone; "" if nothing does.

    Arguments as in `from_torchvision`.
    """
    _, problems = _matched(arrays, like)
    if not problems:
        return ""
    name, what = problems[0].split(" ", 1)
    layer = name.rpartition(".")[0]
    others = (
        strip_prefix(arrays)
        if what == "is missing"
        else [_torchvision_name(path) for path, _ in _leaves(like)]
    )
    whole = what in ("is missing", "is left over") and not any(
        other.startswith(f"{layer}.") for other in others
    )
    return f"{layer if whole else name} {what}"


def _matched(
    arrays: Mapping[str, np.ndarray], like: Mapping[str, Any]
) -> tuple[dict[tuple[str, ...], np.ndarray], list[str]]:
    """Values by our paths, and what does not fit."""
    stripped = strip_prefix(arrays)
    wanted = {_torchvision_name(path): (path, leaf) for path, leaf in _leaves(like)}
    left = [name for name in stripped if name not in wanted and not IGNORED.search(name)]
    missing = [name for name in wanted if name not in stripped]
    problems = [f"{name} is missing" for name in missing] + [
        f"{name} is left over" for name in left
    ]
    found: dict[tuple[str, ...], np.ndarray] = {}
    for name, (path, leaf) in wanted.items():
        if name in stripped:
            value = _from_torch(stripped[name])
            if value.shape != leaf.shape:
                problems.append(
                    f"{name} has shape {stripped[name].shape}, not {_to_torch_shape(leaf.shape)}"
                )
            found[path] = value.astype(np.float32)
    return found, problems


def strip_prefix(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Strip the prefix before `conv1.weight`; translate Hugging Face's names."""
    if any(name.endswith("embedder.embedder.convolution.weight") for name in arrays):
        arrays = from_huggingface(arrays)
    for prefix in ("", *PREFIXES):
        if f"{prefix}conv1.weight" in arrays:
            return {
                name.removeprefix(prefix): value
                for name, value in arrays.items()
                if name.startswith(prefix)
            }
    shown = ", ".join(sorted(arrays)[:3])
    raise WeightsError(f"no ResNet's conv1.weight among {len(arrays)} arrays ({shown}, ...)")


def architecture_of(arrays: Mapping[str, np.ndarray]) -> Architecture:
    """Depth, width and stem from names and shapes.

    The stems cifar and small differ in their stride alone, which no array tells: both are given as
    cifar.

    Raises:
        WeightsError: no ResNet that we know.
    """
    stripped = strip_prefix(arrays)
    blocks = [
        len({n.split(".")[1] for n in stripped if n.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    ]
    bottleneck = "layer1.0.conv3.weight" in stripped
    for depth, layers in STAGES.items():
        if list(layers) == blocks and (depth >= 50) == bottleneck:
            shape = stripped["conv1.weight"].shape
            if shape[2:] in ((3, 3), (7, 7)):
                return Architecture(depth, shape[0], "imagenet" if shape[2] == 7 else "cifar")
    kind = "bottleneck" if bottleneck else "basic"
    raise WeightsError(
        f"no known ResNet has {blocks} {kind} blocks and a stem of {stripped['conv1.weight'].shape}"
    )


def to_huggingface(arrays: Arrays) -> Arrays:
    """Names of `transformers.ResNetModel` from torchvision's."""
    return {_huggingface_name(name): value for name, value in arrays.items()}


def huggingface_config(architecture: Architecture) -> dict[str, Any]:
    """`config.json` of a Hugging Face ResNet.

    Raises:
        WeightsError: the stem is not the 7x7 one that this model has.
    """
    if architecture.stem != "imagenet":
        raise WeightsError(
            f"Hugging Face's ResNet has a 7x7 stem: a network with stem={architecture.stem} cannot "
            "be written for it"
        )
    bottleneck = architecture.depth >= 50
    widths = [
        architecture.base_channels * 2**stage * (4 if bottleneck else 1) for stage in range(4)
    ]
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": architecture.base_channels,
        "hidden_sizes": widths,
        "depths": list(STAGES[architecture.depth]),
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "torch_dtype": "float32",
    }


def to_detectron2(arrays: Arrays) -> Arrays:
    """Names of detectron2's ResNet from torchvision's, without counters."""
    return {
        _detectron2_name(name): value
        for name, value in arrays.items()
        if "num_batches_tracked" not in name
    }


def _huggingface_name(name: str) -> str:
    kinds = {"conv": "convolution", "bn": "normalization"}
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"embedder.embedder.{kinds[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", name):
        stage, block, kind, layer, rest = match.groups()
        return f"encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(layer) - 1}.{kinds[kind]}.{rest}"
    match = re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.(\d)\.(\w+)", name)
    assert match, name
    stage, block, layer, rest = match.groups()
    kind = "convolution" if layer == "0" else "normalization"
    return f"encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{kind}.{rest}"


def from_huggingface(arrays: Mapping[str, np.ndarray]) -> Arrays:
    """Return torchvision's names for those of `transformers`' ResNets; keep others."""
    return {_torchvision_from_huggingface(name): value for name, value in arrays.items()}


def _torchvision_from_huggingface(name: str) -> str:
    kinds = {"convolution": "conv", "normalization": "bn"}
    if match := re.fullmatch(
        r"(?:.*\.)?embedder\.embedder\.(convolution|normalization)\.(\w+)", name
    ):
        return f"{kinds[match[1]]}1.{match[2]}"
    place = r"(?:.*\.)?encoder\.stages\.(\d)\.layers\.(\d+)\."
    if match := re.fullmatch(rf"{place}layer\.(\d)\.(convolution|normalization)\.(\w+)", name):
        stage, block, layer, kind, rest = match.groups()
        return f"layer{int(stage) + 1}.{block}.{kinds[kind]}{int(layer) + 1}.{rest}"
    if match := re.fullmatch(rf"{place}shortcut\.(convolution|normalization)\.(\w+)", name):
        stage, block, kind, rest = match.groups()
        return f"layer{int(stage) + 1}.{block}.downsample.{'01'[kind == 'normalization']}.{rest}"
    return name


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256, in hexadecimal, of a backbone's arrays and their names.

    The same weights have the same one in whatever file they lie: BatchNorm's counters, heads and
    prefixes do not count.
    """
    digest = hashlib.sha256()
    for name, value in sorted(strip_prefix(arrays).items()):
        if not IGNORED.search(name):
            digest.update(f"{name} {list(value.shape)}\n".encode())
            digest.update(np.ascontiguousarray(value, "<f4").tobytes())
    return digest.hexdigest()


def _detectron2_name(name: str) -> str:
    name = re.sub(r"layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"bn(\d)\.", r"conv\1.norm.", name)
    return f"stem.{name}" if name.startswith("conv") else name


def _leaves(variables: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], Any]]:
    """(path, leaf) of the clean branch; paths are (collection, module, ..., leaf)."""

    def walk(node: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
        if isinstance(node, Mapping):
            for name in node:
                yield from walk(node[name], (*path, name))
        elif not path[-1].startswith("adversarial"):
            yield path, node

    for collection in ("params", stats_collection(CLEAN)):
        tree = variables[collection]
        yield from walk(tree.get("backbone", tree), (collection,))


def _torchvision_name(path: tuple[str, ...]) -> str:
    *modules, leaf = path[1:]
    name = (
        ".".join(modules)
        .replace("downsample_conv", "downsample.0")
        .replace("downsample_bn", "downsample.1")
    )
    name = re.sub(r"layer(\d)_(\d+)", r"layer\1.\2", name)
    return f"{name}.{'weight' if leaf == 'kernel' else BATCH_NORM[leaf]}"


def _to_torch(value: np.ndarray) -> np.ndarray:
    value = np.asarray(value, np.float32)
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1)) if value.ndim == 4 else value


def _from_torch(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def _to_torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape


def _tree(leaves: Mapping[tuple[str, ...], np.ndarray]) -> dict[str, Any]:
    """Nested dicts with "backbone" below each collection."""
    tree: dict[str, Any] = {}
    for (collection, *modules, leaf), value in leaves.items():
        node = tree.setdefault(collection, {}).setdefault("backbone", {})
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = value
    return tree


def read_weights(path: str, load_torch: Callable[[str], Mapping[str, Any]] | None = None) -> Arrays:
    """Read named arrays from a file of any known kind, without running code of it.

    Raises:
        WeightsError: unknown kind of file, damaged, or torch is missing.
    """
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} cannot be read: {_one_line(error)}") from None
    if path.endswith(".npz"):
        try:
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise WeightsError(f"{path} cannot be read: {_one_line(error)}") from None
    if not path.endswith((".pth", ".pt", ".tar", ".bin")):
        raise WeightsError(
            f"{path} is no weights file: use .safetensors, .npz, .pth, .pt, .tar or .bin"
        )
    return flat_arrays((load_torch or _load_torch)(path), path)


def _load_torch(path: str) -> Mapping[str, Any]:
    try:
        import torch
    except ImportError:
        raise WeightsError(
            f"reading {path} needs torch: pip install torch, or convert it to .safetensors"
        ) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text advises to run whatever the file holds.
        reason = (
            _one_line(error).partition("Weights only load failed")[0]
            or "damaged, or it holds more than tensors"
        )
        raise WeightsError(
            f"{path} cannot be read as weights alone (weights_only): {reason}"
        ) from None


def flat_arrays(loaded: Any, path: str) -> Arrays:
    """The state dict inside a checkpoint, as NumPy; `path` is for messages."""
    for key in ("state_dict", "model", "teacher", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds no dict of arrays")
    arrays = {name: _numpy(value) for name, value in loaded.items() if hasattr(value, "shape")}
    if not arrays:
        raise WeightsError(f"{path} holds no arrays")
    return arrays


def _numpy(value: Any) -> np.ndarray:
    """Of a NumPy array, or of torch's tensor, which may have a gradient or be in bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _one_line(error: BaseException) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[:300] or type(error).__name__
