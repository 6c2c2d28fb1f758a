"""Build the objects of a run from its config, finding every mistake before compiling."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hexa_jax import optim
from hexa_jax.core.errors import ConfigError, as_config_error, choose, make_from_block
from hexa_jax.data.augment import Photometric
from hexa_jax.data.crops import FLIPS, DeviceCrops, Resolution
from hexa_jax.methods import METHODS
from hexa_jax.methods.base import LabelsBeforeStep, LabelsFromOutputs, Method, Spec
from hexa_jax.models.heads import Network, ProjectionHead
from hexa_jax.models.resnet import make_resnet
from hexa_jax.parallel.mesh import Layout, make_mesh
from hexa_jax.training.config_checks import check_settings, check_views, warn
from hexa_jax.training.objective import Objective
from hexa_jax.training.objective_from_outputs import ObjectiveFromOutputs
from hexa_jax.training.schemes import make_scheme
from hexa_jax.training.step import Trainer
from hexa_jax.views.scheme import Scheme

PRECISIONS = {
    "bfloat16": (jnp.bfloat16, jnp.float32),
    "float32": (jnp.float32, jnp.float32),
    "float64": (jnp.float64, jnp.float64),
}


def make_method(config: ConfigDict) -> Method:
    """The method that `config.method` names, with the settings of the block of its name.

    Raises:
        ConfigError: settings that cannot work, also of a method that is not used.
    """
    choose("method", config.method, METHODS)
    if config.method not in config:
        raise ConfigError(
            f"config has no block config.{config.method} with the settings of the method"
        )
    blocks = {name: kind for name, kind in METHODS.items() if name in config}
    methods = {name: make_from_block(kind, name, config[name]) for name, kind in blocks.items()}
    return methods[config.method]


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
    ratio, (flip, vertical_flip) = tuple(data.aspect_ratio), choose("data.flip", data.flip, FLIPS)
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
            "the learning rate would never be reached"
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


def make_layout(config: ConfigDict, method: Method, scheme: Scheme, num_devices: int) -> Layout:
    """How the rows of a step are divided, not yet checked."""
    has_partners = scheme.mixes or any(view.replace for view in scheme.views)
    return Layout(
        batch_size=config.batch_size,
        microbatches=config.runtime.microbatches or 1,  # 0: `fit_memory` replaces it
        num_devices=num_devices,
        bn_group_size=config.bn_group_size,
        cutmix_block=config.cutmix_block if has_partners else 0,
        shuffle_block=config.shuffle_block if method.key_crops else 0,
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
    check_settings(config)
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
    layout = make_layout(config, method, scheme, len(devices))
    _, param_dtype = choose("precision", config.precision, PRECISIONS)
    with as_config_error():
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
    check_views(scheme, method, layout)
    warn(config, scheme, method, layout, spec)
    crops = DeviceCrops(resolutions, method.key_crops, photometric, param_dtype)
    if isinstance(method, LabelsFromOutputs):
        objective: Objective = ObjectiveFromOutputs(network, method, scheme, layout, crops)
    else:
        objective = Objective(network, method, scheme, layout, crops)
    optimizer = make_optimizer(config, steps_per_epoch)
    return Trainer(objective, optimizer, spec, make_mesh(devices), param_dtype)
