"""Robustness of frozen features: accuracy under attack and under common corruptions.

Command:   python -m hexa_jax.main --config=configs/eval/robustness.py --config.checkpoint=WORKDIR --workdir=DIR
           images of about 32 pixels: robustness.py:family=cifar --config.data.resize=32
           --config.data.crop=32
Arguments: family=imagenet (or cifar): for which size of images the corruptions' strengths are made
Hardware:  an accelerator for networks of full size: a test image costs 8 attacks of 10 steps, and 46 forward passes.
Time:      not measured on the whole data set.
Expected:  robustness.md in the workdir, with random weights beside; robustness.png and corruptions.png in its report folder.

Two read-outs of the features are judged, weighted kNN and a linear classifier (logistic
regression), both fitted to clean training images. The attack is PGD as in Madry et al. (ICLR 2018)
within +-epsilon of each pixel value, each read-out's own cross-entropy differentiated through the
frozen backbone; an image withstands epsilon if the clean image and the ends of the attacks up to
epsilon are all classified right. The corruptions are those of ImageNet-C and CIFAR-C that need no
download, parameters in hexa_jax/evals/corruptions.py; they change the crop that the network sees.
"""

import ml_collections

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, family="imagenet")
    config = evaluation.get_config("robustness")
    config.with_random = True  # also judge random weights of the same network
    config.test_images = 1000  # spread evenly over the test set; 0: all
    config.neighbours = 20
    config.temperature = 0.07
    config.regularization = 1e-4  # L2 weight of the linear classifier, relative to the mean loss

    config.attack = attack = ml_collections.ConfigDict()
    attack.epsilons = (1.0, 2.0, 4.0, 8.0)  # grey levels of 255
    attack.steps = 10
    attack.relative_step = 2.5  # a step is this much of epsilon / steps
    attack.random_start = False

    config.family = choice.family
    config.corruptions = (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "gaussian_blur",
        "defocus_blur",
        "contrast",
        "brightness",
        "jpeg_compression",
        "pixelate",
    )
    return config
