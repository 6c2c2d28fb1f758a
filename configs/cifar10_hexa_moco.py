"""HEXA_MoCo on CIFAR-10 or any set of 32-pixel images: configs/cifar10_moco_v2.py with adversarial queries.

Command:   python -m hexa_jax.main --config=configs/cifar10_hexa_moco.py --workdir=DIR
Arguments: epochs=200
Hardware, data: as configs/cifar10_moco_v2.py, which is also the plain control at the same key
    momentum.
Time:      not measured on an accelerator.
Expected:  no published number; runs on parts of the data with a narrow network are in docs/results.md.
"""

from hexa_jax.configs import cifar10_moco_v2, common


def get_config(text=None):
    """The recipe."""
    epochs = common.arguments(text, epochs=200).epochs
    return common.hard_examples(cifar10_moco_v2.get_config(f"epochs={epochs}"))
