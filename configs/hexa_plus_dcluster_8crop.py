"""HEXA+_DCluster (8-crop), ResNet-50, ImageNet: adversarial and cut-mixed views together (alpha1 = alpha2 = 1).

Command:   python -m hexa_jax.main --config=configs/hexa_plus_dcluster_8crop.py --workdir=DIR
Arguments: epochs=200 (or 800)
Hardware:  as configs/deepcluster_v2.py with B = 4096.
Time:      not measured at this size.
Expected:  VOC07 SVM 88.8 mAP after 200 epochs, 88.2 after 800; ImageNet with 1 % of the labels 54.9 and 57.3 (the paper, Tables 1
           and 3).
"""

from hexa_jax.configs import hexa_dcluster_8crop


def get_config(text=None):
    """The recipe."""
    config = hexa_dcluster_8crop.get_config(text)
    config.views.cutmix.weight = 1.0
    return config
