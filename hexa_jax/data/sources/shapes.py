"""`shapes[:SPLIT]`: drawn shapes, for tests and first steps without any download."""

from hexa_jax.data.shapes import ShapesSource
from hexa_jax.data.source import DataError
from hexa_jax.data.sources.registry import Options, register


def open_shapes(where: str, options: Options) -> ShapesSource:
    """Return the drawn shapes of a split."""
    size, count = options.image_size, options.num_examples
    try:
        return ShapesSource(
            where or "train", image_size=size, num_examples=count, seed=options.seed
        )
    except ValueError as error:
        raise DataError(str(error)) from None


register(
    "shapes",
    open_shapes,
    usage="shapes[:SPLIT]",
    summary="ten classes told apart by shape alone, drawn from a seed, with the splits train and test: "
    "`config.data.shapes_count` images of `config.data.shapes_size` pixels",
)
