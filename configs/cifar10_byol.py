"""BYOL on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_byol.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  kNN 87.2 after 200 epochs in the benchmark of lightly-ai/lightly, whose numbers these are: B = 512, projector and
           predictor 1024 -> 256, target momentum 0.99 (there constant, here it rises to 1), SGD,
           cosine, both crops with SimCLR's colors at strength 0.5, from 8 %. Nothing measured here
           yet.

The benchmark has a learning rate of 0.24, weight decay 5e-4 and half of BYOL's loss: with all of
it, half of that rate and twice that decay are the same steps.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.benchmark_sgd(common.small_images(common.byol(common.get_config())), 0.12)
    config.optimizer.weight_decay = 1e-3
    config.batch_size = config.bn_group_size = 512
    config.model.head_hidden = config.byol.predictor_hidden = 1024
    config.byol.momentum = 0.99
    config.augment.saturation = 0.4
    config.augment.solarize_probability = (0.0,)
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
