"""Augmentation for kinds of images that are no photographs of things: presets of config keys.

They are starting points from what is true of such images, and none was tuned by experiment.
"""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from hexa_jax.core.errors import choose

# Seen from above there is no up: mirrored and turned images are as good as the original.
_FROM_ABOVE = {"data.flip": "both", "data.quarter_turns": True}

DOMAINS: dict[str, dict[str, Any]] = {
    # Photographs of things and scenes, which stand upright; colors as in the recipe.
    "natural": {"data.flip": "horizontal", "data.quarter_turns": False},
    # Satellites and drones. Color tells water from crops and soil: it is distorted less, and rarely
    # taken away.
    "aerial": {
        **_FROM_ABOVE,
        "augment.brightness": 0.4,
        "augment.contrast": 0.4,
        "augment.saturation": 0.2,
        "augment.hue": 0.05,
        "augment.gray_probability": (0.1,),
        "augment.solarize_probability": (0.0,),
    },
    # Cells and tissue. Stains differ between laboratories, so that hue varies, but they say what is
    # what: no gray.
    "microscopy": {
        **_FROM_ABOVE,
        "augment.brightness": 0.3,
        "augment.contrast": 0.3,
        "augment.saturation": 0.3,
        "augment.hue": 0.05,
        "augment.gray_probability": (0.0,),
        "augment.solarize_probability": (0.0,),
    },
    # X-ray, infrared, electron microscopes, scans: without color, operations on it do nothing but
    # take time.
    "grey": {
        "augment.brightness": 0.4,
        "augment.contrast": 0.4,
        "augment.saturation": 0.0,
        "augment.hue": 0.0,
        "augment.gray_probability": (0.0,),
    },
}


def set_domain(config: ConfigDict, name: str, keep: Collection[str] = ()) -> ConfigDict:
    """Set a config's augmentation to a preset; return the config.

    A command does this where it says `--config.data.domain=NAME` (`hexa pretrain --domain=NAME`).
    Setting `config.data.domain` in Python changes nothing by itself; a config file or a program
    calls this: `config = set_domain(get_config(), "aerial")`.

    Args:
        config: see configs/common.py.
        name: one of `DOMAINS`.
        keep: dotted keys that stay as they are.

    Raises:
        ConfigError: there is no such preset.
    """
    preset = choose("data.domain", name, DOMAINS)
    config.update_from_flattened_dict(
        {key: value for key, value in preset.items() if key not in keep}
    )
    return config
