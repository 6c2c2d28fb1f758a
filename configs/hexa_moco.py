"""HEXA_MoCo, ResNet-50, ImageNet: MoCo-v2 with adversarial queries (Algorithm 1, alpha1 = 1, alpha2 = 0).

Command:   python -m hexa_jax.main --config=configs/hexa_moco.py --workdir=DIR
           (--config.views.attack_norm=clean makes the attack with the main BatchNorm: one forward
           and backward fewer)
Arguments: epochs=200 (or 800)
Hardware:  as MoCo-v2.
Time:      about 2.25 times MoCo-v2's with the auxiliary attack, by arithmetic (9 forward-sized passes for 4); not measured.
Expected:  68.9 ImageNet linear top-1 after 200 epochs (the paper, Table 1).

Key momentum 0.99 is Algorithm 1's; MoCo-v2 itself has 0.999, so compare with a plain control:
    --config=configs/moco_v2.py --config.moco.momentum=0.99
"""

from hexa_jax.configs import common, moco_v2


def get_config(text=None):
    """The recipe."""
    config = common.hard_examples(moco_v2.get_config(text))
    config.moco.momentum = 0.99
    return config
