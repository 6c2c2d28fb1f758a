"""config.task = "robustness": accuracy under attack and under common corruptions.

Test images are taken in batches. What was found of a batch is kept in a file of its own, so that a
second start goes on behind the last attack or corruption that was finished.
"""

import concurrent.futures
import functools
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax import views
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError, choose
from hexa_jax.data.source import DataError, Source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.evals.backbone import Backbone
from hexa_jax.evals.corruptions import CORRUPTIONS, FAMILIES, STRENGTHS, corrupt
from hexa_jax.evals.features import EvalImages
from hexa_jax.evals.knn import accuracy
from hexa_jax.evals.linear import fit_linear
from hexa_jax.evals.tasks.labelled import Extractor, open_backbone, open_both, usable
from hexa_jax.evals.tasks.networks import networks, suffixed
from hexa_jax.evals.tasks.readouts import Readout, knn_readout, linear_readout
from hexa_jax.parallel import processes
from hexa_jax.report.pictures import against_strength, image_grid
from hexa_jax.storage.workdir import Finished, write_json

GREY_LEVELS = 255
READOUTS = {"knn": "kNN", "linear": "linear"}
Predictions = dict[str, list[int]]  # by read-out


def robustness(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Judge the checkpoint and random weights; return what `result.json` holds.

    Numbers are top-1 accuracies in per cent, all of the same images: `knn_clean`, `knn_linf4`
    (attacks of up to 4 grey levels were withstood), `knn_jpeg_compression_3` (strength 3),
    `knn_jpeg_compression` (mean of the strengths), `knn_corruption` (mean of all corruptions); the
    same with `linear_`. Those of random weights end in `_random`.

    Raises:
        ConfigError: settings that cannot work.
        DataError: training images of one class only, or no test image that counts.
    """
    _check(config)
    backbone = open_backbone(config)
    train, held_out = open_both(config, backbone)
    test = Subset(held_out, spread(len(held_out), config.test_images))
    found: dict[str, dict[str, float]] = {}
    for name, settings in networks(config).items():
        judged = backbone if settings is config else open_backbone(settings)
        judge = _Judge(settings, judged, train, test, workdir / name, name)
        found[name] = judge.accuracies()
    results: dict[str, Any] = {
        "pretraining_step": backbone.step,
        "train_images": judge.train_images,
        "test_images": judge.test_images,
        **suffixed(found),
    }
    report = workdir / "report"
    report.mkdir(exist_ok=True)
    against_strength(_panels(config, found), "accuracy in %", report / "robustness.png")
    if config.corruptions:
        image_grid(
            _gallery(config, judge.images.image(0)),
            ["clean", *STRENGTHS],
            report / "corruptions.png",
        )
    write_json(workdir / "result.json", results)
    text = _markdown(config, found, judge.test_images)
    if processes.is_main_process():
        (workdir / "robustness.md").write_text(text)
    log(text)
    return results


def _check(config: ConfigDict) -> None:
    choose("family", config.family, dict.fromkeys(FAMILIES))
    for name in config.corruptions:
        choose("corruptions", name, dict.fromkeys(CORRUPTIONS))
    attack = config.attack
    if attack.steps < 1 or attack.relative_step <= 0:
        raise ConfigError("attack.steps and attack.relative_step must be positive")
    if min(attack.epsilons, default=0) < 0 or config.test_images < 0:
        raise ConfigError("attack.epsilons and test_images must not be negative")
    for name, values in (("attack.epsilons", attack.epsilons), ("corruptions", config.corruptions)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{name} has an entry twice")
    if config.neighbours < 1 or config.temperature <= 0 or config.regularization <= 0:
        raise ConfigError("neighbours, temperature and regularization must be positive")


def attacked(
    objective: Callable[[jax.Array], jax.Array],
    pixels: jax.Array,
    *,
    epsilon: float,
    steps: int,
    relative_step: float = 2.5,
    keys: jax.Array | None = None,
) -> jax.Array:
    """The ends of PGD attacks on images.

    Args:
        objective: maps images like `pixels` to the losses [N] to increase. Have it jitted: it is
            differentiated anew at each step, which then compiles once for all steps and all
            epsilons.
        pixels: float [N, H, W, C] in [0, 1].
        epsilon: how far a pixel value may go, in grey levels of 255.
        steps: of the attack.
        relative_step: length of a step, in units of epsilon / steps.
        keys: [N] typed keys, to start from a random point; by default the attack starts from the
            images.

    Returns:
        [N, H, W, C] in [0, 1].
    """
    if epsilon == 0:
        return pixels  # the ball is a point, and a step needs a length
    radius = epsilon / GREY_LEVELS
    return views.adversarial(
        jax.random.key(0) if keys is None else keys,
        pixels,
        objective,
        epsilon=radius,
        step_size=relative_step * radius / steps,
        steps=steps,
        random_start=keys is not None,
    )


def judge_predictions(
    predictions: dict[str, np.ndarray],
    labels: np.ndarray,
    epsilons: tuple[float, ...],
    corruptions: tuple[str, ...],
) -> dict[str, float]:
    """Accuracies in per cent of one read-out.

    An attack of at most epsilon may end anywhere in that ball: at the image itself, or where a
    weaker attack ended. So an image withstands epsilon if all of those are classified right, and no
    attack raises the accuracy.

    Args:
        predictions: int [N] classes by condition: "clean", "linf4" and so on, "contrast_3" and so
            on.
        labels: int [N].
        epsilons: of the attacks, in grey levels, in any order.
        corruptions: names.

    Returns:
        "clean", "linf4" ..., "contrast_3" ..., "contrast" (mean of the strengths), "corruption"
        (mean of all).
    """
    right = predictions["clean"] == labels
    found = {"clean": 100 * float(np.mean(right))}
    for epsilon in sorted(epsilons):
        right &= predictions[f"linf{epsilon:g}"] == labels
        found[f"linf{epsilon:g}"] = 100 * float(np.mean(right))
    for name in corruptions:
        by_strength = {
            f"{name}_{s}": accuracy(predictions[f"{name}_{s}"], labels) for s in STRENGTHS
        }
        found |= by_strength | {name: float(np.mean(list(by_strength.values())))}
    if corruptions:
        found["corruption"] = float(np.mean([found[name] for name in corruptions]))
    return found


class _Judge:
    """Asks one network's read-outs for the classes of all changed test images.

    Attributes:
        images: the test images.
        train_images: how many count.
        test_images: how many count; known once `accuracies` was called.
    """

    def __init__(
        self,
        config: ConfigDict,
        backbone: Backbone,
        train: Source,
        test: Source,
        folder: pathlib.Path,
        name: str,
    ):
        self.config, self.folder, self.name = config, folder, name
        folder.mkdir(exist_ok=True)
        extractor = Extractor(config, backbone, folder / "features")
        bank, labels = usable(extractor(train, "training features"))
        if len(np.unique(labels)) < 2:
            raise DataError(
                "the training images are of fewer than two classes: there is nothing to tell apart"
            )
        backbone = extractor.backbone  # a random one has its statistics by now
        self.step, self.images, self.batch_size = (
            backbone.step,
            extractor.images(test),
            extractor.batch_size,
        )
        self.train_images, self.test_images = len(bank), 0
        mesh = extractor.mesh
        self._rows, self._whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        features = functools.partial(backbone.features, grid=config.grid)
        self._features = jax.jit(features, out_shardings=self._whole)
        self._variables = jax.device_put(backbone.variables, self._whole)
        self._readouts = {
            "knn": knn_readout(
                bank,
                labels,
                neighbours=config.neighbours,
                temperature=config.temperature,
                mesh=mesh
                if jax.process_count() == 1
                else None,  # else each process its own devices
            ),
            "linear": linear_readout(
                fit_linear(bank, labels, regularization=config.regularization)
            ),
        }
        self._arrays = {
            name: jax.device_put(readout.arrays, self._whole)
            for name, readout in self._readouts.items()
        }

        def losses(
            readout: Readout, variables: Any, arrays: Any, targets: jax.Array, pixels: jax.Array
        ) -> jax.Array:
            return readout.losses(arrays, features(variables, pixels), targets)

        self._losses = {
            name: jax.jit(functools.partial(losses, r)) for name, r in self._readouts.items()
        }

    def accuracies(self) -> dict[str, float]:
        """In per cent, by read-out and condition: "knn_clean" and so on."""
        parts, total = [], len(self.images.indices)
        clock = StepTimer(1, total)
        for first in range(0, total, self.batch_size):
            batch = _Batch(
                self.images, np.arange(first, min(first + self.batch_size, total)), self.config
            )
            about = [self.step, total, len(batch.positions), self.train_images]
            finished = Finished(self.folder / f"test_images_{first:06d}.json", about)
            labels = np.array(finished.get("labels", batch.labels))
            part = {
                name: finished.get(name, compute)
                for name, compute in self._conditions(batch, labels)
            }
            parts.append((labels, part))
            done = first + len(batch.positions)
            log(f"{self.name}: {done} of {total} test images  ETA {clock.read(done)[1]}")
        labels = np.concatenate([labels for labels, _ in parts])
        known = labels >= 0
        self.test_images = int(np.sum(known))
        if not self.test_images:
            raise DataError("no test image has a label and can be read")
        found: dict[str, float] = {}
        for readout in READOUTS:
            predictions = {
                name: np.concatenate([np.array(part[name][readout]) for _, part in parts])[known]
                for name in parts[0][1]
            }
            judged = judge_predictions(
                predictions,
                labels[known],
                tuple(self.config.attack.epsilons),
                tuple(self.config.corruptions),
            )
            found |= {f"{readout}_{name}": value for name, value in judged.items()}
        return found

    def _conditions(
        self, batch: "_Batch", labels: np.ndarray
    ) -> Iterator[tuple[str, Callable[[], Predictions]]]:
        """Name of each condition, and a function that gives the read-outs' classes under it."""
        yield "clean", lambda: self._predictions(batch, self._place(batch.pixels))
        for corruption in self.config.corruptions:
            for strength in STRENGTHS:
                yield (
                    f"{corruption}_{strength}",
                    functools.partial(self._corrupted, batch, corruption, strength),
                )
        for epsilon in self.config.attack.epsilons:
            yield f"linf{epsilon:g}", functools.partial(self._under_attack, batch, labels, epsilon)

    def _corrupted(self, batch: "_Batch", name: str, strength: int) -> Predictions:
        return self._predictions(batch, self._place(batch.corrupted(name, strength)))

    def _under_attack(self, batch: "_Batch", labels: np.ndarray, epsilon: float) -> Predictions:
        return {
            name: self._predictions(batch, self._attacked(name, batch, labels, epsilon), only=name)[
                name
            ]
            for name in self._readouts
        }

    def _attacked(
        self, name: str, batch: "_Batch", labels: np.ndarray, epsilon: float
    ) -> jax.Array:
        attack, pixels = self.config.attack, self._place(batch.pixels)
        targets = np.full(len(pixels), -1, np.int32)
        targets[: len(labels)] = self._readouts[name].targets(labels)
        fixed = self._variables, self._arrays[name], jax.device_put(targets, self._whole)
        keys = None
        if attack.random_start:
            numbers = batch.positions[0] + np.arange(len(pixels))
            fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
            keys = jax.device_put(fold(jax.random.key(self.config.seed), numbers), self._whole)
        return attacked(
            lambda point: self._losses[name](*fixed, point),
            pixels,
            epsilon=epsilon,
            steps=attack.steps,
            relative_step=attack.relative_step,
            keys=keys,
        )

    def _place(self, pixels: np.ndarray) -> jax.Array:
        """Return uint8 [n, H, W, 3] as float32 in [0, 1], padded to a batch, rows split."""
        batch = np.zeros((self.batch_size, *pixels.shape[1:]), np.float32)
        batch[: len(pixels)] = pixels / np.float32(GREY_LEVELS)
        return jax.make_array_from_callback(batch.shape, self._rows, lambda index: batch[index])

    def _predictions(self, batch: "_Batch", pixels: jax.Array, only: str = "") -> Predictions:
        """Return the classes of a batch, whose images fill the first rows of `pixels`."""
        features = np.asarray(self._features(self._variables, pixels))[: len(batch.positions)]
        return {
            name: readout.predict(features).tolist()
            for name, readout in self._readouts.items()
            if only in ("", name)
        }


class _Batch:
    """Test images, decoded when first needed: not at all where everything is known."""

    def __init__(self, images: EvalImages, positions: np.ndarray, config: ConfigDict):
        self.images, self.positions, self.config = images, positions, config

    @functools.cached_property
    def pixels(self) -> np.ndarray:
        """uint8 [n, H, W, 3]."""
        return np.stack(self._map(lambda position: self.images.image(int(position))))

    def labels(self) -> list[int]:
        """Of each image, -1 where it does not count."""
        self.pixels  # noqa: B018  which of them cannot be read is known from here on
        labels, readable = self.images.facts(slice(self.positions[0], self.positions[-1] + 1))
        return np.where(readable, labels, -1).tolist()

    def corrupted(self, name: str, strength: int) -> np.ndarray:
        """uint8 [n, H, W, 3]; noise is a function of seed, corruption, strength and image."""

        def one(row: int) -> np.ndarray:
            entropy = (
                self.config.seed,
                zlib.crc32(name.encode()),
                strength,
                int(self.positions[row]),
            )
            return corrupt(
                self.pixels[row], name, strength, np.random.default_rng(entropy), self.config.family
            )

        return np.stack(self._map(one, range(len(self.positions))))

    def _map(self, function: Callable[[Any], np.ndarray], items: Any = None) -> list[np.ndarray]:
        with concurrent.futures.ThreadPoolExecutor(self.config.runtime.threads) as pool:
            return list(pool.map(function, self.positions if items is None else items))


def _panels(config: ConfigDict, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the picture's curves: accuracy against epsilon and corruption strength (mean)."""
    epsilons = sorted(config.attack.epsilons)
    attacks, corruptions = {}, {}
    for network, values in found.items():
        for key, title in READOUTS.items():
            name = f"{title}, {network}"
            attacks[name] = [
                values[f"{key}_clean"],
                *(values[f"{key}_linf{epsilon:g}"] for epsilon in epsilons),
            ]
            by_strength = [
                [values[f"{key}_{c}_{s}"] for c in config.corruptions] for s in STRENGTHS
            ]
            corruptions[name] = [
                values[f"{key}_clean"],
                *(float(np.mean(row)) for row in by_strength if row),
            ]
    panels: dict[str, Any] = {}
    if epsilons:
        panels["attack: epsilon in grey levels of 255"] = ([0, *epsilons], attacks)
    if config.corruptions:
        panels["mean of corruptions: strength"] = ([0, *STRENGTHS], corruptions)
    return panels or {"clean": ([0], attacks)}


def _gallery(config: ConfigDict, image: np.ndarray) -> dict[str, list[np.ndarray]]:
    return {
        name.replace("_", " "): [
            image,
            *(
                corrupt(image, name, strength, np.random.default_rng(strength), config.family)
                for strength in STRENGTHS
            ),
        ]
        for name in config.corruptions
    }


def _markdown(config: ConfigDict, found: dict[str, dict[str, float]], count: int) -> str:
    columns = [(key, network) for key in READOUTS for network in found]
    titles = " | ".join(f"{READOUTS[key]}, {network}" for key, network in columns)
    rows = {"clean": "clean"}
    for epsilon in sorted(config.attack.epsilons):
        rows[f"linf{epsilon:g}"] = f"attack, {epsilon:g} of 255"
    rows |= {name: name.replace("_", " ") for name in config.corruptions}
    if config.corruptions:
        rows["corruption"] = "mean of the corruptions"
    lines = [f"| accuracy (%), {count} test images | {titles} |", "|---" * (1 + len(columns)) + "|"]
    for name, title in rows.items():
        cells = " | ".join(f"{found[network][f'{key}_{name}']:.1f}" for key, network in columns)
        lines.append(f"| {title} | {cells} |")
    return "\n".join([*lines, "", "Of a corruption: the mean of its five strengths."]) + "\n"
