"""The max-pool of the ResNet stem.

Only on TPUs is its gradient left to XLA's select-and-scatter.
"""

import itertools

import jax
import jax.numpy as jnp

SIZE, STRIDE, PADDING = 3, 2, 1
PLACES = list(itertools.product(range(SIZE), range(SIZE)))


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Return maxima of 3x3 windows at every other pixel, the border being -inf.

    Of equal maxima the first has the gradient, in the order of rows. XLA's own gradient is a
    select-and-scatter, which TPUs have an operation for; elsewhere the gradient is added up from
    the nine places of a window. On a CPU that is many times faster. On a GPU XLA would write four
    int32 maps and add into the result with atomics; here it is one map of bytes, found with the
    maxima.

    Args:
        x: [N, H, W, C].

    Returns:
        [N, ceil(H / 2), ceil(W / 2), C].
    """
    window, strides = (1, SIZE, SIZE, 1), (1, STRIDE, STRIDE, 1)
    padding = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


# x, y, and the place of each maximum, found in either pass
Saved = tuple[jax.Array, jax.Array, jax.Array]


def _forward(x: jax.Array) -> tuple[jax.Array, Saved]:
    y, places = jax.lax.platform_dependent(x, cpu=_maxima, tpu=_maxima, default=_maxima_and_places)
    return y, (x, y, places)


def _backward(saved: Saved, dy: jax.Array) -> tuple[jax.Array]:
    branches = {
        "cpu": _gradient_by_place,
        "tpu": _gradient_by_scattering,
        "default": _gradient_by_known_place,
    }
    return (jax.lax.platform_dependent(*saved, dy, **branches),)


# What a platform does in both passes; XLA drops what its backward pass does not use of (x, y,
# places).


def _maxima(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = max_pool.fun(x)
    return y, jnp.zeros(y.shape, jnp.uint8)


def _maxima_and_places(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Maxima, and the place of the first of them, uint8, in one pass over x."""
    y, *others = _windows(x)
    places = jnp.zeros(y.shape, jnp.uint8)
    for number, seen in enumerate(others, start=1):
        places = jnp.where(seen > y, jnp.uint8(number), places)
        y = jnp.maximum(y, seen)
    return y, places


def _gradient_by_scattering(
    x: jax.Array, y: jax.Array, places: jax.Array, dy: jax.Array
) -> jax.Array:
    del y, places
    return jax.vjp(max_pool.fun, x)[1](dy)[0]


def _gradient_by_place(x: jax.Array, y: jax.Array, places: jax.Array, dy: jax.Array) -> jax.Array:
    del places
    found = jnp.full(y.shape, len(PLACES), jnp.uint8)
    for number, seen in reversed(list(enumerate(_windows(x)))):
        found = jnp.where(seen == y, jnp.uint8(number), found)
    # Behind a barrier, else they are found again for each place.
    return _from_places(jax.lax.optimization_barrier(found), dy, x.shape)


def _gradient_by_known_place(
    x: jax.Array, y: jax.Array, places: jax.Array, dy: jax.Array
) -> jax.Array:
    del y
    return _from_places(places, dy, x.shape)


def _windows(x: jax.Array) -> list[jax.Array]:
    """Return the nine places of all windows, row by row: [N, ceil(H / 2), ceil(W / 2), C] each."""
    padded = jnp.pad(
        x, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)), constant_values=-jnp.inf
    )
    ends = [STRIDE * (-(-side // STRIDE) - 1) + 1 for side in x.shape[1:3]]
    return [padded[:, i : i + ends[0] : STRIDE, j : j + ends[1] : STRIDE] for i, j in PLACES]


def _from_places(places: jax.Array, dy: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The gradient of x, of `shape`, from the places of maxima."""

    def at(i: int, j: int) -> jax.Array:
        """Return dy where the maximum is at place (i, j) of its window."""
        shifts = ((i // 2, 1 - i // 2), (j // 2, 1 - j // 2))
        here = places == PLACES.index((i, j))
        return jnp.pad(jnp.where(here, dy, jnp.zeros([], dy.dtype)), ((0, 0), *shifts, (0, 0)))

    # Even rows are the first of one window and the last of the window above, odd ones in the
    # middle; columns, too.
    kinds = ((0, 2), (1,))
    parts = [
        sum(at(i, j) for i, j in itertools.product(rows, columns))
        for rows in kinds
        for columns in kinds
    ]
    num, pairs_down, pairs_across, channels = parts[0].shape
    dx = (
        jnp.stack(parts, axis=3)
        .reshape(num, pairs_down, pairs_across, 2, 2, channels)
        .transpose(0, 1, 3, 2, 4, 5)
    )
    dx = dx.reshape(num, 2 * pairs_down, 2 * pairs_across, channels)
    return dx[:, PADDING : PADDING + shape[1], PADDING : PADDING + shape[2]]


max_pool.defvjp(_forward, _backward)
