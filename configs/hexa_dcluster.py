"""HEXA_DCluster, ResNet-50, ImageNet, two crops, B = 256: every crop attacked (Algorithm 2, alpha1 = 1, alpha2 = 0).

Command:   python -m hexa_jax.main --config=configs/hexa_dcluster.py --workdir=DIR
           your own images: --config.data.source=folder:DIR --config.deepcluster.num_clusters=300
Arguments: those of configs/deepcluster_v2.py
Hardware:  as configs/deepcluster_v2.py.
Time:      about 2.7 times the plain method's with the auxiliary attack, 2 times with --config.views.attack_norm=clean, by
           arithmetic (8 or 6 forward-sized passes for 3); not measured at this size.
Expected:  68.1 ImageNet linear top-1 after 200 epochs (the paper, Table 1).
"""

from hexa_jax.configs import common, deepcluster_v2


def get_config(text=None):
    """The recipe."""
    return common.hard_examples(deepcluster_v2.get_config(text))
