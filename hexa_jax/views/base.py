"""Hard views: which input is scored, with which mixture of labels, when and how much.

Legend: N rows of one device and microbatch, V crops, H W C image. Pixels are in [0, 1].
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from hexa_jax.models.norm import CLEAN
from hexa_jax.views.attack import Attack

LABEL, OWN_CROP = "label", "own_crop"


class View(NamedTuple):
    """Input and label mixture of one training pass.

    Attributes:
        crops: per resolution [N, V_r, H, W, 3] in [0, 1], constant for differentiation.
        lam: [N, V] share of the row's own label; None where labels are not mixed.
        partner: int32 [N], the row whose label has the share 1 - lam; None where labels are not
            mixed.
        mask: per resolution bool [N, V_r, H, W, 1], where the partner's pixels are; () without.
    """

    crops: tuple[jax.Array, ...]
    lam: jax.Array | None = None
    partner: jax.Array | None = None
    mask: Any = ()


class Context(Protocol):
    """What a view may ask of the step it is made for."""

    @property
    def crops(self) -> tuple[jax.Array, ...]:
        """Clean crops, per resolution [N, V_r, H, W, 3]."""

    @property
    def attack(self) -> Attack:
        """Settings of the attack."""

    @property
    def attacked(self) -> tuple[jax.Array, ...]:
        """The clean crops after the attack on their own labels, made once for all views."""

    def keys(self, purpose: str) -> jax.Array:
        """Typed PRNG keys [N], a function of (seed, purpose, epoch, example) only."""

    def step_key(self, purpose: str) -> jax.Array:
        """A typed PRNG key, a function of (seed, purpose, step) only."""

    def partners(self) -> jax.Array:
        """Return a permutation int32 [N] within blocks of rows, one for all views of a step."""

    def new_crops(self, number: int) -> tuple[jax.Array, ...]:
        """Return one of the view's own `crop_sets` of clean crops, shaped like `crops`."""

    def losses(self, crops: tuple[jax.Array, ...]) -> jax.Array:
        """Return the method's own losses [N, V] of crops, by the view's BatchNorm set.

        No statistics are written.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardView:
    """A term of equation 10.

    A subclass says what the view shows; its fields are its block `config.views.NAME`.

    Attributes:
        weight: alpha of equation 10; 0 leaves the view out.
        start_epoch: epoch (from 0, fractions allowed) from which on the view counts.
        ramp_epochs: epochs after `start_epoch` over which the weight grows linearly; 0: at once.
        replace: share of the rows that show this view instead of the clean one; 0: the view is
            added. Costs no more than the plain step, except for methods that make labels from their
            outputs (SimCLR, SwAV).
        target: "label" (the row's pseudo-label), or "own_crop" (the embedding of the very crop that
            the view was made from, constant for differentiation; for methods with
            `pairs_own_crop`). An attack is on the label all the same.
    """

    name: ClassVar[str]  # of its config block, its loss and its pictures
    scheme_name: ClassVar[str]  # its part of `config.scheme`
    norm: ClassVar[str] = CLEAN  # BatchNorm set of its training pass
    attacks: ClassVar[bool] = False  # whether it reads `Context.attacked`
    mixes: ClassVar[bool] = False  # whether it reads `Context.partners`
    # whether it is made from the clean crops, not from others of the image
    shows_clean_crop: ClassVar[bool] = True

    weight: float = 0.0
    start_epoch: float = 0.0
    ramp_epochs: float = 0.0
    replace: float = 0.0
    target: str = LABEL

    def __post_init__(self) -> None:
        """Raises ValueError, one line that names the setting."""
        block = f"views.{self.name}"
        for field in ("weight", "start_epoch", "ramp_epochs"):
            if getattr(self, field) < 0:
                raise ValueError(f"{block}.{field}={getattr(self, field)} must be 0 or more")
        if not 0 <= self.replace <= 1:
            raise ValueError(f"{block}.replace={self.replace} is a share of the rows: 0 to 1")
        if self.target not in (LABEL, OWN_CROP):
            raise ValueError(
                f"{block}.target={self.target!r} is not known: use one of {LABEL}, {OWN_CROP}"
            )
        if self.target == OWN_CROP and not self.shows_clean_crop:
            raise ValueError(
                f"{block} shows other crops than the clean ones: it cannot have target={OWN_CROP}"
            )
        if self.replace and self.target == OWN_CROP:
            raise ValueError(
                f"{block}: a view that replaces the clean crop cannot have target={OWN_CROP}"
            )

    @property
    def crop_sets(self) -> int:
        """Number of sets of clean crops that the view needs besides the method's own."""
        return 0

    @property
    def row_share(self) -> float:
        """Share of the rows that the view is made for."""
        return self.replace or 1.0

    def make(self, context: Context) -> View:
        """The view of N rows."""
        raise NotImplementedError


def fold_in(keys: jax.Array, number: int) -> jax.Array:
    """New keys [N] from keys [N]."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def block_permutation(keys: jax.Array, count: int, block: int) -> jax.Array:
    """Draw a random order of `count` rows that moves rows only within blocks.

    Args:
        keys: [count // block] typed keys, one per block.
        count: number of rows.
        block: rows of a block.

    Returns:
        int32 [count] row numbers.
    """
    order = jax.vmap(lambda key: jax.random.permutation(key, block))(keys)  # [count / block, block]
    return (order + block * jnp.arange(count // block)[:, None]).reshape(count).astype(jnp.int32)
