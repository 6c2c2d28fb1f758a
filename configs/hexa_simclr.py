"""HEXA on SimCLR, ResNet-50, ImageNet: both crops attacked (alpha1 = 1), the clean views stay the candidates.

Command:   python -m hexa_jax.main --config=configs/hexa_simclr.py --workdir=DIR
Arguments: those of configs/simclr.py
Hardware:  as configs/simclr.py.
Time:      not measured.
Expected:  no published number: the paper has no HEXA on SimCLR.
"""

from hexa_jax.configs import common, simclr


def get_config(text=None):
    """The recipe."""
    return common.hard_examples(simclr.get_config(text))
