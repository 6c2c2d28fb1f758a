"""Rotation prediction on Imagenette at 160 pixels or any small set of photographs: ResNet-18, crops of 128 pixels.

Command:   python -m hexa_jax.main --config=configs/imagenette_rotation.py --workdir=DIR
           other data: --config.data.source=folder:TRAIN --config.data.eval_source=folder:VAL
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator.
Time:      not measured.
Expected:  no number; nothing measured here yet. Optimiser as in configs/cifar10_rotation.py.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.falling_steps(common.imagenette(common.rotation(common.get_config())), choice.epochs)
    config.scheme = choice.scheme
    return config
