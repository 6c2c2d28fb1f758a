"""MoCo-v1, ResNet-50, ImageNet: a linear head and weaker augmentation than MoCo-v2's.

Command:   python -m hexa_jax.main --config=configs/moco_v1.py --workdir=DIR
Arguments: epochs=200; the learning rate falls at 60 and 80 % of them
Hardware:  written for 8 accelerators of 32 images each, BatchNorm per 32; runs the same on any number (bn_group_size).
Time:      53 hours on 8 V100 in the reference for 200 epochs (README of facebookresearch/moco); not measured here.
Expected:  60.6 ImageNet linear top-1 after 200 epochs (the reference's README and the MoCo paper).

Numbers: facebookresearch/moco main_moco.py without switches: temperature 0.07, lr 0.03 with x0.1 at
epochs 120 and 160, crops from 20 %, grayscale 0.2, jitter of strength 0.4 in all four on every
image, no blur. Ours: bfloat16; the jitter precedes the grayscale, which the reference draws first.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    # the other defaults are MoCo-v2's, and the same here
    config = common.on_imagenet(common.get_config())
    config.epochs = common.arguments(text, epochs=200).epochs
    config.moco.temperature = 0.07
    config.model.head_layers = 1
    config.augment.jitter_probability = (1.0,)
    config.augment.hue = 0.4
    config.augment.blur_probability = (0.0,)
    config.optimizer.schedule = "steps"
    config.optimizer.milestones = common.milestones(config.epochs, 60, 80)
    return config
