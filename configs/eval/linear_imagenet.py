"""The ImageNet linear probe: a linear classifier on the frozen pooled feature, trained with random crops and flips.

Command:   python -m hexa_jax.main --config=configs/eval/linear_imagenet.py:family=moco --config.checkpoint=WORKDIR --workdir=DIR
Arguments: family=deepcluster (lr 0.3, cosine, weight decay 1e-6) or moco (lr 30, x0.1 after 60 and
    80 % of the steps); epochs=100
Hardware:  any.
Time:      not measured.
Expected:  the paper's Table 1: 68.9 for HEXA_MoCo and 68.1 for HEXA_DCluster after 200 epochs of pre-training.

Numbers: the paper's Appendix B; batch 256, weight decay and initialisation from main_lincls.py of
facebookresearch/moco and eval_linear.py of facebookresearch/swav. How the learning rate falls
within Fig. 2's single epoch the paper does not say: here as in a long run. The data are those of
the pre-training run unless data.source and data.eval_source say otherwise.
"""

import ml_collections

from hexa_jax.configs import common
from hexa_jax.configs.eval import common as evaluation


def get_config(text=None):
    """The protocol."""
    choice = common.arguments(text, family="deepcluster", epochs=100)
    if choice.family not in ("moco", "deepcluster"):
        raise ValueError(f"family={choice.family} is not known: use moco or deepcluster")
    config = evaluation.get_config("linear")
    config.epochs = choice.epochs
    config.batch_size = 256

    config.optimizer = optimizer = ml_collections.ConfigDict()
    # Trained side by side; the first is the protocol's, and what top1 and top5 mean.
    optimizer.learning_rates = (30.0,) if choice.family == "moco" else (0.3,)
    optimizer.momentum = 0.9
    optimizer.weight_decay = 0.0 if choice.family == "moco" else 1e-6
    optimizer.schedule = "steps" if choice.family == "moco" else "epoch_cosine"
    optimizer.milestones = common.milestones(choice.epochs, 60, 80)
    optimizer.decay = 0.1

    config.data.min_scale = 0.08
    return config
