"""Supervised ResNet-50 on ImageNet: the network that self-supervised ones are compared with.

Command:   python -m hexa_jax.main --config=configs/supervised.py --workdir=DIR
           AdvProp: --config.scheme=std+adv; CutMix beside the clean images: --config.scheme=std+cmx
Arguments: epochs=90; batch=256: the learning rate follows it
Hardware:  written for 8 accelerators of 32 images each, BatchNorm per 32; runs the same on any number (bn_group_size).
Time:      not measured here.
Expected:  76.4 ImageNet top-1 of the classifier (Goyal et al., 2017, Table 1); the paper's tables have 76.5. A run reports kNN
           and a linear probe on its features, as for the other methods, not the classifier's own
           accuracy.

Numbers: Goyal et al.: SGD 0.1 per 256 images, x0.1 at epochs 30, 60 and 80 of 90, weight decay
1e-4, residual branches that start at zero, crop and flip only. Ours: weight decay also on
BatchNorm, no warm-up for large batches.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=90, batch=256)
    config = common.supervised(common.get_config())
    config.epochs, config.batch_size = choice.epochs, choice.batch
    config.model.zero_init_residual = True
    config.optimizer.learning_rate = 0.1 * choice.batch / 256
    config.optimizer.schedule = "steps"
    config.optimizer.milestones = common.milestones(choice.epochs, 30, 60, 80, of=90)
    return common.on_imagenet(config)
