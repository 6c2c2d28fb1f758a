"""Arithmetic of a step, counted in its jaxpr: multiplications and additions of matrix products and convolutions, nothing else.

XLA's own figure depends on what the compiler made of the step and leaves out or guesses what
libraries compute; this one is the same on every device, and the same for anyone who computes the
same step.
"""

import math
from typing import Any


def product_flops(jaxpr: Any) -> float:
    """FLOPs of a (closed) jaxpr on all devices: 2 per multiplication; padding counts, inserted zeros do not.

    Loops count as often as they run; one whose length is not known counts once, and of branches the
    largest.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    params, name = equation.params, equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return (
            2.0
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(lhs[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        per_output = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
        # A strided convolution's gradient is written as a convolution over an image with zeros
        # between its pixels.
        return (
            2.0
            * math.prod(equation.outvars[0].aval.shape)
            * per_output
            / math.prod(params["lhs_dilation"])
        )
    if name == "cond":
        return max(product_flops(branch) for branch in params["branches"])
    times = (
        params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
    )
    inner = [
        value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    return times * sum(product_flops(value) for value in inner)
