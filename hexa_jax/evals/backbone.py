"""A frozen backbone: of a run, from a file or another library, or with random weights."""

import json
import logging
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from safetensors import safe_open

from hexa_jax.checkpoint.checkpointer import CheckpointError, Checkpoints
from hexa_jax.core import console
from hexa_jax.models.heads import Network
from hexa_jax.models.norm import CLEAN, EVALUATION, NormMode, stats_collection
from hexa_jax.models.pretrained import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Pretrained,
    is_library_name,
    load_pretrained,
)
from hexa_jax.models.resnet import make_resnet
from hexa_jax.models.weights import WeightsError, architecture_of, from_torchvision, read_weights
from hexa_jax.parallel import processes
from hexa_jax.storage import gcs
from hexa_jax.storage.workdir import with_added

RANDOM = "random"
BEST = "@best"  # behind a workdir: its best checkpoint instead of the newest


class Backbone(NamedTuple):
    """A network whose head is not used, with its clean running statistics in float32.

    Attributes:
        network: without a head.
        variables: parameters and clean statistics, "backbone" on top of each.
        step: of pre-training; 0 for random weights, -1 for weights from a file.
        config: of the pre-training run, None without one.
        stem_known: whether the stem is what the weights were trained with; the arrays of others'
            files do not tell a "small" one from a "cifar" one, and are taken for the latter.
    """

    network: Network
    variables: Any
    step: int
    config: ConfigDict | None
    stem_known: bool = True

    @property
    def feature_dim(self) -> int:
        """Length of a pooled feature."""
        return self.network.backbone.feature_dim

    def features(
        self, variables: Any, images: jax.Array, mode: NormMode = EVALUATION, grid: int = 1
    ) -> jax.Array:
        """Return features [N, grid * grid * F] of images [N, H, W, 3].

        uint8, or float in [0, 1]; pooled whole where grid is 1.
        """
        images = jnp.asarray(images)
        pixels = images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
        return self.network.apply(variables, pixels, mode, grid, method=Network.features)


def load_backbone(checkpoint: str, **random: Any) -> Backbone:
    """A backbone.

    Args:
        checkpoint: workdir of a pre-training run (its newest intact checkpoint counts; with "@best"
            behind it the one that `runtime.keep_best` kept), a weights file in torchvision's names
            (`.safetensors`, `.npz`; `.pth` and the like with torch; published MoCo and SwAV
            checkpoints too), both local or in a bucket, the name of weights that another library
            has, as `load_pretrained` takes it, or "random". Of an unfinished run, the statistics
            may be running ones where the run's own evaluations use re-estimated ones; a warning
            says so.
        random: for "random" only: seed, and optionally backbone, stem and base_channels.

    Raises:
        CheckpointError: the folder holds no run, or no checkpoint, or a damaged one.
        WeightsError: the file cannot be read, or is of no known ResNet.
    """
    if checkpoint == RANDOM:
        return random_backbone(**random)
    if is_library_name(checkpoint):
        return _from_arrays(load_pretrained(checkpoint), checkpoint)
    workdir = checkpoint.removesuffix(BEST)
    path = gcs.path_of(workdir)
    config = _config_of_run(workdir)
    if config is None:
        return _from_file(path)
    model, pixels = config.model, (tuple(config.data.pixel_mean), tuple(config.data.pixel_std))
    resnet = make_resnet(model.backbone, model.base_channels, stem=model.stem)
    network = Network(resnet, None, *pixels, normalize=False)
    shapes = _shapes(network)
    like = {
        "params": {"network": shapes["params"]},
        "batch_stats": {name: tree for name, tree in shapes.items() if name != "params"},
    }
    checkpoints = Checkpoints(path / "checkpoints")
    restored: tuple[int, Any, dict] | None
    if checkpoint.endswith(BEST):
        restored = checkpoints.restore(_best_step(checkpoints, workdir), like, partial=True)
    else:
        restored = checkpoints.restore_latest(like, partial=True)
    if restored is None:
        raise CheckpointError(f"checkpoint {checkpoint!r} has no checkpoint yet")
    step, tree, metadata = restored
    # Finished runs of before this was saved have a result.
    settled = (
        metadata["reestimated"] == step
        if "reestimated" in metadata
        else gcs.exists(path / "result.json")
    )
    if (
        config.get("eval_statistics") == "reestimated"
        and not settled
        and processes.is_main_process()
    ):
        logging.warning(
            "%s is unfinished at step %d: its BatchNorm statistics are running ones, not "
            "re-estimated as config.eval_statistics says, so that accuracies differ from those the "
            "run itself measures",
            checkpoint,
            step,
        )
    return Backbone(
        network, {"params": tree["params"]["network"], **tree["batch_stats"]}, step, config
    )


