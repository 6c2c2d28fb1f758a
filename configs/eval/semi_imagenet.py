"""Semi-supervised ImageNet: fine-tune the whole network on 1 %, 10 % or all labels.

Command:   python -m hexa_jax.main --config=configs/eval/semi_imagenet.py:percent=1 --config.checkpoint=WORKDIR --workdir=DIR
           your own data: --config.data.source=folder:TRAIN --config.data.eval_source=folder:VAL
           --config.data.list=FILE (a plain text file that lists the images to use, by path or by
           file name, as SimCLR's 1percent.txt does)
Arguments: percent=1 (10, 100); epochs=20
Hardware:  an accelerator.
Time:      not measured.
Expected:  top-1 with 1, 10 and 100 % of the labels for HEXA+_DCluster (8-crop): 54.9, 69.4 and 77.2 after 200 epochs of
           pre-training, 57.3, 71.8 and 78.6 after 800 (the paper, Table 3).

Numbers: the paper's Appendix B: SGD 0.9, batch 256, weight decay 5e-4, 20 epochs, x0.2 at epochs 12
and 16, learning rate 0.01 for the network and 0.1 (10 %) or 1 (1 %) for the classifier; 0.1 for all
labels is ours. Random crops and flips, and BatchNorm in training mode over the whole batch, as
eval_semisup.py of facebookresearch/swav.
"""

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, percent=1, epochs=20)
    if choice.percent not in (1, 10, 100):
        raise ValueError(f"percent={choice.percent} is not known: use 1, 10 or 100")
    config = evaluation.get_config("finetune")
    subset = "imagenet2012" if choice.percent == 100 else f"imagenet2012_subset/{choice.percent}pct"
    config.data.source, config.data.eval_source = f"tfds:{subset}:train", "tfds:imagenet2012:validation"
    evaluation.finetuning(config, choice.epochs)
    config.data.augment = True
    config.optimizer.name = "sgd"
    config.optimizer.learning_rates = (0.01,)
    config.optimizer.classifier_factor = 100.0 if choice.percent == 1 else 10.0
    config.optimizer.weight_decay = 5e-4
    config.optimizer.milestones = common.milestones(choice.epochs, 60, 80)
    config.optimizer.decay = 0.2
    return config
