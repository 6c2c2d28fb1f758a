"""Open the sources that a config names."""

from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.data.source import Source
from hexa_jax.data.sources import make_source
from hexa_jax.data.subset import Subset, spread

# What a config says of sources, and what holds where one of an older run does not say it.
SOURCE_SETTINGS = {"labels": "auto", "image_column": "", "label_column": "", "video_seconds": 1.0}


def open_source(config: ConfigDict, spec: str, labels: str = "") -> Source:
    """Open the source that `spec` names; `labels` in place of `data.labels`.

    Raises:
        DataError: nothing usable is there.
    """
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
    """The training examples, `data.limit` of them.

    Raises:
        DataError: nothing usable is there.
    """
    source = open_source(config, config.data.source)
    limit = config.data.limit
    return Subset(source, spread(len(source), limit)) if limit and limit < len(source) else source
