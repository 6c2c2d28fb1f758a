"""Measured pixel statistics of a run: taken once and recorded in the workdir."""

import dataclasses
import pathlib

from ml_collections import ConfigDict

from hexa_jax.core.console import log
from hexa_jax.data.source import Source
from hexa_jax.data.statistics import DIGITS, PixelStatistics, measure_pixels
from hexa_jax.parallel import processes
from hexa_jax.storage.workdir import NORMALIZATION, apply_normalization, write_json
from hexa_jax.training.step import Trainer


def settle_normalization(
    config: ConfigDict, workdir: pathlib.Path, source: Source, trainer: Trainer
) -> Trainer:
    """Set `config.data.pixel_mean` and `pixel_std`, where they are measured, in the config and the network.

    The first start of a run measures, and writes what it found into the workdir: into a file of its
    own, by which later starts know that it was measured, and into config.json, where evaluations
    and exports look.

    Args:
        config: of the run; changed in place.
        workdir: of the run.
        source: the training images.
        trainer: made from the config, in which all mistakes were found before images are read.

    Returns:
        The trainer with the statistics in its network.

    Raises:
        DataError: no image can be read.
    """
    if config.data.normalization != "measured":
        return trainer
    known = processes.broadcast_from_main(int((workdir / NORMALIZATION).exists()))
    if known:
        apply_normalization(config, workdir)
        found = PixelStatistics(tuple(config.data.pixel_mean), tuple(config.data.pixel_std), 0)
    else:
        found = measure_pixels(source)
    mean, std, images = _of_main(found)
    config.data.pixel_mean, config.data.pixel_std = mean, std
    if not known:
        write_json(
            workdir / NORMALIZATION, {"pixel_mean": mean, "pixel_std": std, "images": images}
        )
        shown = [
            "({})".format(", ".join(f"{value:.4f}" for value in values)) for values in (mean, std)
        ]
        log(f"pixels of {images} images: mean {shown[0]}, standard deviation {shown[1]}")
    write_json(workdir / "config.json", config.to_dict())
    network = trainer.objective.network.clone(pixel_mean=mean, pixel_std=std)
    return dataclasses.replace(
        trainer, objective=dataclasses.replace(trainer.objective, network=network)
    )


def _of_main(found: PixelStatistics) -> PixelStatistics:
    """Broadcast what the main process found, exactly: as whole numbers."""
    mean, std = (
        tuple(
            processes.broadcast_from_main(round(value * 10**DIGITS)) / 10**DIGITS
            for value in values
        )
        for values in (found.mean, found.std)
    )
    return PixelStatistics(mean, std, processes.broadcast_from_main(found.images))
