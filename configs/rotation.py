"""Rotation prediction (RotNet), ResNet-50, ImageNet: the handcrafted pretext task among the methods.

Command:   python -m hexa_jax.main --config=configs/rotation.py --workdir=DIR
           with hard examples: --config.scheme=std+adv
Arguments: epochs=105
Hardware:  any. A step sees 4 x 256 images, and BatchNorm groups of 32 examples are 128 images.
Time:      not measured.
Expected:  no number of our own; the paper has none for rotation at this size.

Numbers: facebookresearch/vissl, configs/config/pretrain/rotnet: SGD 0.1 for 256 images, x0.1 at
epochs 30, 60, 90 and 100, weight decay 1e-4, crop and flip only. Ours: every image in all four
orientations (as Gidaris et al. train), where VISSL draws one; weight decay also on BatchNorm.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    config = common.rotation(common.get_config())
    config.epochs = common.arguments(text, epochs=105).epochs
    config.optimizer.learning_rate = 0.1
    config.optimizer.schedule = "steps"
    config.optimizer.milestones = common.milestones(config.epochs, 30, 60, 90, 100, of=105)
    return common.on_imagenet(config)
