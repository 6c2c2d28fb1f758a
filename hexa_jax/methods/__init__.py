"""Methods: one file each, and the registry that configs name them by."""

from hexa_jax.methods.base import LabelsBeforeStep, LabelsFromOutputs, Method
from hexa_jax.methods.byol import BYOL
from hexa_jax.methods.deepcluster import DeepCluster
from hexa_jax.methods.moco import MoCo
from hexa_jax.methods.pcl import PCL
from hexa_jax.methods.rotation import Rotation
from hexa_jax.methods.simclr import SimCLR
from hexa_jax.methods.supervised import Supervised
from hexa_jax.methods.swav import SwAV

__all__ = ["METHODS", "LabelsBeforeStep", "LabelsFromOutputs", "Method", "register"]

METHODS: dict[str, type[Method]] = {}


def register(name: str, method: type[Method]) -> type[Method]:
    """Make a method known to configs: `config.method` is its name, `config[name]` holds its fields.

    Raises:
        ValueError: another method has the name.
    """
    if METHODS.get(name, method) is not method:
        raise ValueError(
            f"{method.__name__} and {METHODS[name].__name__} have the same name {name!r}"
        )
    METHODS[name] = method
    return method


register("moco", MoCo)
register("simclr", SimCLR)
register("deepcluster", DeepCluster)
register("swav", SwAV)
register("byol", BYOL)
register("rotation", Rotation)
register("pcl", PCL)
register("supervised", Supervised)
