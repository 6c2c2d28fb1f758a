"""MoCo-v2, ResNet-50, ImageNet, 200 epochs: the plain method that HEXA_MoCo is compared with.

Command:   python -m hexa_jax.main --config=configs/moco_v2.py --workdir=DIR
Hardware:  written for 8 accelerators of 32 images each, BatchNorm per 32; runs the same on any number (bn_group_size).
Time:      53 hours on 8 V100 in the reference (README of facebookresearch/moco); not measured here.
Expected:  67.5 +- 0.1 ImageNet linear top-1 (the reference's README; the paper's Table 1 has 67.5).

All numbers but the precision are the reference's (facebookresearch/moco main_moco.py, with --mlp --moco-t 0.2 --aug-plus --cos).
"""

from configs import common


def get_config():
    """The recipe."""
    config = common.get_config()  # the defaults are MoCo-v2's
    config.precision = "bfloat16"  # ours; the reference computes in float32
    config.runtime.workers = 8  # one decodes and cuts a few hundred images a second
    return config
