"""Build the objects of a run from its config, finding every mistake before compiling."""

import dataclasses
import logging
import operator

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.console import log
from hexa_jax.core.errors import ConfigError, choose
from hexa_jax.data.augment import Photometric
from hexa_jax.data.crops import DeviceCrops, Resolution
from hexa_jax.data.domains import DOMAINS
from hexa_jax.data.source import Source
from hexa_jax.data.sources import make_source
from hexa_jax.data.subset import Subset, spread
from hexa_jax.evals.health import HIGHER_IS_BETTER
from hexa_jax.methods import METHODS
from hexa_jax.methods.base import LabelsBeforeStep, LabelsFromOutputs, Method, Spec
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.norm import ADVERSARIAL, CLEAN
from hexa_jax.models.resnet import make_resnet
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import Layout, make_mesh
from hexa_jax.storage.loggers import LoggerError, check_loggers
from hexa_jax.training.objective import Objective
from hexa_jax.training.objective_from_outputs import ObjectiveFromOutputs
from hexa_jax.training.step import Trainer
from hexa_jax.views import VIEWS, Attack
from hexa_jax.views.base import OWN_CROP
from hexa_jax.views.scheme import Scheme

PRECISIONS = {
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float32": (jnp.float32, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


# What a config says of sources, and what holds where one of an older run does not say it.
SOURCE_SETTINGS = {"labels": "auto", "image_column": "", "label_column": "", "video_seconds": 1.0}
FLIPS = {"none": (0.0, 0.0), "horizontal": (0.5, 0.0), "vertical": (0.0, 0.5), "both": (0.5, 0.5)}


def open_source(config: ConfigDict, spec: str, labels: str = "") -> Source:
    """Open the source that `spec` names; `labels` in place of `data.labels`."""
    settings = {name: config.data.get(name, default) for name, default in SOURCE_SETTINGS.items()}
    if labels:
        settings["labels"] = labels
    source = make_source(
        spec,
        image_size=config.data.shapes_size,
        num_examples=config.data.shapes_count,
        data_dir=config.runtime.data_dir or None,
        data_cache=config.runtime.data_cache,
        **settings,
    )
    for name in ("labels_note", "skipped_note"):
        if note := getattr(source, name, ""):
            log(note)
    return source


def open_training_source(config: ConfigDict) -> Source:
    """The training examples, `data.limit` of them."""
    source = open_source(config, config.data.source)
    limit = config.data.limit
    return Subset(source, spread(len(source), limit)) if limit and limit < len(source) else source


def make_method(config: ConfigDict) -> Method:
    """The method that `config.method` names, with the settings of the block of its name."""
    method = choose("method", config.method, METHODS)
    if config.method not in config:
        raise ConfigError(
            f"config has no block config.{config.method} with the settings of the method"
        )
    try:
        return method(**config[config.method])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"config.{config.method}: {error}") from None


def make_network(config: ConfigDict, method: Method) -> Network:
    """Build backbone and head.

    The adversarial BatchNorm set exists only where the objective uses it.
    """
    compute_dtype, _ = choose("precision", config.precision, PRECISIONS)
    model = config.model
    auxiliary = make_scheme(config).auxiliary_norm
    backbone = make_resnet(
        model.backbone,
        model.base_channels,
        stem=model.stem,
        dtype=compute_dtype,
        auxiliary_norm=auxiliary,
        zero_init_residual=model.zero_init_residual,
    )
    pixels = tuple(config.data.pixel_mean), tuple(config.data.pixel_std)
    if not method.has_head:
        return Network(backbone, None, *pixels, normalize=False)
    hidden = model.head_hidden or backbone.feature_dim
    head = ProjectionHead(
        hidden,
        model.head_dim,
        model.head_batch_norm,
        compute_dtype,
        auxiliary,
        model.head_layers,
        model.head_output_norm,
    )
    return Network(
        backbone,
        head,
        *pixels,
        predictor=method.make_predictor(model.head_dim, compute_dtype, auxiliary),
    )


