"""DeepCluster-v2, ResNet-50, ImageNet, two crops, B = 256, 200 epochs: the plain method that HEXA_DCluster is compared with.

Command:   python -m hexa_jax.main --config=configs/deepcluster_v2.py --workdir=DIR
Hardware:  any; BatchNorm statistics are over all 256 images, which one accelerator holds in 2 to 4 microbatches only if
           bn_group_size is lowered with them.
Time:      not measured here.
Expected:  67.6 ImageNet linear top-1 (the paper, Table 1; the reference has no 200-epoch run, and 70.2 after 400 at B = 4096).

Numbers: lr 0.6 to 0.0006 without warm-up at B = 256 is the reference's 256-image recipe (facebookresearch/swav, the
small-batch script); crops 0.08 to 1, jitter 0.8/0.2, std .228, weight decay 1e-6, 3 x 3000 clusters, temperature 0.1 and
LARC with trust 0.001 are those of its main_deepclusterv2.py and scripts.
"""

from configs import common


def get_config():
    """The recipe."""
    config = common.deepcluster(common.get_config())
    config.precision = "bfloat16"  # ours; the reference computes in float32
    config.runtime.workers = 8  # one decodes and cuts a few hundred images a second
    return config
