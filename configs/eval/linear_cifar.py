"""The CIFAR linear probe: a linear classifier on frozen features of images resized to 224, no augmentation.

Command:   python -m hexa_jax.main --config=configs/eval/linear_cifar.py --config.checkpoint=WORKDIR --workdir=DIR
Arguments: dataset=cifar10 (or cifar100); epochs=20
Hardware:  any.
Time:      not measured.
Expected:  after 200 epochs of pre-training on ImageNet, CIFAR-10 / CIFAR-100 (the paper, Table 1): 90.4 / 71.5 for HEXA_MoCo
           (MoCo-v2 89.4 / 70.1), 90.7 / 71.5 for HEXA_DCluster (DeepCluster-v2 89.6 / 70.9), with 8
           crops 92.9 / 76.6 for HEXA_DCluster and 91.9 / 75.2 for HEXA+_DCluster. docs/results.md
           has ours, of small networks.

Numbers: the paper's Appendix B: Adamax, 20 epochs, batch 256, learning rates 0.1, 0.01 and 0.001,
x0.1 at epochs 7 and 14 (the same shares of other numbers of epochs).
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import linear


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, dataset="cifar10", epochs=20)
    config = linear.get_config(f"epochs={choice.epochs}")
    config.data.source, config.data.eval_source = f"tfds:{choice.dataset}:train", f"tfds:{choice.dataset}:test"
    config.data.resize = config.data.crop = 224
    return config
