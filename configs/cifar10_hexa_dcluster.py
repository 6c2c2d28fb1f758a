"""HEXA_DCluster on CIFAR-10 or any set of 32-pixel images: configs/cifar10_deepcluster_v2.py with every crop attacked.

Command:   python -m hexa_jax.main --config=configs/cifar10_hexa_dcluster.py --workdir=DIR
Hardware, data: as configs/cifar10_deepcluster_v2.py.
Time:      not measured on an accelerator.
Expected:  no published number; a run on a part of the data with a narrow network is in docs/results.md.
"""

from configs import cifar10_deepcluster_v2, common


def get_config():
    """The recipe."""
    return common.hard_examples(cifar10_deepcluster_v2.get_config())
