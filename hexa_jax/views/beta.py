"""Beta variates without rejection."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

TABLE = 8192  # cells of the quantile table that Beta variates are read from


def sample_beta(uniform: jax.Array, alpha: float, beta: float) -> jax.Array:
    """Turn uniform variates into Beta(alpha, beta) ones through a tabulated quantile function.

    jax.random.beta rejects in a loop whose length depends on the whole batch; across devices that
    is a collective per turn.

    Args:
        uniform: float [...] in [0, 1).
        alpha: first parameter, static.
        beta: second parameter, static.

    Returns:
        float [...] in [0, 1].
    """
    quantiles = scipy.special.betaincinv(alpha, beta, np.linspace(0, 1, TABLE + 1))
    position = uniform * TABLE
    cell = jnp.minimum(position.astype(jnp.int32), TABLE - 1)
    table = jnp.asarray(quantiles, uniform.dtype)
    return table[cell] + (position - cell) * (table[cell + 1] - table[cell])
