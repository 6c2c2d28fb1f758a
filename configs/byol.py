"""BYOL, ResNet-50, ImageNet, two crops, B = 4096.

Command:   python -m hexa_jax.main --config=configs/byol.py --workdir=DIR
Arguments: epochs=1000 (or 300, 100; others take the numbers of the nearest of these); batch=4096:
    the learning rate follows it
Hardware:  512 TPU v3 in the reference. Fewer devices take --config.runtime.microbatches, but BatchNorm is over the whole
           batch: a smaller --config.bn_group_size goes with them, and is then another recipe.
Time:      not measured here (8 hours in the reference for 1000 epochs, README of google-deepmind/deepmind-research).
Expected:  ImageNet linear top-1 (the paper): 72.5 after 300 epochs, 74.3 after 1000.

Numbers: the paper and google-deepmind/deepmind-research, byol/. For 1000 epochs: lr 0.2 per 256
images, weight decay 1.5e-6, target momentum 0.996; for 300: 0.3, 1e-6, 0.99; for 100: 0.45, 1e-6,
0.99. LARS (trust 0.001; BatchNorm and biases neither decayed nor adapted), 10 epochs of warm-up, a
cosine per step, projector and predictor 4096 -> 256, BatchNorm over all devices, crops from 8 %,
blur 1.0 and 0.1, solarization 0 and 0.2. Ours: the loss is the mean over both crops, half of the
reference's sum: LARS takes the factor out of the steps of weights, against which weight decay then
counts twice, but the steps of BatchNorm parameters and biases, which it does not adapt, are half as
long. BatchNorm's moments are those of both crops together; heads end with a bias; crops are resized
bilinearly.
"""

import math

from hexa_jax.configs import common

# Epochs: learning rate per 256 images, weight decay, target momentum.
PRESETS = {100: (0.45, 1e-6, 0.99), 300: (0.3, 1e-6, 0.99), 1000: (0.2, 1.5e-6, 0.996)}


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=1000, batch=4096)
    if choice.epochs < 1:
        raise ValueError(f"epochs={choice.epochs} has no recipe: use one or more")
    config = common.byol(common.get_config())
    config.epochs = choice.epochs
    config.batch_size = config.bn_group_size = choice.batch
    learning_rate, config.optimizer.weight_decay, config.byol.momentum = PRESETS[_nearest(choice.epochs)]
    config.optimizer.name = "lars"
    config.optimizer.learning_rate = learning_rate * choice.batch / 256
    config.optimizer.schedule = "cosine"
    # runs of a few epochs have no room for ten
    config.optimizer.warmup_epochs = min(10, config.epochs // 2)
    return common.on_imagenet(config)


def _nearest(epochs: int) -> int:
    """Return the number of epochs in PRESETS that differs from `epochs` by the smallest factor."""
    return min(PRESETS, key=lambda known: abs(math.log(epochs / known)))
