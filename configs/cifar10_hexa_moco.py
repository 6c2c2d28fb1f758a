"""HEXA_MoCo on CIFAR-10 or any set of 32-pixel images: configs/cifar10_moco_v2.py with adversarial queries.

Command:   python -m hexa_jax.main --config=configs/cifar10_hexa_moco.py --workdir=DIR
Hardware, data: as configs/cifar10_moco_v2.py, which is also the plain control at the same key momentum.
Time:      not measured on an accelerator.
Expected:  no published number; a run on a part of the data with a narrow network is in docs/results.md.
"""

from configs import cifar10_moco_v2, common


def get_config():
    """The recipe."""
    return common.hard_examples(cifar10_moco_v2.get_config())
