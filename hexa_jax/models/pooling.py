"""The max-pool of the ResNet stem, whose gradient on a CPU is not left to XLA's select-and-scatter."""

import itertools

import jax
import jax.numpy as jnp

SIZE, STRIDE, PADDING = 3, 2, 1


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """Maxima of 3x3 windows at every other pixel, [N, H, W, C] -> [N, ceil(H / 2), ceil(W / 2), C]; the border is -inf.

    Of equal maxima the first has the gradient, in the order of rows. On a CPU the gradient is added up from the nine places of
    a window: many times faster there than the select-and-scatter that XLA makes of it.
    """
    window, strides = (1, SIZE, SIZE, 1), (1, STRIDE, STRIDE, 1)
    padding = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _forward(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool.fun(x)
    return y, (x, y)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.platform_dependent(*saved, dy, cpu=_by_place, default=_by_scattering),)


def _by_scattering(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    del y
    return jax.vjp(max_pool.fun, x)[1](dy)[0]


def _by_place(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    padded = jnp.pad(x, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)), constant_values=-jnp.inf)
    ends = [STRIDE * (count - 1) + 1 for count in y.shape[1:3]]
    places = list(itertools.product(range(SIZE), range(SIZE)))
    first = jnp.full(y.shape, len(places), jnp.uint8)
    for number, (i, j) in reversed(list(enumerate(places))):
        seen = padded[:, i : i + ends[0] : STRIDE, j : j + ends[1] : STRIDE]
        first = jnp.where(seen == y, jnp.uint8(number), first)
    first = jax.lax.optimization_barrier(first)  # else it is found again for each place

    def at(i: int, j: int) -> jax.Array:
        """dy where the maximum is at place (i, j) of its window, by pairs of rows and of columns."""
        shifts = ((i // 2, 1 - i // 2), (j // 2, 1 - j // 2))
        return jnp.pad(jnp.where(first == places.index((i, j)), dy, jnp.zeros([], dy.dtype)), ((0, 0), *shifts, (0, 0)))

    # Even rows are the first of one window and the last of the window above, odd ones in the middle; columns, too.
    kinds = ((0, 2), (1,))
    parts = [sum(at(i, j) for i, j in itertools.product(rows, columns)) for rows in kinds for columns in kinds]
    num, pairs_down, pairs_across, channels = parts[0].shape
    dx = jnp.stack(parts, axis=3).reshape(num, pairs_down, pairs_across, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    dx = dx.reshape(num, 2 * pairs_down, 2 * pairs_across, channels)
    return dx[:, PADDING : PADDING + x.shape[1], PADDING : PADDING + x.shape[2]]


max_pool.defvjp(_forward, _backward)
