"""HEXA_DCluster (8-crop), ResNet-50, ImageNet, 2x224 + 6x96, B = 4096: every crop attacked (alpha1 = 1, alpha2 = 0).

Command:   python -m hexa_jax.main --config=configs/hexa_dcluster_8crop.py --workdir=DIR
Arguments: epochs=200 (or 800)
Hardware:  as configs/deepcluster_v2.py with B = 4096.
Time:      not measured at this size.
Expected:  74.0 ImageNet linear top-1 after 200 epochs, 75.5 after 800 (the paper, Table 1).

Numbers: the reference's 800-epoch script (see configs/deepcluster_v2.py); the paper gives crops,
    batch, epochs and alphas.
"""

from hexa_jax.configs import common, deepcluster_v2


def get_config(text=None):
    """The recipe."""
    epochs = common.arguments(text, epochs=200).epochs
    return common.hard_examples(deepcluster_v2.get_config(f"crops=8,epochs={epochs}"))
