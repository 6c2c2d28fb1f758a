"""MoCo-v2, ResNet-50, ImageNet: the plain method that HEXA_MoCo is compared with.

Command:   python -m hexa_jax.main --config=configs/moco_v2.py --workdir=DIR
Arguments: epochs=200 (or 800): --config=configs/moco_v2.py:epochs=800
Hardware:  written for 8 accelerators of 32 images each, BatchNorm per 32; runs the same on any number (bn_group_size).
Time:      53 hours on 8 V100 in the reference for 200 epochs (README of facebookresearch/moco); not measured here.
Expected:  67.5 +- 0.1 ImageNet linear top-1 after 200 epochs (the reference's README and the paper's Table 1), 71.1 after 800.

All numbers but the precision are the reference's (facebookresearch/moco main_moco.py, with --mlp
--moco-t 0.2 --aug-plus --cos).
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    config = common.on_imagenet(common.get_config())  # the defaults are MoCo-v2's
    config.epochs = common.arguments(text, epochs=200).epochs
    return config
