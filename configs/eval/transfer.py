"""Transfer of frozen features to several data sets: all labels, a share of them, and few images per class.

Command:   python -m hexa_jax.main --config=configs/eval/transfer.py --config.checkpoint=WORKDIR --workdir=DIR
           --config.targets='("cifar10=tfds:cifar10:train,tfds:cifar10:test", "mine=folder:TRAIN,folder:TEST")'
Hardware:  any; the classifiers are fitted on the CPU.
Time:      that of one forward pass over all images, and of the fits: not measured on large data sets.
Expected:  transfer.md in the workdir, one row per data set and read-out, with random weights beside; pictures in its report folder.

The read-out is the same throughout: multinomial logistic regression (L-BFGS) on features that are
standardized with the mean and deviation of all training features, which needs no label. Rngs of few
images are nested: the first image of a class is among the two, the two among the four, and so on.
Settings are fixed beforehand; nothing is chosen on test images.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    common.arguments(text)
    config = evaluation.get_config("transfer")
    # NAME=TRAIN,TEST each, sources as in data.source, which itself is not used here; pixels as in
    # data.resize and data.crop.
    config.targets = (
        "cifar10=tfds:cifar10:train,tfds:cifar10:test",
        "cifar100=tfds:cifar100:train,tfds:cifar100:test",
    )
    config.with_random = True  # also judge random weights of the same network
    config.regularization = 1e-4  # L2 weight of the classifier, relative to the mean loss
    config.iterations = 200  # of L-BFGS at most
    config.percents = (1.0, 10.0)  # shares of each class's training images
    config.shots = (1, 2, 4, 8, 16)  # training images per class
    config.draws = 5  # of shares and shots
    return config
