"""The networks that an evaluation compares: a checkpoint and its random twin."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from hexa_jax.evals.backbone import RANDOM

PRETRAINED = "pre-trained"


def networks(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return configs by name: the evaluation's own, and that of random weights if asked for.

    A checkpoint of random weights is called "random" and stands alone.
    """
    if config.checkpoint == RANDOM:
        return {RANDOM: config}
    judged = {PRETRAINED: config}
    if config.with_random:
        other = config.copy_and_resolve_references()
        other.checkpoint, other.random.like = RANDOM, config.checkpoint
        judged[RANDOM] = other
    return judged


def suffixed(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Flatten numbers by network and name; those of random weights end in "_random"."""
    main = next(iter(found))
    return {
        name if network == main else f"{name}_{network}": value
        for network, values in found.items()
        for name, value in values.items()
    }
