"""Weights that a run starts from in place of random ones: `config.model.init`.

They fill the backbone alone, both of its BatchNorm sets; heads, predictors and prototypes stay
random. What was read is told in init.json of the workdir, which a resumed run does not need.
"""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from hexa_jax.core.errors import ConfigError
from hexa_jax.evals.backbone import RANDOM, Backbone, load_backbone
from hexa_jax.models.heads import Network
from hexa_jax.models.pretrained import EXAMPLES
from hexa_jax.models.resnet import ResNet
from hexa_jax.models.weights import WeightsError, fingerprint, first_difference, to_torchvision
from hexa_jax.parallel import processes
from hexa_jax.storage.workdir import INIT_RECORD, write_json

# Differences of pixel means and deviations that are roundings, such as SwAV's .228 for .229.
SAME_PIXELS = 0.01


class InitialWeights(NamedTuple):
    """A backbone's clean variables, and what tells which they are.

    Attributes:
        variables: {"params": {"backbone": ...}, "clean_batch_stats": {"backbone": ...}}, float32.
        record: name, SHA-256 of the weights, architecture, and the step of the run that they are
            from, if any; JSON.
    """

    variables: Mapping[str, Any]
    record: dict[str, Any]


def read_initial_weights(
    config: ConfigDict, network: Network, variables: Mapping[str, Any]
) -> InitialWeights | None:
    """Read the weights that a run starts from; all processes call it.

    Args:
        config: of the run; `config.model.init` names a workdir of this program, a weights file, or
            another library's weights. Empty: None is returned.
        network: of the run.
        variables: the network's, or their shapes.

    Raises:
        WeightsError: they cannot be read, are of another architecture, or differ between processes;
            one line.
        CheckpointError: the workdir holds no run, or none that saved anything.
    """
    name = config.model.get("init", "")
    if not name:
        return None
    if name == RANDOM:
        raise ConfigError(
            f"config.model.init={name} is no weights: leave it empty to start from random ones, or "
            "use a workdir, "
            f"a weights file, or a name such as {', '.join(EXAMPLES.values())}"
        )
    found = load_backbone(name)
    arrays = to_torchvision(found.variables)
    _check_architecture(name, found, arrays, network.backbone, variables)
    _warn_of_pixels(name, found.network, network)
    record = {
        "name": name,
        "sha256": fingerprint(arrays),
        "architecture": described(found.network.backbone),
        "step": found.step if found.step >= 0 else None,
    }
    _check_processes(name, record["sha256"])
    # In host memory: the run's devices may be others than the one that read it.
    return InitialWeights(jax.device_get(found.variables), record)


def described(backbone: ResNet) -> str:
    """Return an architecture in words, such as "resnet18 with a cifar stem"."""
    parts = [f"{backbone.base_channels} channels"] if backbone.base_channels != 64 else []
    parts += [f"a {backbone.stem} stem"] if backbone.stem != "imagenet" else []
    return f"resnet{backbone.depth}" + (f" with {' and '.join(parts)}" if parts else "")


def record_initial_weights(workdir: pathlib.Path, weights: InitialWeights) -> None:
    """Tell in the workdir what the run started from."""
    write_json(workdir / INIT_RECORD, weights.record)


def _check_architecture(
    name: str,
    found: Backbone,
    arrays: Mapping[str, np.ndarray],
    wanted: ResNet,
    variables: Mapping[str, Any],
) -> None:
    have = found.network.backbone
    if have.stem != wanted.stem and not found.stem_known and wanted.stem != "imagenet":
        # the same arrays: nothing tells which of the two they were trained with
        have = have.clone(stem=wanted.stem)
    differs = first_difference(arrays, variables)
    if not differs and have.stem != wanted.stem:
        differs = f"the stem is {have.stem}, not {wanted.stem}"
    if differs:
        raise WeightsError(
            f"config.model.init={name}: {differs}: {described(have)} weights for a "
            f"{described(wanted)}?"
        )


def _warn_of_pixels(name: str, found: Network, wanted: Network) -> None:
    pairs = [(found.pixel_mean, wanted.pixel_mean), (found.pixel_std, wanted.pixel_std)]
    if (
        any(np.abs(np.subtract(theirs, ours)).max() > SAME_PIXELS for theirs, ours in pairs)
        and processes.is_main_process()
    ):
        logging.warning(
            "%s was trained on pixels with mean %s and standard deviation %s, this run has %s and "
            "%s: "
            "set config.data.pixel_mean and pixel_std to the former",
            name,
            *(
                tuple(round(float(value), 3) for value in values)
                for pair in zip(*pairs, strict=True)
                for values in pair
            ),
        )


def _check_processes(name: str, digest: str) -> None:
    """Several processes that start from different weights would never notice."""
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    if not (processes.gather(mine).reshape(-1, mine.size) == mine).all():
        raise WeightsError(f"config.model.init={name} is not the same for all processes")
