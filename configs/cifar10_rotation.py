"""Rotation prediction on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_rotation.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  no number; nothing measured here yet. SGD 0.1, x0.2 at 30, 60 and 80 % of the epochs, weight decay 5e-4 (ours).
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.falling_steps(common.small_images(common.rotation(common.get_config())), choice.epochs)
    config.batch_size = 128
    config.cutmix_block = 16  # the rows of one of 8 devices
    config.scheme = choice.scheme
    return config
