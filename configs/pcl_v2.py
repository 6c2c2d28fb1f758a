"""PCL-v2, ResNet-50, ImageNet: MoCo-v2 with prototypes, the strongest baseline of low-shot classification in the paper's Table 2.

Command:   python -m hexa_jax.main --config=configs/pcl_v2.py --workdir=DIR
Arguments: epochs=200; scheme= (hard examples: std+adv, std+cmx, ...):
    --config=configs/pcl_v2.py:scheme=std+adv
Hardware:  written for 8 accelerators of 32 images each, BatchNorm per 32; runs the same on any number (bn_group_size).
Time:      not measured here.
Expected:  67.6 ImageNet linear top-1 after 200 epochs; VOC07 SVM mAP 47.9, 59.6, 66.2, 74.5 and 78.3 with 1, 2, 4, 8 and 16
           examples a class, 85.4 with all (README of salesforce/PCL).

All numbers but the precision are the reference's (salesforce/PCL main_pcl.py, with --mlp --aug-plus
--cos --temperature 0.2). What is clustered, and how, differs: hexa_jax/methods/pcl.py says in what.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    # the defaults are MoCo-v2's, which PCL-v2 shares
    config = common.on_imagenet(common.get_config())
    config.method = "pcl"
    config.epochs, config.scheme = choice.epochs, choice.scheme
    config.pcl.warmup_epochs = warmup_epochs(config.epochs)
    return config


def warmup_epochs(epochs: int) -> int:
    """Return how many epochs have no prototypes: the reference's 20, in runs of fewer than its 200 a tenth of them."""
    return max(1, min(20, epochs // 10))
