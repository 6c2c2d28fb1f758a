"""DeepCluster-v2 on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_deepcluster_v2.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  no published number; runs on parts of the data are in docs/results.md. The numbers are ours: configs/deepcluster_v2.py
           with a head, clusters and batch for a small data set.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.small_images(common.deepcluster(common.get_config()))
    config.batch_size = 512
    config.bn_group_size = 512
    config.model.head_hidden = 512
    config.deepcluster.num_clusters = 512
    config.data.min_scale = (0.2,)
    config.optimizer.learning_rate = 0.6
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
