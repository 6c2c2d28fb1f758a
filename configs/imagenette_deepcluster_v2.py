"""DeepCluster-v2 on Imagenette at 160 pixels or any small set of photographs: ResNet-18, crops of 128 pixels.

Command:   python -m hexa_jax.main --config=configs/imagenette_deepcluster_v2.py --workdir=DIR
           other data: --config.data.source=folder:TRAIN --config.data.eval_source=folder:VAL
Arguments: epochs=200; scheme= (hard examples, as in Fig. 2: std+adv, std+cmx, ...)
Hardware:  one accelerator.
Time:      not measured.
Expected:  no published number; nothing measured here yet. Ours: configs/deepcluster_v2.py with a head and clusters for a small
           data set.
"""

from hexa_jax.configs import common


def get_config(text=None):
    """The recipe."""
    choice = common.arguments(text, epochs=200, scheme="")
    config = common.imagenette(common.deepcluster(common.get_config()))
    config.model.head_hidden = 512
    config.deepcluster.num_clusters = 256
    config.data.min_scale = (0.14,)
    config.epochs, config.scheme = choice.epochs, choice.scheme
    return config
