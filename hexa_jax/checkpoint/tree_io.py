"""The leaves of a training state by name: how a checkpoint stores and compares them."""

from typing import Any

import jax
import numpy as np

from hexa_jax.checkpoint.manifest import CheckpointError


def named(tree: Any) -> dict[str, Any]:
    """Return leaves by path, such as `params/conv1/kernel`, in the tree's order.

    Raises:
        CheckpointError: two leaves have the same name, or one is a typed key.
    """
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/") or "."
        if name in found:
            raise CheckpointError(f"two leaves of the state are called {name}")
        is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        found[name] = leaf if is_array else np.asarray(leaf)
        if jax.dtypes.issubdtype(found[name].dtype, jax.dtypes.extended):
            raise CheckpointError(
                f"{name} is a typed key, which no checkpoint can hold; store its key_data instead"
            )
    return found


def specs(leaves: dict[str, Any]) -> dict[str, dict]:
    """Return shape and dtype of each leaf, as JSON holds them."""
    return {k: {"shape": list(x.shape), "dtype": str(x.dtype)} for k, x in leaves.items()}


def check_same(path: Any, saved: dict[str, dict], wanted: dict[str, dict]) -> None:
    """Compare the `specs` of two states.

    Raises:
        CheckpointError: they differ; it names the first differences.
    """

    def text(spec: dict) -> str:
        return f"shape {tuple(spec['shape'])} {spec['dtype']}"

    found = [
        f"the checkpoint holds {name} of {text(saved[name])}, this model wants {text(spec)}"
        for name, spec in wanted.items()
        if saved.get(name, spec) != spec
    ]
    lacking, unknown = ([k for k in a if k not in b] for a, b in ((wanted, saved), (saved, wanted)))
    found += [f"the checkpoint lacks {name}, which this model wants" for name in lacking]
    found += [f"the checkpoint holds {name}, which this model lacks" for name in unknown]
    if found:
        more = f"; and {len(found) - 3} more differences" if len(found) > 3 else ""
        first = "; ".join(found[:3])
        raise CheckpointError(f"{path} is of another architecture or method: {first}{more}")


def targets(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return what orbax shall read each leaf as: an array on its devices, or a NumPy array.

    Leaves without elements are left out.
    """
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        # Orbax makes arrays in a thread outside of `with jax.enable_x64()`, which rounds 64 bits
        # to 32.
        if isinstance(leaf, np.ndarray) or leaf.dtype.itemsize > 4:
            found[name] = np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # takes no memory
        else:
            found[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
    return {name: target for name, target in found.items() if target.size}


def placed(like: Any, arrays: dict[str, Any]) -> Any:
    """Return the tree `like` with the values of `arrays`, which were read as its `targets`."""
    originals, treedef = jax.tree.flatten(like)
    result = []
    for original, (name, leaf) in zip(originals, named(like).items(), strict=True):
        array = arrays[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype)
        if not isinstance(leaf, np.ndarray) and isinstance(array, np.ndarray):
            array = jax.make_array_from_callback(leaf.shape, _sharding(leaf), array.__getitem__)
        is_number = isinstance(original, bool | int | float | complex)
        result.append(type(original)(array.item()) if is_number else array)
    return jax.tree.unflatten(treedef, result)


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
