"""PCL-v2 on CIFAR-10 or any set of 32-pixel images: ResNet-18, cifar stem, no blur, data on the device.

Command:   python -m hexa_jax.main --config=configs/cifar10_pcl_v2.py --workdir=DIR
           other data: --config.data.source=arrays:FILE.npz
           --config.data.eval_source=arrays:TEST.npz (or folder:DIR)
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator. On a CPU use fewer channels and a part of the data (docs/results.md has such runs).
Time:      not measured on an accelerator.
Expected:  no published number.

The numbers are configs/cifar10_moco_v2.py's; ours are the clusters, one for each 50, 25 and 12.5
images as on ImageNet, and their temperature, which is MoCo's here.
"""

from hexa_jax.configs import cifar10_moco_v2, pcl_v2


def get_config(text=None):
    """The recipe."""
    config = cifar10_moco_v2.get_config(text)
    config.method = "pcl"
    for name in ("queue_size", "momentum", "temperature"):
        config.pcl[name] = config.moco[name]
    config.pcl.num_clusters = (1000, 2000, 4000)
    config.pcl.warmup_epochs = pcl_v2.warmup_epochs(config.epochs)
    return config
