"""DeepCluster-v2, ResNet-50, ImageNet: the plain method that HEXA_DCluster is compared with.

Command:   python -m hexa_jax.main --config=configs/deepcluster_v2.py --workdir=DIR
Arguments: crops=2 (2x224), 6 (2x160 + 4x96) or 8 (2x224 + 6x96); batch=0 (256 for two crops, 4096
           for more), 256 or 4096; epochs=200 (or 400, 800):
           --config=configs/deepcluster_v2.py:crops=8,epochs=800
Hardware:  two crops: any; BatchNorm statistics are over all 256 images. B = 4096: 64 V100 in the reference; fewer devices take
           --config.runtime.microbatches=8 or so, with the same result (BatchNorm groups of 512 stay whole).
Time:      not measured here.
Expected:  ImageNet linear top-1. Two crops, 200 epochs: 67.6 (the paper, Table 1). Reference (README of facebookresearch/swav),
           B = 4096: 70.2 (2 crops, 400 epochs), 74.3 (6 crops, 400 epochs), 75.2 (8 crops, 800
           epochs).

Numbers: scripts and main_deepclusterv2.py of facebookresearch/swav: crops and scales, jitter
0.8/0.2, std .228, weight decay 1e-6, 3 x 3000 clusters, temperature 0.1, LARC with trust 0.001; at
B = 4096 lr 4.8 to 0.0048 with 10 epochs of warm-up from 0.3. It has no script for DeepCluster-v2 at
B = 256: lr 0.6 to 0.0006 without warm-up is its recipe for SwAV there.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, crops=2, batch=0, epochs=200)
    config = common.multi_crop(common.deepcluster(common.get_config()), choice.crops)
    config.epochs = choice.epochs
    common.larc_batch(config, choice.batch or (256 if choice.crops == 2 else 4096))
    return common.on_imagenet(config)