def make_resolutions(config: ConfigDict, key_crops: int) -> tuple[Resolution, ...]:
    """Return the crops to learn from; a key crop is taken off the first resolution."""
    data = config.data
    columns = (data.num_crops, data.crop_size, data.min_scale, data.max_scale)
    if len({len(column) for column in columns}) != 1 or not data.num_crops:
        raise ConfigError(
            "data.num_crops, crop_size, min_scale and max_scale need one entry per resolution "
            "each, they have " + ", ".join(str(len(column)) for column in columns)
        )
    counts = (data.num_crops[0] - key_crops, *data.num_crops[1:])
    if min(counts) < 1:
        raise ConfigError(f"data.num_crops={tuple(data.num_crops)} leaves no crop to learn from")
    for low, high in zip(data.min_scale, data.max_scale, strict=True):
        if not 0 < low <= high <= 1:
            raise ConfigError(
                f"crop scales are shares of the image with 0 < min <= max <= 1, not {low} and "
                f"{high}"
            )
    ratio = tuple(data.aspect_ratio)
    if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < float("inf"):
        raise ConfigError(f"data.aspect_ratio={ratio} must be (low, high) with 0 < low <= high")
    flip, vertical_flip = choose("data.flip", data.flip, FLIPS)
    return tuple(
        Resolution(count, size, (low, high), ratio, flip, vertical_flip, bool(data.quarter_turns))
        for count, size, low, high in zip(
            counts, data.crop_size, data.min_scale, data.max_scale, strict=True
        )
    )


def make_photometric(config: ConfigDict) -> tuple[Photometric, ...]:
    """One augmentation per crop, the key crop last."""
    augment, crops = config.augment, sum(config.data.num_crops)

    def of_crop(name: str, crop: int) -> float:
        values = getattr(augment, name)
        if len(values) not in (1, crops):
            raise ConfigError(
                f"augment.{name} has {len(values)} entries for {crops} crops: give one, or one per "
                "crop"
            )
        return float(values[crop if len(values) > 1 else 0])

    return tuple(
        Photometric(
            jitter_probability=of_crop("jitter_probability", crop),
            brightness=augment.brightness,
            contrast=augment.contrast,
            saturation=augment.saturation,
            hue=augment.hue,
            gray_probability=of_crop("gray_probability", crop),
            blur_probability=of_crop("blur_probability", crop),
            blur_sigma=tuple(augment.blur_sigma),
            solarize_probability=of_crop("solarize_probability", crop),
        )
        for crop in range(crops)
    )


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optim.Schedule:
    """Learning rate as a function of the step."""
    o, epochs = config.optimizer, config.epochs
    choose("optimizer.schedule", o.schedule, dict.fromkeys(("epoch_cosine", "cosine", "steps")))
    if o.schedule == "epoch_cosine":
        return optim.epoch_cosine(o.learning_rate, epochs, steps_per_epoch)
    if o.schedule == "cosine" and o.warmup_epochs > epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={o.warmup_epochs} is longer than the run, epochs={epochs}: "
            "the learning rate would "
            "never be reached"
        )
    if o.schedule == "steps":
        return optim.epoch_steps(o.learning_rate, o.milestones, o.decay, steps_per_epoch)
    return optim.warmup_cosine(
        o.learning_rate,
        o.final_learning_rate,
        epochs * steps_per_epoch,
        int(o.warmup_epochs * steps_per_epoch),
        o.warmup_start,
    )


def make_optimizer(config: ConfigDict, steps_per_epoch: int) -> optax.GradientTransformation:
    """The optimiser that `optimizer.name` says, with the config's schedule."""
    o, schedule = config.optimizer, make_schedule(config, steps_per_epoch)
    makers = {
        "sgd": lambda: optim.sgd(schedule, o.momentum, o.weight_decay),
        "larc": lambda: optim.larc(schedule, o.momentum, o.weight_decay, o.trust_coefficient),
        "lars": lambda: optim.lars(schedule, o.momentum, o.weight_decay, o.trust_coefficient),
        "adam": lambda: optim.adam(schedule, o.weight_decay),
    }
    return choose("optimizer.name", o.name, makers)()


def make_scheme(config: ConfigDict, steps_per_epoch: int = 1) -> Scheme:
    """Equation 10's terms and the attack, grey levels turned into pixels of [0, 1]."""
    v = config.views
    norm_set = choose(
        "views.attack_norm", v.attack_norm, {name: name for name in (CLEAN, ADVERSARIAL)}
    )
    choose("views.norm", v.norm, {name: name for name in ("linf", "l2")})
    try:
        attack = Attack(
            epsilon=v.epsilon / 255,
            step_size=v.step_size / 255,
            steps=v.steps,
            norm=v.norm,
            random_start=v.random_start,
            norm_set=norm_set,
            share_gradient=v.share_gradient,
            max_increase=v.max_increase,
        )
    except ValueError as error:
        raise ConfigError(f"config.views: {error}") from None
    named = scheme_views(config.scheme)
    views = []
    for name, view in VIEWS.items():
        if name not in v:  # a view of the program's own, in a config without it
            if named and name in named:
                raise ConfigError(
                    f"config.scheme names the view {name}, but there is no block "
                    f"config.views.{name}"
                )
            continue
        settings = dict(v[name])
        if named is not None:  # the scheme says which views there are, the weights what they count
            settings["weight"] = (settings.get("weight") or 1.0) if name in named else 0.0
        try:
            made = view(**settings)  # also where it is not used: a mistake is a mistake
        except (ValueError, TypeError) as error:
            raise ConfigError(f"config.{error}") from None
        views += [made] if made.weight else []
    try:
        return Scheme(tuple(views), attack, v.average, steps_per_epoch)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def scheme_views(scheme: str) -> set[str] | None:
    """Return the views in a sum such as "std+adv+cmx"; None for "": the weights decide."""
    if not scheme:
        return None
    if scheme == "all":  # of Fig. 2
        scheme = "std+adv+cmx+cmxA"
    known = {view.scheme_name: view.name for view in VIEWS.values()}
    first, *names = scheme.split("+")
    unknown = [name for name in names if name not in known] if first == "std" else [first]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(
            f"config.scheme={scheme!r} is not known: use all, or std with any of "
            f"+{', +'.join(known)}, each once"
        )
    return {known[name] for name in names}


