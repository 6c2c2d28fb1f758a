"""A linear classifier on frozen features of your own labelled images, at the size that the network was trained at.

Command:   python -m hexa_jax.main --config=configs/eval/linear.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=folder:TRAIN --config.data.eval_source=folder:TEST
Arguments: epochs=20
Hardware:  any.
Time:      that of one forward pass over both sets, and less.
Expected:  depends on the images.

Numbers: those of configs/eval/linear_cifar.py, the protocol for small data.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, epochs=20)
    config = evaluation.get_config("linear_features")
    config.epochs = choice.epochs
    config.batch_size = 256
    config.learning_rates = (0.1, 0.01, 0.001)
    config.milestones = common.milestones(choice.epochs, 35, 70)
    config.decay = 0.1
    return config
