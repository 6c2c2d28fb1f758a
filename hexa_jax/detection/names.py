"""Weights of a whole detector under the names of torchvision's Faster R-CNN with FPN.

The backbone's own names are in `hexa_jax/models/weights.py`. Legend of shapes: torch kernels are
[O, I, H, W] and [O, I].
"""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from hexa_jax.models.norm import CLEAN, EPSILON, stats_collection
from hexa_jax.models.weights import (
    BATCH_NORM,
    Arrays,
    WeightsError,
    from_torchvision,
    read_weights,
    to_torchvision,
)

BODY = "backbone.body."
POOLED = 7  # cells along a side of a pooled region
STATS = stats_collection(CLEAN)
# (our module, theirs); the BatchNorms of the box head exist here only.
MODULES = (
    *((f"fpn/{ours}{level}", f"backbone.fpn.{theirs}.{level}.0") for level in range(4)
      for ours, theirs in (("inner", "inner_blocks"), ("layer", "layer_blocks"))),
    *((f"fpn/{ours}{level}_bn", f"backbone.fpn.{theirs}.{level}.1") for level in range(4)
      for ours, theirs in (("inner", "inner_blocks"), ("layer", "layer_blocks"))),
    ("rpn/conv", "rpn.head.conv.0.0"), ("rpn/objectness", "rpn.head.cls_logits"), ("rpn/deltas", "rpn.head.bbox_pred"),
    ("box/linear1", "roi_heads.box_head.fc6"), ("box/linear2", "roi_heads.box_head.fc7"),
    ("box/bn1", "roi_heads.box_head.bn6"), ("box/bn2", "roi_heads.box_head.bn7"),
    ("box/scores", "roi_heads.box_predictor.cls_score"), ("box/deltas", "roi_heads.box_predictor.bbox_pred"),
)  # fmt: skip


class Saved(NamedTuple):
    """A detector's file: its arrays, and what `write_detector` wrote beside them, if it did."""

    arrays: Arrays
    about: dict[str, Any]

    @property
    def class_names(self) -> list[str] | None:
        """What labels mean, where the file says."""
        return self.about.get("classes")

    @property
    def num_classes(self) -> int:
        """Without background."""
        return len(self.arrays["roi_heads.box_predictor.cls_score.weight"]) - 1

    @property
    def body(self) -> Arrays:
        """The backbone's arrays under torchvision's names of a ResNet."""
        return {
            name.removeprefix(BODY): value
            for name, value in self.arrays.items()
            if name.startswith(BODY)
        }


def read_detector(path: str) -> Saved:
    """Arrays of a weights file (any that `read_weights` reads), by the newest torchvision's names.

    Raises:
        WeightsError: unreadable, or no Faster R-CNN with FPN.
    """
    arrays = {_renamed(name): value for name, value in read_weights(path).items()}
    for needed in (
        f"{BODY}conv1.weight",
        "rpn.head.cls_logits.weight",
        "roi_heads.box_predictor.cls_score.weight",
    ):
        if needed not in arrays:
            raise WeightsError(
                f"{path} is no Faster R-CNN by torchvision's names: it has no {needed}"
            )
    metadata: dict[str, str] = {}
    if path.endswith(".safetensors"):
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    known = ("classes", "mean", "std")
    return Saved(arrays, {name: json.loads(metadata[name]) for name in known if name in metadata})


def write_detector(
    path: pathlib.Path, variables: Mapping[str, Any], class_names: Sequence[str], **about: Any
) -> None:
    """Write a `.safetensors` file; the classes and `about` (JSON values) are its metadata."""
    metadata = {"classes": json.dumps(list(class_names))} | {
        name: json.dumps(value) for name, value in about.items()
    }
    save_file(detector_to_torchvision(variables), path, metadata)


def detector_to_torchvision(variables: Mapping[str, Any]) -> Arrays:
    """Named arrays of a `Detector`'s variables (parameters and clean statistics)."""
    body = to_torchvision(_backbone_of(variables))
    arrays = {
        f"{BODY}{name}": value for name, value in body.items() if "num_batches_tracked" not in name
    }
    for collection in ("params", STATS):
        for ours, theirs in MODULES:
            part, module = ours.split("/")
            for leaf, value in variables[collection].get(part, {}).get(module, {}).items():
                name = f"{theirs}.{'weight' if leaf == 'kernel' else BATCH_NORM[leaf]}"
                arrays[name] = _to_torch(np.asarray(value, np.float32), ours)
    return arrays


def detector_from_torchvision(
    arrays: Mapping[str, np.ndarray], like: Mapping[str, Any], epsilon: float = EPSILON
) -> dict[str, Any]:
    """Our variables from named arrays.

    Args:
        arrays: torchvision's names.
        like: variables of the wanted detector: structure and shapes.
        epsilon: what the network that the arrays are from adds to its backbone's variances: 0 in
            torchvision's COCO_V1.

    Raises:
        WeightsError: names are missing, or a shape differs.
    """
    body = {
        name.removeprefix(BODY): value for name, value in arrays.items() if name.startswith(BODY)
    }
    body = {
        name: value + np.float32(epsilon - EPSILON) if name.endswith("running_var") else value
        for name, value in body.items()
    }
    variables = from_torchvision(body, _backbone_of(like))
    for collection in ("params", STATS):
        for ours, theirs in MODULES:
            part, module = ours.split("/")
            for leaf, wanted in like[collection].get(part, {}).get(module, {}).items():
                name = f"{theirs}.{'weight' if leaf == 'kernel' else BATCH_NORM[leaf]}"
                if name not in arrays:
                    raise WeightsError(f"the weights are of another detector: {name} is missing")
                value = _from_torch(np.asarray(arrays[name], np.float32), ours)
                if value.shape != wanted.shape:
                    raise WeightsError(
                        f"the weights are of another detector: {name} becomes {value.shape}, not "
                        f"{wanted.shape}"
                    )
                variables.setdefault(collection, {}).setdefault(part, {}).setdefault(module, {})[
                    leaf
                ] = value
    return variables


def _renamed(name: str) -> str:
    """Checkpoints from before torchvision 0.13 have one level less in pyramid and proposal head."""
    name = re.sub(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", name)
    return re.sub(r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1", name)


def _backbone_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        collection: {"backbone": variables[collection]["backbone"]}
        for collection in ("params", STATS)
    }


def _to_torch(value: np.ndarray, module: str) -> np.ndarray:
    if module == "box/linear1" and value.ndim == 2:  # torch flattens channels first
        value = (
            value.reshape(POOLED, POOLED, -1, value.shape[1])
            .transpose(2, 0, 1, 3)
            .reshape(value.shape)
        )
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)


def _from_torch(value: np.ndarray, module: str) -> np.ndarray:
    if module == "box/linear1" and value.ndim == 2 and value.shape[1] % POOLED**2 == 0:
        value = (
            value.reshape(len(value), -1, POOLED, POOLED).transpose(0, 2, 3, 1).reshape(value.shape)
        )
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