def check_checkpoint(checkpoint: str) -> None:
    """Check that there are weights, without a device.

    Of a file only that it exists, of a run that it has checkpoints.

    Raises:
        CheckpointError: neither a file nor a pre-training run is there, or a run that saved nothing
            yet.
    """
    workdir = checkpoint.removesuffix(BEST)
    if checkpoint == RANDOM or is_library_name(checkpoint) or _config_of_run(workdir) is None:
        return
    checkpoints = Checkpoints(gcs.path_of(workdir) / "checkpoints")
    if not checkpoints.steps():
        raise CheckpointError(f"checkpoint {checkpoint!r} has no checkpoint yet")
    if checkpoint.endswith(BEST):
        _best_step(checkpoints, workdir)


def _best_step(checkpoints: Checkpoints, workdir: str) -> int:
    """The step that the newest checkpoint calls the best.

    Raises:
        CheckpointError: the run kept none.
    """
    steps = checkpoints.steps()
    best = checkpoints.metadata(steps[-1]).get("best") if steps else None
    if best is None:
        raise CheckpointError(
            f"{workdir} kept no best checkpoint: a run keeps one with "
            "--config.runtime.keep_best=rankme"
        )
    return int(best["step"])


def _config_of_run(checkpoint: str) -> ConfigDict | None:
    """The saved config of the pre-training run in a workdir; None where `checkpoint` is a file.

    Raises:
        CheckpointError: it is neither.
    """
    path = gcs.path_of(checkpoint)
    with gcs.told(checkpoint):
        if gcs.exists(path):
            return None
        saved = path / "config.json"
        if not gcs.exists(saved):
            raise CheckpointError(
                f"checkpoint {checkpoint!r} is neither a file nor the workdir of a run: it has no "
                "config.json"
            )
        config = with_added(ConfigDict(json.loads(saved.read_text()), convert_dict=True))
    if "model" not in config:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} is no pre-training run: its config has no model"
        )
    return config


def random_backbone(
    seed: int = 0,
    backbone: str = "resnet50",
    stem: str = "imagenet",
    base_channels: int = 64,
    like: Backbone | None = None,
) -> Backbone:
    """Random weights, with the running statistics that a fresh network has (mean 0, variance 1).

    Args:
        seed: of the weights.
        backbone: name as in `make_resnet`.
        stem: "imagenet", "cifar" or "small".
        base_channels: of the stem.
        like: a backbone whose architecture and pixel statistics to take instead.
    """
    if like is not None:
        network = like.network
    else:
        network = Network(
            make_resnet(backbone, base_channels, stem=stem),
            None,
            IMAGENET_MEAN,
            IMAGENET_STD,
            normalize=False,
        )
    variables = jax.jit(lambda key: network.init(key, _crops(), EVALUATION))(jax.random.key(seed))
    return Backbone(network, _clean(variables), 0, like.config if like else None)


def _from_file(path: Any) -> Backbone:
    if gcs.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            console.aliases[folder] = str(path.parent)  # for messages
            local = pathlib.Path(folder)
            gcs.copy_files(str(path.parent), local, {path.name: path.stat().length})
            return _from_file(local / path.name)
    arrays = read_weights(str(path))
    metadata = _metadata(path)
    # Only what `hexa_jax.export` wrote beside the weights tells a small stem from a cifar one.
    found = Pretrained(arrays, *_pixel_statistics(metadata))
    return _from_arrays(found, str(path), metadata.get("stem"))


def _from_arrays(found: Pretrained, name: str, stem: str | None = None) -> Backbone:
    """Build a backbone from named arrays, which tell its architecture.

    `stem` is what their file says of it.
    """
    try:
        architecture = architecture_of(found.arrays)
        if architecture.stem == "cifar" and stem == "small":
            architecture = architecture._replace(stem=stem)
        resnet = make_resnet(
            f"resnet{architecture.depth}", architecture.base_channels, stem=architecture.stem
        )
        network = Network(resnet, None, found.mean, found.std, normalize=False)  # type: ignore[arg-type]
        variables = from_torchvision(found.arrays, _shapes(network))
    except WeightsError as error:
        raise WeightsError(f"{name}: {error}") from None
    known = architecture.stem == "imagenet" or stem is not None
    return Backbone(network, jax.tree.map(jnp.asarray, variables), -1, None, known)


def _metadata(path: pathlib.Path) -> dict[str, str]:
    """Read what `hexa_jax.export` wrote beside the weights, if it did."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "numpy") as file:
        return file.metadata() or {}


def _pixel_statistics(metadata: Mapping[str, str]) -> tuple[Any, Any]:
    """Mean and standard deviation, ImageNet's in files of others."""
    if not {"mean", "std"} <= metadata.keys():
        return IMAGENET_MEAN, IMAGENET_STD
    return tuple(json.loads(metadata["mean"])), tuple(json.loads(metadata["std"]))


def _crops() -> tuple[jax.Array, ...]:
    return (jnp.zeros((1, 1, 32, 32, 3)),)


def _shapes(network: Network) -> dict[str, Any]:
    return _clean(jax.eval_shape(lambda: network.init(jax.random.key(0), _crops(), EVALUATION)))


def _clean(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters and statistics without the adversarial set."""

    def without(tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        return {
            name: without(node) for name, node in tree.items() if not name.startswith("adversarial")
        }

    return {name: without(variables[name]) for name in ("params", stats_collection(CLEAN))}
