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

from hexa_jax import draws
from hexa_jax.draws import Draws, purpose_key
from hexa_jax.mesh import ROWS
from hexa_jax.methods.base import Batch, Spec, Targets
from hexa_jax.microbatch import accumulate
from hexa_jax.models.norm import CLEAN, EVALUATION, blend, stats_collection
from hexa_jax.objective import (
    Gradients,
    Objective,
    Rows,
    Shown,
    norm_branch,
)
from hexa_jax.whole_step import WholeStep


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        seed: uint32, decides every random number of the run.
        step: int32, optimiser steps taken.
        params: the network's parameters, float32 (float64 under precision "float64").
        batch_stats: running mean and variance, one collection per BatchNorm set.
        opt_state: the optimiser's.
        method: the method's: queue and key encoder, or bank and clusters.
    """

    seed: jax.Array
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

    def init_state(self, seed: jax.Array) -> TrainState:
        """A fresh state; the seed, a uint32 scalar, decides every number in it."""
        seed = jnp.asarray(seed, jnp.uint32)
        network_key, method_key = jax.random.split(purpose_key(seed, draws.INIT))
        crops = (jnp.zeros((1, 1, 32, 32, 3)),)  # parameters do not depend on the image size
        variables = self.objective.network.init(network_key, crops, EVALUATION)
        variables = jax.tree.map(lambda x: x.astype(self.dtype), variables)
        params = variables.pop("params")
        own = self.objective.method.init_params(jax.random.fold_in(method_key, 1), self.spec)
        if own:
            params = params | {"method": jax.tree.map(lambda x: x.astype(self.dtype), own)}
        method = self.objective.method.init(method_key, params, self.spec)
        return TrainState(seed, jnp.zeros([], jnp.int32), params, variables, self.optimizer.init(params), method)

    def state_sharding(self) -> TrainState:
        """A sharding for each leaf of the state: on every device, except what the method splits."""
        shapes = self._shapes()
        specs = TrainState(P(), P(), P(), P(), P(), self.objective.method.state_spec(self.spec))

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
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes(),
            self.state_sharding(),
        )

    def _shapes(self) -> TrainState:
        return jax.eval_shape(self.init_state, jax.ShapeDtypeStruct((), jnp.uint32))

    def train_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> tuple[TrainState, dict]:
        """One optimiser step on leaves [M, n, ...]; returns the new state and scalar metrics."""
        method = self.objective.method
        targets, result = self._gradients(state, batch, data)
        views = self.objective.views
        grads = jax.tree.map(lambda g: g / views.divisor, result.params)
        if "method" in grads:
            grads = grads | {"method": method.freeze(grads["method"], state.step)}
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if "method" in params:
            params = params | {"method": method.project(params["method"])}
        new_state = TrainState(
            seed=state.seed,
            step=state.step + 1,
            params=params,
            batch_stats=_blend(state.batch_stats, result.moments),
            opt_state=opt_state,
            method=method.update(state.method, params, batch, result.outputs, targets),
        )
        metrics = {f"loss_{view}": loss for view, loss in result.losses.items()}
        metrics["loss"] = sum(views.weights[view] * loss for view, loss in result.losses.items()) / views.divisor
        metrics["embedding_std"] = embedding_std(result.outputs)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["parameter_norm"] = optax.tree.norm(params)
        metrics["invalid"] = jnp.sum(~batch.valid)
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def observe_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> TrainState:
        """Training-mode forward without gradient: writes BatchNorm statistics, and the bank of a method that has one."""

        at = self._draws(state)._replace(epoch=jnp.int32(0))

        def local(params: Any, batch: Batch, at: Draws, data: jax.Array | None) -> tuple[jax.Array, Any]:
            def one(rows: Batch) -> tuple[jax.Array, Any]:
                return self.objective.forward(params, self.objective.online_crops(rows, at, data))

            outputs, moments = jax.lax.map(one, batch)
            return outputs, jax.tree.map(lambda m: jax.lax.pmean(jnp.mean(m, axis=0), "data"), moments)

        outputs, moments = self._per_device(local, (P(), ROWS, P(), P()), (ROWS, P()))(state.params, batch, at, data)
        state = state._replace(batch_stats=_blend(state.batch_stats, {CLEAN: moments}))
        if not self.objective.method.needs_first_pass:
            return state
        method = self.objective.method.update(state.method, state.params, batch, outputs, None)
        return state._replace(method=method)

    def augment_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> Any:
        """The next step's crops as the networks get them, [M, rows, V, H, W, 3] a resolution, and the key crops after them."""
        objective, at = self.objective, self._draws(state)

        def local(batch: Batch, at: Draws, data: jax.Array | None) -> Any:
            def one(rows: Batch) -> Any:
                crops = objective.online_crops(rows, at, data)
                return (*crops, objective.key_crops(rows, at, data)) if objective.method.key_crops else crops

            return jax.lax.map(one, batch)

        return self._per_device(local, (ROWS, P(), P()), ROWS)(batch, at, data)

    def refresh_step(self, state: TrainState, epoch: jax.Array) -> tuple[TrainState, dict]:
        """What the method does before epoch `epoch` (int32, from 0), and scalars about it."""
        key = purpose_key(state.seed, draws.REFRESH)
        method = self.objective.method.refresh(jax.random.fold_in(key, epoch), state.method)
        return state._replace(method=method), self.objective.method.describe(state.method, method)

    def compile(self) -> "Steps":
        """The jitted functions; the state is donated, its sharding is fixed."""
        state = self.state_sharding()
        rows, whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        return Steps(
            init=jax.jit(self.init_state, out_shardings=state),
            train=jax.jit(
                self.train_step, in_shardings=(state, rows, whole), out_shardings=(state, whole), donate_argnums=0
            ),
            observe=jax.jit(
                self.observe_step, in_shardings=(state, rows, whole), out_shardings=state, donate_argnums=0
            ),
            views=jax.jit(self.view_step, in_shardings=(state, rows, whole), out_shardings=rows),
            augment=jax.jit(self.augment_step, in_shardings=(state, rows, whole), out_shardings=rows),
            refresh=jax.jit(
                self.refresh_step, in_shardings=(state, whole), out_shardings=(state, whole), donate_argnums=0
            ),
        )

    def _per_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def _encode_keys(self, params: Any, batch: Batch, at: Draws, data: jax.Array | None) -> jax.Array:
        def local(params: Any, batch: Batch, at: Draws, data: jax.Array | None) -> jax.Array:
            return jax.lax.map(lambda rows: self.objective.encode_keys(params, rows, at, data), batch)

        return self._per_device(local, (P(), ROWS, P(), P()), ROWS)(params, batch, at, data)

    def _gradients(self, state: TrainState, batch: Batch, data: jax.Array | None) -> tuple[Targets | None, Gradients]:
        """The objective over all microbatches and devices, one reduction of gradients; and targets known before the step."""
        method, at = self.objective.method, self._draws(state)

        def reduce(grads: Any, moments: Any, losses: Any, outputs: jax.Array) -> Gradients:
            moments = jax.tree.map(lambda m: jax.lax.pmean(m, "data"), moments)
            return Gradients(jax.lax.psum(grads, "data"), moments, jax.lax.psum(losses, "data"), outputs)

        def local(params: Any, rows: Rows, at: Draws, data: jax.Array | None) -> Gradients:
            def one(leaves: Any) -> tuple[Any, jax.Array]:
                batch, y, weight = leaves
                result = self.objective.gradients(params, Rows(batch, y, weight, rows.dictionary), at, data)
                return result[:3], result.outputs

            (grads, moments, losses), outputs = accumulate(one, rows[:3])
            moments = jax.tree.map(lambda m: m / len(rows.weight), moments)
            return reduce(grads, moments, losses, outputs)

        def local_whole(*args: Any) -> Gradients:
            return reduce(*WholeStep(self.objective, *args).gradients())

        out_specs = Gradients(P(), P(), P(), ROWS)
        if method.needs_outputs:
            whole, specs = self._whole_step(state, batch, at, data)
            return None, self._per_device(local_whole, specs, out_specs)(*whole)
        rows, targets = self._rows(state, batch, at, data)
        specs = (P(), Rows(ROWS, ROWS, ROWS, P()), P(), P())
        return targets, self._per_device(local, specs, out_specs)(state.params, rows, at, data)

    def _draws(self, state: TrainState) -> Draws:
        return Draws(state.seed, epoch=1 + state.step // self.spec.steps_per_epoch, step=state.step)

    def _rows(self, state: TrainState, batch: Batch, at: Draws, data: jax.Array | None) -> tuple[Rows, Targets]:
        """Pseudo-labels and weights of a step's rows, for a method that knows them before the step."""
        encode_keys = lambda params: self._encode_keys(params, batch, at, data)  # noqa: E731
        keys = at.of_examples(draws.TASK, batch.index)
        targets = self.objective.method.targets(encode_keys, state.method, batch, keys)
        return Rows(batch, targets.y, self._weight(batch.valid & targets.known), targets.dictionary), targets

    def _weight(self, counted: jax.Array) -> jax.Array:
        weight = counted.astype(self.dtype)
        return weight / jnp.maximum(jnp.sum(weight), 1)

    def _whole_step(self, state: TrainState, batch: Batch, at: Draws, data: jax.Array | None) -> tuple[tuple, tuple]:
        """Arguments of WholeStep after the objective, and how they are split over devices."""
        arguments = (state.params, state.method, batch, self._weight(batch.valid), at, data)
        return arguments, (P(), self.objective.method.state_spec(self.spec), ROWS, ROWS, P(), P())

    def view_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> Shown:
        """What the next step would learn from, to look at: leaves [M, rows, ...], PICTURES rows of images a device."""
        objective, at = self.objective, self._draws(state)

        def local(params: Any, rows: Rows, at: Draws, data: jax.Array | None) -> Shown:
            def one(leaves: Any) -> tuple[Any, Shown]:
                batch, y, weight = leaves
                rows_here = Rows(batch, y, weight, rows.dictionary)
                x = objective.online_crops(batch, at, data)
                attacked = objective.attack(params, x, rows_here, at) if objective.views.attacks else None
                return (), objective.views_of(params, x, attacked, rows_here, at)

            return accumulate(one, rows[:3])[1]

        if objective.method.needs_outputs:
            whole, specs = self._whole_step(state, batch, at, data)
            return self._per_device(lambda *args: WholeStep(objective, *args).views(), specs, ROWS)(*whole)
        rows, _ = self._rows(state, batch, at, data)
        specs = (P(), Rows(ROWS, ROWS, ROWS, P()), P(), P())
        return self._per_device(local, specs, ROWS)(state.params, rows, at, data)


class Steps(NamedTuple):
    """Compiled functions of a run: init(seed); train, observe, views and augment of (state, batch, data); refresh(state, epoch)."""

    init: Any
    train: Any
    observe: Any
    views: Any
    augment: Any
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
