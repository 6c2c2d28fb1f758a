"""What most evaluations begin with: a backbone, and features of labelled images."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError
from hexa_jax.data.open import SOURCE_SETTINGS, open_source
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.evals.backbone import RANDOM, Backbone, load_backbone, random_backbone
from hexa_jax.evals.features import EvalImages
from hexa_jax.evals.stored_features import Features, StoredFeatures, join
from hexa_jax.evals.tasks.image_size import with_size
from hexa_jax.models.norm import CLEAN, NormMode, stats_collection
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.training.factory import make_devices

# what else has no influence on features
_FEATURES_OF = ("checkpoint", "random", "seed", "data", "grid", "precision")
PART_BATCHES = 50  # what a kill can cost
CALIBRATION_IMAGES = 512  # whose statistics a random network gets


def require_checkpoint(config: ConfigDict) -> None:
    """Raise ConfigError where `config.checkpoint` says nothing."""
    if not config.checkpoint:
        raise ConfigError("config.checkpoint is missing: a workdir, a weights file, or random")


def open_backbone(config: ConfigDict) -> Backbone:
    """Open the backbone of `config.checkpoint`; a random one is built as `config.random` says."""
    require_checkpoint(config)
    if config.checkpoint != RANDOM:
        return load_backbone(config.checkpoint)
    settings = config.random
    like = load_backbone(settings.like) if settings.like else None
    return random_backbone(
        config.seed, settings.backbone, settings.stem, settings.base_channels, like
    )


def open_split(
    config: ConfigDict, backbone: Backbone, name: str, *, labelled: bool = True
) -> Source:
    """The source `data.<name>`, or that of the pre-training run where the config has none.

    The run's own data are looked for where the run found them, unless `runtime.data_dir` says
    otherwise.

    Raises:
        ConfigError: neither names one.
        DataError: it has no labels and needs them.
    """
    run = backbone.config
    spec = config.data[name] or (run.data[name] if run else "")
    if not spec:
        had = (
            "the pre-training run had none either"
            if run
            else "there is no pre-training run that had one"
        )
        raise ConfigError(f"data.{name} is empty, and {had}: give --config.data.{name}")
    data = run.data if run else ConfigDict({"shapes_size": 32, "shapes_count": 10_000})
    runtime = config.runtime
    if run and not config.data[name] and not runtime.data_dir:
        runtime = ConfigDict(
            {key: run.runtime.get(key, runtime[key]) for key in ("data_dir", "data_cache")}
        )
    labels = config.data.labels
    if labels == "auto" and not config.data[name] and data.get("labels") == "folders":
        labels = "folders"  # the run's own data, whose classes it was told of
    own = config.data if config.data[name] else data
    settings = {key: own.get(key, default) for key, default in SOURCE_SETTINGS.items()} | {
        "labels": labels
    }
    settings |= {"shapes_size": data.shapes_size, "shapes_count": data.shapes_count}
    source = open_source(ConfigDict({"runtime": runtime, "data": settings}), spec)
    if labelled and source.num_classes is None:
        raise DataError(f"{spec} has no labels, which config.task={config.task} needs")
    if name == "source" and config.data.list:
        source = listed(source, config.data.list)
    if name == "source" and config.data.limit and config.data.limit < len(source):
        source = Subset(source, spread(len(source), config.data.limit))
    return source


def listed(source: Source, path: str) -> Source:
    """Return the examples that a text file lists, by path or file name, in its order.

    Raises:
        DataError: the file is missing or empty, or names an example that the source does not have.
    """
    try:
        wanted = [
            line.strip()
            for line in pathlib.Path(path).expanduser().read_text().splitlines()
            if line.strip()
        ]
    except OSError as error:
        raise DataError(f"data.list={path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"data.list={path} is no text file") from None
    if not wanted:
        raise DataError(f"data.list={path} lists nothing")
    place: dict[str, int] = {}
    shared = set()
    for index in range(len(source)):
        name = pathlib.PurePath(source.name(index))
        for key in {str(name), "/".join(name.parts[-2:]), name.name, name.stem}:
            if place.setdefault(key, index) != index:
                shared.add(key)
    unclear = next((name for name in wanted if name in shared), None)
    if unclear is not None:
        raise DataError(
            f"data.list={path}: several examples are called {unclear}; list them by folder and "
            "file name"
        )
    missing = [name for name in wanted if name not in place]
    if missing:
        raise DataError(
            f"data.list={path}: {len(missing)} of {len(wanted)} are not in the data, the first is "
            f"{missing[0]}"
        )
    return Subset(source, np.array([place[name] for name in wanted], np.int64))


def open_both(config: ConfigDict, backbone: Backbone) -> tuple[Source, Source]:
    """Training and held-out examples, with the same classes."""
    train, held_out = (open_split(config, backbone, name) for name in ("source", "eval_source"))
    check_classes(train, held_out)
    return train, held_out


def check_classes(train: Source, held_out: Source) -> None:
    """Check that both have the same number of classes, and the same names if any.

    Raises:
        DataError: they differ.
    """
    names = [list(source.class_names or []) for source in (train, held_out)]
    if train.num_classes != held_out.num_classes:
        numbers = f"{held_out.num_classes} classes to test on, {train.num_classes} to train on"
        if names[1] and set(names[1]) < set(names[0]):
            lacking = sorted(set(names[0]) - set(names[1]))
            raise DataError(
                f"{numbers}: no held-out image is of {', '.join(map(str, lacking[:3]))}"
                f"{', ...' if len(lacking) > 3 else ''}; add one of each, or leave these classes "
                "out of data.source"
            )
        raise DataError(f"{numbers}: are data.source and data.eval_source the same data set?")
    if all(names) and names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[:3]
        raise DataError(
            f"training and held-out classes have other names, such as {', '.join(map(str, odd))}"
        )


class Extractor:
    """Computes features of images on all devices, with a progress line.

    Attributes:
        config: of the evaluation, with the size of its images filled in.
        backbone: what computes them; a random one gets BatchNorm statistics from the first images
            it sees.
        mesh: of the devices.
        folder: where features are kept as they come, for a second start; None: nowhere.
    """

    def __init__(self, config: ConfigDict, backbone: Backbone, folder: pathlib.Path | None = None):
        self.config, self.backbone, self.folder = (
            with_size(config, backbone.config),
            backbone,
            folder,
        )
        self._fresh = config.checkpoint == RANDOM
        self.mesh: Mesh = make_mesh(make_devices(config))
        rows, self._whole = NamedSharding(self.mesh, P("data")), NamedSharding(self.mesh, P())
        features = functools.partial(backbone.features, grid=config.grid)
        self._forward = jax.jit(
            features, in_shardings=(self._whole, rows), out_shardings=self._whole
        )
        self.batch_size = -(-config.runtime.batch_size // self.mesh.size) * self.mesh.size

    def __call__(self, source: Source, what: str) -> Features:
        """Return features of a source's examples, in order; `what` names them in messages."""
        images = self.images(source)
        if self._fresh:
            self._calibrate(images)
            self._fresh = False
        store = None
        if self.folder:
            of = {
                name: value for name, value in self.config.to_dict().items() if name in _FEATURES_OF
            }
            about = of | {"step": self.backbone.step, "images": len(source)}
            store = StoredFeatures(self.folder / what.replace(" ", "_"), about)
        parts = store.load() if store else []
        parts = parts[: processes.broadcast_from_main(len(parts))]
        done = sum(len(part.values) for part in parts)
        clock, values = StepTimer(1, len(source)), []
        clock.start(done)
        batches = images.device_batches(
            self.mesh, self.batch_size, self.config.runtime.threads, done
        )
        for number, (batch, count) in enumerate(batches, 1):
            values.append(
                np.asarray(self._forward(self.backbone.variables, batch), np.float32)[:count]
            )
            done += count
            if number % PART_BATCHES == 0 or done == len(source):
                labels, known = images.facts(slice(done - sum(map(len, values)), done))
                parts.append(Features(np.concatenate(values), labels, known))
                values = []
                if store and processes.is_main_process():
                    store.add(len(parts) - 1, parts[-1])
            if number % self.config.runtime.log_every == 0:
                speed, left = clock.read(done)
                log(f"{what}: {done} of {len(source)} images  {speed:.0f} images/s  ETA {left}")
        return join(parts)

    def images(self, source: Source) -> EvalImages:
        """The images that features are computed of."""
        data = self.config.data
        return EvalImages(source, np.arange(len(source)), data.resize, data.crop, data.squash)

    def _calibrate(self, images: EvalImages) -> None:
        """Give a random network the BatchNorm statistics of some images.

        With mean 0 and variance 1 it would be handicapped.
        """
        chosen = dataclasses.replace(
            images, indices=spread(len(images.indices), CALIBRATION_IMAGES)
        )
        sums: Any = None
        weight = 0
        network = self.backbone.network
        for batch, count in chosen.batches(
            min(64, len(chosen.indices)), self.config.runtime.threads
        ):
            pixels = jnp.asarray(batch[:count], jnp.float32) / 255
            mode = NormMode(CLEAN, groups=1)
            _, sown = network.apply(
                self.backbone.variables,
                pixels,
                mode,
                method=type(network).features,
                mutable=["moments"],
            )
            scaled = jax.tree.map(lambda m, n=count: m[0] * n, sown["moments"], is_leaf=_is_sown)
            sums = scaled if sums is None else jax.tree.map(jnp.add, sums, scaled)
            weight += count
        stats = jax.tree.map(lambda total: total / weight, sums)
        name = stats_collection(CLEAN)
        self.backbone = self.backbone._replace(variables={**self.backbone.variables, name: stats})


def _is_sown(node: Any) -> bool:
    return isinstance(node, tuple)


def usable(features: Features) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a label whose image could be read."""
    chosen = features.known & (features.labels >= 0)
    return features.values[chosen], features.labels[chosen]


def top_k(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 accuracy in per cent.

    Args:
        logits: float [N, C]. Of classes that score the same, the lower number counts as better, as
            in argmax; a row that holds NaN or infinity is wrong.
        labels: int [N].
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1])[None] < labels[:, None]
    above = np.sum((logits > own) | ((logits == own) & earlier), axis=1)
    sound = np.isfinite(logits).all(axis=1)
    return {f"top{k}": 100 * float(np.mean(sound & (above < k))) for k in (1, 5)}
