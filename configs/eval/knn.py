"""Weighted k-nearest-neighbour accuracy on frozen pooled features.

Command:   python -m hexa_jax.main --config=configs/eval/knn.py --config.checkpoint=WORKDIR --workdir=DIR
Hardware:  any.
Time:      that of one forward pass over both sets.
Expected:  docs/results.md has figures measured here.

Cosine similarity, votes weighted by exp(similarity / temperature), as in InstDisc and its
followers.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    common.arguments(text)
    config = evaluation.get_config("knn")
    config.neighbours = (20, 200)
    config.temperatures = (0.07, 0.1)
    # judge the training examples by one another; needs no data.eval_source
    config.leave_one_out = False
    return config
