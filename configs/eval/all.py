"""All evaluations that the given data allow, in one table beside the paper's numbers, with random weights for comparison.

Command:   python -m hexa_jax.main --config=configs/eval/all.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.cifar10.source=tfds:cifar10:train --config.data.cifar10.eval_source=tfds:cifar10:test ...
Arguments: family=deepcluster (or moco): the ImageNet probe's protocol
Hardware:  as each evaluation; they run one after another, and finished ones are not run again.
Time:      the sum of theirs.
Expected:  tables.md in the workdir, with the paper's numbers beside the measured ones.

Robustness (configs/eval/robustness.py) is judged on imagenet's images with 50,000 of them to learn
from, a pass over some 300,000 images for each network; transfer on CIFAR's at the network's own
size (configs/eval/transfer.py). --config.without leaves some out.

Each group of data names training and held-out examples; a group without them is left out. Images
have the size that the network was trained at, those of CIFAR the protocol's 224 pixels; resize and
crop replace it where they are not 0.
"""

import ml_collections

from hexa_jax.configs import common

GROUPS = ("imagenet", "imagenet_1pct", "imagenet_10pct", "imagenet_100pct", "cifar10", "cifar100", "voc")


def get_config(text=None):
    """Which data there are."""
    choice = common.arguments(text, family="deepcluster")
    config = ml_collections.ConfigDict()
    config.task = "tables"
    config.checkpoint = ""
    config.family = choice.family
    config.without = ""  # evaluations to leave out, such as robustness,finetune_cifar
    # strengths of corruptions for images of about 224 pixels; cifar: of 32
    config.corruptions = "imagenet"
    config.with_random = True  # also evaluate random weights of the same network
    config.seed = 0
    config.precision = "float32"
    config.data = data = ml_collections.ConfigDict()
    for group in GROUPS:
        data[group] = ml_collections.ConfigDict({"source": "", "eval_source": "", "resize": 0, "crop": 0, "limit": 0})
    config.runtime = ml_collections.ConfigDict({"num_devices": 0, "data_dir": "", "data_cache": "~/.cache/hexa_jax"})
    return config
