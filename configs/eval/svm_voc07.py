"""Linear SVMs on Pascal VOC 2007: mAP of image classification with frozen features.

Command:   python -m hexa_jax.main --config=configs/eval/svm_voc07.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=voc:VOCDEVKIT:trainval --config.data.eval_source=voc:VOCDEVKIT:test
           (or tfds:voc/2007:train+validation and tfds:voc/2007:test)
Arguments: protocol=pcl (the paper's) or goyal
Hardware:  any; the SVMs run on the CPU.
Time:      not measured on the whole data set.
Expected:  85.0 for HEXA_MoCo after 200 epochs, 84.5 for MoCo-v2 (the paper, Table 1).

Numbers: eval_svm_voc.py of salesforce/PCL (pcl: features pooled over the centre crop) and
facebookresearch/fair_self_supervision_benchmark (goyal: 2 x 2 features, 8192 of a ResNet-50, of the
whole image squashed to a square). MoCo-v2 after 200 epochs: 85.4 with pcl (PCL's README), 84.0 with
goyal (mmselfsup).
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    return evaluation.voc07("svm", common.arguments(text, protocol="pcl").protocol)