# The schemes of Fig. 2.
SCHEMES = ("std", "std+adv", "std+cmx", "std+adv+cmx", "std+adv+cmxA", "all")


def make_devices(config: ConfigDict) -> list[jax.Device]:
    """The devices to run on: all, or the first `runtime.num_devices`."""
    devices, wanted = jax.devices(), config.runtime.num_devices
    if wanted > len(devices):
        raise ConfigError(f"runtime.num_devices={wanted}, but there are {len(devices)}")
    if wanted and wanted < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            f"runtime.num_devices={wanted}: several processes use all {len(devices)} devices"
        )
    return devices[:wanted] if wanted else devices


POSITIVE = (
    "batch_size", "epochs", "shuffle_block", "model.base_channels", "model.head_dim", "model.head_layers",
    "moco.queue_size", "moco.temperature", "deepcluster.num_clusters", "deepcluster.num_heads", "deepcluster.assign_crops",
    "deepcluster.iterations", "deepcluster.temperature", "simclr.temperature", "swav.num_prototypes", "swav.assign_crops",
    "swav.temperature", "swav.epsilon", "swav.iterations", "knn.neighbours", "knn.temperature", "knn.resize", "knn.crop",
    "runtime.log_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "model.head_hidden", "swav.queue_length", "swav.queue_start_epoch", "swav.freeze_steps",
    "data.limit", "data.max_bad_fraction", "knn.every_epochs", "linear.every_epochs", "knn.train_limit",
    "knn.test_limit", "runtime.num_devices", "runtime.workers", "runtime.checkpoint_every", "runtime.keep_every",
)  # fmt: skip


def _check_ranges(config: ConfigDict) -> None:
    try:
        check_loggers(config.runtime.get("loggers", ()))  # older runs have others
    except LoggerError as error:
        raise ConfigError(str(error)) from None
    if config.data.domain:
        choose("data.domain", config.data.domain, DOMAINS)
    choose("data.normalization", config.data.normalization, dict.fromkeys(("fixed", "measured")))
    choose("eval_statistics", config.eval_statistics, dict.fromkeys(("running", "reestimated")))
    if "health" in config:  # not in runs of before it was there
        _check_health(config)
    for names, wanted, lowest in ((POSITIVE, "positive", 1e-12), (NOT_NEGATIVE, "0 or more", 0)):
        for name in names:
            if (value := operator.attrgetter(name)(config)) < lowest:
                raise ConfigError(f"config.{name}={value} must be {wanted}")
    if config.seed >= 2**32:
        raise ConfigError(f"config.seed={config.seed} must be below 2^32")
    if min(config.data.crop_size, default=1) < 1:
        raise ConfigError(f"config.data.crop_size={tuple(config.data.crop_size)} must be positive")


def _check_health(config: ConfigDict) -> None:
    health, best = config.health, config.runtime.keep_best
    for name, lowest in (("images", 3), ("every_epochs", 0)):
        if health[name] < lowest:
            raise ConfigError(f"config.health.{name}={health[name]} must be {lowest} or more")
    choose("runtime.keep_best", best, dict.fromkeys(("", *HIGHER_IS_BETTER)))
    if best and not health.every_epochs:
        raise ConfigError(f"config.runtime.keep_best={best} needs health.every_epochs of 1 or more")


def _view_warnings(config: ConfigDict, scheme: Scheme) -> list[str]:
    """Return a line for each view whose settings change nothing."""
    lines = []
    for view in scheme.views:
        if scheme.start_step(view) >= config.epochs * scheme.steps_per_epoch:
            lines.append(
                f"views.{view.name} is never used: its start_epoch={view.start_epoch:g} is not "
                "before the end of the run, "
                f"epochs={config.epochs}"
            )
    used = {view.name for view in scheme.views}
    for name in sorted(VIEWS.keys() - used):
        defaults = {
            field.name: field.default
            for field in dataclasses.fields(VIEWS[name])
            if field.name != "weight"
        }
        block = config.views.get(name, {})
        ignored = [
            f"{key}={block[key]}"
            for key in sorted(block)
            if key in defaults and block[key] != defaults[key]
        ]
        if ignored:
            remedy = (
                f"+{VIEWS[name].scheme_name} in config.scheme"
                if config.scheme
                else "a weight above 0"
            )
            lines.append(
                f"views.{name} is not used, so {', '.join(ignored)} changes nothing: it needs "
                f"{remedy}"
            )
    return lines


