"""Equation 10 from a config: which hard views a run has, their settings, and the attack's."""

from ml_collections import ConfigDict

from hexa_jax.core.errors import ConfigError, as_config_error, choose, make_from_block
from hexa_jax.models.norm import ADVERSARIAL, CLEAN
from hexa_jax.views import VIEWS, Attack
from hexa_jax.views.base import HardView
from hexa_jax.views.scheme import Scheme

# The schemes of Fig. 2.
SCHEMES = ("std", "std+adv", "std+cmx", "std+adv+cmx", "std+adv+cmxA", "all")


def make_scheme(config: ConfigDict, steps_per_epoch: int = 1) -> Scheme:
    """The views that count, and the attack.

    Raises:
        ConfigError: settings that cannot work, also of a view that does not count.
    """
    attack, named, views = _make_attack(config), scheme_views(config.scheme), []
    for name in VIEWS:
        if name in config.views:
            view = _make_view(config, name, named)
            views += [view] if view.weight else []
        elif named and name in named:  # a view of the program's own, in a config without it
            raise ConfigError(
                f"config.scheme names the view {name}, but there is no block config.views.{name}"
            )
    with as_config_error():
        return Scheme(tuple(views), attack, config.views.average, steps_per_epoch)


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


def _make_view(config: ConfigDict, name: str, named: set[str] | None) -> HardView:
    """A view with the settings of its block; of weight 0 where the scheme does not name it."""
    settings = dict(config.views[name])
    if named is not None:  # the scheme says which views there are, the weights what they count
        settings["weight"] = (settings.get("weight") or 1.0) if name in named else 0.0
    return make_from_block(VIEWS[name], f"views.{name}", settings)


def _make_attack(config: ConfigDict) -> Attack:
    """The attack; its lengths are grey levels in configs, and pixels of [0, 1] here."""
    v = config.views
    choose("views.attack_norm", v.attack_norm, dict.fromkeys((CLEAN, ADVERSARIAL)))
    choose("views.norm", v.norm, dict.fromkeys(("linf", "l2")))
    with as_config_error("config.views: "):
        return Attack(
            epsilon=v.epsilon / 255,
            step_size=v.step_size / 255,
            steps=v.steps,
            norm=v.norm,
            random_start=v.random_start,
            norm_set=v.attack_norm,
            share_gradient=v.share_gradient,
            max_increase=v.max_increase,
        )
