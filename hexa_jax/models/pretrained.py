"""Weights by name from timm, torchvision and Hugging Face.

Each library downloads and caches its own files; what comes back is NumPy, under torchvision's
names. Only networks that compute what our `ResNet` computes are taken: others have the same arrays,
and blur or pool differently.
"""

import contextlib
import importlib
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hexa_jax.models.weights import (
    Arrays,
    WeightsError,
    flat_arrays,
    from_huggingface,
    read_weights,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The networks of timm and torchvision that are plain ResNets under the names that we know.
PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101")


class Pretrained(NamedTuple):
    """A network's arrays by torchvision's names, and what its pixels in [0, 1] are normalized with.

    Attributes:
        arrays: kernels [O, I, H, W] and BatchNorm's vectors [C].
        mean: per channel.
        std: per channel, standard deviation.
    """

    arrays: Arrays
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def is_library_name(name: str) -> bool:
    """Return whether `name` asks a library for weights, instead of being a path."""
    return name.partition(":")[0] in LIBRARIES and ":" in name


def load_pretrained(name: str) -> Pretrained:
    """Return the weights that a library knows by a name, downloading them if its cache lacks them.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, `torchvision:NAME:WEIGHTS`, `hf:REPO` or
            `hf:REPO@REVISION`, where REPO may be a local folder of the same files.

    Raises:
        WeightsError: the library is missing or does not know the name, the download failed, or the
            network is no plain ResNet; one line.
    """
    library, _, rest = name.partition(":")
    if not rest:
        raise WeightsError(f"{name} names no weights: {', '.join(EXAMPLES.values())}")
    return LIBRARIES[library](rest)


def _timm(name: str) -> Pretrained:
    timm = _imported("timm", f"timm:{name}", "timm")
    with _told(f"timm:{name}"):
        model = timm.create_model(name, pretrained=True)
        settings = model.pretrained_cfg
    _check_plain(f"timm:{name}", settings["architecture"])
    return Pretrained(_state(model), tuple(settings["mean"]), tuple(settings["std"]))


def _torchvision(name: str) -> Pretrained:
    _imported("torchvision", f"torchvision:{name}", "torchvision")
    from torchvision import models

    architecture, _, weights = name.partition(":")
    _check_plain(f"torchvision:{name}", architecture)
    with _told(f"torchvision:{name}"):
        return Pretrained(_state(models.get_model(architecture, weights=weights or "DEFAULT")))


def _huggingface(name: str) -> Pretrained:
    source, (repository, _, revision) = f"hf:{name}", name.partition("@")
    with _told(source):
        config_file = _repository_file(repository, revision, "config.json")
        config = json.loads(config_file.read_text()) if config_file else {}
    _check_huggingface(source, config)
    with _told(source):
        weights = _repository_file(repository, revision, "model.safetensors")
        weights = weights or _repository_file(repository, revision, "pytorch_model.bin")
    if weights is None:
        raise WeightsError(f"{source} has neither model.safetensors nor pytorch_model.bin")
    pixels = config.get("pretrained_cfg", {})  # timm's
    with _told(source):
        if not pixels and (
            file := _repository_file(repository, revision, "preprocessor_config.json")
        ):
            processor = json.loads(file.read_text())
            pixels = {key: processor.get(f"image_{key}") for key in ("mean", "std")}
    mean, std = pixels.get("mean") or IMAGENET_MEAN, pixels.get("std") or IMAGENET_STD
    return Pretrained(from_huggingface(read_weights(str(weights))), tuple(mean), tuple(std))


def _repository_file(repository: str, revision: str, file: str) -> pathlib.Path | None:
    """The local copy of a repository's file, or None where it has none of that name."""
    folder = pathlib.Path(repository).expanduser()
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    hub = _imported("huggingface_hub", f"hf:{repository}", "huggingface_hub")
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return pathlib.Path(hub.hf_hub_download(repository, file, revision=revision or None))
    except (
        LocalEntryNotFoundError
    ):  # also an EntryNotFoundError: neither in the cache nor to be reached
        raise
    except EntryNotFoundError:
        return None


def _check_huggingface(name: str, config: dict[str, Any]) -> None:
    """Check that a repository's config.json is of a plain ResNet, timm's or transformers'.

    Raises:
        WeightsError: it is not.
    """
    if "architecture" in config:
        _check_plain(name, config["architecture"])
        return
    if config.get("model_type") != "resnet":
        found = config.get("model_type") or "model of no known kind"
        raise WeightsError(f"{name} is a {found}: only ResNets of transformers or timm can be read")
    # Each of these changes what the same arrays compute.
    plain = {
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise WeightsError(
                f"{name} has {key}={config[key]!r} in its config.json: only {value!r} can be read"
            )


def _check_plain(name: str, architecture: str) -> None:
    if architecture not in PLAIN:
        raise WeightsError(
            f"{name} is a {architecture}: only {', '.join(PLAIN)} compute the same as ours"
        )


def _state(model: Any) -> Arrays:
    """A torch module's parameters and buffers as NumPy."""
    return flat_arrays(model.state_dict(), type(model).__name__)


def _imported(module: str, name: str, package: str) -> Any:
    """The module, or a WeightsError that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name not in (module, "torch"):
            raise WeightsError(f"{name}: {module} cannot be imported: {_line(error)}") from None
        raise WeightsError(f"{name} needs {package}: pip install {package}") from None
    except (OSError, RuntimeError) as error:  # built for another version of torch
        raise WeightsError(f"{name}: {module} cannot be imported: {_line(error)}") from None


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turns whatever a library raises about a name into one line."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(f"{name} cannot be loaded: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())[:300] or type(error).__name__


LIBRARIES: dict[str, Callable[[str], Pretrained]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _huggingface,
}
EXAMPLES = {
    "timm": "timm:resnet50.a1_in1k",
    "torchvision": "torchvision:resnet50:IMAGENET1K_V2",
    "hf": "hf:microsoft/resnet-50",
}
