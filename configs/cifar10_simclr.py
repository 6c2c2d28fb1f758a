"""SimCLR on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_simclr.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  kNN 84.8 after 200 epochs, 87.9 after 800 in the benchmark of lightly-ai/lightly (docs of 2023; 82.8 and 87.5 in 2022),
           whose numbers these are: B = 512, SGD 0.24 (0.06 per 128 images), weight decay 5e-4,
           temperature 0.5, colour strength 0.5, crops from 8 %. Nothing measured here yet.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.benchmark_sgd(common.small_images(common.simclr(common.get_config())), 0.24)
    config.batch_size = config.bn_group_size = 512
    config.simclr.temperature = 0.5
    config.augment.brightness = config.augment.contrast = config.augment.saturation = 0.4
    config.augment.hue = 0.1
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
