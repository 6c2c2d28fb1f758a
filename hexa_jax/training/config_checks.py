"""What no class of a run can check or tell alone: lone settings, and settings that meet others."""

import dataclasses
import logging
import operator

from ml_collections import ConfigDict

from hexa_jax.core.errors import ConfigError, as_config_error, choose
from hexa_jax.data.domains import DOMAINS
from hexa_jax.evals.health import HIGHER_IS_BETTER
from hexa_jax.methods import METHODS
from hexa_jax.methods.base import Method, Spec
from hexa_jax.parallel import processes
from hexa_jax.parallel.mesh import Layout
from hexa_jax.storage.loggers import check_loggers
from hexa_jax.views import VIEWS
from hexa_jax.views.base import OWN_CROP
from hexa_jax.views.scheme import Scheme

# Settings that are no field of a class which checks its own.
POSITIVE = (
    "batch_size", "epochs", "shuffle_block", "model.base_channels", "model.head_dim",
    "model.head_layers", "knn.neighbours", "knn.temperature", "knn.resize", "knn.crop",
    "runtime.log_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "seed", "model.head_hidden", "data.limit", "data.max_bad_fraction", "knn.every_epochs",
    "linear.every_epochs", "knn.train_limit", "knn.test_limit", "runtime.num_devices",
    "runtime.workers", "runtime.checkpoint_every", "runtime.keep_every",
)  # fmt: skip


def check_settings(config: ConfigDict) -> None:
    """Check the settings of a pre-training run that no class of its own checks.

    Raises:
        ConfigError: one of them cannot work.
    """
    with as_config_error():
        check_loggers(config.runtime.get("loggers", ()))  # older runs have others
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


def check_views(scheme: Scheme, method: Method, layout: Layout) -> None:
    """Check that each view suits the method and the rows of a step.

    Raises:
        ConfigError: one does not.
    """
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
                f"{layout.unit} rows (bn_group_size and cutmix_block decide): use a multiple of "
                f"{1 / layout.unit:g}"
            )


def warn(config: ConfigDict, scheme: Scheme, method: Method, layout: Layout, spec: Spec) -> None:
    """Log settings that work, but hardly as they are meant."""
    if not processes.is_main_process():
        return
    lines = [*_late_views(config, scheme), *_ignored_views(config, scheme), *method.warnings(spec)]
    if method.key_crops and layout.bn_group_size >= layout.shuffle_block:
        lines.append(
            "shuffle-BN does nothing: keys are shuffled among "
            f"shuffle_block={layout.shuffle_block} rows, which share their BatchNorm statistics "
            f"anyway (bn_group_size={layout.bn_group_size}); use a smaller bn_group_size, 32 for "
            "example"
        )
    for line in lines:
        logging.warning(line)


def _late_views(config: ConfigDict, scheme: Scheme) -> list[str]:
    """Return a line for each view that starts after the end of the run."""
    return [
        f"views.{view.name} is never used: its start_epoch={view.start_epoch:g} is not before the "
        f"end of the run, epochs={config.epochs}"
        for view in scheme.views
        if scheme.start_step(view) >= config.epochs * scheme.steps_per_epoch
    ]


def _ignored_views(config: ConfigDict, scheme: Scheme) -> list[str]:
    """Return a line for each view that is not used though it has settings of its own."""
    lines = []
    for name in sorted(VIEWS.keys() - {view.name for view in scheme.views}):
        kind, block = VIEWS[name], config.views.get(name, {})
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        changed = [
            f"{key}={value}"
            for key, value in sorted(block.items())
            if key != "weight" and key in defaults and value != defaults[key]
        ]
        remedy = f"+{kind.scheme_name} in config.scheme" if config.scheme else "a weight above 0"
        if changed:
            lines.append(
                f"views.{name} is not used, so {', '.join(changed)} changes nothing: it needs "
                f"{remedy}"
            )
    return lines
