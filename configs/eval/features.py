"""Frozen pooled features, labels and file names of any images, for use elsewhere.

Command:   python -m hexa_jax.main --config=configs/eval/features.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=folder:IMAGES
Arguments: format=npz (or parquet, which needs pyarrow)
Hardware:  any.
Time:      that of one forward pass.
Expected:  features.npz in the workdir, with features float32 [N, F], labels int32 [N] (-1: none) and names.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, format="npz")
    config = evaluation.get_config("features")
    config.format = choice.format
    return config
