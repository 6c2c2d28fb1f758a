"""config.task = "detection": train Faster R-CNN on a pre-trained backbone, and test it.

By COCO's and VOC's average precision.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.console import StepTimer, log
from hexa_jax.core.errors import ConfigError, choose
from hexa_jax.core.preemption import PreemptionGuard
from hexa_jax.data.source import DataError
from hexa_jax.detection.batches import EvaluationBatches, TrainingBatches
from hexa_jax.detection.data import DetectionSource, open_detection
from hexa_jax.detection.detector import Detector
from hexa_jax.detection.metrics import Detections, coco_metrics, voc_metrics
from hexa_jax.detection.names import Saved, detector_from_torchvision, read_detector, write_detector
from hexa_jax.detection.pictures import picture_detections
from hexa_jax.detection.rcnn import FasterRCNN
from hexa_jax.detection.training import (
    BATCH_NORMS,
    STATS,
    DetectorState,
    Frozen,
    make_detect,
    make_optimizer,
    make_step,
)
from hexa_jax.evals.backbone import IMAGENET_MEAN, IMAGENET_STD, RANDOM, Backbone
from hexa_jax.evals.tasks.labelled import open_backbone
from hexa_jax.evals.tasks.training_loop import TrainingLoop
from hexa_jax.models.resnet import make_resnet
from hexa_jax.models.weights import WeightsError, architecture_of
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import make_mesh
from hexa_jax.report.pictures import curves
from hexa_jax.storage.workdir import write_json
from hexa_jax.training.factory import PRECISIONS, make_devices

PICTURED = 12  # images with their detections
EXPORT = "detector.safetensors"


def detection(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Train or resume, then test; with no steps to train, only test.

    Raises:
        CheckpointError, WeightsError: no usable weights where the config says.
        DataError: images or annotations that cannot be used.
        ConfigError: settings that cannot work.
        Diverged: the loss became NaN or infinite.
        Terminated: SIGTERM arrived; the state is saved.
    """
    run = _Detection(config, workdir)
    with jax.set_mesh(run.mesh):
        return run.run()


