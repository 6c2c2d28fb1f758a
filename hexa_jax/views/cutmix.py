"""Cut-mixed views: paste a box of another image's crop, mix the labels alike.

Equations 8 and 9.

Legend: N examples, V crops, H W C image.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from hexa_jax.models.norm import ADVERSARIAL
from hexa_jax.views.base import Context, HardView, View, fold_in
from hexa_jax.views.beta import sample_beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutMix(HardView):
    """Cut-mixed clean crops, by the clean BatchNorm set.

    Attributes:
        alpha: first parameter of lambda's Beta distribution; the paper's Fig. 5 finds (5, 3) best.
        beta: second parameter.
        one_box: one box per crop position for all images of a step instead of one per crop.
    """

    name: ClassVar[str] = "cutmix"
    scheme_name: ClassVar[str] = "cmx"
    mixes: ClassVar[bool] = True

    alpha: float = 5.0
    beta: float = 3.0
    one_box: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.alpha, self.beta) <= 0:
            raise ValueError(
                f"views.{self.name}.alpha and beta must be positive, not {self.alpha} and "
                f"{self.beta}"
            )

    def make(self, context: Context) -> View:
        return self._mix(context, context.crops)

    def _mix(self, context: Context, crops: tuple[jax.Array, ...]) -> View:
        partner = context.partners()
        keys = context.keys(self.name)
        if self.one_box:
            keys = jnp.broadcast_to(context.step_key(self.name), keys.shape)
        boxes = cutmix_boxes(keys, crops, alpha=self.alpha, beta=self.beta)
        pasted = [paste(x, x[partner], box) for x, box in zip(crops, boxes, strict=True)]
        mixed, shares, masks = zip(*pasted, strict=True)
        return View(jax.lax.stop_gradient(mixed), jnp.concatenate(shares, axis=1), partner, masks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutMixAdversarial(CutMix):
    """Cut-mixed adversarial crops, by the adversarial BatchNorm set (Fig. 2's "CmxA")."""

    name: ClassVar[str] = "cutmix_adversarial"
    scheme_name: ClassVar[str] = "cmxA"
    norm: ClassVar[str] = ADVERSARIAL
    attacks: ClassVar[bool] = True

    def make(self, context: Context) -> View:
        return self._mix(context, context.attacked)


def _sides(
    key: jax.Array, shape: tuple[int, ...], height: int, width: int, alpha: float, beta: float
) -> jax.Array:
    """Random boxes as [*shape, 4] pixel bounds (top, bottom, left, right), clipped to the image."""
    uniform = jax.random.uniform(key, (*shape, 3))
    side = jnp.sqrt(1 - sample_beta(uniform[..., 0], alpha, beta))

    def bounds(extent: int, center: jax.Array) -> list[jax.Array]:
        length = jnp.floor(extent * side).astype(jnp.int32)
        first = jnp.floor(extent * center).astype(jnp.int32) - length // 2
        return [jnp.clip(first, 0, extent), jnp.clip(first + length, 0, extent)]

    return jnp.stack(bounds(height, uniform[..., 1]) + bounds(width, uniform[..., 2]), axis=-1)


def cutmix_boxes(key: jax.Array, x: Any, *, alpha: float, beta: float) -> Any:
    """Draw one random box per crop image.

    Args:
        key: one typed key, or [N] keys (one per example).
        x: array or pytree of arrays [N, H, W, C] or [N, V, H, W, C], read for its shape.
        alpha: first parameter of the Beta distribution, static.
        beta: second parameter, static.

    Returns:
        A pytree like x of int32 [N, 4] or [N, V, 4] (top, bottom, left, right).
    """
    leaves, treedef = jax.tree.flatten(x)
    keys = key if key.ndim else jax.random.split(key, leaves[0].shape[0])

    def boxes(position: int, leaf: jax.Array) -> jax.Array:
        crops, (height, width) = leaf.shape[1:-3], leaf.shape[-3:-1]
        return jax.vmap(lambda key: _sides(key, crops, height, width, alpha, beta))(
            fold_in(keys, position)
        )

    return treedef.unflatten([boxes(position, leaf) for position, leaf in enumerate(leaves)])


def paste(
    x: jax.Array, partner: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Put the partner's pixels into a box of each image (equation 8).

    Args:
        x: [..., H, W, C].
        partner: like x.
        box: int32 [..., 4].

    Returns:
        (mixed like x; [...] the exact share of pixels that still show x; bool [..., H, W, 1], True
        in the box).
    """
    height, width = x.shape[-3:-1]
    top, bottom, left, right = (box[..., side, None] for side in range(4))
    row = jnp.arange(height).reshape((1,) * (top.ndim - 1) + (height,))
    column = jnp.arange(width).reshape((1,) * (top.ndim - 1) + (width,))
    rows = (row >= top) & (row < bottom)  # [..., H]
    columns = (column >= left) & (column < right)  # [..., W]
    inside = (rows[..., :, None] & columns[..., None, :])[..., None]
    area = ((bottom - top) * (right - left))[..., 0]
    return jnp.where(inside, partner, x), 1 - area.astype(x.dtype) / (height * width), inside


def cutmix(
    key: jax.Array,
    x: Any,
    *,
    alpha: float,
    beta: float,
    permutation: jax.Array | None = None,
    one_box: bool = False,
) -> tuple[Any, Any, jax.Array]:
    """Make cut-mixed views (equation 8): a box of another example's crop is pasted into each crop.

    The box has side sqrt(1 - lambda0) of the crop with lambda0 ~ Beta(alpha, beta) and a uniform
    center, and is clipped to the image; lambda is what is left of the first image, counted in
    pixels (clovaai/CutMix-PyTorch, with one box per crop).

    Args:
        key: one typed key, or [N] keys (one per example; then the partner's permutation must be
            given).
        x: array or pytree of arrays [N, H, W, C] or [N, V, H, W, C].
        alpha: first parameter of the Beta distribution, static.
        beta: second parameter of the Beta distribution, static.
        permutation: int [N], the partner of each example, the same for all its crops; drawn from
            the key when None.
        one_box: use the first example's boxes for the whole batch.

    Returns:
        (mixed like x, lambda [N] or [N, V] in a pytree like x, permutation [N]).

    Raises:
        ValueError: per-example keys without a permutation.
    """
    leaves, treedef = jax.tree.flatten(x)
    if permutation is None:
        if key.ndim:
            raise ValueError(
                "per-example keys cannot draw the partner of an example: pass a permutation"
            )
        key, order_key = jax.random.split(key)
        permutation = jax.random.permutation(order_key, leaves[0].shape[0])
    boxes = treedef.flatten_up_to(cutmix_boxes(key, x, alpha=alpha, beta=beta))
    if one_box:
        boxes = [jnp.broadcast_to(box[:1], box.shape) for box in boxes]
    pasted = [paste(leaf, leaf[permutation], box) for leaf, box in zip(leaves, boxes, strict=True)]
    mixed, shares, _ = zip(*pasted, strict=True)
    return treedef.unflatten(mixed), treedef.unflatten(shares), permutation
