"""MoCo-v2 on CIFAR-10 or any set of 32-pixel images: ResNet-18 with the cifar stem, no blur, data resident on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_moco_v2.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such a run).
Time:      not measured on an accelerator.
Expected:  no published number for this recipe; a run on a part of the data with a narrow network is in docs/results.md.
"""

from configs import common


def get_config():
    """The recipe."""
    config = common.small_images(common.get_config())
    config.batch_size = 512
    config.shuffle_block = 512
    config.moco.queue_size = 4096
    config.moco.momentum = 0.99
    config.moco.temperature = 0.1
    config.optimizer.learning_rate = 0.06
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "cosine"
    return config
