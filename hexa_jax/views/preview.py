"""What a step learns from, as pictures and outputs for a person to look at."""

from typing import Any, NamedTuple

import jax

# The clean crops' outputs through the adversarial BatchNorm set, to compare attacked crops with.
UNATTACKED = "unattacked"
PICTURES = 8  # rows of images in a preview


class ViewPreview(NamedTuple):
    """Views to look at; leaves [N, ...], images at most PICTURES rows.

    Attributes:
        images: per view, per resolution [N, V, S, S, 3].
        mask: per resolution bool [N, V, S, S, 1], where the first cut-mixed view shows the partner;
            () without one.
        lam: per mixed view [N, V], the share of the image itself.
        row: int32 position in the step's batch.
        partner: int32, that of the partner in mixed views; its own without such views.
        index: int32 example.
        outputs: per view, and UNATTACKED where there is an attack, [N, V, D].
        y: pseudo-labels.
    """

    images: dict[str, Any]
    mask: Any
    lam: dict[str, jax.Array]
    row: jax.Array
    partner: jax.Array
    index: jax.Array
    outputs: dict[str, jax.Array]
    y: Any
