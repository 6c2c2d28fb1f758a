"""BYOL and SimSiam: the pseudo-label of a crop is what a target network makes of the other crop.

Legend: M microbatches, n rows of a microbatch, N rows, V = 2 crops, D embedding, K steps of the
    run.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hexa_jax.core.batch import Batch
from hexa_jax.methods.base import Encode, LabelsBeforeStep, Spec, Targets, check_positive
from hexa_jax.models.heads import ProjectionHead


@dataclasses.dataclass(frozen=True)
class BYOL(LabelsBeforeStep):
    """BYOL (Grill et al., 2020) and, with `simsiam`, SimSiam (Chen and He, 2021).

    The state is the target network's parameters: a moving average of the online network's, without
    the predictor. SimSiam's target is the online network itself, and the state is empty.

    Attributes:
        momentum: Of the target network in step 0; a cosine over the run takes it to 1.
        predictor_hidden: Width of the predictor's hidden layer.
        simsiam: Whether the network is its own target, which encodes the crops once more.
        total_steps: K; `for_run` sets it.
    """

    momentum: float
    predictor_hidden: int
    simsiam: bool
    total_steps: int = 1

    pairs_own_crop = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"byol.momentum={self.momentum} must be between 0 and 1")
        check_positive("byol", predictor_hidden=self.predictor_hidden)

    def check(self, spec: Spec) -> None:
        if spec.num_crops != (2,):
            raise ValueError(
                f"byol pairs two crops of one size, data.num_crops={spec.num_crops} has others: "
                "use "
                "(2,) with one data.crop_size; deepcluster and swav take more"
            )

    def for_run(self, spec: Spec) -> "BYOL":
        # Not part of the state: a run that is extended gets a longer cosine, like its learning
        # rate.
        return dataclasses.replace(self, total_steps=spec.total_steps)

    def make_predictor(self, embedding_dim: int, dtype: Any, auxiliary_norm: bool) -> nn.Module:
        return ProjectionHead(self.predictor_hidden, embedding_dim, True, dtype, auxiliary_norm)

    def init(self, key: jax.Array, params: Any, spec: Spec) -> Any:
        return () if self.simsiam else jax.tree.map(jnp.copy, _without_predictor(params))

    def targets(
        self, encode: Encode, params: Any, state: Any, batch: Batch, keys: jax.Array
    ) -> Targets:
        projections = encode.crops(params["network"] if self.simsiam else state)  # [M, n, 2, D]
        known = jnp.ones(projections.shape[:2], bool)
        return Targets(y=projections[:, :, ::-1], dictionary=(), known=known)

    def loss(self, params: dict, outputs: jax.Array, y: jax.Array, dictionary: Any) -> jax.Array:
        """Return squared distances [N, 2] of unit vectors.

        SimSiam's negative cosines are half of them, less 1.

        The constant is kept: an attack or a mixture is not changed by it, and 0 is a perfect
        prediction.
        """
        distance = 1 - jnp.sum(outputs * y, axis=-1)
        return distance if self.simsiam else 2 * distance

    def own_crop_labels(
        self, y: jax.Array, dictionary: Any, outputs: jax.Array
    ) -> tuple[jax.Array, Any]:
        """The target network's projections of the same crops: a predictor's output is no label."""
        return y[:, ::-1], dictionary

    def target_momentum(self, step: jax.Array) -> jax.Array:
        """Weight of the old target in the update at step int32, from 0; 1 from step K on."""
        progress = jnp.minimum(jnp.asarray(step, jnp.result_type(float)) / self.total_steps, 1)
        return 1 - (1 - self.momentum) * (jnp.cos(jnp.pi * progress) + 1) / 2

    def update(
        self,
        state: Any,
        params: Any,
        batch: Batch,
        outputs: jax.Array,
        targets: Targets | None,
        step: jax.Array,
    ) -> Any:
        if self.simsiam:
            return state
        m = self.target_momentum(step)
        return jax.tree.map(
            lambda target, online: (m * target + (1 - m) * online).astype(target.dtype),
            state,
            _without_predictor(params),
        )


def _without_predictor(params: Any) -> dict[str, Any]:
    """The online network's parameters that its target has, too."""
    return {name: tree for name, tree in params["network"].items() if name != "predictor"}
