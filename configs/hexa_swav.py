"""HEXA on SwAV, ResNet-50, ImageNet: every crop attacked against the codes of its clean crops (alpha1 = 1).

Command:   python -m hexa_jax.main --config=configs/hexa_swav.py --workdir=DIR
Arguments: those of configs/swav.py
Hardware:  as configs/swav.py.
Time:      not measured.
Expected:  no published number: the paper has no HEXA on SwAV.
"""

from hexa_jax.configs import common, swav


def get_config(text=None):
    """The recipe."""
    return common.hard_examples(swav.get_config(text))
