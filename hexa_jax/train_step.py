"""Where method, objective and optimiser meet: the pure functions of a training run, and how they are compiled.

What touches images runs device by device under shard_map: gradients are summed over views and microbatches first, then over
devices, once, in the parameters' own precision. The small rest (keys, queue, bank, optimiser) is written for whole arrays.

Legend: M microbatches, n rows of a microbatch, V crops, D embedding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from hexa_jax.mesh import ROWS
from hexa_jax.methods.base import Batch, Spec, Targets
from hexa_jax.models.norm import CLEAN, EVALUATION, blend, stats_collection
from hexa_jax.objective import INIT_DRAWS, REFRESH_DRAWS, Clock, Gradients, Objective, Rows, norm_branch

PICTURES = 8  # rows of `view_step`


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        step: int32, optimiser steps taken.
        params: the network's parameters, float32 (float64 under precision "float64").
        batch_stats: running mean and variance, one collection per BatchNorm set.
        opt_state: the optimiser's.
        method: the method's: queue and key encoder, or bank and clusters.
    """

    step: jax.Array
    params: Any
    batch_stats: dict[str, Any]
    opt_state: Any
    method: Any


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Static parts of a run; the methods are pure functions of a state and a batch."""

    objective: Objective
    optimizer: optax.GradientTransformation
    spec: Spec
    mesh: Mesh
    dtype: Any = jnp.float32  # of the parameters

    def init_state(self) -> TrainState:
        """A fresh state; the seed decides every number in it."""
        key = jax.random.fold_in(jax.random.key(self.objective.seed), INIT_DRAWS)
        network_key, method_key = jax.random.split(key)
        crops = (jnp.zeros((1, 1, 32, 32, 3)),)  # parameters do not depend on the image size
        variables = self.objective.network.init(network_key, crops, EVALUATION)
        variables = jax.tree.map(lambda x: x.astype(self.dtype), variables)
        params = variables.pop("params")
        method = self.objective.method.init(method_key, params, self.spec)
        return TrainState(jnp.zeros([], jnp.int32), params, variables, self.optimizer.init(params), method)

    def state_sharding(self) -> TrainState:
        """A sharding for each leaf of the state: on every device, except what the method splits."""
        shapes = jax.eval_shape(self.init_state)
        specs = TrainState(P(), P(), P(), P(), self.objective.method.state_spec(self.spec))

        def expand(spec: P, leaves: Any) -> Any:
            return jax.tree.map(lambda _: NamedSharding(self.mesh, spec), leaves)

        return jax.tree.map(expand, specs, shapes, is_leaf=lambda node: isinstance(node, P))

    def batch_shapes(self, on_device: bool = False) -> Batch:
        """The step's batch as ShapeDtypeStructs, for compiling without data."""
        layout, crops, method = self.objective.layout, self.objective.crops, self.objective.method
        lead = (layout.microbatches, layout.batch_size // layout.microbatches)

        def leaf(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(lead + shape, dtype, sharding=NamedSharding(self.mesh, ROWS))

        pixels = [leaf(jnp.uint8, r.count, r.size, r.size, 3) for r in crops.resolutions]
        key_size, number = crops.resolutions[0].size, leaf(jnp.int32)
        batch = Batch(number, number, leaf(jnp.bool_), number, () if on_device else tuple(pixels))
        if not method.key_crops:
            return batch
        key_pixels = None if on_device else leaf(jnp.uint8, method.key_crops, key_size, key_size, 3)
        return batch._replace(key_crops=key_pixels, key_index=number, key_row=number)

    def state_shapes(self) -> TrainState:
        """The state as ShapeDtypeStructs with their shardings."""
        shapes = jax.eval_shape(self.init_state)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.state_sharding(),
        )

    def train_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> tuple[TrainState, dict]:
        """One optimiser step on leaves [M, n, ...]; returns the new state and scalar metrics."""
        method = self.objective.method
        rows, clock, targets = self._rows(state, batch, data)
        result = self._gradients(state.params, rows, clock, data)

        updates, opt_state = self.optimizer.update(result.params, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=_blend(state.batch_stats, result.moments),
            opt_state=opt_state,
            method=method.update(state.method, params, batch, result.outputs, targets),
        )
        metrics = {f"loss_{view}": loss for view, loss in result.losses.items()}
        metrics["loss"] = sum(self.objective.views.weights[view] * loss for view, loss in result.losses.items())
        metrics["embedding_std"] = embedding_std(result.outputs)
        metrics["gradient_norm"] = optax.tree.norm(result.params)
        metrics["parameter_norm"] = optax.tree.norm(params)
        metrics["invalid"] = jnp.sum(~batch.valid)
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def observe_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> TrainState:
        """Training-mode forward without gradient: writes BatchNorm statistics, and the bank of a method that has one."""

        def local(params: Any, batch: Batch, data: jax.Array | None) -> tuple[jax.Array, Any]:
            def one(rows: Batch) -> tuple[jax.Array, Any]:
                return self.objective.forward(params, self.objective.online_crops(rows, jnp.int32(0), data))

            outputs, moments = jax.lax.map(one, batch)
            return outputs, jax.tree.map(lambda m: jax.lax.pmean(jnp.mean(m, axis=0), "data"), moments)

        outputs, moments = self._per_device(local, (P(), ROWS, P()), (ROWS, P()))(state.params, batch, data)
        state = state._replace(batch_stats=_blend(state.batch_stats, {CLEAN: moments}))
        if not self.objective.method.needs_first_pass:
            return state
        method = self.objective.method.update(state.method, state.params, batch, outputs, None)
        return state._replace(method=method)

    def refresh_step(self, state: TrainState, epoch: jax.Array) -> tuple[TrainState, dict]:
        """What the method does before epoch `epoch` (int32, from 0), and scalars about it."""
        key = jax.random.fold_in(jax.random.key(self.objective.seed), REFRESH_DRAWS)
        method = self.objective.method.refresh(jax.random.fold_in(key, epoch), state.method)
        return state._replace(method=method), self.objective.method.describe(state.method, method)

    def compile(self) -> "Steps":
        """The jitted functions; the state is donated, its sharding is fixed."""
        state, rows, whole = self.state_sharding(), NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        return Steps(
            init=jax.jit(self.init_state, out_shardings=state),
            train=jax.jit(
                self.train_step, in_shardings=(state, rows, whole), out_shardings=(state, whole), donate_argnums=0
            ),
            observe=jax.jit(
                self.observe_step, in_shardings=(state, rows, whole), out_shardings=state, donate_argnums=0
            ),
            views=jax.jit(self.view_step, in_shardings=(state, rows, whole), out_shardings=rows),
            refresh=jax.jit(
                self.refresh_step, in_shardings=(state, whole), out_shardings=(state, whole), donate_argnums=0
            ),
        )

    def _per_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _encode_keys(self, params: Any, batch: Batch, epoch: jax.Array, data: jax.Array | None) -> jax.Array:
        def local(params: Any, batch: Batch, epoch: jax.Array, data: jax.Array | None) -> jax.Array:
            return jax.lax.map(lambda rows: self.objective.encode_keys(params, rows, epoch, data), batch)

        return self._per_device(local, (P(), ROWS, P(), P()), ROWS)(params, batch, epoch, data)

    def _per_microbatch(self, function: Callable, rows: Rows) -> Any:
        """function(rows of one microbatch) -> (totals, stacked), totals added up and the rest stacked over microbatches."""
        split, dictionary = rows[:3], rows.dictionary

        def one(split: Any) -> tuple[Any, Any]:
            batch, y, weight = split
            return function(Rows(batch, y, weight, dictionary))

        if len(rows.weight) == 1:  # no loop around a single microbatch
            totals, stacked = one(jax.tree.map(lambda leaf: leaf[0], split))
            return totals, jax.tree.map(lambda leaf: leaf[None], stacked)

        def accumulate(totals: Any, split: Any) -> tuple[Any, Any]:
            more, stacked = one(split)
            return jax.tree.map(jnp.add, totals, more), stacked

        shapes = jax.eval_shape(lambda: one(jax.tree.map(lambda leaf: leaf[0], split))[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(accumulate, zeros, split)

    def _gradients(self, params: Any, rows: Rows, clock: Clock, data: jax.Array | None) -> Gradients:
        """The objective over all microbatches and devices: one reduction of gradients."""

        def local(params: Any, rows: Rows, clock: Clock, data: jax.Array | None) -> Gradients:
            def one(rows: Rows) -> tuple[Any, jax.Array]:
                result = self.objective.gradients(params, rows, clock, data)
                return result[:3], result.outputs

            (grads, moments, losses), outputs = self._per_microbatch(one, rows)
            moments = jax.tree.map(lambda m: jax.lax.pmean(m, "data") / len(rows.weight), moments)
            return Gradients(jax.lax.psum(grads, "data"), moments, jax.lax.psum(losses, "data"), outputs)

        specs = (P(), Rows(ROWS, ROWS, ROWS, P()), P(), P())
        return self._per_device(local, specs, Gradients(P(), P(), P(), ROWS))(params, rows, clock, data)

    def _rows(self, state: TrainState, batch: Batch, data: jax.Array | None) -> tuple[Rows, Clock, Targets]:
        """Pseudo-labels and weights of a step's rows."""
        clock = Clock(epoch=1 + state.step // self.spec.steps_per_epoch, step=state.step)
        encode_keys = lambda params: self._encode_keys(params, batch, clock.epoch, data)  # noqa: E731
        targets = self.objective.method.targets(encode_keys, state.method, batch)
        weight = (batch.valid & targets.known).astype(self.dtype)
        weight = weight / jnp.maximum(jnp.sum(weight), 1)
        return Rows(batch, targets.y, weight, targets.dictionary), clock, targets

    def view_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> dict[str, Any]:
        """Some of the views that the next step would learn from, for pictures.

        Returns:
            "clean" and, where the objective has them, "adversarial" and "cutmix": per resolution [M, rows, V, S, S, 3], with at
            most PICTURES rows a device; "lambda" [M, rows, V] of the cut-mixed ones.
        """

        def local(params: Any, rows: Rows, clock: Clock, data: jax.Array | None) -> dict[str, Any]:
            def one(rows: Rows) -> tuple[Any, dict[str, Any]]:
                x = self.objective.online_crops(rows.batch, clock.epoch, data)
                views = {"clean": x}
                if self.objective.views.alpha1:
                    views["adversarial"] = self.objective.attack(params, x, rows, clock)
                if self.objective.views.alpha2:
                    views["cutmix"], (views["lambda"], _) = self.objective.mix(x, rows, clock)
                return (), jax.tree.map(lambda leaf: leaf[:PICTURES], views)

            return self._per_microbatch(one, rows)[1]

        rows, clock, _ = self._rows(state, batch, data)
        specs = (P(), Rows(ROWS, ROWS, ROWS, P()), P(), P())
        return self._per_device(local, specs, ROWS)(state.params, rows, clock, data)


class Steps(NamedTuple):
    """Compiled functions of a run: init(), train(state, batch, data), observe(same), views(same), refresh(state, epoch)."""

    init: Any
    train: Any
    observe: Any
    views: Any
    refresh: Any


def _blend(batch_stats: dict[str, Any], moments: dict[str, Any]) -> dict[str, Any]:
    """Running statistics after a step: one update per training pass, in order."""
    batch_stats = dict(batch_stats)
    for view, sown in moments.items():
        name = stats_collection(norm_branch(view))
        batch_stats[name] = blend(batch_stats[name], sown)
    return batch_stats


def embedding_std(outputs: jax.Array) -> jax.Array:
    """Spread of embeddings [..., D]: mean standard deviation per dimension times sqrt(D).

    About 1 for unit vectors spread over the sphere, 0 when all embeddings are the same (collapse).
    """
    dim = outputs.shape[-1]
    # Without joining the axes first: that would gather every embedding on every device.
    return jnp.mean(jnp.std(outputs, axis=tuple(range(outputs.ndim - 1)))) * dim**0.5
