"""Linear SVMs on Pascal VOC 2007: mAP of image classification with frozen features.

Command:   python -m hexa_jax.main --config=configs/eval/svm_voc07.py --config.checkpoint=WORKDIR --workdir=DIR
               --config.data.source=voc:VOCDEVKIT:trainval --config.data.eval_source=voc:VOCDEVKIT:test
           (or tfds:voc/2007:train+validation and tfds:voc/2007:test)
Arguments: protocol=pcl (the paper's) or goyal
Hardware:  any; the SVMs run on the CPU.
Time:      not measured on the whole data set.
Expected:  85.0 for HEXA_MoCo after 200 epochs, 84.5 for MoCo-v2 (the paper, Table 1).

Numbers: eval_svm_voc.py of salesforce/PCL (pcl) and facebookresearch/fair_self_supervision_benchmark (goyal); features are pooled
in both here, where goyal's own are 2 x 2 maps of squashed images.
"""

from configs import common
from configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, protocol="pcl")
    config = evaluation.get_config("svm")
    config.protocol = choice.protocol
    config.costs = (0.5,) if choice.protocol == "pcl" else (0.01, 0.1)
    return config
