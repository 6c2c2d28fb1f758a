"""SwAV on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_swav.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  kNN 84.2 after 200 epochs, 88.4 after 800 in the benchmark of lightly-ai/lightly (docs of 2023;
           83.3 and 88.1 in 2022; two crops from 14 %, no queue, other optimiser). The rest is ours:
           configs/swav.py with a head, prototypes and batch for a small data set. Nothing measured
           here yet.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.small_images(common.swav(common.get_config()))
    config.batch_size = config.bn_group_size = 512
    config.model.head_hidden = 512
    config.swav.num_prototypes = 512
    config.data.min_scale = (0.14,)
    config.optimizer.learning_rate = 0.6
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
