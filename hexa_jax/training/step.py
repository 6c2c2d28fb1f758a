"""The pure functions of a training run, and how they are compiled.

What touches images runs device by device under shard_map: gradients are summed over views and
microbatches first, then over devices, once, in the parameters' own precision. The small rest (keys,
queue, bank, optimiser) is written for whole arrays.

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

from hexa_jax.core.batch import Batch
from hexa_jax.core.rngs import Purpose, Rngs, purpose_key
from hexa_jax.methods.base import Encode, Spec, Targets
from hexa_jax.models.norm import (
    ADVERSARIAL,
    CLEAN,
    EVALUATION,
    average_moments,
    blend,
    fill_both_sets,
    follow_clean,
    stats_collection,
)
from hexa_jax.parallel.mesh import ROWS
from hexa_jax.training.objective import Gradients, Inputs, Objective
from hexa_jax.views.preview import ViewPreview


class TrainState(NamedTuple):
    """Everything that a resumed run needs.

    Attributes:
        seed: uint32, decides every random number of the run.
        step: int32, optimiser steps taken.
        params: {"network": the network's parameters, "method": the method's own}, float32 (float64
            under precision "float64").
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

    def init_state(self, seed: jax.Array, backbone: Any = None) -> TrainState:
        """A fresh state; the seed, a uint32 scalar, decides every random number in it.

        Args:
            seed: uint32 scalar.
            backbone: weights to start from, as `fill_both_sets` takes them, float32; None: random
                ones. What a method derives from the network, such as a key encoder, is derived from
                them.
        """
        seed = jnp.asarray(seed, jnp.uint32)
        network_key, method_key = jax.random.split(purpose_key(seed, Purpose.INIT))
        crops = (jnp.zeros((1, 1, 32, 32, 3)),)  # parameters do not depend on the image size
        variables = self.objective.network.init(network_key, crops, EVALUATION)
        if backbone is not None:
            variables = fill_both_sets(variables, backbone)
        variables = jax.tree.map(lambda x: x.astype(self.dtype), variables)
        own = self.objective.method.init_params(jax.random.fold_in(method_key, 1), self.spec)
        own = jax.tree.map(lambda x: x.astype(self.dtype), own)
        params = {"network": variables.pop("params"), "method": own}
        method = self.objective.method.init(method_key, params, self.spec)
        return TrainState(
            seed, jnp.zeros([], jnp.int32), params, variables, self.optimizer.init(params), method
        )

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
            return jax.ShapeDtypeStruct(
                lead + shape, dtype, sharding=NamedSharding(self.mesh, ROWS)
            )

        sets = self.objective.scheme.crop_sets
        pixels = [leaf(jnp.uint8, sets * r.count, r.size, r.size, 3) for r in crops.resolutions]
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

    def train_step(
        self, state: TrainState, batch: Batch, data: jax.Array | None = None
    ) -> tuple[TrainState, dict]:
        """One optimiser step on leaves [M, n, ...]; returns the new state and scalar metrics."""
        method, scheme = self.objective.method, self.objective.scheme
        rngs = self._rngs(state)
        inputs, targets = self._inputs(state, batch, rngs, data)
        result = self._reduced_gradients(state.params, inputs, rngs, data)
        grads = scheme.divide(result.params, state.step)
        grads = grads | {"method": method.freeze(grads["method"], state.step)}
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params = params | {"method": method.project(params["method"])}
        batch_stats = self._blend(state.batch_stats, result.moments, state.step)
        params, opt_state, batch_stats = self._before_first_attack(
            params, opt_state, batch_stats, state.step
        )
        new_state = TrainState(
            seed=state.seed,
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            method=method.update(
                state.method,
                params,
                batch._replace(clean=self.objective.clean_rows(batch.row, state.step)),
                result.outputs,
                targets,
                state.step,
            ),
        )
        means = self.objective.mean_losses(result.losses, inputs, state.step)
        metrics = {f"loss_{name}": loss for name, loss in means.items()}
        metrics["loss"] = scheme.total_loss(result.losses, state.step)
        metrics["embedding_std"] = embedding_std(result.outputs)
        metrics["gradient_norm"] = optax.tree.norm(grads)
        metrics["parameter_norm"] = optax.tree.norm(params)
        metrics["invalid"] = jnp.sum(~batch.valid)
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    def forward_only_step(
        self, state: TrainState, batch: Batch, data: jax.Array | None = None
    ) -> TrainState:
        """Run forward in training mode: BatchNorm statistics and the method's first pass."""
        outputs, moments = self._forward(state, batch, data)
        collection = stats_collection(CLEAN)
        batch_stats = state.batch_stats | {
            collection: blend(state.batch_stats[collection], moments)
        }
        state, method = state._replace(batch_stats=batch_stats), self.objective.method
        if not method.needs_first_pass:
            return state
        return state._replace(
            method=method.update(state.method, state.params, batch, outputs, None, state.step)
        )

    def moments_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> Any:
        """Return the clean BatchNorm moments of a batch of training crops; write nothing."""
        moments = self._forward(state, batch, data)[1]
        return average_moments(state.batch_stats[stats_collection(CLEAN)], moments)

    def _forward(
        self, state: TrainState, batch: Batch, data: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """Outputs [M, n, V, D] of the first pass's crops, and the pass's moments."""
        rngs = self._rngs(state)._replace(epoch=jnp.int32(0))

        def local(
            params: Any, batch: Batch, rngs: Rngs, data: jax.Array | None
        ) -> tuple[jax.Array, Any]:
            def one(rows: Batch) -> tuple[jax.Array, Any]:
                return self.objective.forward(params, self.objective.online_crops(rows, rngs, data))

            outputs, moments = jax.lax.map(one, batch)
            return outputs, jax.tree.map(
                lambda m: jax.lax.pmean(jnp.mean(m, axis=0), "data"), moments
            )

        return self._per_device(local, (P(), ROWS, P(), P()), (ROWS, P()))(
            state.params, batch, rngs, data
        )

    def augment_step(self, state: TrainState, batch: Batch, data: jax.Array | None = None) -> Any:
        """Return the next step's crops as the networks get them.

        [M, rows, V, H, W, 3] per resolution, and the key crops after them.
        """
        objective, rngs = self.objective, self._rngs(state)

        def local(batch: Batch, rngs: Rngs, data: jax.Array | None) -> Any:
            def one(rows: Batch) -> Any:
                crops = objective.online_crops(rows, rngs, data)
                return (
                    (*crops, objective.key_crops(rows, rngs, data))
                    if objective.method.key_crops
                    else crops
                )

            return jax.lax.map(one, batch)

        return self._per_device(local, (ROWS, P(), P()), ROWS)(batch, rngs, data)

    def refresh_step(self, state: TrainState, epoch: jax.Array) -> tuple[TrainState, dict]:
        """What the method does before epoch `epoch` (int32, from 0), and scalars about it."""
        key = purpose_key(state.seed, Purpose.REFRESH)
        method = self.objective.method.refresh(jax.random.fold_in(key, epoch), state.method)
        return state._replace(method=method), self.objective.method.describe(state.method, method)

    def compile(self) -> "CompiledSteps":
        """The jitted functions; the state is donated, its sharding is fixed."""
        # What runs once is not worth optimizing: on a CPU, compiling takes four times as long as
        # without.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        once = {"xla_backend_optimization_level": 0} if on_cpu else None
        state = self.state_sharding()
        rows, whole = NamedSharding(self.mesh, ROWS), NamedSharding(self.mesh, P())
        return CompiledSteps(
            init=jax.jit(self.init_state, out_shardings=state, compiler_options=once),
            train=jax.jit(
                self.train_step,
                in_shardings=(state, rows, whole),
                out_shardings=(state, whole),
                donate_argnums=0,
            ),
            observe=jax.jit(
                self.forward_only_step,
                in_shardings=(state, rows, whole),
                out_shardings=state,
                donate_argnums=0,
            ),
            moments=jax.jit(
                self.moments_step, in_shardings=(state, rows, whole), out_shardings=whole
            ),
            views=jax.jit(
                self.preview_step,
                in_shardings=(state, rows, whole),
                out_shardings=rows,
                compiler_options=once,
            ),
            augment=jax.jit(
                self.augment_step, in_shardings=(state, rows, whole), out_shardings=rows
            ),
            refresh=jax.jit(
                self.refresh_step,
                in_shardings=(state, whole),
                out_shardings=(state, whole),
                donate_argnums=0,
            ),
        )

    def _per_device(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _rngs(self, state: TrainState) -> Rngs:
        return Rngs(state.seed, epoch=1 + state.step // self.spec.steps_per_epoch, step=state.step)

    def _inputs(
        self, state: TrainState, batch: Batch, rngs: Rngs, data: jax.Array | None
    ) -> tuple[Inputs, Targets]:
        """Return what is known of a step's rows before it: pseudo-labels, if any, and weights."""
        objective = self.objective

        def encoder(
            crops: Callable[[Batch, Rngs, Any], tuple[jax.Array, ...]],
        ) -> Callable[[Any], jax.Array]:
            def local(params: Any, batch: Batch, rngs: Rngs, data: jax.Array | None) -> jax.Array:
                return jax.lax.map(
                    lambda rows: objective.encode(params, crops(rows, rngs, data)), batch
                )

            specs = P(), ROWS, P(), P()
            return lambda params: self._per_device(local, specs, ROWS)(params, batch, rngs, data)

        encode = Encode(
            key_crops=encoder(lambda *arguments: (objective.key_crops(*arguments),)),
            crops=encoder(objective.online_crops),
        )
        keys = rngs.per_example_keys(Purpose.TASK, batch.index)
        targets = objective.method.targets(encode, state.params, state.method, batch, keys)
        counted = (batch.valid & targets.known).astype(self.dtype)
        weight = counted / jnp.maximum(jnp.sum(counted), 1)
        return Inputs(batch, targets.y, weight, targets.dictionary, state.method), targets

    @property
    def _input_specs(self) -> tuple:
        """How (params, inputs, rngs, data) are split over devices."""
        inputs = Inputs(ROWS, ROWS, ROWS, P(), self.objective.method.state_spec(self.spec))
        return P(), inputs, P(), P()

    def _reduced_gradients(
        self, params: Any, inputs: Inputs, rngs: Rngs, data: jax.Array | None
    ) -> Gradients:
        """Return the gradients over all microbatches and devices, reduced once."""

        def local(*arguments: Any) -> Gradients:
            grads, moments, losses, outputs = self.objective.device_gradients(*arguments)
            moments = jax.tree.map(lambda m: jax.lax.pmean(m, "data"), moments)
            return Gradients(
                jax.lax.psum(grads, "data"), moments, jax.lax.psum(losses, "data"), outputs
            )

        out_specs = Gradients(P(), P(), P(), ROWS)
        return self._per_device(local, self._input_specs, out_specs)(params, inputs, rngs, data)

    def preview_step(
        self, state: TrainState, batch: Batch, data: jax.Array | None = None
    ) -> ViewPreview:
        """Return what the next step would learn from, to look at.

        Leaves [M, rows, ...], PICTURES rows of images per device.
        """
        rngs = self._rngs(state)
        inputs, _ = self._inputs(state, batch, rngs, data)
        preview = self._per_device(self.objective.device_preview, self._input_specs, ROWS)
        return preview(state.params, inputs, rngs, data)

    def _blend(
        self, batch_stats: dict[str, Any], moments: dict[str, Any], step: jax.Array
    ) -> dict[str, Any]:
        """Return the running statistics after step int32.

        One update per training pass that counted, in the order of the passes.
        """
        objective, batch_stats = self.objective, dict(batch_stats)
        norms = {CLEAN: CLEAN} | {view.name: view.norm for view in objective.scheme.views}
        for name in (name for name in norms if name in moments):
            collection = stats_collection(norms[name])
            before, after = batch_stats[collection], blend(batch_stats[collection], moments[name])
            active = objective.has_pass(name, step)
            if active is not True:
                after = jax.tree.map(
                    lambda old, new, active=active: jnp.where(active, new, old), before, after
                )
            batch_stats[collection] = after
        return batch_stats

    def _before_first_attack(
        self, params: Any, opt_state: Any, batch_stats: Any, step: jax.Array
    ) -> tuple:
        """Until its first pass, the adversarial BatchNorm set is a copy of the clean one.

        It would otherwise start from a fresh network's values, or from what weight decay has left
        of them: without a gradient Adam makes whole steps of it.
        """
        started = self.objective.scheme.auxiliary_norm_started(step)
        if started is True:
            return params, opt_state, batch_stats
        clean = batch_stats[stats_collection(CLEAN)]
        copies = (
            follow_clean(params),
            follow_clean(opt_state),
            batch_stats | {stats_collection(ADVERSARIAL): clean},
        )
        now = params, opt_state, batch_stats
        return jax.tree.map(lambda own, copy: jnp.where(started, own, copy), now, copies)


class CompiledSteps(NamedTuple):
    """Compiled functions of a run.

    init(seed[, backbone]); refresh(state, epoch); the others take (state, batch, data).
    """

    init: Any
    train: Any
    observe: Any
    moments: Any
    views: Any
    augment: Any
    refresh: Any


def embedding_std(outputs: jax.Array) -> jax.Array:
    """Spread of embeddings [..., D]: mean standard deviation per dimension times sqrt(D).

    About 1 for unit vectors spread over the sphere, 0 when all embeddings are the same (collapse).
    """
    dim = outputs.shape[-1]
    # Without joining the axes first: that would gather every embedding on every device.
    return jnp.mean(jnp.std(outputs, axis=tuple(range(outputs.ndim - 1)))) * dim**0.5