def _warn(config: ConfigDict, scheme: Scheme, method: Method, layout: Layout, spec: Spec) -> None:
    """Log settings that work, but hardly as they are meant."""
    lines = [*_view_warnings(config, scheme), *method.warnings(spec)]
    if method.key_crops and layout.bn_group_size >= layout.shuffle_block:
        lines.append(
            "shuffle-BN does nothing: keys are shuffled among "
            f"shuffle_block={layout.shuffle_block} rows, which share their "
            f"BatchNorm statistics anyway (bn_group_size={layout.bn_group_size}); use a smaller "
            "bn_group_size, 32 for example"
        )
    for line in lines:
        if processes.is_main_process():
            logging.warning(line)


def _check_views(scheme: Scheme, method: Method, layout: Layout) -> None:
    """Raises ConfigError, one line, where a view does not suit the method or the rows."""
    for view in scheme.views:
        if view.target == OWN_CROP and not method.pairs_own_crop:
            able = ", ".join(name for name, other in METHODS.items() if other.pairs_own_crop)
            raise ConfigError(
                f"views.{view.name}.target={OWN_CROP} is for methods with embeddings as labels: "
                f"{able}"
            )
        rows = view.replace * layout.unit if view.replace else 0
        if abs(rows - round(rows)) > 1e-9:
            raise ConfigError(
                f"views.{view.name}.replace={view.replace} is no whole number of every "
                f"{layout.unit} rows (bn_group_size "
                f"and cutmix_block decide): use a multiple of {1 / layout.unit:g}"
            )


def make_trainer(
    config: ConfigDict,
    num_examples: int,
    devices: list[jax.Device] | None = None,
    num_classes: int | None = None,
) -> Trainer:
    """Everything a pre-training run computes with.

    Args:
        config: see configs/common.py.
        num_examples: size of the data set.
        devices: to run on; by default what the config says.
        num_classes: of the data set, for methods that learn from labels; None without labels.

    Raises:
        ConfigError: sizes or names that cannot work, in one line.
    """
    _check_ranges(config)
    if config.batch_size > num_examples:
        raise ConfigError(
            f"batch_size={config.batch_size} is more than the {num_examples} images: use a smaller "
            "one"
        )
    method = make_method(config)
    resolutions = make_resolutions(config, method.key_crops)
    devices = make_devices(config) if devices is None else devices
    steps_per_epoch = num_examples // config.batch_size
    scheme = make_scheme(config, steps_per_epoch)
    layout = Layout(
        batch_size=config.batch_size,
        microbatches=config.runtime.microbatches or 1,  # 0: `fit_memory` replaces it
        num_devices=len(devices),
        bn_group_size=config.bn_group_size,
        cutmix_block=config.cutmix_block
        if scheme.mixes or any(v.replace for v in scheme.views)
        else 0,
        shuffle_block=config.shuffle_block if method.key_crops else 0,
    )
    _, param_dtype = choose("precision", config.precision, PRECISIONS)
    try:
        network, photometric = make_network(config, method), make_photometric(config)
        spec = Spec(
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            num_examples=num_examples,
            embedding_dim=config.model.head_dim if network.head else network.backbone.feature_dim,
            num_crops=tuple(resolution.count for resolution in resolutions),
            total_steps=config.epochs * steps_per_epoch,
            num_classes=num_classes,
            # Methods of the other kind make labels from the clean outputs of all rows.
            clean_share=1 - scheme.replaced if isinstance(method, LabelsBeforeStep) else 1.0,
            turned=bool(config.data.quarter_turns) or config.data.flip == "both",
        )
        method.check(spec)
        method = method.for_run(spec)
        layout.check()
        _check_views(scheme, method, layout)
        _warn(config, scheme, method, layout, spec)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    crops = DeviceCrops(resolutions, method.key_crops, photometric, param_dtype)
    if isinstance(method, LabelsFromOutputs):
        objective: Objective = ObjectiveFromOutputs(network, method, scheme, layout, crops)
    else:
        objective = Objective(network, method, scheme, layout, crops)
    optimizer = make_optimizer(config, spec.steps_per_epoch)
    return Trainer(objective, optimizer, spec, make_mesh(devices), param_dtype)