class _Detection:
    def __init__(self, config: ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        _check(config)
        self.mesh = make_mesh(make_devices(config))
        self.saved = read_detector(config.detector) if config.detector else None
        self.backbone = None if self.saved else open_backbone(config)
        self.trains = config.epochs > 0 or config.steps > 0
        data_dir = config.runtime.data_dir or None
        names = self.saved.class_names if self.saved else None
        if self.trains:
            self.source = _opened(config, "source", data_dir, names, config.data.limit)
            self.batches = TrainingBatches(config, self.source, self.mesh)
            names = self.source.class_names
        self.held_out = _opened(config, "eval_source", data_dir, names, 0)
        self.class_names = self.held_out.class_names
        if self.saved:
            _check_classes(config.detector, self.saved, self.class_names)
        self.model = make_model(
            config, self._resnet(), len(self.class_names), *self._pixel_statistics()
        )
        self.detect = make_detect(self.model, self.mesh)
        self.test_batches = EvaluationBatches(config, self.held_out, self.mesh)

    def run(self) -> dict[str, Any]:
        state = self._initial()
        history: list[dict[str, float]] = []
        if self.trains:
            state, history = self._train(state)
        results = self._test(state, pictures=True)
        if processes.is_main_process():
            about = {"mean": self.model.network.pixel_mean, "std": self.model.network.pixel_std}
            write_detector(self.workdir / EXPORT, _variables(state), self.class_names, **about)
            if history:
                series = {
                    name: [entry[name] for entry in history] for name in ("AP", "AP50", "AP75")
                }
                curves(
                    series,
                    "tests during training",
                    "average precision in %",
                    self.workdir / "report" / "curves.png",
                )
        results |= {"steps": int(state.step), "test_images": len(self.held_out)}
        results |= {"train_images": len(self.source)} if self.trains else {}
        write_json(self.workdir / "result.json", results)
        log(
            f"detection: AP {results['AP']:.1f}, AP50 {results['AP50']:.1f}, AP75 "
            f"{results['AP75']:.1f}, VOC's AP50 {results['VOC_AP50']:.1f}"
        )
        return results

    def _train(self, state: DetectorState) -> tuple[DetectorState, list[dict[str, float]]]:
        config, batches = self.config, self.batches
        log(f"to train on: {self.source.summary()}")
        if batches.images_over_max_boxes:
            log(
                f"{batches.images_over_max_boxes} images have more than "
                f"data.max_boxes={config.data.max_boxes} boxes"
            )
        shapes = len(batches.canvases.all)
        log(
            f"{shapes} shapes of images at most: so many compilations of the step, when each first "
            "occurs"
        )
        total = config.steps or config.epochs * batches.steps_per_epoch
        optimizer = make_optimizer(
            make_base_optimizer(config, batches.steps_per_epoch), self._frozen()
        )
        state = jax.device_put(
            state._replace(opt_state=optimizer.init(state.params)), NamedSharding(self.mesh, P())
        )
        every, epochs = config.eval_every_epochs, set[int]()

        def evaluate(state: DetectorState, epoch: float) -> dict[str, float]:
            last = int(state.step) == total
            if not every or last or int(epoch) % every or int(epoch) in epochs:
                return {}
            epochs.add(int(epoch))
            return {
                name: value
                for name, value in self._test(state).items()
                if name in ("AP", "AP50", "AP75")
            }

        loop = TrainingLoop(
            config=config,
            folder=self.workdir,
            total=total,
            steps_per_epoch=batches.steps_per_epoch,
            step=make_step(self.model, optimizer, self._frozen(), self.mesh, config.batch_size),
            batches=lambda step: batches.after(step, total),
            evaluate=evaluate,
            advice="try a lower optimizer.learning_rate or more optimizer.warmup_steps",
        )
        stop = PreemptionGuard()
        try:
            return loop.run(state, stop)
        finally:
            stop.close()

    def _test(self, state: DetectorState, pictures: bool = False) -> dict[str, float]:
        """Average precision on the held-out images, in per cent."""
        found: list[Any] = [None] * len(self.held_out)
        clock, done, batches = StepTimer(1, len(self.held_out)), 0, self.test_batches
        clock.start(0)
        for number, (batch, rows) in enumerate(batches, 1):
            detected = jax.tree.map(np.asarray, self.detect(state.params, state.stats, batch))
            for row in np.flatnonzero(rows.index >= 0).tolist():
                real = detected.labels[row] >= 0
                boxes = rows.to_original(row, detected.boxes[row][real])
                found[rows.index[row]] = Detections(
                    boxes, detected.scores[row][real], detected.labels[row][real]
                )
                done += 1
            if number % self.config.runtime.log_every == 0:
                speed, left = clock.read(done)
                log(
                    f"test: {done} of {len(self.held_out)} images  {speed:.3g} images/s  ETA {left}"
                )
        truths = [self.held_out.truth(index) for index in range(len(self.held_out))]
        results = coco_metrics(truths, found, self.class_names) | voc_metrics(
            truths, found, self.class_names
        )
        if pictures:
            log(f"tested on: {self.held_out.summary()}")
            results["VOC07_AP50"] = voc_metrics(truths, found, self.class_names, eleven_point=True)[
                "VOC_AP50"
            ]
            if processes.is_main_process():
                folder = self.workdir / "report"
                folder.mkdir(exist_ok=True)
                picture_detections(self.held_out, found, PICTURED, folder / "detections.png")
        # not those of absent classes
        return {name: value for name, value in results.items() if np.isfinite(value)}

    def _initial(self) -> DetectorState:
        """Return weights of the file or the pre-trained backbone; the rest is drawn.

        As torchvision and detectron2 draw it.
        """
        config, network = self.config, self.model.network
        image, size = jnp.zeros((1, 64, 64, 3)), jnp.full((1, 2), 64, jnp.int32)
        if self.saved:
            like = jax.eval_shape(lambda: network.init(jax.random.key(0), image, size))
            try:
                variables = detector_from_torchvision(
                    self.saved.arrays, like, config.model.batch_norm_epsilon
                )
            except WeightsError as error:
                raise WeightsError(f"{config.detector}: {error}") from None
        else:
            assert self.backbone is not None
            variables = dict(
                jax.jit(lambda key: network.init(key, image, size))(jax.random.key(config.seed))
            )
            pretrained = self.backbone.variables
            for name in ("params", STATS):
                variables[name] = {**variables[name], "backbone": pretrained[name]["backbone"]}
        _, stored = choose("precision", config.precision, PRECISIONS)
        params, stats = jax.tree.map(
            lambda leaf: jnp.array(leaf, stored), (variables["params"], variables[STATS])
        )
        state = DetectorState(jnp.uint32(config.seed), jnp.int32(0), params, stats, None)
        return jax.device_put(state, NamedSharding(self.mesh, P()))

    def _resnet(self) -> Any:
        config = self.config
        compute, _ = choose("precision", config.precision, PRECISIONS)
        if self.backbone:
            resnet = self.backbone.network.backbone.clone(dtype=compute)
        else:
            assert self.saved is not None
            depth, channels, stem = architecture_of(self.saved.body)
            resnet = make_resnet(f"resnet{depth}", channels, stem=stem, dtype=compute)
        if resnet.stem != "imagenet":
            raise ConfigError(
                f"{config.detector or config.checkpoint} has a backbone with the {resnet.stem} "
                "stem: the pyramid needs maps of strides 4 to 32, which only the imagenet stem "
                "gives"
            )
        return resnet

    def _pixel_statistics(self) -> tuple[Any, Any]:
        network = self.backbone.network if isinstance(self.backbone, Backbone) else None
        if network:
            return network.pixel_mean, network.pixel_std
        assert self.saved is not None
        return tuple(self.saved.about.get("mean", IMAGENET_MEAN)), tuple(
            self.saved.about.get("std", IMAGENET_STD)
        )

    def _frozen(self) -> Frozen:
        return Frozen(self.config.model.frozen_stages, self.config.model.batch_norm == "frozen")


def _variables(state: DetectorState) -> dict[str, Any]:
    return {"params": state.params, STATS: state.stats}


def _check(config: ConfigDict) -> None:
    model = config.model
    choose("model.batch_norm", model.batch_norm, dict.fromkeys(BATCH_NORMS))
    if not 0 <= model.frozen_stages <= 5:
        raise ConfigError(
            f"model.frozen_stages={model.frozen_stages} must be 0 (nothing) to 5 (stem and all "
            "stages)"
        )
    if config.checkpoint == RANDOM and not config.detector and model.batch_norm == "frozen":
        raise ConfigError(
            "random weights have no running statistics: a frozen BatchNorm would not normalise; "
            "use model.batch_norm=synchronised and model.frozen_stages=0"
        )
    if config.detector and config.checkpoint:
        raise ConfigError("config.detector is a whole detector: leave config.checkpoint empty")
    if config.epochs < 0 or config.steps < 0:
        raise ConfigError("epochs and steps must not be negative")
    if not (config.epochs or config.steps or config.detector):
        raise ConfigError("epochs=0 and steps=0 only test, and there is no config.detector to test")
    if len(model.anchor_sizes) != 5 or min(model.anchor_sizes) <= 0:
        raise ConfigError(
            "model.anchor_sizes takes five positive numbers, one per level of the pyramid"
        )


def _opened(
    config: ConfigDict,
    name: str,
    data_dir: str | None,
    class_names: Sequence[str] | None,
    limit: int,
) -> DetectionSource:
    if not config.data[name]:
        raise ConfigError(f"data.{name} is empty: use voc:VOCDEVKIT[:SPLIT] or tfds:voc/2007:SPLIT")
    return open_detection(config.data[name], data_dir, class_names, limit)


def _check_classes(path: str, saved: Saved, class_names: Sequence[str]) -> None:
    if saved.num_classes != len(class_names):
        raise DataError(
            f"{path} knows {saved.num_classes} classes, the data has {len(class_names)}"
        )


def make_model(
    config: ConfigDict, resnet: Any, num_classes: int, mean: Any, std: Any
) -> FasterRCNN:
    """Build a config's detector around a backbone; mean and deviation of pixels in [0, 1]."""
    model = config.model
    network = Detector(
        resnet,
        num_classes,
        tuple(mean),
        tuple(std),
        frozen_stages=model.frozen_stages,
        dim=model.dim,
        hidden=model.hidden,
        pyramid_norm=model.pyramid_norm,
        head_norm=model.head_norm,
        dtype=choose("precision", config.precision, PRECISIONS)[0],
    )
    return FasterRCNN(
        network,
        anchor_sizes=tuple(model.anchor_sizes),
        train_proposals=tuple(model.train_proposals),
        test_proposals=tuple(model.test_proposals),
        regions=model.regions,
    )


def make_base_optimizer(config: ConfigDict, steps_per_epoch: int) -> Any:
    """SGD with the config's schedule, for the parameters that are trained."""
    o = config.optimizer
    unit = 1 if config.steps else steps_per_epoch
    schedule = optim.warmed_up(
        optim.epoch_steps(o.learning_rate, o.milestones, o.decay, unit),
        o.warmup_steps,
        o.warmup_start,
    )
    return optim.sgd(schedule, o.momentum, o.weight_decay)
