"""Low-shot classification on Pascal VOC 2007: linear SVMs on k labelled images per class, five draws.

Command:   python -m hexa_jax.main --config=configs/eval/lowshot_voc07.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=voc:VOCDEVKIT:trainval --config.data.eval_source=voc:VOCDEVKIT:test
Arguments: protocol=pcl (the paper's) or goyal
Hardware:  any; the SVMs run on the CPU.
Time:      not measured on the whole data set.
Expected:  56.9 / 67.3 / 76.4 / 81.1 / 84.0 mAP at k = 2 / 4 / 8 / 16 / 32 for HEXA+_DCluster (8-crop), 200 epochs (the paper).

Numbers: as configs/eval/svm_voc07.py; k from both protocols, five draws.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    config = evaluation.voc07("lowshot", common.arguments(text, protocol="pcl").protocol)
    config.shots = (1, 2, 4, 8, 16, 32, 64, 96)
    config.draws = 5
    return config
