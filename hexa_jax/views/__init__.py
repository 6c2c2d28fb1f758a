"""Hard views: one file each, and the registry that configs name them by."""

from hexa_jax.views import adversarial as _adversarial_view
from hexa_jax.views import cutmix as _cutmix_view
from hexa_jax.views.attack import Attack, adversarial
from hexa_jax.views.base import Context, HardView, View
from hexa_jax.views.cutmix import cutmix
from hexa_jax.views.extra import Extra
from hexa_jax.views.hard_crop import HardCrop
from hexa_jax.views.mixup import Mixup
from hexa_jax.views.noise import Noise

# `hexa_jax.views.adversarial` and `.cutmix` are the public functions; the modules of these names
# stay importable by path.
__all__ = ["VIEWS", "Attack", "Context", "HardView", "View", "adversarial", "cutmix", "register"]

VIEWS: dict[str, type[HardView]] = {}


def register(view: type[HardView]) -> type[HardView]:
    """Make a view known to configs.

    `config.views[view.name]` holds its fields; `config.scheme` knows its scheme name.

    Raises:
        ValueError: another view has the name or the scheme name, or it is std, all or a sum.
    """
    if view.scheme_name in ("std", "all") or "+" in view.scheme_name:
        raise ValueError(
            f"{view.__name__}.scheme_name={view.scheme_name!r} means something else in "
            "config.scheme"
        )
    for other in VIEWS.values():
        if other is not view and {other.name, other.scheme_name} & {view.name, view.scheme_name}:
            raise ValueError(
                f"{view.__name__} and {other.__name__} have the same name or scheme name"
            )
    VIEWS[view.name] = view
    return view


# Passes run, and running statistics are updated, in this order.
for _view in (
    _adversarial_view.Adversarial,
    _cutmix_view.CutMix,
    _cutmix_view.CutMixAdversarial,
    Mixup,
    Extra,
    Noise,
    HardCrop,
):
    register(_view)
