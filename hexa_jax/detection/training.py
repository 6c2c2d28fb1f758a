"""One training step of the detector on all devices, and what of the network it leaves alone.

Legend: N images of a step on all devices.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.core.rngs import Purpose, Rngs
from hexa_jax.detection.batches import DetectionBatch
from hexa_jax.detection.rcnn import FasterRCNN, NormModes
from hexa_jax.models.norm import CLEAN, EVALUATION, blend, stats_collection
from hexa_jax.parallel.mesh import Layout

STATS = stats_collection(CLEAN)
BATCH_NORMS = ("frozen", "synchronised")


class DetectorState(NamedTuple):
    """State of a run: seed uint32, step int32, parameters, running statistics, optimizer state."""

    seed: jax.Array
    step: jax.Array
    params: Any
    stats: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    """Which parameters of the backbone stay as they are.

    Attributes:
        stages: the stem and the first stages: 0 none, 1 the stem, ... 5 all.
        batch_norm: scale and bias of every BatchNorm, which then reads running statistics.
    """

    stages: int
    batch_norm: bool

    def __call__(self, path: tuple[str, ...]) -> bool:
        """Whether a parameter, by its path, is frozen."""
        part, module, *_ = path
        if part != "backbone":
            return False
        stage = re.match(r"layer(\d)", module)
        norm = any(re.fullmatch(r"bn\d|downsample_bn", name) for name in path)
        return (int(stage[1]) if stage else 0) < self.stages or (self.batch_norm and norm)

    def labels(self, params: Any) -> Any:
        """A tree of "trained" and "frozen" like the parameters."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if self(tuple(entry.key for entry in path)) else "trained",
            params,
        )

    def stopped(self, params: Any) -> Any:
        """Stop the gradients of frozen parameters: their backward pass is then not computed."""
        return jax.tree.map(
            lambda leaf, label: jax.lax.stop_gradient(leaf) if label == "frozen" else leaf,
            params,
            self.labels(params),
        )


def make_optimizer(
    base: optax.GradientTransformation, frozen: Frozen
) -> optax.GradientTransformation:
    """`base` for what is trained; the rest keeps its values, weight decay included."""
    return optax.multi_transform({"trained": base, "frozen": optax.set_to_zero()}, frozen.labels)


def make_step(
    model: FasterRCNN,
    optimizer: optax.GradientTransformation,
    frozen: Frozen,
    mesh: Mesh,
    batch_size: int,
) -> Callable[[DetectorState, DetectionBatch], tuple[DetectorState, dict[str, jax.Array]]]:
    """Return the jitted step: (state, batch of N rows) -> (state, scalars).

    Rows are split over the devices; the state is donated.

    Losses are means over what all devices sampled, gradients are reduced once, in float32.
    BatchNorm that is trained takes its statistics from all N images, and is read from running
    statistics in frozen stages.
    """
    modes = _modes(
        model, frozen, Layout(batch_size, 1, mesh.size, bn_group_size=batch_size, cutmix_block=0)
    )

    def local(params: Any, stats: Any, rngs: Rngs, batch: DetectionBatch) -> Any:
        keys = rngs.per_row_keys(Purpose.TASK, batch.index)

        def objective(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": frozen.stopped(params), STATS: stats}
            sums, moments = model.loss_sums(
                variables, keys, batch.images, batch.sizes, batch.boxes, batch.labels, modes
            )
            counts = {
                name: jax.lax.psum(getattr(sums, name), "data") for name in ("anchors", "regions")
            }
            losses = sums._replace(**counts).means()
            return sum(losses.values()), (losses, moments)

        grads, (losses, moments) = jax.grad(objective, has_aux=True)(params)
        return jax.lax.psum((grads, losses), "data"), jax.lax.pmean(moments, "data")

    def step(
        state: DetectorState, batch: DetectionBatch
    ) -> tuple[DetectorState, dict[str, jax.Array]]:
        at = Rngs(state.seed, jnp.int32(0), state.step)
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(), P(), P("data")), out_specs=P(), check_vma=False
        )
        (grads, losses), moments = sharded(state.params, state.stats, at, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stats = _blend_some(state.stats, moments)
        scalars = losses | {"loss": sum(losses.values()), "gradient_norm": optax.tree.norm(grads)}
        return DetectorState(state.seed, state.step + 1, params, stats, opt_state), scalars

    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    return jax.jit(step, in_shardings=(whole, rows), out_shardings=whole, donate_argnums=0)


def make_detect(model: FasterRCNN, mesh: Mesh) -> Callable:
    """The jitted detector: (params, stats, batch) -> Detected with N rows, on every process."""

    def local(params: Any, stats: Any, batch: DetectionBatch) -> Any:
        return model.detect({"params": params, STATS: stats}, batch.images, batch.sizes)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data"), check_vma=False
    )
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    return jax.jit(sharded, in_shardings=(whole, whole, rows), out_shardings=whole)


def _modes(model: FasterRCNN, frozen: Frozen, layout: Layout) -> NormModes:
    together = layout.norm_mode(CLEAN)
    return NormModes(
        backbone=EVALUATION if frozen.batch_norm or frozen.stages == 5 else together,
        pyramid=together if model.network.pyramid_norm else EVALUATION,
        head=together if model.network.head_norm else EVALUATION,
    )


def _blend_some(running: Any, moments: Any) -> Any:
    """Running statistics with those of the modules that sowed moments blended in."""
    if not isinstance(running, dict) or not moments:
        return running
    if "mean" in running:
        return blend(running, moments)
    return {name: _blend_some(node, moments.get(name)) for name, node in running.items()}
